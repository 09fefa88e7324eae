#!/usr/bin/env bash
# Check and measure align on one GPU: device placement, DeepSpeed, speed, memory, vLLM.
#
#   scripts/gpu_check.sh [STEP ...]      default: every step that can run here, in order
#
# It runs on a bare machine with Python 3.12, torch and CUDA, without a package index. What that
# machine lacks travels as files in PARTS (default: .gpu in the checkout):
#   PARTS/wheels/*.whl, PARTS/vllm-wheels/*.whl   installed without dependencies into WORK/site
#   PARTS/vllm/part-*                             a split tar.xz of the package vllm; parts of
#                                                 several calls add up, part-last ends them
# A step is a process with its own time limit; a failing step does not stop the next one.
# Environment: OUT (results), WORK (scratch), PARTS, PY (interpreter), LIMIT_S (whole script).
# ALIGN_SMOKE=1 runs tiny sizes on the CPU, to test this script.
set -u
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$ROOT"
PARTS=${PARTS:-$ROOT/.gpu}
OUT=${OUT:-/tmp/align_gpu_check}
WORK=${WORK:-/tmp/align_gpu}
PY=${PY:-python3}
LIMIT_S=${LIMIT_S:-540}
BEGAN=$(date +%s)
STEPS="install environment placement zero_stages offload units accumulation attention head sft05
  sft15 dpo05 grpo05 vllm vllm_units"
WANTED=$(echo ${*:-$STEPS})
mkdir -p "$OUT" "$WORK"
export WORK PY PARTS PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
export PYTHONPATH="$ROOT:$WORK/site" VLLM_NO_USAGE_STATS=1
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-8}

left() { echo $((LIMIT_S - ($(date +%s) - BEGAN))); }

# step NAME SECONDS COMMAND...: run a wanted step; add its exit code and RESULT lines to the table.
step() {
  local name=$1 limit=$2 began code
  shift 2
  case " $WANTED " in *" $name "*) ;; *) return 0 ;; esac
  if [ "$(left)" -le 8 ]; then
    echo "$name: skipped, no time left" | tee -a "$OUT/table.txt"
    return 0
  fi
  [ "$limit" -le "$(left)" ] || limit=$(left)
  began=$(date +%s)
  timeout -k 5 "$limit" "$@" >"$OUT/.$name.log" 2>&1
  code=$?
  {
    printf '%-12s exit %-3s %3d s\n' "$name" "$code" $(($(date +%s) - began))
    grep -a '^RESULT' "$OUT/.$name.log" | sed 's/^RESULT /    /' | cut -c1-600
  } | tee -a "$OUT/table.txt"
  { echo "=== $name, exit $code"; tail -c 60000 "$OUT/.$name.log"; } >>"$OUT/log.txt"
  rm -f "$OUT/.$name.log"
}

module() { local name=$1 limit=$2; shift 2; step "$name" "$limit" "$PY" -m "benchmarks.gpu.$@"; }

install() {
  set -e
  local folder
  for folder in wheels vllm-wheels; do
    if ls "$PARTS/$folder"/*.whl >/dev/null 2>&1; then
      $PY -m pip install -q --no-deps --no-index --no-compile --no-cache-dir --upgrade \
        --target "$WORK/site" "$PARTS/$folder"/*.whl
    fi
  done
  mkdir -p "$WORK/parts"
  cp "$PARTS"/vllm/part-* "$WORK/parts/" 2>/dev/null || true
  if [ -f "$WORK/parts/part-last" ] && [ ! -d "$WORK/site/vllm" ]; then
    cat "$WORK"/parts/part-[0-9]* "$WORK/parts/part-last" | xz -dc -T0 | tar x -C "$WORK/site"
  fi
  $PY -c "import deepspeed, pydantic, align.cli; print('RESULT deepspeed=' + deepspeed.__version__)"
  if $PY -c "import importlib.util as u; raise SystemExit(u.find_spec('vllm') is None)"; then
    $PY -c "from vllm import LLM; import vllm; print('RESULT vllm=' + vllm.__version__)" ||
      echo "RESULT vllm=DOES_NOT_IMPORT"
  fi
}
export -f install

rm -f "$OUT/table.txt" "$OUT/log.txt"
step install 90 bash -c install
module environment 40 environment
# Checks run side by side, measurements alone.
module placement 180 placement &
module zero_stages 90 zero_stages &
module offload 120 offload &
ALIGN_TEST_GPU=1 step units 120 "$PY" -m pytest -q --maxfail=8 -p no:cacheprovider tests/gpu \
  --deselect tests/gpu/test_engine_gpu.py &
module accumulation 60 accumulation &
wait
module attention 30 attention
module head 30 head
module sft05 60 train sft 0.5B --profile
module sft15 50 train sft 1.5B --checkpointing
module dpo05 40 train dpo 0.5B --rows 32
module grpo05 70 grpo 0.5B hf
if "$PY" -c "import importlib.util as u; raise SystemExit(u.find_spec('vllm') is None)"; then
  module vllm 170 vllm_engine
  ALIGN_TEST_GPU=1 step vllm_units 120 "$PY" -m pytest -q -p no:cacheprovider \
    tests/gpu/test_engine_gpu.py
fi
echo "---- $(($(date +%s) - BEGAN)) s of $LIMIT_S" | tee -a "$OUT/table.txt"
