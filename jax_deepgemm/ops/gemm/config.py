"""How a dense or grouped GEMM is cut, whatever the architecture."""

from __future__ import annotations

from typing import Any, ClassVar


class GemmConfig:
    """How a GEMM is cut, as `config=` takes it: a subclass for each architecture has the fields.

    `jax_deepgemm.explain` returns those that fit a call. `GemmConfig(...)` makes one of Hopper's.

    Args:
      fields: those of the architecture's class. Hopper's (`ops/gemm/sm90/config.py`): block_m, block_n,
        stages, swap_ab, split_k, blocks_per_sm, slabs, ping_pong.

    Raises:
      TypeError: fields that the class has not. A configuration that cannot run a call is refused there, by
        the op that takes it.

    >>> import jax_deepgemm
    >>> str(jax_deepgemm.GemmConfig(block_m=128, block_n=128, stages=5, slabs=2))
    '128x128 stages=5 blocks/SM=1'
    """

    DEFAULT: ClassVar[type[GemmConfig] | None] = None
    """What the base class makes an instance of."""

    def __new__(cls, *args: Any, **fields: Any) -> GemmConfig:
        made = GemmConfig.DEFAULT if cls is GemmConfig else cls
        if made is None:
            raise TypeError("GemmConfig: import it from jax_deepgemm, which knows the architectures.")
        return super().__new__(made)
