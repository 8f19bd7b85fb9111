"""What the README shows must work: its C program compiles without a warning and tells a story; its build line builds; its
state sizes are what the exporter computes."""
import os
import re
import shlex
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("numpy")
import export           # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
CC = shlex.split(os.environ.get("CC", "cc"))


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
