"""Model families, one file each."""

from distill_nemo.models.families.deepseek_v3 import DEEPSEEK_V3
from distill_nemo.models.families.gemma import GEMMA3_TEXT
from distill_nemo.models.families.gemma2 import GEMMA2
from distill_nemo.models.families.glm4_moe import GLM4_MOE
from distill_nemo.models.families.glm4_moe_lite import GLM4_MOE_LITE
from distill_nemo.models.families.gpt_oss import GPT_OSS
from distill_nemo.models.families.granite import GRANITE
from distill_nemo.models.families.granitemoe import GRANITEMOE
from distill_nemo.models.families.granitemoehybrid import GRANITEMOEHYBRID
from distill_nemo.models.families.llama import LLAMA
from distill_nemo.models.families.ministral import MINISTRAL
from distill_nemo.models.families.mistral import MISTRAL
from distill_nemo.models.families.mixtral import MIXTRAL
from distill_nemo.models.families.nemotron_h import NEMOTRON_H
from distill_nemo.models.families.olmo2 import OLMO2
from distill_nemo.models.families.olmo3 import OLMO3
from distill_nemo.models.families.olmoe import OLMOE
from distill_nemo.models.families.phi3 import PHI3
from distill_nemo.models.families.qwen2 import QWEN2
from distill_nemo.models.families.qwen2_moe import QWEN2_MOE
from distill_nemo.models.families.qwen3 import QWEN3
from distill_nemo.models.families.qwen3_5 import QWEN3_5_TEXT
from distill_nemo.models.families.qwen3_5_moe import QWEN3_5_MOE_TEXT
from distill_nemo.models.families.qwen3_moe import QWEN3_MOE
from distill_nemo.models.families.qwen3_next import QWEN3_NEXT
from distill_nemo.models.families.seed_oss import SEED_OSS
from distill_nemo.models.families.smollm3 import SMOLLM3

FAMILIES = {
    family.model_type: family
    for family in (
        DEEPSEEK_V3,
        GEMMA3_TEXT,
        GEMMA2,
        GLM4_MOE,
        GLM4_MOE_LITE,
        GPT_OSS,
        GRANITE,
        GRANITEMOE,
        GRANITEMOEHYBRID,
        LLAMA,
        MINISTRAL,
        MISTRAL,
        MIXTRAL,
        NEMOTRON_H,
        OLMO2,
        OLMO3,
        OLMOE,
        PHI3,
        QWEN2,
        QWEN2_MOE,
        QWEN3,
        QWEN3_5_TEXT,
        QWEN3_5_MOE_TEXT,
        QWEN3_MOE,
        QWEN3_NEXT,
        SEED_OSS,
        SMOLLM3,
    )
}
