"""tests/bench.py measures a model, adds what was measured elsewhere, and draws both plots."""
import csv
import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent


def test_table_and_plots(random_model, tmp_path):
    model = random_model(7, mixers=[1, 3], dim=16, input=0, rows=40, vocab=40, flags=1, dtype=1)
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


def test_peers_measures_one_and_many_texts(random_model, tmp_path):
    """With a library that is compiled in a second instead of six."""
    compiler = tmp_path / "cc"
    compiler.write_text(f'#!/bin/sh\nexec {os.environ.get("CC", "cc")} "$@" -O0\n')
    compiler.chmod(0o755)
    model = random_model(7, mixers=[1, 2, 3], dim=32, input=0, rows=512, vocab=512, flags=1,
                         dtype=1)
    out = subprocess.run([sys.executable, HERE / "peers.py", "--based", model, "--prompts", "8",
                          "--depths", "0,5", "--texts", "1,3", "--repeats", "2"], check=True,
                         env={**os.environ, "CC": str(compiler)},
                         stdout=subprocess.PIPE, text=True).stdout
    rows = list(csv.DictReader(out.splitlines()))
    assert [row["test"] for row in rows] == ["pp8", "tg128 @ 0", "tg128 @ 5", "tg32 x 3 @ 0",
                                             "tg32 x 3 @ 5"]
    for row in rows:
        assert row["model"] == Path(model).name and float(row["tokens/s"]) > 0
