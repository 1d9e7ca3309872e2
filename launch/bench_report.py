"""From measured runs to words: the goals and how far they were met, the table, the picture.

Idea: a goal is data (what, against whom, how much), judged by one function. A ratio is one of
medians taken in the same run. The regression gate sits at two thirds of the goal: below it
something broke; between the two it is a miss, and is called one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

MIB = 1 << 20
GATE = 2 / 3
SHAPE = (4096, 32768)  # the shape the CPU goals are stated for

Run = dict[str, Any]


@dataclass(frozen=True)
class Ratio:
    """Our median must be ``goal`` times shorter than the other's, forward and backward together."""

    ranks: int
    dtype: str
    ours: str
    against: str
    goal: float


RATIOS = (
    Ratio(1, "fp32", "ours-inplace", "torch", 12),
    Ratio(1, "fp32", "ours-inplace", "torch-compile", 5),
    Ratio(1, "fp32", "ours-inplace", "megatron", 4),
    Ratio(1, "bf16", "ours-inplace", "torch", 8),
    Ratio(1, "fp32", "ours", "torch", 2.8),
    Ratio(2, "fp32", "ours-inplace", "megatron", 5),
    Ratio(2, "fp32", "ours-inplace", "megatron-fused", 5),
    Ratio(2, "bf16", "ours-inplace", "megatron", 12),
    Ratio(2, "bf16", "ours-inplace", "megatron-fused", 12),
    Ratio(2, "bf16", "ours", "megatron", 4),
    Ratio(2, "bf16", "ours", "megatron-fused", 4),
    Ratio(2, "fp32", "ours-inplace", "loss-parallel", 25),
    Ratio(2, "bf16", "ours-inplace", "loss-parallel", 25),
)
COLLECTIVES = 1  # in forward, on more than one rank, by the default path
BANDWIDTH_SHARE = 0.85  # on CUDA in bf16, in place, of the copy bandwidth at three passes

Verdict = Literal["met", "MISSED", "below the gate", "not measured"]


@dataclass(frozen=True)
class Judged:
    """One goal as it came out. ``measured`` is in the goal's own unit."""

    what: str
    goal: str
    gate: str
    measured: str
    verdict: Verdict
    words: str


def _judge(
    what: str, value: float, goal: float, gate: float, show: Callable[[float], str], more: bool
) -> Judged:
    """``more``: whether larger is better. Equal to the goal is met."""

    def better(one: float, other: float) -> bool:
        return one >= other if more else one <= other

    apart = abs(value / goal - 1) if goal else 0.0
    if better(value, goal):
        verdict: Verdict = "met"
        words = "met exactly" if value == goal else f"met, with {apart:.0%} to spare"
    elif better(value, gate):
        verdict, words = "MISSED", f"MISSED by {apart:.0%}, above the regression gate"
    else:
        verdict, words = "below the gate", f"MISSED by {apart:.0%}, below the regression gate"
    return Judged(what, show(goal), show(gate), show(value), verdict, words)


def _peer(run: Run, name: str) -> dict[str, Any] | None:
    return next((peer for peer in run["peers"] if peer["name"] == name), None)


def _times(count: float) -> str:
    return f"{count:.2f}x"


def _mib(size: float) -> str:
    return f"{size / MIB:.2f} MiB"


def ranks_in_words(ranks: int) -> str:
    return "1 process" if ranks == 1 else f"{ranks} ranks"


def _where(run: Run) -> str:
    return f"{ranks_in_words(run['ranks'])}, [{run['rows']}, {run['vocab']}] {run['dtype']}"


def _judge_ratio(ratio: Ratio, runs: list[Run], labels: dict[str, str]) -> Judged:
    where = f"{ranks_in_words(ratio.ranks)}, {ratio.dtype}"
    what = f"{where}: {labels[ratio.ours]} against {labels[ratio.against]}"
    reason = "not among the runs"
    for run in runs:
        if (run["ranks"], run["dtype"], run["device"]) != (ratio.ranks, ratio.dtype, "cpu"):
            continue
        ours, theirs = _peer(run, ratio.ours), _peer(run, ratio.against)
        lacking = [
            f"{labels[name]}: {peer['status'].split(':')[0] if peer else 'not asked for'}"
            for name, peer in ((ratio.ours, ours), (ratio.against, theirs))
            if peer is None or peer["status"]
        ]
        if lacking or ours is None or theirs is None:
            reason = "; ".join(lacking)
            break
        value = theirs["total_s"]["median"] / ours["total_s"]["median"]
        return _judge(what, value, ratio.goal, ratio.goal * GATE, _times, more=True)
    goal, gate = _times(ratio.goal), _times(ratio.goal * GATE)
    return Judged(what, goal, gate, "", "not measured", f"not measured: {reason}")


def judge(runs: list[Run], labels: dict[str, str]) -> list[Judged]:
    """Every goal: the CPU ratios always, memory, collectives and bandwidth for what was run."""
    out = [_judge_ratio(ratio, runs, labels) for ratio in RATIOS]
    for run in runs:
        for name in ("ours-inplace", "ours"):
            peer = _peer(run, name)
            if peer is None or peer["status"]:
                continue
            where = f"{_where(run)}: {labels[name]}"
            what = f"{where}: extra memory at peak"
            size = peer["budget_bytes"]
            if "peak_bytes" in peer:
                out.append(_judge(what, peer["peak_bytes"], size, size / GATE, _mib, more=False))
            else:
                words = "not measured: this system does not tell"
                out.append(Judged(what, _mib(size), _mib(size / GATE), "", "not measured", words))
            count = peer["collectives"]["forward"]
            if run["ranks"] > 1 and count is not None:
                what = f"{where}: collectives in forward"
                out.append(_judge(what, count, COLLECTIVES, COLLECTIVES, "{:.0f}".format, False))
            if (name, run["device"], run["dtype"]) == ("ours-inplace", "cuda", "bf16"):
                what = f"{where}: share of the copy bandwidth"
                share, goal = peer["bandwidth_share"], BANDWIDTH_SHARE
                out.append(_judge(what, share, goal, goal * GATE, "{:.0%}".format, more=True))
    if not any((run["device"], run["dtype"]) == ("cuda", "bf16") for run in runs):
        what = f"cuda, bf16: {labels['ours-inplace']}, share of the copy bandwidth"
        aim, floor = f"{BANDWIDTH_SHARE:.0%}", f"{BANDWIDTH_SHARE * GATE:.0%}"
        out.append(Judged(what, aim, floor, "", "not measured", "not measured: not among the runs"))
    return out


def failures(runs: list[Run], ours_only: bool = False) -> list[str]:
    """Peers whose results are wrong or that failed: what makes numbers worthless."""
    out = []
    for run in runs:
        for peer in run["peers"]:
            if ours_only and not peer["ours"]:
                continue
            if peer["status"].startswith("failed"):
                out.append(f"{_where(run)}: {peer['label']} {peer['status']}")
            elif peer.get("wrong"):
                out.append(f"{_where(run)}: {peer['label']} is WRONG: {peer['wrong']}")
    return out


# --- terminal -------------------------------------------------------------------------------


@contextmanager
def progress(total: int, ranks: int, show: bool) -> Iterator[Callable[[str, int], None]]:
    """A progress bar on standard error; yields ``tell(text, steps)``."""
    columns = (
        TextColumn(f"[bold]{ranks_in_words(ranks)}[/]"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
    )
    console = Console(stderr=True, quiet=not show)
    # Drawn only when told something: a drawing thread would run inside the timed parts.
    with Progress(*columns, console=console, auto_refresh=False, disable=not show) as bar:
        task = bar.add_task("starting", total=total)

        def tell(text: str, done: int) -> None:
            bar.update(task, description=text, advance=done, refresh=console.is_terminal)

        yield tell
        bar.update(task, description="done", completed=total, refresh=True)


def _milliseconds(summary: dict[str, Any]) -> str:
    return f"{summary['median'] * 1e3:.2f}"


def run_table(run: Run) -> Table:
    """One run: a row for each peer, those that could not run included."""
    threads = run["threads_per_rank"]
    title = f"{_where(run)}, {threads} thread{'s' if threads > 1 else ''} each"
    table = Table(title=title, title_justify="left", caption_justify="left")
    table.add_column("implementation")
    for column in (
        "forward\nms",
        "backward\nms",
        "both\nmedian",
        "both\nmin",
        "against\nours in pl.",
        "peak +\nMiB",
        "faults",
        "share of\ncopy bw",
        "collect.\nf + b",
        "loss -\nfp64",
        "grad norm\nrel. error",
    ):
        table.add_column(column, justify="right")
    base = _peer(run, "ours-inplace")
    unit = base["total_s"]["median"] if base and not base["status"] else None
    for peer in run["peers"]:
        if peer["status"]:
            if peer["status"].startswith(("not installed", "failed")):
                short = peer["status"].split(":")[0]
                table.add_row(f"[dim]{peer['label']}: {short}[/]", *[""] * 11)
            continue
        total = peer["total_s"]
        counts = [peer["collectives"][way] for way in ("forward", "backward")]
        table.add_row(
            f"[bold]{peer['label']}[/]" if peer["ours"] else peer["label"],
            _milliseconds(peer["forward_s"]),
            _milliseconds(peer["backward_s"]),
            _milliseconds(total),
            f"{total['min'] * 1e3:.2f}",
            _times(total["median"] / unit) if unit else "",
            f"{peer['peak_bytes'] / MIB:.1f}" if "peak_bytes" in peer else "?",
            f"{peer['faults']:.0f}",
            f"{peer['bandwidth_share']:.0%}",
            " + ".join("?" if count is None else str(count) for count in counts),
            f"{peer['loss_error']:+.0e}",
            f"[red]WRONG[/] {peer['gradient_norm_error']:.0e}"
            if peer["wrong"]
            else f"{peer['gradient_norm_error']:.0e}",
        )
    table.caption = _caption(run)
    return table


def _caption(run: Run) -> str:
    lines = [f"{peer['label']}: {peer['status']}" for peer in run["peers"] if peer["status"]]
    speed = run["copy_bandwidth"]
    if speed:
        moved = next((p["bytes_moved"] for p in run["peers"] if "bytes_moved" in p), None)
        lines.append(
            f"copy bandwidth in this run: {speed['median'] / 1e9:.1f} GB/s median, "
            f"{max(speed['all']) / 1e9:.1f} best, all ranks together (read + written bytes)"
        )
        if moved is not None:
            lines.append(
                f"bytes ours moves: {moved / 1e6:.0f} MB = 3 passes over the logits (read; read, "
                "write). Share = those bytes / time / copy bandwidth, for every implementation"
            )
        if run["device"] == "cpu":
            lines.append(
                "a CPU's copy also reads what it overwrites, uncounted: a share may pass 100%"
            )
    if run["idle_checked"]:
        lines.append(f"{run['busy_runs']} of {run['timed_runs']} timed runs on a busy machine")
    else:
        lines.append("whether the machine was quiet was not checked")
    return "\n".join(lines)


def goals_table(judged: list[Judged], shape: tuple[int, int]) -> Table:
    table = Table(title="Goals", title_justify="left", caption_justify="left")
    table.add_column("what")
    for column in ("goal", "gate", "measured"):
        table.add_column(column, justify="right")
    table.add_column("in words")
    colour = {"met": "green", "MISSED": "yellow", "below the gate": "red", "not measured": "dim"}
    for row in judged:
        words = f"[{colour[row.verdict]}]{row.words}[/]"
        table.add_row(row.what, row.goal, row.gate, row.measured, words)
    if shape != SHAPE:
        table.caption = (
            f"the CPU ratios are stated for {list(SHAPE)}; these are of {list(shape)}, "
            "where they say little"
        )
    return table


def print_report(console: Console, runs: list[Run], judged: list[Judged]) -> None:
    for run in runs:
        console.print(run_table(run))
        console.print()
    if runs:
        console.print(goals_table(judged, (runs[0]["rows"], runs[0]["vocab"])))
    for line in failures(runs):
        console.print(f"[red]{line}[/]")
    count = {verdict: sum(j.verdict == verdict for j in judged) for verdict in _VERDICTS}
    busy, timed = (sum(run[key] for run in runs) for key in ("busy_runs", "timed_runs"))
    if 4 * busy > timed:
        console.print(
            f"[yellow]{busy} of {timed} timed runs found the machine busy: "
            "repeat on a quiet one before believing a ratio.[/]"
        )
    console.print(
        f"{count['met']} goals met, {count['MISSED']} missed but above the gate, "
        f"{count['below the gate']} below the gate, {count['not measured']} not measured."
    )


_VERDICTS: tuple[Verdict, ...] = ("met", "MISSED", "below the gate", "not measured")


def as_json(judged: list[Judged]) -> list[dict[str, str]]:
    return [asdict(row) for row in judged]


# --- picture --------------------------------------------------------------------------------


def draw(runs: list[Run], path: Path) -> None:
    """Median times of every peer, one panel a run, on a logarithmic axis."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    kept = [(run, [peer for peer in run["peers"] if not peer["status"]]) for run in runs]
    kept = [(run, peers) for run, peers in kept if peers]
    if not kept:
        return
    heights = [len(peers) + 1.2 for _, peers in kept]
    figure, axes = pyplot.subplots(
        len(kept),
        1,
        figsize=(9, 0.36 * sum(heights) + 0.6),
        squeeze=False,
        sharex=True,
        gridspec_kw={"height_ratios": heights},
        layout="constrained",
    )
    for axis, (run, peers) in zip(axes[:, 0], kept, strict=True):
        times = [peer["total_s"]["median"] * 1e3 for peer in peers]
        base = next((t for t, p in zip(times, peers, strict=True) if p["ours"] == "in place"), None)
        for row, (peer, milliseconds) in enumerate(zip(peers, times, strict=True)):
            colour = "#1b7f5c" if peer["ours"] else "#5b6673"
            # Dots, not bars: a bar's length means nothing on an axis without a zero.
            axis.plot(milliseconds, row, "o", color=colour, markersize=8)
            text = f"{milliseconds:,.0f} ms" if milliseconds >= 100 else f"{milliseconds:.3g} ms"
            if base and milliseconds != base:
                text += f" ({milliseconds / base:.1f}x)"
            place = {"xytext": (9, 0), "textcoords": "offset points", "va": "center"}
            axis.annotate(text, (milliseconds, row), fontsize=9, color=colour, **place)
        axis.set_yticks(range(len(peers)), [peer["label"] for peer in peers])
        axis.set_ylim(len(peers) - 0.4, -0.6)
        axis.set_xscale("log")
        axis.set_title(_where(run), loc="left", fontsize=10)
        axis.grid(axis="x", which="major", alpha=0.4)
        axis.spines[["top", "right"]].set_visible(False)
    axes[-1, 0].xaxis.set_major_formatter(ticker.LogFormatter())  # 100, not 10^2
    axes[-1, 0].xaxis.set_minor_formatter(ticker.LogFormatter())
    low, high = axes[0, 0].get_xlim()
    axes[0, 0].set_xlim(low, high * 2)  # room for the last label
    axes[-1, 0].set_xlabel(
        "milliseconds, forward + backward, median (log axis); in brackets: against ours in place"
    )
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
