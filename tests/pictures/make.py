"""Makes the two pictures of README.md from real runs:

    build/venv/bin/python tests/pictures/make.py

terminal.svg is what a terminal shows of the demo, and of a text that is saved and continued.
page.png is the page of `make page`, telling a story; it needs what tests/test_page.py needs.
"""
import contextlib
import html
import os
import subprocess
import sys
import tempfile
import textwrap
import time
from pathlib import Path

from PIL import Image

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
sys.path.insert(0, str(HERE.parent))
import test_page        # noqa: E402

BEAR = "./run models/based-82m-english.bin"
COMMANDS = ["make demo", f'{BEAR} -i "The old bear sat down" -n 40 -s 6 --save bear.state',
            f'{BEAR} --load bear.state -n 40 -s 4']
COLUMNS, LEFT, TOP, WIDTH, HEIGHT = 92, 20, 54, 8.4, 20


def terminal():
    """Runs the commands in a copy of the program's folder; writes their output as text in SVG."""
    lines = []
    with tempfile.TemporaryDirectory() as place:
        for name in "run", "models", "Makefile", "run.c", "based.c", "tokenizer.c", "based.h":
            os.symlink(ROOT / name, Path(place, name))
        for command in COMMANDS:
            done = subprocess.run(command, shell=True, cwd=place, check=True, text=True,
                                  stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
            lines += [("command", f"$ {command}")]
            # The speed is left out: here it would be that of a busy machine.
            shown = [line for line in done.stdout.splitlines() if "achieved tok/s" not in line]
            for line in shown or [""]:
                lines += [("text", part) for part in textwrap.wrap(line, COLUMNS) or [""]]
            lines += [("text", "")]
    width, height = 2 * LEFT + COLUMNS * WIDTH, TOP + len(lines) * HEIGHT
    out = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height}" '
           f'width="{width:.0f}" height="{height}" font-family="ui-monospace, Menlo, Consolas, '
           '\'DejaVu Sans Mono\', monospace" font-size="14">',
           "<style>text { fill: #d8d4cc; white-space: pre } .command { fill: #f0b48a }</style>",
           f'<rect width="{width:.0f}" height="{height}" rx="10" fill="#1c1a18"/>']
    out += [f'<circle cx="{24 + 20 * i}" cy="22" r="6" fill="#57524a"/>' for i in range(3)]
    out += [f'<text class="{kind}" x="{LEFT}" y="{TOP + HEIGHT * i}" '
            f'textLength="{len(line) * WIDTH:.1f}">{html.escape(line, quote=False)}</text>'
            for i, (kind, line) in enumerate(lines) if line]
    (HERE / "terminal.svg").write_text("\n".join([*out, "</svg>", ""]))


def page():
    """Lets the page tell a story, and photographs it."""
    subprocess.run(["make", "-s", "page"], cwd=ROOT, check=True)
    driver = contextlib.contextmanager(test_page.driver.__wrapped__)
    with tempfile.TemporaryDirectory() as place, driver() as port:
        b = test_page.Browser(port, f"{place}/profile", place, (800, 1190))
        b.open((ROOT / "build" / "based.html").as_uri())
        b.type("#seed", "1")
        b.type("#pace", "as")
        b.click("#tell")
        test_page.finish(b)
        b.script("document.activeElement.blur(); window.scrollTo(0, 0); "
                 "document.documentElement.style.scrollbarWidth = 'none';")
        time.sleep(2)                               # bars change their length slowly
        b.screenshot(HERE / "page.png")
        b.close()
    image = Image.open(HERE / "page.png").convert("RGB")
    image.quantize(24).save(HERE / "page.png", optimize=True)


if __name__ == "__main__":
    subprocess.run(["make", "-s", "run"], cwd=ROOT, check=True)
    terminal()
    page()
