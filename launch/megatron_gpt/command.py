"""Trains a GPTModel of megatron-core with this library's loss in place of Megatron's, or without.

    python -m vocab_parallel_ce.launch.megatron_gpt
    torchrun --nproc-per-node 2 -m vocab_parallel_ce.launch.megatron_gpt --tp 2 --compare

Model, schedule, gradient reduction and optimizer are Megatron's; text, vocabulary and order of the
batches are those of ``launch/train.py``. Each step says what the loss cost. `--compare` ends with
Megatron's two losses and ours side by side, on the next batch under the same weights. Leaves
metrics.jsonl and loss.png in --out; there are no checkpoints, a run starts afresh.

Runs on CPU ranks over Gloo. On cuda and npu, where Megatron (on npu: MindSpeed) is installed, it is
the same code, which was never run there.
"""

from __future__ import annotations

import os
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from vocab_parallel_ce.launch.measuring.memory import settle_malloc
from vocab_parallel_ce.launch.megatron_gpt.compare import compare, table
from vocab_parallel_ce.launch.megatron_gpt.loss import LossChoice
from vocab_parallel_ce.launch.megatron_gpt.model import megatron, require_megatron
from vocab_parallel_ce.launch.megatron_gpt.trainer import (
    MegatronMetrics,
    MegatronTrainer,
    MegatronTrainOptions,
)
from vocab_parallel_ce.launch.train.command import refuse, say, shared_corpus
from vocab_parallel_ce.launch.train.gpt import GPTShape
from vocab_parallel_ce.launch.train.progress import TrainingLog, draw_curve, read_metrics
from vocab_parallel_ce.launch.train.text import default_cache, require_vocab_size, text_files
from vocab_parallel_ce.parallel.groups import ParallelGroups, default_device_type

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


def prepare(
    groups: ParallelGroups, options: MegatronTrainOptions, paths: list[Path], cache: Path
) -> MegatronTrainer:
    """Everything before the first step. A ValueError from here is about what the user asked for."""
    options.model.check(groups.tp)
    begin = time.perf_counter()
    corpus = shared_corpus(groups, paths, options.shape.vocab_size, cache)
    say(groups, f"{len(corpus.tokens):,} tokens of text ({time.perf_counter() - begin:.1f} s)")
    trainer = MegatronTrainer(options, groups, corpus)
    if groups.rank == 0:
        options.out.mkdir(parents=True, exist_ok=True)
        options.metrics.unlink(missing_ok=True)
    parameters = sum(p.numel() for p in trainer.model.parameters())
    padding = trainer.gpt.vocab_size - options.shape.vocab_size
    say(
        groups,
        f"GPTModel of megatron-core {megatron_version()}: {parameters:,} parameters on each of "
        f"{groups.world_size} {groups.device.type} ranks (tp {groups.tp}, dp {groups.dp}), "
        f"vocabulary of {options.shape.vocab_size} and {padding} of padding; "
        f"loss: {options.loss.value}",
    )
    return trainer


def megatron_version() -> str:
    import megatron.core

    return str(megatron.core.__version__)


def run(trainer: MegatronTrainer, compare_losses: bool) -> None:
    """The job itself."""
    groups, options = trainer.groups, trainer.options
    log = None
    if groups.rank == 0:
        log = TrainingLog(options.metrics, 0, options.steps, options.log_every)
    with log or nullcontext():
        trainer.train(log)
    if groups.rank == 0:
        draw_curve(read_metrics(options.metrics, MegatronMetrics), options.out / "loss.png")
    say(groups, f"Metrics and curve are in {options.out}.")
    if not compare_losses:
        return
    results = compare(trainer)
    if groups.rank == 0:
        console = Console() if sys.stdout.isatty() else Console(width=140)
        console.print(table(results, trainer))


@app.command()
def main(
    steps: Annotated[int, typer.Option(help="Steps to train.")] = 40,
    batch: Annotated[int, typer.Option(help="Sequences a step, over all ranks.")] = 16,
    context: Annotated[int, typer.Option(help="Tokens a sequence.")] = 128,
    accumulate: Annotated[int, typer.Option(help="Micro-batches a step.")] = 1,
    lr: Annotated[float, typer.Option(help="Learning rate of Megatron's Adam.")] = 1e-3,
    warmup: Annotated[int, typer.Option(help="Steps over which lr rises.")] = 10,
    clip: Annotated[float, typer.Option(help="Largest gradient norm; 0: no limit.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Of weights and order of the text.")] = 0,
    tp: Annotated[int | None, typer.Option(help="Ranks that split the model.")] = None,
    dp: Annotated[int | None, typer.Option(help="Copies of the model.")] = None,
    sequence_parallel: Annotated[bool, typer.Option(help="Megatron's, over the tp ranks.")] = False,
    loss: Annotated[LossChoice, typer.Option(help="Whose loss to train with.")] = LossChoice.ours,
    compare_losses: Annotated[
        bool, typer.Option("--compare/--no-compare", help="All losses side by side at the end.")
    ] = False,
    inplace: Annotated[bool, typer.Option(help="Ours: gradient overwrites the logits.")] = True,
    z_loss: Annotated[float, typer.Option(help="Ours: adds this times lse squared.")] = 0.0,
    vocab_size: Annotated[int, typer.Option(help="Size of the BPE vocabulary.")] = 32768,
    divisible_by: Annotated[
        int, typer.Option(help="Pads the vocabulary to a multiple of it on each tp rank.")
    ] = 128,
    width: Annotated[int, typer.Option(help="Width of the model.")] = 128,
    layers: Annotated[int, typer.Option(help="Transformer layers.")] = 2,
    heads: Annotated[int, typer.Option(help="Attention heads.")] = 4,
    tied: Annotated[
        bool, typer.Option("--tied/--untied", help="One weight for embedding and head.")
    ] = False,
    dtype: Annotated[str, typer.Option(help="float32, or bfloat16 weights.")] = "float32",
    text: Annotated[list[Path] | None, typer.Option(help="Files or folders to train on.")] = None,
    cache: Annotated[Path | None, typer.Option(help="Keeps the tokens between runs.")] = None,
    out: Annotated[Path, typer.Option(help="Folder of the run.")] = Path("runs/megatron"),
    log_every: Annotated[int, typer.Option(help="Steps between lines off a terminal.")] = 5,
    device: Annotated[str | None, typer.Option(help="cpu, cuda or npu; else the best.")] = None,
    timeout: Annotated[float, typer.Option(help="Seconds a rank waits for others.")] = 600.0,
) -> None:
    """Trains a GPTModel of megatron-core with its own loss or with this library's."""
    begin = time.perf_counter()
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or the profiler tells of every start
    try:
        options = MegatronTrainOptions(
            shape=GPTShape(vocab_size, context, width, layers, heads, tied=tied),
            steps=steps,
            batch=batch,
            accumulate=accumulate,
            lr=lr,
            warmup=warmup,
            clip=clip,
            seed=seed,
            dtype=dtype,
            z_loss=z_loss,
            inplace=inplace,
            out=out,
            log_every=log_every,
            loss=loss,
            sequence_parallel=sequence_parallel,
            divisible_by=divisible_by,
        )
        # Here, where every rank finds the same: only one of them will make the text.
        require_vocab_size(vocab_size)
        text_files(text or [])
        kind = device or default_device_type()
        require_megatron(kind)
        groups = ParallelGroups.open(kind, tp=tp, dp=dp, timeout_seconds=timeout)
    except ValueError as error:
        refuse(error)
    settle_malloc(strict=False)
    with groups, megatron(groups, seed, timeout):
        try:
            trainer = prepare(groups, options, text or [], cache or default_cache())
        except ValueError as error:
            refuse(error)
        run(trainer, compare_losses)
        say(groups, f"{time.perf_counter() - begin:.0f} s in all.")
