"""Plugging the loss into a parallel run.

groups.py layers.py         process groups; embedding and head split over the vocabulary
megatron/                   Megatron-core and MindSpeed
transformers.py deepspeed.py torchtitan.py automodel.py verl.py     one file for each framework
causal_lm.py fused_head.py  what the hooks of Hugging Face models share
devices.py joining.py environment.py        what ``groups`` is made of
"""

from vocab_parallel_ce.torch_import import require_torch

require_torch()  # before anything that imports torch: one line where that cannot work
