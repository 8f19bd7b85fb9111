"""HazyResearch/based (Arora et al., arXiv 2402.18668): https://github.com/HazyResearch/based,
models based-360m and based-1b on https://huggingface.co/hazyresearch; and what models/train.py
saves.

A directory with config.json and model.safetensors or pytorch_model.bin. The kind of each layer
shows in the names of its tensors, sizes in their shapes; the rest is in config.json (FIELDS).

    theirs                                          ours
    transformer.embeddings.word_embeddings.weight   embedding; lm_head.weight is the same tensor, or
                                                    head.weight if tie_word_embeddings is false
    transformer.layers.I.norm1, norm2               layers.I.norm1, norm2
      mixer.in_proj, mixer.out_proj                 conv: in (rows convolved, gate), out
      mixer.conv.conv (channels, 1, width)          conv.weight (width, channels), conv.bias
      mixer.proj_q, proj_k, proj_v, out_proj        taylor: in (q, k, v), out. Degree 2
      mixer.Wqkv, mixer.out_proj                    window: in (q, k, v), out. Rotary pairs that are
                                                    neighbors become halves of a head
      mlp.fc1 (value, gate), mlp.fc2                up (gate, value), down
    transformer.ln_f                                final_norm
"""
import math
import re

import numpy as np

from . import (ADD, CONV, CONV_BIAS, DOT, DOWN_BIAS, IN_BIAS, NORM_LAYER, NORM_RMS, OUT_BIAS,
               SWIGLU, TAYLOR, TIED, UP_BIAS, WINDOW, Model, Refused, Settings, Source, by_head,
               half_split, rope_freq)

# Fields that must have this value, the only one that is implemented.
FIXED = {"activation_function": "swiglu", "prenorm": True, "parallel_block": False,
         "n_head_kv": None, "rotary_emb_scale_base": None, "scale_attn_by_inverse_layer_idx": False}
FIELDS = {
    **FIXED, "vocab_size": None, "n_embd": None, "n_head": None, "n_layer": None,
    "layer_norm_epsilon": 1e-5, "rms_norm": True, "tie_word_embeddings": True,
    "scale_attn_weights": True, "rotary_emb_fraction": 0, "rotary_emb_base": 10000.0,
    "rotary_emb_interleaved": False, "mixer.l_max": 0,
    "alt_mixer_layers": None, "alt_mixer.num_heads": None,
    "alt_mixer.feature_map._target_": "TaylorExp", "alt_mixer.feature_map.input_dim": None,
    "alt_mixer.sinks": 0, "alt_mixer.keep": 0,          # of models/train.py, which wrote keep and
    "alt_mixer.decay": 0, "alt_mixer.forget": 0,        # forget before
    "alt_mixer_2_layers": None, "alt_mixer_2": None, "alt_mixer_2.causal": True,
    "alt_mixer_2.window_size": None,
    # Of these, tensors tell the sizes; only --random reads them:
    "n_inner": None, "pad_vocab_size_multiple": 8, "alt_mixer.feature_dim": 16,
    "mixer.expand_proj": 4,
}
REFUSED_NAMES = {
    r"mixer\.conv1\.":
        "it uses the older classes of the withdrawn based-1.3b, which nobody could verify",
    r"mixer\.decay_proj\.":
        "its linear attention decays (based-360M-30B of the JRT paper), which is another model",
    r"mixer\.proj_[kv]_enc\.":
        "it reads its prompt in both directions (JRT, prefix linear attention)",
    r"g_norm\.": "it divides by a norm per head in place of the sum (the ThunderKittens demo)",
    r"mixer\.(A_log|x_proj|dt_proj)|^backbone\.": "it is a Mamba, not a Based model",
}
EMBEDDING, HEAD = "transformer.embeddings.word_embeddings.weight", "lm_head.weight"
# (layers, dim) -> window_size, for a config.json without one.
KNOWN_WINDOWS = {(27, 1024): 128, (36, 1792): 256}
# What the config.json of each release says, where it is not a default: for --random.
RELEASED = {"n_head": 16, "vocab_size": 50257, "rotary_emb_fraction": 1, "mixer": {"l_max": 2048},
            "alt_mixer": {"feature_map": {"input_dim": 16}}}
SHAPES = {
    "based-360m": dict(RELEASED, n_layer=27, n_embd=1024, n_inner=2048,
                       alt_mixer_layers=[1, 6, 11, 16, 21], alt_mixer_2_layers=[2, 7, 12, 17, 22],
                       alt_mixer_2={"window_size": 128}),
    "based-1b": dict(RELEASED, n_layer=36, n_embd=1792, n_inner=3584,
                     alt_mixer_layers=[1, 6, 11, 16, 21, 27, 33],
                     alt_mixer_2_layers=[2, 7, 12, 17, 22, 28, 34],
                     alt_mixer_2={"window_size": 256}),
}


def clean_names(names):
    """{name as in the table above: name in the file}, without what training left behind."""
    return {key: name for name in names for key in [name.removeprefix("model.")]
            if not ("metrics" in key or key.endswith("inv_freq")
                    or key == "transformer.decay.decay")}


def read(source, options, note):
    """See __init__.py. options: window (visible keys, or None for those of config.json), chunk."""
    source = source.renamed(clean_names(source.shapes))
    settings, where = Settings(source.settings, FIELDS), source.where
    refuse_other_models(source, settings)

    # Sizes: the tensors tell them, config.json must agree.
    rows, dim = source.shape(EMBEDDING if EMBEDDING in source else HEAD, None, None)
    numbers = re.findall(r"transformer\.layers\.(\d+)\.", " ".join(source.shapes))
    count = 1 + max(map(int, numbers), default=-1)
    for name, found in (("n_layer", count), ("n_embd", dim)):
        if settings.number(name, found) != found:
            raise Refused(f"{settings.said(name)}, but the tensors of {where} say {found}")
    vocab = settings.number("vocab_size", rows)
    if vocab > rows:
        raise Refused(f"{where} embeds {rows} tokens, config.json says vocab_size = {vocab}")
    eps = settings.number("layer_norm_epsilon", kind=float)
    kind, norm = ((NORM_RMS, [".weight"]) if settings.get("rms_norm") else
                  (NORM_LAYER, [".weight", ".bias"]))
    m = Model(source, dim=dim, vocab=vocab, rows=rows, final_norm=kind, final_norm_eps=eps,
              context=settings.number("mixer.l_max", least=0))
    m.settings, m.heads, m.window = settings, settings.number("n_head"), options.window
    read_embedding(m)
    m.norm("final_norm", "transformer.ln_f", norm)

    for i in range(count):
        l = m.layer(f"transformer.layers.{i}.", kind, eps, mlp=SWIGLU)
        m.norm("norm1", "norm1", norm)
        if "mixer.Wqkv.weight" in m:
            m.window = m.window or visible_keys(m, note, count)
            read_window(m, l)
        elif "mixer.proj_q.weight" in m:
            l.chunk = options.chunk
            read_taylor(m, l)
        elif "mixer.in_proj.weight" in m:
            read_conv(m, l)
        else:
            raise Refused(f"{where}: layer {i} has none of mixer.Wqkv, mixer.proj_q, mixer.in_proj"
                          ": unknown mixer")
        m.linear(OUT_BIAS, "out", [("mixer.out_proj", dim)], l.heads * l.head_dim_v)
        m.norm("norm2", "norm2", norm)
        l.hidden_dim = m.shape("mlp.fc1.weight", None, None)[0] // 2
        m.linear(UP_BIAS, "up", [("mlp.fc1", 2 * l.hidden_dim)], dim,
                 lambda rows: np.roll(rows, len(rows) // 2, axis=0))          # the gate goes first
        m.linear(DOWN_BIAS, "down", [("mlp.fc2", dim)], l.hidden_dim)

    for name, mixer in (("alt_mixer_layers", TAYLOR), ("alt_mixer_2_layers", WINDOW)):
        found, said = [i for i, l in enumerate(m.layers) if l.mixer == mixer], settings.get(name)
        if said is not None and found != said:
            note(f"{settings.said(name)}, but the tensors say {found}; going by the tensors")
    return m.done()


def refuse_other_models(source, settings):
    """Refuses models of the same family that compute something else."""
    for pattern, reason in REFUSED_NAMES.items():
        found = next((name for name in source.shapes if re.search(pattern, name)), None)
        if found:
            raise Refused(f"{source.where} is not supported: {reason} (found {found})")
    for name, value in FIXED.items():
        if (settings.get(name) or None) != (value or None):
            raise Refused(f"{settings.said(name)} is not supported")


def read_embedding(m):
    """Embedding and head are one tensor under two names: either may be missing, two must agree."""
    embedding, *head = (m.load(name, m.config.rows, m.config.dim)
                        for name in (EMBEDDING, HEAD) if name in m)
    m.put("embedding", embedding)
    if not head or np.array_equal(embedding(), head[0]()):
        m.config.flags |= TIED
    elif m.settings.get("tie_word_embeddings"):
        raise Refused(f"{m.source.where}: {EMBEDDING} and {HEAD} should be one tensor, but differ")
    else:
        m.put("head.weight", head[0])


def read_conv(m, l):
    """A gated short convolution."""
    l.mixer, l.heads, weight = CONV, 1, "mixer.conv.conv.weight"
    l.head_dim_v, _, l.conv_width = m.shape(weight, None, 1, None)
    load = m.load(weight, l.head_dim_v, 1, l.conv_width)
    m.put("conv.weight", lambda: load()[:, 0].T)
    m.linear(IN_BIAS, "in", [("mixer.in_proj", 2 * l.head_dim_v)], m.config.dim)
    if "mixer.conv.conv.bias" in m:
        m.put("conv.bias", m.load("mixer.conv.conv.bias", l.head_dim_v))
        l.flags |= CONV_BIAS


def read_taylor(m, l):
    """Linear attention with the Taylor feature map of degree 2."""
    number, dim = m.settings.number, m.config.dim
    target = m.settings.get("alt_mixer.feature_map._target_")
    if "Taylor" not in str(target):
        raise Refused(f"config.json: feature map {target} is not supported, only TaylorExp")
    heads = number("alt_mixer.num_heads", m.heads)
    wide, _ = m.shape("mixer.proj_q.weight", None, None)
    if wide % heads or dim % heads:
        raise Refused(f"{m.source.where}: {m.theirs}mixer.proj_q.weight has {wide} rows for "
                      f"{heads} heads in a width of {dim}")
    l.mixer, l.heads, l.kv_heads, l.degree, l.kernel = TAYLOR, heads, heads, 2, DOT
    l.head_dim_k, l.head_dim_v = wide // heads, dim // heads
    l.normalizer, l.normalizer_eps = ADD, 1e-12
    l.scale = 1 / math.sqrt(number("alt_mixer.feature_map.input_dim", l.head_dim_k))
    l.sinks = number("alt_mixer.sinks", number("alt_mixer.keep", least=0), least=0)
    l.decay = number("alt_mixer.decay", number("alt_mixer.forget", 0, float, 0), float, 0)
    m.linear(IN_BIAS, "in", [("mixer.proj_q", wide), ("mixer.proj_k", wide),
                                ("mixer.proj_v", dim)], dim)
    m.taylor(l)


def read_window(m, l):
    """Softmax attention over a sliding window, with rotary embedding."""
    settings, dim = m.settings, m.config.dim
    if dim % m.heads:
        raise Refused(f"config.json: n_head = {m.heads} does not divide the width {dim}")
    l.mixer, l.heads, l.kv_heads, l.window = WINDOW, m.heads, m.heads, m.window
    l.head_dim_k = l.head_dim_v = width = dim // m.heads
    l.scale = 1 / math.sqrt(width) if settings.get("scale_attn_weights") else 1.0
    part = settings.number("rotary_emb_fraction", 0, float, 0)
    l.rope_pairs = int(part * width) // 2
    if l.rope_pairs > width // 2:
        raise Refused(f"config.json: rotary_emb_fraction = {part} is above 1")
    order = half_split(width, l.rope_pairs, settings.get("rotary_emb_interleaved"))
    m.linear(IN_BIAS, "in", [("mixer.Wqkv", 3 * dim)], dim, lambda rows: by_head(l, rows, order))
    if l.rope_pairs:
        table = rope_freq(l.rope_pairs, 2 * l.rope_pairs,
                          settings.number("rotary_emb_base", kind=float))
        m.put("rope_freq", lambda: table)


def visible_keys(m, note, count):
    """Keys that a token sees: the original lets it see window_size // 2 others and itself."""
    if not m.settings.get("alt_mixer_2"):
        raise Refused(f"{m.source.where} is not supported: it has attention layers, yet "
                      "config.json describes no sliding window")
    if m.settings.get("alt_mixer_2.causal") is False:
        raise Refused("config.json: alt_mixer_2.causal = false is not supported: a stream has no "
                      "future")
    known = KNOWN_WINDOWS.get((count, m.config.dim))
    if m.settings.get("alt_mixer_2.window_size") is None:
        if not known:
            raise Refused("config.json lacks alt_mixer_2.window_size: give the number of visible "
                          "keys by --window")
        note(f"config.json lacks alt_mixer_2.window_size; taking {known}, that of the release of "
             "this shape")
    return m.settings.number("alt_mixer_2.window_size", known) // 2 + 1


def random(settings, where, seed):
    """A Source of random weights in the shape that settings (a config.json) describe. They are
    scaled so that activations keep their size through any number of layers. The same seed gives
    the same weights."""
    c = Settings(settings, FIELDS)
    dim, count, heads = map(c.number, ("n_embd", "n_layer", "n_head"))
    hidden = 4 * dim if c.get("n_inner") is None else c.number("n_inner")
    hidden = -(-hidden // 256) * 256
    step = c.number("pad_vocab_size_multiple")
    features = c.number("alt_mixer.feature_dim") * c.number("alt_mixer.num_heads", heads)
    channels = dim * c.number("mixer.expand_proj") // 2
    shapes = {EMBEDDING: (-(-c.number("vocab_size") // step) * step, dim),
              "transformer.ln_f.weight": (dim,)}
    for i in range(count):
        layer = {"norm1": (dim,), "norm2": (dim,), "mlp.fc1": (2 * hidden, dim),
                 "mlp.fc2": (dim, hidden)}
        if i in (c.get("alt_mixer_2_layers") or []):
            mixer = {"Wqkv": (3 * dim, dim), "out_proj": (dim, dim)}
        elif i in (c.get("alt_mixer_layers") or []):
            mixer = {"proj_q": (features, dim), "proj_k": (features, dim), "proj_v": (dim, dim),
                     "out_proj": (dim, dim)}
        else:
            mixer = {"in_proj": (2 * channels, dim), "in_proj.bias": (2 * channels,),
                     "conv.conv": (channels, 1, 3), "out_proj": (dim, channels),
                     "out_proj.bias": (dim,)}
        layer.update({f"mixer.{name}": shape for name, shape in mixer.items()})
        shapes.update({f"transformer.layers.{i}.{name}" + (".weight" if "bias" not in name else ""):
                       shape for name, shape in layer.items()})
    number = {name: i for i, name in enumerate(shapes)}

    def load(name):
        shape = shapes[name]
        if len(shape) == 1:
            return np.full(shape, 0.0 if name.endswith("bias") else 1.0, np.float32)
        scale = 1 / math.sqrt(shape[-1])
        if name.endswith(("out_proj.weight", "fc2.weight")):
            scale /= math.sqrt(2 * count)
        weight = np.random.default_rng([seed, number[name]]).standard_normal(shape, np.float32)
        weight *= np.float32(scale)
        return weight
    return Source(shapes, load, where, settings)
