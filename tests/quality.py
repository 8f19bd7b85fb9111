"""What a smaller format costs: python3 tests/quality.py REFERENCE.bin OTHER.bin... --text FILE
[--tokens N]

Feeds the same tokens to each checkpoint and compares with the first (usually f32), per depth in the
text, because what is lost may grow with the length of the past. Prints a table: file size, bits per
byte and its change, KL divergence from the reference in nats per token, and how often both would
choose the same next token. With one checkpoint it is the loss by position: what a longer past is
worth.
"""
import argparse
import os
import sys

import numpy as np
from tqdm import tqdm

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import based            # noqa: E402

EDGES = (0, 64, 256, 1024, 4096, 16384, 65536, 1 << 62)
NAMES = ("1-64", "65-256", "257-1k", "1k-4k", "4k-16k", "16k-64k", "beyond")
BLOCK = 64


def log_softmax(logits):
    x = logits.astype(np.float64)
    x -= x.max(1, keepdims=True)
    return x - np.log(np.exp(x).sum(1, keepdims=True))


def compare(paths, tokens):
    """Sums over tokens, per checkpoint and depth: (tokens, nats, KL from the first, agreements with
    the first)."""
    sessions = [based.Session(based.Model(path), BLOCK) for path in paths]
    sums = np.zeros((len(paths), len(NAMES), 4))
    for at in tqdm(range(0, len(tokens) - 1, BLOCK), unit_scale=BLOCK, unit="token",
                   disable=not sys.stderr.isatty()):
        given, next_ones = tokens[at:at + BLOCK], tokens[at + 1:at + BLOCK + 1]
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
    options = parser.parse_args()
    text = open(options.text, "rb").read()
    model = based.Model(options.checkpoints[0])
    tokens = model.encode(text)[:options.tokens + 1]
    nats_to_bits_per_byte = (len(tokens) - 1) / (model.text_bytes(tokens[1:]) * np.log(2))
    sums = compare(options.checkpoints, tokens)
    print("| checkpoint | bytes | depth | nats/token | bits/byte | change | KL, nats | "
          "same choice |")
    print("|---|---|---|---|---|---|---|---|")
    for path, rows in zip(options.checkpoints, sums):
        for name, row, first in zip(("all", *NAMES), [rows.sum(0), *rows],
                                    [sums[0].sum(0), *sums[0]]):
            if row[0]:
                bits, reference = (x[1] / x[0] * nats_to_bits_per_byte for x in (row, first))
                print(f"| {os.path.basename(path)} | {os.path.getsize(path):,} | {name} | "
                      f"{row[1] / row[0]:.3f} | {bits:.4f} | "
                      f"{100 * (bits / reference - 1):+.2f}% | {row[2] / row[0]:.5f} | "
                      f"{100 * row[3] / row[0]:.2f}% |")


if __name__ == "__main__":
    main()
