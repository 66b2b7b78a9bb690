"""Methods of Avalanche 0.6.0 in the setting of examples/baselines.py, for the table in results.md.

    pip install torch torchvision avalanche-lib==0.6.0    # in an environment of their own
    python assets/avalanche/theirs.py lwf --strength 4 --tasks 5 --epochs 3 --lr 0.03 ...

The data, their order of classes, backbone, heads, augmentation, learning rates over time, AA and FM
are those of pah.py; the loop, SGD's gradients and the method are Avalanche's. All options are those
of pah.py, but --strength, which is Avalanche's: alpha of LwF and DER++, lambda of EWC and SI.
"""

import json
import sys
import time
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))
warnings.filterwarnings("ignore")

import baselines
import torch
from avalanche.benchmarks import (
    benchmark_from_datasets,
    with_classes_timeline,
    with_task_labels,
)
from avalanche.benchmarks.utils import _make_taskaware_classification_dataset
from avalanche.models import MultiTaskModule
from avalanche.training.plugins import EvaluationPlugin, SupervisedPlugin
from avalanche.training.supervised import EWC, LwF, SynapticIntelligence
from avalanche.training.supervised.der import DER
from baselines import pah
from torch.utils.data import TensorDataset

METHODS = ("lwf", "ewc", "si", "derpp")


class MultiHead(MultiTaskModule):
    """The model of examples/baselines.py under Avalanche's calls."""

    def __init__(self, args, tasks):
        super().__init__()
        self.model = baselines.MultiHead(args, tasks)
        self.model.present.fill_(True)
        self.task = 0

    def forward(self, images, task_labels="current"):
        features = self.model.features(images)
        heads = self.model.stored_heads
        if task_labels is None:  # LwF asks for all tasks
            return {task: features @ head.T for task, head in enumerate(heads)}
        if isinstance(task_labels, str):  # DER++ asks for none when it stores logits
            return features @ heads[self.task].T
        return torch.einsum("bd,bcd->bc", features, heads[task_labels])


class Recipe(SupervisedPlugin):
    """The optimizer, learning rates and augmentation of pah.py."""

    def __init__(self, args, seed):
        super().__init__()
        self.args, self.seed = args, seed

    def before_training_exp(self, strategy, **kwargs):
        args, task = self.args, strategy.clock.train_exp_counter
        strategy.model.task = task
        torch.manual_seed(1_000_003 * (self.seed + 1) + task)
        weights = strategy.model.parameters()
        strategy.optimizer = torch.optim.SGD(weights, args.lr, 0.9, weight_decay=args.weight_decay)
        steps = len(strategy.experience.dataset) // args.batch_size * args.epochs
        self.schedule = pah.one_cycle(strategy.optimizer, steps)

    def before_forward(self, strategy, **kwargs):
        strategy.mbatch[0] = pah.augment(strategy.mbatch[0])

    def after_training_iteration(self, strategy, **kwargs):
        self.schedule.step()


class AugmentedDER(DER):
    """DER++ whose stored images are augmented, too: plugins come before replay."""

    def _before_forward(self, **kwargs):
        new = len(self.mbatch[0])
        super()._before_forward(**kwargs)
        replayed = len(self.mbatch[0]) - new
        if replayed > 0:
            stored = pah.augment(self.mbatch[0][:replayed])
            self.mbatch[0] = torch.cat([stored, self.mbatch[0][replayed:]])


def make_stream(tasks):
    stream = []
    for k, task in enumerate(tasks):
        # not sorted by class, as EWC squares the mean gradient of images that follow each other
        order = torch.randperm(len(task.train_labels))
        labels = task.train_labels[order]
        data = TensorDataset(pah.normalise(task.train_images[order]), labels)
        data.targets = labels.tolist()
        stream.append(_make_taskaware_classification_dataset(data, task_labels=k))
    return stream


def make_strategy(args, seed, tasks):
    model = MultiHead(args, tasks)
    common = {
        "model": model,
        "optimizer": torch.optim.SGD(model.parameters(), args.lr),  # Recipe makes a new one
        "criterion": torch.nn.CrossEntropyLoss(),
        "train_mb_size": args.batch_size,
        "train_epochs": args.epochs,
        "plugins": [Recipe(args, seed)],
        "evaluator": EvaluationPlugin(loggers=[]),
    }
    if args.method == "lwf":
        return LwF(alpha=args.strength, temperature=args.temperature, **common)
    if args.method == "ewc":
        return EWC(ewc_lambda=args.strength, **common)
    if args.method == "si":
        return SynapticIntelligence(si_lambda=args.strength, eps=0.1, **common)
    return AugmentedDER(mem_size=200, alpha=args.strength, beta=0.5, **common)


class Evaluated:
    """What pah.evaluate asks for: logits (B, n, C)."""

    def __init__(self, model):
        self.model = model
        self.parameters, self.train, self.eval = model.parameters, model.train, model.eval
        self.training = model.training

    def __call__(self, images, n):
        return torch.stack(list(self.model(images, None).values()), 1)[:, :n]


def main():
    parser = pah.make_parser()
    parser.add_argument("method", choices=METHODS)
    parser.add_argument("--strength", type=float, required=True)
    args = pah.parse_args(None, parser)
    pah.set_up("cpu")
    for seed in args.seeds:
        tasks = pah.load_tasks(args, seed)
        torch.manual_seed(seed)
        strategy = make_strategy(args, seed, tasks)
        train = make_stream(tasks)
        benchmark = benchmark_from_datasets(train=train)
        benchmark = with_task_labels(with_classes_timeline(benchmark))
        R, start = [], time.time()
        for k, experience in enumerate(benchmark.train_stream):
            strategy.train(experience, drop_last=True)
            R.append(pah.evaluate(Evaluated(strategy.model), tasks[: k + 1])[0])
            print(k + 1, [round(accuracy, 2) for accuracy in R[-1]], flush=True)
        folder = Path(args.out) / f"seed{seed}"
        folder.mkdir(parents=True, exist_ok=True)
        result = {"method": args.method, "strength": args.strength, "seed": seed, "accuracy": R}
        result |= {"options": sys.argv[1:], "metrics": pah.metrics(R)}
        result |= {"seconds": round(time.time() - start)}
        (folder / "avalanche.json").write_text(json.dumps(result, indent=1))
        print(json.dumps(result["metrics"]), result["seconds"], "s")


if __name__ == "__main__":
    main()
