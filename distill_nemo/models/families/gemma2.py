"""Gemma 2: Gemma 3 with capped scores of attention, windows in every other layer, and one rotary embedding."""

from dataclasses import dataclass, replace

from distill_nemo.fields import setting
from distill_nemo.models.config_fields import MAX_SIZE
from distill_nemo.models.families.gemma import ACTIVATION, GEMMA3_TEXT, gemma_refused
from distill_nemo.models.families.windows import AlternatingWindows, with_windows


@dataclass(frozen=True)
class Gemma2Fields(AlternatingWindows):
    """Windows in the first of every two layers, and constants."""

    query_pre_attn_scalar: int = setting(256, "attention divides scores by its root", at_least=1, at_most=MAX_SIZE)
    final_logit_softcapping: float | None = setting(30.0, above=0)
    attn_logit_softcapping: float | None = setting(50.0, above=0)


GEMMA2 = replace(
    GEMMA3_TEXT,
    model_type="gemma2",
    hf_class="Gemma2ForCausalLM",
    defaults=GEMMA3_TEXT.defaults | {"max_position_embeddings": 8192},
    qk_norm=False,
    layer_ropes=(),
    own_fields=Gemma2Fields,
    layers=with_windows,
    spelled=lambda config: {},
    refused=gemma_refused,
    write_own=lambda model: {"hidden_activation": ACTIVATION},
)
