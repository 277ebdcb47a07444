"""Memory of a rank by part, at the moment of a step when it is highest.

Legend: T tokens of a micro batch on a rank, H width, v this rank's shard of the padded vocabulary.
"""

from dataclasses import dataclass, field

from distill_nemo.losses.fused_linear.chunks import chunk_size
from distill_nemo.models.architecture import padded_vocab_size
from distill_nemo.planning import activations
from distill_nemo.planning.parameters import rank_layers, stages_of
from distill_nemo.planning.setting import Setting


@dataclass
class Memory:
    """Bytes of one pipeline rank. The total is what stays, the activations, and the moment that needs most besides."""

    rank: int
    stays: dict[str, float] = field(default_factory=dict)  # by part, for the whole run
    activations: dict[str, float] = field(default_factory=dict)  # by moment: what micro batches have saved by then
    workspace: dict[str, float] = field(default_factory=dict)  # by moment: what it needs besides
    before: dict[str, str] = field(default_factory=dict)  # by moment: which micro batches: others, all

    @property
    def moment(self) -> str:
        """When the rank needs most."""
        return max(self.workspace, key=lambda name: self.activations[name] + self.workspace[name])

    @property
    def total(self) -> float:
        """Bytes at that moment."""
        return sum(self.stays.values()) + self.activations[self.moment] + self.workspace[self.moment]


def fullest(setting: Setting) -> Memory:
    """Return the memory of the pipeline rank that needs most."""
    ranks = range(setting.config.parallelism.pipeline_model_parallel_size)
    return max((memory_of(setting, rank) for rank in ranks), key=lambda memory: memory.total)


def memory_of(setting: Setting, rank: int) -> Memory:
    """Return the memory of one pipeline rank."""
    memory = Memory(rank)
    student, teacher, shards = setting.student(rank), setting.teacher(rank), setting.shards(setting.student(rank))
    masters = 4 if setting.item == 2 else 0
    waiting = len(stages_of(setting.config.parallelism, rank)) * setting.lent(rank)
    elsewhere = setting.in_host_memory(rank) if setting.on_gpu else 0  # a CPU's memory is the host's
    memory.stays = {
        "weights": setting.item * student.total,
        "gradients": 4 * student.total,
        "optimizer": (masters + 8) * shards,
        "teacher's weights": setting.item * (teacher.total - elsewhere + waiting),
    }
    one, all_ = _saved(setting, rank)
    for moment, (before, workspace) in _moments(setting, rank).items():
        memory.activations[moment] = {"others": all_ - one, "all": all_}[before]
        memory.workspace[moment] = workspace
        memory.before[moment] = before
    return memory


def _moments(setting: Setting, rank: int) -> dict[str, tuple[str, float]]:
    """By moment: whose activations are there, of the micro batches before or all; and the workspace."""
    student, teacher = setting.models
    own = rank_layers(student, setting.config.parallelism, rank)
    recompute, largest = setting.config.training.recompute, _output_weight(setting)
    again = recompute == "full"
    moments: dict[str, tuple[str, float]] = {
        "a layer's backward": (
            "all",
            max(
                activations.backward_workspace(setting, student, layer)
                + (activations.saved(setting, student, layer, None) if again else 0)
                for layer in own
            ),
        ),
    }
    if setting.is_first(rank):
        moments["the embedding's gradient"] = ("others", setting.item * largest)
    if teacher is not None:
        needs = [
            activations.forward_workspace(setting, teacher, x)
            for x in rank_layers(teacher, setting.config.parallelism, rank)
        ]
        moments["the teacher's forward"] = ("others", max(needs) + setting.item * setting.lent(rank))
    if setting.is_last(rank):
        moments["the loss"] = ("all", fused_workspace(setting) if setting.fused else whole_workspace(setting))
        if not setting.fused:
            logits = setting.item * setting.tokens * _columns(setting)
            hidden = setting.item * setting.tokens * student.hidden_size
            moments["the output layer's backward"] = ("all", logits + hidden + setting.item * largest)
    return moments


def _columns(setting: Setting) -> int:
    return padded_vocab_size(setting.models.student.vocab_size) // setting.config.parallelism.tensor_model_parallel_size


def _output_weight(setting: Setting) -> int:
    return _columns(setting) * setting.models.student.hidden_size


def in_flight(setting: Setting, rank: int) -> float:
    """Micro batches whose activations a pipeline rank holds at most: Megatron's 1F1B schedule, or the interleaved."""
    par, count = setting.config.parallelism, setting.num_microbatches
    pipeline, virtual = par.pipeline_model_parallel_size, par.virtual_pipeline_model_parallel_size
    if virtual is None:
        return min(pipeline - rank, count)
    chunks = 2 * (pipeline - rank - 1) + (virtual - 1) * pipeline + 1
    return min(chunks, count * virtual) / virtual


def _saved(setting: Setting, rank: int) -> tuple[float, float]:
    """Bytes that one micro batch saves for backward on a pipeline rank, and that all do that are under way."""
    student, teacher = setting.models
    par, recompute = setting.config.parallelism, setting.config.training.recompute
    one = sum(activations.saved(setting, student, layer, recompute) for layer in rank_layers(student, par, rank))
    if setting.is_last(rank):
        one += activations.final_norm(setting, student)
    width = student.hidden_size + (teacher.hidden_size if teacher else 0)
    sent_and_received = 2 * len(stages_of(par, rank)) - setting.is_first(rank) - setting.is_last(rank)
    one += sent_and_received * setting.item * setting.split_tokens * width
    return one, one * in_flight(setting, rank)


def fused_workspace(setting: Setting) -> float:
    """Return bytes of the fused loss: chunks of both sides' fp32 logits, both hidden states, one fp32 gradient."""
    student, teacher = setting.models
    assert teacher is not None, "there is a fused loss only with a teacher"
    par, columns = setting.config.parallelism, _columns(setting)
    rows = chunk_rows(setting)
    buffers = min(1 if par.tensor_model_parallel_size == 1 else 2, -(-setting.tokens // rows))
    hidden = setting.item * setting.split_tokens * (student.hidden_size + teacher.hidden_size)
    if par.sequence_parallel:
        hidden += setting.item * setting.tokens * (student.hidden_size + teacher.hidden_size)  # gathered
    low_precision_gradient = 2 * rows * columns if setting.item == 2 else 0
    return buffers * 8 * rows * columns + low_precision_gradient + hidden + 4 * setting.tokens * student.hidden_size


def chunk_rows(setting: Setting) -> int:
    """Tokens of a chunk of logits; all tokens are taken to count."""
    return chunk_size(setting.tokens, _columns(setting), setting.on_gpu)


def whole_workspace(setting: Setting) -> float:
    """Whole logits of the student and, for a logits loss, of the teacher, and the copies that losses make of them.

    Forward: an fp32 copy for Megatron's cross entropy. Backward: the gradient of the divergence, beside that copy if
    the LM loss counts; both sides' padding is cut off, which takes a gradient more, or masked in copies.
    """
    student, teacher = setting.models
    kd, par = setting.config.distillation, setting.config.parallelism
    logits, copy = setting.item * setting.tokens * _columns(setting), 4 * setting.tokens * _columns(setting)
    if teacher is None or not setting.logits_count:
        in_place = setting.item == 4 and teacher is None
        return logits if in_place else 2 * logits + copy if setting.item == 2 else logits + copy
    backward = logits + (copy if kd.uses_lm_loss else 0)
    padded = padded_vocab_size(student.vocab_size) != student.vocab_size
    masked = 2 * logits if padded and par.tensor_model_parallel_size > 1 else 0
    if padded and not masked:
        backward += logits
    return 2 * logits + masked + max(copy, backward)
