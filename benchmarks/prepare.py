"""Tokenisation of JSON lines: `python -m benchmarks.prepare [MEGABYTES]` writes results/prepare_*.json.

The corpus is the Python source on this machine. `prepare` is compared, with equal workers, with the tokenizers
library's own batch call on as many threads, which writes nothing, and with a pool of processes that works as
Megatron-LM's tools/preprocess_data.py does: one document at a time, whose ids the main process writes. Where `datasets`
is installed, its `map(batched=True)` is measured too.

Every way is a program of its own. Its seconds include imports and the start of workers.
"""

import importlib.util
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

from benchmarks.measure import write_result
from distill_nemo.data.stdlib_corpus import stdlib_modules, train_tokenizer

MEGABYTES, ROUNDS = 200, 3
VOCABULARIES = (2048, 150_000)
OURS = """
import sys
from distill_nemo.data.prepare import prepare
prepare([sys.argv[1]], sys.argv[3], sys.argv[2], num_workers=int(sys.argv[4]), progress=False)
"""
BATCH_CALL = """
import itertools, json, sys
from tokenizers import Tokenizer
tokenizer = Tokenizer.from_file(sys.argv[2] + "/tokenizer.json")
with open(sys.argv[1], "rb") as file:
    for lines in itertools.batched(file, 1000):
        tokenizer.encode_batch_fast([json.loads(line)["text"] for line in lines], add_special_tokens=False)
"""
MEGATRON = """
import json, multiprocessing, sys
def start():
    global tokenizer
    from transformers import PreTrainedTokenizerFast
    tokenizer = PreTrainedTokenizerFast.from_pretrained(sys.argv[2])
def encode(line):
    return tokenizer(json.loads(line)["text"], add_special_tokens=False).input_ids + [tokenizer.eos_token_id]
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
lines.map(lambda rows: {"ids": tokenizer(rows["text"]).input_ids}, batched=True, num_proc=int(sys.argv[4]))
"""
WAYS = {"distill-nemo": OURS, "batch call of tokenizers": BATCH_CALL, "pool as in Megatron-LM": MEGATRON}
if importlib.util.find_spec("datasets"):
    WAYS["datasets.map"] = MAP


def texts() -> Iterator[str]:
    """Yield the Python files of the standard library and of the installed packages."""
    yield from (path.read_text(encoding="utf-8", errors="replace") for path in stdlib_modules())
    for path in sorted(Path(sysconfig.get_path("purelib")).rglob("*.py")):
        yield path.read_text(encoding="utf-8", errors="replace")


def write_corpus(path: Path, megabytes: int) -> int:
    """Write about so many megabytes of JSON lines, or all there are. Return the bytes."""
    size = 0
    with path.open("w") as file:
        for text in texts():
            size += file.write(json.dumps({"text": text}) + "\n") if text.strip() else 0
            if size > megabytes * 1e6:
                break
    return size


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


def main(megabytes: int) -> None:
    """Measure all ways in turns."""
    workers, rows = len(os.sched_getaffinity(0)), []
    with tempfile.TemporaryDirectory() as directory:
        corpus = Path(directory) / "corpus.jsonl"
        size = write_corpus(corpus, megabytes)
        for vocabulary in VOCABULARIES:
            tokenizer = Path(directory) / f"tokenizer_{vocabulary}"
            train_tokenizer(stdlib_modules(), tokenizer, vocabulary)
            rounds = [{way: seconds_of(WAYS[way], corpus, tokenizer, workers) for way in WAYS} for _ in range(ROUNDS)]
            for way in WAYS:
                medians = {name: statistics.median(one[way][name] for one in rounds) for name in rounds[0][way]}
                rows.append({"vocabulary": vocabulary, "way": way, **medians})
                print(rows[-1], flush=True)
    write_result("prepare", {"bytes": size, "workers": workers, "repeats": ROUNDS, "rows": rows})


if __name__ == "__main__":
    main(int(sys.argv[1]) if sys.argv[1:] else MEGABYTES)
