"""Compares a padded replay with eager: a module whose rows depend on each other is found out here."""

from typing import Any

import torch
from torch import Tensor

from graphcache.tree import flatten

# Of the largest value of an output. Another batch size takes another kernel, so rounding differs;
# rows that mix are off by much more.
_TOLERANCE = {
    torch.float64: 1e-9,
    torch.float32: 2e-3,  # TF32 rounds to three digits
    torch.float16: 1e-2,
    torch.bfloat16: 4e-2,
    torch.complex128: 1e-9,
    torch.complex64: 2e-3,
}


def same(eager: Any, padded: Any) -> bool:
    """Tells whether two results agree: exactly for integers, within rounding for floating point."""
    mine: list[Tensor] = []
    theirs: list[Tensor] = []
    if flatten(eager, mine, []) != flatten(padded, theirs, []):
        return False
    return all(_close(a, b) for a, b in zip(mine, theirs, strict=True))


def _close(eager: Tensor, padded: Tensor) -> bool:
    if eager.shape != padded.shape or eager.dtype != padded.dtype:
        return False
    if not (eager.is_floating_point() or eager.is_complex()):
        return torch.equal(eager, padded)
    if eager.numel() == 0:
        return True
    exact = eager.to(torch.complex128 if eager.is_complex() else torch.float64)
    finite = exact[exact.isfinite()].abs()
    scale = float(finite.max()) if finite.numel() else 0.0
    tolerance = _TOLERANCE.get(eager.dtype, 0.1) * scale
    return torch.allclose(padded.to(exact.dtype), exact, rtol=0.0, atol=tolerance, equal_nan=True)
