"""Scores against their definitions, computed in fp64 from transformers' model and the weights alone."""

import pytest
import torch
import transformers

from distill_nemo.config import StudentConfig
from distill_nemo.runtime.device import setup_device
from distill_nemo.runtime.process_groups import process_groups
from tests.distillation import Layout
from tests.tiny_models import write_hf

TOKENS = torch.randint(507, (3, 20), generator=torch.Generator().manual_seed(3))


def scores_of(path):
    setup_device()
    with process_groups(Layout().config()):
        from distill_nemo.models.provider import model_provider
        from distill_nemo.models.resolve import resolve
        from distill_nemo.pruning.importance import watching

        model = resolve(StudentConfig(checkpoint=path))
        built = model_provider(student=model, parallelism=Layout().config()).eval()
        before = hooks_of(built)
        with torch.no_grad(), watching(built, model) as sums:
            for part in TOKENS.split([2, 1]):  # micro batches of different sizes
                built(part, torch.arange(20).expand(len(part), -1), None)
        assert hooks_of(built) == before
        return sums.gathered()


def hooks_of(built):
    return sum(len(module._forward_pre_hooks) + len(module._forward_hooks) for module in built.modules())


def seen_by_transformers(path, dtype=torch.float64):
    """Return, by module name, what each module read and returned."""
    model = transformers.AutoModelForCausalLM.from_pretrained(path).to(dtype).eval()
    seen = {}

    def keep(name):
        def hook(_, args, kwargs, output):
            read = kwargs.get("hidden_states", args[0] if args else None)
            seen[name] = read, output[0] if isinstance(output, tuple) else output

        return hook

    for name, module in model.named_modules():
        module.register_forward_hook(keep(name), with_kwargs=True)
    with torch.no_grad():
        model(TOKENS)
    return seen


def of_samples(values):
    """Mean over a sample's tokens, then the root of the sum of squares over samples: [B, S, n] -> [n]."""
    return values.abs().mean(dim=1).square().sum(dim=0).sqrt()


def test_scores_of_a_dense_model_follow_their_definitions(tmp_path):
    path = write_hf(tmp_path / "llama", "llama")
    scores, seen = scores_of(path), seen_by_transformers(path)
    hidden = 0
    for i in range(4):
        layer = f"model.layers.{i}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            hidden += of_samples(seen[f"{layer}.{norm}"][1]).square()
        heads = seen[f"{layer}.self_attn.o_proj"][0].unflatten(-1, (4, 16)).norm(dim=-1)
        torch.testing.assert_close(scores.heads[i], of_samples(heads), rtol=1e-4, atol=0)
        torch.testing.assert_close(scores.ffn[i], of_samples(seen[f"{layer}.mlp.down_proj"][0]), rtol=1e-4, atol=0)
        before, after = seen[layer]
        apart = 3 * 20 * (1 - torch.cosine_similarity(before, after, dim=-1).mean())
        assert scores.layers[i] == pytest.approx(apart.item(), rel=1e-4)
    torch.testing.assert_close(scores.hidden, hidden.sqrt(), rtol=1e-4, atol=0)
    assert scores.experts == scores.expert_ffn == scores.shared_ffn == {}


def test_scores_of_experts_follow_their_definitions(tmp_path):
    path = write_hf(tmp_path / "moe", "qwen3_moe")
    scores, seen = scores_of(path), seen_by_transformers(path, torch.float32)  # it multiplies experts in no fp64
    weights = transformers.AutoModelForCausalLM.from_pretrained(path).double().state_dict()
    for i in range(4):
        block = f"model.layers.{i}.mlp"
        read = seen[block][0].flatten(0, 1).double()
        probs = (read @ weights[f"{block}.gate.weight"].T).softmax(dim=-1)
        best, chosen = probs.topk(2)
        best = best / best.sum(dim=-1, keepdim=True)
        for e in range(4):
            gate, up = weights[f"{block}.experts.gate_up_proj"][e].chunk(2)
            weight = (best * (chosen == e)).sum(dim=-1, keepdim=True)
            channels = torch.nn.functional.silu(read @ gate.T) * (read @ up.T) * weight
            torch.testing.assert_close(scores.expert_ffn[i][e], channels.abs().sum(dim=0), rtol=1e-4, atol=1e-9)
            added = channels @ weights[f"{block}.experts.down_proj"][e].T
            assert scores.experts[i][e] == pytest.approx(added.norm(dim=-1).sum().item(), rel=1e-4)


def test_a_layer_that_is_left_out_passes_its_input_on(tmp_path):
    path = write_hf(tmp_path / "llama", "llama")
    setup_device()
    with process_groups(Layout().config()):
        from distill_nemo.models.provider import model_provider
        from distill_nemo.pruning.importance import without_layer

        built = model_provider(student=StudentConfig(checkpoint=path), parallelism=Layout().config()).eval()
        inputs = TOKENS, torch.arange(20).expand(3, -1), None
        with torch.no_grad():
            whole = built(*inputs)
            with without_layer(built, 2):
                found = built(*inputs)
            again = built(*inputs)
    model = transformers.AutoModelForCausalLM.from_pretrained(path).eval()
    del model.model.layers[2]
    for i, layer in enumerate(model.model.layers):
        layer.self_attn.layer_idx = i
    with torch.no_grad():
        expected = model(TOKENS).logits
    torch.testing.assert_close(found[..., :507], expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(whole, again) and not torch.equal(whole, found)
