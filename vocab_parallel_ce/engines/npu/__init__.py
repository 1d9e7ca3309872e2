"""The engine of Ascend NPUs."""
