"""Tests of pah.py: no network, no GPU, no published data; under three minutes on two cores. CUDA tests run where there
is CUDA."""
import contextlib
import copy
import gzip
import hashlib
import io
import json
import os
import pickle
import signal
import struct
import subprocess
import sys
import tarfile
import time
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image

import pah
from pah import (PAH, Data, Hypernetwork, Problem, ResNet18, average_accuracy, backward_transfer, forgetting,
                 load_checkpoint, load_dataset, split_tasks)

K, C = 4, 3
SHORT_RUN = ["--dataset", "synthetic", "--width", "8", "--epochs", "5", "--lr", "0.02", "--precision", "fp32"]
TINY_RUN = ["--dataset", "synthetic", "--width", "4", "--epochs", "1", "--hidden", "8", "--batch-size", "50",
            "--precision", "fp32"]


def fill(model):
    """Give every prototype a value, as if all tasks had begun, and BatchNorm statistics that matter."""
    torch.manual_seed(1)
    if hasattr(model, "prototypes"):
        model.prototypes.data.normal_()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 2)
    return model


def pair(**options):
    """A student in training, its teacher of three earlier tasks (with other weights), and a batch of task 3."""
    torch.manual_seed(0)
    options = dict(tasks=K, classes=C, proto_size=6, hidden=8) | options
    teacher = fill(PAH(ResNet18(4), **options)).freeze(3)
    model = fill(PAH(ResNet18(4), **options)).train()
    return model, teacher, torch.randn(5, 3, 16, 16), torch.tensor([0, 1, 2, 1, 0])


def softened_kl(new, old, T):
    """KL(old || new) T^2, written out."""
    p, q = (old / T).softmax(-1), (new / T).softmax(-1)
    return T * T * (p * (p.log() - q.log())).sum(-1)


# ---------------------------------------------------------------------------------------------------- metrics and tasks

def test_metrics_by_hand():
    R = [[90.0], [80.0, 70.0], [85.0, 60.0, 50.0]]
    assert average_accuracy(R) == 65
    assert forgetting(R) == ((90 - 85) + (70 - 60)) / 2
    assert backward_transfer(R) == ((85 - 90) + (60 - 70)) / 2
    assert pah.learning_accuracy(R) == 70
    later_best = [[50.0], [80.0, 70.0], [60.0, 75.0, 50.0]]  # the best need not be the first; a gain counts against FM
    assert forgetting(later_best) == ((80 - 60) + (70 - 75)) / 2
    assert backward_transfer(later_best) == ((60 - 50) + (75 - 70)) / 2
    assert (average_accuracy([[42.0]]), forgetting([[42.0]]), backward_transfer([[42.0]])) == (42, 0, 0)


def counted_data(classes=6, per_class=10):
    """Every image says which it is: its first pixel is its class, its second its number."""
    labels = torch.arange(classes).repeat_interleave(per_class)[torch.randperm(classes * per_class)]
    images = torch.zeros(len(labels), 3, 8, 8, dtype=torch.uint8)
    images[:, 0, 0, 0], images[:, 0, 0, 1] = labels.to(torch.uint8), torch.arange(len(labels)).to(torch.uint8)
    return Data(images, labels, images + 100, labels.clone(), [f"c{i}" for i in range(classes)])


def test_split_tasks():
    data = counted_data()
    tasks = split_tasks(data, 3)
    assert [t.classes for t in tasks] == [["c0", "c1"], ["c2", "c3"], ["c4", "c5"]]
    for k, task in enumerate(tasks):
        assert torch.equal(task.train_images[:, 0, 0, 0].long(), task.train_labels + 2 * k)
        assert torch.equal(task.test_images[:, 0, 0, 0].long() - 100, task.test_labels + 2 * k)
        assert len(task.train_labels) == len(task.test_labels) == 20
    shuffled = [c for t in split_tasks(data, 3, seed=1) for c in t.classes]
    assert sorted(shuffled) == data.classes != shuffled
    assert shuffled == [c for t in split_tasks(data, 3, seed=1) for c in t.classes]
    assert shuffled != [c for t in split_tasks(data, 3, seed=2) for c in t.classes]
    for bad in (4, 6, 7):  # tasks of one class have nothing to tell apart
        with pytest.raises(Problem, match="do not divide"):
            split_tasks(data, bad)


def test_validation_split_is_training_images_only():
    data = counted_data()
    for task in split_tasks(data, 2, val_fraction=0.2):
        train, held_out = (set(x[:, 0, 0, 1].tolist()) for x in (task.train_images, task.test_images))
        assert len(train) == 24 and len(held_out) == 6 and not train & held_out
        assert max(train | held_out) < 100  # test images would be 100 and more
        assert torch.bincount(task.test_labels).tolist() == [2, 2, 2]


# ---------------------------------------------------------------------------------------------------- model

def test_backbone_is_torchvisions():
    from torchvision.models import resnet18
    theirs, ours = resnet18(), ResNet18(64, "7x7")
    fill(theirs)
    theirs.fc = nn.Identity()
    assert list(theirs.state_dict()) == list(ours.state_dict())
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 3, 64, 64)
    for mode in (True, False):
        torch.testing.assert_close(ours.train(mode)(x), theirs.train(mode)(x), rtol=1e-4, atol=1e-5)


def test_shapes_and_equations_1_to_3():
    model = fill(PAH(ResNet18(4), K, C, proto_size=6, proto_channels=1, hidden=8)).eval()
    x = torch.randn(5, 3, 16, 16)
    assert model.prototypes.shape == (K, C, 1, 6, 6) and model.heads(None).shape == (K, C, 32)
    e = torch.cat([model.prototypes[2, c].flatten() for c in range(C)])  # Eq. 3
    W = model.hypernetwork(e)  # Eq. 2
    torch.testing.assert_close(model.heads(4)[2], W)
    torch.testing.assert_close(model(x, 2), model.backbone(x) @ W.T)  # Eq. 1


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("size, stride, product", [
    ((1, 1), 1, True), ((2, 2), 2, True), ((1, 2), 2, True), ((1, 1), 2, True), ((2, 2), 1, True), ((3, 4), 2, True),
    ((1, 2), 1, True), ((3, 2), 1, False), ((2, 3), 1, False)])
def test_convolution_to_few_pixels(size, stride, product, layout, monkeypatch):
    torch.manual_seed(0)
    conv = pah.Conv3x3(256, 6, stride).to(memory_format=layout)
    plain = nn.Conv2d(256, 6, 3, stride, 1, bias=False)
    plain.weight.data.copy_(conv.weight)
    x = torch.randn(5, 256, *size).contiguous(memory_format=layout).requires_grad_()
    like = x.detach().clone().requires_grad_()
    plain(like).square().sum().backward()
    convolved, forward = [], nn.Conv2d.forward
    monkeypatch.setattr(nn.Conv2d, "forward", lambda *given: convolved.append(1) or forward(*given))
    conv(x).square().sum().backward()
    assert len(convolved) == (not product)
    torch.testing.assert_close(conv(x), plain(like), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(x.grad, like.grad, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(conv.weight.grad, plain.weight.grad, rtol=1e-4, atol=1e-4)


def test_any_backbone():
    backbone = nn.Sequential(nn.AvgPool2d(4), nn.Flatten(1), nn.LazyLinear(7))
    backbone(torch.zeros(1, 3, 8, 8))
    model = PAH(backbone, tasks=2, classes=3, features=7, proto_size=8)
    assert model(torch.randn(4, 3, 8, 8), 1).shape == (4, 3)


def test_heads_start_at_the_scale_of_a_linear_layer():
    torch.manual_seed(0)
    heads = Hypernetwork(3000, 10, 512, 64)(torch.randn(50, 3000))
    linear = nn.Linear(512, 10).weight.std()
    assert 0.7 < heads.std() / linear < 1.4


def test_hidden_vectors_of_unlike_tasks_are_about_orthogonal():
    torch.manual_seed(0)
    hidden = F.normalize(Hypernetwork(3000, 10, 512, 64).body(torch.randn(50, 3000)), dim=1)
    cosines = (hidden @ hidden.T)[~torch.eye(50, dtype=torch.bool)]
    assert abs(cosines.mean()) < 0.1  # with ReLU 0.5


@pytest.mark.parametrize("channels", [3, 1])
def test_semantic_initialisation(channels):
    torch.manual_seed(0)
    data = load_dataset("synthetic")
    task = split_tasks(data, 5)[1]
    model = PAH(ResNet18(4), 5, 4, proto_channels=channels)
    model.begin_task(1, task.train_images, task.train_labels)
    assert not model.prototypes[[0, 2, 3, 4]].any()
    small = F.interpolate(pah.normalise(task.train_images), 10, mode="bilinear", antialias=True, align_corners=False)
    small = small if channels == 3 else small.mean(1, keepdim=True)
    for c in range(4):  # it is one of the class's training images, and none of the others'
        distance = (small - model.prototypes[1, c]).abs().amax((1, 2, 3))
        assert (distance < 1e-5).any() and (task.train_labels[distance < 1e-5] == c).all()
    before = model.prototypes[1].clone()
    model.begin_task(1, task.train_images, task.train_labels)
    assert not torch.equal(before, model.prototypes[1])  # drawn at random
    model.begin_task(2, task.train_images, task.train_labels, init="random")
    assert abs(model.prototypes[2].mean()) < 0.1 and abs(model.prototypes[2].std() - 1) < 0.1


# ---------------------------------------------------------------------------------------------------- losses

def test_values_of_the_three_losses():
    model, teacher, x, y = pair()
    T = 3.0
    loss, (hm, sm, sp) = pah.joint_loss(model, teacher, x, y, 3, lam=0.7, mu=0.3, temperature=T)
    model, *_ = pair()  # the pass above has moved the running statistics
    features = copy.deepcopy(model).backbone(x)  # in training mode, batch statistics
    log_p = (features @ model.heads(4)[3].T).log_softmax(1)
    want_hm = -sum(log_p[b, y[b]] for b in range(5)) / 5
    want_sm = want_sp = 0.0
    for i in range(3):
        old = teacher.backbone(x) @ teacher.hypernetwork(teacher.prototypes[i].flatten()).T
        new = features @ model.hypernetwork(model.prototypes[i].flatten()).T
        want_sm += softened_kl(new, old, T).mean()
    model.backbone(x)  # L_sp sees the running statistics after the batch
    model.eval()
    for i in range(3):
        p = model.prototypes[i]
        old = teacher.backbone(p) @ teacher.hypernetwork(teacher.prototypes[i].flatten()).T
        new = model.backbone(p) @ model.hypernetwork(p.flatten()).T
        want_sp += softened_kl(new, old, T).mean()
    for ours, want in (hm, want_hm), (sm, want_sm), (sp, want_sp), (loss, want_hm + 0.7 * want_sm + 0.3 * want_sp):
        torch.testing.assert_close(ours, want.detach() if ours is not loss else want, rtol=1e-4, atol=1e-6)
    assert want_sm > 0.01 and want_sp > 0.01


@pytest.mark.parametrize("loss, reached", [
    ("hm", {"backbone", "hypernetwork", "own"}),
    ("sm", {"backbone", "hypernetwork", "earlier"}),
    ("sp", {"earlier"}),
])
def test_what_each_loss_reaches(loss, reached):
    model, teacher, x, y = pair()
    model.eval()  # so that the two passes below are of the same function
    total = lambda lam, mu: pah.joint_loss(model, teacher, x, y, 2, lam, mu)[0]  # 0 and 1 are earlier, 3 is to come
    value = {"hm": lambda: total(0, 0), "sm": lambda: total(1, 0) - total(0, 0),
             "sp": lambda: total(0, 1) - total(0, 0)}[loss]()
    names, parameters = zip(*model.named_parameters())
    gradients = dict(zip(names, torch.autograd.grad(value, parameters)))
    for name, gradient in gradients.items():
        rows = gradient.abs().flatten(1).amax(1) if name == "prototypes" else gradient.abs().max()[None]
        parts = ["earlier", "earlier", "own", "to come"] if name == "prototypes" else [name.split(".")[0]]
        for part, largest in zip(parts, rows):  # what is not reached is zero up to the rounding of the difference
            assert (largest > 1e-5) == (part in reached), (name, part, largest)
    if loss == "sp":  # and without a difference: no graph leads to anything else
        value = pah.soft_loss_prototypes(model, teacher, 2)
        alone = torch.autograd.grad(value, parameters, allow_unused=True)
        assert [n for n, g in zip(names, alone) if g is not None] == ["prototypes"]
    assert all(p.grad is None for p in teacher.parameters())


def test_prototype_pass_and_teacher_stand_still():
    model, teacher, x, y = pair()
    frozen = copy.deepcopy(teacher.state_dict())
    statistics = {n: b.clone() for n, b in model.backbone.named_buffers()}
    pah.soft_loss_prototypes(model, teacher, 3).backward()
    assert all(torch.equal(b, statistics[n]) for n, b in model.backbone.named_buffers())
    assert model.backbone.training and not teacher.training
    pah.joint_loss(model, teacher, x, y, 3)[0].backward()
    assert any(not torch.equal(b, statistics[n]) for n, b in model.backbone.named_buffers())
    assert all(torch.equal(v, frozen[n]) for n, v in teacher.state_dict().items())
    assert torch.equal(teacher.heads(2), teacher.hypernetwork(teacher.prototypes[:2].flatten(1)))


def test_controls():
    model, teacher, x, y = pair(head="stored")
    loss, parts = pah.joint_loss(model, teacher, x, y, 3)
    loss.backward()
    assert not hasattr(model, "hypernetwork") and model.stored.grad.abs().amax((1, 2)).gt(0).all()
    assert parts[1] > 0 and parts[2] == 0
    model, teacher, x, y = pair(embedding="vector")
    assert pah.joint_loss(model, teacher, x, y, 3)[1][2] == 0  # a vector is no image
    model, _, x, y = pair()
    tasks = torch.tensor([0, 1, 2, 3, 0])  # joint training: an image at a time, the same
    mixed = pah.joint_loss(model.eval(), None, x, y, tasks)[0]
    each = [pah.joint_loss(model, None, x[i:i + 1], y[i:i + 1], int(t))[0] for i, t in enumerate(tasks)]
    torch.testing.assert_close(mixed, torch.stack(each).mean())


# ---------------------------------------------------------------------------------------------------- data

def test_augmentation():
    images = torch.arange(2 * 3 * 8 * 8).reshape(2, 3, 8, 8).to(torch.uint8).repeat(200, 1, 1, 1)
    torch.manual_seed(0)
    out = pah.augment(images, pad=2)
    padded = F.pad(images, (2, 2, 2, 2))
    seen = set()
    for i in range(len(images)):  # each is one of the 25 crops, mirrored or not, all channels alike
        matches = [(r, c, m) for r in range(5) for c in range(5) for m in (False, True)
                   if torch.equal(out[i], padded[i, :, r:r + 8, c:c + 8].flip(-1) if m
                                  else padded[i, :, r:r + 8, c:c + 8])]
        assert len(matches) == 1
        seen |= set(matches)
    assert len(seen) == 50
    assert torch.equal(pah.augment(images, pad=0, flip=False), images)


def test_normalise():
    x = torch.randint(0, 256, (2, 3, 4, 4), dtype=torch.uint8)
    from torchvision.transforms.v2.functional import normalize, to_dtype
    torch.testing.assert_close(pah.normalise(x), normalize(to_dtype(x, torch.float32, scale=True), pah.MEAN, pah.STD))


def test_synthetic_is_the_same_everywhere():
    data = load_dataset("synthetic")
    assert data.train_images.shape == (4000, 3, 16, 16) and data.test_images.shape == (1000, 3, 16, 16)
    assert torch.equal(data.train_images, load_dataset("synthetic").train_images)
    assert torch.bincount(data.test_labels).tolist() == [50] * 20
    assert load_dataset("synthetic", image_size=24).train_images.shape[-1] == 24


def fake_cifar100(root, monkeypatch):
    """The published layout: three pickles whose MD5 sums torchvision checks."""
    from torchvision.datasets import CIFAR100
    folder = root / "cifar-100-python"
    folder.mkdir(parents=True)
    rng, files = np.random.default_rng(0), {}
    for split, per_class in ("train", 2), ("test", 1):
        labels = list(range(100)) * per_class
        files[split] = dict(data=rng.integers(0, 256, (len(labels), 3072), dtype=np.uint8), fine_labels=labels)
    meta = dict(fine_label_names=[f"name{i}" for i in range(100)])
    md5 = {}
    for name, value in [*files.items(), ("meta", meta)]:
        (folder / name).write_bytes(pickle.dumps(value))
        md5[name] = hashlib.md5((folder / name).read_bytes()).hexdigest()
    monkeypatch.setattr(CIFAR100, "train_list", [["train", md5["train"]]])
    monkeypatch.setattr(CIFAR100, "test_list", [["test", md5["test"]]])
    monkeypatch.setattr(CIFAR100, "meta", dict(CIFAR100.meta, md5=md5["meta"]))
    return files


def test_cifar100(tmp_path, monkeypatch):
    files = fake_cifar100(tmp_path, monkeypatch)
    data = load_dataset("cifar100", tmp_path)
    assert np.array_equal(data.train_images.numpy(), files["train"]["data"].reshape(-1, 3, 32, 32))
    assert data.train_labels.tolist() == files["train"]["fine_labels"] and data.classes[7] == "name7"
    assert load_dataset("cifar100", tmp_path, 16).test_images.shape == (100, 3, 16, 16)
    (tmp_path / "cifar100-32.pt").unlink()
    with open(tmp_path / "cifar-100-python/train", "r+b") as f:
        f.write(b"?")
    with pytest.raises(Problem, match="cifar-100-python: not the published files"):
        load_dataset("cifar100", tmp_path)


def fake_mnist(raw):
    raw.mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 256, (20, 28, 28), dtype=np.uint8)
    for split, n in ("train", 20), ("t10k", 10):
        (raw / f"{split}-images-idx3-ubyte").write_bytes(struct.pack(">4i", 2051, n, 28, 28) + pixels[:n].tobytes())
        labels = bytes([i % 10 for i in range(n)])
        (raw / f"{split}-labels-idx1-ubyte").write_bytes(struct.pack(">2i", 2049, n) + labels)
    return pixels


def test_mnist(tmp_path):
    pixels = fake_mnist(tmp_path / "MNIST/raw")
    data = load_dataset("mnist", tmp_path, 28)
    assert np.array_equal(data.train_images.numpy(), np.repeat(pixels[:, None], 3, 1))
    assert data.test_labels.tolist() == list(range(10)) and len(split_tasks(data, 5)) == 5


def jpeg(value, mode="RGB", size=(64, 64), format="JPEG"):
    f = io.BytesIO()
    Image.new(mode, size, value).save(f, format)
    return f.getvalue()


def fake_tinyimagenet():
    """{name: bytes} of the published layout with three classes."""
    files, words, lines = {}, [], []
    for c, wnid in enumerate(["n03", "n01", "n02"]):
        words.append(f"{wnid}\tthing {wnid}, other name")
        for i in range(4):
            grey = c == 0 and i == 0  # there are greyscale images in it
            value = 40 * c + 10 * i + 20
            image = jpeg(value, "L") if grey else jpeg((value,) * 3)
            files[f"train/{wnid}/images/{wnid}_{i}.JPEG"] = image
        files[f"train/{wnid}/{wnid}_boxes.txt"] = b"boxes"
        files[f"val/images/val_{c}.JPEG"] = jpeg((200 + 10 * c,) * 3)
        lines.append(f"val_{c}.JPEG\t{wnid}\t0\t0\t62\t62")
    files["test/images/test_0.JPEG"] = jpeg((255,) * 3)
    files["val/val_annotations.txt"] = "\n".join(lines).encode()
    files["words.txt"] = "\n".join(words).encode()
    files["wnids.txt"] = b"n03\nn01\nn02"
    return files


@pytest.mark.parametrize("source", ["zip", "folder", "folder without boxes and test"])
def test_tinyimagenet(source, tmp_path, monkeypatch):
    monkeypatch.setattr(pah, "TINY_COUNTS", {"train": 12, "val": 3})
    files = fake_tinyimagenet()
    if source == "zip":
        with zipfile.ZipFile(tmp_path / "tiny-imagenet-200.zip", "w") as z:
            for name, blob in files.items():
                z.writestr(f"tiny-imagenet-200/{name}", blob)
        with pytest.raises(Problem, match="its MD5 is not"):
            load_dataset("tinyimagenet", tmp_path)
        md5 = hashlib.md5((tmp_path / "tiny-imagenet-200.zip").read_bytes()).hexdigest()
        monkeypatch.setattr(pah, "TINY_MD5", md5)
    else:
        for name, blob in files.items():
            if "without" in source and ("boxes" in name or name.startswith("test/")):
                continue
            (tmp_path / "tiny-imagenet-200" / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "tiny-imagenet-200" / name).write_bytes(blob)
    data = load_dataset("tinyimagenet", tmp_path)
    assert data.classes == ["thing n01", "thing n02", "thing n03"]
    assert data.train_labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert data.train_images[:, 0, 30, 30].tolist() == [60, 70, 80, 90, 100, 110, 120, 130, 20, 30, 40, 50]
    assert data.test_labels.tolist() == [2, 0, 1] and data.test_images[:, 1, 30, 30].tolist() == [200, 210, 220]
    if source == "folder":
        (tmp_path / "tinyimagenet-64.pt").unlink()
        (tmp_path / "tiny-imagenet-200/train/n01/images/n01_2.JPEG").unlink()
        with pytest.raises(Problem, match="11 of 12 train images"):
            load_dataset("tinyimagenet", tmp_path)


@pytest.fixture
def folder(tmp_path):
    """A folder data set of two classes, with images of several kinds."""
    root = tmp_path / "my images"
    for split in ("train", "val"):
        for c, name in enumerate(["cat", "dög"]):
            (root / split / name).mkdir(parents=True)
            (root / split / name / "a.png").write_bytes(jpeg((50 + 100 * c,) * 3, size=(40, 20), format="PNG"))
            (root / split / name / "b.png").write_bytes(jpeg(50 + 100 * c, "L", format="PNG"))
            (root / split / name / "c.png").write_bytes(jpeg((50 + 100 * c,) * 3 + (9,), "RGBA", format="PNG"))
            array = np.full((9, 9), (50 + 100 * c) * 256, np.uint16)
            Image.fromarray(array).save(root / split / name / "d.png")
    return root


def one_bit_flipped(blob):
    return blob[:len(blob) // 2] + bytes([blob[len(blob) // 2] ^ 1]) + blob[len(blob) // 2 + 1:]


def test_folder_and_its_cache(folder, tmp_path, capsys):
    root = tmp_path / "data"
    data = load_dataset(str(folder), root, 16)
    assert data.classes == ["cat", "dög"] and data.train_images.shape == (8, 3, 16, 16)
    assert (data.train_images == torch.tensor([50] * 4 + [150] * 4)[:, None, None, None]).all()
    cache = root / "my images-16.pt"
    assert [p.name for p in root.iterdir()] == [cache.name]
    for damage in (lambda b: b[:len(b) // 2], lambda b: b"", one_bit_flipped):
        cache.write_bytes(damage(cache.read_bytes()))
        assert torch.equal(load_dataset(str(folder), root, 16).train_images, data.train_images)
        assert "damaged" in capsys.readouterr().err
    load_dataset(str(folder), root, 16)
    assert capsys.readouterr().err == ""  # read from the cache
    (folder / "train/cat/e.png").write_bytes(jpeg((1, 1, 1), format="PNG"))
    assert len(load_dataset(str(folder), root, 16).train_images) == 9
    assert "of other files" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------- end to end

def run_main(*args, code=0):
    assert pah.main([str(a) for a in args]) == code


def results(out, seed=0):
    return json.loads((out / f"seed{seed}/results.json").read_text())


@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    """One real run on `synthetic`, as the README's first command does it but shorter."""
    out = tmp_path_factory.mktemp("learned")
    run_main(*SHORT_RUN, "--out", out)
    return out


def test_pah_beats_no_distillation(learned, tmp_path):
    run_main(*SHORT_RUN, "--lam", 0, "--mu", 0, "--out", tmp_path)
    with_it, without = results(learned), results(tmp_path)
    assert with_it["AA"] > without["AA"] + 15 and with_it["FM"] < without["FM"] / 2
    assert with_it["AA"] > 60  # of four classes


def test_results_and_files(learned):
    r, folder = results(learned), learned / "seed0"
    assert r["complete"] and [len(row) for row in r["accuracy"]] == [1, 2, 3, 4, 5]
    assert r["AA"] == average_accuracy(r["accuracy"]) and r["FM"] == forgetting(r["accuracy"])
    assert r["BWT"] == backward_transfer(r["accuracy"]) and r["LA"] == pah.learning_accuracy(r["accuracy"])
    assert r["parameters"]["prototypes_per_task"] == 4 * 3 * 10 * 10 and r["args"]["lam"] == 1
    assert r["seconds"] > 0 and r["images_per_second"] > 0 and r["peak_memory_bytes"] > 2**20 and r["versions"]["torch"]
    assert {p.name for p in folder.iterdir()} == {"results.json", "checkpoint.pt", "prototypes.png",
                                                   "prototypes-initial.pt", "accuracy.png", "curves.png"}
    picture = Image.open(folder / "prototypes.png")
    assert picture.size[0] > 4 * 40 and picture.size[1] > 10 * 40 and len(picture.getcolors(1 << 20)) > 100


def test_checkpoint_predicts_and_holds_no_image_and_no_head(learned):
    model = load_checkpoint(learned / "seed0/checkpoint.pt")
    tasks = split_tasks(load_dataset("synthetic"), 5)
    row = [pah.evaluate(model, k, t.test_images, t.test_labels) for k, t in enumerate(tasks)]
    assert row == results(learned)["accuracy"][-1]
    saved = torch.load(learned / "seed0/checkpoint.pt", weights_only=True)
    ours = set(PAH(ResNet18(8), 5, 4).state_dict())
    assert set(saved["model"]) == ours and not any(isinstance(v, torch.Tensor) for k, v in saved.items())
    sizes = {n: v.numel() for n, v in saved["model"].items()}
    assert sizes["prototypes"] == 5 * 4 * 300 and not any("head" in n or "stored" in n for n in sizes)
    task = tasks[1]  # the learned prototypes are not the training images that they began as
    small = F.interpolate(pah.normalise(task.train_images), 10, mode="bilinear", antialias=True, align_corners=False)
    assert (small[:, None] - saved["model"]["prototypes"][1]).abs().amax((2, 3, 4)).min() > 1e-3


def test_earlier_data_is_never_read_again(tmp_path, monkeypatch):
    """Once a task is trained its images and labels are overwritten; every weight ends up the same."""
    run_main(*TINY_RUN, "--stop-after", 3, "--out", tmp_path / "a")
    train_task = pah.train_task

    def train_and_destroy(model, teacher, task, images, labels, *rest):
        train_task(model, teacher, task, images, labels, *rest)
        assert images.any()
        images.zero_(), labels.zero_()

    monkeypatch.setattr(pah, "train_task", train_and_destroy)
    run_main(*TINY_RUN, "--stop-after", 3, "--out", tmp_path / "b")
    assert same(weights(tmp_path / "a"), weights(tmp_path / "b"))


def weights(out, seed=0):
    return torch.load(out / f"seed{seed}/checkpoint.pt", weights_only=True)["model"]


def same(a, b):
    return all(torch.equal(a[n], b[n]) for n in a)


def test_seeds_decide_everything(tmp_path, capsys):
    run_main(*TINY_RUN, "--stop-after", 2, "--seeds", 0, 1, "--out", tmp_path / "a")
    assert "2 seeds: AA" in capsys.readouterr().out
    run_main(*TINY_RUN, "--stop-after", 2, "--out", tmp_path / "b")
    assert same(weights(tmp_path / "a"), weights(tmp_path / "b"))
    assert not same(weights(tmp_path / "a", 1), weights(tmp_path / "a", 0))


def test_what_does_not_change_a_result(tmp_path, monkeypatch):
    run_main(*TINY_RUN, "--stop-after", 2, "--out", tmp_path / "a")
    evaluate = pah.evaluate
    monkeypatch.setattr(pah, "evaluate", lambda *a: (evaluate(*a), evaluate(*a))[1])  # evaluated once more
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)  # printed more often
    run_main(*TINY_RUN, "--stop-after", 2, "--out", tmp_path / "b")
    assert same(weights(tmp_path / "a"), weights(tmp_path / "b"))


KILLER = """
import io, json, os, random, select, signal, sys, time, zipfile
from pathlib import Path
import torch
import pah
from PIL import Image
kills, out, flags = int(sys.argv[1]), Path(sys.argv[2]), [*sys.argv[3:], "--resume"]
save, (heard, tell) = torch.save, os.pipe()
os.set_blocking(heard, False)

def slowly(value, path):  # so that every second one can be killed while it writes
    save(value, blob := io.BytesIO())
    os.write(tell, b".")
    with open(path, "wb") as f:
        for half in blob.getvalue()[:1000], blob.getvalue()[1000:]:
            f.write(half), f.flush(), time.sleep(0.1)

def start(folder):
    while select.select([heard], [], [], 0)[0]:
        os.read(heard, 1000)  # of the one before
    if pid := os.fork():
        return pid
    torch.set_num_threads(1)
    torch.save = slowly
    sys.stdout = open(os.devnull, "w")
    os._exit(pah.main([*flags, "--out", str(folder)]))

def finished(pid, seconds, writes=0):  # kills it after so long, or in its so-manieth write
    end, wrote = time.monotonic() + seconds, 0
    while time.monotonic() < end:
        if (done := os.waitpid(pid, os.WNOHANG))[0]:
            assert done[1] == 0, done
            return True
        try:
            wrote += len(os.read(heard, 1))
        except BlockingIOError:
            time.sleep(0.002)
        if wrote and wrote == writes:
            time.sleep(random.uniform(0, 0.2))
            break
    os.kill(pid, signal.SIGKILL)
    status = os.waitpid(pid, 0)[1]
    assert status in (0, signal.SIGKILL), status
    return status == 0  # at the last moment

def result(folder):
    return json.loads((folder / "seed0/results.json").read_text())["accuracy"]

begin = time.monotonic()
assert finished(start(out / "whole"), 300)
whole = time.monotonic() - begin
done = writing = rounds = 0
random.seed(0)
while done < kills:
    folder = out / f"cut{rounds}"
    def killed():
        if done >= kills or done % 2:
            return not finished(start(folder), 300, random.randint(1, 2) if done < kills else 0)
        return not finished(start(folder), random.uniform(0, whole))
    while killed():
        done += 1
        for file in folder.glob("seed0/*"):
            if file.name.endswith(".tmp"):
                writing += 1
            elif file.suffix == ".json":
                json.loads(file.read_text())
            elif file.suffix == ".png":
                Image.open(file).load()
            else:
                assert zipfile.ZipFile(file).testzip() is None and torch.load(file, weights_only=True)
    assert result(folder) == result(out / "whole")
    assert not list(folder.glob("seed0/.*")), "what a killed process left is still there"
    rounds += 1
print(f"{done} kills, {writing} of them while a file was written; {rounds} runs ended with the same matrix")
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_anywhere(tmp_path):
    """SIGKILL at random moments (PAH_KILLS=25 for more of them): every file stays readable, and --resume ends with the
    very matrix of a run that was left alone."""
    kills = os.environ.get("PAH_KILLS", "3")
    command = [sys.executable, "-c", KILLER, kills, str(tmp_path), *TINY_RUN, "--stop-after", "2"]
    done = subprocess.run(command, text=True, capture_output=True, cwd=Path(pah.__file__).parent)
    assert done.returncode == 0 and "runs ended with the same matrix" in done.stdout, done.stderr
    print(done.stdout)


def test_resume_has_nothing_left_to_do(tmp_path):
    run_main(*TINY_RUN, "--stop-after", 2, "--out", tmp_path)
    before = (tmp_path / "seed0/results.json").read_bytes()
    run_main(*TINY_RUN, "--stop-after", 2, "--out", tmp_path, "--resume")
    assert (tmp_path / "seed0/results.json").read_bytes() == before


def test_a_full_disk(tmp_path):
    """A file may not grow beyond 50 kB: one line, and the last checkpoint is untouched."""
    import resource
    run_main(*TINY_RUN, "--stop-after", 1, "--out", tmp_path)
    checkpoint = tmp_path / "seed0/checkpoint.pt"
    before = checkpoint.read_bytes()
    done = subprocess.run([sys.executable, pah.__file__, *TINY_RUN, "--stop-after", "2", "--out", tmp_path, "--resume"],
                          capture_output=True, text=True, preexec_fn=lambda: resource.setrlimit(
                              resource.RLIMIT_FSIZE, (50_000, 50_000)))
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "cannot be written" in done.stderr, done.stderr
    assert checkpoint.read_bytes() == before and not list((tmp_path / "seed0").glob(".*"))
    run_main(*TINY_RUN, "--stop-after", 2, "--out", tmp_path, "--resume")


def test_two_runs_in_one_folder(tmp_path, capsys):
    with pah.locked(tmp_path / "seed0"):
        run_main(*TINY_RUN, "--out", tmp_path, code=2)
    err = capsys.readouterr().err
    assert "another run is writing there" in err and err.count("\n") == 1
    run_main(*TINY_RUN, "--stop-after", 1, "--out", tmp_path)  # the lock went with its holder


def test_two_processes_build_one_cache(folder, tmp_path):
    code = ("import sys, pah; decode = pah.decode\n"
            "pah.decode = lambda *a: (print('decoding', flush=True), __import__('time').sleep(1), decode(*a))[2]\n"
            "assert len(pah.load_dataset(sys.argv[1], sys.argv[2], 16).train_images) == 8")
    command = [sys.executable, "-c", code, str(folder), str(tmp_path / "data")]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(pah.__file__).parent) for _ in "12"]
    said = [process.communicate()[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert sorted(said) == ["", "decoding\n"] and [p.name for p in (tmp_path / "data").iterdir()] == ["my images-16.pt"]
    assert len(load_dataset(str(folder), tmp_path / "data", 16).train_images) == 8


TORCHRUN = """
import json, os, sys
import torch
import torch.distributed.nn.functional
import pah

class Synchronised(torch.nn.BatchNorm2d):  # torch's own is for GPUs only
    def forward(self, x):
        if not self.training:
            return super().forward(x)
        world = pah.rank_and_world()[1]
        moments = torch.stack([x.mean((0, 2, 3)), x.square().mean((0, 2, 3))])
        if world > 1:
            moments = torch.distributed.nn.functional.all_reduce(moments) / world
        mean, var = moments[0], moments[1] - moments[0] ** 2
        n = world * x.numel() / x.shape[1]
        with torch.no_grad():
            self.running_mean.lerp_(mean, 0.1), self.running_var.lerp_(var * n / (n - 1), 0.1)
        column = lambda v: v[:, None, None]
        return (x - column(mean)) / column(var + self.eps).sqrt() * column(self.weight) + column(self.bias)

if "PLAIN" not in os.environ:
    torch.nn.BatchNorm2d = Synchronised
joint_loss, evaluate, losses = pah.joint_loss, pah.evaluate, []

def recorded(*args):
    loss, parts = joint_loss(*args)
    mean = parts.clone()
    if pah.rank_and_world()[1] > 1:
        torch.distributed.all_reduce(mean)
    losses.append((mean / pah.rank_and_world()[1]).tolist())
    return loss, parts

def noted(model, *rest):
    if not os.path.exists(f"{out}.{rank}.buffers"):
        open(f"{out}.{rank}.buffers", "w").write(str([b.double().sum().item() for b in model.buffers()]))
    return evaluate(model, *rest)

pah.joint_loss, pah.evaluate = recorded, noted
rank, out = os.environ.get("RANK", "0"), sys.argv[1]
open(f"{out}.{rank}.pid", "w").write(str(os.getpid()))
code = pah.main([*sys.argv[2:], "--out", out])
if rank == "0":
    json.dump(losses, open(f"{out}.json", "w"))
sys.exit(code)
"""


def torchrun(tmp_path, out, processes, *flags, **env):
    (tmp_path / "script.py").write_text(TORCHRUN)
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"] if processes > 1 else []
    command = [sys.executable, *launch, str(tmp_path / "script.py"), str(tmp_path / out), *TINY_RUN, *flags]
    return subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
                            env={**os.environ, "PYTHONPATH": str(Path(pah.__file__).parent), "OMP_NUM_THREADS": "1",
                                 **env})


def test_torchrun_is_the_same_run(tmp_path):
    """Two processes on the CPU share each batch: the losses of one process, and the same answers."""
    flags = "--stop-after", "2", "--lr", "0.002"
    both = [torchrun(tmp_path, out, processes, *flags) for out, processes in (("one", 1), ("two", 2))]
    for process in both:
        said, err = process.communicate(timeout=300)
        assert process.returncode == 0, err
        assert said.count("accuracy in % on task") == 1  # one of them prints
    one, two = (json.loads((tmp_path / f"{out}.json").read_text()) for out in ("one", "two"))
    assert len(one) == len(two) == 32
    torch.testing.assert_close(torch.tensor(two[:4]), torch.tensor(one[:4]), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(torch.tensor(two), torch.tensor(one), rtol=0.02, atol=0.02)  # rounding grows
    assert abs(results(tmp_path / "one")["AA"] - results(tmp_path / "two")["AA"]) < 5
    assert results(tmp_path / "two")["processes"] == 2


def test_torchrun_survives_a_death(tmp_path):
    """A process of two dies: the run ends with a message, and one process goes on where it was. Before that both had
    the same BatchNorm statistics, although each normalises its own share."""
    process = torchrun(tmp_path, "two", 2, "--stop-after", "3", PLAIN="1")
    while process.poll() is None and not (tmp_path / "two/seed0/checkpoint.pt").exists():
        time.sleep(0.01)
    os.kill(int((tmp_path / "two.1.pid").read_text()), signal.SIGKILL)
    _, err = process.communicate(timeout=120)
    assert process.returncode != 0 and "SIGKILL" in err
    assert (tmp_path / "two.0.buffers").read_text() == (tmp_path / "two.1.buffers").read_text()
    process = torchrun(tmp_path, "two", 1, "--resume", "--stop-after", "3")
    assert process.communicate(timeout=300) and process.returncode == 0
    r = results(tmp_path / "two")
    assert r["complete"] and r["processes"] == 1 and len(r["accuracy"]) == 3


def test_torchrun_shares_evenly(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setattr(torch.distributed, "is_torchelastic_launched", lambda: True)
    for flags, says in (["--batch-size", 64], "--batch-size 64"), (["--batch-size", 3], "--batch-size 3"), (
            ["--bench"], "--bench"):
        run_main("--dataset", "synthetic", "--out", tmp_path, *flags, code=2)
        err = capsys.readouterr().err
        assert err.startswith(f"pah.py: {says}") and err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_bench(capsys, monkeypatch):
    seen, forward = set(), nn.Conv2d.forward
    noted = lambda conv, x: seen.add((type(conv), conv.kernel_size[0], conv.in_channels)) or forward(conv, x)
    monkeypatch.setattr(nn.Conv2d, "forward", noted)
    run_main("--dataset", "synthetic", "--width", 4, "--bench", 0.5, "--sp-tasks", 1)
    out = capsys.readouterr().out
    for words in ("floor", "with Conv2d ", "task 1 ", "task 2 ", "task 5 ", "task 5 / task 2:", "peak memory:", "GFLOP",
                  "predicted:"):
        assert words in out
    assert all(len(line) <= 120 for line in out.splitlines())
    assert {(pah.Conv3x3, 3, 8), (nn.Conv2d, 3, 8)} <= seen  # both floors were run


def test_run_all(tmp_path):
    """With a stand-in for Python that notes what it is called with: all settings parse, and all are run."""
    stub = tmp_path / "python"
    stub.write_text(f"""#!/bin/sh
case "$*" in
  *device_count*) echo 0 ;;
  *--bench*) echo "predicted: 1:02:03 for 5 tasks of 8 epochs, a seed" ;;
  *"$FAIL"*) echo "pah.py: no luck" >&2; exit 2 ;;
  *) echo "$*" >>{tmp_path}/calls; echo "AA 50.00" ;;
esac
""")
    stub.chmod(0o755)
    script = Path(pah.__file__).parent / "run_all.sh"
    copy_of_script = tmp_path / "run_all.sh"
    copy_of_script.write_text(script.read_text())
    for flags, count in (["--quick"], 18), (["--epochs", "3"], 28):
        done = subprocess.run(["bash", copy_of_script, *flags], capture_output=True, text=True,
                              env=os.environ | {"PYTHON": str(stub), "FAIL": "nothing"})
        assert done.returncode == 0 and "1:02:03" in done.stdout, done.stderr
        calls = (tmp_path / "calls").read_text().splitlines()
        (tmp_path / "calls").unlink()
        settings = {json.dumps(vars(pah.parse_args(call.split()[1:])), sort_keys=True) for call in calls}
        assert len(settings) == len(calls) == count + 1 and "--report" in calls[-1]
        assert done.stdout.count("AA 50.00") >= count
    done = subprocess.run(["bash", copy_of_script, "--quick"], capture_output=True, text=True,
                          env=os.environ | {"PYTHON": str(stub), "FAIL": "--mu 0.5"})
    assert done.returncode == 1 and "synthetic-5-mu0.5 failed: pah.py: no luck" in done.stdout
    assert len((tmp_path / "calls").read_text().splitlines()) == 18  # all others, and the report


@pytest.mark.parametrize("flags", [["--head", "stored"], ["--embedding", "vector"], ["--joint"],
                                   ["--precision", "bf16"], ["--proto-channels", "1"], ["--proto-init", "random"],
                                   ["--val-fraction", "0.2", "--shuffle-classes"], ["--label-smoothing", "0.1"],
                                   ["--stem", "7x7", "--image-size", "32"], ["--optimizer", "adamw"],
                                   ["--sp-tasks", "1", "--stop-after", "3"]])
def test_every_kind_of_run_ends(flags, tmp_path):
    run_main(*TINY_RUN, "--stop-after", 2, "--out", tmp_path, *flags)
    r = results(tmp_path)
    assert r["complete"] and r["AA"] > 10
    load_checkpoint(tmp_path / "seed0/checkpoint.pt")
    if flags == ["--joint"]:
        assert [len(row) for row in r["accuracy"]] == [5] and r["FM"] is None


def test_orthogonalised(monkeypatch):
    monkeypatch.setattr(pah, "rounded_products", contextlib.nullcontext)
    torch.manual_seed(0)
    for shape in (3, 16, 40), (2, 40, 16), (1, 8, 8):
        u, _, vt = torch.linalg.svd(torch.randn(shape), full_matrices=False)
        s = torch.logspace(0, -1.3, min(shape[1:]))
        out = torch.stack(pah.orthogonalised((u @ s.diag() @ vt).unbind()))
        singular = (u.mT @ out @ vt.mT).diagonal(dim1=-2, dim2=-1)
        assert out.shape == shape and 0.61 < singular.min() and singular.max() < 1.39
        assert (u.mT @ out @ vt.mT - singular.diag_embed()).abs().max() < 1e-4
    assert not pah.orthogonalised([torch.zeros(4, 6)])[0].any()


def test_products_of_muon_may_be_rounded_and_nothing_else(monkeypatch):
    torch.manual_seed(0)
    x = torch.randn(256, 1024)  # rounded where the hardware has bf16
    rounded = pah.orthogonalised([x])[0]
    with pah.rounded_products():
        assert torch.get_float32_matmul_precision() == "medium"
    assert torch.get_float32_matmul_precision() == "highest"
    monkeypatch.setattr(pah, "rounded_products", contextlib.nullcontext)
    exact = pah.orthogonalised([x])[0]
    assert (rounded - exact).norm() < 0.01 * exact.norm()


def test_muon_beside_the_newer_precision_options():
    code = ("import torch, pah; torch.backends.cuda.matmul.fp32_precision = 'tf32'; "
            "pah.orthogonalised([torch.ones(2, 3)]); print(torch.backends.cuda.matmul.fp32_precision)")
    if hasattr(torch.backends.cuda.matmul, "fp32_precision"):  # torch 2.9
        done = subprocess.run([sys.executable, "-c", code], text=True, capture_output=True,
                              cwd=Path(pah.__file__).parent)
        assert done.stdout == "tf32\n", done.stderr


def test_muon_moves_filters_and_adamw_the_rest(monkeypatch):
    """Six steps with the same gradients. Every fifth filter bank moves in the first, the next ones in the second, by
    5 * lr * sqrt(max(1, rows / columns)) along the orthogonalised gradient; all else moves as AdamW would have it."""
    monkeypatch.setattr(pah, "rounded_products", contextlib.nullcontext)
    model, teacher, x, y = pair()
    optimizer = pah.make_optimizer(model, lr=0.02, hyper_lr=1e-4, proto_lr=1e-3, weight_decay=0.1)
    expected = copy.deepcopy(model)
    adamw = torch.optim.AdamW([dict(params=[p for p in expected.backbone.parameters() if p.ndim == 1], lr=0.002,
                                    weight_decay=0),
                               dict(params=expected.hypernetwork.parameters(), lr=1e-4, weight_decay=0.1),
                               dict(params=[expected.prototypes], lr=1e-3, weight_decay=0)])
    pah.joint_loss(expected, teacher, x, y, 3)[0].backward()
    filters = [name for name, p in model.named_parameters() if name.startswith("backbone") and p.ndim > 1]
    for turn in 0, 1, 2, 3, 4, 0:
        for p, like in zip(model.parameters(), expected.parameters()):
            p.grad = like.grad.clone()
        optimizer.step(), adamw.step()
        with torch.no_grad():
            for name in filters[turn::5]:
                p = expected.get_parameter(name)
                g = p.grad.flatten(1)
                step = pah.orthogonalised([g])[0] * 5 * 0.02 * max(1, g.shape[0] / g.shape[1]) ** 0.5
                p.mul_(1 - 5 * 0.02 * 0.1).sub_(step.view_as(p))
        for name, p in model.named_parameters():
            torch.testing.assert_close(p, expected.get_parameter(name), rtol=1e-4, atol=1e-5)


def test_muon_has_nesterov_momentum():
    torch.manual_seed(0)
    filters = [torch.nn.Parameter(torch.zeros(4, 6, 1, 1)) for _ in range(5)]
    optimizer = pah.Muon([dict(params=filters, lr=1.0, weight_decay=0, muon=True)])
    momentum = torch.zeros(4, 6)
    for i, g in enumerate(torch.randn(6, 4, 6)):
        before = [p.detach().clone() for p in filters]
        for p in filters:
            p.grad = g.view_as(p).clone()
        optimizer.step()
        momentum = 0.95 * momentum + 0.05 * g
        want = 5 * pah.orthogonalised([0.05 * g + 0.95 * momentum])[0].view_as(p)
        for turn, p in enumerate(filters):  # each has seen all gradients when its turn comes
            torch.testing.assert_close(before[turn] - p.detach(), want if turn == i % 5 else torch.zeros_like(want),
                                       rtol=1e-3, atol=1e-4)


def test_a_frozen_backbone_is_left_alone():
    model, teacher, x, y = pair()
    model.backbone.requires_grad_(False)
    before = copy.deepcopy(model)
    optimizer = pah.make_optimizer(model, lr=0.02, hyper_lr=1e-4, proto_lr=1e-3, weight_decay=0.1)
    pah.joint_loss(model, teacher, x, y, 3)[0].backward()
    optimizer.step()
    for name, p in model.named_parameters():
        assert torch.equal(p, before.get_parameter(name)) == name.startswith("backbone"), name


def test_l_sp_of_drawn_tasks_is_unbiased():
    model, teacher, *_ = pair()
    exact = pah.soft_loss_prototypes(model, teacher, 3)
    each = {round(pah.soft_loss_prototypes(model, teacher, 3, drawn=1).item(), 6) for _ in range(40)}
    assert len(each) == 3 and abs(sum(each) / 3 - exact) < 1e-4 * exact  # each task stands for all three
    assert pah.soft_loss_prototypes(model, teacher, 3, drawn=3) == exact


def test_bf16_on_the_cpu_stays_close():
    model, teacher, x, y = pair()
    exact = pah.joint_loss(copy.deepcopy(model), teacher, x, y, 3)[1]
    model.precision = teacher.precision = "bf16"
    seen = []
    model.backbone.layer4.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    close = pah.joint_loss(model, teacher, x, y, 3)[1]
    assert set(seen) == {torch.bfloat16} and model(x, 1).dtype == close.dtype == torch.float32
    torch.testing.assert_close(close, exact, rtol=0.05, atol=0.02)


def test_the_teacher_is_rounded_once():
    model, _, x, _ = pair()
    model.precision = "bf16"
    teacher = model.freeze(2)
    assert teacher.backbone.conv1.weight.dtype == torch.bfloat16 and model.backbone.conv1.weight.dtype == torch.float32
    assert torch.equal(teacher.features(x), model.eval().features(x))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_cuda(precision, tmp_path):
    run_main("--dataset", "synthetic", "--epochs", 5, "--device", "cuda", "--precision", precision, "--out", tmp_path)
    assert results(tmp_path)["AA"] > 60


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_a_step_does_not_wait_for_the_gpu():
    model, teacher, x, y = (v.cuda() for v in pair())
    teacher.frozen_heads = teacher.frozen_heads.cuda()
    optimizer = pah.make_optimizer(model, lr=0.02, hyper_lr=1e-4, proto_lr=1e-3, weight_decay=0.1)
    images = torch.zeros(len(x), 3, 16, 16, dtype=torch.uint8, device="cuda")
    for mode in "default", "error":  # what is made once may wait
        torch.cuda.set_sync_debug_mode(mode)
        try:
            x = pah.normalise(pah.augment(images, 2))
            pah.joint_loss(model, teacher, x, y, 3, sp_tasks=2)[0].backward()
            optimizer.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_report(tmp_path, capsys):
    def leave(name, seed, AA, FM, complete=True, **options):
        folder = tmp_path / name / f"seed{seed}"
        folder.mkdir(parents=True)
        args = vars(pah.parse_args(["--dataset", "synthetic"])) | {"out": name, "seeds": [seed]} | options
        r = dict(args=args, seed=seed, AA=AA, FM=FM, LA=AA + 1, seconds=61, complete=complete)
        (folder / "results.json").write_text(json.dumps(r))

    leave("a", 0, 80.0, 1.0), leave("a", 1, 82.0, 3.0), leave("b", 0, 40.0, 50.0, lam=0.0)
    leave("c", 0, 90.0, None, joint=True), leave("d", 0, 1.0, 1.0, complete=False)
    leave("f", 0, 80.0, 1.0)  # seed 0 of the first setting once more: no third seed
    (tmp_path / "e").mkdir(), (tmp_path / "e/results.json").write_text("{")
    run_main("--report", tmp_path)
    out, err = capsys.readouterr()
    assert [line.split("  ")[0] for line in out.splitlines()[1:]] == [
        "synthetic, 5 tasks", "synthetic, 5 tasks --lam 0.0", "synthetic, 5 tasks --joint"]
    assert "81.00 ± 1.41" in out and "2.00 ± 1.41" in out and "0 1" in out and "1:01" in out
    assert err.count("left out") == 3 and "d/seed0" in err and "counted already" in err and "e/results.json" in err
    run_main("--report", tmp_path, "--format", "markdown")
    assert all(line.count("|") == 7 for line in capsys.readouterr().out.splitlines())
    run_main("--report", tmp_path, "--format", "latex")
    out = capsys.readouterr().out
    assert out.startswith("\\begin{tabular}") and out.count(" & ") == 20 and "81.00 $\\pm$ 1.41" in out
    run_main("--report", tmp_path / "e", code=2)
    leave("g", 0, 70.0, 2.0, dataset="cifar100", tasks=10)
    run_main("--report", tmp_path, "--with-reported")
    lines = capsys.readouterr().out.splitlines()
    assert sum("(reported)" in line for line in lines) == 9 and not any("tinyimagenet" in line for line in lines)
    assert "74.46 ± 0.08  1.71 ± 0.02" in next(line for line in lines if "PAH (reported)" in line)


def test_pictures_show_the_numbers(tmp_path):
    """Cells of a higher accuracy are darker; a curve is where its accuracy is; one task and twenty work too."""
    R = [[90.0], [50.0, 70.0]]
    pah.draw_accuracy(tmp_path / "a.png", R, "two tasks")
    picture = Image.open(tmp_path / "a.png")
    corner = lambda row, column: sum(picture.getpixel((64 + 44 * column + 2, 66 + 44 * row + 2)))
    assert corner(0, 0) < corner(1, 1) < corner(1, 0) and picture.getpixel((64 + 44 + 2, 66 + 2)) == (255, 255, 255)
    pah.draw_curves(tmp_path / "c.png", R, "two tasks")
    pixels = np.asarray(Image.open(tmp_path / "c.png").convert("RGB")).astype(int)
    column = pixels[60:385, 715]  # near the end the first task is at 50, AA at 60: black, below it the red of task 1
    black, red = np.nonzero(column.sum(1) < 60)[0], np.nonzero((column[:, 0] > 150) & (column[:, 1] < 110))[0]
    assert len(black) and len(red) and black.max() < red.min()
    for R in [[30.0]], [[float(i + j) for j in range(i + 1)] for i in range(20)], [[0.0], [0.0, 100.0]]:
        pah.draw_accuracy(tmp_path / "a.png", R, "x"), pah.draw_curves(tmp_path / "c.png", R, "x")


# ---------------------------------------------------------------------------------------------------- bad input

@pytest.mark.parametrize("flags, says", [
    ("--dataset nowhere", "nowhere: not a data set"),
    ("--dataset synthetic --tasks 3", "do not divide"),
    ("--dataset synthetic --tasks 40", "do not divide"),
    ("--tasks 0", "--tasks: '0'"), ("--tasks -2", "--tasks"), ("--tasks 2.5", "--tasks"),
    ("--epochs 0", "--epochs"), ("--epochs nan", "--epochs"), ("--batch-size 1", "--batch-size"),
    ("--lr 0", "--lr"), ("--lr nan", "--lr"), ("--lr inf", "--lr"), ("--hyper-lr -1", "--hyper-lr"),
    ("--proto-lr x", "--proto-lr"), ("--weight-decay -1", "--weight-decay"), ("--lam -0.1", "--lam"),
    ("--lam nan", "--lam"), ("--mu inf", "--mu"), ("--temperature 0", "--temperature"),
    ("--proto-size 0", "--proto-size"), ("--sp-tasks -1", "--sp-tasks"), ("--optimizer sgd", "--optimizer"),
    ("--bench 0", "--bench"), ("--format html", "--format"), ("--report nowhere", "--report nowhere"),
    ("--proto-size 100000", "--proto-size"), ("--proto-channels 2", "--proto-channels"), ("--hidden 0", "--hidden"),
    ("--width 0", "--width"), ("--image-size 4", "--image-size"), ("--val-fraction 1", "--val-fraction"),
    ("--label-smoothing 2", "--label-smoothing"), ("--seeds -1", "--seeds"), ("--seeds", "--seeds"),
    ("--stop-after 11", "--stop-after"), ("--stem 5x5", "--stem"), ("--pretrained", "--pretrained"),
    ("--proto-init best", "--proto-init"), ("--precision int8", "--precision"), ("--unknown 1", "--unknown"),
    ("--device cuda", "--device cuda"),
])
def test_bad_flags(flags, says, capsys, tmp_path):
    if "cuda" in flags and torch.cuda.is_available():
        pytest.skip("has CUDA")
    run_main(*flags.split(), "--data", tmp_path / "d", "--out", tmp_path / "o", code=2)
    err = capsys.readouterr().err
    assert says in err and err.count("\n") == 1 and "Traceback" not in err
    assert not list(tmp_path.iterdir())


def huge_png():
    """A few bytes that claim to be an image of 60,000 x 60,000 pixels."""
    chunk = lambda kind, body: struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">2I5B", 60_000, 60_000, 8, 2, 0, 0, 0)) + chunk(
        b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def test_odd_but_good_folders(folder, tmp_path):
    """Images of any mode and size, files that are no images, hidden files, links out of the folder."""
    (folder / "train/cat/cmyk.jpg").write_bytes(jpeg((0, 0, 0, 0), "CMYK"))
    (folder / "train/cat/palette.png").write_bytes(jpeg(0, "P", format="PNG"))
    (folder / "train/cat/one pixel.png").write_bytes(jpeg((9, 9, 9), size=(1, 1), format="PNG"))
    (folder / "train/cat/long.png").write_bytes(jpeg((9, 9, 9), size=(3000, 1), format="PNG"))
    (tmp_path / "elsewhere.png").write_bytes(jpeg((77, 77, 77), format="PNG"))
    (folder / "train/cat/z.png").symlink_to(tmp_path / "elsewhere.png")
    for name in "train/cat/notes.txt", "train/cat/.DS_Store", "train/README", "val/.hidden":
        (folder / name).write_bytes(b"not an image")
    data = load_dataset(str(folder), tmp_path / "data", 8)
    assert len(data.train_images) == 8 + 5 and data.train_labels.tolist() == [0] * 9 + [1] * 4
    assert set(data.train_images[8].flatten().tolist()) == {77}  # files in the order of their names: z.png
    assert data.train_images[3].float().mean() > 250  # cmyk.jpg is white


@pytest.mark.parametrize("break_it, says", [
    (lambda f: [p.unlink() for p in (f / "train/cat").iterdir()], "cat"),
    (lambda f: (f / "val/cat").rename(f / "val/cow"), "cat, cow"),
    (lambda f: (f / "val").rename(f / "test"), "no folder val/"),
    (lambda f: (f / "train/cat/a.png").write_bytes(b"no image"), "cat/a.png: not a readable image"),
    (lambda f: (f / "val/cat/t.jpg").write_bytes(jpeg((1, 2, 3))[:400]), "cat/t.jpg: not a readable image"),
    (lambda f: (f / "val/cat/t.jpg").write_bytes(b""), "cat/t.jpg: not a readable image"),
    (lambda f: (f / "val/cat/link.png").symlink_to(f / "nowhere.png"), "cat/link.png: not a readable image"),
    (lambda f: (f / "train/cat/p.png").write_bytes(huge_png()), "cat/p.png: not a readable image"),
    (lambda f: (f / "train/cow").mkdir(), "cow"),
    (lambda f: [p.unlink() for p in f.glob("*/*/*")], "cat"),
    (lambda f: __import__("shutil").rmtree(f / "train/cat"), "cat"),
    (lambda f: (f / "train/cat/a.png").chmod(0), "a.png"),
])
def test_bad_folders(break_it, says, folder, tmp_path, capsys):
    break_it(folder)
    if says == "a.png" and os.access(folder / "train/cat/a.png", os.R_OK):
        pytest.skip("root reads everything")
    run_main("--dataset", folder, "--tasks", 1, "--data", tmp_path / "d", "--out", tmp_path / "o", code=2)
    err = capsys.readouterr().err
    assert says in err and err.count("\n") == 1
    assert not (tmp_path / "o").exists() and not list(tmp_path.glob("d/*"))


def test_bad_output_folders_and_checkpoints(tmp_path, capsys):
    def fails(says, *flags, out=tmp_path / "o"):
        run_main(*TINY_RUN, "--stop-after", 1, "--out", out, *flags, code=2)
        err = capsys.readouterr().err
        assert says in err and err.count("\n") == 1

    (tmp_path / "file").touch()
    fails("file", out=tmp_path / "file")
    run_main(*TINY_RUN, "--stop-after", 1, "--out", tmp_path / "o")
    checkpoint = tmp_path / "o/seed0/checkpoint.pt"
    whole = checkpoint.read_bytes()
    fails("--resume")
    fails("--lr (0.01 there, 0.1 now)", "--resume", "--lr", "0.1")
    for blob in whole[:len(whole) // 2], b"", b"garbage":
        checkpoint.write_bytes(blob)
        fails("damaged", "--resume")
        assert checkpoint.read_bytes() == blob

    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/executed",)

    checkpoint.write_bytes(one_bit_flipped(whole))  # among the weights
    fails("CRC", "--resume")
    checkpoint.write_bytes(whole)
    saved = torch.load(checkpoint, weights_only=True)
    torch.save(saved | {"format": 99}, checkpoint)
    fails("format 99, not 1", "--resume")
    torch.save({"something": "else"}, checkpoint)
    fails("not a PAH checkpoint", "--resume")
    torch.save({"format": 1, "args": Evil()}, checkpoint)
    fails("damaged", "--resume")
    assert not (tmp_path / "executed").exists()


def test_no_network(tmp_path, capsys, monkeypatch):
    import urllib.error
    import urllib.request

    def offline(*args, **kwargs):
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setattr(urllib.request, "urlopen", offline)
    for dataset, file in ("cifar100", "cifar-100-python.tar.gz"), ("tinyimagenet", "tiny-imagenet-200.zip"), (
            "mnist", "train-images-idx3-ubyte.gz"):
        run_main("--dataset", dataset, "--data", tmp_path / "d", "--out", tmp_path / "o", code=2)
        err = capsys.readouterr().err
        assert file in err and "--dataset synthetic" in err and str(tmp_path / "d") in err
        assert len([line for line in err.splitlines() if line.startswith("pah.py:")]) == 1
        assert not list((tmp_path / "d").iterdir())


def test_bad_archives(tmp_path, monkeypatch, capsys):
    """Of the wrong sum, cut short, not an archive, or with members that would land elsewhere: nothing is unpacked."""
    root = tmp_path / "in/data"
    root.mkdir(parents=True)
    evil = io.BytesIO()
    with tarfile.open(fileobj=evil, mode="w:gz") as tar:
        member = tarfile.TarInfo("../../evil")
        member.size = 4
        tar.addfile(member, io.BytesIO(b"evil"))
    zipped = io.BytesIO()
    with zipfile.ZipFile(zipped, "w") as z:
        z.writestr("tiny-imagenet-200/../../../evil", b"evil")
    for name, dataset, blob in [("cifar-100-python.tar.gz", "cifar100", evil.getvalue()),
                                ("cifar-100-python.tar.gz", "cifar100", b"no archive"),
                                ("tiny-imagenet-200.zip", "tinyimagenet", zipped.getvalue()),
                                ("tiny-imagenet-200.zip", "tinyimagenet", zipped.getvalue()[:40])]:
        for right_sum in False, True:
            if right_sum:
                monkeypatch.setattr(pah, "TINY_MD5", hashlib.md5(blob).hexdigest())
            elif dataset == "cifar100":  # of the wrong sum, torchvision fetches it anew: without a network, one line
                monkeypatch.setattr("urllib.request.urlopen", lambda *a, **k: (_ for _ in ()).throw(OSError("offline")))
            (root / name).write_bytes(blob)
            run_main("--dataset", dataset, "--data", root, "--out", tmp_path / "o", code=2)
            err = capsys.readouterr().err
            assert len([line for line in err.splitlines() if line.startswith("pah.py:")]) == 1 and str(root) in err
            assert [p.name for p in root.iterdir()] == [name] and (root / name).read_bytes() == blob
            there = {p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*")}
            assert there == {"in", "in/data", f"in/data/{name}"}
        (root / name).unlink()


def test_bad_caches(folder, tmp_path, capsys):
    """A cache of another format, or one that holds pickled objects: built anew, and no code in it is run."""
    cache = tmp_path / "data/my images-16.pt"
    good = load_dataset(str(folder), cache.parent, 16)

    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/executed",)

    saved = torch.load(cache, weights_only=True)
    for change in {"signature": "1 other"}, {"data": [Evil()]}, {"data": saved["data"][:3]}:
        torch.save(saved | change, cache)
        assert torch.equal(load_dataset(str(folder), cache.parent, 16).train_images, good.train_images)
        assert "rebuilding" in capsys.readouterr().err and not (tmp_path / "executed").exists()


def test_archives_put_there_by_hand(tmp_path, monkeypatch):
    from torchvision.datasets import CIFAR100, MNIST
    files = fake_cifar100(tmp_path / "x", monkeypatch)
    archive = tmp_path / "d/cifar-100-python.tar.gz"
    archive.parent.mkdir()
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(tmp_path / "x/cifar-100-python", "cifar-100-python")
    monkeypatch.setattr(CIFAR100, "tgz_md5", hashlib.md5(archive.read_bytes()).hexdigest())
    data = load_dataset("cifar100", tmp_path / "d")
    assert np.array_equal(data.test_images.numpy(), files["test"]["data"].reshape(-1, 3, 32, 32))

    fake_mnist(tmp_path / "d/MNIST/raw")
    resources = []
    for file in sorted((tmp_path / "d/MNIST/raw").iterdir()):
        blob = gzip.compress(file.read_bytes())
        file.with_name(file.name + ".gz").write_bytes(blob)
        resources.append((file.name + ".gz", hashlib.md5(blob).hexdigest()))
        file.unlink()
    monkeypatch.setattr(MNIST, "resources", resources)
    assert len(load_dataset("mnist", tmp_path / "d").train_images) == 20
    assert not list((tmp_path / "d").glob(".download*"))


def test_a_loss_that_is_no_number_stops_the_run(tmp_path, capsys, monkeypatch):
    joint_loss, calls = pah.joint_loss, []

    def failing(*args, **kwargs):
        loss, parts = joint_loss(*args, **kwargs)
        calls.append(1)
        return (loss, parts * float("nan")) if len(calls) == 20 else (loss, parts)

    monkeypatch.setattr(pah, "joint_loss", failing)
    run_main(*TINY_RUN, "--out", tmp_path, code=2)  # 16 steps a task
    err = capsys.readouterr().err
    assert "task 2, epoch 1, step 4" in err and "--lr" in err and err.count("\n") == 1
    assert torch.load(tmp_path / "seed0/checkpoint.pt", weights_only=True)["tasks_done"] == 1


def test_ctrl_c_leaves_the_finished_tasks(tmp_path, capsys, monkeypatch):
    evaluate, calls = pah.evaluate, []

    def interrupted(*args):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return evaluate(*args)

    monkeypatch.setattr(pah, "evaluate", interrupted)
    run_main(*TINY_RUN, "--stop-after", 3, "--out", tmp_path, code=130)
    assert "--resume" in capsys.readouterr().err and not results(tmp_path)["complete"]
    monkeypatch.setattr(pah, "evaluate", evaluate)
    run_main(*TINY_RUN, "--stop-after", 3, "--out", tmp_path, "--resume")
    assert results(tmp_path)["complete"]


@pytest.mark.parametrize("there, precision", [(True, "bf16"), (False, "fp32")])
def test_precision_follows_the_processor(there, precision, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: there, raising=False)
    assert pah.parse_args(["--device", "cpu"]).precision == precision
    assert pah.parse_args(["--device", "cpu", "--precision", "fp32"]).precision == "fp32"


@pytest.mark.skipif(sys.platform != "linux", reason="of glibc")
def test_freed_memory_is_kept():
    """Twenty tensors of 64 MB one after the other: without it each of their 16,384 pages is fetched again."""
    code = ("import resource, torch, pah; pah.main(['--report', 'nowhere']); torch.ones(1 << 24)\n"
            "faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
            "before = faults(); [torch.ones(1 << 24).shape for _ in range(20)]; print(faults() - before)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(pah.__file__).parent)
    assert int(done.stdout) < 5 * 16_384, done.stderr


def test_help_is_quick_and_torchvision_waits():
    code = "import sys, pah; pah.main(['--dataset', 'nowhere']); sys.exit('torchvision' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, cwd=Path(pah.__file__).parent)
    assert done.returncode == 0 and done.stderr.count(b"\n") == 1


# ---------------------------------------------------------------------------------------------------- README

README = (Path(__file__).parent / "README.md").read_text()


def test_readme_snippets_run(learned, tmp_path, monkeypatch):
    """All three of them, as they stand (the first with one epoch)."""
    (tmp_path / "runs").mkdir()
    os.symlink(learned, tmp_path / "runs/synthetic-5")
    monkeypatch.chdir(tmp_path)
    snippets = [block.split("```")[0] for block in README.split("```python\n")[1:]]
    assert len(snippets) == 3 and all(s.count("\n") < 20 for s in snippets)
    scopes = []
    for snippet in snippets:
        scopes.append({})
        exec(snippet.replace("range(2)", "range(1)"), scopes[-1])
    first, second, third = scopes
    accuracy = [pah.evaluate(first["model"], k, t.test_images, t.test_labels) for k, t in enumerate(first["tasks"])]
    assert sum(accuracy) / 5 > 50  # of four classes, after one epoch
    assert second["model"](torch.zeros(2, 3, 32, 32), 9).shape == (2, 10)
    assert third["classes"].shape == (8,)


def test_readme_names_only_flags_that_exist(capsys):
    with pytest.raises(SystemExit):
        pah.main(["--help"])
    flags = set(capsys.readouterr().out.split())
    for command in [line for line in README.splitlines() if line.startswith("python pah.py")]:
        pah.parse_args(command.split("#")[0].split()[2:])
    assert {w.strip("`,|():;.") for w in README.split() if w.startswith("`--")} <= {f.strip("[],") for f in flags}
