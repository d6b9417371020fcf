"""The compiled kernels, one module per instruction-set level (built by tools/build_kernels.py)."""
