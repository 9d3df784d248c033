#!/usr/bin/env bash
# Builds, tests, sanitizes and times everything on a machine with a GPU, in one call of under 8 minutes
# and with no network. Uses the python3 on PATH (or $PYTHON), which must hold torch with CUDA, setuptools,
# pytest, and for the training run scikit-learn, matplotlib and tqdm; pytest-xdist is used where it is there.
# Builds in place, installs nothing. Logs go to build/gpu, and packed to $OUT where that is set. A failed step
# does not stop the ones after it, except the build, which all others need. Prints a short table last and
# fails if any step failed.
set -uo pipefail
cd "$(dirname "$0")/.."

python=${PYTHON:-python3}
logs=build/gpu
results=()  # a table line for each step
failed=0
deadline=$((SECONDS + 465))

no_gpu() {
  echo "check_gpu: $1" >&2
  exit 1
}

# step NAME LIMIT FIGURE COMMAND...: runs the command for at most LIMIT seconds, or what is left of all, its
# output in a log of that name. FIGURE is a command that finds one telling figure in the log on its
# standard input; a step without one has failed. What is known so far is packed after each.
step() {
  local name=$1 limit=$2 figure=$3 log=$logs/$1.log started=$SECONDS status=0 result=pass found
  shift 3
  [ "$limit" -lt $((deadline - SECONDS)) ] || limit=$((deadline - SECONDS))
  echo "=== $name (at most $limit s)"
  if [ "$limit" -lt 5 ]; then
    results+=("| $name | not run | 0 | no time left |")
    return 1
  fi
  # By an interrupt, so that pytest reports the failures so far.
  timeout --signal=INT --kill-after=10 "$limit" "$@" >"$log" 2>&1 </dev/null || status=$?
  found=$("$figure" <"$log")
  if [ "$status" -ne 0 ] || [ -z "$found" ]; then
    result="FAIL ($status)"
    [ "$status" -ne 124 ] && [ "$status" -ne 137 ] || result="FAIL (time limit)"
    failed=1
    tail -n 20 "$log"
  fi
  results+=("| $name | $result | $((SECONDS - started)) | $found |")
  pack
  return "$status"
}

pack() {
  table >"$logs/table.md"
  [ -z "${OUT:-}" ] || tar -czf "$OUT/check_gpu.tar.gz" -C "$logs" .
}

table() {
  printf '\n| step | result | seconds | figure |\n|---|---|---|---|\n'
  printf '%s\n' "${results[@]}"
}

last_line() { tail -n 1 | tr -d '=|'; }
pytest_summary() { grep -E '(passed|failed|error|no tests ran).* in ' | last_line; }
sanitizer_summary() { grep -E 'ERROR SUMMARY|RACECHECK SUMMARY' | last_line; }
largest_ratio() {  # of the table that `bench` prints
  awk -F'|' '$5 == " fdfa " && $7 + 0 > top { top = $7 + 0 } END { if (top) print "FDFA / BP at most " top }'
}
least_bandwidth() {  # of the table that `profile` prints
  awk -F'|' '$2 ~ /fdfa::(perturb|feedback)/ && (!least || $9 + 0 < least) { least = $9 + 0 }
    END { if (least) print "our kernels reach at least " least "% of the roofline" }'
}
accuracies() { grep '^test accuracy' | tr -s ' '; }  # of FDFA and of backprop

finish() {
  for log in bench profile; do
    [ ! -s "$logs/$log.log" ] || grep -v '\.\.\.$' "$logs/$log.log"  # all but progress
  done
  table
  exit "$failed"
}
trap 'failed=1; finish' INT TERM

rm -rf "$logs"
mkdir -p "$logs" || exit 1
# An nvcc on PATH may be a wrapper, beside which torch would look for the headers.
[ -n "${CUDA_HOME:-}" ] || [ ! -x /usr/local/cuda/bin/nvcc ] || export CUDA_HOME=/usr/local/cuda
command -v "$python" >/dev/null || no_gpu "no Python named '$python'; set PYTHON to one that holds torch."
facts=$("$python" - <<'PYTHON' 2>"$logs/python.log"
import torch
from torch.utils.cpp_extension import CUDA_HOME

if torch.cuda.is_available():
    major, minor = torch.cuda.get_device_capability()
    print(f"{major}.{minor}", CUDA_HOME or "none", f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
else:
    print("none none none")
PYTHON
) || no_gpu "torch could not be imported by $python: $(tail -n 1 "$logs/python.log")"
read -r architecture cuda_home machine <<<"$facts"
[ "$architecture" != none ] || no_gpu "torch sees no GPU on this machine, so there is nothing to check."
[ -x "$cuda_home/bin/nvcc" ] || no_gpu "nvcc was not found; put it on PATH or set CUDA_HOME."
sanitizer=$(PATH="$PATH:$cuda_home/bin" command -v compute-sanitizer || echo compute-sanitizer)
echo "$machine, compute capability $architecture, $cuda_home"

# The extension is imported from this folder, and from nowhere else.
export PYTHONPATH=$PWD PYTHONUNBUFFERED=1 FDFA_CUDA=1 TORCH_CUDA_ARCH_LIST=$architecture MAX_JOBS
MAX_JOBS=$(nproc)

# In order of worth: what is late may find no time left.
step build 150 last_line "$python" setup.py build_ext --inplace || finish
step info 20 last_line "$python" -m fdfa_ext info

# Small shares for each worker, since a few files compile for long. After an access out of bounds every
# later test of a process fails: the first failures tell.
workers=()
"$python" -m pytest --help 2>/dev/null | grep -q maxschedchunk && workers=(-n 12 --maxschedchunk 1)
run_tests() {
  step "$1" "$2" pytest_summary env TORCHINDUCTOR_COMPILE_THREADS=2 "$python" -m pytest -q \
    -p no:cacheprovider --tb=short --maxfail=10 --durations=10 "${workers[@]}" python_tests -k "$3"
}
run_tests tests-cuda 110 "cuda or graphed"

# Only this package's kernels are instrumented. For memcheck each tensor has an allocation of its own, so
# that no access past its end lands in a neighbour.
sanitize() {
  local tool=$1
  shift
  step "$tool" 60 sanitizer_summary "$sanitizer" --tool "$tool" --launch-timeout 60 "$@" \
    --kernel-name kns=fdfa --error-exitcode 9 "$python" scripts/every_kernel.py
}
# torch itself provokes errors of the API that harm no one
PYTORCH_NO_CUDA_MEMORY_CACHING=1 sanitize memcheck --report-api-errors no
sanitize racecheck
sanitize synccheck

step bench 60 largest_ratio "$python" -m fdfa_ext bench --device cuda --seconds 3 \
  --methods fdfa,fdfa-graphed,plain,bp,bp-channels-last,bp-graphed --json "$logs/bench.json"
step train 30 accuracies "$python" -m fdfa_ext train --dataset digits --method fdfa,bp --device cuda \
  --epochs 10 --output "$logs/train"
step profile 110 least_bandwidth "$python" -m fdfa_ext profile --device cuda --model alexnet \
  --batch-size 128 --json "$logs/profile.json"
run_tests tests-cpu 150 "not cuda and not graphed"
finish
