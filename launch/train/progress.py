"""What a run shows and leaves behind: a bar or lines, metrics.jsonl, and the curve as a picture.

Only rank 0 writes. A terminal gets a live bar; a file or a pipe gets a plain line every few steps.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar, overload

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn


@dataclass(frozen=True)
class StepMetrics:
    """One line of metrics.jsonl."""

    step: int
    """Counted from 1: this many steps were done after it."""
    loss: float
    """Mean over the target tokens of the global batch, in nats; before this step's update."""
    lr: float
    grad_norm: float
    """2-norm over all parameters of all ranks, before clipping."""
    tokens: int
    """Tokens in the global batch."""
    tokens_per_second: float
    loss_share: float
    """Part of the step's time spent in the loss, forward and backward; 0 to 1, of rank 0."""

    def line(self, steps: int) -> str:
        return (
            f"step {self.step:>{len(str(steps))}}/{steps}  loss {self.loss:.4f}  "
            f"{self.tokens_per_second:,.0f} tokens/s  {100 * self.loss_share:.0f}% in the loss"
        )


class TrainingLog:
    """Shows steps and appends them to the metrics file. Use it as a context manager."""

    def __init__(self, metrics: Path, done: int, steps: int, line_every: int) -> None:
        """Continues after step `done`. Later lines are dropped: a run that died may have got
        further than its last checkpoint."""
        self.metrics, self.steps, self.line_every = metrics, steps, line_every
        kept = [line for line in read_metrics(metrics) if line.step <= done]
        replacement = metrics.with_suffix(".partial")
        replacement.write_text("".join(json.dumps(asdict(line)) + "\n" for line in kept))
        os.replace(replacement, metrics)
        self.file = metrics.open("a")
        self.bar: Progress | None = None
        if sys.stdout.isatty():
            self.bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                TimeRemainingColumn(),
                console=Console(file=sys.stdout),
            )
            self.task = self.bar.add_task("", total=steps, completed=done)

    def step(self, metrics: StepMetrics) -> None:
        self.file.write(json.dumps(asdict(metrics)) + "\n")
        self.file.flush()  # a run that is killed keeps its lines
        line = metrics.line(self.steps)
        if self.bar is not None:
            self.bar.update(self.task, completed=metrics.step, description=line)
        elif metrics.step % self.line_every == 0 or metrics.step in (1, self.steps):
            print(line, flush=True)

    def __enter__(self) -> TrainingLog:
        if self.bar is not None:
            self.bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.bar is not None:
            self.bar.stop()
        self.file.close()


M = TypeVar("M", bound=StepMetrics)


@overload
def read_metrics(path: Path) -> list[StepMetrics]: ...
@overload
def read_metrics(path: Path, kind: type[M]) -> list[M]: ...
def read_metrics(path: Path, kind: type[StepMetrics] = StepMetrics) -> list[Any]:
    """All complete lines; none if there is no file. A last line cut short by a kill is dropped."""
    if not path.exists():
        return []
    lines = path.read_text().splitlines(keepends=True)
    return [kind(**json.loads(line)) for line in lines if line.endswith("\n")]


def draw_curve(lines: Sequence[StepMetrics], picture: Path, title: str) -> None:
    """The loss over the steps as a PNG. `title`: what was trained, how."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    steps, losses = [line.step for line in lines], [line.loss for line in lines]
    label = f"training loss, {losses[0]:.3f} to {losses[-1]:.3f}" if losses else "no step was done"
    axes.plot(steps, losses, linewidth=1.2, label=label)
    axes.set_title(title, fontsize=9)
    axes.legend(loc="upper right", frameon=False)
    axes.set_xlabel("step")
    axes.set_ylabel("loss [nats per token]")
    axes.grid(alpha=0.3)
    figure.savefig(picture, dpi=130)
