"""A corpus that every machine has: the modules of Python's standard library, and a tokenizer trained on them."""

import json
import sysconfig
from pathlib import Path

from distill_nemo.data.prepare import prepare
from distill_nemo.runtime.files import write_atomically
from distill_nemo.runtime.output_lock import OutputLock

HELD_OUT_EVERY = 20  # every 20th module is never trained on


def stdlib_modules() -> list[Path]:
    """Return the standard library's Python files in a fixed order, without tests and third-party packages."""
    root = Path(sysconfig.get_path("stdlib"))
    skip = {"test", "tests", "idle_test", "site-packages", "dist-packages", "lib2to3", "__pycache__"}
    return sorted(path for path in root.rglob("*.py") if not skip & set(path.relative_to(root).parts))


def write_stdlib_corpus(output: str, vocab_size: int = 2048) -> None:
    """Write `<output>/tokenizer`, `<output>/train.bin/.idx` and `<output>/valid.bin/.idx`.

    Args:
        output: directory; complete files in it are kept.
        vocab_size: size of the byte-level BPE tokenizer.

    Raises:
        ValueError: if another process writes there.
    """
    with OutputLock(Path(output, "corpus.lock"), f"output = {output}"):
        _write(Path(output), vocab_size)


def _write(directory: Path, vocab_size: int) -> None:
    modules = stdlib_modules()
    held_out = modules[::HELD_OUT_EVERY]
    train = [path for path in modules if path not in set(held_out)]
    if not (directory / "tokenizer" / "tokenizer_config.json").is_file():
        train_tokenizer(train, directory / "tokenizer", vocab_size)
    for name, files in (("train", train), ("valid", held_out)):
        text = directory / f"{name}.jsonl"
        if not text.is_file():
            lines = (json.dumps({"text": path.read_text(encoding="utf-8", errors="replace")}) for path in files)
            write_atomically(text, "\n".join(lines) + "\n")
        prepare([str(text)], str(directory / name), str(directory / "tokenizer"))


def train_tokenizer(files: list[Path], output: Path, vocab_size: int) -> None:
    """Train a byte-level BPE tokenizer and save it as Hugging Face's `AutoTokenizer` reads it."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    bpe = ByteLevelBPETokenizer()
    bpe.train([str(path) for path in files], vocab_size, special_tokens=["<|endoftext|>"], show_progress=False)
    wrapped = PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token="<|endoftext|>")
    wrapped.save_pretrained(str(output))
