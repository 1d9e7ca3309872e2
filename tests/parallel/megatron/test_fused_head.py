"""A real GPTModel of megatron-core whose head and loss are one: its loss and every gradient."""

from __future__ import annotations

import copy
import inspect
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from vocab_parallel_ce import linear_cross_entropy
from vocab_parallel_ce.parallel.megatron import fuse_head, fused_head_loss, output_processor
from vocab_parallel_ce.parallel.megatron import fused_head as fused_head

from ...ranks import Pool
from .cases import megatron
from .steps import BATCH, SEQUENCE, VOCAB, Run, new_model, reference_of, run_case, worst_of


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("sequence_parallel", [False, True], ids=["", "sp"])
def test_the_fused_head_equals_one_rank(pair: Pool, tied: bool, sequence_parallel: bool) -> None:
    want = reference_of(pair, tied)
    run = Run(tp=2, ours=True, tied=tied, sequence_parallel=sequence_parallel, fused=True)
    for step in pair.run(run_case, 2, (run,)):
        assert step.loss == pytest.approx(want.loss, rel=2e-7)
        assert step.gradients.keys() == want.gradients.keys()
        assert worst_of(step, want) < 1e-6
        assert step.calls == 2


@pytest.mark.parametrize(("tied", "sequence_parallel"), [(False, False), (True, True)])
def test_output_processor_in_a_model(pair: Pool, tied: bool, sequence_parallel: bool) -> None:
    from megatron.core.models.gpt import GPTModel

    if "output_processor" not in inspect.signature(GPTModel.forward).parameters:
        pytest.skip("this megatron-core has no slot for it: from 0.18 on")
    want = reference_of(pair, tied)
    run = Run(tp=2, ours=True, tied=tied, sequence_parallel=sequence_parallel, processed=True)
    for step in pair.run(run_case, 2, (run,)):
        assert step.loss == pytest.approx(want.loss, rel=2e-7)
        assert step.gradients.keys() == want.gradients.keys()
        assert worst_of(step, want) < 1e-6


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
            pair.run(run_case, 2, (run,))
        run = run._replace(fused=False, processed=True)
    theirs = pair.run(run_case, 2, (Run(tied=tied, mtp=True),))[0]
    for step in pair.run(run_case, 2, (run,)):
        assert step.loss == pytest.approx(theirs.loss, rel=2e-7)
        assert any("mtp" in name for name in step.gradients)
        assert step.gradients.keys() == theirs.gradients.keys()
        assert worst_of(step, theirs) < 1e-6
        assert run.processed or step.calls == 4


def test_the_fused_head_on_pipeline_stages(pair: Pool) -> None:
    theirs = pair.run(run_case, 2, (Run(pp=2, tied=True),))
    stages = pair.run(run_case, 2, (Run(pp=2, ours=True, tied=True, fused=True),))
    for step, want in zip(stages, theirs, strict=True):
        assert worst_of(step, want) < 1e-6


def _processed(group: dist.ProcessGroup) -> None:
    """What 0.18's GPTModel would call, by the keywords that it passes."""
    with megatron(tp=2):
        model = new_model(Run(tp=2))
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
        layer = new_model(Run(tp=2)).output_layer
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
        model = new_model(Run(tp=2))
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
        assert "forward" not in vars(model)
        model.forward = somebodys = mock.Mock(wraps=model.forward)
        somebodys.__signature__ = inspect.signature(type(model).forward)
        fuse_head(model).undo()
        assert model.forward is somebodys
        with pytest.raises(ValueError, match="parallel_output=True"):
            fuse_head(new_model(Run(tp=2, gathered=True)))
        with pytest.raises(TypeError, match="must be a GPTModel"):
            fuse_head(torch.nn.Linear(2, 2))


def test_a_head_is_fused_and_taken_back(pair: Pool) -> None:
    pair.run(_fused_and_back, 2)


def _copied(group: dist.ProcessGroup) -> None:
    from megatron.core import parallel_state

    with megatron(tp=2):
        model = new_model(Run(tp=2))
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
