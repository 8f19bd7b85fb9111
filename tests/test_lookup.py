"""--lookup: guesses from the text so far change nothing but the time. What the library promises of
guesses is in test_random.py."""
import re

import pytest

from conftest import FULL
from test_chat import CHATML, exported
from test_cli import ROOT, run

STORY = ROOT / "models" / "based-4m-story.bin"
TINY = ROOT / "models" / "stories260K.bin"
PROMPT = "Tom has a red ball. He likes his red ball. Tom has a red ball. He likes"
PLAIN = ["--repeat-penalty", "1"]               # a text that is penalized for it repeats nothing
SAMPLING = [["-t", "0", *PLAIN], ["-t", "0.2", *PLAIN], ["-t", "0.2", "--repeat-penalty", "1.01"],
            ["-t", "0.2", "-k", "5", "--min-p", "0.05", "-p", "1", *PLAIN]]


def guesses(done):
    """How many were made and how many were right."""
    line = re.search(rb"lookup: ([\d,]+) of ([\d,]+) guesses were right", done.err)
    return [int(n.replace(b",", b"")) for n in line.groups()] if line else [0, 0]


def pair(*args, stdin=b""):
    """Runs without and with guesses, which must agree in text and fingerprint."""
    plain, ahead = (run(*args, "-v", "--lookup", n, stdin=stdin) for n in ("0", "15"))
    logits = [re.search(rb"logits #\w+", done.err).group() for done in (plain, ahead)]
    assert plain.text() == ahead.text() and logits[0] == logits[1] and guesses(plain) == [0, 0]
    return guesses(ahead)


@pytest.mark.parametrize("sampling", SAMPLING, ids=" ".join)
def test_same_text(sampling):
    right, made = map(sum, zip(*(
        pair(STORY, "-i", PROMPT, "-s", seed, "-n", "120", *sampling, "--ignore-eos", "-j",
             1 + seed % 2) for seed in range(20 if FULL else 4))))
    assert 0 < right <= made and (right < made or not FULL)


def test_longer_and_shorter(tmp_path):
    """Any number of guesses, a window, a text that ends, a stop text, the logits of every token."""
    for n in (1, 2, 7, 127):
        assert (run(TINY, "-t", "0", "-n", "600", "-q", "--lookup", n).text()
                == run(TINY, "-t", "0", "-n", "600", "-q", "--lookup", "0").text())
    pair(STORY, "-i", PROMPT, "-t", "0")
    for n in range(60, 80, 3):
        pair(STORY, "-i", PROMPT, "-t", "0", "-n", n, "-r", "happy")
    for n in ("0", "15"):
        run(STORY, "-i", PROMPT, "-t", "0", "-n", "200", "--ignore-eos", "--lookup", n,
            "--dump-logits", tmp_path / n).text()
    assert (tmp_path / "0").read_bytes() == (tmp_path / "15").read_bytes()


@pytest.mark.parametrize("n", range(100, 106))
def test_same_state(tmp_path, n):
    """What is saved in the middle of a draft, and the text that goes on from it."""
    for lookup in ("0", "15"):
        run(STORY, "-i", PROMPT, "-t", "0", "-s", "1", "-n", n, "--ignore-eos", "--lookup", lookup,
            "--save", tmp_path / lookup).text()
    assert (tmp_path / "0").read_bytes() == (tmp_path / "15").read_bytes()
    pair(STORY, "--load", tmp_path / "15", "-n", "40", "-t", "0")


def test_same_state_at_the_end_of_a_text(tmp_path):
    """With seed 3 the text ends where the guess was another token."""
    for seed in range(6):
        for n in ("0", "15"):
            run(STORY, "-i", "Once upon a time", "-t", "0.3", "-n", "400", "-s", seed, "--lookup",
                n, "--save", tmp_path / n).text()
        assert (tmp_path / "0").read_bytes() == (tmp_path / "15").read_bytes()


def test_same_conversation(tmp_path):
    """Replies that repeat themselves, taken back and forgotten."""
    model = exported(tmp_path, CHATML)[0]
    said = b"Hello!\n/undo\nHello, hello\nAnd then?\n/reset\nNo\n"
    for n in ("0", "15"):
        done = run(model, "-m", "chat", "-t", "0", "-n", "200", "--ignore-eos", "--lookup", n, "-s",
                   "1", "-v", "--save", tmp_path / n, stdin=said)
        (tmp_path / f"{n}.txt").write_bytes(done.text())
    assert guesses(done)[1] > 0
    for name in "{}", "{}.txt":
        assert ((tmp_path / name.format(0)).read_bytes()
                == (tmp_path / name.format(15)).read_bytes())
