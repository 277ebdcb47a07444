"""Text that exported students generate."""

from pathlib import Path

from distill_nemo.config import StudentConfig

TOKENS = 48
MAX_PROMPT = 2000  # characters


def generate(checkpoint: str, prompts: list[str]) -> list[str]:
    """Return each prompt with its greedy continuation, by transformers, as a user would load the model.

    Raises:
        ValueError: if the directory holds no model and tokenizer that transformers opens.
    """
    from distill_nemo.runtime.device import setup_device

    setup_device()  # before Megatron is imported
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from distill_nemo.models.checkpoints.pretrained import open_pretrained

    if not (Path(checkpoint) / "config.json").is_file():
        raise ValueError(f"{checkpoint} holds no exported model")
    from distill_nemo.models.resolve import resolve

    resolve(StudentConfig(checkpoint=checkpoint))  # compares the files with config.json, before memory is taken
    try:
        tokenizer = open_pretrained(AutoTokenizer, checkpoint)
        model = open_pretrained(AutoModelForCausalLM, checkpoint, dtype=torch.float32, use_safetensors=True)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{checkpoint} cannot be opened: {str(error).splitlines()[0][:200]}") from None
    texts = []
    for prompt in prompts:
        tokens = tokenizer(prompt[:MAX_PROMPT], return_tensors="pt").input_ids
        text = model.generate(tokens, max_new_tokens=TOKENS, do_sample=False, pad_token_id=tokenizer.eos_token_id)
        texts.append(tokenizer.decode(text[0]))
    return texts
