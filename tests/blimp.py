"""BLiMP (Warstadt et al. 2020): does a model find the acceptable sentence of a minimal pair more
probable than the other one? Sentences are scored by `run MODEL --jsonl -`.

    python3 tests/blimp.py MODEL [BLiMP.zip]    accuracy for each set; without the archive, of the
                                                sample in tests/data/blimp.jsonl
"""
import argparse
import json
import os
import shlex
import subprocess
import sys
import zipfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
SAMPLE = HERE / "data" / "blimp.jsonl"
RUN = shlex.split(os.environ.get("RUN", str(HERE.parent / "run")))


def pairs(path):
    """(set, acceptable sentence, the other one) for each line of an archive or of one file."""
    texts = [path.read_text()] if path.suffix != ".zip" else []
    if path.suffix == ".zip":
        with zipfile.ZipFile(path) as z:
            texts = [z.read(name).decode() for name in sorted(z.namelist())
                     if name.startswith("data/") and name.endswith(".jsonl")]
    for line in "".join(texts).splitlines():
        q = json.loads(line)
        yield q["UID"], q["sentence_good"], q["sentence_bad"]


def log_probabilities(model, sentences):
    requests = "".join(json.dumps({"continuation": s}) + "\n" for s in sentences)
    done = subprocess.run([*RUN, model, "--jsonl", "-"], input=requests.encode(), check=True,
                          stdout=subprocess.PIPE)
    return [json.loads(line)["logprob"] for line in done.stdout.splitlines()]


def accuracy(model, path):
    """{set: (pairs in which the acceptable sentence is more probable, pairs)}"""
    names, *sentences = zip(*pairs(Path(path)))
    logs = log_probabilities(model, [s for both in zip(*sentences) for s in both])
    sets = {name: [0, 0] for name in names}
    for name, good, bad in zip(names, logs[::2], logs[1::2]):
        sets[name][0] += good > bad
        sets[name][1] += 1
    return sets


def main():
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("model")
    p.add_argument("pairs", nargs="?", default=SAMPLE)
    o = p.parse_args()
    sets = accuracy(o.model, o.pairs)
    for name, (right, n) in sorted(sets.items()):
        print(f"{100 * right / n:6.1f} % of {n:5} {name}")
    right, n = map(sum, zip(*sets.values()))
    print(f"{100 * right / n:6.1f} % of {n:5} all")


if __name__ == "__main__":
    sys.exit(main())
