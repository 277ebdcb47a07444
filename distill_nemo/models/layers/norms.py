"""RMSNorm for machines on which Transformer Engine does not run."""

import torch
from megatron.core.transformer import TransformerConfig
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """`x * rsqrt(mean(x^2) + eps) * weight`, fp32 inside (Zhang & Sennrich 2019, as Llama applies it).

    With `layernorm_zero_centered_gamma` the factor is `1 + weight`, in fp32 (as Gemma applies it).
    Megatron's torch norm refuses sequence parallelism; this one marks its weight, so that its gradient is summed over
    the ranks that hold the other parts of the sequence.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: object) -> None:
        super().__init__()
        self.eps, self.zero_centred = eps, config.layernorm_zero_centered_gamma
        initial = torch.zeros if self.zero_centred else torch.ones
        self.weight = nn.Parameter(initial(hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x_SBH: Tensor) -> Tensor:
        """Return the normalised input, in its shape and dtype."""
        x = x_SBH.float()
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)
        if self.zero_centred:
            return (x * (1 + self.weight.float())).to(x_SBH.dtype)
        return self.weight * x.to(x_SBH.dtype)
