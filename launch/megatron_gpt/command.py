"""Trains a GPTModel of megatron-core with this library's loss in place of Megatron's, or without.

    vocab-parallel-ce megatron-gpt
    torchrun --nproc-per-node 2 -m vocab_parallel_ce.launch.megatron_gpt --tp 2 --compare

Model, schedule, gradient reduction and optimizer are Megatron's; text, vocabulary and order of the
batches are those of ``launch/train``. Each step says what the loss cost. `--compare` ends with
Megatron's two losses and ours side by side, on the next batch under the same weights. Leaves
metrics.jsonl and loss.png in --out, and result.json of the comparison; there are no checkpoints, a
run starts afresh.

Runs on CPU ranks over Gloo. On cuda and npu, where Megatron (on npu: MindSpeed) is installed, it is
the same code, which was never run there.

Exit status: 0, 1 if the run broke off, 2 if an option cannot be served.
"""

from __future__ import annotations

import os
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

import torch
import typer

from vocab_parallel_ce.launch.command_line import (
    Cache,
    DataParallel,
    DeviceName,
    ModelVocab,
    TensorParallel,
    Text,
    Timeout,
    TrainingDtype,
    choice,
    folder,
    job,
    number,
    open_groups,
    positive,
    say,
    seed_option,
    usable_device,
    whole,
)
from vocab_parallel_ce.launch.measuring.memory import settle_malloc
from vocab_parallel_ce.launch.megatron_gpt.compare import compare, table
from vocab_parallel_ce.launch.megatron_gpt.loss import LossChoice
from vocab_parallel_ce.launch.megatron_gpt.model import megatron, require_megatron
from vocab_parallel_ce.launch.megatron_gpt.result import leave_result
from vocab_parallel_ce.launch.megatron_gpt.trainer import (
    MegatronMetrics,
    MegatronTrainer,
    MegatronTrainOptions,
)
from vocab_parallel_ce.launch.options import make_folder
from vocab_parallel_ce.launch.terminal import show
from vocab_parallel_ce.launch.train.command import shared_corpus, what_was_asked_for
from vocab_parallel_ce.launch.train.gpt import GPTShape
from vocab_parallel_ce.launch.train.progress import TrainingLog, draw_curve, read_metrics
from vocab_parallel_ce.launch.train.text import default_cache, require_vocab_size, text_files
from vocab_parallel_ce.parallel.groups import ParallelGroups


def prepare(
    groups: ParallelGroups, options: MegatronTrainOptions, paths: list[Path], cache: Path
) -> MegatronTrainer:
    """Everything before the first step. A ValueError from here is about what the user asked for."""
    options.model.check(groups.tp)
    make_folder("--out", options.out)
    begin = time.perf_counter()
    corpus = shared_corpus(groups, paths, options.shape.vocab_size, cache)
    say(groups, f"{len(corpus.tokens):,} tokens of text ({time.perf_counter() - begin:.1f} s)")
    trainer = MegatronTrainer(options, groups, corpus)
    if groups.rank == 0:
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
        title = (
            f"GPTModel of megatron-core {megatron_version()}, loss: {options.loss.value}, "
            f"{options.dtype}; tp {groups.tp}, dp {groups.dp} on {groups.device.type}"
        )
        curve = read_metrics(options.metrics, MegatronMetrics)
        draw_curve(curve, options.out / "loss.png", title)
    say(groups, f"Metrics and curve are in {options.out}.")
    if not compare_losses:
        return
    say(groups, "Comparing the losses on the next batch, under the same weights ...")
    results = compare(trainer)
    if groups.rank == 0:
        show(table(results, trainer))
        leave_result(results, trainer)


def main(
    steps: Annotated[int, whole("Steps to train.")] = 40,
    batch: Annotated[int, whole("Sequences a step, over all ranks.")] = 16,
    context: Annotated[int, whole("Tokens a sequence.")] = 128,
    accumulate: Annotated[int, whole("Micro-batches a step.")] = 1,
    lr: Annotated[float, positive("Learning rate of Megatron's Adam.")] = 1e-3,
    warmup: Annotated[int, whole("Steps over which lr rises.", least=0)] = 10,
    clip: Annotated[float, number("Largest gradient norm; 0: no limit.")] = 1.0,
    seed: Annotated[int, seed_option("Of weights and order of the text.")] = 0,
    tp: TensorParallel = None,
    dp: DataParallel = None,
    sequence_parallel: Annotated[bool, typer.Option(help="Megatron's, over the tp ranks.")] = False,
    loss: Annotated[LossChoice, choice(LossChoice, "Whose loss to train with.")] = LossChoice.ours,
    compare_losses: Annotated[
        bool, typer.Option("--compare/--no-compare", help="All losses side by side at the end.")
    ] = False,
    inplace: Annotated[bool, typer.Option(help="Ours: gradient overwrites the logits.")] = True,
    z_loss: Annotated[float, number("Ours: adds this times lse squared.")] = 0.0,
    vocab: ModelVocab = 32768,
    divisible_by: Annotated[
        int, whole("Pads the vocabulary to a multiple of it on each tp rank.")
    ] = 128,
    width: Annotated[int, whole("Width of the model.")] = 128,
    layers: Annotated[int, whole("Transformer layers.")] = 2,
    heads: Annotated[int, whole("Attention heads.")] = 4,
    tied: Annotated[
        bool, typer.Option("--tied/--untied", help="One weight for embedding and head.")
    ] = False,
    dtype: TrainingDtype = "fp32",
    text: Text = None,
    cache: Cache = None,
    out: Annotated[Path, folder("Folder of the run.")] = Path("runs/megatron"),
    log_every: Annotated[int, whole("Steps between lines off a terminal.")] = 5,
    device: DeviceName = None,
    timeout: Timeout = 600.0,
) -> None:
    """Trains a GPTModel of megatron-core with its own loss or with this library's.

    Alone it is one process; for several ranks: torchrun -m vocab_parallel_ce.launch.megatron_gpt.
    """
    torch.set_float32_matmul_precision("highest")  # tp=2 follows tp=1 closely only without TF32
    begin = time.perf_counter()
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or the profiler tells of every start
    with what_was_asked_for():
        options = MegatronTrainOptions(
            shape=GPTShape(vocab, context, width, layers, heads, tied=tied),
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
        require_vocab_size(vocab)
        text_files(text or [])
        kind = usable_device(device)
        require_megatron(kind)
        groups = open_groups(kind, tp, dp, timeout)
    settle_malloc(strict=False)
    with groups, megatron(groups, seed, timeout):
        with what_was_asked_for():
            trainer = prepare(groups, options, text or [], cache or default_cache())
        run(trainer, compare_losses)
        say(groups, f"{time.perf_counter() - begin:.0f} s in all.")


app = job("megatron-gpt", main)
