"""Sharded checkpoints that are either complete or not there.

Weights split over the vocabulary, and their optimizer state, are handed to
torch.distributed.checkpoint as DTensors over the (dp, tp) mesh: each rank writes its own rows,
replicas are written once, and any number of ranks can load them again.

    OUT/checkpoints/step-00000040/    complete; holds run.json, what the run was, and digests.json
    OUT/checkpoints/latest            the name of the newest complete one
    OUT/checkpoints/partial/          being written

A checkpoint is written under `partial`, renamed when every rank has finished and sees all of it,
and only then does `latest` point to it; each of these steps is on the disk before the next is
taken. So a crash at any moment leaves `latest` with a complete checkpoint. The last two are kept.
With several hosts, OUT must lie on a file system they share.

Before a checkpoint is loaded every file is compared with its digest. Rank 0 alone decides which one
it is, and all ranks come to the same verdict.
"""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.tensor import DTensor, Replicate, Shard

from vocab_parallel_ce import VocabShard
from vocab_parallel_ce.launch.train.shared import require_seen_by_all
from vocab_parallel_ce.launch.train.whole import (
    digests_of,
    problem_in,
    sync,
    write_digests,
    write_durably,
)
from vocab_parallel_ce.parallel.groups import ParallelGroups
from vocab_parallel_ce.parallel.layers import vocab_parallel_parameters

KEPT = 2
_NAME = re.compile(r"step-\d{8,}")


@dataclass(frozen=True)
class RunState:
    """How far a run has come."""

    step: int = 0
    """Steps done, which is also the number of the next one."""
    position: int = 0
    """Windows of text consumed."""


class Checkpoints:
    """Saves to and loads from one run's folder. Every method is called by all ranks.

    `identity` is what makes two runs the same curve; loading refuses a checkpoint of another.
    """

    def __init__(self, folder: Path, groups: ParallelGroups, identity: dict[str, Any]) -> None:
        self.folder, self.groups, self.identity = folder, groups, identity

    def latest(self) -> Path | None:
        """The newest complete checkpoint, as rank 0 finds it. ValueError where `latest` is bad."""
        name, problem = self.groups.gather(self._named_by_latest())[0]
        if problem:
            raise ValueError(f"{problem}; {self._way_out(bad=name)}")
        return self.folder / name if name else None

    def _named_by_latest(self) -> tuple[str, str]:
        """(name, what is wrong with it): both empty where there is no checkpoint."""
        pointer, there = self.folder / "latest", _steps_in(self.folder)
        try:
            raw = pointer.read_bytes()
        except FileNotFoundError:
            # A run that was cut off between the renaming and the pointer has one all the same.
            return (there[-1] if there else ""), ""
        except OSError as error:
            return "", f"{pointer} cannot be read: {error.strerror}"
        name = raw[:100].decode("ascii", "replace").strip()
        if not _NAME.fullmatch(name):
            return "", f"{pointer} holds {raw[:40]!r}, which names no checkpoint"
        return name, "" if name in there else f"{pointer} names {name}, which is not there"

    def _way_out(self, bad: str) -> str:
        """Which other checkpoint is whole, and how to continue from it. All ranks call it."""
        for name in reversed(self.groups.gather(_steps_in(self.folder))[0]):
            if name != bad and not self._problem_in(self.folder / name):
                return (
                    f"{name} is whole: to continue from it write its name into "
                    f"{self.folder / 'latest'}"
                )
        return "no other checkpoint there is whole: start over with --resume never"

    def _problem_in(self, path: Path) -> str:
        """What the first rank that finds one says; the ranks share the reading."""
        mine = problem_in(path, self.groups.rank, self.groups.world_size)
        return next(filter(None, self.groups.gather(mine)), "")

    def clear(self) -> None:
        """Removes all checkpoints of this run."""
        if self.groups.rank == 0:
            shutil.rmtree(self.folder, ignore_errors=True)
        self.groups.barrier()

    def save(self, model: nn.Module, optimizer: torch.optim.Optimizer, done: RunState) -> None:
        """Returns when the checkpoint is complete and is the latest. Refusal where some rank does
        not see it."""
        partial, final = self.folder / "partial", self.folder / f"step-{done.step:08d}"
        first = self.groups.rank == 0
        if first:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            (partial / "run.json").write_text(json.dumps(self.identity, indent=2) + "\n")
        self.groups.barrier()
        state = self._tensors(model, optimizer)
        state["step"] = torch.tensor(done.step)
        state["position"] = torch.tensor(done.position)
        state.update(self._random_state())
        save(state, checkpoint_id=partial, process_group=self.groups.control)
        self.groups.barrier()
        self._seal(partial)
        if first:
            shutil.rmtree(final, ignore_errors=True)
            partial.rename(final)
            sync(self.folder)
            write_durably(self.folder / "latest", final.name + "\n")
            upto = [name for name in _steps_in(self.folder) if name <= final.name]
            for old in upto[:-KEPT]:
                shutil.rmtree(self.folder / old)
        self.groups.barrier()

    def _seal(self, partial: Path) -> None:
        """Digests of all files, each by the rank that wrote it; every rank sees all of them."""
        mine = f"__{self.groups.rank}_"
        names = [path.name for path in partial.iterdir()]
        own = [name for name in names if name.startswith(mine)]
        if self.groups.rank == 0:
            own += [name for name in names if not name.startswith("__")]
        of_ranks = self.groups.gather(digests_of(partial, own))
        digests = {name: value for each in of_ranks for name, value in each.items()}
        require_seen_by_all(
            self.folder.parent,
            lambda: all((partial / name).exists() for name in digests),
            self.groups,
        )
        if self.groups.rank == 0:
            write_digests(partial, digests)

    def load(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> RunState:
        """Fills model, optimizer and random state from the latest checkpoint, if there is one.

        ValueError, the same on every rank, where it is damaged or of another run.
        """
        path = self.latest()
        if path is None:
            return RunState()
        problem = self._problem_in(path)
        if problem:
            raise ValueError(f"{problem}; {self._way_out(bad=path.name)}")
        self._refuse_another_run(path)
        _create_adam_state(optimizer)
        state = self._tensors(model, optimizer)
        state["step"], state["position"] = torch.tensor(0), torch.tensor(0)
        stored = FileSystemReader(path).read_metadata().state_dict_metadata
        # A data-parallel rank or a kind of device that the saved run did not have keeps its seed.
        random_state = {k: v for k, v in self._random_state().items() if k in stored}
        state.update(random_state)
        load(state, checkpoint_id=path, process_group=self.groups.control)
        self._restore_random_state(random_state)
        return RunState(int(state["step"]), int(state["position"]))

    def _refuse_another_run(self, path: Path) -> None:
        there = json.loads((path / "run.json").read_text())
        keys = sorted(there.keys() | self.identity.keys())
        differing = [
            f"{key}={there.get(key)!r} (now {self.identity.get(key)!r})"
            for key in keys
            if there.get(key) != self.identity.get(key)
        ]
        if differing:
            raise ValueError(
                f"{path} is of a run with {', '.join(differing)}; continue it with its own "
                "options, choose another --out, or start over with --resume never"
            )

    def _tensors(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """Name -> tensor that shares storage with the model or the optimizer."""
        split = vocab_parallel_parameters(model)
        state: dict[str, Any] = {}
        for name, parameter in model.named_parameters():
            entries = {f"model.{name}": parameter.detach()}
            for key, value in optimizer.state[parameter].items():
                entries[f"optimizer.{name}.{key}"] = value
            for key, value in entries.items():
                rows_are_split = name in split and value.shape == parameter.shape
                state[key] = self._sharded(value, split[name]) if rows_are_split else value
        return state

    def _sharded(self, rows: Tensor, shard: VocabShard) -> DTensor:
        if shard != VocabShard.even(shard.vocab_size, self.groups.tp_group):
            raise ValueError(f"{shard} is not an even shard; only those can be checkpointed")
        return DTensor.from_local(
            rows,
            self.groups.mesh,
            [Replicate(), Shard(0)],
            run_check=False,
            shape=torch.Size([shard.vocab_size, *rows.shape[1:]]),
            stride=rows.stride(),
        )

    def _random_state(self) -> dict[str, Tensor]:
        """One state per data-parallel rank: the ranks of a model copy draw the same numbers."""
        place = f"dp{self.groups.dp_rank}"
        state = {f"random.cpu.{place}": torch.get_rng_state()}
        kind = self.groups.device.type
        if kind != "cpu":
            state[f"random.{kind}.{place}"] = torch.get_device_module(kind).get_rng_state()
        return state

    def _restore_random_state(self, state: dict[str, Tensor]) -> None:
        for name, value in state.items():
            kind = name.split(".")[1]
            if kind == "cpu":
                torch.set_rng_state(value)
            else:
                torch.get_device_module(kind).set_rng_state(value)


def _steps_in(folder: Path) -> list[str]:
    """Names of the checkpoints there, whole or not, oldest first."""
    return sorted(path.name for path in folder.glob("step-*") if _NAME.fullmatch(path.name))


def _create_adam_state(optimizer: torch.optim.Optimizer) -> None:
    """The state Adam makes in its first step, as something to load into."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            counter_device = parameter.device if group.get("fused") else torch.device("cpu")
            optimizer.state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32, device=counter_device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }
