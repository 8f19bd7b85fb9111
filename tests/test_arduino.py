"""The library for Arduino as arduino-builder compiles it, against a core for boards of QEMU.

    python3 -m pytest tests/test_arduino.py
        FIRMWARE=required makes a missing compiler or emulator a failure
"""
import json
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from conftest import need

ROOT = Path(__file__).resolve().parent.parent
ARDUINO = ROOT / "tests" / "arduino"
MODEL = ROOT / "models" / "stories260K-q8.bin"
sys.path[:0] = [str(ROOT / "tests" / "firmware"), str(ARDUINO)]
import boards                                                       # noqa: E402
import pack                                                         # noqa: E402


@pytest.fixture(scope="module")
def libraries(tmp_path_factory):
    """A folder of libraries, with what `make arduino` packs."""
    need("FIRMWARE", "arm-none-eabi-gcc", "qemu-system-arm", "arduino-builder")
    place = tmp_path_factory.mktemp("libraries")
    subprocess.run(["make", "-s", "-C", ROOT, "run"], check=True)
    subprocess.run(["make", "-s", "-C", ROOT, f"BUILD={place}", f"PYTHON={sys.executable}",
                    "arduino"], check=True)
    with zipfile.ZipFile(place / "based-arduino.zip") as archive:
        archive.extractall(place)
    return place


def test_what_the_files_say(libraries):
    version = re.search(r'BASED_VERSION "(.*)"', (ROOT / "based.h").read_text()).group(1)
    properties = (libraries / "Based" / "library.properties").read_text()
    assert f"\nversion={version}\n" in properties and "\nurl=\n" in properties
    named = dict(pack.content(MODEL, "https://example.org"))["library.properties"]
    assert "\nurl=https://example.org\n" in named
    assert json.loads((libraries / "Based" / "library.json").read_text())["version"] == version


@pytest.mark.parametrize("board, machine", [("m0plus", "mps2-an385"), ("m4f", "mps2-an386")])
def test_the_example(libraries, board, machine, tmp_path):
    """No warning, the RAM and flash that the library promises, and the logits of this computer."""
    sketch = libraries / "Based" / "examples" / "Story" / "Story.ino"
    built = subprocess.run(
        ["arduino-builder", "-compile", "-hardware", ARDUINO / "hardware", "-tools", tmp_path,
         "-libraries", libraries, "-fqbn", f"based:qemu:{board}", "-build-path", tmp_path, sketch],
        capture_output=True, text=True)
    assert built.returncode == 0 and "warning" not in built.stderr, built.stderr
    elf = tmp_path / "Story.ino.elf"
    text, data, bss = boards.sections(boards.ARM, elf)
    assert text + data < 400_000 and data + bss < 110_000
    told = boards.command("timeout", "300", "qemu-system-arm", "-M", machine, "-display", "none",
                          "-monitor", "none", "-serial", "null", "-semihosting-config",
                          "enable=on,target=native", "-kernel", elf)
    small = boards.shrink(MODEL, 64, tmp_path / "small.bin")
    here = subprocess.run([ROOT / "run", small, "-t", "0", "-n", "40", "-i", "Once upon a time",
                           "-v"], capture_output=True, text=True)
    logits = re.search(r"^logits #(\w+)", here.stderr, re.M).group(1)
    story, rest = told.split("\nlogits #")
    assert story == here.stdout.rstrip("\n")
    assert rest.split()[0].lower().zfill(8) == logits
