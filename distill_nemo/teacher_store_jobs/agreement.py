"""Compare what a store holds with what its teacher says now.

Legend: M tokens that count, n a chunk of them, v a vocabulary shard, K stored ids.
"""

from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from distill_nemo.data.samplers import TARGET
from distill_nemo.losses.collectives import Gather
from distill_nemo.teacher_store.codecs.codec import Arrays
from distill_nemo.teacher_store.codecs.top_k import LEAST
from distill_nemo.teacher_store.manifest import Manifest
from distill_nemo.teacher_store_jobs.targets import encode_chunk
from distill_nemo.teacher_store_jobs.teacher_run import Chunk, Rows

EDGES = (1e-4, 1e-3, 1e-2, 1e-1, 0.5)  # of the classes of probability, in which draws are counted
FEWEST = 10.0  # draws that a class must expect; smaller ones are joined
SMALLEST_P = 1e-6  # chance of a true store's chi-square to be refused
TOLERANCE = {"float32": 1e-3, "bfloat16": 5e-2}  # nats, or of the hidden states' size: mean over tokens


def encode_and_count(manifest: Manifest, chunk: Chunk) -> Rows:
    """Return the store's numbers of each token, and what the teacher says of the stored ids.

    With draws, those stored and expected in each class, [n, classes]; with `top_k`, log-probabilities, [n, K].
    """
    found = encode_chunk(manifest, chunk)
    if manifest.codec == "sampled":
        stored, expected = _draws_by_class(manifest, chunk)
        return found | {"stored_draws": stored, "expected_draws": expected}
    if manifest.codec == "top_k":
        return found | {"logprobs_of_stored": _logprobs_of_stored(manifest, chunk)}
    return found


def _draws_by_class(manifest: Manifest, chunk: Chunk) -> tuple[Tensor, Tensor]:
    gather = Gather(chunk.group)
    p_nv = _logprobs(manifest, chunk, gather).exp()
    class_nv = torch.bucketize(p_nv, torch.tensor(EDGES, device=p_nv.device))
    expected = p_nv.new_zeros(len(p_nv), len(EDGES) + 1).scatter_add_(-1, class_nv, p_nv * manifest.num)
    (column_nK, own_nK), counts_nK = _columns_of_stored(chunk), chunk.rows[TARGET + "counts"]
    class_nK = class_nv.gather(-1, column_nK)
    stored = torch.zeros_like(expected).scatter_add_(-1, class_nK, counts_nK.where(own_nK, 0).to(p_nv.dtype))
    return gather(stored).sum(0), gather(expected).sum(0)


def _logprobs_of_stored(manifest: Manifest, chunk: Chunk) -> Tensor:
    gather, (column_nK, own_nK) = Gather(chunk.group), _columns_of_stored(chunk)
    return gather(_logprobs(manifest, chunk, gather).gather(-1, column_nK).where(own_nK, 0)).sum(0)


def _logprobs(manifest: Manifest, chunk: Chunk, gather: Gather) -> Tensor:
    """Return the teacher's log-probabilities at the store's temperature, [n, v]."""
    z_nv = chunk.logits_nv / manifest.temperature
    return z_nv - gather(z_nv.logsumexp(-1)).logsumexp(0)[:, None]


def _columns_of_stored(chunk: Chunk) -> tuple[Tensor, Tensor]:
    """Return this shard's columns of the stored ids, and True where it has them, [n, K] each; elsewhere column 0."""
    ids_nK = chunk.rows[TARGET + "ids"]
    column_nK = ids_nK.long() - chunk.vocab_start
    own_nK = (ids_nK >= 0) & (column_nK >= 0) & (column_nK < chunk.logits_nv.shape[-1])
    return column_nK.where(own_nK, 0), own_nK


@dataclass
class Agreement:
    """Sums over the tokens of some windows."""

    manifest: Manifest
    tokens: int = 0
    same: float = 0.0  # tokens whose ids, or channels, are equal
    apart: dict[str, float] = field(default_factory=dict)  # differences, by field
    draws: np.ndarray = field(default_factory=lambda: np.zeros((2, len(EDGES) + 1)))  # stored and expected, by class

    def add(self, now: Arrays, stored: Arrays) -> None:
        """Add a window: the teacher's answer, and what is stored."""
        self.tokens += len(stored["top1"])
        names = [name for name in ("entropy", "label_logprob", "entropy_at_1") if name in stored]
        differences = {name: np.abs(now[name] - stored[name]) for name in names}
        if self.manifest.codec == "sampled":
            same = (now["ids"] == stored["ids"]).all(-1) & (now["counts"] == stored["counts"]).all(-1)
            self.draws += np.stack([now["stored_draws"].sum(0), now["expected_draws"].sum(0)])
        elif self.manifest.codec == "top_k":
            same = (now["ids"] == stored["ids"]).mean(-1)
            logprobs = np.maximum(now["logprobs_of_stored"], LEAST)
            differences["logprobs"] = np.abs(logprobs - stored["logprobs"]).mean(-1)
            differences["tail"] = np.abs(np.exp(now["tail"]) - np.exp(stored["tail"]))
        else:
            a, b = (_as_float(each["hidden"]) for each in (now, stored))
            same = (now["hidden"] == stored["hidden"]).mean(-1)
            differences["hidden"] = np.linalg.norm(a - b, axis=-1) / np.maximum(np.linalg.norm(b, axis=-1), 1e-30)
        self.same += float(same.sum())
        for name, values in differences.items():
            self.apart[name] = self.apart.get(name, 0.0) + float(values.sum(dtype=np.float64))

    def __add__(self, other: "Agreement") -> "Agreement":
        apart = {name: self.apart.get(name, 0.0) + value for name, value in other.apart.items()}
        sums = {"tokens": self.tokens + other.tokens, "same": self.same + other.same}
        return replace(self, **sums, apart=self.apart | apart, draws=self.draws + other.draws)

    @property
    def chance(self) -> float:
        """Chance of such draws, or less likely ones, from the teacher: a chi-square test over classes of probability.

        Systematic draws scatter less than the independent ones that the test assumes, so a true store is refused even
        less often than it says.
        """
        classes: list[np.ndarray] = []
        for column in self.draws.T:
            if classes and classes[-1][1] < FEWEST:
                classes[-1] = classes[-1] + column
            else:
                classes.append(column)
        if len(classes) > 1 and classes[-1][1] < FEWEST:
            classes[-2:] = [classes[-2] + classes[-1]]
        if len(classes) < 2:
            return 1.0
        stored, expected = np.stack(classes).T
        statistic = float(((stored - expected) ** 2 / expected).sum())
        return float(torch.special.gammaincc(torch.tensor((len(classes) - 1) / 2.0), torch.tensor(statistic / 2)))

    def problem(self) -> str | None:
        """Return the reason why these are not the teacher's windows, or None."""
        if not self.tokens:  # windows in which none counts
            return None
        allowed = TOLERANCE[self.manifest.dtype]
        wrong = [
            f"{name} is {value / self.tokens:.2g} apart, allowed {allowed:g}"
            for name, value in self.apart.items()
            if not value / self.tokens <= allowed
        ]
        if self.manifest.codec == "sampled" and self.same < self.tokens and not self.chance >= SMALLEST_P:
            wrong.append(f"chance of its draws {self.chance:.1g}, needed {SMALLEST_P:g}")
        return "; ".join(wrong) or None

    def summary(self) -> str:
        """Return a line about windows that agree."""
        what = {"sampled": "draws", "top_k": "ids", "hidden": "channels"}[self.manifest.codec]
        apart = ", ".join(f"{name} {value / max(self.tokens, 1):.1e}" for name, value in self.apart.items())
        chance = f", chance of the stored draws {self.chance:.2g}" if self.manifest.codec == "sampled" else ""
        return (
            f"{self.tokens:,} tokens asked again: {self.same / max(self.tokens, 1):.2%} have the same {what}{chance}; "
            f"apart on average: {apart}"
        )


def _as_float(values: np.ndarray) -> np.ndarray:
    """Return hidden states as float64; those of bfloat16 from their bits."""
    bits = values.astype(np.uint32) << 16
    return (bits.view(np.float32) if values.dtype == np.uint16 else values).astype(np.float64)
