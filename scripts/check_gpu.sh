#!/usr/bin/env bash
# Builds, times, tests and sanitizes everything on a machine with a GPU, in one call and without a network:
#
#   scripts/check_gpu.sh [--quick] [--seconds N]
#
# takes at most 8 minutes, or 4 for the essential; --seconds stretches or shortens every step's limit alike.
# Uses the python3 on PATH (or $PYTHON), which must hold torch with CUDA, setuptools, numpy and pytest, and for
# the training run scikit-learn, matplotlib and tqdm; pytest-xdist is used where it is there. Builds in place,
# installs nothing. FDFA_COMMIT names the commit where .git is missing.
#
# Logs, figures and all tables (tables.md) go to build/gpu, and after each step packed to $OUT/check_gpu.tar.gz
# where OUT is set. A failed step does not stop the others, except the build. The next call in the same folder
# skips what has passed, until sources, commit, torch, GPU or the built module change. "not run": the tool is
# missing or refuses this machine. Exit status 0: nothing failed.
set -uo pipefail
cd "$(dirname "$0")/.." || exit

fail() {
  echo "check_gpu: $1" >&2
  exit 1
}

quick=false planned=480 seconds=
while [ $# -gt 0 ]; do
  case $1 in
    --quick) quick=true planned=240 ;;
    --seconds) seconds=${2:-0} && shift ;;
    *) fail "unknown argument '$1'; usage: check_gpu.sh [--quick] [--seconds N]" ;;
  esac
  shift
done
seconds=${seconds:-$planned}
[[ $seconds =~ ^[1-9][0-9]*$ ]] || fail "--seconds needs a whole number of 1 or more"

python=${PYTHON:-python3}
logs=build/gpu
results=()  # a table line for each step
running=    # the process of the step at hand
end=0       # when the step at hand must have ended

# step NAME LIMIT FIGURE COMMAND...: runs the command for LIMIT seconds and what earlier steps have spared,
# its output in a log of that name. FIGURE matches one telling figure in the log; a step without one has failed.
step() {
  local name=$1 figure=$3 log=$logs/$1.log started=$SECONDS status=0 result=pass found limit
  end=$((end + $2 * seconds / planned))
  shift 3
  if [ -e "$logs/$name.passed" ]; then
    results+=("$(<"$logs/$name.passed")")
    return
  fi
  limit=$((end > SECONDS ? end - SECONDS : 1))
  echo "=== $name (at most $limit s)"
  # Ended by an interrupt, so that pytest reports the failures so far.
  timeout --signal=INT --kill-after=5 "$limit" "$@" >"$log" 2>&1 </dev/null &
  running=$!
  wait "$running" || status=$?
  found=$(grep -oE "$figure" "$log" | tail -n 1 | tr -d '|')
  case $status in
    0) [ -n "$found" ] || result="FAIL (no figure)" ;;
    124 | 137) result="FAIL (time limit)" ;;
    *) result="FAIL ($status)" ;;
  esac
  results+=("| $name | $result | $((SECONDS - started)) | $found |")
  if [ "$result" = pass ]; then
    echo "${results[-1]}" >"$logs/$name.passed"
  else
    tail -n 20 "$log"
  fi
  pack
  [ "$result" = pass ]
}

# tool PROGRAM NAME LIMIT FIGURE COMMAND...: a step by a program of the CUDA toolkit. Some machines lack it,
# and some refuse it the device or the counters.
tool() {
  local program=$1 refusal
  shift
  if ! command -v "$program" >/dev/null; then
    results+=("| $1 | not run | 0 | $program is missing |")
    return
  fi
  step "$@"
  # Even an exit status of 0 is none where the tool saw nothing; errors that it found are no refusal.
  if [[ ${results[-1]} != *"FAIL ($errors_found)"* ]] &&
    refusal=$(grep -m 1 -E "$refusals" "$logs/$1.log" | tr -d '|'); then
    rm -f "$logs/$1.passed"
    results[-1]="| $1 | not run | 0 | $refusal |"
  fi
}
errors_found=9  # exit status of a sanitizer
refusals='Device not supported|No attachable process|Failed to initialize the profiler|ERR_NVGPUCTRPERM'

full() { "$quick" || "$@"; }

count() { printf '%s\n' "${results[@]}" | grep -c "^| [^|]* | $1"; }

summary() {
  printf '| step | result | seconds | figure |\n|---|---|---|---|\n'
  printf '%s\n' "${results[@]}"
  printf '\n%s\n' "$(count pass) passed, $(count FAIL) failed, $(count 'not run') not run"
}

# FDFA's lines: a graph beside the fastest graph of backpropagation, an eager step beside the fastest eager one.
ratios() {
  local dtype log
  for dtype in float32 bfloat16 tf32; do
    log=$logs/tables-$dtype.log
    [ ! -e "$log" ] || printf '\nFDFA / BP, %s:\n\n%s\n' "$dtype" \
      "$(grep -E '^\| net |^\|---|\| fdfa(-graphed)? \|' "$log")"
  done
}

tables() {
  local name
  echo "# $machine, commit $commit, $(date -u +%F)"
  echo && summary && ratios
  for name in tables-float32 tables-bfloat16 tables-tf32 kernels roofline nsight; do
    [ ! -e "$logs/$name.log" ] || printf '\n## %s\n\n%s\n\n%s\n' "$name" \
      "$(grep -m 1 ', commit ' "$logs/$name.log")" "$(grep '^|' "$logs/$name.log")"
  done
}

pack() {
  tables >"$logs/tables.md"
  if [ -n "${OUT:-}" ]; then
    tar -czf "$OUT/check_gpu.part" -C "$logs" . && mv "$OUT/check_gpu.part" "$OUT/check_gpu.tar.gz"
  fi
}

finish() {
  pack
  echo && summary && ratios
  printf '%s\n' "" "All tables: $logs/tables.md"
  [ "$(count FAIL)" -eq 0 ] || exit 1
  exit 0
}

interrupted() {
  kill "$running" 2>/dev/null
  results+=("| interrupted | FAIL | | |")
  finish
}
trap interrupted INT TERM

mkdir -p "$logs" || exit 1
# An nvcc on PATH may be a wrapper, beside which torch would look for the headers.
[ -n "${CUDA_HOME:-}" ] || [ ! -x /usr/local/cuda/bin/nvcc ] || export CUDA_HOME=/usr/local/cuda
command -v "$python" >/dev/null || fail "no Python named '$python'; set PYTHON to one that holds torch."
facts=$(timeout 60 "$python" - <<'PYTHON' 2>"$logs/python.log"
import torch
from torch.utils.cpp_extension import CUDA_HOME

if torch.cuda.is_available():
    major, minor = torch.cuda.get_device_capability()
    print(f"{major}.{minor}", CUDA_HOME or "none", f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
else:
    print("none none none")
PYTHON
) || fail "torch could not be imported by $python: $(tail -n 1 "$logs/python.log")"
read -r architecture cuda_home machine <<<"$facts"
[ "$architecture" != none ] || fail "torch sees no GPU on this machine, so there is nothing to check."
[ -x "$cuda_home/bin/nvcc" ] || fail "nvcc was not found; put it on PATH or set CUDA_HOME."
commit=$([ ! -e .git ] || git describe --always --dirty --exclude '*' 2>/dev/null)
commit=${commit:-${FDFA_COMMIT:-unknown}}
echo "$machine, compute capability $architecture, $cuda_home, commit $commit"
[ "$commit" != unknown ] || echo "The tables cannot say which commit they are of: set FDFA_COMMIT."

# The extension is imported from this folder, and from nowhere else.
export PYTHONPATH=$PWD PYTHONUNBUFFERED=1 FDFA_COMMIT=$commit PATH=$PATH:$cuda_home/bin
export FDFA_CUDA=1 TORCH_CUDA_ARCH_LIST=$architecture MAX_JOBS
MAX_JOBS=$(nproc)

# What passed with other sources or another build counts no longer.
sources() {
  echo "$facts $commit"
  find csrc fdfa_ext python_tests scripts setup.py pyproject.toml -type f \
    ! -name '*.so' ! -name '*.pyc' ! -name _built_for.txt -print0 | sort -z | xargs -0 sha256sum 2>/dev/null
}
if ! sources | cmp -s "$logs/sources" || ! sha256sum --status --check "$logs/module" 2>/dev/null; then
  rm -rf "$logs"
  mkdir -p "$logs"
  sources >"$logs/sources"
fi

# In order of worth. The limits add up to less than `planned`.
end=$SECONDS
step build 102 'fdfa_ext/_C.*' "$python" setup.py build_ext --inplace || finish
sha256sum fdfa_ext/_C*.so >"$logs/module"
step info 10 'CUDA kernels +CUDA .*' "$python" -m fdfa_ext info

measure() {
  step "tables-$1" "$2" 'fdfa-graphed .* of best BP' "$python" -m fdfa_ext bench --device cuda --dtype "$1" \
    --models mlp2,mlp4,cnn,alexnet --batch-sizes 128 --outputs 10,200,100 --seconds 0.7 --methods \
    fdfa,fdfa-graphed,bp,bp-channels-last,bp-graphed,bp-channels-last-graphed,dfa,plain,published \
    --json "$logs/tables-$1.json" --resume
}
measure float32 55
full measure bfloat16 35
full measure tf32 45
[ -e "$logs/kernels.passed" ] || rm -f "$logs/roofline.passed"  # which is made of its figures
full step kernels 45 'kernels reach .* of the roofline' "$python" -m fdfa_ext profile --device cuda \
  --model mlp4,alexnet,cnn,other-ends --batch-size 128 --only-fdfa --json "$logs/kernels.json"

# Small shares for each worker, since a few files compile for long. After an access out of bounds every
# later test of a process fails: the first failures tell.
workers=()
timeout 20 "$python" -m pytest --help 2>/dev/null | grep -q maxschedchunk && workers=(-n 12 --maxschedchunk 1)
run_tests() {
  local name=$1 limit=$2
  shift 2
  step "$name" "$limit" '[0-9]+ passed.* in .*s' env TORCHINDUCTOR_COMPILE_THREADS=2 "$python" -m pytest -q \
    -p no:cacheprovider --tb=short --maxfail=50 --durations=10 "${workers[@]}" -k "cuda or graphed" "$@"
}
run_tests tests-operators 40 python_tests/test_ops*.py
full run_tests tests-others 35 python_tests --ignore-glob 'python_tests/test_ops*.py'

# Only this package's kernels are instrumented. For memcheck each tensor has an allocation of its own, so
# that no access past its end lands in a neighbour.
sanitize() {
  local name=$1 limit=$2
  shift 2
  tool compute-sanitizer "$name" "$limit" '(ERROR|RACECHECK) SUMMARY.*' timeout --signal=INT --kill-after=5 35 \
    compute-sanitizer --tool "$name" "$@" --launch-timeout 60 --kernel-name kns=fdfa --error-exitcode "$errors_found" "$python" scripts/every_kernel.py
}
# torch itself provokes errors of the API that harm no one
PYTORCH_NO_CUDA_MEMORY_CACHING=1 full sanitize memcheck 25 --report-api-errors no
full sanitize racecheck 20
full sanitize synccheck 20

# Lines that begin with the accuracy of FDFA and of backpropagation.
full step train 15 '^test accuracy.*' "$python" -m fdfa_ext train --dataset digits --method fdfa,bp \
  --device cuda --epochs 10 --output "$logs/train"
full tool ncu nsight 10 'feedback_kernel.*' "$python" scripts/nsight_compute.py "$logs/nsight.csv"
# The times of `kernels` beside those that the data sheets of an H100 and an H200 allow.
full step roofline 12 "fdfa's operators .*" "$python" -m fdfa_ext.bench.roofline --measured "$logs/kernels.json"
finish
