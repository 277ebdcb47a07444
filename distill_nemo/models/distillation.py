"""Turn a student and a teacher into one ModelOpt distillation model that Megatron-Core's schedules can run.

ModelOpt hooks the layers named in the criterion and computes their losses; what is added here is what Megatron needs
and ModelOpt's own plugin lacks or gets wrong (docs/semantics of each in the functions below).
"""

import copy
import re
from types import MethodType
from typing import Any

import modelopt.torch.distill as mtd
import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer import TransformerConfig
from torch import Tensor, nn

from distill_nemo.balancers import LogitsAndIntermediatesLossBalancer, WeightedLossBalancer
from distill_nemo.config import DistillationConfig
from distill_nemo.losses.hidden import HiddenStateCosineLoss, HiddenStateMSELoss
from distill_nemo.losses.logits import LogitsKLLoss

HIDDEN = {"cosine": HiddenStateCosineLoss, "mse": HiddenStateMSELoss}
FINAL_NORM = "decoder.final_layernorm"
LAYER = re.compile(r"^decoder\.layers\.(\d+)(\..+)?$")


def convert_to_distillation_model(
    student: GPTModel, teacher: GPTModel, distill_cfg: DistillationConfig, vocab_size: int
) -> mtd.DistillationModel:
    """`mtd.convert` with our losses and balancer, then `adjust_distillation_model_for_mcore`.

    Args:
        student: this pipeline stage of the student, trainable.
        teacher: the same stage of the teacher, frozen.
        distill_cfg: what to learn.
        vocab_size: the true vocabulary; columns beyond it take no probability.
    """
    mode = {
        "teacher_model": teacher,
        "criterion": build_criterion(student, teacher, distill_cfg, vocab_size),
        "loss_balancer": build_balancer(distill_cfg),
    }
    model: Any = mtd.convert(student, mode=[("kd_loss", mode)])
    return adjust_distillation_model_for_mcore(model, distill_cfg)


def build_balancer(distill_cfg: DistillationConfig) -> mtd.DistillationLossBalancer:
    """The static balancer (fixed weights, exact under any layout) or the dynamic one."""
    if distill_cfg.balancer == "static":
        return WeightedLossBalancer(distill_cfg.lm_weight, distill_cfg.logits_weight, distill_cfg.hidden_weight)
    return LogitsAndIntermediatesLossBalancer(distill_cfg.kd_loss_scale, distill_cfg.skip_lm_loss)


def build_criterion(
    student: GPTModel, teacher: GPTModel, distill_cfg: DistillationConfig, vocab_size: int
) -> dict[tuple[str, str], nn.Module]:
    """Which losses this pipeline stage computes, by (student layer, teacher layer), in local numbering.

    Raises:
        ValueError: on every stage, for a layer that does not exist, or one before the last pipeline stage.
    """
    pairs = []
    for pair in distill_cfg.hidden_layers:
        names = pair.split(":")
        pairs.append((last_stage_name(names[0], student), last_stage_name(names[1], teacher)))
    if not student.post_process:
        return {}
    tp_size = student.config.tensor_model_parallel_size
    group: Any = parallel_state.get_tensor_model_parallel_group() if tp_size > 1 else None
    width = student.output_layer.output_size_per_partition
    logits = LogitsKLLoss(
        divergence=distill_cfg.divergence,
        temperature=distill_cfg.temperature,
        scale_by_temperature_squared=distill_cfg.scale_by_temperature_squared,
        true_vocab_size=vocab_size,
        group=group,
        vocab_start=parallel_state.get_tensor_model_parallel_rank() * width,
    )
    criterion: dict[tuple[str, str], nn.Module] = {("output_layer", "output_layer"): logits}
    sequence_group = group if student.config.sequence_parallel else None
    for pair in pairs:
        assert distill_cfg.hidden_loss is not None, "config.check lets hidden layers through only with a hidden loss"
        loss = HIDDEN[distill_cfg.hidden_loss](student.config.hidden_size, teacher.config.hidden_size, sequence_group)
        criterion[pair] = loss.to(next(student.parameters()))
    return criterion


def last_stage_name(name: str, model: GPTModel) -> str:
    """`decoder.layers.<global index>` in the numbering of the last pipeline stage; `decoder.final_layernorm` as it is.

    The same on every stage, so that all ranks refuse a name together.
    """
    if name == FINAL_NORM:
        return name
    match = LAYER.match(name)
    inner = (match.group(2) or "") if match else ""
    local: Any = model.decoder.layers[0]
    if not match or (inner and inner[1:] not in dict(local.named_modules())):
        known = f'known: "decoder.layers.<n>" and modules inside, "{FINAL_NORM}"'
        raise ValueError(f'distillation.hidden_layers: "{name}" is not a layer of the model; {known}')
    count, index = model.config.num_layers, int(match.group(1))
    first = count - count // model.config.pipeline_model_parallel_size
    if index >= count:
        raise ValueError(f'distillation.hidden_layers: "{name}" does not exist; the model has layers 0 to {count - 1}')
    if index < first:
        raise ValueError(
            f'distillation.hidden_layers: "{name}" is on an earlier pipeline stage; this release supports hidden '
            f"losses on the last stage only, layers {first} to {count - 1} at this layout"
        )
    return f"decoder.layers.{index - first}{inner}"


def adjust_distillation_model_for_mcore(
    model: mtd.DistillationModel, distill_cfg: DistillationConfig
) -> mtd.DistillationModel:
    """Make a `mtd.DistillationModel` of two `GPTModel`s right for Megatron-Core.

    - the teacher stays out of `sharded_state_dict` (the optimizer skips it: it requires no gradient), and in eval mode;
    - the teacher's LM loss is never computed; the student's is, without a graph where it does not count in the loss;
    - Megatron's vocab-parallel cross entropy writes into fp32 logits, so it gets a copy and the KD loss the original;
    - between pipeline stages travels student‖teacher, of the summed width (`wire_config`).
    """
    overrides = (_train, _sharded_state_dict, _forward, _set_input_tensor)
    for function in overrides:
        object.__setattr__(model, function.__name__[1:], MethodType(function, model))
    lm_counts = distill_cfg.balancer == "dynamic" and not distill_cfg.skip_lm_loss
    lm_counts = lm_counts or (distill_cfg.balancer == "static" and distill_cfg.lm_weight != 0)

    def student_lm_loss(self: Any, labels: Tensor, logits: Tensor) -> Tensor:
        copied = logits.clone() if logits.dtype == torch.float32 else logits
        with torch.set_grad_enabled(lm_counts and torch.is_grad_enabled()):
            return type(self).compute_language_model_loss(self, labels, copied)

    def teacher_lm_loss(self: Any, labels: Tensor, logits: Tensor) -> Tensor:
        return torch.zeros_like(labels, dtype=logits.dtype)

    teacher: Any = model.teacher_model
    object.__setattr__(model, "compute_language_model_loss", MethodType(student_lm_loss, model))
    teacher.compute_language_model_loss = MethodType(teacher_lm_loss, teacher)
    teacher.eval()
    return model


def _train(self: Any, mode: bool = True) -> Any:
    type(self).train(self, mode)
    self.teacher_model.eval()
    return self


def _sharded_state_dict(self: Any, *args: Any, **kwargs: Any) -> Any:
    with self.hide_teacher_model():
        return type(self).sharded_state_dict(self, *args, **kwargs)


def _forward(self: Any, *args: Any, **kwargs: Any) -> Tensor:
    with torch.no_grad():
        teacher_output = self.teacher_model(*args, **kwargs)
    with self.only_student_forward():
        student_output = type(self).forward(self, *args, **kwargs)
    if self.post_process:
        return student_output
    return torch.cat([student_output, teacher_output.to(student_output.dtype)], dim=-1)


def _set_input_tensor(self: Any, tensors: Any) -> None:
    """Split what came from the stage before into student and teacher activations `[s, b, Hs + Ht]`."""
    tensors = tensors if isinstance(tensors, list) else [tensors]
    width = self.config.hidden_size
    type(self).set_input_tensor(self, [t if t is None else t[..., :width] for t in tensors])
    teacher = self.teacher_model
    type(teacher).set_input_tensor(teacher, [t if t is None else t[..., width:] for t in tensors])


def wire_config(model: Any) -> TransformerConfig:
    """The config that the pipeline schedule reads: as the student's, of the width that crosses stages."""
    config = copy.copy(model.config)
    if isinstance(model, mtd.DistillationModel):
        teacher: Any = model.teacher_model
        config.hidden_size += teacher.config.hidden_size
    return config
