"""Read, check and write checkpoints: Hugging Face, Megatron, NeMo and our own."""
