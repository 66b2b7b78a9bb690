"""Extensions of PAH that are ours, not the paper's, as classes for `pah.learn`.

    python examples/baselines.py rehearsal --tasks 50 --width 16 --image-size 24 --epochs 6
    python examples/baselines.py thumbnails --tasks 50 --width 16 --image-size 24 --epochs 6
    python examples/baselines.py rotated --width 16 --image-size 24 --epochs 20

Results are in assets/results.md. In your own script the classes take the place of `pah.PAH`.
"""

import math
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import pah


class Rehearsal(pah.PAH):
    """PAH whose prototypes join the batch in place of old images.

    They are drawn from all earlier tasks, one for every two images of the batch, and resized to the
    images' size. L_sp is L_sm on them: old and new model agree under all earlier heads, and all
    weights learn from it. `augmentation` is like that of `learn`, but of normalised images; it may
    be None.
    """

    augmentation = staticmethod(pah.augment)

    def draw(self, task, n, size):
        """n prototypes of random classes before `task`, as images (n, 3, *size).

        Under torchrun `n` counts all processes, and each gets its part.
        """
        present = self.present[:task].flatten().float()
        drawn = torch.multinomial(present, n, replacement=True)
        prototypes = self.prototypes[:task].flatten(0, 1)[drawn]
        images = F.interpolate(prototypes, size, mode="bilinear", antialias=True)
        if self.augmentation is not None:
            images = self.augmentation(images)
        return images[pah.RANK :: pah.WORLD]

    def losses(self, images, labels, task, teacher):
        """The weighted terms by name, as PAH.losses; L_sp comes from the same pass as the rest."""
        if teacher is None or not self.mu:
            return super().losses(images, labels, task, teacher)
        n = len(images)
        drawn = self.draw(task, max(pah.WORLD, n * pah.WORLD // 2), images.shape[2:])
        batch = torch.cat([images, drawn])
        logits = self(batch, task + 1)
        with torch.no_grad():
            old = teacher(batch, task)
        distances = pah.distillation(logits[:, :task], old, self.temperature).sum(1)
        return {
            "hm": F.cross_entropy(logits[:n, task], labels),
            "sm": self.lam * distances[:n].mean(),
            "sp": self.mu * distances[n:].mean(),
        }


class Thumbnails(Rehearsal):
    """Rehearsal without a hypernetwork: heads are stored, and prototypes stay what they began as,
    a thumbnail of one training image per class."""

    def __init__(self, backbone, num_tasks, classes, **options):
        super().__init__(backbone, num_tasks, classes, **options)
        shape = (num_tasks, classes, self.hypernetwork.shape[1])
        self.stored_heads = nn.Parameter(torch.empty(shape).uniform_(-1, 1) / math.sqrt(shape[2]))
        self.prototypes.requires_grad_(False)
        del self.hypernetwork

    def heads(self, n):
        return self.stored_heads[:n]


class Mirrored(nn.Module):
    """Any model, tested on each image and its mirror image: pah.evaluate(Mirrored(model), tasks).

    Its logits are the mean of both.
    """

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, images, n):
        return (self.model(images, n) + self.model(images.flip(3), n)) / 2


def turned(images, turns):
    """Images (B, C, S, S), each rotated by its number of quarter turns (B,), 0 to 3."""
    views = torch.stack([images.rot90(r, (2, 3)) for r in range(4)])
    return views[turns, torch.arange(len(images), device=images.device)]


class RotatedLabels:
    """Heads with an output for each class under each of four rotations, the joint labels of Lee et
    al. (2020). For PAH and what is derived from it, finetuning and LwF, and named before them:
    class Rotated(RotatedLabels, PAH).

    Of 4C outputs r * C + c stands for class c after r quarter turns. Each image of a batch, which
    must be square, is shown once, and turned with a probability of 1 - `upright`. Losses see all 4C
    outputs, tests those of upright images.
    """

    upright = 13 / 16
    all_outputs = False

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        if hasattr(self, "stored_heads"):
            num_tasks, classes, dim = self.stored_heads.shape
            heads = torch.empty(num_tasks, 4 * classes, dim).uniform_(-1, 1) / math.sqrt(dim)
            self.stored_heads = nn.Parameter(heads)
        else:
            classes, dim = self.hypernetwork.shape
            first = self.hypernetwork.layers[0]
            self.hypernetwork = pah.Hypernetwork(
                first.in_features, 4 * classes, dim, first.out_features
            )

    def forward(self, images, n):
        """Logits (B, n, C) of normalised images, or (B, n, 4C) while the losses are computed."""
        present = self.present[:n].repeat(1, 4)
        logits = torch.einsum("bd,ncd->bnc", self.features(images), self.heads(n))
        logits = logits.masked_fill(~present, pah.ABSENT)
        return logits if self.all_outputs else logits[:, :, : self.present.shape[1]]

    def prototype_logits(self, prototypes):
        """Logits (n, C, 4C) of prototypes (n, C, 3, s, s) as upright images."""
        n = len(prototypes)
        present = self.present[:n].repeat(1, 4)
        features = self.features(prototypes.flatten(0, 1)).unflatten(0, (n, -1))
        return (features @ self.heads(n).mT).masked_fill(~present[:, None], pah.ABSENT)

    def losses(self, images, labels, task, teacher):
        """The terms of the method itself, on turned images with turned labels."""
        turns = torch.randint(4, labels.shape, device=labels.device)
        # the random turns leave a quarter of the others upright, too
        stays = torch.rand(labels.shape, device=labels.device) < (4 * self.upright - 1) / 3
        turns = turns.masked_fill(stays, 0)
        labels = labels + turns * self.present.shape[1]
        # forward, which tests call as well, gives 4C outputs only while all_outputs is set
        models = [self] if teacher is None else [self, teacher]
        try:
            for model in models:
                model.all_outputs = True
            return super().losses(turned(images, turns), labels, task, teacher)
        finally:
            for model in models:
                model.all_outputs = False


class Rotated(RotatedLabels, pah.PAH):
    """PAH with rotated labels; prototypes stay upright."""
