"""torchtitan's own Trainer on two CPU ranks, a small Llama split over them: its loss beside ours.

What stands in for something: the packages that read text and write boards, and the Triton kernels
of its experts, none of which a step of this model calls; the memory monitor, which asks a card; a
change of timeouts by a barrier that Gloo refuses. Under "spmd_types" FSDP is left out, too: with
torch 2.13 it takes no plain parameters, and there is one data-parallel rank.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import torch
import torch.distributed as dist

from tests.ranks import run_fresh

UNEVEN, EVEN = 131, 132
CALLS = [
    ("partial_dtensor", UNEVEN, False),
    ("partial_dtensor", UNEVEN, True),
    ("spmd_types", EVEN, False),
]
"""backend, vocabulary, whether in ChunkedLossWrapper; its own loss refuses uneven plain parts.
"full_dtensor" takes one trainer a process: it was run by hand"""
STEPS = 3


def _import_trainer() -> Any:
    torch._utils._get_available_device_type = lambda: "cpu"
    for absent in (
        "datasets", "datasets.distributed", "torch.utils.tensorboard",
        "torchtitan.distributed.minimal_async_ep.kernels",
    ):  # fmt: skip
        sys.modules[absent] = MagicMock()
    os.environ |= {"LOCAL_RANK": str(dist.get_rank()), "RANK": str(dist.get_rank())}
    trainer = importlib.import_module("torchtitan.trainer")
    metrics: Any = importlib.import_module("torchtitan.components.metrics")
    nothing = metrics.DeviceMemStats(*6 * [0.0])
    metrics.build_device_memory_monitor = lambda: SimpleNamespace(
        device_name="cpu", get_peak_stats=lambda: nothing, reset_peak_stats=lambda: None
    )
    utils: Any = importlib.import_module("torchtitan.distributed.utils")
    utils.set_pg_timeouts = lambda *_, **__: None
    return trainer


def _model(vocab: int) -> Any:
    """torchtitan's Llama, two layers of width 32, with attention that needs no compiler."""
    from torchtitan.models import common, llama3
    from torchtitan.models.common.attention import ScaledDotProductAttention

    llama3.get_attention_config = lambda _: ScaledDotProductAttention.Config()
    width, heads = 32, 4
    rope = common.ComplexRoPE.Config(dim=width // heads, max_seq_len=64, theta=10_000)
    layers = llama3._build_llama3_layers(
        n_layers=2, dim=width, n_heads=heads, hidden_dim=64, rope=rope, attn_backend="",
        fuse_qkv=False,
    )  # fmt: skip
    model = llama3.Llama3Model.Config(
        dim=width,
        vocab_size=vocab,
        tok_embeddings=common.Embedding.Config(
            num_embeddings=vocab, embedding_dim=width, param_init=llama3._EMBEDDING_INIT
        ),
        norm=common.RMSNorm.Config(normalized_shape=width, param_init=llama3._NORM_INIT),
        lm_head=common.Linear.Config(
            in_features=width, out_features=vocab, param_init=llama3._output_linear_init(width)
        ),
        layers=layers,
    )
    return replace(llama3.model_registry("debugmodel"), model=model)


def _text(vocab: int) -> tuple[Any, Any]:
    """Configurations of a data loader, random ids and some labels that do not count, and of a
    tokenizer that nobody asks."""
    from torchtitan.components.dataloader import BaseDataLoader
    from torchtitan.components.tokenizer import BaseTokenizer

    class Data(BaseDataLoader):  # type: ignore[misc]
        @dataclass(kw_only=True, slots=True)
        class Config(BaseDataLoader.Config):  # type: ignore[misc]
            pass

        def __init__(self, config: Any, *, local_batch_size: int, seq_len: int, **_: Any) -> None:
            self.shape = (local_batch_size, seq_len + 1)

        def __iter__(self) -> Iterator[Any]:
            g = torch.Generator().manual_seed(7)
            while True:
                ids = torch.randint(vocab, self.shape, generator=g)
                labels = ids[:, 1:].clone()
                labels[0, :3] = -100
                yield {"input": ids[:, :-1]}, labels

        def state_dict(self) -> dict[str, Any]:
            return {}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            pass

    class Words(BaseTokenizer):  # type: ignore[misc]
        @dataclass(kw_only=True, slots=True)
        class Config(BaseTokenizer.Config):  # type: ignore[misc]
            pass

        def __init__(self, config: Any, *, tokenizer_path: str) -> None:
            super().__init__()

        def encode(self, *_: Any, **__: Any) -> list[int]:
            return []

        def decode(self, *_: Any, **__: Any) -> str:
            return ""

        def get_vocab_size(self) -> int:
            return vocab

    return Data.Config(), Words.Config()


def _trained(trainer: Any, backend: str, vocab: int, loss: Any, folder: str) -> list[float]:
    """Loss and gradient norm of each step, as the trainer logs them."""
    from torchtitan.components.metrics import MetricsProcessor
    from torchtitan.components.optimizer import LRSchedulersContainer, default_adamw
    from torchtitan.config.configs import DebugConfig, ParallelismConfig, TrainingConfig

    data, words = _text(vocab)
    config = trainer.Trainer.Config(
        model_spec=_model(vocab), loss=loss, tokenizer=words, dataloader=data, dump_folder=folder,
        optimizer=default_adamw(lr=1e-2), lr_scheduler=LRSchedulersContainer.Config(warmup_steps=1),
        training=TrainingConfig(
            local_batch_size=2, seq_len=16, steps=STEPS, disable_cuda_graphs=True,
            mixed_precision_param="float32",
        ),
        parallelism=ParallelismConfig(tensor_parallel_degree=2, spmd_backend=backend),
        metrics=MetricsProcessor.Config(log_freq=1), activation_checkpoint=None,
        debug=DebugConfig(seed=3),
    )  # fmt: skip
    config.checkpoint.enable = False
    made, seen = trainer.Trainer(config), []
    made.metrics_processor.log = lambda step, loss, most, norm, *_, **__: seen.extend([loss, norm])
    made.train()
    made.close()
    return [float(value) for value in seen]


def trained(group: dist.ProcessGroup, folder: str) -> dict[str, tuple[list[float], list[float]]]:
    trainer = _import_trainer()
    from torchtitan.components.loss import ChunkedLossWrapper, CrossEntropyLoss

    from vocab_parallel_ce.parallel.torchtitan import VocabParallelCrossEntropyLoss

    parallelize: Any = importlib.import_module("torchtitan.models.llama3.parallelize")
    fsdp = parallelize.apply_fsdp_to_decoder
    found = {}
    for backend, vocab, chunked in CALLS:
        without = backend == "spmd_types"
        parallelize.apply_fsdp_to_decoder = (lambda *_, **__: None) if without else fsdp
        runs = []
        for loss in (
            VocabParallelCrossEntropyLoss.Config(global_vocab_size=vocab, inplace_backward=True),
            CrossEntropyLoss.Config(global_vocab_size=vocab),
        ):
            whole = ChunkedLossWrapper.Config(num_chunks=4, loss_fn=loss) if chunked else loss
            runs.append(_trained(trainer, backend, vocab, whole, folder))
        found[f"{backend}, chunked: {chunked}"] = (runs[0], runs[1])
    return found


def typechecked(group: dist.ProcessGroup) -> list[tuple[float, float]]:
    """Under the check of types that torchtitan's ``debug.spmd_typechecking`` turns on."""
    import spmd_types as spmd
    from torch.distributed.device_mesh import init_device_mesh
    from torchtitan.components.loss import CrossEntropyLoss
    from torchtitan.distributed.spmd_types import set_current_spmd_mesh
    from torchtitan.distributed.utils import set_spmd_backend, spmd_typecheck

    from vocab_parallel_ce.parallel.torchtitan import VocabParallelCrossEntropyLoss

    set_spmd_backend("spmd_types")
    mesh = init_device_mesh("cpu", (1, 1, 2), mesh_dim_names=("dp", "cp", "tp"))
    torch.manual_seed(0)
    full, labels = torch.randn(2, 6, 40), torch.randint(40, (2, 6))
    found = []
    for kind in (VocabParallelCrossEntropyLoss, CrossEntropyLoss):
        x = full.chunk(2, -1)[group.rank()].clone().requires_grad_()
        rows = {"dp": spmd.S(0), "cp": spmd.S(1)}
        with set_current_spmd_mesh(mesh), spmd_typecheck(local=False):
            spmd.assert_type(x, {**rows, "tp": spmd.S(2)})
            spmd.assert_type(labels, {**rows, "tp": spmd.I})
            loss, _ = kind.Config(global_vocab_size=40).build()(x * 1, labels, torch.tensor(12.0))
            assert list(spmd.get_local_type(loss).values()) == [spmd.I]
            with spmd.no_typecheck():
                loss.backward()
        assert x.grad is not None
        found.append((float(loss.detach()), float(x.grad.norm())))
    return found


def test_it_trains_as_with_its_own_loss(tmp_path: Any) -> None:
    outcomes = run_fresh(trained, 2, (str(tmp_path),), timeout=150)
    for outcome in outcomes:
        assert not outcome.kind, outcome.trace
        assert len(outcome.value) == len(CALLS)
        for name, (ours, theirs) in outcome.value.items():
            assert len(ours) == len(theirs) == 2 * STEPS, name
            torch.testing.assert_close(
                torch.tensor(ours), torch.tensor(theirs), rtol=1e-5, atol=0, msg=name
            )
    # Plain parts have no norm over ranks without FSDP: the losses are the same.
    one, other = ([ours[::2] for ours, _ in o.value.values()] for o in outcomes)
    assert one == other


def test_its_check_of_types_lets_the_loss_pass() -> None:
    for outcome in run_fresh(typechecked, 2, timeout=120):
        assert not outcome.kind, outcome.trace
        ours, theirs = outcome.value
        torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs), rtol=1e-6, atol=0)
