"""Scores of benchmarks: results of the harness become a table. It does not import torch."""

import pytest

from distill_nemo.reports.scores import add_results, read_scores

OF_THE_HARNESS = {
    "results": {
        "arc": {"alias": "arc", "sample_len": 4, "acc,none": 0.25, "acc_stderr,none": 0.1},
        "gsm": {"name": "gsm", "em,strict": 0.5, "em_stderr,strict": "N/A", "ppl,none": 1234.5},
        "group": {"alias": "group"},
    },
    "higher_is_better": {"arc": {"acc": True}, "gsm": {"ppl": False}},
}


def test_scores_of_tasks_and_groups_are_tabled_with_standard_errors():
    scores = []
    add_results(scores, "model", "arc", OF_THE_HARNESS)
    add_results(scores, "teacher", "arc", OF_THE_HARNESS)
    assert [(each.title, each.cell("model"), each.cell("baseline")) for each in scores] == [
        ("arc acc ↑", "0.2500 ± 0.1000", "–")
    ]
    add_results(scores, "model", "group", OF_THE_HARNESS)
    assert {each.title: each.cell("model") for each in scores} == {
        "arc acc ↑": "0.2500 ± 0.1000",
        "gsm em, strict": "0.5000",
        "gsm ppl ↓": "1,234",
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "must hold a JSON object"),
        ('{"models": {}, "scores": 3}', "scores must be a list"),
        ('{"models": {"a": 1}}', "models must be"),
        ('{"models": {}, "scores": [{"task": "t"}]}', "leaves out metric, higher_is_better"),
    ],
)
def test_scores_that_nobody_wrote_are_refused(tmp_path, text, message):
    (tmp_path / "scores.json").write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        read_scores(tmp_path / "scores.json")
    assert "scores.json" in str(error.value)
