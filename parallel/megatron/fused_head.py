"""The fused head in Megatron's GPTModel: hidden states to a loss per token, logits never whole.

    output_processor    megatron-core 0.18 and newer: model(..., output_processor=output_processor)
    fuse_head           before: one model's output layer hands its hidden states on to the loss

Both take the options of ``install`` where it was called (the vocabulary, ignore_index, z-loss), and
the model's own words for the rest: its output layer's weight or the embedding's, its
tensor-parallel group, sequence parallelism, and ``weight.main_grad`` where gradients are added up.
"""

from __future__ import annotations

import inspect
import sys
from types import TracebackType
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from vocab_parallel_ce import linear_cross_entropy

from .cross_entropy import (
    MegatronOptions,
    process_group,
    pytorch_smoothing,
    shard_of,
    without_invalid,
)
from .installation import current


class _IntoMainGrad(torch.autograd.Function):
    """The weight as it is; its gradient is added to ``weight.main_grad``.

    Megatron's own layer does so where gradients are accumulated by its kernel. It says so with a
    flag, and hands on a gradient that holds nothing, so that the hooks of its
    DistributedDataParallel fire.
    """

    @staticmethod
    def forward(ctx: Any, weight: Tensor) -> Tensor:
        ctx.weight = weight
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        weight = ctx.weight
        if hasattr(weight, "get_main_grad"):
            weight.main_grad = weight.get_main_grad()
        weight.main_grad.add_(grads[0])
        weight.grad_added_to_main_grad = True
        zero = getattr(weight, "zero_out_wgrad", False)
        return torch.zeros_like(weight) if zero else torch.empty_like(weight)


def _head_weight(layer: Any, weight: Tensor | None) -> Tensor:
    weight = layer.weight if weight is None else weight
    fused = getattr(layer, "gradient_accumulation_fusion", False)
    if fused and hasattr(weight, "grad_added_to_main_grad") and weight.requires_grad:
        out: Tensor = _IntoMainGrad.apply(weight)  # type: ignore[no-untyped-call]
        return out
    return weight


def _check_layer(layer: Any) -> None:
    """Raise ValueError for an output layer whose logits are not what the loss is made of."""
    if getattr(layer, "gather_output", False):
        raise ValueError(
            "the output layer gathers its logits, which the fused head never makes; use "
            "GPTModel(parallel_output=True)"
        )
    if getattr(getattr(layer, "config", None), "defer_embedding_wgrad_compute", False):
        raise ValueError(
            "defer_embedding_wgrad_compute=True takes the gradient of the output weight out of "
            "backward, where the fused head makes it; leave it out"
        )


def fused_head_loss(
    hidden: Tensor,
    labels: Tensor,
    output_layer: Any,
    output_weight: Tensor | None = None,
    *,
    scale: float = 1.0,
    gradient: str = "auto",
) -> Tensor:
    """The loss of every token from Megatron's hidden states.

    Args:
        hidden: [s, b, h], or [s / tp, b, h] where the output layer is sequence-parallel.
        labels: [b, s] ids, the same on every rank of the tensor-parallel group.
        output_layer: Megatron's ColumnParallelLinear, whose parameters and group are used.
        output_weight: the embedding's weight where the two are tied, else None.
        scale: multiplies the logits.
        gradient: as in ``linear_cross_entropy``; a loss per token is made by recompute.

    Returns:
        [b, s] fp32 (fp64 for fp64).

    Raises:
        ValueError: for an output layer that gathers its logits; and as ``linear_cross_entropy``.

    Communication:
        That of ``linear_cross_entropy``, in the output layer's tensor-parallel group.

    Example:
        ```python
        losses = fused_head_loss(hidden, labels, model.output_layer)
        ```
    """
    _check_layer(output_layer)
    installation = current()
    options = MegatronOptions() if installation is None else installation.options
    group = process_group(getattr(output_layer, "tp_group", None))
    weight = _head_weight(output_layer, output_weight)
    target = labels.transpose(0, 1).contiguous()
    call = options.for_group(group)
    shard = shard_of(weight.t(), call, options, trust_shards=True)
    classes = weight.shape[0] if shard is None else shard.vocab_size
    if options.invalid_target == "ignore":
        target = without_invalid(target, classes, options.ignore_index)
    bias = None if output_layer.skip_bias_add else output_layer.bias
    out = linear_cross_entropy(
        hidden,
        weight,
        target,
        linear_bias=bias,
        reduction="none",
        ignore_index=options.ignore_index,
        label_smoothing=pytorch_smoothing(0.0, classes, options.smoothing_formula),
        lse_square_scale=options.lse_square_scale,
        return_zloss=True,
        group=group,
        shard=shard,
        scale=scale,
        engine=options.engine,
        collective=options.collective,
        check=options.check,
        gradient=gradient,
        sequence_parallel=_is_split(output_layer, group),
    )
    loss, zloss = out
    if installation is not None and not torch.compiler.is_compiling():
        installation.calls += 1
        with_z = options.lse_square_scale != 0
        installation.zloss = zloss.detach().transpose(0, 1) if with_z else None
    return loss.transpose(0, 1).contiguous()


def _is_split(layer: Any, group: dist.ProcessGroup | None) -> bool:
    return bool(getattr(layer, "sequence_parallel", False)) and group is not None


def output_processor(
    *,
    hidden_states: Tensor,
    output_layer: Any,
    output_weight: Tensor | None = None,
    labels: Tensor | None = None,
    runtime_gather_output: bool | None = None,
    scale_logits: Any = None,
    **_: Any,
) -> Tensor:
    """What megatron-core 0.18 and newer call in place of the output layer and the loss.

    Args:
        hidden_states: [s, b, h], or [s / tp, b, h] with sequence parallelism.
        output_layer: the model's.
        output_weight: the embedding's weight where the two are tied, else None.
        labels: [b, s] ids; None asks for logits, which the output layer then makes.
        runtime_gather_output: for the output layer, where logits are asked for.
        scale_logits: what the model multiplies its logits by, as a function of logits, or None.

    Returns:
        The loss [b, s] per token, or logits [b, s, v / tp] without labels.

    Raises:
        ValueError: as ``fused_head_loss`` does.

    Communication:
        That of ``linear_cross_entropy``.

    Example:
        ```python
        losses = model(ids, positions, mask, labels=labels, output_processor=output_processor)
        ```
    """
    if labels is None:
        logits, _bias = output_layer(
            hidden_states, weight=output_weight, runtime_gather_output=runtime_gather_output
        )
        logits = logits if scale_logits is None else scale_logits(logits)
        made: Tensor = logits.transpose(0, 1).contiguous()
        return made
    scale = 1.0 if scale_logits is None else float(scale_logits(torch.ones(1)))
    return fused_head_loss(hidden_states, labels, output_layer, output_weight, scale=scale)


_LOSS = "compute_language_model_loss"


class _Deferred(NamedTuple):
    """What the output layer hands out in place of logits."""

    hidden: Tensor
    weight: Tensor | None


class FusedHead:
    """What ``fuse_head`` returns: takes it back. As a context manager, where the block ends."""

    # Bound methods stand in the model's places: a deep copy or a pickle of the model then brings a
    # FusedHead of its own, where a closure would go on calling the first model.

    def __init__(self, model: Any) -> None:
        self._model, self._layer = model, model.output_layer
        self._asks_for_loss = False
        self._forward, self._logits = model.forward, self._layer.forward
        self._loss_of_logits = model.compute_language_model_loss
        self._places: tuple[tuple[Any, str], ...] = (
            (model, "forward"),
            (self._layer, "forward"),
            (model, _LOSS),
        )
        self._before = [vars(owner).get(name) for owner, name in self._places]
        model.forward, self._layer.forward = self._forward_of_model, self._forward_of_layer
        model.compute_language_model_loss = self._loss

    def _forward_of_model(self, *args: Any, **kwargs: Any) -> Any:
        given = inspect.signature(self._forward).bind(*args, **kwargs).arguments
        before, self._asks_for_loss = self._asks_for_loss, given.get("labels") is not None
        try:
            return self._forward(*args, **kwargs)
        finally:
            self._asks_for_loss = before

    def _forward_of_layer(
        self,
        input_: Tensor,
        weight: Tensor | None = None,
        runtime_gather_output: bool | None = None,
        **others: Any,
    ) -> Any:
        if not self._asks_for_loss or runtime_gather_output:
            return self._logits(input_, weight, runtime_gather_output, **others)
        return _Deferred(input_, weight), None

    def _loss(self, labels: Tensor, logits: Any) -> Tensor:
        if not isinstance(logits, _Deferred):
            made: Tensor = self._loss_of_logits(labels, logits)
            return made
        return fused_head_loss(logits.hidden, labels, self._layer, logits.weight)

    def undo(self) -> None:
        """The model is as it was. A second call does nothing."""
        for (owner, name), before in zip(self._places, self._before, strict=True):
            vars(owner).pop(name, None)
            if before is not None:  # somebody else's, on this one object
                setattr(owner, name, before)
        self._places, self._before = (), []

    def __enter__(self) -> FusedHead:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        problem: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.undo()


def fuse_head(model: nn.Module) -> FusedHead:
    """Make one GPTModel compute its loss from hidden states, also those of its MTP layers.

    For megatron-core before 0.18, which has no ``output_processor``. Whoever asks the model for
    logits (no labels) gets them as before.

    Args:
        model: a GPTModel, or a wrapper of one (Float16Module, DistributedDataParallel). On a
            pipeline stage without an output layer nothing changes.

    Returns:
        A FusedHead: ``undo()``; also a context manager.

    Raises:
        TypeError: for a model without Megatron's output layer and loss.
        ValueError: where the model gathers its logits, where its head was fused already, and for
            MTP layers in a megatron-core that reads their logits (0.19 does).

    Communication:
        None here; in a step that of ``linear_cross_entropy``.

    Example:
        ```python
        install(vocab_size=50257)
        fuse_head(model)
        ```
    """
    inner: Any = model
    while not hasattr(inner, _LOSS) and hasattr(inner, "module"):
        inner = inner.module
    if not hasattr(inner, _LOSS):
        raise TypeError(
            f"model must be a GPTModel of megatron-core or wrap one, got {type(model).__name__}"
        )
    layer = getattr(inner, "output_layer", None)
    if layer is None:
        if getattr(inner, "post_process", True):
            raise TypeError(f"model has no output_layer: {type(inner).__name__}")
        return _NoHead()
    if _LOSS in inner.__dict__:
        raise ValueError("the head of this model is fused already, or its loss replaced")
    _check_layer(layer)
    _check_mtp(inner)
    return FusedHead(inner)


def _check_mtp(model: Any) -> None:
    """From 0.19 on Megatron counts in training how often its MTP layers' logits are right."""
    layers = getattr(getattr(model, "config", None), "mtp_num_layers", None)
    mtp = sys.modules.get("megatron.core.transformer.multi_token_prediction")
    if layers and hasattr(mtp, "_compute_mtp_acceptance_counts"):
        raise ValueError(
            f"fuse_head cannot serve a model of mtp_num_layers={layers} in this megatron-core, "
            "which reads the logits of MTP layers in training; use install() without fuse_head, or "
            "output_processor, which leaves those layers their logits"
        )


class _NoHead(FusedHead):
    """A pipeline stage that has none."""

    def __init__(self) -> None:
        pass

    def undo(self) -> None:
        """Nothing was done."""
