"""Checks before each replay that the world outside the arguments is as the capture found it.

Comes in: the objects, attributes, dictionaries and tensors that a trace has read. Goes out: `Guards`,
a native structure that native code checks before a replay, and that explains the first failing check.
`reachability` walks Python objects; `static_objects` binds objects that hold state, such as a KV
cache, to slots of graphs.

Guards hold weak references and expected values. They never change what they check, run no code of the
user's, and do not synchronise with the device. It may import `pool`, `runtime` and what lies below.
"""
