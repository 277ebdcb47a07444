"""A task of lm-evaluation-harness on disk."""

import json
from pathlib import Path

import yaml

TASK = {
    "task": "ours",
    "dataset_path": "json",
    "test_split": "test",
    "output_type": "multiple_choice",
    "doc_to_text": "{{question}}",
    "doc_to_choice": "{{choices}}",
    "doc_to_target": "answer",
    "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
}


def write_task(root: Path) -> None:
    """Write the task `ours`, of six questions, below `root`/tasks."""
    (root / "tasks").mkdir(parents=True)
    questions = [{"question": f"{n} + {n} =", "choices": [str(n), str(2 * n)], "answer": 1} for n in range(6)]
    (root / "questions.jsonl").write_text("".join(f"{json.dumps(each)}\n" for each in questions))
    data = {"dataset_kwargs": {"data_files": {"test": str(root / "questions.jsonl")}}}
    (root / "tasks" / "ours.yaml").write_text(yaml.safe_dump(TASK | data))
