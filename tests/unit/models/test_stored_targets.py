"""A student of stored targets: what is attached to it, and micro batches with little to learn from."""

from typing import Any

import pytest
import torch

from distill_nemo.config import DistillationConfig, ParallelismConfig, StudentConfig
from distill_nemo.evaluation import eval_forward_step
from distill_nemo.models.distillation.objective import objective_of
from distill_nemo.models.distillation.stored_targets import StoredTeacher
from distill_nemo.models.provider import finalise, model_provider
from distill_nemo.training.forward_step import forward_step
from tests.spawn import Gloo

TINY = {"num_layers": 1, "hidden_size": 32, "ffn_hidden_size": 64, "num_attention_heads": 2, "vocab_size": 507}
B, S, N = 2, 8, 4


def batch(taught: int, valid: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    text = torch.randint(507, (B, S + 1), generator=generator)
    ids = torch.full((B, S, N), -1, dtype=torch.int32)
    ids[:taught] = torch.randint(507, (taught, S, N), generator=generator).int()
    has = torch.zeros(B, S)
    has[:taught] = 1
    fields = {"ids": ids, "counts": (ids >= 0).int(), "top1": ids[..., 0], "has_targets": has.to(torch.uint8)}
    fields |= {"entropy": has.clone(), "label_logprob": -has}
    mask = torch.zeros(B, S)
    mask[:valid] = 1
    plain = {"tokens": text[:, :-1], "labels": text[:, 1:], "loss_mask": mask}
    return plain | {"position_ids": torch.arange(S).expand(B, -1)} | {f"target_{n}": x for n, x in fields.items()}


def steps(cases: list[tuple[int, int]]) -> dict[str, Any]:
    """Return losses, metrics and gradients of micro batches, and logits before and after `finalise`."""
    from distill_nemo.runtime.device import setup_device
    from distill_nemo.runtime.process_groups import process_groups
    from distill_nemo.runtime.seed import seed_everything

    setup_device()
    with process_groups(ParallelismConfig()):
        seed_everything(0)
        student = StudentConfig(family="llama", max_position_embeddings=S, **TINY)
        kd = DistillationConfig(lm_weight=0.5)
        stored = StoredTeacher("sampled", 1.0, N, 507)
        model: Any = model_provider(student=student, parallelism=ParallelismConfig(), distillation=kd, stored=stored)
        found: dict[str, Any] = {"attached": type(objective_of(model)).__name__}
        for case in cases:
            output, loss_of = forward_step(iter([batch(*case)]), model)
            loss, _, report = loss_of(output)
            gradients = torch.autograd.grad(loss, [*model.parameters()])
            output, metrics_of = eval_forward_step(iter([batch(*case)]), model)
            found[str(case)] = {n: x.tolist() for n, x in {**metrics_of(output)[2], **report}.items()}
            found[f"gradient {case}"] = max(x.abs().max().item() for x in gradients)
        inputs = batch(0, 0)["tokens"], batch(0, 0)["position_ids"], None
        before = model(*inputs)
        clean = finalise(model)
        found["same logits"] = torch.equal(before, clean(*inputs)) and before.shape == (B, S, 512)
        found["left"] = [name for name in vars(clean) if name in ("objective", "forward")]
        return found


def test_samples_without_targets_have_an_lm_loss_alone_and_nothing_may_count() -> None:
    with Gloo(1, init=False) as one:
        (found,) = one.run(steps, [(2, 2), (1, 2), (0, 2), (2, 0)])
    assert found["attached"] == "AgainstStoredTargets" and found["same logits"] and found["left"] == []
    both, one_taught, none_taught, none_valid = (found[str(case)] for case in [(2, 2), (1, 2), (0, 2), (2, 0)])
    assert both["forward_kl"][1] == 2 * S and one_taught["forward_kl"][1] == S and none_taught["forward_kl"] == [0, 0]
    assert none_taught["logit_loss"] == [0, 2 * S] and none_taught["lm_loss"] == both["lm_loss"]
    assert none_taught["kd_loss"][0] == pytest.approx(0.5 * none_taught["lm_loss"][0])
    assert both["logit_loss"][0] == pytest.approx(both["forward_kl"][0], rel=1e-5)
    assert all(value == [0, 0] for value in none_valid.values()) and found["gradient (2, 0)"] == 0
    assert found["gradient (0, 2)"] > 0
