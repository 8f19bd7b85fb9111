"""Runs the C tests given as arguments and then all Python tests.

Ends with one line, `N passed, N failed`.
"""
import re
import subprocess
import sys
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


totals = [counts([unit]) for unit in sys.argv[1:]]
totals.append(counts([sys.executable, "-m", "pytest", "-q", "-ra", str(HERE)]))
passed, failed = map(sum, zip(*totals))
print(f"{passed} passed, {failed} failed")
sys.exit(failed != 0)
