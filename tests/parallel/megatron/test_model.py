"""A real GPTModel of megatron-core: its loss and every gradient, by Megatron's losses and ours."""

from __future__ import annotations

from typing import Any

import pytest
import torch.distributed as dist

from vocab_parallel_ce.parallel.megatron import install

from ...ranks import Pool
from .cases import megatron
from .steps import VOCAB, Run, reference_of, run_case, step_of, worst_of


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("sequence_parallel", [False, True], ids=["", "sp"])
@pytest.mark.parametrize("ours", [False, True], ids=["theirs", "ours"])
def test_two_tensor_parallel_ranks_equal_one(
    pair: Pool, tied: bool, sequence_parallel: bool, ours: bool
) -> None:
    want = reference_of(pair, tied)
    run = Run(tp=2, ours=ours, tied=tied, sequence_parallel=sequence_parallel)
    for step in pair.run(run_case, 2, (run,)):
        assert step.loss == pytest.approx(want.loss, rel=2e-7)
        assert step.gradients.keys() == want.gradients.keys()
        assert worst_of(step, want) < 1e-6
        assert step.calls == (2 if ours else 0)


@pytest.mark.parametrize("inplace", [False, True], ids=["", "in place"])
@pytest.mark.parametrize("loss", ["unfused", "fused", "te"])
@pytest.mark.parametrize("tp", [1, 2])
def test_ours_serves_whatever_loss_the_model_asks_for(
    pair: Pool, tp: int, loss: str, inplace: bool
) -> None:
    """ "te" without TransformerEngine, which Megatron itself refuses."""
    want = reference_of(pair, False)
    for step in pair.run(run_case, 2, (Run(tp=tp, loss=loss, ours=True, inplace=inplace),)):
        assert step.loss == pytest.approx(want.loss, rel=2e-7)
        assert worst_of(step, want) < 1e-6
        assert step.calls == 2


def test_the_fused_loss_of_megatron_costs_three_digits_of_every_gradient(pair: Pool) -> None:
    want = reference_of(pair, False)
    for step in pair.run(run_case, 2, (Run(tp=2, loss="fused"),)):
        assert step.loss == pytest.approx(want.loss, rel=2e-7)
        assert 1e-3 < worst_of(step, want) < 1e-2


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_pipeline_stages(pair: Pool, tied: bool) -> None:
    """Against Megatron's own on the same two stages, which draw other weights than one would."""
    theirs = pair.run(run_case, 2, (Run(pp=2, tied=tied),))
    for labels_given in (True, False):
        run = Run(pp=2, ours=True, tied=tied, labels_given=labels_given)
        stages = pair.run(run_case, 2, (run,))
        assert [step.calls for step in stages] == [0, 2]
        assert stages[1].loss == pytest.approx(theirs[1].loss, rel=2e-7)
        for step, want in zip(stages, theirs, strict=True):
            assert worst_of(step, want) < 1e-6


def test_a_model_without_labels_hands_out_its_shard(pair: Pool) -> None:
    want = reference_of(pair, False)
    for step in pair.run(run_case, 2, (Run(tp=2, ours=True, labels_given=False),)):
        assert step.loss == pytest.approx(want.loss, rel=2e-7)
        assert worst_of(step, want) < 1e-6


def test_parallel_output_false_is_an_error(pair: Pool) -> None:
    """At the first step of a new model, whose logits are all nearly equal."""
    run = Run(tp=2, gathered=True, vocab_size=VOCAB)
    want = reference_of(pair, False)
    for step in pair.run(run_case, 2, (run,)):  # Megatron's own: the loss + log(2)
        assert step.loss == pytest.approx(want.loss + 0.6931472, rel=1e-6)
        assert worst_of(step, want) > 0.5
    for outcome in pair.outcomes(run_case, 2, (run._replace(ours=True),)):
        assert outcome.kind == "ValueError"
        assert "looks gathered" in outcome.error


def test_without_the_vocabulary_parallel_output_false_is_as_in_megatron(pair: Pool) -> None:
    """It is a warning then: see test_gathered.py."""
    run = Run(tp=2, gathered=True, vocab_size=None)
    theirs = pair.run(run_case, 2, (run,))
    for step, same in zip(pair.run(run_case, 2, (run._replace(ours=True),)), theirs, strict=True):
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
            step_of(Run(tp=2, loss=loss))
            with install() as installation:
                step_of(Run(tp=2, loss=loss))
            assert getattr(module, name) is counted
        finally:
            setattr(module, name, original)
        return calls, installation.calls


@pytest.mark.parametrize("loss", ["unfused", "fused"])
def test_assigning_the_defining_module_reaches_no_model(pair: Pool, loss: str) -> None:
    """As a well-known kernel library does: Megatron looks its losses up in copies of the names."""
    assert pair.run(_naive_patch, 2, (loss,)) == [(0, 2)] * 2
