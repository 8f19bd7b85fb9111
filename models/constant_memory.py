"""Softmax attention on constant memory: `export.py --taylor-degree` changes a trained llama2.c
model.

A layer keeps its newest keys as they are and weights them exp(s), as softmax attention does. The
weight of an older key, exp(s) too, becomes a polynomial of s, fitted by least squares to what the
heads of this model do on some text. The mean of the keys of that text is subtracted from every key
first (KEY_MEAN), which changes no softmax weight and keeps s small.

    options                       --window, --chunk, --taylor-degree, --calibrate
    convert(...)                  changes layers and plan
    Fit                           the polynomials of one layer
    attention_inputs              the forward pass of the model, in float64
    encode, read_tokenizer        its tokenizer, so that the text becomes the tokens of the runtime
"""
import math
from types import SimpleNamespace

import numpy as np

from models.origins import (CHUNK, KEY_MEAN, NORM_RMS, SWIGLU, TAYLOR, WINDOW, Refused, progress)


def convert(config, layers, plan, tokenizer, options, note):
    """Softmax attention becomes a window and sums: changes layers and plan, as an origin's read()
    returned them. tokenizer: the section of the checkpoint, bytes. Refused if this is no llama2.c
    model, or if the text of options.calibrate is too short."""
    if config.input or any((l.mixer, l.norm1, l.norm2, l.mlp, l.flags) != (
            WINDOW, NORM_RMS, NORM_RMS, SWIGLU, 0) or not (
            2 * l.rope_pairs == l.head_dim_k == l.head_dim_v) for l in layers):
        raise Refused("--taylor-degree replaces the softmax attention of llama2.c models, which "
                      "this is not")
    chunk = options.chunk or CHUNK
    least = options.window + chunk
    texts = [text for text in read_documents(config, tokenizer, options.calibrate)
             if len(text) > least]
    if not texts:
        raise Refused(f"{options.calibrate} holds no text of more than {least} tokens, beyond the "
                      "window")
    tensor = {name: load() if name.endswith("rope_freq") else np.asarray(load(), np.float64)
              for name, load in plan.items()}
    seen = [attention_inputs(layers, tensor, text) for text in progress(texts, "reading", "text")]
    for i, l in progress(list(enumerate(layers)), "fitting", "layer"):
        l.mixer, l.flags, l.degree = TAYLOR, KEY_MEAN, options.taylor_degree
        l.window, l.chunk = options.window, chunk
        fit = Fit(l, [text[i] for text in seen])
        plan[f"layers.{i}.key_mean"] = lambda fit=fit: fit.mean.astype(np.float32)
        plan[f"layers.{i}.coefficients"] = lambda fit=fit, l=l: fit.coefficients(l.degree)
    note(f"fitted to {sum(map(len, texts)):,} tokens of {options.calibrate}")


class Fit:
    """The polynomials of one layer, fitted by least squares: with them in place of exp(s) for the
    keys in the sums, the outputs of each head over some texts differ least from those of softmax
    attention. To first order that difference is the sum over those keys of
    (w(s) - exp(s)) (v - y) / Z, with softmax's denominator Z and output y. Where Z is very small,
    any polynomial is much too large; it counts there as if Z were exp(-LIMIT)."""
    LIMIT, EVERY = 30.0, 4                              # one in so many queries is enough

    def __init__(self, l, texts):
        """texts: (q, k, v) of each, as attention_inputs returns them."""
        self.layer, self.texts = l, texts
        self.mean = np.stack([np.concatenate([k[:, g] for _, k, _ in texts]).mean(0)
                              for g in range(l.kv_heads)])
        self.equations = [self.equations_of(h, g) for h, g in shared_heads(l)]

    def scores(self, h, g):
        """For each text: positions of queries, their scores with all keys, which of these keys are
        in the sums by then, values."""
        l = self.layer
        for q, k, v in self.texts:
            at = np.arange(l.window + l.chunk, len(q), self.EVERY)
            flushed = (at - l.window) // l.chunk * l.chunk
            yield (at, l.scale * q[at, h] @ (k[:, g] - self.mean[g]).T,
                   np.arange(len(k)) < flushed[:, None], v[:, g])

    def equations_of(self, h, g):
        """(lowest score, highest score, A, b): normal equations in the Chebyshev polynomials over
        that range."""
        flushed = np.concatenate([[0], *(s[old] for _, s, old, _ in self.scores(h, g))])
        low, high = flushed.min(), flushed.max()
        a, b = 0, 0
        for at, s, old, v in self.scores(h, g):
            weights, log_z = softmax_weights(s, at)
            y, around = weights @ v, np.concatenate([v, np.ones((len(v), 1))], 1)

            def difference(w, factor):
                """The sum of w (v - y) over the keys in the sums, times factor."""
                total = (w * old) @ around
                return ((total[:, :-1] - total[:, -1:] * y) * factor).reshape(-1)
            t, columns = (2 * s - low - high) * (old / (high - low)), []
            basis, following = np.ones_like(t), t
            for _ in range(self.layer.degree + 1):
                columns.append(difference(basis, np.exp(np.minimum(-log_z, self.LIMIT))))
                basis, following = following, 2 * t * following - basis
            columns = np.stack(columns, 1)
            a = a + columns.T @ columns
            b = b + columns.T @ difference(weights, np.exp(np.minimum(0, log_z + self.LIMIT)))
        return low, high, a, b

    def coefficients(self, degree):
        """(heads, degree + 1), of s^0, s^1, ...; degree: that of the layer, or less."""
        rows, n = [], degree + 1
        for low, high, a, b in self.equations:
            size = np.sqrt(np.diag(a))[:n] + 1e-300
            matrix = a[:n, :n] / size / size[:, None] + 1e-9 * np.eye(n)
            solved = np.polynomial.Chebyshev(np.linalg.solve(matrix, b[:n] / size) / size,
                                             domain=[low, high])
            powers = solved.convert(kind=np.polynomial.Polynomial).coef
            rows.append(np.pad(powers, (0, n - len(powers))))
        return np.array(rows, np.float32)


def shared_heads(l):
    """(query head, key/value head) for each query head."""
    return [(h, h * l.kv_heads // l.heads) for h in range(l.heads)]


def softmax_weights(scores, queries):
    """(weights, log of the denominator (n, 1)) of causal attention; queries: the positions of the
    rows."""
    scores = np.where(np.arange(scores.shape[1]) <= queries[:, None], scores, -np.inf)
    top = scores.max(1, keepdims=True)
    weights = np.exp(scores - top)
    total = weights.sum(1, keepdims=True)
    return weights / total, top + np.log(total)


def attention_inputs(layers, tensor, tokens):
    """What the heads of every layer of a llama2.c model see of a text: [(q, k, v)], each (n, heads,
    width), q and k rotated by their positions. tensor: the arrays by name."""
    def normed(x, weight, eps):
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * weight

    def rotated(x, freq):
        angle = (np.arange(len(x), dtype=np.uint64)[:, None] * freq).astype(np.float64)
        angle *= 2 * math.pi / 2**64
        (a, b), cos, sin = np.split(x, 2, axis=-1), np.cos(angle)[:, None], np.sin(angle)[:, None]
        return np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)

    x, seen = tensor["embedding"][tokens], []
    for i, l in enumerate(layers):
        w = {name.removeprefix(f"layers.{i}."): array for name, array in tensor.items()}
        parts = normed(x, w["norm1.weight"], l.norm1_eps) @ w["in.weight"].T
        q, k, v = np.split(parts.reshape(len(x), -1, l.head_dim_k),
                           [l.heads, l.heads + l.kv_heads], axis=1)
        q, k = rotated(q, w["rope_freq"]), rotated(k, w["rope_freq"])
        seen.append((q, k, v))
        y = np.stack([softmax_weights(l.scale * q[:, h] @ k[:, g].T, np.arange(len(x)))[0] @ v[:, g]
                      for h, g in shared_heads(l)], axis=1)
        x = x + y.reshape(len(x), -1) @ w["out.weight"].T
        up = normed(x, w["norm2.weight"], l.norm2_eps) @ w["up.weight"].T
        gate, value = np.split(up, 2, axis=1)
        x = x + gate / (1 + np.exp(-gate)) * value @ w["down.weight"].T
    return seen


def read_documents(config, section, path):
    """The tokens of each document of a text. It is cut at begin tokens, as `run -x` does, and where
    it is longer than what the model was trained on."""
    if not section or section[4] != 2:
        raise Refused("--calibrate needs the model's tokenizer: --tokenizer FILE")
    tokenizer = read_tokenizer(section)
    try:
        with open(path, encoding="utf-8-sig") as f:
            text = " " + f.read()
    except UnicodeDecodeError as e:
        raise Refused(f"{path} is not UTF-8: {e}") from None
    texts = [encode(tokenizer, document)
             for document in text.split(tokenizer.tokens[tokenizer.bos].decode("utf-8"))]
    return [ids[at:at + config.context]
            for ids in texts for at in range(0, len(ids), config.context)]


def read_tokenizer(section):
    """A tokenizer of kind BASED_SCORES from its section of a checkpoint (based.h part 7): tokens
    (bytes), scores, bos, and apart, the ids that no text is looked up as: specials and bytes."""
    words = np.frombuffer(section, "<u4", int.from_bytes(section[:4], "little"))
    size, bos, entries, specials, ends = (int(words[i]) for i in (3, 4, 7, 8, 10))
    byte_id, special_id, _, start, _, scores = np.split(
        words[12:], np.cumsum([256, specials, (ends & 0xFFFF) + (ends >> 16), size + 1, entries]))
    text = section[4 * len(words):]
    return SimpleNamespace(tokens=[text[a:b] for a, b in zip(start, start[1:])], bos=bos,
                           scores=scores.view("<f4").tolist(), byte_id=byte_id.tolist(),
                           apart={*special_id.tolist(), *byte_id.tolist()})


def encode(tokenizer, text):
    """The ids of a text as llama2.c merges them, after the begin token: characters, then the best
    neighbors, again and again."""
    ids = {token: i for i, token in reversed(list(enumerate(tokenizer.tokens)))
           if i not in tokenizer.apart}
    out = []
    for character in text:
        piece = character.encode("utf-8")
        out += [ids[piece]] if piece in ids else [tokenizer.byte_id[byte] for byte in piece]
    while True:
        pairs = {pair: ids.get(tokenizer.tokens[pair[0]] + tokenizer.tokens[pair[1]])
                 for pair in zip(out, out[1:])}
        known = [pair for pair, whole in pairs.items() if whole is not None]
        if not known:
            return [tokenizer.bos] + out
        best = max(known, key=lambda pair: tokenizer.scores[pairs[pair]])
        at, merged = 0, []
        while at < len(out):
            both = tuple(out[at:at + 2]) == best
            merged.append(pairs[best] if both else out[at])
            at += 2 if both else 1
        out = merged
