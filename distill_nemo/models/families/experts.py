"""Mixtures of experts, as model families state them in `config.json`."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, Self

from distill_nemo.fields import require, setting
from distill_nemo.models.architecture import EXPERT_FIELDS, Architecture, Experts, Layer
from distill_nemo.models.config_fields import MAX_EXPERTS, MAX_LAYERS, MAX_NUMBER, MAX_SIZE, Fields
from distill_nemo.models.families.family import OwnFields, softmax_experts


def read_experts(config: Fields, count: str = "num_experts", width: str = "moe_intermediate_size") -> dict[str, Any]:
    """Read the experts' `ModelConfig` fields.

    Args:
        config: of the model.
        count: name of the number of experts; transformers 5 may have written `num_local_experts` in its place.
        width: name of the width of one.
    """
    other = "num_local_experts"
    only_other = config.values.get(count) is None and config.values.get(other) is not None
    return {
        "num_experts": config.integer(other if only_other else count, most=MAX_EXPERTS),
        "num_experts_per_tok": config.integer("num_experts_per_tok", most=MAX_EXPERTS),
        "moe_ffn_hidden_size": config.integer(width),
        "norm_topk_prob": config.flag("norm_topk_prob"),
    }


def with_dense_layers(values: dict[str, Any], layers: tuple[Layer, ...], dense: Iterable[int]) -> tuple[Layer, ...]:
    """Replace the experts of the layers with these numbers by one MLP."""
    numbers = set(dense)
    mlp = {"has_experts": False, "ffn_hidden_size": values["ffn_hidden_size"]}
    return tuple(replace(layer, **mlp) if i in numbers else layer for i, layer in enumerate(layers))


def write_experts(
    model: Architecture, count: str = "num_experts", width: str = "moe_intermediate_size"
) -> dict[str, Any]:
    """Return the fields of `config.json` that `read_experts` reads."""
    experts = model.experts
    assert experts is not None
    return {
        count: experts.num_experts,
        "num_experts_per_tok": experts.num_experts_per_tok,
        width: experts.moe_ffn_hidden_size,
        "norm_topk_prob": experts.norm_topk_prob,
    }


@dataclass(frozen=True)
class SparseStep(OwnFields):
    """Qwen's dense layers among those with experts."""

    decoder_sparse_step: int = setting(1, "layers from one with experts to the next", at_least=1, at_most=MAX_LAYERS)
    mlp_only_layers: list[int] = setting([], "numbers of further layers without experts")

    def resolved(self, values: dict[str, Any]) -> Self:
        """List all dense layers in `mlp_only_layers`. Refuse a model without experts."""
        count, step = values["num_layers"], self.decoder_sparse_step
        dense = [i for i in range(count) if i in self.mlp_only_layers or (i + 1) % step]
        require(
            len(dense) < count,
            f"decoder_sparse_step = {step} and mlp_only_layers = {self.mlp_only_layers} leave no layer with experts",
        )
        return replace(self, decoder_sparse_step=1, mlp_only_layers=dense)


def with_sparse_step(values: dict[str, Any], layers: tuple[Layer, ...]) -> tuple[Layer, ...]:
    """Return the layers of a model with `SparseStep` fields (`Family.layers`)."""
    return with_dense_layers(values, layers, values["family_fields"]["mlp_only_layers"])


@dataclass(frozen=True)
class GatedSharedExpert(SparseStep):
    """Qwen's expert for every token, with a gate."""

    shared_expert_intermediate_size: int = setting(5632, "width of the shared expert", at_least=1, at_most=MAX_SIZE)


def with_gated_shared_expert(values: dict[str, Any]) -> Experts:
    """Return the experts of a model with `GatedSharedExpert` fields (`Family.experts`)."""
    width = values["family_fields"]["shared_expert_intermediate_size"]
    return replace(softmax_experts(values), shared_ffn_hidden_size=width, has_shared_gate=True)


@dataclass(frozen=True)
class SigmoidRouter(OwnFields):
    """Router of DeepSeek-V3: sigmoids and a bias choose groups, then experts; some experts are shared by all tokens."""

    n_group: int = setting(1, "groups of experts", at_least=1, at_most=MAX_EXPERTS)
    topk_group: int = setting(1, "groups that a token's experts are chosen from", at_least=1, at_most=MAX_EXPERTS)
    routed_scaling_factor: float = setting(1.0, "of the experts' weights", above=0, at_most=MAX_NUMBER)
    n_shared_experts: int = setting(1, "that process every token", at_least=1, at_most=MAX_EXPERTS)

    def resolved(self, values: dict[str, Any]) -> Self:
        """Drop groups of which all are chosen. Refuse routing that Megatron-Core computes differently."""
        count, chosen = values["num_experts"], values["num_experts_per_tok"]
        require(
            values["norm_topk_prob"] or chosen == 1,
            f"norm_topk_prob = False with num_experts_per_tok = {chosen} is not supported: Megatron-Core divides "
            "sigmoids by their sum",
        )
        require(
            count % self.n_group == 0 and self.topk_group <= self.n_group,
            f"n_group = {self.n_group} must divide num_experts = {count}, and be at least topk_group = "
            f"{self.topk_group}",
        )
        if self.topk_group == self.n_group:
            return replace(self, n_group=1, topk_group=1)
        each = count // self.n_group
        require(
            chosen // self.topk_group == 2 and each >= 2 and chosen <= self.topk_group * each,
            f"n_group = {self.n_group} and topk_group = {self.topk_group} with num_experts = {count} and "
            f"num_experts_per_tok = {chosen} are not supported: Megatron-Core compares groups by the sum of "
            f"num_experts_per_tok / topk_group scores, transformers by the sum of 2",
        )
        return self


@dataclass(frozen=True)
class DenseFirst(SigmoidRouter):
    """The same, after some layers with an MLP in place of experts."""

    first_k_dense_replace: int = setting(1, "first layers without experts", at_least=0, at_most=MAX_LAYERS)

    def resolved(self, values: dict[str, Any]) -> Self:
        """Refuse a model without experts."""
        dense, count = self.first_k_dense_replace, values["num_layers"]
        require(dense < count, f"first_k_dense_replace = {dense} leaves no layer with experts, num_layers = {count}")
        return super().resolved(values)


def sigmoid_experts(values: dict[str, Any]) -> Experts:
    """Return the experts behind a `SigmoidRouter` (`Family.experts`)."""
    own = values["family_fields"]
    return Experts(
        **{name: values[name] for name in EXPERT_FIELDS},
        score_function="sigmoid",
        has_expert_bias=True,
        num_groups=own["n_group"],
        num_chosen_groups=own["topk_group"],
        scaling_factor=own["routed_scaling_factor"],
        fp32_router=True,
        shared_ffn_hidden_size=own["n_shared_experts"] * values["moe_ffn_hidden_size"],
    )


def dense_first(values: dict[str, Any], layers: tuple[Layer, ...]) -> tuple[Layer, ...]:
    """Return the layers of a model with `DenseFirst` fields (`Family.layers`)."""
    return with_dense_layers(values, layers, range(values["family_fields"]["first_k_dense_replace"]))
