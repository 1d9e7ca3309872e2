"""verl's own functions, from its own file, beside ours on two ranks; and the patch by name.

verl as a whole wants ray, vllm and more. What is compared here needs megatron-core alone, so that
one file of it is read; its engine is imitated, with the names that the patch looks for.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tests.ranks import run_fresh
from vocab_parallel_ce.parallel import verl as ours

ROWS, VOCAB = 7, 40
T = torch.tensor([[0.7, 1.0, 1.3, 0.5, 2.0, 1.0, 0.0]])  # 0: padding


def _theirs() -> Any:
    """verl/utils/megatron/tensor_parallel.py of the installed package."""
    found = importlib.metadata.distribution("verl").locate_file(Path(*ours.HOME.split(".")))
    spec = importlib.util.spec_from_file_location("verl_tensor_parallel", f"{found}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _processor(theirs: Any, logits: Tensor, label: Tensor) -> dict[str, Tensor]:
    """What verl's engine does with its functions, in its order."""
    logits = logits / T.clamp_min(1e-8).unsqueeze(-1)
    return {
        "sum_pi_squared": theirs.vocab_parallel_sum_pi_squared(logits),
        "entropy": theirs.vocab_parallel_entropy(logits.clone()),
        "log_probs": theirs.vocab_parallel_log_probs_from_logits(logits.clone(), label),
    }


def compared(group: dist.ProcessGroup) -> dict[str, float]:
    from megatron.core import parallel_state

    parallel_state.initialize_model_parallel(tensor_model_parallel_size=2)
    theirs = _theirs()
    torch.manual_seed(0)
    full, label = torch.randn(1, ROWS, VOCAB), torch.randint(VOCAB, (1, ROWS))
    part = full.chunk(2, dim=-1)[dist.get_rank(group)].clone().requires_grad_()
    found = {}

    def note(name: str, mine: Tensor, want: Tensor, grad: bool = True) -> None:
        assert mine.shape == want.shape, name
        found[name] = float((mine - want).detach().abs().max())
        if grad:
            a, b = (torch.autograd.grad(v.sum(), part, retain_graph=True)[0] for v in (mine, want))
            found[f"gradient of {name}"] = float((a - b).abs().max())
        assert mine.requires_grad == grad

    for name in ("vocab_parallel_entropy", "vocab_parallel_sum_pi_squared"):
        # verl's entropy writes into its input in backward.
        want = getattr(theirs, name)(part.clone())
        note(name, getattr(ours, name)(part), want, name == "vocab_parallel_entropy")
    name = "vocab_parallel_log_probs_from_logits"
    note(name, getattr(ours, name)(part, label), getattr(theirs, name)(part.clone(), label))
    options: dict[str, Any] = {
        "distillation_use_topk": False,
        "distillation_only": False,
        "batch": None,
    }
    options |= {"logits_processor_func": None, "data_format": "thd"}
    mine = ours.lm_head_logits_processor(
        None, part, label, T.clone(), calculate_sum_pi_squared=True, calculate_entropy=True,
        **options,
    )  # fmt: skip
    want = _processor(theirs, part, label)
    assert mine.keys() == want.keys()
    for name in ("log_probs", "entropy", "sum_pi_squared"):
        kept = slice(None, ROWS - 1)  # of padding verl makes logits of 1e8: nothing to compare
        note(name, mine[name][:, kept], want[name][:, kept], name != "sum_pi_squared")
    return found


def test_values_and_gradients_are_those_of_verl() -> None:
    for outcome in run_fresh(compared, 2, timeout=120):
        assert not outcome.kind, outcome.trace
        assert len(outcome.value) == 10
        assert max(outcome.value.values()) < 3e-6, outcome.value


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """Modules of verl's names: the home of the functions, and the engine that imported them."""
    for name in ("verl", "verl.utils", "verl.utils.megatron", "verl.workers", "verl.workers.engine",
                 "verl.workers.engine.megatron"):  # fmt: skip
        package = ModuleType(name)
        package.__path__ = []
        monkeypatch.setitem(sys.modules, name, package)
    monkeypatch.setitem(sys.modules, ours.HOME, _theirs())
    module = ModuleType(ours.ENGINE)
    monkeypatch.setitem(sys.modules, ours.ENGINE, module)
    vars(module).update(
        {k: v for k, v in vars(sys.modules[ours.HOME]).items() if k.startswith("vocab_parallel")}
    )
    vars(module)["Engine"] = type("Engine", (), {ours.PROCESSOR: lambda self: "verl's"})
    yield module
    ours.uninstall_verl()


def test_the_patch_is_undone_exactly(engine: Any) -> None:
    before = dict(vars(engine)), dict(vars(sys.modules[ours.HOME])), vars(engine.Engine)
    own = before[2][ours.PROCESSOR]
    ours.install_verl()
    ours.install_verl()  # a second call does nothing
    assert engine.vocab_parallel_entropy is ours.vocab_parallel_entropy
    assert sys.modules[ours.HOME].vocab_parallel_entropy is ours.vocab_parallel_entropy
    assert vars(engine.Engine)[ours.PROCESSOR] is ours.lm_head_logits_processor
    ours.uninstall_verl()
    assert (dict(vars(engine)), dict(vars(sys.modules[ours.HOME]))) == before[:2]
    assert vars(engine.Engine)[ours.PROCESSOR] is own


def test_another_verl_is_one_line(engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(sys.modules[ours.HOME], "vocab_parallel_entropy")
    with pytest.raises(RuntimeError, match=r"no vocab_parallel_entropy .*known to work: verl"):
        ours.install_verl()
    assert engine.vocab_parallel_entropy is not ours.vocab_parallel_entropy


def test_a_verl_whose_processor_moved_is_one_line(engine: Any) -> None:
    before = dict(vars(engine))
    delattr(engine.Engine, ours.PROCESSOR)
    with pytest.raises(RuntimeError, match=rf"no {ours.PROCESSOR} .*known to work: verl"):
        ours.install_verl()
    assert dict(vars(engine)) == before, "nothing was changed"


def test_without_verl() -> None:
    with pytest.raises(ImportError, match=r"cannot be imported .*known to work: verl 0\.9"):
        ours.install_verl()
