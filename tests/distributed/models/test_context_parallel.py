"""Context parallelism without Transformer Engine: attention, logits and gradients against whole sequences in fp64."""

import functools

import pytest
import torch

from distill_nemo.config import ParallelismConfig, StudentConfig
from tests.spawn import Gloo
from tests.tiny_models import write_hf

FAMILIES = ("llama", "llama_tied", "ministral", "phi3", "qwen3", "smollm3", "yarn_rope")
SEQUENCE, BATCH, VOCAB = 32, 2, 507
LAYOUTS = {
    "cp2": (2, {"context_parallel_size": 2}),
    "cp4": (4, {"context_parallel_size": 4}),
    "tp2_cp2": (4, {"tensor_model_parallel_size": 2, "context_parallel_size": 2}),
    "tp2_sequence_parallel_cp2": (
        4,
        {"tensor_model_parallel_size": 2, "sequence_parallel": True, "context_parallel_size": 2},
    ),
}


@pytest.fixture(scope="module")
def groups(one, two):
    """Return the processes by their number."""
    with Gloo(4, init=False, timeout=200) as four:
        yield {1: one, 2: two, 4: four}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return {name: StudentConfig(checkpoint=write_hf(root / name, name, layers=2)) for name in FAMILIES}


def relative_error(got, expected):
    return float((got.double() - expected.double()).abs().max() / expected.double().abs().max())


def pieces(rank, size, length=SEQUENCE):
    """Return the positions that a context-parallel rank holds, in its order."""
    every = torch.arange(length).view(2 * size, -1)
    return torch.cat([every[rank], every[2 * size - 1 - rank]])


# -- the batch


def split(parallelism, batch):
    from distill_nemo.runtime.process_groups import process_groups

    with process_groups(parallelism):
        from megatron.core import parallel_state

        from distill_nemo.models.layers.context_parallel import split_batch

        before = {name: tensor.clone() for name, tensor in batch.items()}
        parts = split_batch(batch)
        assert all(torch.equal(batch[name], tensor) for name, tensor in before.items())
        return parallel_state.get_context_parallel_rank(), parts


def test_each_rank_gets_its_two_pieces_of_every_field(groups):
    batch = {
        "tokens": torch.arange(2 * SEQUENCE).view(2, -1),
        "position_ids": torch.arange(SEQUENCE).expand(2, -1),
        "loss_mask": torch.rand(2, SEQUENCE),
    }
    for rank, parts in groups[2].run(split, ParallelismConfig(context_parallel_size=2), batch):
        assert parts.keys() == batch.keys()
        for name, part in parts.items():
            assert torch.equal(part, batch[name][:, pieces(rank, 2)])
            assert part.dtype == batch[name].dtype


def test_without_context_parallelism_the_batch_is_left_alone(groups):
    _, parts = groups[1].run(split, ParallelismConfig(), {"tokens": torch.arange(5)[None]})[0]
    assert torch.equal(parts["tokens"], torch.arange(5)[None])


def test_a_length_that_cannot_be_cut_is_refused(groups):
    with pytest.raises(ValueError, match=r"sequence_length: tokens has 6 tokens .*context_parallel_size = 4"):
        groups[2].run(split, ParallelismConfig(context_parallel_size=2), {"tokens": torch.ones(1, 6)})


# -- attention alone


def attention_inputs(dtype=torch.float64, heads=4, groups=2, channels=8):
    """Return query, key and value of the whole sequence, and the gradient of the output."""
    generator = torch.Generator().manual_seed(3)
    shapes = [(SEQUENCE, BATCH, n, channels) for n in (heads, groups, groups)] + [(SEQUENCE, BATCH, heads * channels)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def attention_reference(scale, window=SEQUENCE):
    """Return output and gradients of query, key and value, in fp64. A token sees `window` tokens, itself included."""
    *inputs, upstream = attention_inputs()
    q, k, v = (x.requires_grad_() for x in inputs)
    k4, v4 = (x[:, :, [0, 0, 1, 1]] for x in (k, v))
    scores = torch.einsum("ibnd,jbnd->bnij", q, k4) * scale
    ago = torch.arange(SEQUENCE)[:, None] - torch.arange(SEQUENCE)[None]
    unseen = (ago < 0) | (ago >= window)
    output = torch.einsum("bnij,jbnd->ibnd", scores.masked_fill(unseen, -torch.inf).softmax(-1), v4).flatten(2)
    output.backward(upstream)
    return [output.detach(), q.grad, k.grad, v.grad]


def attend(size, dtype, scale=None, plain=False, window=None, block=256, **fields):
    """Return (rank, output and gradients of query, key and value) for this rank's positions."""
    from distill_nemo.models.layers import context_parallel
    from distill_nemo.runtime.process_groups import process_groups

    context_parallel._window_mask.cache_clear()
    context_parallel.QUERY_BLOCK = block
    if window is not None:
        fields |= {"window_size": (window - 1, 0), "window_attn_skip_freq": [1]}
    with process_groups(ParallelismConfig(context_parallel_size=size)):
        from megatron.core import parallel_state
        from megatron.core.transformer import TransformerConfig
        from megatron.core.transformer.dot_product_attention import DotProductAttention
        from megatron.core.transformer.enums import AttnMaskType

        from distill_nemo.models.layers.context_parallel import CausalAttention
        from distill_nemo.runtime.seed import seed_everything

        seed_everything(0)  # DotProductAttention forks Megatron's random state, dropout or not
        config = TransformerConfig(
            num_layers=1, hidden_size=32, num_attention_heads=4, num_query_groups=2, context_parallel_size=size,
            masked_softmax_fusion=False, **{"attention_dropout": 0.0, **fields},
        )  # fmt: skip
        kind = DotProductAttention if plain else CausalAttention
        attention = kind(config, 1, AttnMaskType.causal, "self", softmax_scale=scale)
        rank = parallel_state.get_context_parallel_rank()
        *inputs, upstream = (x[pieces(rank, size)] for x in attention_inputs(dtype))
        q, k, v = (x.clone().requires_grad_() for x in inputs)
        output = attention(q, k, v, None)
        output.backward(upstream)
        return rank, [output.detach(), q.grad, k.grad, v.grad]


def together(size, results):
    """Return the ranks' rows in sequence order."""
    whole = [torch.empty(SEQUENCE, *x.shape[1:], dtype=x.dtype) for x in results[0][1]]
    for rank, parts in results:
        for target, part in zip(whole, parts, strict=True):
            target[pieces(rank, size)] = part
    return whole


@pytest.mark.parametrize("dtype, allowed", [(torch.float64, 1e-14), (torch.float32, 1e-6), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_attention_and_its_gradients_are_those_of_the_whole_sequence(groups, size, dtype, allowed):
    got = together(size, groups[size].run(attend, size, dtype))
    for name, value, expected in zip("oqkv", got, attention_reference(8**-0.5), strict=True):
        assert value.dtype == dtype
        assert relative_error(value, expected) < allowed, name


def test_the_softmax_scale_given_is_the_one_used(groups):
    got = together(2, groups[2].run(attend, 2, torch.float64, 0.1))
    assert relative_error(got[0], attention_reference(0.1)[0]) < 1e-14


def test_one_rank_attends_as_megatron_does(groups):
    ours, megatrons = (groups[1].run(attend, 1, torch.float32, None, plain)[0][1] for plain in (False, True))
    for got, expected in zip(ours, megatrons, strict=True):
        assert relative_error(got, expected) < 2e-6


@pytest.mark.parametrize("window", [2, 5, 8, 13, 31, 32, 40])
@pytest.mark.parametrize("block", [6, 256])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_a_token_sees_its_window_and_no_more(groups, size, block, window):
    got = together(size, groups[size].run(functools.partial(attend, window=window, block=block), size, torch.float64))
    for name, value, expected in zip("oqkv", got, attention_reference(8**-0.5, window), strict=True):
        assert relative_error(value, expected) < 1e-14, name


def test_a_window_as_long_as_the_sequence_is_none(groups):
    none, whole = (groups[2].run(functools.partial(attend, window=w), 2, torch.float32) for w in (None, SEQUENCE))
    for (_, ours), (_, theirs) in zip(none, whole, strict=True):
        assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))


def saved_by_attention(length, window):
    """Return the bytes that the attention of one head keeps for backward, beyond query, key and value."""
    from distill_nemo.runtime.process_groups import process_groups

    with process_groups(ParallelismConfig()):
        from megatron.core.transformer import TransformerConfig
        from megatron.core.transformer.enums import AttnMaskType

        from distill_nemo.models.layers.context_parallel import CausalAttention

        fields = {} if window is None else {"window_size": (window - 1, 0), "window_attn_skip_freq": [1]}
        config = TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=1, attention_dropout=0.0, **fields)
        attention = CausalAttention(config, 1, AttnMaskType.causal, "self")
        inputs = [torch.zeros(length, 1, 1, 8, requires_grad=True) for _ in range(3)]
        mine, kept = {x.untyped_storage().data_ptr() for x in inputs}, {}

        def keep(tensor):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            output = attention(*inputs, None)
        del output
        return sum(size for place, size in kept.items() if place not in mine)


def test_no_scores_are_kept(groups):
    full, windowed = (groups[1].run(saved_by_attention, 2048, window)[0] for window in (None, 64))
    mask = 256 * (256 + 63) * 4  # one mask for all blocks and layers
    assert full <= windowed <= full + mask < 2048 * 2048 / 4


def test_dropout_is_refused(groups):
    with pytest.raises(ValueError, match=r"attention_dropout = 0\.1: only 0 is supported"):
        groups[2].run(functools.partial(attend, attention_dropout=0.1), 2, torch.float32)


# -- rotary positions


def rotate(frequencies):
    """Return (rank, angles of this rank's positions)."""
    from distill_nemo.runtime.process_groups import process_groups

    with process_groups(ParallelismConfig(context_parallel_size=2)):
        from megatron.core import parallel_state

        from distill_nemo.models.layers.rotary import Rotary

        return parallel_state.get_context_parallel_rank(), Rotary([frequencies])(SEQUENCE)


def test_the_rotary_embedding_gives_this_ranks_positions(groups):
    frequencies = 1e4 ** -(torch.arange(0, 8, 2) / 8)
    angles = torch.outer(torch.arange(SEQUENCE).float(), torch.cat([frequencies, frequencies]))
    for rank, got in groups[2].run(rotate, frequencies):
        assert torch.equal(got[:, 0, 0], angles[pieces(rank, 2)])


# -- whole models


def batch():
    generator = torch.Generator().manual_seed(5)
    text = torch.randint(VOCAB, (BATCH, SEQUENCE + 1), generator=generator)
    mask = (torch.rand(BATCH, SEQUENCE, generator=generator) > 0.3).float()
    positions = torch.arange(SEQUENCE).expand(BATCH, -1)
    return {"tokens": text[:, :-1], "labels": text[:, 1:], "loss_mask": mask, "position_ids": positions}


def step(student, parallelism):
    """Return (context- and tensor-parallel rank, logits [s, B, vocab], gradients), summed as in training."""
    from distill_nemo.runtime.process_groups import process_groups

    with process_groups(parallelism):
        from megatron.core import parallel_state
        from megatron.core.distributed import (
            DistributedDataParallel,
            DistributedDataParallelConfig,
            finalize_model_grads,
        )
        from megatron.core.tensor_parallel import vocab_parallel_cross_entropy
        from megatron.core.tensor_parallel.mappings import gather_from_tensor_model_parallel_region

        from distill_nemo.models.layers.context_parallel import split_batch
        from distill_nemo.models.provider import model_provider
        from distill_nemo.runtime.seed import seed_everything

        seed_everything(0)
        model = model_provider(student=student, parallelism=parallelism)
        trained = DistributedDataParallel(model.config, DistributedDataParallelConfig(), model)
        mine = split_batch(batch())
        logits = trained(mine["tokens"], mine["position_ids"], None).transpose(0, 1)
        whole = gather_from_tensor_model_parallel_region(logits.detach().clone())[..., :VOCAB]
        losses = vocab_parallel_cross_entropy(logits.contiguous(), mine["labels"].T.contiguous())
        (losses * mine["loss_mask"].T).sum().backward()
        finalize_model_grads([trained])
        ranks = parallel_state.get_context_parallel_rank(), parallel_state.get_tensor_model_parallel_rank()
        return *ranks, whole, {name: parameter.main_grad for name, parameter in model.named_parameters()}


def transformers_logits(student):
    from transformers import AutoModelForCausalLM

    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(student.checkpoint, dtype=torch.float64)(batch()["tokens"]).logits


@pytest.fixture(scope="module")
def whole_gradients(groups, models):
    """Return the gradients of one process, by model."""
    return {name: groups[1].run(step, student, ParallelismConfig())[0][3] for name, student in models.items()}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_gradients_are_those_of_one_process(groups, models, whole_gradients, family, layout):
    processes, sizes = LAYOUTS[layout]
    results = groups[processes].run(step, models[family], ParallelismConfig(**sizes))
    expected = transformers_logits(models[family]).transpose(0, 1)
    for rank, _, logits, _ in results:
        assert relative_error(logits, expected[pieces(rank, sizes["context_parallel_size"])]) < 1e-5
    compare(results, whole_gradients[family])


def compare(results, expected):
    """Compare every rank's gradients with those of one process."""
    errors = {}
    for _, tensor_rank, _, gradients in results:
        assert gradients.keys() == expected.keys()
        for name, gradient in gradients.items():
            mine = shard(name, expected[name], gradient, tensor_rank)
            errors[name] = max(errors.get(name, 0), relative_error(gradient, mine))
    assert max(errors.values()) < 1e-5, sorted(errors.items(), key=lambda item: -item[1])[:3]


def shard(name, whole, part, rank):
    """Return the rows or columns of `whole` that tensor-parallel rank `rank` holds in `part`."""
    for dim, (rows, held) in enumerate(zip(whole.shape, part.shape, strict=True)):
        if rows != held:
            stacked = whole.chunk(2) if name.endswith("linear_fc1.weight") else [whole]  # gate and up projection
            return torch.cat([one.chunk(rows // held, dim)[rank] for one in stacked], dim)
    return whole


def test_layers_that_differ_attend_over_the_whole_sequence(groups):
    blocks = [
        {"attention": {"num_query_groups": 2}, "mlp": {"ffn_hidden_size": 96}},
        {"attention": {"no_op": True}, "mlp": {"ffn_hidden_size": 64}},
        {"attention": {"num_query_groups": 4}, "mlp": {"ffn_hidden_size": 32}},
    ]
    student = StudentConfig(
        num_layers=3, hidden_size=64, ffn_hidden_size=96, num_attention_heads=4, vocab_size=VOCAB,
        norm_epsilon=1e-6, rotary_base=1e4, block_configs=blocks,
    )  # fmt: skip
    _, _, logits, gradients = groups[1].run(step, student, ParallelismConfig())[0]
    results = groups[2].run(step, student, ParallelismConfig(context_parallel_size=2))
    for rank, _, mine, _ in results:
        assert relative_error(mine, logits[pieces(rank, 2)]) < 1e-5
    compare(results, gradients)
