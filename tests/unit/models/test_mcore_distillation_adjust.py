"""`adjust_distillation_model_for_mcore`: exact gradients at every layout, and a teacher that leaves no trace.

Gradients of every parameter are compared with transformers' in fp64, relative to the largest entry of the tensor. That
also shows that Megatron's cross entropy, which writes into fp32 logits, does not reach the ones that the KD loss reads.
"""

import pytest

from tests.distillation import Case, Layout, gradients_of, megatron_steps, worst_errors
from tests.distillation_reference import reference
from tests.tiny_models import write_hf

LAYOUTS = {
    "one": (1, Layout()),
    "dp2": (2, Layout()),
    "tp2": (2, Layout(tensor=2)),
    "tp2_sequence_parallel": (2, Layout(tensor=2, sequence_parallel=True)),
    "pp2": (2, Layout(pipeline=2)),
}
FINAL = ["decoder.final_layernorm:decoder.final_layernorm"]
CASES = {
    "kd": {},
    "kd_at_temperature_2_and_lm": {"temperature": 2.0, "logits_weight": 0.7, "lm_weight": 0.3},
    "kd_and_cosine": {"hidden_loss": "cosine", "hidden_layers": FINAL, "hidden_weight": 2.0},
    "kd_and_mse_and_lm": {"hidden_loss": "mse", "hidden_layers": FINAL, "hidden_weight": 0.5, "lm_weight": 1.0},
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Write a teacher of four layers and students of two, one as wide as the teacher and one narrower."""
    root = tmp_path_factory.mktemp("models")
    return {
        "teacher": write_hf(root / "teacher", "llama", width=64, layers=4),
        "same_width": write_hf(root / "same_width", "llama", seed=2, width=64, layers=2),
        "narrower": write_hf(root / "narrower", "llama_tied", seed=3, width=32, layers=2, heads=2),
    }


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_gradient_is_that_of_transformers_in_fp64(models, one, two, tmp_path, layout):
    """The last case is a student of another width with tied embeddings."""
    processes, sizes = LAYOUTS[layout]
    cases = {name: Case(models["same_width"], models["teacher"], losses) for name, losses in CASES.items()}
    cases["another width"] = Case(models["narrower"], models["teacher"])
    outputs = [str(tmp_path / name) for name in cases]
    work = [(case, sizes, output) for case, output in zip(cases.values(), outputs, strict=True)]
    ranks = (one, two)[processes - 1].run(megatron_steps, work)
    found = one.run(gradients_of, outputs)[0]
    for i, (name, case) in enumerate(cases.items()):
        metric, gradient = worst_errors([rank[i] for rank in ranks], found[i], reference(case))
        assert metric < 1e-5 and gradient < 1e-5, name


def structure(case, layout, output):
    """Return the traces of the teacher in this rank's model."""
    from distill_nemo.runtime.device import setup_device
    from distill_nemo.runtime.process_groups import process_groups

    setup_device()
    from distill_nemo.training.entry import resolve_models

    run, models = resolve_models(case.run_config(output, layout))
    with process_groups(run.parallelism):
        return _structure(run, models, output)


def _structure(run, models, output):
    from pathlib import Path

    import torch

    from distill_nemo.checkpoint.save import CheckpointWriter
    from distill_nemo.runtime.pickles import read_contents
    from distill_nemo.runtime.seed import seed_everything
    from distill_nemo.training.setup import build_train_state

    seed_everything(0)
    train_state = build_train_state(run, models, torch.float32, load_weights=True)
    (model,) = train_state.unwrapped
    train_state.chunks[0].train()
    in_training = [module.training for module in model.teacher_model.modules()]
    trained = {id(p) for group in train_state.optimizer.param_groups for p in group["params"]}
    CheckpointWriter(Path(output), run).save(
        1, train_state.unwrapped, train_state.optimizer, train_state.scheduler, {"step": 1}
    )
    stored = read_contents(Path(output, "step_00000001")).state_dict_metadata
    labels = torch.zeros(1, 4, dtype=torch.long)
    lm_of_teacher = 0.0
    if model.post_process and model.pre_process:
        lm_of_teacher = float(model.teacher_model(labels, torch.arange(4)[None], None, labels=labels).abs().sum())
    return {
        "teacher_in_training": any(in_training),
        "student_in_training": model.decoder.training,
        "teacher_keys": [k for k in (*model.sharded_state_dict(), *stored) if "teacher" in k],
        "teacher_trained": [
            n for n, p in model.teacher_model.named_parameters() if p.requires_grad or id(p) in trained
        ],
        "number_trained": len(trained),
        "number_of_student": sum(p.requires_grad for p in model.parameters()),
        "lm_of_teacher": lm_of_teacher,
        "criterion": sorted(
            type(loss).__name__
            for loss in (*model._layers_to_loss.values(), *(p.loss for p in model.objective.hidden_losses._pairs))
        ),
    }


@pytest.mark.parametrize("layout", ["one", "tp2", "pp2"])
def test_the_teacher_is_in_no_optimizer_and_no_checkpoint(models, one, two, tmp_path, layout):
    processes, sizes = LAYOUTS[layout]
    case = Case(models["narrower"], models["teacher"], {"lm_weight": 0.5})
    for seen in (one, two)[processes - 1].run(structure, case, sizes, str(tmp_path)):
        assert not seen["teacher_in_training"] and seen["student_in_training"]
        assert seen["teacher_keys"] == seen["teacher_trained"] == []
        assert seen["number_trained"] == seen["number_of_student"] > 0
        assert seen["lm_of_teacher"] == 0


def test_losses_sit_where_their_layers_are(models, two, tmp_path):
    pairs = ["decoder.layers.1:decoder.layers.3", "decoder.layers.0:decoder.layers.1"]
    case = Case(models["same_width"], models["teacher"], {"hidden_loss": "mse", "hidden_layers": pairs})
    first, last = two.run(structure, case, Layout(pipeline=2), str(tmp_path))
    assert first["criterion"] == ["HiddenStateMSELoss"]
    assert last["criterion"] == ["HiddenStateMSELoss", "LogitsKLLoss"]


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        ("decoder.layers.0:decoder.layers.3", "of the student is on pipeline stage 0, .* of the teacher on stage 1"),
        ("decoder.layers.1:decoder.layers.9", "does not exist; the model has layers 0 to 3"),
        ("decoder.layer.1:decoder.layers.3", "not a layer of the model"),
        ("decoder.layers.1.mlpp:decoder.layers.3", "not a layer of the model"),
    ],
)
def test_layers_that_cannot_be_compared_are_refused(models, two, tmp_path, pair, message):
    case = Case(models["same_width"], models["teacher"], {"hidden_loss": "mse", "hidden_layers": [pair]})
    with pytest.raises(ValueError, match=message):
        two.run(structure, case, Layout(pipeline=2), str(tmp_path))
