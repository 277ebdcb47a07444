"""Build the models of a run: the student, its teacher, or the pair as one distillation model."""

import contextlib
from typing import Any

import modelopt.torch.distill as mtd
import torch
from megatron.core.models.gpt import GPTModel
from modelopt.torch.opt.conversion import ModeloptStateManager
from torch import nn

from distill_nemo.config import DistillationConfig, ParallelismConfig, StudentConfig, TeacherConfig
from distill_nemo.fields import require
from distill_nemo.models.architecture import Architecture
from distill_nemo.models.checkpoints.huggingface import load_hf_weights
from distill_nemo.models.checkpoints.megatron import check_megatron_tensors, load_megatron_weights
from distill_nemo.models.checkpoints.modelopt_state import restore_modelopt_state
from distill_nemo.models.distillation.convert import attach, convert_to_distillation_model, detach, own_stage
from distill_nemo.models.distillation.objective import LanguageModelling
from distill_nemo.models.distillation.offload import HostWeights
from distill_nemo.models.distillation.stored_targets import StoredTeacher, learn_from_store
from distill_nemo.models.families.tensors import num_parameters
from distill_nemo.models.layers.experts import initialise_experts, keep_expert_bias, keep_experts_apart
from distill_nemo.models.megatron import Recompute, gpt_model, transformer_config
from distill_nemo.models.quantizers.calibrate import calibrate_weights, check_calibrated
from distill_nemo.models.quantizers.convert import quantize, restore_functions_after_errors
from distill_nemo.models.resolve import resolve, resolve_pair, with_headers
from distill_nemo.models.sources import CheckpointKind
from distill_nemo.runtime.device import setup_device
from distill_nemo.runtime.host_memory import available_memory
from distill_nemo.runtime.seed import seed_apart

# Offset between the seeds of stages, which would otherwise draw equal weights. Experts' seeds are closer together.
STAGES_APART = 10**6


def model_provider(
    pre_process: bool = True,
    post_process: bool = True,
    parallel_output: bool = True,
    *,
    student: StudentConfig | Architecture,
    parallelism: ParallelismConfig,
    dtype: torch.dtype = torch.float32,
    teacher: TeacherConfig | Architecture | None = None,
    distillation: DistillationConfig | None = None,
    stored: StoredTeacher | None = None,
    load_weights: bool = True,
    recompute: Recompute | None = None,
    vp_stage: int | None = None,
) -> nn.Module:
    """Build this pipeline stage of the student or, with `teacher`, of a `mtd.DistillationModel`.

    `finalise` returns the clean student.

    Args:
        pre_process: this stage holds the embedding.
        post_process: this stage holds the output layer.
        parallel_output: logits stay split over tensor-parallel ranks.
        student: architecture or config of the student. Without a checkpoint its weights are random.
        parallelism: Megatron's parallel sizes.
        dtype: dtype of weights and activations.
        teacher: architecture or config of the teacher; None for training without one.
        distillation: losses between student and teacher.
        stored: the teachers of stored targets, in place of `teacher`.
        load_weights: False skips the student's weights: a resumed run has its own.
        recompute: activations of the student to recompute in backward: `full`, `selective` or None.
        vp_stage: virtual pipeline stage.

    Raises:
        ValueError: for an architecture or a checkpoint that does not fit, with the reason.
    """
    where = {"pre_process": pre_process, "post_process": post_process, "parallel_output": parallel_output}
    model_kwargs = {**where, "vp_stage": vp_stage, "parallelism": parallelism, "dtype": dtype}
    models = resolve_pair(student, teacher)
    model = _build(models.student, model_kwargs, load_weights, recompute)
    distillation = distillation or DistillationConfig()
    if stored is not None:
        assert teacher is None, "a run has a teacher or stores of its targets"
        return learn_from_store(model, stored, distillation, models.student)
    if models.teacher is None:
        attach(model, objective=LanguageModelling())
        return model
    frozen = _teacher_provider(models.teacher, model_kwargs)
    if distillation.offload_teacher:
        HostWeights([*frozen.decoder.layers], setup_device())
    return convert_to_distillation_model(model, frozen, distillation, models)


def finalise(model: nn.Module) -> GPTModel:
    """Return the clean student: without its objective and, of a distillation model, without teacher (`mtd.export`)."""
    detach(model)
    if not isinstance(model, mtd.DistillationModel):
        assert isinstance(model, GPTModel)
        return model
    student = mtd.export(model)
    state = ModeloptStateManager(student).state_dict()
    state[:] = [mode for mode in state if mode[0] not in ("kd_loss", "export_student")]  # they cannot be restored
    if not state:
        ModeloptStateManager.remove_state(student)
        vars(student).pop("_modelopt_state_version", None)  # ModelOpt 0.47 leaves it behind
    assert isinstance(student, GPTModel)
    return student


def _teacher_provider(config: TeacherConfig | Architecture, model_kwargs: dict[str, Any]) -> GPTModel:
    """Build the frozen teacher, of its own architecture, loaded from any supported checkpoint, in eval mode.

    Args:
        config: the teacher, or its architecture; random weights (no checkpoint) are for tests only.
        model_kwargs: `pre_process`, `post_process`, `parallel_output`, `vp_stage`, `parallelism`, `dtype`.

    Raises:
        ValueError: if the checkpoint is missing, corrupt, or does not hold the tensors that the architecture needs.
    """
    return _build(resolve(config), model_kwargs, load_weights=True).requires_grad_(False).eval()


def _build(
    model: Architecture, model_kwargs: dict[str, Any], load_weights: bool, recompute: Recompute | None = None
) -> GPTModel:
    kwargs = dict(model_kwargs)
    if load_weights:
        model = _with_checked_weights(model)  # before memory is taken for them
    source = model.source
    check_fits_host(model, kwargs["parallelism"], kwargs["dtype"])
    config = transformer_config(model, kwargs.pop("parallelism"), kwargs.pop("dtype"), recompute)
    stage = own_stage(kwargs["vp_stage"])
    with seed_apart(STAGES_APART * stage) if stage else contextlib.nullcontext():
        built = gpt_model(model, config, **kwargs)
    keep_experts_apart(built)
    keep_expert_bias(built)
    if model.quantization is not None:
        quantize(built, model.quantization)
    if source is None:
        initialise_experts(built)
    else:
        restore_modelopt_state(built, source.weights)  # a resumed run needs the same modules for its own weights
    restore_functions_after_errors(built)
    if load_weights:
        _load(built, model)
    return built


def check_fits_host(model: Architecture, parallelism: ParallelismConfig, dtype: torch.dtype) -> None:
    """Refuse a model whose weights alone exceed this host's memory, before any is taken. A GPU's are filled there, too.

    Raises:
        ValueError: with the bytes that are needed, and those that there are.
    """
    ranks = parallelism.tensor_model_parallel_size * parallelism.pipeline_model_parallel_size
    needed = num_parameters(model) * dtype.itemsize // (ranks * parallelism.expert_model_parallel_size)
    free = available_memory()
    require(
        needed <= free,
        f"{model.name}: {num_parameters(model):,} parameters take {needed / 2**30:,.0f} GiB of memory on a rank, and "
        f"this host has {free / 2**30:,.0f} GiB left: state smaller sizes, or use more ranks",
    )


def _load(built: GPTModel, model: Architecture) -> None:
    """Fill weights from the source, if there is one, and set amaxes of weights, unless the source has them."""
    source = model.source
    if source is not None and source.kind is CheckpointKind.HUGGING_FACE:
        load_hf_weights(built, model)
    elif source is not None:
        load_megatron_weights(source.weights, built, source.quantization is not None)
    if source is not None and source.quantization is not None:
        check_calibrated(built, source.weights)
    elif model.quantization is not None:
        calibrate_weights(built, model.quantization)


def _with_checked_weights(model: Architecture) -> Architecture:
    """Compare the source's tensors with the architecture, if there is a source."""
    source = model.source
    if source is None:
        return model
    if source.kind is CheckpointKind.HUGGING_FACE:
        return model if source.tensors else with_headers(model)
    check_megatron_tensors(source.weights, model.as_stored)
    return model
