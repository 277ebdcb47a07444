"""Score every part of a model from its activations over calibration data, at any layout.

Scores are those of Minitron (arXiv:2407.14679, section 2.2): activations are averaged over the tokens of a sample, and
the root of the sum of squares is taken over samples. Layers have block importance, 1 - cosine of input and output.

Legend: S sequence (s: a sequence-parallel rank's part), B micro batch, H width, T tokens of an expert.
"""

import contextlib
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor, nn

from distill_nemo.models.architecture import Architecture
from distill_nemo.pruning.choice import Scores

Key = tuple[str, int, int]  # part, layer, expert
OF_ALL_TOKENS = ("hidden", "layers", "experts")  # every tensor-parallel rank has the whole; of others, a part


class Sums:
    """Sums of one rank over its samples, in float64."""

    def __init__(self, model: Architecture, sequence_parallel: bool) -> None:
        self.model = model
        self.sums: dict[Key, Tensor] = {}
        self.sequence_parallel = sequence_parallel

    def add(self, part: str, layer: int, value: Tensor, expert: int = 0) -> None:
        """Add to the sums of a part."""
        key = part, layer, expert
        self.sums[key] = self.sums[key] + value if key in self.sums else value

    def add_hidden(self, hidden_sBH: Tensor) -> None:
        """Add what attention or an MLP reads."""
        self.add("hidden", 0, self._mean_squares(self._over_sequence(hidden_sBH.abs()), hidden_sBH))

    def add_channels(self, part: str, layer: int, values_SBf: Tensor) -> None:
        """Add this rank's channels of an MLP."""
        total = values_SBf.abs().sum(dim=0, dtype=torch.float64)
        self.add(part, layer, (total / len(values_SBf)).square().sum(dim=0))

    def add_heads(self, part: str, layer: int, width: int, values_SBf: Tensor) -> None:
        """Add the norms of this rank's heads of `width` channels."""
        self.add_channels(part, layer, values_SBf.unflatten(-1, (-1, width)).norm(dim=-1))

    def add_expert(self, part: str, layer: int, expert: int, total: Tensor) -> None:
        """Add sums over an expert's tokens. Without sequence parallelism every tensor-parallel rank sends its own."""
        copies = 1 if self.sequence_parallel else parallel_state.get_tensor_model_parallel_world_size()
        self.add(part, layer, total / copies, expert)

    def add_layer(self, layer: int, before_sBH: Tensor, after_sBH: Tensor) -> None:
        """Add 1 - cosine of each token."""
        cosine_sB = torch.cosine_similarity(before_sBH.double(), after_sBH.double(), dim=-1)
        self.add("layers", layer, self._over_sequence(1 - cosine_sB).sum())

    def _over_sequence(self, values: Tensor) -> Tensor:
        total = values.sum(dim=0, dtype=torch.float64)
        if self.sequence_parallel:
            dist.all_reduce(total, group=parallel_state.get_tensor_model_parallel_group())
        return total

    def _mean_squares(self, total: Tensor, of: Tensor) -> Tensor:
        ranks = parallel_state.get_tensor_model_parallel_world_size() if self.sequence_parallel else 1
        return (total / (len(of) * ranks)).square().sum(dim=0)

    def gathered(self) -> Scores | None:
        """Return the scores on rank 0, None on other ranks. Collective."""
        own = {key: value.cpu() for key, value in self.sums.items()}
        mine = parallel_state.get_tensor_model_parallel_rank(), own
        everyone: list[Any] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
        dist.gather_object(mine, everyone)
        return _scores(everyone, self.model) if everyone is not None else None


def _scores(everyone: list[tuple[int, dict[Key, Tensor]]], model: Architecture) -> Scores:
    """Join the sums of all ranks: over samples added, over tensor-parallel ranks one after another."""
    totals: dict[Key, dict[int, Tensor]] = defaultdict(dict)
    for tensor_rank, sums in everyone:
        for key, value in sums.items():
            there = totals[key]
            there[tensor_rank] = there[tensor_rank] + value if tensor_rank in there else value
    joined = {
        key: by_rank[0] if key[0] in OF_ALL_TOKENS else torch.cat([by_rank[rank] for rank in sorted(by_rank)])
        for key, by_rank in totals.items()
    }

    def of_layers(part: str) -> dict[int, Tensor]:
        return {layer: value.sqrt() for (name, layer, _), value in sorted(joined.items()) if name == part}

    def of_experts(part: str) -> dict[int, Tensor]:
        layers = sorted({layer for name, layer, _ in joined if name == part})
        count = model.experts.num_experts if model.experts else 0
        return {i: torch.stack([joined[part, i, expert] for expert in range(count)]) for i in layers}

    return Scores(
        hidden=joined["hidden", 0, 0].sqrt(),
        heads=of_layers("heads"),
        mamba=of_layers("mamba"),
        ffn=of_layers("ffn"),
        shared_ffn=of_layers("shared_ffn"),
        experts=of_experts("experts"),
        expert_ffn=of_experts("expert_ffn"),
        layers=torch.stack([joined["layers", i, 0] for i in range(model.num_layers)]),
    )


@contextlib.contextmanager
def watching(chunk: GPTModel, model: Architecture) -> Iterator[Sums]:
    """Sum up the activations of this rank's layers in every forward pass of the block."""
    sums = Sums(model, chunk.config.sequence_parallel)
    with contextlib.ExitStack() as hooks:
        for layer in decoder_layers(chunk):
            for handle in _watch(layer, sums):
                hooks.callback(handle.remove)
        yield sums


def decoder_layers(chunk: GPTModel) -> list[TransformerLayer]:
    """Return the layers of this rank."""
    layers = list(chunk.decoder.layers)
    assert all(isinstance(layer, TransformerLayer) for layer in layers)
    return layers  # pyright: ignore[reportReturnType]


def _watch(layer: TransformerLayer, sums: Sums) -> Iterator[Any]:
    number = layer.layer_number - 1
    described = sums.model.layers[number]
    yield layer.register_forward_hook(
        lambda _, args, kwargs, output: sums.add_layer(number, input_of(args, kwargs), output[0]), with_kwargs=True
    )
    if described.num_query_groups or described.mixer:
        yield _before(layer.get_submodule("self_attention"), sums.add_hidden)
    if described.num_query_groups or described.mixer == "latent_attention":
        projection = layer.get_submodule("self_attention.linear_proj")
        yield _before(projection, partial(sums.add_heads, "heads", number, sums.model.kv_channels))
    if described.mixer == "mamba" and sums.model.mamba is not None:
        projection = layer.get_submodule("self_attention.out_proj")
        yield _before(projection, partial(sums.add_heads, "mamba", number, sums.model.mamba.head_dim))
    if described.ffn_hidden_size:
        yield _before(layer.get_submodule("mlp"), sums.add_hidden)
        if isinstance(layer.mlp, MoELayer):
            yield from _watch_experts(layer.mlp, number, sums)
        else:
            down = layer.get_submodule("mlp.linear_fc2")
            yield _before(down, lambda values: sums.add_channels("ffn", number, values))


def _watch_experts(block: MoELayer, layer: int, sums: Sums) -> Iterator[Any]:
    """Watch an expert's channels and the norm of what it adds: both have the router's weight in them."""
    if block.use_shared_expert:
        down = block.get_submodule("shared_experts.linear_fc2")
        yield _before(down, lambda values: sums.add_channels("shared_ffn", layer, values))
    for place, expert in enumerate(block.local_expert_indices):
        module = block.get_submodule(f"experts.local_experts.{place}")

        def add_channels(values_Tf: Tensor, expert: int = expert) -> None:
            sums.add_expert("expert_ffn", layer, expert, values_Tf.abs().sum(dim=0, dtype=torch.float64))

        def add_output(_: Any, __: Any, output: tuple[Tensor, Any], expert: int = expert) -> None:
            added_TH = output[0].double()
            dist.all_reduce(added_TH, group=parallel_state.get_expert_tensor_parallel_group())  # each has a part
            sums.add_expert("experts", layer, expert, added_TH.norm(dim=-1).sum())

        yield _before(module.get_submodule("linear_fc2"), add_channels)
        yield module.register_forward_hook(add_output)


def _before(module: nn.Module, use: Callable[[Tensor], None]) -> Any:
    return module.register_forward_pre_hook(
        lambda _, args, kwargs: use(input_of(args, kwargs)) or None, with_kwargs=True
    )


def input_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Return the hidden states that a module was called with."""
    return kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]


@contextlib.contextmanager
def without_layer(chunk: GPTModel, number: int) -> Iterator[None]:
    """Leave out layer `number`, if this rank has it: it returns its input."""
    with contextlib.ExitStack() as hooks:
        for layer in decoder_layers(chunk):
            if layer.layer_number - 1 == number:
                handle = layer.register_forward_hook(
                    lambda _, args, kwargs, output: (input_of(args, kwargs), *output[1:]), with_kwargs=True
                )
                hooks.callback(handle.remove)
        yield
