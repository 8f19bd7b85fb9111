"""Many texts at once: --jsonl, --parallel, --unordered.

Answers are compared with runs of their own, and what JSON is with Python's json.
"""
import json
import os
import random
import re
import resource
import select
import signal
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor

import blimp
import numpy as np
import pytest
from based import Model, Session
from conftest import FULL
from test_cli import MODEL, ROOT, run, start

LARGE = str(ROOT / "models" / "based-82m-english.bin")
STORY = ("Once upon a time, there was a girl named Lily. She liked to play with her dog in the "
         "park. One day the dog ran away and ")


def write(path, requests):
    path.write_text("".join(json.dumps(q) + "\n" for q in requests))
    return path


def ask(requests, *args, status=0, **more):
    """Answers to requests, which are lines of bytes or objects."""
    lines = [q if isinstance(q, bytes) else json.dumps(q).encode() for q in requests]
    done = run(MODEL, "--jsonl", "-", *args, stdin=b"\n".join(lines) + b"\n", **more)
    assert done.status == status, done.err
    return [json.loads(line) for line in done.out.splitlines()]


def totals(done):
    return json.loads(next(line for line in done.err.splitlines() if line.startswith(b"{")))


def alone(q, index=0):
    """The text that a run of its own writes for a request."""
    args = ["-i", q["prompt"], "-n", q["max_tokens"], "-s", q["seed"] + index, "-q",
            "--no-display-prompt"]
    for key, flag in (("temperature", "-t"), ("top_p", "-p"), ("top_k", "-k"), ("min_p", "--min-p"),
                      ("repeat_penalty", "--repeat-penalty"), ("repeat_last_n", "--repeat-last-n")):
        args += [flag, q[key]] if key in q else []
    stops = q.get("stop", [])
    for stop in [stops] if isinstance(stops, str) else stops:
        args += ["-r", stop]
    return run(MODEL, *args).text().decode().removesuffix("\n")


def mixed(n):
    """Requests of all kinds: lengths, settings, prompts that begin alike or not."""
    rng, words = random.Random(1), STORY.split() + ["\u00e9t\u00e9", "\U0001f600", "Ben", "\n"]
    requests = []
    for i in range(n):
        q = {"id": i, "seed": rng.randrange(10 ** 6), "max_tokens": rng.choice([0, 1, 5, 20, 60]),
             "prompt": " ".join(rng.choices(words, k=rng.choice([1, 3, 8, 40])))}
        if rng.random() < 0.4:
            q["prompt"] = STORY * rng.randrange(1, 4) + q["prompt"]
        for key, values in (("temperature", [0, 0.5, 1.5]), ("top_p", [0.5, 1]), ("top_k", [5]),
                            ("min_p", [0.1]), ("repeat_penalty", [1.3]), ("repeat_last_n", [5]),
                            ("stop", [".", [" the", "dog"], []]), ("n", [1, 2, 3])):
            if rng.random() < 0.2:
                q[key] = rng.choice(values)
        requests.append(q)
    return requests


def test_every_answer_is_that_of_a_run_of_its_own(tmp_path):
    """1,000 requests (100 without FULL); the same bytes for any number of texts together."""
    requests = mixed(1000 if FULL else 100)
    path = write(tmp_path / "r", requests)
    out = {n: run(MODEL, "--jsonl", path, "--parallel", n, "-q").text() for n in (1, 7, 64)}
    assert out[1] == out[7] == out[64]
    wanted = [(q, i) for q in requests for i in range(q.get("n", 1))]
    answers = [json.loads(line) for line in out[7].splitlines()]
    assert [(a["id"], a["index"]) for a in answers] == [(q["id"], i) for q, i in wanted]
    with ThreadPoolExecutor(2) as pool:
        texts = pool.map(lambda pair: alone(*pair), wanted)
        for (q, _), answer, text in zip(wanted, answers, texts):
            assert answer["text"] == text, q
            assert len(answer["tokens"]) <= q["max_tokens"]
            assert answer["finish_reason"] == "stop" or len(answer["tokens"]) == q["max_tokens"]

    unordered = run(MODEL, "--jsonl", path, "--parallel", 7, "--unordered", "-q").text()
    assert unordered != out[7]
    assert sorted(unordered.splitlines()) == sorted(out[7].splitlines())
    threads = run(MODEL, "--jsonl", path, "--parallel", 7, "-j", 2, "-q").text()
    assert threads == out[7]


def test_what_a_request_leaves_out_is_as_the_options_say():
    options = ["-n", 9, "-t", 0.7, "-s", 5, "-r", "dog", "-q"]
    answers = ask([{"prompt": STORY}, {"prompt": STORY, "stop": None, "seed": None},
                   {"prompt": STORY, "stop": [], "max_tokens": 30}, {}], *options)
    text = run(MODEL, "-i", STORY, *options, "--no-display-prompt").text().decode()[:-1]
    assert [a["text"] for a in answers[:2]] == [text] * 2 and answers[0]["id"] is None
    assert len(answers[2]["tokens"]) == 30
    assert answers[3]["text"] == run(MODEL, *options).text().decode()[:-1]
    # without a seed each text is another one
    some = {a["text"] for a in ask([{"prompt": "The", "n": 4}, {"prompt": "The", "n": 4}], "-q")}
    assert len(some) == 8


def test_log_probabilities_and_scores():
    """Of written tokens and of a continuation, against logits from the library."""
    model = Model(MODEL)
    prompt, then = "Once upon a time", ", there was a dog"
    best = run(MODEL, "-i", prompt, "-t", 0, "-n", 40, "-q", "--no-display-prompt").text().decode()

    def scores(ids, n):
        rows = Session(model).feed(ids)[-n - 1:-1].astype("f8")
        logs = rows - rows.max(1, keepdims=True)
        logs -= np.log(np.exp(logs).sum(1, keepdims=True))
        return [log[token] for log, token in zip(logs, ids[-n:])], rows.argmax(1) == ids[-n:]

    written, scored, greedy, begins = ask([
        {"prompt": prompt, "max_tokens": 5, "logprobs": True, "seed": 3},
        {"prompt": prompt, "continuation": then, "logprobs": True},
        {"prompt": prompt, "continuation": best[:-1]},
        {"continuation": prompt}], "-q")
    first = list(model.encode(prompt.encode()))
    logs, _ = scores(first + written["tokens"], 5)
    assert written["logprobs"] == pytest.approx(logs, abs=1e-5)
    logs, likeliest = scores(first + scored["tokens"], len(scored["tokens"]))
    assert scored["logprobs"] == pytest.approx(logs, abs=1e-5)
    assert scored["logprob"] == pytest.approx(sum(logs), abs=1e-5)
    assert scored["greedy"] is bool(likeliest.all()) is False and greedy["greedy"] is True
    assert len(greedy["tokens"]) == 40 and "text" not in greedy
    # without a prompt, all of the text is scored behind the start token
    assert begins["tokens"] == first[1:]
    assert begins["logprob"] == pytest.approx(sum(scores(first, len(first) - 1)[0]), abs=1e-5)
    # longer than one block
    long, = ask([{"prompt": prompt, "continuation": STORY * 20, "logprobs": True}], "-q")
    n = len(long["tokens"])
    assert n > 300 and long["logprobs"] == pytest.approx(scores(first + long["tokens"], n)[0],
                                                         abs=1e-4)


# ---- Prompts that begin alike ----

def test_shared_beginnings_are_read_once(tmp_path):
    """Two texts, each with 30 questions in turn, and some questions asked twice."""
    texts = [STORY * 20, "The big cat sat on the mat. " * 60]
    requests = [{"prompt": texts[i % 2] + f"Tom and {i} " * 3, "max_tokens": 3, "seed": i}
                for i in range(60)]
    for text in texts:
        requests += [{"prompt": text, "continuation": f" is {i}"} for i in range(4)]
    path = write(tmp_path / "r", requests)
    done = run(MODEL, "--jsonl", path, "-v")
    t, model = totals(done), Model(MODEL)
    lengths = [len(model.encode(text.encode())) for text in texts]
    read = t["prompt_tokens"] - t["shared_tokens"]
    assert t["requests"] == 68 and t["prompt_tokens"] > 34 * sum(lengths)
    assert sum(lengths) < read < sum(lengths) + 68 * 40
    shuffled = write(tmp_path / "s", random.Random(1).sample(requests, len(requests)))
    other = run(MODEL, "--jsonl", shuffled, "-q", "--parallel", 3).text()
    assert sorted(other.splitlines()) == sorted(done.out.splitlines())


def test_texts_of_one_request_share_its_prompt(tmp_path):
    path = write(tmp_path / "r", [{"prompt": STORY * 5, "n": 20, "max_tokens": 2, "seed": 1}])
    t = totals(run(MODEL, "--jsonl", path, "-v"))
    assert t["requests"] == 1 and t["tokens"] == 40
    assert t["prompt_tokens"] == 20 * (t["prompt_tokens"] - t["shared_tokens"])


# ---- Bad input ----

WRONG = [
    (b"x", "byte 1: an object"), (b"[]", "an object"), (b'{"id": 1', "byte 9: a comma or }"),
    (b'{"id" 1}', "a colon"), (b'{"id": 1,}', "a key in quotes"), (b"{,}", "a key in quotes"),
    (b'{"id": 1} {}', "byte 11: something stands behind"), (b'{"prompt": "a', "does not end"),
    (b'{"prompt": "a\nb"}', None), (b'{"prompt": "a\tb"}', "control character"),
    (b'{"prompt": "\x00"}', "control character"), (b'{"prompt": "\\x"}', "escape"),
    (b'{"prompt": "\\u12g4"}', "escape"), (b'{"prompt": "\\u12"}', "escape"),
    (b'{"prompt": "\\ud800"}', "escape"), (b'{"prompt": "\\udc00\\udc00"}', "escape"),
    (b'{"prompt": "\\ud83d\\n"}', "escape"), (b'{"prompt": "\\ud83d\\u0041"}', "escape"),
    (b'{"prompt": "\xff"}', "byte 13: these bytes are not UTF-8"),
    (b'{"prompt": "\xc0\x80"}', "UTF-8"), (b'{"prompt": "\xed\xa0\x80"}', "UTF-8"),
    (b'{"prompt": "\xf4\x90\x80\x80"}', "UTF-8"), (b'{"prompt": "\xe2\x82"}', "UTF-8"),
    (b'{"prompt": 7}', '"prompt" takes a text'), (b'{"prompt": ["a"]}', '"prompt" takes a text'),
    (b'{"id": true}', '"id" takes a text or a number'), (b'{"id": 01}', "takes a text or a number"),
    (b'{"id": {}}', '"id" takes'), (b'{"id": ' + b"1" * 99 + b"}", None),
    (b'{"top_p": 1.5}', '"top_p" takes a number from 0 to 1'),
    (b'{"top_p": "1"}', '"top_p" takes a number'), (b'{"temperature": NaN}', '"temperature" takes'),
    (b'{"temperature": 1e999}', '"temperature" takes'), (b'{"temperature": .5}', "takes"),
    (b'{"max_tokens": 1.0}', '"max_tokens" takes a whole number'), (b'{"max_tokens": -2}', "takes"),
    (b'{"seed": -1}', '"seed" takes'), (b'{"seed": 18446744073709551616}', '"seed" takes'),
    (b'{"n": 65537}', '"n" takes'), (b'{"logprobs": 1}', '"logprobs" takes true or false'),
    (b'{"stop": ""}', '"stop" takes'), (b'{"stop": [""]}', '"stop" takes'),
    (b'{"stop": [1]}', '"stop" takes'), (b'{"stop": ["a" "b"]}', '"stop" takes'),
    (b'{"stop": ["a",]}', '"stop" takes'), (b'{"stop": "a\\u0000"}', '"stop" takes'),
    (b'{"stop": ' + json.dumps(["a"] * 17).encode() + b"}", "at most 16"),
    (b'{"stop": ' + b"[" * 99999 + b"}", '"stop" takes'), (b'{"a": {"b": []}}', 'no key "a"'),
    (b'{"prompt": "a", "prompt": "b"}', 'two keys "prompt"'), (b'{"\\u0000": 1}', "no key"),
    (b'{"best_of": 2}', 'no key "best_of"'),
]


def test_a_bad_line_is_answered_and_the_others_too():
    """Each between two good ones, and each answer is valid JSON."""
    good = b'{"prompt": "a", "max_tokens": 0}'
    for line, says in WRONG:
        before, *bad, after = ask([good, line, good], "-q", status=1)
        assert before["finish_reason"] == after["finish_reason"] == "length"
        assert all(a["finish_reason"] == "error" and "text" not in a for a in bad)
        assert len(bad) == 1 + line.count(b"\n") and bad[0]["error"].startswith("line 2")
        assert says is None or says in bad[0]["error"], bad
    done = run(MODEL, "--jsonl", "-", stdin=b"x\n" + good + b'\n{"id": 3, "x": 1}\n')
    done.error(1, "2 of 3 requests were not valid; their answers say why")
    assert json.loads(done.out.splitlines()[2])["id"] == 3


def test_json_is_what_python_says_it_is():
    """Texts with all kinds of escapes come back as Python reads them; mutants are refused if Python
    refuses them."""
    rng, cases = random.Random(2), []
    pieces = ["a", "\u00e9", "\u20ac", "\U0001f600", "\\n", "\\\"", "\\\\", "\\/", "\\b\\f\\r\\t",
              "\\u0041", "\\u00e9", "\\ud83d\\ude00", "\\u0000", "\\u20AC", " ", "\x7f", "/"]
    for _ in range(3000):
        text = "".join(rng.choices(pieces, k=rng.randrange(12)))
        number = rng.choice(["0", "-1.5", "1e3", "-0", "2E+2", "0.25e-1", "12"])
        blank = rng.choice(["", " ", "\t", " \r "])
        line = f'{blank}{{"id"{blank}:{blank}"{text}",{blank}"temperature": {number} }}{blank}'
        line = bytearray(line.encode())
        for _ in range(rng.choice([0, 0, 1, 2])):
            line[rng.randrange(len(line))] = rng.choice(b'"\\{},:[]0 1eu.-+\x80\xc3\x01')
        cases.append(bytes(line))

    def no_surrogates(text):
        text.encode()
        return text

    agreed = [0, 0]
    answers = ask([case + b" " for case in cases], "-n", 0, "-q", status=1)
    cases = [case for case in cases if case.strip()]
    assert len(answers) == len(cases)
    for case, answer in zip(cases, answers):
        try:
            q = json.loads(case.decode(), object_pairs_hook=lambda pairs: pairs)
            no_surrogates(json.dumps(q, ensure_ascii=False))
            fine = [key for key, _ in q] == ["id", "temperature"]
            q = dict(q) if fine else {}
            fine = fine and 0 <= float(q["temperature"]) <= 100
        except (ValueError, TypeError):
            fine = False
        agreed[fine] += 1
        if fine:
            assert answer["finish_reason"] == "length" and answer["id"] == q["id"], case
        else:
            assert answer["finish_reason"] == "error", case
    assert min(agreed) > 500


@pytest.mark.parametrize("args, says", [
    (["--jsonl", "/nonexistent"], "cannot read /nonexistent"), (["--jsonl", "."], "cannot read .")])
def test_no_requests(args, says):
    run(MODEL, *args).error(1, says)
    assert run(MODEL, "--jsonl", "-", "-q", stdin=b"\n \r\n\n").text() == b""


@pytest.mark.parametrize("args, says", [
    (["--jsonl", "x", "-i", "a"], "does not go with"), (["--parallel", 2], "--parallel goes with"),
    (["--jsonl", "x", "--parallel", 1025], "--parallel takes"), (["--unordered"], "goes with"),
    (["--jsonl", "x", "--save", "y"], "does not go with")])
def test_bad_usage(args, says):
    run(MODEL, *args).error(2, says)


def test_a_mark_and_line_ends_of_windows():
    done = run(MODEL, "--jsonl", "-", "-q",
               stdin=b'\xef\xbb\xbf{"id": 1, "max_tokens": 0}\r\n{"id": 2, "max_tokens": 0}')
    assert [json.loads(line)["id"] for line in done.text().splitlines()] == [1, 2]


def test_a_line_that_is_too_long_for_the_memory():
    """One line of 300 MB in 150 MB of memory is refused; those around it are answered."""
    def limit():
        resource.setrlimit(resource.RLIMIT_AS, (150 << 20, 150 << 20))

    good = b'{"prompt": "a", "max_tokens": 1}\n'
    with start(MODEL, "--jsonl", "-", "-j", 1, "-q", stdin=subprocess.PIPE,
               preexec_fn=limit) as p:
        p.stdin.write(good + b'{"prompt": "')
        for _ in range(300):
            p.stdin.write(b"a" * (1 << 20))
        p.stdin.write(b'"}\n' + good)
        out, err = p.communicate(timeout=60)
    assert p.returncode == 1, err
    first, long, last = map(json.loads, out.splitlines())
    assert "line 2: not enough memory for so long a line" == long["error"]
    assert first["finish_reason"] == last["finish_reason"] == "length"


# ---- A pipe ----

def test_a_request_is_answered_before_the_next_one_is_there():
    with start(MODEL, "--jsonl", "-", "-q", stdin=subprocess.PIPE) as p:
        for i in range(3):
            p.stdin.write(b'{"id": %d, "prompt": "The", "max_tokens": 3}\n' % i)
            p.stdin.flush()
            if not select.select([p.stdout], [], [], 20)[0]:
                p.kill()
                pytest.fail("no answer")
            assert json.loads(p.stdout.readline())["id"] == i
        p.stdin.close()
        assert p.wait(10) == 0


@pytest.mark.parametrize("sent, status", [(signal.SIGKILL, -9), (signal.SIGINT, 130),
                                          (signal.SIGTERM, -15)])
def test_killed_in_the_middle(tmp_path, sent, status):
    """The answers written so far are whole lines, and they are the right ones."""
    requests = [{"id": i, "prompt": STORY, "max_tokens": 200, "seed": i, "logprobs": True}
                for i in range(400)]
    path, out = write(tmp_path / "r", requests), tmp_path / "out"
    with open(out, "wb") as f, start(MODEL, "--jsonl", path, "--parallel", 5, stdout=f) as p:
        while out.stat().st_size < 100000:
            time.sleep(0.01)
        p.send_signal(sent)
        assert p.wait(20) == status
    lines = out.read_bytes().splitlines(keepends=True)
    assert 0 < len(lines) < 400 and all(line.endswith(b"}\n") for line in lines)
    whole = run(MODEL, "--jsonl", write(path, requests[:len(lines)]), "-q").text()
    assert b"".join(lines) == whole


def test_the_reader_goes_away(tmp_path):
    path = write(tmp_path / "r", [{"prompt": STORY, "max_tokens": 50, "seed": 1}] * 200)
    with start(MODEL, "--jsonl", path) as p:
        p.stdout.readline()
        p.stdout.close()
        assert p.wait(20) == 1 and b"run:" not in p.stderr.read()


def test_progress_and_totals(tmp_path):
    """A line for people, only on a terminal; one object for programs with -v."""
    path = write(tmp_path / "r", [{"prompt": STORY, "max_tokens": 300}] * 60 + [{"x": 1}])
    ours, theirs = os.openpty()
    p = start(MODEL, "--jsonl", path, "--parallel", 4, stderr=theirs)
    os.close(theirs)
    p.stdout.read()
    shown = b""
    try:
        while chunk := os.read(ours, 65536):
            shown += chunk
    except OSError:                                             # how the end of a terminal looks
        pass
    assert p.wait() == 1
    assert re.search(rb"answered \d+ requests, [\d,]+ tokens, \d+ tok/s, \d+ s left", shown)
    done = run(MODEL, "--jsonl", path, "-v")
    t = totals(done)
    assert t["requests"] == 61 and t["errors"] == 1 and 0 < t["tokens"] <= 60 * 300
    assert t["tokens"] == sum(len(json.loads(line).get("tokens", []))
                              for line in done.out.splitlines()) + sum(
        json.loads(line)["finish_reason"] == "stop" for line in done.out.splitlines())
    assert b"answered" not in done.err


def test_blimp():
    """Minimal pairs, three of each of the 67 sets; sums of log probabilities are the library's."""
    sets = blimp.accuracy(MODEL, blimp.SAMPLE)
    assert len(sets) == 67 and {n for _, n in sets.values()} == {3}
    model = Model(MODEL)
    _, good, bad = next(blimp.pairs(blimp.SAMPLE))
    for sentence, log in zip((good, bad), blimp.log_probabilities(MODEL, [good, bad])):
        ids = model.encode(sentence.encode())
        rows = Session(model).feed(ids).astype("f8")
        wanted = sum(row[t] - np.log(np.exp(row).sum()) for row, t in zip(rows, ids[1:]))
        assert log == pytest.approx(wanted, abs=1e-4)
    for path, known in ((MODEL, 105), (LARGE, 158)) if FULL else ((MODEL, 105),):       # of 201
        assert sum(right for right, _ in blimp.accuracy(path, blimp.SAMPLE).values()) == known
