"""A Hugging Face directory that transformers runs a layer at a time."""

from pathlib import Path

import pytest
import torch

from distill_nemo.config import StudentConfig
from distill_nemo.runtime.device import setup_device
from tests.tiny_models import FAMILIES, write_hf


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_the_whole_model_and_no_two_layers_are_in_memory(tmp_path, family):
    setup_device()
    from distill_nemo.models.checkpoints.agreement import open_with_transformers
    from distill_nemo.models.checkpoints.by_layers import open_by_layers
    from distill_nemo.models.resolve import resolve

    path = Path(write_hf(tmp_path / family, family))
    whole = open_with_transformers(path, torch.float32)
    by_layers = open_by_layers(path, torch.float32, resolve(StudentConfig(checkpoint=str(path))))
    layers = next(module for module in by_layers.modules() if isinstance(module, torch.nn.ModuleList))
    in_memory = [set() for _ in layers]

    def note(number):
        in_memory[number] |= {name for name, each in by_layers.named_parameters() if each.device.type != "meta"}

    for number, layer in enumerate(layers):
        layer.register_forward_pre_hook(lambda *_, number=number: note(number))
    tokens = torch.randint(whole.config.vocab_size, (2, 32), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(by_layers(tokens, use_cache=False).logits, whole(tokens, use_cache=False).logits)
    for number, names in enumerate(in_memory):
        assert names == {name for name, _ in by_layers.named_parameters() if f"layers.{number}." in name}
    assert all(each.device.type == "meta" for each in by_layers.parameters())
