"""The same logits on every rank: gathered, or shards all the same (as in a test of Megatron-LM).

Only under install() without a vocabulary it is not an error: nobody can know there.
"""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from vocab_parallel_ce.parallel.megatron import install, vocab_parallel_cross_entropy
from vocab_parallel_ce.testing import cross_entropy as reference

from ...ranks import Pool
from .cases import megatron

C = 16


def _batch() -> tuple[Tensor, Tensor]:
    """[s, b, v/tp] of either rank, all targets on rank 0."""
    g = torch.Generator().manual_seed(7)
    return torch.randn(3, 2, C, generator=g), torch.randint(0, C, (3, 2), generator=g)


def _under_install(
    rank: dist.ProcessGroup, inplace: bool
) -> tuple[list[Tensor], Tensor, list[tuple[str, str]]]:
    with megatron(tp=2), install(inplace_backward=inplace) as installation:
        from megatron.core import tensor_parallel

        logits, target = _batch()
        losses = []
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(3):
                leaf = logits.clone().requires_grad_()
                loss = tensor_parallel.vocab_parallel_cross_entropy(leaf * 1, target)
                loss.sum().backward()
                losses.append(loss.detach())
        assert installation.calls == 3
        assert leaf.grad is not None
        said = [
            (w.filename, str(w.message)) for w in caught if "vocab_parallel_ce" in str(w.message)
        ]
        return losses, leaf.grad, said


@pytest.mark.parametrize("inplace", [False, True])
def test_under_install_it_is_one_warning(pair: Pool, inplace: bool) -> None:
    logits, target = _batch()
    whole = torch.cat([logits, logits], -1).double().requires_grad_()
    want = reference(whole, target, reduction="none").loss
    want.sum().backward()
    assert whole.grad is not None
    for rank, (losses, grad, said) in enumerate(pair.run(_under_install, 2, (inplace,))):
        for loss in losses:
            torch.testing.assert_close(loss.double(), want.detach(), rtol=1e-6, atol=1e-6)
        shard = whole.grad.chunk(2, -1)[rank]
        torch.testing.assert_close(grad.double(), shard, rtol=1e-5, atol=1e-6)
        ((file, message),) = said
        assert file == __file__
        assert "all ranks passed the same logits" in message
        assert "install(vocab_size=...) makes it an error" in message


def _elsewhere(rank: dist.ProcessGroup, way: str) -> str:
    with megatron(tp=2) as group:
        logits, target = _batch()
        try:
            if way == "by hand":
                vocab_parallel_cross_entropy(logits, target, 0.0, group)
            with install(vocab_size=C):
                from megatron.core import tensor_parallel

                tensor_parallel.vocab_parallel_cross_entropy(logits, target)
        except ValueError as problem:
            return str(problem)
        return ""


@pytest.mark.parametrize("way", ["by hand", "vocabulary told"])
def test_elsewhere_it_stays_an_error(pair: Pool, way: str) -> None:
    for message in pair.run(_elsewhere, 2, (way,)):
        assert "input looks gathered" in message


def _checked(rank: dist.ProcessGroup) -> list[str]:
    """An error of one rank in the second attempt reaches the other as well."""
    from vocab_parallel_ce.engines import eager

    calls, usual, out = [], eager.partials, []

    def partials(*arguments: object) -> None:
        calls.append(arguments)
        if len(calls) == 2 and dist.get_rank() == 1:
            raise MemoryError("no room")
        usual(*arguments)  # type: ignore[arg-type]

    with (
        megatron(tp=2),
        install(check=True, engine="eager"),
        pytest.MonkeyPatch.context() as patch,
        warnings.catch_warnings(),
    ):
        from megatron.core import tensor_parallel

        warnings.simplefilter("ignore")
        patch.setattr(eager, "partials", partials)
        try:
            tensor_parallel.vocab_parallel_cross_entropy(*_batch())
        except Exception as problem:
            out.append(f"{type(problem).__name__}: {problem}")
    return out


def test_with_check_the_second_attempt_tells_too(pair: Pool) -> None:
    first, second = pair.run(_checked, 2)
    assert first == ["RuntimeError: rank 1 of the group: MemoryError: no room"]
    assert second == ["MemoryError: no room"]
