"""What a result must say about the machine: software, GPU, and the SM clock while measuring."""

from __future__ import annotations

import platform
import shutil
import statistics
import subprocess
import threading
import time
from dataclasses import dataclass, field
from importlib import metadata
from typing import Any

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
    import jax_deepgemm

    found = {"jax_deepgemm": jax_deepgemm.__version__, "python": platform.python_version()}
    for name in (*_PACKAGES, "nvidia-cuda-nvrtc-cu12", "nvidia-cublas-cu12"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


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
    values. Without nvidia-smi the log stays empty.
    """

    period_ms: int = 50
    samples: list[tuple[float, float, float]] = field(default_factory=list)
    _process: Any = None

    def __enter__(self) -> ClockLog:
        tool = shutil.which("nvidia-smi")
        if tool is not None:
            query = [tool, "--query-gpu=clocks.sm,power.draw", *_QUERY, f"--loop-ms={self.period_ms}"]
            self._process = subprocess.Popen(
                query, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
            )
            threading.Thread(target=self._read, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is not None:
            self._process.terminate()
            self._process.wait()

    def _read(self) -> None:
        for line in self._process.stdout:
            try:
                clock, power = (float(cell) for cell in line.split(","))
            except ValueError:
                continue
            self.samples.append((time.monotonic(), clock, power))

    def between(self, start: float, end: float) -> dict[str, float]:
        """Returns median and smallest clock (MHz) and median power (W) of an interval; empty without samples.

        An interval shorter than the sampling period takes the nearest sample on either side.
        """
        margin = self.period_ms / 1e3
        chosen = [sample for sample in list(self.samples) if start - margin <= sample[0] <= end + margin]
        if not chosen:
            return {}
        clocks = [clock for _, clock, _ in chosen]
        return {
            "sm_mhz_median": statistics.median(clocks),
            "sm_mhz_min": min(clocks),
            "power_w_median": statistics.median(power for *_, power in chosen),
            "samples": len(chosen),
        }
