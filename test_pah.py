"""Tests of pah.py, in its order: no network and no published data; CUDA tests run where there is CUDA."""
import copy, hashlib, io, json, os, pickle, shutil, signal, struct, subprocess, sys, time
from pathlib import Path
import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
import pah
from pah import PAH, Data, Hypernetwork, Problem, ResNet18, Teacher, load_checkpoint, load_dataset, split_tasks
HERE = Path(pah.__file__).parent
K, C = 4, 3
SHORT_RUN = ["--dataset", "synthetic", "--width", "8", "--epochs", "5", "--lr", "0.02", "--precision", "fp32"]
TINY_RUN = ["--dataset", "synthetic", "--width", "4", "--epochs", "1", "--hidden", "8", "--batch-size", "50",
            "--precision", "fp32"]
def fill(model):
    """Give every prototype a value, as if all tasks had begun, and BatchNorm statistics that matter."""
    torch.manual_seed(1)
    if model.head == "hyper":
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
    old = fill(PAH(ResNet18(4), **options))
    model = fill(PAH(ResNet18(4), **options)).train()
    return model, Teacher(old, 3), torch.randn(5, 3, 16, 16), torch.tensor([0, 1, 2, 1, 0])
def softened_kl(new, old, T):
    """KL(old || new) T^2, written out."""
    p, q = (old / T).softmax(-1), (new / T).softmax(-1)
    return T * T * (p * (p.log() - q.log())).sum(-1)
# ------------------------------ the method
def test_heads_start_at_the_scale_of_a_linear_layer():
    torch.manual_seed(0)
    hypernetwork, embeddings = Hypernetwork(3000, 10, 512, 64), torch.randn(50, 3000)
    assert 0.7 < hypernetwork(embeddings).std() / nn.Linear(512, 10).weight.std() < 1.4
    hidden = F.normalize(hypernetwork.layers[:-1](embeddings), dim=1)
    cosines = (hidden @ hidden.T)[~torch.eye(50, dtype=torch.bool)]
    assert abs(cosines.mean()) < 0.1  # hidden vectors of unlike tasks; with ReLU 0.5
def test_shapes_and_equations_1_to_3():
    model = fill(PAH(ResNet18(4), K, C, proto_size=6, hidden=8)).eval()
    x = torch.randn(5, 3, 16, 16)
    assert model.prototypes.shape == (K, C, 3, 6, 6) and model.heads(None).shape == (K, C, 32)
    e = torch.cat([model.prototypes[2, c].flatten() for c in range(C)])  # Eq. 3
    W = model.hypernetwork(e)  # Eq. 2
    torch.testing.assert_close(model.heads(4)[2], W)
    torch.testing.assert_close(model(x, 2), model.backbone(x) @ W.T)  # Eq. 1
    white, black = (pah.normalise(torch.full((3, 1, 1), value, dtype=torch.uint8)).flatten() for value in (255, 0))
    torch.testing.assert_close(torch.stack([black / (black - white), 1 / (white - black)]), torch.tensor([pah.MEAN, pah.STD]))

def test_semantic_and_random_prototypes():
    torch.manual_seed(0)
    task = split_tasks(load_dataset("synthetic"), 5)[1]
    model = PAH(ResNet18(4), 5, 4)
    model.begin_task(1, task.train_images, task.train_labels)
    assert not model.prototypes[[0, 2, 3, 4]].any()
    small = F.interpolate(pah.normalise(task.train_images), 10, mode="bilinear", antialias=True, align_corners=False)
    for c in range(4):  # it is one of the class's training images, and none of the others'
        distance = (small - model.prototypes[1, c]).abs().amax((1, 2, 3))
        assert (distance < 1e-5).any() and (task.train_labels[distance < 1e-5] == c).all()
    model.begin_task(2, task.train_images, task.train_labels, init="random")
    assert abs(model.prototypes[2].mean()) < 0.1 and abs(model.prototypes[2].std() - 1) < 0.1

def test_what_controls_are_made_from():
    stored, vector = PAH(ResNet18(4), K, C, head="stored"), PAH(ResNet18(4), K, C, head="vector")
    assert torch.equal(stored.heads(2), stored.prototypes[:2]) and stored.prototypes.shape == (K, C, 32)
    assert not list(stored.hypernetwork.parameters())
    assert vector.prototypes.shape == (K, C, 3, 10, 10) and abs(vector.prototypes.std() - 1) < 0.1
    for model in stored, vector:  # no image enters
        before = model.prototypes.clone()
        model.begin_task(1, torch.zeros(6, 3, 8, 8, dtype=torch.uint8), torch.arange(6) % 3)
        assert torch.equal(model.prototypes, before)

def test_bf16_stays_close_and_the_teacher_is_rounded_once():
    model, _, x, y = pair()
    exact = pah.joint_loss(copy.deepcopy(model), Teacher(fill(pair()[0]), 3), x, y, 3)[1]
    model.precision, seen = "bf16", []
    teacher = Teacher(fill(model), 3)
    assert teacher.backbone.conv1.weight.dtype == torch.bfloat16 and model.backbone.conv1.weight.dtype == torch.float32
    assert torch.equal(teacher.features(x), copy.deepcopy(model).eval().features(x))
    model.backbone.layer4.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    close = pah.joint_loss(model, teacher, x, y, 3)[1]
    assert set(seen) == {torch.bfloat16} and model(x, 1).dtype == close.dtype == torch.float32
    torch.testing.assert_close(close, exact, rtol=0.05, atol=0.02)

def test_values_of_the_three_losses():
    model, teacher, x, y = pair()
    torch.manual_seed(0)
    old_model = fill(PAH(ResNet18(4), K, C, proto_size=6, hidden=8)).eval()
    loss, (hm, sm, sp) = pah.joint_loss(model, teacher, x, y, 3, lam=0.7, mu=0.3, temperature=3.0)
    model, *_ = pair()  # the pass above has moved the running statistics
    features = copy.deepcopy(model).backbone(x)  # in training mode, batch statistics
    log_p = (features @ model.heads(4)[3].T).log_softmax(1)
    want_hm = -sum(log_p[b, y[b]] for b in range(5)) / 5
    want_sm = want_sp = 0.0
    for i in range(3):
        old = old_model(x, i)
        new = features @ model.hypernetwork(model.prototypes[i].flatten()).T
        want_sm += softened_kl(new, old, 3.0).mean()
    model.backbone(x)  # L_sp sees the running statistics after the batch
    model.eval()
    for i in range(3):
        p = model.prototypes[i]
        want_sp += softened_kl(model(p, i), old_model(p, i), 3.0).mean()
    for ours, want in (hm, want_hm), (sm, want_sm), (sp, want_sp), (loss, want_hm + 0.7 * want_sm + 0.3 * want_sp):
        torch.testing.assert_close(ours.detach(), want.detach(), rtol=1e-4, atol=1e-6)
    assert want_sm > 0.01 and want_sp > 0.01

@pytest.mark.parametrize("loss, reached", [
    ("hm", {"backbone", "hypernetwork", "own"}), ("sm", {"backbone", "hypernetwork", "earlier"}),
    ("sp", {"earlier"}), ("sp of all", {"backbone", "hypernetwork", "earlier"})])
def test_what_each_loss_reaches(loss, reached):
    model, _, x, y = pair()
    model.eval()  # so that the two passes below are of the same function
    teacher = Teacher(fill(PAH(ResNet18(4), K, C, proto_size=6, hidden=8)), 2)  # 0 and 1 are earlier, 3 is to come
    total = lambda lam, mu, updates="prototypes": pah.joint_loss(model, teacher, x, y, 2, lam, mu, sp_updates=updates)[0]
    value = {"hm": lambda: total(0, 0), "sm": lambda: total(1, 0) - total(0, 0), "sp": lambda: total(0, 1) - total(0, 0),
             "sp of all": lambda: total(0, 1, "all") - total(0, 0)}[loss]()
    names, parameters = zip(*model.named_parameters())
    gradients = dict(zip(names, torch.autograd.grad(value, parameters)))
    for name, gradient in gradients.items():
        rows = gradient.abs().flatten(1).amax(1) if name == "prototypes" else gradient.abs().max()[None]
        parts = ["earlier", "earlier", "own", "to come"] if name == "prototypes" else [name.split(".")[0]]
        for part, largest in zip(parts, rows):  # what is not reached is zero up to the rounding of the difference
            assert (largest > 1e-5) == (part in reached), (name, part, largest)
    if loss == "sp":  # and without a difference: no graph leads to anything else
        alone = torch.autograd.grad(pah.soft_loss_prototypes(model, teacher), parameters, allow_unused=True)
        assert [n for n, g in zip(names, alone) if g is not None] == ["prototypes"]

def test_prototype_pass_and_teacher_stand_still():
    model, teacher, x, y = pair()
    model.backbone.bn1.weight.requires_grad_(False)  # whoever freezes a part finds it frozen afterwards
    frozen, heads = copy.deepcopy(teacher.backbone.state_dict()), teacher.heads.clone()
    statistics = {n: b.clone() for n, b in model.backbone.named_buffers()}
    pah.soft_loss_prototypes(model, teacher).backward()
    assert all(torch.equal(b, statistics[n]) for n, b in model.backbone.named_buffers())
    assert model.backbone.training and not teacher.backbone.training
    assert [n for n, p in model.named_parameters() if not p.requires_grad] == ["backbone.bn1.weight"]
    pah.joint_loss(model, teacher, x, y, 3)[0].backward()
    assert any(not torch.equal(b, statistics[n]) for n, b in model.backbone.named_buffers())
    assert all(torch.equal(v, frozen[n]) for n, v in teacher.backbone.state_dict().items())
    assert torch.equal(teacher.heads, heads) and not any(p.requires_grad for p in teacher.backbone.parameters())

def test_losses_of_controls():
    model, teacher, x, y = pair(head="stored")
    loss, parts = pah.joint_loss(model, teacher, x, y, 3)
    loss.backward()
    assert model.prototypes.grad.abs().amax((1, 2)).gt(0).all() and parts[1] > 0 and parts[2] == 0
    model, teacher, x, y = pair(head="vector")
    assert pah.joint_loss(model, teacher, x, y, 3)[1][2] == 0  # a vector is no image
    model, _, x, y = pair()
    tasks = torch.tensor([0, 1, 2, 3, 0])  # joint training: each image with its own task's head
    mixed = pah.multitask_loss(model.eval(), x, tasks * C + y)[0]
    each = [pah.joint_loss(model, None, x[i:i + 1], y[i:i + 1], int(t))[0] for i, t in enumerate(tasks)]
    torch.testing.assert_close(mixed, torch.stack(each).mean())

def test_l_sp_of_drawn_tasks_is_unbiased():
    model, teacher, *_ = pair()
    exact = pah.soft_loss_prototypes(model, teacher)
    each = {round(pah.soft_loss_prototypes(model, teacher, drawn=1).item(), 6) for _ in range(40)}
    assert len(each) == 3 and abs(sum(each) / 3 - exact) < 1e-4 * exact  # each task stands for all three
    assert pah.soft_loss_prototypes(model, teacher, drawn=3) == exact

def test_metrics_by_hand():
    R = [[90.0], [80.0, 70.0], [85.0, 60.0, 50.0]]
    assert pah.average_accuracy(R) == 65 and pah.learning_accuracy(R) == 70
    assert pah.forgetting(R) == ((90 - 85) + (70 - 60)) / 2
    assert pah.backward_transfer(R) == ((85 - 90) + (60 - 70)) / 2
    later_best = [[50.0], [80.0, 70.0], [60.0, 75.0, 50.0]]  # the best need not be the first; a gain counts against FM
    assert pah.forgetting(later_best) == ((80 - 60) + (70 - 75)) / 2
    assert pah.backward_transfer(later_best) == ((60 - 50) + (75 - 70)) / 2
    assert (pah.average_accuracy([[42.0]]), pah.forgetting([[42.0]]), pah.backward_transfer([[42.0]])) == (42, 0, 0)

def test_evaluate():
    """Two tasks, of 7 and 3 images; without the task told the largest of six logits decides."""
    model, *_ = pair()
    images = torch.randint(0, 256, (10, 3, 16, 16), dtype=torch.uint8)
    statistics = {n: b.clone() for n, b in model.named_buffers()}
    plain = copy.deepcopy(model).eval()
    logits = torch.stack([plain(pah.normalise(images), k) for k in (0, 1)], 1)
    labels = torch.cat([logits[:7, 0].argmax(1), logits[7:, 1].argmax(1)])
    untold = (logits.flatten(1).argmax(1) == labels + C * (torch.arange(10) > 6)).double()
    labels[5:7] = (labels[5:7] + 1) % C
    tasks = [pah.Task(["a", "b", "c"], None, None, images[i], labels[i]) for i in (slice(7), slice(7, 10))]
    assert 0 < untold.mean() < 1 and pah.evaluate(model, tasks) == (
        [pytest.approx(500 / 7), 100], pytest.approx(50 * (untold[:5].sum().item() / 7 + untold[7:].mean().item())))
    assert model.training and pah.evaluate(model.eval(), tasks)
    assert not model.training and all(torch.equal(b, statistics[n]) for n, b in model.named_buffers())

def test_backbone_is_torchvisions():
    from torchvision.models import resnet18
    theirs, ours = resnet18(), ResNet18(64, "7x7")
    theirs.fc, theirs.head = nn.Identity(), None
    fill(theirs)
    assert list(theirs.state_dict()) == list(ours.state_dict())
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 3, 64, 64)
    for mode in (True, False):
        torch.testing.assert_close(ours.train(mode)(x), theirs.train(mode)(x), rtol=1e-4, atol=1e-5)

def test_pooled_shortcut():
    """That of the 3x3 stem: every pixel counts, also where the size is odd; parameters are named as torchvision's."""
    block = pah.BasicBlock(4, 8, 2, pool=True)
    x = torch.randn(2, 4, 5, 5)
    small = torch.stack([x[:, :, i:i + 2, j:j + 2].mean((2, 3)) for i in (0, 2, 4) for j in (0, 2, 4)], -1).view(2, 4, 3, 3)
    torch.testing.assert_close(block.pool(x), small)
    assert block(x).shape == (2, 8, 3, 3) and block.downsample[0].stride == (1, 1)
    assert list(ResNet18(4, "3x3").state_dict()) == list(ResNet18(4, "7x7").state_dict())

def test_a_block_of_one_pixel():
    """Same numbers and gradients as stride 2; and in bf16, where torch 2.14's would be wrong, close to fp32's."""
    torch.manual_seed(0)
    block = pah.BasicBlock(64, 128, 2)
    x = torch.randn(64, 64, 1, 1, requires_grad=True)
    torch.testing.assert_close(F.conv2d(x, block.conv1.weight, padding=1), block.conv1(x))
    gradients = []
    for bf16 in [False] + 8 * [True]:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = (block(x).float() * torch.arange(128)[:, None, None]).sum()
        gradients.append(torch.autograd.grad(loss, [block.conv1.weight, x])[0])
        assert (gradients[-1] - gradients[0]).norm() < 0.1 * gradients[0].norm()
# ------------------------------ optimiser
def test_orthogonalised():
    torch.manual_seed(0)
    for rows, columns in (16, 40), (40, 16), (8, 8):
        u, _, vt = torch.linalg.svd(torch.randn(rows, columns), full_matrices=False)
        s = torch.logspace(0, -1, min(rows, columns))
        product = u.mT @ pah.orthogonalised(u @ s.diag() @ vt) @ vt.mT
        assert 0.4 < product.diagonal().min() and product.diagonal().max() < 1.3
        assert (product - product.diagonal().diag()).abs().max() < 1e-4
    assert not pah.orthogonalised(torch.zeros(4, 6)).any()

def test_muon_moves_filters_and_adamw_the_rest():
    """Six steps of random gradients: each filter moves in its turn, five times as far, along its orthogonalised Nesterov
    momentum; all else as AdamW would have it."""
    model, _, _, _ = pair()
    expected = copy.deepcopy(model)
    optimizer = pah.make_optimizer(model, lr=0.02, hyper_lr=1e-4, proto_lr=1e-3, weight_decay=0.1)
    norms = [p for p in expected.backbone.parameters() if p.ndim == 1]
    adamw = torch.optim.AdamW([dict(params=norms, lr=0.002, weight_decay=0), dict(params=[expected.prototypes], lr=1e-3,
        weight_decay=0), dict(params=expected.hypernetwork.parameters(), lr=1e-4, weight_decay=0.1)])
    filters = [p for p in expected.backbone.parameters() if p.ndim > 1]
    momenta = [torch.zeros_like(p).flatten(1) for p in filters]
    for turn in 0, 1, 2, 3, 4, 0:
        for p, like in zip(model.parameters(), expected.parameters()):
            like.grad = torch.randn_like(p)
            p.grad = like.grad.clone()
        optimizer.step(), adamw.step()
        for i, (p, momentum) in enumerate(zip(filters, momenta)):
            g = p.grad.flatten(1)
            momentum.mul_(0.95).add_(0.05 * g)
            if i % 5 == turn:
                step = pah.orthogonalised(0.05 * g + 0.95 * momentum) * 5 * 0.02 * max(1, g.shape[0] / g.shape[1]) ** 0.5
                p.data.mul_(1 - 5 * 0.02 * 0.1).sub_(step.view_as(p))
        for (name, p), like in zip(model.named_parameters(), expected.parameters()):
            torch.testing.assert_close(p, like, rtol=1e-3, atol=1e-4, msg=name)

def test_optimizer_groups_of_stored_heads_fp16_and_adamw():
    rates = lambda optimizer: [(g["lr"], g["weight_decay"]) for g in optimizer.param_groups]
    model = PAH(ResNet18(4), K, C, head="stored")
    assert rates(pah.make_optimizer(model, 0.02, 1, 2, 0.1)) == [(0.02, 0.1), (0.002, 0), (0.002, 0.1)]
    assert rates(pah.make_optimizer(model, 0.02, 1, 2, 0.1, muon=False)) == [(0.02, 0.1), (0.02, 0), (0.02, 0.1)]
    model = PAH(ResNet18(4), K, C, precision="fp16")
    optimizer = pah.make_optimizer(model, 0.02, 1, 2, 0.1)
    assert rates(optimizer) == [(0.02, 0.1), (0.002, 0), (2, 0), (1, 0.1)]
    assert not optimizer.param_groups[0]["fused"] and optimizer.param_groups[0]["foreach"] is None
# ------------------------------ training
def test_augmentation():
    images = torch.arange(2 * 3 * 8 * 8).reshape(2, 3, 8, 8).to(torch.uint8).repeat(200, 1, 1, 1)
    torch.manual_seed(0)
    out = pah.augment(images, pad=2)
    padded = F.pad(images.float(), (2, 2, 2, 2), mode="reflect").to(torch.uint8)
    seen = set()
    for i in range(len(images)):  # each is one of the 25 crops, mirrored or not, all channels alike
        crops = {(r, c): padded[i, :, r:r + 8, c:c + 8] for r in range(5) for c in range(5)}
        matches = [(*place, m) for place, crop in crops.items() for m in (False, True)
                   if torch.equal(out[i], crop.flip(-1) if m else crop)]
        assert len(matches) == 1
        seen |= set(matches)
    assert len(seen) == 50 and torch.equal(pah.augment(images, pad=0, flip=False), images)
class Evil:
    """An object that runs a command where it is unpickled."""
    def __init__(self, folder):
        self.folder = folder
    def __reduce__(self):
        return os.system, (f"touch {self.folder}/executed",)
def raising(error):
    def raise_it(*args, **kwargs):
        raise error
    return raise_it
def run_main(*args, code=0):
    assert pah.main([str(a) for a in args]) == code
def fails(capsys, *args):
    """Runs main, which must end with code 2 and one line; returns the line."""
    capsys.readouterr()
    run_main(*args, code=2)
    err = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("reading ")]
    assert len(err) == 1 and err[0].startswith("pah.py: ") and "Traceback" not in err[0], err
    return err[0]
def results(out, seed=0):
    return json.loads((out / f"seed{seed}/results.json").read_text())
def weights(out, seed=0):
    return torch.load(out / f"seed{seed}/checkpoint.pt", weights_only=True)["model"]
def same(a, b):
    return all(torch.equal(a[n], b[n]) for n in a)
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

def test_earlier_data_is_never_read_again(tmp_path, monkeypatch):
    """Once a task is trained its images and labels are overwritten; every weight ends up the same."""
    run_main(*TINY_RUN, "--stop-after", 3, "--out", tmp_path / "a")
    train_task = pah.train_task
    def train_and_destroy(model, loss, images, labels, *rest):
        trained = train_task(model, loss, images, labels, *rest)
        assert images.any()
        images.zero_(), labels.zero_()
        return trained
    monkeypatch.setattr(pah, "train_task", train_and_destroy)
    run_main(*TINY_RUN, "--stop-after", 3, "--out", tmp_path / "b")
    assert same(weights(tmp_path / "a"), weights(tmp_path / "b"))

def test_seeds_and_nothing_else_decide(tmp_path, capsys, monkeypatch):
    run_main(*TINY_RUN, "--stop-after", 2, "--seeds", 0, 1, 0, "--out", tmp_path / "a")
    assert "2 seeds: AA" in capsys.readouterr().out
    evaluate = pah.evaluate
    monkeypatch.setattr(pah, "evaluate", lambda *a: (evaluate(*a), evaluate(*a))[1])  # evaluated once more
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)  # printed more often
    run_main(*TINY_RUN, "--stop-after", 2, "--out", tmp_path / "b")
    assert same(weights(tmp_path / "a"), weights(tmp_path / "b"))
    assert not same(weights(tmp_path / "a", 1), weights(tmp_path / "a", 0))

@pytest.mark.parametrize("flags", [["--head", "stored"], ["--head", "vector"], ["--joint"], ["--proto-init", "random"],
                                   ["--precision", "bf16", "--stem", "7x7", "--width", "8"],
                                   ["--val-fraction", "0.2", "--shuffle-classes"], ["--optimizer", "adamw"],
                                   ["--stem", "7x7", "--image-size", "32"], ["--sp-tasks", "1", "--sp-updates", "all", "--stop-after", "3"]])
def test_every_kind_of_run_ends(flags, tmp_path):
    run_main(*TINY_RUN, "--stop-after", 2, "--out", tmp_path, *flags)
    r = results(tmp_path)
    assert r["complete"] and r["AA"] > 10
    load_checkpoint(tmp_path / "seed0/checkpoint.pt")
    if flags == ["--joint"]:  # of two tasks: it trains on and is scored on these
        assert [len(row) for row in r["accuracy"]] == [2] and r["FM"] is None
        assert not weights(tmp_path)["prototypes"][2:].any()

def test_flags_of_the_loss_reach_it():
    flags = dict(lam=0.3, mu=0.4, temperature=3.0, sp_tasks=2, sp_updates="all")
    args = pah.parse_args([f"--{name.replace('_', '-')}={value}" for name, value in flags.items()])
    assert flags.items() <= pah.loss_of_task(pair()[0], 1, args).keywords.items()

def test_progress_fits_the_terminal(capsys, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "40")
    args = pah.parse_args(["--dataset", "synthetic"])
    for step in 24, 25, 80:
        pah.print_progress(1, args, 3, time.perf_counter() - 10, step, 80, 64, torch.rand(80, 3))
    shown = capsys.readouterr().out.split("\r")
    assert [len(line) for line in shown] == [0, 39, 0, 39, 0] and shown[1].startswith("task 2/5 epoch 3/8  hm 0.")

def test_compile_makes_no_graph_after_the_second_task(tmp_path, monkeypatch):
    """With a backend that needs no C++ compiler; and every loss is as without it, within rounding."""
    import torch._dynamo.utils
    compile_module, joint_loss, graphs, losses = nn.Module.compile, pah.joint_loss, [], {}
    def noted(*args, **kwargs):
        loss = joint_loss(*args, **kwargs)
        losses.setdefault(name, []).append(loss[1])
        return loss
    monkeypatch.setattr(pah, "joint_loss", noted)
    monkeypatch.setattr(nn.Module, "compile", lambda self: compile_module(self, backend="eager"))
    evaluate = pah.evaluate
    monkeypatch.setattr(pah, "evaluate", lambda *a: (
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"]), evaluate(*a))[1])
    torch._dynamo.reset()
    for name in "eager", "compiled":
        torch._dynamo.utils.counters.clear()
        flags = ["--compile"] if name == "compiled" else []
        run_main(*TINY_RUN, "--width", 8, "--precision", "bf16", *flags, "--lr", 0.001, "--out", tmp_path / name)
    assert graphs[-5] > 0 and graphs[-3] == graphs[-1], graphs[-5:]
    torch.testing.assert_close(torch.stack(losses["compiled"]), torch.stack(losses["eager"]), rtol=0.02, atol=0.02)

def test_weights_that_are_no_numbers_are_not_saved(tmp_path, capsys, monkeypatch):
    """The last step of task 2 breaks them, after its loss was computed."""
    step, calls = pah.Muon.step, []
    def breaking(self, *args):
        step(self, *args)
        calls.append(1)
        if len(calls) == 32:
            self.param_groups[0]["params"][0].data[0] = float("nan")
    monkeypatch.setattr(pah.Muon, "step", breaking)
    err = fails(capsys, *TINY_RUN, "--out", tmp_path)  # 16 steps a task
    assert "epoch 1" in err and "--lr" in err
    assert len(results(tmp_path)["accuracy"]) == 1 and not results(tmp_path)["complete"]
    assert all(v.isfinite().all() for v in weights(tmp_path).values())

def test_ctrl_c(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(pah, "evaluate", raising(KeyboardInterrupt))
    run_main(*TINY_RUN, "--out", tmp_path, code=130)
    assert "--resume" in capsys.readouterr().err
# ------------------------------ torchrun
def test_torchrun_is_the_same_run(tmp_path):
    """Two processes on the CPU share each batch, and end with the weights of one. (BatchNorm is synchronised on GPUs only.)"""
    (tmp_path / "script.py").write_text("import sys, torch, pah\n"
        "torch.nn.BatchNorm2d = lambda channels: torch.nn.GroupNorm(1, channels)\nsys.exit(pah.main())")
    runs = []
    for out, launch in ("one", []), ("two", ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]):
        command = [sys.executable, *launch, tmp_path / "script.py", *TINY_RUN, "--stop-after", "2", "--lr", "0.002"]
        env = os.environ | {"PYTHONPATH": str(HERE), "OMP_NUM_THREADS": "1"}
        runs.append(subprocess.Popen([*command, "--out", tmp_path / out], text=True, stdout=subprocess.PIPE, env=env))
    for process in runs:
        said, _ = process.communicate(timeout=300)
        assert process.returncode == 0 and said.count("task  2/5") == 1  # one of them prints
    for (name, one), two in zip(weights(tmp_path / "one").items(), weights(tmp_path / "two").values()):
        torch.testing.assert_close(two, one, rtol=0.01, atol=0.005, msg=name)
    assert results(tmp_path / "two")["processes"] == 2

def test_torchrun_shares_evenly(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(pah, "WORLD", 3)
    for size in 64, 3:
        assert f"--batch-size {size}" in fails(capsys, "--dataset", "synthetic", "--out", tmp_path, "--batch-size", size)
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda backend: None)
    monkeypatch.setattr(pah, "WORLD", 500)
    assert "has 800 images" in fails(capsys, "--dataset", "synthetic", "--batch-size", 1000, "--out", tmp_path)
    assert not list(tmp_path.iterdir())
# ------------------------------ data
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
    with pytest.raises(Problem, match="'c0' lacks"):
        split_tasks(data._replace(test_labels=data.test_labels.clamp(min=2)), 3)
    sorted_data = load_dataset("synthetic")  # sorted by class: tasks are views of it
    assert split_tasks(sorted_data, 5)[1].train_images.data_ptr() == sorted_data.train_images[800].data_ptr()

def test_validation_split_is_training_images_only():
    for task in split_tasks(counted_data(), 2, val_fraction=0.2):
        train, held_out = (set(x[:, 0, 0, 1].tolist()) for x in (task.train_images, task.test_images))
        assert len(train) == 24 and len(held_out) == 6 and not train & held_out
        assert max(train | held_out) < 100  # test images would be 100 and more
        assert torch.bincount(task.test_labels).tolist() == [2, 2, 2]
def fake_cifar100(root, monkeypatch):
    """The published layout: three pickles whose MD5 sums torchvision checks."""
    from torchvision.datasets import CIFAR100
    folder = root / "cifar-100-python"
    folder.mkdir(parents=True)
    rng, files, md5 = np.random.default_rng(0), {}, {}
    for split, per_class in ("train", 2), ("test", 1):
        labels = list(range(100)) * per_class
        files[split] = dict(data=rng.integers(0, 256, (len(labels), 3072), dtype=np.uint8), fine_labels=labels)
    for name, value in [*files.items(), ("meta", dict(fine_label_names=[f"name{i}" for i in range(100)]))]:
        (folder / name).write_bytes(pickle.dumps(value))
        md5[name] = hashlib.md5((folder / name).read_bytes()).hexdigest()
    monkeypatch.setattr(CIFAR100, "train_list", [["train", md5["train"]]])
    monkeypatch.setattr(CIFAR100, "test_list", [["test", md5["test"]]])
    monkeypatch.setattr(CIFAR100, "meta", dict(CIFAR100.meta, md5=md5["meta"]))
    return files
def test_cifar100(tmp_path, monkeypatch):
    files = fake_cifar100(tmp_path, monkeypatch)
    data = load_dataset("cifar100", tmp_path)
    in_order = files["train"]["data"].reshape(2, 100, 3, 32, 32).swapaxes(0, 1).reshape(-1, 3, 32, 32)  # by class
    assert np.array_equal(data.train_images.numpy(), in_order) and data.classes[7] == "name7"
    assert data.train_labels.tolist() == sorted(files["train"]["fine_labels"])
    again = load_dataset("cifar100", tmp_path)
    assert torch.equal(again.train_images, data.train_images) and again.signature == data.signature
    assert load_dataset("cifar100", tmp_path, 16).test_images.shape == (100, 3, 16, 16)
    (tmp_path / "pah-cifar100-32.pt").unlink()
    (tmp_path / "cifar-100-python/train").write_bytes(b"?")
    with pytest.raises(Problem, match="cifar-100-python: damaged; move it"):
        load_dataset("cifar100", tmp_path)

def test_mnist(tmp_path):
    raw, rng = tmp_path / "MNIST/raw", np.random.default_rng(0)
    raw.mkdir(parents=True)
    pixels = rng.integers(0, 256, (20, 28, 28), dtype=np.uint8)
    for split, n in ("train", 20), ("t10k", 10):
        (raw / f"{split}-images-idx3-ubyte").write_bytes(struct.pack(">4i", 2051, n, 28, 28) + pixels[:n].tobytes())
        (raw / f"{split}-labels-idx1-ubyte").write_bytes(struct.pack(">2i", 2049, n) + bytes(i % 10 for i in range(n)))
    data = load_dataset("mnist", tmp_path, 28)
    assert np.array_equal(data.test_images.numpy(), np.repeat(pixels[:10, None], 3, 1))
    assert data.test_labels.tolist() == list(range(10)) and len(split_tasks(data, 5)) == 5
def picture(value, mode="RGB", size=(64, 64), format="PNG", **options):
    f = io.BytesIO()
    Image.new(mode, size, value).save(f, format, **options)
    return f.getvalue()
def test_tinyimagenet(tmp_path, monkeypatch):
    """The published layout with three classes, greyscale images among them."""
    monkeypatch.setattr(pah, "TINY_COUNTS", [12, 3])
    root = tmp_path / "tiny-imagenet-200"
    (root / "val/images").mkdir(parents=True)
    for c, wnid in enumerate(["n03", "n01", "n02"]):
        (root / f"train/{wnid}/images").mkdir(parents=True)
        for i in range(4):
            value, mode = 40 * c + 10 * i + 20, "L" if c == 0 and i == 0 else "RGB"
            blob = picture(value if mode == "L" else (value,) * 3, mode, format="JPEG")
            (root / f"train/{wnid}/images/{wnid}_{i}.JPEG").write_bytes(blob)
        (root / f"val/images/val_{c}.JPEG").write_bytes(picture((200 + 10 * c,) * 3, format="JPEG"))
    lines = [f"val_{c}.JPEG\t{wnid}\t0\t0\t62\t62" for c, wnid in enumerate(["n03", "n01", "n02"])]
    (root / "val/val_annotations.txt").write_text("\n".join(lines))
    (root / "words.txt").write_text("\n".join(f"{wnid}\tthing {wnid}, other name" for wnid in ("n03", "n01", "n02")))
    data = load_dataset("tinyimagenet", tmp_path)
    assert data.classes == ["thing n01", "thing n02", "thing n03"]
    assert data.train_labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert data.train_images[:, 0, 30, 30].tolist() == [60, 70, 80, 90, 100, 110, 120, 130, 20, 30, 40, 50]
    assert data.test_labels.tolist() == [0, 1, 2] and data.test_images[:, 1, 30, 30].tolist() == [210, 220, 200]
    (tmp_path / "pah-tinyimagenet-64.pt").unlink()
    (root / "train/n01/images/n01_2.JPEG").unlink()
    with pytest.raises(Problem, match="damaged.*11 and 3 images"):
        load_dataset("tinyimagenet", tmp_path)
@pytest.fixture
def folder(tmp_path):
    """A folder data set of two classes, with images of several kinds."""
    root = tmp_path / "my images"
    for split in ("train", "val"):
        for c, name in enumerate(["cat", "dög"]):
            (root / split / name).mkdir(parents=True)
            (root / split / name / "a.png").write_bytes(picture((50 + 100 * c,) * 3, size=(40, 20)))
            (root / split / name / "b.png").write_bytes(picture(50 + 100 * c, "L"))
            (root / split / name / "c.png").write_bytes(picture((50 + 100 * c,) * 3 + (9,), "RGBA"))
            array = np.full((9, 9), (50 + 100 * c) * 256, np.uint16)
            Image.fromarray(array).save(root / split / name / "d.png")
    return root
def test_folder_and_its_cache(folder, tmp_path, capsys):
    """A cache that is damaged, made of other files, or holds pickled objects is built anew; no code in it is run."""
    root = tmp_path / "data"
    data = load_dataset(str(folder), root, 16)
    assert data.classes == ["cat", "dög"] and data.train_images.shape == (8, 3, 16, 16)
    assert (data.train_images == torch.tensor([50] * 4 + [150] * 4)[:, None, None, None]).all()
    (cache,) = root.iterdir()
    assert cache.name.startswith("pah-folder-my images-")
    blob, saved = cache.read_bytes(), torch.load(cache, weights_only=True)
    capsys.readouterr()
    for bad in blob[:len(blob) // 2], b"", {"data": [Evil(tmp_path)]}, {"data": saved["data"][:3]}, {"source": "other"}:
        cache.write_bytes(bad) if isinstance(bad, bytes) else torch.save(saved | bad, cache)
        assert torch.equal(load_dataset(str(folder), root, 16).train_images, data.train_images)
        assert "reading" in capsys.readouterr().err and not (tmp_path / "executed").exists()
    load_dataset(str(folder), root, 16)
    assert capsys.readouterr().err == ""  # read from the cache
    (folder / "train/cat/e.png").write_bytes(picture((1, 1, 1)))
    changed = load_dataset(str(folder), root, 16)
    assert len(changed.train_images) == 9 and changed.signature != data.signature
    assert "of other files" in capsys.readouterr().err

def test_own_folder_of_a_published_name(folder, tmp_path, monkeypatch):
    """`cifar100` of one's own does not touch the published one's cache, nor does that of a namesake elsewhere."""
    fake_cifar100(tmp_path / "data", monkeypatch)
    published = load_dataset("cifar100", tmp_path / "data")
    for place in "here", "there":
        (tmp_path / place).mkdir()
        (tmp_path / place / "cifar100").symlink_to(folder) if place == "here" else folder.rename(tmp_path / place / "cifar100")
        assert len(load_dataset(str(tmp_path / place / "cifar100"), tmp_path / "data", 32).train_images) == 8
    assert torch.equal(load_dataset("cifar100", tmp_path / "data").train_images, published.train_images)
    assert len(list((tmp_path / "data").glob("pah-*.pt"))) == 3

def test_odd_but_good_folders(folder, tmp_path):
    """Images of any mode, size and orientation, files that are no images, hidden files, links in and out."""
    (folder / "train/cat/cmyk.jpg").write_bytes(picture((0, 0, 0, 0), "CMYK", format="JPEG"))
    (tmp_path / "elsewhere.png").write_bytes(picture((77, 77, 77)))
    (folder / "train/cat/z.png").symlink_to(tmp_path / "elsewhere.png")
    for name in "train/cat/notes.txt", "train/cat/.DS_Store", "train/README", "val/.hidden":
        (folder / name).write_bytes(b"not an image")
    (folder / "train/cat/up").symlink_to(folder / "train")  # leads back up: nothing is counted twice
    (folder / "train/dög").rename(tmp_path / "dogs")
    (folder / "train/dög").symlink_to(tmp_path / "dogs")  # a class may be a link
    half = Image.new("RGB", (16, 16))
    half.paste((255, 255, 255), (0, 0, 16, 8))
    exif = Image.Exif()
    exif[0x112] = 3  # upside down
    half.save(tmp_path / "dogs/turned.png", exif=exif)
    data = load_dataset(str(folder), tmp_path / "data", 16)
    assert len(data.train_images) == 8 + 2 + 1 and data.train_labels.tolist() == [0] * 6 + [1] * 5
    assert set(data.train_images[5].flatten().tolist()) == {77}  # files in the order of their names: z.png
    assert data.train_images[3].float().mean() > 250  # cmyk.jpg is white
    assert not data.train_images[-1, :, :8].any() and (data.train_images[-1, :, 8:] == 255).all()
    (tmp_path / "dogs/a.png").write_bytes(picture((1, 1, 1), size=(41, 20)))  # behind the link: it counts
    assert not torch.equal(load_dataset(str(folder), tmp_path / "data", 16).train_images, data.train_images)

@pytest.mark.parametrize("break_it, says", [
    (lambda f: [p.unlink() for p in (f / "train/cat").iterdir()], "cat"),
    (lambda f: (f / "val/cat").rename(f / "val/cow"), "cat, cow"),
    (lambda f: (f / "val").rename(f / "test"), "no folder val/"),
    (lambda f: (f / "train/cat/a.png").write_bytes(b"no image"), "cat/a.png: not a readable image"),
    (lambda f: (f / "val/cat/t.jpg").write_bytes(picture((1, 2, 3), format="JPEG")[:400]), "cat/t.jpg: not a readable image"),
    (lambda f: (f / "val/cat/link.png").symlink_to(f / "nowhere.png"), "cat/link.png: not a readable image"),
    (lambda f: os.mkfifo(f / "val/cat/pipe.png"), "cat/pipe.png: not a readable image"),
    (lambda f: (f / "train/cow").mkdir(), "cow"),
])
def test_bad_folders(break_it, says, folder, tmp_path, capsys):
    break_it(folder)
    assert says in fails(capsys, "--dataset", folder, "--tasks", 1, "--data", tmp_path / "d", "--out", tmp_path / "o")
    assert not (tmp_path / "o").exists() and not list(tmp_path.glob("d/*"))

def test_no_network(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("urllib.request.urlopen", raising(OSError("Name or service not known")))
    for dataset, place in ("cifar100", "cifar-100-python"), ("tinyimagenet", "tiny-imagenet-200"), ("mnist", "MNIST"):
        run_main("--dataset", dataset, "--data", tmp_path / "d", "--out", tmp_path / "o", code=2)
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("pah.py:")]
        assert place in line and "--dataset synthetic" in line and str(tmp_path / "d") in line

def test_files_of_the_user_stay(tmp_path, folder, capsys):
    """Whatever its name, what this program did not write is there afterwards."""
    names = [".notes.2024.tmp", ".download-manager/a", "cifar-100-python.tar.gz", "cifar100-32.pt", "seed0/.results.json.1.tmp"]
    for name in names:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("mine")
    run_main("--dataset", folder, *TINY_RUN[2:], "--tasks", 1, "--data", folder, "--out", folder)
    assert all((folder / name).read_text() == "mine" for name in names)
    (folder / "seed0/checkpoint.pt").unlink()  # then the rest may be somebody's
    assert "move them away" in fails(capsys, "--dataset", folder, *TINY_RUN[2:], "--tasks", 1, "--data", folder, "--out", folder)

def test_processes_build_one_cache_each(folder, tmp_path):
    """Three at once on a cold cache, on a file system without locks or with: all end well, one file is left."""
    code = ("import sys, pah\ndecode = pah.decode\n"
            "pah.decode = lambda *a: (__import__('time').sleep(1), decode(*a))[1]\n"
            "assert len(pah.load_dataset(sys.argv[1], sys.argv[2], 16).train_images) == 8")
    command = [sys.executable, "-c", code, str(folder), str(tmp_path / "data")]
    processes = [subprocess.Popen(command, cwd=HERE) for _ in "123"]
    assert [process.wait() for process in processes] == [0, 0, 0] and len(list((tmp_path / "data").iterdir())) == 1
# ------------------------------ results
def test_results_and_files(learned):
    r, folder = results(learned), learned / "seed0"
    assert r["complete"] and [len(row) for row in r["accuracy"]] == [1, 2, 3, 4, 5]
    assert r["AA"] == pah.average_accuracy(r["accuracy"]) and r["FM"] == pah.forgetting(r["accuracy"])
    assert r["BWT"] == pah.backward_transfer(r["accuracy"]) and r["LA"] == pah.learning_accuracy(r["accuracy"])
    assert r["parameters"]["prototypes_per_task"] == 4 * 3 * 10 * 10 and r["args"]["lam"] == 1
    assert r["seconds"] > 0 and r["peak_memory_bytes"] > 2**20 and r["versions"]["torch"]
    assert {p.name for p in folder.iterdir()} == {"results.json", "checkpoint.pt", "prototypes.png", "accuracy.png", ".pah-lock"}
    assert Image.open(folder / "prototypes.png").size == (4 * 42 + 2, 5 * 42 + 2)

def test_checkpoint_predicts_and_holds_no_image_and_no_head(learned):
    model, r = load_checkpoint(learned / "seed0/checkpoint.pt"), results(learned)
    tasks = split_tasks(load_dataset("synthetic"), 5)
    assert pah.evaluate(model, tasks) == (r["accuracy"][-1], r["class_incremental"][-1]) and not model.training
    saved = torch.load(learned / "seed0/checkpoint.pt", weights_only=True)
    assert set(saved["model"]) == set(PAH(ResNet18(8), 5, 4).state_dict())
    assert not any(isinstance(v, torch.Tensor) for v in saved.values())
    assert saved["model"]["prototypes"].shape == (5, 4, 3, 10, 10)
    small = F.interpolate(pah.normalise(tasks[1].train_images), 10, mode="bilinear", antialias=True)
    assert (small[:, None] - saved["model"]["prototypes"][1]).abs().amax((2, 3, 4)).min() > 1e-3  # learned, not images

SLOW_WRITER = """
import sys, time, torch, pah; save = torch.save
torch.save = lambda value, path: (open(path, "wb").write(b"half"), time.sleep(0.3), save(value, path))
sys.exit(pah.main(sys.argv[1:]))
"""
def test_killed_anywhere(tmp_path):
    """SIGKILL, in turn while it trains and while it writes: whatever is there under its own name is whole, and --resume
    ends with the very weights of a run that was left alone."""
    flags = *TINY_RUN, "--stop-after", "3"
    run_main(*flags, "--out", tmp_path / "whole")
    folder = tmp_path / "cut/seed0"
    for kill in "writing", "writing", "training", "writing", "never":
        command = [sys.executable, "-c", SLOW_WRITER, *flags, "--out", folder.parent, "--resume"]
        process = subprocess.Popen(command, cwd=HERE, stdout=subprocess.PIPE, text=True)
        while kill == "writing" and not (folder / ".checkpoint.pt.pah-writes").exists():
            time.sleep(0.002)
        if kill == "training":
            process.stdout.readline(), time.sleep(0.2)
        if kill != "never":
            process.kill()
        assert process.communicate() and process.returncode == (0 if kill == "never" else -signal.SIGKILL)
        readers = {".pt": load_checkpoint, ".json": lambda f: json.loads(f.read_text()), ".png": lambda f: Image.open(f).load()}
        for file in [file for file in folder.iterdir() if not file.name.startswith(".")]:
            readers[file.suffix](file)
        if kill == "writing":
            (folder / ".checkpoint.pt.pah-writes").unlink()  # for the next wait; a run would write over it
    assert same(weights(tmp_path / "whole"), weights(folder.parent)) and len(results(folder.parent)["accuracy"]) == 3

def test_a_full_disk_leaves_the_last_checkpoint(tmp_path, capsys, monkeypatch):
    run_main(*TINY_RUN, "--stop-after", 1, "--out", tmp_path)
    before = (tmp_path / "seed0/checkpoint.pt").read_bytes()
    def full(value, path):
        path.write_bytes(b"half")
        raise RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos")
    monkeypatch.setattr(torch, "save", full)
    assert "cannot be written" in fails(capsys, *TINY_RUN, "--stop-after", 2, "--out", tmp_path, "--resume")
    assert (tmp_path / "seed0/checkpoint.pt").read_bytes() == before
    assert [p.name for p in (tmp_path / "seed0").glob(".*")] == [".pah-lock"]

def test_what_a_folder_holds(tmp_path, capsys, monkeypatch):
    """Another run, a finished one, one of another seed, on other images, one that is busy; damaged or strange files."""
    out, checkpoint = tmp_path / "o", tmp_path / "o/seed0/checkpoint.pt"
    tiny = [*TINY_RUN, "--out", out]
    run_main(*tiny, "--stop-after", 1)
    assert "1 of 1 tasks: add --resume" in fails(capsys, *tiny, "--stop-after", 1)
    assert "1 of 2 tasks: add --resume" in fails(capsys, *tiny, "--stop-after", 2)
    line = fails(capsys, *tiny, "--lam", 0, "--lr", 0.1)  # the differing options come first, with or without --resume
    assert "another run: --lam 1.0 there, 0.0 now; --lr 0.01 there, 0.1 now" in line
    with pah.locked(out / "seed0"):
        assert "another run is writing there" in fails(capsys, *tiny, "--stop-after", 2, "--resume")
    (out / "seed0").rename(out / "seed1")
    assert "--seed 0 there, 1 now" in fails(capsys, *tiny, "--seeds", 1, "--stop-after", 2, "--resume")
    (out / "seed1").rename(out / "seed0")
    with monkeypatch.context() as m:
        changed = load_dataset("synthetic")._replace(signature="changed")
        m.setattr(pah, "synthetic", lambda size: changed)
        assert "--images" in fails(capsys, *tiny, "--stop-after", 2, "--resume")
    run_main(*tiny[:-1], tmp_path / "j", "--joint", "--stop-after", 2)  # another run than of five tasks
    assert "--stop-after 2 there" in fails(capsys, *tiny[:-1], tmp_path / "j", "--joint", "--resume")
    (out / "seed0/results.json").write_text("")  # lost: made again from the checkpoint
    run_main(*tiny, "--stop-after", 1, "--resume")
    assert results(out)["complete"]
    whole, saved = checkpoint.read_bytes(), torch.load(checkpoint, weights_only=True)
    model, name = saved["model"], "backbone.conv1.weight"
    for bad in (whole[:len(whole) // 2], b"", b"garbage", {"something": "else"}, {"format": 3, "args": Evil(tmp_path)},
                saved | {"format": 2}, saved | {"model": model | {name: model[name][:1]}}, saved | {"accuracy": []},
                saved | {"model": model | {"extra": model[name]}}, saved | {"args": {}},
                saved | {"model": {n: v for n, v in model.items() if n != name}},
                {k: v for k, v in saved.items() if k != "class_incremental"}):
        checkpoint.write_bytes(bad) if isinstance(bad, bytes) else torch.save(bad, checkpoint)
        before = checkpoint.read_bytes()
        assert "damaged" in fails(capsys, *tiny, "--stop-after", 2, "--resume")
        with pytest.raises(Problem):
            load_checkpoint(checkpoint)
        assert checkpoint.read_bytes() == before and not (tmp_path / "executed").exists()

def test_a_picture_that_fails_and_a_folder_that_vanishes(tmp_path, capsys, monkeypatch):
    train_task = pah.train_task
    def train_and_remove(*args):
        trained = train_task(*args)
        shutil.rmtree(tmp_path / "o")
        return trained
    monkeypatch.setattr(pah, "draw_accuracy", raising(ImportError("The _imagingft C module is not installed")))
    monkeypatch.setattr(pah, "train_task", train_and_remove)
    run_main(*TINY_RUN, "--stop-after", 2, "--out", tmp_path / "o")
    assert capsys.readouterr().err.count("a picture could not be drawn (The _imagingft") == 2
    assert load_checkpoint(tmp_path / "o/seed0/checkpoint.pt") and len(results(tmp_path / "o")["accuracy"]) == 2

def test_report(tmp_path, capsys):
    def leave(name, seed, AA, FM, complete=True, **options):
        folder = tmp_path / name / f"seed{seed}"
        folder.mkdir(parents=True)
        args = vars(pah.parse_args(["--dataset", "synthetic"])) | {"out": name, "seeds": [seed]} | options
        r = dict(args=args, seed=seed, AA=AA, FM=FM, LA=AA + 1, seconds=61, complete=complete, class_incremental=[7, AA / 2])
        (folder / "results.json").write_text(json.dumps(r))
    leave("a", 0, 80.0, 1.0), leave("a", 1, 82.0, 3.0), leave("b", 0, 40.0, 50.0, lam=0.0)
    leave("c", 0, 90.0, None, joint=True), leave("d", 2, 1.0, 1.0, complete=False)
    leave("f", 0, 80.0, 1.0)  # seed 0 of the first setting once more: no third seed
    leave("junk0", 3, float("nan"), 1.0), leave("junk1", 0, 80.0, 1.0, dataset=7)
    for i, junk in enumerate([b"{", b"[]", b"null", b'"x"', b"\xff", b"{}", b'{"args": 1}', b"[" * 100_000]):
        (tmp_path / f"e{i}").mkdir(), (tmp_path / f"e{i}/results.json").write_bytes(junk)
    (tmp_path / "g/results.json").mkdir(parents=True)
    (tmp_path / "h").mkdir(), os.mkfifo(tmp_path / "h/results.json")
    run_main("--report", tmp_path)
    out, err = capsys.readouterr()
    assert [line.split("  ")[0] for line in out.splitlines()[1:]] == [
        "synthetic, 5 tasks", "synthetic, 5 tasks --lam 0.0", "synthetic, 5 tasks --joint"], out
    assert "81.00 ± 1.41" in out and "2.00 ± 1.41" in out and "40.50 ± 0.71" in out and "0 1" in out and "0:01:01" in out
    assert err.count("left out") == 14 == err.count("\n") and "d/seed2" in err and "counted already" in err
    run_main("--report", tmp_path, "--format", "markdown")
    assert all(line.count("|") == 9 for line in capsys.readouterr().out.splitlines())
    leave("l", 0, 70.0, 2.0, dataset="a&b_50%#")
    run_main("--report", tmp_path, "--format", "latex")
    out = capsys.readouterr().out
    assert out.count(" & ") == 35 and "81.00 $\\pm$ 1.41" in out and r"a\&b\_50\%\#, 5 tasks" in out
    assert "no finished results.json" in fails(capsys, "--report", tmp_path / "g/results.json")
    leave("m", 0, 70.0, 2.0, dataset="cifar100"), leave("n", 0, 70.0, 2.0, dataset="tinyimagenet")
    run_main("--report", tmp_path)
    reported = [line.split() for line in capsys.readouterr().out.splitlines() if "(reported)" in line]
    assert len(reported) == 18 and [" ".join(words[4:10]) for words in reported if words[1] == "PAH"] == [
        "74.46 ± 0.08 1.71 ± 0.02", "63.65 ± 1.94 4.43 ± 0.07"]
# ------------------------------ command line
def test_bench(capsys):
    run_main("--dataset", "synthetic", "--width", 4, "--bench", "--sp-tasks", 1)
    out = capsys.readouterr().out
    assert all(words in out for words in ("task 1 ", "task 2 ", "task 3 ", "task 5 ", "peak memory:", "predicted: 0:"))
    assert all(len(line) <= 80 for line in out.splitlines())

def test_run_all(tmp_path):
    """With a stand-in for Python that notes what it is called with: all settings parse, and all are run."""
    stub = tmp_path / "python"
    stub.write_text(f"""#!/bin/sh
case "$*" in
  *device_count*) echo 0 ;;
  *--bench*) echo "predicted: 1:02:03 for 5 tasks of 8 epochs, a seed" ;;
  *) echo "$*" >>{tmp_path}/calls; echo "AA 50.00" ;;
esac
""")
    stub.chmod(0o755)
    script = shutil.copy(HERE / "run_all.sh", tmp_path)
    for flags, count in (["--quick"], 19), (["--epochs", "3"], 35):
        done = subprocess.run(["bash", script, *flags], capture_output=True, text=True, env=os.environ | {"PYTHON": str(stub)})
        assert done.returncode == 0 and "1:02:03" in done.stdout, done.stderr
        calls = (tmp_path / "calls").read_text().splitlines()
        (tmp_path / "calls").unlink()
        settings = {json.dumps(vars(pah.parse_args(call.split()[1:])), sort_keys=True) for call in calls}
        assert len(settings) == len(calls) == count + 1 and "--report" in calls[-1]

def test_default_output_folder_and_data_set_names():
    out = lambda *flags: pah.parse_args([*flags, "--device", "cpu"]).out
    assert out() == out("--precision", "auto") == "runs/cifar100-10" != out("--precision", "fp32", "--epochs", "3")
    assert out("--lam", "0", "--mu", "0") == "runs/cifar100-10-lam-0.0-mu-0.0" and out("--joint") == "runs/cifar100-10-joint"
    assert pah.parse_args(["--dataset", "./small/"]).dataset == pah.parse_args(["--dataset", "small"]).dataset == "small"
    rates = [pah.parse_args(flags.split()).lr for flags in ("--optimizer adamw", "--dataset synthetic", "--optimizer adamw --lr 3")]
    assert rates == [0.002, 0.01, 3]

@pytest.mark.parametrize("flags, says", [
    ("--dataset nowhere", "nowhere: no folder train/"), ("--dataset synthetic --tasks 3", "do not divide"),
    ("--tasks 0", "--tasks: 0 is not"), ("--tasks 2.5", "--tasks"), ("--epochs nan", "--epochs"),
    ("--batch-size 1", "--batch-size"), ("--lr 0", "--lr"), ("--lr nan", "--lr"), ("--lr x", "--lr: invalid number"),
    ("--lam -0.1", "--lam"), ("--mu inf", "--mu"), ("--optimizer sgd", "--optimizer"), ("--report nowhere", "nowhere"),
    ("--image-size 4", "--image-size"), ("--val-fraction 1", "--val-fraction"), ("--seeds", "--seeds"),
    ("--stop-after 11", "--stop-after 11"), ("--pretrained", "--pretrained"), ("--unknown 1", "--unknown"),
    ("--device cuda", "--device cuda")])
def test_bad_flags(flags, says, capsys, tmp_path):
    if "cuda" in flags and torch.cuda.is_available():
        pytest.skip("has CUDA")
    assert says in fails(capsys, *flags.split(), "--data", tmp_path / "d", "--out", tmp_path / "o")
    assert not list(tmp_path.iterdir())

def test_out_of_memory_and_other_errors(capsys, monkeypatch, tmp_path):
    for error in RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), MemoryError("", 7), \
            torch.OutOfMemoryError("CUDA out of memory."):
        monkeypatch.setattr(pah, "learn", raising(error))
        assert "try a smaller --batch-size" in fails(capsys, *TINY_RUN, "--out", tmp_path)
    monkeypatch.setattr(pah, "learn", raising(RuntimeError("a defect")))
    with pytest.raises(RuntimeError, match="a defect"):  # is not hidden
        pah.main([*TINY_RUN, "--out", str(tmp_path)])

def test_standard_output_that_is_closed(learned):
    command = f"{sys.executable} {pah.__file__} --report {learned}"
    for how, code in (">&-", 0), ("| (exec <&-; sleep 3)", 2), ("", 0):
        done = subprocess.run(["bash", "-c", f"{command} {how}; exit ${{PIPESTATUS[0]}}"], capture_output=True, text=True)
        assert done.returncode == code and "Traceback" not in done.stderr and "ignored" not in done.stderr, done.stderr

@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_cuda(precision, tmp_path):
    run_main("--dataset", "synthetic", "--epochs", 5, "--device", "cuda", "--precision", precision, "--out", tmp_path)
    assert results(tmp_path)["AA"] > 60

@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_a_step_does_not_wait_for_the_gpu():
    model, teacher, x, y = pair()
    model, x, y = model.cuda(), x.cuda(), y.cuda()
    teacher = Teacher(model, 3)
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
# ------------------------------ README
README = (HERE / "README.md").read_text()

def test_readme_snippets_run(learned, tmp_path, monkeypatch, capsys):
    """Both of them and the line between, as they stand (the first with one epoch)."""
    (tmp_path / "runs").mkdir()
    os.symlink(learned, tmp_path / "runs/synthetic-5")
    monkeypatch.chdir(tmp_path)
    snippets = [block.split("```")[0] for block in README.split("```python\n")[1:]]
    assert len(snippets) == 2 and all(s.count("\n") < 22 for s in snippets)
    first, second = {}, {}
    exec(snippets[0].replace("range(2)", "range(1)"), first)
    exec(snippets[1], second)
    assert pah.average_accuracy(first["R"]) > 50  # of four classes, after one epoch
    own = eval(README.split("(batch, D): `")[1].split("`")[0], vars(pah) | {"backbone": nn.Flatten(), "D": 12})
    assert own(torch.zeros(2, 3, 2, 2), 9).shape == (2, 10) and second["classes"].shape == (8,)

def test_readme_names_only_flags_that_exist(capsys):
    with pytest.raises(SystemExit):
        pah.main(["--help"])
    flags = set(capsys.readouterr().out.split())
    for command in [line for line in README.splitlines() if line.startswith("python pah.py")]:
        pah.parse_args(command.split("#")[0].split()[2:])
    assert {w.strip("`,|():;.") for w in README.split() if w.startswith("`--")} <= {f.strip("[],") for f in flags}
