"""The quickstart's last stage: compare teacher, initial student, student alone and distilled student."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

from distill_nemo.config import RunConfig, StudentConfig, load_yaml
from distill_nemo.runtime.files import writing_directory

PROMPT = "def __init__(self"


def compare_quickstart(root: str, samples: int = 128) -> None:
    """Evaluate the exported models on held-out text, write the report, and its table to `comparison.json`.

    Args:
        root: the quickstart's directory.
        samples: number of held-out sequences.
    """
    from distill_nemo.reports.page import write_report
    from distill_nemo.runtime.device import setup_device

    setup_device()
    directory = Path(root)
    config = load_yaml(directory / "distilled" / "config.yaml")
    assert config.teacher is not None, "the quickstart distils"
    _publish(directory)
    teacher = config.teacher.checkpoint
    models = {
        "teacher": StudentConfig(checkpoint=teacher),
        "initial student": config.student,
        "student alone": StudentConfig(checkpoint=str(directory / "alone" / "student")),
        "distilled student": StudentConfig(checkpoint=str(directory / "student")),
    }
    table = [_measure(name, model, config, samples) for name, model in models.items()]
    for row, model in zip(table, models.values(), strict=True):
        row["parameters"] = _parameters(Path(model.checkpoint or directory / "student"))
    runs = {name: directory / name / "metrics.jsonl" for name in ("teacher", "alone", "distilled")}
    page = write_report(directory / "report", runs, table, _facts(config), _samples(models))
    (directory / "comparison.json").write_text(json.dumps(table, indent=2))
    print(f"report: {page}", flush=True)


def _measure(name: str, model: StudentConfig, config: RunConfig, samples: int) -> dict[str, Any]:
    """Return a row of the table: `model` on the run's held-out text, against the run's teacher."""
    from distill_nemo.training.evaluate import evaluate_student

    seed, length = config.training.seed, config.data.sequence_length
    means = evaluate_student(model, config.data.valid[0], config.teacher, length, samples, seed)
    return {
        "model": name,
        "lm_loss": means["lm_loss"],
        "perplexity": math.exp(min(means["lm_loss"], 700.0)),
        "forward_kl": means["forward_kl"],
        "top1_agreement": means["top1_agreement"],
    }


def _publish(directory: Path) -> None:
    """Copy the distilled student's Hugging Face directory to the place that the README names."""
    with writing_directory(directory / "student") as partial:
        shutil.copytree(directory / "distilled" / "student", partial, dirs_exist_ok=True)


def _parameters(path: Path) -> int:
    """Return the number of parameters in a Hugging Face directory, from the safetensors headers."""
    from safetensors import safe_open

    total = 0
    for file in path.glob("*.safetensors"):
        with safe_open(file, "np") as tensors:
            total += sum(math.prod(tensors.get_slice(key).get_shape()) for key in tensors.keys())
    return total


def _facts(config: RunConfig) -> dict[str, str]:
    kd, train, student = config.distillation, config.training, config.student
    return {
        "student": f"{student.num_layers} layers x {student.hidden_size}, {student.family}",
        "loss": f"{kd.divergence}, temperature {kd.temperature}, {kd.balancer} balancer",
        "steps": f"{train.steps} of {train.global_batch_size} x {config.data.sequence_length} tokens",
        "optimizer": f"Adam, learning rate {config.optimizer.lr}, cosine to {config.optimizer.min_lr}",
        "seed": str(train.seed),
        "corpus": "Python's standard library; every 20th module held out",
    }


def _samples(models: dict[str, StudentConfig]) -> list[dict[str, str]]:
    """Return greedy text of each exported model, loaded by transformers as a user would load it."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from distill_nemo.models.checkpoints.pretrained import open_pretrained

    samples = []
    for name, exported in models.items():
        if exported.checkpoint is None:
            continue
        tokenizer = open_pretrained(AutoTokenizer, exported.checkpoint)
        tokens = tokenizer(PROMPT, return_tensors="pt").input_ids
        model = open_pretrained(AutoModelForCausalLM, exported.checkpoint, dtype=torch.float32)
        text = model.generate(tokens, max_new_tokens=48, do_sample=False, pad_token_id=tokenizer.eos_token_id)
        samples.append({"model": name, "prompt": PROMPT, "text": tokenizer.decode(text[0])})
    return samples
