"""A causal language model that never makes logits in training: head and loss in one function.

A model of transformers calls its head and then ``loss_function``. When it trains with labels, the
head is made to return its hidden states unchanged, and the loss function computes head and loss
together, one chunk of rows at a time (``linear_cross_entropy``). In every other call, such as
evaluation and generation, the head makes logits as before. In training ``outputs.logits`` is set to
None, because it would hold hidden states.

A model that changes its logits between head and loss (a cap, a scale) cannot be served this way:
the loss checks that it gets the very tensor that the head returned, and raises otherwise.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from vocab_parallel_ce import linear_cross_entropy
from vocab_parallel_ce.parallel.causal_lm import CausalLMLoss, targets_of


@dataclass(eq=False)
class FusedCausalLMLoss:
    """``CausalLMLoss`` from hidden states where the model trains, and from logits elsewhere."""

    plain: CausalLMLoss
    model: nn.Module
    head: nn.Module

    def __post_init__(self) -> None:
        self._active = False
        self._handed_on: Tensor | None = None
        self._forward: Callable[..., Any] = self.head.forward
        self._was_set = "forward" in vars(self.head)
        self._hooks = (
            self.model.register_forward_pre_hook(self._begin, with_kwargs=True),
            self.model.register_forward_hook(self._end, always_call=True),
        )
        self.head.forward = self._hand_on

    def remove(self) -> None:
        """The model is as it was."""
        if self._was_set:
            self.head.forward = self._forward
        else:  # it was the class's
            del self.head.forward
        for hook in self._hooks:
            hook.remove()

    def _begin(self, model: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        given = any(kwargs.get(name) is not None for name in ("labels", "shift_labels"))
        self._active = given and model.training and torch.is_grad_enabled()

    def _hand_on(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        if not self._active:
            return self._forward(hidden, *args, **kwargs)
        self._handed_on = hidden
        return hidden

    def _end(self, model: nn.Module, args: Any, output: Any) -> None:
        if self._active and hasattr(output, "logits"):
            output.logits = None
        self._active, self._handed_on = False, None

    def __call__(
        self,
        logits: Tensor,
        labels: Tensor | None = None,
        vocab_size: int | None = None,
        num_items_in_batch: Tensor | float | None = None,
        ignore_index: int = -100,
        shift_labels: Tensor | None = None,
        **others: Any,
    ) -> Tensor:
        """See ``CausalLMLoss``. ValueError where a model changed what its head handed on."""
        if not self._active:
            return self.plain(
                logits, labels, vocab_size, num_items_in_batch, ignore_index, shift_labels
            )
        if logits is not self._handed_on:
            raise ValueError(
                f"{type(self.model).__name__} changes its logits between head and loss (a cap, a "
                "scale or another dtype), which a fused head does not see; install the loss "
                "without fused_head"
            )
        plain = self.plain
        plain.check_vocabulary(vocab_size)
        target = targets_of(labels, shift_labels, ignore_index, plain.where)
        weight, bias = (_local(getattr(self.head, name, None)) for name in ("weight", "bias"))
        assert weight is not None
        if isinstance(num_items_in_batch, Tensor):
            num_items_in_batch = num_items_in_batch.to(logits.device)
        loss = linear_cross_entropy(
            logits,
            weight,
            target.to(logits.device),
            linear_bias=bias,
            ignore_index=ignore_index,
            label_smoothing=plain.label_smoothing,
            lse_square_scale=plain.lse_square_scale,
            normalizer=num_items_in_batch,
            group=plain.group,
            shard=plain.shard,
        )
        assert isinstance(loss, Tensor)
        return loss


def fuse(plain: CausalLMLoss, model: nn.Module, head: nn.Module) -> FusedCausalLMLoss:
    """The loss of ``model`` together with its ``head``; in place there is nothing to overwrite.

    Raises ValueError for a head that is more than a product with its weight, such as an adapter.
    """
    if type(head).forward is not nn.Linear.forward:
        raise ValueError(
            f"the head of {type(model).__name__} is a {type(head).__name__}, which computes more "
            "than torch.nn.Linear does; a fused head reads its weight and bias only: install the "
            "loss without fused_head"
        )
    return FusedCausalLMLoss(replace(plain, inplace_backward=False), model, head)


def _local(parameter: Tensor | None) -> Tensor | None:
    """This rank's rows; their gradient goes to the DTensor that they are a part of."""
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter
