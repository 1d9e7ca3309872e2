"""Who is measured: from hidden states, a head's weight and targets to a mean loss.

Those that need the whole vocabulary on one rank say so. The hidden states' gradient is summed over
the ranks by everybody, as a model needs it.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from vocab_parallel_ce import cross_entropy, linear_cross_entropy
from vocab_parallel_ce.launch.bench.peers import megatron_group
from vocab_parallel_ce.linear.chunks import rows_of_a_chunk
from vocab_parallel_ce.parallel.layers import copy_to_group

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(hidden [N, H], head [V_r, H], target [N]) -> a mean"""


@dataclass(frozen=True)
class Setting:
    """What a rank knows when it prepares a contender."""

    group: dist.ProcessGroup | None
    world: int
    device: torch.device
    dtype: torch.dtype
    columns: int
    """of this rank's shard"""


@dataclass(frozen=True)
class Contender:
    """One way to the loss."""

    name: str
    prepare: Callable[[Setting], Loss]
    one_rank: bool = False
    """needs the whole vocabulary on one rank"""
    package: str = "torch"
    device: str = ""
    """the only type of device that it serves, if there is only one"""
    ours: bool = False
    slow: bool = False
    """so much slower than the others that it does not take its turns: its first run is its time"""

    def status(self, setting: Setting) -> str:
        """Empty when it can run, else why it cannot."""
        if self.device and self.device != setting.device.type:
            return f"needs a {self.device} device"
        if self.one_rank and setting.world > 1:
            return "one rank only"
        try:
            found = importlib.util.find_spec(self.package) is not None
        except Exception:  # a parent is missing, or breaks when imported
            found = False
        return "" if found else "not installed"


def _fused(**options: Any) -> Callable[[Setting], Loss]:
    def prepare(setting: Setting) -> Loss:
        def loss(hidden: Tensor, head: Tensor, target: Tensor) -> Tensor:
            out = linear_cross_entropy(hidden, head, target, group=setting.group, **options)
            assert isinstance(out, Tensor)
            return out if out.dim() == 0 else out.sum() / (target != -100).sum()

        return loss

    return prepare


def _apart(loss_of: Callable[[Tensor, Tensor], Tensor], setting: Setting) -> Loss:
    def loss(hidden: Tensor, head: Tensor, target: Tensor) -> Tensor:
        return loss_of(F.linear(copy_to_group(hidden, setting.group), head), target)

    return loss


def _ours_apart(setting: Setting) -> Loss:
    return _apart(
        lambda logits, target: cross_entropy(
            logits, target, group=setting.group, inplace_backward=True
        ),
        setting,
    )


def _torch(setting: Setting) -> Loss:
    return _apart(lambda logits, target: F.cross_entropy(logits, target), setting)


def _torch_linear(best: bool) -> Callable[[Setting], Loss]:
    """Its chunks as it chooses them; or with as many rows as ours has, and accurate sums."""

    def prepare(setting: Setting) -> Loss:
        module: Any = torch.nn
        rows = rows_of_a_chunk(setting.columns, setting.dtype.itemsize, setting.device.type)
        chosen = {"batch_chunk_size": rows, "chunking_method": None} if best else {}
        options = module.LinearCrossEntropyOptions(**chosen)
        function: Any = F.linear_cross_entropy
        return lambda hidden, head, target: function(hidden, head, target, options=options)

    return prepare


def _megatron(fused: bool) -> Callable[[Setting], Loss]:
    def prepare(setting: Setting) -> Loss:
        group = megatron_group(setting.world)
        from megatron.core import tensor_parallel
        from megatron.core.fusions.fused_cross_entropy import fused_vocab_parallel_cross_entropy

        def loss(logits: Tensor, target: Tensor) -> Tensor:
            x, y = logits[:, None], target.clamp(min=0)[:, None]  # it knows no ignored target
            each = (
                fused_vocab_parallel_cross_entropy(x, y, group)
                if fused
                else tensor_parallel.vocab_parallel_cross_entropy(x, y)
            )
            kept = (target != -100).to(each.dtype)
            mean: Tensor = (each[:, 0] * kept).sum() / kept.sum()
            return mean

        return _apart(loss, setting)

    return prepare


def _liger(setting: Setting) -> Loss:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return lambda hidden, head, target: liger_fused_linear_cross_entropy(hidden, head, target)


CONTENDERS = (
    Contender("ours, fused", _fused(), ours=True),
    Contender("ours, fused, recompute", _fused(gradient="recompute"), ours=True),
    Contender("ours, fused, a loss per token", _fused(reduction="none"), ours=True),
    Contender("F.linear + ours in place", _ours_apart, ours=True),
    Contender("F.linear + F.cross_entropy", _torch, one_rank=True),
    Contender("F.linear_cross_entropy", _torch_linear(best=False), one_rank=True, slow=True),
    Contender("F.linear_cross_entropy, our rows", _torch_linear(best=True), one_rank=True),
    Contender("F.linear + Megatron unfused", _megatron(fused=False), package="megatron.core"),
    Contender("F.linear + Megatron fused", _megatron(fused=True), package="megatron.core"),
    Contender("Liger fused linear", _liger, one_rank=True, package="liger_kernel", device="cuda"),
)
