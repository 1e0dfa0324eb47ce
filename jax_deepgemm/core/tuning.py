"""Configurations that were measured: the tuning file, and what it says of a problem.

    {"schema": 1,
     "devices": {
      "NVIDIA H200, 132 SMs": {
       "GemmProblem m=64 n=2112 k=7168": {"config": {"block_m": 64, ...}, "us": 8.7, "model": {...}, ...}}}}

`python -m jax_deepgemm tune` writes it. `Family.choose` asks it before the cost model: an entry of just this
problem on just this kind of device decides, unless it breaks a rule of the kernels as they are now. The file
is looked at in each lowering, and read when it has changed; functions that are compiled keep what they have.
Nothing that is wrong with it raises: it is said once in the log, and the model chooses.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from jax_deepgemm import config as settings
from jax_deepgemm._version import __version__
from jax_deepgemm.core._private import log_once
from jax_deepgemm.core.chip import Chip
from jax_deepgemm.jit.cache import write_atomically

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

    config: Any
    us: float
    model: Any
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


def problem_key(p: Any) -> str:
    """Names a problem: the fields that are not at their default, in order.

    >>> from dataclasses import make_dataclass, field
    >>> Sum = make_dataclass("Sum", ["m", "n", ("axes", tuple, ()), ("out", str, "bfloat16")])
    >>> problem_key(Sum(64, 2112, axes=(0, 1)))
    'Sum m=64 n=2112 axes=(0,1)'
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
    parts = []
    for device, entries in devices.items():
        lines = [f"   {json.dumps(key)}: {json.dumps(entry)}" for key, entry in entries.items()]
        parts.append(f"  {json.dumps(device)}: {{\n" + ",\n".join(lines) + "\n  }")
    text = f'{{\n "schema": {SCHEMA},\n "devices": {{\n' + ",\n".join(parts) + "\n }\n}\n"
    write_atomically(path, text.encode())


def as_fields(entry: Entry) -> dict[str, Any]:
    """An entry as the file holds it."""
    return dataclasses.asdict(entry)


def parsed(fields: Any, config: type[Any]) -> Entry:
    """An entry from what the file holds; fields of a configuration that it lacks are at their default.

    >>> Cut = dataclasses.make_dataclass("Cut", [("rows", "int"), ("split", "int", 1)], frozen=True)
    >>> entry = Entry(Cut(128, 2), 8.5, Cut(64), 9.0, 12)
    >>> parsed(as_fields(entry), Cut) == entry
    True

    Args:
      fields: the JSON object.
      config: the type of its configurations, a dataclass.

    Raises:
      ValueError: unknown or missing fields, or values of another type.
    """
    try:
        known = dict(fields)
        entry = Entry(**known | {name: _config(config, known[name]) for name in ("config", "model")})
        times = [entry.us] if entry.model_us is None else [entry.us, entry.model_us]
        if not all(type(time) in (int, float) and time > 0 for time in times):
            raise ValueError(f"its microseconds are {times}, need positive numbers")
        if type(entry.candidates) is not int:
            raise TypeError(f"candidates is {entry.candidates!r}, need int")
        return entry
    except (TypeError, KeyError) as error:
        raise ValueError(f"{type(error).__name__}: {error}") from None


def _config(kind: type[Any], fields: Mapping[str, Any]) -> Any:
    config = kind(**fields)
    for field in dataclasses.fields(config):
        value, wanted = getattr(config, field.name), _TYPES.get(str(field.type))
        if wanted is not None and type(value) is not wanted:
            raise TypeError(f"{field.name} is {value!r}, need {field.type}")
    return config


def lookup(p: Any, chip: Chip, config: type[Any], broken_rules: Callable[[Any], list[str]]) -> Entry | None:
    """What the tuning file of the chip says of a problem, if that is a configuration that can run it.

    Args:
      p: the problem.
      chip: the GPU, or the part of it that may be used.
      config: the type of configurations.
      broken_rules: why a configuration cannot run the problem.
    """
    path = settings.tuning_file(chip.name)
    if path is None:
        return None
    fields = _devices(path).get(device_key(chip), {}).get(problem_key(p))
    if fields is None:
        return None
    try:
        entry = parsed(fields, config)
        broken = broken_rules(entry.config)
    except Exception as error:  # whatever a file holds, a user's program goes on
        broken = [str(error)]
    if broken:
        log_once(f"{path}: entry of {problem_key(p)} is ignored: {'; '.join(broken)}. Tune again.")
        return None
    return entry


_trying: ContextVar[tuple[Any, Any]] = ContextVar("jax_deepgemm_trying", default=(None, None))


def tried(p: Any) -> Any | None:
    """The configuration that is being measured for a problem, if there is one."""
    problem, config = _trying.get()
    return config if problem == p else None


@contextlib.contextmanager
def trying(p: Any, config: Any) -> Iterator[None]:
    """Has `config` chosen for `p` in what this thread lowers inside a `with` block.

    >>> with trying("a problem", "a configuration"):
    ...     tried("a problem"), tried("another problem")
    ('a configuration', None)
    """
    token = _trying.set((p, config))
    try:
        yield
    finally:
        _trying.reset(token)


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
