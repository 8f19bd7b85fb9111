"""Models in the forms of their origins, for the tests of export.py: the 12-token model of
HazyResearch/based whose weights follow from a formula, and llama2.c checkpoints with a forward pass
of their own."""
import json
import math
import struct

import numpy as np

TWELVE = {
    "vocab_size": 50, "n_embd": 32, "n_head": 2, "n_layer": 4, "n_inner": 64, "rms_norm": True,
    "layer_norm_epsilon": 1e-5,
    "activation_function": "swiglu", "rotary_emb_fraction": 1, "alt_mixer_layers": [1],
    "alt_mixer_2_layers": [2],
    "mixer": {"l_max": 2048, "expand_proj": 4, "kernel_sizes": 3},
    "alt_mixer": {"num_heads": 2, "feature_dim": 16,
                  "feature_map": {"_target_": "based.models.mixers.linear_attention.TaylorExp",
                                                                      "input_dim": 16}},
    "alt_mixer_2": {"num_heads": 2, "window_size": 8, "causal": True},
}

# The order in which the formula numbers the tensors.
CONV = [("mixer.in_proj.weight", (128, 32)), ("mixer.in_proj.bias", (128,)),
        ("mixer.out_proj.weight", (32, 64)),
        ("mixer.out_proj.bias", (32,)), ("mixer.conv.conv.weight", (64, 1, 3))]
LINEAR = [("mixer.proj_q.weight", (32, 32)), ("mixer.proj_k.weight", (32, 32)),
          ("mixer.proj_v.weight", (32, 32)),
          ("mixer.out_proj.weight", (32, 32))]
SLIDING = [("mixer.Wqkv.weight", (96, 32)), ("mixer.out_proj.weight", (32, 32))]
REST = [("norm1.weight", (32,)), ("mlp.fc1.weight", (512, 32)), ("mlp.fc2.weight", (32, 256)),
        ("norm2.weight", (32,))]
EMBEDDING, HEAD = "transformer.embeddings.word_embeddings.weight", "lm_head.weight"


def twelve_state():
    """The state dict of the 12-token model: {name: float32 array}."""
    named = [(EMBEDDING, (56, 32))]
    for layer, mixer in enumerate((CONV, LINEAR, SLIDING, CONV)):
        named += [(f"transformer.layers.{layer}.{name}", shape) for name, shape in mixer + REST]
    named.append(("transformer.ln_f.weight", (32,)))
    state = {}
    for k, (name, shape) in enumerate(named):
        u = (np.arange(math.prod(shape), dtype=np.uint64) * np.uint64(2654435761)
             + np.uint64(k * 40503 + 12345)) % np.uint64(2**32)
        value = u.astype(np.float64) / 2**31 - 1
        if "norm" in name or "ln_f" in name:
            value = 1 + 0.1 * value
        elif name.endswith("bias"):
            value = 0.1 * value
        else:
            value = value * (0.5 if "conv.conv" in name else math.sqrt(3 / shape[-1]))
        state[name] = value.astype(np.float32).reshape(shape)
    return state


def write_based(directory, state, settings, form="safetensors"):
    """Writes a HazyResearch/based directory and returns its path as text."""
    directory.mkdir(exist_ok=True)
    if settings is not None:
        (directory / "config.json").write_text(json.dumps(settings))
    if form == "safetensors":
        from safetensors.numpy import save_file
        save_file({name: np.ascontiguousarray(array) for name, array in state.items()},
                  directory / "model.safetensors")
    elif form == "bin":
        import torch
        torch.save({name: torch.from_numpy(np.array(array)) for name, array in state.items()},
                   directory / "pytorch_model.bin")
    return str(directory)


LLAMA_PARTS = ("embedding", "rms_att", "wq", "wk", "wv", "wo", "rms_ffn", "w1", "w2", "w3",
               "rms_final", "freq", "wcls")


def llama_shapes(dim, hidden, layers, heads, kv, vocab, seq):
    width = dim // heads
    return [(abs(vocab), dim), (layers, dim), (layers, dim, dim), (layers, kv * width, dim),
            (layers, kv * width, dim),
            (layers, dim, dim), (layers, dim), (layers, hidden, dim), (layers, dim, hidden),
            (layers, hidden, dim), (dim,),
            (seq * width,)] + ([(-vocab, dim)] if vocab < 0 else [])


def write_llama(path, rng, header):
    """A random llama2.c checkpoint; header: dim, hidden, layers, heads, kv heads, vocab (negative:
    own head), seq_len."""
    with open(path, "wb") as f:
        f.write(struct.pack("<7i", *header))
        for name, shape in zip(LLAMA_PARTS, llama_shapes(*header)):
            values = (rng.uniform(0.7, 1.3, shape) if "rms" in name else
                      rng.standard_normal(shape) / math.sqrt(shape[-1]))
            f.write(values.astype("<f4").tobytes())
    return path


def llama_logits(path, tokens):
    """Logits [tokens, vocab] of a llama2.c checkpoint in float64, with its own layout: neighboring
    rotary pairs, full attention, position by position. Frequencies are rounded to float32 as run.c
    of llama2.c does."""
    data = open(path, "rb").read()
    header = struct.unpack_from("<7i", data)
    dim, hidden, layers, heads, kv, vocab, seq = header
    width, at, w = dim // heads, 28, {}
    for name, shape in zip(LLAMA_PARTS, llama_shapes(*header)):
        w[name] = np.frombuffer(data, "<f4", math.prod(shape), at).reshape(shape).astype(np.float64)
        at += 4 * math.prod(shape)
    assert at == len(data)
    exponents = [float(np.float32(2 * i) / np.float32(width)) for i in range(width // 2)]
    frequency = [float(np.float32(1) / np.float32(10000.0 ** e)) for e in exponents]

    def rms(x, weight):
        return x / math.sqrt((x * x).mean() + 1e-5) * weight

    def turn(head, t):
        y = head.copy()
        for i, f in enumerate(frequency):
            c, s = math.cos(t * f), math.sin(t * f)
            a, b = head[2 * i:2 * i + 2]
            y[2 * i], y[2 * i + 1] = a * c - b * s, a * s + b * c
        return y

    keys, values, out = [[] for _ in range(layers)], [[] for _ in range(layers)], []
    for t, token in enumerate(tokens):
        x = w["embedding"][token].copy()
        for l in range(layers):
            h = rms(x, w["rms_att"][l])
            q = (w["wq"][l] @ h).reshape(heads, width)
            keys[l].append(np.stack([turn(k, t) for k in (w["wk"][l] @ h).reshape(kv, width)]))
            values[l].append((w["wv"][l] @ h).reshape(kv, width))
            mixed = []
            for i in range(heads):
                j = i // (heads // kv)
                score = np.array([turn(q[i], t) @ k[j] for k in keys[l]]) / math.sqrt(width)
                p = np.exp(score - score.max())
                mixed.append(sum(a * v[j] for a, v in zip(p / p.sum(), values[l])))
            x += w["wo"][l] @ np.concatenate(mixed)
            h = rms(x, w["rms_ffn"][l])
            gate = w["w1"][l] @ h
            x += w["w2"][l] @ (gate / (1 + np.exp(-gate)) * (w["w3"][l] @ h))
        out.append(w.get("wcls", w["embedding"]) @ rms(x, w["rms_final"]))
    return np.array(out)
