"""Memory, measured: what torch allocates, and what the process takes from the system.

The budget of a forward and a backward pass, beside the logits and what the caller holds:

    in place        1 MiB + (64 + 4 k (world + 1)) bytes a row, k floats a row being exchanged
    out of place    the gradient, and the same
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from vocab_parallel_ce import VocabShard, cross_entropy, cross_entropy_loss, token_statistics

from .allocations import allocations, peak

ROOT = Path(__file__).resolve().parents[1]
MIB = 1 << 20
# The eager engine works on blocks of 2^20 elements and holds a handful of them in fp32.
EAGER_SCRATCH = 16 * MIB


def budget(rows: int, k: int, world: int = 1) -> int:
    return MIB + (64 + 4 * k * (world + 1)) * rows


# What torch allocates


def test_allocations_are_seen() -> None:
    """The measurement itself: one buffer of 1 MB, then another beside it, then none."""

    def run() -> None:
        a = torch.empty(250_000)
        b = torch.empty(250_000)
        del a, b

    sizes = allocations(run)
    assert sizes == [1_000_000, 1_000_000, -1_000_000, -1_000_000]
    assert peak(sizes) == 2_000_000


Loss = Callable[..., Tensor]
ROWS, CLASSES = 2048, 8192
WEIGHT = torch.rand(CLASSES)


def _operator_loss(x: Tensor, target: Tensor, **options: Any) -> Tensor:
    out = cross_entropy_loss(
        x,
        target,
        WEIGHT,
        label_smoothing=0.1,
        lse_square_scale_for_zloss=1e-3,
        return_zloss=True,
        return_log_prob=False,
        **options,
    )
    return out.loss + out.zloss


def _statistics_sum(x: Tensor, target: Tensor, **options: Any) -> Tensor:
    out = token_statistics(x, target, entropy=True, argmax=True, **options)
    assert out.entropy is not None
    return (out.log_prob + out.lse + out.entropy).sum()


def _with(**fixed: Any) -> Loss:
    return lambda x, target, **options: cross_entropy(x, target, **fixed, **options)


# The loss and its k
LOSSES: dict[str, tuple[Loss, int]] = {
    "plain": (_with(), 3),
    "weight": (_with(weight=WEIGHT), 3),
    "z-loss": (_with(lse_square_scale=1e-3), 3),
    "smoothing": (_with(label_smoothing=0.1), 4),
    "all": (_with(weight=WEIGHT, label_smoothing=0.1, lse_square_scale=1e-3), 4),
    "operator": (_operator_loss, 4),
    "token statistics": (_statistics_sum, 5),
}


@pytest.mark.parametrize(
    ("engine", "dtype"),
    [
        ("eager", torch.float32),
        pytest.param("eager", torch.bfloat16, marks=pytest.mark.full),
        ("cpu", torch.float32),
        ("cpu", torch.bfloat16),
    ],
    ids=str,
)
@pytest.mark.parametrize("in_place", [False, True], ids=["", "in place"])
@pytest.mark.parametrize("name", LOSSES)
def test_nothing_of_the_size_of_the_logits(
    name: str, in_place: bool, engine: str, dtype: torch.dtype
) -> None:
    """None in forward, and none in backward but the gradient itself, if it is not in place."""
    loss_of, k = LOSSES[name]
    logits = torch.randn(ROWS, CLASSES, dtype=dtype, requires_grad=True) * 1
    target = torch.randint(CLASSES, (ROWS,))
    losses: list[Tensor] = []

    def forward() -> None:
        losses.append(loss_of(logits, target, engine=engine, inplace_backward=in_place))

    with torch.no_grad():
        loss_of(logits, target, engine=engine)  # imports, compiles
    sizes = allocations(forward)
    size = logits.numel() * logits.element_size()
    allowed = budget(ROWS, k) - MIB + WEIGHT.nbytes + (EAGER_SCRATCH if engine == "eager" else 0)
    assert max(sizes) <= _largest(engine) < size / 4
    assert peak(sizes) <= allowed

    kept = sum(sizes)
    gradients: list[Tensor] = []
    sizes = allocations(lambda: gradients.extend(torch.autograd.grad(losses.pop(), logits)))
    if not in_place:
        assert sizes.count(size) == 1, "exactly one tensor like the logits: the gradient"
        sizes.remove(size)
    assert max(sizes) <= _largest(engine)
    assert kept + peak(sizes) <= allowed
    assert gradients[0].shape == logits.shape
    assert (gradients[0].data_ptr() == logits.data_ptr()) == in_place


def _largest(engine: str) -> int:
    """The largest buffer that an engine may take: [k, N] partials, or a block of rows in fp64."""
    return EAGER_SCRATCH // 4 if engine == "eager" else 20 * ROWS + WEIGHT.nbytes + 4096


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "flattened": lambda x: x.view(-1, x.shape[-1]),
    "shifted": lambda x: x[:, :-1],
    "columns cut": lambda x: x[..., :-1],
    "transposed rows": lambda x: x.transpose(0, 1),
    "every other row": lambda x: x[:, ::2],
}


@pytest.mark.parametrize("engine", ["eager", "cpu"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_layout_is_copied(layout: str, engine: str) -> None:
    """Views that a contiguous copy would be the easy way out for, forward and in place."""
    memory = torch.randn(4, ROWS // 4, CLASSES, requires_grad=True) * 1
    logits = LAYOUTS[layout](memory)
    target = torch.randint(CLASSES - 1, logits.shape[:-1])
    stats: list[Tensor] = []

    def forward() -> None:
        out = token_statistics(logits, target, inplace_backward=True, engine=engine)
        stats.append(out.log_prob)

    with torch.no_grad():
        token_statistics(logits, target, engine=engine)
    assert max(allocations(forward)) <= _largest(engine)
    upstream = torch.ones(target.shape)
    # Up to the gradient of the view: what torch makes of it for ``memory`` is its own affair.
    sizes = allocations(lambda: torch.autograd.grad(stats.pop(), logits, upstream))
    assert max(sizes) <= _largest(engine)


@pytest.mark.parametrize("engine", ["eager", "cpu"])
def test_padding_is_not_copied(engine: str) -> None:
    logits = torch.randn(ROWS, CLASSES, requires_grad=True) * 1
    target = torch.randint(CLASSES - 9, (ROWS,))
    shard = VocabShard(0, CLASSES - 9, CLASSES - 9)
    losses: list[Tensor] = []

    def forward() -> None:
        losses.append(
            cross_entropy(logits, target, shard=shard, inplace_backward=True, engine=engine)
        )

    with torch.no_grad():
        cross_entropy(logits, target, shard=shard, engine=engine)
    assert max(allocations(forward)) <= _largest(engine)
    assert max(allocations(lambda: torch.autograd.grad(losses.pop(), logits))) <= _largest(engine)


@pytest.mark.parametrize("engine", ["eager", "cpu"])
@pytest.mark.parametrize("asked", [False, True], ids=["", "asked"])
def test_log_prob_is_made_only_when_asked_for(asked: bool, engine: str) -> None:
    logits = torch.randn(ROWS, CLASSES)
    target = torch.randint(CLASSES, (ROWS,))
    outputs: list[Tensor] = []
    cross_entropy_loss(logits, target, engine=engine)
    sizes = allocations(
        lambda: outputs.extend(
            cross_entropy_loss(logits, target, return_log_prob=asked, engine=engine)
        )
    )
    assert sizes.count(logits.nbytes) == asked
    if asked:
        sizes.remove(logits.nbytes)
    assert max(sizes) <= _largest(engine)


# What the process takes from the system: Numba's memory and malloc's own included

_MEASURE = """
import ctypes, gc, json
import torch
import vocab_parallel_ce as v
from tests.test_memory import LOSSES

libc = ctypes.CDLL(None)
libc.mallopt(-3, 1 << 16)  # M_MMAP_THRESHOLD: whatever counts is given back when it is freed
libc.mallopt(-1, 1 << 17)  # M_TRIM_THRESHOLD
torch.set_num_threads(2)  # the threads' own memory counts

def resident(field):
    for line in open("/proc/self/status"):
        if line.startswith(field):
            return int(line.split()[1]) * 1024

def peak(run):
    gc.collect()
    libc.malloc_trim(0)
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # resets VmHWM
    before = resident("VmRSS")
    run()
    return resident("VmHWM") - before

class Head(torch.autograd.Function):
    @staticmethod
    def forward(ctx, anchor, memory):
        return memory.detach()

    @staticmethod
    def backward(ctx, grad):
        return torch.zeros(()), None

report = []
for rows, columns in ((2048, 32768), (200000, 64)):
    for dtype in (torch.float32, torch.bfloat16):
        target = torch.randint(columns, (rows,))
        target[::7] = -100
        values = torch.randn(1, columns)
        memory = torch.empty(rows, columns, dtype=dtype)
        def torchs(x, target, **options):
            return torch.nn.functional.cross_entropy(x, target)
        names = ("plain", "all", "token statistics")
        losses = {name: LOSSES[name] for name in names}
        losses["all"] = (lambda x, t, **options: v.cross_entropy(x, t, values[0].abs(), "mean",
            label_smoothing=0.1, lse_square_scale=1e-3, **options), 4)
        if not report:
            losses["torch"] = (torchs, 0)
        for name, (loss_of, k) in losses.items():
            for in_place in (False, True):
                memory.copy_(values)
                def run():
                    logits = Head.apply(torch.zeros((), requires_grad=True), memory)
                    loss = loss_of(logits, target, inplace_backward=in_place)
                    return torch.autograd.grad(loss, logits)
                run()  # imports, compiles, starts threads
                memory.copy_(values)
                report.append(
                    dict(rows=rows, columns=columns, dtype=str(dtype), name=name, k=k,
                         in_place=in_place, logits=memory.nbytes, peak=peak(run))
                )
print(json.dumps(report))
"""


@pytest.fixture(scope="module")
def report() -> list[dict[str, Any]]:
    """Peaks of a process of its own, whose malloc gives back what is freed."""
    assert os.access("/proc/self/clear_refs", os.W_OK), (
        "this system keeps no resettable high-water mark of memory (/proc/self/clear_refs, as "
        "Linux has it): peak memory cannot be measured here"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", _MEASURE],
        env=env,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    found: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_peak_memory(report: list[dict[str, Any]]) -> None:
    """The cpu engine, fp32 and bf16, few wide rows and many narrow ones, against the budget."""
    over = []
    for case in report:
        if case["name"] == "torch":
            # The control: what keeps a copy of the logits in forward is seen to do so.
            assert case["peak"] > 1.5 * case["logits"], f"nothing was measured: {case}"
            continue
        allowed = budget(case["rows"], case["k"]) + (0 if case["in_place"] else case["logits"])
        if case["peak"] > allowed:
            over.append(f"{case}: {allowed} bytes allowed")
    assert not over, "\n".join(over)
    assert len(report) == 26
