"""Hugging Face transformers: one line gives a model with a split head this library's loss.

    model = AutoModelForCausalLM.from_pretrained(
        name, distributed_config=DistributedConfig(tp_size=2, tp_plan={"lm_head": "colwise"})
    )
    install(model)

transformers splits the head's weight as a DTensor: its mesh gives the group, and its first
dimension the vocabulary. The model finds its loss in ``model.loss_function``, a property that may
be set, so nothing is patched. The plan must keep the logits split ("colwise"). A model's own plan,
"colwise_gather_output", gathers them, and then nothing would be saved.

Read in transformers 5.24. transformers itself is never imported.
"""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

from vocab_parallel_ce import VocabShard
from vocab_parallel_ce.parallel.causal_lm import CausalLMLoss
from vocab_parallel_ce.parallel.fused_head import FusedCausalLMLoss, fuse

KNOWN = "5.24"
TP = "tp"
"""transformers' name of the mesh dimension"""


def install(
    model: Any,
    *,
    label_smoothing: float = 0.0,
    lse_square_scale: float = 0.0,
    inplace_backward: bool = False,
    fused_head: bool = False,
) -> CausalLMLoss | FusedCausalLMLoss:
    """Set this library's loss as the loss of a causal language model of transformers.

    The loss is that of transformers' ``ForCausalLMLoss``: labels are shifted, and
    ``num_items_in_batch``, ``ignore_index`` and ``shift_labels`` mean the same. Each rank computes
    it from its part of the logits, in fp32 without an fp32 copy. ``outputs.logits`` is that part,
    too, [..., S, V / tp]: metrics and generation that read it need ``token_statistics``, or a model
    that was loaded with another plan.

    Args:
        model: loaded with ``DistributedConfig(tp_size=..., tp_plan={"lm_head": "colwise"})``; the
            vocabulary need not be a multiple of tp_size. A model that is not split works as well.
        label_smoothing: in the loss, over the whole vocabulary. Leave the Trainer's own
            ``label_smoothing_factor`` at 0: it wants whole logits.
        lse_square_scale: adds this times lse squared to the loss of each token (z-loss).
        inplace_backward: the gradient overwrites ``outputs.logits``.
        fused_head: compute head and loss together (``linear_cross_entropy``). In training only one
            chunk of logits exists at a time, and ``outputs.logits`` is None. Evaluation and
            generation do not change.

    Returns:
        The loss function, which is now ``model.loss_function``.

    Raises:
        TypeError: for an object without a head or without the hook ``loss_function``.
        ValueError: for a head that is split otherwise than over the vocabulary; with
            ``fused_head`` for one that is no torch.nn.Linear, such as an adapter (LoRA).

    Communication:
        None here; each loss costs what ``cross_entropy`` costs.

    Example:
        ```python
        install(model, inplace_backward=True)
        loss = model(input_ids, labels=input_ids).loss
        ```
    """
    if not hasattr(type(model), "loss_function"):
        raise TypeError(
            f"{type(model).__name__} has no loss_function to set; expected a causal language model "
            f"of transformers (known to work: {KNOWN})"
        )
    group, shard = group_and_shard(head_weight(model))
    uninstall(model)
    plain = CausalLMLoss(group, shard, label_smoothing, lse_square_scale, inplace_backward)
    loss = fuse(plain, model, model.get_output_embeddings()) if fused_head else plain
    model.loss_function = loss
    return loss


def uninstall(model: Any) -> None:
    """Give the model its own loss back. Does nothing where ``install`` was not called."""
    loss = getattr(model, "_loss_function", None)
    if isinstance(loss, FusedCausalLMLoss):
        loss.remove()
    if isinstance(loss, (CausalLMLoss, FusedCausalLMLoss)):
        del model._loss_function


def head_weight(model: Any) -> Tensor:
    """[V, H], the weight of the output head; a DTensor where it is split. TypeError without one."""
    find = getattr(model, "get_output_embeddings", None)
    weight = getattr(find() if find else None, "weight", None)
    if not isinstance(weight, Tensor):
        raise TypeError(
            f"{type(model).__name__}.get_output_embeddings() gives no head with a weight; expected "
            f"a causal language model of transformers (known to work: {KNOWN})"
        )
    return weight


def group_and_shard(weight: Tensor) -> tuple[dist.ProcessGroup | None, VocabShard]:
    """The ranks that split the head, and this rank's ids. ValueError for another splitting."""
    size = weight.shape[0]
    if not isinstance(weight, DTensor):
        return None, VocabShard(0, size, size)
    names = weight.device_mesh.mesh_dim_names or ()
    if weight.device_mesh.ndim > 1 and TP not in names:
        raise ValueError(
            f"the head's weight lies on a mesh of dimensions {names}, none of which is named {TP!r}"
        )
    dim = names.index(TP) if TP in names else 0
    placement = weight.placements[dim]
    if not isinstance(placement, Shard) or placement.dim != 0:
        raise ValueError(
            f"the head's weight [V, H] is {placement} over the tensor-parallel ranks, expected "
            'Shard(0): load the model with DistributedConfig(tp_plan={"lm_head": "colwise"})'
        )
    group = weight.device_mesh.get_group(dim)
    return group, VocabShard.even(size, group)
