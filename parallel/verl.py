"""verl: its functions over vocab-parallel logits, by this library; and a patch by name.

    from vocab_parallel_ce.parallel.verl import install_verl

    install_verl()  # in every worker, before or after verl's engine is imported

verl's Megatron engine asks for log-probabilities, entropy and the sum of squared probabilities one
after the other: up to nine collectives and a clone of the logits. The functions here have the same
names and shapes and take one collective each. ``lm_head_logits_processor`` computes all three, with
the temperature, in one pass. verl imports these functions by name, so ``install_verl`` replaces
them where they were imported to as well; ``uninstall_verl`` puts the original objects back.

Signatures were read in verl 0.9.1. Neither verl nor megatron-core is imported until it is used.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from torch import Tensor

from vocab_parallel_ce import token_statistics

KNOWN = "0.9.1"
HOME = "verl.utils.megatron.tensor_parallel"
ENGINE = "verl.workers.engine.megatron.transformer_impl"
PROCESSOR = "_lm_head_logits_processor"
SMALLEST_TEMPERATURE = 1e-8
"""verl's, for rows of padding that have none"""


def _group() -> dist.ProcessGroup:
    from megatron.core import parallel_state

    group: dist.ProcessGroup = parallel_state.get_tensor_model_parallel_group()
    return group


def vocab_parallel_log_probs_from_logits(logits: Tensor, labels: Tensor) -> Tensor:
    """log p of each label: logits [..., V / tp], labels [...] -> [...] in fp32, differentiable.

    The label -100 gives 0, where verl's own function gives something finite and wrong.
    """
    return token_statistics(logits, labels, group=_group()).log_prob


def vocab_parallel_entropy(vocab_parallel_logits: Tensor) -> Tensor:
    """The entropy of each row: [..., V / tp] -> [...] in fp32, differentiable."""
    entropy = token_statistics(vocab_parallel_logits, entropy=True, group=_group()).entropy
    assert entropy is not None
    return entropy


def vocab_parallel_entropy_with_chunking(
    vocab_parallel_logits: Tensor, chunk_size: int = 2048
) -> Tensor:
    """The same: it needs no memory that chunks would save."""
    return vocab_parallel_entropy(vocab_parallel_logits)


def vocab_parallel_sum_pi_squared(vocab_parallel_logits: Tensor) -> Tensor:
    """The sum of p^2 of each row: [..., V / tp] -> [...] in fp32; no gradient."""
    stats = token_statistics(vocab_parallel_logits, sum_p_squared=True, group=_group())
    assert stats.sum_p_squared is not None
    return stats.sum_p_squared


def lm_head_logits_processor(
    self: Any,
    logits: Tensor,
    label: Tensor,
    temperature: Tensor,
    *,
    calculate_sum_pi_squared: bool,
    calculate_entropy: bool,
    distillation_use_topk: bool,
    distillation_only: bool,
    logits_processor_func: Callable[..., dict[str, Tensor]],
    batch: Any,
    data_format: str,
) -> dict[str, Tensor]:
    """verl's method of the same name: everything from one pass and one exchange.

    logits [b, s, V / tp] are read as they are: the temperature, one a row [b, s], goes into the
    kernels. Only top-k distillation wants divided logits, and then gets them.

    Returns:
        log_probs, entropy and sum_pi_squared, each [b, s], as far as they are asked for.
    """
    temperature = temperature.clamp_min(SMALLEST_TEMPERATURE).expand(label.shape)
    found: dict[str, Tensor] = {}
    if distillation_use_topk:
        divided = logits / temperature.unsqueeze(-1).to(logits.dtype)
        found |= logits_processor_func(student_logits=divided, data=batch, data_format=data_format)
    if distillation_only and not (calculate_entropy or calculate_sum_pi_squared):
        return found
    stats = token_statistics(
        logits,
        None if distillation_only else label,
        entropy=calculate_entropy,
        sum_p_squared=calculate_sum_pi_squared,
        scale=1 / temperature.float(),
        group=_group(),
    )
    if not distillation_only:
        found["log_probs"] = stats.log_prob
    if stats.entropy is not None:
        found["entropy"] = stats.entropy
    if stats.sum_p_squared is not None:
        found["sum_pi_squared"] = stats.sum_p_squared
    return found


_FUNCTIONS: dict[str, Callable[..., Any]] = {
    f.__name__: f
    for f in (
        vocab_parallel_log_probs_from_logits,
        vocab_parallel_entropy,
        vocab_parallel_entropy_with_chunking,
        vocab_parallel_sum_pi_squared,
    )
}
_undo: list[tuple[Any, str, Any]] = []


def install_verl() -> None:
    """Put these functions in the place of verl's, for every engine of the process.

    Raises:
        ImportError: where verl's modules cannot be imported.
        RuntimeError: where they have no such functions; nothing is changed then.

    Communication:
        None. A call of the installed functions costs one collective over Megatron's
        tensor-parallel group.
    """
    if _undo:
        return
    try:
        home, engine = importlib.import_module(HOME), importlib.import_module(ENGINE)
    except ImportError as problem:
        raise ImportError(
            f"verl's Megatron engine cannot be imported ({problem}); known to work: verl {KNOWN}"
        ) from problem
    owners = [
        value
        for value in vars(engine).values()
        if isinstance(value, type) and PROCESSOR in vars(value)
    ]
    missing = [name for name in _FUNCTIONS if not hasattr(home, name)]
    if missing or not owners:
        what = ", ".join(missing) or PROCESSOR
        raise RuntimeError(f"verl has no {what} where 0.9.1 has it; known to work: verl {KNOWN}")
    places = [(module, name) for module in (home, engine) for name in _FUNCTIONS]
    for module, name in places:
        if hasattr(module, name):
            _put(module, name, _FUNCTIONS[name])
    for owner in owners:
        _put(owner, PROCESSOR, lm_head_logits_processor)


def _put(place: Any, name: str, ours: Callable[..., Any]) -> None:
    _undo.append((place, name, vars(place)[name]))
    setattr(place, name, ours)


def uninstall_verl() -> None:
    """Put verl's own functions back. Does nothing where nothing was installed."""
    while _undo:
        place, name, own = _undo.pop()
        setattr(place, name, own)
