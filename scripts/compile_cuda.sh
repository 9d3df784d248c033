#!/bin/sh
# Compiles every CUDA source for the architectures below, warnings as errors. Needs nvcc but no GPU and
# no torch. Without nvcc it says so and succeeds, unless FDFA_CUDA=1 asks for CUDA.
set -eu
cd "$(dirname "$0")/.."

nvcc=${NVCC:-nvcc}
if ! command -v "$nvcc" >/dev/null; then
  echo "nvcc not found, CUDA sources not compiled"
  [ "${FDFA_CUDA:-}" != 1 ]
  exit
fi

objects=$(mktemp -d)
trap 'rm -rf "$objects"' EXIT
# Several at a time. xargs fails if one of them does.
for source in csrc/cuda/*.cu; do basename "$source"; done |
  xargs -P "$(getconf _NPROCESSORS_ONLN)" -I '{}' \
    "$nvcc" -std=c++20 -O3 -Icsrc -Werror all-warnings -Xcompiler -Wall,-Wextra,-Werror \
    -gencode arch=compute_80,code=sm_80 -gencode arch=compute_90,code=sm_90 \
    -c 'csrc/cuda/{}' -o "$objects/{}.o"
echo "compiled csrc/cuda/*.cu"
# The operators include the kernels' header in C++, which knows less than CUDA.
echo '#include "cuda/kernels.h"' >"$objects/header.cpp"
"$nvcc" -std=c++20 -Icsrc -Xcompiler -Wall,-Wextra,-Werror -c "$objects/header.cpp" -o "$objects/header.o"
echo "compiled csrc/cuda/kernels.h"
