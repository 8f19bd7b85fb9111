"""What the README shows must work: the demo tells the story it prints; its C program compiles without a warning and tells one;
its build line builds; its state sizes are what the exporter computes."""
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("numpy")
import export           # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
CC = shlex.split(os.environ.get("CC", "cc"))


def test_the_demo():
    """Word for word: the same seed gives the same text everywhere."""
    story = subprocess.run(["make", "-s", "demo"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    shown = re.search(r"```\n(Once upon.*?)```", README, re.S).group(1)
    assert story.split() == shown.split()


def test_the_program_compiles_and_runs(tmp_path):
    source, program = tmp_path / "twenty.c", tmp_path / "twenty"
    source.write_text(re.search(r"```c\n(.*?)```", README, re.S).group(1))
    subprocess.run([*CC, "-std=c99", "-O2", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror", f"-I{ROOT}", "-o", program, source,
                    ROOT / "based.c", ROOT / "tokenizer.c", "-lm"], check=True)
    out = subprocess.run([program], cwd=ROOT, check=True, capture_output=True, text=True)
    assert out.stderr == "" and len(out.stdout.split()) > 30 and out.stdout.isascii()


def test_the_build_line(tmp_path):
    line = re.search(r"^cc (.*?)\s+#", README, re.M).group(1)
    words = [str(ROOT / word) if word.endswith(".c") else word for word in shlex.split(line)]
    words[words.index("-o") + 1] = str(tmp_path / "run")
    subprocess.run([*CC, *words], check=True)
    assert subprocess.run([tmp_path / "run", "--version"], capture_output=True).returncode == 0


@pytest.fixture
def workplace(tmp_path):
    """A directory as the section on the originals expects it: `run`, export.py, and what its commands read."""
    np, taylor = pytest.importorskip("numpy"), pytest.importorskip("taylor")
    from safetensors.numpy import save_file
    torch, rng = pytest.importorskip("torch"), np.random.default_rng(1)
    for name in ("export.py", "models", "based.h", "based.c", "tokenizer.c"):
        (tmp_path / name).symlink_to(ROOT / name)
    sources = map(ROOT.joinpath, ("run.c", "based.c", "tokenizer.c"))
    subprocess.run([*CC, "-O2", "-std=c99", "-ffp-contract=off", "-o", tmp_path / "run", *sources, "-lm"], check=True)
    (tmp_path / "path" / "to").mkdir(parents=True)
    (tmp_path / "path" / "to" / "based-360m").symlink_to(ROOT / "tests" / "data" / "hazyresearch-tiny")
    shapes = {"to_q.0.weight": (32, 12), "to_kv.0.weight": (64, 12), "to_out.0.weight": (12, 32)}
    torch.save({name: torch.tensor(np.float32(rng.normal(size=shape))) for name, shape in shapes.items()}, tmp_path / "layer.pt")
    rng.normal(size=(30, 12)).astype("<f4").tofile(tmp_path / "x.f32")
    case = dict(taylor.golden("edifice_based.txt"))["c2 2 2 all 16 16 7"]
    save_file({name: np.float32(x) for name, x in case.items() if "." in name}, tmp_path / "edifice.safetensors")
    case["x"][1].astype("<f4").tofile(tmp_path / "window.f32")
    case = dict(taylor.golden("sata.txt"))["sata d8 dv8 P4"]
    np.concatenate([case[name] for name in "QKV"], 1).astype("<f4").tofile(tmp_path / "qkv.f32")
    (tmp_path / "sata.c").write_text(re.search(r"saved as `sata.c`.*?```c\n(.*?)```", README, re.S).group(1))
    return tmp_path


def test_the_four_originals(workplace):
    """Every command of that section, as it stands; what the ones with known results give."""
    np, taylor = pytest.importorskip("numpy"), pytest.importorskip("taylor")
    section = README.split("## Which original am I coming from?")[1].split("\n## ")[0]
    blocks, printed = re.findall(r"```sh\n(.*?)```", section, re.S), []
    assert len(blocks) == 4
    for commands in blocks:
        if "based-360m" in commands:                          # the tiny model has no tokenizer to read a prompt with
            commands = re.sub(r'-i ".*?"', '--tokens "3 1 4" --ignore-eos --dump-logits l.f32', commands)
            commands = re.sub(r"-n \d+", "-n 0", commands)
        commands = commands.replace("python3", shlex.quote(sys.executable)).replace("cc ", " ".join(CC) + " ")
        printed.append(subprocess.run(["sh", "-ec", commands], cwd=workplace, check=True, capture_output=True, text=True).stdout)
        if "layer.bin" in commands:
            assert np.fromfile(workplace / "y.f32", "<f4").size == 30 * 12
    expected = dict(taylor.golden("edifice_based.txt"))["c2 2 2 all 16 16 7"]["y"][1]
    assert np.abs(np.fromfile(workplace / "y.f32", "<f4").reshape(7, 16) - expected).max() < 1e-5
    first, *rows = printed[3].splitlines()
    numbers = list(map(int, re.findall(r"\d+", first)))
    assert numbers[0] == 165 and f"{165 * 14 + 16 * 16:,} floats" in section and 0 <= numbers[1] - 4 * 2566 <= 256
    expected = dict(taylor.golden("sata.txt"))["sata d8 dv8 P4"]["Y"]
    assert np.abs(np.array([row.split() for row in rows], np.float64) - expected).max() < 1e-4


@pytest.mark.parametrize("name", ["based-360m", "based-1b"])
def test_state_table(name):
    """The row's state and the length of an ordinary cache that it equals, from the shapes alone."""
    config, layers, _ = export.open_random(name, SimpleNamespace(window=None, chunk=16, seed=1), print)
    state = 4 * sum(export.state_floats(config, l) for l in layers)
    row = re.search(rf"^\| {name} \| ([\d,]+) \| ([\d.]+) MB \| (\d+) tokens \|", README, re.M)
    assert int(row[1].replace(",", "")) == export.parameters(config, layers)
    assert f"{state / 1e6:.3g}" == row[2]
    assert round(state / (2 * len(layers) * config.dim * 4)) == int(row[3])


def test_every_file_it_names_exists():
    for name in re.findall(r"\]\(([^)#:]+)\)", README) + re.findall(r"`((?:tests|models)/[\w./]+)`", README):
        assert (ROOT / name).exists(), name
