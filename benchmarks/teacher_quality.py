"""Train the quickstart's student from stores of every kind: `python -m benchmarks.teacher_quality runs/quickstart`.

`make quickstart` comes before it. Every way trains the same student, from the same initial weights, on the same windows
in the same order; only the targets differ. Three seeds of weights and order share the stores. Finished runs are kept
in `<root>/quality`, and the same command goes on with the others. It needs 20 minutes of one core.
"""

import argparse
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.measure import write_result
from distill_nemo.config import CorpusConfig, RunConfig, StoreConfig, StudentConfig, TeacherConfig
from distill_nemo.data.token_files import write_index
from distill_nemo.runtime.device import setup_device
from distill_nemo.teacher_store.codecs.codec import Arrays
from distill_nemo.teacher_store.reader import TeacherStore
from distill_nemo.teacher_store.writer import WrittenShards, claim_shard, create_store, finish_store

LENGTH, STORE_SEED, HELD_OUT = 128, 1234, 256  # windows
PLAIN, ONLINE = "LM loss alone", "full KL, online"
HIDDEN, RENORMALISED = "hidden", "top-12, renormalised"
STORES: dict[str, dict[str, Any]] = {  # fields of `StoreConfig`
    "top-12 with tail": {"codec": "top_k", "top_k": 12},
    "top-50 with tail": {"codec": "top_k", "top_k": 50},
    "sampled, N = 12": {"codec": "sampled", "draws": 12},
    "sampled, N = 50": {"codec": "sampled", "draws": 50},
    HIDDEN: {"codec": "hidden"},
}
WAYS = [PLAIN, RENORMALISED, *STORES, ONLINE]


class Comparison:
    """Runs of the quickstart's student.

    Args:
        root: the quickstart's directory.
        steps: of a run.
    """

    def __init__(self, root: Path, steps: int) -> None:
        self.root, self.steps, self.directory = root, steps, root / "quality" / f"{steps} steps"
        self.teacher = root / "teacher" / "student"

    def write_stores(self) -> None:
        """Write what is missing of the stores and of the same windows as plain text."""
        from distill_nemo.teacher_store_jobs.write import run_store

        self.directory.mkdir(parents=True, exist_ok=True)
        teacher, data = TeacherConfig(checkpoint=str(self.teacher)), CorpusConfig([str(self.root / "data/train")])
        data.sequence_length = LENGTH
        for way, fields in STORES.items():
            config = StoreConfig(str(self._corpus(way)), teacher, data, windows=16 * self.steps, seed=STORE_SEED)
            run_store(replace(config, micro_batch_size=8, **fields))
        renormalise(self._corpus("top-12 with tail"), self._corpus(RENORMALISED))
        write_packs(self._corpus(HIDDEN), self._corpus(PLAIN))

    def row(self, way: str, seed: int) -> dict[str, Any]:
        """Return the held-out metrics of a run, which is trained unless it has been."""
        from distill_nemo.training.entry import run_config

        output = self.directory / f"{way}, seed {seed}"
        kept = output.with_suffix(".json")
        if not kept.exists():
            run_config(self._config(way, seed, output))
            row = {"way": way, "seed": seed} | self._measured(output / "student")
            kept.write_text(json.dumps(row) + "\n")
            shutil.rmtree(output)
            print(json.dumps(row), flush=True)
        return json.loads(kept.read_text())

    def _measured(self, student: Path) -> dict[str, float]:
        """Return the means over held-out windows, beside the teacher itself."""
        from distill_nemo.training.evaluate import evaluate_student

        of, against = StudentConfig(checkpoint=str(student)), TeacherConfig(checkpoint=str(self.teacher))
        means = evaluate_student(of, str(self.root / "data/valid"), against, LENGTH, HELD_OUT)
        return {name: means[name] for name in ("lm_loss", "forward_kl", "top1_agreement")}

    def bytes_of_a_token(self, way: str) -> float | None:
        """Return what the store takes on disk; None if the way needs none."""
        if way in (PLAIN, ONLINE):
            return None
        store = TeacherStore(self._corpus(way))
        return sum(path.stat().st_size for path in store.sums) / store.num_tokens

    def _corpus(self, way: str) -> Path:
        return self.directory / f"{PLAIN if way == ONLINE else way}, targets"

    def _config(self, way: str, seed: int, output: Path) -> RunConfig:
        """Return the quickstart's run of the student with another corpus and seed."""
        from distill_nemo.executors import run_config_of
        from recipes import quickstart

        config = run_config_of(quickstart(self.steps, str(self.root), seed))
        config.output_dir, config.data.train = str(output), [str(self._corpus(way))]
        config.training = replace(config.training, data_seed=seed, eval_interval=self.steps, eval_batches=1)
        config.checkpoint.save_interval = self.steps
        config.distillation.top_k = 12 if way == RENORMALISED else STORES.get(way, {}).get("top_k")
        if way != ONLINE:
            config.teacher = None
        return config


def renormalise(store: Path, output: Path) -> None:
    """Write a `top_k` store again, as if the teacher gave other tokens than the k most likely no probability."""
    whole = TeacherStore(store)
    create_store(output, whole.manifest)
    for shard in WrittenShards(output, whole.manifest).missing():
        writer = claim_shard(output, whole.manifest, shard)
        assert writer is not None, "no other process writes it"
        with writer:
            for number in writer.windows:
                writer.append(_without_tail(whole.window(number, True)))
            writer.commit()
    finish_store(output)


def _without_tail(window: Arrays) -> Arrays:
    logprobs, tail = window["logprobs"], window["tail"]
    head = np.log(np.exp(logprobs.astype(np.float64)).sum(1, keepdims=True))
    return window | {"logprobs": (logprobs - head).astype(np.float32), "tail": np.full_like(tail, -np.inf)}


def write_packs(store: Path, prefix: Path) -> None:
    """Write a store's windows as packs of one document, which a run takes in the same order."""
    whole = TeacherStore(store)
    tokens = np.stack([whole.window(number, False)["tokens"] for number in range(len(whole))]).astype(np.uint16)
    Path(f"{prefix}.bin").write_bytes(tokens.tobytes())
    bounds = np.arange(len(tokens) + 1)
    write_index(Path(f"{prefix}.idx"), np.full(len(tokens), LENGTH + 1, np.int32), "uint16", bounds)
    Path(f"{prefix}.json").write_text(json.dumps({"pack": LENGTH}) + "\n")


def main() -> None:
    """Train what has not been trained, and write benchmarks/results/teacher_quality_*.json."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.teacher_quality", description=__doc__)
    parser.add_argument("root", type=Path, help="the quickstart's directory")
    parser.add_argument("--steps", type=int, default=80, help="of 16 windows of 128 tokens")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--ways", nargs="+", default=WAYS, choices=WAYS)
    arguments = parser.parse_args()
    setup_device()
    comparison = Comparison(arguments.root.absolute(), arguments.steps)
    comparison.write_stores()
    rows = [comparison.row(way, seed) for seed in arguments.seeds for way in arguments.ways]
    sizes = {way: comparison.bytes_of_a_token(way) for way in arguments.ways}
    write_result("teacher_quality", {"steps": arguments.steps, "bytes": sizes, "rows": rows})


if __name__ == "__main__":
    main()
