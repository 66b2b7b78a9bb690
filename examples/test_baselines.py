"""What the methods of baselines.py compute, and that each runs under the protocol of pah.py."""

import argparse
import copy
import json

import baselines
import pytest
import torch
import torch.nn.functional as F
from baselines import pah

RUN = [
    "--dataset",
    "synthetic",
    "--tasks",
    "5",
    "--width",
    "4",
    "--batch-size",
    "80",
    "--epochs",
    "2",
    "--stop-after",
    "2",
]
RUN += ["--device", "cpu", "--precision", "fp32"]


def run(method, out, *flags):
    baselines.main([method, *RUN, "--out", str(out), *map(str, flags)])
    return json.loads((out / "seed0/results.json").read_text())


def weights(out):
    return torch.load(out / "seed0/checkpoint.pt", weights_only=True)["model"]


def batch_norms(model):
    return [module for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d)]


def made(method, **options):
    """A model of three tasks of two classes in its first task, and eight images with labels."""
    torch.manual_seed(0)
    strength = options.pop("strength", baselines.METHODS[method].strength)
    flags = f"{method} --width 4 --precision fp32 --augment none --device cpu"
    args = argparse.Namespace(**vars(baselines.parse_args(flags.split())) | {"strength": strength})
    images = torch.randint(0, 256, (8, 3, 16, 16), dtype=torch.uint8)
    labels = torch.tensor([0, 1] * 4)
    model = baselines.build(args, [pah.Task(images, labels, images, labels, ["a", "b"])] * 3)
    model.begin_task(0, images, labels)
    return model.train(), images, labels


def total(model, images, labels, task, teacher=None):
    return sum(model.losses(images, labels, task, teacher).values())


# -----------------------------------------------------------------------------
# The protocol

METHODS = [name for name in baselines.METHODS if name != "joint"]


@pytest.mark.parametrize("method", METHODS)
def test_each_method_learns_under_the_protocol(method, tmp_path, monkeypatch):
    monkeypatch.setattr(baselines, "FISHER_IMAGES", 20)
    rates = ["--hyper-lr", 0.01, "--proto-lr", 0.01] if method.startswith("hn") else []
    r = run(method, tmp_path, *rates)
    images = {"agem": 200, "der": 200, "derfresh": 200, "derpp": 200, "gcr": 200}
    images["cclis"] = 200
    assert r["complete"]
    assert r["LA"] > 40  # of four classes
    assert r["args"]["method"] == method
    assert r["stored"]["images"] == images.get(method, 0)
    assert r["stored"]["weights"] == sum(r["parameters"].values())


@pytest.mark.parametrize("method, images", [("agem", 200), ("gcr", 200), ("cclis", 200)])
def test_memories_are_shared_by_the_classes_that_there_are(method, images, tmp_path):
    sizes = ["--tasks", 10, 2, 2, 2, 2, 2]
    r = run(method, tmp_path, *sizes, "--epochs", 1, "--stop-after", 1)
    assert r["stored"]["images"] == images


def test_thumbnails_do_not_learn_and_heads_are_stored(tmp_path):
    r = run("thumbnails", tmp_path, "--epochs", 1, "--stop-after", 2, "--augment", "crop")
    assert set(r["parameters"]) == {"backbone", "prototypes", "stored_heads"}
    args = argparse.Namespace(**r["args"])
    tasks = pah.load_tasks(args, 0)
    model = baselines.build(args, tasks)
    assert model.augmentation is pah.AUGMENTATIONS["crop"]
    model.load_state_dict(weights(tmp_path))
    assert torch.equal(model.heads(2), model.stored_heads[:2])
    images = pah.normalise(tasks[0].train_images)
    small = F.interpolate(images, 10, mode="bilinear", antialias=True)
    for c, thumbnail in enumerate(model.prototypes[0]):
        distance = (small - thumbnail).abs().amax((1, 2, 3))
        assert tasks[0].train_labels[distance < 1e-5].tolist() == [c]


def test_joint_training_is_tested_on_each_task(tmp_path):
    flags = "joint --dataset synthetic --tasks 5 --width 4 --epochs 1 --precision fp32 --device cpu"
    baselines.main([*flags.split(), "--out", str(tmp_path)])
    r = json.loads((tmp_path / "seed0/results.json").read_text())
    assert [len(row) for row in r["accuracy"]] == [0, 0, 0, 0, 5]
    assert min(r["accuracy"][-1]) > 40
    assert r["FM"] is None  # there is nothing to forget
    assert r["complete"]


@pytest.mark.parametrize("method", ["derpp", "si", "cclis"])
def test_a_resumed_run_is_the_same_run(method, tmp_path):
    run(method, tmp_path / "whole", "--epochs", 1)
    run(method, tmp_path / "cut", "--epochs", 1, "--stop-after", 1)
    run(method, tmp_path / "cut", "--epochs", 1, "--resume")
    whole, cut = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    for name in whole:
        assert torch.equal(whole[name], cut[name]), name


@pytest.mark.parametrize(
    "flags",
    [
        *("ewc --lam 0.5", "pnn --strength 2", "si --proto-size 5", "hn2 --stem 7x7"),
        *("lwf --buffer-size 20", "joint --mu 0.5"),
    ],
)
def test_an_option_that_means_nothing_is_refused(flags, capsys):
    with pytest.raises(SystemExit):
        baselines.parse_args(flags.split())
    method, option, *_ = flags.split()
    assert f"{option} has no effect on {method}" in capsys.readouterr().err


@pytest.mark.parametrize("method", ["ewc", "si", "agem"])
def test_gradients_that_nobody_scales_are_not_in_fp16(method, capsys):
    for allowed in ([method, "--precision", "bf16"], ["lwf", "--precision", "fp16"]):
        baselines.parse_args([*allowed, "--device", "cpu"])
    with pytest.raises(SystemExit):
        baselines.parse_args([method, "--precision", "fp16", "--device", "cpu"])
    said = capsys.readouterr().err
    assert f"gradients of {method} may vanish in fp16; use --precision bf16 or fp32" in said


def test_methods_have_defaults_of_their_own():
    def options(flags):
        args = baselines.parse_args(flags.split())
        return args.optimizer, args.lr, args.weight_decay, args.hyper_lr, args.strength

    assert options("lwf") == ("muon", 0.02, 0.005, 1e-4, None)
    assert options("lwf --optimizer sgd") == ("sgd", 0.03, 5e-4, 1e-4, None)
    assert options("hn2") == ("muon", 0.02, 0.005, 2e-3, 0.02)
    assert options("cclis") == ("muon", 0.02, 0.005, 1e-4, 0.6)
    assert options("agem") == ("sgd", 0.03, 5e-4, 1e-4, 200)
    assert options("agem --optimizer muon") == ("muon", 0.02, 0.005, 1e-4, 200)
    assert options("agem --lr 0.02 --weight-decay 0.005") == ("sgd", 0.02, 0.005, 1e-4, 200)
    assert options("hn2 --hyper-lr 1e-4 --strength 0.5") == ("muon", 0.02, 0.005, 1e-4, 0.5)
    assert baselines.parse_args(["agem"]).out == "runs/cifar100-10-method-agem"


@pytest.mark.parametrize("method", ["agem", "der", "derfresh", "derpp", "gcr"])
def test_the_buffer_size_is_an_option(method):
    args = baselines.parse_args([method, *RUN, "--buffer-size", "21"])
    tasks = pah.load_tasks(args, 0)
    assert len(baselines.build(args, tasks).memory.images) == 21
    args.buffer_size = 19  # one less than there are classes
    if method in ("agem", "gcr"):
        with pytest.raises(pah.UserError, match="--buffer-size 19: .* each class, .* are 20"):
            baselines.build(args, tasks)
    else:
        baselines.build(args, tasks)


def test_the_run_of_another_method_is_refused(tmp_path):
    run("finetune", tmp_path, "--epochs", 1, "--stop-after", 1)
    with pytest.raises(pah.UserError, match="--method was finetune, is si"):
        run("si", tmp_path, "--epochs", 1, "--resume")
    with pytest.raises(pah.UserError, match="already holds this run"):
        run("finetune", tmp_path, "--epochs", 1)


@pytest.mark.parametrize("method", ["lwf", "joint", "pah --optimizer sgd"])
def test_pah_refuses_the_run_of_a_method(method, tmp_path):
    flags = [*RUN[:-6], "--epochs", "1", *RUN[-4:], "--out", str(tmp_path)]
    baselines.main([*method.split(), *flags])
    with pytest.raises(pah.UserError, match=f"--method was {method[:3]}.*, is not an option"):
        pah.main([*flags, "--resume"])


def test_a_run_of_pah_is_refused_by_a_method(tmp_path):
    flags = [*RUN, "--epochs", "1", "--out", str(tmp_path)]
    pah.main([*flags, "--stop-after", "1"])
    with pytest.raises(pah.UserError, match="--method was not an option, is pah"):
        baselines.main(["pah", *flags, "--resume"])


def test_joint_training_is_not_lost_to_a_folder_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "out").write_text("mine")
    monkeypatch.setattr(baselines.Joint, "begin_task", None)  # training would fail otherwise
    flags = ["joint", "--dataset", "synthetic", "--tasks", "5", "--width", "4", "--device", "cpu"]
    with pytest.raises(pah.UserError, match="cannot write to .*/out/seed0"):
        baselines.main([*flags, "--out", str(tmp_path / "out")])


# -----------------------------------------------------------------------------
# Learning without Forgetting, joint training


def test_lwf_is_pah_with_stored_heads():
    model, images, labels = made("lwf")
    teacher, *_ = made("lwf")
    teacher.stored_heads.data.normal_()
    teacher.eval()
    model.begin_task(1, images, labels)
    teacher.present.copy_(model.present)
    x = pah.normalise(images)
    terms = model.eval().losses(x, labels, 1, teacher)
    new, old = model(x, 1)[:, 0], teacher(x, 1)[:, 0]
    torch.testing.assert_close(terms["sm"], pah.distillation(new, old, 2.0).mean())
    torch.testing.assert_close(terms["hm"], F.cross_entropy(model(x, 2)[:, 1], labels))


def test_joint_loss_gives_each_image_the_head_of_its_task():
    model, images, labels = made("joint")
    tasks = torch.tensor([0, 1, 2, 2, 1, 0, 0, 1])
    joint_labels = tasks * 2 + labels
    model.begin_task(2, images, joint_labels)
    x = pah.normalise(images)
    loss = total(model.eval(), x, joint_labels, 2)
    each = [
        F.cross_entropy(model(x[i : i + 1], 3)[:, t], labels[i : i + 1])
        for i, t in enumerate(tasks)
    ]
    torch.testing.assert_close(loss, torch.stack(each).mean())


def test_joined_tasks_have_all_training_images():
    tasks = pah.split_tasks(pah.load_dataset("synthetic"), [4, 10, 6])
    joined = baselines.joined(tasks)
    assert len(joined[-1].train_images) == 4000
    assert joined[-1].train_labels.unique().tolist() == [*range(4), *range(10, 20), *range(20, 26)]
    assert joined[-1].test_images is tasks[-1].test_images


# -----------------------------------------------------------------------------
# Pulled towards old weights


def test_ewc_is_one_parabola_for_all_tasks():
    model, images, labels = made("ewc", strength=3.0)
    parameters = list(model.parameters())
    start = baselines.flat(parameters).detach()
    model.end_task(0, images, labels)
    first = model.fisher.clone()
    with torch.no_grad():
        for p in parameters:
            p += 0.1
    moved = baselines.flat(parameters).detach()
    model.begin_task(1, images, labels)
    model.end_task(1, images, labels)
    second = model.fisher - first
    with torch.no_grad():
        for p in parameters:
            p -= 0.3
    now = baselines.flat(parameters).detach()
    penalty = model.losses(pah.normalise(images), labels, 1, None)["ewc"]
    gradient = torch.autograd.grad(penalty, parameters, materialize_grads=True)
    expected = 3 * (first * (now - start) + second * (now - moved))
    torch.testing.assert_close(baselines.flat(gradient), expected, rtol=1e-3, atol=1e-5)


def test_fisher_information_of_a_head_by_hand():
    """Its expectation under the model's own labels: p (1 - p) times the squared feature."""
    model, images, labels = made("ewc")
    one = images[:1].repeat(400, 1, 1, 1)
    x = pah.normalise(images[:1])
    wish = torch.tensor([1.0, -1.0])[:, None] * model.eval().features(x).detach()
    model.stored_heads.data[0] = 0.7 * wish / wish[0].square().sum()
    before = [module.running_mean.clone() for module in batch_norms(model)]
    model.train().end_task(0, one, labels[:1].repeat(400))
    for old, module in zip(before, batch_norms(model), strict=True):
        assert torch.equal(old, module.running_mean)
    p = model(x, 1).softmax(-1)[0, 0, 0]
    assert 0.75 < p < 0.85  # so that the likelier label alone gives something else
    expected = p * (1 - p) * model.features(x)[0] ** 2
    sizes = [w.numel() for w in model.parameters()]
    names = [name for name, _ in model.named_parameters()]
    of_heads = dict(zip(names, model.fisher.split(sizes), strict=True))["stored_heads"]
    torch.testing.assert_close(of_heads.view(3, 2, -1)[0, 0], expected, rtol=0.3, atol=1e-4)


def test_fisher_information_takes_each_image_with_the_label_drawn_for_it():
    """Two images of which the model is sure, of opposite classes, hold none."""
    model, images, labels = made("ewc")
    model.eval()
    features = model.features(pah.normalise(images[:2])).detach()
    apart = features[0] - features[1]
    wish = 50 * apart / apart.square().sum()
    middle = (features.mean(0) @ wish).item()
    shift = middle * features.mean(0) / features.mean(0).square().sum()
    model.stored_heads.data[0, 0] = wish - shift
    model.stored_heads.data[0, 1] = shift - wish
    sure = model(pah.normalise(images[:2]), 1)[:, 0].softmax(1)
    assert sure[0, 0] > 0.999 and sure[1, 1] > 0.999
    model.end_task(0, images[:2].repeat(20, 1, 1, 1), labels[:2].repeat(20))
    assert model.fisher.max() < 1e-3


def test_si_path_is_how_far_the_loss_fell():
    model, images, labels = made("si", strength=5.0)
    x, losses = pah.normalise(images), []
    model.importance.fill_(1.0)  # a pull that must not count
    start = baselines.flat(model.parameters()).detach().clone()
    for _ in range(20):
        loss = total(model, x, labels, 0)
        losses.append(loss.item())
        model.zero_grad()
        loss.backward()
        pulled = baselines.flat([p.grad for p in model.parameters()])
        pull = 10 * (model.before - start)
        torch.testing.assert_close(pulled - model.gradient, pull, rtol=1e-2, atol=1e-4)
        with torch.no_grad():
            for p in model.parameters():
                p -= 1e-3 * p.grad
        model.after_step(0, images, labels)
    fell = losses[0] - F.cross_entropy(model(x, 1)[:, 0], labels).item()
    assert fell > 0.05
    assert abs(model.path.sum().item() - fell) < 0.1 * fell


def test_si_importance_is_path_over_squared_distance():
    model, images, labels = made("si")
    start = model.anchor.clone()
    model.path.normal_()
    path = model.path.clone()
    with torch.no_grad():
        for p in model.parameters():
            p += 0.5 * torch.randn_like(p)
    moved = baselines.flat(model.parameters()).detach() - start
    model.end_task(0, images, labels)
    torch.testing.assert_close(model.importance, (path / (moved**2 + 1e-3)).clamp(min=0))
    torch.testing.assert_close(model.anchor, start + moved)
    assert not model.path.any()


# -----------------------------------------------------------------------------
# Stored images


def test_agem_projection_by_hand():
    g = torch.tensor([1.0, 0.0])
    against, along = torch.tensor([-1.0, 1.0]), torch.tensor([1.0, 1.0])
    assert torch.equal(baselines.projected(g, against), torch.tensor([0.5, 0.5]))
    assert torch.equal(baselines.projected(g, along), g)


def test_agem_stores_images_of_each_class():
    model, images, labels = made("agem")
    model.end_task(0, images, labels)
    assert model.memory.filled == 8
    assert model.memory.labels[:8].tolist() == [0] * 4 + [1] * 4


def test_the_classes_so_far_share_the_memory_of_agem():
    model, images, labels = made("agem")
    model.memory.images = model.memory.images[:10]
    per_class = [[4, 4], [3, 3, 2, 2], [2, 2, 2, 2, 1, 1]]
    for task in range(3):
        numbers = torch.arange(8, dtype=torch.uint8) + 8 * task  # each image has its own
        model.begin_task(task, images, labels)
        model.end_task(task, numbers[:, None, None, None].expand_as(images), labels)
        rows = slice(model.memory.filled)
        classes = model.memory.classes(rows)
        assert classes.bincount().tolist() == per_class[task]
        stored = model.memory.images[rows, 0, 0, 0].long()
        assert torch.equal(stored // 8, model.memory.tasks[rows])
        assert torch.equal(stored % 2, model.memory.labels[rows])
        assert len(stored.unique()) == len(stored)


def test_agem_does_not_raise_the_loss_of_stored_images():
    model, images, labels = made("agem")
    model.end_task(0, images, labels)
    model.begin_task(1, images, labels)
    model.eval()
    model.stored_heads.data[1] = -model.stored_heads.data[0]  # opposite wishes
    x, parameters = pah.normalise(images), list(model.parameters())
    stored = F.cross_entropy(model(x, 1)[:, 0], labels)
    alone = F.cross_entropy(model(x, 2)[:, 1], labels)
    projected = total(model, x, labels, 1)
    stored, alone, projected = (
        baselines.flat(torch.autograd.grad(loss, parameters)) for loss in (stored, alone, projected)
    )
    assert alone @ stored < -1e-4
    assert abs(projected @ stored) < 1e-5


def test_agem_projects_on_stored_images_of_all_tasks():
    model, _, _ = three_tasks_in_memory("agem")
    model.strength = 200
    images = torch.randint(0, 256, (8, 3, 16, 16), dtype=torch.uint8)
    x, labels, parameters = pah.normalise(images), torch.tensor([0, 1] * 4), [*model.parameters()]
    losses = F.cross_entropy(model(x, 3)[:, 2], labels), model.cross_entropies(torch.arange(8))
    gradient, reference = (
        baselines.flat(torch.autograd.grad(loss.mean(), parameters)) for loss in losses
    )
    # so that they point against each other, whatever they are
    sign = -torch.sign(gradient @ reference)
    cross_entropies = model.cross_entropies
    model.cross_entropies = lambda rows: sign * cross_entropies(rows)
    reference = sign * reference
    wanted = gradient - gradient @ reference / (reference @ reference) * reference
    found = baselines.flat(torch.autograd.grad(total(model, x, labels, 2), parameters))
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("method, beta", [("der", 0.0), ("derpp", 0.5), ("gcr", 0.5)])
def test_terms_of_stored_images(method, beta):
    model, images, labels = made(method, strength=0.7)
    model.begin_task(1, images, labels)
    model.eval()
    x, memory = pah.normalise(images), model.memory
    wanted, weights = torch.randn(8, 3, 2), torch.arange(8.0)
    rows = {"images": images, "labels": labels, "logits": wanted, "tasks": 1, "weights": weights}
    memory.put(slice(8), **rows)
    memory.filled = 8
    share = weights / 28 if method == "gcr" else torch.full((8,), 1 / 8)
    logits = model(x, 2)  # of their own task and the earlier one, whichever is learned now
    expected = F.cross_entropy(logits[:, 0], labels)
    expected += 0.7 * (share * (logits - wanted[:, :2]).square().sum((1, 2)) / 2).sum()
    expected += beta * (share * F.cross_entropy(logits[:, 1], labels, reduction="none")).sum()
    torch.testing.assert_close(total(model, x, labels, 0), expected)


def three_tasks_in_memory(method):
    """A model with stored images of three tasks, of which the second has one class, the others two;
    their tasks, and the logits in memory."""
    model, images, labels = made(method, strength=0.7)
    model.present[1, 0] = True
    model.present[2] = True
    tasks, wanted = torch.tensor([0, 1, 2, 0, 1, 2, 1, 1]), torch.randn(8, 3, 2)
    model.memory.put(slice(8), images=images, labels=labels * (tasks != 1), tasks=tasks)
    if model.with_logits:
        model.memory.put(slice(8), logits=wanted)
    model.memory.filled = 8
    return model.eval(), tasks, wanted


def test_distances_are_those_to_the_logits_of_classes_that_there_were():
    model, _, wanted = three_tasks_in_memory("der")
    rows = torch.tensor([5, 0, 4, 2])
    squares = (model.replay(rows) - wanted[rows]).square()
    expected = squares[:, 0].sum(1)
    expected[[0, 2, 3]] += squares[[0, 2, 3], 1, 0]
    expected[[0, 3]] += squares[[0, 3], 2].sum(1)
    torch.testing.assert_close(model.distances(rows), expected / 2)


@pytest.mark.parametrize("method", ["der", "agem"])
def test_cross_entropies_are_those_of_the_own_heads(method):
    model, tasks, _ = three_tasks_in_memory(method)
    rows = torch.tensor([5, 0, 4, 2])
    logits = model(pah.normalise(model.memory.images[rows]), 3)
    for loss, row, of_image in zip(model.cross_entropies(rows), rows, logits, strict=True):
        label = model.memory.labels[row]
        torch.testing.assert_close(loss, F.cross_entropy(of_image[tasks[row]], label))


def test_the_reservoir_holds_images_of_all_times_as_they_came():
    memory = made("der")[0].memory
    torch.manual_seed(0)
    for i in range(0, 1000, 50):
        numbers = torch.arange(i, i + 50)
        pixels = (numbers % 256)[:, None, None, None].expand(-1, 3, 16, 16).byte()
        memory.offer(pixels, numbers, torch.zeros(50, 3, 2), 0)
    assert memory.filled == 200
    assert memory.seen == 1000
    assert torch.equal(memory.images[:, 0, 0, 0].long(), memory.labels % 256)
    assert len(memory.labels.unique()) == 200
    assert 400 < memory.labels.float().mean() < 600


def test_counters_of_a_memory_are_in_its_checkpoint_and_not_on_the_gpu():
    memory = made("der")[0].memory
    memory.filled, memory.seen = 5, 7
    other = made("der")[0].memory
    other.load_state_dict(memory.state_dict())
    assert (other.filled, other.seen) == (5, 7)
    assert type(other.filled) is type(other.seen) is int


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("method", ["der", "derpp", "gcr"])
def test_a_step_with_stored_images_does_not_wait_for_the_gpu(method):
    model, images, labels = made(method)
    model, images, labels = model.cuda(), images.cuda(), labels.cuda()
    for mode in ("default", "error"):  # the first step may wait
        torch.cuda.set_sync_debug_mode(mode)
        try:
            total(model, pah.normalise(images), labels, 0).backward()
            if method != "gcr":
                model.after_step(0, images, labels)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_der_stores_plain_images_with_the_logits_of_what_it_saw():
    model, images, labels = made("der")
    model.begin_task(1, images, labels)
    x = pah.normalise(images.flip(3))  # as if they had been mirrored
    logits = model.eval()(x, 3)
    assert (logits[:, :2].abs() < 100).all() and (logits[:, 2] == pah.ABSENT).all()
    model.losses(x, labels, 1, None)
    model.after_step(1, images, labels)
    assert torch.equal(model.memory.images[:8], images)
    assert torch.equal(model.memory.logits[:8], logits)


def test_der_with_fresh_logits_looks_again_at_its_own_task():
    model, images, labels = made("derfresh")
    for task in (0, 1):
        model.begin_task(task, images, labels)
        model.losses(pah.normalise(images), labels, task, None)
        model.after_step(task, images, labels)
    before = model.memory.logits.clone()
    model.end_task(1, images, labels)
    assert torch.equal(model.memory.logits[:8], before[:8])
    wanted = model(pah.normalise(images), 3)  # in eval mode
    torch.testing.assert_close(model.memory.logits[8:16], wanted)
    assert not torch.allclose(before[8:16, 1], wanted[:, 1])


def test_stored_images_are_augmented(monkeypatch):
    model, images, labels = made("derpp")
    model.memory.put(slice(8), images=images, tasks=0)
    plain = model.eval().replay(torch.arange(8))
    monkeypatch.setitem(pah.AUGMENTATIONS, "crop-flip", lambda images: images.flip(3))
    args = baselines.parse_args(["derpp", "--width", "4", "--precision", "fp32"])
    mirroring = baselines.build(args, [pah.Task(images, labels, images, labels, "ab")] * 3)
    mirroring.load_state_dict(model.state_dict())
    mirrored = mirroring.eval().replay(torch.arange(8))
    assert not torch.allclose(plain, mirrored, atol=1e-3)
    model.memory.put(slice(8), images=images.flip(3))
    torch.testing.assert_close(model.replay(torch.arange(8)), mirrored)


def test_matching_finds_the_rows_and_their_weights():
    torch.manual_seed(0)
    rows = F.normalize(torch.randn(40, 60))
    rows[8] = F.normalize(rows[7] + 0.5 * rows[9], dim=0)  # almost row 7, which covers it
    target = 3 * rows[7] + 2 * rows[21] + rows[30]
    chosen, weights = baselines.matching(rows, target, 3, ridge=0)
    found = dict(zip(chosen, weights.tolist(), strict=True))
    assert found == pytest.approx({7: 3.0, 21: 2.0, 30: 1.0}, rel=1e-3)
    assert baselines.matching(rows, rows.sum(0), 50)[1].min() >= 0


def test_candidates_of_gcr_are_classified_correctly_where_there_are_enough():
    labels = torch.tensor([0, 1] * 50)
    logits = F.one_hot(labels, 2).float()
    logits[10:] = 1 - logits[10:]  # five of each class are right
    torch.manual_seed(0)
    rows = baselines.candidates_of(logits, labels, 10)
    assert sorted(rows.tolist()) == list(range(10))
    rows = baselines.candidates_of(logits, labels, 16)
    assert labels[rows].bincount().tolist() == [8, 8]
    assert set(range(10)) < set(rows.tolist())
    assert len(rows.unique()) == 16
    others = baselines.candidates_of(logits, labels, 16)
    assert set(others.tolist()) != set(rows.tolist())  # random


def test_gcr_keeps_a_coreset_of_every_task():
    model, images, labels = made("gcr")
    model.end_task(0, images, labels)
    first = model.memory.images[:8].clone()
    model.begin_task(1, images, labels)
    model.end_task(1, images.flip(0), labels.flip(0))
    memory = model.memory
    assert memory.filled == 16
    assert memory.tasks[:16].tolist() == [0] * 8 + [1] * 8
    assert set(memory.images[:8, 0, 0, 0].tolist()) == set(first[:, 0, 0, 0].tolist())


@pytest.mark.parametrize("task", [0, 1, 2])
def test_gcr_gradients_are_those_of_the_loss_that_is_replayed(task):
    model, tasks, _ = three_tasks_in_memory("gcr")
    memory, rows = model.memory, torch.nonzero(tasks == task).flatten()
    with torch.no_grad():
        gradients = model.head_gradients(
            task, memory.images[rows], memory.labels[rows], memory.logits[rows]
        )
    for row, gradient in zip(rows.split(1), gradients, strict=True):
        loss = 0.7 * model.distances(row) + 0.5 * model.cross_entropies(row)
        wanted = torch.autograd.grad(loss, model.stored_heads)[0][: task + 1].flatten()
        torch.testing.assert_close(gradient, wanted, rtol=1e-3, atol=1e-4)


def test_gcr_chooses_for_the_weighted_sum_of_what_it_stored(monkeypatch):
    model, images, labels = made("gcr")
    memory = model.memory
    memory.images = memory.images[:12]  # six of each class, then three
    model.end_task(0, images, labels)
    rows = slice(memory.filled)
    assert memory.weights[rows].tolist() == [1] * 8  # all of them
    memory.put(rows, weights=torch.rand(8) + 0.5, logits=torch.randn(8, 3, 2))
    old = [column[rows].clone() for column in (memory.images, memory.labels, memory.logits)]
    old_weights = memory.weights[rows].clone()
    model.begin_task(1, images, labels)
    targets, matching = [], baselines.matching

    def recorded(gradients, target, n):
        targets.append(target)
        return matching(gradients, target, n)

    monkeypatch.setattr(baselines, "matching", recorded)
    buffers = [module.running_mean.clone() for module in batch_norms(model)]
    model.train().end_task(1, images, labels)
    with torch.no_grad():
        gradients = model.head_gradients(0, *old)
    for c in (0, 1):
        own = old[1] == c
        torch.testing.assert_close(targets[c], old_weights[own] @ gradients[own])
    for before, module in zip(buffers, batch_norms(model), strict=True):
        assert torch.equal(before, module.running_mean)
    assert memory.tasks[:12].tolist() == [0] * 6 + [1] * 6
    now = model(pah.normalise(memory.images[6:12]), 3)
    torch.testing.assert_close(memory.logits[6:12], now)  # of the task's end


def test_gcr_chooses_among_candidates_and_keeps_the_weights_of_what_it_keeps_whole(monkeypatch):
    model, images, labels = made("gcr")
    images[:, 0, 0, 0] = torch.arange(8)
    model.memory.images = model.memory.images[:20]
    monkeypatch.setattr(baselines, "candidates_of", lambda *_: torch.tensor([6, 1, 5, 2, 3]))
    model.end_task(0, images, labels)
    memory = model.memory
    assert memory.filled == 5
    assert sorted(memory.images[:5, 0, 0, 0].tolist()) == [1, 2, 3, 5, 6]
    memory.weights[:5] = torch.arange(2.0, 7.0)
    model.begin_task(1, images, labels)
    model.end_task(1, images, labels)
    assert memory.tasks[:10].tolist() == [0] * 5 + [1] * 5
    assert memory.weights[:10].tolist() == [2, 3, 4, 5, 6] + [1] * 5


def test_gcr_fills_its_memory():
    args = baselines.parse_args(["gcr", "--width", "4", "--buffer-size", "20"])
    images = torch.randint(0, 256, (60, 3, 16, 16), dtype=torch.uint8)
    labels = torch.arange(60) % 3
    model = baselines.build(args, [pah.Task(images, labels, images, labels, "abc")] * 3)
    for task, per_class in enumerate([[7, 7, 6], [4, 4, 3, 3, 3, 3], [3, 3, *[2] * 7]]):
        model.begin_task(task, images, labels)
        model.end_task(task, images, labels)
        memory = model.memory
        classes = memory.tasks * 3 + memory.labels
        assert memory.filled == 20
        assert classes.bincount().tolist() == per_class


def cclis_of_two_tasks():
    """A CCLIS in its second task, its teacher, eight images, and six stored ones of the first."""
    model, images, labels = made("cclis")
    memory = model.memory
    memory.put(slice(6), images=images[:6], labels=labels[:6], tasks=0)
    memory.put(slice(6), weights=torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0]))
    memory.filled = 6
    teacher = copy.deepcopy(model).eval()
    torch.nn.init.normal_(model.prototypes)
    model.begin_task(1, torch.cat([images, images]), torch.cat([labels, labels]))

    def draw(n):
        assert n == 3  # six stored images beside 16 new ones, in a batch of eight
        return torch.tensor([4, 1, 0])

    memory.draw = draw
    return model, teacher, images, labels


def test_the_contrastive_loss_of_cclis_by_hand():
    model, teacher, images, labels = cclis_of_two_tasks()
    x = pah.normalise(torch.cat([images, images[[4, 1, 0]]]))
    classes = [2 + y for y in labels.tolist()] + [0, 1, 0]
    weights = [1.0] * 8 + [5.0, 2.0, 1.0]
    z = F.normalize(model.projector(model.features(x)), dim=1)
    w = F.normalize(model.prototypes.flatten(0, 1), dim=1)
    loss = 0.0
    for i, c in enumerate(classes):
        total = 0.0
        for j, other in enumerate(classes):
            # stored images count for a whole class, where an old class is the anchor
            weight = weights[j] if c < 2 and other < 2 and c != other else 1.0
            total += weight * torch.exp(w[c] @ z[j] / 0.5)
        loss -= (w[c] @ z[i] / 0.5 - torch.log(total)) / len(classes)
    terms = model.losses(pah.normalise(images), labels, 1, teacher)
    assert terms["contrastive"].item() == pytest.approx(loss.item(), rel=1e-4)
    with torch.no_grad():
        old = F.normalize(teacher.projector(teacher.features(x)), dim=1)
        old = old @ F.normalize(teacher.prototypes[0], dim=1).T
    relations = -((old / 0.1).softmax(1) * (z @ w[:2].T / 0.2).log_softmax(1)).sum(1).mean()
    assert terms["relations"].item() == pytest.approx(0.6 * relations.item(), rel=1e-4)


def test_cclis_learns_everything_but_its_heads_in_its_steps():
    model, teacher, images, labels = cclis_of_two_tasks()
    sum(model.losses(pah.normalise(images), labels, 1, teacher).values()).backward()
    still = {name for name, p in model.named_parameters() if p.grad is None}
    assert still == {"stored_heads"}
    assert model.prototypes.grad[:2].abs().amax(2).min() > 0
    assert model.prototypes.grad[2].abs().max() == 0


def test_cclis_stores_what_other_classes_are_close_to(monkeypatch):
    """The more of the other classes' attention an image gets, the likelier and lighter it is."""
    model, _, images, labels = cclis_of_two_tasks()
    del model.memory.draw
    model.memory.images = model.memory.images[:12]  # three of each class
    cosines = torch.randn(14, 4, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(model, "cosines", lambda features, n: cosines)
    fitted = []
    monkeypatch.setattr(model, "fit_heads", lambda *args: fitted.append(args))
    asked = []
    multinomial = torch.multinomial

    def note(scores, n, replacement=False):
        if not replacement:
            asked.append((scores, n))
        return multinomial(scores, n, replacement)

    monkeypatch.setattr(torch, "multinomial", note)
    model.end_task(1, images, labels)
    share = (cosines / 0.5).softmax(0)
    of_class = labels.tolist() + [0, 1, 0, 1, 0, 1]
    of_class = [2 + y for y in of_class[:8]] + of_class[8:]
    assert [n for _, n in asked] == [3, 3, 3, 3]
    for c, (scores, _) in enumerate(asked):
        own = [i for i, y in enumerate(of_class) if y == c]
        others = [y for y in range(4) if y != c]
        expected = [sum(share[i, y].item() for y in others) / 3 for i in own]
        assert scores.tolist() == pytest.approx(expected, rel=1e-5)
        rows = model.memory.classes(slice(12)) == c
        weight = model.memory.weights[:12][rows]
        possible = [sum(expected) / (3 * score) for score in expected]
        for value in weight.tolist():
            assert min(abs(value - other) for other in possible) < 1e-4
    assert model.memory.filled == 12
    ((n, features, every),) = fitted
    assert n == 2 and len(features) == 14 + 28  # images, and augmented ones
    assert every[:14].tolist() == of_class
    assert every[14:].bincount().min() > 0


def test_the_heads_of_cclis_are_fitted_to_the_classes_of_their_tasks_alike():
    model, images, labels = made("cclis")
    model.begin_task(1, images, labels)
    centres = torch.eye(32)[:4]
    labels = torch.tensor([0, 1] + [2, 3] * 100)
    model.fit_heads(2, centres[labels], labels, steps=100)
    logits = torch.einsum("bd,ncd->bnc", centres, model.heads(2))
    own = logits[range(4), [0, 0, 1, 1]].softmax(1)
    right = own[range(4), [0, 1, 0, 1]]
    assert right.min() > 0.9
    assert right.max() - right.min() < 0.02  # though there are many more images of task 1
    other = logits[range(4), [1, 1, 0, 0]]
    assert other.abs().max() == 0  # no head learns from images of another task
    assert model.stored_heads[2].abs().max() < 1  # as it was
    model.present[1, 1] = False
    model.fit_heads(2, centres[:3], torch.tensor([0, 1, 2]), steps=10)
    assert model.stored_heads[1, 1].abs().max() == 0  # of a class that the task does not have


# -----------------------------------------------------------------------------
# Networks that depend on the task


@pytest.mark.parametrize(
    "method, frozen, learns",
    [
        ("pnn", "backbone.columns.0.", "backbone.columns.1.layers.0.weight"),
        ("hn2", "backbone.", "hypernetwork.layers.0.weight"),
        ("hn3", "backbone.", "hypernetwork.layers.0.weight"),
    ],
)
def test_what_is_frozen_after_the_first_task(method, frozen, learns, tmp_path):
    run(method, tmp_path, "--epochs", 1, "--stop-after", 1)
    before = weights(tmp_path)
    r = run(method, tmp_path, "--epochs", 1, "--resume")
    after = weights(tmp_path)
    names = [name for name in before if name.startswith(frozen)]
    assert len(names) > 50
    assert all(torch.equal(before[name], after[name]) for name in names)
    assert not torch.equal(before[learns], after[learns])
    if method == "pnn":
        assert r["accuracy"][1][0] == r["accuracy"][0][0]


def test_hn_is_held_where_it_was():
    model, images, labels = made("hn2", strength=2.0)
    for task in (1, 2):
        model.begin_task(task, images, labels)
        assert not torch.allclose(model.prototypes[task], model.prototypes[task - 1], atol=0.1)
    model.train()
    assert not model.backbone.training
    assert model.hypernetwork.tails[1].training
    with torch.no_grad():
        model.hypernetwork.body[0].weight += 0.05
    model.eval()
    new = model.hypernetwork(model.prototypes[:2])
    moved = sum((new[name] - model.old[name]).square().sum() for name in new)
    terms = model.losses(pah.normalise(images), labels, 2, None)
    assert moved > 0.1
    torch.testing.assert_close(terms["moved"], 2 * moved / 2)  # strength, earlier tasks


@pytest.mark.parametrize("method", ["hn2", "hn3"])
def test_hn_has_a_head_of_its_own_for_each_task(method, tmp_path):
    r = run(method, tmp_path, "--hyper-lr", 1e-3, "--proto-lr", 1e-3)
    args = argparse.Namespace(**r["args"])
    model = baselines.build(args, pah.load_tasks(args, 0))
    model.load_state_dict(weights(tmp_path))
    heads = model.heads(2)
    assert heads.shape == (2, 4, 33)  # the last column is the bias
    centred = heads[..., :-1] - heads[..., :-1].mean(1, keepdim=True)  # all else softmax ignores
    assert (centred[0] - centred[1]).norm() > 1e-3 * centred[0].norm()
    assert model.hypernetwork.biases[:2].any(1).all()
    alive = (model.hypernetwork.body(model.prototypes[:2]) > 0).any(0)
    assert alive.sum() > 8


@pytest.mark.parametrize("method", ["pnn", "hn3"])
def test_each_head_sees_the_features_of_its_task(method):
    model, images, labels = made(method)
    for task in (1, 2):
        model.begin_task(task, images, labels)
    if method == "hn3":  # whose tasks start from the one before
        model.prototypes.data.normal_()
    model.eval()
    x = pah.normalise(images)
    together = model(x, 3)
    for task in range(3):
        own = model.own_logits(x, task)  # of some hundreds
        torch.testing.assert_close(together[:, task], own, rtol=1e-4, atol=1e-3)
    assert (together[:, 0] - together[:, 1]).abs().max() > 1e-3


# -----------------------------------------------------------------------------
# SGD


def test_sgd_moves_what_muon_would_and_hypernetworks_keep_adamw():
    model, *_ = made("pah")
    sgd, adamw = baselines.make_sgd(model, 0.1, 0.2, 0.3, 0.4, torch.float32)
    group = sgd.param_groups[0]
    assert type(sgd) is torch.optim.SGD
    assert (group["lr"], group["momentum"], group["weight_decay"]) == (0.1, 0.9, 0.4)
    assert len(group["params"]) == len(list(model.backbone.parameters()))
    rates = [(group["lr"], group["weight_decay"]) for group in adamw.param_groups]
    assert type(adamw) is torch.optim.AdamW
    assert rates == [(0.2, 0.4), (0.3, 0)]
    assert len(baselines.make_sgd(made("lwf")[0], 0.1, 0, 0, 0, torch.float32)) == 1


def test_sgd_trains_a_hypernetwork_behind_a_frozen_backbone(tmp_path):
    """In task 2 nothing is left for SGD."""
    assert run("hn2", tmp_path, "--epochs", 1, "--optimizer", "sgd")["complete"]


def test_pah_is_pah(tmp_path):
    flags = ["--epochs", 1, "--stop-after", 2]
    run("pah", tmp_path / "method", *flags)
    pah.main([*RUN, "--out", str(tmp_path / "pah"), *map(str, flags)])
    method, file = weights(tmp_path / "method"), weights(tmp_path / "pah")
    for name in file:
        assert torch.equal(method[name], file[name]), name


def test_a_run_with_sgd_is_another_run(tmp_path):
    short = ["--epochs", 1, "--stop-after", 1]
    run("pah", tmp_path / "muon", *short)
    run("pah", tmp_path / "sgd", *short, "--optimizer", "sgd")
    muon, sgd = weights(tmp_path / "muon"), weights(tmp_path / "sgd")
    assert not torch.equal(muon["backbone.layers.0.weight"], sgd["backbone.layers.0.weight"])
