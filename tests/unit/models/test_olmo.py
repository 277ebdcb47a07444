"""OLMo: norms of all heads together under tensor parallelism, and checkpoints that reshard."""

import dataclasses

import pytest
import torch

from distill_nemo.config import ParallelismConfig, StudentConfig
from distill_nemo.runtime.device import setup_device
from distill_nemo.runtime.process_groups import process_groups
from tests.tiny_models import write_hf

TP2 = ParallelismConfig(tensor_model_parallel_size=2)


@pytest.fixture(scope="module")
def olmo2(tmp_path_factory):
    return StudentConfig(checkpoint=write_hf(tmp_path_factory.mktemp("olmo2") / "m", "olmo2", layers=2))


def weights(student, parallelism, save=None):
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


def test_a_checkpoint_of_two_ranks_is_read_by_one(one, two, olmo2, tmp_path):
    from distill_nemo.models.resolve import resolve

    whole = one.run(weights, olmo2, ParallelismConfig())[0]
    (tmp_path / "m").mkdir()
    parts = two.run(weights, olmo2, TP2, str(tmp_path / "m"))
    name = "decoder.layers.0.self_attention.k_layernorm.weight"
    assert torch.equal(torch.cat([part[name] for part in parts]), whole[name])
    described = dataclasses.asdict(resolve(olmo2).filled(StudentConfig()))
    again = StudentConfig(**described | {"checkpoint": str(tmp_path / "m")})
    for found in (one.run(weights, again, ParallelismConfig())[0], whole):
        assert all(torch.equal(found[name], whole[name]) for name in whole)
    for found, part in zip(two.run(weights, again, TP2), parts, strict=True):
        assert all(torch.equal(found[name], part[name]) for name in part)


def test_query_groups_that_ranks_would_share_are_refused(olmo2):
    setup_device()
    from distill_nemo.models.megatron import transformer_config
    from distill_nemo.models.resolve import resolve

    with pytest.raises(ValueError, match=r"num_query_groups of layer 0 = 2 is not divisible by .* = 4, as norms over"):
        transformer_config(resolve(olmo2), ParallelismConfig(tensor_model_parallel_size=4), torch.float32)
