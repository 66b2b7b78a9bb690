#!/usr/bin/env bash
# All full-size experiments with three seeds, then a table of all runs.
#
#   ./run_all.sh           benchmarks, ablations and other methods
#   ./run_all.sh --quick   two seeds on synthetic data: about nine minutes on two CPU cores
#   ./run_all.sh --plan    only predict how many hours it takes
#
# Further options, such as --data FOLDER, go to every run. Start it again at any time: finished runs
# are skipped, others continue. Several GPUs share the settings, and each writes a log. PYTHON names
# another interpreter.
cd "$(dirname "$0")" || exit 1
python=${PYTHON:-python3} mode=all seeds=(0 1 2)
case $1 in
  --quick | --plan) mode=${1#--} && shift ;;
  -h | --help) sed -n 's/^# //p' "$0" && exit ;;
esac
if [ $mode = quick ]; then seeds=(0 1); fi
more=("$@")
gpus=$("$python" -c 'import torch; print(torch.cuda.device_count())' 2>/dev/null) || {
  echo "run_all.sh: $python has no torch; try PYTHON=.venv/bin/python ./run_all.sh"
  exit 1
}
workers=$((gpus > 1 ? gpus : 1))

run() { # SCRIPT OPTIONS...: one setting with all seeds, if it is this worker's turn
  number=$((number + 1)) total=$((total + ${#seeds[@]} * seconds))
  if [ "$worker" = $((number % workers)) ]; then
    echo "$*"
    "$python" "$@" "${more[@]}" --seeds "${seeds[@]}" --resume || failed=1
  fi
}
benchmark() { # OPTIONS...: PAH, finetuning, LwF and joint training
  if [ "$worker" = plan ]; then # this also downloads the data, once
    predicted=$("$python" examples/bench.py "$@" "${more[@]}") || exit 1
    predicted=${predicted##*$'\n'} # the last line: predicted: 0:01:30 per seed, 90 s
    echo "pah.py $*: $predicted"
    seconds=${predicted##*, } seconds=${seconds% s}
  fi
  run pah.py "$@"
  run pah.py "$@" --lam 0 --mu 0
  for method in lwf joint; do run examples/baselines.py $method "$@"; done
}
variants() { # OPTIONS...: ablations of PAH, and the methods of the paper's table
  for lam in 0.1 0.25 0.5 0.75; do run pah.py "$@" --lam $lam; done
  for mu in 0 0.5 2; do run pah.py "$@" --mu $mu; done
  for size in 5 16 20 30; do run pah.py "$@" --proto-size $size; done
  run pah.py "$@" --proto-init random
  run pah.py "$@" --proto-init random --mu 0
  for method in rehearsal thumbnails rotated rotated-lwf; do
    run examples/baselines.py $method "$@"
  done
  for method in ewc si agem der derfresh derpp gcr cclis pnn hn2 hn3; do
    run examples/baselines.py $method "$@"
  done
}
all() { # WORKER: its number, or plan
  worker=$1 number=0 total=0 failed=0
  if [ $mode = quick ]; then
    benchmark --dataset synthetic --tasks 5 --width 8 --epochs 3
    variants --dataset synthetic --tasks 5 --width 8 --epochs 3
  else
    benchmark --dataset cifar100
    variants --dataset cifar100
    benchmark --dataset cifar100 --tasks 50
    for method in rehearsal thumbnails; do
      run examples/baselines.py $method --dataset cifar100 --tasks 50
    done
    benchmark --dataset tinyimagenet
    benchmark --dataset tinyimagenet --tasks 20
  fi
  return $failed
}

all plan
minutes=$((total / workers / 60))
echo "$number settings, ${#seeds[@]} seeds, $workers at a time: $((minutes / 60)) h $((minutes % 60)) min"
if [ $mode = plan ]; then exit; fi

trap 'trap "" TERM; kill 0; wait; echo "stopped; start it again to continue"; exit 130' INT TERM
mkdir -p runs
status=0 pids=()
if [ $workers = 1 ]; then
  all 0 || status=1
else
  IFS=, read -ra names <<<"${CUDA_VISIBLE_DEVICES:-$(seq -s, 0 $((workers - 1)))}"
  for ((i = 0; i < workers; i++)); do
    CUDA_VISIBLE_DEVICES=${names[i]} all $i >"runs/gpu${names[i]}.log" 2>&1 &
    pids+=($!)
  done
  for pid in "${pids[@]}"; do wait "$pid" || status=1; done
fi
"$python" examples/report.py runs
exit $status
