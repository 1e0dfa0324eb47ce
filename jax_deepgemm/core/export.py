"""What `jax.export` must be told about this package's custom call."""

from __future__ import annotations

from jax import export

CUSTOM_CALL = "jax_deepgemm_launch"

export_checks: tuple[export.DisabledSafetyCheck, ...] = (export.DisabledSafetyCheck.custom_call(CUSTOM_CALL),)
"""For `jax.export.export(f, platforms=["cuda"], disabled_checks=jax_deepgemm.export_checks)`.

JAX refuses custom calls it does not know, because they may change between versions. Ours carries its whole
meaning in its attributes, which are versioned.
"""
