"""Benchmarks by lm-evaluation-harness, on two ranks, against its own command line in one process."""

import contextlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import transformers
import yaml

from distill_nemo.benchmarks.entry import evaluate
from distill_nemo.checkpoint.directory import delete, prune
from distill_nemo.config import CheckpointConfig
from distill_nemo.reports.report import page_of
from distill_nemo.reports.runs import read_runs
from distill_nemo.reports.scores import read_scores
from distill_nemo.runtime.gloo import share_gloo_device
from distill_nemo.runtime.process_groups import process_group_of_one
from distill_nemo.training.entry import run_config
from tests.cli.command import Command
from tests.spawn import Gloo
from tests.tiny_models import megatron_tensors, nemo_config, write_hf, write_nemo
from tests.training import tiny_run

pytestmark = pytest.mark.long
TASKS = ["tiny_choice", "tiny_generation", "tiny_perplexity"]
BASELINE = "models--Org--Baseline/snapshots/" + 40 * "0"  # as in the hub's cache
TEXTS = [f"def f{n}(x):\n    return x + {n}\n\nimport os  # {n * 'and so on '}" for n in range(5)]


@pytest.fixture(scope="module")
def pair():
    """Return two processes, new ones in every run."""
    with Gloo(2, init=False, timeout=580) as group:
        yield group


@pytest.fixture(scope="module")
def here(inputs, tmp_path_factory):
    """Return a directory with a model and its baseline, and tasks in `tasks`."""
    here = tmp_path_factory.mktemp("benchmarks")
    for name, seed in (("model", 1), (BASELINE, 2)):
        write_hf(here / name, "llama", seed=seed)
        shutil.copytree(inputs / "tokenizer", here / name, dirs_exist_ok=True)
    (here / "tasks").mkdir()
    choices = [{"question": f"{n} + {n} =", "choices": [str(n), str(2 * n), "none"], "answer": n % 3} for n in range(7)]
    prompts = [{"prompt": f"class C{n}:", "wanted": "no such thing"} for n in range(6)]
    for each in prompts[::2]:
        each["wanted"] = continuation(here / "model", each["prompt"])
    write_task(here, "tiny_choice", choices, CHOICE)
    write_task(here, "tiny_generation", prompts, GENERATION)
    write_task(here, "tiny_perplexity", [{"text": text} for text in TEXTS], PERPLEXITY)
    return here


CHOICE = {
    "output_type": "multiple_choice",
    "doc_to_text": "Question: {{question}}",
    "doc_to_choice": "{{choices}}",
    "doc_to_target": "answer",
    "num_fewshot": 2,  # drawn at random
    "fewshot_split": "test",
    "metric_list": [{"metric": m, "aggregation": "mean", "higher_is_better": True} for m in ("acc", "acc_norm")],
}
GENERATION = {
    "output_type": "generate_until",
    "doc_to_text": "{{prompt}}",
    "doc_to_target": "{{wanted}}",
    "generation_kwargs": {"until": ["\n"], "max_gen_toks": 8, "do_sample": False},
    "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
}
PERPLEXITY = {
    "output_type": "loglikelihood_rolling",
    "doc_to_text": "",
    "doc_to_target": "{{text}}",
    "metric_list": [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
}


def write_task(here, name, documents, fields):
    data = here / f"{name}.jsonl"
    data.write_text("".join(f"{json.dumps(each)}\n" for each in documents))
    known = {"task": name, "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}}}
    (here / "tasks" / f"{name}.yaml").write_text(yaml.safe_dump(known | {"test_split": "test"} | fields))


def continuation(model, prompt):
    """Return what transformers says greedily, to the end of the line."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    encoded = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)["input_ids"]
    ids = transformers.AutoModelForCausalLM.from_pretrained(model).generate(encoded, max_new_tokens=8, do_sample=False)
    return tokenizer.decode(ids[0, encoded.shape[1] :]).split("\n")[0]


def settings(here, **others):
    return {
        "model": str(here / "model"),
        "baseline": str(here / BASELINE),
        "tasks": ",".join(TASKS),
        "include_path": str(here / "tasks"),
        "output": str(here / "scores"),
        "dtype": "float32",
        "batch_size": 1,
        **others,
    }


def held_out(inputs):
    return {"data": str(inputs / "valid"), "sequence_length": 32, "samples": 8}


def on_a_rank(here, fields, of_one=False):
    """Evaluate, and return what is printed. `of_one`: rank 0 in a world of its own."""
    os.environ |= {"HF_DATASETS_CACHE": str(here / "cache"), "HF_HUB_OFFLINE": "1"}
    out = io.StringIO()
    with alone() if of_one else together(), contextlib.redirect_stdout(out):
        evaluate(**fields)
    return out.getvalue()


@contextlib.contextmanager
def together():
    """Join both ranks once: unlike torchrun's, their store would end with the first of several groups."""
    share_gloo_device()
    torch.distributed.init_process_group("gloo")
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


@contextlib.contextmanager
def alone():
    """Let this process forget that there is another rank."""
    before = dict(os.environ)
    del os.environ["MASTER_PORT"]
    os.environ["WORLD_SIZE"] = "1"
    try:
        yield
    finally:
        os.environ |= before


def killed(here, fields):
    """Kill an evaluation by one process after its first result. Return the files that it has written."""
    import distill_nemo.benchmarks.harness  # noqa: F401  the child has it, too

    if os.environ["RANK"] == "1":
        return None
    child = os.fork()
    if child == 0:
        on_a_rank(here, fields, of_one=True)
        os._exit(0)
    while not list((here / "scores").glob("results/*.json")):
        assert os.waitpid(child, os.WNOHANG) == (0, 0)
        time.sleep(0.02)
    os.kill(child, signal.SIGKILL)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    return [str(file) for file in (here / "scores").glob("results/*.json")]


def harness(here, model):
    """Start the harness's own command line."""
    words = "--tasks", ",".join(TASKS), "--include_path", here / "tasks", "--batch_size", 1, "--device", "cpu"
    model_args = f"pretrained={here / model},dtype=float32"
    command = [sys.executable, "-m", "lm_eval", "run", "--model", "hf", "--model_args", model_args, *words]
    return Command([*command, "--output_path", here / "theirs"], here, HF_HUB_OFFLINE="1")


@dataclass
class Measured:
    """Results of the harness's command line, scores and results of ours, and what ours printed."""

    theirs: dict
    scores: dict
    results: list[dict]
    printed: str
    first: list[str]  # files that the killed process had written


@pytest.fixture(scope="module")
def measured(inputs, here, pair):
    command = harness(here, "model")
    fields = settings(here, **held_out(inputs))
    first, _ = pair.run(killed, here, fields)
    printed, _ = pair.run(on_a_rank, here, fields)
    ended = command.ended()
    assert ended.code == 0, ended.err
    (file,) = (here / "theirs").rglob("results_*.json")
    results = [json.loads(file.read_text()) for file in sorted((here / "scores" / "results").glob("*.json"))]
    scores = json.loads((here / "scores" / "scores.json").read_text())
    return Measured(json.loads(file.read_text()), scores, results, printed, first)


def test_scores_of_two_ranks_are_the_command_lines_digit_for_digit(measured):
    assert len(measured.results) == 6
    values = {(each["task"], each["metric"]): each["values"] for each in measured.scores["scores"]}
    assert values["tiny_generation", "exact_match"]["model"] == 0.5, "every second answer is transformers' own"
    assert values["tiny_choice", "acc"].keys() == {"model", "baseline"}
    for task in TASKS:
        theirs = {name: value for name, value in measured.theirs["results"][task].items() if "," in name}
        ours = [{n: v for n, v in each["results"][task].items() if "," in n} for each in results_of(measured, task)]
        assert len(theirs) >= 2 and theirs in ours
        for name in theirs:
            if "_stderr" not in name:
                assert values[task, name.partition(",")[0]]["model"] == theirs[name]
    errors = {(each["task"], each["metric"]): each["errors"] for each in measured.scores["scores"]}
    assert errors["tiny_choice", "acc"]["model"] == measured.theirs["results"]["tiny_choice"]["acc_stderr,none"]


def results_of(measured, task):
    return [each for each in measured.results if each["task"] == task]


def test_a_killed_command_goes_on_and_measures_nothing_twice(measured):
    assert measured.first
    told = re.findall(r"^(\w+): (\w+) measured", measured.printed, re.M)
    before = [Path(name).name.rpartition("-")[0] for name in measured.first]
    assert [task for model, task in told if model == "model"] == TASKS[len(before) :] and before == TASKS[: len(before)]
    assert [task for model, task in told if model == "baseline"] == TASKS


def test_the_table_shows_models_side_by_side_with_standard_errors(measured):
    assert re.search(r"^ *benchmark +model +baseline", measured.printed, re.M)
    assert measured.scores["models"]["baseline"] == f"Org/Baseline@{40 * '0'}"
    assert re.search(r"tiny_generation exact_match ↑ +0\.5000 ± 0\.2236 +0 ", measured.printed)


def test_other_formats_are_exported_and_code_templates_and_missing_data_are_refused(inputs, here, pair, measured):
    on_two_ranks = measured.scores["held_out"][0]["means"]
    fields = settings(here, **held_out(inputs), tokenizer=str(inputs / "tokenizer"), baseline=str(here / "nemo"))
    exported, inside, code, package, template, mistaken, missing = pair.run(several, here, fields)[0]
    assert "model: " not in exported and exported.count("baseline: ") == len(TASKS)
    found = read_scores(here / "scores" / "scores.json")
    assert len(found.scores) == 5 and all(each.values["model"] == each.values["baseline"] for each in found.scores)
    assert [each["model"] for each in found.held_out] == ["model", "baseline"]
    assert all(each["means"] == pytest.approx(on_two_ranks, rel=1e-6) for each in found.held_out)
    assert re.search(
        r"include_path: .*/code.yaml line 1: !function no_module.f runs Python code; allow_code=true", code
    )
    assert "tasks: code needs a package: Cannot import module 'no_module'" in package
    assert "cannot measure mistaken: UndefinedError: 'nothing' is undefined. Correct its YAML file" in mistaken
    assert "a template of escaping reaches beyond its data" in template and "allow_code=true" in template
    assert f"output = {here}/model/scores is in the model {here}/model, whose next export would replace it" in inside
    assert "the data of fetched cannot be had" in missing and "name files in a task of include_path" in missing
    assert not (here / "ran").exists()


def several(here, fields):
    """Return what rank 0 says of another baseline, code, templates that run code or are wrong, and missing data."""
    if os.environ["RANK"] == "1":
        return None
    with process_group_of_one():
        write_nemo(here / "nemo", megatron_tensors(here / "model"), nemo_config(here / "model", "llama"))
    (here / "model" / "of_another_program.json").write_text("{}")  # no part of the model
    texts = [on_a_rank(here, fields, of_one=True)]
    single = fields | {"baseline": None, "data": None}
    texts.append(refused(here, single | {"output": str(here / "model" / "scores")}))
    (here / "code").mkdir()
    (here / "code" / "code.yaml").write_text("process_docs: !function no_module.f\ntask: code\n")
    for allow_code in (False, True):
        of_code = {"include_path": str(here / "code"), "tasks": "code", "allow_code": allow_code}
        texts.append(refused(here, single | of_code))
    template = "{% set _ = cycler.__init__.__globals__.os.system('touch " + str(here / "ran") + "') %}Question:"
    texts_of = {"escaping": template, "mistaken": "{{nothing}}"}
    changed = {name: {"doc_to_text": text} for name, text in texts_of.items()}
    for name, changes in (changed | {"fetched": {"dataset_path": "no-such/data"}}).items():
        task = yaml.safe_load((here / "tasks" / "tiny_choice.yaml").read_text())
        (here / name).mkdir()
        (here / name / "task.yaml").write_text(yaml.safe_dump(task | {"task": name} | changes))
        texts.append(refused(here, single | {"include_path": str(here / name), "tasks": name}))
    return texts


def refused(here, fields):
    with pytest.raises(ValueError) as error:
        on_a_rank(here, fields, of_one=True)
    return str(error.value)


def test_without_the_sandbox_a_template_runs_code(here, pair, measured):
    """If this fails, the harness has a sandbox of its own, and ours can go."""
    pair.run(escapes, here, settings(here))
    assert (here / "ran").exists()


def escapes(here, fields):
    if os.environ["RANK"] == "0":
        others = {"include_path": str(here / "escaping"), "tasks": "escaping", "allow_code": True, "baseline": None}
        on_a_rank(here, fields | others, of_one=True)


def test_the_harness_asks_git_where_there_is_no_repository_and_ours_does_not(here, pair, measured):
    """If the first fails, the harness is silent by itself, and what silences it can go."""
    theirs, ours = pair.run(said_of_git, here, settings(here, tasks="tiny_choice", baseline=None))[0]
    assert "not a git repository" in theirs
    assert "tiny_choice measured" in ours and "git" not in ours


def said_of_git(here, fields):
    """Return what the harness's own function says, and what rank 0 of an evaluation and its children say."""
    from lm_eval.evaluator import get_git_commit_hash

    if os.environ["RANK"] == "1":
        return None
    os.chdir(here)
    fields |= {"output": str(here / "silent")}
    with all_output(here / "theirs.txt"):
        get_git_commit_hash()
    with all_output(here / "ours.txt"):
        print(on_a_rank(here, fields, of_one=True), flush=True)
    return [(here / name).read_text() for name in ("theirs.txt", "ours.txt")]


@contextlib.contextmanager
def all_output(path):
    """Write to a file what this process and its children print."""
    kept = [os.dup(number) for number in (1, 2)]
    with path.open("w") as file:
        for number in (1, 2):
            os.dup2(file.fileno(), number)
    try:
        yield
    finally:
        for number, before in zip((1, 2), kept, strict=True):
            os.dup2(before, number)
            os.close(before)


def test_saved_steps_are_measured_beside_the_run_once(inputs, here, pair, measured):
    run = tiny_run(inputs, here / "run", benchmark_interval=4)
    run.checkpoint = CheckpointConfig(save_interval=8, keep_last=1, export=False)
    first, second = pair.run(trained_and_followed, here, run, settings(here))[0]
    assert re.findall(r"^(.+): tiny_choice measured", first, re.M) == ["baseline", "step 4", "step 8"]
    assert re.findall(r"^(.+): tiny_choice measured", second, re.M) == ["step 8"]
    assert "another process writes there" in second and "waiting until it ends" in second
    scores = read_scores(here / "run" / "benchmarks" / "scores.json")
    assert list(scores.models) == ["baseline", "step 4", "step 8"]
    assert scores.models["baseline"] == f"Org/Baseline@{40 * '0'}"
    assert all(each.values.keys() == each.errors.keys() == scores.models.keys() for each in scores.scores)
    lines = [json.loads(line) for line in (here / "run" / "benchmarks.jsonl").read_text().splitlines()]
    assert [(line["step"], line["metric"]) for line in lines] == [(s, m) for s in (4, 8) for m in ("acc", "acc_norm")]
    assert lines[0]["value"] == scores.scores[0].values["step 4"]
    page = page_of(read_runs([str(here / "run")]), [])
    assert page.scores == {"run": scores}
    assert not list((here / "run" / "benchmarks" / "exported").iterdir())
    printed = pair.run(followed_by_other_tasks, here, run, settings(here))[0]
    assert (
        "step 4: the checkpoint is gone (checkpoint.keep_last), so it is not measured by tiny_perplexity; " in printed
    )
    scores = read_scores(here / "run" / "benchmarks" / "scores.json")
    measured_steps = {each.task: list(each.values) for each in scores.scores}
    assert measured_steps == {"tiny_choice": ["step 4", "step 8"], "tiny_perplexity": ["step 8"]}
    printed = pair.run(set_back_and_followed, here, run, settings(here))[0]
    for step in (4, 8):
        assert f"step {step}: its scores are of another checkpoint than the one that is saved now" in printed
    assert re.findall(r"^(.+): tiny_perplexity measured", printed, re.M) == ["step 4", "step 8"]
    again = read_scores(here / "run" / "benchmarks" / "scores.json")
    assert {each.task: list(each.values) for each in again.scores} == {"tiny_perplexity": ["step 4", "step 8"]}
    assert again.identities.keys() == {"step 4", "step 8"}
    assert again.identities["step 8"] != scores.identities["step 8"]
    assert again.scores[0].values["step 8"] != scores.scores[-1].values["step 8"]
    assert not list((here / "run" / "benchmarks" / "exported").iterdir())


def set_back_and_followed(here, run, fields):
    """Lose the checkpoints, train with another learning rate, and follow. An export of before is left."""
    if os.environ["RANK"] == "1":
        return None
    output = Path(run.output_dir)
    shutil.rmtree(output / "checkpoints")
    for name in ("step_00000008", ".step_00000008-0123456789abcdef.partial"):
        (output / "benchmarks" / "exported" / name).mkdir()
    run.optimizer.lr *= 2
    with alone():
        run_config(run)
    others = {"model": None, "baseline": None, "steps_of": run.output_dir, "output": None}
    return on_a_rank(here, fields | others | {"tasks": "tiny_perplexity"}, of_one=True)


def followed_by_other_tasks(here, run, fields):
    if os.environ["RANK"] == "1":
        return None
    others = {"model": None, "baseline": None, "steps_of": run.output_dir, "output": None}
    return on_a_rank(here, fields | others | {"tasks": "tiny_perplexity"}, of_one=True)


def trained_and_followed(here, run, fields):
    """Train and follow; lose step 4's checkpoint and step 8's results, and follow again. Return what is printed."""
    if os.environ["RANK"] == "1":
        return None
    with alone():
        run_config(run)
    others = {"model": None, "steps_of": run.output_dir, "tasks": "tiny_choice", "output": None}
    printed = [on_a_rank(here, fields | others, of_one=True)]
    saved = Path(run.output_dir, "checkpoints")
    assert {path.name for path in saved.iterdir()} == {"latest", "step_00000004", "step_00000008"}, (
        "one awaited, one last"
    )
    prune(saved / "step_00000008", keep_last=1, benchmark_interval=4)
    assert not (saved / "step_00000004").exists(), "it is measured"
    of_step_8 = read_scores(Path(run.output_dir, "benchmarks", "step_00000008.json")).identities["step 8"]
    for file in Path(run.output_dir, "benchmarks", "results").glob("*.json"):
        if json.loads(file.read_text())["model"] == of_step_8:
            file.unlink()
    lock = Path(run.output_dir, "benchmarks", "evaluate.lock")
    with subprocess.Popen([sys.executable, "-c", HOLD, str(lock)], stdout=subprocess.PIPE) as left_behind:
        assert left_behind.stdout.readline() == b"held\n"
        return [*printed, on_a_rank(here, fields | others, of_one=True)]


HOLD = """
import sys, time
from distill_nemo.runtime.output_lock import OutputLock
with OutputLock(__import__("pathlib").Path(sys.argv[1]), "output"):
    print("held", flush=True)
    time.sleep(1)
"""


def test_a_step_that_its_run_deletes_is_left_out_before_its_export_and_measured_from_then_on(
    inputs, here, pair, measured
):
    run = tiny_run(inputs, here / "deleting")
    run.checkpoint = CheckpointConfig(save_interval=2, keep_last=3, export=False)
    printed = pair.run(followed_while_steps_go, here, run, settings(here, baseline=None))[0]
    assert "step 4: the run has deleted its checkpoint (checkpoint.keep_last), so it is not measured; " in printed
    assert re.findall(r"^(.+): tiny_choice measured", printed, re.M) == ["step 6", "step 8"]
    assert [path.name for path in (here / "deleting" / "checkpoints").glob("step_*")] == ["step_00000008"]
    assert not list((here / "deleting" / "benchmarks" / "held").iterdir())


def followed_while_steps_go(here, run, fields):
    """Train, then follow on both ranks: step 4 goes before its files are linked, step 6 after."""
    from distill_nemo.benchmarks import follow

    linked = follow.linked

    def deleting(step, target):
        before, after = step.name == "step_00000004", step.name == "step_00000006"
        if before:
            delete(step)
        found = linked(step, target)
        if after:
            delete(step)
        return found

    if os.environ["RANK"] == "0":
        with alone():
            run_config(run)
    others = {"model": None, "steps_of": run.output_dir, "tasks": "tiny_choice", "output": None}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(follow, "linked", deleting)
        return on_a_rank(here, fields | others)
