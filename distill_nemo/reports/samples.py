"""Text that exported students generate."""

from collections.abc import Callable
from pathlib import Path

from distill_nemo.config import StudentConfig
from distill_nemo.data.tokenizer import Tokenizer, load_tokenizer
from distill_nemo.fields import require
from distill_nemo.runtime.imports import megatron_imports

TOKENS = 48
MAX_PROMPT = 2000  # characters


def generate(checkpoint: str, prompts: list[str]) -> list[str]:
    """Return each prompt with its greedy continuation, by transformers.

    Raises:
        ValueError: if the directory holds no model and tokenizer that can be opened, or the model cannot go on with a
            prompt.
    """
    with megatron_imports():
        import torch
        from transformers import AutoModelForCausalLM

        from distill_nemo.models.checkpoints.pretrained import open_pretrained

    if not (Path(checkpoint) / "config.json").is_file():
        raise ValueError(f"{checkpoint} holds no exported model")
    from distill_nemo.models.resolve import resolve

    resolve(StudentConfig(checkpoint=checkpoint))  # compares the files with config.json, before memory is taken
    try:
        tokenizer = load_tokenizer(checkpoint)
        (encode, decode), end = _coding(tokenizer), tokenizer.token_id("eos_token")
        model = open_pretrained(AutoModelForCausalLM, checkpoint, dtype=torch.float32, use_safetensors=True)
        texts = []
        for prompt in prompts:
            ids, num_ids = encode(prompt[:MAX_PROMPT]), model.get_input_embeddings().num_embeddings
            require(bool(ids) and max(ids) < num_ids, f"{prompt[:20]!r} has no tokens, or some that the model lacks")
            greedy = {"max_new_tokens": TOKENS, "do_sample": False, "num_beams": 1, "pad_token_id": end}
            texts.append(decode(model.generate(torch.tensor([ids]), **greedy)[0].tolist()))
    except Exception as error:  # transformers raises errors of any type
        reason = " ".join(str(error).split()) or repr(error)
        raise ValueError(f"{checkpoint} generates no text: {reason:.200}") from None
    return texts


def _coding(tokenizer: Tokenizer) -> tuple[Callable[[str], list[int]], Callable[[list[int]], str]]:
    """Return functions from text to ids and back: those of `tokenizer.json`, as in training, if there is one."""
    from transformers import AutoTokenizer

    from distill_nemo.models.checkpoints.pretrained import open_pretrained

    fast = tokenizer.fast
    if fast is None:
        slow = open_pretrained(AutoTokenizer, tokenizer.path)
        return lambda text: slow(text).input_ids, slow.decode
    return lambda text: fast.encode(text).ids, lambda ids: fast.decode(ids, skip_special_tokens=False)
