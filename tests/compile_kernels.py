"""`python -m tests.compile_kernels`: the Triton kernels for sm_90, compiled without a GPU, as JSON.

For each kernel, dtype of the logits and (fused loss) of the gradient: instructions per column of a token, and whether
registers were spilled.
"""

import json
import re
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from distill_nemo.losses.kernels import triton_kernels as kernels

LOGITS = {"P", "Q", "Z", "T"}
LANES = {"ROWS": kernels.ROWS, "LANES": kernels.LANES}
BLOCK = {"BLOCK": kernels.BLOCK}
GIVEN = [("bf16", "bf16"), ("fp32", "fp32"), ("fp16", "fp16")]  # dtypes of logits and gradient
FUSED = [("fp32", "bf16"), ("fp32", "fp16"), ("fp32", "fp32")]
Case = tuple[str, Any, dict[str, Any], int, int, list[tuple[str, str]]]
CASES: list[Case] = [
    ("statistics", kernels._statistics, LANES, kernels.ROWS * kernels.LANES, kernels.LANE_WARPS, GIVEN),
    ("jensen_shannon_kls", kernels._jensen_shannon_kls, BLOCK, kernels.BLOCK, kernels.WARPS, GIVEN),
]
for divergence in ("forward_kl", "reverse_kl", "jensen_shannon"):
    for suffix, lm, dtypes in (("", False, [*GIVEN, FUSED[0]]), (" with LM", True, FUSED)):
        constants = BLOCK | {"DIVERGENCE": divergence, "LM": lm}
        name = f"{divergence}_gradient{suffix}"
        CASES.append((name, kernels._gradient, constants, kernels.BLOCK, kernels.WARPS, dtypes))


def compiled(kernel: Any, constants: dict[str, Any], logits: str, gradient: str, warps: int) -> Any:
    """Compile for a vocabulary divisible by 16, a property that Triton specialises on."""
    signature: dict[str, str] = {}
    for name in kernel.arg_names:
        if name in constants:
            signature[name] = "constexpr"
        elif name in LOGITS:
            signature[name] = f"*{logits}"
        elif name == "OUT" and "DIVERGENCE" in constants:
            signature[name] = f"*{gradient}"
        elif name == "COLUMN":
            signature[name] = "*i64"
        elif name.isupper():
            signature[name] = "*fp32"
        else:
            signature[name] = "fp32" if name in ("per_temperature", "beta") else "i32"
    divisible = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(signature.values()) if kind[0] in "*i"}
    source = ASTSource(kernel, signature, constexprs=constants, attrs=divisible)  # pyright: ignore
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps})


def longest_loop(sass: str) -> int:
    """Return the number of instructions in the loop, or in all the code if there is none."""
    lines = [line.split("\t")[-1].strip() for line in sass.splitlines()[1:]]
    lines = [line for line in lines if line and not line.startswith("NOP")]
    labels = {line.rstrip(":"): i for i, line in enumerate(lines) if line.endswith(":")}
    targets = [(i, match[1]) for i, line in enumerate(lines) if (match := re.search(r"\bBRA (\w+)", line))]
    loops = [i - labels[target] for i, target in targets if labels.get(target, i) < i - 1]  # the last one is a trap
    return max(loops, default=len(lines) - len(labels))


def main() -> None:
    """Print `{kernel: {dtypes: {"per_column": instructions, "spilled": bool}}}`."""
    found: dict[str, Any] = {}
    for name, kernel, constants, columns, warps, dtypes in CASES:
        for logits, gradient in dtypes:
            asm = compiled(kernel, constants, logits, gradient, warps).asm
            per_thread = columns / (32 * warps)
            spilled = re.search(r"\bST[LG]?\.LOCAL|\bSTL\b", asm["sass"]) is not None
            found.setdefault(name, {})[f"{logits} to {gradient}"] = {
                "per_column": round(longest_loop(asm["sass"]) / per_thread, 1),
                "spilled": spilled,
            }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
