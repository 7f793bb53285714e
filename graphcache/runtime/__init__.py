"""Captures and replays graphs on a device: on CUDA, or emulated on the CPU.

Comes in: a function that runs the forward over static inputs, and the arena to allocate from. Goes
out: a `Graph` that replays the function's operations. `base` has the protocols; `cuda` and `emulated`
implement them; `branches` and `nvrtc` serve `cuda`. `obstacles` and `host_transfers` find what no
graph can hold, on both runtimes; `op_schemas` reads schemas; the `torch_*` files patch, save and restore
state of torch; `undo_log` puts back what operations overwrote; `source_lines` names the user's line;
`deferred` serves loops that read their device's answers late.

All that differs between devices lies here. Nothing here knows of signatures, sizes or guards. It may
import `errors`, `config`, `report` and `_C`.
"""

import torch

from graphcache.runtime.base import Runtime


def runtime_for(device: torch.device) -> Runtime:
    """Returns the runtime that serves tensors on `device`."""
    if device.type == "cuda":
        from graphcache.runtime.cuda import CudaRuntime

        return CudaRuntime()
    from graphcache.runtime.emulated import EmulatedRuntime

    return EmulatedRuntime()
