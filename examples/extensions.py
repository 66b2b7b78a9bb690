"""Extensions of PAH that are ours, not the paper's, as classes for `pah.learn`.

    python examples/baselines.py rehearsal --tasks 50 --width 16 --image-size 24 --epochs 6
    python examples/baselines.py thumbnails --tasks 50 --width 16 --image-size 24 --epochs 6

Their results are in assets/results.md. In your own script they take the place of `pah.PAH`.
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
