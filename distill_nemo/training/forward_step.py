"""Forward step and loss function of a micro batch, as Megatron's schedules call them.

Legend: B batch, S sequence. A `report` maps a metric to a tensor `[sum over valid tokens, valid tokens]` of this
micro batch and data-parallel rank; `evaluation.reduce_reports` turns reports into global token means.
"""

from functools import partial

from torch import Tensor, nn

from distill_nemo.evaluation import Batches, LossFunc, Report, run_model, with_token_counts
from distill_nemo.models.distillation.objective import Targets, objective_of


def forward_step(data_iterator: Batches, model: nn.Module) -> tuple[Tensor, LossFunc]:
    """Run the model on the next micro batch. The schedule calls the returned loss function on the last stage."""
    targets, output = run_model(data_iterator, model)
    labels, loss_mask, num_valid, stored = targets
    return output, partial(loss_func, loss_mask, model, labels=labels, num_valid=num_valid, stored=stored)


def loss_func(
    loss_mask: Tensor,
    model: nn.Module,
    output_tensor: Tensor,
    labels: Tensor,
    num_valid: int | None = None,
    stored: dict[str, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Report]:
    """Sum the losses of valid tokens; the schedule divides by their global number (`calculate_per_token_loss`).

    Args:
        loss_mask: [B, S], 1 for valid tokens.
        model: the (wrapped) student or distillation model whose output is `output_tensor`.
        output_tensor: [B, S], the LM loss of each token; with a fused output the hidden states of student and teacher
            side by side, with stored targets those of the student.
        labels: [B, S].
        num_valid: number of tokens with a positive mask, if the host knows it.
        stored: targets of a teacher store, if the model learns from one.

    Returns:
        The loss to differentiate (a sum over tokens), the number of valid tokens (int), and the report. Hidden losses
        are not included: they are differentiated and reported at their layers (`distillation.hidden_losses`).
    """
    targets = Targets(labels, loss_mask, num_valid, stored)
    loss, report = objective_of(model).loss(output_tensor, targets)
    num_tokens = loss_mask.sum()
    return loss, num_tokens.int(), with_token_counts(report, num_tokens, targets)
