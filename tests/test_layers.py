"""Layers of taylor-series-linear-attention and Edifice models, exported and run as checkpoints: the
originals' outputs, whatever the exporter has to guess is refused, and what would silently differ is
refused too."""
import functools
import subprocess
from pathlib import Path

import pytest

np = pytest.importorskip("numpy")
pytest.importorskip("safetensors")
import based            # noqa: E402
import export           # noqa: E402
import reference        # noqa: E402
import taylor           # noqa: E402
from based import Model, Session, same_bits             # noqa: E402
from test_export import exported, fails, run            # noqa: E402

ROOT = Path(export.__file__).resolve().parent
LUCIDRAINS = {title.split()[0]: case for title, case in taylor.golden("lucidrains_tsla.txt")}
EDIFICE = {title.split()[0]: (title.split(), case)
           for title, case in taylor.golden("edifice_based.txt")}


def save(path, tensors):
    """A state dict as .safetensors or .pt."""
    if path.suffix == ".pt":
        torch = pytest.importorskip("torch")
        torch.save({name: torch.tensor(np.float32(x)) for name, x in tensors.items()}, path)
    else:
        from safetensors.numpy import save_file
        save_file({name: np.ascontiguousarray(x, np.float32) for name, x in tensors.items()}, path)
    return path


def weights(case):
    return {name: x for name, x in case.items() if "." in name}


def largest(x):
    return np.abs(x).max()


# ---- lucidrains

@pytest.mark.parametrize("form", ["pt", "safetensors"])
@pytest.mark.parametrize("name", ["causal_plain", "causal_rot", "causal_onekv", "nocombine"])
def test_lucidrains_causal(capsys, tmp_path, name, form):
    case = LUCIDRAINS[name]
    source, out = save(tmp_path / f"layer.{form}", weights(case)), tmp_path / "out.bin"
    m = exported(capsys, source, out, "--heads", 3, "--mode", "causal")
    x, y = case["x"][0], case["y"][0]
    assert largest(reference.run(m, np.float32(x)) - y) < 1e-6 * largest(y)
    step = Session(Model(out), 1)
    got = np.concatenate([step.feed(row[None]) for row in x])
    assert largest(got - y) < 1e-6 * largest(y) and same_bits(got, Session(Model(out), 4).feed(x))


def test_lucidrains_mask(capsys, tmp_path):
    """Not causal, with a mask: masked tokens are left out; they may still ask, after the window."""
    case = LUCIDRAINS["bidir_mask"]
    source, out = save(tmp_path / "layer.pt", weights(case)), tmp_path / "out.bin"
    exported(capsys, source, out, "--heads", 3, "--mode", "window")
    keep, x, y = case["mask"][0].astype(bool), case["x"][0], case["y"][0]
    assert 0 < keep.sum() < len(keep)
    assert largest(Session(Model(out), 16).feed_window(x[keep]) - y[keep]) < 1e-6 * largest(y)


@pytest.mark.parametrize("mode", ["causal", "window"])
def test_lucidrains_everything(capsys, tmp_path, mode):
    """prenorm, shift, gates, rotary, one-headed keys, a name prefix: a layer with all of it,
    against numpy."""
    rng, dim, heads = np.random.default_rng(8), 21, 4
    w = {"to_q.0.weight": rng.normal(size=(heads * 8, dim)) / 5,
         "to_kv.0.weight": rng.normal(size=(16, dim)) / 5,
         "to_out.0.weight": rng.normal(size=(dim, heads * 8)) / 5,
         "rotary_emb.freqs": np.float32(10000 ** (-np.arange(4) / 4)),
         "norm.gamma": rng.uniform(0.5, 1.5, dim),
         "to_v_gates.0.weight": rng.normal(size=(heads, dim)) / 4}
    w = {name: np.float32(x).astype(np.float64) for name, x in w.items()}
    x = rng.normal(size=(40, dim)).astype(np.float32).astype(np.float64)
    expected = taylor.lucidrains(w, x, heads, taylor.by_definition, causal=mode == "causal",
                                 shift=True)
    state = {**{"layers.3.attn." + name: part for name, part in w.items()},
             "other.weight": np.zeros(3)}
    source, out = save(tmp_path / "layer.safetensors", state), tmp_path / "out.bin"
    m = exported(capsys, source, out, "--heads", heads, "--mode", mode, "--shift", "--prefix",
                 "layers.3.attn.")
    session = Session(Model(out), 64)
    got = session.feed(x) if mode == "causal" else session.feed_window(x)
    assert largest(got - expected) < 1e-6 * largest(expected)
    assert largest(reference.run(m, x) - expected) < 1e-6
    fails(capsys, r"--prefix layers\.3\.attn\. would", source, tmp_path / "no.bin")


def test_lucidrains_refusals(capsys, tmp_path):
    case = LUCIDRAINS["causal_rot"]
    source, w = save(tmp_path / "layer.safetensors", weights(case)), weights(case)
    out = tmp_path / "no.bin"
    fails(capsys, "--heads", source, "--mode", "causal", out)
    fails(capsys, "causal=True.*--mode", source, "--heads", 3, out)
    for said, notes in (("--shift", 0), ("--no-shift", 0),
                        (None, 1)):  # what is taken for granted is said
        _, _, stderr = run(capsys, source, tmp_path / "out.bin", "--heads", 3, "--mode", "causal",
                           *filter(None, [said]))
        assert stderr.count(
            "note: taking it that the layer was made without shift_tokens") == notes, stderr
    fails(capsys, "does not fit 5 heads", source, "--heads", 5, "--mode", "causal", out)
    fails(capsys, "degree 2", source, "--heads", 3, "--mode", "causal", "--degree", 3, out)
    more = save(tmp_path / "more.safetensors", {**w, "to_q.1.bias": np.zeros(3)})
    fails(capsys, r"to_q\.1\.bias", more, "--heads", 3, "--mode", "causal", out)
    narrow = save(tmp_path / "narrow.safetensors",
                  {"to_q.0.weight": np.ones((6, 12)), "to_kv.0.weight": np.ones((12, 12))})
    fails(capsys, "does not combine", narrow, "--heads", 3, "--mode", "causal", out)
    other = save(tmp_path / "other.safetensors", {"a": np.zeros(3)})
    fails(capsys, "no model this program knows, such as a", other, out)


# ---- Edifice

def edifice(capsys, tmp_path, name, *options):
    (_, order, layers, mode, *_), case = EDIFICE[name]
    source, out = save(tmp_path / "edifice.safetensors", weights(case)), tmp_path / "out.bin"
    m = exported(capsys, source, out, "--degree", order, "--heads", 4, *options)
    return Model(out), m, case, slice(None) if mode == "all" else slice(
        -1, None), functools.partial(taylor.edifice, weights(case), heads=4, order=int(order))


def condition(layer, x, causal=False):
    values = []
    layer(x=x, attend=functools.partial(taylor.by_definition, condition=values), causal=causal)
    return max(1.0, np.max(values))


@pytest.mark.parametrize("text", [0, 1])
@pytest.mark.parametrize("name", EDIFICE)
def test_edifice_window(capsys, tmp_path, name, text):
    """The original's outputs, in units of the scale times the condition (see test_taylor.py)."""
    model, m, case, rows, layer = edifice(capsys, tmp_path, name, "--mode", "window")
    x, y = case["x"][text], np.atleast_2d(case["y"][text])
    unit = largest(y) * condition(layer, x)
    session = Session(model, 7)
    for _ in range(2):                                  # each window begins anew
        assert largest(session.feed_window(x)[rows] - y) < 1e-6 * unit
        assert same_bits(session.logits(), session.feed_window(x)[-1])
    assert largest(reference.run(m, np.float32(x))[rows] - y) < 1e-6 * unit


def test_edifice_one_layer_steps(capsys, tmp_path):
    """One layer and the last output: stepping is exact, in constant memory."""
    model, _, case, _, layer = edifice(capsys, tmp_path, "a2", "--mode", "causal")
    for x, y in zip(case["x"], case["y"]):
        got = Session(model, 1).feed(x)
        bound = 1e-6 * largest(y) * condition(layer, x)
        assert largest(got[-1] - y) < bound
        assert largest(got[-1] - Session(model, 7).feed_window(x)[-1]) < bound


@pytest.mark.parametrize("name", ["c2", "d1"])
def test_edifice_causal(capsys, tmp_path, name):
    """Chosen: the same weights, stepped. Not what the original computes, but what its numpy form
    with a causal sum does."""
    model, _, case, _, layer = edifice(capsys, tmp_path, name, "--mode", "causal")
    x = case["x"][0]
    expected = layer(x=x, attend=taylor.by_definition, causal=True)
    bound = 1e-6 * largest(expected) * condition(layer, x, True)
    assert largest(Session(model, 3).feed(x) - expected) < bound
    assert largest(expected[0] - layer(x=x, attend=taylor.by_definition)[0]) > 0.1


def test_edifice_refusals(capsys, tmp_path):
    _, case = EDIFICE["c2"]
    w, out = weights(case), tmp_path / "no.bin"
    source = save(tmp_path / "edifice.safetensors", w)
    told = "--heads", 4, "--degree", 2
    fails(capsys, "2 layers that look at the whole window", source, *told, out)
    fails(capsys, "do not tell num_heads.*--heads", source, "--mode", "window", "--degree", 2, out)
    fails(capsys, "taylor_order.*--degree", source, "--mode", "window", "--heads", 4, out)
    fails(capsys, "3 heads do not divide", source, "--mode", "window", "--heads", 3, *told[2:], out)
    fails(capsys, "shift", source, "--mode", "window", "--shift", *told, out)
    language = save(tmp_path / "lm.safetensors", {**w, "lm_head.kernel": np.zeros((16, 30))})
    fails(capsys, r"Generate", language, "--mode", "causal", out)
    one = save(tmp_path / "one.safetensors", weights(EDIFICE["a2"][1]))
    fails(capsys, "1 layers .*--mode", one, *told, out)
    less = save(tmp_path / "less.safetensors",
                {k: v
                 for k, v in w.items() if k != "based_block_2_ffn_up.bias"})
    fails(capsys, r"lacks the tensor based_block_2_ffn_up\.bias", less, "--mode", "causal", *told,
          out)
    status, _, stderr = run(capsys, source, out, "--degree", "13")
    assert status == 2 and "'13' is no number from 1 to 12" in stderr


def test_options_of_other_origins(capsys, tmp_path):
    fails(capsys, "--mode belongs to", "--random", "based-360m", "--mode", "causal",
          tmp_path / "no.bin")


# ---- The library's window

@functools.lru_cache
def threaded():
    return based.build("-fopenmp")


def test_direction_is_not_mistaken(capsys, tmp_path):
    model, _, case, _, _ = edifice(capsys, tmp_path, "c2", "--mode", "window")
    session = Session(model, 7)
    with pytest.raises(based.BasedError, match="both directions") as e:
        session.feed(case["x"][0])
    assert e.value.status == -5 and session.count() == 0 and session.logits() is None


def test_window_refuses(random_model):
    vectors = {"input": 12, "flags": export.INPUT_PROJECTION, "rows": 0, "vocab": 0}
    taylor_only = Model(random_model(7, mixers=[export.TAYLOR] * 2, **vectors))
    x = np.random.default_rng(0).standard_normal((9, 12))
    session = Session(taylor_only, 8)
    session.feed(x)
    before = session.logits()
    for bad in (x, x[:0]):                              # more than the block, and nothing
        with pytest.raises(based.BasedError, match="blocks of 1 to 8"):
            session.feed_window(bad)
    assert session.count() == 9 and same_bits(session.logits(), before)
    for mixer in (export.CONV, export.WINDOW):
        with pytest.raises(based.BasedError, match="layer 1 .* only look back"):
            Session(Model(random_model(5, mixers=[export.TAYLOR, mixer], **vectors)),
                    16).feed_window(x)
    with pytest.raises(based.BasedError, match="layer 0 .* only look back"):
        Session(Model(random_model(3, mixers=[export.TAYLOR], layer={"window": 1}, **vectors)),
                16).feed_window(x)
    with pytest.raises(based.BasedError, match="tokens"):
        Session(Model(random_model(5, input=0, rows=20, vocab=20, flags=1)), 16).feed_window(x)


@pytest.mark.parametrize("seed", range(6))
def test_window_is_full_attention(random_model, seed):
    """Random layers (grouped heads, rotary, biases, chunks, threads) against the reference."""
    path = random_model(seed, mixers=[export.TAYLOR] * 2, input=12, flags=12, rows=0, vocab=0,
                        layer={"normalizer": 0, "normalizer_eps": 1e-6, "degree": 2, "kernel": 0,
                               "window": 0})
    x = np.random.default_rng(seed).standard_normal((50, 12)).astype(np.float32)
    expected = reference.run(reference.read(path), x)
    got = Session(Model(path), 64).feed_window(x)
    assert largest(got - expected) < 2e-5
    assert same_bits(Session(Model(path, 0, threaded()), 50, 3).feed_window(x), got)


@pytest.mark.parametrize("seed", range(4))
def test_window_is_the_past(random_model, seed):
    """What is fed after a window looks back on all of it, token by token."""
    path = random_model(seed, mixers=[export.TAYLOR] * 2, input=12, flags=export.INPUT_PROJECTION,
                        rows=0, vocab=0,
                        layer={"normalizer": 0, "normalizer_eps": 1e-6, "degree": 2, "kernel": 0,
                               "window": 0})
    x = np.random.default_rng(seed).standard_normal((50, 12)).astype(np.float32)
    m, session = reference.read(path), Session(Model(path), 32)
    for l in m.layer:
        l.bidirectional = 30
    expected = reference.run(m, x)
    assert largest(session.feed_window(x[:30]) - expected[:30]) < 2e-5 and session.count() == 30
    assert largest(session.feed(x[30:]) - expected[30:]) < 2e-5


# ---- The command line

def test_vectors_at_the_command_line(capsys, tmp_path):
    """--vectors: what the library gives, stepping or by windows; and what does not go together."""
    def cli(*arguments):
        return subprocess.run([ROOT / "run", *map(str, arguments)], capture_output=True, text=True)

    case, x, y = LUCIDRAINS["causal_rot"], tmp_path / "x.f32", tmp_path / "y.f32"
    source, layer = save(tmp_path / "layer.safetensors", weights(case)), tmp_path / "layer.bin"
    exported(capsys, source, layer, "--heads", 3, "--mode", "causal")
    # more than one block
    rows = np.random.default_rng(2).standard_normal((150, 12)).astype("<f4")
    rows.tofile(x)
    got = cli(layer, "--vectors", x, "--dump-logits", y, "-v")
    assert got.returncode == 0 and got.stdout == "" and "logits #" in got.stderr
    assert same_bits(np.fromfile(y, "<f4").reshape(150, 12), Session(Model(layer), 32).feed(rows))
    exported(capsys, source, layer, "--heads", 3, "--mode", "window")
    assert cli(layer, "--vectors", x, "--dump-logits", y).returncode == 0
    assert same_bits(np.fromfile(y, "<f4").reshape(150, 12),
                     Session(Model(layer), 150).feed_window(rows))
    y.unlink()
    np.zeros((1025, 12), "<f4").tofile(x)
    stories, into = ROOT / "models" / "stories260K.bin", ("--dump-logits", y)
    for status, words, *arguments in ((1, "at most 1024", layer, "--vectors", x,
                                       *into), (1, "rows of 12 numbers", layer, "--vectors", layer,
                                                *into), (1, "No such file", layer, "--vectors",
                                                         tmp_path / "none", *into),
                                      (1, "reads tokens", stories, "--vectors", x,
                                       *into), (1, "see --vectors", layer, "-i",
                                                "a"), (2, "--dump-logits", layer, "--vectors", x),
                                      (2, "--vectors does not go with --prompt", layer, "--vectors",
                                       x, "-i", "a", *into), (2, "--save", layer, "--vectors", x,
                                                              "--save", y, *into)):
        got = cli(*arguments)
        assert got.returncode == status and words in got.stderr, (arguments, got)
        assert len(got.stderr.splitlines()) == 1, (arguments, got)
        assert got.stdout == "" and not y.exists()
