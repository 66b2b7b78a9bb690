#!/usr/bin/env bash
# The whole paper: main table, controls and ablations with three seeds, then the table of all results.
#
#   ./run_all.sh             one process on each GPU (or one on the CPU, which takes days)
#   ./run_all.sh --quick     the same settings, two seeds, small, on the synthetic data: minutes on two CPU cores
#   ./run_all.sh --plan      only say what would run, and for how long
#
# Other flags go to every run. Finished runs are skipped and cut-off ones go on, so start it again at any time; Ctrl-C
# stops all of it. PYTHON names another interpreter, WORKERS another number of processes.
set -euo pipefail
cd "$(dirname "$0")"
python=${PYTHON:-python3}

quick='' plan='' flags=() jobs=()
for flag; do
  case $flag in
    --quick) quick=1 ;;
    --plan) plan=1 ;;
    *) flags+=("$flag") ;;
  esac
done

job() { jobs+=("$*"); } # name, script, options
benchmark() {           # name, options: PAH and its controls
  job "$1" pah.py "${@:2}"
  job "$1-finetune" pah.py "${@:2}" --lam 0 --mu 0
  job "$1-lwf" examples/baselines.py lwf "${@:2}"
  job "$1-joint" examples/baselines.py joint "${@:2}"
}
ablations() { # name, options: one thing changed at a time
  for lam in 0.1 0.25 0.5 0.75; do job "$1-lam$lam" pah.py "${@:2}" --lam "$lam"; done
  for mu in 0 0.5 2; do job "$1-mu$mu" pah.py "${@:2}" --mu "$mu"; done
  for size in 5 16 20 30; do job "$1-size$size" pah.py "${@:2}" --proto-size "$size"; done
  job "$1-random" pah.py "${@:2}" --proto-init random
  job "$1-random-mu0" pah.py "${@:2}" --proto-init random --mu 0
  job "$1-sp-updates-all" pah.py "${@:2}" --sp-updates all --mu 0.3
}

if [[ $quick ]]; then
  folder=runs/quick seeds=(0 1)
  benchmark synthetic-5 --dataset synthetic --tasks 5 --width 8 --epochs 8
  ablations synthetic-5 --dataset synthetic --tasks 5 --width 8 --epochs 8
else
  folder=runs seeds=(0 1 2)
  benchmark cifar100-10 --dataset cifar100
  ablations cifar100-10 --dataset cifar100
  benchmark cifar100-50 --dataset cifar100 --tasks 50
  job cifar100-50-sp-updates-all pah.py --dataset cifar100 --tasks 50 --sp-updates all --mu 0.3
  benchmark tinyimagenet-10 --dataset tinyimagenet
  benchmark tinyimagenet-20 --dataset tinyimagenet --tasks 20
fi

gpus=$("$python" -c 'import torch; print(torch.cuda.device_count())')
workers=${WORKERS:-$((gpus ? gpus : quick ? 2 : 1))}
if ((gpus)); then
  IFS=, read -ra gpu <<<"${CUDA_VISIBLE_DEVICES:-$(seq -s, 0 $((gpus - 1)))}"
else
  export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((($(nproc) + workers - 1) / workers))}
fi

seconds=0 name='' each=0
for job in "${jobs[@]}"; do
  read -ra words <<<"$job"
  if [[ ! $name || $job != "$name"-* ]]; then # a new benchmark: measure it
    name=${words[0]}
    each=$("$python" examples/bench.py "${words[@]:2}" "${flags[@]}" | sed -n 's/^predicted.* \([0-9]*\) s$/\1/p')
    echo "$name: predicted $((each / 60)) min per seed"
  fi
  seconds=$((seconds + each * ${#seeds[@]}))
done
printf '%d settings, %d seeds, %d at a time: at most %d h %02d min in all\n' ${#jobs[@]} ${#seeds[@]} "$workers" \
  $((seconds / workers / 3600)) $((seconds / workers / 60 % 60))
if [[ $plan ]]; then exit; fi

worker() { # number: takes every n-th job; fails if one of them did
  local i words log failed=0
  for ((i = $1; i < ${#jobs[@]}; i += workers)); do
    read -ra words <<<"${jobs[i]}"
    log=$folder/${words[0]}.log
    if ((gpus)); then export CUDA_VISIBLE_DEVICES=${gpu[$1 % gpus]}; fi
    if "$python" "${words[@]:1}" --seeds "${seeds[@]}" --out "$folder/${words[0]}" --resume "${flags[@]}" \
      >"$log" 2>&1; then
      echo "$((i + 1))/${#jobs[@]}  ${words[0]}:  $(tail -n 1 "$log")"
    else
      echo "$((i + 1))/${#jobs[@]}  ${words[0]} failed: $(tail -n 1 "$log")"
      failed=1
    fi
  done
  return $failed
}

mkdir -p "$folder"
trap 'trap "" TERM; kill 0; wait; echo "stopped; the same command goes on"; exit 130' INT TERM
pids=() status=0
for ((w = 0; w < workers; w++)); do
  worker "$w" &
  pids+=($!)
done
for pid in "${pids[@]}"; do wait "$pid" || status=1; done
"$python" examples/report.py "$folder"
exit $status
