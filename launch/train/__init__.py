"""Trains a small GPT with the vocabulary split across ranks."""
