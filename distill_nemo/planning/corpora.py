"""Passes of a run over each part of its training data, from the token files' indexes and manifests. No torch."""

from dataclasses import dataclass

from distill_nemo.config import RunConfig
from distill_nemo.data.corpora import check_once, corpus_at
from distill_nemo.data.token_files import parse_blend, to_number

MANY_PASSES = 4  # up to which repeated tokens are worth almost as much as new ones (Muennighoff et al., 2305.16264)


@dataclass(frozen=True)
class PartOfBlend:
    """One corpus in a run.

    Args:
        prefix: of the files, or a store.
        share: of the run's tokens that come from them.
        passes: times that the run reads each of their tokens.
        tokens: number of tokens in the files' training split.
        valid_share: share of tokens that count in the losses, by the manifest; None if it does not say.
        note: what else is to be said.
    """

    prefix: str
    share: float
    passes: float
    tokens: int
    valid_share: float | None
    note: str = ""


def parts_of_blend(config: RunConfig) -> list[PartOfBlend]:
    """Return the parts of `data.train`; none if a file is missing.

    Raises:
        ValueError: for weights that cannot be read, a corpus that is named twice, or files that a run would refuse.
    """
    data = config.data
    prefixes, weights = parse_blend("data.train", data.train)
    corpora = [corpus_at(prefix) for prefix in prefixes]
    if not all(corpus.files for corpus in corpora):
        return []
    for corpus in corpora:
        corpus.check("data.train", data)
    check_once("data.train", corpora)
    held = [0.0 if data.valid else 1 - _training_share(data.split)] * len(prefixes)
    whole = [corpus.pass_tokens() for corpus in corpora]
    tokens = [max(round(number * (1 - part)), 1) for number, part in zip(whole, held, strict=True)]
    shares = [weight / sum(weights or whole) for weight in weights or whole]
    read = config.training.steps * config.training.global_batch_size * data.sequence_length
    valid_share = [None if data.loss_on == "all" else corpus.valid_share for corpus in corpora]
    return [
        PartOfBlend(corpus.path, share, share * read / number, number, part, corpus.note)
        for corpus, share, number, part in zip(corpora, shares, tokens, valid_share, strict=True)
    ]


def _training_share(split: str) -> float:
    weights = [to_number(part) or 0.0 for part in split.split(",")]
    return weights[0] / (sum(weights) or 1.0)
