"""Other runtimes beside this one, each through its C interface in the same loop.

The columns are those of `./run -b --csv`.

    python3 tests/peers.py --based MODEL.bin
        this one
    python3 tests/peers.py --llama DIR MODEL.gguf
        llama.cpp: DIR holds its shared libraries, for example those of the npm package
        @node-llama-cpp/linux-x64 (package/bins/linux-x64)
    python3 tests/peers.py --llama2c PROGRAM MODEL.bin
        llama2.c: run or runq
    python3 tests/peers.py --random SHAPE DTYPE OUT
        random weights in the shape of a Llama, Mamba, Mamba-2 or RWKV-7: gguf for llama.cpp (needs
        the PyPI package gguf), of a Llama also .bin for llama2.c and export.py; DTYPE is f32, q8 or
        q4
    options: -j THREADS (1), --prompts 128,512,...  --depths 0,1024,...  --repeats N (3)
             --texts 1,64,...  so many texts are written at once behind each depth (1)
             --cpu-time  seconds of processor time instead of a clock: for one thread on a machine
                         that others use

Flash attention is off in llama.cpp: on processors that is its faster setting. So is a cache that is
divided among many texts (kv_unified off). If several models are given, each test runs them one
after the other.
"""
import argparse
import csv
import ctypes
import glob
import multiprocessing
import os
import re
import resource
import statistics
import struct
import subprocess
import sys
import tempfile
import time

COLUMNS = ("model", "kernels", "threads", "weight bytes", "state bytes", "peak memory", "read GB/s",
           "test", "tokens/s", "spread", "GB/s", "% of read speed")
SHAPES = {
    "llama-15m": {"dim": 288, "layers": 6, "heads": 6, "hidden": 768, "vocab": 32000},
    "llama-110m": {"dim": 768, "layers": 12, "heads": 12, "hidden": 2048, "vocab": 32000},
    "llama-360m": {"dim": 1024, "layers": 24, "heads": 16, "hidden": 2816, "vocab": 50304},
    "llama-smollm2-135m": {"dim": 576, "layers": 30, "heads": 9, "kv_heads": 3, "hidden": 1536,
                           "vocab": 49152, "theta": 1e5},
    "mamba-370m": {"dim": 1024, "layers": 48, "inner": 2048, "state": 16, "rank": 64,
                   "vocab": 50280},
    "mamba2-370m": {"dim": 1024, "layers": 48, "inner": 2048, "state": 128, "heads": 32,
                    "vocab": 50288},
    "rwkv7-0.4b": {"dim": 1024, "layers": 24, "head": 64, "hidden": 4096, "vocab": 65536,
                   "ranks": {"w": 64, "a": 64, "v": 32, "g": 128}}}
DECODED, DECODED_TOGETHER = 128, 32


def row(options, path, name, memory, test, speeds, texts=1):
    size, mean = os.path.getsize(path), statistics.mean(speeds)
    spread = statistics.stdev(speeds) if len(speeds) > 1 else 0
    bandwidth = f"{mean / texts * size * 1e-9:.3f}" if test.startswith("tg") else ""
    csv.writer(sys.stdout, lineterminator="\n").writerow(
        [name, "", options.threads, size, "", memory, "", test, f"{mean:.2f}", f"{spread:.2f}",
         bandwidth, ""])
    sys.stdout.flush()


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

    def __init__(self, options, path):
        import based
        self.based, self.threads, self.name = based, options.threads, os.path.basename(path)
        self.model = based.Model(path, 0, based.build("-O3", "-fopenmp"))

    def begin(self, length, texts):
        self.sessions = None                            # never two of them in memory
        self.sessions = [self.based.Session(self.model, 1 if i else 128, self.threads)
                         for i in range(texts)]
        self.handles = (ctypes.c_void_p * texts)(*[s.handle for s in self.sessions])

    def clear(self):
        self.sessions[0].reset()

    def feed(self, ids):
        self.sessions[0].feed_last(ids)

    def share(self):
        """Gives the past of the first text to the others."""
        for session in self.sessions[1:]:
            session.copy_from(self.sessions[0])

    def step(self, ids):
        """One token for each text."""
        tokens, error = (ctypes.c_int32 * len(ids))(*ids), self.based.Error()
        self.based.check(self.model.lib.based_step_many(self.handles, tokens, len(ids),
                                                        ctypes.byref(error)), error)


class Llama:
    """llama.cpp through its C interface."""

    def __init__(self, options, path):
        paths = [glob.glob(f"{options.llama}/lib{name}.*")[0]
                 for name in ("ggml-base", "ggml", "llama")]
        _, ggml, lib = [ctypes.CDLL(path, ctypes.RTLD_GLOBAL) for path in paths]
        log = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
        self.lib, self.silent = lib, log(lambda *_: None)
        lib.llama_log_set(self.silent, None)
        ggml.ggml_backend_load_all_from_path(options.llama.encode())
        for function in (lib.llama_model_default_params, lib.llama_context_default_params):
            function.restype = Words
        for function in (lib.llama_model_load_from_file, lib.llama_init_from_model,
                         lib.llama_get_memory):
            function.restype = ctypes.c_void_p
        lib.llama_batch_get_one.restype = Batch
        lib.llama_decode.argtypes = ctypes.c_void_p, Batch
        lib.llama_init_from_model.argtypes = ctypes.c_void_p, Words
        lib.llama_get_memory.argtypes = lib.llama_free.argtypes = (ctypes.c_void_p,)
        lib.llama_memory_clear.argtypes = ctypes.c_void_p, ctypes.c_bool
        lib.llama_memory_seq_cp.argtypes = (ctypes.c_void_p, *[ctypes.c_int32] * 4)
        self.threads, self.context = options.threads, None
        self.name = f"llama.cpp, {os.path.basename(path)}"
        self.model = lib.llama_model_load_from_file(path.encode(), lib.llama_model_default_params())
        if not self.model:
            sys.exit(f"llama.cpp cannot open {path}")

    def begin(self, length, texts):
        """A new context for texts of so many tokens."""
        if self.context:
            self.lib.llama_free(self.context)
        p = self.lib.llama_context_default_params()
        default = list(p.word)
        # The threads of generation and of batches, both 4 by default; flash attention is the last
        # of four parameters that are -1, "automatic".
        threads = next(i for i in range(4, 16) if default[i:i + 2] == [4, 4])
        flash = max(i for i in range(threads, 16) if default[i] == 0xffffffff)
        # The cache is divided evenly; a text's part is a multiple of 256 tokens.
        self.texts, p.word[3], p.word[flash] = texts, texts, 0
        p.word[0] = texts * (length + 255 & ~255) if texts > 1 else length
        p.word[threads] = p.word[threads + 1] = self.threads
        self.context = self.lib.llama_init_from_model(self.model, p)
        if not self.context:
            sys.exit(f"llama.cpp has no memory for {texts} texts of {length} tokens")

    def clear(self):
        self.lib.llama_memory_clear(self.lib.llama_get_memory(self.context), True)

    def decode(self, batch):
        if self.lib.llama_decode(self.context, batch):
            sys.exit("llama.cpp could not decode")

    def feed(self, ids):
        for at in range(0, len(ids), 2048):
            part = (ctypes.c_int32 * len(ids[at:at + 2048]))(*ids[at:at + 2048])
            self.decode(self.lib.llama_batch_get_one(part, len(part)))

    def share(self):
        """Copies the past of the first text to the others."""
        memory = self.lib.llama_get_memory(self.context)
        for text in range(1, self.texts):
            self.lib.llama_memory_seq_cp(memory, 0, text, -1, -1)

    def step(self, ids):
        """One token for each text; the logits of all are wanted."""
        n = len(ids)
        tokens, one = (ctypes.c_int32 * n)(*ids), (ctypes.c_int32 * n)(*[1] * n)
        texts, wanted = (ctypes.c_int32 * n)(*range(n)), (ctypes.c_int8 * n)(*[1] * n)
        each = (ctypes.c_void_p * n)(*[ctypes.addressof(texts) + 4 * i for i in range(n)])
        pointers = [ctypes.addressof(array) for array in (one, each, wanted)]
        self.decode(Batch(n, ctypes.addressof(tokens), None, None, *pointers))


def serve(pipe, kind, options, path):
    """One runtime in a process of its own.

    It is told what to do, and answers with tokens per second and the most memory it ever had.
    """
    runtime = kind(options, path)
    pipe.send(runtime.name)
    while True:
        length, n, at_once, texts, repeat = pipe.recv()
        if not repeat:
            # A new context, with all of its past but the last n, at least one token.
            runtime.begin(length + 1, texts)
            runtime.feed([1] * max(length - n, 1))
            if texts > 1:
                runtime.share()
                runtime.step([1] * texts)       # llama.cpp copies only now
        elif at_once > 1 or texts == 1 and length == options.repeats * n:
            # A prompt, or writing from the very beginning.
            runtime.clear()
        ids, begun = [i * 7919 % 500 for i in range(n + texts)], options.now()
        for at in range(0, n if repeat else 0, at_once):
            if texts > 1:
                runtime.step(ids[at:at + texts])
            else:
                runtime.feed(ids[at:at + at_once])
        speed = n * texts / max(options.now() - begun, 1e-9)
        pipe.send((speed, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024))


def measure(options, runtimes):
    """Each test runs all models, one after the other in each repetition."""
    served = []
    for kind, path in runtimes:
        pipe, theirs = multiprocessing.Pipe()
        multiprocessing.Process(target=serve, args=(theirs, kind, options, path),
                                daemon=True).start()
        theirs.close()                  # so that reading fails if the process ends
        served.append((pipe, path, pipe.recv()))
    tests = [(f"pp{n}", n + 8, n, n, 1) for n in options.prompts]
    for texts in options.texts:
        n, many = (DECODED_TOGETHER, f" x {texts}") if texts > 1 else (DECODED, "")
        tests += [(f"tg{n}{many} @ {depth}", depth + options.repeats * n, n, 1, texts)
                  for depth in options.depths]
    for test, length, n, at_once, texts in tests:
        speeds, memory = [[] for _ in served], [0] * len(served)
        for repeat in range(options.repeats + 1):
            for i, (pipe, _, _) in enumerate(served):
                first = n if at_once > 1 else options.repeats * n
                pipe.send((length, n if repeat else first, at_once, texts, repeat))
                speed, memory[i] = pipe.recv()
                speeds[i] += [speed] * (repeat > 0)
        for i, (_, path, name) in enumerate(served):
            row(options, path, name, memory[i], test, speeds[i], texts)


def measure_llama2c(options, path):
    """A program that says its speed itself.

    The tokenizer must have as many tokens as the model; none of them is looked at. The time of a
    second, shorter run is subtracted, so that starting does not count.
    """
    vocab = 32000
    with tempfile.NamedTemporaryFile(suffix=".bin") as tokenizer:
        tokenizer.write(struct.pack("<i", 8) + b"".join(struct.pack("<fi", 0, 8) + b"%8d" % i
                                                        for i in range(vocab)))
        tokenizer.flush()

        def seconds(n):
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            out = subprocess.run([options.llama2c, path, "-z", tokenizer.name, "-t", "0.9",
                                  "-s", "1", "-n", str(n)], check=True, capture_output=True,
                                 env={**os.environ, "OMP_NUM_THREADS": str(options.threads)})
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            told = float(re.search(rb"achieved tok/s: ([\d.]+)", out.stderr).group(1))
            return after.ru_utime - before.ru_utime if options.cpu_time else (n - 1) / told

        speeds = [(200 - 20) / (seconds(200) - seconds(20)) for _ in range(options.repeats)]
    memory = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    program = os.path.basename(options.llama2c)
    row(options, path, f"llama2.c {program}", memory, "tg180 @ 20", speeds)


def settings(kind, shape):
    """What llama.cpp wants to know of a model: by methods of GGUFWriter."""
    dim, heads = shape["dim"], shape.get("heads")
    told = {"context_length": 65536, "embedding_length": dim, "block_count": shape["layers"],
            "feed_forward_length": shape.get("hidden", 0),
            "head_count": heads if kind == "llama" else 0}
    if kind == "llama":
        told |= {"head_count_kv": shape.get("kv_heads", heads), "layer_norm_rms_eps": 1e-5,
                 "rope_dimension_count": dim // heads, "rope_freq_base": shape.get("theta", 1e4)}
    elif kind == "rwkv7":
        told |= {"layer_norm_eps": 1e-5, "wkv_head_size": shape["head"]}
        for name, letter in (("decay", "w"), ("iclr", "a"), ("value_residual_mix", "v"),
                             ("gate", "g")):
            told[name + "_lora_rank"] = shape["ranks"][letter]
    else:
        told |= {"layer_norm_rms_eps": 1e-5, "ssm_conv_kernel": 4, "ssm_inner_size": shape["inner"],
                 "ssm_state_size": shape["state"], "ssm_time_step_rank": shape.get("rank", heads)}
        if kind == "mamba2":
            told["ssm_group_count"] = 1
    return told | {"vocab_size": shape["vocab"], "tokenizer_model": "no_vocab"}


def outer_tensors(kind, shape):
    """Tensors outside of layers, in llama.cpp's names.

    In all but RWKV the head is the embedding.
    """
    dim, matrix = shape["dim"], (shape["vocab"], shape["dim"])
    tensors = {"token_embd.weight": matrix, "output_norm.weight": (dim,)}
    if kind == "rwkv7":
        tensors |= {"output_norm.bias": (dim,), "token_embd_norm.weight": (dim,),
                    "token_embd_norm.bias": (dim,), "output.weight": matrix}
    return tensors


def layer_tensors(kind, shape, layer):
    dim, hidden, inner, state = (shape.get(name) for name in ("dim", "hidden", "inner", "state"))
    square, vector = (dim, dim), (dim,)
    if kind == "llama":
        keys = (dim // shape["heads"] * shape.get("kv_heads", shape["heads"]), dim)
        return {"attn_norm.weight": vector, "ffn_norm.weight": vector, "attn_q.weight": square,
                "attn_k.weight": keys, "attn_v.weight": keys, "attn_output.weight": square,
                "ffn_gate.weight": (hidden, dim), "ffn_down.weight": (dim, hidden),
                "ffn_up.weight": (hidden, dim)}
    if kind == "mamba":
        rank = shape["rank"]
        return {"attn_norm.weight": vector, "ssm_in.weight": (2 * inner, dim),
                "ssm_conv1d.weight": (inner, 4), "ssm_conv1d.bias": (inner,),
                "ssm_x.weight": (rank + 2 * state, inner), "ssm_dt.weight": (inner, rank),
                "ssm_dt.bias": (inner,), "ssm_a": (inner, state), "ssm_d": (inner,),
                "ssm_out.weight": (dim, inner)}
    if kind == "mamba2":
        heads, convolved = shape["heads"], inner + 2 * state
        return {"attn_norm.weight": vector, "ssm_in.weight": (inner + convolved + heads, dim),
                "ssm_conv1d.weight": (convolved, 4), "ssm_conv1d.bias": (convolved,),
                "ssm_dt.bias": (heads,), "ssm_a": (heads, 1), "ssm_d": (heads, 1),
                "ssm_norm.weight": (1, inner), "ssm_out.weight": (dim, inner)}
    tensors = {f"{name}.{part}": vector for name in ("attn_norm", "attn_norm_2", "time_mix_ln")
               for part in ("weight", "bias")}
    for name in ("w0", "a0", "v0", "k_k", "k_a", "r_k"):
        tensors[f"time_mix_{name}.weight"] = vector
    for name, rank in shape["ranks"].items():
        if name == "v" and not layer:           # never looked at, but llama.cpp expects this size
            rank = shape["ranks"]["a"]
        tensors |= {f"time_mix_{name}1.weight": (rank, dim),
                    f"time_mix_{name}2.weight": (dim, rank)}
    for name in ("receptance", "key", "value", "output"):
        tensors[f"time_mix_{name}.weight"] = square
    return tensors | {"time_mix_lerp_fused.weight": (6, 1, 1, dim),
                      "channel_mix_lerp_k.weight": vector, "channel_mix_key.weight": (hidden, dim),
                      "channel_mix_value.weight": (dim, hidden)}


def write_random(name, dtype, out):
    import numpy as np
    shape, kind = SHAPES[name], name.partition("-")[0]
    dim, layers = shape["dim"], shape["layers"]
    rng = np.random.default_rng(1)

    def matrix(rows, cols):
        values = rng.standard_normal((rows, cols), np.float32) / np.float32(cols ** 0.5)
        return values.astype(np.float32)

    if out.endswith(".bin"):
        # llama2.c: all layers of one matrix after each other, norms before or between.
        heads, hidden, vocab = shape["heads"], shape["hidden"], shape["vocab"]
        sizes = {name: size for name, size in layer_tensors("llama", shape, 0).items()
                 if len(size) == 2}
        norms = [np.ones(layers * dim, np.float32).tobytes()] * 2
        norms.append(np.ones(dim, np.float32).tobytes())
        header = struct.pack("<7i", dim, hidden, layers, heads, shape.get("kv_heads", heads), vocab,
                             1024)
        if dtype == "q8":
            header = struct.pack("<2i", 0x616b3432, 2) + header + b"\1" + struct.pack("<i", 64)
            header = header.ljust(256, b"\0") + b"".join(norms)
        with open(out, "wb") as f:
            f.write(header)
            for name, size in [("", (vocab, dim))] + list(sizes.items()):
                if dtype == "f32" and name in ("attn_q.weight", "ffn_gate.weight"):
                    f.write(norms[0])
                for _ in range(layers if name else 1):
                    values = matrix(*size)
                    if dtype == "q8":
                        blocks = values.reshape(-1, 64)
                        scale = np.abs(blocks).max(1, keepdims=True) / 127
                        f.write(np.rint(blocks / scale).astype(np.int8).tobytes() + scale.tobytes())
                    else:
                        f.write(values.tobytes())
            if dtype == "f32":
                f.write(norms[2] + np.zeros(1024 * dim // heads, np.float32).tobytes())
        return
    import gguf
    kinds, big = gguf.GGMLQuantizationType, {"f32": "F32", "q8": "Q8_0", "q4": "Q4_0"}[dtype]
    w = gguf.GGUFWriter(out, kind)
    for setting, value in settings(kind, shape).items():
        getattr(w, "add_" + setting)(value)

    def add(name, size):
        """Only large matrices are quantized, as by llama.cpp's llama-quantize."""
        if len(size) == 1 or not name.endswith(".weight") or re.search(r"norm|conv1d|lerp", name):
            constant = {"bias": 0, "ssm_a": -1}.get(name.split(".")[-1], 1)
            w.add_tensor(name, np.full(size, constant, np.float32))
        else:
            stored = kinds["F32" if re.search(r"time_mix_.[12]\.", name) else big]
            w.add_tensor(name, gguf.quants.quantize(matrix(*size), stored), raw_dtype=stored)

    for name, size in outer_tensors(kind, shape).items():
        add(name, size)
    for layer in range(layers):
        for name, size in layer_tensors(kind, shape, layer).items():
            add(f"blk.{layer}.{name}", size)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()


def numbers(text):
    return [int(n) for n in text.split(",") if n]


def main():
    parser = argparse.ArgumentParser(usage=__doc__, add_help=False)
    parser.add_argument("--based", nargs="+", default=[])
    parser.add_argument("--llama", nargs="+", default=[])
    parser.add_argument("--llama2c", nargs=2)
    parser.add_argument("--random", nargs=3)
    parser.add_argument("-j", dest="threads", type=int, default=1)
    parser.add_argument("--prompts", type=numbers, default=[128, 512, 2048])
    parser.add_argument("--depths", type=numbers, default=[0, 1024, 16384])
    parser.add_argument("--texts", type=numbers, default=[1])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--cpu-time", action="store_true")
    options = parser.parse_args()
    options.now = time.process_time if options.cpu_time else time.perf_counter
    if options.random:
        return write_random(*options.random)
    print(",".join(COLUMNS), flush=True)
    if options.llama2c:
        options.llama2c, model = options.llama2c
        measure_llama2c(options, model)
    if options.llama:
        options.llama, *models = options.llama
    else:
        models = []
    runtimes = [(Based, path) for path in options.based] + [(Llama, path) for path in models]
    if runtimes:
        measure(options, runtimes)


if __name__ == "__main__":
    main()
