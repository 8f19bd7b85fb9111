"""Makes export.py and the helpers in this directory importable; what several tests need is made
once in a run, however many processes take part in it."""
import fcntl
import os
import shutil
import sys
from pathlib import Path

import pytest

HERE = os.path.dirname(os.path.abspath(__file__))
for path in (HERE, os.path.dirname(HERE)):
    if path not in sys.path:
        sys.path.insert(0, path)
os.environ.setdefault("OMP_NUM_THREADS", "1")

# How many rounds of the same: FULL=yes, as .ci/run has it, takes as many as tests/README.md says.
FULL = os.environ.get("FULL") == "yes"
# Files with long tests come first, so that none of these is left to one process at the end.
FIRST = ("train", "readme", "torture", "fuzz", "firmware", "package", "library", "instructions",
         "page")


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.stem.removeprefix("test_") not in FIRST)


def need(switch, *tools):
    """Skips the test if a tool is missing; fails if the environment says switch=required."""
    missing = [tool for tool in tools if not shutil.which(tool)]
    if missing:
        fail = os.environ.get(switch) == "required"
        (pytest.fail if fail else pytest.skip)(f"{', '.join(missing)} not here")


@pytest.fixture(scope="session")
def once(tmp_path_factory):
    """once(name, make) -> the folder of this name, filled by make(folder) in one of the processes;
    the others wait for it."""
    base = Path(tmp_path_factory.getbasetemp())
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent                                          # of all processes

    def get(name, make):
        folder = base / "once" / name
        folder.parent.mkdir(exist_ok=True)
        with open(base / "once" / f"{name}.lock", "a") as lock:     # not empty: the folder is ready
            fcntl.flock(lock, fcntl.LOCK_EX)
            if os.fstat(lock.fileno()).st_size == 0:
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir()
                make(folder)
                lock.write("ready")
        return folder
    return get


@pytest.fixture(scope="session", autouse=True)
def compiled_once(once):
    """based.build(...) compiles a library once for each set of flags."""
    import based

    def build(*extra):
        place = once("-".join(["based.so", *extra]), lambda place: based.compile(
            place / "based.so", *extra))
        return based.load(place / "based.so")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(based, "build", build)
        yield


@pytest.fixture(scope="session")
def random_model(tmp_path_factory):
    """random_model(seed, **overrides) -> path of a random checkpoint, the same for the same
    arguments, written once."""
    import numpy as np
    import reference
    directory, written = tmp_path_factory.mktemp("random"), {}

    def make(seed, **overrides):
        key = repr((seed, sorted(overrides.items())))
        if key not in written:
            path = directory / f"{len(written)}.bin"
            written[key] = reference.random_checkpoint(np.random.default_rng(seed), path,
                                                       **overrides)
        return written[key]
    return make
