"""A line names the tests that run whenever none has ended for a while, also with several processes."""

from __future__ import annotations

import os
import threading
import time

QUIET = 20.0
"""Seconds of silence before a line."""


class Heartbeat:
    """A pytest plugin, made while pytest does not capture output; a thread of its own calls `beat`."""

    def __init__(self, quiet: float = QUIET) -> None:
        self.quiet = quiet
        self.out = os.fdopen(os.dup(1), "w")  # where the terminal is, also while a test's output is captured
        self.running: dict[str, float] = {}
        self.heard = time.monotonic()
        self.done = threading.Event()

    def pytest_sessionstart(self) -> None:
        threading.Thread(target=self._watch, daemon=True).start()

    def pytest_sessionfinish(self) -> None:
        self.done.set()

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.running[nodeid] = time.monotonic()

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        self.running.pop(nodeid, None)
        self.heard = time.monotonic()

    def beat(self, now: float) -> str | None:
        """What to say at the time `now`; nothing if a test has ended shortly before."""
        if now - self.heard < self.quiet or not self.running:
            return None
        self.heard = now
        return "; ".join(f"{name} runs for {now - begin:.0f} s" for name, begin in list(self.running.items()))

    def _watch(self) -> None:
        while not self.done.wait(1.0):
            line = self.beat(time.monotonic())
            if line:
                print(f"\n{line}", file=self.out, flush=True)
