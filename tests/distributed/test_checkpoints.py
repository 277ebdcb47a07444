"""What saving leaves on disk, what stops a run, and export from any step; two real processes."""

import os
from pathlib import Path

import pytest

from tests.training import metrics, tiny_run


def train(inputs, output, tensor=1, **changes):
    """One run; `changes` are "section.field" values."""
    from distill_nemo.training.entry import run_config

    run = tiny_run(inputs, output)
    run.parallelism.tensor_model_parallel_size = tensor
    for path, value in changes.items():
        section, field = path.split("__")
        setattr(getattr(run, section), field, value)
    run_config(run)


def names(output):
    return sorted(path.name for path in Path(output, "checkpoints").iterdir())


def test_async_saves_give_the_checkpoints_that_sync_saves_give(inputs, two, tmp_path):
    """Six steps and, from their last checkpoint, two more."""
    for name, asynchronous in (("sync", False), ("async", True)):
        for steps in (6, 8):
            two.run(_train_saving, inputs, tmp_path / name, asynchronous, steps)
    assert metrics(tmp_path / "async") == metrics(tmp_path / "sync")
    assert names(tmp_path / "async") == ["latest", "step_00000006", "step_00000008"]


def _train_saving(inputs, output, asynchronous, steps):
    train(
        inputs, output, 2, checkpoint__async_save=asynchronous, checkpoint__save_interval=3, training__steps=steps,
        training__eval_interval=2, optimizer__decay_steps=8,
    )  # fmt: skip


def test_keeps_the_newest_and_clears_what_a_crash_left(inputs, two, tmp_path):
    crashed = tmp_path / "checkpoints" / "step_00000002.partial"
    crashed.mkdir(parents=True)
    (crashed / "__0_0.distcp").write_bytes(b"half")
    two.run(_train_keeping_one, inputs, tmp_path)
    assert names(tmp_path) == ["latest", "step_00000008"]
    assert (tmp_path / "checkpoints" / "latest").read_text().strip() == "step_00000008"


def _train_keeping_one(inputs, output):
    train(inputs, output, checkpoint__save_interval=2, checkpoint__keep_last=1)


def test_not_finite_names_the_step_and_keeps_the_last_checkpoint(inputs, two, tmp_path):
    with pytest.raises(Exception, match=r"step \d+: .*not finite.*rank.*samples \d+ to \d+") as stopped:
        two.run(_train_until_it_blows_up, inputs, tmp_path)
    assert type(stopped.value).__name__ == "NotFiniteError"
    reached = metrics(tmp_path)[-1]["step"]
    assert f"step {reached + 1}:" in str(stopped.value)
    assert names(tmp_path)[-1] == f"step_{reached:08d}"


def _train_until_it_blows_up(inputs, output):
    train(
        inputs, output, optimizer__lr=1e30, optimizer__min_lr=1e29, optimizer__warmup_steps=0,
        checkpoint__save_interval=1, training__eval_interval=100,
    )  # fmt: skip


def test_exports_any_saved_step(inputs, one, two, tmp_path):
    """From TP=2 checkpoints; the exported models' held-out loss is what the run measured at that very step."""
    two.run(train, inputs, tmp_path / "run", 2)
    measured = one.run(_export_and_measure, inputs, tmp_path / "run", tmp_path)[0]
    evaluations = {line["step"]: line for line in metrics(tmp_path / "run") if line["kind"] == "eval"}
    for step, loss in measured.items():
        assert loss == pytest.approx(evaluations[step]["lm_loss"], rel=1e-5)


def _export_and_measure(inputs, run, where):
    """Held-out LM loss of transformers' models over the run's own evaluation batch, by step."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from distill_nemo.checkpoint.export import export
    from distill_nemo.training.data import build_run_datasets
    from distill_nemo.training.entry import resolve_models

    losses = {}
    for step in (4, 8):
        output = os.path.join(where, f"student_{step}")
        export(f"{run}/checkpoints/step_{step:08d}", output, str(inputs / "tokenizer"))
        model = AutoModelForCausalLM.from_pretrained(output, dtype=torch.float32)
        assert len(AutoTokenizer.from_pretrained(output)) <= model.config.vocab_size
        _, valid = build_run_datasets(resolve_models(tiny_run(inputs, run)))
        tokens, labels = (torch.stack([torch.as_tensor(valid[i][k]) for i in range(4)]) for k in ("tokens", "labels"))
        with torch.no_grad():
            logits = model(tokens.long()).logits.double()
        losses[step] = float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.long().flatten()))
    return losses
