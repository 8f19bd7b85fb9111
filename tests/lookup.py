"""What --lookup gains in texts that quote themselves, and costs in those that do not.

    python3 tests/lookup.py [REPEATS]     a table: the shipped models, one thread

Each text is written without and with guesses in turn. The time is what the processor spent on the
tokens behind the first: the least of the repeats, less that of a run of one token.
"""
import re
import resource
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FACT = ("The old bridge was built in 1846 by John Miller, who owned the mill on the north side of "
        "the river. It was closed in 1912 after a flood. ")
LIST = "".join(f'{{"id": {i}, "name": "item {i}", "color": "red", "price": 10}},\n'
               for i in range(1, 9))
CODE = "".join(f"    def get_{name}(self):\n        return self.{name}\n\n"
               for name in ("name", "color", "price", "size"))
GREEDY = ["-t", "0", "--repeat-penalty", "1"]       # without the penalty that the models recommend
ENGLISH, STORY = "based-82m-english", "based-4m-story"
TEXTS = (("a fact, again and again", ENGLISH, 300, FACT * 4, GREEDY),
         ("a list", ENGLISH, 300, LIST, GREEDY),
         ("code", ENGLISH, 300, CODE, GREEDY),
         ("a list, as the model recommends", ENGLISH, 300, LIST, ["-s", 1]),
         ("code, as the model recommends", ENGLISH, 300, CODE, ["-s", 1]),
         ("a story that repeats itself", STORY, 600, "Once upon a time", GREEDY),
         *((f"a free text, seed {seed}", ENGLISH, 300, "The history of the city", ["-s", seed])
           for seed in (1, 2)),
         *((f"a free story, seed {seed}", STORY, 600, "Once upon a time", ["-s", seed])
           for seed in (1, 2, 3)))


def spent(model, n, lookup, prompt, more):
    """Seconds of processor time, and the guesses that were right of those made."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    done = subprocess.run([ROOT / "run", ROOT / "models" / f"{model}.bin", "-i", prompt, "-n",
                           str(n), "--lookup", lookup, "-j", "1", "-v", "--ignore-eos",
                           *map(str, more)], check=True, capture_output=True, text=True)
    seconds = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before
    line = re.search(r"lookup: (.*) guesses", done.stderr)
    return seconds, line.group(1) if line else "none", done.stdout


def measure(repeats):
    """Yields the title, the model, tokens, guesses and milliseconds without and with guesses."""
    for title, model, n, prompt, more in TEXTS:
        best = [float("inf")] * 3
        for _ in range(repeats):
            runs = [spent(model, tokens, lookup, prompt, more)
                    for tokens, lookup in ((1, "0"), (n, "0"), (n, "15"))]
            best = [min(a, run[0]) for a, run in zip(best, runs)]
            assert runs[1][2] == runs[2][2], "another text"
        yield (title, model, n, runs[2][1], *(1e3 * (time - best[0]) for time in best[1:]))


def main(repeats=5):
    print("| text | model | tokens | right guesses | ms without | ms with | speed |\n"
          "|---|---|---|---|---|---|---|")
    for title, model, n, guesses, off, on in measure(repeats):
        print(f"| {title} | {model} | {n} | {guesses} | {off:.1f} | {on:.1f} | {off / on:.2f}x |",
              flush=True)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
