"""Configurations that were measured: the tuning file, and what it says of a problem.

    {"schema": 1,
     "devices": {
      "NVIDIA H200, 132 SMs": {
       "GemmProblem m=64 n=2112 k=7168": {"config": {"block_m": 64, ...}, "us": 8.7, "model": {...}, ...}}}}

`python -m jax_deepgemm tune` writes it. `choose` and `choose_grouped` ask `tuned` before the cost model: an
entry of just this problem on just this kind of device decides, unless it breaks a rule of the kernels as they
are now. The file is looked at in each lowering, and read when it has changed; functions that are compiled
keep what they have. Nothing that is wrong with it raises: it is said once in the log, and the model chooses.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from jax_deepgemm import config as settings
from jax_deepgemm._version import __version__
from jax_deepgemm.core._private import log_once
from jax_deepgemm.sm90.chip import Chip
from jax_deepgemm.sm90.config import GemmConfig, GemmProblem, problems_with

if TYPE_CHECKING:
    from jax_deepgemm.sm90.grouped import GroupedProblem

    Problem: TypeAlias = GemmProblem | GroupedProblem

SCHEMA = 1
Devices: TypeAlias = dict[str, dict[str, dict[str, Any]]]
"""What a file holds: `device_key` -> `problem_key` -> the fields of an `Entry`."""
_TYPES = {"int": int, "bool": bool, "str": str}


@dataclass(frozen=True)
class Entry:
    """What was measured for one problem.

    Attributes:
      config: the fastest candidate.
      us: its microseconds.
      model: the cost model's choice at that time.
      model_us: its microseconds; None where it could not be measured.
      candidates: how many were measured.
      version: of this package.
    """

    config: GemmConfig
    us: float
    model: GemmConfig
    model_us: float | None
    candidates: int
    version: str = __version__

    @property
    def regret(self) -> float | None:
        """By how much the model's choice is slower than the best: 0.02 for 2 %."""
        return None if self.model_us is None else self.model_us / self.us - 1

    def __str__(self) -> str:
        return f"measured {self.us:.1f} us, the fastest of {self.candidates}"


def device_key(chip: Chip) -> str:
    """Names a kind of device; `num_sms` of a call makes it another one.

    >>> device_key(Chip())
    'NVIDIA H200, 132 SMs'
    """
    return f"{chip.name}, {chip.num_sms} SMs"


def problem_key(p: Problem) -> str:
    """Names a problem: the fields that are not at their default, in order.

    >>> problem_key(GemmProblem(64, 2112, 7168, out="float32", batches=2, batched=(True, False)))
    'GemmProblem m=64 n=2112 k=7168 out=float32 batches=2 batched=(True,False)'
    """
    given = [(field, getattr(p, field.name)) for field in dataclasses.fields(p)]
    said = [f"{field.name}={value}".replace(" ", "") for field, value in given if value != field.default]
    return " ".join([type(p).__name__, *said])


def read(path: Path) -> Devices:
    """Reads a tuning file; entries are looked at when they are used (`parsed`).

    Raises:
      OSError: it cannot be read.
      ValueError: it is not a tuning file of this schema.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except RecursionError as error:
        raise ValueError(str(error)) from None
    if not isinstance(found, dict) or found.get("schema") != SCHEMA:
        raise ValueError(f"not a tuning file of schema {SCHEMA}")
    devices = found.get("devices")
    if not isinstance(devices, dict) or not all(isinstance(entries, dict) for entries in devices.values()):
        raise ValueError("its devices are not objects of entries by problem")
    return devices


def write(path: Path, devices: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> None:
    """Writes a tuning file, an entry a line; readers see the old file or the whole new one."""
    from jax_deepgemm.jit.cache import write_atomically

    parts = []
    for device, entries in devices.items():
        lines = [f"   {json.dumps(key)}: {json.dumps(entry)}" for key, entry in entries.items()]
        parts.append(f"  {json.dumps(device)}: {{\n" + ",\n".join(lines) + "\n  }")
    text = f'{{\n "schema": {SCHEMA},\n "devices": {{\n' + ",\n".join(parts) + "\n }\n}\n"
    write_atomically(path, text.encode())


def as_fields(entry: Entry) -> dict[str, Any]:
    """An entry as the file holds it."""
    return dataclasses.asdict(entry)


def parsed(fields: Any) -> Entry:
    """An entry from what the file holds; fields of a configuration that it lacks are at their default.

    >>> entry = Entry(GemmConfig(128, 128, 5, slabs=2), 8.5, GemmConfig(64, 128, 6), 9.0, 12)
    >>> parsed(as_fields(entry)) == entry
    True

    Raises:
      ValueError: unknown or missing fields, or values of another type.
    """
    try:
        known = dict(fields)
        entry = Entry(**known | {name: _config(known[name]) for name in ("config", "model")})
        times = [entry.us] if entry.model_us is None else [entry.us, entry.model_us]
        if not all(type(time) in (int, float) and time > 0 for time in times):
            raise ValueError(f"its microseconds are {times}, need positive numbers")
        if type(entry.candidates) is not int:
            raise TypeError(f"candidates is {entry.candidates!r}, need int")
        return entry
    except (TypeError, KeyError) as error:
        raise ValueError(f"{type(error).__name__}: {error}") from None


def _config(fields: Mapping[str, Any]) -> GemmConfig:
    config = GemmConfig(**fields)
    for field in dataclasses.fields(config):
        value, wanted = getattr(config, field.name), _TYPES.get(str(field.type))
        if wanted is not None and type(value) is not wanted:
            raise TypeError(f"{field.name} is {value!r}, need {field.type}")
    return config


def lookup(p: Problem, chip: Chip) -> Entry | None:
    """What the tuning file of the chip says of a problem, if that is a configuration that can run it."""
    path = settings.tuning_file(chip.name)
    if path is None:
        return None
    fields = _devices(path).get(device_key(chip), {}).get(problem_key(p))
    if fields is None:
        return None
    try:
        entry = parsed(fields)
        broken = _rules_broken(p, entry.config, chip)
    except Exception as error:  # whatever a file holds, a user's program goes on
        broken = [str(error)]
    if broken:
        log_once(f"{path}: entry of {problem_key(p)} is ignored: {'; '.join(broken)}. Tune again.")
        return None
    return entry


def tuned(p: Problem, chip: Chip) -> GemmConfig | None:
    """The configuration that goes before the cost model's, if there is one."""
    problem, config = _trying.get()
    if problem == p:
        return config
    entry = lookup(p, chip)
    return entry.config if entry else None


_trying: ContextVar[tuple[Any, GemmConfig | None]] = ContextVar("jax_deepgemm_trying", default=(None, None))


@contextlib.contextmanager
def trying(p: Problem, config: GemmConfig) -> Iterator[None]:
    """Has `config` chosen for `p` in what this thread lowers inside a `with` block.

    >>> p, chip = GemmProblem(64, 2112, 7168), Chip()
    >>> with trying(p, GemmConfig(64, 128, 6, slabs=2)):
    ...     str(tuned(p, chip))
    '64x128 stages=6 blocks/SM=1'
    """
    token = _trying.set((p, config))
    try:
        yield
    finally:
        _trying.reset(token)


def _rules_broken(p: Problem, c: GemmConfig, chip: Chip) -> list[str]:
    from jax_deepgemm.sm90.grouped import problems_with_grouped  # chooses, by this module

    broken = problems_with(p, c) if isinstance(p, GemmProblem) else problems_with_grouped(p, c)
    if not broken and p.shared_bytes(c) > chip.smem_per_block:
        broken = [f"{p.shared_bytes(c)} bytes of shared memory, {chip.name} has {chip.smem_per_block}"]
    return broken


def _devices(path: Path) -> Devices:
    try:
        about = os.stat(path)
    except OSError as error:
        if os.environ.get(settings.TUNING_FILE):
            log_once(f"{settings.TUNING_FILE}: {path} cannot be read ({error}); the cost model chooses.")
        return {}
    return _devices_then(path, about.st_mtime_ns, about.st_size, about.st_ino)


@functools.lru_cache(maxsize=8)
def _devices_then(path: Path, *_state: int) -> Devices:
    """The content in this state of the file."""
    try:
        return read(path)
    except Exception as error:  # whatever a file holds, a user's program goes on
        log_once(f"tuning file {path} is ignored, the cost model chooses: {error}. Remove it, or tune again.")
        return {}
