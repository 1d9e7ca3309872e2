"""Logits that a cache cannot answer, used in turn; and who is asked to run where."""

from __future__ import annotations

import math
from typing import Any, ClassVar, cast

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tests.ranks import Pool
from vocab_parallel_ce.launch.bench import command as bench
from vocab_parallel_ce.launch.bench import inputs as made_inputs
from vocab_parallel_ce.launch.bench import peers
from vocab_parallel_ce.launch.bench import rank as one_rank
from vocab_parallel_ce.launch.bench.inputs import CACHES, Inputs, buffers_needed
from vocab_parallel_ce.launch.bench.peers import BY_NAME, Peer, Setting
from vocab_parallel_ce.launch.measuring.device import MIB


@pytest.mark.parametrize(
    ("logits", "cache", "count"),
    [
        (128, 50, 3),  # [4096, 16384] bf16 on an H100: two others of 128 MiB pass, 5 caches
        (256, 50, 2),
        (1599, 50, 2),
        (1600, 50, 1),  # a cache that holds a 32nd of the logits
        (1, 50, 201),
    ],
)
def test_enough_buffers_that_no_cache_answers(logits: int, cache: int, count: int) -> None:
    found = buffers_needed(logits * MIB, cache * MIB)
    assert found == count
    if found > 1:  # what passes through the cache between the writing of a buffer and its use
        assert (found - 1) * logits >= CACHES * cache


def inputs(count: int, rank: int = 0) -> Inputs:
    setting = Setting(cast(dist.ProcessGroup, None), 1, torch.device("cpu"))
    made = made_inputs.make(6, 10, setting, rank, torch.float32)
    made.buffers = [torch.clone(made.master) for _ in range(count)]
    return made


class _Scribble(torch.autograd.Function):
    """A peer that spoils its logits, and remembers which ones it was given."""

    seen: ClassVar[list[int]] = []

    @staticmethod
    def forward(ctx: Any, logits: Tensor) -> Tensor:
        _Scribble.seen.append(logits.data_ptr())
        loss = logits.sum()
        logits.zero_()
        ctx.shape = logits.shape
        return loss

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0].expand(ctx.shape)


def scribble(logits: Tensor, target: Tensor) -> Tensor:
    loss: Tensor = _Scribble.apply(logits)  # type: ignore[no-untyped-call]
    return loss


PEER = Peer("scribble", "scribble", lambda setting: scribble)


def test_a_run_touches_its_own_buffer_and_restore_undoes_it() -> None:
    made = inputs(3)
    assert len({buffer.data_ptr() for buffer in [made.master, *made.buffers]}) == 4
    made.run(PEER, scribble, turn=1)
    spoilt = [not torch.equal(buffer, made.master) for buffer in made.buffers]
    assert spoilt == [False, True, False]
    assert len(made.restore()) == 3
    assert all(torch.equal(buffer, made.master) for buffer in made.buffers)


def _timed(group: dist.ProcessGroup) -> tuple[list[int], int, int, int]:
    made = inputs(3, dist.get_rank(group))
    _Scribble.seen.clear()
    plan = one_rank.Plan(((6, 10),), ("fp32",), "cpu", 2, ("scribble",), 0.0)
    timed = one_rank._time(made, [PEER], {PEER.name: scribble}, plan, lambda text, done: None)
    places = [buffer.data_ptr() for buffer in made.buffers]
    used = [places.index(pointer) for pointer in _Scribble.seen]
    return used, len(timed.times["scribble"]), len(timed.copies), len(timed.quiet)


def test_every_repetition_uses_every_buffer_once(pool: Pool) -> None:
    for rank, found in enumerate(pool.run(_timed, world=4)):
        assert found == ([0, 1, 2, 0, 1, 2], 6, 6, 2 if rank == 0 else 0)


def test_the_grid_of_a_device() -> None:
    grid = bench.shapes_of("cuda", None, None, False)
    assert len(grid) == len(set(grid)) == 16
    assert {rows for rows, _ in grid} == {4096, 8192, 16384, 32768}
    assert {vocab for _, vocab in grid} == {1 << 14, 1 << 15, 1 << 17, 1 << 18}
    assert bench.shapes_of("cpu", None, None, False) == ((4096, 32768),)
    assert bench.shapes_of("cuda", [3, 5], [7], False) == ((3, 7), (5, 7))
    assert bench.shapes_of("cuda", None, None, True) == ((64, 1024),)


def test_a_plan_survives_the_way_to_its_ranks() -> None:
    plan = one_rank.Plan(((1, 2), (3, 4)), ("fp32", "bf16"), "cuda", 2, ("ours",), 0.5, True)
    assert one_rank.Plan.load(plan.dump()) == plan
    assert one_rank.steps(plan) == 2 * 2 * (2 + 2)


def test_only_a_cpu_must_be_quiet() -> None:
    for device, seconds in (("cpu", 2.0), ("cuda", 0.0)):
        assert bench._plan(device, ((1, 2),), ["fp32"], None, "", 2.0, False).wait_idle == seconds


CUDA_PEERS = ("liger", "liger-parallel", "quack", "flash-attn", "transformer-engine")


def test_peers_are_asked_where_they_can_run() -> None:
    def asked(device: str) -> tuple[str, ...]:
        return bench._plan(device, ((1, 2),), ["fp32"], None, "", 0.0, False).peers

    assert set(BY_NAME) - set(asked("cuda")) == {"ours-eager"}
    assert set(BY_NAME) - set(asked("cpu")) == set(CUDA_PEERS)
    for name in CUDA_PEERS:
        assert BY_NAME[name].status(1, "cpu") == "needs a cuda device"
        present = peers.installed(BY_NAME[name].package)
        assert BY_NAME[name].status(1, "cuda") == ("" if present else "not installed")
    whole = {peer.name for peer in peers.PEERS if peer.where == "one"}
    assert whole == {"torch", "torch-compile", "liger", "quack"}


def test_a_package_that_breaks_when_imported_is_not_installed(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken_peer").mkdir()
    (tmp_path / "broken_peer" / "__init__.py").write_text("raise OSError('no libcuda')\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert not peers.installed("broken_peer.loss")


def test_the_logits_of_a_shape_are_the_same_for_every_dtype() -> None:
    setting = Setting(cast(dist.ProcessGroup, None), 1, torch.device("cpu"))
    wide = made_inputs.make(5, 8, setting, 0, torch.float32)
    narrow = made_inputs.make(5, 8, setting, 0, torch.bfloat16)
    assert torch.equal(wide.master.bfloat16(), narrow.master)
    assert torch.equal(wide.target, narrow.target)
    assert math.isclose(float(wide.master.std()), 2, rel_tol=0.5)
