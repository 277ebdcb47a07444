"""Tokenizers of a directory: ids of its tokenizer.json, special tokens of its vocabulary, and clear refusals."""

import ast
import json
import random
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers
from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES

import distill_nemo
from distill_nemo.data import tokenizer as module
from distill_nemo.data.prepare import prepare
from distill_nemo.data.stdlib_corpus import stdlib_modules, train_tokenizer
from distill_nemo.data.tokenizer import encoder, facts_of, load_tokenizer, save_fast

TEXT = "def add(a, b):\n    return a + 1234  # The sum of  both, isn't it\u00e9 \ufb01\n"
EOS = "<|endoftext|>"
CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|"
LLAMA_3 = CONTRACTIONS + r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> str:
    directory = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(stdlib_modules()[:3], directory, 400)
    return (directory / "tokenizer.json").read_text()


def gpt2(trained: str) -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_str(trained)


def llama3(trained: str) -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer.from_str(trained)
    split = pre_tokenizers.Split(Regex(LLAMA_3), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    return tokenizer


def digits(trained: str) -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer.from_str(trained)
    single = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([single, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.normalizer = normalizers.NFKC()
    return tokenizer


def llama2(trained: str) -> tokenizers.Tokenizer:
    """Return a tokenizer of sentencepiece's kind: no pre-tokenizer, spaces as U+2581, unknown characters as bytes."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581", *"adefhnorstu+(),:", "de"]
    ids = {piece: i for i, piece in enumerate(pieces)}
    tokenizer = tokenizers.Tokenizer(models.BPE(ids, [("d", "e")], unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    return tokenizer


def directory_of(path: Path, tokenizer: tokenizers.Tokenizer | str, **config) -> str:
    """Write `tokenizer.json` and, with options, `tokenizer_config.json`; return the directory."""
    path.mkdir(parents=True, exist_ok=True)
    text = tokenizer if isinstance(tokenizer, str) else tokenizer.to_str()
    (path / "tokenizer.json").write_text(text)
    if config:
        (path / "tokenizer_config.json").write_text(json.dumps(config))
    return str(path)


@pytest.mark.parametrize("make", [gpt2, llama3, digits, llama2])
def test_ids_are_those_of_tokenizer_json_whatever_class_the_config_names(tmp_path, trained, make):
    """Transformers 5 would let the class replace the pre-tokenizer; LlamaTokenizer loses a byte-level one's spaces."""
    expected = make(trained).encode(TEXT, add_special_tokens=False).ids
    classes = TOKENIZER_MAPPING_NAMES.values()  # of transformers 4: pairs of a slow and a fast one
    names = {name for named in classes for name in (named if isinstance(named, tuple) else [named]) if name}
    names |= {f"{name.removesuffix('Fast')}Fast" for name in names} | {"AbsentClass"}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    assert {"LlamaTokenizerFast", "Qwen2Tokenizer"} <= names
    for name in sorted(names):
        tokenizer = load_tokenizer(directory_of(tmp_path, make(trained), tokenizer_class=name))
        assert [ids.tolist() for ids in tokenizer.encode([TEXT])] == [expected], name


def test_prepare_writes_the_ids_of_tokenizer_json(tmp_path, trained):
    import numpy as np

    (tmp_path / "in.txt").write_text(TEXT)
    path = directory_of(tmp_path / "t", trained, tokenizer_class="LlamaTokenizerFast", eos_token=EOS)
    prepare([str(tmp_path / "in.txt")], str(tmp_path / "out"), path, num_workers=1, progress=False)
    written = np.fromfile(tmp_path / "out.bin", np.uint16).tolist()
    assert written == [*gpt2(trained).encode(TEXT).ids, 0]
    assert json.loads((tmp_path / "out.json").read_text())["vocab_size"] == 400


def test_merges_are_not_left_out_at_random(tmp_path, trained):
    """A tokenizer that was trained with dropout may have been saved with it."""
    content = json.loads(trained)
    content["model"]["dropout"] = 0.5
    tokenizer = load_tokenizer(directory_of(tmp_path, json.dumps(content)))
    save_fast(tokenizer, tmp_path / "fast.json")
    expected = gpt2(trained).encode(TEXT).ids
    for encode in (tokenizer.encode, encoder(str(tmp_path / "fast.json"), str(tmp_path))):
        assert [ids.tolist() for ids in encode([TEXT] * 5)] == [expected] * 5


def test_a_tokenizer_that_changes_between_two_calls_is_opened_again(tmp_path, trained):
    (tmp_path / "a.txt").write_text(TEXT)
    for source in (gpt2(trained), digits(trained)):
        path = directory_of(tmp_path / "tokenizer", source)
        prepare([str(tmp_path / "a.txt")], str(tmp_path / "out"), path, append_eod=False, num_workers=1)
        assert np.fromfile(tmp_path / "out.bin", np.uint16).tolist() == source.encode(TEXT).ids


ADDED_TOKEN = {"__type": "AddedToken", "content": EOS, "lstrip": False, "rstrip": False, "normalized": False}


@pytest.mark.parametrize(
    ("config", "legacy", "message"),
    [
        ({}, None, None),
        ({"eos_token": EOS}, None, None),
        ({"eos_token": None}, None, None),
        ({"eos_token": ADDED_TOKEN}, None, None),
        ({}, {"eos_token": EOS}, None),
        ({}, {"eos_token": ADDED_TOKEN}, None),
        ({"eos_token": "<|no|>"}, {"eos_token": EOS}, None),  # in transformers the older file takes precedence
        ({"eos_token": EOS, "added_tokens_decoder": {}}, {"eos_token": "<|no|>"}, None),
        ({"eos_token": "<|no|>"}, None, 'eos_token = "<|no|>" is not a token of its vocabulary'),
        ({"eos_token": ADDED_TOKEN | {"content": "<|no|>"}}, None, 'eos_token = "<|no|>" is not a token'),
        ({}, {"eos_token": "<|no|>"}, 'eos_token = "<|no|>" is not a token'),
        ({}, {"eos_token": {"content": "<|no|>"}}, 'eos_token = "<|no|>" is not a token'),
        ({"eos_token": [EOS]}, None, f"eos_token must be one token, got ['{EOS}']"),
        ({"eos_token": 0}, None, "eos_token must be one token, got 0"),
    ],
)
def test_an_end_of_document_is_a_token_of_the_vocabulary(tmp_path, trained, config, legacy, message):
    path = directory_of(tmp_path, trained, **config)
    if legacy is not None:
        (tmp_path / "special_tokens_map.json").write_text(json.dumps(legacy))
    if message is None:
        assert facts_of(load_tokenizer(path), append_eod=True).eod == 0
        return
    with pytest.raises(ValueError) as raised:
        facts_of(load_tokenizer(path), append_eod=True)
    assert str(raised.value).startswith(f"{path}: ") and message in str(raised.value)
    assert facts_of(load_tokenizer(path), append_eod=False).vocab_size == 400


def test_added_tokens_have_the_ids_that_the_files_state(tmp_path, trained):
    in_file = gpt2(trained)
    in_file.add_tokens([tokenizers.AddedToken("<tool>", normalized=False)])
    decoder = {"400": {"content": "<tool>", "normalized": False, "special": True}}
    for name, source, config in (
        ("file", in_file, {}),
        ("config", trained, {"added_tokens_decoder": decoder}),
        ("both", in_file, {"added_tokens_decoder": decoder}),
        ("older", trained, {"eos_token": EOS}),
    ):
        path = directory_of(tmp_path / name, source, **config)
        if name == "older":
            (tmp_path / name / "added_tokens.json").write_text('{"<tool>": 400}')
        tokenizer = load_tokenizer(path)
        assert tokenizer.encode(["a<tool>"])[0][-1] == 400 and tokenizer.added >= {"<tool>"}, name
        assert facts_of(load_tokenizer(path), append_eod=True).vocab_size == 401


def test_an_added_token_whose_id_the_tokenizers_library_would_change_is_refused(tmp_path, trained):
    far = json.loads(trained)
    far["added_tokens"].append({**far["added_tokens"][0], "id": 9000, "content": "<far>"})
    stated = json.dumps(far)
    for i, (source, config) in enumerate(
        [
            (stated, {}),
            (stated.replace('"added_tokens"', '"added\\u005ftokens"'), {}),
            (json.dumps({"model": far.pop("model") | {"added_tokens": []}} | far), {}),
            (trained, {"added_tokens_decoder": {"9000": {"content": "<far>"}}}),
        ]
    ):
        path = directory_of(tmp_path / str(i), source, **config)
        with pytest.raises(ValueError, match=r'added token "<far>" has the id 9000, but .* gives it 400') as raised:
            load_tokenizer(path)
        assert path in str(raised.value)


def test_pad_tokens_outside_the_vocabulary_get_no_id(tmp_path, trained):
    path = directory_of(tmp_path, trained, eos_token=EOS, pad_token="[PAD]")
    assert facts_of(load_tokenizer(path), append_eod=True).vocab_size == 400


def test_an_end_of_document_that_transformers_would_invent_is_refused(tmp_path):
    (tmp_path / "vocab.json").write_text('{"a": 0, "b": 1}')
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer", "eos_token": "<stop>"}')
    with pytest.raises(ValueError, match='eos_token = "<stop>" is not a token of its vocabulary'):
        facts_of(load_tokenizer(str(tmp_path)), append_eod=True)


TIKTOKEN = b"IQ== 0\nIg== 1\n"


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "holds no tokenizer (tokenizer.json, "),
        ({"tokenizer_config.json": b'{"eos_token": "a"}'}, "holds no tokenizer (tokenizer.json, "),
        ({"tokenizer.json": b"{"}, "is not a Hugging Face tokenizer directory that can be loaded"),
        ({"tokenizer.json": b"\xff\xfe"}, "is not a Hugging Face tokenizer directory that can be loaded"),
        ({"tokenizer_config.json": b"{", "tokenizer.json": b"{}"}, "tokenizer_config.json cannot be read"),
        ({"tokenizer_config.json": b"[]", "tokenizer.json": b"{}"}, "tokenizer_config.json must hold a JSON object"),
        ({"tokenizer_config.json": b'{"added_tokens_decoder": {"a": 1}}'}, "its added tokens cannot be read"),
        (
            {"tokenizer.json": b'{"model": {"type": "WordLevel", "vocab": {"b": 2000000000}, "unk_token": "b"}}'},
            'its token "b" has the id 2000000000; ids must be below 16,777,216',
        ),
        ({"tokenizer.model": b"\n\x05\n"}, "is a sentencepiece model, which needs sentencepiece and protobuf"),
        ({"tokenizer.model": TIKTOKEN}, "is a tiktoken model, which needs tiktoken: pip install tiktoken"),
        ({"tokenizer.model": b"\x00" * 9}, "is neither a sentencepiece nor a tiktoken model"),
        (
            {"vocab.json": b"{}", "tokenizer_config.json": b'{"auto_map": {"AutoTokenizer": ["t.X", null]}}'},
            "needs the code that its auto_map names, which is never run here",
        ),
    ],
)
def test_a_directory_that_cannot_be_opened_is_named(tmp_path, monkeypatch, files, message):
    monkeypatch.setattr(module, "_installed", lambda name: False)  # this machine may have them
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError) as raised:
        load_tokenizer(str(tmp_path))
    assert message in str(raised.value) and str(tmp_path) in str(raised.value)


def test_a_text_that_the_tokenizer_cannot_encode_is_refused_by_its_directory(tmp_path):
    (tmp_path / "tokenizer.json").write_text('{"model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "b"}}')
    with pytest.raises(ValueError, match=rf"^{tmp_path}: its tokenizer cannot encode the text: .*Missing \[UNK\]"):
        load_tokenizer(str(tmp_path)).encode(["c"])


def test_the_library_leaves_composed_characters_as_they_are():
    """The library's tables of Unicode are older than Python's."""
    known = [chr(i) for i in range(0x110000) if not 0xD800 <= i < 0xE000]
    marks = [character for character in known if unicodedata.combining(character)]
    drawn = random.Random(0)
    some = ("".join([drawn.choice("aeou\u0915\u1100"), *drawn.choices(marks, k=4)]) for _ in range(20_000))
    texts = [*(text for text in known if unicodedata.is_normalized("NFC", text)), *some]
    composed = unicodedata.normalize("NFC", "\n".join(texts))
    assert normalizers.NFC().normalize_str(composed) == composed


@pytest.mark.parametrize("contents", [["<|caf\u00e9|>"], ["<|caf\u00e9|>", "<|cafe\u0301s|>"]])
def test_a_composed_text_has_the_ids_that_the_normalizer_gives_it(trained, contents):
    """Newer versions of the library do not find a decomposed added token in a composed text without the normalizer."""
    fast = gpt2(trained)
    fast.normalizer = normalizers.NFC()
    fast.add_tokens([AddedToken(content, normalized=True) for content in contents])
    words = ("plain", "caf\u00e9", "cafe\u0301", "<|caf\u00e9|>", "<|cafe\u0301|>", "<|caf\u00e9s|>", "<|cafe\u0301s|>")
    texts = [f"a {one} b {other}" for one in words for other in words]
    expected = [fast.encode(text, add_special_tokens=False).ids for text in texts]
    encode = module.encoder_of(fast, "")
    assert [encode([text])[0].tolist() for text in texts] == expected
    assert [ids.tolist() for ids in encode(texts)] == expected
    assert isinstance(fast.normalizer, normalizers.NFC)


def test_only_one_function_opens_directories_with_transformers():
    """It passes `trust_remote_code=False, local_files_only=True`."""
    root = Path(distill_nemo.__file__).parent
    sources = [*root.rglob("*.py"), *(root.parent / "recipes").rglob("*.py")]
    found = {
        str(path.relative_to(root.parent)): sorted(
            node.attr
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Attribute) and node.attr in ("from_pretrained", "from_config", "pipeline")
        )
        for path in sources
    }
    assert {path: names for path, names in found.items() if names} == {
        "distill_nemo/models/checkpoints/pretrained.py": ["from_config", "from_pretrained"]
    }


def test_code_beside_a_tokenizer_is_not_run(tmp_path, trained):
    """By both paths: our own, and transformers'."""
    from transformers import AutoTokenizer

    from distill_nemo.models.checkpoints.pretrained import open_pretrained

    config = {"auto_map": {"AutoTokenizer": ["code.X", None]}, "tokenizer_class": "X"}
    path = directory_of(tmp_path / "t", trained, **config)
    (tmp_path / "t" / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass X: pass\n")
    assert load_tokenizer(path).encode(["a"])[0].tolist() == gpt2(trained).encode("a").ids
    with pytest.raises(ValueError, match=f"{path} needs the code that its auto_map names"):
        open_pretrained(AutoTokenizer, path)
    with pytest.raises(ValueError, match="no such directory: gpt2"):
        open_pretrained(AutoTokenizer, "gpt2")
    assert not (tmp_path / "ran").exists()
