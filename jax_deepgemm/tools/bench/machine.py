"""What a result must say about the machine: software, GPU, and the SM clock while measuring."""

from __future__ import annotations

import ctypes
import os
import platform
import shutil
import statistics
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib import metadata

import jax

from jax_deepgemm._version import __version__

_NVML_CLOCK_SM = 1
_QUERY = ["--format=csv,noheader,nounits", "--id=0"]
_PACKAGES = (
    "jax",
    "jaxlib",
    "jax-cuda12-plugin",
    "jax-cuda13-plugin",
    "cuda-core",
    "nvidia-cuda-nvrtc",
    "nvidia-cublas",
)


def versions() -> dict[str, str]:
    """Returns the versions of the packages that decide speed, as far as they are installed."""
    found = {"jax_deepgemm": __version__, "python": platform.python_version()}
    for name in (*_PACKAGES, "nvidia-cuda-nvrtc-cu12", "nvidia-cublas-cu12"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def on_gpu() -> bool:
    """Whether what is measured runs on a GPU."""
    return jax.default_backend() == "gpu"


def gpu() -> dict[str, str]:
    """Returns name, driver and power limit of the first GPU, as nvidia-smi says; empty without one."""
    keys = ("name", "driver_version", "power.limit", "clocks.max.sm", "memory.total")
    line = _nvidia_smi([f"--query-gpu={','.join(keys)}", *_QUERY])
    return dict(zip(keys, (cell.strip() for cell in line.split(",")), strict=False)) if line else {}


def _nvidia_smi(arguments: list[str]) -> str:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return ""
    try:
        done = subprocess.run([tool, *arguments], capture_output=True, text=True, timeout=20, check=True)
    except (subprocess.SubprocessError, OSError):
        return ""
    return done.stdout.strip()


@dataclass
class ClockLog:
    """SM clock and power of the first GPU, sampled beside a measurement.

    Use as a context manager; `between(t0, t1)` then sums up the samples taken between two `time.monotonic()`
    values. Without the driver's management library (NVML) the log stays empty.
    """

    period_ms: int = 10
    samples: list[tuple[float, float, float]] = field(default_factory=list)
    _stop: threading.Event = field(default_factory=threading.Event)

    def __enter__(self) -> ClockLog:
        read = _nvml_reader()
        if read is not None:
            threading.Thread(target=self._sample, args=(read,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()

    def _sample(self, read: Callable[[], tuple[float, float]]) -> None:
        while not self._stop.wait(self.period_ms / 1e3):
            self.samples.append((time.monotonic(), *read()))

    def between(self, start: float, end: float) -> dict[str, float]:
        """Returns median and smallest clock (MHz) and median power (W) of an interval; empty without samples.

        An interval shorter than the sampling period takes the nearest sample on either side.
        """
        margin = self.period_ms / 1e3
        return self.during([(start - margin, end + margin)])

    def during(self, spans: Sequence[tuple[float, float]]) -> dict[str, float]:
        """Returns the same of several intervals taken together, only samples inside them counted."""
        chosen = [
            sample for sample in list(self.samples) if any(start <= sample[0] <= end for start, end in spans)
        ]
        if not chosen:
            return {}
        clocks = [clock for _, clock, _ in chosen]
        return {
            "sm_mhz_median": statistics.median(clocks),
            "sm_mhz_min": min(clocks),
            "power_w_median": round(statistics.median(power for *_, power in chosen), 1),
            "samples": len(chosen),
        }


def _nvml_reader() -> Callable[[], tuple[float, float]] | None:
    """Returns a function that reads (SM clock in MHz, power in W) of the first visible GPU."""
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return None
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    device = ctypes.c_void_p()
    index = int(visible) if visible.isdigit() else 0
    if nvml.nvmlInit_v2() or nvml.nvmlDeviceGetHandleByIndex_v2(index, ctypes.byref(device)):
        return None
    clock, power = ctypes.c_uint(), ctypes.c_uint()

    def read() -> tuple[float, float]:
        nvml.nvmlDeviceGetClockInfo(device, _NVML_CLOCK_SM, ctypes.byref(clock))
        nvml.nvmlDeviceGetPowerUsage(device, ctypes.byref(power))
        return float(clock.value), power.value / 1e3

    return read
