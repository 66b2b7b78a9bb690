"""SI and DER++ of examples/baselines.py with what Avalanche does differently, for results.md.

    python assets/avalanche/like_theirs.py si --strength 3 --optimizer sgd --tasks 5 --epochs 3 ...

All options are those of examples/baselines.py.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))

import baselines
import torch
import torch.nn.functional as F
from baselines import pah


class SI(baselines.SI):
    """SI whose importance is at most 0.001."""

    def end_task(self, task, images, labels):
        super().end_task(task, images, labels)
        above = (self.importance > 1e-3).float().mean()
        print(f"importance above 0.001: {above:.1%} of the weights")
        self.importance.clamp_(max=1e-3)


class DERpp(baselines.DERpp):
    """DER++ with as many images of each class, stored at the end of their task with logits of then.

    Logits and labels are compared on the same stored images, in one pass with the new ones, so that
    BatchNorm sees both.
    """

    def losses(self, images, labels, task, teacher):
        memory = self.memory
        rows = memory.draw(len(images))
        stored = pah.normalise(self.augmentation(memory.images[rows]))
        features = self.features(torch.cat([stored, images]))
        old = torch.einsum(
            "bd,bcd->bc", features[: len(rows)], self.stored_heads[memory.tasks[rows]]
        )
        old = old.masked_fill(~self.present[memory.tasks[rows]], pah.ABSENT)
        new = features[len(rows) :] @ self.stored_heads[task].T
        new = new.masked_fill(~self.present[task], pah.ABSENT)
        terms = {"ce": F.cross_entropy(new, labels)}
        if len(rows) > 0:
            terms["der"] = self.strength * F.mse_loss(old, memory.logits[rows])
            terms["er"] = self.beta * F.cross_entropy(old, memory.labels[rows])
        return terms

    def after_step(self, task, images, labels):
        pass

    @torch.no_grad()
    def end_task(self, task, images, labels):
        self.eval()
        memory = self.memory
        logits = [self(pah.normalise(x), task + 1)[:, task] for x in images.split(500)]
        order = torch.randperm(len(images))
        new = (images[order], labels[order], torch.cat(logits)[order])
        new = (*new, torch.full_like(labels, task))
        names = ("images", "labels", "logits", "tasks")
        old = [getattr(memory, name)[: memory.filled] for name in names]
        columns = [torch.cat(parts) for parts in zip(old, new, strict=True)]
        share = len(memory.images) // int(self.present.sum())
        classes = columns[3] * self.present.shape[1] + columns[1]
        kept = [torch.nonzero(classes == c).flatten()[:share] for c in classes.unique()]
        kept = torch.cat(kept)
        what = {name: column[kept] for name, column in zip(names, columns, strict=True)}
        memory.put(slice(len(kept)), **what)
        memory.filled.fill_(len(kept))


if __name__ == "__main__":
    baselines.METHODS = {"si": SI, "derpp": DERpp}
    baselines.main()
