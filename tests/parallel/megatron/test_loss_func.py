"""The loss functions under Megatron's own schedule, data-parallel wrapper and gradient finalizing.

What must come out is computed here from the whole batch in fp64, by what each version of Megatron
says it divides by: see ``parallel/megatron/loss_func.py``.
"""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from megatron.core import package_info
from torch import Tensor, nn

from vocab_parallel_ce.parallel.megatron import install, logits_loss_func, loss_func
from vocab_parallel_ce.parallel.megatron.on_cpu import CPU_CONFIG
from vocab_parallel_ce.testing import cross_entropy as reference

from ...ranks import Pool
from .cases import megatron

SUMS_BEFORE = (package_info.MAJOR, package_info.MINOR) < (0, 13)
MICRO_BATCHES, SEQUENCE, BATCH, WIDTH, VOCAB = 2, 5, 3, 8, 16
Z = 0.02


class Layout(NamedTuple):
    """How two ranks are used, and what the training asks for."""

    tp: int
    cp: int
    per_token: bool

    @property
    def parts(self) -> int:
        """Ranks that hold different tokens."""
        return 2 // self.tp


LAYOUTS = [
    Layout(tp, cp, per_token) for tp, cp in ((2, 1), (1, 1), (1, 2)) for per_token in (False, True)
]
IDS = [f"tp{x.tp} cp{x.cp}{' per token' if x.per_token else ''}" for x in LAYOUTS]


class Tokens(NamedTuple):
    hidden: Tensor
    """[s, b, width]"""
    labels: Tensor
    mask: Tensor
    """[b, s] as Megatron's data loaders make them"""
    hole: Tensor
    """[s, b, 1] added to the logits"""


def _tokens(part: int, number: int, weights: bool = False) -> Tokens:
    """Different ones for every rank that holds different tokens; some masked, more here than there.

    A masked token's label is one that only the mask leaves out. ``weights``: the others count
    fractions, and the first masked one has a good label and logits that are NaN.
    """
    g = torch.Generator().manual_seed(10 * part + number)
    mask = (torch.rand(BATCH, SEQUENCE, generator=g) > 0.2 + 0.4 * part).float()
    labels = torch.randint(0, VOCAB, (BATCH, SEQUENCE), generator=g)
    hidden = torch.randn(SEQUENCE, BATCH, WIDTH, generator=g)
    labels, hole = labels.masked_fill(mask == 0, -1), torch.zeros(BATCH, SEQUENCE)
    if weights:
        first = (mask == 0).view(-1).nonzero()[0]
        hole.view(-1)[first], labels.view(-1)[first] = torch.nan, 0
        mask = mask * torch.rand(BATCH, SEQUENCE, generator=g)
    return Tokens(hidden, labels, mask, hole.t()[..., None])


def _weight() -> Tensor:
    return torch.randn(VOCAB, WIDTH, generator=torch.Generator().manual_seed(5))


class _Head(nn.Module):
    """The end of a GPTModel: Megatron's own output layer and its loss."""

    def __init__(self, config: Any) -> None:
        from megatron.core.models.common.language_module.language_module import LanguageModule
        from megatron.core.tensor_parallel import ColumnParallelLinear

        super().__init__()
        self.config = config
        self.head = ColumnParallelLinear(
            WIDTH, VOCAB, config=config, init_method=nn.init.normal_, bias=False
        )
        self.language = LanguageModule(config)

    def set_input_tensor(self, tensor: object) -> None:
        """The schedule calls it; a first stage has no input."""

    def forward(self, hidden: Tensor, hole: Tensor, labels: Tensor | None = None) -> Tensor:
        logits, _ = self.head(hidden)
        logits = logits + hole
        if labels is None:
            out: Tensor = logits.transpose(0, 1).contiguous()
        else:
            out = self.language.compute_language_model_loss(labels, logits)
        return out


def _train(
    rank: dist.ProcessGroup,
    layout: Layout,
    labels_given: bool,
    z: float,
    weights: bool = False,
    over: bool = False,
) -> tuple[Tensor, list[dict[str, Any]]]:
    """One step of two micro-batches: this rank's gradient of the head, and the reports."""
    with (
        megatron(tp=layout.tp, cp=layout.cp) as group,
        # With the logits at hand a masked token's label is never looked at.
        install(
            lse_square_scale=z, invalid_target="ignore" if labels_given else "error"
        ) as installation,
    ):
        from megatron.core import distributed
        from megatron.core.enums import ModelType
        from megatron.core.pipeline_parallel import get_forward_backward_func
        from megatron.core.transformer.transformer_config import TransformerConfig

        config = TransformerConfig(
            num_layers=1,
            hidden_size=WIDTH,
            num_attention_heads=2,
            tensor_model_parallel_size=layout.tp,
            context_parallel_size=layout.cp,
            calculate_per_token_loss=layout.per_token,
            finalize_model_grads_func=distributed.finalize_model_grads,
            **CPU_CONFIG,
        )
        head = _Head(config)
        head.model_type = ModelType.encoder_or_decoder
        with torch.no_grad():
            head.head.weight.copy_(_weight().chunk(layout.tp)[dist.get_rank(group)])
        model = distributed.DistributedDataParallel(
            config, distributed.DistributedDataParallelConfig(), head
        )
        part = 0 if layout.tp == 2 else dist.get_rank()

        def forward_step(numbers: Any, model: Any) -> tuple[Tensor, Any]:
            batch = _tokens(part, next(numbers), weights)
            asked: dict[str, Any] = {"model": model, "over_context_parallel": over}
            if labels_given:
                out = model(batch.hidden, batch.hole, batch.labels)
                return out, partial(loss_func, batch.mask, **asked)
            bound = partial(logits_loss_func, batch.mask, batch.labels, **asked)
            return model(batch.hidden, batch.hole), bound

        model.zero_grad_buffer()
        reports = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=iter(range(MICRO_BATCHES)),
            model=[model],
            num_microbatches=MICRO_BATCHES,
            seq_length=SEQUENCE,
            micro_batch_size=BATCH,
            forward_only=False,
        )
        assert installation.calls == MICRO_BATCHES
        return head.head.weight.main_grad.clone(), reports


def _sums(
    weight: Tensor, part: int, number: int, z: float, weights: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Of one micro-batch on one rank: the loss, its z part, and how many tokens count; fp64."""
    batch = _tokens(part, number, weights)
    logits = (batch.hidden.double() @ weight.t()).transpose(0, 1)
    mask = batch.mask.double()
    labels = batch.labels.masked_fill(mask == 0, -100)
    out = reference(logits, labels, reduction="none", lse_square_scale=z)
    return (out.loss * mask).sum(), (out.zloss * mask).sum(), mask.sum()


def _check_a_step(
    pair: Pool,
    layout: Layout,
    labels_given: bool,
    z: float,
    weights: bool = False,
    over: bool = False,
) -> None:
    """One step under Megatron's schedule against what its version divides by."""
    weight = _weight().double().requires_grad_()
    sums = {
        (part, number): _sums(weight, part, number, z, weights)
        for part in range(layout.parts)
        for number in range(MICRO_BATCHES)
    }

    def total(index: int, **only: int) -> Tensor:
        keys = [(p, n) for p, n in sums if only.get("part", p) == p and only.get("number", n) == n]
        return torch.stack([sums[key][index] for key in keys]).sum()

    numbers = range(MICRO_BATCHES)
    if layout.per_token:
        objective = total(0) / total(2)
    elif (SUMS_BEFORE or over) and layout.cp > 1:
        means = [total(0, number=n) / total(2, number=n) for n in numbers]
        objective = torch.stack(means).mean()
    else:
        objective = torch.stack([loss / count for loss, _, count in sums.values()]).mean()
    (want,) = torch.autograd.grad(objective, weight)

    ranks = pair.run(_train, 2, (layout, labels_given, z, weights, over))
    whole = torch.cat([grad for grad, _ in ranks]) if layout.tp == 2 else ranks[0][0]
    assert (whole - want).abs().max() / want.abs().max() < 1e-6
    for rank, (_, reports) in enumerate(ranks):
        part = 0 if layout.tp == 2 else rank
        for number, report in enumerate(reports):
            assert list(report) == (["lm loss", "z loss"] if z else ["lm loss"])
            # Before 0.13 the report is summed already, as its training loop expects.
            only = {"number": number} if SUMS_BEFORE else {"number": number, "part": part}
            for name, index in zip(report, (0, 1), strict=False):
                value, count = report[name]
                assert isinstance(report[name], tuple if SUMS_BEFORE else Tensor)
                assert value.item() == pytest.approx(total(index, **only).item(), rel=1e-6)
                assert count.item() == pytest.approx(total(2, **only).item(), rel=1e-6)


@pytest.mark.parametrize("z", [0.0, Z], ids=["", "z-loss"])
@pytest.mark.parametrize("labels_given", [True, False], ids=["labels", "logits"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=IDS)
def test_a_step_divides_as_megatron_does(
    pair: Pool, layout: Layout, labels_given: bool, z: float
) -> None:
    _check_a_step(pair, layout, labels_given, z)


@pytest.mark.parametrize("labels_given", [True, False], ids=["labels", "logits"])
@pytest.mark.parametrize(
    "layout", [x for x in LAYOUTS if not x.per_token], ids=lambda x: f"tp{x.tp} cp{x.cp}"
)
def test_weights_in_the_mask_give_the_weighted_mean(
    pair: Pool, layout: Layout, labels_given: bool
) -> None:
    """And not what is left of it where the sum of the weights is cut to an int."""
    _check_a_step(pair, layout, labels_given, Z, weights=True)


@pytest.mark.parametrize("weights", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS, ids=IDS)
def test_a_mean_over_context_parallel_ranks(pair: Pool, layout: Layout, weights: bool) -> None:
    """Where their masks are unequal, too: what one rank that holds the whole sequences would do."""
    if not (layout.per_token and weights):
        _check_a_step(pair, layout, True, 0.0, weights, over=True)


def _refused(rank: dist.ProcessGroup, layout: Layout) -> str:
    try:
        _train(rank, layout, True, 0.0, weights=True)
    except ValueError as problem:
        return str(problem)
    return ""


@pytest.mark.parametrize("layout", [x for x in LAYOUTS if x.per_token], ids=lambda x: f"cp{x.cp}")
def test_weights_cannot_be_counted_per_token(pair: Pool, layout: Layout) -> None:
    for message in pair.run(_refused, 2, (layout,)):
        assert "on this rank, which is no int: with calculate_per_token_loss Megatron" in message


def _refused_together(rank: dist.ProcessGroup) -> tuple[str, str]:
    """Of two data-parallel ranks, one with a fraction in its mask; and then none."""
    mask = torch.tensor([[1.0, 0.5 if dist.get_rank() == 1 else 1.0]])
    told = []
    with megatron(tp=1), install(check=True):
        for some in (mask, mask.ceil()):
            try:
                loss_func(some, torch.ones(1, 2), _Configured(True))
                told.append("")
            except ValueError as problem:
                told.append(str(problem))
    return told[0], told[1]


def test_with_check_every_data_parallel_rank_refuses(pair: Pool) -> None:
    other, own = pair.run(_refused_together, 2)
    assert own[0].startswith("loss_mask adds up to 1.5 on this rank, which is no int")
    assert other == ("rank 1: " + own[0], "")
    assert own[1] == ""


class _Configured:
    """As much of a wrapped model as says how the schedule divides."""

    def __init__(self, per_token: bool) -> None:
        self.module = SimpleNamespace(config=SimpleNamespace(calculate_per_token_loss=per_token))


def test_weights_need_to_know_how_the_schedule_divides() -> None:
    losses, mask = torch.rand(2, 2), torch.tensor([[0.5, 0.25], [0.0, 1.0]])
    with pytest.raises(ValueError, match=r"adds up to 1.75 on this rank, .*; pass model= to the"):
        loss_func(mask, losses)
    with pytest.raises(ValueError, match=r"adds up to 1.75 .* turn it off, or use a mask of ints"):
        loss_func(mask, losses, _Configured(True))
    total, tokens, report = loss_func(mask, losses, _Configured(False))
    assert tokens.dtype == torch.int32
    assert (total / tokens).item() == pytest.approx(((losses * mask).sum() / 1.75).item())
    assert report["lm loss"][1] == 1.75


def test_nothing_counts() -> None:
    """The sum is 0 and so is the gradient, even of a NaN."""
    losses = torch.full((2, 2), torch.nan, requires_grad=True)
    total, tokens, report = loss_func(torch.zeros(2, 2), losses)
    total.backward()
    assert total == tokens == 0
    assert report["lm loss"].tolist() == [0, 0]
    assert losses.grad is not None
    assert bool((losses.grad == 0).all())


def test_without_megatrons_groups() -> None:
    """The plain sums, also with weights in the mask; the number of tokens is an int."""
    losses = torch.rand(2, 4, dtype=torch.float64).requires_grad_()
    mask = torch.tensor([[1.0, 0.0, 0.5, 1.0], [1.0, 1.5, 1.0, 0.0]])
    total, tokens, report = loss_func(mask, losses)
    assert tokens.dtype == torch.int32
    assert tokens.item() == 6
    assert total.dtype == torch.float64
    assert torch.equal(report["lm loss"], torch.stack([total.detach(), tokens.double()]))
    total.backward()
    assert losses.grad is not None
    assert torch.equal(losses.grad, mask.double())


def test_masked_logits_are_never_read() -> None:
    """Whatever they hold, and whatever their label: gradient exactly 0."""
    logits, labels = torch.randn(2, 3, 8), torch.tensor([[1, 2, 3], [4, 77, -1]])
    logits[1, 1:] = torch.nan
    mask = torch.tensor([[1.0, 1.0, 0.5], [1.0, 0.0, 0.0]])
    leaf = logits.clone().requires_grad_()
    total, tokens, _ = logits_loss_func(mask, labels, leaf, _Configured(False))
    total.backward()
    kept = labels.masked_fill(mask == 0, -100)
    want = (reference(logits, kept, reduction="none").loss * mask).sum() / mask.sum()
    assert (total / tokens).item() == pytest.approx(want.item(), rel=1e-6)
    assert tokens == 4
    assert leaf.grad is not None
    assert bool((leaf.grad[mask == 0] == 0).all())
    assert bool((leaf.grad[mask != 0] != 0).all())


def test_a_nan_that_counts_is_not_hidden() -> None:
    losses = torch.tensor([[1.0, torch.nan]])
    assert bool(loss_func(torch.tensor([[1.0, 1.0]]), losses)[0].isnan())


def test_the_z_loss_of_another_batch_is_refused() -> None:
    from vocab_parallel_ce.parallel.megatron.installation import installed_loss

    with install(lse_square_scale=Z):
        installed_loss(torch.randn(5, 3, 8), torch.zeros(5, 3, dtype=torch.int64))
        with pytest.raises(ValueError, match=r"shape \(2, 5\).*\(5, 3\).*another batch"):
            loss_func(torch.ones(2, 5), torch.ones(2, 5))


def test_z_loss_meets_the_mask_token_by_token() -> None:
    """[s, b] of the loss against [b, s] of the mask, where the two sizes are equal as well."""
    from vocab_parallel_ce.parallel.megatron.installation import installed_loss

    logits, labels = torch.randn(3, 3, 8), torch.zeros(3, 3, dtype=torch.int64)
    mask = torch.tensor([[1.0, 1.0, 1.0], [0.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    with install(lse_square_scale=Z):
        loss, zloss = installed_loss(logits, labels)
        _, _, report = loss_func(mask, loss.t().contiguous())
    assert zloss is not None
    assert report["z loss"][0].item() == pytest.approx(zloss[:, 0].sum().item(), rel=1e-6)
