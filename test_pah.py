"""What pah.py promises, in its order. No network, no published data; CUDA is tested where it is."""

import copy
import hashlib
import itertools
import json
import os
import pickle
import re
import struct
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

import pah
from pah import (
    PAH,
    ResNet18,
    Task,
    UserError,
    load_checkpoint,
    load_dataset,
    split_tasks,
)

HERE = Path(pah.__file__).parent
K, C, T = 4, 3, 3.0
RUN = ["--dataset", "synthetic", "--tasks", "5", "--device", "cpu", "--precision", "fp32"]
TINY = [*RUN, "--width", "4", "--epochs", "1", "--hidden", "8", "--batch-size", "50"]
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")

# -----------------------------------------------------------------------------
# Helpers


def fill(model):
    """All tasks have begun: prototypes and BatchNorm statistics that matter."""
    torch.manual_seed(1)
    model.prototypes.data.normal_()
    model.present.fill_(True)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 2)
    return model


def small_pah(**options):
    options = {"proto_size": 6, "hidden": 8, "temperature": T} | options
    return fill(PAH(ResNet18(4), K, C, **options))


def student_and_teacher(**options):
    """A student in training, a teacher with other weights, and a batch of task 3."""
    torch.manual_seed(0)
    teacher = small_pah(**options).eval().requires_grad_(False)
    torch.manual_seed(2)
    student = small_pah(**options).train()
    return student, teacher, torch.randn(5, 3, 16, 16), torch.tensor([0, 1, 2, 1, 0])


def softened_kl(new, old):
    """KL(old || new) T^2, written out."""
    p, q = (old / T).softmax(-1), (new / T).softmax(-1)
    return T * T * (p * (p.log() - q.log())).sum(-1)


def own_arrays(classes=2, count=12, size=8):
    """A task of random images."""
    images = torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8)
    labels = torch.arange(count) % classes
    return Task(images, labels, images, labels)


def run_main(*args):
    pah.main([str(arg) for arg in args])


def results(out, seed=0):
    return json.loads((out / f"seed{seed}/results.json").read_text())


def weights(out, seed=0):
    return torch.load(out / f"seed{seed}/checkpoint.pt", weights_only=True)["model"]


def assert_same(a, b):
    assert set(a) == set(b)
    for name in a:
        assert torch.equal(a[name], b[name]), name


@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    """One real run on the synthetic data, as short as it may be."""
    out = tmp_path_factory.mktemp("learned")
    run_main(*RUN, "--width", 8, "--epochs", 3, "--out", out)
    return out


# -----------------------------------------------------------------------------
# Images


def test_normalise_by_hand():
    white = pah.normalise(torch.full((3, 1, 1), 255, dtype=torch.uint8)).flatten()
    black = pah.normalise(torch.full((3, 1, 1), 0, dtype=torch.uint8)).flatten()
    torch.testing.assert_close(1 / (white - black), torch.tensor([0.229, 0.224, 0.225]))
    torch.testing.assert_close(black / (black - white), torch.tensor([0.485, 0.456, 0.406]))


def test_normalise_takes_arrays_of_numpy():
    images = torch.randint(0, 256, (2, 3, 4, 4), dtype=torch.uint8)
    assert torch.equal(pah.normalise(images.numpy()), pah.normalise(images))


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64, torch.bool])
def test_images_that_are_not_uint8_are_not_normalised(dtype):
    with pytest.raises(UserError, match=f"must be uint8, 0 to 255, not {dtype}"):
        pah.normalise(torch.zeros(2, 3, 4, 4, dtype=dtype))


# -----------------------------------------------------------------------------
# Model


def test_heads_start_at_the_scale_of_a_linear_layer():
    torch.manual_seed(0)
    heads = pah.Hypernetwork(3000, 10, 512)(torch.randn(50, 3000))
    assert 0.7 < heads.std() / nn.Linear(512, 10).weight.std() < 1.4


def test_hidden_vectors_of_different_tasks_start_nearly_orthogonal():
    torch.manual_seed(0)
    hidden = pah.Hypernetwork(3000, 10, 512).layers[:-1](torch.randn(50, 3000))
    cosines = F.normalize(hidden) @ F.normalize(hidden).T
    assert cosines[~torch.eye(50, dtype=torch.bool)].mean().abs() < 0.1  # with ReLU 0.5


def test_equations_1_to_3():
    model = small_pah().eval()
    images = torch.randn(5, 3, 16, 16)
    e = torch.cat([model.prototypes[2, c].flatten() for c in range(C)])  # Eq. 3
    W = model.hypernetwork(e)  # Eq. 2
    assert W.shape == (C, 32)
    torch.testing.assert_close(model(images, K)[:, 2], model.backbone(images) @ W.T)  # Eq. 1


def test_prototypes_start_as_training_images_of_their_classes():
    torch.manual_seed(0)
    task = split_tasks(load_dataset("synthetic"), 5)[1]
    model = PAH(ResNet18(4), 5, 4)
    model.begin_task(1, task.train_images, task.train_labels)
    small = F.interpolate(pah.normalise(task.train_images), 10, mode="bilinear", antialias=True)
    for c in range(4):
        distance = (small - model.prototypes[1, c]).abs().amax((1, 2, 3))
        assert task.train_labels[distance < 1e-5].tolist() == [c]
    assert not model.prototypes[[0, 2, 3, 4]].any()


def test_prototypes_start_as_noise():
    task = split_tasks(load_dataset("synthetic"), 5)[1]
    model = PAH(ResNet18(4), 5, 4, proto_init="random")
    model.begin_task(1, task.train_images, task.train_labels)
    assert model.prototypes[1].mean().abs() < 0.1
    assert (model.prototypes[1].std() - 1).abs() < 0.1


class FixedSize(nn.Module):
    """A backbone for images of 12 pixels alone, like a vision transformer."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3 * 12 * 12, 7)

    def forward(self, images):
        return self.layer(images.flatten(1))


def test_a_backbone_of_one_size_says_what_to_do():
    with pytest.raises(UserError, match="fails on 3 x 10 x 10 values, .* proto_size"):
        PAH(FixedSize(), K, C)
    model = PAH(FixedSize(), K, C, proto_size=12)
    assert model(torch.randn(2, 3, 12, 12), K).shape == (2, K, C)


def test_a_backbone_that_returns_maps_is_refused():
    with pytest.raises(UserError, match=r"return \(batch, D\), not \(1, 4, 10, 10\)"):
        PAH(nn.Conv2d(3, 4, 3, padding=1), K, C)


def test_the_backbone_is_left_as_it_was_given():
    backbone = ResNet18(4)
    before = copy.deepcopy(backbone.state_dict())
    PAH(backbone, K, C)
    assert_same(backbone.state_dict(), before)
    assert backbone.training


def test_a_frozen_backbone_keeps_its_statistics():
    backbone = ResNet18(4).requires_grad_(False)
    before = copy.deepcopy(backbone.state_dict())
    model = PAH(backbone, 2, 2)
    pah.learn(model, [own_arrays(), own_arrays()], epochs=2, batch_size=6)
    assert_same(backbone.state_dict(), before)
    assert model.train().hypernetwork.training


def test_frozen_batch_norm_keeps_its_statistics_in_a_backbone_that_learns():
    backbone = ResNet18(4)
    backbone.layers[1].requires_grad_(False)
    before = backbone.layers[1].running_mean.clone()
    pah.learn(PAH(backbone, 1, 2), [own_arrays()], epochs=1)
    assert torch.equal(backbone.layers[1].running_mean, before)
    assert backbone.layers[3][0].bn1.running_mean.any()


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_backbone_that_cannot_be_copied_is_no_matter_of_prototype_sizes():
    backbone = nn.Sequential(nn.Flatten(), nn.utils.weight_norm(nn.Linear(300, 7)))
    with pytest.raises(UserError, match="the backbone cannot be copied.*deepcopy"):
        PAH(backbone, K, C)


class Tuples(nn.Module):
    """A backbone that returns more than features, as some libraries have them."""

    def forward(self, images):
        return images.flatten(1), None


def test_a_backbone_that_returns_a_tuple_is_refused():
    with pytest.raises(UserError, match="must return .batch, D., not .'tuple',"):
        PAH(Tuples(), K, C)


def test_a_start_of_prototypes_that_there_is_not_is_refused():
    with pytest.raises(UserError, match="semantic or random, not Semantic"):
        small_pah(proto_init="Semantic")


def test_bf16_is_for_the_backbone():
    model, _, images, _ = student_and_teacher(dtype=torch.bfloat16)
    seen = []
    model.backbone.layers[-1].register_forward_hook(lambda *args: seen.append(args[2].dtype))
    close = model(images, K)
    model.dtype = torch.float32
    torch.testing.assert_close(close, model(images, K), rtol=0.1, atol=0.05)
    assert seen == [torch.bfloat16, torch.float32]
    assert close.dtype == torch.float32


# -----------------------------------------------------------------------------
# Losses


def test_values_of_the_three_losses():
    model, teacher, images, labels = student_and_teacher(lam=0.7, mu=0.3)
    with torch.no_grad():
        features = copy.deepcopy(model).backbone(images)  # with batch statistics
        log_p = (features @ model.heads(4)[3].T).log_softmax(1)
        hm = -sum(log_p[b, labels[b]] for b in range(5)) / 5
        new, old = torch.einsum("bd,ncd->bnc", features, model.heads(3)), teacher(images, 3)
        sm = sum(softened_kl(new[:, i], old[:, i]).mean() for i in range(3))
    terms = model.losses(images, labels, 3, teacher)
    model.eval()  # L_sp sees the running statistics, after this batch
    p = [model.prototypes[i] for i in range(3)]
    sp = sum(softened_kl(model(p[i], 3)[:, i], teacher(p[i], 3)[:, i]).mean() for i in range(3))
    torch.testing.assert_close(terms["hm"], hm)
    torch.testing.assert_close(terms["sm"], 0.7 * sm)
    torch.testing.assert_close(terms["sp"], 0.3 * sp)
    assert min(sm, sp) > 0.01


def test_the_first_task_and_weights_of_zero_have_no_such_terms():
    model, teacher, images, labels = student_and_teacher(lam=0.0)
    assert set(model.losses(images, labels, 0, None)) == {"hm"}
    assert set(model.losses(images, labels, 3, teacher)) == {"hm", "sp"}
    model.lam, model.mu = 1.0, 0.0
    assert set(model.losses(images, labels, 3, teacher)) == {"hm", "sm"}


@pytest.mark.parametrize(
    "term, reached",
    [
        ("hm", {"backbone", "hypernetwork", "own"}),
        ("sm", {"backbone", "hypernetwork", "earlier"}),
        ("sp", {"earlier"}),
    ],
)
def test_what_each_loss_reaches(term, reached):
    """Tasks 0 and 1 are earlier, 2 is the own one, 3 is to come."""
    model, teacher, images, labels = student_and_teacher()
    model.losses(images, labels, 2, teacher)[term].backward()
    of_tasks = model.prototypes.grad.abs().amax((1, 2, 3, 4)).tolist()
    parts = {
        "backbone": max(p.grad.abs().max() for p in grads(model.backbone)),
        "hypernetwork": max(p.grad.abs().max() for p in grads(model.hypernetwork)),
        "earlier": min(of_tasks[:2]),
        "own": of_tasks[2],
        "to come": of_tasks[3],
    }
    assert {name for name, largest in parts.items() if largest > 1e-7} == reached


def grads(module):
    zero = nn.Parameter(torch.zeros(1))
    zero.grad = torch.zeros(1)
    return [p for p in module.parameters() if p.grad is not None] or [zero]


def test_l_sp_sends_no_gradient_through_the_teacher():
    """The prototypes are a constant for it."""
    model, teacher, *_ = student_and_teacher()
    pah.soft_loss_prototypes(model, teacher, 3).backward()
    constant = model.prototypes.detach()[:3]
    new = copy.deepcopy(model).eval()
    loss = softened_kl(new.prototype_logits(new.prototypes[:3]), teacher.prototype_logits(constant))
    (gradient,) = torch.autograd.grad(3 * loss.mean(), [new.prototypes])
    torch.testing.assert_close(model.prototypes.grad, gradient, rtol=1e-3, atol=1e-6)


def test_l_sp_leaves_running_statistics_and_modes_alone():
    model, teacher, *_ = student_and_teacher()
    model.backbone.layers[1].weight.requires_grad_(False)  # somebody froze it
    before = copy.deepcopy(dict(model.named_buffers()))
    pah.soft_loss_prototypes(model, teacher, 3)
    assert_same(dict(model.named_buffers()), before)
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
    assert frozen == ["backbone.layers.1.weight"]
    assert model.backbone.training


class Interrupting(nn.Module):
    """A layer that Ctrl-C strikes."""

    def forward(self, x):
        raise KeyboardInterrupt


@pytest.mark.parametrize("function", ["L_sp", "evaluate"])
def test_an_interrupt_leaves_weights_and_modes_as_they_were(function):
    model, teacher, *_ = student_and_teacher()
    model.backbone.layers[1].eval()
    modes = [module.training for module in model.modules()]
    model.backbone.layers.append(Interrupting())
    with pytest.raises(KeyboardInterrupt):
        if function == "L_sp":
            pah.soft_loss_prototypes(model, teacher, 3)
        else:
            pah.evaluate(model, [own_arrays(classes=C)])
    del model.backbone.layers[-1]
    assert [module.training for module in model.modules()] == modes
    assert all(p.requires_grad for p in model.parameters())


def test_losses_leave_the_teacher_alone():
    model, teacher, images, labels = student_and_teacher()
    before = copy.deepcopy(teacher.state_dict())
    sum(model.losses(images, labels, 3, teacher).values()).backward()
    assert_same(teacher.state_dict(), before)
    assert all(p.grad is None for p in teacher.parameters())


# -----------------------------------------------------------------------------
# A task with fewer classes than the largest


def with_two_classes_in_task_1():
    model, teacher, images, labels = student_and_teacher()
    for each in (model, teacher):
        each.present[1, 2] = False
    return model, teacher, images, labels


def test_an_absent_class_is_never_predicted():
    model, *_ = with_two_classes_in_task_1()
    logits = model.eval()(100 * torch.randn(50, 3, 16, 16), K)
    assert set(logits[:, 1].argmax(1).tolist()) <= {0, 1}


def test_l_sm_is_over_the_classes_that_a_task_has():
    model, teacher, images, _ = with_two_classes_in_task_1()
    model.eval()
    new, old = model(images, 3), teacher(images, 3)
    parts = [softened_kl(new[:, i], old[:, i]).mean() for i in (0, 2)]
    parts.append(softened_kl(new[:, 1, :2], old[:, 1, :2]).mean())
    torch.testing.assert_close(pah.soft_loss_main(new, teacher, images, T), sum(parts))


def test_l_sp_is_over_the_prototypes_that_a_task_has():
    model, teacher, *_ = with_two_classes_in_task_1()
    model.eval()
    new = model.prototype_logits(model.prototypes[:3])
    old = teacher.prototype_logits(model.prototypes[:3])
    parts = [softened_kl(new[i], old[i]).mean() for i in (0, 2)]
    parts.append(softened_kl(new[1, :2, :2], old[1, :2, :2]).mean())
    loss = pah.soft_loss_prototypes(model, teacher, 3)
    torch.testing.assert_close(loss, sum(parts))
    (gradient,) = torch.autograd.grad(loss, [model.prototypes])
    assert not gradient[3].any()


def test_tasks_of_different_sizes_are_learned():
    data = load_dataset("synthetic")
    tasks = split_tasks(data, [8, 2, 10])
    model = PAH(ResNet18(4), 3, 10)
    R = pah.learn(model, tasks, epochs=2)
    assert model.present.sum(1).tolist() == [8, 2, 10]
    assert R[-1][0] > 40  # of eight
    assert not model.prototypes[1, 2:].any()
    assert not model.training


# -----------------------------------------------------------------------------
# Metrics


def test_metrics_by_hand():
    R = [[90.0], [80.0, 70.0], [85.0, 60.0, 50.0]]
    assert pah.average_accuracy(R) == 65
    assert pah.forgetting(R) == ((90 - 85) + (70 - 60)) / 2


def test_forgetting_is_from_the_best_before_the_end():
    later_best = [[50.0], [80.0, 70.0], [60.0, 75.0, 50.0]]  # a gain counts against it
    assert pah.forgetting(later_best) == ((80 - 60) + (70 - 75)) / 2
    assert pah.forgetting([[42.0]]) == 0


def test_joint_training_has_nothing_to_forget():
    for R in ([[80.0, 90.0]], [[], [80.0, 90.0]]):
        assert pah.metrics(R) == {"AA": 85, "FM": None, "BWT": None, "LA": None}


class Lookup(nn.Module):
    """Gives the logits of a table (N, 2, 3), row after row."""

    def __init__(self, table):
        super().__init__()
        self.table = nn.Parameter(torch.tensor(table, dtype=torch.float32))
        self.at = 0

    def forward(self, images, n):
        self.at += len(images)
        return self.table[self.at - len(images) : self.at]


def test_evaluate_by_hand():
    """Two tasks of three classes; without the task told the largest of six logits decides."""
    model = Lookup(
        [
            [[3, 0, 0], [1, 0, 0]],  # of class 0: right, right without the task
            [[2, 0, 0], [0, 5, 0]],  # of class 0: right, wrong without the task
            [[0, 0, 0], [0, 0, 1]],  # of class 2: right, right without the task
            [[9, 0, 0], [0, 1, 0]],  # of class 2: wrong, wrong
            [[0, 2, 0], [0, 0, 1]],  # of class 2: right, wrong without the task
        ]
    )
    images = torch.zeros(5, 3, 4, 4, dtype=torch.uint8)
    tasks = [Task(None, None, images[:2], torch.tensor([0, 0]))]
    tasks.append(Task(None, None, images[2:], torch.tensor([2, 2, 2])))
    row, class_incremental = pah.evaluate(model, tasks)
    assert row == pytest.approx([100, 200 / 3])
    assert class_incremental == pytest.approx((50 + 100 / 3) / 2)


def test_evaluate_takes_any_number_of_images_batch_by_batch():
    model = small_pah()
    images = torch.randint(0, 256, (1100, 3, 8, 8), dtype=torch.uint8)
    sizes = []
    model.backbone.register_forward_hook(lambda _, inputs, __: sizes.append(len(inputs[0])))
    with torch.no_grad():
        guesses = model.eval()(pah.normalise(images), 1)[:, 0].argmax(1)
    labels = torch.where(torch.arange(1100) < 1034, guesses, (guesses + 1) % C)
    row, _ = pah.evaluate(model, [Task(None, None, images, labels)], batch_size=500)
    assert row == [94.0]
    assert sizes == [1100, 500, 500, 100]


def test_learn_tests_with_four_batches_at_once(monkeypatch):
    evaluate, sizes = pah.evaluate, []

    def recorded(model, tasks, batch_size):
        sizes.append(batch_size)
        return evaluate(model, tasks, batch_size)

    monkeypatch.setattr(pah, "evaluate", recorded)
    pah.learn(OwnMethod(1), [own_arrays()], epochs=1, batch_size=6)
    assert sizes == [24]


def test_evaluate_is_in_eval_mode_and_changes_nothing():
    model, _, _, _ = student_and_teacher()
    before = copy.deepcopy(model.state_dict())
    images = torch.randint(0, 256, (9, 3, 16, 16), dtype=torch.uint8)
    one = pah.evaluate(model, [Task(None, None, images, torch.arange(9) % 3)])
    assert one == pah.evaluate(model.eval(), [Task(None, None, images, torch.arange(9) % 3)])
    assert not model.training
    assert_same(model.state_dict(), before)


# -----------------------------------------------------------------------------
# Backbone


def test_a_shortcut_averages_every_pixel():
    pool = pah.BasicBlock(4, 8, stride=2).shortcut[0]
    x = torch.randn(2, 4, 5, 5)
    expected = [x[:, :, i : i + 2, j : j + 2].mean((2, 3)) for i in (0, 2, 4) for j in (0, 2, 4)]
    torch.testing.assert_close(pool(x).flatten(2), torch.stack(expected, -1))


def test_shapes_of_the_backbone():
    net = ResNet18(4)
    assert net(torch.randn(2, 3, 32, 32)).shape == (2, 32)
    maps = net.layers[:-1](torch.randn(2, 3, 32, 32))
    assert maps.shape == (2, 16, 8, 8)


def test_large_images_have_torchvisions_network(monkeypatch):
    from torchvision.models import resnet18

    args = pah.parse_args([*RUN, "--stem", "7x7"])
    ours, theirs = pah.make_backbone(args).eval(), resnet18().eval()
    theirs.load_state_dict(ours.state_dict(), strict=False)
    theirs.fc = nn.Identity()
    x = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-5)


def test_pretrained_weights_without_a_network(monkeypatch):
    def offline(weights):
        raise OSError("Name or service not known")

    monkeypatch.setattr("torchvision.models.resnet18", offline)
    with pytest.raises(UserError, match="cannot load ImageNet weights: .*Name or service"):
        pah.make_backbone(pah.parse_args([*RUN, "--pretrained"]))


def test_pretrained_weights_are_torchvisions_and_loaded_once(tmp_path, monkeypatch):
    from torchvision.models import resnet18

    asked = []

    def offline(weights):
        asked.append(weights)
        return resnet18()

    monkeypatch.setattr("torchvision.models.resnet18", offline)
    flags = ["--pretrained", "--width", 64, "--image-size", 16, "--precision", "fp32"]
    run_main(*TINY, *flags, "--stop-after", 1, "--batch-size", 400, "--out", tmp_path)
    assert results(tmp_path)["args"]["stem"] == "7x7"
    load_checkpoint(tmp_path / "seed0/checkpoint.pt")
    assert asked == ["DEFAULT", None]


# -----------------------------------------------------------------------------
# Optimizers


@pytest.mark.parametrize("rows, columns", [(16, 40), (40, 16), (8, 8)])
def test_orthogonalised(rows, columns):
    torch.manual_seed(0)
    u, _, vt = torch.linalg.svd(torch.randn(rows, columns), full_matrices=False)
    singular = torch.logspace(0, -1, min(rows, columns))
    product = u.mT @ pah.orthogonalised(u @ singular.diag() @ vt) @ vt.mT
    assert product.diagonal().min() > 0.4
    assert product.diagonal().max() < 1.3
    assert (product - product.diagonal().diag()).abs().max() < 1e-4


def test_muon_moves_each_filter_in_its_turn():
    """At its turn a filter moves as far along its Nesterov momentum as all turns would take it."""
    torch.manual_seed(0)
    turns = pah.Muon.turns
    filters = [nn.Parameter(torch.randn(6, 2, 3, 3)) for _ in range(turns + 2)]
    expected = [p.detach().clone().flatten(1) for p in filters]
    momenta = [torch.zeros(6, 18) for _ in filters]
    muon = pah.Muon(filters, lr=0.02, weight_decay=0.1)
    for step in range(turns + 1):
        for i, p in enumerate(filters):
            p.grad = torch.randn_like(p)
            momenta[i] = 0.95 * momenta[i] + 0.05 * p.grad.flatten(1)
            if i % turns == step % turns:
                nesterov = 0.05 * p.grad.flatten(1) + 0.95 * momenta[i]
                expected[i] *= 1 - turns * 0.02 * 0.1
                expected[i] -= turns * 0.02 * pah.orthogonalised(nesterov)
        muon.step()
        for p, like in zip(filters, expected, strict=True):
            torch.testing.assert_close(p.detach().flatten(1), like, rtol=1e-4, atol=1e-5)


def test_muon_steps_of_tall_filters_are_longer():
    p = nn.Parameter(torch.zeros(36, 2, 3, 3))
    p.grad = torch.randn_like(p)
    pah.Muon([p], lr=1.0, weight_decay=0).step()
    update = pah.orthogonalised(p.grad.flatten(1))
    expected = -pah.Muon.turns * 2**0.5 * update
    torch.testing.assert_close(p.detach().flatten(1), expected, rtol=1e-3, atol=1e-3)


def test_every_parameter_has_its_optimizer():
    model = small_pah()
    model.stored = nn.Linear(2, 2)  # of another method
    adamw, muon = pah.make_optimizers(model, 0.02, 1.0, 2.0, 0.1)
    rates = {p: (g["lr"], g["weight_decay"]) for g in adamw.param_groups for p in g["params"]}
    rates |= dict.fromkeys(muon.param_groups[0]["params"], "muon")
    assert len(rates) == len(list(model.parameters()))
    assert rates[model.backbone.layers[0].weight] == "muon"
    assert rates[model.backbone.layers[1].weight] == (0.002, 0)
    assert rates[model.hypernetwork.layers[0].bias] == (1.0, 0.1)
    assert rates[model.prototypes] == (2.0, 0)
    assert rates[model.stored.weight] == (0.002, 0.1)


def test_a_token_of_a_transformer_is_no_filter():
    model = small_pah()
    model.backbone.token = nn.Parameter(torch.zeros(1, 1, 16))
    _, muon = pah.make_optimizers(model, 0.02, 1.0, 2.0, 0.1)
    filters = muon.param_groups[0]["params"]
    assert model.backbone.layers[0].weight in set(filters)
    assert model.backbone.token not in set(filters)


# -----------------------------------------------------------------------------
# Training


def test_augmentation_is_every_crop_and_its_mirror_image():
    images = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8).repeat(300, 1, 1, 1)
    torch.manual_seed(0)
    out = pah.augment(images)
    padded = F.pad(images.float(), (2, 2, 2, 2), mode="reflect").byte()
    seen = set()
    for i, image in enumerate(out):
        for row, column in itertools.product(range(5), repeat=2):
            crop = padded[i, :, row : row + 16, column : column + 16]
            for mirrored, candidate in enumerate((crop, crop.flip(-1))):
                if torch.equal(image, candidate):
                    seen.add((i, row, column, mirrored))
    assert {i for i, *_ in seen} == set(range(600))
    assert len({tuple(place) for _, *place in seen}) == 50


def test_augmentation_without_mirror_images():
    images = torch.arange(16, dtype=torch.uint8).expand(50, 3, 16, 16)
    right = pah.augment(images, flip=False)[:, 0, 0].long().diff()[:, 2:-2]
    assert right.eq(1).all()


def test_pah_beats_finetuning(learned, tmp_path):
    run_main(*RUN, "--width", 8, "--epochs", 3, "--lam", 0, "--mu", 0, "--out", tmp_path)
    pah_, finetuned = results(learned), results(tmp_path)
    assert pah_["AA"] > 70  # of four classes
    assert pah_["AA"] > finetuned["AA"] + 15
    assert pah_["FM"] < finetuned["FM"] / 2


class Destroying(PAH):
    """Overwrites the training data of a task that was learned."""

    def end_task(self, task, images, labels):
        images.zero_()
        labels.zero_()


def test_earlier_data_is_never_read_again():
    weights = []
    for kind in (PAH, Destroying):
        torch.manual_seed(0)
        tasks = split_tasks(load_dataset("synthetic"), 5)[:3]
        model = kind(ResNet18(4), 3, 4)
        pah.learn(model, tasks, epochs=1)
        weights.append(model.state_dict())
    assert not tasks[0].train_images.any()
    assert_same(*weights)


def test_the_seed_decides_and_nothing_else(tmp_path):
    run_main(*TINY, "--stop-after", 2, "--seeds", 0, 1, "--out", tmp_path / "a")
    run_main(*TINY, "--stop-after", 2, "--seeds", 0, "--out", tmp_path / "b")
    assert_same(weights(tmp_path / "a"), weights(tmp_path / "b"))
    first, second = weights(tmp_path / "a"), weights(tmp_path / "a", seed=1)
    assert not torch.equal(first["backbone.layers.0.weight"], second["backbone.layers.0.weight"])


def test_a_frozen_backbone_trains_in_half_precision():
    model = PAH(ResNet18(4).requires_grad_(False), 1, 2, dtype=torch.float16)
    assert len(pah.learn(model, [own_arrays()], epochs=1, augmentation=None)) == 1


class OwnMethod(nn.Module):
    """Somebody's own method: no backbone, no PAH, one linear head for each task."""

    def __init__(self, tasks):
        super().__init__()
        self.heads = nn.ModuleList(nn.Linear(3 * 8 * 8, 2) for _ in range(tasks))
        self.calls = []

    def begin_task(self, task, images, labels):
        self.calls.append(("begin", task, len(images)))

    def losses(self, images, labels, task, teacher):
        self.calls.append(("losses", task, teacher is not None))
        return {"own": F.cross_entropy(self(images, task + 1)[:, task], labels)}

    def forward(self, images, n):
        return torch.stack([head(images.flatten(1)) for head in self.heads[:n]], 1)

    def after_step(self, task, images, labels):
        self.calls.append(("step", task, images.dtype, len(labels)))

    def end_task(self, task, images, labels):
        self.calls.append(("end", task, len(labels)))


def test_after_step_gets_images_before_augmentation(monkeypatch):
    task, seen = own_arrays(), []
    monkeypatch.setattr(
        OwnMethod, "after_step", lambda self, k, images, labels: seen.append(images)
    )
    pah.learn(OwnMethod(1), [task], epochs=1, batch_size=12, augmentation=lambda x: 255 - x)
    assert len(seen) == 1
    images = torch.as_tensor(task.train_images)
    assert sorted(seen[0].flatten(1).tolist()) == sorted(images.flatten(1).tolist())


def test_the_protocol_takes_any_method():
    model = OwnMethod(2)
    R = pah.learn(model, [own_arrays(), own_arrays()], epochs=2, batch_size=12, augmentation=None)
    one = [("losses", 0, False), ("step", 0, torch.uint8, 12)]
    two = [("losses", 1, True), ("step", 1, torch.uint8, 12)]
    first = [("begin", 0, 12), *one, *one, ("end", 0, 12)]
    assert model.calls == [*first, ("begin", 1, 12), *two, *two, ("end", 1, 12)]
    assert [len(row) for row in R] == [1, 2]


def test_the_protocol_takes_numpy_arrays_and_any_integer_labels():
    task = own_arrays()
    arrays = Task(*[value.numpy() for value in task[:4]])
    arrays = arrays._replace(train_labels=arrays.train_labels.astype(np.int32))
    R = []
    for each in (task, arrays):
        torch.manual_seed(0)
        R.append(pah.learn(PAH(ResNet18(4), 1, 2), [each], epochs=1))
    assert R[0] == R[1]


def test_training_images_are_augmented_before_they_are_normalised():
    seen = []

    def black(images):
        seen.append((images.dtype, len(images)))
        return images * 0

    task = own_arrays()._replace(test_images=torch.zeros(12, 3, 8, 8, dtype=torch.uint8))
    pah.learn(OwnMethod(1), [task], epochs=2, batch_size=6, augmentation=black)
    assert seen == [(torch.uint8, 6)] * 4


def test_learn_goes_on_behind_given_rows():
    tasks = split_tasks(load_dataset("synthetic"), 5)
    model = PAH(ResNet18(4), 5, 4)
    R = pah.learn(model, tasks[:1], epochs=1)
    R = pah.learn(model, tasks[:2], epochs=1, R=R)
    torch.manual_seed(0)
    assert [len(row) for row in R] == [1, 2]
    assert model.present.any(1).tolist() == [True, True, False, False, False]


def floats(task):
    return task._replace(test_images=task.test_images / 255)


def of_numpy_floats(task):
    return task._replace(train_images=task.train_images.numpy() / 255)


def channels_last(task):
    return task._replace(train_images=task.train_images.permute(0, 2, 3, 1))


def no_squares(task):
    return task._replace(test_images=task.test_images[:, :, :5])


def larger_test_images(task):
    return task._replace(test_images=task.test_images.repeat(1, 1, 2, 2))


def no_arrays(task):
    return task._replace(test_labels=["cat", "dog"] * 6)


def no_test_images(task):
    return task._replace(test_images=task.test_images[:0], test_labels=task.test_labels[:0])


def too_many_labels(task):
    return task._replace(train_labels=torch.arange(20) % 2)


def float_labels(task):
    return task._replace(train_labels=task.train_labels / 1)


def labels_of_the_data_set(task):
    return task._replace(train_labels=task.train_labels + 2, test_labels=task.test_labels + 2)


def wrong_test_labels(task):
    return task._replace(test_labels=task.test_labels + 2)


def negative_labels(task):
    return task._replace(train_labels=task.train_labels - 1)


def untrained_class(task):
    return task._replace(train_labels=task.train_labels * 0)


@pytest.mark.parametrize(
    "spoil, message",
    [
        (floats, r"the test images of task 2 must be uint8 .*, not torch.float32"),
        (of_numpy_floats, r"the training images of task 2 must be uint8 .*, not torch.float64"),
        (channels_last, r"training images of task 2 .* \(N > 0, 3, S, S\), .* \(12, 8, 8, 3\)"),
        (no_squares, r"test images of task 2 .* \(N > 0, 3, S, S\), .* \(12, 3, 5, 8\)"),
        (no_test_images, r"test images of task 2 .* \(N > 0, .* of shape \(0, 3, 8, 8\)"),
        (no_arrays, r"the test images and labels of task 2 must be arrays"),
        (too_many_labels, r"training labels of task 2 must be 12 integers, .* shape \(20,\)"),
        (float_labels, r"training labels of task 2 must be 12 integers, .* not torch.float32"),
        (labels_of_the_data_set, r"training labels of task 2 must be 0 to 1, not 2 to 3"),
        (wrong_test_labels, r"test labels of task 2 must be 0 to 1, not 2 to 3"),
        (negative_labels, r"training labels of task 2 must be 0 to 1, not -1 to 0"),
        (untrained_class, "task 2 has test images but no training images of classes {1}"),
        (larger_test_images, "training and test images of task 2 differ in size"),
    ],
)
def test_arrays_that_cannot_be_right_are_told_before_the_first_step(spoil, message):
    model = PAH(ResNet18(4), 2, 2)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(UserError, match=message):
        pah.learn(model, [own_arrays(), spoil(own_arrays())], epochs=1)
    assert_same(model.state_dict(), before)


def test_more_tasks_than_the_model_has_are_told_before_the_first_step():
    model = PAH(ResNet18(4), 2, 2)
    with pytest.raises(UserError, match="3 tasks, but the model was made for 2"):
        pah.learn(model, [own_arrays()] * 3, epochs=1)
    assert not model.present.any()


def test_a_model_that_learns_again_is_noticed(capsys):
    """A cell of a notebook that is run again starts from what the model had learned."""
    model, tasks = PAH(ResNet18(4), 2, 2), [own_arrays(), own_arrays()]
    R = pah.learn(model, tasks[:1], epochs=1)
    pah.learn(model, tasks, epochs=1, R=R)
    assert capsys.readouterr().err == ""
    pah.learn(model, tasks, epochs=1)
    assert "this model was trained before" in capsys.readouterr().err


def test_gradients_of_an_interrupted_step_are_not_added_to_the_next():
    states = []
    for left_over in (None, 100.0):
        torch.manual_seed(0)
        model = PAH(ResNet18(4), 1, 2)
        for p in model.parameters():
            p.grad = None if left_over is None else torch.full_like(p, left_over)
        pah.learn(model, [own_arrays()], epochs=1)
        states.append(model.state_dict())
    assert_same(*states)


@pytest.mark.parametrize("labels", [torch.zeros(12, 1).long(), torch.zeros(1).long()])
def test_evaluate_refuses_labels_that_are_not_one_per_image(labels):
    with pytest.raises(UserError, match=r"the test labels of task 1 must be 12 integers"):
        pah.evaluate(small_pah(), [own_arrays()._replace(test_labels=labels)])


def test_evaluate_refuses_labels_that_the_model_does_not_have():
    task = own_arrays(classes=C)
    with pytest.raises(UserError, match="the test labels of task 1 must be 0 to 2, not 3 to 5"):
        pah.evaluate(small_pah(), [task._replace(test_labels=task.test_labels + 3)])


class Clock:
    """A clock that somebody puts forward by ten seconds a step."""

    def __init__(self):
        self.now = 0.0

    def perf_counter(self):
        return self.now


@pytest.mark.parametrize("terminal, expected", [(True, 12), (False, 3)])
def test_there_is_progress_to_see_by_time(terminal, expected, capsys, monkeypatch):
    """At every step of ten seconds on a terminal, and after more than half a minute in a log."""

    class Slow(OwnMethod):
        def losses(self, *batch):
            clock.now += 10
            return super().losses(*batch)

    clock = Clock()
    monkeypatch.setattr(pah, "time", clock)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
    pah.learn(Slow(1), [own_arrays()], epochs=4, batch_size=4)
    out = capsys.readouterr().out
    lines = out.split("\r" if terminal else "\n")[:-1]
    assert len(lines) == expected
    assert all(re.match(r"task 1/1 epoch [1-4]/4  own \d\.\d", line) for line in lines)


def test_the_progress_line_fits_a_terminal(capsys):
    terms = {"hm": torch.tensor(0.5), "a_long_name": torch.tensor(12.25)}
    pah.print_progress("task 10/10 epoch 30/30 and more", terms, 50, 100, seconds=3600.0)
    line = capsys.readouterr().out
    assert line.startswith("task 10/10 epoch 30/30 and more  hm 0.500 a_long_name 12.250")
    assert len(line) == 80


def test_the_line_of_a_task_fits_a_terminal(tmp_path, capsys):
    """The tenth of ten tasks that took an hour each."""
    run_main(*TINY, "--tasks", 10, "--stop-after", 1, "--out", tmp_path)
    path = tmp_path / "seed0/checkpoint.pt"
    saved = torch.load(path, weights_only=True)
    saved["results"] |= {"accuracy": [[100.0] * (k + 1) for k in range(9)], "seconds": 35_990.0}
    torch.save(saved, path)
    run_main(*TINY, "--tasks", 10, "--out", tmp_path, "--resume")
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2].startswith("task 10/10")
    assert max(len(line) for line in lines if line.startswith("task")) <= 80


def test_compile_makes_no_graph_after_the_second_task(monkeypatch):
    """With a backend that needs no C++ compiler."""
    from torch._dynamo.utils import counters

    compile_module, graphs = nn.Module.compile, []

    def compile_eagerly(self):
        compile_module(self, backend="eager")

    def count(*_):
        graphs.append(counters["stats"]["unique_graphs"])

    monkeypatch.setattr(nn.Module, "compile", compile_eagerly)
    torch._dynamo.reset()
    counters.clear()
    tasks = split_tasks(load_dataset("synthetic"), 5)[:3]
    pah.learn(PAH(ResNet18(4), 3, 4), tasks, epochs=1, compile=True, after_task=count)
    assert 0 < graphs[0] < graphs[1] == graphs[2]  # the teacher's join in the second task


def test_nan_stops_the_run_before_it_is_saved(tmp_path, monkeypatch):
    """The last step of task 2 breaks a filter, after its loss was computed."""
    step, calls = pah.Muon.step, []

    def breaking(self, *args):
        step(self, *args)
        calls.append(1)
        if len(calls) == 32:  # 16 steps per task
            self.param_groups[0]["params"][0].data[0] = float("nan")

    monkeypatch.setattr(pah.Muon, "step", breaking)
    with pytest.raises(UserError, match="NaN weights in task 2/5 epoch 1/1: lower --lr"):
        run_main(*TINY, "--out", tmp_path)
    assert len(results(tmp_path)["accuracy"]) == 1
    assert all(value.isfinite().all() for value in weights(tmp_path).values())


# -----------------------------------------------------------------------------
# Several processes


TWO_PROCESSES = """
import sys, torch, pah
out, *flags = sys.argv[1:]
tasks = pah.split_tasks(pah.load_dataset("synthetic"), 5)[:2]
torch.manual_seed(pah.RANK)  # somebody's own script: each process makes other weights
model = pah.PAH(pah.ResNet18(4), 2, 4)
try:
    pah.learn(model, tasks)
except pah.UserError as error:
    print(error)
pah.set_up("cpu")
pah.learn(model, tasks, epochs=1)
torch.save(model.state_dict(), f"{out}/{pah.RANK}.pt")
pah.main([*flags, "--out", out + "/whole"])
pah.main([*flags, "--out", out + "/cut", "--stop-after", "1"])
pah.main([*flags, "--out", out + "/cut", "--resume"])
torch.nn.BatchNorm2d = lambda channels: torch.nn.GroupNorm(1, channels)
pah.main([*flags, "--out", out + "/without-batchnorm", "--lr", "0.002"])
"""


def torchrun(script, *args, check=True):
    """Two processes of a script; the end of both."""
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [sys.executable, *launch, script, *map(str, args)]
    env = os.environ | {"PYTHONPATH": str(HERE), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0 or not check, done.stderr
    return done


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """The folder of runs of two processes under torchrun, and what they printed."""
    out = tmp_path_factory.mktemp("two")
    (out / "script.py").write_text(TWO_PROCESSES)
    return out, torchrun(out / "script.py", out, *TINY, "--stop-after", "2").stdout


def test_without_a_process_group_learn_names_what_makes_one(two_processes):
    message = "2 processes without a process group: call pah.set_up(device) first"
    assert two_processes[1].count(message) == 2


def test_processes_of_an_own_script_end_with_the_same_weights(two_processes):
    first, second = (
        torch.load(two_processes[0] / f"{rank}.pt", weights_only=True) for rank in (0, 1)
    )
    assert_same(first, second)


def test_one_of_several_processes_prints(two_processes):
    assert two_processes[1].count("task  1/2") == 2  # of all but cut
    assert results(two_processes[0] / "whole")["processes"] == 2


def test_two_processes_resume_to_the_same_run(two_processes):
    out, _ = two_processes
    assert_same(weights(out / "cut"), weights(out / "whole"))


def test_two_processes_are_the_run_of_one(two_processes, tmp_path, monkeypatch):
    """Without BatchNorm, whose statistics are each process's own on a CPU."""
    monkeypatch.setattr(nn, "BatchNorm2d", lambda channels: nn.GroupNorm(1, channels))
    run_main(*TINY, "--stop-after", 2, "--lr", 0.002, "--out", tmp_path)
    one, two = weights(tmp_path), weights(two_processes[0] / "without-batchnorm")
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=0.01, atol=0.005, msg=name)


def test_a_batch_has_an_image_for_each_process(tmp_path):
    done = torchrun(HERE / "pah.py", *TINY, "--batch-size", 1, "--out", tmp_path, check=False)
    assert "pah.py: --batch-size must be at least 2" in done.stderr


# -----------------------------------------------------------------------------
# Tasks


def numbered_data(classes=6, per_class=10):
    """The first pixel of an image is its class, the second its number; test images have + 100."""
    labels = torch.arange(classes).repeat_interleave(per_class)[torch.randperm(classes * per_class)]
    images = torch.zeros(len(labels), 3, 8, 8, dtype=torch.uint8)
    images[:, 0, 0, 0] = labels.byte()
    images[:, 0, 0, 1] = torch.arange(len(labels)).byte()
    return Task(images, labels, images + 100, labels.clone(), [f"c{i}" for i in range(classes)])


def classes_of(tasks):
    return [task.classes for task in tasks]


def test_split_tasks_by_label():
    tasks = split_tasks(numbered_data(), 3)
    assert classes_of(tasks) == [["c0", "c1"], ["c2", "c3"], ["c4", "c5"]]
    for k, task in enumerate(tasks):
        assert torch.equal(task.train_images[:, 0, 0, 0].long(), task.train_labels + 2 * k)
        assert torch.equal(task.test_images[:, 0, 0, 0].long() - 100, task.test_labels + 2 * k)
        assert len(task.train_labels) == len(task.test_labels) == 20


def test_split_tasks_in_an_order():
    tasks = split_tasks(numbered_data(), 3, order=[5, 0, 1, 4, 3, 2])
    assert classes_of(tasks) == [["c5", "c0"], ["c1", "c4"], ["c3", "c2"]]
    assert tasks[0].train_images[tasks[0].train_labels == 0, 0, 0, 0].eq(5).all()
    assert tasks[2].test_images[tasks[2].test_labels == 1, 0, 0, 0].eq(102).all()


@pytest.mark.parametrize(
    "tasks, sizes", [(2, [4, 3]), (3, [3, 2, 2]), ([3, 4], [3, 4]), ([2, 3, 2], [2, 3, 2])]
)
def test_split_tasks_of_different_sizes(tasks, sizes):
    split = split_tasks(numbered_data(classes=7), tasks)
    assert [len(task.classes) for task in split] == sizes


@pytest.mark.parametrize("tasks", [0, 4, 6, 7, [2, 2], [3, 4], [5, 1]])
def test_tasks_that_cannot_be_made(tasks):
    with pytest.raises(UserError, match="--tasks .*: 6 classes cannot be split this way"):
        split_tasks(numbered_data(), tasks)


@pytest.mark.parametrize(
    "order, wrong",
    [
        ([0, 1, 2, 3, 4], "must list c5 once, not 0 times"),
        ([0, 1, 2, 3, 4, 4], "must list c4 once, not 2 times"),
        ([1, 2, 3, 4, 5, 6], "must list c0 once, not 0 times"),
        ([0, 1, 2, 3, 4, 5, 6], "lists 7 classes, but there are 6"),
    ],
)
def test_an_order_must_name_each_class_once(order, wrong):
    with pytest.raises(UserError, match=f"the class order {wrong}"):
        split_tasks(numbered_data(), 3, order)


def test_labels_that_do_not_number_the_classes_are_refused():
    data = numbered_data()
    shifted = data._replace(train_labels=data.train_labels + 1, test_labels=data.test_labels + 1)
    with pytest.raises(
        UserError, match=r"6 classes need labels from 0 to 5, .* see labels \[0, 6\]"
    ):
        split_tasks(shifted, 3)
    with pytest.raises(UserError, match=r"7 classes need labels from 0 to 6, .* see labels \[0\]"):
        split_tasks(shifted._replace(classes=[]), 3)
    with pytest.raises(UserError, match="test labels must be 0 to inf, not -1 to 4"):
        split_tasks(data._replace(test_labels=data.test_labels - 1), 3)
    rows = data.train_labels != 2
    fewer = data._replace(
        train_images=data.train_images[rows], train_labels=data.train_labels[rows]
    )
    with pytest.raises(UserError, match=r"training images: see labels \[2\]"):
        split_tasks(fewer, 3)
    with pytest.raises(UserError, match="training labels must be 60 integers, .* shape .50,"):
        split_tasks(data._replace(train_labels=data.train_labels[:50]), 3)
    with pytest.raises(UserError, match="training labels must be 60 integers, .* shape .60, 1"):
        split_tasks(data._replace(train_labels=data.train_labels[:, None]), 3)
    beyond = data._replace(test_labels=data.test_labels + 1)
    with pytest.raises(UserError, match=r"see labels \[6\]"):
        split_tasks(beyond, 3)


def test_classes_without_names_are_counted():
    data = numbered_data()._replace(classes=[])
    assert classes_of(split_tasks(data, 2)) == [["0", "1", "2"], ["3", "4", "5"]]
    held_out = pah.hold_out(data, 0.2)
    assert torch.bincount(held_out.test_labels).tolist() == [2] * 6


def test_split_tasks_takes_arrays_of_numpy():
    data = numbered_data()
    arrays = Task(*[value.numpy() for value in data[:4]], data.classes)
    assert torch.equal(pah.hold_out(arrays, 0.2).test_images, pah.hold_out(data, 0.2).test_images)
    for task, like in zip(split_tasks(arrays, 3), split_tasks(data, 3), strict=True):
        assert torch.equal(task.train_images, like.train_images)
        assert torch.equal(task.test_labels, like.test_labels)


def test_validation_images_are_training_images_held_out():
    data = pah.hold_out(numbered_data(), 0.2)
    train = set(data.train_images[:, 0, 0, 1].tolist())
    held_out = set(data.test_images[:, 0, 0, 1].tolist())
    assert torch.bincount(data.test_labels).tolist() == [2] * 6
    assert train | held_out == set(range(60))
    assert not train & held_out


@pytest.mark.parametrize("fraction, held_out", [(0.1, 20), (0.25, 50), (0.5, 100), (0.9, 180)])
def test_part_of_each_class_is_held_out(fraction, held_out):
    data = pah.hold_out(load_dataset("synthetic"), fraction)
    assert torch.bincount(data.test_labels).tolist() == [held_out] * 20


def test_the_validation_split_is_the_same_for_two_seeds():
    args = pah.parse_args([*RUN, "--val-fraction", "0.1"])
    torch.manual_seed(5)
    first = pah.load_tasks(args, seed=0)
    torch.manual_seed(6)
    second = pah.load_tasks(args, seed=1)
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a.test_images, b.test_images)


def test_classes_are_shuffled_by_the_seed():
    args = pah.parse_args([*RUN, "--shuffle-classes"])
    orders = [classes_of(pah.load_tasks(args, seed)) for seed in (1, 1, 2)]
    assert orders[0] == orders[1]
    assert orders[0] != orders[2]
    assert orders[0] != classes_of(split_tasks(load_dataset("synthetic"), 5))


@pytest.mark.parametrize("line", ["pattern {}", "{}"])
def test_an_order_of_classes_from_a_file(line, tmp_path):
    (tmp_path / "order").write_text("".join(line.format(c) + " \n\n" for c in reversed(range(20))))
    args = pah.parse_args([*RUN, "--class-order", str(tmp_path / "order")])
    assert pah.load_tasks(args, seed=0)[0].classes == [f"pattern {c}" for c in (19, 18, 17, 16)]


@pytest.mark.parametrize(
    "content, message",
    [
        (None, "cannot read --class-order .*No such file"),
        ("folder", "cannot read --class-order .*directory"),
        ("caf\xe9".encode("latin-1"), "cannot read --class-order .*utf-8"),
        (b"# my order\n0\n1\n", "there is no class # my order"),
        (b"0\n1\n1\n", "the class order must list pattern 1 once, not 2 times"),
        (b"\n".join(b"%d" % c for c in range(19)), "must list pattern 19 once, not 0 times"),
    ],
)
def test_a_class_order_that_cannot_be_used_says_why(content, message, tmp_path):
    path = tmp_path / "order"
    if content == "folder":
        path.mkdir()
    elif content is not None:
        path.write_bytes(content)
    args = pah.parse_args([*RUN, "--class-order", str(path)])
    with pytest.raises(UserError, match=message) as error:
        pah.load_tasks(args, seed=0)
    assert "\n" not in str(error.value)


def test_a_class_order_may_begin_with_a_byte_order_mark(tmp_path):
    (tmp_path / "order").write_text("".join(f"{c}\n" for c in range(20)), encoding="utf-8-sig")
    args = pah.parse_args([*RUN, "--class-order", str(tmp_path / "order")])
    assert pah.load_tasks(args, seed=0)[0].classes[0] == "pattern 0"


# -----------------------------------------------------------------------------
# Data sets


@pytest.fixture
def fake_cifar100(tmp_path, monkeypatch):
    """The published layout: three pickles whose MD5 sums torchvision checks."""
    from torchvision.datasets import CIFAR100

    folder = tmp_path / "data/cifar-100-python"
    folder.mkdir(parents=True)
    rng, files = np.random.default_rng(0), {}
    for split, per_class in (("train", 2), ("test", 1)):
        labels = list(range(100)) * per_class
        pixels = rng.integers(0, 256, (len(labels), 3072), dtype=np.uint8)
        files[split] = {"data": pixels, "fine_labels": labels}
    files["meta"] = {"fine_label_names": [f"name{i}" for i in range(100)]}
    md5 = {}
    for name, value in files.items():
        (folder / name).write_bytes(pickle.dumps(value))
        md5[name] = hashlib.md5((folder / name).read_bytes()).hexdigest()
    monkeypatch.setattr(CIFAR100, "train_list", [["train", md5["train"]]])
    monkeypatch.setattr(CIFAR100, "test_list", [["test", md5["test"]]])
    monkeypatch.setattr(CIFAR100, "meta", CIFAR100.meta | {"md5": md5["meta"]})
    return files


def test_cifar100(fake_cifar100, tmp_path):
    data = load_dataset("cifar100", tmp_path / "data")
    pixels = fake_cifar100["train"]["data"].reshape(-1, 3, 32, 32)
    assert np.array_equal(data.train_images.numpy(), pixels)
    assert data.train_labels.tolist() == fake_cifar100["train"]["fine_labels"]
    assert data.test_images.shape == (100, 3, 32, 32)
    assert data.classes[7] == "name7"


def test_cifar100_in_another_size(fake_cifar100, tmp_path):
    data = load_dataset("cifar100", tmp_path / "data", 16)
    assert data.test_images.shape == (100, 3, 16, 16)
    whole = load_dataset("cifar100", tmp_path / "data").test_images.float().mean()
    assert abs(data.test_images.float().mean() - whole) < 0.5


def test_a_published_data_set_is_read_once(fake_cifar100, tmp_path):
    data = load_dataset("cifar100", tmp_path / "data")
    (tmp_path / "data/cifar-100-python/train").unlink()
    again = load_dataset("cifar100", tmp_path / "data")
    assert torch.equal(again.train_images, data.train_images)
    assert again.classes == data.classes


def test_a_cache_that_cannot_be_written_is_done_without(
    fake_cifar100, tmp_path, capsys, monkeypatch
):
    def full(value, path):
        path.write_bytes(b"half")
        raise RuntimeError("unexpected pos: the disk is full")

    monkeypatch.setattr(torch, "save", full)
    assert len(load_dataset("cifar100", tmp_path / "data").train_images) == 200
    assert "continuing without a cache" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["cifar-100-python"]


@pytest.mark.parametrize("content", [b"", b"half"])
def test_a_damaged_cache_is_named(content, fake_cifar100, tmp_path):
    load_dataset("cifar100", tmp_path / "data")
    cache = tmp_path / "data/pah-cifar100-32px.pt"
    cache.write_bytes(content and cache.read_bytes()[:5000])
    with pytest.raises(UserError, match=f"cannot read {cache}; if it is damaged") as error:
        load_dataset("cifar100", tmp_path / "data")
    assert "\n" not in str(error.value)


def test_damaged_files_are_named(fake_cifar100, tmp_path):
    (tmp_path / "data/cifar-100-python/train").write_bytes(b"?")
    with pytest.raises(UserError, match="cannot read cifar100"):
        load_dataset("cifar100", tmp_path / "data")


def test_a_folder_of_a_published_name_is_that_folder(folder, fake_cifar100, tmp_path, monkeypatch):
    folder.rename(tmp_path / "cifar100")
    monkeypatch.chdir(tmp_path)
    assert len(load_dataset("./cifar100").train_images) == 4
    assert len(load_dataset("cifar100").train_images) == 200


@pytest.mark.parametrize("name", ["mnist", "fashionmnist"])
def test_grey_images(name, tmp_path):
    raw = tmp_path / pah.PUBLISHED[name][1] / "raw"
    raw.mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 256, (20, 28, 28), dtype=np.uint8)
    for split, n in (("train", 20), ("t10k", 10)):
        images = struct.pack(">4i", 2051, n, 28, 28) + pixels[:n].tobytes()
        labels = struct.pack(">2i", 2049, n) + bytes(i % 10 for i in range(n))
        (raw / f"{split}-images-idx3-ubyte").write_bytes(images)
        (raw / f"{split}-labels-idx1-ubyte").write_bytes(labels)
    data = load_dataset(name, tmp_path)
    assert np.array_equal(data.test_images.numpy(), np.repeat(pixels[:10, None], 3, 1))
    assert data.test_labels.tolist() == list(range(10))
    assert len(data.classes) == 10


def test_cifar10(tmp_path, monkeypatch):
    """The published layout: five batches for training, one for the test."""
    from torchvision.datasets import CIFAR10

    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    rng, md5 = np.random.default_rng(0), {}
    names = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch", "batches.meta"]
    pixels = {name: rng.integers(0, 256, (10, 3072), dtype=np.uint8) for name in names}
    for name in names:
        value = {"data": pixels[name], "labels": list(range(10))}
        value["label_names"] = [f"name{i}" for i in range(10)]
        (folder / name).write_bytes(pickle.dumps(value))
        md5[name] = hashlib.md5((folder / name).read_bytes()).hexdigest()
    monkeypatch.setattr(CIFAR10, "train_list", [[name, md5[name]] for name in names[:5]])
    monkeypatch.setattr(CIFAR10, "test_list", [["test_batch", md5["test_batch"]]])
    monkeypatch.setattr(CIFAR10, "meta", CIFAR10.meta | {"md5": md5["batches.meta"]})
    data = load_dataset("cifar10", tmp_path)
    train = np.concatenate([pixels[name] for name in names[:5]]).reshape(-1, 3, 32, 32)
    assert np.array_equal(data.train_images.numpy(), train)
    assert data.test_labels.tolist() == list(range(10))
    assert data.classes[3] == "name3"


def save_image(path, value, mode="RGB", size=(64, 64)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, value).save(path)


@pytest.fixture
def fake_tinyimagenet(tmp_path):
    """The published layout with three classes; the first image is grey."""
    root = tmp_path / "tiny-imagenet-200"
    lines = []
    for c, wnid in enumerate(["n03", "n01", "n02"]):
        for i in range(10):
            path = root / f"train/{wnid}/images/{wnid}_{i}.JPEG"
            save_image(path, (40 * c + 20,) * 3)
        save_image(root / f"val/images/val_{c}.JPEG", (200 + 10 * c,) * 3)
        lines.append(f"val_{c}.JPEG\t{wnid}\t0\t0\t62\t62\n")
    save_image(root / "train/n03/images/n03_0.JPEG", 20, "L")
    (root / "val/val_annotations.txt").write_text("".join(lines))
    return root


def test_tinyimagenet(fake_tinyimagenet, tmp_path):
    data = load_dataset("tinyimagenet", tmp_path)
    assert data.classes == ["n01", "n02", "n03"]
    assert data.train_images[:, 0, 30, 30].tolist() == [60] * 10 + [100] * 10 + [20] * 10
    assert data.train_labels.tolist() == [0] * 10 + [1] * 10 + [2] * 10
    by_label = dict(
        zip(data.test_labels.tolist(), data.test_images[:, 1, 30, 30].tolist(), strict=True)
    )
    assert by_label == {0: 210, 1: 220, 2: 200}


@pytest.mark.parametrize("list_stays", [True, False])
def test_tinyimagenet_with_its_val_sorted_into_class_folders(
    list_stays, fake_tinyimagenet, tmp_path
):
    val = fake_tinyimagenet / "val"
    for c, wnid in enumerate(["n03", "n01", "n02"]):
        (val / wnid).mkdir()
        (val / f"images/val_{c}.JPEG").rename(val / wnid / f"val_{c}.JPEG")
    if not list_stays:
        (val / "val_annotations.txt").unlink()
    data = load_dataset("tinyimagenet", tmp_path)
    by_label = dict(
        zip(data.test_labels.tolist(), data.test_images[:, 1, 30, 30].tolist(), strict=True)
    )
    assert by_label == {0: 210, 1: 220, 2: 200}


def test_tinyimagenet_half_unpacked(fake_tinyimagenet, tmp_path):
    (fake_tinyimagenet / "train/n01/images/n01_2.JPEG").unlink()
    with pytest.raises(UserError, match="29 images in train/, 3 in val/"):
        load_dataset("tinyimagenet", tmp_path)


@pytest.mark.parametrize("name", ["cifar100", "tinyimagenet", "mnist"])
def test_without_a_network(name, tmp_path, monkeypatch):
    def offline(*args, **kwargs):
        raise OSError("Name or service not known")

    monkeypatch.setattr("urllib.request.urlopen", offline)
    folder = pah.PUBLISHED[name][1]
    with pytest.raises(UserError, match=f"put its unpacked folder {folder} into .*synthetic"):
        load_dataset(name, tmp_path)


def test_downloads_have_a_folder_of_their_own(tmp_path, monkeypatch):
    def offline(root, train, download):
        assert download
        raise OSError(f"cannot write {root}")

    monkeypatch.setattr("torchvision.datasets.CIFAR100", offline)
    with pytest.raises(UserError, match=f"cannot write {tmp_path}/pah-downloads"):
        load_dataset("cifar100", tmp_path)


@pytest.fixture
def folder(tmp_path):
    """A folder of two classes with an odd shape and an odd mode each."""
    root = tmp_path / "my images"
    for split in ("train", "val"):
        for c, name in enumerate(["cat", "dög"]):
            save_image(root / split / name / "a.png", (50 + 100 * c,) * 3, size=(40, 20))
            save_image(root / split / name / "b.png", 50 + 100 * c, "L")
    return root


def test_a_folder_of_images(folder):
    data = load_dataset(str(folder), image_size=16)
    assert data.classes == ["cat", "dög"]
    assert data.train_images.shape == (4, 3, 16, 16)
    assert data.test_images.flatten(1).unique(dim=1).flatten().tolist() == [50, 50, 150, 150]
    assert data.test_labels.tolist() == [0, 0, 1, 1]


def test_images_are_cropped_to_their_middle(folder):
    image = Image.new("RGB", (40, 20))
    image.paste((255, 255, 255), (10, 0, 30, 20))
    image.save(folder / "train/cat/a.png")
    middle = load_dataset(str(folder), image_size=20).train_images[0]
    assert middle.eq(255).all()


def test_test_images_may_be_called_test(folder):
    (folder / "val").rename(folder / "test")
    assert len(load_dataset(str(folder)).test_images) == 4


def test_reading_says_how_many_images(folder, capsys):
    load_dataset(str(folder))
    said = capsys.readouterr().err
    for split in ("train", "val"):
        assert f"reading 4 images in {folder / split}" in said


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(
        UserError, match="cannot read cifar11 as a data set: .* cifar10, cifar100, .* train/ and"
    ):
        load_dataset("cifar11")


def test_a_folder_without_classes(folder):
    for path in sorted((folder / "train").rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    with pytest.raises(UserError, match="cannot read .* as a data set: .*find any class folder"):
        load_dataset(str(folder))


def test_classes_that_differ(folder):
    (folder / "val/cat").rename(folder / "val/cow")
    with pytest.raises(UserError, match="other classes .*'cat', 'cow'"):
        load_dataset(str(folder))


@pytest.mark.parametrize("content", [b"no image", b"half"])
def test_an_image_that_cannot_be_read_is_named(content, folder):
    if content == b"half":
        content = (folder / "val/cat/a.png").read_bytes()[:60]
    (folder / "val/cat/a.png").write_bytes(content)
    with pytest.raises(UserError, match="cannot read the image .*cat/a.png"):
        load_dataset(str(folder))


@pytest.mark.parametrize("name, mode, value", [("a.png", "I;16", 40_000), ("a.tiff", "F", 0.5)])
def test_an_image_of_more_than_8_bits_is_refused(name, mode, value, folder):
    save_image(folder / "val/cat" / name, value, mode)
    with pytest.raises(UserError, match=f"cat/{name} has more than 8 bits per pixel"):
        load_dataset(str(folder))


@pytest.mark.parametrize("mode, value", [("1", 1), ("P", 7), ("LA", (90, 255)), ("CMYK", (9,) * 4)])
def test_images_of_other_modes_are_read_as_pillow_converts_them(mode, value, folder):
    (folder / "train/cat/a.png").unlink()
    save_image(folder / f"train/cat/a.{'tiff' if mode == 'CMYK' else 'png'}", value, mode)
    expected = Image.new(mode, (1, 1), value).convert("RGB").getpixel((0, 0))
    data = load_dataset(str(folder), image_size=16)
    assert data.train_images[0, :, 8, 8].tolist() == list(expected)


def test_photos_are_turned_as_their_exif_data_says(folder):
    image = Image.new("RGB", (20, 20), "white")
    image.paste((0, 0, 0), (0, 0, 20, 10))  # the upper half is black
    exif = Image.Exif()
    exif[0x0112] = 3  # the camera was upside down
    image.save(folder / "train/cat/a.png", exif=exif)
    turned = load_dataset(str(folder), image_size=20).train_images[0]
    assert turned[:, 2].eq(255).all() and turned[:, 17].eq(0).all()


def test_an_image_above_pillows_limit_is_named(folder, monkeypatch):
    monkeypatch.setattr(
        Image, "MAX_IMAGE_PIXELS", 300
    )  # half of 40 x 20 = 800 and more is an error
    with pytest.raises(UserError, match=r"cannot read the image .*/a.png \(.*limit"):
        load_dataset(str(folder))


def test_several_seeds_read_a_folder_once(folder, tmp_path, monkeypatch):
    read_images, calls = pah.read_images, []

    def counted(paths, size):
        calls.append(len(paths))
        return read_images(paths, size)

    monkeypatch.setattr(pah, "read_images", counted)
    flags = ["--dataset", folder, "--tasks", 1, "--image-size", 16, "--out", tmp_path / "out"]
    run_main(*TINY, *flags, "--seeds", 0, 1)
    assert calls == [4, 4]


def test_files_of_the_user_stay(fake_cifar100, tmp_path):
    names = [
        ".notes.tmp",
        "cifar-100-python.tar.gz",
        "cifar100.pt",
        "runs/notes",
        "runs/seed0.json",
    ]
    for name in names:
        (tmp_path / "data" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "data" / name).write_text("mine")
    flags = [*TINY[4:], "--data", tmp_path / "data", "--out", tmp_path / "data/runs"]
    run_main("--dataset", "cifar100", "--tasks", 50, "--stop-after", 1, *flags)
    for name in names:
        assert (tmp_path / "data" / name).read_text() == "mine"


# -----------------------------------------------------------------------------
# Results


def test_results(learned):
    r = results(learned)
    R = r["accuracy"]
    assert r["complete"]
    assert [len(row) for row in R] == [1, 2, 3, 4, 5]
    assert r["AA"] == pah.average_accuracy(R)
    assert r["FM"] == pah.forgetting(R)
    assert r["LA"] == pytest.approx(np.mean([R[k][k] for k in range(5)]))
    assert r["BWT"] == pytest.approx(np.mean([R[4][k] - R[k][k] for k in range(4)]))
    assert len(r["class_incremental"]) == 5
    assert r["class_order"][1] == ["pattern 4", "pattern 5", "pattern 6", "pattern 7"]
    assert r["parameters"]["prototypes"] == 5 * 4 * 3 * 10 * 10
    assert r["args"]["lam"] == 1
    assert r["seconds"] > 0


def test_files_of_a_run(learned):
    names = {path.name for path in (learned / "seed0").iterdir()}
    assert names == {"results.json", "checkpoint.pt", "prototypes.png"}
    assert Image.open(learned / "seed0/prototypes.png").size == (4 * 42 + 2, 5 * 42 + 2)


def test_a_checkpoint_predicts(learned):
    model, r = load_checkpoint(learned / "seed0/checkpoint.pt"), results(learned)
    tasks = split_tasks(load_dataset("synthetic"), 5)
    assert not model.training
    assert pah.evaluate(model, tasks) == (r["accuracy"][-1], r["class_incremental"][-1])


def test_a_checkpoint_from_before_an_option_was_made_predicts(learned, tmp_path):
    saved = torch.load(learned / "seed0/checkpoint.pt", weights_only=True)
    del saved["results"]["args"]["temperature"]
    torch.save(saved, tmp_path / "old.pt")
    model = load_checkpoint(tmp_path / "old.pt")
    assert_same(model.state_dict(), weights(learned))


@pytest.mark.parametrize("content", [b"", b"half", None])
def test_a_damaged_checkpoint_is_named(content, learned, tmp_path):
    path = tmp_path / "seed0/checkpoint.pt"
    path.parent.mkdir()
    if content is not None:
        path.write_bytes(content and (learned / "seed0/checkpoint.pt").read_bytes()[:5000])
    message = f"cannot read {path}; if it is damaged, move it away"
    with pytest.raises(UserError, match=message) as error:
        load_checkpoint(path)
    assert "\n" not in str(error.value)
    assert "()" not in str(error.value)
    if content is not None:
        with pytest.raises(UserError, match=message):
            run_main(*RUN, "--out", tmp_path, "--resume")


def test_a_checkpoint_of_another_program_is_told(tmp_path):
    path = tmp_path / "seed0/checkpoint.pt"
    path.parent.mkdir()
    torch.save({"state_dict": {}}, path)
    before = path.read_bytes()
    for start in (lambda: load_checkpoint(path), lambda: run_main(*TINY, "--out", tmp_path)):
        with pytest.raises(UserError, match=f"{path} was not written by pah.py"):
            start()
    assert path.read_bytes() == before


def test_a_checkpoint_of_another_method_is_told(learned, tmp_path):
    saved = torch.load(learned / "seed0/checkpoint.pt", weights_only=True)
    saved["model"]["stored_heads"] = torch.zeros(5, 4, 64)
    torch.save(saved, tmp_path / "other.pt")
    with pytest.raises(UserError, match="other.pt is not a run of PAH") as error:
        load_checkpoint(tmp_path / "other.pt")
    assert "\n" not in str(error.value)


def test_a_checkpoint_has_no_head_and_no_training_image(learned):
    saved = torch.load(learned / "seed0/checkpoint.pt", weights_only=True)
    assert set(saved["model"]) == set(PAH(ResNet18(8), 5, 4).state_dict())
    assert not any(isinstance(value, torch.Tensor) for value in saved.values())
    images = pah.normalise(split_tasks(load_dataset("synthetic"), 5)[1].train_images)
    small = F.interpolate(images, 10, mode="bilinear", antialias=True)
    distance = (small[:, None] - saved["model"]["prototypes"][1]).abs().amax((2, 3, 4))
    assert distance.min() > 1e-3  # the prototypes have moved


SLOW_WRITER = """
import sys, time, torch, pah; save = torch.save
def slow(value, path): path.write_bytes(b"half"); time.sleep(0.3); save(value, path)
torch.save = slow
pah.main(sys.argv[1:])
"""


def test_killed_while_it_writes_and_resumed_it_is_the_same_run(tmp_path):
    """SIGKILL at the first and at a later checkpoint: what has its final name is whole."""
    flags = [*TINY, "--stop-after", "3"]
    run_main(*flags, "--out", tmp_path / "whole")
    folder = tmp_path / "cut/seed0"
    command = [sys.executable, "-c", SLOW_WRITER, *flags, "--out", str(folder.parent), "--resume"]
    for tasks_saved in (0, 1):
        process = subprocess.Popen(command, cwd=HERE, stdout=subprocess.PIPE, text=True)
        while len(list(folder.glob("checkpoint.pt"))) < tasks_saved:
            time.sleep(0.002)
        while not list(folder.glob(f".checkpoint.pt.{process.pid}.pah-writes")):
            assert process.poll() is None
            time.sleep(0.002)
        process.kill()
        process.communicate()
        assert len(list(folder.glob("checkpoint.pt"))) == tasks_saved
    process = subprocess.run(command, cwd=HERE, capture_output=True, text=True, check=False)
    assert process.returncode == 0
    assert_same(weights(tmp_path / "whole"), weights(folder.parent))
    assert len(results(tmp_path / "cut")["accuracy"]) == 3


def test_a_full_disk_leaves_the_last_checkpoint(tmp_path, monkeypatch):
    run_main(*TINY, "--stop-after", 1, "--out", tmp_path)
    before = (tmp_path / "seed0/checkpoint.pt").read_bytes()

    def full(value, path):
        path.write_bytes(b"half")
        raise RuntimeError("the disk is full")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(UserError, match="cannot write .*checkpoint.pt; is the disk full"):
        run_main(*TINY, "--stop-after", 2, "--out", tmp_path, "--resume")
    assert (tmp_path / "seed0/checkpoint.pt").read_bytes() == before
    assert not list((tmp_path / "seed0").glob(".*"))


def test_a_picture_that_fails_comes_after_the_checkpoint(tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError("no such format")

    monkeypatch.setattr("torchvision.utils.save_image", fail)
    with pytest.raises(UserError, match="cannot write .*prototypes.png; .*no such format"):
        run_main(*TINY, "--stop-after", 1, "--out", tmp_path)
    assert load_checkpoint(tmp_path / "seed0/checkpoint.pt")
    assert results(tmp_path)["complete"]


@pytest.mark.parametrize("reason", ["a file", "read-only"])
def test_a_folder_that_cannot_be_written_is_told_before_the_first_step(
    reason, tmp_path, monkeypatch
):
    def read_only(**options):
        raise OSError(30, "Read-only file system")

    if reason == "a file":
        (tmp_path / "out").write_text("mine")
    else:
        monkeypatch.setattr(pah.tempfile, "TemporaryFile", read_only)
    monkeypatch.setattr(PAH, "begin_task", None)  # training would fail otherwise
    with pytest.raises(UserError, match=f"cannot write to {tmp_path}/out/seed0: .* another --out"):
        run_main(*TINY, "--out", tmp_path / "out")


def test_several_seeds_are_resumed(tmp_path):
    flags = [*TINY, "--seeds", 0, 1, "--stop-after", 2]
    run_main(*flags, "--out", tmp_path / "whole")
    run_main(*TINY, "--stop-after", 2, "--out", tmp_path / "cut")  # seed 0 is done,
    run_main(*TINY, "--seeds", 1, "--stop-after", 1, "--out", tmp_path / "cut")  # half of seed 1
    run_main(*flags, "--out", tmp_path / "cut", "--resume")
    for seed in (0, 1):
        assert_same(weights(tmp_path / "whole", seed), weights(tmp_path / "cut", seed))
        assert results(tmp_path / "cut", seed)["complete"]


def test_stopped_after_a_task_it_goes_on_in_the_same_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_main(*TINY, "--stop-after", 2)
    assert not results(next(Path("runs").iterdir()))["accuracy"][2:]
    run_main(*TINY, "--stop-after", 3, "--resume")
    (folder,) = Path("runs").iterdir()
    run_main(*TINY, "--stop-after", 3, "--out", "whole")
    assert_same(weights(folder), weights(Path("whole")))


@pytest.fixture
def begun(tmp_path):
    run_main(*TINY, "--stop-after", 1, "--out", tmp_path)
    return tmp_path


def test_a_run_is_not_written_over(begun):
    with pytest.raises(
        UserError, match="already holds this run: add --resume, or choose another --out"
    ):
        run_main(*TINY, "--stop-after", 2, "--out", begun)


@pytest.mark.parametrize("resume", [[], ["--resume"]])
def test_another_run_is_refused_by_the_options_that_differ(resume, begun):
    options = r"\(--lam was 1.0, is 0.0; --precision was fp32, is bf16\)"
    with pytest.raises(UserError, match=f"a different run {options}"):
        run_main(*TINY, "--lam", 0, "--precision", "bf16", "--out", begun, *resume)


def test_another_order_of_classes_is_another_run(begun, tmp_path):
    order = tmp_path / "order"
    order.write_text("".join(f"{c}\n" for c in range(20)))
    flags = [*TINY, "--class-order", order, "--out", tmp_path / "o"]
    run_main(*flags, "--stop-after", 1)
    order.write_text("".join(f"{c}\n" for c in reversed(range(20))))
    with pytest.raises(UserError, match="another class order"):
        run_main(*flags, "--resume")


def test_a_folder_with_other_files_is_not_entered(tmp_path):
    (tmp_path / "seed0").mkdir()
    (tmp_path / "seed0/prototypes.png").write_text("mine")
    with pytest.raises(UserError, match="has files but no checkpoint"):
        run_main(*TINY, "--out", tmp_path)
    assert (tmp_path / "seed0/prototypes.png").read_text() == "mine"


def test_a_finished_run_is_resumed_at_once(learned, capsys):
    run_main(*RUN, "--width", 8, "--epochs", 3, "--out", learned, "--resume")
    first, last = capsys.readouterr().out.splitlines()
    assert first == f"5 tasks, cpu, fp32: {learned}/seed0"
    assert last.startswith(f"AA {results(learned)['AA']:.2f}")


def test_a_finished_run_keeps_its_record(learned):
    before = (learned / "seed0/results.json").read_bytes()
    flags = [*RUN, "--width", 8, "--epochs", 3, "--out", learned, "--resume"]
    run_main(*flags, "--stop-after", 2)
    assert (learned / "seed0/results.json").read_bytes() == before


@pytest.mark.parametrize("name", ["synthetic", "cifar100"])
def test_a_known_name_is_not_taken_for_a_folder(name, tmp_path, monkeypatch):
    (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path)
    assert pah.parse_args(["--dataset", name]).dataset == name
    assert pah.parse_args(["--dataset", f"./{name}"]).dataset == str(tmp_path / name)


def test_a_folder_is_the_same_however_it_is_written(folder, monkeypatch):
    monkeypatch.chdir(folder.parent)
    names = [f"./{folder.name}", f"{folder.name}/", folder.name, str(folder)]
    assert {pah.parse_args(["--dataset", name]).dataset for name in names} == {str(folder)}


def test_results_that_were_lost_are_written_again(begun):
    (begun / "seed0/results.json").unlink()
    run_main(*TINY, "--stop-after", 1, "--out", begun, "--resume")
    assert results(begun)["complete"]


# -----------------------------------------------------------------------------
# Command line


@pytest.mark.parametrize(
    "flags",
    [
        ["--precision", "bf16", "--width", "8"],
        ["--stem", "7x7", "--width", "64", "--image-size", "16", "--batch-size", "400"],
        ["--val-fraction", "0.2", "--shuffle-classes", "--augment", "crop"],
        ["--proto-init", "random", "--augment", "none"],
        ["--tasks", "12", "4", "4"],
    ],
)
def test_every_kind_of_run_ends(flags, tmp_path):
    run_main(*TINY, "--stop-after", 2, "--out", tmp_path, *flags)
    assert results(tmp_path)["complete"]
    assert load_checkpoint(tmp_path / "seed0/checkpoint.pt").present[:2].any(1).all()


def test_options_of_the_method_reach_it():
    flags = "--lam 0.3 --mu 0.4 --temperature 3 --proto-size 6 --proto-init random"
    model = pah.build(pah.parse_args([*RUN, *flags.split(), "--hidden", "8"]), 5, 4)
    assert (model.lam, model.mu, model.temperature) == (0.3, 0.4, 3.0)
    assert model.proto_init == "random"
    assert model.prototypes.shape == (5, 4, 3, 6, 6)
    assert model.hypernetwork.layers[0].weight.shape == (8, 4 * 3 * 36)


@pytest.mark.parametrize(
    "flags, out",
    [
        ("", "runs/cifar100-10"),
        ("--tasks 20 --seeds 1 2 --stop-after 3 --resume", "runs/cifar100-20"),
        ("--lam 0 --mu 0", "runs/cifar100-10-lam-0.0-mu-0.0"),
        ("--shuffle-classes", "runs/cifar100-10-shuffle-classes-True"),
        ("--tasks 60 40 --dataset some/where/", "runs/where-60-40"),
        ("--class-order a/b --out x", "x"),
        ("--class-order a/b", "runs/cifar100-10-class-order-a-b"),
    ],
)
def test_the_default_output_folder_is_named_by_what_is_not_the_default(flags, out):
    assert pah.parse_args(flags.split()).out == out


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--pretrained --width 16", "which has --width 64"),
        ("--stem 7x7 --width 16", "which has --width 64"),
        ("--augment flip", "--augment: invalid choice"),
        ("--val-fraction 1", "--val-fraction must be"),
        ("--class-order x --shuffle-classes", "not allowed with argument --class-order"),
        ("--batch-size 0", "--batch-size must be at least 1"),
        ("--epochs -1", "--epochs must be at least 1"),
        ("--hidden 0", "--hidden must be at least 1"),
        ("--stop-after 0", "--stop-after must be at least 1"),
        ("--device cuda:1", "--device: invalid choice: 'cuda:1'"),
        ("--device cuda", "--device cuda: torch finds no GPU here; use --device cpu"),
    ],
)
def test_options_that_cannot_work_are_one_line(flags, message, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises((UserError, SystemExit)) as error:
        pah.parse_args(flags.split())
    if error.type is SystemExit:  # by argparse
        usage, line = capsys.readouterr().err.splitlines()
        assert usage.endswith("[options]")
    else:
        (line,) = str(error.value).splitlines()
    assert message in line


def test_mean_and_deviation_of_several_seeds():
    runs = [{"AA": 80.0, "FM": 1.0, "LA": 81.0}, {"AA": 82.0, "FM": 3.0, "LA": 84.0}]
    assert pah.describe([{"AA": 80.0, "FM": None, "LA": None}]) == "AA 80.00"
    assert pah.describe(runs) == "AA 81.00  +- 1.41  FM  2.00  +- 1.41  LA 82.50  +- 2.12"
    assert pah.describe(runs[:1]) == "AA 80.00  FM  1.00  LA 81.00"


def test_a_mistake_is_one_line_and_the_output_is_ascii(tmp_path):
    env = os.environ | {"PYTHONIOENCODING": "ascii"}
    command = [sys.executable, HERE / "pah.py", *TINY, "--stop-after", "1", "--out", tmp_path]
    first = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert first.returncode == 0, first.stderr
    again = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert again.returncode == 1
    assert (
        again.stderr
        == f"pah.py: {tmp_path}/seed0 already holds this run: add --resume, or choose another --out\n"
    )


STOPPED = """
import os, runpy, signal, sys, torch
save = torch.save
def interrupted(*args):
    save(*args)
    os.kill(os.getpid(), signal.SIGINT)
torch.save = interrupted
sys.argv[0] = "pah.py"
runpy.run_path("pah.py", run_name="__main__")
"""


def test_ctrl_c_says_how_to_go_on(tmp_path):
    command = [sys.executable, "-c", STOPPED, *TINY, "--out", tmp_path]
    done = subprocess.run(command, cwd=HERE, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == "stopped; --resume continues after the last finished task\n"


# -----------------------------------------------------------------------------
# CUDA


@needs_cuda
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_cuda(precision, tmp_path):
    flags = [*RUN, "--device", "cuda", "--precision", precision, "--width", 16, "--epochs", 5]
    run_main(*flags, "--out", tmp_path)
    assert results(tmp_path)["AA"] > 70


@needs_cuda
def test_a_step_does_not_wait_for_the_gpu():
    model, teacher, _, labels = student_and_teacher()
    model, teacher, labels = model.cuda(), teacher.cuda(), labels.cuda()
    optimizers = pah.make_optimizers(model, 0.02, 1e-4, 1e-3, 0.1)
    images = torch.zeros(len(labels), 3, 16, 16, dtype=torch.uint8, device="cuda")
    for mode in ("default", "error"):  # the first step may wait
        torch.cuda.set_sync_debug_mode(mode)
        try:
            x = pah.normalise(pah.augment(images))
            sum(model.losses(x, labels, 3, teacher).values()).backward()
            for optimizer in optimizers:
                optimizer.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")


# -----------------------------------------------------------------------------
# README

README = (HERE / "README.md").read_text()
SNIPPETS = [part.split("```")[0] for part in README.split("```python\n")[1:]]


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A folder with `photos` of four classes, in which the README's command for them has run."""
    path = tmp_path_factory.mktemp("reader")
    for part, name, i in itertools.product(("train", "val"), "abcd", range(8)):
        folder = path / "photos" / part / name
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 32), (60 * "abcd".index(name), 9 * i, 0)).save(folder / f"{i}.png")
    flags = re.search("python pah.py (--dataset photos .*)", README)[1].split()
    subprocess.run([sys.executable, HERE / "pah.py", *flags], cwd=path, check=True)
    return path


@pytest.mark.parametrize("snippet", SNIPPETS)
def test_a_snippet_of_the_readme_runs(snippet, photos):
    """As it stands."""
    (photos / "snippet.py").write_text(snippet)
    env = os.environ | {"PYTHONPATH": str(HERE)}
    command = [sys.executable, "snippet.py"]
    done = subprocess.run(command, cwd=photos, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    last = done.stdout.splitlines()[-1]
    if "load_checkpoint" in snippet:  # of eight images of the first task
        assert re.fullmatch(r"\[('[ab]'(, )?){8}\]", last)
    else:
        assert re.search(r"\d\.\d", last) and "task" not in last  # what it printed itself


def test_commands_of_the_readme_have_options_that_exist():
    commands = re.findall(r"python pah.py *([^`#\n]*)", README)
    assert commands
    for command in commands:
        pah.parse_args(command.replace("--help", "").split())


def test_options_that_the_readme_names_exist():
    known = set(re.findall(r"--[a-z][a-z-]*", pah.make_parser().format_help()))
    known |= {"--format", "--plan", "--nproc-per-node"}
    assert set(re.findall(r"--[a-z][a-z-]*", README)) <= known
