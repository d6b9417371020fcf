"""The tables of tools/bench.py."""
