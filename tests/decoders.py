"""Decoders in the form of Hugging Face transformers, and power retention, in numpy, float64,
written from their descriptions and not from export.py: what a config.json means. state(config)
makes the tensors that the original would have, logits(config, state, tokens) computes what it
would. write(directory, config, state) makes a download of both."""
import json
import math

import numpy as np

LLAMA = {"vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008,
         "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": None,
         "head_dim": None, "rms_norm_eps": 1e-6, "tie_word_embeddings": False,
         "rope_theta": 10000.0, "rope_scaling": None, "rope_parameters": None,
         "attention_bias": False, "mlp_bias": False, "max_position_embeddings": 2048}
QWEN2 = {**LLAMA, "vocab_size": 151936, "intermediate_size": 22016, "num_key_value_heads": 32,
         "use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28,
         "layer_types": None, "max_position_embeddings": 32768}
DEFAULTS = {
    "llama": LLAMA, "qwen2": QWEN2, "qwen3": {**QWEN2, "head_dim": 128},
    "mistral": {**LLAMA, "intermediate_size": 14336, "num_key_value_heads": 8,
                "sliding_window": 4096, "max_position_embeddings": 131072},
    "brumby": {**QWEN2, "head_dim": 128},
    "powercoder": {**LLAMA, "vocab_size": 49152, "hidden_size": 3072, "intermediate_size": 12288,
                   "num_hidden_layers": 30, "num_attention_heads": 24, "num_key_value_heads": 2,
                   "norm_epsilon": 1e-5, "use_bias": True, "tie_word_embeddings": True,
                   "max_position_embeddings": 4096}}


class Sizes:
    """The fields of a config.json with the defaults of its family, and what follows from them."""

    def __init__(self, config):
        self.family = config["model_type"]
        self.c = c = {**DEFAULTS[self.family], **config}
        self.dim, self.heads = c["hidden_size"], c["num_attention_heads"]
        self.kv = c["num_key_value_heads"] or self.heads
        self.width = c["head_dim"] or self.dim // self.heads
        self.code = self.family == "powercoder"
        self.retention = self.code or self.family == "brumby"
        every = self.code and c["use_bias"]
        llama = self.family in ("llama", "qwen3", "brumby") and c["attention_bias"]
        self.out_bias = every or llama
        self.qkv_bias = every or llama or self.family == "qwen2"
        self.mlp_bias = every or self.family == "llama" and c["mlp_bias"]


def state(config, seed=1):
    """{name: float32 array}, random, in the shapes that the original gives its parameters."""
    s, rng, shapes = Sizes(config), np.random.default_rng(seed), {}
    dim, hidden = s.dim, s.c["intermediate_size"]

    def linear(name, out, into, bias):
        shapes[name + ".weight"] = (out, into)
        if bias:
            shapes[name + ".bias"] = (out,)

    def norm(name, width=dim):
        shapes[name + ".weight"] = (width,)
        if s.code:
            shapes[name + ".bias"] = (width,)

    linear("model.embed_tokens", s.c["vocab_size"], dim, False)
    for i in range(s.c["num_hidden_layers"]):
        at = f"model.layers.{i}."
        norm(at + "input_layernorm")
        norm(at + "post_attention_layernorm")
        for name, heads in (("q", s.heads), ("k", s.kv), ("v", s.kv)):
            linear(f"{at}self_attn.{name}_proj", heads * s.width, dim, s.qkv_bias)
        linear(at + "self_attn.o_proj", dim, s.heads * s.width, s.out_bias)
        if s.family in ("qwen3", "brumby"):
            shapes[at + "self_attn.q_norm.weight"] = shapes[at + "self_attn.k_norm.weight"] = (
                s.width,)
        if s.retention:
            linear(at + "self_attn.g_proj", s.kv, dim, s.qkv_bias)
        for name in ("c_fc",) if s.code else ("gate_proj", "up_proj"):
            linear(f"{at}mlp.{name}", hidden, dim, s.mlp_bias)
        linear(at + "mlp." + ("c_proj" if s.code else "down_proj"), dim, hidden, s.mlp_bias)
    norm("model.norm")
    if not s.c["tie_word_embeddings"]:
        linear("lm_head", s.c["vocab_size"], dim, False)
    made = {}
    for name, shape in shapes.items():
        value = rng.standard_normal(shape)
        if "norm" in name:
            value = 0.2 * value + name.endswith("weight")
        elif len(shape) == 1:
            value = 0.3 * value + (2 if "g_proj" in name else 0)
        else:
            value = value / math.sqrt(shape[-1])
        made[name] = value.astype(np.float32)
    return made


def frequencies(c, width):
    """Of rotary embedding, each step rounded to float32."""
    group = c["rope_parameters"] or c["rope_scaling"] or {}
    theta = group.get("rope_theta") or c["rope_theta"]
    exponent = np.arange(0, width, 2, dtype=np.float32) / np.float32(width)
    f = np.float32(1) / np.float32(np.float64(np.float32(theta)) ** exponent.astype(np.float64))
    kind = group.get("rope_type") or group.get("type")
    if kind == "linear":
        return f / np.float32(group["factor"])
    if kind == "llama3":
        n, low, high = (group[name] for name in ("original_max_position_embeddings",
                                                 "low_freq_factor", "high_freq_factor"))
        for i, wave in enumerate(np.float32(2 * math.pi) / f):
            slow = f[i] / np.float32(group["factor"])
            m = (np.float32(n) / wave - np.float32(low)) / np.float32(high - low)
            f[i] = (slow if wave > n / low else f[i] if wave < n / high else
                    (1 - m) * f[i] / np.float32(group["factor"]) + m * f[i])
    return f


def visible(s, i):
    """The newest keys that layer i sees, or None for all."""
    if s.family == "mistral":
        return s.c["sliding_window"]
    if s.family not in ("qwen2", "qwen3") or not s.c["use_sliding_window"]:
        return None
    kinds = s.c["layer_types"]
    slides = kinds[i] == "sliding_attention" if kinds else i >= s.c["max_window_layers"]
    return s.c["sliding_window"] if slides else None


def logits(config, tensors, tokens):
    """(tokens, vocab_size)"""
    s, n = Sizes(config), len(tokens)
    c, t = s.c, {name: x.astype(np.float64) for name, x in tensors.items()}
    eps = c["norm_epsilon" if s.code else "rms_norm_eps"]
    age = np.arange(n)[:, None] - np.arange(n)
    angle = np.arange(n)[:, None] * frequencies(c, s.width).astype(np.float64)
    cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]

    def norm(x, name):
        if s.code:
            x = x - x.mean(-1, keepdims=True)
        x = x / np.sqrt((x * x).mean(-1, keepdims=True) + eps)
        return x * t[name + ".weight"] + t.get(name + ".bias", 0)

    def linear(x, name):
        return x @ t[name + ".weight"].T + t.get(name + ".bias", 0)

    def rotate(x):
        a, b = np.split(x, 2, axis=-1)
        return np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)

    def attend(h, i):
        at = f"model.layers.{i}.self_attn."
        q, k, v = (linear(h, f"{at}{x}_proj").reshape(n, -1, s.width) for x in "qkv")
        if s.family in ("qwen3", "brumby"):
            q, k = norm(q, at + "q_norm"), norm(k, at + "k_norm")
        q, k = rotate(q), np.repeat(rotate(k), s.heads // s.kv, axis=1)
        score = np.einsum("nhd,mhd->hnm", q, k) / math.sqrt(s.width)
        if s.retention:
            kept = np.cumsum(-np.log1p(np.exp(-linear(h, at + "g_proj"))), 0).T
            kept = np.repeat(kept, s.heads // s.kv, axis=0)
            w = score ** 2 * np.exp(np.where(age >= 0, kept[:, :, None] - kept[:, None], -np.inf))
        else:
            seen = (age >= 0) & (age < (visible(s, i) or n))
            score = np.where(seen, score, -np.inf)
            w = np.exp(score - score.max(2, keepdims=True))
        w = w / w.sum(2, keepdims=True)
        y = np.einsum("hnm,mhe->nhe", w, np.repeat(v, s.heads // s.kv, axis=1))
        return linear(y.reshape(n, -1), at + "o_proj")

    def mlp(h, at):
        if s.code:
            u = linear(h, at + "c_fc")
            return linear(u / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (u + 0.044715 * u ** 3))),
                          at + "c_proj")
        gate = linear(h, at + "gate_proj")
        return linear(gate / (1 + np.exp(-gate)) * linear(h, at + "up_proj"), at + "down_proj")

    x = t["model.embed_tokens.weight"][tokens]
    for i in range(c["num_hidden_layers"]):
        at = f"model.layers.{i}."
        x = x + attend(norm(x, at + "input_layernorm"), i)
        x = x + mlp(norm(x, at + "post_attention_layernorm"), at + "mlp.")
    head = t.get("lm_head.weight", t["model.embed_tokens.weight"])
    return norm(x, "model.norm") @ head.T


def write(directory, config, tensors):
    """Writes config.json and model.safetensors; returns the directory as text."""
    from safetensors.numpy import save_file
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    save_file(tensors, directory / "model.safetensors")
    return str(directory)
