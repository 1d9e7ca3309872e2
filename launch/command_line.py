"""What the jobs' command lines share: options of the same name and values, and one style of error.

    --dtype fp32|bf16|fp16        float32, bfloat16 and float16 are accepted too
    --vocab N                     or --vocab-size
    --rows N                      or --tokens
    --device npu|cuda|cpu         the best that is here where it is not given

The doctor, which must start without typer, takes the same values from ``options``.
"""

from __future__ import annotations

import difflib
import re
import sys
from collections.abc import Callable, Sequence
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from vocab_parallel_ce.launch import options
from vocab_parallel_ce.launch.alike import require_alike
from vocab_parallel_ce.launch.refusal import Refusal, say_and_leave
from vocab_parallel_ce.parallel.devices import default_device_type, device_problem
from vocab_parallel_ce.parallel.groups import ParallelGroups

# By name and not by import: typer brings its own copy of click since 0.20, click itself before.
_ClickException: type[Exception] = typer.BadParameter.__mro__[2]
SEE_HELP = "see --help"


class Command(TyperCommand):
    """Its errors are one line each, and its help is plain text that cuts no option's name."""

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings | {"rich_markup_mode": None})

    def main(self, args: Sequence[str] | None = None, *others: Any, **settings: Any) -> Any:
        """As typer's, which in its own way of standing alone would draw a box for an error."""
        typed = list(sys.argv[1:] if args is None else args)
        settings["standalone_mode"] = False
        try:
            status = super().main(typed, *others, **settings)
        except typer.Abort:
            sys.exit(1)
        except Refusal as refusal:
            say_and_leave(self.name or "", str(refusal), refusal.status)
        except _ClickException as error:
            say_and_leave(self.name or "", in_one_style(error, typed))
        sys.exit(status if isinstance(status, int) else 0)


def in_one_style(error: Any, typed: Sequence[str]) -> str:
    """typer's error as "--option value what is wrong"."""
    message = str(error.format_message()).strip().rstrip(".")
    parameter = getattr(error, "param", None)
    if parameter is not None and isinstance(error, typer.BadParameter):
        words = [word.partition("=")[0] for word in typed]
        spellings = [*parameter.opts, *parameter.secondary_opts]
        option = next((name for name in spellings if name in words), spellings[0])
        return f"{option} {str(error.message).rstrip('.')}"
    if missing := re.match(r"Option '(.+)' requires an argument", message):
        return f"{missing[1]} needs a value; {SEE_HELP}"
    if unknown := re.match(r"No such option:? ['\"]?(--?[\w-]*)", message):
        known = [name for each in error.ctx.command.params for name in each.opts]
        near = difflib.get_close_matches(unknown[1], known, 1, cutoff=0.75)
        way_out = f"did you mean {near[0]}?" if near else SEE_HELP
        return f"there is no option {unknown[1]}; {way_out}"
    if extra := re.match(r"Got unexpected extra argument.*\((.*)\)", message):
        return f"{extra[1]!r} follows no option; {SEE_HELP}"
    return f"{message[:1].lower()}{message[1:]}; {SEE_HELP}"


def job(name: str, main: Callable[..., None]) -> typer.Typer:
    """The command line of a job. It ends the process, as a command does."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
    settings = {"help_option_names": ["--help", "-h"]}
    app.command(name, cls=Command, context_settings=settings)(main)
    return app


def option(parse: Callable[[str], object], *names: str, metavar: str, help: str) -> Any:
    """An option whose value a function of ``options`` reads."""

    def parser(text: str) -> object:
        try:
            return parse(text)
        except ValueError as error:
            raise typer.BadParameter(str(error)) from None

    return typer.Option(*names, parser=parser, metavar=metavar, help=help)


def choice(kind: type[Enum], help: str, *names: str) -> Any:
    """One of the values of an enum of strings."""
    values = [str(member.value) for member in kind]

    def parse(text: str) -> Enum:
        return kind(options.one_of(str(getattr(text, "value", text)), values))

    return option(parse, *names, metavar="|".join(values), help=help)


def whole(help: str, *names: str, least: int = 1) -> Any:
    """A whole number."""
    return option(partial(options.whole, least=least), *names, metavar="N", help=help)


def seed_option(help: str, *names: str) -> Any:
    return option(options.seed, *names, metavar="N", help=help)


def number(help: str, *names: str, least: float | None = 0) -> Any:
    return option(partial(options.number, least=least), *names, metavar="X", help=help)


def positive(help: str, *names: str) -> Any:
    return option(options.positive, *names, metavar="X", help=help)


def file(help: str, *names: str) -> Any:
    return typer.Option(*names, metavar="FILE", help=help)


def folder(help: str, *names: str) -> Any:
    return typer.Option(*names, metavar="FOLDER", help=help)


# --- options of several jobs ------------------------------------------------------------------

ROWS = ("--rows", "--tokens")
VOCAB = ("--vocab", "--vocab-size")

DeviceName = Annotated[
    str | None,
    option(
        options.device,
        "--device",
        metavar="npu|cuda|cpu",
        help="Where to run. [default: the best that is here]",
    ),
]
TrainingDtype = Annotated[
    str, option(options.training_dtype, "--dtype", metavar="fp32|bf16", help="Of the logits.")
]
ModelVocab = Annotated[int, whole("Size of the vocabulary, made from the text.", *VOCAB)]
Timeout = Annotated[
    float,
    option(
        options.positive, "--timeout", metavar="SECONDS", help="How long a rank waits for others."
    ),
]
TensorParallel = Annotated[
    int | None,
    whole("Ranks that split the vocabulary. [default: all that --dp leaves]", "--tp"),
]
DataParallel = Annotated[
    int | None, whole("Copies of the model. [default: what --tp leaves]", "--dp")
]
Json = Annotated[Path | None, file("Write every number to this file.", "--json")]
Text = Annotated[
    list[Path] | None,
    typer.Option(
        "--text",
        metavar="PATH",
        help="File or folder to train on; repeatable. [default: Python's standard library]",
    ),
]
Cache = Annotated[
    Path | None,
    folder("Keeps the tokens between runs. [default: ~/.cache/vocab_parallel_ce/text]", "--cache"),
]


# --- what jobs do alike -----------------------------------------------------------------------


def usable_device(asked: str | None) -> str:
    """The kind of device to run on. Refusal where the one that was asked for is not here."""
    kind = asked or default_device_type()
    problem = device_problem(kind)
    if problem is not None:
        raise Refusal(f"--device {kind}: {problem}")
    return kind


def open_groups(
    asked: str | None, tp: int | None, dp: int | None, timeout: float
) -> ParallelGroups:
    """Joins the other ranks. Refusal where device or numbers of ranks cannot be had, and where the
    ranks were not started alike."""
    kind = usable_device(asked)
    try:
        groups = ParallelGroups.open(kind, tp=tp, dp=dp, timeout_seconds=timeout)
    except ValueError as error:
        raise Refusal(error) from None
    try:
        require_alike(groups.gather)
    except Refusal:
        groups.close()
        raise
    return groups


def say(groups: ParallelGroups, text: str) -> None:
    """Prints on rank 0."""
    if groups.rank == 0:
        print(text, flush=True)
