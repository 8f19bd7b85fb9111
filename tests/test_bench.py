"""tests/bench.py measures a model, adds what was measured elsewhere, and draws both plots."""
import csv
import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent


def test_table_and_plots(random_model, tmp_path):
    model = random_model(7, mixers=[1, 2, 3], dim=32, input=0, rows=40, vocab=40, flags=1, dtype=1)
    columns = ("model,kernels,threads,weight bytes,state bytes,peak memory,read GB/s,test,tokens/s,"
               "spread,GB/s,% of read speed")
    peer = "llama.cpp peer,,1,1000,,3000000,,tg128 @ %d,%d,0,0,"
    rows = [columns, peer % (0, 50), peer % (1024, 20)]
    (tmp_path / "peer.csv").write_text("\n".join(rows) + "\n")
    out = subprocess.run([sys.executable, HERE / "bench.py", model, "-j", "1", "--rows",
                          tmp_path / "peer.csv", "--out", tmp_path / "bench"], check=True,
                         stdout=subprocess.PIPE, text=True).stdout
    rows = list(csv.DictReader((tmp_path / "bench.csv").read_text().splitlines()))
    assert ",".join(rows[0]) == columns and len(rows) == 11 + 2
    assert [row["model"] for row in rows] == [Path(model).stem] * 11 + ["llama.cpp peer"] * 2
    assert (out.count("\n| ") == 1 + len(rows)
            and "| llama.cpp peer | 1 | tg128 @ 1024 | 20 |" in out)
    for name in ("bench_speed.png", "bench_memory.png"):
        picture = (tmp_path / name).read_bytes()
        assert picture.startswith(b"\x89PNG") and 5000 < len(picture) < 150000


def test_peers(random_model, tmp_path):
    """This runtime alone, and `./run -b` up to the last test that is wanted."""
    path = random_model(7, mixers=[1, 2, 3], dim=32, input=0, rows=512, vocab=512, flags=1,
                        dtype=1)
    tests = ("reading 8", "writing after 0", "writing after 5", "writing 3 texts after 5")
    alone = ("writing 64 texts after 2048", "writing after 0")
    script = f"""if True:
        import peers
        build = peers.based.build
        peers.based.build = lambda *_: build("-O0")             # is compiled faster
        peers.model = peers.Path
        peers.TURNS = [(({str(path)!r},), "", (1, 2), {tests!r})]
        peers.ALONE = [({str(path)!r}, {alone!r})]
        peers.main(["--rows", "(writing|-b).*, 1 t", "--machine", "a test", "--out", "speed.csv"])"""
    subprocess.run([sys.executable, "-c", script],
                   cwd=tmp_path, check=True, env={**os.environ, "PYTHONPATH": str(HERE)})
    rows = list(csv.DictReader((tmp_path / "speed.csv").read_text().splitlines()))
    assert [row["what"] for row in rows if row["unit"] == "tokens/s"] == [*tests[1:], *alone]
    assert [row["what"] for row in rows if row["unit"] == "MB"] == [
        *(f"most memory, {test}" for test in tests[1:]), "most memory"]
    for row in rows:
        assert row["machine"].startswith("a test, ") and row["program"].startswith("based.c ")
        assert row["model"] == path.stem and row["threads"] == "1" and float(row["value"]) > 0
