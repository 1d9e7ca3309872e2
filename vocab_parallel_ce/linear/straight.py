"""Whether a call makes no logits: an engine's own functions go straight from hidden states.

Decided before the call, from what all ranks have alike: the number of collectives follows from it.
A rank whose own shard is too small for those functions makes logits of its few ids, at once.
"""

from __future__ import annotations

from dataclasses import fields

import torch
from torch import Tensor

from ..engines import select
from ..engines.contract import LinearFunctions
from ..request import LinearRequest
from .call import LinearCall

# What such functions, or the arithmetic on [N] around them, take care of. An option that is not
# here has to be off.
_SERVED = {
    "start", "stop", "vocab_size", "implicit_shard", "smooth", "label_smoothing",
    "lse_square_scale", "normalized", "ignore_index", "scale", "reduction", "engine", "collective",
    "check", "sequence_parallel", "drop_ignored",
}  # fmt: skip


def goes_straight(hidden: Tensor, frozen: bool, request: LinearRequest, share: int) -> bool:
    """Whether the engine's own functions serve this call.

    ``frozen``: one of hidden states and weight needs no gradient, and such functions would make it
    all the same. ``share`` is the number of ids of an even share of the vocabulary.
    """
    if frozen or hidden.device.type in ("cpu", "meta"):
        return False
    if any(getattr(request, f.name) != f.default for f in fields(request) if f.name not in _SERVED):
        return False
    given = (request.engine, hidden.shape[-1], share, request.scale)
    return bool(_serves(hidden.device.type, hidden.dtype, *given))


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _serves(
    device_type: str, dtype: torch.dtype, engine: str, width: int, share: int, scale: float
) -> bool:
    functions = select(engine, torch.empty(0, 1, dtype=dtype, device=device_type)).LINEAR_FUNCTIONS
    return functions is not None and functions.why_not(dtype, width, share, scale) is None


def functions_of(call: LinearCall) -> LinearFunctions | None:
    """The functions that serve this rank's part of a call; None: it makes logits."""
    if not call.statics.straight:
        return None
    functions = select(call.request.engine, call.scratch(0, 1)).LINEAR_FUNCTIONS
    if functions is None or call.head.size < functions.LEAST_IDS:
        return None
    return functions


def class_weight(call: LinearCall) -> Tensor | None:
    """This shard's slice of the class weights."""
    weight, request = call.weight, call.request
    return None if weight is None else weight[request.start : request.stop].float()
