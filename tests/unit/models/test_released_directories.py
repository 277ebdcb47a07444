"""Directories as they are released, in whole runs: FP8, MXFP4, layers that predict further tokens, images and text.

The oracle is the same directory with plain weights, dequantised by the formulas of `test_quantized_sources`.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.distillation import Layout
from tests.distributed.checkpoint.test_resume import train
from tests.tiny_models import known, write_hf
from tests.training import metrics
from tests.unit.models.test_quantized_sources import BLOCK, FP8, fp8_oracle, mxfp4_oracle, quantise

LR = 1e-3
PLAIN_MODULES = ("in_proj_a.weight", "in_proj_b.weight", "eh_proj.weight")  # of those whose names have "proj"
MXFP4 = {
    "quant_method": "mxfp4",
    "modules_to_not_convert": [
        "model.layers.*.self_attn",
        "model.layers.*.mlp.router",
        "model.embed_tokens",
        "lm_head",
    ],
}
VISION = {
    "depth": 1,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_heads": 2,
    "out_hidden_size": 64,
    "patch_size": 4,
    "num_position_embeddings": 16,
}


def read(path):
    """Return copies of a directory's tensors, whose file is replaced afterwards."""
    return {name: tensor.clone() for name, tensor in load_file(path / "model.safetensors").items()}


def write_text(path, family, **more):
    """Write a tiny model, with a layer that predicts a further token if `more` states it. Return its tensors."""
    write_hf(path, family)
    tensors = read(path)
    if more:
        layer = {name: x for name, x in tensors.items() if name.startswith("model.layers.3.")}
        tensors |= {name.replace("layers.3.", "layers.4."): x * 2 for name, x in layer.items()}
        tensors |= {
            "model.layers.4.eh_proj.weight": torch.randn(64, 128),
            "model.layers.4.enorm.weight": torch.randn(64),
        }
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | more))
    return tensors


def write_images_and_text(path, family):
    """Write a tiny model of images and text with a layer that predicts a further token. Return its tensors."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    write_hf(path, f"{family}_text")
    text = json.loads((path / "config.json").read_text())
    ids = {name: 500 + i for i, name in enumerate(("image_token_id", "video_token_id", "vision_start_token_id"))}
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(
        AutoConfig.for_model(family, text_config=text, vision_config=VISION, **ids)
    )
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.02)
    model.save_pretrained(str(path))
    (path / "preprocessor_config.json").write_text('{"patch_size": 4}')
    mtp = {"mtp.fc.weight": torch.randn(64, 128), "mtp.layers.0.self_attn.q_proj.weight": torch.randn(96, 64)}
    return read(path) | mtp


def in_fp8(tensors):
    """Return the tensors as released, and dequantised."""
    stored, plain = dict(tensors), dict(tensors)
    for name in tensors:
        if "proj" not in name or not name.endswith(".weight") or name.endswith(PLAIN_MODULES) or ".visual." in name:
            continue
        stored[name], stored[f"{name}_scale_inv"] = values, scales = quantise(tensors[name], BLOCK)
        plain[name] = torch.from_numpy(fp8_oracle(values.view(torch.uint8).numpy(), scales.numpy(), BLOCK))
    return stored, plain


def in_mxfp4(tensors):
    """Return the tensors as released, their experts drawn anew, and dequantised."""
    random, stored, plain = np.random.default_rng(0), dict(tensors), dict(tensors)
    for name in tensors:
        if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            continue
        experts, inputs, outputs = stored.pop(name).shape
        blocks = random.integers(0, 256, (experts, outputs, inputs // 32, 16), dtype=np.uint8)
        scales = random.integers(121, 124, blocks.shape[:-1], dtype=np.uint8)
        stored |= {f"{name}_blocks": torch.from_numpy(blocks), f"{name}_scales": torch.from_numpy(scales)}
        plain[name] = torch.from_numpy(mxfp4_oracle(blocks, scales))
    return stored, plain


RELEASED = {  # tensors, what quantises them, quantization_config, copied into the export
    "deepseek_v3": (lambda path: write_text(path, "deepseek_v3", num_nextn_predict_layers=1), in_fp8, FP8, True),
    "qwen3_5_moe": (lambda path: write_images_and_text(path, "qwen3_5_moe"), in_fp8, FP8, True),
    "gpt_oss": (lambda path: write_text(path, "gpt_oss"), in_mxfp4, MXFP4, False),
}
NAMES = [name for name in RELEASED if known(name)]


def write(path, name):
    """Write a directory as released, and `plain` beside it. Return both and the plain tensors."""
    make, quantised, stated, _ = RELEASED[name]
    stored, plain = quantised(make(path))
    (path.parent / "plain").mkdir()
    config = json.loads((path / "config.json").read_text())
    for directory, tensors, more in (
        (path, stored, {"quantization_config": stated}),
        (path.parent / "plain", plain, {}),
    ):
        save_file(
            {each: x.contiguous() for each, x in tensors.items()}, directory / "model.safetensors", {"format": "pt"}
        )
        (directory / "config.json").write_text(json.dumps(config | more))
    return path, path.parent / "plain", plain


def step(inputs, one, output, student, teacher, **changes):
    """Train for one step. Return its metrics."""
    settings = {
        **{"student.checkpoint": str(student), "teacher.checkpoint": str(teacher), "distillation.lm_weight": 0.5},
        **{"training.steps": 1, "optimizer.lr": LR, "optimizer.min_lr": LR, "optimizer.warmup_steps": 0},
        "optimizer.weight_decay": 0.0,
    }
    assert one.run(train, inputs, output, 1, 1, None, settings | changes) == [0]
    return next(line for line in metrics(output) if line["kind"] == "train")


def exported_tensors(directory):
    return {name: x for file in directory.glob("*.safetensors") for name, x in load_file(file).items()}


@pytest.mark.parametrize("name", NAMES)
def test_a_released_student_is_the_dequantised_model_and_is_exported_plain(inputs, one, tmp_path, name):
    """A teacher of the same, dequantised weights has the same logits. Adam's first step is at most its rate."""
    student, teacher, plain = write(tmp_path / "released", name)
    copied = RELEASED[name][-1]
    more = {"checkpoint.export": True, "checkpoint.copy_untouched": copied}
    line = step(inputs, one, tmp_path / "run", student, teacher, **more)
    assert line["logit_loss"] == pytest.approx(0, abs=1e-7) and line["lm_loss"] > 3
    exported = exported_tensors(tmp_path / "run" / "student")
    assert exported.keys() == plain.keys()
    moved = {each: (exported[each] - plain[each]).abs().max().item() for each in plain}
    untouched = {each for each in plain if each.startswith(("mtp.", "model.visual.", "model.layers.4."))}
    assert bool(untouched) == copied and max(moved[each] for each in plain.keys() - untouched) <= 1.001 * LR
    assert sum(moved[each] > LR / 2 for each in plain.keys() - untouched) > len(plain) / 3
    for each in untouched:
        before = plain[each]  # quantised ones come out in bf16
        assert torch.equal(exported[each], before.to(exported[each].dtype)) and exported[each].dtype in (
            before.dtype,
            torch.bfloat16,
        )


def test_a_released_teacher_is_the_dequantised_model(inputs, one, tmp_path):
    teacher, student, _ = write(tmp_path / "released", "gpt_oss")
    assert step(inputs, one, tmp_path / "run", student, teacher)["logit_loss"] == pytest.approx(0, abs=1e-7)


def exported_whole(path, output, layout, limit):
    """Import a directory at a layout, and export it with everything beside the student."""
    from distill_nemo.config import StudentConfig
    from distill_nemo.runtime.device import setup_device
    from distill_nemo.runtime.process_groups import process_groups

    setup_device()
    with process_groups(layout.config()):
        from distill_nemo.models.checkpoints.huggingface import export_hf
        from distill_nemo.models.provider import model_provider
        from distill_nemo.models.resolve import resolve

        student = resolve(StudentConfig(checkpoint=str(path)))
        built = model_provider(student=student, parallelism=layout.config())
        export_hf([built], str(output), student, None, Path(path), limit, copy_untouched=True)
    return True


@pytest.mark.parametrize("family", [name for name in ("qwen3_5", "qwen3_5_moe") if known(name)])
def test_a_model_of_images_and_text_comes_out_whole(two, tmp_path, family):
    from transformers import AutoModelForImageTextToText

    source, output = tmp_path / "in", tmp_path / "out"
    tensors = write_images_and_text(source, family)
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    two.run(exported_whole, source, output, Layout(tensor=2), 100_000)
    exported = exported_tensors(output)
    assert exported.keys() == tensors.keys() and all(torch.equal(exported[name], tensors[name]) for name in tensors)
    index = json.loads((output / "model.safetensors.index.json").read_text())["weight_map"]
    assert index.keys() == tensors.keys()
    before, after = (json.loads((each / "config.json").read_text()) for each in (source, output))
    assert after == before and (output / "preprocessor_config.json").exists()
    model, found = AutoModelForImageTextToText.from_pretrained(str(output), output_loading_info=True)
    assert type(model).__name__ == before["architectures"][0] and not found["missing_keys"]
