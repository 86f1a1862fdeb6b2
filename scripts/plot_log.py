#!/usr/bin/env python3
"""
Draws the losses of one or several runs in one picture (needs matplotlib).

    scripts/plot_log.py out                             out/log.jsonl -> loss.png
    scripts/plot_log.py out a/log.jsonl --out two.png   training loss thin, validation loss thick, a colour a run
        --x step|tokens|seconds     seconds and tokens of training, summed over the steps; evaluation is not counted
        --log                       both axes logarithmic: a straight line is a power law
        --smooth N                  training loss as the median of N steps (default: a hundredth of the run)

A line that is cut, as a killed run may leave it, is passed over.
"""
import argparse
import json
import statistics
import sys
from pathlib import Path


def read_log(path):
    """[(step, loss)] of training and of validation, and {step: (seconds, tokens)} since the start"""
    train, val, clock = [], [], {}
    seconds = tokens = 0.0
    for line in path.read_text(errors="replace").splitlines():
        try:
            entry = json.loads(line)
            step = entry["step"]
            if "train_loss" in entry:
                train.append((step, float(entry["train_loss"])))
                seconds += entry["ms"] / 1000
                tokens += entry["ms"] / 1000 * entry["tok_s"]
            if "val_loss" in entry:
                val.append((step, float(entry["val_loss"])))
            clock[step] = {"step": step, "seconds": seconds, "tokens": tokens}
        except (ValueError, KeyError, TypeError):
            continue
    return train, val, clock


def smooth(points, window):
    """the median of the points around each"""
    half = window // 2
    return [(step, statistics.median(loss for _, loss in points[max(0, i - half):i + half + 1]))
            for i, (step, _) in enumerate(points)]


def main():
    parser = argparse.ArgumentParser(description="Draws the losses of one or several runs in one picture.")
    parser.add_argument("runs", nargs="+", type=Path, help="a run's folder, or its log.jsonl")
    parser.add_argument("--out", default="loss.png")
    parser.add_argument("--x", choices=["step", "seconds", "tokens"], default="step")
    parser.add_argument("--log", action="store_true")
    parser.add_argument("--smooth", type=int, default=0, metavar="N")
    parser.add_argument("--title", default="")
    options = parser.parse_args()

    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False,
                         "axes.edgecolor": "#888888", "xtick.color": "#444444", "ytick.color": "#444444"})
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    colours = plt.get_cmap("tab10").colors
    for i, run in enumerate(options.runs):
        path = run / "log.jsonl" if run.is_dir() else run
        try:
            train, val, clock = read_log(path)
        except OSError as error:
            sys.exit(f"error: cannot read {path}: {error.strerror}")
        if not train and not val:
            sys.exit(f"error: {path}: no losses in it")
        colour, name = colours[i % len(colours)], str(path.parent if path.name == "log.jsonl" else path)
        place = lambda points: [clock[step][options.x] for step, _ in points]
        losses = lambda points: [loss for _, loss in points]
        if train:
            line = smooth(train, options.smooth or len(train) // 100)
            axes.plot(place(line), losses(line), color=colour, linewidth=0.8, alpha=0.6,
                      label=f"{name}  training {line[-1][1]:.3f}")
        if val:
            axes.plot(place(val), losses(val), color=colour, linewidth=2.4, marker="o", markersize=4,
                      markevery=max(1, len(val) // 25), label=f"{name}  validation {min(losses(val)):.3f} at best")
    if options.log:
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("{x:g}")
        axes.xaxis.set_major_formatter("{x:g}")
    axes.set_xlabel({"step": "step", "seconds": "seconds of training", "tokens": "tokens"}[options.x])
    axes.set_ylabel("loss (nats per token)")
    axes.set_title(options.title)
    axes.grid(which="both", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.legend(frameon=False)
    figure.savefig(options.out, dpi=150)


if __name__ == "__main__":
    main()
