#!/usr/bin/env bash
# Builds the extension with its CUDA kernels against a CUDA build of torch, in an environment of its own, and imports it. No GPU is needed: what this
# proves is that everything compiles, links and loads. Usage: tools/cuda_build.sh ENVIRONMENT REQUIREMENT, as `make cuda-build` calls it.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
environment=$1 requirement=$2
command -v nvcc >/dev/null || { echo "cuda-build: expected the CUDA toolkit, found no nvcc; install it or put it on PATH." >&2; exit 1; }
python="$environment/bin/python"
if [ ! -x "$python" ]; then "${PYTHON:-python3}" -m venv "$environment"; fi
"$python" -m pip install -qq "$requirement" numpy ninja pybind11 "setuptools>=77,<82"
cuda=$("$python" -c 'import torch; print(torch.version.cuda or "")')
[ -n "$cuda" ] || { echo "cuda-build: expected a CUDA build of torch from '$requirement', got one for the CPU; name another in CUDA_TORCH." >&2; exit 1; }
# torch's wheels bring headers of their own CUDA; the toolkit may lack some.
wheels=$("$python" -c 'import pathlib, torch; print(pathlib.Path(torch.__file__).parents[1] / "nvidia" / ("cu" + torch.version.cuda.split(".")[0]))')
export CPATH="$wheels/include${CPATH:+:$CPATH}"
if [ -z "${CUDA_HOME:-}" ] && [ -d /usr/local/cuda ]; then export CUDA_HOME=/usr/local/cuda; fi
INFLUENCE_EXT_CUDA=1 "$python" setup.py -q build --build-lib build/with-cuda/lib
cd build/with-cuda/lib
"$python" -c 'import influence_ext as ie; info = ie.build_info(); print("\n".join(f"{k}: {info[k]}" for k in ("torch", "compiler", "cuda")))'
