"""Attention with capped scores and attention with sinks, against plain formulas that keep every score."""

import math

import pytest
import torch
from torch.overrides import TorchFunctionMode

from distill_nemo.config import ParallelismConfig
from distill_nemo.runtime.device import setup_device
from distill_nemo.runtime.process_groups import process_groups

SHAPES = [(11, 11, None), (11, 11, 3), (4, 11, None), (4, 11, 3), (4, 11, 5), (1, 1, None)]  # queries, keys, window


def formula(query, key, value, scale, window, softcap=None, sinks=None):
    """Attend with the mask in full. The queries are the last positions."""
    (p, _, n, _), t = query.shape, key.shape[0]
    key, value = (x.repeat_interleave(n // x.shape[2], dim=2) for x in (key, value))
    scores = torch.einsum("pbnd,tbnd->bnpt", query, key) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    age = torch.arange(t - p, t)[:, None] - torch.arange(t)
    scores = scores.masked_fill((age < 0) | (age >= (window or t)), -math.inf)
    if sinks is not None:
        scores = torch.cat([scores, sinks[None, :, None, None].expand(*scores.shape[:3], 1)], dim=-1)
    return torch.einsum("bnpt,tbnd->pbnd", scores.softmax(-1)[..., :t], value).flatten(2)


def inputs(p, t, dtype=torch.float64, heads=6, groups=2, width=5):
    random = torch.Generator().manual_seed(0)
    shapes = (p, 2, heads, width), (t, 2, groups, width), (t, 2, groups, width)
    return [(3 * torch.randn(s, generator=random, dtype=torch.float64)).to(dtype).requires_grad_() for s in shapes]


def gradients(output, of):
    weights = torch.linspace(-1, 1, output.numel(), dtype=torch.float64).view_as(output).to(output)
    return torch.autograd.grad((output * weights).sum(), of)


def assert_same(out, expected, found, wanted):
    """Compare outputs and gradients."""
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("p", "t", "window"), SHAPES)
@pytest.mark.parametrize("block", [2, 256])
def test_capped_attention_and_its_gradients_are_those_of_the_formula(monkeypatch, p, t, window, block):
    from distill_nemo.models.layers import capped_attention

    monkeypatch.setattr(capped_attention, "QUERY_BLOCK", block)
    tensors = inputs(p, t)
    out = capped_attention.CappedAttention.apply(*tensors, 0.3, 2.0, window)
    expected = formula(*tensors, 0.3, window, softcap=2.0)
    assert_same(out, expected, gradients(out, tensors), gradients(expected, tensors))


def test_capped_attention_in_bf16_is_as_close_as_the_formula_in_bf16():
    from distill_nemo.models.layers.capped_attention import CappedAttention

    exact = formula(*inputs(64, 64), 0.3, None, softcap=2.0)
    narrow = inputs(64, 64, torch.bfloat16)
    ours = CappedAttention.apply(*narrow, 0.3, 2.0, None)
    theirs = formula(*narrow, 0.3, None, softcap=2.0)
    assert ours.dtype == torch.bfloat16
    assert (ours - exact).norm() <= 1.1 * (theirs - exact).norm()


def test_capped_attention_keeps_no_scores():
    from distill_nemo.models.layers.capped_attention import CappedAttention

    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.numel()) or x, lambda x: x):
        query, key, value = inputs(300, 300)
        CappedAttention.apply(query, key, value, 0.3, 2.0, None)
    assert sum(saved) == 2 * query.numel() + 2 * key.numel() + query.numel() // query.shape[-1]


def core_attention(window, softmax_type="learnable", heads=6, groups=2, width=5, **options):
    """Return our core attention. Needs a process group."""
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.enums import AttnMaskType

    from distill_nemo.models.layers.context_parallel import CausalAttention

    config = TransformerConfig(
        num_layers=1,
        hidden_size=heads * width,
        num_attention_heads=heads,
        num_query_groups=groups,
        kv_channels=width,
        attention_dropout=0.0,
        softmax_type=softmax_type,
        window_size=None if window is None else (window - 1, 0),
        window_attn_skip_freq=None if window is None else [1],
        use_cpu_initialization=True,
    )
    return CausalAttention(config, 1, AttnMaskType.causal, "self", **options)


def attend_with_sinks(p, t, window, scale):
    """Return the outputs and gradients of our core attention, and of the formula."""
    setup_device()
    with process_groups(ParallelismConfig()):
        attention = core_attention(window, softmax_scale=scale).double()
        attention.softmax_offset.data.copy_(torch.linspace(-2, 3, 6))
        tensors = inputs(p, t)
        out = attention._attend(*tensors)
        expected = formula(*tensors, scale, window, sinks=attention.softmax_offset)
        of = [*tensors, attention.softmax_offset]
        state = attention.sharded_state_dict()
        return out, expected, gradients(out, of), gradients(expected, of), [*state]


@pytest.mark.parametrize(("p", "t", "window"), SHAPES)
def test_attention_with_sinks_and_its_gradients_are_those_of_the_formula(one, p, t, window):
    ((out, expected, found, wanted, names),) = one.run(attend_with_sinks, p, t, window, 0.3)
    assert_same(out, expected, found, wanted)
    assert names == ["softmax_offset"]


class Widths(TorchFunctionMode):
    """The widths of heads that torch's fused attention is called with."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.nn.functional.scaled_dot_product_attention:
            self.seen |= {x.shape[-1] for x in args}
        return func(*args, **(kwargs or {}))


def widths_with_sinks(*args):
    with Widths() as widths:
        attend_with_sinks(*args)
    return widths.seen


@pytest.mark.parametrize(("p", "t", "window"), SHAPES[:4])
def test_heads_with_sinks_have_a_width_that_fused_kernels_of_a_gpu_take(one, p, t, window):
    """Torch's `minimum_gemm_alignment` is 8 in bf16. Else it keeps all scores where there is a mask."""
    assert one.run(widths_with_sinks, p, t, window, 0.3) == [{8}]
