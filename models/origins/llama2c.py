"""llama2.c: https://github.com/karpathy/llama2.c, checkpoints of its run.c (version 0, such as
stories15M.bin): seven int32 (FIELDS), then float32 tensors without names, little-endian.

    theirs                                          ours
    token_embedding (vocab, dim)                    embedding; also the head if vocab_size > 0
    rms_att, rms_ffn, rms_final                     norm1, norm2, final_norm, eps 1e-5
    wq, wk, wv (rows, dim) of each layer            window: in. Rotary pairs that are neighbors
                                                    become halves of a head
    wo; w1 (gate), w3 (value), w2                   out; up, down
    freq_cis                                        nothing: rope_freq follows from the width
    wcls, if vocab_size < 0                         head

Its attention becomes a window as long as its context, so results agree exactly up to there, and the
model goes on beyond.
"""
import math
import os
import struct

import numpy as np

from . import (NORM_RMS, SWIGLU, TIED, WINDOW, Model, Refused, by_head, half_split, rope_freq)

# The numbers of the header in their order, and the largest that is believed; none is optional.
FIELDS = {"dim": 65536, "hidden_dim": 1 << 20, "n_layers": 1024, "n_heads": 4096,
          "n_kv_heads": 4096, "vocab_size": 1 << 22, "seq_len": 1 << 20}


def read(path, options, note):
    """See __init__.py; path: the file. options: window (visible keys, or None for seq_len)."""
    size = os.path.getsize(path)
    with open(path, "rb") as f:
        start = f.read(28)
    if start[:4] == b"24ka":
        raise Refused(f"{path} is a llama2.c file of version "
                      f"{int.from_bytes(start[4:8], 'little')}; export it with "
                      "--version 0, the float32 form that run.c reads")
    header = struct.unpack("<7i", start.ljust(28, b"\0"))
    dim, hidden, n, heads, kv, vocab, seq = header
    rows, tied = abs(vocab), vocab > 0
    if not (all(0 < value <= most for value, most in
                zip((dim, hidden, n, heads, kv, rows, seq), FIELDS.values()))
            and dim % heads == 0 and heads % kv == 0):
        raise Refused(f"{path} is nothing this program can read: expected a HazyResearch/based "
                      "directory (config.json and weights) or a llama2.c checkpoint")

    # Every tensor is a part of the file in this order, seen through one map of it.
    width = dim // heads
    shapes = {"embedding": (rows, dim), "rms_att": (n, dim), "wq": (n, dim, dim),
              "wk": (n, kv * width, dim), "wv": (n, kv * width, dim), "wo": (n, dim, dim),
              "rms_ffn": (n, dim), "w1": (n, hidden, dim), "w2": (n, dim, hidden),
              "w3": (n, hidden, dim), "rms_final": (dim,), "freq_cis": (seq, width),
              "wcls": (0 if tied else rows, dim)}
    expected = 28 + 4 * sum(map(math.prod, shapes.values()))
    if size != expected:
        raise Refused(f"{path} has {size:,} bytes; as a llama2.c checkpoint of this header it "
                      f"should have {expected:,}")
    if width % 2:
        raise Refused(f"{path} has heads of odd width {width}; rotary embedding needs pairs")
    numbers, at, w = np.memmap(path, "<f4", "r", 28), 0, {}
    for name, shape in shapes.items():
        w[name] = numbers[at:at + math.prod(shape)].reshape(shape)
        at += math.prod(shape)

    m = Model(None, dim=dim, vocab=rows, rows=rows, flags=TIED if tied else 0, context=seq,
              final_norm=NORM_RMS, final_norm_eps=1e-5)
    order, table = half_split(width, width // 2, True), rope_freq(width // 2, width)
    m.put("embedding", lambda: w["embedding"])
    m.put("final_norm.weight", lambda: w["rms_final"])
    if not tied:
        m.put("head.weight", lambda: w["wcls"])
    for i in range(n):
        l = m.layer("", NORM_RMS, 1e-5, mixer=WINDOW, heads=heads, kv_heads=kv, head_dim_k=width,
                    head_dim_v=width, window=options.window or seq, scale=1 / math.sqrt(width),
                    rope_pairs=width // 2, mlp=SWIGLU, hidden_dim=hidden)

        def rows(*names, i=i):
            """The rows of these tensors in layer i, one below the other, when asked for."""
            return lambda: np.concatenate([w[name][i] for name in names])
        m.put("norm1.weight", rows("rms_att"))
        m.put("in.weight", lambda l=l, qkv=rows("wq", "wk", "wv"): by_head(l, qkv(), order))
        m.put("rope_freq", lambda: table)
        m.put("out.weight", rows("wo"))
        m.put("norm2.weight", rows("rms_ffn"))
        m.put("up.weight", rows("w1", "w3"))
        m.put("down.weight", rows("w2"))
    return m.config, m.layers, m.plan
