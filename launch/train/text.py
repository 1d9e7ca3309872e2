"""Text to batches: which files, their byte-level BPE vocabulary, and which tokens come when.

The default text is the source code of Python's own standard library, which every machine that can
run this has. Files are taken in sorted order and the trainer of `tokenizers` is deterministic, so
the same text gives the same tokens anywhere; a fingerprint of the tokens lets ranks and resumed
runs verify that.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import shutil
import sysconfig
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

END_OF_TEXT = "<|end_of_text|>"
END_OF_TEXT_ID = 0
SMALLEST_VOCABULARY = 257  # the 256 bytes and the end of text
IGNORE_INDEX = -100
_FORMAT = 1  # part of the cache key: raise it when the way of making tokens changes
# Tests are left out: many installations of Python come without them.
_SKIPPED_FOLDERS = {
    "site-packages",
    "dist-packages",
    "lib-dynload",
    "test",
    "tests",
    "idle_test",
    "__pycache__",
}


def standard_library_files() -> list[Path]:
    """Every .py file of this Python's standard library without its tests, sorted."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = [
        path
        for path in root.rglob("*.py")
        if not _SKIPPED_FOLDERS.intersection(path.relative_to(root).parts[:-1])
    ]
    if not files:
        raise ValueError(f"no .py file under {root}, this Python has no sources; use --text FILE")
    return sorted(files)


def text_files(paths: Sequence[Path]) -> list[Path]:
    """The files named, and for a folder all text below it, sorted. Nothing named: the default."""
    if not paths:
        return standard_library_files()
    files: list[Path] = []
    for path in paths:
        if not path.exists():
            raise ValueError(f"--text {path} does not exist")
        found = sorted(path.rglob("*")) if path.is_dir() else [path]
        below = [p for p in found if p == path or (p.is_file() and _looks_like_text(p))]
        if not below:
            raise ValueError(f"--text {path} holds no text file")
        files.extend(below)
    return files


def _looks_like_text(path: Path) -> bool:
    """A zero byte early on is what tells compiled files, images and archives from text."""
    with path.open("rb") as file:
        return b"\0" not in file.read(8192)


def default_cache() -> Path:
    """Where tokens are kept between runs: XDG_CACHE_HOME or ~/.cache."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "vocab_parallel_ce" / "text"


@dataclass(frozen=True)
class Corpus:
    """All tokens of the text in order, each file closed by END_OF_TEXT_ID."""

    tokens: npt.NDArray[np.int32]
    vocab_size: int
    fingerprint: str
    """Hash of vocabulary and tokens."""
    folder: Path
    """Holds tokenizer.json, for whoever wants to read the tokens."""


def require_vocab_size(vocab_size: int) -> None:
    """ValueError where no byte-level vocabulary is that small."""
    if vocab_size < SMALLEST_VOCABULARY:
        raise ValueError(
            f"--vocab {vocab_size} is smaller than {SMALLEST_VOCABULARY}, "
            "the 256 bytes and the end of text"
        )


def load_corpus(paths: Sequence[Path], vocab_size: int, cache: Path) -> Corpus:
    """The corpus of these files, from the cache or made now.

    Safe to call from many processes at once: each would build in a folder of its own and the first
    to finish gives it the final name. To not do the work twice, let one rank of a host go first.
    """
    require_vocab_size(vocab_size)
    documents = [path.read_bytes() for path in text_files(paths)]
    folder = cache / _cache_key(documents, vocab_size)
    if not (folder / "corpus.json").exists():
        _build(documents, vocab_size, folder)
    facts = json.loads((folder / "corpus.json").read_text())
    tokens = np.load(folder / "tokens.npy", mmap_mode="r")
    return Corpus(tokens, vocab_size, facts["fingerprint"], folder)


def _cache_key(documents: Sequence[bytes], vocab_size: int) -> str:
    import tokenizers

    digest = hashlib.sha256(f"{_FORMAT} {tokenizers.__version__} {vocab_size}".encode())
    for document in documents:
        digest.update(hashlib.sha256(document).digest())
    return digest.hexdigest()[:24]


def _build(documents: Sequence[bytes], vocab_size: int, folder: Path) -> None:
    """Makes vocabulary and tokens, and gives their folder its name in one step."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Before the work: where nothing can be written, that is said at once.
    scratch = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-"))
    try:
        vocabulary, learned, tokens = _encoded(documents, vocab_size)
        fingerprint = hashlib.sha256(vocabulary.encode() + tokens.tobytes()).hexdigest()[:24]
        (scratch / "tokenizer.json").write_text(vocabulary, encoding="utf-8")
        np.save(scratch / "tokens.npy", tokens)
        facts = {"fingerprint": fingerprint, "tokens": len(tokens), "learned": learned}
        (scratch / "corpus.json").write_text(json.dumps(facts) + "\n")
        scratch.rename(folder)
    except OSError:
        if not (folder / "corpus.json").exists():  # not merely that another process was faster
            raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _encoded(documents: Sequence[bytes], vocab_size: int) -> tuple[str, int, npt.NDArray[np.int32]]:
    """Trains the vocabulary: (it as JSON, how many tokens it holds, the text in tokens)."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    texts = [document.decode("utf-8", errors="replace") for document in documents]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    encodings = tokenizer.encode_batch(texts, add_special_tokens=False)
    tokens = np.asarray(
        [token for encoding in encodings for token in (*encoding.ids, END_OF_TEXT_ID)],
        dtype=np.int32,
    )
    return tokenizer.to_str(), tokenizer.get_vocab_size(), tokens


class Batches:
    """Windows of the corpus in a seeded order that any rank can work out by itself.

    A window is `context` tokens and, as targets, the tokens one further on. Windows do not overlap
    and each epoch shuffles them anew. `position` counts the windows consumed since the first step:
    it is all there is to remember, and from the same position any split over ranks and
    micro-batches sees the same windows.
    """

    def __init__(self, corpus: Corpus, context: int, seed: int) -> None:
        self.tokens, self.context, self.seed = corpus.tokens, context, seed
        self.windows = (len(corpus.tokens) - 1) // context
        if self.windows < 1:
            raise ValueError(
                f"the text has {len(corpus.tokens)} tokens, fewer than --context {context} + 1; "
                "give more text (--text) or a shorter --context"
            )
        self._order = functools.lru_cache(maxsize=2)(self._shuffled)

    def _shuffled(self, epoch: int) -> list[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        order: list[int] = torch.randperm(self.windows, generator=generator).tolist()
        return order

    def read(self, position: int, count: int) -> tuple[Tensor, Tensor]:
        """ids and targets, each [count, context] int64, of the windows from `position` on.

        What follows an end of text is another file, which nothing could predict: such targets are
        IGNORE_INDEX.
        """
        rows = []
        for index in range(position, position + count):
            start = self._order(index // self.windows)[index % self.windows] * self.context
            rows.append(self.tokens[start : start + self.context + 1])
        tokens = torch.from_numpy(np.stack(rows).astype(np.int64))
        ids, target = tokens[:, :-1], tokens[:, 1:]
        return ids.contiguous(), target.masked_fill(ids == END_OF_TEXT_ID, IGNORE_INDEX)
