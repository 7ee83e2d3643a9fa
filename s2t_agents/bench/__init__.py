"""Benchmarks that ship with the package: ``s2t bench``."""
