"""Values that stand in place of Python values while a forward is traced, and record how they are used.

`Counted` stands for an int. It is no subclass of int: code in C gets at the value by `__index__` only,
and that is an escape. Comparisons with constants bound the ints for which the forward takes the same
path. To add a constant gives another such value. Anything else is an escape, too, and is answered as the
int itself would have answered.

`Unread` stands for any other value. Any use of it is an escape.
"""

import math
import operator
import re
from collections.abc import Iterable
from dis import Instruction, get_instructions
from functools import cache
from types import CodeType
from typing import Any

LIMIT = 1 << 62  # ints beyond are no counters
_OPERATORS: dict[str, Any] = {
    "mul": operator.mul,
    "matmul": operator.matmul,
    "truediv": operator.truediv,
    "floordiv": operator.floordiv,
    "mod": operator.mod,
    "divmod": divmod,
    "lshift": operator.lshift,
    "rshift": operator.rshift,
    "and": operator.and_,
    "or": operator.or_,
    "xor": operator.xor,
}
_ESCAPES = re.findall(
    r"\w+",
    "pow rpow abs invert int float complex index round trunc floor ceil hash format str repr "
    "reduce_ex dir",
)
_ESCAPES += [side + name for name in _OPERATORS for side in ("", "r")]
_ESCAPES_OF_ANY = re.findall(
    r"\w+",
    "add radd sub rsub neg pos bool eq ne lt le gt ge len iter contains getitem setitem delitem iadd "
    "isub imul",
)


class StandIn:
    """A value in place of another one, of whose class it claims to be.

    Only `type(value)` is answered otherwise; see `asks_for_type`.
    """

    __slots__ = ()

    def escape(self) -> Any:
        """Records a use of which nothing is known, and returns the value itself."""
        raise NotImplementedError

    def __getattr__(self, name: str) -> Any:
        return getattr(self.escape(), name)

    def __copy__(self) -> Any:
        return self

    def __deepcopy__(self, memo: Any) -> Any:
        return self.__copy__()


def is_stand_in(value: Any) -> bool:
    """Return True for a value that stands in place of another; without asking the value."""
    return issubclass(type(value), StandIn)


def _plain(value: Any) -> Any:
    return value.escape() if is_stand_in(value) else value


def _escaping(name: str) -> Any:
    def method(self: StandIn, *args: Any) -> Any:
        value = self.escape()
        return getattr(value, f"__{name}__")(*map(_plain, args))

    def operate(self: StandIn, other: Any) -> Any:
        return _OPERATORS[name](self.escape(), _plain(other))  # which asks the other one, too

    def operate_reversed(self: StandIn, other: Any) -> Any:
        return _OPERATORS[name[1:]](_plain(other), self.escape())

    if name in _OPERATORS:
        return operate
    return operate_reversed if name[:1] == "r" and name[1:] in _OPERATORS else method


class Count:
    """The int at one place, and how a traced forward uses it.

    Attributes:
        value: the int.
        low, high: the forward takes the same path from `low` up to `high`, which is excluded.
        escaped: the forward did something else than to compare it with constants and to add some.
    """

    def __init__(self, value: int) -> None:
        self.value = value
        self.low, self.high = -LIMIT, LIMIT
        self.escaped = not -LIMIT < value < LIMIT


class Counted(StandIn):
    """The int of a `Count`, or its negative, plus a constant."""

    __slots__ = ("count", "offset", "sign")

    def __init__(self, count: Count, sign: int = 1, offset: int = 0) -> None:
        self.count, self.sign, self.offset = count, sign, offset

    def value(self) -> int:
        """Returns the value, without an escape."""
        return self.sign * self.count.value + self.offset

    def escape(self) -> int:
        """Records an escape, and returns the int."""
        self.count.escaped = True
        return self.value()

    @property
    def __class__(self) -> Any:  # what isinstance() asks
        return int

    @__class__.setter
    def __class__(self, kind: Any) -> None:
        raise TypeError("__class__ of an int can't be set")

    def _is_at_most(self, bound: int) -> bool:
        """Compares the value with a constant, which bounds the int."""
        count, holds = self.count, self.value() <= bound
        if self.sign > 0:
            edge = bound - self.offset + 1
            keeps_below = holds
        else:
            edge = self.offset - bound
            keeps_below = not holds
        if keeps_below:
            count.high = min(count.high, edge)
        else:
            count.low = max(count.low, edge)
        return holds

    def _compare(self, other: Any, compare: Any, bound: Any) -> Any:
        """Compares the value with `other`; a constant bounds it, rounded to an int by `bound`."""
        if type(other) in (int, bool, float) and (type(other) is not float or math.isfinite(other)):
            self._is_at_most(bound(other))
        elif not (type(other) is float and math.isinf(other)):
            return compare(self.escape(), _plain(other))
        return compare(self.value(), other)

    def __lt__(self, other: Any) -> Any:
        return self._compare(other, operator.lt, lambda bound: math.ceil(bound) - 1)

    def __ge__(self, other: Any) -> Any:
        return self._compare(other, operator.ge, lambda bound: math.ceil(bound) - 1)

    def __le__(self, other: Any) -> Any:
        return self._compare(other, operator.le, math.floor)

    def __gt__(self, other: Any) -> Any:
        return self._compare(other, operator.gt, math.floor)

    def __eq__(self, other: Any) -> Any:
        if type(other) in (str, bytes, type(None)):
            return False
        if type(other) not in (int, bool):
            return self.escape() == _plain(other)
        return self._is_at_most(other) and not self._is_at_most(other - 1)

    def __ne__(self, other: Any) -> Any:
        return not self == other

    def __bool__(self) -> bool:
        return bool(self != 0)

    def _moved(self, other: Any, sign: int, add: Any) -> Any:
        """Returns the value, times `sign`, plus what `add` makes of a constant."""
        return Counted(self.count, self.sign * sign, self.offset * sign + add(other))

    def __add__(self, other: Any) -> Any:
        return self._moved(other, 1, int) if type(other) is int else self.escape() + _plain(other)

    def __radd__(self, other: Any) -> Any:
        return self._moved(other, 1, int) if type(other) is int else _plain(other) + self.escape()

    def __sub__(self, other: Any) -> Any:
        return (
            self._moved(other, 1, int.__neg__) if type(other) is int else self.escape() - _plain(other)
        )

    def __rsub__(self, other: Any) -> Any:
        return self._moved(other, -1, int) if type(other) is int else _plain(other) - self.escape()

    def __neg__(self) -> Any:
        return self._moved(0, -1, int)

    def __pos__(self) -> Any:
        return self

    __hash__ = None  # type: ignore[assignment]  # replaced below


class Unread(StandIn):
    """A value that the forward replaces, and perhaps never looks at; made by `unread`.

    Attributes:
        used: whether the forward looked at it.
    """

    __slots__ = ("_value", "used")

    def __init__(self, value: Any) -> None:
        self._value = value
        self.used = False

    def escape(self) -> Any:
        """Records a use, and returns the value."""
        self.used = True
        return self._value

    def __copy__(self) -> Any:
        return self.escape()

    @property
    def __class__(self) -> Any:
        return type(self._value)

    @__class__.setter
    def __class__(self, kind: Any) -> None:
        self.escape().__class__ = kind

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("_value", "used"):
            object.__setattr__(self, name, value)
        else:
            setattr(self.escape(), name, value)


for _name in _ESCAPES:
    setattr(Counted, f"__{_name}__", _escaping(_name))
Counted.__name__ = Counted.__qualname__ = "int"  # what messages show: type(value).__name__


@cache
def _unread_type(kind: Any) -> type[Unread]:
    """Returns a type with those special methods that `kind` has: code may ask for them."""
    names = (name for name in (*_ESCAPES, *_ESCAPES_OF_ANY) if hasattr(kind, f"__{name}__"))
    return type(kind.__name__, (Unread,), {f"__{name}__": _escaping(name) for name in names})


def unread(value: Any) -> Unread:
    """Returns what stands in place of a value and notices any use of it."""
    kind: type = type(value)
    return _unread_type(kind)(value)


def asks_for_type(codes: Iterable[CodeType]) -> bool:
    """Return True if code may ask for the type of a value by `type(value)`, which no stand-in sees.

    `type(self)`, `type(value).__name__` and `isinstance(value, type)` do no harm.
    """
    return any("type" in code.co_names and _asks_for_type(code) for code in codes)


def asks_for_identity(codes: Iterable[CodeType]) -> bool:
    """Return True if code may ask whether two values are one object, but for None, True and False."""
    return any(_asks_for_identity(code) for code in codes)


def _asks_for_identity(code: CodeType) -> bool:
    before: Instruction | None = None
    for step in get_instructions(code):
        if step.opname == "IS_OP" and not (
            before is not None
            and before.opname == "LOAD_CONST"
            and (before.argval is None or type(before.argval) is bool)
        ):
            return True
        before = step
    return False


_SKIPPED = {"PRECALL", "CACHE", "EXTENDED_ARG", "PUSH_NULL", "RESUME"}


def _asks_for_type(code: CodeType) -> bool:
    steps = [step for step in get_instructions(code) if step.opname not in _SKIPPED]
    for index, step in enumerate(steps):
        if step.opname in ("LOAD_GLOBAL", "LOAD_NAME") and step.argval == "type":
            after = steps[index + 1 :]
            call = next((at for at, each in enumerate(after) if each.opname.startswith("CALL")), None)
            if call is None or not _is_harmless(after[:call], after[call + 1 :]):
                return True
    return False


def _is_harmless(argument: list[Instruction], after: list[Instruction]) -> bool:
    if not argument:  # type is the last argument of another call
        return True
    if len(argument) == 1 and argument[0].argval in ("self", "cls"):
        return True
    return bool(after) and after[0].argval in ("__name__", "__qualname__")
