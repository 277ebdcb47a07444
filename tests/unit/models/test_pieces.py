"""Pieces of Hugging Face tensors that a rank reads and writes, at every layout."""

import json
import os
import resource
import signal
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from distill_nemo.config import StudentConfig
from distill_nemo.runtime.device import setup_device
from distill_nemo.runtime.process_groups import process_groups
from tests.distillation import Layout
from tests.spawn import Gloo, ProcessEndedError
from tests.tiny_models import FAMILIES, REFUSED, has_experts, write_hf

LAYOUTS = {
    "one": (1, Layout()),
    "tp2": (2, Layout(tensor=2)),
    "tp4, two key/value heads": (4, Layout(tensor=4)),
    "pp2": (2, Layout(pipeline=2)),
    "dp2": (2, Layout()),
    "tp2 pp2": (4, Layout(tensor=2, pipeline=2)),
    "ep2": (2, Layout(expert=2)),
    "tp2 ep2": (4, Layout(tensor=2, sequence_parallel=True, expert=2)),
}
KNOWN_TO_MODELOPT = ("llama", "llama_tied", "llama3_rope", "qwen2", "qwen3", "qwen3_moe")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("hf")
    return {family: write_hf(root / family, family) for family in FAMILIES}


@pytest.fixture(scope="module")
def groups(one, two):
    with Gloo(4, init=False, timeout=200) as four:
        yield {1: one, 2: two, 4: four}


def _chunks(student, layout, **options):
    """Return this rank's pipeline stages."""
    from megatron.core import parallel_state as ps

    from distill_nemo.models.provider import model_provider

    stages = range(layout.virtual) if layout.virtual else [None]
    return [
        model_provider(
            ps.is_pipeline_first_stage(ignore_virtual=False, vp_stage=stage),
            ps.is_pipeline_last_stage(ignore_virtual=False, vp_stage=stage),
            student=student,
            parallelism=layout.config(),
            vp_stage=stage,
            **options,
        )
        for stage in stages
    ]


def round_trip(path, output, layout, max_file_bytes):
    """Import at a layout into weights of NaN, and export from there."""
    setup_device()
    with process_groups(layout.config()):
        from distill_nemo.models.checkpoints.huggingface import load_hf_weights
        from distill_nemo.models.checkpoints.write_safetensors import write_weights
        from distill_nemo.models.resolve import resolve

        student = resolve(StudentConfig(checkpoint=path))
        chunks = _chunks(student, layout, load_weights=False)
        for chunk in chunks:
            for tensor in _tensors(chunk).values():
                tensor.fill_(torch.nan)
            load_hf_weights(chunk, student)
        Path(output).mkdir(exist_ok=True)
        write_weights(chunks, student, Path(output), max_file_bytes)
        return [name for chunk in chunks for name, tensor in _tensors(chunk).items() if not tensor.isfinite().all()]


def _tensors(chunk):
    """Return parameters and the buffers that checkpoints hold."""
    return {name: tensor for name, tensor in chunk.state_dict().items() if isinstance(tensor, torch.Tensor)}


def _stored(directory):
    """Return {name: tensor} of a directory, and the number of its files."""
    files = sorted(Path(directory).glob("*.safetensors"))
    tensors = [load_file(file) for file in files]
    assert sum(map(len, tensors)) == len({name for part in tensors for name in part}), "no tensor twice"
    return {name: tensor for part in tensors for name, tensor in part.items()}, len(files)


def _possible(family: str, layout: str) -> bool:
    """Return False for expert parallelism without experts, for OLMo with a key/value head shared, and where refused."""
    if any(part.lower().replace("=", "") in layout for part in REFUSED.get(family, ())):
        return False
    return (has_experts(family) or "ep2" not in layout) and not ("olmo" in family and "tp4" in layout)


def _marks(family: str, layout: str) -> list[pytest.MarkDecorator]:
    """Leave layouts whose parallelism another one has, too, to `make test-long`, except for two families."""
    combined = "tp2 ep2" if "ep2" in layout else "tp2 pp2"
    told = layout in ("tp2 pp2", "tp2 ep2", "tp4, two key/value heads") or not _possible(family, combined)
    return [] if told or family in ("llama", "qwen3_moe") else [pytest.mark.long]


@pytest.mark.parametrize(
    ("family", "layout"),
    [
        pytest.param(family, layout, marks=_marks(family, layout))
        for family in FAMILIES
        for layout in LAYOUTS
        if _possible(family, layout)
    ],
)
def test_import_and_export_at_any_layout_give_the_file_again(models, groups, tmp_path, family, layout):
    processes, sizes = LAYOUTS[layout]
    for unwritten in groups[processes].run(round_trip, models[family], str(tmp_path / "out"), sizes, 10**9):
        assert not unwritten
    before, _ = _stored(models[family])
    after, _ = _stored(tmp_path / "out")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_stages_of_a_virtual_pipeline_are_read_and_written(groups, tmp_path):
    path = write_hf(tmp_path / "in", "llama_tied", layers=8)
    groups[4].run(round_trip, path, str(tmp_path / "out"), Layout(pipeline=4, virtual=2), 10**9)
    before, after = load_file(f"{path}/model.safetensors"), _stored(tmp_path / "out")[0]
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_an_export_is_cut_into_files_of_a_size(models, groups, tmp_path):
    from transformers import AutoModelForCausalLM

    groups[2].run(round_trip, models["llama"], str(tmp_path / "out"), Layout(pipeline=2), 150_000)
    before = AutoModelForCausalLM.from_pretrained(models["llama"]).state_dict()
    (tmp_path / "out" / "config.json").write_text(Path(models["llama"], "config.json").read_text())
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 3 and all(file.stat().st_size < 160_000 for file in files)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert {file.name for file in files} == set(index["weight_map"].values())
    assert index["metadata"]["total_size"] == sum(
        4 * tensor.numel() for tensor in _stored(tmp_path / "out")[0].values()
    )


EXPORTED = {
    "dp2": ("llama", 2, Layout()),
    "tp2 sp": ("qwen2", 2, Layout(tensor=2, sequence_parallel=True)),
    "cp2": ("qwen3", 2, Layout(context=2)),
    "tp2 pp2": ("llama_tied", 4, Layout(tensor=2, pipeline=2)),
    "pp2 cp2": ("llama3_rope", 4, Layout(pipeline=2, context=2)),
    "tp2 ep2": ("qwen3_moe", 4, Layout(tensor=2, sequence_parallel=True, expert=2)),
}


def export_at(path, output, layout, change=None, max_file_bytes=10**9):
    """Export at a layout. `change` may alter this rank's stages between the writing of files and their comparison."""
    setup_device()
    with process_groups(layout.config()):
        from distill_nemo.models.checkpoints import huggingface
        from distill_nemo.models.resolve import resolve
        from distill_nemo.runtime.seed import seed_everything

        seed_everything(0)
        student = resolve(StudentConfig(checkpoint=path))
        chunks, compare = _chunks(student, layout), huggingface.check_export

        def changed(*args, **options):
            if change is not None:
                change(chunks)
            compare(*args, **options)

        huggingface.check_export = changed
        try:
            huggingface.export_hf(chunks, output, student, source=Path(path), max_file_bytes=max_file_bytes)
        except RuntimeError as error:
            return str(error)
        finally:
            huggingface.check_export = compare


@pytest.mark.parametrize("case", EXPORTED)
def test_an_export_is_compared_with_transformers_at_its_own_layout(models, groups, tmp_path, case):
    family, processes, layout = EXPORTED[case]
    assert groups[processes].run(export_at, models[family], str(tmp_path / "out"), layout) == [None] * processes
    before, after = load_file(f"{models[family]}/model.safetensors"), _stored(tmp_path / "out")[0]
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def other_weights_on_the_last_rank(chunks):
    import torch.distributed as dist

    if dist.get_rank() == dist.get_world_size() - 1:
        chunks[-1].decoder.layers[0].mlp.linear_fc2.weight.data.add_(0.1)


@pytest.mark.parametrize("case", ["tp2 sp", "cp2", "tp2 pp2", "pp2 cp2"])
def test_an_export_that_is_not_the_model_is_refused_by_every_rank(models, groups, tmp_path, case):
    family, processes, layout = EXPORTED[case]
    output = str(tmp_path / "out")
    errors = groups[processes].run(export_at, models[family], output, layout, other_weights_on_the_last_rank)
    assert all("the exported model's logits differ by" in error for error in errors)
    assert [path.name for path in tmp_path.iterdir() if path.name != ".out.lock"] == []


def test_every_rank_learns_that_one_has_no_room(models, groups, tmp_path):
    errors = groups[2].run(export_without_room, models["llama"], str(tmp_path / "out"), Layout(pipeline=2))
    assert all(error.startswith("rank 1: ") and "File too large" in error for error in errors)
    assert [path.name for path in tmp_path.iterdir() if path.name != ".out.lock"] == []


def export_without_room(path, output, layout):
    """Export while the last rank has too little room for its file."""
    limits, heed = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    if os.environ["RANK"] == str(int(os.environ["WORLD_SIZE"]) - 1):
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        return export_at(path, output, layout)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, heed)


def killed_while_it_exports(path, output, layout, max_file_bytes, parameter):
    """Export, and end the first rank by SIGKILL before it writes the parameter of this number."""
    setup_device()
    from distill_nemo.models.checkpoints import write_safetensors

    write, written = write_safetensors._write, []

    def write_some(*args):
        written.append(args)
        if len(written) == parameter and os.environ["RANK"] == "0":
            os.kill(os.getpid(), signal.SIGKILL)
        write(*args)

    write_safetensors._write = write_some
    export_at(path, output, layout, max_file_bytes=max_file_bytes)


def _written_at(directory):
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in directory.glob("*.safetensors")}


@pytest.mark.parametrize(("layout", "parameter"), [(Layout(tensor=2), 24), (Layout(pipeline=2), 12)])
def test_an_export_ended_by_kill_9_keeps_the_files_that_are_whole(models, tmp_path, layout, parameter):
    output, aside, limit = tmp_path / "out", tmp_path / ".out.partial", 40_000
    with Gloo(2, init=False, timeout=200) as group:
        with pytest.raises((ProcessEndedError, RuntimeError)):  # of the killed rank, or of the other
            group.run(killed_while_it_exports, models["llama"], str(output), layout, limit, parameter)
    assert not output.exists()
    before = load_file(f"{models['llama']}/model.safetensors")
    files = sorted(aside.glob("*.safetensors"))
    whole = [path for path in files if all(torch.equal(t, before[name]) for name, t in load_file(path).items())]
    assert len(whole) >= 3, "too few to show anything"
    (aside / "stale.safetensors").touch()
    (aside / "vocab.txt").touch()
    os.truncate(whole[0], 1000)
    with whole[1].open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)[0]
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last ^ 1]))
    left = _written_at(aside)
    with Gloo(2, init=False, timeout=200) as group:
        assert group.run(export_at, models["llama"], str(output), layout, None, limit) == [None, None]
    kept = {name for name, at in _written_at(output).items() if left.get(name) == at}
    assert kept == {path.name for path in whole[2:]}
    after, _ = _stored(output)
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert not (output / "stale.safetensors").exists() and not (output / "vocab.txt").exists()
    assert not aside.exists()


def test_files_of_another_model_that_was_being_exported_are_written_anew(models, groups, tmp_path):
    other, output = write_hf(tmp_path / "other", "llama", seed=7), tmp_path / "out"
    with Gloo(1, init=False, timeout=200) as group:
        with pytest.raises((ProcessEndedError, RuntimeError)):  # of the killed rank, or of the other
            group.run(killed_while_it_exports, models["llama"], str(output), Layout(), 150_000, 20)
    assert groups[1].run(export_at, other, str(output), Layout(), None, 150_000) == [None]
    before, after = load_file(f"{other}/model.safetensors"), _stored(output)[0]
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def other_last_layer(chunks):
    chunks[-1].decoder.layers[-1].mlp.linear_fc2.weight.data.add_(0.1)


def test_a_model_that_does_not_fit_this_host_is_compared_a_layer_at_a_time(models, tmp_path, monkeypatch, capfd):
    from distill_nemo.models.checkpoints import huggingface

    monkeypatch.setattr(huggingface, "available_memory", lambda: 0)
    assert export_at(models["llama"], str(tmp_path / "out"), Layout()) is None
    assert "does not fit this host's memory: transformers reads it a layer at a time" in capfd.readouterr().out
    error = export_at(models["llama"], str(tmp_path / "other"), Layout(), other_last_layer)
    assert "the exported model's logits differ by" in error and not (tmp_path / "other").exists()


def test_a_tensor_larger_than_a_file_has_one_of_its_own():
    from distill_nemo.models.checkpoints.write_safetensors import plan_files

    sizes = {"a": 4, "b": 4, "large": 30, "c": 1, "d": 9, "e": 1}
    assert plan_files(sizes, 10) == [["a", "b"], ["large"], ["c", "d"], ["e"]]
    assert plan_files({}, 10) == []


def as_modelopt(path, layout):
    """Return names of weights that ModelOpt reads differently and, on one process, of those that it writes so."""
    setup_device()
    with process_groups(layout.config()):
        from distill_nemo.models.resolve import resolve
        from tests.modelopt_weights import fill_by_modelopt, tensors_by_modelopt

        student = resolve(StudentConfig(checkpoint=path))
        (ours,), (theirs,) = _chunks(student, layout), _chunks(student, layout, load_weights=False)
        for parameter in theirs.parameters():
            parameter.data.zero_()
        fill_by_modelopt(theirs, path)
        differing = [n for n, p in theirs.named_parameters() if not torch.equal(p, ours.get_parameter(n))]
        if layout == Layout():
            written = tensors_by_modelopt(ours, path, student.vocab_size)
            before = load_file(Path(path, "model.safetensors"))
            differing += [name for name in before if not torch.equal(before[name], written[name])]
        return differing


@pytest.mark.parametrize("layout", ["one", "tp2", "pp2"])
@pytest.mark.parametrize("family", KNOWN_TO_MODELOPT)
def test_modelopt_reads_and_writes_the_same(models, groups, family, layout):
    processes, sizes = LAYOUTS[layout]
    assert groups[processes].run(as_modelopt, models[family], sizes) == [[]] * processes


@pytest.mark.parametrize(("layout", "share"), [("one", 1.0), ("tp2", 0.5), ("pp2", 0.5)])
def test_a_rank_reads_the_bytes_that_it_keeps_and_no_header_twice(models, groups, layout, share):
    processes, sizes = LAYOUTS[layout]
    size = sum(tensor.numel() for tensor in _stored(models["llama"])[0].values())
    for numbers, headers in groups[processes].run(reads, models["llama"], sizes):
        assert numbers == pytest.approx(share * size, rel=0.02)
        assert headers == 1


def reads(path, layout):
    """Return the elements that an import reads, and the reads of a header from resolving the model to its weights."""
    setup_device()
    with process_groups(layout.config()):
        from distill_nemo.models.checkpoints import hf_tensors
        from distill_nemo.models.resolve import resolve

        numbers, headers, read, header = [], [], hf_tensors.PieceReader.read, hf_tensors.read_header

        def counted_read(self, piece):
            tensor = read(self, piece)
            numbers.append(tensor.numel())
            return tensor

        def counted_header(file):
            headers.append(file)
            return header(file)

        hf_tensors.PieceReader.read, hf_tensors.read_header = counted_read, counted_header
        try:
            _chunks(resolve(StudentConfig(checkpoint=path)), layout)
        finally:
            hf_tensors.PieceReader.read, hf_tensors.read_header = read, header
        return sum(numbers), len(headers)


def test_a_table_gives_the_shapes_of_a_model_that_is_built(models):
    """Hugging Face's shapes are compared with the file, Megatron's with the state of a model on one process."""
    setup_device()
    with process_groups(Layout().config()):
        from distill_nemo.models.checkpoints.local_parameters import local_parameters
        from distill_nemo.models.families.tensors import hf_axes, hf_shapes, num_parameters
        from distill_nemo.models.resolve import resolve

        for family, path in models.items():
            student = resolve(StudentConfig(checkpoint=path))
            with safe_open(f"{path}/model.safetensors", "pt") as file:
                stored = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
            assert hf_shapes(student) == stored, family
            axes = hf_axes(student).items()
            sums = {name: tuple(sum(span.size for span in spans) for spans in dims) for name, dims in axes}
            assert sums == stored, family
            assert num_parameters(student) == sum(t.numel() for t in _stored(path)[0].values())
            (built,) = _chunks(student, Layout())
            found = {p.name: sum(piece.shape[0] for piece in p.pieces) for p in local_parameters(built, student)}
            assert found == {name: len(tensor) for name, tensor in _tensors(built).items()}


def test_dimensions_are_known_by_what_they_hold(models):
    setup_device()
    from distill_nemo.models.families.tensors import hf_axes
    from distill_nemo.models.resolve import resolve

    def named(family):
        axes = hf_axes(resolve(StudentConfig(checkpoint=models[family])))
        return {name: tuple("+".join(span.axis for span in spans) for spans in dims) for name, dims in axes.items()}

    llama, phi3, moe = named("llama"), named("phi3"), named("qwen3_moe")
    layer = "model.layers.1."
    assert llama["model.embed_tokens.weight"] == llama["lm_head.weight"] == ("vocab", "hidden")
    assert llama[f"{layer}mlp.up_proj.weight"] == ("ffn", "hidden")
    assert llama[f"{layer}self_attn.o_proj.weight"] == ("hidden", "heads")
    assert llama[f"{layer}self_attn.k_proj.weight"] == ("groups", "hidden")
    assert phi3[f"{layer}self_attn.qkv_proj.weight"] == ("heads+groups+groups", "hidden")
    assert phi3[f"{layer}mlp.gate_up_proj.weight"] == ("ffn+ffn", "hidden")
    assert moe[f"{layer}mlp.gate.weight"] == ("experts", "hidden")
    assert moe[f"{layer}mlp.experts.3.down_proj.weight"] == ("hidden", "expert_ffn")


def test_files_of_sixteen_bits_are_read_into_fp32_and_back(models, groups, tmp_path):
    tensors = {name: tensor.bfloat16() for name, tensor in _stored(models["qwen3"])[0].items()}
    (tmp_path / "in").mkdir()
    save_file(tensors, tmp_path / "in" / "model.safetensors")
    (tmp_path / "in" / "config.json").write_text(Path(models["qwen3"], "config.json").read_text())
    groups[2].run(round_trip, str(tmp_path / "in"), str(tmp_path / "out"), Layout(tensor=2), 10**9)
    after, _ = _stored(tmp_path / "out")
    assert all(torch.equal(after[name], tensor.float()) for name, tensor in tensors.items())


def test_a_parameter_may_be_made_of_strided_and_transposed_parts(tmp_path):
    """Two ranks split the gate's and up's rows of one expert, whose columns alternate in the file."""
    from distill_nemo.models.checkpoints.hf_tensors import PieceReader, stored_tensors
    from distill_nemo.models.families.pieces import Piece, Place, clip

    whole = torch.arange(3 * 4 * 12).view(3, 4, 12).float()  # expert, input, output
    save_file({"experts": whole}, tmp_path / "model.safetensors")
    expert, inputs = slice(2, 3), slice(0, 4)
    gate, up = (Piece("experts", (expert, inputs, slice(first, 12, 2)), axes=(2, 1)) for first in range(2))
    with PieceReader(stored_tensors(tmp_path)) as reader:
        for rank in range(2):
            place = Place(None, None, size=2, rank=rank)  # type: ignore[arg-type]
            own = [piece for half in (gate, up) for piece in clip([half], place)]
            expected = torch.cat([whole[2].T[half::2].chunk(2)[rank] for half in range(2)])
            assert [piece.shape for piece in own] == [(3, 4)] * 2
            assert torch.equal(torch.cat([reader.read(piece) for piece in own]), expected)
