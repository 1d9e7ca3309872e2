"""The arguments of the public functions, as one object that is passed from function to function."""

from __future__ import annotations

from typing import NamedTuple

import torch.distributed as dist
from torch import Tensor

from .shard import VocabShard


class Options(NamedTuple):
    """The arguments of a public function beside its first tensors."""

    reduction: str = "none"
    ignore_index: int = -100
    label_smoothing: float = 0.0
    lse_square_scale: float = 0.0
    group: dist.ProcessGroup | None = None
    shard: VocabShard | None = None
    inplace_backward: bool = False
    normalizer: Tensor | float | None = None
    scale: Tensor | float = 1.0
    softcap: float | None = None
    engine: str = "auto"
    collective: str = "auto"
    check: bool | None = None
    finite_logits: bool = False
    selected: Tensor | None = None


class Outputs(NamedTuple):
    """Which optional outputs a public function asks for."""

    entropy: bool = False
    argmax: bool = False
    squares: bool = False
    ignored_rows: bool = False
