"""Where the fused operators serve, and what the user may ask for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from vocab_parallel_ce.switches import LINEAR_VARIABLE

from .calls import BOTH, FORWARD, FP16, Calls, call_once, names_of

SERVED: dict[str, tuple[dict[str, Any], list[str]]] = {
    "128 ids": ({}, BOTH),
    "127 ids": ({"ids": 127}, []),
    "fp16": ({"dtype": FP16}, BOTH),
    "fp32": ({"dtype": torch.float32}, []),
    "a bias": ({"biased": True}, []),
    "a softcap": ({"softcap": 30.0}, []),
    "entropy": ({"statistics": True, "entropy": True}, []),
    "argmax": ({"statistics": True, "argmax": True}, []),
    "statistics": ({"statistics": True}, BOTH),
    "statistics without a target": ({"statistics": False}, BOTH),
    "selected ids": ({"statistics": True, "selected": torch.zeros(5, 1).long()}, []),
    "the sum of squares": ({"statistics": True, "sum_p_squared": True}, []),
    "a scale for each row": ({"scale": torch.full((5,), 0.5)}, []),
    "width": ({"width": 65_534}, BOTH),
    "more width": ({"width": 65_535}, []),
    "scale 0.25": ({"scale": 0.25}, BOTH),
    "scale 0.3": ({"scale": 0.3}, []),
    "scale 0.5 in fp16": ({"scale": 0.5, "dtype": FP16}, []),
    "gradients in forward": ({"gradient": "forward"}, []),
    "recompute": ({"gradient": "recompute"}, BOTH),
    "the eager engine": ({"engine": "eager"}, []),
    "a frozen head": ({"frozen": ("head",)}, []),
    "frozen hidden states": ({"frozen": ("hidden",)}, []),
    "nothing to be learned": ({"frozen": ("head", "hidden")}, [FORWARD]),
}


@pytest.mark.parametrize("name", SERVED)
def test_what_they_serve(name: str, calls: Calls) -> None:
    options, expected = SERVED[name]
    call_once(**{n: v.to("npu") if isinstance(v, Tensor) else v for n, v in options.items()})
    assert names_of(calls) == expected


def test_what_is_asked_for(calls: Calls, monkeypatch: pytest.MonkeyPatch) -> None:
    for word, expected in (("chunks", []), ("fused", BOTH), ("auto", BOTH)):
        monkeypatch.setenv(LINEAR_VARIABLE, word)
        calls.clear()
        call_once()
        assert names_of(calls) == expected
    monkeypatch.setenv(LINEAR_VARIABLE, "fast")
    with pytest.raises(ValueError, match=r"NPU_LINEAR='fast' is not one of auto, fused, chunks"):
        call_once()
