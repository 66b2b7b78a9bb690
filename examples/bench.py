"""Milliseconds per step at tasks 1, 2, K/2 and K (the last), peak memory, time of a whole run.

    python examples/bench.py --dataset tinyimagenet --tasks 20        # any options of pah.py
    python examples/bench.py lwf --width 16                           # or of baselines.py

The prediction leaves out what a method does at the end of a task. A-GEM and GCR fill their memory
there, so their replay is missing as well.
"""

import contextlib
import io
import sys
import time
from datetime import timedelta

import baselines
import torch
from baselines import pah

WARM_UP, STEPS = 5, 20


def time_step(model, tasks, k, args):
    """Seconds per step of task k, counted from 0; the clock is read after two of the steps."""
    batch_size = min(args.batch_size, len(tasks[k].train_images))
    short = []
    for i, task in enumerate(tasks[: k + 1]):
        rows = torch.randperm(len(task.train_images))[:batch_size].repeat(STEPS)
        images, labels = task.train_images[rows], task.train_labels[rows]
        short.append(pah.Task(images, labels, images[:1], labels[:1]))
        if i < k:
            model.begin_task(i, images.to(args.device), labels.to(args.device))
    after_step = getattr(model, "after_step", None)
    steps, times = 0, []

    def tick(*batch):
        nonlocal steps
        if after_step is not None:
            after_step(*batch)
        steps += 1
        if steps in (WARM_UP, STEPS):
            if args.device == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter())

    model.after_step = tick
    with contextlib.redirect_stdout(io.StringIO()):
        options = pah.training_options(args) | {"epochs": 1, "batch_size": batch_size}
        optimizer = getattr(args, "optimizer", "muon")
        options["make_optimizers"] = baselines.OPTIMIZERS[optimizer]
        pah.learn(model, short, R=[[0.0]] * k, **options)
    return (times[1] - times[0]) / (STEPS - WARM_UP)


def peak_memory(device):
    """Bytes: of the GPU, or of the whole process."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    import resource  # not on Windows

    kilo = 1 if sys.platform == "darwin" else 1024
    return kilo * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def interpolate(k, seconds):
    """Linear between the tasks that were measured."""
    low = max(i for i in seconds if i <= k)
    high = min(i for i in seconds if i >= k)
    share = (k - low) / max(1, high - low)
    return seconds[low] + share * (seconds[high] - seconds[low])


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    of_method = bool(argv) and argv[0] in baselines.METHODS
    args = baselines.parse_args(argv) if of_method else pah.parse_args(argv)
    pah.set_up(args.device)
    tasks = pah.load_tasks(args, seed=0)[: args.stop_after]
    K = len(tasks)
    seconds = {}
    for k in sorted({0, min(1, K - 1), (K - 1) // 2, K - 1}):
        torch.manual_seed(0)
        model = pah.build(args, K, max(len(task.classes) for task in tasks))
        if of_method:
            model = baselines.build(args, tasks)
        seconds[k] = time_step(model.to(args.device), tasks, k, args)
        speed = min(args.batch_size, len(tasks[k].train_images)) / seconds[k]
        print(f"task {k + 1:<4}{1000 * seconds[k]:8.1f} ms per step {speed:9,.0f} images/s")
    whole = 0.0
    for k, task in enumerate(tasks):
        steps = args.epochs * len(task.train_images) / args.batch_size
        steps += (K - k) * len(task.test_images) / args.batch_size / 4  # it is tested K - k times
        whole += steps * interpolate(k, seconds)
    print(f"peak memory: {peak_memory(args.device) / 2**30:.2f} GiB")
    print(f"predicted: {timedelta(seconds=round(whole))} per seed, {whole:.0f} s")


if __name__ == "__main__":
    try:
        main()
    except pah.UserError as error:
        sys.exit(f"bench.py: {error}")
