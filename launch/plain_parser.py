"""Options where typer may not be installed: argparse, with the errors of ``command_line``."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from typing import Any, NoReturn

from vocab_parallel_ce.launch.refusal import Refusal


class PlainParser(argparse.ArgumentParser):
    """Its errors are one line each, of the same style as those of the other jobs."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(allow_abbrev=False, **settings)
        self._typed: list[str] = []

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        self._typed = [word.partition("=")[0] for word in args or []]
        return super().parse_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        if wrong := re.match(r"argument (\S+): (.*)", message):
            spellings = wrong[1].split("/")
            option = next((name for name in spellings if name in self._typed), spellings[0])
            complaint = wrong[2]
            if complaint.startswith("expected"):
                complaint = "needs a value; see --help"
            raise Refusal(f"{option} {complaint}")
        if unknown := re.match(r"unrecognized arguments: (\S+)", message):
            what = "there is no option " if unknown[1].startswith("-") else ""
            rest = "" if what else " follows no option"
            raise Refusal(f"{what}{unknown[1]}{rest}; see --help")
        raise Refusal(f"{message}; see --help")


def value(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    """A function of ``options`` as argparse wants it."""

    def parser(text: str) -> Any:
        try:
            return parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return parser
