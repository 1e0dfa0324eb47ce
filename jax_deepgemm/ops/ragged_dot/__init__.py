"""jax.lax.ragged_dot and ragged_dot_general on grouped kernels."""
