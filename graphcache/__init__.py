"""CUDA graphs for any `nn.Module`: one decorator, one memory pool, never silently wrong."""

from graphcache._C import expire, is_expired, weak_ref
from graphcache.config import disabled, emulate
from graphcache.decorators import cuda_graphed
from graphcache.errors import (
    CaptureError,
    CheckError,
    GraphCacheError,
    GraphCacheWarning,
    NativeModuleError,
    OptionError,
)
from graphcache.pool import GraphPool, default_pool
from graphcache.report.cache_info import CacheInfo
from graphcache.report.suggest_sizes import Suggestion

__version__ = "0.1.0"

__all__ = [
    "CacheInfo",
    "CaptureError",
    "CheckError",
    "GraphCacheError",
    "GraphCacheWarning",
    "GraphPool",
    "NativeModuleError",
    "OptionError",
    "Suggestion",
    "cuda_graphed",
    "default_pool",
    "disabled",
    "emulate",
    "expire",
    "is_expired",
    "weak_ref",
]
