#!/usr/bin/env bash
# Everything a GPU machine is needed for, in one go and without a network: build with CUDA, test, sanitize, benchmark.
#
#   bench/gpu.sh [FOLDER [STAGE ...]]
#
# FOLDER receives the log, the summary and the results (bench/results by default). Stages, all of them by default:
# build doctor tests triton-aot memcheck racecheck initcheck bench. One that fails does not stop the others; the exit code
# tells whether any did. Environment: PYTHON (python3), QATKERNELS_CUDA_ARCHS (this GPU's), BENCH_ARGS (--peers).
set -uo pipefail

out=$(realpath -m "${1:-$(dirname "$0")/results}")
cd "$(dirname "$0")/.."
shift || true
stages=("$@")
[ $# -gt 0 ] || stages=(build doctor tests triton-aot memcheck racecheck initcheck bench)

capability=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -n 1 | tr -d .) || exit 2
[ "$capability" = 90 ] && capability=90a
export PYTHONUNBUFFERED=1 QATKERNELS_CUDA_ARCHS=${QATKERNELS_CUDA_ARCHS:-$capability}
python=${PYTHON:-python3}
pytest=("$python" -m pytest -q -p no:cacheprovider tests)
mkdir -p "$out" bench/results
log=$out/gpu.log
: >"$log"
started=$(mktemp)
trap 'rm -f "$started"' EXIT

build() { QATKERNELS_BUILD=require "$python" -m pip install --no-index --no-deps --no-build-isolation -e .; }
doctor() { "$python" -m qatkernels doctor; }
tests() { "${pytest[@]}"; }
triton-aot() { "${pytest[@]}" -k aot; }
memcheck() { sanitize --tool memcheck; }
racecheck() { sanitize --tool racecheck; }
initcheck() { sanitize --tool initcheck; }
bench() {
  # shellcheck disable=SC2086  # several arguments
  "$python" -m bench ${BENCH_ARGS:---peers}
}

# The tests of hand-written CUDA kernels, without torch's caching allocator, which would hide an access beyond a tensor.
# Graphs cannot be captured without it.
sanitize() {
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer "$@" --error-exitcode 86 --kernel-name kernel_substring=qk4cuda \
    "${pytest[@]}" -m gpu -k "cuda and not graph"
}

limit() { case $1 in tests | bench) echo 1500 ;; *) echo 900 ;; esac; }

summary=()
failed=0
for name in "${stages[@]}"; do
  echo "== $name" | tee -a "$log"
  began=$SECONDS
  # Jobs in process groups of their own: the time limit reaches whatever the stage started, and nothing is left behind.
  set -m
  ("$name") >>"$log" 2>&1 &
  job=$!
  (sleep "$(limit "$name")" && kill -TERM -- "-$job") >/dev/null 2>&1 &
  watchdog=$!
  set +m
  wait "$job"
  status=$?
  kill -- "-$watchdog" 2>/dev/null
  case $status in 0) word=ok ;; 143) word="TIMED OUT" ;; *) word="FAILED ($status)" ;; esac
  [ $status -eq 0 ] || { failed=1 && tail -n 30 "$log"; }
  summary+=("$(printf '%-12s %-14s %5d s' "$name" "$word" $((SECONDS - began)))")
done

# The benchmarks write to where results are committed; bring them along when another folder was asked for.
if [ "$out" != "$(realpath bench/results)" ]; then
  find bench/results -name '*.json' -newer "$started" -exec cp {} "$out/" \;
fi
printf '%s\n' "${summary[@]}" | tee "$out/summary.txt"
exit $failed
