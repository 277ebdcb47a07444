"""Save and restore ModelOpt's earlier changes to a model, such as quantisation, with its checkpoint.

Megatron's convention: a directory `modelopt_state` beside the tensors, and the quantizers' settings as extra states.
"""

import contextlib
import io
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import modelopt.torch.opt as mto
from megatron.core.dist_checkpointing.strategies.torch import TorchDistLoadShardedStrategy
from modelopt.torch.opt.plugins import mcore_dist_checkpointing as sharded
from torch import nn
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from distill_nemo.models.checkpoints.megatron import key_prefix, stored_tensors
from distill_nemo.models.sources import MODELOPT_STATE
from distill_nemo.runtime.pickles import read_contents, weights_only


def is_modified(model: nn.Module) -> bool:
    """Return True if the model has a ModelOpt mode that a checkpoint must keep. Distillation itself is not one."""
    return mto.ModeloptStateManager.is_converted(model) and bool(mto.modelopt_state(model)["modelopt_state_dict"])


def save_modelopt_state(model: nn.Module, directory: Path) -> None:
    """Write `modelopt_state` into a checkpoint, if the model has any. Collective: every rank must call it."""
    if is_modified(model):
        sharded.save_sharded_modelopt_state([model], directory)


def restore_modelopt_state(model: nn.Module, directory: Path) -> None:
    """Apply the ModelOpt changes in the checkpoint `directory`, if any, to a fresh `model`. Every rank must call it.

    Raises:
        ValueError: if ModelOpt cannot restore it, with its reason.
    """
    if not (directory / MODELOPT_STATE).is_dir():
        return
    prefix = key_prefix(stored_tensors(directory))
    built: list[Any] = [model]
    with weights_only(directory), _without_strides():
        try:
            with contextlib.redirect_stdout(io.StringIO()):  # it prints versions and counts
                sharded.restore_sharded_modelopt_state(built, str(directory), prefix)
        except pickle.UnpicklingError:
            raise
        except Exception as error:
            raise ValueError(f"{directory / MODELOPT_STATE} cannot be restored by ModelOpt: {error!r:.300}") from error
    assert built[0] is model, "ModelOpt restores in place"


@contextlib.contextmanager
def _without_strides() -> Iterator[None]:
    """Let Megatron-Core 0.19 read torch 2.15's tables of contents, as ModelOpt's restore needs.

    It passes all properties of a tensor in the table to `torch.empty`. torch 2.15 added strides to them.
    """
    load = TorchDistLoadShardedStrategy.load_tensors_metadata

    def load_without_strides(self: Any, checkpoint_dir: Path, metadata: Any = None) -> dict[str, Any]:
        contents = metadata or read_contents(checkpoint_dir)
        for tensor in contents.state_dict_metadata.values():
            if isinstance(tensor, TensorStorageMetadata):
                vars(tensor.properties).pop("strides", None)
        return load(self, checkpoint_dir, contents)

    TorchDistLoadShardedStrategy.load_tensors_metadata = load_without_strides
    try:
        yield
    finally:
        TorchDistLoadShardedStrategy.load_tensors_metadata = load
