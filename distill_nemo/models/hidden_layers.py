"""Layers whose outputs a hidden loss compares: their names and pipeline stages. No torch."""

import re

from distill_nemo.fields import require

FINAL_NORM = "decoder.final_layernorm"
LAYER = re.compile(r"decoder\.layers\.(\d{1,9})(|\.self_attention|\.mlp)")  # outputs that are whole on every rank


def locate_pairs(pairs: list[str], student_sizes: list[int], teacher_sizes: list[int]) -> list[tuple[int, str, str]]:
    """Return the pipeline stage of each pair in `distillation.hidden_layers`, and the names of both layers there.

    Args:
        pairs: "student_layer:teacher_layer".
        student_sizes: number of the student's layers on every stage, in the order of the model.
        teacher_sizes: the same of the teacher.

    Raises:
        ValueError: for a layer that does not exist, or a pair on two stages.
    """
    located = []
    for name, teachers_name in (pair.split(":") for pair in pairs):
        stage, local = _locate_layer(name, student_sizes)
        teachers_stage, teachers_local = _locate_layer(teachers_name, teacher_sizes)
        require(
            stage == teachers_stage,
            f'distillation.hidden_layers: "{name}" of the student is on pipeline stage {stage}, "{teachers_name}" of '
            f"the teacher on stage {teachers_stage} at this layout: pair layers of the same stage, or change "
            "parallelism.*",
        )
        located.append((stage, local, teachers_local))
    return located


def _locate_layer(name: str, stage_sizes: list[int]) -> tuple[int, str]:
    """Return (stage, name there) of `decoder.layers.<global index>`, a part of it, or `decoder.final_layernorm`."""
    if name == FINAL_NORM:
        return len(stage_sizes) - 1, name
    match = LAYER.fullmatch(name)
    if match is None:
        raise ValueError(
            f'distillation.hidden_layers: "{name}" is not a layer of the model; known: "decoder.layers.<n>", '
            f'"decoder.layers.<n>.self_attention", "decoder.layers.<n>.mlp", "{FINAL_NORM}"'
        )
    index, stage = int(match[1]), 0
    if index >= sum(stage_sizes):
        raise ValueError(
            f'distillation.hidden_layers: "{name}" does not exist; the model has layers 0 to {sum(stage_sizes) - 1}'
        )
    while index >= stage_sizes[stage]:
        index -= stage_sizes[stage]
        stage += 1
    return stage, f"decoder.layers.{index}{match[2]}"
