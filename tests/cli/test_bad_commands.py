"""Mistyped commands: a short error says what to type instead, and nothing is left behind.

For mistakes in a run's config see tests/unit/training/test_bad_input.py.
"""

import pytest

from distill_nemo.config_files import save_yaml
from distill_nemo.executors import run_config_of
from recipes.quickstart import quickstart_teacher
from tests.cli.command import TWO_RANKS, nemo, nemo_here, nemo_home, shrunk, together

LLAMA = ("train", "--factory", "llama32_3b_to_1b")
CASES = {
    "field": ([*LLAMA, "distillation.temprature=2"], ["distillation.temprature", "distillation.temperature"]),
    "command": (["trian"], ["trian", "mean 'train'?"]),
}


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    """Return, by case, the directory of a command and its output."""
    directories = {case: tmp_path_factory.mktemp("bad") for case in CASES}
    results = together(*(lambda case=case: nemo(*CASES[case][0], cwd=directories[case]) for case in CASES))
    return {case: (directories[case], result) for case, result in zip(CASES, results, strict=True)}


@pytest.mark.parametrize("case", CASES)
def test_one_error_that_says_what_to_type_and_nothing_left_behind(ended, case):
    cwd, result = ended[case]
    assert result.code in (1, 2) and result.out == ""
    assert all(arguments in result.err for arguments in CASES[case][1]), result.err
    assert len(result.err.splitlines()) <= 6 and "Traceback" not in result.err
    assert result.err.startswith("error: ") or case == "command"
    assert {path.name for path in cwd.iterdir()} <= {"home"}
    assert not list(cwd.glob("home/nemo/experiments/*"))


@pytest.fixture
def here(capfd, empty_stdin, tmp_path, monkeypatch):
    """Return a function that runs a command in this process and in an empty directory."""
    monkeypatch.chdir(tmp_path)
    nemo_home(monkeypatch, tmp_path / "home" / "nemo")
    return lambda *arguments: nemo_here(capfd, *arguments)


def test_dryrun_shows_what_would_run_and_leaves_nothing_behind(inputs, tmp_path, here):
    one = here(*LLAMA, "--dryrun", *shrunk(inputs, distillation__temperature=3.5), *TWO_RANKS)
    all_stages = here("quickstart", "--dryrun", "steps=7")
    assert (one.code, one.err, all_stages.code, all_stages.err) == (0, "", 0, "")
    for arguments in ("temperature=3.5", "runs/llama32_3b_to_1b", "sequence_parallel=True", "ntasks_per_node=2"):
        assert arguments in one.out
    assert all_stages.out.count("steps=7") == 2 and "runs/quickstart/distilled" in all_stages.out
    assert {path.name for path in tmp_path.iterdir()} <= {"home"}
    assert not list(tmp_path.glob("home/nemo/experiments/*"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([*TWO_RANKS, "teacher.checkpoint=/no/such"], "teacher.checkpoint: checkpoint directory not found: /no/such"),
        (["run.executor.processes=3"], "2 x 1 x 1 = 2; change the number of processes or parallelism"),
    ],
)
def test_a_run_that_cannot_start_leaves_nothing_behind(inputs, tmp_path, here, arguments, message):
    result = here(*LLAMA, *shrunk(inputs), *arguments)
    assert (result.code, result.out) == (1, "")
    assert result.err.startswith("error: ") and message in result.err and len(result.err.splitlines()) == 1
    assert {path.name for path in tmp_path.iterdir()} <= {"home"}
    assert not list(tmp_path.glob("home/nemo/experiments/*"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "name a recipe, as the first argument or by --factory; `nemo distill recipes` lists them"),
        (["quickstart(stepz=3)"], 'recipe quickstart has no argument "stepz". Did you mean steps?'),
        (["--dry-run", *LLAMA[1:]], '"--dry-run" is not FIELD=VALUE; see `nemo distill train --help`'),
        (["lama32_3b_to_1b"], 'unknown recipe "lama32_3b_to_1b". Did you mean llama32_3b_to_1b'),
        (
            ["qwen3"],
            "Did you mean qwen3_32b_to_8b or qwen3_32b_to_4b or qwen3_8b_to_1p7b? `nemo distill recipes` lists",
        ),
        (["--factory", "lama32_3b_to_1b"], 'unknown recipe "lama32_3b_to_1b". Did you mean llama32_3b_to_1b'),
        (["--factory", "quickstart(stepz=3)"], 'recipe quickstart has no argument "stepz". Did you mean steps?'),
        (["--factory", "quickstart(steps=few)"], "recipe quickstart: steps must be int, got 'few'"),
        ([*LLAMA[1:], "training.steps=many"], "training.steps must be int, got 'many'"),
        ([*LLAMA[1:], "data.train=corpus"], """data.train must be list[str], such as '["a", "b"]', got 'corpus'"""),
        ([*LLAMA[1:], "corpus"], '"corpus" is not FIELD=VALUE; see `nemo distill train --help`'),
        ([*LLAMA[1:], "teacher=/models/Llama"], "teacher is a section"),
        ([*LLAMA[1:], "run.executor=locl"], 'run.executor: unknown executor "locl". Did you mean local?'),
        ([*LLAMA[1:], "run.executor.proceses=2"], 'unknown field "run.executor.proceses". Did you mean processes?'),
        ([*LLAMA[1:], "run.executor.processes=two"], "run.executor.processes must be int, got 'two'"),
        ([*LLAMA[1:], "run.executor.processes=0"], "run.executor.processes must be at least 1, got 0"),
        ([*LLAMA[1:], "run.executor=local(processes=2)"], "Write run.executor=local run.executor.FIELD=VALUE."),
        ([*LLAMA[1:], "run.excutor=local"], 'unknown field "run.excutor". Known: run.executor, run.executor.FIELD'),
        ([*LLAMA[1:], "run.executor.nodes=2"], "run.executor.nodes = 2: the local executor has one node"),
        ([*LLAMA[1:], "run.executor="], "run.executor has no value"),
        ([*LLAMA[1:], "run.plugins=pluggin"], "run.plugins: Plugin pluggin not found"),
        ([*LLAMA[1:], "--direct"], "--direct is not supported"),
        ([*LLAMA[1:], "--yaml", "x.yaml"], "--yaml is not supported. Every run writes its complete config to"),
        ([*LLAMA[1:], "--name", ""], "--name is empty"),
        *(
            ([*LLAMA[1:], "--name", name], f'the first a letter, digit or "_", got "{name}"')
            for name in ("a/b", "ü1", ".", "..", "-a", ".a", " ", "a b", "a$(b)", "a`b`", "a;b", '"a"', "a" * 65)
        ),
    ],
)
def test_more_of_them_in_this_process(capfd, arguments, message):
    result = nemo_here(capfd, "train", *arguments)
    assert (result.code, result.out) == (1, "")
    assert result.err.startswith("error: ") and message in result.err and len(result.err.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["prepare", "inputs=text"], "missing: output=, tokenizer=; see `nemo distill prepare --help`"),
        (["export", "output=student"], "missing: checkpoint=; see `nemo distill export --help`"),
        (["convert", "checkpoint=x", "output="], "missing: output=; see `nemo distill convert --help`"),
        (["prune", "model=x", "output=y"], "missing: data=; see `nemo distill prune --help`"),
        (["prune", "model=x", "output=y", "data=z", "samples=0"], "samples must be at least 1, got 0"),
        (["prune", "model=x", "output=y", "data=z"], "nothing says how small the model becomes: state some of num_la"),
        (["evaluate", "data=x"], "name one of these: a model with model=, or with steps_of= the output_dir of a run"),
        (["evaluate", "steps_of=x", "tasks=y", "data=z"], "steps_of measures by tasks, in x/benchmarks; leave data= o"),
        (["evaluate", "model=x", "data=y", "samples=0"], "samples must be at least 1, got 0"),
        (["evaluate", "model=x", "teacher=y"], "nothing says what to measure: name held-out token files with data="),
        (["evaluate", "model=x", "tasks=mmlu"], "tasks needs output=, a directory for the results, from which the sam"),
        (["evaluate", "model=x", "tasks=mmlu", "output=y"], "checkpoint directory not found: x"),
        (["recipes", "all=1"], 'unknown field "all". Known: names. See `nemo distill recipes --help`'),
        (["quickstart", "steps=0"], "training.steps must be at least 1, got 0"),
        (["quickstart", "stepz=3"], 'unknown field "stepz". Did you mean steps?'),
    ],
)
def test_commands_beside_train_refuse_bad_words(capfd, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    result = nemo_here(capfd, *arguments)
    assert (result.code, result.out) == (1, "")
    assert result.err.startswith(f"error: {message}") and len(result.err.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_a_finished_quickstart_keeps_its_teacher(capfd, tmp_path, monkeypatch):
    """A teacher that is trained further is another one, from which the finished student could not be resumed."""
    monkeypatch.chdir(tmp_path)
    recipe = quickstart_teacher(steps=240, root="runs")
    (tmp_path / "runs" / "teacher").mkdir(parents=True)
    (tmp_path / "runs" / "distilled").mkdir()
    save_yaml(run_config_of(recipe), tmp_path / "runs" / "teacher" / "config.yaml")
    result = nemo_here(capfd, "quickstart", "--yes", "teacher_steps=300", "root=runs")
    assert (result.code, result.out) == (1, "")
    assert result.err.startswith("error: teacher_steps = 300: the student in runs learns from a teacher of 240 steps")


@pytest.mark.parametrize(
    ("home", "message"),
    [
        ("/proc/nowhere/.nemo_run", "which cannot be made: No such file or directory"),
        ("file/.nemo_run", "which cannot be made: Not a directory"),
        ("a b", "which has characters that NeMo-Run does not quote"),
        ("a$(b)", "which has characters that NeMo-Run does not quote"),
    ],
)
def test_a_home_that_nemo_run_cannot_use_is_refused_and_the_way_out_is_named(
    capfd, tmp_path, monkeypatch, home, message
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    nemo_home(monkeypatch, tmp_path / home)
    result = nemo_here(capfd, "quickstart", "--yes")
    assert (result.code, result.out) == (1, "")
    assert result.err.startswith("error: NeMo-Run keeps its records in ") and message in result.err
    assert result.err.endswith("set NEMORUN_HOME to another directory\n") and len(result.err.splitlines()) == 1
