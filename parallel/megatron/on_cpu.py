"""What lets a megatron-core model run on CPU ranks over Gloo: for tests and for trying things out.

    with run_megatron_on_cpu():
        parallel_state.initialize_model_parallel(tensor_model_parallel_size=2)
        config = TransformerConfig(..., **CPU_CONFIG)
        model = GPTModel(config, get_gpt_layer_local_spec(), ...)
        get_forward_backward_func()(...)

megatron-core computes on CPU tensors as it is; what stands in the way are places that name CUDA
without asking. Each is replaced while the context lasts, and put back when it ends. Tried with
megatron-core 0.12.1, 0.16.1 and 0.19.2, tensor, sequence, context and pipeline parallel.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

CPU_CONFIG: dict[str, Any] = {
    "use_cpu_initialization": True,  # weights on the CPU, and the same ones for every split
    "attention_dropout": 0.0,  # dropout draws from the CUDA generators
    "hidden_dropout": 0.0,
    "gradient_accumulation_fusion": False,
    "masked_softmax_fusion": False,
    "bias_dropout_fusion": False,
}
"""What a ``TransformerConfig`` needs on a CPU."""


@contextmanager
def run_megatron_on_cpu(*, compile: bool = False) -> Iterator[None]:
    """Build and run megatron-core models on CPU tensors inside the context.

    Works around, in this order:
        ``torch.cuda.current_device()`` where parameters, buffers and messages between pipeline
        stages are made: it answers the CPU; ``torch.cuda.synchronize()`` and ``tensor.cuda()`` of
        the pipeline schedules do nothing; ``torch.cuda.current_stream()``, which the buffers of
        gradients ask for from 0.19 on and use only under CUDA graphs, is None;
        ``device="cuda"``, written out in the schedules, the optimizers and the causal mask that
        attention makes for ``attention_mask=None``, and ``tensor.type()``, by
        which the optimizers tell CUDA tensors;
        the generators that attention forks around its dropout: a tracker that forks nothing;
        the layer norm of plain torch, which refuses sequence parallelism (it normalises each
        token by itself, so that only its parameters need marking: their gradients are summed over
        the tensor-parallel ranks by ``finalize_model_grads``);
        torch.compile in Megatron's fused functions: left out unless ``compile``, for it takes
        seconds and a C++ compiler.

    Raises ImportError where megatron-core is not installed. Inside the context nothing else in the
    process can use CUDA. Communicates nothing.
    """
    importlib.import_module("megatron.core")
    with ExitStack() as undo:
        cpu = torch.device("cpu")
        _replace(undo, torch.cuda, "current_device", lambda: cpu)
        _replace(undo, torch.cuda, "synchronize", lambda *_: None)
        _replace(undo, torch.cuda, "current_stream", lambda *_: None)
        _replace(undo, Tensor, "cuda", lambda tensor, *_, **__: tensor)
        schedules = importlib.import_module("megatron.core.pipeline_parallel.schedules")
        _replace(undo, schedules, "torch", _TorchWithoutCuda())
        _let_optimizers_take_cpu_tensors(undo)
        _make_masks_on_cpu(undo)
        _track_no_generators(undo)
        norm = importlib.import_module("megatron.core.transformer.torch_norm")
        _replace(undo, norm.WrappedTorchNorm, "__new__", _torch_norm)
        if not compile and hasattr(torch.compiler, "set_stance"):  # from torch 2.6 on
            undo.enter_context(torch.compiler.set_stance("force_eager"))
        yield


def _replace(undo: ExitStack, owner: Any, name: str, value: object) -> None:
    """Set an attribute until ``undo`` closes; what its class inherited is inherited again."""
    inherited = name not in vars(owner)
    before = None if inherited else vars(owner)[name]
    setattr(owner, name, value)
    if inherited:
        undo.callback(delattr, owner, name)
    else:
        undo.callback(setattr, owner, name, before)


class _TorchWithoutCuda:
    """torch as those see it who call these functions with ``device="cuda"``."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    @staticmethod
    def zeros(*args: Any, device: Any = None, **kwargs: Any) -> Tensor:
        return torch.zeros(*args, device="cpu" if device == "cuda" else device, **kwargs)

    @staticmethod
    def ones(*args: Any, device: Any = None, **kwargs: Any) -> Tensor:
        return torch.ones(*args, device="cpu" if device == "cuda" else device, **kwargs)

    @staticmethod
    def tensor(data: Any, *, device: Any = None, **kwargs: Any) -> Tensor:
        return torch.tensor(data, device="cpu" if device == "cuda" else device, **kwargs)


def _let_optimizers_take_cpu_tensors(undo: ExitStack) -> None:
    """They make their own scalars on CUDA, and know fp32 and bf16 by the names of CUDA tensors."""
    for module in (
        importlib.import_module("megatron.core.optimizer.optimizer"),
        importlib.import_module("megatron.core.optimizer.clip_grads"),
        importlib.import_module("megatron.core.utils"),
    ):
        _replace(undo, module, "torch", _TorchWithoutCuda())
    true_type = Tensor.type

    def type_as_on_cuda(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        answer = true_type(tensor, *args, **kwargs)
        return answer.replace("torch.", "torch.cuda.") if isinstance(answer, str) else answer

    _replace(undo, Tensor, "type", type_as_on_cuda)


def _make_masks_on_cpu(undo: ExitStack) -> None:
    """Attention makes its own mask where it is called with none, once for a length."""
    utils = importlib.import_module("megatron.core.transformer.utils")
    _replace(undo, utils, "torch", _TorchWithoutCuda())
    for name in ("get_default_causal_mask", "get_sliding_window_causal_mask"):
        forget = getattr(getattr(utils, name, None), "cache_clear", None)
        if forget is not None:
            forget()
            undo.callback(forget)


def _track_no_generators(undo: ExitStack) -> None:
    random = importlib.import_module("megatron.core.tensor_parallel.random")
    _replace(undo, random, "_CUDA_RNG_STATE_TRACKER", None)
    _replace(undo, random, "_CUDA_RNG_STATE_TRACKER_INITIALIZED", False)
    random.initialize_rng_tracker(inference_rng_tracker=True)  # the one whose fork() does nothing


def _torch_norm(cls: type, config: Any, hidden_size: int, eps: float = 1e-5, **_: Any) -> nn.Module:
    """Megatron's choice of a torch norm, its parameters marked as sequence parallelism needs."""
    if config.layernorm_zero_centered_gamma or config.memory_efficient_layer_norm:
        raise ValueError("torch's norms have neither zero-centred gamma nor a memory-efficient way")
    kinds = {"LayerNorm": nn.LayerNorm, "RMSNorm": nn.RMSNorm}
    norm: nn.Module = kinds[config.normalization](hidden_size, eps=eps)
    for parameter in norm.parameters():
        parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
    return norm
