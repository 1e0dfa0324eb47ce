"""What a kernel's plan must know about the GPU."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Chip:
    """Facts of one GPU model that decide a configuration.

    Attributes:
      name: the product, for messages.
      arch: the compilation target; Hopper's tensor-core and TMA instructions need the "a" variant.
      num_sms: streaming multiprocessors a persistent grid may use.
      smem_per_block: largest dynamic shared memory of one block, in bytes.
    """

    name: str = "NVIDIA H200"
    arch: str = "90a"
    num_sms: int = 132
    smem_per_block: int = 232_448


H200 = Chip()


def with_sms(chip: Chip, num_sms: int | None) -> Chip:
    """The chip of which a kernel may use so many SMs."""
    return chip if num_sms is None else replace(chip, num_sms=min(num_sms, chip.num_sms))
