"""Everything that measurements share: workload types, arms, timing, profiles, goals and records.

- `workload` defines a module under measurement, its inputs and the scenarios of its calls.
- `arms` holds the ways to call a module that are compared, `goals` the ratios that they should reach.
- `timing` times arms that take turns; `profiling` counts the CUDA calls of each.
- `record` writes a JSON file with the device, driver, versions, date and commit of a run.

Nothing here imports another folder of `benchmarks`.
"""
