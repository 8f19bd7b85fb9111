"""based.h part 9 for Python: Taylor attention by itself, in float32 or (double.c) in float64; the
same from its definition; and the layers of others around it, in numpy.

    attention = Taylor(head_dim_k=8, head_dim_v=8, degree=2, scale=8 ** -0.5)
    state = attention.state()
    y = state.feed(q, k, v)              # causal; or state.add(k, v) and y = state.read(q)
"""
import ctypes as C
import functools
import math
import os
import shlex
import subprocess
import tempfile
from pathlib import Path

import numpy as np

import based
from based import Error, check

HERE = Path(__file__).resolve().parent
GOLDEN = HERE / "data" / "golden"
ADD, CLAMP, RAW, ONE = range(4)
DOT, DIAGONAL = range(2)
FLT_MAX = float(np.finfo(np.float32).max)
NAMES = "head_dim_k head_dim_v group degree kernel normalizer chunk window sinks".split()


class Sizes(C.Structure):
    _fields_ = [("features", C.c_uint64), ("work", C.c_uint64),
                ("attention", C.c_size_t), ("state", C.c_size_t), ("scratch", C.c_size_t)]


def config_struct(number):
    floats = ("scale", "normalizer_eps", "decay")
    fields = [(name, C.c_uint32) for name in NAMES] + [(name, number) for name in floats]
    return type("Config", (C.Structure,), {"_fields_": [*fields, ("coefficients", C.c_void_p)]})


@functools.lru_cache
def library(double):
    """(library, its number type, its struct based_taylor_config)."""
    if not double:
        return prepare(based.library()), np.float32, config_struct(C.c_float)
    with tempfile.TemporaryDirectory(prefix="based-test-") as directory:
        out = Path(directory) / "double.so"
        command = [*shlex.split(os.environ.get("CC", "cc")), "-w", *based.FLAGS.split(), "-o", out,
                   HERE / "double.c", "-lm"]
        subprocess.run(command, check=True)
        return prepare(C.CDLL(str(out))), np.float64, config_struct(C.c_double)


def prepare(lib):
    p, n = C.c_void_p, C.c_size_t
    for name, (result, arguments) in {
            "measure": (C.c_int, [p, p, p]), "init": (C.c_int, [p, p, p, n, p]),
            "state_init": (C.c_int, [p, p, p, n, p, n, p]), "reset": (None, [p]),
            "count": (C.c_uint64, [p]), "add": (None, [p, p, p, n]), "read": (None, [p, p, n, p]),
            "feed": (None, [p, p, p, p, n, p]), "subtract": (C.c_int, [p, p, p, p]),
            "copy": (C.c_int, [p, p, p]), "merge": (C.c_int, [p, p, p])}.items():
        function = getattr(lib, "based_taylor_" + name)
        function.restype, function.argtypes = result, arguments
    return lib


def block(nbytes):
    """(owner, address) of nbytes aligned to 64, filled with something that is not zero."""
    owner = np.full(nbytes + 64, 0xA5, np.uint8)
    return owner, owner.ctypes.data + -owner.ctypes.data % 64


class Taylor:
    """An attention. Fields as in based_taylor_config; double: computed in float64."""

    def __init__(self, double=False, coefficients=None, **fields):
        self.lib, self.number, kind = library(double)
        self.kind = kind(**{"group": 1, "degree": 2, "chunk": 16, "scale": 1.0,
                            "normalizer_eps": 0.0, **fields})
        if coefficients is not None:
            coefficients = self.array(coefficients)
            self.kind.coefficients = coefficients.ctypes.data
        self.sizes, error = Sizes(), Error()
        check(self.lib.based_taylor_measure(C.byref(self.sizes), C.byref(self.kind),
                                            C.byref(error)), error)
        self.owner, at = block(self.sizes.attention)
        self.handle = C.c_void_p()
        check(self.lib.based_taylor_init(C.byref(self.handle), C.byref(self.kind), at,
                                         self.sizes.attention, C.byref(error)),
              error)
        self.scratch, self.scratch_at = block(self.sizes.scratch)

    def array(self, x):
        return np.ascontiguousarray(x, self.number)

    def state(self):
        return State(self)


class State:
    def __init__(self, attention):
        self.t, self.lib, self.handle, error = attention, attention.lib, C.c_void_p(), Error()
        self.owner, at = block(attention.sizes.state)
        check(self.lib.based_taylor_state_init(C.byref(self.handle), attention.handle, at,
                                               attention.sizes.state, attention.scratch_at,
                                               attention.sizes.scratch, C.byref(error)), error)

    def add(self, k, v):
        k, v = self.t.array(k), self.t.array(v)
        assert k.shape[1:] == (self.t.kind.head_dim_k,)
        assert v.shape == (len(k), self.t.kind.head_dim_v)
        self.lib.based_taylor_add(self.handle, k.ctypes.data, v.ctypes.data, len(k))
        return self

    def room(self, q):
        """(queries [n, group, head_dim_k], room for what they read)."""
        q = self.t.array(q).reshape(-1, self.t.kind.group, self.t.kind.head_dim_k)
        return q, np.full((*q.shape[:2], self.t.kind.head_dim_v), np.nan, self.t.number)

    def read(self, q):
        q, y = self.room(q)
        self.lib.based_taylor_read(self.handle, q.ctypes.data, len(q), y.ctypes.data)
        return y

    def feed(self, q, k, v):
        (q, y), k, v = self.room(q), self.t.array(k), self.t.array(v)
        self.lib.based_taylor_feed(self.handle, q.ctypes.data, k.ctypes.data, v.ctypes.data, len(q),
                                   y.ctypes.data)
        return y

    def subtract(self, k, v):
        k, v, error = self.t.array(k), self.t.array(v), Error()
        check(self.lib.based_taylor_subtract(self.handle, k.ctypes.data, v.ctypes.data,
                                             C.byref(error)), error)
        return self

    def copy_from(self, other):
        error = Error()
        check(self.lib.based_taylor_copy(self.handle, other.handle, C.byref(error)), error)
        return self

    def merge(self, other):
        error = Error()
        check(self.lib.based_taylor_merge(self.handle, other.handle, C.byref(error)), error)
        return self

    def reset(self):
        self.lib.based_taylor_reset(self.handle)

    def count(self):
        return self.lib.based_taylor_count(self.handle)


def causal_poly(q1, q2, q3, v3, double=False, eps=1e-6, **kind):
    """The order-2 poly attention of taylor-series-linear-attention 0.2.0, causal, which the
    original is not: token i sums over all j <= i and k <= j. q1, q2, q3 [n, d] normed and
    rotated as there, v3 [n, e] -> y [n, e]. Two states of constant size: the first is read with
    q2 and gives the message of token j and, by a column of ones, its mass; both are values of
    the second."""
    first, second = (Taylor(double, head_dim_k=q1.shape[1], head_dim_v=v3.shape[1] + 1,
                            normalizer=ONE, **kind).state()
                     for _ in range(2))
    messages = first.feed(q2, q3, np.concatenate([v3, np.ones((len(v3), 1))], 1))[:, 0]
    y = second.feed(q1, q2, messages)[:, 0]
    return y[:, :-1] / (y[:, -1:] + eps)


# --------------------------------------------------------------------------------------------------
# From the definition, in float64, with the whole table of weights. Interchangeable with through_c:
# both take q [n, H, d], k [m, Hk, d], v [m, Hk, e] and give y [n, H, e].

def weights(q, k, kind):
    """[n, m] weights of queries and keys of one head."""
    a = kind.get("coefficients", [[1 / math.factorial(p) for p in range(kind["degree"] + 1)]])[0]
    if kind.get("kernel", DOT) == DIAGONAL:
        s = kind.get("scale", 1.0) * q[:, None, :] * k[None]
        return a[0] + sum(a[p] * (s ** p).sum(-1) for p in range(1, len(a)))
    s = kind.get("scale", 1.0) * (q @ k.T)
    return sum(a[p] * s ** p for p in range(len(a)))


def by_definition(q, k, v, kind, causal, mask=None, condition=None):
    """condition: a list that receives, per head, sum |w| / |denominator| of each query: how much it
    magnifies rounding."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    y = np.zeros((len(q), q.shape[1], v.shape[2]))
    eps, normalizer = kind.get("normalizer_eps", 0.0), kind.get("normalizer", ADD)
    for h in range(q.shape[1]):
        kv = h * k.shape[1] // q.shape[1]
        w = weights(q[:, h], k[:, kv], kind)
        w = np.tril(w) if causal else w
        w = w if mask is None else w * mask
        z = w.sum(1, keepdims=True)
        z = z + eps if normalizer == ADD else np.maximum(z, eps) if normalizer == CLAMP else z
        with np.errstate(divide="ignore", invalid="ignore"):
            y[:, h] = w @ v[:, kv] / (1 if normalizer == ONE else z)
            if condition is not None:
                condition.append(np.abs(w).sum(1) / np.abs(z[:, 0]))
        if normalizer == RAW:
            y[:, h] = np.nan_to_num(y[:, h], nan=0.0, posinf=FLT_MAX, neginf=-FLT_MAX)
    return y


def through_c(q, k, v, kind, causal, mask=None, double=False):
    heads, shared = q.shape[1], q.shape[1] // k.shape[1]
    attention = Taylor(double, head_dim_k=q.shape[2], head_dim_v=v.shape[2], group=shared, **kind)
    y = np.zeros((len(q), heads, v.shape[2]), attention.number)
    for kv in range(k.shape[1]):
        queries = q[:, kv * shared:(kv + 1) * shared]
        state = attention.state()
        if causal:
            y[:, kv * shared:(kv + 1) * shared] = state.feed(queries, k[:, kv], v[:, kv])
        else:
            rows = slice(None) if mask is None else np.asarray(mask, bool)
            y[:, kv * shared:(kv + 1) * shared] = state.add(k[rows, kv], v[rows, kv]).read(queries)
    return y


# --------------------------------------------------------------------------------------------------
# The layers of others around it. attend: by_definition or through_c.

def golden(name):
    """The cases of a golden file: a list of (title, {name: array})."""
    cases, lines = [], iter((GOLDEN / name).read_text().splitlines())
    for line in lines:
        if line.startswith("CASE "):
            cases.append((line[5:], {}))
        elif line.strip():
            key, *shape = line.split()
            values = np.array(next(lines).split(), np.float64)
            cases[-1][1][key] = values.reshape([int(n) for n in shape])
    return cases


def rotated(x, frequencies):
    """x [n, heads, width]: the interleaved pairs of each head, rotated by position times frequency
    (a float32 product)."""
    angle = (np.arange(len(x), dtype=np.float32)[:, None]
             * frequencies.astype(np.float32)).astype(np.float64)
    cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]
    a, b, y = x[..., 0::2], x[..., 1::2], np.array(x, np.float64)
    y[..., 0::2], y[..., 1::2] = a * cos - b * sin, b * cos + a * sin
    return y


def lucidrains(w, x, heads, attend, causal=False, context=None, mask=None, shift=False):
    """The attention layer of taylor-series-linear-attention from its state dict w:
    x [n, dim] -> [n, dim]."""
    dim = x.shape[1]
    if shift:
        kept = dim - dim // 2
        previous = np.concatenate([np.zeros((1, dim - kept)), x[:-1, kept:]])
        x = np.concatenate([x[:, :kept], previous], 1)
    normed = x
    if "norm.gamma" in w:
        length = np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
        normed = x / length * math.sqrt(dim) * w["norm.gamma"]
    width = len(w["to_q.0.weight"]) // heads
    q = (normed @ w["to_q.0.weight"].T).reshape(len(x), heads, width)
    k, v = np.split((normed if context is None else context) @ w["to_kv.0.weight"].T, 2, axis=1)
    k, v = (part.reshape(len(part), -1, width) for part in (k, v))
    if "rotary_emb.freqs" in w:
        q, k = rotated(q, w["rotary_emb.freqs"]), rotated(k, w["rotary_emb.freqs"])
    kind = {"degree": 2, "scale": width ** -0.5, "normalizer": CLAMP, "normalizer_eps": 1e-5}
    y = np.asarray(attend(q, k, v, kind, causal, mask), np.float64)
    if "to_v_gates.0.weight" in w:
        y = y / (1 + np.exp(-(x @ w["to_v_gates.0.weight"].T)))[..., None]
    y = y.reshape(len(x), -1)
    return y @ w["to_out.0.weight"].T if "to_out.0.weight" in w else y


def edifice(w, x, heads, order, attend, causal=False):
    """Edifice.Attention.Based from its tensors (keys with a dot): x [n, input] -> [n, hidden], all
    positions."""
    def dense(name, x):
        return x @ w[name + ".kernel"] + w[name + ".bias"]

    def norm(name, x):
        x = x - x.mean(1, keepdims=True)
        x = x / np.sqrt((x * x).mean(1, keepdims=True) + 1e-5)
        return x * w[name + ".gamma"] + w[name + ".beta"]

    if "input_projection.kernel" in w:
        x = dense("input_projection", x)
    for i in range(1, 1 + sum("attn_norm.gamma" in name for name in w)):
        block = f"based_block_{i}_"
        a = norm(block + "attn_norm", x)
        q, k, v = (dense(f"{block}attn_{part}_proj", a).reshape(len(x), heads, -1)
                   for part in "qkv")
        kind = {"degree": order, "kernel": DIAGONAL, "normalizer": ADD, "normalizer_eps": 1e-6}
        y = np.asarray(attend(q, k, v, kind, causal), np.float64)
        x = x + dense(block + "attn_out_proj", y.reshape(len(x), -1))
        up = dense(block + "ffn_up", norm(block + "ffn_norm", x))
        gelu = 0.5 * up * (1 + np.vectorize(math.erf)(up / math.sqrt(2)))
        x = x + dense(block + "ffn_down", gelu)
    return norm("final_norm", x)
