"""Passes of a run over each part of its training data, from the token files' indexes and manifests. No torch."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from distill_nemo.config import RunConfig
from distill_nemo.data.manifest import read_manifest
from distill_nemo.data.token_files import document_lengths, parse_blend, to_number

MANY_PASSES = 4  # up to which repeated tokens are worth almost as much as new ones (Muennighoff et al., 2305.16264)


@dataclass(frozen=True)
class PartOfBlend:
    """One pair of token files in a run.

    Args:
        prefix: of the files.
        share: of the run's tokens that come from them.
        passes: times that the run reads each of their tokens.
        tokens: number of tokens in the files' training split.
        counted: share of tokens that count in the losses, by the manifest; None if it does not say.
    """

    prefix: str
    share: float
    passes: float
    tokens: int
    counted: float | None


def parts_of_blend(config: RunConfig) -> list[PartOfBlend]:
    """Return the parts of `data.train`; none if a file is missing.

    Raises:
        ValueError: for weights that cannot be read.
    """
    data = config.data
    prefixes, weights = parse_blend("data.train", data.train)
    if not all(Path(f"{prefix}.idx").is_file() for prefix in prefixes):
        return []
    held = [0.0 if data.valid else 1 - _training_share(data.split)] * len(prefixes)
    whole = [int(document_lengths(prefix).sum(dtype=np.int64)) for prefix in prefixes]
    tokens = [max(round(number * (1 - part)), 1) for number, part in zip(whole, held, strict=True)]
    shares = [weight / sum(weights or whole) for weight in weights or whole]
    read = config.training.steps * config.training.global_batch_size * data.sequence_length
    return [
        PartOfBlend(prefix, share, share * read / number, number, None if data.loss_on == "all" else _counted(prefix))
        for prefix, share, number in zip(prefixes, shares, tokens, strict=True)
    ]


def _training_share(split: str) -> float:
    weights = [to_number(part) or 0.0 for part in split.split(",")]
    return weights[0] / (sum(weights) or 1.0)


def _counted(prefix: str) -> float | None:
    manifest = read_manifest(prefix)
    counted, tokens = manifest.get("counted_tokens"), manifest.get("tokens")
    return counted / tokens if type(counted) is int and type(tokens) is int and tokens else None
