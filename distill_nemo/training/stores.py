"""Teacher stores that a run trains from, in place of a teacher. Checks need no torch."""

from typing import TYPE_CHECKING

from distill_nemo.config import RunConfig
from distill_nemo.data.corpora import fitting
from distill_nemo.data.token_files import named_corpora
from distill_nemo.fields import require
from distill_nemo.teacher_store.codecs.codec import Field
from distill_nemo.teacher_store.manifest import Manifest, is_store
from distill_nemo.teacher_store.output_layer import OutputLayer
from distill_nemo.teacher_store.reader import TeacherStore

if TYPE_CHECKING:
    from torch import Tensor

    from distill_nemo.models.distillation.stored_targets import StoredOutputLayer, StoredTeacher

SHARED = ("codec", "num", "temperature", "vocab_size")  # by all stores of a run
OF_HIDDEN = ("dtype", "logit_scale", "logit_softcap", "output_bias")


def stores_of(config: RunConfig) -> list[tuple[str, TeacherStore]]:
    """Return the field and the store of each store that the data of a run names.

    Raises:
        ValueError: for a store that is damaged or not complete.
    """
    named = named_corpora(config.data) if config.data.train else []
    return [(field, TeacherStore(path)) for field, path in named if is_store(path)]


def check_stores(config: RunConfig, vocab_size: int) -> Manifest | None:
    """Refuse stores that do not fit the run or each other. Return a manifest, whose codec and numbers they share.

    Args:
        config: of the run.
        vocab_size: of the student, without padding.

    Raises:
        ValueError: naming the store, and what would fit.
    """
    stores = stores_of(config)
    if not stores:
        return None
    (field, first), *others = stores
    require(
        config.teacher is None,
        f"{field}: {first.path} holds a teacher's targets, and a run has a store or a teacher: set teacher=None, or "
        "name token files",
    )
    require(
        any(each == "data.train" for each, _ in stores),
        f"{field}: {first.path} is a store, but data.train names none, so nothing is learnt from a teacher: name the "
        "token files that it was written from",
    )
    for field, store in others:
        _check_shared(field, store, first)
    for field, store in stores:
        _check_fits(field, store, config, vocab_size)
    return first.manifest


def _check_shared(field: str, store: TeacherStore, first: TeacherStore) -> None:
    names = SHARED if first.manifest.codec != "hidden" else SHARED + OF_HIDDEN
    values = {name: (getattr(store.manifest, name), getattr(first.manifest, name)) for name in names}
    apart = [f"{name}={ours}" for name, (ours, theirs) in values.items() if ours != theirs]
    require(
        not apart,
        f"{field}: {store.path} has {', '.join(apart)}, and {first.path} has other values: stores of one run share "
        f"{', '.join(SHARED)}",
    )
    require(
        store.contents.output_layer == first.contents.output_layer,
        f"{field}: {store.path} has another output layer than {first.path}: stores of hidden states in one run are of "
        "one teacher; of several teachers, write stores with codec=sampled",
    )


def _check_fits(field: str, store: TeacherStore, config: RunConfig, vocab_size: int) -> None:
    manifest, losses = store.manifest, config.distillation
    require(
        manifest.vocab_size == vocab_size,
        f"{field}: {store.path} holds targets over {manifest.vocab_size} ids, but student.vocab_size = {vocab_size}: "
        f"a student with {manifest.vocab_size} would fit, or a store written with teacher.vocab_size={vocab_size}",
    )
    unfit = manifest.coding.unfit(losses, manifest.temperature)
    unfit |= {"hidden_loss": None, "hidden_layers": [], "hidden_weight": 0.0} if losses.hidden_layers else {}
    if "temperature" in losses.schedules and manifest.codec != "hidden":
        unfit |= {"schedules": {name: text for name, text in losses.schedules.items() if name != "temperature"}}
    unfit |= {"fused_linear": None} if losses.fused_linear is False else {}
    unfit |= {"offload_teacher": False} if losses.offload_teacher else {}
    names = ", ".join(f"distillation.{name} = {getattr(losses, name)}" for name in unfit)
    require(
        not unfit,
        f"{field}: {store.path}, of codec {manifest.codec} at temperature {manifest.temperature:g}, cannot serve "
        f"{names}; {fitting('distillation', unfit)} would fit, or another store",
    )


def stored_teacher(config: RunConfig) -> "StoredTeacher | None":
    """Return the teachers of a run's stores; None if it has none. `check_stores` has accepted them."""
    from distill_nemo.models.distillation.stored_targets import StoredTeacher

    if not (stores := stores_of(config)):
        return None
    store, manifest = stores[0][1], stores[0][1].manifest
    num, layer = (manifest.num, None) if manifest.codec != "hidden" else (0, _output_layer(store))
    return StoredTeacher(manifest.codec, manifest.temperature, num, manifest.vocab_size, layer)


def target_fields(config: RunConfig) -> dict[str, Field] | None:
    """Return the targets that this rank reads from the run's stores; None on all but the last pipeline stage."""
    from megatron.core import parallel_state

    stores = stores_of(config)
    return stores[0][1].manifest.fields if stores and parallel_state.is_pipeline_last_stage() else None


def _output_layer(store: TeacherStore) -> "StoredOutputLayer":
    from distill_nemo.data.stored_windows import as_tensor
    from distill_nemo.models.distillation.stored_targets import StoredOutputLayer

    manifest = store.manifest
    layer = OutputLayer(store.path, manifest)

    def rows(start: int, stop: int) -> "tuple[Tensor, Tensor | None]":
        def read(name: str) -> "Tensor":
            return as_tensor(layer.rows(name, start, stop - start).copy())

        return read("weight"), read("bias") if manifest.output_bias else None

    return StoredOutputLayer(rows, manifest.num, manifest.logit_scale, manifest.logit_softcap)
