"""Knobs of the process: settings of `jax_deepgemm.config` under DeepGEMM's names.

They are read while a function is traced, and are part of the program. `with jax_deepgemm.config.use(..)`
sets them for a block, and a call of this module takes them by name, for itself alone.
"""

from __future__ import annotations

import jax

from jax_deepgemm import config
from jax_deepgemm.core.chip import chip_of

__all__ = [
    "get_num_sms",
    "get_pdl",
    "get_tc_util",
    "set_block_size_multiple_of",
    "set_ignore_compile_dims",
    "set_num_sms",
    "set_pdl",
    "set_tc_util",
    "shutdown",
    "use_deterministic_algorithms",
]


def set_num_sms(num_sms: int) -> None:
    """Sets how many SMs a persistent kernel may use: `config.num_sms`.

    >>> from jax_deepgemm import deep_gemm
    >>> deep_gemm.set_num_sms(100)
    >>> deep_gemm.get_num_sms()
    100
    >>> deep_gemm.set_num_sms(0)

    Args:
      num_sms: a positive number, odd ones too; 0 for all.

    Raises:
      ValueError: another number.
    """
    config.update(num_sms=None if num_sms == 0 and type(num_sms) is int else num_sms)


def get_num_sms() -> int:
    """How many SMs a persistent kernel may use.

    Returns:
      `config.num_sms`, or else those of the first GPU here; without a GPU those of an H200. Raises nothing.

    >>> from jax_deepgemm import deep_gemm
    >>> deep_gemm.get_num_sms() > 0
    True
    """
    given = config.get().num_sms
    return chip_of(jax.devices()[0]).num_sms if given is None else given


def set_tc_util(tc_util: int) -> None:
    """Sets `config.tc_util`, which changes nothing on Hopper, here as in DeepGEMM.

    >>> from jax_deepgemm import deep_gemm
    >>> deep_gemm.set_tc_util(100)

    Args:
      tc_util: percent, 0 to 100.

    Raises:
      ValueError: another number.
    """
    config.update(tc_util=tc_util)


def get_tc_util() -> int:
    """`config.tc_util`.

    Returns:
      Percent, 100 unless it was set. Raises nothing.

    >>> from jax_deepgemm import deep_gemm
    >>> deep_gemm.get_tc_util()
    100
    """
    return config.get().tc_util


def set_pdl(enable: bool) -> None:
    """Sets whether a kernel may start before the one in front of it has ended: `config.pdl`.

    It concerns kernels of one call, such as those of `moe_mlp_decode`. XLA does not let kernels of different
    calls overlap.

    >>> from jax_deepgemm import deep_gemm
    >>> deep_gemm.set_pdl(True)

    Args:
      enable: True or False.

    Raises:
      ValueError: no bool.
    """
    config.update(pdl=enable)


def get_pdl() -> bool:
    """`config.pdl`.

    Returns:
      bool, True unless it was set, where DeepGEMM has False. Raises nothing.

    >>> from jax_deepgemm import deep_gemm
    >>> deep_gemm.get_pdl()
    True
    """
    return config.get().pdl


def set_ignore_compile_dims(enable: bool) -> None:
    """Sets `config.ignore_compile_dims`, which changes nothing and is not needed.

    Sizes are known while a function is lowered, and what a kernel is compiled for is chosen by what it gains.

    >>> from jax_deepgemm import deep_gemm
    >>> deep_gemm.set_ignore_compile_dims(False)

    Args:
      enable: True or False.

    Raises:
      ValueError: no bool.
    """
    config.update(ignore_compile_dims=enable)


def set_block_size_multiple_of(size: int | tuple[int, int]) -> None:
    """Sets what the columns of a product's tile are a multiple of: `config.block_size_multiple_of`.

    >>> from jax_deepgemm import deep_gemm
    >>> deep_gemm.set_block_size_multiple_of((1, 64))
    >>> deep_gemm.set_block_size_multiple_of(1)

    Args:
      size: 1 to 256, or (of the rows, of the columns), of which the first changes nothing on Hopper, here as
        in DeepGEMM.

    Raises:
      ValueError: another number. A multiple that no configuration has is an error of the call.
    """
    config.update(block_size_multiple_of=size[1] if isinstance(size, tuple) and len(size) == 2 else size)


def use_deterministic_algorithms(enable: bool = True) -> None:
    """Changes nothing: all kernels of this package give equal bits for equal inputs.

    >>> from jax_deepgemm import deep_gemm
    >>> deep_gemm.use_deterministic_algorithms()

    Args:
      enable: True or False.

    Raises nothing.
    """


def shutdown() -> None:
    """Changes nothing: kernels are unloaded with the process, and buffers are XLA's.

    >>> from jax_deepgemm import deep_gemm
    >>> deep_gemm.shutdown()

    Raises nothing.
    """
