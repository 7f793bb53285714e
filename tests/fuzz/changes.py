"""Changes between two calls, each made to a graphed module and to its twin.

A change is given the module and a number, by which it chooses among the places that it could change.
One that finds no place does nothing.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.fuzz import edges
from tests.fuzz.modules import Config

Change = Callable[[nn.Module, int], None]


def negated(module: nn.Module, args: Any, out: Any) -> Any:
    """A forward hook, of a module that `pickle` finds."""
    return -out if isinstance(out, Tensor) else None


def shifted(module: nn.Module, args: Any) -> Any:
    """A hook before the forward."""
    first = args[0] if args and isinstance(args[0], Tensor) else None
    return None if first is None or not first.is_floating_point() else (first + 1, *args[1:])


def _place(module: nn.Module, number: int, table: str) -> tuple[nn.Module, str, Any] | None:
    found = [
        (owner, name, value)
        for owner in module.modules()
        for name, value in getattr(owner, table).items()
        if value is not None
    ]
    return found[number % len(found)] if found else None


def _to_parameter(change: Callable[[nn.Module, str, nn.Parameter], None]) -> Change:
    def apply(module: nn.Module, number: int) -> None:
        place = _place(module, number, "_parameters")
        if place is not None:
            change(*place)

    return apply


def _to_buffer(change: Callable[[nn.Module, str, Tensor], None]) -> Change:
    def apply(module: nn.Module, number: int) -> None:
        place = _place(module, number, "_buffers")
        if place is not None:
            change(*place)

    return apply


def _scaled(x: Tensor) -> Tensor:
    """Another value of the same kind, in memory of its own."""
    return x.detach() * -0.75 if x.is_floating_point() else x.detach() + 1


def _set_data(owner: nn.Module, name: str, p: nn.Parameter) -> None:
    p.data = _scaled(p)


def _set_strides(owner: nn.Module, name: str, p: nn.Parameter) -> None:
    p.data = _scaled(p).transpose(0, -1).contiguous().transpose(0, -1)


def _set_source(owner: nn.Module, name: str, p: nn.Parameter) -> None:
    p.set_(_scaled(p))


def _set_parameter(owner: nn.Module, name: str, p: nn.Parameter) -> None:
    setattr(owner, name, nn.Parameter(_scaled(p), requires_grad=p.requires_grad))


def _delete_bias(owner: nn.Module, name: str, p: nn.Parameter) -> None:
    if name == "bias":
        setattr(owner, name, None)


def _in_place(owner: nn.Module, name: str, tensor: Tensor) -> None:
    tensor.copy_(_scaled(tensor))


def _set_buffer(owner: nn.Module, name: str, buffer: Tensor) -> None:
    setattr(owner, name, _scaled(buffer))


def _state(module: nn.Module, *, assign: bool) -> None:
    state = {name: _scaled(tensor) for name, tensor in module.state_dict().items()}
    module.load_state_dict(state, assign=assign)


def _cast(module: nn.Module, number: int) -> None:
    module.to((torch.float64, torch.float32, torch.bfloat16, torch.float16)[number % 4])


def _cast_and_back(module: nn.Module, number: int) -> None:
    before = next((p.dtype for p in module.parameters()), torch.float32)
    module.to(torch.float64).to(before)


def _child(module: nn.Module, number: int) -> None:
    found = [
        (owner, name, child) for owner in module.modules() for name, child in owner.named_children()
    ]
    if found:
        owner, name, child = found[number % len(found)]
        new = copy.deepcopy(child)
        for p in new.parameters():
            p.copy_(_scaled(p))
        setattr(owner, name, new)


def _train(module: nn.Module, number: int) -> None:
    module.train(not module.training)


def _train_child(module: nn.Module, number: int) -> None:
    child = list(module.modules())[number % len(list(module.modules()))]
    child.train(not child.training)


def _requires_grad(module: nn.Module, number: int) -> None:
    for p in module.parameters():
        p.requires_grad_(not p.requires_grad)


def _settings(change: Callable[[Any], None]) -> Change:
    def apply(module: nn.Module, number: int) -> None:
        if isinstance(getattr(module, "config", None), Config):
            change(module)

    return apply


def _attribute(module: Any) -> None:
    module.scale = module.scale + 1


def _tensor_attribute(module: Any) -> None:
    module.plain = _scaled(module.plain)


def _flag_of_child(module: Any) -> None:
    module.inner.flag = not module.inner.flag


def _entry(module: Any) -> None:
    module.options["factor"] = module.options["factor"] + 1


def _tensor_entry(module: Any) -> None:
    module.options["bias"] = _scaled(module.options["bias"])


def _list_item(module: Any) -> None:
    module.options["list"][1] = module.options["list"][1] + 1


def _tensor_item(module: Any) -> None:
    module.options["list"][0] = _scaled(module.options["list"][0])


def _of_object(module: Any) -> None:
    module.config.scale = module.config.scale + 1


def _tensor_of_object(module: Any) -> None:
    module.config.shift = _scaled(module.config.shift)


def _entry_of_object(module: Any) -> None:
    module.config.flags["square"] = not module.config.flags["square"]


def _object(module: Any) -> None:
    module.config = Config(module.config.scale + 1, _scaled(module.config.shift), {"square": True})


def _open_gate(module: Any, number: int) -> None:
    """Opens a gate, or closes it, in one of the ways that leave it the same parameter."""
    gate = getattr(module, "gate", None)
    if gate is None or gate.is_inference():
        return
    value = torch.full_like(gate, number // 4 * 0.75)
    if number % 4 == 0:
        gate.data.copy_(value)
    elif number % 4 == 1:
        module.load_state_dict({"gate": value}, strict=False)
    elif number % 4 == 2:
        gate.detach().fill_(number / 8)
    else:
        optimizer = torch.optim.SGD([gate], lr=1.0)
        gate.grad = gate.detach() - value
        optimizer.step()
        gate.grad = None


def _read_at_some(module: Any, number: int) -> None:
    if isinstance(module, edges.Base):
        module.shift, module.options["far"] = (number / 2, number + 1.5)


def _closure(module: Any, number: int) -> None:
    if isinstance(module, edges.KeepsInFunctions):
        module.rebind(number / 2)


def _doubled(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return x * 2


def _nearer(x: Tensor) -> Tensor:
    return x / 2


# Of the process, so that both sides have them; a sequence puts back what was there before.
_REPLACED: dict[str, tuple[Any, str, Any]] = {
    "F.relu": (F, "relu", _doubled),
    "F.linear": (F, "linear", _doubled),
    "torch.tanh": (torch, "tanh", _doubled),
    "a global": (edges, "FACTOR", 5.0),
    "a global function": (edges, "_far", _nearer),
    "a constant of a class": (edges.Base, "CONSTANT", -2.0),
}
_ORIGINALS = {name: getattr(owner, key) for name, (owner, key, _) in _REPLACED.items()}


def _replace(name: str) -> Change:
    def apply(module: nn.Module, number: int) -> None:
        owner, key, other = _REPLACED[name]
        setattr(owner, key, other if number % 2 else _ORIGINALS[name])

    return apply


def put_back() -> None:
    """Undoes what changes made to the process."""
    for name in _REPLACED:
        _replace(name)(nn.Identity(), 0)


CHANGES: dict[str, Change] = {
    "p.data = …": _to_parameter(_set_data),
    "other strides": _to_parameter(_set_strides),
    "p.set_": _to_parameter(_set_source),
    "new parameter": _to_parameter(_set_parameter),
    "bias = None": _to_parameter(_delete_bias),
    "parameter in place": _to_parameter(_in_place),
    "buffer in place": _to_buffer(_in_place),
    "new buffer": _to_buffer(_set_buffer),
    "load_state_dict": lambda module, number: _state(module, assign=False),
    "load_state_dict(assign)": lambda module, number: _state(module, assign=True),
    "cast": _cast,
    "cast and back": _cast_and_back,
    "new child": _child,
    "train": _train,
    "train child": _train_child,
    "requires_grad": _requires_grad,
    "attribute": _settings(_attribute),
    "tensor attribute": _settings(_tensor_attribute),
    "flag of a child": _settings(_flag_of_child),
    "entry": _settings(_entry),
    "tensor in entry": _settings(_tensor_entry),
    "list item": _settings(_list_item),
    "tensor in list": _settings(_tensor_item),
    "attribute of object": _settings(_of_object),
    "tensor of object": _settings(_tensor_of_object),
    "entry of object": _settings(_entry_of_object),
    "new object": _settings(_object),
    "gate": _open_gate,
    "read at some": _read_at_some,
    "closure": _closure,
    **{name: _replace(name) for name in _REPLACED},
}
