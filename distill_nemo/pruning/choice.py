"""Choose the parts of a model that stay: those with the highest scores, of equal ones the first."""

from dataclasses import dataclass

import torch
from torch import Tensor

from distill_nemo.models.architecture import Architecture
from distill_nemo.pruning.sizes import Sizes


@dataclass
class Scores:
    """Importance of each part: the higher, the more is lost without it. Float64, by layer where layers differ.

    Args:
        hidden: of the residual stream's channels.
        heads: of attention heads.
        mamba: of Mamba's heads.
        ffn: of an MLP's channels.
        shared_ffn: of channels of the MLP beside the experts.
        experts: of the experts.
        expert_ffn: of channels of each expert, [experts, channels].
        layers: of whole layers.
    """

    hidden: Tensor
    heads: dict[int, Tensor]
    mamba: dict[int, Tensor]
    ffn: dict[int, Tensor]
    shared_ffn: dict[int, Tensor]
    experts: dict[int, Tensor]
    expert_ffn: dict[int, Tensor]
    layers: Tensor


@dataclass
class Kept:
    """Numbers of the parts that stay, ascending. Layers and experts are numbered as in the source.

    Args:
        layers: whole layers.
        hidden: channels of the residual stream.
        heads: attention heads, by layer.
        groups: query groups, by layer.
        mamba: Mamba's heads, by layer.
        ffn: channels of the MLP, by layer.
        shared_ffn: channels of the MLP beside the experts, by layer.
        experts: by layer.
        expert_ffn: channels of an expert, by layer and expert.
    """

    layers: list[int]
    hidden: list[int]
    heads: dict[int, list[int]]
    groups: dict[int, list[int]]
    mamba: dict[int, list[int]]
    ffn: dict[int, list[int]]
    shared_ffn: dict[int, list[int]]
    experts: dict[int, list[int]]
    expert_ffn: dict[int, dict[int, list[int]]]


def highest(scores: Tensor, count: int) -> list[int]:
    """Return the numbers of the `count` highest scores, ascending; of equal ones the first."""
    order = torch.sort(scores, descending=True, stable=True).indices
    return sorted(order[:count].tolist())


def kept_layers(scores: Scores, count: int) -> list[int]:
    """Return the numbers of the layers that stay."""
    return highest(scores.layers, count)


def choose(scores: Scores, model: Architecture, cut: Architecture, sizes: Sizes) -> Kept:
    """Return the parts of `model` that `cut` consists of.

    Args:
        scores: of the parts of `model`.
        model: the source.
        cut: the result, of `kept_layers`.
        sizes: of the result.
    """
    layers = kept_layers(scores, cut.num_layers)
    attention = {i: _heads(scores.heads[i], model, sizes) for i in layers if i in scores.heads}
    of_router = model.experts.num_groups if model.experts else 1
    experts = {i: _of_groups(scores.experts[i], of_router, sizes["num_experts"]) for i in layers if i in scores.experts}
    of_mamba = model.mamba.num_groups if model.mamba else 1
    shared = cut.experts.shared_ffn_hidden_size if cut.experts else None
    return Kept(
        layers=layers,
        hidden=highest(scores.hidden, cut.hidden_size),
        heads={i: heads for i, (heads, _) in attention.items()},
        groups={i: groups for i, (_, groups) in attention.items()},
        mamba={i: _of_groups(scores.mamba[i], of_mamba, sizes["mamba_num_heads"]) for i in layers if i in scores.mamba},
        ffn={i: highest(scores.ffn[i], sizes["ffn_hidden_size"]) for i in layers if i in scores.ffn},
        shared_ffn={i: highest(scores.shared_ffn[i], shared or 0) for i in layers if i in scores.shared_ffn},
        experts=experts,
        expert_ffn={
            i: {e: highest(scores.expert_ffn[i][e], sizes["moe_ffn_hidden_size"]) for e in numbers}
            for i, numbers in experts.items()
        },
    )


def _heads(scores: Tensor, model: Architecture, sizes: Sizes) -> tuple[list[int], list[int]]:
    """Return heads and groups: the groups whose heads matter most together, and the best heads of each."""
    if "num_query_groups" not in sizes:
        kept = highest(scores, sizes["num_attention_heads"])
        return kept, []
    each = model.num_attention_heads // model.num_query_groups
    by_group = scores.view(model.num_query_groups, each)
    groups = highest(by_group.sum(dim=1), sizes["num_query_groups"])
    count = sizes["num_attention_heads"] // sizes["num_query_groups"]
    return [group * each + head for group in groups for head in highest(by_group[group], count)], groups


def _of_groups(scores: Tensor, groups: int, count: int) -> list[int]:
    """Return the numbers of the highest scores, equally many of each group of consecutive ones."""
    by_group = scores.view(groups, -1)
    each = by_group.shape[1]
    return [group * each + part for group in range(groups) for part in highest(by_group[group], count // groups)]
