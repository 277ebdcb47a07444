"""A student that ModelOpt has quantised (on CPU: simulated INT8) stays quantised when restored, trained and resumed."""

import contextlib
import shutil
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.metadata import TensorProperties

from distill_nemo.config import ParallelismConfig, StudentConfig
from tests.hostile import plant
from tests.training import metrics, tiny_run
from tests.unit.models.test_model_provider import in_one_process, logits, provider
from tests.unit.models.test_stored_targets import N
from tests.unit.models.test_stored_targets import batch as stored_batch

SHAPE = {"num_layers": 2, "hidden_size": 32, "ffn_hidden_size": 48, "num_attention_heads": 4, "num_query_groups": 2}
STATED = {"vocab_size": 507, "rotary_base": 1e4, "norm_epsilon": 1e-6, **SHAPE}


def quantise(student, output):
    """Save a quantised student as ModelOpt's examples for Megatron-LM do. Return its logits, and those before."""
    import modelopt.torch.quantization as mtq
    from megatron.core import dist_checkpointing
    from modelopt.torch.opt.plugins.mcore_dist_checkpointing import save_sharded_modelopt_state

    model = provider(student)()
    plain = logits(model)
    mtq.quantize(model, mtq.INT8_DEFAULT_CFG, logits)
    Path(output).mkdir()
    dist_checkpointing.save(model.sharded_state_dict(metadata={"singleton_local_shards": False}), str(output))
    save_sharded_modelopt_state([model], str(output))
    return plain, logits(model)


@pytest.fixture(scope="module")
def quantised(inputs, one, tmp_path_factory):
    """Return (directory, logits before quantising, logits after)."""
    path = tmp_path_factory.mktemp("quantised") / "m"
    return path, *one.run(in_one_process, quantise, str(inputs / "student"), str(path))[0]


def load(path, teacher, fused_linear=None):
    from distill_nemo.config import DistillationConfig, TeacherConfig
    from distill_nemo.models.provider import finalise, model_provider

    pair = model_provider(
        student=StudentConfig(str(path), **STATED),
        teacher=TeacherConfig(str(teacher)),
        distillation=DistillationConfig(fused_linear=fused_linear),
        parallelism=ParallelismConfig(),
    )
    assert not pair.objective.takes_hidden_states
    quantizers = sum("Quantizer" in type(module).__name__ for module in pair.teacher_model.modules())
    return logits(pair), logits(finalise(pair)), quantizers


def test_the_students_quantizers_are_restored_and_the_teacher_has_none(quantised, inputs, one):
    path, plain, expected = quantised
    pair, finalised, of_teacher = one.run(in_one_process, load, path, inputs / "teacher")[0]
    assert (plain - expected).abs().max() > 1e-3, "quantising changes nothing: the test would show nothing"
    assert torch.equal(pair, expected) and torch.equal(finalised, expected)
    assert of_teacher == 0


def load_without_help(path, teacher):
    from distill_nemo.models.checkpoints import modelopt_state

    helped, modelopt_state._without_strides = modelopt_state._without_strides, contextlib.nullcontext
    try:
        load(path, teacher)
    finally:
        modelopt_state._without_strides = helped


@pytest.mark.skipif(not hasattr(TensorProperties, "strides"), reason="torch says no strides before 2.15")
def test_megatron_still_needs_help_with_torchs_strides(quantised, inputs, one):
    with pytest.raises(ValueError, match="unexpected keyword argument 'strides'"):
        one.run(in_one_process, load_without_help, quantised[0], inputs / "teacher")


@pytest.mark.parametrize(("place", "key"), [("modelopt_state", "common_state"), (".", "linear_proj._extra_state")])
def test_a_state_of_modelopts_that_would_run_code_is_refused(quantised, inputs, one, tmp_path, place, key):
    path, executed = shutil.copytree(quantised[0], tmp_path / "m"), tmp_path / "executed"
    plant(path / place, key, executed)
    with pytest.raises(ValueError, match=r"is not loaded: an object in it names \w+\.system, which could run code"):
        one.run(in_one_process, load, path, inputs / "teacher")
    assert not executed.exists()


def test_a_quantised_output_layer_cannot_be_part_of_the_loss(quantised, inputs, one):
    """Without the setting, a run uses whole logits, as every run here does."""
    with pytest.raises(ValueError, match="fused_linear = true is not possible: the student's output layer is a Quant"):
        one.run(in_one_process, load, quantised[0], inputs / "teacher", True)


def learn_from_a_store(path):
    """Return the loss of a micro batch, that of its definition, and the refusal of a quantised output layer."""
    from distill_nemo.config import DistillationConfig
    from distill_nemo.models.distillation.stored_targets import StoredTeacher, learn_from_store
    from distill_nemo.models.provider import finalise, model_provider
    from distill_nemo.models.resolve import resolve
    from distill_nemo.training.forward_step import forward_step

    student, kd = StudentConfig(str(path), **STATED), DistillationConfig(lm_weight=0.5)
    batch, stored = stored_batch("sampled", taught=1, valid=2), StoredTeacher("sampled", 1.0, N, 507)
    model = model_provider(student=student, parallelism=ParallelismConfig(), distillation=kd, stored=stored)
    output, loss_of = forward_step(iter([batch]), model)
    loss = float(loss_of(output)[0])
    clean = finalise(model)
    with torch.no_grad():
        log_q = clean(batch["tokens"], batch["position_ids"], None)[..., :507].double().log_softmax(-1)
    at_labels = log_q.gather(-1, batch["labels"][..., None])
    at_ids = log_q[0].gather(-1, batch["target_ids"][0].long())
    expected = -0.5 * at_labels.sum() - at_ids.sum() / N - batch["target_entropy"][0].sum()
    clean.output_layer.weight_quantizer.enable()
    with pytest.raises(ValueError, match=r"output layer is quantised, and .*: leave it out when you quantise"):
        learn_from_store(clean, stored, kd, resolve(student))
    return loss, float(expected)


def test_a_quantised_student_with_a_plain_output_layer_learns_from_a_store(quantised, one):
    loss, expected = one.run(in_one_process, learn_from_a_store, quantised[0])[0]
    assert loss == pytest.approx(expected, rel=1e-6)


def train(inputs, path, output, steps, tensor=1, pipeline=1, export=False):
    from distill_nemo.training.entry import run_config

    run = tiny_run(inputs, output, steps=steps)
    run.student = StudentConfig(str(path), **STATED)
    run.optimizer.decay_steps, run.checkpoint.export = 8, export
    run.parallelism.tensor_model_parallel_size, run.parallelism.pipeline_model_parallel_size = tensor, pipeline
    run_config(run)


def logits_of_run(output):
    model = provider(str(output))()
    return logits(model), sum("Quantizer" in type(module).__name__ for module in model.modules())


def test_runs_of_a_quantised_student_resume_bit_for_bit_and_save_it_quantised(quantised, inputs, one, tmp_path):
    path = quantised[0]
    one.run(train, inputs, path, tmp_path / "whole", 8)
    for steps in (4, 8):
        one.run(train, inputs, path, tmp_path / "parts", steps)
    assert metrics(tmp_path / "parts") == metrics(tmp_path / "whole")
    whole, parts = (one.run(in_one_process, logits_of_run, tmp_path / name)[0] for name in ("whole", "parts"))
    assert torch.equal(whole[0], parts[0]) and whole[1] == parts[1] > 0


def test_a_quantised_student_trains_alike_under_other_layouts(quantised, inputs, one, two, tmp_path):
    """Data and pipeline parallelism give the same curve; tensor parallelism would give other scales, and is refused."""
    path = quantised[0]
    one.run(train, inputs, path, tmp_path / "one", 4)
    for layout, sizes in {"dp2": (1, 1), "pp2": (1, 2)}.items():
        two.run(train, inputs, path, tmp_path / layout, 4, *sizes)
        for line, expected in zip(metrics(tmp_path / layout), metrics(tmp_path / "one"), strict=True):
            numbers = {key: value for key, value in expected.items() if key != "kind"}
            assert {key: line[key] for key in numbers} == pytest.approx(numbers, rel=1e-4, abs=1e-6)
    with pytest.raises(ValueError, match="cannot be split over tensor parallel ranks"):
        two.run(train, inputs, path, tmp_path / "tp2", 4, 2)


def test_an_export_is_refused_at_the_start(quantised, inputs, one, tmp_path):
    with pytest.raises(
        ValueError, match=r"was modified by ModelOpt .*cannot be exported yet; train with checkpoint\.export=false"
    ):
        one.run(train, inputs, quantised[0], tmp_path / "out", 8, 1, 1, True)
    assert not (tmp_path / "out").exists()
