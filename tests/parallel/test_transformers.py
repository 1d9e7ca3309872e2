"""Hugging Face transformers, the real package: a split head against its own loss on a whole one."""

from __future__ import annotations

import copy
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

from tests.ranks import Pool
from vocab_parallel_ce import VocabShard
from vocab_parallel_ce.parallel.causal_lm import CausalLMLoss
from vocab_parallel_ce.parallel.transformers import install, uninstall

pytestmark = pytest.mark.skipif(
    sys.version_info < (3, 11), reason="transformers 5.24 needs Python 3.11"
)
VOCAB, SEQUENCE = 99, 12
KEPT = 17


@pytest.fixture(scope="module", autouse=True)
def quiet() -> None:
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["TRANSFORMERS_VERBOSITY"] = "error"


@pytest.fixture(scope="module")
def ranks(quiet: None) -> Iterator[Pool]:
    """Two ranks that keep transformers imported, and what it makes of their process group."""
    pool = Pool(2, timeout=120.0).start()
    yield pool
    pool.stop()


def tiny(folder: Path) -> Path:
    """A Llama of a few thousand parameters, saved once for all ranks."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def split(folder: Path, plan: str = "colwise") -> Any:
    from transformers import AutoModelForCausalLM
    from transformers.distributed import DistributedConfig

    config = DistributedConfig(tp_size=2, tp_plan={"lm_head": plan})
    return AutoModelForCausalLM.from_pretrained(folder, distributed_config=config)


def whole(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder)


def full(value: Tensor | None) -> Tensor:
    assert value is not None
    return value.full_tensor() if isinstance(value, DTensor) else value


def batch(ignored: int = -100) -> dict[str, Tensor]:
    torch.manual_seed(5)
    ids = torch.randint(VOCAB, (2, SEQUENCE))
    labels = ids.clone()
    labels[0, :4] = ignored
    return {"input_ids": ids, "labels": labels}


CALLS: dict[str, dict[str, Any]] = {
    "mean": {},
    "sum over items": {"num_items_in_batch": torch.tensor(KEPT)},
    "items as an int": {"num_items_in_batch": KEPT},
    "another ignored label": {"ignore_index": 7},
    "shifted before": {"shift_labels": torch.arange(2 * SEQUENCE).view(2, SEQUENCE)},
}


def compared(group: dist.ProcessGroup, folder: str, fused: bool) -> dict[str, float]:
    """The largest difference of loss and gradients for each call, of the largest element."""
    ours, theirs = split(Path(folder)).train(), whole(Path(folder)).train()
    loss = install(ours, fused_head=fused)
    shard = VocabShard.even(VOCAB, group)
    assert ours.loss_function is loss
    found = {}
    for name, extra in CALLS.items():
        values = []
        for model in (ours, theirs):
            model.zero_grad()
            out = model(**batch(extra.get("ignore_index", -100)), **extra)
            out.loss.backward()
            assert (out.logits is None) == (fused and model is ours)
            gradients = {n: full(p.grad) for n, p in model.named_parameters()}
            values.append({"loss": out.loss.detach(), **gradients})
        found[name] = max(
            float((a - values[1][n]).abs().max() / values[1][n].abs().max())
            for n, a in values[0].items()
        )
    with torch.no_grad():
        out, want = ours(**batch()), theirs(**batch())
    assert out.logits.shape[-1] == shard.size
    torch.testing.assert_close(out.loss, want.loss)
    uninstall(ours)
    assert ours(input_ids=batch()["input_ids"]).logits.shape[-1] == shard.size
    assert ours.loss_function is theirs.loss_function
    return found


def refused(group: dist.ProcessGroup, folder: str) -> list[str]:
    said = []
    gathered = split(Path(folder), plan="colwise_gather_output")
    install(gathered)
    with pytest.raises(ValueError, match="the logits were gathered") as problem:
        gathered(**batch())
    said.append(str(problem.value))
    other = split(Path(folder), plan="rowwise")
    with pytest.raises(ValueError, match="expected Shard") as problem:
        install(other)
    said.append(str(problem.value))
    ours = split(Path(folder))
    loss = install(ours)
    assert isinstance(loss, CausalLMLoss)
    labels = batch()["labels"]
    labels[1, 3] = VOCAB
    with pytest.raises(ValueError, match=rf"row 14 holds {VOCAB} .*in \[0, {VOCAB}\)") as problem:
        ours(batch()["input_ids"], labels=labels)
    said.append(str(problem.value))
    logits = torch.zeros(1, 2, loss.shard.size)
    with pytest.raises(ValueError, match="vocab_size=100 is not the 99") as problem:
        loss(logits, labels[:1, :2], vocab_size=100)
    said.append(str(problem.value))
    return said


def copied(group: dist.ProcessGroup, folder: str) -> None:
    """As who makes a reference model of it does; torch cannot copy what transformers has split."""
    mesh = DeviceMesh.from_group(group, "cpu", mesh_dim_names=("tp",))
    ours = whole(Path(folder)).train()
    parallelize_module(ours.lm_head, mesh, ColwiseParallel())
    install(ours)
    other = copy.deepcopy(ours)
    want, loss = ours(**batch()).loss, other(**batch()).loss
    assert torch.equal(loss, want)
    loss.backward()
    assert full(other.lm_head.weight.grad).abs().sum() > 0
    assert ours.lm_head.weight.grad is None


def trained(group: dist.ProcessGroup, folder: str, out: str) -> list[float]:
    """Losses of transformers' own Trainer on two ranks, which it finds as under torchrun.

    accelerate 1.15 lets tensor parallelism run on several cards only; all else it does on a CPU,
    too. So it is told that these are cards, in this one question.
    """
    from accelerate import Accelerator

    Accelerator.multi_device = property(lambda self: True)
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}  # unused: they have met already
    model = split(Path(folder))
    install(model, inplace_backward=True)
    return _train(model, out)


def _train(model: Any, out: str) -> list[float]:
    from transformers import Trainer, TrainingArguments, set_seed

    set_seed(1)
    ids = torch.arange(8 * SEQUENCE).view(8, SEQUENCE) % VOCAB
    rows = [{"input_ids": row, "labels": row} for row in ids]
    arguments = TrainingArguments(
        output_dir=out, max_steps=4, per_device_train_batch_size=2, gradient_accumulation_steps=2,
        logging_steps=1, report_to=[], save_strategy="no", use_cpu=True, learning_rate=1e-2,
        disable_tqdm=True,
    )  # fmt: skip
    trainer = Trainer(model=model, args=arguments, train_dataset=rows)
    trainer.train()
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


@pytest.mark.parametrize("fused", [False, True], ids=["", "fused head"])
def test_loss_and_gradients_are_those_of_transformers(
    fused: bool, ranks: Pool, tmp_path: Path
) -> None:
    outcomes = ranks.outcomes(compared, 2, (str(tiny(tmp_path)), fused))
    for outcome in outcomes:
        assert not outcome.kind, outcome.trace
        assert outcome.value.keys() == CALLS.keys()
        assert max(outcome.value.values()) < 5e-6, outcome.value


def test_a_copy_of_the_model_is_on_its_own(ranks: Pool, tmp_path: Path) -> None:
    for outcome in ranks.outcomes(copied, 2, (str(tiny(tmp_path)),)):
        assert not outcome.kind, outcome.trace


def test_a_fused_head_leaves_nothing_behind(tmp_path: Path) -> None:
    model = whole(tiny(tmp_path))
    install(model, fused_head=True)
    uninstall(model)
    assert "forward" not in vars(model.lm_head)


def test_what_cannot_be_served_is_one_line_on_both_ranks(ranks: Pool, tmp_path: Path) -> None:
    for outcome in ranks.outcomes(refused, 2, (str(tiny(tmp_path)),)):
        assert not outcome.kind, outcome.trace
        assert all("\n" not in line for line in outcome.value)


def test_the_trainer_follows_its_own_curve(ranks: Pool, tmp_path: Path) -> None:
    folder, out = tiny(tmp_path / "model"), str(tmp_path / "run")
    theirs = _train(whole(folder), out)
    for outcome in ranks.outcomes(trained, 2, (str(folder), out)):
        assert not outcome.kind, outcome.trace
        assert len(outcome.value) == 4
        assert outcome.value == pytest.approx(theirs, rel=1e-4)
        assert theirs[-1] < theirs[0]


def test_one_rank_needs_no_plan(tmp_path: Path) -> None:
    model = whole(tiny(tmp_path))
    install(model)
    ours = model(**batch()).loss
    uninstall(model)
    torch.testing.assert_close(ours, model(**batch()).loss)


def test_a_model_that_caps_its_logits_cannot_be_fused(tmp_path: Path) -> None:
    model = whole(tiny(tmp_path)).train()
    install(model, fused_head=True)
    own = model.lm_head.forward
    model.lm_head.forward = lambda x: 30 * torch.tanh(own(x) / 30)
    with pytest.raises(ValueError, match="LlamaForCausalLM changes its logits between head and"):
        model(**batch())
    model.eval()
    assert model(**batch()).logits.shape[-1] == VOCAB


class _Adapter(torch.nn.Module):
    """As LoRA wraps a head: weight and bias are those of the layer below."""

    def __init__(self, base_layer: torch.nn.Linear) -> None:
        super().__init__()
        self.base_layer, self.weight, self.bias = base_layer, base_layer.weight, base_layer.bias

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.base_layer(hidden)
        return logits * 2


def test_a_head_with_an_adapter_cannot_be_fused(tmp_path: Path) -> None:
    model = whole(tiny(tmp_path)).train()
    model.set_output_embeddings(_Adapter(model.lm_head))
    want = model(**batch()).loss
    with pytest.raises(ValueError, match=r"head of LlamaForCausalLM is a _Adapter.*without fused"):
        install(model, fused_head=True)
    install(model)
    torch.testing.assert_close(model(**batch()).loss, want)


def test_another_object_is_refused() -> None:
    with pytest.raises(TypeError, match=r"Linear has no loss_function to set.*known to work"):
        install(torch.nn.Linear(2, 3))


def test_the_loss_alone_says_what_it_lacks() -> None:
    loss = CausalLMLoss(None, VocabShard(0, 5, 5))
    with pytest.raises(ValueError, match="labels and shift_labels are both None"):
        loss(torch.zeros(1, 2, 5))
