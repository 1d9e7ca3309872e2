"""install and uninstall: every name that holds a loss of Megatron's, in any order, and back."""

from __future__ import annotations

import contextlib
import functools
import inspect
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vocab_parallel_ce import VocabShard
from vocab_parallel_ce.parallel import megatron as ours
from vocab_parallel_ce.parallel.megatron import install, uninstall

ROOT = Path(__file__).resolve().parents[3]
NAMES = (
    "vocab_parallel_cross_entropy",
    "fused_vocab_parallel_cross_entropy",
    "te_parallel_cross_entropy",
)
LOGITS, TARGET = torch.randn(3, 2, 8), torch.randint(0, 8, (3, 2))


def _places() -> dict[str, Any]:
    """What stands at every place where Megatron looks a loss up."""
    from megatron.core import tensor_parallel
    from megatron.core.fusions import fused_cross_entropy
    from megatron.core.models.common.language_module import language_module
    from megatron.core.tensor_parallel import cross_entropy

    return {
        "cross_entropy": cross_entropy.vocab_parallel_cross_entropy,
        "tensor_parallel": tensor_parallel.vocab_parallel_cross_entropy,
        "model unfused": language_module.tensor_parallel.vocab_parallel_cross_entropy,
        "fused_cross_entropy": fused_cross_entropy.fused_vocab_parallel_cross_entropy,
        "model fused": language_module.fused_vocab_parallel_cross_entropy,
        "model te": language_module.te_parallel_cross_entropy,
    }


@pytest.fixture(autouse=True)
def _nothing_stays() -> Iterator[None]:
    """Each test begins and ends with Megatron's own."""
    before = _places()
    yield
    uninstall()
    assert _places() == before


@pytest.fixture
def user() -> Iterator[ModuleType]:
    """A user's module that has copied two names, one under a name of its own."""
    from megatron.core.fusions.fused_cross_entropy import fused_vocab_parallel_cross_entropy
    from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

    module: Any = ModuleType("a_users_module")
    module.criterion = vocab_parallel_cross_entropy
    module.fused_vocab_parallel_cross_entropy = fused_vocab_parallel_cross_entropy
    sys.modules["a_users_module"] = module
    yield module
    del sys.modules["a_users_module"]


def test_names_signatures_and_documentation_are_in_place() -> None:
    """Megatron's parameters in Megatron's order, with what later versions added."""
    from megatron.core.fusions.fused_cross_entropy import fused_vocab_parallel_cross_entropy
    from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

    pairs: list[tuple[Callable[..., Any], list[str]]] = [
        (vocab_parallel_cross_entropy, ["tp_group"]),
        (fused_vocab_parallel_cross_entropy, []),
    ]
    for theirs, added in pairs:
        name = theirs.__name__
        parameters = list(inspect.signature(theirs).parameters)
        want = parameters + [a for a in added if a not in parameters]
        assert list(inspect.signature(getattr(ours, name)).parameters) == want
        with install():
            standing = getattr(sys.modules[theirs.__module__], name)
            assert standing is not theirs
            assert list(inspect.signature(standing).parameters) == want
            for parameter in inspect.signature(standing).parameters.values():
                own = inspect.signature(getattr(ours, name)).parameters[parameter.name]
                assert parameter.default == own.default
    for name in ours.__all__:
        assert inspect.getdoc(getattr(ours, name))


def test_the_version_is_the_one_to_be_tested() -> None:
    """That the tests' second run, on another version, is no repetition of the first."""
    from megatron.core import package_info

    want = os.environ.get("VOCAB_PARALLEL_CE_TEST_MEGATRON", package_info.__shortversion__)
    assert package_info.__shortversion__ == want


def test_every_option_is_documented() -> None:
    told = inspect.getdoc(install) or ""
    for name in inspect.signature(install).parameters:
        assert name in told


def test_all_places_and_a_users_copies(user: Any) -> None:
    before, criterion, fused = _places(), user.criterion, user.fused_vocab_parallel_cross_entropy
    with install() as installation:
        standing = _places()
        assert {f.__name__ for f in standing.values()} == set(NAMES)
        assert all(standing[place] is not before[place] for place in before)
        assert user.criterion is standing["tensor_parallel"]
        assert user.fused_vocab_parallel_cross_entropy is standing["model fused"]
        want = ours.vocab_parallel_cross_entropy(LOGITS, TARGET)
        for call in (*standing.values(), user.criterion, user.fused_vocab_parallel_cross_entropy):
            assert torch.equal(call(LOGITS, TARGET), want)
        assert installation.calls == len(standing) + 2
    assert _places() == before
    assert user.criterion is criterion
    assert user.fused_vocab_parallel_cross_entropy is fused


def test_copies_made_while_installed_are_given_back(user: Any) -> None:
    criterion = user.criterion
    installation = install()
    exec(f"from megatron.core.tensor_parallel import {NAMES[0]}", vars(user))
    exec(f"from megatron.core.fusions.fused_cross_entropy import {NAMES[1]}", vars(user))
    assert user.vocab_parallel_cross_entropy is user.criterion
    assert user.vocab_parallel_cross_entropy is not criterion
    installation.uninstall()
    assert user.vocab_parallel_cross_entropy is criterion
    assert user.fused_vocab_parallel_cross_entropy.__module__.startswith("megatron.core")


def test_a_reference_out_of_reach_calls_megatrons_own_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from megatron.core import tensor_parallel
    from megatron.core.tensor_parallel import cross_entropy

    def theirs(*args: Any) -> str:
        return "Megatron's own"

    for module in (tensor_parallel, cross_entropy):
        monkeypatch.setattr(module, NAMES[0], theirs)
    with install() as installation:
        kept = functools.partial(tensor_parallel.vocab_parallel_cross_entropy, LOGITS)
        assert kept(TARGET).shape == TARGET.shape
    assert kept(TARGET) == "Megatron's own"
    assert installation.calls == 1
    monkeypatch.undo()


def test_our_own_functions_are_never_replaced(user: Any) -> None:
    user.own = own = ours.vocab_parallel_cross_entropy
    with install():
        assert user.own is ours.vocab_parallel_cross_entropy is own
    assert user.own is ours.vocab_parallel_cross_entropy is own


def _loss() -> Tensor:
    from megatron.core import tensor_parallel

    loss: Tensor = tensor_parallel.vocab_parallel_cross_entropy(LOGITS, TARGET)
    return loss


def test_a_second_call_changes_the_options_and_each_takes_back_itself() -> None:
    before = _places()
    plain = ours.vocab_parallel_cross_entropy(LOGITS, TARGET)
    z = LOGITS.logsumexp(-1).square()
    first = install()
    second = install(lse_square_scale=0.5)
    torch.testing.assert_close(_loss(), plain + 0.5 * z)
    assert (first.calls, second.calls) == (0, 1)
    second.uninstall()
    assert torch.equal(_loss(), plain)
    assert (first.calls, second.calls) == (1, 1)
    second.uninstall()  # once more: nothing
    assert _places() != before
    first.uninstall()
    assert _places() == before


def test_nested_blocks() -> None:
    before = _places()
    plain = ours.vocab_parallel_cross_entropy(LOGITS, TARGET)
    with install(lse_square_scale=1.0) as outer:
        with contextlib.suppress(KeyError), install() as inner:
            assert torch.equal(_loss(), plain)
            raise KeyError  # an error takes it back as well, and goes on its way
        assert not torch.equal(_loss(), plain)
        assert (outer.calls, inner.calls) == (1, 1)
    assert _places() == before


def test_the_outer_one_may_go_first() -> None:
    before = _places()
    outer, inner = install(lse_square_scale=1.0), install()
    outer.uninstall()
    assert torch.equal(_loss(), ours.vocab_parallel_cross_entropy(LOGITS, TARGET))
    assert inner.calls == 1
    inner.uninstall()
    assert _places() == before


def test_uninstall_takes_all_back() -> None:
    before = _places()
    handles = [install(), install(lse_square_scale=1.0), install()]
    uninstall()
    assert _places() == before
    for handle in handles:
        handle.uninstall()
    assert _places() == before
    uninstall()
    assert "taken back" in repr(handles[0])


def test_calls_and_the_z_loss_of_the_last_one() -> None:
    leaf = LOGITS.clone().requires_grad_()
    with install(lse_square_scale=0.25, ignore_index=int(TARGET[0, 0])) as installation:
        assert installation.zloss is None
        from megatron.core import tensor_parallel

        loss = tensor_parallel.vocab_parallel_cross_entropy(leaf, TARGET)
        kept = TARGET[0, 0] != TARGET
        want = torch.where(kept, 0.25 * LOGITS.logsumexp(-1).square(), 0.0)
        assert installation.zloss is not None
        torch.testing.assert_close(installation.zloss, want)
        assert not installation.zloss.requires_grad
        plain = F.cross_entropy(LOGITS.flatten(0, 1), TARGET.flatten(), reduction="none")
        plain = torch.where(kept, plain.view(3, 2), 0.0)
        torch.testing.assert_close(loss.detach(), plain + want)
    with install() as without:
        _loss()
    assert without.zloss is None


def test_it_gets_along_with_mindspeeds_patch() -> None:
    """MindSpeed replaces a method of the class that Megatron's own loss is built on."""
    from megatron.core.tensor_parallel.cross_entropy import VocabParallelCrossEntropy

    original = VocabParallelCrossEntropy.calculate_predicted_logits

    def replaced(*args: Any) -> Any:
        return original(*args)

    for patched_first in (True, False):
        if patched_first:
            VocabParallelCrossEntropy.calculate_predicted_logits = staticmethod(replaced)
        with install() as installation:
            VocabParallelCrossEntropy.calculate_predicted_logits = staticmethod(replaced)
            assert torch.equal(_loss(), ours.vocab_parallel_cross_entropy(LOGITS, TARGET))
            assert installation.calls == 1
        assert VocabParallelCrossEntropy.calculate_predicted_logits is replaced
        VocabParallelCrossEntropy.calculate_predicted_logits = staticmethod(original)


def test_what_others_put_in_our_place_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron.core import tensor_parallel

    original = tensor_parallel.vocab_parallel_cross_entropy
    with install():
        tensor_parallel.vocab_parallel_cross_entropy = theirs = object()
    assert tensor_parallel.vocab_parallel_cross_entropy is theirs
    tensor_parallel.vocab_parallel_cross_entropy = original


def test_a_second_call_repairs_what_was_overwritten() -> None:
    from megatron.core import tensor_parallel
    from megatron.core.tensor_parallel import cross_entropy

    original = tensor_parallel.vocab_parallel_cross_entropy
    install()
    standing = tensor_parallel.vocab_parallel_cross_entropy
    for module in (tensor_parallel, cross_entropy):  # as a reload does
        module.vocab_parallel_cross_entropy = original
    install()
    assert tensor_parallel.vocab_parallel_cross_entropy is standing


class _Guarded(ModuleType):
    def __setattr__(self, name: str, value: object) -> None:
        """Takes nothing, and says nothing."""


def test_a_module_that_keeps_megatrons_function_is_reported(user: ModuleType) -> None:
    guarded = _Guarded("a_guarded_module")
    vars(guarded)["criterion"] = vars(user)["criterion"]
    sys.modules["a_guarded_module"] = guarded
    before = _places()
    try:
        with pytest.raises(
            RuntimeError, match=r"a_guarded_module\.criterion still holds Megatron's"
        ):
            install()
        assert _places() == before
        assert vars(user)["criterion"] is before["tensor_parallel"]
    finally:
        del sys.modules["a_guarded_module"]


def test_a_version_without_the_places_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron.core.models.common.language_module import language_module

    before = _places()
    with monkeypatch.context() as patch:
        patch.delattr(language_module, NAMES[1])
        with pytest.raises(RuntimeError, match=f"has no {NAMES[1]}: this version of megatron-core"):
            install()
    assert _places() == before


WRONG: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"vocab_size": 0}, ValueError, "vocab_size must be .* got 0"),
    ({"vocab_size": 50.0}, ValueError, "vocab_size must be .* got 50.0"),
    ({"vocab_size": 9, "shard": VocabShard(0, 8, 8)}, ValueError, "vocab_size=9 and shard="),
    ({"shard": (0, 8, 8)}, TypeError, "shard must be a VocabShard or None, got tuple"),
    ({"ignore_index": None}, TypeError, "ignore_index must be an int, got None"),
    ({"invalid_target": "drop"}, ValueError, "one of error, ignore, got 'drop'"),
    ({"smoothing_formula": "nemo"}, ValueError, "one of megatron, pytorch, got 'nemo'"),
    ({"lse_square_scale": float("nan")}, ValueError, "z-loss scale .* got nan"),
    ({"engine": "cuda"}, ValueError, "engine must be one of .* got 'cuda'"),
    ({"collective": "ring"}, ValueError, "collective must be one of .* got 'ring'"),
    ({"check": 1}, TypeError, "check must be True, False or None, got 1"),
]


@pytest.mark.parametrize(("options", "kind", "text"), WRONG, ids=[str(w[0]) for w in WRONG])
def test_wrong_options_are_refused_at_once(
    options: dict[str, Any], kind: type[Exception], text: str
) -> None:
    before = _places()
    with pytest.raises(kind, match=text):
        install(**options)
    assert _places() == before


def test_without_megatron(monkeypatch: pytest.MonkeyPatch) -> None:
    """The functions serve one rank; install says what is missing, and changes nothing."""
    with monkeypatch.context() as patch:
        for name in [name for name in sys.modules if name.split(".")[0] == "megatron"]:
            patch.setitem(sys.modules, name, None)
        with pytest.raises(ImportError, match=r"pip install .vocab_parallel_ce\[peers\]"):
            install()
        assert ours.vocab_parallel_cross_entropy(LOGITS, TARGET).shape == TARGET.shape
        assert ours.loss_func(torch.ones(2, 3), torch.ones(2, 3))[1] == 6


BEFORE_MEGATRON = """
import sys
from vocab_parallel_ce.parallel import megatron
assert not any(name.split(".")[0] == "megatron" for name in sys.modules), "Megatron was imported"
handle = megatron.install()
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import vocab_parallel_cross_entropy
from megatron.core.models.common.language_module.language_module import LanguageModule
import torch
from types import SimpleNamespace
config = SimpleNamespace(cross_entropy_loss_fusion=False)
groups = SimpleNamespace(tp=None)
model = SimpleNamespace(config=config, tp_group=None, pg_collection=groups)  # what 0.19 reads
logits, labels = torch.randn(3, 2, 8), torch.randint(0, 8, (2, 3))
loss = LanguageModule.compute_language_model_loss(model, labels, logits)
assert torch.equal(loss, megatron.vocab_parallel_cross_entropy(logits, labels.t()).t())
assert torch.equal(loss, vocab_parallel_cross_entropy(logits, labels.t()).t())
assert handle.calls == 2, handle.calls
handle.uninstall()
assert vocab_parallel_cross_entropy.__module__ == "megatron.core.tensor_parallel.cross_entropy"
"""


def test_installed_before_megatron_is_imported() -> None:
    """In a process of its own, as a training script that installs first."""
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", BEFORE_MEGATRON],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 0, run.stderr
