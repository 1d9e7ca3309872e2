"""What is replaced so that Megatron runs on a CPU is put back."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor

from vocab_parallel_ce.parallel.megatron.on_cpu import run_megatron_on_cpu


def test_everything_is_put_back() -> None:
    from megatron.core import utils
    from megatron.core.optimizer import clip_grads, optimizer
    from megatron.core.pipeline_parallel import schedules
    from megatron.core.tensor_parallel import random
    from megatron.core.transformer.torch_norm import WrappedTorchNorm

    def replaced() -> list[object]:
        return [
            torch.cuda.current_device,
            torch.cuda.synchronize,
            torch.cuda.current_stream,
            Tensor.cuda,
            Tensor.type,
            schedules.torch,
            optimizer.torch,
            clip_grads.torch,
            utils.torch,
            random._CUDA_RNG_STATE_TRACKER,
            random._CUDA_RNG_STATE_TRACKER_INITIALIZED,
            vars(WrappedTorchNorm)["__new__"],
        ]

    before, inherited = replaced(), "cuda" not in vars(Tensor)
    with contextlib.suppress(KeyError), run_megatron_on_cpu():
        assert all(now is not then for now, then in zip(replaced(), before, strict=True))
        assert torch.empty(1, device=torch.cuda.current_device()).device.type == "cpu"
        raise KeyError
    assert all(now is then for now, then in zip(replaced(), before, strict=True))
    assert inherited == ("cuda" not in vars(Tensor))


def test_attention_makes_its_own_mask() -> None:
    """GPTModel(attention_mask=None): the causal mask, which Megatron makes on CUDA and keeps."""
    with run_megatron_on_cpu():
        from megatron.core.fusions.fused_softmax import FusedScaleMaskSoftmax
        from megatron.core.transformer.enums import AttnMaskType
        from megatron.core.transformer.utils import attention_mask_func

        softmax = FusedScaleMaskSoftmax(
            False, False, AttnMaskType.causal, False, attention_mask_func, True, None
        )
        probabilities = softmax(torch.randn(1, 2, 5, 5), None)
    assert torch.equal(probabilities, probabilities.tril())
    torch.testing.assert_close(probabilities.sum(-1), torch.ones(1, 2, 5))
