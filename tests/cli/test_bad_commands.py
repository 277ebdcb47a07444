"""What a user mistypes: an error in one screen that says what to type instead, and nothing is left behind.

Only the command line. What is wrong with a run: tests/unit/test_bad_input.py.
"""

import pytest

from tests.cli.command import TWO_RANKS, nemo, shrunk, the_recipes, together

LLAMA = ("train", "--factory", "llama32_3b_to_1b")
CASES = {
    "recipe": (["train", "--factory", "lama32_3b_to_1b"], ["lama32_3b_to_1b", "mean llama32_3b_to_1b"]),
    "field": ([*LLAMA, "distillation.temprature=2"], ["distillation.temprature", "distillation.temperature"]),
    "executor": ([*LLAMA, "run.executor.processes=two"], ["run.executor.processes must be int", '"two"']),
    "no such teacher": (
        [*LLAMA, "SHRUNK", *TWO_RANKS, "teacher.checkpoint=/no/such"],
        ["teacher.checkpoint: checkpoint directory not found: /no/such"],
    ),
    "world size": (
        [*LLAMA, "SHRUNK", "run.executor.processes=3"],
        ["world size 3 is not divisible by", "2 x 1 x 1", "change the number of processes or parallelism"],
    ),
    "command": (["trian"], ["trian", "mean 'train'?"]),
    "prepare": (["prepare", "inputs=text"], ["missing: output=, tokenizer=;", "nemo distill prepare --help"]),
    "export": (["export", "output=student"], ["missing: checkpoint=;", "nemo distill export --help"]),
    "evaluate": (["evaluate", "teacher=x"], ["missing: student=, data=;", "nemo distill evaluate --help"]),
    "evaluate nothing": (["evaluate", "student=x", "data=y", "samples=0"], ["samples must be at least 1, got 0"]),
}


@pytest.fixture(scope="module")
def ended(inputs, tmp_path_factory):
    """By case: the directory it ran in, and what it printed."""
    directories = {case: tmp_path_factory.mktemp("bad") for case in CASES}

    def run(case):
        words = [part for word in CASES[case][0] for part in (shrunk(inputs) if word == "SHRUNK" else [word])]
        return nemo(*words, cwd=directories[case])

    results = together(*(lambda case=case: run(case) for case in CASES))
    return {case: (directories[case], result) for case, result in zip(CASES, results, strict=True)}


@pytest.mark.parametrize("case", CASES)
def test_one_error_that_says_what_to_type_and_nothing_left_behind(ended, case):
    cwd, result = ended[case]
    assert result.code in (1, 2) and result.out == ""
    assert all(words in result.err for words in CASES[case][1]), result.err
    assert len(result.err.splitlines()) <= 6 and "Traceback" not in result.err
    assert result.err.startswith("error: ") or case == "command"
    assert {path.name for path in cwd.iterdir()} <= {"home"}
    assert not list(cwd.glob("home/nemo/experiments/*"))


def test_dryrun_shows_what_would_run_and_leaves_nothing_behind(inputs, tmp_path):
    words = [*shrunk(inputs, distillation__temperature=3.5), *TWO_RANKS]
    one, all_stages = together(
        lambda: nemo(*LLAMA, "--dryrun", *words, cwd=tmp_path),
        lambda: nemo("quickstart", "--dryrun", "steps=7", cwd=tmp_path),
    )
    assert (one.code, one.err, all_stages.code, all_stages.err) == (0, "", 0, "")
    for words in ("temperature=3.5", "runs/llama32_3b_to_1b", "sequence_parallel=True", "ntasks_per_node=2"):
        assert words in one.out
    assert all_stages.out.count("steps=7") == 2 and "runs/quickstart/distilled" in all_stages.out
    assert {path.name for path in tmp_path.iterdir()} <= {"home"}
    assert not list(tmp_path.glob("home/nemo/experiments/*"))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "name a recipe: --factory NAME. Known: llama32_3b_to_1b, quickstart"),
        (["--factory", "quickstart(stepz=3)"], 'recipe quickstart has no argument "stepz". Did you mean steps?'),
        (["--factory", "quickstart(steps=few)"], 'recipe quickstart: steps must be int, got "few"'),
        (["training.steps=many"], 'training.steps must be int, got "many"'),
        (["data.train=corpus"], """data.train must be list[str], such as '["a", "b"]', got "corpus\""""),
        (["corpus"], '"corpus" is not FIELD=VALUE; see `nemo distill train --help`'),
        (["teacher=/models/Llama"], "teacher is a section"),
        (["run.executor=locl"], 'run.executor: unknown executor "locl". Did you mean local?'),
        (["run.executor.proceses=2"], 'unknown field "run.executor.proceses". Did you mean processes?'),
        (["run.executor.processes=0"], "run.executor.processes must be at least 1, got 0"),
        (["run.executor=local(processes=2)"], "Write run.executor=local run.executor.FIELD=VALUE."),
        (["run.excutor=local"], 'unknown field "run.excutor". Known: run.executor, run.executor.FIELD'),
        (["run.plugins=pluggin"], "run.plugins: Plugin pluggin not found"),
    ],
)
def test_more_of_them_in_this_process(capfd, words, said):
    the_recipes()
    from distill_nemo.cli import TrainContext
    from distill_nemo.training.entry import distill

    factory, *others = words[1:] if words[:1] == ["--factory"] else ("quickstart", *words)
    with pytest.raises(SystemExit) as ended:
        TrainContext(name="train", factory=factory if words else None).cli_execute(distill, others)
    out, err = capfd.readouterr()
    assert ended.value.code == 1 and out == ""
    assert err.startswith("error: ") and said in err and len(err.splitlines()) == 1


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"direct": True}, "--direct is not supported"),
        ({"yaml": "x"}, "--yaml is not supported. Every run writes its complete config to <output_dir>/config.yaml"),
        ({"name": "a/b"}, '--name must be letters, digits, ".", "_" or "-", got "a/b"'),
    ],
)
def test_options_of_nemo_run_that_no_run_of_ours_can_have(capfd, options, said):
    the_recipes()
    from distill_nemo.cli import TrainContext
    from distill_nemo.training.entry import distill

    with pytest.raises(SystemExit):
        TrainContext(**{"name": "train", "factory": "quickstart"} | options).cli_execute(distill, [])
    assert capfd.readouterr().err.startswith(f"error: {said}")


def test_quickstart_refuses_before_it_makes_a_corpus(capfd, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    the_recipes()
    from distill_nemo.cli import TrainContext
    from recipes.quickstart import run_quickstart

    with pytest.raises(SystemExit):
        TrainContext(name="quickstart").cli_execute(run_quickstart, ["steps=0"], "experiment")
    assert capfd.readouterr() == ("", "error: training.steps must be at least 1, got 0\n")
    assert not list(tmp_path.iterdir())
