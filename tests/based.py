"""based.h for Python tests: builds based.c and tokenizer.c into a shared library and calls it
through ctypes.

    model = Model(path)
    session = Session(model, block=32)
    logits = session.feed(tokens)            # [tokens, width], float32
"""
import ctypes as C
import os
import shlex
import subprocess
import tempfile

import numpy as np

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
FLAGS = "-O2 -std=c99 -ffp-contract=off -fPIC -shared"


class BasedError(Exception):
    def __init__(self, error):
        super().__init__(error.text.decode("utf-8"))
        self.status = error.status


class Error(C.Structure):
    _fields_ = [("status", C.c_int), ("text", C.c_char * 252)]


FLOATS, IDS = C.POINTER(C.c_float), C.POINTER(C.c_int32)
PROTOTYPES = {                                            # name: (result, arguments)
    "based_open": (C.c_void_p, [C.c_char_p, C.c_int, C.POINTER(Error)]),
    "based_close": (None, [C.c_void_p]),
    "based_width": (C.c_size_t, [C.c_void_p]),
    "based_model_parameters": (C.c_uint64, [C.c_void_p]),
    "based_state_bytes": (C.c_size_t, [C.c_void_p]),
    "based_session_new": (C.c_void_p, [C.c_void_p, C.c_uint32, C.POINTER(Error)]),
    "based_session_free": (None, [C.c_void_p]),
    "based_step": (C.c_int, [C.c_void_p, C.c_int32, C.POINTER(Error)]),
    "based_feed": (C.c_int, [C.c_void_p, IDS, C.c_size_t, FLOATS, C.POINTER(Error)]),
    "based_feed_vectors": (C.c_int, [C.c_void_p, FLOATS, C.c_size_t, FLOATS, C.POINTER(Error)]),
    "based_feed_bidirectional":
        (C.c_int, [C.c_void_p, FLOATS, C.c_size_t, FLOATS, C.POINTER(Error)]),
    "based_feed_prefix": (C.c_int, [C.c_void_p, IDS, C.c_size_t, FLOATS, C.POINTER(Error)]),
    "based_step_many": (C.c_int, [C.POINTER(C.c_void_p), IDS, C.c_size_t, C.POINTER(Error)]),
    "based_draft_width": (C.c_size_t, [C.c_void_p]),
    "based_feed_draft": (C.c_int64, [C.c_void_p, IDS, C.c_size_t, FLOATS, FLOATS,
                                     C.POINTER(Error)]),
    "based_keep": (C.c_int, [C.c_void_p, C.c_size_t, C.POINTER(Error)]),
    "based_saved_bytes": (C.c_size_t, [C.c_void_p, C.c_size_t]),
    "based_save": (C.c_int, [C.c_void_p, C.c_void_p, C.c_size_t, C.c_char_p, C.c_size_t,
                             C.POINTER(Error)]),
    "based_logits": (FLOATS, [C.c_void_p]),
    "based_count": (C.c_uint64, [C.c_void_p]),
    "based_reset": (None, [C.c_void_p]),
    "based_copy": (C.c_int, [C.c_void_p, C.c_void_p, C.POINTER(Error)]),
    "based_set_threads": (None, [C.c_void_p, C.c_int]),
    "based_hash": (C.c_uint32, [C.c_uint32, FLOATS, C.c_size_t]),
    "based_checksum": (C.c_uint64, [C.c_char_p, C.c_size_t]),
    "based_tokenizer_open": (C.c_int, [C.c_void_p, C.c_void_p, C.POINTER(Error)]),
    "based_encode_bound": (C.c_size_t, [C.c_void_p, C.c_size_t]),
    "based_encode_scratch": (C.c_size_t, [C.c_void_p, C.c_size_t]),
    "based_encode": (C.c_int64, [C.c_void_p, C.c_char_p, C.c_size_t, C.c_int, IDS, C.c_char_p,
                                 C.POINTER(Error)]),
    "based_token_bytes": (C.c_void_p, [C.c_void_p, C.c_int32, C.POINTER(C.c_size_t)]),
}
_library = None


def build(*extra):
    """Compiles the library with $CC (else cc), FLAGS, $CFLAGS and extra flags into a temporary
    directory; loads and returns it."""
    with tempfile.TemporaryDirectory(prefix="based-test-") as directory:
        out = os.path.join(directory, "based.so")
        sources = [os.path.join(ROOT, name) for name in ("based.c", "tokenizer.c")]
        command = [*shlex.split(os.environ.get("CC", "cc")), *FLAGS.split(),
                   *shlex.split(os.environ.get("CFLAGS", "")), *extra]
        subprocess.run([*command, "-o", out, *sources, "-lm"], check=True)
        lib = C.CDLL(out)                                 # stays loaded when the file is gone
    for name, (result, arguments) in PROTOTYPES.items():
        function = getattr(lib, name)
        function.restype, function.argtypes = result, arguments
    return lib


def library():
    global _library
    if _library is None:
        _library = build()
    return _library


def check(status, error):
    if status:
        raise BasedError(error)


def floats(array):
    return array.ctypes.data_as(FLOATS)


def ids(array):
    return array.ctypes.data_as(IDS)


class Model:
    """A checkpoint opened for use, by the library of every test or by one of build(). Closed when
    it and its sessions are gone."""

    def __init__(self, path, flags=0, lib=None):
        self.lib, error = lib or library(), Error()
        self.handle = self.lib.based_open(os.fspath(path).encode(), flags, C.byref(error))
        if not self.handle:
            raise BasedError(error)
        self.width = self.lib.based_width(self.handle)
        self.parameters = self.lib.based_model_parameters(self.handle)
        self.state_bytes = self.lib.based_state_bytes(self.handle)

    def __del__(self):
        if getattr(self, "handle", None):
            self.lib.based_close(self.handle)


    def tokenizer(self):
        """A struct based_tokenizer over this model, as an opaque block that is large enough."""
        tok, error = C.create_string_buffer(512), Error()
        check(self.lib.based_tokenizer_open(tok, self.handle, C.byref(error)), error)
        return tok

    def encode(self, text, flags=1):
        """The ids of text (bytes), with bos first if there is one."""
        tok, error = self.tokenizer(), Error()
        out = np.zeros(self.lib.based_encode_bound(tok, len(text)), np.int32)
        scratch = C.create_string_buffer(self.lib.based_encode_scratch(tok, len(text)))
        n = self.lib.based_encode(tok, text, len(text), flags, ids(out), scratch, C.byref(error))
        check(min(n, 0), error)
        return out[:n]

    def text_bytes(self, tokens):
        """How many bytes of text these ids stand for."""
        tok, n, total = self.tokenizer(), C.c_size_t(), 0
        for token in tokens:
            total += n.value if self.lib.based_token_bytes(tok, int(token), C.byref(n)) else 0
        return total


class Session:
    def __init__(self, model, block=32, threads=1):
        self.model, self.lib, error = model, model.lib, Error()
        self.handle = self.lib.based_session_new(model.handle, block, C.byref(error))
        if not self.handle:
            raise BasedError(error)
        self.lib.based_set_threads(self.handle, threads)

    def __del__(self):
        if getattr(self, "handle", None):
            self.lib.based_session_free(self.handle)

    def step(self, token):
        """Feeds one token; returns a copy of the logits after it."""
        error = Error()
        check(self.lib.based_step(self.handle, int(token), C.byref(error)), error)
        return self.logits()

    def feed(self, tokens):
        """Feeds tokens (ids, or rows of float32 for a model of vectors); returns the output after
        each."""
        tokens, error = np.asarray(tokens), Error()
        out = np.full((len(tokens), self.model.width), np.nan, np.float32)
        if tokens.ndim == 2:
            x = np.ascontiguousarray(tokens, np.float32)
            status = self.lib.based_feed_vectors(self.handle, floats(x), len(x), floats(out),
                                                 C.byref(error))
        else:
            x = np.ascontiguousarray(tokens, np.int32)
            status = self.lib.based_feed(self.handle, ids(x), len(x), floats(out), C.byref(error))
        check(status, error)
        return out

    def feed_window(self, x):
        """Feeds vectors that all see each other; returns the output of each."""
        x, error = np.ascontiguousarray(x, np.float32), Error()
        out = np.full((len(x), self.model.width), np.nan, np.float32)
        check(self.lib.based_feed_bidirectional(self.handle, floats(x), len(x), floats(out),
                                                C.byref(error)), error)
        return out

    def feed_prefix(self, tokens):
        """Feeds the beginning of a text, whose tokens see each other; returns the output of
        each."""
        x, error = np.ascontiguousarray(tokens, np.int32), Error()
        out = np.full((len(x), self.model.width), np.nan, np.float32)
        check(self.lib.based_feed_prefix(self.handle, ids(x), len(x), floats(out),
                                         C.byref(error)), error)
        return out

    def feed_last(self, tokens):
        """Feeds ids without asking for the logits in between; returns those after the last."""
        x, error = np.ascontiguousarray(tokens, np.int32), Error()
        check(self.lib.based_feed(self.handle, ids(x), len(x), None, C.byref(error)), error)
        return self.logits()

    def draft(self, tokens):
        """Feeds a token and guesses; returns the logits after those that were fed."""
        x, error = np.ascontiguousarray(tokens, np.int32), Error()
        width = self.lib.based_draft_width(self.model.handle)
        self.drafted = [np.full((len(x), n), np.nan, np.float32) for n in (self.model.width, width)]
        fed = self.lib.based_feed_draft(self.handle, ids(x), len(x), *map(floats, self.drafted),
                                        C.byref(error))
        check(min(fed, 0), error)
        return self.drafted[0][:fed]

    def keep(self, n):
        """Takes back all but the first n tokens of the draft."""
        error = Error()
        check(self.lib.based_keep(self.handle, n, C.byref(error)), error)

    def save(self):
        n, error = self.lib.based_saved_bytes(self.model.handle, 0), Error()
        out = C.create_string_buffer(n)
        check(self.lib.based_save(self.handle, None, 0, out, n, C.byref(error)), error)
        return out.raw

    def logits(self):
        """A copy of the output after the last token, None before the first."""
        pointer = self.lib.based_logits(self.handle)
        return np.ctypeslib.as_array(pointer, (self.model.width,)).copy() if pointer else None

    def count(self):
        return self.lib.based_count(self.handle)

    def reset(self):
        self.lib.based_reset(self.handle)

    def copy_from(self, other):
        error = Error()
        check(self.lib.based_copy(self.handle, other.handle, C.byref(error)), error)


def step_many(sessions, tokens):
    """One token for each session at once; returns their logits [sessions, width]."""
    handles, error = (C.c_void_p * len(sessions))(*[s.handle for s in sessions]), Error()
    x = np.ascontiguousarray(tokens, np.int32)
    check(sessions[0].lib.based_step_many(handles, ids(x), len(x), C.byref(error)), error)
    return np.stack([s.logits() for s in sessions])


def same_bits(a, b):
    """Equal to the last bit, NaN and -0 included."""
    a, b = np.ascontiguousarray(a, np.float32), np.ascontiguousarray(b, np.float32)
    return a.shape == b.shape and np.array_equal(a.view(np.uint32), b.view(np.uint32))
