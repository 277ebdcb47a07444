"""Tensors of a student's source that the student lacks, copied into an export where asked."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from distill_nemo.config import StudentConfig
from distill_nemo.runtime.device import setup_device
from distill_nemo.runtime.process_groups import process_groups
from tests.distillation import Layout
from tests.distributed.checkpoint.test_resume import train
from tests.tiny_models import write_hf
from tests.unit.models.test_quantized_sources import write_fp8


@pytest.fixture
def source(tmp_path):
    """Return a model with two tensors of a layer that predicts further tokens, in files of two dtypes."""
    path = Path(write_hf(tmp_path / "in", "glm4_moe", layers=2))
    tensors = {name: x.clone() for name, x in load_file(path / "model.safetensors").items()}  # the file is replaced
    further = {
        "model.layers.2.eh_proj.weight": torch.randn(64, 128).bfloat16(),
        "model.layers.2.enorm.weight": torch.randn(64),
    }
    save_file(tensors | further, path / "model.safetensors", {"format": "pt"})
    config = json.loads((path / "config.json").read_text()) | {"num_nextn_predict_layers": 1}
    (path / "config.json").write_text(json.dumps(config))
    return path, tensors | further


def export(path, output, layout, copy_untouched, max_file_bytes=10**9):
    setup_device()
    with process_groups(layout.config()):
        from megatron.core import parallel_state as ps

        from distill_nemo.models.checkpoints.huggingface import export_hf
        from distill_nemo.models.provider import model_provider
        from distill_nemo.models.resolve import resolve
        from distill_nemo.runtime.seed import seed_everything

        seed_everything(0)
        student = resolve(StudentConfig(checkpoint=str(path)))
        first, last = ps.is_pipeline_first_stage(), ps.is_pipeline_last_stage()
        chunks = [model_provider(first, last, student=student, parallelism=layout.config())]
        export_hf(chunks, str(output), student, None, path, max_file_bytes, copy_untouched)


@pytest.mark.parametrize("limit", [10**9, 100_000])
def test_they_are_copied_bit_for_bit_and_the_config_states_them(source, two, tmp_path, limit):
    path, tensors = source
    two.run(export, path, tmp_path / "out", Layout(pipeline=2), True, limit)
    found = {}
    for file in (tmp_path / "out").glob("*.safetensors"):
        found |= load_file(file)
    assert found.keys() == tensors.keys()
    assert all(
        torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype for name, tensor in tensors.items()
    )
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())["weight_map"]
    assert index.keys() == tensors.keys()
    assert json.loads((tmp_path / "out" / "config.json").read_text())["num_nextn_predict_layers"] == 1
    from distill_nemo.models.resolve import resolve

    assert resolve(StudentConfig(checkpoint=str(tmp_path / "out"))).num_layers == 2


def test_without_being_asked_an_export_has_the_students_tensors_alone(source, one, tmp_path):
    path, tensors = source
    one.run(export, path, tmp_path / "out", Layout(), False)
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert found.keys() == {name for name in tensors if "layers.2." not in name}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["num_nextn_predict_layers"] == 0


def test_a_model_inside_another_is_refused(source, tmp_path):
    setup_device()
    from distill_nemo.models.checkpoints.untouched import untouched_tensors
    from distill_nemo.models.resolve import resolve

    path, tensors = source
    student = resolve(StudentConfig(checkpoint=str(path)))
    inside = {name.replace("model.", "model.language_model.", 1): tensor for name, tensor in tensors.items()}
    save_file(inside | {"model.visual.weight": torch.ones(2)}, path / "model.safetensors")
    with pytest.raises(ValueError, match="holds the student inside another model"):
        untouched_tensors(path, student)


def test_a_source_that_has_none_is_refused(one, tmp_path):
    path = Path(write_hf(tmp_path / "in", "llama_tied", layers=1))
    with pytest.raises(ValueError, match=r"copy_untouched: .* holds no tensors besides the student's"):
        one.run(export, path, tmp_path / "out", Layout(), True)
    assert not (tmp_path / "out").exists()


def test_scales_of_a_quantised_source_are_not_copied(tmp_path):
    setup_device()
    from distill_nemo.models.checkpoints.untouched import untouched_tensors
    from distill_nemo.models.resolve import resolve

    path, _ = write_fp8(tmp_path / "fp8")
    with pytest.raises(ValueError, match="holds no tensors besides the student's"):
        untouched_tensors(Path(path), resolve(StudentConfig(checkpoint=path)))


def test_a_run_without_anything_to_copy_is_refused_before_its_first_step(inputs, one, tmp_path):
    changes = {"checkpoint.export": True, "checkpoint.copy_untouched": True}
    with pytest.raises(ValueError, match=r"copy_untouched: .* holds no tensors besides the student's"):
        one.run(train, inputs, tmp_path / "run", 1, 1, None, changes)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
