"""Benchmarks of shrunk networks: what zeros bring once they are removed."""
