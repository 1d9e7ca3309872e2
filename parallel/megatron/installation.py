"""install() and uninstall(): this loss in the place of Megatron's, with options, and the way back.

There is one patch in a process, and a stack of installations above it. The latest one rules; each
takes back itself and nothing else, and the last to go puts Megatron's functions back.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from vocab_parallel_ce import VocabShard
from vocab_parallel_ce.switches import check_is_on, check_word
from vocab_parallel_ce.warning import warn

from .cross_entropy import LOOKS_GATHERED, MegatronOptions, per_token_loss
from .patch import Patch


class Installation:
    """What ``install`` returns: counts calls, and takes the installation back.

    As a context manager it is taken back where the block ends.
    """

    def __init__(self, options: MegatronOptions) -> None:
        self.options = options
        self._warned = False
        self.calls = 0
        """how many times the loss was called under this installation"""
        self.zloss: Tensor | None = None
        """the z-loss of the last call, per token and shaped like its target, without a gradient;
        None where z-loss is off, and before the first call"""

    def loss(
        self,
        logits: Tensor,
        target: Tensor,
        label_smoothing: float = 0.0,
        tp_group: dist.ProcessGroup | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """``per_token_loss`` by these options; not counted.

        Without a vocabulary, logits that look gathered are only a warning, once: all ranks may
        hold the same numbers for another reason, and Megatron's own loss does not ask.
        """
        call = (logits, target, label_smoothing, tp_group, self.options)
        if self._trusts_shards(logits):
            return per_token_loss(*call, trust_shards=True)
        try:
            return per_token_loss(*call)
        except ValueError as problem:
            if LOOKS_GATHERED not in str(problem):
                raise
            self._warned = True  # it is raised on every rank of the group, so all begin again
            warn(
                "vocab_parallel_ce: all ranks passed the same logits; if they are gathered, the "
                "loss is too large by log(tp) and the gradient wrong: use "
                "GPTModel(parallel_output=True). install(vocab_size=...) makes it an error "
                f"({problem})"
            )
        return per_token_loss(*call, trust_shards=True)

    def _trusts_shards(self, logits: Tensor) -> bool:
        """Where nobody would be told what they hold, or was told already."""
        if self.options.vocab_size is not None or self.options.shard is not None:
            return False
        if self._warned or torch.compiler.is_compiling():
            return True
        on_host = not isinstance(logits, Tensor) or logits.device.type == "cpu"
        return not on_host and not check_is_on(check_word(self.options.check))

    def uninstall(self) -> None:
        """Take this installation back: the one before it rules again, or Megatron's own loss.

        A second call does nothing.
        """
        if self in _installed:
            _installed.remove(self)
        if not _installed:
            _patch.undo()

    def __enter__(self) -> Installation:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        problem: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.uninstall()

    def __repr__(self) -> str:
        state = "rules" if current() is self else "below" if self in _installed else "taken back"
        return f"<Installation: {state}, {self.calls} calls, {self.options}>"


def install(
    *,
    vocab_size: int | None = None,
    shard: VocabShard | None = None,
    ignore_index: int = -100,
    invalid_target: str = "error",
    lse_square_scale: float = 0.0,
    softcap: float | None = None,
    inplace_backward: bool = False,
    smoothing_formula: str = "megatron",
    engine: str = "auto",
    collective: str = "auto",
    check: bool | None = None,
    finite_logits: bool = False,
) -> Installation:
    """Replace megatron-core's loss by this library's, for every model of the process.

    Call it on every rank, with the same options, before or after models are imported or built. It
    replaces ``vocab_parallel_cross_entropy``, ``fused_vocab_parallel_cross_entropy`` and
    ``te_parallel_cross_entropy`` in every module that holds them, and checks that this worked. A
    model of Megatron after 0.19 stores its loss when it is built. If it stores one of Megatron's,
    it gets this library's loss, and ``uninstall`` gives the stored one back; if it stores another
    loss, it keeps that, and a warning says so. A second call changes the options; it returns its
    own handle, which undoes only this second call.

    Args:
        vocab_size: the number of ids without Megatron's padding (``padded_vocab_size``). The
            padding columns then take no part in the softmax and get gradient exactly 0, and
            gathered logits are always recognised, and an error. None: every column of every rank is
            a class, as in Megatron. Then logits that look gathered (the same on every rank) only
            cause one warning, on CPU and with ``check``; on accelerators they are not noticed.
        shard: this rank's VocabShard, where shards are not equal or not in rank order, or where
            whole ranks are padding; it includes ``vocab_size``.
        ignore_index: tokens with this label have loss 0 and gradient 0, whatever their logits.
        invalid_target: what happens to a label that is neither a class nor ``ignore_index``.
            "error": a ValueError on CPU, NaN on accelerators. "ignore": loss 0 and gradient 0, for
            data where only ``loss_mask`` marks such tokens.
        lse_square_scale: adds this times lse^2 to the loss of every token (the z-loss).
        softcap: the logits become ``softcap * tanh(logits / softcap)`` inside the kernels. For a
            model that does not cap them itself; one that does needs none here.
        inplace_backward: let the gradient overwrite the logits; any later read of them sees it.
        smoothing_formula: how ``label_smoothing`` is meant. "megatron": as Megatron computes it on
            one rank, and here on any number. "pytorch": as ``torch.nn.functional.cross_entropy``.
        engine: "auto" takes the fastest engine of the tensors' device; or an engine by name.
        collective: "all_gather" (one), "all_reduce" (two), or "auto", which gathers up to 6 MB.
        check: True adds a small exchange before each call, so that ranks that disagree raise
            together; an error in backward is not told. None follows the variable
            VOCAB_PARALLEL_CE_CHECK. The same on every rank.
        finite_logits: a promise that the logits of tokens without a gradient (``ignore_index``, or
            left out by ``loss_mask``) hold no NaN and no +inf. It saves a pass over the gradient on
            Ascend and changes no result. If it does not hold, such a row may get a NaN gradient.

    Returns:
        An Installation: ``calls``, ``zloss``, ``uninstall()``; also a context manager.

    Raises:
        ImportError: without megatron-core.
        RuntimeError: where the replacement did not work, or this version finds its loss elsewhere;
            everything is put back then.
        TypeError, ValueError: for wrong options.

    Communication:
        None. ``VocabParallelCrossEntropy``, which MindSpeed patches, is not touched.

    Example:
        ```python
        install(vocab_size=50257, inplace_backward=True)  # on every rank, in model_provider
        ```
    """
    options = MegatronOptions(
        vocab_size, shard, ignore_index, invalid_target, lse_square_scale, softcap,
        inplace_backward, smoothing_formula, engine, collective, check, finite_logits,
    )  # fmt: skip
    _patch.apply()
    installation = Installation(options)
    _installed.append(installation)
    return installation


def uninstall() -> None:
    """Take every installation back: Megatron's own functions stand where they stood."""
    _installed.clear()
    _patch.undo()


def current() -> Installation | None:
    """The installation that rules, if there is one."""
    return _installed[-1] if _installed else None


def installed_loss(
    logits: Tensor,
    target: Tensor,
    label_smoothing: float = 0.0,
    tp_group: dist.ProcessGroup | None = None,
) -> tuple[Tensor, Tensor | None]:
    """``per_token_loss`` by the options that rule, counted; by the defaults where none do."""
    installation = current()
    if installation is None:
        return per_token_loss(logits, target, label_smoothing, tp_group, MegatronOptions())
    loss, zloss = installation.loss(logits, target, label_smoothing, tp_group)
    # A compiled caller would be specialised to the number, and compiled again at each call.
    if not torch.compiler.is_compiling():
        installation.calls += 1
        installation.zloss = None if zloss is None else zloss.detach()
    return loss, zloss


def _while_installed(ours: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Who kept a replacement where no patch reaches calls Megatron's own once all is taken back."""

    @functools.wraps(ours)
    def function(*args: Any, **kwargs: Any) -> Tensor:
        original = None if _installed else _patch.originals.get(ours.__name__)
        result: Tensor = (ours if original is None else original)(*args, **kwargs)
        return result

    return function


def _replacements() -> dict[str, Callable[..., Tensor]]:
    """Functions of Megatron's names and signatures, made once.

    No module holds them by name, so that putting Megatron's back never reaches into this one.
    """

    def vocab_parallel_cross_entropy(
        vocab_parallel_logits: Tensor,
        target: Tensor,
        label_smoothing: float = 0.0,
        tp_group: dist.ProcessGroup | None = None,
    ) -> Tensor:
        return installed_loss(vocab_parallel_logits, target, label_smoothing, tp_group)[0]

    def fused_vocab_parallel_cross_entropy(
        vocab_parallel_logits: Tensor, target: Tensor, tp_group: dist.ProcessGroup | None = None
    ) -> Tensor:
        return installed_loss(vocab_parallel_logits, target, tp_group=tp_group)[0]

    def te_parallel_cross_entropy(
        logits: Tensor,
        labels: Tensor,
        tp_group: dist.ProcessGroup | None = None,
        is_cg_capturable: bool = False,
    ) -> Tensor:
        return installed_loss(logits, labels, tp_group=tp_group)[0]

    def te_cross_entropy(
        logits: Tensor,
        labels: Tensor,
        tp_group: dist.ProcessGroup | None = None,
        *,
        cuda_graph_capturable: bool = False,
    ) -> Tensor:
        return installed_loss(logits, labels, tp_group=tp_group)[0]

    functions: tuple[Callable[..., Tensor], ...] = (
        vocab_parallel_cross_entropy,
        fused_vocab_parallel_cross_entropy,
        te_parallel_cross_entropy,
        te_cross_entropy,
    )
    return {function.__name__: _while_installed(function) for function in functions}


_installed: list[Installation] = []
_patch = Patch(_replacements())
