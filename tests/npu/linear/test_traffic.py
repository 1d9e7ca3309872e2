"""What the fused operators move."""

from __future__ import annotations

import torch

from vocab_parallel_ce.engines.contract import ELSEWHERE, IGNORED, Coefficients, Wanted
from vocab_parallel_ce.engines.npu.linear import functions

from ...npu_sim import ledger
from .calls import BACKWARD, BF16


def test_bytes() -> None:
    """Nothing of the size of the logits, and a few readings of the operands: see ``traffic``."""
    rows, width, ids = 1024, 64, 2048
    hidden, head = torch.randn(rows, width).to("npu", BF16), torch.randn(ids, width).to("npu", BF16)
    local = torch.arange(rows) * 7 % ids
    local[::3], local[1::3] = ELSEWHERE, IGNORED
    local = local.to("npu")
    out = torch.empty(3, rows, device="npu")
    g = torch.ones(rows, device="npu")
    vectors = 300 * rows
    with ledger.recording() as forward:
        functions.partials(hidden, head, local, None, 1.0, Wanted(), out)
    with ledger.recording() as backward:
        functions.gradients(
            hidden, head, out[0], out[1], local, Coefficients(g, g), None, 1.0, True
        )
    operands = hidden.nbytes + head.nbytes
    for entries, allowed in ((forward, operands), (backward, 2 * operands + 2 * hidden.nbytes)):
        assert max(entry.largest for entry in entries) <= ids * width < rows * ids
        assert operands <= sum(entry.moved.bytes for entry in entries) <= allowed + vectors
    assert [e.operator for e in backward].count(BACKWARD) == 1
