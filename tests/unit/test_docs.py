"""Run the Python snippets, and the commands `prepare`, `train` and `plan`, of README.md and docs/."""

import ast
import json
import re
import shlex
from pathlib import Path

import pytest

from tests.cli.command import nemo_here, nemo_home, shrunk
from tests.unit.data.chat_templates import MARKED

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
SNIPPET = r"^```python\n(.*?)^```"
COMMAND = r"^ *nemo distill (?:train|plan|prepare) (?:.*\\\n)*.*"


def found(pattern):
    """Return every match in the pages, named by its page."""
    return [
        pytest.param(match[1] if match.re.groups else match[0], id=f"{page.name}-{number}")
        for page in PAGES
        for number, match in enumerate(re.finditer(pattern, page.read_text(), re.M | re.S * (pattern is SNIPPET)))
    ]


@pytest.fixture
def with_small_models(inputs, tmp_path, monkeypatch, empty_stdin):
    """Change to a directory like that of the examples. Return what replaces their models by small ones."""
    nemo_home(monkeypatch, tmp_path / "nemo")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.jsonl").write_text(json.dumps({"text": "Call me Ishmael. " * 99}) + "\n")
    (tmp_path / "chats").mkdir()
    turns = [{"role": "user", "content": "Who are you?"}, {"role": "assistant", "content": "Ishmael."}]
    (tmp_path / "chats" / "a.jsonl").write_text(json.dumps({"messages": turns}) + "\n")
    (tmp_path / "chat.jinja").write_text(MARKED)  # the small models' tokenizer has no template
    (tmp_path / "runs" / "quickstart").mkdir(parents=True)
    (tmp_path / "runs" / "quickstart" / "student").symlink_to(inputs / "student")
    small = {r"/\w+/Llama-3.2-3B\b": inputs / "teacher", r"/\w+/Llama-3.2-1B\b": inputs / "student"}

    def replaced(text):
        for pattern, path in small.items():
            text = re.sub(pattern, str(path), text)
        return text

    return replaced


@pytest.mark.parametrize("snippet", found(SNIPPET))
def test_python_snippets_of_the_docs_run(with_small_models, snippet):
    """Snippets run as printed, except that launches are dry runs."""
    tree = ast.parse(with_small_models(snippet))
    for call in ast.walk(tree):
        if isinstance(call, ast.Call) and ast.unparse(call.func) == "run.run":
            call.keywords.append(ast.keyword("dryrun", ast.Constant(True)))
    exec(compile(ast.fix_missing_locations(tree), "snippet", "exec"), {"__name__": "__main__"})


@pytest.mark.parametrize("command", found(COMMAND))
def test_commands_of_the_docs_run(with_small_models, inputs, capfd, monkeypatch, command):
    """Commands run as printed, on small models in one layout; `train` is a dry run."""
    monkeypatch.setenv("HF_TOKEN", "hf_0")  # no dry run uses it
    arguments = shlex.split(with_small_models(command).replace("\\\n", " ").replace(" ... ", " "), comments=True)[2:]
    if arguments[0] == "prepare":
        arguments.append(f"tokenizer={inputs}/tokenizer")
        arguments += ["chat_template=chat.jinja"] * any("chats/" in argument for argument in arguments)
    else:
        layout = {"parallelism__tensor_model_parallel_size": 1, "parallelism__sequence_parallel": "false"}
        arguments += shrunk(inputs, training__global_batch_size=16, **layout)
        arguments += ["--dryrun"] * (arguments[0] == "train" and "--dryrun" not in arguments)
    ended = nemo_here(capfd, *arguments)
    assert ended.code == 0, ended.err
