"""Sum the gradient of a parameter in fp32, piece by piece.

Megatron's DDP gives a parameter an fp32 `main_grad`, to which its backward hook adds `.grad`. Code that adds there
itself sets `grad_added_to_main_grad` and gives autograd no gradient (megatron/core/tensor_parallel/layers.py and
distributed/distributed_data_parallel.py, 0.19). A tied embedding's own gradient still comes through the hook, which
looks at `zero_out_wgrad`.
"""

from typing import Any

import torch
from torch import Tensor


class GradientSum:
    """Sum in fp32 for `parameter`: its `main_grad` if that is fp32, else a new tensor of zeros."""

    def __init__(self, parameter: Tensor) -> None:
        self.parameter: Any = parameter
        main_grad: Any = getattr(parameter, "main_grad", None)
        self.direct = main_grad is not None and main_grad.dtype == torch.float32
        self.sum: Any = main_grad if self.direct else torch.zeros_like(parameter, dtype=torch.float32)

    def finish(self, scale: Tensor) -> Tensor | None:
        """Return the gradient for autograd, `scale * sum` in the parameter's dtype, or None after adding directly.

        Raises:
            RuntimeError: if it was added directly and `scale` is not 1 (on CUDA an asynchronous assertion).
        """
        if not self.direct:
            return (self.sum * scale).to(self.parameter.dtype)
        message = "the weight's gradient is in main_grad already, for another upstream gradient: set FusedLoss.upstream"
        if scale.is_cuda:
            torch._assert_async(scale == 1, message)  # no host sync
        elif scale != 1:
            raise RuntimeError(message)
        self.parameter.grad_added_to_main_grad = True
        return None
