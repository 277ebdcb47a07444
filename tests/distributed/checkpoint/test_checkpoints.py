"""Files of a save, signals that stop a run, and exports of any step, with two real processes."""

import json
import multiprocessing
import os
import pickle
import queue
import signal
import threading
import time
import weakref
from pathlib import Path
from unittest import mock

import psutil
import pytest

from distill_nemo.checkpoint.write_results import WriteResults
from tests.training import metrics, tiny_run


def train(inputs, output, tensor=1, **changes):
    """Run once with `changes` ("section.field" values)."""
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
    """Six steps are run and, from their last checkpoint, two more."""
    for name, asynchronous in (("sync", False), ("async", True)):
        for steps in (6, 8):
            two.run(_train_saving, inputs, tmp_path / name, asynchronous, steps)
    assert metrics(tmp_path / "async") == metrics(tmp_path / "sync")
    assert names(tmp_path / "async") == ["latest", "step_00000006", "step_00000008"]


def _train_saving(inputs, output, asynchronous, steps, tensor=2):
    train(
        inputs, output, tensor, checkpoint__async_save=asynchronous, checkpoint__save_interval=3, training__steps=steps,
        training__eval_interval=2, optimizer__decay_steps=8,
    )  # fmt: skip


def test_saving_leaves_no_process_behind(inputs, two, tmp_path):
    """Megatron would leave one per rank, which imports torch during the first save."""
    for asynchronous in (False, True):
        assert two.run(_processes_after_saving, inputs, tmp_path / str(asynchronous), asynchronous) == [[], []]


def _processes_after_saving(inputs, output, asynchronous):
    before = psutil.Process().children(recursive=True)
    _train_saving(inputs, output, asynchronous, 3)
    return [process.cmdline() for process in psutil.Process().children(recursive=True) if process not in before]


def test_results_come_from_a_forked_process_whatever_their_size_and_none_from_one_that_was_killed():
    results, fork = WriteResults(), multiprocessing.get_context("fork")
    for item in (RuntimeError("no space"), {0: [b"x" * 10_000_000]}, {0: []}):  # more than fits in a pipe, then less
        writer = fork.Process(target=results.put, args=[item])
        writer.start()
        writer.join()
        assert pickle.dumps(results.get_nowait()) == pickle.dumps(item)
    killed = fork.Process(target=signal.pause)
    killed.start()
    killed.kill()
    killed.join()
    with pytest.raises(queue.Empty):
        results.get_nowait()


@pytest.mark.parametrize("asynchronous", [False, True])
def test_what_data_and_saves_hold_up_is_in_the_metrics(inputs, one, tmp_path, asynchronous):
    """A sample takes 50 ms here, and the writing of a save 3 s. An asynchronous save does not delay the next step."""
    one.run(_train_with_slow_files, inputs, tmp_path, asynchronous)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    *steps, end = (line for line in lines if line["kind"] in ("train", "end"))
    assert (end["kind"], end["step"], len(steps)) == ("end", 6, 6)
    assert all(SAMPLE_SECONDS * 4 <= line["data_seconds"] < line["seconds"] for line in steps)
    assert all(line["save_seconds"] < SAVE_SECONDS / 2 for line in steps if line["step"] != 4)
    assert (steps[3]["save_seconds"] < SAVE_SECONDS) == asynchronous
    assert end["save_seconds"] > SAVE_SECONDS * 0.9, "the last one is waited for"


SAMPLE_SECONDS, SAVE_SECONDS = 0.05, 3.0


def _train_with_slow_files(inputs, output, asynchronous):
    from distill_nemo.checkpoint import save
    from distill_nemo.data.token_dataset import TokenDataset
    from distill_nemo.runtime import checksums

    with pytest.MonkeyPatch.context() as patch:
        read, written = TokenDataset.__getitem__, checksums.sum_own_files
        slow_read = lambda self, index: time.sleep(SAMPLE_SECONDS) or read(self, index)  # noqa: E731
        slow_write = lambda *where: time.sleep(SAVE_SECONDS) or written(*where)  # noqa: E731
        patch.setattr(TokenDataset, "__getitem__", slow_read)
        patch.setattr(save, "sum_own_files", slow_write)
        patch.setattr(checksums, "sum_own_files", slow_write)
        _train_saving(inputs, output, asynchronous, 6, tensor=1)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_loss_that_is_not_finite_loses_no_checkpoint_that_is_being_written(inputs, two, tmp_path, asynchronous):
    with pytest.raises(Exception, match=r"step 4: .*not finite"):
        two.run(_not_finite_at_step_4, inputs, tmp_path, asynchronous)
    assert names(tmp_path) == ["latest", "step_00000003"]


def _not_finite_at_step_4(inputs, output, asynchronous):
    from distill_nemo.training.loop import Loop

    forward_backward = Loop.forward_backward

    def broken(loop, iterators):
        reports = forward_backward(loop, iterators)
        if loop.state["step"] == 3:
            reports[0]["lm_loss"] = reports[0]["lm_loss"] * float("nan")
        return reports

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Loop, "forward_backward", broken)
        _train_saving(inputs, output, asynchronous, 6)


def test_sigterm_while_the_last_checkpoint_is_waited_for(inputs, one, tmp_path):
    assert one.run(_told_to_stop_at_the_end, inputs, tmp_path) == [128 + signal.SIGTERM]
    assert names(tmp_path)[-1] == "step_00000006"


def _told_to_stop_at_the_end(inputs, output):
    from distill_nemo.checkpoint.save import CheckpointWriter

    close = CheckpointWriter.close

    def close_after_signal(writer):
        threading.Timer(0.5, os.kill, [os.getpid(), signal.SIGTERM]).start()
        close(writer)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CheckpointWriter, "close", close_after_signal)
        with pytest.raises(SystemExit) as stopped:
            _train_with_slow_files(inputs, output, True)
    return stopped.value.code


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


def test_any_saved_step_can_be_exported(inputs, one, two, tmp_path):
    """The checkpoints have TP=2. The exported models' held-out loss is that of the run at the same step."""
    two.run(train, inputs, tmp_path / "run", 2)
    measured = one.run(_export_and_measure, inputs, tmp_path / "run", tmp_path)[0]
    evaluations = {line["step"]: line for line in metrics(tmp_path / "run") if line["kind"] == "eval"}
    for step, loss in measured.items():
        assert loss == pytest.approx(evaluations[step]["lm_loss"], rel=1e-5)


def _export_and_measure(inputs, run, where):
    """Return the held-out LM loss of transformers' models on the run's own evaluation batch, by step."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from distill_nemo.checkpoint.export import export
    from distill_nemo.config import ExportConfig
    from distill_nemo.training.data import build_run_datasets
    from distill_nemo.training.entry import resolve_models

    losses = {}
    for step in (4, 8):
        output = os.path.join(where, f"student_{step}")
        export(ExportConfig(f"{run}/checkpoints/step_{step:08d}", output, str(inputs / "tokenizer")))
        model = AutoModelForCausalLM.from_pretrained(output, dtype=torch.float32)
        assert len(AutoTokenizer.from_pretrained(output)) <= model.config.vocab_size
        config, models = resolve_models(tiny_run(inputs, run))
        _, valid = build_run_datasets(config, models.student)
        tokens, labels = (torch.stack([torch.as_tensor(valid[i][k]) for i in range(4)]) for k in ("tokens", "labels"))
        with torch.no_grad():
            logits = model(tokens.long()).logits.double()
        losses[step] = float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.long().flatten()))
    return losses


def in_memory_at_export(inputs, output):
    """Train and export; return for each optimizer of the run, and the fp32 gradients, if they are in memory then."""
    from distill_nemo.runtime.device import setup_device

    setup_device()
    from distill_nemo.models.checkpoints import huggingface
    from distill_nemo.training import loop

    held, alive = [], []

    class Observed(loop.Loop):
        def __init__(self, config, train_state, *others):
            gradients = [buffer.grad_data for chunk in train_state.chunks for buffer in chunk.buffers]
            held.extend(map(weakref.ref, [train_state.optimizer, *gradients]))
            super().__init__(config, train_state, *others)

    def export(*_, **__):
        alive.extend(each() is not None for each in held)

    with mock.patch.object(loop, "Loop", Observed), mock.patch.object(huggingface, "export_hf", export):
        train(inputs, output, training__steps=1, optimizer__warmup_steps=0, checkpoint__export=True)
    return alive


def test_optimizer_and_gradients_leave_memory_before_the_export(inputs, one, tmp_path):
    assert one.run(in_memory_at_export, inputs, tmp_path) == [[False, False]]
