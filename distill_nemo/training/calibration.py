"""Calibration, the first stage of a run with quantised activations: their ranges, measured on its first samples.

They are stored in the output directory, with what they were made from. A run that starts again reads them there.
"""

import json
import math
import time
from pathlib import Path
from typing import Any

from distill_nemo.evaluation import evaluate
from distill_nemo.models.quantizers.calibrate import amaxes_of, is_calibrated, measuring, set_amaxes
from distill_nemo.runtime.files import read_object, write_atomically
from distill_nemo.runtime.process_groups import of_all_ranks, rank
from distill_nemo.training.loop import Loop

FILE = "calibration.json"
PROGRESS_SECONDS = 10.0
DECIDING = {  # fields of a run that amaxes follow from, beside the contents of student and data
    "training": ("global_batch_size", "seed", "data_seed", "dtype"),
    "data": ("split", "sequence_length", "reset_at_documents"),
}


def calibrate(loop: Loop) -> None:
    """Set the amaxes of activations, if they have none: those in the output directory, or new ones. Collective."""
    chunks, path = loop.train_state.unwrapped, Path(loop.config.output_dir) / FILE
    if all(of_all_ranks(is_calibrated(chunks))):
        return
    made_from = _made_from(loop.writer.record)
    stored = of_all_ranks(_stored(path, made_from) if rank() == 0 else None)[0]
    own = amaxes_of(chunks)
    if stored is not None and all(of_all_ranks(own.keys() <= stored.keys())):
        set_amaxes(chunks, stored)
        _print(f"calibration: ranges of activations from {path}")
        return
    with measuring(chunks):
        _run(loop)
    everywhere = of_all_ranks(amaxes_of(chunks))
    if rank() == 0:
        amaxes = {name: amax for part in everywhere for name, amax in part.items()}
        write_atomically(path, json.dumps({"made_from": made_from, "amaxes": amaxes}, indent=1))


def _run(loop: Loop) -> None:
    """Run the models on the first samples, as in training. Whole global batches, so that layouts see the same."""
    train, shown = loop.config.training, time.monotonic()
    batches = loop.batches(loop.train_data, 0)
    samples = loop.config.quantization.calibration_samples
    count = -(-samples // train.global_batch_size)
    _print(f"calibration: ranges of activations on {count * train.global_batch_size} samples")
    for done in range(count):
        if time.monotonic() - shown > PROGRESS_SECONDS:
            _print(f"calibration: {done * train.global_batch_size} samples")
            shown = time.monotonic()
        evaluate(
            loop.train_state.chunks,
            batches,
            num_microbatches=loop.num_microbatches,
            sequence_length=loop.config.data.sequence_length,
            micro_batch_size=train.micro_batch_size,
        )


def _made_from(record: dict[str, Any]) -> dict[str, Any]:
    contents = {name: record["contents"][name] for name in ("student.checkpoint", "data.train")}
    student = record["student"] | {"checkpoint": None}
    deciding = {section: {name: record[section][name] for name in names} for section, names in DECIDING.items()}
    return {"contents": contents, "student": student, "quantization": record["quantization"], **deciding}


def _stored(path: Path, made_from: dict[str, Any]) -> dict[str, float] | None:
    """Return the amaxes that were stored, or None if there are none that were made from the same."""
    if not path.is_file():
        return None
    try:
        found = read_object(path)
    except ValueError as error:
        _print(f"calibration: again: {error}")
        return None
    amaxes = found.get("amaxes")
    if found.get("made_from") != made_from or not isinstance(amaxes, dict):
        _print(f"calibration: again: {path} was made from something else")
        return None
    if not all(isinstance(amax, float) and math.isfinite(amax) and amax > 0 for amax in amaxes.values()):
        _print(f"calibration: again: {path} is damaged")
        return None
    return amaxes


def _print(message: str) -> None:
    if rank() == 0:
        print(message, flush=True)
