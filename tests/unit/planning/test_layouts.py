"""The layout that is chosen for a number of GPUs: accepted by a run, in memory, and the fastest of those."""

import itertools
from dataclasses import replace

import pytest

from distill_nemo.config import ParallelismConfig, RunConfig, StudentConfig, TeacherConfig
from distill_nemo.runtime.device import setup_device
from tests.unit.models.test_real_models import REAL, write

PAIRS = {  # of one vocabulary each
    "llama": ("meta-llama/Llama-3.1-405B", "meta-llama/Llama-3.2-1B"),
    "qwen2": ("Qwen/Qwen2.5-32B-Instruct", "Qwen/Qwen2.5-7B"),
    "heads that TP=4 does not divide": ("Qwen/Qwen2.5-7B", "Qwen/Qwen2.5-0.5B"),
    "qwen3": ("Qwen/Qwen3-32B", "Qwen/Qwen3-4B-Instruct-2507"),
    "experts to dense": ("Qwen/Qwen3-30B-A3B", "Qwen/Qwen3-4B-Instruct-2507"),
    "experts to experts": ("Qwen/Qwen3-235B-A22B", "Qwen/Qwen3-30B-A3B"),
    "mixtral": ("mistralai/Mixtral-8x22B-v0.1", "mistralai/Mistral-7B-v0.1"),
    "mistral": ("mistralai/Mistral-Small-24B-Base-2501", "mistralai/Mistral-Nemo-Base-2407"),
    "gemma2": ("google/gemma-2-27b", "google/gemma-2-2b"),
    "gemma3": ("google/gemma-3-27b-pt, text", "google/gemma-3-1b-pt"),
    "gpt-oss": ("openai/gpt-oss-120b", "openai/gpt-oss-20b"),
    "phi": ("microsoft/Phi-3-medium-4k-instruct", "microsoft/Phi-3-mini-4k-instruct"),
    "olmo": ("allenai/OLMo-2-0325-32B", "allenai/OLMo-2-0425-1B"),
    "latent attention": ("deepseek-ai/DeepSeek-V3", "deepseek-ai/DeepSeek-V3"),
    "mamba": ("nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-BF16", "nvidia/Nemotron-H-8B-Base-8K"),
    "delta nets": ("Qwen/Qwen3.5-27B, text", "Qwen/Qwen3.5-0.8B, text"),
}
GPUS = ("h100", "h200", "b200")
SIZES = (1, 8, 64, 512)


def planned_pair(path, pair, world_size=1, **changes):
    """Return the run of a teacher and a student of tests/real_models.json."""
    setup_device()
    from distill_nemo.planning.planned import PlannedRun
    from distill_nemo.training.entry import resolve_models

    directories = []
    for role, name in zip(("teacher", "student"), pair, strict=True):
        (path / role).mkdir(parents=True, exist_ok=True)
        directories.append(write(path / role, REAL[name]["config"]))
    config = RunConfig("nowhere", StudentConfig(directories[1]), TeacherConfig(directories[0]))
    config.data.train = ["any"]
    for name, value in changes.items():
        section, field = name.split("__")
        setattr(getattr(config, section), field, value)
    return PlannedRun(*resolve_models(config), world_size)


def chosen(planned, gpu, fixed=()):
    """Return the choice, or the message of a refusal."""
    from distill_nemo.planning.gpus import GPUS
    from distill_nemo.planning.layouts import choose_layout

    try:
        return choose_layout(planned, GPUS[gpu], fixed)
    except ValueError as error:
        return str(error)


def check_choice(planned, gpu):
    """Check a chosen run as a run on that GPU would, with nothing that the search has remembered."""
    from distill_nemo.models.layouts import check_transformer_engine
    from distill_nemo.planning.advice import check_setting
    from distill_nemo.planning.gpus import GPUS
    from distill_nemo.planning.memory import fullest
    from distill_nemo.planning.planned import PlannedRun

    again = PlannedRun(planned.config, planned.models, planned.world_size)
    check_setting(again)
    for model in again.models:
        check_transformer_engine(model, again.config.parallelism)
    assert fullest(again).total <= GPUS[gpu].memory_gb * 1e9


@pytest.mark.parametrize("name", PAIRS)
def test_what_is_chosen_is_accepted_and_fits_and_more_gpus_are_never_refused(tmp_path, name):
    planned = planned_pair(tmp_path, PAIRS[name])
    for gpu in GPUS:
        found = [chosen(replace(planned, world_size=size), gpu) for size in SIZES]
        refused = [isinstance(each, str) for each in found]
        assert refused == sorted(refused, reverse=True) and not refused[-1], found
        for size, choice in zip(SIZES, found, strict=True):
            if isinstance(choice, str):
                assert "the least that would do: " in choice
            else:
                assert choice.planned.world_size == size
                check_choice(choice.planned, gpu)


def test_the_least_that_would_do_is_the_least(tmp_path):
    planned = planned_pair(tmp_path, PAIRS["experts to experts"])
    refusal = chosen(replace(planned, world_size=2), "h100")
    assert refusal.startswith("no layout of 2 x H100 fits 95% of 80 GB; the least that would do: ")
    least = int(refusal.split()[-3])
    assert not isinstance(chosen(replace(planned, world_size=least), "h100"), str)
    assert isinstance(chosen(replace(planned, world_size=least // 2), "h100"), str)


@pytest.mark.parametrize("name", ["experts to dense", "gemma3"])
def test_no_accepted_layout_that_fits_is_faster(tmp_path, name):
    """Against every combination of sizes, accepted by what a run calls."""
    planned = planned_pair(tmp_path, PAIRS[name], 8)
    from distill_nemo.models.layouts import check_transformer_engine
    from distill_nemo.planning.advice import allowed
    from distill_nemo.planning.communication import moving_seconds
    from distill_nemo.planning.compute import time_of
    from distill_nemo.planning.gpus import GPUS, UTILISATION
    from distill_nemo.planning.layouts import SHARE
    from distill_nemo.planning.memory import fullest

    gpu, seconds = GPUS["h100"], {}
    for tensor, pipeline, context, expert in itertools.product((1, 2, 4, 8), repeat=4):
        if context > 2 or 8 % (tensor * pipeline * context):
            continue
        par = ParallelismConfig(tensor, pipeline, None, context, expert, sequence_parallel=tensor > 1)
        for size, recompute in itertools.product((1, 2, 4, 8), (None, "full")):
            training = replace(planned.config.training, micro_batch_size=size, recompute=recompute)
            run = replace(planned, config=replace(planned.config, parallelism=par, training=training))
            try:
                [check_transformer_engine(model, par) for model in run.models]
            except ValueError:
                continue
            if allowed(run) and fullest(run).total <= SHARE * gpu.memory_gb * 1e9:
                time = time_of(run, gpu.bf16_tflops, UTILISATION).step + moving_seconds(run, gpu)
                seconds[tensor, pipeline, context, expert, size, recompute] = time
    best = chosen(planned, "h100").planned.config
    par = best.parallelism
    sizes = (par.tensor_model_parallel_size, par.pipeline_model_parallel_size, par.context_parallel_size)
    mine = (*sizes, par.expert_model_parallel_size, best.training.micro_batch_size, best.training.recompute)
    assert len(seconds) > 20 and seconds[mine] == pytest.approx(min(seconds.values()), rel=1e-12)


def test_fields_that_are_set_stay_and_the_reasons_are_said(tmp_path):
    planned = planned_pair(tmp_path, PAIRS["qwen3"], 64, parallelism__pipeline_model_parallel_size=4)
    fixed = chosen(planned, "h100", ["pipeline_model_parallel_size"])
    free = chosen(planned, "h100")
    assert fixed.planned.config.parallelism.pipeline_model_parallel_size == 4
    assert free.planned.config.parallelism.pipeline_model_parallel_size == 1
    first, *others = free.why.splitlines()
    assert first.startswith("tensor 2 x ") and " GB a GPU, " in first and "of which" in first
    assert [line.partition(":")[0] for line in others][-1] == "the next layout that fits"


def test_mistakes_that_no_layout_mends_are_named(tmp_path):
    planned = planned_pair(tmp_path, PAIRS["qwen3"], 8, optimizer__min_lr=1.0)
    assert "optimizer.min_lr = 1.0 is above" in chosen(planned, "h100")
    planned = planned_pair(tmp_path, PAIRS["qwen3"], 509)
    assert "no layout divides both models and training.global_batch_size = 128" in chosen(planned, "h100")
