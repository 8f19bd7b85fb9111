"""Tokenizers: what others write, one form, one section of the checkpoint (based.h part 7).

    GPT-2            its list of merges (vocab.bpe)
    Hugging Face     tokenizer.json, or vocab.json with merges.txt, of byte-level BPE
    SentencePiece    tokenizer.model, of BPE with byte fallback
    llama2.c         tokenizer.bin

A tokenizer that the runtime could not reproduce exactly is refused with the reason: one wrong token
is worse than no tokenizer, because nothing shows it. The files beside it tell what a conversation
looks like, which tokens end a text and how the model's authors sample.
"""
import hashlib
import json
import lzma
import math
import struct
from pathlib import Path
from typing import NamedTuple

import numpy as np

from models.origins import NONE, SAMPLING, Refused, first_bytes, read_json

BPE, SCORES = 1, 2
PREFIX_SPACE, ADD_BOS, WHOLE_PIECES, NFC = 1, 2, 4, 8
CUT_GPT2, CUT_LLAMA3, CUT_QWEN2, CUT_DIGITS = 0, 1, 2, 3
MAX_TOKEN = 4096                                              # bytes of one token
GPT2_VOCAB, GPT2_MERGES = 50257, Path(__file__).resolve().with_name("gpt2.bpe.xz")
GPT2_HASH = "45f05c1818367a7b"
GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3_PATTERN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
                  r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
QWEN2_PATTERN = LLAMA3_PATTERN.replace(r"\p{N}{1,3}", r"\p{N}")
CUTS = {GPT2_PATTERN: CUT_GPT2, LLAMA3_PATTERN: CUT_LLAMA3, QWEN2_PATTERN: CUT_QWEN2}

# Two files that make one tokenizer; what tells about conversations; all that a folder may hold.
PAIRS = {"vocab.json": "merges.txt", "encoder.json": "vocab.bpe"}
TOLD = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
        "generation_config.json", "chat_template.jinja")
BESIDE = ("tokenizer.json", *PAIRS, *PAIRS.values(), "tokenizer.model", "spiece.model",
          "tokenizer.bin", "vocab.txt", *TOLD)


class Tokenizer(NamedTuple):
    kind: int                               # BPE or SCORES
    tokens: list                            # (size) the bytes of each token; of a special its name
    flags: int
    bos: int                                # ids, or NONE
    eos: int
    unknown: int
    byte_id: list                           # (256) id of each single byte, or NONE
    specials: list                          # ids that a text gets by their names only
    merges: dict = {}                       # BPE: (left, right) -> (rank, result)
    scores: list = []                       # SCORES: (size)
    cut: int = 0                            # BPE: how text is cut into pieces, one of CUTS
    shown: list = []                        # specials that decode to their name
    stops: list = []                        # ids that end a text, besides bos and eos
    chat: tuple = ()                        # the four texts of a conversation (see chat_template)

    @property
    def size(self):
        return len(self.tokens)


def reader(read):
    """read(path, ...) -> Tokenizer, with whatever goes wrong inside turned into Refused in one line
    that begins with the path: what is not where a format has it shows as one of many errors."""
    def wrapped(path, *more):
        try:
            return read(str(path), *more)
        except Refused as e:
            raise Refused(f"{path}: {e}") from None
        except (ValueError, AttributeError, IndexError, KeyError, TypeError, RecursionError,
                OverflowError, struct.error, lzma.LZMAError) as e:
            raise Refused(f"{path}: not a tokenizer of this form: {type(e).__name__}: "
                          f"{e}") from None
    return wrapped


def byte_characters():
    """{character: byte}: GPT-2 writes each byte as one printable character. In the order of GPT-2's
    ids: the visible Latin-1 characters are themselves, the rest follow from U+0100 on."""
    visible = [b for b in range(256) if 0x21 <= b <= 0x7E or 0xA1 <= b <= 0xAC or 0xAE <= b <= 0xFF]
    hidden = [b for b in range(256) if b not in visible]
    return {**{chr(b): b for b in visible}, **{chr(256 + i): b for i, b in enumerate(hidden)}}


@reader
def gpt2_tokenizer(path):
    """The tokenizer of GPT-2 from its list of merges (vocab.bpe, or the same compressed with xz).
    The vocabulary needs no second file: the 256 bytes, then what each merge makes, then
    <|endoftext|>."""
    raw = Path(path).read_bytes()
    text = (lzma.decompress(raw) if raw[:6] == b"\xfd7zXZ\0" else raw).decode("utf-8-sig")
    characters = byte_characters()
    ids = {c: i for i, c in enumerate(characters)}
    tokens = [bytes([b]) for b in characters.values()]
    merges = {}
    for number, line in enumerate(text.split("\n"), 1):
        if not line or (number == 1 and line.startswith("#version")):
            continue
        pair = line.split(" ")
        whole = "".join(pair)
        if len(pair) != 2 or not ids.keys() >= set(pair) or whole in ids:
            raise Refused(f"line {number}: expected two known tokens that make a new one, found "
                          f"{line!r}")
        left, right = ids[pair[0]], ids[pair[1]]
        merges[left, right] = (len(merges), len(tokens))
        ids[whole] = len(tokens)
        tokens.append(tokens[left] + tokens[right])
    end = len(tokens)
    byte_id = np.argsort([*characters.values()]).tolist()     # the inverse of this permutation
    return Tokenizer(BPE, [*tokens, b"<|endoftext|>"], 0, end, end, NONE, byte_id, [end], merges)


def check_pieces(pre):
    """The way of cutting text into pieces; every one that tokenizer.c does not know is refused."""
    steps = pre.get("pretokenizers", []) if pre and pre.get("type") == "Sequence" else [pre]
    kinds = [step.get("type") if step else None for step in steps]
    if kinds not in (["ByteLevel"], ["Split", "ByteLevel"], ["Digits", "ByteLevel"]):
        raise Refused(f"pre-tokenizer {'+'.join(map(str, kinds))} is not supported, only ByteLevel "
                      "alone or behind Split or Digits")
    first, last = steps[0], steps[-1]
    if last.get("add_prefix_space", True):
        raise Refused("ByteLevel with add_prefix_space is not supported")
    if kinds[0] != "Split":
        if not last.get("use_regex", True):
            raise Refused("ByteLevel without a pattern is not supported, only with GPT-2's")
        if len(kinds) == 2 and not first.get("individual_digits"):
            raise Refused("Digits without individual_digits is not supported")
        return CUT_DIGITS if len(kinds) == 2 else CUT_GPT2
    pattern = first.get("pattern", {}).get("Regex")
    isolated = first.get("behavior") in ("Isolated", "isolated") and not first.get("invert")
    if pattern not in CUTS or not isolated or last.get("use_regex", True):
        raise Refused("it cuts text by another pattern than GPT-2's, Llama 3's or Qwen 2's: "
                      f"{str(pattern)[:60]!r}")
    return CUTS[pattern]


def check_model(spec):
    """Refuses every kind of model, and every step before or after it, that tokenizer.c does not
    compute; returns the model."""
    model = spec.get("model", {})
    kind = model.get("type", "BPE" if "merges" in model else "?")
    if kind != "BPE":
        raise Refused(f"model {kind} is not supported, only byte-level BPE")
    if model.get("byte_fallback"):
        raise Refused("BPE with byte_fallback comes from SentencePiece, whose scores are lost here:"
                      " put the tokenizer.model of this model beside it, or give it")
    for option in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(option):
            raise Refused(f"BPE with {option}={model[option]!r} is not supported")
    normalizer = spec.get("normalizer")
    if normalizer and normalizer.get("type") != "NFC" and (
            normalizer.get("type") != "Sequence" or normalizer.get("normalizers")):
        raise Refused(f"normalizer {normalizer.get('type')} is not supported: text must reach BPE "
                      "unchanged")
    decoder = spec.get("decoder")
    if decoder and decoder.get("type") != "ByteLevel":
        raise Refused(f"decoder {decoder.get('type')} is not supported, only ByteLevel")
    return model


def template_ids(spec, special_ids):
    """The tokens that the post-processor puts before and after a text: two lists of at most one."""
    post = spec.get("post_processor") or {"type": "ByteLevel"}
    steps = post.get("processors", []) if post.get("type") == "Sequence" else [post]
    before, after = [], []
    for step in steps:
        if step.get("type") == "ByteLevel":                   # trims offsets, never changes an id
            continue
        if step.get("type") != "TemplateProcessing":
            raise Refused(f"post-processor {step.get('type')} is not supported")
        side = before
        for piece in step.get("single", []):
            if "Sequence" in piece:
                side = after
            else:
                side.extend(step["special_tokens"][piece["SpecialToken"]["id"]]["ids"])
    if len(before) > 1 or len(after) > 1 or not set(before + after) <= special_ids:
        raise Refused(f"the post-processor adds {len(before)} tokens before and {len(after)} after "
                      "a text; at most one special token on either side is supported")
    return before, after


def settings_beside(path):
    """What tokenizer_config.json beside a file says, or special_tokens_map.json; {} for none."""
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        beside = Path(path).with_name(name)
        if beside.exists():
            return read_json(beside)
    return {}


def token_name(config, key):
    """The name of a token in such a file, or None."""
    value = config.get(key)
    value = value.get("content") if isinstance(value, dict) else value
    return value if isinstance(value, str) and value else None


def named_ids(path, names):
    """(bos, eos) by the names in settings_beside if there are any, else by the usual names."""
    config, found = settings_beside(path), []
    for key, usual in (("bos_token", ("<s>", "<|begin_of_text|>", "<|endoftext|>")),
                       ("eos_token", ("</s>", "<|end_of_text|>", "<|endoftext|>"))):
        value = token_name(config, key)
        wanted = (value,) if value else usual
        found.append(next((names[name] for name in wanted if name in names), NONE))
    return found


def from_pair(path):
    """What tokenizer.json would say, from vocab.json (token -> id) and the merges.txt beside it.
    Tokens that are no byte and that no merge makes are special: no text becomes them."""
    config = settings_beside(path)
    kind = config.get("tokenizer_class") or "GPT2Tokenizer"
    if kind not in ("GPT2Tokenizer", "GPT2TokenizerFast"):
        raise Refused(f"how a {kind} cuts text is only told by tokenizer.json: put it beside this "
                      "file, or give it")
    vocab = json.loads(Path(path).read_bytes())
    merges = (Path(path).with_name(PAIRS[Path(path).name])).read_bytes().decode("utf-8-sig")
    merges = [line.rstrip("\r").split(" ") for line in merges.split("\n")
              if line.strip() and not line.startswith("#version")]
    made = {*byte_characters(), *map("".join, merges)}
    return {"model": {"type": "BPE", "vocab": vocab, "merges": merges},
            "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": bool(
                config.get("add_prefix_space"))},
            "added_tokens": [{"content": text, "id": index, "special": True}
                             for text, index in vocab.items() if text not in made]}


@reader
def hf_tokenizer(path):
    """A byte-level BPE tokenizer in the Hugging Face forms, tokenizer.json or vocab.json."""
    spec = from_pair(path) if Path(path).name in PAIRS else json.loads(Path(path).read_bytes())
    model = check_model(spec)
    cut = check_pieces(spec.get("pre_tokenizer"))
    vocab, names, shown = dict(model["vocab"]), {}, []
    for token in spec.get("added_tokens", []):
        if any(map(token.get, ("lstrip", "rstrip", "single_word"))) or not token["content"]:
            raise Refused(f"added token {token['content']!r} is not supported: only tokens without "
                          "lstrip, rstrip, single_word")
        names[token["content"]] = token["id"]
        shown += [] if token.get("special") else [token["id"]]
    ids = [*vocab.values(), *names.values()]
    if not all(type(index) is int and index >= 0 for index in ids):
        raise Refused("an id of a token is no whole number from 0 up")
    size = max(ids, default=-1) + 1
    if size > 2 * len(ids):
        raise Refused(f"{len(ids)} tokens but ids up to {size - 1}")

    characters = byte_characters()
    tokens = [b""] * size                 # an id that no token has stays empty: no text becomes it
    byte_id = [NONE] * 256
    for text, index in vocab.items():
        if text in names:
            continue
        if not set(text) <= characters.keys():
            raise Refused(f"token {index} {text!r} is not written in byte-level characters")
        tokens[index] = bytes(map(characters.get, text))
        if len(text) == 1:
            byte_id[tokens[index][0]] = index
    for text, index in names.items():
        tokens[index] = text.encode("utf-8")

    merges = {}
    for rank, pair in enumerate(model["merges"]):
        pair = pair.split(" ") if isinstance(pair, str) else pair
        parts = (*pair, "".join(pair))
        if len(pair) != 2 or any(text not in vocab for text in parts):
            raise Refused(f"merge {rank} {pair!r} names a token that is not in the vocabulary")
        if any(text in names for text in parts):
            raise Refused(f"merge {rank} {pair!r} makes a special token out of text")
        left, right, whole = (vocab[text] for text in parts)
        merges[left, right] = (rank, whole)

    if model.get("unk_token") and model.get("fuse_unk") and NONE in byte_id:
        raise Refused("it fuses unknown bytes into one token, which is not supported")
    before, after = template_ids(spec, set(names.values()))
    bos, eos = named_ids(path, names)
    flags = ((ADD_BOS if before else 0) | (WHOLE_PIECES if model.get("ignore_merges") else 0)
             | (NFC if (spec.get("normalizer") or {}).get("type") == "NFC" else 0))
    return Tokenizer(BPE, tokens, flags, *(before or [bos]), *(after or [eos]),
                     vocab.get(model.get("unk_token") or "", NONE), byte_id, sorted(names.values()),
                     merges, cut=cut, shown=shown)


def protobuf(data):
    """(number, value) of each field of a protobuf message; the value is an int, or bytes."""
    at = 0

    def varint():
        nonlocal at
        value = 0
        for shift in range(0, 64, 7):
            value, at = value | (data[at] & 127) << shift, at + 1
            if data[at - 1] < 128:
                return value
        raise Refused(f"a number at byte {at} does not end")

    while at < len(data):
        number, kind = divmod(varint(), 8)
        if kind not in (0, 1, 2, 5):
            raise Refused(f"field {number} at byte {at} is of the unknown kind {kind}")
        value = varint() if kind in (0, 2) else {1: 8, 5: 4}[kind]
        if kind:                                          # so many bytes
            at, value = at + value, data[at:at + value]
            if at > len(data):
                raise Refused(f"field {number} ends at byte {at} of {len(data)}")
        yield number, value


@reader
def sentencepiece_tokenizer(path):
    """The tokenizer.model of SentencePiece: BPE with byte fallback. Tokens that were added later
    are in files beside it."""
    pieces, trainer, normalizer = [], {}, {}
    for number, message in protobuf(Path(path).read_bytes()):
        if number == 1:
            pieces.append({1: b"", 2: bytes(4), 3: 1, **dict(protobuf(message))})
        elif number in (2, 3):
            (trainer if number == 2 else normalizer).update(protobuf(message))
    kinds = [piece[3] for piece in pieces]                # 1 normal, 2 unknown, 3 control, 6 byte
    if trainer.get(3, 1) != 2:
        raise Refused(f"SentencePiece's model {trainer.get(3, 1)} is not supported, only 2 (BPE)")
    if normalizer.get(1, b"") not in (b"identity", b"") or normalizer.get(2):
        raise Refused(f"normalizer {normalizer.get(1)} is not supported, only identity")
    for group, number, name, default, wanted in (
            (trainer, 35, "byte_fallback", 0, 1), (trainer, 24, "treat_whitespace_as_suffix", 0, 0),
            (normalizer, 4, "remove_extra_whitespaces", 1, 0),
            (normalizer, 5, "escape_whitespaces", 1, 1)):
        if group.get(number, default) != wanted:
            raise Refused(f"{name}={group.get(number, default)} is not supported")
    for index, kind in enumerate(kinds):
        if kind not in (1, 2, 3, 6):
            raise Refused(f"token {index} is of kind {kind} (4: user-defined, 5: unused), which is "
                          "not supported")

    tokens = [piece[1].decode("utf-8").replace("\u2581", " ").encode() for piece in pieces]
    scores = [struct.unpack("<f", piece[2])[0] for piece in pieces]
    if any(map(math.isnan, scores)):
        raise Refused("a score is no number")
    byte_id = [NONE] * 256
    for index, kind in enumerate(kinds):
        if kind == 6:
            byte_id[int(tokens[index].decode().removeprefix("<0x").removesuffix(">"), 16)] = index
    if NONE in byte_id:
        raise Refused(f"there is no token for byte {byte_id.index(NONE)}")
    for byte, index in enumerate(byte_id):
        tokens[index] = bytes([byte])

    config, names, shown = settings_beside(path), {}, []
    for index, (text, special) in sorted(added_tokens(path, config).items()):
        if index < len(tokens):
            continue
        if index > len(tokens) + 1000:
            raise Refused(f"{len(tokens)} tokens, but one is added as {index}")
        extra = index + 1 - len(tokens)
        tokens, scores = tokens + [b""] * extra, scores + [0.0] * extra
        tokens[index], names[text] = text.encode(), index
        shown += [] if special else [index]
    specials = [i for i, kind in enumerate(kinds) if kind in (2, 3)]
    names.update((tokens[i].decode(), i) for i in specials)
    flags = PREFIX_SPACE if normalizer.get(3, 1) else 0
    flags |= ADD_BOS if config.get("add_bos_token", True) else 0
    usual = [trainer.get(number, default) for number, default in ((41, 1), (42, 2), (40, 0))]
    usual = [NONE if i >= len(tokens) else i for i in usual]          # 2^64 - 1 is -1
    bos, eos = (found if found != NONE else i for found, i in zip(named_ids(path, names), usual))
    return Tokenizer(SCORES, tokens, flags, bos, eos, usual[2], byte_id, sorted(names.values()),
                     scores=scores, shown=shown)


def added_tokens(path, config):
    """{id: (text, is it special?)} of what was added to a SentencePiece model."""
    beside = Path(path).with_name("added_tokens.json")
    found = {index: (text, True) for text, index in (
        read_json(beside) if beside.exists() else {}).items()}
    for index, token in config.get("added_tokens_decoder", {}).items():
        found[int(index)] = token["content"], bool(token.get("special"))
    return {index: told for index, told in found.items() if told[0]}


@reader
def llama2c_tokenizer(path, vocab):
    """The tokenizer.bin of llama2.c: `vocab` scored pieces; 0 to 2 are <unk>, <s>, </s>, then the
    256 bytes."""
    raw = Path(path).read_bytes()
    tokens, scores, at = [], [], 4
    while at < len(raw) and len(tokens) < vocab:
        if len(raw) - at < 8:
            raise Refused(f"ends within token {len(tokens)}, at byte {at}")
        score, length = struct.unpack_from("<fI", raw, at)
        at += 8
        if length > len(raw) - at or length > MAX_TOKEN:
            raise Refused(f"token {len(tokens)} at byte {at} claims {length} bytes, "
                          f"{len(raw) - at} are left")
        tokens.append(raw[at:at + length])
        scores.append(score)
        at += length
    if len(tokens) != vocab or at != len(raw):
        raise Refused(f"holds {'more' if at < len(raw) else len(tokens)} tokens, the model has "
                      f"{vocab}: this tokenizer belongs to another model")
    if tokens[3:259] != [b"<0x%02X>" % b for b in range(256)]:
        raise Refused("tokens 3 to 258 are not the bytes <0x00> to <0xFF>")
    if any(map(math.isnan, scores)):
        raise Refused(f"token {[*map(math.isnan, scores)].index(True)} has no number as its score")
    tokens[:3] = [t.strip(b"\n") for t in tokens[:3]]
    tokens[3:259] = [bytes([b]) for b in range(256)]
    return Tokenizer(SCORES, tokens, PREFIX_SPACE | ADD_BOS, bos=1, eos=2, unknown=0,
                     byte_id=[*range(3, 259)], specials=[0, 1, 2], scores=scores)


def section(tok):
    """The tokenizer section of a checkpoint (bytes), exactly as based.h part 7 writes it down."""
    for index, token in enumerate(tok.tokens):
        if len(token) > MAX_TOKEN:
            raise Refused(f"token {index} has {len(token)} bytes, at most {MAX_TOKEN} are "
                          "supported")
    specials = sorted(tok.specials, key=lambda i: (-len(tok.tokens[i]), i))
    start = np.cumsum([0] + [len(token) for token in tok.tokens])
    # By its bytes, text becomes neither a special token nor a byte token. Of two tokens with the
    # same bytes the first is the one that text becomes.
    apart, first = set(tok.specials) | set(tok.byte_id), {}
    for index, token in enumerate(tok.tokens):
        if token and index not in apart:
            first.setdefault(token, index)
    order = [first[token] for token in sorted(first)]
    if tok.kind == BPE:
        table = np.array([(l, r, rank, to) for (l, r), (rank, to) in sorted(tok.merges.items())])
        entries, tables = len(table), [table.reshape(-1)]
        tables += [order] if tok.flags & WHOLE_PIECES else []
    else:
        entries, tables = len(order), [order, np.array(tok.scores, "<f4").view("<u4")]
    chat = b"".join(text.encode() + b"\0" for text in tok.chat)
    tables = [tok.byte_id, specials, tok.stops, tok.shown, start, *tables]
    header = [12 + sum(map(len, tables)), tok.kind, tok.flags, tok.size, tok.bos, tok.eos,
              tok.unknown, entries, len(specials), tok.cut, len(tok.stops) | len(tok.shown) << 16,
              len(chat)]
    return (b"".join(np.asarray(part, "<u4").tobytes() for part in (header, *tables))
            + b"".join(tok.tokens) + chat)


# ---- Conversations: the template of Hugging Face is a program. It is run on a short conversation,
#      and from what it writes follow four texts that say the same without a program.

SYSTEM, ASKED, SAID, ASKED_AGAIN = "Know-one", "Ask-two", "Say-three", "Ask-four"


def chat_template(template, tokenizer, config):
    """The four texts of a conversation: system message, message of the user, reply, each with {}
    for what is said, and how a text without a system message begins. Refused if the template
    writes anything else, or if no special token ends a reply."""
    try:
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError:
        raise Refused("reading a chat template needs jinja2: pip install jinja2") from None

    def stop(reason):
        raise Refused(str(reason))

    def write(system, *said, open_reply=True):
        """What the template makes of these messages."""
        roles = ["system"] * system + ["user", "assistant"] * 2
        messages = [{"role": role, "content": text} for role, text in zip(roles, said)]
        return program.render(messages=messages, add_generation_prompt=open_reply, tools=None,
                              documents=None, **{key: token_name(config, key) or "" for key in (
                                  "bos_token", "eos_token", "unk_token", "pad_token")})

    def between(text, before, after=None):
        """What stands between two of the messages, or after the last one."""
        if text.count(before) != 1 or (after and text.count(after) != 1):
            raise Refused("it does not write each message once")
        return text.split(before)[1].split(after)[0] if after else text.split(before)[1]

    world = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True,
                                          extensions=["jinja2.ext.loopcontrols"])
    world.globals["raise_exception"] = stop
    try:
        program = world.from_string(template)
        once, twice = write(0, ASKED), write(0, ASKED, SAID, ASKED_AGAIN)
        asked = between(write(0, ASKED, open_reply=False), ASKED)     # behind a message
        said = between(write(0, ASKED, SAID, open_reply=False), SAID)     # behind a reply
        head, tail = once.split(ASKED)
        before = between(twice, SAID, ASKED_AGAIN).removeprefix(said)
        begin, reply = head.removesuffix(before), tail.removeprefix(asked)
        # Before a reply of the past a template may write a blank that the model writes itself.
        gap = between(twice, ASKED, SAID)
        rest = before + ASKED + gap + SAID + said + before + ASKED_AGAIN + asked + reply
        if twice != begin + rest or tail != asked + reply or gap.strip() != tail.strip():
            raise Refused("it is more than a text around each message")
        system = ""
        try:
            whole = write(1, SYSTEM, ASKED, SAID, ASKED_AGAIN)
            if whole.endswith(rest) and whole.count(SYSTEM) == 1:
                system = whole.removesuffix(rest).replace(SYSTEM, "{}")
        except Refused:                                   # it knows no system message
            pass
        (begin + rest + system).encode()                  # half a character cannot be
    except Refused:
        raise
    except Exception as e:                                # whatever a program can do wrong
        raise Refused(f"{type(e).__name__}: {(str(e).splitlines() or [''])[0][:200]}") from None
    if not special_at(tokenizer, said.lstrip()):
        raise Refused(f"a reply ends with {said[:20]!r}, which begins with no special token")
    texts = system, before + "{}" + asked, reply + "{}" + said, begin
    if [text.count("{}") for text in texts] != [bool(system), 1, 1, 0] or "\0" in "".join(texts):
        raise Refused("{} or a zero byte is a part of it")
    return texts


def special_at(tokenizer, text):
    """[the special token whose name the text begins with, the longest], or []."""
    names = {tokenizer.tokens[i]: i for i in tokenizer.specials}
    found = [name for name in names if name and text.encode().startswith(name)]
    return [names[max(found, key=len)]] if found else []


def with_conversation(tokenizer, folders, note):
    """The tokenizer with what the files in these folders tell of conversations and of the ends of a
    text."""
    config, path = told("tokenizer_config.json", folders), find("chat_template.jinja", folders)
    ends = told("generation_config.json", folders).get("eos_token_id")
    ends = [] if ends is None else ends if isinstance(ends, list) else [ends]
    if not all(type(index) is int and index >= 0 for index in ends):
        raise Refused(f"generation_config.json: eos_token_id = {ends}, expected ids of tokens")
    template = path.read_text("utf-8", "replace") if path else config.get("chat_template")
    if isinstance(template, list):
        template = next((entry.get("template") for entry in template if isinstance(entry, dict)
                         and entry.get("name") == "default"), None)
    if isinstance(template, str) and template:
        try:
            chat = chat_template(template, tokenizer, config)
            ends = ends + special_at(tokenizer, chat[2].split("{}")[1].lstrip())
            tokenizer = tokenizer._replace(chat=chat)
        except Refused as e:
            note(f"its chat template cannot be expressed: {e}; --chat-template of run takes a "
                 "simple one")
    known = (tokenizer.bos, tokenizer.eos)
    return tokenizer._replace(stops=sorted({index for index in ends if index < tokenizer.size
                                            and index not in known}))


def find(name, folders):
    """The path of the first file with this name, or None."""
    return next((folder / name for folder in folders if (folder / name).is_file()), None)


def told(name, folders):
    """What the first JSON file with this name says, or {}."""
    path = find(name, folders)
    return read_json(path) if path else {}


# A setting of a sampler: the field of the config, the default of `run`, the range; what
# generation_config.json calls it, and what counts there if it is absent while others are there.
SETTINGS = [("temperature", 1.0, 0, 100, "temperature", 1.0), ("top_p", 0.9, 0, 1, "top_p", 1.0),
            ("top_k", 0, 0, 2**32 - 1, "top_k", 0), ("min_p", 0.0, 0, 1, "min_p", 0.0),
            ("repeat_penalty", 1.0, 0.01, 100, "repetition_penalty", 1.0),
            ("repeat_last_n", 64, 0, 1 << 20, None, 1024)]    # there: all tokens


def read_sampling(config, folders, asked):
    """Sets the recommended sampling in the config: as asked, {field: number}; else as
    generation_config.json recommends; else as it is. Without any of these there is none."""
    said = told("generation_config.json", folders)
    if said.get("do_sample") is False or not any(
            said.get(theirs) is not None for *_, theirs, _ in SETTINGS):
        said = None
    if not said and not asked:
        return
    for ours, usual, low, high, theirs, absent in SETTINGS:
        value = getattr(config, ours) if config.flags & SAMPLING else usual
        if said:
            value, given = absent, said.get(theirs)
            if given is not None:
                if type(given) not in (int, float) or not low <= given <= high or (
                        type(value) is int and given != int(given)):
                    raise Refused(f"generation_config.json: {theirs} = {given!r}, expected a "
                                  f"number from {low} to {high}")
                value = type(value)(given)
        setattr(config, ours, asked.get(ours, value))
    config.flags |= SAMPLING


# ---- Which of them is it?

def choose_tokenizer(given, beside, vocab, note):
    """The bytes of the tokenizer section: of the file `given`, or of the one in the directory
    `beside`; GPT-2's if there is nothing and the vocabulary is; b"" without any."""
    def there(name):
        return beside and (beside / name).exists()
    path = given or next((beside / name for name in ("tokenizer.model", "tokenizer.json", *PAIRS)
                          if there(name) and there(PAIRS.get(name, name)) and (
                              name != "tokenizer.model" or is_sentencepiece(beside / name))), None)
    if not path:
        unread = next((beside / name for name in BESIDE[:-len(TOLD)] if there(name)), None)
        path = unread or GPT2_MERGES
        if unread and first_bytes(unread)[:8] == b"#version" and is_gpt2(unread):
            unread = None
        if unread or vocab != GPT2_VOCAB or not path.exists():
            note("exporting without a tokenizer: " + (
                f"{unread.name} alone does not tell the ids, or is of a form that is not "
                "supported; --tokenizer FILE gives another" if unread else
                "none given (--tokenizer FILE), and " + (
                    f"{path} is missing" if vocab == GPT2_VOCAB else
                    f"a vocabulary of {vocab} is not GPT-2's")))
            return b""
    tokenizer = read_tokenizer(Path(path), vocab)
    if tokenizer.size > vocab:
        raise Refused(f"{path} has {tokenizer.size} tokens, the model knows {vocab}: it belongs to "
                      "another model")
    if tokenizer.flags & NFC:
        note("the original composes letters and accents (Unicode's NFC) before it reads a text, "
             "which based.c does not: separate accents become other tokens")
    return section(with_conversation(tokenizer, folders(given, beside), note))


def folders(given, beside):
    """Where the files that tell more lie: beside the tokenizer, beside the weights."""
    return [Path(folder) for folder in (Path(given).parent if given else None, beside) if folder]


def read_tokenizer(path, vocab):
    """The Tokenizer in a file, which is recognized by its content."""
    start = first_bytes(path)
    merges = start[:6] == b"\xfd7zXZ\0" or start[:8] == b"#version"
    vocabulary = {merges: name for name, merges in PAIRS.items()}.get(path.name)
    if merges and vocabulary and path.with_name(vocabulary).exists():
        return hf_tokenizer(path.with_name(vocabulary))
    if start.lstrip()[:1] == b"{":
        return hf_tokenizer(path)
    if merges and not is_gpt2(path):
        raise Refused(f"{path}: merges alone do not tell the ids of a tokenizer that is not "
                      "GPT-2's: put vocab.json beside it, or give tokenizer.json")
    if merges:
        return gpt2_tokenizer(path)
    if is_sentencepiece(path):
        return sentencepiece_tokenizer(path)
    return llama2c_tokenizer(path, vocab)


def is_sentencepiece(path):
    """Does the file begin with a piece that begins with its text?"""
    start = first_bytes(path)
    return start[:1] == b"\n" == start[2:3] and start[1:2] != b"\0"


def is_gpt2(path):
    """Are these the merges of GPT-2, from which its ids follow?"""
    merges = str([*gpt2_tokenizer(path).merges]).encode()
    return hashlib.sha256(merges).hexdigest()[:16] == GPT2_HASH
