"""Other methods under the protocol of pah.py: the same data, backbone, training and evaluation.

    python examples/baselines.py lwf --dataset synthetic --tasks 5 --width 16 --epochs 8
    python examples/baselines.py derpp --width 16 --image-size 24 --epochs 10 --seeds 0 1

A method is a class with begin_task, losses and forward, and after_step and end_task where it needs
them. `pah.learn` trains it like PAH. The default strengths and optimizers were chosen on validation
images: see assets/notebook.md.
"""

import copy
import json
import math
import sys
from pathlib import Path

import extensions
import torch
import torch.nn.functional as F
from extensions import pah
from torch import nn

FISHER_IMAGES = 500  # of each task
UPRIGHT = extensions.RotatedLabels.upright


def flat(tensors):
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


def with_gradient(loss, weights, gradient):
    """The value of `loss`, but `gradient`, flat, is its gradient for `weights`."""
    linear = flat(weights) @ gradient
    return loss.detach() + linear - linear.detach()


class MultiHead(nn.Module):
    """Finetuning: a backbone and a stored head for each task. Most methods start from it.

    What must outlive a task is a parameter or a buffer, so that checkpoints hold it. `flags` are
    the options of NOT_ALL that a method accepts, `defaults` those whose default is not pah.py's.
    A method with `own_gradients` differentiates its losses itself, unscaled.
    """

    strength = None
    flags = ("stem", "pretrained")
    defaults = {}
    own_gradients = False
    frozen = ()  # modules that no longer learn
    features = pah.PAH.features
    forward = pah.PAH.forward

    def __init__(self, args, tasks, backbone=None, dim=None):
        super().__init__()
        self.backbone = backbone or pah.make_backbone(args)
        self.dtype = pah.DTYPES[args.precision]
        self.strength = args.strength
        self.num_classes = sum(len(task.classes) for task in tasks)
        dim = dim or pah.feature_dim(self.backbone, tasks[0].train_images.shape[-1])
        shape = self.limits = (len(tasks), max(len(task.classes) for task in tasks))
        self.stored_heads = nn.Parameter(torch.empty(*shape, dim).uniform_(-1, 1) / math.sqrt(dim))
        self.register_buffer("present", torch.zeros(shape, dtype=torch.bool))

    def begin_task(self, task, images, labels):
        self.present[task, labels.unique()] = True

    def heads(self, n):
        return self.stored_heads[:n]

    def losses(self, images, labels, task, teacher):
        return {"ce": F.cross_entropy(self(images, task + 1)[:, task], labels)}

    def train(self, mode=True):
        super().train(mode)
        for module in self.frozen:
            module.eval().requires_grad_(False)
        return self

    def stored(self):
        """What is there after all tasks: numbers, and images of a memory."""
        others = [b.numel() for b in self.buffers(recurse=False) if b.is_floating_point()]
        images = 0
        if hasattr(self, "memory"):
            images = self.memory.filled
            others.append(self.memory.logits.numel())
        weights = sum(p.numel() for p in self.parameters())
        return {"weights": weights, "other numbers": sum(others), "images": images}


class OfPAH:
    """What the command line needs to know of classes derived from PAH."""

    strength = None
    defaults = {}
    own_gradients = False
    flags = ("stem", "pretrained", "lam", "mu", "temperature", "proto_size", "proto_init")
    flags += ("hidden", "hyper_lr", "proto_lr")
    stored = MultiHead.stored


class PAH(OfPAH, pah.PAH):
    """PAH as in pah.py, for --optimizer."""


class Rehearsal(OfPAH, extensions.Rehearsal):
    """PAH with prototypes in the batch (ours)."""


class Thumbnails(OfPAH, extensions.Thumbnails):
    """Rehearsal with stored heads and fixed thumbnails (ours)."""

    flags = ("stem", "pretrained", "lam", "mu", "temperature", "proto_size", "proto_init")


class Rotated(OfPAH, extensions.Rotated):
    """PAH with rotated labels (ours)."""

    flags = (*OfPAH.flags, "upright")


class LwF(MultiHead):
    """Learning without Forgetting (Li and Hoiem 2016): L_hm and L_sm of PAH with stored heads."""

    flags = (*MultiHead.flags, "lam", "temperature")

    def __init__(self, args, tasks):
        super().__init__(args, tasks)
        self.lam, self.temperature = args.lam, args.temperature

    def losses(self, images, labels, task, teacher):
        logits = self(images, task + 1)
        terms = {"hm": F.cross_entropy(logits[:, task], labels)}
        if teacher is not None:
            soft_main = pah.soft_loss_main(logits[:, :task], teacher, images, self.temperature)
            terms["sm"] = self.lam * soft_main
        return terms


class RotatedLwF(extensions.RotatedLabels, LwF):
    """LwF with rotated labels (Lee et al. 2020)."""

    flags = (*LwF.flags, "upright")


class Joint(OfPAH, pah.PAH):
    """All tasks at once, the upper bound. Labels are task * C + class: see `joined`."""

    flags = ("stem", "pretrained", "proto_size", "proto_init", "hidden", "hyper_lr", "proto_lr")

    def __init__(self, backbone, num_tasks, classes, **options):
        super().__init__(backbone, num_tasks, classes, **options)
        self.limits = num_tasks, num_tasks * classes

    def begin_task(self, task, images, labels):
        classes = self.present.shape[1]
        for k in range(task + 1):
            own = labels // classes == k
            super().begin_task(k, images[own], labels[own] % classes)

    def losses(self, images, labels, task, teacher):
        logits = self(images, task + 1)
        tasks, labels = labels // logits.shape[2], labels % logits.shape[2]
        rows = torch.arange(len(labels), device=labels.device)
        return {"ce": F.cross_entropy(logits[rows, tasks], labels)}


def joined(tasks):
    """The same tasks, but the last one has the training images of all of them."""
    classes = max(len(task.classes) for task in tasks)
    images = torch.cat([task.train_images for task in tasks])
    labels = torch.cat([task.train_labels + k * classes for k, task in enumerate(tasks)])
    return [*tasks[:-1], tasks[-1]._replace(train_images=images, train_labels=labels)]


# -----------------------------------------------------------------------------
# Weight regularisation


class EWC(MultiHead):
    """Elastic weight consolidation (Kirkpatrick et al. 2017): adds strength / 2 * the sum over
    earlier tasks t of F_t (w - w_t)^2, where F_t is the diagonal of the Fisher information at the
    end of task t.

    Up to a constant, these parabolas add up to one around the mean of all w_t weighted by F_t.
    """

    strength = 100.0
    own_gradients = True

    def __init__(self, args, tasks):
        super().__init__(args, tasks)
        self.register_buffer("fisher", torch.zeros_like(flat(self.parameters())))
        self.register_buffer("anchor", torch.zeros_like(self.fisher))

    def losses(self, images, labels, task, teacher):
        terms = super().losses(images, labels, task, teacher)
        away = flat(self.parameters()) - self.anchor
        terms["ewc"] = self.strength / 2 * (self.fisher @ away**2)
        return terms

    def end_task(self, task, images, labels):
        self.eval()
        fisher = torch.zeros_like(self.fisher)
        rows = torch.randperm(len(images))[:FISHER_IMAGES].to(images.device)
        chosen = pah.normalise(images[rows])
        with torch.no_grad():
            logits = self(chosen, task + 1)[:, task]
        drawn = torch.distributions.Categorical(logits=logits).sample()  # not the true labels
        for image, label in zip(chosen.split(1), drawn.split(1), strict=True):
            loss = F.cross_entropy(self(image, task + 1)[:, task], label)
            fisher += flat(torch.autograd.grad(loss, list(self.parameters()))) ** 2 / len(rows)
        self.fisher += fisher
        self.anchor.lerp_(flat(self.parameters()).detach(), fisher / self.fisher.clamp(min=1e-30))


class SI(MultiHead):
    """Synaptic intelligence (Zenke et al. 2017): adds strength * importance * (w - anchor)^2.

    Importance is how much the path of a weight lowered the task's own loss, which is minus the
    integral of gradient dw, over the square of the distance it moved.
    """

    strength = 0.1
    own_gradients = True
    damping = 1e-3  # xi

    def __init__(self, args, tasks):
        super().__init__(args, tasks)
        self.register_buffer("anchor", flat(self.parameters()).detach().clone())
        for name in ("importance", "path"):
            self.register_buffer(name, torch.zeros_like(self.anchor))

    def losses(self, images, labels, task, teacher):
        weights = list(self.parameters())
        loss = super().losses(images, labels, task, teacher)["ce"]
        self.gradient = flat(torch.autograd.grad(loss, weights))
        self.before = flat(weights).detach()
        pull = 2 * self.strength * self.importance * (self.before - self.anchor)
        return {"ce": with_gradient(loss, weights, self.gradient + pull)}

    def after_step(self, task, images, labels):
        self.path -= self.gradient * (flat(self.parameters()).detach() - self.before)

    def end_task(self, task, images, labels):
        now = flat(self.parameters()).detach()
        self.importance += (self.path / ((now - self.anchor) ** 2 + self.damping)).clamp(min=0)
        self.anchor.copy_(now)
        self.path.zero_()


# -----------------------------------------------------------------------------
# Stored images


class Memory(nn.Module):
    """A few images with their tasks, labels, weights and, if asked for, logits (K, C)."""

    def __init__(self, size, tasks, classes, with_logits):
        super().__init__()
        image = tasks[0].train_images[0]
        self.of_task = classes
        self.register_buffer("images", torch.zeros(size, *image.shape, dtype=torch.uint8))
        self.register_buffer("logits", torch.zeros(size if with_logits else 0, len(tasks), classes))
        self.register_buffer("weights", torch.ones(size))
        for name in ("tasks", "labels"):
            self.register_buffer(name, torch.zeros(size, dtype=torch.long))
        self.filled, self.seen = 0, 0  # on the CPU, so that no step waits for a GPU

    def get_extra_state(self):
        """For checkpoints."""
        return torch.tensor([self.filled, self.seen])

    def set_extra_state(self, state):
        self.filled, self.seen = state.tolist()

    def put(self, rows, **what):
        for name, values in what.items():
            getattr(self, name)[rows] = values

    def classes(self, rows):
        """Labels of all tasks together: task * C + label."""
        return self.tasks[rows] * self.of_task + self.labels[rows]

    def draw(self, n):
        """n different random rows, or all where there are fewer."""
        return torch.randperm(self.filled, device=self.labels.device)[:n]

    def offer(self, images, labels, logits, task):
        """Reservoir sampling (Vitter 1985): all images ever offered are equally likely to stay."""
        count = self.seen + 1 + torch.arange(len(images))
        slots = (torch.rand(len(count)) * count).long()
        slots = torch.where(count <= len(self.images), count - 1, slots)
        taken = {slot: i for i, slot in enumerate(slots.tolist()) if slot < len(self.images)}
        chosen = torch.tensor([list(taken), list(taken.values())], dtype=torch.long)
        rows, new = chosen.to(images.device, non_blocking=True)
        self.put(rows, images=images[new], labels=labels[new], logits=logits[new], tasks=task)
        self.seen += len(images)
        self.filled = min(self.seen, len(self.images))


class Replay(MultiHead):
    """Finetuning with a memory of images.

    An image is classified by the head of its own task alone, and its stored logits are those under
    the heads of its own and of earlier tasks. DER, DER++ and GCR were published with one head for
    all classes.
    """

    flags = (*MultiHead.flags, "buffer_size")
    defaults = {"optimizer": "sgd"}
    every_class = False  # whether the memory must hold an image of each class
    with_logits = False  # whether it holds logits

    def __init__(self, args, tasks):
        super().__init__(args, tasks)
        if self.every_class and args.buffer_size < self.num_classes:
            raise pah.UserError(
                f"--buffer-size {args.buffer_size}: {args.method} stores an image of each class, "
                f"and there are {self.num_classes}"
            )
        of_task = self.present.shape[1]
        self.memory = Memory(args.buffer_size, tasks, of_task, self.with_logits)
        self.augmentation = pah.AUGMENTATIONS[args.augment]

    def augmented(self, images):
        return images if self.augmentation is None else self.augmentation(images)

    def every_logit(self, images):
        """Logits (B, K, C) of normalised images with the heads of all tasks."""
        return self(images, len(self.present))

    def replay(self, rows):
        """Logits (B, K, C) of stored images."""
        return self.every_logit(pah.normalise(self.augmented(self.memory.images[rows])))

    def cross_entropies(self, rows):
        """Of stored images, each with the head of its own task: (B,)."""
        of_image = torch.arange(len(rows), device=rows.device)
        logits = self.replay(rows)[of_image, self.memory.tasks[rows]]
        return F.cross_entropy(logits, self.memory.labels[rows], reduction="none")

    def features_of(self, images):
        return torch.cat([self.features(pah.normalise(x)) for x in images.split(500)])

    def distances(self, rows):
        """Squared distances of the logits of stored images to those in the memory, summed over the
        classes of their task and of earlier ones, over C: (B,)."""
        tasks = torch.arange(len(self.present), device=rows.device)
        known = (tasks <= self.memory.tasks[rows][:, None])[:, :, None] & self.present
        squares = (self.replay(rows) - self.memory.logits[rows]).square() * known
        return squares.sum((1, 2)) / self.present.shape[1]


def projected(gradient, reference):
    """`gradient` without what points against `reference`, if anything does (Eq. 11 of A-GEM)."""
    return gradient - (gradient @ reference / (reference @ reference)).clamp(max=0) * reference


class AGEM(Replay):
    """Averaged gradient episodic memory (Chaudhry et al. 2019): stores some images of each class,
    and no gradient may raise the loss on `strength` of them. The classes so far share the memory;
    its authors reserve a part for classes to come."""

    strength = 200.0
    own_gradients = True
    every_class = True

    def losses(self, images, labels, task, teacher):
        terms = super().losses(images, labels, task, teacher)
        rows = self.memory.draw(int(self.strength))
        if len(rows) == 0:
            return terms
        weights = list(self.parameters())
        stored = self.cross_entropies(rows).mean()
        gradient = flat(torch.autograd.grad(terms["ce"], weights))
        reference = flat(torch.autograd.grad(stored, weights))
        return {"ce": with_gradient(terms["ce"], weights, projected(gradient, reference))}

    def end_task(self, task, images, labels):
        memory, rows = self.memory, slice(self.memory.filled)
        share, rest = divmod(len(memory.images), int(self.present.sum()))
        order = torch.randperm(len(labels)).to(labels.device)
        images = torch.cat([memory.images[rows], images[order]])
        labels = torch.cat([memory.labels[rows], labels[order]])
        tasks = torch.full_like(labels, task)
        tasks[rows] = memory.tasks[rows]
        of_class = tasks * self.present.shape[1] + labels
        kept = []
        for i, c in enumerate(of_class.unique()):  # the oldest classes share what is left over
            kept.append(torch.nonzero(of_class == c).flatten()[: share + (i < rest)])
        kept = torch.cat(kept)
        memory.put(slice(len(kept)), images=images[kept], labels=labels[kept], tasks=tasks[kept])
        memory.filled = len(kept)


class DER(Replay):
    """Dark experience replay (Buzzega et al. 2020): adds strength * the squared distance between
    the logits of stored images and those they had when the reservoir took them. Images are stored
    as they are and augmented anew."""

    strength = 0.1
    beta = 0.0
    with_logits = True

    def losses(self, images, labels, task, teacher):
        memory = self.memory
        logits = self.every_logit(images)
        terms = {"ce": F.cross_entropy(logits[:, task], labels)}
        if memory.filled:
            rows = memory.draw(len(images))
            terms["der"] = self.strength * self.distances(rows).mean()
        if memory.filled and self.beta:
            rows = memory.draw(len(images))
            terms["er"] = self.beta * self.cross_entropies(rows).mean()
        self.logits = logits.detach()
        return terms

    def after_step(self, task, images, labels):
        self.memory.offer(images, labels, self.logits, task)


class DERFresh(DER):
    """DER with logits computed again when the network has learned their task (ours)."""

    @torch.no_grad()
    def end_task(self, task, images, labels):
        self.eval()
        memory = self.memory
        rows = torch.nonzero(memory.tasks[: memory.filled] == task).flatten()
        memory.put(rows, logits=self.every_logit(pah.normalise(memory.images[rows])))


class DERpp(DER):
    """DER++: also adds beta * the cross-entropy on stored images."""

    beta = 0.5


def matching(gradients, target, n, ridge=0.5):
    """Regularised orthogonal matching pursuit: n rows with weights > 0 that add up to `target`."""
    chosen, weights, residual = [], target[:0], target
    while len(chosen) < min(n, len(gradients)):
        gain = gradients @ residual
        gain[chosen] = -torch.inf
        chosen.append(int(gain.argmax()))
        basis = gradients[chosen]
        gram = basis @ basis.T + ridge * torch.eye(len(chosen), device=basis.device)
        weights = torch.linalg.solve(gram, basis @ target).clamp(min=1e-3)
        residual = target - weights @ basis
    return chosen, weights


def candidates_of(logits, labels, n):
    """Random rows, about n in all, of each class alike, first of those classified correctly."""
    right = logits.argmax(1) == labels
    order = torch.randperm(len(labels)).to(labels.device)
    order = order[torch.argsort(~right[order], stable=True)]  # the right ones first
    classes = labels.unique()
    per_class = [order[labels[order] == c][: math.ceil(n / len(classes))] for c in classes]
    return torch.cat(per_class)


class GCR(Replay):
    """Gradient coreset replay (Tiwari et al. 2022), without its optional contrastive term: DER++ on
    weighted images, chosen after each task so that, for each class, their weighted gradient for the
    heads is close to that of all candidates.

    Candidates are the stored images and about as many new ones as the memory holds, classified
    correctly where there are enough, as in the authors' code: the images that match a whole task
    best are its outliers. Logits are those at the task's end, so none of its images is replayed
    while it is learned.
    """

    strength = 1.0
    beta = 0.5
    every_class = with_logits = True

    def losses(self, images, labels, task, teacher):
        terms, memory = super().losses(images, labels, task, teacher), self.memory
        if memory.filled:
            a, b = memory.draw(len(images)), memory.draw(len(images))
            distances = self.distances(a)
            losses = self.cross_entropies(b)
            weights_a, weights_b = memory.weights[a], memory.weights[b]
            terms["der"] = self.strength * (weights_a @ distances) / weights_a.sum()
            terms["er"] = self.beta * (weights_b @ losses) / weights_b.sum()
        return terms

    @torch.no_grad()
    def end_task(self, task, images, labels):
        self.eval()
        memory, kept = self.memory, []
        logits = torch.cat([self.every_logit(pah.normalise(x)) for x in images.split(500)])
        rows = candidates_of(logits[:, task], labels, len(memory.images))
        weights = torch.ones(len(rows), device=images.device)
        candidates = {task: (images[rows], labels[rows], logits[rows], weights)}
        for t in range(task):
            rows = torch.nonzero(memory.tasks[: memory.filled] == t).flatten()
            columns = (memory.images, memory.labels, memory.logits, memory.weights)
            candidates[t] = [column[rows] for column in columns]
        share, rest = divmod(len(memory.images), int(self.present.sum()))
        for t, (x, y, stored, weights) in sorted(candidates.items()):
            gradients = self.head_gradients(t, x, y, stored)
            for c in y.unique().tolist():
                own = torch.nonzero(y == c).flatten()
                n = share
                if rest > 0:  # the oldest classes share what is left over
                    n, rest = n + 1, rest - 1
                chosen, new = slice(None), weights[own]  # all of them, where there are so few
                if n < len(own):
                    chosen, new = matching(gradients[own], weights[own] @ gradients[own], n)
                chosen = own[chosen]
                kept.append((x[chosen], y[chosen], stored[chosen], new, torch.full_like(chosen, t)))
        names = ("images", "labels", "logits", "weights", "tasks")
        for name, parts in zip(names, zip(*kept, strict=True), strict=True):
            memory.put(slice(sum(map(len, parts))), **{name: torch.cat(parts)})
        memory.filled = sum(len(labels) for _, labels, *_ in kept)

    def head_gradients(self, task, images, labels, stored):
        """Of each image's replayed loss, for the heads of its task and of earlier ones:
        (N, (task + 1) * C * D). `stored` (N, K, C) are its logits in the memory."""
        present = self.present[: task + 1]
        features = self.features_of(images)
        logits = torch.einsum("bd,ncd->bnc", features, self.heads(task + 1))
        logits = logits.masked_fill(~present, pah.ABSENT)
        away = (logits - stored[:, : task + 1]) * present
        slope = self.strength * 2 / present.shape[1] * away
        own = logits[:, task].softmax(1) - F.one_hot(labels, logits.shape[2])
        slope[:, task] += self.beta * own
        return (slope.flatten(1)[:, :, None] * features[:, None]).flatten(1)


class CCLIS(Replay):
    """Contrastive continual learning with importance sampling (Li et al. 2024): features are
    learned by a contrastive loss between learnable vectors, one for each class, and images; the
    heads by cross-entropy at the end of each task, on its images and the stored ones.

    Adds strength * the cross-entropy between how old and new model distribute each image among the
    old classes. Images that lie close to other classes are stored more often and weighted less.

    Its authors train for 500 epochs, then 100 per task, and one head for all classes. Here all
    tasks have --epochs and heads of their own, and the vectors have Adam. Weights apply to old
    images under old classes alone: with ten classes in a task the authors' code weights all, as it
    takes tasks to have two.
    """

    strength = 0.6
    flags = (*Replay.flags, "proto_lr")
    defaults = {"proto_lr": 0.01}
    every_class = True
    temperature, old_temperature, new_temperature = 0.5, 0.1, 0.2

    def __init__(self, args, tasks):
        super().__init__(args, tasks)
        dim = self.stored_heads.shape[2]
        self.stored_heads.requires_grad_(False)
        self.projector = nn.Sequential(nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, 128))
        # a vector per class, under the name that has --proto-lr
        self.prototypes = nn.Parameter(torch.randn(*self.limits, 128))

    def begin_task(self, task, images, labels):
        super().begin_task(task, images, labels)
        self.new_images = len(images)

    def cosines(self, features, n):
        """Of projected features (B, D) and the vectors of n tasks: (B, n * C)."""
        projected = F.normalize(self.projector(features), dim=1)
        cosines = projected @ F.normalize(self.prototypes[:n].flatten(0, 1), dim=1).T
        return cosines.masked_fill(~self.present[:n].flatten(), pah.ABSENT)

    def losses(self, images, labels, task, teacher):
        memory, classes = self.memory, self.present.shape[1]
        # as if batches were drawn from new and stored images together
        rows = memory.draw(math.ceil(len(images) * memory.filled / self.new_images))
        weights = torch.cat([torch.ones(len(images)).to(images), memory.weights[rows]])
        images = torch.cat([images, pah.normalise(self.augmented(memory.images[rows]))])
        labels = torch.cat([labels + task * classes, memory.classes(rows)])
        cosines = self.cosines(self.features(images), task + 1)

        # anchors are the vectors of the images' classes: row i holds l_(y_i, j) for all images j
        logits = cosines.T[labels] / self.temperature
        old = labels < task * classes
        negative = labels[:, None] != labels
        weighted = logits + (old[:, None] & old & negative) * weights.log()
        terms = {"contrastive": (weighted.logsumexp(1) - logits.diagonal()).mean()}
        if teacher is not None:
            with torch.no_grad():
                before = teacher.cosines(teacher.features(images), task) / self.old_temperature
            now = cosines[:, : task * classes] / self.new_temperature
            terms["relations"] = self.strength * F.cross_entropy(now, before.softmax(1))
        return terms

    @torch.no_grad()
    def end_task(self, task, images, labels):
        self.eval()
        memory, classes = self.memory, self.present.shape[1]
        rows = slice(memory.filled)
        images = torch.cat([images, memory.images[rows]])
        labels = torch.cat([labels + task * classes, memory.classes(rows)])
        features = self.features_of(images)
        # augmented ones too, of all classes alike: stored images are few
        views = torch.multinomial(1 / labels.bincount()[labels], 2 * len(labels), replacement=True)
        augmented = self.features_of(self.augmented(images[views]))
        every = torch.cat([labels, labels[views]])
        self.fit_heads(task + 1, torch.cat([features, augmented]), every)

        # score: how much of the other classes' attention to all images an image gets
        share = (self.cosines(features, task + 1) / self.temperature).softmax(0)
        known = self.present[: task + 1].flatten().clone()
        kept, weights = [], []
        quota, rest = divmod(len(memory.images), int(known.sum()))
        for c in labels.unique().tolist():
            own = torch.nonzero(labels == c).flatten()
            others = known.clone()
            others[c] = False
            scores = share[own][:, others].mean(1)
            n = quota
            if rest > 0:
                n, rest = n + 1, rest - 1
            chosen = torch.multinomial(scores, min(n, len(own)))
            kept.append(own[chosen])
            weights.append(scores.sum() / (scores[chosen] * len(chosen)))
        kept = torch.cat(kept)
        memory.filled = len(kept)
        tasks, of_task = labels[kept] // classes, labels[kept] % classes
        memory.put(
            slice(len(kept)),
            images=images[kept],
            tasks=tasks,
            labels=of_task,
            weights=torch.cat(weights),
        )

    @torch.enable_grad()
    def fit_heads(self, n, features, labels, steps=1000):
        """Train the heads of n tasks on features (N, D), all classes equally often, each image
        with the head of its own task. `labels` (N,) are task * C + label."""
        heads = torch.zeros_like(self.stored_heads[:n], requires_grad=True)
        optimizer = torch.optim.SGD([heads], 0.05, 0.9)
        often = 1 / labels.bincount()[labels]
        for _ in range(steps):
            rows = torch.multinomial(often, 512, replacement=True)
            tasks, of_task = labels[rows] // heads.shape[1], labels[rows] % heads.shape[1]
            logits = torch.einsum("bd,ncd->bnc", features[rows], heads)
            logits = logits.masked_fill(~self.present[:n], pah.ABSENT)
            of_image = torch.arange(len(rows), device=rows.device)
            F.cross_entropy(logits[of_image, tasks], of_task).backward()
            optimizer.step()
            optimizer.zero_grad()
        self.stored_heads[:n] = heads.detach()


# -----------------------------------------------------------------------------
# Networks that depend on the task


class PerTask(MultiHead):
    """Each task has features of its own: own_features(images, tasks) -> [(B, D)]."""

    flags = ()

    def forward(self, images, n):
        features = torch.stack(self.own_features(images, range(n)))
        logits = torch.einsum("nbd,ncd->bnc", features, self.heads(n))
        return logits.masked_fill(~self.present[:n], pah.ABSENT)

    def own_logits(self, images, task):
        logits = self.own_features(images, [task])[0] @ self.heads(task + 1)[task].T
        return logits.masked_fill(~self.present[task], pah.ABSENT)

    def losses(self, images, labels, task, teacher):
        return {"ce": F.cross_entropy(self.own_logits(images, task), labels)}

    def autocast(self, images):
        half = self.dtype != torch.float32
        return torch.autocast(images.device.type, self.dtype, enabled=half)


class Columns(nn.Module):
    """A ResNet-18 for each task, which also sees the maps of all earlier ones.

    Simpler than the published one: laterals enter between stages, not at every layer, and have no
    learned scale.
    """

    def __init__(self, args, num_tasks):
        super().__init__()
        self.columns = nn.ModuleList(pah.ResNet18(args.width) for _ in range(num_tasks))
        self.laterals = nn.ModuleList(self.lateral(k, args.width) for k in range(num_tasks))

    def lateral(self, k, width):
        """From the maps of k earlier columns to the next stage; the last to the pooled features."""
        layers = nn.ModuleList()
        if k == 0:
            return layers
        for c in (width, 2 * width, 4 * width):
            down = nn.Conv2d(c, 2 * c, 3, 2, 1, bias=False)
            norm = nn.BatchNorm2d(2 * c)
            layers.append(nn.Sequential(nn.Conv2d(k * c, c, 1), nn.ReLU(), down, norm))
        layers.append(nn.Sequential(nn.Linear(8 * k * width, 8 * width), nn.ReLU()))
        return layers

    def forward(self, images, tasks):
        earlier, wanted = [], []  # the maps of each column
        for k in range(max(tasks) + 1):
            column, lateral, maps = self.columns[k].layers, self.laterals[k], []
            x = column[:3](images)
            for i, stage in enumerate(column[3:]):
                x = stage(x)
                if k > 0 and i > 0:
                    beside = torch.cat([other[i - 1] for other in earlier], 1)
                    x = F.relu(x + lateral[i - 1](beside))
                maps.append(x)
            pooled = x.mean((2, 3))
            beside = torch.zeros_like(pooled)
            if k > 0:
                beside = lateral[3](torch.cat([other[4] for other in earlier], 1))
            earlier.append([*maps, pooled])
            if k in tasks:
                wanted.append(torch.cat([pooled, beside], 1).float())
        return wanted


class PNN(PerTask):
    """Progressive networks (Rusu et al. 2016): a column per task; earlier columns are frozen."""

    def __init__(self, args, tasks):
        super().__init__(args, tasks, Columns(args, len(tasks)), 16 * args.width)

    def own_features(self, images, tasks):
        with self.autocast(images):
            return self.backbone(images, tasks)

    def begin_task(self, task, images, labels):
        super().begin_task(task, images, labels)
        self.frozen = [*self.backbone.columns[:task], *self.backbone.laterals[:task]]


class Generator(nn.Module):
    """Task embeddings (n, E) -> filters of the tail and heads of the first n tasks, by name.

    Each output channel of a filter is generated from the task's hidden vector and an embedding of
    the channel, a head from the hidden vector alone. Each task has its own BatchNorm and its own
    biases, the last column of its head.
    """

    def __init__(self, tail, num_tasks, classes, dim, size=32):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(size, 50), nn.ReLU(), nn.Linear(50, size), nn.ReLU())
        self.head = nn.Linear(size, classes * dim)
        self.biases = nn.Parameter(torch.zeros(num_tasks, classes, 1))
        self.shapes = {name: p.shape for name, p in tail.named_parameters() if p.ndim > 1}
        self.channels = nn.ModuleList(
            nn.Embedding(shape[0], size) for shape in self.shapes.values()
        )
        self.layers = nn.ModuleList(
            nn.Linear(2 * size, shape[1:].numel()) for shape in self.shapes.values()
        )
        for layer in tail.modules():
            if isinstance(layer, nn.Conv2d):  # a place for what is generated
                del layer.weight
                layer.register_buffer("weight", torch.zeros(()), persistent=False)
        self.tails = nn.ModuleList(copy.deepcopy(tail) for _ in range(num_tasks))

    def forward(self, embeddings):
        hidden = self.body(embeddings)
        n = len(hidden)
        heads = self.head(hidden).view(n, self.biases.shape[1], -1)
        generated = {"head": torch.cat([heads, self.biases[:n]], 2)}
        for (name, shape), channel, layer in zip(
            self.shapes.items(), self.channels, self.layers, strict=True
        ):
            of_task = hidden[:, None].expand(-1, shape[0], -1)
            pairs = torch.cat([of_task, channel.weight.expand(n, -1, -1)], 2)
            generated[name] = layer(pairs).view(n, *shape)
        return generated


class HN2(PerTask):
    """Partial hypernetworks (Hemati et al. 2023): two stages are frozen after the first task, and a
    hypernetwork generates the rest. Adds strength * the squared distance that the weights generated
    for earlier tasks have moved, mean over these tasks (von Oswald et al. 2020, but without
    look-ahead).

    A new task's embedding is random, as von Oswald et al. have it. The authors' code copies the
    last task's, which ten epochs hardly change: in a trial the second and third task ended 14
    points lower.
    """

    strength = 0.02
    stages = 2
    flags = ("hyper_lr", "proto_lr")
    defaults = {"hyper_lr": 2e-3, "proto_lr": 2e-3}

    def __init__(self, args, tasks):
        layers = pah.ResNet18(args.width).layers
        super().__init__(args, tasks, layers[: 3 + self.stages], 8 * args.width)
        num_tasks, classes, dim = self.stored_heads.shape
        del self.stored_heads
        self.hypernetwork = Generator(layers[3 + self.stages :], num_tasks, classes, dim)
        # task embeddings, under the name that has --proto-lr
        self.prototypes = nn.Parameter(torch.randn(num_tasks, 32))

    def heads(self, n):
        return self.hypernetwork(self.prototypes[:n])["head"]

    def own_features(self, images, tasks, generated=None):
        generated = generated or self.hypernetwork(self.prototypes[: max(tasks) + 1])
        maps = []
        with self.autocast(images):
            x = self.backbone(images)
            for k in tasks:
                filters = {name: values[k] for name, values in generated.items() if name != "head"}
                maps.append(torch.func.functional_call(self.hypernetwork.tails[k], filters, (x,)))
        return [F.pad(x.float().mean((2, 3)), (0, 1), value=1.0) for x in maps]  # 1: of the bias

    @torch.no_grad()
    def begin_task(self, task, images, labels):
        super().begin_task(task, images, labels)
        if task > 0:
            self.frozen = [self.backbone]
            self.old = self.hypernetwork(self.prototypes[:task])

    def losses(self, images, labels, task, teacher):
        generated = self.hypernetwork(self.prototypes[: task + 1])
        features = self.own_features(images, [task], generated)[0]
        logits = features @ generated["head"][task].T
        terms = {"ce": F.cross_entropy(logits.masked_fill(~self.present[task], pah.ABSENT), labels)}
        if task > 0:
            moved = sum(
                (generated[name][:task] - old).square().sum() for name, old in self.old.items()
            )
            terms["moved"] = self.strength * moved / task
        return terms


class HN3(HN2):
    """HN2 with three frozen stages."""

    stages = 3


# -----------------------------------------------------------------------------
# Command line

METHODS = {
    "pah": PAH,
    "finetune": MultiHead,
    "lwf": LwF,
    "rehearsal": Rehearsal,
    "thumbnails": Thumbnails,
    "rotated": Rotated,
    "rotated-lwf": RotatedLwF,
    "joint": Joint,
    "ewc": EWC,
    "si": SI,
    "agem": AGEM,
    "der": DER,
    "derfresh": DERFresh,
    "derpp": DERpp,
    "gcr": GCR,
    "cclis": CCLIS,
    "pnn": PNN,
    "hn2": HN2,
    "hn3": HN3,
}
# the options that not all methods know
NOT_ALL = ("lam", "mu", "temperature", "proto_size", "proto_init", "hidden", "hyper_lr", "proto_lr")
NOT_ALL += ("pretrained", "stem", "buffer_size", "upright")


def make_sgd(model, lr, hyper_lr, proto_lr, weight_decay, dtype):
    """SGD with momentum for all weights but those of hypernetworks and prototypes."""
    parts = {"hypernetwork": [], "prototypes": [], "others": []}
    for name, p in model.named_parameters():
        part = name.split(".")[0]
        if p.requires_grad:
            parts[part if part in parts else "others"].append(p)
    groups = [
        {"params": parts["hypernetwork"], "lr": hyper_lr},
        {"params": parts["prototypes"], "lr": proto_lr, "weight_decay": 0},
    ]
    optimizers = []
    if parts["others"]:
        optimizers.append(torch.optim.SGD(parts["others"], lr, 0.9, weight_decay=weight_decay))
    if parts["hypernetwork"] or parts["prototypes"]:
        optimizers.append(torch.optim.AdamW(groups, weight_decay=weight_decay, fused=True))
    return optimizers


OPTIMIZERS = {"muon": pah.make_optimizers, "sgd": make_sgd}
SGD_DEFAULTS = {"lr": 0.03, "weight_decay": 5e-4}


def make_parser():
    parser = pah.make_parser()
    parser.usage = "%(prog)s METHOD [options]"
    parser.description = __doc__.splitlines()[0]
    add = parser.add_argument
    add("method", choices=METHODS)
    add("--strength", type=float, help="None: the method's own")
    add("--buffer-size", type=int, default=200, help="stored images, in all")
    add("--upright", type=float, default=UPRIGHT, help="share of images not rotated")
    add("--optimizer", choices=OPTIMIZERS, default="muon", help="of filters; sgd: of all weights")
    parser.epilog = (
        "Other defaults: hn2 and hn3 have --hyper-lr 0.002 --proto-lr 0.002, cclis has --proto-lr "
        "0.01; agem, der, derfresh, derpp and gcr have --optimizer sgd, and sgd has --lr 0.03 "
        "--weight-decay 0.0005."
    )
    return parser


def parse_args(argv=None):
    parser = make_parser()
    method = METHODS[parser.parse_args(argv).method]
    parser.set_defaults(strength=method.strength, **method.defaults)
    if parser.parse_args(argv).optimizer == "sgd":
        parser.set_defaults(**SGD_DEFAULTS)
    args = pah.parse_args(argv, parser)
    unknown = [name for name in NOT_ALL if name not in method.flags]
    if method.strength is None:
        unknown.append("strength")
    if args.method == "joint":
        unknown.append("stop_after")
    pah.require(0.25 <= args.upright <= 1, "--upright must be between 0.25 and 1")
    for name in unknown:
        if getattr(args, name) != parser.get_default(name):
            parser.error(f"--{name.replace('_', '-')} has no effect on {args.method}")
    if args.precision == "fp16" and method.own_gradients:
        parser.error(f"gradients of {args.method} may vanish in fp16; use --precision bf16 or fp32")
    if pah.WORLD > 1 and args.method not in ("pah", "rehearsal"):
        parser.error("only pah and rehearsal run with several processes")
    return args


def build(args, tasks):
    method = METHODS[args.method]
    if issubclass(method, pah.PAH):
        model = pah.build(args, len(tasks), max(len(task.classes) for task in tasks), method)
        model.augmentation = pah.AUGMENTATIONS[args.augment]  # of rehearsal
    else:
        model = method(args, tasks)
    if "upright" in method.flags:
        model.upright = args.upright
    return model


def evaluate_mirrored(args, model, tasks, results):
    """Add the last row of R, as it is with `extensions.Mirrored`, to results.json. Returns AA."""
    tasks = tasks[: len(results["accuracy"])]
    results["mirrored"], _ = pah.evaluate(extensions.Mirrored(model), tasks, 4 * args.batch_size)
    if pah.RANK == 0:
        with pah.whole_file(Path(args.out) / f"seed{results['seed']}/results.json") as path:
            path.write_text(json.dumps(results, indent=1) + "\n")
    return pah.average_accuracy([results["mirrored"]])


def main(argv=None):
    args = parse_args(argv)
    pah.set_up(args.device)
    data = pah.load_dataset(args.dataset, args.data, args.image_size)
    results, mirrored = [], []
    for seed in args.seeds:
        tasks, R = pah.load_tasks(args, seed, data), []
        torch.manual_seed(seed)
        model = build(args, tasks).to(args.device)
        if args.method == "joint":
            tasks, R = joined(tasks), [[]] * (len(tasks) - 1)
        results.append(pah.run(args, seed, model, tasks, OPTIMIZERS[args.optimizer], R))
        if args.augment == "crop-flip":  # a mirror image shows the same class
            mirrored.append(evaluate_mirrored(args, model, tasks, results[-1]))
    if pah.RANK == 0:
        print(pah.describe(results))
    if pah.RANK == 0 and mirrored:
        print(f"AA {sum(mirrored) / len(mirrored):5.2f}  if test images are mirrored, too")


if __name__ == "__main__":
    try:
        main()
    except pah.UserError as error:
        sys.exit(f"baselines.py: {error}")
    except KeyboardInterrupt:
        sys.exit("stopped; --resume continues after the last finished task")
