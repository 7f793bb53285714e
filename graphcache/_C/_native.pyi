"""Types of the native library; sizes, strides and offsets are in elements."""

from collections.abc import Callable, Sequence
from contextvars import ContextVar
from types import FrameType
from typing import Any, ClassVar, overload

from torch import Stream, Tensor, nn

INPUT_BYTES: int
MAX_DIMS: int
MAX_MOVES: int
MOVES_BYTES: int

# Tensors

@overload
def weak_ref(tensor: Tensor) -> Tensor: ...
@overload
def weak_ref(tensor: Sequence[Tensor]) -> list[Tensor]:
    """Aliases the memory of a tensor without owning it.

    Keeps dtype, device, sizes, strides, offset, and the conjugate and negative bits. Of a list, the
    tensors that share a storage share one afterwards too. After vLLM pull request 9724.

    Raises:
        TypeError: for tensor subclasses and for tensors that are not dense memory.
        RuntimeError: the stored text, if the tensor has expired.
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
    """Returns True if `weak_ref` made the storage of `tensor` and it owns no memory."""

def expire(tensor: Tensor, message: str = ...) -> None:
    """Makes every later data access through the storage of `tensor`, views included, raise.

    Args:
        tensor: any tensor with a storage; its metadata stays readable.
        message: the text of the `RuntimeError`.
    """

def is_expired(tensor: Tensor) -> bool:
    """Returns True if the data of `tensor` may no longer be touched."""

def storage_key(tensor: Tensor) -> int:
    """Identifies the storage of `tensor` for as long as somebody holds it."""

def stride_pattern(tensor: Tensor) -> tuple[int, ...]:
    """Returns what code can see of strides besides the numbers; empty for a contiguous tensor.

    Dimensions come from the outermost to the innermost. Each counts 4, plus 0 where its stride follows
    from the dimensions inside, 1 where a gap lies between, and 2 where the stride is 0.
    """

def is_held(tensor: Tensor) -> bool:
    """Returns True if another tensor (another output, a view) shares the storage of `tensor`."""

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

# Guards and static objects

class Location:
    """A place that holds a Python value.

    Args:
        container: a dict, a list, a closure cell, or an object with slots.
        key: the key, the index, or the descriptor of the slot.
        borrowed: a guard is asked before each use whether the container lives; it is not kept alive.
    """

    def __init__(self, container: object, key: object, borrowed: bool) -> None: ...

class Effect:
    """An effect of a forward on one Python value, which each replay repeats.

    Args:
        place: where the value lies.
        label: its name, for messages.
    """

    def __init__(self, place: Location, label: str) -> None: ...
    @staticmethod
    def of_object(object: StaticObject, index: int, label: str) -> Effect:
        """Returns an effect on one of the counters of whatever object is passed."""

    def expect_int(self, low: int, high: int) -> None:
        """Has graphs serve calls only if an int lies there, at least `low` and less than `high`."""

    def expect_type(self, type: type) -> None:
        """Has graphs serve calls only if a value of exactly this type lies there."""

    def store_sum(self, base: int, amount: int) -> None:
        """Has each replay store the int of effect number `base`, plus `amount`."""

    def store_constant(self, value: object) -> None:
        """Has each replay store a constant."""

    def store_output(self, output: int) -> None:
        """Has each replay store one of the further results of its graph."""

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
    def free(self, container: object, key: object) -> None:
        """Leaves the value at one place to an effect; called before the container is added."""

    def add_effect(self, effect: Effect) -> None:
        """Guards what an effect expects, and has replays repeat the effect."""

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
    def pin(self, list: list[Any]) -> None:
        """Has a list stay the same object, not only one with the same items, wherever it is."""
    def add_bytes(self, array: object, label: str) -> None:
        """Guards the bytes of an array on the host."""
    def add_reference(self, reference: object, label: str) -> None:
        """Guards that what a weak reference or proxy refers to lives on; holds the reference alone."""
    def add_source(self, container: object, key: object, value: object, label: str) -> None:
        """Guards that `container[key]` stays `value`.

        A closure cell and a context variable are containers too, whose key is ignored. So is an object
        with slots, whose key is the descriptor.
        """
    def add_absence(self, container: object, key: object, label: str) -> None:
        """Guards that `container` gets nothing for `key`."""
    def add_tensor(self, tensor: Tensor, label: str) -> None:
        """Guards the storage of a tensor, its address, and the layout in it.

        The tensor is not kept alive: a source that was added is compared before.
        """
    def keep(self, object: object) -> None:
        """Keeps an object alive that no source leads to."""
    def check(self, grad: bool) -> bool:
        """Return True if all is as it was; with `grad`, only if no tensor requires gradients either."""
    def explain(self, grad: bool) -> str | None:
        """Returns the name of the first thing that is not as it was; None if all is."""
    def is_gone(self) -> bool:
        """Return True if a failing guard can never hold again: something that it compares was freed."""

def referent(reference: object) -> Any:
    """Returns what a weak reference or proxy refers to; None where that is gone."""

class StaticObject:
    """The object that the graphs of some signatures stand for at present; known weakly.

    Attributes:
        object: that object; None once it is gone.
        calls: how often graphs were given it since it was bound.
    """

    @property
    def object(self) -> Any: ...
    @property
    def calls(self) -> int: ...
    def __init__(self) -> None: ...
    def bind(
        self,
        object: Any,
        guard: Guard,
        tensors: Sequence[Tensor],
        counters: Sequence[tuple[Any, Any]],
    ) -> None:
        """Lets the graphs stand for `object`, which holds `tensors`, as long as `guard` holds.

        `counters` are the dicts and lists in it with the keys at which effects count. The guard is known
        weakly too, and of the tensors only their versions.
        """

    def release(self) -> None:
        """Lets the graphs stand for nothing."""

    def holds(self, object: Any) -> bool:
        """Returns True if the graphs stand for `object`."""

class LeasedMemory:
    """Memory that graphs were captured over, leased to one storage after another.

    Args:
        tensor: its storage gives the memory, and is the first lessee.
    """

    def __init__(self, tensor: Tensor) -> None: ...
    def adopt(self, tensor: Tensor) -> None:
        """Moves the bytes of another storage here, and leases this memory to it; its views follow.

        Raises:
            ValueError: while the memory is leased, or for a storage of another size.
        """

    def is_leased(self) -> bool:
        """Returns True if a storage that uses this memory is alive."""

    def is_leased_to(self, tensor: Tensor) -> bool:
        """Returns True if the storage of `tensor` uses this memory."""

def owned(tensor: Tensor) -> Tensor:
    """Returns an alias that holds the memory and does not count as a lease of it."""

# Static inputs

class StaticInput:
    """One static input, and the argument that is copied there.

    Args:
        buffer: the static input, dense in whatever order of dimensions.
        argument: which tensor of a call is copied there.
        batch_dim: its batch dimension; -1 for none.
        fill: 16 bytes: an element of a padded row, repeated.
        edge: whether padded rows repeat the last row instead.
    """

    def __init__(
        self, buffer: Tensor, argument: int, batch_dim: int, fill: bytes, edge: bool
    ) -> None: ...

class InputCopier:
    """Copies the arguments of a call into the static inputs of one size, and pads them.

    Args:
        inputs: the static inputs.

    Raises:
        ValueError: for buffers that are not dense, and fills of another length.
    """

    @property
    def count(self) -> int: ...
    def __init__(self, inputs: Sequence[StaticInput]) -> None: ...
    def read(self, tensors: Sequence[Tensor], batch: int) -> bool:
        """Records the addresses of the arguments. Returns True if any differs from the last call.

        Raises:
            ValueError: for strides over more than `MAX_DIMS` dimensions.
            RuntimeError: the stored text, if an argument has expired.
        """

    def move(self, outputs: Sequence[tuple[Tensor, Tensor]]) -> bool:
        """Records outputs that move, with their memory. Returns True if any differs from last time.

        Raises:
            ValueError: for more than `MAX_MOVES`.
        """

    def copy(self) -> None:
        """Copies the recorded arguments and outputs on the CPU."""

    def copied_bytes(self) -> int:
        """Returns the bytes that a launch writes: none for an argument that is the static input."""

class CopyInKernel:
    """The kernel that copies inputs, loaded into the current CUDA context.

    Args:
        image: `copy_in_kernel.h`, compiled.
        capacity: how many inputs it was compiled for.

    Raises:
        RuntimeError: with the name of the CUDA status.
    """

    def __init__(self, image: bytes, capacity: int) -> None: ...

class CopyInNode:
    """The first node of a captured graph: it launches the kernel that copies the inputs.

    Args:
        kernel: that kernel.
        copier: the copies that the kernel makes.

    Attributes:
        nodes: the nodes of the graph, this one included.
    """

    @property
    def nodes(self) -> int: ...
    def __init__(self, kernel: CopyInKernel, copier: InputCopier) -> None: ...
    def record(self, stream: int) -> None:
        """Launches the kernel on a stream that is capturing."""

    def attach(self, graph: int, executable: int) -> None:
        """Finds this node in the graph (`cudaGraph_t`) that was captured, to patch its executable."""

def check_driver() -> None:
    """Raises a `RuntimeError` with the name of the entry point that the CUDA driver lacks."""

# Traces

def profile_calls(callback: Callable[[FrameType, str, Any], None], skipped: str) -> None:
    """Has the calls of this thread reported, as `sys.setprofile` does, until another profile is set.

    Args:
        callback: takes a frame, "call", "return" or "c_call", and the result or the function of C.
        skipped: code in files whose names begin with this is not reported.
    """

# Captures

def new_stream() -> int:
    """Returns the handle of a stream of the current device that nobody else is given."""

class Branches:
    """Captures matrix products in parallel, in this thread, as long as a block lasts.

    Only those that follow one another on the main stream, and of which none reads or writes the
    memory that another writes.

    Args:
        handle: of the main stream.
        main: that stream itself.
        sides: the streams of the branches.

    Attributes:
        count: products that run in parallel to an earlier one.
        large: operators that stayed in their place for their size alone.
    """

    @property
    def count(self) -> int: ...
    @property
    def large(self) -> int: ...
    def __init__(self, handle: int, main: Stream, sides: Sequence[Stream]) -> None: ...
    def __enter__(self) -> Branches: ...
    def __exit__(self, *error: object) -> None: ...

# Calls and results

class Layout:
    """The layout of nested values, tensors taken out; see `graphcache.call.pytree`.

    `assemble` makes a container of a list of children.
    """

    @staticmethod
    def tensor() -> Layout:
        """Stands for a tensor."""

    @staticmethod
    def constant(value: object) -> Layout:
        """Stands for a value that has to be identical."""

    @staticmethod
    def static_object(slot: StaticObject) -> Layout:
        """Stands for the object that a slot holds."""

    @staticmethod
    def sequence(type: type, children: Sequence[Layout], assemble: Callable[[list[Any]], Any]) -> Layout:
        """Stands for a list, a tuple or a named tuple."""

    @staticmethod
    def mapping(
        type: type,
        children: Sequence[Layout],
        keys: Sequence[Any],
        factory: Callable[[], Any] | None,
        assemble: Callable[[list[Any]], Any],
    ) -> Layout:
        """Stands for a dictionary; `factory` is that of a `defaultdict`."""

    @staticmethod
    def fields(
        type: type,
        children: Sequence[Layout],
        names: Sequence[str],
        keys: tuple[Any, ...] | None,
        assemble: Callable[[list[Any]], Any],
    ) -> Layout:
        """Stands for a dataclass; `keys` are those of one that is a dictionary too."""

class Role:
    """The role of one tensor argument."""

    BATCHED: ClassVar[Role]
    """Copied in and padded."""

    WHOLE: ClassVar[Role]
    """Copied in as it is."""

    BOUND: ClassVar[Role]
    """Read at its address."""

class Leaf:
    """One tensor argument of a signature.

    Args:
        role: see `Role`.
        batch_dim: where the batch would lie; -1 where the tensor has too few dimensions.
        carries_batch: whether that dimension is as long as the batch.
        must_be_weak: too large to be copied in, unless it is the output of a graph.
        pattern: see `stride_pattern`.
        exact: strides that calls have to repeat, and the storage offset; -1 for any. Empty: all any.
        inference: whether it has to be an inference tensor; None for either.
        example: a tensor with the metadata that calls have to repeat.
    """

    def __init__(
        self,
        role: Role,
        batch_dim: int,
        carries_batch: bool,
        must_be_weak: bool,
        pattern: Sequence[int],
        exact: Sequence[int],
        inference: bool | None,
        example: Tensor,
    ) -> None: ...

class Parameter:
    """One parameter of a forward, as a signature has it.

    Args:
        layout: of its argument.
        position: among the positional arguments; -1 for none.
        name: None where it can't be given by name.
        ordered: it lands in `**kwargs`, which keeps the caller's order.
    """

    def __init__(self, layout: Layout, position: int, name: str | None, ordered: bool) -> None: ...
    def set_default(self, function: object, key: int | str) -> None:
        """Lets the parameter have a default of `function`: by number from the end, or by name."""

class OutputKind:
    """The origin of one output tensor."""

    POOL: ClassVar[OutputKind]
    """In memory of the graph."""

    EXTERNAL: ClassVar[OutputKind]
    """The very tensor that the forward found outside."""

    EXTERNAL_VIEW: ClassVar[OutputKind]
    """A view of memory that the forward found outside."""

    ARGUMENT: ClassVar[OutputKind]
    """An argument itself."""

    ARGUMENT_VIEW: ClassVar[OutputKind]
    """A view of an argument."""

    CONSTANT: ClassVar[OutputKind]
    """On the host: each caller gets a copy."""

class Output:
    """One tensor of the result of a graph.

    Args:
        kind: see `OutputKind`.
        tensor: as captured; of a view of an argument, the offset counts from that.
        argument: which argument it is or views; of one in the pool, the argument that eager returns
            a view of, and the graph a copy. -1 for none.
    """

    def __init__(self, kind: OutputKind, tensor: Tensor, argument: int) -> None: ...

class Result:
    """The result of one captured size.

    Args:
        layout: how its tensors nest.
        outputs: those tensors, in order.
        copy: whether held outputs move out when they are overwritten.
    """

    def __init__(self, layout: Layout, outputs: Sequence[Output], copy: bool) -> None: ...

# Replay

class PoolLock:
    """One graph of a pool is dispatched at a time. The same thread may take the lock again."""

    def __init__(self) -> None: ...
    def __enter__(self) -> None: ...
    def __exit__(self, *error: object) -> None: ...
    def renew(self) -> None:
        """Frees the lock, in the child of a fork."""

class Lane:
    """The shared outputs of one lane; they are invalidated with it.

    Args:
        arena: the memory of the lane, which is held until then.

    Attributes:
        stream: the handle of the stream that the last replay was launched on.
    """

    stream: int
    def __init__(self, arena: Any) -> None: ...
    def holds_outputs(self) -> bool:
        """Returns True if somebody holds an output that the next replay would overwrite."""

    def is_held_elsewhere(self) -> bool:
        """Returns True if such an output was given to another thread."""

class Launch:
    """The way to run a graph.

    Args:
        copier: copies its inputs; None where `copy_in` does.
        node: its first node, if that copies the inputs.
        copy_in: copies the inputs by torch calls, given tensors and batch.
        replay: launches the graph; None where the node does.
    """

    def __init__(
        self,
        copier: InputCopier | None,
        node: CopyInNode | None,
        copy_in: Callable[[list[Tensor], int], None],
        replay: Callable[[], None] | None,
    ) -> None: ...

class Versions:
    """The version counters of tensors, which torch advances with each write in place that it knows of.

    Keeps no tensor alive.

    Args:
        tensors: any tensors; those of inference mode have no counter.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None: ...
    def current(self) -> list[int]:
        """Returns the versions of now, in the order of the tensors."""

    def drop(self, index: int) -> None:
        """Counts the writes to one of the tensors no longer."""

class Bucket:
    """One captured size.

    Args:
        name: of the forward, for messages.
        size: rows.
        lane: whose memory its graph writes to.
        launch: how to run its graph.
        result: what it returns.
        guard: what its graph depends on; referred to weakly.
        mutated: the memory that its graph writes to besides its own.

    Attributes:
        check_budget: how many padded calls it may serve until one is compared with eager.
        versions: of what its graph reads; a write to that ends what is proved. None for no such thing.
        time_at: replays after which Python serves a call, to time it.
        forward_name: for messages.
        retired: its graph is released, and Python serves such calls.
        expired: held outputs that its replays made unreadable.
        copied: held outputs that its replays moved out.
    """

    check_budget: int
    versions: Versions | None
    time_at: int
    replays: int
    padded_rows: int
    @property
    def forward_name(self) -> str: ...
    @property
    def size(self) -> int: ...
    @property
    def retired(self) -> bool: ...
    @property
    def expired(self) -> int: ...
    @property
    def copied(self) -> int: ...
    def __init__(
        self,
        name: str,
        size: int,
        lane: Lane,
        launch: Launch,
        result: Result,
        guard: Guard,
        mutated: MutatedMemory,
    ) -> None: ...
    def retire(self) -> None:
        """Releases its graph, for good."""

    def prove(self, batch: int) -> None:
        """Records that calls of `batch` rows, fewer than its size, were compared with eager."""

    def is_proved(self, batch: int) -> bool:
        """Returns True if that was recorded, and nothing was written since that `versions` count."""

    def serves(self, batch: int) -> bool:
        """Returns True if a call of `batch` rows is served without another comparison."""

    def set_batch_dims(self, dims: Sequence[Sequence[int]]) -> None:
        """Sets for each output the dimensions that are cut back to the batch."""

    def run(self, tensors: list[Tensor], batch: int, call: int, stream: int, repeat: bool = ...) -> Any:
        """Serves one call, with the lock of the pool held, and returns its result.

        Without `repeat`, effects on Python values are left out, and the tensors among them are returned
        together with the result.
        """

class MutatedMemory:
    """The memory that the graphs of one signature write to besides their own.

    Args:
        external: tensors to whose storages they write.
        bound: positions of the arguments that they write to.
        copied_in: positions of the arguments that are copied in.

    Attributes:
        versions_of_arguments: positions of the arguments whose versions replays raise.
    """

    versions_of_arguments: Sequence[int]

    def __init__(
        self, external: Sequence[Tensor], bound: Sequence[int], copied_in: Sequence[int]
    ) -> None: ...
    def add_version(self, tensor: Tensor, objects: Sequence[StaticObject]) -> None:
        """Adds a tensor whose version replays raise, perhaps one of an object of `objects`."""

    def overlaps(self, arguments: Sequence[Tensor]) -> bool:
        """Returns True if an argument that is copied in lies in memory that is mutated."""

class Entry:
    """The graphs of one signature.

    Args:
        lock: of their pool.

    Attributes:
        last: the number of the last call that was served natively.
    """

    @property
    def last(self) -> int: ...
    def __init__(self, lock: PoolLock) -> None: ...
    def set(self, buckets: Sequence[Bucket], unpadded: bool) -> None:
        """Replaces the graphs, by ascending size; `unpadded` ones serve no smaller batches."""

    def set_eager(self, reason: str) -> None:
        """Sets the reason why such calls run eagerly for good."""

class Dispatcher:
    """Finds the result of a call by its arguments, without Python.

    Args:
        disabled: the context variable of `graphcache.disabled`.
        emulated: that of `graphcache.emulate`.
        device_mode: the type of torch's mode behind `set_default_device`.
        capturing: returns True if somebody captures on the current stream; for where no driver is asked.
        has_training: calls come with an instance whose `training` counts.

    Attributes:
        capsule: the way from `serve_calls` to this dispatcher.
        calls: how many calls there were; Python adds those that it served.
        batches: how many calls had so many rows; a copy.
    """

    calls: int
    batches: dict[int, int]
    @property
    def capsule(self) -> object: ...
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
        parameters: Sequence[Parameter],
        leaves: Sequence[Leaf],
        identities: Sequence[int],
        training: bool | None,
        entry: Entry,
    ) -> None:
        """Adds a signature, under the modes of now.

        Args:
            parameters: in the order of the forward.
            leaves: the tensors of all arguments, in order.
            identities: for each leaf, the first one that is the same tensor.
            training: the `training` of the instance, or None.
            entry: serves such calls.
        """

    def count(self, batch: int) -> None:
        """Counts a call that Python serves in `batches`."""

    def forget(self, entry: Entry) -> None:
        """Removes the signatures that an entry serves."""

    def eager_reason(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Returns why the call that was just missed runs eagerly for good, and counts the call.

        Returns None where no reason is known, and for any other call than that one.
        """

def serve_calls(type: type) -> None:
    """Has calls of the instances of a wrapper class served natively, as far as they can be."""

def serve_instance_calls(type: type, is_alone: Callable[[Any, Any], bool]) -> None:
    """Does the same for the wrapper of one instance's forward, which a copy of the instance may share.

    Args:
        type: the wrapper class.
        is_alone: given a wrapper and its module, returns False if the call is of a copy of the module.
    """

def serve_bound_calls(type: type) -> None:
    """Does the same for the class of its bound wrappers."""

def module_call(
    served: tuple[Any, ...], forward: object, called_module: Callable[[], Any]
) -> Callable[..., Any]:
    """Returns what calls a module: natively while it has no hooks and `forward` is its forward.

    Args:
        served: the way to the dispatcher; see `_Caches.served` in `graphcache.wrappers`.
        forward: the wrapper of its forward.
        called_module: returns the module whose call is under way, or None.
    """

def modes(device_mode: type) -> tuple[Any, ...] | None:
    """Returns the modes of torch that graphs depend on; None while a foreign TorchFunctionMode is on."""

def set_inlining(on: bool) -> bool:
    """Switches whether graphed forwards run as they are in this thread; returns the previous state."""

def is_inlining() -> bool:
    """Returns True if graphed forwards run as they are in this thread."""
