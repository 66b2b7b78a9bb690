"""Tests of baselines.py on the synthetic data."""
import argparse, json, re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import baselines
from baselines import pah

RUN = ["--dataset", "synthetic", "--width", "4", "--epochs", "4", "--batch-size", "80", "--precision", "fp32",
       "--stop-after", "2", "--optimizer", "adamw", "--lr", "0.01"]
# strong enough to be seen in so short a run
STRENGTHS = {"ewc": 100, "si": 100, "agem": 100, "der": 1, "derpp": 1, "gcr": 1, "pnn": 0, "hn2": 0.1, "hn3": 0.1}

@pytest.fixture(autouse=True)
def pah_as_it_was(monkeypatch):
    monkeypatch.setattr(baselines, "FISHER_IMAGES", 50)
    for name in "build", "loss_of_task", "train_task", "summary", "make_parser", "parse_args":
        monkeypatch.setattr(pah, name, getattr(pah, name))

def run(method, folder, *flags, seed=0, code=0):
    flags = [str(flag) for flag in (*RUN, "--seeds", seed, "--out", folder, *flags)]
    assert baselines.main([method, *flags]) == code
    if code == 0:
        return json.loads((folder / f"seed{seed}/results.json").read_text())

def made(method, **options):
    """A model of three tasks of two classes, and a batch."""
    torch.manual_seed(0)
    options = dict(width=4, stem="3x3", tasks=3, classes=2, precision="fp32", image_size=16, dataset="synthetic",
                   augment="none", strength=baselines.METHODS[method].strength, device="cpu", pretrained=False,
                   compile=False, proto_size=10, hidden=8, head="stored") | options
    model = baselines.METHODS[method](argparse.Namespace(**options))
    images = torch.randint(0, 256, (8, 3, 16, 16), dtype=torch.uint8)
    labels = torch.tensor([0, 1] * 4)
    model.begin_task(0, images, labels)
    return model.train(), images, labels

@pytest.fixture(scope="module")
def finetuned(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finetune")
    with pytest.MonkeyPatch.context() as patch:
        for name in "build", "loss_of_task", "train_task", "summary", "make_parser", "parse_args":
            patch.setattr(pah, name, getattr(pah, name))
        return [run("finetune", folder, "--stop-after", 3, seed=seed)["accuracy"] for seed in (0, 1)]

@pytest.mark.parametrize("method", STRENGTHS)
def test_learns_and_forgets_less_than_finetuning(method, finetuned, tmp_path):
    rates = ["--hyper-lr", 0.01, "--proto-lr", 0.01] if method.startswith("hn") else []
    tasks, gains = 3 if method == "agem" else 2, []
    for seed in 0, 1:
        r = run(method, tmp_path, "--strength", STRENGTHS[method], *rates, "--stop-after", tasks, seed=seed)
        assert r["LA"] > 40 and r["complete"]
        gains.append(pah.forgetting(finetuned[seed][:tasks]) - r["FM"])
    assert sum(gains) > 4 and (min(gains) > 2 or method == "agem"), gains  # A-GEM's effect is small
    assert r["args"]["method"] == method and r["stored"]["weights"] == sum(p.numel() for p in baselines.build(
        argparse.Namespace(**r["args"])).parameters())
    assert r["stored"]["images"] == (120 if method == "agem" else 200 if method in ("der", "derpp") else
                                     200 if method == "gcr" else 0)

def test_ewc_is_one_parabola_for_all_tasks():
    model, images, labels = made("ewc", strength=3.0)
    weights = list(model.parameters())
    start = baselines.flat(weights).detach()
    (model.loss(pah.normalise(images), labels) - F.cross_entropy(model(pah.normalise(images), 0), labels)).backward()
    model.end_task(images, labels)
    first = model.fisher.clone()
    assert first.min() >= 0 and first.max() > 0 and torch.equal(model.anchor[first > 0], start[first > 0])
    with torch.no_grad():
        for p in weights:
            p += 0.1
    model.begin_task(1, images, labels)
    model.end_task(images, labels)
    second, moved = model.fisher - first, baselines.flat(weights).detach()
    with torch.no_grad():
        for p in weights:
            p -= 0.3
    model.eval()
    penalty = model.loss(pah.normalise(images), labels) - F.cross_entropy(model(pah.normalise(images), 1), labels)
    gradient = baselines.flat(torch.autograd.grad(penalty, weights, materialize_grads=True))
    now = baselines.flat(weights).detach()
    torch.testing.assert_close(gradient, 3 * (first * (now - start) + second * (now - moved)), rtol=1e-3, atol=1e-5)

def test_fisher_information_of_a_head_by_hand():
    """Its expectation under the model's own labels: p (1 - p) times the squared feature, for two classes."""
    model, images, labels = made("ewc")
    one = images[:1].repeat(400, 1, 1, 1)
    model.end_task(one, labels[:1].repeat(400))
    p = model(pah.normalise(images[:1]), 0).softmax(1)[0, 0]
    expected = p * (1 - p) * model.features(pah.normalise(images[:1]))[0] ** 2
    of_head = dict(zip(dict(model.named_parameters()), model.fisher.split([w.numel() for w in model.parameters()])))
    torch.testing.assert_close(of_head["prototypes"].view(3, 2, -1)[0, 0], expected, rtol=0.3, atol=1e-4)

def test_si_path_is_how_far_the_loss_fell():
    model, images, labels = made("si", strength=5.0)
    x, losses = pah.normalise(images), []
    model.importance.fill_(1.0)  # a pull that must not count
    start = baselines.flat(model.parameters()).detach().clone()
    for _ in range(20):
        loss = model.loss(x, labels)
        losses.append(loss.item())
        model.zero_grad()
        loss.backward()
        pulled = baselines.flat([p.grad for p in model.parameters()])
        torch.testing.assert_close(pulled - model.gradient, 10 * (model.before - start), rtol=1e-2, atol=1e-4)
        with torch.no_grad():
            for p in model.parameters():
                p -= 1e-3 * p.grad
        model.after_step()
    fell = losses[0] - F.cross_entropy(model(x, 0), labels).item()
    assert fell > 0.05 and abs(model.path.sum().item() - fell) < 0.1 * fell
    path, moved = model.path.clone(), baselines.flat(model.parameters()).detach() - start
    model.end_task(images, labels)
    torch.testing.assert_close(model.importance, 1 + (path / (moved**2 + 0.1)).clamp(min=0))
    assert not model.path.any()
    torch.testing.assert_close(model.anchor, start + moved)

def test_agem_projection_by_hand():
    g, against, along = torch.tensor([1.0, 0.0]), torch.tensor([-1.0, 1.0]), torch.tensor([1.0, 1.0])
    assert torch.equal(baselines.projected(g, against), torch.tensor([0.5, 0.5]))
    assert torch.equal(baselines.projected(g, along), g)

def test_agem_step_does_not_raise_the_loss_of_stored_images():
    model, images, labels = made("agem")
    model.end_task(images, labels)
    assert model.memory.filled == 8 and model.memory.labels[:8].tolist() == [0] * 4 + [1] * 4
    model.begin_task(1, images, labels)
    model.eval()
    model.prototypes.data[1] = -model.prototypes.data[0]  # opposite wishes
    x = pah.normalise(images)
    gradient = baselines.flat(torch.autograd.grad(model.loss(x, labels), list(model.parameters())))
    stored = F.cross_entropy(model(x, 0), labels)
    alone = F.cross_entropy(model(x, 1), labels)
    stored, alone = (baselines.flat(torch.autograd.grad(loss, list(model.parameters()))) for loss in (stored, alone))
    assert alone @ stored < -1e-4 and abs(gradient @ stored) < 1e-5

@pytest.mark.parametrize("method, beta", [("der", 0.0), ("derpp", 0.5), ("gcr", 0.5)])
def test_terms_of_stored_images(method, beta):
    model, images, labels = made(method, strength=0.7)
    model.eval()
    x, memory = pah.normalise(images), model.memory
    wanted = torch.randn(8, 2)
    memory.put(slice(8), images=images, labels=labels, logits=wanted, tasks=1, weights=torch.arange(8.0))
    memory.filled.fill_(8)
    share = torch.arange(8.0) / 28 if method == "gcr" else torch.full((8,), 1 / 8)
    logits = model(x, 1)  # the head of their own task, not of the present one
    expected = F.cross_entropy(model(x, 0), labels) + 0.7 * (share * (logits - wanted).square().mean(1)).sum()
    expected += beta * (share * F.cross_entropy(logits, labels, reduction="none")).sum()
    torch.testing.assert_close(model.loss(x, labels), expected)

def test_reservoir():
    """Each of 1,000 images is there with the same probability, and as it came."""
    model, images, labels = made("der")
    memory = model.memory
    for i in range(0, 1000, 50):
        numbers = torch.arange(i, i + 50) % 256
        x = pah.normalise(numbers[:, None, None, None].expand(-1, 3, 16, 16).to(torch.uint8))
        memory.offer(x, torch.arange(i, i + 50), torch.zeros(50, 2), 0)
    assert memory.filled == 200 and memory.seen == 1000
    assert torch.equal(memory.images[:, 0, 0, 0].long(), memory.labels % 256)
    assert len(memory.labels.unique()) == 200 and 400 < memory.labels.float().mean() < 600

def test_matching_finds_the_rows_and_their_weights():
    torch.manual_seed(0)
    rows = F.normalize(torch.randn(40, 60))
    rows[8] = F.normalize(rows[7] + 0.5 * rows[9], dim=0)  # almost row 7, whose part is covered already
    chosen, weights = baselines.matching(rows, 3 * rows[7] + 2 * rows[21] + rows[30], 3, ridge=0)
    assert sorted(chosen) == [7, 21, 30]
    torch.testing.assert_close(weights[[chosen.index(i) for i in (7, 21, 30)]], torch.tensor([3.0, 2.0, 1.0]))
    assert baselines.matching(rows, rows.sum(0), 50)[1].min() >= 0

def test_frozen_parts_and_what_a_task_trains(tmp_path):
    for method, frozen in ("pnn", "backbone.columns.0."), ("hn2", "backbone."), ("hn3", "backbone."):
        folder = tmp_path / method
        run(method, folder, "--stop-after", 1)
        before = torch.load(folder / "seed0/checkpoint.pt", weights_only=True)["model"]
        r = run(method, folder, "--stop-after", 2, "--resume")
        after = torch.load(folder / "seed0/checkpoint.pt", weights_only=True)["model"]
        names = [name for name in before if name.startswith(frozen)]
        assert len(names) > 50 and all(torch.equal(before[name], after[name]) for name in names)
        changed = "backbone.columns.1.conv1.weight" if method == "pnn" else "hypernetwork.layers.0.weight"
        assert not torch.equal(before[changed], after[changed])
        if method == "pnn":
            assert r["accuracy"][1][0] == r["accuracy"][0][0]

def test_hypernetwork_is_held_where_it_was():
    model, images, labels = made("hn2", strength=2.0)
    model.begin_task(1, images, labels)
    assert torch.equal(model.prototypes[1], model.prototypes[0])
    model.train()
    x = pah.normalise(images)
    assert not model.backbone.training and model.hypernetwork.tails[1].training
    with torch.no_grad():
        model.hypernetwork.body[0].weight += 0.05
    model.eval()
    moved = sum((new[0] - model.old[name][0]).square().sum()
                for name, new in model.hypernetwork(model.prototypes[:2]).items())
    assert moved > 0.1
    torch.testing.assert_close(model.loss(x, labels), F.cross_entropy(model(x, 1), labels) + 2 * moved)

def test_features_side_by_side():
    """Of all tasks so far: each head sees its own task's, so that logits are the same as one by one."""
    for method in "pnn", "hn3":
        model, images, labels = made(method)
        for task in 1, 2:
            model.begin_task(task, images, labels)
        model.prototypes.data.normal_()
        model.eval()
        x = pah.normalise(images)
        together = torch.einsum("bd,ncd->bnc", model.features(x), model.heads(3))
        for task in range(3):
            torch.testing.assert_close(together[:, task], model(x, task), rtol=1e-4, atol=1e-3)
        assert (together[:, 0] - together[:, 1]).abs().max() > 1e-3

def test_resumed_run_is_the_same_run(tmp_path):
    for method in "derpp", "si":
        run(method, tmp_path / "a")
        run(method, tmp_path / "b", "--stop-after", 1)
        run(method, tmp_path / "b", "--resume")
        a, b = (torch.load(tmp_path / f"{x}/seed0/checkpoint.pt", weights_only=True)["model"] for x in "ab")
        assert all(torch.equal(a[name], b[name]) for name in a)
        for x in "ab":
            (tmp_path / x / "seed0").rename(tmp_path / f"{x}{method}")

def test_report_and_bad_input(tmp_path, capsys):
    run("si", tmp_path, "--strength", 7)
    assert pah.main(["--report", str(tmp_path)]) == 2  # baselines.py's own parser wants a method
    run("ewc", tmp_path, "--joint", code=2)
    assert "--joint" in capsys.readouterr().err
    run("nonsense", tmp_path, code=2)
    assert capsys.readouterr().err.count("\n") == 1

def test_report_of_pah(tmp_path, capsys):
    """pah.py itself tells these runs apart."""
    patch = pytest.MonkeyPatch()
    with patch.context() as m:
        for name in "build", "loss_of_task", "train_task", "summary", "make_parser", "parse_args":
            m.setattr(pah, name, getattr(pah, name))
        run("si", tmp_path, "--strength", 7)
    assert pah.main(["--report", str(tmp_path)]) == 0
    assert "--method si --strength 7.0" in capsys.readouterr().out

def kept(folder, name):
    """What stays after all tasks, as the README says it, of the finished run with this name."""
    for path in folder.rglob("results.json"):
        run = json.loads(path.read_text())
        if name_of(run["args"]) == name:
            parts = run.get("stored") or run["parameters"] | {"prototypes_per_task": 0}
            images = parts.get("images")
            numbers = sum(parts.values()) - (images or 0)
            return f"{numbers / 1e6:.2f} M" + (f", {images} images" if images else "")

def name_of(args):
    return f"{args['dataset']}, {args['tasks']} tasks {' '.join(pah.options_named(args))}".strip()

def test_readme_tables_are_what_report_prints(capsys):
    """A row's numbers are those of the last command above it, with the flags in the row. Further cells: what the
    run keeps, and what the paper reports."""
    root = Path(pah.__file__).parent
    assert pah.main(["--report", str(root / "assets/results"), "--format", "markdown"]) == 0
    printed, shown, reported, command = {}, set(), {}, ""
    for line in capsys.readouterr().out.splitlines():
        name, precision, *cells = [cell.strip() for cell in line.strip("|").split("|")]
        printed[name] = cells
    for line in pah.REPORTED:
        name, *cells = line.split(" | ")
        reported[name.split(",")[0]] = " / ".join(cell.split()[0] for cell in cells[:2])
    for line in (root / "README.md").read_text().splitlines():
        command = (re.findall("`python ([^`]*)`", line) or [command])[-1]
        words, *cells = [cell.strip() for cell in line.strip("|").split("|")]
        if not line.startswith("|") or len(cells) < 6 or not cells[0][:1].isdigit() or not cells[5]:
            continue
        flags = " ".join(re.findall("`(.*?)`", words)).split()
        of = baselines if set(flags) & set(baselines.METHODS) else pah
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(pah, "make_parser", of.make_parser)
            args = of.parse_args(command.split()[1:] + flags)
            name = name_of(vars(args))
        assert printed[name] == cells[:6], name
        assert of is pah or args.strength == baselines.METHODS[args.method].strength  # the table's is the default
        if len(cells) > 6:
            method = words.split(":")[0].split(",")[0]
            assert cells[6:] == [kept(root / "assets/results", name), reported.get(method, "")], name
        shown.add(name)
    assert len(shown) > 8 and shown == {name for name in printed if " tasks" in name}
