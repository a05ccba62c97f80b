#!/usr/bin/env bash
# Builds the extension with its CUDA kernels against a CUDA build of torch, in an environment of its own, and imports it. No GPU is needed: what this
# proves is that everything compiles, links and loads. Usage: tools/cuda_build.sh ENVIRONMENT REQUIREMENT, as `make cuda-build` calls it.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
environment=$1 requirement=$2
python="$environment/bin/python"
# shellcheck source=tools/cuda_environment.sh
source tools/cuda_environment.sh
cuda_toolkit cuda-build
if [ ! -x "$python" ]; then "${PYTHON:-python3}" -m venv "$environment"; fi
"$python" -m pip install -qq "$requirement" numpy ninja pybind11 "setuptools>=77,<82"
cuda_environment cuda-build
INFLUENCE_EXT_CUDA=1 "$python" setup.py -q build --build-lib build/with-cuda/lib
cd build/with-cuda/lib
"$python" -c 'import influence_ext as ie; info = ie.build_info(); print("\n".join(f"{k}: {info[k]}" for k in ("torch", "compiler", "cuda")))'
