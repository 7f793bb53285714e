"""The keywords of `cuda_graphed`, checked."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from graphcache.buckets import check_sizes
from graphcache.errors import OptionError
from graphcache.pool import GraphPool, Stale
from graphcache.signature import BatchDim, parameters_of, top_name
from graphcache.staging import Pad


class Options(NamedTuple):
    """The keywords of `cuda_graphed`; see there."""

    batch_dim: BatchDim = 0
    sizes: tuple[int, ...] | None = None
    pad: Pad = None
    bind: tuple[str, ...] = ()
    stale: Stale = "error"
    pool: GraphPool | None = None
    fallback: bool = True
    progress: bool | None = None
    min_gain: float | None = None

    @classmethod
    def checked(
        cls,
        *,
        batch_dim: Any,
        sizes: Iterable[int] | None,
        pad: Any,
        bind: str | Iterable[str],
        stale: Any,
        pool: Any,
        fallback: bool,
        progress: bool | None,
        min_gain: Any,
    ) -> "Options":
        """Returns the options, or raises `OptionError` for one that makes no sense."""
        return cls(
            batch_dim=_check_dims(batch_dim),
            sizes=None if sizes is None else check_sizes(sizes),
            pad=_check_pad(pad),
            bind=_names(bind),
            stale=_one_of("stale", stale, ("error", "copy")),
            pool=_instance_of("pool", pool, GraphPool),
            fallback=fallback,
            progress=progress,
            min_gain=_share(min_gain),
        )

    def check_names(self, function: Callable[..., Any]) -> None:
        """Raises `OptionError` if an option names an argument that `function` does not take."""
        parameters = parameters_of(function)
        if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
            return
        pads = self.pad if isinstance(self.pad, dict) else {}
        dims = self.batch_dim if isinstance(self.batch_dim, dict) else {}
        for option, names in (("batch_dim", dims), ("pad", pads), ("bind", self.bind)):
            for name in names:
                if top_name(name) not in parameters:
                    raise OptionError(
                        f"graphcache: {option} names {name!r}, and "
                        f"{getattr(function, '__qualname__', function)} takes "
                        f"{', '.join(parameters)}"
                    )


def _check_pad(pad: Any) -> Pad:
    names, fills = (list(pad), list(pad.values())) if isinstance(pad, dict) else ([], [pad])
    if not all(isinstance(name, str) for name in names) or not all(
        (fill is None and pad is None) or fill == "edge" or isinstance(fill, (int, float))
        for fill in fills
    ):
        raise OptionError(
            f"graphcache: pad={pad!r}; a padded row holds a number, or 'edge' (the last row "
            "again), for all arguments or in a dictionary by argument name"
        )
    return pad  # type: ignore[no-any-return]


def _names(bind: Any) -> tuple[str, ...]:
    names = (bind,) if isinstance(bind, str) or not isinstance(bind, Iterable) else tuple(bind)
    if not all(isinstance(name, str) for name in names):
        raise OptionError(f"graphcache: bind={bind!r}; give the names of arguments, such as bind=('x',)")
    return names


def _check_dims(batch_dim: Any) -> BatchDim:
    by_name = isinstance(batch_dim, dict)
    dims = [dim for dim in batch_dim.values() if dim is not None] if by_name else [batch_dim]
    names = batch_dim if by_name else ()
    if not all(type(dim) is int for dim in dims) or not all(isinstance(name, str) for name in names):
        raise OptionError(
            f"graphcache: batch_dim={batch_dim!r}; give the number of a dimension, for all arguments or "
            "in a dictionary by argument name, where None stands for no batch"
        )
    return dict(batch_dim) if by_name else batch_dim


def _share(min_gain: Any) -> float | None:
    if min_gain is not None and not (isinstance(min_gain, (int, float)) and 0 <= min_gain < 1):
        raise OptionError(
            f"graphcache: min_gain={min_gain!r}; give the share of eager's time that a graph has to "
            "save, such as 0.05, or None to keep all graphs"
        )
    return min_gain


def _one_of(option: str, value: Any, allowed: tuple[str, ...]) -> Any:
    if value not in allowed:
        raise OptionError(f"graphcache: {option}={value!r}; give one of {', '.join(allowed)}")
    return value


def _instance_of(option: str, value: Any, kind: type) -> Any:
    if value is not None and not isinstance(value, kind):
        raise OptionError(f"graphcache: {option}={value!r}; give a {kind.__name__}")
    return value
