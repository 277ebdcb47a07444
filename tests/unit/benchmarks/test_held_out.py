"""Refusals of held-out metrics: all before a model is run, with the fields of `evaluate`."""

import re

import pytest

from tests.tiny_models import write_hf


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    write_hf(root / "small", "llama", layers=2, width=32, vocab=300)
    return root


def refusal(values):
    from distill_nemo.runtime.device import setup_device

    setup_device()
    from distill_nemo.benchmarks import evaluate
    from distill_nemo.job_config import EvaluateConfig

    with pytest.MonkeyPatch.context() as patch, pytest.raises(ValueError) as raised:
        patch.delattr(evaluate, "evaluate_on")  # nothing is measured
        evaluate.held_out(EvaluateConfig(**values))
    return str(raised.value)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"data": "{inputs}/valid,gone"}, "data: no file gone.idx"),
        ({"sequence_length": 129}, "sequence_length = 129 is longer than the model's max_position_embeddings = 128"),
        ({"baseline": "{models}/small"}, "data: {inputs}/valid.bin holds the token id"),
        (
            {"teacher": "{models}/small"},
            "model and teacher must share a vocabulary: vocab_size of the model = 507, vocab_size of the teacher = "
            "300; where the last rows of the larger are padding, set vocab_size to the smaller size",
        ),
    ],
)
def test_what_cannot_be_measured_is_refused_before_any_model_is_run(inputs, models, one, values, message):
    places = {"inputs": str(inputs), "models": str(models)}
    filled = {name: value.format(**places) if isinstance(value, str) else value for name, value in values.items()}
    given = {"model": f"{inputs}/teacher", "data": f"{inputs}/valid", "sequence_length": 32} | filled
    (text,) = one.run(refusal, given)
    assert text.startswith(message.format(**places)), text
    assert not re.search(r"data\.|student", text.replace(str(inputs), "")), text
