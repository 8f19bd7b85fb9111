"""Instructions per token, which are the same in every run, must not grow by more than 2 %.

The known counts are in instructions.txt, taken by callgrind, and for ARM by QEMU, with the compiler
named there; under another compiler there is nothing to compare with. ARM is counted with FULL=yes.

    python3 -m pytest tests/test_instructions.py
        INSTRUCTIONS=required makes a missing tool a failure
    python3 tests/test_instructions.py
        counts anew and rewrites the file; look at the difference before you commit
"""
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
KNOWN = HERE / "instructions.txt"
GROWTH = 1.02
FLAGS = ["-std=c99", "-O3", "-ffp-contract=off", "-fno-trapping-math"]
MODELS = "stories260K", "tiny-f32", "tiny-q8", "tiny-q4"
# processors that have each
ARM = {"neon": "cortex-a72", "dotprod": "neoverse-n1", "i8mm": "max"}
KERNELS = "plain", "avx2", *ARM
COUNTED = KERNELS if os.environ.get("FULL") == "yes" or __name__ == "__main__" else KERNELS[:2]


def compiler():
    done = subprocess.run(["gcc", "-dumpversion"], capture_output=True, text=True)
    return "gcc " + done.stdout.split(".")[0].strip()


def build(directory):
    """The program without threads, and the models."""
    sources = [ROOT / f for f in ("run.c", "based.c", "tokenizer.c")]
    subprocess.run(["gcc", *FLAGS, "-o", directory / "run", *sources, "-lm"], check=True)
    if COUNTED == KERNELS:
        subprocess.run(["aarch64-linux-gnu-gcc", *FLAGS, "-static", "-o", directory / "run-arm",
                        *sources, "-lm"], check=True, capture_output=True)
        subprocess.run(["gcc", "-O2", "-shared", "-fPIC", "-o", directory / "count.so",
                        HERE / "insncount.c"], check=True)
    config = HERE / "data" / "hazyresearch-tiny" / "config.json"
    for name in MODELS[1:]:
        subprocess.run([sys.executable, ROOT / "export.py", "--random", config,
                        directory / f"{name}.bin", "--dtype", name[5:]],
                       check=True, capture_output=True)
    shutil.copy(ROOT / "models" / "stories260K.bin", directory)


def instructions(directory, model, kernels, prompt, new):
    tokens = " ".join(str(i * 7 % 47) for i in range(prompt))
    counts = directory / "counts"
    program = ["valgrind", "--tool=callgrind", "--callgrind-out-file=/dev/null", directory / "run"]
    if kernels in ARM:
        program = ["qemu-aarch64", "-cpu", ARM[kernels], "-plugin",
                   f"file={directory / 'count.so'},out={counts}", directory / "run-arm"]
    run = subprocess.run([*program, directory / f"{model}.bin", "--tokens", tokens, "-t", "0",
                          "-n", str(new), "--ignore-eos"],
                         env={**os.environ, "BASED_KERNELS": "" if kernels in ARM else kernels},
                         capture_output=True)
    assert run.returncode == 0, run.stderr
    if kernels in ARM:
        return int(counts.read_text().split()[-1])
    return int(re.search(rb"Collected : (\d+)", run.stderr).group(1))


def count(directory, model, kernels):
    """Of a token that is written, and of one that is read in a block.

    Both are differences of two runs, so that starting does not count.
    """
    def counted(prompt, new):
        return instructions(directory, model, kernels, prompt, new)

    step = (counted(3, 12) - counted(3, 4)) // 8
    read = (counted(128, 0) - counted(64, 0)) // 64
    return step, read


def rows():
    return {tuple(line.split()[:2]): tuple(map(int, line.split()[2:]))
            for line in KNOWN.read_text().splitlines() if not line.startswith("#")}


@pytest.fixture(scope="module")
def programs(once):
    from conftest import need           # this file also runs as a program
    need("INSTRUCTIONS", "gcc", "valgrind",
         *(["aarch64-linux-gnu-gcc", "qemu-aarch64"] if COUNTED == KERNELS else []))
    if compiler() not in KNOWN.read_text():
        pytest.skip(f"{KNOWN.name} was counted with another compiler than {compiler()}")
    return once("instructions", build)


@pytest.mark.parametrize("kernels", COUNTED)
@pytest.mark.parametrize("model", MODELS)
def test_no_growth(programs, model, kernels):
    for got, known in zip(count(programs, model, kernels), rows()[model, kernels]):
        assert got <= GROWTH * known, f"{got} instructions per token, {known} known"


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        build(Path(name))
        lines = [f"{model} {kernels} %d %d\n" % count(Path(name), model, kernels)
                 for model in MODELS for kernels in KERNELS]
    KNOWN.write_text(f"# {compiler()} {' '.join(FLAGS)}: model, kernels, instructions per token "
                     "written, and per token of a prompt in blocks\n" + "".join(lines))
    print(KNOWN.read_text(), end="")
