# Sourced by cuda_build.sh and gpu.sh: what a build with CUDA kernels needs of the machine. `cuda_toolkit WHO` looks for the compilers, before anything is
# downloaded; `cuda_environment WHO` also for what the interpreter $python must have. They export CUDA_HOME and CPATH, or say in a sentence what is
# missing and fail.

has() { "$python" -c "import $1" 2>/dev/null; } # module

cuda_toolkit() {
  local who=$1 folder
  if [ -z "${CUDA_HOME:-}" ]; then
    # The nvcc on PATH may be a script or a link that stands alone: a toolkit has headers and libraries, too.
    for folder in "$(dirname "$(dirname "$(readlink -f "$(command -v nvcc || echo /)")")")" /usr/local/cuda; do
      if [ -x "$folder/bin/nvcc" ] && [ -e "$folder/include/cuda_runtime.h" ]; then
        CUDA_HOME=$folder
        break
      fi
    done
  fi
  [ -x "${CUDA_HOME:-}/bin/nvcc" ] || {
    local where=${CUDA_HOME:+$CUDA_HOME/bin}
    echo "$who: expected the CUDA toolkit, found no nvcc in ${where:-a toolkit on PATH or in /usr/local/cuda}; install it, or set CUDA_HOME." >&2
    return 1
  }
  export CUDA_HOME PATH=$CUDA_HOME/bin:$PATH # the same compiler for torch's build, which asks CUDA_HOME, as for what is asked here
  command -v "${CXX:-c++}" >/dev/null || { echo "$who: expected a C++ compiler, found no '${CXX:-c++}'; install g++ or set CXX." >&2; return 1; }
}

cuda_environment() {
  local who=$1 version includes
  cuda_toolkit "$who" || return 1
  version=$("$python" -c 'import torch; print(torch.version.cuda or "")')
  [ -n "$version" ] || { echo "$who: expected '$python' to have a CUDA build of torch, got one for the CPU; install one with CUDA." >&2; return 1; }
  if [ "$(nvcc --version | sed -n 's/.*release \([0-9]*\)\..*/\1/p')" != "${version%%.*}" ]; then
    echo "$who: expected nvcc of CUDA ${version%%.*}, with which this torch was built, got another; set PATH and CUDA_HOME to that toolkit." >&2
    return 1
  fi
  "$python" -c 'import setuptools, sys; sys.exit(int(setuptools.__version__.split(".")[0]) < 77)' 2>/dev/null || {
    echo "$who: expected setuptools 77 or later for '$python', which reads pyproject.toml, got an older one or none; install it." >&2
    return 1
  }
  "$python" -c 'import os, pathlib, sys, sysconfig
folders = [sysconfig.get_path("include"), *filter(None, os.environ.get("CPATH", "").split(":"))]
sys.exit(not any(pathlib.Path(folder, "Python.h").exists() for folder in folders))' || {
    echo "$who: expected Python.h of '$python', found none; install its development package (python3-dev), or put its folder in CPATH." >&2
    return 1
  }
  has ninja || command -v ninja >/dev/null || echo "$who: found no ninja, so one file is compiled after the other; expect an hour." >&2
  # torch's wheels bring headers of their own CUDA; the toolkit may lack some.
  includes=$("$python" -c 'import pathlib, torch; print(*sorted(pathlib.Path(torch.__file__).parents[1].glob("nvidia/*/include")), sep=":")')
  if [ -n "$includes" ]; then export CPATH="$includes${CPATH:+:$CPATH}"; fi
}
