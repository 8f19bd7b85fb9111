"""A pretrained softmax model on constant memory: what is lost?

    python3 tests/hybrid.py [--windows 8,16,...] [--degrees 2,3,...] [--plot FILE]

stories260K was trained with softmax attention over 512 tokens. export.py --taylor-degree keeps the
last keys as they are and puts sums in the place of all older ones; this measures, with `./run -x`,
bits per byte of stories that the model tells (seeds 1 to 40), fitted to other stories of its own
(seeds 1001 to 1040). Since the model wrote them, no model can do better than the exact one, and
what another one needs above it is what its approximation costs. Beside each figure stands that of a
plain window with as many keys as the same bytes of state hold.

Needs ./run (make) and the packages of tests/requirements.txt. Takes about ten minutes.
"""
import argparse
import pathlib
import re
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tests"), str(ROOT)]

import export           # noqa: E402
import reference        # noqa: E402
from models import constant_memory                      # noqa: E402

MODEL, CHUNK = ROOT / "models" / "stories260K.bin", 16


def run(*arguments):
    return subprocess.run([ROOT / "run", *map(str, arguments)], capture_output=True, check=True,
                          text=True)


def stories(path, seeds):
    """Writes the stories of these seeds, at temperature 1, each a document of its own."""
    told = [run(MODEL, "-q", "-s", seed, "-t", 1, "-p", 1, "-n", 511).stdout.strip()
            for seed in seeds]
    path.write_text("<s> ".join(told), encoding="utf-8")
    return path


def bits(model, text):
    return float(re.search(r"([0-9.]+) bits per byte", run(model, "-x", text, "-q").stdout)[1])


def state_bytes(config, layers):
    return 4 * sum(reference.state_floats(config, l) for l in layers)


def plain(directory, keys):
    """The model with a window of so many keys and nothing beyond it: (path, bytes of state)."""
    saved, path = export.Checkpoint(MODEL), directory / "plain.bin"
    for l in saved.layers:
        l.window = keys
    export.write(str(path), saved.config, saved.layers, saved.tokenizer, saved.__getitem__)
    return path, state_bytes(saved.config, saved.layers)


def hybrids(directory, window, degrees, text):
    """The model with sums beyond a window, as `export.py --taylor-degree` makes it, fitted once for
    all degrees: yields (path, bytes of state) of each."""
    saved, path = export.Checkpoint(MODEL), directory / "hybrid.bin"
    config, layers = saved.config, saved.layers
    plan = {t.name: lambda name=t.name: saved[name] for t in saved.placed}
    options = argparse.Namespace(window=window, chunk=CHUNK, taylor_degree=max(degrees),
                                 calibrate=text)
    constant_memory.convert(config, layers, plan, saved.tokenizer, options, lambda note: None)
    for degree in degrees:
        for l in layers:
            l.degree = degree
        export.write(str(path), config, layers, saved.tokenizer, lambda name: plan[name]())
        yield path, state_bytes(config, layers)


def plot(rows, exact, path):
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, axis = plt.subplots(figsize=(7, 4.5))
    for degree in sorted({row[1] for row in rows}):
        points = [(size, loss) for _, of, size, loss in rows if of == degree]
        axis.plot(*zip(*points), marker="o", ms=3, color="0.4" if not degree else None,
                  ls="-" if degree else "--",
                  label=f"window + degree {degree}" if degree else "plain window")
    axis.axhline(exact, color="k", lw=0.8, label="exact (512 tokens)")
    axis.set(xscale="log", xlabel="bytes of state", ylabel="bits per byte",
             title="stories260K on constant memory")
    axis.legend(fontsize=8)
    figure.savefig(path, dpi=110, bbox_inches="tight")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    numbers = lambda text: [int(word) for word in text.split(",")]              # noqa: E731
    parser.add_argument("--windows", type=numbers, default=[8, 16, 32, 64, 128, 256])
    parser.add_argument("--degrees", type=numbers, default=[2, 3, 4, 5, 6, 7, 8])
    parser.add_argument("--plot", metavar="FILE")
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory(prefix="hybrid-") as name:
        directory = pathlib.Path(name)
        fitted, told = stories(directory / "fitted.txt",
                               range(1001, 1041)), stories(directory / "told.txt", range(1, 41))
        exact = bits(MODEL, told)
        path, one = plain(directory, 1)
        print(f"{told.stat().st_size} bytes of stories; exact {exact:.4f} bits per byte with "
              f"{512 * one:,} bytes of state")
        print("\nwindow  plain of     " + "".join(f"  {f'degree {p}':16}" for p in options.degrees))
        print("        window + 16  " + "  hybrid / plain*  " * len(options.degrees))
        for window in options.windows:
            path, size = plain(directory, window + CHUNK)
            rows.append((window, 0, size, bits(path, told)))
            print(f"{window:6}  {rows[-1][3]:.4f}      ", end="", flush=True)
            for degree, (path, size) in zip(options.degrees,
                                            hybrids(directory, window, options.degrees, fitted)):
                rows.append((window, degree, size, bits(path, told)))
                same = bits(plain(directory, size // one)[0], told) if size < 512 * one else exact
                print(f"  {rows[-1][3]:.4f} / {same:.4f}  ", end="", flush=True)
            print()
        print("        * a plain window of as many bytes of state (at most the exact model)\n\n"
              "bytes of state")
        for window in options.windows:
            print(f"{window:6}  " + "".join(f"{size:12,}" for of, _, size, _ in rows
                                            if of == window))
    if options.plot:
        plot(rows, exact, options.plot)


if __name__ == "__main__":
    main()
