"""Sliding windows, as model families state them in `config.json`."""

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, Self

from distill_nemo.fields import require, setting
from distill_nemo.models.architecture import Layer
from distill_nemo.models.config_fields import MAX_POSITIONS
from distill_nemo.models.families.family import OwnFields

LayerType = Literal["full_attention", "sliding_attention"]


@dataclass(frozen=True)
class Window(OwnFields):
    """One window in every layer: tokens that a token sees, itself included."""

    sliding_window: int | None = setting(4096, at_least=1, at_most=MAX_POSITIONS)


@dataclass(frozen=True)
class OptionalWindow(Window):
    """One window in every layer, or none."""

    sliding_window: int | None = setting(None, at_least=1, at_most=MAX_POSITIONS)


@dataclass(frozen=True)
class WindowByLayer(Window):
    """A window in the layers of one type. A subclass gives the types for a `layer_types` of null."""

    layer_types: list[LayerType] | None = None

    def default_layer_types(self, num_layers: int) -> list[LayerType]:
        """Return the types of a model that states none."""
        raise NotImplementedError

    def resolved(self, values: dict[str, Any]) -> Self:
        """Fill in `layer_types`. Refuse types for another number of layers, or windowed ones without a window."""
        count, types = values["num_layers"], self.layer_types
        if types is None:
            types = self.default_layer_types(count)
        require(len(types) == count, f"layer_types has {len(types)} entries, num_layers = {count}")
        require(
            self.sliding_window is not None or "sliding_attention" not in types,
            "layer_types has sliding_attention, but there is no sliding_window",
        )
        return replace(self, layer_types=types)


@dataclass(frozen=True)
class AlternatingWindows(WindowByLayer):
    """A window in the first of every two layers, unless `layer_types` says otherwise."""

    def default_layer_types(self, num_layers: int) -> list[LayerType]:
        """Return a window in the first of every two layers."""
        return ["full_attention" if i % 2 else "sliding_attention" for i in range(num_layers)]


@dataclass(frozen=True)
class SwitchedWindow(Window):
    """A window in every layer, but only if `use_sliding_window` is true."""

    off_by_default: ClassVar[bool] = True

    use_sliding_window: bool = False

    def resolved(self, values: dict[str, Any]) -> Self:
        """Drop a window that is switched off."""
        used = self.use_sliding_window and self.sliding_window is not None
        own = self if used else replace(self, use_sliding_window=False, sliding_window=None)
        return super(SwitchedWindow, own).resolved(values)


@dataclass(frozen=True)
class SwitchedWindowByLayer(WindowByLayer):
    """Qwen's windows: in the layers after the first `max_window_layers`, if `use_sliding_window` is true."""

    off_by_default: ClassVar[bool] = True

    use_sliding_window: bool = False
    max_window_layers: int = setting(28, at_least=0)

    def default_layer_types(self, num_layers: int) -> list[LayerType]:
        """Return a window in all layers after the first `max_window_layers`."""
        full = num_layers if self.sliding_window is None else min(self.max_window_layers, num_layers)
        return ["full_attention" if i < full else "sliding_attention" for i in range(num_layers)]

    def resolved(self, values: dict[str, Any]) -> Self:
        """Drop a window that is switched off or that no layer has. The other fields then have no effect either."""
        window = self.sliding_window if self.use_sliding_window else None
        own = super(SwitchedWindowByLayer, replace(self, sliding_window=window)).resolved(values)
        types = own.layer_types or []
        if "sliding_attention" not in types:
            return type(self)(sliding_window=None)
        return replace(own, max_window_layers=types.index("sliding_attention"))


def with_windows(values: dict[str, Any], layers: tuple[Layer, ...]) -> tuple[Layer, ...]:
    """Return the layers with the windows that the family's own fields give them (`Family.layers`)."""
    own = values["family_fields"]
    types = own.get("layer_types") or ["sliding_attention"] * len(layers)
    window = {"sliding_attention": own["sliding_window"], "full_attention": None}
    return tuple(replace(layer, window=window[kind]) for layer, kind in zip(layers, types, strict=True))
