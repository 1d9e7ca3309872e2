"""Which device the tests run on: those of the loss itself run unchanged on CPU and on the others.

Oracles and tolerances stay on the CPU, in fp64. Under the stand-in for CANN (tests/npu_sim) the
device is npu; VOCAB_PARALLEL_CE_TEST_DEVICE names another. Under TRITON_INTERPRET=1 the device is
the CPU and the engine under test is triton, whose kernels Python then runs.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor

from vocab_parallel_ce import testing

DEVICE = os.environ.get(
    "VOCAB_PARALLEL_CE_TEST_DEVICE", "npu" if "NPU_SIM_DEVICES" in os.environ else "cpu"
)
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
OWN_ENGINE = "triton" if INTERPRETED or DEVICE == "cuda" else DEVICE
# Neither HCCL nor most kernels of Ascend A2 and A3 carry it, and the triton engine leaves it out.
HAS_FP64 = OWN_ENGINE not in ("npu", "triton")
# The one that serves any device, and the device's own.
ENGINES: tuple[str, ...] = ("eager", OWN_ENGINE)
DTYPES: tuple[torch.dtype, ...] = (
    torch.float32,
    torch.bfloat16,
    torch.float16,
    *([torch.float64] if HAS_FP64 else []),
)
if INTERPRETED:  # Python runs kernels slowly: what says nothing about them is left out
    ENGINES, DTYPES = ("triton",), (torch.float32, torch.bfloat16)


def move(tensor: Tensor) -> Tensor:
    """A copy on the device, strides and overlaps included; the tensor itself on the CPU."""
    return testing.move(tensor, DEVICE)
