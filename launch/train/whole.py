"""Whether the files of a folder are the ones that were written: sizes and digests of all of them.

They lie in ``digests.json`` beside the files: {name: [bytes, BLAKE2b in hex]}. A disk, a copy or a
cut connection can change a bit of a weight, and nothing else would tell: the run would go on along
another curve.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path

NAME = "digests.json"
Digests = dict[str, tuple[int, str]]


def digests_of(folder: Path, names: Sequence[str]) -> Digests:
    """Of files that were just written; they are on the disk when this returns."""
    found: Digests = {}
    for name in names:
        sync(folder / name)
        found[name] = (folder / name).stat().st_size, _digest(folder / name)
    return found


def write_digests(folder: Path, digests: Digests) -> None:
    write_durably(folder / NAME, json.dumps(digests, indent=1) + "\n")


def problem_in(folder: Path, share: int = 0, of: int = 1) -> str:
    """What is wrong with a folder, naming the file; empty where it is whole.

    Every size is looked at, and the digests of every ``of``-th file: ranks share the reading.
    """
    if not folder.is_dir():
        return f"{folder} is not there"
    try:
        written = _read_digests(folder / NAME)
    except (OSError, ValueError) as error:
        why = "is not there" if isinstance(error, FileNotFoundError) else "cannot be read"
        return f"{folder / NAME} {why}"
    for number, (name, (size, digest)) in enumerate(sorted(written.items())):
        path = folder / name
        try:
            if path.stat().st_size != size:
                return f"{path} has {path.stat().st_size} bytes where {size} were written"
            if number % of == share and _digest(path) != digest:
                return f"{path} is not what was written: its digest differs"
        except FileNotFoundError:
            return f"{path} is not there"
        except OSError as error:
            return f"{path} cannot be read: {error.strerror}"
    return ""


def _read_digests(path: Path) -> Digests:
    """ValueError for what no ``write_digests`` has written."""
    try:
        read = json.loads(path.read_bytes())
        digests = {str(name): (int(size), str(digest)) for name, (size, digest) in read.items()}
    except (AttributeError, TypeError, OverflowError, RecursionError) as error:
        raise ValueError(str(error)) from None
    if not digests or any(os.sep in name or "\0" in name for name in digests):
        raise ValueError("names no file, or files elsewhere")
    return digests


def _digest(path: Path) -> str:
    digest = hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def write_durably(path: Path, text: str) -> None:
    """All of it or nothing, also where the power goes."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text)
    sync(partial)
    os.replace(partial, path)
    sync(path.parent)


def sync(path: Path) -> None:
    """A file, or the names in a folder, on the disk itself."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
