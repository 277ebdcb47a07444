"""Run a teacher alone, and compute something of each token that counts from its logits, a chunk of tokens at a time.

Legend: B samples of a micro batch, S positions (s: those of this context-parallel rank), M of their tokens that count,
n a chunk of them, v this rank's vocabulary shard, H width.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor, nn

from distill_nemo.config import ParallelismConfig
from distill_nemo.data.samplers import collate
from distill_nemo.evaluation import HOST_FIELD
from distill_nemo.losses.fused_linear.chunk_size import CHUNK_BYTES, CUDA_CHUNK_BYTES, chunk_size
from distill_nemo.models.architecture import Architecture
from distill_nemo.models.distillation.fused_output import (
    hand_on_hidden_states,
    head_of,
    tensor_parallel_group,
    whole,
    why_not_fused,
)
from distill_nemo.models.layers.context_parallel import in_sequence_order, split_batch
from distill_nemo.models.provider import model_provider
from distill_nemo.runtime.watchdog import heartbeat

Sample = dict[str, Tensor]
Rows = dict[str, Tensor]  # of a chunk of tokens: `labels`, and further fields of the samples


class Chunk(NamedTuple):
    """Some tokens that count, while their logits exist."""

    logits_nv: Tensor  # fp32, -inf in padding; may be overwritten
    hidden_nH: Tensor
    rows: Rows
    group: dist.ProcessGroup | None  # the ranks that share the vocabulary; None: v is all of it
    vocab_start: int  # global index of the first column


Encoder = Callable[[Chunk], Rows]


class TeacherRun:
    """A frozen teacher on the ranks of a layout. Every rank of the job makes one, and calls `encode` together.

    Args:
        model: architecture of the teacher, with a checkpoint.
        parallelism: its layout.
        dtype: of weights and activations.
        micro_batch_size: samples of a forward pass.
        encoder: what to compute of each token that counts. Its results are the same on all tensor-parallel ranks.

    Raises:
        ValueError: for a checkpoint that does not fit, or an output layer that was quantised.
    """

    def __init__(
        self,
        model: Architecture,
        parallelism: ParallelismConfig,
        dtype: torch.dtype,
        micro_batch_size: int,
        encoder: Encoder,
    ) -> None:
        built = model_provider(
            parallel_state.is_pipeline_first_stage(),
            parallel_state.is_pipeline_last_stage(),
            student=model,
            parallelism=parallelism,
            dtype=dtype,
        )
        assert isinstance(built, GPTModel)
        self.stage = built.requires_grad_(False).eval().cuda()
        self.micro_batch_size, self.encoder = micro_batch_size, encoder
        self.device = next(self.stage.parameters()).device
        self.multipliers, self.vocab_size = model.multipliers, model.vocab_size
        is_last = parallel_state.is_pipeline_last_stage()
        reason = why_not_fused(teacher=self.stage) if is_last else None
        if reason is not None:
            raise ValueError(f"{reason}: a store cannot be written from it; name the checkpoint before quantisation")
        ranks = parallel_state.get_tensor_model_parallel_rank(), parallel_state.get_context_parallel_rank()
        self.is_writer = is_last and ranks == (0, 0)
        width = self.stage.output_layer.output_size_per_partition if is_last else 0
        self.vocab_start = ranks[0] * width
        self.num_true = min(max(model.vocab_size - self.vocab_start, 0), width)
        self.group = tensor_parallel_group(built)

    @torch.no_grad()
    def encode(self, samples: list[Sample], num_microbatches: int) -> list[dict[str, np.ndarray]]:
        """Return the encoder's fields of each sample, [tokens of it that count, ...], on the writer; elsewhere none.

        Args:
            samples: of this replica, at least one: tokens, labels, loss_mask, position_ids, [S] each, perhaps
                document_starts, and fields [S, ...] for the encoder, `target_<name>`.
            num_microbatches: the same on every replica, which expert parallelism connects. Missing samples are
                made up, and nothing is computed from their logits.
        """
        found: list[dict[str, Tensor]] = []
        masks: list[Tensor] = []
        get_forward_backward_func()(
            forward_step_func=partial(self._forward, found, masks),
            data_iterator=self._micro_batches(samples, num_microbatches),
            model=[self.stage],
            num_microbatches=num_microbatches,
            seq_length=len(samples[0]["tokens"]),
            micro_batch_size=self.micro_batch_size,
            forward_only=True,
        )
        if not self.is_writer:
            return []
        if self.device.type == "cuda":
            torch.cuda.current_stream().synchronize()  # for the copies to the host
        counts = torch.cat([(mask_BS > 0).sum(1) for mask_BS in masks]).tolist()
        fields = {name: torch.cat([batch[name] for batch in found]).split(counts) for name in found[0]}
        return [{name: as_array(parts[i]) for name, parts in fields.items()} for i in range(len(samples))]

    @torch.no_grad()
    def output_weight(self) -> np.ndarray | None:
        """Return the output layer's weight [V, H] without padding, on the first replica's writer.

        Every rank calls it. One gather over the ranks that share the vocabulary.
        """
        if parallel_state.get_data_parallel_rank() or parallel_state.get_context_parallel_rank():
            return None
        if not parallel_state.is_pipeline_last_stage():
            return None
        tied = self.stage.share_embeddings_and_output_weights
        own_vH = self.stage.shared_embedding_or_output_weight() if tied else self.stage.output_layer.weight
        assert own_vH is not None, "the last stage has an output layer"
        whole_vH = [own_vH.detach()]
        if self.group is not None:
            whole_vH = [torch.empty_like(own_vH) for _ in range(dist.get_world_size(self.group))]
            dist.gather(own_vH.contiguous(), whole_vH if self.is_writer else None, group=self.group, group_dst=0)
        return as_array(torch.cat(whole_vH)[: self.vocab_size].cpu()) if self.is_writer else None

    def _micro_batches(self, samples: list[Sample], num_microbatches: int) -> Iterator[dict[str, Tensor]]:
        size = self.micro_batch_size
        missing = {**samples[-1], "loss_mask": torch.zeros_like(samples[-1]["loss_mask"])}
        for start in range(0, num_microbatches * size, size):
            there = samples[start : start + size]
            yield collate(there + [missing] * (size - len(there)))

    def _forward(
        self, found: list[Rows], masks: list[Tensor], batches: Iterator[dict[str, Tensor]], model: nn.Module
    ) -> tuple[Tensor, Callable[[Tensor], tuple[Tensor, Tensor, dict[str, Tensor]]]]:
        heartbeat("the teacher's forward pass")
        of_all = next(batches)
        own = split_batch(of_all)
        batch = {name: x.to(self.device, non_blocking=True) for name, x in own.items() if name != HOST_FIELD}
        inputs = batch["tokens"], batch["position_ids"], own.get(HOST_FIELD)
        output = model(*inputs, output_processor=hand_on_hidden_states)

        def encoded(hidden_sBH: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
            fields = self._encoded(hidden_sBH, batch, own["loss_mask"])
            fields = _of_whole_sequence(fields, own["loss_mask"], of_all["loss_mask"])
            if self.is_writer:
                found.append({name: x.to("cpu", non_blocking=True) for name, x in fields.items()})
                masks.append(of_all["loss_mask"])
            return hidden_sBH.new_zeros(()), torch.zeros((), dtype=torch.int, device=self.device), {}

        return output, encoded

    def _encoded(self, hidden_sBH: Tensor, batch: dict[str, Tensor], mask_Bs: Tensor) -> Rows:
        """Return the encoder's fields of this rank's positions that count, in the order of the samples."""
        hidden_SBH = whole(hidden_sBH, self.stage.config.sequence_parallel)
        sample_M, position_M = ((mask_Bs > 0).nonzero().to(self.device, non_blocking=True)).unbind(1)
        head = head_of(self.stage, hidden_SBH, self.multipliers).take(position_M * len(mask_Bs) + sample_M)
        rows_M = {name: x[sample_M, position_M] for name, x in batch.items()}
        num_tokens, width = len(sample_M), head.weight_vH.shape[0]
        size = chunk_size(max(num_tokens, 1), width, hidden_sBH.is_cuda)
        logits_nv = hidden_sBH.new_empty((size, width), dtype=torch.float32)
        part, encoded = encoded_tokens(size, width, hidden_sBH.is_cuda), []
        for start in range(0, max(num_tokens, 1), size):  # without any token, once: for names and shapes
            stop = min(start + size, num_tokens)
            out_nv = head.part(slice(start, stop), self.num_true, logits_nv[: stop - start])
            for first in range(start, max(stop, start + 1), part):
                rows = slice(first, min(first + part, stop))
                own, own_nv = {name: x[rows] for name, x in rows_M.items()}, out_nv[first - start : rows.stop - start]
                chunk = Chunk(own_nv, head.hidden_NH[rows], own, self.group, self.vocab_start)
                encoded.append(self.encoder(chunk))
        return {name: torch.cat([each[name] for each in encoded]) for name in encoded[0]}


def encoded_tokens(size: int, width: int, on_gpu: bool) -> int:
    """Return the tokens, of a chunk of `size`, that the encoder gets at a time.

    In fp64 it takes about ten times as much as their logits, so they are an eighth of a full chunk.
    """
    limit = CUDA_CHUNK_BYTES if on_gpu else CHUNK_BYTES
    return chunk_size(size, width, on_gpu, max(limit // (8 * 4 * width), 1))


def _of_whole_sequence(fields: Rows, own_mask_Bs: Tensor, mask_BS: Tensor) -> Rows:
    """Return the fields of all context-parallel ranks' tokens that count, in order. One all-gather of each field."""
    size = parallel_state.get_context_parallel_world_size()
    if size == 1:
        return fields
    group = parallel_state.get_context_parallel_group()
    joined = {}
    for name, own_M in fields.items():
        there_Bs, there_BS = ((mask > 0).to(own_M.device) for mask in (own_mask_Bs, mask_BS))
        dense_Bs = own_M.new_zeros(*there_Bs.shape, *own_M.shape[1:])
        dense_Bs[there_Bs] = own_M
        pieces = [torch.empty_like(dense_Bs) for _ in range(size)]
        dist.all_gather(pieces, dense_Bs, group=group)
        in_order_SB = in_sequence_order(torch.cat([piece.transpose(0, 1) for piece in pieces]), size)
        joined[name] = in_order_SB.transpose(0, 1)[there_BS]
    return joined


def as_array(values: Tensor) -> np.ndarray:
    """Return a tensor as a numpy array; bfloat16, which numpy lacks, as its bits."""
    return values.view(torch.int16).numpy().view(np.uint16) if values.dtype == torch.bfloat16 else values.numpy()
