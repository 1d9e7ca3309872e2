"""result.json: what the comparison of the losses found, for whoever reads it by a program."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from vocab_parallel_ce.launch.measuring.made import made_here
from vocab_parallel_ce.launch.megatron_gpt.compare import Result
from vocab_parallel_ce.launch.megatron_gpt.trainer import MegatronTrainer


def leave_result(results: Sequence[Result], trainer: MegatronTrainer) -> None:
    """Writes result.json into the folder of the run; of rank 0."""
    options, groups = trainer.options, trainer.groups
    found = {
        "made": made_here(),
        "device": groups.device.type,
        "tp": groups.tp,
        "dtype": options.dtype,
        "tokens": options.shape.context * len(trainer.read()[0].ids),
        "columns": trainer.columns,
        "losses": [_as_dict(result) for result in results],
    }
    (options.out / "result.json").write_text(json.dumps(found, indent=1) + "\n")


def _as_dict(result: Result) -> dict[str, Any]:
    forward, backward = result.milliseconds
    return {
        "name": result.contender.label,
        "loss": result.loss,
        "z_loss": result.z_loss,
        "gradient_norm": result.gradient_norm,
        "gradient_error": result.errors.gradient_error,
        "forward_ms": forward,
        "backward_ms": backward,
        "peak_bytes": result.peak_bytes,
        "collectives": result.collectives,
    }
