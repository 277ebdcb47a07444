"""Context parallelism, and attention for machines on which Transformer Engine does not run.

The sequence is cut in 2*cp pieces; context-parallel rank r holds pieces r and 2*cp-1-r (Megatron's zig-zag: under the
causal mask every rank then has the same work).

Shapes: S tokens of the whole sequence, s = S/cp on this rank, B samples, n query heads and g key heads of this
tensor-parallel rank, d channels of a head, w tokens of a sliding window.
"""

import functools
import itertools
import math
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.nn import functional

from distill_nemo.models.architecture import QUERY_BLOCK
from distill_nemo.models.layers.capped_attention import CappedAttention


def split_batch(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return this context-parallel rank's two pieces of every tensor, on its device, without waiting for the device.

    Args:
        batch: tensors [B, S], the same on every context-parallel rank. They are not modified.

    Returns:
        tensors [B, s], pinned if the batch's are; the batch itself without context parallelism.

    Raises:
        ValueError: if 2*cp does not divide S.
    """
    size = parallel_state.get_context_parallel_world_size()
    if size == 1:
        return batch
    for name, tensor in batch.items():
        if tensor.shape[1] % (2 * size):
            raise ValueError(
                f"data.sequence_length: {name} has {tensor.shape[1]} tokens a sample, which must be divisible by "
                f"2 * parallelism.context_parallel_size = {2 * size}"
            )
    return {name: _own_pieces(tensor, size) for name, tensor in batch.items()}


def _own_pieces(tensor_BS: Tensor, size: int) -> Tensor:
    pieces, rank = tensor_BS.chunk(2 * size, dim=1), parallel_state.get_context_parallel_rank()
    own_Bs = torch.cat([pieces[rank], pieces[2 * size - 1 - rank]], dim=1)
    return own_Bs.pin_memory() if tensor_BS.is_pinned() else own_Bs


class CausalAttention(MegatronModule):
    """Causal core attention over the whole sequence, for the queries of this rank.

    ```
    softmax(q_i @ k[: i + 1].T * softmax_scale) @ v[: i + 1]  # for every position i of this rank
    ```

    In a layer with a sliding window of w tokens, keys and values are those of positions i - w + 1 to i. A query may be
    limited to keys of its own document. With a softcap c, scores are c * tanh(score / c). With `softmax_type`
    "learnable", the softmax runs over one score more, a learned one for each head (its sink), whose value is 0.

    Replaces Megatron's DotProductAttention, which refuses context parallelism and keeps all S x S scores for
    backward. Keys and values are all-gathered over the context-parallel group; their gradients are reduce-scattered.
    The softmax is in fp32 or better whatever `attention_softmax_in_fp32` says.

    Raises:
        ValueError: for attention dropout, which would need different random numbers on each rank.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        softcap: float | None = None,
    ) -> None:
        super().__init__(config=config)
        dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        if dropout:
            raise ValueError(f"attention_dropout = {dropout}: only 0 is supported without Transformer Engine")
        assert attn_mask_type is AttnMaskType.causal, attn_mask_type
        self.softcap = softcap
        self.softmax_offset = None if config.softmax_type == "vanilla" else _sinks(config)
        assert softcap is None or self.softmax_offset is None, "no supported model has both"
        self.window: int | None = None
        if config.window_size is not None:
            by_layer = config.window_attn_skip_freq
            assert isinstance(by_layer, list), by_layer
            self.window = config.window_size[0] + 1 if by_layer[layer_number - 1] else None
        assert config.kv_channels is not None, "Megatron fills it"
        self.softmax_scale = 1 / math.sqrt(config.kv_channels) if softmax_scale is None else softmax_scale
        group = parallel_state.get_context_parallel_group()
        assert isinstance(group, ProcessGroup)
        self.group = group

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """Attend; collective over the context-parallel group, forward and backward.

        Args:
            query: [s, B, n, d], this rank's two pieces, in order.
            key: [s, B, g, d], g divides n.
            value: [s, B, g, d].
            attention_mask: None: a query sees all keys up to its own, or to the window. Else int [B, s], on the host:
                the position of the first key that each query sees, its document's first token.
            attn_mask_type: causal or None.
            attention_bias: None.
            packed_seq_params: None.

        Returns:
            [s, B, n*d], in the dtype of the query.
        """
        assert attention_bias is None and packed_seq_params is None, "causal, in one layout only"
        assert attn_mask_type in (None, AttnMaskType.causal), attn_mask_type
        rank, size = self.group.rank(), self.group.size()
        if size == 1:
            if attention_mask is not None:
                return self._attend_in_documents(query, key, value, 0, attention_mask)
            return self._attend(query, key, value)
        both = gather_from_sequence_parallel_region(torch.stack([key, value], dim=1), group=self.group)
        key_SBgd, value_SBgd = in_sequence_order(both, size).unbind(1)
        length = query.shape[0] // 2
        outputs = []
        for i, (piece, query_pBnd) in enumerate(zip((rank, 2 * size - 1 - rank), query.split(length), strict=True)):
            start, end = piece * length, (piece + 1) * length  # no query of this piece sees a later key
            if attention_mask is not None:
                firsts_Bp = attention_mask[:, i * length : (i + 1) * length]
                outputs.append(self._attend_in_documents(query_pBnd, key_SBgd, value_SBgd, start, firsts_Bp))
                continue
            first = max(0, start - self.window + 1) if self.window else 0  # nor one before its window
            outputs.append(self._attend(query_pBnd, key_SBgd[first:end], value_SBgd[first:end]))
        return torch.cat(outputs)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Mark the sinks as a shard, under the name that Transformer Engine gives them."""
        state = self.state_dict(prefix="", keep_vars=True)
        return make_sharded_tensors_for_checkpoint(state, prefix, {"softmax_offset": 0}, sharded_offsets)

    def _attend_in_documents(
        self, query_pBnd: Tensor, key_SBgd: Tensor, value_SBgd: Tensor, start: int, firsts_Bp: Tensor
    ) -> Tensor:
        """Return [p, B, n*d]. The queries have positions from `start` on; each sees keys from `firsts_Bp` on."""
        rows = []
        for row, firsts in enumerate(firsts_Bp.tolist()):
            outputs, sample = [], slice(row, row + 1)
            for first, run in itertools.groupby(range(len(firsts)), firsts.__getitem__):
                queries = list(run)
                begin, end = queries[0], queries[-1] + 1
                seen = slice(max(first, start + begin - self.window + 1) if self.window else first, start + end)
                outputs.append(
                    self._attend(query_pBnd[begin:end, sample], key_SBgd[seen, sample], value_SBgd[seen, sample])
                )
            rows.append(torch.cat(outputs))
        return torch.cat(rows, dim=1)

    def _attend(self, query_pBnd: Tensor, key_tBgd: Tensor, value_tBgd: Tensor) -> Tensor:
        """Return [p, B, n*d]. The p queries are the last of the t positions."""
        if self.softcap is not None:
            return CappedAttention.apply(
                query_pBnd, key_tBgd, value_tBgd, self.softmax_scale, self.softcap, self.window
            )
        queries, keys = query_pBnd.shape[0], key_tBgd.shape[0]
        repeats = query_pBnd.shape[2] // key_tBgd.shape[2]
        query_Bnpd = query_pBnd.permute(1, 2, 0, 3)
        key_Bntd = key_tBgd.repeat_interleave(repeats, dim=2).permute(1, 2, 0, 3)
        value_Bntd = value_tBgd.repeat_interleave(repeats, dim=2).permute(1, 2, 0, 3)
        if self.window is not None and self.window < keys:
            return self._attend_in_window(query_Bnpd, key_Bntd, value_Bntd, self.window)
        mask_pt = None
        if queries != keys:
            keys += self.softmax_offset is not None
            mask_pt = torch.ones(queries, keys, dtype=torch.bool, device=query_pBnd.device).tril(keys - queries)
        return self._product(query_Bnpd, key_Bntd, value_Bntd, mask_pt).permute(2, 0, 1, 3).flatten(2)

    def _attend_in_window(self, query_Bnpd: Tensor, key_Bntd: Tensor, value_Bntd: Tensor, window: int) -> Tensor:
        """Return [p, B, n*d], by blocks of queries that share one mask. A block gets only keys that its queries see."""
        end, outputs = key_Bntd.shape[2] - query_Bnpd.shape[2], []
        for query_Bnbd in query_Bnpd.split(QUERY_BLOCK, dim=2):
            start, end = end, end + query_Bnbd.shape[2]
            first = start - window + 1  # below 0 if the block sees all keys before it
            seen = slice(max(0, first), end)
            columns = max(0, -first), end - first
            mask_bk = _window_mask(window, query_Bnpd.dtype, query_Bnpd.device)[: end - start, slice(*columns)]
            if self.softmax_offset is not None:
                mask_bk = _with_sink(window, end - start, *columns, query_Bnpd.dtype, query_Bnpd.device)
            out_Bnbd = self._product(query_Bnbd, key_Bntd[:, :, seen], value_Bntd[:, :, seen], mask_bk)
            outputs.append(out_Bnbd.permute(2, 0, 1, 3).flatten(2))
        return torch.cat(outputs)

    def _product(self, query_Bnpd: Tensor, key_Bntd: Tensor, value_Bntd: Tensor, mask: Tensor | None) -> Tensor:
        """Return [B, n, p, d]. Without a mask, queries and keys have the same positions, and the causal mask is meant.

        A sink becomes the key of a position before the first, the first column of the mask. Its score comes from a
        channel that is 1 in every query and 0 in every other key. Channels of zeros after it make a multiple of 8: with
        another width and a mask, torch has no fused attention for a GPU and would keep all scores.
        """
        if self.softmax_offset is None:
            return functional.scaled_dot_product_attention(
                query_Bnpd, key_Bntd, value_Bntd, attn_mask=mask, is_causal=mask is None, scale=self.softmax_scale
            )
        before = 0 if mask is not None else 1  # the causal mask needs as many queries as keys
        channels = query_Bnpd.shape[-1]
        added = 8 - channels % 8
        query = functional.pad(query_Bnpd, (0, 1), value=1.0)
        query = functional.pad(query, (0, added - 1, before, 0))
        key, value = (functional.pad(x, (0, added, 1, 0)) for x in (key_Bntd, value_Bntd))
        key[:, :, 0, channels] = self.softmax_offset / self.softmax_scale
        out = functional.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=mask is None, scale=self.softmax_scale
        )
        return out[:, :, before:, :channels]


def _sinks(config: TransformerConfig) -> nn.Parameter:
    """Return this tensor-parallel rank's sinks, [n]."""
    assert config.softmax_type == "learnable", config.softmax_type
    whole = torch.empty(config.num_attention_heads, dtype=config.params_dtype)
    if config.perform_initialization:
        assert config.init_method is not None, "Megatron fills it"
        config.init_method(whole)
    own = whole.chunk(config.tensor_model_parallel_size)[parallel_state.get_tensor_model_parallel_rank()]
    sinks = nn.Parameter(own.clone())
    set_tensor_model_parallel_attributes(sinks, is_parallel=True, dim=0, stride=1)
    return sinks


@functools.lru_cache(maxsize=2)
def _window_mask(window: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return the additive mask of a block's scores, [b, b + w - 1]: query i sees keys i to i + w - 1 of the block's.

    It has the dtype of the scores: from a boolean mask torch would make such a tensor in every call, and keep each.
    """
    seen = torch.ones(QUERY_BLOCK, QUERY_BLOCK + window - 1, dtype=torch.bool, device=device).triu().tril(window - 1)
    return torch.zeros_like(seen, dtype=dtype).masked_fill_(~seen, -torch.inf)


@functools.lru_cache(maxsize=64)  # layers share it, too
def _with_sink(window: int, rows: int, first: int, last: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return a part of `_window_mask`, after a column for the sink, which every query sees."""
    return functional.pad(_window_mask(window, dtype, device)[:rows, first:last], (1, 0))


def in_sequence_order(gathered: Tensor, size: int) -> Tensor:
    """Reorder gathered rows, [s, ...] of each of `size` ranks in turn, into the order of the sequence, [S, ...]."""
    pieces = gathered.chunk(2 * size)
    return torch.cat(pieces[::2] + pieces[1::2][::-1])
