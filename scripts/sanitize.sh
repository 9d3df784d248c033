#!/usr/bin/env bash
# Builds the extension for the CPU with the address and undefined-behaviour sanitizers, in a folder of its
# own, and runs Python tests on it, then a minute of random operator calls. The first finding ends a run.
#
#   scripts/sanitize.sh [test files or other arguments of pytest; default: those of operators and layers]
#
# FDFA_SANITIZE_BUILD is the folder (build/sanitize), FDFA_FUZZ_CASES the cases of operators (5000).
set -euo pipefail
cd "$(dirname "$0")/.."

python=$PWD/.venv/bin/python
build=$(realpath -m "${FDFA_SANITIZE_BUILD:-build/sanitize}")
tests=("$@")
if [ $# -eq 0 ]; then
  tests=(python_tests/test_ops*.py python_tests/test_{layers,patches,feedback}.py)
fi

mkdir -p "$build/lib"
PATH=$PWD/.venv/bin:$PATH FDFA_CUDA=0 FDFA_SANITIZE=address,undefined \
  "$python" setup.py --quiet build_ext --build-lib "$build/lib" --build-temp "$build/temp"
(cd fdfa_ext && find . -name '*.py' -exec cp --parents -t "$build/lib/fdfa_ext" {} +)

# Python itself is not built with the sanitizers, so their libraries must come before all others; and
# the C++ library with them, or they would not see its exceptions. Python leaves memory to the end, and
# memory of an impossible size is an error of torch.
library() { g++ -print-file-name="$1"; }
export LD_PRELOAD="$(library libasan.so):$(library libubsan.so):$(library libstdc++.so.6)"
export ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1 UBSAN_OPTIONS=print_stacktrace=1
# The package that was built here, not the one in the project's folder.
export PYTHONSAFEPATH=1 PYTHONPATH="$build/lib:$PWD/python_tests"

"$python" -c 'import fdfa_ext._C as extension; print(extension.__file__)'
"$python" -m pytest -q -p no:cacheprovider -m "not slow" "${tests[@]}"
"$python" -m fuzz.operators --cases "${FDFA_FUZZ_CASES:-5000}" || {
  echo "the case of a finding: run with --verbose" >&2
  exit 1
}
