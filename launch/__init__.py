"""Launching: what one types to train with the loss, to measure it, to check a machine."""
