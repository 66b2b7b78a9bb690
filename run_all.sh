#!/usr/bin/env bash
# The benchmarks and controls of the paper's main table, one after the other: ./run_all.sh [flags for every run]
# Finished runs are skipped and cut-off ones go on, so it can be started again at any time.
set -euo pipefail
cd "$(dirname "$0")"
python=${PYTHON:-python3}
seeds=(--seeds 0 1 2)

run() { # name, flags
  local name=$1
  shift
  echo "== $name"
  "$python" pah.py --out "runs/$name" --resume "${seeds[@]}" "$@"
}

for dataset in "cifar100 10" "tinyimagenet 10" "tinyimagenet 20"; do
  read -r data tasks <<<"$dataset"
  setting=(--dataset "$data" --tasks "$tasks")
  run "$data-$tasks" "${setting[@]}" "$@"
  run "$data-$tasks-finetune" "${setting[@]}" --lam 0 --mu 0 "$@"
  run "$data-$tasks-stored-heads" "${setting[@]}" --head stored "$@"
  run "$data-$tasks-vector" "${setting[@]}" --embedding vector "$@"
  run "$data-$tasks-joint" "${setting[@]}" --joint "$@"
done
"$python" pah.py --report runs
