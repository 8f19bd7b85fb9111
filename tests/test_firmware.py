"""The firmware of tests/firmware on emulated boards: what `make firmware` relies on, and what it
must refuse.

    python3 -m pytest tests/test_firmware.py
        FIRMWARE=required makes a missing compiler or emulator a failure
"""
import os
import re
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import need

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "models" / "stories260K.bin"
SMALL = ROOT / "models" / "stories260K-q8.bin"
sys.path.insert(0, str(ROOT / "tests" / "firmware"))
import boards                                                       # noqa: E402


@pytest.fixture(scope="module")
def tools():
    need("FIRMWARE", "arm-none-eabi-gcc", "qemu-system-arm")
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
    done = firmware(MODEL, "--window", 32, "--boards", "M4F", "--tokens", 8, "--optimise=-O1",
                    "--prompt", "Zo\u00eb saw \u2603")
    assert done.returncode == 0 and "Zo\u00eb saw \u2603" in done.stdout, done.stderr


@pytest.mark.parametrize("arguments, why", [
    (["--optimise=-O0", "--ram", 96], "the arena is too small for the session"),
    (["--optimise=-O0", "--ram", 9], "the arena is too small for the model"),
    (["--optimise", "-O1 -ffast-math"], "this build fuses or widens float operations"),
    (["--boards", "Z80"], "there are M0+, M3, M4F"),
])
def test_refusals_say_why(tools, arguments, why):
    board = ["--boards", "M4F"] if "--boards" not in arguments else []
    done = firmware(MODEL, "--window", 128, "--tokens", 2, *board, *arguments)
    assert done.returncode == 1 and why in done.stderr and done.stdout == "", done.stderr


@pytest.fixture(scope="module")
def emulator(tools):
    """The folder that has the npm package rp2040js, an emulator of the Raspberry Pi Pico."""
    place = ROOT / "build" / "npm"
    if not (place / "node_modules" / "rp2040js").exists():
        done = subprocess.run(["npm", "install", "--no-audit", "--no-fund", "--prefix", str(place),
                               "rp2040js@1.4.1"], capture_output=True) if shutil.which(
                                   "npm") else None
        if not done or done.returncode:
            fail = os.environ.get("FIRMWARE") == "required"
            (pytest.fail if fail else pytest.skip)("npm cannot install rp2040js")
    return place / "node_modules"


def pico(*args):
    return subprocess.run([sys.executable, str(ROOT / "tests" / "firmware" / "pico.py"),
                           *map(str, args)], capture_output=True, text=True)


def test_a_raspberry_pi_pico(emulator, tmp_path):
    """The file that a board gets, from its boot on, in an emulator: the text and logits of this
    computer, by UART, and by USB to a host that asks what real ones ask (pico.mjs)."""
    out = tmp_path / "story.uf2"
    done = pico(SMALL, out, "--window", 128, "--tokens", 4, "--emulate", emulator)
    assert done.returncode == 0 and "there was a" in done.stdout, done.stderr
    assert re.search(r"^the same by USB, \d+ bytes$", done.stdout, re.M)
    cycles = int(re.search(r"^cycles per token (\d+)$", done.stdout, re.M).group(1))
    assert cycles < 11_000_000
    damaged = bytearray(out.read_bytes())
    damaged[32 + 100] ^= 1
    out.write_bytes(damaged)
    done = subprocess.run(["node", str(ROOT / "tests" / "firmware" / "pico.mjs"), str(out), "0x0",
                           str(emulator)], capture_output=True, text=True)
    assert done.returncode and "the CRC of the boot block is wrong" in done.stderr


def test_a_raspberry_pi_pico_2(tools, tmp_path):
    """No emulator knows this board: that the file is whole. `make firmware` runs its code (M33)."""
    out = tmp_path / "story.uf2"
    done = pico(ROOT / "models" / "based-4m-story.bin", out, "--board", "pico2")
    assert done.returncode == 0, done.stderr
    data = out.read_bytes()
    blocks = [struct.unpack_from("<8I", data, at) for at in range(0, len(data), 512)]
    assert [b[3] for b in blocks] == [0x10000000 + 256 * i for i in range(len(blocks))]
    assert blocks[-1][3] + 256 <= 0x10400000 and {b[7] for b in blocks} == {0xe48bff59}
    assert struct.unpack_from("<7I", data, 32) == (0xffffded3, 0x10210142, 0x203, 0x10000100, 0x3ff,
                                                   0, 0xab123579)


def test_64_kilobytes(tools):
    """The model in 8 bits and a window of 32 tokens: what an ESP8266 could hold, on its core."""
    need("FIRMWARE", "xtensa-lx106-elf-gcc")
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
