"""Which device the tests run on: those of the loss itself run unchanged on CPU and on the others.

Oracles and tolerances stay on the CPU, in fp64. Under the stand-in for CANN (tests/npu_sim) the
device is npu; VOCAB_PARALLEL_CE_TEST_DEVICE names another.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor

DEVICE = os.environ.get(
    "VOCAB_PARALLEL_CE_TEST_DEVICE", "npu" if "NPU_SIM_DEVICES" in os.environ else "cpu"
)
HAS_FP64 = DEVICE != "npu"  # neither HCCL nor most kernels of Ascend A2 and A3 carry it
ENGINES = ("eager", DEVICE)  # the one that serves any device, and the device's own
DTYPES = (torch.float32, torch.bfloat16, torch.float16, *([torch.float64] if HAS_FP64 else []))


def move(tensor: Tensor) -> Tensor:
    """A copy on the device, strides and overlaps included; the tensor itself on the CPU."""
    if DEVICE == "cpu":
        return tensor
    items = tensor.untyped_storage().nbytes() // tensor.itemsize
    flat = tensor.detach().new_empty(0).set_(tensor.untyped_storage(), 0, (items,), (1,))
    moved = flat.to(DEVICE).as_strided(tensor.size(), tensor.stride(), tensor.storage_offset())
    return moved.requires_grad_(tensor.requires_grad)
