"""A real GPTModel of megatron-core: its loss and every gradient, with Megatron's losses and ours.

One rank with Megatron's unfused loss is what all others are measured against: it computes right.
"""

from __future__ import annotations

import copy
import inspect
from functools import partial
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from vocab_parallel_ce import linear_cross_entropy
from vocab_parallel_ce.parallel.megatron import (
    fuse_head,
    fused_head_loss,
    install,
    logits_loss_func,
    loss_func,
    output_processor,
)
from vocab_parallel_ce.parallel.megatron import fused_head as fused_head
from vocab_parallel_ce.parallel.megatron.on_cpu import CPU_CONFIG

from ...ranks import Pool
from .cases import error, megatron

VOCAB, SEQUENCE, BATCH = 128, 16, 2


class Run(NamedTuple):
    """One training step: how it is split, by whose loss, in how many micro-batches."""

    tp: int = 1
    pp: int = 1
    loss: str = "unfused"
    ours: bool = False
    labels_given: bool = True
    sequence_parallel: bool = False
    tied: bool = False
    inplace: bool = False
    gathered: bool = False
    vocab_size: int | None = None
    fused: bool = False
    processed: bool = False
    """by ``output_processor``, from megatron-core 0.18 on"""
    mtp: bool = False
    """a layer that predicts one more token, with a loss of its own"""


class Step(NamedTuple):
    """What a step gave: the mean loss, and the whole gradient of each parameter of this stage."""

    loss: float
    gradients: dict[str, Tensor]
    calls: int


def _model(run: Run) -> Any:
    from megatron.core import parallel_state
    from megatron.core.distributed import finalize_model_grads
    from megatron.core.enums import ModelType
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer.transformer_config import TransformerConfig

    config = TransformerConfig(
        num_layers=2,
        hidden_size=32,
        num_attention_heads=4,
        tensor_model_parallel_size=run.tp,
        pipeline_model_parallel_size=run.pp,
        sequence_parallel=run.sequence_parallel,
        cross_entropy_loss_fusion=run.loss != "unfused",
        cross_entropy_fusion_impl="te" if run.loss == "te" else "native",
        finalize_model_grads_func=finalize_model_grads,
        params_dtype=torch.float32,
        pipeline_dtype=torch.float32,
        **({"mtp_num_layers": 1, "mtp_loss_scaling_factor": 0.1} if run.mtp else {}),
        **CPU_CONFIG,
    )
    spec, further = get_gpt_layer_local_spec(), {}
    if run.mtp:
        from megatron.core.models.gpt.gpt_layer_specs import get_gpt_mtp_block_spec

        further["mtp_block_spec"] = get_gpt_mtp_block_spec(config, spec, False)
    torch.manual_seed(1234)
    model = GPTModel(
        config,
        spec,
        vocab_size=VOCAB,
        max_sequence_length=SEQUENCE,
        share_embeddings_and_output_weights=run.tied,
        parallel_output=not run.gathered,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        **further,
    )
    model.model_type = ModelType.encoder_or_decoder
    return model


def _own_loss_func(mask: Tensor, losses: Tensor, model: object = None) -> tuple[Any, ...]:
    """What a user's loss function for Megatron's losses does: sum, count, report."""
    total, count = (losses.reshape(-1) * mask.reshape(-1)).sum(), mask.sum().int()
    return total, count, {"lm loss": (total.detach().clone(), count)}  # the schedule divides it


def _step(run: Run) -> Step:
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.pipeline_parallel import get_forward_backward_func

    model = DistributedDataParallel(
        (inner := _model(run)).config, DistributedDataParallelConfig(), inner
    )
    model.zero_grad_buffer()
    if run.fused:
        fuse_head(model)

    def forward_step(numbers: Any, model: Any) -> tuple[Tensor, Any]:
        g = torch.Generator().manual_seed(next(numbers))
        ids = torch.randint(0, VOCAB, (BATCH, SEQUENCE + 1), generator=g)
        mask = (torch.rand(BATCH, SEQUENCE, generator=g) > 0.2).float()
        labels = ids[:, 1:].contiguous()
        future = torch.triu(torch.ones(1, 1, SEQUENCE, SEQUENCE), 1).bool()
        inputs = (ids[:, :-1].contiguous(), torch.arange(SEQUENCE).repeat(BATCH, 1), future)
        if run.labels_given:
            slot = {"output_processor": output_processor} if run.processed else {}
            losses = model(*inputs, labels=labels, **slot)
            return losses, partial(loss_func if run.ours else _own_loss_func, mask)
        return model(*inputs), partial(logits_loss_func, mask, labels)

    reports = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iter(range(2)),
        model=[model],
        num_microbatches=2,
        seq_length=SEQUENCE,
        micro_batch_size=BATCH,
        forward_only=False,
    )
    sums = [tuple(float(number) for number in report["lm loss"]) for report in reports]
    mean = sum(total for total, _ in sums) / max(sum(count for _, count in sums), 1.0)
    gradients = {name: _whole(parameter, run.tp) for name, parameter in inner.named_parameters()}
    return Step(mean, gradients, 0)


def _whole(parameter: Any, tp: int) -> Tensor:
    gradient: Tensor = parameter.main_grad.clone()
    if tp == 1 or not getattr(parameter, "tensor_model_parallel", False):
        return gradient
    parts = [torch.empty_like(gradient) for _ in range(tp)]
    dist.all_gather(parts, gradient)
    return torch.cat(parts, parameter.partition_dim)


def _case(rank: dist.ProcessGroup, run: Run) -> Step:
    with megatron(tp=run.tp, pp=run.pp):
        if not run.ours:
            return _step(run)
        with install(inplace_backward=run.inplace, vocab_size=run.vocab_size) as installation:
            return _step(run)._replace(calls=installation.calls)


_references: dict[bool, Step] = {}


def _reference(pair: Pool, tied: bool) -> Step:
    if tied not in _references:
        _references[tied] = pair.run(_case, 2, (Run(tied=tied),))[0]
    return _references[tied]


def _worst(step: Step, want: Step) -> float:
    """The largest error of a gradient."""
    return max(error(got, want.gradients[name]) for name, got in step.gradients.items())


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("sequence_parallel", [False, True], ids=["", "sp"])
@pytest.mark.parametrize("ours", [False, True], ids=["theirs", "ours"])
def test_two_tensor_parallel_ranks_equal_one(
    pair: Pool, tied: bool, sequence_parallel: bool, ours: bool
) -> None:
    want = _reference(pair, tied)
    run = Run(tp=2, ours=ours, tied=tied, sequence_parallel=sequence_parallel)
    for step in pair.run(_case, 2, (run,)):
        assert step.loss == pytest.approx(want.loss, rel=2e-7)
        assert step.gradients.keys() == want.gradients.keys()
        assert _worst(step, want) < 1e-6
        assert step.calls == (2 if ours else 0)


@pytest.mark.parametrize("inplace", [False, True], ids=["", "in place"])
@pytest.mark.parametrize("loss", ["unfused", "fused", "te"])
@pytest.mark.parametrize("tp", [1, 2])
def test_ours_serves_whatever_loss_the_model_asks_for(
    pair: Pool, tp: int, loss: str, inplace: bool
) -> None:
    """ "te" without TransformerEngine, which Megatron itself refuses."""
    want = _reference(pair, False)
    for step in pair.run(_case, 2, (Run(tp=tp, loss=loss, ours=True, inplace=inplace),)):
        assert step.loss == pytest.approx(want.loss, rel=2e-7)
        assert _worst(step, want) < 1e-6
        assert step.calls == 2


def test_the_fused_loss_of_megatron_costs_three_digits_of_every_gradient(pair: Pool) -> None:
    want = _reference(pair, False)
    for step in pair.run(_case, 2, (Run(tp=2, loss="fused"),)):
        assert step.loss == pytest.approx(want.loss, rel=2e-7)
        assert 1e-3 < _worst(step, want) < 1e-2


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_pipeline_stages(pair: Pool, tied: bool) -> None:
    """Against Megatron's own on the same two stages, which draw other weights than one would."""
    theirs = pair.run(_case, 2, (Run(pp=2, tied=tied),))
    for labels_given in (True, False):
        run = Run(pp=2, ours=True, tied=tied, labels_given=labels_given)
        stages = pair.run(_case, 2, (run,))
        assert [step.calls for step in stages] == [0, 2]
        assert stages[1].loss == pytest.approx(theirs[1].loss, rel=2e-7)
        for step, want in zip(stages, theirs, strict=True):
            assert _worst(step, want) < 1e-6


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("sequence_parallel", [False, True], ids=["", "sp"])
def test_the_fused_head_equals_one_rank(pair: Pool, tied: bool, sequence_parallel: bool) -> None:
    want = _reference(pair, tied)
    run = Run(tp=2, ours=True, tied=tied, sequence_parallel=sequence_parallel, fused=True)
    for step in pair.run(_case, 2, (run,)):
        assert step.loss == pytest.approx(want.loss, rel=2e-7)
        assert step.gradients.keys() == want.gradients.keys()
        assert _worst(step, want) < 1e-6
        assert step.calls == 2


@pytest.mark.parametrize(("tied", "sequence_parallel"), [(False, False), (True, True)])
def test_output_processor_in_a_model(pair: Pool, tied: bool, sequence_parallel: bool) -> None:
    from megatron.core.models.gpt import GPTModel

    if "output_processor" not in inspect.signature(GPTModel.forward).parameters:
        pytest.skip("this megatron-core has no slot for it: from 0.18 on")
    want = _reference(pair, tied)
    run = Run(tp=2, ours=True, tied=tied, sequence_parallel=sequence_parallel, processed=True)
    for step in pair.run(_case, 2, (run,)):
        assert step.loss == pytest.approx(want.loss, rel=2e-7)
        assert step.gradients.keys() == want.gradients.keys()
        assert _worst(step, want) < 1e-6


@pytest.mark.parametrize(("tied", "sequence_parallel"), [(False, False), (True, True)])
def test_the_fused_head_of_a_model_with_mtp(
    pair: Pool, tied: bool, sequence_parallel: bool
) -> None:
    """Its head is called twice a micro-batch, and each time makes no logits."""
    from megatron.core import package_info

    if package_info.__shortversion__.startswith("0.12."):
        pytest.skip("gradients of a model with MTP depend on tp there, with its own loss too")
    from megatron.core.transformer import multi_token_prediction

    run = Run(tp=2, ours=True, tied=tied, mtp=True, sequence_parallel=sequence_parallel, fused=True)
    if hasattr(multi_token_prediction, "_compute_mtp_acceptance_counts"):  # 0.19
        with pytest.raises(AssertionError, match="reads the logits of MTP layers in training"):
            pair.run(_case, 2, (run,))
        run = run._replace(fused=False, processed=True)
    theirs = pair.run(_case, 2, (Run(tied=tied, mtp=True),))[0]
    for step in pair.run(_case, 2, (run,)):
        assert step.loss == pytest.approx(theirs.loss, rel=2e-7)
        assert any("mtp" in name for name in step.gradients)
        assert step.gradients.keys() == theirs.gradients.keys()
        assert _worst(step, theirs) < 1e-6
        assert run.processed or step.calls == 4


def test_the_fused_head_on_pipeline_stages(pair: Pool) -> None:
    theirs = pair.run(_case, 2, (Run(pp=2, tied=True),))
    stages = pair.run(_case, 2, (Run(pp=2, ours=True, tied=True, fused=True),))
    for step, want in zip(stages, theirs, strict=True):
        assert _worst(step, want) < 1e-6


def _processed(group: dist.ProcessGroup) -> None:
    """What 0.18's GPTModel would call, by the keywords that it passes."""
    with megatron(tp=2):
        model = _model(Run(tp=2))
        hidden = torch.randn(SEQUENCE, BATCH, 32, requires_grad=True)
        dist.broadcast(hidden.data, 0)
        labels = torch.arange(BATCH * SEQUENCE).view(BATCH, SEQUENCE) % VOCAB
        logits, _ = model.output_layer(hidden)
        want = model.compute_language_model_loss(labels, logits * 0.5)
        leaves = (hidden, model.output_layer.weight)
        wanted = torch.autograd.grad(want.sum(), leaves)
        given: dict[str, Any] = {
            "hidden_states": hidden, "output_layer": model.output_layer, "output_weight": None,
            "loss_mask": None, "input_ids": None, "context": None, "config": model.config,
            "scale_logits": lambda logits: logits * 0.5,
            "compute_language_model_loss": model.compute_language_model_loss,
        }  # fmt: skip
        got = output_processor(labels=labels, **given)
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(torch.autograd.grad(got.sum(), leaves), wanted)
        made = output_processor(labels=None, **given)
        torch.testing.assert_close(made, (logits * 0.5).transpose(0, 1))


def test_output_processor(pair: Pool) -> None:
    pair.run(_processed, 2)


def _main_grad(group: dist.ProcessGroup) -> None:
    """Where Megatron's kernel would add the gradient of the weight to main_grad."""
    with megatron(tp=2):
        layer = _model(Run(tp=2)).output_layer
        hidden = torch.randn(SEQUENCE, BATCH, 32)
        dist.broadcast(hidden, 0)
        labels = torch.arange(BATCH * SEQUENCE).view(BATCH, SEQUENCE) % VOCAB
        (want,) = torch.autograd.grad(fused_head_loss(hidden, labels, layer).sum(), layer.weight)
        layer.gradient_accumulation_fusion = True
        layer.weight.main_grad = torch.ones_like(layer.weight)
        layer.weight.grad_added_to_main_grad = False
        fused_head_loss(hidden, labels, layer).sum().backward()
        assert layer.weight.grad_added_to_main_grad
        assert layer.weight.grad is not None  # holds nothing, but hooks fire
        torch.testing.assert_close(layer.weight.main_grad, want + 1)


def test_main_grad_is_added_to(pair: Pool) -> None:
    pair.run(_main_grad, 2)


def _fused_and_back(group: dist.ProcessGroup) -> None:
    with megatron(tp=2):
        model = _model(Run(tp=2))
        ids = torch.arange(SEQUENCE)[None] % VOCAB
        future = torch.triu(torch.ones(1, 1, SEQUENCE, SEQUENCE), 1).bool()
        inputs = (ids, torch.arange(SEQUENCE)[None], future)
        logits, losses = model(*inputs), model(*inputs, labels=ids)
        with fuse_head(model):
            usual = linear_cross_entropy
            with mock.patch.object(fused_head, "linear_cross_entropy", wraps=usual) as called:
                assert torch.equal(model(*inputs), logits)
                assert called.call_count == 0
                torch.testing.assert_close(model(*inputs, labels=ids), losses)
                assert called.call_count == 1
            with pytest.raises(ValueError, match="fused already"):
                fuse_head(model)
        assert torch.equal(model(*inputs, labels=ids), losses)
        with pytest.raises(ValueError, match="parallel_output=True"):
            fuse_head(_model(Run(tp=2, gathered=True)))
        with pytest.raises(TypeError, match="must be a GPTModel"):
            fuse_head(torch.nn.Linear(2, 2))


def test_a_head_is_fused_and_taken_back(pair: Pool) -> None:
    pair.run(_fused_and_back, 2)


def _copied(group: dist.ProcessGroup) -> None:
    from megatron.core import parallel_state

    with megatron(tp=2):
        model = _model(Run(tp=2))
        inputs = (ids := torch.arange(SEQUENCE)[None] % VOCAB, ids, None)
        with fuse_head(model):
            losses = model(*inputs, labels=ids)
            groups = [g for g in vars(parallel_state).values() if isinstance(g, dist.ProcessGroup)]
            copied = copy.deepcopy(model, {id(g): g for g in groups})  # they cannot be copied
            with torch.no_grad():
                model.output_layer.weight.zero_()
            assert torch.equal(copied(*inputs, labels=ids), losses)
            copied(*inputs, labels=ids).sum().backward()
            assert copied.output_layer.weight.grad is not None
            assert model.output_layer.weight.grad is None


def test_a_copy_of_a_fused_model_is_on_its_own(pair: Pool) -> None:
    pair.run(_copied, 2)


def test_a_model_without_labels_hands_out_its_shard(pair: Pool) -> None:
    want = _reference(pair, False)
    for step in pair.run(_case, 2, (Run(tp=2, ours=True, labels_given=False),)):
        assert step.loss == pytest.approx(want.loss, rel=2e-7)
        assert _worst(step, want) < 1e-6


def test_parallel_output_false_is_an_error(pair: Pool) -> None:
    """At the first step of a new model, whose logits are all nearly equal."""
    run = Run(tp=2, gathered=True, vocab_size=VOCAB)
    want = _reference(pair, False)
    for step in pair.run(_case, 2, (run,)):  # Megatron's own: the loss + log(2)
        assert step.loss == pytest.approx(want.loss + 0.6931472, rel=1e-6)
        assert _worst(step, want) > 0.5
    for outcome in pair.outcomes(_case, 2, (run._replace(ours=True),)):
        assert outcome.kind == "ValueError"
        assert "looks gathered" in outcome.error


def test_without_the_vocabulary_parallel_output_false_is_as_in_megatron(pair: Pool) -> None:
    """It is a warning then: see test_gathered.py."""
    run = Run(tp=2, gathered=True, vocab_size=None)
    theirs = pair.run(_case, 2, (run,))
    for step, same in zip(pair.run(_case, 2, (run._replace(ours=True),)), theirs, strict=True):
        assert step.loss == pytest.approx(same.loss, rel=1e-6)


def _naive_patch(rank: dist.ProcessGroup, loss: str) -> tuple[int, int]:
    """Calls that reach a function assigned where Megatron defines its loss; and ours."""
    with megatron(tp=2):
        from megatron.core.fusions import fused_cross_entropy
        from megatron.core.tensor_parallel import cross_entropy

        module = cross_entropy if loss == "unfused" else fused_cross_entropy
        name = f"{'' if loss == 'unfused' else 'fused_'}vocab_parallel_cross_entropy"
        original, calls = getattr(module, name), 0

        def counted(*args: Any) -> Any:
            nonlocal calls
            calls += 1
            return original(*args)

        setattr(module, name, counted)
        try:
            _step(Run(tp=2, loss=loss))
            with install() as installation:
                _step(Run(tp=2, loss=loss))
            assert getattr(module, name) is counted
        finally:
            setattr(module, name, original)
        return calls, installation.calls


@pytest.mark.parametrize("loss", ["unfused", "fused"])
def test_assigning_the_defining_module_reaches_no_model(pair: Pool, loss: str) -> None:
    """As a well-known kernel library does: Megatron looks its losses up in copies of the names."""
    assert pair.run(_naive_patch, 2, (loss,)) == [(0, 2)] * 2
