"""The pages hold what the stored results give; a page is rewritten between its markers alone."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from vocab_parallel_ce.launch import pages
from vocab_parallel_ce.launch.markdown import filled, markers
from vocab_parallel_ce.launch.pages import PARTS, Part
from vocab_parallel_ce.launch.refusal import Refusal

BEGIN, END = markers("bench")


@pytest.mark.parametrize("part", PARTS, ids=lambda part: f"{part.page} {part.name}")
def test_the_committed_pages_are_what_the_results_give(part: Part) -> None:
    pages.fill(part, check=True)


def test_every_marker_is_filled_in() -> None:
    wanted = {(part.page, part.name) for part in PARTS}
    folder = pages.CLONE
    found = {
        (str(page.relative_to(folder)), name)
        for page in [folder / "README.md", *folder.glob("docs/*.md")]
        for name in re.findall(r"<!-- (\w+): begin -->", page.read_text())
    }
    assert found == wanted


def test_only_what_lies_between_the_markers_is_rewritten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"before\n\n{BEGIN}\nold\n{END}\n\nafter\n")
    monkeypatch.setattr(pages, "CLONE", tmp_path)
    monkeypatch.setattr(pages, "PARTS", (Part("page.md", "bench", lambda: "new"),))
    with pytest.raises(SystemExit) as ended:
        pages.main(["--check"])
    assert ended.value.code == 1
    assert "page.md: bench is not what the results give" in capsys.readouterr().err
    assert "old" in page.read_text()
    pages.main([])
    assert page.read_text() == f"before\n\n{BEGIN}\n\nnew\n\n{END}\n\nafter\n"
    pages.main(["--check"])


@pytest.mark.parametrize("text", ["nothing", f"{END} {BEGIN}", f"{BEGIN} {BEGIN} {END}"])
def test_a_page_without_markers_is_refused(text: str) -> None:
    with pytest.raises(Refusal, match="a page must hold"):
        filled(text, "bench", "new")


def test_a_bad_option_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        pages.main(["--xyzzy"])
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == "vocab-parallel-ce pages: there is no option --xyzzy; see --help"
