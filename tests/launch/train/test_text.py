"""The corpus: from files to tokens, from its cache, and in batches of windows."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.launch.running import launch
from vocab_parallel_ce.launch.train import text as text_module
from vocab_parallel_ce.launch.train.text import Batches, load_corpus, text_files

VOCAB_SIZE = 513


def test_batches_cover_each_epoch_once_and_depend_on_position_only(cache: Path) -> None:
    corpus = load_corpus([cache / "text"], VOCAB_SIZE, cache)
    batches = Batches(corpus, 32, seed=1)
    ids, target = batches.read(0, 2 * batches.windows)
    first, second = ids[: batches.windows], ids[batches.windows :]
    whole = np.sort(np.asarray(corpus.tokens[: 32 * batches.windows]))
    assert np.array_equal(np.sort(first.flatten().numpy()), whole)
    assert np.array_equal(np.sort(second.flatten().numpy()), whole)
    assert not torch.equal(first, second)
    again, _ = Batches(corpus, 32, seed=1).read(5, 3)
    assert torch.equal(again, ids[5:8])
    kept = target[:, :-1] != text_module.IGNORE_INDEX
    assert torch.equal(target[:, :-1][kept], ids[:, 1:][kept])


def test_the_text_is_read_from_the_cache_and_comes_back_in_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tokenizers import Tokenizer

    source = tmp_path / "source"
    source.mkdir()
    (source / "b.txt").write_text("the last word " * 40)
    (source / "a.txt").write_text("the first word " * 40)
    made = load_corpus([source], 300, tmp_path / "cache")
    tokenizer = Tokenizer.from_file(str(made.folder / "tokenizer.json"))
    ends = np.flatnonzero(made.tokens == text_module.END_OF_TEXT_ID)
    assert len(ends) == 2
    assert _decoded(tokenizer, made.tokens[: ends[0]]) == "the first word " * 40

    def build_again(*_: object) -> None:
        raise AssertionError("the cache was not used")

    monkeypatch.setattr(text_module, "_build", build_again)
    cached = load_corpus([source], 300, tmp_path / "cache")
    assert cached.fingerprint == made.fingerprint
    assert np.array_equal(cached.tokens, made.tokens)
    with pytest.raises(AssertionError, match="the cache was not used"):
        load_corpus([source], 301, tmp_path / "cache")


def test_a_cache_that_cannot_be_written_is_told_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "text").write_text("the first word " * 40)
    begun: list[object] = []
    monkeypatch.setattr(text_module, "_encoded", lambda *given: begun.append(given))
    with pytest.raises(NotADirectoryError):
        load_corpus([tmp_path / "text"], 300, tmp_path / "text" / "cache")
    assert not begun


def test_a_vocabulary_is_written_in_any_locale(tmp_path: Path) -> None:
    """Byte-level BPE spells a space with a letter that ASCII does not have."""
    (tmp_path / "text").write_text("the first word " * 40)
    program = (
        "import sys; from pathlib import Path; "
        "from vocab_parallel_ce.launch.train.text import load_corpus; "
        "load_corpus([Path(sys.argv[1]) / 'text'], 300, Path(sys.argv[1]))"
    )
    plain = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = launch("-c", program, str(tmp_path), environ=plain)
    assert done.returncode == 0, done.stderr
    (vocabulary,) = tmp_path.glob("*/tokenizer.json")
    assert "Ġ" in vocabulary.read_text(encoding="utf-8")


def _decoded(tokenizer: Any, tokens: Any) -> str:
    pieces = "".join(tokenizer.id_to_token(int(token)) for token in tokens)
    return pieces.replace("Ġ", " ")  # how byte-level BPE writes a space


def test_a_folder_gives_its_text_and_not_its_compiled_files(tmp_path: Path) -> None:
    (tmp_path / "deeper" / "__pycache__").mkdir(parents=True)
    (tmp_path / "b.py").write_text("b")
    (tmp_path / "deeper" / "a.txt").write_text("ä", encoding="utf-8")
    (tmp_path / "deeper" / "__pycache__" / "b.pyc").write_bytes(b"\x6f\0\0\0code")
    assert text_files([tmp_path]) == [tmp_path / "b.py", tmp_path / "deeper" / "a.txt"]
    with pytest.raises(ValueError, match="holds no text file"):
        text_files([tmp_path / "deeper" / "__pycache__"])


def test_two_builders_at_once_leave_one_good_corpus(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built, build = [], text_module._build
    together = threading.Barrier(2)

    def build_together(*arguments: Any) -> None:
        together.wait(30)  # both have seen that the cache is empty
        build(*arguments)
        built.append(arguments)

    monkeypatch.setattr(text_module, "_build", build_together)
    with ThreadPoolExecutor(2) as threads:
        made = list(threads.map(lambda _: load_corpus([cache / "text"], 300, tmp_path), range(2)))
    assert len(built) == 2
    assert made[0].fingerprint == made[1].fingerprint
    assert np.array_equal(made[0].tokens, made[1].tokens)
    assert len(list(tmp_path.iterdir())) == 1  # no scratch folder stays
