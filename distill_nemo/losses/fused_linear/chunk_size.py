"""Size of the chunks of logits of a fused linear loss. No torch: the launcher plans memory by it."""

# Limit on the fp32 logits of one side of a chunk. There are two sides and, under tensor parallelism, two chunks.
CHUNK_BYTES, CUDA_CHUNK_BYTES = 64 * 2**20, 512 * 2**20
# Lower limit: whatever its size, a chunk reads both output weights, and reads and writes the student's gradient.
CHUNK_TOKENS = 416


def chunk_size(num_tokens: int, width: int, on_gpu: bool, most: int | None = None) -> int:
    """Return the tokens per chunk of logits of `width` columns, in equal chunks of at most `most`, else by memory."""
    most = most or max((CUDA_CHUNK_BYTES if on_gpu else CHUNK_BYTES) // (4 * width), CHUNK_TOKENS)
    return -(-num_tokens // -(-num_tokens // most))
