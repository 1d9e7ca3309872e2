"""NeMo-Automodel's own fine-tuning recipe on two CPU ranks, a Llama split by it: its loss and ours.

Stand-ins: packages that read data sets and quantise, which the recipe imports and does not use
here; the questions to CUDA about memory; and the device, which it names "cuda" without asking.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import sys
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
import torch.distributed as dist

from tests.ranks import run_fresh

VOCAB, STEPS = 131, 3
OURS = "vocab_parallel_ce.parallel.automodel.VocabParallelCrossEntropy"
THEIRS = "nemo_automodel.components.loss.masked_ce.MaskedCrossEntropy"


class _TorchOnCpu:
    """torch as the module sees it that writes ``torch.device("cuda", ...)``."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    @staticmethod
    def device(*_: Any) -> torch.device:
        return torch.device("cpu")


class Sentences(torch.utils.data.Dataset[dict[str, Any]]):
    def __init__(self, **_: Any) -> None:
        g = torch.Generator().manual_seed(2)
        self.ids = torch.randint(VOCAB, (64, 17), generator=g)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Any]:
        ids = self.ids[index].tolist()
        padding = {"input_ids": 0, "labels": -100, "attention_mask": 0}
        return {
            "input_ids": ids[:-1], "labels": [-100, -100, *ids[3:]], "attention_mask": [1] * 16,
            "___PAD_TOKEN_IDS___": padding,
        }  # fmt: skip


def _recipe() -> Any:
    for absent in (
        "datasets", "datasets.distributed", "torchao", "torchao.float8", "torchao.quantization",
        "torchao.quantization.qat", "torchao.quantization.qat.linear",
    ):  # fmt: skip
        stand_in = MagicMock(__path__=[])
        stand_in.__spec__ = importlib.machinery.ModuleSpec(absent, None)
        sys.modules[absent] = stand_in
    cuda: Any = torch.cuda
    for name in ("reset_peak_memory_stats", "max_memory_allocated", "memory_allocated"):
        setattr(cuda, name, lambda *_, **__: 0)
    cuda.current_device = lambda: torch.device("cpu")
    recipe: Any = importlib.import_module("nemo_automodel.recipes.llm.train_ft")
    recipe._build_tokenizer = lambda *_, **__: (None, None)
    models: Any = importlib.import_module("nemo_automodel._transformers.auto_model")
    models.torch = _TorchOnCpu()
    data: Any = ModuleType("sentences")
    data.Sentences = Sentences
    sys.modules["sentences"] = data
    return recipe.TrainFinetuneRecipeForNextTokenPrediction


def _config(loss: dict[str, Any], folder: str) -> Any:
    from nemo_automodel.components.config.loader import ConfigNode

    model = f"{folder}/model"
    precision = dict.fromkeys(("param_dtype", "reduce_dtype", "output_dtype"), torch.float32)
    return ConfigNode({
        "seed": 1,
        "dist_env": {"backend": "gloo"},
        "step_scheduler": {
            "global_batch_size": 4, "local_batch_size": 2, "max_steps": STEPS, "num_epochs": 1,
            "ckpt_every_steps": 1000, "val_every_steps": 1000,
        },
        "model": {
            "_target_": "nemo_automodel.NeMoAutoModelForCausalLM.from_config",
            "config": {
                "_target_": "transformers.AutoConfig.from_pretrained",
                "pretrained_model_name_or_path": model,
            },
            "attn_implementation": "eager", "torch_dtype": "float32", "use_liger_kernel": False,
        },
        "distributed": {
            "strategy": "fsdp2", "tp_size": 2, "dp_size": 1, "cp_size": 1,
            "mp_policy": {"_target_": "torch.distributed.fsdp.MixedPrecisionPolicy", **precision},
        },
        "loss_fn": loss,
        "dataset": {"_target_": "sentences.Sentences"},
        "dataloader": {
            "_target_": "torchdata.stateful_dataloader.StatefulDataLoader", "shuffle": False,
            "collate_fn": "nemo_automodel.components.datasets.utils.default_collater",
        },
        "checkpoint": {"enabled": False, "checkpoint_dir": f"{folder}/checkpoints"},
        "optimizer": {"_target_": "torch.optim.AdamW", "lr": 1e-2},
    })  # fmt: skip


def trained(group: dist.ProcessGroup, folder: str) -> list[list[float]]:
    recipe, found = _recipe(), []
    for target, more in ((OURS, {"inplace_backward": True}), (THEIRS, {})):
        run = recipe(_config({"_target_": target, **more}, folder))
        run.setup()
        assert type(run.loss_fn).__name__ == target.rpartition(".")[2]
        seen: list[float] = []

        def note(data: Any, seen: list[float] = seen) -> None:
            seen.extend(float(data.metrics[name]) for name in ("loss", "grad_norm"))

        run.log_train_metrics = note
        run.run_train_validation_loop()
        found.append(seen)
    return found


@pytest.mark.full
def test_it_trains_as_with_its_own_loss(tmp_path: Path) -> None:
    from transformers import LlamaConfig

    LlamaConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=4, tie_word_embeddings=False,
        architectures=["LlamaForCausalLM"],
    ).save_pretrained(tmp_path / "model")  # fmt: skip
    outcomes = run_fresh(trained, 2, (str(tmp_path),), timeout=150)
    for outcome in outcomes:
        assert not outcome.kind, outcome.trace
        ours, theirs = outcome.value
        assert len(ours) == len(theirs) == 2 * STEPS
        torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs), rtol=1e-5, atol=0)
    assert outcomes[0].value == outcomes[1].value
