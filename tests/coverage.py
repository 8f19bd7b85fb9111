"""How much of based.c and tokenizer.c the tests reach.

`make coverage` prints the share of lines and branches (as counted by gcc's gcov), and with -v every
line and branch that is left.

The C tests and the library that the Python tests load are built with counters under build/coverage;
then the tests run. What several builds count is added up by line, and by branch within a line.

    python3 tests/coverage.py [-v] [--least LINES BRANCHES]      fails below so many percent
"""
import argparse
import collections
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
HERE = ROOT / "tests"
PLACE = ROOT / "build" / "coverage"
SOURCES = ("based.c", "tokenizer.c")
# Kernels are copied into the functions of each instruction set; here they are called, so that a
# branch counts once.
COUNTING = ["-O0", "--coverage", "-fprofile-update=atomic", "-Dalways_inline=unused"]
FLAGS = ["-std=c99", "-ffp-contract=off", "-fno-trapping-math", *COUNTING, "-pthread", "-I."]
PYTHON = ["test_golden.py", "test_layers.py", "test_taylor.py"]


def compile(cc, name, *args):
    subprocess.run([*cc, *FLAGS, *args, "-o", PLACE / name, "-lm"], cwd=ROOT, check=True)


def measure(cc, openmp):
    """Builds and runs everything that counts."""
    for source in sorted(HERE.glob("test_*.c")):
        compile(cc, source.stem, *openmp, f"tests/{source.name}")
        subprocess.run([PLACE / source.stem], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    # The kernels of machines without vectors and without floats, beside those of this one.
    compile(cc, "narrow", *openmp, "-DBASED_NARROW", "-DBASED_SOFT_FLOAT", "tests/test_based.c")
    subprocess.run([PLACE / "narrow"], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    # A compiler for the library, each build of which stores its counters under another name.
    compiler = PLACE / "cc"
    compiler.write_text(f'#!/bin/sh\nexec {shlex.join(cc)} "$@" {shlex.join(COUNTING)} '
                        f'-dumpdir {PLACE}/$$-\n')
    compiler.chmod(0o755)
    env = dict(os.environ, CC=str(compiler))
    tests = [HERE / name for name in PYTHON]
    subprocess.run([sys.executable, "-m", "pytest", "-q", "-x", *tests],
                   cwd=ROOT, env=env, check=True)


def collect():
    """{source: {line: (times, [times of each branch])}}, added up over all builds."""
    lines = {name: collections.Counter() for name in SOURCES}
    branches = {name: collections.defaultdict(collections.Counter) for name in SOURCES}
    for counts in PLACE.glob("*.gcda"):
        out = subprocess.run(["gcov", "--json-format", "--stdout", "--branch-probabilities",
                              counts], cwd=ROOT, check=True, capture_output=True).stdout
        for document in out.splitlines():
            for file in json.loads(document)["files"]:
                name = os.path.relpath(ROOT / file["file"], ROOT)
                if name in SOURCES:
                    for line in file["lines"]:
                        number = line["line_number"]
                        lines[name][number] += line["count"]
                        for i, branch in enumerate(line["branches"]):
                            branches[name][number][i] += branch["count"]
    return lines, branches


def share(counts):
    counts = list(counts)
    return 100 * sum(count > 0 for count in counts) / len(counts), len(counts)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("-v", "--verbose", action="store_true")
    parser.add_argument("--least", nargs=2, type=float, default=(0, 0))
    o = parser.parse_args()
    cc = shlex.split(os.environ.get("CC", "gcc"))
    PLACE.mkdir(parents=True, exist_ok=True)
    for old in PLACE.glob("*.gc*"):
        old.unlink()
    measure(cc, shlex.split(os.environ.get("OPENMP", "-fopenmp")))
    lines, branches = collect()
    enough = True
    for name in SOURCES:
        text = (ROOT / name).read_text().splitlines()
        of_lines, n_lines = share(lines[name].values())
        of_branches, n_branches = share(count for each in branches[name].values()
                                        for count in each.values())
        for number in sorted(lines[name]) if o.verbose else []:
            left = [i for i, count in sorted(branches[name][number].items()) if count == 0]
            if lines[name][number] == 0:
                print(f"{name}:{number}: never          {text[number - 1]}")
            elif left:
                print(f"{name}:{number}: branch {left} of {len(branches[name][number])} "
                      f"{text[number - 1]}")
        print(f"{name:12}  lines {of_lines:5.1f} % of {n_lines}   "
              f"branches {of_branches:5.1f} % of {n_branches}")
        enough = enough and of_lines >= o.least[0] and of_branches >= o.least[1]
    return 0 if enough else f"less than {o.least[0]:g} % of lines and {o.least[1]:g} % of branches"


sys.exit(main())
