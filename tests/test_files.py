"""Kinds of faults of the program: files that are written, standard streams, text that comes in, and
broken numbers. tests/README.md has the table of kinds. Each test was seen failing before.
"""
import contextlib
import itertools
import os
import resource
import signal
import socket
import stat
import struct
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import FULL
from test_cli import hear_interrupts, MODEL, run, seal, start

ROOT = Path(__file__).resolve().parent.parent
RUN = str(ROOT / "run")
SAVE = ["-q", "-t", "0", "-n", "0"]


def save(path, text="Once", flag="--save", **more):
    return run(MODEL, *SAVE, "-i", text, flag, path, **more)


def restored(path, text):
    """Is this the state after `text`?"""
    return run(MODEL, *SAVE, "--load", path, "-i", text).status == 0


# --------------------------------------------------------------------------------------------------
# A. Writing a file.

ROUNDS = 1000 if FULL else 100


def test_writers_and_readers_of_one_name(tmp_path):
    """Four programs save to one name, two load from it: nothing fails, nothing is torn."""
    path = tmp_path / "x.state"
    save(path, "Once").text()
    texts = itertools.cycle(["Once", "Once upon", "Once upon a time", "Once upon a time there was"])
    load = [RUN, MODEL, "-q", "-n", "0", "-j", "1", "--load", str(path)]
    for _ in range(ROUNDS):
        writers = [[RUN, MODEL, *SAVE, "-j", "1", "-i", next(texts), "--save", path]
                   for _ in range(4)]
        for p in [subprocess.Popen(args, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
                  for args in [*writers, load, load]]:
            _, err = p.communicate(timeout=60)
            assert (p.returncode, err) == (0, b"")
    assert os.listdir(tmp_path) == ["x.state"]


@pytest.mark.parametrize("flag", ["--save", "--dump-logits"])
def test_what_belongs_to_others_stays(flag, tmp_path):
    path, other = tmp_path / "x", tmp_path / "other"
    (tmp_path / "x.tmp").write_bytes(b"precious")
    other.write_bytes(b"precious")
    (tmp_path / "y.tmp").symlink_to(other)
    for name in ("x", "y"):
        save(tmp_path / name, flag=flag).text()
        assert (tmp_path / name).stat().st_size > 1000 and not (tmp_path / name).is_symlink()
    assert (tmp_path / "x.tmp").read_bytes() == other.read_bytes() == b"precious"
    assert sorted(os.listdir(tmp_path)) == ["other", "x", "x.tmp", "y", "y.tmp"]


@pytest.mark.parametrize("flag", ["--save", "--dump-logits"])
def test_mode_and_umask(flag, tmp_path):
    path = tmp_path / "x"
    save(path, flag=flag, preexec_fn=lambda: os.umask(0o027)).text()
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    path.chmod(0o604)
    save(path, flag=flag, preexec_fn=lambda: os.umask(0o077)).text()
    assert stat.S_IMODE(path.stat().st_mode) == 0o604


@pytest.mark.parametrize("flag", ["--save", "--dump-logits"])
def test_links_are_written_through(flag, tmp_path):
    good, folder = tmp_path / "good", tmp_path / "folder"
    save(good, flag=flag).text()
    folder.mkdir()
    target, link, hard, lost = (folder / "target", tmp_path / "link", tmp_path / "hard",
                                tmp_path / "lost")
    target.write_bytes(b"old")
    link.symlink_to("folder/target")
    save(link, flag=flag).text()
    assert link.is_symlink() and target.read_bytes() == good.read_bytes()
    target.write_bytes(b"old")
    os.link(target, hard)
    save(hard, flag=flag).text()
    assert target.read_bytes() == good.read_bytes() and target.stat().st_nlink == 2
    lost.symlink_to("folder/new")               # a link to nothing, yet
    save(lost, flag=flag).text()
    assert (folder / "new").read_bytes() == good.read_bytes()
    assert sorted(os.listdir(folder)) == ["new", "target"]


@pytest.mark.parametrize("flag", ["--save", "--dump-logits"])
def test_fifo_and_standard_output(flag, tmp_path):
    good, fifo, out = tmp_path / "good", tmp_path / "fifo", tmp_path / "out"
    save(good, flag=flag).text()
    os.mkfifo(fifo)
    with open(out, "wb") as f, subprocess.Popen(["cat", fifo], stdout=f) as reader:
        save(fifo, flag=flag).text()
        assert reader.wait(30) == 0 and out.read_bytes() == good.read_bytes()
    assert stat.S_ISFIFO(fifo.stat().st_mode)
    args = [RUN, MODEL, *SAVE, "-i", "Once", flag, "/dev/stdout"]
    with open(out, "wb") as f:          # a file, a pipe, a socket: both, one after the other
        f.write(b"before ")
        f.flush()
        subprocess.run(args, stdout=f, check=True)
    piped = subprocess.run(args, stdout=subprocess.PIPE, check=True).stdout
    ours, theirs = socket.socketpair()
    p = subprocess.Popen(args, stdout=theirs)
    theirs.close()
    with ours.makefile("rb") as f:
        through_socket = f.read()
    assert p.wait() == 0
    assert out.read_bytes() == b"before " + piped and through_socket == piped
    assert good.read_bytes() in piped and len(piped) == good.stat().st_size + len(b"Once\n")


def can_mount():
    return subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode == 0


@pytest.mark.skipif(sys.platform != "linux" or not can_mount(), reason="no mounts here")
def test_a_file_that_is_mounted(tmp_path):
    """As in a container: nothing can be renamed over it."""
    real, there, good = tmp_path / "real", tmp_path / "there", tmp_path / "good"
    real.write_bytes(b"old"), there.write_bytes(b"")
    save(good).text()
    p = subprocess.run(["unshare", "-rm", "sh", "-c", 'mount --bind "$1" "$2" && shift 2 && "$@"',
                        "sh", real, there, RUN, MODEL, *SAVE, "-i", "Once", "--save", there],
                       capture_output=True)
    assert (p.returncode, p.stderr) == (0, b"")
    assert real.read_bytes() == good.read_bytes() and there.read_bytes() == b""
    assert sorted(os.listdir(tmp_path)) == ["good", "real", "there"]


def nobody():
    os.setgid(65534), os.setuid(65534)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
def test_folders_that_are_not_ours(tmp_path_factory, tmp_path):
    """A file that may be written is written, wherever it is; one that may not is told at once."""
    place = Path("/tmp") / f"based-test-{os.getpid()}"
    good = tmp_path / "good"
    save(good).text()
    model = ["-q", "-t", "0", "-n", "0", "-i", "Once"]
    try:
        place.mkdir(mode=0o755)
        (place / "m.bin").write_bytes(Path(MODEL).read_bytes())
        (place / "run").write_bytes(Path(RUN).read_bytes())
        (place / "run").chmod(0o755)

        def as_nobody(name):
            return subprocess.run([place / "run", place / "m.bin", *model, "--save", place / name],
                                  capture_output=True, preexec_fn=nobody)
        (place / "x").write_bytes(b"old")
        for mode, folder in ((0o666, 0o755), (0o666, 0o1777)):
            (place / "x").chmod(mode), place.chmod(folder)
            p = as_nobody("x")
            assert (p.returncode, p.stderr) == (0, b"")
            assert (place / "x").read_bytes() == good.read_bytes()
            assert (place / "x").stat().st_uid == 0
            (place / "x").write_bytes(b"old")
        place.chmod(0o777), (place / "x").chmod(0o644)
        for name in ("x", "none/x"):
            p = as_nobody(name)
            assert p.returncode == 1 and b"cannot write the past" in p.stderr, p.stderr
        assert (place / "x").read_bytes() == b"old"
        assert sorted(os.listdir(place)) == ["m.bin", "run", "x"]
    finally:
        subprocess.run(["rm", "-r", place], check=True)


@pytest.mark.parametrize("flag", ["--save", "--dump-logits"])
@pytest.mark.parametrize("alias", ["same", "link", "hard", "dots"])
def test_what_is_read_is_not_overwritten(flag, alias, tmp_path):
    model, text, state = tmp_path / "m.bin", tmp_path / "book.txt", tmp_path / "s"
    save(state).text()
    model.write_bytes(Path(MODEL).read_bytes()), text.write_bytes(b"Once upon a time\n")

    def other(path):
        name = tmp_path / "alias"
        name.unlink(missing_ok=True)
        if alias == "link":
            name.symlink_to(path.name)
        elif alias == "hard":
            os.link(path, name)
        else:
            return path if alias == "same" else tmp_path / "." / ".." / tmp_path.name / path.name
        return name

    said = "the past" if flag == "--save" else "the logits"
    run(model, *SAVE, flag, other(model)).error(2, f"cannot write {said}", "the checkpoint")
    run(MODEL, *SAVE, "-f", text, flag, other(text)).error(2, f"cannot write {said}", "the prompt")
    p = subprocess.run([RUN, MODEL, *SAVE, "-f", "-", flag, other(text)], stdin=open(text, "rb"),
                       capture_output=True)
    assert p.returncode == 2 and b"the prompt" in p.stderr
    p = subprocess.run([RUN, MODEL, *SAVE, flag, other(text)], stdin=open(text, "rb"),
                       capture_output=True)
    assert p.returncode == 2 and b"standard input" in p.stderr
    chat = ["-m", "chat", *SAVE, "-f", text]
    run(MODEL, *chat, "--save", other(text)).error(2, "the prompt")
    done = run(model, "-m", "chat", *SAVE, stdin=f"/save {other(model)}\n".encode())
    assert done.status == 0 and b"cannot write the past" in done.err
    assert model.read_bytes() == Path(MODEL).read_bytes()
    assert text.read_bytes() == b"Once upon a time\n"
    if flag == "--dump-logits":
        run(MODEL, *SAVE, "--load", state, flag, other(state)).error(2, "the loaded state")
        run(MODEL, *SAVE, "--save", tmp_path / "n", flag, tmp_path / "n").error(2, "another output")
        assert not (tmp_path / "n").exists()
    else:                                       # a saved text may go on in its own file
        run(MODEL, *SAVE, "--load", state, "--append", " upon", flag, other(state)).text()
        assert restored(state, "Once upon")


def test_refused_before_anything_is_read(tmp_path):
    """Also if what would be read is not there, or is no model."""
    bad = tmp_path / "bad.bin"
    bad.write_bytes(b"no model")
    run(bad, "--save", bad).error(2, "the checkpoint")
    run(bad, "--save", tmp_path / "no" / "x").error(1, "cannot write the past", "No such file")
    run(bad, "--dump-logits", tmp_path).error(1, "cannot write the logits", "Is a directory")
    assert os.listdir(tmp_path) == ["bad.bin"] and bad.read_bytes() == b"no model"


def test_the_place_is_looked_at_first(tmp_path):
    """Not after the text, which may take hours."""
    done = run(MODEL, "-i", "Once", "-n", "50", "--save", tmp_path / "no" / "x")
    done.error(1, "cannot write the past")
    assert done.out == b""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGQUIT])
def test_no_file_stays_behind_a_signal(number, tmp_path):
    path = tmp_path / "x"
    path.write_bytes(b"old")
    p = start(MODEL, "-n", "-1", "--ignore-eos", "-q", "--dump-logits", path,
              preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_CORE, (0, 0)))
    assert p.stdout.read(100)
    assert len(os.listdir(tmp_path)) == 2
    os.kill(p.pid, signal.SIGSTOP)              # both signals at once, as impatient people do
    p.send_signal(number), p.send_signal(signal.SIGTERM)
    os.kill(p.pid, signal.SIGCONT)
    p.communicate(timeout=30)
    assert p.returncode in (-number, -signal.SIGTERM, 130)
    assert os.listdir(tmp_path) == ["x"]
    assert path.read_bytes() == b"old" or number == signal.SIGINT


@pytest.mark.parametrize("name", ["a b", " ", "-x", "\udcff\udcfe", "x" * 255, "\n"])
def test_names(name, tmp_path):
    path = os.fsencode(tmp_path) + b"/" + os.fsencode(name)
    p = subprocess.run([RUN, MODEL, *SAVE, "-i", "Once", "--save", path], capture_output=True)
    assert (p.returncode, p.stderr) == (0, b"") and os.listdir(tmp_path) == [name]
    assert subprocess.run([RUN, MODEL, *SAVE, "--load", path], capture_output=True).returncode == 0
    p = subprocess.run([RUN, MODEL, *SAVE, "-i", "Once", f"--dump-logits={name}"], cwd=tmp_path,
                       capture_output=True)
    assert (p.returncode, p.stderr) == (0, b"") and os.listdir(tmp_path) == [name]


def test_file_size_limit(tmp_path):
    """SIGXFSZ would end the program and leave its file."""
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))
    done = save(tmp_path / "x", preexec_fn=limit)
    done.error(1, "cannot write the past", "File too large")
    assert os.listdir(tmp_path) == []


# --------------------------------------------------------------------------------------------------
# B. Standard streams.

def closed(*descriptors):
    return lambda: [os.close(fd) for fd in descriptors]


@pytest.mark.parametrize("fds", [(0,), (1,), (2,), (0, 1), (0, 2), (1, 2), (0, 1, 2)])
def test_closed_at_the_start(fds, tmp_path):
    """No file gets the number of a standard stream, and text into nothing is an error."""
    args = ["-i", "Once", "-n", "5", "-t", "0", "-v"]
    run(MODEL, *args, "--dump-logits", tmp_path / "good", "--save", tmp_path / "s").text()
    p = subprocess.run([RUN, MODEL, *args, "--dump-logits", tmp_path / "d", "--save",
                        tmp_path / "t"], preexec_fn=closed(*fds), capture_output=True)
    assert p.returncode == (1 if 1 in fds else 0)
    if 1 in fds:
        assert 2 in fds or b"cannot write the text to standard output" in p.stderr
        assert sorted(os.listdir(tmp_path)) == ["good", "s"]
    else:
        assert (tmp_path / "d").read_bytes() == (tmp_path / "good").read_bytes()
        assert (tmp_path / "t").read_bytes() == (tmp_path / "s").read_bytes()


@pytest.mark.parametrize("args", [["--help"], ["--version"], [MODEL, "--info"], [MODEL, "--check"],
                                  [MODEL, "-x", "text"]], ids=lambda a: a[-1])
def test_nothing_is_written_into_nothing(args, tmp_path):
    (tmp_path / "text").write_bytes(b"Once upon a time")
    p = subprocess.run([RUN, *args], preexec_fn=closed(1), stderr=subprocess.PIPE, cwd=tmp_path)
    assert p.returncode == 1 and b"cannot write the text to standard output" in p.stderr


def test_nothing_is_read_from_nothing(tmp_path):
    for args in (["-f", "-"], ["-m", "chat"], ["-x", "-"]):
        p = subprocess.run([RUN, MODEL, *args], preexec_fn=closed(0), capture_output=True)
        assert p.returncode == 1 and b"cannot read standard input" in p.stderr and p.stdout == b""


# --------------------------------------------------------------------------------------------------
# E. Text with lengths.

def tokens(state):
    """How many tokens were read, from the header of a saved state."""
    return struct.unpack_from("<Q", state.read_bytes(), 40)[0]


MARK = b"\xef\xbb\xbf"


@pytest.mark.parametrize("way", ["-f", "-f -", "chat -f", "chat"])
def test_marks_line_ends_and_zeros(way, tmp_path):
    """The same in every way in."""
    def count(text):
        state, path = tmp_path / "s", tmp_path / "text"
        path.write_bytes(text)
        args = [RUN, MODEL, "-q", "-t", "0", "-n", "0", "--save", state]
        if "chat" in way:
            args += ["-m", "chat"]
        if "-f" in way:
            args += ["-f", path if way.endswith("-f") else "-"]
        stdin = b"" if way.endswith("-f") else text
        subprocess.run(args, input=stdin, check=True, capture_output=True)
        return tokens(state)
    plain = count(b"Hello")
    for text in (b"Hello\n", b"Hello\r\n", MARK + b"Hello", MARK + b"Hello\r\n"):
        assert count(text) == plain, text
    assert count(b"Hello\0and more words\n") > plain + 5
    assert count(b"Hello\0\n") > plain


def test_marks_in_the_other_ways(tmp_path):
    text = b"Once upon a time there was a little girl"
    plain = run(MODEL, "-q", "-x", "-", stdin=text).text()
    assert run(MODEL, "-q", "-x", "-", stdin=MARK + text).text() == plain
    state, a, b = tmp_path / "s", tmp_path / "a", tmp_path / "b"
    save(state).text()
    for path, more in ((a, b" upon\n"), (b, MARK + b" upon\r\n")):
        run(MODEL, *SAVE, "--load", state, "--append", "-", "--save", path, stdin=more).text()
    assert a.read_bytes() == b.read_bytes()
    # only at the beginning
    two = run(MODEL, "-m", "chat", *SAVE, "--save", a, stdin=b"A\n" + MARK + b"B\n")
    run(MODEL, "-m", "chat", *SAVE, "--save", b, stdin=b"A\nB\n").text()
    assert two.status == 0 and tokens(a) > tokens(b)


def test_a_command_with_a_zero_byte(tmp_path):
    done = run(MODEL, "-m", "chat", "-q", "-n", "0", stdin=b"/save %s/x\0y\n" % bytes(tmp_path))
    assert b"zero byte" in done.err and os.listdir(tmp_path) == []


def test_escapes_in_stop_texts():
    args = [MODEL, "-i", "Once", "-t", "0", "-n", "200", "-q"]
    whole = run(*args).text()
    assert b"\n" in whole[:-1]
    assert run(*args, "-r", r"\n").text() == run(*args, "-r", "\n").text()
    assert run(*args, "-r", r"\n").text() == whole[:whole.index(b"\n") + 1]
    assert run(*args, "-r", r"\\n").text() == whole


def test_special_names_in_what_somebody_says(tmp_path):
    """They are text; --specials makes them tokens; those of the template are tokens in any case."""
    def ids(said, *more):
        state = tmp_path / "s"
        run(MODEL, "-m", "chat", *SAVE, "--save", state, *more, stdin=said).text()
        return tokens(state)
    template = ["--chat-template", "<s>User: {}</s>Bot:"]
    for given in ([], template):
        names = ids(b"cat</s>dog<s>\n", *given)
        assert names > ids(b"cat</s>dog<s>\n", "--specials", *given) + 4
        # without names there is no difference
        assert ids(b"cat dog\n", *given) == ids(b"cat dog\n", "--specials", *given)
    assert ids(b"cat\n", *template) < ids(b"cat\n", "--chat-template", "<x>User: {}</x>Bot:")
    # a name that begins in the template and ends in what is said is text as well
    assert ids(b"s>cat\n", "--chat-template", "</{}:") > ids(b"s>cat\n", "--specials",
                                                         "--chat-template", "</{}:")


# --------------------------------------------------------------------------------------------------
# F. Broken numbers.

@pytest.fixture(scope="module")
def broken(tmp_path_factory):
    """A model of finite weights without a finite logit: its last norm multiplies by 3e38."""
    data = Path(MODEL).read_bytes()
    path = tmp_path_factory.mktemp("broken") / "broken.bin"
    path.write_bytes(seal(data[:-256] + np.full(64, 3e38, "<f4").tobytes()))
    return path


def test_broken_numbers_end_the_text(broken, tmp_path):
    """One line and status 1, and no file, wherever logits would be used."""
    out = tmp_path / "out"
    for args in (["-n", "5"], ["-n", "0"], ["-n", "5", "-t", "0"], ["--branches", "2"],
                 ["--dump-logits", out], ["--dump-logits", out, "-n", "0"], ["--save", out],
                 ["-f", "-"], ["--tokens", "1 2 3"]):
        args = [*args, "-i", "Once"] if args[0] not in ("-f", "--tokens") else args
        done = run(broken, "-q", *args, stdin=b"Once")
        done.error(1, "all logits after token ", "are NaN or infinite; ", "broken.bin is broken")
    run(broken, "-x", "-", stdin=b"Once upon a time").error(1, "the checkpoint is broken")
    done = run(broken, "-m", "chat", "-q", "--save", out, stdin=b"Hello\nMore\n")
    done.error(1, "all logits after token ")
    run(broken, "--check").error(1, "all weights are finite, but", "4,096 logits")
    assert not out.exists() and os.listdir(tmp_path) == []


def test_check_computes_with_every_kind_of_model(random_model):
    for n, options in enumerate((dict(input=0, rows=40, vocab=40, flags=1),
                                 dict(input=12, rows=0, vocab=0, flags=4), {})):
        done = run(random_model(20 + n, **options), "--check")
        assert done.status == 0 and b"is sound" in done.out, done.err


# --------------------------------------------------------------------------------------------------
# Pipes.

def test_the_checkpoint_comes_through_a_pipe(tmp_path):
    args = "-i Once -t 0 -n 20 -q"
    whole = run(MODEL, *args.split()).text()
    sh = lambda line: subprocess.run(["bash", "-c", line], capture_output=True)
    p = sh(f"{RUN} <(cat {MODEL}) {args}")
    assert (p.returncode, p.stdout) == (0, whole), p.stderr
    p = sh(f"cat {MODEL} | {RUN} /dev/stdin {args}")
    assert (p.returncode, p.stdout) == (0, whole), p.stderr
    p = sh(f"{RUN} <(head -c 100000 {MODEL}) {args}")
    assert p.returncode == 1 and b"but there are 100000" in p.stderr
    p = sh(f"{RUN} <(cat {MODEL}; echo more) {args}")
    assert p.returncode == 1 and b"the header says" in p.stderr
    p = sh(f"{RUN} <(echo no) {args}")
    assert p.returncode == 1 and p.stderr.count(b"\n") == 1
    p = sh(f"timeout 20 {RUN} <(yes) {args}")   # it has no end
    assert p.returncode == 1 and b"not a based checkpoint" in p.stderr
    p = sh(f"{RUN} <(:) {args}")
    assert p.returncode == 1 and b"the file is empty" in p.stderr


def test_a_state_comes_through_a_pipe(tmp_path):
    state = tmp_path / "s"
    save(state).text()
    expected = run(MODEL, "-q", "-t", "0", "--load", state).text()
    sh = lambda line: subprocess.run(["bash", "-c", line], capture_output=True)
    p = sh(f"{RUN} {MODEL} -q -t 0 --load <(cat {state})")
    assert (p.returncode, p.stdout) == (0, expected)
    for wrong in ("<(yes)", "/dev/zero"):       # the beginning is enough to see that it is none
        p = sh(f"ulimit -v 2000000; timeout 20 {RUN} {MODEL} -q -t 0 --load {wrong}")
        assert p.returncode == 1 and b"not a saved state" in p.stderr, p.stderr


# --------------------------------------------------------------------------------------------------
# Conversations.

def test_commands_that_fail_change_nothing(tmp_path):
    """Also not how many turns can be taken back."""
    (tmp_path / "bad").write_bytes(b"no state")
    talk = b"".join(b"Turn %d\n" % i for i in range(9))
    failing = (f"/load {tmp_path / 'bad'}\n/load {tmp_path / 'none'}\n/load {tmp_path}\n/save\n"
               f"/save {tmp_path / 'no' / 'x'}\n/bla\n").encode() * 3
    a, b = tmp_path / "a", tmp_path / "b"
    args = [MODEL, "-m", "chat", "-q", "-t", "0", "-n", "3", "-s", "1"]
    for path, middle in ((a, b""), (b, failing)):
        done = run(*args, "--save", path, stdin=talk + middle + b"/undo\n" * 8)
        assert done.status == 0 and b"no turn to take back" not in done.err
    assert a.read_bytes() == b.read_bytes()


def chat_with_save(path, **more):
    return subprocess.Popen([RUN, MODEL, "-m", "chat", "-q", "-n", "5", "-t", "0", "--save", path],
                            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            bufsize=0, **{"preexec_fn": hear_interrupts, **more})


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP, signal.SIGTERM])
@pytest.mark.parametrize("times", [1, 2])
def test_a_conversation_is_saved_when_a_signal_ends_it(number, times, tmp_path):
    path, expected = tmp_path / "s", tmp_path / "expected"
    run(MODEL, "-m", "chat", "-q", "-n", "5", "-t", "0", "--save", expected,
        stdin=b"Hello\n").text()
    p = chat_with_save(path)
    p.stdin.write(b"Hello\n")
    assert p.stdout.read(1)
    time.sleep(0.5)                             # it waits for the next line
    for _ in range(times if number != signal.SIGINT else 1):
        p.send_signal(number)
    _, err = p.communicate(timeout=30)
    assert p.returncode == 128 + number, (p.returncode, err)
    assert path.read_bytes() == expected.read_bytes() and err == b""


def test_a_conversation_is_saved_when_nobody_reads_it(tmp_path):
    path = tmp_path / "s"
    p = chat_with_save(path)
    p.stdin.write(b"Hello\n")
    assert p.stdout.read(1)
    p.stdout.close()
    time.sleep(0.3)
    with contextlib.suppress(BrokenPipeError):
        p.stdin.write(b"More\nAnd more\n")
    p.stdin.close()
    assert p.wait(30) == 1 and tokens(path) > 15
    p.stderr.close()


def test_a_closed_terminal(tmp_path):
    """Its program gets SIGHUP, perhaps twice, and neither reading nor writing works any more."""
    path = tmp_path / "s"
    pid, terminal = os.forkpty()
    if pid == 0:
        os.execv(RUN, [RUN, MODEL, "-m", "chat", "-n", "5", "-t", "0", "--save", str(path)])
    time.sleep(0.5)
    os.write(terminal, b"Hello\n")
    seen = b""
    while seen.count(b"> ") < 2:
        seen += os.read(terminal, 1000)
    os.close(terminal)
    deadline = time.time() + 30
    while os.waitpid(pid, os.WNOHANG) == (0, 0):
        assert time.time() < deadline
        time.sleep(0.05)
    assert tokens(path) > 20 and os.listdir(tmp_path) == ["s"]
