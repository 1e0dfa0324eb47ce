"""The op, and the function that users call."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_deepgemm.core.family import LazyKernel
from jax_deepgemm.core.op import Op
from jax_deepgemm.core.options import config_option, num_sms_option, sharding_option
from tests.shared.toy_family.family import ScaleConfig

SCALE = Op(
    "toy_scale",
    "m k, k -> m k",
    result=lambda x, w, **_: [(x, np.float32)],
    reference=lambda x, w, **_: [x * w],
    kernel=LazyKernel("tests.shared.toy_family.kernels", "scale"),
)


def scale(
    x: jax.Array, w: jax.Array, *, config: Any = None, num_sms: int | None = None, out_sharding: Any = None
) -> jax.Array:
    """x [m, k] times w [k], float32."""
    x, w = (jnp.asarray(operand, jnp.float32) for operand in (x, w))
    return SCALE(
        x,
        w,
        config=config_option("scale", config, ScaleConfig),
        num_sms=num_sms_option("scale", num_sms),
        out_sharding=sharding_option("scale", out_sharding),
    )[0]
