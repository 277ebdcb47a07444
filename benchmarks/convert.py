"""Import from and export to Hugging Face directories: `python -m benchmarks.convert` writes results/convert_*.json.

Models are a Llama of 302M parameters in bf16 at TP=1 and TP=2, and a directory of 36,660 small tensors in 118 files, as
many as Qwen3-235B-A22B has. Our import and export are compared with ModelOpt's importer and exporter, and with the
least that is needed: reading and copying each tensor, and reading each and writing it into another file.

Processor time and memory are each rank's, median of the rounds. Memory is sampled anonymous memory beyond the start;
pages of mapped files, which the kernel may drop, are not included. Bytes from the disk are those of one import by all
ranks after the kernel has dropped the file from its cache.
"""

import json
import os
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from benchmarks.measure import write_result
from tests.spawn import Gloo

LLAMA = {"layers": 20, "width": 1024, "heads": 16, "groups": 8, "vocab": 32000}
ROUNDS = 3
MANY_LAYERS, MANY_EXPERTS, MANY_FILES = 94, 128, 118


class Sampler(threading.Thread):
    """Sampler of this process's anonymous memory."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.before = self.peak = anonymous_bytes()
        self._stopped = threading.Event()
        self.start()

    def run(self) -> None:
        """Sample every two milliseconds."""
        while not self._stopped.wait(0.002):
            self.peak = max(self.peak, anonymous_bytes())

    def stop(self) -> int:
        """Return the peak of bytes beyond those at the start."""
        self._stopped.set()
        self.join()
        return max(self.peak, anonymous_bytes()) - self.before


def anonymous_bytes() -> int:
    """Return the anonymous resident memory of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024
    raise OSError("RssAnon: needs Linux")


def measured(way: Callable[[], Any]) -> dict[str, float]:
    """Return the processor seconds and extra bytes of a call."""
    sampler, begun = Sampler(), time.process_time()
    way()
    return {"processor_seconds": time.process_time() - begun, "extra_bytes": sampler.stop()}


def median_of(rounds: list[dict[str, dict[str, float]]]) -> dict[str, dict[str, float]]:
    """Return the median of every number of every way."""
    return {
        way: {name: statistics.median(one[way][name] for one in rounds) for name in rounds[0][way]} for way in rounds[0]
    }


def rank_measured(path: str, tensor: int, output: str) -> dict[str, dict[str, float]]:
    """Measure every way on one rank."""
    from distill_nemo.config import ParallelismConfig, StudentConfig
    from distill_nemo.runtime.device import setup_device
    from distill_nemo.runtime.process_groups import process_groups

    setup_device()
    parallelism = ParallelismConfig(tensor_model_parallel_size=tensor)
    with process_groups(parallelism):
        import torch.distributed as dist

        from distill_nemo.models.checkpoints.huggingface import load_hf_weights
        from distill_nemo.models.checkpoints.write_safetensors import write_weights
        from distill_nemo.models.provider import model_provider
        from distill_nemo.models.resolve import resolve
        from tests.modelopt_weights import fill_by_modelopt, tensors_by_modelopt

        student = resolve(StudentConfig(checkpoint=path))
        built: Any = model_provider(student=student, parallelism=parallelism, dtype=torch.bfloat16, load_weights=False)
        for parameter in built.parameters():
            parameter.data.zero_()  # else the first import pays for its memory
        ways: dict[str, Callable[[], Any]] = {
            "import": lambda: load_hf_weights(built, student),
            "import by ModelOpt": lambda: fill_by_modelopt(built, path),
            "every tensor read and copied": lambda: read_all(path),
            "export": lambda: write_weights([built], student, empty(output)),
        }
        if tensor == 1:
            ways |= {
                "export by ModelOpt": lambda: save(tensors_by_modelopt(built, path, student.vocab_size), empty(output)),
                "the file read and written": lambda: save(read_all(path), empty(output)),
            }
        rounds = []
        for _ in range(ROUNDS):
            found = {}
            for name, way in ways.items():
                dist.barrier()
                found[name] = measured(way)
            rounds.append(found)
        found = median_of(rounds) | {"part": {"bytes": sum(2 * p.numel() for p in built.parameters())}}
        return found | {"cold": {"disk_bytes": from_disk(path, ways["import"])}}


def from_disk(path: str, way: Callable[[], Any]) -> int:
    """Return the bytes that this rank makes the disk read for an import from a file that is not in memory."""
    import torch.distributed as dist

    dist.barrier()
    with Path(path, "model.safetensors").open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    dist.barrier()
    before = disk_reads()
    way()
    return disk_reads() - before


def disk_reads() -> int:
    """Return the bytes that the disk has read for this process."""
    for line in Path("/proc/self/io").read_text().splitlines():
        if line.startswith("read_bytes:"):
            return int(line.split()[1])
    raise OSError("read_bytes: needs Linux")


def empty(directory: str) -> Path:
    """Empty the directory and return it. Every rank calls it."""
    import torch.distributed as dist

    if dist.get_rank() == 0:
        shutil.rmtree(directory, ignore_errors=True)
        Path(directory).mkdir()
    dist.barrier()
    return Path(directory)


def save(tensors: dict[str, torch.Tensor], directory: Path) -> None:
    """Write one file."""
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, directory / "model.safetensors")


def read_all(path: str) -> dict[str, torch.Tensor]:
    """Copy every tensor into memory."""
    with safe_open(Path(path, "model.safetensors"), "pt") as file:
        return {name: file.get_tensor(name).clone() for name in file.keys()}


def write_llama(path: Path) -> str:
    """Write the Llama, in bf16."""
    from tests.tiny_models import write_hf

    write_hf(path, **LLAMA)
    with safe_open(path / "model.safetensors", "pt") as file:
        tensors = {name: file.get_tensor(name).bfloat16() for name in file.keys()}
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    return str(path)


def write_many(path: Path) -> dict[str, str]:
    """Write the small tensors and their index; return the file of each."""
    names = [
        f"model.layers.{i}.mlp.experts.{e}.{n}_proj.weight"
        for i in range(MANY_LAYERS)
        for e in range(MANY_EXPERTS)
        for n in ("gate", "up", "down")
    ]
    names += [f"model.layers.{i}.self_attn.{n}_proj.weight" for i in range(MANY_LAYERS) for n in "qkvo"]
    names += [f"model.layers.{i}.self_attn.{n}_norm.weight" for i in range(MANY_LAYERS) for n in "qk"]
    path.mkdir()
    places, share = {}, -(-len(names) // MANY_FILES)
    for number in range(MANY_FILES):
        own = names[number * share : (number + 1) * share]
        file = f"model-{number + 1:05d}-of-{MANY_FILES:05d}.safetensors"
        save_file({name: torch.zeros(2, 2) for name in own}, path / file)
        places |= dict.fromkeys(own, file)
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    return places


def many_tensors(path: Path) -> dict[str, Any]:
    """Return the processor time to read every tensor of the directory; ModelOpt's is extrapolated from every 360th."""
    from distill_nemo.models.checkpoints.hf_tensors import PieceReader, stored_tensors
    from distill_nemo.models.families.pieces import Piece
    from distill_nemo.runtime.device import setup_device

    setup_device()
    from modelopt.torch.export.plugins.mcore_custom import get_safetensor

    names = list(write_many(path))

    def ours() -> None:
        with PieceReader(stored_tensors(path)) as reader:
            for name in names:
                reader.read(Piece(name, (slice(0, 2), slice(0, 2))))

    some = names[::360]
    by_modelopt = measured(lambda: [get_safetensor(path, name) for name in some])["processor_seconds"]
    return {
        "tensors": len(names),
        "ours": measured(ours)["processor_seconds"],
        "ModelOpt": by_modelopt / len(some) * len(names),
    }


def main() -> None:
    """Measure everything and write the results."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as root:
        path = write_llama(Path(root, "llama"))
        results: dict[str, Any] = {"repeats": ROUNDS, "rows": {}}
        for tensor in (1, 2):
            with Gloo(tensor, init=False, timeout=900) as group:
                ranks = group.run(rank_measured, path, tensor, f"{root}/out")
                results["rows"] |= {f"TP={tensor}, rank {rank}": found for rank, found in enumerate(ranks)}
        results["file_bytes"] = Path(path, "model.safetensors").stat().st_size
        results["many tensors"] = many_tensors(Path(root, "many"))
    write_result("convert_cpu", results)


if __name__ == "__main__":
    main()
