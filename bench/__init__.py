"""Benchmarks against plain PyTorch and curvlinops; `make bench` runs them, `bench.plot` draws what they measured."""
