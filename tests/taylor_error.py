"""How far is Taylor attention from the softmax attention it stands for? Random queries and keys of
width 4, 8 and 16, scaled so that scores have a given spread (standard deviation), random values,
1024 pairs, 64 queries; medians over 5 drawings.

    python3 tests/taylor_error.py [PLOT.png]

Prints, for degrees 1 to 8, the error of the output relative to its size (L2) and, beside it, the
largest absolute error: the second looks far better, because averaging many random values makes all
outputs small. Then what a state costs. A few of the numbers are also computed by based.c, to be
sure that they are about it. Needs numpy; matplotlib for the plot."""
import math
import statistics
import sys
from pathlib import Path

import numpy as np

sys.path[:0] = [str(Path(__file__).resolve().parent)]
import taylor           # noqa: E402

DEGREES, WIDTHS, SPREADS = range(1, 9), (4, 8, 16), (0.5, 1.0, 1.5, 2.0, 3.0)
PAIRS, QUERIES, DRAWINGS = 1024, 64, 5


def drawn(width, spread, seed):
    """q [n, 1, width], k, v whose scores q.k have the given spread."""
    rng = np.random.default_rng([width, round(10 * spread), seed])
    q, k, v = (rng.standard_normal((n, 1, width)) for n in (QUERIES, PAIRS, PAIRS))
    return q * spread / (q[:, 0] @ k[:, 0].T).std(), k, v


def softmax(q, k, v):
    w = np.exp(q[:, 0] @ k[:, 0].T)
    return (w / w.sum(1, keepdims=True)) @ v[:, 0]


def errors(width, spread, degree, attend=taylor.by_definition):
    """Medians of (relative, absolute) error."""
    both = []
    for seed in range(DRAWINGS):
        q, k, v = drawn(width, spread, seed)
        exact, y = softmax(q, k, v), attend(q, k, v, {"degree": degree, "normalizer": taylor.RAW},
                                            False)[:, 0]
        both.append((np.linalg.norm(y - exact) / np.linalg.norm(exact), np.abs(y - exact).max()))
    return [statistics.median(column) for column in zip(*both)]


def plot(table, path):
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    figure, axes = pyplot.subplots(1, len(WIDTHS), figsize=(11, 3.6), sharey=True)
    for axis, width in zip(axes, WIDTHS):
        for spread in SPREADS:
            axis.semilogy(DEGREES, [table[width, spread, degree][0] for degree in DEGREES], ".-",
                          label=f"spread {spread}")
        axis.set(title=f"keys of width {width}", xlabel="degree")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("relative error against softmax")
    axes[0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main():
    table = {(w, s, p): errors(w, s, p) for w in WIDTHS for s in SPREADS for p in DEGREES}
    print("relative error (largest absolute error), odd degrees have weights of both signs\n")
    for width in WIDTHS:
        print(f"| width {width}, spread | " + " | ".join(f"degree {p}" for p in DEGREES) + " |\n"
              + "|---" * 9 + "|")
        for spread in SPREADS:
            cells = (table[width, spread, p] for p in DEGREES)
            print(f"| {spread} | "
                  + " | ".join(f"{relative:.2g} ({absolute:.1g})" for relative, absolute in cells)
                  + " |")
        features = [math.comb(width + p, p) for p in DEGREES]
        kinds = [taylor.Taylor(head_dim_k=width, head_dim_v=width, degree=p).sizes for p in DEGREES]
        assert [kind.features for kind in kinds] == features
        print("| features | " + " | ".join(f"{n:,}" for n in features) + " |")
        print("| bytes of a state | " + " | ".join(f"{kind.state:,}" for kind in kinds) + " |")
        print("| multiplications a token | " + " | ".join(f"{kind.work:,}" for kind in kinds)
              + " |\n")
    for width, spread, degree in ((4, 1.0, 4), (8, 0.5, 3), (8, 1.0, 6)):
        got = errors(width, spread, degree, taylor.through_c)
        assert abs(got[0] - table[width, spread, degree][0]) < 1e-4, (width, spread, degree, got)
    if len(sys.argv) > 1:
        plot(table, sys.argv[1])


if __name__ == "__main__":
    main()
