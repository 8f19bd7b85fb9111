"""The command line, driven as a user drives it: ./run in a process of its own, files, pipes,
signals and a terminal.

    python3 -m pytest tests/test_cli.py     RUN="qemu-aarch64 ./run" names another program to test
"""
import csv
import fcntl
import json
import math
import os
import pty
import re
import resource
import select
import shlex
import signal
import stat
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
RUN = shlex.split(os.environ.get("RUN", str(ROOT / "run")))
MODEL = str(ROOT / "models" / "stories260K.bin")
GOLDEN = ROOT / "tests" / "golden"
# what llama2.c prints with -t 0 -n 500
GREEDY = (GOLDEN / "stories260K-greedy.txt").read_bytes()
# ... with -t 0 -n 300 -i "The big dog"
BIG_DOG = (GOLDEN / "stories260K-big-dog.txt").read_bytes()
VOCAB = 512
FOREVER = ["-n", "-1", "--ignore-eos"]
F_SETPIPE_SZ = 1031                                             # of Linux; a name in Python 3.10
SPEED = rb"achieved tok/s: \d+\.\d{6}\n"


class Done:
    """What a finished process left behind."""

    def __init__(self, status, out, err):
        self.status, self.out, self.err = status, out, err

    def text(self):
        """stdout of a run that went well."""
        assert self.status == 0, self.err
        return self.out

    def error(self, status, *needles):
        """The one line of stderr of a run that failed as expected."""
        assert self.status == status, (self.status, self.out, self.err)
        line = self.err.decode()
        assert line.startswith("run: ") and line.endswith("\n") and line.count("\n") == 1, line
        assert not any(ord(c) < 32 for c in line[:-1]), line
        for needle in needles:
            assert needle in line, line
        return line


def hear_interrupts():
    """A test run in the background of a script ignores Ctrl-C, or under nohup the end of its
    terminal, and its children would too."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def run(*args, stdin=b"", **more):
    p = subprocess.run(RUN + [str(a) for a in args], input=stdin,
                       stdout=more.pop("stdout", subprocess.PIPE),
                       stderr=subprocess.PIPE, timeout=120, **more)
    return Done(p.returncode, p.stdout, p.stderr)


def start(*args, **more):
    more = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE,
            "preexec_fn": hear_interrupts, **more}
    return subprocess.Popen(RUN + [str(a) for a in args], **more)


def greedy(*args, **more):
    return run(MODEL, "-t", "0", "-q", *args, **more).text()


# --------------------------------------------------------------------------------------------------
# Checkpoints that are a little different, made from the one that ships.

def checksum(data):
    """based_checksum, from its description in based.h, as a second implementation would do it."""
    words = np.frombuffer(data + bytes(-len(data) % 64), "<u4").reshape(-1, 16)
    used = (len(data) + 3) // 4
    h = np.arange(1, 17, dtype=np.uint32)
    for i, row in enumerate(words):
        live = i * 16 + np.arange(16) < used
        h = np.where(live, h * np.uint32(0x9e3779b1) + row, h).astype(np.uint32)
    g = len(data)
    for lane in h.tolist():
        g = (g ^ lane) * 0x9e3779b97f4a7c15 & (2 ** 64 - 1)
        g ^= g >> 32
    return g


def seal(data):
    """Puts size and checksum into the header."""
    data = bytearray(data)
    data[16:24] = struct.pack("<Q", len(data))
    data[24:32] = struct.pack("<Q", checksum(bytes(data[32:])))
    return bytes(data)


def up64(n):
    return (n + 63) // 64 * 64


TABLE_END = 256 + 128 * 5


@pytest.fixture(scope="session")
def shipped():
    return Path(MODEL).read_bytes()


@pytest.fixture(scope="session")
def places(tmp_path_factory):
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="session")
def mute(shipped, places):
    """The same model without its tokenizer."""
    (tokenizer_bytes,) = struct.unpack_from("<I", shipped, 72)
    data = bytearray(shipped[:TABLE_END] + bytes(up64(TABLE_END) - TABLE_END)
                     + shipped[up64(up64(TABLE_END) + tokenizer_bytes):])
    data[72:76] = bytes(4)
    path = places / "mute.bin"
    path.write_bytes(seal(data))
    return str(path)


@pytest.fixture(scope="session")
def pieces(shipped):
    """The tokenizer's tokens, read as based.h says: all texts, and text -> (score, id) of those
    that take part in merges."""
    at = up64(TABLE_END)
    word = lambda i, n=1: np.frombuffer(shipped, "<u4", n, at + 4 * i).tolist()
    (words,), (size,), (merges,), (specials,) = word(0), word(3), word(7), word(8)
    special, start = word(268, specials), word(268 + specials, size + 1)
    merging = word(269 + specials + size, merges)
    score = np.frombuffer(shipped, "<f4", size, at + 4 * (269 + specials + size + merges)).tolist()
    text = [shipped[at + 4 * words + i:at + 4 * words + j] for i, j in zip(start, start[1:])]
    texts = [b"" if i in special else t for i, t in enumerate(text)]
    return texts, {text[i]: (score[i], i) for i in merging}


def encode(pieces, text):
    """Score merges in their plainest form: join the best pair until there is none. bos and one
    space come first."""
    _, merging = pieces
    parts = [c.encode() for c in " " + text]
    while True:
        pairs = [(-merging[a + b][0], i) for i, (a, b) in enumerate(zip(parts, parts[1:]))
                 if a + b in merging]
        if not pairs:
            return [1] + [merging[part][1] for part in parts]
        i = min(pairs)[1]
        parts[i:i + 2] = [parts[i] + parts[i + 1]]


GPT2_VOCAB, GPT2_END = 50257, 50256


@pytest.fixture(scope="session")
def gpt2_model(places):
    """The small golden model with GPT-2's vocabulary and random weights: two mixers more, a padded
    vocabulary, BPE."""
    config = json.loads((ROOT / "tests" / "data" / "hazyresearch-tiny" / "config.json").read_text())
    (places / "config.json").write_text(json.dumps({**config, "vocab_size": GPT2_VOCAB}))
    path = str(places / "gpt2.bin")
    subprocess.run([sys.executable, ROOT / "export.py", "--random", places / "config.json", path],
                   check=True, capture_output=True)
    return path


@pytest.fixture(scope="session")
def gpt2_encode():
    """The reference library's GPT-2 tokenizer."""
    pytest.importorskip("tokenizers")
    import test_tokenizer as other
    spec = other.tokens.gpt2_tokenizer(other.MERGES)
    theirs = other.reference(spec.tokens[:-1], sorted(spec.merges, key=spec.merges.get),
                             ["<|endoftext|>"])
    return lambda text: theirs.encode(text).ids


def rows_of(path, width=VOCAB):
    return np.fromfile(path, "<f4").reshape(-1, width)


def spread(items):
    return " ".join(map(str, items))


# --------------------------------------------------------------------------------------------------
# Usage.

BAD_USAGE = [
    (["-p", "Once upon"],
     ['-p takes a number from 0 to 1, got "Once upon"', "for a prompt use -i or --prompt"]),
    (["--top-p", "x"], ["--top-p takes", "--prompt"]),
    (["-t", "8.5x"], ['-t takes a number from 0 to 100, got "8.5x"', "for threads use -j"]),
    (["-t", "nan"], ['got "nan"']),
    (["-t", "inf"], ['got "inf"']),
    (["-t", "1e999"], ['got "1e999"']),
    (["-t", "0x1"], ['got "0x1"']),
    (["-t", ""], ['got ""']),
    (["-t", " 1"], ['got " 1"']),
    (["-t", "1,5"], ['got "1,5"']),
    (["-t", "1.5.2"], ['got "1.5.2"']),
    (["-t", "1e"], ['got "1e"']),
    (["-n", "5-"], ['got "5-"']),
    (["-n", "+"], ['got "+"']),
    (["-t", "-0.1"], ['got "-0.1"']),
    (["-t", "101"], ['got "101"']),
    (["-p", "5"], ['-p takes a number from 0 to 1, got "5"']),
    (["-p", "-0.5"], ['got "-0.5"']),
    (["-n", "abc"], ['-n takes', '"abc"']),
    (["-n", "-5"], ['-n takes', '"-5"']),
    (["-n", "1.5"], ['"1.5"']),
    (["-n", "99999999999999999999"], ['"99999999999999999999"']),
    (["-k", "-1"], ["-k takes", '"-1"']),
    (["-k", "1e3"], ['"1e3"']),
    (["-k", "4294967296"], ['"4294967296"']),
    (["--min-p", "1.1"], ["--min-p takes"]),
    (["--lookup", "128"], ["--lookup takes a whole number from 0 to 127"]),
    (["--repeat-penalty", "0"], ["--repeat-penalty takes"]),
    (["--repeat-last-n", "-1"], ["--repeat-last-n takes"]),
    (["-s", "-1"], ["-s takes"]),
    (["-s", "18446744073709551616"], ["-s takes"]),
    (["-s", "12a"], ["-s takes"]),
    (["-j", "-1"], ["-j takes"]),
    (["-r", ""], ["-r takes"]),
    (["-n"], ["-n needs a value"]),
    (["--prompt"], ["--prompt needs a value"]),
    (["--quiet=1"], ["--quiet is a switch"]),
    (["--tmep", "1"], ['"--tmep"', "did you mean --temp?"]),
    (["--temperature", "1"], ["did you mean --temp?"]),
    (["-temp", "1"], ["did you mean --temp?"]),
    (["-n5"], ["put a space before the value: -n 5"]),
    (["-W"], ['"-W"', "--help"]),
    (["--\x1b[31mred"], ["unknown option"]),
    (["-m", "model.bin"], ["-m takes generate or chat", "the model is the first argument"]),
    (["-z", "tok.bin"], ["the tokenizer is inside the checkpoint"]),
    (["-c", "512"], ["there is no -c: ", "no context to set"]),
    (["--ctx-size=512"], ["there is no --ctx-size: ", "no context to set"]),
    (["-ngl", "99"], ["there is no -ngl: the processor computes"]),
    (["--n-gpu-layers", "99"], ["the processor computes"]),
    (["--color"], ["nothing here needs it; leave it out"]),
    (["--mlock"], ["leave it out"]),
    (["-cnv"], ["a conversation is -m chat"]),
    (["other.bin"], ["two checkpoints", "other.bin", "put -i before it"]),
    (["-i", "a", "-f", "b"], ["--prompt does not go with --file"]),
    (["-i", "a", "--tokens", "1"], ["--prompt does not go with --tokens"]),
    (["-x", "a", "-i", "b"], ["--perplexity does not go with --prompt"]),
    (["-x", "a", "--dump-logits", "b"], ["--perplexity does not go with --dump-logits"]),
    (["--info", "-i", "a"], ["--info does not go with --prompt"]),
    (["-q", "-v"], ["--quiet does not go with --verbose; leave one of them out"]),
    (["--dump-logits", "-"], ["--dump-logits"]),
    (["--tokens", ""], ["--tokens is empty"]),
    (["--tokens", " , "], ["--tokens is empty"]),
    (["--tokens", "1 512"], ["ids from 0 to 511", '"512"']),
    (["--tokens", "1 -1"], ['"-1"']),
    (["--tokens", "1 2x"], ['"2x"']),
    (["--tokens", "4294967297"], ['"4294967297"']),
    (["--tokens", "1 " + "9" * 500], ["ids from 0 to 511"]),
    (["-p", "line one\nline two " + "\u65e5" * 100], ["-p takes"]),
    (["-b", "-i", "text"], ["--bench does not go with --prompt"]),
    (["--csv"], ["--csv goes with --bench; add that, or leave it out"]),
    (["--state", "x"], ["unknown option"]),
]


@pytest.mark.parametrize("args,needles", BAD_USAGE,
                         ids=[" ".join(a)[:30].encode("unicode_escape").decode()
                              for a, _ in BAD_USAGE])
def test_bad_usage(args, needles):
    done = run(MODEL, *args)
    done.error(2, *needles)
    assert done.out == b""


def test_a_long_value_is_cut_between_characters():
    line = run(MODEL, "-p", "x" + "\u65e5" * 100).error(2)
    assert '\u65e5..."' in line and len(line) < 300


def test_no_arguments():
    done = run()
    assert (done.status == 2 and done.out == b"" and done.err.count(b"\n") == 1
            and b"usage: run CHECKPOINT" in done.err)


def test_no_checkpoint():
    run("-n", "3").error(2, "no checkpoint", "usage")


GOOD_NUMBERS = [["-t", "1.5"], ["-t", "1e-3"], ["-t", ".5"], ["--temp=0.5"], ["-p", "1"],
                ["-p", "0"], ["-k", "0"], ["-k", "40"], ["-s", "0"], ["-s", "18446744073709551615"],
                ["--min-p", "0.05"], ["--repeat-penalty", "1.3"], ["--repeat-last-n", "0"],
                ["--repeat-last-n", "1000"], ["-j", "2"], ["-j", "0"], ["-t", "100"], ["--seed=7"],
                ["--lookup", "127"]]


@pytest.mark.parametrize("args", GOOD_NUMBERS, ids=spread)
def test_good_numbers(args):
    done = run(MODEL, "-n", "3", *args, env={**os.environ, "LC_ALL": "de_DE.UTF-8"})
    assert done.text() and re.fullmatch(rb"(note: -[tj] .*\n)?" + SPEED, done.err)


FLAGS = """-i --prompt -f --file --tokens -j --threads -n --predict -t --temp -p --top-p -k --top-k
--min-p
--repeat-penalty --repeat-last-n -s --seed -r --reverse-prompt --lookup --ignore-eos
--save --load --append
--branches --jsonl --parallel --unordered -m --mode -y --system-prompt --chat-template --specials
-x --perplexity -b --bench --csv
--info --check --no-checksum --dump-logits --vectors
--no-display-prompt -q --quiet -v --verbose -h --help --version""".split()
DEFAULTS = {"--temp": "1.0", "--top-p": "0.9", "--top-k": "0", "--min-p": "0",
            "--repeat-penalty": "1.0", "--repeat-last-n": "64", "--predict": "256",
            "--seed": "the time", "--threads": "0", "--lookup": "15"}


@pytest.mark.parametrize("args", [["--help"], ["-h"], [MODEL, "--help"], ["--help", "--nonsense"]],
                         ids=spread)
def test_help(args):
    done = run(*args)
    text = done.text().decode()
    assert done.err == b"" and max(map(len, text.splitlines())) <= 88
    assert sorted(re.findall(r"^  (?:    |(-\w), )(--[\w-]+) ", text, re.M)) == sorted(
        (FLAGS[FLAGS.index(name) - 1] if len(FLAGS[FLAGS.index(name) - 1]) == 2 else "", name)
        for name in FLAGS if name.startswith("--"))
    titles = ["Model and prompt:", "Generation and sampling:", "The past as a file:",
              "Many texts at once:", "Conversation:", "Measuring:", "Output:", "Examples:"]
    assert [text.index(t) for t in titles] == sorted(text.index(t) for t in titles)
    assert text.count("run models/") >= 3


def test_help_tells_the_defaults():
    text = re.sub(r"\s+", " ", run("--help").text().decode())
    for name, value in DEFAULTS.items():
        part = text[text.index(name + " "):]
        assert re.match(r".*?\(default:? " + re.escape(value) + r"[,)]", part), name


def test_version():
    version = re.search(r'BASED_VERSION "(.*)"', (ROOT / "based.h").read_text()).group(1)
    assert run("--version").text().decode() == f"based.c {version}\n"


def test_options_before_and_after_the_checkpoint():
    text = greedy("-n", "20")
    assert run("-t", "0", "-q", MODEL, "-n", "20").text() == text
    assert run("-t", "0", "-q", "-n", "20", MODEL).text() == text
    assert run("-t", "0", "-q", "-n", "20", "--", MODEL).text() == text
    run("--", MODEL, "-q").error(2, "two checkpoints")


def test_the_last_of_two_values_wins():
    done = run(MODEL, "-t", "1", "-t", "0", "-q", "-n", "99", "-n", "20")
    assert done.text() == greedy("-n", "20")


def test_names_of_llama_cpp_that_mean_something():
    assert greedy("--n-predict", "20") == greedy("--n-predict=20") == greedy("-n", "20")


def test_values_that_are_seldom_meant():
    done = run(MODEL, "-t", "4", "-j", str(os.cpu_count() + 1), "-n", "2")
    assert done.status == 0 and done.err.count(b"note: ") == 2
    assert b"note: -t 4 is a temperature" in done.err and b"processors there are" in done.err
    assert run(MODEL, "-t", "4", "-j", str(os.cpu_count() + 1), "-n", "2", "-q").err == b""


@pytest.mark.skipif(len(RUN) > 1, reason="started by another program")
def test_the_program_calls_itself_by_its_name(tmp_path):
    other = tmp_path / "based"
    other.symlink_to(Path(RUN[0]).resolve())
    text = subprocess.run([other, "--help"], capture_output=True, text=True, check=True).stdout
    assert text.startswith("usage: based CHECKPOINT") and "\n  based models/" in text
    assert not re.search(r"\brun (CHECKPOINT|models|--help)", text)
    for args in ([], ["--nonsense"], ["none.bin"]):
        done = subprocess.run([other, *args], capture_output=True, text=True)
        assert done.stderr.startswith("based: ") and "run --help" not in done.stderr


# --------------------------------------------------------------------------------------------------
# Standard input without a prompt.

def test_a_prompt_from_a_pipe_or_a_file(tmp_path):
    want = greedy("-n", "20", "-i", "The big dog")
    assert greedy("-n", "20", stdin=b"The big dog\n") == want
    path = tmp_path / "text"
    path.write_bytes(b"The big dog\n")
    with open(path, "rb") as file:
        done = subprocess.run([*RUN, MODEL, "-t", "0", "-q", "-n", "20"], stdin=file,
                              capture_output=True)
    assert done.stdout == want and done.stderr == b""
    p = start(MODEL, "-t", "0", "-q", "-n", "20", stdin=subprocess.PIPE)
    time.sleep(0.3)
    p.stdin.write(b"The big")
    p.stdin.flush()
    time.sleep(1.5)                     # once it has begun, all of it is waited for
    assert p.communicate(b" dog", timeout=30) == (want, b"")
    for more in (["-i", "Tim"], ["--tokens", "1"], ["-f", path]):
        assert greedy("-n", "9", *more, stdin=b"The big dog") == greedy("-n", "9", *more)


def test_an_empty_or_a_silent_pipe_begins_a_new_text():
    want = greedy("-n", "9")
    assert greedy("-n", "9", stdin=b"\n") == want
    p = start(MODEL, "-t", "0", "-n", "9", stdin=subprocess.PIPE)
    assert p.wait(30) == 0 and p.stdout.read() == want
    assert p.stderr.read().startswith(b"note: nothing came through the pipe")
    p.stdin.close(), p.stdout.close(), p.stderr.close()


# --------------------------------------------------------------------------------------------------
# Bad files.

LLAMA2C = struct.pack("<7i", 288, 768, 6, 6, 6, -32000, 256) + bytes(99)
OTHER_FILES = {
    "gguf": (b"GGUF\3\0\0\0", "is a GGUF file of llama.cpp, which cannot be read"),
    "safetensors": (struct.pack("<Q", 2) + b"{}", "is a safetensors file; python3 export.py "),
    "zip": (b"PK\3\4" + bytes(9), "is a PyTorch file; python3 export.py "),
    "pickle": (b"\x80\2}q", "is a PyTorch file; python3 export.py "),
    "legacy": (LLAMA2C, "OUT.bin --tokenizer tokenizer.bin makes a checkpoint of it"),
    "ak42": (b"24ka\1\0\0\0", "is a llama2.c file of a version that cannot be read"),
    "state": (b"BSTATE\r\n", "is a saved state; give a checkpoint"),
    "directory": (None, "is a directory; python3 export.py "),
    "numbers": (struct.pack("<7i", 288, 768, 6, 6, 0, 32000, 256), "not a based checkpoint"),
}


@pytest.mark.parametrize("kind", OTHER_FILES)
def test_other_files_are_named(kind, tmp_path):
    content, line = OTHER_FILES[kind]
    path = tmp_path / kind
    path.mkdir() if content is None else path.write_bytes(content.ljust(400, b"\0"))
    run(path, "-n", "1").error(1, str(path), line)

def flipped(data, at):
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1:]


BAD_CHECKPOINTS = {
    "empty": lambda d: b"", "one byte": lambda d: d[:1], "header only": lambda d: d[:256],
    "half": lambda d: d[:len(d) // 2],
    "one byte less": lambda d: d[:-1], "one byte more": lambda d: d + b"\0",
    "text": lambda d: b"Once upon a time\n" * 99,
    "first bit": lambda d: flipped(d, 0), "version": lambda d: flipped(d, 8),
    "a weight": lambda d: flipped(d, 500000),
    "a dimension": lambda d: flipped(d, 36), "last byte": lambda d: flipped(d, len(d) - 1),
}


@pytest.mark.parametrize("kind", BAD_CHECKPOINTS)
@pytest.mark.parametrize("job", [[], ["--info"], ["-x", __file__]],
                         ids=["generate", "info", "perplexity"])
def test_bad_checkpoint(kind, job, shipped, tmp_path):
    path = tmp_path / "bad.bin"
    path.write_bytes(BAD_CHECKPOINTS[kind](shipped))
    done = run(path, *job)
    done.error(1, "bad.bin")
    assert done.out == b""


def test_missing_checkpoint(tmp_path):
    run(tmp_path / "none.bin").error(1, "none.bin", "No such file")


def test_directory_as_checkpoint(tmp_path):
    run(tmp_path).error(1, str(tmp_path), "directory")


def test_hostile_file_name(tmp_path):
    path = tmp_path / "a\nb\x1b[31m.bin"
    path.write_bytes(b"x")
    run(path).error(1, "a?b?[31m.bin")


@pytest.mark.parametrize("flag", ["-f", "-x"])
def test_bad_text_file(flag, tmp_path):
    run(MODEL, flag, tmp_path / "none.txt").error(1, "none.txt", "No such file")
    run(MODEL, flag, tmp_path).error(1, str(tmp_path), "Is a directory")


def test_a_model_that_reads_vectors(shipped, tmp_path):
    """Not a language model: nothing to print, but --info can say what it is."""
    (tokenizer_bytes,) = struct.unpack_from("<I", shipped, 72)
    embedding = up64(up64(TABLE_END) + tokenizer_bytes)
    data = bytearray(shipped[:up64(TABLE_END)] + shipped[embedding + VOCAB * 64 * 4:])
    for at, value in {32: 0, 44: 0, 48: 0, 52: 64, 72: 0}.items():
        data[at:at + 4] = struct.pack("<I", value)
    path = tmp_path / "vectors.bin"
    path.write_bytes(seal(data))
    run(path).error(1, "vectors.bin", "not a language model")
    run(path, "-x", __file__).error(1, "not a language model")
    assert b"5 layers" in run(path, "--info").text()


# --------------------------------------------------------------------------------------------------
# Text.

def test_greedy_text_is_that_of_llama2c():
    assert GREEDY.startswith(b"Once upon a time, there was a little girl named Lily. She loved to "
                             b"play outside in the park. One day, she saw a big, red ball.")
    assert greedy("-n", "500") == GREEDY
    assert greedy("-n", "300", "-i", "The big dog") == BIG_DOG
    assert GREEDY.startswith(greedy("-n", "200")[:-1])


def test_default_output():
    done = run(MODEL, "-s", "1")
    assert done.text().endswith(b"\n") and re.fullmatch(SPEED, done.err)


def test_utf8_prompt_is_shown():
    text = greedy("-i", "\u65e5\u672c \U0001f999 na\u00efve", "-n", "20").decode()
    assert text.startswith("\u65e5\u672c \U0001f999 na\u00efve")


def test_invalid_utf8_becomes_replacement_characters():
    prompt = b"a\xffb\xe6\x97".decode("utf-8", "surrogateescape")
    assert greedy("-i", prompt, "-n", "0") == "a\ufffdb\ufffd\n".encode()


def test_a_character_may_begin_in_the_prompt_and_not_end():
    """Bytes that are held at the end of the prompt come out when the reply shows that they are no
    character."""
    prompt = b"ab\xe6\x97".decode("utf-8", "surrogateescape")
    assert greedy("-i", prompt, "-n", "1").startswith("ab\ufffd".encode())


def test_prompts_from_everywhere_are_the_same(tmp_path):
    prompt, path = b"The big dog", tmp_path / "prompt.txt"
    for content in prompt, prompt + b"\n", prompt + b"\r\n":
        path.write_bytes(content)
        assert greedy("-f", path, "-n", "300") == BIG_DOG
        assert greedy("-f", "-", "-n", "300", stdin=content) == BIG_DOG
        assert greedy("-i", "-", "-n", "300", stdin=content) == BIG_DOG
    path.write_bytes(prompt + b"\n\n")
    assert greedy("-f", path, "-n", "0") == b"The big dog\n\n"


def test_a_prompt_may_be_long_and_contain_zeros():
    prompt = b"a\0b " * 3000
    assert greedy("-f", "-", "-n", "0", stdin=prompt) == prompt + b"\n"


@pytest.mark.parametrize("args", [["-i", ""], ["-f", "-"], ["-f", os.devnull], []], ids=spread)
def test_an_empty_prompt_is_none(args):
    assert greedy("-n", "500", *args) == GREEDY


def test_no_display_prompt():
    rest = greedy("-n", "300", "-i", "The big dog", "--no-display-prompt")
    assert b"The big dog" + rest == BIG_DOG
    assert greedy("-n", "0", "-i", "The big dog", "--no-display-prompt") == b""


def test_predict_0_only_reads():
    done = run(MODEL, "-i", "The big dog", "-n", "0")
    assert done.text() == b"The big dog\n" and re.fullmatch(SPEED, done.err)
    assert float(done.err.split()[-1]) > 0                      # of reading


def test_special_tokens_in_a_prompt_are_tokens(tmp_path):
    a, b = tmp_path / "a", tmp_path / "b"
    greedy("-i", "cat", "-n", "0", "--dump-logits", a)
    greedy("-i", "cat</s>", "-n", "0", "--dump-logits", b)
    assert len(rows_of(b)) == len(rows_of(a)) + 1
    assert greedy("-i", "cat</s>", "-n", "0") == b"cat\n"


def test_gpt2_begins_with_its_end_token(gpt2_model, gpt2_encode, tmp_path):
    """Only without a prompt: before a prompt the released models expect nothing."""
    a, b = tmp_path / "a", tmp_path / "b"
    assert run(gpt2_model, "-n", "0", "-q", "--dump-logits", a).text() == b""
    run(gpt2_model, "--tokens", GPT2_END, "-n", "0", "-q", "--dump-logits", b).text()
    assert a.read_bytes() == b.read_bytes() and rows_of(a, GPT2_VOCAB).shape[0] == 1
    prompt = "\u65e5\u672c \U0001f999 na\u00efve, said the llama."
    done = run(gpt2_model, "-i", prompt, "-n", "0", "-q", "--dump-logits", a)
    assert done.text().decode() == prompt + "\n"
    ids = spread(gpt2_encode(prompt))
    run(gpt2_model, "--tokens", ids, "-n", "0", "-q", "--dump-logits", b).text()
    assert a.read_bytes() == b.read_bytes()


def test_seeds():
    first, again, other = (run(MODEL, "-s", s, "-n", "100", "-q").text() for s in (5, 5, 6))
    assert first == again != other
    assert len({run(MODEL, "-n", "100", "-q").text() for _ in range(3)}) > 1


def test_the_seed_that_is_shown_gives_the_text_again():
    done = run(MODEL, "-n", "100", "-v")
    seed = re.search(rb"^seed: +(\d+)$", done.err, re.M).group(1).decode()
    assert run(MODEL, "-n", "100", "-q", "-s", seed).text() == done.text()


def test_sampling_options_do_something():
    base = run(MODEL, "-s", "3", "-n", "150", "-q").text()
    assert run(MODEL, "-s", "3", "-n", "150", "-q", "-k", "1").text() == greedy("-n", "150")
    assert run(MODEL, "-s", "3", "-n", "150", "-q", "-p", "0").text() == greedy("-n", "150")
    assert run(MODEL, "-s", "3", "-n", "150", "-q", "--min-p", "1").text() == greedy("-n", "150")
    assert greedy("-n", "150", "--repeat-penalty", "1.5") != greedy("-n", "150")
    unpenalized = greedy("-n", "150", "--repeat-penalty", "1.5", "--repeat-last-n", "0")
    assert unpenalized == greedy("-n", "150")
    assert run(MODEL, "-s", "3", "-n", "150", "-q", "-t", "0.2").text() != base
    assert run(MODEL, "-s", "3", "-n", "150", "-q", "-j", "2").text() == base


def test_the_penalty_knows_the_prompt():
    prompt = ["-i", "A long time. Once upon a", "-n", "1"]
    assert greedy(*prompt) == b"A long time. Once upon a time\n"
    assert greedy(*prompt, "--repeat-penalty", "50") != greedy(*prompt)


def test_the_end_of_a_text():
    assert greedy("-n", "-1") == GREEDY
    longer = greedy("-n", "700", "--ignore-eos")
    assert (longer.startswith(GREEDY[:-1]) and len(longer) > len(GREEDY) + 100
            and b"<s>" not in longer)


# --------------------------------------------------------------------------------------------------
# Stop texts.

def expected_stop(text, stops):
    """The text before the first stop, with the newline that ends every output."""
    at = [i for s in stops if (i := text[:-1].find(s)) >= 0]
    return text[:min(at)] + b"\n" if at else text


@pytest.mark.parametrize("begin,length",
                         [(4, 1), (5, 3), (30, 10), (77, 25), (120, 2), (171, 12), (200, 40),
                          (0, 4), (760, 15)])
def test_stop_text_anywhere(begin, length):
    stop = GREEDY[begin:begin + length]
    assert stop
    text = greedy("-n", "500", "-r", stop.decode())
    assert text == expected_stop(GREEDY, [stop]).lstrip(b"\n")


def test_several_stop_texts():
    for stops in [[b"ball", b"park"], [b"She", b"girl named Lily. S"], [b"zzz", b"red"],
                  [b"bigger", b"big, red bananas"]]:
        flags = [x for s in stops for x in ("-r", s.decode())]
        assert greedy("-n", "500", *flags) == expected_stop(GREEDY, stops)


def test_a_stop_text_that_only_begins_is_printed():
    for length in range(1, 8):
        assert greedy("-n", "500", "-r", GREEDY[-1 - length:-1].decode() + "zzz") == GREEDY


def test_the_prompt_is_not_searched_for_stop_texts():
    assert greedy("-n", "300", "-i", "The big dog", "-r", "dog") == BIG_DOG


# --------------------------------------------------------------------------------------------------
# Tokens and logits.

def test_tokens_are_fed_as_they_are(pieces):
    ids = encode(pieces, "The big dog")
    assert greedy("--tokens", spread(ids), "-n", "300") == BIG_DOG
    assert greedy("--tokens", ",\n".join(map(str, ids)) + " ", "-n", "300") == BIG_DOG
    assert greedy("--tokens", "1", "-n", "500") == GREEDY


def test_without_a_tokenizer(mute, pieces):
    ids = encode(pieces, "The big dog")
    out = run(mute, "--tokens", spread(ids), "-n", "40", "-t", "0", "-q").text().decode()
    numbers = [int(x) for x in out.split(" ")]
    assert numbers[:len(ids)] == ids and len(numbers) == len(ids) + 40 and out.endswith("\n")
    text = b"".join(pieces[0][i] for i in numbers)
    assert BIG_DOG.startswith(text.lstrip())
    alone = run(mute, "--tokens", spread(ids), "-n", "40", "-t", "0", "-q", "--no-display-prompt")
    assert [int(x) for x in alone.text().decode().split(" ")] == numbers[len(ids):]
    for args in [], ["-i", "a"], ["-x", __file__]:
        run(mute, *args).error(1, "mute.bin has no tokenizer", "--tokens")
    assert re.search(rb"^tokenizer +none$", run(mute, "--info").text(), re.M)


@pytest.mark.parametrize("n,rows", [(0, 4), (1, 4), (2, 5), (7, 10)])
def test_dump_has_a_row_for_every_token_fed(n, rows, tmp_path):
    path = tmp_path / "logits"
    greedy("--tokens", "1 403 407 10", "-n", n, "--dump-logits", path)
    assert path.stat().st_size == rows * VOCAB * 4
    assert [p.name for p in tmp_path.iterdir()] == ["logits"]


def test_dump_agrees_with_the_text(mute, tmp_path):
    path = tmp_path / "logits"
    done = run(mute, "--tokens", "1", "-n", "150", "-t", "0", "-q", "--dump-logits", path)
    ids = [int(x) for x in done.text().split()]
    assert rows_of(path).argmax(1).tolist() == ids[1:]


def test_fed_at_once_or_one_by_one_gives_the_same_bits(mute, tmp_path):
    one, all_at_once = tmp_path / "one", tmp_path / "all"
    done = run(mute, "--tokens", "1", "-n", "200", "-s", "3", "-q", "--dump-logits", one)
    ids = done.text().decode()
    run(mute, "--tokens", ids, "-n", "0", "-q", "--dump-logits", all_at_once).text()
    assert one.read_bytes() == all_at_once.read_bytes()[:-VOCAB * 4]


def test_dump_replaces_a_file_only_when_it_is_complete(tmp_path):
    path = tmp_path / "logits"
    path.write_bytes(b"old")
    with open("/dev/full", "wb") as full:
        run(MODEL, "-n", "5", "--dump-logits", path, stdout=full).error(1, "standard output")
    assert path.read_bytes() == b"old" and [p.name for p in tmp_path.iterdir()] == ["logits"]
    greedy("-n", "5", "--dump-logits", path)
    assert rows_of(path).shape == (5, VOCAB)


def test_dump_goes_through_a_link(tmp_path):
    path, link = tmp_path / "logits", tmp_path / "link"
    link.symlink_to(path)
    greedy("-n", "5", "--dump-logits", link)
    assert link.is_symlink() and rows_of(path).shape == (5, VOCAB)


def test_dump_that_cannot_be_written(tmp_path):
    before = os.stat("/dev/full")
    assert run(MODEL, "-n", "0", "--dump-logits", "/dev/full").status == 1
    done = run(MODEL, "-n", "0", "--no-display-prompt", "--dump-logits", "/dev/full")
    done.error(1, "/dev/full", "No space left")
    assert (stat.S_ISCHR(os.stat("/dev/full").st_mode)
            and os.stat("/dev/full").st_ino == before.st_ino)
    run(MODEL, "--dump-logits", tmp_path / "none" / "x").error(1, "none/x", "No such file")
    run(MODEL, "--dump-logits", tmp_path).error(1, str(tmp_path))


def based_hash(rows):
    """based_hash over every float of every row."""
    h = 0
    for bits in rows.astype("<f4").view("<u4").ravel().tolist():
        h = (h ^ bits) * 0x9e3779b1 & 0xffffffff
        h ^= h >> 15
    return b"logits #%08x" % h


def logits_line(done):
    done.text()
    return done.err.splitlines()[-2]


def test_fingerprint_of_the_logits_used(tmp_path):
    path, ids = tmp_path / "logits", "1 403 407 10"
    dumped = run(MODEL, "--tokens", ids, "-n", "6", "-t", "0", "-v", "--dump-logits", path)
    rows = rows_of(path)
    assert logits_line(dumped) == based_hash(rows)
    line = lambda *args: logits_line(run(MODEL, "--tokens", ids, "-t", "0", "-v", *args))
    assert line("-n", "6") == based_hash(rows[3:])
    assert line("-n", "6", "-j", "2") == based_hash(rows[3:])
    assert line("-n", "0") == based_hash(rows[3:4])


# --------------------------------------------------------------------------------------------------
# Perplexity.

ESTIMATE = rb"Final estimate: PPL = (\S+) \+/- (\S+), (\S+) bits per byte\n"


def estimate(done):
    match = re.fullmatch(ESTIMATE, done.text())
    assert match, done.out
    return [float(x) for x in match.groups()]


def check_perplexity(model, width, ids, text, tmp_path):
    """Compares -x with the formula in float64 over the logits that the same tokens give. ids: the
    start token first."""
    (tmp_path / "text").write_bytes(text.encode())
    # each document begins from nothing
    starts = [i for i, token in enumerate(ids) if token == ids[0]]
    rows = []
    for first, end in zip(starts, [*starts[1:], len(ids)]):
        run(model, "--tokens", spread(ids[first:end]), "-n", "0", "-q", "--dump-logits",
            tmp_path / "logits").text()
        rows.append(rows_of(tmp_path / "logits", width).astype(np.float64))
    rows, names = np.concatenate(rows), text.count("<|endoftext|>") * len("<|endoftext|>")
    top = rows.max(1, keepdims=True)
    log_p = rows - top - np.log(np.exp(rows - top).sum(1, keepdims=True))
    nats = -log_p[np.arange(len(ids) - 1), ids[1:]]
    mean = math.exp(nats.mean())
    done = run(model, "-x", tmp_path / "text")
    ppl, error, bits = estimate(done)
    assert ppl == pytest.approx(mean, rel=2e-6, abs=1e-4)
    assert error == pytest.approx(mean * nats.std() / math.sqrt(len(nats) - 1), rel=2e-6, abs=1e-5)
    assert bits == pytest.approx(nats.sum() / math.log(2) / (len(text.encode()) - names), abs=1e-4)
    assert done.err.startswith(b"%d tokens predicted" % (len(ids) - 1))


def test_perplexity_from_the_formula(pieces, tmp_path):
    text = GREEDY.decode().replace("\n", " ")[:600]
    check_perplexity(MODEL, VOCAB, encode(pieces, text), text, tmp_path)


@pytest.mark.parametrize("text",
                         ["Once upon a time\n\nthere was  a llama.\n" * 5,
                          "\u65e5\u672c \U0001f999 na\u00efve",
                          "One story.\n<|endoftext|>\nAnother one."],
                         ids=["text", "utf8", "two stories"])
def test_perplexity_with_gpt2(text, gpt2_model, gpt2_encode, tmp_path):
    """<|endoftext|> goes before the text, and in the text it is that token."""
    check_perplexity(gpt2_model, GPT2_VOCAB, [GPT2_END] + gpt2_encode(text), text, tmp_path)


def test_perplexity_lines(tmp_path):
    path = tmp_path / "text"
    path.write_bytes(GREEDY)
    done = run(MODEL, "-x", path)
    values = estimate(done)
    assert re.fullmatch(rb"[\d,]+ tokens predicted, 776 bytes\n" + SPEED, done.err)
    assert 1 < values[0] < 5                                    # the model's own words
    quiet = run(MODEL, "-x", "-", "-q", stdin=GREEDY)
    assert estimate(quiet) == values and quiet.err == b""
    verbose = run(MODEL, "-x", path, "-v")
    assert estimate(verbose) == values
    assert re.search(rb"\nlogits #[0-9a-f]{8}\n" + SPEED + rb"\Z", verbose.err)


@pytest.mark.parametrize("text", [b"", b"\n"])
def test_perplexity_of_next_to_nothing(text, tmp_path):
    path = tmp_path / "short.txt"
    path.write_bytes(text)
    done = run(MODEL, "-x", path)
    if done.status == 0:
        estimate(done)
    else:
        done.error(1, "short.txt", "too short")


def peak_memory(*args, **more):
    p = start(*args, **more)
    p.stdout.read()
    p.stderr.read()
    _, status, usage = os.wait4(p.pid, 0)
    p.returncode = status
    assert status == 0
    return usage.ru_maxrss * 1024


def test_memory_does_not_grow_with_the_text(tmp_path):
    """Only the text itself and its tokens may."""
    small, large = tmp_path / "small", tmp_path / "large"
    small.write_bytes(GREEDY)
    large.write_bytes(GREEDY * 60)
    growth = peak_memory(MODEL, "-x", large) - peak_memory(MODEL, "-x", small)
    assert growth < 3e6, growth
    tokens = lambda n: peak_memory(MODEL, "-n", n, "--ignore-eos")
    growth = tokens("6000") - tokens("100")
    assert growth < 3e5, growth


# --------------------------------------------------------------------------------------------------
# What is said about it.

def test_info():
    done = run(MODEL, "--info")
    text = done.text().decode()
    assert done.err == b"" and max(map(len, text.splitlines())) <= 120
    data = Path(MODEL).read_bytes()
    for needle in ["stories260K", "260,032", "64 wide, 5 layers", "512 tokens", "wwwww",
                   "8 heads (4 key/value) of 8", "SwiGLU 172", "score merges",
                   "checksum %016x" % checksum(data[32:]), f"{len(data):,} bytes", "state"]:
        assert needle in text, needle
    line = r"^(?:  )?(?:file|header|tokenizer|weights) +([\d,]+) bytes"
    sizes = [int(x.replace(",", "")) for x in re.findall(line, text, re.M)]
    assert len(sizes) == 4 and sizes[0] == sum(sizes[1:]) == len(data)


def test_info_of_three_mixers(gpt2_model):
    text = run(gpt2_model, "--info").text().decode()
    for needle in ["ctwc", "(f32)", "50,257 tokens, 50264 rows", "byte-level BPE", "degree 2",
                   "width 3", "end 50256"]:
        assert needle in text, needle


def test_info_of_8_bit_weights(tmp_path):
    path = tmp_path / "q8.bin"
    config = ROOT / "tests" / "data" / "hazyresearch-tiny" / "config.json"
    subprocess.run([sys.executable, ROOT / "export.py", "--random", config, path, "--dtype", "q8"],
                   check=True, capture_output=True)
    assert re.search(rb"^parameters +121,568 \(q8\)$", run(path, "--info").text(), re.M)


def test_info_of_a_hostile_name(shipped, tmp_path):
    data = bytearray(shipped)
    data[80:144] = (b"\x1b[2Jred\n" + b"x" * 64)[:63] + b"\0"
    path = tmp_path / "name.bin"
    path.write_bytes(seal(data))
    done = run(path, "--info")
    assert b"\x1b" not in done.out and (done.status == 1 or b"?[2Jred?" in done.out)


def test_verbose():
    done = run(MODEL, "-v", "-n", "20", "-s", "9", "-i", "The big dog")
    speeds = rb"\( *[\d.]+ ms per token, +[\d.]+ tokens per second\)\n"
    assert done.text().count(b"\n") == 1
    assert re.fullmatch(
        rb"model:  .*stories260K.*, 260,032 parameters\n"
        rb"state:  [\d,]+ bytes, however long the text\n"
        rb"prompt: \d+ tokens\n"
        rb"seed:   9\nsample: -t 1 .* by default\n"
        rb"prompt eval time = +[\d.]+ ms / +\d+ tokens +" + speeds +
        rb" +eval time = +[\d.]+ ms / +19 runs +" + speeds +
        rb"logits #[0-9a-f]{8}\n" + SPEED, done.err), done.err


def test_quiet():
    assert run(MODEL, "-q", "-n", "20").err == b""
    assert run(MODEL, "-q", "-x", GOLDEN / "stories260K-greedy.txt").err == b""


def test_the_speed_that_is_told_is_near_the_truth():
    begun = time.monotonic()
    done = run(MODEL, "-n", "3000", "--ignore-eos")
    spent = time.monotonic() - begun
    told = float(re.fullmatch(rb"achieved tok/s: (.*)\n", done.err).group(1))
    assert 0.8 * 3000 / spent < told < 20 * 3000 / spent


# --------------------------------------------------------------------------------------------------
# Pipes, full disks, signals.

@pytest.mark.parametrize("args",
                         [[MODEL], [MODEL, "-n", "0", "-i", "a"], [MODEL, "--info"], ["--help"],
                          ["--version"],
                                  [MODEL, "-x", str(GOLDEN / "stories260K-greedy.txt"), "-q"]],
                         ids=["generate", "prompt", "info", "help", "version", "perplexity"])
def test_full_disk(args):
    with open("/dev/full", "wb") as full:
        run(*args, stdout=full).error(1, "standard output", "No space left")


def test_closed_stdout():
    p = subprocess.run(["sh", "-c", '"$@" >&-', "sh", *RUN, MODEL, "-n", "5"],
                       stderr=subprocess.PIPE, timeout=60)
    Done(p.returncode, b"", p.stderr).error(1, "standard output")


def test_a_reader_that_goes_away(tmp_path):
    """| head: no message, status 1, and no half-written dump."""
    p = start(MODEL, *FOREVER, "--dump-logits", tmp_path / "logits")
    assert p.stdout.read(40)
    p.stdout.close()
    assert p.stderr.read() == b"" and p.wait(30) == 1
    assert list(tmp_path.iterdir()) == []


def test_text_flows_through_a_pipe():
    """Every token is written when it is there: a pipe that keeps each write apart receives many."""
    reader, writer = os.pipe2(os.O_DIRECT)
    p = start(MODEL, "-t", "0", "-n", "100", stdout=writer)
    os.close(writer)
    parts = []
    while part := os.read(reader, 65536):
        parts.append(part)
    os.close(reader)
    assert p.wait(30) == 0 and GREEDY.startswith(b"".join(parts)[:-1])
    assert len(parts) > 90
    p.stderr.close()


def test_nobody_waits_for_input():
    """stdin is open and silent; without -i - or -f - it must not matter."""
    p = start(MODEL, "-n", "5", stdin=subprocess.PIPE)
    assert p.wait(30) == 0


def test_interrupt_ends_the_reply():
    p = start(MODEL, *FOREVER, "-v")
    assert p.stdout.read(100)
    p.send_signal(signal.SIGINT)
    out, err = p.communicate(timeout=30)
    assert p.returncode == 130 and out.endswith(b"\n")
    assert re.search(rb"\nlogits #[0-9a-f]{8}\n" + SPEED + rb"\Z", err)


def test_interrupt_keeps_the_dump(tmp_path):
    path = tmp_path / "logits"
    p = start(MODEL, *FOREVER, "--dump-logits", path)
    assert p.stdout.read(100)
    p.send_signal(signal.SIGINT)
    p.communicate(timeout=30)
    assert p.returncode == 130 and len(rows_of(path)) > 10


def test_second_interrupt_ends_at_once():
    """Nobody reads the text, so the program hangs in a write that the first Ctrl-C cannot end."""
    reader, writer = os.pipe()
    fcntl.fcntl(writer, F_SETPIPE_SZ, 4096)                     # one page, full at once
    p = start(MODEL, *FOREVER, stdout=writer)
    waiting, before = 0, -1
    while waiting < 4000 or waiting != before:                  # until it is full
        time.sleep(0.5)
        before = waiting
        waiting = int.from_bytes(fcntl.ioctl(reader, termios.FIONREAD, bytes(4)), sys.byteorder)
    p.send_signal(signal.SIGINT)
    time.sleep(0.3)
    assert p.poll() is None
    p.send_signal(signal.SIGINT)
    assert p.wait(10) == -signal.SIGINT
    os.close(reader), os.close(writer), p.stderr.close()


def test_an_ignored_interrupt_stays_ignored():
    """As under nohup, or in the background of a script."""
    p = start(MODEL, *FOREVER, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN))
    fcntl.fcntl(p.stdout, F_SETPIPE_SZ, 4096)                   # so that little can be under way
    assert p.stdout.read(100)
    p.send_signal(signal.SIGINT)
    assert len(p.stdout.read(20000)) == 20000 and p.poll() is None
    p.kill()
    p.communicate()


@pytest.fixture(scope="session")
def long_text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "long.txt"
    path.write_bytes(GREEDY * 1000)
    return str(path)


def test_interrupted_perplexity_is_no_final_estimate(long_text):
    p = start(MODEL, "-x", long_text)
    time.sleep(2)
    p.send_signal(signal.SIGINT)
    out, err = p.communicate(timeout=30)
    assert p.returncode == 130 and out == b""
    line = rb"interrupted after [\d,]+ tokens: PPL = [\d.]+ so far\n"
    assert re.fullmatch(line + SPEED, err), err


def test_interrupted_prompt(long_text):
    p = start(MODEL, "-f", long_text)
    time.sleep(2)
    p.send_signal(signal.SIGINT)
    out, err = p.communicate(timeout=30)
    assert p.returncode == 130 and out == b"" and re.fullmatch(SPEED, err)


# --------------------------------------------------------------------------------------------------
# A terminal.

class Terminal:
    """A program whose three streams, or those asked for, are a terminal."""

    def __init__(self, *args, before=lambda: None, **streams):
        self.master, slave = pty.openpty()
        use = lambda name: slave if streams.get(name, True) else subprocess.DEVNULL
        self.p = subprocess.Popen(RUN + [str(a) for a in args], stdin=use("stdin"),
                                  stdout=use("stdout"), stderr=use("stderr"), close_fds=True,
                                  start_new_session=True,
                                  preexec_fn=lambda: (self.own_the_terminal(), before()))
        os.close(slave)

    @staticmethod
    def own_the_terminal():
        hear_interrupts()
        for fd in 0, 1, 2:
            if os.isatty(fd):
                fcntl.ioctl(fd, termios.TIOCSCTTY, 0)
                return

    def read(self, until=None, limit=60):
        seen, end = b"", time.monotonic() + limit
        while time.monotonic() < end and not (until and until in seen):
            if select.select([self.master], [], [], 0.1)[0]:
                try:
                    part = os.read(self.master, 65536)
                except OSError:                                 # the other side is closed
                    break
                if not part:
                    break
                seen += part
        return seen

    def type(self, keys):
        os.write(self.master, keys)

    def finish(self):
        seen = self.read()
        status = self.p.wait(30)
        os.close(self.master)
        return status, seen


def screen(data):
    """What a terminal would show: \\r goes back to the first column and later text covers earlier
    text."""
    lines = []
    for line in data.decode().replace("\r\n", "\n").split("\n"):
        cells = []
        for part in line.split("\r"):
            cells[:len(part)] = part
        lines.append("".join(cells).rstrip())
    return lines


def test_progress_on_a_terminal_comes_and_goes(long_text):
    t = Terminal(MODEL, "-x", long_text, stdout=False)
    seen = t.read(until=b"PPL")
    line = rb"\rmeasuring: [\d,]+ of [\d,]+ tokens, \d+ tok/s, \d+ s left, PPL"
    assert re.search(line, seen), seen
    t.type(b"\x03")
    status, rest = t.finish()
    lines = [l for l in screen(seen + rest) if l]
    assert status == 130 and len(lines) == 2, lines
    assert lines[0].endswith("so far") and lines[1].startswith("achieved tok/s: ")


def test_progress_of_a_prompt(long_text, tmp_path):
    path = tmp_path / "prompt"
    path.write_bytes((GREEDY * 40)[:-500])
    t = Terminal(MODEL, "-f", path, "-n", "3", "--no-display-prompt")
    status, seen = t.finish()
    assert status == 0 and b"reading the prompt: " in seen
    lines = [l for l in screen(seen) if l]
    assert len(lines) == 2 and lines[1].startswith("achieved"), lines


def test_an_error_stands_on_a_line_of_its_own(long_text, tmp_path):
    """The dump grows until the limit for files, while the progress line is on the screen."""
    def limit():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2 ** 25, 2 ** 25))
    t = Terminal(MODEL, "-f", long_text, "--dump-logits", tmp_path / "logits", before=limit)
    status, seen = t.finish()
    lines = [l for l in screen(seen) if l]
    assert status == 1 and b"reading the prompt: " in seen
    error = "run: cannot write the logits to .*: File too large"
    assert len(lines) == 1 and re.fullmatch(error, lines[0]), lines
    assert list(tmp_path.iterdir()) == []


def test_no_progress_when_quiet_or_not_a_terminal(tmp_path):
    path = tmp_path / "text"
    path.write_bytes(GREEDY * 40)
    status, seen = Terminal(MODEL, "-x", path, "-q", stdout=False).finish()
    assert status == 0 and seen == b""
    done = run(MODEL, "-x", path)
    assert b"\r" not in done.err and estimate(done)


def test_interrupt_from_the_keyboard():
    t = Terminal(MODEL, *FOREVER)
    seen = t.read(until=b"upon") + t.read(limit=0.5)
    t.type(b"\x03")
    status, rest = t.finish()
    assert status == 130
    assert re.search(rb"\r\nachieved tok/s: \d+\.\d+\r\n\Z", seen + rest)


def test_texts_do_not_run_in_circles():
    """tests/loops.py, in short: with the settings that the checkpoint recommends."""
    import loops
    line = "It was a dark and stormy night in the old forest, they said.\n"
    assert loops.loop("Ho.\nHo.\nHo.\n") == "Ho." == loops.loop("A\nB. Ho. Ho. Ho. C.")
    assert loops.loop("Ho.\nHo.\nAh.\nHo.\n") is None
    assert loops.loop(line + "a\n" + line + "b\n" + line) == line.strip()
    assert loops.loop("Now. " + (line[:-1] + " Then. ") * 3) == line.strip()
    assert loops.loop(line + "a\n" + line) is None
    model = str(ROOT / "models" / "based-4m-story.bin")
    texts = loops.texts(model, "The old bear sat down", 4, 300)
    assert len(set(texts)) == 4 and not any(map(loops.loop, texts))
    assert run(model, "-q", "-s", "2", "-n", "300", "-i", "The old bear sat down",
               "--no-display-prompt").text().decode().rstrip() == texts[1].rstrip()


def test_a_short_run_on_a_terminal_is_plain():
    status, seen = Terminal(MODEL, "-t", "0", "-n", "10").finish()
    lines = screen(seen)
    assert status == 0 and lines[0] == GREEDY[:len(lines[0])].decode() and len(lines[0]) > 20
    assert re.fullmatch(r"achieved tok/s: \d+\.\d+", lines[1]) and lines[2:] == [""]


if __name__ == "__main__":
    sys.exit(pytest.main([__file__, "-q"]))


# ---- --bench


def test_bench(random_model):
    """Every test has its row, and what does not depend on time is right."""
    model = random_model(7, mixers=[1, 3], dim=16, input=0, rows=40, vocab=40, flags=1, dtype=1)
    rows = list(csv.DictReader(run(model, "-b", "--csv", "-j", "1").text().decode().splitlines()))
    assert [row["test"] for row in rows] == [
        "pp128", "pp512", "pp2048", "tg16 x 1", "tg16 x 4", "tg16 x 16", "tg16 x 64",
        "tg128 @ 0", "tg128 @ 1024", "tg128 @ 16384", "tg128 @ 262144"]
    info = run(model, "--info").text().decode().replace(",", "")
    for row in rows:
        assert f" {row['weight bytes']} bytes of weights are read" in info
        assert f" {row['state bytes']} bytes of one session" in info
        assert (int(row["peak memory"]) > int(row["state bytes"]) and float(row["read GB/s"]) > 0
                and row["threads"] == "1")
        assert float(row["tokens/s"]) > 0 and float(row["spread"]) >= 0
        share = 100 * float(row["GB/s"]) / float(row["read GB/s"])
        assert abs(float(row["% of read speed"]) - share) <= 0.1 + 0.01 * share
    assert run(model, "-b", "-j", "1").text().count(b"\n|") == 2 + len(rows)
