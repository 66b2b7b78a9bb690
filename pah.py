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
images, the prototypes of its classes. Three losses keep old tasks working without old data.
The first half of this file is the method, to be copied: model, losses, metrics, backbone,
optimizers, training. The second half is the experiment: data, one run, the command line.
"""

import argparse
import contextlib
import copy
import ctypes
import json
import math
import os
import sys
import time
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.optim.lr_scheduler import OneCycleLR

# ImageNet's mean and standard deviation, so that no later task is looked at
MEAN = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
STD = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
ABSENT = -1e4  # the logit of a class that a task does not have
RANK = int(os.environ.get("RANK", "0"))  # number of this process, set by torchrun
WORLD = int(os.environ.get("WORLD_SIZE", "1"))  # how many processes there are


class UserError(ValueError):
    """Something that the user can put right; the command line prints it as one line."""


def normalise(images):
    """uint8 images (..., 3, H, W) -> float32 of about zero mean and unit variance.

    Raises UserError for any other type: floats between 0 and 1 would train to chance.
    """
    if images.dtype != torch.uint8:
        raise UserError(f"images must be uint8, from 0 to 255, not {images.dtype}")
    mean = MEAN.to(images.device, non_blocking=True)
    std = STD.to(images.device, non_blocking=True)
    return (images.float() / 255 - mean) / std


def augment(images, flip=True):
    """A random crop of each image (B, C, S, S), an eighth of its side reflected around it.

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
    image = torch.arange(b, device=device)[:, None, None]
    return padded[image, rows[:, :, None], columns[:, None]].permute(0, 3, 1, 2)


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


class PAH(nn.Module):
    """A backbone, a hypernetwork and the prototypes of all K tasks (K, C, 3, s, s).

    `backbone` maps images (B, 3, H, W) to features (B, D) and runs in `dtype`; heads, logits and
    losses are float32. `classes` is C, the classes of the largest task: `present` (K, C) says
    which of them a task has. `lam`, `mu` and `temperature` belong to the losses; `proto_init` is
    "semantic", training images, or "random", noise.
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
        self.backbone, self.dtype = backbone, dtype
        self.prototypes = nn.Parameter(torch.zeros(num_tasks, classes, 3, proto_size, proto_size))
        self.register_buffer("present", torch.zeros(num_tasks, classes, dtype=torch.bool))
        dim = feature_dim(backbone, proto_size)
        self.hypernetwork = Hypernetwork(classes * 3 * proto_size**2, classes, dim, hidden)
        self.lam, self.mu, self.temperature = lam, mu, temperature
        self.proto_init = proto_init

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


@torch.no_grad()
def feature_dim(backbone, size):
    """D of a backbone, found with one grey image of the prototypes' size, which L_sp needs too."""
    device = next(backbone.parameters(), torch.empty(0)).device
    try:
        features = copy.deepcopy(backbone).eval()(torch.zeros(1, 3, size, size, device=device))
    except Exception as error:
        raise UserError(
            f"the backbone cannot take prototypes of {size}x{size} pixels ({error}): "
            "give PAH a larger proto_size, for example the size of the images"
        ) from error
    if features.ndim != 2:
        raise UserError(f"the backbone must return (batch, D), not {tuple(features.shape)}")
    return features.shape[1]


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


def soft_loss_prototypes(model, teacher, task):
    """L_sp (Eq. 6) on the prototypes of tasks before `task`: mean over a task's, sum over tasks.

    BatchNorm uses its running statistics and leaves them alone. The gradient reaches the
    prototypes only; for the teacher they are constants.
    """
    prototypes = model.prototypes[:task]
    with torch.no_grad():
        old = teacher.prototype_logits(prototypes)
    weights = [p for p in model.parameters() if p.requires_grad and p is not model.prototypes]
    for p in weights:
        p.requires_grad_(False)
    training = model.training
    model.eval()
    new = model.prototype_logits(prototypes)
    model.train(training)
    for p in weights:
        p.requires_grad_(True)
    present = model.present[:task].float()
    share = present / present.mean(1, keepdim=True)  # 1 where a task has all C classes
    return (share * distillation(new, old, model.temperature)).mean() * task


# -----------------------------------------------------------------------------
# Rehearsal: an extension of ours, not in the paper


class Rehearsal(PAH):
    """PAH whose prototypes join the batch in place of old images.

    They are drawn from all earlier tasks, one for every two images of the batch, and resized to the
    images' size. L_sp is L_sm on them: old and new model agree under all earlier heads, and all
    weights learn from it. `augmentation` is like that of `learn`, but of normalised images.
    """

    def __init__(self, *args, augmentation=augment, **options):
        super().__init__(*args, **options)
        self.augmentation = augmentation

    def draw(self, task, n, size):
        """n prototypes of random classes before `task`, as images (n, 3, *size).

        Under torchrun these are n of all processes together, and each gets its share.
        """
        present = self.present[:task].flatten().float()
        drawn = torch.multinomial(present, n, replacement=True)
        prototypes = self.prototypes[:task].flatten(0, 1)[drawn]
        images = F.interpolate(prototypes, size, mode="bilinear", antialias=True)
        if self.augmentation is not None:
            images = self.augmentation(images)
        return images[RANK::WORLD]

    def losses(self, images, labels, task, teacher):
        """The weighted terms by name, as PAH.losses; L_sp comes from the same pass as the rest."""
        if teacher is None or not self.mu:
            return super().losses(images, labels, task, teacher)
        n = len(images)
        drawn = self.draw(task, max(WORLD, n * WORLD // 2), images.shape[2:])
        batch = torch.cat([images, drawn])
        logits = self(batch, task + 1)
        with torch.no_grad():
            old = teacher(batch, task)
        distances = distillation(logits[:, :task], old, self.temperature).sum(1)
        return {
            "hm": F.cross_entropy(logits[:n, task], labels),
            "sm": self.lam * distances[:n].mean(),
            "sp": self.mu * distances[n:].mean(),
        }


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


@torch.no_grad()
def evaluate(model, tasks):
    """A row of R: accuracies in percent on the test images of `tasks`, all tasks so far.

    Also returns the class-incremental accuracy: the mean over tasks without task labels, where
    the largest logit of all heads decides.
    """
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    row, class_incremental = [], []
    for k, task in enumerate(tasks):
        labels = torch.as_tensor(task.test_labels).to(device).long()
        parts = torch.as_tensor(task.test_images).split(500)
        logits = torch.cat([model(normalise(x.to(device)), len(tasks)) for x in parts])
        right = logits[:, k].argmax(1) == labels
        right_among_all = logits.flatten(1).argmax(1) == labels + k * logits.shape[2]
        row.append(100 * right.double().mean().item())
        class_incremental.append(100 * right_among_all.double().mean().item())
    model.train(training)
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

    Filters take turns: at each step a fifth of them moves, five times as far. A momentum of
    twenty steps hardly turns in five, and orthogonalising is what costs time; it runs in `dtype`.
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

    Parameters of `model.hypernetwork` and `model.prototypes` have rates of their own; all others
    learn at lr / 10. BatchNorm, biases of the backbone and prototypes do not decay.
    """
    parts = {"filters": [], "vectors": [], "hypernetwork": [], "prototypes": [], "others": []}
    for name, p in model.named_parameters():
        part = name.split(".")[0]
        if part == "backbone":
            part = "filters" if p.ndim > 1 else "vectors"
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


def one_cycle(optimizer, steps):
    """Each learning rate rises to what it is now, and falls to almost nothing."""
    peaks = [group["lr"] for group in optimizer.param_groups]
    return OneCycleLR(optimizer, peaks, steps + 1, cycle_momentum=False)


def average_gradients(model):
    """Replace each gradient by its mean over all processes, sent as one flat tensor."""
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    means = (flat / WORLD).split([gradient.numel() for gradient in gradients])
    for gradient, mean in zip(gradients, means, strict=True):
        gradient.copy_(mean.view_as(gradient))


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

    `model` is a PAH or another module with begin_task, losses and forward like it. Muon trains
    its `backbone`, unless `make_optimizers` returns others; with a `dtype` of float16 losses are
    scaled. Where it has them, after_step(task, images, labels) is called after each step with the
    batch before augmentation, and end_task(task, images, labels) after each task with all of its
    images. `R` holds the rows of tasks learned before; after_task(R, class_incremental, seconds)
    is called after each task. `seed` seeds torch's generators before each task. The model is left
    in eval mode.
    """
    device = next(model.parameters()).device
    dtype = getattr(model, "dtype", torch.float32)
    live = sys.stdout.isatty()
    if compile:
        model.backbone.compile()
    R = list(R)
    for k in range(len(R), len(tasks)):
        start = time.perf_counter()
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

        # each task has new optimizers and one cycle of their learning rates
        model.train()
        batch = min(batch_size, len(images)) // WORLD * WORLD
        steps = len(images) // batch  # per epoch; the rest of its random order is dropped
        optimizers = make_optimizers(model, lr, hyper_lr, proto_lr, weight_decay, dtype)
        schedules = [one_cycle(optimizer, epochs * steps) for optimizer in optimizers]
        scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)

        done, todo = 0, epochs * sum(len(task.train_labels) for task in tasks[k:])  # images
        for epoch in range(epochs):
            order = torch.randperm(len(images), device=device)[: steps * batch].view(steps, batch)
            for step, rows in enumerate(order, start=1):
                x, y = images[rows], labels[rows]
                if augmentation is not None:
                    x = augmentation(x)
                # under torchrun each process takes its share of the same batch
                terms = model.losses(normalise(x[RANK::WORLD]), y[RANK::WORLD], k, teacher)
                scaler.scale(sum(terms.values())).backward()
                if WORLD > 1:
                    average_gradients(model)
                for optimizer, schedule in zip(optimizers, schedules, strict=True):
                    scaler.step(optimizer)
                    schedule.step()
                scaler.update()
                model.zero_grad()
                if hasattr(model, "after_step"):
                    model.after_step(k, images[rows], y)
                done += batch
                if RANK == 0 and (step == steps or (live and step % 25 == 0)):
                    where = f"task {k + 1}/{len(tasks)} epoch {epoch + 1}/{epochs}"
                    print_progress(where, terms, done, todo, time.perf_counter() - start)
            # one sum, so that a GPU is waited for once; NaN and infinity survive it
            if not sum(value.sum() for value in model.state_dict().values()).isfinite():
                where = f"epoch {epoch + 1} of task {k + 1}"
                raise UserError(f"NaN weights in {where}: try a lower --lr, or --precision fp32")

        if hasattr(model, "end_task"):
            model.end_task(k, images, labels)
        if WORLD > 1:  # running statistics differ; those of process 0 are saved
            for buffer in model.buffers():
                dist.broadcast(buffer, 0)
        row, class_incremental = evaluate(model, tasks[: k + 1])
        R.append(row)
        if after_task is not None:
            after_task(R, class_incremental, time.perf_counter() - start)
    model.eval()
    return R


def print_progress(where, terms, done, todo, seconds):
    """One line of 79 columns, rewritten in place on a terminal; `done` and `todo` count images."""
    losses = " ".join(f"{name} {loss.item():.3f}" for name, loss in terms.items())
    left = timedelta(seconds=round(seconds * (todo / done - 1)))
    line = f"{where}  {losses}  {done / seconds:,.0f} img/s  {left} left"
    print(f"{line:79.79}", end="\r" if sys.stdout.isatty() else "\n", flush=True)


# -----------------------------------------------------------------------------
# Data

# uint8 images (N, 3, S, S) and labels (N,) from 0, of one task or of a whole data set
Task = namedtuple(
    "Task", "train_images train_labels test_images test_labels classes", defaults=[()]
)
PUBLISHED = {  # side in pixels, unpacked folder, name in torchvision
    "cifar10": (32, "cifar-10-batches-py", "CIFAR10"),
    "cifar100": (32, "cifar-100-python", "CIFAR100"),
    "mnist": (28, "MNIST", "MNIST"),
    "fashionmnist": (28, "FashionMNIST", "FashionMNIST"),
    "tinyimagenet": (64, "tiny-imagenet-200", None),
}
TINY_URL = "http://cs231n.stanford.edu/tiny-imagenet-200.zip"
TINY_MD5 = "90528d7ca1a48142e341f4ef8d21d0de"


@contextlib.contextmanager
def whole_file(path):
    """Yield a temporary path that becomes `path` at the end, so that it is never half-written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.pah-writes")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


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
    size, folder, _ = PUBLISHED[name]
    size = image_size or size
    cache = root / f"pah-{name}-{size}px.pt"
    if cache.exists():
        return Task(*torch.load(cache, weights_only=True, mmap=True))
    home = root if (root / folder).exists() else root / "pah-downloads"
    read = read_tinyimagenet if name == "tinyimagenet" else read_torchvision
    try:
        data = read(name, home, size, download=home != root)
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"cannot read {name} ({error}): without a network put its unpacked folder {folder} "
            f"into {root}, or use --dataset synthetic"
        ) from error
    try:
        with whole_file(cache) as temporary:
            torch.save(list(data), temporary)
    except (OSError, RuntimeError) as error:  # RuntimeError: torch.save on a full disk
        print(f"continuing without a cache: {error}", file=sys.stderr)
    return data


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
        images = images.permute(0, 3, 1, 2)
        if images.shape[-1] != size:
            images = F.interpolate(images.float(), size, mode="bilinear", antialias=True)
            images = images.round().byte()
        tensors += [images, torch.as_tensor(split.targets)]
    return Task(*tensors, split.classes)


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
    if 10 * len(test_paths) != len(train.targets):  # 500 and 50 images per class
        raise RuntimeError(f"{len(train.targets)} images in train/, {len(test_paths)} in val/")
    return Task(
        read_images([path for path, _ in train.samples], size),
        torch.tensor(train.targets),
        read_images(test_paths, size),
        torch.tensor([train.class_to_idx[wnid] for wnid in wnids]),
        train.classes,
    )


def read_folder(folder, size):
    """Any images: train/ and val/ (or test/), with one sub-folder per class in each."""
    if not (folder / "train").is_dir():
        raise UserError(
            f"no data set {folder}: there are synthetic, {', '.join(PUBLISHED)}, and folders with "
            "train/ and val/ (or test/), one sub-folder per class in each"
        )
    from torchvision.datasets import ImageFolder

    test_folder = folder / "val" if (folder / "val").is_dir() else folder / "test"
    try:
        train, test = ImageFolder(folder / "train"), ImageFolder(test_folder)
    except FileNotFoundError as error:
        raise UserError(f"{folder}: {error}") from error
    if train.classes != test.classes:
        differing = set(train.classes) ^ set(test.classes)
        raise UserError(f"{test_folder} has other classes than train/: {sorted(differing)[:5]}")
    return Task(
        read_images([path for path, _ in train.samples], size),
        torch.tensor(train.targets),
        read_images([path for path, _ in test.samples], size),
        torch.tensor(test.targets),
        train.classes,
    )


def read_images(paths, size):
    """Image files -> one tensor (N, 3, size, size), the central square of each."""
    from torchvision import transforms as T
    from torchvision.datasets.folder import default_loader

    resize = T.Resize(size, T.InterpolationMode.BICUBIC)
    transform = T.Compose([resize, T.CenterCrop(size), T.PILToTensor()])
    images = torch.empty(len(paths), 3, size, size, dtype=torch.uint8)

    def read(i):
        try:
            images[i] = transform(default_loader(paths[i]))
        except OSError as error:
            raise UserError(f"{paths[i]} is not a readable image ({error})") from error

    print(f"reading {len(paths):,} images in {os.path.commonpath(paths)}", file=sys.stderr)
    with ThreadPoolExecutor() as pool:  # Pillow decodes outside of Python's lock
        for i, _ in enumerate(pool.map(read, range(len(paths))), start=1):
            if i % 10_000 == 0:
                print(f"{i:,} of {len(paths):,} images", file=sys.stderr)
    return images


def hold_out(data, fraction):
    """A validation split, always the same, to choose hyper-parameters on.

    This part of each class's training images takes the place of the test images.
    """
    images, labels = data.train_images, data.train_labels
    generator = torch.Generator().manual_seed(0)
    held = torch.zeros(len(labels), dtype=torch.bool)
    for c in range(len(data.classes)):
        rows = torch.nonzero(labels == c).flatten()
        shuffled = rows[torch.randperm(len(rows), generator=generator)]
        held[shuffled[: max(1, round(fraction * len(rows)))]] = True
    return Task(images[~held], labels[~held], images[held], labels[held], data.classes)


def split_tasks(data, tasks=10, order=None):
    """Cut a data set into a list of Task, with labels from 0 in each.

    `tasks` is their number (equally large; the first gets the remainder) or a list of classes per
    task. `order` lists the numbers of the classes; None: by label. Raises UserError.
    """
    n = len(data.classes)
    sizes = tasks
    if isinstance(tasks, int):
        each = n // max(1, tasks)
        sizes = [n - each * (tasks - 1)] + [each] * (tasks - 1)
    if sum(sizes) != n or min(sizes) < 2:
        raise UserError(
            f"--tasks {tasks}: {n} classes cannot be split like that; a task needs two or more"
        )
    if order is None:
        order = range(n)
    if sorted(order) != list(range(n)):
        raise UserError(f"the class order must name each of the {n} classes exactly once")
    split = []
    for members in torch.tensor(list(order)).split(sizes):
        train = select(data.train_images, data.train_labels, members)
        test = select(data.test_images, data.test_labels, members)
        split.append(Task(*train, *test, [data.classes[c] for c in members]))
    return split


def select(images, labels, members):
    """The images of the classes `members` (C,), class after class, and their labels from 0."""
    rows = torch.cat([torch.nonzero(labels == c).flatten() for c in members])
    labels = (labels[rows, None] == members).nonzero()[:, 1]
    if torch.equal(rows, torch.arange(len(rows)) + rows[0]):  # no copy of a large data set
        rows = slice(rows[0], rows[-1] + 1)
    return images[rows], labels


# -----------------------------------------------------------------------------
# The experiment

AUGMENTATIONS = {
    "crop-flip": augment,
    "crop": lambda images: augment(images, flip=False),
    "none": None,
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
MAY_DIFFER = {"out", "data", "seeds", "resume", "device", "compile", "stop_after"}  # at --resume


def load_tasks(args, seed):
    """The tasks that the options describe."""
    data = load_dataset(args.dataset, args.data, args.image_size)
    if args.val_fraction:
        data = hold_out(data, args.val_fraction)
    order = range(len(data.classes))
    if args.shuffle_classes:
        order = torch.randperm(len(order), generator=torch.Generator().manual_seed(seed)).tolist()
    if args.class_order:
        numbers = {str(c): c for c in order} | {name: c for c, name in enumerate(data.classes)}
        lines = [line.strip() for line in Path(args.class_order).read_text().splitlines()]
        order = [numbers.get(line, -1) for line in lines if line]
    return split_tasks(data, args.tasks, order)


def make_backbone(args):
    """Our ResNet-18, or torchvision's for --stem 7x7."""
    if args.stem == "3x3":
        return ResNet18(args.width)
    from torchvision.models import resnet18

    backbone = resnet18(weights="DEFAULT" if args.pretrained else None)
    backbone.fc = nn.Identity()
    return backbone.to(memory_format=torch.channels_last)


def build(args, num_tasks, classes, kind=None):
    """The PAH, or the given class derived from it, that the options describe."""
    if kind is None:
        kind = Rehearsal if args.rehearsal else PAH
    more = {}
    if issubclass(kind, Rehearsal):
        more["augmentation"] = AUGMENTATIONS[args.augment]
    return kind(
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
        **more,
    )


def load_checkpoint(path, device="cpu"):
    """The PAH of a run, in eval mode: model(normalise(images), n) gives logits (B, n, C)."""
    saved = torch.load(path, map_location=device, weights_only=True)
    defaults = vars(make_parser().parse_args([]))  # of options that are newer than the run
    args = argparse.Namespace(**defaults | saved["results"]["args"] | {"pretrained": False})
    model = build(args, *saved["model"]["present"].shape)
    model.load_state_dict(saved["model"])
    return model.to(device).eval()


def run(args, seed, model, tasks, skipped=0, make_optimizers=make_optimizers):
    """Learn `tasks` with a checkpoint and results.json in OUT/seed<S> after each of them.

    The first `skipped` tasks are only evaluated. Returns what results.json holds.
    """
    folder = Path(args.out) / f"seed{seed}"
    num_tasks = args.stop_after or len(tasks)
    if not 1 <= num_tasks <= len(tasks):
        raise UserError(f"--stop-after {num_tasks}: there are only {len(tasks)} tasks")
    class_order = [list(task.classes) for task in tasks]
    results = {"accuracy": [], "class_incremental": [], "seconds": 0.0}
    if (folder / "checkpoint.pt").exists():
        saved = torch.load(folder / "checkpoint.pt", map_location="cpu", weights_only=True)
        results = saved["results"]
        check_same_run(folder, results, args, class_order)
        model.load_state_dict(saved["model"])
        save(folder, results, model)  # in case it was killed before results.json was written
    elif folder.exists() and any(not path.name.startswith(".") for path in folder.iterdir()):
        raise UserError(f"{folder} has files but no checkpoint.pt: choose another --out")
    if RANK == 0:
        print(f"{num_tasks} tasks, {args.device}, {args.precision}: {folder}")

    def after_task(R, class_incremental, seconds):
        results.update(args=vars(args), seed=seed, class_order=class_order, accuracy=R[skipped:])
        results["class_incremental"].append(class_incremental)
        results["seconds"] += seconds
        results["complete"] = len(R) == num_tasks
        results.update(metrics(results["accuracy"]))
        results.update(machine(model))
        save(folder, results, model)
        if RANK == 0:
            row = " ".join(f"{accuracy:.0f}" for accuracy in R[-1][-10:])
            spent = timedelta(seconds=round(results["seconds"]))
            where = f"task {len(R):>2}/{num_tasks}"
            print(f"{where}  {describe([results])}  {spent} | {row:30}", flush=True)

    learn(
        model,
        tasks[:num_tasks],
        epochs=args.epochs,
        batch_size=args.batch_size,
        lr=args.lr,
        hyper_lr=args.hyper_lr,
        proto_lr=args.proto_lr,
        weight_decay=args.weight_decay,
        augmentation=AUGMENTATIONS[args.augment],
        make_optimizers=make_optimizers,
        compile=args.compile,
        seed=seed,
        R=[[]] * skipped + results["accuracy"],
        after_task=after_task,
    )
    return results


def check_same_run(folder, results, args, class_order):
    """Raises UserError unless `args` may continue the run that left `results`."""
    there, here = results["args"], vars(args)
    differing = [
        f"--{name.replace('_', '-')} {there.get(name)} there, {here[name]} here"
        for name in here
        if name not in MAY_DIFFER and there.get(name) != here[name]
    ]
    if results["class_order"] != class_order:
        differing.append("a different class order")
    if differing:
        differing = ", ".join(differing)
        raise UserError(
            f"{folder} holds a different run ({differing}): use its options, or another --out"
        )
    if not args.resume:
        raise UserError(f"{folder} already holds this run: add --resume, or choose another --out")


def metrics(R):
    """AA, and for tasks learned one after the other FM, BWT and LA."""
    if len(R) < len(R[-1]):
        return {"AA": average_accuracy(R), "FM": None, "BWT": None, "LA": None}
    learned = [row[-1] for row in R]
    return {
        "AA": average_accuracy(R),
        "FM": forgetting(R),
        "BWT": (sum(R[-1]) - sum(learned)) / max(1, len(R) - 1),  # Lopez-Paz and Ranzato 2017
        "LA": sum(learned) / len(R),  # accuracy on a task just after it was learned
    }


def machine(model):
    """What the model ran on, and its number of parameters."""
    sizes = {}
    for name, p in model.named_parameters():
        part = name.split(".")[0]
        sizes[part] = sizes.get(part, 0) + p.numel()
    device, memory = f"cpu {torch.get_num_threads()}", None
    if next(model.parameters()).is_cuda:
        device, memory = torch.cuda.get_device_name(), torch.cuda.max_memory_allocated()
    described = {
        "parameters": sizes,
        "processes": WORLD,
        "device": device,
        "peak_memory_bytes": memory,
        "versions": {"python": sys.version.split()[0], "torch": str(torch.__version__)},
    }
    if hasattr(model, "stored"):
        described["stored"] = model.stored()
    return described


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


def save(folder, results, model):
    """Write checkpoint.pt, results.json and prototypes.png.

    The checkpoint comes first, as what follows may fail; no head and no full image is in it.
    """
    if RANK > 0:
        return
    with whole_file(folder / "checkpoint.pt") as path:
        torch.save({"results": results, "model": model.state_dict()}, path)
    with whole_file(folder / "results.json") as path:
        path.write_text(json.dumps(results, indent=1) + "\n")
    if isinstance(model, PAH):
        from torchvision.utils import save_image

        images = model.prototypes.detach().cpu() * STD + MEAN
        images = F.interpolate(images.flatten(0, 1), scale_factor=4)
        with whole_file(folder / "prototypes.png") as path:  # a row per task
            save_image(images, path, "PNG", nrow=model.prototypes.shape[1], pad_value=1)


def make_parser():
    """All options. Those that differ from the default name the output folder."""
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    # data
    add("--dataset", default="cifar100", help=f"synthetic, {', '.join(PUBLISHED)}, or a folder")
    add("--data", default="data", help="folder of downloads and caches")
    add("--tasks", type=int, nargs="+", default=[10], help="how many, or the classes of each")
    add("--image-size", type=int, help="side in pixels; None: as published, 64 for folders")
    add("--shuffle-classes", action="store_true", help="class order by seed, not by label")
    add("--class-order", help="file with one class per line, names or numbers")
    add("--val-fraction", type=float, default=0.0, help="test on this part of the training set")
    add("--stop-after", type=int, help="learn only the first tasks, this many")
    # method
    add("--lam", type=float, default=1.0, help="weight of L_sm (Eq. 5)")
    add("--mu", type=float, default=1.0, help="weight of L_sp (Eq. 6)")
    add("--temperature", type=float, default=2.0, help="of both distillations")
    add("--rehearsal", action="store_true", help="prototypes join the batch (not in the paper)")
    add("--proto-size", type=int, default=10, help="side of a prototype in pixels")
    add("--proto-init", choices=("semantic", "random"), default="semantic", help="image or noise")
    add("--hidden", type=int, default=64, help="width of the hypernetwork")
    add("--stem", choices=("3x3", "7x7"), default="3x3", help="7x7 for large images")
    add("--width", type=int, default=64, help="of the backbone; D is 8 times this")
    add("--pretrained", action="store_true", help="ImageNet weights; needs --stem 7x7")
    # training
    add("--epochs", type=int, default=30, help="per task")
    add("--batch-size", type=int, default=64, help="of all processes together")
    add("--lr", type=float, default=0.02, help="of the backbone")
    add("--hyper-lr", type=float, default=1e-4, help="of the hypernetwork")
    add("--proto-lr", type=float, default=2e-4, help="of the prototypes")
    add("--weight-decay", type=float, default=0.005, help="of filters and hypernetwork")
    add("--augment", choices=AUGMENTATIONS, default="crop-flip", help="of the training images")
    add("--seeds", type=int, nargs="+", default=[0], help="one run per seed")
    # machine
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cuda or cpu")
    add("--precision", choices=DTYPES, help="of the backbone; None: bf16 where it is fast")
    add("--compile", action="store_true", help="torch.compile the backbone")
    add("--out", help="output folder; if None, runs/ and a name made of the options")
    add("--resume", action="store_true", help="continue after the last finished task")
    return parser


def parse_args(argv=None, parser=None):
    parser = parser or make_parser()
    args = parser.parse_args(argv)
    check_options(args, parser)
    named = args.dataset == "synthetic" or args.dataset in PUBLISHED
    if not named and Path(args.dataset).is_dir():
        args.dataset = str(Path(args.dataset).resolve())
    args.out = args.out or default_out(args, parser)
    args.precision = args.precision or default_precision(args.device)
    if len(args.tasks) == 1:
        args.tasks = args.tasks[0]
    return args


def check_options(args, parser):
    """Exit with a message if options contradict each other."""
    if args.stem == "7x7" and args.width != 64:
        parser.error("--stem 7x7 is torchvision's ResNet-18, of --width 64")
    if args.stem != "7x7" and args.pretrained:
        parser.error("--pretrained needs --stem 7x7")
    if args.class_order and args.shuffle_classes:
        parser.error("--class-order and --shuffle-classes cannot be combined")
    if not 0 <= args.val_fraction < 1:
        parser.error("--val-fraction must be at least 0 and below 1")


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


def set_up(device):
    """Settings of the whole process. Under torchrun each process has a GPU of its own."""
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
    results = []
    for seed in args.seeds:
        tasks = load_tasks(args, seed)
        torch.manual_seed(seed)
        model = build(args, len(tasks), max(len(task.classes) for task in tasks)).to(args.device)
        if WORLD > 1 and args.device == "cuda":
            model.backbone = nn.SyncBatchNorm.convert_sync_batchnorm(model.backbone)
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
