"""Wrappers that take the place of a forward: they ask native code first, then the graph cache."""

import copy
import gc
import inspect
import re
import sys
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from traceback import walk_stack
from types import FrameType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
import wrapt
from torch import nn
from torch.compiler import is_compiling

from graphcache import _C
from graphcache.config import Options
from graphcache.dispatch.cache import GraphCache
from graphcache.errors import GraphCacheError, OptionError
from graphcache.report.cache_info import CacheInfo
from graphcache.report.suggest_sizes import Suggestion
from graphcache.runtime.source_lines import warn


class _Caches:
    """The graph cache of each instance, by identity, for as long as the instance lives.

    Not attributes of the instances: those would end up in its copies, its pickles and its state.
    """

    def __init__(self, options: Options) -> None:
        self.options = options
        # Native code looks the last item up by the same id.
        self.by_id: dict[int, tuple[weakref.ref[Any], GraphCache, Any]] = {}

    def of(self, function: Callable[..., Any], instance: Any) -> GraphCache:
        """Returns the cache of `instance`, or of the function itself where there is none."""
        owner = self if instance is None else instance
        by_id, key = self.by_id, id(owner)
        if key not in by_id:
            cache = GraphCache(function, _name(function, instance), self.options, instance)
            # Not finalize: nothing has to run at exit, where CUDA may be gone already.
            reference = _reference(owner, lambda _: by_id.pop(key, None))
            by_id[key] = reference, cache, cache.native.capsule
        return by_id[key][1]

    def lookup_key(self, instance: Any) -> tuple[Any, ...]:
        """Returns the key by which native code finds the cache of a forward bound to `instance`."""
        if instance is None:
            return self.by_id, id(self), None
        return self.by_id, id(instance), _reference(instance)


def _reference(owner: Any, callback: Callable[[Any], Any] | None = None) -> Any:
    """Returns a weak reference; a strong one to an object with `__slots__` that allows no other."""
    try:
        return weakref.ref(owner, callback)
    except TypeError:
        return lambda: owner


def _name(function: Callable[..., Any], instance: Any) -> str:
    if instance is None:
        return str(getattr(function, "__qualname__", function))
    return f"{type(instance).__qualname__}.{getattr(function, '__name__', 'forward')}"


def _owner_of(function: Callable[..., Any]) -> Any:
    """Returns the instance that a function is bound to, or None; functions of C name their module."""
    owner = getattr(function, "__self__", None)
    return None if isinstance(owner, ModuleType) else owner


class _Inspectable:
    """The methods of a wrapped forward, named as `functools` names those of a cached function."""

    _self_caches: _Caches

    def _wrapped_call(self) -> tuple[Callable[..., Any], Any]:
        """Returns the function that a call runs, and the instance that it is bound to, or None."""
        raise NotImplementedError

    def _cache(self) -> GraphCache:
        return self._self_caches.of(*self._wrapped_call())

    def cache_info(self) -> CacheInfo:
        """Returns the counts of captures, replays and eager calls; see `CacheInfo`."""
        return self._cache().info()

    def cache_clear(self) -> None:
        """Drops the graphs and the counts; the next call captures again."""
        self._cache().clear()

    def warmup(self, *args: Any, **kwargs: Any) -> None:
        """Captures graphs for calls like this one, without the effects of a call.

        The forward runs once. Afterwards the tensors that it writes to and the random generator get
        their old values back.

        Args:
            *args: example arguments. Shapes and dtypes of tensors count, and values must be valid.
            **kwargs: example arguments by name.
        """
        function, instance = self._wrapped_call()
        self._cache().warm_up(function, instance, args, kwargs)

    def suggest_sizes(self, count: int) -> Suggestion:
        """Returns the sizes that would have served the calls so far at least cost; see `Suggestion`.

        Each size is timed after 512 replays. From two timed sizes on, the cost of a replay is its time
        on the device, interpolated linearly. Until then, and in emulation, it is the number of rows.

        Args:
            count: the number of sizes; fewer are returned if fewer different batches came.

        Raises:
            GraphCacheError: if there were no calls, or if only exact sizes are captured.
            OptionError: if `count` is not a positive integer.
        """
        return self._cache().suggest_sizes(count)

    def __repr__(self) -> str:
        if isinstance(self, _BoundForward) and self._self_instance is None:
            return f"<cuda_graphed {self.__wrapped__.__qualname__}>"
        info = self.cache_info()
        return (
            f"<cuda_graphed {self._cache().name}: {len(info.sizes)} sizes {list(info.sizes)}, "
            f"{info.hits} replays, {info.misses} eager calls, {info.padded_rows} padded rows>"
        )

    __str__ = __repr__


class _BoundForward(_Inspectable, wrapt.BoundFunctionWrapper):  # type: ignore[type-arg]
    """The bound `module.forward` of a class whose forward is decorated."""

    @property
    def _self_caches(self) -> _Caches:  # type: ignore[override]
        return self._self_parent._self_caches  # type: ignore[no-any-return]

    def _wrapped_call(self) -> tuple[Callable[..., Any], Any]:
        if self._self_instance is None:
            raise OptionError(
                f"graphcache: {self.__wrapped__.__qualname__} has graphs for each instance; ask one "
                "of them: module.forward.cache_info()"
            )
        return self.__wrapped__, self._self_instance

    def __copy__(self) -> "_BoundForward":
        return self  # as methods are

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        instance = copy.deepcopy(self._self_instance, memo)
        return (
            self
            if instance is self._self_instance
            else self._self_parent.__get__(instance, type(instance))
        )

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        if self._self_instance is None:
            return getattr, (self._self_owner, self.__name__)
        return getattr, (self._self_instance, self.__name__)


class GraphedForward(_Inspectable, wrapt.FunctionWrapper):  # type: ignore[type-arg]
    """A decorated function: a plain one, or the forward in the body of a class."""

    __bound_function_wrapper__ = _BoundForward

    def __init__(self, function: Callable[..., Any], options: Options) -> None:
        caches = _Caches(options)

        def dispatch(
            wrapped: Callable[..., Any], instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
        ) -> Any:
            if is_compiling():
                return wrapped(*args, **kwargs)
            if instance is not None and not isinstance(wrapped, MethodType):
                wrapped = function.__get__(instance)  # called through the class
            return caches.of(wrapped, instance)(wrapped, instance, args, kwargs)

        super().__init__(function, dispatch)
        self._self_caches = caches
        self._self_served = caches.lookup_key(_owner_of(function))

    def _wrapped_call(self) -> tuple[Callable[..., Any], Any]:
        # wrapt hands the instance of a bound method on, so `cuda_graphed(model.decode)` has one too.
        return self.__wrapped__, _owner_of(self.__wrapped__)

    # The copy of a bound method is bound to the copy of its instance, and so is one of a partial.

    def __reduce_ex__(self, protocol: Any) -> str | tuple[Any, ...]:
        function, options = self.__wrapped__, self._self_caches.options
        if type(function) is MethodType:
            return _graphed_method, (function.__func__, function.__self__, options)
        if type(function) is FunctionType:
            found: Any = sys.modules.get(str(self.__module__))
            for name in str(self.__qualname__).split("."):
                found = getattr(found, name, None)
            if found is not function:
                return str(self.__qualname__)  # by name, as functions are pickled
        return GraphedForward, (function, options)

    def __copy__(self) -> "GraphedForward":
        return self  # as functions and methods are

    def __deepcopy__(self, memo: dict[int, Any]) -> "GraphedForward":
        function = copy.deepcopy(self.__wrapped__, memo)
        if function is self.__wrapped__:
            return self  # as functions are
        # The instance that was copied may hold this very wrapper.
        return memo.get(id(self)) or GraphedForward(function, self._self_caches.options)


def _graphed_method(function: Callable[..., Any], instance: Any, options: Options) -> GraphedForward:
    return GraphedForward(MethodType(function, instance), options)


# The attribute of a module whose object serves its calls in place of the graph cache, where it likes to.
TRANSLATOR = "_graphcache_translator"
MAX_UNREACHED = 8  # calls of a part of a graphed module that is never called itself
_GONE = "graphcache: the module of this forward is gone"
_MODULE_CALLS = frozenset({"_call_impl", "inner", "_wrapped_call_impl"})
_PLAIN_CALL = nn.Module._call_impl
_MODULE_FILE = _PLAIN_CALL.__code__.co_filename


def _called_module() -> Any:
    """Returns the module whose call leads to this one; None where the frames do not show it.

    A shallow copy of a module (`copy.copy`, a DataParallel replica) shares the forward in its
    `__dict__`. So the forward can't know by itself which of the modules was called.
    """
    frame = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename == __file__:
        frame = frame.f_back  # type: ignore[assignment]
    if frame is None or frame.f_code.co_filename != _MODULE_FILE:
        return None
    return frame.f_locals.get("self") if frame.f_code.co_name in _MODULE_CALLS else None


class InstanceForward(_Inspectable, wrapt.FunctionWrapper):  # type: ignore[type-arg]
    """The forward of a module that was decorated after its construction.

    The wrapper lies in the module's `__dict__` and refers back weakly. So the module and its graphs go
    with the last user of the module.
    """

    def __init__(
        self,
        module: nn.Module,
        own: Callable[..., Any] | None,
        options: Options,
        *,
        compiled: bool = False,
    ) -> None:
        reference, caches = weakref.ref(module), _Caches(options)
        function = class_forward(type(module)) if own is None else own
        # A forward that somebody else put on the instance is called as it is.
        is_static = isinstance(inspect.getattr_static(type(module), "forward", None), staticmethod)
        is_method = compiled or (function is class_forward(type(module)) and not is_static)

        # A closure, not a method: torch.compile traces it, and can't trace methods of a wrapper.
        def dispatch(
            wrapped: Callable[..., Any], _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
        ) -> Any:
            owner = reference()
            if is_compiling():
                return wrapped(owner, *args, **kwargs) if is_method else wrapped(*args, **kwargs)
            held = None if owner is None else vars(owner).get("forward")
            called = owner if compiled else _meant(held, owner, "missed")
            if called is not owner:
                wrapped = class_forward(type(called)) if is_method else wrapped
                return wrapped(called, *args, **kwargs) if is_method else wrapped(*args, **kwargs)
            wrapped = itself()._current_forward(owner)  # type: ignore[union-attr]
            bound = MethodType(wrapped, owner) if is_method else wrapped
            if (forward := itself()) is not None:
                forward._self_parts.leave()
                if forward._self_inside is not None:
                    return bound(*args, **kwargs)
            translator = None if compiled else vars(owner).get(TRANSLATOR)
            if translator is not None:
                return translator.translate(caches.of(bound, owner), bound, args, kwargs)
            return caches.of(bound, owner)(bound, owner, args, kwargs)

        super().__init__(function, dispatch)
        self._self_parts = _Parts()
        self._self_inside: InstanceForward | None = None
        itself = weakref.ref(self)  # or the wrapper would outlive its module until a collection
        self._self_known_counts: dict[str, int] = {}
        self._self_frozen = (
            gc.get_freeze_count()
        )  # objects of before; no copy of the module is among them
        self._self_module = reference
        self._self_caches = caches
        self._self_served = caches.lookup_key(module)
        self._self_is_method = is_method
        self._self_compiled = compiled
        self._self_compiled_forms: list[tuple[dict[str, Any], InstanceForward]] = []
        if not compiled:
            self._replace_call(module)

    def _replace_call(self, module: nn.Module) -> None:
        """Makes `module(...)` ask native code before torch looks for hooks.

        Uses the attribute of `Module.compile`, which torch leaves out of copies and pickles. Where there
        are hooks, or another forward, the call goes torch's usual way.
        """
        if _is_called_plainly(module) and not has_compiled_call(module):
            vars(module)["_compiled_call_impl"] = _module_call(weakref.ref(module), self)

    def _wrapped_call(self) -> tuple[Callable[..., Any], Any]:
        module = self._self_module()
        if module is None:
            raise GraphCacheError(_GONE)
        function = self._current_forward(module)
        return (MethodType(function, module) if self._self_is_method else function), module

    def _current_forward(self, module: Any) -> Callable[..., Any]:
        """Returns the class's current forward; discards the graphs of a patched one."""
        if not self._self_is_method or self._self_compiled:
            return self.__wrapped__
        function = class_forward(type(module))
        if function is not self.__wrapped__:
            self._self_caches.by_id.pop(id(module), None)
            self._self_compiled_forms.clear()
            self.__wrapped__ = function
        return function

    def compiled_with(self, options: dict[str, Any]) -> "InstanceForward | None":
        """Returns a graphed forward over compiled code of the same function, counted with this one.

        Args:
            options: keywords of `torch.compile`.

        Returns:
            None where the function is not of the module's class: it may be bound to something else.

        Raises:
            GraphCacheError: where a shallow copy of the module may be meant.
        """
        module = self._wrapped_call()[1]
        _check_not_shared(self, module, "compiled")  # here, so that no call has to ask
        for known, made in self._self_compiled_forms:
            if known == options:
                return made
        if not self._self_is_method:
            return None
        code = torch.compile(self.__wrapped__, **options)
        made = InstanceForward(module, code, self._self_caches.options, compiled=True)
        self._self_compiled_forms.append((options, made))
        self._cache().beside.append(made._cache())
        return made

    def warmup(self, *args: Any, **kwargs: Any) -> None:  # noqa: D102
        self._self_parts.leave()
        if self._self_inside is not None:
            self._self_inside.warmup(*args, **kwargs)
        else:
            super().warmup(*args, **kwargs)

    warmup.__doc__ = _Inspectable.warmup.__doc__

    def check_reached(self, module: nn.Module) -> None:
        """Warns where parts of `module` are called again and again, and never the module itself."""
        self._self_parts.enter(module)

    def pass_on_to(self, inside: "InstanceForward") -> None:
        """Leaves all graphs to a forward that this one calls, whose calls count as those of this one."""
        self._self_inside = inside
        self._cache().beside.append(inside._cache())

    @property
    def __self__(self) -> Any:
        return self._wrapped_call()[1]

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self._wrapped_call()[0])

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        own = None if self._self_is_method else self.__wrapped__
        return InstanceForward, (self.__self__, own, self._self_caches.options)

    def __deepcopy__(self, memo: dict[int, Any]) -> "InstanceForward":
        _, (module, own, options) = self.__reduce_ex__(0)
        # The copy of the module is in `memo` by now: it was made before its attributes.
        return InstanceForward(*copy.deepcopy((module, own), memo), options)


def _meant(forward: Any, owner: Any, caller: str) -> Any:
    """Returns the module that is called; see `_check_not_shared` where the frames do not show it."""
    called = _called_module()
    if called is None:
        _check_not_shared(forward, owner, caller)
        return owner
    return called


def _check_not_shared(forward: Any, owner: Any, caller: str) -> None:
    """Raises `GraphCacheError` where another module than `owner` holds `forward`, too.

    Args:
        forward: the forward of a module.
        owner: the module that the forward was made for.
        caller: names the calling code, which holds the same number of references at each call.
    """
    if owner is None:
        raise GraphCacheError(_GONE)
    if not isinstance(forward, InstanceForward) or (
        sys.getrefcount(forward) == forward._self_known_counts.get(caller)
    ):
        return
    holders = gc.get_referrers(forward)
    if gc.get_freeze_count() > forward._self_frozen:  # frozen objects have no known referrers
        holders += map(vars, _modules_in_frames())
    for holder in holders:
        # Before Python 3.13, the local variables of a frame are such a dict, too.
        of_module = type(holder) is dict and "_modules" in holder and holder is not vars(owner)
        if of_module and holder.get("forward") is forward:
            raise GraphCacheError(
                f"graphcache: {type(owner).__qualname__}.forward was called by itself, and a shallow "
                "copy of its module shares it: which of the two is meant can't be told. Call the "
                "module, or copy it with copy.deepcopy"
            )
    forward._self_known_counts[caller] = sys.getrefcount(forward)


def _modules_in_frames() -> Iterator[nn.Module]:
    """Yields the modules that the calling code has at hand, with their children."""
    for frame, _ in walk_stack(sys._getframe(1)):
        for value in (*frame.f_locals.values(), *frame.f_globals.values()):
            items = value.values() if type(value) is dict else value
            for item in items if type(items) in (list, tuple, type({}.values())) else (value,):
                if issubclass(type(item), nn.Module):
                    yield from item.modules()


def _module_call(reference: Callable[[], Any], forward: InstanceForward) -> Callable[..., Any]:
    native = _C.module_call(forward._self_served, forward, _called_module)
    plain, is_method = forward.__wrapped__, forward._self_is_method

    # A Python function, because torch.compile can't trace the wrapper.
    def call(*args: Any, **kwargs: Any) -> Any:
        if not is_compiling():
            return native(*args, **kwargs)
        module = reference()
        if (
            module.__dict__.get("forward") is not forward
            or module._forward_hooks
            or module._forward_pre_hooks
        ):
            return module._call_impl(*args, **kwargs)
        return plain(module, *args, **kwargs) if is_method else plain(*args, **kwargs)

    return call


def graph_cache_of(module: nn.Module) -> GraphCache | None:
    """Returns the graphs of a module's forward; None where it is not decorated, or another module's."""
    forward = getattr(module, "forward", None)
    if not isinstance(forward, _Inspectable) or _owner_of(forward) is not module:  # type: ignore[arg-type]
        return None
    return forward._cache()


class _Parts:
    """The parts of a graphed module, until the module itself is called for the first time.

    A method such as `generate` may call a part and never the module: then the graphs are not used.
    """

    def __init__(self) -> None:
        self._whole: Callable[[], Any] = lambda: None
        self._entered: list[tuple[weakref.ref[nn.Module], Callable[..., Any]]] = []
        self._counts = Counter[str]()

    def enter(self, module: nn.Module) -> None:
        """Has the calls of all parts counted, by the attribute of `Module.compile`."""
        self._whole = weakref.ref(module)
        for path, part in _parts_of(module):
            if _is_called_plainly(part) and "_compiled_call_impl" not in vars(part):
                call = self._counted(path, weakref.ref(part))
                vars(part)["_compiled_call_impl"] = call
                self._entered.append((weakref.ref(part), call))

    def leave(self) -> None:
        """Counts no more; inside a trace, which looks for changes, a later call does that."""
        if not self._entered or _C.is_inlining():
            return
        for reference, call in self._entered:
            part = reference()
            if part is not None and vars(part).get("_compiled_call_impl") is call:
                del vars(part)["_compiled_call_impl"]
        self._entered.clear()

    def _counted(self, path: str, reference: Callable[[], Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if is_compiling():
                return reference()._call_impl(*args, **kwargs)
            part = _called_module() or reference()
            if self._entered and not _C.is_inlining():
                self._count(path)
            return part._call_impl(*args, **kwargs)

        return call

    def _count(self, path: str) -> None:
        whole, frame = self._whole(), sys._getframe(1)
        while whole is not None and frame is not None and not _is_method_of(frame, whole):
            frame = frame.f_back  # type: ignore[assignment]
        method = None if frame is None else frame.f_code.co_name
        if whole is None or method == "forward":  # as the user asked for
            return
        self._counts[path] += 1
        if self._counts[path] == MAX_UNREACHED:
            self.leave()
            kind = type(whole).__qualname__
            caller = f"its `{method}` calls" if method else "its user calls"
            part = re.sub(r"\.(\d+)", r"[\1]", f"model.{path}")
            steps = [f"Decorate the part that is called: cuda_graphed({part})."]
            if method:
                steps.append(f"Or the method: model.{method} = cuda_graphed(model.{method}).")
            numbered = "".join(f"\n  {number}. {step}" for number, step in enumerate(steps, 1))
            warn(
                f"{kind} has graphs that are not used: {caller} {path!r} in place of {kind}.forward"
                f"{numbered}"
            )


def _is_method_of(frame: FrameType, whole: nn.Module) -> bool:
    code = frame.f_code
    first = code.co_varnames[0] if code.co_argcount else ""
    return hasattr(type(whole), code.co_name) and frame.f_locals.get(first) is whole


def _parts_of(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yields the children of a module and theirs, also those in lists of modules, with their paths."""
    for path, part in module.named_modules():
        depth = sum(not name.isdecimal() for name in path.split("."))
        if part is not module and depth <= 2 and not isinstance(part, (nn.ModuleList, nn.ModuleDict)):
            yield path, part


def _is_called_plainly(module: nn.Module) -> bool:
    kind = type(module)
    return kind.__call__ is nn.Module.__call__ and kind._call_impl is _PLAIN_CALL


# Calls that graphs serve never reach wrapt, which needs a microsecond to find the wrapped function.
_C.serve_calls(GraphedForward)
_C.serve_instance_calls(
    InstanceForward, lambda forward, owner: _meant(forward, owner, "served") is owner
)
_C.serve_bound_calls(_BoundForward)


def has_compiled_call(module: nn.Module) -> bool:
    """Return True if `module.compile()` was called, whose result runs at each call of the module."""
    made = vars(module).get("_compiled_call_impl")
    return made is not None and getattr(made, "__module__", None) != __name__


def class_forward(kind: type) -> Callable[..., Any]:
    """Returns the forward of a class without its wrapper."""
    forward = kind.forward  # type: ignore[attr-defined]
    return forward.__wrapped__ if isinstance(forward, GraphedForward) else forward
