"""tests/peers.py measures, and the figures of the pages and plots are those of speed.csv."""
import csv
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import speed

HERE = Path(__file__).resolve().parent
ROWS = speed.read()


@pytest.mark.parametrize("page", speed.PAGES, ids=lambda page: page.name)
def test_tables(page):
    """`python3 tests/speed.py` would change nothing."""
    text = page.read_text()
    assert speed.render(text, ROWS) == text
    assert text.count("<!-- end -->") == len(re.findall("<!-- ", text)) / 2 > 0


def test_sentences():
    readme = " ".join(speed.PAGES[1].read_text().split())
    for claim in speed.claims(ROWS):
        assert claim in readme


@pytest.mark.parametrize("name", speed.PLOTS)
def test_plots(name, tmp_path):
    """The picture says which points it shows; drawn again, it says the same."""
    speed.draw(ROWS, name, tmp_path)
    new, old = ((where / name).read_bytes() for where in (tmp_path, HERE))
    told = repr(speed.curves(ROWS, speed.PLOTS[name][0])).encode()
    assert told in new and told in old
    assert new.startswith(b"\x89PNG") and 5000 < len(new) < 150000


def test_peers(random_model, tmp_path):
    """This runtime alone, and `./run -b` up to the last test that is wanted."""
    path = random_model(7, mixers=[1, 2, 3], dim=32, input=0, rows=512, vocab=512, flags=1,
                        dtype=1)
    tests = ("reading 8", "writing after 0", "writing after 5", "writing 3 texts after 5")
    alone = ("writing 64 texts after 2048", "writing after 0")
    script = f"""if True:
        import peers
        build = peers.based.build
        peers.based.build = lambda *_: build("-O0")         # is compiled faster
        peers.model = peers.Path
        path = {str(path)!r}
        peers.TURNS = [((path,), "", (1, 2), {tests!r})]
        peers.ALONE = [(path, {alone!r})]
        peers.main(["--rows", "writing.*, 1 t|-b", "--machine", "a test", "--out", "s.csv"])"""
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, check=True,
                   env={**os.environ, "PYTHONPATH": str(HERE)})
    rows = list(csv.DictReader((tmp_path / "s.csv").read_text().splitlines()))
    assert [row["what"] for row in rows if row["unit"] == "tokens/s"] == [*tests[1:], *alone]
    assert [row["what"] for row in rows if row["unit"] == "MB"] == [
        *(f"most memory, {test}" for test in tests[1:]), "most memory"]
    for row in rows:
        assert row["machine"].startswith("a test, ") and row["program"].startswith("based.c ")
        assert row["model"] == path.stem and float(row["value"]) > 0
