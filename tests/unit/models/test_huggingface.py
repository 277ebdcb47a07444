"""Import from and export to Hugging Face: identical tensors, equal logits, and every refusal."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from distill_nemo.config import ExportConfig, ParallelismConfig, StudentConfig
from distill_nemo.runtime.device import setup_device
from distill_nemo.runtime.process_groups import process_groups
from tests.distillation_reference import with_recurrence
from tests.spawn import Gloo
from tests.tiny_models import FAMILIES, megatron_tensors, nemo_config, refuses, write_hf, write_nemo


def logits_of(path, tensor=1, pipeline=1, expert=1):
    """Return Megatron's logits of a fixed batch at a layout, from the last pipeline stage."""
    setup_device()
    par = ParallelismConfig(
        tensor_model_parallel_size=tensor,
        pipeline_model_parallel_size=pipeline,
        expert_model_parallel_size=expert,
    )
    with process_groups(par):
        return _logits(path, par)


def _logits(path, par):
    from megatron.core import parallel_state as ps
    from megatron.core.pipeline_parallel import get_forward_backward_func

    from distill_nemo.models.provider import model_provider
    from distill_nemo.runtime.seed import seed_everything

    seed_everything(3)
    first, last = ps.is_pipeline_first_stage(), ps.is_pipeline_last_stage()
    model = model_provider(first, last, False, student=StudentConfig(checkpoint=path), parallelism=par).eval()
    tokens = torch.randint(507, (2, 16), generator=torch.Generator().manual_seed(0))

    def step(_, stage):
        output = stage(tokens, torch.arange(16).expand(2, -1), None)
        return output, lambda x: (x.sum(), torch.tensor(1), {"logits": x})

    run = get_forward_backward_func()
    with torch.no_grad():
        out = run(
            forward_step_func=step, data_iterator=None, model=[model], num_microbatches=1, seq_length=16,
            micro_batch_size=2, forward_only=True,
        )  # fmt: skip
    return out[0]["logits"][..., :507].numpy() if last else None


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("hf")
    return {family: write_hf(root / family, family) for family in FAMILIES}


def transformers_logits(path):
    from transformers import AutoModelForCausalLM

    tokens = torch.randint(507, (2, 16), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager")
        return with_recurrence(model)(tokens, use_cache=False).logits


@pytest.fixture(scope="module")
def two():
    with Gloo(2, init=False) as group:
        yield group


@pytest.mark.parametrize(
    ("family", "layout"),
    [
        pytest.param(family, layout, id=f"{family}-{name}")
        for family in FAMILIES
        for name, layout in {"alone": (1, 1), "TP=2": (2, 1), "PP=2": (1, 2)}.items()
        if not refuses(family, name)
    ],
)
def test_logits_after_import_equal_transformers(models, two, family, layout):
    if layout == (1, 1):
        ours = logits_of(models[family])
    else:
        ours = next(x for x in two.run(logits_of, models[family], *layout) if x is not None)
    theirs = transformers_logits(models[family])
    assert (torch.as_tensor(ours) - theirs).abs().max() <= 1e-5 * theirs.abs().max()


@pytest.mark.parametrize("family", FAMILIES)
def test_round_trip_gives_identical_tensors(models, tmp_path, family):
    setup_device()
    with process_groups(ParallelismConfig()):
        from distill_nemo.models.checkpoints.huggingface import check_export, export_hf
        from distill_nemo.models.provider import model_provider
        from distill_nemo.models.resolve import resolve
        from distill_nemo.runtime.seed import seed_everything

        seed_everything(0)
        student = resolve(StudentConfig(checkpoint=models[family]))
        model = model_provider(student=student, parallelism=ParallelismConfig())
        export_hf([model], str(tmp_path / "out"), student)
        check_export([model], student, tmp_path / "out")
        again = resolve(StudentConfig(checkpoint=str(tmp_path / "out")))
        assert again == student
        next(model.parameters()).data.add_(1.0)
        with pytest.raises(RuntimeError, match="logits differ"):
            check_export([model], student, tmp_path / "out")
    before, after = load_file(f"{models[family]}/model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def _edit(path, change):
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors", {"format": "pt"})


def _truncate(path):
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:999])


def _shard(path, index):
    (path / "model.safetensors").rename(path / "model-00001-of-00001.safetensors")
    if index:
        (path / "model.safetensors.index.json").write_text(json.dumps(index))


def _header(path, change):
    """Let `change` edit the header of model.safetensors. The bytes after it stay."""
    file = path / "model.safetensors"
    data = file.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    change(header)
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data[end:])


def _config(path, **change):
    config = json.loads((path / "config.json").read_text()) | change
    (path / "config.json").write_text(json.dumps(config))


def _two_files(path, places):
    """Write two files, the norm in both, and an index that puts it in `places`."""
    tensors = load_file(path / "model.safetensors")
    (path / "model.safetensors").unlink()
    save_file(tensors, path / "a.safetensors")
    save_file({NORM: tensors[NORM]}, path / "b.safetensors")
    weight_map = {name: "a.safetensors" for name in tensors}
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map | places}))


NORM, GONE = "model.norm.weight", "gone.safetensors"
INDEX = "model.safetensors.index.json"
QUERY = "model.layers.0.self_attn.q_proj.weight"
BROKEN = {
    f"missing: {NORM}": lambda path: _edit(path, lambda t: t.pop(NORM)),
    "extra: surplus": lambda path: _edit(path, lambda t: t.update(surplus=torch.ones(2))),
    f"{NORM} has shape (3,), needs (64,)": lambda path: _edit(path, lambda t: t.update({NORM: torch.ones(3)})),
    f"{NORM} has shape (), needs (64,)": lambda path: _edit(path, lambda t: t.update({NORM: torch.ones(())})),
    "corrupt or truncated": _truncate,
    "model.safetensors is corrupt or truncated: Error while deserializing header": lambda path: (
        path / "model.safetensors"
    ).write_bytes(b"\xff" * 64),
    "neither model.safetensors nor model.safetensors.index.json": lambda path: _shard(path, None),
    "names files that are not there: gone.safetensors": lambda path: _shard(path, {"weight_map": {NORM: GONE}}),
    "weight_map must say in which file each tensor is, got ['x']": lambda path: _shard(path, {"weight_map": ["x"]}),
    "weight_map must say in which file each tensor is, got None": lambda path: _shard(path, {"other": {}}),
    f"{INDEX} must hold a JSON object, got [1]": lambda path: _shard(path, [1]),
    "must name *.safetensors files beside it, got ['../a.safetensors']": lambda path: _shard(
        path, {"weight_map": {NORM: "../a.safetensors"}}
    ),
    "must name *.safetensors files beside it, got ['7']": lambda path: _shard(path, {"weight_map": {NORM: 7}}),
    f"{NORM} is stored twice": lambda path: _two_files(path, {QUERY: "b.safetensors"}),
    "no *.safetensors": lambda path: (path / "model.safetensors").rename(path / "pytorch_model.bin"),
    f"weights must be BF16, F16, F32, F64; {QUERY} is F8_E4M3": lambda path: _edit(
        path, lambda t: t.update({QUERY: t[QUERY].to(torch.float8_e4m3fn)})
    ),
    f"weights must be BF16, F16, F32, F64; {QUERY} is I8": lambda path: _edit(
        path, lambda t: t.update({QUERY: t[QUERY].to(torch.int8)})
    ),
    f"{NORM} is BOOL": lambda path: _edit(path, lambda t: t.update({NORM: torch.ones(64, dtype=torch.bool)})),
    "is corrupt or truncated": lambda path: _header(path, lambda h: h[NORM].update(shape=[10**18])),
    "corrupt or truncated: Error": lambda path: _header(path, lambda h: h[NORM].update(dtype="X")),
    "num_hidden_layers = 5, the safetensors hold 4 layers": lambda path: _config(path, num_hidden_layers=5),
    "num_hidden_layers = 9000, the safetensors hold 4 layers": lambda path: _config(path, num_hidden_layers=9000),
    "num_hidden_layers must be at most 10,000, got 1000000000": lambda path: _config(path, num_hidden_layers=10**9),
    "hidden_size must be at most 16,777,216, got 1000000000": lambda path: _config(path, hidden_size=10**9),
    "num_attention_heads must be at most 4,096, got 16000000": lambda path: _config(
        path, num_attention_heads=16 * 10**6, num_key_value_heads=16 * 10**6, head_dim=2
    ),
    "model.layers.0.input_layernorm.weight has shape (64,), needs (16000000,)": lambda path: _config(
        path, hidden_size=16 * 10**6, head_dim=16
    ),
    "model.embed_tokens.weight has shape (507, 64), needs (16777216, 64)": lambda path: _config(path, vocab_size=2**24),
    "has shape (64, 64), needs (96, 64)": lambda path: _config(path, num_attention_heads=6, head_dim=16),
}


@pytest.mark.parametrize("message", BROKEN)
def test_a_broken_directory_is_refused_by_name(tmp_path, message):
    from distill_nemo.models.checkpoints.hf_tensors import check_hf_tensors
    from distill_nemo.models.resolve import resolve

    path = tmp_path / "m"
    write_hf(path)
    BROKEN[message](path)
    with pytest.raises(ValueError) as raised:
        check_hf_tensors(path, resolve(StudentConfig(checkpoint=str(path))))
    assert message in str(raised.value) and str(path) in str(raised.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "llamma"}, "Did you mean llama"),
        ({"mlp_bias": True}, "mlp_bias is not supported"),
        ({"hidden_act": "gelu"}, "hidden_act gelu is not supported"),
        ({"rope_scaling": {"rope_type": "ntk"}}, '"ntk" is not supported'),
    ],
)
def test_an_unsupported_config_is_refused_by_name(tmp_path, change, message):
    from distill_nemo.models.resolve import resolve

    path = tmp_path / "m"
    write_hf(path)
    config = json.loads((path / "config.json").read_text()) | change
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError) as raised:
        resolve(StudentConfig(checkpoint=str(path)))
    assert message in str(raised.value)


def test_buffers_of_old_llamas_and_surplus_files_beside_an_index_do_not_matter(tmp_path):
    from distill_nemo.models.checkpoints.hf_tensors import check_hf_tensors
    from distill_nemo.models.resolve import resolve

    path = tmp_path / "m"
    write_hf(path)
    _edit(path, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}))
    names = load_file(path / "model.safetensors").keys()
    index = {"weight_map": {name: "model-1.safetensors" for name in names}}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    (path / "model.safetensors").rename(path / "model-1.safetensors")
    save_file({"stale": torch.ones(1)}, path / "stale.safetensors")
    check_hf_tensors(path, resolve(StudentConfig(checkpoint=str(path))))
    (path / "model-1.safetensors").rename(path / "model.safetensors")  # transformers and ModelOpt then read it, too
    check_hf_tensors(path, resolve(StudentConfig(checkpoint=str(path))))


def test_export_replaces_nothing_but_an_earlier_export_and_leaves_nothing_half_written(tmp_path):
    setup_device()
    with process_groups(ParallelismConfig()):
        from distill_nemo.data.stdlib_corpus import stdlib_modules, train_tokenizer
        from distill_nemo.models.checkpoints.huggingface import export_hf
        from distill_nemo.models.provider import model_provider
        from distill_nemo.models.resolve import resolve
        from distill_nemo.runtime.seed import seed_everything

        seed_everything(0)
        student = resolve(StudentConfig(checkpoint=write_hf(tmp_path / "m", layers=1)))
        model = model_provider(student=student, parallelism=ParallelismConfig())
        assert model.training
        train_tokenizer(stdlib_modules()[:3], tmp_path / "tokenizer", 300)
        foreign, out = tmp_path / "foreign", tmp_path / "out"
        foreign.mkdir()
        (foreign / "thesis.txt").write_text("years of work")
        for path in (foreign, tmp_path / "m"):
            before = sorted(p.name for p in path.iterdir())
            with pytest.raises(ValueError, match="not a distill-nemo export"):
                export_hf([model], str(path), student)
            assert sorted(p.name for p in path.iterdir()) == before
        with pytest.raises(ValueError, match="holds no tokenizer files"):
            export_hf([model], str(out), student, str(foreign))
        assert not out.exists()
        export_hf([model], str(out), student)
        export_hf([model], str(out), student, str(tmp_path / "tokenizer"), card=lambda: "# One\n")
        export_hf([model], str(out), student, str(tmp_path / "tokenizer"), card=lambda: "# Another\n")
        assert (out / "README.md").read_text().startswith("# Another\n<!-- distill-nemo wrote the text above")
        assert model.training, "export leaves the model as it was"
        first = (out / "model.safetensors").read_bytes()
        next(model.parameters()).data.fill_(float("nan"))
        with pytest.raises(ValueError, match="its logits are NaN or infinite, in transformers too"):
            export_hf([model], str(out), student)
        assert (out / "model.safetensors").read_bytes() == first
    assert not (tmp_path / ".out.partial").exists()
    from transformers import AutoConfig, AutoTokenizer

    config, tokenizer = AutoConfig.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    assert (config.bos_token_id, config.eos_token_id) == (tokenizer.bos_token_id, tokenizer.eos_token_id)


def test_a_right_export_in_bf16_is_not_refused(tmp_path):
    """Rounding routes tokens to other experts, which changes single logits by several hundredths of the largest."""
    setup_device()
    with process_groups(ParallelismConfig()):
        from distill_nemo.models.checkpoints.huggingface import check_export, export_hf
        from distill_nemo.models.provider import model_provider
        from distill_nemo.models.resolve import resolve
        from distill_nemo.runtime.seed import seed_everything

        seed_everything(0)
        student = resolve(StudentConfig(checkpoint=write_hf(tmp_path / "m", "qwen3_moe", layers=12)))
        model: Any = model_provider(student=student, parallelism=ParallelismConfig(), dtype=torch.bfloat16)
        export_hf([model], str(tmp_path / "out"), student)
        weight = model.decoder.layers[0].self_attention.linear_qkv.weight
        weight.data = weight.data.roll(1, 0)
        with pytest.raises(RuntimeError, match="logits differ"):
            check_export([model], student, tmp_path / "out")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_an_export_has_the_dtype_of_what_was_saved(one, tmp_path, dtype):
    """The exporting machine does not decide it: runs on GPUs are often exported on machines without one."""
    one.run(_exported_from_nemo, tmp_path, dtype)
    assert {x.dtype for x in load_file(tmp_path / "out" / "model.safetensors").values()} == {dtype}


def test_without_a_tokenizer_of_the_run_an_export_has_the_students(one, tmp_path):
    """It also has the tokens at which a generation ends; the output is a symbolic link."""
    from transformers import AutoTokenizer, GenerationConfig

    ends = one.run(_exported_with_the_students_tokenizer, tmp_path)[0]
    student = tmp_path / "target"
    assert (tmp_path / "link").is_symlink() and len(AutoTokenizer.from_pretrained(student)) == 300
    assert GenerationConfig.from_pretrained(student).eos_token_id == ends


def _exported_with_the_students_tokenizer(root):
    from distill_nemo.checkpoint import export
    from distill_nemo.data.stdlib_corpus import stdlib_modules, train_tokenizer
    from distill_nemo.models.checkpoints.huggingface import export_hf
    from distill_nemo.models.provider import model_provider
    from distill_nemo.models.resolve import resolve
    from distill_nemo.runtime.seed import seed_everything

    setup_device()
    hf, ends = write_hf(root / "hf", layers=1), [0, 5]
    train_tokenizer(stdlib_modules()[:3], root / "tokenizer", 300)
    shutil.copytree(root / "tokenizer", hf, dirs_exist_ok=True)
    (Path(hf) / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    (root / "target").mkdir()
    (root / "link").symlink_to(root / "target")
    with process_groups(ParallelismConfig()):
        seed_everything(0)
        student = resolve(StudentConfig(checkpoint=hf))
        model = model_provider(student=student, parallelism=ParallelismConfig())
        for named in (None, str(root / "gone")):
            assert export._tokenizer_of_run({"data": {"tokenizer": named}}) is None
        export_hf([model], str(root / "link"), student, source=export._source(hf))
    return ends


def _exported_from_nemo(root, dtype):
    from distill_nemo.checkpoint.export import export

    setup_device()
    hf = write_hf(root / "hf", layers=1)
    with process_groups(ParallelismConfig()):
        tensors = {name: x.to(dtype) for name, x in megatron_tensors(hf).items()}
        nemo = write_nemo(root / "nemo", tensors, nemo_config(hf, "llama"))
    export(ExportConfig(nemo, str(root / "out")))


def test_an_output_layer_of_its_own_beside_tied_embeddings_is_refused(tmp_path):
    """Transformers would not tie them, so the model would be different."""
    from distill_nemo.models.checkpoints.hf_tensors import check_tied_weights
    from distill_nemo.models.resolve import resolve

    def check(path):
        model = resolve(StudentConfig(checkpoint=str(path)))
        check_tied_weights(model.source.tensors, model)

    path = Path(write_hf(tmp_path / "m", "llama_tied"))
    tensors = load_file(path / "model.safetensors")
    embedding = tensors["model.embed_tokens.weight"]
    for head in (embedding.clone(), embedding + 1):
        save_file(tensors | {"lm_head.weight": head}, path / "model.safetensors", {"format": "pt"})
        if torch.equal(head, embedding):
            check(path)
    with pytest.raises(ValueError, match=r"lm_head.weight and model.embed_tokens.weight differ"):
        check(path)
    save_file(tensors | {"lm_head.weight": embedding[:9].clone()}, path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"lm_head.weight and model.embed_tokens.weight differ"):
        check(path)


def test_what_deepspeed_leaves_beside_a_model_is_no_tracker(tmp_path):
    from distill_nemo.models.resolve import resolve

    write_hf(tmp_path / "m")
    (tmp_path / "m" / "latest").write_text("global_step500")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    (tmp_path / "m" / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": None}))
    assert resolve(resolve(StudentConfig(checkpoint=str(tmp_path / "m")))).num_layers == 4


def test_missing_corrupt_and_contradicting_are_refused(tmp_path):
    from distill_nemo.models.resolve import resolve

    with pytest.raises(ValueError, match="not found"):
        resolve(StudentConfig(checkpoint=str(tmp_path / "none")))
    with pytest.raises(ValueError, match="not a checkpoint that can be read"):
        resolve(StudentConfig(checkpoint=str(tmp_path)))
    with pytest.raises(ValueError, match="the model needs num_layers"):
        resolve(StudentConfig())
    write_hf(tmp_path / "m")
    with pytest.raises(ValueError, match=r"num_layers = 7 contradicts"):
        resolve(StudentConfig(checkpoint=str(tmp_path / "m"), num_layers=7))
    (tmp_path / "m" / "config.json").write_text("{")
    with pytest.raises(ValueError, match="cannot be read"):
        resolve(StudentConfig(checkpoint=str(tmp_path / "m")))
