"""Quantised students: whole runs agree at every layout, change it on the way, and calibrate once.

Legend: as in test_layouts.py.
"""

import json
import shutil

import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader, load

from distill_nemo.config import DataConfig, ParallelismConfig, StudentConfig
from distill_nemo.quantization import QuantizationConfig
from tests.distributed.training.test_layouts import TOLERANCE, assert_the_same
from tests.tiny_models import write_hf
from tests.training import changed, differences, metrics, tiny_run
from tests.unit.models.test_model_provider import in_one_process

FORMATS = {
    "nvfp4": QuantizationConfig("nvfp4", kv_cache="fp8", calibration_samples=8),
    "int4_weights": QuantizationConfig("int4_weights", kv_cache="nvfp4", block_size=16, calibration_samples=8),
    "nvfp4_weights": QuantizationConfig("nvfp4_weights"),
    "fp8": QuantizationConfig("fp8", calibration_samples=8),
    "int8": QuantizationConfig("int8", calibration_samples=8),
    "as the student": QuantizationConfig(),
}
LAYOUTS = {
    "TP=2": {"parallelism.tensor_model_parallel_size": 2},
    "TP=2, SP": {"parallelism.tensor_model_parallel_size": 2, "parallelism.sequence_parallel": True},
    "PP=2": {"parallelism.pipeline_model_parallel_size": 2},
    "DP=2": {},
    "CP=2": {"parallelism.context_parallel_size": 2},
    "EP=2": {"parallelism.expert_model_parallel_size": 2},
}
# Where the last digit of an activation depends on the order of a sum, the next rounding may turn it into a whole step:
# of 8 bits there are many close to a tie. So far apart are four steps then, and the first gradients (fp8, TP=2: 4e-4);
# metrics of the first step, 1e-5 at most.
AFTER_A_TIE = 1e-2
ALWAYS = (("nvfp4", "TP=2, SP"), ("nvfp4", "DP=2"))
WITH_TIES = [(name, layout) for name in ("fp8", "int8") for layout in ("TP=2", "TP=2, SP", "CP=2")]


@pytest.fixture(scope="module")
def students(tmp_path_factory):
    root = tmp_path_factory.mktemp("students")
    write_hf(root / "llama", "llama", seed=2, layers=2)
    write_hf(root / "qwen3_moe", "qwen3_moe", seed=4, layers=2)
    return root


def train(inputs, output, student, name, layout=None, steps=4, changes=None):
    from distill_nemo.training.entry import run_config

    run = tiny_run(inputs, output, steps=steps)
    run.student.checkpoint, run.quantization = str(student), FORMATS[name]
    run.training.eval_interval, run.optimizer.decay_steps = 2, 8
    run.checkpoint.save_interval, run.checkpoint.keep_last = 1, steps
    run_config(changed(run, (LAYOUTS[layout] if layout else {}) | (changes or {})))


@pytest.fixture(scope="module")
def expected(inputs, students, one, tmp_path_factory):
    """Return {(family, format): directory of the run on one process}."""
    root, known = tmp_path_factory.mktemp("one"), {}

    def found(family, name):
        if (family, name) not in known:
            known[family, name] = root / f"{family}_{name}"
            one.run(train, inputs, known[family, name], students / family, name)
        return known[family, name]

    return found


def assert_the_same_gradients(found, expected, step=1, tolerance=TOLERANCE):
    """Compare every parameter's mean of gradients, Adam's first moment, as checkpoints have it at any layout."""
    ours, theirs = (first_moments(each / "checkpoints" / f"step_{step:08d}") for each in (found, expected))
    assert ours.keys() == theirs.keys() and any("linear_fc2.weight" in name for name in ours)
    largest = {name: float(moment.abs().max()) for name, moment in theirs.items()}
    assert min(largest.values()) > 0
    worst = {name: float((ours[name] - moment).abs().max()) / largest[name] for name, moment in theirs.items()}
    print(f"gradients of step {step}: {max(worst.values()):.1e}")
    assert max(worst.values()) <= tolerance, worst


def first_moments(directory):
    stored = FileSystemReader(directory).read_metadata().state_dict_metadata
    state = {key: torch.empty(stored[key].size) for key in stored if "optimizer.state.exp_avg." in key}
    load(state, storage_reader=FileSystemReader(directory), no_dist=True)
    return state


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        pytest.param(name, layout, marks=[] if (name, layout) in ALWAYS else pytest.mark.long)
        for name in FORMATS
        for layout in LAYOUTS
        if layout != "EP=2" and name != "as the student"
    ],
)
def test_four_steps_at_any_layout_are_those_of_one_process(inputs, students, two, expected, tmp_path, name, layout):
    two.run(train, inputs, tmp_path / "run", students / "llama", name, layout)
    found, alone = metrics(tmp_path / "run"), metrics(expected("llama", name))
    with_ties = (name, layout) in WITH_TIES
    tolerance = AFTER_A_TIE if with_ties else TOLERANCE
    assert_the_same_gradients(tmp_path / "run", expected("llama", name), tolerance=tolerance)
    if with_ties:
        assert_the_same(found[:2], alone[:2])
        later = {name: apart for name, apart in differences(found, alone).items() if name != "top1_agreement"}
        assert max(later.values()) <= AFTER_A_TIE
        return
    assert_the_same(found, alone)


DYNAMIC = {
    "distillation.balancer": "dynamic",
    "distillation.skip_lm_loss": False,
    "distillation.hidden_loss": "mse",
    "distillation.hidden_layers": ["decoder.layers.0:decoder.layers.0"],
}


def test_whole_logits_and_recomputation_change_nothing(inputs, students, one, expected, tmp_path):
    changes = {"distillation.fused_linear": False, "training.recompute": "full"}
    one.run(train, inputs, tmp_path / "run", students / "llama", "nvfp4", None, 4, changes)
    assert_the_same(metrics(tmp_path / "run"), metrics(expected("llama", "nvfp4")))


@pytest.mark.long
def test_hidden_losses_and_the_dynamic_balancer_work_with_a_quantised_student(inputs, students, one, two, tmp_path):
    for group, layout in ((one, None), (two, "TP=2, SP")):
        group.run(train, inputs, tmp_path / str(layout), students / "llama", "nvfp4", layout, 4, DYNAMIC)
    assert_the_same(metrics(tmp_path / "TP=2, SP"), metrics(tmp_path / "None"))


def test_scales_of_blocks_reshard_from_tensor_to_pipeline_parallel_to_one(
    inputs, students, one, two, expected, tmp_path
):
    """Blocks of gate and up follow their rows, blocks of split rows their columns."""
    output, student = tmp_path / "run", students / "llama"
    two.run(train, inputs, output, student, "int4_weights", "TP=2", 2)
    two.run(train, inputs, output, student, "int4_weights", "PP=2", 3)
    one.run(train, inputs, output, student, "int4_weights", None, 4)
    kept = [line for line in metrics(output) if (line["kind"], line["step"]) != ("eval", 3)]
    assert_the_same(kept, metrics(expected("llama", "int4_weights")))
    for step in (1, 3):  # TP=2 and PP=2
        assert_the_same_gradients(output, expected("llama", "int4_weights"), step)


@pytest.mark.parametrize("name", ["nvfp4", pytest.param("int8", marks=pytest.mark.long)])
def test_experts_reshard_from_expert_parallel_to_one(inputs, students, one, two, expected, tmp_path, name):
    output, student = tmp_path / "run", students / "qwen3_moe"
    two.run(train, inputs, output, student, name, "EP=2", 2)
    one.run(train, inputs, output, student, name, None, 4)
    assert_the_same(metrics(output), metrics(expected("qwen3_moe", name)))
    assert_the_same_gradients(output, expected("qwen3_moe", name))


def evaluate(inputs, output, tensor):
    from distill_nemo.training.evaluate import evaluate_on

    data = DataConfig([str(inputs / "train")], [str(inputs / "valid")], sequence_length=32)
    layout, cache = ParallelismConfig(tensor_model_parallel_size=tensor), str(output / "index_cache")
    return evaluate_on(data, StudentConfig(str(output)), None, 4, layout, cache=cache)


def test_a_run_is_evaluated_as_it_was_trained(inputs, one, two, expected, tmp_path):
    """The student is quantised again, with the amaxes of its checkpoint; so is one that another run goes on with."""
    output = expected("llama", "nvfp4")
    last = metrics(output)[-1]
    one.run(train, inputs, tmp_path / "next", output, "as the student", None, 1)
    assert not (tmp_path / "next" / "calibration.json").exists()
    assert metrics(tmp_path / "next")[0]["lm_loss"] == pytest.approx(last["lm_loss"], rel=1e-6)
    for group, tensor in ((one, 1), (two, 2)):
        assert group.run(evaluate, inputs, output, tensor)[0]["lm_loss"] == pytest.approx(last["lm_loss"], rel=1e-6)


def train_and_die(inputs, output, student, name):
    """Die after the first of two batches of calibration."""
    from distill_nemo.training import calibration

    done, evaluate = [], calibration.evaluate

    def one_pass(*args, **kwargs):
        if done:
            raise KeyboardInterrupt("killed")
        done.append(evaluate(*args, **kwargs))

    calibration.evaluate = one_pass
    try:
        train(inputs, output, student, name)
    except KeyboardInterrupt:
        return
    finally:
        calibration.evaluate = evaluate


def ranges(output):
    return json.loads((output / "calibration.json").read_text())


def test_a_run_killed_in_calibration_starts_it_again_and_one_killed_later_reads_it(
    inputs, students, one, expected, tmp_path
):
    output, student = tmp_path / "run", students / "llama"
    one.run(train_and_die, inputs, output, student, "nvfp4")
    assert not (output / "calibration.json").exists()
    one.run(train, inputs, output, student, "nvfp4")
    alone = expected("llama", "nvfp4")
    assert metrics(output) == metrics(alone) and ranges(output) == ranges(alone)
    for name in ("checkpoints", "metrics.jsonl"):
        path = output / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    stored = ranges(output)
    key = "decoder.layers.0.mlp.linear_fc1.input_quantizer"
    stored["amaxes"][key] *= 1.5  # which shows that it is read
    (output / "calibration.json").write_text(json.dumps(stored))
    one.run(train, inputs, output, student, "nvfp4", None, 2)
    assert in_checkpoint(one, output)[key] == stored["amaxes"][key]
    assert metrics(output)[0] != metrics(alone)[0]
    other = {"data.sequence_length": 16}
    shutil.rmtree(output / "checkpoints")
    one.run(train, inputs, output, student, "nvfp4", None, 1, other)
    assert ranges(output)["amaxes"][key] != stored["amaxes"][key]


def in_checkpoint(one, output):
    return one.run(in_one_process, amaxes_of_run, str(output))[0]


def amaxes_of_run(output):
    from distill_nemo.models.provider import model_provider
    from distill_nemo.models.quantizers.calibrate import amaxes_of

    return amaxes_of([model_provider(student=StudentConfig(output), parallelism=ParallelismConfig())])


def test_another_format_is_refused_on_resume_and_for_a_quantised_student(inputs, students, one, expected, tmp_path):
    output = expected("llama", "nvfp4")
    with pytest.raises(ValueError, match=r"quantization.format: was 'nvfp4', is 'int8'"):
        one.run(train, inputs, output, students / "llama", "int8")
    with pytest.raises(ValueError, match=r"by its run with quantization.format = 'nvfp4', not 'int8', .*: leave quant"):
        one.run(train, inputs, tmp_path / "out", output, "int8")
    assert not (tmp_path / "out").exists()
