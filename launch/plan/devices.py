"""What the cost model knows of a machine: a few figures, each with where it comes from.

Bandwidths are bytes a second, latencies seconds. ``bandwidth`` is what a kernel that only moves
memory reaches, bytes read plus bytes written; ``link_bandwidth`` is what leaves one rank in one
direction. A figure whose source begins with "assumption" was never measured or read anywhere:
override it with one of your own machine.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

GB = 1e9
US = 1e-6
MIB = 1 << 20


@dataclass(frozen=True)
class Figure:
    value: float
    source: str


@dataclass(frozen=True)
class Device:
    """One rank's machine."""

    name: str
    label: str
    engine: Literal["cpu", "npu", "triton"]
    """which of this library's engines serves it"""
    compiles: bool
    """whether Megatron's fused loss runs through the compiler there"""
    peak_bandwidth: Figure
    bandwidth: Figure
    link_bandwidth: Figure
    gather_latency: Figure
    """of a small all_gather"""
    reduce_latency: Figure
    """of a small all_reduce"""
    shared: bool = False
    """all ranks run on one machine: bandwidth and rates are of all of them together"""
    write_allocates: bool = False
    """a store to memory that is not in the cache reads it first, as on CPUs. ``bandwidth``, which
    counts what a copy asks for, is then two thirds of what the memory moves"""
    first_touch: Figure | None = None
    """bytes a second at which the system hands out fresh pages; None: memory is kept and reused"""
    first_touch_from: int = 32 * MIB
    """smaller buffers come from the heap, touched before"""
    rates: Mapping[str, Figure] = field(default_factory=dict)
    """elements a second that a kind of sweep computes when nothing waits for memory"""

    def overridden(
        self,
        bandwidth: float | None = None,
        link_bandwidth: float | None = None,
        latency: float | None = None,
    ) -> Device:
        """With the figures that a user gave, in bytes a second and seconds."""
        given = {
            "bandwidth": bandwidth,
            "link_bandwidth": link_bandwidth,
            "gather_latency": latency,
            "reduce_latency": latency,
        }
        figures = {k: Figure(v, "given by you") for k, v in given.items() if v is not None}
        return replace(self, **figures)  # type: ignore[arg-type]


_NVLINK = "assumption: two thirds of NVLink's {} GB/s one way"
_SHARE = (
    "85% of the peak. Between what Megatron's own kernels reach on an H100 in Liger-Kernel's "
    "published timings (77 to 83%) and what quack's authors state for theirs (90%)"
)


def _nvidia(name: str, label: str, peak: float, source: str, one_way: int) -> Device:
    return Device(
        name,
        label,
        engine="triton",
        compiles=True,
        peak_bandwidth=Figure(peak, source),
        bandwidth=Figure(0.85 * peak, _SHARE),
        link_bandwidth=Figure(one_way * GB * 2 / 3, _NVLINK.format(one_way)),
        gather_latency=Figure(15 * US, "assumption: NCCL inside one machine, launch included"),
        reduce_latency=Figure(15 * US, "assumption: NCCL inside one machine, launch included"),
    )


_HCCL = "assumption: HCCL inside one machine, launch included"

DEVICES = {
    device.name: device
    for device in (
        Device(
            "a2",
            "Ascend A2 (910B)",
            engine="npu",
            compiles=False,
            peak_bandwidth=Figure(
                1600 * GB,
                "Huawei's best practices for Ascend C (CANN's documentation, "
                "atlas_ascendc_best_practices_10_0036)",
            ),
            bandwidth=Figure(1360 * GB, "assumption: 85% of the peak, as on A3"),
            link_bandwidth=Figure(150 * GB, "assumption: HCCS, all seven links of a card"),
            gather_latency=Figure(25 * US, _HCCL),
            reduce_latency=Figure(25 * US, _HCCL),
        ),
        Device(
            "a3",
            "Ascend A3 (910C), one die",
            engine="npu",
            compiles=False,
            peak_bandwidth=Figure(1600 * GB, "half of the package's 3,200 GB/s (press reports)"),
            bandwidth=Figure(
                1360 * GB,
                "85% of the peak; 84% was measured for a decode attention kernel "
                "(CloudMatrix384, arXiv:2506.12708)",
            ),
            link_bandwidth=Figure(
                130 * GB,
                "measured for an expert-parallel combine over 8 ranks, of 196 GB/s one way "
                "(CloudMatrix384, arXiv:2506.12708)",
            ),
            gather_latency=Figure(25 * US, _HCCL),
            reduce_latency=Figure(25 * US, _HCCL),
        ),
        _nvidia("h100", "NVIDIA H100 SXM", 3350 * GB, "NVIDIA's data sheet of the H100", 450),
        _nvidia("h200", "NVIDIA H200", 4800 * GB, "NVIDIA's data sheet of the H200", 450),
        _nvidia("b200", "NVIDIA B200", 8000 * GB, "NVIDIA's data sheet of the DGX B200, / 8", 900),
        Device(
            "cpu",
            "two cores of an AMD EPYC (Zen 4), ranks over Gloo",
            engine="cpu",
            compiles=True,
            peak_bandwidth=Figure(
                460.8 * GB, "AMD's data sheet of the EPYC 9004: 12 channels of DDR5-4800, a socket"
            ),
            bandwidth=Figure(40 * GB, "copies measured on that machine: 30 to 47 GB/s"),
            link_bandwidth=Figure(1 * GB, "Gloo over loopback, measured there on two ranks"),
            gather_latency=Figure(400 * US, "Gloo, measured there on two ranks"),
            reduce_latency=Figure(1000 * US, "Gloo, measured there on two ranks: 0.4 to 1.3 ms"),
            shared=True,
            write_allocates=True,
            first_touch=Figure(5 * GB, "measured there: 512 MiB of 4 KiB pages in 106 to 122 ms"),
            rates={
                "exp": Figure(2.4e9, "torch.exp in cache, measured there on two threads"),
                "max": Figure(2.4e9, "torch.max in cache, measured there on two threads"),
                "partials": Figure(8e9, "the cpu engine in cache, measured there, two threads"),
                "gradient": Figure(8e9, "the cpu engine in cache, measured there, two threads"),
            },
        ),
    )
}
