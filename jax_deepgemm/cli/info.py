"""python -m jax_deepgemm info: what is installed, where kernels are kept, and what runs here."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jax_deepgemm import config
from jax_deepgemm.cli.arguments import UsageError, one_line
from jax_deepgemm.core import tuning as files
from jax_deepgemm.core.chip import H200
from jax_deepgemm.jit import toolchain as jit
from jax_deepgemm.jit.cache import cache_dir
from jax_deepgemm.tools import registry
from jax_deepgemm.tools.bench import machine
from jax_deepgemm.tools.text import bytes_text


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="machine-readable, numbers as numbers")


def run(args: argparse.Namespace) -> int:
    found = collect()
    print(json.dumps(found, indent=2) if args.json else text(found))
    return 0


def collect() -> dict[str, Any]:
    """Returns everything `info` shows, as sections of typed values; None is what there is not."""
    found, problem = [], None
    try:
        found = devices()
    except UsageError as error:
        problem = str(error)
    return {
        "versions": {**machine.versions(), "system": f"{platform.system()} {platform.machine()}"},
        "toolchain": toolchain(),
        "cache": cache(),
        "tuning": [tuning(name) for name in _tunable(found)],
        "configuration": configuration(),
        "environment": environment(),
        "driver": driver(machine.gpu()),
        "extension": extension(),
        "devices": [device(one) for one in found],
        "devices_error": problem,
    }


def text(found: dict[str, Any]) -> str:
    """Returns the sections for people."""
    shown = {name: section for name, section in found.items() if name != "devices_error"}
    shown["devices"] = [_sentence(one) for one in found["devices"]] or [f"none: {found['devices_error']}"]
    return "\n\n".join(f"{name}\n{_indented(section)}" for name, section in shown.items())


def _sentence(one: dict[str, Any]) -> str:
    what = "kernels" if one["kernels"] else "reference only"
    return f"{one['name']} ({one['platform']}:{one['id']}): {what}. {one['reason']}"


def _indented(section: Any) -> str:
    entries = section if isinstance(section, list) else [] if section is None else [section]
    lines = [line for one in entries for line in ([one] if isinstance(one, str) else _pairs(one))]
    return "\n".join(f"  {line}" for line in lines or ["none"])


def _pairs(entry: dict[str, Any]) -> Iterator[str]:
    for name, value in entry.items():
        yield f"{name.replace('_', ' ')}: {_shown(name, value)}"


def _shown(name: str, value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None:
        return "all" if name == "num_sms" else "none"
    return bytes_text(value) if name == "bytes" else str(value)


def toolchain() -> dict[str, Any]:
    """Returns the compiler in use and its helpers, or why there is none."""
    found: dict[str, Any] = {"compiler": None, "version": None, "path": None, "cuda_core": None}
    found |= {"headers": str(jit.INCLUDE_DIR), "disassembler": None, "error": None}
    try:
        compiler = jit.find_toolchain(jit.read_settings())
        cuda_core = jit.import_cuda_core().__version__
    except jit.CompilerNotFoundError as error:
        return found | {"error": str(error)}
    found |= {"compiler": compiler.kind, "version": compiler.version, "path": compiler.path}
    disassembler = jit.find_disassembler()
    return found | {"cuda_core": cuda_core, "disassembler": disassembler[0] if disassembler else None}


def cache() -> dict[str, Any]:
    """Returns the kernel cache's folder, and how much is in it."""
    folder = cache_dir()
    sizes = list(_sizes(folder))
    return {
        "folder": str(folder),
        "exists": folder.is_dir(),
        "writable": _writable(folder),
        "files": len(sizes),
        "bytes": sum(sizes),
    }


def _sizes(folder: Path) -> Iterator[int]:
    """The bytes of every file below that can be seen, while other processes may add and remove some."""
    for root, _, names in os.walk(folder):
        for name in names:
            try:
                yield os.lstat(os.path.join(root, name)).st_size
            except OSError:
                continue


def _writable(folder: Path) -> bool:
    """Whether a file can be made there, the folder too if need be."""
    there = next((place for place in (folder, *folder.absolute().parents) if os.path.exists(place)), None)
    return there is not None and there.is_dir() and os.access(there, os.W_OK | os.X_OK)


def _tunable(devices: list[Any]) -> list[str]:
    """The kinds of device that kernels are chosen for: those here, or what is compiled for ahead of time."""
    return list(dict.fromkeys(one.device_kind for one in devices if support(one)[0])) or [H200.name]


def tuning(kind: str) -> dict[str, Any]:
    """Returns the tuning file in force for a kind of device, and how much it holds for that.

    >>> sorted(tuning("NVIDIA H200"))
    ['device', 'entries', 'error', 'exists', 'path']
    """
    path = config.tuning_file(kind)
    found: dict[str, Any] = {"device": kind, "path": None, "exists": False, "entries": 0, "error": None}
    if path is None:
        return found
    found |= {"path": str(path), "exists": os.path.exists(path)}
    if found["exists"]:
        try:
            entries = files.read(path).items()
            found["entries"] = sum(len(those) for name, those in entries if name.startswith(f"{kind}, "))
        except (OSError, ValueError) as error:
            found["error"] = str(error)
    return found


def configuration() -> dict[str, Any]:
    """Returns the trace-time settings."""
    return dataclasses.asdict(config.get())


def environment() -> dict[str, str]:
    """Returns the environment variables that are set."""
    return {name: value for name, value in sorted(os.environ.items()) if name.startswith("JAX_DEEPGEMM_")}


def driver(said: dict[str, str]) -> dict[str, Any] | None:
    """Returns what nvidia-smi says of the first GPU, numbers as numbers; None without it.

    >>> found = driver({"name": "NVIDIA H200", "driver_version": "570.1", "power.limit": "700.00"})
    >>> found["power_limit_watts"], found["memory_mib"]
    (700.0, None)
    """
    if not said:
        return None
    return {
        "name": said.get("name"),
        "version": said.get("driver_version"),
        "power_limit_watts": _number(said.get("power.limit")),
        "most_sm_mhz": _number(said.get("clocks.max.sm")),
        "memory_mib": _number(said.get("memory.total")),
    }


def _number(said: str | None) -> float | None:
    try:
        return float(said or "")
    except ValueError:
        return None


def extension() -> dict[str, Any]:
    """Returns whether the native launcher can be loaded."""
    try:
        import jax_deepgemm._ffi as native
    except ImportError as error:
        way_out = "install the package, or run make ext in a source tree"
        return {"loaded": False, "file": None, "error": f"{error}; {way_out}"}
    return {"loaded": True, "file": str(native.__file__), "error": None}


def devices() -> list[Any]:
    """Returns JAX's devices.

    Raises:
      UsageError: JAX finds none, or not of the platform that JAX_PLATFORMS names.
    """
    import jax

    try:
        return list(jax.devices())
    except (RuntimeError, AssertionError) as error:  # the second where a plugin is there, and no GPU
        platforms = os.environ.get("JAX_PLATFORMS")
        about = f" for JAX_PLATFORMS={platforms}" if platforms else ""
        reason = one_line(str(error)) or "JAX says no more"
        raise UsageError(f"JAX finds no device{about}: {reason}. JAX_PLATFORMS=cpu needs none.") from error


def device(one: Any) -> dict[str, Any]:
    """Returns what a JAX device is, and what runs on it."""
    supported, reason = support(one)
    return {
        "name": one.device_kind,
        "id": one.id,
        "platform": one.platform,
        "compute_capability": getattr(one, "compute_capability", None),
        "kernels": supported,
        "reason": reason,
    }


def support(device: Any) -> tuple[bool, str]:
    """Returns whether the package's kernels run on a JAX device, and why (not).

    >>> import jax
    >>> support(jax.devices("cpu")[0])[1].split(": ")[0]
    'Ops run in their float32 reference form'
    """
    there = " or ".join(registry.capabilities())
    if device.platform != "gpu":
        return (
            False,
            f"Ops run in their float32 reference form: kernels need compute capability {there}.",
        )
    capability = getattr(device, "compute_capability", None)
    if capability is None or "rocm" in str(getattr(device.client, "platform_version", "")).lower():
        return False, "Kernels need an NVIDIA GPU; config fallback='reference' allows the float32 form."
    families = [family.name for family in registry.families() if family.runs_on(str(capability))]
    if not families:
        return (
            False,
            f"Compute capability {capability} has no kernels, {there} has; "
            "config fallback='reference' allows the float32 form.",
        )
    return True, f"Kernels for compute capability {capability}: {', '.join(families)}."
