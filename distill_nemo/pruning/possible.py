"""Sizes that a call of `prune` may cut to: those stated, or the candidates for its target."""

import json
import tempfile
from pathlib import Path

import torch
from transformers import AutoConfig

from distill_nemo.config import ParallelismConfig, PruneConfig
from distill_nemo.fields import require
from distill_nemo.models.architecture import Architecture
from distill_nemo.models.checkpoints.export_files import ExportFiles, export_files
from distill_nemo.models.checkpoints.pretrained import empty_model, open_pretrained
from distill_nemo.models.families.tensors import num_parameters
from distill_nemo.models.layouts import check_layout
from distill_nemo.pruning.search import candidates, target_parameters
from distill_nemo.pruning.sizes import LayersOf, Sizes, complete, given_sizes, sizes_of, smaller, with_source


def possible_sizes(
    model: Architecture, config: PruneConfig, parallelism: ParallelismConfig, layers_of: LayersOf
) -> list[Sizes]:
    """Return the sizes that the config states, or the candidates for its target.

    Args:
        model: the source.
        config: sizes, or a target.
        parallelism: that of this call.
        layers_of: returns the layers that stay.

    Raises:
        ValueError: if there are none, the layout does not divide them, or transformers refuses them.
    """
    check_layout(model, parallelism)
    if target_parameters(config) is not None:
        return _accepted(model, candidates(model, config, parallelism, layers_of), layers_of)
    sizes = complete(model, given_sizes(config))
    require(sizes != sizes_of(model), f"nothing would be cut from {model.name}: state a smaller size")
    check_layout(smaller(model, sizes, layers_of(sizes["num_layers"])), parallelism)
    return _accepted(model, [sizes], layers_of)


def _accepted(model: Architecture, possible: list[Sizes], layers_of: LayersOf) -> list[Sizes]:
    """Return the sizes that transformers accepts.

    Raises:
        ValueError: if it refuses all, with its reason for the first.
    """
    accepted, refusals = [], []
    for sizes in possible:
        layers = layers_of(sizes["num_layers"])
        try:
            _check_with_transformers(with_source(model, smaller(model, sizes, layers), layers))
            accepted.append(sizes)
        except ValueError as error:
            refusals.append(error)
    if not accepted:
        raise refusals[0]
    return accepted


def _check_with_transformers(cut: Architecture) -> None:
    """Build the model without memory from its config.json alone, and compare the number of parameters."""
    with tempfile.TemporaryDirectory() as directory:
        Path(directory, "config.json").write_text(json.dumps(files_of(cut, torch.float32).config))
        try:
            theirs = empty_model(open_pretrained(AutoConfig, directory))
        except Exception as error:  # transformers raises errors of any type
            reason = " ".join(str(error).split()).replace(directory, "")
            raise ValueError(f"transformers refuses these sizes of {cut.name}: {reason:.400}") from None
    stored = theirs.state_dict().keys()
    count = sum(each.numel() for each in theirs.parameters())
    count += sum(each.numel() for name, each in theirs.named_buffers() if name in stored)
    require(
        count == num_parameters(cut),
        f"transformers has no {cut.family} of these sizes: {count:,} parameters there, {num_parameters(cut):,} here. "
        "In some of its classes a head has hidden_size / num_attention_heads channels: cut both by the same factor",
    )


def files_of(cut: Architecture, dtype: torch.dtype) -> ExportFiles:
    """Return the files beside the weights."""
    assert cut.source is not None
    return export_files(cut, dtype, cut.source.weights, None)
