"""The quickstart's last stage: teacher, initial student, student alone and distilled student, side by side."""

import math
from pathlib import Path
from typing import Any


def compare_quickstart(root: str, samples: int = 128) -> None:
    """Evaluate the exported models on held-out text, write the report, print the table.

    Args:
        root: the quickstart's directory.
        samples: held-out sequences.
    """
    from rich.console import Console

    from distill_nemo.reports.page import render_table, write_report
    from distill_nemo.training.evaluate import evaluate_checkpoint

    directory = Path(root)
    teacher = str(directory / "teacher" / "student")
    names = {"teacher": teacher, "initial student": str(directory / "distilled" / "checkpoints" / "step_00000000")}
    names |= {"student alone": str(directory / "alone" / "student"), "distilled student": str(directory / "student")}
    _publish(directory)
    table: list[dict[str, Any]] = []
    for name, path in names.items():
        means = evaluate_checkpoint(path, str(directory / "data" / "valid"), teacher, 128, samples)
        table.append(
            {
                "model": name,
                "parameters": _parameters(Path(path)),
                "lm_loss": means["lm_loss"],
                "perplexity": math.exp(means["lm_loss"]),
                "forward_kl": means["forward_kl"],
                "top1_agreement": means["top1_agreement"],
            }
        )
    runs = {name: directory / name / "metrics.jsonl" for name in ("teacher", "alone", "distilled")}
    page = write_report(directory / "report", runs, table, _facts(directory), _samples(directory, names))
    Console().print(render_table(table))
    print(f"report: {page}\nstudent: {directory / 'student'}")


def _publish(directory: Path) -> None:
    """The distilled student's Hugging Face directory, where the README says it is."""
    import shutil

    partial = directory / "student.partial"
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(directory / "distilled" / "student", partial)
    shutil.rmtree(directory / "student", ignore_errors=True)
    partial.rename(directory / "student")


def _parameters(path: Path) -> int:
    """Parameters of a Hugging Face directory, from the safetensors headers."""
    from safetensors import safe_open

    total = 0
    for file in path.glob("*.safetensors"):
        with safe_open(file, "np") as tensors:
            total += sum(math.prod(tensors.get_slice(key).get_shape()) for key in tensors.keys())
    return total


def _facts(directory: Path) -> dict[str, str]:
    from distill_nemo.config import load_yaml

    config = load_yaml(directory / "distilled" / "config.yaml")
    kd, train, student = config.distillation, config.training, config.student
    return {
        "student": f"{student.num_layers} layers x {student.hidden_size}, {student.family}",
        "loss": f"{kd.divergence}, temperature {kd.temperature}, {kd.balancer} balancer",
        "steps": f"{train.steps} of {train.global_batch_size} x {config.data.sequence_length} tokens",
        "optimizer": f"Adam, learning rate {config.optimizer.lr}, cosine to {config.optimizer.min_lr}",
        "seed": str(train.seed),
        "corpus": "Python's standard library; every 20th module held out",
    }


def _samples(directory: Path, models: dict[str, str]) -> list[dict[str, str]]:
    """Greedy text of each model, by transformers, exactly as a user would load it."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(directory / "student"))
    prompt = "def __init__(self"
    tokens = tokenizer(prompt, return_tensors="pt").input_ids
    samples = []
    for name in ("teacher", "student alone", "distilled student"):
        model: Any = AutoModelForCausalLM.from_pretrained(models[name], dtype=torch.float32)
        text = model.generate(tokens, max_new_tokens=48, do_sample=False, pad_token_id=tokenizer.eos_token_id)
        samples.append({"model": name, "prompt": prompt, "text": tokenizer.decode(text[0])})
    return samples
