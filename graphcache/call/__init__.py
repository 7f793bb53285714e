"""Reads one call of a forward: binds the arguments, takes them apart, finds each tensor's role.

Comes in: args, kwargs, and the modes that surround the call (`modes`). Goes out: a `BoundCall`, a
frozen value whose `key` is equal for calls that the same graphs serve; or `Bypass` with the reason why
no graph can serve the call. `signature` knows the parameters of the forward, `pytree` takes nested
values apart and puts them together, `object_args` reads objects that hold tensors.

This package reads arguments and the state of torch, and changes neither. It runs no code of the
forward, allocates no memory of the device, and knows nothing of graphs. It may import `config`,
`errors`, `report` and `_C`.
"""
