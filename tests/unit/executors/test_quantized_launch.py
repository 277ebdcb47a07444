"""Quantised students that the ranks would refuse by their config.json are refused before a job waits in a queue."""

import json
import re
from dataclasses import asdict

import pytest

from distill_nemo.config import ExportConfig, PruneConfig, RunConfig, StudentConfig
from distill_nemo.executors import check_launch, kubernetes, local, slurm
from distill_nemo.models.resolve import resolve
from distill_nemo.planning.gpus import GPUS
from distill_nemo.planning.plan import planned_run, with_layout
from distill_nemo.quantization import QuantizationConfig
from tests.hub_downloads import Hub, asked
from tests.tiny_models import write_hf
from tests.training import changed, tiny_run

TWO = {"parallelism.tensor_model_parallel_size": 2}
REFUSED = {  # student, changes of the run, message
    "blocks": (
        "llama",
        {"quantization.format": "int4_weights", "quantization.block_size": 32, **TWO},
        "blocks of 32 weights, which do not divide the 48 of a row of decoder.layers.0.mlp.linear_fc2 on each of",
    ),
    "rows": (
        "odd",
        {"quantization.format": "int4_weights", "quantization.block_size": 9, **TWO},
        "gate_proj.weight: a tensor-parallel rank has its rows 27 to 54, but INT4 holds two rows a byte",
    ),
    "cache": (
        "llama",
        {
            "quantization.format": "fp8",
            "quantization.kv_cache": "fp8",
            "quantization.exclude": ["output_layer", "*.1.*.linear_qkv"],
        },
        "decoder.layers.1.self_attention.linear_qkv is in quantization.exclude, so scales of its keys and values",
    ),
    "experts": (
        "gpt_oss",
        {"quantization.format": "fp8", "quantization.exclude": ["*.linear_qkv", "*.linear_proj", "output_layer"]},
        "mlp.experts.gate_up_proj holds several matrices, or one transposed",
    ),
    "pattern": (
        "llama",
        {"quantization.format": "fp8", "quantization.exclude": ["lm_head"]},
        '"lm_head" matches no linear layer',
    ),
    "another format": ("run", {"quantization.format": "int8"}, "was quantised by its run with quantization.format"),
    "its run's blocks": ("run", TWO, "blocks of 32 weights, which do not divide the 48 of a row of"),
    "ModelOpt's": ("by ModelOpt", {**TWO, "checkpoint.export": False}, "its quantizers' scales cannot be split over"),
    "plain": ("llama", {"checkpoint.quantized": "compressed-tensors"}, "is not quantised; leave it out, or train with"),
}


@pytest.fixture(scope="module")
def students(tmp_path_factory):
    root = tmp_path_factory.mktemp("students")
    for family in ("llama", "gpt_oss"):
        write_hf(root / family, family, layers=2)
    write_hf(root / "odd", "llama", layers=2, width=36, heads=2)
    numbers = QuantizationConfig("int4_weights", block_size=32)
    own = asdict(resolve(StudentConfig(str(root / "llama"))).filled(StudentConfig())) | {"checkpoint": None}
    for name, quantization in (("run", {"quantization": asdict(numbers)}), ("by ModelOpt", {})):
        step = root / name / "checkpoints" / "step_00000001"
        (step / "modelopt_state").mkdir(parents=True) if not quantization else step.mkdir(parents=True)
        (step / "architecture.json").write_text(json.dumps(own | quantization))
    return root


def run_of(inputs, students, student, changes) -> RunConfig:
    run = tiny_run(inputs, students / "out")
    run.checkpoint.export = True
    run.student.checkpoint = str(students / student)
    return changed(run, changes)


@pytest.mark.parametrize("case", REFUSED)
def test_a_student_that_the_ranks_would_refuse_is_refused_before_them(inputs, students, case):
    student, changes, message = REFUSED[case]
    run = run_of(inputs, students, student, changes)
    for executor in (local(2), slurm(nodes=1, devices=2)):
        with pytest.raises(ValueError, match=re.escape(message)):
            check_launch(run, executor, dryrun=True)
    with pytest.raises(ValueError, match=re.escape(message)):
        planned_run(run, 2)


def test_one_that_they_take_is_taken(inputs, students, monkeypatch):
    numbers = {"quantization.format": "int4_weights", "quantization.block_size": 16, "quantization.kv_cache": "fp8"}
    check_launch(run_of(inputs, students, "llama", {**numbers, **TWO}), local(2), dryrun=True)
    check_launch(run_of(inputs, students, "run", {}), local(2), dryrun=True)
    monkeypatch.chdir(students)
    run = run_of(inputs, students, "llama", {**numbers, "student.checkpoint": "llama"})
    check_launch(run, local(2), dryrun=True)


def test_what_cannot_be_seen_from_here_is_left_to_the_ranks(inputs, students):
    run = run_of(inputs, students, *REFUSED["blocks"][:2])
    run.output_dir, run.student.checkpoint = "/workspace/out", "/workspace/student"
    check_launch(run, kubernetes(image="x", pvc="work", devices=2), dryrun=True)


def test_a_name_on_the_hub_is_known_by_its_description_alone(inputs, students, tmp_path, capsys):
    student, changes, message = REFUSED["blocks"]
    run = run_of(inputs, students, student, changes | {"student.checkpoint": "org/model"})
    files = {name: (students / student / name).read_bytes() for name in ("config.json", "model.safetensors")}
    with Hub() as hub, asked(hub.url, tmp_path / "home"):
        hub.commit("org/model", files)
        with pytest.raises(ValueError, match=re.escape(message)):
            check_launch(run, local(2), dryrun=True)
        assert not any(request.startswith("GET /cdn") for request in hub.requests), "weights were downloaded"
    with asked("http://127.0.0.1:9", tmp_path / "other"):
        check_launch(run, local(2), dryrun=True)
    assert capsys.readouterr().err.startswith("warning: org/model")


def test_an_export_of_a_quantised_run_is_refused_by_its_files_before_a_job(students):
    config = ExportConfig(str(students / "llama"), str(students / "exported"), quantized="compressed-tensors")
    with pytest.raises(ValueError, match="is not quantised; leave it out"):
        check_launch(config, slurm(nodes=1, devices=2), dryrun=True)


@pytest.mark.parametrize("field", ["student", "teacher", "model"])
def test_quantised_weights_that_are_not_read_are_refused_before_a_job(inputs, students, tmp_path, field):
    write_hf(tmp_path / "awq", "llama")
    path = tmp_path / "awq" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": {"quant_method": "awq"}}))
    if field == "model":
        job = PruneConfig(str(tmp_path / "awq"), str(inputs / "train"), str(tmp_path / "out"), num_layers=1)
    else:
        job = changed(tiny_run(inputs, tmp_path / "out"), {f"{field}.checkpoint": str(tmp_path / "awq")})
    with pytest.raises(ValueError, match=rf"{field}.*: .*config\.json.*awq"):
        check_launch(job, slurm(nodes=1, devices=1), dryrun=True)


def test_a_layout_is_chosen_among_those_that_can_be_exported(inputs, students):
    run = run_of(inputs, students, *REFUSED["rows"][:2])
    with pytest.raises(ValueError, match=r'no layout divides .* can write checkpoint\.quantized = "modelopt"'):
        with_layout(run, 2, GPUS["h100"], ["tensor_model_parallel_size"])
    run.checkpoint.quantized = "none"
    with_layout(run, 2, GPUS["h100"], ["tensor_model_parallel_size"])
    experts = run_of(inputs, students, *REFUSED["experts"][:2])
    with pytest.raises(ValueError, match="holds several matrices"):
        with_layout(experts, 2, GPUS["h100"])
