"""Edifice: https://github.com/blasphemetheus/edifice (Elixir, Axon), models Edifice.Attention.Based
from their safetensors file: vectors in and vectors out, every layer sees the whole window.

    theirs: kernels are (in, out)                   ours, in layers.I for based_block_(I+1)_
    input_projection                                input, if it is there
    based_block_N_attn_norm, ffn_norm               norm1, norm2 (gamma, beta)
    based_block_N_attn_q_proj, k_proj, v_proj       taylor: in (q, k, v), kernel DIAGONAL
    based_block_N_attn_out_proj                     out
    based_block_N_ffn_up, ffn_down                  up, down (GELU)
    final_norm                                      final_norm
"""
import re

import numpy as np

from . import (ADD, BIDIRECTIONAL, CHUNK, DIAGONAL, DOWN_BIAS, GELU, IN_BIAS, INPUT_PROJECTION,
               NORM_LAYER, OUT_BIAS, TAYLOR, UP_BIAS, Model, Refused)

MARKS = ("based_block_1_attn_q_proj.kernel",)
# Options of the Elixir module that do not show in the tensors, num_heads, taylor_order and
# window_size (a note only); and whether to run it as it was trained (mode window).
FIELDS = {"heads": None, "degree": None, "window": 60, "mode": None}


def read(source, options, note):
    """See __init__.py."""
    where = source.where
    for name in ("token_embedding.kernel", "lm_head.kernel"):
        if name in source:
            raise Refused(f"{where} holds {name}: Edifice.Serving.Generate lets padding take part "
                          "in every result, which is not reproduced; export the model without "
                          "embedding and head, which reads vectors")
    for name in ("heads", "degree"):
        if getattr(options, name) is None:
            raise Refused(f"{where} is an Edifice model, whose tensors do not tell num_heads and "
                          f"taylor_order: give --{name} ({dict(heads=4, degree=2)[name]} unless it "
                          "was made with another)")
    (dim,), heads = source.shape("final_norm.gamma", None), options.heads
    if options.shift:
        raise Refused("--shift: Edifice knows no token shift")
    if dim % heads:
        raise Refused(f"{where} is {dim} wide, which {heads} heads do not divide")
    count = len(re.findall(r"based_block_\d+_attn_q_proj\.kernel", " ".join(source.shapes)))
    if not options.mode:
        raise Refused(f"{where} has {count} layers that look at the whole window, the future "
                      "included: --mode window runs it so, --mode causal as what it was not "
                      "trained to be, in constant memory (its results differ, but for the last of "
                      "one layer)")
    m = Model(source, dim=dim, input=dim, context=options.window or FIELDS["window"],
              final_norm=NORM_LAYER, final_norm_eps=1e-5,
              flags=BIDIRECTIONAL if options.mode == "window" else 0)

    def dense(ours, parts, cols, rows):
        """Dense layers, kernel (cols, rows) and bias (rows), one below the other."""
        kernels = [m.load(part + ".kernel", cols, rows) for part in parts]
        biases = [m.load(part + ".bias", rows) for part in parts]
        m.put(ours + ".weight", lambda: np.concatenate([load().T for load in kernels]))
        m.put(ours + ".bias", lambda: np.concatenate([load() for load in biases]))

    norm = [".gamma", ".beta"]
    m.norm("final_norm", "final_norm", norm)
    if "input_projection.kernel" in m:
        m.config.input = m.shape("input_projection.kernel", None, None)[0]
        m.config.flags |= INPUT_PROJECTION
        dense("input", ["input_projection"], m.config.input, dim)
    for i in range(count):
        l = m.layer(f"based_block_{i + 1}_", NORM_LAYER, 1e-5, mixer=TAYLOR, mlp=GELU,
                    flags=IN_BIAS | OUT_BIAS | UP_BIAS | DOWN_BIAS, heads=heads, kv_heads=heads,
                    head_dim_k=dim // heads, head_dim_v=dim // heads, chunk=options.chunk or CHUNK,
                    degree=options.degree, kernel=DIAGONAL, normalizer=ADD,
                    normalizer_eps=1e-6, scale=1.0)
        l.hidden_dim = m.shape("ffn_up.kernel", None, None)[1]
        m.norm("norm1", "attn_norm", norm)
        dense("in", ["attn_q_proj", "attn_k_proj", "attn_v_proj"], dim, dim)
        m.taylor(l)
        dense("out", ["attn_out_proj"], dim, dim)
        m.norm("norm2", "ffn_norm", norm)
        dense("up", ["ffn_up"], dim, l.hidden_dim)
        dense("down", ["ffn_down"], l.hidden_dim, dim)
    return m.done()
