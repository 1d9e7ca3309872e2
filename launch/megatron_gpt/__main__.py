"""python -m vocab_parallel_ce.launch.megatron_gpt"""

import torch

from vocab_parallel_ce.launch.megatron_gpt.command import app

if __name__ == "__main__":
    torch.set_float32_matmul_precision("highest")  # tp=2 follows tp=1 closely only without TF32
    app()
