"""Compiled kernels on disk.

    <cache dir>/entries/                cuda.core's FileStreamProgramCache: key -> JSON (cubin digest, report)
    <cache dir>/cubins/<digest>.cubin   cubins by content, where the launcher of another process finds them
    <cache dir>/locks/                  one file per kernel that is being compiled now
    <cache dir>/dump/                   PTX and SASS, if asked for

Every write is atomic, so any number of processes may share the directory. A directory that cannot be used
costs one warning and the speed of the next start, nothing else. A damaged entry counts as absent.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import functools
import hashlib
import json
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from jax_deepgemm.jit import toolchain
from jax_deepgemm.jit.report import CompiledKernel, KernelReport

LOCK_TIMEOUT_S = 60.0
_POLL_S = 0.01
_CUBINS = "cubins"
_LOCKED = "%s is still locked after %.0f s, going on without it"
_UNUSABLE = (
    "kernel cache %s cannot be written (%s); compiled kernels stay in memory and every process compiles its "
    "own. Free space there, or set JAX_DEEPGEMM_CACHE_DIR to a writable directory."
)


class KernelCache:
    """The cache of one directory; `open_cache` gives the one of this process."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._entries: Any = None
        self._writable = True
        self._giving_up = threading.Lock()
        try:
            self._entries = toolchain.import_cuda_core().utils.FileStreamProgramCache(root)
            (root / _CUBINS).mkdir(exist_ok=True)
        except OSError as error:
            self._give_up(error)

    def get_or_compile(self, key: bytes, build: Callable[[], CompiledKernel]) -> CompiledKernel:
        """The kernel from disk, or built and stored; one process of a node builds, the others wait for it."""
        if kernel := self.get(key):
            return kernel
        with self._locked(key):
            if kernel := self.get(key):  # built by another process while this one waited
                return kernel
            kernel = build()
            self.put(key, kernel)
            return kernel

    def get(self, key: bytes) -> CompiledKernel | None:
        """The kernel as stored, None if it is absent or damaged."""
        if self._entries is None:
            return None
        try:
            manifest = json.loads(self._entries[key])
            cubin = self.cubin_path(manifest["digest"]).read_bytes()
            if hashlib.sha256(cubin).hexdigest() != manifest["digest"]:
                raise ValueError("the cubin does not have the digest it was stored under")
            manifest["report"]["warnings"] = tuple(manifest["report"]["warnings"])
            report = KernelReport(**manifest.pop("report"))
            return CompiledKernel(
                cubin=cubin, report=dataclasses.replace(report, from_cache=True), **manifest
            )
        except KeyError:
            return None
        except (OSError, ValueError, TypeError) as error:
            toolchain.logger.info("kernel cache %s: unusable entry (%s), compiling again", self.root, error)
            return None

    def put(self, key: bytes, kernel: CompiledKernel) -> None:
        """Stores the cubin first, then the manifest that names it."""
        if not self._writable:
            return
        manifest = {
            "name": kernel.name,
            "digest": kernel.digest,
            "arch": kernel.arch,
            "report": dataclasses.asdict(kernel.report),
        }
        try:
            write_atomically(self.cubin_path(kernel.digest), kernel.cubin)
            self._entries[key] = json.dumps(manifest).encode()
        except OSError as error:
            self._give_up(error)

    @property
    def writable(self) -> bool:
        """Whether what was compiled is there for the next process, as far as is known."""
        return self._writable

    def cubin_path(self, digest: str) -> Path:
        """Where the cubin of this content lies."""
        return self.root / _CUBINS / f"{digest}.cubin"

    def _locked(self, key: bytes) -> contextlib.AbstractContextManager[None]:
        """Holds the kernel's lock file; without it a kernel is compiled twice, and nothing else happens."""
        path = self.root / "locks" / f"{key.hex()}.lock"
        return locked(path) if self._writable else contextlib.nullcontext()

    def _give_up(self, error: OSError) -> None:
        with self._giving_up:
            if self._writable:
                self._writable = False
                toolchain.logger.warning(_UNUSABLE, self.root, error)


def cache_dir() -> Path:
    """The directory of the environment's choice."""
    return toolchain.cache_dir()


def cubin_directory() -> Path:
    """Where cubins lie by content, as <digest>.cubin."""
    return cache_dir() / _CUBINS


def open_cache(root: Path) -> KernelCache:
    """This process's cache of a directory: one object, so that it warns once."""
    with _opening:
        return _open(root)


_opening = threading.Lock()


@functools.lru_cache(maxsize=8)
def _open(root: Path) -> KernelCache:
    return KernelCache(root)


def write_atomically(path: Path, data: bytes) -> None:
    """Readers see the old file or the whole new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Holds a lock file, if the file system has locks and it comes free in time."""
    handle: int | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = _acquire(path, time.monotonic() + LOCK_TIMEOUT_S)
        if handle is None:
            toolchain.logger.warning(_LOCKED, path, LOCK_TIMEOUT_S)
    except OSError as error:  # a full disk shows itself in what is written
        toolchain.logger.info("no lock on %s (%s), going on without it", path, error)
    try:
        yield
    finally:
        if handle is not None:
            with contextlib.suppress(OSError):
                path.unlink()
            os.close(handle)


def _acquire(path: Path, deadline: float) -> int | None:
    """An open, locked descriptor of `path`, or None when the deadline passes."""
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_same_file(handle, path):  # else the previous holder has removed it meanwhile
                return handle
        except BlockingIOError:
            if time.monotonic() > deadline:
                os.close(handle)
                return None
            time.sleep(_POLL_S)
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)


def _is_same_file(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), os.stat(path))
    except FileNotFoundError:
        return False
