"""The command line: a module per command, each with `add_arguments(parser)` and `run(args) -> exit code`."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import sys
from collections.abc import Sequence

from jax_deepgemm._version import __version__
from jax_deepgemm.cli.arguments import EXIT_CODES, Parser, UsageError, one_line, refusing
from jax_deepgemm.jit.toolchain import read_settings
from jax_deepgemm.log import logger

COMMANDS = {
    "demo": ("jax_deepgemm.cli.demo", "run an MLP block in BF16 and FP8, forward and backward, and check it"),
    "info": ("jax_deepgemm.cli.info", "versions, toolchain, cache, devices, and what is supported here"),
    "explain": ("jax_deepgemm.cli.explain", "the kernels chosen for a GEMM or a layer of experts, and why"),
    "compile": ("jax_deepgemm.cli.compile", "compile kernels ahead of time into the cache"),
    "bench": ("jax_deepgemm.cli.bench", "measure the kernels on this machine, or report on measurements"),
    "names": (
        "jax_deepgemm.inference.listing",
        "DeepSpeed's names that have a function here, and their arguments",
    ),
    "tune": ("jax_deepgemm.cli.tune", "measure all configurations of given GEMMs, and keep the best of each"),
}
FAILED, USAGE, INTERRUPTED, PIPE_CLOSED = 1, 2, 130, 141


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
      argv: the arguments after the program's name; None for those of the process.

    Returns:
      the exit code: 0 for success, 1 for something that failed, 2 for wrong arguments, files or environment
      variables, 130 after Ctrl-C, 141 where nobody reads the output any more.
    """
    given = list(sys.argv[1:] if argv is None else argv)
    command = next((word for word in given if word in COMMANDS), "jax_deepgemm")
    try:
        try:
            return _run(given)
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()
    except KeyboardInterrupt:
        return _said(command, "interrupted", INTERRUPTED)
    except BrokenPipeError:
        _drop_output()
        return PIPE_CLOSED
    except UsageError as error:
        return _said(command, one_line(str(error)), USAGE)
    except _failures() as error:
        logger.debug("%s failed", command, exc_info=True)
        return _said(command, str(error) or type(error).__name__, FAILED)


def _run(given: Sequence[str]) -> int:
    args = _parser(given).parse_args(given)
    with refusing("environment"):
        read_settings()
    return int(args.run(args))


def _parser(given: Sequence[str]) -> Parser:
    """The parser of all commands; only that of the command at hand has its arguments."""
    parser = Parser(
        prog="python -m jax_deepgemm",
        description="FP8 and BF16 tensor-core kernels for JAX.",
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"jax_deepgemm {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="{" + ",".join(COMMANDS) + "}")
    wanted = next((word for word in given if word in COMMANDS), None)
    for name, (module, summary) in COMMANDS.items():
        sub = commands.add_parser(
            name, help=summary, description=summary[0].upper() + summary[1:] + ".", epilog=EXIT_CODES
        )
        sub.formatter_class = argparse.RawDescriptionHelpFormatter
        if name == wanted:
            command = importlib.import_module(module)
            command.add_arguments(sub)
            sub.set_defaults(run=command.run)
    return parser


def _failures() -> tuple[type[Exception], ...]:
    """What can fail though nothing is wrong with the arguments, and whose message says enough."""
    import jax

    from jax_deepgemm.jit import CompileError, CompilerNotFoundError

    return CompileError, CompilerNotFoundError, OSError, MemoryError, jax.errors.JaxRuntimeError


def _said(command: str, text: str, code: int) -> int:
    if sys.stderr is not None:
        print(f"{command}: {text}", file=sys.stderr)
    return code


def _drop_output() -> None:
    """Nobody reads: what is left in the buffer must not fail once more when Python ends."""
    with contextlib.suppress(OSError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
