"""The command line: a module per command, each with `add_arguments(parser)` and `run(args) -> exit code`."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

from jax_deepgemm.jit.toolchain import read_settings

COMMANDS = {
    "demo": ("jax_deepgemm.cli.demo", "run an MLP block in BF16 and FP8, forward and backward, and check it"),
    "info": ("jax_deepgemm.cli.info", "versions, toolchain, cache, devices, and what is supported here"),
    "explain": ("jax_deepgemm.cli.explain", "the kernel chosen for a GEMM, and why"),
    "compile": ("jax_deepgemm.jit.cli", "compile kernels ahead of time into the cache"),
    "bench": ("jax_deepgemm.cli.bench", "measure the kernels on this machine, or report on measurements"),
    "tune": ("jax_deepgemm.cli.tune", "measure all configurations of given GEMMs, and keep the best of each"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
      argv: the arguments after the program's name; None for those of the process.

    Returns:
      the exit code: 0 for success, 1 for a check that failed, 2 for wrong arguments or environment
      variables.
    """
    parser = argparse.ArgumentParser(
        prog="python -m jax_deepgemm", description="FP8 and BF16 tensor-core kernels for JAX."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="{" + ",".join(COMMANDS) + "}")
    given = list(sys.argv[1:] if argv is None else argv)
    wanted = next((word for word in given if word in COMMANDS), None)
    for name, (module, summary) in COMMANDS.items():
        sub = commands.add_parser(name, help=summary, description=summary[0].upper() + summary[1:] + ".")
        if name == wanted:
            command = importlib.import_module(module)
            command.add_arguments(sub)
            sub.set_defaults(run=command.run)
    args = parser.parse_args(given)
    try:
        read_settings()
    except ValueError as error:
        print(f"{args.command}: environment: {error}", file=sys.stderr)
        return 2
    return int(args.run(args))
