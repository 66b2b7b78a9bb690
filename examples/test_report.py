"""report.py, bench.py, the tables of README.md and assets/results.md, and run_all.sh."""

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import baselines
import bench
import pytest
import report
import torch
from baselines import pah
from PIL import Image, ImageColor

ROOT = Path(pah.__file__).parent
README = (ROOT / "README.md").read_text()
RESULTS = (ROOT / "assets/results.md").read_text()
REHEARSAL = RESULTS.split("## Rehearsal and many small tasks")[1].split("\n## ")[0]


@pytest.fixture
def leave(tmp_path):
    """A function that leaves a results.json: name, seed, AA, and options."""

    def leave(name, seed, AA, complete=True, **options):
        folder = tmp_path / name / f"seed{seed}"
        folder.mkdir(parents=True)
        args = vars(pah.parse_args(["--dataset", "synthetic", "--precision", "fp32"])) | options
        R = [[90.0], [AA, AA]]
        result = {"args": args, "seed": seed, "accuracy": R, "class_incremental": [90, AA / 2]}
        result |= {"seconds": 61, "complete": complete}
        (folder / "results.json").write_text(json.dumps(result))
        return folder / "results.json"

    return leave


def rows_of(tmp_path, capsys, *flags):
    report.main([str(tmp_path), *flags])
    out, err = capsys.readouterr()
    return [line for line in out.splitlines() if line], err


def test_a_row_is_a_setting_with_all_its_seeds(leave, tmp_path, capsys):
    leave("a", 0, 80.0)
    leave("a", 1, 82.0)
    leave("b", 0, 40.0, lam=0.5)
    rows, err = rows_of(tmp_path, capsys)
    assert rows[0] == "synthetic, 10 tasks"
    assert re.split("  +", rows[2]) == [
        *("PAH", "81.00 ± 1.41", "9.00 ± 1.41", "85.50 ± 0.71", "40.50 ± 0.71"),
        *("0 1", "0:01:01", "-9.00 ± 1.41", "fp32"),
    ]
    assert re.split("  +", rows[3])[:2] == ["PAH --lam 0.5", "40.00"]
    assert err == ""


def test_mirrored_has_a_column_where_a_run_has_it(leave, tmp_path, capsys):
    path = leave("a", 0, 80.0)
    leave("b", 0, 40.0, lam=0.5)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"mirrored": [81.0, 84.5]}))
    for style in ("text", "markdown", "latex"):
        rows, _ = rows_of(tmp_path, capsys, "--format", style)
        (header,) = (row for row in rows if "LA" in row)
        assert "precision" in header and "AA mirrored" in header
        assert ["82.75" in row for row in rows if "PAH" in row] == [True, False]
    (tmp_path / "a/seed0/results.json").unlink()
    rows, err = rows_of(tmp_path, capsys)
    assert rows[1].split()[-1] == "precision" and rows[2].split()[-1] == "fp32"
    assert err == ""


def test_data_sets_of_the_same_last_name_are_apart(leave, tmp_path, capsys):
    leave("a", 0, 80.0, dataset="here/cats")
    leave("b", 1, 82.0, dataset="there/cats")
    rows, _ = rows_of(tmp_path, capsys)
    assert [row for row in rows if "tasks" in row] == [
        "here/cats, 10 tasks",
        "there/cats, 10 tasks",
    ]


def test_runs_behind_links_are_found_once(leave, tmp_path, capsys):
    leave("a", 0, 80.0)
    (tmp_path / "elsewhere").mkdir()
    os.symlink(tmp_path / "a", tmp_path / "elsewhere/a")
    os.symlink(tmp_path, tmp_path / "elsewhere/up")
    rows, err = rows_of(tmp_path / "elsewhere", capsys)
    assert rows[2].split()[:2] == ["PAH", "80.00"]
    assert err == ""


def test_what_is_not_a_finished_run_is_left_out(leave, tmp_path, capsys):
    leave("a", 0, 80.0)
    leave("again", 0, 81.0)
    leave("unfinished", 1, 80.0, complete=False)
    leave("nan", 2, math.nan)
    leave("infinite", 4, math.inf)
    for i, junk in enumerate([b"{", b"[]", b"null", b'"x"', b"\xff", b"{}", b'{"args": 1}']):
        leave(f"junk{i}", 3, 1.0).write_bytes(junk)
    rows, err = rows_of(tmp_path, capsys)
    assert len(rows) == 3
    assert err.count("left out: ") == 11
    assert "counted already" in err


def test_no_finished_run(tmp_path):
    with pytest.raises(pah.UserError, match="no finished run below"):
        report.main([str(tmp_path)])


@pytest.mark.parametrize(
    "options, name",
    [
        ({"method": "lwf"}, "lwf"),
        ({"mu": 0.0, "proto_init": "random"}, "PAH --mu 0.0 --proto-init random"),
        ({"method": "si", "strength": 30.0}, "si --strength 30.0"),
        ({"method": "pnn", "strength": None, "optimizer": "muon"}, "pnn"),
        ({"shuffle_classes": True}, "PAH --shuffle-classes"),
        ({"method": "der", "buffer_size": 17}, "der --buffer-size 17"),
        ({"stop_after": 5}, "PAH --stop-after 5"),
        ({"rehearsal": False, "report": None}, "PAH"),  # of earlier versions
        ({"sp_updates": "all"}, "PAH --sp-updates all"),
    ],
)
def test_a_setting_is_named_by_all_options_that_are_not_the_default(options, name):
    args = vars(pah.parse_args([])) | options
    assert report.setting(args) == ("cifar100, 10 tasks", name)


def test_all_options_but_those_of_the_machine_make_a_setting():
    args = vars(pah.parse_args([]))
    changed = {name for name in args if report.setting(args | {name: "x"}) != report.setting(args)}
    assert set(args) - changed == (pah.MAY_DIFFER | {"precision"}) - {"stop_after"}


def test_markdown(leave, tmp_path, capsys):
    leave("a", 0, 80.0)
    rows, _ = rows_of(tmp_path, capsys, "--format", "markdown")
    assert rows[0] == "**synthetic, 10 tasks**"
    assert {row.count("|") for row in rows[1:]} == {len(report.COLUMNS)}  # no "AA mirrored"


def test_latex(leave, tmp_path, capsys):
    leave("a", 0, 80.0, dataset="a&b_50%#")
    leave("a", 1, 82.0, dataset="a&b_50%#", lam=0.5)
    rows, _ = rows_of(tmp_path, capsys, "--format", "latex")
    text = "\n".join(rows)
    assert text.count(r"\begin{tabular}") == text.count(r"\end{tabular}") == 1
    assert text.count("rule") == 4
    assert r"a\&b\_50\%\#, 10 tasks" in text
    assert "-{}-lam 0.5" in text


def test_the_papers_rows_stand_above_its_data_sets(leave, tmp_path, capsys):
    leave("a", 0, 80.0, dataset="cifar100")
    leave("b", 0, 60.0, dataset="tinyimagenet", tasks=10)
    leave("c", 0, 60.0, dataset="tinyimagenet", tasks=20)
    leave("d", 0, 60.0, dataset="tinyimagenet", tasks=5)
    rows, _ = rows_of(tmp_path, capsys)
    cells = [re.split("  +", row)[1:3] for row in rows if row.startswith("PAH (reported)")]
    assert cells == [
        ["74.46 ± 0.08", "1.71 ± 0.02"],
        ["60.48 ± 0.148", "3.24 ± 0.6"],
        ["63.65 ± 1.94", "4.43 ± 0.07"],
    ]
    reported = [row.split()[0].strip(",") for row in rows if "(reported)" in row]
    of_ten, of_twenty = ["GCR", "DER", "CCLIS"], ["SI", "A-GEM", "PNN", "HN-2", "HN-3", "PAH"]
    assert reported == [*of_ten, *of_twenty, *of_ten, "PAH", *of_twenty]


def test_a_picture_has_one_colour_scale(leave, tmp_path):
    for name, AA in (("high", 100.0), ("low", 0.0)):
        leave(name, 0, AA)
        report.main([str(tmp_path / name), "--picture", str(tmp_path / f"{name}.png")])
    high, low = (Image.open(tmp_path / f"{name}.png").getcolors(10**6) for name in ("high", "low"))
    assert (0, 50, 130) in [colour for _, colour in high]
    assert (0, 50, 130) not in [colour for _, colour in low]
    assert (230, 110, 0) in [colour for _, colour in low]


def test_the_picture_of_prototypes_shows_where_they_started(tmp_path):
    """With a learning rate of zero both halves are alike, otherwise not."""
    flags = "--dataset synthetic --tasks 5 --stop-after 2 --width 4 --precision fp32 --device cpu"
    for rate in ("0", "0.01"):
        out = ["--out", str(tmp_path / rate), "--seeds", "1", "--proto-lr", rate]
        pah.main([*flags.split(), "--epochs", "1", *out])
        report.main([str(tmp_path / rate), "--prototypes", str(tmp_path / f"{rate}.png")])
        picture = Image.open(tmp_path / f"{rate}.png")
        first = picture.crop((56, 136, 56 + 4 * 64, 136 + 2 * 64))
        last = picture.crop((344, 136, 344 + 4 * 64, 136 + 2 * 64))
        assert (first.tobytes() == last.tobytes()) == (rate == "0")
        assert len(first.getcolors(10**6)) > 100


@pytest.fixture
def texts(monkeypatch):
    """A list of what is written into pictures from now on."""
    from PIL import ImageDraw

    written, text = [], ImageDraw.ImageDraw.text
    monkeypatch.setattr(
        ImageDraw.ImageDraw, "text", lambda *a, **k: (written.append(a[2]), text(*a, **k))
    )
    return written


def test_a_picture_shows_two_runs_side_by_side_on_one_scale(leave, tmp_path, texts):
    leave("a", 0, 100.0, epochs=8)
    leave("b", 0, 0.0, epochs=8, lam=0.0, mu=0.0)
    folders = [str(tmp_path / name) for name in "ab"]
    report.main([*folders, "--picture", str(tmp_path / "a.png")])
    assert [text for text in texts if "AA" in text] == [
        "PAH: AA 100.0, FM -10.0",
        "finetuning: AA 0.0, FM 90.0",
    ]
    picture = Image.open(tmp_path / "a.png")
    assert picture.getpixel((56 + 2, 136 + 64 + 2)) == (0, 50, 130)  # task 1 after task 2
    assert picture.getpixel((480 + 24 + 56 + 2, 136 + 64 + 2)) == (230, 110, 0)
    assert picture.getpixel((480 + 24 + 56 - 1, 136 + 64 + 2)) == (255, 255, 255)
    assert picture.width == 2 * 480 + 24


def test_a_picture_shows_no_more_than_two_runs_on_the_same_tasks(leave, tmp_path):
    leave("a", 0, 80.0)
    leave("b", 0, 80.0, tasks=5)
    path = str(tmp_path / "a.png")
    with pytest.raises(pah.UserError, match="one run, or two on the same tasks, but 2 were found"):
        report.main([str(tmp_path), "--picture", path])
    leave("a", 1, 80.0)
    leave("a", 2, 80.0)
    with pytest.raises(pah.UserError, match="one run, or two on the same tasks, but 3 were found"):
        report.main([str(tmp_path / "a"), "--picture", path])
    with pytest.raises(pah.UserError, match="prototypes are of one run, but 3 were found"):
        report.main([str(tmp_path / "a"), "--prototypes", path])
    with pytest.raises(pah.UserError, match="no run below"):
        report.main([str(tmp_path / "c"), "--picture", path])


def end_of_curve(picture, colour):
    """The accuracy at which the line of this colour ends, by the dash before its name."""
    right = picture.width - 1
    while not (ys := [y for y in range(700) if picture.getpixel((right, y)) == colour]):
        right -= 1
    return 100 - (sum(ys) / len(ys) - 60) / 560 * 100  # from 100 at the top to 0 at the bottom


def test_curves_are_means_over_the_seeds(leave, tmp_path):
    """Two tasks: from 90 down to (90 + AA) / 2, in the colour of the setting."""
    leave("a", 0, 20.0)
    leave("a", 1, 40.0)
    leave("b", 0, 80.0, lam=0.5)
    leave("unfinished", 2, 0.0, complete=False)
    report.main([str(tmp_path), "--curves", str(tmp_path / "curves.png")])
    picture = Image.open(tmp_path / "curves.png")
    for colour, AA in zip(report.COLOURS, (30, 80), strict=False):
        end = end_of_curve(picture, ImageColor.getrgb(colour))
        assert 30 + 0.7 * end == pytest.approx(AA, abs=0.5)  # 30% is at the bottom


def test_curves_keep_apart_what_the_table_keeps_apart(leave, tmp_path, monkeypatch):
    """Two precisions are two lines, and a copy of a seed does not count twice."""
    leave("a", 0, 20.0)
    leave("copy", 0, 80.0)
    leave("b", 0, 40.0, precision="bf16")
    colours = ["red", "blue", "green"]
    monkeypatch.setattr(report, "COLOURS", colours)
    report.main([str(tmp_path), "--curves", str(tmp_path / "curves.png")])
    picture = Image.open(tmp_path / "curves.png")
    drawn = {colour for _, colour in picture.getcolors(10**6)}
    assert [ImageColor.getrgb(colour) in drawn for colour in colours] == [True, True, False]
    end = end_of_curve(picture, ImageColor.getrgb("red"))
    assert 20 + 0.8 * end == pytest.approx(20, abs=0.5)  # 20%, the lowest, is at the bottom


def test_names_of_curves_do_not_overlap(leave, tmp_path):
    leave("a", 0, 50.0)
    leave("b", 0, 50.1, lam=0.5)
    report.main([str(tmp_path), "--curves", str(tmp_path / "curves.png")])
    picture = Image.open(tmp_path / "curves.png")
    lower, upper = (end_of_curve(picture, ImageColor.getrgb(c)) for c in report.COLOURS[:2])
    assert upper - lower == pytest.approx(30 / 5.6, abs=0.5)


def test_curves_of_perfect_runs(leave, tmp_path):
    folder = leave("a", 0, 100.0)
    result = json.loads(folder.read_text())
    folder.write_text(json.dumps(result | {"accuracy": [[100.0], [100.0, 100.0]]}))
    report.main([str(tmp_path), "--curves", str(tmp_path / "curves.png")])
    assert (tmp_path / "curves.png").exists()


def test_ablations_show_the_settings_that_differ_in_one_option(leave, tmp_path, texts):
    leave("a", 0, 80.0)
    leave("b", 0, 60.0, lam=0.5)
    leave("b", 1, 64.0, lam=0.5)
    leave("c", 0, 40.0, lam=0.25)
    leave("d", 0, 10.0, lam=0.5, mu=0.0)
    leave("e", 0, 20.0, mu=0.0)
    path = str(tmp_path / "curves.png")
    groups = report.collect([tmp_path])
    found = report.values_of("lam", groups)
    AA = {x: [pah.metrics(run["accuracy"])["AA"] for run in runs] for x, runs in found.items()}
    assert AA == {0.25: [40.0], 0.5: [60.0, 64.0], 1.0: [80.0]}
    report.main([str(tmp_path), "--curves", path, "--over", "lam", "mu"])
    assert [text for text in texts if "--" in text] == ["--lam", "--mu"]
    for value in ("0.25", "0.5", "1"):
        assert value in texts
    picture = Image.open(path)
    assert {"20", "40", "60", "80", "100"} <= set(texts)
    of_AA = [(80 + 40, 60 + 150), (80 + 40 + 280, 60 + 50)]  # 40% at 0.25, 80% at 1
    for place in of_AA:
        assert picture.getpixel(place) == ImageColor.getrgb(report.COLOURS[0])
    assert picture.width == 80 + 2 * 380


def test_what_cannot_be_drawn_over_an_option_says_so(leave, tmp_path, capsys):
    leave("a", 0, 80.0)
    curves = ["--curves", tmp_path / "a.png", "--over"]
    assert "no two settings differ in this option" in end_of_report(tmp_path, *curves, "lam")
    assert "is not an option with numbers" in end_of_report(tmp_path, *curves, "proto-init")
    assert "is not an option with numbers" in end_of_report(tmp_path, *curves, "lambda")
    path = leave("b", 0, 80.0, epochs=5, method="joint")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"accuracy": [[80.0, 90.0]]}))
    assert "no two settings differ" in end_of_report(path.parent, *curves, "epochs")
    assert "no two settings differ" in end_of_report(tmp_path, *curves, "epochs")
    with pytest.raises(SystemExit):
        report.main([str(tmp_path), "--over", "lam"])
    assert "--over needs --curves" in capsys.readouterr().err


def end_of_report(*args):
    """The one line on which report.py ends, as the command line prints it."""
    command = [sys.executable, ROOT / "examples/report.py", *map(str, args)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    return line


def test_pictures_of_what_is_no_number_are_refused(leave, tmp_path):
    leave("a", 0, math.nan)
    picture = tmp_path / "a.png"
    assert "not all numbers" in end_of_report(tmp_path, "--picture", picture)
    assert not picture.exists()


def test_a_picture_is_a_png_file(leave, tmp_path, capsys):
    path = leave("a", 0, 80.0)
    before = path.read_bytes()
    for option in ("--picture", "--curves", "--prototypes"):
        with pytest.raises(SystemExit):
            report.main([str(tmp_path), option, str(path)])
        assert "pictures are .png files" in capsys.readouterr().err
    assert path.read_bytes() == before


def test_curves_are_named_by_whole_options(leave, tmp_path, texts):
    """--epochs 8 is not hidden by --hidden 8 of all runs."""
    leave("a", 0, 20.0, epochs=8, hidden=8)
    leave("b", 0, 30.0, epochs=9, hidden=8)
    report.main([str(tmp_path), "--curves", str(tmp_path / "curves.png")])
    assert texts[-2:] == ["PAH --epochs 9", "PAH --epochs 8"]


def test_curves_are_named_by_their_methods(leave, tmp_path, texts):
    leave("a", 0, 20.0, method="lwf")
    leave("b", 0, 30.0, method="lwf", lam=2.0)
    leave("c", 0, 40.0)
    report.main([str(tmp_path / "a"), str(tmp_path / "b"), "--curves", str(tmp_path / "a.png")])
    assert texts[-2:] == ["lwf --lam 2.0", "lwf"]
    report.main([str(tmp_path), "--curves", str(tmp_path / "b.png")])
    assert texts[-3:] == ["PAH", "lwf --lam 2.0", "lwf"]


def test_curves_of_more_settings_than_colours_are_refused(leave, tmp_path):
    for i in range(len(report.COLOURS) + 1):
        leave(f"run{i}", 0, 50.0, epochs=i)
    with pytest.raises(pah.UserError, match="curves show 6 settings, but 7 were found"):
        report.main([str(tmp_path), "--curves", str(tmp_path / "curves.png")])


def test_a_picture_of_joint_training_is_refused(leave, tmp_path):
    path = leave("a", 0, 80.0)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"accuracy": [[80.0, 90.0]]}))
    assert "one by one" in end_of_report(tmp_path, "--picture", tmp_path / "a.png")


def test_prototypes_of_a_gpu_need_one(tmp_path, monkeypatch):
    flags = "--dataset synthetic --tasks 5 --stop-after 1 --width 4 --epochs 1 --device cpu"
    pah.main([*flags.split(), "--out", str(tmp_path)])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    path = tmp_path / "seed0/checkpoint.pt"
    saved = torch.load(path, weights_only=True)
    saved["results"]["args"]["device"] = "cuda"
    torch.save(saved, path)
    with pytest.raises(pah.UserError, match="began on a GPU"):
        report.main([str(tmp_path), "--prototypes", str(tmp_path / "a.png")])


def test_prototypes_of_rotated_labels_are_drawn(tmp_path):
    flags = "--dataset synthetic --tasks 5 --stop-after 1 --width 4 --epochs 1 --device cpu"
    baselines.main(["rotated", *flags.split(), "--out", str(tmp_path)])
    report.main([str(tmp_path), "--prototypes", str(tmp_path / "a.png")])
    assert Image.open(tmp_path / "a.png").height == 136 + 64


@pytest.mark.parametrize("method", ["joint", "lwf", "thumbnails"])
def test_prototypes_of_another_method_are_refused(method, tmp_path):
    flags = "--dataset synthetic --tasks 5 --width 4 --epochs 1 --precision fp32 --device cpu"
    baselines.main([method, *flags.split(), "--out", str(tmp_path)])
    line = end_of_report(tmp_path / "seed0", "--prototypes", tmp_path / "a.png")
    assert line == f"report.py: {tmp_path}/seed0 is a run of {method}, not of PAH"


def test_prototypes_without_a_checkpoint_are_refused(leave, tmp_path):
    leave("a", 0, 80.0)
    line = end_of_report(tmp_path / "a", "--prototypes", tmp_path / "a.png")
    assert "cannot read" in line and "checkpoint.pt" in line


def test_curves_show_one_data_set(leave, tmp_path):
    leave("a", 0, 80.0)
    leave("b", 0, 80.0, dataset="mnist")
    with pytest.raises(pah.UserError, match="one data set, but 2 were found"):
        report.main([str(tmp_path), "--curves", str(tmp_path / "curves.png")])


# -----------------------------------------------------------------------------
# bench.py


@pytest.mark.parametrize("method", [[], ["lwf"], ["rehearsal"]])
def test_bench(method, capsys):
    flags = "--dataset synthetic --tasks 5 --width 4 --precision fp32 --device cpu"
    bench.main([*method, *flags.split()])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines[:4]] == ["task 1", "task 2", "task 3", "task 5"]
    assert lines[4].startswith("peak memory: ")
    assert re.fullmatch(r"predicted: 0:\d\d:\d\d per seed, \d+ s", lines[5])
    assert max(map(len, lines)) <= 80


def test_bench_needs_no_image_of_each_class(capsys):
    flags = "--dataset synthetic --tasks 2 --width 4 --batch-size 2 --device cpu"
    bench.main(flags.split())
    assert "predicted: " in capsys.readouterr().out


@pytest.mark.parametrize("method, optimizer", [("lwf", "muon"), ("derpp", "sgd")])
def test_bench_times_the_optimizer_of_the_method(method, optimizer, monkeypatch):
    class Called(Exception):
        pass

    def called(*args):
        raise Called

    monkeypatch.setitem(bench.baselines.OPTIMIZERS, optimizer, called)
    with pytest.raises(Called):
        bench.main([method, "--dataset", "synthetic", "--width", "4", "--device", "cpu"])


def test_the_prediction_is_between_the_tasks_that_were_measured():
    seconds = {0: 1.0, 1: 3.0, 4: 9.0}
    assert [bench.interpolate(k, seconds) for k in range(5)] == [1, 3, 5, 7, 9]


# -----------------------------------------------------------------------------
# README.md, assets/results.md and assets/notebook.md


@pytest.mark.parametrize("path", ["README.md", "assets/results.md", "assets/notebook.md"])
def test_links_lead_to_files_and_headings(path):
    """As GitHub names headings: in lower case, without punctuation, with hyphens for blanks."""
    links = re.findall(r"\]\(([^)\s]+)\)", (ROOT / path).read_text().replace("\n", " "))
    links = [link for link in links if not link.startswith("http")]
    assert links
    for link in links:
        name, _, anchor = link.partition("#")
        target = (ROOT / path).parent / name if name else ROOT / path
        assert target.exists(), link
        if anchor:
            headings = re.findall(r"^#+ (.*)", target.read_text(), re.MULTILINE)
            names = [re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings]
            assert anchor in [name.replace(" ", "-") for name in names], link


def printed():
    """What report.py prints of the committed results: {(data set, setting): cells}."""
    rows = {}
    for group, settings in report.collect([ROOT / "assets/results"]).items():
        for name, *cells in report.table(group, settings)[1:]:
            if "(reported)" not in name:
                rows[group, name] = cells
    return rows


def numbers_in(text):
    """All numbers of a text, as written."""
    return set(re.findall(r"\d+(?:\.\d+)?", text))


def setting_of(words):
    """(data set, setting) of a command's options, as report.py names them."""
    of_method = set(words) & set(baselines.METHODS)
    parse = baselines.parse_args if of_method else pah.parse_args
    return report.setting(vars(parse(words)))


def test_other_methods_are_shown_with_their_defaults():
    section = RESULTS.split("## Other methods")[1].split("### ")[0]
    rows = re.findall(r"^\| [^`|]+: `(.+?)` \|", section, re.MULTILINE)
    assert len(rows) > 8
    for row in rows:
        words = row.split()
        assert baselines.parse_args(words) == baselines.parse_args(words[:1]), row


def rows_of_results():
    """(setting, first cell, other cells by column) of each row of the tables of results.

    A setting is the last command above the row and the options in its first cell.
    """
    command, header = "", []
    for line in RESULTS.splitlines():
        command = (re.findall("`python pah.py *([^`]*)`", line) or [command])[-1]
        words, *cells = [cell.strip() for cell in line.strip("|").split("|")]
        if cells[:1] == ["AA"]:
            header = cells
        if line.startswith("|") and len(cells) >= 6 and cells[0][:1].isdigit() and cells[5]:
            options = [word for code in re.findall("`(.*?)`", words) for word in code.split()]
            name = setting_of([*command.split(), *options])
            yield name, words, dict(zip(header, cells, strict=True))


def stored(name):
    """What is left after the last task: parameters and images."""
    for path in (ROOT / "assets/results").rglob("results.json"):
        run = json.loads(path.read_text())
        if report.setting(run["args"]) == name:
            parts = dict(run.get("stored") or run["parameters"])
            parts.pop("prototypes_per_task", None)
            images = parts.pop("images", 0)
            return f"{sum(parts.values()) / 1e6:.2f} M" + (f", {images} images" if images else "")
    return None


def test_the_tables_of_results_md_are_what_report_prints():
    reported, shown = {}, set()
    for line in report.REPORTED:
        name, *cells = line.split(" | ")
        reported[name.split(",")[0].replace("†", "")] = " / ".join(
            cell.split()[0] for cell in cells[:2]
        )
    rows = printed()
    for name, words, cells in rows_of_results():
        printed_cells = dict(zip(report.COLUMNS[1:], rows[name], strict=False))
        printed_cells["stored"] = stored(name)
        printed_cells["paper, AA / FM"] = reported.get(words.split(":")[0], "")
        assert cells == {column: printed_cells[column] for column in cells}, name
        shown.add(name)
    assert shown == set(rows)


def test_the_comparison_with_avalanche_is_what_was_measured():
    for method in ("lwf", "ewc", "si", "derpp"):
        cells = []
        for whose in ("ours", "theirs", "like-theirs"):
            path = ROOT / f"assets/avalanche/{method}-{whose}.json"
            if path.exists():
                measured = pah.metrics(json.loads(path.read_text())["accuracy"])
                cells.append(" / ".join(f"{measured[name]:.2f}" for name in ("AA", "FM", "LA")))
        row = re.search(rf"^\| `{method}.*?` \| (\d+\.\d+ / .*) \|$", RESULTS, re.MULTILINE)[1]
        assert [cell.strip() for cell in row.split("|") if cell.strip()] == cells


def test_the_table_of_the_readme_is_what_report_prints():
    lines = [line for line in README.splitlines() if line.startswith("| ")]
    ours = [line.split("|") for line in lines if "`python pah.py --" in line and " ± " in line]
    assert len(ours) == 2
    for _, _, command, AA, FM, _ in ours:
        cells = printed()[setting_of(command.strip(" `").split()[2:])]
        assert [AA.strip(), FM.strip()] == cells[:2]
        assert f"{number(cells[3]):.0f}" in numbers_in(README)  # without task labels


@pytest.mark.parametrize("text", [README, RESULTS], ids=["README", "results"])
def test_what_rehearsal_is_said_to_bring_is_what_was_measured(text):
    flags = "--tasks 50 --width 16 --image-size 24 --epochs 6"
    rows = [
        printed()[setting_of(f"{method} {flags}".split())]
        for method in ("rehearsal", "thumbnails", "")
    ]
    assert {f"{number(AA):.0f}" for AA, *_ in rows} <= numbers_in(text)


def number(cell):
    """The mean in a cell of a table."""
    return float(cell.split()[0])


@pytest.mark.parametrize("text", [README, RESULTS], ids=["README", "results"])
def test_how_far_pah_and_lwf_are_from_the_others_is_what_was_measured(text):
    flags = ["--width", "16", "--image-size", "24", "--epochs", "10"]
    others = ["pnn", "ewc", "si", "agem", "der", "derfresh", "derpp", "gcr", "hn2", "hn3"]
    AA = {
        method: number(printed()[setting_of([*method.split(), *flags])][0])
        for method in ("", "lwf", *others)
    }
    ours = AA.pop(""), AA.pop("lwf")
    behind = {f"{AA['pnn'] - value:.1f}" for value in ours}
    ahead = min(ours) - max(value for method, value in AA.items() if method != "pnn")
    assert behind | {f"{ahead:.0f}"} <= numbers_in(text)
    if text == README:
        assert {f"{value:.1f}" for value in ours} <= numbers_in(text)


def test_where_rehearsal_stops_helping_is_what_was_measured():
    small = "--width 16 --image-size 24"
    tiny = f"{small} --dataset tinyimagenet --tasks 20 --epochs 4"
    of_cifar = [f"{small} --tasks {k} --epochs 10" for k in (20, 10, 5)]
    AA, FM, LA = [], [], []
    for flags in (*of_cifar, f"{tiny} --shuffle-classes", tiny):
        before, after = (
            printed()[setting_of([*flags.split(), *more])] for more in ([], ["rehearsal"])
        )
        for changes, old, new in zip((AA, FM, LA), before, after, strict=False):
            changes.append(number(new) - number(old))
    changes = (-max(FM), -min(FM), -max(LA), -min(LA))
    assert {f"{change:.1f}" for change in changes} <= numbers_in(REHEARSAL)
    assert max(map(abs, AA)) < 0.5  # "less than half a point"


def test_what_rehearsal_does_to_the_first_tasks_by_label_is_what_was_measured():
    forgets, ends = {}, {}
    for more in ("", "-rehearsal", "-stored"):
        folder = ROOT / f"assets/results/tinyimagenet-20-small-label{more}"
        runs = [
            json.loads((folder / f"seed{seed}/results.json").read_text())["accuracy"]
            for seed in (0, 1)
        ]
        R = torch.tensor([[row + [0] * (20 - len(row)) for row in run] for run in runs]).mean(0)
        best = torch.tensor(
            [[max(run[k][j] for k in range(j, 19)) for j in range(6)] for run in runs]
        )
        forgets[more] = (best.mean(0) - R[19, :6]).mean().item()
        ends[more] = R[19, :6].mean().item(), R[19, 6:].mean().item()
    first, others = (b - a for a, b in zip(ends[""], ends["-rehearsal"], strict=True))
    said = [*forgets.values(), first, -others]
    assert {f"{value:.1f}" for value in said} <= numbers_in(REHEARSAL)


def test_what_rotated_labels_are_said_to_bring_is_what_was_measured():
    base = "--width 16 --image-size 24 --epochs 20"
    rows = {
        method: dict(
            zip(report.COLUMNS[1:], printed()[setting_of([method, *base.split()])], strict=True)
        )
        for method in ("pah", "rotated", "lwf", "rotated-lwf")
    }
    section = RESULTS.split("## Rotated labels")[1].split("\n## ")[0]
    prose = "".join(line for line in section.splitlines() if not line.startswith("|"))
    for column in ("AA", "LA", "FM", "AA mirrored"):
        for before, after in (("pah", "rotated"), ("lwf", "rotated-lwf")):
            gain = number(rows[after][column]) - number(rows[before][column])
            assert f"{gain:.1f}" in numbers_in(prose), (column, after)
    mirrored = [number(row["AA mirrored"]) - number(row["AA"]) for row in rows.values()]
    assert {f"{min(mirrored):.1f}", f"{max(mirrored):.1f}"} <= numbers_in(prose)
    said = {f"{number(row['AA']):.1f}" for row in rows.values()}

    wide = ["--width", "32", "--epochs", "20"]
    before, after = (
        dict(zip(report.COLUMNS[1:], printed()[setting_of([*method, *wide])], strict=True))
        for method in ([], ["rotated"])
    )
    for column in ("AA", "LA", "class-inc."):
        assert f"{number(after[column]) - number(before[column]):.1f}" in numbers_in(prose), column
    said |= {f"{number(row['AA']):.1f}" for row in (before, after)}
    assert said <= numbers_in(README)
    row = next(line for line in README.splitlines() if "baselines.py rotated --width 32" in line)
    assert [cell.strip() for cell in row.split("|")[3:5]] == [after["AA"], after["FM"]]


def changes(metric, before, after):
    """Of each seed, from the results of one folder to those of another."""
    runs = [
        [
            json.loads((ROOT / f"assets/results/{name}/seed{s}/results.json").read_text())
            for s in range(3)
        ]
        for name in (before, after)
    ]
    return [new[metric] - old[metric] for old, new in zip(*runs, strict=True)]


def test_rotated_labels_help_on_each_seed_of_cifar100():
    narrow = changes("AA", "cifar100-20epochs-pah", "cifar100-20epochs-rotated")
    wide = changes("AA", "cifar100-width32", "cifar100-width32-rotated")
    assert min(*narrow, *wide) > 0
    assert f"by {min(narrow):.1f} to {max(narrow):.1f} points for PAH" in RESULTS
    assert "on each seed, by {:.1f}, {:.1f} and {:.1f} points".format(*wide) in RESULTS


def test_what_rotated_labels_bring_in_30_epochs():
    section = RESULTS.split("## Rotated labels")[1].split("\n## ")[0]
    prose = " ".join(line.strip() for line in section.splitlines() if not line.startswith("|"))
    longer, gains = {}, {}
    for method in ("pah", "lwf", "rotated", "rotated-lwf"):
        more = changes("AA", f"cifar100-20epochs-{method}", f"cifar100-30epochs-{method}")
        longer[method] = sum(more) / 3
    for before, after in (("pah", "rotated"), ("lwf", "rotated-lwf")):
        gains[before] = changes("AA", f"cifar100-30epochs-{before}", f"cifar100-30epochs-{after}")
    said = "by {:.1f}, {:.1f} and {:.1f} points for PAH and {:.1f}, {:.1f} and {:.1f} for LwF"
    assert said.format(*gains["pah"], *gains["lwf"]) in prose
    assert min(gains["pah"] + gains["lwf"]) > 0
    said = "Ten more epochs change the AA of PAH and LwF by {pah:.1f} and {lwf:.1f} points"
    said += ", with rotated labels by {rotated:.1f} and {rotated-lwf:.1f}"
    assert said.format(**longer) in prose
    means = "and in 30 epochs by {:.1f} and {:.1f}".format(*(sum(x) / 3 for x in gains.values()))
    assert means in prose


def test_what_rotated_labels_bring_on_each_seed_of_tinyimagenet():
    AA, FM, LA = (
        changes(metric, "tinyimagenet-20-width32", "tinyimagenet-20-width32-rotated")
        for metric in ("AA", "FM", "LA")
    )
    said = "AA rises by {:.1f}, {:.1f} and {:.1f} points and FM by {:.1f}, {:.1f} and {:.1f}"
    assert said.format(*AA, *FM) in RESULTS
    assert min(LA) > 0

    tiny = "--dataset tinyimagenet --tasks 20 --image-size 32 --width 32 --epochs 10"
    before, after = (printed()[setting_of([*more, *tiny.split()])] for more in ([], ["rotated"]))
    mean_AA, _, mean_LA, without_labels = (
        f"{number(after[i]) - number(before[i]):.1f}" for i in range(4)
    )
    assert f"again: AA rises by {mean_AA}," in RESULTS.replace("\n", " ")
    assert f"LA rises on each seed, by {mean_LA} in the mean" in RESULTS.replace("\n  ", " ")
    assert f"Without task labels AA rises by {without_labels}." in RESULTS


def test_the_papers_figures_are_as_in_report():
    of_ten, of_twenty = (line.split(" | ") for line in report.REPORTED if line.startswith("PAH"))
    cifar, tiny_10, tiny_20 = of_twenty[1:3], of_ten[3:], of_twenty[3:]
    for text, expected in ((README, [cifar, tiny_20]), (RESULTS, [cifar, tiny_10, tiny_20])):
        rows = re.findall(r"^\|(?:[^|]*\|)? paper\b.*±.*", text, re.MULTILINE)
        assert [re.findall(r"[\d.]+ ± [\d.]+", row) for row in rows] == expected


# -----------------------------------------------------------------------------
# run_all.sh


@pytest.fixture
def run_all(tmp_path):
    """A function that starts run_all.sh with a stand-in for Python: (its end, calls of it).

    The stand-in notes what it is called with; there are `gpus` GPUs, and `failing` fails.
    """
    here = tmp_path / "with blanks"
    here.mkdir()
    (here / "run_all.sh").write_text((ROOT / "run_all.sh").read_text())

    def start(*flags, gpus=0, failing="nothing", **env):
        (here / "calls").unlink(missing_ok=True)
        stub = here / "python"
        stub.write_text(
            "#!/bin/sh\n"
            'case "$*" in\n'
            f"  *device_count*) echo {gpus} ;;\n"
            '  *bench.py*) echo "predicted: 1 day, 1:02:03 per seed, 90123 s" ;;\n'
            '  *) echo "$CUDA_VISIBLE_DEVICES $*" >>calls ;;\n'
            "esac\n"
            f'case "$*" in *{failing}*) exit 1 ;; esac\n'
        )
        stub.chmod(0o755)
        env = os.environ | {"PYTHON": str(stub), "CUDA_VISIBLE_DEVICES": ""} | env
        command = ["bash", str(here / "run_all.sh"), *flags]
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
        calls = here / "calls"
        return done, calls.read_text().splitlines() if calls.exists() else []

    return start


def test_run_all_runs_every_setting_once(run_all):
    done, calls = run_all("--quick", "--data", "my data")
    assert done.returncode == 0, done.stderr
    assert "32 settings, 2 seeds, 1 at a time: 1602 h 11 min" in done.stdout
    *calls, last = calls
    assert last.split() == ["examples/report.py", "runs"]
    assert len(set(calls)) == len(calls) == 32
    outs = set()
    for call in calls:
        script, *flags = call.replace("my data", "my_data").split()
        flags = [flag.replace("_", " ") for flag in flags]
        parse = pah.parse_args if script == "pah.py" else baselines.parse_args
        args = parse(flags)
        assert args.resume and args.seeds == [0, 1]
        assert args.data == "my data"
        outs.add(args.out)
    assert len(outs) == 32


def test_run_all_shares_the_settings_among_gpus(run_all):
    done, (*calls, _) = run_all(gpus=2, CUDA_VISIBLE_DEVICES="4,7")
    assert done.returncode == 0, done.stderr
    assert len({call.split(" ", 1)[1] for call in calls}) == len(calls) == 46
    assert {call.split()[0] for call in calls} == {"4", "7"}
    assert sum(call.startswith("4") for call in calls) == 23


def test_run_all_goes_on_after_a_failure_and_reports_it(run_all):
    for gpus in (0, 2):
        done, calls = run_all("--quick", gpus=gpus, failing="rehearsal")
        assert done.returncode == 1
        assert len(calls) == 33


def test_run_all_plans_without_running(run_all):
    done, calls = run_all("--plan")
    assert done.returncode == 0
    assert calls == []
    assert "46 settings" in done.stdout


def test_run_all_stops_if_the_data_cannot_be_read(run_all):
    done, calls = run_all(failing="bench.py")
    assert done.returncode == 1
    assert calls == []


def test_run_all_without_torch(run_all):
    done, calls = run_all(failing="device_count")
    assert done.returncode == 1
    assert calls == []
    assert "PYTHON=.venv/bin/python ./run_all.sh" in done.stdout
