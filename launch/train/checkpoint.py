"""Sharded checkpoints that are either complete or not there.

Weights split over the vocabulary, and their optimizer state, are handed to
torch.distributed.checkpoint as DTensors over the (dp, tp) mesh: each rank writes its own rows,
replicas are written once, and any number of ranks can load them again.

    OUT/checkpoints/step-00000040/    complete; holds run.json, what the run was
    OUT/checkpoints/latest            the name of the newest complete one
    OUT/checkpoints/partial/          being written

A checkpoint is written under `partial`, renamed when every rank has finished, and only then does
`latest` point to it; so a crash at any moment leaves `latest` with a complete checkpoint. The last
two are kept. With several hosts, OUT must lie on a file system they share.
"""

from __future__ import annotations

import json
import os
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
from vocab_parallel_ce.parallel.groups import ParallelGroups
from vocab_parallel_ce.parallel.layers import vocab_parallel_parameters

KEPT = 2


@dataclass(frozen=True)
class RunState:
    """How far a run has come."""

    step: int = 0
    """Steps done, which is also the number of the next one."""
    position: int = 0
    """Windows of text consumed."""


class Checkpoints:
    """Saves to and loads from one run's folder. Every method but `latest` is called by all ranks.

    `identity` is what makes two runs the same curve; loading refuses a checkpoint of another.
    """

    def __init__(self, folder: Path, groups: ParallelGroups, identity: dict[str, Any]) -> None:
        self.folder, self.groups, self.identity = folder, groups, identity

    def latest(self) -> Path | None:
        """The newest complete checkpoint."""
        try:
            name = (self.folder / "latest").read_text().strip()
        except FileNotFoundError:
            return None
        path = self.folder / name
        if not path.is_dir():
            raise ValueError(
                f"{self.folder / 'latest'} names {name!r}, which is not there; write the name "
                "of an existing checkpoint into it, or start over with --resume never"
            )
        return path

    def clear(self) -> None:
        """Removes all checkpoints of this run."""
        if self.groups.rank == 0:
            shutil.rmtree(self.folder, ignore_errors=True)
        self.groups.barrier()

    def save(self, model: nn.Module, optimizer: torch.optim.Optimizer, done: RunState) -> None:
        """Returns when the checkpoint is complete and is the latest."""
        partial, final = self.folder / "partial", self.folder / f"step-{done.step:08d}"
        first = self.groups.rank == 0
        if first:
            shutil.rmtree(partial, ignore_errors=True)
            shutil.rmtree(final, ignore_errors=True)
            partial.mkdir(parents=True)
            (partial / "run.json").write_text(json.dumps(self.identity, indent=2) + "\n")
        self.groups.barrier()
        state = self._tensors(model, optimizer)
        state["step"] = torch.tensor(done.step)
        state["position"] = torch.tensor(done.position)
        state.update(self._random_state())
        save(state, checkpoint_id=partial, process_group=self.groups.control)
        self.groups.barrier()
        if first:
            partial.rename(final)
            pointer = self.folder / "latest.partial"
            pointer.write_text(final.name + "\n")
            os.replace(pointer, self.folder / "latest")
            for old in sorted(self.folder.glob("step-*"))[:-KEPT]:
                shutil.rmtree(old)
        self.groups.barrier()

    def load(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> RunState:
        """Fills model, optimizer and random state from the latest checkpoint, if there is one."""
        path = self.latest()
        if path is None:
            return RunState()
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
