"""Frozen layers whose weights stay in host memory, and are on the device only while they are used.

Use it for a teacher that does not fit beside its student. A layer's weights are copied while the layer before it
computes, so two layers at a time are on the device. Every micro batch copies all layers, so it pays for micro batches
of many tokens: a layer computes 2 operations per weight and token, and a weight has 2 bytes.
"""

import torch
from torch import Tensor, nn


class HostWeights:
    """Layers that run one after the other, as a Megatron block's do.

    Their parameters are empty between two uses, so the layers have no weights to save, to move or to broadcast.

    Args:
        layers: layers in the order in which they run. A micro batch runs all of them, without gradients of weights.
        device: device on which they run.

    Raises:
        ValueError: if a parameter requires a gradient: backward would need its weight again.
    """

    def __init__(self, layers: list[nn.Module], device: torch.device) -> None:
        self.layers, self.device = layers, device
        self.copies: dict[int, list[Tensor]] = {}  # by layer: its weights on the device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.hosts = [[self._keep(parameter) for parameter in layer.parameters()] for layer in layers]
        for number, layer in enumerate(layers):
            layer.register_forward_pre_hook(lambda *_, number=number: self._make_resident(number))
            layer.register_forward_hook(lambda *_, number=number: self._release(number))

    def _keep(self, parameter: nn.Parameter) -> Tensor:
        if parameter.requires_grad:
            raise ValueError("only frozen layers can keep their weights in host memory")
        host = parameter.detach().cpu()
        parameter.data = torch.empty(0, dtype=host.dtype, device=self.device)
        return host.pin_memory() if self.stream is not None else host  # pinned: else the copy would not be asynchronous

    def _make_resident(self, number: int) -> None:
        self._copy(number)
        if self.stream is not None:
            torch.cuda.current_stream().wait_stream(self.stream)
        for parameter, weight in zip(self.layers[number].parameters(), self.copies[number], strict=True):
            parameter.data = weight
        self._copy((number + 1) % len(self.layers))

    def _release(self, number: int) -> None:
        if self.stream is not None:
            # Later copies may reuse this layer's memory, so they wait for the layer. The copy under way was queued
            # before, and overlaps it. Waiting also keeps a host that runs ahead from filling the device's memory.
            self.stream.wait_stream(torch.cuda.current_stream())
        for parameter, weight in zip(self.layers[number].parameters(), self.copies.pop(number), strict=True):
            parameter.data = torch.empty(0, dtype=weight.dtype, device=weight.device)

    def _copy(self, number: int) -> None:
        if number in self.copies:
            return
        with torch.cuda.stream(self.stream):  # None: does nothing
            hosts = self.hosts[number]
            self.copies[number] = [torch.empty_like(x, device=self.device).copy_(x, non_blocking=True) for x in hosts]
