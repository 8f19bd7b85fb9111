"""based.c against the float64 reference over random configurations, and against itself: every way
of feeding the same tokens gives the same bits."""
import pytest

np = pytest.importorskip("numpy")
hypothesis = pytest.importorskip("hypothesis")
from hypothesis import given, settings, strategies as st        # noqa: E402

import based            # noqa: E402
import export           # noqa: E402
import reference        # noqa: E402
from based import Model, Session, same_bits                     # noqa: E402
from conftest import FULL                                       # noqa: E402

TOLERANCE = 2e-5                        # of the largest output, or of 1 if that is smaller
SEEDS = range(64)
LENGTHS = (40, 150, 330)                # the last is longer than the longest window


@pytest.mark.parametrize("seed", SEEDS)
def test_against_reference(random_model, seed):
    path = random_model(seed)
    m, rng = reference.read(path), np.random.default_rng([7, seed])
    x = reference.random_input(rng, m, LENGTHS[seed % 3])
    expected, model = reference.run(m, x), Model(path)
    error = np.abs(Session(model, int(rng.integers(1, 65))).feed(x) - expected).max()
    assert error <= TOLERANCE * max(1, np.abs(expected).max())


def test_quantized_against_reference(random_model):
    """8-bit and 4-bit matrices. Vectors are rounded to 8 bits too, and a value that lies on an edge
    may be rounded one way in float32 and the other in float64, which is seen from then on: so a
    bound of a few such steps for every model, and the bound of float32 for most."""
    errors = []
    for seed in range(40):
        path = random_model(seed, dtype=(1, 2, "mixed")[seed % 3])
        m, rng = reference.read(path), np.random.default_rng([8, seed])
        x = reference.random_input(rng, m, 80)
        expected = reference.run(m, x)
        error = np.abs(Session(Model(path), int(rng.integers(1, 65))).feed(x) - expected).max()
        errors.append(error / max(1, np.abs(expected).max()))
    assert max(errors) < 0.03
    assert np.mean(np.array(errors) <= TOLERANCE) > 0.6


def test_nothing_but_an_embedding(random_model):
    """Layers without mixer and MLP are legal: logits = head * norm(embedding)."""
    path = random_model(1, mixers=[0], layer={"mlp": 0, "norm2": 0, "hidden_dim": 0, "flags": 0},
                        input=0, rows=40, vocab=40, flags=1)
    expected = reference.run(reference.read(path), range(40))
    assert np.abs(Session(Model(path)).feed(np.arange(40)) - expected).max() <= TOLERANCE


def test_sizes(random_model):
    """The library, export.py and the reference count the same parameters and bytes of state."""
    for seed in SEEDS:
        path = random_model(seed)
        saved, model = export.Checkpoint(path), Model(path)
        assert model.parameters == export.parameters(saved.config, saved.layers), seed
        of_layers = sum(reference.state_floats(saved.config, l) for l in saved.layers)
        assert model.state_bytes == 4 * (of_layers + (saved.config.prefix > 0)), seed


MIXERS = {"conv": export.CONV, "taylor": export.TAYLOR, "window": export.WINDOW}


@pytest.mark.parametrize("width", [12, 16, 24, 64, 112])
@pytest.mark.parametrize("mixer", ["taylor", "window"])
def test_head_widths(random_model, mixer, width):
    """Value widths as models have them, alone in a layer, with more tokens than the window or the
    chunk holds."""
    wide = {"head_dim_v": width, "heads": 2, "kv_heads": 1, "flags": 0, "mlp": 0, "norm2": 0,
            "hidden_dim": 0}
    wide.update({"head_dim_k": width, "rope_pairs": width // 2, "window": 17} if mixer == "window"
                else {"head_dim_k": 16, "degree": 2})
    path = random_model(width, mixers=[MIXERS[mixer]], layer=wide, dim=32, input=0, rows=40,
                        vocab=40, flags=export.TIED)
    m = reference.read(path)
    x = reference.random_input(np.random.default_rng(width), m, 120)
    expected = reference.run(m, x)
    bound = TOLERANCE * max(1, np.abs(expected).max())
    assert np.abs(Session(Model(path)).feed(x) - expected).max() <= bound


@pytest.mark.parametrize("window", [1, 2, 3, 16, 64, 65, 129, 300])
def test_windows(random_model, window):
    """The ring wraps at least twice; the left edge counts: one key more or less must show."""
    path = random_model(3, mixers=[export.WINDOW], layer={"window": window}, dim=32, input=0,
                        rows=40, vocab=40, flags=export.TIED)
    m, n = reference.read(path), 2 * window + 20
    x = reference.random_input(np.random.default_rng(window), m, n)
    expected = reference.run(m, x)
    scale = max(1, np.abs(expected).max())
    got = Session(Model(path), 16).feed(x)
    assert np.abs(got - expected).max() <= TOLERANCE * scale
    m.layer[0].window += 1
    assert np.abs(got - reference.run(m, x)).max() > 100 * TOLERANCE * scale


def alone(random_model, seed, own):
    """A taylor layer alone in a model, with these fields, agrees with the reference. Returns how
    far off the reference is when a field is another number: off(field, number), in units of the
    tolerance."""
    own = {"chunk": 4, "kernel": 0, "normalizer": export.ADD, "normalizer_eps": 0.0, "degree": 2,
           "head_dim_k": 8, "rope_pairs": 2,
           "scale": 0.7, "sinks": 0, "decay": 0.0, "window": 0, **own}
    path = random_model(3, mixers=[export.TAYLOR], layer=own, dim=32, input=0, rows=40, vocab=40,
                        flags=export.TIED)
    m = reference.read(path)
    x = reference.random_input(np.random.default_rng(seed), m, 200)
    got, scale = Session(Model(path), 16).feed(x), max(1, np.abs(reference.run(m, x)).max())

    def off(field, number):
        other = reference.read(path)
        assert hasattr(other.layer[0], field)
        setattr(other.layer[0], field, number)
        return np.abs(got - reference.run(other, x)).max() / scale / TOLERANCE
    assert off("chunk", own["chunk"]) <= 1
    return off


@pytest.mark.parametrize("window, chunk", [(1, 1), (5, 3), (16, 16), (33, 7), (100, 16)])
def test_window_beside_sums(random_model, window, chunk):
    """The newest keys of a taylor layer weigh exp(s), up to the one after which a chunk of them is
    flushed into the sums."""
    off = alone(random_model, window, {"window": window, "chunk": chunk})
    assert off("window", window + 1) > 100 and off("chunk", chunk + 1) > 100


@pytest.mark.parametrize("sinks, decay, window",
                         [(16, 0.01, 0), (0, 0.3, 0), (5, 0.0, 0), (3, 0.1, 9)])
def test_sinks_and_decay(random_model, sinks, decay, window):
    """The first tokens stay, the sums decay chunk by chunk."""
    off = alone(random_model, sinks, {"sinks": sinks, "decay": decay, "window": window})
    assert off("decay", decay + 0.05) > 100
    # otherwise a token of the sinks weighs what a summed one does
    if decay or window:
        assert off("sinks", sinks + 1) > 100 and off("chunk", 5) > 100


@pytest.mark.parametrize("window, chunk, heads, sinks, decay",
                         [(0, 1, 1, 0, 0.0), (63, 1, 2, 0, 0.0), (16, 16, 6, 0, 0.0),
                          (5, 40, 6, 3, 0.2)])
def test_hedgehog(random_model, window, chunk, heads, sinks, decay):
    """Features of each query head, beside exact keys whose part is a number of the head."""
    off = alone(random_model, window, {
        "kernel": export.HEDGEHOG, "window": window, "chunk": chunk, "heads": heads, "degree": 5,
        "kv_heads": 1 + (heads > 2), "sinks": sinks, "decay": decay})
    assert off("window", window + 1) > 100 and off("chunk", chunk + 1) > 100
    assert off("mix", np.zeros(heads)) > 100 and off("q_map", np.ones((heads, 5, 8))) > 100
    assert off("decay", decay + 0.05) > 100


def test_generator_covers_the_format(tmp_path):
    """What the random models of this file contain, all in all; so that no choice can get lost
    unnoticed."""
    seen = set()
    for seed in SEEDS:
        config, layers = reference.random_config(np.random.default_rng(seed))
        seen |= {("tied", config.flags & 1), ("head bias", config.flags & 2),
                 ("projection", config.flags & 4),
                 ("final norm", config.final_norm), ("padding", config.rows > config.vocab),
                 ("tokens", config.input == 0),
                 ("no head", config.rows == 0),
                 ("own head", config.rows > 0 and not config.flags & 1)}
        for l in layers:
            mixer = ("none", "conv", "taylor", "window")[l.mixer]
            seen |= {("mixer", mixer), ("norm1", l.norm1), ("norm2", l.norm2), ("mlp", l.mlp)}
            seen |= {(mixer, "flag", bit) for bit in range(13) if l.flags >> bit & 1}
            seen |= {("fading", l.fading)}
            pairs = 0 if not l.rope_pairs else 2 if 2 * l.rope_pairs == l.head_dim_k else 1
            seen |= {(mixer, "rope_pairs", pairs), ("conv_width", l.conv_width),
                     (mixer, "grouped", l.heads > l.kv_heads), ("normalizer", l.normalizer),
                     ("kernel", l.kernel),
                     ("degree", l.degree), ("sinks", l.sinks), ("decays", l.decay > 0),
                     (mixer, "window", l.window), (mixer, "key", l.head_dim_k),
                     (mixer, "value", l.head_dim_v)}
    wanted = {("tied", 1), ("head bias", 2), ("projection", 4), ("padding", True), ("tokens", True),
              ("tokens", False),
              ("no head", True), ("own head", True)}
    wanted |= {(name, i) for name in ("final norm", "norm1", "norm2") for i in range(4)}
    wanted |= {("mixer", name) for name in ("none", "conv", "taylor", "window")}
    wanted |= {("mlp", i) for i in range(4)} | {("fading", i) for i in range(3)}
    wanted |= {("taylor", "flag", bit) for bit in (10, 11, 12)} | {("window", "flag", 10)}
    wanted |= {(mixer, "flag", bit) for mixer in ("conv", "taylor", "window")
               for bit in (0, 1, 3, 4, 6, 7, 8)} | {("conv", "flag", 2)}
    wanted |= {(mixer, "flag", 5) for mixer in ("taylor", "window")}
    wanted |= {("kernel", i) for i in range(3)}
    wanted |= {(mixer, "rope_pairs", i) for mixer in ("taylor", "window")
               for i in range(3)} | {("conv_width", i) for i in range(1, 6)}
    wanted |= {(mixer, "grouped", yes) for mixer in ("taylor", "window") for yes in (True, False)}
    wanted |= {("normalizer", i) for i in range(4)} | {("degree", i) for i in range(1, 5)}
    wanted |= {("sinks", n) for n in (0, 1, 16, 21)} | {("decays", yes) for yes in (True, False)}
    wanted |= {("taylor", "flag", 9)} | {("taylor", "window", n) for n in (0, 1, 5, 16, 33)}
    wanted |= {("window", "window", n) for n in (1, 2, 5, 33, 65, 129, 300)}
    wanted |= {("window", "key", n) for n in (12, 16, 64, 112)}
    wanted |= {("taylor", "key", n) for n in (4, 5, 8, 16, 24)}
    wanted |= {("taylor", "value", n) for n in (1, 5, 12, 16, 112)}
    assert not wanted - seen, wanted - seen


# ---- The same tokens in any way give the same bits. Seven models with all mixers, three of them
# quantized; then fading by gates and by a fixed factor, a prefix that is not used, and hedgehog
# features beside a window.

ALL = [export.CONV, export.TAYLOR, export.WINDOW, export.TAYLOR]
FADING = [export.TAYLOR, export.TAYLOR]
PLAIN_SUMS = {"kernel": 0, "window": 0, "sinks": 0, "decay": 0.0, "degree": 2, "chunk": 9,
              "normalizer": export.ADD, "normalizer_eps": 0.0}
WITH_PREFIX = {**PLAIN_SUMS, "flags": export.PREFIX, "rope_pairs": 0, "fading": 0}
HEDGEHOG = {**PLAIN_SUMS, "kernel": export.HEDGEHOG, "degree": 6, "heads": 6, "kv_heads": 2,
            "head_dim_k": 8, "rope_pairs": 4, "window": 10, "fading": 0}
TOKENS = {"input": 0, "rows": 50, "vocab": 47, "flags": export.TIED}
MODELS = [(100, {"mixers": ALL, **TOKENS}), (101, {"mixers": ALL, "dim": 48, **TOKENS}),
          (102, {"mixers": ALL, "layer": {"chunk": 5, "window": 7, "conv_width": 4}, **TOKENS}),
          (103, {"mixers": ALL[::-1], **TOKENS}),
          (104, {"mixers": ALL, "dtype": 1, **TOKENS}),
          (105, {"mixers": ALL, "dtype": 2, **TOKENS}),
          (106, {"mixers": ALL, "dim": 65, "dtype": "mixed", **TOKENS}),
          (107, {"mixers": FADING, "layer": {**PLAIN_SUMS, "fading": 1, "window": 11}, **TOKENS}),
          (108, {"mixers": FADING, "layer": {**PLAIN_SUMS, "fading": 2, "flags": export.QK_NORM},
                 **TOKENS}),
          (109, {"mixers": FADING, "layer": WITH_PREFIX, "prefix": 24, **TOKENS}),
          (110, {"mixers": FADING, "layer": HEDGEHOG, **TOKENS})]
BUDGET = settings(max_examples=10, deadline=None, derandomize=True,
                  suppress_health_check=list(hypothesis.HealthCheck))
EVERY_MODEL = pytest.mark.parametrize("index", range(len(MODELS)))
TEXT = st.lists(st.integers(0, 46), min_size=1, max_size=90)


def build(random_model, index):
    seed, overrides = MODELS[index]
    return Model(random_model(seed, **overrides))


def stepped(model, tokens):
    session = Session(model, 1)
    return np.stack([session.step(t) for t in tokens])


@EVERY_MODEL
@BUDGET
@given(tokens=TEXT, cuts=st.lists(st.integers(0, 90), max_size=6), block=st.integers(1, 64))
def test_feed_equals_steps(random_model, index, tokens, cuts, block):
    """However the tokens are cut into feeds, the logits of every token are those of single
    steps."""
    model = build(random_model, index)
    session = Session(model, block)
    cuts = sorted({min(c, len(tokens)) for c in cuts} | {0, len(tokens)})
    parts = [session.feed(tokens[a:b]) for a, b in zip(cuts, cuts[1:])]
    assert same_bits(np.concatenate(parts), stepped(model, tokens))
    assert same_bits(session.logits(), parts[-1][-1]) and session.count() == len(tokens)


@EVERY_MODEL
def test_every_block_size(random_model, index):
    model = build(random_model, index)
    tokens = np.random.default_rng(index).integers(0, 47, 130)
    expected = stepped(model, tokens)
    for block in range(1, 65):
        assert same_bits(Session(model, block).feed(tokens), expected), block
        assert same_bits(Session(model, block).feed_last(tokens), expected[-1]), block


@pytest.mark.parametrize("n", [1, 2, 9, 10, 24])
def test_prefix(random_model, n, tmp_path):
    """The tokens of a prefix see each other; what comes later sees them, in any way of feeding, and
    after a copy. Without a prefix the same model looks back only."""
    path = random_model(109, **dict(MODELS[9][1]))
    m, model = reference.read(path), Model(path)
    tokens = np.random.default_rng(n).integers(0, 47, 90)
    expected = reference.run(m, tokens, prefix=n)
    scale = TOLERANCE * max(1, np.abs(expected).max())
    session, copy = Session(model, 32), Session(model, 5)
    first = session.feed_prefix(tokens[:n])
    assert np.abs(first - expected[:n]).max() <= scale
    copy.copy_from(session)
    rest = session.feed(tokens[n:])
    assert np.abs(rest - expected[n:]).max() <= scale
    assert same_bits(rest, copy.feed(tokens[n:]))
    assert np.abs(expected - reference.run(m, tokens)).max() > 50 * scale
    with pytest.raises(based.BasedError, match="must come first"):
        session.feed_prefix(tokens[:n])
    for wrong in (0, 6, 25):
        with pytest.raises(based.BasedError, match=f"a prefix of {wrong} tokens"):
            Session(model, 5 if wrong == 6 else 32).feed_prefix(tokens[:wrong])


def guess(session, alone, tokens, rng, lengths):
    """Feeds tokens to `session` as drafts, whose guesses go wrong somewhere or not, and to `alone`
    one by one: the same logits, and after each draft the same bytes. Returns how many tokens were
    fed at once, at most."""
    at = most = 0
    while at < len(tokens):
        draft = np.array(tokens[at:at + int(rng.integers(1, lengths))])
        right = int(rng.integers(1, len(draft) + 1))
        draft[right:] = rng.integers(0, 47, len(draft) - right)
        fed = session.draft(draft)
        most, right = max(most, len(fed)), min(right, len(fed))
        expected = np.stack([alone.step(t) for t in draft[:right]])
        assert same_bits(fed[:right], expected) and same_bits(session.logits(), fed[-1])
        session.keep(right)
        assert session.save() == alone.save()
        at += right
    return most


@EVERY_MODEL
@BUDGET
@given(past=TEXT, tokens=TEXT, block=st.integers(1, 40), seed=st.integers(0, 99))
def test_drafts_equal_steps(random_model, index, past, tokens, block, seed):
    """Whatever was guessed, and taken back: logits and saved bytes are those of single steps."""
    model = build(random_model, index)
    session, alone = Session(model, block), Session(model, 64)
    session.feed(past)
    alone.feed(past)
    guess(session, alone, tokens, np.random.default_rng(seed), 24)


def test_drafts_of_random_models(random_model):
    """The same for random models of tokens, most of which take several tokens at once, also behind
    a prefix."""
    most = []
    for seed in range(200, 250):
        model = Model(random_model(seed, **TOKENS))
        session, alone = Session(model, 32), Session(model, 32)
        rng = np.random.default_rng(seed)
        if seed == 200:
            model = Model(random_model(109, **dict(MODELS[9][1])))
            session, alone = Session(model, 32), Session(model, 32)
            assert same_bits(session.feed_prefix(range(20)), alone.feed_prefix(range(20)))
        most.append(guess(session, alone, rng.integers(0, 47, 200), rng, 24))
    assert np.mean(np.array(most) > 4) > 0.5


@EVERY_MODEL
def test_refused_drafts(random_model, index):
    """A refused draft, or a refused call to keep a part of one, changes nothing."""
    model = build(random_model, index)
    session, other = Session(model, 8), Session(model, 8)
    session.feed(range(30))
    other.feed(range(40))
    before = session.save()
    for tokens, message in (([], "no tokens"), ([1, 47], "vocabulary"), ([-1], "vocabulary")):
        with pytest.raises(based.BasedError, match=message):
            session.draft(tokens)
        assert session.save() == before
    fed = len(session.draft([1, 2, 3, 4]))
    good = session.logits
    for spoil in (good, lambda: session.step(1), lambda: session.feed([1, 2, 3]),
                  lambda: session.copy_from(other), session.reset, lambda: session.keep(fed),
                  lambda: based.step_many([session, other], [1, 2]),
                  lambda: based.step_many([other, session], [1, 2])):
        spoil()
        before = session.save()
        for n in (0, fed + 1, *([] if spoil is good else range(1, fed + 1))):
            with pytest.raises(based.BasedError, match="tokens to keep"):
                session.keep(n)
            assert session.save() == before
        fed = len(session.draft([1, 2, 3, 4]))


NO_CHECKSUM, PLAIN, AVX2, AVX512 = 1, 2, 4, 8             # flags of based_open


def test_every_instruction_set(random_model):
    for seed in range(40):
        path, rng = random_model(seed, dtype="mixed"), np.random.default_rng(seed)
        x = reference.random_input(rng, reference.read(path), 60)
        expected = Session(Model(path), 64).feed(x)
        for flags in (PLAIN, AVX2, AVX512, PLAIN | NO_CHECKSUM):
            assert same_bits(Session(Model(path, flags), 64).feed(x), expected), (seed, flags)


@pytest.mark.parametrize("flags, threads", [
    ("-O0", 1), *([("-O3", 1)] if FULL else []), ("-fopenmp", 1), ("-fopenmp", 2), ("-fopenmp", 5)])
def test_every_build_and_thread_count(random_model, flags, threads):
    try:
        lib = based.build(*flags.split())
    except Exception:
        if "openmp" in flags:
            pytest.skip("this compiler has no OpenMP")
        raise
    for index in range(len(MODELS)):
        seed, overrides = MODELS[index]
        path = random_model(seed, **overrides)
        tokens = np.random.default_rng(index).integers(0, 47, 70)
        expected = Session(Model(path), 16).feed(tokens)
        assert same_bits(Session(Model(path, 0, lib), 16, threads).feed(tokens), expected), index
        assert same_bits(Session(Model(path, PLAIN, lib), 5, threads).feed(tokens), expected), index
        guess(Session(Model(path, 0, lib), 16, threads), Session(Model(path), 1), tokens,
              np.random.default_rng(index), 24)


@EVERY_MODEL
@BUDGET
@given(before=TEXT, tokens=TEXT)
def test_reset_equals_fresh(random_model, index, before, tokens):
    model = build(random_model, index)
    session = Session(model, 16)
    session.feed(before)
    session.reset()
    assert session.count() == 0 and session.logits() is None
    assert same_bits(session.feed(tokens), Session(model, 16).feed(tokens))


@EVERY_MODEL
@BUDGET
@given(tokens=TEXT, other=TEXT, turns=st.lists(st.booleans(), max_size=180))
def test_interleaved_sessions_are_separate(random_model, index, tokens, other, turns):
    model = build(random_model, index)
    one, two = Session(model, 3), Session(model, 8)
    left, right, got = list(tokens), list(other), ([], [])
    for first in turns + [True] * len(tokens) + [False] * len(other):
        if first and left:
            got[0].append(one.step(left.pop(0)))
        elif not first and right:
            got[1].append(two.step(right.pop(0)))
    assert same_bits(got[0], stepped(model, tokens)) and same_bits(got[1], stepped(model, other))


@EVERY_MODEL
@BUDGET
@given(past=TEXT, tokens=TEXT, junk=TEXT)
def test_copy_equals_original(random_model, index, past, tokens, junk):
    model = build(random_model, index)
    original, copy = Session(model, 7), Session(model, 32)
    original.feed(past)
    copy.feed(junk)
    copy.copy_from(original)
    assert copy.count() == len(past) and same_bits(copy.logits(), original.logits())
    assert same_bits(copy.feed(tokens), original.feed(tokens))


@EVERY_MODEL
@BUDGET
@given(pasts=st.lists(TEXT, min_size=1, max_size=6), data=st.data())
def test_step_many_equals_alone(random_model, index, pasts, data):
    """Sessions at different places of different texts, stepped together."""
    model, n = build(random_model, index), len(pasts)
    together, alone = [Session(model, n) for _ in pasts], [Session(model, 1) for _ in pasts]
    for a, b, past in zip(together, alone, pasts):
        a.feed(past)
        b.feed(past)
    for _ in range(3):
        tokens = data.draw(st.lists(st.integers(0, 46), min_size=n, max_size=n))
        assert same_bits(based.step_many(together, tokens),
                         [s.step(t) for s, t in zip(alone, tokens)])


@pytest.mark.parametrize("bad", [-1, -2**31, 47, 49, 50, 2**31 - 1])
@EVERY_MODEL
def test_failed_call_changes_nothing(random_model, index, bad):
    """A token outside the vocabulary (padding rows are outside too) is refused before anything
    moves."""
    model, rng = build(random_model, index), np.random.default_rng(index)
    past, good = rng.integers(0, 47, 20), rng.integers(0, 47, 30)
    session, expected = Session(model, 4), Session(model, 4)
    session.feed(past)
    expected.feed(past)
    with pytest.raises(based.BasedError, match="vocabulary") as e:
        session.feed([*good, bad])
    assert e.value.status == -5 and "\n" not in str(e.value)
    assert session.count() == len(past) and same_bits(session.logits(), expected.logits())
    with pytest.raises(based.BasedError):
        based.step_many([session, Session(model, 4)], [good[0], bad])
    assert same_bits(session.feed(good), expected.feed(good))


OF_VECTORS = [s for s in SEEDS if reference.random_config(np.random.default_rng(s))[0].input]


@pytest.mark.parametrize("seed", OF_VECTORS[:8])
def test_vectors_in_any_pieces(random_model, seed):
    """Models without an embedding: the same, for vectors."""
    path, rng = random_model(seed), np.random.default_rng(seed)
    model, x = Model(path), reference.random_input(rng, reference.read(path), 70)
    whole = Session(model, 64).feed(x)
    pieces, ones = Session(model, 5), Session(model, 1)
    assert same_bits(np.concatenate([pieces.feed(part) for part in np.split(x, [1, 2, 30, 31])]),
                     whole)
    assert same_bits(np.concatenate([ones.feed(row[None]) for row in x]), whole)
    with pytest.raises(based.BasedError, match="vectors"):
        ones.step(0)
