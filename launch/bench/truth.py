"""Whether a peer is right: its loss and gradient beside fp64 sums that no peer made.

Idea: a fast wrong number is worthless, so every peer is checked before it is timed. The truth is
taken from the logits as the peers get them, already rounded to their dtype. The rule of
``vocab_parallel_ce.testing`` does not judge here: peers that round more than it grants (a softmax
or a loss in bf16) are peers all the same, so tolerances tell wrong from rounded, no more, and the
deviations themselves are reported.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vocab_parallel_ce import testing
from vocab_parallel_ce.launch.bench.inputs import Inputs, gather, row_chunks
from vocab_parallel_ce.launch.bench.peers import Loss, Peer

SAMPLED_ROWS = 16  # whose whole gradient is compared with fp64


@dataclass(frozen=True)
class Reference:
    """The truth, in fp64, from the logits as the peers get them (already rounded to dtype)."""

    loss: float
    gradient_norm: float
    rows: Tensor  # ids of the sampled rows
    softmax: Tensor  # this rank's part of their gradient, without the target's -1


def _fp64_device(device: torch.device) -> torch.device:
    return torch.device("cpu") if device.type == "npu" else device  # NPUs have no fp64


def reference(inputs: Inputs) -> Reference:
    """Loss and gradient norm from each rank's fp64 sums, which no engine made."""
    where = _fp64_device(inputs.setting.device)
    target = inputs.target - inputs.first_column
    sums = testing.shard_sums(inputs.master, target, row_chunks(inputs.master), where)
    truth = testing.merge_sums(torch.stack(gather(sums)))
    n = len(truth.lse)
    sampled = torch.linspace(0, n - 1, min(n, SAMPLED_ROWS)).long()
    sample = inputs.master[sampled.to(inputs.master.device)].to("cpu", torch.float64)
    softmax = (sample - truth.lse[sampled, None]).exp() / n
    return Reference(truth.loss, truth.gradient_norm, sampled, softmax)


def check(inputs: Inputs, peer: Peer, loss: Loss, truth: Reference) -> dict[str, Any]:
    """Run once with the gradient kept; how far loss and gradient lie from the truth."""
    inputs.restore(only=0)
    inputs.sink.keep = True
    try:
        logits = inputs.logits()
        with peer.around():
            value = loss(logits, inputs.target)
            value.backward()
        gradient = inputs.sink.gradient
    finally:
        inputs.sink.keep, inputs.sink.gradient = False, None
    if gradient is None:
        raise RuntimeError("no gradient reached the logits")
    where = _fp64_device(inputs.setting.device)
    squares = sum(
        float(gradient[rows].to(where, torch.float64).square().sum())
        for rows in row_chunks(gradient)
    )
    sample = gradient[truth.rows.to(gradient.device)].to("cpu", torch.float64)
    columns = inputs.target.cpu()[truth.rows] - inputs.first_column
    away = torch.ones_like(sample, dtype=torch.bool)  # all columns but the target's
    for row, column in enumerate(columns.tolist()):
        if 0 <= column < sample.shape[1]:
            away[row, column] = False
    off = float((sample - truth.softmax)[away].square().sum())
    size = float(truth.softmax[away].square().sum())
    sums = torch.tensor(gather([squares, off, size]), dtype=torch.float64).sum(0).tolist()
    found, dtype = float(value), value.dtype
    norm_error = abs(sums[0] ** 0.5 / truth.gradient_norm - 1)
    softmax_error = (sums[1] / sums[2]) ** 0.5 if sums[2] else 0.0
    loss_error = found - truth.loss
    wrong = []
    slack = max(1e-5, 4 * torch.finfo(dtype).eps) * abs(truth.loss)
    if not abs(loss_error) <= slack:
        wrong.append(f"loss {found:.6f} instead of {truth.loss:.6f}")
    if not norm_error <= 0.03:
        wrong.append(f"gradient norm off by {norm_error:.1%}")
    # The mean's 1/N pushes probabilities under what fp16 can hold, for everybody.
    if not softmax_error <= 0.2 and gradient.dtype != torch.float16:
        wrong.append(f"softmax part of the gradient off by {softmax_error:.1%}")
    if len(set(gather(found))) > 1:
        wrong.append("ranks return different losses")
    return {
        "loss": found,
        "loss_dtype": str(dtype).removeprefix("torch."),
        "loss_error": loss_error,
        "gradient_norm_error": norm_error,
        "softmax_gradient_error": softmax_error,
        "wrong": "; ".join(wrong),
    }
