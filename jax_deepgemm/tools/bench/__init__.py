"""Measuring the kernels: the tables of all families (`catalog`), rows in one profiler session (`measure`), in
turns (`turns`) or as whole programs (`whole`), calls of ops to tune (`products`), device time from the
profiler (`timing`, `trace`), what no kernel can beat (`floors`), reports (`report`) and plots (`plots`).

What is measured stands in the families: core/bench.py says how. `python -m jax_deepgemm bench` and `tune` are
the ways in.
"""
