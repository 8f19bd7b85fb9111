"""The tokenizers of Llama 3, Qwen 2, SmolLM and SentencePiece against the originals, and what
export.py makes of chat templates, stop tokens and recommended sampling.

tests/data/tokenizers holds a small tokenizer of each family and texts with their ids, made by the
original libraries. TEXTS=1000000 in the environment compares so many random texts of each (20,000).
"""
import json
import os
import random
import struct
import sys
import time
import unicodedata

import pytest

pytest.importorskip("numpy")
tokenizers = pytest.importorskip("tokenizers")
from models import origins, tokens                              # noqa: E402
from test_tokenizer import (ADD_BOS, DATA, PARSE_SPECIALS, Ours, by_the_rule,       # noqa: E402
                            library)                            # noqa: F401 (a fixture)

TEXTS = int(os.environ.get("TEXTS", 20000))
FAMILIES = {"llama3": "llama3.json", "qwen2": "qwen2.json", "smollm": "smollm.json",
            "sentencepiece": "sentencepiece.model"}
# Newer than the Unicode of tokenizer.c's table; one step of the original knows them as numbers, the
# other does not.
NEW_NUMBERS = {*range(0x11DE0, 0x11DEA), *range(0x16FF4, 0x16FF7)}
ODD = ["'s", "'LL", "'\u017f", "'", "it", "Ab", "hello", "The", " the", "ing", "camelCase", "1",
       "23", "4567", "\u0662", "\u2167", "\u00b2", " ", "  ", "   ", "\n", "\r\n", "\t", "\u00a0",
       "\u3000", "\u0085", "\u2028", "!", "(", ");", "...", "--", "_", "\u00e9", "e\u0301",
       "\u0416", "\u65e5", "\ud55c", "\u0e01\u0e33", "\U0001f999", "\u200d", "\ufffd", "\x01",
       "\x7f", "def f(x):\n    "]


def original(name):
    """The original library's function text -> ids, without the normalization that is not ours."""
    path = DATA / "tokenizers" / FAMILIES[name]
    if name == "sentencepiece":
        library = pytest.importorskip("sentencepiece")
        return library.SentencePieceProcessor(model_file=str(path)).encode
    spec = json.loads(path.read_bytes())
    spec["normalizer"] = None
    made = tokenizers.Tokenizer.from_str(json.dumps(spec))
    made.encode_special_tokens = True
    return lambda text: made.encode(text, add_special_tokens=False).ids


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, library):                                   # noqa: F811
    """(name, its Tokenizer, tokenizer.c with it)"""
    spec = tokens.read_tokenizer(DATA / "tokenizers" / FAMILIES[request.param], 1600)
    return request.param, spec, Ours(library, tokens.section(spec), spec.size)


def test_known_texts(family):
    """Texts that need NFC get the ids of their normal form from the original, and are left out."""
    name, _, ours = family
    for line in (DATA / "tokenizers" / f"{name}.jsonl").read_text().splitlines():
        text, ids = json.loads(line)
        if name != "qwen2" or unicodedata.is_normalized("NFC", text):
            assert ours.encode(text) == ids, repr(text)
        raw = text.encode()
        assert ours.decode(ours.encode(text)) == raw


def some_text(rng, name):
    pieces = []
    for _ in range(rng.randrange(1, 12)):
        kind = rng.random()
        if kind < 0.75:
            pieces.append(rng.choice(ODD))
        else:
            code = rng.randrange(1, 0x3400 if kind < 0.95 else 0x110000)
            known = not 0xD800 <= code < 0xE000 and code not in NEW_NUMBERS
            pieces.append(chr(code) if known and code != 0x2581 else "x")
    return "".join(pieces)


def test_random_texts(family):
    name, _, ours = family
    theirs, rng = original(name), random.Random(name)
    for _ in range(TEXTS):
        text = some_text(rng, name)
        assert ours.encode(text) == theirs(text), repr(text)


def test_sentencepiece_by_the_rule(library):                    # noqa: F811
    """The same rule as llama2.c's, without the library of the original."""
    spec = tokens.read_tokenizer(DATA / "tokenizers" / "sentencepiece.model", 1600)
    ours, rng = Ours(library, tokens.section(spec), spec.size), random.Random(7)
    for _ in range(300):
        raw = some_text(rng, "").encode()
        assert ours.encode(raw) == by_the_rule(spec, raw)


def test_what_is_read_of_them(family):
    name, spec, ours = family
    cut, flags = {"llama3": (tokens.CUT_LLAMA3, tokens.WHOLE_PIECES | tokens.ADD_BOS),
                  "qwen2": (tokens.CUT_QWEN2, tokens.NFC), "smollm": (tokens.CUT_DIGITS, 0),
                  "sentencepiece": (0, tokens.PREFIX_SPACE | tokens.ADD_BOS)}[name]
    assert (spec.cut, spec.flags) == (cut, flags)
    first = ours.encode("a", ADD_BOS)
    assert first == [spec.bos] * (spec.bos != tokens.NONE) + ours.encode("a")
    bos = spec.tokens[spec.bos].decode()
    assert ours.encode(bos + "a", PARSE_SPECIALS) == [spec.bos] + ours.encode("a")


def test_speed(family):
    """A megabyte takes less than two seconds; ten times that is the margin for a busy machine."""
    for shape in (b"word " * 200000, b" " * 10**6, b"\n \n" * 300000, b"1" * 10**6, b"'" * 10**6,
                  b" 1" * 500000, "\u3000".encode() * 300000, b"!\n" * 500000):
        start = time.process_time()
        family[2].encode(shape)
        assert time.process_time() - start < 20, shape[:20]


# --------------------------------------------------------------------------------------------------
# Variants that are understood or refused.

def changed(tmp_path, change, name="qwen2"):
    spec = json.loads((DATA / "tokenizers" / FAMILIES[name]).read_bytes())
    change(spec)
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(spec))
    return path


def test_tokens_that_are_added_but_not_special(tmp_path, library):      # noqa: F811
    """They are matched like special ones, and decode to their text."""
    def change(spec):
        spec["added_tokens"].append({**spec["added_tokens"][0], "content": "<think>", "id": 703,
                                     "special": False})
    path = changed(tmp_path, change)
    spec = tokens.hf_tokenizer(path)
    ours = Ours(library, tokens.section(spec), spec.size)
    theirs = tokenizers.Tokenizer.from_file(str(path))
    text = "<think>so<think"
    ids = ours.encode(text, PARSE_SPECIALS)
    assert spec.shown == [703] and ids == theirs.encode(text).ids and ids[0] == 703
    assert ours.decode(ids).decode() == theirs.decode(ids) == text


@pytest.mark.parametrize("change, reason", [
    (lambda s: s["pre_tokenizer"]["pretokenizers"][0]["pattern"].update(Regex=r"\d+"), r"'\\d+'"),
    (lambda s: s["pre_tokenizer"]["pretokenizers"][0].update(behavior="Removed"), "pattern"),
    (lambda s: s["pre_tokenizer"]["pretokenizers"][1].update(use_regex=True), "pattern"),
    (lambda s: s["pre_tokenizer"]["pretokenizers"].pop(), "Split"),
    (lambda s: s["pre_tokenizer"].update(pretokenizers=[
        {"type": "Digits", "individual_digits": False},
        {"type": "ByteLevel", "add_prefix_space": False}]), "individual_digits"),
    (lambda s: s.update(normalizer={"type": "NFKC"}), "NFKC"),
    (lambda s: s["model"].update(byte_fallback=True), "tokenizer.model"),
    (lambda s: s["added_tokens"][0].update(content=""), "''"),
])
def test_refused(tmp_path, change, reason):
    with pytest.raises(origins.Refused) as caught:
        tokens.hf_tokenizer(changed(tmp_path, change))
    assert reason in str(caught.value) and "\n" not in str(caught.value)


def test_a_pair_of_files_does_not_tell_how_text_is_cut(tmp_path):
    (tmp_path / "vocab.json").write_text('{"a": 0}')
    (tmp_path / "merges.txt").write_text("")
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "Qwen2Tokenizer"}')
    with pytest.raises(origins.Refused, match="Qwen2Tokenizer"):
        tokens.hf_tokenizer(tmp_path / "vocab.json")


def field(number, value):
    """One field of a protobuf message."""
    if isinstance(value, int):
        return bytes([number * 8 & 127 | 128 * (number > 15)] + [number >> 4] * (number > 15)
                     + [value])
    return bytes([number * 8 + 2, len(value)]) + value


def piece(text, score=0.0, kind=1):
    return field(1, field(1, text.encode()) + b"\x15" + struct.pack("<f", score) + field(3, kind))


def model(*pieces, trainer=b"", normalizer=b""):
    """A tokenizer.model; later fields overrule earlier ones."""
    return (piece("<unk>", kind=2) + piece("<s>", kind=3) + piece("</s>", kind=3)
            + b"".join(piece(f"<0x{b:02X}>", kind=6) for b in range(256)) + b"".join(pieces)
            + field(2, field(3, 2) + field(35, 1) + trainer)
            + field(3, field(1, b"identity") + field(4, 0) + normalizer))


@pytest.mark.parametrize("data, reason", [
    (model(trainer=field(3, 1)), "model 1"), (model(trainer=field(35, 0)), "byte_fallback"),
    (model(normalizer=field(1, b"nmt_nfkc")), "nmt_nfkc"),
    (model(normalizer=field(4, 1)), "remove_extra_whitespaces"),
    (model(normalizer=field(5, 0)), "escape_whitespaces"),
    (model(trainer=field(24, 1)), "treat_whitespace_as_suffix"),
    (model(piece("x", kind=4)), "token 259 is of kind 4"), (model(piece("x", kind=5)), "kind 5"),
    (model(piece("x", float("nan"))), "no number"), (model()[:1999], "ends at byte"),
    (model().replace(b"<0x41>", b"<0x42>"), "no token for byte 65"),
    (model() + b"\x0b", "unknown kind 3"), (model() + b"\xff" * 12, "does not end"),
    (model() + b"\x0a\x05", "ends at byte"),
])
def test_refused_sentencepiece(tmp_path, data, reason):
    path = tmp_path / "tokenizer.model"
    path.write_bytes(data)
    with pytest.raises(origins.Refused) as caught:
        tokens.read_tokenizer(path, 300)
    assert reason in str(caught.value) and "\n" not in str(caught.value)


def test_tokens_added_to_a_sentencepiece_model(tmp_path):
    path = tmp_path / "tokenizer.model"
    path.write_bytes(model(piece("\u2581a", 1.0)))
    (tmp_path / "added_tokens.json").write_text('{"<|im_end|>": 260}')
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({
        "add_bos_token": False, "eos_token": "<|im_end|>", "added_tokens_decoder": {
            "1": {"content": "<s>", "special": True}, "5": {"content": "<x>"},
            "262": {"content": "<t>", "special": False}}}))
    spec = tokens.read_tokenizer(path, 300)
    assert (spec.bos, spec.eos, spec.unknown, spec.flags) == (1, 260, 0, tokens.PREFIX_SPACE)
    assert spec.size == 263 and spec.shown == [262] and spec.specials == [0, 1, 2, 260, 262]
    assert spec.tokens[259] == b" a" and spec.tokens[261] == b"" and spec.tokens[5] == b"\2"


def test_the_better_file_of_two(tmp_path, library):                     # noqa: F811
    """tokenizer.model wins over the tokenizer.json that was made from it, unless it is not
    SentencePiece's."""
    (tmp_path / "tokenizer.json").write_text('{"model": {"type": "BPE", "byte_fallback": true}}')
    notes = []
    with pytest.raises(origins.Refused, match="put the tokenizer.model"):
        tokens.choose_tokenizer(None, tmp_path, 1600, notes.append)
    path = DATA / "tokenizers" / "sentencepiece.model"
    (tmp_path / "tokenizer.model").write_bytes(path.read_bytes())
    section = tokens.choose_tokenizer(None, tmp_path, 1600, notes.append)
    assert section == tokens.section(tokens.read_tokenizer(path, 1600)) and notes == []
    changed(tmp_path, lambda spec: None)
    (tmp_path / "tokenizer.model").write_bytes(b"IQ== 0\nIg== 1\n")
    section = tokens.choose_tokenizer(None, tmp_path, 1600, notes.append)
    assert Ours(library, section, 1600).struct.cut == tokens.CUT_QWEN2
    assert len(notes) == 1 and "NFC" in notes[0]


# --------------------------------------------------------------------------------------------------
# Conversations.

CHATML = """{% for m in messages %}
{{ '<|im_start|>' + m.role + '\n' + m['content'] + '<|im_end|>\n' }}
{%- endfor %}
{% if add_generation_prompt %}
{{ '<|im_start|>assistant\n' }}
{%- endif %}"""
WITH_DEFAULT = ("{%- if messages[0].role != 'system' %}"
                "{{ '<|im_start|>system\nBe kind.<|im_end|>\n' }}{% endif %}" + CHATML)
LLAMA3 = """{{- bos_token }}
{%- if messages[0]['role'] == 'system' %}
    {%- set first = messages[0]['content'] | trim %}{%- set messages = messages[1:] %}
{%- else %}
    {%- set first = '' %}
{%- endif %}
{{- '<|head|>system<|/head|>\n\nDate: 1 Jan\n\n' + first + '<|eot|>' }}
{%- for m in messages %}
    {{- '<|head|>' + m.role + '<|/head|>\n\n' + m.content | trim + '<|eot|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|head|>assistant<|/head|>\n\n' }}
{%- endif %}"""
ZEPHYR = """{% for m in messages %}
{{ '<|' + m.role + '|>\n' + m.content + eos_token }}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}
{% endfor %}"""
MISTRAL = """{{ bos_token }}
{%- for m in messages %}
    {%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Roles!') }}{% endif %}
    {%- if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}
    {%- else %}{{ ' ' + m.content + eos_token }}{% endif %}
{%- endfor %}"""
ENDS = {"bos_token": "<s>", "eos_token": {"content": "</s>"}}
NAMES = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|head|>", "<|/head|>", "<|eot|>"]


def names():
    spec = tokens.read_tokenizer(DATA / "tokenizers" / "sentencepiece.model", 1600)
    more = [name.encode() for name in NAMES[2:]]
    return spec._replace(tokens=spec.tokens + more, scores=spec.scores + [0.0] * len(more),
                         specials=spec.specials + [*range(1600, 1600 + len(more))])


@pytest.mark.parametrize("template, texts", [
    (CHATML, ("<|im_start|>system\n{}<|im_end|>\n", "<|im_start|>user\n{}<|im_end|>\n",
              "<|im_start|>assistant\n{}<|im_end|>\n", "")),
    (WITH_DEFAULT, ("<|im_start|>system\n{}<|im_end|>\n", "<|im_start|>user\n{}<|im_end|>\n",
                    "<|im_start|>assistant\n{}<|im_end|>\n",
                    "<|im_start|>system\nBe kind.<|im_end|>\n")),
    (LLAMA3, ("<s><|head|>system<|/head|>\n\nDate: 1 Jan\n\n{}<|eot|>",
              "<|head|>user<|/head|>\n\n{}<|eot|>", "<|head|>assistant<|/head|>\n\n{}<|eot|>",
              "<s><|head|>system<|/head|>\n\nDate: 1 Jan\n\n<|eot|>")),
    (ZEPHYR, ("<|system|>\n{}</s>\n", "<|user|>\n{}</s>\n", "<|assistant|>\n{}</s>\n", "")),
    (MISTRAL, ("", "[INST] {} [/INST]", "{}</s>", "<s>")),
])
def test_templates(template, texts):
    assert tokens.chat_template(template, names(), ENDS) == texts


@pytest.mark.parametrize("template, reason", [
    ("{{ messages[0].content }}", "each message once"), ("{% for", "TemplateSyntaxError"),
    ("{{ nothing.at.all }}", "UndefinedError"), ("{{ raise_exception('No.') }}", "No."),
    (CHATML.replace("<|im_end|>", "<|end|>"), "no special token"),
    (CHATML.replace("m.role", "m.role + loop.index | string"), "more than a text"),
    (CHATML.replace("assistant\n", "assistant:\n"), "more than a text"),
    (CHATML.replace("end|>", "end|>{}"), "{} or"),
    (CHATML.replace("end|>", "end|>\0"), "zero byte"),
    (CHATML.replace("user", "").replace("m['content']", "m.content[1:]"), "each message once"),
    (CHATML + "{{ ''.__class__.__mro__ }}", "SecurityError"),
    (CHATML + "{% for i in range(10**9) %}{% endfor %}", "OverflowError"),
])
def test_templates_that_cannot_be_expressed(template, reason):
    with pytest.raises(origins.Refused) as caught:
        tokens.chat_template(template, names(), ENDS)
    assert reason in str(caught.value) and "\n" not in str(caught.value)


def test_without_jinja2(monkeypatch):
    monkeypatch.setitem(sys.modules, "jinja2.sandbox", None)
    with pytest.raises(origins.Refused, match="pip install jinja2"):
        tokens.chat_template(CHATML, names(), ENDS)


def told(tmp_path, config=None, generation=None):
    for name, value in (("tokenizer_config.json", config), ("generation_config.json", generation)):
        if value is not None:
            (tmp_path / name).write_text(json.dumps(value))
    notes = []
    spec = tokens.with_conversation(names(), [tmp_path], notes.append)
    return spec, notes


def test_stop_tokens(tmp_path):
    assert told(tmp_path)[0].stops == []
    spec, notes = told(tmp_path, {**ENDS, "chat_template": CHATML},
                       {"eos_token_id": [2, 1604, 9999]})
    assert spec.stops == [1601, 1604] and spec.chat[3] == "" and notes == []
    (tmp_path / "chat_template.jinja").write_text(LLAMA3)
    assert told(tmp_path, None, {"eos_token_id": 7})[0].stops == [7, 1604]
    named = [{"name": "tools", "template": "x"}, {"name": "default", "template": MISTRAL}]
    (tmp_path / "chat_template.jinja").unlink()
    assert told(tmp_path, {**ENDS, "chat_template": named})[0].chat[1] == "[INST] {} [/INST]"
    spec, notes = told(tmp_path, {**ENDS, "chat_template": "hello"})
    assert spec.chat == () and len(notes) == 1 and "--chat-template" in notes[0]
    for bad in ("x", [2, "x"], -1, True, 1.5, {}):
        with pytest.raises(origins.Refused, match="eos_token_id"):
            told(tmp_path, None, {"eos_token_id": bad})


def sampling(tmp_path, **said):
    (tmp_path / "generation_config.json").write_text(json.dumps(said))
    config = origins.CONFIG.new()
    tokens.read_sampling(config, [tmp_path], {})
    return config


def test_sampling(tmp_path):
    c = sampling(tmp_path, do_sample=True, temperature=0.6, top_p=0.9)
    assert c.flags == origins.SAMPLING and (c.temperature, c.top_p, c.top_k) == (0.6, 0.9, 0)
    assert (c.min_p, c.repeat_penalty, c.repeat_last_n) == (0, 1, 1024)
    c = sampling(tmp_path, top_k=20.0, repetition_penalty=1.1, min_p=0, temperature=None)
    assert (c.temperature, c.top_p, c.top_k, c.repeat_penalty) == (1, 1, 20, 1.1)
    assert sampling(tmp_path, do_sample=False, temperature=0.6).flags == 0
    assert sampling(tmp_path, eos_token_id=2).flags == 0
    for bad in ({"temperature": -1}, {"top_p": 1.5}, {"top_k": 0.5}, {"top_k": "x"},
                {"min_p": True}, {"top_k": 2**32}, {"temperature": float("nan")},
                {"repetition_penalty": 0}):
        with pytest.raises(origins.Refused, match="generation_config.json"):
            sampling(tmp_path, **bad)
