"""Collect the files of an exported directory, except its weights.

An export keeps the configuration and files of the Hugging Face directory that the student came from. They change only
where the student differs.
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
from distill_nemo.fields import require
from distill_nemo.models.architecture import Architecture
from distill_nemo.models.checkpoints.places import published, without_places
from distill_nemo.models.checkpoints.pretrained import empty_model, open_pretrained
from distill_nemo.models.checkpoints.untouched import Untouched
from distill_nemo.models.families.huggingface import from_huggingface, read_config, to_huggingface
from distill_nemo.models.families.rope import ROPE_FIELDS
from distill_nemo.models.stored_quantization import FIELD
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
GENERATION = "generation_config.json"  # may name several tokens at which an answer ends
PROCESSORS = ("*processor_config.json",)  # of images and videos
LICENCES = ("LICENSE*", "LICENCE*", "COPYING*", "NOTICE*", "USE_POLICY*")  # they hold for what is made of the source
FURTHER_LAYERS = {"num_nextn_predict_layers", "mtp_num_hidden_layers"}  # that predict further tokens; exports have none
DROPPED = ("auto_map", FIELD)  # names code, which is not copied; and quantised weights, which are written plain

Files = dict[str, Path | str]  # path inside the directory -> file to copy, or text to write


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
        """Open everything with transformers, as users of the export will.

        Raises:
            ValueError: if transformers refuses the student's sizes or the tokenizer, with advice.
        """
        with tempfile.TemporaryDirectory() as temporary:
            self.write(Path(temporary))
            try:
                empty_model(open_pretrained(AutoConfig, temporary))
                if GENERATION in self.files:
                    open_pretrained(GenerationConfig, temporary)
            except Exception as error:  # transformers raises errors of any type
                given = self.files.get(GENERATION)
                wrong = given if isinstance(given, Path) else "them"
                raise ValueError(
                    f"the student could not be exported: transformers refuses its config.json or {GENERATION}: "
                    f"{_reason(error, temporary)}; change its sizes, or correct {wrong}"
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
            f"{_reason(error, directory)}; repair it"
        ) from None


def _reason(error: Exception, directory: str | Path) -> str:
    return str(error).replace(str(directory), "its directory")[:400] or repr(error)


def export_files(
    model: Architecture,
    dtype: torch.dtype,
    source: Path | None,
    tokenizer: Path | None,
    untouched: Untouched | None = None,
) -> ExportFiles:
    """Collect an export's files without writing any.

    Args:
        model: the student.
        dtype: dtype of its weights.
        source: the Hugging Face directory that it came from, if any.
        tokenizer: directory whose tokenizer takes precedence over the source's.
        untouched: tensors of the source that are copied. Then `config.json` describes them, too.

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
        files[GENERATION] = _with_ids_within(generation, model.vocab_size)
    if source is not None:
        files |= _matching(source, LICENCES)
    config = _config(model, dtype, source, tokenizer)
    if untouched is None:
        config |= dict.fromkeys(FURTHER_LAYERS & config.keys(), 0)
    elif untouched.wrapper is not None:
        assert source is not None
        config, files = _around(config, source), files | _matching(source, PROCESSORS)
    return ExportFiles(without_places(config), files, tokenizer)


def exported_tokenizer(source: Path | None, named: Path | None) -> Path | None:
    """Return the directory from which an export takes its tokenizer: `named`, else the source if it holds one.

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
    """Copy or write `files` into `directory`, JSON files without places on this machine.

    Raises:
        ValueError: for a file that should hold a JSON object, and does not.
    """
    for name, given in files.items():
        target = directory / name
        target.parent.mkdir(exist_ok=True)
        content = published(given) if isinstance(given, Path) else given
        if isinstance(content, Path):
            shutil.copyfile(content, target)  # follows links, and leaves out read-only permissions
        else:
            target.write_text(content)


def _matching(directory: Path, patterns: tuple[str, ...]) -> dict[str, Path]:
    """Return the files that match, by their path in the directory.

    Raises:
        ValueError: for a link to a file of another name elsewhere, which a push would publish.
    """
    found = [file for pattern in patterns for file in sorted(directory.glob(pattern))]
    found = [file for file in found if file.is_file() and file.suffix != ".py"]
    for file in found:
        target = file.resolve()
        inside = target.is_relative_to(directory.resolve()) or target.parent.name == "blobs"  # of the hub's cache
        require(
            inside or target.name == file.name,
            f"{file} is a link to {target}, which the export would hold, and a push publish; put a copy in its place",
        )
    return {str(file.relative_to(directory)): file for file in found}


def _states_template(directory: Path) -> bool:
    return bool(read_object_if_any(directory / "tokenizer_config.json").get("chat_template"))


def _chat_templates(directory: Path) -> Files:
    """Return a directory's chat templates as files, even if transformers kept them in `tokenizer_config.json`."""
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
    forced = {"vocab_size", "dtype", "torch_dtype", *ROPE_FIELDS}  # so that transformers 4 and 5 read them alike
    config = ours | kept | {name: value for name, value in ours.items() if name in forced}
    if tokenizer is not None and not {"bos_token_id", "eos_token_id"} <= theirs.keys():
        config |= {name: i for name, i in _token_ids(tokenizer).items() if name not in theirs}
    return {name: value for name, value in _ids_within(config, model.vocab_size).items() if name not in DROPPED}


def _around(text: dict[str, Any], source: Path) -> dict[str, Any]:
    """Return the `config.json` of the model of images and text around a text model, with that one's rows and dtype."""
    whole = {name: value for name, value in read_object(source / "config.json").items() if name not in DROPPED}
    theirs = whole["text_config"] | {"vocab_size": text["vocab_size"]}
    return _with_dtype(whole, text) | {"text_config": _with_dtype(theirs, text)}


def _with_dtype(config: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    return config | {name: other[name] for name in ("dtype", "torch_dtype") if name in config}


def _source_config(source: Path, model: Architecture) -> dict[str, Any]:
    """Return the source's `config.json`, or an empty one if the directory holds another model by now."""
    if model.source is not None and model.source.weights == source:
        return model.source.config
    config = read_config(source / "config.json")
    stated, own = from_huggingface(config, source), dataclasses.asdict(model.filled(StudentConfig()))
    differing = [name for name, value in stated.items() if name != "vocab_size" and own[name] != value]
    if not differing:
        return config
    print(
        f"warning: {source} holds another model now ({differing[0]} = {stated[differing[0]]}, the student's is "
        f"{own[differing[0]]}): the export does not use its config.json",
        file=sys.stderr,
        flush=True,
    )
    return {}


def _token_ids(tokenizer: Path) -> dict[str, int | None]:
    """Return the ids of the tokens that begin and end a generation."""
    loaded = _opened(tokenizer, tokenizer)
    return {"bos_token_id": loaded.bos_token_id, "eos_token_id": loaded.eos_token_id}


def _with_ids_within(generation: Path, vocab_size: int) -> Path | str:
    """Return a `generation_config.json` to copy, or its text if it names token ids beyond the student's rows."""
    stated = read_object(generation)
    within = _ids_within(stated, vocab_size)
    return generation if within == stated else json.dumps(without_places(within), indent=2)


def _ids_within(config: dict[str, Any], vocab_size: int) -> dict[str, Any]:
    """Drop token ids beyond the student's rows from the fields that hold an id or a list of ids."""
    return {name: _within(value, vocab_size) if name.endswith("_token_id") else value for name, value in config.items()}


def _within(value: Any, vocab_size: int) -> Any:
    if isinstance(value, list):
        return [i for i in value if _within(i, vocab_size) is not None] or None
    return None if isinstance(value, int) and value >= vocab_size else value
