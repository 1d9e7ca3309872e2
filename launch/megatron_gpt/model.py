"""A GPTModel of megatron-core, built as its users build one.

Local layer spec, Megatron's data-parallel wrapper and Megatron's optimizer, on the groups that
Megatron makes itself. Weights are drawn on the CPU, so that every split of the model starts from
the same ones.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import math
import shutil
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from vocab_parallel_ce.launch.bench.peers import installed
from vocab_parallel_ce.launch.train.gpt import GPTShape
from vocab_parallel_ce.parallel.groups import ParallelGroups
from vocab_parallel_ce.parallel.megatron.on_cpu import CPU_CONFIG, run_megatron_on_cpu
from vocab_parallel_ce.parallel.megatron.patch import HOW_TO_GET_MEGATRON


def require_megatron(device_type: str) -> None:
    """ValueError where the packages that a run needs are missing."""
    if not installed("megatron.core"):
        raise ValueError(f"megatron-core is not installed; {HOW_TO_GET_MEGATRON}")
    if device_type == "npu" and not installed("mindspeed"):
        raise ValueError(
            "--device npu: megatron-core runs on an NPU through MindSpeed, which is not installed; "
            "install it with the megatron-core that it belongs to, or use --device cpu"
        )


def padded_vocab_size(vocab_size: int, divisible_by: int, tp: int) -> int:
    """Megatron's padding: up to a multiple of `divisible_by` on each tensor-parallel rank."""
    multiple = divisible_by * tp
    return -(-vocab_size // multiple) * multiple


@dataclass(frozen=True)
class ModelOptions:
    """What the model is, beside its sizes."""

    shape: GPTShape
    sequence_parallel: bool
    divisible_by: int
    dtype: torch.dtype

    def check(self, tp: int) -> None:
        """ValueError where Megatron could not split the model over `tp` ranks."""
        shape = self.shape
        if shape.heads % tp:
            raise ValueError(f"--heads {shape.heads} cannot be divided among --tp {tp} ranks")
        columns = padded_vocab_size(shape.vocab_size, self.divisible_by, tp) // tp
        if tp > 1 and columns * (tp - 1) >= shape.vocab_size:
            raise ValueError(
                f"--divisible-by {self.divisible_by} makes nothing but padding of the last of "
                f"--tp {tp} ranks, for --vocab-size {shape.vocab_size}; choose a smaller one"
            )
        if not self.sequence_parallel:
            return
        if tp == 1:
            raise ValueError("--sequence-parallel needs tensor-parallel ranks: --tp 2 or more")
        if shape.context % tp:
            raise ValueError(
                f"--context {shape.context} cannot be divided among --tp {tp} ranks, which "
                "--sequence-parallel does"
            )


@contextmanager
def megatron(groups: ParallelGroups, seed: int, timeout_seconds: float = 600.0) -> Iterator[None]:
    """Megatron imported, quiet, and initialised over the ranks of `groups`; undone at the end."""
    with ExitStack() as undo:
        undo.enter_context(_quiet())
        if groups.device.type == "npu":
            importlib.import_module("mindspeed.megatron_adaptor")  # before any part of Megatron
        if groups.device.type == "cpu":
            undo.enter_context(run_megatron_on_cpu(compile=has_compiler()))
        parallel_state: Any = importlib.import_module("megatron.core.parallel_state")
        # Groups that outlive the interpreter abort it under Gloo: none may stay in Megatron.
        undo.callback(parallel_state.destroy_model_parallel)
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=groups.tp,
            distributed_timeout_minutes=math.ceil(timeout_seconds / 60),
        )
        if groups.device.type != "cpu":
            random: Any = importlib.import_module("megatron.core.tensor_parallel.random")
            random.model_parallel_cuda_manual_seed(seed)
        torch.manual_seed(seed)
        yield


@contextmanager
def _quiet() -> Iterator[None]:
    """Megatron tells every rank, at every import, which optional packages it would rather have."""
    logger = logging.getLogger("megatron")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"megatron\.")
            # Its sequence parallelism calls what torch 2.13 has given other names.
            warnings.filterwarnings("ignore", r"`torch\.distributed\.", FutureWarning)
            yield
    finally:
        logger.setLevel(level)


def has_compiler() -> bool:
    """torch.compile, which Megatron's fused loss asks for, needs one on a CPU."""
    return any(shutil.which(name) for name in ("g++", "clang++"))


def build_gpt(options: ModelOptions, groups: ParallelGroups) -> Any:
    """The bare GPTModel on this rank's device; ``megatron`` must be entered."""
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer.transformer_config import TransformerConfig

    options.check(groups.tp)
    shape = options.shape
    if options.sequence_parallel and groups.device.type == "cuda" and not installed("apex"):
        raise ValueError(
            "--sequence-parallel: the layer norm that megatron-core takes from torch refuses it; "
            "install apex, or leave the option out"
        )
    config = TransformerConfig(
        **CPU_CONFIG,
        num_layers=shape.layers,
        hidden_size=shape.width,
        num_attention_heads=shape.heads,
        tensor_model_parallel_size=groups.tp,
        sequence_parallel=options.sequence_parallel,
        params_dtype=options.dtype,
        pipeline_dtype=options.dtype,
        bf16=options.dtype == torch.bfloat16,
        # Divides by the tokens of the global batch, which neither the split over data-parallel
        # ranks nor micro-batches may change.
        calculate_per_token_loss=True,
    )
    return GPTModel(
        config,
        get_gpt_layer_local_spec(),
        vocab_size=padded_vocab_size(shape.vocab_size, options.divisible_by, groups.tp),
        max_sequence_length=shape.context,
        share_embeddings_and_output_weights=shape.tied,
    ).to(groups.device)


def wrap(model: Any) -> Any:
    """The model under Megatron's mixed precision and data parallelism."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.transformer.module import Float16Module

    inner = Float16Module(model.config, model) if model.config.bf16 else model
    # The gradient of a bf16 model is summed in fp32.
    return DistributedDataParallel(
        model.config, DistributedDataParallelConfig(grad_reduce_in_fp32=True), inner
    )


def build_optimizer(wrapped: Any, lr: float, weight_decay: float, clip: float) -> Any:
    """Megatron's AdamW, with fp32 weights behind those of a bf16 model."""
    from megatron.core.distributed import finalize_model_grads
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    config = wrapped.config
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam",
            lr=lr,
            weight_decay=weight_decay,
            adam_beta1=0.9,
            adam_beta2=0.95,
            clip_grad=clip,
            bf16=config.bf16,
            params_dtype=config.params_dtype,
        ),
        [wrapped],
    )
    config.finalize_model_grads_func = finalize_model_grads
    config.grad_scale_func = optimizer.scale_loss
    return optimizer
