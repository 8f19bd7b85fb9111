"""models/train.py, end to end: it learns, and what it saves says the same in PyTorch and in C."""
import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
TRAIN = ROOT / "models" / "train.py"


def python(*arguments):
    done = subprocess.run([sys.executable, *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def run(*arguments):
    return subprocess.run([ROOT / "run", *map(str, arguments)], capture_output=True, text=True,
                          check=True).stdout


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """A model with all three mixers, one of which decays, trained for half a minute on the
    trainer's own text, exported."""
    folder = tmp_path_factory.mktemp("smoke")
    said = python(TRAIN, "--smoke", "--out", folder)
    python(ROOT / "export.py", folder, folder / "smoke.bin")
    return folder, said


def test_it_learns(smoke):
    folder, said = smoke
    scores = [float(x) for x in re.findall(r"mean ([0-9.]+)", said)]
    assert len(scores) >= 4 and scores[-1] < scores[0] - 0.5, said
    assert (folder / "loss.png").stat().st_size > 1000


def test_same_logits_in_c(smoke, tmp_path):
    """More tokens than the sinks, the window and several chunks."""
    folder, _ = smoke
    ids = " ".join(str(3 + i * i * 7 % 500) for i in range(200))
    python(TRAIN, "--logits", folder, "--tokens", ids, "--out", tmp_path / "torch.f32")
    run(folder / "smoke.bin", "--tokens", ids, "-n", 0, "-q", "--dump-logits", tmp_path / "c.f32")
    expected, got = (np.fromfile(tmp_path / name, "<f4").reshape(200, -1)
                     for name in ("torch.f32", "c.f32"))
    assert np.abs(expected - got).max() < 2e-4 * max(1, np.abs(expected).max())
    assert expected.std() > 0.5                         # of a model that has learned something


def test_same_bits_per_byte_in_c(smoke, tmp_path):
    """To four digits, over pieces of text that are fed one after the other and in blocks."""
    folder, _ = smoke
    text = tmp_path / "text.txt"
    text.write_text(TRAIN.read_text(encoding="utf-8")[:20000], encoding="utf-8")
    said = python(TRAIN, "--eval", folder, "--text", text)
    expected = float(re.search(r"([0-9.]+) bits per byte", said)[1])
    printed = run(folder / "smoke.bin", "-x", text, "-q")
    got = float(re.search(r"([0-9.]+) bits per byte", printed)[1])
    assert abs(expected - got) <= 2e-4, (said, got)
