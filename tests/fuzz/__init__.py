"""Programs: the differential fuzzer (`python -m tests.fuzz`), and `python -m tests.fuzz.cycles`."""
