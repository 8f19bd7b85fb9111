"""Does the error grow with the length of the text? Two measurements against float64; `make endless`
runs both.

    python3 tests/endless.py [--tokens 10000000] [--model-tokens 100000] [--plot FILE.png]

1. One taylor layer (16 wide keys, 64 wide values, as the published models have them), ten million
   tokens, four shapes of input: the largest relative error of the output at 1, 2 and 5 times every
   power of ten (endless.c). For comparison, twice more with plain sums, without compensation
   for rounding: in chunks of 16 tokens, and token by token.
2. A whole small model with every mixer, a hundred thousand tokens: the error of its logits. The
   reference carries float64 sums from token to token; on a short text it is first compared with
   reference.py, which keeps the entire past.

Exits with 1 if a relative error of (1) or an error of (2) relative to the largest logit exceeds
1e-5. The plot needs matplotlib.
"""
import argparse
import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
import based  # noqa: E402
import export  # noqa: E402
import reference  # noqa: E402

BOUND = 1e-5
PLAIN = "plain sums"
SHAPES = "centred", "shifted", "biased", "drifting"
KEY, VALUE = 16, 64


def one_layer(path, chunk):
    """A model that is nothing but a taylor layer: vectors of q, k and v in, their attention out."""
    dim = 2 * KEY + VALUE
    config = export.CONFIG.new(dim=dim, layers=1, input=dim, name=b"one taylor layer")
    layer = export.LAYER.new(mixer=export.TAYLOR, flags=export.NO_RESIDUAL, heads=1, kv_heads=1,
                             head_dim_k=KEY, head_dim_v=VALUE,
                             chunk=chunk, degree=2, normalizer_eps=1e-12, scale=0.25)
    tensors = {"in": np.eye(dim, dtype=np.float32), "out": np.eye(dim, VALUE, dtype=np.float32),
               "coefficients": np.array([[1, 1, 0.5]], np.float32)}
    export.write(str(path), config, [layer], b"",
                 lambda name: next(t for key, t in tensors.items() if key in name.split(".")))
    return path


KEEPS = "return fabsf(error) > 1e-36f && fabsf(error) <= FLT_MAX ? error : 0.0f;"


def compile_program(out, plain):
    source = (HERE.parent / "based.c").read_text()
    assert source.count(KEEPS) == 1
    (out.parent / "based.c").write_text(source.replace(KEEPS, "(void)error; return 0.0f;")
                                        if forgetful else source)
    command = ["cc", "-O3", "-std=c99", "-ffp-contract=off", "-fno-trapping-math", "-I",
               HERE.parent, "-o", out,
               HERE / "endless.c", out.parent / "based.c", "-lm"]
    # only faster, never different
    if subprocess.run([*command, "-march=native"], stderr=subprocess.DEVNULL).returncode:
        subprocess.run(command, check=True)
    return out


def measure_layer(directory, tokens):
    """{name of a curve: [(tokens, error)]}"""
    compensated, plain = (compile_program(directory / name, name == "plain")
                          for name in ("compensated", "plain"))
    curves = {}
    for program, chunk, shapes in ((compensated, 16, SHAPES), (plain, 16, ("shifted",)),
                                   (plain, 1, ("shifted",))):
        checkpoint = one_layer(directory / f"chunk{chunk}.bin", chunk)
        for shape in shapes:
            name = shape if program == compensated else f"{shape}, {PLAIN}, chunks of {chunk}"
            lines = subprocess.run([program, checkpoint, str(tokens), shape], check=True,
                                   capture_output=True, text=True).stdout
            curves[name] = [tuple(map(float, line.split())) for line in lines.splitlines()]
            at = " ".join(f"{error:.1e}" for n, error in curves[name] if math.log10(n) % 1 == 0)
            print(f"{name:36} at 10, 100, ... {curves[name][-1][0]:.0f} tokens: {at}", flush=True)
    return curves


class Recurrence:
    """reference.run, carrying float64 sums instead of the past, a block of tokens at a time."""

    def __init__(self, m):
        self.m, self.past = m, [None] * m.layers

    def attention(self, i, l, q, k, v, first):
        """Taylor: the sums of all blocks before, and this block in full. Window: the last keys are
        kept."""
        n = len(q)
        q, k, v = q.reshape(n, l.heads, -1), k.reshape(n, l.kv_heads,
                                                       -1), v.reshape(n, l.kv_heads, -1)
        if l.rope_pairs:
            q, k = reference.rotated(q, l.rope_freq,
                                     first), reference.rotated(k, l.rope_freq, first)
        y = np.zeros((n, l.heads, l.head_dim_v))
        if l.mixer == 3:
            before = self.past[i] or (k[:0], v[:0])
            keys, values = np.concatenate([before[0], k]), np.concatenate([before[1], v])
            old = len(before[0])
            distance = old + np.arange(n)[:, None] - np.arange(old + n)[None]
            for h in range(l.heads):
                kv = h * l.kv_heads // l.heads
                score = np.where((distance >= 0) & (distance < l.window),
                                 l.scale * q[:, h] @ keys[:, kv].T, -np.inf)
                w = np.exp(score - score.max(1, keepdims=True))
                y[:, h] = w @ values[:, kv] / w.sum(1, keepdims=True)
            self.past[i] = keys[-l.window:], values[-l.window:]
            return y
        sums = self.past[i] or [[0.0] * (l.degree + 1) for _ in range(l.kv_heads)]
        past = np.tril(np.ones((n, n), bool))
        for h in range(l.heads):
            kv, a = h * l.kv_heads // l.heads, l.coefficients[h]
            score = l.scale * q[:, h] @ k[:, kv].T
            w = np.where(past, sum(a[p] * score ** p for p in range(l.degree + 1)), 0)
            total, z = w @ v[:, kv], w.sum(1, keepdims=True)
            for p in range(l.degree + 1):
                both = powers(l.scale * q[:, h],
                              p) @ sums[kv][p] if first else np.zeros((n, l.head_dim_v + 1))
                total, z = total + a[p] * both[:, :-1], z + a[p] * both[:, -1:]
            y[:, h] = reference.divided(l, total, z)
        for kv in range(l.kv_heads):
            wide = np.concatenate([v[:, kv], np.ones((n, 1))], 1)
            sums[kv] = [s + powers(k[:, kv], p).T @ wide for p, s in enumerate(sums[kv])]
        self.past[i] = sums
        return y

    def feed(self, tokens, first):
        m = self.m
        x = m.embedding.values[tokens]
        for i, l in enumerate(m.layer):
            parts = l.in_weight(reference.apply_norm(x, l, "norm1")) + l.in_bias
            parts = np.split(parts, np.cumsum(l.parts)[:-1], axis=1)
            if l.mixer == 1:
                u, g = parts
                old = self.past[i] if first else np.zeros((l.conv_width - 1, u.shape[1]))
                whole = np.concatenate([old, u])
                c = sum(l.conv_weight[j] * whole[j:j + len(u)]
                        for j in range(l.conv_width)) + l.conv_bias
                self.past[i] = whole[len(u):]
                y = reference.silu(c) * g
            else:
                y = self.attention(i, l, *parts, first).reshape(len(x), -1)
            x = x + l.out_weight(y) + l.out_bias
            x = x + reference.mlp(l, x)
        return (m.head(reference.apply_norm(x, m, "final_norm")) + m.head_bias)[:, :m.vocab]


def powers(x, p):
    """All p-fold products of the coordinates of each row, [n, width^p]."""
    y = np.ones((len(x), 1))
    for _ in range(p):
        y = (y[:, :, None] * x[:, None, :]).reshape(len(x), -1)
    return y


def small_model(path):
    flags = {"flags": 0, "norm1": 1, "norm1_eps": 1e-5, "norm2": 1, "norm2_eps": 1e-5, "mlp": 1,
             "hidden_dim": 64, "window": 64,
             "chunk": 16, "degree": 2, "kernel": 0, "normalizer": 0, "normalizer_eps": 1e-6,
             "heads": 2, "kv_heads": 2,
             "head_dim_k": 16, "head_dim_v": 16, "rope_pairs": 0, "scale": 0.25, "conv_width": 3}
    rng = np.random.default_rng(11)
    config, layers = reference.random_config(rng, mixers=[1, 2, 3, 1, 2], layer=flags, dim=32,
                                             input=0, rows=64, vocab=64, flags=1,
                                             final_norm=1, final_norm_eps=1e-5)
    for l in layers:
        if l.mixer == export.CONV:
            l.heads, l.kv_heads, l.head_dim_k = 1, 0, 0
            l.degree, l.scale, l.normalizer_eps = 0, 0, 0
            l.head_dim_v = 32
        if l.mixer == export.WINDOW:
            l.degree = l.normalizer_eps = 0
            l.rope_pairs = 8
    weights = {t.name: reference.random_tensor(rng, t.name, t.shape)
               for t in export.tensors(config, layers)}
    export.write(str(path), config, layers, b"", weights.__getitem__)
    return path


def measure_model(directory, tokens, block=250):
    """[(tokens, error relative to the largest logit)] of a whole model."""
    path = small_model(directory / "small.bin")
    m, rng = reference.read(path), np.random.default_rng(12)
    text = rng.integers(0, m.vocab, tokens)
    short, carried = text[:600], Recurrence(m)
    parts = [carried.feed(short[at:at + block], at) for at in range(0, len(short), block)]
    error = np.abs(np.concatenate(parts) - reference.run(m, short)).max()
    assert error < 1e-10, "the recurrence is not the reference"
    session, carried, curve, worst = based.Session(based.Model(path), 64), Recurrence(m), [], 0.0
    for at in range(0, tokens, block):
        expected, got = carried.feed(text[at:at + block], at), session.feed(text[at:at + block])
        worst = np.abs(got - expected).max() / np.abs(expected).max()
        if len(text[:at + block]) in {int(f * 10 ** p) for p in range(3, 9)
                                      for f in (1, 2, 5)} | {tokens}:
            curve.append((min(at + block, tokens), worst))
    print(f"{'a whole model':36} at {', '.join(f'{n:.0f}' for n, _ in curve)} tokens: "
          f"{' '.join(f'{e:.1e}' for _, e in curve)}")
    return curve


def plot(curves, path):
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(figsize=(7, 4.2))
    for name, curve in curves.items():
        style = {"linewidth": 2.5} if "model" in name else {}
        if PLAIN in name:
            style = {"linestyle": ":" if name.endswith(" 1") else "--", "color": "0.5"}
        axes.loglog(*zip(*curve), marker="o", markersize=3, label=name, **style)
    axes.axhline(BOUND, color="red", linewidth=0.8)
    axes.set(xlabel="tokens", ylabel="relative error against float64",
             title="The error does not grow with the text")
    axes.set_ylim(5e-8, 1e-2)
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=10_000_000)
    parser.add_argument("--model-tokens", type=int, default=100_000)
    parser.add_argument("--plot", type=Path)
    o = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with tempfile.TemporaryDirectory(prefix="endless-") as directory:
        curves = measure_layer(Path(directory), o.tokens)
        curves["a whole model, logits"] = measure_model(Path(directory), o.model_tokens)
    if o.plot:
        try:
            plot(curves, o.plot)
        except ImportError:
            print("no plot: matplotlib is not installed")
    worst = max(error for name, curve in curves.items() if PLAIN not in name
                for _, error in curve)
    print(f"largest error {worst:.1e}, bound {BOUND:.0e}")
    return int(worst > BOUND)


if __name__ == "__main__":
    sys.exit(main())
