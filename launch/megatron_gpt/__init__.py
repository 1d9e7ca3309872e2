"""Trains a GPTModel of megatron-core with either loss."""
