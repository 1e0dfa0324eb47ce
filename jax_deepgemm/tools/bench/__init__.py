"""Measuring the kernels: problems and how they are run (`dense`, `grouped`, `fused`, `moe`, `shapes`, `skew`,
`sustained`, `op`), all candidates of a product (`tune`, `products`), device time from the profiler
(`timing`), what the tables look like (`catalog`), what no kernel can beat (`floors`), reports (`report`) and
plots (`plots`).

`python -m jax_deepgemm bench` and `tune` are the ways in.
"""
