"""Rotary embeddings with transformers' own frequencies, in place of Megatron's, which supports few types.

Legend: S positions of this context-parallel rank, d channels that turn, of all rotary embeddings of the model.
"""

import copy
import math
from itertools import accumulate
from types import SimpleNamespace
from typing import Any

import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.attention import Attention
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor, nn

from distill_nemo.models.architecture import Architecture, Rope
from distill_nemo.models.config_fields import shown
from distill_nemo.models.layers.context_parallel import split_batch


def frequencies(rope: Rope, kv_channels: int, max_position_embeddings: int) -> tuple[Tensor, float]:
    """Return radians per position, [d / 2] in fp32, and the factor of cosine and sine, as transformers computes both.

    Both hold for sequences up to `Architecture.longest_sequence`.

    Raises:
        ValueError: for channels that make no pairs, lists of another length, and numbers that give no frequencies.
    """
    share = rope.partial_rotary_factor
    channels = int(kv_channels * share)
    if channels < 2 or channels % 2:
        product = "" if share == 1.0 else f" x partial_rotary_factor = {share:g} = {channels}"
        raise ValueError(
            f"kv_channels = {kv_channels}{product} is not even, and rotary embeddings turn pairs "
            "of channels; it is hidden_size / num_attention_heads if it is not stated"
        )
    for name, factors in (("short_factor", rope.short_factor), ("long_factor", rope.long_factor)):
        if factors is not None and len(factors) != channels // 2:
            raise ValueError(f"rope_scaling.{name} must hold {channels // 2} numbers, got {len(factors)}")
    try:
        found, factor = _frequencies(rope, kv_channels, channels, max_position_embeddings)
    except (ArithmeticError, ValueError) as error:
        raise ValueError(f"rope_scaling: {shown(rope.stated)} gives no frequencies: {error}") from None
    if not torch.isfinite(found).all():
        raise ValueError(f"rope_scaling: {shown(rope.stated)} gives frequencies that are not finite")
    return found, factor


def _frequencies(rope: Rope, kv_channels: int, channels: int, max_position_embeddings: int) -> tuple[Tensor, float]:
    if rope.rope_type == "default":  # transformers 5 has it in every model's own file
        return 1.0 / rope.rope_theta ** (torch.arange(0, channels, 2, dtype=torch.float32) / channels), 1.0
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    stated = rope.stated
    config: Any = SimpleNamespace(  # fields that the functions read, of transformers 4 and 5
        **{"partial_rotary_factor": 1.0, "original_max_position_embeddings": None} | stated,
        rope_scaling=stated,
        rope_parameters=stated,
        head_dim=kv_channels,
        hidden_size=kv_channels,
        num_attention_heads=1,
        max_position_embeddings=max_position_embeddings,
        standardize_rope_params=lambda: None,
    )
    return ROPE_INIT_FUNCTIONS[rope.rope_type](config, torch.device("cpu"))


class Rotary(RotaryEmbedding):
    """`position * frequency` for the positions of this context-parallel rank, in fp32.

    The angles of several rotary embeddings lie side by side; a layer takes its columns (`give_rotary_embeddings`).
    """

    def __init__(self, of_ropes: list[Tensor]) -> None:
        nn.Module.__init__(self)  # not Megatron's, which computes frequencies of its own
        self.inv_freq = torch.cat(
            [half for found in of_ropes for half in (found, found)]
        )  # not a buffer: bf16 would round it
        self.angles: tuple[int, Tensor] | None = None
        self.positions_Bs: Tensor | None = None  # of this context-parallel rank, if they differ by sample

    def forward(self, max_seq_len: int, offset: int = 0, packed_seq: bool = False, cp_group: object = None) -> Tensor:
        """Return the angles [s, 1, 1, d] of a sequence of `max_seq_len` tokens; those of the last call are kept.

        With positions that differ by sample, return [s, B, 1, d].
        """
        assert not offset and not packed_seq, "whole sequences only"
        if self.positions_Bs is not None:
            self.inv_freq = self.inv_freq.to(self.positions_Bs.device)
            return (self.positions_Bs.T.float()[..., None] * self.inv_freq)[:, :, None, :]
        if self.angles is None or self.angles[0] != max_seq_len:
            self.inv_freq = self.inv_freq.to(torch.cuda.current_device())
            positions = torch.arange(max_seq_len, dtype=torch.float32, device=self.inv_freq.device)
            own_Sd = split_batch({"angles": torch.outer(positions, self.inv_freq)[None]})["angles"][0]
            self.angles = max_seq_len, own_Sd[:, None, None, :]
        return self.angles[1]


def give_rotary_embeddings(built: GPTModel, model: Architecture) -> None:
    """Give a stage the angles of its architecture, and each layer its columns of them and its factor."""
    found = [frequencies(rope, model.rotary_channels, model.max_position_embeddings) for rope in model.ropes]
    built.rotary_pos_emb = Rotary([of_rope for of_rope, _ in found])
    if model.documents_apart:
        built.register_forward_pre_hook(_take_positions)
    starts = [0, *accumulate(2 * len(of_rope) for of_rope, _ in found)]
    for layer in built.decoder.layers:
        assert isinstance(layer, TransformerLayer)
        index, attention = model.layers[layer.layer_number - 1].rope, layer.self_attention
        if index is None or not isinstance(attention, Attention):
            continue
        _set_factor(attention, found[index][1])
        if len(found) > 1:
            columns = slice(starts[index], starts[index + 1])
            attention.register_forward_pre_hook(_Columns(columns), with_kwargs=True)


def _set_factor(attention: Attention, factor: float) -> None:
    """Set the factor of cosine and sine. Megatron-Core 0.19 stores it; 0.18 reads the config in each call."""
    if hasattr(attention, "_yarn_concentration_factor"):
        attention._yarn_concentration_factor = factor
    else:  # (0.1 * mscale * log(scaling_factor) + 1) / (0.1 * mscale_all_dim * log(scaling_factor) + 1)
        attention.config = copy.copy(attention.config)
        fields = {"rotary_scaling_factor": math.e, "mscale": 10 * (factor - 1), "mscale_all_dim": 0.0}
        vars(attention.config).update({f"yarn_{name}": value for name, value in fields.items()})


def _take_positions(built: nn.Module, args: tuple[Any, ...]) -> None:
    """Forward pre-hook of a stage, which is called with tokens, positions and a mask."""
    rotary = built.rotary_pos_emb
    assert isinstance(rotary, Rotary)
    rotary.positions_Bs = args[1] if args[2] is not None else None


class _Columns:
    """Forward pre-hook that gives an attention its own columns of the angles."""

    def __init__(self, columns: slice) -> None:
        self.columns = columns

    def __call__(self, attention: nn.Module, args: tuple[object, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        return args, kwargs | {"rotary_pos_emb": kwargs["rotary_pos_emb"][..., self.columns]}
