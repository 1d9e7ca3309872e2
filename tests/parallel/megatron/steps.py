"""One training step of a real GPTModel of megatron-core: its loss and every gradient.

One rank with Megatron's unfused loss is what all others are measured against: it computes right.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from vocab_parallel_ce.parallel.megatron import (
    fuse_head,
    install,
    logits_loss_func,
    loss_func,
    output_processor,
)
from vocab_parallel_ce.parallel.megatron.on_cpu import CPU_CONFIG

from ...ranks import Pool
from .cases import error, megatron

VOCAB, SEQUENCE, BATCH = 128, 16, 2


class Run(NamedTuple):
    """One training step: how it is split, by whose loss, in how many micro-batches."""

    tp: int = 1
    pp: int = 1
    loss: str = "unfused"
    ours: bool = False
    labels_given: bool = True
    sequence_parallel: bool = False
    tied: bool = False
    inplace: bool = False
    gathered: bool = False
    vocab_size: int | None = None
    fused: bool = False
    processed: bool = False
    """by ``output_processor``, from megatron-core 0.18 on"""
    mtp: bool = False
    """a layer that predicts one more token, with a loss of its own"""


class Step(NamedTuple):
    """What a step gave: the mean loss, and the whole gradient of each parameter of this stage."""

    loss: float
    gradients: dict[str, Tensor]
    calls: int


def new_model(run: Run) -> Any:
    from megatron.core import parallel_state
    from megatron.core.distributed import finalize_model_grads
    from megatron.core.enums import ModelType
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer.transformer_config import TransformerConfig

    config = TransformerConfig(
        num_layers=2,
        hidden_size=32,
        num_attention_heads=4,
        tensor_model_parallel_size=run.tp,
        pipeline_model_parallel_size=run.pp,
        sequence_parallel=run.sequence_parallel,
        cross_entropy_loss_fusion=run.loss != "unfused",
        cross_entropy_fusion_impl="te" if run.loss == "te" else "native",
        finalize_model_grads_func=finalize_model_grads,
        params_dtype=torch.float32,
        pipeline_dtype=torch.float32,
        **({"mtp_num_layers": 1, "mtp_loss_scaling_factor": 0.1} if run.mtp else {}),
        **CPU_CONFIG,
    )
    spec, further = get_gpt_layer_local_spec(), {}
    if run.mtp:
        from megatron.core.models.gpt.gpt_layer_specs import get_gpt_mtp_block_spec

        further["mtp_block_spec"] = get_gpt_mtp_block_spec(config, spec, False)
    torch.manual_seed(1234)
    model = GPTModel(
        config,
        spec,
        vocab_size=VOCAB,
        max_sequence_length=SEQUENCE,
        share_embeddings_and_output_weights=run.tied,
        parallel_output=not run.gathered,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        **further,
    )
    model.model_type = ModelType.encoder_or_decoder
    return model


def _own_loss_func(mask: Tensor, losses: Tensor, model: object = None) -> tuple[Any, ...]:
    """What a user's loss function for Megatron's losses does: sum, count, report."""
    total, count = (losses.reshape(-1) * mask.reshape(-1)).sum(), mask.sum().int()
    return total, count, {"lm loss": (total.detach().clone(), count)}  # the schedule divides it


def step_of(run: Run) -> Step:
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.pipeline_parallel import get_forward_backward_func

    model = DistributedDataParallel(
        (inner := new_model(run)).config, DistributedDataParallelConfig(), inner
    )
    model.zero_grad_buffer()
    if run.fused:
        fuse_head(model)

    def forward_step(numbers: Any, model: Any) -> tuple[Tensor, Any]:
        g = torch.Generator().manual_seed(next(numbers))
        ids = torch.randint(0, VOCAB, (BATCH, SEQUENCE + 1), generator=g)
        mask = (torch.rand(BATCH, SEQUENCE, generator=g) > 0.2).float()
        labels = ids[:, 1:].contiguous()
        future = torch.triu(torch.ones(1, 1, SEQUENCE, SEQUENCE), 1).bool()
        inputs = (ids[:, :-1].contiguous(), torch.arange(SEQUENCE).repeat(BATCH, 1), future)
        if run.labels_given:
            slot = {"output_processor": output_processor} if run.processed else {}
            losses = model(*inputs, labels=labels, **slot)
            return losses, partial(loss_func if run.ours else _own_loss_func, mask)
        return model(*inputs), partial(logits_loss_func, mask, labels)

    reports = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iter(range(2)),
        model=[model],
        num_microbatches=2,
        seq_length=SEQUENCE,
        micro_batch_size=BATCH,
        forward_only=False,
    )
    sums = [tuple(float(number) for number in report["lm loss"]) for report in reports]
    mean = sum(total for total, _ in sums) / max(sum(count for _, count in sums), 1.0)
    gradients = {name: _whole(parameter, run.tp) for name, parameter in inner.named_parameters()}
    return Step(mean, gradients, 0)


def _whole(parameter: Any, tp: int) -> Tensor:
    gradient: Tensor = parameter.main_grad.clone()
    if tp == 1 or not getattr(parameter, "tensor_model_parallel", False):
        return gradient
    parts = [torch.empty_like(gradient) for _ in range(tp)]
    dist.all_gather(parts, gradient)
    return torch.cat(parts, parameter.partition_dim)


def run_case(rank: dist.ProcessGroup, run: Run) -> Step:
    with megatron(tp=run.tp, pp=run.pp):
        if not run.ours:
            return step_of(run)
        with install(inplace_backward=run.inplace, vocab_size=run.vocab_size) as installation:
            return step_of(run)._replace(calls=installation.calls)


_references: dict[bool, Step] = {}


def reference_of(pair: Pool, tied: bool) -> Step:
    if tied not in _references:
        _references[tied] = pair.run(run_case, 2, (Run(tied=tied),))[0]
    return _references[tied]


def worst_of(step: Step, want: Step) -> float:
    """The largest error of a gradient."""
    return max(error(got, want.gradients[name]) for name, got in step.gradients.items())
