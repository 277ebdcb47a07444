"""The report: numbers, finding, plots and page. It does not import torch."""

import base64
import io
import math
import subprocess
import sys
from html.parser import HTMLParser

import pytest
from rich.console import Console

from distill_nemo.reports import metrics_file, plots
from distill_nemo.reports.comparison import COLUMNS, best, count, finding, four_digits, percent
from distill_nemo.reports.page import render_table, write_report

NAN = float("nan")


def row(model, lm_loss, forward_kl=0.5, top1_agreement=0.5, parameters=918_784):
    perplexity = math.exp(lm_loss) if lm_loss is not None and lm_loss < 700 else lm_loss
    named = {"model": model, "parameters": parameters, "lm_loss": lm_loss, "perplexity": perplexity}
    return {**named, "forward_kl": forward_kl, "top1_agreement": top1_agreement}


def table(teacher=3.978, alone=4.716, distilled=4.195):
    return [
        row("teacher", teacher, 2e-9, 1.0, 4_198_656),
        row("initial student", 7.6712, 3.1, 0.012),
        row("student alone", alone, 0.621, 0.436),
        row("distilled student", distilled, 0.1502, 0.701),
    ]


def write_run(path, evaluations, train=(), tokens=2048):
    """Write a metrics file like the loop's, with `evaluations` {step: metrics} and `train` losses of steps 1, 2, ..."""
    for step, metrics in evaluations.items():
        metrics_file.append(path, {"kind": "eval", "step": step, **metrics, "tokens": step * tokens})
    for step, loss in enumerate(train, 1):
        line = {"lm_loss": loss, "lr": 1e-3, "grad_norm": 1.0, "seconds": 0.5, "tokens": step * tokens}
        metrics_file.append(path, {"kind": "train", "step": step, **line, "tokens_per_second": tokens / 0.5})
    return path


@pytest.fixture
def runs(tmp_path):
    kd = {"teacher_lm_loss": 3.978, "top1_agreement": 0.7}
    held_out = {0: {"lm_loss": 7.6, "forward_kl": 3.1, **kd}, 4: {"lm_loss": 4.195, "forward_kl": 0.15, **kd}}
    return {
        "teacher": write_run(tmp_path / "t.jsonl", {0: {"lm_loss": 7.7}, 8: {"lm_loss": 3.978}}, [7.5, 6.0] * 4),
        "alone": write_run(tmp_path / "a.jsonl", {0: {"lm_loss": 7.6}, 4: {"lm_loss": 4.716}}, [7.5, 6.5, 5.5, 4.8]),
        "distilled": write_run(tmp_path / "d.jsonl", held_out, [7.4, 6.2, 5.1, 4.3]),
    }


class Page(HTMLParser):
    """Contents of a page as a browser shows them."""

    def __init__(self, path):
        super().__init__()
        self.tags, self.attributes, self.text = [], [], ""
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data):
        self.text += data if self.tags[-1:] != ["style"] else ""

    def handle_endtag(self, tag):
        self.text += " " if tag in ("th", "td", "dt", "dd") else ""


@pytest.mark.parametrize(
    ("form", "value", "text"),
    [
        (four_digits, 0.15021, "0.1502"),
        (four_digits, 4.2, "4.200"),
        (four_digits, 66.4312, "66.43"),
        (four_digits, 999.96, "1000"),
        (four_digits, 2147.3, "2,147"),
        (four_digits, 1.2e30, "1e30"),
        (four_digits, math.inf, "inf"),
        (four_digits, 3e-9, "0"),
        (four_digits, NAN, "–"),
        (four_digits, None, "–"),
        (count, 918_784, "919 K"),
        (count, 1_236_000, "1.2 M"),
        (count, 999_990, "1.0 M"),
        (count, 134_515_008, "135 M"),
        (count, 8_030_261_248, "8.0 B"),
        (count, 950, "950"),
        (count, None, "–"),
        (percent, 0.701, "70.1 %"),
        (percent, NAN, "–"),
    ],
)
def test_numbers_are_formatted_for_reading(form, value, text):
    assert form(value) == text


@pytest.mark.parametrize(
    ("losses", "sentence"),
    [
        ({}, "closes 71 % of the gap in held-out LM loss between student alone (4.716) and teacher (3.978)"),
        ({"distilled": 4.80}, "Distillation loses: in held-out LM loss distilled student (4.800) is worse than"),
        ({"distilled": 4.7159}, "makes no difference"),
        ({"distilled": 4.7150}, "less than 1 %"),
        ({"distilled": 3.9785}, "closes 99 %"),
        ({"distilled": 3.90}, "closes the whole gap"),
        ({"teacher": 5.0}, "with no gap to close"),
        ({"distilled": NAN}, "No finite held-out LM loss: distilled student. Lowest of the students: student alone"),
        ({"distilled": NAN, "alone": None}, "Lowest of the students: initial student"),
    ],
)
def test_the_finding_says_who_won(losses, sentence):
    assert sentence in finding(table(**losses))


def test_the_finding_takes_names_and_the_best_of_several_from_the_table():
    rows = [row("Teacher 8B", 2.0), row("1B alone", 3.0), row("1B distilled, T=4", 2.9), row("1B distilled, T=1", 2.5)]
    assert finding(rows).startswith("Distillation closes 50 % of the gap")
    assert "1B distilled, T=1 (2.500)" in finding(rows) and "T=4" not in finding(rows)
    assert "a (2.000)" in finding([row("a", 2.0), row("b", 3.0)])
    assert finding([]) == "No student has a finite held-out LM loss."


def test_the_best_student_is_marked_never_the_teacher():
    columns = {column.key: column for column in COLUMNS}
    assert best(table(), columns["lm_loss"]) == {"distilled student"}
    assert best(table(distilled=4.8), columns["lm_loss"]) == {"student alone"}
    assert best(table(), columns["top1_agreement"]) == {"distilled student"}
    assert best(table(), columns["parameters"]) == set()
    assert best(table()[:2], columns["lm_loss"]) == set()  # the only one in its class


def test_the_terminal_table_fits_80_columns():
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(render_table([*table(), row("[bold]x", 1000.0, NAN, None)]))
    lines = console.export_text().splitlines()
    cells = {line[:22].strip(): line[22:].split() for line in lines}
    assert max(map(len, lines)) <= 80
    assert cells["teacher"] == ["4.2", "M", "3.978", "53.41", "0", "100.0", "%"]
    assert cells["student alone"] == ["919", "K", "4.716", "111.7", "0.6210", "43.6", "%"]
    assert cells["distilled student"] == ["919", "K", "4.195", "*", "66.35", "*", "0.1502", "*", "70.1", "%", "*"]
    assert cells["[bold]x"] == ["919", "K", "1,000", "1,000", "–", "–"]


def test_curves_show_what_was_recorded(runs):
    lines = {name: metrics_file.read(path) for name, path in runs.items()}
    loss, kl = plots.loss_curves(lines, plots.colours([], lines)).axes
    curves = {line.get_label().split("  ")[0]: line for line in loss.lines}
    assert list(curves["teacher"].get_ydata()) == [7.7, 3.978]
    assert list(curves["teacher"].get_xdata()) == pytest.approx([0, 8 * 2.048])
    assert loss.get_xlabel() == "thousand tokens trained on" and "nats" in loss.get_title(loc="left")
    assert [7.5, 6.5, 5.5, 4.8] in [list(line.get_ydata()) for line in loss.lines if line.get_alpha()]
    assert [list(line.get_ydata()) for line in kl.lines] == [[3.1, 0.15]]
    assert len({curves[name].get_color() for name in runs}) == 3

    (without,) = plots.loss_curves({"alone": lines["alone"]}, {"alone": "blue"}).axes
    assert not [line for line in without.lines if line.get_linestyle() == "--"]
    loss, _ = plots.loss_curves({"distilled": lines["distilled"]}, {"distilled": "blue"}).axes
    (frozen,) = [line for line in loss.lines if line.get_label() == "frozen teacher  3.978"]
    assert list(frozen.get_ydata()) == [3.978, 3.978] and frozen.get_linestyle() == "--"


def test_curves_of_short_broken_and_empty_runs(tmp_path):
    one = write_run(tmp_path / "one.jsonl", {}, [3.0])
    bad = write_run(tmp_path / "bad.jsonl", {0: {"lm_loss": 5.0}, 1: {"lm_loss": NAN}, 2: {"lm_loss": 4.0}})
    bad.write_text(bad.read_text() + '{"kind": "eval", "st')
    lines = {"one": metrics_file.read(one), "bad": metrics_file.read(bad), "none": metrics_file.read(tmp_path / "no")}
    (axes,) = plots.loss_curves(lines, plots.colours([], lines)).axes
    labels = {line.get_label(): list(line.get_ydata()) for line in axes.lines}
    assert labels["bad  4.000"] == [5.0, 4.0]
    assert "one  3.000 (training)" in labels

    del lines["one"][0]["tokens"]
    (axes,) = plots.loss_curves(lines, plots.colours([], lines)).axes
    assert axes.get_xlabel() == "optimizer step"
    (axes,) = plots.loss_curves({}, {}).axes
    assert [text.get_text() for text in axes.texts] == ["nothing recorded"]


def test_the_dots_are_the_tables_values():
    rows = [*table(), row("diverged", math.inf, NAN, None)]
    loss, kl, agreement = plots.comparison(rows, plots.colours([r["model"] for r in rows], [])).axes
    assert dots(loss) == {0: 3.978, 2: 4.716, 3: 4.195} and dots(loss, ">").keys() == {1, 4}
    assert dots(kl) == {0: 2e-9, 2: 0.621, 3: 0.1502} and dots(kl, ">").keys() == {1}
    assert dots(agreement) == {0: 1.0, 1: 0.012, 2: 0.436, 3: 0.701}
    assert [text.get_text() for text in loss.texts] == ["3.978", "7.671", "4.716", "4.195", "inf"]
    assert [text.get_text() for text in kl.texts] == ["0", "3.100", "0.6210", "0.1502", "–"]
    assert [text.get_weight() for text in loss.texts] == ["normal", "normal", "normal", "bold", "normal"]
    assert [text.get_text() for text in loss.get_yticklabels()] == [r["model"] for r in rows]
    assert loss.get_xlim()[1] < 7.6712 and "nats per token, lower" in loss.get_title(loc="left")


def dots(axes, marker="o"):
    """Return {row: value}."""
    return {line.get_ydata()[0]: line.get_xdata()[0] for line in axes.lines if line.get_marker() == marker}


def test_models_near_each_other_are_all_to_scale():
    rows = [row(name, loss) for name, loss in (("a", 3.0), ("b", 3.2), ("c", 3.3), ("d", 3.5))]
    loss = plots.comparison(rows, plots.colours("abcd", [])).axes[0]
    assert dots(loss) == {0: 3.0, 1: 3.2, 2: 3.3, 3: 3.5}
    assert dots(plots.comparison(rows[:1], {"a": "blue"}).axes[0]) == {0: 3.0}


def test_a_run_and_the_model_it_made_share_a_colour():
    colour = plots.colours(
        ["teacher", "student alone", "distilled student", "pruned"], ["teacher", "alone", "distilled"]
    )
    assert colour["distilled"] == colour["distilled student"] and colour["alone"] == colour["student alone"]
    assert len(set(colour.values())) == 4
    several = plots.colours([], ["distilled, T=1", "distilled, T=4"])
    assert len(set(several.values())) == 2


def test_the_page_stands_alone(tmp_path, runs):
    sample = {"model": "student alone", "prompt": "def f", "text": "def f(x):\n    return x"}
    path = write_report(tmp_path / "report", runs, table(), {"seed": "3", "loss": "forward_kl"}, [sample])
    page = Page(path)
    assert sorted(p.name for p in path.parent.iterdir()) == ["comparison.png", "loss_curves.png", path.name]
    images = [value for name, value in page.attributes if name == "src"]
    embedded = [base64.b64decode(image.removeprefix("data:image/png;base64,")) for image in images]
    assert embedded == [(path.parent / f"{n}.png").read_bytes() for n in ("comparison", "loss_curves")]
    assert embedded[0][:4] == b"\x89PNG"
    assert not {"script", "link", "iframe"} & set(page.tags) and "href" not in dict(page.attributes)
    assert "http" not in path.read_text(encoding="utf-8").replace("http-equiv", "")
    shown = " ".join(page.text.split())
    assert "closes 71 %" in shown and "seed 3" in shown
    assert "def f(x): return x" in shown and shown.count("def f(") == 1 and "def fdef" not in shown
    assert "student alone 919 K 4.716 111.7 0.6210 43.6 % distilled student 919 K 4.195 66.35 0.1502 70.1 %" in shown
    assert "teacher 8 16.4 K 0:00:04 4,096 6.000 alone 4 8.2 K 0:00:02 4,096 4.800" in shown
    assert page.text.index("closes 71 %") < page.text.index("perplexity") < page.text.index("The models compared")


def test_what_others_wrote_is_escaped_everywhere(tmp_path, runs):
    evil = "<script>alert(1)</script><img src=http://x onerror=y> & $\\frac{$"
    clean = Page(write_report(tmp_path / "clean", runs, table(), {"a": "b"}, []))
    rows = [*table(), row(f"m{evil}", 5.0)]
    samples = [{"model": f"s{evil}", "prompt": f"p{evil}", "text": f"p{evil}\n</pre>t{evil}"}]
    evil_runs = {f"r{evil}": runs["alone"], f"gone{evil}": tmp_path / "gone"}
    page = Page(write_report(tmp_path / "evil", evil_runs, rows, {f"k{evil}": f"v{evil}"}, samples))
    for mark in ("m", "r", "k", "v", "s", "p", "t", "gone"):
        assert mark + evil in page.text
    assert set(page.tags) - set(clean.tags) <= {"b", "pre", "h3"}
    assert not {"onerror"} & {name for name, _ in page.attributes}


def test_runs_without_metrics_are_named(tmp_path, runs):
    runs["alone"] = tmp_path / "never_started.jsonl"
    page = Page(write_report(tmp_path / "report", runs, table(alone=None), {}, []))
    assert "No metrics were found for: alone." in page.text
    assert "No finite held-out LM loss: student alone" in page.text


def test_nothing_at_all_still_makes_a_page(tmp_path):
    page = Page(write_report(tmp_path / "deep" / "report", {}, [], {}, []))
    assert "No student has a finite held-out LM loss." in page.text


def test_a_report_replaces_the_last_one_whole_or_not_at_all(tmp_path, runs):
    path = write_report(tmp_path / "report", runs, table(), {"seed": "first"}, [])
    with pytest.raises(KeyError):
        write_report(tmp_path / "report", runs, table(), {"seed": "second"}, [{"model": "no text"}])
    assert "seed first" in " ".join(Page(path).text.split())
    (tmp_path / ".report.partial").mkdir()
    (tmp_path / ".report.partial" / "left").touch()  # left by a kill
    assert write_report(tmp_path / "report", runs, table(), {"seed": "second"}, []) == path
    text = " ".join(Page(path).text.split())
    assert "seed second" in text and "seed first" not in text
    assert not list(tmp_path.glob("*.partial")) and len(list(path.parent.iterdir())) == 3


def test_a_directory_with_other_things_is_refused(tmp_path):
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(ValueError, match=r"thesis\.tex, which is not part of a report"):
        write_report(tmp_path, {}, table(), {}, [])
    assert (tmp_path / "thesis.tex").exists()


def test_reports_import_no_torch(tmp_path):
    code = (
        "import sys; from pathlib import Path; from distill_nemo.reports.page import render_table, write_report;"
        "table = [{'model': 'm'}]; write_report(Path(sys.argv[1]), {'a': Path('none')}, table, {}, []);"
        "render_table(table);"
        "print({'torch', 'megatron', 'transformers', 'matplotlib.pyplot'} & set(sys.modules))"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "report")]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "set()\n"
