"""One GRPO step: log-probabilities, entropy and temperature of a policy from one call.

    torchrun --standalone --nproc-per-node 2 examples/rl_statistics.py

The vocabulary is split over the ranks. One call reads the logits once and exchanges a few floats a
token; every rank then holds the same numbers, and all of them can be differentiated.
"""

import torch
import torch.distributed as dist

from vocab_parallel_ce import VocabShard, token_statistics

SAMPLES, LENGTH, VOCAB = 4, 16, 1000  # answers to one prompt
TEMPERATURE, ENTROPY_BONUS, CLIP = 0.7, 0.01, 0.2
PAD = -100  # tokens of the prompt and of the padding: log_prob 0, entropy 0, no gradient


def main() -> None:
    dist.init_process_group("gloo")
    group = dist.group.WORLD
    torch.manual_seed(0)
    shard = VocabShard.even(VOCAB, group)
    full = torch.randn(SAMPLES, LENGTH, VOCAB)  # the same on every rank; a model makes these
    logits = full[..., shard.start : shard.stop].clone().requires_grad_()
    tokens = torch.randint(0, VOCAB, (SAMPLES, LENGTH))
    tokens[:, :5] = PAD
    reward = torch.randn(SAMPLES, 1)
    advantage = (reward - reward.mean()) / (reward.std() + 1e-6)  # relative to the group

    with torch.no_grad():  # the policy that sampled the tokens
        old = token_statistics(logits, tokens, group=group, shard=shard, scale=1 / TEMPERATURE)

    new = token_statistics(
        logits, tokens, entropy=True, group=group, shard=shard, scale=1 / TEMPERATURE
    )
    assert new.entropy is not None
    ratio = (new.log_prob - old.log_prob).exp()
    clipped = ratio.clamp(1 - CLIP, 1 + CLIP)
    gain = torch.minimum(ratio * advantage, clipped * advantage)
    kept = tokens != PAD
    loss = -(gain + ENTROPY_BONUS * new.entropy)[kept].mean()
    loss.backward()

    assert logits.grad is not None
    print(
        f"rank {dist.get_rank()}: loss {loss.item():.6f}, "
        f"log-probability {new.log_prob[kept].mean().item():.4f}, "
        f"entropy {new.entropy[kept].mean().item():.4f} nats, "
        f"prompt gradient {logits.grad[:, :5].abs().max().item():.1f}"
    )
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
