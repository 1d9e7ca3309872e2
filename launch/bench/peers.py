"""Who is measured: one small function a competitor.

Idea: every peer is a function (logits, target) -> scalar mean loss that autograd can go back
through. All are handed the same tensor in the same state (``measuring/logits.py``). Imports happen
in ``prepare``, so that a peer that is missing or broken costs nothing but its own row.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Setting:
    """What a rank knows when it prepares a peer."""

    group: dist.ProcessGroup
    world: int
    device: torch.device


@dataclass(frozen=True)
class Peer:
    """One competitor.

    ``package`` must be importable for it to be installed. ``where`` tells which process counts
    make sense: whole logits need one process, DTensor's loss is only offered for more. ``device``
    is the only type of device that it serves, if there is only one.
    ``around`` is entered around forward and backward. ``ours`` marks this library. The version of
    ``distribution`` says which one was measured.
    """

    name: str
    label: str
    prepare: Callable[[Setting], Loss]
    package: str = "torch"
    where: Literal["one", "many", "any"] = "any"
    device: str = ""
    around: Callable[[], AbstractContextManager[Any]] = nullcontext
    ours: Literal["", "in place", "out of place"] = ""
    distribution: str = "torch"

    def status(self, world: int, device: str) -> str:
        """Empty when it can run on ``world`` ranks with such devices, else why it cannot."""
        if self.device and self.device != device:
            return f"needs a {self.device} device"
        if not installed(self.package):
            return "not installed"
        if self.where == "one" and world > 1:
            return "needs the whole vocabulary: one process only"
        if self.where == "many" and world == 1:
            return "needs more than one rank"
        return ""


def installed(package: str) -> bool:
    """Whether ``package`` (dotted or not) can be found, without importing more than its parents."""
    try:
        return importlib.util.find_spec(package) is not None
    except Exception:  # a parent is missing, was blocked in sys.modules, or breaks when imported
        return False


def _ours(inplace: bool, engine: str = "auto") -> Callable[[Setting], Loss]:
    def prepare(setting: Setting) -> Loss:
        from vocab_parallel_ce import cross_entropy

        group = setting.group if setting.world > 1 else None

        def loss(logits: Tensor, target: Tensor) -> Tensor:
            return cross_entropy(
                logits, target, group=group, inplace_backward=inplace, engine=engine
            )

        return loss

    return prepare


def _torch(setting: Setting) -> Loss:
    return lambda logits, target: F.cross_entropy(logits, target)


def _torch_compiled(setting: Setting) -> Loss:
    compiled = torch.compile(F.cross_entropy)
    return lambda logits, target: compiled(logits, target)


def _loss_parallel(setting: Setting) -> Loss:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor, Shard

    mesh = DeviceMesh.from_group(setting.group, setting.device.type)

    def loss(logits: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(DTensor.from_local(logits, mesh, [Shard(-1)]), target)

    return loss


def _in_loss_parallel() -> AbstractContextManager[Any]:
    from torch.distributed.tensor.parallel import loss_parallel

    context: AbstractContextManager[Any] = loss_parallel()
    return context


def megatron_group(world: int) -> dist.ProcessGroup:
    """Megatron's tensor-parallel group over all ranks, made at the first call."""
    from megatron.core import parallel_state

    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel(tensor_model_parallel_size=world)
    group: dist.ProcessGroup = parallel_state.get_tensor_model_parallel_group()
    return group


@contextmanager
def megatron_forgets() -> Iterator[None]:
    """At its end Megatron keeps no group: in a process that lives on, the next would find it."""
    try:
        yield
    finally:
        if "megatron.core.parallel_state" in sys.modules:
            importlib.import_module("megatron.core.parallel_state").destroy_model_parallel()


def _megatron(setting: Setting) -> Loss:
    megatron_group(setting.world)  # the function looks it up by itself
    from megatron.core.tensor_parallel.cross_entropy import vocab_parallel_cross_entropy

    def loss(logits: Tensor, target: Tensor) -> Tensor:
        per_token: Tensor = vocab_parallel_cross_entropy(logits[:, None], target[:, None])
        return per_token.mean()

    return loss


def _megatron_fused(setting: Setting) -> Loss:
    group = megatron_group(setting.world)
    from megatron.core.fusions.fused_cross_entropy import fused_vocab_parallel_cross_entropy

    def loss(logits: Tensor, target: Tensor) -> Tensor:
        # [s, b, v], as Megatron calls it: for these the compiled backward copies its softmax.
        per_token: Tensor = fused_vocab_parallel_cross_entropy(
            logits[:, None], target[:, None], group
        )
        return per_token.mean()

    return loss


# Signatures of the following were read in the packages that pyproject.toml's peers-cuda pins, in
# flash-attn 2.8.3.post2 and in TransformerEngine's repository; none was run by us yet.


def _liger(setting: Setting) -> Loss:
    from liger_kernel.transformers.functional import liger_cross_entropy

    return lambda logits, target: liger_cross_entropy(logits, target)


def _liger_parallel(setting: Setting) -> Loss:
    from liger_kernel.transformers import LigerVocabParallelCrossEntropy

    module = LigerVocabParallelCrossEntropy()
    group = setting.group if setting.world > 1 else None

    def loss(logits: Tensor, target: Tensor) -> Tensor:
        per_token: Tensor = module(logits[:, None], target[:, None], group)  # [s, b, v]
        return per_token.mean()

    return loss


def _quack(setting: Setting) -> Loss:
    from quack import cross_entropy

    return lambda logits, target: cross_entropy(logits, target, inplace_backward=True)


def _flash_attn(setting: Setting) -> Loss:
    from flash_attn.losses.cross_entropy import CrossEntropyLoss

    group = setting.group if setting.world > 1 else None
    module = CrossEntropyLoss(inplace_backward=True, process_group=group)
    return lambda logits, target: module(logits, target)


def _transformer_engine(setting: Setting) -> Loss:
    from transformer_engine.pytorch.cross_entropy import parallel_cross_entropy

    group = setting.group if setting.world > 1 else None

    def loss(logits: Tensor, target: Tensor) -> Tensor:
        # By position: smoothing, reduce, group, ignored id, and True, which spares it a wait for
        # the device; the keyword names changed between releases.
        per_token: Tensor = parallel_cross_entropy(
            logits[:, None], target[:, None], 0.0, False, group, -100, True
        )
        return per_token.mean()

    return loss


_OURS, _MEGATRON, _LIGER = "vocab_parallel_ce", "megatron-core", "liger-kernel"
PEERS = (
    Peer("ours-inplace", "ours, in place", _ours(True), ours="in place", distribution=_OURS),
    Peer("ours", "ours, out of place", _ours(False), ours="out of place", distribution=_OURS),
    # Not one of ours to the gate: plain torch comes near no limit.
    Peer(
        "ours-eager",
        "ours, in place, without Numba",
        _ours(True, "eager"),
        device="cpu",
        distribution=_OURS,
    ),
    Peer("torch", "F.cross_entropy", _torch, where="one"),
    Peer("torch-compile", "torch.compile(F.cross_entropy)", _torch_compiled, where="one"),
    Peer(
        "loss-parallel",
        "torch loss_parallel",
        _loss_parallel,
        where="many",
        around=_in_loss_parallel,
    ),
    Peer(
        "megatron",
        "Megatron-core unfused",
        _megatron,
        package="megatron.core",
        distribution=_MEGATRON,
    ),
    Peer(
        "megatron-fused",
        "Megatron-core fused",
        _megatron_fused,
        package="megatron.core",
        distribution=_MEGATRON,
    ),
    Peer(
        "liger",
        "Liger",
        _liger,
        package="liger_kernel",
        where="one",
        device="cuda",
        distribution=_LIGER,
    ),
    Peer(
        "liger-parallel",
        "Liger vocab-parallel",
        _liger_parallel,
        package="liger_kernel",
        device="cuda",
        distribution=_LIGER,
    ),
    Peer(
        "quack",
        "quack, in place",
        _quack,
        package="quack",
        where="one",
        device="cuda",
        distribution="quack-kernels",
    ),
    Peer(
        "flash-attn",
        "flash-attention, in place",
        _flash_attn,
        package="flash_attn.losses.cross_entropy",
        device="cuda",
        distribution="flash-attn",
    ),
    Peer(
        "transformer-engine",
        "TransformerEngine",
        _transformer_engine,
        package="transformer_engine.pytorch.cross_entropy",
        device="cuda",
        distribution="transformer-engine",
    ),
)
BY_NAME = {peer.name: peer for peer in PEERS}
