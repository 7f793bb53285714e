"""Runs the fuzzer: `python -m tests.fuzz --sequences 10000 --jobs 2`."""

from tests.fuzz.runner import main

raise SystemExit(main())
