"""Weights of a model that a rank builds."""

from distill_nemo.runtime.device import setup_device
from distill_nemo.runtime.process_groups import process_groups


def built_weights(student, parallelism, save=None):
    """Return this rank's parameters by name; with `save`, write a Megatron checkpoint there."""
    setup_device()
    with process_groups(parallelism):
        from megatron.core import dist_checkpointing

        from distill_nemo.models.provider import model_provider
        from distill_nemo.runtime.seed import seed_everything

        seed_everything(0)
        model = model_provider(student=student, parallelism=parallelism)
        if save is not None:
            dist_checkpointing.save(model.sharded_state_dict(), save)
        return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
