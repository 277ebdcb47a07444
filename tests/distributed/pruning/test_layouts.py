"""`prune` at every layout: the same bytes."""

import json
import os
import re
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from distill_nemo.config import PruneConfig, StudentConfig
from distill_nemo.models.resolve import resolve
from distill_nemo.pruning.record import write_record
from distill_nemo.pruning.sizes import sizes_of
from tests.distillation import Layout
from tests.modelopt_files import dequantised, write_modelopt
from tests.spawn import Gloo, ProcessEndedError
from tests.tiny_models import has_experts, refuses, write_hf

SIZES = {"num_layers": 3, "hidden_size": 48, "num_attention_heads": 2, "num_query_groups": 2}
WIDTHS = {"ffn_hidden_size": 64, "moe_ffn_hidden_size": 32, "mamba_num_heads": 4}
DATA = {"samples": 8, "held_out_samples": 4, "sequence_length": 32}
LAYOUTS = {
    "TP=2": Layout(tensor=2, sequence_parallel=True),
    "PP=2": Layout(pipeline=2),
    "EP=2": Layout(expert=2),
    "DP=2": Layout(),
}
ALWAYS = ("llama", "qwen3_moe")
OTHER_PARTS = ("deepseek_v3", "gemma2", "gpt_oss", "granitemoe", "nemotron_h_moe", "olmo2", "phi3", "qwen3_next")
CASES = [*ALWAYS, *(pytest.param(family, marks=pytest.mark.long) for family in OTHER_PARTS)]


def pruned(path, data, output, layout, **changes):
    """Prune on this rank. Return the error, if there is one."""
    from distill_nemo.runtime.device import setup_device

    setup_device()
    from distill_nemo.pruning.prune import prune

    try:
        prune(replace(PruneConfig(path, output, data, **DATA, parallelism=layout.config()), **changes))
    except (ValueError, RuntimeError) as error:
        return str(error)
    return None


def sizes_for(path, family):
    """Return small sizes of all that the model has."""
    own = sizes_of(resolve(StudentConfig(checkpoint=path)))
    sizes = {name: size for name, size in (SIZES | WIDTHS).items() if name in own}
    if "num_experts" in own and family != "deepseek_v3":  # its groups of two would be too small
        sizes["num_experts"] = own["num_experts"] - 2
    return sizes | ({"hidden_size": 32} if family == "phi3" else {})  # in its class a head has hidden_size / heads


def content(directory):
    """Return the bytes of every file, and the record without what rounding changes."""
    files = {path.name: path.read_bytes() for path in sorted(Path(directory).iterdir())}
    record = json.loads(files.pop("pruning.json"))
    scores, _ = record.pop("scores"), record.pop("sha256")
    return files, record, scores


@pytest.mark.parametrize("family", CASES)
def test_every_layout_cuts_the_same(inputs, tmp_path, one, two, family):
    path, data = write_hf(tmp_path / "source", family), f"{inputs}/train"
    sizes = sizes_for(path, family)
    assert one.run(cut, path, data, str(tmp_path / "one"), Layout(), sizes) == [None]
    expected = content(tmp_path / "one")
    assert {"config.json", "model.safetensors"} <= expected[0].keys()
    assert expected[1]["result"]["sizes"].items() >= sizes.items()
    for name, layout in LAYOUTS.items():
        if refuses(family, name) or (name == "EP=2" and not has_experts(family)):
            continue
        output = tmp_path / name
        assert two.run(cut, path, data, str(output), layout, sizes) == [None, None], name
        found = content(output)
        assert found[:2] == expected[:2], name
        assert found[2].keys() == expected[2].keys()
        for layer, numbers in expected[2]["experts"].items():
            assert found[2]["experts"][layer] == pytest.approx(numbers, rel=2e-3), name
        assert found[2]["layers"] == pytest.approx(expected[2]["layers"], rel=2e-3), name
        assert found[2]["hidden"] == pytest.approx(expected[2]["hidden"], rel=2e-3), name


def cut(path, data, output, layout, changes):
    return pruned(path, data, output, layout, **changes)


def test_a_quantised_source_is_cut_as_its_values_in_bf16(inputs, tmp_path, one):
    path, data = write_hf(tmp_path / "plain", "llama", layers=2), f"{inputs}/train"
    path = write_modelopt(path, tmp_path / "source", "nvfp4")
    assert one.run(cut, path, data, str(tmp_path / "out"), Layout(), {"num_layers": 1}) == [None]
    (kept,) = json.loads((tmp_path / "out/pruning.json").read_text())["kept"]["layers"]
    end = "self_attn.q_proj.weight"
    found = load_file(tmp_path / "out/model.safetensors")[f"model.layers.0.{end}"]
    values, _ = dequantised(path)
    assert torch.equal(found, torch.from_numpy(values[f"model.layers.{kept}.{end}"]).bfloat16())


def killed_before_its_file_is_whole(path, data, output):
    """Prune, and end by SIGKILL when the weights are written but have no name yet."""
    from distill_nemo.runtime.device import setup_device

    setup_device()
    from distill_nemo.pruning import tensors

    tensors.fsync = lambda _: os.kill(os.getpid(), signal.SIGKILL)
    pruned(path, data, output, Layout(), **SIZES)


def test_a_call_ended_by_kill_9_goes_on_with_its_scores(inputs, tmp_path, one):
    path, data = write_hf(tmp_path / "source", "llama"), f"{inputs}/train"
    with Gloo(1, init=False, timeout=200) as group, pytest.raises((ProcessEndedError, RuntimeError)):
        group.run(killed_before_its_file_is_whole, path, data, str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()
    record = tmp_path / ".out.partial/pruning.json"
    write_record(record.parent, json.loads(record.read_text()) | {"marked": True})
    for name in ("out", "other"):
        assert one.run(cut, path, data, str(tmp_path / name), Layout(), SIZES) == [None]
    resumed, other = content(tmp_path / "out"), content(tmp_path / "other")
    assert resumed[1].pop("marked") and "marked" not in other[1]
    assert resumed == other
    assert not list(tmp_path.glob(".*partial"))


TARGET = {"target_params": 900_000, "layer_importance": "loss"}  # for a wide model


def killed_after_a_candidate(path, data, output):
    """Prune, and end by SIGKILL when the loss of one candidate is known."""
    from distill_nemo.runtime.device import setup_device

    setup_device()
    from distill_nemo.pruning import prune

    write = prune.write_progress

    def write_and_die(directory, identity, scores, losses):
        write(directory, identity, scores, losses)
        if len(losses) == 2:  # the source's, and a candidate's
            os.kill(os.getpid(), signal.SIGKILL)

    prune.write_progress = write_and_die
    pruned(path, data, output, Layout(), **TARGET)


def resumed(path, data, output):
    """Prune, without scores of its own."""
    from distill_nemo.runtime.device import setup_device

    setup_device()
    from distill_nemo.pruning.calibration import Calibration

    with pytest.MonkeyPatch.context() as patch:
        patch.delattr(Calibration, "scores")
        return pruned(path, data, output, Layout(), **TARGET)


def test_a_target_is_met_by_the_candidate_with_the_lowest_loss_also_after_kill_9(inputs, tmp_path, one):
    path, data = write_hf(tmp_path / "source", "llama", width=256, heads=8, groups=4), f"{inputs}/train"
    assert one.run(cut, path, data, str(tmp_path / "out"), Layout(), TARGET) == [None]
    record = json.loads((tmp_path / "out/pruning.json").read_text())
    losses = [each["held_out_lm_loss"] for each in record["candidates"]]
    assert len(losses) > 1 and record["held_out_lm_loss"]["result"] == min(losses)
    assert 810_000 <= record["result"]["num_parameters"] <= 900_000
    with Gloo(1, init=False, timeout=200) as group, pytest.raises((ProcessEndedError, RuntimeError)):
        group.run(killed_after_a_candidate, path, data, str(tmp_path / "killed"))
    assert one.run(resumed, path, data, str(tmp_path / "killed")) == [None]
    assert content(tmp_path / "killed") == content(tmp_path / "out")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"num_experts": 2}, r"num_experts = 2: .*[^$]*can be cut to:"),
        ({"samples": 10**5}, r"samples = 100000 and held_out_samples = 4: .* holds [\d,]+ samples of 32 tokens"),
        ({"split": "0,1"}, 'the first share of split = "0,1" holds no whole sample of 32 tokens'),
        ({"sequence_length": 129}, "sequence_length = 129 is longer than the model's max_position_embeddings"),
    ],
)
def test_what_does_not_fit_is_refused_and_leaves_nothing_behind(inputs, tmp_path, one, changes, reason):
    path = write_hf(tmp_path / "source", "llama")
    (error,) = one.run(cut, path, f"{inputs}/train", str(tmp_path / "out"), Layout(), SIZES | changes)
    assert re.search(reason, error)
    assert sorted(each.name for each in tmp_path.iterdir()) == ["source"]
