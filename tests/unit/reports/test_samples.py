"""Text that exported models go on with."""

import json
import shutil
from pathlib import Path

import pytest

from distill_nemo.data.stdlib_corpus import stdlib_modules, train_tokenizer
from distill_nemo.reports.samples import TOKENS, generate
from tests.tiny_models import write_hf

VOCAB = 400
PROMPT = "def add(a, b):\n    return"


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a model whose byte-level tokenizer is labelled as one that loses spaces in transformers 5."""
    path = tmp_path_factory.mktemp("exported")
    write_hf(path, vocab=VOCAB, layers=1)
    train_tokenizer(stdlib_modules()[:3], path / "tokenizer", VOCAB)
    shutil.copy(path / "tokenizer" / "tokenizer.json", path)
    config = {"tokenizer_class": "LlamaTokenizerFast", "eos_token": "<|endoftext|>"}
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    return path


def test_a_prompt_has_the_ids_of_tokenizer_json_and_comes_back_unchanged(exported: Path):
    (text,) = generate(str(exported), [PROMPT])
    assert text.startswith(PROMPT) and len(text) > len(PROMPT) + TOKENS / 2


@pytest.mark.parametrize("prompt", ["", "[PAD] a"])
def test_a_prompt_that_the_model_cannot_read_is_refused(exported: Path, tmp_path: Path, prompt: str):
    path = shutil.copytree(exported, tmp_path / "exported")
    tokenizer = json.loads((path / "tokenizer.json").read_text())
    tokenizer["added_tokens"].append(tokenizer["added_tokens"][0] | {"id": VOCAB, "content": "[PAD]"})
    (path / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ValueError, match=r"exported generates no text: .* has no tokens, or some that the model lacks"):
        generate(str(path), [prompt])


def test_a_generation_that_transformers_refuses_is_one_error(exported: Path, tmp_path: Path):
    path = shutil.copytree(exported, tmp_path / "exported")
    (path / "generation_config.json").write_text('{"num_beams": 1000000, "repetition_penalty": -1.0}')
    with pytest.raises(ValueError, match=r"exported generates no text: .*penalty"):
        generate(str(path), [PROMPT])
