"""Tokenisation of JSON lines: `python -m benchmarks.prepare [MEGABYTES [ROUNDS [TOKENIZER]]]` writes its results.

The small tokenizer has 2,048 ids. The large one is the byte-level one in the directory TOKENIZER, such as Qwen's, or is
trained for 150,000 ids.

The corpus is the Python source on this machine, as texts, and as conversations of four messages with a template without
generation markers. `prepare` is compared, with equal workers, with the tokenizers library's own batch call on as many
threads, which writes nothing, and with a pool of processes that works as Megatron-LM's tools/preprocess_data.py does:
one document at a time, whose ids the main process writes. Where `datasets` is installed, its `map(batched=True)` is
measured too. None of these finds out which tokens of a conversation count, and the batch call renders it by hand. One
more `map` does, with `apply_chat_template(return_assistant_tokens_mask=True)` and a template with markers, as TRL does.

Every way is a program of its own. Its seconds include imports and the start of workers.
"""

import importlib.util
import itertools
import json
import os
import resource
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from transformers import PreTrainedTokenizerFast

from benchmarks.measure import write_result
from distill_nemo.data.stdlib_corpus import stdlib_modules, train_tokenizer

MEGABYTES, ROUNDS = 200, 3
SIZES = {"small": 2048, "large": 150_000}
CASES = (("texts", "small"), ("texts", "large"), ("chats", "large"))
TRAINING_BYTES = 120_000_000  # of text for the large tokenizer; the standard library's is used up after 42,000 ids
MESSAGE_CHARACTERS = 1000
CHATML = """\
{%- for m in messages -%}
{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}"""
MARKED = CHATML.replace(
    "{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}",
    """\
{{ '<|im_start|>' + m.role + '\\n' }}
{%- if m.role == 'assistant' -%}{%- generation -%}{{ m.content + '<|im_end|>' }}{%- endgeneration -%}{{ '\\n' }}
{%- else -%}{{ m.content + '<|im_end|>\\n' }}{%- endif -%}""",
)
OURS = """
import sys
from distill_nemo.data.prepare import prepare
prepare([sys.argv[1]], sys.argv[3], sys.argv[2], num_workers=int(sys.argv[4]), progress=False, max_bad_records=1000)
"""
BATCH_CALL = """
import itertools, json, sys
from tokenizers import Tokenizer
tokenizer = Tokenizer.from_file(sys.argv[2] + "/tokenizer.json")
def text_of(record):
    if "text" in record:
        return record["text"]
    return "".join(f"<|im_start|>{m['role']}\\n{m['content']}<|im_end|>\\n" for m in record["messages"])
with open(sys.argv[1], "rb") as file:
    for lines in itertools.batched(file, 1000):
        tokenizer.encode_batch_fast([text_of(json.loads(line)) for line in lines], add_special_tokens=False)
"""
MEGATRON = """
import json, multiprocessing, sys
def start():
    global tokenizer
    from transformers import PreTrainedTokenizerFast
    tokenizer = PreTrainedTokenizerFast.from_pretrained(sys.argv[2])
def encode(line):
    record = json.loads(line)
    if "text" in record:
        return tokenizer(record["text"], add_special_tokens=False).input_ids + [tokenizer.eos_token_id]
    return tokenizer(tokenizer.apply_chat_template(record["messages"], tokenize=False)).input_ids
if __name__ == "__main__":
    import numpy, torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
    builder = IndexedDatasetBuilder(sys.argv[3] + ".bin", dtype=numpy.int32)
    with open(sys.argv[1], "rb") as file, multiprocessing.Pool(int(sys.argv[4]), start) as pool:
        for ids in pool.imap(encode, file, 32):
            builder.add_document(torch.tensor(ids), [len(ids)])
    builder.finalize(sys.argv[3] + ".idx")
"""
MAP = """
import sys
import datasets
from transformers import PreTrainedTokenizerFast
tokenizer = PreTrainedTokenizerFast.from_pretrained(sys.argv[2])
lines = datasets.load_dataset("json", data_files=sys.argv[1], split="train", cache_dir=sys.argv[3])
def encode(rows):
    texts = rows["text"] if "text" in rows else tokenizer.apply_chat_template(rows["messages"], tokenize=False)
    return {"ids": tokenizer(texts).input_ids}
lines.map(encode, batched=True, num_proc=int(sys.argv[4]))
"""
MASKS = """
import sys
import datasets
from transformers import PreTrainedTokenizerFast
tokenizer = PreTrainedTokenizerFast.from_pretrained(sys.argv[2])
template = open(sys.argv[2] + "/marked.jinja").read()
lines = datasets.load_dataset("json", data_files=sys.argv[1], split="train", cache_dir=sys.argv[3])
def encode(rows):
    found = tokenizer.apply_chat_template(
        rows["messages"], chat_template=template, return_dict=True, return_assistant_tokens_mask=True
    )
    return {"ids": found["input_ids"], "mask": found["assistant_masks"]}
lines.map(encode, batched=True, num_proc=int(sys.argv[4]))
"""
MASKED = "datasets.map with masks of answers"  # of conversations only
WAYS = {"distill-nemo": OURS, "batch call of tokenizers": BATCH_CALL, "pool as in Megatron-LM": MEGATRON}
if importlib.util.find_spec("datasets"):
    WAYS |= {"datasets.map": MAP, MASKED: MASKS}


def sources() -> list[Path]:
    """Return the Python files of the standard library and of the installed packages."""
    return [*stdlib_modules(), *sorted(Path(sysconfig.get_path("purelib")).rglob("*.py"))]


def chats(text: str) -> Iterator[dict]:
    """Yield conversations of two questions and their answers, which are pieces of a text.

    They begin with no blank, which would be one token with the line break before it.
    """
    pieces = (text[at : at + MESSAGE_CHARACTERS].strip() for at in range(0, len(text), MESSAGE_CHARACTERS))
    for four in itertools.batched(filter(None, pieces), 4):
        if len(four) == 4:
            roles = itertools.cycle(("user", "assistant"))
            yield {"messages": [{"role": next(roles), "content": piece} for piece in four]}


def write_corpus(path: Path, kind: str, megabytes: int) -> int:
    """Write about so many megabytes of JSON lines, or all there are. Return the bytes."""
    size = 0
    with path.open("w") as file:
        for text in filter(str.strip, (path.read_text(encoding="utf-8", errors="replace") for path in sources())):
            for record in [{"text": text}] if kind == "texts" else chats(text):
                size += file.write(json.dumps(record) + "\n")
            if size > megabytes * 1e6:
                break
    return size


def write_tokenizer(directory: Path, size: str, source: str | None) -> int:
    """Write a tokenizer with a chat template. Return the number of its ids.

    Args:
        directory: where to write.
        size: "small" or "large".
        source: directory of the large tokenizer; None: it is trained.
    """
    if size == "large" and source is not None:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(source)
    else:
        files = stdlib_modules() if size == "small" else sources()
        ends = itertools.accumulate(path.stat().st_size for path in files)
        files = [path for path, end in zip(files, ends, strict=True) if end <= TRAINING_BYTES]
        train_tokenizer(files, directory, SIZES[size])
        tokenizer = PreTrainedTokenizerFast.from_pretrained(directory)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(directory)
    (directory / "marked.jinja").write_text(MARKED)
    return len(tokenizer)


def seconds_of(program: str, corpus: Path, tokenizer: Path, workers: int) -> dict[str, float]:
    """Run a program. Return the seconds and processor seconds of its processes."""
    environment = os.environ | {"RAYON_NUM_THREADS": str(workers), "TOKENIZERS_PARALLELISM": "true"}
    with tempfile.TemporaryDirectory() as output:
        arguments = [str(corpus), str(tokenizer), f"{output}/out", str(workers)]
        (Path(output) / "way.py").write_text(program)
        wall, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run(
            [sys.executable, f"{output}/way.py", *arguments], check=True, env=environment, stdout=subprocess.DEVNULL
        )
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
    processor = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"seconds": time.perf_counter() - wall, "processor_seconds": processor}


def main(megabytes: int = MEGABYTES, repeats: int = ROUNDS, *, source: str | None = None) -> None:
    """Measure all ways in turns. The results of a case are written when it is done."""
    workers, rows = len(os.sched_getaffinity(0)), []
    with tempfile.TemporaryDirectory() as directory:
        corpora = {kind: Path(directory) / f"{kind}.jsonl" for kind, _ in CASES}
        sizes = {kind: write_corpus(corpus, kind, megabytes) for kind, corpus in corpora.items()}
        tokenizers = {size: Path(directory) / size for size in SIZES}
        ids = {size: write_tokenizer(tokenizer, size, source) for size, tokenizer in tokenizers.items()}
        for kind, size in CASES:
            case = {"kind": kind, "bytes": sizes[kind], "tokenizer": size, "vocabulary": ids[size]}
            ways = {way: program for way, program in WAYS.items() if way != MASKED or kind == "chats"}
            rounds = [
                {way: seconds_of(program, corpora[kind], tokenizers[size], workers) for way, program in ways.items()}
                for _ in range(repeats)
            ]
            for way in ways:
                medians = {name: statistics.median(one[way][name] for one in rounds) for name in rounds[0][way]}
                rows.append({**case, "way": way, **medians})
            write_result("prepare", {"workers": workers, "repeats": repeats, "rows": rows})


if __name__ == "__main__":
    main(*map(int, sys.argv[1:3]), source=next(iter(sys.argv[3:]), None))
