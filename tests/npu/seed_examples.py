"""Two examples of the operator's documentation, sharded: what one would type under torchrun.

    python -m tests.npu_sim torchrun --nproc-per-node 4 -m tests.npu.seed_examples FOLDER

Every rank leaves its loss, log_prob and gradient in FOLDER, for test_seed_examples.py to judge.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from vocab_parallel_ce import cross_entropy_loss
from vocab_parallel_ce.engines import select
from vocab_parallel_ce.engines.npu import engine as npu
from vocab_parallel_ce.parallel.groups import ParallelGroups

ROWS, CLASSES = 4096, 8080
EXAMPLES = (("mean", -100), ("sum", 100))


def batch() -> tuple[Tensor, Tensor]:
    """The unsharded logits and target, the same everywhere."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(ROWS, CLASSES, generator=generator), torch.arange(ROWS)


def main(folder: Path) -> None:
    with ParallelGroups.open("npu") as groups:
        assert dist.get_backend(groups.tp_group) == "hccl"
        logits, target = batch()
        first = CLASSES * groups.tp_rank // groups.tp
        last = CLASSES * (groups.tp_rank + 1) // groups.tp
        results = []
        for reduction, ignore_index in EXAMPLES:
            x = logits[:, first:last].to(groups.device).requires_grad_()
            assert select("auto", x) is npu
            group = groups.tp_group if groups.tp > 1 else None
            loss, log_prob, _, _ = cross_entropy_loss(
                x, target.to(groups.device), None, reduction, ignore_index, group=group
            )
            loss.backward()
            assert x.grad is not None
            results.append([part.detach().cpu() for part in (loss, log_prob, x.grad)])
        torch.save(results, folder / f"{groups.rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
