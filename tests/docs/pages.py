"""The code blocks of the README and of every page, and what the line after each says of it.

    (nothing)              a Python block: it runs as printed, on two ranks
    <!-- run -->           it runs as printed: Python on two ranks, a command by the shell
    <!-- given: a, b -->   it runs on two ranks where these names are there already
    <!-- fragment: why --> it is not run, and why
    <!-- output: command -->  what this command prints, in 80 columns

A shell block must say one of them. Blocks of other languages (text, json) show something.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "SECURITY.md",
    *sorted((ROOT / "docs").glob("*.md")),
]
_BLOCK = re.compile(
    r"^(?P<indent> *)```(?P<language>\w*)\n(?P<code>.*?)^ *```\n"
    r"(?: *<!-- (?P<word>run|given|fragment|output)(?:: (?P<rest>.*?))? -->\n)?",
    re.MULTILINE | re.DOTALL,
)


@dataclass(frozen=True)
class Block:
    """One fenced block."""

    page: str
    line: int
    language: str
    code: str
    word: str
    """what is said of it: run, given, fragment, output, or nothing"""
    rest: str

    @property
    def name(self) -> str:
        return f"{self.page}:{self.line}"

    @property
    def is_shell(self) -> bool:
        return self.language in ("", "bash", "sh", "console")

    @property
    def runs(self) -> bool:
        return self.word in ("run", "given") or (self.language == "python" and not self.word)


def blocks() -> list[Block]:
    """Every block of every page, in order."""
    found = []
    for page in PAGES:
        text = page.read_text()
        for match in _BLOCK.finditer(text):
            indent = len(match["indent"])
            code = "".join(line[indent:] for line in match["code"].splitlines(keepends=True))
            line = text[: match.start()].count("\n") + 1
            found.append(
                Block(
                    str(page.relative_to(ROOT)),
                    line,
                    match["language"],
                    code,
                    match["word"] or "",
                    match["rest"] or "",
                )
            )
    return found
