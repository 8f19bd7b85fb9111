"""The whole of based.h, part 7, once more: in float64, from the formulas, with the entire past in
memory.

Written to be compared with, not to be fast: every layer sees all tokens at once, attention is a
full table of scores and nothing is carried from token to token. It shares no code with export.py or
based.c, and reads checkpoint files itself.

    model = read(path)               header fields and tensors, float64
    logits = run(model, tokens)      [tokens, vocab] (or vectors in: [n, input])
    path = random_checkpoint(rng, path, **overrides)      a small model, everything chosen at random
"""
import math
import struct
from types import SimpleNamespace

import numpy as np

FLT_MAX = float(np.finfo(np.float32).max)


# --------------------------------------------------------------------------------------------------
# Reading: the numbers on the left are the offsets that based.h names.

CONFIG = {32: "flags", 36: "dim", 40: "layers", 44: "vocab", 48: "rows", 52: "input",
          56: "embedding_dtype",
          60: "head_dtype", 64: "final_norm", 68: "final_norm_eps", 72: "tokenizer_bytes",
          76: "context", 144: "prefix"}
LAYER = {0: "mixer", 4: "flags", 8: "norm1", 12: "norm2", 16: "norm1_eps", 20: "norm2_eps",
         24: "heads", 28: "kv_heads",
         32: "head_dim_k", 36: "head_dim_v", 40: "conv_width", 44: "window", 48: "chunk",
         52: "degree", 56: "kernel",
         60: "normalizer", 64: "normalizer_eps", 68: "scale", 72: "rope_pairs", 76: "mlp",
         80: "hidden_dim", 84: "in_dtype",
         88: "out_dtype", 92: "up_dtype", 96: "down_dtype", 100: "sinks", 104: "decay",
         108: "fading"}


def fields(data, at, names):
    """The fields of one struct: 32-bit words, floats where the name says so."""
    def field(name, offset):
        is_float = "eps" in name or name in ("scale", "decay")
        return struct.unpack_from("<f" if is_float else "<I", data, at + offset)[0]
    return SimpleNamespace(**{name: field(name, offset) for offset, name in names.items()})


class Matrix:
    """Weights [rows, cols]; called with vectors [n, cols] gives products [n, rows]. Weights
    quantized in groups of `group` columns are multiplied with vectors quantized likewise, in steps
    of a power of two."""

    def __init__(self, values, group=None):
        self.values, self.group = values, group

    def __call__(self, x):
        if self.group:
            groups = np.zeros((len(x), -(-x.shape[1] // self.group), self.group))
            groups.reshape(len(x), -1)[:, :x.shape[1]] = x
            largest = np.abs(groups).max(2, keepdims=True)
            step = 2.0 ** np.ceil(np.log2(np.maximum(largest, 2.0 ** -50) / 127))
            groups = np.rint(groups / step) * step
            x = groups.reshape(len(x), -1)[:, :x.shape[1]]
        return x @ self.values.T


def read(path):
    """A checkpoint as a namespace: config fields, `layer` (a list of namespaces), every tensor an
    attribute."""
    data = open(path, "rb").read()
    assert data[:8] == b"BASED\r\n\x1a" and struct.unpack_from("<II", data, 8) == (2, 0x01020304)
    assert struct.unpack_from("<Q", data, 16)[0] == len(data)
    m = fields(data, 0, CONFIG)
    m.layer = [fields(data, 256 + 128 * i, LAYER) for i in range(m.layers)]
    at = 256 + 128 * m.layers

    def section(nbytes):
        nonlocal at
        at = (at + 63) // 64 * 64
        part = data[at:at + nbytes]
        assert len(part) == nbytes, "the file ends too early"
        at += nbytes
        return part

    def vector(*shape):
        return np.frombuffer(section(4 * math.prod(shape)), "<f4").reshape(shape).astype(np.float64)

    def matrix(dtype, rows, cols):
        if dtype == 0:
            return Matrix(vector(rows, cols))
        # columns that share a scale, bits to those of the upper halves
        group, high = {1: (64, 0), 2: (32, 4)}[dtype]
        tiles, groups, columns = -(-rows // 16), -(-cols // group), -(-cols // 32) * 32
        scale = np.frombuffer(section(32 * tiles * groups), "<u2").astype(np.uint32) << 16
        scale = scale.view(np.float32).astype(np.float64).reshape(tiles, groups, 16)
        in_word = 8 if high else 4
        word = np.frombuffer(section(64 * tiles * columns // in_word),
                             "<u4").reshape(tiles, -1, 16).astype(np.int64)
        whole = np.zeros((16 * tiles, columns))
        for r in range(16):
            for column in range(columns):
                stored = word[:, column // in_word,
                              r] >> 8 * (column % 4) + high * (column % in_word // 4)
                stored = (stored & 15) - 8 if high else (stored & 255) - 128
                whole[r::16, column] = stored * scale[:, column // group, r]
        return Matrix(whole[:rows, :cols], group)

    def norm(into, name, kind):
        if kind:
            setattr(into, name + "_weight", vector(m.dim))
        if kind == 2:
            setattr(into, name + "_bias", vector(m.dim))

    m.tokenizer = section(m.tokenizer_bytes) if m.tokenizer_bytes else b""
    if m.input == 0:
        m.embedding = matrix(m.embedding_dtype, m.rows, m.dim)
    if m.flags & 4:
        m.input_weight, m.input_bias = matrix(0, m.dim, m.input), vector(m.dim)
    for l in m.layer:
        inner = l.heads * l.head_dim_v
        l.bidirectional = 1 << 30 if m.flags & 8 else 0     # so many first tokens see each other
        norm(l, "norm1", l.norm1)
        if l.mixer:
            l.parts = [inner, inner] if l.mixer == 1 else [l.heads * l.head_dim_k,
                                                           l.kv_heads * l.head_dim_k,
                                                           l.kv_heads * l.head_dim_v]
            if l.flags & 2048:
                l.parts += l.parts[1:]                      # k_enc, v_enc
            l.in_weight = matrix(l.in_dtype, sum(l.parts), m.dim)
            l.in_bias = vector(sum(l.parts)) if l.flags & 1 else 0
        if l.flags & 1024:
            l.q_norm, l.k_norm = vector(l.head_dim_k), vector(l.head_dim_k)
        if l.mixer == 1:
            l.conv_weight = vector(l.conv_width, inner)
            l.conv_bias = vector(inner) if l.flags & 4 else 0
        if l.rope_pairs:
            l.rope_freq = np.frombuffer(section(8 * l.rope_pairs), "<u8")
        if l.flags & 512:
            l.key_mean = vector(l.kv_heads, l.head_dim_k)
        if l.kernel == 2:
            l.q_map, l.k_map = (vector(l.heads, l.degree, l.head_dim_k) for _ in range(2))
            l.mix = vector(l.heads)
        elif l.mixer == 2:
            l.coefficients = vector(l.heads, l.degree + 1)
        if l.fading == 1:
            l.fade_weight, l.fade_bias = vector(l.kv_heads, m.dim), vector(l.kv_heads)
        if l.fading == 2:
            l.fade_factor = vector(l.kv_heads)
        if l.flags & (32 | 4096):
            l.gate = vector(l.heads, m.dim)
        if l.mixer and not l.flags & 128:
            l.out_weight = matrix(l.out_dtype, m.dim, inner)
            l.out_bias = vector(m.dim) if l.flags & 2 else 0
        norm(l, "norm2", l.norm2)
        if l.mlp:
            l.up_weight = matrix(l.up_dtype, l.hidden_dim * (2 if l.mlp == 1 else 1), m.dim)
            l.up_bias = vector(len(l.up_weight.values)) if l.flags & 8 else 0
            l.down_weight = matrix(l.down_dtype, m.dim, l.hidden_dim)
            l.down_bias = vector(m.dim) if l.flags & 16 else 0
    norm(m, "final_norm", m.final_norm)
    if m.rows:
        m.head = m.embedding if m.flags & 1 else matrix(m.head_dtype, m.rows, m.dim)
    m.head_bias = vector(m.rows) if m.flags & 2 else 0
    assert at == len(data), "bytes are left over"
    return m


# --------------------------------------------------------------------------------------------------
# Computing. x is [n, dim], row t is token t.

def sigmoid(x):
    return 0.5 * (1 + np.tanh(0.5 * x))


def silu(x):
    return x * sigmoid(x)


def gelu(x):
    return 0.5 * x * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def gelu_tanh(x):
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x ** 3)))


def normed(x, kind, eps, weight, bias=0):
    if kind == 1:
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * weight
    if kind == 2:
        x = x - x.mean(-1, keepdims=True)
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * weight + bias
    if kind == 3:
        length = np.sqrt((x * x).sum(-1, keepdims=True))
        return x / np.maximum(length, eps) * math.sqrt(x.shape[-1]) * weight
    return x


def apply_norm(x, owner, name):
    kind = getattr(owner, name)
    return normed(x, kind, getattr(owner, name + "_eps"), getattr(owner, name + "_weight", 1),
                  getattr(owner, name + "_bias", 0))


def previous(x, by):
    """Row t is row t - by of x, zeros before the beginning."""
    return np.concatenate([np.zeros((min(by, len(x)),) + x.shape[1:]), x[:max(len(x) - by, 0)]])


def rotated(x, freq, first):
    """x [n, heads, width] rotated by its positions, from position `first` on. The angle t *
    frequency is taken modulo a whole turn in integers, so that it is exact however far t is."""
    half, pairs = x.shape[-1] // 2, len(freq)
    fraction = np.array([[(first + t) * int(f) % 2**64 / 2**64 for f in freq]
                         for t in range(len(x))])
    cos, sin = np.cos(2 * math.pi * fraction)[:, None], np.sin(2 * math.pi * fraction)[:, None]
    a, b = x[..., :pairs], x[..., half:half + pairs]
    y = x.copy()
    y[..., :pairs], y[..., half:half + pairs] = a * cos - b * sin, b * cos + a * sin
    return y


def conv(l, u, g):
    c = sum(l.conv_weight[i] * previous(u, l.conv_width - 1 - i)
            for i in range(l.conv_width)) + l.conv_bias
    return silu(c) * g


def divided(l, total, z):
    with np.errstate(divide="ignore", invalid="ignore"):
        if l.normalizer == 0:
            return total / (z + l.normalizer_eps)
        if l.normalizer == 1:
            return total / np.maximum(z, l.normalizer_eps)
        if l.normalizer == 2:
            return np.nan_to_num(total / z, nan=0.0, posinf=FLT_MAX, neginf=-FLT_MAX)
        return total


def flushed_chunks(l, n):
    """[n, n]: for query i and key j, how many chunks were flushed into the sums after that of
    key j; below 0: its own was not."""
    t = np.maximum(np.arange(n), min(n, l.bidirectional) - 1)[:, None]
    chunk = np.where(np.arange(n) < l.sinks, n, (np.arange(n) - l.sinks) // l.chunk)
    return np.maximum(t - l.sinks - l.window, 0) // l.chunk - 1 - chunk


def with_window(score, w, past, flushed):
    """The weights of Taylor attention, w, with exp(score) for keys that are not in the sums; each
    row in units of its own."""
    flushed = past & flushed
    old = np.where(flushed, w, 0)
    old = np.where(old.sum(1, keepdims=True) > 0, old, 0)
    top = np.maximum(np.where(past & ~flushed, score, -np.inf).max(1, keepdims=True),
                     np.where(old.any(1, keepdims=True), 0, -np.inf))
    return old * np.exp(-top) + np.where(past & ~flushed, np.exp(np.minimum(score - top, 0)), 0)


def hedgehog(x, weights):
    """The features of x [n, head_dim_k]: softmax of u and of -u."""
    u = x @ weights.T
    both = [np.exp(s - s.max(1, keepdims=True)) for s in (u, -u)]
    return np.maximum(np.concatenate([e / e.sum(1, keepdims=True) for e in both], 1), 1e-12)


def attention(l, x, q, k, v, first, k_enc=None, v_enc=None):
    """Taylor or window; q [n, heads*head_dim_k], k, v likewise for the kv heads; x [n, dim], of
    which they were computed. k_enc, v_enc: of the prefix. Returns [n, heads, head_dim_v]."""
    n = len(q)
    q, k, v = q.reshape(n, l.heads, -1), k.reshape(n, l.kv_heads, -1), v.reshape(n, l.kv_heads, -1)
    if l.flags & 1024:
        q, k = normed(q, 1, l.norm1_eps, l.q_norm), normed(k, 1, l.norm1_eps, l.k_norm)
    if l.rope_pairs:
        q, k = rotated(q, l.rope_freq, first), rotated(k, l.rope_freq, first)
    if l.flags & 512:
        k = k - l.key_mean
    y = np.zeros((n, l.heads, l.head_dim_v))
    past = np.tril(np.ones((n, n), bool))
    past[:l.bidirectional, :l.bidirectional] = True
    for h in range(l.heads):
        kv = h * l.kv_heads // l.heads
        qh, kh, vh = q[:, h], k[:, kv], v[:, kv]
        if l.mixer == 3:
            score = l.scale * qh @ kh.T
            seen = past & ~np.tril(np.ones((n, n), bool), -l.window)
            w = np.where(seen, np.exp(score - np.where(seen, score, -np.inf).max(1, keepdims=True)),
                         0)
            y[:, h] = w @ vh / w.sum(1, keepdims=True)
        else:
            a = l.coefficients[h] if l.kernel < 2 else None
            score = l.scale * qh @ kh.T
            if l.kernel == 2:
                w = hedgehog(qh, l.q_map[h]) @ hedgehog(kh, l.k_map[h]).T
            elif l.kernel == 0:
                w = sum(a[p] * score ** p for p in range(l.degree + 1))
            else:
                score = l.scale * qh[:, None, :] * kh[None, :, :]
                w = a[0] + sum(a[p] * (score ** p).sum(-1) for p in range(1, l.degree + 1))
            since = flushed_chunks(l, n)
            w = np.where(past, w * (1 - l.decay) ** np.maximum(since, 0), 0)
            if l.kernel == 2:
                exact = np.where(past & (since < 0), score, -np.inf)
                exact = np.exp(exact - exact.max(1, keepdims=True))
                w = np.where(since >= 0, w, 0) + sigmoid(l.mix[h]) * exact
            elif l.window and not l.fading:
                w = with_window(score, w, past, since >= 0)
            of_values = w
            if l.fading:
                g = np.full(n, l.fade_factor[kv]) if l.fading == 2 else sigmoid(
                    x @ l.fade_weight[kv] + l.fade_bias[kv])
                total = np.cumsum(np.log(g))
                of_values = w * np.exp(np.where(past, total[:, None] - total, -np.inf))
                w = of_values if l.fading == 1 else w
            total, z = of_values @ vh, w.sum(1, keepdims=True)
            if k_enc is not None:
                ke, ve = (a.reshape(len(a), l.kv_heads, -1)[:, kv] for a in (k_enc, v_enc))
                w = sum(a[p] * (l.scale * qh @ ke.T) ** p for p in range(l.degree + 1))
                total, z = total + w @ ve, z + w.sum(1, keepdims=True)
            y[:, h] = divided(l, total, z)
    return y


def mixer(m, l, x, first, prefix):
    """What the mixer adds to x. prefix: so many first tokens are one."""
    if l.mixer == 0:
        return np.zeros_like(x)
    if l.flags & 64:
        keep = m.dim - m.dim // 2
        x = np.concatenate([x[:, :keep], previous(x, 1)[:, keep:]], 1)
    x_norm = apply_norm(x, l, "norm1")
    parts = l.in_weight(x_norm) + l.in_bias
    parts = np.split(parts, np.cumsum(l.parts)[:-1], axis=1)
    if l.mixer == 1:
        y = conv(l, *parts)
    else:
        encoder = [part[:prefix] for part in parts[3:]] if prefix else []
        y = attention(l, x_norm, *parts[:3], first, *encoder)
        if l.flags & 32:
            y = y * sigmoid(x @ l.gate.T)[..., None]
        if l.flags & 4096:
            y = y * (x_norm @ l.gate.T)[..., None]
        y = y.reshape(len(x), -1)
    return y if l.flags & 128 else l.out_weight(y) + l.out_bias


def mlp(l, x):
    """What the MLP adds to x."""
    if l.mlp == 0:
        return np.zeros_like(x)
    up = l.up_weight(apply_norm(x, l, "norm2")) + l.up_bias
    if l.mlp == 1:
        gate, value = np.split(up, 2, axis=1)
        up = silu(gate) * value
    else:
        up = gelu(up) if l.mlp == 2 else gelu_tanh(up)
    return l.down_weight(up) + l.down_bias


def run(m, tokens, first=0, trace=None, prefix=0):
    """The output after every token: [n, vocab], or [n, dim] without a head. tokens: ids, or vectors
    [n, input]. first: the position of the first token. trace: a dict that receives what every
    sub-layer added. prefix: so many tokens were fed as a prefix."""
    if m.input == 0:
        x = m.embedding.values[np.asarray(tokens)]
    else:
        x = np.asarray(tokens, np.float64)
        if m.flags & 4:
            x = m.input_weight(x) + m.input_bias
    for i, l in enumerate(m.layer):
        mixed = mixer(m, l, x, first, prefix)
        x = mixed if l.flags & 256 else x + mixed
        more = mlp(l, x)
        x = x + more
        if trace is not None:
            trace[f"L{i}.mixer"], trace[f"L{i}.mlp"] = mixed, more
    x = apply_norm(x, m, "final_norm")
    return (m.head(x) + m.head_bias)[:, :m.vocab] if m.rows else x


def state_floats(m, l):
    """Floats that layer l of model m remembers of the past (the model itself one more, if it has a
    prefix): tokens of a convolution; sums (with
    what compensates their rounding, unless they decay), the keys and values beside them and how
    much of each is left, if they fade; a ring of keys and values; the token before, if channels are
    shifted."""
    token, features = l.kv_heads * (l.head_dim_k + l.head_dim_v), 1 + l.degree * l.head_dim_k
    if l.kernel == 2:
        features = l.heads // l.kv_heads * 2 * l.degree
    elif l.kernel == 0:
        features = math.comb(l.degree + l.head_dim_k, l.degree)
    of_sums = l.head_dim_v + 2 + (0 if l.decay or l.fading else (l.head_dim_v + 1) // 2)
    room = l.sinks + l.window + l.chunk
    floats = [0, (l.conv_width - 1) * l.head_dim_v,
              l.kv_heads * (features * of_sums + (room + 1) * (l.fading > 0)) + room * token,
              l.window * token][l.mixer]
    return floats + (m.dim if l.flags & 64 else 0)


# --------------------------------------------------------------------------------------------------
# Random models. Written through export.py, read back by read() above and by based.c: three readers
# of one format.

def random_config(rng, **overrides):
    """(config, layers) for export.write: every choice the format leaves. overrides fix fields of
    config, of all layers (layer=dict), the list of mixers (mixers=[...]), or how matrices are
    stored (dtype=0, 1, 2 or "mixed")."""
    import export

    def pick(*choices):
        return choices[rng.integers(len(choices))]

    def chance(p):
        return rng.random() < p

    per_layer, mixers = overrides.pop("layer", {}), overrides.pop("mixers", None)
    dtype = overrides.pop("dtype", 0)
    dim = int(pick(8, 12, 20, 31, 32, 48, 65))
    vocab = int(rng.integers(3, 90))
    config = export.CONFIG.new(dim=dim, vocab=vocab, rows=vocab + int(pick(0, 0, 5)),
                               final_norm=int(rng.integers(4)),
                               final_norm_eps=pick(1e-5, 1e-6), context=int(rng.integers(3000)))
    kind = pick("tied", "tied", "separate", "separate", "vectors", "projected")
    if kind == "tied":
        config.flags |= export.TIED
    elif kind != "separate":
        config.input = dim if kind == "vectors" else int(rng.integers(1, 30))
        config.flags |= export.INPUT_PROJECTION if kind == "projected" else 0
        if chance(0.5):
            config.vocab = config.rows = 0
    if config.rows and chance(0.3):
        config.flags |= export.HEAD_BIAS
    for name, value in overrides.items():
        setattr(config, name, value)

    layers = []
    mixers = mixers or [int(rng.integers(0, 4)) if chance(0.3) else int(rng.integers(1, 4))
                        for _ in range(int(rng.integers(1, 5)))]
    for mixer in mixers:
        l = export.LAYER.new(mixer=mixer, norm1=int(rng.integers(4)), norm2=int(rng.integers(4)),
                             mlp=int(pick(0, 1, 1, 2)))
        l.norm1_eps, l.norm2_eps = (pick(1e-5, 1e-6, 1e-3) for _ in range(2))
        for bit, p in ((export.IN_BIAS, 0.4), (export.OUT_BIAS, 0.4), (export.CONV_BIAS, 0.4),
                       (export.UP_BIAS, 0.4),
                       (export.DOWN_BIAS, 0.4), (export.VALUE_GATES, 0.3), (export.SHIFT, 0.3),
                       (export.NO_RESIDUAL, 0.15)):
            l.flags |= bit if chance(p) else 0
        if mixer == export.CONV:
            l.heads, l.head_dim_v = 1, int(pick(dim, 2 * dim, 7, 33))
            l.conv_width = int(rng.integers(1, 6))
        elif mixer:
            l.kv_heads = int(pick(1, 2, 3))
            l.heads = l.kv_heads * int(pick(1, 1, 2, 3))
            l.head_dim_v = int(pick(1, 4, 5, 12, 16, 112))
            if mixer == export.WINDOW:
                l.head_dim_k = int(pick(2, 6, 12, 16, 64, 112))
                l.window = int(pick(1, 2, 5, 33, 65, 129, 300))
                l.scale = float(rng.uniform(0.5, 1.5) / math.sqrt(l.head_dim_k))
                l.rope_pairs = int(pick(0, 1, l.head_dim_k // 2, l.head_dim_k // 2))
            else:
                l.kernel, l.normalizer = int(pick(0, 0, 0, 1)), int(pick(0, 0, 1, 2, 3))
                l.degree = int(pick(1, 2, 3, 4) if l.normalizer == export.ONE else pick(2, 2, 4))
                l.head_dim_k = int(pick(4, 5, 8, 16, 24) if l.degree < 4 or l.kernel
                                   else pick(4, 5, 8))
                l.chunk = int(pick(1, 2, 3, 7, 16, 32))
                l.normalizer_eps = {0: pick(1e-12, 1e-6),
                                    1: pick(1e-5, 0.75)}.get(l.normalizer, 0.0)
                l.scale = (0.2 / l.head_dim_k if l.kernel else
                           float(rng.uniform(0.3, 1) / math.sqrt(l.head_dim_k)))
                l.rope_pairs = int(pick(0, 0, l.head_dim_k // 2, 1))
                if not l.kernel and chance(0.3):
                    l.normalizer, l.normalizer_eps = export.ADD, 0.0
                    l.window = int(pick(1, 5, 16, 33))
                    # even: a sum of weights of both signs may come near zero
                    l.degree = 4 if l.degree == 4 else 2
                l.flags |= export.KEY_MEAN if chance(0.3) else 0
                l.sinks, l.decay = int(pick(0, 0, 1, 16, 21)), float(pick(0, 0, 0.001, 0.25))
            if chance(0.2) and dim % l.heads == 0:
                l.head_dim_v = dim // l.heads
        else:
            l.norm1 = l.norm1_eps = l.heads = 0
        if mixer != export.CONV:
            l.flags &= ~export.CONV_BIAS
        if mixer not in (export.TAYLOR, export.WINDOW):
            l.flags &= ~export.VALUE_GATES
        if not mixer:
            l.flags &= ~(export.IN_BIAS | export.OUT_BIAS | export.SHIFT | export.NO_RESIDUAL)
        elif l.heads * l.head_dim_v == dim and chance(0.7):
            l.flags = (l.flags | export.NO_OUT) & ~export.OUT_BIAS
        if l.mlp:
            l.hidden_dim = int(pick(1, 8, 30, 64, 100))
        else:
            l.norm2, l.flags = 0, l.flags & ~(export.UP_BIAS | export.DOWN_BIAS)
        for name, value in per_layer.items():
            # only where the mixer has such a thing
            if name not in ("conv_width", "window", "chunk") or getattr(l, name):
                setattr(l, name, value)
        l.norm1_eps *= l.norm1 != 0
        l.norm2_eps *= l.norm2 != 0
        layers.append(l)
    config.final_norm_eps *= config.final_norm != 0
    later_choices(np.random.default_rng(rng.integers(2**32)), config, layers, per_layer)
    if dtype:
        rows_dtype = int(pick(1, 2)) if dtype == "mixed" else dtype
        config.embedding_dtype = 0 if config.input else rows_dtype
        config.head_dtype = rows_dtype if config.rows else 0
        for l in layers:
            l.in_dtype, l.out_dtype, l.up_dtype, l.down_dtype = (
                int(pick(0, 1, 2)) if dtype == "mixed" else dtype for _ in range(4))
    return config, layers


def later_choices(rng, config, layers, fixed):
    """What the format has learned later, drawn by itself, so that all else of a seed's model stays
    as it was. fixed: fields of layers that must not change."""
    import export
    for l in layers:
        if l.mlp == export.GELU and rng.random() < 0.5 and "mlp" not in fixed:
            l.mlp = export.GELU_TANH
        if "flags" not in fixed and l.mixer in (export.TAYLOR, export.WINDOW):
            l.flags |= export.QK_NORM if rng.random() < 0.3 else 0
            if l.flags & export.VALUE_GATES and rng.random() < 0.4:
                l.flags ^= export.VALUE_GATES | export.VALUE_FACTORS
        if l.mixer == export.TAYLOR and l.kernel and not fixed and rng.random() < 0.5:
            l.kernel, l.degree = export.HEDGEHOG, int(rng.integers(1, 12))
            l.normalizer, l.normalizer_eps = export.ADD, 0.0
            l.scale, l.window = 1 / math.sqrt(l.head_dim_k), int(rng.integers(0, 3)) * 9
        elif (l.mixer == export.TAYLOR and not l.kernel and l.window != 1 and not fixed
              and rng.random() < 0.5):
            l.sinks = l.decay = 0
            l.fading = int(rng.integers(1 if config.input or l.window else 0, 3))
            if not l.fading:
                config.prefix, l.rope_pairs = 24, 0
                l.flags = (l.flags & ~(export.IN_BIAS | export.KEY_MEAN | export.QK_NORM)
                           | export.PREFIX)


def random_tensor(rng, name, shape):
    """Trained-looking numbers: rows of matrices keep the size of what they multiply."""
    if name.endswith("fade.factor"):
        return (1 - np.exp2(-rng.uniform(2, 8, shape))).astype(np.float32)
    if name.endswith("fade.bias"):
        return rng.uniform(1, 4, shape).astype(np.float32)
    if name.endswith("rope_freq"):
        whole = (rng.random(shape) * 2**63).astype(np.uint64)
        return whole >> rng.integers(0, 20, shape).astype(np.uint64)
    if name.endswith("coefficients"):
        series = np.array([1 / math.factorial(p) for p in range(shape[1])])
        return (series * rng.uniform(0.95, 1.05, shape)).astype(np.float32)
    if "norm" in name and name.endswith("weight"):
        return rng.uniform(0.7, 1.3, shape).astype(np.float32)
    if len(shape) == 1:
        return (0.2 * rng.standard_normal(shape)).astype(np.float32)
    size = 0.5 if name.endswith("conv.weight") else 1 / math.sqrt(shape[-1])
    return (rng.standard_normal(shape) * size).astype(np.float32)


def random_checkpoint(rng, path, **overrides):
    """Writes a random small model to path and returns path. See random_config for overrides."""
    import export
    config, layers = random_config(rng, **overrides)
    config.name = b"random"
    weights = {t.name: random_tensor(rng, t.name, t.shape) for t in export.tensors(config, layers)}
    export.write(str(path), config, layers, b"", weights.__getitem__)
    return path


def random_input(rng, m, n):
    """n random tokens for model m, or n random vectors."""
    if m.input:
        return rng.standard_normal((n, m.input)).astype(np.float32)
    return rng.integers(0, m.vocab, n)
