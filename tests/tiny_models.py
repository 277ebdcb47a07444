"""Tiny random Hugging Face models of every supported family, made by transformers."""

import torch

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
FAMILIES = ("llama", "llama_tied", "llama3_rope", "qwen2", "qwen3")


def write_hf(path, family="llama", *, seed=1, layers=4, width=64, vocab=507, heads=4, groups=2):
    """Save a random fp32 model with grouped-query attention and a vocabulary that needs padding; returns its path."""
    import transformers as hf

    extra = {"llama_tied": {"tie_word_embeddings": True}, "llama3_rope": {"rope_parameters": LLAMA3_ROPE}}
    name = {"qwen2": "Qwen2", "qwen3": "Qwen3"}.get(family, "Llama")
    config = getattr(hf, f"{name}Config")(
        hidden_size=width,
        intermediate_size=width * 3 // 2,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        vocab_size=vocab,
        max_position_embeddings=128,
        initializer_range=0.1,
        **({"head_dim": 24} if family == "qwen3" else {}),
        **extra.get(family, {}),
    )
    torch.manual_seed(seed)
    model = getattr(hf, f"{name}ForCausalLM")(config).float()
    for parameter in model.parameters():  # biases and norms too, so that a forgotten one shows
        if parameter.dim() == 1:
            parameter.data.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(str(path))
    return str(path)
