"""Groups of HCCL and of Gloo, and tensors on the device that each does not serve."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.distributed as dist

from vocab_parallel_ce import cross_entropy
from vocab_parallel_ce.collectives import backends_of, communication_device

from ..ranks import Pool

ROWS, COLUMNS = 4, 6
BOTH = "cpu:gloo,npu:hccl"


@contextmanager
def _group_of(backend: str) -> Iterator[dist.ProcessGroup]:
    group = dist.new_group(backend=backend)
    assert isinstance(group, dist.ProcessGroup)
    try:
        yield group
    finally:
        dist.destroy_process_group(group)


def _loss(
    group: dist.ProcessGroup,
    device: str,
    collective: str = "auto",
    check: bool = False,
    dtype: torch.dtype = torch.float32,
) -> float:
    logits = torch.zeros(ROWS, COLUMNS, device=device, dtype=dtype)
    target = torch.zeros(ROWS, dtype=torch.int64, device=device)
    return cross_entropy(logits, target, group=group, collective=collective, check=check).item()


def _refused(
    group: dist.ProcessGroup, backend: str, device: str, collective: str, check: bool
) -> str:
    with _group_of(backend) as other, pytest.raises(ValueError, match="input is on") as caught:
        _loss(other, device, collective, check)
    _loss(group, "npu")  # nothing was sent: the ranks are still in step
    return str(caught.value)


@pytest.mark.parametrize("check", [False, True])
@pytest.mark.parametrize("collective", ["all_gather", "all_reduce"])
@pytest.mark.parametrize(
    ("backend", "device", "message"),
    [
        (
            "hccl", "cpu",
            "input is on cpu, but group has backend 'hccl', which serves npu (rank {} of the "
            "group); pass tensors on npu, or a group of backend 'gloo', or of both, as "
            "init_process_group('npu:hccl,cpu:gloo') makes",
        ),
        (
            "cpu:gloo", "npu",
            "input is on npu, but group has backend 'gloo', which serves cpu (rank {} of the "
            "group); pass tensors on cpu, or a group of backend 'hccl', or of both, as "
            "init_process_group('cpu:gloo,npu:hccl') makes",
        ),
    ],
)  # fmt: skip
def test_the_wrong_group_is_refused_on_every_rank(
    npu_pool: Pool, backend: str, device: str, message: str, collective: str, check: bool
) -> None:
    said = npu_pool.run(_refused, 4, args=(backend, device, collective, check))
    for rank, text in enumerate(said):
        if check and rank:  # the preflight tells everyone what the first rank found
            assert text == "rank 0 of the group: " + message.format(0)
        else:
            assert text == message.format(rank)


def _compiled(group: dist.ProcessGroup, backend: str, device: str) -> str:
    loss = torch.compile(_loss, backend="aot_eager")
    with _group_of(backend) as other, pytest.raises(ValueError, match="input is on") as caught:
        loss(other, device)
    return str(caught.value)


@pytest.mark.parametrize(("backend", "device"), [("hccl", "cpu"), ("gloo", "npu")])
def test_a_compiled_call_refuses_it_too(npu_pool: Pool, backend: str, device: str) -> None:
    for text in npu_pool.run(_compiled, 4, args=(backend, device)):
        assert text.startswith(f"input is on {device}, but group has backend '{backend}'")


def _both(group: dist.ProcessGroup) -> tuple[dict[str, str], str, list[float], str]:
    with _group_of(BOTH) as other:
        losses = [
            _loss(other, device, collective)
            for device in ("cpu", "npu")
            for collective in ("all_gather", "all_reduce")
        ]
        losses.append(_loss(other, "cpu", dtype=torch.float64))
        with pytest.raises((TypeError, ValueError), match="float64") as caught:
            _loss(other, "npu", dtype=torch.float64)
        return backends_of(other), str(communication_device(other)), losses, str(caught.value)


def test_a_group_of_both_serves_both(npu_pool: Pool) -> None:
    """CPU tensors in fp64 too: HCCL does not carry it, but they do not travel over HCCL."""
    for served, device, losses, refused in npu_pool.run(_both, 4):
        assert served == {"cpu": "gloo", "npu": "hccl"}
        assert device == "cpu"
        assert losses == [pytest.approx(torch.tensor(4.0 * COLUMNS).log().item())] * 5
        assert "\n" not in refused
