"""`cuda_graphed`: puts a graph cache in front of a forward and leaves everything else unchanged."""

import inspect
from collections.abc import Callable, Iterable
from typing import Any, TypeVar, overload

from torch import nn
from torch.jit import ScriptModule

from graphcache.call.parameters import shown_parameters
from graphcache.config import BatchDim, Options, Pad, Stale, top_name
from graphcache.errors import OptionError
from graphcache.integrations import adapters, transformers
from graphcache.pool import GraphPool
from graphcache.runtime.source_lines import warn
from graphcache.wrappers import GraphedForward, InstanceForward, class_forward, has_compiled_call

F = TypeVar("F", bound=Callable[..., Any])


@overload
def cuda_graphed(
    target: F,
    *,
    batch_dim: BatchDim = ...,
    sizes: Iterable[int] | None = ...,
    pad: Pad = ...,
    bind: Iterable[str] = ...,
    stale: Stale = ...,
    pool: GraphPool | None = ...,
    fallback: bool = ...,
    progress: bool | None = ...,
    min_gain: float | None = ...,
) -> F: ...
@overload
def cuda_graphed(
    target: None = ...,
    *,
    batch_dim: BatchDim = ...,
    sizes: Iterable[int] | None = ...,
    pad: Pad = ...,
    bind: Iterable[str] = ...,
    stale: Stale = ...,
    pool: GraphPool | None = ...,
    fallback: bool = ...,
    progress: bool | None = ...,
    min_gain: float | None = ...,
) -> Callable[[F], F]: ...
def cuda_graphed(
    target: Any = None,
    *,
    batch_dim: BatchDim = 0,
    sizes: Iterable[int] | None = None,
    pad: Pad = None,
    bind: Iterable[str] = (),
    stale: Stale = "copy",
    pool: GraphPool | None = None,
    fallback: bool = True,
    progress: bool | None = None,
    min_gain: float | None = None,
) -> Any:
    """Makes a forward replay CUDA graphs, one for each batch size in `sizes`.

    The first call runs eagerly, once. After it, all sizes are captured into one memory pool, largest
    first. A later call is padded to the smallest size that holds its batch, replayed, and cut back.
    An output that is still held when another graph overwrites its memory is copied; see `stale`.

    Args:
        target: a forward in the body of a class, a `Module` class, a `Module`, or a function. Of a
            class or a module, the forward is replaced. Without a target, a decorator is returned.
        batch_dim: the dimension of the arguments that carries the batch, or a dictionary from
            argument name to dimension. In a dictionary, None marks an argument without a batch, and
            an argument that is not named has 0. The first tensor argument that has the dimension and
            is not bound gives the batch size. A tensor of another length there carries no batch.
            The batch dimensions of the outputs are found by comparing sizes.
        sizes: the batch sizes to capture; larger batches then run eagerly. Without them: 1, 2, 4,
            then multiples of 8, up to the largest batch so far.
        pad: the content of padded rows: a number, "edge" (the last row again), or a dictionary from
            argument name to either. An argument that the dictionary does not name gets 0. By default
            the last row is repeated. A forward that writes to state outside itself, such as a KV
            cache, is padded only if `pad` is given.
        bind: names of arguments that graphs read at the caller's address, without a copy. Arguments
            that the forward writes to are always bound. So are arguments above 4 MiB without a batch
            dimension. Another address is another signature.
        stale: the fate of an output that is still held when its memory is overwritten. With "copy"
            the output is first moved to memory of its own, with its views. With "error" any later use
            of the output raises: that finds the places where a copy is made. The option of the forward
            that made the output decides.
        pool: the memory to use. By default all forwards of a device share one pool.
        fallback: if True, a forward that can't be captured runs eagerly, with one warning. If False,
            its calls raise `CaptureError`.
        progress: show a progress bar while capturing. None shows it on a terminal, after a second.
        min_gain: drop the graph of a size if a replay saves less than this share of eager's time
            (0.05: 5 %); such calls run eagerly. Both are timed once, on the device, after 512
            replays of the size. A forward that writes to state outside itself is not timed. None
            keeps all graphs.

    Returns:
        The class, the same module, or the wrapped function. Its forward has the methods
        `cache_info()`, `cache_clear()`, `warmup(*example_args)` and `suggest_sizes(count)`.

    Raises:
        OptionError: if an option has a value that makes no sense.
        CaptureError: at a call, with `fallback=False`, if the forward can't be captured.

    Example:
        >>> model = cuda_graphed(model, sizes=(1, 2, 4, 8))
        >>> with torch.inference_mode():
        ...     logits = model(tokens)
    """
    if pool is not None and not isinstance(pool, GraphPool):
        raise OptionError(f"graphcache: pool={pool!r}; give a GraphPool")
    options = Options._make(
        (batch_dim, sizes, pad, bind, stale, pool, fallback, progress, min_gain)
    ).checked()
    if target is None:
        return lambda target: _decorate(target, options)
    return _decorate(target, options)


def _checked(function: Callable[..., Any], options: Options) -> Callable[..., Any]:
    """Returns `function`; raises `OptionError` if an option names an argument that it does not take."""
    parameters = shown_parameters(function)
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    pads = options.pad if isinstance(options.pad, dict) else {}
    dims = options.batch_dim if isinstance(options.batch_dim, dict) else {}
    for option, names in (("batch_dim", dims), ("pad", pads), ("bind", options.bind)):
        for name in names:
            if top_name(name) not in parameters and not takes_any:
                raise OptionError(
                    f"graphcache: {option} names {name!r}, and "
                    f"{getattr(function, '__qualname__', function)} takes {', '.join(parameters)}"
                )
    return function


def _decorate(target: Any, options: Options) -> Any:
    if isinstance(target, ScriptModule):
        raise OptionError(
            "graphcache: can't decorate a ScriptModule, because its code can't be traced; decorate the "
            "Module that it was made of, as it was before torch.jit"
        )
    if isinstance(target, nn.Module):
        own = vars(target).get("forward", class_forward(type(target)))
        if "forward" not in vars(target) and own is not class_forward(type(target)):
            own = target.forward  # a descriptor makes it, such as functools.partialmethod
        # Decorated again, the new options count.
        function = own.__wrapped__ if isinstance(own, InstanceForward) else own
        target.forward = InstanceForward(target, _checked(function, options), options)
        transformers.attach(target)
        if (inside := adapters.model_inside(target)) is not None:
            target.forward.pass_on_to(_decorate(inside, options).forward)
        else:
            target.forward.check_reached(target)
        if has_compiled_call(target):
            warn(
                f"{type(target).__qualname__} has graphs that are not used: it was compiled in place "
                "(Module.compile), and calls run that; use torch.compile(module)"
            )
        return target
    if inspect.isclass(target):
        if not callable(getattr(target, "forward", None)):
            raise OptionError(
                f"graphcache: {target.__qualname__} has no forward to decorate; decorate the function "
                "that you want graphed"
            )
        function = _checked(class_forward(target), options)
        target.forward = GraphedForward(function, options)  # type: ignore[attr-defined]
        return target
    if not callable(target) or isinstance(target, (staticmethod, classmethod)):
        raise OptionError(
            f"graphcache: can't decorate {target!r}; give a function, a forward, a Module class or a "
            "Module. Options are given by name: cuda_graphed(batch_dim=0)"
        )
    function = target.__wrapped__ if isinstance(target, GraphedForward) else target
    return GraphedForward(_checked(function, options), options)
