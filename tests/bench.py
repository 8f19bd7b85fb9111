"""How fast is it, and how much memory does it take? `make bench` runs this.

    python3 tests/bench.py [MODEL.bin ...] [--random based-360m:q8 ...] [-j THREADS]
                           [--rows FILE.csv ...] [--out build/bench]

Runs `./run MODEL -b --csv` for each model, and for random weights of each SHAPE:DTYPE, which are
made in build/ once. Writes all rows to OUT.csv, prints them as a table, and draws tokens per second
(OUT_speed.png) and memory (OUT_memory.png) against the number of tokens before. --rows adds what
was measured elsewhere, for example by tests/peers.py. If LLAMA (a directory with llama.cpp's shared
libraries) and GGUF (a model) are in the environment, llama.cpp is measured too.
"""
import argparse
import csv
import os
import re
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent


def rows_of(command):
    print("$", *command, flush=True)
    done = subprocess.run(list(map(str, command)), check=True, stdout=subprocess.PIPE, text=True)
    out = done.stdout
    return list(csv.DictReader(out.splitlines()))


def random_model(name):
    shape, dtype = name.split(":")
    path = ROOT / "build" / f"{shape}-{dtype}.bin"
    if not path.exists():
        subprocess.run([sys.executable, ROOT / "export.py", "--random", shape, path,
                        "--dtype", dtype], check=True)
    return path


def measure(options):
    threads = ["-j", str(options.threads)] if options.threads else []
    models = [(model, Path(model).stem) for model in options.models]
    models += [(random_model(name), name.replace(":", " ")) for name in options.random]
    rows = []
    for model, title in models:
        rows += [{**row, "model": title}
                 for row in rows_of([ROOT / "run", model, "-b", "--csv", *threads])]
    if os.environ.get("LLAMA"):
        rows += rows_of([sys.executable, HERE / "peers.py",
                         "--llama", os.environ["LLAMA"], os.environ["GGUF"],
                         "-j", rows[-1]["threads"] if rows else options.threads or 1])
    for path in options.rows:
        rows += list(csv.DictReader(Path(path).read_text().splitlines()))
    return rows


def depth(row):
    """Tokens before those that were timed; None if that is not what was measured."""
    at = re.fullmatch(r"tg\d+ @ (\d+)", row["test"])
    return int(at.group(1)) if at else None


def draw(rows, column, label, path, scale=1.0):
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker
    figure, axes = pyplot.subplots(figsize=(7, 4.5))
    for name, threads in dict.fromkeys((row["model"], row["threads"]) for row in rows):
        points = sorted((depth(row), float(row[column]) * scale) for row in rows
                        if (row["model"], row["threads"]) == (name, threads)
                        and depth(row) is not None and row[column])
        if points:
            axes.plot(*zip(*points), marker="o",
                      label=f"{name}, {threads} thread{'s' * (threads != '1')}",
                      linestyle="--" if "llama" in name else "-")
    axes.set_xscale("symlog", linthresh=1024)
    axes.set_yscale("log")
    depths = sorted({depth(row) for row in rows} - {None})
    axes.set_xticks(depths, [f"{n:,}" for n in depths])
    for which in axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter:
        which(ticker.LogFormatter(minor_thresholds=(2, 0.5)))
    axes.set_xlabel("tokens before")
    axes.set_ylabel(label)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main():
    parser = argparse.ArgumentParser(usage=__doc__, add_help=False)
    parser.add_argument("models", nargs="*")
    parser.add_argument("--random", nargs="*", default=[])
    parser.add_argument("-j", dest="threads", type=int)
    parser.add_argument("--rows", nargs="*", default=[])
    parser.add_argument("--out", default=str(ROOT / "build" / "bench"))
    options = parser.parse_args()
    rows = measure(options)
    with open(options.out + ".csv", "w", newline="") as f:
        table = csv.DictWriter(f, rows[0].keys())
        table.writeheader()
        table.writerows(rows)
    shown = ("model", "threads", "test", "tokens/s", "spread", "GB/s", "% of read speed",
             "peak memory")
    print("|", " | ".join(shown), "|\n" + "|---" * len(shown) + "|")
    for row in rows:
        print("|", " | ".join(row[column] for column in shown), "|")
    draw(rows, "tokens/s", "tokens per second", options.out + "_speed.png")
    draw(rows, "peak memory", "memory, MB", options.out + "_memory.png", 1e-6)


if __name__ == "__main__":
    main()
