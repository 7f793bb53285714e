"""Compares the values of two runs of one forward: within rounding, or bit for bit."""

from typing import Any

import torch
from torch import Tensor

from graphcache.call.pytree import flatten
from graphcache.errors import describe

# Of the largest value of its row or column. Another batch size takes another kernel, so rounding
# differs; what depends on the batch is off by more, and rows that mix are found by bits.
_TOLERANCE = {
    torch.float64: 1e-9,
    torch.float32: 2e-3,  # TF32 rounds to three digits
    torch.float16: 1e-2,
    torch.bfloat16: 4e-2,
    torch.complex128: 1e-9,
    torch.complex64: 2e-3,
}
MAX_ON_HOST = 16 << 20  # bytes of a result that is compared on the CPU
MANY = 8  # values in a row or column, among which one is large enough to measure the others by
OUTLIER = 1000  # times the tenth part of the values: no measure for others


def can_be_nan(tensor: Tensor) -> bool:
    """Return True if a tensor can hold NaN."""
    return tensor.is_floating_point() or tensor.is_complex()


def same(eager: Any, padded: Any) -> bool:
    """Return True if two results agree: exactly for integers, within rounding for floating point."""
    expected: list[Tensor] = []
    found: list[Tensor] = []
    if flatten(eager, expected, []) != flatten(padded, found, []):
        return False
    return all(map(close, expected, found))


def close(eager: Tensor, replayed: Tensor) -> bool:
    """Return True if two tensors agree: exactly for integers, within rounding for floating point."""
    if eager.shape != replayed.shape or eager.dtype != replayed.dtype:
        return False
    if bits_equal(eager, replayed):
        return True
    if eager.nbytes <= MAX_ON_HOST:  # the kernels below would have to be loaded, which takes long
        eager, replayed = eager.cpu(), replayed.cpu()
    return can_be_nan(eager) and not bool(differences(eager, replayed).any())


def differences(eager: Tensor, replayed: Tensor) -> Tensor:
    """Returns where two tensors in floating point differ by more than rounding.

    The measure is the row or column of a value, so that no large value elsewhere hides it. Outliers,
    such as those of masks, are measured by themselves.
    """
    wide = torch.complex128 if eager.is_complex() else torch.float64
    exact = wide if eager.dtype.itemsize >= 8 else torch.float32
    want, got = eager.to(exact), replayed.to(exact)
    off, size = (want - got).abs(), want.abs()
    finite = want.isfinite() & got.isfinite()
    equal = (want == got) | (want.isnan() & got.isnan())
    ordinary = finite & (size <= OUTLIER * _tenth(size[finite & (size > 0)]))
    scale = _scale(torch.where(ordinary, size, 0))
    tolerance = _TOLERANCE.get(eager.dtype, 0.1) * torch.where(ordinary, scale, size)
    return ~equal & ~(finite & (off <= tolerance))


def _tenth(sizes: Tensor) -> Tensor:
    """Returns the value that a tenth of `sizes` do not exceed; zero of none."""
    if not sizes.numel():
        return sizes.new_zeros(())
    return sizes.flatten().kthvalue(1 + sizes.numel() // 10).values


def _scale(sizes: Tensor) -> Tensor:
    """Returns the largest of each value's row or column, whichever is less, where these are many."""
    scale = sizes.amax()
    for dim in {0, sizes.dim() - 1} if sizes.dim() > 1 else ():
        if sizes.numel() // sizes.shape[dim] >= MANY:
            others = [other for other in range(sizes.dim()) if other != dim]
            scale = torch.minimum(scale, sizes.amax(others, keepdim=True))
    return scale


_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def bits_equal(one: Tensor, other: Tensor) -> bool:
    """Return True if two tensors of one shape are equal bit for bit; NaN equals itself."""
    return torch.equal(_bits(one), _bits(other))


def _bits(tensor: Tensor) -> Tensor:
    plain = tensor.resolve_conj().resolve_neg()
    if plain.is_complex():
        plain = torch.view_as_real(plain)
    return plain.contiguous().view(_INTEGERS[plain.element_size()])


def described(want: Tensor, got: Tensor) -> str:
    """Describes how two tensors differ: the first values that do, and the largest difference."""
    if want.shape != got.shape or want.dtype != got.dtype:
        return f"eager has {describe(want)}, the replay {describe(got)}"
    differ = differences(want, got) if can_be_nan(want) else want != got
    places = differ.nonzero()
    shown = [
        f"{tuple(place)}: {want[tuple(place)].item()} eagerly, {got[tuple(place)].item()} replayed"
        for place in places[:3].tolist()
    ]
    largest = (
        (want.double() - got.double()).abs().max() if not want.is_complex() else (want - got).abs().max()
    )
    return (
        f"at {len(places)} of {want.numel()} places, such as {'; '.join(shown)}; the largest difference "
        f"is {largest.item():.3g}"
    )
