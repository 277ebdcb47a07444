"""Attention and Transformer Engine's layers on the device, against plain formulas and against our own layers."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from distill_nemo.config import ParallelismConfig, StudentConfig
from distill_nemo.runtime.process_groups import process_group_of_one
from distill_nemo.runtime.seed import seed_everything
from tests.gpu.conftest import REHEARSAL
from tests.tiny_models import FAMILIES, write_hf
from tests.unit.models.test_capped_attention import core_attention, formula, gradients, inputs

DTYPE, ALLOWED = (torch.float32, 1e-4) if REHEARSAL else (torch.bfloat16, 2e-2)
FUSED = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION]
SHAPES = {  # queries, keys, window
    "causal": (512, 512, None),
    "a later piece": (300, 601, None),
    "window": (600, 600, 100),
    "window, a later piece": (300, 601, 100),
}
ON_TE = (
    "llama",
    "qwen2",
    "qwen3",
    "olmo2",
    "gemma2",
    "gemma3_text",
    "granite",
    "deepseek_v3",
    "mixtral",
    "qwen3_moe",
    "gpt_oss",
)


@pytest.mark.parametrize("sinks", [False, True], ids=["", "sinks"])
@pytest.mark.parametrize("shape", SHAPES)
def test_fused_attention_keeps_no_scores(device, shape, sinks):
    """Torch raises an error if only its plain attention, which keeps all scores, would do."""
    queries, keys, window = SHAPES[shape]
    sizes = {"heads": 8, "groups": 2, "width": 64}
    tensors = [(x / 3).detach() for x in inputs(queries, keys, **sizes)]
    with process_group_of_one():
        attention = core_attention(window, "learnable" if sinks else "vanilla", **sizes).to(device, DTYPE)
        of = [x.to(device, DTYPE).requires_grad_() for x in tensors]
        wanted = [x.requires_grad_() for x in tensors]
        own = []
        if sinks:
            attention.softmax_offset.data.copy_(torch.linspace(-2, 3, 8))
            own = [attention.softmax_offset]
            wanted.append(own[0].detach().double().cpu().requires_grad_())
        with sdpa_kernel(FUSED):
            out = attention._attend(*of)
            found = gradients(out, [*of, *own])
    expected = formula(*wanted[:3], 64**-0.5, window, sinks=wanted[3] if sinks else None)
    for ours, theirs in zip([out, *found], [expected, *gradients(expected, wanted)], strict=True):
        assert (ours.double().cpu() - theirs).norm() <= ALLOWED * theirs.norm()


@pytest.mark.parametrize("family", [family for family in ON_TE if family in FAMILIES])
def test_transformer_engine_computes_what_our_layers_do(device, tmp_path, family):
    """Our layers in fp32 are compared with transformers, before every run; Transformer Engine's are not used there."""
    from distill_nemo.models.layers.specs import transformer_engine_usable
    from distill_nemo.models.provider import model_provider

    if not transformer_engine_usable(torch.bfloat16):
        pytest.skip("Transformer Engine is not installed, or there is no GPU")
    student = StudentConfig(checkpoint=str(write_hf(tmp_path / "model", family)))
    tokens_BS = torch.randint(500, (2, 32), generator=torch.Generator().manual_seed(0)).to(device)
    positions_BS = torch.arange(32, device=device).expand(2, -1)
    logits = []
    with process_group_of_one(), torch.no_grad():
        for dtype in (torch.float32, torch.bfloat16):
            seed_everything(0)
            built = model_provider(student=student, parallelism=ParallelismConfig(), dtype=dtype).to(device).eval()
            logits.append(built(tokens_BS, positions_BS, None)[..., :500].float())
    assert any(type(module).__name__.startswith("TE") for module in built.modules())
    assert (logits[0] - logits[1]).norm() < 0.1 * logits[0].norm(), "unrelated logits are 1.4 apart"
