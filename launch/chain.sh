#!/bin/sh
# Run the stages of a recipe in order and stop at the first failure.
#   launch/chain.sh RECIPE [RUN_DIR] [--runs DIR] [--set key=value ...]
# --runs is the folder of the runs (default: runs), in which RUN/STAGE is looked up.
# Set RANKS=n in the environment to run every stage with n ranks instead of the recipe's number.
# `align run` does the same, and also skips, resumes, shows progress and writes the report.
set -eu
if [ $# -lt 1 ]; then
  sed -n '2,6s/^# \{0,1\}//p' "$0" >&2
  exit 2
fi
here=$(cd "$(dirname "$0")" && pwd)
python=${PYTHON:-python}
recipe=$1
shift
run_dir=
case ${1:-} in
  '' | --*) ;;
  *) run_dir=$1 && shift ;;
esac

runs=runs before=
for word in "$@"; do
  [ "$before" = --runs ] && runs=$word
  before=$word
done

run_stage() { # NAME KIND RANKS [--set key=value ...]
  name=$1 kind=$2 ranks=$3
  shift 3
  set -- "$here/$kind.py" --recipe "$recipe" --stage "$name" --run-dir "$run_dir" "$@"
  if [ "$ranks" -eq 1 ]; then
    "$python" "$@"
  elif nvidia-smi -L >/dev/null 2>&1; then
    "$python" -m deepspeed.launcher.runner --num_gpus "$ranks" "$@"
  else
    DS_ACCELERATOR=cpu "$python" -m deepspeed.launcher.runner --num_accelerators "$ranks" "$@"
  fi
}

# Also validates the recipe. Prints its name, then "name kind ranks" for each stage.
stages=$("$python" -m align.cli stages "$recipe" "$@")
recipe_name=${stages%%
*}
run_dir=${run_dir:-$runs/$recipe_name}
printf '%s\n' "$stages" | tail -n +2 | {
  while read -r stage kind recipe_ranks; do
    ranks=${RANKS:-$recipe_ranks}
    echo "== $stage ($kind), ranks: $ranks"
    if [ "$ranks" -ne "$recipe_ranks" ]; then
      set -- "$@" --set "stages.$stage.ranks=$ranks"
    fi
    run_stage "$stage" "$kind" "$ranks" "$@" </dev/null
  done
}
