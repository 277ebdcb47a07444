"""`model_provider` in its three modes, bound as in a recipe, with every source of weights."""

import itertools
import json
import shutil
from pathlib import Path

import nemo_run as run
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from distill_nemo.config import DistillationConfig, ParallelismConfig, StudentConfig, TeacherConfig
from tests.distillation import Case, Layout, megatron_step
from tests.tiny_models import write_hf

TOKENS = torch.randint(507, (2, 12), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return {
        "student": write_hf(root / "student", "llama", seed=2, layers=2, width=32),
        "teacher": write_hf(root / "teacher", "llama"),
        "other_vocabulary": write_hf(root / "other", "llama", vocab=600),
    }


def transformers_logits(path):
    from transformers import AutoModelForCausalLM

    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)(TOKENS).logits


def in_one_process(function, *args):
    from distill_nemo.runtime.device import setup_device
    from distill_nemo.runtime.process_groups import process_groups
    from distill_nemo.runtime.seed import seed_everything

    setup_device()
    with process_groups(ParallelismConfig()):
        seed_everything(0)
        return function(*args)


def logits(model):
    with torch.no_grad():
        return model.eval()(TOKENS, torch.arange(12).expand(2, -1), None)[..., :507]


def test_a_model_that_memory_cannot_hold_is_refused_before_it_is_built(one):
    student = StudentConfig(
        num_layers=10_000, hidden_size=2**14, ffn_hidden_size=2**16, num_attention_heads=128, vocab_size=507
    )
    with pytest.raises(ValueError, match=r"student: [\d,]+ parameters take [\d,]+ GiB of memory on a rank"):
        one.run(in_one_process, built, student)


def built(student):
    from distill_nemo.models.provider import model_provider

    model_provider(student=student, parallelism=ParallelismConfig())


def provider(student, teacher=None):
    """Bind `model_provider` as a recipe does, and build it with Fiddle."""
    import fiddle as fdl

    from distill_nemo.models.provider import model_provider

    bound = run.Partial(
        model_provider,
        student=run.Config(StudentConfig, checkpoint=student),
        parallelism=run.Config(ParallelismConfig),
    )
    if teacher:
        bound.teacher = run.Config(TeacherConfig, checkpoint=teacher)
        bound.distillation = run.Config(DistillationConfig, temperature=2.0)
    return fdl.build(bound)


def shape_of_modes(student, teacher):
    import modelopt.torch.distill as mtd
    from megatron.core.models.gpt import GPTModel

    from distill_nemo.models.provider import finalise

    plain = provider(student)(True, True, True)
    pair = provider(student, teacher)(True, True, True)
    is_pair, pair_logits, used = isinstance(pair, mtd.DistillationModel), logits(pair), pair.teacher_model
    clean = finalise(pair)
    hooks = [
        (name, hook)
        for name, module in clean.named_modules()
        for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
        if type(hook).__name__ != "FinishLogits"
    ]
    same = all(torch.equal(clean.state_dict()[k], v) for k, v in plain.state_dict().items() if v is not None)
    return {
        "plain": type(plain) is GPTModel,
        "pair": is_pair,
        "clean": type(clean) is GPTModel,
        "hooks": [str(hook) for hook in hooks],
        "left_over": sorted({*vars(clean), *vars(used)} - set(vars(plain))),
        "same_keys": list(clean.state_dict()) == list(plain.state_dict()),
        "same_weights": same,
        "logits": (logits(plain), pair_logits, logits(clean)),
        "lm_loss": float(clean(TOKENS, torch.arange(12).expand(2, -1), None, labels=TOKENS).sum()),
        "plain_lm_loss": float(plain(TOKENS, torch.arange(12).expand(2, -1), None, labels=TOKENS).sum()),
    }


def drawn(stage):
    """Return the weights of one of four random stages, alone in its process."""
    from megatron.core import parallel_state
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from distill_nemo.models.provider import model_provider
    from distill_nemo.runtime.device import setup_device
    from distill_nemo.runtime.seed import seed_everything

    setup_device()
    dist.init_process_group("fake", rank=stage, world_size=4, store=FakeStore())
    parallel_state.initialize_model_parallel(pipeline_model_parallel_size=4, create_gloo_process_groups=False)
    seed_everything(1)
    shape = {"hidden_size": 64, "ffn_hidden_size": 96, "num_attention_heads": 4, "vocab_size": 507}
    model = model_provider(
        stage == 0, stage == 3, student=StudentConfig(num_layers=8, **shape), parallelism=ParallelismConfig(1, 4)
    )
    weights = {name: weight.detach().clone() for name, weight in model.named_parameters() if weight.dim() > 1}
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()
    return weights


def test_no_two_stages_of_a_random_student_are_alike(one):
    stages = [one.run(drawn, stage)[0] for stage in range(4)]
    for a, b in itertools.combinations(stages, 2):
        assert a.keys() & b.keys() and not any(torch.equal(a[name], b[name]) for name in a.keys() & b.keys())


def test_a_plain_a_distilled_and_a_finalised_student_have_the_same_weights(models, one):
    seen = one.run(in_one_process, shape_of_modes, models["student"], models["teacher"])[0]
    assert seen["plain"] and seen["pair"] and seen["clean"]
    assert seen["hooks"] == [] and seen["left_over"] == []
    assert seen["same_keys"] and seen["same_weights"]
    for ours in seen["logits"]:
        torch.testing.assert_close(ours, transformers_logits(models["student"]), atol=1e-5, rtol=1e-5)
    assert seen["lm_loss"] == seen["plain_lm_loss"]


def logits_from(checkpoint):
    return logits(provider(checkpoint)())


def test_weights_come_from_a_checkpoint_of_ours_saved_at_tp2(models, one, two, tmp_path):
    """The checkpoint holds gradients in place of weights, so these logits can come from nowhere else."""
    from tests.distillation import gradients

    two.run(megatron_step, Case(models["student"], models["teacher"]), Layout(tensor=2), str(tmp_path))
    ours = one.run(in_one_process, logits_from, str(tmp_path))[0]
    exported = one.run(gradients, str(tmp_path))[0]
    assert exported.keys()
    torch.testing.assert_close(ours, transformers_logits(tmp_path / "hf"), atol=1e-6, rtol=1e-4)


def random_logits(seed):
    from distill_nemo.models.provider import model_provider
    from distill_nemo.runtime.seed import seed_everything

    seed_everything(seed)
    student = StudentConfig(num_layers=2, hidden_size=32, ffn_hidden_size=64, num_attention_heads=2, vocab_size=507)
    return logits(model_provider(student=student, parallelism=ParallelismConfig()))


def test_without_a_checkpoint_the_seed_decides(one):
    first, again, other = (one.run(in_one_process, random_logits, seed)[0] for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.allclose(first, other)


def build_pair(student, teacher):
    provider(student, teacher)()


@pytest.mark.parametrize(
    ("student", "teacher", "message"),
    [
        ("student", "other_vocabulary", r"student\.vocab_size = 507, teacher\.vocab_size = 600"),
        ("other_vocabulary", "teacher", r"student\.vocab_size = 600, teacher\.vocab_size = 507"),
    ],
)
def test_another_vocabulary_is_refused_with_both_sizes(models, one, student, teacher, message):
    with pytest.raises(ValueError, match=message):
        one.run(in_one_process, build_pair, models[student], models[teacher])


def cut(source, target, rows):
    """Write a copy, without using the package, whose vocabulary has only the first `rows`."""
    shutil.copytree(source, target)
    config, weights = json.loads(Path(target, "config.json").read_text()), load_file(f"{target}/model.safetensors")
    Path(target, "config.json").write_text(json.dumps(config | {"vocab_size": rows}))
    short = {name: weights[name][:rows].clone() for name in ("model.embed_tokens.weight", "lm_head.weight")}
    save_file(weights | short, f"{target}/model.safetensors", {"format": "pt"})
    return str(target)


def test_a_teacher_padded_to_more_rows_is_cut_to_the_students(one, two, tmp_path):
    from tests.distillation import gradients

    student = write_hf(tmp_path / "student", "llama", seed=2, layers=2, width=32, vocab=12_800)
    teacher = write_hf(tmp_path / "teacher", "llama", layers=2, width=32, vocab=12_900)
    by_hand = cut(teacher, tmp_path / "by_hand", 12_800)
    means, gradient = [], []
    for name, path in (("whole", teacher), ("cut", by_hand)):
        output = str(tmp_path / f"out_{name}")
        means.append(two.run(megatron_step, Case(student, path), Layout(tensor=2), output)[0])
        gradient.append(one.run(gradients, output)[0])
    assert means[0] == means[1] and means[0]["logit_loss"] > 0.1
    assert all(torch.equal(gradient[0][name], gradient[1][name]) for name in gradient[1])


def cut_and_exported(checkpoint, output, rows):
    from distill_nemo.models.checkpoints.huggingface import export_hf
    from distill_nemo.models.provider import model_provider
    from distill_nemo.models.resolve import resolve

    student = resolve(StudentConfig(checkpoint, vocab_size=rows))
    model = model_provider(student=student, parallelism=ParallelismConfig())
    export_hf([model], output, student)


@pytest.mark.parametrize("kind", ["Hugging Face", "ours"])
def test_rows_beyond_a_smaller_vocab_size_are_left_out(models, one, two, tmp_path, kind):
    """300 of 600 rows: the padding changes too."""
    from tests.distillation import gradients

    source = whole = models["other_vocabulary"]
    if kind == "ours":
        two.run(megatron_step, Case(source, None), Layout(tensor=2), str(tmp_path / "run"))
        one.run(gradients, str(tmp_path / "run"))
        source, whole = str(tmp_path / "run"), tmp_path / "run" / "hf"
    one.run(in_one_process, cut_and_exported, source, str(tmp_path / "out"), 300)  # compares its logits too
    by_hand = cut(whole, tmp_path / "by_hand", 300)
    exported, expected = (load_file(f"{path}/model.safetensors") for path in (tmp_path / "out", by_hand))
    assert exported.keys() == expected.keys()
    assert all(torch.equal(exported[name], expected[name]) for name in expected)
