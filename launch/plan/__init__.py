"""A model of what the loss costs on several cards."""
