"""DTensor logits in, DTensor loss out.

The vocabulary may be sharded over one mesh dimension, which then gives the group and the shard;
the other mesh dimensions replicate, or shard the rows. A per-row result keeps the rows' sharding,
a sum or a mean is reduced over it and comes back replicated (one more scalar all_reduce each for
numerator and denominator), and gradients come back in the logits' placement.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

from .arguments import Options
from .checks import admit
from .overwriting import check_overwritable
from .rounds import play_after, play_before
from .shard import VocabShard
from .switches import check_is_on, check_word


@dataclass(frozen=True)
class Layout:
    """How local results become what the caller expects; without a mesh they already are."""

    mesh: DeviceMesh | None = None
    logits_placements: tuple[Placement, ...] = ()
    row_placements: tuple[Placement, ...] = ()
    shape: tuple[int, ...] = ()
    """of the global logits"""
    row_groups: tuple[dist.ProcessGroup, ...] = ()
    """of the ranks that hold other rows, where they are to hear of errors (``check``)"""

    @property
    def shares_rows(self) -> bool:
        """Whether other ranks hold other rows."""
        return self.mesh is not None and any(p.is_shard() for p in self.row_placements)

    def rows(self, value: Tensor) -> Tensor:
        """A per-row result [...], sharded like the logits' rows."""
        return self._wrap(value, self.row_placements, self.shape[:-1])

    def selected(self, value: Tensor) -> Tensor:
        """K numbers a row, [..., K], sharded like the logits' rows."""
        return self._wrap(value, self.row_placements, (*self.shape[:-1], value.shape[-1]))

    def logits(self, value: Tensor) -> Tensor:
        """A tensor like the logits, in their placement."""
        return self._wrap(value, self.logits_placements, self.shape)

    def scalar(self, value: Tensor) -> Tensor:
        """A reduced result, the same on every rank."""
        if self.mesh is None:
            return value
        return self._wrap(value, tuple(Replicate() for _ in self.row_placements), value.shape)

    def total(self, value: Tensor) -> Tensor:
        """The sum of a 0-d local value over the ranks that hold other rows; differentiable."""
        if self.mesh is None or not self.shares_rows:
            return value
        partial = [Partial() if p.is_shard() else Replicate() for p in self.row_placements]
        part = DTensor.from_local(value, self.mesh, partial, run_check=False)
        return part.redistribute(placements=[Replicate()] * len(partial)).to_local()

    def agree(self, *, more: bool = False) -> None:
        """With ``check``: raise if a rank that holds other rows has raised.

        ``more``: this will be asked once more.
        """
        if self.row_groups:
            play_after(self.row_groups, more=more)

    def _wrap(
        self, value: Tensor, placements: tuple[Placement, ...], shape: tuple[int, ...]
    ) -> Tensor:
        if self.mesh is None:
            return value
        # Uneven shards: the global shape cannot be told from the local one.
        stride = torch.empty(shape, device="meta").stride()
        return DTensor.from_local(
            value, self.mesh, placements, run_check=False, shape=torch.Size(shape), stride=stride
        )


PLAIN = Layout()
"""of a call without DTensors"""


def vocabulary_group(input: DTensor, dim: int = -1) -> dist.ProcessGroup | None:
    """The ranks that share dimension ``dim`` of ``input``; None where that is not one group."""
    dim = dim % input.dim()
    dims = [d for d, p in enumerate(input.placements) if _shards(p, dim, input.dim())]
    return input.device_mesh.get_group(dims[0]) if len(dims) == 1 else None


def row_groups(
    input: DTensor, vocabulary: dist.ProcessGroup | None = None
) -> tuple[dist.ProcessGroup, ...]:
    """The ranks that hold other rows of the same columns, a group for each mesh dimension.

    Those of ``vocabulary`` are none of them, where they share the rows of a sequence.
    """
    last = input.dim() - 1
    groups = (
        input.device_mesh.get_group(d)
        for d, p in enumerate(input.placements)
        if isinstance(p, Shard) and not _shards(p, last, input.dim())
    )
    return tuple(group for group in groups if group is not vocabulary)


def unwrap(
    input: Tensor, target: Tensor, weight: Tensor | None, options: Options
) -> tuple[Tensor, Tensor, Tensor | None, Options, Layout]:
    """Local tensors and options of a call; plain tensors pass through.

    Raises ValueError for placements that the loss cannot serve. Communicates nothing, unless
    ``normalizer`` is a DTensor that must be reduced, or ``target`` one that lies otherwise than the
    rows of ``input``.
    """
    if not isinstance(input, DTensor):
        others = (target, weight, options.scale, options.selected)
        for name, value in zip(("target", "weight", "scale", "selected"), others, strict=True):
            if isinstance(value, DTensor):
                raise ValueError(
                    f"{name} is a DTensor but input is not: pass both as DTensors, or "
                    f"{name}.to_local()"
                )
        return *admit(input, target, weight, options), PLAIN
    if options.group is not None or options.shard is not None:
        raise ValueError(
            "group and shard must be left out for DTensor input: its mesh and placements tell them"
        )
    if options.inplace_backward and input.requires_grad and torch.is_grad_enabled():
        check_overwritable(input, "")
    mesh, last = input.device_mesh, input.dim() - 1
    vocab_dims = _vocab_dims(input, last)
    placements = tuple(input.placements)
    rows = tuple(Replicate() if d in vocab_dims else p for d, p in enumerate(placements))
    telling = check_is_on(check_word(options.check)) and not torch.compiler.is_compiling()
    hearing = row_groups(input) if telling else ()
    layout = Layout(mesh, placements, rows, tuple(input.shape), hearing)

    local = input.to_local(grad_placements=placements)
    offset, _ = local_part(tuple(input.shape), mesh, placements)
    start = min(offset[last], input.shape[last])
    shard = VocabShard(start, start + local.shape[-1], input.shape[last])
    group = mesh.get_group(vocab_dims[0]) if vocab_dims else None
    options = options._replace(group=group, shard=shard)
    rows_here = tuple(local.shape[:-1])
    check_target(target, rows_here, layout)
    check_row_options(options, rows_here, layout)
    weight_here = local_weight(weight)
    if telling:
        play_before(mesh)
    if isinstance(options.normalizer, DTensor):
        options = options._replace(normalizer=options.normalizer.full_tensor())
    options = local_row_options(options, rows_here, layout, offset)
    here = local_target(target, rows_here, layout, offset)
    return *admit(local, here, weight_here, options), layout


def local_part(
    shape: tuple[int, ...], mesh: DeviceMesh, placements: tuple[Placement, ...]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Where the local tensor begins in the global one, and its shape.

    DTensor cuts as ``torch.chunk`` does. In plain integers, so that the compiler can follow them.
    """
    coordinate = mesh.get_coordinate()
    offset, size = [0] * len(shape), list(shape)
    assert coordinate is not None  # a rank outside the mesh has no local tensor to call us with
    for mesh_dim, placement in enumerate(placements):
        if isinstance(placement, Shard):
            dim = placement.dim % len(shape)
            step = -(-size[dim] // mesh.size(mesh_dim))
            first = min(coordinate[mesh_dim] * step, size[dim])
            offset[dim] += first
            size[dim] = min(step, size[dim] - first)
    return tuple(offset), tuple(size)


def _vocab_dims(input: DTensor, last: int) -> list[int]:
    """The mesh dimensions that shard the vocabulary: none or one."""
    for dim, placement in enumerate(input.placements):
        if placement.is_partial():
            raise ValueError(
                f"input is Partial on mesh dimension {dim}: logits must be summed first, "
                "input.redistribute(...) to Replicate or Shard"
            )
        if placement.is_shard() and type(placement) is not Shard:
            raise ValueError(
                f"input has placement {placement} on mesh dimension {dim}, whose order of "
                "elements the loss does not follow; redistribute it to Shard or Replicate"
            )
    dims = [d for d, p in enumerate(input.placements) if _shards(p, last, input.dim())]
    if len(dims) > 1:
        raise ValueError(
            f"input shards its vocabulary over mesh dimensions {dims}; one of them must "
            "replicate it, or the mesh must be flattened"
        )
    return dims


def _shards(placement: Placement, dim: int, ndim: int) -> bool:
    return isinstance(placement, Shard) and placement.dim % ndim == dim


def check_target(
    target: Tensor, rows: tuple[int, ...], layout: Layout, name: str = "target", more: int = 0
) -> None:
    """Raises for a target, or what lies as it does, that fits neither the global rows nor this
    rank's ``rows``; it may have so many dimensions ``more``, behind those of the rows."""
    if not isinstance(target, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(target).__name__}")
    shape, given = layout.shape[:-1], tuple(target.shape)[: target.dim() - more]
    fits = given == shape or (given == rows and not isinstance(target, DTensor))
    if target.dim() < more or not fits:
        last = ("K",) * more
        raise ValueError(
            f"{name} has shape {tuple(target.shape)}, but DTensor input {tuple(layout.shape)} "
            f"needs {(*shape, *last)} (or the local rows, {(*rows, *last)})"
        )
    if isinstance(target, DTensor):
        if target.device_mesh != layout.mesh:
            raise ValueError(f"{name} is a DTensor on another mesh than input")
        if any(p.is_partial() for p in target.placements):
            raise ValueError(
                f"{name} has placements {tuple(target.placements)}: it must not be a Partial sum; "
                f"use {name}.redistribute(...)"
            )


def local_target(
    target: Tensor, rows: tuple[int, ...], layout: Layout, offset: tuple[int, ...]
) -> Tensor:
    """This rank's ``rows`` of a target that is a DTensor, global, or local already."""
    if isinstance(target, DTensor):
        return target.redistribute(placements=layout.row_placements).to_local()
    if target.shape[: len(rows)] == rows:
        return target
    cut = tuple(slice(o, o + n) for o, n in zip(offset, rows, strict=False))
    return target[cut]


def check_row_options(options: Options, rows: tuple[int, ...], layout: Layout) -> None:
    """``check_target`` of ``scale`` and ``selected``, where they have numbers for each row."""
    if isinstance(options.scale, Tensor) and options.scale.dim() > 0:
        check_target(options.scale, rows, layout, "scale")
    if options.selected is not None:
        check_target(options.selected, rows, layout, "selected", more=1)


def local_row_options(
    options: Options, rows: tuple[int, ...], layout: Layout, offset: tuple[int, ...]
) -> Options:
    """``scale`` and ``selected`` of this rank's ``rows``, as ``local_target`` does."""
    scale, selected = options.scale, options.selected
    if isinstance(scale, DTensor) and scale.dim() == 0:
        scale = scale.full_tensor()
    elif isinstance(scale, Tensor) and scale.dim() > 0:
        scale = local_target(scale, rows, layout, offset)
    if selected is not None:
        selected = local_target(selected, rows, layout, offset)
    return options._replace(scale=scale, selected=selected)


def local_weight(weight: Tensor | None) -> Tensor | None:
    """The full vector of class weights as a plain tensor."""
    if not isinstance(weight, DTensor):
        return weight
    if not all(p.is_replicate() for p in weight.placements):
        raise ValueError(
            f"weight has placements {tuple(weight.placements)}; every rank needs the full vector: "
            "weight.full_tensor()"
        )
    return weight.to_local()
