"""Benchmarks: contestants timed side by side on the same seeds, with parity beside speed, and the report."""
