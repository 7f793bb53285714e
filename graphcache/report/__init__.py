"""Reports on a graph cache: counts, sizes that would serve better, reasons for eager calls.

Comes in: the counters of one forward and of its graphs. Goes out: `CacheInfo` and `Suggestion`, frozen
values that print as tables. `reasons` is the list of reasons why a call runs eagerly; every part of
the library takes its reasons from there, and `docs/troubleshooting.md` has a row for each.

This package computes with plain numbers. It changes no counter, touches no tensor, and asks the device
for nothing but the size of a pool. It may import `errors`, `config` and `_C`.
"""
