"""Plans against models that are built, training that is measured, and operations counted by torch."""

from dataclasses import replace

import pytest
import torch

from benchmarks.memory import Case, compared, predicted
from distill_nemo.config import ParallelismConfig, RunConfig, StudentConfig, TeacherConfig
from distill_nemo.runtime.device import setup_device
from tests.stores import manifest_of, write_store
from tests.tiny_models import known

SHAPE = {"num_layers": 3, "hidden_size": 64, "ffn_hidden_size": 96, "num_attention_heads": 4, "vocab_size": 507}
EXPERTS = {"family": "qwen3_moe", "num_experts": 4, "num_experts_per_tok": 2, "moe_ffn_hidden_size": 48}
MAMBA = {"mamba_num_heads": 8, "mamba_head_dim": 12, "n_groups": 2, "ssm_state_size": 16, "chunk_size": 32}
MAMBA_LAYERS = {"hybrid_override_pattern": "M-M", **MAMBA}
SHARED = {"shared_expert_intermediate_size": 768}
GROUPED = {"n_group": 2, "n_shared_experts": 3}
DIFFERING = [
    {"attention": {"num_query_groups": 2}, "mlp": {"ffn_hidden_size": 64}},
    {"attention": {"no_op": True}, "mlp": {"ffn_hidden_size": 96}},
    {"attention": {"num_query_groups": 4}, "mlp": {"no_op": True}},
]
DENSE_FIRST = {"first_k_dense_replace": 1, "n_group": 1, "topk_group": 1}
LATENT = DENSE_FIRST | {"q_lora_rank": 24, "kv_lora_rank": 20, "qk_nope_head_dim": 12, "qk_rope_head_dim": 8}
DELTA_NETS = {  # in two layers of three
    "full_attention_interval": 3,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 16,
    "linear_num_value_heads": 4,
    "linear_value_head_dim": 24,
}
MODELS = {
    "llama": {},
    "grouped queries": {"num_query_groups": 2, "kv_channels": 24},
    "tied": {"tie_word_embeddings": True},
    "bias": {"family": "qwen2", "num_query_groups": 2},
    "qk-norm": {"family": "qwen3", "kv_channels": 24},
    "norms after, over all heads": {"family": "olmo2", "num_query_groups": 2},
    "experts": EXPERTS,
    "shared experts, dense layer first": EXPERTS | {"family": "glm4_moe", "family_fields": GROUPED},
    "gated shared expert": EXPERTS | {"family": "qwen2_moe", "family_fields": {"mlp_only_layers": [1]}},
    "experts of Mixtral": EXPERTS | {"family": "mixtral"},
    "experts, norms over all heads": EXPERTS | {"family": "olmoe"},
    "layers without rotary embedding": {"family": "smollm3", "family_fields": {"no_rope_layer_interval": 2}},
    "rotary embedding of a part": {
        "family": "phi3",
        "rope_scaling": {"rope_type": "default", "partial_rotary_factor": 0.5},
    },
    "norms on both sides": {"family": "gemma3_text", "kv_channels": 24},
    "latent attention": EXPERTS | {"family": "deepseek_v3", "kv_channels": 10, "family_fields": LATENT},
    "latent attention, queries without a latent": EXPERTS
    | {"family": "deepseek_v3", "family_fields": LATENT | {"q_lora_rank": None}},
    "Mamba": {"family": "nemotron_h", "family_fields": {"hybrid_override_pattern": "M*-", **MAMBA}},
    "capped scores": {"family": "gemma2", "kv_channels": 24},
    "sinks, experts with biases": EXPERTS
    | {"family": "gpt_oss", "rope_scaling": {"rope_type": "linear", "factor": 2.0}},
    "Mamba and experts": {
        **EXPERTS,
        "family": "nemotron_h",
        "family_fields": {"hybrid_override_pattern": "ME*", "moe_shared_expert_intermediate_size": 40, **MAMBA},
    },
    "delta nets": {"family": "qwen3_5_text", "kv_channels": 24, "family_fields": DELTA_NETS},
    "layers that differ": {"block_configs": DIFFERING},
}
if not known("qwen3_5_text"):
    del MODELS["delta nets"]
LAYOUTS = {
    "one": (1, {}),
    "tp2": (2, {"tensor_model_parallel_size": 2, "sequence_parallel": True}),
    "pp2": (2, {"pipeline_model_parallel_size": 2}),
    "ep2": (2, {"expert_model_parallel_size": 2}),
}


def built(models, sizes):
    """Return, by model, parameters of this rank's student and teacher, and a plan's prediction."""
    from distill_nemo.runtime.process_groups import process_groups

    setup_device()
    from megatron.core import parallel_state

    from distill_nemo.planning.planned import PlannedRun
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
            run, architectures = resolve_models(run)
            (chunk,) = build_chunks(run, architectures, torch.float32, load_weights=True)
            teacher = sum(p.numel() for p in chunk.teacher_model.parameters())
            trained = sum(p.numel() for p in chunk.parameters() if p.requires_grad)
            planned = PlannedRun(run, architectures, world, on_gpu=False, transformer_engine=False)
            found[name] = (trained, teacher), (planned.student(rank).total, planned.teacher(rank).total)
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
def test_parameters_are_those_of_the_models_that_are_built(one, two, layout):
    processes, sizes = LAYOUTS[layout]
    models = {name: fields for name, fields in MODELS.items() if layout != "ep2" or "num_experts" in fields}
    if layout == "tp2":
        del models["sinks, experts with biases"]  # which are not split
    for found in (one if processes == 1 else two).run(built, models, sizes):
        assert found.keys() == models.keys()
        for name, (theirs, ours) in found.items():
            assert ours == theirs, name


SMALL = Case(vocab=2048, student=(2, 128), teacher=(2, 256), length=128)
WIDE_LATENT = DENSE_FIRST | {"q_lora_rank": 96, "kv_lora_rank": 64, "qk_nope_head_dim": 32, "qk_rope_head_dim": 16}
LATENT_CASE = replace(
    SMALL,
    family="deepseek_v3",
    groups=1,
    teacher=None,
    fields={"student.family_fields": WIDE_LATENT},
)
CASES = {
    "fused": SMALL,
    "whole logits": replace(SMALL, fields={"distillation.fused_linear": False}, vocab=8192),
    "recompute=full": replace(SMALL, fields={"training.recompute": "full"}),
    "recompute=selective": replace(SMALL, fields={"training.recompute": "selective"}),
    "micro batch 1": replace(SMALL, micro_batch=1),
    "micro batch 4": replace(SMALL, micro_batch=4),
    "experts": replace(SMALL, family="qwen3_moe"),
    "shared experts, dense layer first": replace(
        SMALL, family="glm4_moe", fields={f"{role}.family_fields": GROUPED for role in ("student", "teacher")}
    ),
    "gated shared expert": replace(
        SMALL, family="qwen2_moe", teacher=None, fields={"student.family_fields": {"mlp_only_layers": [0]}}
    ),
    "gated shared expert, tensor and sequence": replace(
        SMALL,
        family="qwen2_moe",
        fields={
            "student.family_fields": SHARED,
            "teacher.family_fields": SHARED,
            "parallelism.tensor_model_parallel_size": 2,
            "parallelism.sequence_parallel": True,
        },
        ranks=2,
    ),
    "norms after, over all heads": replace(SMALL, family="olmo2"),
    "latent attention": LATENT_CASE,
    "latent attention, wide values": replace(LATENT_CASE, fields=LATENT_CASE.fields | {"student.kv_channels": 96}),
    "latent attention, wide heads, recompute=selective": replace(
        LATENT_CASE,
        length=512,
        vocab=512,
        fields={
            "student.family_fields": WIDE_LATENT | {"qk_nope_head_dim": 128, "qk_rope_head_dim": 64},
            "student.kv_channels": 128,
            "training.recompute": "selective",
        },
    ),
    "latent attention, tensor and sequence": replace(
        LATENT_CASE,
        fields=LATENT_CASE.fields
        | {"parallelism.tensor_model_parallel_size": 2, "parallelism.sequence_parallel": True},
        ranks=2,
    ),
    "latent attention, recompute=full": replace(
        LATENT_CASE, fields=LATENT_CASE.fields | {"training.recompute": "full"}
    ),
    "sliding windows": replace(
        SMALL,
        family="mistral",
        length=1024,
        micro_batch=1,
        teacher=None,
        fields={"student.family_fields": {"sliding_window": 128}},
    ),
    "teacher offloaded": replace(SMALL, fields={"distillation.offload_teacher": True}, teacher=(6, 256)),
    "qk-norm, no teacher": replace(SMALL, family="qwen3", teacher=None),
    "layers without rotary embedding": replace(SMALL, family="smollm3", student=(4, 128)),
    "norms on both sides, softcap": replace(SMALL, family="gemma2", vocab=8192),
    "whole logits, softcap": replace(
        SMALL,
        family="gemma2",
        fields={"distillation.fused_linear": False, "distillation.lm_weight": 0.3},
        vocab=8192,
    ),
    "sinks, experts with biases": replace(SMALL, family="gpt_oss", length=512, micro_batch=1),
    "capped scores": replace(SMALL, family="gemma2", length=512, micro_batch=1),
    "capped scores, no teacher": replace(SMALL, family="gemma2", length=512, teacher=None, vocab=512),
    "softcap, no teacher": replace(SMALL, family="gemma2", teacher=None, vocab=8192),
    "Mamba": replace(
        SMALL,
        family="nemotron_h",
        student=(3, 128),
        teacher=(3, 256),
        fields={
            "student.family_fields": {"hybrid_override_pattern": "M*-", **MAMBA},
            "teacher.family_fields": {"hybrid_override_pattern": "MM-", **MAMBA},
        },
    ),
    "delta nets": replace(
        SMALL,
        family="qwen3_5_text",
        student=(3, 128),
        fields={"student.family_fields": DELTA_NETS, "teacher.family_fields": DELTA_NETS},
    ),
    "data": replace(SMALL, ranks=2),
    "tensor and sequence": replace(
        SMALL, fields={"parallelism.tensor_model_parallel_size": 2, "parallelism.sequence_parallel": True}, ranks=2
    ),
    "pipeline": replace(SMALL, fields={"parallelism.pipeline_model_parallel_size": 2}, ranks=2),
    "context": replace(SMALL, fields={"parallelism.context_parallel_size": 2}, ranks=2),
}


@pytest.mark.parametrize("case", [name for name in CASES if name != "delta nets" or known("qwen3_5_text")])
def test_memory_is_within_5_percent_of_what_training_takes(one, two, case):
    ours, theirs = compared(CASES[case], one if CASES[case].ranks == 1 else two)
    assert abs(ours / theirs - 1) < 0.05, (ours, theirs)


@pytest.mark.parametrize("codec", ["sampled", "hidden"])
def test_memory_of_training_from_a_store_is_planned(one, codec, tmp_path):
    num = {"sampled": 50, "hidden": 256}[codec]
    write_store(tmp_path, manifest_of(codec, num=num, vocab_size=2048, sequence_length=128, num_windows=2))
    case = replace(SMALL, teacher=None, fields={"data.train": [str(tmp_path)]})
    ours, theirs = compared(case, one)
    assert abs(ours / theirs - 1) < 0.05, (ours, theirs)
    assert ours < 0.9 * max(predicted(SMALL))


def counted_flops(case):
    """Return torch's count of operations in a forward pass of the student, which leaves out core attention on a CPU."""
    from distill_nemo.runtime.process_groups import process_groups

    setup_device()
    from torch.utils.flop_counter import FlopCounterMode

    from distill_nemo.runtime.seed import seed_everything
    from distill_nemo.training.entry import resolve_models
    from distill_nemo.training.setup import build_chunks

    run, models = resolve_models(case.config())
    with process_groups(run.parallelism), torch.no_grad():
        seed_everything(0)
        (model,) = build_chunks(run, models, torch.float32, load_weights=True)
        tokens = torch.zeros(case.micro_batch, case.length, dtype=torch.long)
        with FlopCounterMode(display=False) as counter:
            model(tokens, torch.arange(case.length).expand_as(tokens), None)
        return counter.get_total_flops()


@pytest.mark.parametrize("family", ["llama", "qwen3_moe", "qwen2_moe"])
def test_operations_are_those_that_torch_counts(one, family):
    setup_device()
    from distill_nemo.planning.compute import all_work, stage_flops
    from distill_nemo.planning.planned import PlannedRun
    from distill_nemo.training.entry import resolve_models

    case = replace(SMALL, family=family, teacher=None)
    planned = PlannedRun(*resolve_models(case.config()), 1)
    layers, core, head = stage_flops(planned, planned.models.student, 0, True)
    tokens = case.micro_batch * case.length
    (theirs,) = one.run(counted_flops, case)
    # Torch counts all of attention's two products or, before 2.15, none.
    assert theirs in [tokens * (layers - core + head), tokens * (layers + core + head)]
    assert core == 2 * 2 * 2 * case.length * 128 / 2  # two layers, two products of all positions, half of them
    work = all_work(planned)
    assert (work.student, work.recompute, work.teacher) == (3 * (layers + head), 0, 0)
    assert all_work(planned.with_fields(training__recompute="full")).recompute == layers


def test_operations_of_mamba_are_those_that_torch_counts(one):
    setup_device()
    from distill_nemo.planning.compute import stage_flops
    from distill_nemo.planning.planned import PlannedRun
    from distill_nemo.training.entry import resolve_models

    case = replace(CASES["Mamba"], teacher=None, fields={"student.family_fields": MAMBA_LAYERS})
    planned = PlannedRun(*resolve_models(case.config()), 1)
    layers, core, head = stage_flops(planned, planned.models.student, 0, True)
    assert core == 0
    assert one.run(counted_flops, case) == [case.micro_batch * case.length * (layers + head)]


@pytest.mark.parametrize("rank", [96, None])
def test_operations_of_latent_attention_are_those_that_torch_counts(one, rank):
    setup_device()
    from distill_nemo.planning.compute import stage_flops
    from distill_nemo.planning.planned import PlannedRun
    from distill_nemo.training.entry import resolve_models

    own = WIDE_LATENT | {"q_lora_rank": rank}
    case = replace(LATENT_CASE, fields={"student.family_fields": own, "student.kv_channels": 48})  # no padding
    planned = PlannedRun(*resolve_models(case.config()), 1)
    layers, core, head = stage_flops(planned, planned.models.student, 0, True)
    (theirs,) = one.run(counted_flops, case)
    tokens = case.micro_batch * case.length
    assert theirs in [tokens * (layers - core + head), tokens * (layers + core + head)]
    assert core == 2 * 2 * 4 * (48 + 48) * case.length / 2  # two layers, two products of 4 heads, half the positions


@pytest.mark.skipif(not known("qwen3_5_text"), reason="megatron-core 0.19 or transformers 5 is missing")
def test_operations_of_delta_nets_are_those_that_torch_counts(one):
    setup_device()
    from distill_nemo.planning.compute import stage_flops
    from distill_nemo.planning.planned import PlannedRun
    from distill_nemo.training.entry import resolve_models

    fields = {"student.family_fields": DELTA_NETS}
    case = replace(SMALL, family="qwen3_5_text", student=(3, 128), teacher=None, fields=fields)
    planned = PlannedRun(*resolve_models(case.config()), 1)
    layers, core, head = stage_flops(planned, planned.models.student, 0, True)
    triangular = 2 * 64 * (4 * 16 + 4 * 24)  # two layers, a chunk's columns below the diagonal; torch counts none
    tokens = case.micro_batch * case.length
    (theirs,) = one.run(counted_flops, case)
    apart = [theirs / (tokens * (layers - triangular + x + head)) - 1 for x in (-core, core)]
    assert min(map(abs, apart)) < 1e-3  # the convolution's padding, and the first chunk without a state


@pytest.mark.parametrize("window", [None, 4096, 32, 1])
def test_a_window_counts_the_keys_that_a_token_sees(window):
    setup_device()
    from distill_nemo.planning.compute import all_work
    from distill_nemo.planning.planned import PlannedRun
    from distill_nemo.training.entry import resolve_models

    def work(**change):
        fields = {"student.family_fields": {"sliding_window": window}}
        case = replace(SMALL, **{"family": "mistral", "fields": fields, "teacher": None, **change})
        return all_work(PlannedRun(*resolve_models(case.config()), 1)).student

    seen = sum(min(i + 1, window or 128) for i in range(128)) / 128 - 0.5
    fewer = 3 * 2 * 4 * (64 - seen) * 128  # two layers of width 128, backward is two forward passes
    assert work() == pytest.approx(work(family="llama", fields={}) - fewer, rel=1e-12)


def test_time_counts_the_pipelines_ends_and_its_slowest_rank():
    setup_device()
    from distill_nemo.planning.compute import rank_work, time_of
    from distill_nemo.planning.planned import PlannedRun
    from distill_nemo.training.entry import resolve_models

    case = replace(
        SMALL, student=(4, 128), fields={"parallelism.pipeline_model_parallel_size": 2, "training.steps": 10}
    )
    run, models = resolve_models(case.config())
    run.training.global_batch_size = 8 * case.micro_batch
    planned = PlannedRun(run, models, 2)
    works = [rank_work(planned, rank).total for rank in (0, 1)]
    assert works[1] > works[0]  # because of the output layers
    time = time_of(planned, tflops=1e-6, utilisation=0.5)
    one = works[1] * case.micro_batch * case.length / 0.5e6  # seconds of a micro batch on the slowest rank
    assert time.step == pytest.approx((8 + 1) * one)
    assert time.training == pytest.approx(10 * time.step)
    assert time.idle == pytest.approx(1 - 8 * (works[0] + works[1]) / 2 / (9 * works[1]))


def test_a_published_models_parameters_and_what_would_fit():
    setup_device()
    from distill_nemo.planning.advice import what_would_fit
    from distill_nemo.planning.memory import fullest
    from distill_nemo.planning.parameters import total_parameters
    from distill_nemo.planning.planned import PlannedRun
    from distill_nemo.training.entry import resolve_models

    shared = {"vocab_size": 128256, "num_query_groups": 8, "tie_word_embeddings": True, "ffn_hidden_size": 8192}
    student = {"num_layers": 16, "hidden_size": 2048, "num_attention_heads": 32, "kv_channels": 64}
    teacher = {"num_layers": 28, "hidden_size": 3072, "num_attention_heads": 24, "kv_channels": 128}
    run = RunConfig("nowhere", StudentConfig(**student, **shared), TeacherConfig(**teacher, **shared))
    run.data.train, run.training.micro_batch_size = ["any"], 8
    run, models = resolve_models(run)
    assert total_parameters(models.student) == 1_235_814_400  # Llama 3.2 1B and 3B, according to their model cards
    assert total_parameters(models.teacher) == 3_212_749_824
    planned = PlannedRun(run, models, 8)
    needed = fullest(planned).total
    assert what_would_fit(planned, needed)[0] == "training.micro_batch_size=4"
    assert what_would_fit(planned, needed / 3)[1] == "training.recompute=full distillation.offload_teacher=True"
    fitting = what_would_fit(planned, needed / 4)
    assert fitting and all("tensor_model_parallel_size" in one for one in fitting)
    assert what_would_fit(planned, 1e9) == []
