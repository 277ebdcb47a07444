"""Recipes for released models: layouts and figures are the planner's, and tiny models of their families train."""

import re
from dataclasses import replace

import fiddle as fdl
import pytest

from distill_nemo.config import RunConfig, StudentConfig, TeacherConfig
from tests.cli.command import the_recipes
from tests.tiny_models import write_hf
from tests.training import metrics, tiny_run
from tests.unit.planning.test_layouts import chosen, planned_pair

RECIPES = {  # teacher and student in tests/real_models.json
    "qwen3_32b_to_4b": ("Qwen/Qwen3-32B", "Qwen/Qwen3-4B-Instruct-2507"),
    "qwen3_30b_a3b_to_4b": ("Qwen/Qwen3-30B-A3B", "Qwen/Qwen3-4B-Instruct-2507"),
    "qwen25_32b_to_7b": ("Qwen/Qwen2.5-32B-Instruct", "Qwen/Qwen2.5-7B"),
    "mixtral_8x7b_to_mistral_7b": ("mistralai/Mixtral-8x7B-v0.1", "mistralai/Mistral-7B-v0.1"),
    "gemma2_27b_to_2b": ("google/gemma-2-27b", "google/gemma-2-2b"),
    "gpt_oss_120b_to_20b": ("openai/gpt-oss-120b", "openai/gpt-oss-20b"),
    "olmo2_32b_to_1b": ("allenai/OLMo-2-0325-32B", "allenai/OLMo-2-0425-1B"),
}


def config_of(name):
    return RunConfig(**fdl.build(getattr(the_recipes(), name)()).keywords)


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipes_layout_and_figures_are_the_planners(tmp_path, name):
    from distill_nemo.planning.compute import time_of
    from distill_nemo.planning.gpus import GPUS
    from distill_nemo.planning.memory import fullest

    config, doc = config_of(name), getattr(the_recipes(), name).__doc__
    gpus = int(re.search(r"Planned for (\d+) GPUs", doc)[1])
    planned = planned_pair(tmp_path, RECIPES[name], gpus, training__steps=5000, optimizer__warmup_steps=100)
    best = chosen(planned, "h100").planned
    own = replace(best, config=replace(best.config, parallelism=config.parallelism, training=config.training))
    assert (own.config.parallelism, own.config.training) == (best.config.parallelism, best.config.training)
    hours = []
    for gpu in (GPUS[key] for key in ("h100", "h200", "b200")):
        time = time_of(own, gpu.bf16_tflops, 0.4)
        hours.append(f"{gpu.name} {(time.training + time.evaluations) / 3600 * gpus:,.0f}")
    line = f"Planned for {gpus} GPUs: {fullest(own).total / 1e9:.1f} GB each; GPU-hours: {', '.join(hours)}."
    assert line in doc, line


def train(run):
    from distill_nemo.training.entry import run_config

    run_config(run)


FAMILIES = {
    "qwen3_32b_to_4b": ("qwen3", "qwen3"),
    "qwen3_30b_a3b_to_4b": ("qwen3_moe", "qwen3"),
    "qwen25_32b_to_7b": ("qwen2", "qwen2"),
    "mixtral_8x7b_to_mistral_7b": ("mixtral", "mistral"),
    "gemma2_27b_to_2b": ("gemma2", "gemma2"),
    "gpt_oss_120b_to_20b": ("gpt_oss", "gpt_oss"),
    "olmo2_32b_to_1b": ("olmo2", "olmo2"),
}


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_trains_tiny_models_of_its_families(inputs, two, tmp_path, name):
    """At the recipe's layout, as far as two ranks go, and with its losses, optimizer and recomputation."""
    config, tiny = config_of(name), tiny_run(inputs, tmp_path / "run", steps=2, eval_interval=2)
    teacher, student = FAMILIES[name]
    tiny.teacher = TeacherConfig(write_hf(tmp_path / "teacher", teacher))
    tiny.student = StudentConfig(write_hf(tmp_path / "student", student, seed=2, layers=2, width=32))
    tiny.distillation, tiny.parallelism = config.distillation, config.parallelism.on(2)
    tiny.optimizer = replace(config.optimizer, warmup_steps=1)
    tiny.training.recompute = config.training.recompute
    two.run(train, tiny)
    assert [line["step"] for line in metrics(tmp_path / "run") if line["kind"] == "train"] == [1, 2]
