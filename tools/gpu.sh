#!/usr/bin/env bash
# All that a GPU can prove, in one command, with the machine's own Python packages and no network: builds the extension in place, runs the device tests,
# compute-sanitizer over a small set, and the benchmark, which writes bench/results/<gpu>/. Stops at nothing; the table at the end says what passed.
#   make gpu                       all
#   make gpu ARGS="tests bench"    some of: build tests sanitizer bench
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python3}
"$python" -c 'import torch, sys; sys.exit(0 if torch.cuda.is_available() else 1)' || {
  echo "gpu: expected '$python' to have a torch that sees a GPU, got none; say PYTHON=/path/to/python make gpu." >&2
  exit 1
}
steps=${*:-build tests sanitizer bench}
table=()
status=0

step() { # name, command...
  local name=$1 start=$SECONDS
  shift
  if "$@"; then table+=("$name|passed|$((SECONDS - start)) s"); else
    table+=("$name|FAILED|$((SECONDS - start)) s")
    status=1
  fi
}

build() {
  if [ -z "${CUDA_HOME:-}" ] && [ -d /usr/local/cuda ]; then export CUDA_HOME=/usr/local/cuda; fi
  local here
  here=$("$python" -c 'import torch; print("%d.%d" % torch.cuda.get_device_capability())')
  INFLUENCE_EXT_CUDA=1 TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-$here} "$python" setup.py -q build_ext --inplace
}

sanitizer() {
  command -v compute-sanitizer >/dev/null || { echo "gpu: expected compute-sanitizer on PATH, found none." >&2; return 1; }
  local tool failed=0
  for tool in memcheck racecheck initcheck; do
    # torch's allocator reuses memory, which hides overruns from memcheck: one allocation each instead.
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" --error-exitcode 9 --target-processes all --log-file "build/sanitizer-$tool.log" \
      "$python" -m pytest -q -x -p no:cacheprovider tests/test_gpu.py -k "${SANITIZER_SET:-(single or attention or layer-norm or embedding) and f32}" || failed=1
    tail -n 3 "build/sanitizer-$tool.log"
  done
  return "$failed"
}

for s in $steps; do
  case $s in
    build) step "build" build ;;
    tests) step "device tests" "$python" -m pytest -q -m "gpu and not slow" ;;
    sanitizer) step "compute-sanitizer" sanitizer ;;
    bench) step "benchmark" "$python" -m bench.run --device cuda ${BENCH_ARGS:-} ;;
    *) echo "gpu: expected steps among build, tests, sanitizer and bench, got '$s'." >&2; exit 2 ;;
  esac
done
printf '\n%-20s %-8s %s\n' step result time
for line in "${table[@]}"; do IFS='|' read -r a b c <<<"$line"; printf '%-20s %-8s %s\n' "$a" "$b" "$c"; done
exit "$status"
