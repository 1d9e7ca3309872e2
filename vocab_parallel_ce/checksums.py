"""Numbers that tell tensors of two ranks apart without sending them: all computed on the device.

checksum, float_checksum   exact: of targets, class weights, partials, ...
fingerprint                up to rounding: of hidden states, which ranks sum in another order
"""

from __future__ import annotations

import torch
from torch import Tensor

from .engines.contract import CHECKSUM_ROUNDS, CHECKSUM_STEP


def checksum(values: Tensor) -> Tensor:
    """An int64 that depends on every value and its place; computed on the device, no sync.

    The sum of a hash of each (place, value), so that it can be taken in any order. A sum of value x
    place would be linear: [9, 0] and [0, 3] would have the same. The two rounds are those of
    splitmix64 (Steele, Lea and Flood 2014), with arithmetic shifts, which all devices have.
    """
    flat = values.reshape(-1)
    mixed = torch.arange(1, flat.numel() + 1, dtype=torch.int64, device=flat.device)
    mixed.mul_(CHECKSUM_STEP).add_(flat)
    for shift, factor in CHECKSUM_ROUNDS:
        mixed = mixed.bitwise_xor_(mixed >> shift).mul_(factor)
    return mixed.sum()


def float_checksum(values: Tensor) -> Tensor:
    """``checksum`` of the bits of a floating point tensor; narrow ones are widened first."""
    if values.dtype == torch.float64:
        return checksum(values.view(torch.int64))
    return checksum(values.float().view(torch.int32))


def fingerprint(hidden: Tensor, first_row: int = 0) -> Tensor:
    """Two numbers [2] that tell hidden states [N, H] from others.

    The first is a product with a fixed pattern of numbers near 1. The second is the sum of squares,
    which says how large such a product is by chance. On equal hidden states both are equal up to
    rounding. Fingerprints of row blocks may be added, if each is given the number of its first row.
    """
    rows = torch.arange(first_row, first_row + hidden.shape[0], device=hidden.device)
    columns = torch.arange(hidden.shape[1], device=hidden.device)
    values = hidden if hidden.dtype == torch.float64 else hidden.float()
    product = (values @ _pattern(columns).to(values.dtype)) @ _pattern(rows).to(values.dtype)
    return torch.stack([product, torch.linalg.vector_norm(values).square()]).float()


def _pattern(places: Tensor) -> Tensor:
    """Numbers of mean square 1 that look like chance."""
    # The golden angle. The period is a prime, so no usual size of a block is a multiple of it.
    return ((places % 4093).float() * 2.399963 + 0.5).cos() * 2**0.5


def fingerprint_bits(fingerprint: Tensor) -> Tensor:
    """The product and the norm as two fp32, which fill one int64."""
    product, squares = fingerprint.unbind()
    return torch.stack([product, squares.sqrt()]).view(torch.int64)[0]
