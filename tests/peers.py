"""Speed and memory of based.c beside llama.cpp, on the machine where this runs.

    python3 tests/peers.py [--rows REGEX] [--llama DIR] [--machine NAME] [--out FILE]

Measures everything that speed.md tells of a PC, and appends a line for each measurement to
tests/speed.csv, from which tests/speed.py makes the page and its plots. Takes about eight minutes,
10 GB of memory and 1.5 GB of build/, where the models are made, with random weights. Progress is
written to stderr. It needs a C compiler, make and numpy.

    --rows      only measurements whose name this regular expression finds; a name is like
                "based-360m-q8.bin beside llama-360m.gguf, writing after 1024, 2 threads"
    --llama     llama.cpp's shared libraries. Without it, the current ones come from npm into
                build/llama (the package @node-llama-cpp/linux-x64), unless they are there
    --machine   what to write in front of the processor's name
    taskset -c 0,1 python3 tests/peers.py       on two processors of a larger machine

Programs that are compared take turns in each repetition. They are called through their C
interfaces in the same loop. Flash attention is off in llama.cpp: on processors that is its faster
setting. So is a cache that is divided among many texts (kv_unified off).
"""
import argparse
import csv
import ctypes
import datetime
import glob
import json
import multiprocessing
import os
import platform
import re
import resource
import shutil
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

import based
import lookup

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
BUILD = ROOT / "build"
COLUMNS = ("date", "machine", "program", "kernels", "threads", "model", "what", "value", "spread",
           "unit")

# What takes turns: models (this runtime's, then llama.cpp's), kernels ("": the best; avx512vnni
# leaves AMX out where there is AMX), numbers of threads, and tests. A process runs all tests of a
# line, and its memory is told, so a test with less memory comes first.
TURNS = [
    (("based-360m-q8.bin", "llama-360m.gguf"), "", (1, 2),
     ("writing after 0", "writing after 1024", "writing after 4096", "reading 512",
      "writing 64 texts after 1024")),
    (("based-360m-q8.bin", "llama-360m.gguf"), "avx512vnni", (2,),
     ("reading 512", "writing 64 texts after 1024")),
    (("smollm2-135m-q8.bin", "llama-smollm2-135m.gguf"), "", (1, 2),
     ("writing after 0", "writing after 1024", "reading 512")),
    (("based-360m-q8.bin",), "", (2,), ("writing after 16384",))]
# What `./run -b` measures with two threads, in its order.
ALONE = [
    ("based-82m-english.bin", ("writing after 2048", "writing 64 texts after 2048",
                               "writing after 0", "writing after 1024", "writing after 16384")),
    ("based-360m-q8.bin", ("writing after 2048",)),
    ("based-360m-q4.bin", ("writing after 2048",)),
    ("based-30m-q8.bin", ("writing after 0",)),
    ("based-15m-q8.bin", ("writing after 0",))]

SHAPES = {
    "llama-360m": {"dim": 1024, "layers": 24, "heads": 16, "kv_heads": 16, "hidden": 2816,
                   "vocab": 50304, "theta": 1e4},
    "llama-smollm2-135m": {"dim": 576, "layers": 30, "heads": 9, "kv_heads": 3, "hidden": 1536,
                           "vocab": 49152, "theta": 1e5}}


def say(*what):
    print(*what, file=sys.stderr, flush=True)


# ---- Where the results go

class Table:
    """The data file: appends a line for each measurement."""

    def __init__(self, options):
        cpu = Path("/proc/cpuinfo")
        name = re.search("model name.*: (.*)", cpu.read_text() if cpu.exists() else "")
        processor = name[1] if name else platform.machine()
        self.machine = ", ".join(filter(None, (options.machine, processor, f"{cores()} cores")))
        self.out, self.wanted = Path(options.out), re.compile(options.rows)
        version = re.search(r'BASED_VERSION "(.*)"', (ROOT / "based.h").read_text())[1]
        commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, text=True,
                                capture_output=True).stdout.strip()
        self.based = " ".join(filter(None, ("based.c", version, commit)))

    def wants(self, model, what, threads):
        plural = "s" * (threads > 1)
        return self.wanted.search(f"{model}, {what}, {threads} thread{plural}")

    def add(self, program, kernels, threads, model, what, value, unit, spread=""):
        row = (datetime.date.today(), self.machine, program, kernels, threads, Path(model).stem,
               what, f"{value:.4g}", spread and f"{spread:.2g}", unit)
        new = not self.out.exists()
        with open(self.out, "a", newline="") as f:
            lines = csv.writer(f, lineterminator="\n")
            lines.writerows([COLUMNS, row] if new else [row])
        say("   ", *row[2:])


def cores():
    return len(os.sched_getaffinity(0))


# ---- Programs that take turns

class Words(ctypes.Structure):
    """A struct of parameters: as many 32-bit words as any version has.

    The parameters are found by their default values.
    """
    _fields_ = [("word", ctypes.c_uint32 * 64)]


class Batch(ctypes.Structure):
    _fields_ = [("n", ctypes.c_int32)]
    _fields_ += [(name, ctypes.c_void_p)
                 for name in ("token", "embd", "pos", "n_seq", "seq", "logits")]


class Based:
    """This runtime."""

    def __init__(self, library, path, threads):
        self.model, self.threads = based.Model(path, 0, library), threads
        library.based_model_kernels.restype = ctypes.c_char_p
        library.based_model_kernels.argtypes = (ctypes.c_void_p,)
        self.kernels = library.based_model_kernels(self.model.handle).decode()

    def begin(self, past, more, texts):
        self.sessions = None                            # never two of them in memory
        self.sessions = [based.Session(self.model, 1 if i else 128, self.threads)
                         for i in range(texts)]
        self.handles = (ctypes.c_void_p * texts)(*[s.handle for s in self.sessions])
        self.feed(past)
        for session in self.sessions[1:]:
            session.copy_from(self.sessions[0])

    def clear(self):
        self.sessions[0].reset()

    def feed(self, ids):
        self.sessions[0].feed_last(ids)

    def step(self, ids):
        """One token for each text."""
        tokens, error = (ctypes.c_int32 * len(ids))(*ids), based.Error()
        based.check(self.model.lib.based_step_many(self.handles, tokens, len(ids),
                                                   ctypes.byref(error)), error)


class Llama:
    """llama.cpp through its C interface."""
    kernels = ""

    def __init__(self, directory, path, threads):
        paths = [glob.glob(f"{directory}/lib{name}.*")[0]
                 for name in ("ggml-base", "ggml", "llama")]
        _, ggml, lib = [ctypes.CDLL(path, ctypes.RTLD_GLOBAL) for path in paths]
        log = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
        self.lib, self.silent = lib, log(lambda *_: None)
        lib.llama_log_set(self.silent, None)
        ggml.ggml_backend_load_all_from_path(str(directory).encode())
        for function in (lib.llama_model_default_params, lib.llama_context_default_params):
            function.restype = Words
        for function in (lib.llama_model_load_from_file, lib.llama_init_from_model,
                         lib.llama_get_memory):
            function.restype = ctypes.c_void_p
        lib.llama_batch_get_one.restype = Batch
        lib.llama_decode.argtypes = ctypes.c_void_p, Batch
        lib.llama_init_from_model.argtypes = ctypes.c_void_p, Words
        lib.llama_get_memory.argtypes = lib.llama_free.argtypes = (ctypes.c_void_p,)
        lib.llama_set_n_threads.argtypes = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int32
        lib.llama_memory_clear.argtypes = ctypes.c_void_p, ctypes.c_bool
        lib.llama_memory_seq_cp.argtypes = (ctypes.c_void_p, *[ctypes.c_int32] * 4)
        self.threads, self.context = threads, None
        self.model = lib.llama_model_load_from_file(str(path).encode(),
                                                    lib.llama_model_default_params())
        if not self.model:
            sys.exit(f"llama.cpp cannot open {path}")

    def begin(self, past, more, texts):
        """A new context for texts with this past and so many tokens behind it."""
        if self.context:
            self.lib.llama_free(self.context)
        p, length = self.lib.llama_context_default_params(), len(past) + more
        default = list(p.word)
        # The threads of generation and of batches, both 4 by default; flash attention is the last
        # of four parameters that are -1, "automatic".
        threads = next(i for i in range(4, 16) if default[i:i + 2] == [4, 4])
        flash = max(i for i in range(threads, 16) if default[i] == 0xffffffff)
        # The cache is divided evenly; a text's part is a multiple of 256 tokens.
        p.word[3], p.word[flash] = texts, 0
        p.word[0] = texts * (length + 255 & ~255) if texts > 1 else length
        self.context = self.lib.llama_init_from_model(self.model, p)
        if not self.context:
            sys.exit(f"llama.cpp has no memory for {texts} texts of {length} tokens")
        self.lib.llama_set_n_threads(self.context, self.threads, cores())   # the past is not timed
        self.feed(past)
        self.lib.llama_set_n_threads(self.context, self.threads, self.threads)
        for text in range(1, texts):
            self.lib.llama_memory_seq_cp(self.lib.llama_get_memory(self.context), 0, text, -1, -1)
        if texts > 1:
            self.step([1] * texts)                      # it copies only now

    def clear(self):
        self.lib.llama_memory_clear(self.lib.llama_get_memory(self.context), True)

    def decode(self, batch):
        if self.lib.llama_decode(self.context, batch):
            sys.exit("llama.cpp could not decode")

    def feed(self, ids):
        for at in range(0, len(ids), 2048):
            part = (ctypes.c_int32 * len(ids[at:at + 2048]))(*ids[at:at + 2048])
            self.decode(self.lib.llama_batch_get_one(part, len(part)))

    def step(self, ids):
        """One token for each text; the logits of all are wanted."""
        n = len(ids)
        tokens, one = (ctypes.c_int32 * n)(*ids), (ctypes.c_int32 * n)(*[1] * n)
        texts, wanted = (ctypes.c_int32 * n)(*range(n)), (ctypes.c_int8 * n)(*[1] * n)
        each = (ctypes.c_void_p * n)(*[ctypes.addressof(texts) + 4 * i for i in range(n)])
        pointers = [ctypes.addressof(array) for array in (one, each, wanted)]
        self.decode(Batch(n, ctypes.addressof(tokens), None, None, *pointers))


class Test:
    """What a test's name says: tokens that are read, or the past; texts; tokens of a repetition."""

    def __init__(self, what):
        verb, texts, n = re.fullmatch(r"(reading|writing)(?: (\d+) texts)?(?: after)? (\d+)",
                                      what).groups()
        self.what, self.reads, self.texts = what, verb == "reading", int(texts or 1)
        self.past = 0 if self.reads else int(n)
        self.n, self.repeats = (int(n), 3) if self.reads else (64, 3) if not texts else (8, 2)


def serve(pipe, kind, library, path, kernels, threads):
    """One runtime in a process of its own.

    It is told a test and a repetition, of which the first is not timed, and answers with tokens
    per second and the most memory it ever had.
    """
    if kernels:
        os.environ["BASED_KERNELS"] = kernels
    runtime = kind(library, path, threads)
    pipe.send(runtime.kernels)
    while True:
        test, repeat = pipe.recv()
        ids = [i * 7919 % 500 for i in range(test.n + test.texts)]
        if not repeat:
            runtime.begin([1] * (test.past or 32), test.n * test.repeats, test.texts)
        if test.past == 0:
            runtime.clear()
        begun = time.perf_counter()
        for at in range(0, test.n if repeat else 0, test.n if test.reads else 1):
            if test.texts > 1:
                runtime.step(ids[at:at + test.texts])
            else:
                runtime.feed(ids[at:test.n if test.reads else at + 1])
        speed = test.n * test.texts / max(time.perf_counter() - begun, 1e-9)
        pipe.send((speed, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024))


def take_turns(table, runtimes, kernels, threads, tests):
    """Each test runs all programs, one after the other in each repetition; adds their rows."""
    context, served = multiprocessing.get_context("fork"), []
    for program, kind, library, path in runtimes:
        pipe, theirs = context.Pipe()
        context.Process(target=serve, args=(theirs, kind, library, path, kernels, threads),
                        daemon=True).start()
        theirs.close()                  # so that reading fails if the process ends
        served.append((pipe, program, path))
    kernels = [pipe.recv() for pipe, _, _ in served][0]
    for test in map(Test, tests):
        speeds, memory = [[] for _ in served], [0] * len(served)
        for repeat in range(test.repeats + 1):
            for i, (pipe, _, _) in enumerate(served):
                pipe.send((test, repeat))
                speed, memory[i] = pipe.recv()
                speeds[i] += [speed] * (repeat > 0)
        for i, (_, program, path) in enumerate(served):
            add = [program, kernels, threads, path]
            table.add(*add, test.what, statistics.median(speeds[i]), "tokens/s",
                      statistics.stdev(speeds[i]))
            if not test.reads:
                table.add(*add, f"most memory, {test.what}", memory[i] / 1e6, "MB")


# ---- Programs alone

def run_bench(table, path, threads, wanted):
    """`./run -b`, which also measures the memory's speed, up to the last test that is wanted."""
    command = [ROOT / "run", path, "-b", "--csv", "-j", str(threads)]
    say(*command)
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                          text=True) as bench:
        for row in csv.DictReader(bench.stdout):
            # "tg128 @ 1024" is behind 1,024 tokens; "tg16 x 64": 64 texts behind the last prompt
            what = re.sub(r"tg\d+ @", "writing after", row["test"])
            what = re.sub(r"tg\d+ x (\d+)", r"writing \1 texts after 2048", what)
            what = what.replace("writing 1 texts", "writing")
            if what in wanted:
                add = [table.based, row["kernels"], threads, path]
                table.add(*add, what, float(row["tokens/s"]), "tokens/s", float(row["spread"]))
                if "texts" not in what:
                    table.add(*add, f"share of the memory's speed, {what}",
                              float(row["% of read speed"]), "%")
            if what == wanted[-1]:
                table.add(*add, "the memory's speed", float(row["read GB/s"]), "GB/s")
                table.add(*add, "most memory", float(row["peak memory"]) / 1e6, "MB")
                bench.terminate()
                break


# ---- Models and programs

def library_of_llama(options):
    """The directory with llama.cpp's libraries, and the program's name with its version."""
    directory = Path(options.llama or BUILD / "llama" / "package")
    if not directory.exists():
        name = {"x86_64": "x64", "aarch64": "arm64"}.get(platform.machine(), platform.machine())
        say("npm pack @node-llama-cpp/linux-" + name)
        packed = subprocess.run(["npm", "pack", "--silent", "@node-llama-cpp/linux-" + name],
                                cwd=BUILD, check=True, stdout=subprocess.PIPE, text=True)
        (BUILD / "llama").mkdir()
        subprocess.run(["tar", "xzf", BUILD / packed.stdout.split()[-1], "-C", BUILD / "llama"],
                       check=True)
    libraries = [*directory.rglob("libllama.*")]
    if not libraries:
        sys.exit(f"{directory}: no libllama in it")
    directory = libraries[0].parent
    told = json.loads((directory / "_nlcBuildMetadata.json").read_text())
    version = told["buildOptions"]["llamaCpp"]["release"].lstrip("v")
    say(f"llama.cpp {version}: {directory}")
    return directory, f"llama.cpp {version}"


def without_amx(directory):
    """The same libraries without the one for processors with AMX."""
    links = Path(tempfile.mkdtemp(prefix="llama-"))
    for path in directory.glob("lib*"):
        if "sapphirerapids" not in path.name:
            (links / path.name).symlink_to(path.resolve())
    return links


def model(name):
    """A shipped model, or one with random weights, which is made once."""
    path = ROOT / "models" / name if (ROOT / "models" / name).exists() else BUILD / name
    if not path.exists():
        say("random weights for", path)
        unfinished = path.with_suffix(".unfinished")
        if name.endswith(".gguf"):
            write_gguf(SHAPES[path.stem], unfinished)
        else:
            shape, dtype = path.stem.rsplit("-", 1)
            described = HERE / "data" / f"{shape}.json"
            shape = described if described.exists() else shape
            subprocess.run([sys.executable, ROOT / "export.py", "--random", shape, unfinished,
                            "--dtype", dtype], check=True, stdout=subprocess.DEVNULL)
        unfinished.rename(path)
        with open(path, "rb") as file:      # read anew, it may lie in memory in pages of 2 MB
            os.fsync(file)
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return path


def write_gguf(shape, out):
    """Random weights of 8 bits for llama.cpp, in the shape of a Llama."""
    rng, dim, layers, heads = np.random.default_rng(1), *map(shape.get, ("dim", "layers", "heads"))
    vector, square, wide = (dim,), (dim, dim), (shape["hidden"], dim)
    keys = (dim // heads * shape["kv_heads"], dim)
    told = {"general.architecture": "llama", "tokenizer.ggml.model": "no_vocab"}
    told |= {f"llama.{name}": value for name, value in {
        "context_length": 65536, "embedding_length": dim, "block_count": layers,
        "feed_forward_length": shape["hidden"], "vocab_size": shape["vocab"],
        "attention.head_count": heads, "attention.head_count_kv": shape["kv_heads"],
        "attention.layer_norm_rms_epsilon": 1e-5, "rope.dimension_count": dim // heads,
        "rope.freq_base": shape["theta"]}.items()}
    tensors = {"token_embd": (shape["vocab"], dim), "output_norm": vector}     # also the head
    for i in range(layers):
        tensors |= {f"blk.{i}.{name}": size for name, size in {
            "attn_norm": vector, "ffn_norm": vector, "attn_q": square, "attn_k": keys,
            "attn_v": keys, "attn_output": square, "ffn_gate": wide, "ffn_down": wide[::-1],
            "ffn_up": wide}.items()}

    def text(value):
        return struct.pack("<Q", len(value)) + value.encode()

    header = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(told))
    for name, value in told.items():
        code, packed = ((8, text(value)) if isinstance(value, str) else
                        (6, struct.pack("<f", value)) if isinstance(value, float) else
                        (4, struct.pack("<I", value)))
        header += text(name) + struct.pack("<I", code) + packed
    offset = 0
    for name, size in tensors.items():
        # type 0: floats. Type 8: blocks of a scale, a float16, and 32 integers
        header += text(name + ".weight") + struct.pack(
            f"<I{len(size)}QIQ", len(size), *size[::-1], 8 if len(size) > 1 else 0, offset)
        stored = np.prod(size) // 32 * 34 if len(size) > 1 else 4 * dim
        offset += int(stored) + 31 & ~31
    with open(out, "wb") as f:
        f.write(header + bytes(-len(header) % 32))
        for size in tensors.values():
            data = np.ones(dim, "<f4")
            if len(size) > 1:
                data = np.zeros(np.prod(size) // 32, [("scale", "<f2"), ("weights", "i1", 32)])
                data["scale"] = 1 / (73 * size[1] ** 0.5)   # 73: the integers' standard deviation
                data["weights"] = rng.integers(-127, 128, (len(data), 32), np.int8)
            f.write(data.tobytes() + bytes(-data.nbytes % 32))


def main(arguments=None):
    parser = argparse.ArgumentParser(usage=__doc__, add_help=False)
    parser.add_argument("--rows", default="")
    parser.add_argument("--llama")
    parser.add_argument("--machine")
    parser.add_argument("--out", default=HERE / "speed.csv")
    options = parser.parse_args(arguments)
    table, begun = Table(options), time.time()
    BUILD.mkdir(exist_ok=True)
    say("make run, and the library")
    subprocess.run(["make", "-s", "run"], cwd=ROOT, check=True)
    library = based.build("-O3", "-fopenmp", "-fno-trapping-math")
    llama = None
    for names, kernels, threads, tests in TURNS:
        if kernels and "amx_int8" not in Path("/proc/cpuinfo").read_text():
            continue
        for many in threads:
            label = ", ".join(filter(None, (" beside ".join(names), kernels)))
            wanted = [test for test in tests if table.wants(label, test, many)]
            if not wanted or many > cores():
                continue
            paths = [model(name) for name in names]
            if len(paths) > 1 and not llama:
                llama = library_of_llama(options)
            say(f"{label}: {many} threads (after {time.time() - begun:.0f} s)")
            directory = without_amx(llama[0]) if kernels else llama and llama[0]
            runtimes = [(table.based, Based, library, paths[0])]
            runtimes += [(llama[1], Llama, directory, path) for path in paths[1:]]
            take_turns(table, runtimes, kernels, many, wanted)
            if kernels:
                shutil.rmtree(directory)
    for name, wanted in ALONE:
        if table.wants(name, "run -b", 2):
            run_bench(table, model(name), 2, wanted)
    if table.wants("lookup", "guesses", 1):
        for title, name, tokens, guesses, off, on in lookup.measure(2):
            table.add(table.based, "", 1, name, f"guesses: {title}; {guesses} right", off / on,
                      "times as fast")
    say(f"{time.time() - begun:.0f} s")


if __name__ == "__main__":
    main()
