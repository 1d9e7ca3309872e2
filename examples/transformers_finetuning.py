"""Fine-tunes a Hugging Face model whose head is split over the ranks, with Hugging Face's own API.

    torchrun --standalone --nproc-per-node 2 examples/transformers_finetuning.py

Needs transformers (in a clone: `pip install '.[hooks]'`). The model is a small Llama made on
the spot; with a name of the hub, `from_pretrained` loads that one. Logits are never gathered.
"""

import os
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.distributed import DistributedConfig

from vocab_parallel_ce.parallel.transformers import install

VOCAB, SEQUENCES, LENGTH, STEPS = 1001, 8, 32, 5  # 1001 does not divide by 2: that is fine
SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}


def small_model(folder: Path) -> Path:
    """Saved by one rank and loaded by all, as a model of the hub would be."""
    if dist.get_rank() == 0:
        torch.manual_seed(0)
        LlamaForCausalLM(LlamaConfig(vocab_size=VOCAB, **SIZES, **HEADS)).save_pretrained(folder)
    dist.barrier()
    return folder


def main() -> None:
    dist.init_process_group("gloo")
    place = [tempfile.mkdtemp() if dist.get_rank() == 0 else ""]
    dist.broadcast_object_list(place)
    plan = DistributedConfig(tp_size=dist.get_world_size(), tp_plan={"lm_head": "colwise"})
    model = AutoModelForCausalLM.from_pretrained(
        small_model(Path(place[0])), distributed_config=plan
    )

    install(model, inplace_backward=True)  # the one line

    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    torch.manual_seed(1)  # tensor-parallel ranks read the same batch
    ids = torch.randint(0, VOCAB, (SEQUENCES, LENGTH))
    for step in range(STEPS):
        optimizer.zero_grad()
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        print(f"rank {dist.get_rank()}: step {step + 1}, loss {loss.item():.5f}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    main()
