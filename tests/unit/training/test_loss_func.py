"""`loss_func`: masked token sums, global token means, nothing from padding; against transformers and fp64."""

import pytest
import torch

from tests.distillation import GLOBAL_BATCH, SEQUENCE, VOCAB, Case, Layout, gradients, megatron_step
from tests.distillation_reference import reference
from tests.tiny_models import write_hf

KD = {"lm_weight": 0.5, "temperature": 3.0}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return write_hf(root / "student", "qwen3", seed=2, layers=2), write_hf(root / "teacher", "qwen3")


def call(case, output, num_rows=GLOBAL_BATCH):
    """Run `loss_func` on the first rows of the batch: (loss, num_tokens, report, largest gradient). One process."""
    from distill_nemo.runtime.device import setup_device
    from distill_nemo.runtime.process_groups import process_groups

    setup_device()
    from distill_nemo.training.entry import resolve_models

    run, models = resolve_models(case.run_config(output, Layout()))
    with process_groups(run.parallelism):
        return _call(case, run, models, num_rows)


def _call(case, run, models, num_rows):
    from distill_nemo.models.distillation.objective import objective_of
    from distill_nemo.runtime.seed import seed_everything
    from distill_nemo.training.forward_step import loss_func
    from distill_nemo.training.setup import build_chunks

    seed_everything(0)
    (model,) = build_chunks(run, models, torch.float32, load_weights=True)
    model.train()
    batch = {name: tensor[:num_rows] for name, tensor in case.batch().items()}
    output = model(batch["tokens"], batch["position_ids"], None, labels=batch["labels"])
    fused = objective_of(model).takes_hidden_states
    assert output.shape == ((SEQUENCE, num_rows, 2 * 64) if fused else (num_rows, SEQUENCE))
    loss, num_tokens, report = loss_func(batch["loss_mask"], model, output, batch["labels"])
    loss.backward()
    largest = max(float(p.grad.abs().max()) for p in model.parameters() if p.grad is not None)
    return loss.item(), num_tokens, {name: value.tolist() for name, value in report.items()}, largest


def test_sums_over_valid_tokens(models, one, tmp_path):
    case = Case(*models, KD)
    loss, num_tokens, report, _ = one.run(call, case, str(tmp_path))[0]
    means, _ = reference(case)
    valid = int(case.batch()["loss_mask"].sum())
    assert num_tokens.dtype == torch.int32 and int(num_tokens) == valid
    assert loss == pytest.approx((0.5 * means["lm_loss"] + means["logit_loss"]) * valid, rel=1e-5)
    for name in ("lm_loss", "logit_loss"):
        assert report[name] == pytest.approx([means[name] * valid, valid], rel=1e-5)
    assert report["kd_loss"] == pytest.approx([loss, valid])


def test_plain_training_reports_the_lm_loss_alone(models, one, tmp_path):
    case = Case(models[0], None)
    loss, num_tokens, report, _ = one.run(call, case, str(tmp_path))[0]
    means, _ = reference(case)
    assert report.keys() == {"lm_loss"}
    assert loss == pytest.approx(means["lm_loss"] * int(num_tokens), rel=1e-5)


def test_a_micro_batch_without_a_valid_token_gives_zeros(models, one, tmp_path):
    loss, num_tokens, report, largest = one.run(call, Case(*models, KD, masked="all"), str(tmp_path))[0]
    assert loss == 0 and int(num_tokens) == 0 and largest == 0
    assert all(value == [0, 0] for value in report.values())


@pytest.mark.parametrize("layout", [Layout(), Layout(tensor=2)], ids=["dp2", "tp2"])
def test_means_and_gradients_weigh_tokens_not_ranks(models, one, two, tmp_path, layout):
    """At DP=2 rank 0's first sample is all masked: means of means, or a division per rank, would differ."""
    case = Case(*models, KD, masked="first")
    ranks = two.run(megatron_step, case, layout, str(tmp_path))
    assert ranks[0] == ranks[1]
    means, expected = reference(case)
    assert ranks[0]["valid_tokens"] == case.batch()["loss_mask"].sum()
    for name, value in means.items():
        assert ranks[0][name] == pytest.approx(value, rel=1e-5)
    for name, gradient in one.run(gradients, str(tmp_path))[0].items():
        largest = expected[name].abs().max()
        torch.testing.assert_close(gradient.double() / largest, expected[name] / largest, atol=1e-5, rtol=0)


def test_the_vocabulary_really_is_padded_here(models):
    from distill_nemo.models.architecture import padded_vocab_size

    assert padded_vocab_size(VOCAB) == 512
