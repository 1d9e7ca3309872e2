"""result.json: what a run found at its end, for whoever reads it by a program."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

from vocab_parallel_ce.launch.measuring.made import made_here
from vocab_parallel_ce.launch.train.progress import read_metrics
from vocab_parallel_ce.launch.train.selfcheck import Cost, Errors
from vocab_parallel_ce.launch.train.trainer import Trainer


@dataclass(frozen=True)
class Proof:
    """What the self-check said."""

    ok: bool
    """on all ranks"""
    rows: int
    """of the batch that was checked"""
    errors: Errors
    costs: list[Cost]
    """of the loss of that batch, and of what one would otherwise use"""


def leave_result(trainer: Trainer, proof: Proof, seconds: float) -> None:
    """Writes result.json into the folder of the run; of rank 0."""
    options, groups = trainer.options, trainer.groups
    losses = [line.loss for line in read_metrics(options.metrics)]
    result = {
        "made": made_here(),
        "device": groups.device.type,
        "tp": groups.tp,
        "dp": groups.dp,
        "dtype": options.dtype,
        "vocab_size": options.shape.vocab_size,
        "steps": options.steps,
        "seconds": seconds,
        "first_loss": losses[0],
        "last_loss": losses[-1],
        **asdict(proof),
    }
    (options.out / "result.json").write_text(json.dumps(result, indent=1) + "\n")
