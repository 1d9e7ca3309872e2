"""install() on Megatron after 0.19, whose models keep their loss, by imitations (``later.py``)."""

from __future__ import annotations

import gc
import sys
import weakref
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vocab_parallel_ce.parallel.megatron import (
    MegatronOptions,
    cross_entropy_target,
    install,
    uninstall,
)

from . import later

CONFIGS = [(False, "native"), (True, "native"), (True, "te")]
LOGITS, LABELS = torch.randn(2, 3, 8), torch.randint(0, 8, (3, 2))  # [s, b, V] and [b, s]
LANGUAGE_MODULE = "megatron.core.models.common.language_module.language_module"


@pytest.fixture(params=[later.released, later.nightly], ids=["0.20.0", "nightly"])
def backends(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The module that chooses a model's loss; all is taken back afterwards."""
    yield request.param(monkeypatch)
    uninstall()


def _build(*config: Any) -> Any:
    return sys.modules[LANGUAGE_MODULE].LanguageModule(*config)


def _loss(model: Any) -> Tensor:
    loss: Tensor = model.compute_language_model_loss(LABELS, LOGITS.clone())
    return loss


def _want(z: float = 0.0) -> Tensor:
    """[b, s]"""
    plain = F.cross_entropy(LOGITS.flatten(0, 1), LABELS.t().flatten(), reduction="none")
    return (plain.view(2, 3) + z * LOGITS.logsumexp(-1).square()).t()


def _standing(backends: Any) -> dict[str, Any]:
    """What the imitation holds, but for the adapters, which are never replaced."""
    names = ("_reference_ce", "_fused_ce", "te_cross_entropy")
    return {name: getattr(backends, name) for name in names}


@pytest.mark.parametrize("config", CONFIGS)
def test_models_built_afterwards(backends: Any, config: tuple[bool, str]) -> None:
    before = _standing(backends)
    with install(lse_square_scale=0.5) as installation:
        model = _build(*config)
        torch.testing.assert_close(_loss(model), _want(0.5))
        assert installation.calls == 1
        assert all(now is not before[name] for name, now in _standing(backends).items())
    assert _standing(backends) == before


@pytest.mark.parametrize("config", CONFIGS)
def test_models_built_before_are_reached_and_given_back(
    backends: Any, config: tuple[bool, str]
) -> None:
    model = _build(*config)
    before = model.vocab_parallel_cross_entropy
    with install(lse_square_scale=0.5) as installation:
        torch.testing.assert_close(_loss(model), _want(0.5))
        with install():
            torch.testing.assert_close(_loss(model), _want())
        torch.testing.assert_close(_loss(model), _want(0.5))
        assert installation.calls == 2
    assert model.vocab_parallel_cross_entropy is before


def test_a_model_with_another_loss_keeps_it_and_is_told(backends: Any) -> None:
    def of_a_provider(logits: Tensor, labels: Tensor, tp_group: object) -> Tensor:
        return labels * 1.0

    model = _build()
    model.vocab_parallel_cross_entropy = of_a_provider
    with pytest.warns(UserWarning, match="LanguageModule was built before install.*of_a_provider"):
        installation = install()
    assert torch.equal(_loss(model), LABELS * 1.0)
    assert installation.calls == 0


@pytest.mark.filterwarnings("error")
def test_a_model_that_was_handed_the_target_is_left_in_peace(backends: Any) -> None:
    model = _build()
    model.vocab_parallel_cross_entropy = cross_entropy_target
    torch.testing.assert_close(_loss(model), _want())
    other = _build()
    own = partial(cross_entropy_target, options=MegatronOptions(lse_square_scale=0.25))
    other.vocab_parallel_cross_entropy = own
    with install(lse_square_scale=0.5) as installation:
        torch.testing.assert_close(_loss(model), _want(0.5))
        torch.testing.assert_close(_loss(other), _want(0.25))
        assert installation.calls == 1
    assert model.vocab_parallel_cross_entropy is cross_entropy_target
    assert other.vocab_parallel_cross_entropy is own


def test_the_patch_keeps_no_model_alive(backends: Any) -> None:
    model = _build(True)
    install()
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None
    uninstall()


def test_names_that_moved_again_are_one_line_with_the_versions(
    backends: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A loss that a new model would get in spite of all, or nobody who chooses."""
    before = _standing(backends)
    known = "versions 0.12 to 0.19 are known to work"
    with monkeypatch.context() as patch:
        patch.setattr(backends, "unfused_cross_entropy", lambda *_: None)
        with pytest.raises(RuntimeError, match=f"select_cross_entropy.False.*{known}") as problem:
            install()
        assert "\n" not in str(problem.value)
        assert _standing(backends) == before
        patch.delattr(backends, "select_cross_entropy")
        with pytest.raises(RuntimeError, match=f"has no fused_vocab.*{known}") as problem:
            install()
        assert "\n" not in str(problem.value)
        patch.setitem(sys.modules, LANGUAGE_MODULE, None)
        with pytest.raises(RuntimeError, match=f"there is no {LANGUAGE_MODULE}.*{known}"):
            install()
    assert _standing(backends) == before
