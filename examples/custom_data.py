"""Distil on your own text: two sources are tokenised and mixed 70 to 30, and a third is held out.

Run `make quickstart` first. This distils its student from the same teacher on other text. The sources here come with
Python; replace them by your own files, directories or globs.
"""

import asyncio
import email
import json
from pathlib import Path

import nemo_run as run

from distill_nemo.data.prepare import prepare
from distill_nemo.executors import local
from recipes import quickstart

ROOT = Path("runs/custom_data")


def write_records(path: Path, files: list[Path]) -> None:
    """Write JSONL with a document in the field `body` of each line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"id": file.name, "body": file.read_text(encoding="utf-8")}) + "\n" for file in files]
    path.write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    recipe = quickstart(steps=20)
    modules = sorted(Path(asyncio.__file__).parent.glob("*.py"))
    write_records(ROOT / "held_out.jsonl", modules[::5])
    write_records(ROOT / "records.jsonl", [file for number, file in enumerate(modules) if number % 5])
    sources = {
        "plain": Path(email.__file__).parent,
        "records": ROOT / "records.jsonl",
        "held_out": ROOT / "held_out.jsonl",
    }
    for name, source in sources.items():
        prepare([str(source)], str(ROOT / name), recipe.data.tokenizer, text_key="body")
    recipe.data.train = ["70", str(ROOT / "plain"), "30", str(ROOT / "records")]
    recipe.data.valid = [str(ROOT / "held_out")]
    recipe.output_dir = str(ROOT / "run")
    run.run(recipe, executor=local(processes=2), name="custom_data")
    print(f"student: {ROOT}/run/student")
