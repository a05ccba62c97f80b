#!/usr/bin/env bash
# All that a GPU can prove, in one command, with the machine's own Python packages and no network: builds the extension in place, runs the device tests,
# compute-sanitizer over a small set, and the benchmark, which writes bench/results/<gpu>/. Stops at nothing; the table at the end says what passed, and
# what was left out because the machine lacks pytest or compute-sanitizer. Peers that are not installed show as such in the benchmark.
#   make gpu                       all
#   make gpu ARGS="tests bench"    some of: build tests sanitizer bench
#   make gpu MINUTES=9             no more than about that long; called again it goes on: with what is still to be compiled, with the tests that have not
#                                  passed yet (build/gpu/ knows which), with the cases of this commit without a result
# Exit status: 0 all passed or left out, 75 something is not done yet (make turns it into 2), 1 something failed.
# What it passes on: TEST_ARGS to pytest, SANITIZER_TOOLS and SANITIZER_SET (of tests) to compute-sanitizer, BENCH_ARGS to bench.run, MAX_JOBS (compilers
# at a time) and TORCH_CUDA_ARCH_LIST to the build, which is else for this machine's GPU alone.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python3}
# shellcheck source=tools/cuda_environment.sh
source tools/cuda_environment.sh
"$python" -c 'import torch, sys; sys.exit(0 if torch.cuda.is_available() else 1)' 2>/dev/null || {
  echo "gpu: expected '$python' to have a torch that sees a GPU, got none; say PYTHON=/path/to/python make gpu." >&2
  exit 1
}
if ! [[ ${MINUTES:-1} =~ ^[1-9][0-9]*$ ]]; then
  echo "gpu: expected MINUTES to be a whole number from 1 on, got '$MINUTES'." >&2
  exit 2
fi
until=${MINUTES:+$(($(date +%s) + 60 * MINUTES))}
mkdir -p build/gpu
steps=${*:-build tests sanitizer bench}
for s in $steps; do
  case $s in
    build | tests | sanitizer | bench) ;;
    *) echo "gpu: expected steps among build, tests, sanitizer and bench, got '$s'." >&2; exit 2 ;;
  esac
done
table=()
status=0
readonly LEFT_OUT=77 UNFINISHED=75

left() { # seconds of MINUTES, at least one
  local seconds=$((until - $(date +%s)))
  echo $((seconds > 1 ? seconds : 1))
}

step() { # name, command...
  local name=$1 start=$SECONDS result=passed code=0
  shift
  if [ -n "$until" ] && [ "$(date +%s)" -ge "$until" ]; then code=$UNFINISHED; else "$@" || code=$?; fi
  case $code in
    0) ;;
    "$LEFT_OUT") result="left out" ;;
    "$UNFINISHED") result="not done"; if [ "$status" -eq 0 ]; then status=$UNFINISHED; fi ;;
    *) result=FAILED status=1 ;;
  esac
  if [ "$name" = build ] && [ "$code" -ne 0 ]; then unbuilt=yes; fi
  table+=("$name|$result|$((SECONDS - start)) s")
}

# The compilers' output is long; the log has it.
build() {
  cuda_environment gpu || return 1
  local here log=build/gpu/build.log code=0
  here=$("$python" -c 'import torch; print("%d.%d" % torch.cuda.get_device_capability())')
  INFLUENCE_EXT_CUDA=1 TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-$here} ${until:+timeout --signal=INT --kill-after=20 "$(left)"} \
    "$python" setup.py -q build_ext --inplace >"$log" 2>&1 || code=$?
  if [ "$code" -eq 124 ] || [ "$code" -eq 137 ]; then
    echo "gpu: expected the build to end in time, got as far as $(grep -cE '^\[[0-9]+/[0-9]+\]' "$log") files; make gpu ARGS=build goes on." >&2
    return "$UNFINISHED"
  fi
  if [ "$code" -ne 0 ]; then
    grep -nE 'error|FAILED' "$log" | head -n 20 >&2 || true
    tail -n 20 "$log" >&2
    echo "gpu: the build failed; all of its output is in $log." >&2
  fi
  return "$code"
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

# Only files with tests for a GPU are read: others need packages that the machine may not have. Nor are plug-ins of pytest loaded but those named here.
pytest_on_gpu() { # folder of what has passed, pytest's arguments...
  local progress=$1 code=0
  shift
  PYTEST_DISABLE_PLUGIN_AUTOLOAD=1 PYTHONPATH=$PWD/tools${PYTHONPATH:+:$PYTHONPATH} GPU_TESTS=$progress GPU_TESTS_UNTIL=${until:-} \
    "${under[@]}" "$python" -m pytest -q -p no:cacheprovider -p gpu_tests "$@" || code=$?
  if [ -s "$progress/lost" ]; then head -c 4000 "$progress/lost"; fi
  if [ "$code" -eq 5 ] && [ -s "$progress/passed" ]; then code=0; fi # none left that has not passed
  return "$code"
}

device_tests() {
  is_built "the step of device tests" && has_pytest || return "$LEFT_OUT"
  local under=() processes=()
  if has xdist; then processes=(-p xdist -n "$(nproc | awk '{print ($1 < 8) ? $1 : 8}')" --dist worksteal); fi
  # shellcheck disable=SC2046,SC2086
  GPU_TESTS_LONGEST=240 pytest_on_gpu build/gpu/tests "${processes[@]}" -m "gpu and not slow" \
    $(grep -lE "^pytestmark = pytest.mark.gpu|^@pytest.mark.gpu" tests/test_*.py) ${TEST_ARGS:-}
}

# About sixty tests, since each takes a hundred times as long: rows that go through every kind of kernel, some of them through several blocks, and lines
# that clusters of blocks keep in shared memory. No graphs: without torch's cache of memory an allocation in a capture is the driver's, which breaks it.
readonly SANITIZED="(single or chain or layer-norm-33 or embedding-twice or embedding-large or attention-causal-long or attention-mask-heads or long_line) and not f64 and not replayed"

sanitizer() {
  is_built "the step of compute-sanitizer" && has_pytest || return "$LEFT_OUT"
  cuda_toolkit gpu 2>/dev/null || true # its folder may have it where PATH has not
  command -v compute-sanitizer >/dev/null || {
    echo "gpu: expected compute-sanitizer on PATH or in CUDA_HOME/bin, found none, so its step is left out; it is in the CUDA toolkit." >&2
    return "$LEFT_OUT"
  }
  local tool code status=0 under
  for tool in ${SANITIZER_TOOLS:-memcheck racecheck initcheck}; do
    # torch's allocator reuses memory, which hides overruns from memcheck: one allocation each instead.
    under=(env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" --error-exitcode 9 --target-processes all
      --log-file "build/gpu/$tool.log")
    code=0
    pytest_on_gpu "build/gpu/$tool" -x -m "not slow" tests/test_gpu.py -k "${SANITIZER_SET:-$SANITIZED}" || code=$?
    tail -n 3 "build/gpu/$tool.log"
    if [ "$code" -eq "$UNFINISHED" ]; then
      if [ "$status" -eq 0 ]; then status=$UNFINISHED; fi
    elif [ "$code" -ne 0 ]; then
      status=1
      rm -rf "build/gpu/$tool" # whose tests pass, whatever the tool finds
    fi
  done
  return "$status"
}

benchmark() {
  is_built "the benchmark" || return "$LEFT_OUT"
  # shellcheck disable=SC2086
  "$python" -m bench.run --device cuda ${until:+--resume --minutes "$(($(left) / 60))"} ${BENCH_ARGS:-} || return
  # shellcheck disable=SC2086
  if [ -n "$until" ] && ! "$python" -m bench.run --device cuda --resume --list ${BENCH_ARGS:-} | grep -q '^0 cases'; then return "$UNFINISHED"; fi
}

for s in $steps; do
  case $s in
    build) step "build" build ;;
    tests) step "device tests" device_tests ;;
    sanitizer) step "compute-sanitizer" sanitizer ;;
    bench) step "benchmark" benchmark ;;
  esac
done
if [ "$status" -eq "$UNFINISHED" ]; then printf '\ngpu: %s minutes are over; the same command goes on.\n' "$MINUTES"; fi
printf '\n%-20s %-8s %s\n' step result time
for line in "${table[@]}"; do IFS='|' read -r a b c <<<"$line"; printf '%-20s %-8s %s\n' "$a" "$b" "$c"; done
exit "$status"
