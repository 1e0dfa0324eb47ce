"""What the command line does with wrong input: one line on stderr, exit code 2, and nothing is started."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import jax_deepgemm
from jax_deepgemm.cli import COMMANDS, arguments, demo, main
from jax_deepgemm.core import launch
from jax_deepgemm.jit import compiler
from jax_deepgemm.tools.bench.machine import ClockLog

LARGEST = 2**31 - 1
RESULT = {
    "schema": 1,
    "device": "cpu",
    "gpu": {},
    "versions": {},
    "method": "",
    "started": "2026-01-01",
    "rows": [{"table": "bf16", "m": 1, "n": 8, "k": 8, "status": "ok"}],
}
FILES = {
    "empty.csv": "",
    "comments.csv": "# nothing\n\n",
    "array.json": '[{"op": "bf16_gemm_nt", "m": 1, "n": 8, "k": 8}, 3]',
    "broken.json": '[\n {"op": "bf16_gemm_nt",\n  "m": }\n]',
    "lines.json": '{"op": "bf16_gemm_nt", "m": 1, "n": 8, "k": 8}\n["bf16_gemm_nt", 1, 8, 8]\n',
    "cut.json": '{"op": "bf16_gemm_nt", "m": 1, "n": 8, "k": 8}\n{"op": "bf16_gemm_nt", "m"',
    "deep.json": "[" * 100_000,
    "no op.csv": "m,n,k\n1,8,8\n",
    "huge.csv": "bf16_gemm_nt,99999999999,8,8\n",
    "digits.csv": f"bf16_gemm_nt,{'9' * 5000},8,8\n",
    "negative.csv": "op,m,n,k\nbf16_gemm_nt,-1,8,8\n",
    "quotes.csv": 'bf16_gemm_nt,"1,8,8\n',
    "unknown.csv": "bf16_gemm_zz,1,8,8\n",
    "groups.csv": "op,groups,m,n,k\nm_grouped_bf16_gemm_nt_contiguous,4097,8192,64,64\n",
    "layer.csv": "op,tokens,hidden,intermediate,experts,top_k\nmoe_mlp,8,256,128,4,8\n",
    "tune layer.csv": "op,tokens,hidden,intermediate,experts,top_k\nmoe_mlp,8,256,128,4,2\n",
    "copies.csv": f"op,tokens,hidden,intermediate,experts,top_k\nmoe_mlp,{LARGEST},8,8,4,2\n",
    "rows.csv": f"op,tokens,hidden,intermediate,experts,top_k,max_rows\nmoe_mlp_decode,8,8,8,4,2,{LARGEST}\n",
    "most.csv": "op,groups,m,n,k\nk_grouped_bf16_gemm_tn_contiguous,9999999,8,8,8\n",
    "product.csv": f"bf16_gemm_nt,{LARGEST},8,{LARGEST}\n",
    "list.json": "[]",
    "other.json": '{"schema": 1, "rows": []}',
    "row.json": json.dumps(RESULT),
    "entry.json": '{"schema": 1, "devices": {"NVIDIA H200, 132 SMs": {"x": {"us": 1}}}}',
    "bytes.csv": b"\xff\xfe\x00\x01",
}
EXPLAIN = ["explain", "--op", "bf16_gemm_nt", "--m", "8", "--n", "8"]
REFUSED: list[tuple[list[str], str]] = [
    # sizes
    ([*EXPLAIN, "--k", "99999999999"], "--k is '99999999999', need a whole number from 1 to 2147483647"),
    ([*EXPLAIN, "--k", "0"], "--k is '0', need a whole number from 1 to"),
    ([*EXPLAIN, "--k=-1"], "--k is '-1', need a whole number from 1 to"),
    ([*EXPLAIN, "--k", "1.5"], "--k is '1.5', need a whole number from 1 to"),
    ([*EXPLAIN, "--k", ""], "--k is empty, need a value"),
    (EXPLAIN, "--k is missing; bf16_gemm_nt needs --m, --n, --k"),
    ([*EXPLAIN, "--k"], "--k: expected one argument"),
    ([*EXPLAIN, "--k", "8", "--out-dtype", "int8"], "--out-dtype is 'int8', need bfloat16 or float32"),
    ([*EXPLAIN, "--k", "8", "--groups", "2"], "bf16_gemm_nt has no field --groups; its fields are --m"),
    (["explain", "--op", "fp4_gemm", "--m", "1"], "--op is 'fp4_gemm', need one of fp8_gemm_nt, fp8_gemm_nn"),
    (["explain", "--m", "1", "--shapes", "huge.csv"], "--m and --shapes at once, need one or the other"),
    (["demo", "--tokens", "0"], "--tokens: got '0', need a whole number from 1 to 1048576"),
    (["demo", "--tokens", "99999999999"], "--tokens: got '99999999999', need a whole number from 1 to"),
    (["demo", "--tokens", "many"], "--tokens: got 'many', need a whole number from 1 to"),
    (["demo", "--seconds", "-1"], "--seconds: got '-1', need a number of seconds above 0"),
    (["demo", "--seconds", "inf"], "--seconds: got 'inf', need a number of seconds above 0"),
    (["bench", "--calls", "0"], "--calls: got '0', need a whole number from 1 to"),
    (["bench", "--time-limit", "nan"], "--time-limit: got 'nan', need a number of seconds above 0"),
    (
        ["compile", "--shapes", "huge.csv", "--jobs", "0"],
        "--jobs: got '0', need a whole number from 1 to 1024",
    ),
    (["tune", "--tables", "bf16", "--calls", "9" * 30], "need a whole number from 1 to 1000000"),
    # names and expressions
    (["bench", "--rows", "("], "--rows: got '(', no regular expression: missing )"),
    (["bench", "--rows", "m=12345"], "no row matches 'm=12345'"),
    (["bench", "--tables", "fp8,fp9"], "--tables: no table fp9; there are fp8, fp8_wgrad, bf16"),
    (["bench", "--tables", ""], "--tables: got '', need names, separated by commas"),
    (["bench", "--tables", "x" * 5000], "--tables: no table xxxxx"),
    (["compile", "--shapes", "empty.csv", "--arch", "x" * 5000], "--arch: invalid choice: 'xxxxx"),
    (["tune", "--tables", "fp8,moe"], "no table moe; there are fp8, fp8_wgrad, bf16"),
    (["tune"], "nothing to tune; name a file with --shapes, or tables of bench with --tables"),
    (["nothing"], "invalid choice: 'nothing'"),
    (["compile", "--shapes", "huge.csv", "--arch", "75"], "--arch: invalid choice: '75'"),
    # options that need others
    (["bench", "--write"], "--write needs --report with the result files to show"),
    (["bench", "--plot", "."], "--plot needs --report with the result files to show"),
    # files
    (["compile", "--shapes", "nowhere.csv"], "--shapes: nowhere.csv: no such file"),
    (["compile", "--shapes", "."], "--shapes: . is a folder, need a file"),
    (["compile", "--shapes", ""], "--shapes: got an empty name, need a path"),
    (["explain", "--shapes", "nowhere.csv"], "--shapes: nowhere.csv: no such file"),
    (["tune", "--report", "nowhere.json"], "--report: nowhere.json: no such file"),
    (["bench", "--report", "."], "--report: . is a folder, need a file"),
    (["bench", "--report", "other.json", "nowhere.json"], "--report: nowhere.json: no such file"),
    (["bench", "--out", "x" * 300], "xxx...: File name too long"),
    (["bench", "--out", "\0"], "--out: '\\x00': "),
    (["bench", "--out", "."], "--out: . is a folder, need a file to write"),
    (["bench", "--out", "empty.csv/x.json"], "empty.csv is a file"),
    (["bench", "--report", "row.json", "--plot", "empty.csv"], "empty.csv is a file"),
    (
        ["tune", "--tables", "bf16", "--out", "/dev/null/x.json"],
        "/dev/null is a file",
    ),
    # what files hold
    (["compile", "--shapes", "empty.csv"], "empty.csv: holds no shape, need at least one, such as"),
    (["explain", "--shapes", "comments.csv"], "comments.csv: holds no shape, need at least one, such as"),
    (["tune", "--shapes", "empty.csv"], "empty.csv: holds no shape"),
    (["compile", "--shapes", "list.json"], "list.json: holds no shape"),
    (["compile", "--shapes", "array.json"], "array.json: item 2 of the array is 3, need an object"),
    (["compile", "--shapes", "broken.json"], "broken.json: broken JSON in line 3, column 8: Expecting value"),
    (["compile", "--shapes", "lines.json"], "lines.json: line 2: "),
    (
        ["compile", "--shapes", "cut.json"],
        'cut.json: line 2: \'{"op": "bf16_gemm_nt", "m"\': broken JSON in column',
    ),
    (["compile", "--shapes", "deep.json"], "deep.json: broken JSON: nested too deeply"),
    (["compile", "--shapes", "no op.csv"], "no op.csv: line 1: 'm,n,k': names fields, but not op"),
    (
        ["compile", "--shapes", "huge.csv"],
        "huge.csv: line 1: 'bf16_gemm_nt,99999999999,8,8': m is '99999999999'",
    ),
    (["compile", "--shapes", "digits.csv"], "need a whole number from 1 to 2147483647"),
    (
        ["compile", "--shapes", "negative.csv"],
        "line 2: 'bf16_gemm_nt,-1,8,8': m is '-1', need a whole number",
    ),
    (["compile", "--shapes", "quotes.csv"], "line 1: 'bf16_gemm_nt,\"1,8,8': no CSV"),
    (["compile", "--shapes", "unknown.csv"], "op is 'bf16_gemm_zz', need one of fp8_gemm_nt"),
    (["compile", "--shapes", "groups.csv"], "m_grouped_bf16_gemm_nt_contiguous groups=4097 "),
    (["compile", "--shapes", "copies.csv"], "tokens x top_k is 4294967294, need at most 2147483647 rows"),
    (["compile", "--shapes", "rows.csv"], "experts x max_rows is 8589934588, need at most 2147483647 rows"),
    (["compile", "--shapes", "most.csv"], "groups is '9999999', need a whole number from 1 to 1048576"),
    (["explain", "--shapes", "product.csv"], "bf16_gemm_nt m=2147483647 n=8 k=2147483647: "),
    (["compile", "--shapes", "layer.csv"], "top_k is 8 and experts is 4, need at most as many"),
    (["compile", "--shapes", "bytes.csv"], "bytes.csv: 'utf-8' codec can't decode"),
    (["tune", "--shapes", "tune layer.csv"], "is a layer of several GEMMs, need one to tune"),
    (["bench", "--report", "list.json"], "list.json is not a result file: not an object of schema 1"),
    (["bench", "--report", "other.json"], "other.json is not a result file: its device is None, need a str"),
    (
        ["bench", "--report", "row.json"],
        "row.json is not a result file: row 1 cannot be shown: KeyError: 'us'",
    ),
    (["bench", "--report", "broken.json"], "broken.json is not a result file: broken JSON in line 3"),
    (["bench", "--report", "bytes.csv"], "bytes.csv is not a result file: 'utf-8' codec can't decode"),
    (["tune", "--report", "entry.json"], "entry.json: "),
    (["tune", "--report", "empty.csv"], "empty.csv: "),
]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with wrong files, where nothing may be compiled, measured or written."""
    for name, content in FILES.items():
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("JAX_DEEPGEMM_CACHE_DIR", str(tmp_path / "cache"))

    def started(*_: Any, **__: Any) -> Any:
        raise AssertionError("something was started")

    monkeypatch.setattr(compiler, "build", started)
    monkeypatch.setattr(ClockLog, "__enter__", started)
    monkeypatch.setattr(demo, "problems", started)
    return tmp_path


def code_of(given: list[str]) -> Any:
    """The exit code, however it is said."""
    try:
        return main(given)
    except SystemExit as leaving:
        return leaving.code


@pytest.mark.parametrize(("given", "message"), REFUSED, ids=[" ".join(words)[:60] for words, _ in REFUSED])
def test_wrong_input_is_one_line(
    given: list[str], message: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if "groups.csv" in given or "product.csv" in given:
        pytest.importorskip("cuda.core")
    before = sorted(folder.iterdir())
    assert code_of(given) == 2
    shown = capsys.readouterr()
    assert message in shown.err
    assert shown.err.startswith(f"{given[0] if given[0] in COMMANDS else 'jax_deepgemm'}: ")
    assert shown.err.count("\n") == 1
    assert len(shown.err) < 1600
    assert shown.out == ""
    assert sorted(folder.iterdir()) == before


@pytest.mark.parametrize("command", COMMANDS)
def test_unknown_flags_show_the_usage_of_their_command(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [command, *(["--shapes", os.devnull] if command == "compile" else []), "--no-such-flag"]
    assert code_of(given) == 2
    shown = capsys.readouterr().err
    assert shown.startswith(f"usage: python -m jax_deepgemm {command} [-h]")
    assert shown.endswith(f"{command}: unknown argument --no-such-flag\n")


@pytest.mark.parametrize("command", COMMANDS)
def test_help_names_the_exit_codes(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert code_of([command, "--help"]) == 0
    assert arguments.EXIT_CODES in capsys.readouterr().out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert code_of(["--version"]) == 0
    assert capsys.readouterr().out == f"jax_deepgemm {jax_deepgemm.__version__}\n"


def test_missing_flags_show_the_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert code_of(["compile"]) == 2
    usage, *_, line = capsys.readouterr().err.splitlines()
    assert usage.startswith("usage: python -m jax_deepgemm compile")
    assert line == "compile: the following arguments are required: --shapes"


def test_closed_stdin_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "stdin", None)
    assert main(["compile", "--shapes", "-"]) == 2
    assert capsys.readouterr().err == "compile: stdin: it is closed\n"


# --- what else can happen to a command ---


def failing(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    """Lets the command `info` fail."""
    from jax_deepgemm.cli import info

    def collect() -> Any:
        raise error

    monkeypatch.setattr(info, "collect", collect)


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (KeyboardInterrupt(), 130, "info: interrupted\n"),
        (OSError(28, "No space left on device", "x"), 1, "info: [Errno 28] No space left on device: 'x'\n"),
        (MemoryError(), 1, "info: MemoryError\n"),
    ],
    ids=("Ctrl-C", "disk full", "memory"),
)
def test_ends_in_one_line(
    error: BaseException,
    code: int,
    line: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    failing(monkeypatch, error)
    assert main(["info"]) == code
    assert capsys.readouterr().err == line


def test_a_fault_of_the_program_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    failing(monkeypatch, KeyError("a fault"))
    with pytest.raises(KeyError, match="a fault"):
        main(["info"])


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (RuntimeError("Unable to initialize backend 'cuda'"), "Unable to initialize backend 'cuda'"),
        (AssertionError(), "JAX says no more"),
    ],
    ids=("no plugin", "no GPU"),
)
def test_no_device_is_said(
    error: Exception, reason: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import jax

    def devices(*_: Any) -> Any:
        raise error

    monkeypatch.setattr(jax, "devices", devices)
    monkeypatch.setattr(sys, "stdin", io.StringIO("bf16_gemm_nt,8,8,8"))
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    message = f"JAX finds no device for JAX_PLATFORMS=cuda: {reason}. JAX_PLATFORMS=cpu needs none."
    explain = ["explain", "--m", "8", "--n", "8", "--k", "8"]
    tables = ["--tables", "bf16"]
    for command in (["demo"], explain, ["bench", *tables], ["tune", *tables], ["compile", "--shapes", "-"]):
        assert main(command) == 2
        assert capsys.readouterr().err == f"{command[0]}: {message}\n"
    assert main(["info", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["devices"], found["devices_error"]) == ([], message)


def test_no_home_is_said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """As in a container whose user has no entry in the system's list."""

    def expanduser(path: Path) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("JAX_DEEPGEMM_CACHE_DIR", raising=False)
    monkeypatch.setattr(Path, "expanduser", expanduser)
    assert main(["info"]) == 2
    assert capsys.readouterr().err == (
        "info: environment: no home directory is known for the kernel cache; "
        "set JAX_DEEPGEMM_CACHE_DIR to a folder.\n"
    )
    assert [Path(one).name for one in launch.cubin_directories()] == ["cubins"]  # so that imports go on


def test_output_that_nobody_reads_is_no_error() -> None:
    """`python -m jax_deepgemm compile --help | head -0`, and info, whose output comes late."""
    script = (
        "import sys; from jax_deepgemm.cli import main; "
        "codes = [main(['info']), main(['info', '--json'])]; print(codes, file=sys.stderr)"
    )
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [sys.executable, "-c", script], stdout=writing, stderr=subprocess.PIPE, text=True, timeout=120
    )
    os.close(writing)
    assert (done.returncode, done.stderr.splitlines()[-1]) == (0, "[141, 0]")  # jaxlib may log before it
    assert "Traceback" not in done.stderr


def test_closed_output_streams_are_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    assert main(["info"]) == 0
    assert main(["bench", "--write"]) == 2


# --- types of arguments ---


@pytest.mark.parametrize(
    ("read", "text", "value"),
    [
        (arguments.whole(1, 64), " 64 ", 64),
        (arguments.seconds, "1e-3", 0.001),
        (arguments.from_zero, "0", 0.0),
        (arguments.names, "fp8, ,bf16,", ["fp8", "bf16"]),
        (arguments.output_file, "new/folder/x.json", Path("new/folder/x.json")),
        (arguments.input_file_or_stdin, "-", Path("-")),
    ],
    ids=("whole", "seconds", "zero", "names", "output", "stdin"),
)
def test_right_values_are_read(read: Callable[[str], Any], text: str, value: Any, folder: Path) -> None:
    assert read(text) == value
    assert not (folder / "new").exists()


@pytest.mark.parametrize("mode", [os.R_OK, os.W_OK], ids=("read", "write"))
def test_refused_permissions(
    mode: int, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(os, "access", lambda _, asked: asked != mode)
    given = ["compile", "--shapes", "unknown.csv"] if mode == os.R_OK else ["bench", "--out", "new.json"]
    assert code_of(given) == 2
    assert "no permission" in capsys.readouterr().err


def test_text_of_stdin_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("fp8_gemm_nt,1,8,8"))
    assert arguments.read_text("-") == "fp8_gemm_nt,1,8,8"
