"""The graphs of one forward: by signature, as native code knows them, and what was counted."""

import warnings
from collections.abc import Callable
from typing import Any

from torch.utils._device import DeviceContext

from graphcache import _C, config
from graphcache.call.bound_call import BoundCall
from graphcache.call.modes import is_stream_capturing
from graphcache.call.signature import Signature
from graphcache.capture.bucket import Bucket
from graphcache.config import Options
from graphcache.dispatch.entry import Entries, Entry
from graphcache.errors import GraphCacheWarning, OptionError
from graphcache.pool import GraphPool, default_pool
from graphcache.report.cache_info import Counts
from graphcache.report.reasons import Bypass


class Graphs:
    """The graphs of one forward, of one instance where it is a method.

    Args:
        function: the forward, bound; only its signature is kept.
        name: its qualified name, for messages.
        options: see `cuda_graphed`.
        instance: what it is bound to, or None; not kept.

    Attributes:
        signature: how its calls are read.
        native: what serves calls before Python is asked.
        entries: what is known of each signature.
        written: by the form of a call, which of its tensors the forward wrote.
        unsettled: how many first calls changed attributes.
        recaptures: how many captures in a row, each because `replaced` had changed.
        counts: of what is no graph's own, and of graphs that are gone.
        pool: what the last call was captured into.
    """

    def __init__(self, function: Callable[..., Any], name: str, options: Options, instance: Any) -> None:
        self.name = name
        self.options = options
        self.signature = Signature(function, options.batch_dim, options.bind)
        self.native = _C.Dispatcher(
            config.disabled_var,
            config.emulated_var,
            DeviceContext,
            is_stream_capturing,
            hasattr(instance, "training"),
        )
        self.entries = Entries()
        self.mutated: dict[Any, frozenset[int]] = {}
        self.recaptures = 0
        self.replaced = ""
        self.unsettled = 0
        self.warned: set[str] = set()
        self.counts = Counts()
        self.pool: GraphPool | None = options.pool

    def pool_for(self, call: BoundCall) -> GraphPool:
        """Returns the pool that a call's graphs belong to.

        Raises:
            Unservable: where there are no graphs on its device.
            OptionError: where the pool that was given is on another device.
        """
        device = call.tensors[0].device
        if any(tensor.device != device for tensor in call.tensors):
            raise Bypass("tensors on several devices")
        if device.type == "cpu" and not config.is_emulated():
            raise Bypass("CPU tensors (graphcache.emulate() emulates graphs there)")
        if device.type not in ("cuda", "cpu"):
            raise Bypass(f"tensors on {device.type}")
        pool = self.options.pool or self.pool
        if pool is None or (pool.device != device and self.options.pool is None):
            pool = default_pool(device)
        if pool.device != device:
            raise OptionError(
                f"graphcache: {self.name} was called with tensors on {device}, and its pool is on "
                f"{pool.device}; give it GraphPool({str(device)!r}), or no pool"
            )
        self.pool = pool
        return pool

    def publish(self, call: BoundCall, instance: Any, entry: Entry) -> None:
        """Lets native code serve calls like this one with the graphs that there are now, or eagerly."""
        if entry.native is None:
            lock = self.pool_for(call).lock
            entry.native = _C.Entry(lock, entry.guards.native, entry.mutated)
            parameters, leaves = self.signature.native(call)
            training = getattr(instance, "training", None)
            self.native.add(parameters, leaves, call.identities, training, entry.native)
        if entry.eager is not None:
            entry.native.set_eager(entry.eager)
        entry.native.set([bucket.native for bucket in entry.buckets.values()], entry.no_padding_reason is not None)

    def drop(self, entry: Entry) -> None:
        """Lets the graphs of an entry go."""
        self.withdraw(entry)
        for bucket in entry.buckets.values():
            self.retire(bucket)

    def withdraw(self, entry: Entry) -> None:
        """Ends what native code serves of it, so that Python sees its next call."""
        if entry.native is not None:
            self.native.forget(entry.native)
            entry.native = None

    def retire(self, bucket: Bucket) -> None:
        """Keeps the counts of a graph that goes."""
        self.counts.add(bucket.native)

    def warn(self, about: str, text: str) -> None:
        """Warns, once about each thing."""
        if about not in self.warned:
            self.warned.add(about)
            warnings.warn(f"graphcache: {self.name}: {text}", GraphCacheWarning, stacklevel=2)
