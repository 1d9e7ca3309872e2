"""Trains a small GPT with the vocabulary split across ranks; the library's main job.

    vocab-parallel-ce train
    torchrun --nproc-per-node 2 -m vocab_parallel_ce.launch.train --tp 2
    torchrun --nproc-per-node 2 -m vocab_parallel_ce.launch.train --tp 2 --steps 500 --dtype bf16

The vocabulary is byte-level BPE of 32,768 tokens, trained on the spot on the sources of Python's
standard library, or on `--text`. Leaves in --out: metrics.jsonl, loss.png and sharded checkpoints,
from which the same command continues; so a run survives the loss of a rank under
`torchrun --max-restarts`. At its end it compares its loss and gradient with an unsharded fp64
reference and fails if they are off; result.json holds what it found.

Exit status: 0, 1 if that comparison failed or the run broke off, 2 if an option cannot be served.
"""

from __future__ import annotations

import enum
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Annotated

import torch
import typer

from vocab_parallel_ce import VocabShard
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
    whole,
)
from vocab_parallel_ce.launch.options import make_folder
from vocab_parallel_ce.launch.refusal import FAILED, Refusal
from vocab_parallel_ce.launch.train.checkpoint import Checkpoints
from vocab_parallel_ce.launch.train.gpt import GPTShape
from vocab_parallel_ce.launch.train.progress import TrainingLog, draw_curve, read_metrics
from vocab_parallel_ce.launch.train.result import Proof, leave_result
from vocab_parallel_ce.launch.train.selfcheck import (
    check_against_reference,
    compare_cost,
    replicas_agree,
)
from vocab_parallel_ce.launch.train.shared import require_shared
from vocab_parallel_ce.launch.train.text import (
    Corpus,
    default_cache,
    load_corpus,
    require_vocab_size,
    text_files,
)
from vocab_parallel_ce.launch.train.trainer import Trainer, TrainOptions
from vocab_parallel_ce.parallel.environment import environment_int
from vocab_parallel_ce.parallel.groups import ParallelGroups


class Resume(str, enum.Enum):
    """auto: continue if --out has a checkpoint; never: start over; must: refuse to start over."""

    auto = "auto"
    never = "never"
    must = "must"


def shared_corpus(
    groups: ParallelGroups, paths: list[Path], vocab_size: int, cache: Path
) -> Corpus:
    """The corpus, made by one rank of each host while the others wait, and compared among all."""
    goes_first = environment_int("LOCAL_RANK", 0) == 0
    corpus = load_corpus(paths, vocab_size, cache) if goes_first else None
    groups.barrier()
    corpus = corpus or load_corpus(paths, vocab_size, cache)
    fingerprints = groups.gather(corpus.fingerprint)
    if len(set(fingerprints)) > 1:
        raise ValueError(
            f"the text differs between ranks (fingerprints {fingerprints}); "
            "give all hosts the same files with --text"
        )
    return corpus


def begin_or_continue(trainer: Trainer, resume: Resume) -> None:
    """Continues, or clears the run's folder, as asked."""
    # A restart continues what this command began. Hosts count restarts apart, so all are asked.
    restarts = trainer.groups.gather(environment_int("TORCHELASTIC_RESTART_COUNT", 0))
    if resume is Resume.never and not any(restarts):
        trainer.checkpoints.clear()
        if trainer.groups.rank == 0:
            trainer.options.metrics.unlink(missing_ok=True)
        trainer.groups.barrier()
    trainer.resume()


def check_and_compare(trainer: Trainer) -> Proof:
    """Prints what the run proves of itself."""
    groups = trainer.groups
    call = trainer.last_loss_call()
    say(
        groups,
        f"Comparing the loss of the last batch, {len(call.target)} rows of "
        f"{call.shard.vocab_size}, with the unsharded fp64 reference ...",
    )
    errors = check_against_reference(call, groups)
    agree = replicas_agree(trainer.model, groups)
    fused = trainer.fused_difference() if trainer.fused else None
    verdicts = groups.gather(errors.within and agree and (fused is None or fused.within))
    say(
        groups,
        f"  loss      {errors.loss:.7f}, reference {errors.reference:.7f}, "
        f"relative error {errors.loss_error:.1e}\n"
        f"  gradient  largest error {errors.gradient_error:.1e} of the largest element\n"
        f"            (F.cross_entropy in fp32: {errors.plain_gradient_error:.1e})\n"
        f"  replicated parameters are {'' if agree else 'NOT '}equal on all ranks, bit for bit",
    )
    if fused is not None:
        say(
            groups,
            f"  fused head, beside head and loss apart: loss off by {fused.loss:.1e}, gradient of "
            f"the hidden\n            states by {fused.hidden_gradient:.1e} of its largest element",
        )
    say(groups, "Forward and backward of that batch, medians of rank 0:")
    costs = compare_cost(call, groups)
    for cost in costs:
        say(groups, cost.line())
    ok = all(verdicts)
    failed = [rank for rank, verdict in enumerate(verdicts) if not verdict]
    say(groups, "Check passed." if ok else f"CHECK FAILED on ranks {failed}.")
    return Proof(ok, len(call.target), errors, costs)


def where(groups: ParallelGroups, shard: VocabShard) -> str:
    """How model and vocabulary lie on the ranks, in words."""
    if groups.world_size == 1:
        return f"on one {groups.device.type} process; vocabulary of {shard.vocab_size:,}"
    return (
        f"on each of {groups.world_size} {groups.device.type} ranks (tp {groups.tp}, "
        f"dp {groups.dp}); rank 0 owns ids {shard.start} to {shard.stop - 1} of "
        f"{shard.vocab_size}"
    )


def prepare(
    groups: ParallelGroups, options: TrainOptions, paths: list[Path], cache: Path, resume: Resume
) -> Trainer:
    """Everything before the first step. A ValueError from here is about what the user asked for."""
    make_folder("--out", options.out)
    require_shared(options.out, groups)
    if resume is Resume.must and Checkpoints(options.checkpoints, groups, {}).latest() is None:
        raise ValueError(f"--resume must, but {options.out} has no checkpoint")
    begin = time.perf_counter()
    corpus = shared_corpus(groups, paths, options.shape.vocab_size, cache)
    say(groups, f"{len(corpus.tokens):,} tokens of text ({time.perf_counter() - begin:.1f} s)")
    trainer = Trainer(options, groups, corpus)
    begin_or_continue(trainer, resume)
    parameters = sum(p.numel() for p in trainer.model.parameters())
    say(groups, f"{parameters:,} parameters {where(groups, trainer.shard)}")
    begin = time.perf_counter()
    trainer.warm_up()
    groups.barrier()
    say(groups, f"The loss is ready to run ({time.perf_counter() - begin:.1f} s).")
    if trainer.state.step:
        say(groups, f"Continuing {options.out} after step {trainer.state.step}.")
    return trainer


def train_and_check(trainer: Trainer, check: bool) -> Proof | None:
    """The job itself, and what it proves of itself where it shall."""
    groups, options = trainer.groups, trainer.options
    log = None
    if groups.rank == 0:
        log = TrainingLog(options.metrics, trainer.state.step, options.steps, options.log_every)
    with log or nullcontext():
        trainer.train(log)
    if groups.rank == 0:
        shape = options.shape
        title = (
            f"GPT of width {shape.width}, vocabulary of {shape.vocab_size:,}, {options.dtype}; "
            f"tp {groups.tp}, dp {groups.dp} on {groups.device.type}"
        )
        draw_curve(read_metrics(options.metrics), options.out / "loss.png", title)
    say(groups, f"Metrics, curve and checkpoints are in {options.out}.")
    return check_and_compare(trainer) if check else None


@contextmanager
def what_was_asked_for() -> Iterator[None]:
    """A ValueError, or a file that cannot be had, ends the job in one line: both are the user's."""
    try:
        yield
    except ValueError as error:
        raise Refusal(error) from None
    except OSError as error:
        if error.filename is None:
            raise
        raise Refusal(
            f"{error.filename}: {error.strerror}; see --text, --cache and --out"
        ) from None


def main(
    steps: Annotated[int, whole("Train up to this step.")] = 120,
    batch: Annotated[int, whole("Sequences a step, over all ranks.")] = 16,
    context: Annotated[int, whole("Tokens a sequence.")] = 128,
    accumulate: Annotated[int, whole("Micro-batches a step.")] = 1,
    lr: Annotated[float, positive("Learning rate of AdamW.")] = 1e-3,
    warmup: Annotated[int, whole("Steps over which lr rises.", least=0)] = 10,
    clip: Annotated[float, number("Largest gradient norm; 0: no limit.")] = 1.0,
    seed: Annotated[int, seed_option("Of weights, order of the text, dropout.")] = 0,
    tp: TensorParallel = None,
    dp: DataParallel = None,
    vocab: ModelVocab = 32768,
    width: Annotated[int, whole("Width of the model.")] = 128,
    layers: Annotated[int, whole("Transformer blocks.")] = 2,
    heads: Annotated[int, whole("Attention heads.")] = 4,
    dropout: Annotated[float, number("Dropped part of each block's output.")] = 0.0,
    tied: Annotated[
        bool, typer.Option("--tied/--untied", help="One weight for embedding and head.")
    ] = False,
    dtype: TrainingDtype = "fp32",
    label_smoothing: Annotated[float, number("In [0, 1].")] = 0.0,
    z_loss: Annotated[float, number("Adds this times lse squared.")] = 0.0,
    inplace: Annotated[bool, typer.Option(help="Gradient overwrites the logits.")] = True,
    fused_head: Annotated[
        bool | None,
        typer.Option(
            "--fused-head/--no-fused-head",
            help="Head and loss together; default: where the logits would exceed its budget.",
            show_default=False,
        ),
    ] = None,
    text: Text = None,
    cache: Cache = None,
    out: Annotated[Path, folder("Folder of the run.")] = Path("runs/train"),
    checkpoint_every: Annotated[int, whole("Steps between checkpoints.")] = 50,
    resume: Annotated[
        Resume, choice(Resume, "Whether to continue what lies in --out.")
    ] = Resume.auto,
    check: Annotated[bool, typer.Option(help="Compare with the reference at the end.")] = True,
    log_every: Annotated[int, whole("Steps between lines off a terminal.")] = 10,
    device: DeviceName = None,
    timeout: Timeout = 600.0,
    die_at_step: Annotated[int, typer.Option(hidden=True)] = 0,
) -> None:
    """Trains a GPT whose vocabulary is split across tensor-parallel ranks.

    Alone it is one process; for several ranks: torchrun -m vocab_parallel_ce.launch.train. It
    continues from the checkpoints in --out, and at its end compares its loss and gradient with an
    unsharded fp64 reference.
    """
    torch.set_float32_matmul_precision("highest")  # tp=2 follows tp=1 closely only without TF32
    begin = time.perf_counter()
    with what_was_asked_for():
        options = TrainOptions(
            shape=GPTShape(vocab, context, width, layers, heads, dropout, tied),
            steps=steps,
            batch=batch,
            accumulate=accumulate,
            lr=lr,
            warmup=warmup,
            clip=clip,
            seed=seed,
            dtype=dtype,
            label_smoothing=label_smoothing,
            z_loss=z_loss,
            inplace=inplace,
            fused_head=fused_head,
            out=out,
            checkpoint_every=checkpoint_every,
            log_every=log_every,
            die_at_step=die_at_step,
        )
        # Here, where every rank finds the same: only one of them will make the text.
        require_vocab_size(vocab)
        text_files(text or [])
        groups = open_groups(device, tp, dp, timeout)
    with groups:
        with what_was_asked_for():
            trainer = prepare(groups, options, text or [], cache or default_cache(), resume)
        proof = train_and_check(trainer, check)
        seconds = time.perf_counter() - begin
        if proof is not None and groups.rank == 0:
            leave_result(trainer, proof, seconds)
        say(groups, f"{seconds:.0f} s in all.")
    if proof is not None and not proof.ok:
        raise typer.Exit(FAILED)


app = job("train", main)
