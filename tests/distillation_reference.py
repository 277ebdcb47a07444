"""The oracle of a distillation: transformers and torch in fp64, one process, sharing no code with the package."""

from dataclasses import replace
from functools import partial
from typing import Any

import torch
import transformers
from torch.nn import functional

from tests.distillation import HELD_OUT, NUM_STORED, PROJECTION, Case

EXPERTS: dict[str, Any] = {}
if int(transformers.__version__.split(".")[0]) >= 5:  # transformers 4 has no other implementation
    EXPERTS["experts_implementation"] = "eager"  # torch's grouped_mm has no fp64
OTHER_NAMES = {"backbone.embedding.weight": "backbone.embeddings.weight"}  # transformers' in files -> the hub's
MAX_AMPLIFICATION = 10.0


def reference(case: Case, dtype: torch.dtype = torch.float64) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    """Return (global token means, gradients of the total loss): sums over valid tokens, divided by their number.

    Buffers that files hold are among the gradients with their values, which training does not change.

    With `torch.float32` it shows the error of plain torch. The means are those of training and, prefixed with
    `HELD_OUT`, those of an evaluation of the same batch.
    """
    case = case.unpacked()
    kd = {"temperature": 1.0, "scale_by_temperature_squared": True, "hidden_layers": []} | case.distillation
    batch = case.batch()
    mask = batch["loss_mask"].double()

    def mean(values: torch.Tensor) -> torch.Tensor:
        return (values * mask).sum() / mask.sum().clamp(min=1)

    student, ours = _forward(case, case.student, kd["hidden_layers"], 0, dtype)
    lm = functional.cross_entropy(ours["logits"].transpose(1, 2), batch["labels"], reduction="none")
    losses = {"lm_loss": mean(lm)}
    held_out, projections = {}, {}
    if case.codec:
        stored = {name.removeprefix("target_"): x for name, x in case.stored().items()}
        t, taught = kd["temperature"], mask * stored["has_targets"]
        divergence = _against_stored(case, ours["logits"], stored, kd)
        losses["logit_loss"] = (
            (divergence * taught).sum() / taught.sum() * (t**2 if kd["scale_by_temperature_squared"] else 1.0)
        )
        held_out = _of_stored(case, ours["logits"], stored, divergence, batch["labels"])
        held_out = {name: (x * taught).sum() / taught.sum() for name, x in held_out.items()}
        total = losses["kd_loss"] = _total(losses, kd, float(taught.sum() / mask.sum()))
    elif case.teacher is None:
        total = losses["lm_loss"]
    else:
        with torch.no_grad():
            _, theirs = _forward(case, case.teacher, kd["hidden_layers"], 1, dtype)
        if kd.get("balancer") == "dynamic" or kd.get("logits_weight", 1.0):
            t = kd["temperature"]
            divergence = _divergence(ours["logits"] / t, theirs["logits"] / t, kd)
            losses["logit_loss"] = mean(divergence) * (t**2 if kd["scale_by_temperature_squared"] else 1.0)
            with torch.no_grad():
                each = _against_teacher(ours["logits"], theirs["logits"], batch["labels"])
                held_out = {name: mean(values) for name, values in each.items()}
        if kd["hidden_layers"]:
            each = []
            for number in range(len(kd["hidden_layers"])):
                a, b = ours[number], theirs[number]
                if a.shape[-1] != b.shape[-1]:
                    projections[f"{PROJECTION}{number}"] = weight = _projection(a.shape[-1], b.shape[-1], number, dtype)
                    a = a @ weight.T
                mse, cosine = (a - b).square().mean(-1), 1 - functional.cosine_similarity(a, b, dim=-1)
                each.append(mean(mse if kd["hidden_loss"] == "mse" else cosine))
            losses["hidden_loss"] = torch.stack(each).mean()
            losses |= {f"hidden_loss_{i}": x for i, x in enumerate(each) if len(each) > 1}
        total = losses["kd_loss"] = _total(losses, kd)
    total.backward()
    seen_in_both = {name: loss for name, loss in losses.items() if name not in ("logit_loss", "kd_loss")}
    held_out |= seen_in_both
    losses |= {HELD_OUT + name: value for name, value in held_out.items()}
    found: dict[str, Any] = {n: w.grad for n, w in projections.items()}
    stored = student.state_dict().keys()
    kept = {name: buffer for name, buffer in student.named_buffers() if name in stored}
    for name, parameter in student.named_parameters():
        kept[name] = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    return {n: x.item() for n, x in losses.items()}, found | _as_in_files(student, kept)


def _as_in_files(model: Any, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return tensors as transformers 5 would write them: in memory it may have other names, and experts together."""
    if not EXPERTS:
        return tensors
    from transformers.core_model_loading import revert_weight_conversion

    found = revert_weight_conversion(model, tensors)
    return {OTHER_NAMES.get(name, name): tensor for name, tensor in found.items()}


def _forward(
    case: Case, path: str, pairs: list[str], side: int, dtype: torch.dtype
) -> tuple[Any, dict[Any, torch.Tensor]]:
    """Return the model, its logits, and its hidden states by number of the pair. Each document is run by itself."""
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, attn_implementation="eager", **EXPERTS)
    outputs: dict[Any, torch.Tensor] = {}
    for number, pair in enumerate(pairs):
        parts = pair.split(":")[side].split(".")
        last = "norm_f" if model.config.model_type == "nemotron_h" else "norm"
        layer = model.model.get_submodule(last) if parts[1] == "final_layernorm" else model.model.layers[int(parts[2])]
        if len(parts) > 3:
            layer = {"self_attention": layer.self_attn, "mlp": layer.mlp}[parts[3]] if hasattr(layer, "mlp") else layer

        def keep(_: Any, __: Any, output: Any, number: int = number) -> None:
            outputs[number] = output[0] if isinstance(output, tuple) else output

        layer.register_forward_hook(keep)
    tokens, model = case.batch()["tokens"], with_recurrence(model, dtype)
    if not case.documents:
        outputs["logits"] = model(tokens, use_cache=False).logits
        return model, outputs
    rows: dict[Any, list[torch.Tensor]] = {}
    for row in range(len(tokens)):
        parts: dict[Any, list[torch.Tensor]] = {}
        for first, stop in case.bounds(row):
            outputs["logits"] = model(tokens[row : row + 1, first:stop], use_cache=False).logits
            for name, value in outputs.items():
                parts.setdefault(name, []).append(value)
        for name, values in parts.items():
            rows.setdefault(name, []).append(torch.cat(values, dim=1))
    return model, {name: torch.cat(values) for name, values in rows.items()}


def with_recurrence(model: Any, dtype: torch.dtype = torch.float64) -> Any:
    """Let gated delta nets of a model of transformers compute token by token. Their chunks are in fp32."""
    for module in model.modules():
        if hasattr(module, "chunk_gated_delta_rule"):
            module.chunk_gated_delta_rule = partial(delta_rule, dtype=dtype)
    return model


def delta_rule(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    g: torch.Tensor,
    beta: torch.Tensor,
    dtype: torch.dtype = torch.float64,
    **_: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the outputs of gated delta nets, token by token, and the last state.

    Shapes: [B, S, heads, channels]; logarithms of decays `g` and write strengths `beta` are [B, S, heads].
    """
    given = v.dtype
    q, k, v, g, beta = (x.to(dtype) for x in (q, k, v, g, beta))
    q, k = (x * (x.square().sum(-1, keepdim=True) + 1e-6).rsqrt() for x in (q, k))
    state, outputs = v.new_zeros(v.shape[0], v.shape[2], k.shape[3], v.shape[3]), []
    for t in range(v.shape[1]):
        state = state * g[:, t, :, None, None].exp()
        wrong = v[:, t] - (k[:, t, :, None] @ state)[..., 0, :]
        state = state + k[:, t, ..., None] * (beta[:, t, :, None] * wrong)[..., None, :]
        outputs.append((q[:, t, :, None] @ state)[..., 0, :] / q.shape[3] ** 0.5)
    return torch.stack(outputs, 1).to(given), state


def _divergence(a: torch.Tensor, b: torch.Tensor, kd: dict[str, Any]) -> torch.Tensor:
    """Return the divergence of student logits a and teacher logits b by its definition, for autograd."""
    log_q, log_p = a.log_softmax(-1), b.log_softmax(-1)
    q, p = log_q.exp(), log_p.exp()
    kind = kd.get("divergence", "forward_kl")
    if kind == "reverse_kl":
        return (q * (log_q - log_p)).sum(-1)
    if kind == "jensen_shannon":
        beta = kd.get("beta", 0.5)
        log_m = (beta * p + (1 - beta) * q).log()
        return beta * (p * (log_p - log_m)).sum(-1) + (1 - beta) * (q * (log_q - log_m)).sum(-1)
    if kind != "forward_kl":
        raise ValueError(f"{kind} has no definition here")
    if kd.get("top_k"):
        best = b.topk(kd["top_k"], -1).indices
        inside = torch.zeros_like(b, dtype=torch.bool).scatter(-1, best, True)
        p_tail, q_tail = ((x * ~inside).sum(-1) for x in (p, q))
        return (p * (log_p - log_q) * inside).sum(-1) + p_tail * (p_tail.log() - q_tail.log())
    return (p * (log_p - log_q)).sum(-1)


def _against_teacher(z: torch.Tensor, t: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return an evaluation's metrics of every token, from student logits z and teacher logits t."""
    log_p = t.log_softmax(-1)
    return {
        "forward_kl": _divergence(z, t, {}),
        "top1_agreement": (z.argmax(-1) == t.argmax(-1)).double(),
        "teacher_entropy": -(log_p.exp() * log_p).sum(-1),
        "teacher_lm_loss": -log_p.gather(-1, labels[..., None])[..., 0],
    }


def _against_stored(case: Case, z: torch.Tensor, stored: dict[str, torch.Tensor], kd: dict[str, Any]) -> torch.Tensor:
    """Return the logits loss of every token against stored targets, by its definition; without targets anything."""
    if case.codec == "hidden":
        t = kd["temperature"]
        return _divergence(z / t, stored["hidden"].to(z) @ stored["weight"].to(z).T / t, kd)
    log_q = (z / kd["temperature"]).log_softmax(-1)
    there = stored["ids"] >= 0
    at_ids = log_q.gather(-1, stored["ids"].long().clamp(min=0))
    if case.codec == "sampled":
        return -(stored["counts"] / NUM_STORED * at_ids * there).sum(-1) - stored["entropy"]
    log_p, tail = stored["logprobs"].to(z), stored["tail"].to(z)
    others = torch.ones_like(log_q).scatter_reduce(-1, stored["ids"].long().clamp(min=0), 1.0 - there.to(z), "amin")
    inside = (log_p.exp() * (log_p - at_ids) * there).sum(-1)
    return inside + tail.exp() * (tail - (log_q.exp() * others).sum(-1).log())


@torch.no_grad()
def _of_stored(
    case: Case, z: torch.Tensor, stored: dict[str, torch.Tensor], divergence: torch.Tensor, labels: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Return an evaluation's metrics of every token against stored targets."""
    if case.codec == "hidden":
        return _against_teacher(z, stored["hidden"].to(z) @ stored["weight"].to(z).T, labels)
    return {
        "forward_kl": divergence,
        "top1_agreement": (z.argmax(-1) == stored["top1"]).double(),
        "teacher_entropy": stored.get("entropy_at_1", stored["entropy"]),
        "teacher_lm_loss": -stored["label_logprob"],
    }


@torch.no_grad()
def write_targets(case: Case) -> None:
    """Write the targets of the global batch as a store gives them; one sample has none."""
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    from distill_nemo.losses.stored import encode

    assert case.teacher is not None
    batch = replace(case, targets="").batch()
    model: Any = AutoModelForCausalLM.from_pretrained(case.teacher, dtype=torch.float64, attn_implementation="eager")
    hidden = model.model(batch["tokens"], use_cache=False).last_hidden_state
    logits, labels = model.lm_head(hidden).flatten(0, 1).float(), batch["labels"].flatten()
    uniforms = torch.rand(len(labels), dtype=torch.float64, generator=torch.Generator().manual_seed(11))
    temperature = case.distillation.get("temperature", 1.0)
    stored = encode(case.codec, NUM_STORED, temperature, logits, labels, uniforms)  # pyright: ignore
    if case.codec == "hidden":
        stored["hidden"] = hidden.flatten(0, 1).float()
    found = {name: x.unflatten(0, batch["labels"].shape) for name, x in stored.items()}
    found["has_targets"] = torch.ones(batch["labels"].shape, dtype=torch.uint8)
    for name, x in found.items():
        x[3] = -1 if name == "ids" else 0
    found = {f"target_{name}": x for name, x in found.items()}
    if case.codec == "hidden":
        found["weight"] = model.lm_head.weight.float()
    save_file({name: x.contiguous() for name, x in found.items()}, case.targets)


def _projection(width: int, to: int, number: int, dtype: torch.dtype) -> torch.Tensor:
    """Return the projection's initial weights in the package: seeded, so that every layout has the same."""
    weight = torch.empty(to, width)
    torch.nn.init.kaiming_uniform_(weight, a=5**0.5, generator=torch.Generator().manual_seed(number))
    return weight.to(dtype).requires_grad_()


def _total(losses: dict[str, torch.Tensor], kd: dict[str, Any], taught: float = 1.0) -> torch.Tensor:
    """Return the mean over valid tokens of the total. The logits loss is given over the share that is taught."""
    lm, logit, hidden = (losses.get(name, torch.zeros(())) for name in ("lm_loss", "logit_loss", "hidden_loss"))
    if kd.get("balancer") != "dynamic":
        weights = (kd.get("lm_weight", 0.0), kd.get("logits_weight", 1.0), kd.get("hidden_weight", 0.0))
        return weights[0] * lm + weights[1] * taught * logit + weights[2] * hidden
    lm_, logit_, hidden_ = lm.item(), logit.item(), hidden.item()
    share = min(logit_ / hidden_, MAX_AMPLIFICATION) if hidden_ else 0.0
    distillation = taught * logit + share * hidden
    if kd.get("skip_lm_loss", True):
        return distillation
    scale = min(lm_ / (logit_ + share * hidden_), MAX_AMPLIFICATION) * kd.get("kd_loss_scale", 1.0)
    return lm + scale * distillation
