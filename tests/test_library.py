"""The library as its users get it: the functions that it needs from elsewhere, that it has no
variables, that based.c works without tokenizer.c, and that C++ can use it."""
import array
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
CC = shlex.split(os.environ.get("CC", "cc"))
CXX = shlex.split(os.environ.get("CXX", "c++"))
FLAGS = ["-std=c99", "-O0", "-ffp-contract=off"]
STRICT = ["-Wall", "-Wextra", "-Wconversion", "-Wshadow", "-pedantic", "-Werror"]
# Else tables of pointers would be variables, which the loader fills in.
NO_PIC, LINK = ["-fno-pic", "-fno-pie"], ["-no-pie", "-lm"]
MODEL = ROOT / "models" / "stories260K.bin"


@pytest.fixture(scope="session")
def objects(once):
    """Source -> its object file; it is linked with LINK."""
    def make(place):
        for source in ("based.c", "tokenizer.c", "run.c"):
            subprocess.run([*CC, *FLAGS, *STRICT, *NO_PIC, "-c", ROOT / source, "-o",
                            place / f"{source}.o"], check=True)
    place = once("objects", make)
    return {source: place / f"{source}.o" for source in ("based.c", "tokenizer.c")}


@pytest.fixture
def program(objects, tmp_path):
    """program(compiler, flags...) -> ./run with a based.c of these flags."""
    def build(*command):
        subprocess.run([*command, *NO_PIC, "-c", ROOT / "based.c", "-o", tmp_path / "based.o"],
                       check=True)
        subprocess.run([*CC, "-o", tmp_path / "run", tmp_path / "based.o", objects["tokenizer.c"],
                        objects["tokenizer.c"].with_name("run.c.o"), *LINK], check=True)
        return tmp_path / "run"
    return build


def symbols(path):
    """[(kind, name)] of an object file, as nm tells them."""
    nm = subprocess.run(["nm", path], check=True, capture_output=True, text=True)
    return [tuple(line.split()[-2:]) for line in nm.stdout.splitlines()]


@pytest.mark.parametrize("source, own", [
    ("based.c", {"sqrtf", "log"}),
    ("tokenizer.c", {"based_model_config", "based_model_tokenizer"})])
def test_the_core_needs_nothing(source, own, tmp_path):
    """No heap, no files, no printing: string.h, and two functions of numbers, neither of which can
    change a logit. based.c needs nothing of tokenizer.c; tokenizer.c needs a model's section."""
    allowed = {"memcpy", "memmove", "memset", "memcmp", "strlen", *own,
               "__cpu_model", "__cpu_features2", "_GLOBAL_OFFSET_TABLE_", "__stack_chk_fail"}
    subprocess.run([*CC, *FLAGS, "-DBASED_FREESTANDING", "-c", ROOT / source, "-o",
                    tmp_path / "out.o"], check=True)
    found = symbols(tmp_path / "out.o")
    assert {name for kind, name in found if kind == "U"} <= allowed


@pytest.mark.parametrize("source", ["based.c", "tokenizer.c"])
def test_there_are_no_variables(source, objects):
    assert [name for kind, name in symbols(objects[source]) if kind in "bBdDcC"] == []


def test_names(objects):
    """What the library adds to a program begins with based_."""
    for path in objects.values():
        names = [name for kind, name in symbols(path) if kind.isupper() and kind != "U"]
        assert names and all(name.startswith("based_") for name in names)


PROGRAM = r"""
#include "based.h"
#include <cstdio>
#include <memory>
#include <string>
#include <vector>

static std::string story(const based_model *model, const std::string &prompt, int tokens) {
    based_error e;
    based_tokenizer t;
    std::unique_ptr<based_session, void (*)(based_session *)>
        s(based_session_new(model, 16, &e), based_session_free);
    if (!s || based_tokenizer_open(&t, model, &e)) return e.text;
    std::vector<int32_t> ids(based_encode_bound(&t, prompt.size()));
    std::vector<uint64_t> scratch(based_encode_scratch(&t, prompt.size()) / 8 + 1);
    int64_t n = based_encode(&t, prompt.data(), prompt.size(), BASED_ADD_BOS, ids.data(),
                             scratch.data(), &e);
    if (n < 0 || based_feed(s.get(), ids.data(), static_cast<size_t>(n), nullptr, &e))
        return e.text;
    based_sampler sampler = based_sampler();
    sampler.top_p = sampler.repeat_penalty = 1.0f;
    sampler.vocab = t.size;
    std::vector<uint64_t> memory(based_sampler_bytes(&sampler) / 8 + 1);
    if (based_sampler_init(&sampler, memory.data(), memory.size() * 8, &e)) return e.text;
    based_decoder decoder = based_decoder();
    std::vector<char> text(based_decode_bound(&t));
    std::string all;
    for (size_t i = 0; i < static_cast<size_t>(n); i++)
        all.append(text.data(), based_decode(&t, &decoder, ids[i], text.data()));
    for (int i = 0; i < tokens; i++) {
        int32_t id = based_sample(&sampler, based_logits(s.get()));
        all.append(text.data(), based_decode(&t, &decoder, id, text.data()));
        if (based_step(s.get(), id, &e)) return e.text;
    }
    return all;
}

int main(int argc, char **argv) {
    based_error e;
    std::unique_ptr<based_model, void (*)(based_model *)>
        model(based_open(argc > 1 ? argv[1] : "", 0, &e), based_close);
    std::puts(model ? story(model.get(), "The big dog", 40).c_str() : e.text);
}
"""


@pytest.mark.skipif(not shutil.which(CXX[0]), reason="no C++ compiler")
@pytest.mark.parametrize("std", ["c++11", "c++17"])
def test_a_program_in_cxx(std, objects, tmp_path):
    (tmp_path / "story.cc").write_text(PROGRAM)
    subprocess.run([*CXX, f"-std={std}", "-O0", *STRICT, f"-I{ROOT}", "-o", tmp_path / "story",
                    tmp_path / "story.cc", *objects.values(), *LINK], check=True)
    story = subprocess.run([tmp_path / "story", MODEL], check=True, capture_output=True).stdout
    plain = subprocess.run([ROOT / "run", MODEL, "-t", "0", "-n", "40", "-i", "The big dog"],
                           check=True, capture_output=True)
    assert story == plain.stdout and len(story) > 80


@pytest.mark.parametrize("compiler", ["gcc", "clang-14"])
def test_one_file(compiler, tmp_path):
    """make amalgamation: one C file and its header, without a warning, for C and for C++."""
    if not shutil.which(compiler):
        pytest.skip(f"no {compiler}")
    subprocess.run(["make", "-s", "-C", ROOT, f"BUILD={tmp_path}", "amalgamation"], check=True)
    for more in (["-DBASED_FREESTANDING"], []):         # the object that stays is the whole library
        subprocess.run([compiler, "-std=c99", "-O0", *STRICT, *more, "-c", "based_all.c"],
                       cwd=tmp_path, check=True)
    (tmp_path / "ids.c").write_text(IDS_ONLY.replace("based.h", "based_all.h"))
    (tmp_path / "story.cc").write_text(PROGRAM.replace("based.h", "based_all.h"))
    subprocess.run([compiler, "-std=c99", *STRICT, "-o", "ids", "ids.c", "based_all.o", "-lm"],
                   cwd=tmp_path, check=True)
    assert run_ids(tmp_path / "ids") == fingerprint_of_ids(tmp_path)
    if shutil.which(CXX[0]):
        subprocess.run([*CXX, "-std=c++11", *STRICT, "-o", "story", "story.cc", "based_all.o",
                        "-lm"], cwd=tmp_path, check=True)
        plain = subprocess.run([ROOT / "run", MODEL, "-t", "0", "-n", "40", "-i", "The big dog"],
                               check=True, capture_output=True)
        story = subprocess.run([tmp_path / "story", MODEL], check=True, capture_output=True)
        assert story.stdout == plain.stdout


IDS_ONLY = r"""
#include "based.h"
#include <stdio.h>

int main(int argc, char **argv) {
    const int32_t ids[] = { 1, 403, 407, 261, 378 };
    size_t bytes;
    based_error e;
    based_model *m = based_open(argc > 1 ? argv[1] : "", 0, &e);
    based_session *s = m ? based_session_new(m, 4, &e) : NULL;
    if (!s || based_feed(s, ids, 5, NULL, &e)) return puts(e.text), 1;
    printf("%08x %d\n", (unsigned)based_hash(0, based_logits(s), based_width(m)),
           based_model_tokenizer(m, &bytes) && bytes == based_model_config(m)->tokenizer_bytes);
    based_session_free(s);
    based_close(m);
    return 0;
}
"""


def test_ids_need_no_tokenizer(objects, tmp_path):
    """A program that feeds ids links with based.c alone, and computes what ./run computes."""
    (tmp_path / "ids.c").write_text(IDS_ONLY)
    subprocess.run([*CC, *FLAGS, *STRICT, f"-I{ROOT}", "-o", tmp_path / "ids", tmp_path / "ids.c",
                    objects["based.c"], *LINK], check=True)
    assert run_ids(tmp_path / "ids") == fingerprint_of_ids(tmp_path)


def run_ids(program):
    done = subprocess.run([program, MODEL], check=True, capture_output=True, text=True)
    return done.stdout


def fingerprint_of_ids(directory):
    """What IDS_ONLY must print, from the logits that ./run writes."""
    logits = directory / "logits"
    subprocess.run([ROOT / "run", MODEL, "--tokens", "1 403 407 261 378", "-n", "0",
                    "--dump-logits", logits], check=True, capture_output=True)
    values = array.array("I", logits.read_bytes())[-512:]
    if sys.byteorder == "big":
        values.byteswap()
    fingerprint = 0
    for bits in values:
        fingerprint = (fingerprint ^ bits) * 0x9e3779b1 & 0xffffffff
        fingerprint ^= fingerprint >> 15
    return f"{fingerprint:08x} 1\n"


@pytest.mark.skipif(platform.machine() != "x86_64", reason="flags of x86-64")
@pytest.mark.parametrize("compiler", ["gcc -ffp-contract=fast -fexpensive-optimizations",
                                      "clang-14"])
def test_no_flag_is_needed(compiler, program):
    """based.c itself forbids fused operations, also where the processor has them. (gcc fuses from
    -O2 on, or with its flag here, which compiles faster.)"""
    if not shutil.which(compiler.split()[0]):
        pytest.skip(f"no {compiler.split()[0]}")

    def fingerprint(run):
        done = subprocess.run([run, MODEL, "-t", "0", "-n", "30", "-v"], check=True,
                              capture_output=True, text=True,
                              env={**os.environ, "BASED_KERNELS": "plain"})
        return re.search(r"logits #\w+", done.stderr).group()
    built = program(*compiler.split(), "-O1", "-mfma")
    assert fingerprint(built) == fingerprint(ROOT / "run")


@pytest.mark.skipif(platform.machine() != "x86_64", reason="flags of x86-64")
@pytest.mark.parametrize("flags", ["-O1 -ffast-math", "-O1 -mfpmath=387"])
def test_a_build_that_cannot_keep_the_promises_says_so(flags, program):
    """Fused, rearranged or wider float operations give other bits; such a build opens no model."""
    built = program(*CC, "-std=c99", *flags.split())
    done = subprocess.run([built, MODEL, "-n", "1"], capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout == ""
    assert "this build fuses or widens float operations" in done.stderr
