"""The picture of the curve: a panel for each number of rows, time against columns."""

from __future__ import annotations

from itertools import groupby
from pathlib import Path

from vocab_parallel_ce.launch.bench.medians import Row, group_of
from vocab_parallel_ce.launch.bench.peers import BY_NAME

COLOURS = {"ours-inplace": "#1b7f5c", "ours": "#7fbf9f", "torch": "#c2571a", "megatron": "#5b6673"}


def both_passes(rows: list[Row]) -> list[Row]:
    """Forward and backward together, of the implementations that are drawn."""
    return [row for row in rows if row.pass_ == "both" and row.peer in COLOURS]


def not_first(rows: list[Row]) -> list[tuple[Row, Row]]:
    """(ours, who is faster) for each run in which somebody is; ours is the faster of its two."""
    found = []
    for _, run in groupby(sorted(both_passes(rows), key=group_of), key=group_of):
        by_time = sorted(run, key=lambda row: row.ms)
        ours = next((row for row in by_time if BY_NAME[row.peer].ours), None)
        if ours is not None and by_time[0] is not ours:
            found.append((ours, by_time[0]))
    return found


def draw(rows: list[Row], path: Path) -> None:
    """Milliseconds against columns, both axes logarithmic; ranks and dtypes one below the other."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shown = both_passes(rows)
    down = sorted({(row.ranks, row.dtype) for row in shown}, key=lambda kind: (kind[0], kind[1]))
    across = sorted({row.rows for row in shown})
    figure = Figure(figsize=(2.5 * len(across) + 1, 2.1 * len(down) + 1), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(down), len(across), squeeze=False, sharex=True, sharey="row")
    for line, (ranks, dtype) in zip(panels, down, strict=True):
        for axes, count in zip(line, across, strict=True):
            here = [r for r in shown if (r.ranks, r.dtype, r.rows) == (ranks, dtype, count)]
            for peer, colour in COLOURS.items():
                mine = sorted((row.vocab, row.ms) for row in here if row.peer == peer)
                if mine:
                    style = "-" if BY_NAME[peer].ours else "--"
                    label = BY_NAME[peer].label
                    columns, ms = zip(*mine, strict=True)
                    axes.plot(columns, ms, style, color=colour, marker=".", label=label)
            axes.set_xscale("log")
            axes.set_yscale("log")
            axes.grid(alpha=0.3)
            axes.set_title("1 row" if count == 1 else f"{count:,} rows", fontsize=9)
        who = "1 process" if ranks == 1 else f"{ranks} ranks"
        line[0].set_ylabel(f"{who}, {dtype}\nms", fontsize=9)
    for axes in panels[-1]:
        axes.set_xlabel("columns, all ranks", fontsize=9)
    named = {
        label: handle
        for axes in panels.flat
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(named.values(), named.keys(), loc="outside lower center", ncols=4, frameon=False)
    cards = " and ".join(sorted({f"{row.card}, {row.date[:10]}" for row in shown}))
    figure.suptitle(f"forward and backward of the loss, medians; {cards}", fontsize=9)
    figure.savefig(path, dpi=110)
