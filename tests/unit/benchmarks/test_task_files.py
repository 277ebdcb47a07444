"""Tasks from disk that are, or fetch, code."""

import pytest

from distill_nemo.benchmarks.task_files import check_task_files, digest

METRICS = {"acc", "exact_match"}
FINE = """\
task: fine
dataset_path: json
dataset_kwargs: {data_files: {test: questions.jsonl}}
doc_to_choice: ["yes", 'no']
metric_list: [{metric: acc, aggregation: mean}]
"""


def write(directory, **files):
    for name, text in files.items():
        path = directory / f"{name}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return directory


def test_plain_tasks_pass(tmp_path):
    check_task_files(
        write(tmp_path, fine=FINE, group="group: g\ntask: [fine, {task: other, num_fewshot: 2}]\n"), METRICS
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("process_docs: !function utils.f", "bad.yaml line 1: !function utils.f runs Python code"),
        ("task: !!python/name:os.system", "line 1: tag:yaml.org,2002:python/name:os.system runs"),
        ("%TAG ! !fun\n---\na: !ction os.system", "line 3: !function os.system runs Python code"),
        (
            "group: g\ntask: [{task: a, metric_list: [{metric: meteor}]}]",
            "has metric: meteor, which lm-evaluation-",
        ),
        ("metric_list: [{metric: acc, hf_evaluate: true}]", "has hf_evaluate: True, which downloads a metric and runs"),
        ("dataset_kwargs: {trust_remote_code: true}", "has trust_remote_code: True, which lets a data set run code"),
        ("unsafe_code: true", "has unsafe_code: True, which runs what a model writes"),
        ("use_prompt: 'promptsource:*'", "has use_prompt: promptsource:*, which takes prompts from elsewhere"),
        ("dataset_path: pandas", "has dataset_path: pandas; data are json, csv, parquet, arrow, text, or OWNER/NAME"),
    ],
)
def test_what_runs_code_is_refused_by_name_with_the_way_out(tmp_path, text, message):
    with pytest.raises(ValueError) as error:
        check_task_files(write(tmp_path, fine=FINE, bad=text), METRICS)
    assert message in str(error.value) and str(error.value).startswith(f"include_path: {tmp_path}/bad.yaml ")
    assert str(error.value).endswith(f"; allow_code=true, if you trust all that is in {tmp_path}")


def test_included_files_are_read_wherever_they_are(tmp_path):
    write(tmp_path / "tasks", fine=FINE + "include: [../elsewhere.yaml, fine.yaml]\n")
    write(tmp_path, elsewhere="include: more.yml\n")
    (tmp_path / "more.yml").write_text("process_results: !function utils.f\n")
    with pytest.raises(ValueError, match=r"more.yml line 1: !function"):
        check_task_files(tmp_path / "tasks", METRICS)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a", "must hold the fields of a task, got list"),
        ("a: [", "cannot be read: while parsing"),
        ("include: gone.yaml", "gone.yaml cannot be read: "),
        ("a: " + 2**20 * "b", "has more than 1,048,576 bytes"),
        ("[" * 5000, "cannot be read: "),
    ],
)
def test_what_is_no_task_is_refused(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        check_task_files(write(tmp_path, bad=text), METRICS)


def test_aliases_are_read_once(tmp_path):
    levels = "".join(f"l{n}: &l{n} [{', '.join(9 * [f'*l{n - 1}'])}]\n" for n in range(1, 30))
    check_task_files(write(tmp_path, fine=f"l0: &l0 [a]\n{levels}task: &t {{again: *t}}\n"), METRICS)


def test_an_empty_directory_is_refused(tmp_path):
    with pytest.raises(ValueError, match="has no tasks: expected"):
        check_task_files(tmp_path, METRICS)


def test_results_are_of_these_tasks_and_data(tmp_path):
    """A change of either measures again."""
    data = tmp_path / "questions.jsonl"
    data.write_text("{}\n")
    write(tmp_path, fine=FINE.replace("questions.jsonl", str(data)))
    (tmp_path / "utils.py").write_text("")
    found = [digest(tmp_path, False)]
    data.write_text("{}\n{}\n")
    found.append(digest(tmp_path, False))
    (tmp_path / "utils.py").write_text("x = 1")
    assert digest(tmp_path, False) == found[-1]
    found.append(digest(tmp_path, True))
    write(tmp_path, other=FINE)
    found.append(digest(tmp_path, False))
    assert len(set(found)) == 4


@pytest.mark.parametrize(
    "fields",
    [
        "dataset_path: {data}",
        "dataset_path: json\ndataset_kwargs: {{data_dir: {data}}}",
        "dataset_path: json\ndataset_kwargs: {{data_files: '{data}/**/*.jsonl'}}",
        "dataset_path: json\ndataset_kwargs: {{data_files: {{test: [{data}/part/questions.jsonl]}}}}",
    ],
)
def test_results_are_of_the_data_in_a_directory_or_of_a_pattern(tmp_path, fields):
    data = tmp_path / "data" / "part" / "questions.jsonl"
    data.parent.mkdir(parents=True)
    data.write_text("{}\n")
    write(tmp_path / "tasks", fine="task: fine\n" + fields.format(data=tmp_path / "data"))
    before = digest(tmp_path / "tasks", False)
    assert digest(tmp_path / "tasks", False) == before
    data.write_text("{}\n{}\n")
    assert digest(tmp_path / "tasks", False) != before
