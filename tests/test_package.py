"""What `make install` installs, as those who install it find it: built from the tarball of `make
dist`, offline and without Python, into a prefix with a space in its name."""
import os
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from types import SimpleNamespace

import pytest

from conftest import need

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "models" / "stories260K-q8.bin"
HEADER = (ROOT / "based.h").read_text()
VERSION = re.search(r'BASED_VERSION "(.*)"', HEADER)[1]
SHARED = "libbased.so." + VERSION.rpartition(".")[0]
# All that a build may find. make, a C compiler, and what POSIX says is there.
TOOLS = ("make cc as ld ar sh awk sed cat cp rm rmdir mkdir chmod ln dirname touch uname mktemp "
         "install").split()
FILES = {"bin/based", "include/based.h", "lib/libbased.a", "lib/libbased.so", f"lib/{SHARED}",
         "lib/pkgconfig/based.pc", "lib/cmake/based/based-config.cmake",
         "lib/cmake/based/based-config-version.cmake", "share/based/based.py",
         "share/man/man1/based.1", "share/man/man3/based.3",
         "share/bash-completion/completions/based", "share/zsh/site-functions/_based",
         "share/fish/vendor_completions.d/based.fish"}


def quietly(*command, **options):
    """What the command prints."""
    done = subprocess.run(command, capture_output=True, text=True, **options)
    assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}{done.stderr[-4000:]}"
    return done.stdout


def names_in(directory):
    return {str(path.relative_to(directory)) for path in directory.rglob("*")
            if path.is_symlink() or not path.is_dir()}


def tarball(directory):
    """make dist, of what lies here, committed or not."""
    git = "git", "-C", ROOT, "-c", "user.name=x", "-c", "user.email=x"
    commit = quietly(*git, "stash", "create").strip() or "HEAD"
    quietly("make", "-s", "-C", ROOT, "dist", f"COMMIT={commit}", f"BUILD={directory}")
    return directory / f"based-{VERSION}.tar.gz"


@pytest.fixture(scope="module")
def installed(once):
    """The prefix; `make` runs make in the sources, `story` is what the program tells."""
    need("PACKAGE", "git", "make")
    offline = ["unshare", "-rn"]
    if subprocess.run([*offline, "true"], capture_output=True).returncode:
        offline = []

    def make(place, *targets):
        quietly(*map(shutil.which, offline[:1]), *offline[1:], "make", "CFLAGS=-O0", *targets,
                cwd=place / f"based-{VERSION}",
                env={"PATH": str(place / "tools"), "TMPDIR": str(place)})

    def install(place):
        with tarfile.open(tarball(place)) as archive:
            archive.extractall(place, filter="data")
        (place / "tools").mkdir()
        for tool in TOOLS:
            (place / "tools" / tool).symlink_to(shutil.which(tool))
        make(place, "install", f"PREFIX={place / 'a b' / 'prefix'}")
    place = once("package", install)
    prefix = place / "a b" / "prefix"
    flags = {**os.environ, "PKG_CONFIG_PATH": str(prefix / "lib" / "pkgconfig"),
             "LD_LIBRARY_PATH": str(prefix / "lib")}
    story = quietly(prefix / "bin" / "based", MODEL, "-t", "0", "-n", "40", "--no-display-prompt",
                    "--repeat-penalty", "1")
    return SimpleNamespace(prefix=prefix, env=flags, story=story,
                           sources=place / f"based-{VERSION}",
                           make=lambda *targets: make(place, *targets))


PROGRAM = r"""
#include <based.h>
#include <stdio.h>
#include <stdlib.h>

int main(int argc, char **argv) {
    based_error e;
    based_tokenizer t;
    based_decoder decoder = { { 0 }, 0, 0 };
    based_model *m = based_open(argc > 1 ? argv[1] : "", 0, &e);
    based_session *s = m ? based_session_new(m, 1, &e) : NULL;
    if (!s || based_tokenizer_open(&t, m, &e)) return fprintf(stderr, "%s\n", e.text), 1;
    char *text = malloc(based_decode_bound(&t));
    based_sampler sampler = { .top_p = 1, .repeat_penalty = 1, .vocab = t.size };
    size_t bytes = based_sampler_bytes(&sampler);
    if (based_sampler_init(&sampler, malloc(bytes), bytes, &e)) return 1;
    based_step(s, (int32_t)t.bos, &e);
    for (int i = 0; i < 40; i++) {
        int32_t id = based_sample(&sampler, based_logits(s));
        fwrite(text, 1, based_decode(&t, &decoder, id, text), stdout);
        based_step(s, id, &e);
    }
    puts("");
    return 0;
}
"""


def test_what_is_there(installed):
    """All files, readable by everyone, and nothing else."""
    assert names_in(installed.prefix) == FILES
    for name in FILES:
        mode = (installed.prefix / name).stat().st_mode & 0o777
        assert mode == (0o755 if name == "bin/based" else 0o644), name
    version = quietly(installed.prefix / "bin" / "based", "--version")
    assert version == f"based.c {VERSION}\n"


def test_a_relative_prefix(installed, tmp_path):
    """As the shell where make runs understands it; DESTDIR goes before it. Uninstalling removes
    what was installed, and nothing else."""
    there = installed.sources / "d d" / "here"
    where = "DESTDIR=d d/", "PREFIX=here"
    installed.make("install", *where)
    assert names_in(there) == FILES
    (there / "lib" / "other").write_text("")
    installed.make("uninstall", *where)
    assert names_in(there) == {"lib/other"}
    left = {path.name for path in there.rglob("*") if path.is_dir()}
    assert "based" not in left


@pytest.mark.parametrize("static", [False, True])
def test_pkg_config(installed, static, tmp_path):
    need("PACKAGE", "pkg-config")
    (tmp_path / "story.c").write_text(PROGRAM)
    static = ["--static"] if static else []
    flags = shlex.split(quietly("pkg-config", *static, "--cflags", "--libs", "based",
                                env=installed.env))
    quietly("cc", "-std=c99", *[option[1:] for option in static], "-o", tmp_path / "story",
            tmp_path / "story.c", *flags)
    assert quietly(tmp_path / "story", MODEL, env=installed.env) == installed.story
    libraries = subprocess.run(["ldd", tmp_path / "story"], capture_output=True, text=True).stdout
    assert (SHARED in libraries) == (not static)
    version = quietly("pkg-config", "--modversion", "based", env=installed.env)
    assert version == f"{VERSION}\n"


def test_plain_flags(installed, tmp_path):
    """The static library needs libm and nothing else."""
    (tmp_path / "story.c").write_text(PROGRAM)
    (tmp_path / "lib").mkdir()
    shutil.copy(installed.prefix / "lib" / "libbased.a", tmp_path / "lib")
    quietly("cc", f"-I{installed.prefix}/include", f"-L{tmp_path}/lib", "-o", tmp_path / "story",
            tmp_path / "story.c", "-lbased", "-lm")
    assert quietly(tmp_path / "story", MODEL) == installed.story


@pytest.mark.parametrize("wanted, found", [("", True), (VERSION, True),
                                           (VERSION.rpartition(".")[0], True),
                                           (VERSION + ".1", False), ("99.0", False)])
def test_cmake(installed, wanted, found, tmp_path):
    """based::based, of this version; a later one is not there."""
    need("PACKAGE", "cmake")
    (tmp_path / "story.c").write_text(PROGRAM)
    (tmp_path / "CMakeLists.txt").write_text(f"""
        cmake_minimum_required(VERSION 3.13)
        project(story C)
        find_package(based {wanted})
        message("found: ${{based_FOUND}}")
        if(based_FOUND)
          add_executable(story story.c)
          target_link_libraries(story based::based)
        endif()""")
    build = tmp_path / "build"
    told = subprocess.run(["cmake", "-S", tmp_path, "-B", build,
                           f"-DCMAKE_PREFIX_PATH={installed.prefix}"], check=True,
                          capture_output=True, text=True).stderr
    assert f"found: {int(found)}\n" in told
    if found:
        quietly("cmake", "--build", build)
        assert quietly(build / "story", MODEL) == installed.story


def test_names(installed):
    """The shared library exports what based.h declares, and nothing else; and it says its name."""
    library = installed.prefix / "lib" / SHARED
    names = {line.split()[-1] for line in
             quietly("nm", "-D", "--defined-only", library).splitlines()}
    code = re.sub(r"/\*.*?\*/", "", HEADER, flags=re.S)
    assert names == set(re.findall(r"\b(based_\w+)\(", code))
    assert f"soname: [{SHARED}]" in quietly("readelf", "-d", library)


def test_a_program_that_does_not_run(tmp_path):
    """Nothing is made of its help; one for another machine may be run by an emulator."""
    generate = ROOT / "tests" / "package" / "generate.sh"
    for emulator, works in ("false", False), ("env A=1", True):
        done = subprocess.run([generate, tmp_path / emulator], capture_output=True,
                              env={**os.environ, "EMULATOR": emulator})
        assert (done.returncode == 0) == works
        assert bool(names_in(tmp_path / emulator)) == works


def options():
    """[(letter or "", name)] as --help lists them."""
    text = quietly(ROOT / "run", "--help")
    found = re.findall(r"^  (?:-(.), |    )--([a-z-]+)", text, re.M)
    assert len(found) > 30
    return found


def test_man_pages(installed):
    """Nothing to complain about. All of --help is there, and all of based.h."""
    need("PACKAGE", "mandoc")
    manual = {}
    for section in 1, 3:
        name = installed.prefix / "share" / "man" / f"man{section}" / f"based.{section}"
        assert quietly("mandoc", "-T", "lint", name) == ""
        text = re.sub(".\b", "", quietly("mandoc", "-T", "ascii", "-O", "width=200", name))
        assert f"based {VERSION}" in text
        manual[section] = " ".join(text.split())

    help_text = quietly(ROOT / "run", "--help").partition("\n\n")[2]
    for words in re.split(r"\n\n|:\n|\n(?=  )|Exit status:|   +", help_text):
        words = " ".join(re.sub(r"^ *\S*run ", "", words).split())
        assert words.lower() in manual[1].lower(), words

    for comment in re.findall(r"^/\*(.*?)\*/", HEADER, re.S | re.M):
        for line in comment.splitlines()[1:]:
            words = " ".join(re.sub(r"^ \* ?", "", line).split())
            assert words in manual[3], words
    for line in re.sub(r"^/\*.*?\*/", "", HEADER, flags=re.S | re.M).splitlines():
        words = " ".join(line.split())
        assert words in manual[3] or words in (
            "#ifndef BASED_H", "#define BASED_H", "#include <stddef.h>", "#include <stdint.h>",
            "#ifdef __cplusplus", 'extern "C" {', "#endif"), words


def test_completions(installed):
    """Every option, in bash, zsh and fish, as these shells offer them."""
    need("PACKAGE", "bash", "zsh", "fish")
    share = installed.prefix / "share"
    wanted = sorted(f"--{name}" for _, name in options())
    bash = shlex.quote(str(share / "bash-completion" / "completions" / "based"))
    offered = quietly("bash", "-c", f"source {bash} && complete -p based >&2 && "
                      "_based based -- x && echo ${COMPREPLY[@]}")
    assert sorted(offered.split()) == wanted
    offered = quietly("bash", "-c", f"source {bash} && _based based g -m && echo ${{COMPREPLY[@]}}")
    assert offered == "generate\n"

    zsh = share / "zsh" / "site-functions" / "_based"
    quietly("zsh", "-n", zsh)
    stub = f"_arguments() {{ print -rl -- $@ }}; source {shlex.quote(str(zsh))}"
    offered = quietly("zsh", "-fc", stub).splitlines()
    named = re.findall(r"^(?:\(.*?\))?(?:\*)?(--[a-z-]+)\[", "\n".join(offered), re.M)
    assert sorted(named) == wanted
    assert "(-f --file)-f[Continue the text in this file]:FILE:_files" in offered

    fish = shlex.quote(str(share / "fish" / "vendor_completions.d" / "based.fish"))
    home = {**os.environ, "HOME": str(installed.sources)}
    offered = quietly("fish", "-Nc", f"source {fish}; complete -C 'based --'", env=home)
    assert sorted(line.split("\t")[0] for line in offered.splitlines()) == wanted


@pytest.mark.parametrize("numpy", [True, False])
def test_python(installed, numpy):
    """The example of the module's own documentation; the text is that of the program. The bytes
    that it saves are a past."""
    module = installed.prefix / "share" / "based" / "based.py"
    example = re.search(r"\n\n((?:    .*\n|\n)+)", module.read_text())[1]
    example = re.sub("^    ", "", example, flags=re.M)
    assert example.count("models/stories260K-q8.bin") == 1
    example = example.replace("models/stories260K-q8.bin", str(MODEL))
    if not numpy:
        example = "import sys; sys.modules['numpy'] = None\n" + example
    more = """
session.load(past)
print(session.feed(model.encode(" and", 0))[0][5] == logits[0][5])"""
    told = quietly(sys.executable, "-c", example + more, cwd="/",
                   env={**os.environ, "PYTHONPATH": str(module.parent)})
    story = quietly(installed.prefix / "bin" / "based", MODEL, "-i", "One day, a cat", "-n", "40",
                    "-t", "0.8", "-s", "7", "--no-display-prompt")
    assert told == story + "True\n"


def test_the_tarball(tmp_path):
    """The same bytes each time, and small."""
    need("PACKAGE", "git")
    for name in "a", "b":
        quietly("make", "-s", "-C", ROOT, "dist", f"BUILD={tmp_path / name}")
    first, second = (tmp_path / name / f"based-{VERSION}.tar.gz" for name in "ab")
    assert first.read_bytes() == second.read_bytes()
    assert first.stat().st_size < 1_500_000
    with tarfile.open(first) as archive:
        names = archive.getnames()
    assert {name.split("/")[0] for name in names} == {f"based-{VERSION}"}
    assert [Path(name).name for name in names if name.endswith(".bin")] == ["stories260K-q8.bin"]
