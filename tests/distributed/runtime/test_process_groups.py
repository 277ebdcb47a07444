"""Four real processes, divided as each layout says. Seeds and stop requests agree where they must."""

import os
import signal

import pytest

from distill_nemo.config import ParallelismConfig
from tests.spawn import Gloo

LAYOUTS = {  # requested sizes -> data parallel size
    "dp4": ({}, 4),
    "tp2_pp2": ({"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}, 1),
    "pp4_vpp2": ({"pipeline_model_parallel_size": 4, "virtual_pipeline_model_parallel_size": 2}, 1),
    "cp2": ({"context_parallel_size": 2}, 2),
    "tp2_cp2": ({"tensor_model_parallel_size": 2, "context_parallel_size": 2}, 1),
    "ep2": ({"expert_model_parallel_size": 2}, 4),
    "tp2_ep2": ({"tensor_model_parallel_size": 2, "expert_model_parallel_size": 2}, 2),
}


@pytest.fixture(scope="module")
def four():
    with Gloo(4, init=False) as group:
        yield group


def sizes_of(layout):
    from distill_nemo.runtime.device import setup_device
    from distill_nemo.runtime.process_groups import process_groups

    setup_device()
    import torch
    from megatron.core import parallel_state as ps

    from distill_nemo.runtime.seed import seed_everything

    with process_groups(ParallelismConfig(**layout)):
        seed_everything(3)
        found = {
            "tensor_model_parallel_size": ps.get_tensor_model_parallel_world_size(),
            "pipeline_model_parallel_size": ps.get_pipeline_model_parallel_world_size(),
            "virtual_pipeline_model_parallel_size": ps.get_virtual_pipeline_model_parallel_world_size(),
            "context_parallel_size": ps.get_context_parallel_world_size(),
            "expert_model_parallel_size": ps.get_expert_model_parallel_world_size(),
        }
        place = (ps.get_tensor_model_parallel_rank(), ps.get_pipeline_model_parallel_rank())
        return found, ps.get_data_parallel_world_size(), place, torch.rand(2).tolist()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_has_its_process_groups(four, layout):
    sizes, data_parallel_size = LAYOUTS[layout]
    for found, data, _, drawn in (ranks := four.run(sizes_of, sizes)):
        assert {k: v for k, v in found.items() if v not in (1, None)} == sizes
        assert data == data_parallel_size
        assert drawn == ranks[0][3], "one seed for all ranks"
    assert (
        len({place for _, _, place, _ in ranks})
        == found["tensor_model_parallel_size"] * (found["pipeline_model_parallel_size"])
    )


def test_gloo_cannot_interleave_two_stages(four):
    layout = {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2}
    with pytest.raises(ValueError, match=r"on CPU a virtual pipeline needs .* of 3 or more, got 2"):
        four.run(sizes_of, layout)


def stop(by):
    from distill_nemo.runtime.device import setup_device
    from distill_nemo.runtime.process_groups import process_groups, rank
    from distill_nemo.runtime.signals import StopSignal

    device = setup_device()
    with process_groups(ParallelismConfig()), StopSignal() as stopped:
        before = stopped.requested(device)
        if rank() == by:
            os.kill(os.getpid(), signal.SIGTERM)
        return before, stopped.requested(device)


def test_a_signal_to_one_rank_stops_all_at_the_same_step(four):
    assert four.run(stop, 2) == [(None, signal.SIGTERM)] * 4
