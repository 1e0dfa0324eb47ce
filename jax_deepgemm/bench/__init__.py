"""Measuring the kernels: problems and how they are run (`dense`, `grouped`, `fused`, `moe`), device time from
the profiler (`timing`), what the tables look like (`catalog`) and their reports and plots (`report`).

`python -m jax_deepgemm bench` is the way in.
"""
