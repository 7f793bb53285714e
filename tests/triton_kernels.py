"""A kernel that is launched past torch's operators: in a file of its own, as Triton reads its source."""

import triton
import triton.language as tl


@triton.jit
def add_one(x, count: tl.constexpr):
    at = tl.arange(0, count)
    tl.store(x + at, tl.load(x + at) + 1)


@triton.autotune([triton.Config({"block": 16}), triton.Config({"block": 64})], key=["count"])
@triton.jit
def double(x, y, count, block: tl.constexpr):
    at = tl.program_id(0) * block + tl.arange(0, block)
    tl.store(y + at, tl.load(x + at, mask=at < count) * 2, mask=at < count)
