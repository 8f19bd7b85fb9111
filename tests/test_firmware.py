"""The firmware of tests/firmware on emulated boards: what `make firmware` relies on, and what it
must refuse.

    python3 -m pytest tests/test_firmware.py
        FIRMWARE=required makes a missing compiler or emulator a failure
"""
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "models" / "stories260K.bin"
SMALL = ROOT / "models" / "stories260K-q8.bin"
sys.path.insert(0, str(ROOT / "tests" / "firmware"))
import boards                                                       # noqa: E402


@pytest.fixture(scope="module")
def tools():
    missing = [t for t in ("arm-none-eabi-gcc", "qemu-system-arm") if not shutil.which(t)]
    if missing:
        fail = os.environ.get("FIRMWARE") == "required"
        (pytest.fail if fail else pytest.skip)(f"{', '.join(missing)} not here")
    assert subprocess.run(["make", "-C", str(ROOT), "run"], capture_output=True).returncode == 0


def firmware(*args):
    boards_py = ROOT / "tests" / "firmware" / "boards.py"
    return subprocess.run([sys.executable, str(boards_py), *map(str, args)],
                          capture_output=True, text=True)


def test_same_text_and_logits_and_count_twice(tools):
    tables = []
    for _ in range(2):
        done = firmware(MODEL, "--window", 128, "--boards", "M4F", "--tokens", 12)
        assert done.returncode == 0, done.stderr
        tables.append(re.search(r"^mps2-an386.*", done.stdout, re.M).group().split())
    assert tables[0] == tables[1]
    ram, instructions = (int(tables[0][i].replace(",", "")) for i in (2, 7))
    assert ram <= 192 * 1024 and instructions < 2_000_000


def test_a_fine_prompt_in_any_language(tools):
    done = firmware(MODEL, "--window", 32, "--boards", "M4F", "--tokens", 8,
                    "--prompt", "Zo\u00eb saw \u2603")
    assert done.returncode == 0 and "Zo\u00eb saw \u2603" in done.stdout, done.stderr


@pytest.mark.parametrize("arguments, why", [
    (["--ram", 96], "the arena is too small for the session"),
    (["--ram", 9], "the arena is too small for the model"),
    (["--optimise", "-O2 -ffast-math"], "this build fuses or widens float operations"),
    (["--boards", "Z80"], "there are M0+, M3, M4F"),
])
def test_refusals_say_why(tools, arguments, why):
    board = ["--boards", "M4F"] if "--boards" not in arguments else []
    done = firmware(MODEL, "--window", 128, "--tokens", 2, *board, *arguments)
    assert done.returncode == 1 and why in done.stderr and done.stdout == "", done.stderr


def test_64_kilobytes(tools):
    """The model in 8 bits and a window of 32 tokens: what an ESP8266 could hold, on its core."""
    if not shutil.which("xtensa-lx106-elf-gcc"):
        fail = os.environ.get("FIRMWARE") == "required"
        (pytest.fail if fail else pytest.skip)("xtensa-lx106-elf-gcc not here")
    done = firmware(SMALL, "--window", 32, "--boards", "lx106", "--tokens", 8, "--ram", 64)
    assert done.returncode == 0 and "little girl" in done.stdout, done.stderr


def test_sizes_without_compilers(tmp_path):
    """Cores whose compiler is missing are named."""
    done = subprocess.run([sys.executable, ROOT / "tests" / "firmware" / "boards.py", "--size"],
                          env={"PATH": str(tmp_path)}, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.count("not here") == 7 * len(boards.CORES)


def test_a_smaller_window_is_the_same_text_until_it_is_full(tmp_path):
    """So a device with little RAM tells the beginning of the story as a computer would."""
    small = boards.shrink(MODEL, 128, tmp_path / "small.bin")

    def text(model, tokens):
        done = subprocess.run([str(ROOT / "run"), str(model), "-t", "0", "-n", str(tokens),
                               "-i", "Once upon a time", "-v"], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return (done.stdout, re.search(r"logits #\w+", done.stderr).group(),
                re.search(r"state: +([\d,]+)", done.stderr).group(1))
    (full, logits, _), (cut, cut_logits, state) = text(MODEL, 120), text(small, 120)
    assert (cut, cut_logits, state) == (full, logits, "163,840")
    assert text(small, 300)[1] != text(MODEL, 300)[1]


def test_the_checksum_is_the_one_of_the_format():
    data = MODEL.read_bytes()
    assert boards.checksum(data[32:]) == int.from_bytes(data[24:32], "little")
