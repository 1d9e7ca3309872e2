"""The plan on the terminal and as JSON."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from vocab_parallel_ce.launch.plan.devices import GB, MIB, US, Device, Figure
from vocab_parallel_ce.launch.plan.measured import Compared, Run
from vocab_parallel_ce.launch.plan.model import LEFT_OUT, Prediction
from vocab_parallel_ce.launch.plan.ways import Case
from vocab_parallel_ce.launch.terminal import (
    Coloured,
    Table,
    numbers,
    ranks_in_words,
    show,
    show_line,
    words,
)


def _mib(size: float) -> str:
    return f"{size / MIB:,.1f}"


def _ms(seconds: float) -> str:
    milliseconds = seconds * 1e3
    return f"{milliseconds:,.{0 if milliseconds >= 100 else 1 if milliseconds >= 10 else 3}f}"


def _title(case: Case, device: Device) -> str:
    shape = f"[{case.rows}, {case.vocab}] {case.dtype} over {ranks_in_words(case.ranks)}"
    return f"{shape}: {device.label}"


def _collectives(prediction: Prediction) -> str:
    """For example: 1 all_gather, 96.2 KiB."""
    kinds = [kind for kind, _ in prediction.collectives]
    if not kinds:
        return "none"
    size = sum(size for _, size in prediction.collectives)
    return f"{len(kinds)} {kinds[0]}, {size / 1024:,.1f} KiB"


def predictions_table(case: Case, device: Device, predictions: list[Prediction]) -> Table:
    columns = numbers(
        "held\nMiB",
        "peak\nMiB",
        "moved\nGB",
        "bytes an\nelement",
        "forward\nkernels",
        "forward\nwire",
        "backward\nkernels",
        "both\nms",
        "against\nours",
        "collectives,\nbytes a rank gives",
    )
    table = Table(_title(case, device), [*words("implementation"), *columns])
    best = predictions[0].total_s
    for p in predictions:
        moved = p.forward_bytes + p.backward_bytes
        each = [f"{size / case.elements:.0f}" for size in (p.forward_bytes, p.backward_bytes)]
        table.add(
            p.label,
            _mib(p.held_bytes),
            _mib(p.peak_bytes),
            f"{moved / GB:.3g}",
            " + ".join(each),
            _ms(p.forward_kernel_s),
            _ms(p.communication_s),
            _ms(p.backward_kernel_s),
            _ms(p.total_s),
            f"{p.total_s / best:.1f}x",
            _collectives(p),
        )
    logits = case.elements * case.itemsize
    table.caption = (
        f"of one rank, times in ms; memory beside its logits of {_mib(logits)} MiB, "
        "held: from forward to backward\n"
        f"predicted, not measured; left out: {LEFT_OUT}"
    )
    return table


def figures(device: Device) -> dict[str, tuple[str, Figure]]:
    """Name -> the figure in words, and the figure."""

    def rate(figure: Figure) -> str:
        return f"{figure.value / GB:,.4g} GB/s"

    def latency(figure: Figure) -> str:
        return f"{figure.value / US:,.4g} us"

    rows = {
        "peak bandwidth": (rate(device.peak_bandwidth), device.peak_bandwidth),
        "bandwidth": (rate(device.bandwidth), device.bandwidth),
        "link bandwidth": (rate(device.link_bandwidth), device.link_bandwidth),
        "latency, all_gather": (latency(device.gather_latency), device.gather_latency),
        "latency, all_reduce": (latency(device.reduce_latency), device.reduce_latency),
    }
    if device.first_touch:
        rows["fresh memory"] = (rate(device.first_touch), device.first_touch)
    for name, figure in device.rates.items():
        rows[f"rate of {name}"] = (f"{figure.value / 1e9:.3g} G elements/s", figure)
    return rows


def figures_table(device: Device) -> Table:
    table = Table("What the model was told", words("figure", "value", "where it comes from"))
    for name, (value, figure) in figures(device).items():
        table.add(name, value, figure.source)
    return table


def compared_table(run: Run) -> Table:
    columns = numbers(
        "forward ms\nmodel",
        "forward ms\nseen",
        "backward ms\nmodel",
        "backward ms\nseen",
        "both ms\nmodel",
        "both ms\nseen",
        "seen /\nmodel",
        "wire ms\nmodel",
        "peak MiB\nmodel",
        "peak MiB\nseen",
        "collectives\nmodel, seen",
    )
    table = Table(_title(run.case, run.device), [*words("implementation"), *columns])
    for row in run.compared:
        table.add(*_compared_row(row))
    table.caption = "measured in this run, all ranks together: " + _measured_in_words(run)
    return table


def _measured_in_words(run: Run) -> str:
    known = {name: words for name, (words, _) in figures(run.device).items()}
    fresh = known.get("fresh memory", "as fast as touched")
    lines = [f"copy {known['bandwidth']}, fresh memory {fresh},"]
    lines.append("in cache: " + ", ".join(f"{n} {known[f'rate of {n}']}" for n in run.device.rates))
    if run.case.ranks > 1:
        latencies = [f"{kind} {known[f'latency, {kind}']}" for kind in ("all_gather", "all_reduce")]
        lines.append(f"Gloo: {', '.join(latencies)}, link {known['link bandwidth']}")
    return "\n".join(lines)


def _compared_row(row: Compared) -> list[str]:
    p = row.prediction
    if row.total_s is None or row.forward_s is None or row.backward_s is None:
        cells = [_ms(p.forward_s), "", _ms(p.backward_kernel_s), "", _ms(p.total_s), "", ""]
        cells += [_ms(p.communication_s), _mib(p.peak_bytes), "", str(len(p.collectives))]
        return [Coloured(f"{p.label}: {row.status.split(':')[0]}", "dim"), *cells]
    counted = "?" if row.collectives is None else str(row.collectives)
    return [
        Coloured(f"{p.label}: WRONG", "red") if row.status else p.label,
        _ms(p.forward_s),
        _ms(row.forward_s),
        _ms(p.backward_kernel_s),
        _ms(row.backward_s),
        _ms(p.total_s),
        _ms(row.total_s),
        f"{row.total_s / p.total_s:.2f}",
        _ms(p.communication_s),
        _mib(p.peak_bytes),
        "?" if row.peak_bytes is None else _mib(row.peak_bytes),
        f"{len(p.collectives)}, {counted}",
    ]


def print_predictions(case: Case, device: Device, predictions: list[Prediction]) -> None:
    show(predictions_table(case, device, predictions))
    show_line("")
    show(figures_table(device))


def print_compared(runs: list[Run]) -> None:
    for run in runs:
        show(compared_table(run))
        show_line("")
    show_line(f"The model leaves out: {LEFT_OUT}.")


def as_json(case: Case, device: Device, predictions: list[Prediction]) -> dict[str, Any]:
    """Seconds and bytes, plain."""
    return {
        "case": asdict(case),
        "device": asdict(device),
        "predictions": [_totals(p) for p in predictions],
        "left_out": LEFT_OUT,
    }


def compared_as_json(runs: list[Run]) -> dict[str, Any]:
    return {
        "runs": [
            {
                "case": asdict(run.case),
                "device": asdict(run.device),
                "ways": [
                    asdict(row) | {"prediction": _totals(row.prediction)} for row in run.compared
                ],
            }
            for run in runs
        ],
        "left_out": LEFT_OUT,
    }


def _totals(prediction: Prediction) -> dict[str, Any]:
    return asdict(prediction) | {
        "forward_s": prediction.forward_s,
        "total_s": prediction.total_s,
    }
