"""python -m jax_deepgemm info: what is installed, where kernels are kept, and what runs here."""

from __future__ import annotations

import argparse
import json
import platform
from pathlib import Path
from typing import Any

from jax_deepgemm.cli.text import bytes_text


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="machine-readable")


def run(args: argparse.Namespace) -> int:
    found = collect()
    if args.json:
        print(json.dumps(found, indent=2))
        return 0
    for section, entries in found.items():
        print(section)
        lines = (
            entries if isinstance(entries, list) else [f"{key}: {value}" for key, value in entries.items()]
        )
        for line in lines or ["none"]:
            print(f"  {line}")
        print()
    return 0


def collect() -> dict[str, Any]:
    """Returns everything `info` prints, as sections."""
    from jax_deepgemm.bench import machine

    return {
        "versions": {**machine.versions(), "system": f"{platform.system()} {platform.machine()}"},
        "toolchain": toolchain(),
        "cache": cache(),
        "configuration": configuration(),
        "driver": machine.gpu() or {"nvidia-smi": "not found, or no GPU"},
        "extension": extension(),
        "devices": devices(),
    }


def toolchain() -> dict[str, str]:
    """Returns the compilers, or why there is none."""
    try:
        from jax_deepgemm.jit import toolchain as jit_toolchain

        return {str(key): str(value) for key, value in jit_toolchain.describe().items()}
    except Exception as error:
        return {"compiler": f"none: {error}"}


def cache() -> dict[str, str]:
    """Returns the kernel cache's folder, and how much is in it."""
    from jax_deepgemm.jit.cache import cache_dir

    folder = Path(cache_dir())
    files = [path for path in folder.rglob("*") if path.is_file()] if folder.is_dir() else []
    size = sum(path.stat().st_size for path in files)
    return {"folder": str(folder), "files": str(len(files)), "size": bytes_text(size)}


def configuration() -> dict[str, str]:
    """Returns the trace-time settings and the environment variables that are set."""
    import dataclasses
    import os

    from jax_deepgemm import config

    settings = {name: str(value) for name, value in dataclasses.asdict(config.get()).items()}
    variables = {
        name: value for name, value in sorted(os.environ.items()) if name.startswith("JAX_DEEPGEMM_")
    }
    return settings | variables


def extension() -> dict[str, str]:
    """Returns whether the native launcher can be loaded."""
    try:
        import jax_deepgemm._ffi as native
    except ImportError as error:
        return {
            "native launcher": f"missing ({error}); install the package, or run make ext in a source tree"
        }
    return {"native launcher": Path(str(native.__file__)).name}


def devices() -> list[str]:
    """Returns one line a device: what it is, and what runs on it."""
    import jax

    lines = []
    for device in jax.devices():
        supported, reason = support(device)
        lines.append(
            f"{device.device_kind} ({device}): {'kernels' if supported else 'reference only'}. {reason}"
        )
    return lines


def support(device: Any) -> tuple[bool, str]:
    """Returns whether the package's kernels run on a JAX device, and why (not).

    >>> import jax
    >>> support(jax.devices("cpu")[0])
    (False, 'Ops run in their float32 reference form: kernels need an NVIDIA GPU of compute capability 9.0.')
    """
    if device.platform != "gpu":
        return (
            False,
            "Ops run in their float32 reference form: kernels need an NVIDIA GPU of compute capability 9.0.",
        )
    capability = getattr(device, "compute_capability", None)
    if capability is None or "rocm" in str(getattr(device.client, "platform_version", "")).lower():
        return False, "Kernels need an NVIDIA GPU; config fallback='reference' allows the float32 form."
    if str(capability) != "9.0":
        return (
            False,
            f"Compute capability {capability} has no kernels, 9.0 has; "
            "config fallback='reference' allows the float32 form.",
        )
    return True, "FP8 and BF16 dense GEMMs for compute capability 9.0."
