"""Constant factors of models without a teacher. `tests/parity` has all layouts with one."""

import pytest
import torch

from distill_nemo.models.architecture import Multipliers
from tests.distillation import Case, Layout, gradients, megatron_step, worst_errors
from tests.distillation_reference import reference
from tests.tiny_models import write_hf


@pytest.mark.parametrize(
    "layout", [Layout(tensor=2, sequence_parallel=True), Layout(pipeline=2)], ids=["TP=2, SP", "PP=2"]
)
def test_language_modelling_alone_is_that_of_transformers(one, two, tmp_path, layout):
    case = Case(write_hf(tmp_path / "granite", "granite", layers=2), None)
    means = two.run(megatron_step, case, layout, str(tmp_path / "out"))
    metric, gradient = worst_errors(means, one.run(gradients, str(tmp_path / "out"))[0], reference(case))
    assert metric < 1e-6 and gradient < 1e-5


def test_a_factor_is_rounded_only_where_transformers_does():
    from distill_nemo.models.layers.multipliers import ScaleEmbeddings

    exact, rounded = Multipliers(embedding=3072**0.5), Multipliers(embedding=3072**0.5, rounds_embedding=True)
    embeddings = torch.linspace(-2, 2, 101, dtype=torch.bfloat16)
    theirs = {True: embeddings * torch.tensor(3072**0.5, dtype=torch.bfloat16), False: embeddings * 3072**0.5}
    for multipliers in (exact, rounded):
        found = ScaleEmbeddings(multipliers, torch.bfloat16)(None, None, embeddings)
        assert torch.equal(found, theirs[multipliers.rounds_embedding])
    assert not torch.equal(theirs[True], theirs[False])


@pytest.mark.parametrize("scale", [1.0, 0.25])
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_whole_logits_are_scaled_capped_and_padded(one, scale, softcap):
    """The gradient also passes through a product whose result is overwritten."""
    one.run(finish, scale, softcap)


def finish(scale, softcap):
    from torch import nn

    from distill_nemo.models.layers.multipliers import FinishLogits

    layer = nn.Identity()
    layer.gather_output = True
    product = torch.linspace(-20, 20, 64, dtype=torch.float64).view(4, 2, 8).requires_grad_()
    found, _ = FinishLogits(Multipliers(logits=scale, softcap=softcap), 7)(layer, None, (product * 1, None))
    expected = product * scale if softcap is None else softcap * torch.tanh(product * scale / softcap)
    torch.testing.assert_close(found[..., :7], expected[..., :7], rtol=1e-12, atol=0)
    assert found[..., 7].max() == -torch.inf
    upstream = torch.linspace(1, 2, 64, dtype=torch.float64).view(4, 2, 8)
    (ours,) = torch.autograd.grad((found[..., :7] * upstream[..., :7]).sum(), product)
    (theirs,) = torch.autograd.grad((expected[..., :7] * upstream[..., :7]).sum(), product)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-15)
