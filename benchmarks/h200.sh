#!/usr/bin/env bash
# Builds, tests, sanitizes and measures on a machine with an H200 (or another GPU of compute capability 9.0). No network needed if the
# Python that is used has jax with its CUDA plugin, cuda-core, nanobind and pytest.
#
#   benchmarks/h200.sh                      every part: build test sanitize bench demo
#   benchmarks/h200.sh test bench           some parts
#   OUT=DIR PYTHON=python3 benchmarks/h200.sh
#   TEST_ARGS='-k fp8' BENCH_ARGS='--tables fp8 --rows m=128' SANITIZE_TOOLS=memcheck benchmarks/h200.sh test sanitize bench
#   SANITIZE_ARGS=grouped benchmarks/h200.sh sanitize      kernels whose names contain it
#   LIMIT_TEST=300 LIMIT_SANITIZE=300 LIMIT_BENCH=400 ...   seconds each part may take
#
# Results go to $OUT (default: out): a log of each part, bench.json, summary.txt. The exit code is 0 if all parts passed.

set -uo pipefail
cd "$(dirname "$0")/.."
OUT=${OUT:-out}
PYTHON=${PYTHON:-python3}
mkdir -p "$OUT"
OUT=$(cd "$OUT" && pwd)
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
export TF_CPP_MIN_LOG_LEVEL=${TF_CPP_MIN_LOG_LEVEL:-2}
SUMMARY=$OUT/summary.txt
: >"$SUMMARY"
failed=0

part() { # part NAME SECONDS COMMAND...: runs it under a limit, its output to the screen and to NAME.log
    local name=$1 limit=$2 begin=$SECONDS
    shift 2
    echo "=== $name"
    timeout --kill-after=15 "$limit" "$@" 2>&1 | tee "$OUT/$name.log"
    local code=${PIPESTATUS[0]} verdict=passed
    ((code)) && verdict="FAILED ($code)" && failed=1
    ((code == 124 || code == 137)) && verdict="FAILED: over its limit of $limit s"
    printf '%-10s %-28s %4d s\n' "$name" "$verdict" $((SECONDS - begin)) | tee -a "$SUMMARY"
}

build() {
    if [[ -z ${REBUILD:-} ]] && "$PYTHON" -c 'import jax_deepgemm._ffi as f; print("importable:", f.__file__)'; then
        return 0
    fi
    local compiler=/usr/bin/g++
    [[ -x $compiler ]] || compiler=${CXX:-g++}
    CXX=$compiler make ext PYTHON="$PYTHON" && "$PYTHON" -c 'import jax_deepgemm._ffi as f; print("built:", f.__file__)'
}

run_tests() {
    # shellcheck disable=SC2086
    "$PYTHON" -m pytest -m gpu -q -ra --durations=10 -p no:cacheprovider ${TEST_ARGS:-}
}

sanitize() {
    local tool code=0
    command -v compute-sanitizer >/dev/null || { echo "compute-sanitizer is not on the PATH"; return 1; }
    # One allocation per buffer, so that an access beyond an operand is seen, and nothing but the kernels of this package slowed down.
    export XLA_PYTHON_CLIENT_PREALLOCATE=false XLA_PYTHON_CLIENT_ALLOCATOR=platform XLA_FLAGS="${XLA_FLAGS:-} --xla_gpu_enable_command_buffer="
    for tool in ${SANITIZE_TOOLS:-memcheck racecheck}; do
        echo "--- $tool"
        compute-sanitizer --tool "$tool" --report-api-errors no --error-exitcode 9 --kernel-name kns=jdg_ --print-limit 20 \
            "$PYTHON" tests/gpu/sanitize.py ${SANITIZE_ARGS:-} || code=$?
    done
    return $code
}

measure() {
    # shellcheck disable=SC2086
    "$PYTHON" -m jax_deepgemm bench --out "$OUT/bench.json" --time-limit $((${LIMIT_BENCH:-420} - 40)) ${BENCH_ARGS:-}
}

demo() {
    "$PYTHON" -m jax_deepgemm info
    # shellcheck disable=SC2086
    "$PYTHON" -m jax_deepgemm demo ${DEMO_ARGS:-}
}

export -f build run_tests sanitize measure demo
export PYTHON OUT

parts=("$@")
((${#parts[@]})) || parts=(build test sanitize bench demo)
for name in "${parts[@]}"; do
    case $name in
    build) part build "${LIMIT_BUILD:-120}" bash -c build ;;
    test) part test "${LIMIT_TEST:-400}" bash -c run_tests ;;
    sanitize) part sanitize "${LIMIT_SANITIZE:-300}" bash -c sanitize ;;
    bench) part bench "${LIMIT_BENCH:-420}" bash -c measure ;;
    demo) part demo "${LIMIT_DEMO:-120}" bash -c demo ;;
    *)
        echo "no part named $name; there are build, test, sanitize, bench, demo" >&2
        exit 2
        ;;
    esac
done
echo
cat "$SUMMARY"
exit $failed
