"""HazyResearch/based (Arora et al., arXiv 2402.18668): https://github.com/HazyResearch/based,
models based-360m and based-1b on https://huggingface.co/hazyresearch; the variants of
https://github.com/HazyResearch/prefix-linear-attention (Arora et al., arXiv 2407.05483), which are
JRT-360M-30B, JRT-1B-50B and based-360M-30B, with a decay; models of corl-team/rebased; and what
models/train.py saves.

A directory with config.json and model.safetensors or pytorch_model.bin (or the parts that an
index of either lists). The model is what config.json says (FIELDS, MIXERS), with the original's
own defaults where it is silent; the tensors must agree.

    theirs                                          ours
    transformer.embeddings.word_embeddings.weight   embedding; lm_head.weight is the same tensor, or
                                                    head.weight if tie_word_embeddings is false
    lm_head.bias                                    head.bias
    transformer.layers.I.norm1, norm2               layers.I.norm1, norm2
      BaseConv         mixer.in_proj, out_proj      conv: in (rows convolved, gate), out
                       mixer.conv.conv              conv.weight (width, channels), conv.bias
      LinearAttention  mixer.proj_q, proj_k,        taylor: in (q, k, v), out. Degree 2
                       proj_v, out_proj
                       mixer.decay_proj              gate.weight, of VALUE_FACTORS
    transformer.decay.decay                          fade.factor, its exponential
      PrefixLinearAttention: also
                       mixer.proj_k_enc, proj_v_enc  the last rows of in
      SlidingAttention mixer.Wqkv, out_proj         window: in (q, k, v), out. Rotary pairs that are
      or full                                       neighbors become halves of a head
      mlp.fc1 (value, gate), mlp.fc2                up (gate, value), down; fc3 is the value if
                                                    mlp_type is not "base"
    transformer.ln_f                                final_norm
"""
import math
import re
from decimal import Decimal

import numpy as np

from . import (ADD, CHUNK, CONV, CONV_BIAS, DOT, DOWN_BIAS, FIXED, GELU, HEAD_BIAS, IN_BIAS,
               NORM_LAYER, NORM_RMS, OUT_BIAS, PREFIX, SWIGLU, TAYLOR, TIED, UP_BIAS,
               VALUE_FACTORS, WINDOW, Model, Refused, Settings, Source, by_head, equal,
               half_split, random_rows, rope_freq)

# Fields that must have this value, the only one that is implemented.
REQUIRED = {"prenorm": True, "parallel_block": False, "rotary_emb_scale_base": None,
         "word_embed_proj_dim": None, "attn_dwconv": False, "fused_mlp": False,
         "fused_dense_sqrelu_dense": False}
# All other fields that the original reads, with its defaults (those of GPT2Config are among them).
FIELDS = {
    **REQUIRED, "vocab_size": 50257, "n_embd": 768, "n_head": 12, "n_layer": 12, "n_inner": None,
    "activation_function": "gelu_new", "mlp_type": "base", "ff_mult": 2,
    "mlp_fc1_bias": True, "mlp_fc2_bias": True, "layer_norm_epsilon": 1e-5, "rms_norm": False,
    "tie_word_embeddings": True, "lm_head_bias": False, "pad_vocab_size_multiple": 1,
    # attention, sliding or full; head_dim counts only for its scale and rotary part
    "n_head_kv": None, "head_dim": None, "qkv_proj_bias": True, "out_proj_bias": True,
    "scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False,
    "rotary_emb_fraction": 0, "rotary_emb_base": 10000.0, "rotary_emb_interleaved": False,
    # which group describes a layer: alt_mixer_2 if it is in alt_mixer_2_layers, else alt_mixer if
    # it is in alt_mixer_layers, else mixer. Without that group it is full attention.
    "alt_mixer_layers": None, "alt_mixer_2_layers": None,
    "mixer": None, "alt_mixer": None, "alt_mixer_2": None,
    # a constant decay in linear attention that has use_decay_proj
    "fixed_decay": False, "decay_const": -3,
    # the length of a model that has full attention alone
    "n_positions": 0,
}
# GPT2Config knows some fields by two names; these win.
ALIASES = {"hidden_size": "n_embd", "num_attention_heads": "n_head", "num_hidden_layers": "n_layer",
           "max_position_embeddings": "n_positions"}
# Class that a group names by _target_ -> its fields, with its defaults.
MIXERS = {
    "BaseConv": {"kernel_size": 3, "use_bias": True, "expand_proj": 2},
    "LinearAttention": {
        "num_heads": 16, "feature_dim": 16, "head_dim": None, "eps": 1e-12,
        "parallel_implementation": "quadratic", "feature_map": None, "use_decay_proj": False,
        "feature_name": None,                                 # of older classes, for feature_map
        "sinks": 0, "keep": 0, "decay": 0, "forget": 0},      # of models/train.py, which wrote keep
                                                              # and forget before
    "PrefixLinearAttention": {
        "num_heads": None, "feature_dim": 16, "eps": 1e-12, "scale_dim": None, "enc_length": None,
        "implementation": "default", "feature_name": None},
    "SlidingAttention": {"window_size": 128, "causal": True, "cross_attn": False,
                         "return_residual": False},
}
FEATURE_MAP = {"_target_": "TaylorExp", "input_dim": None}
# Classes by the names they had before.
RENAMED = {"BaseConvWithSiLU4": "BaseConv", "SlidingsMHA": "SlidingAttention"}
# Read by the original, or written beside what it reads, without an effect on the results. Other
# fields at the top of config.json are those of transformers, which the original does not read.
IRRELEVANT = {
    "only training": "attn_pdrop embd_pdrop resid_pdrop dropout initializer_range "
                     "special_initializer use_weight_init checkpointing mlp_checkpoint_lvl",
    "how it is computed, not what": "residual_in_fp32 sequence_parallel fused_bias_fc use_cuda "
                                    "fused_dropout_add_ln use_flash_attn device dtype",
    "not read by the released code": "decay_denom",
    "of masks, for padding": "use_mask dec_length num_key_value_heads",
    "only with parallel_block": "parallel_block_tied_norm",
    "of a group: not read, or replaced by the fields of attention above":
        "l_max kernel_sizes layer_idx num_heads num_heads_kv qkv_proj_bias out_proj_bias "
        "softmax_scale rotary_emb_dim rotary_emb_base rotary_emb_scale_base rotary_emb_interleaved",
}
REFUSED_NAMES = {
    r"g_norm\.": "it divides by a norm per head in place of the sum (the ThunderKittens demo)",
    r"mixer\.(A_log|x_proj|dt_proj)|^backbone\.": "it is a Mamba, not a Based model",
    r"position_embeddings\.": "it adds a position embedding (n_positions)",
}
EMBEDDING, HEAD = "transformer.embeddings.word_embeddings.weight", "lm_head.weight"
DECAY = "transformer.decay.decay"
MAX_PREFIX = 1024                           # of based.h: a prefix is computed as one block
# What the config.json of each release says, where it is not a default: for --random.
RELEASED = {"n_head": 16, "vocab_size": 50257, "pad_vocab_size_multiple": 8,
            "activation_function": "swiglu", "rms_norm": True, "rotary_emb_fraction": 1,
            "mixer": {"l_max": 2048, "expand_proj": 4},
            "alt_mixer": {"num_heads": 16, "feature_map": {"input_dim": 16}}, "alt_mixer_2": {}}
SHAPES = {
    "based-360m": dict(n_layer=27, n_embd=1024, n_inner=2048,
                       alt_mixer_layers=[1, 6, 11, 16, 21], alt_mixer_2_layers=[2, 7, 12, 17, 22],
                       alt_mixer_2={"window_size": 128}),
    "based-1b": dict(n_layer=36, n_embd=1792, n_inner=3584,
                     alt_mixer_layers=[1, 6, 11, 16, 21, 27, 33],
                     alt_mixer_2_layers=[2, 7, 12, 17, 22, 28, 34],
                     alt_mixer_2={"window_size": 256}),
}


def clean_name(name):
    """The name of a tensor as in the table above; None for what training left behind."""
    name = re.sub(r"^(model\.|module\.)+", "", name)
    left = "metrics" in name or name.endswith("inv_freq")
    return None if left else name.replace("mixer.conv1.", "mixer.conv.")


def read(source, options, note):
    """See __init__.py. options: window (visible keys, or None for those of config.json), chunk."""
    source, given = source.renamed(clean_name), source.settings
    settings = Settings({**given, **{name: given[alias] for alias, name in ALIASES.items()
                                     if alias in given}}, FIELDS)
    refuse_other_models(source, settings)

    rows, dim = source.shape(EMBEDDING if EMBEDDING in source else HEAD, None, None)
    numbers = re.findall(r"transformer\.layers\.(\d+)\.", " ".join(source.shapes))
    count = 1 + max(map(int, numbers), default=-1)
    for name, found in (("n_layer", count), ("n_embd", dim)):
        if settings.number(name) != found:
            raise Refused(f"{settings.said(name)}, but the tensors of {source.where} say {found}")
    vocab, step = settings.number("vocab_size"), settings.number("pad_vocab_size_multiple")
    if vocab > rows or rows != round_up(vocab, step) and (
            "pad_vocab_size_multiple" in settings.values):
        raise Refused(f"{source.where} embeds {rows} tokens, {settings.said('vocab_size')}, in "
                      f"steps of {settings.said('pad_vocab_size_multiple')[13:]}")
    eps = settings.number("layer_norm_epsilon", kind=float)
    kind, norm = ((NORM_RMS, [".weight"]) if settings.get("rms_norm") else
                  (NORM_LAYER, [".weight", ".bias"]))
    m = Model(source, dim=dim, vocab=vocab, rows=rows, final_norm=kind, final_norm_eps=eps)
    m.settings, m.options, m.note = settings, options, note
    m.config.context = next((l_max for name in ("mixer", "alt_mixer", "alt_mixer_2") if (
        l_max := settings.group(name, {"l_max": 0}).number("l_max", least=0))), 0) or (
            settings.number("n_positions", least=0))
    read_embedding(m)
    m.norm("final_norm", "transformer.ln_f", norm)
    for i in range(count):
        l = m.layer(f"transformer.layers.{i}.", kind, eps)
        m.norm("norm1", "norm1", norm)
        read_mixer(m, l, i)
        m.norm("norm2", "norm2", norm)
        read_mlp(m, l)
    source.claimed.add(DECAY)                             # the original has it without using it too
    return m.done()


def round_up(n, step):
    """n, or the next multiple of step."""
    return -(-n // step) * step


def refuse_other_models(source, settings):
    """Refuses models of the same family that compute something else."""
    for pattern, reason in REFUSED_NAMES.items():
        found = next((name for name in source.shapes if re.search(pattern, name)), None)
        if found:
            raise Refused(f"{source.where} is not supported: {reason} (found {found})")
    refuse_other_values(settings, REQUIRED)


def refuse_other_values(settings, fixed):
    """Refuses a field that has another value than in `fixed`."""
    for name, value in fixed.items():
        found = settings.get(name)
        if (found if value is None else bool(found)) != value:
            raise Refused(f"{settings.said(name)} is not supported")


def agree(m, what, found, expected, settings, *fields):
    """Refuses sizes that are not what the fields say."""
    if found != expected:
        raise Refused(f"{m.source.where}: {m.theirs}{what} has {found}, expected {expected} ("
                      + ", ".join(settings.said(name) for name in fields) + ")")


def bias(m, flag, settings, field, name):
    """flag, for Model.linear. What the field says of a bias must be true; where it is absent, the
    tensors tell."""
    there = f"{name}.bias" in m
    if field in settings.values and bool(settings.get(field)) != there:
        raise Refused(f"{settings.said(field)}, but {m.source.where} has {'a' if there else 'no'} "
                      f"tensor {m.theirs}{name}.bias")
    return flag


def read_embedding(m):
    """Embedding and head are one tensor under two names: either may be missing, two must agree."""
    rows, dim, tied = m.config.rows, m.config.dim, m.settings.get("tie_word_embeddings")
    embedding, *head = (m.load(name, rows, dim) for name in (EMBEDDING, HEAD)
                        if name in m or not tied)
    m.put("embedding", embedding)
    if not head or equal(embedding, head[0]):
        m.config.flags |= TIED
    elif tied:
        raise Refused(f"{m.source.where}: {EMBEDDING} and {HEAD} should be one tensor, but differ")
    else:
        m.put("head.weight", head[0])
    bias(m, 0, m.settings, "lm_head_bias", "lm_head")
    if "lm_head.bias" in m:
        m.put("head.bias", m.load("lm_head.bias", rows))
        m.config.flags |= HEAD_BIAS


def read_mixer(m, l, i):
    """The mixer of layer i, by the group that describes it."""
    name = "mixer"
    for alt in ("alt_mixer", "alt_mixer_2"):
        layers = m.settings.get(f"{alt}_layers")
        if not isinstance(layers, list) and layers is not None:
            raise Refused(f"{m.settings.said(f'{alt}_layers')}, expected a list")
        name = alt if i in (layers or []) else name
    group = m.settings.group(name, {"_target_": None})
    target = str(group.get("_target_") or "").rpartition(".")[2]
    target = RENAMED.get(target, target)
    if m.settings.get(name) is None:
        target = "full attention"
    elif not target:                                      # a config.json for tests, or by hand
        target = next((kind for kind, (mark, _) in KINDS.items() if mark in m), "")
    if target not in KINDS:
        raise Refused(f"{group.said('_target_')} is no mixer that is supported; " if group.get(
            "_target_") else f"{m.source.where}: layer {i} has none of "
            + ", ".join(sorted({mark for mark, _ in KINDS.values()})) + ": unknown mixer")
    mark, read_kind = KINDS[target]
    if mark not in m:
        raise Refused(f"config.json: {name} makes layer {i} {target}, but {m.source.where} lacks "
                      f"the tensor {m.theirs}{mark}")
    group.fields = MIXERS.get(target, {})
    known = {"_target_", *group.fields, *" ".join(IRRELEVANT.values()).split()}
    for field in sorted(group.values.keys() - known):
        text = f"config.json: {name}.{field} is no field of {target}"
        if target == "SlidingAttention":
            raise Refused(text)
        if text not in m.__dict__.setdefault("noted", []):
            m.noted.append(text)
            m.note(f"{text}; left out, as the original does")
    read_kind(m, l, i, group)


def read_conv(m, l, i, group):
    """A gated short convolution."""
    l.mixer, l.heads, weight, dim = CONV, 1, "mixer.conv.conv.weight", m.config.dim
    l.head_dim_v, _, l.conv_width = m.shape(weight, None, 1, None)
    agree(m, weight, l.conv_width, group.number("kernel_size"), group, "kernel_size")
    agree(m, weight, 2 * l.head_dim_v, group.number("expand_proj") * dim, group, "expand_proj")
    load = m.load(weight, l.head_dim_v, 1, l.conv_width)
    m.put("conv.weight", lambda: load()[:, 0].T)
    m.linear(bias(m, IN_BIAS, group, "use_bias", "mixer.in_proj"), "in",
             [("mixer.in_proj", 2 * l.head_dim_v)], dim)
    if "mixer.conv.conv.bias" in m:
        m.put("conv.bias", m.load("mixer.conv.conv.bias", l.head_dim_v))
        l.flags |= CONV_BIAS
    m.linear(bias(m, OUT_BIAS, group, "use_bias", "mixer.out_proj"), "out",
             [("mixer.out_proj", dim)], l.head_dim_v)


def read_taylor(m, l, i, group):
    """Linear attention with the Taylor feature map of degree 2, or its last power alone."""
    number, dim = group.number, m.config.dim
    feature_map = group.group("feature_map", FEATURE_MAP)
    if group.get("feature_map") is None and group.get("feature_name") == "taylor_exp":
        feature_map.values = {"input_dim": group.get("feature_dim")}
    kind = str(feature_map.get("_target_")).rpartition(".")[2]
    if kind not in ("TaylorExp", "Squared"):
        raise Refused(f"{feature_map.said('_target_')}: this feature map is not supported, only "
                      "TaylorExp and Squared")
    method = group.get("parallel_implementation")
    if method not in ("quadratic", "linear", "fla_parallel", "fla_chunk"):
        raise Refused(f"{group.said('parallel_implementation')} is not supported")
    l.mixer, l.degree, l.kernel, l.chunk = TAYLOR, 2, DOT, m.options.chunk or CHUNK
    l.heads = l.kv_heads = number("num_heads")
    l.head_dim_k = number("feature_dim")
    l.head_dim_v = dim // l.heads if group.get("head_dim") is None else number("head_dim")
    wide, deep = l.heads * l.head_dim_k, l.heads * l.head_dim_v
    agree(m, "mixer.proj_q.weight", m.shape("mixer.proj_q.weight", None, None)[0], wide, group,
          "num_heads", "feature_dim")
    agree(m, "mixer.proj_v.weight", m.shape("mixer.proj_v.weight", None, None)[0], deep, group,
          "num_heads", "head_dim")
    l.scale = 1 / math.sqrt(feature_map.number("input_dim"))
    # The kernels of flash-linear-attention have an eps of their own.
    l.normalizer = ADD
    l.normalizer_eps = 1e-6 if "fla" in method else number("eps", kind=float, least=0)
    l.sinks = number("sinks", number("keep", least=0), least=0)
    l.decay = number("decay", number("forget", kind=float, least=0), float, 0)
    m.linear(0, "in", [("mixer.proj_q", wide), ("mixer.proj_k", wide), ("mixer.proj_v", deep)],
             dim)
    m.taylor(l, [0, 0, 1] if kind == "Squared" else None)
    if group.get("use_decay_proj") and m.settings.get("fixed_decay"):
        if method != "quadratic":
            raise Refused(f"{group.said('parallel_implementation')} knows no decay, but "
                          f"{m.settings.said('fixed_decay')[13:]}")
        l.fading = FIXED
        l.flags |= VALUE_FACTORS
        factors = fixed_decay(m, l.heads)
        m.put("fade.factor", lambda: factors)
        m.put("gate.weight", m.load("mixer.decay_proj.weight", l.heads, dim))
    m.linear(0, "out", [("mixer.out_proj", dim)], deep)


def fixed_decay(m, heads):
    """(heads) float32: what the sums of values keep from one token to the next, whose logarithm the
    model has, or as its class makes it."""
    if DECAY in m.source:
        logs = m.source.take(DECAY, heads)()
        if not (np.isfinite(logs) & (logs <= 0)).all():
            raise Refused(f"{m.source.where}: {DECAY} holds a number that is not 0 or below")
        return np.float32([float(Decimal(float(x)).exp()) for x in logs])
    const = m.settings.number("decay_const", kind=float, least=-20)
    if const >= 0:
        raise Refused(f"{m.settings.said('decay_const')}, expected a number below 0")
    return np.float32([1 - 2 ** (const - h) for h in range(heads)])


def read_prefix(m, l, i, group):
    """Linear attention where every token sees all of the first enc_length tokens of a prompt, by
    keys and values of their own, and those up to itself."""
    number, dim = group.number, m.config.dim
    if group.get("implementation") not in ("default", "fla_parallel") or (
            group.get("feature_name") not in (None, "taylor_exp")):
        raise Refused(f"{group.said('implementation')}, {group.said('feature_name')[13:]}: not "
                      "supported")
    l.mixer, l.degree, l.kernel, l.chunk = TAYLOR, 2, DOT, m.options.chunk or CHUNK
    l.heads = l.kv_heads = number("num_heads")
    l.head_dim_k, l.head_dim_v = number("feature_dim"), dim // l.heads
    wide, deep = l.heads * l.head_dim_k, l.heads * l.head_dim_v
    scale_dim = l.head_dim_k if group.get("scale_dim") is None else number("scale_dim")
    l.scale, l.normalizer = 1 / math.sqrt(scale_dim), ADD
    l.normalizer_eps, prefix = number("eps", kind=float, least=0), number("enc_length")
    if m.config.prefix not in (0, prefix) or prefix > MAX_PREFIX:
        raise Refused(f"{group.said('enc_length')}: expected the same in all layers, at most "
                      f"{MAX_PREFIX}")
    m.config.prefix = prefix
    l.flags |= PREFIX
    m.linear(0, "in", [("mixer.proj_q", wide), ("mixer.proj_k", wide), ("mixer.proj_v", deep),
                       ("mixer.proj_k_enc", wide), ("mixer.proj_v_enc", deep)], dim)
    m.taylor(l)
    m.linear(0, "out", [("mixer.out_proj", dim)], deep)


def read_window(m, l, i, group):
    """Softmax attention over a sliding window, or over all keys; with rotary embedding."""
    settings, dim, window = m.settings, m.config.dim, m.options.window
    l.mixer, l.heads = WINDOW, settings.number("n_head")
    l.kv_heads = l.heads if settings.get("n_head_kv") is None else settings.number("n_head_kv")
    if dim % l.heads or l.heads % l.kv_heads:
        raise Refused(f"{settings.said('n_head')} does not divide the width {dim}, or is no "
                      f"multiple of n_head_kv = {l.kv_heads}")
    if group.fields:                                      # it sees window_size // 2 others
        refuse_other_values(group, {name: value for name, value in group.fields.items()
                                    if name != "window_size"})
        l.window = window or group.number("window_size", least=0) // 2 + 1
    elif not (window or m.config.context):
        raise Refused(f"{group.prefix[:-1]} of config.json is absent, so layer {i} is full "
                      "attention: give the number of visible keys by --window")
    else:
        l.window = window or m.config.context
        m.note(f"layer {i} is full attention, which becomes a window of {l.window} keys")
    l.head_dim_k = l.head_dim_v = width = dim // l.heads
    said_width = settings.number("head_dim", width)
    l.scale = 1 / math.sqrt(said_width) if settings.get("scale_attn_weights") else 1.0
    if settings.get("scale_attn_by_inverse_layer_idx"):
        l.scale /= i + 1
    # An odd number of rotated rows is rounded up; its frequencies are not.
    rotated = int(settings.number("rotary_emb_fraction", kind=float, least=0) * said_width)
    l.rope_pairs = (rotated + 1) // 2
    if 2 * l.rope_pairs > width:
        raise Refused(f"{settings.said('rotary_emb_fraction')} is above 1, or rotates "
                      f"{2 * l.rope_pairs} of {width} rows")
    order = half_split(width, l.rope_pairs, settings.get("rotary_emb_interleaved"))
    m.linear(bias(m, IN_BIAS, settings, "qkv_proj_bias", "mixer.Wqkv"), "in",
             [("mixer.Wqkv", (l.heads + 2 * l.kv_heads) * width)], dim,
             lambda rows: by_head(l, rows, order))
    if l.rope_pairs:
        table = rope_freq(l.rope_pairs, rotated, settings.number("rotary_emb_base", kind=float))
        m.put("rope_freq", lambda: table)
    m.linear(bias(m, OUT_BIAS, settings, "out_proj_bias", "mixer.out_proj"), "out",
             [("mixer.out_proj", dim)], dim)


# Class -> (a tensor that only it has, how it is read).
KINDS = {"BaseConv": ("mixer.in_proj.weight", read_conv),
         "PrefixLinearAttention": ("mixer.proj_k_enc.weight", read_prefix),
         "LinearAttention": ("mixer.proj_q.weight", read_taylor),
         "SlidingAttention": ("mixer.Wqkv.weight", read_window),
         "full attention": ("mixer.Wqkv.weight", read_window)}


def hidden_width(settings, dim):
    """(width of the hidden layer, names of the fields that it follows from)."""
    inner = None if settings.get("n_inner") is None else settings.number("n_inner")
    if settings.get("activation_function") == "gelu":
        return inner or 4 * dim, ["n_inner"]
    if settings.get("mlp_type") == "base":
        return round_up(inner or int(8 * dim / 3), 256), ["n_inner"]
    return round_up(int(2 * dim * settings.number("ff_mult", kind=float) / 3), 256), [
        "mlp_type", "ff_mult"]


def read_mlp(m, l):
    """The gated layers of SwiGLU in one matrix or two, or those of GELU."""
    settings, dim, kind = m.settings, m.config.dim, m.settings.get("activation_function")
    if kind not in ("swiglu", "gelu"):
        raise Refused(f"{settings.said('activation_function')} is not supported")
    l.mlp = SWIGLU if kind == "swiglu" else GELU
    l.hidden_dim, fields = hidden_width(settings, dim)
    one = kind == "swiglu" and settings.get("mlp_type") == "base"
    rows = l.hidden_dim * (2 if one else 1)
    agree(m, "mlp.fc1.weight", m.shape("mlp.fc1.weight", None, None)[0], rows, settings, *fields)
    parts = [("mlp.fc1", rows)] + [("mlp.fc3", rows)] * (kind == "swiglu" and not one)
    m.linear(bias(m, UP_BIAS, settings, "mlp_fc1_bias", "mlp.fc1"), "up", parts, dim,
             lambda rows: np.roll(rows, len(rows) // 2 if one else 0, axis=0))    # the gate first
    m.linear(bias(m, DOWN_BIAS, settings, "mlp_fc2_bias", "mlp.fc2"), "down", [("mlp.fc2", dim)],
             l.hidden_dim)


def random(given, where, seed):
    """A Source of random weights in the shape that `given` (a config.json) describes; what it does
    not say is as in the releases. They are scaled so that activations keep their size through any
    number of layers. The same seed gives the same weights."""
    settings = {**RELEASED, **given}
    for name in ("mixer", "alt_mixer", "alt_mixer_2"):
        if isinstance(settings[name], dict):
            settings[name] = {**RELEASED[name], **settings[name]}
    c = Settings(settings, FIELDS)
    conv = c.group("mixer", MIXERS["BaseConv"])
    taylor = c.group("alt_mixer", MIXERS["LinearAttention"])
    dim, count = map(c.number, ("n_embd", "n_layer"))
    hidden, _ = hidden_width(c, dim)
    features = taylor.number("feature_dim") * taylor.number("num_heads")
    channels = dim * conv.number("expand_proj") // 2
    rows = round_up(c.number("vocab_size"), c.number("pad_vocab_size_multiple"))
    shapes = {EMBEDDING: (rows, dim),
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
    def load(name, begin, end):
        last = name.endswith(("out_proj.weight", "fc2.weight"))
        return random_rows(name, shapes[name], seed,
                           1 / math.sqrt(2 * count) if last else 1)[begin:end]
    return Source(shapes, load, where, settings)
