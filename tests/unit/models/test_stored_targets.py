"""A student of stored targets: what is attached to it, and micro batches with little to learn from."""

from typing import Any

import pytest
import torch

from distill_nemo.config import DistillationConfig, ParallelismConfig, StudentConfig
from distill_nemo.evaluation import eval_forward_step
from distill_nemo.losses.stored import Codec
from distill_nemo.models.distillation.objective import objective_of
from distill_nemo.models.distillation.stored_targets import StoredOutputLayer, StoredTeacher
from distill_nemo.models.provider import finalise, model_provider
from distill_nemo.training.forward_step import forward_step

TINY = {"num_layers": 1, "hidden_size": 32, "ffn_hidden_size": 64, "num_attention_heads": 2, "vocab_size": 507}
B, S, N = 2, 8, 4


KD = {"sampled": {}, "top_k": {"top_k": N}, "hidden": {"divergence": "reverse_kl", "temperature": 2.0}}


def batch(codec: str, taught: int, valid: int) -> dict[str, torch.Tensor]:
    """Return a micro batch in which only `has_targets` tells the first `taught` samples from the others."""
    generator = torch.Generator().manual_seed(1)
    text = torch.randint(507, (B, S + 1), generator=generator)
    ids = torch.randint(507, (B, S, N), generator=generator).int()
    fields = {
        "sampled": {"ids": ids, "counts": torch.ones_like(ids)},
        "top_k": {"ids": ids, "logprobs": torch.full(ids.shape, -2.0), "tail": torch.full((B, S), -1.0)},
        "hidden": {"hidden": torch.randn(B, S, N, generator=generator)},
    }[codec]
    fields |= {"top1": ids[..., 0], "entropy": torch.ones(B, S), "label_logprob": -torch.ones(B, S)}
    fields["has_targets"] = torch.zeros(B, S, dtype=torch.uint8)
    fields["has_targets"][:taught] = 1
    mask = torch.zeros(B, S)
    mask[:valid] = 1
    plain = {"tokens": text[:, :-1], "labels": text[:, 1:], "loss_mask": mask}
    return plain | {"position_ids": torch.arange(S).expand(B, -1)} | {f"target_{n}": x for n, x in fields.items()}


def steps(codec: Codec, cases: list[tuple[int, int]]) -> dict[str, Any]:
    """Return losses, metrics and gradients of micro batches, and logits before and after `finalise`."""
    from distill_nemo.runtime.device import setup_device
    from distill_nemo.runtime.process_groups import process_groups
    from distill_nemo.runtime.seed import seed_everything

    setup_device()
    with process_groups(ParallelismConfig()):
        seed_everything(0)
        student = StudentConfig(family="llama", max_position_embeddings=S, **TINY)
        kd = DistillationConfig(lm_weight=0.5, **KD[codec])
        weight_VH = torch.randn(507, N)
        layer = StoredOutputLayer(lambda start, stop: (weight_VH[start:stop], None), N) if codec == "hidden" else None
        stored = StoredTeacher(codec, 1.0, N, 507, layer)
        model: Any = model_provider(student=student, parallelism=ParallelismConfig(), distillation=kd, stored=stored)
        found: dict[str, Any] = {"attached": type(objective_of(model)).__name__}
        for case in cases:
            output, loss_of = forward_step(iter([batch(codec, *case)]), model)
            loss, _, report = loss_of(output)
            gradients = torch.autograd.grad(loss, [*model.parameters()])
            output, metrics_of = eval_forward_step(iter([batch(codec, *case)]), model)
            found[str(case)] = {n: x.tolist() for n, x in {**metrics_of(output)[2], **report}.items()}
            found[f"gradient {case}"] = max(x.abs().max().item() for x in gradients)
        inputs = batch(codec, 0, 0)["tokens"], batch(codec, 0, 0)["position_ids"], None
        before = model(*inputs)
        clean = finalise(model)
        found["same logits"] = torch.equal(before, clean(*inputs)) and before.shape == (B, S, 512)
        found["left"] = [name for name in vars(clean) if name in ("objective", "forward")]
        return found


@pytest.mark.parametrize("codec", ["sampled", "top_k", "hidden"])
def test_samples_without_targets_have_an_lm_loss_alone_and_nothing_may_count(codec, one) -> None:
    (found,) = one.run(steps, codec, [(2, 2), (1, 2), (0, 2), (2, 0)])
    assert found["attached"] == "AgainstStored" + ("States" if codec == "hidden" else "Targets")
    assert found["same logits"] and found["left"] == []
    both, one_taught, none_taught, none_valid = (found[str(case)] for case in [(2, 2), (1, 2), (0, 2), (2, 0)])
    assert both["forward_kl"][1] == 2 * S and one_taught["forward_kl"][1] == S and none_taught["forward_kl"] == [0, 0]
    assert none_taught["logit_loss"] == [0, 0] and none_taught["lm_loss"] == both["lm_loss"]
    assert one_taught["logit_loss"][1] == S and one_taught["kd_loss"][1] == one_taught["lm_loss"][1] == 2 * S
    assert none_taught["kd_loss"][0] == pytest.approx(0.5 * none_taught["lm_loss"][0])
    assert 0 < abs(one_taught["logit_loss"][0] - both["logit_loss"][0])
    if codec != "hidden":
        assert both["logit_loss"][0] == pytest.approx(both["forward_kl"][0], rel=1e-5)
    assert all(value == [0, 0] for value in none_valid.values()) and found["gradient (2, 0)"] == 0
    assert found["gradient (0, 2)"] > 0
