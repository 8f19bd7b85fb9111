"""Packs the library for Arduino, with an example and its model; it is also a library of PlatformIO,
a component of ESP-IDF and a module of Zephyr.

    python3 tests/arduino/pack.py MODEL OUT.zip [--window KEYS] [--url URL]
"""
import argparse
import re
import sys
import tempfile
import zipfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
sys.path.insert(0, str(HERE.parent / "firmware"))
import boards                                                       # noqa: E402

FREESTANDING = """\
#ifndef BASED_FREESTANDING              /* a board has neither files nor malloc for the library */
#define BASED_FREESTANDING
#endif
"""


def header(data):
    """A C header of the checkpoint's bytes."""
    rows = (", ".join(map(str, data[at:at + 32])) for at in range(0, len(data), 32))
    return ("static const unsigned char checkpoint[] __attribute__((aligned(64))) = {\n"
            + ",\n".join(rows) + "\n};\n")


def content(model, url):
    """[(name, text)] of all files."""
    version = re.search(r'BASED_VERSION "(.*)"', (ROOT / "based.h").read_text()).group(1)
    library = HERE / "library"
    for path in sorted(p for p in library.rglob("*") if p.is_file()):
        text = path.read_text().replace("VERSION", version).replace("SOURCE_URL", url)
        yield str(path.relative_to(library)), text
    yield "LICENSE", (ROOT / "LICENSE").read_text()
    for name in ("based.c", "based.h", "tokenizer.c"):
        yield f"src/{name}", FREESTANDING + (ROOT / name).read_text()
    yield "examples/Story/model.h", header(model.read_bytes())


def pack(model, out, window, url):
    with tempfile.TemporaryDirectory() as name:
        model = boards.shrink(model, window, Path(name) / "model.bin")
        with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
            for path, text in content(model, url):
                archive.writestr(zipfile.ZipInfo(f"Based/{path}"), text, zipfile.ZIP_DEFLATED)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--window", type=int, default=64, metavar="KEYS")
    parser.add_argument("--url", default="", help="where the source is; empty: not said")
    options = parser.parse_args()
    pack(options.model, options.out, options.window, options.url)
    print(f"{options.out}: {options.out.stat().st_size:,} bytes; in the Arduino IDE: Sketch > "
          "Include Library > Add .ZIP Library")
