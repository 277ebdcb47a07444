"""An export keeps its source's configuration and files, has one writer at a time, and survives crashes."""

import json
import math
import resource
import shutil
from pathlib import Path

import pytest
import torch

from distill_nemo.config import StudentConfig
from distill_nemo.config_files import to_dict
from distill_nemo.runtime.device import setup_device
from distill_nemo.runtime.files import replace_directory, restore_replaced
from tests.tiny_models import FAMILIES, OWN_FIELDS, write_hf
from tests.training import tiny_run

STATED = {
    "attention_dropout": 0.1,
    "initializer_range": 0.017,
    "bos_token_id": 3,
    "eos_token_id": [0, 5],
    "pad_token_id": 7,
    "use_cache": False,
    "torch_dtype": "float16",
    "pretraining_tp": 1,
    "transformers_version": "4.57.0",
    "_name_or_path": "meta/model",
    "id2label": {"0": "no"},
    "own_field": {"kept": [1, None]},
    "problem_type": None,
}


def stated(directory: str | Path) -> dict:
    return json.loads(Path(directory, "config.json").read_text())


def state(directory: str | Path, **values) -> None:
    Path(directory, "config.json").write_text(json.dumps(stated(directory) | values))


def collected(source, tokenizer=None, dtype=torch.bfloat16, **fields):
    setup_device()
    from distill_nemo.models.checkpoints.export_files import export_files
    from distill_nemo.models.resolve import resolve

    return export_files(resolve(StudentConfig(checkpoint=str(source), **fields)), dtype, Path(source), tokenizer)


def test_licences_are_copied_and_the_card_of_the_source_is_not(tmp_path):
    source = write_hf(tmp_path / "m", "llama", layers=2)
    for name in ("LICENSE", "NOTICE.txt", "README.md", "LICENSE.py"):
        (Path(source) / name).write_text(name)
    assert {"LICENSE", "NOTICE.txt"} == collected(source).files.keys() & {
        "LICENSE",
        "NOTICE.txt",
        "README.md",
        "LICENSE.py",
    }


def test_a_link_out_of_the_source_is_followed_only_to_a_file_of_its_name_or_a_blob_of_the_hub(tmp_path):
    """`LICENSE -> /proc/self/environ` would publish the token of a push."""
    source = Path(write_hf(tmp_path / "m", "llama", layers=2))
    for name, target in (("LICENSE", "shared/LICENSE"), ("NOTICE", "blobs/0123"), ("COPYING", "m/USE_POLICY.md")):
        (tmp_path / target).parent.mkdir(exist_ok=True)
        (tmp_path / target).write_text(name)
        (source / name).symlink_to(tmp_path / target)
    assert {"LICENSE", "NOTICE", "COPYING", "USE_POLICY.md"} <= collected(source).files.keys()
    (source / "LICENSE.txt").symlink_to("/proc/self/environ")
    with pytest.raises(ValueError, match=r"LICENSE.txt is a link to /proc/.*/environ, .* put a copy in its place"):
        collected(source)


def test_json_files_name_no_place_on_this_machine(tmp_path):
    source = Path(chat_student(tmp_path / "alice" / "m", "config"))
    commit = "0123456789" * 4
    state(source, _name_or_path=str(source), text={"cache_dir": "../alice/cache"}, trained_on=["/home/alice/data"])
    tokenizer = json.loads((source / "tokenizer_config.json").read_text())
    tokens = {"pad_token": "/pad", "additional_special_tokens": ["/alice/x"], "chat_template": "/alice/{{ messages }}"}
    tokenizer |= {"name_or_path": "meta-llama/Llama-3.2-1B", "tokenizer_file": f"{source}/tokenizer.json", **tokens}
    tokenizer |= {"special_tokens_map_file": f"/cache/alice/models--Org--M/snapshots/{commit}", "local": "C:\\alice\\m"}
    (source / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    (source / "generation_config.json").write_text(json.dumps({"_name_or_path": "~/alice/m", "eos_token_id": 5}))
    vocabulary = (source / "tokenizer.json").read_bytes()
    (tmp_path / "out").mkdir()
    collected(source).write(tmp_path / "out")
    written = {file.name: file.read_bytes() for file in (tmp_path / "out").glob("*.json")}
    config, generation, found = (
        json.loads(written[f"{name}config.json"]) for name in ("", "generation_", "tokenizer_")
    )
    assert (config["_name_or_path"], config["text"], config["trained_on"]) == ("m", {"cache_dir": "cache"}, ["data"])
    assert generation == {"_name_or_path": "m", "eos_token_id": 5}
    stated = {"tokenizer_file": "tokenizer.json", "special_tokens_map_file": f"Org/M@{commit}", "local": "m"}
    assert found == tokenizer | stated
    assert written["tokenizer.json"] == vocabulary
    assert {name for name, content in written.items() if b"alice" in content} == {"tokenizer_config.json"}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_field_of_the_source_is_kept(tmp_path, family):
    source = write_hf(tmp_path / "m", family, layers=2)
    states_types = "qwen" in family and "layer_types" not in OWN_FIELDS.get(family, {})
    more = {"layer_types": ["full_attention"] * 2, "max_window_layers": 2} if states_types else {}
    state(source, **STATED, **more, auto_map={"AutoConfig": "code.X"})
    config = collected(source).config
    own = {"dtype", "torch_dtype", "auto_map", "num_nextn_predict_layers"}
    kept = {name: value for name, value in stated(source).items() if name not in own}
    rope = kept.get("rope_parameters", {})
    rope.pop("type", None)  # beside rope_type, which overrides it
    nested = {kind: value for kind, value in rope.items() if isinstance(value, dict)}
    kept |= {"rope_parameters": nested} if nested else {}  # beside these, transformers reads nothing
    assert {name: config.get(name, "lost") for name in kept} == kept
    assert (config["dtype"], config["torch_dtype"]) == ("bfloat16", "bfloat16") and "auto_map" not in config
    assert not config.get("num_nextn_predict_layers")  # they are not exported
    base = stated(source).get("rope_parameters", {}).get("rope_theta") or stated(source).get("rope_theta")
    if not any(isinstance(value, dict) for value in config.get("rope_parameters", {}).values()):
        assert config.get("rope_theta") == config.get("rope_parameters", {}).get("rope_theta") == base


def test_only_where_the_student_differs_the_configuration_does(tmp_path, capsys):
    source = write_hf(tmp_path / "m", layers=1)
    state(source, eos_token_id=[2, 506], pad_token_id=506, bos_token_id=1)
    generation = Path(source, "generation_config.json")
    generation.write_text(json.dumps({"eos_token_id": [506, 2], "pad_token_id": 506, "top_k": 600}))
    export = collected(source, vocab_size=500)
    config = export.config
    assert (config["vocab_size"], config["eos_token_id"], config["pad_token_id"]) == (500, [2], None)
    assert json.loads(export.files[generation.name]) == {"eos_token_id": [2], "pad_token_id": None, "top_k": 600}
    assert collected(source).files[generation.name] == generation

    from distill_nemo.models.checkpoints.export_files import export_files
    from distill_nemo.models.resolve import resolve

    student = resolve(StudentConfig(checkpoint=write_hf(tmp_path / "other", layers=2)))
    config = export_files(student, torch.float32, Path(source), None).config
    assert config["num_hidden_layers"] == 2 and "pad_token_id" not in config
    assert f"{source} holds another model now (num_layers = 1, the student's is 2)" in capsys.readouterr().err


def test_the_attention_that_a_source_names_need_not_be_installed(tmp_path):
    source = write_hf(tmp_path / "m", layers=1)
    state(source, attn_implementation="flash_attention_2")
    export = collected(source)
    export.check()
    assert export.config["attn_implementation"] == "flash_attention_2"


@pytest.mark.parametrize("ids", ["2", ["x"], [[1]], {"a": 1}, True])
def test_an_end_that_is_no_id_is_left_to_transformers_to_refuse(tmp_path, ids):
    source = write_hf(tmp_path / "m", layers=1)
    state(source, eos_token_id=ids)
    assert collected(source).config["eos_token_id"] == ids


def chat_student(directory: Path, kind: str) -> str:
    """Write a model with a tokenizer, two chat templates (files or configuration) and typical files of the hub."""
    from distill_nemo.data.stdlib_corpus import stdlib_modules, train_tokenizer

    source = Path(write_hf(directory, layers=1))
    train_tokenizer(stdlib_modules()[:3], source, 507)
    config = json.loads((source / "tokenizer_config.json").read_text())
    if kind == "files":
        (source / "additional_chat_templates").mkdir()
        (source / "chat_template.jinja").write_text("D{{ messages }}")
        (source / "additional_chat_templates" / "tool_use.jinja").write_text("T{{ messages }}")
    else:
        named = {"default": "D{{ messages }}", "tool_use": "T{{ messages }}"}
        config["chat_template"] = [{"name": name, "template": template} for name, template in named.items()]
    (source / "tokenizer_config.json").write_text(json.dumps(config))
    (source / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, 5], "temperature": 0.6}))
    for name in ("LICENSE", "README.md", "preprocessor_config.json", "tokenizer_code.py", "tokenizer.model"):
        (source / name).write_text("x")
    (source / "special_tokens_map.json").write_text('{"eos_token": "<|endoftext|>"}')
    (source / "added_tokens.json").write_text("{}")
    return str(source)


@pytest.mark.parametrize("kind", ["files", "config"])
@pytest.mark.parametrize("elsewhere", [False, True])
def test_tokenizer_chat_templates_and_generation_config_are_kept(tmp_path, kind, elsewhere):
    """The source's are kept too if the exported tokenizer is another directory's, which has none."""
    from transformers import AutoTokenizer, GenerationConfig

    from distill_nemo.data.stdlib_corpus import stdlib_modules, train_tokenizer

    source = chat_student(tmp_path / "m", kind)
    train_tokenizer(stdlib_modules()[:3], tmp_path / "tokenizer", 507)
    files = collected(source, tmp_path / "tokenizer" if elsewhere else None)
    files.check()
    (tmp_path / "out").mkdir()
    files.write(tmp_path / "out")
    written = {str(file.relative_to(tmp_path / "out")) for file in (tmp_path / "out").rglob("*") if file.is_file()}
    expected = {"LICENSE", "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}
    if elsewhere:  # transformers 4 writes it with every tokenizer
        expected |= {file.name for file in (tmp_path / "tokenizer").glob("special_tokens_map.json")}
    else:
        expected |= {"tokenizer.model", "special_tokens_map.json", "added_tokens.json"}
    if kind == "files" or elsewhere:
        expected |= {"chat_template.jinja", "additional_chat_templates/tool_use.jinja"}
    assert written == expected
    template = AutoTokenizer.from_pretrained(tmp_path / "out").chat_template
    assert template == {"default": "D{{ messages }}", "tool_use": "T{{ messages }}"}
    assert GenerationConfig.from_pretrained(tmp_path / "out").eos_token_id == [0, 5]


def test_a_tokenizer_that_is_named_keeps_its_own_chat_template(tmp_path):
    source = chat_student(tmp_path / "m", "files")
    other = Path(chat_student(tmp_path / "other", "config"))
    files = collected(source, other).files
    assert "chat_template.jinja" not in files and files["tokenizer_config.json"] == other / "tokenizer_config.json"


def export_directory(path: Path) -> Path:
    """Write a directory that passes for an earlier export."""
    from safetensors.torch import save_file

    from distill_nemo.models.checkpoints.write_safetensors import METADATA

    path.mkdir()
    save_file({"x": torch.ones(1)}, path / "model.safetensors", METADATA)
    return path


def test_two_exports_into_one_directory(one, tmp_path):
    """The second is refused while the first writes. The first is whole."""
    setup_device()
    from distill_nemo.models.checkpoints.huggingface import writing_export

    out = export_directory(tmp_path / "out")
    with writing_export(out) as partial:
        (partial / "new").touch()
        with pytest.raises(ValueError, match=f"output = {out}: another process writes there"):
            one.run(second_export, out)
        assert partial.exists() and (out / "model.safetensors").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"] and (out / "new").exists()


def second_export(out: Path) -> None:
    setup_device()
    from distill_nemo.models.checkpoints.huggingface import writing_export

    with writing_export(out):
        pass


def test_a_full_disk_leaves_the_earlier_export(tmp_path):
    setup_device()
    from distill_nemo.models.checkpoints.huggingface import writing_export
    from distill_nemo.models.checkpoints.tensor_files import Entry, TensorFiles

    out = export_directory(tmp_path / "out")
    before = (out / "model.safetensors").read_bytes()

    def text(partial: Path) -> None:
        (partial / "config.json").write_text("x" * 4096)

    def weights(partial: Path) -> None:
        with TensorFiles(partial, {"model.safetensors": {"x": Entry("F32", (4096,))}}, {}) as files:
            files.create("model.safetensors")

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for write in (text, weights):
        resource.setrlimit(resource.RLIMIT_FSIZE, (1024, hard))  # EFBIG, where a full disk gives ENOSPC
        try:
            with pytest.raises(OSError, match=r"output = .*/out: the export could not be written: .*too large"):
                with writing_export(out) as partial:
                    write(partial)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert [path.name for path in tmp_path.iterdir()] == ["out"]
        assert (out / "model.safetensors").read_bytes() == before


def test_a_disk_that_fills_up_is_told_with_the_file(tmp_path):
    setup_device()
    from distill_nemo.models.checkpoints.tensor_files import Entry, TensorFiles

    with TensorFiles(tmp_path, {"a.safetensors": {"x": Entry("F32", (4096,))}}, {}) as writing:
        writing.create("a.safetensors")
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1024, hard))
        try:
            with pytest.raises(OSError, match=r"too large: '.*/a\.safetensors'"):
                writing.write("x", torch.ones(4096))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_rows_written_in_any_order_are_read_by_safetensors(tmp_path):
    setup_device()
    from safetensors.torch import load_file

    from distill_nemo.models.checkpoints.tensor_files import DTYPES, Entry, TensorFiles

    shapes = {"F64": (), "BF16": (5, 3), "F8_E4M3": (7,), "F32": (4, 2, 3), "U8": (2, 2), "BOOL": (3,)}
    tensors = {
        dtype: torch.arange(math.prod(shape)).reshape(shape).to(DTYPES[dtype]) for dtype, shape in shapes.items()
    }
    files = {"a": {"BF16": Entry("BF16", (5, 3)), "F8_E4M3": Entry("F8_E4M3", (7,))}}
    files["b"] = {name: Entry(name, shape) for name, shape in shapes.items() if name not in files["a"]}
    with TensorFiles(tmp_path, files, {"producer": "a test"}) as writing:
        for file in files:
            writing.create(file)
        for name, tensor in reversed(tensors.items()):
            if tensor.dim():
                writing.write(name, tensor[1:], 1)
                writing.write(name, tensor.T.contiguous().T[:1] if tensor.dim() == 2 else tensor[:1])
            else:
                writing.write(name, tensor)
    found = load_file(tmp_path / "a") | load_file(tmp_path / "b")
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name].float(), tensor.float()) for name, tensor in tensors.items())
    assert {name: tensor.dtype for name, tensor in found.items()} == {name: DTYPES[name] for name in tensors}


@pytest.mark.parametrize("moved", [True, False])
def test_an_export_that_a_crash_left_aside_is_brought_back(tmp_path, moved):
    target, new = tmp_path / "out", tmp_path / "new"
    for path in (target, new):
        path.mkdir()
        (path / "name").write_text(path.name)
    if moved:
        target.rename(tmp_path / ".out.replaced")  # and killed here
    restore_replaced(target)
    assert (target / "name").read_text() == "out"
    replace_directory(new, target)
    restore_replaced(target)
    assert (target / "name").read_text() == "new" and [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_source_of_a_student_is_found_through_runs(tmp_path, capsys):
    from distill_nemo.checkpoint.export import _source

    source = write_hf(tmp_path / "m", layers=1)

    def step(name: str, checkpoint: str | None) -> str:
        directory = tmp_path / name / "checkpoints" / "step_00000004"
        directory.mkdir(parents=True)
        run = tiny_run(tmp_path, tmp_path / name)
        run.student.checkpoint = checkpoint
        (directory / "run.json").write_text(json.dumps(to_dict(run)))
        (directory / "architecture.json").write_text("{}")
        return str(directory)

    assert _source(source) == _source(step("a", source)) == _source(step("b", step("c", source))) == Path(source)
    assert _source(None) is None and _source(step("d", None)) is None
    shutil.rmtree(source)
    assert _source(step("e", source)) is None
    assert f"{source}, where the student came from, does not exist any more" in capsys.readouterr().err
