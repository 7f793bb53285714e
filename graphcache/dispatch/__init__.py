"""Serves the calls of one forward that native code hands back, and runs the stages of a first call.

Comes in: a call, from `wrappers`. Goes out: the forward's result, from a graph or from an eager run
whose reason is counted. `cache` decides, `first_call` goes through trace, plan, capture, verify and
publish, `store` holds the entries of all signatures, `entry` one of them.

Only this package changes the state of a graph cache: its entries, its counts, and the entries of
native code (`publish`). It holds the pool's lock while it does. It may import `capture`, `tracing`,
`guards` and what lies below; only `wrappers` calls it.
"""
