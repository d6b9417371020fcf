"""Eleven C files of one idea each, from a triple loop to nearly the engine's own kernels: see README.md."""
