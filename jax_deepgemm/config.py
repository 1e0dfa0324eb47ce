"""Trace-time configuration: what an op does when its call says nothing.

Every setting here is read while a function is traced and lowered, and becomes part of the program. A
function that `jax.jit` has already traced keeps the settings of that moment; `jax.clear_caches()` makes it
look again. Where a call takes the same name as an argument (`num_sms=`), the argument wins.

>>> import jax_deepgemm
>>> jax_deepgemm.config.get().fallback
'error'
>>> with jax_deepgemm.config.use(num_sms=100):
...     jax_deepgemm.config.get().num_sms
100
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import hashlib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jax_deepgemm.jit.toolchain import read_settings

__all__ = ["Settings", "get", "tuning_file", "tuning_state", "update", "use"]

TUNING_FILE = "JAX_DEEPGEMM_TUNING_FILE"
FALLBACKS = ("error", "reference")
WIDEST_TILE = 256


@dataclass(frozen=True)
class Settings:
    """Settings of one trace.

    Attributes:
      num_sms: streaming multiprocessors a persistent kernel may occupy; None for all of the device. Fewer
        leaves room for collectives that run at the same time.
      fallback: what a GPU without a kernel for the op does: "error", or "reference" for the float32 jnp
        form, which is correct and slow.
      block_size_multiple_of: the columns of a product's tile are a multiple of it, whatever is faster.
      mk_alignment: where groups start that are given by their ends: at multiples of so many rows.
      pdl: whether a kernel may start before the one in front of it, of the same call, has ended
        (programmatic dependent launch).
      tc_util: percent of the time that tensor cores may work. On Hopper it changes nothing.
      ignore_compile_dims: changes nothing: it is for kernels that are compiled for one shape, and what is
        compiled for a shape here is chosen by what it gains.

    Raises:
      ValueError: a value that a setting cannot take.

    The last five are DeepGEMM's knobs (`jax_deepgemm.deep_gemm`).

    >>> Settings(num_sms=100).num_sms
    100
    """

    num_sms: int | None = None
    fallback: str = "error"
    block_size_multiple_of: int = 1
    mk_alignment: int = 128
    pdl: bool = True
    tc_util: int = 100
    ignore_compile_dims: bool = False

    def __post_init__(self) -> None:
        if self.num_sms is not None:
            _check_whole("num_sms", self.num_sms, 1, None, ", or None for all")
        if self.fallback not in FALLBACKS:
            raise ValueError(f"config: fallback is {self.fallback!r}, need one of {', '.join(FALLBACKS)}.")
        _check_whole("block_size_multiple_of", self.block_size_multiple_of, 1, WIDEST_TILE)
        _check_whole("mk_alignment", self.mk_alignment, 1, None)
        _check_whole("tc_util", self.tc_util, 0, 100)
        for name in ("pdl", "ignore_compile_dims"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"config: {name} is {getattr(self, name)!r}, need True or False.")

    @property
    def of_kernels(self) -> tuple[tuple[str, Any], ...]:
        """Those that change which kernels run or how they are launched, where they are not at their default:
        parameters of every op."""
        names = ("block_size_multiple_of", "pdl")
        return tuple((name, getattr(self, name)) for name in names if getattr(self, name) != _DEFAULTS[name])


_DEFAULTS = {field.name: field.default for field in dataclasses.fields(Settings)}


def _check_whole(name: str, value: Any, least: int, most: int | None, more: str = "") -> None:
    if type(value) is not int or value < least or (most is not None and value > most):
        need = "a positive int" if most is None else f"an int from {least} to {most}"
        raise ValueError(f"config: {name} is {value!r}, need {need}{more}.")


def _replaced(base: Settings, changes: dict[str, Any]) -> Settings:
    known = {field.name for field in dataclasses.fields(Settings)}
    unknown = sorted(set(changes) - known)
    if unknown:
        raise ValueError(
            f"config: no setting named {', '.join(unknown)}; there are {', '.join(sorted(known))}."
        )
    return dataclasses.replace(base, **changes)


_default = Settings()
_scoped: contextvars.ContextVar[Settings | None] = contextvars.ContextVar("jax_deepgemm_config", default=None)


def get() -> Settings:
    """The settings in force here: those of the innermost `use`, else those of the process.

    Returns:
      Settings. Raises nothing.

    >>> from jax_deepgemm import config
    >>> config.get().mk_alignment
    128
    """
    return _scoped.get() or _default


def update(**changes: Any) -> None:
    """Changes the settings of the whole process.

    Args:
      changes: settings by name, as the attributes of `Settings`; the others stay.

    >>> from jax_deepgemm import config
    >>> config.update(num_sms=120)
    >>> config.get().num_sms
    120
    >>> config.update(num_sms=None)

    Raises:
      ValueError: an unknown setting, or a value it cannot take.
    """
    global _default
    _default = _replaced(_default, changes)


@contextlib.contextmanager
def use(**changes: Any) -> Iterator[Settings]:
    """Changes settings inside a `with` block of this thread (or task), and puts them back after it.

    Args:
      changes: settings by name, as the attributes of `Settings`; the others stay.

    Yields:
      Settings, those of the block.

    >>> from jax_deepgemm import config
    >>> with config.use(fallback="reference"):
    ...     config.get().fallback
    'reference'
    >>> config.get().fallback
    'error'

    Raises:
      ValueError: an unknown setting, or a value it cannot take.
    """
    settings = _replaced(get(), changes)
    token = _scoped.set(settings)
    try:
        yield settings
    finally:
        _scoped.reset(token)


def tuning_file(device: str, named: str | None = None) -> Path | None:
    """The file of measured configurations that holds for a device; it need not exist.

    `python -m jax_deepgemm tune` writes it, and each lowering looks at it before it asks the cost model.

    Args:
      device: as JAX names it, e.g. "NVIDIA H200".
      named: a file, or "off" for none (the cost model alone chooses), or "" for
        tuning/<device>.json in the folder of the kernel cache; None for what the environment variable
        JAX_DEEPGEMM_TUNING_FILE says, which means "" where it is not set.

    Returns:
      Path, or None where the cost model alone chooses.

    Raises:
      ValueError: a wrong environment variable of this package (`docs/configuration.md`).

    >>> from jax_deepgemm import config
    >>> config.tuning_file("NVIDIA H200", "").name
    'nvidia-h200.json'
    >>> config.tuning_file("NVIDIA H200", "off") is None
    True
    """
    wanted = (os.environ.get(TUNING_FILE, "") if named is None else named).strip()
    if wanted.lower() == "off":
        return None
    if wanted:
        return Path(wanted).expanduser()
    name = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
    return read_settings().cache_dir / "tuning" / f"{name}.json"


def tuning_state() -> str:
    """A digest of the tuning files in force, of any device, as part of cache keys.

    It is made of their contents, because all processes of a job must lower the same program, wherever their
    files are.

    Returns:
      sha256 in hexadecimal, or "" without any file. Files that cannot be read count as missing.

    Raises:
      ValueError: a wrong environment variable of this package (`docs/configuration.md`).

    >>> from jax_deepgemm import config
    >>> len(config.tuning_state()) in (0, 64)
    True
    """
    file = tuning_file("any")
    if file is None:
        return ""
    named = os.environ.get(TUNING_FILE, "").strip()
    contents = []
    for path in [file] if named else sorted(file.parent.glob("*.json")):
        with contextlib.suppress(OSError):
            contents.append(path.read_bytes())
    return hashlib.sha256(b"\0".join(contents)).hexdigest() if contents else ""
