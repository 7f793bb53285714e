"""The native helper: weak tensors, their expiry and their ownership.

The compiled part is tied to the torch that it was built against, so that is checked first.
"""

import torch

from graphcache.errors import NativeModuleError

_REBUILD = (
    "Build it against the torch that you use, from a checkout of graphcache:\n"
    "    pip install --no-build-isolation --no-deps --force-reinstall ."
)

try:
    from graphcache._C._built import TORCH_VERSION as _built_for
except ImportError as error:
    raise NativeModuleError(
        f"graphcache._C is not built; the installed torch is {torch.__version__}.\n{_REBUILD}"
    ) from error

# Builds of one version for the CPU and for CUDA share the headers that the helper uses.
if _built_for.split("+")[0] != torch.__version__.split("+")[0]:
    raise NativeModuleError(
        f"graphcache._C was built for torch {_built_for}, and the installed torch is "
        f"{torch.__version__}.\n{_REBUILD}"
    )

try:
    from graphcache._C._native import (
        INPUT_BYTES,
        MAX_DIMS,
        Branches,
        Bucket,
        CopyInKernel,
        CopyInNode,
        Dispatcher,
        Entry,
        Guard,
        InputCopier,
        Lane,
        LeasedMemory,
        MutatedMemory,
        PoolLock,
        StaticObject,
        alias,
        carve,
        check_driver,
        end_host_capture,
        expire,
        is_expired,
        is_held,
        is_inlining,
        is_weak,
        materialize,
        modes,
        module_call,
        new_stream,
        owned,
        serve_bound_calls,
        serve_calls,
        serve_instance_calls,
        set_inlining,
        storage_key,
        weak_ref,
    )
except ImportError as error:
    raise NativeModuleError(
        f"graphcache._C was built for torch {_built_for} and does not load with the installed torch "
        f"{torch.__version__}: {error}\n{_REBUILD}"
    ) from error

__all__ = [
    "INPUT_BYTES",
    "MAX_DIMS",
    "Branches",
    "Bucket",
    "CopyInKernel",
    "CopyInNode",
    "Dispatcher",
    "Entry",
    "Guard",
    "InputCopier",
    "Lane",
    "LeasedMemory",
    "MutatedMemory",
    "PoolLock",
    "StaticObject",
    "alias",
    "carve",
    "check_driver",
    "end_host_capture",
    "expire",
    "is_expired",
    "is_held",
    "is_inlining",
    "is_weak",
    "materialize",
    "modes",
    "module_call",
    "new_stream",
    "owned",
    "serve_bound_calls",
    "serve_calls",
    "serve_instance_calls",
    "set_inlining",
    "storage_key",
    "weak_ref",
]
