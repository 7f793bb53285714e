"""Programs that measure in processes of their own.

- `worker` runs one workload of the catalog; `python -m benchmarks` starts it.
- `record_all` runs the tests and the workloads made from the examples, and records each.
- `memcheck` runs tests and workloads under compute-sanitizer.

Imports `harness` and `workloads`.
"""
