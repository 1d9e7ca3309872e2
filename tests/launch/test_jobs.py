"""The console entry, and what every job does alike: help, bad values, missing packages."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import vocab_parallel_ce
from tests.launch.running import ROOT, Ended, invoke, launch, one_line
from vocab_parallel_ce.collectives import BACKEND_OF_DEVICE
from vocab_parallel_ce.launch import jobs, options, refusal
from vocab_parallel_ce.launch.jobs import JOBS
from vocab_parallel_ce.launch.refusal import say_and_leave

OPTIONS = {
    "doctor": "--device --selftest --json --quick --rows --vocab --timed-rows --timed-vocab "
    "--timeout",
    "train": "--steps --batch --context --accumulate --lr --warmup --clip --seed --tp --dp --vocab "
    "--width --layers --heads --dropout --tied --untied --dtype --label-smoothing --z-loss "
    "--inplace --no-inplace --fused-head --no-fused-head --text --cache --out --checkpoint-every "
    "--resume --check --no-check --log-every --device --timeout",
    "megatron-gpt": "--steps --batch --context --accumulate --lr --warmup --clip --seed --tp --dp "
    "--sequence-parallel --no-sequence-parallel --loss --compare --no-compare --inplace "
    "--no-inplace --z-loss --vocab --divisible-by --width --layers --heads --tied --untied "
    "--dtype --text --cache --out --log-every --device --timeout",
    "bench": "--ranks --rows --vocab --dtype --device --repeats --peers --csv --out --wait-idle "
    "--quick --gate",
    "curve": "--ranks --largest --repeats --device --csv --picture --out --wait-idle --draw-only",
    "call-cost": "--rounds --first-calls --no-first-calls",
    "fused-head": "--rows --width --vocab --dtype --ignored --repeats --device --timeout --json",
    "plan": "--vocab --rows --tp --dtype --card --bandwidth --link-bandwidth --latency --json "
    "--measure --ranks --ways --quick",
}
SPELLINGS = {"--vocab": "--vocab-size", "--rows": "--tokens"}


# --- help -------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [60, 80])
@pytest.mark.parametrize("job", OPTIONS)
def test_help_names_every_option_in_full(
    job: str, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    done = invoke(job, "--help")
    assert (done.exit_code, done.stderr) == (0, "")
    assert "…" not in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= width
    named = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", done.stdout.partition("ptions:")[2]))
    missing = set(OPTIONS[job].split()) - named
    assert not missing
    assert f"vocab-parallel-ce {job}" in done.stdout


def test_every_job_has_its_options_listed_here() -> None:
    assert {*OPTIONS, "ascend"} == set(JOBS)


# --- values that cannot be served -------------------------------------------------------------

BAD = [
    *((job, ["--xyzzy"], "there is no option --xyzzy; see --help") for job in OPTIONS),
    *((job, ["stray"], "follows no option; see --help") for job in OPTIONS),
    *(
        (job, ["--device", "tpu"], "--device 'tpu' is not one of npu, cuda, cpu")
        for job in ("doctor", "train", "megatron-gpt", "bench")
    ),
    *(
        (job, ["--dtype", "fp8"], "--dtype 'fp8' is not one of fp32, bf16")
        for job in ("train", "megatron-gpt", "bench", "plan")
    ),
    *(
        (job, ["--dtype=float16"], "--dtype fp16 needs a loss scale")
        for job in ("train", "megatron-gpt")
    ),
    *(
        (job, [spelling, "-5"], f"{spelling} -5 must be at least ")
        for job in ("doctor", "train", "megatron-gpt", "bench", "plan")
        for spelling in ("--vocab", "--vocab-size")
    ),
    *(
        (job, [f"{spelling}=many"], f"{spelling} 'many' is not a whole number")
        for job in ("doctor", "bench", "plan")
        for spelling in ("--rows", "--tokens")
    ),
    *(
        (job, ["--tp", value], f"--tp {words}")
        for job in ("train", "megatron-gpt", "plan")
        for value, words in (("0", "0 must be at least 1"), ("1.5", "'1.5' is not a whole number"))
    ),
    *(
        (job, ["--timeout", value], f"--timeout {words}")
        for job in ("doctor", "train", "megatron-gpt")
        for value, words in (("0", "0 must be positive"), ("soon", "'soon' is not a number"))
    ),
    ("train", ["--resume", "maybe"], "--resume 'maybe' is not one of auto, never, must"),
    ("train", ["--stepz", "3"], "there is no option --stepz; did you mean --steps?"),
    ("train", ["--steps"], "--steps needs a value; see --help"),
    ("train", ["--lr", "nan"], "--lr nan is not a finite number"),
    *(
        (job, ["--seed", "-99999999999"], "--seed -99999999999 must lie within -4294967295 and ")
        for job in ("train", "megatron-gpt")
    ),
    ("train", ["--text", "/not/there"], "--text /not/there does not exist"),
    ("train", ["--tp", "3"], "tp=3 times dp=1 is 3, but the number of processes is 1; start 3"),
    ("megatron-gpt", ["--loss", "mine"], "--loss 'mine' is not one of megatron, megatron-fused"),
    ("bench", ["--ranks", "0"], "--ranks 0 must be at least 1"),
    ("bench", ["--device", "cpu", "--ranks", "3"], "--vocab 32768 does not divide into 3 equal"),
    ("bench", ["--peers", "nobody"], "--peers 'nobody' is not one of ours-inplace, ours"),
    (
        "bench",
        ["--device", "cpu", "--peers", "ours,liger"],
        "--peers liger: it runs on cuda, and this would be cpu",
    ),
    *(
        ("doctor", given, f"{given[0]} needs --selftest")
        for given in (["--quick"], ["--rows", "8"], ["--timed-vocab", "64"])
    ),
    ("bench", ["--quick", "--gate"], "--gate: tiny shapes prove nothing; drop --quick"),
    ("bench", ["--quick", "--csv", "x.csv"], "--csv: tiny shapes prove nothing; drop --quick"),
    ("bench", ["--repeats", "0"], "--repeats 0 must be at least 1"),
    ("bench", ["--wait-idle", "-1"], "--wait-idle -1 must be at least 0"),
    ("call-cost", ["--rounds", "0"], "--rounds 0 must be at least 1"),
    ("call-cost", ["--rounds", "x"], "--rounds 'x' is not a whole number"),
    ("plan", ["--card", "a100"], "--card 'a100' is not one of a2, a3, h100"),
    ("plan", ["--device", "a100"], "--device 'a100' is not one of a2, a3, h100"),
    ("doctor", ["--json"], "--json needs a value; see --help"),
]  # fmt: skip


@pytest.mark.parametrize(("job", "given", "words"), BAD)
def test_a_bad_value_is_one_line_of_one_style(job: str, given: list[str], words: str) -> None:
    assert words in one_line(invoke(job, *given), job)


@pytest.mark.parametrize("job", ["doctor", "train", "megatron-gpt", "bench"])
def test_a_card_that_is_not_here(job: str) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is one")
    assert "this machine shows none; use --device cpu" in one_line(
        invoke(job, "--device", "cuda"), job
    )


@pytest.mark.parametrize(
    ("job", "option"),
    [("train", "--out"), ("megatron-gpt", "--out"), ("train", "--cache"), ("bench", "--out"),
     ("bench", "--csv"), ("plan", "--json"), ("doctor", "--json"), ("fused-head", "--json")],
)  # fmt: skip
def test_a_place_that_cannot_be_written(job: str, option: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("some text of a few words " * 200)
    taken = tmp_path / "file" / "below"
    given = [option, taken]
    if option != "--out":
        given += ["--out", tmp_path] if job in ("train", "bench") else []
    if job in ("train", "megatron-gpt"):
        given += ["--text", tmp_path / "file", "--vocab", 300]
    if job not in ("plan",):
        given += ["--device", "cpu"]
    line = one_line(invoke(job, *given), job)
    assert option in line
    assert str(taken) in line
    assert "Not a directory" in line


@pytest.mark.parametrize("given", [["bench", "--out"], ["curve", "--picture"]])
def test_a_table_that_is_none_is_refused_before_the_work(given: list[str], tmp_path: Path) -> None:
    job, where = given
    table = tmp_path / "other.csv"
    for text, cell in (("card,rows\na,3\n", "device=None"), ("a,b\n1,2\n", "card=None")):
        table.write_text(text)
        line = one_line(invoke(job, "--csv", table, where, tmp_path / "x", "--device", "cpu"), job)
        assert line == (
            f"--csv {table} is no table of medians: line 2 has {cell}; name another file"
        )
        assert table.read_text() == text


@pytest.mark.parametrize(
    ("job", "name"),
    [("bench", "WORLD_SIZE"), ("train", "LOCAL_RANK"), ("train", "TORCHELASTIC_RESTART_COUNT")],
)
def test_a_variable_of_the_launcher_that_is_no_number(
    job: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "text").write_text("some text of a few words " * 200)
    given = ["--device", "cpu", "--out", tmp_path / "run"]
    if job == "bench":
        monkeypatch.setenv("RANK", "0")
    else:
        sizes = "--vocab 300 --width 8 --layers 1 --heads 1 --context 8 --batch 1".split()  # noqa: SIM905
        given += ["--text", tmp_path / "text", "--cache", tmp_path, *sizes]
    monkeypatch.setenv(name, "x")
    monkeypatch.setattr(refusal, "PATIENCE", 0.0)
    assert f"environment variable {name}='x' is not a number" in one_line(invoke(job, *given), job)


@pytest.mark.parametrize(
    ("text", "name"),
    [("float32", "fp32"), ("bfloat16", "bf16"), ("float16", "fp16"), ("bf16", "bf16")],
)
def test_the_long_spellings_of_dtypes(text: str, name: str) -> None:
    assert options.dtype(text) == name


def test_devices_are_those_that_have_a_backend() -> None:
    assert set(options.DEVICES) == set(BACKEND_OF_DEVICE)


# --- on several ranks -------------------------------------------------------------------------


def test_the_first_rank_of_a_host_says_it_at_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    slept: list[float] = []
    monkeypatch.setattr("time.sleep", slept.append)
    for rank, local in (("0", "0"), ("8", "0"), ("9", "1")):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("LOCAL_RANK", local)
        with pytest.raises(SystemExit) as stopped:
            say_and_leave("train", "--tp 3\nis bad")
        assert stopped.value.code == 2
    # The last one speaks only because nobody ended it while it waited.
    assert capsys.readouterr().err.splitlines() == [
        "vocab-parallel-ce train: --tp 3 is bad",
        "vocab-parallel-ce train: rank 8: --tp 3 is bad",
        "vocab-parallel-ce train: rank 9: --tp 3 is bad",
    ]
    assert slept == [refusal.PATIENCE]


def test_under_torchrun_the_line_stands_there_once() -> None:
    done = launch("-m", "vocab_parallel_ce.launch", "train", "--tp", "3", ranks=2)
    assert done.returncode != 0
    said = [line for line in done.stderr.splitlines() if "vocab-parallel-ce" in line]
    assert len(said) == 1
    assert said[0].startswith("vocab-parallel-ce train: tp=3 times dp=1 is 3, but the number of")
    assert "exitcode  : 2" in done.stderr


# --- the console entry ------------------------------------------------------------------------


def entry(
    *arguments: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Ended:
    monkeypatch.setattr(sys, "argv", ["vocab-parallel-ce", *arguments])
    status = 0
    try:
        jobs.main()
    except SystemExit as end:
        status = int(end.code or 0)
    said = capsys.readouterr()
    return Ended(status, said.out, said.err)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "vocab-parallel-ce: name a job: doctor, train, "),
        (["trian"], "vocab-parallel-ce: there is no job 'trian'; did you mean train?"),
        (["xyzzy"], "vocab-parallel-ce: there is no job 'xyzzy'; the jobs are doctor, train, "),
        (["--selftest"], "vocab-parallel-ce: there is no option '--selftest'; the jobs are "),
        (["call_cost", "--rounds", "0"], "vocab-parallel-ce call-cost: --rounds 0 must be"),
    ],
)
def test_an_entry_that_names_no_job(
    arguments: list[str],
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    done = entry(*arguments, monkeypatch=monkeypatch, capsys=capsys)
    assert (done.exit_code, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith(words)


def test_version_and_list_of_jobs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    done = entry("--version", monkeypatch=monkeypatch, capsys=capsys)
    assert done == Ended(0, f"vocab-parallel-ce {vocab_parallel_ce.__version__}\n", "")
    done = entry("--help", monkeypatch=monkeypatch, capsys=capsys)
    assert done.exit_code == 0
    assert max(map(len, done.stdout.splitlines())) <= 80
    for job in JOBS:
        assert f"\n  {job} " in done.stdout


def test_the_project_declares_the_entry() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    assert 'vocab-parallel-ce = "vocab_parallel_ce.launch.jobs:main"' in text
    assert callable(jobs.main)


# --- without packages -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("job", "packages"),
    [("plan", "typer, rich"), ("train", "typer, rich, tokenizers, matplotlib")],
)
def test_missing_packages_are_named_with_the_extra(
    job: str, packages: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert one_line(invoke(job), job) == (
        f"{packages} are not installed; pip install 'vocab_parallel_ce[launch]'"
    )


MODULES = ("launch.train", "launch.megatron_gpt", "launch.bench", "launch.plan",
           "launch.bench.call_cost", "launch call-cost")  # fmt: skip


def test_a_module_without_typer_says_so_too(tmp_path: Path) -> None:
    """In one process: what is imported at the heads of all of them needs no such package."""
    program = """
import runpy, sys
sys.modules["typer"] = sys.modules["rich"] = None
import importlib.util
found = importlib.util.find_spec
hidden = ("typer", "rich")
importlib.util.find_spec = lambda name, *rest: None if name in hidden else found(name, *rest)
for arguments in sys.argv[1:]:
    module, *rest = arguments.split()
    sys.argv = [module, *rest]
    try:
        runpy.run_module("vocab_parallel_ce." + module, run_name="__main__")
    except SystemExit as end:
        assert end.code == 2
"""
    done = subprocess.run(
        [sys.executable, "-c", program, *MODULES],
        cwd=ROOT, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = done.stderr.splitlines()
    assert len(lines) == len(MODULES)
    for line in lines:
        assert re.fullmatch(
            r"vocab-parallel-ce [\w-]+: typer, rich are not installed; "
            r"pip install 'vocab_parallel_ce\[launch\]'",
            line,
        )
