"""Makes export.py and the helpers in this directory importable, and gives every test one compiled
library."""
import os
import shutil
import sys

import pytest

HERE = os.path.dirname(os.path.abspath(__file__))
for path in (HERE, os.path.dirname(HERE)):
    if path not in sys.path:
        sys.path.insert(0, path)
os.environ.setdefault("OMP_NUM_THREADS", "1")

# How many rounds of the same: FULL=yes, as .ci/run has it, takes as many as tests/README.md says.
FULL = os.environ.get("FULL") == "yes"


def need(switch, *tools):
    """Skips the test if a tool is missing; fails if the environment says switch=required."""
    missing = [tool for tool in tools if not shutil.which(tool)]
    if missing:
        fail = os.environ.get(switch) == "required"
        (pytest.fail if fail else pytest.skip)(f"{', '.join(missing)} not here")


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
