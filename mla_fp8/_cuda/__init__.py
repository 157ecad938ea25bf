"""Runs a plan: launches kernels on CuPy's current stream."""
