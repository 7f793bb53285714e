"""The page docs/results.md and its plots, made from the records in benchmarks/results.

- `tables` writes the page: the index first, then the sections of `example_tables` and `comparison`.
- `plots` draws one plot for each record of `python -m benchmarks`.

Reads records and imports `harness` only: a page can be made on a machine without a GPU.
"""
