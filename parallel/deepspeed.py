"""DeepSpeed AutoTP: one line gives a model with ``vocab_parallel_lm_head`` this library's loss.

    engine, *_ = deepspeed.initialize(model=model, config=config)
    install(engine)

With ``"tensor_parallel": {"vocab_parallel_lm_head": true}`` DeepSpeed replaces the head of a
Hugging Face model by one that keeps its logits split and knows its ids, and sets a loss of its own
in ``model.loss_function``. ``install`` sets ours in the same place. Shards may be uneven.

Read in DeepSpeed 0.19.8. DeepSpeed itself is never imported.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from vocab_parallel_ce import VocabShard
from vocab_parallel_ce.parallel.causal_lm import CausalLMLoss

KNOWN = "0.19.8"
_MARK = "is_vocab_parallel_lm_head"
_TOLD = ("mp_group", "vocab_start_index", "vocab_end_index", "vocab_size")


def install(
    model: Any,
    *,
    label_smoothing: float = 0.0,
    lse_square_scale: float = 0.0,
    inplace_backward: bool = False,
) -> CausalLMLoss:
    """Set this library's loss in the place of DeepSpeed's vocab-parallel loss.

    Args:
        model: what ``deepspeed.initialize`` returned first, or the model inside. Under DeepSpeed's
            sequence parallelism (Ulysses) each rank returns the mean over its own tokens, as
            DeepSpeed's loss does, and the engine weights them.
        label_smoothing: in the loss, over the whole vocabulary.
        lse_square_scale: adds this times lse squared to the loss of each token (z-loss).
        inplace_backward: the gradient overwrites ``outputs.logits``.

    Returns:
        The loss function, which is now ``model.loss_function``.

    Raises:
        TypeError: for a model without the hook ``loss_function``, or a head that does not say
            which ids it holds.
        ValueError: for a model without exactly one vocab-parallel head.

    Communication:
        None here; each loss costs what ``cross_entropy`` costs.

    Example:
        ```python
        engine, *_ = deepspeed.initialize(model=model, config=config)
        install(engine)
        ```
    """
    inner = getattr(model, "module", model)
    if not hasattr(inner, "loss_function"):
        raise TypeError(
            f"{type(inner).__name__} has no loss_function to set, as DeepSpeed needs it"
        )
    heads = [module for module in inner.modules() if getattr(module, _MARK, False)]
    if len(heads) != 1:
        raise ValueError(
            f"{type(inner).__name__} has {len(heads)} vocab-parallel heads, expected one: give "
            'deepspeed.initialize {"tensor_parallel": {"vocab_parallel_lm_head": true, ...}} '
            f"(known to work: DeepSpeed {KNOWN})"
        )
    loss = _loss_for(heads[0], label_smoothing, lse_square_scale, inplace_backward)
    inner.loss_function = loss
    return loss


def _loss_for(
    head: nn.Module, smoothing: float, square_scale: float, inplace: bool
) -> CausalLMLoss:
    lacking = [name for name in _TOLD if not hasattr(head, name)]
    if lacking:
        raise TypeError(
            f"{type(head).__name__} does not tell its {', '.join(lacking)}; known to work: "
            f"DeepSpeed {KNOWN}"
        )
    group, start, stop, size = (getattr(head, name) for name in _TOLD)
    return CausalLMLoss(group, VocabShard(start, stop, size), smoothing, square_scale, inplace)
