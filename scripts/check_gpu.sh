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

no_gpu() {
  echo "check_gpu: $1" >&2
  exit 1
}

# step NAME LIMIT FIGURE COMMAND...: runs the command for at most LIMIT seconds, its output in a log of
# that name. FIGURE is a command that finds one telling figure in the log on its standard input.
step() {
  local name=$1 limit=$2 figure=$3 log=$logs/$1.log started=$SECONDS status=0 result=pass
  shift 3
  echo "=== $name (at most $limit s)"
  timeout --kill-after=5 "$limit" "$@" >"$log" 2>&1 </dev/null || status=$?
  if [ "$status" -ne 0 ]; then
    result="FAIL ($status)"
    [ "$status" -ne 124 ] && [ "$status" -ne 137 ] || result="FAIL (time limit)"
    failed=1
    tail -n 40 "$log"
  fi
  results+=("| $name | $result | $((SECONDS - started)) | $("$figure" <"$log") |")
  return "$status"
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
  [ -z "${OUT:-}" ] || tar -czf "$OUT/check_gpu.tar.gz" -C "$logs" .
  printf '\n| step | result | seconds | figure |\n|---|---|---|---|\n'
  printf '%s\n' "${results[@]}"
  exit "$failed"
}

mkdir -p "$logs" || exit 1
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

# The limits add up to less than 8 minutes.
step build 110 last_line "$python" setup.py build_ext --inplace || finish
step info 20 last_line "$python" -m fdfa_ext info
workers=()
"$python" -c 'import xdist' 2>/dev/null && workers=(-n 8)
# After an access out of bounds every later test of a process fails: the first failures tell.
step tests 100 pytest_summary "$python" -m pytest -q -p no:cacheprovider --tb=short --maxfail=10 \
  "${workers[@]}" python_tests

# Every kernel, rule and storage type on small shapes. Only this package's kernels are instrumented, and
# each tensor has an allocation of its own, so that no access past its end lands in a neighbour.
small="cuda and (test_linear and true-true and (tanh or gelu) or test_perturb or test_strided
  or test_feedback_step and (float32 and relu or bfloat16 and gelu and shape1 or float16 and gelu and shape5)
  or test_max_pool2d_end and 15 or test_batch_norm_is and tanh)"
sanitize() {
  local tool=$1 limit=$2
  shift 2
  step "$tool" "$limit" sanitizer_summary env PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
    "$sanitizer" --tool "$tool" "$@" --kernel-name kns=fdfa --error-exitcode 9 \
    "$python" -m pytest -q -p no:cacheprovider python_tests/test_ops.py -k "${small//$'\n'/ }"
}
sanitize memcheck 55 --report-api-errors no  # torch itself provokes some that harm no one
sanitize racecheck 35
sanitize synccheck 25

step bench 40 largest_ratio "$python" -m fdfa_ext bench --device cuda --seconds 3 \
  --methods fdfa,fdfa-graphed,plain,bp,bp-channels-last,bp-graphed --json "$logs/bench.json"
step profile 60 least_bandwidth "$python" -m fdfa_ext profile --device cuda --model alexnet \
  --batch-size 128 --json "$logs/profile.json"
step train 30 accuracies "$python" -m fdfa_ext train --dataset digits --method fdfa,bp --device cuda \
  --epochs 10 --output "$logs/train"

for log in bench profile; do
  grep -v '\.\.\.$' "$logs/$log.log"  # all but progress
done
finish
