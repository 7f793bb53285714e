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
    from graphcache._C._native import *  # noqa: F403 (its stub is the one list of names)
except ImportError as error:
    raise NativeModuleError(
        f"graphcache._C was built for torch {_built_for} and does not load with the installed torch "
        f"{torch.__version__}: {error}\n{_REBUILD}"
    ) from error
