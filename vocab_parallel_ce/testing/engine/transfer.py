"""Tensors to a device as they lie: their strides, gaps and overlaps included."""

from __future__ import annotations

from torch import Tensor


def move(tensor: Tensor, device: str) -> Tensor:
    """A copy on the device; the tensor itself where the device is the CPU.

    Args:
        tensor: On the CPU, any dtype, any strides.
        device: Such as "cuda" or "npu:0".

    Returns:
        Tensor: of the same shape, strides and storage offset, a leaf that requires a gradient if
            the tensor does.

    Example:
        >>> move(torch.zeros(2, 8)[:, :5], "cuda").stride()
        (8, 1)
    """
    if device == "cpu":
        return tensor
    moved = _storage(tensor).to(device)
    moved = moved.as_strided(tensor.size(), tensor.stride(), tensor.storage_offset())
    return moved.requires_grad_(tensor.requires_grad)


def copy_back(moved: Tensor, tensor: Tensor) -> None:
    """Everything in the memory of a tensor that ``move`` made, into the one that it was made of.

    What lies between and beside its elements comes along, so that a stray write is seen.

    Args:
        moved: What ``move`` returned.
        tensor: What it was given, on the CPU; it is overwritten.
    """
    whole = moved if moved._base is None else moved._base
    _storage(tensor).copy_(whole)


def _storage(tensor: Tensor) -> Tensor:
    """[items] all that the storage of a CPU tensor holds."""
    storage = tensor.untyped_storage()
    items = storage.nbytes() // tensor.itemsize
    return tensor.detach().new_empty(0).set_(storage, 0, (items,), (1,))
