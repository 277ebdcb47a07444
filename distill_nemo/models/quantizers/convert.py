"""Give a student's linear layers and attention ModelOpt's quantizers.

Megatron's layers are converted one by one, by ModelOpt's registry. Its `mtq.quantize` is not used: it keeps its state
in a pickle, its scales of `linear_fc1` do not reshard, and it refuses experts under TP with EP.
"""

import re
from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import Attention
from megatron.core.transformer.transformer_layer import TransformerLayer
from modelopt.torch.quantization.nn import QuantModuleRegistry, TensorQuantizer, register_quant_backend
from modelopt.torch.quantization.nn.modules.tensor_quantizer import is_registered_quant_backend
from modelopt.torch.quantization.plugins.custom import _QuantFunctionalMixin
from torch import Tensor, nn

from distill_nemo.models.quantizers.nvfp4 import simulate
from distill_nemo.quantization import CACHE_FORMATS, NVFP4, Numbers, QuantizationConfig, format_of, is_excluded

CACHE = ("k_bmm_quantizer", "v_bmm_quantizer")  # ModelOpt's names
TEACHER = "_teacher_model."  # in a distillation model
SIMULATED_NVFP4 = "distill_nemo_nvfp4"
EXPERT = re.compile(r"\.local_experts\.\d+\.")
IN_LAYER = re.compile(r"^(decoder\.layers\.)(\d+)(\..*)")


class Quantizer(NamedTuple):
    """A quantizer of this rank's part of a model.

    Args:
        name: its name in the module.
        module: ModelOpt's quantizer, which has the amax.
        layer: layer whose weight or input it rounds; for keys and values, the projection of attention's output.
        layer_name: name of that layer.
    """

    name: str
    module: TensorQuantizer
    layer: nn.Module
    layer_name: str

    @property
    def amax(self) -> Tensor:
        """Largest absolute values, beyond which numbers are clipped."""
        amax = self.module.amax
        assert isinstance(amax, Tensor)
        return amax

    @property
    def of_weight(self) -> bool:
        """True if it rounds a weight."""
        return self.name.endswith(".weight_quantizer")


def quantize(built: GPTModel, config: QuantizationConfig) -> None:
    """Convert this rank's part of a model. Amaxes are NaN until they are calibrated or loaded."""
    if not is_registered_quant_backend(SIMULATED_NVFP4):
        register_quant_backend(SIMULATED_NVFP4, simulate)
    linear = format_of(config)
    for name, layer in list(built.named_modules()):
        splits = type(layer) in (ColumnParallelLinear, RowParallelLinear)
        if linear is not None and splits and not is_excluded(config, name_in_model(built, name)):
            converted = QuantModuleRegistry.convert(layer)
            weights, inputs = (converted.get_submodule(f"{of}_quantizer") for of in ("weight", "input"))
            assert isinstance(weights, TensorQuantizer) and isinstance(inputs, TensorQuantizer)
            _configure(weights, linear.weights, amax_of(converted.get_parameter("weight"), linear.weights))
            _configure(inputs, linear.inputs)
    cache = CACHE_FORMATS.get(config.kv_cache)
    for module in list(built.modules()):
        if cache is not None and isinstance(module, Attention):
            _quantize_cache(module.get_submodule("core_attention"), cache)


def restore_functions_after_errors(built: nn.Module) -> None:
    """Undo ModelOpt's replacement of Megatron's functions in forward passes that raise, which ModelOpt does not.

    Otherwise every later layer of this process would round as the one that raised.
    """
    for module in built.modules():
        if isinstance(module, _QuantFunctionalMixin):
            module.register_forward_hook(_restore_functions, always_call=True)


def _restore_functions(layer: _QuantFunctionalMixin, args: tuple[Any, ...], output: object) -> None:
    for package, name, *_ in layer._functionals_to_replace:
        original = vars(package).get(f"_{name}")
        if original is not None:
            setattr(package, name, original)
            delattr(package, f"_{name}")


def name_in_model(built: nn.Module, name: str) -> str:
    """Return a module's name with its layer's number in the model, not in the pipeline stage; experts share one."""
    match = IN_LAYER.match(name)
    if match is None:
        return name
    layer = built.get_submodule(match[1] + match[2])
    assert isinstance(layer, TransformerLayer)
    return f"{match[1]}{layer.layer_number - 1}{EXPERT.sub('.', match[3])}"


def amax_of(weight: Tensor, numbers: Numbers) -> Tensor:
    """Return the fp32 amaxes of this rank's part of a weight, in ModelOpt's shapes: [], [rows, 1] or [blocks, 1]."""
    magnitudes = weight.detach().float().abs()
    if numbers.scope == "tensor":
        return magnitudes.amax()
    return (magnitudes.reshape(-1, numbers.block) if numbers.block else magnitudes).amax(1, keepdim=True)


def quantizers_of(model: nn.Module) -> Iterator[Quantizer]:
    """Yield the enabled quantizers of a student, and of a distillation model's student alone."""
    for name, module in model.named_modules():
        if not isinstance(module, TensorQuantizer) or not module.is_enabled or name.startswith(TEACHER):
            continue
        owner, _, kind = name.rpartition(".")
        if kind in CACHE:
            owner = owner.removesuffix("core_attention") + "linear_proj"
        yield Quantizer(name, module, model.get_submodule(owner), owner)


def _configure(quantizer: TensorQuantizer, numbers: Numbers | None, like: Tensor | None = None) -> None:
    """Set the numbers, and amaxes of the shape of `like`, or one."""
    if numbers is None:
        quantizer.disable()
        return
    blocks = None
    if numbers.block is not None:
        scales = {"type": "dynamic", "scale_bits": (4, 3)} if numbers == NVFP4 else {"type": "static"}
        blocks = {-1: numbers.block, **scales}
    backend = SIMULATED_NVFP4 if numbers == NVFP4 and not torch.cuda.is_available() else None
    settings = {"num_bits": numbers.num_bits, "axis": 0 if numbers.scope == "row" else None}
    quantizer.set_from_attribute_config({**settings, "block_sizes": blocks, "backend": backend})
    quantizer.amax = torch.full_like(torch.zeros(()) if like is None else like, torch.nan)


def _quantize_cache(attention: nn.Module, numbers: Numbers) -> None:
    """Round the keys and values that attention reads, after keys are rotated."""
    quantizers = [TensorQuantizer() for _ in CACHE]
    for name, quantizer in zip(CACHE, quantizers, strict=True):
        _configure(quantizer, numbers)
        attention.add_module(name, quantizer)
    attention.register_forward_pre_hook(partial(_round_cache, quantizers))


def _round_cache(quantizers: list[TensorQuantizer], attention: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    query, *cache = args[:3]
    return (query, *(quantizer(x) for quantizer, x in zip(quantizers, cache, strict=True)), *args[3:])
