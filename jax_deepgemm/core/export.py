"""What `jax.export` must be told about the custom calls of this package's programs."""

from __future__ import annotations

from jax import export

from jax_deepgemm.core.launch import TARGET

export_checks: tuple[export.DisabledSafetyCheck, ...] = tuple(
    map(export.DisabledSafetyCheck.custom_call, (TARGET, "ragged_all_to_all"))
)
"""For `jax.export.export(f, platforms=["cuda"], disabled_checks=jax_deepgemm.export_checks)`.

JAX refuses custom calls it does not know, because they may change between versions. Ours carries its whole
meaning in its attributes, which are versioned. The other is JAX's own lax.ragged_all_to_all, of
method="ragged" in jax_deepgemm.moe: JAX gives no guarantee for it across versions.
"""
