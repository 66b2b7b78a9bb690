# /// script
# dependencies = ["torch>=2.5", "torchvision>=0.20", "numpy>=1.26"]
# ///
"""Prototype-Augmented Hypernetworks (PAH) for continual learning, in one file.

    python pah.py --dataset synthetic                 # no download, a minute on two CPU cores
    python pah.py                                     # Split-CIFAR100, 10 tasks
    python pah.py --dataset tinyimagenet --tasks 20
    python pah.py --dataset path/to/folder            # train/ and val/, one sub-folder a class

No classifier head is stored: a hypernetwork generates a task's head from small learnable images, prototypes
of its classes; three losses keep old tasks working. Equations: arXiv 2505.07450 (De La Fuente et al. 2025).
"""
import argparse, contextlib, copy, ctypes, functools, hashlib
import json, math, os, shutil, signal, sys, time
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, for all: no look at future tasks
HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}

@functools.cache
def mean_and_std(device):  # made once: every copy to a GPU makes it wait
    return torch.tensor([MEAN, STD], device=device).view(2, 3, 1, 1)

def normalise(images):
    """uint8 (..., 3, H, W) -> float32, each channel with about zero mean and unit variance."""
    mean, std = mean_and_std(images.device)
    return (images.float() / 255 - mean) / std
# ------------------------------ Model: prototypes -> task embedding -> hypernetwork -> head
class Hypernetwork(nn.Module):
    """H of Eq. 2: task embeddings (..., E) -> heads (..., C, D). Tanh keeps hidden vectors of unlike tasks
    about orthogonal, where ReLU aligns them: what one head learns then moves the others less."""
    def __init__(self, embedding, classes, features, hidden=64):
        super().__init__()
        self.shape = classes, features
        self.layers = nn.Sequential(nn.Linear(embedding, hidden), nn.Tanh(), nn.Linear(hidden, hidden),
                                    nn.Tanh(), nn.Linear(hidden, classes * features))
        # heads start at the scale of nn.Linear's weights, 1/sqrt(3D); 0.4 is what tanh squared is on average
        variances = 2 / embedding, 2 / hidden, 1 / (3 * features * 0.4 * hidden)
        for layer, variance in zip(self.layers[::2], variances):
            nn.init.normal_(layer.weight, std=math.sqrt(variance))
            nn.init.zeros_(layer.bias)

    def forward(self, embedding):
        return self.layers(embedding).unflatten(-1, self.shape)

class PAH(nn.Module):
    """Backbone, hypernetwork and prototypes (K, C, 3, s, s), which are zero until their task begins.

    `backbone` maps images (B, 3, H, W) to (B, D); D is its attribute `features`, or given. `head` says what a
    head is made from: "hyper": prototypes; controls: "vector": free numbers, no image; "stored": nothing,
    `prototypes` are the heads (K, C, D), as in Learning without Forgetting. `precision` of the backbone:
    "fp32", "bf16" or "fp16"; heads, logits and losses are always fp32."""
    def __init__(self, backbone, tasks, classes, features=None, proto_size=10, hidden=64, head="hyper",
                 precision="fp32"):
        super().__init__()
        features = features or backbone.features
        self.backbone, self.head, self.precision = backbone, head, precision
        if head == "stored":
            start = torch.empty(tasks, classes, features).uniform_(-1, 1) / math.sqrt(features)
            self.hypernetwork = nn.Unflatten(-1, (classes, features))  # has no weights
        else:
            start = torch.zeros(tasks, classes, 3, proto_size, proto_size)
            self.hypernetwork = Hypernetwork(start[0].numel(), classes, features, hidden)
        self.prototypes = nn.Parameter(torch.randn_like(start) if head == "vector" else start)

    @torch.no_grad()
    def begin_task(self, task, images, labels, init="semantic"):
        """Set the prototypes of `task`: a random image of each class, resized, or noise with init="random".
        `images` and `labels` are its training set: uint8 (N, 3, H, W), class numbers 0..C-1."""
        if self.head != "hyper":
            return
        self.prototypes[task].normal_()
        for c, prototype in enumerate(self.prototypes[task] if init == "semantic" else []):
            rows = torch.nonzero(labels == c).flatten()
            image = normalise(images[rows[torch.randint(len(rows), ())]])[None]
            prototype.copy_(F.interpolate(image, prototype.shape[1:], mode="bilinear", antialias=True)[0])

    def heads(self, n):
        """The heads of the first n tasks, (n, C, D), generated now."""
        embeddings = self.prototypes[:n].flatten(1)  # Eq. 3
        return self.hypernetwork(embeddings)  # Eq. 2

    def features(self, images):
        """Features (B, D), fp32, of normalised images (B, 3, H, W)."""
        with torch.autocast(images.device.type, HALF.get(self.precision), enabled=self.precision in HALF):
            return self.backbone(images).float()

    def forward(self, images, task):
        """Logits (B, C) of normalised images with the head of `task`."""
        return self.features(images) @ self.heads(task + 1)[task].T  # Eq. 1

class Teacher:
    """What teaches the next task: a frozen copy of the backbone, and the first n tasks' heads (n, C, D)."""
    features = torch.no_grad()(PAH.features)

    def __init__(self, model, n):
        self.backbone = copy.deepcopy(model.backbone).eval().requires_grad_(False)
        self.heads, self.precision = model.heads(n).detach().clone(), model.precision
        for layer in self.backbone.modules():  # what autocast would round at every pass is rounded once
            if self.precision in HALF and isinstance(layer, (nn.Conv2d, nn.Linear)):
                layer.to(HALF[self.precision])
# ------------------------------ Losses
def distillation(new, old, temperature=2.0):
    """KL(old || new) between softened logits (..., C), times T^2 (Hinton et al. 2015). Returns (...,)."""
    new, old = F.log_softmax(new / temperature, -1), F.log_softmax(old / temperature, -1)
    return temperature**2 * F.kl_div(new, old, reduction="none", log_target=True).sum(-1)

def soft_loss_prototypes(model, teacher, temperature=2.0, drawn=0, updates="prototypes"):
    """L_sp (Eq. 6): earlier tasks' prototypes as images, student against teacher, each with its task's head;
    mean over prototypes, sum over tasks. BatchNorm uses running statistics. The gradient reaches prototypes
    alone, or updates="all" also the weights. `drawn` > 0: so many random tasks stand for all, unbiased."""
    n, training = len(teacher.heads), model.training
    tasks = torch.randperm(n, device=model.prototypes.device)[:drawn] if 0 < drawn < n else slice(n)
    prototypes, old_heads = model.prototypes[tasks], teacher.heads[tasks]
    images, each = prototypes.flatten(0, 1), old_heads.shape[:2]
    old = teacher.features(images).unflatten(0, each) @ old_heads.mT
    weights = [p for p in model.parameters() if p.requires_grad and p is not model.prototypes]
    for p in weights if updates == "prototypes" else []:
        p.requires_grad_(False)
    model.eval()
    new = model.features(images).unflatten(0, each) @ model.hypernetwork(prototypes.flatten(1)).mT
    model.train(training)
    for p in weights:
        p.requires_grad_(True)
    return distillation(new, old, temperature).mean() * n

def joint_loss(model, teacher, images, labels, task, lam=1.0, mu=1.0, temperature=2.0, sp_tasks=0,
               sp_updates="prototypes"):
    """L = L_hm + lam L_sm + mu L_sp on normalised images (B, 3, H, W) of `task`, counted from 0, with labels
    (B,). `teacher` is the model's Teacher from before this task, None in the first; the last two are L_sp's
    `drawn` and `updates`. Returns L to minimise, and the three losses, detached (3,)."""
    logits = torch.einsum("bd,ncd->bnc", model.features(images), model.heads(task + 1))
    l_hm = F.cross_entropy(logits[:, task], labels)  # Eq. 4
    l_sm = l_sp = torch.zeros((), device=images.device)
    if teacher is not None and lam:  # Eq. 5: mean over the batch, sum over the earlier tasks
        old = torch.einsum("bd,ncd->bnc", teacher.features(images), teacher.heads)
        l_sm = distillation(logits[:, :len(teacher.heads)], old, temperature).mean(0).sum()
    if teacher is not None and mu and model.head == "hyper":
        l_sp = soft_loss_prototypes(model, teacher, temperature, sp_tasks, sp_updates)  # Eq. 6
    return l_hm + lam * l_sm + mu * l_sp, torch.stack([l_hm, l_sm, l_sp]).detach()

def multitask_loss(model, images, labels):
    """Cross-entropy on all tasks at once, the upper bound; labels are k * C + class. Returns the like."""
    logits = torch.einsum("bd,ncd->bnc", model.features(images), model.heads(None))
    task, label = labels // logits.shape[2], labels % logits.shape[2]
    loss = F.cross_entropy(logits[torch.arange(len(task), device=task.device), task], label)
    return loss, torch.stack([loss, 0 * loss, 0 * loss]).detach()
# ------------------------------ Metrics: R[k][j] is the accuracy in percent on task j after task k
def average_accuracy(R):
    """AA: mean of the last row."""
    return sum(R[-1]) / len(R[-1])

def forgetting(R):
    """FM: mean over earlier tasks of (best accuracy before the last - now) (Chaudhry et al. 2018)."""
    last = len(R) - 1
    return sum(max(R[l][j] for l in range(j, last)) - R[last][j] for j in range(last)) / max(1, last)

def backward_transfer(R):
    """BWT: mean over earlier tasks of (accuracy now - when just learned) (Lopez-Paz and Ranzato 2017)."""
    last = len(R) - 1
    return sum(R[last][j] - R[j][j] for j in range(last)) / max(1, last)

def learning_accuracy(R):
    """LA: mean accuracy on each task just after it was learned."""
    return sum(row[-1] for row in R) / len(R)

@torch.no_grad()
def evaluate(model, tasks):
    """A row of R: accuracies in eval mode on `tasks`, all so far, which have test_images, uint8 (N, 3, H, W),
    and test_labels (N,), class numbers within them. And their mean if the task is not told and the largest
    logit of all heads decides (class-incremental)."""
    training, device, heads = model.training, model.prototypes.device, model.heads(len(tasks))
    right = torch.zeros(2, len(tasks), dtype=torch.float64, device=device)
    model.eval()
    for k, task in enumerate(tasks):
        for x, y in zip(task.test_images.split(500), task.test_labels.to(device).split(500)):
            logits = torch.einsum("bd,ncd->bnc", model.features(normalise(x.to(device))), heads)
            right[0, k] += (logits[:, k].argmax(1) == y).sum()
            right[1, k] += (logits.flatten(1).argmax(1) == k * heads.shape[1] + y).sum()
        right[:, k] = 100 * right[:, k] / len(task.test_labels)
    model.train(training)
    return right[0].tolist(), right[1].mean().item()
# ------------------------------ Backbone
class BasicBlock(nn.Module):
    def __init__(self, inputs, outputs, stride=1, pool=False):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample = None
        if stride != 1:  # a pooled shortcut as in ResNet-D (He et al. 2019)
            self.pool = nn.AvgPool2d(stride, ceil_mode=True) if pool else nn.Identity()
            shortcut = nn.Conv2d(inputs, outputs, 1, 1 if pool else stride, bias=False)
            self.downsample = nn.Sequential(shortcut, nn.BatchNorm2d(outputs))

    def forward(self, x):
        # of one pixel stride 1 makes the same; torch 2.14's bf16 gradients with stride 2 are wrong on a CPU
        y = F.conv2d(x, self.conv1.weight, padding=1) if x.shape[2:] == (1, 1) else self.conv1(x)
        y = self.bn2(self.conv2(F.relu(self.bn1(y), inplace=True)))
        return F.relu(y + (x if self.downsample is None else self.downsample(self.pool(x))), inplace=True)

class ResNet18(nn.Module):
    """ResNet-18 without its classifier: images (B, 3, H, W) -> features (B, D = 8 * width). stem="7x7" is
    torchvision's, whose weights width=64 takes; stem="3x3", for 32 and 64 pixels, has pooled shortcuts."""
    def __init__(self, width=64, stem="3x3"):
        super().__init__()
        self.features = 8 * width
        small = stem == "3x3"
        kernel, stride, pad = (3, 1, 1) if small else (7, 2, 3)
        self.conv1 = nn.Conv2d(3, width, kernel, stride, pad, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.maxpool = nn.Identity() if small else nn.MaxPool2d(3, 2, 1)
        w2, w4, w8 = 2 * width, 4 * width, 8 * width
        self.layer1 = nn.Sequential(BasicBlock(width, width), BasicBlock(width, width))
        self.layer2 = nn.Sequential(BasicBlock(width, w2, 2, pool=small), BasicBlock(w2, w2))
        self.layer3 = nn.Sequential(BasicBlock(w2, w4, 2, pool=small), BasicBlock(w4, w4))
        self.layer4 = nn.Sequential(BasicBlock(w4, w8, 2, pool=small), BasicBlock(w8, w8))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x):
        x = self.maxpool(F.relu(self.bn1(self.conv1(x)), inplace=True))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return x.mean((2, 3))
# ------------------------------ Optimiser
TURNS = 5  # each filter moves in every fifth step, five times as far
def orthogonalised(x):
    """About U V^T of a matrix U S V^T: three steps of Muon's Newton-Schulz iteration (Jordan et al. 2024)."""
    if x.shape[0] > x.shape[1]:
        return orthogonalised(x.mT).mT
    a, b, c = 3.4445, -4.7750, 2.0315
    x = x / (x.norm() + 1e-7)
    for _ in range(3):
        gram = x @ x.mT
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x

class Muon(torch.optim.AdamW):
    """AdamW, but in groups with a `muon` dtype a filter, as a matrix (outputs, the rest), moves along its
    Nesterov momentum, orthogonalised in that dtype (Jordan et al. 2024). Filters take turns: momenta of some
    twenty steps hardly turn in five, and to orthogonalise all at every step costs a fifth of it on a CPU."""
    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            filters = [p for p in group["params"] if "muon" in group and p.grad is not None]
            for p in filters:
                if "momentum" not in self.state[p]:
                    self.state[p]["momentum"] = torch.zeros_like(p)
            momenta = [self.state[p]["momentum"] for p in filters]
            if filters:
                torch._foreach_lerp_(momenta, [p.grad for p in filters], 0.05)
            group["turn"], lr = (group.get("turn", -1) + 1) % TURNS, TURNS * group["lr"]
            for p, momentum in list(zip(filters, momenta))[group["turn"]::TURNS]:
                update = orthogonalised(p.grad.lerp(momentum, 0.95).flatten(1).to(group["muon"]))
                scale = max(1, update.shape[0] / update.shape[1]) ** 0.5
                p.mul_(1 - lr * group["weight_decay"]).add_(update.view_as(p), alpha=-lr * scale)
            for p in filters:
                p.grad = None  # AdamW leaves it alone
        return super().step(closure)

def make_optimizer(model, lr, hyper_lr, proto_lr, weight_decay, muon=True):
    """Muon for the backbone's filters at `lr`, AdamW for the rest (BatchNorm and stored heads at lr / 10), or
    for all. Filters, hypernetwork and stored heads decay; BatchNorm and prototypes do not."""
    filters = dict(params=[p for p in model.backbone.parameters() if p.ndim > 1], lr=lr)
    if muon:
        filters["muon"] = torch.bfloat16 if model.precision == "bf16" else torch.float32
        lr = lr / 10
    norms = dict(params=[p for p in model.backbone.parameters() if p.ndim <= 1], lr=lr, weight_decay=0)
    groups = [filters, norms, dict(params=[model.prototypes], lr=lr)]
    if model.head != "stored":
        groups[2] |= dict(lr=proto_lr, weight_decay=0)
        groups.append(dict(params=model.hypernetwork.parameters(), lr=hyper_lr))
    # a fused AdamW would take fp16's loss scale out of its gradients itself, and Muon's would keep it
    return Muon(groups, weight_decay=weight_decay, fused=None if model.precision == "fp16" else True)
# ------------------------------ Training
RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # torchrun sets them
def augment(images, pad, flip=True):
    """A random crop of each of the uint8 images (B, C, S, S) with `pad` reflected pixels around, mirrored at
    random. Runs on the images' device without waiting for it."""
    b, _, _, s = images.shape
    reflected = s - 1 - (s - 1 - torch.arange(-pad, s + pad, device=images.device).abs()).abs()
    windows = images[:, :, reflected][..., reflected].unfold(2, s, 1).unfold(3, s, 1)  # views of all crops
    top, left = torch.randint(2 * pad + 1, (2, b), device=images.device)
    crops = windows[torch.arange(b, device=images.device), :, top, left]
    if flip:
        crops = torch.where(torch.rand(b, 1, 1, 1, device=images.device) < 0.5, crops.flip(3), crops)
    return crops

def train_task(model, loss, images, labels, args, progress):
    """Train on the uint8 images (N, 3, H, W) and labels (N,) of one task with loss(model, images=, labels=),
    like `joint_loss`; after each step call progress(step, steps, batch, losses (steps, 3)). Under torchrun
    all processes draw the same batch, and each takes its share."""
    device = model.prototypes.device
    if device.type == "cuda" and images.nbytes < torch.cuda.mem_get_info()[0] // 2:
        images = images.to(device)
    labels = labels.to(device)
    batch = min(args.batch_size, len(images)) // WORLD * WORLD
    steps = len(images) // batch  # in an epoch; the rest of its random order is dropped
    rates = args.lr, args.hyper_lr, args.proto_lr
    optimizer = make_optimizer(model, *rates, args.weight_decay, muon=args.optimizer == "muon")
    peaks, total = [group["lr"] for group in optimizer.param_groups], steps * args.epochs
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, peaks, total + 1, cycle_momentum=False)
    scaler = torch.amp.GradScaler(device.type, enabled=args.precision == "fp16")
    losses = torch.zeros(total, 3, device=device)
    model.train()
    for epoch in range(args.epochs):
        order = torch.randperm(len(images), device=images.device)[:steps * batch].view(steps, batch)
        for step, rows in enumerate(order, start=epoch * steps):
            x, y = images[rows].to(device, non_blocking=True), labels[rows.to(device)]
            if args.augment != "none":
                x = augment(x, pad=x.shape[-1] // 8, flip=args.augment == "crop-flip")
            value, losses[step] = loss(model, images=normalise(x[RANK::WORLD]), labels=y[RANK::WORLD])
            scaler.scale(value).backward()
            for p in model.parameters():
                if WORLD > 1 and p.grad is not None:
                    torch.distributed.all_reduce(p.grad)
                    p.grad /= WORLD
            scaler.step(optimizer)
            scaler.update()
            schedule.step()
            optimizer.zero_grad(set_to_none=True)
            progress(step + 1, total, batch, losses)
        require(all(value.isfinite().all() for value in model.state_dict().values()),
                f"weights are no numbers after epoch {epoch + 1}: a lower --lr, or --precision fp32?")

def print_progress(task, args, tasks_after, start, step, steps, batch, losses):
    """The line that says how a task goes: updated in place on a terminal, once an epoch elsewhere."""
    an_epoch, live = steps // args.epochs, sys.stdout.isatty()
    if step % an_epoch and not (live and step % 25 == 0):
        return
    hm, sm, sp = losses[max(0, step - 50):step].mean(0).tolist()
    seconds = (time.perf_counter() - start) / step
    left = timedelta(seconds=round(seconds * (steps - step + steps * tasks_after)))
    line = (f"task {task + 1}/{args.tasks} epoch {math.ceil(step / an_epoch)}/{args.epochs}  hm {hm:.3f} "
            f"sm {sm:.3f} sp {sp:.3f}  {batch / seconds:,.0f} img/s  {left} left")
    width = shutil.get_terminal_size().columns - 1
    print(f"\r{line[:width]:{width}}\r" if live else line, end="" if live else "\n", flush=True)

def build(args):
    backbone = ResNet18(args.width, args.stem)
    if args.pretrained:
        from torchvision.models import ResNet18_Weights
        with explained(f"--pretrained: cannot fetch weights into {torch.hub.get_dir()}", OSError):
            backbone.load_state_dict(ResNet18_Weights.DEFAULT.get_state_dict(), strict=False)  # no classifier
    avx512 = "AVX512" in torch.backends.cpu.get_cpu_capability()
    if args.device == "cuda" or avx512 or args.width % 8 == 0:  # elsewhere oneDNN's kernels corrupt memory
        backbone.to(memory_format=torch.channels_last)
    if args.compile:
        backbone.compile()
    return PAH(backbone, args.tasks, args.classes, proto_size=args.proto_size, hidden=args.hidden,
               head=args.head, precision=args.precision)

def loss_of_task(model, task, args):
    teacher = Teacher(model, task) if task and (args.lam or args.mu) else None
    if teacher and args.compile:
        teacher.backbone.compile()
    return functools.partial(joint_loss, teacher=teacher, task=task, lam=args.lam, mu=args.mu,
                             temperature=args.temperature, sp_tasks=args.sp_tasks, sp_updates=args.sp_updates)

def learn(args, seed, tasks, signature, seeds_after=0):
    """One seed: each task in turn is begun, trained on, evaluated with the earlier ones and saved in
    OUT/seed<S>. Returns what results.json holds."""
    folder, last = Path(args.out) / f"seed{seed}", args.stop_after or args.tasks
    torch.manual_seed(seed)
    model, state = start_or_resume(args, seed, signature, folder, last)
    model.to(args.device)
    if WORLD > 1 and args.device == "cuda":
        model.backbone = nn.SyncBatchNorm.convert_sync_batchnorm(model.backbone)
    R = state["accuracy"]
    todo = range(len(R[-1]) if R else 0, last)
    for k in todo[-1:] if args.joint else todo:
        start = time.perf_counter()
        torch.manual_seed(1_000_003 * (seed + 1) + k)  # whatever came before: a resumed run is the same run
        loss = multitask_loss if args.joint else loss_of_task(model, k, args)
        for i in range(k + 1) if args.joint else [k]:
            model.begin_task(i, tasks[i].train_images, tasks[i].train_labels, args.proto_init)
        images, labels = tasks[k].train_images, tasks[k].train_labels
        if args.joint:
            images = torch.cat([t.train_images for t in tasks[:last]])
            labels = torch.cat([t.train_labels + i * args.classes for i, t in enumerate(tasks[:last])])
        progress = functools.partial(print_progress, k, args, last - k - 1 + seeds_after * last, start)
        train_task(model, loss, images, labels, args, progress)
        row, class_incremental = evaluate(model, tasks[:k + 1])
        R.append(row)
        state["class_incremental"].append(class_incremental)
        state["seconds"] += time.perf_counter() - start
        state["result"] = summary(state, model, complete=k + 1 == last)
        if RANK == 0:
            save(folder, state, model)
        print(f"task {k + 1:>2}/{args.tasks}  AA {average_accuracy(R):5.2f}  FM {forgetting(R):5.2f}  "
              f"{timedelta(seconds=round(state['seconds']))} |", *[f"{a:.0f}" for a in row[-10:]], flush=True)
    return state["result"]
# ------------------------------ Data: uint8 tensors, sorted by class, cached in one file
SPLITS = "train_images train_labels test_images test_labels"
Data = namedtuple("Data", f"{SPLITS} classes signature", defaults=[""])
Task = namedtuple("Task", f"classes {SPLITS}")
SIZES = {"cifar100": 32, "tinyimagenet": 64, "mnist": 32, "synthetic": 16}
TINY_URL, TINY_MD5 = "http://cs231n.stanford.edu/tiny-imagenet-200.zip", "90528d7ca1a48142e341f4ef8d21d0de"
TINY_COUNTS, UNREADABLE = [100_000, 10_000], "not a readable image; replace or delete it"
class Problem(Exception):
    """Something the user can put right: `main` prints it as one line and exits with code 2."""

def require(condition, message):
    if not condition:
        raise Problem(message)

@contextlib.contextmanager
def explained(message, *errors):
    try:
        yield
    except errors as error:
        raise Problem(f"{message} ({one_line(error)})") from error

def one_line(error):
    return (" ".join(str(error).split()) or type(error).__name__)[:100]

@contextlib.contextmanager
def written_whole(path, writer="pah"):
    """Yields a temporary name beside `path`; what was written there becomes `path` when all went well."""
    temporary = path.with_name(f".{path.name}.{writer}-writes")
    try:  # torch.save calls a full disk a RuntimeError
        with explained(f"{path}: cannot be written; what was there is untouched", OSError, RuntimeError):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)

def load_dataset(name, root="data", image_size=None):
    """Read cifar100, tinyimagenet, mnist, synthetic or a folder with train/ and val/, one folder a class:
    from a cache in `root`, from files there, or from the network. `image_size` None: the data set's own, 64
    for folders. Returns Data: uint8 images (N, 3, S, S) and int64 labels (N,), sorted by label; names of the
    classes; a signature of the content. Raises Problem."""
    root, size, folder = Path(root), image_size or SIZES.get(name, 64), Path(name).resolve()
    if name == "synthetic":
        return synthetic(size)
    cache, source = root / f"pah-{name}-{size}.pt", name
    if name not in SIZES:
        stats = [(p, p.stat()) for split in ("train", "val") for p, _ in list_images(folder / split)[1]]
        source = md5(repr([(str(p), stat.st_size, stat.st_mtime_ns) for p, stat in stats]).encode())
        cache = root / f"pah-folder-{folder.name}-{md5(bytes(folder))[:8]}-{size}.pt"
    try:
        saved = torch.load(cache, weights_only=True, mmap=os.name != "nt")  # a page is read when it is needed
        require(saved["source"] == source, "it is of other files")
        return Data(*saved["data"])
    except Exception as error:  # what torch.load raises on a damaged file has no common class
        print(f"reading {name} into {cache} ({one_line(error)})", file=sys.stderr)
    read = read_torchvision if name in ("cifar100", "mnist") else read_folder
    (images, labels), (test_images, test_labels), classes = read(name, root, size)
    order, test_order = labels.argsort(stable=True), test_labels.argsort(stable=True)
    tensors = images[order], labels[order], test_images[test_order], test_labels[test_order]
    data = Data(*tensors, list(classes), md5("".join(md5(t.numpy()) for t in tensors).encode()))
    with written_whole(cache, f"pah-{os.getpid()}-{time.time_ns()}") as temporary:  # others may be at it too
        torch.save({"source": source, "data": list(data)}, temporary)
    return data

def md5(content):
    return hashlib.md5(content).hexdigest()

def synthetic(size=16, classes=20, train=200, test=50):
    """Coloured blobs: a class is a smooth random pattern, an image is a crop of it, dimmed, mixed with
    another and drowned in noise. The same on every machine. Returns Data."""
    generator = torch.Generator().manual_seed(0)
    def patterns(n):
        coarse = torch.randn(n, 3, 5, 5, generator=generator)
        return F.interpolate(coarse, 2 * size, mode="bicubic", align_corners=False).clamp(-2, 2)
    crops, splits = patterns(classes).unfold(2, size, 1).unfold(3, size, 1), []
    for per_class in train, test:
        labels = torch.arange(classes).repeat_interleave(per_class)
        n, middle, reach = len(labels), size // 2, size // 4
        top, left = torch.randint(middle - reach, middle + reach + 1, (n, 2), generator=generator).T
        x = crops[labels, :, top, left] * (0.6 + 0.4 * torch.rand(n, 1, 1, 1, generator=generator))
        x = x + 0.7 * patterns(n)[:, :, :size, :size] + 0.5 * torch.randn(x.shape, generator=generator)
        splits += [(128 + 40 * x).clamp(0, 255).to(torch.uint8), labels]
    return Data(*splits, [f"blob {i}" for i in range(classes)], f"synthetic {size}")

@contextlib.contextmanager
def published(root, folder, *errors):
    """Yields where published files are, `root` or our own folder in it, and whether they must be fetched."""
    absent = not (root / folder).exists()
    home = root / "pah-downloads" if absent else root
    problem = f"cannot fetch {folder}: put it into {root}" if absent else f"{root / folder}: damaged; move it"
    with explained(f"{problem}, or try --dataset synthetic", *errors), contextlib.redirect_stdout(sys.stderr):
        yield home, absent

def read_torchvision(name, root, size):
    """CIFAR-100 and MNIST; torchvision checks their MD5 sums. Greyscale becomes three equal channels."""
    from torchvision.datasets import CIFAR100, MNIST
    dataset, folder = (CIFAR100, "cifar-100-python") if name == "cifar100" else (MNIST, "MNIST")
    splits, errors = [], (RuntimeError, AssertionError, ValueError, EOFError, OSError)
    with published(root, folder, *errors) as (home, absent):
        for split in dataset(home, train=True, download=absent), dataset(home, train=False):
            x = torch.as_tensor(split.data)
            x = x.movedim(-1, 1) if x.ndim == 4 else x[:, None].expand(-1, 3, -1, -1)
            if x.shape[-1] != size:
                x = F.interpolate(x.float(), size, mode="bilinear", antialias=True).round().to(torch.uint8)
            splits.append((x, torch.as_tensor(split.targets)))
    return *splits, split.classes

def read_folder(name, root, size):
    """A folder with train/ and val/, one folder a class; or TinyImageNet, whose `val` has a list instead."""
    if name != "tinyimagenet":
        folder = Path(name).resolve()
        (classes, train), (others, test) = list_images(folder / "train"), list_images(folder / "val")
        odd = sorted(set(classes) ^ set(others))
        require(not odd, f"--dataset {name}: train/ and val/ differ in the classes {', '.join(odd[:5])}")
        return decode(train, size), decode(test, size), classes
    from torchvision.datasets.utils import download_and_extract_archive
    errors = OSError, RuntimeError, ValueError, KeyError, Problem
    with published(root, "tiny-imagenet-200", *errors) as (home, absent):
        if absent:
            download_and_extract_archive(TINY_URL, home, md5=TINY_MD5)
        folder = home / "tiny-imagenet-200"
        wnids, train = list_images(folder / "train")
        words = dict(line.split("\t")[:2] for line in (folder / "words.txt").read_text().splitlines())
        rows = [line.split()[:2] for line in (folder / "val/val_annotations.txt").read_text().splitlines()]
        test = [(folder / "val/images" / file, wnids.index(wnid)) for file, wnid in rows]
        require([len(train), len(test)] == TINY_COUNTS, f"{len(train)} and {len(test)} images")
        return decode(train, size), decode(test, size), [words[wnid].split(",")[0] for wnid in wnids]

def list_images(folder):
    """The classes, named by the folders in `folder`, and [(path, class number)] of their images, sorted."""
    from torchvision.datasets.folder import IMG_EXTENSIONS
    require(folder.is_dir(), f"--dataset {folder.parent}: no folder {folder.name}/ with one folder a class")
    classes, files = sorted(entry.name for entry in folder.iterdir() if entry.is_dir()), []
    for number, name in enumerate(classes):
        walk = os.walk(folder / name)  # follows links to a class, but none below it, which might lead back up
        paths = sorted(Path(path, file) for path, _, names in walk for file in names)
        images = [(path, number) for path in paths if path.name.lower().endswith(IMG_EXTENSIONS)]
        require(images, f"{folder / name}: no images in it")
        files += images
    for path, _ in files:  # not a pipe, nor a link to nowhere
        require(path.is_file(), f"{path}: {UNREADABLE}")
    return classes, files

def decode(files, size):
    """[(path, label)] -> uint8 (N, 3, size, size) and labels (N,). Turns images as their EXIF data say; crops
    to a square about the centre those of another shape."""
    from PIL import Image, ImageOps
    errors = OSError, ValueError, SyntaxError, Image.DecompressionBombError
    def read(path):
        with explained(f"{path}: {UNREADABLE}", *errors), Image.open(path) as image:
            if image.mode.startswith("I;16"):  # Pillow would clip 16-bit greys instead of scaling them
                image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
            image = ImageOps.exif_transpose(image).convert("RGB")
            if image.size != (size, size):
                image = ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC)
            return torch.from_numpy(np.array(image)).movedim(-1, 0)
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # Pillow lets go of the interpreter while it decodes
        images = torch.stack(list(pool.map(read, [path for path, _ in files])))
    return images, torch.tensor([label for _, label in files])

def split_tasks(data, tasks, seed=None, val_fraction=0.0):
    """Cut Data into a list of K = `tasks` Tasks of equally many classes, labels from 0 in each. A `seed`
    shuffles classes. `val_fraction` > 0 puts that part of each class's *training* images, always the same, in
    the test set's place, to choose hyper-parameters on. Raises Problem."""
    n = len(data.classes)
    fit = [d for d in range(1, n // 2 + 1) if n % d == 0]
    require(tasks in fit, f"--tasks {tasks}: {n} classes do not divide so, two or more each; {fit} would")
    generator = torch.Generator()
    order = torch.arange(n) if seed is None else torch.randperm(n, generator=generator.manual_seed(seed))
    generator, rows, test_rows = generator.manual_seed(0), [], []
    for c in range(n):
        rows.append(torch.nonzero(data.train_labels == c).flatten())
        test_rows.append(torch.nonzero(data.test_labels == c).flatten())
        if val_fraction:
            shuffled = rows[c][torch.randperm(len(rows[c]), generator=generator)]
            held_out = max(1, round(val_fraction * len(shuffled)))
            rows[c], test_rows[c] = shuffled[held_out:].sort().values, shuffled[:held_out].sort().values
        require(len(rows[c]) and len(test_rows[c]), f"{data.classes[c]!r} lacks training or test images")
    def pick(images, rows, members):
        labels = torch.cat([torch.full((len(rows[c]),), i) for i, c in enumerate(members)])
        index = torch.cat([rows[c] for c in members])
        if (index.diff() == 1).all():  # a view where it can be one: no second copy of a large data set
            index = slice(int(index[0]), int(index[-1]) + 1)
        return images[index], labels
    tests = data.train_images if val_fraction else data.test_images
    return [Task([data.classes[c] for c in members], *pick(data.train_images, rows, members),
                 *pick(tests, test_rows, members)) for members in order.view(tasks, -1).tolist()]
# ------------------------------ Results: checkpoints, pictures, tables
FORMAT = 3  # of checkpoints
SAME_RESULT = {"out", "data", "seeds", "resume", "device", "report", "format", "bench", "compile"}
def read_checkpoint(path):
    """All that a checkpoint says, and its model on the CPU. Nothing in the file can run code."""
    with explained(f"{path}: no checkpoint of this program, or damaged; delete it to start again", Exception):
        saved = torch.load(path, map_location="cpu", weights_only=True)
        require(saved["format"] == FORMAT, f"its format is {saved['format']}, not {FORMAT}")
        model = build(argparse.Namespace(**saved["args"] | {"pretrained": False, "compile": False}))
        model.load_state_dict(saved.pop("model"))
        summary(saved, model, complete=False)  # raises where anything is missing
        return saved, model

def load_checkpoint(path, device="cpu"):
    """The PAH that a run left behind, in eval mode: `load_checkpoint(path)(images, task)` gives logits."""
    return read_checkpoint(path)[1].to(device).eval()

def start_or_resume(args, seed, signature, folder, last):
    """A fresh model and the state of its run; or those that `folder` holds, if they are of the same run."""
    fresh = {"format": FORMAT, "args": vars(args), "seed": seed, "data": signature}
    if not (folder / "checkpoint.pt").exists():
        require(not (folder / "results.json").exists(), f"{folder} has only results: move them away")
        return build(args), fresh | {"accuracy": [], "class_incremental": [], "seconds": 0.0}
    saved, model = read_checkpoint(folder / "checkpoint.pt")
    there, now = (run["args"] | {"seed": run["seed"], "images": run["data"]} for run in (saved, fresh))
    may_differ = SAME_RESULT if args.joint else SAME_RESULT | {"stop_after"}
    differing = [f"--{name} {there.get(name)} there, {value} now".replace("_", "-")
                 for name, value in now.items() if name not in may_differ and there.get(name) != value]
    require(not differing, f"{folder} holds another run: {'; '.join(differing)}. Give another --out")
    done = f"{len(saved['accuracy'][-1])} of {last} tasks"
    require(args.resume, f"{folder} holds {done}: add --resume to go on, or give another --out")
    if RANK == 0:
        save(folder, saved, model)  # in case that results or pictures were lost
    return model, saved | {"args": vars(args)}

def save(folder, state, model):
    """The checkpoint first; it holds no head and no training image. Pictures last: they may fail."""
    from torchvision.utils import make_grid, save_image
    with written_whole(folder / "checkpoint.pt") as temporary:
        torch.save(state | {"model": model.state_dict()}, temporary)
    with written_whole(folder / "results.json") as temporary:
        temporary.write_text(json.dumps(state["result"], indent=1) + "\n")
    try:
        with written_whole(folder / "accuracy.png") as temporary:
            draw_accuracy(temporary, state["accuracy"])
        if model.head == "hyper":
            (mean, std), now = mean_and_std(model.prototypes.device), model.prototypes.detach()
            images = F.interpolate((now * std + mean).flatten(0, 1), scale_factor=4)
            with written_whole(folder / "prototypes.png") as temporary:  # a row a task
                save_image(make_grid(images, nrow=now.shape[1], pad_value=1), temporary, format="PNG")
    except Exception as error:
        print(f"{folder}: a picture could not be drawn ({one_line(error)})", file=sys.stderr)

def draw_accuracy(path, R):
    from PIL import Image, ImageDraw
    picture = Image.new("RGB", (max(280, 48 + 44 * len(R[-1])), 56 + 44 * len(R)), "white")
    draw, low, high = ImageDraw.Draw(picture), min(map(min, R)), max(map(max, R))
    draw.text((8, 8), f"AA {average_accuracy(R):.2f}   FM {forgetting(R):.2f}", "black", font_size=15)
    draw.text((8, 28), "accuracy in % on task (column) after task (row)", "black", font_size=11)
    for i, row in enumerate(R):
        draw.text((20, 69 + 44 * i), str(i + 1), "black", font_size=12, anchor="mm")
        for j, a in enumerate(row):
            x, y, share = 40 + 44 * j, 48 + 44 * i, (a - low) / max(high - low, 1)
            draw.rectangle((x, y, x + 42, y + 42), (255 - round(150 * share), 255 - round(90 * share), 255))
            draw.text((x + 21, y + 21), f"{a:.1f}", "black", font_size=13, anchor="mm")
    picture.save(path, format="PNG")

def summary(state, model, complete):
    R, joint, device = state["accuracy"], state["args"]["joint"], model.prototypes.device
    sizes = {name: sum(p.numel() for p in part.parameters()) for name, part in model.named_children()}
    sizes |= {"prototypes": model.prototypes.numel(), "prototypes_per_task": model.prototypes[0].numel()}
    kept = {name: state[name] for name in ("args", "seed", "accuracy", "class_incremental", "seconds")}
    return kept | {
        "complete": complete, "AA": average_accuracy(R), "FM": None if joint else forgetting(R),
        "BWT": None if joint else backward_transfer(R), "LA": None if joint else learning_accuracy(R),
        "processes": WORLD, "parameters": sizes, "peak_memory_bytes": peak_memory(device),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else f"cpu {torch.get_num_threads()}",
        "versions": {"python": sys.version[:6], "torch": str(torch.__version__), "numpy": np.__version__}}

def peak_memory(device):
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    with contextlib.suppress(ImportError):  # Windows
        import resource
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return 0

def mean_std(values):
    return f"{np.mean(values):.2f}" + (f" ± {np.std(values, ddof=1):.2f}" if len(values) > 1 else "")

# Table 1 of the paper, which took its rows from other papers: AA and FM on Split-CIFAR100 and TinyImageNet.
REPORTED = """
GCR, 200 stored images | 64.24 ± 0.83 | 24.12 ± 1.17 | 42.11 ± 1.01 | 40.36 ± 1.08
DER, 200 stored images | 63.09 ± 1.09 | 25.98 ± 1.55 | 42.27 ± 0.90 | 40.43 ± 1.05
CCLIS, 200 stored images | 72.93 ± 0.46 | 14.17 ± 0.20 | 48.29 ± 0.78 | 33.20 ± 0.75
SI | 63.58 ± 0.37 | 27.98 ± 0.34 | 44.96 ± 2.41 | 26.29 ± 1.40
A-GEM, 200-250 stored images | 59.81 ± 1.07 | 30.08 ± 0.91 | 60.45 ± 0.24 | 24.94 ± 1.24
PNN | 66.58 ± 1.00 | - | 62.15 ± 1.35 | -
HN-2, 200-400 stored images | 62.80 ± 1.60 | 4.10 ± 0.50 | 39.90 ± 0.40 | 10.20 ± 2.20
HN-3, 200-400 stored images | 58.80 ± 1.00 | 7.40 ± 0.90 | 31.40 ± 1.80 | 5.20 ± 0.70
PAH | 74.46 ± 0.08 | 1.71 ± 0.02 | 63.65 ± 1.94 | 4.43 ± 0.07
""".strip().splitlines()

def report(folder, style="text"):
    """Print a table of all finished runs below `folder`: a row a setting, named by options that are not the
    default, mean ± deviation over seeds; above them what the paper reports on their data sets."""
    settings = {}
    for path in sorted(Path(folder).rglob("results.json")):
        try:
            result = json.loads(path.read_text() if path.is_file() else "")
            args, seed = result["args"], int(result["seed"])
            name = [f"{Path(args['dataset']).name}, {args['tasks']} tasks", *options_named(args)]
            row = [result[key] for key in ("AA", "FM", "LA")]
            row += [result["class_incremental"][-1], result["seconds"]]
            require(result["complete"] is True and all(math.isfinite(v or 0) for v in row), "unfinished")
            seeds = settings.setdefault((" ".join(name), str(args["precision"])), {})
            require(seed not in seeds, f"seed {seed} of this setting is counted already")
            seeds[seed] = row
        except Exception as error:  # whatever else lies there under this name
            print(f"left out: {path} ({one_line(error)})", file=sys.stderr)
    require(settings, f"--report {folder}: no finished results.json in or below it")
    rows = [["setting", "precision", "AA", "FM", "LA", "class-inc.", "seeds", "time"]]
    for column, dataset in (0, "cifar100"), (2, "tinyimagenet"):
        for line in REPORTED if any(name.startswith(f"{dataset},") for name, _ in settings) else []:
            name, *cells = line.split(" | ")
            rows.append([f"{dataset}: {name} (reported)", "-", *cells[column:column + 2], *4 * ["-"]])
    for setting, seeds in settings.items():
        *metrics, seconds = zip(*seeds.values())
        numbers, cells = " ".join(map(str, seeds)), ["-" if None in m else mean_std(m) for m in metrics]
        rows.append([*setting, *cells, numbers, str(timedelta(seconds=round(np.mean(seconds))))])
    if style == "latex":
        special = str.maketrans({c: "\\" + c for c in "&%$#_{}"} | {"±": r"$\pm$"})
        rows = [[cell.translate(special).replace("--", "-{}-") for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows)]
    if style == "markdown":
        rows.insert(1, ["-" * width for width in widths])
    borders = {"text": ("", "  ", ""), "markdown": ("| ", " | ", " |"), "latex": ("", " & ", r" \\")}
    left, gap, right = borders[style]
    for row in rows:
        print((left + gap.join(map(str.ljust, row, widths)) + right).rstrip())
# ------------------------------ Speed
def bench(args, task):
    """Print the time of a training step at several tasks, and of a run. Any `task` will do."""
    K, seconds, ticks, model = args.tasks, {}, [], build(args).to(args.device)
    batch = min(args.batch_size, len(task.train_images))
    images, labels = task.train_images[:batch].repeat(20, 1, 1, 1), task.train_labels[:batch].repeat(20)
    for k in range(K):
        model.begin_task(k, images, labels, "random")
    def tick(step, steps, batch, losses):
        losses[step - 1].tolist()  # waits for a GPU
        ticks.append(time.perf_counter())
    for k in sorted({0, min(1, K - 1), (K - 1) // 2, K - 1}):
        ticks.clear()
        short = argparse.Namespace(**vars(args) | {"epochs": 1})  # twenty steps
        train_task(model, loss_of_task(model, k, args), images, labels, short, tick)
        seconds[k] = (ticks[-1] - ticks[4]) / 15
        print(f"task {k + 1:<4}{1000 * seconds[k]:>9.1f} ms a step {batch / seconds[k]:>9,.0f} images/s")
    steps = len(task.train_images) // batch * args.epochs + (K + 1) / 2 * len(task.test_images) / batch / 4
    whole = steps * sum(np.interp(range(K), list(seconds), list(seconds.values())))
    print(f"peak memory: {peak_memory(model.prototypes.device) / 2**30:.2f} GiB\n"
          f"predicted: {timedelta(seconds=round(whole))} for {K} tasks of {args.epochs} epochs, a seed")
# ------------------------------ Command line
DEFAULTS = {"mnist": dict(tasks=5, epochs=2, width=16, augment="crop"),  # easy images: this suffices
            "synthetic": dict(tasks=5, epochs=8, width=16, lr=0.01)}

def number(kind, low, high):
    def number(text):  # argparse says this name where `kind` fails
        if not low <= kind(text) <= high:
            raise argparse.ArgumentTypeError(f"{text} is not between {low:g} and {high:g}")
        return kind(text)
    return number

def make_parser(dataset="cifar100", optimizer="muon"):
    count, rate = number(int, 1, 100_000), number(float, 1e-12, 1000)
    weight, part = number(float, 0, 1000), number(float, 0, 0.9)
    p = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False)
    p.error = functools.partial(require, False)  # one line, without the usage
    add = p.add_argument
    add("--dataset", default="cifar100", help="cifar100, tinyimagenet, mnist, synthetic, or a folder")
    add("--data", default="data", help="folder of published files and caches")
    add("--tasks", type=count, default=10, help="their number K (mnist, synthetic: 5)")
    add("--image-size", type=number(int, 8, 1024), help="side in pixels (None: the data set's own)")
    add("--shuffle-classes", action="store_true", help="order of classes by seed instead of by label")
    add("--val-fraction", type=part, default=0.0, help="evaluate on this part of the training images instead")
    add("--stop-after", type=count, help="stop after so many of the tasks")
    add("--lam", type=weight, default=1.0, help="weight of L_sm (Eq. 5)")
    add("--mu", type=weight, default=1.0, help="weight of L_sp (Eq. 6)")
    add("--sp-tasks", type=number(int, 0, 100_000), default=0, help="L_sp from so many drawn tasks; 0: all")
    add("--sp-updates", choices=("prototypes", "all"), default="prototypes", help="what L_sp moves")
    add("--temperature", type=rate, default=2.0, help="of the distillation")
    add("--proto-size", type=number(int, 1, 256), default=10, help="side of a prototype")
    add("--proto-init", choices=("semantic", "random"), default="semantic", help="an image, or noise")
    add("--hidden", type=count, default=64, help="width of the hypernetwork's hidden layers")
    add("--head", choices=("hyper", "vector", "stored"), default="hyper", help="what a head is made from")
    add("--joint", action="store_true", help="control: all tasks at once, the upper bound")
    add("--stem", choices=("3x3", "7x7"), default="3x3", help="7x7: stride 2 and max-pool, cheaper")
    add("--width", type=number(int, 1, 1024), default=64, help="D is 8 times this (mnist, synthetic: 16)")
    add("--pretrained", action="store_true", help="ImageNet weights; needs --stem 7x7 --width 64")
    add("--epochs", type=count, default=30, help="of each task (mnist: 2, synthetic: 8)")
    add("--batch-size", type=number(int, 2, 100_000), default=64, help="of all processes together")
    add("--optimizer", choices=("muon", "adamw"), default="muon", help="of the backbone's filters")
    add("--lr", type=rate, default=0.02 if optimizer == "muon" else 0.002, help="(synthetic: 0.01)")
    add("--hyper-lr", type=rate, default=1e-4, help="of the hypernetwork")
    add("--proto-lr", type=rate, default=2e-4, help="of the prototypes")
    add("--weight-decay", type=weight, default=0.005, help="of filters, hypernetwork and stored heads")
    add("--augment", choices=("crop-flip", "crop", "none"), default="crop-flip", help="(mnist: crop)")
    add("--seeds", type=number(int, 0, 2**31), nargs="+", default=[0], help="one after the other")
    add("--device", choices=("cpu", "cuda"), help="None: cuda if there is one")
    add("--precision", choices=("auto", "fp32", "bf16", "fp16"), default="auto", help="of the backbone")
    add("--compile", action="store_true", help="torch.compile the backbone")
    add("--out", help="default: runs/<dataset>-<tasks>-<options that are not the default>")
    add("--resume", action="store_true", help="go on from the last finished task")
    add("--bench", action="store_true", help="instead of a run: time a step, and predict the run's")
    add("--report", help="instead of a run: print a table of all finished runs below this folder")
    add("--format", choices=("text", "markdown", "latex"), default="text", help="of --report")
    p.set_defaults(**DEFAULTS.get(dataset, {}))
    return p

def options_named(args):
    """The options that are not the default, as one types them."""
    default = make_parser(args["dataset"], args["optimizer"]).get_default
    unsaid = SAME_RESULT | {"dataset", "tasks", "precision", "classes"}
    given = [(name, value) for name, value in args.items() if name not in unsaid and value != default(name)]
    return [f"--{name.replace('_', '-')}" + ("" if value is True else f" {value}") for name, value in given]

def parse_args(argv=None):
    given = make_parser().parse_known_args(argv)[0]
    args = make_parser(given.dataset, given.optimizer).parse_args(argv)
    args.dataset = args.dataset if args.dataset in SIZES else os.path.normpath(args.dataset)
    name = f"{Path(args.dataset).resolve().name}-{args.tasks}" + "".join(options_named(vars(args)))
    args.out = args.out or "runs/" + name.replace("--", "-").replace(" ", "-")[:200]
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    require(args.device == "cpu" or torch.cuda.is_available(), "--device cuda: there is none here")
    if args.precision == "auto":
        on_cpu = getattr(torch.cpu, "_is_avx512_bf16_supported", bool)
        bf16 = torch.cuda.is_bf16_supported() if args.device == "cuda" else on_cpu()
        args.precision = "bf16" if bf16 else "fp16" if args.device == "cuda" else "fp32"
    require(not args.pretrained or (args.stem, args.width) == ("7x7", 64),
            "--pretrained: needs --stem 7x7 and --width 64, the network whose weights torchvision has")
    require((args.stop_after or 1) <= args.tasks, f"--stop-after {args.stop_after}: of {args.tasks} tasks")
    require(args.batch_size % WORLD == 0 and args.batch_size >= 2 * WORLD,
            f"--batch-size {args.batch_size}: {WORLD} processes must share it evenly, two or more each")
    return args

def locked(folder):
    """An open file: while it is open, however the process ends, no other run can have `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    handle = open(folder / ".pah-lock", "w")
    with contextlib.suppress(ImportError, OSError):  # Windows, or a file system without locks
        import fcntl
        with explained(f"{folder}: another run is writing there; give another --out", BlockingIOError):
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return handle

def run(args):
    if args.report:
        return report(args.report, args.format)
    if WORLD > 1:
        if args.device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        torch.distributed.init_process_group("nccl" if args.device == "cuda" else "gloo")
    data, results = load_dataset(args.dataset, args.data, args.image_size), []
    for i, seed in enumerate(dict.fromkeys(args.seeds)):
        tasks = split_tasks(data, args.tasks, seed if args.shuffle_classes else None, args.val_fraction)
        args.classes, fewest = len(tasks[0].classes), min(len(task.train_images) for task in tasks)
        require(fewest >= 2 * WORLD, f"--tasks {args.tasks}: one has {fewest} images; {2 * WORLD} are needed")
        if args.bench:
            return bench(args, tasks[0])
        folder = Path(args.out) / f"seed{seed}"
        print(f"{args.tasks} tasks of {args.classes} classes, {args.device}, {args.precision}: {folder}")
        with contextlib.nullcontext() if RANK else locked(folder):
            result = learn(args, seed, tasks, data.signature, seeds_after=len(args.seeds) - 1 - i)
        results.append({key: result[key] for key in ("AA", "FM", "BWT", "LA") if result[key] is not None})
        print(*[f"{key} {value:.2f} " for key, value in results[-1].items()],
              timedelta(seconds=round(result["seconds"])))
    if len(results) > 1:
        spread = [f"{key} {mean_std([metrics[key] for metrics in results])}" for key in results[0]]
        print(len(results), "seeds:", ", ".join(spread))

def main(argv=None):
    """Returns the exit code: 0, 2 for what the user can put right, 130 after Ctrl-C."""
    if RANK or sys.stdout is None:  # under torchrun one process speaks
        sys.stdout = open(os.devnull, "w")
    with contextlib.suppress(OSError, AttributeError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt  # glibc: keep freed memory; anew it takes up to a third of a step
        mallopt(-4, 0)
        mallopt(-1, 2**31 - 1)
    torch.backends.cudnn.benchmark = True
    try:
        run(parse_args(argv))
        sys.stdout.flush()
        return 0
    except KeyboardInterrupt:
        print("\nstopped; finished tasks are saved: the same command with --resume goes on", file=sys.stderr)
        return 130
    except (Problem, OSError, MemoryError, RuntimeError) as error:
        message = str(error) if isinstance(error, Problem) else one_line(error)
        if isinstance(error, RuntimeError) and "memory" not in message:
            raise
        if isinstance(error, (MemoryError, RuntimeError)):
            message = f"out of memory ({message}); try a smaller --batch-size or --width"
        print(f"pah.py: {f'process {RANK}: ' if RANK else ''}{message}", file=sys.stderr)
        return 2
    finally:
        if WORLD > 1 and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()

if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # run_all.sh and Slurm stop a run: like Ctrl-C
    sys.exit(main())
