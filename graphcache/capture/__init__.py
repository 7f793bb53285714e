"""Turns a trace into graphs: plans the sizes, captures the largest first, verifies the replays.

Comes in: the trace of one eager call, the options, and a pool. Goes out: a `Bucket` for each size,
with its graph, static inputs and outputs, and the reason against padding, if there is one. `ladder`
holds the core loop; `static_inputs` and `outputs` describe the two ends of a graph. `other_sizes` traces
the sizes that the caller did not call. `verify` decides every comparison with eager, by `samples` of
rows and the `closeness` of values.

A capture runs the forward's Python again, over static inputs. It takes memory from the pool, and puts
back all that a run mutates. It does not publish: no call is served before `dispatch` has the buckets.
It may import `tracing` and what lies below.
"""
