#!/usr/bin/env python3
"""Turns a trained model into one checkpoint file for based.c.

The format and the mathematics are written down in based.h, part 7. This file is the bridge: it reads what others wrote
(HazyResearch/based directories, llama2.c checkpoints, layers of taylor-series-linear-attention, Edifice models), brings every
origin into that one form, and checks the result.

    1. the format      header fields, dtypes, the list of tensors in file order, the checksum
    2. writing         one tensor at a time, verified by reading back, put in place by a rename
    3. origins         one function per origin: what the model is, and where each of our tensors comes from
    4. tokenizers      the tokenizer section
    5. the command line
"""
import argparse
import json
import lzma
import math
import os
import re
import signal
import struct
import sys
from collections import namedtuple
from dataclasses import dataclass, field
from decimal import Decimal, localcontext
from fractions import Fraction
from types import SimpleNamespace

import numpy as np

# ----------------------------------------------------------------------------------------------------------------------
# 1. The format.

MAGIC, FORMAT, BYTE_ORDER, NONE = b"BASED\r\n\032", 2, 0x01020304, 0xFFFFFFFF
CONFIG_BYTES, LAYER_BYTES, ALIGN = 256, 128, 64

TIED, HEAD_BIAS, INPUT_PROJECTION, BIDIRECTIONAL = 1, 2, 4, 8
NORMS = NORM_NONE, NORM_RMS, NORM_LAYER, NORM_L2 = 0, 1, 2, 3
MIXERS = MIXER_NONE, CONV, TAYLOR, WINDOW = 0, 1, 2, 3
MLP_NONE, SWIGLU, GELU = 0, 1, 2
DOT, DIAGONAL = 0, 1
ADD, CLAMP, RAW, ONE = 0, 1, 2, 3
IN_BIAS, OUT_BIAS, TAPS_BIAS, UP_BIAS, DOWN_BIAS, VALUE_GATES, SHIFT, NO_OUT, NO_RESIDUAL, KEY_MEAN = (
    1 << i for i in range(10))

CONFIG_FIELDS = """magic:8s format:I byte_order:I file_size:Q checksum:Q flags:I dim:I layers:I vocab:I rows:I input:I
    embedding_dtype:I head_dtype:I final_norm:I final_norm_eps:f tokenizer_bytes:I context:I name:64s reserved:112s"""
LAYER_FIELDS = """mixer:I flags:I norm1:I norm2:I norm1_eps:f norm2_eps:f heads:I kv_heads:I key_width:I value_width:I
    taps:I window:I chunk:I degree:I kernel:I normaliser:I normaliser_eps:f scale:f rotary:I mlp:I hidden:I in_dtype:I
    out_dtype:I up_dtype:I down_dtype:I keep:I forget:f reserved:20s"""


class Refused(Exception):
    """Something the user gave cannot be used; the text is the one line they read."""


class Record:
    """A fixed struct of the header: pack(fields) -> bytes, unpack(bytes) -> fields, new(**some) -> fields, rest zero."""

    def __init__(self, text):
        pairs = [item.split(":") for item in text.split()]
        self.names = [name for name, _ in pairs]
        self.codes = "<" + "".join(code for _, code in pairs)

    def new(self, **some):
        fields = dict(zip(self.names, struct.unpack(self.codes, bytes(struct.calcsize(self.codes)))))
        assert some.keys() <= fields.keys(), some.keys() - fields.keys()
        return SimpleNamespace(**{**fields, **some})

    def pack(self, fields):
        return struct.pack(self.codes, *(getattr(fields, name) for name in self.names))

    def unpack(self, data):
        return SimpleNamespace(**dict(zip(self.names, struct.unpack(self.codes, data))))


CONFIG, LAYER = Record(CONFIG_FIELDS), Record(LAYER_FIELDS)

# How numbers lie in the file. nbytes(shape); pack(array) -> bytes-like; unpack(bytes, shape) -> array as stored.
Dtype = namedtuple("Dtype", "name nbytes pack unpack")


def plain(name, code):
    """A dtype that stores each number by itself, little-endian."""
    kind = np.dtype(code)
    return Dtype(name, lambda shape: math.prod(shape) * kind.itemsize,
                 lambda array: np.ascontiguousarray(array, kind),
                 lambda data, shape: np.frombuffer(data, kind).reshape(shape))


def bfloat16_up(x):
    """The smallest bfloat16 >= x, for x >= 0, as uint16 bits: rounding a scale up keeps every weight within its range."""
    return ((x.astype(np.float32).view(np.uint32).astype(np.uint64) + 0xFFFF) >> 16).astype(np.uint16)


def bfloat16(x):
    """The nearest bfloat16, as uint16 bits."""
    bits = x.astype(np.float32).view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def as_float(bits):
    return (bits.astype(np.uint32) << 16).view(np.float32)


def quantised(name, bits, choose):
    """A dtype of based.h part 7 with `bits` per weight. choose(groups) -> scales: one per row and group, as bfloat16."""
    middle, width, block = 1 << (bits - 1), 8 * bits, 32  # what is added to a weight; columns of a group, and filled up to

    def sizes(shape):
        """Tiles, groups, and columns that are stored."""
        return -(-shape[0] // 16), -(-shape[1] // width), -(-shape[1] // block) * block

    def nbytes(shape):
        tiles, groups, columns = sizes(shape)
        return align(tiles * groups * 32) + tiles * 16 * columns * bits // 8

    def pack(array):
        tiles, groups, columns = sizes(array.shape)
        t = np.zeros((tiles * 16, groups * width), np.float32)
        t[:array.shape[0], :array.shape[1]] = array
        t = t.reshape(tiles, 16, groups, width)
        scales = choose(t)
        scales = np.where(np.abs(as_float(scales)) < 2.0 ** -82, np.uint16(0), scales)         # such weights are nothing
        values = rounded(t, as_float(scales)[..., None], 1 - middle if bits == 8 else -middle, middle - 1) + middle
        values = values.astype(np.uint8).reshape(tiles, 16, -1)[..., :columns].reshape(tiles, 16, -1, 32 // bits)
        if bits == 4:                                     # the columns of each word
            values = values[..., :4] | values[..., 4:] << 4
        scales = scales.swapaxes(1, 2).astype("<u2").tobytes()
        return np.frombuffer(scales + bytes(align(len(scales)) - len(scales)) + values.swapaxes(1, 2).tobytes(), np.uint8)

    def unpack(data, shape):
        tiles, groups, columns = sizes(shape)
        scales = np.frombuffer(data[:tiles * groups * 32], "<u2").reshape(tiles, groups, 16).swapaxes(1, 2)
        values = np.frombuffer(data[align(tiles * groups * 32):], np.uint8).reshape(tiles, -1, 16, 4).swapaxes(1, 2)
        if bits == 4:
            values = np.concatenate([values & 15, values >> 4], axis=-1)
        each = np.repeat(as_float(scales).reshape(tiles * 16, groups), width, axis=1)[:, :columns]
        return ((values.reshape(tiles * 16, columns).astype(np.float32) - middle) * each)[:shape[0], :shape[1]]

    return Dtype(name, nbytes, pack, unpack)


def rounded(t, step, low, high):
    """t in whole steps, halves to even, within low .. high; 0 where the step is 0."""
    return np.clip(np.rint(np.divide(t, step, out=np.zeros_like(t), where=step != 0)), low, high).astype(np.int16)


def largest(t):
    """8 bits: the scale with which the largest weight of the group becomes 127."""
    return bfloat16_up(np.abs(t).max(-1) / np.float32(127))


def least_error(t):
    """4 bits: of many scales, the one with the smallest squared error. The range is -8 .. 7, so that the sign of the scale
    matters too: the largest weight may take the longer side."""
    extreme = np.take_along_axis(t, np.abs(t).argmax(-1)[..., None], -1)[..., 0]
    best, least = np.zeros(extreme.shape, np.uint16), np.full(extreme.shape, np.inf, np.float32)
    for levels in (-8.6, -8.3, -8, -7.7, -7.4, -7.1, -6.8, -6.5, -6.2, -5.9, 5.6, 6.2, 6.5, 6.8, 7, 7.3, 7.6):
        bits = bfloat16(extreme / np.float32(levels))
        error = np.square(rounded(t, as_float(bits)[..., None], -8, 7) * as_float(bits)[..., None] - t).sum(-1)
        best, least = np.where(error < least, bits, best), np.minimum(error, least)
    return best


F32, U64 = plain("f32", "<f4"), plain("u64", "<u8")
# The number in the header -> how a matrix is stored.
DTYPES = {0: F32, 1: quantised("q8", 8, largest), 2: quantised("q4", 4, least_error)}
DTYPE_CODES = {dtype.name: code for code, dtype in DTYPES.items()}

Tensor = namedtuple("Tensor", "name shape dtype")
Placed = namedtuple("Placed", "name shape dtype offset nbytes")


def tensors(config, layers):
    """Yields every tensor of a checkpoint in file order. The writer, the reader and --inspect all follow this list."""
    dim = config.dim

    def norm(name, kind):
        if kind != NORM_NONE:
            yield Tensor(name + ".weight", (dim,), F32)
        if kind == NORM_LAYER:
            yield Tensor(name + ".bias", (dim,), F32)

    def linear(name, rows, cols, dtype, bias):
        yield Tensor(name + ".weight", (rows, cols), DTYPES[dtype])
        if bias:
            yield Tensor(name + ".bias", (rows,), F32)

    if config.input == 0:
        yield Tensor("embedding", (config.rows, dim), DTYPES[config.embedding_dtype])
    if config.flags & INPUT_PROJECTION:
        yield from linear("input", dim, config.input, 0, True)
    for i, l in enumerate(layers):
        name = f"layers.{i}."
        inner = l.heads * l.value_width
        yield from norm(name + "norm1", l.norm1)
        if l.mixer == CONV:
            yield from linear(name + "in", 2 * inner, dim, l.in_dtype, l.flags & IN_BIAS)
            yield Tensor(name + "taps", (l.taps, inner), F32)
            if l.flags & TAPS_BIAS:
                yield Tensor(name + "taps.bias", (inner,), F32)
        elif l.mixer in (TAYLOR, WINDOW):
            rows = l.heads * l.key_width + l.kv_heads * (l.key_width + l.value_width)
            yield from linear(name + "in", rows, dim, l.in_dtype, l.flags & IN_BIAS)
            if l.rotary:
                yield Tensor(name + "turns", (l.rotary,), U64)
            if l.flags & KEY_MEAN:
                yield Tensor(name + "key_mean", (l.kv_heads, l.key_width), F32)
            if l.mixer == TAYLOR:
                yield Tensor(name + "coefficients", (l.heads, l.degree + 1), F32)
            if l.flags & VALUE_GATES:
                yield Tensor(name + "gate.weight", (l.heads, dim), F32)
        if l.mixer != MIXER_NONE and not l.flags & NO_OUT:
            yield from linear(name + "out", dim, inner, l.out_dtype, l.flags & OUT_BIAS)
        yield from norm(name + "norm2", l.norm2)
        if l.mlp != MLP_NONE:
            up = 2 * l.hidden if l.mlp == SWIGLU else l.hidden
            yield from linear(name + "up", up, dim, l.up_dtype, l.flags & UP_BIAS)
            yield from linear(name + "down", dim, l.hidden, l.down_dtype, l.flags & DOWN_BIAS)
    yield from norm("final_norm", config.final_norm)
    if config.rows and not config.flags & TIED:
        yield Tensor("head.weight", (config.rows, dim), DTYPES[config.head_dtype])
    if config.flags & HEAD_BIAS:
        yield Tensor("head.bias", (config.rows,), F32)


def align(offset):
    return -(-offset // ALIGN) * ALIGN


def layout(config, layers):
    """Where everything lies: (list of Placed, file size). Every section begins at a multiple of 64."""
    end = CONFIG_BYTES + LAYER_BYTES * len(layers)
    if config.tokenizer_bytes:
        end = align(end) + config.tokenizer_bytes
    placed = []
    for t in tensors(config, layers):
        placed.append(Placed(*t, align(end), t.dtype.nbytes(t.shape)))
        end = placed[-1].offset + placed[-1].nbytes
    return placed, end


class Checksum:
    """based_checksum of part 7, fed piece by piece. A lane is a polynomial in K, so many rows are one product with powers
    of K instead of a loop."""
    LANES, K, ROWS = 16, 0x9E3779B1, 1 << 14

    def __init__(self):
        self.lanes = np.arange(1, self.LANES + 1, dtype=np.uint32)
        self.powers = np.cumprod([1] + [self.K] * self.ROWS, dtype=np.uint32)[::-1]
        self.rest, self.n = b"", 0

    def update(self, data):
        data = memoryview(data).cast("B")
        self.n += len(data)
        step = 4 * self.LANES * (self.ROWS - 1)           # with the rest at most ROWS rows
        for at in range(0, len(data), step):
            piece = self.rest + bytes(data[at:at + step])
            rows = len(piece) // (4 * self.LANES)
            words = np.frombuffer(piece, "<u4", rows * self.LANES).reshape(rows, self.LANES)
            powers = self.powers[self.ROWS - rows:]
            self.lanes = self.lanes * powers[0] + (words * powers[1:, None]).sum(0, dtype=np.uint32)
            self.rest = piece[rows * 4 * self.LANES:]

    def value(self):
        h = [int(lane) for lane in self.lanes]
        for lane, (word,) in enumerate(struct.iter_unpack("<I", self.rest + bytes(-len(self.rest) % 4))):
            h[lane] = h[lane] * self.K + word & 0xFFFFFFFF
        g = self.n
        for lane in h:
            g = (g ^ lane) * 0x9E3779B97F4A7C15 & (1 << 64) - 1
            g ^= g >> 32
        return g


# ----------------------------------------------------------------------------------------------------------------------
# 2. Writing and reading.

def progress(items, what, unit="tensor"):
    """A bar on stderr over items, when a person is watching."""
    from tqdm import tqdm
    return tqdm(items, desc=what, unit=unit, leave=False, disable=not sys.stderr.isatty())


def write(path, config, layers, tokenizer, fetch):
    """Writes a checkpoint. fetch(name) -> array (see stored), called once per tensor to write and once to verify, so that no
    more than one tensor is in memory. The file appears at `path` whole and verified, or `path` stays as it was."""
    config.magic, config.format, config.byte_order = MAGIC, FORMAT, BYTE_ORDER
    config.layers, config.tokenizer_bytes = len(layers), len(tokenizer)
    placed, config.file_size = layout(config, layers)
    temporary = f"{path}.{os.getpid()}.part"
    try:
        with open(temporary, "wb") as f:
            total = Checksum()

            def put(data, offset):
                """Zeros up to offset, then data; everything but the first 32 bytes goes into the checksum."""
                for part in (bytes(offset - f.tell()), data):
                    skip = max(0, 32 - f.tell())
                    f.write(part)
                    total.update(memoryview(part).cast("B")[skip:])

            put(CONFIG.pack(config), 0)
            put(b"".join(map(LAYER.pack, layers)), CONFIG_BYTES)
            if tokenizer:
                put(tokenizer, align(f.tell()))
            for t in progress(placed, "writing"):
                put(stored(t, fetch(t.name)).reshape(-1), t.offset)
            f.seek(24)
            f.write(struct.pack("<Q", total.value()))
            f.flush()
            os.fsync(f.fileno())
        verify(temporary, tokenizer, fetch)
        os.replace(temporary, path)
        sync_directory(os.path.dirname(os.path.abspath(path)))
    finally:
        if os.path.exists(temporary):
            os.unlink(temporary)
    return config


def stored(t, data):
    """What the file holds of a tensor: data is the array, or its bytes as another checkpoint holds them."""
    return data if data.dtype == np.uint8 else t.dtype.pack(checked(t, data))


def sync_directory(path):
    """Makes a rename in it last through a power cut, where the system can."""
    try:
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)
    except OSError:
        pass


def checked(t, array):
    """The array if it may be written as tensor t."""
    if array.shape != t.shape:
        raise Refused(f"{t.name} has shape {list(array.shape)}, expected {list(t.shape)}")
    if t.dtype is not U64 and not np.isfinite(array).all():
        bad = np.argwhere(~np.isfinite(array))[0]
        raise Refused(f"{t.name} holds {array[tuple(bad)]} at {bad.tolist()}: a model with NaN or infinity cannot run")
    return array


class Checkpoint:
    """A checkpoint read back: config, layers, tokenizer (bytes), placed, and tensors by name, one at a time from the file.
    Opening it checks header and size; the checksum only when asked for."""

    def __init__(self, path):
        size = os.path.getsize(path)
        with open(path, "rb") as f:
            head = f.read(CONFIG_BYTES)
            if head[:8] != MAGIC:
                raise Refused(f"{path} is no checkpoint of based.c: it begins with {head[:8]!r}, expected {MAGIC!r}")
            if len(head) < CONFIG_BYTES:
                raise Refused(f"{path} ends inside its header, at byte {size} of {CONFIG_BYTES}")
            self.config = CONFIG.unpack(head)
            if (self.config.format, self.config.byte_order) != (FORMAT, BYTE_ORDER):
                raise Refused(f"{path} has format {self.config.format}, this program knows {FORMAT}")
            table = f.read(LAYER_BYTES * self.config.layers)
        if self.config.file_size != size:
            raise Refused(f"{path} has {size:,} bytes, its header says {self.config.file_size:,}: copy it again")
        if len(table) < LAYER_BYTES * self.config.layers:
            raise Refused(f"{path} says it has {self.config.layers} layers but ends before their descriptions")
        self.layers = [LAYER.unpack(table[i:i + LAYER_BYTES]) for i in range(0, len(table), LAYER_BYTES)]
        try:
            self.placed, expected = layout(self.config, self.layers)
        except KeyError as e:
            raise Refused(f"{path} stores a matrix in dtype {e}, this program knows {sorted(DTYPES)}") from None
        if expected != size:
            raise Refused(f"{path} has {size:,} bytes, its header describes {expected:,}")
        self.path = path
        self.tokenizer = self.read(align(CONFIG_BYTES + len(table)), self.config.tokenizer_bytes).tobytes()

    def read(self, offset, nbytes):
        return np.fromfile(self.path, np.uint8, nbytes, offset=offset)

    def __getitem__(self, name):
        t = next(t for t in self.placed if t.name == name)
        return t.dtype.unpack(self.read(t.offset, t.nbytes), t.shape)

    def raw(self, name):
        """The bytes of a tensor as they are in the file."""
        t = next(t for t in self.placed if t.name == name)
        return self.read(t.offset, t.nbytes)

    def checksum(self):
        total, piece = Checksum(), 1 << 26
        for at in progress(range(32, self.config.file_size, piece), "checksum", "piece"):
            total.update(self.read(at, min(piece, self.config.file_size - at)))
        return total.value()


def verify(path, tokenizer, fetch):
    """Reads the file back from the start and compares all of it with what should be there."""
    saved = Checkpoint(path)
    if saved.tokenizer != tokenizer:
        raise Refused(f"verification failed: the tokenizer read back from {path} differs; is the disk sound?")
    for t in progress(saved.placed, "verifying"):
        expected = t.dtype.unpack(np.ascontiguousarray(stored(t, fetch(t.name))).view(np.uint8).reshape(-1), t.shape)
        if not np.array_equal(saved[t.name], expected):
            raise Refused(f"verification failed: {t.name} read back from {path} differs; is the disk sound?")
    if saved.checksum() != saved.config.checksum:
        raise Refused(f"verification failed: the checksum of {path} is wrong; is the disk sound?")


def parameters(config, layers):
    """Trained numbers: every tensor but the tables that follow from the configuration."""
    return sum(math.prod(t.shape) for t in tensors(config, layers)
               if t.name.rsplit(".", 1)[-1] not in ("turns", "coefficients", "key_mean"))


def state_floats(config, l):
    """Floats that one layer remembers of the past: taps, sums and the tokens beside them, ring; the shifted token."""
    ring, lost = l.kv_heads * (l.key_width + l.value_width), 0 if l.forget else (l.value_width + 1) // 2
    if l.kernel == DIAGONAL:
        features = 1 + l.degree * l.key_width
    else:
        features = math.comb(l.degree + l.key_width, l.degree)
    floats = {CONV: (l.taps - 1) * l.value_width, WINDOW: l.window * ring,
              TAYLOR: l.kv_heads * features * (l.value_width + 2 + lost) + (l.keep + l.window + l.chunk) * ring}.get(l.mixer, 0)
    return floats + (config.dim if l.flags & SHIFT else 0)


# ----------------------------------------------------------------------------------------------------------------------
# 3. Origins. Each returns (config, layers, plan): plan[name] is a function without arguments that returns the array.

def rotary_turns(pairs, width, base=10000.0):
    """[pairs] uint64: 2^64 * frequency / 2 pi. The frequencies are 1 / base^(2i/width) with each step rounded to float32,
    as the models were trained; rounding is exact here, so that every machine writes the same file."""
    frequencies = []
    with localcontext() as context:
        context.prec = 50
        for i in range(pairs):
            exponent = np.float32(2 * i) / np.float32(width)
            power = np.float32(float(Decimal(base) ** Decimal(float(exponent))))
            frequencies.append(np.float32(1) / power)
    return as_turns(frequencies)


def as_turns(frequencies):
    """[pairs] uint64 from radians per token. Whole turns do not count."""
    two_pi = 2 * Fraction("3.14159265358979323846264338327950288419716939937510582097494459")
    return np.array([round(Fraction(float(f)) * 2**64 / two_pi) % 2**64 for f in frequencies], np.uint64)


def half_split(width, rotary, interleaved):
    """The order of one head's rows that puts the partner of row i at i + width/2, for `rotary` pairs; the rest follow."""
    if interleaved:
        first, second = [2 * i for i in range(rotary)], [2 * i + 1 for i in range(rotary)]
    else:
        first, second = list(range(rotary)), [rotary + i for i in range(rotary)]
    rest = list(range(2 * rotary, width))
    return first + rest[:width // 2 - rotary] + second + rest[width // 2 - rotary:]


def by_head(weight, heads, order):
    """weight with the rows (or entries) of each head put in `order`."""
    return weight.reshape(heads, len(order), -1)[:, order].reshape(weight.shape)


def taylor_coefficients(heads, degree):
    """[heads, degree + 1] of the series of exp: 1/p!."""
    return np.tile(np.array([1 / math.factorial(p) for p in range(degree + 1)], np.float32), (heads, 1))


class Source:
    """Tensors of an origin by name. take() checks the shape of one and claims it; leftover() is what nobody claimed."""

    def __init__(self, shapes, load, where):
        self.shapes, self.load, self.where, self.claimed = shapes, load, where, set()

    def __contains__(self, name):
        return name in self.shapes

    def take(self, name, *shape):
        if name not in self.shapes:
            raise Refused(f"{self.where} lacks the tensor {name}")
        if tuple(self.shapes[name]) != shape:
            raise Refused(f"{self.where}: {name} has shape {list(self.shapes[name])}, expected {list(shape)}")
        self.claimed.add(name)
        return lambda: self.load(name)

    def shape(self, name, dims):
        """The shape of a tensor that must have this many dimensions."""
        if name not in self.shapes:
            raise Refused(f"{self.where} lacks the tensor {name}")
        if len(self.shapes[name]) != dims or 0 in self.shapes[name]:
            raise Refused(f"{self.where}: {name} has shape {list(self.shapes[name])}, expected {dims} dimensions")
        return tuple(self.shapes[name])

    def leftover(self):
        return sorted(set(self.shapes) - self.claimed)


REFUSED_NAMES = [
    (r"mixer\.conv1\.", "it uses the older classes of the withdrawn based-1.3b, which nobody could verify"),
    (r"mixer\.decay_proj\.", "its linear attention decays (based-360M-30B of the JRT paper), which is another model"),
    (r"mixer\.proj_[kv]_enc\.", "it reads its prompt in both directions (JRT, prefix linear attention)"),
    (r"g_norm\.", "it divides by a norm per head in place of the sum (the ThunderKittens demo)"),
    (r"mixer\.(A_log|x_proj|dt_proj)|^backbone\.", "it is a Mamba, not a Based model"),
]
REFUSED_VALUES = [
    ("activation_function", ("swiglu",)), ("prenorm", (True,)), ("parallel_block", (False,)),
    ("rotary_emb_scale_base", (None, 0)), ("scale_attn_by_inverse_layer_idx", (False,)), ("n_head_kv", (None,)),
]
KNOWN_WINDOWS = {(27, 1024): 128, (36, 1792): 256}        # layers, dim -> window_size, for a config.json without one


def clean_names(names):
    """HazyResearch/based state dict names without what training left in them: {our key: name in the file}."""
    clean = {}
    for name in names:
        key = name[6:] if name.startswith("model.") else name
        if "metrics" in key or key == "transformer.decay.decay" or key.endswith("inv_freq"):
            continue
        clean[key] = name
    return clean


class Settings:
    """config.json, or one group inside it."""

    def __init__(self, values):
        self.values = values

    def get(self, name, default=None):
        return self.values.get(name, default)

    def group(self, name):
        value = self.get(name) or {}
        if not isinstance(value, dict):
            raise Refused(f"config.json: {name} = {json.dumps(value)}, expected an object")
        return Settings(value)

    def number(self, name, default=None, kind=int, least=1e-30):
        value = self.get(name, default)
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not number or not least <= value < 1e9 or value != kind(value):
            raise Refused(f"config.json: {name} = {json.dumps(value)}, expected a {'positive ' if least else ''}number")
        return kind(value)


class BasedModel:
    """A HazyResearch/based model: layer kinds from the names of its tensors, sizes from their shapes, the rest from
    config.json. After read(): config, layers, plan. window: visible keys in place of the setting's."""
    EMBEDDING, HEAD = "transformer.embeddings.word_embeddings.weight", "lm_head.weight"

    def __init__(self, settings, source, window, chunk, note):
        self.settings, self.source, self.keys, self.chunk, self.note = Settings(settings), source, window, chunk, note
        self.plan, self.layers = {}, []

    def read(self):
        self.refuse_other_models()
        self.read_sizes()
        self.read_embedding()
        for i in range(self.count):
            self.read_layer(i)
        self.norm("final_norm", "transformer.ln_f")
        refuse_leftover(self.source)
        for name, mixer in (("alt_mixer_layers", TAYLOR), ("alt_mixer_2_layers", WINDOW)):
            there, said = [i for i, l in enumerate(self.layers) if l.mixer == mixer], self.settings.get(name)
            if said is not None and there != said:
                self.note(f"config.json: {name} = {json.dumps(said)}, but the tensors say {there}; going by the tensors")
        return self.config, self.layers, self.plan

    def refuse_other_models(self):
        for pattern, reason in REFUSED_NAMES:
            found = next((name for name in self.source.shapes if re.search(pattern, name)), None)
            if found:
                raise Refused(f"{self.source.where} is not supported: {reason} (found {found})")
        for name, allowed in REFUSED_VALUES:
            if self.settings.get(name, allowed[0]) not in allowed:
                raise Refused(f"config.json: {name} = {json.dumps(self.settings.get(name))} is not supported")

    def read_sizes(self):
        settings, where = self.settings, self.source.where
        rows, self.dim = self.source.shape(self.EMBEDDING if self.EMBEDDING in self.source else self.HEAD, 2)
        numbers = map(re.compile(r"transformer\.layers\.(\d+)\.").match, self.source.shapes)
        self.count = 1 + max((int(m[1]) for m in numbers if m), default=-1)
        vocab = settings.number("vocab_size", rows)
        if settings.number("n_layer", self.count) != self.count:
            raise Refused(f"{where} holds {self.count} layers, config.json says n_layer = {settings.get('n_layer')}")
        if settings.number("n_embd", self.dim) != self.dim:
            raise Refused(f"{where} is {self.dim} wide, config.json says n_embd = {settings.get('n_embd')}")
        if vocab > rows:
            raise Refused(f"{where} embeds {rows} tokens, config.json says vocab_size = {vocab}")
        self.heads, self.eps = settings.number("n_head"), settings.number("layer_norm_epsilon", 1e-5, float)
        self.norm_kind = NORM_RMS if settings.get("rms_norm", True) else NORM_LAYER
        self.config = CONFIG.new(dim=self.dim, vocab=vocab, rows=rows, final_norm=self.norm_kind,
                                 final_norm_eps=self.eps, context=settings.group("mixer").number("l_max", 0, least=0))

    def read_embedding(self):
        """Embedding and head are one tensor under two names: either may be missing, two must agree."""
        embedding, head = (self.source.take(name, self.config.rows, self.dim) if name in self.source else None
                           for name in (self.EMBEDDING, self.HEAD))
        self.plan["embedding"] = embedding or head
        if not embedding or not head or np.array_equal(embedding(), head()):
            self.config.flags |= TIED
        elif self.settings.get("tie_word_embeddings", True):
            raise Refused(f"{self.source.where}: {self.EMBEDDING} and {self.HEAD} should be one tensor, but differ")
        else:
            self.plan["head.weight"] = head

    def norm(self, ours, theirs):
        self.plan[ours + ".weight"] = self.source.take(theirs + ".weight", self.dim)
        if self.norm_kind == NORM_LAYER:
            self.plan[ours + ".bias"] = self.source.take(theirs + ".bias", self.dim)

    def linear(self, ours, parts, cols, flag, order=lambda whole: whole):
        """Stacks the rows of (name, rows) parts into one matrix in `order`, and their biases; returns flag if they have
        any."""
        def stacked(loads):
            return lambda: order(np.concatenate([load() for load in loads]))
        self.plan[ours + ".weight"] = stacked([self.source.take(part + ".weight", n, cols) for part, n in parts])
        if parts[0][0] + ".bias" not in self.source:
            return 0
        self.plan[ours + ".bias"] = stacked([self.source.take(part + ".bias", n) for part, n in parts])
        return flag

    def read_layer(self, i):
        theirs, ours = f"transformer.layers.{i}.", f"layers.{i}."
        l = LAYER.new(norm1=self.norm_kind, norm2=self.norm_kind, norm1_eps=self.eps, norm2_eps=self.eps, mlp=SWIGLU)
        self.layers.append(l)
        self.norm(ours + "norm1", theirs + "norm1")
        for mark, read in (("Wqkv", self.read_window), ("proj_q", self.read_taylor), ("in_proj", self.read_conv)):
            if f"{theirs}mixer.{mark}.weight" in self.source:
                read(l, theirs + "mixer.", ours)
                break
        else:
            raise Refused(f"{self.source.where}: layer {i} has none of mixer.Wqkv, mixer.proj_q, mixer.in_proj: "
                          "unknown mixer")
        l.flags |= self.linear(ours + "out", [(theirs + "mixer.out_proj", self.dim)], l.heads * l.value_width, OUT_BIAS)
        self.norm(ours + "norm2", theirs + "norm2")
        l.hidden = self.source.shape(theirs + "mlp.fc1.weight", 2)[0] // 2
        gate_first = lambda whole: np.roll(whole, len(whole) // 2, axis=0)              # theirs: value, gate
        l.flags |= self.linear(ours + "up", [(theirs + "mlp.fc1", 2 * l.hidden)], self.dim, UP_BIAS, gate_first)
        l.flags |= self.linear(ours + "down", [(theirs + "mlp.fc2", self.dim)], l.hidden, DOWN_BIAS)

    def read_conv(self, l, theirs, ours):
        l.mixer, l.heads = CONV, 1
        l.value_width, _, l.taps = self.source.shape(theirs + "conv.conv.weight", 3)
        l.flags |= self.linear(ours + "in", [(theirs + "in_proj", 2 * l.value_width)], self.dim, IN_BIAS)
        taps = self.source.take(theirs + "conv.conv.weight", l.value_width, 1, l.taps)
        self.plan[ours + "taps"] = lambda: taps()[:, 0].T
        if theirs + "conv.conv.bias" in self.source:
            self.plan[ours + "taps.bias"] = self.source.take(theirs + "conv.conv.bias", l.value_width)
            l.flags |= TAPS_BIAS

    def read_taylor(self, l, theirs, ours):
        alt = self.settings.group("alt_mixer")
        feature_map = alt.group("feature_map")
        target = feature_map.get("_target_", "TaylorExp")
        if "Taylor" not in str(target):
            raise Refused(f"config.json: feature map {target} is not supported, only TaylorExp")
        l.mixer, l.heads = TAYLOR, alt.number("num_heads", self.heads)
        wide = self.source.shape(theirs + "proj_q.weight", 2)[0]
        if wide % l.heads or self.dim % l.heads:
            raise Refused(f"{self.source.where}: {theirs}proj_q.weight has {wide} rows for {l.heads} heads in a width "
                          f"of {self.dim}")
        l.kv_heads, l.key_width, l.value_width = l.heads, wide // l.heads, self.dim // l.heads
        l.degree, l.chunk, l.kernel, l.normaliser, l.normaliser_eps = 2, self.chunk, DOT, ADD, 1e-12
        l.scale = 1 / math.sqrt(feature_map.number("input_dim", l.key_width))
        l.keep, l.forget = alt.number("keep", 0, int, 0), alt.number("forget", 0, float, 0)
        parts = [(theirs + "proj_q", wide), (theirs + "proj_k", wide), (theirs + "proj_v", self.dim)]
        l.flags |= self.linear(ours + "in", parts, self.dim, IN_BIAS)
        self.plan[ours + "coefficients"] = lambda: taylor_coefficients(l.heads, l.degree)

    def read_window(self, l, theirs, ours):
        heads, settings = self.heads, self.settings
        if self.dim % heads:
            raise Refused(f"config.json: n_head = {heads} does not divide the width {self.dim}")
        l.mixer, l.heads, l.kv_heads = WINDOW, heads, heads
        l.key_width = l.value_width = self.dim // heads
        l.window = self.keys = self.keys or self.visible_keys(settings.group("alt_mixer_2"))
        l.scale = 1 / math.sqrt(l.key_width) if settings.get("scale_attn_weights", True) else 1.0
        l.rotary = int(settings.number("rotary_emb_fraction", 0, float, least=0) * l.key_width) // 2
        if l.rotary > l.key_width // 2:
            raise Refused(f"config.json: rotary_emb_fraction = {settings.get('rotary_emb_fraction')} is above 1")
        order = half_split(l.key_width, l.rotary, bool(settings.get("rotary_emb_interleaved", False)))

        def paired(whole):
            q, k, v = np.split(whole, 3)
            return np.concatenate([by_head(q, heads, order), by_head(k, heads, order), v])

        l.flags |= self.linear(ours + "in", [(theirs + "Wqkv", 3 * self.dim)], self.dim, IN_BIAS, paired)
        if l.rotary:
            turns = rotary_turns(l.rotary, 2 * l.rotary, settings.number("rotary_emb_base", 10000.0, float))
            self.plan[ours + "turns"] = lambda: turns

    def visible_keys(self, alt):
        """The original lets a token see window_size // 2 others and itself."""
        if not alt.values:
            raise Refused(f"{self.source.where} is not supported: it has attention layers, yet config.json describes no "
                          "sliding window")
        if alt.get("causal") is False:
            raise Refused("config.json: alt_mixer_2.causal = false is not supported: a stream has no future")
        known = KNOWN_WINDOWS.get((self.count, self.dim))
        if "window_size" not in alt.values and not known:
            raise Refused("config.json lacks alt_mixer_2.window_size: give the number of visible keys by --window")
        if "window_size" not in alt.values:
            self.note(f"config.json lacks alt_mixer_2.window_size; taking {known}, that of the release of this shape")
        return alt.number("window_size", known) // 2 + 1


def read_json(path):
    try:
        with open(path, encoding="utf-8") as f:
            value = json.load(f)
    except (ValueError, RecursionError) as e:
        raise Refused(f"{path} is no valid JSON: {e}") from None
    if not isinstance(value, dict):
        raise Refused(f"{path} should hold a JSON object")
    return value


def open_safetensors(path):
    """({name: shape}, load) of a .safetensors file; nothing but the header is read until load(name)."""
    from safetensors import SafetensorError, safe_open
    try:
        f = safe_open(path, "np")
        slices = {name: f.get_slice(name) for name in f.keys()}
        if any(s.get_dtype() == "BF16" for s in slices.values()):
            f = safe_open(path, "pt")                     # numpy has no bfloat16; torch has
    except (SafetensorError, OSError) as e:
        raise Refused(f"{path} is no valid safetensors file: {str(e).splitlines()[0]}") from None
    shapes = {name: tuple(s.get_shape()) for name, s in slices.items()}

    def load(name):
        t = f.get_tensor(name)
        return np.asarray(t if isinstance(t, np.ndarray) else t.float().numpy(), np.float32)
    return shapes, load


def open_torch(path):
    """({name: shape}, load) of a PyTorch file of plain tensors. No code in the file is run."""
    try:
        import torch
    except ImportError:
        raise Refused(f"reading {path} needs PyTorch: pip install torch, or convert the file to safetensors") from None
    try:
        try:
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:
            state = torch.load(path, map_location="cpu", weights_only=True)          # the format before zip
    except Exception as e:                                # torch raises what it likes on a file it cannot read
        reason = (str(e) or repr(e)).splitlines()[0]
        raise Refused(f"{path} cannot be read as a PyTorch file of tensors: {reason}") from None
    if not isinstance(state, dict) or not all(isinstance(t, torch.Tensor) for t in state.values()):
        raise Refused(f"{path} is no state dict: expected a dictionary of tensors")
    return {name: tuple(t.shape) for name, t in state.items()}, lambda name: state[name].float().numpy()


def open_based(path, options, note):
    """Origin (a): a directory of HazyResearch/based."""
    settings = read_json(os.path.join(path, "config.json"))
    for name, reader in (("model.safetensors", open_safetensors), ("pytorch_model.bin", open_torch)):
        weights = os.path.join(path, name)
        if os.path.exists(weights):
            break
    else:
        raise Refused(f"{path} holds config.json but neither model.safetensors nor pytorch_model.bin")
    shapes, load = reader(weights)
    names = clean_names(shapes)
    source = Source({key: shapes[name] for key, name in names.items()}, lambda key: load(names[key]), weights)
    return BasedModel(settings, source, options.window, options.chunk, note).read()


class Lucidrains:
    """One attention layer of lucidrains/taylor-series-linear-attention: a model of vectors in and out. prenorm, rotary
    positions, value gates, one-headed keys and values and combine_heads show in the tensors; heads, shift and causal do not.
    De-duplicated and full features are the same function."""
    MARKS = ("to_q.0.weight", "to_kv.0.weight")

    def __init__(self, source, options, note):
        self.source, self.options, self.plan = source, options, {}

    def read(self):
        options, source = self.options, self.source
        if not options.heads:
            raise Refused(f"{source.where} is a layer of taylor-series-linear-attention, whose tensors do not tell the number "
                          "of heads: give --heads (8 unless it was made with another)")
        if not options.mode:
            raise Refused(f"{source.where} does not tell whether it was made with causal=True: give --mode causal or --mode "
                          "window")
        if options.degree not in (None, 2):
            raise Refused(f"--degree {options.degree}: taylor-series-linear-attention knows only degree 2")
        wide, dim = source.shape("to_q.0.weight", 2)
        both, heads = source.shape("to_kv.0.weight", 2)[0], options.heads
        width = wide // heads
        if wide % heads or both % (2 * width) or heads % (both // (2 * width)):
            raise Refused(f"{source.where}: to_q has {wide} rows and to_kv {both}, which does not fit {heads} heads")
        l = LAYER.new(mixer=TAYLOR, flags=NO_RESIDUAL, heads=heads, kv_heads=both // (2 * width), key_width=width,
                      value_width=width, degree=2, chunk=options.chunk, kernel=DOT, normaliser=CLAMP, normaliser_eps=1e-5,
                      scale=width ** -0.5)
        l.flags |= SHIFT if options.shift else 0
        self.read_projections(l, dim, wide, both)
        if "norm.gamma" in source:
            l.norm1, l.norm1_eps = NORM_L2, 1e-12
            self.plan["layers.0.norm1.weight"] = source.take("norm.gamma", dim)
        if "to_v_gates.0.weight" in source:
            l.flags |= VALUE_GATES
            self.plan["layers.0.gate.weight"] = source.take("to_v_gates.0.weight", heads, dim)
        self.plan["layers.0.coefficients"] = lambda: taylor_coefficients(heads, 2)
        refuse_leftover(source)
        flags = BIDIRECTIONAL if options.mode == "window" else 0
        return CONFIG.new(dim=dim, input=dim, flags=flags), [l], self.plan

    def read_projections(self, l, dim, wide, both):
        source, width = self.source, l.key_width
        q, kv = source.take("to_q.0.weight", wide, dim), source.take("to_kv.0.weight", both, dim)
        order = list(range(width))
        if "rotary_emb.freqs" in source:
            frequencies = source.take("rotary_emb.freqs", width // 2)
            l.rotary, order = width // 2, half_split(width, width // 2, True)
            self.plan["layers.0.turns"] = lambda: as_turns(frequencies())

        def stacked():
            k, v = np.split(kv(), 2)
            return np.concatenate([by_head(q(), l.heads, order), by_head(k, l.kv_heads, order), v])

        self.plan["layers.0.in.weight"] = stacked
        if "to_out.0.weight" in source:
            self.plan["layers.0.out.weight"] = source.take("to_out.0.weight", dim, wide)
        elif wide != dim:
            raise Refused(f"{source.where} does not combine its heads, and their width {wide} is not its input's {dim}: that "
                          "is no layer that can stand alone; use based.h part 9")
        else:
            l.flags |= NO_OUT


class Edifice:
    """Edifice.Attention.Based from its safetensors file, whose matrices are [in, out]. Heads, order and window are not in
    it."""
    MARKS = ("based_block_1_attn_q_proj.kernel",)

    def __init__(self, source, options, note):
        self.source, self.options, self.note, self.plan = source, options, note, {}

    def read(self):
        source, options = self.source, self.options
        for name in ("token_embedding.kernel", "lm_head.kernel"):
            if name in source:
                raise Refused(f"{source.where} holds {name}: Edifice.Serving.Generate lets padding take part in every result, "
                              "which is not reproduced; export the model without embedding and head, which reads vectors")
        self.hidden, self.heads = source.shape("final_norm.gamma", 1)[0], options.heads or 4
        if options.shift:
            raise Refused("--shift: Edifice knows no token shift")
        if self.hidden % self.heads:
            raise Refused(f"{source.where} is {self.hidden} wide, which {self.heads} heads do not divide")
        count = sum(bool(re.fullmatch(r"based_block_\d+_attn_q_proj\.kernel", name)) for name in source.shapes)
        mode = options.mode or (count == 1 and "causal")
        if not mode:
            raise Refused(f"{source.where} has {count} layers that look at the whole window, the future included: --mode "
                          "window runs it so, --mode causal as what it was not trained to be, in constant memory (its results differ)")
        if not options.mode:
            self.note("one layer: stepping gives exactly the original's last output (not the ones before); --mode window gives "
                      "all")
        config = CONFIG.new(dim=self.hidden, input=self.hidden, context=options.window or 60, final_norm=NORM_LAYER,
                            final_norm_eps=1e-5, flags=BIDIRECTIONAL if mode == "window" else 0)
        if "input_projection.kernel" in source:
            config.input = source.shape("input_projection.kernel", 2)[0]
            config.flags |= INPUT_PROJECTION
            self.dense("input", ["input_projection"], config.input, self.hidden)
        layers = [self.read_layer(i) for i in range(count)]
        self.norm("final_norm", "final_norm")
        refuse_leftover(source)
        return config, layers, self.plan

    def norm(self, ours, theirs):
        for mine, name in (("weight", "gamma"), ("bias", "beta")):
            self.plan[f"{ours}.{mine}"] = self.source.take(f"{theirs}.{name}", self.hidden)

    def dense(self, ours, parts, cols, rows):
        """Stacks dense layers [cols, rows] on each other."""
        kernels = [self.source.take(part + ".kernel", cols, rows) for part in parts]
        biases = [self.source.take(part + ".bias", rows) for part in parts]
        self.plan[ours + ".weight"] = lambda: np.concatenate([load().T for load in kernels])
        self.plan[ours + ".bias"] = lambda: np.concatenate([load() for load in biases])

    def read_layer(self, i):
        theirs, ours, hidden = f"based_block_{i + 1}_", f"layers.{i}.", self.hidden
        width, degree = hidden // self.heads, self.options.degree or 2
        l = LAYER.new(mixer=TAYLOR, flags=IN_BIAS | OUT_BIAS | UP_BIAS | DOWN_BIAS, norm1=NORM_LAYER, norm2=NORM_LAYER,
                      norm1_eps=1e-5, norm2_eps=1e-5, heads=self.heads, kv_heads=self.heads, key_width=width, value_width=width,
                      degree=degree, chunk=self.options.chunk, kernel=DIAGONAL, normaliser=ADD, normaliser_eps=1e-6, scale=1.0,
                      mlp=GELU, hidden=self.source.shape(theirs + "ffn_up.kernel", 2)[1])
        self.norm(ours + "norm1", theirs + "attn_norm")
        self.dense(ours + "in", [f"{theirs}attn_{part}_proj" for part in "qkv"], hidden, hidden)
        self.plan[ours + "coefficients"] = lambda: taylor_coefficients(self.heads, degree)
        self.dense(ours + "out", [theirs + "attn_out_proj"], hidden, hidden)
        self.norm(ours + "norm2", theirs + "ffn_norm")
        self.dense(ours + "up", [theirs + "ffn_up"], hidden, l.hidden)
        self.dense(ours + "down", [theirs + "ffn_down"], l.hidden, hidden)
        return l


def refuse_leftover(source):
    names = source.leftover()
    if names:
        raise Refused(f"{source.where} holds {len(names)} tensors that no known layer uses, the first is {names[0]}")


def open_tensors(path, options, note):
    """Origins (c) and (d): one file of tensors, recognised by their names. None if it is no such file."""
    with open(path, "rb") as f:
        start = f.read(9)
    if start[8:] == b"{":
        shapes, load = open_safetensors(path)
    elif start[:2] == b"PK" or start[:1] == b"\x80":
        shapes, load = open_torch(path)
    else:
        return None
    prefix = options.prefix or ""
    source = Source({name[len(prefix):]: shape for name, shape in shapes.items() if name.startswith(prefix)},
                    lambda name: load(prefix + name), path)
    for origin in (Lucidrains, Edifice):
        if all(mark in source for mark in origin.MARKS):
            return origin(source, options, note).read()
    begins = sorted({name[:-len(Lucidrains.MARKS[0])] for name in shapes if name.endswith(Lucidrains.MARKS[0])})
    hint = f"; --prefix {begins[0]} would name one attention layer of it" if begins else ""
    raise Refused(f"{path} holds tensors of no model this program knows, such as {min(shapes, default='none')}{hint}")


OF_TENSORS = "heads degree mode shift prefix".split()         # options that only open_tensors understands


def llama_shapes(header):
    """The tensors of a llama2.c file in file order, from its seven header numbers."""
    dim, hidden, n, heads, kv, vocab, seq = header
    width = dim // heads
    shapes = {"embedding": (abs(vocab), dim), "rms_att": (n, dim), "wq": (n, dim, dim), "wk": (n, kv * width, dim),
              "wv": (n, kv * width, dim), "wo": (n, dim, dim), "rms_ffn": (n, dim), "w1": (n, hidden, dim),
              "w2": (n, dim, hidden), "w3": (n, hidden, dim), "rms_final": (dim,), "freq_cis": (seq, width)}
    if vocab < 0:
        shapes["wcls"] = (-vocab, dim)
    return shapes


def open_llama(path, options, note):
    """Origin (b): a llama2.c checkpoint with the seven-number header. Its attention becomes a window as long as its
    context, so results agree exactly up to there and the model goes on beyond."""
    size = os.path.getsize(path)
    with open(path, "rb") as f:
        start = f.read(28)
    if start[:4] == b"24ka":
        raise Refused(f"{path} is a llama2.c file of version {int.from_bytes(start[4:8], 'little')}; "
                      "export it with --version 0, the float32 form that run.c reads")
    header = struct.unpack("<7i", start) if len(start) == 28 else (0,) * 7
    dim, hidden, n, heads, kv, vocab, seq = header
    if not (0 < dim <= 65536 and 0 < hidden <= 1 << 20 and 0 < n <= 1024 and 0 < kv <= heads <= 4096
            and dim % heads == 0 and heads % kv == 0 and 0 < abs(vocab) <= 1 << 22 and 0 < seq <= 1 << 20):
        raise Refused(f"{path} is nothing this program can read: expected a HazyResearch/based directory (config.json "
                      "and weights) or a llama2.c checkpoint")
    shapes = llama_shapes(header)
    expected = 28 + 4 * sum(map(math.prod, shapes.values()))
    if size != expected:
        raise Refused(f"{path} has {size:,} bytes; as a llama2.c checkpoint of this header it should have {expected:,}")
    at, where = 28, {}
    for name, shape in shapes.items():
        where[name] = np.memmap(path, "<f4", "r", at, shape)
        at += 4 * math.prod(shape)
    if (dim // heads) % 2:
        raise Refused(f"{path} has heads of odd width {dim // heads}, which rotary positions cannot turn")
    width, window = dim // heads, options.window or seq
    config = CONFIG.new(dim=dim, vocab=abs(vocab), rows=abs(vocab), flags=TIED if vocab > 0 else 0, context=seq,
                        final_norm=NORM_RMS, final_norm_eps=1e-5)
    plan = {"embedding": lambda: where["embedding"], "final_norm.weight": lambda: where["rms_final"]}
    if vocab < 0:
        plan["head.weight"] = lambda: where["wcls"]
    order, turns = half_split(width, width // 2, True), rotary_turns(width // 2, width)
    layers = []
    for i in range(n):
        layers.append(LAYER.new(
            mixer=WINDOW, norm1=NORM_RMS, norm2=NORM_RMS, norm1_eps=1e-5, norm2_eps=1e-5, heads=heads, kv_heads=kv,
            key_width=width, value_width=width, window=window, scale=1 / math.sqrt(width), rotary=width // 2,
            mlp=SWIGLU, hidden=hidden))
        plan.update({f"layers.{i}.{name}": load for name, load in {
            "norm1.weight": lambda i=i: where["rms_att"][i],
            "in.weight": lambda i=i: np.concatenate([by_head(where["wq"][i], heads, order),
                                                     by_head(where["wk"][i], kv, order), where["wv"][i]]),
            "turns": lambda: turns,
            "out.weight": lambda i=i: where["wo"][i],
            "norm2.weight": lambda i=i: where["rms_ffn"][i],
            "up.weight": lambda i=i: np.concatenate([where["w1"][i], where["w3"][i]]),
            "down.weight": lambda i=i: where["w2"][i]}.items()})
    return config, layers, plan


# ---- Softmax attention on constant memory. A layer keeps its last keys as they are and weights them exp(s). What an older key
#      is worth, exp(s) too, is told by a polynomial of s, fitted to what the heads of this model do on some text.

def encoded(tokenizer, text):
    """The ids of a text as llama2.c merges them, after the begin token: characters, then the best neighbours, again and again."""
    apart = set(tokenizer.specials) | set(tokenizer.byte_id)
    ids = {token: i for i, token in reversed(list(enumerate(tokenizer.tokens))) if i not in apart}
    text_ids = []
    for character in text:
        piece = character.encode("utf-8")
        text_ids += [ids[piece]] if piece in ids else [tokenizer.byte_id[byte] for byte in piece]
    while True:
        pairs = {pair: ids.get(tokenizer.tokens[pair[0]] + tokenizer.tokens[pair[1]]) for pair in zip(text_ids, text_ids[1:])}
        known = [pair for pair, whole in pairs.items() if whole is not None]
        if not known:
            return [tokenizer.bos] + text_ids
        best = max(known, key=lambda pair: tokenizer.scores[pairs[pair]])
        at, merged = 0, []
        while at < len(text_ids):
            both = tuple(text_ids[at:at + 2]) == best
            merged.append(pairs[best] if both else text_ids[at])
            at += 2 if both else 1
        text_ids = merged


def attention_inputs(layers, tensor, tokens):
    """What the heads of every layer of a llama2.c model see of a text: [(q, k, v)], each [n, heads, width], q and k turned by
    their positions. tensor: the arrays by name."""
    def normed(x, weight, eps):
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * weight

    def turned(x, turns):
        angle = (np.arange(len(x), dtype=np.uint64)[:, None] * turns).astype(np.float64) * (2 * math.pi / 2**64)
        (a, b), cos, sin = np.split(x, 2, axis=-1), np.cos(angle)[:, None], np.sin(angle)[:, None]
        return np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)

    x, seen = tensor["embedding"][tokens], []
    for i, l in enumerate(layers):
        w = {name: tensor[f"layers.{i}.{name}"] for name in ("norm1.weight", "in.weight", "turns", "out.weight", "norm2.weight",
                                                             "up.weight", "down.weight")}
        parts = (normed(x, w["norm1.weight"], l.norm1_eps) @ w["in.weight"].T).reshape(len(x), -1, l.key_width)
        q, k, v = np.split(parts, [l.heads, l.heads + l.kv_heads], axis=1)
        q, k = turned(q, w["turns"]), turned(k, w["turns"])
        seen.append((q, k, v))
        y = np.stack([softmax_weights(l.scale * q[:, h] @ k[:, g].T, np.arange(len(x)))[0] @ v[:, g]
                      for h, g in shared_heads(l)], axis=1)
        x = x + y.reshape(len(x), -1) @ w["out.weight"].T
        gate, value = np.split(normed(x, w["norm2.weight"], l.norm2_eps) @ w["up.weight"].T, 2, axis=1)
        x = x + gate / (1 + np.exp(-gate)) * value @ w["down.weight"].T
    return seen


def shared_heads(l):
    """(query head, key/value head) for each query head."""
    return [(h, h * l.kv_heads // l.heads) for h in range(l.heads)]


def softmax_weights(scores, queries):
    """(weights, log of the denominator [n, 1]) of causal attention; queries: the positions of the rows."""
    scores = np.where(np.arange(scores.shape[1]) <= queries[:, None], scores, -np.inf)
    top = scores.max(1, keepdims=True)
    weights = np.exp(scores - top)
    total = weights.sum(1, keepdims=True)
    return weights / total, top + np.log(total)


class Fit:
    """The polynomials of one layer, fitted by least squares: with them in place of exp(s) for the keys that have joined the
    sums, the outputs of each head over some texts differ least from softmax attention's. To first order that difference is
    the sum over those keys of (w(s) - exp(s)) (v - y) / Z, with softmax's denominator Z and output y. Where Z is very small,
    any polynomial is much too large; it counts there as if Z were exp(-LIMIT)."""
    LIMIT, EVERY = 30.0, 4                                # one in so many queries is enough

    def __init__(self, l, texts):
        """texts: (q, k, v) of each, as attention_inputs returns them."""
        self.layer, self.texts = l, texts
        self.mean = np.stack([np.concatenate([k[:, g] for _, k, _ in texts]).mean(0) for g in range(l.kv_heads)])
        self.equations = [self.equations_of(h, g) for h, g in shared_heads(l)]

    def scores(self, h, g):
        """For each text: positions of queries, their scores with all keys, which of these have joined the sums by then, values."""
        l = self.layer
        for q, k, v in self.texts:
            at = np.arange(l.window + l.chunk, len(q), self.EVERY)
            joined = (at - l.window) // l.chunk * l.chunk
            yield at, l.scale * q[at, h] @ (k[:, g] - self.mean[g]).T, np.arange(len(k)) < joined[:, None], v[:, g]

    def equations_of(self, h, g):
        """(lowest score, highest score, A, b): normal equations in the Chebyshev polynomials over that range."""
        low = min(s.min(initial=0, where=old) for _, s, old, _ in self.scores(h, g))
        high = max(s.max(initial=0, where=old) for _, s, old, _ in self.scores(h, g))
        a, b = 0, 0
        for at, s, old, v in self.scores(h, g):
            weights, log_z = softmax_weights(s, at)
            y, around = weights @ v, np.concatenate([v, np.ones((len(v), 1))], 1)

            def difference(w, factor):                    # sum of w (v - y) over the keys that have joined, times factor
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
        """[heads, degree + 1], of s^0, s^1, ...; degree: that of the layer, or less."""
        rows, n = [], degree + 1
        for low, high, a, b in self.equations:
            size = np.sqrt(np.diag(a))[:n] + 1e-300
            solved = np.linalg.solve(a[:n, :n] / size / size[:, None] + 1e-9 * np.eye(n), b[:n] / size) / size
            powers = np.polynomial.Chebyshev(solved, domain=[low, high]).convert(kind=np.polynomial.Polynomial).coef
            rows.append(np.pad(powers, (0, n - len(powers))))
        return np.array(rows, np.float32)


def open_checkpoint(saved):
    """A llama2.c model that is a checkpoint of based.c already, to be changed."""
    return saved.config, saved.layers, {t.name: lambda name=t.name: saved[name] for t in saved.placed}


def read_documents(config, tokenizer, path):
    """The tokens of each document of a text. It is cut at begin tokens, as `run -x` does, and where it is longer than what the
    model was trained on."""
    tokenizer = tokenizer_of(tokenizer) if tokenizer else None
    if not tokenizer or tokenizer.kind != SCORES:
        raise Refused("--calibrate needs the model's tokenizer: --tokenizer FILE")
    try:
        with open(path, encoding="utf-8") as f:
            documents = (" " + f.read()).split(tokenizer.tokens[tokenizer.bos].decode("utf-8"))
    except UnicodeDecodeError as e:
        raise Refused(f"{path} is not UTF-8: {e}") from None
    texts = [encoded(tokenizer, document) for document in documents]
    return [text[at:at + config.context] for text in texts for at in range(0, len(text), config.context)]


def to_constant_memory(config, layers, plan, tokenizer, options, note):
    """Softmax attention becomes a window and sums: changes layers and plan."""
    if any(l.mixer != WINDOW or l.norm1 != NORM_RMS or l.norm2 != NORM_RMS or l.mlp != SWIGLU or l.flags
           or 2 * l.rotary != l.key_width or l.key_width != l.value_width for l in layers) or config.input:
        raise Refused("--taylor-degree replaces the softmax attention of llama2.c models, which this is not")
    slots = options.window + options.chunk
    texts = [text for text in read_documents(config, tokenizer, options.calibrate) if len(text) > slots]
    if not texts:
        raise Refused(f"{options.calibrate} holds no text of more than {slots} tokens, beyond the window")
    tensor = {name: load() if name.endswith("turns") else np.asarray(load(), np.float64) for name, load in plan.items()}
    seen = [attention_inputs(layers, tensor, text) for text in progress(texts, "reading", "text")]
    for i, l in progress(list(enumerate(layers)), "fitting", "layer"):
        l.mixer, l.flags, l.window, l.chunk, l.degree = TAYLOR, KEY_MEAN, options.window, options.chunk, options.taylor_degree
        fit = Fit(l, [text[i] for text in seen])
        plan[f"layers.{i}.key_mean"] = lambda fit=fit: fit.mean.astype(np.float32)
        plan[f"layers.{i}.coefficients"] = lambda fit=fit, l=l: fit.coefficients(l.degree)
    note(f"fitted to {sum(map(len, texts)):,} tokens of {options.calibrate}")


RELEASED = {"n_head": 16, "vocab_size": 50257, "layer_norm_epsilon": 1e-5, "rotary_emb_fraction": 1,
            "mixer": {"l_max": 2048},
            "alt_mixer": {"feature_dim": 16, "num_heads": 16, "feature_map": {"input_dim": 16}}}
SHAPES = {
    "based-360m": dict(RELEASED, n_layer=27, n_embd=1024, n_inner=2048, alt_mixer_layers=[1, 6, 11, 16, 21],
                       alt_mixer_2_layers=[2, 7, 12, 17, 22], alt_mixer_2={"window_size": 128}),
    "based-1b": dict(RELEASED, n_layer=36, n_embd=1792, n_inner=3584, alt_mixer_layers=[1, 6, 11, 16, 21, 27, 33],
                     alt_mixer_2_layers=[2, 7, 12, 17, 22, 28, 34], alt_mixer_2={"window_size": 256}),
}


def open_random(name, options, note):
    """Origin (c): random weights in a released shape, or in that of a config.json. Scaled so that activations keep their
    size through any number of layers; the same seed gives the same file."""
    settings = SHAPES.get(name) or read_json(name)
    try:
        d, count, heads = (int(settings[key]) for key in ("n_embd", "n_layer", "n_head"))
        inner = -(-int(settings.get("n_inner") or 4 * d) // 256) * 256
        step = int(settings.get("pad_vocab_size_multiple") or 8)
        rows = -(-int(settings["vocab_size"]) // step) * step
        alt = settings.get("alt_mixer") or {}
        features = int(alt.get("feature_dim", 16)) * int(alt.get("num_heads", heads))
        channels = d * int((settings.get("mixer") or {}).get("expand_proj", 4)) // 2
        linear, window = settings.get("alt_mixer_layers") or [], settings.get("alt_mixer_2_layers") or []
    except (KeyError, TypeError, ValueError, AttributeError) as e:
        lacks = "lacks " if isinstance(e, KeyError) else ""
        raise Refused(f"{name}: {lacks}{e}; expected the config.json of a Based model") from None
    shapes = {"transformer.embeddings.word_embeddings.weight": (rows, d), "transformer.ln_f.weight": (d,)}
    for i in range(count):
        if i in window:
            mixer = {"Wqkv.weight": (3 * d, d), "out_proj.weight": (d, d)}
        elif i in linear:
            mixer = {"proj_q.weight": (features, d), "proj_k.weight": (features, d), "proj_v.weight": (d, d),
                     "out_proj.weight": (d, d)}
        else:
            mixer = {"in_proj.weight": (2 * channels, d), "in_proj.bias": (2 * channels,),
                     "conv.conv.weight": (channels, 1, 3), "out_proj.weight": (d, channels), "out_proj.bias": (d,)}
        other = {"norm1.weight": (d,), "norm2.weight": (d,), "mlp.fc1.weight": (2 * inner, d),
                 "mlp.fc2.weight": (d, inner)}
        shapes.update({f"transformer.layers.{i}.{key}": shape for key, shape in other.items()})
        shapes.update({f"transformer.layers.{i}.mixer.{key}": shape for key, shape in mixer.items()})
    number = {key: i for i, key in enumerate(shapes)}

    def load(key):
        shape = shapes[key]
        if len(shape) == 1:
            return np.full(shape, 0.0 if key.endswith("bias") else 1.0, np.float32)
        scale = 1 / math.sqrt(shape[-1])
        if key.endswith(("out_proj.weight", "fc2.weight")):
            scale /= math.sqrt(2 * count)
        random = np.random.default_rng([options.seed, number[key]])
        weight = random.standard_normal(shape, np.float32)
        weight *= np.float32(scale)
        return weight
    return BasedModel(settings, Source(shapes, load, name), options.window, options.chunk, note).read()


# ----------------------------------------------------------------------------------------------------------------------
# 4. Tokenizers: three origins, one form, one section of the checkpoint. A tokenizer that the runtime could not reproduce
#    exactly is refused with the reason: one wrong token is worse than no tokenizer, because nothing shows it.

BPE, SCORES = 1, 2
PREFIX_SPACE, ADD_BOS = 1, 2
MAX_TOKEN = 4096                                          # bytes of one token
GPT2_VOCAB, GPT2_MERGES = 50257, "models/gpt2.bpe.xz"
GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


@dataclass
class Tokenizer:
    kind: int                               # BPE or SCORES
    tokens: list                            # (size) the bytes of each token; of a special token its name
    flags: int = 0
    bos: int = NONE
    eos: int = NONE
    unknown: int = NONE
    byte_id: list = field(default_factory=lambda: [NONE] * 256)     # id of each single byte
    specials: list = field(default_factory=list)                    # ids that stand for no text
    merges: dict = field(default_factory=dict)                      # BPE: (left, right) -> (rank, result)
    scores: list = field(default_factory=list)                      # SCORES: (size)

    @property
    def size(self):
        return len(self.tokens)


def byte_characters():
    """GPT-2 writes each byte as one printable character. Returns these 256 characters in the order of GPT-2's ids,
    with the byte each stands for: the visible Latin-1 characters are themselves, the rest follow from U+0100 on."""
    visible = [b for b in range(256) if 0x21 <= b <= 0x7E or 0xA1 <= b <= 0xAC or 0xAE <= b <= 0xFF]
    hidden = [b for b in range(256) if b not in visible]
    characters = {chr(b): b for b in visible}
    characters.update({chr(256 + i): b for i, b in enumerate(hidden)})
    return characters


def unmap(text, characters):
    """The bytes that a token stands for, or None if it is not written in GPT-2's characters."""
    try:
        return bytes(characters[c] for c in text)
    except KeyError:
        return None


def gpt2_tokenizer(merges_path):
    """The tokenizer of GPT-2 from its list of merges (vocab.bpe, or the same compressed with xz). The vocabulary needs
    no second file: it is the 256 bytes, then what each merge makes, then <|endoftext|>."""
    raw = open(merges_path, "rb").read()
    try:
        text = (lzma.decompress(raw) if raw[:6] == b"\xfd7zXZ\0" else raw).decode("utf-8")
    except (lzma.LZMAError, UnicodeDecodeError) as error:
        raise ValueError(f"{merges_path}: not a list of merges: {error}") from None
    characters = byte_characters()
    ids = {c: i for i, c in enumerate(characters)}
    tokens = [bytes([b]) for b in characters.values()]
    merges = {}
    for number, line in enumerate(text.split("\n"), 1):
        if not line or (number == 1 and line.startswith("#version")):
            continue
        pair = line.split(" ")
        if len(pair) != 2 or pair[0] not in ids or pair[1] not in ids or "".join(pair) in ids:
            raise ValueError(f"{merges_path}:{number}: expected two known tokens that make a new one, found {line!r}")
        left, right = ids[pair[0]], ids[pair[1]]
        merges[left, right] = (len(merges), len(tokens))
        ids["".join(pair)] = len(tokens)
        tokens.append(tokens[left] + tokens[right])
    end = len(tokens)
    tokens.append(b"<|endoftext|>")
    byte_id = [NONE] * 256
    for i in range(256):
        byte_id[tokens[i][0]] = i
    return Tokenizer(BPE, tokens, bos=end, eos=end, byte_id=byte_id, specials=[end], merges=merges)


def check_pieces(path, pre):
    """Refuses every way of cutting text into pieces that is not GPT-2's."""
    steps = pre.get("pretokenizers", []) if pre and pre.get("type") == "Sequence" else [pre]
    kinds = [step.get("type") if step else None for step in steps]
    last = steps[-1] if steps else None
    if not kinds or kinds[-1] != "ByteLevel" or kinds[:-1] not in ([], ["Split"]):
        raise ValueError(f"{path}: pre-tokenizer {'+'.join(map(str, kinds))} is not supported, only GPT-2's ByteLevel")
    if last.get("add_prefix_space", True):
        raise ValueError(f"{path}: ByteLevel with add_prefix_space is not supported")
    if len(steps) == 1 and not last.get("use_regex", True):
        raise ValueError(f"{path}: ByteLevel without a pattern is not supported, only with GPT-2's")
    if len(steps) == 2:
        split = steps[0]
        pattern = split.get("pattern", {}).get("Regex")
        isolated = split.get("behavior") in ("Isolated", "isolated") and not split.get("invert", False)
        if pattern != GPT2_PATTERN or not isolated or last.get("use_regex", True):
            raise ValueError(f"{path}: it cuts text by another pattern than GPT-2's: {str(pattern)[:60]!r}")


def check_model(path, spec):
    """Refuses every kind of model, and every step before or after it, that tokenizer.c does not compute."""
    model = spec.get("model", {})
    kind = model.get("type", "BPE" if "merges" in model else "?")
    if kind != "BPE":
        raise ValueError(f"{path}: model {kind} is not supported, only byte-level BPE")
    for option in ("byte_fallback", "dropout", "continuing_subword_prefix", "end_of_word_suffix", "ignore_merges"):
        if model.get(option):
            raise ValueError(f"{path}: BPE with {option}={model[option]!r} is not supported")
    normalizer = spec.get("normalizer")
    if normalizer and not (normalizer.get("type") == "Sequence" and not normalizer.get("normalizers")):
        raise ValueError(f"{path}: normalizer {normalizer.get('type')} is not supported: text must reach BPE unchanged")
    decoder = spec.get("decoder")
    if decoder and decoder.get("type") != "ByteLevel":
        raise ValueError(f"{path}: decoder {decoder.get('type')} is not supported, only ByteLevel")
    check_pieces(path, spec.get("pre_tokenizer"))
    return model


def template_ids(path, spec, special_ids):
    """(id, id): the tokens that the post-processor puts before and after a text, NONE where it puts none."""
    post = spec.get("post_processor")
    steps = post.get("processors", []) if post and post.get("type") == "Sequence" else [post] if post else []
    before, after = [], []
    for step in steps:
        if step.get("type") == "ByteLevel":                 # trims offsets only, never changes an id
            continue
        if step.get("type") != "TemplateProcessing":
            raise ValueError(f"{path}: post-processor {step.get('type')} is not supported")
        side = before
        for piece in step.get("single", []):
            if "Sequence" in piece:
                side = after
            else:
                side.extend(step["special_tokens"][piece["SpecialToken"]["id"]]["ids"])
    if len(before) > 1 or len(after) > 1 or not set(before + after) <= special_ids:
        raise ValueError(f"{path}: the post-processor adds {len(before)} tokens before and {len(after)} after a text; "
                         "at most one special token on either side is supported")
    return (before or [NONE])[0], (after or [NONE])[0]


def named_ids(path, names):
    """(bos, eos) by the names in tokenizer_config.json beside the file if there is one, else by the usual names."""
    config = {}
    beside = os.path.join(os.path.dirname(path), "tokenizer_config.json")
    if os.path.exists(beside):
        with open(beside, encoding="utf-8") as file:
            config = json.load(file)
    found = []
    for key, usual in (("bos_token", ("<s>", "<|begin_of_text|>", "<|endoftext|>")),
                       ("eos_token", ("</s>", "<|end_of_text|>", "<|endoftext|>"))):
        value = config.get(key)
        value = value.get("content") if isinstance(value, dict) else value
        found.append(next((names[name] for name in ((value,) if value else usual) if name in names), NONE))
    return found


def hf_tokenizer(tokenizer_json_path):
    """A byte-level BPE tokenizer in the Hugging Face form. What is not where that form has it shows as one of many errors."""
    path = str(tokenizer_json_path)
    try:
        with open(path, encoding="utf-8") as file:
            spec = json.load(file)
        return read_hf_tokenizer(path, spec)
    except (json.JSONDecodeError, UnicodeDecodeError, AttributeError, IndexError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{path}: not a tokenizer.json: {error!r}") from None


def read_hf_tokenizer(path, spec):
    model = check_model(path, spec)
    vocab = dict(model["vocab"])
    names = {}
    for token in spec.get("added_tokens", []):
        if not token.get("special") or any(token.get(key) for key in ("lstrip", "rstrip", "single_word")):
            raise ValueError(f"{path}: added token {token['content']!r} is not supported: only special tokens "
                             "without lstrip, rstrip, single_word")
        names[token["content"]] = token["id"]
    ids = [*vocab.values(), *names.values()]
    if not all(type(index) is int and index >= 0 for index in ids):
        raise ValueError(f"{path}: an id of a token is no whole number from 0 up")
    size = max(ids, default=-1) + 1
    if size > 2 * (len(vocab) + len(names)):
        raise ValueError(f"{path}: {len(vocab) + len(names)} tokens but ids up to {size - 1}")

    characters = byte_characters()
    tokens = [b""] * size                   # an id that no token has stays empty: it cannot come out of any text
    byte_id = [NONE] * 256
    for text, index in vocab.items():
        if text in names:
            continue
        tokens[index] = unmap(text, characters)
        if tokens[index] is None:
            raise ValueError(f"{path}: token {index} {text!r} is not written in byte-level characters")
        if len(text) == 1:
            byte_id[tokens[index][0]] = index
    for text, index in names.items():
        tokens[index] = text.encode("utf-8")

    merges = {}
    for rank, pair in enumerate(model["merges"]):
        pair = pair.split(" ") if isinstance(pair, str) else pair
        if len(pair) != 2 or any(text not in vocab for text in (*pair, "".join(pair))):
            raise ValueError(f"{path}: merge {rank} {pair!r} names a token that is not in the vocabulary")
        if any(text in names for text in (*pair, "".join(pair))):
            raise ValueError(f"{path}: merge {rank} {pair!r} makes a special token out of text")
        merges[vocab[pair[0]], vocab[pair[1]]] = (rank, vocab["".join(pair)])

    if model.get("unk_token") and model.get("fuse_unk") and NONE in byte_id:
        raise ValueError(f"{path}: it fuses unknown bytes into one token, which is not supported")
    before, after = template_ids(path, spec, set(names.values()))
    bos, eos = named_ids(path, names)
    unknown = vocab.get(model.get("unk_token") or "", NONE)
    return Tokenizer(BPE, tokens, flags=ADD_BOS if before != NONE else 0, bos=before if before != NONE else bos,
                     eos=after if after != NONE else eos, unknown=unknown, byte_id=byte_id,
                     specials=sorted(names.values()), merges=merges)


def llama2c_tokenizer(tokenizer_bin_path, vocab):
    """The tokenizer.bin of llama2.c: `vocab` scored pieces; 0 to 2 are <unk>, <s>, </s>, then the 256 bytes."""
    path = str(tokenizer_bin_path)
    raw = open(path, "rb").read()
    tokens, scores, at = [], [], 4
    while at < len(raw) and len(tokens) < vocab:
        if len(raw) - at < 8:
            raise ValueError(f"{path}: ends within token {len(tokens)}, at byte {at}")
        score, length = struct.unpack_from("<fI", raw, at)
        at += 8
        if length > len(raw) - at or length > MAX_TOKEN:
            raise ValueError(f"{path}: token {len(tokens)} at byte {at} claims {length} bytes, {len(raw) - at} are left")
        tokens.append(raw[at:at + length])
        scores.append(score)
        at += length
    if len(tokens) != vocab or at != len(raw):
        raise ValueError(f"{path}: holds {'more' if at < len(raw) else len(tokens)} tokens, the model has {vocab}: "
                         "this tokenizer belongs to another model")
    if vocab < 259 or any(not re.fullmatch(rb"<0x[0-9A-F]{2}>", t) or int(t[3:5], 16) != i
                          for i, t in enumerate(tokens[3:259])):
        raise ValueError(f"{path}: tokens 3 to 258 are not the bytes <0x00> to <0xFF>")
    if any(score != score for score in scores):
        raise ValueError(f"{path}: token {[s != s for s in scores].index(True)} has no number as its score")
    tokens[0:3] = [t.strip(b"\n") for t in tokens[0:3]]
    tokens[3:259] = [bytes([b]) for b in range(256)]
    return Tokenizer(SCORES, tokens, flags=PREFIX_SPACE | ADD_BOS, bos=1, eos=2, unknown=0,
                     byte_id=list(range(3, 259)), specials=[0, 1, 2], scores=scores)


def section(tok):
    """The tokenizer section of a checkpoint, exactly as based.h part 7 writes it down."""
    for index, token in enumerate(tok.tokens):
        if len(token) > MAX_TOKEN:
            raise ValueError(f"token {index} has {len(token)} bytes, at most {MAX_TOKEN} are supported")
    specials = sorted(tok.specials, key=lambda i: (-len(tok.tokens[i]), i))
    start = np.cumsum([0] + [len(token) for token in tok.tokens])
    if tok.kind == BPE:
        table = np.array([(l, r, rank, to) for (l, r), (rank, to) in sorted(tok.merges.items())])
        entries, tables = len(table), [table.reshape(-1)]
    else:
        # Text becomes neither a special token nor, by looking characters up, a byte token. Of two tokens with the
        # same bytes the first is the one that text becomes.
        apart = set(tok.specials) | set(tok.byte_id)
        first = {}
        for index, token in enumerate(tok.tokens):
            if index not in apart:
                first.setdefault(token, index)
        order = [first[token] for token in sorted(first)]
        entries, tables = len(order), [np.array(order), np.array(tok.scores, "<f4").view("<u4")]
    words = 12 + 256 + len(specials) + len(start) + sum(len(t) for t in tables)
    header = [words, tok.kind, tok.flags, tok.size, tok.bos, tok.eos, tok.unknown, entries, len(specials), 0, 0, 0]
    parts = [header, tok.byte_id, specials, start, *tables]
    return b"".join(np.asarray(part, dtype="<u4").tobytes() for part in parts) + b"".join(tok.tokens)


def tokenizer_of(data):
    """A SCORES tokenizer read back from its section."""
    words = np.frombuffer(data, "<u4", int.from_bytes(data[:4], "little"))
    _, kind, flags, size, bos, eos, unknown, entries, specials = (int(word) for word in words[:9])
    tables = np.split(words[12:], np.cumsum([256, specials, size + 1, entries]))
    text, start = data[4 * len(words):], tables[2]
    return Tokenizer(kind, [text[a:b] for a, b in zip(start, start[1:])], flags, bos, eos, unknown, tables[0].tolist(),
                     tables[1].tolist(), scores=tables[4].view("<f4").tolist())


def choose_tokenizer(options, beside, vocab, note):
    """The bytes of the tokenizer section: of --tokenizer, or beside the weights, or GPT-2's if the vocabulary is; b'' else."""
    path = options.tokenizer or (os.path.join(beside, "tokenizer.json") if beside else "")
    if not options.tokenizer and not os.path.exists(path):
        path = os.path.join(os.path.dirname(os.path.abspath(__file__)), GPT2_MERGES)
        if vocab != GPT2_VOCAB:
            note("exporting without a tokenizer: none given (--tokenizer FILE), and a vocabulary of "
                 f"{vocab} is not GPT-2's")
            return b""
        if not os.path.exists(path):
            note(f"exporting without a tokenizer: {path} is missing")
            return b""
    try:
        with open(path, "rb") as f:
            start = f.read(16)
        if start.lstrip()[:1] == b"{":
            tokenizer = hf_tokenizer(path)
        elif start[:6] == b"\xfd7zXZ\0" or start[:8] == b"#version":
            tokenizer = gpt2_tokenizer(path)
        else:
            tokenizer = llama2c_tokenizer(path, vocab)
        if tokenizer.size > vocab:
            raise Refused(f"{path} has {tokenizer.size} tokens, the model knows {vocab}: it belongs to another model")
        return section(tokenizer)
    except ValueError as e:
        raise Refused(str(e)) from None


# ----------------------------------------------------------------------------------------------------------------------
# 5. The command line.

EXAMPLES = """examples:
  export.py based-360m/ based-360m.bin                   a HazyResearch/based download: config.json and weights
  export.py stories15M.bin out.bin --tokenizer tokenizer.bin    a llama2.c model
  export.py layer.pt layer.bin --heads 8 --mode causal   a layer of taylor-series-linear-attention: its state dict
  export.py edifice.safetensors out.bin --mode window    an Edifice model
  export.py --random based-1b random.bin                 random weights in a released shape, to measure speed
  export.py --inspect models/stories260K.bin             what a checkpoint contains"""


def name_of(kind, table):
    return dict(enumerate(table)).get(kind, f"? {kind}")


def human(n):
    for unit in ("bytes", "kB", "MB", "GB"):
        if n < 1000 or unit == "GB":
            return f"{n:,.0f} {unit}" if unit == "bytes" else f"{n:.2f} {unit}"
        n /= 1000


def inspect(path):
    """Prints what a checkpoint contains; returns the exit status: 1 if it is damaged."""
    saved = Checkpoint(path)
    c, layers = saved.config, saved.layers
    norms = ("none", "rms", "layer", "l2")
    name = c.name.split(b"\0")[0].decode("utf-8", "replace")
    print(f"{path}: {''.join(ch if ch.isprintable() else '?' for ch in name) or 'unnamed'}")
    if c.flags & BIDIRECTIONAL:
        print("  looks at all of a window in both directions")
    head = "none" if not c.rows else "tied" if c.flags & TIED else "separate"
    print(f"  format {c.format}, {c.file_size:,} bytes; width {c.dim}, {len(layers)} layers, "
          f"vocabulary {c.vocab} in {c.rows} rows, head {head}{' with bias' if c.flags & HEAD_BIAS else ''}, final norm {name_of(c.final_norm, norms)} "
          f"{c.final_norm_eps:g}, trained on {c.context or '?'} tokens at once")
    if c.input:
        print(f"  input: vectors of {c.input}{', projected' if c.flags & INPUT_PROJECTION else ''}")
    print(f"  parameters {parameters(c, layers):,}, tokenizer {human(c.tokenizer_bytes) if c.tokenizer_bytes else 'none'}, "
          f"state of a session {human(4 * sum(state_floats(c, l) for l in layers))}")
    print("\nlayer mixer  heads  kv  key value  mixer's own                                   norms        mlp")
    flags = "in.bias out.bias taps.bias up.bias down.bias value-gates shift no-out no-residual key-mean".split()
    for i, l in enumerate(layers):
        own = {MIXER_NONE: "", CONV: f"{l.taps} taps",
               WINDOW: f"{l.window} keys, rotary {l.rotary}, scale {l.scale:.6g}",
               TAYLOR: f"degree {l.degree} {name_of(l.kernel, ('dot', 'diagonal'))}, scale {l.scale:.6g}, divide "
                       f"{name_of(l.normaliser, ('add', 'clamp', 'raw', 'one'))} {l.normaliser_eps:g}"
                       f"{f', rotary {l.rotary}' if l.rotary else ''}{f', keep {l.keep}' if l.keep else ''}"
                       f"{f', forget {l.forget:.6g}' if l.forget else ''}{f', last {l.window} keys exact' if l.window else ''}"
               }.get(l.mixer, "?")
        print(f"{i:5} {name_of(l.mixer, ('none', 'conv', 'taylor', 'window')):6}"
              f"{l.heads:6}{l.kv_heads:4}{l.key_width:5}{l.value_width:6}  {own:44}  {name_of(l.norm1, norms) + '/' + name_of(l.norm2, norms):11}  "
              f"{name_of(l.mlp, ('none', 'swiglu', 'gelu'))} {l.hidden or ''}"
              f"  {' '.join(flag for bit, flag in enumerate(flags) if l.flags >> bit & 1)}")
    print(f"\n{'tensor':28} {'shape':>16} dtype {'bytes':>14} {'offset':>14}")
    for t in saved.placed:
        print(f"{t.name:28} {'x'.join(map(str, t.shape)):>16} {t.dtype.name:5} {t.nbytes:14,} {t.offset:14,}")
    sound = saved.checksum() == c.checksum
    print(f"\nchecksum {c.checksum:016x} {'ok' if sound else 'WRONG: the file was damaged after it was written'}")
    return 0 if sound else 1


def convert(options, note):
    """Exports options.source, or random weights, to options.out, and says so; returns the exit status."""
    beside = opened = saved = None
    remembers = {name: value for name, value in (("keep", options.keep), ("forget", options.forget)) if value is not None}
    if options.random:
        origin = options.random
        config, layers, plan = open_random(options.random, options, note)
    else:
        origin = os.path.normpath(options.source)
        if not os.path.exists(origin):
            raise Refused(f"{origin} does not exist")
        if os.path.isdir(origin) or os.path.basename(origin) in ("config.json", "model.safetensors", "pytorch_model.bin"):
            beside = origin if os.path.isdir(origin) else os.path.dirname(origin)
            if not os.path.exists(os.path.join(beside, "config.json")):
                raise Refused(f"{beside or '.'} holds no config.json: expected a HazyResearch/based directory")
            config, layers, plan = open_based(beside, options, note)
        else:
            with open(origin, "rb") as f:
                ours = f.read(8) == MAGIC
            if ours and not (options.taylor_degree or remembers):
                raise Refused(f"{origin} is a checkpoint of based.c already; --inspect shows what it contains")
            saved = Checkpoint(origin) if ours else None
            opened = None if ours else open_tensors(origin, options, note)
            config, layers, plan = opened or (open_checkpoint(saved) if ours else open_llama(origin, options, note))
    unused = [name for name in OF_TENSORS if getattr(options, name)]
    if unused and not opened:
        raise Refused(f"--{unused[0]} belongs to layers of taylor-series-linear-attention and Edifice models, which {origin} "
                      "is not")
    as_it_was = saved and not options.dtype and not options.taylor_degree        # nothing is computed anew: the same bytes
    if as_it_was:
        plan = {name: lambda name=name: saved.raw(name) for name in plan}
    else:
        code = DTYPE_CODES[options.dtype or "f32"]
        config.embedding_dtype = config.head_dtype = code if config.rows else 0
        for l in layers:
            l.in_dtype = l.out_dtype = l.up_dtype = l.down_dtype = code
    stem = os.path.splitext(os.path.basename(os.path.abspath(origin)))[0]
    title = options.name or stem + (" (random)" if options.random else "")
    if options.name or not saved:
        config.name = title.encode("utf-8")[:63].decode("utf-8", "ignore").encode("utf-8")
    tokenizer = saved.tokenizer if saved else choose_tokenizer(options, beside, config.vocab, note) if config.rows else b""
    if options.taylor_degree:
        to_constant_memory(config, layers, plan, tokenizer, options, note)
    if remembers and not any(l.mixer == TAYLOR for l in layers):
        raise Refused(f"--{next(iter(remembers))} is about taylor layers, and {origin} has none")
    for l in layers:
        if l.mixer == TAYLOR:
            l.__dict__.update(remembers)
    if os.path.isdir(options.out):
        raise Refused(f"{options.out} is a directory; expected the name of the file to write")
    write(options.out, config, layers, tokenizer, lambda name: plan[name]())
    print(f"{options.out}: {human(config.file_size)}, {parameters(config, layers):,} parameters, {len(layers)} layers, "
          f"{'tokenizer' if tokenizer else 'no tokenizer'}, "
          f"{'weights as they were' if as_it_was else options.dtype or 'f32'}; read back and verified")
    return 0


def arguments(argv):
    def count(text):
        value = int(text)
        if not 1 <= value <= 1 << 20:
            raise argparse.ArgumentTypeError(f"{text} is not between 1 and {1 << 20}")
        return value

    def natural(text):
        return 0 if text == "0" else count(text)

    parser = argparse.ArgumentParser(
        prog="export.py", description="Turns a trained model into one checkpoint file for based.c.", epilog=EXAMPLES,
        usage="export.py SOURCE OUT.bin [options]\n       export.py --random SHAPE OUT.bin [options]\n"
              "       export.py --inspect FILE",
        formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("files", nargs="*", metavar="SOURCE OUT.bin",
                        help="what to read (recognised by its content) and the file to write")
    parser.add_argument("--dtype", choices=sorted(DTYPE_CODES), help="how matrices are stored (f32; of a checkpoint: as "
                        "they are)")
    parser.add_argument("--tokenizer", metavar="FILE", help="tokenizer.json, or tokenizer.bin of llama2.c (default: "
                        "tokenizer.json beside the weights, else GPT-2's if the vocabulary is)")
    parser.add_argument("--window", type=count, metavar="N", help="visible keys of window layers (default: as the origin "
                        "says; for llama2.c its context length)")
    parser.add_argument("--chunk", type=count, default=16, metavar="C", help="taylor layers: tokens kept before they join "
                        "the sums (16)")
    parser.add_argument("--keep", type=natural, metavar="N", help="taylor layers: the first N tokens stay as they are for ever "
                        "(0, or as the origin says)")
    parser.add_argument("--forget", type=float, metavar="F", help="taylor layers: the part of the sums that is lost each time a "
                        "chunk joins them (0, or as the origin says). A checkpoint of based.c can be given both")
    group = parser.add_argument_group("what files of bare tensors (lucidrains, Edifice) do not tell")
    group.add_argument("--mode", choices=("causal", "window"), help="each vector sees those before it, in constant memory; or "
                       "all of a window, both ways")
    group.add_argument("--heads", type=count, metavar="H", help="query heads (Edifice: 4)")
    group.add_argument("--degree", type=count, metavar="P", help="Edifice: taylor_order (2)")
    group.add_argument("--shift", action="store_true", help="lucidrains: made with shift_tokens=True")
    group.add_argument("--prefix", metavar="TEXT", help="use the tensors whose names begin so")
    group = parser.add_argument_group("a llama2.c model, or a checkpoint of one, on constant memory")
    group.add_argument("--taylor-degree", type=count, metavar="P", help="softmax attention for the last --window tokens, and a "
                       "polynomial of this degree instead of exp for all before them")
    group.add_argument("--calibrate", metavar="TEXT", help="the text to fit the polynomials to, a few thousand words of the "
                       "kind the model will read; documents are separated by the begin token, such as <s>")
    parser.add_argument("--name", metavar="TEXT", help="what the checkpoint calls itself (default: from SOURCE)")
    parser.add_argument("--random", metavar="SHAPE", help="write random weights: based-360m, based-1b or a config.json")
    parser.add_argument("--seed", type=int, default=1, help="of --random (1)")
    parser.add_argument("--inspect", metavar="FILE", help="print what a checkpoint contains, check its checksum")
    options = parser.parse_intermixed_args(argv)
    expected = 0 if options.inspect else 1 if options.random else 2
    if len(options.files) != expected:
        parser.error(f"expected {('no', 'one', 'two')[expected]} file name{'s' if expected != 1 else ''}"
                     f"{(' with --inspect', ' (OUT.bin) with --random', ' (SOURCE OUT.bin)')[expected]}, got {len(options.files)}")
    if options.chunk > 1024:
        parser.error(f"--chunk {options.chunk} is above 1024")
    if options.taylor_degree and not (options.window and options.calibrate):
        parser.error("--taylor-degree needs --window and --calibrate")
    if options.calibrate and not options.taylor_degree:
        parser.error("--calibrate needs --taylor-degree")
    if max(options.degree or 1, options.taylor_degree or 1) > 12:
        parser.error(f"--degree {options.degree} is above 12")
    if not 0 <= (options.forget or 0) < 1:
        parser.error(f"--forget {options.forget} is not from 0 to below 1")
    if options.seed < 0:
        parser.error(f"--seed {options.seed} is negative")
    options.out = options.files[-1] if options.files else None
    options.source = options.files[0] if expected == 2 else None
    return options


def main(argv=None):
    options = arguments(argv)

    def note(text):
        print(f"export.py: note: {text}", file=sys.stderr)

    def stop(number, frame):
        raise KeyboardInterrupt
    signal.signal(signal.SIGTERM, stop)
    try:
        status = inspect(options.inspect) if options.inspect else convert(options, note)
        sys.stdout.flush()
        return status
    except Refused as e:
        print(f"export.py: {e}", file=sys.stderr)
    except BrokenPipeError:                               # whoever read our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as e:
        print(f"export.py: {e.filename or options.out or options.inspect}: {e.strerror or e}", file=sys.stderr)
    except ImportError as e:
        print(f"export.py: {e}; pip install -r tests/requirements.txt", file=sys.stderr)
    except MemoryError:
        print("export.py: not enough memory for the largest tensor of this model", file=sys.stderr)
    except KeyboardInterrupt:
        print("export.py: interrupted; nothing was written", file=sys.stderr)
        return 130
    return 1


if __name__ == "__main__":
    sys.exit(main())
