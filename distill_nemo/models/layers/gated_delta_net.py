"""Gated delta nets: Megatron's layer, with or without the kernels of flash-linear-attention.

Queries, keys and values pass through a short causal convolution, then through the gated delta rule (`delta_rule`). The
output is normalised in each head, and multiplied by a gate. In bf16 on a GPU, the kernels compute all this but the
norm; elsewhere torch does.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any

import torch
from megatron.core.ssm import gated_delta_net
from megatron.core.ssm.gated_delta_net import GatedDeltaNetSubmodules, common
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.mappings import copy_to_tensor_model_parallel_region
from megatron.core.transformer import ModuleSpec, TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules
from torch import Tensor, nn

from distill_nemo.models.architecture import Architecture, DeltaNet
from distill_nemo.models.layers.delta_rule import delta_rule
from distill_nemo.models.layers.norms import RMSNorm
from distill_nemo.runtime.seed import seed_apart

INSTALL = 'pip install "flash-linear-attention~=0.4"'


def delta_net_settings(model: Architecture, delta_net: DeltaNet, dtype: torch.dtype) -> dict[str, Any]:
    """Return fields of Megatron's TransformerConfig.

    Raises:
        ValueError: if the kernels are not installed on a GPU.
    """
    by_kernels = torch.cuda.is_available() and dtype != torch.float32  # in fp32 they would multiply in TF32
    if by_kernels and not common.HAVE_FLA:
        raise ValueError(
            f"{model.name}: on a GPU, its gated delta nets need flash-linear-attention, which is missing: {INSTALL}"
        )
    return {
        "experimental_attention_variant": "gated_delta_net",
        "linear_attention_freq": [int(layer.mixer == "gated_delta_net") for layer in model.layers],
        **asdict(delta_net),
        "deterministic_mode": not by_kernels,  # chooses Megatron's torch code
    }


def use_delta_net(parts: TransformerLayerSubmodules, norm: Any, use_te: bool) -> None:
    """Put a delta net in place of a layer's attention, with a norm before it."""
    column, row = ColumnParallelLinear, RowParallelLinear
    if use_te:
        from megatron.core.extensions.transformer_engine import TEColumnParallelLinear, TERowParallelLinear

        column, row = TEColumnParallelLinear, TERowParallelLinear
    parts.input_layernorm = norm
    parts.sharded_state_dict_keys_map.pop("input_layernorm.", None)  # it is stored under its own name
    parts.self_attention = ModuleSpec(
        GatedDeltaNet, submodules=GatedDeltaNetSubmodules(in_proj=column, out_norm=HeadNorm, out_proj=row)
    )


class HeadNorm(RMSNorm):
    """RMSNorm of each head's output, never zero-centred.

    A rank has some of the heads, so the gradients of the weight are summed over tensor-parallel ranks, in backward.
    Megatron would do so under sequence parallelism only.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: object) -> None:
        super().__init__(config, hidden_size, eps)
        self.zero_centred = False
        nn.init.ones_(self.weight)
        del self.weight.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x_SBH: Tensor) -> Tensor:
        """Return the normalised input, in its shape and dtype. Backward: an all-reduce over tensor-parallel ranks."""
        x = x_SBH.float()
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)
        return _gradient_summed(self.weight) * x.to(x_SBH.dtype)


# Megatron compiles what calls the norm on a GPU; a collective in backward stays outside.
_gradient_summed: Callable[[Tensor], Tensor] = torch.compiler.disable(  # pyright: ignore[reportAssignmentType]
    copy_to_tensor_model_parallel_region
)


class GatedDeltaNet(gated_delta_net.GatedDeltaNet):
    """Megatron's, which also runs without flash-linear-attention, and takes the exponential of `A_log` in fp32."""

    def __init__(self, config: TransformerConfig, *args: Any, **kwargs: Any) -> None:
        if not config.deterministic_mode:
            super().__init__(config, *args, **kwargs)
            return
        with _without_kernels():
            super().__init__(config, *args, use_qk_l2norm=False, **kwargs)
        self.gated_delta_rule = delta_rule  # pyright: ignore[reportAttributeAccessIssue]  # it is called by keywords

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """Return the output, and no bias. Collective over context-parallel ranks, which then hold heads."""
        if not self.config.deterministic_mode:
            return super().forward(*args, **kwargs)
        with torch.compiler.set_stance("force_eager"):  # compiling takes seconds, and rounds in another way
            return super().forward(*args, **kwargs)

    def _compute_g_and_beta(
        self, A_log_local_cp: Tensor, dt_bias_local_cp: Tensor, alpha: Tensor, beta: Tensor
    ) -> tuple[Tensor, Tensor]:
        return super()._compute_g_and_beta(A_log_local_cp.float(), dt_bias_local_cp, alpha, beta)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw random weights, the same at every tensor-parallel size.

        Megatron draws each rank's part, or splits matrices without regard to their sections.
        """
        config, kernel = self.config, self.config.linear_conv_kernel_dim
        if not config.perform_initialization:
            return
        assert self.layer_number is not None and config.init_method is not None and kernel is not None
        sections = [self.tp_size * size for size in self.in_proj_split_sections]
        in_proj = torch.empty(sum(sections), self.hidden_size)
        convolution = torch.empty(sum(sections[:3]), 1, kernel)
        with seed_apart(-self.layer_number):
            config.init_method(in_proj)
            convolution.uniform_(-(kernel**-0.5), kernel**-0.5)  # as torch's Conv1d
            decay = torch.empty(sections[-1]).uniform_(*self.A_init_range).log()
        self._copy(self.in_proj.weight, in_proj, sections)
        self._copy(self.conv1d.weight, convolution, sections[:3])
        self._copy(self.A_log, decay, sections[-1:])
        self.dt_bias.fill_(1)

    def _copy(self, own: Tensor, whole: Tensor, sections: list[int]) -> None:
        rank = self.tp_group.rank()
        own.copy_(torch.cat([section.chunk(self.tp_size)[rank] for section in whole.split(sections)]))


@contextlib.contextmanager
def _without_kernels() -> Iterator[None]:
    """Let Megatron build the layer even if flash-linear-attention is not installed: its torch code needs none."""
    before, common.HAVE_FLA = common.HAVE_FLA, True
    try:
        yield
    finally:
        common.HAVE_FLA = before
