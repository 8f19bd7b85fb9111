"""Based language models in Python: based.h through ctypes, in this one file. based.h documents what
the functions do; numpy is used if it is there.

    import based
    model = based.Model("models/stories260K-q8.bin")
    session = based.Session(model)
    for text in session.write("One day, a cat", 40, temperature=0.8, seed=7):
        print(text, end="", flush=True)
    print()

    past = session.save()                       # bytes; session.load(past) goes back to here
    logits = session.feed(model.encode(" and", 0))      # a row of float32 for each token

Installed, it loads the library that was installed with it; beside the sources, it compiles them.
"""
import ctypes as C
import ctypes.util
import os
import shlex
import struct
import subprocess
import tempfile

try:
    import numpy as np
except ImportError:
    np = None                                             # rows are lists, and only ids can be fed

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(HERE)
FLAGS = "-O2 -std=c99 -ffp-contract=off -fPIC -shared"


class BasedError(Exception):
    def __init__(self, error):
        super().__init__(error.text.decode("utf-8"))
        self.status = error.status


class Error(C.Structure):
    _fields_ = [("status", C.c_int), ("text", C.c_char * 252)]


class Sampler(C.Structure):
    _fields_ = [("temperature", C.c_float), ("top_p", C.c_float), ("top_k", C.c_uint32),
                ("min_p", C.c_float), ("repeat_penalty", C.c_float), ("repeat_last_n", C.c_uint32),
                ("seed", C.c_uint64), ("vocab", C.c_uint32), ("state", C.c_uint64),
                ("seen", C.c_uint64), ("memory", C.c_void_p)]


FLOATS, IDS = C.POINTER(C.c_float), C.POINTER(C.c_int32)
PROTOTYPES = {                                            # name: (result, arguments)
    "based_open": (C.c_void_p, [C.c_char_p, C.c_int, C.POINTER(Error)]),
    "based_close": (None, [C.c_void_p]),
    "based_width": (C.c_size_t, [C.c_void_p]),
    "based_model_config": (C.c_void_p, [C.c_void_p]),
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
    "based_saved_bytes": (C.c_size_t, [C.c_void_p, C.c_size_t]),
    "based_save": (C.c_int, [C.c_void_p, C.c_char_p, C.c_size_t, C.c_char_p, C.c_size_t,
                             C.POINTER(Error)]),
    "based_load": (C.c_int, [C.c_void_p, C.c_char_p, C.c_size_t, C.c_void_p, C.c_void_p,
                             C.POINTER(Error)]),
    "based_set_threads": (None, [C.c_void_p, C.c_int]),
    "based_hash": (C.c_uint32, [C.c_uint32, FLOATS, C.c_size_t]),
    "based_checksum": (C.c_uint64, [C.c_char_p, C.c_size_t]),
    "based_tokenizer_open": (C.c_int, [C.c_void_p, C.c_void_p, C.POINTER(Error)]),
    "based_encode_bound": (C.c_size_t, [C.c_void_p, C.c_size_t]),
    "based_encode_scratch": (C.c_size_t, [C.c_void_p, C.c_size_t]),
    "based_encode": (C.c_int64, [C.c_void_p, C.c_char_p, C.c_size_t, C.c_int, IDS, C.c_char_p,
                                 C.POINTER(Error)]),
    "based_is_stop": (C.c_int, [C.c_void_p, C.c_int32]),
    "based_token_bytes": (C.c_void_p, [C.c_void_p, C.c_int32, C.POINTER(C.c_size_t)]),
    "based_decode": (C.c_size_t, [C.c_void_p, C.c_char_p, C.c_int32, C.c_char_p]),
    "based_decode_flush": (C.c_size_t, [C.c_char_p, C.c_char_p]),
    "based_decode_bound": (C.c_size_t, [C.c_void_p]),
    "based_sampler_bytes": (C.c_size_t, [C.POINTER(Sampler)]),
    "based_sampler_init":
        (C.c_int, [C.POINTER(Sampler), C.c_char_p, C.c_size_t, C.POINTER(Error)]),
    "based_sampler_accept": (None, [C.POINTER(Sampler), C.c_int32]),
    "based_sample": (C.c_int32, [C.POINTER(Sampler), FLOATS]),
}
_library = None


def load(path):
    """The library in this file, with the prototypes above."""
    lib = C.CDLL(os.fspath(path))
    for name, (result, arguments) in PROTOTYPES.items():
        function = getattr(lib, name)
        function.restype, function.argtypes = result, arguments
    return lib


def compile(path, *extra):
    """Compiles the library with $CC (else cc), FLAGS, $CFLAGS and extra flags."""
    sources = [os.path.join(ROOT, name) for name in ("based.c", "tokenizer.c")]
    command = [*shlex.split(os.environ.get("CC", "cc")), *FLAGS.split(),
               *shlex.split(os.environ.get("CFLAGS", "")), *extra]
    subprocess.run([*command, "-o", path, *sources, "-lm"], check=True)


def build(*extra):
    """The library as compile() makes it, loaded."""
    with tempfile.TemporaryDirectory(prefix="based-") as directory:
        path = os.path.join(directory, "based.so")
        compile(path, *extra)
        return load(path)                                 # stays loaded when the file is gone


def library():
    """The library that all models share which are opened without one."""
    global _library
    if _library is None and os.path.exists(os.path.join(ROOT, "based.c")):
        _library = build()
    if _library is None:
        names = [os.path.join(directory, "libbased" + end) for end in (".so", ".dylib")
                 for directory in (HERE, os.path.join(ROOT, "..", "lib"))]
        found = [*filter(os.path.exists, names), C.util.find_library("based")]
        if not found[0]:
            raise OSError(f"found no libbased beside {__file__}, nor where the system looks for "
                          "libraries; `make install` installs it")
        _library = load(found[0])
    return _library


def check(status, error):
    if status:
        raise BasedError(error)


def floats(array):
    return array.ctypes.data_as(FLOATS)


def ids(array):
    return array if np is None else array.ctypes.data_as(IDS)


def as_ids(tokens):
    """Something that ids() takes."""
    if np is None:
        return (C.c_int32 * len(tokens))(*tokens)
    return np.ascontiguousarray(tokens, np.int32)


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
        """The ids of text (str or bytes), with bos first if there is one; flags are those of
        based_encode."""
        text = text.encode() if isinstance(text, str) else text
        tok, error = self.tokenizer(), Error()
        out = as_ids([0] * self.lib.based_encode_bound(tok, len(text)))
        scratch = C.create_string_buffer(self.lib.based_encode_scratch(tok, len(text)))
        n = self.lib.based_encode(tok, text, len(text), flags, ids(out), scratch, C.byref(error))
        check(min(n, 0), error)
        return out[:n]

    def sampling(self):
        """The settings of a Sampler that the checkpoint recommends, else those of `run`."""
        config = C.string_at(self.lib.based_model_config(self.handle), 256)
        recommended = struct.unpack_from("ffIffI", config, 148)
        values = recommended if any(recommended) else (1.0, 0.9, 0, 0.0, 1.0, 64)
        return dict(zip((name for name, _ in Sampler._fields_), values))

    def text_bytes(self, tokens):
        """How many bytes of text these ids stand for."""
        tok, n, total = self.tokenizer(), C.c_size_t(), 0
        for token in tokens:
            total += n.value if self.lib.based_token_bytes(tok, int(token), C.byref(n)) else 0
        return total


class Session:
    """One text over a model, which is read in blocks of so many tokens."""

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
        error, width = Error(), self.model.width
        if np is None:
            out = (C.c_float * (len(tokens) * width))()
            check(self.lib.based_feed(self.handle, as_ids(tokens), len(tokens), out,
                                      C.byref(error)), error)
            return [out[i * width:(i + 1) * width] for i in range(len(tokens))]
        tokens = np.asarray(tokens)
        out = np.full((len(tokens), width), np.nan, np.float32)
        if tokens.ndim == 2:
            x = np.ascontiguousarray(tokens, np.float32)
            status = self.lib.based_feed_vectors(self.handle, floats(x), len(x), floats(out),
                                                 C.byref(error))
        else:
            x = as_ids(tokens)
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
        x, error = as_ids(tokens), Error()
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
        if np is None or not pointer:
            return pointer[:self.model.width] if pointer else None
        return np.ctypeslib.as_array(pointer, (self.model.width,)).copy()

    def write(self, prompt="", count=256, **settings):
        """Feeds the prompt and yields what follows, piece by piece: at most so many tokens, or up
        to the end of the text. settings: fields of Sampler; those that are left out are as in
        model.sampling(), and the seed is 0. `run -i PROMPT -n COUNT -s SEED` writes the same."""
        lib, tok, error = self.lib, self.model.tokenizer(), Error()
        sampler = Sampler(vocab=self.model.width, **{**self.model.sampling(), **settings})
        memory = C.create_string_buffer(lib.based_sampler_bytes(sampler))
        check(lib.based_sampler_init(sampler, memory, len(memory), C.byref(error)), error)
        tokens = self.model.encode(prompt, self.count() == 0)
        if self.count() + len(tokens) == 0:
            raise ValueError("the prompt is empty, and the model has no token to begin a text with")
        self.feed_last(tokens)
        decoder = C.create_string_buffer(6)
        text = C.create_string_buffer(lib.based_decode_bound(tok) + 12)
        for token in tokens:
            lib.based_sampler_accept(sampler, int(token))
            lib.based_decode(tok, decoder, int(token), text)
        for _ in range(count):
            token = lib.based_sample(sampler, lib.based_logits(self.handle))
            if lib.based_is_stop(tok, token):
                break
            lib.based_sampler_accept(sampler, token)
            check(lib.based_step(self.handle, token, C.byref(error)), error)
            yield text[:lib.based_decode(tok, decoder, token, text)].decode()
        yield text[:lib.based_decode_flush(decoder, text)].decode()

    def save(self):
        """The past as bytes, which load takes, on any machine."""
        error = Error()
        out = C.create_string_buffer(self.lib.based_saved_bytes(self.model.handle, 0))
        check(self.lib.based_save(self.handle, None, 0, out, len(out), C.byref(error)), error)
        return out.raw

    def load(self, saved):
        error = Error()
        check(self.lib.based_load(self.handle, saved, len(saved), None, None, C.byref(error)),
              error)

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
