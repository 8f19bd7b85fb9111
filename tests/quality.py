"""What a smaller format costs: python3 tests/quality.py REFERENCE.bin OTHER.bin... --text FILE
[--tokens N] [--reset N]

Feeds the same tokens to each checkpoint and compares with the first (usually f32), per depth in the
text, because what is lost may grow with the length of the past. Prints a table: file size, bits per
byte and its change, KL divergence from the reference in nats per token, and how often both would
choose the same next token. With one checkpoint it is the loss by position: what a longer past is
worth. With --reset each checkpoint reads the text twice: first with its state emptied every N
tokens, then in one stream. So the change says what the past before these N tokens is worth.
"""
import argparse
import os
import sys

import numpy as np
from tqdm import tqdm

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import based            # noqa: E402

EDGES = (0, 64, 256, 1024, 4096, 16384, 65536, 262144, 1 << 62)
NAMES = ("1-64", "65-256", "257-1k", "1k-4k", "4k-16k", "16k-64k", "64k-256k", "beyond")
BLOCK = 128


def log_softmax(logits):
    x = logits.astype(np.float64)
    x -= x.max(1, keepdims=True)
    return x - np.log(np.exp(x).sum(1, keepdims=True))


def compare(readers, tokens):
    """Sums over tokens, per reader and depth: (tokens, nats, KL from the first, agreements with the
    first). A reader is a checkpoint and after how many tokens its state is emptied (0: never)."""
    sessions = [based.Session(based.Model(path), BLOCK) for path, _ in readers]
    sums = np.zeros((len(readers), len(NAMES), 4))
    for at in tqdm(range(0, len(tokens) - 1, BLOCK), unit_scale=BLOCK, unit="token",
                   disable=not sys.stderr.isatty()):
        given, next_ones = tokens[at:at + BLOCK], tokens[at + 1:at + BLOCK + 1]
        for session, (_, reset) in zip(sessions, readers):
            if reset and at % reset == 0:
                session.reset()
        rows = [log_softmax(s.feed(given))[:len(next_ones)] for s in sessions]
        depth = np.searchsorted(EDGES, np.arange(at, at + len(next_ones)), "right") - 1
        for row, total in zip(rows, sums):
            each = np.stack([np.ones(len(next_ones)), -row[np.arange(len(next_ones)), next_ones],
                             (np.exp(rows[0]) * (rows[0] - row)).sum(1),
                             row.argmax(1) == rows[0].argmax(1)], 1)
            np.add.at(total, depth, each)
    return sums


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", nargs="+", metavar="CHECKPOINT")
    parser.add_argument("--text", required=True, metavar="FILE")
    parser.add_argument("--tokens", type=int, default=100_000, metavar="N",
                        help="of the text, at most (100000)")
    parser.add_argument("--reset", type=int, metavar="N",
                        help=f"read also with the state emptied every N (a multiple of {BLOCK}) "
                             "tokens")
    options = parser.parse_args()
    if options.reset is not None and (options.reset <= 0 or options.reset % BLOCK):
        parser.error(f"--reset {options.reset}: expected a multiple of {BLOCK}")
    resets = [options.reset, 0] if options.reset else [0]
    readers = [(path, reset) for path in options.checkpoints for reset in resets]
    text = open(options.text, "rb").read()
    model = based.Model(options.checkpoints[0])
    tokens = model.encode(text)[:options.tokens + 1]
    nats_to_bits_per_byte = (len(tokens) - 1) / (model.text_bytes(tokens[1:]) * np.log(2))
    sums = compare(readers, tokens)
    print("| checkpoint | bytes | depth | nats/token | bits/byte | change | KL, nats | "
          "same choice |")
    print("|---|---|---|---|---|---|---|---|")
    for (path, reset), rows in zip(readers, sums):
        name_and_reset = os.path.basename(path) + (f", emptied every {reset:,}" if reset else "")
        for name, row, first in zip(("all", *NAMES), [rows.sum(0), *rows],
                                    [sums[0].sum(0), *sums[0]]):
            if row[0]:
                bits, reference = (x[1] / x[0] * nats_to_bits_per_byte for x in (row, first))
                print(f"| {name_and_reset} | {os.path.getsize(path):,} | {name} | "
                      f"{row[1] / row[0]:.3f} | {bits:.4f} | "
                      f"{100 * (bits / reference - 1):+.2f}% | {row[2] / row[0]:.5f} | "
                      f"{100 * row[3] / row[0]:.2f}% |")


if __name__ == "__main__":
    main()
