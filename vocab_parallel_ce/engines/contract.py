"""What an engine is: three functions on 2-D tensors of one device, and the types that they share.

An engine may also have ``RowFunctions``, its own versions of the arithmetic on [N] vectors, and
``LinearFunctions``, which start from hidden states.

An engine knows nothing of groups, reductions, padding or options. It sees one rank's shard

    x = logits * scale                       [N, C_r], fp32 arithmetic (fp64 for fp64 logits)
    x = scale * c * tanh(logits / c)         where ``softcap`` c is not 0: the cap is the model's

with one ``scale``, or one a row [N], and a ``local_target`` [N] int64: the column of the row's
target when it lives in this shard, ``ELSEWHERE`` when another rank owns it, ``IGNORED`` when the
row does not count.

The partial statistics of one row, in the order of the rows of the [k, N] tensor that
``partials`` fills (``m``, ``s`` and ``x_y`` always, the others when wanted, in this order):

    m       max_c x_c                                  -inf when every column is -inf
    s       sum_c e^(x_c - m)                          0 when m is -inf; NaN if any x_c is NaN
    x_y     x at local_target                          0 when the target lives elsewhere
    u       sum_c w_c (x_c - m)                        (smooth; w_c = 1 without weight;
                                                        relative to 0 instead of m if m is -inf)
    t       sum_c e^(x_c - m) (x_c - m)                (entropy; a column with e^(..) = 0 adds 0)
    q       sum_c e^(x_c - m)^2                        (squares: of which sum_c p_c^2 is q / s^2)
    argmax  first column that attains m, an integer    (argmax; stored as the bits of an int32 in
                                                        fp32 tensors and of an int64 in fp64 ones)

With m, s the merged statistics of the whole vocabulary, p_c = e^(x_c - m) / s and the row's
``Coefficients``, the gradient of one row is

    dx_c = p_c (softmax - entropy * log p_c) - [c = local_target] target - w_c smooth

where a column with p_c = 0 contributes 0 to the entropy term, never 0 * -inf. ``scale`` is already
folded into the coefficients; an engine applies it to the logits only. Under a softcap every column
of the result, the target's too, is multiplied by the cap's slope 1 - tanh(logits / c)^2.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

ELSEWHERE = -1
IGNORED = -2

# The hash of ``checksums.checksum``, which ``RowFunctions.sign`` computes too: odd, within int64.
CHECKSUM_STEP = 0x1E3779B97F4A7C15
CHECKSUM_ROUNDS = ((30, 0x3F58476D1CE4E5B9), (27, 0x14D049BB133111EB))
"""of each round the shift and the factor"""


class Wanted(NamedTuple):
    """Which statistics beyond m, s and x_y a call needs."""

    smooth: bool = False
    entropy: bool = False
    argmax: bool = False
    squares: bool = False
    ignored_rows: bool = False
    """Compute the statistics of IGNORED rows as well. When False their logits are never read
    and every statistic of such a row is written as 0."""

    @property
    def rows(self) -> tuple[str, ...]:
        """Names of the k rows that ``partials`` fills, in order."""
        return _rows(self.smooth, self.entropy, self.squares, self.argmax)


@cache
def _rows(smooth: bool, entropy: bool, squares: bool, argmax: bool) -> tuple[str, ...]:
    optional = {"u": smooth, "t": entropy, "q": squares, "argmax": argmax}
    return ("m", "s", "x_y", *(row for row, wanted in optional.items() if wanted))


class Coefficients(NamedTuple):
    """What multiplies the parts of a row's gradient: [N] each, in the arithmetic dtype."""

    softmax: Tensor
    target: Tensor
    smooth: Tensor | None = None
    entropy: Tensor | None = None

    def of(self, rows: slice) -> Coefficients:
        """Those of some rows."""
        softmax, target, smooth, entropy = self
        return Coefficients(
            softmax[rows],
            target[rows],
            None if smooth is None else smooth[rows],
            None if entropy is None else entropy[rows],
        )


class Gathered(NamedTuple):
    """The partials of W ranks, not yet merged, and the ranks' headers."""

    parts: Tensor
    """[W, k, N], rows named by ``Wanted.rows``; W = 1 where there is nothing left to merge"""
    shard_weight: Tensor | None
    """[W] sums of the ranks' class weights; read where W > 1 and ``smooth`` is wanted, else maybe
    None"""
    starts: Tensor | None
    """[W] int32: the vocabulary id of each rank's column 0; the same of ``argmax``"""
    headers: Tensor | None
    """[ranks, ints] int32, or None where one rank is alone"""

    @classmethod
    def of_one_rank(cls, parts: Tensor) -> Gathered:
        """[k, N] of the only rank. What is read for W > 1 alone is filled with any tensor."""
        return cls(parts[None], parts, parts, None)


NOTHING_FOUND = (-1, 0, -1, -1, -1, 0)
"""no bad row, target, class or scale, no row with a bad id among those selected, no such id"""


class HeaderLayout(NamedTuple):
    """Where a kernel finds the fields of a header; ``header.py`` fills it in."""

    ints: int
    static: int
    """ints that follow from the options alone; those after them hold int64 values"""
    compared: int
    """a bit for each int that all ranks must have the same"""
    start: int
    stop: int
    vocab_size: int
    flags: int
    implicit_bit: int
    """in the flags: the shard was not told but follows from the rank"""
    content: int
    """the checksum that tells whether ranks hold the same logits"""
    findings: int
    """what a rank found wrong with its own values: six int64 values, see ``NOTHING_FOUND``"""
    normalizer: int
    """an fp32 number, of which ranks may differ by ``tolerance``, relatively"""
    tolerance: float


class RowFunctions(Protocol):
    """An engine's own versions of the arithmetic on [N] vectors around its three functions.

    Plain torch takes about a hundred small calls for it. Each function gives the same numbers as
    the torch functions that it names.
    """

    ON_HOST: bool
    """True: they run on the host, where values may be read, and are ``HostRowFunctions``. False:
    they run on a device and never read a value on the host."""

    def locate(
        self, target: Tensor, start: int, stop: int, vocab_size: int, ignore_index: int
    ) -> tuple[Tensor, int]:
        """``targets.locate``: the local_target of ``target`` [N] int64, and a bad row.

        That is the first row whose target is no class; -1 where there is none, or on a device.
        """
        ...

    def sign(
        self,
        buffer: Tensor,
        static: Tensor,
        layout: HeaderLayout,
        target: Tensor,
        parts: Tensor,
        with_content: bool,
        shard_total: Tensor | float,
        weight_checksum: Tensor | int,
        normalizer: Tensor | None,
        scale_checksum: Tensor | None,
        selected_checksum: Tensor | None,
        size: int,
        ignore_index: int,
    ) -> Tensor | None:
        """``header.write_header`` of a rank without problems, and W_r behind it, into ``buffer``.

        ``buffer`` is int32 and begins with the header, whose first ``layout.static`` ints are
        ``static``. W_r is ``shard_total`` in the dtype of ``parts`` [k, N], the partials of a shard
        of ``size`` columns. There may be more targets than rows: those of a whole batch.
        ``with_content``: include the checksum of m and s. ``normalizer`` is 0-d, in that dtype;
        ``weight_checksum`` is 0 where there are no class weights.

        Returns None with ``ON_HOST``, else ``excuse``, a 0-d int32. It is 1 if equal partials on
        all ranks do not mean gathered logits here: every kept row is constant, or some target lies
        beyond the shard.
        """
        ...

    def conclude(
        self,
        gathered: Gathered,
        wanted: Wanted,
        target: Tensor,
        vocab_size: int,
        ignore_index: int,
        weight: Tensor | None,
        total_weight: Tensor | float,
        layout: HeaderLayout,
        excuse: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
        """``statistics.merge``, ``statistics.finish`` and ``verdict.disagreement`` in one.

        Returns (stats, m, s, argmax, row_weight). ``row_weight`` [N] is what a row weighs in a
        mean: the class ``weight`` of its target, or 1 without class weights; 0 for an ignored row;
        None leaves it to torch. ``excuse`` is what ``sign`` returned. With ``ON_HOST`` the headers
        have been checked before, and no target is wrong.
        """
        ...


class HostRowFunctions(RowFunctions, Protocol):
    """The row functions of an engine with ``ON_HOST``."""

    def agree(self, headers: Tensor, layout: HeaderLayout) -> bool:
        """True if ``headers`` [W, ints] certainly show no problem.

        That is the usual case: shards in rank order that tile the vocabulary, everything else
        equal, nothing found, no sign of gathered logits. After False,
        ``verdict.raise_on_problems`` decides and explains.
        """
        ...

    def weigh(self, weight: Tensor) -> tuple[int, int]:
        """For ``weight`` [vocab_size] in fp32 or fp64: the first class that is not finite, or -1;
        and the ``checksums.float_checksum``.
        """
        ...


class LinearFunctions(Protocol):
    """An engine's statistics and gradients from hidden states [N, H], without visible logits.

    They serve losses with label smoothing, class weights, z-loss and one scale. Calls with other
    options (a bias, a softcap, entropy, ...) go by chunks of logits, through the engine's three
    functions.
    """

    LEAST_IDS: int
    """A shard with fewer rows of the weight goes by chunks, whatever ``why_not`` said."""

    def why_not(self, dtype: torch.dtype, width: int, ids: int, scale: float) -> str | None:
        """Why they do not serve such calls; None if they do.

        All ranks must come to the same answer: ``ids`` is an even share of the vocabulary, and
        ``width`` is H.
        """
        ...

    def partials(
        self,
        hidden: Tensor,
        head_weight: Tensor,
        local_target: Tensor,
        class_weight: Tensor | None,
        scale: float,
        wanted: Wanted,
        out: Tensor,
    ) -> None:
        """``Engine.partials`` of hidden @ head_weight^T. Ignored rows may hold anything."""
        ...

    def gradients(
        self,
        hidden: Tensor,
        head_weight: Tensor,
        m: Tensor,
        s: Tensor,
        local_target: Tensor,
        coefficients: Coefficients,
        class_weight: Tensor | None,
        scale: float,
        one_coefficient: bool,
    ) -> tuple[Tensor, Tensor]:
        """This rank's share of the gradients of ``hidden`` and ``head_weight``, in their dtype.

        Of the logits' gradient dx that ``Engine.gradient`` would write: dx @ head_weight [N, H] and
        dx^T @ hidden [ids, H]. ``one_coefficient``: in every row, softmax and target's are the same
        number.
        """
        ...


class Engine(Protocol):
    """The three functions of an engine module. All run without autograd.

    ``logits`` is [N, C_r] with N, C_r >= 1, of dtype fp16, bf16, fp32 or fp64, any strides.
    ``weight`` is this shard's slice [C_r] of the class weights in the arithmetic dtype, or None.
    ``scale`` is a number, or [N] in the arithmetic dtype; ``softcap`` is 0 where there is none.
    No function allocates anything of size [N, C_r] or keeps a reference to its arguments.
    """

    ROW_FUNCTIONS: RowFunctions | None
    """None: plain torch does the arithmetic on [N] vectors"""

    LINEAR_FUNCTIONS: LinearFunctions | None
    """None: the fused head makes logits by matrix products, a chunk at a time"""

    LEAVES_LOG_PROB: bool
    """Whether ``partials`` can also write log-probabilities, into ``log_prob_out``, for free"""

    def unavailable(self) -> str | None:
        """Why this engine cannot run on this machine, in one line; None if it can."""
        ...

    def supports(self, logits: Tensor) -> bool:
        """Whether this engine can serve such logits (device and dtype)."""
        ...

    def partials(
        self,
        logits: Tensor,
        local_target: Tensor,
        weight: Tensor | None,
        scale: float | Tensor,
        softcap: float,
        wanted: Wanted,
        out: Tensor,
        log_prob_out: Tensor | None = None,
    ) -> None:
        """Fill ``out`` [k, N] (arithmetic dtype, rows contiguous) in one read of the logits.

        ``log_prob_out`` [N, C_r] in the logits' dtype is given where these logits are the whole
        vocabulary, the caller wants log_prob, and ``LEAVES_LOG_PROB``: then x - m - log s of all
        rows is left there as well, and ``log_prob`` not called.
        """
        ...

    def gradient(
        self,
        logits: Tensor,
        m: Tensor,
        s: Tensor,
        local_target: Tensor,
        coefficients: Coefficients,
        weight: Tensor | None,
        scale: float | Tensor,
        softcap: float,
        out: Tensor,
        finite_logits: bool = False,
    ) -> None:
        """Write dx [N, C_r] into ``out``, which may be ``logits`` itself, or narrower than they.

        Rows marked IGNORED, and rows whose coefficients are all 0, are written as zeros and their
        logits not read: 0 * NaN would be NaN. The value of the target's column is formed in the
        arithmetic dtype before it is rounded.

        ``finite_logits``: the caller promises that those rows hold no NaN and no +inf. An engine
        that has to write their zeros apart may then multiply by 0 instead; others ignore it.
        """
        ...

    def log_prob(
        self,
        logits: Tensor,
        m: Tensor,
        s: Tensor,
        scale: float | Tensor,
        softcap: float,
        out: Tensor,
    ) -> None:
        """Write x - m - log s [N, C_r] into ``out`` (the logits' dtype), ignored rows included."""
        ...


def without_unused(local_target: Tensor, coefficients: Coefficients) -> Tensor:
    """``local_target`` with rows whose coefficients are all 0 marked IGNORED as well."""
    first, *others = (part == 0 for part in coefficients if part is not None)
    for zero in others:
        first &= zero
    return local_target.masked_fill(first, IGNORED)


def arithmetic_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp64 for fp64 logits, fp32 for everything narrower."""
    return torch.float64 if dtype == torch.float64 else torch.float32
