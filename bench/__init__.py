"""Benchmarks and offline compilation; `python -m fastskel.bench.offline` compiles every kernel without a GPU."""
