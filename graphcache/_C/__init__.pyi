"""Types of the native helper; sizes, strides and offsets are in elements."""

from collections.abc import Callable, Sequence
from contextvars import ContextVar
from typing import Any, overload

from torch import Stream, Tensor, nn

__all__ = [
    "INPUT_BYTES",
    "MAX_DIMS",
    "Bucket",
    "CopyInKernel",
    "CopyInNode",
    "Dispatcher",
    "Entry",
    "Guard",
    "InputCopier",
    "Lane",
    "MutatedMemory",
    "PoolLock",
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
    "serve_bound_calls",
    "serve_calls",
    "serve_instance_calls",
    "set_inlining",
    "storage_key",
    "weak_ref",
]

INPUT_BYTES: int
MAX_DIMS: int

@overload
def weak_ref(tensor: Tensor) -> Tensor: ...
@overload
def weak_ref(tensor: Sequence[Tensor]) -> list[Tensor]:
    """Returns an alias of a tensor that does not own its memory, or a list of such aliases.

    The alias keeps dtype, device, sizes, strides, offset, and the conjugate and negative bits. Tensors
    of a list that share a storage still share one afterwards. The idea is vLLM's (pull request 9724).

    Raises:
        TypeError: if a tensor is of a subclass, or does not lie in dense memory.
        RuntimeError: if the tensor has expired; the text is that of `expire`.
    """

def alias(
    tensor: Tensor,
    sizes: Sequence[int],
    strides: Sequence[int],
    offset: int,
    like: Tensor | None = None,
) -> Tensor:
    """Returns a new tensor on the storage of `tensor`, which is not a view in autograd's sense.

    Its dtype, conjugate and negative bits are those of `like` (default: `tensor`).

    Raises:
        ValueError: if it would reach outside the storage.
    """

def carve(tensor: Tensor, offset: int, nbytes: int) -> Tensor:
    """Returns a weak `uint8` tensor of shape `(nbytes,)` over a part of the storage of `tensor`.

    Args:
        tensor: any tensor with a storage.
        offset: in bytes, from the start of the storage.
        nbytes: its length, in bytes.

    Raises:
        ValueError: if the part lies outside the storage.
    """

def is_weak(tensor: Tensor) -> bool:
    """Tells whether `weak_ref` made the storage of `tensor` and it owns no memory."""

def expire(tensor: Tensor, message: str = ...) -> None:
    """Makes every later access to the data of `tensor`, also through its views, raise.

    Args:
        tensor: any tensor with a storage. Shape, dtype and device stay readable.
        message: the text of the `RuntimeError`.
    """

def is_expired(tensor: Tensor) -> bool:
    """Returns True if the data of `tensor` has expired: accessing it raises."""

def storage_key(tensor: Tensor) -> int:
    """Identifies the storage of `tensor` for as long as somebody holds it."""

def is_held(tensor: Tensor) -> bool:
    """Tells whether any tensor but this one (another output, a view) shares its storage."""

def materialize(tensor: Tensor) -> None:
    """Moves a weak tensor, with all its views, into memory of its own, on the current stream.

    Raises:
        ValueError: if the tensor is not weak.
    """

def end_host_capture(pool_first: int, pool_second: int) -> None:
    """Ends a failed capture in the allocator of pinned host memory (torch 2.11 does not).

    Args:
        pool_first: the first half of the pool's id.
        pool_second: the second half.

    Raises:
        RuntimeError: if no capture into that pool is under way there.
    """

class Guard:
    """Compares the things that the graphs of one signature depend on besides their arguments.

    Each method `add_…` takes one of them as it is now, with a label that names it in messages. Modules
    and objects are known weakly. A dict is added after the thing that holds it. An empty guard never
    fails.

    Args:
        names: the attributes that count; None for all.
        grads: whether tensors have to keep their `requires_grad`.
    """

    def __init__(self, names: frozenset[str] | None = ..., grads: bool = ...) -> None: ...
    def add_module(self, module: nn.Module, label: str, is_root: bool = ...) -> None:
        """Guards the class, attributes, parameters, buffers and children of a module.

        They have to stay the same objects, or equal numbers and texts. Only the root may have hooks.
        """
    def add_object(self, object: object, label: str) -> None:
        """Guards the class and the attributes of an object."""
    def add_dict(self, dict: dict[Any, Any], label: str, named: bool, held: bool) -> None:
        """Guards the entries of a dict; with `named`, only those with keys in `names`.

        Args:
            dict: the dict.
            label: its name.
            named: see above.
            held: something that was added before keeps the dict alive as long as it does not change.
        """
    def add_items(self, items: list[Any] | set[Any], label: str) -> None:
        """Guards the items of a list or a set."""
    def add_bytes(self, array: object, label: str) -> None:
        """Guards the bytes of an array on the host."""
    def add_source(self, container: object, key: object, value: object, label: str) -> None:
        """Guards that `container[key]` stays `value`.

        A closure cell and a context variable are containers too, whose key is ignored. So is an object
        with slots, whose key is the descriptor.
        """
    def add_absence(self, container: object, key: object, label: str) -> None:
        """Guards that `container` gets nothing for `key`."""
    def add_tensor(self, tensor: Tensor, label: str) -> None:
        """Guards the storage of a tensor, its address, and the layout in it."""
    def check(self, grad: bool) -> bool:
        """Return True if all is as it was; with `grad`, only if no tensor requires gradients either."""
    def explain(self, grad: bool) -> str | None:
        """Returns the name of the first thing that is not as it was; None if all is."""

# Staging

class InputCopier:
    """What copies the arguments of a call into the static inputs of one size, and pads them.

    Args:
        buffers: the static inputs, each dense in whatever order of dimensions.
        arguments: for each, which tensor of a call it takes.
        batch_dims: for each, its batch dimension; -1 for none.
        fills: for each, 16 bytes: an element of a padded row, repeated.
        edges: for each, whether padded rows repeat the last one instead.

    Raises:
        ValueError: for buffers that are not dense, and fills of another length.
    """

    count: int
    def __init__(
        self,
        buffers: Sequence[Tensor],
        arguments: Sequence[int],
        batch_dims: Sequence[int],
        fills: Sequence[bytes],
        edges: Sequence[bool],
    ) -> None: ...
    def read(self, tensors: list[Tensor], batch: int) -> bool:
        """Takes down where the arguments lie; True if anything differs from the last call.

        Raises:
            ValueError: for strides over more than `MAX_DIMS` dimensions.
            RuntimeError: the stored text, if an argument has expired.
        """

    def copy(self) -> None:
        """Copies on the CPU what `read` took down."""

    def copied_bytes(self) -> int:
        """Returns how much a launch writes; an argument that is the static input itself is not."""

class CopyInKernel:
    """The staging kernel, loaded into the current CUDA context.

    Args:
        image: `copy_in_kernel.h`, compiled.
        capacity: how many inputs it was compiled for.

    Raises:
        RuntimeError: with the name of the CUDA status.
    """

    def __init__(self, image: bytes, capacity: int) -> None: ...

class CopyInNode:
    """The first node of a captured graph.

    Args:
        kernel: what it launches.
        stage: what tells it from where to where.
    """

    nodes: int
    def __init__(self, kernel: CopyInKernel, stage: InputCopier) -> None: ...
    def record(self, stream: int) -> None:
        """Launches the kernel on a stream that is capturing."""

    def attach(self, graph: int, executable: int) -> None:
        """Finds its node in the graph (`cudaGraph_t`) that was captured, to patch its executable."""

def new_stream() -> int:
    """Returns the handle of a stream of the current device that nobody else is given."""

class Branches:
    """Captures matrix products beside one another, in this thread, as long as a block lasts.

    Only those that follow one another on the main stream, and of which none reads or writes what
    another writes.

    Args:
        handle: of the main stream.
        main: that stream itself.
        sides: the streams of the branches.
    """

    count: int
    """Products that run beside an earlier one."""

    large: int
    """Operators that were left in their place for their size alone."""

    def __init__(self, handle: int, main: Stream, sides: Sequence[Stream]) -> None: ...
    def __enter__(self) -> Branches: ...
    def __exit__(self, *error: object) -> None: ...

def check_driver() -> None:
    """Raises a `RuntimeError` with the name of the entry point that the CUDA driver lacks."""

# Dispatch

class PoolLock:
    """One graph of a pool is dispatched at a time. The same thread may take it again."""

    def __enter__(self) -> None: ...
    def __exit__(self, *error: object) -> None: ...
    def renew(self) -> None:
        """Makes it free again, in the child of a fork."""

class StaticObject:
    """The object that the graphs of some signatures stand for at present; known weakly.

    Attributes:
        object: it; None once it is gone.
        calls: how often graphs were given it since it was bound.
    """

    @property
    def object(self) -> Any: ...
    @property
    def calls(self) -> int: ...
    def __init__(self) -> None: ...
    def bind(self, object: Any, guard: Guard) -> None:
        """Lets it stand for `object`, as long as `guard` holds; that is known weakly too."""
    def release(self) -> None:
        """Lets it stand for nothing."""
    def holds(self, object: Any) -> bool:
        """Tells whether it stands for `object`."""

class LeasedMemory:
    """Memory that graphs were captured over, lent to one storage after another.

    Args:
        tensor: whose storage gives it, and is the first that it is lent to.
    """

    def __init__(self, tensor: Tensor) -> None: ...
    def adopt(self, tensor: Tensor) -> None:
        """Moves the bytes of another storage here, and lends it this memory; its views follow.

        Raises:
            ValueError: while it is lent, or for a storage of another size.
        """
    def is_leased(self) -> bool:
        """Tells whether a storage that uses it is alive."""
    def is_leased_to(self, tensor: Tensor) -> bool:
        """Tells whether the storage of `tensor` uses it."""

def owned(tensor: Tensor) -> Tensor:
    """Returns an alias that keeps the memory alive and, where that is lent, is no use of it."""

class Lane:
    """The outputs that one lane has handed out; they expire with it.

    Attributes:
        stream: the handle of the stream that the last replay was launched on.
    """

    stream: int
    def holds_outputs(self) -> bool:
        """Tells whether somebody holds an output that the next replay would overwrite."""
    def is_held_elsewhere(self) -> bool:
        """Tells the same of outputs that were given to another thread."""

class Bucket:
    """One captured size.

    Args:
        name: of the forward, for messages.
        size: rows.
        lane: whose memory it writes to.
        stage: what copies its inputs; None where `fill` does.
        node: its staging node, if it has one.
        fill: copies the inputs by torch calls, given tensors and batch.
        replay: launches the graph; None where the node does.
        layout: of its result; see `graphcache.tree.native`.
        outputs: see `graphcache.outputs.Output.native`.
        copy: whether held outputs are moved when they are overwritten.

    Attributes:
        trusted: how many padded calls it may serve until one is compared with eager.
        time_at: replays after which Python serves a call, to time it.
        retired: it has let go of its graph, and Python serves such calls.
        expired: held outputs that its replays made unreadable.
        copied: held outputs that its replays moved away.
    """

    size: int
    check_budget: int
    time_at: int
    retired: bool
    replays: int
    padded_rows: int
    @property
    def expired(self) -> int: ...
    @property
    def copied(self) -> int: ...
    def __init__(
        self,
        name: str,
        size: int,
        lane: Lane,
        stage: InputCopier | None,
        node: CopyInNode | None,
        fill: Callable[[list[Tensor], int], None],
        replay: Callable[[], None] | None,
        layout: tuple[Any, ...],
        outputs: Sequence[tuple[int, Tensor, int]],
        copy: bool,
    ) -> None: ...
    def retire(self) -> None:
        """Lets go of its graph, for good."""

    def set_batch_dims(self, dims: Sequence[Sequence[int]]) -> None:
        """Says for each output which of its dimensions are cut back to the batch."""

    def run(self, tensors: list[Tensor], batch: int, call: int, stream: int) -> Any:
        """Serves one call, with the lock of the pool held, and returns its result."""

class MutatedMemory:
    """What the graphs of one signature write besides their own memory.

    Args:
        outside: tensors to whose storages they write.
        bound: positions of the arguments that they write to.
        staged: positions of the arguments that are copied before.
    """

    def __init__(
        self, outside: Sequence[Tensor], bound: Sequence[int], staged: Sequence[int]
    ) -> None: ...
    def overlaps(self, arguments: Sequence[Tensor]) -> bool:
        """Tells whether an argument that is copied lies in what is written."""

class Entry:
    """The graphs of one signature.

    Args:
        lock: of their pool.
        guard: what they depend on; referred to weakly.
        mutated: what they write besides their own memory.

    Attributes:
        last: the number of the last call that they served natively.
    """

    @property
    def last(self) -> int: ...
    def __init__(self, lock: PoolLock, guard: Guard, mutated: MutatedMemory) -> None: ...
    def set(self, buckets: Sequence[Bucket], exact: bool) -> None:
        """Replaces the graphs, by ascending size; `exact`: they serve no smaller batches."""
    def set_eager(self, why: str) -> None:
        """Says that such calls run eagerly for good, and why."""

class Dispatcher:
    """From the arguments of a call to its result, without Python.

    Args:
        disabled: the context variable of `graphcache.disabled`.
        emulated: that of `graphcache.emulate`.
        device_mode: the type of torch's mode behind `set_default_device`.
        capturing: tells whether somebody captures on the current stream, where the driver is not asked.
        has_training: calls come with an instance whose `training` counts.

    Attributes:
        capsule: what `serve_calls` finds it by.
        calls: how many calls there were; Python adds those that it served.
        batches: how many calls had so many rows; a copy.
    """

    capsule: object
    signatures: int
    calls: int
    batches: dict[int, int]
    def __init__(
        self,
        disabled: ContextVar[bool],
        emulated: ContextVar[bool],
        device_mode: type,
        capturing: Callable[[], bool],
        has_training: bool,
    ) -> None: ...
    def add(
        self,
        parameters: Sequence[Any],
        leaves: Sequence[Any],
        same: Sequence[int],
        training: bool | None,
        entry: Entry,
    ) -> None:
        """Adds a signature, under today's modes; see `graphcache.signature.Signature.native`."""

    def count(self, batch: int) -> None:
        """Counts a call that Python serves in `batches`."""

    def forget(self, entry: Entry) -> None:
        """Removes the signatures that an entry serves."""

    def serve(self, args: tuple[Any, ...], kwargs: dict[str, Any], instance: Any) -> Any:
        """Returns the result of a call, or a certain object where Python has to serve it."""

    def why_eager(self, args: tuple[Any, ...], kwargs: dict[str, Any], instance: Any) -> Any:
        """Says why such a call runs eagerly for good, and counts it; None where that is not known."""

def serve_calls(type: type) -> None:
    """Has calls of the instances of a wrapper class served natively, as far as they can be."""

def serve_instance_calls(type: type) -> None:
    """The same for the wrapper of one instance's forward, which a copy of the instance may share."""

def serve_bound_calls(type: type) -> None:
    """The same for the class of its bound wrappers."""

def module_call(served: tuple[Any, ...], forward: object) -> Callable[..., Any]:
    """Returns what calls a module: natively while it has no hooks and `forward` is its forward."""

def modes(device_mode: type) -> tuple[Any, ...] | None:
    """Returns the modes of torch that graphs depend on; None while a foreign TorchFunctionMode is on."""

def set_inlining(on: bool) -> bool:
    """Switches whether graphed forwards run as they are in this thread; returns what was before."""

def is_inlining() -> bool:
    """Tells whether graphed forwards run as they are in this thread."""
