"""Compare an imported model with transformers, which opens the same Hugging Face directory: the logits must agree.

Reloading an export proves little about the import, since both sides of that comparison are ours.
"""

import contextlib
import dataclasses
import functools
import gc
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from megatron.core.models.gpt import GPTModel
from safetensors.torch import save_file
from torch import Tensor

from distill_nemo.config import ParallelismConfig, StudentConfig
from distill_nemo.models.architecture import Architecture, Experts, Layer
from distill_nemo.models.checkpoints.agreement import logits_apart, open_with_transformers
from distill_nemo.models.checkpoints.hf_tensors import PieceReader, as_parameter, has_weights
from distill_nemo.models.families import FAMILIES
from distill_nemo.models.families.huggingface import to_huggingface
from distill_nemo.models.families.pieces import Piece
from distill_nemo.models.families.rope import ROPE_FIELDS
from distill_nemo.models.families.tensors import hf_shapes, num_parameters, parameters
from distill_nemo.models.provider import model_provider
from distill_nemo.models.resolve import with_headers
from distill_nemo.models.sources import CheckpointKind, Source
from distill_nemo.models.stored_quantization import FIELD
from distill_nemo.runtime.process_groups import process_group_of_one
from distill_nemo.runtime.seed import seed_everything

WHOLE = 64 * 2**20  # models of up to this many parameters are compared whole
# Larger ones are cut to their first layers (one of every kind), experts, rows of vocabulary and MLP. Heads and the
# residual stream keep their size.
CUT = {"num_layers": 2, "num_experts": 8, "vocab_size": 1024, "ffn_hidden_size": 1024, "moe_ffn_hidden_size": 256}
WINDOW = 8  # tokens; shorter than the sequences that are compared
SHARED_WIDTHS = ("shared_expert_intermediate_size", "moe_shared_expert_intermediate_size")  # in config.json
NAMES = {  # in config.json
    "num_layers": ("num_hidden_layers",),
    "num_experts": ("num_experts", "num_local_experts", "n_routed_experts"),
    "vocab_size": ("vocab_size",),
    "ffn_hidden_size": ("intermediate_size", "shared_intermediate_size"),
    "moe_ffn_hidden_size": ("moe_intermediate_size",),
}
# Fields with an entry for each layer.
BY_LAYER = ("layer_types", "mlp_layer_types", "layers_block_type", "hybrid_override_pattern")
TOLERANCE = 1e-4  # in fp32; tiny models agree to 1e-6
TOLERANCE_ON_GPU = 1e-2  # Mamba's kernels multiply fp32 in TF32


def refusal_of_sources(*models: Architecture | None) -> str | None:
    """Return the reason not to train with models from Hugging Face directories, or None."""
    try:
        for model in models:
            if model is not None:
                check_source(model)
    except ValueError as error:
        return str(error)
    return None


def check_source(model: Architecture) -> None:
    """Compare a model's logits with those of transformers on the same Hugging Face checkpoint. Others are not checked.

    The comparison runs in fp32, in this process alone, before the run's process groups exist. For a model of more than
    64M parameters, it uses a copy with the first layers, a few experts, and a part of the vocabulary and MLP.

    Raises:
        ValueError: if transformers refuses the directory, or the logits differ.
    """
    source = model.source
    if source is None or source.kind is not CheckpointKind.HUGGING_FACE or not has_weights(source.weights):
        return
    with _small(source, model) as (directory, small), process_group_of_one():
        seed_everything(0)
        plain = dataclasses.replace(small, quantization=None)
        built = model_provider(student=plain, parallelism=ParallelismConfig())
        assert isinstance(built, GPTModel)
        changes = {"pad_token_id": None, **FAMILIES[model.family].reference}  # it may have no row for that token
        open_reference = functools.partial(open_with_transformers, directory, torch.float32, **changes)
        apart = logits_apart([built.cuda()], open_reference, small.vocab_size)
    del built
    gc.collect()
    torch.cuda.empty_cache()
    allowed = TOLERANCE_ON_GPU if torch.cuda.is_available() else TOLERANCE
    if not apart <= allowed:
        raise ValueError(
            f"{model.name} is read differently by transformers {transformers.__version__} than here: the logits "
            f"are {apart:.1e} apart, allowed {allowed:.0e}. Please report it with its config.json"
        )


@contextlib.contextmanager
def _small(source: Source, model: Architecture) -> Iterator[tuple[Path, Architecture]]:
    """Yield the directory to compare and its architecture: the source itself, or a copy of a part of it."""
    config = dict(source.config)
    quantised = config.pop(FIELD, None)  # which transformers opens with further packages only
    unreadable = int(transformers.__version__.split(".")[0]) < 5 and config.get("rope_parameters")
    of_wrapper = FAMILIES[model.family].wrapper is not None and any(x.name for x in source.tensors.values())
    of_other_type = config["model_type"] != model.family
    if num_parameters(model) <= WHOLE and not (unreadable or quantised or of_wrapper or of_other_type):
        yield source.weights, model
        return
    if unreadable:  # transformers 4 ignores it and uses base 10000
        config |= {name: value for name, value in to_huggingface(model, torch.float32).items() if name in ROPE_FIELDS}
    config["model_type"] = model.family
    with tempfile.TemporaryDirectory() as copy:
        small = _cut(model, dataclasses.replace(source, weights=Path(copy), config=config))
        _copy_part(source, model, small, config)
        yield Path(copy), with_headers(small)


def _cut(model: Architecture, source: Source) -> Architecture:
    """Reduce every size in `CUT`."""
    ffn, layers = min(CUT["ffn_hidden_size"], model.ffn_hidden_size), _first_layers(model)
    own = {name: min(ffn, model.family_fields[name]) for name in SHARED_WIDTHS if name in model.family_fields}
    model = dataclasses.replace(model, family_fields=model.family_fields | own)
    experts = _cut_experts(model)
    if experts is not None and all(layer.has_experts for layer in layers):
        ffn = experts.moe_ffn_hidden_size  # in some families, one field states both
    rows = min(CUT["vocab_size"], model.vocab_size)
    return dataclasses.replace(
        model,
        source=dataclasses.replace(source, vocab_size=rows),
        layers=tuple(_cut_layer(layer, ffn, experts) for layer in layers),
        vocab_size=rows,
        ffn_hidden_size=ffn,
        experts=experts,
    )


def _cut_experts(model: Architecture) -> Experts | None:
    """Reduce number and width of the experts, but keep enough of each group for a token."""
    experts, family = model.experts, FAMILIES[model.family]
    if experts is None or family.experts is None:
        return None
    of_group = -(-max(CUT["num_experts"], experts.num_experts_per_tok) // experts.num_chosen_groups)
    sizes = {
        "num_experts": min(experts.num_experts, experts.num_groups * of_group),
        "moe_ffn_hidden_size": min(CUT["moe_ffn_hidden_size"], experts.moe_ffn_hidden_size),
    }
    return family.experts(vars(model) | vars(experts) | sizes)


def _cut_layer(layer: Layer, ffn: int, experts: Experts | None) -> Layer:
    width = experts.moe_ffn_hidden_size if layer.has_experts and experts else ffn
    return dataclasses.replace(
        layer,
        ffn_hidden_size=layer.ffn_hidden_size and width,
        window=layer.window and min(layer.window, WINDOW),
    )


def _first_layers(model: Architecture) -> tuple[Layer, ...]:
    """Return two layers, or as many as it takes to have one of each kind."""
    kinds = [model.layers.index(kind) for kind in set(model.layers)]
    return model.layers[: max(CUT["num_layers"], max(kinds) + 1)]


def _copy_part(source: Source, model: Architecture, small: Architecture, config: dict[str, Any]) -> None:
    """Write the part of `source` that `small` needs. In `config` only the sizes change."""
    own = dataclasses.asdict(small.filled(StudentConfig()))
    config |= {key: own[name] for name in CUT for key in NAMES[name] if key in config and own[name] is not None}
    config |= {name: small.family_fields[name] for name in SHARED_WIDTHS if name in small.family_fields}
    config |= {"sliding_window": max(windows)} if (windows := [x.window for x in small.layers if x.window]) else {}
    config |= {name: config[name][: small.num_layers] for name in BY_LAYER if config.get(name)}
    assert small.source is not None
    target = small.source.weights
    (target / "config.json").write_text(json.dumps(config))
    save_file(_first_parts(source, model, small), target / "model.safetensors", {"format": "pt"})


def _first_parts(source: Source, model: Architecture, small: Architecture) -> dict[str, Tensor]:
    """Return the tensors of `small`: the first rows and columns of each piece of `model`."""
    tensors = {name: torch.empty(shape) for name, shape in hf_shapes(small).items()}
    with PieceReader(source.tensors) as reader:
        for parameter in parameters(small):
            for piece, large in zip(
                parameter.pieces, parameter.of(model).pieces, strict=False
            ):  # padding may be absent
                if piece.name:
                    target = as_parameter(tensors[piece.name][piece.index], piece)
                    target.copy_(reader.read(_first_part(large, piece)))
    return tensors


def _first_part(piece: Piece, small: Piece) -> Piece:
    """Return the part of `piece` that has the size of `small`."""
    pairs = zip(piece.index, small.index, strict=True)
    index = (slice(part.start, part.start + own.stop - own.start, part.step) for part, own in pairs)
    return dataclasses.replace(piece, index=tuple(index))
