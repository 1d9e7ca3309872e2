"""A module's process group that survives copies and pickles.

A copy shares the group object. A pickle keeps its name and its global ranks; after loading, the
group of that name is used if it has exactly these ranks, and else the first use raises.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, TypeVar

import torch.distributed as dist
from torch import nn

Module = TypeVar("Module", bound="HoldsGroup")


@dataclass(frozen=True)
class _Remembered:
    """What a pickle knows of a group."""

    name: str
    ranks: tuple[int, ...]

    def find(self, module: str) -> dist.ProcessGroup:
        """The group of that name and these ranks in this process, else RuntimeError."""
        if not dist.is_available() or not dist.is_initialized():
            raise RuntimeError(self._problem(module, "no process group is initialized here"))
        groups = [g for g in dist.distributed_c10d._world.pg_map if g.group_name == self.name]
        if not groups:
            raise RuntimeError(self._problem(module, "here is no group of that name"))
        ranks = dist.get_process_group_ranks(groups[0])
        if tuple(ranks) != self.ranks:
            raise RuntimeError(self._problem(module, f"here that name has the ranks {ranks}"))
        return groups[0]

    def _problem(self, module: str, why: str) -> str:
        rank = f" (rank {dist.get_rank()})" if dist.is_available() and dist.is_initialized() else ""
        return (
            f"{module} was saved with the process group {self.name!r} of global ranks "
            f"{list(self.ranks)}, but {why}{rank}; say which group it has now: "
            "module.group = ..., or None for one rank"
        )


def _remembered(group: object) -> object:
    """What to keep of ``group``; what is no group of this process is left as it is."""
    if not isinstance(group, dist.ProcessGroup):
        return group
    try:
        return _Remembered(group.group_name, tuple(dist.get_process_group_ranks(group)))
    except (KeyError, ValueError, RuntimeError):  # made without torch.distributed's knowledge
        return group


class HoldsGroup(nn.Module):
    """Base of modules with a ``group``: None, or a ``ProcessGroup`` of this process."""

    _group: Any = None
    _pickled_group: Any = None
    """What a pickle says; taken when the group is set, for it may be destroyed before saving."""

    @property
    def group(self) -> dist.ProcessGroup | None:
        if isinstance(self._group, _Remembered):
            self._group = self._group.find(type(self).__name__)
        found: dist.ProcessGroup | None = self._group
        return found

    @group.setter
    def group(self, group: dist.ProcessGroup | None) -> None:
        self._group, self._pickled_group = group, _remembered(group)

    def __getstate__(self) -> dict[str, Any]:
        state = {**self.__dict__, "_group": self._pickled_group}
        state.pop("_pickled_group", None)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._pickled_group = self._group

    def __copy__(self: Module) -> Module:
        new = type(self).__new__(type(self))
        new.__dict__.update(self.__dict__)
        return new

    def __deepcopy__(self: Module, memo: dict[int, Any]) -> Module:
        new = type(self).__new__(type(self))
        memo[id(self)] = new
        shared = ("_group", "_pickled_group")
        new.__dict__.update({key: self.__dict__[key] for key in shared if key in self.__dict__})
        for key, value in self.__dict__.items():
            if key not in shared:
                new.__dict__[key] = copy.deepcopy(value, memo)
        return new
