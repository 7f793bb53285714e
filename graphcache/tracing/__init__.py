"""Runs a forward eagerly, once, and records what its graphs will depend on.

Comes in: a forward and a `BoundCall`. Goes out: a `Trace`: the result, tensors that were reached or
mutated, Python values that were read or changed, and the first operation that no graph can hold.
`op_recorder` watches operations, `python_recorder` the forward's code, by its `bytecode`;
`python_snapshot` and `checksums` find changes that neither of them shows.

A trace has the effects of an eager call and no others; with `restore`, it has none. The recorders are
gone when the trace is returned. It may import `guards`, `runtime`, `call` and what lies below.
"""
