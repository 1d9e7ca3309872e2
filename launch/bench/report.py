"""Measured runs on the terminal, and as a picture."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from vocab_parallel_ce.launch.bench.goals import (
    MIB,
    SHAPE,
    VERDICTS,
    Judged,
    Run,
    failures,
    peer_of,
    ranks_in_words,
    times,
    where_of,
)

PANELS = 8  # of the picture

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
    title = f"{where_of(run)}, {threads} thread{'s' if threads > 1 else ''} each"
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
        "bytes an\nelement",
        "collect.\nf + b",
        "loss -\nfp64",
        "grad norm\nrel. error",
    ):
        table.add_column(column, justify="right")
    base = peer_of(run, "ours-inplace")
    itemsize = run["logits_bytes_per_rank"] * run["ranks"] / (run["rows"] * run["vocab"])
    unit = base["total_s"]["median"] if base and not base["status"] else None
    for peer in run["peers"]:
        if peer["status"]:
            if peer["status"].startswith(("not installed", "failed")):
                short = peer["status"].split(":")[0]
                table.add_row(f"[dim]{peer['label']}: {short}[/]", *[""] * 12)
            continue
        total = peer["total_s"]
        counts = [peer["collectives"][way] for way in ("forward", "backward")]
        table.add_row(
            f"[bold]{peer['label']}[/]" if peer["ours"] else peer["label"],
            _milliseconds(peer["forward_s"]),
            _milliseconds(peer["backward_s"]),
            _milliseconds(total),
            f"{total['min'] * 1e3:.2f}",
            times(total["median"] / unit) if unit else "",
            f"{peer['peak_bytes'] / MIB:.1f}" if "peak_bytes" in peer else "?",
            f"{peer['faults']:.0f}",
            f"{peer['bandwidth_share']:.0%}",
            f"{3 * itemsize / peer['bandwidth_share']:.1f}",
            " + ".join("?" if count is None else str(count) for count in counts),
            f"{peer['loss_error']:+.0e}",
            f"[red]WRONG[/] {peer['gradient_norm_error']:.0e}"
            if peer["wrong"]
            else f"{peer['gradient_norm_error']:.0e}",
        )
    table.caption = _caption(run)
    return table


def _by_status(run: Run) -> dict[str, list[str]]:
    """Why peers did not run -> their labels."""
    found: dict[str, list[str]] = {}
    for peer in run["peers"]:
        if peer["status"]:
            found.setdefault(peer["status"], []).append(peer["label"])
    return found


def _caption(run: Run) -> str:
    lines = [f"{', '.join(labels)}: {status}" for status, labels in _by_status(run).items()]
    speed = run["copy_bandwidth"]
    if speed:
        moved = next((p["bytes_moved"] for p in run["peers"] if "bytes_moved" in p), None)
        if run.get("buffers", 1) > 1:
            lines.append(f"{run['buffers']} buffers used in turn, so that no cache answers")
        lines.append(
            f"copy bandwidth in this run: {speed['median'] / 1e9:.1f} GB/s median, "
            f"{max(speed['all']) / 1e9:.1f} best, all ranks together (read + written bytes)"
        )
        if moved is not None:
            lines.append(
                f"bytes ours moves: {moved / 1e6:.0f} MB = 3 passes over the logits (read; read, "
                "write). Share = those bytes / time / copy bandwidth, for every implementation; "
                "bytes an element = what a copy would have moved in that time"
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
    count = {verdict: sum(j.verdict == verdict for j in judged) for verdict in VERDICTS}
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


# --- picture --------------------------------------------------------------------------------


def draw(runs: list[Run], path: Path) -> None:
    """Median times of every peer, one panel a run (of the first few), on a logarithmic axis."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    kept = [(run, [peer for peer in run["peers"] if not peer["status"]]) for run in runs]
    kept = [(run, peers) for run, peers in kept if peers][:PANELS]
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
        medians = [peer["total_s"]["median"] * 1e3 for peer in peers]
        base = next(
            (t for t, p in zip(medians, peers, strict=True) if p["ours"] == "in place"), None
        )
        for row, (peer, milliseconds) in enumerate(zip(peers, medians, strict=True)):
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
        axis.set_title(where_of(run), loc="left", fontsize=10)
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
