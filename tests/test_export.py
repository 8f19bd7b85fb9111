"""export.py: what it writes means the same as what it read; what it cannot read gives one line; a
file that exists is replaced by a whole one or not at all."""
import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

np = pytest.importorskip("numpy")
pytest.importorskip("safetensors")
import based            # noqa: E402
import export           # noqa: E402
import origins          # noqa: E402
import reference        # noqa: E402
from models import constant_memory                              # noqa: E402
from models.origins import hazyresearch                         # noqa: E402
from origins import EMBEDDING, HEAD, TWELVE                     # noqa: E402

ROOT = Path(export.__file__).resolve().parent
LAYER = "transformer.layers."


def run(capsys, *arguments):
    """Calls export.py; returns (exit status, stdout, stderr)."""
    try:
        status = export.main([str(a) for a in arguments])
    except SystemExit as e:
        status = e.code
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def fails(capsys, pattern, *arguments):
    """export.py must refuse these arguments with one line on stderr that says why, and write
    nothing."""
    out = Path(arguments[-1])
    status, stdout, stderr = run(capsys, *arguments)
    lines = [line for line in stderr.splitlines() if ": note: " not in line]
    assert status == 1 and stdout == "" and len(lines) == 1, stderr
    assert lines[0].startswith("export.py: ") and re.search(pattern, lines[0]), lines[0]
    assert not out.exists() and not list(out.parent.glob("*.part"))


def exported(capsys, source, out, *options):
    status, stdout, stderr = run(capsys, source, out, *options)
    assert status == 0, stderr
    return reference.read(out)


def twelve(directory, change=None, settings=None, form="safetensors"):
    """A source directory of the 12-token model; change(state) alters its tensors, settings updates
    its config.json."""
    state = origins.twelve_state()
    if change:
        change(state)
    return origins.write_based(directory / "source", state, {**TWELVE, **(settings or {})}, form)


# --------------------------------------------------------------------------------------------------
# llama2.c

@pytest.mark.parametrize("header", [(24, 40, 2, 4, 4, 30, 12), (24, 17, 3, 6, 2, -30, 40),
                                    (16, 8, 1, 1, 1, 9, 25)])
def test_llama(capsys, tmp_path, header):
    """The same logits as the original up to its context; with and without grouped heads and a head
    of its own."""
    source = origins.write_llama(tmp_path / "llama.bin", np.random.default_rng(5), header)
    m = exported(capsys, source, tmp_path / "out.bin")
    tokens = np.random.default_rng(6).integers(0, abs(header[5]), header[6])
    expected = origins.llama_logits(source, tokens)
    assert np.abs(reference.run(m, tokens) - expected).max() < 1e-6
    got = based.Session(based.Model(tmp_path / "out.bin")).feed(tokens)
    assert np.abs(got - expected).max() < 2e-5
    assert all(l.window == header[6] for l in m.layer)


def test_llama_window(capsys, tmp_path):
    source = origins.write_llama(tmp_path / "llama.bin", np.random.default_rng(5),
                                 (24, 40, 2, 4, 4, 30, 12))
    assert exported(capsys, source, tmp_path / "out.bin", "--window", 5).layer[1].window == 5


def test_llama_sizes(capsys, tmp_path):
    """One byte more or less than the header asks for is refused, with both numbers."""
    source = origins.write_llama(tmp_path / "llama.bin", np.random.default_rng(5),
                                 (24, 40, 2, 4, 4, 30, 12))
    data = Path(source).read_bytes()
    for bad in (data[:-1], data + b"\0"):
        Path(source).write_bytes(bad)
        fails(capsys, rf"{len(bad):,} bytes.*{len(data):,}", source, tmp_path / "out.bin")


STORIES = Path(based.ROOT) / "models" / "stories260K.bin"
STORY = Path(__file__).parent / "golden" / "stories260K-greedy.txt"


def constant(tmp_path, source=STORIES, text=STORY.read_bytes()):
    """Arguments that put a model on constant memory, fitted to one story."""
    (tmp_path / "text.txt").write_bytes(text)
    return (source, "--taylor-degree", 4, "--window", 32, "--calibrate", tmp_path / "text.txt",
            tmp_path / "out.bin")


def test_constant_memory(capsys, tmp_path):
    """Softmax becomes a window and a polynomial. As the reference computes it; while the sums
    are empty, as before; and then nearer to what it was than the same keys alone are, on a
    story that was not fitted to."""
    status, _, stderr = run(capsys, *constant(tmp_path))
    assert status == 0 and "fitted to" in stderr
    m = reference.read(tmp_path / "out.bin")
    assert all((l.mixer, l.window, l.chunk, l.degree) == (export.TAYLOR, 32, 16, 4)
               for l in m.layer)
    before, after = based.Model(STORIES), based.Model(tmp_path / "out.bin")
    tokens = before.encode((STORY.parent / "stories260K-big-dog.txt").read_bytes())[:400]
    exact, got = based.Session(before).feed(tokens), based.Session(after).feed(tokens)
    assert np.abs(got[:48] - exact[:48]).max() < 1e-4
    assert np.abs(got - reference.run(m, tokens)).max() < 1e-3
    alone = reference.read(tmp_path / "out.bin")
    for l in alone.layer:
        l.coefficients = l.coefficients * 0
    off, off_alone = (np.square(y[48:] - exact[48:]).mean()
                      for y in (got, reference.run(alone, tokens)))
    assert off < 0.75 * off_alone


def test_constant_memory_tokens():
    """The text that polynomials are fitted to becomes the tokens that the runtime makes of it."""
    saved = export.Checkpoint(STORIES)
    text = STORY.read_text(encoding="utf-8") + " Zo\u00eb \u2603 said:\n\"42!\""
    assert constant_memory.encode(constant_memory.read_tokenizer(saved.tokenizer),
                                  " " + text) == based.Model(STORIES).encode(text.encode()).tolist()


def test_constant_memory_refused(capsys, tmp_path):
    fails(capsys, "no text of more than 48 tokens", *constant(tmp_path, text=b"Once upon a time."))
    fails(capsys, "not UTF-8", *constant(tmp_path, text=b"\xff"))
    source = origins.write_llama(tmp_path / "llama.bin", np.random.default_rng(5),
                                 (24, 40, 2, 4, 4, 30, 12))
    fails(capsys, "tokenizer", *constant(tmp_path, source))
    source = reference.random_checkpoint(np.random.default_rng(1), tmp_path / "random.bin",
                                         mixers=[export.CONV])
    fails(capsys, "which this is not", *constant(tmp_path, source))


@pytest.mark.parametrize("data, pattern", [
    (b"", "nothing this program can read"),
    (b"hello world, this is no checkpoint", "nothing this program can read"),
    (b"24ka" + bytes([2, 0, 0, 0]) + bytes(300), "version 2"),
    (bytes(100), "nothing this program can read"),
    (b"\xff" * 100, "nothing this program can read"),
    (export.MAGIC + bytes(300), "already; --dtype")])
def test_not_a_model(capsys, tmp_path, data, pattern):
    (tmp_path / "source.bin").write_bytes(data)
    fails(capsys, pattern, tmp_path / "source.bin", tmp_path / "out.bin")


# --------------------------------------------------------------------------------------------------
# HazyResearch/based

def test_what_training_left_behind(capsys, tmp_path):
    """A raw training file: prefix, metrics, decay, rotary buffers, a tied head, half precision; the
    same model comes out."""
    plain = exported(capsys, twelve(tmp_path), tmp_path / "plain.bin")

    def dirty(state):
        tensors = dict(state)
        state.clear()
        state.update({"model." + name: array for name, array in tensors.items()})
        state["model." + HEAD] = tensors[EMBEDDING]
        state["train_metrics.count"] = np.array([3], np.int64)
        state["model.transformer.decay.decay"] = np.zeros(2, np.float32)
        state[f"model.{LAYER}2.mixer.rotary_emb.inv_freq"] = np.zeros(8, np.float32)
    raw = exported(capsys, twelve(tmp_path, dirty, {"fixed_decay": True}), tmp_path / "raw.bin")
    assert np.array_equal(reference.run(raw, range(12)), reference.run(plain, range(12)))


@pytest.mark.parametrize("keep", [EMBEDDING, HEAD])
def test_either_of_two_tied_tensors(capsys, tmp_path, keep):
    def one(state):
        state[keep] = state.pop(EMBEDDING)
    m = exported(capsys, twelve(tmp_path, one), tmp_path / "out.bin")
    assert m.flags == export.TIED and np.array_equal(m.embedding.values,
                                                     origins.twelve_state()[EMBEDDING])


def test_untied_head(capsys, tmp_path):
    def apart(state):
        state[HEAD] = state[EMBEDDING][::-1]
    source = twelve(tmp_path, apart)
    fails(capsys, "should be one tensor, but differ", source, tmp_path / "out.bin")
    m = exported(capsys, twelve(tmp_path, apart, {"tie_word_embeddings": False}),
                 tmp_path / "out.bin")
    assert m.flags == 0 and np.array_equal(m.head.values, m.embedding.values[::-1])


def test_forms_of_weights_agree(capsys, tmp_path):
    """PyTorch and safetensors, float32: byte for byte the same checkpoint."""
    pytest.importorskip("torch")
    exported(capsys, twelve(tmp_path), tmp_path / "a.bin", "--name", "x")
    (tmp_path / "source" / "model.safetensors").unlink()
    exported(capsys, twelve(tmp_path, form="bin"), tmp_path / "b.bin", "--name", "x")
    assert (tmp_path / "a.bin").read_bytes() == (tmp_path / "b.bin").read_bytes()


def test_half_precision(capsys, tmp_path):
    torch = pytest.importorskip("torch")
    from safetensors.torch import save_file
    source = Path(twelve(tmp_path, form=None))
    for dtype in (torch.float16, torch.bfloat16):
        state = {name: torch.from_numpy(array).to(dtype)
                 for name, array in origins.twelve_state().items()}
        save_file(state, source / "model.safetensors")
        m = exported(capsys, source, tmp_path / "out.bin")
        assert np.array_equal(m.embedding.values, state[EMBEDDING].double().numpy())


def test_biases_and_layer_norm(capsys, tmp_path):
    """What a config may switch on beyond the releases: conv bias, projection and MLP biases,
    LayerNorm."""
    added = {f"{LAYER}0.mixer.conv.conv.bias": (64,), f"{LAYER}2.mixer.Wqkv.bias": (96,),
             f"{LAYER}2.mixer.out_proj.bias": (32,),
             f"{LAYER}1.mlp.fc1.bias": (512,), f"{LAYER}1.mlp.fc2.bias": (32,),
             "transformer.ln_f.bias": (32,),
             **{f"{LAYER}{i}.norm{j}.bias": (32,) for i in range(4) for j in (1, 2)}}
    rng = np.random.default_rng(1)
    values = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in added.items()}
    m = exported(capsys, twelve(tmp_path, lambda state: state.update(values), {"rms_norm": False}),
                 tmp_path / "out.bin")
    assert [l.flags for l in m.layer] == [7, 24, 3, 3] and m.final_norm == 2
    assert np.array_equal(m.layer[0].conv_bias, values[f"{LAYER}0.mixer.conv.conv.bias"])
    # gate first
    assert np.array_equal(m.layer[1].up_bias, np.roll(values[f"{LAYER}1.mlp.fc1.bias"], 256))
    assert np.array_equal(m.layer[2].in_bias, values[f"{LAYER}2.mixer.Wqkv.bias"])
    assert np.array_equal(m.layer[3].norm2_bias, values[f"{LAYER}3.norm2.bias"])


def drop(name):
    return lambda state: state.pop(name)


def put(name, shape=(4,), value=0.0):
    return lambda state: state.update({name: np.full(shape, value, np.float32)})


def spoil(name, value):
    def change(state):
        state[name] = state[name].copy()
        state[name].reshape(-1)[7] = value
    return change


@pytest.mark.parametrize("change, settings, pattern", [
    (drop(f"{LAYER}0.norm1.weight"), {}, "lacks the tensor .*0.norm1.weight"),
    (drop(f"{LAYER}1.mixer.proj_k.weight"), {}, "lacks the tensor .*1.mixer.proj_k.weight"),
    (drop(f"{LAYER}0.mixer.in_proj.weight"), {}, "layer 0 has none of"),
    (drop(f"{LAYER}0.mixer.out_proj.weight"), {}, "lacks"),
    (drop("transformer.ln_f.weight"), {}, "lacks the tensor transformer.ln_f"),
    (drop(EMBEDDING), {}, "lacks the tensor lm_head"),
    (lambda state: state.clear(), {}, "lacks"),
    (put(f"{LAYER}2.mixer.out_proj.weight",
         (32, 31)), {}, r"shape \[32, 31\], expected \[32, 32\]"),
    (put(f"{LAYER}0.mixer.conv.conv.weight",
         (64, 3)), {}, r"shape \[64, 3\], expected \[any, 1, any\]"),
    (put(f"{LAYER}0.mlp.fc1.weight",
         (511, 32)), {}, "mlp.fc1.weight has 511, expected 512 .*n_inner = 64"),
    (put(f"{LAYER}0.mlp.fc1.weight", (0, 32)), {}, r"shape \[0, 32\]"),
    (put("transformer.embeddings.position_embeddings.weight"), {},
     "adds a position embedding .n_positions"),
    (put(f"{LAYER}0.mixer.surprise"), {}, "no known layer uses.*surprise"),
    (put(f"{LAYER}5.norm1.weight", (32, )), {}, "n_layer = 4, but the tensors of .* say 6"),
    (spoil(f"{LAYER}3.mlp.fc2.weight", np.nan), {}, r"layers.3.down.weight holds nan at \[0, 7\]"),
    (spoil(EMBEDDING, np.inf), {}, r"embedding holds inf at \[0, 7\]"),
    (spoil("transformer.ln_f.weight", -np.inf), {}, r"final_norm.weight holds -inf at \[7\]"),
    (put(f"{LAYER}0.mixer.conv1.conv.weight"), {}, "conv.conv.weight twice"),
    (put(f"{LAYER}1.mixer.decay_proj.weight"), {}, "no known layer uses"),
    (put(f"{LAYER}1.mixer.proj_k_enc.weight"), {}, "enc_length"),
    (put(f"{LAYER}1.mixer.g_norm.weight"), {}, "ThunderKittens"),
    (put("backbone.layers.0.mixer.A_log"), {}, "Mamba"),
    (None, {"alt_mixer_2": None, "mixer": {"expand_proj": 4}
            }, "layer 2 is full attention.*--window"),
    (None, {"alt_mixer_2": {"window_size": None}}, "window_size = null, expected"),
    (None, {"alt_mixer_2": {"window_size": 8, "causal": False}}, "causal"),
    (None, {"activation_function": "relu"}, 'activation_function = "relu"'),
    (None, {"n_head": 3}, "n_head = 3 does not divide"),
    (None, {"n_head": "x"}, 'n_head = "x", expected a positive number'),
    (None, {"n_head": None}, "n_head = null"),
    (None, {"n_head": -2}, "n_head = -2"),
    (None, {"n_layer": 5}, "n_layer = 5, but the tensors of .* say 4"),
    (None, {"n_embd": 64}, "n_embd = 64, but the tensors of .* say 32"),
    (None, {"vocab_size": 57}, "embeds 56 tokens, config.json: vocab_size = 57"),
    (None, {"alt_mixer": {"feature_map": {"_target_": "x.Elu", "input_dim": 16}}
            }, "x.Elu.*this feature map is not supported"),
    (None, {"layer_norm_epsilon": True}, "layer_norm_epsilon = true"),
    (None, {"alt_mixer": [1]}, "alt_mixer"),
    (None, {"rotary_emb_fraction": "x"}, "rotary_emb_fraction"),
    (None, {"rotary_emb_fraction": 1.5}, "is above 1"),
    (None, {"mixer": {"l_max": "x"}}, "l_max"),
])
def test_refused(capsys, tmp_path, change, settings, pattern):
    fails(capsys, pattern, twelve(tmp_path, change, settings), tmp_path / "out.bin")


def test_broken_directories(capsys, tmp_path):
    source = Path(twelve(tmp_path))
    out = tmp_path / "out.bin"
    (source / "config.json").write_text('{"n_head": ')
    fails(capsys, "no valid JSON", source, out)
    (source / "config.json").write_text("[1]")
    fails(capsys, "JSON object", source, out)
    (source / "config.json").unlink()
    fails(capsys, "holds no config.json", source, out)
    (source / "config.json").write_text(json.dumps(TWELVE))
    (source / "model.safetensors").write_bytes(b"rubbish, rubbish, rubbish")
    fails(capsys, "no valid safetensors", source, out)
    (source / "model.safetensors").unlink()
    fails(capsys, "neither model.safetensors nor .* nor pytorch_model.bin", source, out)
    fails(capsys, "does not exist", tmp_path / "nowhere", out)
    source = twelve(tmp_path)
    fails(capsys, "No such file or directory", source, tmp_path / "no" / "such" / "out.bin")
    fails(capsys, "No such file", source, "--tokenizer", tmp_path / "none.json", out)
    (tmp_path / "t.bin").write_bytes(bytes(40))
    fails(capsys, "t.bin", source, "--tokenizer", tmp_path / "t.bin", out)
    (tmp_path / "t.json").write_text("{}")
    fails(capsys, "t.json", source, "--tokenizer", tmp_path / "t.json", out)
    status, _, stderr = run(capsys, source, tmp_path)
    assert status == 1 and "is a directory" in stderr


@pytest.mark.parametrize("data", [b"", b"rubbish", b"PK\3\4 rubbish"])
def test_broken_pytorch_file(capsys, tmp_path, data):
    pytest.importorskip("torch")
    source = Path(twelve(tmp_path, form=None))
    (source / "pytorch_model.bin").write_bytes(data)
    fails(capsys, "pytorch_model.bin", source, tmp_path / "out.bin")


def test_pytorch_file_runs_no_code(capsys, tmp_path):
    torch = pytest.importorskip("torch")

    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "sprung"),)
    source = Path(twelve(tmp_path, form=None))
    torch.save({"x": Trap()}, source / "pytorch_model.bin")
    fails(capsys, "cannot be read as a PyTorch file", source, tmp_path / "out.bin")
    assert not (tmp_path / "sprung").exists()


def test_window_without_setting(capsys, tmp_path):
    """config.json without a window: the original's default, 128, of which half is seen."""
    m = exported(capsys, twelve(tmp_path, None, {"alt_mixer_2": {"num_heads": 2}}),
                 tmp_path / "out.bin")
    assert m.layer[2].window == 65


# --------------------------------------------------------------------------------------------------
# Numbers

@pytest.mark.parametrize("shape, parameters, state",
                         [("based-360m", 362_620_928, 6.12e6), ("based-1b", 1_349_453_056, 21.3e6)])
def test_released_shapes(shape, parameters, state):
    """Parameters as published; the memory of the past as the formulas of the paper have it."""
    config, layers, plan = export.open_random(shape,
                                              export.arguments(["--random", shape, "out.bin"]),
                                              print)
    assert export.parameters(config, layers) == parameters
    assert set(plan) == {t.name for t in export.tensors(config, layers)}
    floats = {export.CONV: lambda l: 2 * l.head_dim_v,
              export.TAYLOR: lambda l: 153 * l.heads * (l.head_dim_v + 1),
              export.WINDOW: lambda l: 2 * l.window * l.heads * l.head_dim_v}
    assert abs(4 * sum(floats[l.mixer](l) for l in layers) - state) < 0.005 * state


@pytest.mark.parametrize("width, first, last",
                         [(64, [1, 0.749894202, 0.562341332, 0.421696514], 0.00013335215),
                                                (112, [1, 0.848342896, 0.719685674, 0.610540211],
                                                 0.000117876851)])
def test_rotary_frequencies(width, first, last):
    """Fractions of a turn give back the float32 frequencies of the original, to the last bit."""
    frequency = export.rope_freq(width // 2, width).astype(np.float64) / 2**64 * 2 * np.pi
    assert frequency.astype(np.float32).tolist()[:4] == np.float32(first).tolist()
    assert np.float32(frequency[-1]) == np.float32(last)
    assert np.abs(frequency - frequency.astype(np.float32)).max() < 1e-15


def test_rotary_frequencies_equal_torch():
    torch = pytest.importorskip("torch")
    for width in (8, 12, 64, 80, 112, 128):
        theirs = 1.0 / (10000.0 ** (torch.arange(0, width, 2, dtype=torch.float32) / width))
        ours = (export.rope_freq(width // 2, width) / 2**64 * 2 * np.pi).astype(np.float32)
        assert np.abs(ours.view(np.int32) - theirs.numpy().view(np.int32)).max() <= 1, width


@pytest.mark.parametrize("width, pairs, interleaved",
                         [(8, 4, True), (8, 2, True), (8, 2, False), (10, 3, False), (8, 4, False)])
def test_half_split(width, pairs, interleaved):
    """Rows in our order, rotated our way, have the dot products of the origin's rows rotated its
    way."""
    rng = np.random.default_rng(2)
    q, k = rng.standard_normal((2, width))
    angle = rng.standard_normal(pairs)

    def theirs(x, t):
        y = x.copy()
        for i, a in enumerate(angle):
            one, two = (2 * i, 2 * i + 1) if interleaved else (i, pairs + i)
            cos, sin = np.cos(t * a), np.sin(t * a)
            y[one], y[two] = x[one] * cos - x[two] * sin, x[two] * cos + x[one] * sin
        return y

    order = export.half_split(width, pairs, interleaved)
    assert sorted(order) == list(range(width))
    freq = np.array([int(a / (2 * np.pi) * 2**64) % 2**64 for a in angle], np.uint64)
    mine = [reference.rotated(x[order][None, None], freq, t)[0, 0] for x, t in ((q, 9), (k, 4))]
    assert abs(mine[0] @ mine[1] - theirs(q, 9) @ theirs(k, 4)) < 1e-12


def test_checksum():
    """Equal to the library's for every length, in every cut."""
    data = np.random.default_rng(3).bytes(3_000_000)
    for n in [*range(140), 1000, 1_048_575, 1_048_576, 3_000_000]:
        total, cuts = export.Checksum(), sorted({0, n // 3, n // 2 + 1, n} & set(range(n + 1)))
        for a, b in zip(cuts, cuts[1:]):
            total.update(data[a:b])
        assert total.value() == based.library().based_checksum(data[:n], n), n


# --------------------------------------------------------------------------------------------------
# Writing

SMALL = {"n_embd": 32, "n_layer": 4, "n_head": 2, "n_inner": 64, "vocab_size": 50,
         "rotary_emb_fraction": 1, "alt_mixer_layers": [1],
         "alt_mixer_2_layers": [2], "alt_mixer": {"feature_dim": 16, "num_heads": 2,
                                                  "feature_map": {"input_dim": 16}},
         "alt_mixer_2": {"window_size": 8}}


@pytest.fixture
def shape(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(SMALL))
    return tmp_path / "config.json"


@pytest.mark.parametrize("bits", [8, 4])
def test_scales_that_the_runtime_accepts(bits):
    """Weights too small for a scale of based.h part 7 become nothing; others keep their size."""
    dtype = export.DTYPES[1 if bits == 8 else 2]
    weights = np.random.default_rng(1).standard_normal((16, 96)).astype(np.float32)
    weights[:, :32] *= np.float32(1e-22)
    weights[:, 32:64] *= np.float32(1e-28)
    pieces = export.stored(export.Tensor("x", weights.shape, dtype), weights)
    got = dtype.unpack(b"".join(bytes(piece) for piece in pieces), weights.shape)
    assert not got[:, 32:64].any()
    for part in (got[:, :32] / weights[:, :32], got[:, 64:] / weights[:, 64:]):
        assert 0.98 < np.median(part) < 1.02


def test_scale_out_of_range_is_refused(tmp_path):
    path = reference.random_checkpoint(np.random.default_rng(4), tmp_path / "m.bin",
                                       dtype=export.DTYPE_CODES["q8"])
    good = bytearray(Path(path).read_bytes())
    placed = next(p for p in export.Checkpoint(path).placed if p.dtype.name == "q8")
    for scale in (0x7fc0, 0x7f80, 0x0001, 0x4980):
        bad = good[:]
        bad[placed.offset:placed.offset + 2] = scale.to_bytes(2, "little")
        (tmp_path / "bad.bin").write_bytes(bad)
        done = subprocess.run([ROOT / "run", tmp_path / "bad.bin", "--info", "--no-checksum"],
                              capture_output=True, text=True)
        assert done.returncode == 1 and done.stdout == "" and len(done.stderr.splitlines()) == 1
        assert "1 scales of weights are neither zero nor between 2^-82 and 2^20" in done.stderr


def test_random(capsys, tmp_path, shape):
    """Random weights load, give finite and lively logits, and depend on the seed alone."""
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert run(capsys, "--random", shape, "--seed", seed, "--name", "r",
                   tmp_path / f"{name}.bin")[0] == 0
    a, b, c = ((tmp_path / f"{name}.bin").read_bytes() for name in "abc")
    assert a == b and a != c
    logits = based.Session(based.Model(tmp_path / "a.bin")).feed(np.arange(50).repeat(3))
    assert np.isfinite(logits).all() and 0.3 < logits.std() < 3
    m = reference.read(tmp_path / "a.bin")
    assert [l.mixer for l in m.layer] == [export.CONV, export.TAYLOR, export.WINDOW,
                                          export.CONV] and m.layer[2].window == 5
    assert np.abs(reference.run(m, np.arange(50).repeat(3)) - logits).max() < 2e-5


def test_random_with_gpt2_tokenizer(capsys, tmp_path, shape):
    shape.write_text(json.dumps(dict(SMALL, vocab_size=50257, n_layer=1, alt_mixer_layers=[],
                                     alt_mixer_2_layers=[])))
    assert run(capsys, "--random", shape, tmp_path / "out.bin")[0] == 0
    m = reference.read(tmp_path / "out.bin")
    assert (m.vocab, m.rows) == (50257, 50264) and b"<|endoftext|>" in m.tokenizer


def test_random_refused(capsys, tmp_path, shape):
    fails(capsys, "No such file", "--random", "based-7b", tmp_path / "out.bin")
    shape.write_text(json.dumps({"n_embd": 32, "n_layer": None}))
    fails(capsys, "n_layer = null, expected a positive number", "--random", shape,
          tmp_path / "out.bin")
    shape.write_text(json.dumps(dict(SMALL, n_embd="wide")))
    fails(capsys, 'n_embd = "wide", expected a positive number', "--random", shape,
          tmp_path / "out.bin")


@pytest.fixture
def old(tmp_path):
    (tmp_path / "out.bin").write_bytes(b"the old file")
    return tmp_path / "out.bin"


def unharmed(old):
    return old.read_bytes() == b"the old file" and not list(old.parent.glob("*.part"))


@pytest.mark.parametrize("failure, status, pattern", [
    (KeyboardInterrupt(), 130, "interrupted"), (OSError(errno.ENOSPC, "No space left on device"), 1,
                                                "out.bin.*No space left"),
    (MemoryError(), 1, "not enough memory")])
def test_failure_leaves_the_old_file(capsys, monkeypatch, shape, old, failure, status, pattern):
    def fail(handle):
        raise failure
    # everything is written, nothing is in place yet
    monkeypatch.setattr(os, "fsync", fail)
    got, stdout, stderr = run(capsys, "--random", shape, old)
    assert got == status and stdout == "" and re.search(pattern, stderr) and unharmed(old), stderr


@pytest.mark.parametrize("offset", [-1, 40, 300, 900, 5000, 24])
def test_verification_sees_one_wrong_bit(capsys, monkeypatch, shape, old, offset):
    """A disk that changes one bit between writing and reading back."""
    def flip(handle):
        at = offset % os.fstat(handle).st_size
        byte = os.pread(os.open(f"/proc/self/fd/{handle}", os.O_RDONLY), 1, at)
        os.pwrite(handle, bytes([byte[0] ^ 1]), at)
    if not os.path.exists("/proc/self/fd"):
        pytest.skip("needs /proc")
    monkeypatch.setattr(os, "fsync", flip)
    status, stdout, stderr = run(capsys, "--random", shape, old)
    assert status == 1 and stdout == "" and unharmed(old), stderr


def test_verify_knows_what_was_written(capsys, tmp_path, shape):
    """A file that is sound but another one."""
    out = tmp_path / "out.bin"
    assert run(capsys, "--random", shape, "--name", "x", out)[0] == 0
    checksum = export.Checkpoint(out).config.checksum
    export.verify(out, checksum)
    assert run(capsys, "--random", shape, "--name", "y", out)[0] == 0
    with pytest.raises(export.Refused, match="verification failed"):
        export.verify(out, checksum)


@pytest.mark.parametrize("dtype", export.DTYPES.values(), ids=lambda dtype: dtype.name)
def test_pieces_of_a_tensor(monkeypatch, dtype):
    """A matrix that is written in pieces, its rows read from several others, is the same as one
    written at once, and as what was read back of it."""
    whole = np.random.default_rng(1).standard_normal((1000, 70)).astype(np.float32)
    parts = [export.Rows(part.shape, lambda a, b, part=part: part[a:b])
             for part in np.split(whole, [3, 200, 900])]
    t = export.Tensor("x", whole.shape, dtype)
    expected = b"".join(bytes(piece) for piece in export.stored(t, whole))
    rows = export.stacked(parts)
    monkeypatch.setattr(export.Rows, "pieces", lambda self: [(a, min(a + 64, 1000))
                                                             for a in range(0, 1000, 64)])
    assert b"".join(bytes(piece) for piece in export.stored(t, rows)) == expected
    assert len(expected) == dtype.nbytes(whole.shape)
    got = dtype.unpack(expected, whole.shape)
    assert np.abs(got - whole).max() < {"f32": 1e-9, "q8": 0.02, "q4": 0.4}[dtype.name]
    rows = export.Rows((1000, 70), lambda a, b: np.where(np.arange(a, b)[:, None] == 900, np.inf,
                                                         whole[a:b]))
    with pytest.raises(export.Refused, match=r"x holds inf at \[900, 0\]"):
        list(export.stored(t, rows))


def test_random_rows_do_not_depend_on_pieces():
    rows = export.random_rows("x.weight", (200, 5), 1, 1)
    assert np.array_equal(rows[70:150], rows()[70:150]) and rows().std() > 0.3


def test_from_anywhere_without_tqdm(tmp_path, shape):
    """A copy of the tree, called from another directory, with numpy alone."""
    copy, hidden = tmp_path / "copy", tmp_path / "hidden"
    shutil.copytree(ROOT / "models" / "origins", copy / "models" / "origins")
    for path in (ROOT / "export.py", *(ROOT / "models").glob("*.py")):
        shutil.copy(path, copy / path.relative_to(ROOT))
    hidden.mkdir()
    for name in ("tqdm", "torch", "safetensors"):
        (hidden / f"{name}.py").write_text("raise ImportError")
    command = [sys.executable, copy / "export.py", "--random", shape, tmp_path / "out.bin"]
    done = subprocess.run(command, cwd=hidden, env={**os.environ, "PYTHONPATH": str(hidden)},
                          capture_output=True, text=True)
    assert done.returncode == 0 and "read back and verified" in done.stdout, done.stderr
    assert len(reference.read(tmp_path / "out.bin").layer) == 4


def test_ctrl_c_while_writing(tmp_path, shape, old):
    """The whole program, stopped in the middle by a signal."""
    shape.write_text(json.dumps(dict(SMALL, n_embd=1024, n_head=16, n_layer=8, vocab_size=30000,
                                     n_inner=4096)))
    for number in (signal.SIGINT, signal.SIGTERM):
        p = subprocess.Popen([sys.executable, str(ROOT / "export.py"), "--random", str(shape),
                              str(old)],
                             stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                             # a shell's "&" ignores it
                             preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
        limit = time.time() + 60
        while not list(tmp_path.glob("*.part")) and p.poll() is None and time.time() < limit:
            time.sleep(0.01)
        p.send_signal(number)
        stdout, stderr = p.communicate(timeout=60)
        assert p.returncode == 130 and stdout == "" and unharmed(old)
        lines = [line for line in stderr.splitlines() if "note:" not in line]
        assert lines == ["export.py: interrupted; nothing was written"]


# --------------------------------------------------------------------------------------------------
# --inspect and the command line

def test_inspect(capsys, tmp_path):
    exported(capsys, twelve(tmp_path), tmp_path / "out.bin", "--name", "twelve \u00e9")
    status, stdout, stderr = run(capsys, "--inspect", tmp_path / "out.bin")
    assert status == 0 and stderr == ""
    for text in ("twelve \u00e9", "width 32, 4 layers, vocabulary 50 in 56 rows",
                 "parameters 121,568", " ok\n"):
        assert text in stdout
    m = export.Checkpoint(tmp_path / "out.bin")
    for t in m.placed:
        shape = "x".join(map(str, t.shape))
        row = rf"^{re.escape(t.name)} +{shape} +{t.dtype.name} +{t.nbytes:,} +{t.offset:,}$"
        assert re.search(row, stdout, re.M)


def test_inspect_damaged(capsys, tmp_path, old):
    data = bytearray((ROOT / "models" / "stories260K.bin").read_bytes())
    data[len(data) // 2] ^= 4
    old.write_bytes(data)
    status, stdout, _ = run(capsys, "--inspect", old)
    assert status == 1 and "WRONG" in stdout
    cases = [(data[:-4], "bytes, its header says"), (data[:100], "ends inside its header"),
             (b"x" * 999, "no checkpoint of based.c"),
             (b"", "no checkpoint"), (data[:8] + b"\7" + data[9:], "format 7"),
             (data[:40] + b"\377\377\0\0" + data[44:], "layers|describes"),
             (data[:36] + b"\1" + data[37:], "its header describes"),
             (data[:56] + b"\11" + data[57:], "dtype 9")]
    for bad, pattern in cases:
        old.write_bytes(bad)
        status, stdout, stderr = run(capsys, "--inspect", old)
        assert status == 1 and stdout == "" and len(stderr.splitlines()) == 1, stderr
        assert re.search(pattern, stderr), stderr


@pytest.mark.parametrize("arguments", [
    [], ["one"], ["one", "two", "three"], ["--random", "based-1b"], ["--inspect"],
    ["--inspect", "a", "b"], ["a", "b", "--dtype", "f64"],
    ["a", "b", "--window", "0"], ["a", "b", "--window", "x"], ["a", "b", "--chunk", "1025"],
    ["a", "b", "--nonsense"], ["a", "b", "--degree", "None"], ["a", "b", "--sampling", "top-k=1.5"],
    ["a", "b", "--sampling", "temp=nan"], ["a", "b", "--sampling", "warmth=1"],
    ["a", "b", "--seed", "-1"]])
def test_usage_errors(capsys, arguments):
    status, stdout, stderr = run(capsys, *arguments)
    assert status == 2 and stdout == "" and len(stderr.splitlines()) == 1, stderr
    assert stderr.startswith("export.py: ") and "--help explains" in stderr


def test_help(capsys):
    status, stdout, stderr = run(capsys, "--help")
    assert status == 0 and stderr == "" and "examples:" in stdout and stdout.count("--random") > 2


@pytest.mark.parametrize("options", [("--sinks", "--decay"), ("--keep", "--forget")])
def test_sinks_and_decay_of_a_checkpoint(random_model, tmp_path, options):
    """--sinks and --decay (--keep and --forget before) change two fields of the taylor layers and
    nothing else, not even a bit of quantized weights."""
    source, path = random_model(2, mixers=[export.TAYLOR, export.CONV],
                                layer={"sinks": 0, "decay": 0.0, "window": 0}), tmp_path / "out.bin"
    assert export.main([str(source), str(path), options[0], "16", options[1], "0.25"]) == 0
    before, after = export.Checkpoint(source), export.Checkpoint(path)
    assert [(l.sinks, l.decay) for l in after.layers] == [(16, 0.25), (0, 0.0)]
    assert all(np.array_equal(before.raw(t.name), after.raw(t.name)) for t in before.placed)
    for a, b in zip(before.layers, after.layers):
        b.sinks, b.decay = a.sinks, a.decay
    assert list(map(export.LAYER.pack, before.layers)) == list(map(export.LAYER.pack, after.layers))
    assert before.config.name == after.config.name and after.checksum() == after.config.checksum


def test_sinks_and_decay_refused(random_model, tmp_path, capsys):
    source = random_model(2, mixers=[export.CONV])
    assert export.main([str(source), str(tmp_path / "out.bin"), "--sinks", "3"]) == 1
    assert "has none" in capsys.readouterr().err
    for wrong in ("1", "-0.1", "nan"):
        with pytest.raises(SystemExit):
            export.main([str(source), str(tmp_path / "out.bin"), "--decay", wrong])


def test_a_checkpoint_in_fewer_bits(tmp_path):
    """The shipped 8-bit file is what export.py makes of the shipped float32 file."""
    models = ROOT / "models"
    out = tmp_path / "q8.bin"
    export.main([str(models / "stories260K.bin"), str(out), "--dtype", "q8"])
    assert out.read_bytes() == (models / "stories260K-q8.bin").read_bytes()


def test_a_checkpoint_with_other_windows(tmp_path, capsys):
    """Bytes of weights stay; window layers get the window, and a file without any is refused."""
    source, out = ROOT / "models" / "stories260K.bin", tmp_path / "w.bin"
    export.main([str(source), str(out), "--window", "32"])
    a, b = export.Checkpoint(source), export.Checkpoint(out)
    assert [l.window for l in b.layers] == [32] * 5 and a.tokenizer == b.tokenizer
    assert all((a.raw(t.name) == b.raw(t.name)).all() for t in a.placed)
    conv = reference.random_checkpoint(np.random.default_rng(4), tmp_path / "c.bin",
                                       mixers=[export.CONV])
    assert export.main([str(conv), str(out), "--window", "32"]) != 0
    assert "--window is about window layers" in capsys.readouterr().err
