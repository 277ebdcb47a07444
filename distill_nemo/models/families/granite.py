"""Granite 3: Llama with constant factors on embeddings, attention scores, residual branches and logits."""

from dataclasses import dataclass
from typing import Any

from distill_nemo.fields import setting
from distill_nemo.models.architecture import Multipliers
from distill_nemo.models.families.family import Family, OwnFields


@dataclass(frozen=True)
class GraniteFields(OwnFields):
    """Granite's constant factors."""

    embedding_multiplier: float = setting(1.0, above=0)
    attention_multiplier: float = setting(1.0, "of queries times keys, in place of 1 / sqrt(head_dim)", above=0)
    residual_multiplier: float = setting(1.0, above=0)
    logits_scaling: float = setting(1.0, "divides logits", above=0)


def _multipliers(values: dict[str, Any]) -> Multipliers:
    own = values["family_fields"]
    return Multipliers(
        embedding=own["embedding_multiplier"],
        residual=own["residual_multiplier"],
        logits=1 / own["logits_scaling"],
    )


GRANITE = Family(
    "granite",
    "GraniteForCausalLM",
    defaults={"max_position_embeddings": 2048},
    own_fields=GraniteFields,
    multipliers=_multipliers,
    settings=lambda model: {"softmax_scale": model.family_fields["attention_multiplier"]},
)
