"""ModelOpt 0.47's Megatron plugin on whole models: differences from ours. docs/semantics.md has the table."""

from typing import Any

import pytest
import torch
from torch import Tensor

from distill_nemo.config import ParallelismConfig, StudentConfig
from distill_nemo.losses.hidden import HiddenStateMSELoss
from distill_nemo.runtime.device import setup_device
from tests.unit.models.test_modelopt_agreement import (
    TEACHERS_WIDTH,
    WIDTH,
    S,
    V,
    in_groups,
    megatron_config,
    plugin,
    relative,
)

SHAPE: dict[str, Any] = {
    "num_layers": 2, "hidden_size": 64, "ffn_hidden_size": 96, "num_attention_heads": 4, "num_query_groups": 2,
    "vocab_size": V, "max_position_embeddings": 64,
}  # fmt: skip


def their_model(pairs: list[tuple[str, ...]], **changes: Any) -> Any:
    """Return a distillation model made by ModelOpt's own functions from two random fp32 models of one shape."""
    import modelopt.torch.distill as mtd

    from distill_nemo.models.megatron import gpt_model, transformer_config
    from distill_nemo.models.resolve import resolve
    from distill_nemo.runtime.seed import seed_everything

    seed_everything(0)
    resolved, parallelism = resolve(StudentConfig(family="llama", **SHAPE)), ParallelismConfig()
    recompute = changes.pop("recompute", None)
    student = gpt_model(resolved, transformer_config(resolved, parallelism, torch.float32, recompute))
    teacher = gpt_model(resolved, transformer_config(resolved, parallelism, torch.float32))
    wanted = plugin().DistillationConfig(intermediate_layer_pairs=pairs, **changes)
    wanted = plugin().setup_distillation_config(wanted, student.config, teacher.config)
    mode = {"teacher_model": teacher, "criterion": wanted.criterion, "loss_balancer": wanted.loss_balancer}
    model: Any = mtd.convert(student, mode=[("kd_loss", mode)])
    plugin().adjust_distillation_model_for_mcore(model, wanted)
    model.train()  # ModelOpt's returns None
    return model


def run_once(model: Any) -> None:
    tokens = torch.randint(V, (2, S), generator=torch.Generator().manual_seed(0))
    model(tokens, torch.arange(S).expand(2, -1), None, labels=tokens.roll(-1, 1))


def what_it_compares(part: str) -> dict[str, float]:
    """Return the distance between the captured output of a part of layer 0 and the output at the time of its return."""
    model = their_model([(f"decoder.layers.0.{part}", f"decoder.layers.0.{part}", "mse")])
    sides = {"student": model, "teacher": model.teacher_model}
    returned: dict[str, Tensor] = {}
    for side, module in sides.items():
        layer = module.decoder.layers[0].get_submodule(part)
        layer.register_forward_hook(lambda _, __, output, side=side: returned.update({side: output[0].clone()}))
    run_once(model)
    captured = {s: m.decoder.layers[0].get_submodule(part)._intermediate_output[0] for s, m in sides.items()}
    return {side: relative(captured[side].detach(), returned[side].detach()) for side in sides}


@pytest.mark.parametrize("part", ["mlp", "self_attention"])
def test_modelopt_reads_the_teachers_parts_after_the_residual_was_added_in_place(one, part: str) -> None:
    """Megatron adds in place in eval mode, so only in the teacher. The student is in training mode."""
    (moved,) = one.run(in_groups, {}, what_it_compares, part)
    assert moved["teacher"] > 0.1 and moved["student"] == 0


def logits_read(skip_lm_loss: bool) -> float:
    """Return the distance between the student's logits that ModelOpt reads and those that the output layer returned."""
    model, returned = their_model([], skip_lm_loss=skip_lm_loss), []
    model.output_layer.register_forward_hook(lambda _, __, output: returned.append(output[0].detach().clone()))
    run_once(model)
    return relative(model.output_layer._intermediate_output[0].detach(), returned[0])


def test_modelopt_reads_fp32_logits_after_megatrons_cross_entropy_overwrote_them(one) -> None:
    assert one.run(in_groups, {}, logits_read, True) == [0.0]
    assert one.run(in_groups, {}, logits_read, False)[0] > 0.1


def hidden_gradient(layer: str, recompute: str | None) -> bool:
    """Return True if the loss on this layer can be differentiated."""
    model = their_model([(layer, layer, "mse")], recompute=recompute)
    run_once(model)
    losses = model.compute_kd_loss(loss_reduction_fn=lambda loss: loss[0].sum(), skip_balancer=True)
    (loss,) = (loss for name, loss in losses.items() if name.startswith("MSELoss"))
    return loss.requires_grad


def test_modelopt_has_no_gradient_for_hidden_losses_inside_recomputed_layers(one) -> None:
    """The first pass has no gradients, and only outputs that leave the recomputed part are joined to the graph."""
    found = {
        (part, recompute): one.run(in_groups, {}, hidden_gradient, f"decoder.layers.0{part}", recompute)[0]
        for part in ("", ".mlp")
        for recompute in (None, "full")
    }
    assert found == {("", None): True, ("", "full"): True, (".mlp", None): True, (".mlp", "full"): False}


def projections() -> tuple[bool, list[str]]:
    """Return True if ModelOpt's pairs share their projection, and that projection's parameters."""
    pairs = [("decoder.layers.0", "decoder.layers.0"), ("decoder.layers.1", "decoder.layers.1")]
    wanted = plugin().DistillationConfig(intermediate_layer_pairs=pairs)
    configs = megatron_config(), megatron_config(width=TEACHERS_WIDTH)
    criterion = plugin().setup_distillation_config(wanted, *configs).criterion
    first, second = (criterion[pair]._projection for pair in pairs)
    return first is second, [name for name, _ in first._fit.named_parameters()]


def test_modelopt_shares_one_projection_with_a_bias_among_all_pairs(one) -> None:
    assert one.run(in_groups, {}, projections) == [(True, ["weight", "bias"])]
    ours = HiddenStateMSELoss(WIDTH, TEACHERS_WIDTH).projection
    assert ours is not None and [name for name, _ in ours.named_parameters()] == ["weight"]


def early_layer() -> str:
    """Return ModelOpt's error for a pair of first layers on this one of two pipeline stages."""
    setup_device()
    from megatron.core.transformer import TransformerConfig

    config = TransformerConfig(
        num_layers=4,
        hidden_size=WIDTH,
        num_attention_heads=4,
        pipeline_model_parallel_size=2,
        pipeline_dtype=torch.float32,
    )
    wanted = plugin().DistillationConfig(intermediate_layer_pairs=[("decoder.layers.0", "decoder.layers.0")])
    try:
        return f"{len(plugin().setup_distillation_config(wanted, config, config).criterion)} losses"
    except ValueError as error:
        return str(error)


def test_modelopt_refuses_hidden_losses_before_the_last_stage(two) -> None:
    first, last = two.run(in_groups, {"pipeline_model_parallel_size": 2}, early_layer)
    assert first == "0 losses" and "does not fall on final PP rank" in last
