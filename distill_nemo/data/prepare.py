"""Text to token files: Megatron's `.bin/.idx`, made by several processes in parts that survive an interruption.

The input is cut into parts independent of the number of workers. A worker turns part i into `<output>.parts/i.bin`
(tokens), `i.len` (tokens of each document) and finally `i.json`. The parts are then joined in order, so the result
depends neither on the number of workers nor on interruptions.
"""

import itertools
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from distill_nemo.data.chat_template import LossOn
from distill_nemo.data.chat_tokens import Chat, chat_of
from distill_nemo.data.conversations import Format
from distill_nemo.data.inputs import find_files
from distill_nemo.data.manifest import pack_vocabulary, read_json, read_manifest
from distill_nemo.data.packing import Packing, TooLong, described, packing_of, write_packs
from distill_nemo.data.parts import MAX_NAMED_RECORDS, Part, digest, file_size
from distill_nemo.data.readers import FilePiece, Schema, cut, schema_of
from distill_nemo.data.token_files import iter_blocks, sample_sha256, write_index
from distill_nemo.data.token_masks import write_mask
from distill_nemo.data.tokenizer import Tokenizer, TokenizerFacts, facts_of, load_tokenizer, save_fast
from distill_nemo.data.workers import make_parts, part_makers
from distill_nemo.hub import directory_of, recorded_name
from distill_nemo.runtime.files import fsync, write_atomically
from distill_nemo.runtime.output_lock import OutputLock

COUNTS = ("documents", "tokens", "counted_tokens", "bad_records")
MIN_PART_BYTES = 1 << 20  # of input: less than a second of work for one process
RENDERING = 6  # changes with the tokens or masks that a conversation becomes, so that older parts are made again
MAX_PARTS = 10_000  # approximate; parts of huge inputs are larger


@dataclass(frozen=True)
class PrepareResult:
    """Result of `prepare`; `bad_records` is the number of skipped records, `counted_tokens` is without masked ones."""

    documents: int
    tokens: int
    counted_tokens: int
    bad_records: int
    seconds: float


def prepare(
    inputs: list[str],
    output: str,
    tokenizer: str,
    text_key: str = "text",
    append_eod: bool = True,
    num_workers: int | None = None,
    max_bad_records: int = 0,
    progress: bool = True,
    format: Format | None = None,
    loss_on: LossOn | None = None,
    chat_template: str | None = None,
    pack: int | None = None,
    too_long: TooLong | None = None,
) -> PrepareResult:
    """Tokenise documents into `<output>.bin`, `<output>.idx` and `<output>.json` (the manifest).

    Conversations are rendered with the tokenizer's chat template, and `<output>.mask` says which tokens count: one bit
    a token, the first in the lowest bit of the first byte. Nothing is appended to what the template writes.

    Documents keep the order of the inputs; empty ones are left out. The end of document is the only special token that
    is added. After an interruption, the same call makes the missing parts. After success, it does nothing.

    Args:
        inputs: files, directories or globs, see `find_files`. A text file is one document; other files hold one record
            per line, row or element.
        output: path prefix of the token files.
        tokenizer: a Hugging Face tokenizer directory. Code in it is not run.
        text_key: JSON key or column of the text; with format=chat, of messages that stand under no known key.
        append_eod: end every document with the tokenizer's eos token.
        num_workers: processes; None means one per available core.
        max_bad_records: number of records that may be skipped before the job fails.
        progress: show progress, as a bar, or as plain lines if stderr is not a terminal.
        format: format of all records; None for that of the first one, see `conversations.format_of`.
        loss_on: tokens of conversations that count: the assistant's, those of its last turn, or all. None: assistant.
        chat_template: file of a Jinja template in place of the tokenizer's.
        pack: sequence length of training; documents are put together in packs that fill it. None: as they come.
        too_long: cut or drop documents that a pack does not hold. None: texts are cut, conversations are dropped.

    Raises:
        ValueError: for inputs that are missing or cannot be read; for a tokenizer that is missing, has no
            end-of-document token, or no template for conversations; for too many bad records, or no document; for an
            output of other inputs, or one that another process is writing; for a negative number. Whole parts are kept.
        OSError: if the output cannot be written. Whole parts are kept.
    """
    began = time.monotonic()
    for name, number in (("num_workers", num_workers), ("max_bad_records", max_bad_records)):
        if number is not None and number < 0:
            raise ValueError(f"{name} must be at least 0, got {number}")
    output = _check_output(output)
    found = find_files(inputs)
    print("".join(f"{line}\n" for line in found.lines()), end="")
    files = list(found.files.values())
    schema = schema_of(files, text_key) if format is None else Schema(format, text_key)
    if format is None:
        why = "whole files, or" if schema.kind == "text" else "from the first record; format=text would read"
        print(f'format: {schema.kind} ({why} the key "{text_key}")')
    groups = _grouped(files, schema)
    num_workers = num_workers or len(os.sched_getaffinity(0))
    with part_makers(min(num_workers, len(groups))) as make:  # which start while the tokenizer is opened
        opened = load_tokenizer(directory_of(tokenizer, weights=False))
        chat = _chat(opened, schema, loss_on, chat_template)
        append_eod = append_eod and chat is None
        packing = packing_of(pack, too_long, chat is not None)
        parts = _plan(groups, Path(f"{output}.parts"), facts_of(opened, append_eod), schema, chat)
        about = _provenance(parts, [os.path.abspath(source) for source in inputs], append_eod, packing)
        tokenise = partial(make_parts, parts, make, max_bad_records, progress)
        manifest, fresh, kept = _complete(output, parts, about, opened, packing, tokenise, max_bad_records)
    result = PrepareResult(*(manifest[name] for name in COUNTS), seconds=time.monotonic() - began)
    _print_result(output, result, fresh, kept)
    if packing is not None:
        print(described(manifest))
    return result


def _complete(
    output: str,
    parts: list[Part],
    about: dict[str, Any],
    tokenizer: Tokenizer,
    packing: Packing | None,
    tokenise: Callable[[Callable[[], None]], tuple[list[dict], int]],
    max_bad: int,
) -> tuple[dict[str, Any], int | None, int]:
    """Make the output, unless it is complete.

    Args:
        output: prefix of the files.
        parts: the parts that they are joined from.
        about: fields of the manifest that describe inputs and options.
        tokenizer: the parts' tokenizer.
        packing: None for no packs.
        tokenise: makes the missing parts, and calls a function meanwhile. See `make_parts`.
        max_bad: number of records that may be skipped.

    Returns:
        The manifest; the number of tokens made now, None if there was nothing to do; that of an earlier run's tokens.
    """
    parts_dir = Path(parts[0].prefix).parent
    manifest, fresh, kept = _finished(output, about["key"]), None, 0
    if manifest is not None and not parts_dir.exists():
        return manifest, fresh, kept
    with OutputLock(Path(f"{output}.lock"), f"output = {output}"):
        manifest = _finished(output, about["key"])  # by another process meanwhile
        if manifest is None:
            _refuse_foreign(output, parts_dir, about["inputs"])
            with _parts_kept(output, parts_dir):
                save_fast(tokenizer, parts_dir / "tokenizer.json")
                made, fresh = tokenise(lambda: about.update(vocabulary_sha256=tokenizer.vocabulary_sha256))
                manifest = about | _total(made, max_bad, about["inputs"])
                kept = manifest["tokens"] - fresh  # before packs leave long documents out
                manifest |= _join(parts, {i: token for token, i in tokenizer.vocab.items()}, packing)
                _publish(parts_dir, output, manifest)
        shutil.rmtree(parts_dir)
    return manifest, fresh, kept


def _provenance(parts: list[Part], sources: list[str], append_eod: bool, packing: Packing | None) -> dict[str, Any]:
    """Return the fields of the manifest that describe inputs and options."""
    tok, chat = parts[0].tokenizer, parts[0].chat
    rendering = {} if chat is None else {"loss_on": chat.loss_on, "chat_template_sha256": digest(chat.template.source)}
    return {
        "key": digest([*(part.key for part in parts), *([] if packing is None else [asdict(packing)])]),
        "inputs": sources,
        "tokenizer": recorded_name(tok.path),
        "tokenizer_sha256": tok.sha256,
        "vocab_size": tok.vocab_size,
        "eod_id": tok.eod,
        "append_eod": append_eod,
        "format": parts[0].schema.kind,
        "text_key": parts[0].schema.text_key,
        "dtype": parts[0].dtype,
        **rendering,
    }


def _chat(tokenizer: Tokenizer, schema: Schema, loss_on: LossOn | None, file: str | None) -> Chat | None:
    """Return the rendering of conversations; None for texts."""
    if schema.kind != "text":
        return chat_of(tokenizer, loss_on or "assistant", file)
    for name, value in (("loss_on", loss_on), ("chat_template", file)):
        if value is not None:
            raise ValueError(f"{name} is for conversations, and the records are texts: leave it out, or set format")
    return None


def _grouped(files: list[Path], schema: Schema) -> list[list[FilePiece]]:
    """Return groups of consecutive pieces, of about `MIN_PART_BYTES` or more; depends only on the inputs.

    Raises:
        ValueError: if a file cannot be read, or all are empty.
    """
    groups: list[list[FilePiece]] = []
    size = 0
    part_bytes = max(MIN_PART_BYTES, sum(file.stat().st_size for file in files) // MAX_PARTS)
    for piece in itertools.chain.from_iterable(cut(file, schema, part_bytes) for file in files):
        if not groups or size + piece.num_bytes > part_bytes:
            groups.append([])
            size = 0
        groups[-1].append(piece)
        size += piece.num_bytes
    if not groups:
        raise ValueError(f"nothing to tokenise: {files[0]}{' and the others are' if files[1:] else ' is'} empty")
    return groups


def _plan(
    groups: list[list[FilePiece]], parts_dir: Path, tok: TokenizerFacts, schema: Schema, chat: Chat | None
) -> list[Part]:
    """Return parts, one for each group of pieces."""
    dtype = "uint16" if tok.vocab_size < 65500 else "int32"  # Megatron's DType.optimal_dtype, without importing it
    options = [tok.sha256, tok.vocab_size, tok.eod, asdict(schema)]
    options += [] if chat is None else [RENDERING, asdict(chat.template), chat.loss_on]
    keys = [digest([options, [asdict(piece) for piece in group]]) for group in groups]
    return [
        Part(str(parts_dir / f"{i:06d}"), group, key, tok, schema, dtype, chat)
        for i, (group, key) in enumerate(zip(groups, keys, strict=True))
    ]


def _total(made: list[dict], max_bad: int, sources: list[str]) -> dict[str, Any]:
    """Add up the parts. Report bad records. Refuse too many of them, and a total of no document."""
    totals = {name: sum(part[name] for part in made) for name in COUNTS}
    bad = [entry for part in made for entry in part["bad"]]
    num_bad = totals["bad_records"]
    lines = [f"  {where} {problem}" for where, problem in bad[:5]] + (["  ..."] if num_bad > 5 else [])
    message = f"{num_bad} bad record{'s' * (num_bad != 1)}"
    if num_bad > max_bad:
        advice = f"more than max_bad_records = {max_bad}; mend them or raise the limit:"
        raise ValueError("\n".join([f"{message}, {advice}", *lines]))
    if not totals["documents"]:
        others = "\n".join([f"; {message}:", *lines]) if num_bad else ""
        raise ValueError(f"nothing to tokenise: no document in {', '.join(sources[:3])} has any text{others}")
    if num_bad:
        print("\n".join([f"skipped {message} (max_bad_records = {max_bad}):", *lines]))
    without = sum(part.get("without_reasoning", 0) for part in made)
    if without:
        answers = f"{without:,} earlier answer{'s' * (without != 1)}"
        print(f"the chat template leaves out the reasoning of {answers}; the rest of them counts")
    last_apart = all(part.get("last_apart", True) for part in made)
    return {**totals, "bad": bad[:MAX_NAMED_RECORDS], "last_apart": last_apart, "without_reasoning": without}


def _join(parts: list[Part], tokens: dict[int, str], packing: Packing | None) -> dict[str, Any]:
    """Join the parts into `joined.bin/.idx` beside them. Return what the manifest says about the files and packs."""
    joined, occurs = Path(parts[0].prefix).parent / "joined", np.zeros(parts[0].tokenizer.vocab_size, dtype=bool)
    found = {} if packing is None else write_packs(parts, joined, packing, occurs)
    if packing is None:
        _concatenate(parts, joined, occurs)
    if parts[0].chat is not None:
        found["mask_sample_sha256"] = sample_sha256(Path(f"{joined}.mask"))
    occurring = np.flatnonzero(occurs).tolist()
    return found | {"max_token_id": max(occurring), "vocabulary": pack_vocabulary({i: tokens[i] for i in occurring})}


def _concatenate(parts: list[Part], joined: Path, occurs: np.ndarray) -> None:
    """Write the documents of the parts in order."""
    dtype = np.dtype(parts[0].dtype)
    with open(f"{joined}.bin", "wb") as file:
        for part in parts:
            for block in iter_blocks(Path(part.prefix + ".bin")):
                file.write(block)
                occurs[np.frombuffer(block, dtype)] = True
    lengths = np.concatenate([np.fromfile(part.prefix + ".len", np.int32) for part in parts])
    write_index(Path(f"{joined}.idx"), lengths, parts[0].dtype)
    if parts[0].chat is not None:
        write_mask(Path(f"{joined}.mask"), [Path(part.prefix + ".mask") for part in parts])


def _publish(parts_dir: Path, output: str, manifest: dict[str, Any]) -> None:
    """Move the joined files into place, once all are on the disk. An old manifest never describes new tokens.

    The index comes last, durably. Without it the others are refused, so no token counts for lack of a mask, and no
    pack is read as plain documents for lack of a manifest.
    """
    write_atomically(parts_dir / "joined.json", json.dumps(manifest, indent=1))
    made = [suffix for suffix in (".bin", ".mask", ".json", ".idx") if (parts_dir / f"joined{suffix}").exists()]
    for suffix in made:
        fsync(parts_dir / f"joined{suffix}")
    for old in (".idx", ".json", ".mask"):
        Path(output + old).unlink(missing_ok=True)
    for suffix in made:
        if suffix == ".idx":
            fsync(Path(output).absolute().parent)
        os.replace(parts_dir / f"joined{suffix}", output + suffix)
    fsync(Path(output).absolute().parent)


@contextmanager
def _parts_kept(output: str, parts_dir: Path) -> Iterator[None]:
    """Keep whole parts, perhaps hours of work, if a disk is full or an input is refused."""
    try:
        parts_dir.mkdir(exist_ok=True)
        yield
    except (ValueError, OSError) as error:
        kept = _remove_unfinished(parts_dir)
        again = "\nThe parts that are whole are kept: run the same command again to go on with them" if kept else ""
        if isinstance(error, ValueError):
            raise ValueError(f"{error}{again}") from None
        raise OSError(f"output = {output} cannot be written: {error.strerror or error}{again}") from None


def _remove_unfinished(parts_dir: Path) -> bool:
    """Remove parts that are not whole, have bad records or have no document. Return True if any part is left."""
    manifests = {path.stem: read_json(path) or {} for path in parts_dir.glob("0*.json")}
    whole = [name for name, part in manifests.items() if part.get("documents") and not part.get("bad_records")]
    names = {*whole, "tokenizer"}
    for path in parts_dir.glob("*.*"):
        if path.stem not in names:
            path.unlink()
    if not whole:
        shutil.rmtree(parts_dir, ignore_errors=True)
    return bool(whole)


def _print_result(output: str, result: PrepareResult, fresh: int | None, kept: int) -> None:
    """Print the result.

    Args:
        output: prefix of the files.
        result: what is in them.
        fresh: number of tokens made now; None if there was nothing to do.
        kept: number of tokens that an earlier run made.
    """
    counts = f"{result.documents:,} documents, {result.tokens:,} tokens"
    if result.counted_tokens < result.tokens:
        counts += f", of which {result.counted_tokens:,} count ({result.counted_tokens / result.tokens:.0%})"
    if fresh is None:
        print(f"{output}.bin is complete: {counts}; nothing to do")
        return
    resumed = f" ({kept:,} from an earlier, interrupted run)" if kept else ""
    print(f"{output}.bin: {counts}{resumed}, {fresh / result.seconds:,.0f} tokens/s, {result.seconds:.1f} s")


def _check_output(output: str) -> str:
    """Return the prefix with `~` expanded.

    Raises:
        ValueError: for a directory, or for the name of one of the files.
    """
    if Path(output).suffix in (".bin", ".idx"):
        raise ValueError(f'output = "{output}" must be without {Path(output).suffix}: it is the prefix of two files')
    if os.path.basename(output) in ("", ".", ".."):
        raise ValueError(
            f'output = "{output}" is a directory: add the name of the files, as in {Path(output, "corpus")}'
        )
    return os.path.expanduser(output)


def _finished(output: str, key: str) -> dict[str, Any] | None:
    """Return the manifest of a complete output of the same inputs and options, if it lists the tokens that occur."""
    manifest = read_manifest(output)
    if manifest.get("key") != key or "vocabulary" not in manifest:
        return None
    documents, tokens = manifest["documents"], manifest["tokens"]
    bounds = manifest.get("packs", documents) + 1
    sizes = {".bin": tokens * np.dtype(manifest["dtype"]).itemsize, ".idx": 34 + 12 * documents + 8 * bounds}
    sizes |= {".mask": -(-tokens // 8)} if "loss_on" in manifest else {}
    return manifest if all(file_size(output + suffix) == size for suffix, size in sizes.items()) else None


def _refuse_foreign(output: str, parts_dir: Path, sources: list[str]) -> None:
    """Refuse to replace token files of other inputs."""
    manifest = read_manifest(output)
    ours = "key" in manifest or parts_dir.exists()
    if manifest.get("inputs", sources) != sources:
        raise ValueError(
            f"{output}.bin holds {manifest.get('documents')} documents of other inputs ({manifest['inputs'][0]}, ...): "
            "move it, or choose another output"
        )
    for suffix in (".bin", ".idx", ".json"):
        if Path(output + suffix).exists() and not ours:
            raise ValueError(f"{output}{suffix} exists and was not made by prepare: move it, or choose another output")
