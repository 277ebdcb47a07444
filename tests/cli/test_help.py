"""Help pages of the commands, in a process that has imported nothing heavy."""

import inspect
import re
import sys
from dataclasses import fields
from typing import get_type_hints

import pytest

from distill_nemo.config import CutConfig, ParallelismConfig, StoreConfig
from distill_nemo.config_files import sections
from distill_nemo.fields import sections_of
from distill_nemo.job_config import EvaluateConfig
from distill_nemo.models.families import FAMILIES
from distill_nemo.pruning.stages import CompressConfig
from tests.cli.command import BIN, Command, nemo_here, the_recipes, together

EXECUTORS = {
    "local": ["processes"],
    "slurm": "account partition nodes devices gpus cpus_per_device exclusive time stop_seconds retries container_image "
    "container_mounts workdir env setup packager host user job_dir identity port".split(),
    "kubernetes": "image namespace nodes devices gpus cpus memory shared_memory pvc mount pvc_size storage_class env "
    "secrets time stop_seconds node_selector tolerations image_pull_secrets service_account labels runtime "
    "trainer_version context".split(),
}
STORE_SECTIONS = sections_of(get_type_hints(StoreConfig))
FIELDS = {
    "quickstart": ["steps", "teacher_steps", "root", "processes", "seed"],
    "train": [
        "output_dir",
        *(f"{name}.{f.name}" for name, part in sections().items() for f in fields(part)),
        *(f"run.executor.{name}" for names in EXECUTORS.values() for name in names),
    ],
    "plan": ["gpus", "gpu", "utilisation", "transformer_engine"],
    "prepare": [
        *("inputs", "output", "tokenizer", "text_key", "format", "loss_on", "chat_template"),
        *("num_workers", "max_bad_records", "pack", "too_long"),
    ],
    "inspect": ["data", "samples", "tokenizer"],
    "teacher": [
        *(f.name for f in fields(StoreConfig) if f.name not in STORE_SECTIONS),
        *(f"{name}.{f.name}" for name, part in STORE_SECTIONS.items() for f in fields(part)),
        *("gpus", "gpu", "utilisation", "transformer_engine"),
        *("store", "samples", "micro_batch_size"),
    ],
    "export": [
        *("checkpoint", "output", "tokenizer", "copy_untouched", "quantized", "push_to", "push_private"),
        "push_overwrite",
        *(f"parallelism.{f.name}" for f in fields(ParallelismConfig)),
    ],
    "prune": [
        *("model", "output", "data"),
        *(f.name for f in fields(CutConfig)),
        *("split", "sequence_length"),
        *(f"parallelism.{f.name}" for f in fields(ParallelismConfig)),
    ],
    "compress": [
        *("teacher", "output"),
        *(f.name for f in fields(CutConfig)),
        *("rounds", "prompts"),
        *(f"{name}.{f.name}" for name, part in sections(CompressConfig).items() for f in fields(part)),
        *("gpus", "gpu", "utilisation", "transformer_engine"),
    ],
    "convert": ["checkpoint", "output", "allow_pickle"],
    "evaluate": [
        *(f.name for f in fields(EvaluateConfig) if f.name != "parallelism"),
        *(f"parallelism.{f.name}" for f in fields(ParallelismConfig)),
    ],
    "recipes": ["names"],
    "report": ["output", "runs", "prompts", "scores", "follow"],
    "status": ["experiment"],
    "logs": ["experiment", "follow"],
    "cancel": ["experiment"],
}
HEAVY = {"megatron", "modelopt", "transformers", "matplotlib", "pyarrow", "tensorboard", "tokenizers", "safetensors"}


@pytest.mark.parametrize("name", FIELDS)
def test_a_commands_help_names_every_field_and_gives_an_example_that_uses_them(capfd, name):
    page = nemo_here(capfd, name, "--help")
    assert (page.code, page.err) == (0, "")
    assert page.out.startswith(f"Usage: nemo distill {name}")
    assert re.findall(r"^  ([\w.]+): ", page.out, re.M) == FIELDS[name]
    example = re.search(rf"^Example:\n((?:    +nemo distill {name}\b.*(?:\n     .*)*\n)+)", page.out, re.M)
    assert example, page.out
    used = {field for field in re.findall(r"\s([\w.]+)=", example[1]) if not field.startswith("run.")}
    assert used <= set(FIELDS[name] + (FIELDS["train"] if name == "plan" else []))


def test_the_help_of_train_names_every_family(capfd):
    page = " ".join(nemo_here(capfd, "train", "--help").out.split())
    assert f"Families, by model_type of config.json: {', '.join(FAMILIES)} Overrides:" in page


TELL = """\
import atexit, runpy, sys
atexit.register(lambda: print(*sys.modules, file=sys.stderr))
nemo, *sys.argv[1:] = sys.argv[1:]
runpy.run_path(nemo, run_name="__main__") if nemo else __import__("nemo_run.__main__")
"""


def test_the_groups_help_names_every_command_and_imports_nothing_heavy(tmp_path):
    """Nothing heavy beyond NeMo-Run's own imports, which take all the time."""
    page, bare = together(
        lambda: Command([sys.executable, "-c", TELL, BIN / "nemo", "distill", "--help"], tmp_path).ended(),
        lambda: Command([sys.executable, "-c", TELL, ""], tmp_path).ended(),
    )
    assert page.code == 0
    assert re.findall(r"^  (\w+)  +[A-Z]", page.out, re.M) == list(FIELDS)
    assert re.findall(r"^  nemo distill (\w+)", page.out, re.M) == [
        "quickstart",
        "prepare",
        "train",
        "plan",
        "report",
        "evaluate",
    ]
    assert max(map(len, page.out.splitlines())) <= 120
    ours, theirs = set(page.err.split()), set(bare.err.split())
    assert {"recipes", "distill_nemo.cli", "nemo_run.cli.api"} <= ours, "the measurement sees imports"
    assert "nemo_run.cli.api" in theirs and "recipes" not in theirs
    assert {name for name in ours - theirs if name.partition(".")[0] in HEAVY | {"torch"}} == set()


def test_recipes_are_listed_with_sizes_layouts_and_cost(capfd):
    ended = nemo_here(capfd, "recipes")
    assert (ended.code, ended.err) == (0, "")
    lines = ended.out.splitlines()
    listed = dict(re.split(r"  +", line, maxsplit=1) for line in lines[::2])
    recipes = the_recipes()
    assert listed == {
        name: getattr(recipes, name).__doc__.splitlines()[0] for name in sorted([*recipes.__all__, *recipes.RECIPES])
    }
    below = dict(zip(listed, (line.strip() for line in lines[1::2]), strict=True))
    assert listed["gpt_oss_120b_to_20b"] == "gpt-oss-120b (117B parameters) into gpt-oss-20b (20.9B)."
    planned = r"64 x H100: data 64, expert 8; micro batch 2, recompute full; [\d.]+ GB a GPU, \d+ GPU-hours; forward_kl"
    assert re.fullmatch(planned, below["gpt_oss_120b_to_20b"])
    assert below["distil"] == "forward_kl" and below["quickstart_alone"] == "LM loss"


def test_a_recipe_is_shown_whole_by_name_and_a_wrong_name_gives_the_nearest(capfd):
    shown = nemo_here(capfd, "recipes", "llama32_3b_to_1b", "distil")
    assert (shown.code, shown.err) == (0, "")
    recipes = the_recipes()
    assert shown.out == "".join(
        f"{x.__name__}: {inspect.getdoc(x)}\n\n" for x in (recipes.llama32_3b_to_1b, recipes.distil)
    )
    wrong = nemo_here(capfd, "recipes", "lama32")
    assert (wrong.code, wrong.out) == (1, "")
    assert wrong.err.startswith('error: unknown recipe "lama32". Did you mean llama32_3b_to_1b')
