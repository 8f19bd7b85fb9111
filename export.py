#!/usr/bin/env python3
"""Turns a trained model into one checkpoint file for based.c.

The format and the mathematics are written down in based.h, part 7. This file is the bridge: it
writes that file from what others wrote and checks the result. What the tensors of each original
mean is told in models/origins/, one file per original.

    1. the format      dtypes, the list of tensors in file order, the checksum
    2. writing         one tensor at a time, verified by reading back, put in place by a rename
    3. sources         which origin is it? safetensors, PyTorch, JSON
    4. the command line
"""
import argparse
import errno
import json
import math
import os
import re
import secrets
import shutil
import signal
import stat
import struct
import sys
import tempfile
import warnings
from collections import deque, namedtuple
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import numpy as np

from models import constant_memory
from models.tokens import (BESIDE, GPT2_MERGES, SETTINGS, choose_tokenizer, folders,
                           read_sampling)
from models.origins import *        # the records and numbers of based.h part 7, as from a header
from models.origins import edifice, hazyresearch, huggingface, llama2c, lucidrains

# --------------------------------------------------------------------------------------------------
# 1. The format.

MAGIC, FORMAT, BYTE_ORDER = b"BASED\r\n\032", 2, 0x01020304
CONFIG_BYTES, LAYER_BYTES, ALIGN = 256, 128, 64

# How numbers lie in the file: nbytes(shape); pack(array) -> what is written, uint8 arrays: of the
# one or two sections of a tensor; and unpack(bytes, shape) -> the array as stored.
Dtype = namedtuple("Dtype", "name nbytes pack unpack")


def plain(name, code):
    """A dtype that stores each number by itself, little-endian."""
    kind = np.dtype(code)
    return Dtype(name, lambda shape: math.prod(shape) * kind.itemsize,
                 lambda array: (np.ascontiguousarray(array, kind).reshape(-1).view(np.uint8),),
                 lambda data, shape: np.frombuffer(data, kind).reshape(shape))


def bfloat16(x, up=False):
    """The nearest bfloat16, halves to even, as uint16 bits. up: the smallest that is not below x
    (x >= 0): a scale that is rounded up keeps every weight within its range."""
    bits = x.astype(np.float32).view(np.uint32).astype(np.uint64)
    return (bits + (0xFFFF if up else 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def as_float(bits):
    """float32 from the bits of a bfloat16."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def quantized(name, bits, choose):
    """A dtype of part 7 with `bits` per weight. choose(groups) -> scales: one per row and group, as
    bfloat16."""
    # What is added to a weight; how many columns share a scale.
    middle, width = 1 << (bits - 1), 8 * bits

    def sizes(shape):
        """Tiles of 16 rows, groups, and columns that are stored, a multiple of 32."""
        return -(-shape[0] // 16), -(-shape[1] // width), -(-shape[1] // 32) * 32

    def nbytes(shape):
        tiles, groups, columns = sizes(shape)
        return align(tiles * groups * 32) + tiles * 16 * columns * bits // 8

    def pack(array):
        tiles, groups, columns = sizes(array.shape)
        t = np.zeros((tiles * 16, groups * width), np.float32)
        t[:array.shape[0], :array.shape[1]] = array
        t = t.reshape(tiles, 16, groups, width)
        scales = choose(t)
        # Below 2^-82 based.c refuses a scale; such weights become 0.
        scales = np.where(np.abs(as_float(scales)) < 2.0 ** -82, np.uint16(0), scales)
        low = 1 - middle if bits == 8 else -middle
        values = rounded(t, as_float(scales)[..., None], low, middle - 1) + middle
        values = values.astype(np.uint8).reshape(tiles, 16, -1)[..., :columns]
        values = values.reshape(tiles, 16, -1, 32 // bits)            # the columns of each word
        if bits == 4:
            values = values[..., :4] | values[..., 4:] << 4
        return tuple(np.ascontiguousarray(part.swapaxes(1, 2)).reshape(-1).view(np.uint8)
                     for part in (scales.astype("<u2"), values))

    def unpack(data, shape):
        tiles, groups, columns = sizes(shape)
        scales = np.frombuffer(data[:tiles * groups * 32], "<u2")
        scales = scales.reshape(tiles, groups, 16).swapaxes(1, 2).reshape(tiles * 16, groups)
        values = np.frombuffer(data[align(tiles * groups * 32):], np.uint8)
        values = values.reshape(tiles, -1, 16, 4).swapaxes(1, 2)
        if bits == 4:
            values = np.concatenate([values & 15, values >> 4], axis=-1)
        values = values.reshape(tiles * 16, columns).astype(np.float32) - middle
        each = np.repeat(as_float(scales), width, axis=1)[:, :columns]
        return (values * each)[:shape[0], :shape[1]]

    return Dtype(name, nbytes, pack, unpack)


def rounded(t, step, low, high):
    """t in whole steps, halves to even, within low .. high; 0 where the step is 0."""
    steps = np.divide(t, step, out=np.zeros_like(t), where=step != 0)
    return np.clip(np.rint(steps), low, high).astype(np.int16)


def largest(t):
    """8 bits: the scale with which the largest weight of the group becomes 127."""
    return bfloat16(np.abs(t).max(-1) / np.float32(127), up=True)


def least_error(t):
    """4 bits: of many scales, the one with the smallest squared error. The range is -8 .. 7, so the
    sign of the scale matters too: the largest weight may take the longer side."""
    extreme = np.take_along_axis(t, np.abs(t).argmax(-1)[..., None], -1)[..., 0]
    best, error = np.zeros(extreme.shape, np.uint16), np.empty_like(t)
    least = np.full(extreme.shape, np.inf, np.float32)
    for levels in (-8.6, -8.3, -8, -7.7, -7.4, -7.1, -6.8, -6.5, -6.2, -5.9,
                   5.6, 6.2, 6.5, 6.8, 7, 7.3, 7.6):
        bits = bfloat16(extreme / np.float32(levels))
        step = as_float(bits)[..., None]
        np.divide(t, np.where(step == 0, np.float32(1), step), out=error)
        np.clip(np.rint(error, out=error), np.float32(-8), np.float32(7), out=error)
        error *= step
        error -= t
        total = np.square(error, out=error).sum(-1)
        best, least = np.where(total < least, bits, best), np.minimum(total, least)
    return best


F32, U64 = plain("f32", "<f4"), plain("u64", "<u8")
# The number in the header -> how a matrix is stored.
DTYPES = {0: F32, 1: quantized("q8", 8, largest), 2: quantized("q4", 4, least_error)}
DTYPE_CODES = {dtype.name: code for code, dtype in DTYPES.items()}

Tensor = namedtuple("Tensor", "name shape dtype")
Placed = namedtuple("Placed", "name shape dtype offset nbytes")


def tensors(config, layers):
    """The list of all tensors of a checkpoint in file order. The writer, the reader and --inspect
    follow it. KeyError: a dtype that does not exist."""
    found, dim, prefix = [], config.dim, ""

    def add(present, name, *shape, dtype=F32):
        if present:
            found.append(Tensor(prefix + name, shape, dtype))

    def norm(name, kind):
        add(kind != NORM_NONE, name + ".weight", dim)
        add(kind == NORM_LAYER, name + ".bias", dim)

    def linear(name, rows, cols, dtype, bias):
        add(True, name + ".weight", rows, cols, dtype=DTYPES[dtype])
        add(bias, name + ".bias", rows)

    add(config.input == 0, "embedding", config.rows, dim, dtype=DTYPES[config.embedding_dtype])
    if config.flags & INPUT_PROJECTION:
        linear("input", dim, config.input, 0, True)
    for i, l in enumerate(layers):
        prefix, inner = f"layers.{i}.", l.heads * l.head_dim_v
        norm("norm1", l.norm1)
        if l.mixer == CONV:
            linear("in", 2 * inner, dim, l.in_dtype, l.flags & IN_BIAS)
            add(True, "conv.weight", l.conv_width, inner)
            add(l.flags & CONV_BIAS, "conv.bias", inner)
        elif l.mixer in (TAYLOR, WINDOW):
            pairs = 2 if l.flags & PREFIX else 1              # key and value of each token
            rows = l.heads * l.head_dim_k + pairs * l.kv_heads * (l.head_dim_k + l.head_dim_v)
            linear("in", rows, dim, l.in_dtype, l.flags & IN_BIAS)
            add(l.flags & QK_NORM, "q_norm.weight", l.head_dim_k)
            add(l.flags & QK_NORM, "k_norm.weight", l.head_dim_k)
            add(l.rope_pairs, "rope_freq", l.rope_pairs, dtype=U64)
            add(l.flags & KEY_MEAN, "key_mean", l.kv_heads, l.head_dim_k)
            hedgehog = l.mixer == TAYLOR and l.kernel == HEDGEHOG
            add(l.mixer == TAYLOR and not hedgehog, "coefficients", l.heads, l.degree + 1)
            add(hedgehog, "q_map", l.heads, l.degree, l.head_dim_k)
            add(hedgehog, "k_map", l.heads, l.degree, l.head_dim_k)
            add(hedgehog, "mix", l.heads)
            add(l.fading == GATED, "fade.weight", l.kv_heads, dim)
            add(l.fading == GATED, "fade.bias", l.kv_heads)
            add(l.fading == FIXED, "fade.factor", l.kv_heads)
            add(l.flags & (VALUE_GATES | VALUE_FACTORS), "gate.weight", l.heads, dim)
        if l.mixer != MIXER_NONE and not l.flags & NO_OUT:
            linear("out", dim, inner, l.out_dtype, l.flags & OUT_BIAS)
        norm("norm2", l.norm2)
        if l.mlp != MLP_NONE:
            up = 2 * l.hidden_dim if l.mlp == SWIGLU else l.hidden_dim
            linear("up", up, dim, l.up_dtype, l.flags & UP_BIAS)
            linear("down", dim, l.hidden_dim, l.down_dtype, l.flags & DOWN_BIAS)
    prefix = ""
    norm("final_norm", config.final_norm)
    if config.rows and not config.flags & TIED:
        linear("head", config.rows, dim, config.head_dtype, False)
    add(config.flags & HEAD_BIAS, "head.bias", config.rows)
    return found


def parameters(config, layers):
    """Trained numbers: every tensor but the tables that follow from the configuration."""
    return sum(math.prod(t.shape) for t in tensors(config, layers)
               if not t.name.endswith(("rope_freq", "coefficients", "key_mean", "fade.factor")))


def align(offset):
    """The next multiple of 64, where every section begins."""
    return -(-offset // ALIGN) * ALIGN


def layout(config, layers):
    """Where everything lies: (list of Placed, file size)."""
    end = CONFIG_BYTES + LAYER_BYTES * len(layers)
    if config.tokenizer_bytes:
        end = align(end) + config.tokenizer_bytes
    placed = []
    for t in tensors(config, layers):
        placed.append(Placed(*t, align(end), t.dtype.nbytes(t.shape)))
        end = placed[-1].offset + placed[-1].nbytes
    return placed, end


class Checksum:
    """based_checksum of part 7, fed piece by piece. A lane is a polynomial in K, so many rows are
    one product with powers of K instead of a loop."""
    LANES, K, ROWS = 16, 0x9E3779B1, 1 << 14

    def __init__(self):
        self.lanes = np.arange(1, self.LANES + 1, dtype=np.uint32)
        self.powers = np.cumprod([1] + [self.K] * self.ROWS, dtype=np.uint32)[::-1]
        self.rest, self.n = b"", 0

    def update(self, data):
        """Takes more bytes, any object with a buffer."""
        data = memoryview(data).cast("B")
        self.n += len(data)
        step = 4 * self.LANES * (self.ROWS - 1)           # with the rest at most ROWS rows
        for at in range(0, len(data), step):
            piece = self.rest + bytes(data[at:at + step])
            rows = len(piece) // (4 * self.LANES)
            words = np.frombuffer(piece, "<u4", rows * self.LANES).reshape(rows, self.LANES)
            powers = self.powers[self.ROWS - rows:]
            self.lanes = (self.lanes * powers[0]
                          + (words * powers[1:, None]).sum(0, dtype=np.uint32))
            self.rest = piece[rows * 4 * self.LANES:]

    def value(self):
        """The checksum of all bytes so far, 64 bits."""
        h = [int(lane) for lane in self.lanes]
        rest = self.rest + bytes(-len(self.rest) % 4)
        for lane, (word,) in enumerate(struct.iter_unpack("<I", rest)):
            h[lane] = h[lane] * self.K + word & 0xFFFFFFFF
        g = self.n
        for lane in h:
            g = (g ^ lane) * 0x9E3779B97F4A7C15 & (1 << 64) - 1
            g ^= g >> 32
        return g


# --------------------------------------------------------------------------------------------------
# 2. Writing and reading.

@contextmanager
def replacing(path):
    """The only way in which this program writes a file. Gives the name of an empty temporary file;
    what it holds in the end becomes `path`, and without an error only. Its name is unique, it lies
    in the same folder, and it is removed on every way out. A link stays and the file it names is
    replaced; that keeps its mode. What cannot be replaced is written through: a pipe, a device, a
    file that is a mount of its own."""
    old = os.stat(path) if os.path.exists(path) else None
    ordinary = not old or stat.S_ISREG(old.st_mode)
    if old and stat.S_ISDIR(old.st_mode):
        raise Refused(f"{path} is a directory; expected the name of the file to write")
    if old and not os.access(path, os.W_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
    target = os.path.realpath(path) if ordinary else path
    folder, name = os.path.split(target) if ordinary else (tempfile.gettempdir(), "export")
    temporary = os.path.join(folder, f"{name[:40]}.{secrets.token_hex(8)}.part")
    try:
        try:
            mode = stat.S_IMODE(old.st_mode) if old and ordinary else 0o666
            os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode))
        except OSError as e:                              # a place that cannot be written
            e.filename = path
            raise
        if old and ordinary:
            os.chmod(temporary, mode)
        yield temporary
        try:
            if not ordinary:
                raise OSError(errno.EBUSY, path)
            os.replace(temporary, target)
            sync_directory(folder or ".")
        except OSError as e:
            if e.errno != errno.EBUSY:
                raise
            with open(temporary, "rb") as whole, open(target, "wb") as out:
                shutil.copyfileobj(whole, out)
    finally:
        with suppress(OSError):
            os.unlink(temporary)


def write(path, *checkpoint):
    """Writes a checkpoint (see write_temporary): the file appears at `path` whole and verified, or
    `path` stays as it was."""
    with replacing(path) as temporary:
        return write_temporary(temporary, *checkpoint)


def write_temporary(temporary, config, layers, tokenizer, fetch):
    """Writes a checkpoint and reads it back. tokenizer: its section, b"" for none. fetch(name) ->
    what stored() takes. Sets the fields of config that follow from the rest, and returns it."""
    config.magic, config.format, config.byte_order = MAGIC, FORMAT, BYTE_ORDER
    config.layers, config.tokenizer_bytes = len(layers), len(tokenizer)
    placed, config.file_size = layout(config, layers)
    with open(temporary, "wb") as f:
        total = Checksum()

        def put(data, offset):
            """Zeros up to offset, then data; the checksum is of all but the first 32 bytes."""
            for part in (bytes(offset - f.tell()), data):
                skip = max(0, 32 - f.tell())
                f.write(part)
                total.update(memoryview(part).cast("B")[skip:])

        put(CONFIG.pack(config), 0)
        put(b"".join(map(LAYER.pack, layers)), CONFIG_BYTES)
        if tokenizer:
            put(tokenizer, align(f.tell()))
        for t in progress(placed, "writing"):
            put(b"", t.offset)
            for piece in stored(t, fetch(t.name)):
                put(piece, f.tell())
        f.seek(24)
        f.write(struct.pack("<Q", total.value()))
        f.flush()
        os.fsync(f.fileno())
    verify(temporary, total.value())
    return config


def stored(t, data):
    """What the file holds of a tensor, in pieces. data: its array or Rows, or (uint8) its bytes as
    another checkpoint holds them. Refused if it has another shape, or holds NaN or infinity."""
    if isinstance(data, np.ndarray):
        if data.dtype == np.uint8:
            yield data
            return
        data = Rows(data.shape, lambda begin, end, whole=data: whole[begin:end])
    if data.shape != t.shape:
        raise Refused(f"{t.name} has shape {list(data.shape)}, expected {list(t.shape)}")

    def pack(rows):
        part = data[rows[0]:rows[1]]
        if t.dtype is not U64 and not np.isfinite(part).all():
            row, *rest = np.argwhere(~np.isfinite(part))[0].tolist()
            raise Refused(f"{t.name} holds {part[(row, *rest)]} at {[rows[0] + row, *rest]}: a "
                          "model with NaN or infinity cannot run")
        return t.dtype.pack(part)

    first, second = 0, []
    for section, *more in in_order(pack, data.pieces()):
        yield section
        first += len(section)
        second += more
    if second:
        yield bytes(-first % ALIGN)
        yield from second


def in_order(work, items):
    """work(item) for each, in their order, by as many threads as there are processors; not much is
    begun before it is asked for."""
    threads = min(os.cpu_count() or 1, 16)                # each has a piece in memory
    with ThreadPoolExecutor(threads) as pool:
        begun = deque()
        for item in items:
            begun.append(pool.submit(work, item))
            if len(begun) > 2 * threads:
                yield begun.popleft().result()
        while begun:
            yield begun.popleft().result()


def sync_directory(path):
    """Makes a rename in it last through a power cut, where the system can."""
    try:
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)
    except OSError:
        pass


class Checkpoint:
    """A checkpoint read back: config, layers, tokenizer (bytes), placed, and tensors by name, one
    at a time from the file. Opening it checks header and size; the checksum only when asked for."""

    def __init__(self, path):
        self.path, size = path, os.path.getsize(path)
        with open(path, "rb") as f:
            head = f.read(CONFIG_BYTES)
            if head[:8] != MAGIC:
                raise Refused(f"{path} is no checkpoint of based.c: it begins with {head[:8]!r}, "
                              f"expected {MAGIC!r}")
            if len(head) < CONFIG_BYTES:
                raise Refused(f"{path} ends inside its header, at byte {size} of {CONFIG_BYTES}")
            self.config = config = CONFIG.unpack(head)
            if (config.format, config.byte_order) != (FORMAT, BYTE_ORDER):
                raise Refused(f"{path} has format {config.format}, this program knows {FORMAT}")
            table = f.read(LAYER_BYTES * config.layers)
        if config.file_size != size:
            raise Refused(f"{path} has {size:,} bytes, its header says {config.file_size:,}: copy "
                          "it again")
        if len(table) < LAYER_BYTES * config.layers:
            raise Refused(f"{path} says it has {config.layers} layers but ends before their "
                          "descriptions")
        self.layers = [LAYER.unpack(table[i:i + LAYER_BYTES])
                       for i in range(0, len(table), LAYER_BYTES)]
        try:
            self.placed, expected = layout(config, self.layers)
        except KeyError as e:
            raise Refused(f"{path} stores a matrix in dtype {e}, this program knows "
                          f"{sorted(DTYPES)}") from None
        if expected != size:
            raise Refused(f"{path} has {size:,} bytes, its header describes {expected:,}")
        self.named = {t.name: t for t in self.placed}
        start = align(CONFIG_BYTES + len(table))
        self.tokenizer = self.read(start, config.tokenizer_bytes).tobytes()

    def read(self, offset, nbytes):
        """Bytes of the file, uint8."""
        return np.fromfile(self.path, np.uint8, nbytes, offset=offset)

    def raw(self, name):
        """The bytes of a tensor as they are in the file, uint8."""
        t = self.named[name]
        return self.read(t.offset, t.nbytes)

    def __getitem__(self, name):
        t = self.named[name]
        return t.dtype.unpack(self.raw(name), t.shape)

    def checksum(self):
        """The checksum of the file as it is."""
        total, piece = Checksum(), 1 << 26
        for at in progress(range(32, self.config.file_size, piece), "checksum", "piece"):
            total.update(self.read(at, min(piece, self.config.file_size - at)))
        return total.value()


def verify(path, checksum):
    """Reads the file back from the start: is it what was written, of which this is the checksum?"""
    saved = Checkpoint(path)
    if not saved.checksum() == saved.config.checksum == checksum:
        raise Refused(f"verification failed: what is read back from {path} differs from what was "
                      "written; is the disk sound?")


# --------------------------------------------------------------------------------------------------
# 3. Sources: which origin reads it? models/origins/__init__.py says what an origin returns.

def float8(exponent_bits, bias):
    """(256) float32: the values of FP8 numbers, sign, exponent, mantissa; without infinities."""
    code = np.arange(256)
    mantissa_bits = 7 - exponent_bits
    exponent, mantissa = code >> mantissa_bits & (1 << exponent_bits) - 1, code & (
        1 << mantissa_bits) - 1
    value = np.where(exponent > 0, (mantissa / (1 << mantissa_bits) + 1) * 2.0 ** (exponent - bias),
                     mantissa / (1 << mantissa_bits) * 2.0 ** (1 - bias))
    return np.where(code < 128, value, -value).astype(np.float32)


E4M3, E5M2 = float8(4, 7), float8(5, 15)
E4M3[[0x7F, 0xFF]], E5M2[[*range(0x7D, 0x80), *range(0xFD, 0x100)]] = np.nan, np.nan
E5M2[[0x7C, 0xFC]] = np.inf, -np.inf
# dtype of safetensors -> (as numpy reads it, what makes float32 of it)
SAFE = {"F64": ("<f8", np.float32), "F32": ("<f4", np.float32), "F16": ("<f2", np.float32),
        "BF16": ("<u2", as_float), "F8_E4M3": ("u1", E4M3.__getitem__),
        "F8_E5M2": ("u1", E5M2.__getitem__)}
WHOLE = "whole numbers, whose scales are not known: expected floats"


def open_safetensors(path, settings={}):
    """A Source of a .safetensors file; nothing but the header is read until a tensor is loaded."""
    first_bytes(path)
    size, shapes, placed, unusable = os.path.getsize(path), {}, {}, {}
    try:
        with open(path, "rb") as f:
            start = 8 + int.from_bytes(f.read(8), "little")
            if not 8 < start <= size:
                raise ValueError(f"its header should end at byte {start:,}, the file at {size:,}")
            header = json.loads(f.read(start - 8))
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry[
                "data_offsets"]
            if not all(type(n) is int and n >= 0 for n in (*shape, begin, end)):
                raise ValueError(f"{name} has a shape or place that is no list of numbers")
            nbytes = math.prod(shape) * np.dtype(SAFE[dtype][0]).itemsize if dtype in SAFE else (
                end - begin)
            if nbytes != end - begin or end < begin or start + end > size:
                raise ValueError(f"{name} has {list(shape)} numbers of {dtype} at bytes {begin} to "
                                 f"{end} of {size - start}")
            shapes[name], placed[name] = shape, (dtype, start + begin)
            if dtype not in SAFE:
                unusable[name] = f"{dtype}: " + (WHOLE if dtype[:1] in "IUB" else "a form of "
                                                 "number that is not supported")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, MemoryError) as e:
        raise Refused(f"{path} is no valid safetensors file: {type(e).__name__}: "
                      f"{str(e).splitlines()[0] if str(e) else ''}") from None

    def load(name, begin, end):
        (dtype, at), row = placed[name], shapes[name][1:]
        (kind, to_float), n = SAFE[dtype], math.prod(row)
        data = np.fromfile(path, kind, (end - begin) * n,
                           offset=at + begin * n * np.dtype(kind).itemsize)
        with np.errstate(over="ignore"):                  # infinity is refused, with its place
            return to_float(data).reshape(end - begin, *row)
    return Source(shapes, load, path, settings, unusable)


def open_torch(path, settings={}):
    """A Source of a PyTorch file of plain tensors. No code in the file is run."""
    first_bytes(path)
    try:
        import torch
    except ImportError:
        raise Refused(f"reading {path} needs PyTorch: pip install torch, or convert the file to "
                      "safetensors") from None
    warnings.simplefilter("ignore")                       # of torch, about itself
    try:
        try:
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except (RuntimeError, UnicodeError):              # the format before zip, or an odd name
            with open(path, "rb") as f:
                state = torch.load(f, map_location="cpu", weights_only=True)
    except Exception as e:                                # torch raises what it likes, with advice
        found = re.search(r"GLOBAL (\S+)|class[: ]+(\S+)", str(e))    # to run what is in the file
        reason = (f"it holds {found[1] or found[2]}, and nothing but tensors is loaded, since no "
                  "code of a file is run" if found else "it is a program (TorchScript)"
                  if "TorchScript" in str(e) else "it is no such file, or damaged"
                  if "weights_only" in str(e) else (str(e) or repr(e)).splitlines()[0])
        raise Refused(f"{path} cannot be read as a PyTorch file of tensors: {reason}; write it by "
                      "torch.save(model.state_dict(), FILE)") from None
    while isinstance(state, dict) and not any(isinstance(t, torch.Tensor) for t in state.values()):
        inner = [name for name in ("state_dict", "model_state_dict", "model", "module")
                 if isinstance(state.get(name), dict)]
        if len(inner) != 1:
            break
        state = state[inner[0]]
    if not isinstance(state, dict):
        raise Refused(f"{path} is no state dict: expected a dictionary of tensors, found "
                      f"{type(state).__name__}")
    for name, t in state.items():
        if not isinstance(t, torch.Tensor) or not isinstance(name, str):
            raise Refused(f"{path} is no state dict: it holds {name}, which is "
                          f"{type(t).__name__}; expected a dictionary of tensors")
    unusable = {name: what for name, t in state.items() if (what := strange(torch, t))}
    return Source({name: tuple(t.shape) for name, t in state.items()},
                  lambda name, begin, end: state[name].detach()[begin:end].float().numpy(),
                  path, settings, unusable)


def strange(torch, t):
    """What a tensor of PyTorch is if its numbers cannot be read as they are; else None."""
    if type(t) not in (torch.Tensor, torch.nn.Parameter):
        return f"{type(t).__name__}, which is no plain tensor"
    if t.is_meta:
        return "a meta tensor, which has no numbers: save the model after its weights were loaded"
    if t.layout != torch.strided:
        return f"{t.layout}, which is not supported: store to_dense() of it"
    if t.is_quantized:
        return f"{t.dtype}, which is not supported: store dequantize() of it"
    if t.is_complex():
        return f"{t.dtype}, which has an imaginary part: expected floats"
    return None if t.is_floating_point() else f"{t.dtype}: {WHOLE}"


def weight_map(index):
    """{name of a tensor: name of the file that holds it}, as an index lists them."""
    table = read_json(index).get("weight_map")
    if not isinstance(table, dict) or not table or not all(
            isinstance(name, str) and os.path.basename(name) == name for name in table.values()):
        raise Refused(f"{index} should hold a weight_map: the file name for each tensor")
    return table


def open_index(index, settings, read):
    """One Source of all files that an index lists; read(path, settings) opens one of them."""
    table, sources, where = weight_map(index), [], {}
    for path in (index.parent / name for name in sorted(set(table.values()))):
        if not path.exists():
            raise Refused(f"{index} lists {path.name}, which is missing: download it")
        sources.append(read(path, settings))
        for tensor in sources[-1].shapes:
            if tensor in where:
                raise Refused(f"{path} holds {tensor}, and so does {where[tensor].where}")
            where[tensor] = sources[-1]
    for tensor in table.keys() - where:
        raise Refused(f"{index} lists {tensor}, which is in none of its files")
    return Source({name: source.shapes[name] for name, source in where.items()},
                  lambda name, *rows: where[name].load(name, *rows), index, settings,
                  {name: what for source in sources for name, what in source.unusable.items()})


WEIGHTS = {}                        # the first that is there is read; an index lists files like it
for file, read_file in (("model.safetensors", open_safetensors), ("pytorch_model.bin", open_torch)):
    WEIGHTS.update({file: read_file, f"{file}.index.json": partial(open_index, read=read_file)})


def open_directory(path, options, note):
    """A directory of config.json and weights."""
    if not (path / "config.json").exists():
        raise Refused(f"{path} holds no config.json: expected a directory with a model of "
                      "HazyResearch/based or of Hugging Face transformers")
    settings = read_json(path / "config.json")
    for name, reader in WEIGHTS.items():
        if (path / name).exists():
            source = reader(path / name, settings)
            other = any(tensor.endswith("embed_tokens.weight") for tensor in source.shapes)
            if options.lolcats:
                more = [open_torch(Path(folder) / "model.pt") for folder in options.lolcats]
                source = huggingface.with_lolcats(source, *more)
            return (huggingface if other else hazyresearch).read(source, options, note)
    raise Refused(f"{path} holds config.json but neither {' nor '.join(WEIGHTS)}")


def inputs(options):
    """The files that this command reads, as far as they are known before anything is read."""
    yield from filter(None, (options.source, options.random, options.tokenizer, options.calibrate))
    yield from (Path(folder) / "model.pt" for folder in options.lolcats or ())
    yield GPT2_MERGES
    path = Path(options.source or "")
    if options.source and (path.is_dir() or path.name in ("config.json", *WEIGHTS)):
        folder = path if path.is_dir() else path.parent
        yield from (folder / name for name in ("config.json", *WEIGHTS, *BESIDE))
        for name in WEIGHTS:
            if name.endswith(".index.json") and (folder / name).exists():
                yield from (folder / part for part in set(weight_map(folder / name).values()))


BARE_OPTIONS = "heads degree mode shift prefix".split()       # that only open_tensors understands


def open_tensors(path, options, note):
    """One file of tensors, recognized by their names; None if it is no such file."""
    start = first_bytes(path)
    if start[8:9] == b"{":
        source = open_safetensors(path)
    elif start[:2] == b"PK" or start[:1] == b"\x80":
        source = open_torch(path)
    else:
        return None
    prefix, names = re.sub(WRAPPERS, "", options.prefix or ""), source.shapes
    source = source.renamed(lambda name: name[len(prefix):] if name.startswith(prefix) else None)
    for origin in (lucidrains, edifice):
        if all(mark in source for mark in origin.MARKS):
            return origin.read(source, options, note)
    mark = lucidrains.MARKS[0]
    begins = sorted(name.removesuffix(mark) for name in names if name.endswith(mark))
    hint = f"; --prefix {begins[0]} would name one attention layer of it" if begins else ""
    raise Refused(f"{path} holds tensors of no model this program knows, such as "
                  f"{min(names, default='none')}{hint}")


def open_random(name, options, note):
    """Random weights in a released shape (SHAPES), or in that of a config.json."""
    settings = SHAPES.get(name) or read_json(name)
    if settings.get("model_type") in huggingface.FAMILIES:
        return huggingface.read(huggingface.Random(settings, name, options.seed), options, note)
    return hazyresearch.read(hazyresearch.random(settings, name, options.seed), options, note)


SHAPES = {**hazyresearch.SHAPES, **huggingface.SHAPES}


# --------------------------------------------------------------------------------------------------
# 4. The command line.

EXAMPLES = """examples:
  export.py based-360m/ based-360m.bin                   a HazyResearch/based download
  export.py SmolLM2-135M/ smollm2.bin --dtype q8         a download of Hugging Face transformers
  export.py Meta-Llama-3.1-8B/ out.bin --lolcats lolcats-llama-3.1-8b-distill/ \
            lolcats-llama-3.1-8b-ft-lora/                Llama with linear attention
  export.py stories15M.bin out.bin --tokenizer tokenizer.bin    a llama2.c model
  export.py layer.pt layer.bin --heads 8 --mode causal --no-shift
                                                a layer of taylor-series-linear-attention
  export.py edifice.safetensors out.bin --heads 4 --degree 2 --mode window    an Edifice model
  export.py --random based-1b random.bin                 random weights, to measure speed
  export.py --inspect models/stories260K.bin             the tensors of a checkpoint"""


def inspect(path):
    """The tensors of a checkpoint as text, and the exit status: 1 if it is damaged. The layers are
    told by `run CHECKPOINT --info`."""
    saved = Checkpoint(path)
    c = saved.config
    lines = [f"{path}: {c.name.rstrip(bytes(1)).decode('utf-8', 'replace')!r}",
             f"format {c.format}, {c.file_size:,} bytes, width {c.dim}, {c.layers} layers, "
             f"vocabulary {c.vocab} in {c.rows} rows, parameters "
             f"{parameters(c, saved.layers):,}, tokenizer {c.tokenizer_bytes:,} bytes",
             f"\n{'tensor':28} {'shape':>16} dtype {'bytes':>14} {'offset':>14}"]
    for t in saved.placed:
        lines.append(f"{t.name:28} {'x'.join(map(str, t.shape)):>16} {t.dtype.name:5} "
                     f"{t.nbytes:14,} {t.offset:14,}")
    sound = saved.checksum() == c.checksum
    lines.append(f"\nchecksum {c.checksum:016x} "
                 f"{'ok' if sound else 'WRONG: the file was damaged after it was written'}")
    return "\n".join(lines), int(not sound)


def convert(options, temporary, note):
    """Exports options.source, or random weights, to the file `temporary`; returns what to say."""
    beside = bare = saved = unchanged = None
    path = Path(options.random or options.source)
    changes = {name: given for name in ("sinks", "decay")
               if (given := getattr(options, name)) is not None}

    # Which origin is it?
    if options.random:
        model = open_random(options.random, options, note)
    elif not path.exists():
        raise Refused(f"{path} does not exist")
    elif path.is_dir() or path.name in ("config.json", *WEIGHTS):
        beside = path if path.is_dir() else path.parent
        model = open_directory(beside, options, note)
    elif first_bytes(path)[:8] == MAGIC:
        if not (options.taylor_degree or options.dtype or options.window or options.sampling
                or changes):
            raise Refused(f"{path} is a checkpoint of based.c already; --dtype, --window, --sinks, "
                          "--decay, --sampling or --taylor-degree change it, and --inspect shows "
                          "what it contains")
        saved = Checkpoint(path)
        unchanged = not (options.dtype or options.taylor_degree)     # then bytes stay as they are
        load = saved.raw if unchanged else saved.__getitem__
        model = saved.config, saved.layers, {t.name: lambda name=t.name: load(name)
                                             for t in saved.placed}
    else:
        bare = open_tensors(path, options, note)
        model = bare or llama2c.read(path, options, note)
    config, layers, plan = model
    for name in BARE_OPTIONS:
        if getattr(options, name) and not bare:
            raise Refused(f"--{name} belongs to layers of taylor-series-linear-attention and "
                          f"Edifice models, which {path} is not")
    if options.lolcats and not any(l.kernel == HEDGEHOG for l in layers):
        raise Refused(f"--lolcats belongs to a model of the Llama family, which {path} is not")

    # What the origin does not tell: dtypes, name, tokenizer.
    dtype = options.dtype or "f32"
    if not unchanged:
        code = DTYPE_CODES[dtype]
        config.embedding_dtype = config.head_dtype = code if config.rows else 0
        for l in layers:
            l.in_dtype = l.out_dtype = l.up_dtype = l.down_dtype = code
    if options.name or not saved:
        stem = Path(os.path.abspath(path)).stem
        title = options.name or (f"{stem} (random)" if options.random else stem)
        config.name = title.encode("utf-8", "replace")[:63].decode("utf-8", "ignore").encode()
    tokenizer = saved.tokenizer if saved else b""
    if config.rows and not saved:
        tokenizer = choose_tokenizer(options.tokenizer, beside, config.vocab, note)

    # Changes on request.
    if options.sampling and not config.rows:
        raise Refused(f"--sampling is about models that write text, which {path} does not")
    if config.rows:
        read_sampling(config, [] if saved else folders(options.tokenizer, beside),
                      options.sampling or {})
    if options.taylor_degree:
        constant_memory.convert(config, layers, plan, tokenizer, options, note)
    elif saved and options.window:
        windows = [l for l in layers if l.mixer == WINDOW]
        if not windows:
            raise Refused(f"--window is about window layers, and {path} has none")
        for l in windows:
            l.window = options.window
    taylor = [l for l in layers if l.mixer == TAYLOR]
    if changes and not taylor:
        raise Refused(f"--{next(iter(changes))} is about taylor layers, and {path} has none")
    if changes and any(l.fading for l in taylor):
        raise Refused(f"--{next(iter(changes))} is not for {path}, whose sums fade by themselves")
    for l in taylor:
        l.__dict__.update(changes)

    write_temporary(temporary, config, layers, tokenizer, lambda name: (
        plan[name] if isinstance(plan[name], Rows) else plan[name]()))
    return (f"{options.out}: {config.file_size / 1e6:.2f} MB, {parameters(config, layers):,} "
            f"parameters, {len(layers)} layers, {'' if tokenizer else 'no '}tokenizer, "
            f"{'weights as they were' if unchanged else dtype}; read back and verified")


def export_model(options, note):
    """Everything but --inspect; returns what to say, and the exit status."""
    for path in inputs(options):
        if os.path.exists(options.out) and os.path.exists(path) and os.path.samefile(
                options.out, path):
            raise Refused(f"{options.out} would be written, and is read too ({path}): give the "
                          "output another name")
    with suppress(OSError, ValueError, AttributeError):   # /dev/stdout holds the model alone
        if os.path.samestat(os.stat(options.out), os.fstat(sys.stdout.fileno())):
            sys.stdout = sys.stderr
    with replacing(options.out) as temporary:
        text = convert(options, temporary, note)
    return text, 0


def between(low, high, kind=int):
    """An argparse type: a number from low to high."""
    def number(text):
        with suppress(ValueError):
            value = kind(text)
            if low <= value <= high:                          # NaN is not
                return value
        raise argparse.ArgumentTypeError(f"{text!r} is no number from {low} to {high}")
    return number


def sampling(text):
    """An argparse type: "temp=0.8,top-p=0.95" as {field of the config: number}."""
    found, known = {}, {ours: between(*limits, type(usual))
                        for ours, usual, *limits, _, _ in SETTINGS}
    for part in text.split(","):
        name, _, value = part.partition("=")
        field = {"temp": "temperature"}.get(name, name.replace("-", "_"))
        if field not in known:
            raise argparse.ArgumentTypeError(f"{part!r}: expected NAME=NUMBER, names are temp, " +
                                             ", ".join([*known][1:]).replace("_", "-"))
        try:
            found[field] = known[field](value)
        except argparse.ArgumentTypeError as e:
            raise argparse.ArgumentTypeError(f"{name}: {e}") from None
    return found


class OneLine(argparse.ArgumentParser):
    """Errors as one line, as everywhere here."""

    def error(self, message):
        self.exit(2, f"export.py: {message}; export.py --help explains the options\n")


def arguments(argv):
    """The options as a namespace, with source and out (None where there is none). Exits with 2 if
    they are wrong."""
    count, degree = between(1, 1 << 20), between(1, 12)
    parser = OneLine(
        prog="export.py", description=__doc__.split("\n")[0],
        epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
        usage="export.py SOURCE OUT.bin [options]\n"
              "       export.py --random SHAPE OUT.bin [options]\n       export.py --inspect FILE")
    add = parser.add_argument
    add("files", nargs="*", metavar="SOURCE OUT.bin",
        help="what to read (recognized by its content) and the file to write")
    add("--dtype", choices=sorted(DTYPE_CODES),
        help="how matrices are stored (f32; of a checkpoint: as they are)")
    add("--tokenizer", metavar="FILE", help="tokenizer.json, vocab.json with merges.txt "
        "beside it, or tokenizer.bin of llama2.c (default: what lies beside the weights; GPT-2's "
        "if nothing does and the vocabulary is)")
    add("--window", type=count, metavar="N", help="visible keys of window layers (default: as the "
        "origin says; its context length where it sees all, for transformers at most 4096)")
    add("--chunk", type=between(1, 1024), metavar="C",
        help="taylor layers: tokens that are flushed into the sums together (16; of "
        "power retention 64)")
    add("--sinks", "--keep", type=between(0, 1 << 20), metavar="N", help="taylor layers: the first "
        "N tokens stay exact for ever (0, or as the origin says)")
    add("--decay", "--forget", type=between(0, 1 - 2.0 ** -24, float), metavar="F",
        help="taylor layers: the part that the sums lose each time a chunk is flushed into them "
        "(0, or as the origin says). A checkpoint of based.c can be given both")
    add("--sampling", type=sampling, metavar="LIST", help="what run uses unless its options say "
        "otherwise, such as temp=0.8,top-p=0.95,min-p=0.05,repeat-penalty=1.1 (default: as "
        "generation_config.json says). A checkpoint of based.c can be given this too")
    add("--lolcats", nargs=2, metavar="DIR", help="of a Llama with linear attention: the two "
        "downloads that change the base model SOURCE (distill and ft-lora)")
    add("--name", metavar="TEXT", help="what the checkpoint calls itself (default: from SOURCE)")
    add("--random", metavar="SHAPE",
        help=f"write random weights: {', '.join(SHAPES)}, or a config.json")
    add("--seed", type=between(0, 1 << 63), default=1, help="of --random (1)")
    add("--inspect", metavar="FILE", help="list the tensors of a checkpoint, check its checksum")
    add = parser.add_argument_group("what files of bare tensors (lucidrains, Edifice) do not "
                                    "tell").add_argument
    add("--mode", choices=("causal", "window"), help="each vector sees those before it, in "
        "constant memory; or all of a window, both ways")
    add("--heads", type=count, metavar="H", help="query heads")
    add("--degree", type=degree, metavar="P", help="Edifice: taylor_order")
    add("--shift", action=argparse.BooleanOptionalAction,
        help="lucidrains: made with shift_tokens=True, or not")
    add("--prefix", metavar="TEXT", help="use the tensors whose names begin so")
    add = parser.add_argument_group("a llama2.c model, or a checkpoint of one, on constant "
                                    "memory").add_argument
    add("--taylor-degree", type=degree, metavar="P", help="softmax attention for the last --window "
        "tokens, and a polynomial of this degree instead of exp for all before them")
    add("--calibrate", metavar="TEXT", help="the text to fit the polynomials to, a few thousand "
        "words of the kind the model will read; documents are separated by the begin token, such "
        "as <s>")
    options = parser.parse_intermixed_args(argv)
    expected = 0 if options.inspect else 1 if options.random else 2
    if len(options.files) != expected:
        parser.error(f"expected {expected} file names, got {len(options.files)}")
    if bool(options.taylor_degree) != bool(options.calibrate) or \
            options.taylor_degree and not options.window:
        parser.error("--taylor-degree and --calibrate go together, and with --window")
    options.source, options.out = ([None, None] + options.files)[-2:]
    return options


def stop(*_):
    """A signal that asks the program to end: once, so that it can tidy up."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt


SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP")
           if hasattr(signal, name)]


def main(argv=None):
    """The program; returns its exit status."""
    options = arguments(argv)

    def note(text):
        print(f"export.py: note: {text}", file=sys.stderr)

    for number in SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:    # as nohup leaves SIGHUP
            signal.signal(number, stop)
    status = 1
    try:
        text, result = (inspect(options.inspect) if options.inspect else
                        export_model(options, note))
        try:
            print(text, flush=True)
            return result
        except OSError as e:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            if isinstance(e, BrokenPipeError):            # whoever read our output has seen enough
                return 1
            raise Refused(f"standard output: {e.strerror}") from None
    except KeyboardInterrupt:
        error, status = "interrupted; nothing was written", 130
    except Refused as e:
        error = e
    except OSError as e:
        error = f"{e.filename or options.out or options.inspect}: {e.strerror or e}"
    except ImportError as e:
        error = f"{e}; pip install -r models/requirements.txt"
    except MemoryError:
        error = "not enough memory for the largest tensor of this model"
    print(f"export.py: {error}", file=sys.stderr)
    return status


def prepare_streams():
    """Standard streams that are closed become the null device, so that no file that is opened later
    takes their number; what a console cannot show is written as \\u30e2."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)                # gets the lowest number that is free
        if not getattr(sys, name):
            setattr(sys, name, open(number, "r" if number == 0 else "w", closefd=False))
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")


if __name__ == "__main__":
    prepare_streams()
    sys.exit(main())
