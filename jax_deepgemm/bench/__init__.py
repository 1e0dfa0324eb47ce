"""Measuring the kernels: `timing` (device time from the profiler), `dense` (problems), `report` (tables and
plots).

`python -m jax_deepgemm bench` is the way in.
"""
