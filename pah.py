# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.5", "torchvision>=0.20", "numpy>=1.26"]
# ///
"""Prototype-Augmented Hypernetworks (PAH) for continual learning, arXiv 2505.07450, in one file.

    python pah.py                                     # Split-CIFAR100, 10 tasks, for a GPU
    python pah.py --dataset tinyimagenet --tasks 20
    python pah.py --dataset path/to/folder            # train/ and val/, one sub-folder per class
    python pah.py --dataset synthetic --tasks 5 --width 16 --epochs 8    # no download

No classifier head is stored: a hypernetwork generates the head of a task from small learnable
images, the prototypes of its classes. Two of the three losses keep old tasks working without old
data.

The first half of this file is the method, to be copied: images, model, losses, metrics, backbone,
optimizers, training. The second half is the experiment: files, data, command line, one run.
Functions use what is defined above them; only the losses follow the model that calls them.
"""

import argparse
import contextlib
import copy
import ctypes
import json
import math
import os
import sys
import tempfile
import time
from collections import Counter, namedtuple
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import OneCycleLR

# ImageNet's mean and standard deviation, so that no statistics come from later tasks
MEAN = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
STD = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
ABSENT = -1e4  # the logit of a class that a task does not have
RANK = int(os.environ.get("RANK", "0"))  # number of this process, set by torchrun
WORLD = int(os.environ.get("WORLD_SIZE", "1"))  # how many processes there are


class UserError(ValueError):
    """An error that the user can fix; the command line prints it as one line."""


def require(condition, message):
    """Raise UserError with `message` unless `condition` holds."""
    if not condition:
        raise UserError(message)


@contextlib.contextmanager
def user_error(message):
    """Re-raise any exception in the block as a UserError that reads `message (reason)`."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # torch and Pillow raise many kinds for a damaged file
        reason = str(error).partition("\n")[0].partition(". ")[0] or type(error).__name__
        raise UserError(f"{message} ({reason})") from error


# -----------------------------------------------------------------------------
# Images

# uint8 images (N, 3, S, S), labels (N,) from 0 and the names of the classes: of one task, where
# labels count its own classes, or of a whole data set
Task = namedtuple(
    "Task", "train_images train_labels test_images test_labels classes", defaults=[()]
)


def check_arrays(images, labels, classes, part, of_task=""):
    """Raise UserError unless images and labels have the format of a Task with so many classes."""
    with user_error(f"the {part} images and labels{of_task} must be arrays"):
        images, labels = torch.as_tensor(images), torch.as_tensor(labels)
    side = images.shape[-1]
    found = f"not {images.dtype} of shape {tuple(images.shape)}"
    require(
        images.dtype == torch.uint8 and images.shape[1:] == (3, side, side) and len(images),
        f"the {part} images{of_task} must be uint8 of shape (N > 0, 3, S, S), {found}",
    )
    found = f"not {labels.dtype} of shape {tuple(labels.shape)}"
    require(
        labels.shape == images.shape[:1] and not labels.is_floating_point(),
        f"the {part} labels{of_task} must be {len(images)} integers, one per image, {found}",
    )
    lowest, highest = labels.long().aminmax()
    require(
        lowest >= 0 and highest < classes,
        f"the {part} labels{of_task} must be 0 to {classes - 1}, not {lowest} to {highest}",
    )


def normalise(images):
    """uint8 images (..., 3, H, W) -> float32 of about zero mean and unit variance.

    Raises UserError for any other type: floats between 0 and 1 would train to chance level.
    """
    images = torch.as_tensor(images)
    require(images.dtype == torch.uint8, f"images must be uint8, 0 to 255, not {images.dtype}")
    mean = MEAN.to(images.device, non_blocking=True)
    std = STD.to(images.device, non_blocking=True)
    return (images.float() / 255 - mean) / std


def augment(images, flip=True):
    """A random crop of each image (B, C, S, S), after reflection-padding by an eighth of its side.

    Half of them are mirrored if `flip`. Runs on the images' device without waiting for it.
    """
    b, _, _, size = images.shape
    device = images.device
    pad = size // 8
    top, left = torch.randint(2 * pad + 1, (2, b, 1), device=device)
    pixels = torch.arange(size, device=device)
    rows, columns = top + pixels, left + pixels  # (B, S), in the padded image
    if flip:
        mirrored = torch.rand(b, 1, device=device) < 0.5
        columns = torch.where(mirrored, columns.flip(1), columns)
    padded = F.pad(images, (pad, pad, pad, pad), mode="reflect").permute(0, 2, 3, 1)
    index = torch.arange(b, device=device)[:, None, None]
    return padded[index, rows[:, :, None], columns[:, None]].permute(0, 3, 1, 2)


# -----------------------------------------------------------------------------
# Model: prototypes -> task embedding -> hypernetwork -> head


class Hypernetwork(nn.Module):
    """H of Eq. 2: task embeddings (n, E) -> heads (n, C, D)."""

    def __init__(self, embedding, classes, dim, hidden=64):
        super().__init__()
        self.shape = (classes, dim)
        # tanh, not ReLU: the hidden vectors of different tasks start out nearly orthogonal
        self.layers = nn.Sequential(
            nn.Linear(embedding, hidden),
            nn.Tanh(),
            nn.Linear(hidden, hidden),
            nn.Tanh(),
            nn.Linear(hidden, classes * dim),
        )
        # heads start at the scale of nn.Linear's weights; 0.4 is the mean of tanh squared
        variances = (2 / embedding, 2 / hidden, 1 / (3 * dim * 0.4 * hidden))
        for layer, variance in zip(self.layers[::2], variances, strict=True):
            nn.init.normal_(layer.weight, std=math.sqrt(variance))
            nn.init.zeros_(layer.bias)

    def forward(self, embedding):
        return self.layers(embedding).unflatten(-1, self.shape)


@torch.no_grad()
def feature_dim(backbone, size):
    """D of a backbone, found by passing one grey image as small as a prototype, as L_sp does."""
    device = next(backbone.parameters(), torch.empty(0)).device
    with user_error("the backbone cannot be copied, which the teacher requires"):
        backbone = copy.deepcopy(backbone).eval()
    with user_error(
        f"the backbone fails on 3 x {size} x {size} values, the size of a prototype; "
        "if that is too small, give PAH a larger proto_size, for example the size of the images"
    ):
        features = backbone(torch.zeros(1, 3, size, size, device=device))
    shape = tuple(getattr(features, "shape", [type(features).__name__]))
    require(len(shape) == 2, f"the backbone must return (batch, D), not {shape}")
    return shape[1]


class PAH(nn.Module):
    """A backbone, a hypernetwork and the prototypes of all K tasks (K, C, 3, s, s).

    `backbone` maps images (B, 3, H, W) to features (B, D) and runs in `dtype`; heads, logits and
    losses are float32. `classes` is C, the classes of the largest task: `present` (K, C) says
    which of them a task has. `lam`, `mu` and `temperature` belong to the losses; `proto_init` is
    "semantic", training images, or "random", noise. Parts of the backbone that are frozen, with no
    trainable parameter, stay in eval mode, so that BatchNorm keeps its running statistics.
    """

    def __init__(
        self,
        backbone,
        num_tasks,
        classes,
        *,
        proto_size=10,
        proto_init="semantic",
        hidden=64,
        lam=1.0,
        mu=1.0,
        temperature=2.0,
        dtype=torch.float32,
    ):
        super().__init__()
        known = proto_init in ("semantic", "random")
        require(known, f"proto_init is semantic or random, not {proto_init}")
        self.backbone, self.dtype = backbone, dtype
        self.prototypes = nn.Parameter(torch.zeros(num_tasks, classes, 3, proto_size, proto_size))
        self.register_buffer("present", torch.zeros(num_tasks, classes, dtype=torch.bool))
        dim = feature_dim(backbone, proto_size)
        self.hypernetwork = Hypernetwork(classes * 3 * proto_size**2, classes, dim, hidden)
        self.lam, self.mu, self.temperature = lam, mu, temperature
        self.proto_init = proto_init
        self.limits = num_tasks, classes  # `learn` refuses more

    def train(self, mode=True):
        super().train(mode)
        for module in self.backbone.modules():
            learns = [p.requires_grad for p in module.parameters()]
            if learns and not any(learns):
                module.eval()
        return self

    @torch.no_grad()
    def begin_task(self, task, images, labels):
        """Start each prototype of `task` as a random image of its class, resized, or as noise.

        `images` (N, 3, H, W) are uint8; `labels` (N,) are 0 to C-1.
        """
        prototypes = torch.randn_like(self.prototypes[task])
        for c in labels.unique().tolist():
            if self.proto_init == "semantic":
                rows = torch.nonzero(labels == c).flatten()
                image = normalise(images[rows[torch.randint(len(rows), (1,))]])
                size = prototypes.shape[2:]
                prototypes[c] = F.interpolate(image, size, mode="bilinear", antialias=True)[0]
            self.prototypes[task, c] = prototypes[c]
            self.present[task, c] = True

    def features(self, images):
        """Features (B, D), float32, of normalised images (B, 3, H, W)."""
        half = self.dtype != torch.float32
        with torch.autocast(images.device.type, self.dtype, enabled=half):
            return self.backbone(images).float()

    def heads(self, n):
        """The heads (n, C, D) of the first n tasks, generated now."""
        prototypes = self.prototypes[:n] * self.present[:n, :, None, None, None]
        embeddings = prototypes.flatten(1)  # Eq. 3
        return self.hypernetwork(embeddings)  # Eq. 2

    def forward(self, images, n):
        """Logits (B, n, C) of normalised images with the heads of the first n tasks."""
        logits = torch.einsum("bd,ncd->bnc", self.features(images), self.heads(n))  # Eq. 1
        return logits.masked_fill(~self.present[:n], ABSENT)

    def prototype_logits(self, prototypes):
        """Logits (n, C, C) of prototypes (n, C, 3, s, s) as images, with their tasks' heads."""
        n = len(prototypes)
        features = self.features(prototypes.flatten(0, 1)).unflatten(0, (n, -1))
        logits = features @ self.heads(n).mT
        return logits.masked_fill(~self.present[:n, None], ABSENT)

    def losses(self, images, labels, task, teacher):
        """The weighted terms of L = L_hm + lam L_sm + mu L_sp, by name, on a batch of `task`.

        `images` are normalised (B, 3, H, W), `labels` are (B,). `teacher` is a frozen copy of
        the model from before this task, None in the first one.
        """
        logits = self(images, task + 1)
        terms = {"hm": F.cross_entropy(logits[:, task], labels)}  # Eq. 4
        if teacher is not None and self.lam:
            soft_main = soft_loss_main(logits[:, :task], teacher, images, self.temperature)
            terms["sm"] = self.lam * soft_main
        if teacher is not None and self.mu:
            terms["sp"] = self.mu * soft_loss_prototypes(self, teacher, task)
        return terms


# -----------------------------------------------------------------------------
# Losses


def distillation(new, old, temperature=2.0):
    """KL(old || new) between softened logits (..., C), times T^2 (Hinton et al. 2015): (...,)."""
    new = F.log_softmax(new / temperature, dim=-1)
    old = F.log_softmax(old / temperature, dim=-1)
    return temperature**2 * F.kl_div(new, old, reduction="none", log_target=True).sum(-1)


def soft_loss_main(logits, teacher, images, temperature=2.0):
    """L_sm (Eq. 5) on a batch of images: mean over the batch, sum over the n earlier tasks.

    `logits` (B, n, C) are the student's, with the heads of the earlier tasks.
    """
    with torch.no_grad():
        old = teacher(images, logits.shape[1])
    return distillation(logits, old, temperature).mean(0).sum()


@contextlib.contextmanager
def in_eval_mode(model, constants=()):
    """Eval mode, with gradients off for the trainable parameters `constants`; restores both."""
    training = {module: module.training for module in model.modules()}
    try:
        model.eval()
        for p in constants:
            p.requires_grad_(False)
        yield
    finally:  # also after Ctrl-C
        for p in constants:
            p.requires_grad_(True)
        for module, mode in training.items():
            module.training = mode


def soft_loss_prototypes(model, teacher, task):
    """L_sp (Eq. 6) on the prototypes of tasks before `task`: mean in each task, sum over tasks.

    BatchNorm uses its running statistics and leaves them alone. The gradient reaches the
    prototypes only; for the teacher they are constants.
    """
    prototypes = model.prototypes[:task]
    with torch.no_grad():
        old = teacher.prototype_logits(prototypes)
    weights = [p for p in model.parameters() if p.requires_grad and p is not model.prototypes]
    with in_eval_mode(model, constants=weights):
        new = model.prototype_logits(prototypes)
    present = model.present[:task].float()
    scale = present / present.mean(1, keepdim=True)  # 1 where a task has all C classes
    return (scale * distillation(new, old, model.temperature)).mean() * task


# -----------------------------------------------------------------------------
# Metrics: R[k][j] is the accuracy in percent on task j after task k


def average_accuracy(R):
    """AA: mean of the last row."""
    return sum(R[-1]) / len(R[-1])


def forgetting(R):
    """FM: mean over earlier tasks of (best accuracy before the last task - now) (Chaudhry 2018)."""
    last = len(R) - 1
    drops = [max(R[k][j] for k in range(j, last)) - R[last][j] for j in range(last)]
    return sum(drops) / max(1, last)


def metrics(R):
    """AA, FM, BWT and LA by name; only AA for joint training, whose R has only the last row."""
    if len(R[0]) != 1:
        return {"AA": average_accuracy(R), "FM": None, "BWT": None, "LA": None}
    learned = [row[-1] for row in R]
    return {
        "AA": average_accuracy(R),
        "FM": forgetting(R),
        # backward transfer (Lopez-Paz and Ranzato 2017)
        "BWT": (sum(R[-1]) - sum(learned)) / max(1, len(R) - 1),
        "LA": sum(learned) / len(R),  # accuracy on a task just after it was learned
    }


@torch.no_grad()
def evaluate(model, tasks, batch_size=256):
    """A row of R: accuracies in percent on the test images of `tasks`, all tasks so far.

    Also returns the class-incremental accuracy: the mean over tasks without task labels, where
    the largest logit of all heads decides.
    """
    device = next(model.parameters()).device
    _, classes = getattr(model, "limits", (math.inf, math.inf))
    row, class_incremental = [], []
    for k, task in enumerate(tasks):
        check_arrays(task.test_images, task.test_labels, classes, "test", f" of task {k + 1}")
        labels = torch.as_tensor(task.test_labels).to(device).long()
        batches = torch.as_tensor(task.test_images).split(batch_size)
        with in_eval_mode(model):
            logits = torch.cat([model(normalise(x.to(device)), len(tasks)) for x in batches])
        right = logits[:, k].argmax(1) == labels
        right_among_all = logits.flatten(1).argmax(1) == labels + k * logits.shape[2]
        row.append(100 * right.double().mean().item())
        class_incremental.append(100 * right_among_all.double().mean().item())
    return row, sum(class_incremental) / len(tasks)


# -----------------------------------------------------------------------------
# Backbone


class BasicBlock(nn.Module):
    def __init__(self, inputs, outputs, stride=1):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Identity()
        if stride > 1:  # pooled, as in ResNet-D (He et al. 2019)
            self.shortcut = nn.Sequential(
                nn.AvgPool2d(stride, ceil_mode=True),
                nn.Conv2d(inputs, outputs, 1, bias=False),
                nn.BatchNorm2d(outputs),
            )

    def forward(self, x):
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        y = self.bn2(self.conv2(y))
        return F.relu(y + self.shortcut(x), inplace=True)


class ResNet18(nn.Module):
    """ResNet-18 for small images, without classifier: (B, 3, H, W) -> (B, D = 8 * width)."""

    def __init__(self, width=64):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
            nn.Sequential(BasicBlock(width, width), BasicBlock(width, width)),
            nn.Sequential(BasicBlock(width, 2 * width, 2), BasicBlock(2 * width, 2 * width)),
            nn.Sequential(BasicBlock(2 * width, 4 * width, 2), BasicBlock(4 * width, 4 * width)),
            nn.Sequential(BasicBlock(4 * width, 8 * width, 2), BasicBlock(8 * width, 8 * width)),
        )
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        if width % 8 == 0:  # oneDNN's channels-last kernels corrupt memory at other widths
            self.to(memory_format=torch.channels_last)

    def forward(self, x):
        return self.layers(x).mean((2, 3))


# -----------------------------------------------------------------------------
# Optimizers


def orthogonalised(x):
    """About U V^T of a matrix U S V^T, by three Newton-Schulz steps (Jordan et al. 2024)."""
    if x.shape[0] > x.shape[1]:
        return orthogonalised(x.mT).mT
    a, b, c = 3.4445, -4.7750, 2.0315
    x = x / (x.norm() + 1e-7)
    for _ in range(3):
        gram = x @ x.mT
        polynomial = torch.addmm(gram, gram, gram, beta=b, alpha=c)  # b gram + c gram^2
        x = torch.addmm(x, polynomial, x, beta=a)  # a x + polynomial x
    return x


class Muon(torch.optim.Optimizer):
    """Moves filters, as matrices (outputs, the rest), along their orthogonalised Nesterov momentum.

    Filters take turns: at each step a fifth of them moves, five times as far. Momentum averaged
    over twenty steps barely changes direction in five, and orthogonalising, which runs in `dtype`,
    is the expensive part.
    """

    turns = 5

    def __init__(self, filters, lr, weight_decay, dtype=torch.float32):
        super().__init__([{"params": filters}], {"lr": lr, "weight_decay": weight_decay})
        self.dtype, self.steps = dtype, 0
        for p in filters:
            self.state[p]["momentum"] = torch.zeros_like(p)

    @torch.no_grad()
    def step(self):
        group = self.param_groups[0]
        lr = self.turns * group["lr"]
        learning = [p for p in group["params"] if p.grad is not None]
        for i, p in enumerate(learning):
            momentum = self.state[p]["momentum"].lerp_(p.grad, 0.05)
            if i % self.turns == self.steps % self.turns:
                nesterov = p.grad.lerp(momentum, 0.95).flatten(1)
                update = orthogonalised(nesterov.to(self.dtype))
                scale = max(1, update.shape[0] / update.shape[1]) ** 0.5
                p.mul_(1 - lr * group["weight_decay"])
                p.add_(update.view_as(p), alpha=-lr * scale)
        self.steps += 1


def make_optimizers(model, lr, hyper_lr, proto_lr, weight_decay, dtype=torch.float32):
    """Muon for the filters of `model.backbone`, AdamW for everything else that learns.

    Filters learn at lr, `model.hypernetwork` and `model.prototypes` at their own rates, everything
    else at lr / 10. BatchNorm, biases of the backbone and prototypes do not decay.
    """
    parts = {"filters": [], "vectors": [], "hypernetwork": [], "prototypes": [], "others": []}
    for name, p in model.named_parameters():
        part = name.split(".")[0]
        if part == "backbone":
            part = "filters" if p.ndim > 1 and len(p) > 1 else "vectors"  # (1, ...): a token
        elif part not in ("hypernetwork", "prototypes"):
            part = "others"
        if p.requires_grad:
            parts[part].append(p)
    groups = [
        {"params": parts["hypernetwork"], "lr": hyper_lr, "weight_decay": weight_decay},
        {"params": parts["prototypes"], "lr": proto_lr, "weight_decay": 0},
        {"params": parts["vectors"], "lr": lr / 10, "weight_decay": 0},
        {"params": parts["others"], "lr": lr / 10, "weight_decay": weight_decay},
    ]
    optimizers = [torch.optim.AdamW(groups, fused=True)]
    if parts["filters"]:
        dtype = dtype if dtype == torch.bfloat16 else torch.float32
        optimizers.append(Muon(parts["filters"], lr, weight_decay, dtype))
    return optimizers


# -----------------------------------------------------------------------------
# Training


def check_tasks(model, tasks):
    """Raise UserError for what would fail after hours of training, or give a wrong AA."""
    num_tasks, classes = getattr(model, "limits", (math.inf, math.inf))
    require(len(tasks) <= num_tasks, f"{len(tasks)} tasks, but the model was made for {num_tasks}")
    for k, task in enumerate(tasks, start=1):
        check_arrays(task.train_images, task.train_labels, classes, "training", f" of task {k}")
        check_arrays(task.test_images, task.test_labels, classes, "test", f" of task {k}")
        same = task.train_images.shape[1:] == task.test_images.shape[1:]
        require(same, f"training and test images of task {k} differ in size")
        trained, tested = torch.as_tensor(task.train_labels), torch.as_tensor(task.test_labels)
        unseen = set(tested.tolist()) - set(trained.tolist())
        require(not unseen, f"task {k} has test images but no training images of classes {unseen}")


class Losses(nn.Module):
    """The losses of a model as a forward pass, which is what DistributedDataParallel wraps."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, *batch):
        return self.model.losses(*batch)


def print_progress(where, terms, done, todo, seconds):
    """One line of 79 columns, rewritten in place on a terminal; `done` and `todo` count images."""
    losses = " ".join(f"{name} {loss.item():.3f}" for name, loss in terms.items())
    left = timedelta(seconds=round(seconds * (todo / done - 1)))
    line = f"{where}  {losses}  {done / seconds:,.0f} img/s  {left} left"
    print(f"{line:79.79}", end="\r" if sys.stdout.isatty() else "\n", flush=True)


def learn(
    model,
    tasks,
    *,
    epochs=30,
    batch_size=64,
    lr=0.02,
    hyper_lr=1e-4,
    proto_lr=2e-4,
    weight_decay=0.005,
    augmentation=augment,
    make_optimizers=make_optimizers,
    compile=False,
    seed=0,
    R=(),
    after_task=None,
):
    """The protocol: learn `tasks`, a list of Task, one after the other. Returns R.

    Call it once with all tasks: `learn(model, [task])` for each of them would start at task 0 each
    time. `model` is a PAH or another module with begin_task, losses and forward like it. By default
    Muon trains the filters of its `backbone`; with a `dtype` of float16 losses are scaled. Where it
    has them, after_step(task, images, labels) is called after each step with the batch before
    augmentation, and end_task(task, images, labels) after each task with all of its images;
    `limits` is the largest number of tasks and of classes per task.

    `R` holds the rows of tasks that were learned before; after_task(R, class_incremental, seconds)
    is called after each task. `seed` seeds torch's generators before each task. The model is left
    in eval mode. Raises UserError for arrays that cannot be right.
    """
    check_tasks(model, tasks)
    require(
        WORLD == 1 or dist.is_initialized(),
        f"{WORLD} processes without a process group: call pah.set_up(device) first",
    )
    device = next(model.parameters()).device
    dtype = getattr(model, "dtype", torch.float32)
    interval = 2 if sys.stdout.isatty() else 30  # seconds between two lines of progress
    if compile:
        model.backbone.compile()
    if hasattr(model, "present") and model.present.any() and not R:
        print("this model was trained before; a fresh run needs a new one", file=sys.stderr)
    R = list(R)
    for k in range(len(R), len(tasks)):
        start = printed = time.perf_counter()
        torch.manual_seed(1_000_003 * (seed + 1) + k)  # so that a resumed run is the same run
        images = torch.as_tensor(tasks[k].train_images).to(device)
        labels = torch.as_tensor(tasks[k].train_labels).to(device).long()

        # the teacher is the model as the earlier tasks left it
        teacher = None
        if k > 0:
            teacher = copy.deepcopy(model).eval().requires_grad_(False)
            if compile:
                teacher.backbone.compile()
        model.begin_task(k, images, labels)
        losses = model.losses
        if WORLD > 1:  # starts from the weights of process 0, and averages gradients
            losses = DistributedDataParallel(Losses(model), find_unused_parameters=True)

        # each task has new optimizers and one cycle of their learning rates
        model.train()
        model.zero_grad()  # of a step that was interrupted
        per_step = min(batch_size, len(images)) // WORLD * WORLD
        steps = len(images) // per_step  # per epoch; the rest of its random order is dropped
        optimizers = make_optimizers(model, lr, hyper_lr, proto_lr, weight_decay, dtype)
        schedules = [
            OneCycleLR(
                optimizer,
                max_lr=[group["lr"] for group in optimizer.param_groups],
                total_steps=epochs * steps + 1,
                cycle_momentum=False,
            )
            for optimizer in optimizers
        ]
        # in fp16 each optimizer skips the steps in which a gradient of its own overflows
        scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)

        done, todo = 0, epochs * sum(len(task.train_labels) for task in tasks[k:])  # images
        for epoch in range(epochs):
            where = f"task {k + 1}/{len(tasks)} epoch {epoch + 1}/{epochs}"
            order = torch.randperm(len(images), device=device)[: steps * per_step]
            for rows in order.split(per_step):
                x, y = images[rows], labels[rows]
                if augmentation is not None:
                    x = augmentation(x)
                # under torchrun each process takes its part of the same batch
                terms = losses(normalise(x[RANK::WORLD]), y[RANK::WORLD], k, teacher)
                scaler.scale(sum(terms.values())).backward()
                for optimizer, schedule in zip(optimizers, schedules, strict=True):
                    scaler.step(optimizer)
                    schedule.step()
                scaler.update()
                model.zero_grad()
                if hasattr(model, "after_step"):
                    model.after_step(k, images[rows], y)
                done += per_step
                if RANK == 0 and time.perf_counter() - printed > interval:
                    printed = time.perf_counter()
                    print_progress(where, terms, done, todo, printed - start)
            # one sum, so that a GPU is synchronised only once; NaN and infinity survive it
            total = sum(value.sum() for value in model.state_dict().values())
            require(
                total.isfinite(), f"NaN weights in {where}: lower --lr, or use --precision fp32"
            )

        if hasattr(model, "end_task"):
            model.end_task(k, images, labels)
        if WORLD > 1:  # on CPUs each process has its own BatchNorm statistics: take process 0's
            for buffer in model.buffers():
                dist.broadcast(buffer, 0)
        row, class_incremental = evaluate(model, tasks[: k + 1], 4 * batch_size)
        R.append(row)
        if after_task is not None:
            after_task(R, class_incremental, time.perf_counter() - start)
    model.eval()
    return R


# -----------------------------------------------------------------------------
# Files


@contextlib.contextmanager
def whole_file(path):
    """Yield a temporary path that becomes `path` at the end, so that it is never half-written."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.pah-writes")
    try:
        with user_error(f"cannot write {path}; is the disk full?"):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def load_file(path, **options):
    """What torch.save wrote to `path`. Raises UserError if it cannot be read."""
    with user_error(f"cannot read {path}; if it is damaged, move it away"):
        return torch.load(path, weights_only=True, **options)


def load_run(path, device="cpu"):
    """What results.json held and the weights, of a checkpoint. Raises UserError."""
    saved = load_file(path, map_location=device)
    with user_error(f"{path} was not written by pah.py"):
        return saved["results"], saved["model"]


def save(out, results, model):
    """Write checkpoint.pt, results.json and prototypes.png to the folder `out`.

    The checkpoint comes first, as the rest may fail. That of PAH holds no head and no full image.
    """
    if RANK > 0:
        return
    with whole_file(out / "checkpoint.pt") as path:
        torch.save({"results": results, "model": model.state_dict()}, path)
    with whole_file(out / "results.json") as path:
        path.write_text(json.dumps(results, indent=1) + "\n")
    if isinstance(model, PAH):
        from torchvision.utils import save_image

        images = model.prototypes.detach().cpu() * STD + MEAN
        images = F.interpolate(images.flatten(0, 1), scale_factor=4)
        with whole_file(out / "prototypes.png") as path:  # a row per task
            save_image(images, path, "PNG", nrow=model.prototypes.shape[1], pad_value=1)


# -----------------------------------------------------------------------------
# Data

PUBLISHED = {  # side in pixels, unpacked folder, name in torchvision
    "cifar10": (32, "cifar-10-batches-py", "CIFAR10"),
    "cifar100": (32, "cifar-100-python", "CIFAR100"),
    "mnist": (28, "MNIST", "MNIST"),
    "fashionmnist": (28, "FashionMNIST", "FashionMNIST"),
    "tinyimagenet": (64, "tiny-imagenet-200", None),
}
TINY_URL = "http://cs231n.stanford.edu/tiny-imagenet-200.zip"
TINY_MD5 = "90528d7ca1a48142e341f4ef8d21d0de"


def synthetic(size=16):
    """20 classes that need no download: smooth patterns, each mixed with another, under noise."""
    generator = torch.Generator().manual_seed(0)

    def patterns(n):
        coarse = torch.randn(n, 3, 5, 5, generator=generator)
        return F.interpolate(coarse, size, mode="bicubic")

    of_class = patterns(20)
    tensors = []
    for per_class in (200, 50):
        labels = torch.arange(20).repeat_interleave(per_class)
        noise = torch.randn(len(labels), 3, size, size, generator=generator)
        images = of_class[labels] + patterns(len(labels)) + 0.5 * noise
        tensors += [(128 + 40 * images).clamp(0, 255).byte(), labels]
    return Task(*tensors, [f"pattern {c}" for c in range(20)])


def read_torchvision(name, root, size, download):
    import torchvision  # here because importing it takes as long as importing torch

    tensors = []
    for train in (True, False):
        dataset = getattr(torchvision.datasets, PUBLISHED[name][2])
        split = dataset(root, train=train, download=download)
        images = torch.as_tensor(split.data)
        if images.ndim == 3:  # grey: three equal channels
            images = images[..., None].expand(-1, -1, -1, 3)
        images = torchvision.transforms.functional.resize(images.permute(0, 3, 1, 2), [size, size])
        tensors += [images, torch.as_tensor(split.targets)]
    return Task(*tensors, split.classes)


def read_images(paths, size):
    """Image files -> one uint8 tensor (N, 3, size, size), the central square of each.

    Photos are rotated as their EXIF data says. Raises UserError, with the path, for files that are
    not images, and for grey ones of more than 8 bits, which Pillow would clip.
    """
    from PIL import Image, ImageOps
    from torchvision import transforms as T

    resize = T.Resize(size, T.InterpolationMode.BICUBIC)
    transform = T.Compose([resize, T.CenterCrop(size), T.PILToTensor()])
    images = torch.empty(len(paths), 3, size, size, dtype=torch.uint8)

    def read(i):
        with user_error(f"cannot read the image {paths[i]}"), Image.open(paths[i]) as image:
            require(
                image.mode[0] not in "IF",
                f"{paths[i]} has more than 8 bits per pixel: convert it first",
            )
            images[i] = transform(ImageOps.exif_transpose(image).convert("RGB"))

    print(f"reading {len(paths):,} images in {os.path.commonpath(paths)}", file=sys.stderr)
    with ThreadPoolExecutor() as pool:  # Pillow decodes outside of Python's lock
        for i, _ in enumerate(pool.map(read, range(len(paths))), start=1):
            if i % 10_000 == 0:
                print(f"{i:,} of {len(paths):,} images", file=sys.stderr)
    return images


def read_tinyimagenet(name, root, size, download):
    """Its val/ is as published, with a list of labels, or sorted into one folder per class."""
    from torchvision.datasets import ImageFolder
    from torchvision.datasets.utils import download_and_extract_archive

    folder = root / "tiny-imagenet-200"
    if download and not folder.exists():
        download_and_extract_archive(TINY_URL, root, md5=TINY_MD5)
    train, val = ImageFolder(folder / "train"), folder / "val"
    listed = {}
    if (val / "val_annotations.txt").exists():
        lines = (val / "val_annotations.txt").read_text().splitlines()
        listed = dict(line.split("\t")[:2] for line in lines)
    test_paths = sorted(val.rglob("*.JPEG"))
    wnids = [listed.get(path.name, path.relative_to(val).parts[0]) for path in test_paths]
    require(
        10 * len(test_paths) == len(train.targets),  # 500 and 50 images per class
        f"{folder} is damaged: {len(train.targets)} images in train/, {len(test_paths)} in val/",
    )
    return Task(
        read_images([path for path, _ in train.samples], size),
        torch.tensor(train.targets),
        read_images(test_paths, size),
        torch.tensor([train.class_to_idx[wnid] for wnid in wnids]),
        train.classes,
    )


def read_folder(folder, size):
    """Any images: train/ and val/ (or test/), with one sub-folder per class in each."""
    from torchvision.datasets import ImageFolder

    test_folder = folder / "val" if (folder / "val").is_dir() else folder / "test"
    with user_error(
        f"cannot read {folder} as a data set: there are synthetic, {', '.join(PUBLISHED)}, and "
        "folders with train/ and val/ (or test/), one sub-folder per class in each"
    ):
        train, test = ImageFolder(folder / "train"), ImageFolder(test_folder)
    differing = sorted(set(train.classes) ^ set(test.classes))
    require(not differing, f"{test_folder} has other classes than train/: {differing[:5]}")
    return Task(
        read_images([path for path, _ in train.samples], size),
        torch.tensor(train.targets),
        read_images([path for path, _ in test.samples], size),
        torch.tensor(test.targets),
        train.classes,
    )


def load_dataset(name, root="data", image_size=None):
    """A whole data set as one Task, with the names of its classes.

    `name` is synthetic, one of PUBLISHED, or a folder with train/ and val/ (or test/) and one
    sub-folder per class in each. Published ones come from `root`, or from the network, and are
    cached there. `image_size` None means their own size, 64 for folders. Raises UserError.
    """
    if name == "synthetic":
        return synthetic(image_size or 16)
    if name not in PUBLISHED:
        return read_folder(Path(name), image_size or 64)
    root = Path(root)
    side, unpacked, _ = PUBLISHED[name]
    size = image_size or side
    cache = root / f"pah-{name}-{size}px.pt"
    if cache.exists():
        return Task(*load_file(cache, mmap=True))
    source = root if (root / unpacked).exists() else root / "pah-downloads"
    read = read_tinyimagenet if name == "tinyimagenet" else read_torchvision
    with user_error(
        f"cannot read {name}: without a network put its unpacked folder {unpacked} into {root}, "
        "or use --dataset synthetic"
    ):
        data = read(name, source, size, download=source != root)
    try:
        with whole_file(cache) as temporary:
            torch.save(list(data), temporary)
    except UserError as error:
        print(f"continuing without a cache: {error}", file=sys.stderr)
    return data


def hold_out(data, fraction):
    """A validation split, always the same, to choose hyper-parameters on.

    This part of each class's training images takes the place of the test images.
    """
    images, labels = torch.as_tensor(data.train_images), torch.as_tensor(data.train_labels)
    generator = torch.Generator().manual_seed(0)
    held = torch.zeros(len(labels), dtype=torch.bool)
    for c in labels.unique():
        rows = torch.nonzero(labels == c).flatten()
        shuffled = rows[torch.randperm(len(rows), generator=generator)]
        held[shuffled[: max(1, round(fraction * len(rows)))]] = True
    return Task(images[~held], labels[~held], images[held], labels[held], data.classes)


def select(images, labels, members):
    """The images of the classes `members` (C,), class after class, and their labels from 0."""
    rows = torch.cat([torch.nonzero(labels == c).flatten() for c in members])
    return images[rows], (labels[rows, None] == members).nonzero()[:, 1]


def split_tasks(data, tasks=10, order=None):
    """Cut a data set into a list of Task, with labels from 0 in each.

    `tasks` is the number of equal tasks (the first takes the remainder) or a list of classes per
    task. `order` lists the numbers of the classes; None: by label. Raises UserError for tasks that
    cannot be made, and for labels that do not number the classes from 0.
    """
    check_arrays(data.train_images, data.train_labels, math.inf, "training")
    check_arrays(data.test_images, data.test_labels, math.inf, "test")
    data = Task(*map(torch.as_tensor, data[:4]), data.classes)
    trained, tested = set(data.train_labels.tolist()), set(data.test_labels.tolist())
    n = len(data.classes) or 1 + max(trained | tested)
    classes = list(data.classes) or [str(c) for c in range(n)]
    wrong = sorted((trained ^ set(range(n))) | (tested - set(range(n))))
    require(
        not wrong,
        f"{n} classes need labels from 0 to {n - 1}, and each of them training images: "
        f"see labels {wrong[:5]}",
    )
    sizes = tasks
    if isinstance(tasks, int):
        each = n // max(1, tasks)
        sizes = [n - each * (tasks - 1)] + [each] * (tasks - 1)
    require(
        sum(sizes) == n and min(sizes) >= 2,
        f"--tasks {tasks}: {n} classes cannot be split this way; a task needs two or more",
    )
    order = list(range(n) if order is None else order)
    for c in range(n):
        times = order.count(c)
        require(times == 1, f"the class order must list {classes[c]} once, not {times} times")
    require(len(order) == n, f"the class order lists {len(order)} classes, but there are {n}")
    split = []
    for members in torch.tensor(order).split(sizes):
        train = select(data.train_images, data.train_labels, members)
        test = select(data.test_images, data.test_labels, members)
        split.append(Task(*train, *test, [classes[c] for c in members]))
    return split


def read_order(path, classes):
    """A file with one class per line, names or numbers -> their numbers."""
    numbers = {str(c): c for c in range(len(classes))} | {name: c for c, name in enumerate(classes)}
    with user_error(f"cannot read --class-order {path}"):
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    names = [line.strip() for line in lines if line.strip()]
    for name in names:
        require(name in numbers, f"--class-order {path}: there is no class {name}")
    return [numbers[name] for name in names]


def load_tasks(args, seed, data=None):
    """The tasks that the options describe; `data`, if given, is what load_dataset returned."""
    data = data or load_dataset(args.dataset, args.data, args.image_size)
    if args.val_fraction:
        data = hold_out(data, args.val_fraction)
    order = None
    if args.shuffle_classes:
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(data.classes), generator=generator).tolist()
    if args.class_order:
        order = read_order(args.class_order, data.classes)
    return split_tasks(data, args.tasks, order)


# -----------------------------------------------------------------------------
# Command line

AUGMENTATIONS = {
    "crop-flip": augment,
    "crop": lambda images: augment(images, flip=False),
    "none": None,
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
MAY_DIFFER = {"out", "data", "seeds", "resume", "device", "compile", "stop_after"}  # at --resume


def make_parser():
    """The parser with all options."""
    parser = argparse.ArgumentParser(
        usage="%(prog)s [options]",
        description=__doc__.splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    # data
    add("--dataset", default="cifar100", help=f"synthetic, {', '.join(PUBLISHED)}, or a folder")
    add("--data", default="data", help="folder of downloads and caches")
    add("--tasks", type=int, nargs="+", default=[10], help="number of tasks, or classes in each")
    add("--image-size", type=int, help="side in pixels; None: as published, 64 for folders")
    either = parser.add_mutually_exclusive_group().add_argument
    either("--shuffle-classes", action="store_true", help="class order by seed, not by label")
    either("--class-order", help="file with one class per line, names or numbers")
    add("--val-fraction", type=float, default=0.0, help="test on this fraction of the training set")
    add("--stop-after", type=int, help="stop after this many tasks")
    # method
    add("--lam", type=float, default=1.0, help="weight of L_sm (Eq. 5)")
    add("--mu", type=float, default=1.0, help="weight of L_sp (Eq. 6)")
    add("--temperature", type=float, default=2.0, help="of both distillations")
    add("--proto-size", type=int, default=10, help="side of a prototype in pixels")
    add("--proto-init", choices=("semantic", "random"), default="semantic", help="images or noise")
    add("--hidden", type=int, default=64, help="width of the hypernetwork")
    add("--stem", choices=("3x3", "7x7"), default="3x3", help="7x7 for large images")
    add("--width", type=int, default=64, help="of the backbone; D is 8 times this")
    add("--pretrained", action="store_true", help="ImageNet weights, with their 7x7 stem")
    # training
    add("--epochs", type=int, default=30, help="per task")
    add("--batch-size", type=int, default=64, help="of all processes together")
    add("--lr", type=float, default=0.02, help="of the backbone")
    add("--hyper-lr", type=float, default=1e-4, help="of the hypernetwork")
    add("--proto-lr", type=float, default=2e-4, help="of the prototypes")
    add("--weight-decay", type=float, default=0.005, help="of filters and hypernetwork")
    add("--augment", choices=AUGMENTATIONS, default="crop-flip", help="for digits use crop")
    add("--seeds", type=int, nargs="+", default=[0], help="one run per seed")
    # machine
    add(
        "--device",
        choices=("cuda", "cpu"),
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="CUDA_VISIBLE_DEVICES picks a GPU",
    )
    add("--precision", choices=DTYPES, help="of the backbone; None: bf16 where it is fast")
    add("--compile", action="store_true", help="torch.compile the backbone")
    add("--out", help="output folder; None: in runs/, named after the options")
    add("--resume", action="store_true", help="continue after the last finished task")
    return parser


def check_options(args):
    """Raise UserError for options that cannot work, or contradict each other."""
    require(
        args.device == "cpu" or torch.cuda.is_available(),
        "--device cuda: torch finds no GPU here; use --device cpu",
    )
    least_values = {"epochs": 1, "batch_size": WORLD, "hidden": 1, "stop_after": 1, "image_size": 1}
    for name, least in least_values.items():
        value, option = getattr(args, name), f"--{name.replace('_', '-')}"
        require(value is None or value >= least, f"{option} must be at least {least}")
    require(
        args.stem == "3x3" or args.width == 64,
        "--stem 7x7 and --pretrained use torchvision's ResNet-18, which has --width 64",
    )
    require(0 <= args.val_fraction < 1, "--val-fraction must be at least 0 and below 1")


def default_out(args, parser):
    """runs/<dataset>-<tasks>-<options that are not the default>"""
    words = [Path(args.dataset).resolve().name, *args.tasks]
    for name, value in vars(args).items():
        named = name not in MAY_DIFFER | {"dataset", "tasks"}
        if named and value != parser.get_default(name):
            words += [name.replace("_", "-"), str(value).replace(os.sep, "-")]
    return "runs/" + "-".join(map(str, words))


def default_precision(device):
    """bf16 where there is hardware for it; else fp16 on a GPU and fp32 on a CPU."""
    if device == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    if hasattr(torch.cpu, "_is_avx512_bf16_supported") and torch.cpu._is_avx512_bf16_supported():
        return "bf16"
    return "fp32"


def parse_args(argv=None, parser=None):
    parser = parser or make_parser()
    args = parser.parse_args(argv)
    if args.pretrained:
        args.stem = "7x7"
    check_options(args)
    if args.dataset not in ("synthetic", *PUBLISHED) and Path(args.dataset).is_dir():
        args.dataset = str(Path(args.dataset).resolve())
    args.out = args.out or default_out(args, parser)
    args.precision = args.precision or default_precision(args.device)
    if len(args.tasks) == 1:
        args.tasks = args.tasks[0]
    return args


# -----------------------------------------------------------------------------
# The experiment


def make_backbone(args):
    """Our ResNet-18, or torchvision's for --stem 7x7."""
    if args.stem == "3x3":
        return ResNet18(args.width)
    from torchvision.models import resnet18

    with user_error("cannot load ImageNet weights: without a network put them into torch's cache"):
        backbone = resnet18(weights="DEFAULT" if args.pretrained else None)
    backbone.fc = nn.Identity()
    return backbone.to(memory_format=torch.channels_last)


def build(args, num_tasks, classes, method=PAH):
    """The PAH, or a class derived from it, that the options describe."""
    return method(
        make_backbone(args),
        num_tasks,
        classes,
        proto_size=args.proto_size,
        proto_init=args.proto_init,
        hidden=args.hidden,
        lam=args.lam,
        mu=args.mu,
        temperature=args.temperature,
        dtype=DTYPES[args.precision],
    )


def load_checkpoint(path, device="cpu", method=PAH):
    """The PAH of a run, in eval mode: model(normalise(images), n) gives logits (B, n, C).

    `method` is its class, if it is one derived from PAH.
    """
    results, weights = load_run(path, device)
    defaults = vars(make_parser().parse_args([]))  # for options added since the run
    args = argparse.Namespace(**defaults | results["args"] | {"pretrained": False})
    model = build(args, *weights["present"].shape, method)
    with user_error(f"{path} is not a run of PAH"):
        model.load_state_dict(weights)
    return model.to(device).eval()


def training_options(args):
    """The options of the command line that `learn` takes."""
    return {
        "epochs": args.epochs,
        "batch_size": args.batch_size,
        "lr": args.lr,
        "hyper_lr": args.hyper_lr,
        "proto_lr": args.proto_lr,
        "weight_decay": args.weight_decay,
        "augmentation": AUGMENTATIONS[args.augment],
        "compile": args.compile,
    }


def check_same_run(out, results, identity, resume):
    """Raise UserError unless the run that left `results` in `out` may be continued."""
    old, new, unset = results["args"], identity["args"], "not an option"
    differing = [
        f"--{name.replace('_', '-')} was {old.get(name, unset)}, is {new.get(name, unset)}"
        for name in old | new
        if name not in MAY_DIFFER and old.get(name, unset) != new.get(name, unset)
    ]
    if results["class_order"] != identity["class_order"]:
        differing.append("another class order")
    require(
        not differing,
        f"{out} holds a different run ({'; '.join(differing)}): use its options, or another --out",
    )
    require(resume, f"{out} already holds this run: add --resume, or choose another --out")


def machine(model):
    """What the model ran on, and its number of parameters."""
    sizes = Counter()
    for name, p in model.named_parameters():
        sizes[name.split(".")[0]] += p.numel()
    cuda = next(model.parameters()).is_cuda
    return {
        "parameters": dict(sizes),
        "stored": getattr(model, "stored", dict)(),  # if the method reports it
        "processes": WORLD,
        "device": torch.cuda.get_device_name() if cuda else f"cpu {torch.get_num_threads()}",
        "peak_memory_bytes": torch.cuda.max_memory_allocated() if cuda else None,
        "versions": {"python": sys.version.split()[0], "torch": str(torch.__version__)},
    }


def describe(results):
    """AA, FM and LA as text, with standard deviations if there are several seeds."""
    words = []
    for name in ("AA", "FM", "LA"):
        values = [result[name] for result in results]
        if None not in values:
            words.append(f"{name} {torch.tensor(values).mean():5.2f}")
        if None not in values and len(values) > 1:
            words.append(f"+- {torch.tensor(values).std():.2f}")
    return "  ".join(words)


def run(args, seed, model, tasks, make_optimizers=make_optimizers, R=()):
    """Learn `tasks` with a checkpoint and results.json in OUT/seed<S> after each of them.

    `R` has the rows that a fresh run starts from. Returns what results.json holds.
    """
    out = Path(args.out) / f"seed{seed}"
    num_tasks = len(tasks[: args.stop_after])
    if WORLD > 1 and args.device == "cuda":
        model.backbone = nn.SyncBatchNorm.convert_sync_batchnorm(model.backbone)
    identity = {"args": vars(args), "class_order": [list(task.classes) for task in tasks]}
    results = {"accuracy": list(R), "class_incremental": [], "seconds": 0.0}
    if (out / "checkpoint.pt").exists():
        results, weights = load_run(out / "checkpoint.pt")
        check_same_run(out, results, identity, args.resume)
        model.load_state_dict(weights)
        save(out, results, model)  # in case it was killed before results.json was written
    elif out.is_dir():
        files = [path for path in out.iterdir() if not path.name.startswith(".")]
        require(not files, f"{out} has files but no checkpoint.pt: choose another --out")
    with user_error(f"cannot write to {out}: choose another --out"):
        out.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=out).close()
    if RANK == 0:
        print(f"{num_tasks} tasks, {args.device}, {args.precision}: {out}")

    def after_task(R, class_incremental, seconds):
        results["class_incremental"].append(class_incremental)
        results["seconds"] += seconds
        results.update(identity, seed=seed, accuracy=R, complete=len(R) == num_tasks)
        results.update(metrics(R) | machine(model))
        save(out, results, model)
        if RANK == 0:
            row = " ".join(f"{accuracy:.0f}" for accuracy in R[-1][-8:])
            spent = timedelta(seconds=round(results["seconds"]))
            line = f"task {len(R):>2}/{num_tasks}  {describe([results])}  {spent} | {row}"
            print(f"{line:79}", flush=True)

    learn(
        model,
        tasks[:num_tasks],
        **training_options(args),
        make_optimizers=make_optimizers,
        seed=seed,
        R=results["accuracy"],
        after_task=after_task,
    )
    return results


def set_up(device):
    """Settings of the whole process. Under torchrun each process gets its own GPU."""
    torch.backends.cudnn.benchmark = True
    if sys.platform == "linux":  # let glibc keep freed memory: a tenth of a step on a CPU
        libc = ctypes.CDLL(None)
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
        libc.mallopt(-4, 0)  # M_MMAP_MAX
    if WORLD > 1 and device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    if WORLD > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if device == "cuda" else "gloo")


def main(argv=None):
    args = parse_args(argv)
    set_up(args.device)
    data = load_dataset(args.dataset, args.data, args.image_size)
    results = []
    for seed in args.seeds:
        tasks = load_tasks(args, seed, data)
        torch.manual_seed(seed)
        model = build(args, len(tasks), max(len(task.classes) for task in tasks)).to(args.device)
        results.append(run(args, seed, model, tasks))
    if RANK == 0:
        print(describe(results))


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"pah.py: {error}")
    except KeyboardInterrupt:
        sys.exit("stopped; --resume continues after the last finished task")
