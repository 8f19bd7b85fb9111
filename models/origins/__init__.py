"""What every origin shares: the records of based.h part 7, tensors by name, and the steps that
bring weights into the form of based.c.

An origin is a file beside this one. It knows one kind of model and nothing of the others:

    read(source, options, note) -> (config, layers, plan)

source is a Source, or a path for a format of its own. options are those of the command line, and
note(text) tells the user what had to be assumed. config is a record CONFIG, layers is a list of
records LAYER, and plan maps the name of each tensor of part 7 to its Rows, or to a function without
arguments that returns its array, so that no more than one tensor is ever in memory, and of a large
one only a part. What cannot be reproduced exactly raises Refused. FIELDS lists all that an origin
reads besides the tensors, with the value that counts where nothing is given; None means that it
follows from the tensors, or must be given.

These pieces are here and not in export.py because export.py usually runs as the program: a module
that imported it would get a second copy of it, with another class Refused that nobody catches.
Imports go one way only: export.py -> an origin -> this file.
"""
import json
import math
import re
import struct
import sys
import zlib
from decimal import Decimal, localcontext
from fractions import Fraction
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np

# ---- The records of based.h part 7, and the numbers in them.

NONE = 0xFFFFFFFF
CHUNK = 16                                  # tokens that are flushed together, unless --chunk says
TIED, HEAD_BIAS, INPUT_PROJECTION, BIDIRECTIONAL, SAMPLING = 1, 2, 4, 8, 16
NORM_NONE, NORM_RMS, NORM_LAYER, NORM_L2 = 0, 1, 2, 3
MIXER_NONE, CONV, TAYLOR, WINDOW = 0, 1, 2, 3
MLP_NONE, SWIGLU, GELU, GELU_TANH = 0, 1, 2, 3
DOT, DIAGONAL, HEDGEHOG = 0, 1, 2
ADD, CLAMP, RAW, ONE = 0, 1, 2, 3
FADING_NONE, GATED, FIXED = 0, 1, 2
(IN_BIAS, OUT_BIAS, CONV_BIAS, UP_BIAS, DOWN_BIAS, VALUE_GATES, SHIFT, NO_OUT, NO_RESIDUAL,
 KEY_MEAN, QK_NORM, PREFIX, VALUE_FACTORS) = (1 << i for i in range(13))


class Refused(ValueError):
    """Something the user gave cannot be used; the text is the one line they read."""


class Record:
    """A fixed struct of the header, described by "name:code ..." with the codes of `struct`; a name
    without a code is a uint32."""

    def __init__(self, text):
        self.names, _, codes = zip(*(item.partition(":") for item in text.split()))
        self.codes = "<" + "".join(code or "I" for code in codes)

    def new(self, **some):
        """A namespace of all fields: those given, the rest zero."""
        fields = self.unpack(bytes(struct.calcsize(self.codes)))
        assert some.keys() <= set(self.names), some
        fields.__dict__.update(some)
        return fields

    def pack(self, fields):
        return struct.pack(self.codes, *(getattr(fields, name) for name in self.names))

    def unpack(self, data):
        return SimpleNamespace(**dict(zip(self.names, struct.unpack(self.codes, data))))


CONFIG = Record("""magic:8s format byte_order file_size:Q checksum:Q flags dim layers vocab rows
    input embedding_dtype head_dtype final_norm final_norm_eps:f tokenizer_bytes context name:64s
    prefix temperature:f top_p:f top_k min_p:f repeat_penalty:f repeat_last_n reserved:84s""")
LAYER = Record("""mixer flags norm1 norm2 norm1_eps:f norm2_eps:f heads kv_heads head_dim_k
    head_dim_v conv_width window chunk degree kernel normalizer normalizer_eps:f scale:f rope_pairs
    mlp hidden_dim in_dtype out_dtype up_dtype down_dtype sinks decay:f fading
    reserved:16s""")


# ---- What is read of an origin.

class Settings:
    """The fields of a config.json, or of a group of fields in it. Only those in `fields` (name ->
    default of the original) can be asked for. prefix: what stands before a name in messages."""

    def __init__(self, values, fields, prefix=""):
        self.values, self.fields, self.prefix = values, fields, prefix

    def group(self, name, fields):
        """The Settings of a group; without any values if it is absent or null."""
        values = self.get(name) or {}
        if not isinstance(values, dict):
            raise Refused(f"{self.said(name)}, expected an object")
        return Settings(values, fields, f"{self.prefix}{name}.")

    def get(self, name):
        """The value of a field as the file has it, or its default."""
        return self.values.get(name, self.fields[name])

    def said(self, name):
        """What get() finds, for messages."""
        return (f"config.json: {self.prefix}{name} = {json.dumps(self.get(name))}"
                + ("" if name in self.values else " (the default, since it is absent)"))

    def number(self, name, default=None, kind=int, least=1e-30, most=1e9):
        """The same for a field that must be a number of this kind, from least to most. default: the
        value where it is absent, if that is not a constant."""
        if default is not None and name not in self.values:
            return default
        value = self.get(name)
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not number or not least <= value < most or value != kind(value):
            raise Refused(f"{self.said(name)}, expected a {'positive ' if least > 0 else ''}number")
        return kind(value)


class Rows:
    """A tensor that is read when it is needed, a part at a time. rows[begin:end] is the array of
    these rows, which read(begin, end) reads; rows() is the whole."""

    def __init__(self, shape, read):
        self.shape, self.read = tuple(shape), read

    def __getitem__(self, rows):
        return self.read(rows.start, rows.stop)

    def __call__(self):
        return self[0:self.shape[0]]

    def pieces(self, size=1 << 20):
        """(begin, end) of all rows in pieces of about so many numbers, whole blocks of 64 rows."""
        step = max(64, size // max(1, math.prod(self.shape[1:])) // 64 * 64)
        return [(at, min(at + step, self.shape[0])) for at in range(0, self.shape[0], step)]


def stacked(parts):
    """The Rows of several Rows one below the other."""
    starts = np.cumsum([0] + [part.shape[0] for part in parts]).tolist()

    def read(begin, end):
        return np.concatenate([part[max(begin - at, 0):min(end - at, part.shape[0])]
                               for part, at in zip(parts, starts)
                               if begin < at + part.shape[0] and at < end])
    return Rows((starts[-1], *parts[0].shape[1:]), read)


def equal(one, two):
    """Do these Rows of one shape hold the same?"""
    return all(np.array_equal(one[a:b], two[a:b]) for a, b in one.pieces())


def random_rows(name, shape, seed, scale):
    """The Rows of a random tensor: vectors are 1, biases 0; else normally distributed numbers times
    scale / sqrt(columns). They follow from name and seed, whichever rows are read first."""
    number, scale = zlib.crc32(name.encode()), np.float32(scale / math.sqrt(shape[-1]))

    def read(begin, end):
        if len(shape) == 1:
            return np.full(end - begin, 0.0 if name.endswith("bias") else 1.0, np.float32)
        blocks = [np.random.default_rng([seed, number, block]).standard_normal(
            (64, *shape[1:]), np.float32) for block in range(begin // 64, -(-end // 64))]
        return np.concatenate(blocks)[begin % 64:begin % 64 + end - begin] * scale
    return Rows(shape, read)


# What torch.compile and wrappers for several devices put into names.
WRAPPERS = r"^(module\.)+|\b(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."


class Source:
    """The tensors of an origin by name, and its settings. shapes: {name: tuple}; load(name, begin,
    end) returns these rows, a float32 array; where: the path, for errors; settings: its
    config.json, or {}; unusable: {name: how it is stored}, of tensors whose numbers cannot be
    read."""

    def __init__(self, shapes, load, where, settings={}, unusable={}):
        self.shapes, self.load, self.where, self.settings = shapes, load, where, settings
        self.unusable, self.claimed = unusable, set()

    def __contains__(self, name):
        return name in self.shapes

    def renamed(self, rename):
        """The same tensors under other names. rename(old) -> new, or None for one to leave out."""
        old = {}
        for name in self.shapes:
            new = rename(re.sub(WRAPPERS, "", name))
            if new in old:
                raise Refused(f"{self.where} holds {new} twice, as {old[new]} and as {name}")
            if new is not None:
                old[new] = name
        return Source({new: self.shapes[name] for new, name in old.items()},
                      lambda new, *rows: self.load(old[new], *rows), self.where, self.settings,
                      {new: self.unusable[name] for new, name in old.items()
                       if name in self.unusable})

    def shape(self, name, *expected):
        """The shape of a tensor, which must be there. expected: its sizes, None for any but 0."""
        if name not in self.shapes:
            raise Refused(f"{self.where} lacks the tensor {name}")
        shape = tuple(self.shapes[name])
        if len(shape) != len(expected) or not all(n if e is None else n == e
                                                  for n, e in zip(shape, expected)):
            sizes = ", ".join("any" if e is None else str(e) for e in expected)
            raise Refused(f"{self.where}: {name} has shape {list(shape)}, expected [{sizes}]")
        return shape

    def take(self, name, *expected):
        """Claims a tensor of this shape (see shape); returns its Rows."""
        shape = self.shape(name, *expected)
        if name in self.unusable:
            raise Refused(f"{self.where} holds {name} as {self.unusable[name]}")
        self.claimed.add(name)
        return Rows(shape, partial(self.load, name))


class Model:
    """What an origin becomes, while it is read: config, layers and plan. ours: the name of a tensor
    in part 7, theirs: in the source. Once layer() was called, both are names inside that layer."""

    def __init__(self, source, **config):
        self.source, self.config, self.layers, self.plan = source, CONFIG.new(**config), [], {}
        self.ours = self.theirs = ""

    def layer(self, theirs, norm, eps, **fields):
        """Begins a layer whose tensors begin with `theirs`, and returns its record. norm, eps: of
        both norms."""
        self.ours, self.theirs = f"layers.{len(self.layers)}.", theirs
        l = LAYER.new(norm1=norm, norm2=norm, norm1_eps=eps, norm2_eps=eps, **fields)
        self.layers.append(l)
        return l

    def __contains__(self, theirs):
        return self.theirs + theirs in self.source

    def shape(self, theirs, *expected):
        """See Source.shape."""
        return self.source.shape(self.theirs + theirs, *expected)

    def load(self, theirs, *expected):
        """See Source.take."""
        return self.source.take(self.theirs + theirs, *expected)

    def put(self, ours, load):
        """Tensor `ours` is `load`: Rows, or a function that returns its array."""
        self.plan[self.ours + ours] = load

    def norm(self, ours, theirs, names):
        """The weight (dim) of a norm, and its bias (dim) if there are two names for them."""
        for mine, name in zip((".weight", ".bias"), names):
            self.put(ours + mine, self.load(theirs + name, self.config.dim))

    def linear(self, flag, ours, parts, cols, order=None):
        """One matrix (rows, cols): the rows of matrices (name, rows) one below the other, put in
        another order by order(array) if it is given. Likewise their biases, if they have any and
        flag (of the layer) is not 0."""
        kinds = [(".weight", [cols])]
        if flag and parts[0][0] + ".bias" in self:
            kinds.append((".bias", []))
            self.layers[-1].flags |= flag
        for kind, shape in kinds:
            rows = stacked([self.load(name + kind, rows, *shape) for name, rows in parts])
            self.put(ours + kind, (lambda rows=rows: order(rows())) if order else rows)

    def taylor(self, l, row=None):
        """The coefficients (heads, degree + 1): of each head `row`, or the series of exp, 1/p!."""
        row = row or [1 / math.factorial(p) for p in range(l.degree + 1)]
        self.put("coefficients", lambda: np.tile(np.float32(row), (l.heads, 1)))

    def done(self):
        """What read() returns; refused if a tensor of the source is left that nothing has taken."""
        names = sorted(set(self.source.shapes) - self.source.claimed)
        if names:
            raise Refused(f"{self.source.where} holds {len(names)} tensors that no known layer "
                          f"uses, the first is {names[0]}")
        return self.config, self.layers, self.plan


# ---- Files.

# What a download can be in place of the file: how it begins, and what it is.
NO_FILES = {b"version https://git-lfs": "a pointer of Git LFS: run git lfs pull, or download the "
                                        "file itself",
            b"<!doctype": "a web page: download the file itself",
            b"<html": "a web page: download the file itself"}


def first_bytes(path):
    """The first bytes of a file, by which it is recognized, without a byte order mark."""
    with open(path, "rb") as f:
        start = f.read(64).removeprefix(b"\xef\xbb\xbf")
    for begin, what in NO_FILES.items():
        if start.lstrip().lower().startswith(begin):
            raise Refused(f"{path} is {what}")
    return start


def read_json(path):
    """The object in a JSON file, a dict. A byte order mark is no part of it."""
    first_bytes(path)
    try:
        value = json.loads(Path(path).read_bytes())
    except (ValueError, RecursionError) as e:
        raise Refused(f"{path} is no valid JSON: {e}") from None
    if not isinstance(value, dict):
        raise Refused(f"{path} should hold a JSON object")
    return value


# ---- RoPE. In based.c the partner of row i of a head is row i + head_dim_k / 2, and frequencies
#      are 64-bit fractions of a whole turn, so that an angle is exact at any position.

def frequencies(pairs, width, base=10000.0):
    """(pairs) float32: 1 / base^(2i/width), each step rounded to float32, as the models were
    trained; the rounding is exact here (decimal, not libm), so that every machine writes the same
    file."""
    base, found = Decimal(float(np.float32(base))), []
    with localcontext() as context:
        context.prec = 50
        for i in range(pairs):
            exponent = np.float32(2 * i) / np.float32(width)
            found.append(np.float32(1) / np.float32(float(base ** Decimal(float(exponent)))))
    return np.array(found, np.float32)


def rope_freq(pairs, width, base=10000.0):
    """The table rope_freq of part 7 for these frequencies."""
    return fractions_of_a_turn(frequencies(pairs, width, base))


def fractions_of_a_turn(frequencies):
    """(pairs) uint64: 2^64 * frequency / 2 pi, without whole turns, from radians per token."""
    two_pi = 2 * Fraction("3.14159265358979323846264338327950288419716939937510582097494459")
    return np.array([round(Fraction(float(f)) * 2**64 / two_pi) % 2**64 for f in frequencies],
                    np.uint64)


def half_split(width, pairs, interleaved):
    """The order of one head's rows that puts the partner of row i at i + width / 2, for `pairs` of
    them; the rest follow. interleaved: in the origin, partners are neighbors (2i, 2i + 1); else
    (i, pairs + i)."""
    step, second = (2, 1) if interleaved else (1, pairs)
    first = [step * i for i in range(pairs)]
    rest = list(range(2 * pairs, width))
    half = width // 2 - pairs
    return first + rest[:half] + [second + i for i in first] + rest[half:]


def by_head(l, whole, order):
    """whole: the rows (or biases) of q, k, v of layer l. Those of each head of q and k are put in
    `order`."""
    heads = l.heads + l.kv_heads
    qk, v = np.split(whole, [heads * l.head_dim_k])
    return np.concatenate([qk.reshape(heads, l.head_dim_k, -1)[:, order].reshape(qk.shape), v])


def progress(items, what, unit="tensor"):
    """items, with a bar on stderr when a person is watching and tqdm is installed."""
    try:
        from tqdm import tqdm
    except ImportError:
        return items
    return tqdm(items, desc=what, unit=unit, leave=False, disable=not sys.stderr.isatty())
