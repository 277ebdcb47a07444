import json
import re
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import yaml

from distill_nemo.benchmark_config import BenchmarksConfig
from distill_nemo.config import (
    DataConfig,
    DistillationConfig,
    OptimizerConfig,
    ParallelismConfig,
    RunConfig,
    StudentConfig,
    TeacherConfig,
    TrainingConfig,
)
from distill_nemo.config_files import from_dict, save_yaml
from distill_nemo.publishing.card import Distilled, model_card
from distill_nemo.publishing.facts import front_matter, model_facts, name_of
from distill_nemo.publishing.repetition import changed_fields
from distill_nemo.quantization import QuantizationConfig
from distill_nemo.runtime.checksums import identity_of

COMMIT = "0123abcd" * 5
TEACHER = f"Org/Teacher-8B@{COMMIT}"
APACHE = "\n                                 Apache License\n                           Version 2.0, January 2004\n"
EVALUATION = {"lm_loss": 2.0, "forward_kl": 0.12345, "top1_agreement": 0.75, "teacher_lm_loss": 1.9}


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


@pytest.fixture
def of(tmp_path):
    """Return a run on the models in a home with a user's name: a pruned student, a teacher from the hub's cache."""
    home = tmp_path / "alice"
    teacher = home / "hub" / "models--Org--Teacher-8B" / "snapshots" / COMMIT
    write(teacher / "README.md", "---\nlicense: mit\n---\n# Teacher\n")
    run = home / "runs" / "six"
    sizes = {"num_layers": 36, "hidden_size": 4096}, {"num_layers": 30, "hidden_size": 4096}
    record = {
        "model": {"path": str(teacher), "num_parameters": 8_000_000_000, "sizes": sizes[0]},
        "result": {"num_parameters": 6_000_000_000, "sizes": sizes[1]},
        "held_out_lm_loss": {"model": 1.9, "result": 2.7},
    }
    write(run / "pruned" / "pruning.json", json.dumps(record))
    steps = [{"kind": "train", "step": step, "seconds": 1800.0, "tokens": 1000 * step} for step in (1, 2)]
    lines = [{"kind": "start", "step": 0, "world_size": 4, "device": "NVIDIA H100"}, *steps]
    lines += [{"kind": "eval", "step": 2, **EVALUATION}, {"kind": "eval", "step": 3, "lm_loss": 1.0}]
    write(run / "metrics.jsonl", "\n".join(map(json.dumps, lines)))
    config = RunConfig(
        str(run),
        StudentConfig(str(run / "pruned"), "qwen3", num_layers=30, hidden_size=4096, vocab_size=507),
        TeacherConfig(str(teacher), num_layers=36),
        distillation=DistillationConfig(temperature=2.0, lm_weight=0.5),
        benchmarks=BenchmarksConfig(tasks="ours", include_path=str(home / "tasks")),
        parallelism=ParallelismConfig(tensor_model_parallel_size=2),
        data=DataConfig(["33.25", f"{home}/data/web", "66.75", f"{home}/data/code"], tokenizer=str(teacher)),
        optimizer=OptimizerConfig(lr=3e-4),
        training=TrainingConfig(steps=2, global_batch_size=64),
    )
    save_yaml(config, run / "config.yaml")
    return Distilled(config, run, 2, 6_000_000_000, "ORG/six")


def test_a_card_says_what_was_distilled_from_what_and_how_well(of):
    card = model_card(of)
    head, *sections = re.split(r"^## ", card, flags=re.M)
    assert [section.splitlines()[0] for section in sections] == [
        *("Models", "Data", "Training", "Held-out metrics", "Reproduction", "Licences", "Limits")
    ]
    assert "# ORG/six" in head and f"6,000,000,000 parameters, distilled from `{TEACHER}`" in head
    for line in (
        "- student: `qwen3`, 30 layers, hidden size 4096; initialised from `six`",
        f"- cut from `{TEACHER}`, 8,000,000,000 to 6,000,000,000 parameters: `num_layers` 36 to 30; held-out LM "
        "loss before the distillation: 2.7000, of the model that was cut 1.9000",
        "- `web`: weight 33.25, no longer there when this card was written",
        "- held out: documents of the same data, `969,30,1` (train, valid, test)",
        "- 2 steps of 64 sequences of 4,096 tokens; 2,000 valid tokens",
        "- loss: forward kl at temperature 2, LM loss (static weights)",
        "- 4 ranks on `NVIDIA H100`; 4.00 device-hours in steps",
        "| forward KL to the teacher (nats per token) | 0.1235 |",
        "| perplexity | 7.3891 |",
        f"- teacher, `{TEACHER}`: `mit`",
        "torchrun --rdzv-backend loopback --nproc-per-node 4 -m distill_nemo config.yaml",
    ):
        assert line in card.splitlines()
    assert model_card(replace(of)) == card


def test_the_metadata_of_a_card_is_that_of_the_hub(of, tmp_path):
    readme = write(tmp_path / "README.md", model_card(of))
    found = front_matter(readme)
    (result,) = found["model-index"][0]["results"]
    values = {metric["type"]: metric["value"] for metric in result["metrics"]}
    assert values == EVALUATION | {"forward_kl": 0.1235, "perplexity": 7.3891}
    del found["model-index"]
    assert found == {
        "license": "mit",
        "base_model": "Org/Teacher-8B",
        "base_model_relation": "finetune",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["distill-nemo", "distillation", "pruned"],
    }


def test_a_card_names_no_place(of, tmp_path):
    card = model_card(of)
    assert not re.search(r"alice|tmp|snapshots|/runs|wandb", card)


def test_the_config_in_a_card_repeats_the_run(of):
    (text,) = re.findall(r"^````yaml\n(.*?)^````$", model_card(of), re.M | re.S)
    again = from_dict(yaml.safe_load(text))
    expected = replace(of.config, output_dir="six", teacher=TeacherConfig(TEACHER), benchmarks=BenchmarksConfig())
    expected.student = StudentConfig("six", vocab_size=507)
    expected.data = replace(of.config.data, train=["33.25", "web", "66.75", "code"], tokenizer=TEACHER)
    assert asdict(again) == asdict(expected)
    assert changed_fields(RunConfig("out", StudentConfig())) == {"output_dir": "out"}


def test_an_earlier_step_has_its_own_metrics(of):
    card = model_card(replace(of, step=1))
    assert "- 1 steps of 64" in card and "1,000 valid tokens" in card and "Held-out" not in card
    assert "model-index" not in card


def test_benchmarks_of_the_step_are_told_with_their_errors(of):
    scores = [
        {"task": "mmlu", "metric": "acc", "values": {"six": 0.71234}, "errors": {"six": 0.0041}},
        {"task": "evil`|\n# x", "metric": "exact_match, strict", "values": {"six": 0.5}, "errors": {}},
    ]
    write(of.directory / "benchmarks" / "step_00000002.json", json.dumps({"models": {"six": "x"}, "scores": scores}))
    card = model_card(of)
    assert "- `mmlu`, `acc`: 0.7123 ± 0.0041" in card and "- `evil?|?# x`, `exact_match, strict`: 0.5000\n" in card
    assert "no benchmark" not in card and "no benchmark was run for this card" in model_card(replace(of, step=1))
    _, result, _ = yaml.safe_load(card.split("\n---\n")[0])["model-index"][0]["results"]
    assert (result["dataset"]["type"], result["metrics"][0]["value"]) == ("mmlu", 0.7123)


def test_benchmarks_of_a_checkpoint_that_was_replaced_are_not_told(of):
    checkpoint = write(of.directory / "checkpoints" / "step_00000002" / "SHA256SUMS", "of the first")
    scores = [{"task": "mmlu", "metric": "acc", "values": {"step 2": 0.7}, "errors": {}}]
    identities = {"step 2": identity_of(checkpoint.parent)}
    stated = json.dumps({"models": {}, "scores": scores, "identities": identities})
    write(of.directory / "benchmarks" / "step_00000002.json", stated)
    assert "`mmlu`, `acc`: 0.7000" in model_card(of)
    checkpoint.write_text("of another")
    assert "## Benchmarks" not in model_card(replace(of))  # which has read nothing yet


@pytest.mark.parametrize("text", ["[]", '{"scores": 3}', '{"scores": [{}]}', '{"scores": [{"values": {"a": NaN}}]}'])
def test_damaged_benchmarks_are_none(of, text):
    write(of.directory / "benchmarks" / "step_00000002.json", text)
    assert "## Benchmarks" not in model_card(of)


def test_a_run_without_teacher_is_not_called_distilled(of):
    config = replace(of.config, teacher=None, student=StudentConfig(family="llama"))
    card = model_card(replace(of, config=config))
    assert "trained on text, without a teacher," in card and "; randomly initialised" in card
    assert "licence may" not in card and "its teacher" not in card
    assert "distillation" not in yaml.safe_load(card.split("---")[1])["tags"]


def test_a_quantised_student_that_is_exported_as_a_plain_one_is_not_called_quantised(of):
    config = replace(of.config, quantization=QuantizationConfig(format="nvfp4"))
    card = model_card(replace(of, config=config, quantized="none"))
    metadata = yaml.safe_load(card.split("---")[1])
    assert "quantized" not in metadata["tags"] and metadata["base_model_relation"] == "finetune"
    assert metadata["library_name"] == "transformers"
    assert "- trained as `nvfp4` computes; here are the rounded weights, and inputs are no longer rounded" in card


def test_a_quantised_student_is_called_so(of):
    config = replace(of.config, quantization=QuantizationConfig(format="nvfp4", kv_cache="fp8"))
    card = model_card(replace(of, config=config))
    assert "- trained as `nvfp4` computes; keys and values: `fp8`" in card.splitlines()
    assert "library_name: Model Optimizer" in card.splitlines()
    metadata = yaml.safe_load(card.split("---")[1])
    assert "quantized" in metadata["tags"] and metadata["base_model_relation"] == "quantized"


def test_nothing_in_names_is_markup(of, tmp_path):
    evil = "](http://x)<script>\n# Free `money`\n````\n---\x1b[31m\u202e" + "x" * 200
    config = replace(of.config, data=DataConfig([f"/data/{evil.replace('/', '')}"]))
    config.student.family = config.training.dtype = evil
    card = model_card(replace(of, config=config, title=evil))
    plain = re.sub(r"^````\w*$.*?^````$", "", card, flags=re.M | re.S)
    plain = re.sub(r"`[^`\n]*`", "", plain)
    assert not re.search(r"<script>|\]\(|\x1b|\u202e|^---$(?!\n\n# )", plain.split("\n---\n", 1)[1], re.M)
    assert card.count("````") == 4 and not re.search(r"^# Free", card, re.M)
    assert isinstance(yaml.safe_load(card.split("\n---\n")[0]), dict)


@pytest.mark.parametrize(
    ("files", "licence"),
    [
        ({"README.md": "---\nlicense: llama3.2\n---\n"}, ("llama3.2", "")),
        ({"README.md": "---\nlicense: other\nlicense_name: My-Own License\n---\n"}, ("other", "my-own-license")),
        ({"LICENSE": APACHE}, ("apache-2.0", "")),
        ({"LICENSE.txt": "\nSome Community License\n\nfor you"}, ("other", "some-community-license")),
        ({"README.md": "---\nlicense: [a, {b: c}]\n---\n", "LICENSE": APACHE}, ("apache-2.0", "")),
        ({"README.md": "---\nlicense: <b>x</b>\n---\n"}, ("", "")),
        ({"README.md": "---\n" + "[" * 60_000 + "\n---\n"}, ("", "")),
        ({"README.md": "---\na: &a [1]\nlicense: *a\n---\n"}, ("", "")),
        ({"README.md": "no metadata\n---\nlicense: mit\n---\n"}, ("", "")),
        ({"README.md": "", "LICENSE": " "}, ("", "")),
        ({}, ("", "")),
    ],
)
def test_a_licence_is_read_from_the_card_or_the_licence_file(tmp_path, files, licence):
    for name, text in files.items():
        write(tmp_path / "model" / name, text)
    found = model_facts(str(tmp_path / "model"))
    assert (found.licence, found.licence_name) == licence


def test_a_licence_is_that_of_the_model_before_as_far_as_there_is_one(tmp_path):
    write(tmp_path / "source" / "LICENSE", APACHE)
    run = tmp_path / "run"
    write(
        run / "checkpoints" / "step_00000004" / "run.json",
        json.dumps({"student": {"checkpoint": f"{tmp_path}/source"}}),
    )
    for of_run in (run, run / "checkpoints", run / "checkpoints" / "step_00000004"):
        assert model_facts(str(of_run)).licence == "apache-2.0"
    loop = tmp_path / "loop"
    write(loop / "run.json", json.dumps({"student": {"checkpoint": str(loop)}}))
    assert model_facts(str(loop)).licence == ""


@pytest.mark.parametrize("text", ["[]", "{", '{"model": {}}', '{"model": {"path": 1, "sizes": []}, "result": {}}'])
def test_a_damaged_record_of_a_cut_is_none(tmp_path, text):
    write(tmp_path / "pruning.json", text)
    assert model_facts(str(tmp_path)).cut is None


def test_names_leave_out_where_a_model_lies(tmp_path):
    for part in ("student", "pruned", "checkpoints/step_00000012"):
        write(tmp_path / "six" / "config.yaml", "")
        assert name_of(str(tmp_path / "six" / part)) == "six"
    assert name_of("/home/alice/student") == name_of("alice/student") == "student"
    assert name_of(f"/cache/models--Qwen--Qwen3-8B/snapshots/{COMMIT}") == f"Qwen/Qwen3-8B@{COMMIT}"
    assert name_of(f"Qwen/Qwen3-8B@{COMMIT}") == f"Qwen/Qwen3-8B@{COMMIT}"
