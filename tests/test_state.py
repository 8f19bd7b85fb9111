"""The past as a file, on the command line: --save, --load, --append, --branches, and conversations.

What a state file must refuse, byte by byte, is in test_state.c; here it is a user's view of it.
"""
import os
import re
import signal
import subprocess
import time
from pathlib import Path

import based
import export
import numpy as np
import pytest
from test_cli import MODEL, ROOT, Terminal, run, start

TEXT = "Once upon a time, there was a girl named Lily. She liked to play with her dog in the park."
HYBRID = {"mixers": [export.CONV, export.TAYLOR, export.WINDOW, export.TAYLOR],
          "input": 0, "rows": 50, "vocab": 47, "flags": export.TIED}
IDS = [1, 40, 3, 17, 46, 0, 9]


def logits(done):
    assert done.status == 0, done.err
    return re.findall(rb"logits #([0-9a-f]{8})", done.err)[-1]


def fingerprint(model, *args):
    """stdout and the fingerprint of all logits used."""
    done = run(model, "-v", *args)
    return done.out, logits(done)


def joined(first, second):
    """Two outputs as one: each ends with one newline of its own."""
    assert first.endswith(b"\n") and second.endswith(b"\n")
    return first[:-1] + second


def saved(path, model, *args):
    """A run that saves; returns what it printed."""
    return run(model, *args, "--save", path).text()


# the other kinds of memory: sums that fade, beside newest keys; a prefix; norms of q and k
FADING = {**HYBRID, "mixers": [export.TAYLOR] * 2}
SUMS = {"kernel": 0, "sinks": 0, "decay": 0.0, "degree": 2, "chunk": 9, "window": 11,
        "normalizer": export.ADD, "normalizer_eps": 0.0, "rope_pairs": 0}
KINDS = {"every mixer": (100, HYBRID),
         "gates": (107, {**FADING, "layer": {**SUMS, "fading": export.GATED}}),
         "factors": (108, {**FADING, "layer": {**SUMS, "fading": export.FIXED,
                                               "flags": export.VALUE_FACTORS}}),
         "prefix": (109, {**FADING, "prefix": 24,
                          "layer": {**SUMS, "window": 0, "fading": 0, "flags": export.PREFIX}}),
         "norms of q and k": (110, {**HYBRID, "mixers": [export.WINDOW],
                                    "layer": {"flags": export.QK_NORM}})}


@pytest.fixture(scope="module", params=KINDS)
def hybrid(random_model, request):
    seed, overrides = KINDS[request.param]
    return str(random_model(seed, **overrides))


@pytest.fixture(scope="module")
def book(tmp_path_factory):
    """A prompt of about 2,000 tokens, and a state that has read it."""
    directory = tmp_path_factory.mktemp("book")
    (directory / "book.txt").write_text((TEXT + "\n") * 63)
    state = directory / "book.state"
    saved(state, MODEL, "-f", directory / "book.txt", "-n", 0)
    return directory / "book.txt", state


# ---- A run that was interrupted by a file is the run that was not. ----

@pytest.mark.parametrize("model", sorted(str(p) for p in (ROOT / "models").glob("*.bin")))
@pytest.mark.parametrize("options", [
    ["-t", "0"], ["-t", "1.2", "-p", "1", "-s", "5", "--repeat-penalty", "1.3"]])
def test_50_and_50_are_100(model, options, tmp_path):
    """Text, logits and what is remembered at the end, generator and repetition penalty included."""
    options = [*options, "--ignore-eos", "--repeat-last-n", "64"]
    whole, _ = fingerprint(model, *options, "-i", TEXT, "-n", 100, "--save", tmp_path / "whole")
    first = saved(tmp_path / "half", model, *options, "-i", TEXT, "-n", 50)
    # A saved generator goes on without being told.
    options = [o for o in options if o not in ("-s", "5")]
    done = run(model, *options, "-n", 50, "--load", tmp_path / "half", "--save", tmp_path / "both",
               "-v")
    assert joined(first, done.text()) == whole
    assert "restored" in done.err.decode()
    a, b = (tmp_path / "whole").read_bytes(), (tmp_path / "both").read_bytes()
    note = len(b) - 28 - 4 * 64                           # the second run had no seed to save
    assert a[80:note] == b[80:note] and a[40:56] == b[40:56]


def test_every_split_of_a_model_with_every_mixer(hybrid, tmp_path):
    written = run(hybrid, "--tokens", " ".join(map(str, IDS)), "-t", 0, "-n", 100).text()
    whole = [int(i) for i in written.split()]
    dump = tmp_path / "rows"
    # the same in two runs, because a prefix is what is fed at first
    prompt, fed = " ".join(map(str, IDS)), " ".join(map(str, whole[:-1]))
    saved(tmp_path / "ids", hybrid, "--tokens", prompt, "-n", 0)
    run(hybrid, "--load", tmp_path / "ids", "--tokens", fed, "-n", 0, "--dump-logits", dump).text()
    rows = np.fromfile(dump, "<f4").reshape(-1, 47)
    for split in list(range(0, 100, 7)) + [1, 2, 99]:
        state = tmp_path / "state"
        saved(state, hybrid, "--tokens", " ".join(map(str, IDS)), "-t", 0, "-n", split)
        rest = run(hybrid, "--load", state, "-t", 0, "-n", 100 - split,
                   "--dump-logits", dump).text()
        assert [int(i) for i in rest.split()] == whole[len(IDS) + split:], split
        got = np.fromfile(dump, "<f4").reshape(-1, 47)
        assert np.array_equal(got.view("u4"), rows[split:].view("u4")), split


def test_a_prefix_of_a_wrong_length_is_refused(random_model, tmp_path):
    """The number of its tokens is the last of the state, and the note comes behind it."""
    seed, overrides = KINDS["prefix"]
    model, state = str(random_model(seed, **overrides)), tmp_path / "s"
    saved(state, model, "--tokens", " ".join(map(str, IDS)), "-n", 0)
    data = bytearray(state.read_bytes())
    at = len(data) - int.from_bytes(data[72:80], "little") - 4
    assert np.frombuffer(data, "<f4", 1, at)[0] == len(IDS)
    for wrong in (25.0, -1.0, 2.5, np.nan, np.inf):
        data[at:at + 4] = np.float32(wrong).tobytes()
        data[24:32] = based.library().based_checksum(bytes(data[32:]), len(data) - 32).to_bytes(
            8, "little")
        state.write_bytes(data)
        run(model, "--load", state, "-n", 1).error(1, "prefix of another number of tokens")


def test_a_character_may_begin_before_the_file_and_end_after_it(tmp_path):
    """The decoder's half of a character travels along and is not shown as damage."""
    emoji = "🙂".encode()
    ids = [3 + byte for byte in emoji]                            # byte tokens of the shipped model
    first = saved(tmp_path / "s", MODEL, "--tokens", " ".join(map(str, [1, *ids[:2]])), "-n", 0)
    assert "�".encode() not in first
    (tmp_path / "t").write_bytes(emoji[2:])
    with (tmp_path / "t").open("rb") as rest:
        second = run(MODEL, "--load", tmp_path / "s", "--append", "-", "-n", 0, "-q",
                     stdin=rest.read()).text()
    assert emoji in second


def test_the_end_of_a_text_is_not_part_of_it(hybrid, tmp_path):
    """A text that ended stays ended; and can be continued by more text."""
    out = saved(tmp_path / "s", MODEL, "-t", 0, "-i", "The big dog", "-n", 1000)
    again = run(MODEL, "-t", 0, "--load", tmp_path / "s", "-n", 50)
    assert len(out) < 4000 and again.text() == b""
    more = run(MODEL, "-t", 0, "--load", tmp_path / "s", "--append", "\nOnce upon", "-n", 20).text()
    assert more.startswith(b"\nOnce upon a time")


# ---- What the seed does. ----

def test_seeds_and_files(tmp_path):
    a, b = tmp_path / "a", tmp_path / "b"
    first = saved(a, MODEL, "-i", TEXT, "-n", 30, "-s", 5)
    saved(b, MODEL, "-i", TEXT, "-n", 0)
    go = lambda *args: run(MODEL, "-n", 40, "-q", *args).text()
    assert joined(first, go("--load", a)) == go("-i", TEXT, "-n", 70, "-s", 5)
    assert (go("--load", a) == go("--load", a)
            != go("--load", a, "-s", 6) == go("--load", a, "-s", 6))
    assert len({go("--load", b) for _ in range(4)}) > 1         # nobody asked for a seed
    assert go("--load", b, "-s", 7) == go("-i", TEXT, "-s", 7, "--no-display-prompt")


# ---- A prompt that was read before. ----

def test_only_the_rest_of_a_prompt_is_read(book, tmp_path):
    text, state = book
    longer = tmp_path / "longer.txt"
    longer.write_bytes(text.read_bytes() + b"Lily and her dog")
    cold = run(MODEL, "-f", longer, "-n", 30, "-s", 3, "-v")
    warm = run(MODEL, "-f", longer, "-n", 30, "-s", 3, "-v", "--load", state)
    assert warm.text() == cold.text() and logits(warm) == logits(cold)
    size = f"{state.stat().st_size / 1e3:.0f} kB"
    assert re.search(rf"restored [12],\d\d\d tokens from {size}\n", warm.err.decode())
    fed = lambda done: int(re.search(r"prompt eval time.*/ +(\d+) tokens", done.err.decode())[1])
    assert fed(cold) > 1800 and fed(warm) < 12


def test_the_same_prompt_needs_no_reading(book):
    text, state = book
    cold, warm = (run(MODEL, "-f", text, "-n", 30, "-t", 0, "-v", *more)
                  for more in ([], ["--load", state]))
    assert warm.text() == cold.text() and logits(warm) == logits(cold)
    assert re.search(r"prompt eval time.*/ +0 tokens", warm.err.decode())


def test_the_penalty_knows_a_loaded_prompt(book):
    text, state = book
    options = ["-f", text, "-n", 60, "-t", 0, "-q", "--repeat-penalty", "1.8",
               "--no-display-prompt"]
    assert run(MODEL, *options).text() == run(MODEL, *options, "--load", state).text()
    assert run(MODEL, *options).text() == run(MODEL, *options[2:], "--load", state).text()


def test_another_prompt_is_told_apart(book, tmp_path):
    text, state = book
    words = text.read_text()
    for other in [words[:-2] + "!", "X" + words[1:], words[:400],
                  words.replace("dog", "cat", 1) + words, "Once upon"]:
        (tmp_path / "other").write_text(other + " The end")
        done = run(MODEL, "-f", tmp_path / "other", "--load", state, "-n", 5, "-q")
        done.error(1, "does not begin with the", "tokens saved in", "--append")
        assert done.out == b""


def test_appending(book):
    text, state = book
    a = run(MODEL, "--load", state, "--append", "The dog", "-t", 0, "-n", 20, "-q").text()
    assert a.startswith(b"The dog")
    assert a == run(MODEL, "--load", state, "--append", "-", "-t", 0, "-n", 20, "-q",
                    stdin=b"The dog\n").text()
    both = run(MODEL, "-i", text.read_text()[:-1] + "The dog", "-t", 0, "-n", 20, "-q",
               "--no-display-prompt").text()
    assert a == b"The dog" + both


def test_interrupted_reading_goes_on_where_it_was(book, tmp_path):
    """Ctrl-C while a long prompt is read, with --save.

    The same command with --load reads only the rest.
    """
    text, _ = book
    long, state = tmp_path / "long.txt", tmp_path / "s"
    long.write_bytes(text.read_bytes() * 20)
    p = start(MODEL, "-f", long, "-n", 5, "-t", 0, "--save", state)
    time.sleep(0.4)
    p.send_signal(signal.SIGINT)
    _, err = p.communicate(timeout=60)
    if p.returncode == 0:
        pytest.skip("this machine reads faster than it is interrupted")
    assert p.returncode == 130 and b"saved" in err
    warm = run(MODEL, "-f", long, "-n", 5, "-t", 0, "--load", state, "--no-display-prompt", "-v")
    cold = run(MODEL, "-f", long, "-n", 5, "-t", 0, "--no-display-prompt", "-v")
    assert warm.text() == cold.text() and logits(warm) == logits(cold)


# ---- Files that are not what they should be. ----

@pytest.mark.parametrize("spoil, says", [
    (lambda b: b"", "not a saved state"),
    (lambda b: b"hello" * 100, "not a saved state"),
    (lambda b: b[:60], "cut off"),
    (lambda b: b[:-1], "cut off"),
    (lambda b: b + b"x", "there are"),
    (lambda b: b[:8] + b"\2" + b[9:], "version 2"),
    (lambda b: b[:5000] + bytes([b[5000] ^ 1]) + b[5001:], "checksum"),
    (lambda b: Path(MODEL).read_bytes(), "not a saved state")])
def test_bad_state(spoil, says, book, tmp_path):
    _, state = book
    (tmp_path / "bad").write_bytes(spoil(state.read_bytes()))
    done = run(MODEL, "--load", tmp_path / "bad", "-n", 5)
    done.error(1, str(tmp_path / "bad"), says)
    assert done.out == b""


def test_state_of_another_model(book, hybrid):
    _, state = book
    run(hybrid, "--load", state, "-n", 5).error(1, "saved with another checkpoint")
    run(MODEL, "--load", state.parent / "none", "-n", 5).error(1, "No such file")


def forge(state, path, note):
    """The saved past with another note, sizes and checksum right."""
    from test_cli import checksum
    data = state.read_bytes()
    size = len(data) - int.from_bytes(data[72:80], "little")
    forged = bytearray(data[:size] + note)
    forged[16:24] = len(forged).to_bytes(8, "little")
    forged[72:80] = len(note).to_bytes(8, "little")
    forged[24:32] = checksum(bytes(forged[32:])).to_bytes(8, "little")
    path.write_bytes(forged)
    return path


def note_of(held=b"", n=None, recent=(), marks=(0, 0, 0, 0), count=None):
    n, count = len(held) if n is None else n, len(recent) if count is None else count
    return (b"run\1" + marks[0].to_bytes(4, "little") + bytes(8) + held.ljust(4, b"\0")[:4]
            + bytes([n, *marks[1:]]) + count.to_bytes(4, "little")
            + b"".join(token.to_bytes(4, "little") for token in recent))


def test_a_foreign_note_is_no_harm(book, tmp_path):
    """Any program may save a past with a note of its own: the past counts, the note does not."""
    _, state = book
    expected = run(MODEL, "--load", state, "-t", 0, "-n", 9, "-q").text()
    for note in [b"", b"x", b"run", b"run\0" + b"\xff" * 24, b"run\2" + b"\xff" * 40]:
        forged = forge(state, tmp_path / "s", note)
        assert run(MODEL, "--load", forged, "-t", 0, "-n", 9, "-q").text() == expected


@pytest.mark.parametrize("note, says", [
    (b"run\1", "has 4 bytes, expected 28 and 4"),
    (note_of()[:27], "has 27 bytes"),
    (note_of() + b"x", "has 29 bytes"),
    (note_of(recent=[1, 2], count=3), "has 36 bytes"),
    (note_of(count=0xffffffff), "has 28 bytes"),
    (note_of(count=0x40000000), "has 28 bytes"),
    (note_of(recent=[3, 512]), "has token 512, but the vocabulary has 512"),
    (note_of(recent=[0xffffffff]), "has token 4294967295"),
    (note_of(marks=(2, 0, 0, 0)), "neither 0 nor 1"),
    (note_of(marks=(0, 2, 0, 0)), "neither 0 nor 1"),
    (note_of(marks=(0, 0, 1, 0)), "neither 0 nor 1"),
    (note_of(marks=(0, 0, 0, 1)), "neither 0 nor 1"),
    (note_of(b"abcd"), "holds 4 bytes, 61 62 63"),
    (note_of(n=255), "holds 255 bytes")])
def test_a_forged_note(note, says, book, tmp_path):
    done = run(MODEL, "--load", forge(book[1], tmp_path / "s", note), "-n", 5)
    done.error(1, str(tmp_path / "s"), says)
    assert done.out == b""


def test_held_bytes(book, tmp_path):
    """What a note holds of a character is taken if something can follow that makes it one."""
    cases = [[a] for a in (0x41, 0x80, 0xbf, 0xc1, 0xc2, 0xdf, 0xe0, 0xef, 0xf0, 0xf4, 0xf5, 0xff)]
    cases += [[0xc2, 0x80]]
    edges = ((0xe0, 0xa0), (0xe1, 0x80), (0xe1, 0xc0), (0xed, 0xa0), (0xf0, 0x90), (0xf1, 0x80),
             (0xf4, 0x90))
    cases += [[a, b] for a, edge in edges for b in (edge - 1, edge)]
    cases += [[0xe1, 0x90, 0x80]] + [[0xf0, 0x90, c] for c in (0x7f, 0x80, 0xbf, 0xc0)]
    for held in map(bytes, cases):
        texts = {(held + bytes([b]) + b"\x80" * n).decode(errors="replace")
                 for b in (0x80, 0x90, 0xa0) for n in range(3)}
        forged = forge(book[1], tmp_path / "s", note_of(held))
        done = run(MODEL, "--load", forged, "-t", 0, "-n", 0, "-q")
        if any(len(text) == 1 for text in texts - {"\ufffd"}):
            assert (done.status, done.err) == (0, b""), held
        else:
            done.error(1, "expected the beginning of a character")


def test_saving_replaces_a_file_whole_or_not_at_all(tmp_path):
    path = tmp_path / "s"
    path.write_text("old")
    run(MODEL, "-i", "x" * 10, "--tokens", "1", "--save", path).error(2)
    assert path.read_text() == "old"
    saved(path, MODEL, "-n", 3)
    assert path.stat().st_size > 1000 and os.listdir(tmp_path) == ["s"]
    done = run(MODEL, "-n", 3, "-q", "--save", tmp_path / "none" / "s")
    done.error(1, "cannot write the past", "No such file")
    if os.path.exists("/dev/full"):
        done = run(MODEL, "-n", 3, "-q", "--save", "/dev/full")
        done.error(1, "cannot write the past", "No space left")


BAD = [(["--append", "x"], "--append goes with --load"),
       (["--load", "s", "--append", "x", "-i", "y"], "--append does not go with --prompt"),
       (["--save", "-"], "name of a file"),
       (["--load", "-"], "name of a file"),
       (["--save", ""], "name of a file"),
       (["--branches", "2", "--save", "s"], "--branches does not go with --save"),
       (["--branches", "0.5"], "--branches takes"),
       (["--branches", "70000"], "--branches takes"),
       (["-x", "f", "--save", "s"], "--perplexity does not go with --save"),
       (["--info", "--load", "s"], "--info does not go with --load"),
       (["-m", "chat", "--tokens", "1"], "--tokens does not go with --mode chat"),
       (["-m", "chat", "-i", "-"], "standard input is what you say"),
       (["-y", "x"], "--system-prompt goes with --mode chat"),
       (["-m", "chat", "--chat-template", "User:"], "one {}"),
       (["-m", "chat", "--chat-template", "{}{}"], "one {}"),
       (["-m", "talk"], '-m takes generate or chat, got "talk"'),
       (["-m", "model.bin"], "the model is the first argument")]


@pytest.mark.parametrize("args, says", BAD)
def test_bad_usage(args, says):
    run(MODEL, *args).error(2, says)


# ---- One prompt, many continuations. ----

def sections(out):
    parts = re.split(rb"--- branch [\d,]+ of [\d,]+, seed (\d+) ---\n", out)
    assert parts[0] == b""
    return dict(zip(map(int, parts[1::2]), parts[2::2]))


def test_each_branch_is_a_run_of_its_own(book):
    text, _ = book
    options = ["-f", text, "-n", 40, "--repeat-penalty", "1.2"]
    done = run(MODEL, *options, "-s", 11, "--branches", 8, "-v")
    parts = sections(done.text())
    assert list(parts) == list(range(11, 19)) and len(set(parts.values())) == 8
    fingerprints = re.findall(rb"branch \d: logits #(\w+)", done.err)
    for (seed, text), mark in zip(parts.items(), fingerprints):
        alone = run(MODEL, *options, "-s", seed, "-v")
        assert alone.text() == text and logits(alone) == mark
    fed = int(re.search(r"prompt eval time.*/ +(\d+) tokens", done.err.decode())[1])
    assert 1800 < fed < 2600                                     # once, not eight times
    assert re.search(r"eval time.*/ +320 runs", done.err.decode())


def test_branches_of_a_loaded_past(book):
    _, state = book
    parts = sections(run(MODEL, "--load", state, "-n", 20, "-s", 1, "--branches", 3, "-q").text())
    for seed, text in parts.items():
        assert run(MODEL, "--load", state, "-n", 20, "-s", seed, "-q").text() == text


def test_a_prompt_that_goes_on_inside_a_token(tmp_path):
    """Then the line says so; the text goes on behind --append."""
    state = tmp_path / "s"
    model = ROOT / "models" / "based-4m-story.bin"
    run(model, "-q", "-i", "The old b", "-n", 0, "--save", state).text()
    for prompt, line in (("The old bear", "ends inside a token of this prompt"),
                         ("The old man", "does not begin with"), ("The", "does not begin with")):
        done = run(model, "--load", state, "-n", 0, "-q", "-i", prompt)
        done.error(1, line, "--append")
    assert run(model, "--load", state, "-n", 0, "-q", "--append", "ear").text() == b"ear\n"


# ---- Conversations. ----

def chat(*args, say, **more):
    return run(MODEL, "-m", "chat", "-n", 30, "-s", 4, *args, stdin=say.encode(), **more)


def test_a_conversation_from_a_pipe(tmp_path):
    """Every line is a turn.

    The model has read what the template says, and the whole text is one past.
    """
    done = chat("--save", tmp_path / "s", "-q", "-t", 0, say="Hello\nTell me more\n")
    assert done.text().count(b"\n") >= 2
    first = chat("-t", 0, "-q", say="Hello\n").text()
    assert done.text().startswith(first)
    one = run(MODEL, "-t", 0, "-n", 30, "-q", "--no-display-prompt",
              "--tokens", turns(b"User: Hello\nAssistant:")).text()
    assert first == one.lstrip(b" ")


def turns(text):
    """The ids that a conversation's text is fed as.

    These are the start token, then the text with no space before it.
    """
    import ctypes
    import based
    lib = based.library()
    model = based.Model(MODEL)
    tokenizer, error = (ctypes.c_char * 256)(), based.Error()
    lib.based_tokenizer_open.argtypes = [ctypes.c_void_p] * 3
    lib.based_encode.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_size_t, ctypes.c_int,
                                 *[ctypes.c_void_p] * 3]
    lib.based_encode.restype = ctypes.c_int64
    assert lib.based_tokenizer_open(tokenizer, model.handle, ctypes.byref(error)) == 0
    flags = ctypes.cast(tokenizer, ctypes.POINTER(ctypes.c_uint32))
    flags[1] &= ~1
    ids, scratch = (ctypes.c_int32 * 1000)(), (ctypes.c_uint64 * 100000)()
    n = lib.based_encode(tokenizer, text, len(text), 2, ids, scratch, ctypes.byref(error))
    return " ".join(map(str, [1, *ids[:n]]))


def test_a_reply_ends_where_the_next_turn_begins(tmp_path):
    """A stop text in the middle of a reply: what comes after it is neither shown nor remembered.

    The past is that of the text on the screen, whatever tokens the stop text was made of.
    """
    whole = chat("-t", 0, "-q", say="Hello\n").text().decode()
    for cut in range(3, len(whole) - 12, 4):
        stop = whole[cut:cut + 7]
        state = tmp_path / "s"
        got = chat("-t", 0, "-q", "-r", stop, "--save", state, say="Hello\n").text().decode()
        assert got == whole[:whole.index(stop)] + "\n"
        fed = f"User: Hello\nAssistant:{got[:-1]}"
        want = run(MODEL, "-t", 0, "-q", "-n", 0, "--tokens", turns(fed.encode()),
                   "--save", tmp_path / "t")
        want.text()
        width = 80 + 4 * 512
        a, b = state.read_bytes(), (tmp_path / "t").read_bytes()
        same = a[40:width] == b[40:width]
        if not same:                    # the model may have spelled the reply in other tokens
            lengths = [int.from_bytes(v[40:48], "little") for v in (a, b)]
            assert abs(lengths[0] - lengths[1]) < 8
            x, y = (np.frombuffer(v[80:width], "<f4") for v in (a, b))
            assert np.corrcoef(x, y)[0, 1] > 0.9


def test_undo_and_reset(tmp_path):
    """After /undo the past is what it was before the turn, to the bit."""
    a, b, c, d = (tmp_path / n for n in "abcd")
    done = chat("-q", say=f"Hello\n/save {a}\nAnd then?\n/undo\n/save {b}\n/reset\n/save {c}\n"
                          f"/undo\n/save {d}\n/undo\n/undo\n")
    assert done.err.count(b"\n") == 1 and b"no turn to take back" in done.err
    states = [p.read_bytes() for p in (a, b, c, d)]
    core = [s[40:len(s) - int.from_bytes(s[72:80], "little")] for s in states]
    assert core[0] == core[1] == core[3] != core[2]
    assert int.from_bytes(states[2][40:48], "little") == 1
    assert done.status == 0


def test_undo_goes_back_eight_turns():
    done = chat("-n", 3, "-q", say="a\n" * 12 + "/undo\n" * 9)
    assert done.status == 0 and done.err.count(b"no turn to take back") == 1


def test_save_and_load_in_a_conversation(tmp_path):
    state = tmp_path / "s"
    whole = chat("-t", 0, "-q", say="Hello\nMore\n").text()
    first = chat("-t", 0, "-q", "--save", state, say="Hello\n").text()
    assert first + chat("-t", 0, "-q", "--load", state, say="More\n").text() == whole
    assert chat("-t", 0, "-q", say=f"/load {state}\nMore\n").text() == whole[len(first):]
    done = chat("-t", 0, "-q", say=f"Hello\n/load {tmp_path / 'none'}\nMore\n")
    assert done.text() == whole and b"No such file" in done.err


def test_commands_that_are_none():
    done = chat("-q", say="/bla\n/save\n/undoo\n/help me\n/help\n/stats\n")
    assert done.text() == b"" and done.err.count(b"is no command") == 3
    assert b"/save needs the name of a file the first time" in done.err
    assert b"Ctrl-D" in done.err and b"turns can be taken back (at most 8" in done.err
    assert b'"rlwrap run ..."' in done.err


@pytest.mark.parametrize("word", ["/quit", "/exit"])
def test_quit(word, tmp_path):
    done = chat("-n", 3, "--save", tmp_path / "s", say=f"Hello\n{word}\n/nonsense\nMore\n")
    assert done.text() == chat("-n", 3, "-q", say="Hello\n").text()
    assert b"no command" not in done.err and (tmp_path / "s").exists()


def test_save_without_a_name(tmp_path):
    """Goes to the file of the last /save, or else of --save."""
    first, second = tmp_path / "first", tmp_path / "second"
    say = "A\n/save\n"
    chat("-q", "--save", first, say=say).text()
    chat("-q", say=f"A\n/save {second}\n").text()
    assert first.read_bytes() == second.read_bytes()
    chat("-q", say=f"/save {second}\n{say}").text()
    assert first.read_bytes() == second.read_bytes()


def test_undo_says_what_it_took_back(tmp_path):
    state = tmp_path / "s"
    done = chat("-n", 3, say=f"A\x1bB\n/save {state}\n/load {state}\n/undo\n/undo\n" + "x" * 99
                + "\n/reset\n/undo\n/undo\n")
    took = [line for line in done.err.decode().splitlines() if line.startswith("took back ")]
    said = [f"/load {state}", "A?B", "/reset", "x" * 72 + "..."]
    assert [line[11:-1] for line in took[1:]] == said[1:] and f"/load {state}"[:60] in took[0]


def test_a_loaded_conversation_shows_its_end(tmp_path):
    state = tmp_path / "s"
    reply = chat("-n", 9, "-q", "--save", state, say="Hello\n").text().decode()
    end = f"User: Hello\nAssistant: {reply}"
    done = chat("--load", state, say=f"/load {state}\n")
    assert done.text() == b"" and done.err.decode().count(end) == 2
    assert end not in chat("--load", state, "-q", say="").err.decode()


def test_a_reply_begins_with_no_space():
    """Its first token does; so the space is read, and not printed."""
    args = ["-q", "-t", 0, "-n", 9]
    fed = run(MODEL, *args, "--no-display-prompt", "--tokens",
              turns(b"User: Hello\nAssistant:")).text()
    said = chat(*args, say="Hello\n").text()
    assert fed.startswith(b" ") and said == fed.lstrip(b" ") and not said.startswith(b" ")


def test_a_reply_ends_at_the_marker_of_the_model_itself():
    args = ["-t", 0, "-q", "-n", 300]
    said = chat(*args, "--chat-template", "Say {} the", say="Hello\n").text()
    assert b" the" in run(MODEL, *args, "-i", "Say Hello the", "--no-display-prompt").text()
    assert said and b" the" not in said


def test_system_prompt_template_and_first_message():
    by_hand = run(MODEL, "-t", 0, "-q", "-n", 20, "--no-display-prompt", "--tokens",
                  turns(b"A story.\nQ: Who?\nA:")).text()
    got = chat("-t", 0, "-q", "-n", 20, "-y", "A story.", "--chat-template", r"Q: {}\nA:",
               "-i", "Who?", say="").text()
    assert got != b"" and by_hand.lstrip(b" ").startswith(got[:-1].rstrip(b"\n"))


def test_empty_input_and_empty_lines():
    assert chat("-q", say="").text() == b"" and chat("-q", say="\n\n\n").text() == b""
    assert chat("-q", say="Hello").text() == chat("-q", say="Hello\r\n").text()
    assert len(chat("-q", "-n", 2, say="word " * 3000 + "\n").text()) > 0


def test_nobody_is_asked_without_a_terminal():
    done = subprocess.run([str(ROOT / "run"), MODEL, "-m", "chat"],
                          stdin=subprocess.DEVNULL, capture_output=True, timeout=30)
    assert done.returncode == 0 and done.stdout == b"" and b">" not in done.stderr


def test_a_conversation_on_a_terminal():
    t = Terminal(MODEL, "-m", "chat", "-n", "12", "-s", "1")
    assert b"/help" in t.read(b"> ")
    t.type(b"Hello\n")
    assert len(t.read(b"> ").split(b"Hello", 1)[1]) > 6
    t.type(b"/stats\n")
    assert b"can be taken back" in t.read(b"> ")
    t.type(b"\4")
    status, rest = t.finish()
    assert status == 0 and b"achieved tok/s" in rest


def test_interrupt_ends_the_reply_and_then_the_program():
    t = Terminal(MODEL, "-m", "chat", "-n", "-1", "--ignore-eos", "-r", "never to be seen")
    t.read(b"> ")
    t.type(b"Hello\n")
    time.sleep(0.5)
    t.type(b"\3")
    assert b"> " in t.read(b"> ")
    t.type(b"Again\n")
    time.sleep(0.5)
    t.type(b"\3")
    t.read(b"> ")
    t.type(b"\3")
    assert t.finish()[0] == -signal.SIGINT
