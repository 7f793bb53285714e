"""Captures and replays graphs on a device: on CUDA, or emulated on the CPU.

Comes in: a function that runs the forward over static inputs, and the arena to allocate from. Goes
out: a `Graph` that replays the function's operations. `base` has the protocols; `cuda` and `emulated`
implement them; `branches` and `nvrtc` serve `cuda`. `op_info` and `host_transfers` find what no graph
can hold, on both runtimes; the `torch_*` files patch, save and restore state of torch; `source_lines`
names the user's line.

All that differs between devices lies here. Nothing here knows of signatures, sizes or guards. It may
import `errors`, `config`, `report` and `_C`.
"""
