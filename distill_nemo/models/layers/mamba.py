"""Mamba-2 mixer, in the place of a layer's attention.

Megatron-Core's own fits another place, cannot be built without mamba_ssm and einops, draws different weights at every
tensor parallel size, and names them differently in 0.18 and in 0.19.

Legend: S tokens, B samples, W width of the residual stream; C channels of z, x, b, c and dt on this tensor-parallel
rank: z and x have p for each head, b and c n for each group of heads, dt has one for each head.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import build_module
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint, sharded_state_dict_default
from torch import Tensor, nn
from torch.nn import functional

from distill_nemo.models.architecture import Mamba
from distill_nemo.models.layers.sharded_parts import in_parts
from distill_nemo.models.layers.state_space import causal_convolution, gated_norm, scan

DECAYS = (1.0, 16.0)  # range of exp(A_log) in random weights, as the authors of Mamba-2 draw it
STEPS = (1e-3, 1e-1)  # and of softplus(dt_bias)
CONVOLUTION = ("conv1d.weight", "conv1d.bias")


@dataclass
class MambaSubmodules:
    """Linear layers into and out of the mixer."""

    in_proj: Any
    out_proj: Any


class MambaMixer(MegatronModule):
    """Mamba-2 (Dao & Gu, arXiv:2405.21060) with a norm by group after the gate, as Nemotron-H has it.

    ```
    z, x, b, c, dt = in_proj(hidden).split(...)
    x, b, c = silu(causal_convolution(cat([x, b, c]))).split(...)
    y = scan(x, softplus(dt + dt_bias), -exp(A_log), b, c) + D * x
    out_proj(rms_norm_by_group(y * silu(z)))
    ```
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: MambaSubmodules,
        sizes: Mamba,
        layer_number: int,
        pg_collection: ProcessGroupCollection,
        **_: object,
    ) -> None:
        super().__init__(config=config)
        self.layer_number, self.tp_group = layer_number, pg_collection.tp
        self.own = sizes.share(self.tp_group.size())
        common: dict[str, Any] = {"config": config, "bias": False, "is_expert": False, "tp_group": self.tp_group}
        self.in_proj = build_module(
            submodules.in_proj,
            config.hidden_size,
            sum(sizes.projected),
            init_method=functools.partial(self._initialise_in_proj, sizes=sizes),
            gather_output=False,
            skip_bias_add=False,
            tp_comm_buffer_name="fc1",
            **common,
        )
        bound = sizes.conv_kernel**-0.5
        self.conv1d = nn.ParameterDict(
            {
                "weight": self._parameter(
                    torch.empty(sum(sizes.convolved), 1, sizes.conv_kernel).uniform_(-bound, bound), sizes.convolved
                ),
                "bias": self._parameter(torch.empty(sum(sizes.convolved)).uniform_(-bound, bound), sizes.convolved),
            }
        )
        steps = torch.empty(sizes.num_heads).uniform_(*torch.tensor(STEPS).log().tolist()).exp()
        self.dt_bias = self._parameter(steps + (-torch.expm1(-steps)).log())  # the inverse of softplus
        self.A_log = self._parameter(torch.empty(sizes.num_heads).uniform_(*DECAYS).log())
        self.D = self._parameter(torch.ones(sizes.num_heads))
        self.norm = nn.ParameterDict({"weight": self._parameter(torch.ones(sizes.channels))})
        self.out_proj = build_module(
            submodules.out_proj,
            sizes.channels,
            config.hidden_size,
            init_method=config.output_layer_init_method,
            input_is_parallel=True,
            skip_bias_add=True,
            tp_comm_buffer_name="fc2",
            **common,
        )

    def _initialise_in_proj(self, weight: Tensor, sizes: Mamba) -> None:
        """Draw the whole weight, and order its rows so that Megatron gives every rank its share of each part."""
        assert self.config.init_method is not None, "Megatron fills it"
        self.config.init_method(weight)
        size = self.tp_group.size()
        weight.copy_(torch.cat([_share(weight, sizes.projected, rank, size) for rank in range(size)]))

    def _parameter(self, whole: Tensor, parts: Sequence[int] | None = None) -> nn.Parameter:
        """Return this rank's share of a tensor, or of its parts. All ranks have drawn the same one."""
        own = _share(whole, parts or [len(whole)], self.tp_group.rank(), self.tp_group.size())
        parameter = nn.Parameter(own.to(self.config.params_dtype))
        set_tensor_model_parallel_attributes(parameter, is_parallel=True, dim=0, stride=1)
        return parameter

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, **_: object
    ) -> tuple[Tensor, Tensor | None]:
        """Mix the tokens of [S, B, W]. Further arguments are those of attention, and are not used.

        Collectives over the tensor-parallel group: those of the two linear layers.
        """
        projected_SBC, _ = self.in_proj(hidden_states)
        projected_BSC = projected_SBC.transpose(0, 1).contiguous()
        mixed_BSC = self._mix_by_kernel(projected_BSC) if projected_BSC.is_cuda else self._mix(projected_BSC)
        return self.out_proj(mixed_BSC.transpose(0, 1).contiguous())

    def _mix_by_kernel(self, projected_BSC: Tensor) -> Tensor:
        return fused_kernel()(
            projected_BSC,
            self.conv1d["weight"][:, 0],
            self.conv1d["bias"],
            self.dt_bias.float(),
            -self.A_log.float().exp(),
            D=self.D.float(),
            chunk_size=self.own.chunk_size,
            activation="silu",
            rmsnorm_weight=self.norm["weight"],
            rmsnorm_eps=self.config.layernorm_epsilon,
            headdim=self.own.head_dim,
            ngroups=self.own.num_groups,
            norm_before_gate=False,
        )

    def _mix(self, projected_BSC: Tensor) -> Tensor:
        own, dtype = self.own, torch.promote_types(projected_BSC.dtype, torch.float32)
        z, convolved, dt = projected_BSC.split([own.channels, sum(own.convolved), own.num_heads], dim=-1)
        convolved = causal_convolution(convolved, self.conv1d["weight"][:, 0], self.conv1d["bias"])
        x, b, c = (part.to(dtype).unflatten(-1, (own.num_groups, -1)) for part in convolved.split(own.convolved, -1))
        x = x.unflatten(-1, (-1, own.head_dim))
        dt = functional.softplus(dt.to(dtype) + self.dt_bias.to(dtype)).unflatten(-1, (own.num_groups, -1))
        a, d = (each.to(dtype).view(own.num_groups, -1) for each in (-self.A_log.to(dtype).exp(), self.D))
        y = scan(x, dt, a, b, c, own.chunk_size) + d[..., None] * x
        eps = self.config.layernorm_epsilon
        return gated_norm(y.flatten(2), z, self.norm["weight"], own.num_groups, eps).to(projected_BSC.dtype)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Return the shards of all parameters. A checkpoint holds the parts of one whole, one after another."""
        own = {name: each for name, each in self.named_parameters() if "_proj" not in name}
        shards = make_sharded_tensors_for_checkpoint(own, prefix, dict.fromkeys(own, 0), sharded_offsets)
        for name in ("in_proj", "out_proj"):
            module = self.get_submodule(name)
            shards |= sharded_state_dict_default(module, f"{prefix}{name}.", sharded_offsets, metadata)
        parts = {"in_proj.weight": self.own.projected, **dict.fromkeys(CONVOLUTION, self.own.convolved)}
        return shards | {prefix + name: in_parts(shards[prefix + name], rows) for name, rows in parts.items()}


def _share(whole: Tensor, parts: Sequence[int], rank: int, size: int) -> Tensor:
    """Return a rank's rows of each part."""
    return torch.cat([part.chunk(size)[rank] for part in whole.split(list(parts))])


@functools.cache
def fused_kernel() -> Callable[..., Tensor]:
    """Return mamba_ssm's kernel for convolution, scan, gate and norm.

    Raises:
        ValueError: if it cannot be imported, with the packages to install.
    """
    try:
        import causal_conv1d  # type: ignore[import-not-found]  # noqa: F401
        from mamba_ssm.ops.triton.ssd_combined import (  # type: ignore[import-not-found]
            mamba_split_conv1d_scan_combined,
        )
    except ImportError as error:
        raise ValueError(
            f"Mamba layers need mamba_ssm and causal_conv1d on a GPU ({error}): pip install 'distill-nemo[ssm]' "
            "--no-build-isolation, in an environment with torch and CUDA's compiler"
        ) from None
    return mamba_split_conv1d_scan_combined
