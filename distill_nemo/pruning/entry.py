"""`prune`, which an executor runs on every rank. Light at import, as `training.entry` is."""

from typing import Any

from distill_nemo.config import PruneConfig
from distill_nemo.config_files import from_dict, to_dict
from distill_nemo.fields import takes_fields_of
from distill_nemo.runtime.errors import errors_of_a_rank
from distill_nemo.runtime.imports import megatron_imports


@takes_fields_of(PruneConfig)
def prune(**fields: Any) -> None:
    r"""Cut a smaller model out of a Hugging Face directory, as a student to distil.

    Parts that matter least to the activations of some text are left out: layers, channels of the residual stream and
    of MLPs, attention heads with their query groups, experts. The result is a Hugging Face directory of the same
    family, with scores and choice in pruning.json. It is computed in fp32: every layout cuts the same.

    State the sizes; sizes left out stay as they are. Or state a target: sizes that meet it are compared by held-out
    loss, those that are stated beside it are fixed. Memory: the model in fp32, spread over the ranks.

    Example:
        nemo distill prune model=/models/Qwen3-8B output=pruned num_layers=30 ffn_hidden_size=10240 data=corpus
        nemo distill prune model=/models/Qwen3-8B output=pruned target_params=6e9 data=corpus \
            run.executor=local run.executor.processes=8 parallelism.tensor_model_parallel_size=2
        nemo distill prune model=/models/Qwen3-8B output=pruned target_gpu=a100-80gb target_memory=0.15 data=corpus

    Args:
        **fields: those of `PruneConfig`; None stands for a field's default.

    Raises:
        ValueError: for sizes, data or a layout that do not fit the model, before anything is computed.
    """
    config = PruneConfig(**{name: value for name, value in fields.items() if value is not None})
    from distill_nemo.runtime.orphans import end_with_torchrun
    from distill_nemo.runtime.signals import end_at_sigurg

    end_at_sigurg()
    end_with_torchrun()
    with megatron_imports():
        from distill_nemo.checkpoint.hub_models import on_this_machine
        from distill_nemo.pruning.prune import prune as prune_model

    with errors_of_a_rank():
        prune_model(on_this_machine(from_dict(to_dict(config), PruneConfig)))
