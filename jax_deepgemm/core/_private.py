"""Everything this package takes from inside JAX, in one place.

Each use has a plain behaviour for a JAX that no longer has the name; what is then lost is logged once.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import types
from typing import Any

from jax.extend.core import Primitive
from jax.extend.mlir import ir

from jax_deepgemm.log import logger

try:
    from jax._src import dispatch as _dispatch

    _needs_devices: set[Primitive] | None = _dispatch.prim_requires_devices_during_lowering
except (ImportError, AttributeError):
    _needs_devices = None

_sharding_callbacks: Any = None
with contextlib.suppress(ImportError, AttributeError):
    from jax._src import custom_partitioning as _partitioning

    _sharding_callbacks = _partitioning._sharding_callbacks

try:
    from jax._src.config import traceback_in_locations_limit as _frames_of_a_location
    from jax._src.interpreters import mlir as _mlir

    _traceback_caches: Any = _mlir.TracebackCaches
except (ImportError, AttributeError):
    _traceback_caches = None

PARTITIONING_TARGET = "CustomSPMDPartitioning"


@functools.cache
def log_once(message: str) -> None:
    """Logs a warning the first time it is given."""
    logger.warning("%s", message)


def require_devices(primitive: Primitive) -> None:
    """Makes JAX pass the device assignment to a primitive whose lowering contains custom_partitioning."""
    if _needs_devices is not None:
        _needs_devices.add(primitive)


def can_partition() -> bool:
    """Whether a primitive's lowering may contain custom_partitioning."""
    if _needs_devices is None:
        log_once(
            "This JAX hides prim_requires_devices_during_lowering: operands cut over Auto mesh axes are "
            "gathered; use Explicit axes."
        )
    return _needs_devices is not None


def is_for_export(ctx: Any) -> bool:
    """Whether a lowering is made for `jax.export`."""
    parameters = getattr(ctx.module_context, "lowering_parameters", None)
    return bool(getattr(parameters, "for_export", False))


def partitioning_call(values: Any) -> Any | None:
    """The custom_partitioning call behind these lowered values; None if nothing was to be partitioned."""
    owner = getattr(values[0], "owner", None)
    op = getattr(owner, "opview", owner)
    if op is None or "call_target_name" not in op.attributes or "backend_config" not in op.attributes:
        return None
    return op if ir.StringAttr(op.attributes["call_target_name"]).value == PARTITIONING_TARGET else None


def without_frames(ctx: Any) -> Any:
    """The lowering context, for operations that carry no Python frames.

    XLA merges a partition callback's program into the whole one with the numbers of its frames as they are,
    which then mean other frames, or none yet. Adding frames to those of a loop or call can close a cycle,
    and the compiler does not come back from following it (StackFrames::IsPrefix; jaxlib 0.11).
    """
    if _traceback_caches is None:
        return ctx
    with _frames_of_a_location(0):
        caches = _traceback_caches()
    return ctx.replace(module_context=ctx.module_context.replace(traceback_caches=caches))


_callbacks_by_content: dict[str, Any] = {}


def _kind(device: Any) -> str:
    return f"{device.platform} {device.device_kind} {getattr(device, 'core_count', '')}"


def name_callback_by_content(call: Any, content: str) -> None:
    """Renames the partition callback of `call` so that equal programs get equal text in every process.

    JAX names the callback by its address, which keeps multi-device programs out of the persistent compilation
    cache. The callback is kept alive under its new name, without the MLIR context it was made in; one entry
    per (op, static parameters, mesh).
    """
    if _sharding_callbacks is None:
        log_once(
            "This JAX hides its partition callbacks: programs on Auto mesh axes are compiled anew in each "
            "process."
        )
        return
    info = _sharding_callbacks[ir.StringAttr(call.attributes["backend_config"]).value.encode()]
    platforms, mesh = info.module_context.platforms, info.mesh
    devices = [] if mesh.empty else [device.id for device in mesh.devices.flat]
    kinds = {} if mesh.empty else {_kind(device) for device in mesh.devices.flat}
    where = repr((tuple(platforms), mesh.axis_names, tuple(mesh.shape.items()), devices, sorted(kinds)))
    key = f"{content}:{hashlib.sha256(where.encode()).hexdigest()[:16]}"
    if key not in _callbacks_by_content:
        info.module_context = types.SimpleNamespace(platforms=platforms, backend=info.module_context.backend)
        _callbacks_by_content[key] = info
    _sharding_callbacks[key.encode()] = _callbacks_by_content[key]
    call.attributes["backend_config"] = ir.StringAttr.get(key)
