"""Mixtures of experts in Megatron: settings, optimizer, random weights.

A layer has a router and `num_experts` MLPs. A token is routed to `num_experts_per_tok` of them. Under expert
parallelism each data (and context) parallel rank holds some of the experts, and tokens travel to them.
"""

from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.moe.moe_layer import MoELayer
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from distill_nemo.config import ParallelismConfig
from distill_nemo.models.architecture import Architecture
from distill_nemo.models.layers.specs import uses_transformer_engine
from distill_nemo.runtime.seed import seed_apart


def expert_settings(model: Architecture, parallelism: ParallelismConfig, dtype: torch.dtype) -> dict[str, Any]:
    """Return fields of Megatron's TransformerConfig. A dense model beside one with experts has no expert parallelism.

    norm_topk_prob: the softmax over the chosen logits is the softmax over all, divided by its sum over the chosen.
    Sigmoids are always divided by their sum; `families/experts.py` refuses others.
    """
    experts = model.experts
    if experts is None:
        return {"expert_model_parallel_size": 1}
    on_cuda = torch.cuda.is_available()
    has_experts = [int(layer.has_experts) for layer in model.layers]
    grouped = experts.num_chosen_groups < experts.num_groups
    return {
        **({} if all(has_experts) else {"moe_layer_freq": has_experts}),
        "num_moe_experts": experts.num_experts,
        "moe_router_topk": experts.num_experts_per_tok,
        "moe_ffn_hidden_size": experts.moe_ffn_hidden_size,
        "moe_router_pre_softmax": not experts.norm_topk_prob,
        "moe_router_score_function": experts.score_function,
        "moe_router_enable_expert_bias": experts.has_expert_bias,
        "moe_router_num_groups": experts.num_groups if grouped else None,
        "moe_router_group_topk": experts.num_chosen_groups if grouped else None,
        "moe_router_topk_scaling_factor": experts.scaling_factor if experts.scaling_factor != 1 else None,
        "moe_router_dtype": "fp32" if experts.fp32_router else None,
        "moe_shared_expert_intermediate_size": experts.shared_ffn_hidden_size,
        "moe_shared_expert_gate": experts.has_shared_gate,
        # An auxiliary loss would change the objective: the reported loss would not be the one that is minimised.
        "moe_router_load_balancing_type": "none",
        "moe_aux_loss_coeff": 0.0,
        # gloo's all_to_all_single takes no tensors as split sizes; both dispatchers compute the same.
        "moe_token_dispatcher_type": "alltoall" if on_cuda else "allgather",
        "moe_grouped_gemm": uses_transformer_engine(model, dtype),
        "expert_model_parallel_size": parallelism.expert_model_parallel_size,
        "expert_tensor_parallel_size": parallelism.tensor_model_parallel_size,
    }


def keep_experts_apart(built: GPTModel) -> None:
    """Give the experts their own gradient buffers and optimizer, as Megatron does only under expert parallelism.

    Their optimizer state then has the same place at every expert-parallel size, and a checkpoint can be resharded.
    """
    for layer in built.modules():
        if isinstance(layer, MoELayer):
            for parameter in layer.get_submodule("experts").parameters():
                vars(parameter)["allreduce"] = False


def clone_expert_outputs(built: GPTModel) -> None:
    """Let Megatron add biases to the outputs of experts, in place: they are views, which autograd would refuse."""
    for module in built.modules():
        if isinstance(module, SequentialMLP) and built.config.add_bias_linear:
            for expert in module.local_experts:
                expert.get_submodule("linear_fc2").register_forward_hook(_cloned)


def _cloned(layer: nn.Module, args: Any, output: tuple[Tensor, Tensor | None]) -> tuple[Tensor, Tensor | None]:
    return output[0].clone(), output[1]


def keep_expert_bias(built: GPTModel) -> None:
    """Keep the bias as it is stored. Megatron would move it after each step, towards experts that are equally busy.

    It would also look for counts of tokens in the routers of a teacher without a bias, which have none.
    """
    built.config.moe_router_enable_expert_bias = False  # read by routers when they are built, then after each step


@torch.no_grad()
def initialise_experts(built: GPTModel) -> None:
    """Draw each expert's random weights by its number in the model, so that they are the same at every layout.

    Megatron draws them from a generator that all ranks share, so experts of different ranks would be copies.
    """
    for layer in built.modules():
        if isinstance(layer, MoELayer):
            assert layer.layer_number is not None and layer.config.num_moe_experts is not None
            before = (layer.layer_number - 1) * layer.config.num_moe_experts
            for i, number in enumerate(layer.local_expert_indices):
                for kind in ("linear_fc1", "linear_fc2"):
                    _weight(layer.get_submodule("experts"), kind, i).copy_(_drawn(kind, before + number, layer.config))


def _weight(experts: nn.Module, kind: str, number: int) -> Tensor:
    if isinstance(experts, SequentialMLP):
        return experts.get_parameter(f"local_experts.{number}.{kind}.weight")
    return experts.get_parameter(f"{kind}.weight{number}")


def _drawn(kind: str, number: int, config: TransformerConfig) -> Tensor:
    """Draw an expert's whole weight; return this rank's part. Gate and up are each split over tensor parallel ranks."""
    first = kind == "linear_fc1"
    init = config.init_method if first else config.output_layer_init_method
    ffn, hidden = config.moe_ffn_hidden_size, config.hidden_size
    assert init is not None and ffn is not None, "Megatron fills them"
    halves = 2 if config.gated_linear_unit else 1
    whole = torch.empty((halves, ffn, hidden) if first else (1, hidden, ffn))
    with seed_apart(2 * number + first + 1):
        init(whole)
    group = parallel_state.get_expert_tensor_parallel_group()
    assert isinstance(group, ProcessGroup)
    return whole.chunk(group.size(), dim=1 if first else 2)[group.rank()].flatten(0, 1)
