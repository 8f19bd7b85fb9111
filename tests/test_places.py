"""A checkout in any place: paths with spaces, and clones whose git changes line ends."""
import os
import shutil
import subprocess
from pathlib import Path

import pytest

import test_package

ROOT = Path(__file__).resolve().parent.parent


def files():
    """What git knows of this project, or pytest.skip."""
    done = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True)
    if done.returncode:
        pytest.skip("no clone of git")
    return [name for name in done.stdout.decode().split("\0") if name]


def quietly(*command, **more):
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, **more)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_spaces_in_paths(tmp_path):
    """Build, demo, install and page, in a folder, with a prefix, a temporary folder and a model
    that have spaces in their names."""
    place = tmp_path / "a b" / "based c"
    for name in files():
        if not name.startswith(("models/based-", "models/classics", "tests/data")) and (
                ROOT / name).exists():
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, place / name)
    (place / "t t").mkdir()
    shutil.copy(place / "models" / "stories260K.bin", place / "my model.bin")
    env = {**os.environ, "TMPDIR": str(place / "t t")}
    make = "make", "CFLAGS=-O0", "DEMO=my model.bin", f"DESTDIR={tmp_path}/d d", "PREFIX=/p p"
    quietly(*make, "run", cwd=place, env=env)
    assert quietly(*make, "demo", cwd=place, env=env)
    quietly(*make, "install", cwd=place, env=env)
    into = tmp_path / "d d" / "p p"
    assert test_package.names_in(into) == test_package.FILES
    if shutil.which("clang-14") and shutil.which("wasm-ld-14"):
        quietly(*make, "MODEL=my model.bin", "page", cwd=place, env=env)
        assert (place / "build" / "based.html").stat().st_size > 100_000


def test_line_ends_of_a_clone(tmp_path):
    """A git that writes CR LF writes these files as they are."""
    names = [name for name in files() if (ROOT / name).is_file() and not name.startswith(
        ("models/based-", "models/classics"))]
    folder = tmp_path / "origin"
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, folder / name)
    git = ["git", "-c", "user.name=x", "-c", "user.email=x", "-c", "core.autocrlf=false"]
    quietly(*git, "init", "-q", cwd=folder)
    quietly(*git, "add", "-A", "-f", cwd=folder)
    quietly(*git, "commit", "-q", "-m", "x", cwd=folder)
    quietly("git", "-c", "core.autocrlf=true", "clone", "-q", folder, tmp_path / "clone")
    changed = [name for name in names
               if (folder / name).read_bytes() != (tmp_path / "clone" / name).read_bytes()]
    assert changed == []
