"""HazyResearch/based in numpy, float64, written from the description of the original and not from
export.py: what a config.json means. state(config) makes the tensors that the original would have,
logits(config, state, tokens) computes what it would."""
import math

import numpy as np

DEFAULTS = {
    "vocab_size": 50257, "n_embd": 768, "n_head": 12, "n_layer": 12, "n_inner": None,
    "activation_function": "gelu_new", "mlp_type": "base", "ff_mult": 2, "mlp_fc1_bias": True,
    "mlp_fc2_bias": True, "layer_norm_epsilon": 1e-5, "rms_norm": False,
    "tie_word_embeddings": True, "lm_head_bias": False, "pad_vocab_size_multiple": 1,
    "n_head_kv": None, "head_dim": None, "qkv_proj_bias": True, "out_proj_bias": True,
    "scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False,
    "rotary_emb_fraction": 0.0, "rotary_emb_base": 10000.0, "rotary_emb_interleaved": False,
    "alt_mixer_layers": None, "alt_mixer_2_layers": None,
    "mixer": None, "alt_mixer": None, "alt_mixer_2": None,
    "fixed_decay": False, "decay_const": -3, "n_positions": 0}
GROUPS = {"BaseConv": {"kernel_size": 3, "use_bias": True, "expand_proj": 2},
          "LinearAttention": {"feature_dim": 16, "head_dim": None, "num_heads": 16, "eps": 1e-12,
                              "use_decay_proj": False},
          "PrefixLinearAttention": {"feature_dim": 16, "eps": 1e-12, "scale_dim": None},
          "SlidingAttention": {"window_size": 128}}


def mixer_of(config, i):
    """(class, fields) of layer i."""
    name = ("alt_mixer_2" if i in (config["alt_mixer_2_layers"] or []) else
            "alt_mixer" if i in (config["alt_mixer_layers"] or []) else "mixer")
    group = config[name]
    if group is None:
        return "full", {}
    kind = group["_target_"].split(".")[-1]
    kind = {"BaseConvWithSiLU4": "BaseConv", "SlidingsMHA": "SlidingAttention"}.get(kind, kind)
    return kind, {**GROUPS[kind], **group}


def state(config, seed=1):
    """{name: float32 array}, random, in the shapes that the original gives its parameters."""
    c, rng, shapes = {**DEFAULTS, **config}, np.random.default_rng(seed), {}
    dim, heads = c["n_embd"], c["n_head"]
    rows = -(-c["vocab_size"] // c["pad_vocab_size_multiple"]) * c["pad_vocab_size_multiple"]

    def linear(name, out, into, bias):
        shapes[name + ".weight"] = (out, into)
        if bias:
            shapes[name + ".bias"] = (out,)

    def norm(name):
        shapes[name + ".weight"] = (dim,)
        if not c["rms_norm"]:
            shapes[name + ".bias"] = (dim,)

    shapes["transformer.embeddings.word_embeddings.weight"] = (rows, dim)
    for i in range(c["n_layer"]):
        at = f"transformer.layers.{i}."
        kind, g = mixer_of(c, i)
        if kind == "BaseConv":
            inner = g["expand_proj"] * dim // 2
            linear(at + "mixer.in_proj", g["expand_proj"] * dim, dim, g["use_bias"])
            linear(at + "mixer.out_proj", dim, inner, g["use_bias"])
            shapes[at + "mixer.conv.conv.weight"] = (inner, 1, g["kernel_size"])
        elif "LinearAttention" in kind:
            wide = g["feature_dim"] * g["num_heads"]
            deep = g["num_heads"] * (g.get("head_dim") or dim // g["num_heads"])
            linear(at + "mixer.proj_q", wide, dim, False)
            linear(at + "mixer.proj_k", wide, dim, False)
            linear(at + "mixer.proj_v", deep, dim, False)
            linear(at + "mixer.out_proj", dim, deep, False)
            if kind == "PrefixLinearAttention":
                linear(at + "mixer.proj_k_enc", wide, dim, False)
                linear(at + "mixer.proj_v_enc", deep, dim, False)
            elif g["use_decay_proj"]:
                linear(at + "mixer.decay_proj", g["num_heads"], dim, False)
        else:
            both = heads + 2 * (c["n_head_kv"] or heads)
            linear(at + "mixer.Wqkv", dim // heads * both, dim, c["qkv_proj_bias"])
            linear(at + "mixer.out_proj", dim, dim, c["out_proj_bias"])
        if c["activation_function"] == "gelu":
            hidden = rows1 = c["n_inner"] or 4 * dim
        elif c["mlp_type"] == "base":
            hidden = -(-(c["n_inner"] or int(8 * dim / 3)) // 256) * 256
            rows1 = 2 * hidden
        else:
            hidden = rows1 = -(-int(2 * dim * c["ff_mult"] / 3) // 256) * 256
            linear(at + "mlp.fc3", hidden, dim, c["mlp_fc1_bias"])
        linear(at + "mlp.fc1", rows1, dim, c["mlp_fc1_bias"])
        linear(at + "mlp.fc2", dim, hidden, c["mlp_fc2_bias"])
        norm(at + "norm1")
        norm(at + "norm2")
    norm("transformer.ln_f")
    if not c["tie_word_embeddings"] or c["lm_head_bias"]:
        linear("lm_head", rows, dim, c["lm_head_bias"])
    made = {}
    for name, shape in shapes.items():
        value = rng.standard_normal(shape)
        if "norm" in name or "ln_f" in name:
            value = 0.1 * value + name.endswith("weight")
        elif len(shape) == 1:
            value = 0.3 * value
        else:
            value = value * (0.5 if "conv.conv" in name else 1 / math.sqrt(shape[-1]))
        made[name] = value.astype(np.float32)
    if c["tie_word_embeddings"]:
        made["lm_head.weight"] = made["transformer.embeddings.word_embeddings.weight"]
    return made


def silu(x):
    return x / (1 + np.exp(-x))


def gelu(x):
    return 0.5 * x * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def rotate(x, n, base, interleaved):
    """x (tokens, heads, width): the first rows of each head by their position."""
    f = 1 / np.float32(base) ** (np.arange(0, n, 2, dtype=np.float32) / np.float32(n))
    angle = np.arange(len(x))[:, None] * f.astype(np.float64)
    cos, sin, k, y = np.cos(angle)[:, None], np.sin(angle)[:, None], len(f), x.copy()
    one, two = (slice(0, 2 * k, 2), slice(1, 2 * k, 2)) if interleaved else (
        slice(0, k), slice(k, 2 * k))
    y[..., one], y[..., two] = (x[..., one] * cos - x[..., two] * sin,
                                x[..., one] * sin + x[..., two] * cos)
    return y


def mix(c, g, kind, w, h, i):
    """What a mixer adds. w(name): a tensor of it, or 0 if there is none."""
    dim, n = c["n_embd"], len(h)
    past = np.tril(np.ones((n, n)))
    if kind == "BaseConv":
        u, gate = np.split(h @ w("in_proj.weight").T + w("in_proj.bias"), 2, axis=1)
        kernel = w("conv.conv.weight")[:, 0].T
        padded = np.concatenate([np.zeros((len(kernel) - 1, u.shape[1])), u])
        u = sum(kernel[j] * padded[j:j + n] for j in range(len(kernel))) + w("conv.conv.bias")
        return silu(u) * gate @ w("out_proj.weight").T + w("out_proj.bias")
    if "LinearAttention" in kind:
        heads, keep = g["num_heads"], np.ones((n, n))
        q, k, v = ((h @ w(f"proj_{x}.weight").T).reshape(n, heads, -1) for x in "qkv")
        scale = (g["scale_dim"] or g["feature_dim"] if kind[0] == "P" else g["feature_map"][
            "input_dim"] if "feature_map" in g else g["feature_dim"]) ** -0.5

        def weights(k):
            s = np.einsum("nhd,mhd->hnm", q, k) * scale
            squared = "Squared" in str(g.get("feature_map"))
            return s * s if squared else 1 + s + s * s / 2
        a = weights(k) * past
        if kind == "LinearAttention" and g["use_decay_proj"] and c["fixed_decay"]:
            kept = 1 - 2.0 ** (c["decay_const"] - np.arange(heads))
            keep = kept[:, None, None] ** np.maximum(np.arange(n)[:, None] - np.arange(n), 0)
            keep = keep * (h @ w("decay_proj.weight").T).T[..., None]
        y, z = np.einsum("hnm,mhe->nhe", a * keep, v), a.sum(2).T[..., None]
        if kind == "PrefixLinearAttention":
            k, v = ((h[:g["enc_length"]] @ w(f"proj_{x}_enc.weight").T).reshape(-1, heads, size)
                    for x, size in (("k", k.shape[2]), ("v", v.shape[2])))
            a = weights(k)
            y, z = y + np.einsum("hnm,mhe->nhe", a, v), z + a.sum(2).T[..., None]
        y = y / (z + g["eps"])
        return y.reshape(n, -1) @ w("out_proj.weight").T
    heads = c["n_head"]
    kv, width = c["n_head_kv"] or heads, dim // heads
    head_dim = c["head_dim"] or width
    q, k, v = np.split((h @ w("Wqkv.weight").T + w("Wqkv.bias")).reshape(n, -1, width),
                       [heads, heads + kv], axis=1)
    turned = int(c["rotary_emb_fraction"] * head_dim)
    if turned:
        q, k = (rotate(x, turned, c["rotary_emb_base"], c["rotary_emb_interleaved"])
                for x in (q, k))
    k, v = (np.repeat(x, heads // kv, axis=1) for x in (k, v))
    scale = head_dim ** -0.5 if c["scale_attn_weights"] else 1.0
    scale /= i + 1 if c["scale_attn_by_inverse_layer_idx"] else 1
    age = np.arange(n)[:, None] - np.arange(n)
    seen = (age >= 0) & (age <= (g["window_size"] // 2 if kind != "full" else n))
    s = np.where(seen, np.einsum("nhd,mhd->hnm", q, k) * scale, -np.inf)
    a = np.exp(s - s.max(2, keepdims=True))
    y = np.einsum("hnm,mhe->nhe", a / a.sum(2, keepdims=True), v)
    return y.reshape(n, dim) @ w("out_proj.weight").T + w("out_proj.bias")


def logits(config, tensors, tokens):
    """(tokens, vocab_size)"""
    c = {**DEFAULTS, **config}
    t = {name: x.astype(np.float64) for name, x in tensors.items()}

    def norm(x, name):
        if not c["rms_norm"]:
            x = x - x.mean(1, keepdims=True)
        x = x / np.sqrt((x * x).mean(1, keepdims=True) + c["layer_norm_epsilon"])
        return x * t[name + ".weight"] + t.get(name + ".bias", 0)

    x = t["transformer.embeddings.word_embeddings.weight"][tokens]
    for i in range(c["n_layer"]):
        at = f"transformer.layers.{i}."
        kind, g = mixer_of(c, i)
        x = x + mix(c, g, kind, lambda name: t.get(f"{at}mixer.{name}", 0), norm(x, at + "norm1"),
                    i)
        up = norm(x, at + "norm2") @ t[at + "mlp.fc1.weight"].T + t.get(at + "mlp.fc1.bias", 0)
        if c["activation_function"] == "gelu":
            up = gelu(up)
        elif c["mlp_type"] == "base":
            value, gate = np.split(up, 2, axis=1)
            up = value * silu(gate)
        else:
            up = silu(up) * (norm(x, at + "norm2") @ t[at + "mlp.fc3.weight"].T
                             + t.get(at + "mlp.fc3.bias", 0))
        x = x + up @ t[at + "mlp.fc2.weight"].T + t.get(at + "mlp.fc2.bias", 0)
    y = norm(x, "transformer.ln_f") @ t["lm_head.weight"].T + t.get("lm_head.bias", 0)
    return y[:, :c["vocab_size"]]
