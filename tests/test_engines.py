"""Engines that spread requests over processes and machines: the commands that README.md shows give
the answers of one process.

    pip install pyspark         and a Java, by hand: without them test_spark is skipped
"""
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import FULL
from test_cli import MODEL, ROOT, RUN, run
from test_jsonl import mixed, write

README = (ROOT / "README.md").read_text()
NAMED = "models/based-82m-english.bin"          # in README.md; here a smaller one takes its place


@pytest.fixture
def place(tmp_path):
    """A directory like that of README.md, with requests; and the lines that answer them, sorted."""
    if RUN != [str(ROOT / "run")]:
        pytest.skip("the engines start ./run")
    (tmp_path / "run").symlink_to(ROOT / "run")
    (tmp_path / "models").mkdir()
    (tmp_path / NAMED).symlink_to(MODEL)
    path = write(tmp_path / "requests.jsonl", mixed(300 if FULL else 100))
    return tmp_path, sorted(run(MODEL, "--jsonl", path, "-q").text().splitlines())


def shown(start):
    """What README.md shows from this text on, to an empty line or the end of its block."""
    found = re.findall(rf"^{re.escape(start)}.*?(?=^```|^\n)", README, re.S | re.M)
    assert len(found) == 1, start
    return found[0]


def shell(script, cwd, **environment):
    subprocess.run(["bash", "-euc", script], cwd=cwd, check=True, timeout=120,
                   env={"PATH": "/usr/local/bin:/usr/bin:/bin", **environment})


@pytest.mark.skipif(not shutil.which("parallel"), reason="GNU parallel is not installed")
def test_gnu_parallel(place):
    place, answers = place
    shell(shown("parallel --pipe").replace("--block 1M", "--block 10k"), place)
    lines = (place / "answers.jsonl").read_bytes().splitlines()
    assert sorted(lines) == answers
    ids = [json.loads(line)["id"] for line in lines]
    assert ids == sorted(ids)                                       # --keep-order


def test_slurm(place):
    """The scheduler makes a script of these commands, and starts it once for each number."""
    place, answers = place
    shell("sbatch() { printf '%s\\n' '#!/bin/sh' \"${@: -1}\" > array.sh; }\n" +
          shown("sbatch --array"), place)
    for task in range(5):
        shell("sh array.sh", place, SLURM_ARRAY_TASK_ID=str(task), SLURM_ARRAY_TASK_COUNT="5")
    parts = [(place / f"answers.{task}.jsonl").read_bytes().splitlines() for task in range(5)]
    assert all(parts) and sorted(line for part in parts for line in part) == answers


def test_spark(place):
    pyspark = pytest.importorskip("pyspark")
    place, answers = place
    text = " ".join(README.split())
    command = re.search(r'\.pipe\("(\./run[^"]*)", checkCode=True\)', text)[1]
    context = pyspark.SparkContext("local[2]", "requests")
    try:
        lines = (context.textFile(str(place / "requests.jsonl"), 4)
                 .pipe(command.replace("./run", RUN[0]).replace(NAMED, MODEL), checkCode=True)
                 .collect())
    finally:
        context.stop()
    assert sorted(line.encode() for line in lines) == answers
