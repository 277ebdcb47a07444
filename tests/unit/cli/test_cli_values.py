"""FIELD=VALUE: every command takes the value as typed, for every type."""

from typing import Any, Literal

import nemo_run as run
import pytest
from nemo_run.cli.cli_parser import parse_value

from distill_nemo.cli.arguments import called_recipe, parse_arguments, split_run_arguments
from distill_nemo.cli.commands import evaluate, export, prepare
from distill_nemo.cli.launch import parse_executor, set_field
from distill_nemo.cli.plan import plan
from distill_nemo.cli.values import parse
from distill_nemo.training.entry import distill

TEXTS = [
    'say "hi"',
    '"q" is first',
    '"a" and "b"',
    "it's",
    "say 'hi'",
    '"',
    "'",
    "\"'",
    "a\\",
    'a\\"',
    "  a  ",
    "two\nlines",
    "{}",
    '{"k": "v"}',
    "[1, 2]",
    "Config[os.path]",
    "Partial",
    "<Config>",
    "run.executor.x",
    "=",
    "ü 語",
    "$(touch x) `y` ; z",
    "#",
]


@pytest.mark.parametrize("text", TEXTS)
def test_a_text_is_as_typed_wherever_it_stands(text):
    listed = repr([text, text])
    assert parse("f", text, str) == parse("f", text, str | None) == text
    assert parse("f", listed, list[str]) == parse("f", listed, list[str] | None) == [text, text]
    assert parse("f", repr({text: text}), dict[str, str]) == {text: text}
    assert parse("f", repr({"a": [text]}), dict[str, Any]) == {"a": [text]}
    assert parse("f", repr([{"a": text}]), list[dict[str, Any]] | None) == [{"a": text}]


@pytest.mark.parametrize("text", TEXTS)
def test_a_text_is_as_typed_in_every_command(text):
    def given(function, argument):
        return list(parse_arguments(function, [argument], "train").values())

    for function, field in (
        (distill, "output_dir"),
        (distill, "teacher.checkpoint"),
        (distill, "student.checkpoint"),
        (distill, "data.tokenizer"),
        (prepare, "inputs"),
        (prepare, "tokenizer"),
        (export, "checkpoint"),
        (evaluate, "data"),
        (plan, "gpu"),
    ):
        assert given(function, f"{field}={text}") == [text], field
    assert given(distill, f"data.train={[text]!r}") == [[text]]


@pytest.mark.parametrize("text", TEXTS)
def test_a_text_is_as_typed_in_an_executor(text):
    ours, others = split_run_arguments(
        ["run.executor=slurm", f"run.executor.comment={text}", f"run.executor.setup={[text]!r}", f"output_dir={text}"]
    )
    config = parse_executor(str(ours.executor), ours.of_executor)
    assert config.comment == text and text in config.setup_lines
    assert others == [f"output_dir={text}"]
    pods = parse_executor("kubernetes", ["image=x", f"annotations={ {'a': text}!r}", f"volumes={[{'name': text}]!r}"])
    assert (pods.annotations, pods.volumes) == ({"a": text}, [{"name": text}])


@pytest.mark.parametrize("text", [text for text in TEXTS if "\\" not in text])
def test_a_text_is_as_typed_in_a_recipes_own_arguments(text):
    def recipe(teacher: str = "", steps: int = 0, texts: list[str] | None = None):
        return teacher, steps, texts

    pair = '"' if '"' not in text else "'"
    if pair not in text and "\n" not in text:
        assert called_recipe(f"recipe(teacher={pair}{text}{pair}, steps=3)", {"recipe": recipe}) == (text, 3, None)
    assert called_recipe(f"recipe(texts={[text, ',b=1']!r})", {"recipe": recipe}) == ("", 0, [text, ",b=1"])


@pytest.mark.parametrize(
    "called",
    ["r(a=/models/x, n=2)", 'r(a="/models/x", n=2)', "r(n=2,a='/models/x')", "r( a = /models/x , n = 2 )"],
)
def test_a_recipes_arguments_need_not_be_python(called):
    def r(a: str, n: int):
        return a, n

    assert called_recipe(called, {"r": r}) == ("/models/x", 2)


@pytest.mark.parametrize(
    ("called", "error"),
    [
        ("r(1)", "must be NAME=VALUE"),
        ("r(a=1, b=2)", 'no argument "b"'),
        ("r(", "a recipe is NAME"),
        ("r()", "missing: a="),
        ("os.path.nothing", "recipe os.path.nothing: KeyError"),
        ("no.module", "recipe no.module: ModuleNotFoundError"),
    ],
)
def test_a_recipe_that_cannot_be_called_is_refused(called, error):
    def r(a: str):
        return a

    with pytest.raises(ValueError, match=error):
        called_recipe(called, {"r": r})


@pytest.mark.parametrize(
    ("text", "hint", "value"),
    [
        ('"quoted"', str, "quoted"),
        ("'quoted'", str, "quoted"),
        ('"3"', int, 3),
        ("[30, 'a', 1.10, -2]", list[str], ["30", "a", "1.10", "-2"]),
        ("['1', 2]", list[int], [1, 2]),
        ("1e-4", float, 1e-4),
        ("Yes", bool, True),
        ("off", bool | None, False),
        ("None", str | None, None),
        ("null", list[str] | None, None),
        ("b", Literal["a", "b"], "b"),
        ("3", int | None, 3),
    ],
)
def test_a_value_is_parsed_by_the_type_of_its_field(text, hint, value):
    assert parse("f", text, hint) == value


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("two", int),
        ("1.5", int),
        ("", float),
        ("maybe", bool),
        ("a", list[str]),
        ("[a]", list[str]),
        ("[None]", list[str]),
        ("[['a']]", list[str]),
        ("[f'{a}']", list[str]),
        ("[x for x in '']", list[str]),
        ("{'a': 1", dict[str, str]),
        ("{**{}}", dict[str, str]),
        ("{'a': 1, 'a': 2}", dict[str, str]),
        ("{1: 2, '1': 3}", dict[str, Any]),
        ("[" * 5000, list[str]),
        ("[" + "-" * 100_000 + "1]", list[str]),
        ("a\0", list[str]),
    ],
)
def test_what_does_not_fit_is_refused_by_name(text, hint):
    with pytest.raises(ValueError, match=r"^data\.train must be .*, got "):
        parse("data.train", text, hint)
    with pytest.raises(ValueError, match=r'^training.dtype = "c" is not known. Known: a, b.$'):
        parse("training.dtype", "c", Literal["a", "b"])


def test_two_fields_of_one_text_share_no_list():
    assert parse("a", "['x']", list[str]) is not parse("b", "['x']", list[str])


def test_a_plugins_field_is_as_typed():
    class Noted(run.Plugin):
        def __init__(self, note: str = ""):
            self.note = note

    config = run.Config(Noted)
    set_field("run.plugins", config, "note", 'say "hi"')
    assert config.note == 'say "hi"'
    with pytest.raises(ValueError, match=r'unknown field "run\.plugins\.nte"\. Did you mean note\?'):
        set_field("run.plugins", config, "nte", "x")


def test_nemo_runs_own_parser_still_loses_quotes():
    """If this fails, `cli/values.py` can go: NeMo-Run then takes texts as typed."""
    assert parse_value('say "hi"', str) == 'say "hi'
    assert parse_value("""['echo "a"']""", list[str]) == ['echo "a']
    assert parse_value("""{"A": 'say "hi"'}""", dict[str, str]) == {"A": 'say "hi'}
