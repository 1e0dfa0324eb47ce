"""Measuring the kernels: problems and how they are run (`dense`, `grouped`, `fused`, `moe`, `shapes`, `skew`,
`sustained`, `op`), device time from the profiler (`timing`), what the tables look like (`catalog`), what no
kernel can beat (`floors`), reports (`report`) and plots (`plots`).

`python -m jax_deepgemm bench` is the way in.
"""
