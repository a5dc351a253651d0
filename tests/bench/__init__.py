"""Benchmarks beside peers: ``python -m tests.bench`` (install ``.[bench]`` first)."""
