"""What a user mistypes: an error in one screen that says what to type instead, and nothing is left behind.

Only the command line. What is wrong with a run: tests/unit/test_bad_input.py.
"""

import pytest

from tests.cli.command import TWO_RANKS, nemo, shrunk, together

LLAMA = ("train", "--factory", "llama32_3b_to_1b")
CASES = {
    "unknown recipe": (["train", "--factory", "lama32_3b_to_1b"], ["lama32_3b_to_1b", "mean llama32_3b_to_1b"]),
    "no recipe": (["train", *TWO_RANKS], ["--factory NAME", "llama32_3b_to_1b, quickstart"]),
    "unknown argument of a recipe": (["train", "--factory", "quickstart(stepz=3)"], ["stepz", "mean steps?"]),
    "value of a recipe": (["train", "--factory", "quickstart(steps=few)"], ["quickstart: steps must be int", "few"]),
    "unknown field": ([*LLAMA, "distillation.temprature=2"], ["distillation.temprature", "distillation.temperature"]),
    "type of a field": ([*LLAMA, "SHRUNK", "training.steps=many"], ['training.steps must be int, got "many"']),
    "list": ([*LLAMA, "SHRUNK", "data.train=corpus"], ["data.train must be list[str]", """'["a", "b"]'"""]),
    "unknown executor": ([*LLAMA, "run.executor=locl"], ['unknown executor "locl"', "mean local?"]),
    "unknown field of the executor": ([*LLAMA, "run.executor.proceses=2"], ["proceses", "mean processes?"]),
    "type of a field of the executor": ([*LLAMA, "run.executor.processes=two"], ["processes must be int", '"two"']),
    "no processes": ([*LLAMA, "run.executor.processes=0"], ["run.executor.processes must be at least 1, got 0"]),
    "unknown run.*": ([*LLAMA, "run.excutor=local"], ['unknown field "run.excutor"', "run.executor.FIELD"]),
    "no such teacher": (
        [*LLAMA, "SHRUNK", *TWO_RANKS, "teacher.checkpoint=/no/such"],
        ["teacher.checkpoint: checkpoint directory not found: /no/such"],
    ),
    "world size": (
        [*LLAMA, "SHRUNK", "run.executor.processes=3"],
        ["world size 3 is not divisible by", "2 x 1 x 1", "change the number of processes or parallelism"],
    ),
    "unknown command": (["trian"], ["trian", "mean 'train'?"]),
    "prepare": (["prepare", "inputs=text"], ["missing: output=, tokenizer=;", "nemo distill prepare --help"]),
    "export": (["export", "output=student"], ["missing: checkpoint=;", "nemo distill export --help"]),
    "evaluate": (["evaluate", "teacher=x"], ["missing: student=, data=;", "nemo distill evaluate --help"]),
    "evaluate nothing": (["evaluate", "student=x", "data=y", "samples=0"], ["samples must be at least 1, got 0"]),
    "quickstart": (["quickstart", "steps=0"], ["training.steps must be at least 1, got 0"]),
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
    assert result.err.startswith("error: ") or case == "unknown command"
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
