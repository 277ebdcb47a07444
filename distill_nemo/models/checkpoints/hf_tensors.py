"""Tensors of a Hugging Face directory: those that an architecture needs, and those that its safetensors hold.

Only headers are read. They come with the checkpoint, like `config.json`, so neither is believed: they must agree.
"""

import re
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from distill_nemo.fields import first_few
from distill_nemo.models.architecture import Architecture
from distill_nemo.models.config_fields import shown
from distill_nemo.runtime.files import read_object

VOCAB_TENSORS = ("model.embed_tokens.weight", "lm_head.weight")
INDEX = "model.safetensors.index.json"
FLOATS = ("BF16", "F16", "F32", "F64")
OLD_BUFFER = "rotary_emb.inv_freq"  # of old Llamas; computed today
LAYER = re.compile(r"model\.layers\.(\d{1,9})\.")


class StoredTensor(NamedTuple):
    """One entry of a safetensors header."""

    file: Path
    dtype: str
    shape: tuple[int, ...]


def has_weights(path: Path) -> bool:
    """True if the directory holds safetensors; a plan needs config.json only."""
    return any(path.glob("*.safetensors"))


def check_hf_tensors(path: Path, model: Architecture) -> None:
    """Compare the safetensors headers in `path` with the tensors that an architecture needs.

    Args:
        path: the directory.
        model: with the vocabulary that `path` states.

    Raises:
        ValueError: when tensors are missing, extra, of another shape or no plain floats, or a file is corrupt, by name.
    """
    stored = stored_tensors(path)
    _check_dtypes(path, stored)
    layers = 1 + max((int(match[1]) for name in stored if (match := LAYER.match(name))), default=-1)
    if layers != model.num_layers:
        raise ValueError(
            f"{path} does not fit its architecture: config.json says num_hidden_layers = {model.num_layers}, the "
            f"safetensors hold {layers} layers"
        )
    wanted = expected_tensors(model)
    ignored = {"lm_head.weight"} if model.tie_word_embeddings else set()
    found = {name: tensor.shape for name, tensor in stored.items() if not name.endswith(OLD_BUFFER)}
    problems = [f"missing: {name} {shape}" for name, shape in wanted.items() if name not in found]
    problems += [f"extra: {name:.120} {found[name]}" for name in found if name not in wanted and name not in ignored]
    problems += [
        f"{name} has shape {found[name]}, needs {shape}"
        for name, shape in wanted.items()
        if name in found and found[name] != shape
    ]
    if problems:
        raise ValueError(f"{path} does not fit its architecture:\n  " + "\n  ".join(first_few(problems)))


def check_tied_weights(path: Path, model: Architecture) -> None:
    """Refuse tied embeddings beside which another output layer is stored; reads both.

    Raises:
        ValueError: when the two differ.
    """
    stored = stored_tensors(path)
    if not model.tie_word_embeddings or "lm_head.weight" not in stored:
        return
    if not torch.equal(*(read_tensor(stored[name], name) for name in VOCAB_TENSORS)):
        raise ValueError(
            f"{path}: config.json says tie_word_embeddings, but lm_head.weight and model.embed_tokens.weight differ: "
            "transformers would use both; say tie_word_embeddings: false there"
        )


def _check_dtypes(path: Path, stored: dict[str, StoredTensor]) -> None:
    quantised = [f"{name:.120} is {tensor.dtype}" for name, tensor in stored.items() if tensor.dtype not in FLOATS]
    if quantised:
        raise ValueError(
            f"{path}: weights must be {', '.join(FLOATS)}; {', '.join(first_few(quantised))}. "
            "Write quantised weights out dequantised first"
        )


def read_tensor(stored: StoredTensor, name: str, shape: tuple[int, ...] | None = None) -> torch.Tensor:
    """Return the tensor, or the first part of it along every dimension that `shape` asks for."""
    with safe_open(stored.file, "pt") as tensors:
        if shape is None or shape == stored.shape:
            return tensors.get_tensor(name)
        return tensors.get_slice(name)[tuple(slice(0, size) for size in shape)].contiguous()


def stored_tensors(path: Path) -> dict[str, StoredTensor]:
    """Return every tensor in the files that the importer and transformers read.

    Raises:
        ValueError: when there are no safetensors, or a file or the index is corrupt or names what is not there.
    """
    found: dict[str, StoredTensor] = {}
    places = _indexed_files(path)
    files = sorted(set(places.values())) if places else ["model.safetensors"]
    for file in files:
        header = _header(path / file)
        twice = [name for name in header if name in found]
        if twice:
            raise ValueError(f"{twice[0]:.120} is stored twice: in {found[twice[0]].file} and in {path / file}")
        found |= header
    elsewhere = [name for name, file in places.items() if name not in found or found[name].file.name != file]
    if elsewhere:
        name = elsewhere[0]
        raise ValueError(f"{path / INDEX} says that {name:.120} is in {places[name]}, which does not hold it")
    return found


def _header(file: Path) -> dict[str, StoredTensor]:
    try:
        with safe_open(file, "pt") as tensors:
            parts = {name: tensors.get_slice(name) for name in tensors.keys()}
            return {name: StoredTensor(file, part.get_dtype(), tuple(part.get_shape())) for name, part in parts.items()}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} is corrupt or truncated: {error}") from None


def _indexed_files(path: Path) -> dict[str, str]:
    """Return each tensor's file from the index; empty where `model.safetensors` holds all, which takes precedence."""
    if not has_weights(path):
        raise ValueError(
            f"{path} holds no *.safetensors files, and pickles (*.bin) can run code when they are opened: they are not "
            f"read here. If you trust them: nemo distill convert checkpoint={path} output=NEW allow_pickle=true"
        )
    if (path / "model.safetensors").is_file():
        return {}
    index = path / INDEX
    if not index.is_file():
        raise ValueError(f"{path} has neither model.safetensors nor {INDEX}, which says what its other files hold")
    places = read_object(index).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise ValueError(f"{index}: weight_map must say in which file each tensor is, got {shown(places)}")
    names = {str(name) for name in places.values()}
    strange = [name for name in names if Path(name).name != name or not name.endswith(".safetensors")]
    if strange:
        raise ValueError(f"{index}: weight_map must name *.safetensors files beside it, got {shown(strange)}")
    absent = sorted(name for name in names if not (path / name).is_file())
    if absent:
        raise ValueError(f"{index} names files that are not there: {', '.join(first_few(absent))}")
    return places


def expected_tensors(model: Architecture) -> dict[str, tuple[int, ...]]:
    """Return name and shape of every tensor of a model in Hugging Face's naming."""
    q, kv = model.num_attention_heads * model.kv_channels, model.num_query_groups * model.kv_channels
    h = model.hidden_size
    layer: dict[str, tuple[int, ...]] = {
        "input_layernorm.weight": (h,),
        "post_attention_layernorm.weight": (h,),
        "self_attn.q_proj.weight": (q, h),
        "self_attn.k_proj.weight": (kv, h),
        "self_attn.v_proj.weight": (kv, h),
        "self_attn.o_proj.weight": (h, q),
    }
    ffn, mlps, experts = model.ffn_hidden_size, ["mlp"], model.experts
    if experts is not None:
        layer["mlp.gate.weight"] = (experts.num_experts, h)
        ffn, mlps = experts.moe_ffn_hidden_size, [f"mlp.experts.{i}" for i in range(experts.num_experts)]
    for mlp in mlps:
        layer |= {
            f"{mlp}.{n}_proj.weight": shape for n, shape in (("gate", (ffn, h)), ("up", (ffn, h)), ("down", (h, ffn)))
        }
    if model.qkv_bias:
        layer |= {f"self_attn.{n}_proj.bias": (size,) for n, size in (("q", q), ("k", kv), ("v", kv))}
    if model.qk_norm:
        layer |= {f"self_attn.{n}_norm.weight": (model.kv_channels,) for n in ("q", "k")}
    tensors = {f"model.layers.{i}.{name}": shape for i in range(model.num_layers) for name, shape in layer.items()}
    tensors |= {"model.embed_tokens.weight": (model.vocab_size, h), "model.norm.weight": (h,)}
    return tensors if model.tie_word_embeddings else tensors | {"lm_head.weight": (model.vocab_size, h)}


def num_parameters(model: Architecture) -> int:
    """Return the number of parameters of a model."""
    return sum(torch.Size(shape).numel() for shape in expected_tensors(model).values())
