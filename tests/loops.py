#!/usr/bin/env python3
"""How many texts of a model run in circles? Continues one prompt with many seeds, by the settings
that the checkpoint recommends, and counts the texts in which a line or a sentence comes three times
in a row, or three times anywhere if it is longer than 40 characters.

    tests/loops.py CHECKPOINT [OPTIONS OF RUN]      such as -t 0.7; needs ./run
    LOOPS="PROMPT" SEEDS=20 TOKENS=1000             in the environment, say what else is done
"""
import json
import os
import re
import shlex
import subprocess
import sys
from collections import Counter
from pathlib import Path

RUN = shlex.split(os.environ.get("RUN", str(Path(__file__).resolve().parent.parent / "run")))


def loop(text):
    """The first line or sentence that makes this text a loop; None if there is none."""
    for pattern in r"\n+", r"\n+|(?<=[.!?])\W*\s+":
        parts = [part.strip() for part in re.split(pattern, text) if part.strip()]
        for part, *next_two in zip(parts, parts[1:], parts[2:]):
            if next_two == [part, part]:
                return part
        for part, count in Counter(parts).items():
            if count >= 3 and len(part) > 40:
                return part
    return None


def texts(model, prompt, seeds, tokens, *options):
    """A text for each seed from 1, as ./run -s SEED -n TOKENS -i PROMPT writes them."""
    request = {"prompt": prompt, "seed": 1, "n": seeds, "max_tokens": tokens}
    out = subprocess.run([*RUN, model, "--jsonl", "-", "-q", *options], check=True,
                         input=json.dumps(request).encode(), stdout=subprocess.PIPE).stdout
    return [json.loads(line)["text"] for line in out.splitlines()]


def main(model, *options):
    prompt = os.environ.get("LOOPS", "The old bear sat down")
    seeds, tokens = int(os.environ.get("SEEDS", "20")), int(os.environ.get("TOKENS", "1000"))
    found = [loop(text) for text in texts(model, prompt, seeds, tokens, *options)]
    for seed, part in enumerate(found, 1):
        if part:
            print(f"seed {seed}: {part[:70]!r}")
    print(f"{sum(map(bool, found))} of {seeds} texts are loops")


if __name__ == "__main__":
    main(*sys.argv[1:])
