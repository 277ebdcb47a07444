"""Mixtures of experts (Qwen3-MoE): what Megatron needs to know of them, what it cannot do, and their random weights.

Every layer is a router and `num_experts` MLPs, of which a token takes `num_experts_per_tok`. Under expert parallelism
each data (and context) parallel rank holds some of the experts, and tokens travel to them.
"""

from types import SimpleNamespace
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.moe.moe_layer import MoELayer
from torch import Tensor, nn

from distill_nemo.config import ParallelismConfig
from distill_nemo.models.layers.specs import transformer_engine_usable
from distill_nemo.runtime.seed import seed_apart

MOE_FAMILIES = ("qwen3_moe",)
MOE_SIZES = ("num_experts", "num_experts_per_tok", "moe_ffn_hidden_size")
MOE_FIELDS = (*MOE_SIZES, "norm_topk_prob")


def check_experts(values: dict[str, Any]) -> None:
    """Refuse what cannot be a mixture of experts, or one that Megatron-Core does not compute as transformers does.

    Args:
        values: every field of a `ModelConfig`, defaults filled in.

    Raises:
        ValueError: naming the field, what came, what is allowed.
    """
    if values["family"] not in MOE_FAMILIES:
        given = [f"{name} = {values[name]}" for name in MOE_FIELDS if values[name] is not None]
        if given:
            raise ValueError(
                f'{", ".join(given)}: family "{values["family"]}" has no experts; {" or ".join(MOE_FAMILIES)} has'
            )
        return
    for name in MOE_SIZES:
        if values[name] < 1:
            raise ValueError(f"{name} must be at least 1, got {values[name]}")
    experts, chosen = values["num_experts"], values["num_experts_per_tok"]
    if chosen > experts:
        raise ValueError(f"num_experts_per_tok = {chosen} is above num_experts = {experts}")
    if chosen == 1 and values["norm_topk_prob"]:
        raise ValueError(
            "norm_topk_prob = True with num_experts_per_tok = 1 gives every expert the weight 1, which Megatron-Core "
            "refuses: the router would have no gradient. Set norm_topk_prob to False, or num_experts_per_tok above 1"
        )
    if values["block_configs"] is not None:
        raise ValueError(
            f'block_configs: layers that differ are not supported with experts (family "{values["family"]}")'
        )


def expert_settings(model: Any, parallelism: ParallelismConfig, dtype: torch.dtype) -> dict[str, Any]:
    """Fields of Megatron's TransformerConfig of a resolved model; a dense one beside experts is not split over them.

    norm_topk_prob: softmax over the chosen logits is the softmax over all, divided by its sum over the chosen.
    """
    if model.num_experts is None:
        return {"expert_model_parallel_size": 1}
    on_cuda = torch.cuda.is_available()
    return {
        "num_moe_experts": model.num_experts,
        "moe_router_topk": model.num_experts_per_tok,
        "moe_ffn_hidden_size": model.moe_ffn_hidden_size,
        "moe_router_pre_softmax": not model.norm_topk_prob,
        # An auxiliary loss would change the objective: the loss that is reported would not be the one that is followed.
        "moe_router_load_balancing_type": "none",
        "moe_aux_loss_coeff": 0.0,
        # gloo's all_to_all_single takes no tensors as split sizes; both dispatchers compute the same.
        "moe_token_dispatcher_type": "alltoall" if on_cuda else "allgather",
        "moe_grouped_gemm": transformer_engine_usable(dtype),
        "expert_model_parallel_size": parallelism.expert_model_parallel_size,
        "expert_tensor_parallel_size": parallelism.tensor_model_parallel_size,
    }


def one_expert(grouped: nn.Module, number: int) -> nn.Module:
    """A module whose `weight` is that of local expert `number` inside Transformer Engine's grouped linear layer."""
    one: Any = nn.Module()
    one.weight = getattr(grouped, f"weight{number}")
    one.config = SimpleNamespace(ffn_hidden_size=len(one.weight) // 2)  # where ModelOpt parts linear_fc1's gate and up
    return one


def keep_experts_apart(built: GPTModel) -> None:
    """Give the experts gradient buffers and an optimizer of their own, as Megatron does under expert parallelism only.

    Then their optimizer state has the same place at every expert parallel size, and a checkpoint can be resharded.
    """
    for layer in built.modules():
        if isinstance(layer, MoELayer):
            experts: Any = layer.experts
            for parameter in experts.parameters():
                parameter.allreduce = False


@torch.no_grad()
def initialise_experts(built: GPTModel) -> None:
    """Random weights of each expert by its number in the model, so the same at every layout.

    Megatron draws those of the local experts from the generator that all ranks share: experts of different ranks would
    be copies of each other.
    """
    for layer in built.modules():
        if isinstance(layer, MoELayer):
            local: Any = layer
            before = (local.layer_number - 1) * local.config.num_moe_experts
            for i, number in enumerate(local.local_expert_indices):
                for kind in ("linear_fc1", "linear_fc2"):
                    _weight(local.experts, kind, i).copy_(_drawn(kind, before + number, local.config))


def _weight(experts: Any, kind: str, number: int) -> Tensor:
    if hasattr(experts, "local_experts"):
        return getattr(experts.local_experts[number], kind).weight
    return getattr(getattr(experts, kind), f"weight{number}")


def _drawn(kind: str, number: int, config: Any) -> Tensor:
    """This rank's part of an expert's weight, drawn whole; gate and up are each split over tensor parallel ranks."""
    first = kind == "linear_fc1"
    init = config.init_method if first else config.output_layer_init_method
    ffn, hidden = config.moe_ffn_hidden_size, config.hidden_size
    whole = torch.empty((2, ffn, hidden) if first else (1, hidden, ffn))
    with seed_apart(2 * number + first + 1):
        init(whole)
    group: Any = parallel_state.get_expert_tensor_parallel_group()
    return whole.chunk(group.size(), dim=1 if first else 2)[group.rank()].flatten(0, 1)
