"""What a forward pass does with [N] vectors around its kernels, in three steps.

    local_target     where each row's target lives
    write_header     what this rank tells the others about itself
    conclude         partials of all ranks -> the statistics of every row; NaN where ranks disagree

``TorchSteps`` is made of the functions of ``targets``, ``header`` and ``statistics``: the one to
read. Those are a hundred small calls, on an accelerator as many launches; an engine that has
``ROW_FUNCTIONS`` does the same with three. Both raise where values may be looked at.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol, cast

import torch
import torch.distributed as dist
from torch import Tensor

from . import forgotten_group
from .checksums import checksum, float_checksum
from .collectives import Payload
from .engines.contract import IGNORED, Engine, Gathered, HostRowFunctions, RowFunctions
from .header import (
    HEADER_LAYOUT,
    NO_PROBLEMS,
    ValueProblems,
    read_headers,
    static_header,
    write_findings,
    write_header,
)
from .request import RowRequest
from .shard import group_rank_and_size
from .statistics import finish, merge, merge_single
from .targets import find_problems, locate
from .verdict import disagreement, raise_on_own_values, raise_on_problems


class Concluded(NamedTuple):
    """The statistics of N rows over the whole vocabulary."""

    stats: Tensor
    """[j, N], rows named by ``statistics.stat_names``; exactly 0 on ignored rows"""
    m: Tensor
    s: Tensor
    """[N]; NaN in rows that must not look plausible"""
    argmax: Tensor | None
    row_weight: Tensor | None = None
    """[N] what a row weighs in a mean, see ``reduction.RowLosses``; None where nobody asked yet"""


class RowSteps(Protocol):
    """The steps of one call, for this rank's target [N]."""

    local_target: Tensor
    """[N] int64 column of this shard, ELSEWHERE or IGNORED"""

    def write_header(
        self, payload: Payload, shard_total: Tensor | float, hidden: Tensor | None = None
    ) -> None:
        """Fill the header, and W_r, of a payload whose partials are there.

        ``shard_total`` is the sum of this shard's class weights. ``hidden`` is what the header
        shall tell of the hidden states (``checksums.fingerprint``), where the logits were made of
        some.
        """
        ...

    def conclude(
        self, gathered: Gathered, parts: Tensor, total_weight: Tensor | float
    ) -> Concluded:
        """Merge, judge and finish; ``gathered`` is used up as scratch.

        ``parts`` [k, N] are this rank's own.
        """
        ...


class TorchSteps:
    """Plain torch. ``on_host``: values are looked at, and what is wrong with them raises."""

    def __init__(
        self,
        target: Tensor,
        weight: Tensor | None,
        request: RowRequest,
        normalizer: Tensor | None,
        on_host: bool,
        group: dist.ProcessGroup | None,
        announced: Tensor | None = None,
        scale: Tensor | None = None,
        selected: Tensor | None = None,
    ) -> None:
        self._weight, self._request, self._scale = weight, request, scale
        self._normalizer, self._on_host, self._selected = normalizer, on_host, selected
        self._located = locate(target, request)
        self.local_target = self._located.local_target
        self._target = target if announced is None else announced
        self._from_hidden = False
        self._problems = NO_PROBLEMS
        if on_host:
            located = self._located if announced is None else locate(announced, request)
            self._problems = find_problems(
                self._target, located, weight, scale, selected, request.vocab_size
            )
            _raise_if_alone(self._problems, request, group)

    def write_header(
        self, payload: Payload, shard_total: Tensor | float, hidden: Tensor | None = None
    ) -> None:
        """See ``RowSteps``."""
        payload.shard_weight.fill_(shard_total)
        self._from_hidden = hidden is not None
        told = self._request.implicit_shard or self._from_hidden
        content = payload.parts[:2] if told else None
        write_header(
            payload.header, self._request, self._target, content, self._weight, self._problems,
            self._normalizer, hidden, self._scale, self._selected,
        )  # fmt: skip

    def conclude(
        self, gathered: Gathered, parts: Tensor, total_weight: Tensor | float
    ) -> Concluded:
        """See ``RowSteps``."""
        wanted, ignored = self._request.wanted, self._located.ignored
        if gathered.parts.shape[0] == 1:
            merged = merge_single(gathered.parts[0], wanted)
        else:
            merged = merge(gathered.parts, wanted, gathered.shard_weight, gathered.starts)
        if self._on_host:
            if gathered.headers is not None:
                _raise_on_headers(
                    gathered.headers, parts, self._target, self._request.size, self.local_target,
                    self._from_hidden,
                )  # fmt: skip
        else:
            poison = ~self._located.allowed
            if gathered.headers is not None:
                poison |= disagreement(
                    gathered.headers, self._target, self._constant_rows(parts), merged.s.dtype
                )
            # One NaN here makes the loss and the whole gradient of the row NaN, on every rank.
            merged.s = merged.s.masked_fill(poison, torch.nan)
        return Concluded(
            finish(merged, wanted, total_weight, ignored), merged.m, merged.s, merged.argmax
        )

    def _constant_rows(self, parts: Tensor) -> Tensor:
        return _constant_rows(parts, self._request.size, self.local_target)


class FusedSteps:
    """An engine's own kernels. What raises on the host they find; torch's functions explain it."""

    def __init__(
        self,
        functions: RowFunctions,
        target: Tensor,
        weight: Tensor | None,
        request: RowRequest,
        normalizer: Tensor | None,
        group: dist.ProcessGroup | None = None,
        announced: Tensor | None = None,
        scale: Tensor | None = None,
        selected: Tensor | None = None,
    ) -> None:
        self._functions, self._target, self._weight = functions, target, weight
        self._on_host = cast(HostRowFunctions, functions) if functions.ON_HOST else None
        self._request, self._normalizer, self._scale = request, normalizer, scale
        self._announced = target if announced is None else announced
        self._selected, self._from_hidden = selected, False
        self._excuse: Tensor | None = None
        self._problems, self._weight_checksum = NO_PROBLEMS, 0
        self.local_target, bad_row = self._locate(target)
        if self._on_host is not None:
            if announced is not None:
                bad_row = self._locate(announced)[1]
            self._find_problems(self._on_host, bad_row, group)

    def _locate(self, target: Tensor) -> tuple[Tensor, int]:
        request = self._request
        return self._functions.locate(
            target, request.start, request.stop, request.vocab_size, request.ignore_index
        )

    def _find_problems(
        self, functions: HostRowFunctions, bad_row: int, group: dist.ProcessGroup | None
    ) -> None:
        weight, scale, selected, bad_class = self._weight, self._scale, self._selected, -1
        if weight is not None:
            wide = weight if weight.dtype == torch.float64 else weight.float()
            bad_class, self._weight_checksum = functions.weigh(wide)
        if bad_row < 0 and bad_class < 0 and scale is None and selected is None:
            return
        target, request = self._announced, self._request
        self._problems = find_problems(
            target, locate(target, request), weight, scale, selected, request.vocab_size
        )
        _raise_if_alone(self._problems, request, group)

    def _checksum_of_weight(self) -> Tensor | int:
        if self._weight is None or self._on_host is not None:
            return self._weight_checksum
        return float_checksum(self._weight)

    def write_header(
        self, payload: Payload, shard_total: Tensor | float, hidden: Tensor | None = None
    ) -> None:
        """See ``RowSteps``. Hidden states are compared on the host only."""
        request = self._request
        self._from_hidden = hidden is not None and self._on_host is not None
        self._excuse = self._functions.sign(
            payload.buffer,
            static_header(request, payload.buffer.device),
            HEADER_LAYOUT,
            self._announced,
            payload.parts,
            request.implicit_shard or self._from_hidden,
            shard_total,
            self._checksum_of_weight(),
            self._normalizer,
            None if self._scale is None else float_checksum(self._scale),
            None if self._selected is None else checksum(self._selected),
            request.size,
            request.ignore_index,
        )
        if self._from_hidden or self._problems is not NO_PROBLEMS:
            write_findings(payload.header, self._problems, hidden)

    def conclude(
        self, gathered: Gathered, parts: Tensor, total_weight: Tensor | float
    ) -> Concluded:
        """See ``RowSteps``."""
        request = self._request
        headers = gathered.headers
        if headers is not None and self._on_host is not None:
            self._judge(self._on_host, headers, parts)
        return Concluded(
            *self._functions.conclude(
                gathered, request.wanted, self._target, request.vocab_size, request.ignore_index,
                self._weight, total_weight, HEADER_LAYOUT, self._excuse,
            )
        )  # fmt: skip

    def _judge(self, functions: HostRowFunctions, headers: Tensor, parts: Tensor) -> None:
        if functions.agree(headers, HEADER_LAYOUT):
            return
        _raise_on_headers(
            headers, parts, self._announced, self._request.size, self.local_target,
            self._from_hidden,
        )  # fmt: skip


def _raise_if_alone(
    problems: ValueProblems, request: RowRequest, group: dist.ProcessGroup | None
) -> None:
    """Ranks that are several raise together, after the exchange."""
    if problems != NO_PROBLEMS and group_rank_and_size(group)[1] == 1:
        cause = forgotten_group.cause(group, not request.implicit_shard, request.size)
        raise_on_own_values(problems, request, cause)


def _raise_on_headers(
    headers: Tensor, parts: Tensor, target: Tensor, size: int, local_target: Tensor, hidden: bool
) -> None:
    """``target`` is what was announced; ``hidden``: the logits are made of hidden states."""
    read = read_headers(headers, parts.dtype)
    constant = bool(_constant_rows(parts, size, local_target))
    raise_on_problems(read, target, constant, hidden)


def _constant_rows(parts: Tensor, size: int, local_target: Tensor) -> Tensor:
    """0-d: every kept row of this shard of ``size`` columns holds one value, so that s is size."""
    return ((parts[1] == size) | (local_target == IGNORED)).all()


def row_steps(
    engine: Engine,
    target: Tensor,
    weight: Tensor | None,
    request: RowRequest,
    normalizer: Tensor | None,
    on_host: bool,
    group: dist.ProcessGroup | None,
    announced: Tensor | None = None,
    scale: Tensor | None = None,
    selected: Tensor | None = None,
) -> RowSteps:
    """The steps of a call that ``engine`` serves.

    ``announced`` are the targets that the header speaks of, where they are not ``target``: those of
    a whole batch, of which ``target`` is a part. On the host only.
    """
    functions = engine.ROW_FUNCTIONS
    if functions is None or on_host != functions.ON_HOST or target.numel() == 0:
        return TorchSteps(
            target, weight, request, normalizer, on_host, group, announced, scale, selected
        )
    return FusedSteps(
        functions, target, weight, request, normalizer, group, announced, scale, selected
    )
