"""Quantisation-aware distillation: a quantised student learns from the unquantised model. One recipe per format.

The settings are those of NVIDIA's report (arXiv:2601.20088): the KL of the logits alone, at temperature 1. The learning
rate is that of the QAD example in ModelOpt 0.40's examples/llm_qat. The evaluation at step 0 is plain post-training
quantisation, so a run shows what training regains.
"""

import nemo_run as run

from distill_nemo.quantization import FormatName
from distill_nemo.training.entry import distill
from recipes.base import of_checkpoints


def _quantized(name: str, teacher: str | None, student: str | None, number_format: FormatName) -> run.Partial:
    """Return a recipe of 1,000 steps, 0.5 billion tokens."""
    recipe = of_checkpoints(name, teacher, student or teacher)
    recipe.quantization.format = number_format
    recipe.optimizer.lr, recipe.optimizer.min_lr = 4e-5, 4e-6
    recipe.optimizer.warmup_steps = 50
    recipe.training.steps = 1000
    return recipe


@run.cli.factory(target=distill)
def qad_fp8(teacher: str | None = None, student: str | None = None) -> run.Partial:
    """Any checkpoint in FP8: weights and activations in E4M3, one scale per tensor. Runs on Hopper and later.

    nemo distill train qad_fp8 teacher.checkpoint=A student.checkpoint=A data.train='["corpus"]' gpus=8 gpu=h100
    """
    return _quantized("qad_fp8", teacher, student, "fp8")


@run.cli.factory(target=distill)
def qad_nvfp4(teacher: str | None = None, student: str | None = None) -> run.Partial:
    """Any checkpoint in NVFP4: 4-bit weights and activations in blocks of 16. Runs on Blackwell.

    nemo distill train qad_nvfp4 teacher.checkpoint=A student.checkpoint=A data.train='["corpus"]' gpus=8 gpu=b200

    Add quantization.format=nvfp4_weights to quantise weights only, and quantization.kv_cache=fp8 to quantise keys and
    values.
    """
    return _quantized("qad_nvfp4", teacher, student, "nvfp4")


@run.cli.factory(target=distill)
def qad_int8(teacher: str | None = None, student: str | None = None) -> run.Partial:
    """Any checkpoint in INT8: one scale per row of a weight and per tensor of activations. Runs anywhere.

    nemo distill train qad_int8 teacher.checkpoint=A student.checkpoint=A data.train='["corpus"]' gpus=8 gpu=h100
    """
    return _quantized("qad_int8", teacher, student, "int8")


@run.cli.factory(target=distill)
def qad_int4(teacher: str | None = None, student: str | None = None) -> run.Partial:
    """Any checkpoint in INT4, weights only, in blocks of 128. Runs anywhere.

    nemo distill train qad_int4 teacher.checkpoint=A student.checkpoint=A data.train='["corpus"]' gpus=8 gpu=h100
    """
    return _quantized("qad_int4", teacher, student, "int4_weights")
