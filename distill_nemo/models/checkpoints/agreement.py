"""Compare Megatron's logits, at any layout, with those of transformers on the same weights.

Legend: M samples, S sequence (s: a context-parallel rank's part), V padded vocabulary (v: a tensor-parallel rank's).
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region
from torch import Tensor

from distill_nemo.fields import require
from distill_nemo.models.architecture import padded_vocab_size
from distill_nemo.models.checkpoints.pretrained import open_pretrained
from distill_nemo.models.layers.context_parallel import in_sequence_order, split_batch
from distill_nemo.runtime.everyone import Everyone

TOKENS = (2, 32)  # minimum number of samples, minimum length


def open_with_transformers(path: str | Path, dtype: torch.dtype, **config: Any) -> transformers.PreTrainedModel:
    """Open a Hugging Face directory with transformers, without running its code or using the network.

    Args:
        path: the directory.
        dtype: dtype of the weights.
        config: values that override fields of its config.json.

    Raises:
        ValueError: if transformers refuses it, with its reason.
    """
    eager = {"attn_implementation": "eager"}  # "sdpa", the default, overlooks a softcap of scores
    options: dict[str, Any] = config | eager | {"dtype": dtype, "use_safetensors": True}
    try:
        return open_pretrained(transformers.AutoModelForCausalLM, path, **options).eval()
    except Exception as error:  # transformers raises errors of any type
        raise _refusal(path, "opened", error) from None


def _refusal(path: str | Path, done: str, error: Exception) -> ValueError:
    reason = " ".join(str(error).split()) or repr(error)
    return ValueError(f"{path} cannot be {done} by transformers {transformers.__version__}: {reason:.400}")


def logits_apart(
    chunks: list[GPTModel],
    open_reference: Callable[[], transformers.PreTrainedModel],
    vocab_size: int,
    everyone: Everyone | None = None,
) -> float:
    """Return the norm of the difference between both models' logits on random tokens, relative to the reference's.

    Collective: every rank calls it.

    Args:
        chunks: this rank's pipeline stages of our model.
        open_reference: returns transformers' model, on the host; only rank 0 calls it.
        vocab_size: number of tokens that both models have.
        everyone: all ranks; None: make a new `Everyone`.

    Raises:
        ValueError: if transformers cannot compute the reference's logits, with its reason; if no logits are finite.
    """
    everyone = everyone or Everyone()
    tokens_MS = _tokens(vocab_size)
    ours_MSV = _on_rank_0(_logits(chunks, tokens_MS), tokens_MS, chunks[0])

    def apart() -> float:
        assert ours_MSV is not None
        reference = open_reference()
        theirs_MSV = _reference_logits(reference, tokens_MS)[..., :vocab_size].float()
        require(
            bool(theirs_MSV.isfinite().all()) or bool(ours_MSV.isfinite().all()),
            f"{reference.config._name_or_path}: its logits are NaN or infinite, in transformers too: weights that are "
            "not finite, or overflow; name a sound checkpoint",
        )
        return ((ours_MSV[..., :vocab_size] - theirs_MSV).norm() / theirs_MSV.norm().clamp_min(1e-6)).item()

    return everyone.on_rank_0(apart)


def _tokens(vocab_size: int) -> Tensor:
    """Return [M, S] random tokens, the same on every rank, of a length that divides evenly over all ranks."""
    unit = 2 * parallel_state.get_context_parallel_world_size() * parallel_state.get_tensor_model_parallel_world_size()
    samples = max(TOKENS[0], parallel_state.get_pipeline_model_parallel_world_size())
    shape = samples, -(-TOKENS[1] // unit) * unit
    return torch.randint(vocab_size, shape, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def _logits(chunks: list[GPTModel], tokens_MS: Tensor) -> Tensor | None:
    """Return the logits [M, S, V] on the last pipeline stage, else None. Each sample is a micro batch."""
    device = next(chunks[0].parameters()).device
    positions_MS = torch.arange(tokens_MS.shape[1]).expand(tokens_MS.shape)

    def step(samples: Iterator[int], chunk: GPTModel) -> tuple[Tensor, Callable[[Tensor], Any]]:
        sample = slice(at := next(samples), at + 1)
        own = split_batch({"tokens": tokens_MS[sample], "positions": positions_MS[sample]})
        output = chunk(own["tokens"].to(device), own["positions"].to(device), None)
        return output, lambda logits: (logits.new_zeros(()), torch.ones((), dtype=torch.int), {"logits": logits})

    training = [chunk.training for chunk in chunks]
    for chunk in chunks:
        chunk.eval()
    streams = [iter(range(len(tokens_MS))) for _ in chunks]
    reports = get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=streams if len(chunks) > 1 else streams[0],
        model=[*chunks],
        num_microbatches=len(tokens_MS),
        seq_length=tokens_MS.shape[1],
        micro_batch_size=1,
        forward_only=True,
    )
    for chunk, was_training in zip(chunks, training, strict=True):
        chunk.train(was_training)
    if not chunks[-1].post_process:
        return None
    logits_Msv = torch.cat([report["logits"] for report in reports])
    whole_MsV = gather_from_tensor_model_parallel_region(logits_Msv) if chunks[-1].parallel_output else logits_Msv
    return _in_sequence(whole_MsV)


def _in_sequence(logits_MsV: Tensor) -> Tensor:
    """Gather the pieces of context-parallel ranks, in the order of the sequence."""
    size = parallel_state.get_context_parallel_world_size()
    if size == 1:
        return logits_MsV
    parts = [torch.empty_like(logits_MsV) for _ in range(size)]
    dist.all_gather(parts, logits_MsV.contiguous(), group=parallel_state.get_context_parallel_group())
    return in_sequence_order(torch.cat([part.transpose(0, 1) for part in parts]), size).transpose(0, 1)


def _on_rank_0(logits_MSV: Tensor | None, tokens_MS: Tensor, chunk: GPTModel) -> Tensor | None:
    """Return the logits in fp32 on rank 0 of the job, sent by its pipeline's last stage; None on other ranks."""
    last = parallel_state.get_pipeline_model_parallel_last_rank()
    pipeline = parallel_state.get_pipeline_model_parallel_group()
    assert isinstance(pipeline, dist.ProcessGroup)
    of_rank_0 = 0 in dist.get_process_group_ranks(pipeline)
    if last != 0 and of_rank_0 and dist.get_rank() == last:
        assert logits_MSV is not None
        dist.send(logits_MSV.float().contiguous(), 0)
    if dist.get_rank() != 0:
        return None
    if last != 0:
        shape = *tokens_MS.shape, padded_vocab_size(chunk.vocab_size)
        logits_MSV = torch.empty(shape, device=next(chunk.parameters()).device)
        dist.recv(logits_MSV, last)
    assert logits_MSV is not None
    return logits_MSV.float().cpu()


@torch.no_grad()
def _reference_logits(reference: transformers.PreTrainedModel, tokens_MS: Tensor) -> Tensor:
    try:
        return reference(tokens_MS, use_cache=False).logits  # Nemotron-H's MLP layers have no cache
    except Exception as error:  # transformers raises errors of any type
        raise _refusal(reference.config._name_or_path, "run", error) from None
