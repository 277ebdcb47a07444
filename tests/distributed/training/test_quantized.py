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
from tests.spawn import Gloo
from tests.tiny_models import write_hf
from tests.training import changed, metrics, tiny_run
from tests.unit.models.test_model_provider import in_one_process

FORMATS = {
    "nvfp4": QuantizationConfig("nvfp4", kv_cache="fp8", calibration_samples=8),
    "int4_weights": QuantizationConfig("int4_weights", kv_cache="nvfp4", block_size=16, calibration_samples=8),
    "nvfp4_weights": QuantizationConfig("nvfp4_weights"),
    "fp8": QuantizationConfig("fp8", calibration_samples=8),
    "int8": QuantizationConfig("int8", calibration_samples=8),
    "as the student": QuantizationConfig(),
}
OF_EXPERTS = FORMATS | {
    "int4_weights": QuantizationConfig("int4_weights", block_size=16)
}  # NVFP4 keys need 16 channels
LAYOUTS = {
    "TP=2": {"parallelism.tensor_model_parallel_size": 2},
    "TP=2, SP": {"parallelism.tensor_model_parallel_size": 2, "parallelism.sequence_parallel": True},
    "PP=2": {"parallelism.pipeline_model_parallel_size": 2},
    "DP=2": {},
    "CP=2": {"parallelism.context_parallel_size": 2},
    "EP=2": {"parallelism.expert_model_parallel_size": 2},
}
# Where the last digit of an activation depends on the order of a sum, the next rounding may turn it into a whole step.
# Of 8 bits so many are close to a tie that in fp32 some number moves in the first steps (fp8, TP=2: 4e-4 of a gradient,
# 5e-3 of the fourth loss). In fp64 none does, so what is left is the layout's own: sums of losses and norms, in fp32.
EXACT = 1e-6
SPLITS = ("TP=2", "TP=2, SP", "CP=2")  # of sums in a layer
WITH_TIES = ("fp8", "int8")
ALWAYS = (("nvfp4", "TP=2, SP"), ("nvfp4", "DP=2"))
ALWAYS_IN_FP64 = (("fp8", "TP=2, SP"), ("int8", "TP=2"))


@pytest.fixture(scope="module")
def students(tmp_path_factory):
    root = tmp_path_factory.mktemp("students")
    write_hf(root / "llama", "llama", seed=2, layers=2)
    write_hf(root / "qwen3_moe", "qwen3_moe", seed=4, layers=2)
    return root


def train(inputs, output, student, name, layout=None, steps=4, changes=None):
    from distill_nemo.training.entry import run_config

    run = tiny_run(inputs, output, steps=steps)
    run.student.checkpoint = str(student)
    run.quantization = (OF_EXPERTS if student.name == "qwen3_moe" else FORMATS)[name]
    run.training.eval_interval, run.optimizer.decay_steps = 2, 8
    run.checkpoint.save_interval, run.checkpoint.keep_last = 1, steps
    run_config(changed(run, (LAYOUTS[layout] if layout else {}) | (changes or {})))


@pytest.fixture(scope="module")
def expected(inputs, students, one, tmp_path_factory):
    """Return the directory of a family's run in a format on one process, by a function."""
    root, known = tmp_path_factory.mktemp("one"), set()

    def found(family, name, function=train):
        output = root / f"{function.__name__}_{family}_{name}"
        if output not in known:
            one.run(function, inputs, output, students / family, name)
            known.add(output)
        return output

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
    state = {
        key: torch.empty(stored[key].size, dtype=stored[key].properties.dtype)
        for key in stored
        if "optimizer.state.exp_avg." in key
    }
    load(state, storage_reader=FileSystemReader(directory), no_dist=True)
    return state


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        pytest.param(name, layout, marks=[] if (name, layout) in ALWAYS else pytest.mark.long)
        for name in FORMATS
        for layout in LAYOUTS
        if layout != "EP=2" and name != "as the student" and not (name in WITH_TIES and layout in SPLITS)
    ],
)
def test_four_steps_at_any_layout_are_those_of_one_process(inputs, students, two, expected, tmp_path, name, layout):
    two.run(train, inputs, tmp_path / "run", students / "llama", name, layout)
    assert_the_same_gradients(tmp_path / "run", expected("llama", name))
    assert_the_same(metrics(tmp_path / "run"), metrics(expected("llama", name)))


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        pytest.param(name, layout, marks=[] if (name, layout) in ALWAYS_IN_FP64 else pytest.mark.long)
        for name in (*WITH_TIES, "nvfp4", "int4_weights")
        for layout in (*(SPLITS if name in WITH_TIES else ()), "EP=2")
    ],
)
def test_four_steps_in_fp64_where_no_number_moves_over_a_tie(inputs, students, two, expected, tmp_path, name, layout):
    family = "qwen3_moe" if layout == "EP=2" else "llama"
    two.run(train_in_fp64, inputs, tmp_path / "run", students / family, name, layout)
    alone = expected(family, name, train_in_fp64)
    for step in (1, 4):
        assert_the_same_gradients(tmp_path / "run", alone, step, EXACT)
    assert_the_same(metrics(tmp_path / "run"), metrics(alone), EXACT)


IN_FP64 = {
    "optimizer.use_distributed_optimizer": False,  # it knows no fp64
    "optimizer.adam_eps": 1.0,  # Adam alone would make a step of lr of every gradient, however small
    "optimizer.lr": 0.1,
}


def train_in_fp64(inputs, output, student, name, layout=None):
    """Train with weights, activations, gradients and Adam's moments in fp64, which no config can ask for."""
    from distill_nemo.runtime import device

    type_ = torch.Tensor.type

    def type_of_fp32(self, *args, **kwargs):  # which Megatron asserts before it clips gradients
        found = type_(self, *args, **kwargs)
        return found.replace("torch.Double", "torch.cuda.Float") if isinstance(found, str) else found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(device, "resolve_dtype", lambda name: torch.float64)
        patch.setattr(torch.Tensor, "type", type_of_fp32)
        train(inputs, output, student, name, layout, changes=IN_FP64)
    assert {moment.dtype for moment in first_moments(output / "checkpoints" / "step_00000004").values()} == {
        torch.float64
    }


@pytest.mark.long
def test_a_virtual_pipeline_whose_stages_are_no_power_of_two_agrees(inputs, one, tmp_path):
    for name, seed in (("student", 2), ("teacher", 1)):
        write_hf(tmp_path / name, "llama", seed=seed, layers=6)
    changes = {"teacher.checkpoint": str(tmp_path / "teacher"), "training.global_batch_size": 6}
    stages = {"pipeline_model_parallel_size": 3, "virtual_pipeline_model_parallel_size": 2}
    piped = changes | {f"parallelism.{name}": size for name, size in stages.items()}
    with Gloo(3, init=False, timeout=580) as three:
        for group, layout, changed_to in ((one, "one", changes), (three, "PP=3, VPP=2", piped)):
            group.run(train, inputs, tmp_path / layout, tmp_path / "student", "nvfp4", None, 4, changed_to)
    assert_the_same(metrics(tmp_path / "PP=3, VPP=2"), metrics(tmp_path / "one"))
    assert_the_same_gradients(tmp_path / "PP=3, VPP=2", tmp_path / "one")


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
