"""The training loss: summed cross-entropy over the targets, without the logits of all tokens.

Shapes: b sequences, s tokens each, d hidden size, v vocabulary, n targets in the batch.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from lowvram.memory.measure import SIMULATED
from lowvram.scratch import scratch

IGNORED = -100


def token_loss(
    model: nn.Module,
    input_ids: torch.Tensor,  # (b, s)
    labels: torch.Tensor,  # (b, s), labels[:, t] is the token at t or -100
    position_ids: torch.Tensor | None,  # (b, s)
    *,
    target_tokens: int,
    label_smoothing: float = 0.0,
    chunked: bool = True,
) -> torch.Tensor:
    """Sum of -log p(target) over the batch's `target_tokens` targets, in nats (0-d, fp32).

    The hidden state at t predicts the label at t + 1. Attention gets no mask and no cache:
    only then does transformers keep the packed documents of a row apart (by `position_ids`).
    """
    if not chunked:
        return _plain_loss(model, input_ids, labels, position_ids, label_smoothing)
    hidden = decoder(model)(
        input_ids=input_ids, position_ids=position_ids, use_cache=False
    ).last_hidden_state  # (b, s, d)
    hidden, targets = _rows_with_target(hidden, labels, target_tokens)
    head = output_head(model)
    return _chunked_loss(hidden, head.weight, head.bias, targets, label_smoothing)


def _plain_loss(
    model: nn.Module,
    input_ids: torch.Tensor,
    labels: torch.Tensor,
    position_ids: torch.Tensor | None,
    label_smoothing: float,
) -> torch.Tensor:
    """transformers' own path: all logits, its loss function, its order of operations."""
    inputs = {"input_ids": input_ids, "position_ids": position_ids, "use_cache": False}
    if label_smoothing == 0.0:
        loss: torch.Tensor = model(**inputs, labels=labels, num_items_in_batch=1).loss
        return loss
    logits = model(**inputs).logits[:, :-1].float()
    return F.cross_entropy(
        logits.reshape(-1, logits.shape[-1]),
        labels[:, 1:].reshape(-1),
        reduction="sum",
        label_smoothing=label_smoothing,
    )


def _rows_with_target(
    hidden: torch.Tensor, labels: torch.Tensor, target_tokens: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states (n, d) that have a target, and the targets (n,)."""
    targets = labels[:, 1:].reshape(-1)
    rows = hidden[:, :-1].reshape(-1, hidden.shape[-1])
    if target_tokens == targets.numel():
        return rows, targets
    # The count is known, so the device need not be asked for it.
    index = torch.nonzero_static(targets != IGNORED, size=target_tokens).squeeze(1)
    return rows[index], targets[index]


def _chunked_loss(
    hidden: torch.Tensor,  # (n, d)
    weight: torch.Tensor,  # (v, d)
    bias: torch.Tensor | None,  # (v,)
    targets: torch.Tensor,  # (n,)
    label_smoothing: float,
) -> torch.Tensor:
    """Cross-entropy of the output head, in the dtype that autocast would compute it in.

    Label smoothing e mixes in the mean over the vocabulary of -log p. With logits z = W h + c,
    (1 - e) (-log p_y) + e mean_v(-log p_v) = -log p_y + e (z_y - mean_v z_v), and
    z_y - mean_v z_v = h . (W_y - mean W) + c_y - mean c, which needs no logits.
    """
    device_type = hidden.device.type
    if torch.is_autocast_enabled(device_type):
        dtype = torch.get_autocast_dtype(device_type)
    else:
        dtype = weight.dtype
    with torch.autocast(device_type, enabled=False):
        loss: torch.Tensor = _LinearCrossEntropy.apply(  # type: ignore[no-untyped-call]
            hidden.to(dtype), weight, bias, targets
        )
        if label_smoothing:
            mean = weight.mean(0, dtype=torch.float32)  # (d,)
            margin = hidden.float() * (weight[targets].float() - mean)
            loss = loss + label_smoothing * margin.sum()
        if label_smoothing and bias is not None:
            loss = loss + label_smoothing * (bias[targets].float() - bias.float().mean()).sum()
    return loss


class _LinearCrossEntropy(torch.autograd.Function):
    """sum_i logsumexp(z_i) - z_i[y_i] with z = hidden @ weight.T + bias, a few rows at a time.

    The gradient, dz = softmax(z) - onehot(y), is made in the forward pass while a chunk's
    logits are there; backward only scales it. Same mathematics as torch's own chunked
    `linear_cross_entropy`, which is not used because it returns the sum in the dtype of its
    input: in bf16 a loss of 4700.3 comes back as 4704. Here logits are raised to fp32 before
    the logsumexp, as transformers does, and the sum stays fp32. So do the gradients of weight
    and bias: they are sums over all tokens, which overflow fp16 and lose their digits in bf16.

    The matrix products are done in the dtype of `hidden`, whatever that of the weight is.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,  # (n, d)
        weight: torch.Tensor,  # (v, d)
        bias: torch.Tensor | None,  # (v,)
        targets: torch.Tensor,  # (n,)
    ) -> torch.Tensor:
        wants_hidden, wants_weight, wants_bias, _ = ctx.needs_input_grad
        grad_hidden = torch.empty_like(hidden) if wants_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if wants_weight else None
        grad_bias = None
        if bias is not None and wants_bias:
            grad_bias = torch.zeros_like(bias, dtype=torch.float32)
        weight, bias = weight.to(hidden.dtype), None if bias is None else bias.to(hidden.dtype)
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        rows = chunk_rows(weight.shape[0], hidden.shape[0])
        buffer = None
        if hidden.device.type == "cpu" and hidden.dtype == torch.float32:
            (buffer,) = scratch((min(rows, hidden.shape[0]), weight.shape[0]))
        for start in range(0, hidden.shape[0], rows):
            part = hidden[start : start + rows]  # (r, d)
            target = targets[start : start + rows, None]  # (r, 1)
            out = None if buffer is None else buffer[: part.shape[0]]
            if bias is None:
                logits = torch.mm(part, weight.T, out=out)  # (r, v)
            else:
                logits = torch.addmm(bias, part, weight.T, out=out)
            log_p = log_softmax(logits)  # (r, v) fp32
            del logits
            log_p_target = log_p.gather(1, target)  # (r, 1)
            total -= log_p_target.sum()
            if not (wants_hidden or wants_weight or wants_bias):
                continue
            grad = log_p.exp_()
            grad.scatter_add_(1, target, torch.full_like(log_p_target, -1.0))
            if grad_bias is not None:
                grad_bias += grad.sum(0)
            grad = grad.to(hidden.dtype)
            if grad_hidden is not None:
                torch.mm(grad, weight, out=grad_hidden[start : start + rows])
            if grad_weight is not None and part.dtype == torch.float32:
                grad_weight.addmm_(grad.T, part)  # without a temporary the size of the weight
            elif grad_weight is not None:
                grad_weight += torch.mm(grad.T, part)
            del log_p, grad  # before those of the next chunk are made
        ctx.gradients = (grad_hidden, grad_weight, grad_bias)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            raise RuntimeError("the chunked loss can be differentiated once only")
        scaled = [None if grad is None else grad.mul_(grad_output) for grad in gradients]
        return (*scaled, None)


def log_softmax(logits: torch.Tensor) -> torch.Tensor:
    """In fp32; those of fp32 on a CPU are overwritten, since fresh memory costs more time there
    than the function itself. torch's kernel for CPUs reads a row to its end before it writes it.
    """
    if logits.dtype == torch.float32 and logits.device.type == "cpu":
        return torch.log_softmax(logits, 1, out=logits)
    return torch.log_softmax(logits, 1, dtype=torch.float32)


def chunk_rows(vocabulary: int, rows: int) -> int:
    """How many of `rows` rows of logits are made at a time.

    As many as take 128 MiB in fp32, then made even over the chunks, in multiples of 64, which
    matrix products like: a last chunk of few rows would take the time of many.
    """
    most = max(16, 32 * 2**20 // vocabulary)
    if most < 64:
        return most
    chunks = max(1, -(-rows // (most - most % 64)))
    return -(-rows // chunks // 64) * 64


def decoder(model: nn.Module) -> nn.Module:
    """The model below its output head, whose forward gives `last_hidden_state`."""
    inner: nn.Module = model.base_model  # type: ignore[assignment]
    return inner


def output_head(model: nn.Module) -> nn.Linear:
    head: nn.Linear = model.get_output_embeddings()  # type: ignore[operator]
    return head


@torch.no_grad()
def head_is_plain(model: nn.Module) -> bool:
    """Whether a model in evaluation mode makes its logits by its output head alone.

    Some architectures scale or cap their logits. For those the chunked loss would be another
    function, so it is asked here, on two tokens, rather than assumed. Bit equality, since a
    tolerance would miss the capping of small logits. On the simulated device, which has no values,
    the logits have to be the very tensor that the head has made.
    """
    head = output_head(model)
    if not isinstance(head, nn.Linear):
        return False
    ids = torch.arange(2, device=head.weight.device).unsqueeze(0)
    hidden = decoder(model)(input_ids=ids, use_cache=False).last_hidden_state
    expected = head(hidden)
    seen: list[int] = []  # addresses: what the decoder made, what the head got, what it made
    with contextlib.ExitStack() as stack:
        for hook in (
            decoder(model).register_forward_hook(
                lambda _, inputs, output: seen.append(output.last_hidden_state.data_ptr())
            ),
            head.register_forward_hook(
                lambda _, inputs, output: seen.extend((inputs[0].data_ptr(), output.data_ptr()))
            ),
        ):
            stack.callback(hook.remove)
        logits = model(input_ids=ids, use_cache=False).logits
    if head.weight.device.type != SIMULATED:
        return torch.equal(expected, logits)
    return len(seen) == 3 and seen[0] == seen[1] and seen[2] == logits.data_ptr()
