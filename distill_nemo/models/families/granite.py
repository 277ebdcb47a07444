"""Granite 3: Llama with constant factors on embeddings, attention scores, residual branches and logits."""

from dataclasses import dataclass
from typing import Any

from distill_nemo.fields import setting
from distill_nemo.models.architecture import Architecture, Multipliers
from distill_nemo.models.families.family import Family, OwnFields

LEAST, MOST = 1e-6, 1e6  # beyond them, products leave the range of fp32


@dataclass(frozen=True)
class GraniteFields(OwnFields):
    """Granite's constant factors."""

    embedding_multiplier: float = setting(1.0, at_least=LEAST, at_most=MOST)
    attention_multiplier: float = setting(
        1.0, "of queries times keys, in place of 1 / sqrt(head_dim)", at_least=LEAST, at_most=MOST
    )
    residual_multiplier: float = setting(1.0, at_least=LEAST, at_most=MOST)
    logits_scaling: float = setting(1.0, "divides logits", at_least=LEAST, at_most=MOST)


def multipliers(values: dict[str, Any]) -> Multipliers:
    """Return the constants of a model with `GraniteFields` (`Family.multipliers`)."""
    own = values["family_fields"]
    return Multipliers(
        embedding=own["embedding_multiplier"],
        residual=own["residual_multiplier"],
        logits=1 / own["logits_scaling"],
    )


def settings(model: Architecture) -> dict[str, Any]:
    """Return the factor of the scores (`Family.settings`)."""
    return {"softmax_scale": model.family_fields["attention_multiplier"]}


GRANITE = Family(
    "granite",
    "GraniteForCausalLM",
    defaults={"max_position_embeddings": 2048},
    own_fields=GraniteFields,
    multipliers=multipliers,
    settings=settings,
)
