"""Handles transfers between the host and the device inside a forward, which no graph can hold.

A value that the forward reads on the host stops the capture. A tensor that it makes of Python values is
baked in, as all Python values are (`guards`). A number fills a tensor. A list is copied from the host
once, at the first call, and later on the device.
"""

import ctypes
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from graphcache.report.reasons import Reason
from graphcache.runtime.obstacles import Obstacle
from graphcache.runtime.source_lines import is_library
from graphcache.runtime.torch_patches import HiddenMode, unpatched

_NUMBERS = (bool, int, float, complex)
_LISTS = (list, tuple, torch.Size)
_MAKES = (torch.tensor, torch.as_tensor)
_TAKES_DATA = (*_MAKES, torch.asarray, Tensor.new_tensor)
_MOVES = (Tensor.to, Tensor.cuda, Tensor.type_as)
_INDEXES = (Tensor.__getitem__, Tensor.__setitem__)
Key = tuple[torch.dtype, torch.Size, bytes]


# The user's construct for each function that reads values on the host.
_READS = {
    Tensor.item: "`.item()`",
    Tensor.__bool__: "`if tensor:`",
    Tensor.__float__: "`float(tensor)`",
    Tensor.__int__: "`int(tensor)`",
    Tensor.__index__: "a tensor as an index or in `range()`",
    Tensor.__contains__: "`value in tensor`",
    Tensor.cpu: "`.cpu()`",
    Tensor.numpy: "`.numpy()`",
    Tensor.tolist: "`.tolist()`",
    Tensor.__array__: "`numpy.asarray(tensor)`",
    Tensor.__repr__: "`print(tensor)`",
    Tensor.__format__: '`print(f"{tensor}")`',
    Tensor.__dlpack__: "`.__dlpack__()`",
}


# Functions that read their second argument in C++, where no operator shows it. It lies on the host.
_TAKES_OFFSETS = {
    "tensor_split": "`tensor_split` by a tensor",
    "tensor_split.tensor_indices_or_sections": "`tensor_split` by a tensor",
    "_pack_padded_sequence": "the lengths of `pack_padded_sequence`",
    "_pad_packed_sequence": "the batch sizes of `pad_packed_sequence`",
    "lstm": "the batch sizes of a packed sequence",
    "gru": "the batch sizes of a packed sequence",
    "rnn_tanh": "the batch sizes of a packed sequence",
    "rnn_relu": "the batch sizes of a packed sequence",
}


class HostReads(HiddenMode):
    """Finds the calls that exchange values with the host.

    Args:
        device: the device whose tensors count. Under emulation that is the CPU; there, `"cpu"` by name
            means the host, and `x.to(y.device)` does nothing, as on a GPU.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._device = device

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        func, kwargs = unpatched(func), kwargs or {}
        if func in _TAKES_DATA and _holds_tensors(args[-1] if args else kwargs.get("data")):
            self.found(Obstacle(Reason.READS_VALUE, f"`{func.__name__}([tensor, …])`"))
        elif func in _MAKES and not is_constant(func, args, kwargs, self._device):
            target = kwargs.get("device")
            on_device = target is not None and torch.device(target).type == self._device.type
            if on_device and not isinstance(args[0] if args else kwargs.get("data"), Tensor):
                self.found(Obstacle(Reason.HOST_COPY, f"`torch.{func.__name__}(…, device=…)`"))
        elif func in _READS and args[0].device == self._device:
            self.found(Obstacle(Reason.READS_VALUE, _READS[func]))
        elif (what := _TAKES_OFFSETS.get(getattr(func, "__name__", ""))) and _has_offsets(args, kwargs):
            self.found(Obstacle(Reason.READS_VALUE, what))
        elif (
            func is Tensor.data_ptr
            and args[0].device == self._device
            and not is_library(sys._getframe(1).f_code.co_filename)
        ):
            self.addressed(args[0])
        elif func is Tensor.to and args[0].device == self._device and _names_the_host(args, kwargs):
            self.found(Obstacle(Reason.READS_VALUE, "`.to('cpu')`"))
        return func(*args, **kwargs)

    def found(self, obstacle: Obstacle) -> None:
        """Handles a transfer that no graph can hold; raises by default."""
        raise obstacle.error()

    def addressed(self, tensor: Tensor) -> None:
        """Handles code past torch's operators, such as Triton's, that gets the address of `tensor`."""
        if self._device.type == "cpu":
            self.found(Obstacle(Reason.NOT_EMULATED, "`.data_ptr()` leads past the operators"))


class Constants(HiddenMode):
    """Replaces copies from the host by copies of tensors that lie on the device already.

    Args:
        device: the device of the tensors.
        made: the tensors of the first call, for a capture; None at the first call.
        on_read: called with each tensor on the host that is copied.
        on_made: called with each new tensor in `made`.

    Attributes:
        made: tensors on the device, by dtype, shape and bytes.
        used: True once a copy was replaced.
    """

    def __init__(
        self,
        device: torch.device,
        made: dict[Key, Tensor] | None = None,
        *,
        on_read: Callable[[Tensor], None] = lambda tensor: None,
        on_made: Callable[[Tensor], None] = lambda tensor: None,
    ) -> None:
        super().__init__()
        self.made: dict[Key, Tensor] = {} if made is None else made
        self.used = False
        self._is_first_call = made is None
        self._device = device
        self._on_read, self._on_made = on_read, on_made

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        func, kwargs = unpatched(func), kwargs or {}
        if func in _INDEXES and args[0].device.type == self._device.type:
            index, value = self._index(args[1]), args[2:]
            if value and type(value[0]) in (bool, int, float) and _is_by_number(index):
                value = (self._made_of(value[0], args[0].dtype),)
            return func(args[0], index, *value, **kwargs)
        if is_constant(func, args, kwargs, self._device):
            dtype = kwargs.get("dtype") or (args[0].dtype if func is Tensor.new_tensor else None)
            return self._made_of(args[-1], dtype)
        if func in _MOVES and self._device.type != "cpu" and _is_dense_on_host(args[0]):
            there, dtype = _target(func, args, kwargs)
            if _is_on(there, self._device):
                self._on_read(args[0])
                with torch._C._DisableTorchDispatch():
                    host = args[0].to(dtype or args[0].dtype)
                return self._on_device(host)
        return func(*args, **kwargs)

    def _index(self, index: Any) -> Any:
        """Returns an index with tensors for its lists of numbers."""
        if type(index) is tuple:
            return tuple(map(self._index, index))
        if type(index) is not list or not index or any(type(item) is not int for item in index):
            return index
        return self._made_of(index, None)

    def _made_of(self, data: Any, dtype: torch.dtype | None) -> Tensor:
        if type(data) in _NUMBERS:  # perhaps another number at another size
            self.used = True
            return torch.full((), data, dtype=dtype, device=self._device)
        with torch._C._DisableTorchDispatch():
            host = torch.tensor(data, dtype=dtype, device="cpu")
        return self._on_device(host)

    def _on_device(self, host: Tensor) -> Tensor:
        """Returns a new tensor on the device with the values of `host`."""
        key = host.dtype, host.shape, ctypes.string_at(host.data_ptr(), host.nbytes)
        self.used = True
        if key not in self.made:
            if not self._is_first_call:
                raise Obstacle(Reason.HOST_COPY, "other values from the host than at first,").error()
            with torch._C._DisableTorchDispatch():
                self.made[key] = host.to(self._device, copy=True)
            self._on_made(self.made[key])
        return self.made[key].clone()


def is_constant(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], device: torch.device) -> bool:
    """Return True if this call of `func` makes a tensor on `device` of numbers."""
    is_method = func is Tensor.new_tensor
    if not (is_method or func in _MAKES) or not kwargs.keys() <= {"device", "dtype"}:
        return False
    there = kwargs.get("device")
    if there is None and (is_method or device.type != "cpu"):
        there = args[0].device if is_method else torch.get_default_device()
    return len(args) == 1 + is_method and _is_on(there, device) and _is_numbers(args[-1])


def _is_on(there: Any, device: torch.device) -> bool:
    if there is None or torch.device(there).type != device.type:
        return False
    index: int | None = torch.device(there).index
    if index is None and device.index is not None and device.type != "cpu":
        index = torch.get_device_module(device).current_device()
    return index == device.index


def _is_by_number(index: Any) -> bool:
    """Return True if an index has tensors and no masks: then torch copies a value from the host."""
    tensors = [
        part for part in (index if type(index) is tuple else (index,)) if isinstance(part, Tensor)
    ]
    return bool(tensors) and not any(part.dtype in (torch.bool, torch.uint8) for part in tensors)


def _is_numbers(data: Any) -> bool:
    kind = type(data)
    return kind in (*_NUMBERS, range) or (kind in _LISTS and all(map(_is_numbers, data)))


def _holds_tensors(data: Any) -> bool:
    return type(data) in _LISTS and any(isinstance(x, Tensor) or _holds_tensors(x) for x in data)


def _has_offsets(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Return True if a tensor of offsets follows the first argument."""
    second = args[1] if len(args) > 1 else kwargs.get("tensor_indices_or_sections")
    # gru(input, hidden, weights, …) takes a tensor there, too; a packed one has its hidden state next.
    recurrent = len(args) > 3 and isinstance(args[2], (list, tuple)) and type(args[3]) is bool
    return isinstance(second, Tensor) and not recurrent


def _is_dense_on_host(tensor: Tensor) -> bool:
    """Return True if `tensor` is on the host and nothing more than its bytes in order."""
    return (
        type(tensor) is Tensor
        and tensor.device.type == "cpu"
        and tensor.layout is torch.strided
        and tensor.is_contiguous()
        and not tensor.requires_grad
        and not tensor.is_conj()
        and not tensor.is_neg()
        and not tensor.is_quantized
    )


def _target(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, torch.dtype | None]:
    """Returns the device and the dtype that a tensor is moved to; None for each that is not given."""
    if func is Tensor.type_as:
        return args[1].device, args[1].dtype
    if func is Tensor.cuda:
        return None if args[1:] or kwargs else "cuda", None
    try:
        there, dtype, _, memory_format = torch._C._nn._parse_to(*args[1:], **kwargs)
    except (TypeError, RuntimeError):
        return None, None
    return there if memory_format in (None, torch.preserve_format) else None, dtype


def _names_the_host(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    given = (*args[1:2], kwargs.get("device"))
    return any(isinstance(to, str) and to == "cpu" for to in given)
