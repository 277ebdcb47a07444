"""Mistakes in a run: one `ValueError` has the field, the value and what to do, and nothing is written.

Each case is a whole run in a real process, up to its refusal. Weights that do not fit:
tests/unit/models/test_huggingface.py and test_teacher_provider.py; fields: test_config.py; the command line: tests/cli.
"""

import contextlib
import dataclasses
import io
import json
import os
import re
import shutil
from pathlib import Path

import pytest
import transformers

from distill_nemo.config import StudentConfig
from distill_nemo.data.prepare import prepare
from distill_nemo.data.stdlib_corpus import stdlib_modules
from tests.tiny_models import write_hf
from tests.token_files import write_documents
from tests.training import changed, metrics, tiny_run


def run(inputs, output, changes=(), world_size=1):
    """Run a tiny config with `changes` ("section.field" -> value) on this rank."""
    from distill_nemo.training.entry import run_config

    config = tiny_run(inputs, output, steps=4)
    for path, value in dict(changes).items():
        section, field = path.split(".")
        setattr(getattr(config, section), field, value)
    before, os.environ["WORLD_SIZE"] = os.environ["WORLD_SIZE"], str(world_size)
    try:
        run_config(config)
    finally:
        os.environ["WORLD_SIZE"] = before


def files(directory):
    """Return every path below `directory`, with size and time of change; None if there is no such directory."""
    if not Path(directory).exists():
        return None
    stats = {path: path.stat() for path in sorted(Path(directory).rglob("*"))}
    return {str(path): (stat.st_size, stat.st_mtime_ns) for path, stat in stats.items()}


def refused(group, inputs, output, changes=(), world_size=1):
    """Return the message of the refusal. The content of `output` is unchanged."""
    before = files(output)
    with pytest.raises(ValueError) as raised:
        group.run(run, inputs, output, changes, world_size)
    assert files(output) == before
    assert len(str(raised.value).splitlines()) <= 10, "one screen"
    return str(raised.value)


@pytest.mark.parametrize(
    ("changes", "world_size", "message"),
    [
        ({"parallelism.tensor_model_parallel_size": 2}, 3, "world size 3 is not divisible by"),
        ({"parallelism.tensor_model_parallel_size": 3}, 3, "student: num_attention_heads = 4 is not divisible by para"),
        ({"parallelism.pipeline_model_parallel_size": 4}, 4, "student.num_layers = 2 cannot fill 4 pipeline stages"),
        ({"training.global_batch_size": 5}, 1, "global_batch_size 5 is not divisible by micro_batch_size 2"),
        ({"training.global_batch_size": 4}, 4, "micro_batch_size 2 x data parallel size 4 = 8"),
        ({"training.dtype": "bfloat16"}, 1, 'training.dtype = "bfloat16" needs a GPU, and there is none'),
        ({"data.sequence_length": 129}, 1, "data.sequence_length = 129 is longer than the student's max_position_emb"),
        ({"teacher.checkpoint": "/no/such"}, 1, "checkpoint directory not found: /no/such"),
        ({"student.num_layers": 3}, 1, "num_layers = 3 contradicts"),
        ({"data.train": ["no/such"]}, 1, "data.train: no file no/such.idx"),
        ({"training.steps": 10**12}, 1, "training.steps = 1000000000000 of training.global_batch_size = 4: the"),
        (
            {"training.micro_batch_size": 2**25, "training.global_batch_size": 2**25},
            1,
            "training.micro_batch_size = 33554432: so many samples of 32 tokens take 56 GiB of memory",
        ),
        ({"data.tokenizer": "/no/such"}, 1, "no such tokenizer directory: /no/such"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_before_anything_is_written(inputs, one, tmp_path, changes, world_size, message):
    assert message in refused(one, inputs, tmp_path / "out", changes, world_size)


def test_a_teacher_of_random_weights(inputs, one, tmp_path):
    shape = {"num_layers": 2, "hidden_size": 32, "ffn_hidden_size": 48, "num_attention_heads": 4, "vocab_size": 507}
    changes = {"teacher.checkpoint": None} | {f"teacher.{name}": value for name, value in shape.items()}
    assert "teacher.checkpoint is not set" in refused(one, inputs, tmp_path / "run", changes)


def test_an_evaluation_beyond_the_positions_of_a_model(inputs, one):
    with pytest.raises(ValueError, match="longer than the student's max_position_embeddings"):
        one.run(evaluated, inputs, 10**6)
    with pytest.raises(ValueError, match=r"^data: no file no/such\.idx"):
        one.run(evaluated, inputs, 32, None, "no/such")


def evaluated(inputs, length, student=None, data=None):
    from distill_nemo.training.evaluate import evaluate_student

    evaluate_student(StudentConfig(str(student or inputs / "student")), str(data or inputs / "valid"), None, length, 8)


def test_vocabularies_that_differ_are_refused(inputs, one, tmp_path):
    """The inputs' tokenizer and models have 507 ids."""
    write_hf(tmp_path / "smaller", layers=2, width=32, vocab=400)
    write_hf(tmp_path / "larger", layers=2, width=32, vocab=600)
    output = tmp_path / "out"
    smaller = {"student.checkpoint": str(tmp_path / "smaller"), "teacher.vocab_size": 400}
    error = refused(one, inputs, output, smaller)
    assert "train.bin holds the token id " in error and "vocab_size is 400" in error
    shutil.copytree(inputs / "tokenizer", tmp_path / "tokenizer")
    for suffix in (".bin", ".idx"):  # made elsewhere, without our manifest
        shutil.copy(f"{inputs}/train{suffix}", f"{tmp_path}/foreign{suffix}")
    changes = {"data.train": [f"{tmp_path}/foreign"], "data.valid": [f"{tmp_path}/foreign"]}
    error = refused(one, inputs, output, changes | smaller)
    assert "data.tokenizer" in error and "has 507 ids, but student.vocab_size = 400" in error
    error = refused(one, inputs, output, {"teacher.checkpoint": str(tmp_path / "larger")})
    assert "student.vocab_size = 507" in error and "teacher.vocab_size = 600" in error


def test_an_added_token_beyond_the_rows_of_the_model_is_harmless_unless_it_occurs(inputs, one, tmp_path):
    """The [PAD] that is often added to Llama 2's tokenizer is one."""
    student = shutil.copytree(inputs / "student", tmp_path / "student")
    shutil.copytree(inputs / "tokenizer", student, dirs_exist_ok=True)
    stated = json.loads((student / "tokenizer.json").read_text())
    pad = stated["added_tokens"][0] | {"id": 507, "content": "[PAD]"}
    (student / "tokenizer.json").write_text(json.dumps(stated | {"added_tokens": [*stated["added_tokens"], pad]}))
    for tokenizer in (str(student), None):
        config = changed(tiny_run(inputs, tmp_path / "out", steps=4), {"student.checkpoint": str(student)})
        config.data.tokenizer, config.student.vocab_size = tokenizer, 507
        one.run(checked_data, config)
    (tmp_path / "text.txt").write_text("padded [PAD]")
    prepare([str(tmp_path / "text.txt")], str(tmp_path / "padded"), str(student), num_workers=1, progress=False)
    changes = {"data.train": [str(tmp_path / "padded")], "data.tokenizer": str(student)}
    error = refused(one, inputs, tmp_path / "out", changes)
    assert "padded.bin holds the token id 507" in error and "vocab_size is 507" in error


def test_tokenizers_of_one_size_whose_ids_differ_are_refused(inputs, one, tmp_path):
    """The number of ids is equal but the tokens differ, so a falling loss would mean nothing."""
    teacher = shutil.copytree(inputs / "teacher", tmp_path / "teacher")
    shutil.copytree(inputs / "tokenizer", teacher, dirs_exist_ok=True)
    tokens = {i: token for token, i in tokenizer_vocab(teacher).items()}
    rename(teacher, {tokens[300]: 301, tokens[301]: 300})  # as fine-tuned models rename a few
    config = tiny_run(inputs, tmp_path / "out", steps=4)
    config.teacher.checkpoint, config.student.vocab_size = str(teacher), 507
    one.run(checked_data, config)
    rename(teacher, {tokens[i]: 799 - i for i in range(300, 500)})
    error = refused(one, inputs, tmp_path / "out", {"teacher.checkpoint": str(teacher)})
    assert f"data.tokenizer = {inputs}/tokenizer and teacher.checkpoint = {teacher} have different tokenizers" in error
    assert f"of 507 ids 200 are other tokens, such as 300: {tokens[300]!r} and {tokens[499]!r}" in error


@pytest.mark.parametrize("kept", ["tokenizer", "manifest"])
def test_token_files_made_with_another_tokenizer_are_refused(inputs, one, tmp_path, kept):
    """The number of ids is equal but two tokens differ. The tokenizer's directory may be gone."""
    directory = shutil.copytree(inputs / "tokenizer", tmp_path / "tokenizer")
    tokens = {i: token for token, i in tokenizer_vocab(directory).items()}
    rename(directory, {tokens[300]: 301, tokens[301]: 300})
    text = tmp_path / "text.txt"
    text.write_text("".join(Path(m).read_text() for m in stdlib_modules()[:3]))
    prepare([str(text)], str(tmp_path / "data"), str(directory), num_workers=1, progress=False)
    if kept == "manifest":
        shutil.rmtree(directory)
    message = f"data.bin was made with another tokenizer ({directory}) than"
    for field in ("data.train", "data.valid"):
        error = refused(one, inputs, tmp_path / "out", {field: [str(tmp_path / "data")]})
        assert field in error and f"{message} data.tokenizer = {inputs}/tokenizer" in error
        assert f"such as 300: {tokens[301]!r} and {tokens[300]!r}" in error
    student = shutil.copytree(inputs / "student", tmp_path / "student")
    shutil.copytree(inputs / "tokenizer", student, dirs_exist_ok=True)
    with pytest.raises(ValueError, match=re.escape(f"{message} student.checkpoint = {student}")):
        one.run(evaluated, inputs, 32, student, tmp_path / "data")
    beside_none = {"data.tokenizer": None, "data.valid": [str(tmp_path / "data")]}
    assert f"{message} the other token files" in refused(one, inputs, tmp_path / "out", beside_none)


def test_harmless_differences_between_tokenizers_pass(inputs, one, tmp_path):
    """Another path, a chat template, and added tokens that do not occur."""
    student = shutil.copytree(inputs / "student", tmp_path / "student")
    for name in (student, tmp_path / "elsewhere"):
        shutil.copytree(inputs / "tokenizer", name, dirs_exist_ok=True)
        (name / "chat_template.jinja").write_text("{{ messages }}")
        tokenizer = json.loads((name / "tokenizer.json").read_text())
        tokenizer["added_tokens"].append({**tokenizer["added_tokens"][0], "id": 507, "content": "<|added|>"})
        (name / "tokenizer.json").write_text(json.dumps(tokenizer))
    config = tiny_run(inputs, tmp_path / "out", steps=4)
    config.student.checkpoint, config.student.vocab_size = str(student), 508
    config.data.tokenizer = str(tmp_path / "elsewhere")
    one.run(checked_data, config)


@pytest.mark.parametrize("split", ["tensor_model_parallel_size", "context_parallel_size", None])
@pytest.mark.parametrize("field", ["data.train", "data.valid"])
def test_ids_that_the_model_lacks_are_refused_on_every_rank(inputs, two, tmp_path, split, field):
    """Without our manifest they are found as they are read, before they reach the model."""
    changes = {field: [write_documents(tmp_path / "foreign", [[3, 507] * 2000])], "training.eval_interval": 1}
    changes |= {f"parallelism.{split}": 2} if split else {}
    with pytest.raises(ValueError, match=r"foreign.bin: token \d+ of document 0 .* is the id 507, .* the ids 0 to 506"):
        two.run(run, inputs, tmp_path / "out", changes, 2)
    assert not list((tmp_path / "out").rglob("step_*"))


def test_an_evaluation_of_ids_that_the_model_lacks(inputs, one, tmp_path):
    data = write_documents(tmp_path / "foreign", [[3, 507] * 2000])
    with pytest.raises(ValueError, match=r"foreign.bin: token \d+ of document 0 .* is the id 507, .* the ids 0 to 506"):
        one.run(evaluated, inputs, 32, inputs / "student", data)


def test_a_vocabulary_that_cuts_tokens_of_the_student_off(inputs, one, tmp_path):
    student = shutil.copytree(inputs / "student", tmp_path / "student")
    shutil.copytree(inputs / "tokenizer", student, dirs_exist_ok=True)
    config = tiny_run(inputs, tmp_path / "out", steps=4)
    config.student.checkpoint, config.student.vocab_size, config.data.tokenizer = str(student), 500, None
    for suffix in (".bin", ".idx"):  # made elsewhere, without our manifest
        shutil.copy(f"{inputs}/train{suffix}", f"{tmp_path}/foreign{suffix}")
    config.data.train = config.data.valid = [f"{tmp_path}/foreign"]
    with pytest.raises(
        ValueError, match=re.escape(f"student.vocab_size = 500 cuts off tokens: {student} has a tokenizer of 507 ids")
    ):
        one.run(checked_data, config)


def tokenizer_vocab(directory):
    return json.loads(Path(directory, "tokenizer.json").read_text())["model"]["vocab"]


def rename(directory, ids):
    """Give some tokens other ids."""
    tokenizer = json.loads(Path(directory, "tokenizer.json").read_text())
    tokenizer["model"]["vocab"] |= ids
    Path(directory, "tokenizer.json").write_text(json.dumps(tokenizer))


def checked_data(config):
    from distill_nemo.models.resolve import resolve
    from distill_nemo.training.data import check_run_data

    student = resolve(dataclasses.replace(config.student, vocab_size=None))
    rows = config.student.vocab_size or student.vocab_size
    check_run_data(config, dataclasses.replace(student, vocab_size=rows))


def warnings_of(config):
    with contextlib.redirect_stderr(io.StringIO()) as printed:
        checked_data(config)
    return printed.getvalue()


def test_held_out_data_that_is_trained_on_is_told(inputs, one, tmp_path):
    config = tiny_run(inputs, tmp_path / "out", steps=4)
    assert one.run(warnings_of, config) == [""]
    config.data.valid = [f"{inputs}/valid", f"{inputs}/../{inputs.name}/train"]
    expected = (
        f"warning: data.valid: {config.data.valid[1]} is a part of data.train, too: its losses are not held out\n"
    )
    assert one.run(warnings_of, config) == [expected]


def test_damaged_token_files_are_refused(inputs, one, tmp_path):
    for suffix in (".bin", ".idx"):
        shutil.copy(f"{inputs}/train{suffix}", f"{tmp_path}/data{suffix}")
    changes = {"data.train": [f"{tmp_path}/data"]}
    size = os.path.getsize(f"{tmp_path}/data.bin")
    os.truncate(f"{tmp_path}/data.bin", size - 2)
    error = refused(one, inputs, tmp_path / "out", changes)
    assert f"data.bin is truncated: {size - 2} bytes instead of {size}" in error and "nemo distill prepare" in error
    os.truncate(f"{tmp_path}/data.bin", 0)
    assert "data.bin is empty (0 bytes)" in refused(one, inputs, tmp_path / "out", changes)
    shutil.copy(f"{inputs}/train.bin", f"{tmp_path}/data.bin")
    os.truncate(f"{tmp_path}/data.idx", os.path.getsize(f"{tmp_path}/data.idx") - 8)
    assert "data.idx is truncated" in refused(one, inputs, tmp_path / "out", changes)


ODD_SIZES = {"num_layers": 1, "hidden_size": 64, "ffn_hidden_size": 96, "num_attention_heads": 3, "kv_channels": 16}
ODD_SIZES |= {"num_query_groups": 3, "vocab_size": 507, "checkpoint": None}


@pytest.mark.parametrize(
    ("files_of_student", "changes", "message"),
    [
        ({"tokenizer.json": "{"}, {}, "is not a Hugging Face tokenizer directory that can be loaded"),
        ({"tokenizer_config.json": '{"eos_token": ["a"]}'}, {}, "eos_token must be one token"),
        ({"tokenizer_config.json": '{"pad_token": ["a"]}'}, {}, "transformers cannot open the tokenizer in"),
        (
            {"tokenizer_config.json": '{"eos_token": "<|no|>"}'},
            {},
            'eos_token = "<|no|>" is not a token of its vocabulary',
        ),
        (
            {"tokenizer_config.json": '{"auto_map": {"AutoTokenizer": ["t.X", null]}, "tokenizer_class": "X"}'},
            {},
            "needs the code that its auto_map names",
        ),
        ({"tokenizer.json": None, "tokenizer.model": "\0\0"}, {}, "is neither a sentencepiece nor a tiktoken model"),
        ({"generation_config.json": "{"}, {}, "generation_config.json cannot be read: "),
        pytest.param(
            {},
            {f"student.{name}": value for name, value in ODD_SIZES.items()},
            "transformers refuses its config.json",
            marks=pytest.mark.skipif(transformers.__version__ < "5", reason="transformers 4 has a class for them"),
        ),
    ],
)
def test_a_student_that_could_not_be_exported_is_not_trained(inputs, one, tmp_path, files_of_student, changes, message):
    student = shutil.copytree(inputs / "student", tmp_path / "student")
    shutil.copytree(inputs / "tokenizer", student, dirs_exist_ok=True)
    for name, content in files_of_student.items():
        (student / name).unlink(missing_ok=True) if content is None else (student / name).write_text(content)
    settings = {"student.checkpoint": str(student), "data.tokenizer": None, "checkpoint.export": True}
    error = refused(one, inputs, tmp_path / "out", settings | changes)
    assert message in error and (str(student) in error or changes)
    assert error.endswith("or train with checkpoint.export=false, and keep the Megatron checkpoint")


def test_a_directory_in_the_place_of_the_export_is_refused_before_training(inputs, one, tmp_path):
    (tmp_path / "out" / "student").mkdir(parents=True)
    (tmp_path / "out" / "student" / "thesis.txt").write_text("years of work")
    error = refused(one, inputs, tmp_path / "out", {"checkpoint.export": True})
    assert f"{tmp_path}/out/student exists and is not a distill-nemo export" in error


def test_a_teacher_in_the_place_of_the_export_is_refused_before_it_is_lost(inputs, one, tmp_path):
    shutil.copytree(inputs / "teacher", tmp_path / "out" / "student")
    changes = {"checkpoint.export": True, "teacher.checkpoint": str(tmp_path / "out" / "student")}
    error = refused(one, inputs, tmp_path / "out", changes)
    assert f"{tmp_path}/out/student would be replaced, and {tmp_path}/out/student is read from it" in error


def test_an_output_directory_that_holds_other_checkpoints(inputs, one, tmp_path):
    hugging_face, megatron, plain = tmp_path / "hf", tmp_path / "megatron", tmp_path / "plain"
    shutil.copytree(inputs / "student", hugging_face)
    (megatron / "checkpoints" / "iter_0000100").mkdir(parents=True)
    (tmp_path / "file").write_text("text")
    assert f"holds a checkpoint that no run of distill-nemo wrote there: {hugging_face}" in refused(
        one, inputs, hugging_face
    )
    assert "iter_0000100; choose another output_dir" in refused(one, inputs, megatron)
    assert "is a file; choose another output_dir" in refused(one, inputs, tmp_path / "file")
    plain.mkdir()
    for name in ("checkpoints", "index_cache", "tensorboard"):
        (plain / name).touch()
        assert f"{plain / name} is a file; choose another output_dir" in refused(one, inputs, plain)
        (plain / name).unlink()
    for name in ("checkpoints/step_00000004", "checkpoints/step_00000004.partial"):
        (plain / name).parent.mkdir(exist_ok=True)
        (plain / name).symlink_to(tmp_path / "file")
        assert f"{plain / name} is a file and has the name of a checkpoint" in refused(one, inputs, plain)
        (plain / name).unlink()
        (plain / name).touch()
        assert f"{plain / name} is a file and has the name of a checkpoint" in refused(one, inputs, plain)
        (plain / name).unlink()
    written = ("config.yaml", "metrics.jsonl", "hashes.json", "run.lock", "calibration.json", "benchmarks.jsonl")
    for name in written:
        (plain / name).mkdir()
        assert f"{plain / name} is not a file; choose another output_dir" in refused(one, inputs, plain)
        (plain / name).rmdir()
    (plain / "notes.txt").write_text("other files do not matter")
    one.run(run, inputs, plain)
    assert metrics(plain)[-1]["step"] == 4


@pytest.fixture(scope="module")
def base(inputs, one, tmp_path_factory):
    """Return a finished run of four steps, not to be changed. Tests may move its teacher and token files."""
    root = tmp_path_factory.mktemp("base")
    shutil.copytree(inputs / "teacher", root / "teacher")
    for suffix in (".bin", ".idx", ".json"):
        shutil.copy(f"{inputs}/train{suffix}", f"{root}/train{suffix}")
    one.run(run, inputs, root / "out", own(root))
    return root


def own(root):
    return {"teacher.checkpoint": str(root / "teacher"), "data.train": [str(root / "train")]}


def test_resuming_with_other_settings_is_refused(inputs, one, base, tmp_path):
    write_hf(tmp_path / "teacher", seed=3)
    write_hf(tmp_path / "student", seed=2, layers=4, width=32)
    same = own(base)
    for changes, message in (
        (
            {"teacher.checkpoint": str(tmp_path / "teacher")},
            f"teacher.checkpoint: was '{base}/teacher', is '{tmp_path}",
        ),
        ({"student.checkpoint": str(tmp_path / "student")}, "student.num_layers: was 2, is 4"),
        ({"data.train": [str(inputs / "valid")]}, f"data.train: was ['{base}/train'], is ['{inputs}/valid']"),
        ({"data.valid": []}, "data.valid: was"),
        ({"data.sequence_length": 64}, "data.sequence_length: was 32, is 64"),
        ({"training.seed": 5}, "training.seed: was 1234, is 5"),
        ({"checkpoint.resume": False}, "checkpoint.resume is off: choose another output_dir"),
    ):
        error = refused(one, inputs, base / "out", same | changes)
        assert message in error and "another output_dir" in error


def test_resuming_knows_teacher_and_data_by_their_contents(inputs, one, base, tmp_path):
    """Replaced under the same path, they are refused. Moved elsewhere, they are recognised."""
    from distill_nemo.data.tokenizer import load_tokenizer

    root = tmp_path / "moved"
    shutil.copytree(base, root)
    one.run(run, inputs, root / "out", own(root) | {"training.steps": 5, "optimizer.decay_steps": 4})
    assert metrics(root / "out")[-1]["step"] == 5
    copied = shutil.copytree(inputs / "tokenizer", root / "tokenizer")
    (copied / "chat_template.jinja").write_text("{{ messages }}")
    settings = {"training.steps": 6, "optimizer.decay_steps": 4, "data.tokenizer": str(copied)}
    one.run(run, inputs, root / "out", own(root) | settings)
    tokens = {i: token for token, i in tokenizer_vocab(copied).items()}
    rename(copied, {tokens[300]: 301, tokens[301]: 300})
    hashes = {load_tokenizer(str(path)).vocabulary_sha256 for path in (copied, inputs / "tokenizer")}
    assert len(hashes) == 2
    shutil.rmtree(root / "teacher")
    write_hf(root / "teacher", seed=3)  # the same architecture, other weights
    error = refused(one, inputs, root / "out", own(root))
    assert "teacher.checkpoint:" in error and "holds other contents than when the run began" in error
    shutil.rmtree(root / "teacher")
    shutil.copytree(base / "teacher", root / "teacher")
    with open(root / "train.bin", "r+b") as tokens:
        tokens.write(bytes(64))
    assert "data.train:" in (error := refused(one, inputs, root / "out", own(root)))
    assert "holds other contents" in error
