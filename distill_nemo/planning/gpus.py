"""GPUs for which a run can be planned."""

from dataclasses import dataclass

from distill_nemo.fields import require, suggest


@dataclass(frozen=True)
class Gpu:
    """A GPU by its data sheet: memory in 10^9 bytes, and 10^12 dense bf16 operations per second."""

    name: str
    memory_gb: float
    bf16_tflops: float


# NVIDIA's data sheets of the SXM modules: "A100 Tensor Core GPU", "H100 Tensor Core GPU", "H200 Tensor Core GPU" (the
# last two state bf16 with sparsity, 1,979: half of it is dense), "HGX B200" (4,500 with sparsity; 180 GB usable of
# 192). Cards report up to 7 % more memory than 10^9 bytes a GB; that is left for the CUDA context, NCCL's buffers and
# fragmentation.
GPUS = {
    "a100-80gb": Gpu("A100 80 GB", 80, 312),
    "h100": Gpu("H100", 80, 989),
    "h200": Gpu("H200", 141, 989),
    "b200": Gpu("B200", 180, 2250),
}


def find_gpu(name: str) -> Gpu:
    """Return the GPU of this name.

    Raises:
        ValueError: for an unknown name, with close matches.
    """
    require(name.lower() in GPUS, f'gpu = "{name}" is not known.{suggest(name.lower(), GPUS)}')
    return GPUS[name.lower()]
