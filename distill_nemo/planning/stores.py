"""Print the plan of a job that writes a teacher store, for `nemo distill teacher plan`. Builds no model.

The job has one model, without gradients: in its `PlannedRun` the teacher has the student's place.
"""

import math
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from distill_nemo.checkpoint.hub_models import described
from distill_nemo.checks import check_job
from distill_nemo.config import ParallelismConfig, RunConfig, StoreConfig, StudentConfig, TrainingConfig
from distill_nemo.data.corpora import check_corpora
from distill_nemo.data.token_files import documents_apart
from distill_nemo.fields import require
from distill_nemo.models.architecture import Architecture, Models
from distill_nemo.models.megatron import transformer_config
from distill_nemo.models.resolve import resolve
from distill_nemo.planning.activations import forward_workspace
from distill_nemo.planning.compute import stage_flops
from distill_nemo.planning.corpora import parts_of_blend
from distill_nemo.planning.gpus import NODE, Gpu, check_utilisation
from distill_nemo.planning.memory import Memory, chunk_rows, columns
from distill_nemo.planning.parameters import rank_layers, total_parameters
from distill_nemo.planning.planned import PlannedRun
from distill_nemo.planning.report import GB, GFLOP, fit_text, heading
from distill_nemo.teacher_store.manifest import Manifest
from distill_nemo.teacher_store.shards import shared_row_bytes
from distill_nemo.teacher_store_jobs.manifest import sized_manifest
from distill_nemo.teacher_store_jobs.teacher_run import encoded_tokens
from distill_nemo.training.entry import fitted


@dataclass(frozen=True)
class PlannedStore:
    """The writing of a store.

    Args:
        run: the teacher and its layout.
        manifest: of the store, without hashes.
        valid_share: share of the tokens that count.
    """

    run: PlannedRun
    manifest: Manifest
    valid_share: float

    @property
    def teacher(self) -> Architecture:
        """The teacher's architecture."""
        return self.run.models.student

    @property
    def token_bytes(self) -> float:
        """Bytes of a token that counts, on usual text."""
        return shared_row_bytes(self.manifest, "tokens") + self.manifest.coding.usual_bytes

    @property
    def most_token_bytes(self) -> float:
        """Bytes of a token that counts, of which all draws are different."""
        coding = self.manifest.coding
        rows = {"tokens": 1, "pairs": min(coding.num, coding.vocab_size)}
        own = sum(column.row_bytes * rows[column.axis] for column in coding.columns.values())
        return shared_row_bytes(self.manifest, "tokens") + own

    @property
    def num_bytes(self) -> float:
        """Bytes of the complete store, on usual text."""
        per_window = shared_row_bytes(self.manifest, "windows") + shared_row_bytes(self.manifest, "bounds")
        per_window += self.valid_share * self.manifest.sequence_length * self.token_bytes
        output_layer = self.teacher.vocab_size * self.teacher.hidden_size * self.run.item
        return self.manifest.num_windows * per_window + (output_layer if self.manifest.codec == "hidden" else 0)

    @property
    def num_passes(self) -> int:
        """Micro batches that a replica's pipeline takes the time of. In a round each replica writes a shard."""
        rounds = -(-self.manifest.num_shards // self.run.data_parallel_size)
        windows = len(self.manifest.windows_of(0))
        filling = self.run.config.parallelism.pipeline_model_parallel_size - 1
        return rounds * (-(-windows // self.run.config.training.micro_batch_size) + filling)


def print_store_plan(
    config: StoreConfig, world_size: int, gpu: Gpu, utilisation: float, transformer_engine: bool
) -> None:
    """Print what the writing of a store needs.

    Args:
        config: the job, from the command line.
        world_size: number of ranks, with one GPU each.
        gpu: model of the GPUs.
        utilisation: share of the GPU's peak that is reached, above 0 and at most 1.
        transformer_engine: True if its layers are used.

    Raises:
        ValueError: for a config that the job would refuse; after printing, if the teacher does not fit the GPUs, with
            a layout that would, or the store does not fit the disk.
    """
    check_utilisation(utilisation)
    store, memory_bytes = planned_store(config, world_size, transformer_engine=transformer_engine), gpu.memory_gb * GB
    free = _free_bytes(Path(config.output))
    print(_report(config, store, gpu, utilisation, free))
    too_much = largest_memory(store).total - memory_bytes
    if too_much > 0:
        fitting = next(_fitting(config, store, memory_bytes), None)
        advice = f"what would fit: {fitting}" if fitting else "take more ranks or GPUs with more memory"
        raise ValueError(
            f"does not fit: {too_much / GB:.1f} GB too much on a {gpu.name} of {gpu.memory_gb:g} GB; {advice}"
        )
    require(
        store.num_bytes <= free,
        f"does not fit: {(store.num_bytes - free) / GB:,.1f} GB too much for the disk of {config.output}; take another "
        "disk, fewer windows, or a smaller codec",
    )


def planned_store(
    config: StoreConfig, world_size: int, on_gpu: bool = True, transformer_engine: bool = True
) -> PlannedStore:
    """Return the job, planned.

    Raises:
        ValueError: for a config that it would refuse; without `windows`, if `data.train` cannot be read.
    """
    check_job(config, world_size)
    if config.windows is None:
        try:
            check_corpora(config.data)
        except ValueError as error:
            raise ValueError(f"{error}. To plan without the data, set windows, the number of samples") from None
    try:
        model = resolve(described(config).teacher)
    except ValueError as error:
        hint = ". A plan reads its config.json only: copy that" if "not found" in str(error) else ""
        raise ValueError(f"{error}{hint}") from None
    model = fitted("teacher", model, config.data.sequence_length, documents_apart(config.data), config.parallelism)
    training = TrainingConfig(micro_batch_size=config.micro_batch_size, dtype=config.dtype)
    run = RunConfig(config.output, StudentConfig(), None, data=config.data, training=training)
    run.parallelism = config.parallelism
    planned = PlannedRun(run, Models(model, None), world_size, on_gpu, transformer_engine)
    dtype = torch.bfloat16 if planned.item == 2 else torch.float32
    transformer_config(model, config.parallelism, dtype)
    parts = parts_of_blend(run)
    valid_share = (
        sum(part.share * (1.0 if part.valid_share is None else part.valid_share) for part in parts) if parts else 1.0
    )
    return PlannedStore(planned, sized_manifest(config, model, dtype), valid_share)


def largest_memory(store: PlannedStore) -> Memory:
    """Return the memory of the pipeline rank that needs most."""
    ranks = range(store.run.config.parallelism.pipeline_model_parallel_size)
    return max((rank_memory(store, rank) for rank in ranks), key=lambda memory: memory.total)


def rank_memory(store: PlannedStore, rank: int) -> Memory:
    """Return the memory of a pipeline rank: weights, and one layer's forward pass or a chunk's targets."""
    run, par = store.run, store.run.config.parallelism
    layers = set(rank_layers(store.teacher, par, rank))
    memory = Memory(rank, {"weights": run.item * run.student(rank).total})
    memory.workspace["a layer's forward"] = max(forward_workspace(run, store.teacher, layer) for layer in layers)
    if run.is_last(rank):
        memory.workspace["the targets"] = _targets_workspace(store)
    memory.activations = dict.fromkeys(memory.workspace, 0.0)
    return memory


def _targets_workspace(store: PlannedStore) -> float:
    """Return the bytes of the last hidden states, those of the tokens that count, a chunk's logits, and a part in fp64.

    `losses/stored/teacher.py` computes the part's distance from its largest logit, its exponential, the product of
    both, and that product without padding and its mask. Another temperature than 1 takes one more exponential.
    """
    run = store.run
    whole = run.tokens if run.config.parallelism.sequence_parallel else 0
    hidden = run.item * store.teacher.hidden_size * (run.split_tokens + whole + run.tokens)
    numbers = 4 * 8 + 1 + (0 if store.manifest.temperature == 1 else 8)
    tokens, width = chunk_rows(run), columns(run)
    return hidden + (4 * tokens + numbers * encoded_tokens(tokens, width, run.on_gpu)) * width


def token_flops(store: PlannedStore) -> list[float]:
    """Return the operations of a token's forward pass on each pipeline rank."""
    stages = range(store.run.config.parallelism.num_stages)
    return [sum(stage_flops(store.run, store.teacher, stage, True)[::2]) for stage in stages]


def seconds(store: PlannedStore, tflops: float, utilisation: float) -> float:
    """Return the time of all forward passes, at the pace of the slowest pipeline rank."""
    config = store.run.config
    tokens = config.training.micro_batch_size * config.data.sequence_length
    ranks = config.parallelism.tensor_model_parallel_size * config.parallelism.context_parallel_size
    return store.num_passes * max(token_flops(store)) * tokens / (tflops * 1e12 * utilisation * ranks)


def _free_bytes(output: Path) -> int:
    """Return the bytes that a store may take at a path: free ones, and those of shards that are there."""
    there = next(path for path in (output.absolute(), *output.absolute().parents) if path.is_dir())
    return shutil.disk_usage(there).free + sum(path.stat().st_size for path in output.glob("*.safetensors"))


def _fitting(config: StoreConfig, store: PlannedStore, memory_bytes: float) -> Iterator[str]:
    """Yield layouts of the same ranks that fit, the least divided first."""
    run = store.run
    powers = [2**i for i in range(store.teacher.num_layers.bit_length())]
    sizes = [(tensor, pipeline) for tensor in (1, 2, 4, NODE) for pipeline in powers]
    for tensor, pipeline in sorted(sizes, key=math.prod):
        par = replace(
            ParallelismConfig(tensor, pipeline, sequence_parallel=tensor > 1),
            expert_model_parallel_size=config.parallelism.expert_model_parallel_size,
            context_parallel_size=config.parallelism.context_parallel_size,
        )
        try:
            changed = replace(config, parallelism=par, micro_batch_size=1)
            planned = planned_store(changed, run.world_size, run.on_gpu, run.transformer_engine)
        except ValueError:
            continue
        if largest_memory(planned).total <= memory_bytes:
            names = [name for name, value in vars(par).items() if value != vars(config.parallelism)[name]]
            smaller = ["micro_batch_size=1"] if config.micro_batch_size > 1 else []
            yield " ".join([*(f"parallelism.{name}={vars(par)[name]}" for name in names), *smaller])


def _report(config: StoreConfig, store: PlannedStore, gpu: Gpu, utilisation: float, free: int) -> str:
    parts = (
        heading(config.output, store.run, gpu),
        _store_rows(config, store, free),
        _memory_rows(store, gpu),
        _time_rows(store, gpu, utilisation),
    )
    return "\n\n".join("\n".join(part) for part in parts)


def _store_rows(config: StoreConfig, store: PlannedStore, free: int) -> list[str]:
    manifest, replicas = store.manifest, store.run.data_parallel_size
    idle = max(replicas - manifest.num_shards, 0)
    few = f"; {idle} of {replicas} replicas idle: lower shard_windows" if idle else ""
    what = {
        "sampled": f"{manifest.num} draws at temperature {manifest.temperature:g}",
        "top_k": f"{manifest.num} ids at temperature {manifest.temperature:g}",
        "hidden": f"{manifest.num:,} channels",
    }[manifest.codec]
    usual = f"on usual text, where a teacher has 2 to 3 nats; at most {store.most_token_bytes:,.1f}"
    always = "on every text"
    enough = "fits" if store.num_bytes <= free else "does not fit"
    length = manifest.sequence_length
    return [
        f"store of {manifest.codec} targets, {what}",
        f"  {'windows':26}{manifest.num_windows:14,}   of {length:,} tokens, of which {store.valid_share:.0%} count",
        f"  {'shards':26}{manifest.num_shards:14,}   of {len(manifest.windows_of(0)):,} windows{few}",
        f"  {'bytes a token that counts':26}{store.token_bytes:14,.1f}   "
        + (usual if manifest.codec == "sampled" else always),
        f"  {'GB':26}{store.num_bytes / GB:14,.2f}   of {free / GB:,.1f} free at {config.output}: {enough}",
    ]


def _memory_rows(store: PlannedStore, gpu: Gpu) -> list[str]:
    memory, stages = largest_memory(store), store.run.config.parallelism.pipeline_model_parallel_size
    where = f" (pipeline rank {memory.rank} of {stages})" if stages > 1 else ""
    about = {
        "weights": f"of {total_parameters(store.teacher):,} parameters, {store.run.student(memory.rank).total:,} here",
        "a layer's forward": f"{store.run.tokens:,} tokens",
        "the targets": f"logits of {chunk_rows(store.run):,} tokens at a time, an eighth of them in fp64",
    }
    rows = memory.stays | {memory.moment: memory.workspace[memory.moment]}
    return [
        f"memory of the fullest rank{where}, GB",
        *(f"  {part:26}{size / GB:14.2f}   {about[part]}" for part, size in rows.items()),
        f"  {'total':26}{memory.total / GB:14.2f}   {fit_text(memory, gpu)}",
    ]


def _time_rows(store: PlannedStore, gpu: Gpu, utilisation: float) -> list[str]:
    manifest, hours = store.manifest, seconds(store, gpu.bf16_tflops, utilisation) / 3600
    tokens = manifest.num_windows * manifest.sequence_length
    return [
        f"time, if GPUs reach {utilisation:g} of their peak (assumed: utilisation=)",
        f"  {'GFLOP a token':26}{sum(token_flops(store)) / GFLOP:14,.1f}   one forward pass",
        f"  {'hours':26}{hours:14,.2f}   {tokens:,} tokens",
        f"  {'GPU-hours':26}{hours * store.run.world_size:14,.1f}",
        "not included: communication, the targets' own operations, reading and writing; assumes experts equally busy",
    ]
