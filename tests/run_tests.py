"""Runs the C tests given as arguments, then all Python tests, in one process more than there are
processors (at most 8), since some tests wait.

Shows how far it is, and ends with one line, `N passed, N failed`.
"""
import os
import re
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent


def counts(command):
    """Runs a command, shows what it prints, and returns (passed, failed) as its last lines tell."""
    lines = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                          text=True) as process:
        for line in process.stdout:
            lines.append(line)
            sys.stdout.write(line)
            sys.stdout.flush()
    tail = "".join(lines[-3:])
    passed, failed = (sum(map(int, re.findall(rf"(\d+) {word}", tail)))
                      for word in ("passed", "(?:failed|error)"))
    if process.returncode and not failed:
        failed = 1                      # died before it could count
    return passed, failed


totals, start = [], time.monotonic()
for i, unit in enumerate(sys.argv[1:], 1):
    print(f"[{i}/{len(sys.argv)}] {Path(unit).name}: ", end="", flush=True)
    totals.append(counts([unit]))
print(f"[{len(sys.argv)}/{len(sys.argv)}] Python tests; each dot is one, s: a tool is not here")
totals.append(counts([sys.executable, "-m", "pytest", "-q", "-n", str(min(8, os.cpu_count() + 1)),
                      "--dist", "worksteal", "-ra", str(HERE)]))
passed, failed = map(sum, zip(*totals))
print(f"{(time.monotonic() - start) / 60:.0f} minutes")
print(f"{passed} passed, {failed} failed")
sys.exit(failed != 0)
