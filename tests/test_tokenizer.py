"""The tokenizer against the reference: Hugging Face tokenizers for BPE, the rule of llama2.c for
scores.

The library is called through ctypes; the sections of its tokenizers come from export.py, as they do
in a checkpoint. Nothing here needs more than this repository and tests/requirements.txt.
"""
import codecs
import ctypes
import hashlib
import json
import lzma
import os
import random
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest

numpy = pytest.importorskip("numpy")
tokenizers = pytest.importorskip("tokenizers")
hypothesis = pytest.importorskip("hypothesis")
from hypothesis import given, settings, strategies as st            # noqa: E402
from tokenizers import decoders, models, pre_tokenizers, processors, trainers       # noqa: E402

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
DATA = HERE / "data"
MERGES = ROOT / "models" / "gpt2.bpe.xz"
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(HERE))
import based            # noqa: E402
from models import tokens                       # noqa: E402
import unicode_tables   # noqa: E402

ADD_BOS, PARSE_SPECIALS = 1, 2


# --------------------------------------------------------------------------------------------------
# tokenizer.c from Python

class Struct(ctypes.Structure):
    _fields_ = ([(name, ctypes.c_uint32) for name in ("kind flags size bos eos unknown merges "
                 "specials sorted_size stops shown cut").split()]
                + [(name, ctypes.c_void_p) for name in ("byte_id special_id stop_id shown_id start "
                   "sorted score merge bytes").split()] + [("chat", ctypes.c_char_p * 4)])


class Error(ctypes.Structure):
    _fields_ = [("status", ctypes.c_int), ("text", ctypes.c_char * 252)]


class Decoder(ctypes.Structure):
    _fields_ = [("held", ctypes.c_ubyte * 4), ("n", ctypes.c_uint8), ("started", ctypes.c_uint8)]


@pytest.fixture(scope="session")
def library():
    lib = based.build()
    p, size = ctypes.c_void_p, ctypes.c_size_t
    lib.based_tokenizer_init.argtypes = [p, p, size, ctypes.c_uint32, p]
    lib.based_encode_bound.argtypes = lib.based_encode_scratch.argtypes = [p, size]
    lib.based_encode_bound.restype = lib.based_encode_scratch.restype = size
    lib.based_encode.argtypes = [p, ctypes.c_char_p, size, ctypes.c_int, p, p, p]
    lib.based_encode.restype = ctypes.c_int64
    lib.based_decode.argtypes = [p, p, ctypes.c_int32, p]
    lib.based_decode_flush.argtypes = [p, p]
    lib.based_decode_bound.argtypes = [p]
    for function in (lib.based_decode, lib.based_decode_flush, lib.based_decode_bound):
        function.restype = size
    lib.based_special.argtypes = [p, ctypes.c_char_p]
    lib.based_special.restype = ctypes.c_int32
    lib.based_token_bytes.argtypes = [p, ctypes.c_int32, ctypes.POINTER(size)]
    lib.based_token_bytes.restype = p
    return lib


class Ours:
    """A tokenizer of tokenizer.c over a section's bytes."""

    def __init__(self, lib, section, vocab):
        self.lib, self.struct, self.error = lib, Struct(), Error()
        self.section = numpy.frombuffer(section, dtype=numpy.uint8).copy()
        self.me = ctypes.byref(self.struct)
        if lib.based_tokenizer_init(self.me, self.section.ctypes.data, len(section), vocab,
                                    ctypes.byref(self.error)):
            raise ValueError(self.error.text.decode())
        self.out = ctypes.create_string_buffer(lib.based_decode_bound(self.me))

    def encode(self, text, flags=0):
        text = text.encode() if isinstance(text, str) else text
        ids = numpy.empty(self.lib.based_encode_bound(self.me, len(text)), dtype=numpy.int32)
        scratch = numpy.empty(self.lib.based_encode_scratch(self.me, len(text)) // 8 + 1,
                              dtype=numpy.uint64)
        n = self.lib.based_encode(self.me, text, len(text), flags, ids.ctypes.data,
                                  scratch.ctypes.data, ctypes.byref(self.error))
        assert n >= 0, self.error.text
        return ids[:n].tolist()

    def token(self, index):
        n = ctypes.c_size_t()
        at = self.lib.based_token_bytes(self.me, index, ctypes.byref(n))
        return ctypes.string_at(at, n.value)

    def decode(self, ids):
        decoder = Decoder()
        return b"".join(self.decode_one(decoder, index) for index in [*ids, None])

    def decode_one(self, decoder, index):
        """The text that the decoder gives out for one more token, or at the end (None)."""
        if index is None:
            n = self.lib.based_decode_flush(ctypes.byref(decoder), self.out)
        else:
            n = self.lib.based_decode(self.me, ctypes.byref(decoder), index, self.out)
        return self.out.raw[:n]


def reference(vocabulary, merges, specials=()):
    """The same BPE tokenizer as the reference library sees it."""
    characters = {byte: c for c, byte in tokens.byte_characters().items()}
    names = ["".join(characters[b] for b in token) for token in vocabulary]
    vocab = {name: i for i, name in enumerate(names)}
    made = tokenizers.Tokenizer(models.BPE(
        vocab=vocab, merges=[(names[a], names[b]) for a, b in merges]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([tokenizers.AddedToken(name, special=True) for name in specials])
    return made


@pytest.fixture(scope="session")
def gpt2(library):
    """(tokenizer.c, the reference library), both with the vocabulary that ships."""
    spec = tokens.gpt2_tokenizer(MERGES)
    ours = Ours(library, tokens.section(spec), 50257)
    theirs = reference(spec.tokens[:-1], sorted(spec.merges, key=spec.merges.get),
                       ["<|endoftext|>"])
    assert theirs.get_vocab_size() == 50257 and theirs.token_to_id("<|endoftext|>") == 50256
    theirs.encode_special_tokens = True             # their names are text, unless asked otherwise
    return ours, theirs


@pytest.fixture(scope="session")
def llama2c(library):
    return Ours(library, tokens.section(tokens.llama2c_tokenizer(DATA / "tok512.bin", 512)), 512)


def same(gpt2, text):
    ours, theirs = gpt2
    assert ours.encode(text) == theirs.encode(text).ids, repr(text[:200])


# --------------------------------------------------------------------------------------------------
# GPT-2

def test_gpt2_vocabulary_is_the_original():
    """The hashes are of OpenAI's two files: of vocab.bpe as it is, of encoder.json with its keys
    sorted."""
    assert (hashlib.sha256(lzma.decompress(MERGES.read_bytes())).hexdigest()
            == "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5")
    spec = tokens.gpt2_tokenizer(MERGES)
    characters = {byte: c for c, byte in tokens.byte_characters().items()}
    encoder = {"".join(characters[b] for b in token): i for i, token in enumerate(spec.tokens)}
    encoder["<|endoftext|>"] = 50256
    text = json.dumps(encoder, sort_keys=True).encode()
    assert (hashlib.sha256(text).hexdigest()
            == "855ec41a9d90094ebb1189ee8082e915505cf2dfe0691a4f39da9c020f9476b2")


def test_known_ids(gpt2):
    """Ids that many have printed: they hold whatever both libraries do."""
    assert gpt2[0].encode("Hello world") == [15496, 995]
    assert gpt2[0].encode("Hello, my dog is cute") == [15496, 11, 616, 3290, 318, 13779]
    question = ("The capital of California is Sacramento. The capital of Italy is Rome. "
                "The capital of France is")
    assert len(gpt2[0].encode(question)) == 19      # as the notebook of the released models says


@pytest.mark.parametrize("path", sorted(p for p in DATA.rglob("*.txt")), ids=lambda p: p.stem)
def test_texts(gpt2, path):
    raw = path.read_bytes()
    text = raw.decode("utf-8", "replace")
    same(gpt2, text)
    for line in text.splitlines():
        same(gpt2, line)
    ours = gpt2[0]
    assert b"".join(map(ours.token, ours.encode(raw))) == raw
    assert ours.decode(ours.encode(raw)) == text.encode()


def test_classes_of_all_code_points():
    """Letters, numbers and spaces are those of the reference library, for every code point."""
    ours = unicode_tables.source_classes((ROOT / "tokenizer.c").read_text())
    assert ours == unicode_tables.library_classes()


def test_all_code_points(gpt2):
    """Each code point between a letter, a number, a sign and spaces."""
    ours, theirs = gpt2
    for first in range(0, 0x110000, 0x1000):
        codes = [chr(c) for c in range(first, first + 0x1000) if not 0xD800 <= c < 0xE000]
        if first >= 0x40000 and first not in (0xE0000, 0xF0000, 0x10F000):
            codes = codes[::64]                     # planes of nothing: a sample
        text = "".join(f"a{c}1{c}!{c} {c}{c} " for c in codes)
        assert ours.encode(text) == theirs.encode(text).ids, hex(first)


PIECES = st.sampled_from(["a", "B", "é", "日", "ß", "7", "Ⅷ", "²", " ", " ", "  ", "\n", "\t",
                          "\u00a0", "\u3000", "\u0085", "\u200b", "'", "'s", "'ll", "'RE", "’",
                          "!", "-", "_", "\u0301", "🦙", "\u200d", "\0", "\u1680", "\u180e",
                          "<|endoftext|>"])
NAMES = st.sampled_from(["<|endoftext|>", "<|endof", "<|", "text|>"])
ODD_BYTES = st.lists(st.one_of(st.binary(max_size=4), PIECES.map(str.encode)),
                     max_size=20).map(b"".join)


@settings(max_examples=400, deadline=None)
@given(st.one_of(st.lists(PIECES, max_size=30).map("".join), st.text(max_size=60)))
def test_any_text(gpt2, text):
    same(gpt2, text)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.one_of(PIECES, st.text(max_size=5), NAMES), max_size=20).map("".join))
def test_special_tokens(gpt2, text):
    ours, theirs = gpt2
    theirs.encode_special_tokens = False
    try:
        assert ours.encode(text, PARSE_SPECIALS) == theirs.encode(text).ids
    finally:
        theirs.encode_special_tokens = True
    assert 50256 not in ours.encode(text)
    assert ours.encode(text, ADD_BOS) == [50256] + ours.encode(text)


@settings(max_examples=300, deadline=None)
@given(st.one_of(st.binary(max_size=80), ODD_BYTES))
def test_any_bytes_come_back(gpt2, llama2c, raw):
    ours = gpt2[0]
    ids = ours.encode(raw)
    assert b"".join(map(ours.token, ids)) == raw
    assert ours.decode(ids) == raw.decode("utf-8", "replace").encode()
    assert b"".join(map(llama2c.token, llama2c.encode(raw))) == (b" " + raw if raw else b"")
    assert llama2c.decode(llama2c.encode(raw, ADD_BOS)) == raw.decode("utf-8", "replace").encode()


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(0, 50256), max_size=30))
def test_decoder_on_any_ids(gpt2, ids):
    """The same text as Python's decoder makes of the bytes, at once and token by token; never an
    invalid byte."""
    ours = gpt2[0]
    raw = b"".join(map(ours.token, ids))
    assert ours.decode(ids) == raw.decode("utf-8", "replace").encode()
    decoder, strict = Decoder(), codecs.getincrementaldecoder("utf-8")("replace")
    for index in ids:
        text = ours.decode_one(decoder, index).decode("utf-8")
        assert text == strict.decode(ours.token(index)) and decoder.n <= 3


def test_speed(gpt2, llama2c):
    """A megabyte of anything takes less than two seconds; ten times that is the margin for a slow
    or busy machine."""
    size, rnd = 1 << 20, random.Random(1)
    english = (DATA / "udhr" / "eng.txt").read_bytes()
    shapes = [english * (size // len(english)), b"a" * size, b" " * size,
              "的".encode() * (size // 3), rnd.randbytes(size), b"\n" * size, b"-" * size,
              bytes(rnd.choices(b"etaoinshrdlu", k=size))]
    for shape in shapes:
        for ours in (gpt2[0], llama2c):
            start = time.process_time()
            ours.encode(shape)
            assert time.process_time() - start < 20, shape[:20]


# --------------------------------------------------------------------------------------------------
# tokenizer.json

def trained(tmp_path, change=None, alphabet=True, unknown=None, template=None,
            languages=("eng", "rus", "hin", "jpn")):
    """A byte-level BPE tokenizer trained on the test data, and its tokenizer.json, after
    change(spec)."""
    made = tokenizers.Tokenizer(models.BPE(unk_token=unknown))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    letters = pre_tokenizers.ByteLevel.alphabet() if alphabet else []
    trainer = trainers.BpeTrainer(vocab_size=1500, show_progress=False, initial_alphabet=letters,
                                  special_tokens=["<pad>", "<|x|>", "<|x|>y"])
    made.train([str(DATA / "udhr" / f"{name}.txt") for name in languages], trainer)
    if template:
        made.post_processor = processors.TemplateProcessing(
            template, special_tokens=[("<|x|>", 1), ("<pad>", 0)])
    path = tmp_path / "tokenizer.json"
    spec = json.loads(made.to_str())
    if change:
        change(spec)
    path.write_text(json.dumps(spec))
    return made, path


def test_trained_tokenizer(library, tmp_path):
    theirs, path = trained(tmp_path)
    spec = tokens.hf_tokenizer(path)
    ours = Ours(library, tokens.section(spec), theirs.get_vocab_size())
    assert spec.size == theirs.get_vocab_size() and ours.lib.based_special(ours.me, b"<|x|>y") == 2
    for file in sorted(DATA.rglob("*.txt")):
        for line in file.read_bytes().decode("utf-8", "replace").splitlines(keepends=True):
            for text in (line, f"<|x|>{line}<|x|>y<pad>{line[::-1]}<|x|"):
                assert ours.encode(text, PARSE_SPECIALS) == theirs.encode(text).ids, repr(text)
                assert ours.decode(ours.encode(text)) == text.encode()


@pytest.mark.parametrize("unknown", [None, "<pad>"])
def test_trained_tokenizer_without_all_bytes(library, tmp_path, unknown):
    """Bytes that it never saw become the unknown token if there is one, and vanish if not."""
    theirs, path = trained(tmp_path, alphabet=False, unknown=unknown, languages=["eng"])
    ours = Ours(library, tokens.section(tokens.hf_tokenizer(path)), theirs.get_vocab_size())
    for text in ("naïve", "日本 the right 日to日 life", "ÿÿ", "and\x00and", "é"):
        assert ours.encode(text, PARSE_SPECIALS) == theirs.encode(text).ids, text


def test_split_form_of_the_same_pattern(library, tmp_path):
    def change(spec):
        spec["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": tokens.GPT2_PATTERN}, "behavior": "Isolated",
             "invert": False},
            {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
             "use_regex": False}]}
    _, path = trained(tmp_path, change)
    theirs = tokenizers.Tokenizer.from_file(str(path))
    ours = Ours(library, tokens.section(tokens.hf_tokenizer(path)), 1500)
    for line in (DATA / "blns.txt").read_text().splitlines(keepends=True):
        assert ours.encode(line) == theirs.encode(line).ids


def test_template_names_bos_and_eos(tmp_path):
    _, path = trained(tmp_path, template="<|x|> $A <pad>")
    spec = tokens.hf_tokenizer(path)
    assert (spec.bos, spec.eos, spec.flags) == (1, 0, tokens.ADD_BOS)
    _, path = trained(tmp_path)
    config = '{"bos_token": {"content": "<|x|>"}, "eos_token": "<pad>"}'
    (tmp_path / "tokenizer_config.json").write_text(config)
    spec = tokens.hf_tokenizer(path)
    assert (spec.bos, spec.eos, spec.flags) == (1, 0, 0)


def added(**options):
    return lambda s: s["added_tokens"][0].update(options)


@pytest.mark.parametrize("change, reason", [
    (lambda s: s.update(normalizer={"type": "NFKC"}), "normalizer NFKC"),
    (lambda s: s.update(pre_tokenizer={"type": "Metaspace"}), "pre-tokenizer Metaspace"),
    (lambda s: s.update(pre_tokenizer=None), "pre-tokenizer None"),
    (lambda s: s["pre_tokenizer"].update(add_prefix_space=True), "add_prefix_space"),
    (lambda s: s["pre_tokenizer"].update(use_regex=False), "without a pattern"),
    (lambda s: s.update(pre_tokenizer={"type": "Sequence", "pretokenizers": [
        {"type": "Split", "pattern": {"Regex": r"\d"}, "behavior": "Isolated", "invert": False},
        {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}]}), "another pattern"),
    (lambda s: s.update(decoder={"type": "WordPiece"}), "decoder WordPiece"),
    (lambda s: s.update(post_processor={"type": "BertProcessing"}),
     "post-processor BertProcessing"),
    (lambda s: s["model"].update(type="Unigram"), "model Unigram"),
    (lambda s: s["model"].update(type="WordPiece"), "model WordPiece"),
    (lambda s: s["model"].update(byte_fallback=True), "byte_fallback"),
    (lambda s: s["model"].update(dropout=0.1), "dropout"),
    (lambda s: s["model"].update(end_of_word_suffix="</w>"), "end_of_word_suffix"),
    (lambda s: s["model"].update(continuing_subword_prefix="##"), "continuing_subword_prefix"),
    (lambda s: s["model"]["merges"].append(["q", "zzz"]), "not in the vocabulary"),
    (lambda s: s["model"]["vocab"].update({"日": 1499}), "byte-level characters"),
    (lambda s: s["model"]["vocab"].update({"zz": 10 ** 9}), "ids up to 1000000000"),
    (lambda s: s.pop("model"), "?"),
    (added(lstrip=True), "only tokens without"),
    (added(single_word=True), "only tokens without"),
])
def test_refused_tokenizers(tmp_path, change, reason):
    _, path = trained(tmp_path, change, languages=["eng"])
    with pytest.raises(ValueError) as caught:
        tokens.hf_tokenizer(path)
    text = str(caught.value)
    assert reason in text and "\n" not in text and str(path) in text


def test_files_that_are_no_tokenizer(tmp_path):
    path = tmp_path / "x"
    for content in (b"", b"{", b"[]", b"\xff\xfe", b"null"):
        path.write_bytes(content)
        with pytest.raises(ValueError):
            tokens.hf_tokenizer(path)
    for content in (b"\xff", b"a b c\n", b"a bcd\n", b"\xfd7zXZ\0broken", b"h e\nh e\n"):
        path.write_bytes(content)
        with pytest.raises(ValueError):
            tokens.gpt2_tokenizer(path)


# --------------------------------------------------------------------------------------------------
# llama2.c

def by_the_rule(spec, raw):
    """llama2.c's encoding as one would say it: merge the best pair, the leftmost among equals,
    until there is none."""
    special_or_byte = set(range(259))
    vocab = {token: i for i, token in reversed(list(enumerate(spec.tokens)))
             if i not in special_or_byte}
    ids, i = [vocab[b" "]] if raw else [], 0
    while i < len(raw):
        n = 1
        while n < 4 and raw[i + n:i + n + 1] and raw[i + n] & 0xC0 == 0x80:
            n += 1
        character = raw[i:i + n]
        ids += [vocab[character]] if character in vocab else [3 + b for b in character]
        i += n
    while True:
        best, at = -1e10, None
        for k in range(len(ids) - 1):
            if ids[k] >= 259 and ids[k + 1] >= 259:
                made = vocab.get(spec.tokens[ids[k]] + spec.tokens[ids[k + 1]])
                if made is not None and spec.scores[made] > best:
                    best, at = spec.scores[made], (k, made)
        if at is None:
            return ids
        ids[at[0]:at[0] + 2] = [at[1]]


STORIES = st.sampled_from(["Once", " upon", " a", " time", ",", " there", " was", "Lily", " the",
                           "t", "h", "e", " ", "\n", ".", "日", "é", "a\x80"])


TEXTS = st.lists(STORIES, max_size=25).map("".join)


@settings(max_examples=150, deadline=None)
@given(st.one_of(TEXTS.map(lambda text: text.encode("latin-1", "replace")),
                 TEXTS.map(str.encode), st.binary(max_size=40)))
def test_scores_by_the_rule(llama2c, raw):
    spec = tokens.llama2c_tokenizer(DATA / "tok512.bin", 512)
    assert llama2c.encode(raw) == by_the_rule(spec, raw)
    assert llama2c.encode(raw, ADD_BOS) == [1] + by_the_rule(spec, raw)


def test_scores_with_ties_and_odd_signs(library, tmp_path):
    """Vocabularies made at random over few letters, so that ties, zeros of both signs and rivals
    are everywhere."""
    rnd = random.Random(5)
    for trial in range(30):
        words = {b" ", b"a", b"b", b"c", "é".encode()}
        while len(words) < 60:
            words.add(bytes(rnd.choices(b" abc", k=rnd.randrange(2, 6))))
        pieces = [b"<unk>", b"\n<s>\n", b"\n</s>\n"] + [b"<0x%02X>" % b for b in range(256)]
        pieces += rnd.sample(sorted(words), len(words))
        scores = [rnd.choice([0.0, -0.0, 1.0, -1.0, 2.5, -1e9, rnd.uniform(-5, 5)]) for _ in pieces]
        path = tmp_path / "tokenizer.bin"
        path.write_bytes(struct.pack("<I", 9) + b"".join(
            struct.pack("<fI", score, len(piece)) + piece for score, piece in zip(scores, pieces)))
        spec = tokens.llama2c_tokenizer(path, len(pieces))
        ours = Ours(library, tokens.section(spec), len(pieces))
        for _ in range(20):
            raw = bytes(rnd.choices(b"aaabbbccc  d\xc3\xa9", k=rnd.randrange(60)))
            assert ours.encode(raw) == by_the_rule(spec, raw)


def test_llama2c_story(llama2c):
    """The beginning of the prompt in llama2.c's own test, and text in other scripts."""
    text = "Once upon a time, 日本 🦙 naïve"
    assert llama2c.encode("Once upon a time", ADD_BOS)[:2] == [1, 403]
    assert llama2c.decode(llama2c.encode(text, ADD_BOS)) == text.encode()


def test_llama2c_files_that_do_not_fit(tmp_path):
    raw = (DATA / "tok512.bin").read_bytes()
    path = tmp_path / "tokenizer.bin"
    cases = [(raw, 513, "another model"), (raw, 511, "another model"), (b"", 512, "another model"),
             (raw[:-1], 512, "claims"), (raw[:8] + b"\xff\xff\xff\x7f" + raw[12:], 512, "claims"),
             (raw[:7], 512, "ends within"),
             (raw.replace(b"<0x41>", b"<0x4g>"), 512, "not the bytes"),
             (raw[:4] + b"\0\0\xc0\x7f" + raw[8:], 512, "no number")]
    for content, vocab, reason in cases:
        path.write_bytes(content)
        with pytest.raises(ValueError) as caught:
            tokens.llama2c_tokenizer(path, vocab)
        assert reason in str(caught.value), content[:20]
