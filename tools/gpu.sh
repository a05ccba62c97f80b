#!/usr/bin/env bash
# All that a GPU can prove, in one command, with the machine's own Python packages and no network: builds the extension in place, runs the device tests,
# compute-sanitizer over a small set, and the benchmark, which writes bench/results/<gpu>/. Stops at nothing; the table at the end says what passed, and
# what was left out because the machine lacks pytest or compute-sanitizer. Peers that are not installed show as such in the benchmark.
#   make gpu                       all
#   make gpu ARGS="tests bench"    some of: build tests sanitizer bench
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python3}
# shellcheck source=tools/cuda_environment.sh
source tools/cuda_environment.sh
"$python" -c 'import torch, sys; sys.exit(0 if torch.cuda.is_available() else 1)' 2>/dev/null || {
  echo "gpu: expected '$python' to have a torch that sees a GPU, got none; say PYTHON=/path/to/python make gpu." >&2
  exit 1
}
mkdir -p build
steps=${*:-build tests sanitizer bench}
for s in $steps; do
  case $s in
    build | tests | sanitizer | bench) ;;
    *) echo "gpu: expected steps among build, tests, sanitizer and bench, got '$s'." >&2; exit 2 ;;
  esac
done
table=()
status=0
readonly LEFT_OUT=77

step() { # name, command...
  local name=$1 start=$SECONDS result=passed code=0
  shift
  "$@" || code=$?
  if [ "$code" -eq "$LEFT_OUT" ]; then result="left out"; elif [ "$code" -ne 0 ]; then result=FAILED status=1; fi
  if [ "$name $result" = "build FAILED" ]; then unbuilt=yes; fi
  table+=("$name|$result|$((SECONDS - start)) s")
}

build() {
  cuda_environment gpu || return 1
  local here
  here=$("$python" -c 'import torch; print("%d.%d" % torch.cuda.get_device_capability())')
  INFLUENCE_EXT_CUDA=1 TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-$here} "$python" setup.py -q build_ext --inplace
}

# The extension as it is now, with CUDA kernels: what every other step needs.
is_built() {
  [ -z "${unbuilt:-}" ] && "$python" -c 'import influence_ext as ie, sys; sys.exit(ie.build_info()["cuda"] != "yes")' 2>/dev/null && return
  echo "gpu: expected the extension built with CUDA kernels, got none, so $1 is left out; make gpu ARGS=build says why." >&2
  return 1
}

has_pytest() {
  has pytest || { echo "gpu: expected pytest for '$python', found none, so its step is left out; install pytest (nothing else is needed)." >&2; return 1; }
}

# Only files with tests for a GPU are read: others need packages that the machine may not have.
device_tests() {
  is_built "the step of device tests" && has_pytest || return "$LEFT_OUT"
  # shellcheck disable=SC2046
  "$python" -m pytest -q -m "gpu and not slow" $(grep -lE "^pytestmark = pytest.mark.gpu|^@pytest.mark.gpu" tests/test_*.py)
}

# About sixty tests, since each takes a hundred times as long: rows that go through every kind of kernel, some of them through several blocks, and lines
# that clusters of blocks keep in shared memory.
readonly SANITIZED="(single or chain or layer-norm-33 or embedding-twice or embedding-large or attention-causal-long or attention-mask-heads or long_line) and not f64"

sanitizer() {
  is_built "the step of compute-sanitizer" && has_pytest || return "$LEFT_OUT"
  command -v compute-sanitizer >/dev/null || {
    echo "gpu: expected compute-sanitizer on PATH, found none, so its step is left out; it is in the CUDA toolkit's bin folder." >&2
    return "$LEFT_OUT"
  }
  local tool failed=0
  for tool in memcheck racecheck initcheck; do
    # torch's allocator reuses memory, which hides overruns from memcheck: one allocation each instead.
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" --error-exitcode 9 --target-processes all --log-file "build/sanitizer-$tool.log" \
      "$python" -m pytest -q -x -p no:cacheprovider -m "not slow" tests/test_gpu.py -k "${SANITIZER_SET:-$SANITIZED}" || failed=1
    tail -n 3 "build/sanitizer-$tool.log"
  done
  return "$failed"
}

benchmark() {
  is_built "the benchmark" || return "$LEFT_OUT"
  # shellcheck disable=SC2086
  "$python" -m bench.run --device cuda ${BENCH_ARGS:-}
}

for s in $steps; do
  case $s in
    build) step "build" build ;;
    tests) step "device tests" device_tests ;;
    sanitizer) step "compute-sanitizer" sanitizer ;;
    bench) step "benchmark" benchmark ;;
  esac
done
printf '\n%-20s %-8s %s\n' step result time
for line in "${table[@]}"; do IFS='|' read -r a b c <<<"$line"; printf '%-20s %-8s %s\n' "$a" "$b" "$c"; done
exit "$status"
