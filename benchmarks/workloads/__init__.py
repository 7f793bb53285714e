"""The modules and programs that are measured.

- `catalog` lists the modules that `python -m benchmarks` compares the arms on; `models` defines them.
- `memory` measures memory and capture time against the number of sizes.
- `char_decode`, `continuous_batching`, `embeddings`, `plain_module`, `two_models` and `weak_refs` are
  the programs of `examples/` with timing, options and records. Each compares its outputs with eager in
  the same run.
- `families`, `generate` and `zoo` run models of transformers, torchvision and timm; `cases` makes those.

Imports `harness` only.
"""
