"""Run everything that needs a GPU, in parts: `make gpu`, or `python -m benchmarks.gpu` from a source tree.

Each part is a separate process, ends within nine minutes and writes `<output>/<part>.json` and `<part>.log`. Parts that
have passed are skipped, so an interrupted command can be repeated. Benchmarks also write benchmarks/results/, from
which the last part draws docs/performance.md and its plot.

It needs PyTorch with CUDA, Triton, pytest, and the packages that `environment` reports if they are missing. It needs
neither Transformer Engine nor NeMo-Run nor a network.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
LIMIT_SECONDS = 540
REHEARSAL = "DISTILL_NEMO_GPU_REHEARSAL"  # set to 1, the tests of tests/gpu run on CPU, kernels in Triton's interpreter
REQUIRED = {  # distribution: a module of it that training imports
    "megatron-core": "megatron.core",
    "nvidia-modelopt": "modelopt.torch.distill.plugins.megatron",
    "transformers": "transformers",
    "tokenizers": "tokenizers",
    "safetensors": "safetensors",
    "triton": "triton",
    "pyarrow": "pyarrow",
    "PyYAML": "yaml",
    "rich": "rich",
    "psutil": "psutil",
    "scipy": "scipy",
    "requests": "requests",  # of ModelOpt, which does not say so
    "matplotlib": "matplotlib",
    "pytest": "pytest",
    "pytest-timeout": "pytest_timeout",
    "pytest-xdist": "xdist",
}
OPTIONAL = ("transformer-engine", "liger-kernel", "flash-attn", "nemo-run", "tensorboard")


@dataclass(frozen=True)
class Part:
    """One subprocess: `python -m <module> <arguments>`."""

    name: str
    about: str
    module: str
    arguments: tuple[str, ...] = ()

    @property
    def command(self) -> list[str]:
        """Return the arguments of the process."""
        return [sys.executable, "-W", "ignore", "-m", self.module, *self.arguments]


def _tests(*files: str) -> tuple[str, ...]:
    return ("-v", "-p", "no:cacheprovider", "--timeout", str(LIMIT_SECONDS), *(f"tests/gpu/{file}" for file in files))


PARTS = (
    Part("environment", "GPU, driver, versions, bandwidth of a copy", "benchmarks.gpu", ("--environment",)),
    Part("kernels", "Triton's kernels and the fused loss against fp64", "pytest", _tests("test_kernels.py")),
    Part(
        "layers",
        "attention against formulas; Transformer Engine's layers, if installed",
        "pytest",
        _tests("test_layers.py"),
    ),
    Part("training", "host syncs, offload, layouts of one GPU, bf16", "pytest", _tests("test_training.py")),
    Part("layouts", "two GPUs, if there are two, against one", "pytest", _tests("test_layouts.py")),
    Part("quantized", "students in FP8 and NVFP4, by ModelOpt's kernels", "pytest", _tests("test_quantized.py")),
    Part("quickstart", "quickstart in bf16: kill, resume, export", "pytest", _tests("test_quickstart.py")),
    Part("kl", "KL of given logits beside other implementations", "benchmarks.kl", ("--only", "gpu")),
    Part("fused_linear", "KL from hidden states beside other implementations", "benchmarks.fused_linear"),
    Part("step", "a whole distillation step beside other implementations", "benchmarks.step"),
    Part("report", "docs/performance.md and its plot", "benchmarks.report"),
)


def main() -> None:
    """Run the parts in order; exit 1 if one failed."""
    arguments = _arguments()
    if arguments.environment:
        print(json.dumps(environment(), indent=1))
        return
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # or a part would go on alone
    parts = [part for part in PARTS if part.name in arguments.only]
    begun, failed = time.monotonic(), []
    arguments.output.mkdir(parents=True, exist_ok=True)
    for part in parts:
        if not arguments.again and passed(arguments.output / f"{part.name}.json"):
            print(f"{part.name:14} passed before; --again repeats it", flush=True)
            continue
        left = arguments.budget - (time.monotonic() - begun)
        if left < arguments.least:
            print(
                f"{part.name:14} not started: {max(left, 0):.0f} s are left; repeat the command to continue", flush=True
            )
            failed.append(part.name)
            continue
        if not run(part, arguments.output, min(LIMIT_SECONDS, left)):
            failed.append(part.name)
            if part.name == "environment":
                break
    results = [json.loads(path.read_text()) for path in sorted(arguments.output.glob("*.json")) if path.stem in NAMES]
    (arguments.output / "all.json").write_text(json.dumps(results, indent=1) + "\n")
    if failed:
        sys.exit(f"not passed: {', '.join(failed)}; logs are in {arguments.output}")


NAMES = tuple(part.name for part in PARTS)


def _arguments() -> argparse.Namespace:
    parts = "\n".join(f"  {part.name:14} {part.about}" for part in PARTS)
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description=f"{__doc__}\nParts:\n{parts}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("only", nargs="*", metavar="PART", help="parts to run (default: all)")
    parser.add_argument("--output", type=Path, default=ROOT / "build" / "gpu", help="directory of results and logs")
    parser.add_argument("--again", action="store_true", help="repeat parts that have passed")
    parser.add_argument("--budget", type=float, default=1e9, metavar="S", help="seconds for all parts of this call")
    parser.add_argument("--least", type=float, default=60, metavar="S", help="start no part with fewer seconds left")
    parser.add_argument("--environment", action="store_true", help="print what the environment part prints, and stop")
    parser.add_argument("--rehearse", action="store_true", help="run environment and tests on CPU, at smaller sizes")
    arguments = parser.parse_args()
    if arguments.rehearse:
        os.environ[REHEARSAL] = "1"
    arguments.only = arguments.only or (NAMES[: NAMES.index("kl")] if arguments.rehearse else NAMES)
    unknown = sorted(set(arguments.only) - set(NAMES))
    if unknown:
        parser.error(f"no such part: {', '.join(unknown)}; parts are {', '.join(NAMES)}")
    arguments.output = arguments.output.resolve()
    return arguments


def run(part: Part, output: Path, limit: float) -> bool:
    """Run one part and write its result.

    Args:
        part: the part.
        output: directory of its JSON and log.
        limit: seconds after which the part and all that it started are killed.

    Returns:
        True if it exited with 0.
    """
    log, begun = output / f"{part.name}.log", time.monotonic()
    print(f"{part.name:14} {part.about} ...", flush=True)
    with log.open("w") as file:
        process = subprocess.Popen(
            part.command, cwd=ROOT, env=_environ(), stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            code = None
        except KeyboardInterrupt:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            raise
    if code is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    seconds, lines = time.monotonic() - begun, log.read_text(errors="replace").splitlines()
    result = {
        "part": part.name,
        "command": ["python", *part.command[1:]],
        "exit_code": code,
        "seconds": round(seconds, 1),
        "last_lines": lines[-40:],
    }
    (output / f"{part.name}.json").write_text(json.dumps(result, indent=1) + "\n")
    end = "passed" if code == 0 else f"killed after {limit:.0f} s" if code is None else f"FAILED with exit code {code}"
    print(f"{part.name:14} {end} in {seconds:.0f} s", flush=True)
    for line in lines[-15:] if code != 0 else lines[-1:]:
        print(f"    {line}", flush=True)
    return code == 0


def passed(result: Path) -> bool:
    """Return True for the result of a part that has passed."""
    try:
        return json.loads(result.read_text())["exit_code"] == 0
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _environ() -> dict[str, str]:
    """Return an environment that is offline and imports this source tree."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    rehearsal = {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""} if os.environ.get(REHEARSAL) else {}
    offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "PYTHONUNBUFFERED": "1", "PYTHONPATH": path}
    return os.environ | offline | rehearsal


def environment() -> dict[str, Any]:
    """Describe the machine.

    Raises:
        SystemExit: if there is no GPU that torch can use, or a package is missing.
    """
    missing = {name: problem for name, module in REQUIRED.items() if (problem := _import_error(module))}
    if missing:
        lines = "".join(f"\n  {name}: {problem}" for name, problem in missing.items())
        sys.exit(f"error: packages that cannot be imported; install them, or put their wheels on PYTHONPATH:{lines}")
    import torch

    if not torch.cuda.is_available() and not os.environ.get(REHEARSAL):
        sys.exit("error: torch finds no GPU")
    return {
        "python": platform.python_version(),
        "packages": _versions(["torch", *REQUIRED, *OPTIONAL]),
        "cuda": torch.version.cuda,
        "kernel": platform.release(),
        "gpus": [_gpu(i) for i in range(torch.cuda.device_count())],
    }


def _import_error(module: str) -> str:
    """Import a module in a separate process, since some need another to be imported first.

    Returns:
        The last line of the traceback; empty if there is none.
    """
    code = f"import {module}"
    if module.startswith(("megatron", "modelopt")):
        code = f"from distill_nemo.runtime.device import setup_device; setup_device(); {code}"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=_environ(), capture_output=True, text=True)
    return done.stderr.strip().splitlines()[-1] if done.returncode else ""


def _versions(names: Sequence[str]) -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def _gpu(index: int) -> dict[str, Any]:
    import torch

    properties = torch.cuda.get_device_properties(index)
    source = torch.empty(2**30, dtype=torch.uint8, device=f"cuda:{index}")
    target = torch.empty_like(source)
    times = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
    target.copy_(source)
    times[0].record()
    for _ in range(20):
        target.copy_(source)
    times[1].record()
    torch.cuda.synchronize(index)
    return {
        "name": properties.name,
        "memory_bytes": properties.total_memory,
        "multiprocessors": properties.multi_processor_count,
        "capability": f"{properties.major}.{properties.minor}",
        "copy_bytes_per_second": round(2 * 20 * source.nbytes / (times[0].elapsed_time(times[1]) / 1e3)),
    }


if __name__ == "__main__":
    main()
