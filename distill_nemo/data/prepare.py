"""Text -> tokens: Megatron's `.bin/.idx`, made by many processes, in parts that survive an interruption.

The input is cut into the same parts however many workers there are. A worker turns part i into
`<output>.parts/i.bin` (tokens), `i.len` (tokens of each document) and, last, `i.json`. When all parts are there they
are joined in order, so the result does not depend on the number of workers or on interruptions.
"""

import itertools
import multiprocessing
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from distill_nemo.data.manifest import pack_vocabulary, read_manifest
from distill_nemo.data.parts import (
    MAX_LISTED,
    Part,
    digest,
    file_size,
    make_part,
    read_part,
    start_worker,
    write_json,
)
from distill_nemo.data.readers import Piece, cut, find_files
from distill_nemo.data.tokenizer import TokenizerFacts, open_tokenizer

PART_BYTES = 4 << 20  # of input, at least: seconds of work for one process
MAX_PARTS = 10_000  # about; beyond, parts grow


@dataclass(frozen=True)
class PrepareResult:
    """What `prepare` made. `bad_records` were skipped."""

    documents: int
    tokens: int
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
) -> PrepareResult:
    """Tokenise documents into `<output>.bin`, `<output>.idx` and `<output>.json` (the manifest).

    Documents keep the order of the inputs; empty ones are left out. No special token is added but the end of document.
    Run again after an interruption, it makes the parts that are missing; run again after success, it does nothing.

    Args:
        inputs: files, directories or globs, see `find_files`. A text file is one document.
        output: path prefix of the token files.
        tokenizer: a Hugging Face tokenizer directory. Code in it is not run.
        text_key: JSONL key or parquet column of the text.
        append_eod: end every document with the tokenizer's eos token.
        num_workers: processes; None: one per available core.
        max_bad_records: how many may be skipped before the job fails.
        progress: show progress (a bar, or plain lines when stderr is not a terminal).

    Raises:
        ValueError: no input, no such tokenizer, no end-of-document token, too many bad records, no document at all.
    """
    began = time.monotonic()
    parts_dir, manifest_path = Path(f"{output}.parts"), Path(f"{output}.json")
    if not all(inputs):
        raise ValueError("an input is empty; name files, directories or globs of text, JSONL or parquet")
    tok, tokens, snapshot = open_tokenizer(tokenizer, append_eod)
    parts = _plan(find_files(inputs), parts_dir, tok, text_key)
    key = digest([part.key for part in parts])
    done = _finished(output, key)
    if done:
        print(f"{output}.bin is complete: {done['documents']:,} documents, {done['tokens']:,} tokens; nothing to do")
        return PrepareResult(done["documents"], done["tokens"], done["bad_records"], time.monotonic() - began)
    sources = [os.path.abspath(source) for source in inputs]
    _refuse_foreign(output, parts_dir, sources)
    parts_dir.mkdir(parents=True, exist_ok=True)
    snapshot(parts_dir / "tokenizer.json")
    made, fresh = _make_parts(parts, num_workers, max_bad_records, progress)
    totals = {name: sum(part[name] for part in made) for name in ("documents", "tokens", "bad_records")}
    bad = [entry for part in made for entry in part["bad"]]
    _judge(totals, bad, max_bad_records, parts_dir)
    occurring = _join(parts, output, np.dtype(parts[0].dtype), tok.vocab_size)
    listed = {"bad": bad[:MAX_LISTED], "append_eod": append_eod, "text_key": text_key, "dtype": parts[0].dtype}
    about = {"tokenizer": tok.path, "tokenizer_sha256": tok.sha256, "vocab_size": tok.vocab_size, "eod_id": tok.eod}
    used = {"max_token_id": max(occurring), "vocabulary": pack_vocabulary({i: tokens[i] for i in occurring})}
    write_json(manifest_path, {"key": key, "inputs": sources, **about, **totals, **listed, **used})
    shutil.rmtree(parts_dir)
    seconds = time.monotonic() - began
    resumed = f" ({totals['tokens'] - fresh:,} from an earlier, interrupted run)" if fresh < totals["tokens"] else ""
    print(
        f"{output}.bin: {totals['documents']:,} documents, {totals['tokens']:,} tokens{resumed}, "
        f"{fresh / seconds:,.0f} tokens/s, {seconds:.1f} s"
    )
    return PrepareResult(**totals, seconds=seconds)


def _plan(files: list[Path], parts_dir: Path, tok: TokenizerFacts, text_key: str) -> list[Part]:
    """Consecutive pieces of about `PART_BYTES` each (huge inputs: more); depends on inputs and options alone."""
    groups: list[list[Piece]] = []
    size = 0
    part_bytes = max(PART_BYTES, sum(file.stat().st_size for file in files) // MAX_PARTS)
    for piece in itertools.chain.from_iterable(cut(file, text_key, part_bytes) for file in files):
        if not groups or size + piece.num_bytes > part_bytes:
            groups.append([])
            size = 0
        groups[-1].append(piece)
        size += piece.num_bytes
    if not groups:
        raise ValueError(f"nothing to tokenise: the {len(files)} input files are empty")
    dtype = "uint16" if tok.vocab_size < 65500 else "int32"  # Megatron's DType.optimal_dtype, without importing it
    what = [tok.sha256, tok.vocab_size, tok.eod, text_key]
    keys = [digest([what, [asdict(piece) for piece in group]]) for group in groups]
    return [
        Part(str(parts_dir / f"{i:06d}"), group, key, tok, text_key, dtype)
        for i, (group, key) in enumerate(zip(groups, keys, strict=True))
    ]


def _make_parts(parts: list[Part], num_workers: int | None, max_bad: int, progress: bool) -> tuple[list[dict], int]:
    """Make the parts that are missing. Returns every part's manifest, in order, and the tokens made now."""
    done = {part.prefix: read_part(part) for part in parts}
    todo = [part for part in parts if done[part.prefix] is None]
    workers = min(num_workers or len(os.sched_getaffinity(0)), len(todo))
    old = sum(manifest["tokens"] for manifest in done.values() if manifest)
    with _reporter(sum(part.num_bytes for part in todo), progress) as report, _mapper(workers) as run:
        for part, manifest in run(todo):
            done[part.prefix] = manifest
            report(part.num_bytes, manifest["documents"], manifest["tokens"])
            if sum(m["bad_records"] for m in done.values() if m) > max_bad:
                break  # judged by the caller, on what has been seen
    made = [manifest for manifest in done.values() if manifest]
    return made, sum(manifest["tokens"] for manifest in made) - old


@contextmanager
def _mapper(workers: int) -> Iterator[Callable[[list[Part]], Iterator[tuple[Part, dict]]]]:
    """A function that makes parts and yields each with its manifest, as it is done."""
    if workers <= 1:
        yield lambda parts: ((part, make_part(part)) for part in parts)
        return
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), start_worker)

    def run(parts: list[Part]) -> Iterator[tuple[Part, dict]]:
        futures = {pool.submit(make_part, part): part for part in parts}
        for future in as_completed(futures):
            yield futures[future], future.result()

    try:
        yield run
    except BrokenProcessPool:
        raise RuntimeError(
            "a tokenising process died (killed, perhaps for memory: lower num_workers); run the same command again to "
            "go on with the parts that are missing"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _judge(totals: dict[str, int], bad: list, max_bad: int, parts_dir: Path) -> None:
    """Report bad records; refuse too many of them, or no document at all, and remove the parts."""
    num_bad = totals["bad_records"]
    lines = [f"  {where} {problem}" for where, problem in bad[:5]] + (["  ..."] if num_bad > 5 else [])
    message = f"{num_bad} bad record{'s' * (num_bad != 1)}"
    if num_bad <= max_bad and totals["documents"]:
        if num_bad:
            print("\n".join([f"skipped {message} (max_bad_records = {max_bad}):", *lines]))
        return
    shutil.rmtree(parts_dir)
    if num_bad > max_bad:
        advice = f"more than max_bad_records = {max_bad}; mend them or raise the limit:"
        raise ValueError("\n".join([f"{message}, {advice}", *lines]))
    raise ValueError("nothing to tokenise: the inputs hold no document with text in it")


def _join(parts: list[Part], output: str, dtype: np.dtype, vocab_size: int) -> list[int]:
    """Join the parts, in order, into `<output>.bin/.idx`; a half-written file never has that name.

    Returns:
        The token ids that occur, sorted.
    """
    from distill_nemo.runtime.device import quiet_third_parties

    quiet_third_parties()
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    joined = Path(parts[0].prefix).parent / "joined"
    builder = IndexedDatasetBuilder(f"{joined}.bin", dtype=dtype.type)
    occurs = np.zeros(vocab_size, dtype=bool)
    for part in parts:  # add_index, for parts written without importing Megatron
        lengths = np.fromfile(part.prefix + ".len", dtype=np.int32)
        first = len(builder.sequence_lengths) + 1
        builder.sequence_lengths.extend(lengths.tolist())
        builder.document_indices.extend(range(first, first + len(lengths)))
        with open(part.prefix + ".bin", "rb") as file:
            while block := file.read(1 << 20):
                builder.data_file.write(block)  # pyright: ignore[reportAttributeAccessIssue]
                occurs[np.frombuffer(block, dtype)] = True
    builder.finalize(f"{joined}.idx")
    Path(f"{output}.json").unlink(missing_ok=True)  # an older manifest must not vouch for new tokens
    os.replace(f"{joined}.bin", f"{output}.bin")
    os.replace(f"{joined}.idx", f"{output}.idx")
    return np.flatnonzero(occurs).tolist()


def _finished(output: str, key: str) -> dict[str, Any] | None:
    """The manifest of a complete output of the same inputs and options; older ones do not say which tokens occur."""
    manifest = read_manifest(output)
    if manifest.get("key") != key or "vocabulary" not in manifest or not Path(f"{output}.idx").exists():
        return None
    return manifest if file_size(f"{output}.bin") == manifest["tokens"] * np.dtype(manifest["dtype"]).itemsize else None


def _refuse_foreign(output: str, parts_dir: Path, sources: list[str]) -> None:
    """Only token files of the same inputs are made anew: those of others are somebody's corpus."""
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


@contextmanager
def _reporter(total_bytes: int, show: bool) -> Iterator[Callable[[int, int, int], None]]:
    """A function (bytes, documents, tokens done) -> None that shows progress on stderr."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    documents = tokens = num_bytes = 0
    began = last = time.monotonic()
    console = Console(stderr=True)
    columns = (BarColumn(), TaskProgressColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not (show and console.is_terminal)) as bar:
        task = bar.add_task("tokenising", total=total_bytes)

        def report(new_bytes: int, new_documents: int, new_tokens: int) -> None:
            nonlocal documents, tokens, num_bytes, last
            documents, tokens, num_bytes = documents + new_documents, tokens + new_tokens, num_bytes + new_bytes
            now = time.monotonic()
            line = f"{documents:,} documents, {tokens:,} tokens, {tokens / (now - began):,.0f} tokens/s"
            bar.update(task, advance=new_bytes, description=line)
            if show and not console.is_terminal and (now - last > 10 or num_bytes == total_bytes):
                last = now
                print(f"tokenising {num_bytes / max(total_bytes, 1):.0%}: {line}", file=sys.stderr, flush=True)

        yield report
