"""What a plan must know about the GPU, and the one table of what generations of GPUs have."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeAlias


class Generation(NamedTuple):
    """What all GPUs of one compute capability have in common.

    Attributes:
      name: what people call it.
      arch: the compilation target; the tensor-core and TMA instructions of Hopper and later need the variant
        with "a".
      smem_per_block: largest dynamic shared memory of one block of threads, in bytes (CUDA C++ Programming
        Guide, table "Technical Specifications per Compute Capability").
      product, num_sms: the GPU of this generation that is chosen for where none is at hand, and its SMs.
    """

    name: str
    arch: str
    smem_per_block: int
    product: str
    num_sms: int


GENERATIONS = {
    "8.0": Generation("Ampere", "80", 166_912, "NVIDIA A100-SXM4-80GB", 108),
    "8.6": Generation("Ampere", "86", 101_376, "NVIDIA A10", 72),
    "8.9": Generation("Ada", "89", 101_376, "NVIDIA L40S", 142),
    "9.0": Generation("Hopper", "90a", 232_448, "NVIDIA H200", 132),
    "10.0": Generation("Blackwell", "100a", 232_448, "NVIDIA B200", 148),
    "12.0": Generation("Blackwell", "120a", 101_376, "NVIDIA RTX PRO 6000", 188),
}
"""By compute capability, the oldest first."""


Knobs: TypeAlias = tuple[tuple[str, Any], ...]
"""What `jax_deepgemm.config` says of kernels, where it is not the default: `Settings.of_kernels`."""


@dataclass(frozen=True)
class Chip:
    """Facts of one GPU model that decide a configuration.

    Attributes:
      name: the product, for messages.
      arch: the compilation target, see `Generation`.
      num_sms: streaming multiprocessors a persistent grid may use.
      smem_per_block: largest dynamic shared memory of one block, in bytes.
      block_n_of: what the columns of a product's tile must be a multiple of; no fact but a wish of the user.
    """

    name: str = "NVIDIA H200"
    arch: str = GENERATIONS["9.0"].arch
    num_sms: int = 132
    smem_per_block: int = GENERATIONS["9.0"].smem_per_block
    block_n_of: int = 1

    @property
    def capability(self) -> str:
        """The compute capability.

        >>> Chip().capability, Chip(arch="120a").capability
        ('9.0', '12.0')
        """
        return _capability_of(self.arch)


H200 = Chip()


def chip_for(arch: str) -> Chip:
    """Returns the GPU to choose for when code is compiled for an architecture, and none is at hand.

    >>> chip_for("90a") == H200
    True
    """
    known = {one.arch: one for one in GENERATIONS.values()}
    one = known[arch]
    return Chip(one.product, one.arch, one.num_sms, one.smem_per_block)


def _capability_of(arch: str) -> str:
    digits = arch.rstrip("af")
    return f"{digits[:-1]}.{digits[-1]}"


def shared_memory_of(arch: str) -> int:
    """Returns the most dynamic shared memory, in bytes, of a block of threads that runs code for `arch`.

    An arch that the table lacks counts as the newest one before it; one older than all is not limited here,
    because the GPU is asked anyway when the kernel is loaded.

    >>> shared_memory_of("90a"), shared_memory_of("103a"), shared_memory_of("120f")
    (232448, 232448, 101376)
    """
    known = best_for(_capability_of(arch), GENERATIONS)
    if known is None:
        return max(one.smem_per_block for one in GENERATIONS.values())
    return GENERATIONS[known].smem_per_block


def chip_of(device: Any | None) -> Chip:
    """Returns what a plan must know about a CUDA device of JAX; an H200 where there is none, or of a
    generation that the table lacks (no kernel is chosen for such a one)."""
    generation = GENERATIONS.get(getattr(device, "compute_capability", ""))
    if device is None or generation is None:
        return H200
    return Chip(device.device_kind, generation.arch, device.core_count, generation.smem_per_block)


def with_sms(chip: Chip, num_sms: int | None) -> Chip:
    """The chip of which a kernel may use so many SMs."""
    return chip if num_sms is None else replace(chip, num_sms=min(num_sms, chip.num_sms))


def with_knobs(chip: Chip, knobs: Knobs) -> Chip:
    """The chip for which only configurations are chosen that the settings of a call allow.

    >>> with_knobs(Chip(), (("block_size_multiple_of", 64),)).block_n_of
    64
    """
    return replace(chip, block_n_of=dict(knobs).get("block_size_multiple_of", chip.block_n_of))


def best_for(capability: str, available: Iterable[str]) -> str | None:
    """Returns which of some targets serves a compute capability: the newest that can.

    Targets are named as CUDA names them: "9.0a" is for GPUs of compute capability 9.0 only, as code with
    Hopper's tensor-core instructions is; "8.0" is portable, for those of 8.0 and later, and is compiled for
    the GPU at hand.

    >>> best_for("9.0", ("8.0", "9.0a")), best_for("10.0", ("8.0", "9.0a")), best_for("7.5", ("8.0",))
    ('9.0a', '8.0', None)
    """
    able = [one for one in available if _serves(one, capability)]
    return max(able, key=lambda one: _number(one), default=None)


def described(target: str) -> str:
    """A target in words.

    >>> described("9.0a"), described("8.0")
    ('9.0 (Hopper)', '8.0 (Ampere) and later')
    """
    least = target.rstrip("a")
    return f"{least} ({GENERATIONS[least].name})" + ("" if target.endswith("a") else " and later")


def _serves(target: str, capability: str) -> bool:
    return target == f"{capability}a" or (not target.endswith("a") and _number(target) <= _number(capability))


def _number(capability: str) -> tuple[int, ...]:
    return tuple(map(int, capability.rstrip("a").split(".")))
