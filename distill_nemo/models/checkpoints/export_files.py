"""All files of an exported directory except its weights.

The configuration and files of the Hugging Face directory that the student came from are kept, and changed only where
the student differs.
"""

import dataclasses
import json
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoTokenizer, GenerationConfig

from distill_nemo.config import StudentConfig
from distill_nemo.models.architecture import Architecture
from distill_nemo.models.checkpoints.pretrained import empty_model, open_pretrained
from distill_nemo.models.families.huggingface import from_huggingface, to_huggingface
from distill_nemo.models.families.rope import ROPE_FIELDS
from distill_nemo.runtime.files import read_object, read_object_if_any

TOKENIZER_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "tekken.json",
)
CHAT_TEMPLATES = ("*.jinja", "chat_template.json", "additional_chat_templates/*.jinja")
GENERATION = "generation_config.json"  # where an answer may end at several tokens
DROPPED = ("auto_map",)  # names code, which is not copied
NO_EXPORT = "train with checkpoint.export=false, and keep the Megatron checkpoint"

Files = dict[str, Path | str]  # by path inside the directory: a file to copy, or the text to write


@dataclass(frozen=True)
class ExportFiles:
    """`config.json` and the files beside the weights."""

    config: dict[str, Any]
    files: Files
    tokenizer: Path | None  # the directory that the tokenizer came from

    def write(self, directory: Path) -> None:
        """Write everything into an existing directory."""
        (directory / "config.json").write_text(json.dumps(self.config, indent=2))
        write_files(self.files, directory)

    def check(self) -> None:
        """Open everything with transformers, as its users will.

        Raises:
            ValueError: if it refuses the student's sizes or the tokenizer, saying what can be done.
        """
        with tempfile.TemporaryDirectory() as temporary:
            self.write(Path(temporary))
            try:
                empty_model(open_pretrained(AutoConfig, temporary))
                if GENERATION in self.files:
                    open_pretrained(GenerationConfig, temporary)
            except Exception as error:  # transformers raises whatever the values provoke
                raise ValueError(
                    f"the student could not be exported: transformers refuses its config.json or {GENERATION}: "
                    f"{_said(error, temporary)}; change its sizes, mend {self.files.get(GENERATION, 'them')}, or "
                    f"{NO_EXPORT}"
                ) from None
            if self.tokenizer is not None:
                _opened(temporary, self.tokenizer)


def _opened(directory: str | Path, tokenizer: Path) -> Any:
    """Open the tokenizer in `directory`, which is `tokenizer` or a copy."""
    try:
        return open_pretrained(AutoTokenizer, directory)
    except Exception as error:
        raise ValueError(
            f"the student could not be exported: transformers cannot open the tokenizer in {tokenizer}: "
            f"{_said(error, directory)}; mend it, name another directory as data.tokenizer, or {NO_EXPORT}"
        ) from None


def _said(error: Exception, directory: str | Path) -> str:
    return str(error).replace(str(directory), "its directory")[:400] or repr(error)


def export_files(model: Architecture, dtype: torch.dtype, source: Path | None, tokenizer: Path | None) -> ExportFiles:
    """Collect an export's files; nothing is written.

    Args:
        model: the student.
        dtype: of its weights.
        source: the Hugging Face directory that it came from, if any.
        tokenizer: a directory whose tokenizer goes before the source's.

    Raises:
        ValueError: if `tokenizer` holds no tokenizer.
    """
    tokenizer = exported_tokenizer(source, tokenizer)
    directories = [each for each in (tokenizer, source) if each is not None]
    templates = next(filter(None, map(_chat_templates, directories)), {})
    generation = next((each / GENERATION for each in reversed(directories) if (each / GENERATION).is_file()), None)
    files: Files = {}
    if tokenizer is not None:
        files |= ({} if _states_template(tokenizer) else templates) | tokenizer_files(tokenizer)
    if generation is not None:
        files[GENERATION] = generation
    return ExportFiles(_config(model, dtype, source, tokenizer), files, tokenizer)


def exported_tokenizer(source: Path | None, named: Path | None) -> Path | None:
    """Return the directory whose tokenizer an export has: `named`, else the source if it holds one.

    Raises:
        ValueError: if `named` holds no tokenizer.
    """
    if named is not None and not tokenizer_files(named):
        raise ValueError(f"{named} holds no tokenizer files ({', '.join(TOKENIZER_FILES)})")
    return named or (source if source is not None and tokenizer_files(source) else None)


def tokenizer_files(directory: Path) -> dict[str, Path]:
    """Return the files of the tokenizer in a directory, chat templates among them; empty if it holds no tokenizer."""
    if not _matching(directory, TOKENIZER_FILES):
        return {}
    return _matching(directory, (*TOKENIZER_FILES, *CHAT_TEMPLATES))


def write_files(files: Files | dict[str, Path], directory: Path) -> None:
    """Copy or write `files` into `directory`."""
    for name, content in files.items():
        target = directory / name
        target.parent.mkdir(exist_ok=True)
        if isinstance(content, Path):
            shutil.copyfile(content, target)  # without a link, and without read-only permissions
        else:
            target.write_text(content)


def _matching(directory: Path, patterns: tuple[str, ...]) -> dict[str, Path]:
    found = [file for pattern in patterns for file in sorted(directory.glob(pattern))]
    return {str(file.relative_to(directory)): file for file in found if file.is_file() and file.suffix != ".py"}


def _states_template(directory: Path) -> bool:
    return bool(read_object_if_any(directory / "tokenizer_config.json").get("chat_template"))


def _chat_templates(directory: Path) -> Files:
    """Return the chat templates of a directory as files: transformers keeps them so, or in `tokenizer_config.json`."""
    found: Files = {**_matching(directory, CHAT_TEMPLATES)}
    stated = read_object_if_any(directory / "tokenizer_config.json").get("chat_template")
    if found or not stated:
        return found
    if isinstance(stated, str):
        return {"chat_template.jinja": stated}
    named = {each["name"]: each["template"] for each in stated}
    return {
        "chat_template.jinja" if name == "default" else f"additional_chat_templates/{name}.jinja": template
        for name, template in named.items()
    }


def _config(model: Architecture, dtype: torch.dtype, source: Path | None, tokenizer: Path | None) -> dict[str, Any]:
    ours = to_huggingface(model, dtype)
    theirs = {} if source is None else _source_config(source, model)
    kept = {name: value for name, value in theirs.items() if value is not None or ours.get(name) is None}
    forced = {"vocab_size", "dtype", "torch_dtype", *ROPE_FIELDS}  # alike for transformers 4 and 5
    config = ours | kept | {name: value for name, value in ours.items() if name in forced}
    if tokenizer is not None and not {"bos_token_id", "eos_token_id"} <= theirs.keys():
        config |= {name: i for name, i in _token_ids(tokenizer).items() if name not in theirs}
    ids = {name: value for name, value in config.items() if name.endswith("_token_id")}
    config |= {name: _within(value, model.vocab_size) for name, value in ids.items()}
    return {name: value for name, value in config.items() if name not in DROPPED}


def _source_config(source: Path, model: Architecture) -> dict[str, Any]:
    """Return `config.json` of the source, or nothing if another model is there by now."""
    if model.source is not None and model.source.weights == source:
        return model.source.config
    config = read_object(source / "config.json")
    stated, own = from_huggingface(config, source), dataclasses.asdict(model.filled(StudentConfig()))
    differing = [name for name, value in stated.items() if name != "vocab_size" and own[name] != value]
    if not differing:
        return config
    print(
        f"warning: {source} is another model now ({differing[0]} = {stated[differing[0]]}, the student's is "
        f"{own[differing[0]]}): the export does not take over its config.json",
        file=sys.stderr,
        flush=True,
    )
    return {}


def _token_ids(tokenizer: Path) -> dict[str, int | None]:
    """Return the ids by which generation starts and ends."""
    loaded = _opened(tokenizer, tokenizer)
    return {"bos_token_id": loaded.bos_token_id, "eos_token_id": loaded.eos_token_id}


def _within(value: Any, vocab_size: int) -> Any:
    """Return a token id, or several, without those beyond the student's rows."""
    if isinstance(value, list):
        return [i for i in value if i < vocab_size] or None
    return None if isinstance(value, int) and value >= vocab_size else value
