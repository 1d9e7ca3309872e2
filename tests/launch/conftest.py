"""The text that training runs in tests read."""

from __future__ import annotations

import textwrap
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a text of many short files, and the tokens that the first test makes of it.

    Each file ends in a target that is ignored, so the windows have different numbers of targets.
    """
    folder = tmp_path_factory.mktemp("cache")
    (folder / "text").mkdir()
    for number, part in enumerate(Path(textwrap.__file__).read_text().split("\n\n")):
        (folder / "text" / f"{number:03}.txt").write_text(part)
    return folder
