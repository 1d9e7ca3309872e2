"""Measured runs on the terminal, and as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vocab_parallel_ce.launch.bench.goals import (
    MIB,
    SHAPE,
    VERDICTS,
    Judged,
    Run,
    failures,
    peer_of,
    times,
    where_of,
)
from vocab_parallel_ce.launch.terminal import (
    Coloured,
    Table,
    numbers,
    show,
    show_line,
    words,
)

PANELS = 8  # of the picture

# --- terminal -------------------------------------------------------------------------------


def _milliseconds(summary: dict[str, Any]) -> str:
    return f"{summary['median'] * 1e3:.2f}"


def run_table(run: Run) -> Table:
    """One run: a row for each peer, those that could not run included."""
    threads = run["threads_per_rank"]
    title = f"{where_of(run)}, {threads} thread{'s' if threads > 1 else ''} each"
    columns = numbers(
        "forward\nms",
        "backward\nms",
        "both\nmedian",
        "both\nmin",
        "against ours\nin place",
        "peak +\nMiB",
        "faults",
        "share of a\ncopy's speed",
        "bytes an\nelement",
        "collectives\nf + b",
        "loss -\nfp64",
        "gradient norm\nrelative error",
    )
    table = Table(title, [*words("implementation"), *columns])
    base = peer_of(run, "ours-inplace")
    itemsize = run["logits_bytes_per_rank"] * run["ranks"] / (run["rows"] * run["vocab"])
    unit = base["total_s"]["median"] if base and not base["status"] else None
    for peer in run["peers"]:
        if peer["status"]:
            if peer["status"].startswith(("not installed", "failed")):
                short = peer["status"].split(":")[0]
                table.add(Coloured(f"{peer['label']}: {short}", "dim"), *[""] * len(columns))
            continue
        total = peer["total_s"]
        counts = [peer["collectives"][way] for way in ("forward", "backward")]
        error = f"{peer['gradient_norm_error']:.0e}"
        table.add(
            Coloured(peer["label"], "bold") if peer["ours"] else peer["label"],
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
            Coloured(f"WRONG {error}", "red") if peer["wrong"] else error,
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
    columns = [*words("what"), *numbers("goal", "gate", "measured"), *words("in words")]
    table = Table("Goals", columns)
    colour = {"met": "green", "MISSED": "yellow", "below the gate": "red", "not measured": "dim"}
    for row in judged:
        in_words = Coloured(row.words, colour[row.verdict])
        table.add(row.what, row.goal, row.gate, row.measured, in_words)
    if shape != SHAPE:
        table.caption = (
            f"the CPU ratios are stated for {list(SHAPE)}; these are of {list(shape)}, "
            "where they say little"
        )
    return table


def print_report(runs: list[Run], judged: list[Judged]) -> None:
    for run in runs:
        show(run_table(run))
        show_line("")
    if runs:
        show(goals_table(judged, (runs[0]["rows"], runs[0]["vocab"])))
    for line in failures(runs):
        show_line(Coloured(line, "red"))
    count = {verdict: sum(j.verdict == verdict for j in judged) for verdict in VERDICTS}
    busy, timed = (sum(run[key] for run in runs) for key in ("busy_runs", "timed_runs"))
    if 4 * busy > timed:
        line = (
            f"{busy} of {timed} timed runs found the machine busy: "
            "repeat on a quiet one before believing a ratio."
        )
        show_line(Coloured(line, "yellow"))
    show_line(
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
