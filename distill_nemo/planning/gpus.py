"""GPUs for which a run can be planned."""

from dataclasses import dataclass

from distill_nemo.fields import require, suggest

NODE = 8  # GPUs that NVLink joins
UTILISATION = 0.4  # share of its peak that a GPU is assumed to reach in products


@dataclass(frozen=True)
class Gpu:
    """A GPU by its data sheet.

    Args:
        name: for people.
        memory_gb: memory in 10^9 bytes.
        bf16_tflops: 10^12 dense bf16 operations per second.
        fp32_tflops: the same in fp32, without tensor cores.
        memory_gbs: 10^9 bytes per second that its memory moves.
        nvlink_gbs: 10^9 bytes per second to the other GPUs of a node, in one direction.
        network_gbs: 10^9 bytes per second to other nodes, in one direction.
    """

    name: str
    memory_gb: float
    bf16_tflops: float
    fp32_tflops: float
    memory_gbs: float
    nvlink_gbs: float
    network_gbs: float


# NVIDIA's data sheets of the SXM modules: "A100 Tensor Core GPU", "H100 Tensor Core GPU", "H200 Tensor Core GPU" (the
# last two state bf16 with sparsity, 1,979: half of it is dense), "HGX B200" (4,500 with sparsity; 180 GB usable of
# 192). Networks are those of DGX systems: 200 Gb/s for each A100, 400 Gb/s for the others. NVLink's numbers are halves
# of the data sheets', which add both directions. Cards report up to 7 % more memory than 10^9 bytes a GB; that is left
# for the CUDA context, NCCL's buffers and fragmentation.
GPUS = {
    "a100-80gb": Gpu("A100 80 GB", 80, 312, 19.5, 2039, 300, 25),
    "h100": Gpu("H100", 80, 989, 67, 3350, 450, 50),
    "h200": Gpu("H200", 141, 989, 67, 4800, 450, 50),
    "b200": Gpu("B200", 180, 2250, 75, 8000, 900, 50),
}


def check_utilisation(utilisation: float) -> None:
    """Refuse a share of a GPU's peak that is not above 0 and at most 1.

    Raises:
        ValueError: with the share.
    """
    require(0 < utilisation <= 1, f"utilisation must be above 0 and at most 1, got {utilisation:g}")


def find_gpu(name: str, field: str = "gpu") -> Gpu:
    """Return the GPU of this name.

    Raises:
        ValueError: for an unknown name, with close matches.
    """
    require(name.lower() in GPUS, f'{field} = "{name}" is not known.{suggest(name.lower(), GPUS)}')
    return GPUS[name.lower()]
