"""Turn a student and a teacher into one ModelOpt distillation model that Megatron-Core's schedules can run.

ModelOpt hooks the layers named in the criterion and computes their losses. This file adds what Megatron needs and
ModelOpt's own plugin lacks or gets wrong; each function below describes its part.
"""

import copy
import sys
from types import MethodType
from typing import Any

import modelopt.torch.distill as mtd
import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.enums import LayerType
from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout
from torch import Tensor, nn

from distill_nemo.balancers import LogitsAndIntermediatesLossBalancer, WeightedLossBalancer
from distill_nemo.config import DistillationConfig
from distill_nemo.losses.hidden import HiddenStateCosineLoss, HiddenStateMSELoss
from distill_nemo.losses.logits import LogitsKLLoss
from distill_nemo.models.architecture import Models
from distill_nemo.models.distillation.fused_output import (
    FusedLogits,
    hand_on_hidden_states,
    tensor_parallel_group,
    why_not_fused,
)
from distill_nemo.models.distillation.hidden_losses import HiddenLosses
from distill_nemo.models.distillation.objective import Balancer, WholeLogits, objective_of
from distill_nemo.models.hidden_layers import locate_pairs

HIDDEN = {"cosine": HiddenStateCosineLoss, "mse": HiddenStateMSELoss}
ATTACHED = "_attached_by_distillation"  # attribute with the names that `attach` has set on an instance


def convert_to_distillation_model(
    student: GPTModel, teacher: GPTModel, distill_cfg: DistillationConfig, models: Models
) -> mtd.DistillationModel:
    """Call `mtd.convert` with our losses and balancer, then `adjust_distillation_model_for_mcore`.

    Args:
        student: this pipeline stage of the student, trainable.
        teacher: the same stage of the teacher, frozen.
        distill_cfg: losses and their weights.
        models: architectures of both.

    Raises:
        ValueError: on every stage, for a hidden layer that does not exist or a pair on two stages; on the last stage,
            if `fused_linear` is true but the output layers cannot be fused.
    """
    pairs = hidden_pairs(student, teacher, distill_cfg)
    fuses = fuses_output(student, teacher, distill_cfg)
    if not distill_cfg.uses_logits:
        _drop_output_layer(teacher)
    balancer = build_balancer(distill_cfg)
    logits_loss = build_logits_loss(student, distill_cfg, models.student.vocab_size)
    criterion = {} if logits_loss is None else {("output_layer", "output_layer"): logits_loss}
    mode = {"teacher_model": teacher, "criterion": criterion, "loss_balancer": balancer}
    model: Any = mtd.convert(student, mode=[("kd_loss", mode)])
    modules = {str(number): loss for number, (_, _, loss) in pairs.items() if loss.projection is not None}
    model._loss_modules = nn.ModuleDict(modules)  # by the number in the config: the same at every layout
    hidden_losses = HiddenLosses(pairs, len(distill_cfg.hidden_layers), balancer)
    if fuses:
        objective = FusedLogits(student, teacher, distill_cfg, models, balancer, hidden_losses)
    else:
        objective = WholeLogits(model, logits_loss, balancer, hidden_losses)
    attach(model, objective=objective)
    return adjust_distillation_model_for_mcore(model, distill_cfg)


def attach(model: nn.Module, **attributes: object) -> None:
    """Set attributes of this instance until `detach`, bypassing module registration and ModelOpt's `__setattr__`."""
    for name, value in attributes.items():
        object.__setattr__(model, name, value)
    object.__setattr__(model, ATTACHED, {*vars(model).get(ATTACHED, ()), *attributes})


def detach(model: nn.Module) -> None:
    """Remove everything that was attached to a model and its teacher, and the hooks of the hidden losses."""
    hidden_losses = objective_of(model).hidden_losses
    if hidden_losses is not None:
        hidden_losses.remove()
    for each in (model, model.teacher_model) if isinstance(model, mtd.DistillationModel) else (model,):
        for name in vars(each).pop(ATTACHED):
            del vars(each)[name]


def build_balancer(distill_cfg: DistillationConfig) -> Balancer:
    """Return the static balancer (fixed weights) or the dynamic one."""
    if distill_cfg.balancer == "static":
        return WeightedLossBalancer(distill_cfg.lm_weight, distill_cfg.logits_weight, distill_cfg.hidden_weight)
    return LogitsAndIntermediatesLossBalancer(distill_cfg.kd_loss_scale, distill_cfg.skip_lm_loss)


def _drop_output_layer(teacher: Any) -> None:
    """Make the teacher end with its last norm."""
    if teacher.post_process:
        teacher.post_process = False
        del teacher.output_layer


def build_logits_loss(student: GPTModel, distill_cfg: DistillationConfig, vocab_size: int) -> LogitsKLLoss | None:
    """Return the logits loss on the last stage, if it is used."""
    if not student.post_process or not distill_cfg.uses_logits:
        return None
    group = tensor_parallel_group(student)
    width = student.output_layer.output_size_per_partition
    return LogitsKLLoss(
        divergence=distill_cfg.divergence,
        temperature=distill_cfg.temperature,
        scale_by_temperature_squared=distill_cfg.scale_by_temperature_squared,
        true_vocab_size=vocab_size,
        group=group,
        vocab_start=parallel_state.get_tensor_model_parallel_rank() * width,
        beta=distill_cfg.beta,
        top_k=distill_cfg.top_k,
    )


def fuses_output(student: GPTModel, teacher: GPTModel, distill_cfg: DistillationConfig) -> bool:
    """Return True on the last stage if the output layers are fused with the losses.

    Raises:
        ValueError: if `fused_linear` is true but not possible.
    """
    if not student.post_process or not distill_cfg.uses_logits or distill_cfg.fused_linear is False:
        return False
    reason = why_not_fused(student=student, teacher=teacher)
    if reason is not None and distill_cfg.fused_linear:
        raise ValueError(f"distillation.fused_linear = true is not possible: {reason}; leave it unset")
    if reason is not None:
        if parallel_state.get_data_parallel_rank(with_context_parallel=True) == 0 == _tensor_parallel_rank():
            print(f"note: losses are computed from whole logits: {reason}", file=sys.stderr, flush=True)
    return reason is None


def _tensor_parallel_rank() -> int:
    return parallel_state.get_tensor_model_parallel_rank()


def hidden_pairs(
    student: GPTModel, teacher: GPTModel, distill_cfg: DistillationConfig
) -> dict[int, tuple[nn.Module, nn.Module, nn.Module]]:
    """Return (student layer, teacher layer, loss module) of this stage's hidden losses, by number in the config.

    Raises:
        ValueError: from `locate_pairs`, on every stage alike.
    """
    own, pairs = own_stage(getattr(student, "vp_stage", None)), {}
    sequence_group = tensor_parallel_group(student) if student.config.sequence_parallel else None
    located = locate_pairs(distill_cfg.hidden_layers, _stage_sizes(student), _stage_sizes(teacher))
    for number, (stage, local, teachers_local) in enumerate(located):
        if stage != own:
            continue
        assert distill_cfg.hidden_loss is not None, "the checks let hidden layers through only with a hidden loss"
        loss = HIDDEN[distill_cfg.hidden_loss](student.config.hidden_size, teacher.config.hidden_size, sequence_group)
        if loss.projection is not None:
            _initialise(loss.projection.weight, number)
        loss = loss.to(next(student.parameters()))
        pairs[number] = (student.get_submodule(local), teacher.get_submodule(teachers_local), loss)
    return pairs


def _initialise(weight: Tensor, number: int) -> None:
    """Initialise like `nn.Linear`, from its own generator: the same projection on every rank and at every layout."""
    generator = torch.Generator().manual_seed(torch.initial_seed() + number)
    nn.init.kaiming_uniform_(weight, a=5**0.5, generator=generator)


def own_stage(vp_stage: int | None) -> int:
    """Return this chunk's place in the order of the model's stages."""
    size = parallel_state.get_pipeline_model_parallel_world_size()
    return (vp_stage or 0) * size + parallel_state.get_pipeline_model_parallel_rank()


def _stage_sizes(model: GPTModel) -> list[int]:
    """Return the number of layers of every stage, in the order of the model."""
    layout = model.config.pipeline_model_parallel_layout
    if layout is None:
        return [model.config.num_layers]
    assert isinstance(layout, PipelineParallelLayerLayout), "Megatron reads it when a config is made"
    chunks = [
        layout.layout[rank][virtual] for virtual in range(len(layout.layout[0])) for rank in range(len(layout.layout))
    ]
    return [chunk.count(LayerType.decoder) for chunk in chunks]


def adjust_distillation_model_for_mcore(
    model: mtd.DistillationModel, distill_cfg: DistillationConfig
) -> mtd.DistillationModel:
    """Adapt a `mtd.DistillationModel` of two `GPTModel`s to Megatron-Core.

    - the teacher stays out of `sharded_state_dict` (the optimizer skips it: it requires no gradient), and in eval mode;
    - the teacher's LM loss is never computed; the student's is, without a graph if it has no weight in the loss;
    - Megatron's vocab-parallel cross entropy writes into fp32 logits, so it gets a copy and the KD loss the original;
    - pipeline stages exchange student‖teacher, of the summed width (`wire_config`);
    - the loss mask reaches the hidden losses on every stage;
    - with a fused output, the last stage hands on hidden states too (`models/distillation/fused_output.py`).
    """
    overrides = (_train, _sharded_state_dict, _forward, _set_input_tensor)
    attach(model, **{function.__name__[1:]: MethodType(function, model) for function in overrides})
    # Backward needs a loss to start from, even one with weight 0.
    differentiates_lm = distill_cfg.uses_lm_loss or not distill_cfg.uses_logits

    def student_lm_loss(self: Any, labels: Tensor, logits: Tensor) -> Tensor:
        copied = logits.clone() if logits.dtype == torch.float32 else logits
        with torch.set_grad_enabled(differentiates_lm and torch.is_grad_enabled()):
            return type(self).compute_language_model_loss(self, labels, copied)

    def teacher_lm_loss(self: Any, labels: Tensor, logits: Tensor) -> Tensor:
        return torch.zeros_like(labels, dtype=logits.dtype)

    teacher: Any = model.teacher_model
    attach(model, compute_language_model_loss=MethodType(student_lm_loss, model))
    attach(teacher, compute_language_model_loss=MethodType(teacher_lm_loss, teacher))
    teacher.eval()
    return model


def _train(self: Any, mode: bool = True) -> Any:
    type(self).train(self, mode)
    self.teacher_model.eval()
    return self


def _sharded_state_dict(self: Any, *args: Any, **kwargs: Any) -> Any:
    with self.hide_teacher_model():
        return type(self).sharded_state_dict(self, *args, **kwargs)


def _forward(self: Any, *args: Any, loss_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
    self.objective.hidden_losses.loss_mask_BS = loss_mask
    fused = self.objective.takes_hidden_states and kwargs.get("labels") is not None
    if fused:
        kwargs["output_processor"] = hand_on_hidden_states
    with torch.no_grad():
        teacher_output = self.teacher_model(*args, **kwargs)
    with self.only_student_forward():
        student_output = type(self).forward(self, *args, **kwargs)
    if self.post_process and not fused:
        return student_output
    return torch.cat([student_output, teacher_output.to(student_output.dtype)], dim=-1)


def _set_input_tensor(self: Any, tensors: Any) -> None:
    """Split the previous stage's output `[s, b, Hs + Ht]` into student and teacher activations."""
    tensors = tensors if isinstance(tensors, list) else [tensors]
    width = self.config.hidden_size
    type(self).set_input_tensor(self, [t if t is None else t[..., :width] for t in tensors])
    teacher = self.teacher_model
    type(teacher).set_input_tensor(teacher, [t if t is None else t[..., width:] for t in tensors])


def wire_config(model: Any) -> TransformerConfig:
    """Return the config that the pipeline schedule reads: the student's, with the width that crosses stages."""
    config = copy.copy(model.config)
    if isinstance(model, mtd.DistillationModel):
        teacher = model.teacher_model
        assert isinstance(teacher, GPTModel)
        config.hidden_size += teacher.config.hidden_size
    return config
