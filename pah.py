# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.5", "torchvision>=0.20", "numpy>=1.26"]
# ///
"""Prototype-Augmented Hypernetworks (PAH) for continual learning, in one file.

    python pah.py --dataset synthetic                 # no download, about a minute on two CPU cores
    python pah.py                                     # Split-CIFAR100, 10 tasks
    python pah.py --dataset tinyimagenet --tasks 20
    python pah.py --dataset path/to/folder            # train/ and val/, one sub-folder a class

K tasks of C classes come one after the other, and old data is gone. A backbone f turns images into D features. No
classifier head is stored: a hypernetwork H generates the head of task k from C small learnable images, the prototypes
of its classes. Three losses keep the old tasks working. Equation numbers are those of the paper: De La Fuente et al.,
"Prototype Augmented Hypernetworks for Continual Learning", arXiv 2505.07450 (2025).

The file reads from top to bottom: data, tasks, model, losses, metrics, training, results and pictures, command line.
"""
import argparse
import contextlib
import copy
import ctypes
import functools
import hashlib
import json
import math
import os
import platform
import shutil
import signal
import sys
import tempfile
import time
import zipfile
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F


class Problem(Exception):
    """Something the user can put right: `main` prints it as one line and exits with code 2."""


def one_line(error):
    return " ".join(str(error).split()) or type(error).__name__


@contextlib.contextmanager
def written_whole(path):
    """Yields a temporary name beside `path`; what was written there becomes `path` only when all went well."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save calls a full disk a RuntimeError
        raise Problem(f"{path}: cannot be written ({one_line(error)[:80]}); what was there before is untouched: make "
                      "room, or choose another folder") from error
    finally:
        temporary.unlink(missing_ok=True)


def read_saved(path, mmap=False):
    """What torch.save wrote to `path`, on the CPU. Tensors and plain values only: nothing in it can run code. Raises
    ValueError where a CRC is wrong, which torch.load does not look at, and whatever torch.load raises."""
    with zipfile.ZipFile(path) as archive:
        if bad := archive.testzip():
            raise ValueError(f"the CRC of {bad} is wrong")
    return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)


@contextlib.contextmanager
def locked(folder, busy=None):
    """Keeps other processes out of `folder`: raises Problem(busy) if one is there, or without `busy` waits for it.
    Yields whether it had to wait. The system lifts the lock with the process, however that ends."""
    folder.mkdir(parents=True, exist_ok=True)
    waited, handle = False, None
    try:
        import fcntl
        handle = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            if busy:
                os.close(handle)
                raise Problem(busy) from error
            fcntl.flock(handle, fcntl.LOCK_EX)
            waited = True
    except (ImportError, OSError):
        pass  # Windows, or a file system without locks
    try:
        for left in [*folder.glob(".*.[0-9]*.tmp"), *folder.glob(".download-*")]:  # by a process that was killed
            shutil.rmtree(left) if left.is_dir() else left.unlink(missing_ok=True)
        yield waited
    finally:
        if handle is not None:
            os.close(handle)


def rank_and_world():
    """This process's number and how many there are: (0, 1) without torchrun."""
    there = torch.distributed.is_available() and torch.distributed.is_initialized()
    return (torch.distributed.get_rank(), torch.distributed.get_world_size()) if there else (0, 1)


@contextlib.contextmanager
def downloads(root, what):
    """Yields a scratch folder in `root`. Turns a network error inside into one line with the way out."""
    root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=root, prefix=".download-") as scratch:
        try:
            with contextlib.redirect_stdout(sys.stderr):
                yield Path(scratch)
        except (OSError, RuntimeError) as error:
            raise Problem(f"cannot download ({one_line(error)}); put {what} into {root} by hand, or try "
                          "--dataset synthetic, which needs no download") from error


# ----------------------------------------------------------------------------------------------------------------------
# Data: every data set becomes uint8 tensors, (N, 3, S, S), decoded once and cached in one file

Data = namedtuple("Data", "train_images train_labels test_images test_labels classes")

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, for all data sets: no look at future tasks
CACHE_FORMAT = 2
TINY_URL = "http://cs231n.stanford.edu/tiny-imagenet-200.zip"
TINY_MD5 = "90528d7ca1a48142e341f4ef8d21d0de"
TINY_COUNTS = {"train": 100_000, "val": 10_000}


def load_dataset(name, root="data", image_size=None):
    """Read a data set, from its cache in `root` where there is one.

    Args:
        name: cifar100, tinyimagenet, mnist, synthetic, or a folder with train/ and val/, one sub-folder a class.
        root: folder that holds (or receives) the downloads and the caches.
        image_size: side in pixels; None keeps the data set's own (64 for folders).

    Returns:
        Data: uint8 images (N, 3, S, S) and int64 labels (N,) for training and test, and the class names.

    Raises:
        Problem: with one line that says what is wrong with the files and what to do.
    """
    root = Path(root)
    if name == "synthetic":
        return synthetic(image_size or 16)
    if name not in ("cifar100", "tinyimagenet", "mnist") and not Path(name).is_dir():
        raise Problem(f"--dataset {name}: not a data set (cifar100, tinyimagenet, mnist, synthetic) and not a folder")
    size = image_size or {"cifar100": 32, "mnist": 32}.get(name, 64)
    if name in ("cifar100", "tinyimagenet", "mnist"):
        stem, signature = f"{name}-{size}", f"{CACHE_FORMAT} {name} {size}"
    else:
        folder = Path(name).resolve()
        files = sorted((p.relative_to(folder).as_posix(), p.stat().st_size, p.stat().st_mtime_ns)
                       for split in ("train", "val") for p in (folder / split).rglob("*") if p.is_file())
        content = hashlib.md5(repr(files).encode()).hexdigest()
        stem, signature = f"{folder.name}-{size}", f"{CACHE_FORMAT} {folder} {size} {content}"
    cache = root / f"{stem}.pt"
    data = read_cache(cache, signature)
    if data is None:
        with locked(root) as waited:
            data = read_cache(cache, signature) if waited else None  # another process may have built it meanwhile
            if data is None:
                read = {"cifar100": read_torchvision, "mnist": read_torchvision, "tinyimagenet": read_tinyimagenet}
                data = read.get(name, read_folder)(name, root, size)
                with written_whole(cache) as temporary:
                    torch.save({"signature": signature, "data": list(data)}, temporary)
    return data


def read_cache(cache, signature):
    """Data, or None where the file is not there, is damaged, or was made of other files or settings."""
    try:
        saved = read_saved(cache, mmap=os.name != "nt")  # mapped: pages are read when they are needed
        if saved["signature"] == signature:
            return Data(*saved["data"])
        print(f"{cache} is of other files or settings: rebuilding it", file=sys.stderr)
    except FileNotFoundError:
        pass
    except Exception as error:  # what torch.load raises on a damaged file has no common class
        print(f"{cache} is damaged ({one_line(error)[:80]}): rebuilding it", file=sys.stderr)
    return None


def synthetic(size=16, classes=20, train=200, test=50):
    """Coloured blobs: a class is a smooth random pattern, an image is that pattern shifted, dimmed, mixed with another
    random pattern and drowned in noise. Deterministic, the same on every machine. Returns Data."""
    generator = torch.Generator().manual_seed(0)

    def patterns(n):
        coarse = torch.randn(n, 3, 5, 5, generator=generator)
        return F.interpolate(coarse, 2 * size, mode="bicubic", align_corners=False).clamp(-2, 2)

    pattern = patterns(classes)

    def draw(per_class):
        labels = torch.arange(classes).repeat_interleave(per_class)
        n = len(labels)
        corner = torch.randint(size // 2 - size // 4, size // 2 + size // 4 + 1, (n, 2), generator=generator)
        rows, columns = (corner[:, i, None] + torch.arange(size) for i in (0, 1))
        x = pattern[labels][torch.arange(n)[:, None, None], :, rows[:, :, None], columns[:, None, :]].movedim(-1, 1)
        x = x * (0.6 + 0.4 * torch.rand(n, 1, 1, 1, generator=generator)) + 0.7 * patterns(n)[:, :, :size, :size]
        x = x + 0.5 * torch.randn(x.shape, generator=generator)
        return (128 + 40 * x).clamp(0, 255).to(torch.uint8).contiguous(), labels

    return Data(*draw(train), *draw(test), [f"blob {i}" for i in range(classes)])


def read_torchvision(name, root, size):
    """CIFAR-100 and MNIST through torchvision, which checks their MD5 sums. Greyscale becomes three equal channels."""
    from torchvision import datasets
    cls, home, files, archives = {
        "cifar100": (datasets.CIFAR100, "cifar-100-python", ["train", "test", "meta"], ["cifar-100-python.tar.gz"]),
        "mnist": (datasets.MNIST, "MNIST/raw", [file.removesuffix(".gz") for file, _ in datasets.MNIST.resources],
                  [f"MNIST/raw/{file}" for file, _ in datasets.MNIST.resources]),
    }[name]
    try:
        if not all((root / home / file).exists() for file in files):
            with downloads(root, " and ".join(archives)) as scratch:
                for archive in archives:  # put there by hand, for machines without a network
                    if (root / archive).exists():
                        (scratch / archive).parent.mkdir(parents=True, exist_ok=True)
                        os.symlink((root / archive).resolve(), scratch / archive)
                cls(scratch, train=True, download=True)
                (root / home).mkdir(parents=True, exist_ok=True)
                for file in files:
                    os.replace(scratch / home / file, root / home / file)
        train, test = cls(root, train=True), cls(root, train=False)
    except (RuntimeError, AssertionError, ValueError, EOFError) as error:
        raise Problem(f"{root / home}: not the published files ({one_line(error)}); delete it and run again") from error

    def images(split):
        x = torch.as_tensor(split.data)
        x = x.movedim(-1, 1) if x.ndim == 4 else x[:, None].expand(-1, 3, -1, -1)
        if x.shape[-1] != size:
            x = F.interpolate(x.float(), size, mode="bilinear", antialias=True, align_corners=False).round()
        return x.to(torch.uint8).contiguous()

    return Data(images(train), torch.as_tensor(train.targets), images(test), torch.as_tensor(test.targets),
                list(train.classes))


def read_tinyimagenet(name, root, size):
    """TinyImageNet from DIR/tiny-imagenet-200/ or DIR/tiny-imagenet-200.zip (fetched if neither is there). The test set
    is the labelled `val` images. Classes are in the order of their WordNet ids."""
    from torchvision.datasets.utils import check_integrity, download_url
    folder, archive = root / "tiny-imagenet-200", root / "tiny-imagenet-200.zip"
    if folder.is_dir():
        names = [p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.suffix in (".JPEG", ".txt")]
        read = lambda member: (folder / member).read_bytes()
    else:
        if not archive.exists():
            with downloads(root, TINY_URL) as scratch:
                download_url(TINY_URL, scratch, archive.name, TINY_MD5)
                os.replace(scratch / archive.name, archive)
        if not check_integrity(str(archive), TINY_MD5):
            raise Problem(f"{archive}: its MD5 is not {TINY_MD5}; delete it and run again to fetch it")
        try:
            source = zipfile.ZipFile(archive)
        except zipfile.BadZipFile as error:
            raise Problem(f"{archive}: {one_line(error)}; delete it and run again to fetch it") from error
        names = [n.split("/", 1)[1] for n in source.namelist() if n.endswith((".JPEG", ".txt"))]
        read = lambda member: source.read(f"tiny-imagenet-200/{member}")
    lines = read("val/val_annotations.txt").decode().splitlines() if "val/val_annotations.txt" in names else []
    label_of = {f"val/images/{line.split()[0]}": line.split()[1] for line in lines}
    train = sorted(n for n in names if n.startswith("train/") and n.endswith(".JPEG"))
    test = sorted(n for n in names if n in label_of)
    for split, found in ("train", train), ("val", test):
        if len(found) != TINY_COUNTS[split]:
            raise Problem(f"{folder}: {len(found):,} of {TINY_COUNTS[split]:,} {split} images are there; "
                          "delete the folder and unpack tiny-imagenet-200.zip again")
    wnids = sorted({n.split("/")[1] for n in train})
    words = read("words.txt").decode().splitlines() if "words.txt" in names else []
    words = dict(line.split("\t")[:2] for line in words)
    index = {wnid: i for i, wnid in enumerate(wnids)}
    images = decode([(n, lambda n=n: read(n)) for n in train + test], size)
    return Data(images[:len(train)], torch.tensor([index[n.split("/")[1]] for n in train]),
                images[len(train):], torch.tensor([index[label_of[n]] for n in test]),
                [words.get(wnid, wnid).split(",")[0] for wnid in wnids])


def read_folder(name, root, size):
    """A folder with train/ and val/, one sub-folder a class (torchvision.datasets.ImageFolder)."""
    from torchvision.datasets import ImageFolder
    splits = []
    for split in ("train", "val"):
        if not (Path(name) / split).is_dir():
            raise Problem(f"--dataset {name}: no folder {split}/ in it; it needs train/ and val/, one folder a class")
        try:
            splits.append(ImageFolder(str(Path(name) / split)))
        except FileNotFoundError as error:  # no classes at all, or a class without images, which it names
            raise Problem(f"--dataset {name}: in {split}/: {one_line(error)}") from error
    train, test = splits
    if train.classes != test.classes:
        odd = sorted(set(train.classes) ^ set(test.classes))
        raise Problem(f"--dataset {name}: train/ and val/ differ in the classes {', '.join(odd[:5])}")
    images = decode([(path, Path(path).read_bytes) for path, _ in train.samples + test.samples], size)
    return Data(images[:len(train)], torch.tensor(train.targets), images[len(train):], torch.tensor(test.targets),
                train.classes)


def decode(files, size):
    """[(name, function that returns the file's bytes)] -> uint8 (N, 3, size, size), on all cores. Images of another
    size are cropped to a square about their centre and resized."""
    import io

    from PIL import Image, ImageOps
    out = torch.empty(len(files), 3, size, size, dtype=torch.uint8)
    live = sys.stderr.isatty()

    def one(i):
        name, read = files[i]
        try:
            with Image.open(io.BytesIO(read())) as image:
                if image.mode.startswith("I;16"):  # Pillow would clip 16-bit greys instead of scaling them
                    image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
                image = image.convert("RGB")
                if image.size != (size, size):
                    image = ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC)
                out[i] = torch.from_numpy(np.array(image)).movedim(-1, 0)
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise Problem(f"{name}: not a readable image ({one_line(error)}); replace or delete it") from error
        if live and i % 1000 == 0:
            print(f"\rdecoding {i:,} of {len(files):,} images", end="", file=sys.stderr)

    with ThreadPoolExecutor(os.cpu_count()) as pool:  # Pillow lets go of the interpreter while it decodes
        for _ in pool.map(one, range(len(files))):
            pass
    if live:
        print("\r\033[K", end="", file=sys.stderr)
    return out


@functools.cache
def channels(values, device):
    """(3, 1, 1), made once: the copy to a GPU would make every step wait."""
    with torch.inference_mode(False):
        return torch.tensor(values, device=device).view(3, 1, 1)


def normalise(images):
    """uint8 (..., 3, H, W) -> float32, each channel with about zero mean and unit variance."""
    return (images.float() / 255 - channels(MEAN, images.device)) / channels(STD, images.device)


def augment(images, pad, flip=True):
    """A random crop after zero-padding by `pad`, and a random mirror image, for each of the uint8 images (B, C, H, W)
    on its own. Runs on the images' device without waiting for it."""
    b, _, h, w = images.shape
    windows = F.pad(images, (pad, pad, pad, pad)).unfold(2, h, 1).unfold(3, w, 1)  # views, of all crops there are
    top, left = torch.randint(2 * pad + 1, (2, b), device=images.device)
    crops = windows[torch.arange(b, device=images.device), :, top, left]
    if flip:
        crops = torch.where(torch.rand(b, 1, 1, 1, device=images.device) < 0.5, crops.flip(3), crops)
    return crops


# ----------------------------------------------------------------------------------------------------------------------
# Tasks

Task = namedtuple("Task", "classes train_images train_labels test_images test_labels")


def split_tasks(data, tasks, seed=None, val_fraction=0.0):
    """Cut a data set into tasks of equally many classes.

    Args:
        data: Data.
        tasks: their number K; it must divide the number of classes.
        seed: None takes the classes in the order of their labels, a number shuffles them.
        val_fraction: > 0 holds out that part of each class's *training* images and puts it in the test set's place, to
            choose hyper-parameters on. The same images every time.

    Returns:
        list of K Tasks; labels count from 0 to C-1 within each task.
    """
    n = len(data.classes)
    if n % tasks or n // tasks < 2:
        fitting = [d for d in range(1, n // 2 + 1) if n % d == 0]
        raise Problem(f"--tasks {tasks}: {n} classes do not divide into {tasks} tasks of two or more classes (any of "
                      f"{fitting} would do)")
    order = torch.arange(n) if seed is None else torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    train_rows = [torch.nonzero(data.train_labels == c).flatten() for c in range(n)]
    test_rows = [torch.nonzero(data.test_labels == c).flatten() for c in range(n)]
    test_images = data.test_images
    if val_fraction:
        generator, test_images = torch.Generator().manual_seed(0), data.train_images
        for c, rows in enumerate(train_rows):
            rows = rows[torch.randperm(len(rows), generator=generator)]
            held_out = max(1, round(val_fraction * len(rows)))
            train_rows[c], test_rows[c] = rows[held_out:].sort().values, rows[:held_out].sort().values
    for name, rows in ("training", train_rows), ("validation" if val_fraction else "test", test_rows):
        for c in range(n):
            if not len(rows[c]):
                raise Problem(f"class {data.classes[c]!r} has no {name} images")

    def pick(images, rows, members):
        index = torch.cat([rows[c] for c in members])
        if (index.diff() == 1).all():  # a view where it can be one: no second copy of a large data set
            index = slice(int(index[0]), int(index[-1]) + 1)
        return images[index], torch.cat([torch.full((len(rows[c]),), i) for i, c in enumerate(members)])

    return [Task([data.classes[c] for c in members], *pick(data.train_images, train_rows, members),
                 *pick(test_images, test_rows, members)) for members in order.view(tasks, -1).tolist()]


# ----------------------------------------------------------------------------------------------------------------------
# Model

class Conv3x3(nn.Conv2d):
    """Where few pixels of many channels come out, as at the end of a ResNet for small images and for prototypes, this
    is on a CPU a matrix product of patches and filters: the same result, several times as fast as oneDNN's."""

    def __init__(self, inputs, outputs, stride=1):
        super().__init__(inputs, outputs, 3, stride, 1, bias=False)

    def forward(self, x):
        s, (h, w) = self.stride[0], x.shape[-2:]
        rows, columns = (h - 1) // s + 1, (w - 1) // s + 1
        if x.device.type != "cpu" or self.in_channels < 64 * rows * columns:
            return super().forward(x)
        x, filters = x.movedim(1, -1), self.weight.movedim(1, -1)  # channels last, as in memory
        if rows * columns == 1:  # some taps meet nothing but padding
            return F.linear(x.flatten(1), filters[:, 1:1 + h, 1:1 + w].flatten(1))[:, :, None, None]
        x = F.pad(x, (0, 0, 1, 1, 1, 1))
        patches = [x[:, i:i + s * rows:s, j:j + s * columns:s] for i in range(3) for j in range(3)]
        return F.linear(torch.cat(patches, -1), filters.flatten(1)).movedim(-1, 1)


class BasicBlock(nn.Module):
    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.conv1 = Conv3x3(inputs, outputs, stride)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = Conv3x3(outputs, outputs)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample = None
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x):
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        y = self.bn2(self.conv2(y))
        return F.relu(y + (x if self.downsample is None else self.downsample(x)), inplace=True)


class ResNet18(nn.Module):
    """ResNet-18 without its classifier: images (B, 3, H, W) -> features (B, 8 * width).

    Parameter names are torchvision's: `stem="7x7"` (stride 2 and max-pool) at `width=64` takes its weights.
    `stem="3x3"` (stride 1, no pooling) is what the field uses at 32 and 64 pixels. `features` is D.
    """

    def __init__(self, width=64, stem="3x3"):
        super().__init__()
        self.features = 8 * width
        if stem == "7x7":
            self.conv1 = nn.Conv2d(3, width, 7, 2, 3, bias=False)
            self.maxpool = nn.MaxPool2d(3, 2, 1)
        else:
            self.conv1 = nn.Conv2d(3, width, 3, 1, 1, bias=False)
            self.maxpool = nn.Identity()
        self.bn1 = nn.BatchNorm2d(width)
        layer = lambda i, o, stride: nn.Sequential(BasicBlock(i, o, stride), BasicBlock(o, o, 1))
        self.layer1 = layer(width, width, 1)
        self.layer2 = layer(width, 2 * width, 2)
        self.layer3 = layer(2 * width, 4 * width, 2)
        self.layer4 = layer(4 * width, 8 * width, 2)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x):
        x = self.maxpool(F.relu(self.bn1(self.conv1(x)), inplace=True))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return x.mean((2, 3))


class Hypernetwork(nn.Module):
    """H of Eq. 2: task embeddings (..., E) -> heads (..., C, D), through two hidden layers.

    Tanh keeps the hidden vectors of unlike tasks about orthogonal, where ReLU would turn them into one direction: what
    one head learns then moves the other heads less. For embeddings of unit mean square the heads start with the
    standard deviation of nn.Linear's weights, 1/sqrt(3D).
    """

    def __init__(self, embedding, classes, features, hidden=64):
        super().__init__()
        self.shape = classes, features
        self.body = nn.Sequential(nn.Linear(embedding, hidden), nn.Tanh(), nn.Linear(hidden, hidden), nn.Tanh())
        self.out = nn.Linear(hidden, classes * features)
        for layer, std in zip((self.body[0], self.body[2], self.out), (  # 0.4: what tanh squared is on average
                math.sqrt(2 / embedding), math.sqrt(2 / hidden), 1 / math.sqrt(3 * features * 0.4 * hidden))):
            nn.init.normal_(layer.weight, std=std)
            nn.init.zeros_(layer.bias)

    def forward(self, embedding):
        return self.out(self.body(embedding)).unflatten(-1, self.shape)


HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}


def detached(module):
    return {name: p.detach() for name, p in module.named_parameters()}


class PAH(nn.Module):
    """Backbone, hypernetwork and prototypes.

    Args:
        backbone: any module that maps images (B, 3, H, W) to (B, D); D is its attribute `features`, or given here.
        tasks, classes: K tasks of C classes each.
        proto_size, proto_channels: a prototype is a (channels, s, s) image; channels is 3 or 1 (grey).
        hidden: width of the hypernetwork's two hidden layers.
        head: "hyper", or the control "stored": one linear head a task instead of the hypernetwork.
        embedding: "prototypes", or the control "vector": a free vector of the same size, which is no image.
        precision: "fp32", or "bf16" or "fp16" for the backbone; heads, logits and losses are fp32 in any case.

    `prototypes` is (K, C, channels, s, s). Rows of tasks that have not begun are zero and get no gradient.
    """

    def __init__(self, backbone, tasks, classes, features=None, proto_size=10, proto_channels=3, hidden=64,
                 head="hyper", embedding="prototypes", precision="fp32"):
        super().__init__()
        features = features or backbone.features
        self.backbone = backbone
        self.precision = precision
        self.distils_prototypes = head == "hyper" and embedding == "prototypes"
        if head == "hyper":
            self.prototypes = nn.Parameter(torch.zeros(tasks, classes, proto_channels, proto_size, proto_size))
            self.hypernetwork = Hypernetwork(classes * proto_channels * proto_size**2, classes, features, hidden)
        else:
            bound = 1 / math.sqrt(features)
            self.stored = nn.Parameter(torch.empty(tasks, classes, features).uniform_(-bound, bound))
        self.frozen_heads = None

    def heads(self, n):
        """The heads of the first n tasks (None: of all), (n, C, D), generated now (by a frozen model: once)."""
        if self.frozen_heads is not None:
            return self.frozen_heads[:n]
        if hasattr(self, "stored"):
            return self.stored[:n]
        return self.hypernetwork(self.prototypes[:n].flatten(1))  # Eqs. 3 and 2

    def features(self, images, constant=False):
        """Features (B, D) in fp32. `constant` takes the backbone as it is: its weights get no gradient, and BatchNorm
        uses its running statistics and leaves them alone."""
        with torch.autocast(images.device.type, HALF.get(self.precision), enabled=self.precision in HALF):
            if not constant:
                return self.backbone(images).float()
            training = self.backbone.training
            self.backbone.eval()
            out = torch.func.functional_call(self.backbone, detached(self.backbone), images).float()
            self.backbone.train(training)
            return out

    def forward(self, images, task):
        """Logits (B, C) of normalised images with the head of `task` (Eq. 1)."""
        return self.features(images) @ self.heads(task + 1)[task].T

    @torch.no_grad()
    def begin_task(self, task, images, labels, init="semantic"):
        """Set the prototypes of `task`: a random training image of each class, resized and normalised, or noise.

        Args:
            images, labels: the task's training set, uint8 (N, 3, H, W) and class numbers 0..C-1.
            init: "semantic" or "random" (standard normal).
        """
        if hasattr(self, "stored"):
            return
        if init == "random" or not self.distils_prototypes:
            self.prototypes[task] = torch.randn_like(self.prototypes[task])
            return
        _, classes, channels, size, _ = self.prototypes.shape
        for c in range(classes):
            rows = torch.nonzero(labels == c).flatten()
            image = normalise(images[rows[torch.randint(len(rows), ())]])
            image = F.interpolate(image[None], size, mode="bilinear", antialias=True, align_corners=False)[0]
            self.prototypes[task, c] = image if channels == 3 else image.mean(0, keepdim=True)

    def freeze(self, tasks):
        """A copy for the next task to be taught by: eval mode, no gradients, heads of the first `tasks` generated."""
        teacher = copy.deepcopy(self).eval().requires_grad_(False)
        teacher.frozen_heads = teacher.heads(tasks)
        for layer in teacher.backbone.modules():  # what autocast would round at every pass is rounded once
            if self.precision in HALF and isinstance(layer, (nn.Conv2d, nn.Linear)):
                layer.to(HALF[self.precision])
        return teacher


# ----------------------------------------------------------------------------------------------------------------------
# Losses

def distillation(new, old, temperature=2.0):
    """KL(old || new) between softened logits (..., C), times T^2 (Hinton et al. 2015). Returns (...,)."""
    new, old = F.log_softmax(new / temperature, -1), F.log_softmax(old / temperature, -1)
    return temperature**2 * F.kl_div(new, old, reduction="none", log_target=True).sum(-1)


def soft_loss_prototypes(model, teacher, n, temperature=2.0, drawn=0):
    """L_sp (Eq. 6): the prototypes of the first n tasks as input images, student against teacher, each with the head
    that it generates for that task; mean over a task's prototypes, sum over tasks. Its gradient reaches those
    prototypes alone: the student's weights are constants here, and its BatchNorm uses its running statistics.
    `drawn` > 0: that many of the tasks, drawn at random, stand for all n, an unbiased estimate of constant cost."""
    tasks = torch.randperm(n, device=model.prototypes.device)[:drawn] if 0 < drawn < n else slice(n)
    prototypes, old_heads = model.prototypes[tasks], teacher.heads(n)[tasks]
    images = prototypes.flatten(0, 1).expand(-1, 3, -1, -1)
    heads = torch.func.functional_call(model.hypernetwork, detached(model.hypernetwork), prototypes.flatten(1))
    with torch.no_grad():
        old = teacher.features(images)
    logits = lambda features, heads: torch.einsum("npd,ncd->npc", features.unflatten(0, heads.shape[:2]), heads)
    new = model.features(images, constant=True)
    return distillation(logits(new, heads), logits(old, old_heads), temperature).mean() * n


def joint_loss(model, teacher, images, labels, task, lam=1.0, mu=1.0, temperature=2.0, smoothing=0.0, sp_tasks=0):
    """L = L_hm + lam L_sm + mu L_sp on one batch.

    Args:
        model, teacher: the PAH in training and the frozen one from the end of the task before (None in the first).
        images, labels: normalised images (B, 3, H, W), class numbers within the task (B,).
        task: the task's number k, counted from 0; or a tensor (B,) of them, one an image (joint training).
        sp_tasks: estimate L_sp from that many earlier tasks; 0 takes all.

    Returns:
        the loss to minimise, and the three losses as a detached tensor (3,).
    """
    n = 0 if teacher is None else task  # earlier tasks
    heads = model.heads(task + 1 if isinstance(task, int) else None)
    logits = torch.einsum("bd,ncd->bnc", model.features(images), heads)
    own = logits[torch.arange(len(labels), device=labels.device), task]
    l_hm = F.cross_entropy(own, labels, label_smoothing=smoothing)  # Eq. 4
    l_sm = l_sp = torch.zeros((), device=images.device)
    if n and lam:  # Eq. 5: mean over the batch, sum over the earlier tasks
        with torch.no_grad():
            old = torch.einsum("bd,ncd->bnc", teacher.features(images), teacher.heads(n))
        l_sm = distillation(logits[:, :n], old, temperature).mean(0).sum()
    if n and mu and model.distils_prototypes:
        l_sp = soft_loss_prototypes(model, teacher, n, temperature, sp_tasks)
    return l_hm + lam * l_sm + mu * l_sp, torch.stack([l_hm, l_sm, l_sp]).detach()


# ----------------------------------------------------------------------------------------------------------------------
# Metrics: R as nested lists, row k with k+1 percentages: R[k][j] is the accuracy on task j after task k

def average_accuracy(R):
    """AA: mean of the last row, in percent."""
    return sum(R[-1]) / len(R[-1])


def forgetting(R):
    """FM: mean over the earlier tasks of (best accuracy before the last task - accuracy now), in percent; 0 after one
    task (Chaudhry et al. 2018, "Riemannian walk")."""
    last = len(R) - 1
    return sum(max(R[l][j] for l in range(j, last)) - R[last][j] for j in range(last)) / max(1, last)


def backward_transfer(R):
    """BWT: mean over the earlier tasks of (accuracy now - accuracy when just learned), in percent; 0 after one task
    (Lopez-Paz and Ranzato 2017)."""
    last = len(R) - 1
    return sum(R[last][j] - R[j][j] for j in range(last)) / max(1, last)


def learning_accuracy(R):
    """LA: mean accuracy on each task just after it was learned, in percent."""
    return sum(row[-1] for row in R) / len(R)


@torch.inference_mode()
def evaluate(model, task, images, labels, batch_size=500):
    """Percentage of correct answers on one task, in eval mode, its head generated now; the model's mode is left as it
    was. Images are uint8 (N, 3, H, W), labels (N,). Under torchrun each process takes its share."""
    training, device, (rank, world) = model.training, next(model.parameters()).device, rank_and_world()
    model.eval()
    right = torch.zeros((), dtype=torch.int64, device=device)
    for x, y in zip(images[rank::world].split(batch_size), labels[rank::world].split(batch_size)):
        right += (model(normalise(x.to(device)), task).argmax(1) == y.to(device)).sum()
    if world > 1:
        torch.distributed.all_reduce(right)
    model.train(training)
    return 100 * int(right) / len(labels)


# ----------------------------------------------------------------------------------------------------------------------
# Training

# Odd polynomials a x + b x^3 + c x^5, each as close to 1 as can be: the first on [0.03, 1], the second on the range in
# which the first leaves that.
QUINTICS = (7.3625, -20.7434, 15.1606), (2.9175, -2.1824, 0.4755)
TURNS = 5  # of Muon: so many steps until each filter bank has moved once; ResNet-18 has four in each turn


def orthogonalised(matrices):
    """U V^T for each of the matrices U S V^T of one shape, roughly: the singular values above 0.03 of their 4-norm end
    between 0.62 and 1.38. Takes and returns a list.

    Newton-Schulz iteration as in Muon (Jordan et al. 2024), with polynomials chosen as by Amsel et al. (2025). All of
    it runs on the small Gram matrix, in fp32; the long side is multiplied twice, not twice a step, and there bf16 or
    TF32 do where the hardware has them, as both times they round the same matrix to the same one."""
    if matrices[0].shape[0] > matrices[0].shape[1]:
        return [x.mT for x in orthogonalised([m.mT for m in matrices])]
    with rounded_products():
        gram = torch.stack([x @ x.mT for x in matrices])
    bound = gram.norm(dim=(-2, -1), keepdim=True) + 1e-14  # no squared singular value is above it
    gram /= bound

    def polynomial(gram, a, b, c):  # as a factor of x: a + b x x^T + c (x x^T)^2
        factor = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        factor.diagonal(dim1=-2, dim2=-1).add_(a)
        return factor

    product = polynomial(gram, *QUINTICS[0])
    for coefficients in QUINTICS[1:]:
        product = polynomial(product @ gram @ product, *coefficients) @ product
    product /= bound.sqrt()
    with rounded_products():
        return [factor @ x for factor, x in zip(product, matrices)]


@contextlib.contextmanager
def rounded_products():
    """Products of fp32 matrices may round what they multiply to bf16 or TF32."""
    before = None
    with contextlib.suppress(RuntimeError):  # where torch.backends' fp32_precision is in use: that stays as it is
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        if before:
            torch.set_float32_matmul_precision(before)


class Muon(torch.optim.AdamW):
    """AdamW, but in parameter groups with `muon=True` a filter bank, as a matrix (outputs, the rest), moves along its
    orthogonalised Nesterov momentum (Jordan et al. 2024). They take turns, every fifth in a step, and move five times
    as far: a momentum of some twenty steps hardly turns in five, and to orthogonalise it is what costs."""

    @torch.no_grad()
    def step(self, closure=None):
        for group in (g for g in self.param_groups if g.get("muon")):
            lr, turn, same_shape = TURNS * group["lr"], group.get("turn", 0), {}
            group["turn"] = (turn + 1) % TURNS
            filters = [p for p in group["params"] if p.grad is not None]
            for i, p in enumerate(filters):
                if "momentum" not in self.state[p]:
                    self.state[p]["momentum"] = torch.zeros_like(p)
                if i % TURNS == turn:
                    same_shape.setdefault(p.shape, []).append(p)
            if filters:
                torch._foreach_lerp_([self.state[p]["momentum"] for p in filters], [p.grad for p in filters], 0.05)
            for shape, due in same_shape.items():  # together: a GPU would wait for many small operations
                torch._foreach_lerp_([p.grad for p in due], [self.state[p]["momentum"] for p in due], 0.95)
                banks = [p.grad.movedim(1, -1) for p in due]  # channels last, as in memory: matrices without a copy
                updates = orthogonalised([bank.flatten(1) for bank in banks])
                updates = [update.view_as(bank).movedim(-1, 1) for update, bank in zip(updates, banks)]
                torch._foreach_mul_(due, 1 - lr * group["weight_decay"])
                torch._foreach_add_(due, updates, alpha=-lr * max(1, shape[0] / shape[1:].numel()) ** 0.5)
            for p in filters:
                p.grad = None  # AdamW leaves it alone
        return super().step(closure)


def make_optimizer(model, lr, hyper_lr, proto_lr, weight_decay, muon=True):
    """Muon for the backbone's filters at `lr`, AdamW for the rest (BatchNorm and stored heads at lr / 10); muon=False:
    AdamW for all. Filters, hypernetwork and stored heads decay; BatchNorm and prototypes do not."""
    backbone, adam_lr = list(model.backbone.parameters()), lr / 10 if muon else lr
    groups = [dict(params=[p for p in backbone if p.ndim > 1], lr=lr, weight_decay=weight_decay, muon=muon),
              dict(params=[p for p in backbone if p.ndim <= 1], lr=adam_lr, weight_decay=0)]
    if hasattr(model, "stored"):
        groups += [dict(params=[model.stored], lr=adam_lr, weight_decay=weight_decay)]
    else:
        groups += [dict(params=model.hypernetwork.parameters(), lr=hyper_lr, weight_decay=weight_decay),
                   dict(params=[model.prototypes], lr=proto_lr, weight_decay=0)]
    # with fp16, a fused AdamW would divide by the loss scale itself
    fused = backbone[0].device.type in ("cpu", "cuda") and model.precision != "fp16"
    return Muon(groups, fused=fused)


class Objective(nn.Module):
    """joint_loss as a module, for DistributedDataParallel to wrap: what it synchronises is the real thing."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, *batch):
        return joint_loss(self.model, *batch)


def train_task(model, teacher, task, images, labels, args, progress):
    """Train on one task: the only place where training images are read, and it is given those of this task alone.

    Args:
        model, teacher: PAH, and its frozen copy from the end of the task before (None in the first).
        task: the task's number k, counted from 0; None trains all tasks at once, with labels k * C + class.
        images, labels: uint8 (N, 3, H, W) and (N,).
        args: the command line's options.
        progress: called as progress(epoch, step, losses) with each step's (L_hm, L_sm, L_sp) so far, (steps, 3).

    Under torchrun all processes draw the same batch and the same augmentation, and each takes its share: the run is the
    one that a single process makes, up to rounding and to BatchNorm where it is not synchronised (on the CPU).
    """
    device, (rank, world) = next(model.parameters()).device, rank_and_world()
    if device.type == "cuda" and images.nbytes < torch.cuda.mem_get_info()[0] // 2:
        images = images.to(device)
    labels = labels.to(device)
    steps, batch = steps_and_batch(len(images), args.batch_size, world)
    optimizer = make_optimizer(model, args.lr, args.hyper_lr, args.proto_lr, args.weight_decay,
                               muon=args.optimizer == "muon")
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, [g["lr"] for g in optimizer.param_groups],
                                                   total_steps=steps * args.epochs + 1, cycle_momentum=False)
    scaler = torch.amp.GradScaler(device.type, enabled=args.precision == "fp16")
    losses = torch.zeros(steps * args.epochs, 3, device=device)
    objective = Objective(model.train())
    if world > 1:
        objective = nn.parallel.DistributedDataParallel(objective)
    for epoch in range(args.epochs):
        order = torch.randperm(len(images), device=images.device)[:steps * batch].view(steps, batch)
        for i, rows in enumerate(order):
            step = epoch * steps + i
            x = images[rows].to(device, non_blocking=True)
            y = labels[rows.to(device)]
            if args.augment != "none":
                x = augment(x, pad=x.shape[-1] // 8, flip=args.augment == "crop-flip")
            x, y, k = normalise(x[rank::world]), y[rank::world], task
            if task is None:
                k, y = y // args.classes, y % args.classes
            loss, losses[step] = objective(teacher, x, y, k, args.lam, args.mu, args.temperature, args.label_smoothing,
                                           args.sp_tasks)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            schedule.step()
            optimizer.zero_grad(set_to_none=True)
            progress(epoch, step, losses)
    if world > 1:  # each has updated BatchNorm's statistics once since the last forward pass shared them
        for buffer in model.buffers():
            torch.distributed.broadcast(buffer, 0)


def steps_and_batch(images, batch_size, world=1):
    """Steps an epoch and images a step; the rest of an epoch's random order is dropped."""
    batch = min(batch_size, images)
    batch -= batch % world
    return images // batch, batch


class Progress:
    """The line that says how the run goes: updated in place on a terminal, once an epoch elsewhere."""

    def __init__(self, args, rounds, runs_left):
        self.args, self.rounds, self.runs_left, self.live = args, list(rounds), runs_left, sys.stdout.isatty()

    def begin(self, task, images):
        self.task, self.start, self.shown = task, time.perf_counter(), 0.0
        steps, self.batch = steps_and_batch(images, self.args.batch_size, rank_and_world()[1])
        self.steps = steps * self.args.epochs

    def __call__(self, epoch, step, losses):
        now = time.perf_counter()
        last = (step + 1) % (self.steps // self.args.epochs) == 0
        if not (last or self.live and now - self.shown > 0.5):
            return
        self.shown = now
        done = losses[:step + 1]
        if not done.isfinite().all():
            bad = int((~done.isfinite()).any(1).nonzero()[0])
            raise Problem(f"the loss is not a number any more: task {self.task + 1}, epoch "
                          f"{bad // (self.steps // self.args.epochs) + 1}, step {bad + 1}; try a lower --lr, "
                          "or --precision fp32")
        l_hm, l_sm, l_sp = done[-50:].mean(0).tolist()
        seconds = (now - self.start) / (step + 1)
        later = self.rounds[::-1].index(self.task) + self.runs_left * len(self.rounds)
        whole = seconds * self.steps * (1 if self.task else 1.3)  # the first task has no teacher
        left = seconds * (self.steps - step - 1) + whole * later
        line = (f"task {self.task + 1}/{self.args.tasks} epoch {epoch + 1}/{self.args.epochs}  hm {l_hm:.3f} "
                f"sm {l_sm:.3f} sp {l_sp:.3f}  {self.batch / seconds:,.0f} img/s  {duration(left)} left")
        print(f"\r\033[K{line}" if self.live else line, end="" if self.live else "\n", flush=True)

    def clear(self):
        print("\r\033[K" if self.live else "", end="", flush=True)


def duration(seconds):
    seconds = round(seconds)
    hours, minutes = seconds // 3600, seconds // 60 % 60
    return f"{hours}:{minutes:02}:{seconds % 60:02}" if hours else f"{minutes}:{seconds % 60:02}"


def build(args):
    """A fresh PAH as the options say (its tasks and classes among them)."""
    backbone = ResNet18(args.width, args.stem)
    if args.pretrained:
        from torchvision.models import ResNet18_Weights
        try:
            backbone.load_state_dict({k: v for k, v in ResNet18_Weights.DEFAULT.get_state_dict(progress=False).items()
                                      if not k.startswith("fc.")})
        except OSError as error:
            raise Problem(f"--pretrained: cannot fetch the weights ({one_line(error)}); put "
                          f"{ResNet18_Weights.DEFAULT.url} into {torch.hub.get_dir()}/checkpoints") from error
    if args.device != "cpu" or args.width % 8 == 0:  # oneDNN's AVX2 kernels corrupt memory with other channel counts
        backbone.to(memory_format=torch.channels_last)
    return PAH(backbone, args.tasks, args.classes, proto_size=args.proto_size, proto_channels=args.proto_channels,
               hidden=args.hidden, head=args.head, embedding=args.embedding, precision=args.precision)


# Options that may differ between a run and its --resume.
SAME_RESULT = {"out", "data", "seeds", "resume", "device", "stop_after", "report", "with_reported", "format", "bench"}


def read_checkpoint(path):
    """checkpoint.pt as a dict, or a Problem."""
    try:
        checkpoint = read_saved(path)
        if checkpoint["format"] != 1:
            raise ValueError(f"format {checkpoint['format']}, not 1")
        return checkpoint
    except FileNotFoundError as error:
        raise Problem(f"{path}: no such file") from error
    except Exception as error:  # what torch.load raises on a damaged file has no common class
        raise Problem(f"{path}: damaged or not a PAH checkpoint ({one_line(error)[:80]}); delete it to start this seed "
                      "again") from error


def load_checkpoint(path, device="cpu"):
    """The model that a run left behind, in eval mode: `load_checkpoint(path)(images, task)` gives logits.

    Returns PAH; raises Problem if the file is damaged."""
    checkpoint = read_checkpoint(path)
    model = build(argparse.Namespace(**checkpoint["args"] | {"pretrained": False}))
    model.load_state_dict(checkpoint["model"])
    return model.to(device).eval()


def run(args, seed, tasks, runs_left=0):
    """One seed: train on the tasks in turn, evaluate after each, leave results.json, checkpoint.pt and pictures in
    OUT/seed<S>. Returns what results.json holds."""
    folder, device, (rank, world) = Path(args.out) / f"seed{seed}", torch.device(args.device), rank_and_world()
    names = "results.json", "checkpoint.pt", "prototypes-initial.pt", "prototypes.png", "accuracy.png", "curves.png"
    file = {name: folder / name for name in names}
    torch.manual_seed(seed)
    model = build(args).to(device)
    if world > 1 and device.type == "cuda":
        model.backbone = nn.SyncBatchNorm.convert_sync_batchnorm(model.backbone)
    state = {"format": 1, "args": vars(args) | {"out": str(args.out)}, "seed": seed, "tasks_done": 0, "accuracy": [],
             "seconds": 0.0, "images": 0, "training_seconds": 0.0}
    initial = torch.zeros_like(model.prototypes.detach()).cpu() if model.distils_prototypes else None
    saved = [read_checkpoint(file["checkpoint.pt"]) if rank == 0 and file["checkpoint.pt"].exists() else None]
    if world > 1:
        torch.distributed.broadcast_object_list(saved)
    if saved := saved[0]:
        differing = [f"--{k.replace('_', '-')} ({saved['args'].get(k)} there, {v} now)"
                     for k, v in state["args"].items() if k not in SAME_RESULT and saved["args"].get(k) != v]
        if not args.resume or differing:
            raise Problem(f"{folder} holds " + (
                f"a run with other options: {', '.join(differing)}; give those, or another --out" if args.resume else
                "a finished run: give another --out, or delete it" if saved["tasks_done"] == len(tasks) else
                f"an unfinished run, {saved['tasks_done']} of {len(tasks)} tasks: add --resume to go on, or give "
                "another --out"))
        model.load_state_dict(saved.pop("model"))
        state = saved | {"args": state["args"]}
        if initial is not None and file["prototypes-initial.pt"].exists():
            initial = read_checkpoint(file["prototypes-initial.pt"])["prototypes"]
    rounds = [len(tasks) - 1] if args.joint else range(args.tasks if args.stop_after is None else args.stop_after)
    R, progress, result = state["accuracy"], Progress(args, rounds, runs_left), None
    for k in rounds:
        if k < state["tasks_done"]:
            continue
        start = time.perf_counter()
        torch.manual_seed(1_000_003 * (seed + 1) + k)  # a task's randomness depends on nothing that came before it
        teacher = model.freeze(k) if k and not args.joint and (args.lam or args.mu) else None
        for i in range(k + 1) if args.joint else [k]:
            model.begin_task(i, tasks[i].train_images, tasks[i].train_labels, args.proto_init)
            if initial is not None:
                initial[i] = model.prototypes[i].detach()
        if args.joint:
            images = torch.cat([t.train_images for t in tasks])
            labels = torch.cat([t.train_labels + i * args.classes for i, t in enumerate(tasks)])
        else:
            images, labels = tasks[k].train_images, tasks[k].train_labels
        progress.begin(k, len(images))
        train_task(model, teacher, None if args.joint else k, images, labels, args, progress)
        progress.clear()
        state["training_seconds"] += time.perf_counter() - start
        R.append([evaluate(model, j, tasks[j].test_images, tasks[j].test_labels) for j in range(k + 1)])
        state["tasks_done"] = k + 1
        state["images"] += math.prod(steps_and_batch(len(images), args.batch_size, world)) * args.epochs
        state["seconds"] += time.perf_counter() - start
        result = summary(state, model, complete=k == rounds[-1])
        line = (f"task {k + 1:>2}/{len(tasks)}  AA {result['AA']:5.2f}  FM {result['FM'] or 0:5.2f}  "
                f"{duration(state['seconds'])}  |" + "".join(f" {a:.1f}" for a in R[-1]))
        print(line[:shutil.get_terminal_size().columns] if progress.live else line, flush=True)
        if rank:
            continue
        if initial is not None:  # apart from the checkpoint, which holds no image; read for the picture alone
            with written_whole(file["prototypes-initial.pt"]) as temporary:
                torch.save({"format": 1, "prototypes": initial}, temporary)
            with written_whole(file["prototypes.png"]) as temporary:
                draw_prototypes(temporary, initial[:k + 1], model.prototypes[:k + 1].detach().cpu(), tasks)
        if not args.joint:
            for name, draw in ("accuracy.png", draw_accuracy), ("curves.png", draw_curves):
                with written_whole(file[name]) as temporary:
                    draw(temporary, R, f"{Path(args.dataset).name}, {len(tasks)} tasks, seed {seed}")
        with written_whole(file["results.json"]) as temporary:
            temporary.write_text(json.dumps(result, indent=1) + "\n")
        with written_whole(file["checkpoint.pt"]) as temporary:
            torch.save(state | {"model": model.state_dict()}, temporary)
    return result or json.loads(file["results.json"].read_text())


# ----------------------------------------------------------------------------------------------------------------------
# Results and pictures

def summary(state, model, complete):
    """What results.json holds, from a checkpoint's state."""
    R, joint = state["accuracy"], state["args"]["joint"]  # joint training has one row, and nothing to forget
    count = lambda module: sum(p.numel() for p in module.parameters())
    prototypes = getattr(model, "prototypes", torch.empty(0, 0))
    device = next(model.parameters()).device
    return {
        "args": state["args"], "seed": state["seed"], "accuracy": R, "AA": average_accuracy(R),
        "FM": None if joint else forgetting(R), "BWT": None if joint else backward_transfer(R),
        "LA": None if joint else learning_accuracy(R), "seconds": state["seconds"],
        "images_per_second": state["images"] / state["training_seconds"], "peak_memory_bytes": peak_memory(device),
        "parameters": {"backbone": count(model.backbone),
                       "hypernetwork": count(model.hypernetwork) if hasattr(model, "hypernetwork") else 0,
                       "prototypes": prototypes.numel(),
                       "prototypes_per_task": prototypes.numel() // state["args"]["tasks"]},
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__},
        "device": device_name(device), "processes": rank_and_world()[1],
        "complete": complete,
    }


def draw_prototypes(path, initial, learned, tasks, scale=4):
    """A grid of all prototypes: for each task a row as initialised and below it a row as learned. Prototypes are
    (k, C, channels, s, s), normalised; `tasks` gives the classes' names."""
    from PIL import Image, ImageDraw
    pairs = torch.stack([initial, learned], 1).expand(-1, -1, -1, 3, -1, -1)  # (k, 2, C, 3, s, s)
    pixels = pairs * channels(STD, pairs.device) + channels(MEAN, pairs.device)
    pixels = (255 * pixels.clamp(0, 1)).round().to(torch.uint8)
    k, _, classes, _, s, _ = pixels.shape
    tile, label, gap = max(s * scale, 48), 12, 6
    block = label + 2 * (tile + 2) + gap
    picture = Image.new("RGB", (classes * (tile + 2) + gap, k * block + gap), "white")
    draw = ImageDraw.Draw(picture)
    for t in range(k):
        for c in range(classes):
            x, y = gap + c * (tile + 2), gap + t * block
            name = str(tasks[t].classes[c])
            while draw.textlength(name, font_size=9) > tile:
                name = name[:-1]
            draw.text((x, y), name, fill="black", font_size=9)
            for row in range(2):
                image = Image.fromarray(pixels[t, row, c].movedim(0, -1).numpy())
                picture.paste(image.resize((tile, tile), Image.Resampling.NEAREST), (x, y + label + row * (tile + 2)))
    picture.save(path, format="PNG")


def draw_accuracy(path, R, title, cell=44):
    """The accuracy matrix as a heat map: on task (column) after task (row), in percent."""
    from PIL import Image, ImageDraw
    left, top, k = 64, 66, len(R)
    picture = Image.new("RGB", (max(left + k * cell + 10, 330), top + k * cell + 30), "white")
    draw = ImageDraw.Draw(picture)
    draw.text((10, 8), title, "black", font_size=15)
    draw.text((10, 28), f"AA {average_accuracy(R):.2f}   FM {forgetting(R):.2f}", "black", font_size=15)
    draw.text((10, top - 16), "after task", "black", font_size=11)
    draw.text((left, top + k * cell + 16), "accuracy in % on task", "black", font_size=11)
    low, high = min(map(min, R)), max(map(max, R))
    for i, row in enumerate(R):
        middle = top + (i + 0.5) * cell
        draw.text((left - 8, middle), str(i + 1), "black", font_size=12, anchor="rm")
        draw.text((left + (i + 0.5) * cell, top + k * cell + 9), str(i + 1), "black", font_size=12, anchor="mm")
        for j, a in enumerate(row):
            x, share = left + j * cell, (a - low) / max(high - low, 1)
            colour = tuple(round(pale + share * (dark - pale)) for pale, dark in ((236, 16), (243, 72), (250, 120)))
            draw.rectangle((x, top + i * cell, x + cell - 2, top + (i + 1) * cell - 2), colour)
            draw.text((x + cell / 2 - 1, middle - 1), f"{a:.1f}", "white" if share > 0.4 else "black", font_size=13,
                      anchor="mm")
    picture.save(path, format="PNG")


def draw_curves(path, R, title, width=760, height=430):
    """Each task's accuracy over the sequence, and their mean so far (AA) in bold."""
    import colorsys

    from PIL import Image, ImageDraw
    s, k = 3, len(R)  # drawn three times as large, then scaled down: Pillow's lines are not smooth
    picture = Image.new("RGB", (s * width, s * height), "white")
    draw = ImageDraw.Draw(picture)
    text = lambda x, y, words, size=12, colour="black", anchor="mm": draw.text(
        (s * x, s * y), words, colour, font_size=s * size, anchor=anchor, stroke_width=2 * s, stroke_fill="white")
    low, high = 10 * math.floor(min(map(min, R)) / 10), 10 * math.ceil(max(map(max, R)) / 10 + 0.01)
    where = lambda i, a: (s * (60 + (width - 90) * i / max(k - 1, 1)), s * (height - 50 - (height - 100) * (a - low)
                                                                            / (high - low)))
    text(width / 2, 18, f"{title}:  AA {average_accuracy(R):.2f}   FM {forgetting(R):.2f}", 15)
    text(width / 2, height - 14, "after task (a line: accuracy in % on the task of its number; bold: their mean, AA)")
    for a in range(low, high + 1, 5 if high - low <= 30 else 10):
        draw.line((where(0, a), where(k - 1, a)), (225, 225, 225), s)
        text(48, where(0, a)[1] / s, str(a), anchor="rm")
    for i in range(k):
        text(where(i, low)[0] / s, height - 34, str(i + 1))
    lines = [[where(i, R[i][j]) for i in range(j, k)] for j in range(k)]
    colours = [tuple(round(255 * c) for c in colorsys.hsv_to_rgb(0.8 * j / k, 0.75, 0.8)) for j in range(k)]
    for points, colour in zip(lines, colours):
        draw.line(points, colour, 2 * s, joint="curve")
    draw.line([where(i, sum(row) / len(row)) for i, row in enumerate(R)], "black", 5 * s, joint="curve")
    for j, (((x, y), *_), colour) in enumerate(zip(lines, colours)):
        draw.ellipse((x - 3 * s, y - 3 * s, x + 3 * s, y + 3 * s), colour)
        text(x / s, y / s - 12, str(j + 1), colour=colour)
    picture.resize((width, height), Image.Resampling.LANCZOS).save(path, format="PNG")


def mean_std(values):
    return f"{np.mean(values):.2f}" + (f" ± {np.std(values, ddof=1):.2f}" if len(values) > 1 else "")


def print_result(result):
    """Print the accuracy matrix and the summary of one results.json."""
    print("\naccuracy in % on task (column) after task (row)")
    room = (shutil.get_terminal_size().columns - 4) // len(result["accuracy"])
    for k, row in enumerate(result["accuracy"]):
        print(f"{k + 1:>3} " + "".join(f"{a:>6.1f}" if room > 5 else f"{a:>{max(room, 3)}.0f}" for a in row))
    print("  ".join(f"{name} {result[name]:.2f}" for name in ("AA", "FM", "BWT", "LA") if result[name] is not None)
          + f"  time {duration(result['seconds'])}  {result['images_per_second']:,.0f} images/s  "
          f"peak {result['peak_memory_bytes'] / 2**30:.1f} GiB\n", flush=True)


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
"""  # Table 1 of the paper, which collects its rows from other papers: AA and FM on Split-CIFAR100 and TinyImageNet


def report(folder, style="text", with_reported=False):
    """Print a table of all finished runs below `folder`: a row a setting, mean ± standard deviation over its seeds.
    A setting is named by its data set, its tasks and the options that are not the default. `with_reported` puts the
    numbers that the paper reports above them, for the data sets that were run."""
    settings = {}
    for path in sorted(Path(folder).rglob("results.json")):
        try:
            result = json.loads(path.read_text())
            if not result["complete"]:
                raise ValueError("unfinished")
            options = {k: v for k, v in result["args"].items() if k not in SAME_RESULT | {"classes"}}
            options["stop_after"] = result["args"]["stop_after"]
            same_setting = settings.setdefault(json.dumps(options, sort_keys=True), [])
            if result["seed"] in [r["seed"] for r in same_setting]:
                raise ValueError(f"seed {result['seed']} of this setting is counted already")
            same_setting.append(result)
        except (ValueError, KeyError, TypeError) as error:
            print(f"left out: {path} ({one_line(error)})", file=sys.stderr)
    if not settings:
        raise Problem(f"--report {folder}: no finished results.json in or below it")
    options = [json.loads(key) for key in settings]
    unsaid = {"dataset", "tasks"} | ({"precision"} if len({o.get("precision") for o in options}) == 1 else set())
    rows = [["setting", "AA", "FM", "LA", "seeds", "time"]]
    for column, dataset in (1, "cifar100"), (3, "tinyimagenet"):
        if with_reported and any(o["dataset"] == dataset for o in options):
            for cells in (line.split(" | ") for line in REPORTED.strip().splitlines()):
                rows.append([f"{dataset}: {cells[0]} (reported)", *cells[column:column + 2], "-", "-", "-"])
    for setting, results in zip(options, settings.values()):
        name = [f"{Path(setting['dataset']).name}, {setting['tasks']} tasks"]
        default = vars(parse_args(["--dataset", setting["dataset"]]))
        name += [f"--{k.replace('_', '-')}" + ("" if v is True else f" {v}") for k, v in setting.items()
                 if k not in unsaid and v != default.get(k) and v is not None]
        cells = [mean_std([r[m] for r in results]) if results[0][m] is not None else "-" for m in ("AA", "FM", "LA")]
        seeds = " ".join(str(r["seed"]) for r in results)
        rows.append([" ".join(name), *cells, seeds, duration(np.mean([r["seconds"] for r in results]))])
    if style == "latex":
        rows = [[c.replace("_", r"\_").replace("--", "-{}-").replace("±", r"$\pm$") for c in row] for row in rows]
        print("\\begin{tabular}{lccccc}\n\\toprule")
        print("\n".join(" & ".join(row) + r" \\" + ("\n\\midrule" if row is rows[0] else "") for row in rows))
        print("\\bottomrule\n\\end{tabular}")
        return
    widths = [max(map(len, column)) for column in zip(*rows)]
    rule = ["-" * w for w in widths]
    for row in [rows[0], rule, *rows[1:]] if style == "markdown" else rows:
        cells = [cell.ljust(w) for cell, w in zip(row, widths)]
        print(f"| {' | '.join(cells)} |" if style == "markdown" else "  ".join(cells).rstrip())


# ----------------------------------------------------------------------------------------------------------------------
# Speed

def bench(args, task, budget=60.0):
    """Print the speed of a training step at several tasks, beside the least that it could cost: the bare student's
    forward and backward pass and the bare teacher's forward pass, on one batch that is already there (the floor).
    On a CPU beside it the same with nn.Conv2d's convolutions. All settings take turns, so that a machine whose speed
    drifts slows all alike; medians of short means.

    `task` is any Task: its training images are measured on. `budget` is in seconds, for the timed steps."""
    device, K = torch.device(args.device), args.tasks
    at = [1] if args.joint else sorted({1, min(2, K), max(1, K // 2), K})
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    steps_an_epoch, batch = steps_and_batch(len(task.train_images), args.batch_size)
    images, labels = task.train_images[:batch], task.train_labels[:batch]
    torch.manual_seed(0)
    model = build(args).to(device)
    x = normalise(images.to(device))
    floors = {"floor": model}
    if device.type == "cpu":  # what this file's convolutions bring
        floors["with Conv2d"] = copy.deepcopy(model)
        for layer in floors["with Conv2d"].backbone.modules():
            if isinstance(layer, Conv3x3):
                layer.__class__ = nn.Conv2d
    teachers = {name: student.freeze(0) for name, student in floors.items()}
    used = peak_memory(device, reset=True)

    def timed(name):
        """A function to call after each step: from the second on it notes the mean of every TURNS, as Muon's differ."""
        last = [0, 0.0]

        def tick(*_):
            last[0] += 1
            if last[0] % TURNS == 1:
                wait()
                now = time.perf_counter()
                if last[0] > 1:
                    seconds[name].append((now - last[1]) / TURNS)
                last[1] = now
        return tick

    def floor(rounds, name="floor", train=False):
        student, tick = floors[name], timed(name)
        optimizer = torch.optim.AdamW(student.backbone.parameters(), fused=device.type != "mps") if train else None
        for _ in range(TURNS * rounds + 1):
            if K > 1:
                with torch.no_grad():
                    teachers[name].features(x)
            student.features(x).sum().backward()
            if optimizer:  # for the memory that its moments take
                optimizer.step()
            student.zero_grad()
            tick()

    def training(k, rounds):
        short = argparse.Namespace(**vars(args) | {"epochs": TURNS * rounds + 1})
        model.prototypes.data.normal_() if hasattr(model, "prototypes") else None
        train_task(model, model.freeze(k - 1) if k > 1 and (args.lam or args.mu) else None, k - 1, images, labels,
                   short, timed(k))

    seconds = {name: [] for name in [*floors, *at]}
    floor(1, train=True)
    floor_peak = peak_memory(device, reset=True) - used
    fit = budget / (1.7 * min(seconds["floor"]) * len(seconds)) / TURNS  # rounds of each setting
    rounds = max(1, min(12, round(fit / 4)))
    seconds["floor"].clear()
    for _ in range(4 if fit >= 4 else 2):
        for name in floors:
            floor(rounds, name)
        for k in at:
            training(k, rounds)
    peak = peak_memory(device) - used
    took = {name: float(np.median(values)) for name, values in seconds.items()}
    print(f"batch {batch}, {images.shape[-1]}x{images.shape[-1]}, {args.stem} stem, width {args.width}, "
          f"{args.optimizer}, {args.precision}, {device_name(device)}, torch {torch.__version__}\n\n"
          f"{'':12}{'ms/step':>10}{'images/s':>10}{'/ floor':>10}")
    for name, value in took.items():
        print(f"{name if name in floors else f'task {name}':12}{1000 * value:>10.1f}{batch / value:>10,.0f}"
              f"{value / took['floor']:>10.2f}")
    if 2 in took:
        print(f"\ntask {K} / task 2: {took[K] / took[2]:.2f}")
    print(f"peak memory: {peak / 2**30:.2f} GiB, {peak / max(1, floor_peak):.2f} x the floor's (with AdamW)")
    from torch.utils.flop_counter import FlopCounterMode
    with FlopCounterMode(display=False) as counter:
        model.features(x).sum().backward()
        with torch.no_grad():
            teachers["floor"].features(x)
    flops = counter.get_total_flops()
    print(f"counted operations: {flops / 1e9:.1f} GFLOP a floor step; at task {at[-1]} "
          f"{flops / took[at[-1]] / 1e12:.3f} TFLOP/s of them")
    every = np.interp(range(1, K + 1), at, [took[k] for k in at])
    evaluation = K * (K + 1) / 2 * len(task.test_images) / batch * took["floor"] / 4
    whole = sum(every) * steps_an_epoch * args.epochs + evaluation
    print(f"predicted: {duration(whole)} for {K} tasks of {args.epochs} epochs, a seed")


def peak_memory(device, reset=False):
    """Bytes at most so far (on CUDA: since the last reset; elsewhere: the process's)."""
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated()
        if reset:
            torch.cuda.reset_peak_memory_stats()
        return peak
    import resource
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def device_name(device):
    if device.type == "cuda":
        return torch.cuda.get_device_name()
    return f"{device}, {torch.get_num_threads()} thread{'s' * (torch.get_num_threads() > 1)}"


# ----------------------------------------------------------------------------------------------------------------------
# Command line

# What a data set changes: tasks, and where the images are easy or small, what suffices for them.
DEFAULTS = {"cifar100": {}, "tinyimagenet": {}, "mnist": dict(tasks=5, epochs=2, width=16, augment="crop"),
            "synthetic": dict(tasks=5, epochs=8, width=16)}


def number(kind, low, high, above=False):
    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not (low < value if above else low <= value) or not value <= high:
            bound = f"above {low:g}" if above else f"from {low:g}"
            raise argparse.ArgumentTypeError(f"{text!r} is not a {'whole ' if kind is int else ''}number "
                                             f"{bound} to {high:g}")
        return value
    return parse


class Parser(argparse.ArgumentParser):
    def error(self, message):  # one line, without the usage
        raise Problem(message.removeprefix("argument "))


def parse_args(argv=None):
    count, rate = number(int, 1, 100_000), number(float, 0, 1000, above=True)
    weight, fraction = number(float, 0, 1000), number(float, 0, 0.9)
    p = Parser(description="Prototype-Augmented Hypernetworks for continual learning (arXiv 2505.07450).",
               formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False)
    g = p.add_argument_group("data and tasks")
    g.add_argument("--dataset", default="cifar100", metavar="NAME",
                   help="cifar100, tinyimagenet, mnist, synthetic, or a folder with train/ and val/")
    g.add_argument("--data", default="data", metavar="DIR", help="where data sets and their caches are")
    g.add_argument("--tasks", type=count, metavar="K", default=10, help="number of tasks (mnist, synthetic: 5)")
    g.add_argument("--image-size", type=number(int, 8, 1024), metavar="S", help="side in pixels (None: its own)")
    g.add_argument("--shuffle-classes", action="store_true", help="order of classes by seed instead of by label")
    g.add_argument("--val-fraction", type=fraction, default=0.0, metavar="F",
                   help="evaluate on this part of the training images, held out, instead of the test set")
    g.add_argument("--stop-after", type=count, metavar="N", help="stop after N of the K tasks")
    g = p.add_argument_group("method")
    g.add_argument("--lam", type=weight, default=1.0, help="weight of L_sm (Eq. 5)")
    g.add_argument("--mu", type=weight, default=1.0, help="weight of L_sp (Eq. 6)")
    g.add_argument("--sp-tasks", type=number(int, 0, 100_000), default=0, metavar="N",
                   help="estimate L_sp at each step from N earlier tasks drawn at random; 0: all of them")
    g.add_argument("--temperature", type=rate, default=2.0, metavar="T", help="of the distillation")
    g.add_argument("--proto-size", type=number(int, 1, 256), default=10, metavar="S", help="side of a prototype")
    g.add_argument("--proto-channels", type=int, choices=(1, 3), default=3, help="1: grey")
    g.add_argument("--proto-init", choices=("semantic", "random"), default="semantic", help="an image, or noise")
    g.add_argument("--hidden", type=count, default=64, metavar="N", help="width of the hypernetwork's hidden layers")
    g.add_argument("--head", choices=("hyper", "stored"), default="hyper", help="control: a stored linear head a task")
    g.add_argument("--embedding", choices=("prototypes", "vector"), default="prototypes",
                   help="control: a free vector a task, of the same size")
    g.add_argument("--joint", action="store_true", help="control: all tasks at once, the upper bound")
    g = p.add_argument_group("backbone")
    g.add_argument("--stem", choices=("3x3", "7x7"), default="3x3", help="7x7: stride 2 and max-pool, cheaper")
    g.add_argument("--width", type=number(int, 1, 1024), default=64, metavar="N",
                   help="D is 8 times this (mnist, synthetic: 16)")
    g.add_argument("--pretrained", action="store_true", help="ImageNet weights; needs --stem 7x7 --width 64")
    g = p.add_argument_group("training")
    g.add_argument("--epochs", type=count, default=30, metavar="N", help="a task (mnist: 2, synthetic: 8)")
    g.add_argument("--batch-size", type=number(int, 2, 100_000), default=64, metavar="N")
    g.add_argument("--optimizer", choices=("muon", "adamw"), default="muon", help="of the backbone's filters")
    g.add_argument("--lr", type=rate, help="peak, of the backbone (muon: 0.02, synthetic 0.01; adamw: 0.002)")
    g.add_argument("--hyper-lr", type=rate, default=1e-4, help="of the hypernetwork")
    g.add_argument("--proto-lr", type=rate, default=2e-3, help="of the prototypes")
    g.add_argument("--weight-decay", type=weight, default=0.005)
    g.add_argument("--label-smoothing", type=fraction, default=0.0, metavar="F")
    g.add_argument("--augment", choices=("crop-flip", "crop", "none"), default="crop-flip", help="(mnist: crop)")
    g = p.add_argument_group("run")
    g.add_argument("--seeds", type=number(int, 0, 2**31), nargs="+", default=[0], metavar="S", help="run in turn")
    g.add_argument("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto")
    g.add_argument("--precision", choices=("auto", "fp32", "bf16", "fp16"), default="auto",
                   help="auto: bf16 where the hardware has it, else fp16 on CUDA, fp32 elsewhere")
    g.add_argument("--out", metavar="DIR", help="default: runs/<dataset>-<tasks>")
    g.add_argument("--resume", action="store_true", help="go on from the last finished task")
    g = p.add_argument_group("instead of a run")
    g.add_argument("--bench", type=rate, nargs="?", const=60, metavar="SECONDS",
                   help="print a training step's speed and a run's predicted time; measures for 60 s, or so long")
    g.add_argument("--report", metavar="DIR", help="print a table of all finished runs below DIR")
    g.add_argument("--with-reported", action="store_true", help="above them the rows of the paper's Table 1")
    g.add_argument("--format", choices=("text", "markdown", "latex"), default="text", help="of --report")
    given = p.parse_known_args(argv)[0]
    p.set_defaults(**DEFAULTS.get(given.dataset, {}))
    args = p.parse_args(argv)
    for flag, there in ("cuda", torch.cuda.is_available), ("mps", torch.backends.mps.is_available):
        if args.device == flag and not there():
            raise Problem(f"--device {flag}: no such device is available here; try --device cpu")
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if args.precision == "auto":
        has_bf16 = {"cuda": torch.cuda.is_bf16_supported, "cpu": getattr(torch.cpu, "_is_avx512_bf16_supported", bool)}
        args.precision = "bf16" if has_bf16.get(args.device, bool)() else "fp16" if args.device == "cuda" else "fp32"
    if args.pretrained and (args.stem, args.width) != ("7x7", 64):
        raise Problem("--pretrained: needs --stem 7x7 and --width 64, the network whose weights torchvision has")
    if args.stop_after and args.stop_after > args.tasks:
        raise Problem(f"--stop-after {args.stop_after}: there are only {args.tasks} tasks")
    if args.lr is None:
        args.lr = 0.002 if args.optimizer == "adamw" else 0.01 if args.dataset == "synthetic" else 0.02
    if args.out is None:
        args.out = f"runs/{Path(args.dataset).resolve().name}-{args.tasks}"
    return args


def start_processes(args):
    """Under torchrun: join the other processes, take this one's GPU, and keep quiet unless it is the first.
    Returns this process's number, 0 without torchrun."""
    world = int(os.environ.get("WORLD_SIZE", 1))
    if world == 1 or not torch.distributed.is_available() or not torch.distributed.is_torchelastic_launched():
        return 0
    if args.bench or args.batch_size % world or args.batch_size < 2 * world:
        raise Problem("--bench: is for one process" if args.bench else f"--batch-size {args.batch_size}: is for all "
                      f"{world} processes together, which must share it evenly, two images each at least")
    if args.device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("nccl" if args.device == "cuda" else "gloo")
    rank = torch.distributed.get_rank()
    if rank:
        sys.stdout = open(os.devnull, "w")
    return rank


def keep_freed_memory():
    """glibc hands large blocks back to the system at once, to get them again page by page: a tenth of a step on the
    CPU. Elsewhere this does nothing."""
    with contextlib.suppress(OSError, AttributeError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-4, 0), mallopt(-1, 2**31 - 1)  # M_MMAP_MAX, M_TRIM_THRESHOLD


def main(argv=None):
    keep_freed_memory()
    try:
        args = parse_args(argv)
        if args.report:
            report(args.report, args.format, args.with_reported)
            return 0
        rank = start_processes(args)
        data = load_dataset(args.dataset, args.data, args.image_size)
        results = []
        for i, seed in enumerate(args.seeds):
            tasks = split_tasks(data, args.tasks, seed if args.shuffle_classes else None, args.val_fraction)
            args.classes = len(tasks[0].classes)
            if args.bench:
                bench(args, tasks[0], budget=args.bench)
                return 0
            print(f"{args.dataset}: {args.tasks} tasks of {args.classes} classes, {len(data.train_images):,} training "
                  f"and {len(data.test_images):,} test images\nseed {seed}, {args.device}, {args.precision}, to "
                  f"{args.out}/seed{seed}", flush=True)
            folder = Path(args.out) / f"seed{seed}"
            with contextlib.nullcontext() if rank else locked(
                    folder, busy=f"{folder}: another run is writing there; wait for it, or give another --out"):
                results.append(run(args, seed, tasks, runs_left=len(args.seeds) - 1 - i))
            print_result(results[-1])
        if len(results) > 1:
            print(f"{len(results)} seeds: " + ", ".join(
                f"{name} {mean_std([r[name] for r in results])}" for name in ("AA", "FM", "BWT", "LA")
                if results[0][name] is not None))
    except KeyboardInterrupt:
        print("\nstopped; finished tasks are saved: the same command with --resume goes on", file=sys.stderr)
        return 130
    except (Problem, OSError, torch.OutOfMemoryError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            error = f"out of memory ({one_line(error)[:80]}); try a smaller --batch-size or --width"
        rank = rank_and_world()[0]
        print(f"pah.py: {f'process {rank}: ' if rank else ''}{one_line(error)}", file=sys.stderr)
        return 2
    finally:
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # run_all.sh and Slurm stop a run so: like Ctrl-C
    sys.exit(main())
