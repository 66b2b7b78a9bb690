"""Tables and pictures of all finished runs below some folders.

    python examples/report.py runs                             # or --format markdown, latex
    python examples/report.py runs --curves curves.png         # AA after each task
    python examples/report.py runs --curves curves.png --over lam mu      # AA and FM over options
    python examples/report.py runs/cifar100-10/seed0 --picture accuracy.png     # or two runs
    python examples/report.py runs/cifar100-10/seed0 --prototypes prototypes.png

A row is a setting, named by the options that are not the default: mean and standard deviation
over its seeds. What the paper reports on the same tasks comes first.
"""

import argparse
import json
import math
import os
import re
import sys
from datetime import timedelta
from pathlib import Path
from statistics import mean, stdev

import baselines
import torch
from baselines import pah

# options that do not name a setting: those that change no number, and those named apart
UNNAMED = pah.MAY_DIFFER - {"stop_after"} | {"dataset", "tasks", "method", "precision"}
COLUMNS = ["setting", "AA", "FM", "LA", "class-inc.", "seeds", "time per seed", "BWT", "precision"]
COLUMNS += ["AA mirrored"]  # of baselines.py
# of Okabe and Ito (2008), for colour-blind readers
COLOURS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#000000"]

# Table 1 of the paper: AA and FM on Split-CIFAR100 in 10 tasks, then on TinyImageNet, where rows
# with a dagger have 10 tasks and the others 20. All rows but PAH's come from other papers.
REPORTED = """
GCR†, 200 stored images | 64.24 ± 0.83 | 24.12 ± 1.17 | 42.11 ± 1.01 | 40.36 ± 1.08
DER†, 200 stored images | 63.09 ± 1.09 | 25.98 ± 1.55 | 42.27 ± 0.90 | 40.43 ± 1.05
CCLIS†, 200 stored images | 72.93 ± 0.46 | 14.17 ± 0.20 | 48.29 ± 0.78 | 33.20 ± 0.75
SI | 63.58 ± 0.37 | 27.98 ± 0.34 | 44.96 ± 2.41 | 26.29 ± 1.40
A-GEM, 200-250 stored images | 59.81 ± 1.07 | 30.08 ± 0.91 | 60.45 ± 0.24 | 24.94 ± 1.24
PNN | 66.58 ± 1.00 | - | 62.15 ± 1.35 | -
HN-2, 200-400 stored images | 62.80 ± 1.60 | 4.10 ± 0.50 | 39.90 ± 0.40 | 10.20 ± 2.20
HN-3, 200-400 stored images | 58.80 ± 1.00 | 7.40 ± 0.90 | 31.40 ± 1.80 | 5.20 ± 0.70
PAH† | - | - | 60.48 ± 0.148 | 3.24 ± 0.6
PAH | 74.46 ± 0.08 | 1.71 ± 0.02 | 63.65 ± 1.94 | 4.43 ± 0.07
""".strip().splitlines()


def setting(args):
    """(data set and number of tasks, method and options that are not the default).

    Options of other versions count as well, so that no two different runs become one setting.
    """
    parser = baselines.make_parser()
    words = [args.get("method", "PAH")]
    for name in vars(parser.parse_args(["lwf"])) | args:
        default = parser.get_default(name)
        value = args.get(name, default)
        if name not in UNNAMED and value != default and value is not False:
            words += [f"--{name.replace('_', '-')}", str(value)]
    words = [word for word in words if word != "True"]
    return f"{args['dataset']}, {args['tasks']} tasks", " ".join(words)


def check(result):
    """Raise ValueError unless all accuracies are numbers."""
    if not all(math.isfinite(accuracy) for row in result["accuracy"] for accuracy in row):
        raise ValueError("its accuracies are not all numbers")


def read(path):
    """What the results.json at `path` holds. Raises UserError."""
    with pah.user_error(f"cannot read {path}"):
        result = json.loads(path.read_text())
        check(result)
    return result


def numbers(result):
    """The columns of numbers, by name; NaN where a run has none."""
    values = pah.metrics(result["accuracy"])
    values |= {"class-inc.": result["class_incremental"][-1], "time": result["seconds"]}
    values["mirrored"] = mean(result["mirrored"]) if "mirrored" in result else None
    return {name: math.nan if value is None else value for name, value in values.items()}


def find_results(folders):
    """All results.json below the folders, also behind links."""
    seen = set()
    for folder in folders:
        for path, below, files in os.walk(folder, followlinks=True):
            real = os.path.realpath(path)
            if real in seen:  # a link that leads back up
                below.clear()
            elif "results.json" in files:
                yield Path(path) / "results.json"
            below.sort()
            seen.add(real)


def collect(folders):
    """{data set: {(setting, precision): {seed: what results.json holds}}} of all finished runs."""
    groups = {}
    for path in find_results(folders):
        try:
            result = json.loads(path.read_text())
            check(result)
            numbers(result)
            if not result["complete"]:
                raise ValueError("not finished")
            group, name = setting(result["args"])
            seeds = groups.setdefault(group, {}).setdefault((name, result["args"]["precision"]), {})
            if result["seed"] in seeds:
                raise ValueError("this seed of this setting is counted already")
            seeds[result["seed"]] = result
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            print(f"left out: {path} ({type(error).__name__}: {error})", file=sys.stderr)
    return groups


def mean_and_deviation(values):
    if math.isnan(mean(values)):
        return "-"
    return f"{mean(values):.2f}" + (f" ± {stdev(values):.2f}" if len(values) > 1 else "")


def table(group, settings):
    """Rows of cells for one data set, the header first."""
    rows = [COLUMNS]
    for name, *cells in [line.split(" | ") for line in REPORTED]:
        of_tiny = "tinyimagenet, 10 tasks" if "†" in name else "tinyimagenet, 20 tasks"
        AA, FM = {"cifar100, 10 tasks": cells[:2], of_tiny: cells[2:]}.get(group, ["-", "-"])
        if AA != "-":
            rows.append([f"{name.replace('†', '')} (reported)", AA, FM, *7 * ["-"]])
    for (name, precision), seeds in settings.items():
        runs = [numbers(result) for result in seeds.values()]
        columns = {name: [run[name] for run in runs] for name in runs[0]}
        cells = [mean_and_deviation(columns[name]) for name in ("AA", "FM", "LA", "class-inc.")]
        seconds = timedelta(seconds=round(mean(columns["time"])))
        cells += [" ".join(map(str, seeds)), str(seconds), mean_and_deviation(columns["BWT"])]
        rows.append([name, *cells, precision, mean_and_deviation(columns["mirrored"])])
    if all(row[-1] == "-" for row in rows[1:]):
        rows = [row[:-1] for row in rows]
    return rows


def print_text(group, rows):
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    print(f"\n{group}")
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
        print("  ".join(cells).rstrip())


def print_markdown(group, rows):
    print(f"\n**{group}**\n")
    for row in [rows[0], ["---"] * len(rows[0]), *rows[1:]]:
        print(f"| {' | '.join(row)} |")


def print_latex(group, rows):
    special = str.maketrans({c: "\\" + c for c in "&%$#_{}"} | {"±": r"$\pm$"})
    print("\n% needs \\usepackage{booktabs}")
    print(f"\\begin{{tabular}}{{l{'r' * (len(rows[0]) - 1)}}}\n\\toprule")
    print(f"\\multicolumn{{{len(rows[0])}}}{{l}}{{{group.translate(special)}}} \\\\\n\\midrule")
    for i, row in enumerate(rows):
        cells = [cell.translate(special).replace("--", "-{}-") for cell in row]
        print(" & ".join(cells), r"\\" + ("\n\\midrule" if i == 0 else ""))
    print("\\bottomrule\n\\end{tabular}")


def labels_of(names):
    """Short labels for settings (name, precision) in a picture: what they do not all share."""
    parts = []
    for name, precision in names:
        words = [*re.split(" (?=--)", name), precision]
        if {"--lam 0.0", "--mu 0.0"} <= set(words):
            words = ["finetuning", *(w for w in words[1:] if not w.startswith(("--lam", "--mu")))]
        parts.append(words)
    shared = set.intersection(*(set(words[1:]) for words in parts))
    return [" ".join(word for word in words if word not in shared) for words in parts]


def colour_of(accuracy):
    """Orange for 0%, white for 50%, blue for 100%, which colour-blind readers can tell apart."""
    end = (0, 50, 130) if accuracy > 50 else (230, 110, 0)
    share = abs(accuracy - 50) / 50
    return tuple(round(255 - share * (255 - part)) for part in end)


def draw_accuracy(results, path):
    """Accuracy matrices side by side: a row after each task, a column for each task."""
    from PIL import Image, ImageDraw

    groups, names = zip(*(setting(result["args"]) for result in results), strict=True)
    pah.require(
        len(results) <= 2 and len(set(groups)) == 1,
        f"a picture shows one run, or two on the same tasks, but {len(results)} were found",
    )
    precisions = [result["args"]["precision"] for result in results]
    labels = labels_of(zip(names, precisions, strict=True))
    joint = any(pah.metrics(result["accuracy"])["FM"] is None for result in results)
    pah.require(not joint, "a picture needs tasks learned one by one")
    cell, left, top = 64, 56, 136
    num_tasks = max(len(result["accuracy"]) for result in results)
    panel = max(left + cell * num_tasks, 480)
    size = (max(panel * len(results) + 24 * (len(results) - 1), 700), top + cell * num_tasks)
    picture = Image.new("RGB", size, "white")
    canvas = ImageDraw.Draw(picture)
    title = f"accuracy in % on each task (column) after each task (row): {groups[0]}"
    canvas.text((8, 4), title, "black", font_size=28)
    for i, (result, label) in enumerate(zip(results, labels, strict=True)):
        R, x0 = result["accuracy"], left + i * (panel + 24)
        values = f"AA {pah.average_accuracy(R):.1f}, FM {pah.forgetting(R):.1f}"
        canvas.text((x0, 56), f"{label}: {values}", "black", font_size=32)
        for k, row in enumerate(R):
            x, y = x0 + cell * k + cell // 2, top + cell * k + cell // 2
            canvas.text((x, top - 16), str(k + 1), "black", font_size=26, anchor="mm")
            canvas.text((x0 - left // 2, y), str(k + 1), "black", font_size=26, anchor="mm")
            for j, accuracy in enumerate(row):
                x, colour = x0 + cell * j, colour_of(accuracy)
                canvas.rectangle((x, y - cell // 2, x + cell - 2, y + cell // 2 - 2), colour)
                ink = "white" if accuracy > 70 else "black"
                middle = (x + cell // 2, y)
                canvas.text(middle, f"{accuracy:.0f}", ink, font_size=34, anchor="mm")
    with pah.whole_file(Path(path)) as temporary:
        picture.save(temporary, format="PNG")


def draw_curves(groups, path):
    """AA after each task, mean over the seeds, a line per setting with its name at the end."""
    from PIL import Image, ImageDraw

    pah.require(len(groups) == 1, f"curves show one data set, but {len(groups)} were found")
    ((group, settings),) = groups.items()
    means = {}
    for (name, precision), seeds in settings.items():
        if pah.metrics(next(iter(seeds.values()))["accuracy"])["FM"] is not None:  # not joint
            curves = [[mean(row) for row in result["accuracy"]] for result in seeds.values()]
            means[name, precision] = [mean(values) for values in zip(*curves, strict=True)]
    pah.require(means, "curves need tasks learned one after the other")
    most = len(COLOURS)
    pah.require(len(means) <= most, f"curves show {most} settings, but {len(means)} were found")
    labels = labels_of(means)
    num_tasks = max(map(len, means.values()))
    lowest = min(90, min(map(min, means.values())) // 10 * 10)

    picture = Image.new("RGB", (1200, 700), "white")
    canvas = ImageDraw.Draw(picture)
    space = max(canvas.textlength(label, font_size=26) for label in labels)
    left, right, top, bottom = 80, 1200 - 60 - space, 60, 620

    def place(k, accuracy):
        x = left + (right - left) * k / max(1, num_tasks - 1)
        return x, bottom - (bottom - top) * (accuracy - lowest) / (100 - lowest)

    canvas.text((8, 8), f"average accuracy in %, {group}", "black", font_size=28)
    for accuracy in range(int(lowest), 101, 10):
        canvas.line([place(0, accuracy), place(num_tasks - 1, accuracy)], "lightgrey")
        y = place(0, accuracy)[1]
        canvas.text((left - 12, y), str(accuracy), "black", font_size=26, anchor="rm")
    step = max(1, num_tasks // 10)
    for number in range(step, num_tasks + 1, step):
        x = place(number - 1, lowest)[0]
        canvas.text((x, bottom + 10), str(number), "black", font_size=26, anchor="mt")
    canvas.text((right, bottom + 44), "tasks learned", "black", font_size=26, anchor="rt")
    lines = list(zip(means.values(), labels, COLOURS, strict=False))
    free = top  # where there is no label yet
    for curve, label, colour in sorted(lines, key=lambda line: -line[0][-1]):
        canvas.line([place(k, accuracy) for k, accuracy in enumerate(curve)], colour, width=4)
        y = max(place(0, curve[-1])[1], free)
        canvas.line([(right + 12, y), (right + 36, y)], colour, width=6)
        canvas.text((right + 44, y), label, "black", font_size=26, anchor="lm")
        free = y + 30
    with pah.whole_file(Path(path)) as temporary:
        picture.save(temporary, format="PNG")


def values_of(option, groups):
    """{value of the option: results}, in order, of settings that differ in this option alone."""
    word = f"--{option.replace('_', '-')}"
    default = baselines.make_parser().get_default(option.replace("-", "_"))
    rows = {}
    for group, settings in groups.items():
        for (name, precision), seeds in settings.items():
            if pah.metrics(next(iter(seeds.values()))["accuracy"])["FM"] is None:  # joint
                continue
            found = re.search(f" {word} ([^ ]+)", name)
            with pah.user_error(f"--over {option} is not an option with numbers"):
                value = float(found[1] if found else default)
            others = name.replace(found[0] if found else "", "")
            rows.setdefault((group, others, precision), {})[value] = list(seeds.values())
    most = max(rows.values(), key=len, default=())
    pah.require(len(most) > 1, f"--over {option}: no two settings differ in this option alone")
    return dict(sorted(most.items()))


def draw_ablations(options, groups, path):
    """AA above FM, over the values of each option: mean and deviation over the seeds."""
    from PIL import Image, ImageDraw

    ablations = [values_of(option, groups) for option in options]
    left, wide, high, bottom = 80, 380, 200, 100  # of a panel: where it starts, and its size
    picture = Image.new("RGB", (left + wide * len(options), 2 * (high + 80) + bottom), "white")
    canvas = ImageDraw.Draw(picture)
    for name, colour, top in (("AA", COLOURS[0], 60), ("FM", COLOURS[1], 140 + high)):
        panels = [
            {x: [pah.metrics(run["accuracy"])[name] for run in runs] for x, runs in row.items()}
            for row in ablations
        ]
        every = [y for panel in panels for values in panel.values() for y in values]
        step = next(
            s for s in (1, 2, 5, 10, 20, 25, 50) if min(every) // s * s + 4 * s > max(every)
        )
        low = int(min(every) // step * step)
        canvas.text((8, top - 52), f"{name} in %", colour, font_size=28)
        for i in range(5):
            y = top + high * (4 - i) / 4
            canvas.text((left - 12, y), str(low + i * step), "black", font_size=26, anchor="rm")
            canvas.line([(left, y), (picture.width - 20, y)], "lightgrey")
        for j, panel in enumerate(panels):
            first, last, line = min(panel), max(panel), []
            for value, values in panel.items():
                x = left + wide * j + 40 + (wide - 100) * (value - first) / (last - first)
                y = top + high * (1 - (mean(values) - low) / (4 * step))
                spread = high * (stdev(values) if len(values) > 1 else 0) / (4 * step)
                canvas.line([(x, y - spread), (x, y + spread)], colour, width=4)
                canvas.ellipse((x - 6, y - 6, x + 6, y + 6), colour)
                line.append((x, y))
                place = (x, picture.height - bottom + 24)
                canvas.text(place, f"{value:g}", "black", font_size=24, anchor="ms")
            canvas.line(line, colour, width=4)
    for j, option in enumerate(options):
        place = (left + wide * j + wide // 2 - 10, picture.height - 24)
        canvas.text(place, f"--{option}", "black", font_size=26, anchor="ms")
    with pah.whole_file(Path(path)) as temporary:
        picture.save(temporary, format="PNG")


def first_prototypes(args, seed):
    """The prototypes (K, C, 3, s, s) when their task began: a run of zero epochs has the same.

    It must be on the device of the run, since CPU and GPU draw other random numbers.
    """
    tasks = [
        task._replace(test_images=task.test_images[:1], test_labels=task.test_labels[:1])
        for task in pah.load_tasks(args, seed)
    ]
    model = pah.build(args, len(tasks), max(len(task.classes) for task in tasks)).to(args.device)
    pah.learn(model, tasks, epochs=0, seed=seed)
    return model.prototypes.detach().cpu()


def draw_prototypes(folder, path):
    """The prototypes of a run when their task began and after the last task; a row per task."""
    from PIL import Image, ImageDraw
    from torchvision.transforms.functional import to_pil_image

    checkpoint = folder / "checkpoint.pt"
    saved, weights = pah.load_run(checkpoint)
    method = saved["args"].get("method", "pah")
    pah.require(
        method in ("pah", "rehearsal", "rotated"), f"{folder} is a run of {method}, not of PAH"
    )
    args = argparse.Namespace(**vars(pah.parse_args([])) | saved["args"])
    pah.require(
        args.device == "cpu" or torch.cuda.is_available(),
        f"{folder} began on a GPU: to draw its first prototypes again takes one",
    )
    last = weights["prototypes"][: len(saved["accuracy"])]
    first = first_prototypes(args, saved["seed"])
    cell, left, top, gap = 64, 56, 136, 32
    num_tasks, classes = last.shape[:2]
    width = cell * classes
    picture = Image.new("RGB", (left + 2 * width + gap, top + cell * num_tasks), "white")
    canvas = ImageDraw.Draw(picture)
    title = f"prototypes, a row per task: {setting(saved['args'])[0]}"
    canvas.text((8, 4), title, "black", font_size=28)
    halves = [
        ("when its task began", first, left),
        ("after the last task", last, left + width + gap),
    ]
    for title, prototypes, x in halves:
        canvas.text((x, 96), title, "black", font_size=26)
        for k in range(num_tasks):
            y = top + cell * k
            canvas.text((left // 2, y + cell // 2), str(k + 1), "black", font_size=26, anchor="mm")
            for c in range(classes):
                pixels = (prototypes[k, c] * pah.STD + pah.MEAN).clamp(0, 1)
                image = to_pil_image(pixels).resize((cell - 2, cell - 2), Image.Resampling.NEAREST)
                picture.paste(image, (x + cell * c, y))
    with pah.whole_file(Path(path)) as temporary:
        picture.save(temporary, format="PNG")


def main(argv=None):
    parser = argparse.ArgumentParser(description="Tables of all finished runs.")
    parser.add_argument("folders", nargs="+")
    parser.add_argument("--format", choices=("text", "markdown", "latex"), default="text")
    parser.add_argument("--picture", help="instead: draw the accuracies of one run or two")
    parser.add_argument("--prototypes", help="instead: draw the prototypes of one run")
    parser.add_argument("--curves", help="instead: draw AA after each task, one line per setting")
    parser.add_argument(
        "--over", nargs="+", help="with --curves: draw AA and FM over these options, such as lam mu"
    )
    args = parser.parse_args(argv)
    if args.over and not args.curves:
        parser.error("--over needs --curves")
    for picture in (args.picture, args.prototypes, args.curves):
        if picture and not picture.endswith(".png"):
            parser.error(f"{picture}: pictures are .png files")
    groups = {}
    if not (args.picture or args.prototypes):
        groups = collect(args.folders)
        pah.require(groups, f"no finished run below {' '.join(args.folders)}")
    if args.curves and args.over:
        draw_ablations(args.over, groups, args.curves)
        return
    if args.curves:
        draw_curves(groups, args.curves)
        return
    if args.picture or args.prototypes:
        paths = list(find_results(args.folders))
        pah.require(paths, f"no run below {' '.join(args.folders)}")
        if args.picture:
            draw_accuracy([read(path) for path in paths], args.picture)
        if args.prototypes:
            pah.require(len(paths) == 1, f"prototypes are of one run, but {len(paths)} were found")
            draw_prototypes(paths[0].parent, args.prototypes)
        return
    printers = {"text": print_text, "markdown": print_markdown, "latex": print_latex}
    for group, settings in groups.items():
        printers[args.format](group, table(group, settings))


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # where the terminal has no ±
    try:
        main()
    except pah.UserError as error:
        sys.exit(f"report.py: {error}")
