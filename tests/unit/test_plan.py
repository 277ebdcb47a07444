"""What `nemo distill plan` computes: parameters against models that are built, memory against training that is measured.

Operations and times are checked against counts by hand and by torch.
"""

from dataclasses import replace

import pytest
import torch

from benchmarks.memory import Case, compared
from distill_nemo.config import ParallelismConfig, RunConfig, StudentConfig, TeacherConfig

SHAPE = {"num_layers": 3, "hidden_size": 64, "ffn_hidden_size": 96, "num_attention_heads": 4, "vocab_size": 507}
EXPERTS = {"family": "qwen3_moe", "num_experts": 4, "num_experts_per_tok": 2, "moe_ffn_hidden_size": 48}
DIFFERING = [
    {"attention": {"num_query_groups": 2}, "mlp": {"ffn_hidden_size": 64}},
    {"attention": {"no_op": True}, "mlp": {"ffn_hidden_size": 96}},
    {"attention": {"num_query_groups": 4}, "mlp": {"no_op": True}},
]
MODELS = {
    "llama": {},
    "grouped queries": {"num_query_groups": 2, "kv_channels": 24},
    "tied": {"tie_word_embeddings": True},
    "bias": {"family": "qwen2", "num_query_groups": 2},
    "qk-norm": {"family": "qwen3", "kv_channels": 24},
    "experts": EXPERTS,
    "layers that differ": {"block_configs": DIFFERING},
}
LAYOUTS = {
    "one": (1, {}),
    "tp2": (2, {"tensor_model_parallel_size": 2, "sequence_parallel": True}),
    "pp2": (2, {"pipeline_model_parallel_size": 2}),
    "ep2": (2, {"expert_model_parallel_size": 2}),
}


def built(models, sizes):
    """By model: parameters of this rank's student and teacher, and what a plan says of them."""
    from distill_nemo.runtime.device import setup_device
    from distill_nemo.runtime.process_groups import process_groups

    setup_device()
    from megatron.core import parallel_state

    from distill_nemo.planning.setting import Setting
    from distill_nemo.runtime.seed import seed_everything
    from distill_nemo.training.entry import resolve_models
    from distill_nemo.training.setup import build_chunks

    parallelism, found = ParallelismConfig(**sizes), {}
    with process_groups(parallelism):
        seed_everything(0)
        rank, world = parallel_state.get_pipeline_model_parallel_rank(), torch.distributed.get_world_size()
        for name, fields in models.items():
            student = StudentConfig(**{**SHAPE, **fields})
            run = RunConfig("nowhere", student, TeacherConfig(**{**SHAPE, **fields, "hidden_size": 128}))
            run.parallelism, run.data.sequence_length = parallelism, 32
            run = resolve_models(run)
            (chunk,) = build_chunks(run, torch.float32, load_weights=True)
            teacher = sum(p.numel() for p in chunk.teacher_model.parameters())
            trained = sum(p.numel() for p in chunk.parameters() if p.requires_grad)
            setting = Setting(run, world, on_gpu=False, transformer_engine=False)
            found[name] = (trained, teacher), (setting.student(rank).total, setting.teacher(rank).total)
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
def test_parameters_are_those_of_the_models_that_are_built(one, two, layout):
    processes, sizes = LAYOUTS[layout]
    models = {name: fields for name, fields in MODELS.items() if layout != "ep2" or fields is EXPERTS}
    for found in (one if processes == 1 else two).run(built, models, sizes):
        assert found.keys() == models.keys()
        for name, (theirs, ours) in found.items():
            assert ours == theirs, name


SMALL = Case(vocab=2048, student=(2, 128), teacher=(2, 256), length=128)
CASES = {
    "fused": SMALL,
    "whole logits": replace(SMALL, fields={"distillation.fused_linear": False}, vocab=8192),
    "recompute=full": replace(SMALL, fields={"training.recompute": "full"}),
    "recompute=selective": replace(SMALL, fields={"training.recompute": "selective"}),
    "micro batch 1": replace(SMALL, micro_batch=1),
    "micro batch 4": replace(SMALL, micro_batch=4),
    "experts": replace(SMALL, family="qwen3_moe"),
    "qk-norm, no teacher": replace(SMALL, family="qwen3", teacher=None),
    "data": replace(SMALL, ranks=2),
    "tensor and sequence": replace(
        SMALL, fields={"parallelism.tensor_model_parallel_size": 2, "parallelism.sequence_parallel": True}, ranks=2
    ),
    "pipeline": replace(SMALL, fields={"parallelism.pipeline_model_parallel_size": 2}, ranks=2),
    "context": replace(SMALL, fields={"parallelism.context_parallel_size": 2}, ranks=2),
}


@pytest.mark.parametrize("case", CASES)
def test_memory_is_within_15_percent_of_what_training_takes(one, two, case):
    ours, theirs = compared(CASES[case], one if CASES[case].ranks == 1 else two)
    assert abs(ours / theirs - 1) < 0.15, (ours, theirs)
