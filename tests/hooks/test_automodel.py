"""NeMo-Automodel, the real package: a model split by its own plan, its own loss beside ours."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

from tests.ranks import run_fresh
from vocab_parallel_ce.parallel.automodel import masked_loss

B, S, VOCAB = 2, 6, 39
TARGET = "vocab_parallel_ce.parallel.automodel.VocabParallelCrossEntropy"


def _labels() -> Tensor:
    torch.manual_seed(1)
    labels = torch.randint(VOCAB, (B, S))
    labels[0, :2] = -100
    return labels


def _loss(name: str, **options: Any) -> Any:
    """As a recipe builds it from YAML."""
    from nemo_automodel.components.config.loader import ConfigNode
    from nemo_automodel.components.loss import build_loss_config

    target = ConfigNode({"_target_": name})._target_
    return build_loss_config(target, **options).build()


def _split_llama(mesh: DeviceMesh) -> Any:
    """A tiny Llama under Automodel's own plan for it, which leaves its logits split."""
    import warnings

    from nemo_automodel.components.distributed.optimized_tp_plans import PARALLELIZE_FUNCTIONS
    from torch.distributed.tensor.parallel import parallelize_module
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(3)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
            num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=64,
            tie_word_embeddings=False,
        )
    )  # fmt: skip
    plan = PARALLELIZE_FUNCTIONS[f"{LlamaForCausalLM.__module__}.LlamaForCausalLM"](model, False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the plan serves fused projections, too
        return parallelize_module(model, mesh, plan)


def on_a_model(group: dist.ProcessGroup) -> dict[str, float]:
    from nemo_automodel.components.loss.utils import calculate_loss

    mesh = DeviceMesh.from_group(group, "cpu", mesh_dim_names=("tp",))
    model, labels, found = _split_llama(mesh), _labels(), {}
    ids = labels.clamp(min=0)
    theirs = "nemo_automodel.components.loss.masked_ce.MaskedCrossEntropy"
    calls: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
        "tokens": ({"reduction": "sum"}, {"num_label_tokens": 7}),
        "no tokens": ({"reduction": "sum"}, {"num_label_tokens": 0}),
        "weights": ({}, {"num_label_tokens": 7, "loss_weights": torch.rand(B, S)}),
        "mean": ({"reduction": "mean", "ignore_index": 3}, {}),
    }
    for name, (options, kwargs) in calls.items():
        results = []
        for target in (TARGET, theirs):
            model.zero_grad()
            logits = model(input_ids=ids).logits
            assert isinstance(logits, DTensor)
            assert logits.to_local().shape[-1] == 20 - group.rank()
            value = calculate_loss(
                _loss(target, **options), logits=logits, labels=labels.clone(), model=model,
                **kwargs,
            )  # fmt: skip
            value.backward()
            gradients = [p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad
                         for p in model.parameters()]  # fmt: skip
            results.append((value.detach(), gradients))
        (a, of_a), (b, of_b) = results
        assert a.shape == b.shape == ()
        pairs = [(a, b), *zip(of_a, of_b, strict=True)]
        found[name] = max(float((x - y).abs().max()) for x, y in pairs)
    return found


def test_loss_and_gradients_are_those_of_automodel() -> None:
    for outcome in run_fresh(on_a_model, 2, timeout=120):
        assert not outcome.kind, outcome.trace
        assert len(outcome.value) == 4
        assert max(outcome.value.values()) < 1e-6, outcome.value


def other_logits(group: dist.ProcessGroup) -> dict[str, float]:
    """A gathered head, plain parts, masks; and what is refused."""
    from nemo_automodel.components.loss.masked_ce import MaskedCrossEntropy

    mesh = DeviceMesh.from_group(group, "cpu", mesh_dim_names=("tp",))
    torch.manual_seed(0)
    full, labels, mask = torch.randn(B, S, 40), _labels(), torch.rand(B, S) < 0.6
    leaf = full.clone().requires_grad_()
    want = MaskedCrossEntropy()(leaf, labels.clone(), mask, 5)
    (whole,) = torch.autograd.grad(want, leaf)
    own = slice(20 * group.rank(), 20 * (group.rank() + 1))
    replicated = DTensor.from_local(full, mesh, [Replicate()], run_check=False)
    calls: dict[str, tuple[Any, Any, Tensor]] = {
        "gathered": (full.clone(), None, whole),
        "replicated": (replicated, None, whole),
        "plain part": (full[..., own].clone(), group, whole[..., own]),
    }
    found = {}
    for name, (logits, tp_group, wanted) in calls.items():
        logits = logits.detach().requires_grad_()
        got = masked_loss(logits, labels, mask, 5, tp_group=tp_group)
        assert not isinstance(got, DTensor)
        (grad,) = torch.autograd.grad(got, logits)
        grad = grad.full_tensor() if isinstance(grad, DTensor) else grad
        found[name] = max(float((got - want).abs()), float((grad - wanted).abs().max()))
    split = DTensor.from_local(full[..., own], mesh, [Shard(2)], run_check=False)
    with pytest.raises(ValueError, match="holds 40 on rank 0 of the group, which is neither"):
        masked_loss(split, torch.full((B, S), 40))
    with pytest.raises(ValueError, match="input is Partial on mesh dimension 0"):
        masked_loss(DTensor.from_local(full, mesh, [Partial()], run_check=False), labels)
    return found


def test_other_logits() -> None:
    for outcome in run_fresh(other_logits, 2, timeout=120):
        assert not outcome.kind, outcome.trace
        assert len(outcome.value) == 3
        assert max(outcome.value.values()) < 1e-6, outcome.value


def test_the_class_is_automodels() -> None:
    """So that no recipe puts another loss in its place; and it takes weights by name."""
    from nemo_automodel.components.loss.masked_ce import MaskedCrossEntropy

    loss = _loss(TARGET, reduction="mean", label_smoothing=0.1)
    assert isinstance(loss, MaskedCrossEntropy)
    assert (loss.reduction, loss.ignore_index) == ("mean", -100)
    with pytest.raises(ValueError, match="num_label_tokens goes with reduction='sum'"):
        loss(torch.randn(B, S, VOCAB), _labels(), num_label_tokens=3)


def test_another_automodel_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    from vocab_parallel_ce.parallel import automodel

    automodel._loss_class.cache_clear()
    monkeypatch.setitem(sys.modules, "nemo_automodel.components.loss.masked_ce", None)
    with pytest.raises(ImportError, match=r"cannot be imported .*NeMo-Automodel 0\.7"):
        _ = automodel.VocabParallelCrossEntropy
