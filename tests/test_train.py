"""models/train.py, end to end: it learns, and what it saves says the same in PyTorch and in C."""
import contextlib
import io
import itertools
import json
import pathlib
import re
import subprocess
import sys
import types

import numpy as np
import pytest
import torch

import export
from models import train

ROOT = pathlib.Path(__file__).resolve().parent.parent
TRAIN = ROOT / "models" / "train.py"


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A beginning of the trainer's own text, on which models are measured."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TRAIN.read_text(encoding="utf-8")[:20000], encoding="utf-8")
    return path


def python(program, *arguments):
    """What a program prints, which runs in this process: importing PyTorch takes seconds."""
    main = {TRAIN: train.main, ROOT / "export.py": export.main}[program]
    with (pytest.MonkeyPatch.context() as patch,
          contextlib.redirect_stdout(io.StringIO()) as said):
        patch.setattr(sys, "argv", [str(program), *map(str, arguments)])
        assert not main()
    return said.getvalue()


def run(*arguments):
    return subprocess.run([ROOT / "run", *map(str, arguments)], capture_output=True, text=True,
                          check=True).stdout


@pytest.fixture(scope="module")
def smoke(once):
    """A model with all three mixers, one of which decays, trained for half a minute on the
    trainer's own text, exported."""
    def make(folder):
        (folder / "said").write_text(python(TRAIN, "--smoke", "--out", folder))
        python(ROOT / "export.py", folder, folder / "smoke.bin")
    folder = once("smoke", make)
    return folder, (folder / "said").read_text()


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


def test_same_bits_per_byte_in_c(smoke, text):
    """To four digits, over pieces of text that are fed one after the other and in blocks."""
    folder, _ = smoke
    said = python(TRAIN, "--eval", folder, "--text", text)
    expected = float(re.search(r"([0-9.]+) bits per byte", said)[1])
    printed = run(folder / "smoke.bin", "-x", text, "-q")
    got = float(re.search(r"([0-9.]+) bits per byte", printed)[1])
    assert abs(expected - got) <= 2e-4, (said, got)


@pytest.fixture(scope="module")
def taught(smoke, text, once):
    """A model that learns from the smoke model alone, in 4 bits from the middle on, with the mean
    of its weights."""
    def make(folder):
        (folder / "said").write_text(python(
            TRAIN, "--out", folder, "--tokenizer", smoke[0] / "tokenizer.json",
            "--data", f"self={TRAIN}", "--valid", text, *SHAPE, "--length", 128,
            "--batch-tokens", 1024, "--tokens", "80e3", "--warm-up", 10, "--anneal", 0,
            "--eval-every", 26, "--teacher", smoke[0], "--teacher-share", 1,
            "--bits", 4, "--bits-part", 0.5, "--average", 0.1))
    folder = once("taught", make)
    return folder, (folder / "said").read_text()


SHAPE = ("--layers", "clsc", "--width", 64, "--heads", 2, "--feature", 8, "--keys", 16,
         "--mlp", 256)


def scores(said, name):
    return [float(x) for x in re.findall(rf"{name}: .* mean ([0-9.]+)", said)]


def test_a_teacher_is_enough(taught):
    """The text itself has no share of the loss."""
    learned = scores(taught[1], "weights")
    assert len(learned) == 3 and learned[-1] < learned[0] - 0.4, taught[1]


def test_mean_of_weights(taught):
    """It lags behind while the model learns fast, by little."""
    for now, mean in zip(scores(taught[1], "weights"), scores(taught[1], "average")):
        assert now < mean < now + 0.6, taught[1]


def test_4_bits_in_c(taught, text, tmp_path):
    """The model as training saw it, rounded, is the one in the file; a float one is another."""
    python(ROOT / "export.py", taught[0], tmp_path / "q4.bin", "--dtype", "q4")
    printed = run(tmp_path / "q4.bin", "-x", text, "-q")
    got = float(re.search(r"([0-9.]+) bits per byte", printed)[1])
    in_4_bits, unrounded = (
        float(re.search(r"([0-9.]+) bits", python(TRAIN, "--eval", taught[0], "--text", text,
                                                  *more))[1]) for more in (("--bits", 4), ()))
    assert abs(in_4_bits - got) <= 3e-4 < abs(unrounded - got), (in_4_bits, unrounded, got)


@pytest.mark.parametrize("bits", (4, 8))
def test_rounds_as_export(bits):
    """Bit for bit, with groups that are cut short, that are zero and whose scale is too small."""
    rng = np.random.default_rng(bits)
    model = torch.nn.ParameterList()
    for shape in ((160, 160), (37, 200), (16, 24)):
        weights = rng.standard_normal(shape).astype(np.float32) * 0.05
        weights[3, :32], weights[5] = 0, weights[5] * np.float32(1e-30)
        model.append(torch.nn.Parameter(torch.from_numpy(weights)))
    dtype = next(d for d in export.DTYPES.values() if d.name == f"q{bits}")
    for p, got in zip(model, train.Rounding(model, bits, fused=False).values()):
        shape = tuple(p.shape)
        scales, values = dtype.pack(p.detach().numpy())
        stored = bytes(scales).ljust(dtype.nbytes(shape) - len(values), b"\0") + bytes(values)
        assert np.array_equal(dtype.unpack(stored, shape), got.numpy())
        assert not np.array_equal(p.detach().numpy(), got.numpy())


def test_gradients_of_borrowed_values():
    """What was learned with other values is kept; the values are not."""
    p = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
    with train.borrowed([p], [torch.tensor([3.0, 5.0])]):
        p.square().sum().backward()
    assert p.tolist() == [1, 2] and p.grad.tolist() == [6, 10]


def test_minutes(smoke, text, tmp_path, monkeypatch):
    """By a clock that goes 0.1 s at every look: each part of the time has its steps, the rate falls
    with it, and the last evaluation is not late."""
    ticks = itertools.count()
    monkeypatch.setattr(train, "time", types.SimpleNamespace(time=lambda: next(ticks) / 10))
    monkeypatch.setattr(sys, "argv", list(map(str, (
        TRAIN, "--out", tmp_path, "--tokenizer", smoke[0] / "tokenizer.json", "--data",
        f"self={TRAIN}", "--valid", text, *SHAPE, "--length", 64, "--anneal-length", 128,
        "--anneal", 0.4, "--batch-tokens", 512, "--log-every", 1, "--eval-every", 7,
        "--minutes", 0.1))))
    train.main()
    history = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    losses = [h for h in history if "loss" in h]
    assert 10 < len(losses) < 20 and losses[-1]["progress"] == 1 and history[-1]["of"] == "weights"
    assert next(ticks) / 10 < 6.7
    for before, entry in zip(losses, losses[1:]):
        assert entry["length"] == (128 if before["progress"] >= 0.6 else 64)
    assert {entry["length"] for entry in losses} == {64, 128}
    rates = [train.rate_at(500, part, 10, 0.5) for part in (0.25, 0.75, 1)]
    assert rates == [1, 0.5, 0]


def test_teacher_of_another_language(smoke, tmp_path):
    train.train_tokenizer(["another text, other tokens"], 264, tmp_path / "other.json")
    with pytest.raises(SystemExit, match="has another tokenizer"):
        python(TRAIN, "--out", tmp_path / "x", "--tokenizer", tmp_path / "other.json", "--data",
               f"self={TRAIN}", "--teacher", smoke[0], "--length", 128)
