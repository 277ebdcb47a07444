"""Losses between hidden states, on the pipeline stages of their layers.

Each is attached to the student's activation. Forward passes the activation on unchanged, and backward adds the gradient
of the loss, as Megatron does for its auxiliary MoE loss (moe/moe_utils.py, MoEAuxLossAutoScaler). So no loss is sent to
the last stage, and a loss inside a recomputed layer gets its gradient. Legend: B batch, S sequence.
"""

from collections import deque
from dataclasses import dataclass, field
from typing import Any

import torch
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor, nn

from distill_nemo.balancers import LogitsAndIntermediatesLossBalancer, WeightedLossBalancer
from distill_nemo.losses.reduction import masked_sum


class _Attach(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, activation: Tensor, loss: Tensor) -> Tensor:
        ctx.save_for_backward(loss)
        return activation

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        (loss,) = ctx.saved_tensors
        return grad, torch.ones_like(loss)  # fp32 and bf16 train without a loss scale; a sum, as the main loss is


def attach_loss(activation: Tensor, loss: Tensor) -> Tensor:
    """Return `activation`. Its backward also differentiates `loss`, with gradient 1."""
    return _Attach.apply(activation, loss)  # pyright: ignore


@dataclass
class _Pair:
    number: int  # in the config's list
    loss: nn.Module
    teacher_output: Tensor | None = None
    # For a layer recomputed in backward: teacher output and mask of its first pass, by micro batch. Backward passes run
    # in the same order.
    waiting: deque[tuple[Tensor | None, Tensor]] = field(default_factory=deque)
    sums: list[Tensor] = field(default_factory=list)


class HiddenLosses:
    """The hidden losses of one model chunk.

    Args:
        pairs: number of the pair -> (student layer, teacher layer, loss module).
        num_pairs: number of pairs of the whole model.
        balancer: returns, in every forward pass, the weight of the mean of all pairs in the total loss.
    """

    def __init__(
        self,
        pairs: dict[int, tuple[nn.Module, nn.Module, nn.Module]],
        num_pairs: int,
        balancer: WeightedLossBalancer | LogitsAndIntermediatesLossBalancer,
    ) -> None:
        self.num_pairs, self.balancer = num_pairs, balancer
        self.loss_mask_BS: Tensor | None = None
        self._pairs, self._handles = [], []
        for number, (student_layer, teacher_layer, loss) in pairs.items():
            pair = _Pair(number, loss)
            self._pairs.append(pair)
            self._handles.append(teacher_layer.register_forward_hook(_Capture(pair)))
            self._handles.append(student_layer.register_forward_hook(_AttachHook(self, pair)))

    def sums(self, device: torch.device) -> Tensor:
        """Return [num_pairs] masked sums over micro batches since the last call; 0 for pairs of other chunks."""
        total = torch.zeros(self.num_pairs, dtype=torch.float64, device=device)
        for pair in self._pairs:
            assert not pair.waiting, "a recomputed layer was not recomputed"
            if pair.sums:
                total[pair.number] = torch.stack(pair.sums).double().sum()
            pair.sums.clear()
        return total

    def remove(self) -> None:
        """Remove the hooks from the layers."""
        for handle in self._handles:
            handle.remove()


class _Capture:
    def __init__(self, pair: _Pair) -> None:
        self.pair = pair

    def __call__(self, layer: nn.Module, args: Any, output: Any) -> None:
        states = output[0] if isinstance(output, tuple) else output
        # In eval mode Megatron adds the residual into the output of attention and MLP in place (fused_bias_dropout.py).
        self.pair.teacher_output = states if isinstance(layer, TransformerLayer) else states.clone()


class _AttachHook:
    def __init__(self, losses: HiddenLosses, pair: _Pair) -> None:
        self.losses, self.pair = losses, pair

    def __call__(self, layer: nn.Module, args: Any, output: Any) -> Any:
        pair, mask_BS = self.pair, self.losses.loss_mask_BS
        differentiable = torch.is_grad_enabled()
        again = differentiable and bool(pair.waiting)
        if again:
            teacher_output, mask_BS = pair.waiting.popleft()
        else:
            teacher_output, pair.teacher_output = pair.teacher_output, None
        if mask_BS is None:  # a forward pass for logits alone
            return None
        loss = masked_sum(pair.loss(output, teacher_output), mask_BS)
        if not again:
            pair.sums.append(loss.detach())
            if layer.training and not differentiable:  # the first pass of a recomputed layer
                pair.waiting.append((teacher_output, mask_BS))
        if not differentiable:
            return None
        weight = self.losses.balancer.weights()[2]
        assert weight is not None, "hidden losses are never left out"
        loss = loss * (weight / self.losses.num_pairs)
        if isinstance(output, tuple):
            return (attach_loss(output[0], loss), *output[1:])
        return attach_loss(output, loss)
