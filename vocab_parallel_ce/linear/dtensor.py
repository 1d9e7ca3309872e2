"""Hidden states and head as DTensors: the mesh and the placements tell group, shard and sequence.

The head's weight is sharded over dimension 0 on one mesh dimension, the vocabulary's. On that one
the hidden states are replicated, or sharded over their dimension 0: then each rank has its part of
a sequence. On the other mesh dimensions the head is replicated, and the hidden states may shard
rows. Their gradient comes back in their placement; the head's is Partial where rows are sharded.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

from ..arguments import Options
from ..dtensor import (
    PLAIN,
    Layout,
    check_row_options,
    check_target,
    local_part,
    local_row_options,
    local_target,
    local_weight,
    row_groups,
)
from ..rounds import play_before
from ..shard import VocabShard
from ..switches import check_is_on, check_word
from .checks import LinearOptions, LinearTensors


def unwrap_linear(
    tensors: LinearTensors, options: Options, linear: LinearOptions
) -> tuple[LinearTensors, Options, LinearOptions, Layout]:
    """Local tensors and options of a call; plain tensors pass through.

    Raises ValueError for placements that cannot be served. Communicates nothing, unless
    ``normalizer`` or ``target`` is a DTensor that lies otherwise.
    """
    hidden, head = tensors.input, tensors.linear_weight
    if not isinstance(hidden, DTensor) or not isinstance(head, DTensor):
        _refuse_single_dtensors(tensors, options)
        return tensors, options, linear, PLAIN
    if options.group is not None or options.shard is not None:
        raise ValueError(
            "group and shard must be left out for DTensors: the mesh and the placements of "
            "linear_weight tell them"
        )
    mesh = hidden.device_mesh
    if head.device_mesh != mesh:
        raise ValueError("linear_weight is a DTensor on another mesh than input")
    vocabulary = _vocabulary_dim(head)
    placements = tuple(hidden.placements)
    sequence = _check_hidden(hidden, vocabulary)
    if linear.sequence_parallel and not sequence:
        raise ValueError(
            f"sequence_parallel=True, but input has placements {placements}; DTensors tell it: "
            "leave the argument out, or shard dimension 0 over the vocabulary's mesh dimension"
        )
    rows = tuple(Replicate() if d == vocabulary else p for d, p in enumerate(placements))
    group = None if vocabulary is None else mesh.get_group(vocabulary)
    telling = check_is_on(check_word(options.check)) and not torch.compiler.is_compiling()
    hearing = row_groups(hidden, group) if telling else ()
    layout = Layout(mesh, placements, rows, tuple(hidden.shape), hearing)
    summed = list(placements)
    if linear.hidden_gradient == "partial" and vocabulary is not None and not sequence:
        summed[vocabulary] = Partial()
    local_head, bias, shard = _local_head(head, tensors.linear_bias, vocabulary, rows)
    local = hidden.to_local(grad_placements=summed)
    offset, size = local_part(tuple(hidden.shape), mesh, rows)
    offset, here = offset[:-1], size[:-1]  # of this rank's targets
    check_target(tensors.target, here, layout)
    check_row_options(options, here, layout)
    weight = local_weight(tensors.weight)
    if telling:
        play_before(mesh)
    normalizer = tensors.normalizer
    if isinstance(normalizer, DTensor):
        normalizer = normalizer.full_tensor()
    target = local_target(tensors.target, here, layout, offset)
    options = local_row_options(options, here, layout, offset)
    return (
        LinearTensors(local, local_head, bias, target, weight, normalizer),
        options._replace(group=group, shard=shard, normalizer=normalizer),
        linear._replace(sequence_parallel=sequence),
        layout,
    )


def _refuse_single_dtensors(tensors: LinearTensors, options: Options) -> None:
    """Raises where one argument is a DTensor, though input and linear_weight are not both."""
    given = {**tensors._asdict(), "scale": options.scale, "selected": options.selected}
    for name, value in given.items():
        if isinstance(value, DTensor):
            raise ValueError(
                f"{name} is a DTensor, but not both input and linear_weight are: pass both as "
                f"DTensors of one mesh, or {name}.to_local()"
            )


def _local_head(
    head: DTensor, bias: Tensor | None, vocabulary: int | None, rows: tuple[Placement, ...]
) -> tuple[Tensor, Tensor | None, VocabShard]:
    """This rank's weight and bias, and the ids of their rows."""
    mesh, placements = head.device_mesh, tuple(head.placements)
    gradients = [_gradient_of_head(d, p, vocabulary, rows) for d, p in enumerate(placements)]
    weight = head.to_local(grad_placements=gradients)
    if isinstance(bias, DTensor):
        if tuple(bias.placements) != placements:
            raise ValueError(
                f"linear_bias has placements {tuple(bias.placements)}, linear_weight "
                f"{placements}; both must lie alike"
            )
        bias = bias.to_local(grad_placements=gradients)
    elif isinstance(bias, Tensor) and bias.requires_grad and gradients != list(placements):
        raise ValueError(
            "linear_bias is a plain tensor that needs a gradient, but input shards its rows: the "
            "gradient would be that of this rank's rows alone; pass linear_bias as a DTensor that "
            "lies as linear_weight does"
        )
    start = min(local_part(tuple(head.shape), mesh, placements)[0][0], head.shape[0])
    return weight, bias, VocabShard(start, start + weight.shape[0], head.shape[0])


def _vocabulary_dim(head: DTensor) -> int | None:
    """The mesh dimension that shards the vocabulary, None where every rank has all of it."""
    found = []
    for dim, placement in enumerate(head.placements):
        if type(placement) is Shard and placement.dim % head.dim() == 0:
            found.append(dim)
        elif not placement.is_replicate():
            raise ValueError(
                f"linear_weight has placement {placement} on mesh dimension {dim}; it must be "
                "Shard(0) on one mesh dimension, the vocabulary's, and Replicate() on the others"
            )
    if len(found) > 1:
        raise ValueError(
            f"linear_weight shards its vocabulary over mesh dimensions {found}; one of them must "
            "replicate it, or the mesh must be flattened"
        )
    return found[0] if found else None


def _check_hidden(hidden: DTensor, vocabulary: int | None) -> bool:
    """Whether the hidden states are parts of a sequence over the vocabulary's ranks."""
    sequence = False
    for dim, placement in enumerate(hidden.placements):
        if placement.is_replicate():
            continue
        rows = type(placement) is Shard and placement.dim % hidden.dim() < hidden.dim() - 1
        if dim == vocabulary and rows and isinstance(placement, Shard):
            rows = placement.dim % hidden.dim() == 0
            sequence = True
        if not rows:
            raise ValueError(
                f"input has placement {placement} on mesh dimension {dim}; hidden states may be "
                "replicated, or shard a dimension of rows (over the vocabulary's ranks dimension "
                "0 only); use input.redistribute(...)"
            )
    if sequence:
        _check_sequence(hidden, vocabulary)
    return sequence


def _check_sequence(hidden: DTensor, vocabulary: int | None) -> None:
    """Parts must be equal, and cut after those of the other mesh dimensions."""
    parts = 1
    for dim, placement in enumerate(hidden.placements):
        if isinstance(placement, Shard) and placement.dim % hidden.dim() == 0:
            parts *= hidden.device_mesh.size(dim)
            if vocabulary is not None and dim > vocabulary:
                raise ValueError(
                    f"input shards dimension 0 over mesh dimension {vocabulary}, the vocabulary's, "
                    f"and then over {dim}: a portion of rows would lie apart; put the vocabulary's "
                    "mesh dimension last"
                )
    if hidden.shape[0] % parts:
        raise ValueError(
            f"input has {hidden.shape[0]} entries in dimension 0, which {parts} ranks cannot share "
            "evenly; every rank's part of a sequence must have the same length"
        )


def _gradient_of_head(
    dim: int, placement: Placement, vocabulary: int | None, rows: tuple[Placement, ...]
) -> Placement:
    if dim != vocabulary and rows[dim].is_shard():
        return Partial()
    return placement
