"""The recipes for RL stacks, taken from their page, against plain torch in fp64 on two ranks."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..ranks import Pool
from .pages import blocks

B, S, VOCAB = 2, 5, 38
T = 0.7


def _functions(group: Any) -> dict[str, Any]:
    """Every function of the page, by name."""
    space: dict[str, Any] = {"tp_group": group}
    for block in blocks():
        if block.page == "docs/rl-recipes.md" and block.language == "python" and block.runs:
            exec(compile(block.code, block.name, "exec"), space)
    return space


def _dense(full: Tensor, tokens: Tensor, keep: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """log p of the token and entropy of each position; ``keep`` masks what is no token."""
    p = full.log_softmax(-1)
    entropy = -(p.exp() * p).sum(-1)
    if keep is not None:
        own = torch.nn.functional.one_hot(tokens, VOCAB).bool()
        p = full.masked_fill(~(keep | own), -torch.inf).log_softmax(-1)
    return p.gather(-1, tokens[..., None])[..., 0], entropy


def _compared(group: dist.ProcessGroup) -> dict[str, float]:
    """For each recipe the largest difference of values and of the logits' gradient."""
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    torch.manual_seed(0)
    full = torch.randn(B, S, VOCAB, dtype=torch.float64, requires_grad=True)
    tokens = torch.randint(VOCAB, (B, S))
    keep = torch.rand(B * S, VOCAB) < 0.6
    some = torch.rand(B, S) < 0.7
    own = slice(rank * VOCAB // world, (rank + 1) * VOCAB // world)
    part = full.detach()[..., own].clone().requires_grad_()
    f, found = _functions(group), {}
    log_p, entropy = _dense(full, tokens)
    hot, hot_entropy = _dense(full / T, tokens)

    def note(name: str, got: tuple[Tensor, ...], want: tuple[Tensor, ...]) -> None:
        for a, b in zip(got, want, strict=True):
            assert a.shape == b.shape, (name, a.shape, b.shape)
        error = max(float((a - b).abs().max()) for a, b in zip(got, want, strict=True))
        kept = [(a, b) for a, b in zip(got, want, strict=True) if a.requires_grad]
        (ours,) = torch.autograd.grad(sum((a.sum() for a, _ in kept), torch.zeros(())), part)
        (theirs,) = torch.autograd.grad(
            sum((b.sum() for _, b in kept), torch.zeros(())), full, retain_graph=True
        )
        found[name] = max(error, float((ours - theirs[..., own]).abs().max()))

    slime, flat = f["calculate_log_probs_and_entropy"], part.view(B * S, -1)
    rows = tokens.flatten()
    note("slime", slime(flat, rows, group, True), (log_p.view(-1, 1), entropy.flatten()))
    masked, _ = _dense(full.view(B * S, VOCAB), rows, keep)
    got = slime(flat, rows, group, True, log_prob_keep_mask=keep[:, own], with_entropy_grad=False)
    note("slime, mask", got, (masked[:, None], entropy.flatten().detach()))
    assert slime(flat, rows, group)[1] is None
    note("AReaL", (f["gather_logprobs"](part, tokens, T, group),), (hot,))
    note("AReaL, entropy", f["gather_logprobs_entropy"](part, tokens, T, group), (hot, hot_entropy))
    nemo = f["from_parallel_logits_to_logprobs"]
    shifted, _ = _dense(full[:, :-1], tokens[:, 1:])
    note("NeMo-RL", (nemo(part, tokens, own.start, own.stop, group),), (shifted,))
    warm, _ = _dense(full[:, :-1] / T, tokens[:, 1:])
    parameters = SimpleNamespace(temperature=T)
    got = nemo(part, tokens, own.start, own.stop, group, sampling_params=parameters)
    note("NeMo-RL, temperature", (got,), (warm,))
    assert not nemo(part, tokens, own.start, own.stop, group, inference_only=True).requires_grad
    note("SkyRL", (f["vocab_parallel_entropy"](part),), (entropy,))
    labels = tokens.masked_fill(~some, -100)
    swift = f["compute_logps_and_entropy_from_logits"](part, labels, compute_entropy=True)
    note("ms-swift", swift, (log_p * some, entropy * some))
    trl = f["selective_log_softmax_and_entropy"]
    got = trl(part, tokens, entropy_requires_grad=False, temperature=T, row_mask=some)
    note("TRL", got, (hot * some, (hot_entropy * some).detach()))
    teacher = torch.randn(B, S, VOCAB, dtype=torch.float64).log_softmax(-1)
    likely, ids = teacher.topk(4)
    kl = (likely.exp() * (likely - full.log_softmax(-1).gather(-1, ids))).sum(-1)
    distilled = f["top_k_distillation"](part, labels, ids, likely)
    note("distillation", distilled, (kl * some, log_p * some))
    return found


def test_recipes_are_plain_torch_without_the_gather(pool: Pool) -> None:
    for found in pool.run(_compared, world=2):
        assert len(found) == 10
        assert max(found.values()) < 1e-12, found
