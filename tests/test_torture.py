"""Every call of ./run to the C library fails once: memory, opening, reading, writing, closing,
renaming. For each job of the program the first call fails, then the second, ... until none is left.
Each time it must end orderly, with one line that says why, without a leak (AddressSanitizer
watches), and a file that was to be replaced is as it was or whole. In the same way the program is
killed at every call, and the disk becomes full at many sizes. Without FULL=yes it is every third.
"""
import os
import re
import resource
import shlex
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import FULL

ROOT = Path(__file__).resolve().parent.parent
HERE = ROOT / "tests"
MODEL = str(ROOT / "models" / "stories260K.bin")
CC = shlex.split(os.environ.get("CC", "cc"))
CALLS = ("malloc calloc realloc open fstat mmap read fopen fdopen fread fwrite fflush fclose fsync "
         "realpath rename").split()
LEAK = 99
OLD = b"what was there before"


def build(directory):
    """./run with calls that can fail. The bench is shorter; nothing else is changed."""
    source = (ROOT / "run.c").read_text()
    for long, short in (("{ 128, 512, 2048 }", "{ 1, 2, 3 }"),
                        ("{ 0, 1024, 16384, DEEPEST }", "{ 0, 1, 2, 3 }"),
                        ("seconds() + 0.05", "seconds()")):
        assert long in source
        source = source.replace(long, short)
    (directory / "run.c").write_text(source)
    checks = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    compiler = [*CC, "-std=c99", "-O1", "-g", "-ffp-contract=off", f"-I{ROOT}"]
    # The checks inside of based.c take half a minute to compile. Without them leaks are found, too.
    subprocess.run([*compiler, *(checks if FULL else []), "-c", "-o", directory / "based.o",
                    ROOT / "based.c"], check=True)
    sources = [directory / "run.c", HERE / "faults.c", directory / "based.o", ROOT / "tokenizer.c"]
    wraps = [f"-Wl,--wrap={name}" for name in CALLS]
    subprocess.run([*compiler, *checks, *wraps, "-o", directory / "run", *sources, "-lm"],
                   check=True)


@pytest.fixture(scope="module")
def program(once):
    return once("torture", build) / "run"


class End:
    def __init__(self, p, calls):
        self.status, self.out, self.err = p.returncode, p.stdout, p.stderr.decode()
        self.calls = calls


def run(program, args, stdin, at=0, kill=False, cwd=None, **more):
    reader, writer = os.pipe()
    env = dict(os.environ, FAULT_AT=str(at), FAULT_KILL=str(int(kill)), FAULT_REPORT=str(writer),
               ASAN_OPTIONS=f"exitcode={LEAK}", UBSAN_OPTIONS=f"exitcode={LEAK}")
    p = subprocess.run([program, *args], input=stdin, capture_output=True, env=env,
                       pass_fds=[writer], cwd=cwd, timeout=120, **more)
    os.close(writer)
    with os.fdopen(reader) as f:
        calls = f.read()
    return End(p, int(calls or 0))


TALK = b"Hello\n/" + b"a" * 300 + b"\n/save c\n/load c\n/undo\n/reset\n"
JOBS = {
    "generate": ["-i", "Tim and Sue", "-n", "5", "-r", "dog", "--repeat-penalty", "1.1", "-v"],
    "file": ["-f", "text", "-n", "3"],
    "standard input": ["-i", "-", "-n", "3", "--no-display-prompt"],
    "ids": ["--tokens", "1 403 407", "-n", "2", "--dump-logits", "out"],
    "save": ["-i", "Tim", "-n", "2", "--save", "out"],
    "load": ["--load", "state", "--append", " Then", "-n", "3", "--save", "out"],
    "load a prompt": ["--load", "state", "-i", "Tim and", "-n", "0"],
    "measure": ["-x", "text"],
    "branches": ["-i", "Tim", "-n", "3", "--branches", "2"],
    "requests": ["--jsonl", "requests", "--parallel", "2"],
    "chat": ["-m", "chat", "-n", "4", "-y", "A story.", "-i", "Hi", "-r", "dog", "--save", "out"],
    "chat from a file": ["-m", "chat", "-n", "4", "-f", "text", "--load", "state"],
    "info": ["--info"],
    "check": ["--check"],
    "bench": ["--bench", "--csv"],
    "vectors": ["--vectors", "vectors", "--dump-logits", "out"],
}


@pytest.fixture
def place(tmp_path, program):
    """A directory with what the jobs read, and with what was in the file they write."""
    (tmp_path / "text").write_bytes(b"One day, a little girl named Lily saw a big dog.\n"[:48])
    (tmp_path / "requests").write_text(
        '{"prompt": "Tim", "max_tokens": 2, "n": 2}\n{"prompt": "Sue", "continuation": " ran"}\n')
    (tmp_path / "vectors").write_bytes(struct.pack("<12f", *(i / 8 - 1 for i in range(12))))
    save = [MODEL, "-i", "Tim", "-n", "0", "-s", "1", "--save", "state"]
    assert run(program, save, b"", cwd=tmp_path).status == 0
    (tmp_path / "out").write_bytes(OLD)
    return tmp_path


def command(job, random_model):
    if job == "bench":
        model = random_model(1, dim=8, mixers=[1], layer={"mlp": 0, "hidden_dim": 0, "flags": 0},
                             input=0, rows=20, vocab=20, flags=1)
    elif job == "vectors":
        model = random_model(2, mixers=[1], input=12, flags=4, rows=0, vocab=0)
    else:
        model = MODEL
    return [str(model), *JOBS[job], "-s", "1", "-j", "1"]


def some(numbers, job):
    """All of them if FULL, or every third; another one is first for each job."""
    return numbers if FULL else numbers[list(JOBS).index(job) % 3::3]


@pytest.mark.parametrize("job", JOBS)
def test_every_call_fails_once(job, program, place, random_model):
    args, stdin, out = command(job, random_model), TALK if "chat" in job else b"Tim", place / "out"
    good = run(program, args, stdin, cwd=place)
    assert good.status == 0 and good.calls > 5, good.err
    written = out.read_bytes()
    failed, calls = 0, some(range(1, good.calls + 1), job)
    for at in calls:
        out.write_bytes(OLD)
        end = run(program, args, stdin, at, cwd=place)
        where = f"call {at} of {good.calls}: status {end.status}, {end.err}"
        assert end.status in (0, 1), where
        lines = [line for line in end.err.splitlines() if line.startswith("run: ")]
        assert not [line for line in lines if line.endswith(": Success")], where
        if end.status == 1:
            failed += 1
            assert len(lines) >= 1 and lines[-1] == end.err.splitlines()[-1], where
            assert "chat" in job or len(lines) == 1, where
            # a conversation that cannot be shown any more is saved as far as it went
            assert out.read_bytes() in (OLD, written) or ("chat" in job and run(
                ROOT / "run", [MODEL, "--load", out, "-n", "0", "-q"], b"").status == 0), where
        elif "chat" not in job and job != "bench":
            assert end.out == good.out and not lines and out.read_bytes() == written, where
        assert not list(place.glob("*.tmp")), where
    assert failed > len(calls) // 3


@pytest.mark.parametrize("job", ["ids", "save", "load", "vectors"])
def test_killed_at_every_call(job, program, place, random_model):
    """As by kill -9 or a power cut of the machine: the old file or the new one, never a part."""
    args, out = command(job, random_model), place / "out"
    good = run(program, args, b"", cwd=place)
    written, seen = out.read_bytes(), set()
    for at in some(range(1, good.calls + 1), job):
        out.write_bytes(OLD)
        assert run(program, args, b"", at, kill=True, cwd=place).status == -signal.SIGKILL
        seen.add(out.read_bytes())
    assert seen <= {OLD, written} and OLD in seen and written != OLD
    # what was left does no harm, and nobody takes it for something else
    assert run(program, args, b"", cwd=place).status == 0 and out.read_bytes() == written
    assert all(re.fullmatch(r"out\.\d+-\d+\.tmp", path.name) for path in place.glob("*.tmp"))


def at_most(size):
    """For a child: no file may become larger, as if the disk were full, and the last write is cut
    short."""
    def limit():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    return limit


@pytest.mark.parametrize("job", ["ids", "save"])
def test_disk_full_at_any_size(job, place, random_model):
    args, out = command(job, random_model), place / "out"
    run(ROOT / "run", args, b"", cwd=place)
    written = out.read_bytes()
    n = len(written)
    for size in some(sorted({0, 1, 7, 8, 79, 80, 4095, 4096, 4097, n - 4096, n - 1,
                             *range(0, n, n // 20)}), job):
        out.write_bytes(OLD)
        end = run(ROOT / "run", args, b"", cwd=place, preexec_fn=at_most(size))
        assert end.status == 1 and end.err.count("\n") == 1, end.err
        assert "cannot write" in end.err and "File too large" in end.err, end.err
        assert out.read_bytes() == OLD and not list(place.glob("*.tmp"))
    assert (run(ROOT / "run", args, b"", cwd=place, preexec_fn=at_most(n)).status == 0
            and out.read_bytes() == written)


@pytest.mark.parametrize("flag", ["--save", "--dump-logits"])
def test_places_that_cannot_be_written(flag, place):
    for path in ("/proc/version", "/proc/none", "no/such/directory", "."):
        args = [MODEL, "-i", "Tim", "-n", "0", "-q", flag, path, "--no-display-prompt"]
        end = run(ROOT / "run", args, b"", cwd=place)
        assert end.status == 1, end.err
        assert re.fullmatch(r"run: cannot write the (past|logits) to .*\n", end.err), end.err


def test_input_in_drops():
    """What comes byte by byte is the same text."""
    whole = run(ROOT / "run", [MODEL, "-i", "-", "-t", "0", "-n", "9"], b"The big dog\n").out
    p = subprocess.Popen([ROOT / "run", MODEL, "-i", "-", "-t", "0", "-n", "9"],
                         stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                         stderr=subprocess.DEVNULL, bufsize=0)
    for byte in b"The big dog\n":
        p.stdin.write(bytes([byte]))
        time.sleep(0.002)
    p.stdin.close()
    assert p.stdout.read() == whole and p.wait() == 0


def test_the_checkpoint_is_cut_off_while_it_is_used(tmp_path):
    """Mapped bytes that are gone are a signal; it becomes an error line. A file renamed over it
    does no harm."""
    model = tmp_path / "model.bin"
    for cut in (0, 5000):
        model.write_bytes(Path(MODEL).read_bytes())
        p = subprocess.Popen([ROOT / "run", model, "-n", "-1", "--ignore-eos", "-j", "1"],
                             stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        assert len(p.stdout.read(100)) == 100
        (tmp_path / "new").write_bytes(b"another model")
        if cut == 0:                    # first the harmless way
            os.link(model, tmp_path / "old")
            os.replace(tmp_path / "new", model)
            assert len(p.stdout.read(10000)) == 10000 and p.poll() is None
        os.truncate(tmp_path / "old" if cut == 0 else model, cut)
        _, err = p.communicate(timeout=60)
        assert p.returncode == 1, (p.returncode, err)
        assert re.fullmatch(rb"run: the checkpoint cannot be read any more; .*\n", err), err


# --------------------------------------------------------------------------------------------------
# The exporter.

EXPORT = [sys.executable, ROOT / "export.py", "--random",
          HERE / "data" / "hazyresearch-tiny" / "config.json"]


def test_interrupted_export(tmp_path):
    """With the disk full, and killed: the old file stays, and only a kill leaves something."""
    out, full = tmp_path / "model.bin", tmp_path / "full.bin"
    subprocess.run([*EXPORT, full], check=True, capture_output=True)
    size = full.stat().st_size
    out.write_bytes(OLD)
    p = subprocess.run([*EXPORT, out], capture_output=True, preexec_fn=at_most(size // 2))
    assert p.returncode == 1 and b"File too large" in p.stderr, p.stderr
    assert b"Traceback" not in p.stderr, p.stderr
    assert out.read_bytes() == OLD and sorted(os.listdir(tmp_path)) == ["full.bin", "model.bin"]
    for call in ("fsync", "replace"):               # all is written; and also verified
        die = (f"import os, runpy, sys; os.{call} = lambda *_: os.kill(os.getpid(), 9); "
               "del sys.argv[0]; runpy.run_path(sys.argv[0], run_name='__main__')")
        p = subprocess.run([sys.executable, "-c", die, *EXPORT[1:], out], capture_output=True)
        assert p.returncode == -signal.SIGKILL and out.read_bytes() == OLD, p.stderr
    assert [path.stat().st_size for path in tmp_path.glob("*.part")] == [size, size]
