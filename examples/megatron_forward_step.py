"""A forward_step for Megatron-core whose loss is computed here.

    torchrun --standalone --nproc-per-node 2 examples/megatron_forward_step.py

``install`` and ``forward_step`` are what goes into a script of your own; the rest builds a small
GPTModel on CPU ranks, so that the example runs anywhere (in a clone: pip install '.[peers]').
"""

from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from vocab_parallel_ce.parallel.megatron import install, loss_func
from vocab_parallel_ce.parallel.megatron.on_cpu import CPU_CONFIG, run_megatron_on_cpu

VOCAB, PADDED, LENGTH, BATCH, TP = 1000, 1024, 16, 2, 2


def forward_step(batches: Any, model: Any) -> tuple[Tensor, Any]:
    """What Megatron's schedule calls for each micro-batch."""
    ids, mask = next(batches)
    future = torch.ones(1, 1, LENGTH, LENGTH, dtype=torch.bool).triu(1)
    positions = torch.arange(LENGTH).expand_as(ids[:, 1:])
    losses = model(ids[:, :-1].contiguous(), positions, future, labels=ids[:, 1:].contiguous())
    return losses, partial(loss_func, mask, model=model)


def main() -> None:
    dist.init_process_group("gloo")
    # The true size: columns beyond it are padding, and no class. A z-loss is reported beside it.
    install(vocab_size=VOCAB, inplace_backward=True, lse_square_scale=1e-4)
    with run_megatron_on_cpu():
        from megatron.core import parallel_state
        from megatron.core.models.gpt import GPTModel
        from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
        from megatron.core.pipeline_parallel import get_forward_backward_func
        from megatron.core.transformer.transformer_config import TransformerConfig

        parallel_state.initialize_model_parallel(tensor_model_parallel_size=TP)
        torch.manual_seed(0)
        config = TransformerConfig(
            num_layers=1,
            hidden_size=32,
            num_attention_heads=4,
            tensor_model_parallel_size=TP,
            pipeline_dtype=torch.float32,
            **CPU_CONFIG,
        )
        model = GPTModel(config, get_gpt_layer_local_spec(), PADDED, LENGTH)
        ids = torch.randint(0, VOCAB, (BATCH, LENGTH + 1))
        reports = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=iter([(ids, torch.ones(BATCH, LENGTH))]),
            model=[model],
            num_microbatches=1,
            seq_length=LENGTH,
            micro_batch_size=BATCH,
            forward_only=False,
        )
        means = {name: float(total / count) for name, (total, count) in reports[0].items()}
        print(f"rank {dist.get_rank()}: {means}")
        parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
