"""The report: numbers, finding, plots and page. It does not import torch."""

import base64
import io
import json
import math
import re
import subprocess
import sys
from html import unescape
from html.parser import HTMLParser
from pathlib import Path

import pytest
from rich.console import Console

from distill_nemo.config import OptimizerConfig, RunConfig, StudentConfig
from distill_nemo.config_files import save_yaml
from distill_nemo.data.prepare import prepare
from distill_nemo.reports import data, plots
from distill_nemo.reports import page as pages
from distill_nemo.reports.comparison import COLUMNS, best, count, finding, four_digits, percent
from distill_nemo.reports.page import render_table, write_page
from distill_nemo.reports.report import last_evaluations, report
from distill_nemo.reports.runs import RecordedRun, is_going_on, read_run
from distill_nemo.reports.scores import Score, Scores, write_scores
from distill_nemo.runtime import metrics_file
from tests.unit.data.chat_templates import CHATML, write_tokenizer

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


def write_report(directory, runs, table, samples=(), **more):
    """Write the page of runs by name -> directory."""
    read = [read_run(path, name) for name, path in runs.items()]
    return write_page(directory, pages.Page(read, table, samples=list(samples), **more))


def write_run(path, evaluations, train=(), tokens=2048):
    """Write metrics like the loop's, with `evaluations` {step: metrics} and `train` losses of steps 1, 2, ..."""
    path.mkdir(exist_ok=True)
    path /= "metrics.jsonl"
    for step, metrics in evaluations.items():
        metrics_file.append(path, {"kind": "eval", "step": step, **metrics, "tokens": step * tokens})
    for step, loss in enumerate(train, 1):
        line = {"lm_loss": loss, "lr": 1e-3, "grad_norm": 1.0, "seconds": 0.5, "tokens": step * tokens}
        metrics_file.append(path, {"kind": "train", "step": step, **line, "tokens_per_second": tokens / 0.5})
    return path.parent


@pytest.fixture
def runs(tmp_path):
    kd = {"teacher_lm_loss": 3.978, "top1_agreement": 0.7}
    held_out = {0: {"lm_loss": 7.6, "forward_kl": 3.1, **kd}, 4: {"lm_loss": 4.195, "forward_kl": 0.15, **kd}}
    return {
        "teacher": write_run(tmp_path / "teacher", {0: {"lm_loss": 7.7}, 8: {"lm_loss": 3.978}}, [7.5, 6.0] * 4),
        "alone": write_run(tmp_path / "alone", {0: {"lm_loss": 7.6}, 4: {"lm_loss": 4.716}}, [7.5, 6.5, 5.5, 4.8]),
        "distilled": write_run(tmp_path / "distilled", held_out, [7.4, 6.2, 5.1, 4.3]),
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
    assert "1B distilled, T=1 reaches 2.500" in finding(rows) and "T=4" not in finding(rows)
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


def axes_of(lines):
    """Return the axes of the plots."""
    return [drawing.axes[0] for drawing in plots.loss_curves(lines, plots.colours([], lines)).values()]


def test_curves_show_what_was_recorded(runs):
    lines = {name: read_run(path, name).lines for name, path in runs.items()}
    loss, kl = axes_of(lines)
    curves = {line.get_label().split("  ")[0]: line for line in loss.lines}
    assert list(curves["teacher"].get_ydata()) == [7.7, 3.978]
    assert list(curves["teacher"].get_xdata()) == pytest.approx([0, 8 * 2.048])
    assert loss.get_xlabel() == "thousand tokens trained on" and "nats" in loss.get_title(loc="left")
    assert [7.5, 6.5, 5.5, 4.8] in [list(line.get_ydata()) for line in loss.lines if line.get_alpha()]
    assert [list(line.get_ydata()) for line in kl.lines] == [[3.1, 0.15]]
    assert len({curves[name].get_color() for name in runs}) == 3

    (without,) = axes_of({"alone": lines["alone"]})
    assert not [line for line in without.lines if line.get_linestyle() == "--"]
    loss, _ = axes_of({"distilled": lines["distilled"]})
    (frozen,) = [line for line in loss.lines if line.get_label() == "frozen teacher  3.978"]
    assert list(frozen.get_ydata()) == [3.978, 3.978] and frozen.get_linestyle() == "--"


def test_curves_of_short_broken_and_empty_runs(tmp_path):
    one = write_run(tmp_path / "one", {}, [3.0])
    bad = write_run(tmp_path / "bad", {0: {"lm_loss": 5.0}, 1: {"lm_loss": NAN}, 2: {"lm_loss": 4.0}})
    with (bad / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "eval", "st')
    lines = {path.name: read_run(path, "").lines for path in (one, bad, tmp_path / "none")}
    (axes,) = axes_of(lines)
    labels = {line.get_label(): list(line.get_ydata()) for line in axes.lines}
    assert labels["bad  4.000"] == [5.0, 4.0]
    assert "one  3.000 (training)" in labels

    lines["one"].insert(0, {"kind": "start", "step": 0})
    assert "tokens" in axes_of(lines)[0].get_xlabel()
    del lines["one"][1]["tokens"]
    (axes,) = axes_of(lines)
    assert axes.get_xlabel() == "optimizer step"
    (axes,) = axes_of({})
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
    path = write_report(tmp_path / "report", runs, table(), [sample])
    page = Page(path)
    names = ("comparison", "lm_loss", "forward_kl")
    assert sorted(p.name for p in path.parent.iterdir()) == sorted([*(f"{name}.png" for name in names), path.name])
    images = [value for name, value in page.attributes if name == "src"]
    embedded = [base64.b64decode(image.removeprefix("data:image/png;base64,")) for image in images]
    assert embedded == [(path.parent / f"{n}.png").read_bytes() for n in names]
    assert embedded[0][:4] == b"\x89PNG"
    assert not {"script", "link", "iframe"} & set(page.tags) and "href" not in dict(page.attributes)
    assert "http" not in path.read_text(encoding="utf-8").replace("http-equiv", "")
    shown = " ".join(page.text.split())
    assert "closes 71 %" in shown
    assert "def f(x): return x" in shown and shown.count("def f(") == 1 and "def fdef" not in shown
    assert "student alone 919 K 4.716 111.7 0.6210 43.6 % distilled student 919 K 4.195 66.35 0.1502 70.1 %" in shown
    assert "teacher 8 16.4 K 0:00:04 4,096 – 6.000 alone 4 8.2 K 0:00:02 4,096 – 4.800" in shown
    assert page.text.index("closes 71 %") < page.text.index("perplexity") < page.text.index("The models compared")


def test_a_plan_has_no_column_that_no_run_fills(tmp_path, runs):
    plans = {"teacher": {"planned": "1", "measured": "–", "step": "–"}, "alone": {"planned": "2", "measured": "3"}}
    shown = " ".join(Page(write_report(tmp_path / "report", runs, table(), plans=plans)).text.split())
    assert "run planned measured teacher 1 – alone 2 3" in shown and "assumes a utilisation" not in shown


def write_config(directory, **fields):
    run = RunConfig(str(directory), StudentConfig(num_layers=2, hidden_size=32, ffn_hidden_size=64, vocab_size=512))
    run.student.num_attention_heads, run.student.num_query_groups = 4, 2
    run.optimizer = OptimizerConfig(**fields)
    save_yaml(run, directory / "config.yaml")


def test_settings_that_differ_come_first_and_what_is_missing_is_said(tmp_path, runs):
    write_config(runs["alone"], lr=1e-3)
    write_config(runs["distilled"], lr=2e-3)
    (runs["teacher"] / "config.yaml").write_text("student: [")
    runs["none"] = tmp_path / "never_started"
    page = Page(write_report(tmp_path / "report", runs, table(), notes={"alone": ["no plan: because"]}))
    shown = " ".join(page.text.split())
    assert "setting teacher alone distilled none optimizer.lr – 0.001 0.002 –" in shown
    assert shown.index("optimizer.lr") < shown.index("settings that all runs share") < shown.index("optimizer.min_lr")
    assert "teacher: config.yaml cannot be read: ParserError." in shown
    assert "none: no metrics.jsonl; no config.yaml." in shown and "alone: no plan: because." in shown


@pytest.mark.parametrize(
    ("text", "note"),
    [
        ("x: &a [1]\ny: [*a, *a]", "has YAML aliases or nests too deeply"),
        ("!!python/object/apply:os.system [touch pwned]", "cannot be read: ConstructorError"),
        ("[" * 10**6, "nests too deeply"),
        ("output_dir: x\nstudent: {}\nunknown: 1", 'unknown field "unknown"'),
        ("a" * (2**20 + 1), "has more than 1,048,576 bytes"),
    ],
)
def test_a_hostile_config_is_noted(tmp_path, monkeypatch, text, note):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.yaml").write_text(text)
    found = read_run(tmp_path, "run")
    assert found.config is None and note in " ".join(found.notes), found.notes
    assert not (tmp_path / "pwned").exists()


def test_what_others_wrote_is_escaped_everywhere(tmp_path, runs):
    evil = "<script>alert(1)</script><img src=http://x onerror=y> & $\\frac{$"
    clean = Page(write_report(tmp_path / "clean", runs, table()))
    rows = [*table(), row(f"m{evil}", 5.0)]
    samples = [{"model": f"s{evil}", "prompt": f"p{evil}", "text": f"p{evil}\n</pre>t{evil}"}]
    write_config(runs["alone"])
    save_yaml(RunConfig(f"v{evil}", StudentConfig(family=f"f{evil}")), runs["distilled"] / "config.yaml")
    metrics_file.append(runs["alone"] / "metrics.jsonl", {"kind": "start", "step": 4, "device": f"d{evil}"})
    evil_runs = {f"r{evil}": runs["alone"], f"e{evil}": runs["distilled"], f"gone{evil}": tmp_path / "gone"}
    more = {"plans": {f"r{evil}": {f"c{evil}": f"l{evil}"}}, "notes": {f"r{evil}": [f"n{evil}"]}}
    score = Score(f"b{evil}", f"q{evil}", True, {f"a{evil}": 0.5}, {f"a{evil}": 0.1})
    more["scores"] = {f"o{evil}": Scores({f"a{evil}": f"k{evil}"}, [score], [{"model": f"h{evil}"}])}
    page = Page(write_report(tmp_path / "evil", evil_runs, rows, samples, **more))
    for mark in ("m", "r", "e", "f", "s", "p", "t", "gone", "c", "l", "n", *"boakh"):
        assert mark + evil in page.text, mark
    assert set(page.tags) - set(clean.tags) <= {"b", "pre", "h3", "details", "summary", "dl", "dt", "dd"}
    assert not {"onerror"} & {name for name, _ in page.attributes}


def test_the_runs_data_is_shown_as_tokens_and_which_of_them_count(tmp_path, runs):
    evil = "<script>alert(1)</script>\x1b[31m"
    turns = [{"role": "user", "content": f"q{evil}"}, {"role": "assistant", "content": f"a{evil}"}]
    (tmp_path / "chats.jsonl").write_text(json.dumps({"messages": turns * 2}) + "\n")
    tokenizer, prefix = write_tokenizer(tmp_path, CHATML), str(tmp_path / "chat")
    prepare([str(tmp_path / "chats.jsonl")], prefix, tokenizer, pack=256, progress=False)
    answer = f"a{evil}<|im_end|>".replace("\x1b", "\u241b")
    for run, loss_on, answers in (("alone", None, answer * 2), ("distilled", "last", answer)):
        config = RunConfig(str(runs[run]), StudentConfig())
        config.data.train, config.data.loss_on = ["2", prefix, "1", str(tmp_path / "gone")], loss_on
        save_yaml(config, runs[run] / "config.yaml")
        path = write_report(tmp_path / f"{run}_report", {run: runs[run]}, [])
        html, page = path.read_text(encoding="utf-8"), Page(path)
        assert f"{prefix}{', loss_on=last' if loss_on else ''} pack 1 of 1" in " ".join(page.text.split())
        tokens = html[html.index('<pre class="tokens"') :]
        assert "".join(map(unescape, re.findall("<b>(.*?)</b>", tokens))) == answers
        assert "script" not in page.tags and "gone" not in page.text[page.text.index("The data") :]
    Path(f"{prefix}.mask").unlink()
    data.shown.cache_clear()
    assert "chat.mask" in Page(write_report(tmp_path / "damaged", {"alone": runs["alone"]}, [])).text


def test_nothing_at_all_still_makes_a_page(tmp_path):
    (tmp_path / "run").mkdir()
    page = Page(write_report(tmp_path / "deep" / "report", {"run": tmp_path / "run"}, []))
    assert "No student has a finite held-out LM loss." in page.text


def test_hours_are_those_of_the_ranks_of_each_process():
    steps = [{"kind": "train", "step": i, "seconds": 1800.0} for i in range(2)]
    start = {"kind": "start", "step": 0, "world_size": 8}
    assert RecordedRun("", Path(), [start, *steps, {**start, "world_size": 4}, steps[0]]).gpu_hours == 8 + 2
    assert RecordedRun("", Path(), steps).gpu_hours is None


def test_the_last_evaluations_are_compared_with_their_teacher(runs):
    rows = last_evaluations([read_run(path, name) for name, path in runs.items()])
    assert [(r["model"], r["lm_loss"], r.get("forward_kl")) for r in rows] == [
        ("frozen teacher", 3.978, None),
        ("teacher", 3.978, None),
        ("alone", 4.716, None),
        ("distilled", 4.195, 0.15),
    ]


def test_a_page_follows_a_run_until_its_process_ends(tmp_path, runs, capsys):
    """A process holds the run's lock, adds a step, and ends when the page shows it."""
    directory, output = runs["alone"], tmp_path / "report"
    assert not is_going_on(directory)
    holder = subprocess.Popen([sys.executable, "-c", HOLD, directory, output], stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "held\n" and is_going_on(directory)
    report([str(directory)], str(output), [], [], follow=True)
    assert holder.wait() == 0, "the page showed the step before the run ended"
    assert "alone 5 " in " ".join(Page(output / "report.html").text.split())
    assert capsys.readouterr().out.endswith(f"report: {output}/report.html\n")


HOLD = """
import sys, time
from pathlib import Path
from distill_nemo.runtime.output_lock import OutputLock
from distill_nemo.runtime import metrics_file
from tests.unit.data.chat_templates import CHATML, write_tokenizer
run, page = Path(sys.argv[1]), Path(sys.argv[2]) / "report.html"
with OutputLock(run / "run.lock", "output_dir"):
    print("held", flush=True)
    for step in (0, 5):
        deadline = time.monotonic() + 100
        while not page.is_file() or (step and f"<td>{step}</td>" not in page.read_text()):
            assert time.monotonic() < deadline
            time.sleep(0.1)
        if not step:
            metrics_file.append(run / "metrics.jsonl", {"kind": "train", "step": 5, "tokens": 10240, "seconds": 1.0})
"""


@pytest.mark.parametrize(
    ("directories", "message"),
    [
        ([], "name 1 to 20"),
        (["gone"], "no such directory: gone"),
        (["a", "a/"], "a run is named twice"),
        (["a", "."], r"\. holds neither config\.yaml nor metrics\.jsonl: name the output_dir of a run"),
    ],
)
def test_what_cannot_be_reported_is_refused(tmp_path, monkeypatch, directories, message):
    monkeypatch.chdir(tmp_path)
    Path("a").mkdir()
    Path("a", "metrics.jsonl").touch()
    with pytest.raises(ValueError, match=message):
        report(directories, "report", [], [], follow=False)


def test_scores_alone_have_a_page(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "scores").mkdir()
    write_scores(
        tmp_path / "scores" / "scores.json", Scores({"model": "m"}, [Score("arc", "acc", True, {"model": 0.25})])
    )
    report([], "report", [], ["scores"], follow=False)
    text = " ".join(Page(tmp_path / "report" / "report.html").text.split())
    assert "Benchmarks: scores" in text and "arc acc" in text and "0.2500" in text and "Training" not in text
    assert [path.name for path in (tmp_path / "report").iterdir()] == ["report.html"]


def test_a_report_replaces_the_last_one_whole_or_not_at_all(tmp_path, runs):
    path = write_report(tmp_path / "report", runs, table(), measured_on="first")
    with pytest.raises(KeyError):
        write_report(tmp_path / "report", runs, table(), [{"model": "no text"}], measured_on="second")
    assert "first; losses" in " ".join(Page(path).text.split())
    (tmp_path / ".report.partial").mkdir()
    (tmp_path / ".report.partial" / "left").touch()  # left by a kill
    assert write_report(tmp_path / "report", runs, table(), measured_on="second") == path
    text = " ".join(Page(path).text.split())
    assert "second; losses" in text and "first; losses" not in text
    assert not list(tmp_path.glob("*.partial")) and len(list(path.parent.iterdir())) == 4


def test_nothing_but_a_report_is_replaced(tmp_path, monkeypatch):
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(ValueError, match=r"thesis\.tex, which is not part of a report"):
        write_report(tmp_path, {}, table())
    with pytest.raises(ValueError, match=r"thesis\.tex would be replaced by a directory: name a new one"):
        write_report(tmp_path / "thesis.tex", {}, table())
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["thesis.tex"]
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    with pytest.raises(ValueError, match=r"output = \. would be replaced"):
        write_report(Path("."), {}, table())


def test_one_process_at_a_time_writes_a_report(tmp_path, runs):
    output = tmp_path / "report"
    command = [sys.executable, "-c", HOLD_REPORT, output]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(ValueError, match=rf"output = .*report: another process writes .*process {holder.pid} "):
            report([str(runs["alone"])], str(output), [], [], follow=False)
        assert not output.exists()
        holder.kill()
    report([str(runs["alone"])], str(output), [], [], follow=False)
    assert output.is_dir()


HOLD_REPORT = """
import sys
from pathlib import Path
from distill_nemo.reports.page import lock_of
with lock_of(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_reports_import_no_torch(tmp_path):
    code = (
        "import sys; from pathlib import Path; from distill_nemo.reports.page import Page, render_table, write_page;"
        "from distill_nemo.reports.runs import read_run;"
        "table = [{'model': 'm'}]; write_page(Path(sys.argv[1]), Page([read_run(Path('none'), 'a')], table));"
        "render_table(table);"
        "print({'torch', 'megatron', 'transformers', 'matplotlib.pyplot'} & set(sys.modules))"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "report")]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "set()\n"
