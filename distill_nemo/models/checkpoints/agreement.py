"""Compare the logits of a model opened by transformers with Megatron's of the same weights."""

from pathlib import Path
from typing import Any

import torch
import transformers
from megatron.core.models.gpt import GPTModel

from distill_nemo.models.checkpoints.pretrained import open_pretrained

TOKENS = (2, 32)


def open_with_transformers(path: str | Path, dtype: torch.dtype, **config: Any) -> transformers.PreTrainedModel:
    """Open a Hugging Face directory with transformers, which runs no code of it and asks no network.

    Args:
        path: the directory.
        dtype: of the weights.
        config: fields of its config.json that are overruled.

    Raises:
        ValueError: when transformers refuses it, with its reason.
    """
    options: dict[str, Any] = config | {"dtype": dtype, "use_safetensors": True}
    try:
        return open_pretrained(transformers.AutoModelForCausalLM, path, **options).eval()
    except Exception as error:  # transformers raises whatever the files provoked
        raise _refusal(path, "opened", error) from None


def _refusal(path: str | Path, done: str, error: Exception) -> ValueError:
    reason = " ".join(str(error).split()) or repr(error)
    return ValueError(f"{path} cannot be {done} by transformers {transformers.__version__}: {reason:.400}")


@torch.no_grad()
def logits_apart(built: GPTModel, reference: transformers.PreTrainedModel, vocab_size: int) -> float:
    """Return the norm of the difference of both models' logits on random tokens, relative to the reference's.

    Args:
        built: a whole model (TP=1, PP=1).
        reference: of transformers; it is moved to the device of `built`.
        vocab_size: tokens that both know.

    Raises:
        ValueError: when transformers cannot compute the reference's logits, with its reason.
    """
    device = next(built.parameters()).device
    reference.to(device)  # pyright: ignore[reportArgumentType]
    generator = torch.Generator().manual_seed(0)
    training = built.training
    positions = torch.arange(TOKENS[1], device=device).expand(TOKENS)
    tokens = torch.randint(vocab_size, TOKENS, generator=generator).to(device)
    ours = built.eval()(tokens, positions, None)[..., :vocab_size].float()
    built.train(training)
    try:
        theirs = reference(tokens).logits[..., :vocab_size].float()
    except Exception as error:  # transformers raises whatever its configuration provoked
        raise _refusal(reference.config._name_or_path, "run", error) from None
    return ((ours - theirs).norm() / theirs.norm().clamp_min(1e-6)).item()
