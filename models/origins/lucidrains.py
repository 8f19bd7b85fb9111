"""taylor-series-linear-attention: https://github.com/lucidrains/taylor-series-linear-attention, the
state dict of one layer TaylorSeriesLinearAttn: a model of vectors in and vectors out.

    theirs                                          ours
    to_q.0.weight, to_kv.0.weight                   taylor: in (q, k, v); one or `heads` heads in
                                                    to_kv (one_headed_kv). Degree 2
    rotary_emb.freqs, if rotary_emb                 rope_freq; pairs that are neighbors become
                                                    halves of a head
    norm.gamma, if prenorm                          norm1
    to_v_gates.0.weight, if gate_value_heads        gate
    to_out.0.weight, if combine_heads               out

Its de-duplicated and full features are the same function.
"""
from . import (BIDIRECTIONAL, CHUNK, CLAMP, DOT, NO_OUT, NO_RESIDUAL, NORM_L2, NORM_NONE, SHIFT,
               TAYLOR, VALUE_GATES, Model, Refused, by_head, fractions_of_a_turn, half_split)

MARKS = ("to_q.0.weight", "to_kv.0.weight")
# Arguments of the constructor that do not show in the tensors, as options: heads, causal=True (mode
# causal), shift_tokens=True. Degree 2 is the only one it knows.
FIELDS = {"heads": None, "mode": None, "shift": None, "degree": 2}


def read(source, options, note):
    """See __init__.py."""
    where, heads = source.where, options.heads
    if not heads:
        raise Refused(f"{where} is a layer of taylor-series-linear-attention, whose tensors do not "
                      "tell the number of heads: give --heads (8 unless it was made with another)")
    if not options.mode:
        raise Refused(f"{where} does not tell whether it was made with causal=True: give --mode "
                      "causal or --mode window")
    if options.degree not in (None, FIELDS["degree"]):
        raise Refused(f"--degree {options.degree}: taylor-series-linear-attention knows only "
                      "degree 2")
    if options.shift is None:
        note("taking it that the layer was made without shift_tokens, which its tensors do not "
             "tell: --shift or --no-shift says so")
    wide, dim = source.shape(MARKS[0], None, None)
    both, width = source.shape(MARKS[1], None, None)[0], wide // heads
    kv_heads = both // (2 * width or 1)
    if wide % heads or both % (2 * width) or heads % kv_heads:
        raise Refused(f"{where}: to_q has {wide} rows and to_kv {both}, which does not fit {heads} "
                      "heads")
    m = Model(source, dim=dim, input=dim, flags=BIDIRECTIONAL if options.mode == "window" else 0)
    l = m.layer("", NORM_NONE, 0, mixer=TAYLOR, flags=NO_RESIDUAL, heads=heads,
                kv_heads=kv_heads, head_dim_k=width, head_dim_v=width, degree=2,
                chunk=options.chunk or CHUNK, kernel=DOT, normalizer=CLAMP, normalizer_eps=1e-5,
                scale=width ** -0.5)
    if options.shift:
        l.flags |= SHIFT
    if "norm.gamma" in m:
        l.norm1, l.norm1_eps = NORM_L2, 1e-12
        m.norm("norm1", "norm", [".gamma"])
    if "rotary_emb.freqs" in m:
        l.rope_pairs = width // 2
        load = m.load("rotary_emb.freqs", l.rope_pairs)
        m.put("rope_freq", lambda: fractions_of_a_turn(load()))
    order = half_split(width, l.rope_pairs, True)
    m.linear(0, "in", [("to_q.0", wide), ("to_kv.0", both)], dim,
             lambda rows: by_head(l, rows, order))
    m.taylor(l)
    if "to_v_gates.0.weight" in m:
        l.flags |= VALUE_GATES
        m.linear(0, "gate", [("to_v_gates.0", heads)], dim)
    if "to_out.0.weight" in m:
        m.linear(0, "out", [("to_out.0", dim)], wide)
    elif wide != dim:
        raise Refused(f"{where} does not combine its heads, and their width {wide} is not its "
                      f"input's {dim}: that is no layer that can stand alone; use based.h part 9")
    else:
        l.flags |= NO_OUT
    return m.done()
