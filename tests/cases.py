"""What multi-rank tests add to ``vocab_parallel_ce.testing``: findings, counted collectives."""

from __future__ import annotations

import functools
from collections.abc import Callable

from torch import Tensor
from torch.profiler import profile

from vocab_parallel_ce import testing
from vocab_parallel_ce.testing import Sharding, assert_close, naive_error, shardings

from .device import DEVICE

SHARDINGS = [(world, plan) for world in (1, 2, 3, 4) for plan in shardings(world)]

# Of a shard the operator of Ascend hands out log s, rounded, and never s.
expected = functools.partial(testing.expected, sums_as_logs=DEVICE == "npu")


def gloo_events(work: Callable[[], object]) -> list[str]:
    """The collectives that ``work`` runs on this rank, as the profiler saw them in Gloo."""
    with profile() as events:
        work()
    return sorted(e.name for e in events.events() or [] if e.name.startswith("gloo:"))


class Findings:
    """Collects failed assertions: a rank that leaves a case early would leave the others waiting.

    with findings: assert ...        any number of times, then findings.report()
    """

    def __init__(self) -> None:
        self.texts: list[str] = []

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type[BaseException] | None, problem: BaseException | None, trace: object
    ) -> bool:
        if not isinstance(problem, AssertionError):
            return False
        self.texts.append(str(problem))
        return True

    def report(self) -> None:
        """Fail if anything was found."""
        assert not self.texts, f"{len(self.texts)} findings:\n" + "\n".join(self.texts[:10])


def check_gradient(
    grad: Tensor, wanted: tuple[Tensor, Tensor], sharding: Sharding, rank: int, what: str
) -> None:
    """A rank's gradient [.., C_r] against the (exact, naive) ones [.., V]; 0 in the padding."""
    size = sharding.bounds[rank][1] - sharding.bounds[rank][0]
    exact, plain = (sharding.columns(full, rank) for full in wanted)
    # E is that of the whole row's gradient: a shard without the target has no large elements.
    error = naive_error(*wanted, grad.dtype)
    assert_close(grad[..., :size], exact, plain, f"gradient of {what}", rows_error=error)
    assert bool((grad[..., size:] == 0).all()), f"gradient of {what}: padding is not exactly 0"
