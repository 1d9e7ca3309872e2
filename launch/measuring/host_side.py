"""What the host does for a call that a card serves, seen without a card.

The Triton engine gets CPU tensors, and each launch of a kernel of its own is counted and not made:
so the loss means nothing. torch's operations run on the CPU, on a few numbers; those that a card
would need a kernel for are counted. The time is that of everything else: the checks, the views,
the allocations, the tape. A launch of either kind comes on top, some microseconds each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode

from vocab_parallel_ce import engines, passes
from vocab_parallel_ce.engines.triton import engine as triton
from vocab_parallel_ce.engines.triton import rows as triton_rows

_ALLOCATIONS = ("empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided")


class Launches(NamedTuple):
    """Of one call."""

    own: int
    """of the engine's kernels"""
    torch: int
    """of torch's: operations that are no view and no allocation"""


class _Kernels:
    """Any kernel of the engine: counted, not launched."""

    def __init__(self) -> None:
        self.count = 0

    def __getattr__(self, name: str) -> _Kernels:
        return self

    def __getitem__(self, grid: object) -> Callable[..., None]:
        return self._launch

    def _launch(self, *_: Any, **__: Any) -> None:
        self.count += 1


@contextmanager
def triton_without_launches() -> Iterator[_Kernels]:
    """Calls with engine="triton" on CPU tensors do what they would do on a card's, but launch."""
    kernels = _Kernels()
    places: tuple[tuple[Any, str, Callable[..., Any]], ...] = (
        (engines, "_engine_or_reason", lambda name: triton),
        (triton, "interpreting", lambda: True),
        (triton, "_kernels", lambda: kernels),
        (triton_rows, "_kernels", lambda: kernels),
        (passes, "_on_host", lambda *_: False),
    )
    before = [getattr(module, name) for module, name, _ in places]
    try:
        for module, name, stand_in in places:
            setattr(module, name, stand_in)
        yield kernels
    finally:
        for (module, name, _), function in zip(places, before, strict=True):
            setattr(module, name, function)


class Operations(TorchDispatchMode):
    """torch's operations in their order, views and allocations among them."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: list[OpOverload] = []

    def launches(self) -> int:
        """How many are no view and no allocation."""
        names = (f.overloadpacket.__name__ for f in self.seen if not f.is_view)
        return sum(name not in _ALLOCATIONS for name in names)

    def __torch_dispatch__(
        self,
        func: OpOverload,
        types: tuple[type, ...],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        self.seen.append(func)
        return func(*args, **(kwargs or {}))


def launches(step: Callable[[], object], kernels: _Kernels) -> Launches:
    """Of one ``step`` inside ``triton_without_launches``."""
    before = kernels.count
    with Operations() as operations:
        step()
    return Launches(kernels.count - before, operations.launches())
