"""Hostile files without a fuzzer.

Every finding of `make fuzz` is replayed, and random mutants go through each fuzz target and through
the program itself. FUZZ_COUNT says how many of each (40; 2,000 with FULL=yes).
"""
import os
import random
import resource
import struct
import subprocess
from pathlib import Path

import pytest

import based
from conftest import FULL

ROOT = Path(__file__).resolve().parent.parent
FOUND = ROOT / "tests" / "fuzz" / "found"
TARGETS = sorted(path.stem for path in (ROOT / "tests" / "fuzz").glob("*.c") if path.stem != "main")
COUNT = int(os.environ.get("FUZZ_COUNT", 2000 if FULL else 40))


@pytest.fixture(scope="session")
def targets(once):
    """target -> (its program, its seeds), built by the compiler of every test."""
    def make(directory):
        subprocess.run(["make", "-s", f"BUILD={directory}", "CFLAGS=-O1" if FULL else "CFLAGS=-O0",
                        *(directory / f"replay_{name}" for name in TARGETS)], cwd=ROOT, check=True)
        for name in TARGETS:
            (directory / name).mkdir()
            subprocess.run([directory / f"replay_{name}", "--seeds", directory / name], check=True)
    directory = once("fuzz", make)
    return {name: (directory / f"replay_{name}", sorted((directory / name).iterdir()))
            for name in TARGETS}


@pytest.mark.parametrize("name", TARGETS)
def test_target(targets, name):
    program, seeds = targets[name]
    files = [*seeds, *sorted((FOUND / name).glob("*"))]
    done = subprocess.run([program, "--random", str(COUNT), *files],
                          capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{len(files)} files, {COUNT} mutants of each\n"


def test_every_finding_has_a_target():
    assert {path.name for path in FOUND.iterdir()} <= set(TARGETS)


def mutant(rng, good):
    """good with something wrong.

    That is bits, bytes, a number at an edge, or a piece cut off, doubled, or zeroed.
    """
    b, at, n = bytearray(good), rng.randrange(len(good)), 1 + rng.randrange(64)
    if rng.random() < 0.5:
        at %= 1024                                        # where the header is
    kind = rng.randrange(6)
    if kind == 0:
        b[at] ^= 1 << rng.randrange(8)
    elif kind == 1:
        b[at:at + n] = rng.randbytes(len(b[at:at + n]))
    elif kind == 2:
        at = min(at & ~3, len(b) - 4)
        edges = [0, 1, 2, 255, 65537, 1 << 20, (1 << 20) + 1, 1 << 31, 0xffffffff, 0x7fc00000]
        struct.pack_into("<I", b, at, rng.choice(edges))
    elif kind == 3:
        del b[at:]
    elif kind == 4:
        b[at:at] = b[at:at + n]
    else:
        b[at:at + n] = bytes(len(b[at:at + n]))
    return bytes(b)


def limits():
    # A mutant may ask for much memory, and is told that there is none.
    resource.setrlimit(resource.RLIMIT_AS, (1 << 31, 1 << 31))


def run(*args):
    """Runs ./run; it must end by itself, and say one line exactly if it refuses."""
    done = subprocess.run([ROOT / "run", *map(str, args), "-q", "-j", "1"],
                          capture_output=True, timeout=60, preexec_fn=limits)
    assert done.returncode in (0, 1), (args, done)
    lines = done.stderr.decode().splitlines()             # what is printed of a file must be text
    if done.returncode == 0:
        assert lines == [] and done.stdout, (args, done)
    else:
        assert len(lines) == 1 and lines[0].startswith("run: ") and len(lines[0]) > 20, (args, done)
        # what a broken model wrote before its logits were no numbers any more stays written
        assert done.stdout == b"" or "are NaN or infinite" in lines[0], (args, done)
    return done.returncode


SAY = ("--tokens", "1 5 2 7", "-n", "8", "-s", "1")


def test_mutated_checkpoints(targets, tmp_path):
    """With its checksum none is taken.

    Without, it is refused or computes, and --check never misses the end.
    """
    seeds = [path for path in targets["checkpoint"][1] if "vectors" not in path.name]
    rng, path = random.Random(1), tmp_path / "m.bin"
    taken = 0
    for i in range(COUNT):
        good = seeds[i % len(seeds)].read_bytes()
        bad = mutant(rng, good)
        path.write_bytes(bad)
        if bad != good:
            assert run(path, *SAY) == 1
        taken += run(path, "--no-checksum", *SAY) == 0
        run(path, "--no-checksum", "--check")
    assert 0.1 < taken / COUNT < 0.9                  # else the mutants are too wild, or too tame


def test_mutated_states(targets, tmp_path):
    """With its checksum none is taken; with a forged one it is refused or goes on."""
    model, rng, path = targets["checkpoint"][1][0], random.Random(2), tmp_path / "s.state"
    assert run(model, "--tokens", "1 5 2 7", "-n", "0", "--save", path, "-t", "0.5",
               "--repeat-penalty", "1.1") == 0
    good = path.read_bytes()
    assert run(model, "--load", path, "-n", "4") == 0
    taken = 0
    for _ in range(COUNT):
        bad = mutant(rng, good)
        path.write_bytes(bad)
        if bad != good:
            assert run(model, "--load", path, "-n", "4") == 1
        if len(bad) >= 80:
            forged = bytearray(bad)
            struct.pack_into("<8s2IQ", forged, 0, b"BSTATE\r\n", 1, 0x01020304, len(bad))
            checksum = based.library().based_checksum(bytes(forged[32:]), len(forged) - 32)
            struct.pack_into("<Q", forged, 24, checksum)
            path.write_bytes(forged)
            taken += run(model, "--load", path, "-n", "4") == 0
    assert taken > COUNT / 20


@pytest.mark.parametrize("bits, says", [(0x7fc00000, "1 of the"), (0xff800000, "1 of the")])
def test_check_finds_what_is_no_number(targets, tmp_path, bits, says):
    path, good = tmp_path / "m.bin", bytearray(targets["checkpoint"][1][0].read_bytes())
    struct.pack_into("<I", good, len(good) - 4, bits)     # the last weight of final_norm
    path.write_bytes(good)
    done = subprocess.run([ROOT / "run", path, "--check", "--no-checksum"],
                          capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout == "" and len(done.stderr.splitlines()) == 1
    assert f"final_norm: {says} 12 numbers are NaN or infinite, 1 in all" in done.stderr
    done = subprocess.run([ROOT / "run", path, "--check"], capture_output=True, text=True)
    assert done.returncode == 1 and "checksum" in done.stderr
    done = subprocess.run([ROOT / "run", targets["checkpoint"][1][1], "--check"],
                          capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == ""
    assert len(done.stdout.splitlines()) == 1 and " is sound: " in done.stdout


def test_check_goes_with_nothing_else(targets):
    done = subprocess.run([ROOT / "run", targets["checkpoint"][1][0], "--check", "-i", "a"],
                          capture_output=True, text=True)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
