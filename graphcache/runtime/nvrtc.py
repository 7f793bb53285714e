"""Compiles the copy-in kernel for the current GPU, with the NVRTC that torch brings."""

import ctypes
from functools import cache
from pathlib import Path

import torch

from graphcache import _C

_SOURCE = Path(_C.__file__).parent / "copy_in_kernel.h"
# Inputs that a kernel takes. To patch the kernel's parameter costs a nanosecond a byte, so there are
# several capacities. Together with the moves of outputs, parameters may have 4 KiB, and 32,764 bytes
# from CUDA 12.1 on.
_LIMITS = ((bytes_ - _C.MOVES_BYTES) // _C.INPUT_BYTES for bytes_ in (4096, 32764))
_CAPACITIES = (2, 4, 8, 12, 16, *_LIMITS)


class CompileError(RuntimeError):
    """NVRTC is missing or did not take the kernel."""


def copy_in_kernel(device: torch.device, inputs: int) -> _C.CopyInKernel:
    """Returns the kernel that copies up to `inputs` inputs in, compiled when first needed.

    Args:
        device: a CUDA device, which is the current one.
        inputs: the number of static inputs of a graph.

    Raises:
        CompileError: where there is no NVRTC, or more inputs than a kernel's parameter holds.
        RuntimeError: where the driver lacks an entry point, or does not load the kernel.
    """
    capacity = next((capacity for capacity in _CAPACITIES if inputs <= capacity), None)
    if capacity is None:
        raise CompileError(f"{inputs} inputs do not fit into the parameter of one kernel")
    return _loaded(device, capacity)


@cache
def _loaded(device: torch.device, capacity: int) -> _C.CopyInKernel:
    _C.check_driver()
    major, minor = torch.cuda.get_device_capability(device)
    options = f"--gpu-architecture=sm_{major}{minor}".encode(), b"-DGRAPHCACHE_CAPACITY=%d" % capacity
    return _C.CopyInKernel(_compile(_SOURCE.read_bytes(), options), capacity)


def _compile(source: bytes, options: tuple[bytes, ...]) -> bytes:
    try:
        nvrtc = torch.cuda._utils._get_gpu_rtc_library()
    except (OSError, AttributeError) as error:
        raise CompileError(f"no NVRTC: {error}") from error
    program = ctypes.c_void_p()
    _check(nvrtc, nvrtc.nvrtcCreateProgram(ctypes.byref(program), source, b"copy_in.cu", 0, None, None))
    try:
        arguments = (ctypes.c_char_p * len(options))(*options)
        if nvrtc.nvrtcCompileProgram(program, len(options), arguments) != 0:
            raise CompileError(_read(nvrtc, program, "ProgramLog").decode(errors="replace"))
        return _read(nvrtc, program, "CUBIN")
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


def _read(nvrtc: ctypes.CDLL, program: ctypes.c_void_p, part: str) -> bytes:
    size = ctypes.c_size_t()
    _check(nvrtc, getattr(nvrtc, f"nvrtcGet{part}Size")(program, ctypes.byref(size)))
    text = ctypes.create_string_buffer(size.value)
    _check(nvrtc, getattr(nvrtc, f"nvrtcGet{part}")(program, text))
    return text.raw


def _check(nvrtc: ctypes.CDLL, status: int) -> None:
    if status != 0:
        name = nvrtc.nvrtcGetErrorString
        name.restype = ctypes.c_char_p
        raise CompileError(f"NVRTC failed with {name(status).decode()}")
