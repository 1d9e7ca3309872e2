"""DeepSpeed, the real package: its vocab-parallel head and its loss beside ours, on two ranks."""

from __future__ import annotations

import os
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


def beyond(group: dist.ProcessGroup) -> None:
    import deepspeed

    deepspeed.init_distributed("gloo")
    model = Model(_head(group))
    install(model)
    with pytest.raises(ValueError, match=f"holds {VOCAB} on rank 0 of the group, which is neither"):
        model(torch.randn(1, ROWS, WIDTH), torch.full((1, ROWS), VOCAB))


def test_labels_beyond_the_vocabulary() -> None:
    for outcome in run_fresh(beyond, 2, timeout=120):
        assert not outcome.kind, outcome.trace


def trained(group: dist.ProcessGroup) -> dict[str, float]:
    """Two steps of a whole engine: the parameters and losses with our loss and with DeepSpeed's."""
    os.environ.update(LOCAL_RANK=str(group.rank()), DS_ACCELERATOR="cpu")
    import deepspeed
    from transformers import LlamaConfig, LlamaForCausalLM

    deepspeed.init_distributed("gloo")
    ids = torch.randint(VOCAB, (2, ROWS), generator=torch.Generator().manual_seed(0))
    losses, parameters = [], []
    for ours in (True, False):
        torch.manual_seed(3)
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=VOCAB, hidden_size=WIDTH, intermediate_size=32, num_hidden_layers=1,
                num_attention_heads=2, num_key_value_heads=2, tie_word_embeddings=False,
            )
        )  # fmt: skip
        config = {
            "train_micro_batch_size_per_gpu": 2,
            "optimizer": {"type": "SGD", "params": {"lr": 0.1}},
            "tensor_parallel": {"autotp_size": 2, "vocab_parallel_lm_head": True},
        }
        engine, *_ = deepspeed.initialize(model=model, config=config)
        if ours:
            install(engine, inplace_backward=True)
        for _ in range(2):
            loss = engine(input_ids=ids, labels=ids).loss
            engine.backward(loss)
            engine.step()
            losses.append(float(loss.detach()))
        parameters.append([p.detach().clone() for p in engine.module.parameters()])
    apart = [float((a - b).abs().max()) for a, b in zip(*parameters, strict=True)]
    assert losses[1] < losses[0]
    first, second = losses[0] - losses[2], losses[1] - losses[3]
    return {"losses": max(abs(first), abs(second)), "parameters": max(apart)}


def test_an_engine_that_trains() -> None:
    for outcome in run_fresh(trained, 2, timeout=120):
        assert not outcome.kind, outcome.trace
        assert max(outcome.value.values()) < 1e-5, outcome.value


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
