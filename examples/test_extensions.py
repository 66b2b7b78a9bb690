"""What the extensions compute, and that they run under the protocol of pah.py."""

import json
import os
import subprocess
import sys
from pathlib import Path

import baselines
import pytest
import torch
import torch.nn.functional as F
from baselines import pah
from extensions import Mirrored, Rehearsal, Rotated, RotatedLabels
from torch import nn

K, C, T = 4, 3, 3.0
RUN = [
    "--dataset",
    "synthetic",
    "--tasks",
    "5",
    "--width",
    "4",
    "--batch-size",
    "50",
    "--epochs",
    "1",
]
RUN += ["--stop-after", "3", "--device", "cpu", "--precision", "fp32"]
HERE = Path(__file__).resolve().parent


def model_of_begun_tasks(method=Rehearsal, **options):
    """Prototypes and BatchNorm statistics that matter."""
    model = method(pah.ResNet18(4), K, C, proto_size=6, hidden=8, temperature=T, **options)
    model.prototypes.data.normal_()
    model.present.fill_(True)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 2)
    return model


def student_and_teacher(**options):
    """A student in training, a teacher with other weights, and a batch of task 3."""
    torch.manual_seed(0)
    teacher = model_of_begun_tasks(**options).eval().requires_grad_(False)
    student = model_of_begun_tasks(**options).train()
    return student, teacher, torch.randn(5, 3, 16, 16), torch.tensor([0, 1, 2, 1, 0])


def softened_kl(new, old):
    """KL(old || new) T^2, written out."""
    p, q = (old / T).softmax(-1), (new / T).softmax(-1)
    return T * T * (p * (p.log() - q.log())).sum(-1)


def run(out, *flags, method="rehearsal"):
    baselines.main([method, *RUN, "--out", str(out), *map(str, flags)])


def weights(out):
    return torch.load(out / "seed0/checkpoint.pt", weights_only=True)["model"]


def test_values_of_the_losses(monkeypatch):
    """Prototypes are in the batch, BatchNorm's statistics too, but not in L_hm and L_sm."""
    model, teacher, images, labels = student_and_teacher(lam=0.7, mu=0.3)
    drawn = torch.randn(2, 3, 16, 16)
    monkeypatch.setattr(model, "draw", lambda task, n, size: drawn if (task, n) == (3, 2) else None)
    with torch.no_grad():
        features = model.backbone(torch.cat([images, drawn]))
        logits = torch.einsum("bd,ncd->bnc", features, model.heads(4))
        log_p = logits[:5, 3].log_softmax(1)
        hm = -sum(log_p[b, labels[b]] for b in range(5)) / 5
        old = teacher(torch.cat([images, drawn]), 3)
        kl = softened_kl(logits[:, :3], old)
    terms = model.losses(images, labels, 3, teacher)
    torch.testing.assert_close(terms["hm"], hm)
    torch.testing.assert_close(terms["sm"], 0.7 * kl[:5].sum(1).mean())
    torch.testing.assert_close(terms["sp"], 0.3 * kl[5:].sum(1).mean())


def test_what_the_loss_on_prototypes_reaches():
    """Tasks 0 and 1 are earlier, 2 is the own one, 3 is to come."""
    model, teacher, images, labels = student_and_teacher()
    model.losses(images, labels, 2, teacher)["sp"].backward()
    of_tasks = model.prototypes.grad.abs().amax((1, 2, 3, 4))
    assert of_tasks[:2].min() > 1e-7 and of_tasks[2:].max() == 0
    for part in (model.backbone, model.hypernetwork):
        assert max(p.grad.abs().max() for p in part.parameters()) > 1e-7


def test_losses_leave_the_teacher_alone():
    model, teacher, images, labels = student_and_teacher()
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    seen = []
    teacher.register_forward_hook(lambda *args: seen.append(args[2].requires_grad))
    sum(model.losses(images, labels, 3, teacher).values()).backward()
    assert seen == [False]
    for name, value in teacher.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_every_earlier_class_is_drawn_as_often():
    torch.manual_seed(0)
    model = model_of_begun_tasks()
    model.augmentation = None
    model.prototypes.data.copy_(torch.arange(K * C).view(K, C, 1, 1, 1).expand_as(model.prototypes))
    model.present[1, 2] = False  # a task of two classes
    drawn = model.draw(3, 4000, (16, 16))
    assert drawn.requires_grad  # prototypes learn as images, too
    assert torch.equal(drawn, drawn[:, :1, :1, :1].expand(4000, 3, 16, 16))
    numbers, counts = drawn[:, 0, 0, 0].round().unique(return_counts=True)
    assert numbers.tolist() == [0, 1, 2, 3, 4, 6, 7, 8]  # those of task 3 are to come
    assert (counts - 500).abs().max() < 100


def test_prototypes_are_shown_as_training_images_are_shown():
    model = model_of_begun_tasks()
    assert model.augmentation is pah.augment
    model.augmentation = None
    images = F.interpolate(model.prototypes[0], 12, mode="bilinear").detach()
    for image in model.draw(1, 20, (12, 12)):
        assert (images - image).abs().amax((1, 2, 3)).min() < 1e-5
    model.augmentation = lambda images: -images.flip(3)
    for image in model.draw(1, 20, (12, 12)):
        assert (images + image.flip(2)).abs().amax((1, 2, 3)).min() < 1e-5


@pytest.mark.parametrize("word", pah.AUGMENTATIONS)
def test_prototypes_are_augmented_as_the_run_does(word):
    args = baselines.parse_args(["rehearsal", *RUN, "--augment", word])
    model = baselines.build(args, pah.load_tasks(args, 0))
    assert isinstance(model, Rehearsal)
    assert model.augmentation is pah.AUGMENTATIONS[word]


def test_without_old_tasks_or_without_mu_it_is_pah():
    model, teacher, images, labels = student_and_teacher()
    assert set(model.losses(images, labels, 0, None)) == {"hm"}
    model.mu = 0
    assert set(model.losses(images, labels, 3, teacher)) == {"hm", "sm"}


def test_a_batch_of_a_single_image():
    model, teacher, images, labels = student_and_teacher()
    terms = model.losses(images[:1], labels[:1], 3, teacher)
    assert all(term.isfinite() for term in terms.values())


@pytest.mark.parametrize("method", ["rehearsal", "rotated", "rotated-lwf"])
def test_a_run_is_resumed_to_the_same_run(method, tmp_path):
    run(tmp_path / "whole", method=method)
    run(tmp_path / "cut", "--stop-after", 2, method=method)
    run(tmp_path / "cut", "--resume", method=method)
    whole, cut = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    for name in whole:
        assert torch.equal(whole[name], cut[name]), name


@pytest.mark.parametrize("method", [pah.PAH, Rehearsal])
def test_a_run_is_loaded_as_pah_or_as_its_own_class(method, tmp_path):
    run(tmp_path, "--stop-after", 2)
    model = pah.load_checkpoint(tmp_path / "seed0/checkpoint.pt", method=method)
    assert type(model) is method
    args = baselines.parse_args(["rehearsal", *RUN])
    row = json.loads((tmp_path / "seed0/results.json").read_text())["accuracy"][1]
    assert pah.evaluate(model, pah.load_tasks(args, 0)[:2])[0] == row


# -----------------------------------------------------------------------------
# Rotated labels


class Seen(Exception):
    """Carries the batch that a method was given."""


class Probe(pah.PAH):
    def losses(self, images, labels, task, teacher):
        raise Seen(images, labels, self(images, task + 1).shape)


class RotatedProbe(RotatedLabels, Probe):
    pass


def test_turned_images_carry_turned_labels():
    torch.manual_seed(0)
    model = model_of_begun_tasks(RotatedProbe)
    model.upright = 0.7
    images, labels = torch.randn(2000, 3, 4, 4), torch.randint(C, (2000,))
    with pytest.raises(Seen) as seen:
        model.losses(images, labels, 1, None)
    turned, turned_labels, shape = seen.value.args
    assert shape == (2000, 2, 4 * C)  # the method sees all outputs
    assert model(images, 2).shape == (2000, 2, C)  # tests do not, even after an error
    assert torch.equal(turned_labels % C, labels)
    turns = turned_labels // C
    for image, before, r in zip(turned, images, turns, strict=True):
        for _ in range(r):  # a quarter turn: the last column becomes the first row
            before = before.transpose(1, 2).flip(1)
        assert torch.equal(image, before)
    shares = turns.bincount(minlength=4) / 2000
    torch.testing.assert_close(shares, torch.tensor([0.7, 0.1, 0.1, 0.1]), atol=0.03, rtol=0)


def test_rotated_losses_are_those_of_pah_on_all_outputs():
    model, teacher, images, labels = student_and_teacher(method=Rotated, lam=0.7, mu=0.3)
    model.upright = 1  # labels are 0 to C - 1 of 4C
    terms = model.losses(images, labels, 3, teacher)
    heads, old_heads = model.heads(4), teacher.heads(4)
    assert heads.shape == (K, 4 * C, 32)
    assert model.hypernetwork.layers[0].weight.shape == (8, C * 3 * 6**2)  # as PAH's
    with torch.no_grad():
        kl = [
            softened_kl(
                model.eval().backbone(model.prototypes[k]) @ heads[k].T,
                teacher.backbone(model.prototypes[k]) @ old_heads[k].T,
            )
            for k in range(3)
        ]
        logits = torch.einsum("bd,ncd->bnc", model.train().backbone(images), heads)
        old = torch.einsum("bd,ncd->bnc", teacher.backbone(images), old_heads)
    log_p = logits[:, 3].log_softmax(1)
    hm = -sum(log_p[b, labels[b]] for b in range(5)) / 5
    sm = softened_kl(logits[:, :3], old[:, :3]).mean(0).sum()
    torch.testing.assert_close(terms["hm"], hm, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(terms["sm"], 0.7 * sm, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(terms["sp"], 0.3 * sum(x.mean() for x in kl), rtol=1e-4, atol=1e-5)


def test_what_the_rotated_losses_reach():
    """L_sp trains the prototypes alone, and every one of the 4C outputs is trained."""
    model, teacher, images, labels = student_and_teacher(method=Rotated)
    terms = model.losses(images, labels, 2, teacher)
    terms["sp"].backward(retain_graph=True)
    assert model.prototypes.grad[:2].abs().amax((1, 2, 3, 4)).min() > 1e-7
    others = [p for p in model.parameters() if p is not model.prototypes]
    assert all(p.grad is None for p in others)
    (terms["hm"] + terms["sm"]).backward()
    last = model.hypernetwork.layers[-1]
    assert last.bias.grad.view(4 * C, -1).abs().amax(1).min() > 1e-7
    assert all(p.grad is None for p in teacher.parameters())


def test_an_absent_class_is_absent_under_all_turns():
    model, teacher, images, labels = student_and_teacher(method=Rotated)
    for m in (model, teacher):
        m.present[1, 2] = False
    with pytest.raises(Seen) as seen:
        Probed = type("Probed", (RotatedLabels, type("P", (pah.PAH,), {"losses": leak})), {})
        model.__class__ = Probed
        model.losses(images, labels, 2, teacher)
    logits, old = seen.value.args
    model.__class__ = Rotated
    absent = torch.zeros(3, 4 * C, dtype=torch.bool)
    absent[1, 2::C] = True
    for values in (logits, old):
        assert torch.equal((values == pah.ABSENT).all(0), absent[: values.shape[1]])
    assert (model.prototype_logits(model.prototypes[:2])[1, :, 2::C] == pah.ABSENT).all()
    assert all(term.isfinite() for term in model.losses(images, labels, 2, teacher).values())


def leak(self, images, labels, task, teacher):
    raise Seen(self(images, task + 1), teacher(images, task))


def test_mirrored_averages_two_views():
    model, _, images, _ = student_and_teacher()
    model.eval()
    both = (model(images, 2) + model(images.flip(3), 2)) / 2
    torch.testing.assert_close(Mirrored(model)(images, 2), both)


@pytest.mark.parametrize("method", ["pah", "lwf", "rotated"])
def test_results_hold_the_last_row_with_mirror_images(method, tmp_path, capsys):
    run(tmp_path / "a", method=method)
    result = json.loads((tmp_path / "a/seed0/results.json").read_text())
    args = baselines.parse_args([method, *RUN])
    tasks = pah.load_tasks(args, 0)
    model = baselines.build(args, tasks)
    model.load_state_dict(weights(tmp_path / "a"))
    row = []
    for k, task in enumerate(tasks[:3]):
        images = pah.normalise(task.test_images)
        with torch.no_grad():
            model.eval()
            logits = model(images, 3)[:, k] + model(images.flip(3), 3)[:, k]
        row.append(100 * (logits.argmax(1) == task.test_labels).double().mean().item())
    assert result["mirrored"] == pytest.approx(row, abs=1e-9)
    assert result["mirrored"] != result["accuracy"][-1]
    AA = sum(row) / 3
    assert f"AA {AA:5.2f}  if test images are mirrored, too\n" in capsys.readouterr().out


def test_mirror_images_of_digits_are_not_tested(tmp_path):
    run(tmp_path / "a", "--augment", "crop")
    assert "mirrored" not in (tmp_path / "a/seed0/results.json").read_text()


def test_the_command_line_sets_the_share_of_upright_images():
    args = baselines.parse_args(["rotated", *RUN, "--upright", "0.5"])
    assert baselines.build(args, pah.load_tasks(args, 0)).upright == 0.5


def test_methods_without_rotations_refuse_their_share(capsys):
    with pytest.raises(SystemExit):
        baselines.parse_args(["ewc", *RUN, "--upright", "0.5"])
    assert "--upright has no effect on ewc" in capsys.readouterr().err


@pytest.mark.parametrize("share", ["0.2", "1.1"])
def test_a_share_of_upright_images_that_cannot_be(share):
    with pytest.raises(pah.UserError, match="--upright must be between 0.25 and 1"):
        baselines.parse_args(["rotated", *RUN, "--upright", share])


# -----------------------------------------------------------------------------
# Several processes

WITHOUT_BATCHNORM = """
import sys, torch, baselines
torch.nn.BatchNorm2d = lambda channels: torch.nn.GroupNorm(1, channels)
baselines.main(sys.argv[1:])
"""


def test_two_processes_are_the_run_of_one(tmp_path):
    """Each shows its part of the same prototypes; BatchNorm's statistics are each process's own."""
    (tmp_path / "script.py").write_text(WITHOUT_BATCHNORM)
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    env = os.environ | {"PYTHONPATH": str(HERE), "OMP_NUM_THREADS": "1"}
    for out, launch in (("one", []), ("two", torchrun)):
        command = [sys.executable, *launch, tmp_path / "script.py", "rehearsal", *RUN]
        command += ["--lr", "0.002", "--out", tmp_path / out]
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("AA") == 5  # after three tasks, with mirror images, in all
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=0.01, atol=0.005, msg=name)


def test_other_methods_run_in_one_process():
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [sys.executable, *launch, HERE / "baselines.py", "lwf", "--dataset", "synthetic"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "error: only pah and rehearsal run with several processes" in done.stderr
