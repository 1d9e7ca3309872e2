"""The cost model: from sweeps and collectives to seconds.

A sweep over the E elements of a shard takes as long as the slower of memory and arithmetic lets it
(the roofline of Williams, Waterman and Patterson, 2009), and fresh pages cost extra:

    t = max((read + written) E / bandwidth, E / rate) + fresh E / first_touch

``bandwidth`` is what a copy reaches, by the bytes it asks for. A CPU also reads the lines that a
copy is about to overwrite: its memory moves half as much again, which sweeps in place and sweeps
that only read have for themselves, and writing elsewhere costs that read there too:

    t = max((read + written + fresh) E / (1.5 bandwidth), E / rate) + fresh E / first_touch

Where ranks share one machine (CPU), all three are of the machine: each rank gets a W-th of them,
however many cores there are. A collective over W ranks in which each contributes n bytes takes a
latency and the bytes that a bandwidth-optimal algorithm sends over one rank's link (Thakur,
Rabenseifner and Gropp, 2005; the factors of the bus bandwidth in NVIDIA's nccl-tests):

    all_gather    latency + (W - 1) n / link_bandwidth
    all_reduce    latency + 2 (W - 1) / W n / link_bandwidth

Their latency terms, which grow with W or with log W, are lumped into the one figure.

The model leaves out: what the host spends on a call (a few hundred microseconds on a CPU, where
``call_cost`` measures it), launches of kernels and their ramp, arithmetic on [N] vectors, ranks
that wait for a slower one, other work on the memory or the links, caches (a shard that fits into
them is faster than this), ignored rows, which ours does not read, and any overlap of communication
with computation: none of these ways has it. On accelerators no sweep is bounded by its arithmetic:
one exponential for 2 bytes read is less than the special-function units of an H100 give.
"""

from __future__ import annotations

from dataclasses import dataclass

from vocab_parallel_ce.launch.plan.devices import Device
from vocab_parallel_ce.launch.plan.ways import Case, Collective, Sweep, Way, ways

LEFT_OUT = (
    "host time of a call, kernel launches, arithmetic on [N] vectors, ranks that wait for a slower "
    "one, caches, ignored rows (ours reads none of them)"
)


@dataclass(frozen=True)
class Prediction:
    """One way in one case on one device; bytes and seconds of one rank."""

    name: str
    label: str
    held_bytes: int
    """beside the logits, from forward to backward"""
    peak_bytes: int
    """beside the logits, at the highest point"""
    forward_bytes: int
    """read and written"""
    backward_bytes: int
    forward_kernel_s: float
    backward_kernel_s: float
    communication_s: float
    """in forward; backward has none"""
    collectives: list[tuple[str, int]]
    """kind, and the bytes that each rank contributes"""

    @property
    def forward_s(self) -> float:
        return self.forward_kernel_s + self.communication_s

    @property
    def total_s(self) -> float:
        return self.forward_s + self.backward_kernel_s


def sweep_seconds(sweep: Sweep, case: Case, device: Device) -> float:
    """See the module's formula."""
    elements = case.elements * (case.ranks if device.shared else 1)
    moved, bandwidth = sweep.read + sweep.written, device.bandwidth.value
    if device.write_allocates:
        moved, bandwidth = moved + sweep.fresh, 1.5 * bandwidth
    seconds = moved * elements / bandwidth
    if sweep.rate in device.rates:
        seconds = max(seconds, elements / device.rates[sweep.rate].value)
    if device.first_touch and sweep.fresh * case.elements >= device.first_touch_from:
        seconds += sweep.fresh * elements / device.first_touch.value
    return seconds


def collective_seconds(collective: Collective, ranks: int, device: Device) -> float:
    """See the module's formula; nothing for a rank alone, which waits for nobody."""
    if ranks == 1:
        return 0.0
    if collective.kind == "all_gather":
        latency, passes = device.gather_latency, ranks - 1.0
    else:
        latency, passes = device.reduce_latency, 2 * (ranks - 1) / ranks
    return latency.value + passes * collective.bytes / device.link_bandwidth.value


def _bytes(sweeps: tuple[Sweep, ...], case: Case) -> int:
    return sum(sweep.read + sweep.written for sweep in sweeps) * case.elements


def predict_way(way: Way, case: Case, device: Device) -> Prediction:
    return Prediction(
        way.name,
        way.label,
        way.held,
        way.peak,
        _bytes(way.forward, case),
        _bytes(way.backward, case),
        sum(sweep_seconds(sweep, case, device) for sweep in way.forward),
        sum(sweep_seconds(sweep, case, device) for sweep in way.backward),
        sum(collective_seconds(c, case.ranks, device) for c in way.collectives),
        [(c.kind, c.bytes) for c in way.collectives],
    )


def predict(case: Case, device: Device) -> list[Prediction]:
    """Ours in place first, then ours out of place, Megatron unfused, Megatron fused."""
    found = ways(case, device.engine, device.compiles)
    return [predict_way(way, case, device) for way in found]
