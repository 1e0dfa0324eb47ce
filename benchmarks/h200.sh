#!/usr/bin/env bash
# Builds, tests, sanitizes and measures on a machine with an H200 (or another GPU of compute capability 9.0). No network needed if the
# Python that is used has jax with its CUDA plugin, cuda-core, nanobind and pytest.
#
#   benchmarks/h200.sh                      every part: build test sanitize bench demo
#   benchmarks/h200.sh build smoke          some of them; smoke: a few tests of every family, for a minute
#   OUT=DIR PYTHON=python3 benchmarks/h200.sh
#   TEST_ARGS='-k fp8' BENCH_ARGS='--tables fp8 --rows m=128' SANITIZE_TOOLS=memcheck benchmarks/h200.sh test sanitize bench
#   PROCESSES=8 benchmarks/h200.sh test     run so many at once, on as many parts of the tests
#   TEST_PART=1/2 benchmarks/h200.sh test   the first half of the tests; those that want the GPU for themselves are in the last part
#   SANITIZE_ARGS="groups rows" benchmarks/h200.sh sanitize   kernels whose names contain one of them
#   LIMIT_TEST=300 LIMIT_SANITIZE=300 LIMIT_BENCH=400 ...   seconds each part may take
#
#   TRAIN_ARGS='--steps 60' benchmarks/h200.sh train       the training example in BF16 and FP8: tokens a second, memory, losses
#
# Results go to $OUT (default: out): a log of each part, bench.json, seconds.json (how long tests take; tests/gpu has a copy, by which they
# are dealt out), summary.txt. The exit code is 0 if all parts passed.

set -uo pipefail
cd "$(dirname "$0")/.."
OUT=${OUT:-out}
PYTHON=${PYTHON:-python3}
mkdir -p "$OUT"
OUT=$(cd "$OUT" && pwd)
export OUT PYTHON PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
export TF_CPP_MIN_LOG_LEVEL=${TF_CPP_MIN_LOG_LEVEL:-2}
SUMMARY=$OUT/summary.txt
: >"$SUMMARY"
failed=0

part() { # part NAME SECONDS: calls run_NAME under a limit, its output to the screen and to NAME.log
    local name=$1 limit=$2 begin=$SECONDS
    echo "=== $name"
    timeout --kill-after=15 "$limit" bash -c "run_$name" 2>&1 | tee "$OUT/$name.log"
    local code=${PIPESTATUS[0]} verdict=passed
    ((code)) && verdict="FAILED ($code)" && failed=1
    ((code == 124 || code == 137)) && verdict="FAILED: over its limit of $limit s"
    printf '%-10s %-28s %4d s\n' "$name" "$verdict" $((SECONDS - begin)) | tee -a "$SUMMARY"
}

run_build() {
    if [[ -z ${REBUILD:-} ]] && "$PYTHON" -c 'import jax_deepgemm._ffi as f; print("importable:", f.__file__)'; then
        return 0
    fi
    local compiler=/usr/bin/g++
    [[ -x $compiler ]] || compiler=${CXX:-g++}
    CXX=$compiler make ext PYTHON="$PYTHON" && "$PYTHON" -c 'import jax_deepgemm._ffi as f; print("built:", f.__file__)'
}

# pytests DIRECTORY COUNT MARKERS [PART/PARTS]: pytest in COUNT processes, each with its share of the tests that the markers choose, or of
# a part of them; logs and results go to the directory. The log of a process in which something fails is shown whole.
pytests() {
    local directory=$1 count=$2 markers=$3 part=${4:-1/1} i name show code=0 pids=()
    local before=$((count * (${part%/*} - 1))) shards=$((count * ${part#*/}))
    export XLA_PYTHON_CLIENT_PREALLOCATE=false JAX_PLATFORMS=cuda,cpu
    trap 'tail -n 3 "$directory"/*.log; exit 124' TERM # over the limit: where each process is
    for ((i = 1; i <= count; i++)); do
        name=$directory/${markers// /_}-$i
        # shellcheck disable=SC2086
        "$PYTHON" -m pytest tests/gpu -m "$markers" --shard "$((before + i))/$shards" -q -ra --durations=5 -p no:cacheprovider --junitxml "$name.xml" \
            ${TEST_ARGS:-} >"$name.log" 2>&1 &
        pids+=($!)
    done
    for ((i = 1; i <= count; i++)); do
        wait "${pids[i - 1]}"
        case $? in
        0 | 5) show="tail -n 1" ;; # 5: no test in this part
        *) show=cat code=1 ;;
        esac
        echo "--- $markers, process $i of $count, at $SECONDS s"
        $show "$directory/${markers// /_}-$i.log"
    done
    return $code
}

run_test() {
    local directory part=${TEST_PART:-1/1} code=0
    [[ $part =~ ^([1-9][0-9]*)/([1-9][0-9]*)$ ]] && ((${part%/*} <= ${part#*/})) || { echo "TEST_PART is $part, need one such as 1/2"; return 1; }
    directory=$(mktemp -d)
    JAX_PLATFORMS=cpu "$PYTHON" -m tests.gpu.kernels || code=1
    pytests "$directory" "${PROCESSES:-8}" "gpu and not alone" "$part" || code=1
    [[ ${part%/*} != "${part#*/}" ]] || pytests "$directory" 1 "gpu and alone" || code=1
    "$PYTHON" -m tests.shared.shards "$directory"/*.xml --record "$OUT/seconds.json" || code=1
    return $code
}

run_smoke() {
    local directory code=0
    directory=$(mktemp -d)
    pytests "$directory" "${PROCESSES:-4}" "gpu and smoke" || code=1
    "$PYTHON" -m tests.shared.shards "$directory"/*.xml || code=1
    return $code
}

run_sanitize() {
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

run_bench() { # on one GPU, as the programs that are measured are those of one device
    export CUDA_VISIBLE_DEVICES=${CUDA_VISIBLE_DEVICES:-0}
    # shellcheck disable=SC2086
    "$PYTHON" -m jax_deepgemm bench --out "$OUT/bench.json" --time-limit $((${LIMIT_BENCH:-560} - 40)) ${BENCH_ARGS:-}
}

run_demo() {
    "$PYTHON" -m jax_deepgemm info
    # shellcheck disable=SC2086
    "$PYTHON" -m jax_deepgemm demo ${DEMO_ARGS:-}
}

run_train() {
    export CUDA_VISIBLE_DEVICES=${CUDA_VISIBLE_DEVICES:-0}
    # shellcheck disable=SC2086
    "$PYTHON" examples/train_moe_lm.py --config h200 --attention cudnn --out "$OUT/train" ${TRAIN_ARGS:-}
}

export -f pytests run_build run_test run_smoke run_sanitize run_bench run_demo run_train
declare -A limits=([build]=120 [test]=480 [smoke]=90 [sanitize]=300 [bench]=560 [demo]=120 [train]=300)

parts=("$@")
((${#parts[@]})) || parts=(build test sanitize bench demo)
for name in "${parts[@]}"; do
    if [[ -z ${limits[$name]:-} ]]; then
        echo "no part named $name; there are build, test, smoke, sanitize, bench, demo, train" >&2
        exit 2
    fi
    limit=LIMIT_${name^^}
    part "$name" "${!limit:-${limits[$name]}}"
done
echo
cat "$SUMMARY"
exit $failed
