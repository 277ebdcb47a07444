"""Recipes for released models: layouts and figures are the planner's, and scaled-down models of theirs train."""

import itertools
import json
import math
import re
from dataclasses import replace

import pytest
import torch

from distill_nemo.config import StudentConfig, TeacherConfig
from tests.cli.command import the_recipes
from tests.recipes import FILE, config_of, planned_recipe, real_names, rows
from tests.tiny_models import known, random_model
from tests.unit.models.test_real_models import REAL, scaled, write


def pairs():
    the_recipes()
    from recipes.pairs import PAIRS

    return PAIRS


def cuts():
    the_recipes()
    from recipes.cuts import CUTS

    return CUTS


def the_config(name):
    return config_of(getattr(the_recipes(), name)())


@pytest.mark.parametrize("name", [*pairs(), *cuts()])
def test_a_recipes_layout_and_figures_are_the_planners(tmp_path, name):
    config, doc, (row, _) = the_config(name), getattr(the_recipes(), name).__doc__, rows()[name]
    planned = planned_recipe(row, config, tmp_path)
    assert planned == json.loads(FILE.read_text())[name], "make recipes"
    for section in ("parallelism", "training"):
        assert vars(getattr(config, section)).items() >= planned[section].items()
    assert all(f"\n    {line}\n" in doc for line in planned["gpus"])
    assert [line.partition(":")[0] for line in planned["gpus"]] == [
        f"{row.gpus} x {g}" for g in ("H100", "H200", "B200")
    ]


@pytest.mark.parametrize("name", [*pairs(), *cuts()])
def test_a_recipes_text_is_whole(name):
    doc, (row, _) = getattr(the_recipes(), name).__doc__, rows()[name]
    called = re.search(r"^nemo distill (train|compress) (.+?[^\\])$", doc, re.M | re.S)
    assert called[1] == ("compress" if name in cuts() else "train")
    command = called[2].replace("\\\n", " ").split()
    assert command[0] == name
    ranks = [
        int(word.partition("=")[2]) for word in command if re.match(r"run\.executor\.(nodes|devices|processes)=", word)
    ]
    assert torch.tensor(ranks).prod() == row.gpus
    assert re.search(r"^Published: (nothing known for this pair|.*(arXiv:|github\.com)).*", doc, re.M | re.S)
    assert re.search(r"^Expected: .+\.$", doc, re.M | re.S)


def test_planned_figures_are_of_these_recipes():
    assert json.loads(FILE.read_text()).keys() == {*pairs(), *cuts()}


def trained(runs):
    """Return the means of a step of every run, from random weights. All have one layout."""
    from distill_nemo.runtime.device import setup_device
    from distill_nemo.runtime.process_groups import process_groups

    device, means = setup_device(), {}
    from distill_nemo.runtime.seed import seed_everything
    from distill_nemo.training.entry import resolve_models
    from distill_nemo.training.loop import Loop
    from distill_nemo.training.setup import build_train_state

    with process_groups(next(iter(runs.values())).parallelism):
        for name, run in runs.items():
            seed_everything(0)
            run, models = resolve_models(run)
            random = {role: replace(model, source=None) for role, model in models._asdict().items()}
            state = build_train_state(run, models._replace(**random), torch.float32, load_weights=True)
            tokens = torch.randint(500, (run.training.micro_batch_size, run.data.sequence_length))
            batch = {"tokens": tokens, "labels": tokens, "loss_mask": torch.ones(tokens.shape)}
            batch["position_ids"] = torch.arange(tokens.shape[1]).expand_as(tokens)
            means[name] = Loop(run, state, (None, None), device).step([itertools.repeat(batch)])
    return means


@pytest.mark.long
def test_scaled_down_models_of_every_recipe_take_a_step(two, tmp_path):
    """At the recipe's layout, as far as two ranks go, with its losses, optimizer and recomputation."""
    by_layout = {}
    for name, pair in pairs().items():
        config, models = the_config(name), [REAL[model]["config"] for model in real_names(pair)]
        directories = [tmp_path / name / role for role in ("teacher", "student")]
        for directory, model in zip(directories, models, strict=True):
            directory.mkdir(parents=True)
            write(directory, scaled(model))
        config.teacher, config.student = TeacherConfig(str(directories[0])), StudentConfig(str(directories[1]))
        config.parallelism, config.data.sequence_length = config.parallelism.on(2), 16
        config.training.micro_batch_size, config.training.global_batch_size = 1, 4
        if all(known(model["model_type"]) for model in models):
            by_layout.setdefault(str(config.parallelism), {})[name] = config
    assert len(by_layout) > 2
    for runs in by_layout.values():
        for means in two.run(trained, runs):
            assert means.keys() == runs.keys()
            for name, found in means.items():
                assert math.isfinite(found["kd_loss"]) and found["grad_norm"] > 0, (name, found)


def cut_first(config):
    """Cut the student of a compression."""
    from distill_nemo.pruning.entry import prune

    prune(**vars(config.cut(1)))


def test_scaled_down_teachers_of_every_cut_are_cut_and_take_a_step(inputs, one, tmp_path):
    """By the same fractions of every size."""
    from transformers import AutoConfig

    for name, cut in cuts().items():
        config, real = the_config(name), REAL[cut.teacher]["config"]
        small, config.teacher, config.output = scaled(real), str(tmp_path / name), str(tmp_path / "output" / name)
        (tmp_path / name).mkdir()
        write(tmp_path / name, small)
        random_model(AutoConfig.from_pretrained(config.teacher)).save_pretrained(config.teacher)
        write(tmp_path / name, small)  # as the Hub spells it
        for field, size in cut.sizes.items():
            theirs = {"num_layers": "num_hidden_layers", "ffn_hidden_size": "intermediate_size"}.get(field, field)
            setattr(config, field, small[theirs] * size // real[theirs] // 4 * 4)
        config.parallelism, config.data.sequence_length = config.parallelism.on(1), 16
        config.data.train, config.samples, config.held_out_samples = [str(inputs / "train")], 4, 2
        config.training.micro_batch_size, config.training.global_batch_size = 1, 4
        one.run(cut_first, config)
        record = json.loads((tmp_path / "output" / name / "pruned/pruning.json").read_text())
        assert record["result"]["sizes"].items() >= {field: vars(config)[field] for field in cut.sizes}.items()
        for means in one.run(trained, {name: config.run(1)}):
            assert math.isfinite(means[name]["kd_loss"]) and means[name]["grad_norm"] > 0, name
