"""How export.py writes a file, and what it does with standard streams and odd names: one writer for
every kind of place, no traceback anywhere. Kinds A, B and D of tests/README.md."""
import errno
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from test_cli import hear_interrupts

np = pytest.importorskip("numpy")
pytest.importorskip("safetensors")
import export           # noqa: E402
import origins          # noqa: E402
from test_export import SMALL, run              # noqa: E402

ROOT = Path(export.__file__).resolve().parent
TINY = ROOT / "tests" / "data" / "hazyresearch-tiny"


@pytest.fixture
def shape(tmp_path):
    (tmp_path / "shape.json").write_text(json.dumps(SMALL))
    return tmp_path / "shape.json"


@pytest.fixture
def good(tmp_path_factory, capsys, shape):
    """What --random with this shape writes."""
    path = tmp_path_factory.mktemp("good") / "r.bin"
    assert run(capsys, "--random", shape, path, "--name", "r")[0] == 0
    return path.read_bytes()


def cli(*arguments, **more):
    more = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "timeout": 120, **more}
    return subprocess.run([sys.executable, ROOT / "export.py", *arguments], **more)


def write(capsys, shape, out):
    status, stdout, stderr = run(capsys, "--random", shape, out, "--name", "r")
    assert not [name for name in os.listdir(out.parent) if name.endswith(".part")]
    return status, stdout, stderr


# ---- A. Writing a file

def test_a_link_stays(capsys, tmp_path, shape, good):
    for name in ("real.bin", "new.bin"):
        real, link = tmp_path / name, tmp_path / f"link-{name}"
        if name == "real.bin":
            real.write_bytes(b"old")
        link.symlink_to(name)
        assert write(capsys, shape, link)[0] == 0
        assert link.is_symlink() and real.read_bytes() == good and not real.is_symlink()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes with names")
def test_a_pipe_is_written_through(capsys, tmp_path, shape, good):
    os.mkfifo(tmp_path / "pipe")
    seen = []
    reader = threading.Thread(target=lambda: seen.append((tmp_path / "pipe").read_bytes()),
                              daemon=True)
    reader.start()
    assert write(capsys, shape, tmp_path / "pipe")[0] == 0
    reader.join(30)
    assert seen == [good] and stat.S_ISFIFO(os.stat(tmp_path / "pipe").st_mode)


def test_a_device_stays(capsys, tmp_path, shape):
    """Of the test, since one that fails would replace /dev/null if it may."""
    try:
        os.mknod(tmp_path / "null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    except (OSError, AttributeError):
        pytest.skip("only root makes devices")
    assert write(capsys, shape, tmp_path / "null")[0] == 0
    assert stat.S_ISCHR(os.stat(tmp_path / "null").st_mode)


def test_a_mount_is_written_through(capsys, monkeypatch, tmp_path, shape, good):
    """A file that is a mount of its own cannot be replaced; other errors are errors."""
    (tmp_path / "out.bin").write_bytes(b"old")
    node = os.stat(tmp_path / "out.bin").st_ino
    failure = errno.EBUSY

    def replace(*_):
        raise OSError(failure, "no")
    monkeypatch.setattr(os, "replace", replace)
    assert write(capsys, shape, tmp_path / "out.bin")[0] == 0
    assert (tmp_path / "out.bin").read_bytes() == good
    assert os.stat(tmp_path / "out.bin").st_ino == node
    failure = errno.EIO
    (tmp_path / "out.bin").write_bytes(b"old")
    assert write(capsys, shape, tmp_path / "out.bin")[0] == 1
    assert (tmp_path / "out.bin").read_bytes() == b"old"


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o755])
def test_the_mode_stays(capsys, tmp_path, shape, mode):
    out = tmp_path / "out.bin"
    out.write_bytes(b"old")
    out.chmod(mode)
    assert write(capsys, shape, out)[0] == 0 and stat.S_IMODE(out.stat().st_mode) == mode
    assert write(capsys, shape, tmp_path / "new.bin")[0] == 0
    mask = os.umask(0)
    os.umask(mask)
    assert stat.S_IMODE((tmp_path / "new.bin").stat().st_mode) == 0o666 & ~mask


def test_files_of_others_stay(capsys, tmp_path, shape):
    """Whatever else is called like a temporary file."""
    names = ["out.bin.part", "out.bin.tmp", f"out.bin.{os.getpid()}.part", ".out.bin.part"]
    for name in names:
        (tmp_path / name).write_text("precious")
    assert run(capsys, "--random", shape, tmp_path / "out.bin")[0] == 0
    assert [(tmp_path / name).read_text() for name in names] == ["precious"] * 4
    assert sorted(os.listdir(tmp_path)) == sorted([*names, "out.bin", "shape.json"])


def test_long_names(capsys, tmp_path, shape, good):
    out = tmp_path / ("\u00e9" * 125 + ".bin")
    assert write(capsys, shape, out)[0] == 0 and out.read_bytes() == good


@pytest.mark.parametrize("number", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_signals_leave_nothing(tmp_path, shape, number):
    """The temporary file is there from the start, and gone on every way out."""
    if not hasattr(signal, number):
        pytest.skip(f"needs {number}")
    shape.write_text(json.dumps(dict(SMALL, n_embd=1024, n_head=16, n_layer=8, n_inner=4096)))
    (tmp_path / "out.bin").write_bytes(b"old")
    p = subprocess.Popen([sys.executable, ROOT / "export.py", "--random", shape,
                          tmp_path / "out.bin"], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                         preexec_fn=hear_interrupts)
    limit = time.time() + 60
    while not list(tmp_path.glob("*.part")) and p.poll() is None and time.time() < limit:
        time.sleep(0.01)
    time.sleep(0.2)
    p.send_signal(getattr(signal, number))
    _, stderr = p.communicate(timeout=60)
    assert p.returncode == 130 and b"Traceback" not in stderr, stderr
    assert b"export.py: interrupted; nothing was written" in stderr
    assert (tmp_path / "out.bin").read_bytes() == b"old"
    assert sorted(os.listdir(tmp_path)) == ["out.bin", "shape.json"]


def test_many_writers_and_readers(tmp_path, good):
    """Four writers and two readers on one name: every reader sees a whole file, no writer fails."""
    out, rounds, torn = tmp_path / "out.bin", 250, []
    program = ("import sys, export\n"
               "for i in range(int(sys.argv[2])):\n"
               "    with export.replacing(sys.argv[1]) as temporary:\n"
               "        with open(temporary, 'wb') as f:\n"
               "            f.write(bytes([i % 251]) * (1000 + 37 * i))\n")
    writers = [subprocess.Popen([sys.executable, "-c", program, out, str(rounds)], cwd=ROOT,
                                stderr=subprocess.PIPE) for _ in range(4)]

    def read():
        while any(p.poll() is None for p in writers):
            if out.exists():
                data = out.read_bytes()
                if len(set(data)) != 1 or (len(data) - 1000) % 37 or data[0] != (
                        len(data) - 1000) // 37 % 251:
                    torn.append(len(data))
    readers = [threading.Thread(target=read) for _ in range(2)]
    for reader in readers:
        reader.start()
    failures = [p.communicate()[1] for p in writers]
    for reader in readers:
        reader.join()
    assert failures == [b""] * 4 and not torn
    assert sorted(os.listdir(tmp_path)) == ["out.bin", "shape.json"]


def test_output_that_is_read(capsys, tmp_path, shape):
    """Refused before anything is read, under whatever name."""
    folder = tmp_path / "model"
    shutil.copytree(TINY, folder)
    (tmp_path / "link").symlink_to(folder / "pytorch_model.bin")
    (folder / "tokenizer.model").write_text("x")
    (tmp_path / "t.json").write_text("{}")
    story = tmp_path / "story.bin"
    shutil.copy(ROOT / "models" / "stories260K.bin", story)
    (tmp_path / "text.txt").write_text("Once")
    constant = "--taylor-degree", 3, "--window", 8, "--calibrate", tmp_path / "text.txt"
    for source, out, *more in (
            (folder, folder / "pytorch_model.bin"),
            (folder / "config.json", folder / "config.json"),
            (folder, tmp_path / "link"), (folder, folder / "tokenizer.model"),
            (folder, tmp_path / "t.json", "--tokenizer", tmp_path / "t.json"),
            (story, story, "--sinks", 1), (story, tmp_path / "text.txt", *constant),
            ("--random", shape, shape)):
        before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
        status, _, stderr = run(capsys, source, out, *more)
        assert status == 1 and "would be written, and is read too" in stderr, stderr
        assert before == {path: path.read_bytes() for path in tmp_path.rglob("*")
                          if path.is_file()}
    assert run(capsys, folder, folder / "out.bin")[0] == 0          # beside them is fine


def test_a_shard_is_an_input(capsys, tmp_path):
    index = {"weight_map": {"a": "one.weights"}}
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "one.weights").write_text("x")
    status, _, stderr = run(capsys, tmp_path, tmp_path / "one.weights")
    assert status == 1 and "is read too" in stderr


def test_places_are_tried_first(capsys, monkeypatch, tmp_path):
    """A place that cannot be written is told before the source is looked at."""
    monkeypatch.setattr(export, "convert", lambda *_: pytest.fail("too late"))
    (tmp_path / "folder").mkdir()
    places = [tmp_path / "no" / "such" / "out.bin", tmp_path / "folder"]
    if os.path.exists("/proc/version"):
        places += [Path("/proc/version"), Path("/proc/none")]
    for out in places:
        status, _, stderr = run(capsys, TINY, out)
        assert status == 1 and stderr.startswith(f"export.py: {out}"), stderr
        assert len(stderr.splitlines()) == 1


# ---- B. Standard streams and names

@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&-", "<&- >&- 2>&-"])
def test_closed_streams(tmp_path, shape, good, closed):
    """No traceback, and no byte of text in the file."""
    out = tmp_path / "out.bin"
    p = subprocess.run(f'"{sys.executable}" "{ROOT}/export.py" --random "{shape}" "{out}" '
                       f'--name r {closed}', shell=True, capture_output=True)
    assert p.returncode == 0 and b"Error" not in p.stderr, p.stderr
    assert out.read_bytes() == good


def test_stdout_is_full(tmp_path, shape, good):
    if not os.path.exists("/dev/full"):
        pytest.skip("needs /dev/full")
    with open("/dev/full", "wb") as full:
        p = cli("--random", shape, tmp_path / "out.bin", "--name", "r", stdout=full)
    assert p.returncode == 1 and b"Traceback" not in p.stderr
    assert p.stderr.decode().splitlines()[-1] == (
        "export.py: standard output: No space left on device")
    assert (tmp_path / "out.bin").read_bytes() == good


def test_the_model_to_stdout(tmp_path, shape, good):
    """The text goes elsewhere."""
    if not os.path.exists("/dev/stdout"):
        pytest.skip("needs /dev/stdout")
    p = cli("--random", shape, "/dev/stdout", "--name", "r")
    assert p.returncode == 0 and p.stdout == good and b"read back and verified" in p.stderr


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
def test_consoles(tmp_path, shape, encoding):
    name = "\u30e2\u30c7\u30eb"
    env = {**os.environ, "PYTHONIOENCODING": encoding, "PYTHONUTF8": "1"}
    p = cli("--random", shape, tmp_path / f"{name}.bin", "--name", name, env=env)
    assert p.returncode == 0, p.stderr
    shown = name if encoding == "utf-8" else "\\u30e2\\u30c7\\u30eb"
    assert shown in p.stdout.decode(encoding)
    p = cli("--inspect", tmp_path / f"{name}.bin", env=env)
    assert p.returncode == 0 and shown in p.stdout.decode(encoding), p.stderr
    p = cli(tmp_path / f"{name}.bin", tmp_path / "x", env=env)
    assert p.returncode == 1 and shown in p.stderr.decode(encoding)


@pytest.mark.parametrize("form", ["safetensors", "bin", "llama"])
def test_names_that_are_not_utf8(tmp_path, form):
    try:
        place = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff\xfe"))
        place.mkdir()
    except (OSError, UnicodeError):
        pytest.skip("this system has no such names")
    if form == "llama":
        source = origins.write_llama(place / "l.bin", np.random.default_rng(5),
                                     (24, 40, 2, 4, 4, 30, 12))
    else:
        source = origins.write_based(place / "source", origins.twelve_state(), origins.TWELVE,
                                     form)
    for more in ((), ("--name", os.fsdecode(b"\xff"))):
        p = cli(source, place / "out.bin", *more)
        assert p.returncode == 0 and b"Traceback" not in p.stderr, p.stderr
        p = cli("--inspect", place / "out.bin")
        assert p.returncode == 0, p.stderr
    p = cli(place / "nothing", place / "out.bin")
    assert p.returncode == 1 and len(p.stderr.splitlines()) == 1
    p = cli(source, place / "no" / "out.bin")
    assert p.returncode == 1 and len(p.stderr.splitlines()) == 1
