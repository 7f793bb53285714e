"""Weak references to tensors: metadata, ownership, expiry."""

import pytest
import torch
from torch import Tensor, nn

import graphcache
from graphcache import _C
from tests.helpers import Backend

DTYPES = [
    torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64,
    torch.uint16, torch.uint32, torch.uint64,
    torch.float16, torch.bfloat16, torch.float32, torch.float64,
    torch.complex32, torch.complex64, torch.complex128,
    torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz,
    torch.float8_e8m0fnu,
]  # fmt: skip


def same_metadata(a: Tensor, b: Tensor) -> bool:
    return (
        a.dtype == b.dtype
        and a.device == b.device
        and a.shape == b.shape
        and a.stride() == b.stride()
        and a.storage_offset() == b.storage_offset()
        and a.data_ptr() == b.data_ptr()
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
def test_weak_ref_of_every_dtype(backend: Backend, dtype: torch.dtype) -> None:
    tensor = torch.empty(4, 6, dtype=dtype, device=backend.device)
    tensor.view(torch.uint8).fill_(1)
    weak = _C.weak_ref(tensor)
    assert same_metadata(weak, tensor)
    assert weak.view(torch.uint8).eq(1).all()


@pytest.mark.parametrize(
    "view",
    [
        lambda t: t,
        lambda t: t.t(),
        lambda t: t[1:, ::2],
        lambda t: t[2],
        lambda t: t[:0],
        lambda t: t[0, 0],
        lambda t: t[:1].expand(5, 6),
    ],
    ids=["whole", "transposed", "strided", "row", "no rows", "scalar", "expanded"],
)
def test_weak_ref_of_every_view(backend: Backend, view) -> None:
    tensor = view(backend.randn(4, 6))
    weak = _C.weak_ref(tensor)
    assert same_metadata(weak, tensor)
    assert torch.equal(weak, tensor)


def test_weak_ref_of_nothing(backend: Backend) -> None:
    assert _C.weak_ref(torch.empty(0, 3, device=backend.device)).shape == (0, 3)


def test_weak_ref_does_not_own(backend: Backend) -> None:
    tensor = backend.randn(4)
    weak = _C.weak_ref(tensor)
    assert not _C.is_held(tensor)
    assert _C.is_weak(weak)
    assert not _C.is_weak(tensor)
    tensor.fill_(3)
    assert weak.eq(3).all()


def test_weak_refs_of_one_storage_share_one(backend: Backend) -> None:
    tensor, other = backend.randn(4, 4), backend.randn(2)
    a, b, c = _C.weak_ref([tensor, tensor.t(), other])
    assert _C.storage_key(a) == _C.storage_key(b) != _C.storage_key(c)
    _C.expire(a, "gone")
    assert _C.is_expired(b)
    assert not _C.is_expired(c)


def test_weak_ref_keeps_conjugate_and_negative_bits(backend: Backend) -> None:
    tensor = torch.complex(backend.randn(3), backend.randn(3))
    assert torch.equal(_C.weak_ref(tensor.conj()), tensor.conj())
    assert torch.equal(_C.weak_ref(tensor.conj().imag), tensor.conj().imag)


def test_weak_ref_of_a_parameter_is_a_plain_tensor() -> None:
    weak = _C.weak_ref(nn.Parameter(torch.ones(2)))
    assert type(weak) is Tensor
    assert not weak.requires_grad


class Sub(Tensor):
    pass


@pytest.mark.parametrize(
    ("refused", "why"),
    [
        (lambda: torch.ones(2).as_subclass(Sub), "subclass"),
        (lambda: torch.eye(2).to_sparse(), "layout Sparse"),
        (lambda: torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8), "quantized"),
        (lambda: 3, "expected a torch.Tensor, got int"),
    ],
    ids=["subclass", "sparse", "quantized", "number"],
)
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
def test_weak_ref_refuses_with_a_reason(refused, why: str) -> None:
    with pytest.raises(TypeError, match=why):
        _C.weak_ref(refused())


@pytest.mark.parametrize(
    "access",
    [
        lambda t: t + 1,
        lambda t: t @ t.t(),
        lambda t: t.data_ptr(),
        lambda t: t.clone(),
        lambda t: t[0].sum(),
        lambda t: t[0, 0].item(),
        print,
        lambda t: torch.ones_like(t).copy_(t),
        lambda t: t.fill_(1),
        lambda t: torch._foreach_add([t], 1),
        lambda t: t.cpu() + 1,
    ],
    ids=[
        "add",
        "matmul",
        "data_ptr",
        "clone",
        "sum",
        "item",
        "print",
        "copy_from",
        "fill",
        "foreach",
        "cpu",
    ],
)
def test_every_access_to_an_expired_tensor_raises(backend: Backend, access) -> None:
    weak = _C.weak_ref(owner := backend.randn(3, 3))
    view = weak[1:]
    _C.expire(weak, "this is the text")
    for tensor in (weak, view):
        with pytest.raises(RuntimeError, match="this is the text"):
            access(tensor)
    assert weak.shape == owner.shape
    assert _C.is_expired(view)
    assert not _C.is_expired(owner)


def test_expire_has_a_text_of_its_own() -> None:
    graphcache.expire(tensor := torch.ones(2))
    with pytest.raises(RuntimeError, match=r"expired by graphcache\.expire\(\).*\.clone\(\)"):
        tensor + 1
    assert graphcache.is_expired(tensor)


def test_weak_ref_of_an_expired_tensor_raises_its_text() -> None:
    tensor = torch.ones(2)
    _C.expire(tensor, "gone")
    with pytest.raises(RuntimeError, match="gone"):
        _C.weak_ref(tensor)


def test_is_held(backend: Backend) -> None:
    weak = _C.weak_ref(owner := backend.randn(4))
    assert not _C.is_held(weak)
    view = weak[1:]
    assert _C.is_held(weak)
    del view
    assert not _C.is_held(weak)
    weak.untyped_storage()  # leaves a Python object on the storage, which nobody holds
    assert not _C.is_held(weak)
    storage = weak.untyped_storage()
    assert _C.is_held(weak)
    del storage, owner
    assert not _C.is_held(weak)


def test_materialize_moves_all_views(backend: Backend) -> None:
    owner = backend.randn(4, 4)
    weak = _C.weak_ref(owner)
    view, expected = weak[1:, ::2], owner.clone()
    _C.materialize(weak)
    owner.fill_(0)
    assert torch.equal(weak, expected)
    assert torch.equal(view, expected[1:, ::2])
    assert view.data_ptr() != owner[1:, ::2].data_ptr()
    assert not _C.is_weak(view)


def test_materialize_refuses() -> None:
    with pytest.raises(ValueError, match="owns its memory already"):
        _C.materialize(torch.ones(2))
    weak = _C.weak_ref(owner := torch.ones(2))
    _C.expire(weak, "too late")
    with pytest.raises(RuntimeError, match="too late"):
        _C.materialize(weak)
    assert owner.eq(1).all()


def test_alias_is_no_view_and_stays_inside(backend: Backend) -> None:
    tensor = backend.randn(4, 4)
    alias = _C.alias(tensor, (2, 4), (4, 1), 4)
    assert torch.equal(alias, tensor[1:3])
    assert not alias._is_view()
    assert _C.alias(tensor, (0, 4), (4, 1), 16).numel() == 0
    for sizes, strides, offset in [((5, 4), (4, 1), 0), ((4, 4), (4, 1), 1), ((1,), (1,), -1)]:
        with pytest.raises(ValueError, match="does not fit in a storage of 64 bytes"):
            _C.alias(tensor, sizes, strides, offset)
    with pytest.raises(ValueError, match="2 sizes but 1 strides"):
        _C.alias(tensor, (1, 1), (1,), 0)


def test_carve_is_a_window_of_bytes() -> None:
    tensor = torch.arange(4, dtype=torch.int32)
    part = _C.carve(tensor, 4, 8)
    assert part.dtype == torch.uint8
    assert part.view(torch.int32).tolist() == [1, 2]
    with pytest.raises(ValueError, match="of a storage of 16"):
        _C.carve(tensor, 12, 8)


def test_made_under_inference_mode_is_an_inference_tensor() -> None:
    owner = torch.ones(2)
    with torch.inference_mode():
        assert _C.weak_ref(owner).is_inference()
    assert not _C.weak_ref(owner).is_inference()
