"""DeepSpeed, the real package: its vocab-parallel head and its loss beside ours, on two ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from tests.ranks import run_fresh
from vocab_parallel_ce.parallel.deepspeed import install

VOCAB, WIDTH, ROWS = 99, 16, 12


class Model(nn.Module):
    """What a Hugging Face model does with its head and its hook."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.lm_head = head
        self.loss_function: Any = None

    def forward(self, hidden: Tensor, labels: Tensor, **more: Any) -> Tensor:
        loss: Tensor = self.loss_function(
            logits=self.lm_head(hidden), labels=labels, vocab_size=VOCAB, **more
        )
        return loss


def _head(group: dist.ProcessGroup) -> nn.Module:
    from deepspeed.module_inject.layers import VocabParallelLinear, set_autotp_mode

    set_autotp_mode(training=True)
    torch.manual_seed(1)
    head: nn.Module = VocabParallelLinear(
        nn.Linear(WIDTH, VOCAB, bias=False), group, name="lm_head"
    )
    return head


def compared(group: dist.ProcessGroup) -> dict[str, float]:
    import deepspeed
    from deepspeed.sequence.cross_entropy import configure_vocab_parallel_loss

    deepspeed.init_distributed("gloo")
    torch.manual_seed(0)
    hidden = torch.randn(2, ROWS, WIDTH)
    labels = torch.randint(VOCAB, (2, ROWS))
    labels[0, :4] = -100
    found = {}
    for name, more in {"mean": {}, "items": {"num_items_in_batch": torch.tensor(13)}}.items():
        losses, gradients = [], []
        for ours in (True, False):
            model = Model(_head(group))
            if ours:
                loss = install(model, inplace_backward=True)
                assert (loss.shard.size, loss.shard.vocab_size) == (
                    50 - dist.get_rank(group),
                    VOCAB,
                )
            else:
                configure_vocab_parallel_loss(model, model.lm_head)
            x = hidden.clone().requires_grad_()
            value = model(x, labels, **more)
            value.backward()
            losses.append(value.detach())
            gradients.append((x.grad, model.lm_head.weight.grad))
        found[name] = float((losses[0] - losses[1]).abs())
        for a, b in zip(*gradients, strict=True):
            assert a is not None
            assert b is not None
            found[name] = max(found[name], float((a - b).abs().max()))
    return found


def test_loss_and_gradients_are_those_of_deepspeed() -> None:
    for outcome in run_fresh(compared, 2, timeout=120):
        assert not outcome.kind, outcome.trace
        assert outcome.value.keys() == {"mean", "items"}
        assert max(outcome.value.values()) < 1e-6, outcome.value


def test_a_model_without_a_split_head() -> None:
    with pytest.raises(ValueError, match=r"has 0 vocab-parallel heads.*vocab_parallel_lm_head"):
        install(Model(nn.Linear(2, 3)))
    with pytest.raises(TypeError, match="Linear has no loss_function to set"):
        install(nn.Linear(2, 3))


def test_a_head_that_does_not_tell_its_ids() -> None:
    head = nn.Linear(2, 3)
    head.is_vocab_parallel_lm_head = True  # type: ignore[assignment]
    with pytest.raises(TypeError, match=r"does not tell its mp_group, .*known to work: DeepSpeed"):
        install(Model(head))
