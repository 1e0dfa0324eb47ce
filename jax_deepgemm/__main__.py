"""python -m jax_deepgemm {demo, info, explain, compile, bench, names, tune}."""

from __future__ import annotations

import sys

from jax_deepgemm.cli import main

if __name__ == "__main__":
    sys.exit(main())
