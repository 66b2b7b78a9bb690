"""The systems that the PAH paper compares itself with, all under one protocol: that of pah.py.

    python examples/baselines.py si --dataset synthetic
    python examples/baselines.py derpp --width 16 --image-size 24 --epochs 10 --seeds 0 1

Data, tasks, backbone, training, evaluation, files, tables and flags are pah.py's. A method is a class: `loss`
on a batch, and what it does before a task, after a step and after a task. All have a head for each task.
Learning without Forgetting is pah.py's `--head stored`. Default strengths: see assets/search.md.
"""
import copy, sys
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import pah

STORED_IMAGES, FISHER_IMAGES = 200, 500  # in all; of each task

def flat(tensors):
    return torch.cat([tensor.reshape(-1) for tensor in tensors])

def with_gradient(loss, weights, gradient):
    """The value of `loss`, but its gradient for `weights` is the given one, flat."""
    linear = flat(weights) @ gradient
    return loss.detach() + linear - linear.detach()

class MultiHead(pah.PAH):
    """A backbone and a stored head for each task, finetuned: what a method starts from. What must outlive a
    task is a parameter or a buffer, so that checkpoints hold it."""
    strength = 0.0
    frozen = ()  # modules that no longer learn

    def __init__(self, args, backbone=None, features=None):
        parts = backbone or pah_build(args).backbone, args.tasks, args.classes, features
        super().__init__(*parts, head="stored", precision=args.precision)
        self.strength = args.strength
        self.register_buffer("task", torch.tensor(-1))

    def begin_task(self, task, images, labels, init=None):
        self.task.fill_(task)

    def train(self, mode=True):
        super().train(mode)
        for module in self.frozen:
            module.eval().requires_grad_(False)
        return self

    def loss(self, images, labels):
        """Of a batch of normalised images (B, 3, H, W) of the present task and its labels (B,)."""
        return F.cross_entropy(self(images, self.task), labels)

    def after_step(self):
        """After each step of the optimiser."""
    def end_task(self, images, labels):
        """`images` are the task's training set: uint8 (N, 3, H, W)."""

    def stored(self):
        images = int(self.memory.filled) if hasattr(self, "memory") else 0
        others = sum(buffer.numel() for buffer in self.buffers(recurse=False) if buffer.ndim)
        return {"weights": len(flat(self.parameters())), "other numbers": others, "images": images}
# ------------------------------ Pulled to old weights
class EWC(MultiHead):
    """Elastic weight consolidation (Kirkpatrick et al. 2017): + strength / 2 * sum over earlier tasks t of
    F_t (w - w_t)^2, F_t the diagonal of the Fisher information at task t's end. The sum of parabolas is one
    about the mean of all w_t weighted with F_t, up to a constant: two numbers a weight are kept."""
    strength = 100.0

    def __init__(self, args):
        super().__init__(args)
        self.register_buffer("fisher", torch.zeros_like(flat(self.parameters())))
        self.register_buffer("anchor", torch.zeros_like(self.fisher))

    def loss(self, images, labels):
        away = flat(self.parameters()) - self.anchor
        return super().loss(images, labels) + self.strength / 2 * (self.fisher @ away**2)

    def end_task(self, images, labels):
        self.eval()
        fisher, rows = torch.zeros_like(self.fisher), torch.randperm(len(images))[:FISHER_IMAGES]
        for image in images[rows.to(images.device)].split(1):
            logits = self(pah.normalise(image.to(fisher.device)), self.task)
            label = torch.distributions.Categorical(logits=logits).sample()  # as the model believes
            loss = F.cross_entropy(logits, label)
            fisher += flat(torch.autograd.grad(loss, list(self.parameters()))) ** 2 / len(rows)
        self.fisher += fisher
        self.anchor.lerp_(flat(self.parameters()).detach(), fisher / self.fisher.clamp(min=1e-30))

class SI(MultiHead):
    """Synaptic intelligence (Zenke et al. 2017): + strength * importance (w - anchor)^2. Importance: how much
    a weight's path lowered the task's own loss, - integral of gradient dw, over its distance^2."""
    strength = 30.0
    damping = 0.1  # xi

    def __init__(self, args):
        super().__init__(args)
        self.register_buffer("anchor", flat(self.parameters()).detach().clone())
        for name in "importance", "path":
            self.register_buffer(name, torch.zeros_like(self.anchor))

    def loss(self, images, labels):
        loss, weights = super().loss(images, labels), list(self.parameters())
        self.gradient, self.before = flat(torch.autograd.grad(loss, weights)), flat(weights).detach()
        pull = 2 * self.strength * self.importance * (self.before - self.anchor)
        return with_gradient(loss, weights, self.gradient + pull)

    def after_step(self):
        self.path -= self.gradient * (flat(self.parameters()).detach() - self.before)

    def end_task(self, images, labels):
        now = flat(self.parameters()).detach()
        self.importance += (self.path / ((now - self.anchor) ** 2 + self.damping)).clamp(min=0)
        self.anchor.copy_(now)
        self.path.zero_()
# ------------------------------ Stored images
class Memory(nn.Module):
    """A few images with their tasks, labels, logits and weights."""
    def __init__(self, size, args):
        super().__init__()
        side = args.image_size or pah.SIZES.get(args.dataset, 64)
        self.register_buffer("images", torch.zeros(size, 3, side, side, dtype=torch.uint8))
        self.register_buffer("logits", torch.zeros(size, args.classes))
        self.register_buffer("weights", torch.ones(size))
        for name in "tasks", "labels":
            self.register_buffer(name, torch.zeros(size, dtype=torch.long))
        for name in "filled", "seen":
            self.register_buffer(name, torch.tensor(0))
        self.pad, self.flip = side // 8 * (args.augment != "none"), args.augment == "crop-flip"

    def put(self, rows, **what):
        for name, values in what.items():
            getattr(self, name)[rows] = values

    def draw(self, n):
        """n random rows, without repetition; fewer where there are not so many."""
        return torch.randperm(int(self.filled), device=self.labels.device)[:n]

    def offer(self, images, labels, logits, task):
        """Reservoir sampling (Vitter 1985): each image ever offered is there with the same probability."""
        mean, std = pah.mean_and_std(images.device)
        images = ((images * std + mean) * 255).round().to(torch.uint8)
        count = int(self.seen) + 1 + torch.arange(len(images), device=images.device)
        slots = (torch.rand(len(count), device=images.device) * count).long()
        slots = torch.where(count <= len(self.images), count - 1, slots)
        taken = {slot: i for i, slot in enumerate(slots.tolist()) if slot < len(self.images)}
        rows, of = list(taken), list(taken.values())
        self.put(rows, images=images[of], labels=labels[of], logits=logits[of], tasks=task)
        self.seen += len(images)
        self.filled.fill_(min(int(self.seen), len(self.images)))

class Replay(MultiHead):
    def __init__(self, args):
        super().__init__(args)
        self.memory = Memory(STORED_IMAGES, args)

    def replay(self, rows):
        """Logits of stored images, each with the head of its own task."""
        images = pah.augment(self.memory.images[rows], self.memory.pad, self.memory.flip)
        heads = self.prototypes[self.memory.tasks[rows]]
        return torch.einsum("bd,bcd->bc", self.features(pah.normalise(images)), heads)

def projected(gradient, reference):
    """`gradient` without its part against `reference`, if it has one (Eq. 11 of Chaudhry et al. 2019)."""
    return gradient - (gradient @ reference / (reference @ reference)).clamp(max=0) * reference

class AGEM(Replay):
    """Averaged gradient episodic memory (Chaudhry et al. 2019): some images of each class are stored, and
    a gradient may not raise the loss of `strength` of them."""
    strength = 200

    def loss(self, images, labels):
        loss, rows = super().loss(images, labels), self.memory.draw(int(self.strength))
        if not len(rows):
            return loss
        weights = list(self.parameters())
        stored = F.cross_entropy(self.replay(rows), self.memory.labels[rows])
        gradient, reference = (flat(torch.autograd.grad(value, weights)) for value in (loss, stored))
        return with_gradient(loss, weights, projected(gradient, reference))

    def end_task(self, images, labels):
        tasks, classes, _ = self.prototypes.shape
        for c in range(classes):
            chosen = torch.nonzero(labels == c).flatten().cpu()
            chosen = chosen[torch.randperm(len(chosen))][:STORED_IMAGES // (tasks * classes)]
            rows = int(self.memory.filled) + torch.arange(len(chosen), device=self.task.device)
            pixels = images[chosen.to(images.device)].to(rows.device)
            self.memory.put(rows, images=pixels, labels=c, tasks=self.task)
            self.memory.filled += len(chosen)

class DER(Replay):
    """Dark experience replay (Buzzega et al. 2020): + strength * squared distance of stored images' logits to
    those of when a reservoir took them. Images are stored as the network saw them, and augmented again."""
    strength = 0.3
    beta = 0.0

    def loss(self, images, labels):
        logits = self(images, self.task)
        loss = F.cross_entropy(logits, labels)
        if self.memory.filled:
            rows = self.memory.draw(len(images))
            loss = loss + self.strength * F.mse_loss(self.replay(rows), self.memory.logits[rows])
            if self.beta:
                rows = self.memory.draw(len(images))
                loss = loss + self.beta * F.cross_entropy(self.replay(rows), self.memory.labels[rows])
        self.memory.offer(images, labels, logits.detach(), self.task)
        return loss

class DERpp(DER):
    """DER++: and + beta * cross-entropy of stored images."""
    strength = 1.0
    beta = 0.5

def matching(gradients, target, n, ridge=0.5):
    """Regularised orthogonal matching pursuit: n rows, weights > 0, the sum near `target`."""
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

class GCR(Replay):
    """Gradient coreset replay (Tiwari et al. 2022), without its optional contrastive term: DER++ on weighted
    images, chosen after each task so that a class's weighted gradient of the head is about that of all."""
    strength = 3.0
    beta = 0.5

    def loss(self, images, labels):
        loss, memory = super().loss(images, labels), self.memory
        if memory.filled:
            a, b = memory.draw(len(images)), memory.draw(len(images))
            distances = (self.replay(a) - memory.logits[a]).square().mean(1)
            losses = F.cross_entropy(self.replay(b), memory.labels[b], reduction="none")
            loss = loss + self.strength * (memory.weights[a] @ distances) / memory.weights[a].sum()
            loss = loss + self.beta * (memory.weights[b] @ losses) / memory.weights[b].sum()
        return loss

    @torch.no_grad()
    def end_task(self, images, labels):
        self.eval()
        memory, old, kept = self.memory, int(self.memory.filled), []
        task, classes, device = int(self.task), self.prototypes.shape[1], self.task.device
        for t in range(task + 1):
            rows = torch.nonzero(memory.tasks[:old] == t).flatten()
            x, y, weights = memory.images[rows], memory.labels[rows], memory.weights[rows]
            if t == task:
                x, y, weights = images, labels.to(device), torch.ones(len(images), device=device)
            features = torch.cat([self.features(pah.normalise(part.to(device))) for part in x.split(500)])
            logits = features @ self.prototypes[t].T
            stored = logits if t == task else memory.logits[rows]
            slope = self.beta * (logits.softmax(1) - F.one_hot(y, classes))
            slope += self.strength * 2 / classes * (logits - stored)
            for c in range(classes):
                of_class, budget = torch.nonzero(y == c).flatten(), STORED_IMAGES // (task + 1) // classes
                gradients = (slope[of_class, :, None] * features[of_class, None]).flatten(1)
                chosen, new = matching(gradients, weights[of_class] @ gradients, budget)
                chosen = of_class[chosen]
                pixels = x[chosen.to(x.device)].to(device)
                kept.append((pixels, y[chosen], stored[chosen], new, torch.full_like(chosen, t)))
        for name, values in zip(("images", "labels", "logits", "weights", "tasks"), zip(*kept)):
            values = torch.cat(values)
            memory.put(slice(len(values)), **{name: values})
        memory.filled.fill_(len(values))
# ------------------------------ Networks that depend on the task
class PerTask(MultiHead):
    """`features` are those of all tasks so far, side by side; each head looks at its own. A method has
    own_features(images, tasks) -> [(B, D)] and own_heads(n) -> (n, C, D)."""
    def autocast(self, images):
        half = pah.HALF.get(self.precision)
        return torch.autocast(images.device.type, half, enabled=half is not None)
    def own_heads(self, n):
        return self.prototypes[:n]

    def heads(self, n):
        heads = self.own_heads(n)
        return torch.einsum("ncd,nm->ncmd", heads, torch.eye(n, device=heads.device)).flatten(2)

    def features(self, images):
        return torch.cat(self.own_features(images, range(int(self.task) + 1)), 1)

    def forward(self, images, task):
        return self.own_features(images, [int(task)])[0] @ self.own_heads(int(task) + 1)[int(task)].T

class Columns(nn.Module):
    """A ResNet-18 for each task, which also sees the maps of all earlier ones through lateral connections."""
    def __init__(self, args):
        super().__init__()
        self.columns = nn.ModuleList(pah_build(args).backbone for _ in range(args.tasks))
        self.laterals = nn.ModuleList(nn.ModuleList() for _ in range(args.tasks))
        for k, laterals in enumerate(self.laterals):
            for c in [args.width, 2 * args.width, 4 * args.width] if k else []:
                down = nn.Conv2d(c, 2 * c, 3, 2, 1, bias=False), nn.BatchNorm2d(2 * c)
                laterals.append(nn.Sequential(nn.Conv2d(k * c, c, 1), nn.ReLU(), *down))
            if k:
                laterals.append(nn.Sequential(nn.Linear(8 * k * args.width, 8 * args.width), nn.ReLU()))

    def forward(self, images, tasks):
        earlier, wanted = [], []  # the maps of each column
        for k, (column, lateral) in enumerate(zip(self.columns[:max(tasks) + 1], self.laterals)):
            maps = []
            x = column.maxpool(F.relu(column.bn1(column.conv1(images))))
            for i, layer in enumerate((column.layer1, column.layer2, column.layer3, column.layer4)):
                x = layer(x)
                if k and i:
                    x = F.relu(x + lateral[i - 1](torch.cat([other[i - 1] for other in earlier], 1)))
                maps.append(x)
            pooled = x.mean((2, 3))
            beside = lateral[3](torch.cat([o[4] for o in earlier], 1)) if k else torch.zeros_like(pooled)
            earlier.append([*maps, pooled])
            if k in tasks:
                wanted.append(torch.cat([pooled, beside], 1).float())
        return wanted

class PNN(PerTask):
    """Progressive networks (Rusu et al. 2016): a column a task; earlier columns are frozen."""
    def __init__(self, args):
        super().__init__(args, Columns(args), 16 * args.width)

    def own_features(self, images, tasks):
        with self.autocast(images):
            return self.backbone(images, tasks)

    def begin_task(self, task, images, labels, init=None):
        super().begin_task(task, images, labels)
        self.frozen = [*self.backbone.columns[:task], *self.backbone.laterals[:task]]

class Generator(nn.Module):
    """Task embeddings (n, E) -> the filters behind the frozen stages, and the heads, of n tasks: each output
    channel from a hidden vector of the task and an embedding of the channel. BatchNorm is each task's own."""
    def __init__(self, tail, tasks, classes, features, size=32):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(size, 50), nn.ReLU(), nn.Linear(50, size), nn.ReLU())
        self.shapes = {name: p.shape for name, p in tail.named_parameters() if p.ndim > 1}
        self.shapes["head"] = torch.Size([classes, features])
        self.channels = nn.ModuleList(nn.Embedding(shape[0], size) for shape in self.shapes.values())
        self.layers = nn.ModuleList(nn.Linear(2 * size, shape[1:].numel()) for shape in self.shapes.values())
        for layer in tail.modules():
            if isinstance(layer, nn.Conv2d):  # a place for what is generated
                del layer.weight
                layer.register_buffer("weight", torch.zeros(()), persistent=False)
        self.tails = nn.ModuleList(copy.deepcopy(tail) for _ in range(tasks))

    def forward(self, embeddings):
        hidden, generated = self.body(embeddings), {}
        for (name, shape), channel, layer in zip(self.shapes.items(), self.channels, self.layers):
            hidden_of_channels = hidden[:, None].expand(-1, shape[0], -1)
            pairs = torch.cat([hidden_of_channels, channel.weight.expand(len(hidden), -1, -1)], 2)
            generated[name] = layer(pairs).view(-1, *shape)
        return generated

class HN2(PerTask):
    """Partial hypernetworks (Hemati et al. 2023): two stages are frozen after the first task; all behind them
    comes from a hypernetwork; + strength * how far what it makes for earlier tasks has moved, squared, mean
    over these tasks (von Oswald et al. 2020, without look-ahead). Wants --hyper-lr 1e-2 --proto-lr 1e-2."""
    strength = 0.05
    stages = 2

    def __init__(self, args):
        whole = pah_build(args).backbone
        stages = [whole.layer1, whole.layer2, whole.layer3, whole.layer4]
        stem = [whole.conv1, whole.bn1, nn.ReLU(), whole.maxpool]
        super().__init__(args, nn.Sequential(*stem, *stages[:self.stages]), whole.features)
        tail = nn.Sequential(*stages[self.stages:])
        self.hypernetwork = Generator(tail, args.tasks, args.classes, whole.features)
        self.head, self.prototypes = "vector", nn.Parameter(torch.randn(args.tasks, 32))  # task embeddings

    def own_heads(self, n):
        return self.hypernetwork(self.prototypes[:n])["head"]

    def own_features(self, images, tasks, generated=None):
        generated, maps = generated or self.hypernetwork(self.prototypes[:max(tasks) + 1]), []
        with self.autocast(images):
            x = self.backbone(images)
            for k in tasks:
                filters = {name: values[k] for name, values in generated.items() if name != "head"}
                maps.append(torch.func.functional_call(self.hypernetwork.tails[k], filters, (x,)))
        return [x.float().mean((2, 3)) for x in maps]

    @torch.no_grad()
    def begin_task(self, task, images, labels, init=None):
        super().begin_task(task, images, labels)
        if task:
            self.prototypes[task] = self.prototypes[task - 1]
            self.frozen = [self.backbone]
            self.old = self.hypernetwork(self.prototypes[:task])

    def loss(self, images, labels):
        task = int(self.task)
        generated = self.hypernetwork(self.prototypes[:task + 1])
        features = self.own_features(images, [task], generated)[0]
        loss = F.cross_entropy(features @ generated["head"][task].T, labels)
        if task:
            moved = [(values[:task] - self.old[name]).square().sum() for name, values in generated.items()]
            loss = loss + self.strength * sum(moved) / task
        return loss

class HN3(HN2):
    stages = 3
# ------------------------------ In the places of pah.py's own: the model, the loss, training, the flags
METHODS = {"finetune": MultiHead, "ewc": EWC, "si": SI, "agem": AGEM, "der": DER, "derpp": DERpp, "gcr": GCR,
           "pnn": PNN, "hn2": HN2, "hn3": HN3}

def build(args):
    return METHODS[args.method](args)

def loss_of_task(model, task, args):
    return loss_and_parts

def loss_and_parts(model, images, labels):
    loss = model.loss(images, labels)
    return loss, torch.stack([loss, 0 * loss, 0 * loss]).detach()

def train_task(model, loss, images, labels, args, progress):
    def after_step(*step):
        model.after_step()
        progress(*step)
    pah_train_task(model, loss, images, labels, args, after_step)
    model.end_task(images, labels)

def summary(state, model, complete):
    return pah_summary(state, model, complete) | {"stored": model.stored()}

def make_parser(*defaults):
    parser = pah_make_parser(*defaults)
    parser.add_argument("method", choices=METHODS)
    parser.add_argument("--strength", type=pah.number(float, 0, 1e9), help="None: the method's own")
    return parser

def parse_args(argv=None):
    args = pah_parse_args(argv)
    pah.require(not (args.joint or args.bench or pah.WORLD > 1), "--joint, --bench, torchrun: pah.py's alone")
    args.strength = METHODS[args.method].strength if args.strength is None else args.strength
    return args

pah_build, pah_train_task, pah_summary = pah.build, pah.train_task, pah.summary
pah_make_parser, pah_parse_args = pah.make_parser, pah.parse_args

def main(argv=None):
    for function in build, loss_of_task, train_task, summary, make_parser, parse_args:
        setattr(pah, function.__name__, function)
    return pah.main(argv)

if __name__ == "__main__":
    sys.exit(main())
