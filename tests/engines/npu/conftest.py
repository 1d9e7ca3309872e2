"""The npu engine where there is neither torch_npu nor a card.

Its Triton kernels are tested by `make unit-triton`, under Triton's interpreter; what runs on the
real torch_npu over a stand-in for CANN is tested in tests/npu.
"""

from __future__ import annotations

import os

if os.environ.get("TRITON_INTERPRET") != "1":
    collect_ignore = ["test_kernels.py"]
