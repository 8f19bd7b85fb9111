"""Taylor attention by itself (based.h part 9) against the originals' own outputs, against its
definition in float64 (to 1e-6 of the scale, and to 1e-12 when the same source is compiled with
doubles), and against itself computed in other ways.

An error is measured in units of the largest output times the condition of the query,
sum |w| / |sum w|: kernels of odd degree and Edifice's have weights of both signs, and where their
sum nearly cancels, rounding is magnified by that much, in the original too. It is 1 where all
weights are positive."""
import ast
import functools
import itertools
import math

import pytest

np = pytest.importorskip("numpy")
import based            # noqa: E402
import taylor           # noqa: E402
from taylor import ADD, CLAMP, DIAGONAL, DOT, ONE, RAW, Taylor          # noqa: E402
from taylor import by_definition, golden, through_c                     # noqa: E402

in_double = functools.partial(through_c, double=True)
SINGLE, DOUBLE = 1e-6, 1e-12


def far(got, expected, condition=1.0):
    """The largest error in units of the scale."""
    assert np.shape(got) == np.shape(expected)
    return (np.abs(np.asarray(got, np.float64) - expected)
            / (np.abs(expected).max() * np.maximum(condition, 1))).max()


# ---- The originals

@pytest.mark.parametrize("title, case", golden("sata.txt"),
                         ids=lambda x: x if isinstance(x, str) else "")
@pytest.mark.parametrize("causal", [True, False])
def test_sata(title, case, causal):
    terms, width = int(title.split("P")[1]), case["Q"].shape[1]
    q, k, v = (case[name][:, None] for name in "QKV")
    kind = {"degree": max(terms - 1, 1), "scale": width ** -0.5, "normalizer": RAW}
    if terms == 1:
        kind["coefficients"] = [[1, 0]]                 # degree 0: a plain mean
    condition = []
    exact = by_definition(q, k, v, kind, causal, condition=condition)[:, 0]
    original = case["Y" if causal else "Y_noncausal"]
    assert far(through_c(q, k, v, kind, causal)[:, 0], original, condition[0][:, None]) < SINGLE
    assert far(in_double(q, k, v, kind, causal)[:, 0], exact, condition[0][:, None]) < DOUBLE


@pytest.mark.parametrize("title, case", golden("lucidrains_tsla.txt"),
                         ids=lambda x: x.split()[0] if isinstance(x, str) else "")
def test_lucidrains(title, case):
    options = dict(ast.literal_eval(title.split(" ", 1)[1]))
    given = {"causal": options.get("causal", False), "heads": 3}
    given.update({name: case[name][0] for name in ("context", "mask") if name in case})
    layer = functools.partial(taylor.lucidrains, case, case["x"][0], **given)
    assert far(layer(attend=through_c), case["y"][0]) < SINGLE
    assert far(layer(attend=in_double), layer(attend=by_definition)) < DOUBLE


@pytest.mark.parametrize("options", [{"shift": True}, {"norm": True}, {"gate": True},
                                     {"shift": True, "norm": True, "gate": True}])
def test_lucidrains_around(options):
    """What the golden cases do not use: shift, norm and gates around the same attention. A whole
    layer, f32 against f64."""
    rng, dim, heads = np.random.default_rng(3), 20, 4
    w = {"to_q.0.weight": rng.normal(size=(heads * 8, dim)) / 5,
         "to_kv.0.weight": rng.normal(size=(2 * 8, dim)) / 5,
         "to_out.0.weight": rng.normal(size=(dim, heads * 8)) / 5,
         "rotary_emb.freqs": 10000 ** (-np.arange(4) / 4)}
    w.update({"norm.gamma": rng.uniform(0.5, 1.5, dim)} if options.get("norm") else {})
    w.update({"to_v_gates.0.weight": rng.normal(size=(heads, dim)) / 4}
             if options.get("gate") else {})
    layer = functools.partial(taylor.lucidrains, w, rng.normal(size=(50, dim)), heads, causal=True,
                              shift=options.get("shift"))
    exact = layer(attend=by_definition)
    assert far(layer(attend=through_c), exact) < SINGLE
    assert far(layer(attend=in_double), exact) < DOUBLE


@pytest.mark.parametrize("title, case", golden("edifice_based.txt"),
                         ids=lambda x: x.split()[0] if isinstance(x, str) else "")
@pytest.mark.parametrize("text", [0, 1])
def test_edifice(title, case, text):
    _, order, _, mode, *_ = title.split()
    condition = []
    attention = functools.partial(by_definition, condition=condition)
    layer = functools.partial(taylor.edifice, case, case["x"][text], 4, int(order))
    exact, last = layer(attend=attention), slice(None) if mode == "all" else slice(-1, None)
    worst = np.max(condition)
    assert far(layer(attend=through_c)[last], np.atleast_2d(case["y"][text]), worst) < SINGLE
    assert far(layer(attend=in_double), exact, worst) < DOUBLE


# ---- Every kind against its definition

KINDS = [{"degree": p, "normalizer": n, "kernel": kernel, "chunk": chunk}
         for (p, n), kernel, chunk in zip(itertools.product(range(1, 9), (ADD, CLAMP, RAW, ONE)),
                                          itertools.cycle((DOT, DOT, DIAGONAL)),
                                          itertools.cycle((1, 2, 5, 16, 40)))]


def numbers(kind, seed=0, n=70, width=5, head_dim_v=7, heads=1, kv_heads=1):
    rng = np.random.default_rng(seed)
    kind = {"scale": 1 / (math.sqrt(width) * (2 if kind.get("kernel") else 1)),
            "normalizer_eps": 1e-5, **kind}
    return kind, *(rng.standard_normal((n, *shape)).astype(np.float32)
                   for shape in ((heads, width), (kv_heads, width), (kv_heads, head_dim_v)))


@pytest.mark.parametrize("kind", KINDS, ids=lambda k: "-".join(map(str, k.values())))
@pytest.mark.parametrize("causal", [True, False])
def test_definition(kind, causal):
    """Packed monomials give what the polynomial of the dot product gives. A power of a small dot
    product of large vectors is a sum of monomials that cancel: from degree 5 on this is seen in
    single precision."""
    kind, q, k, v = numbers(kind, heads=6, kv_heads=2)
    condition = []
    exact = by_definition(q, k, v, kind, causal, condition=condition)
    scale = np.max(condition) if kind["normalizer"] != ONE else 1.0
    single = SINGLE if kind["degree"] < 5 else 4 * SINGLE
    assert far(through_c(q, k, v, kind, causal), exact, scale) < single
    assert far(in_double(q, k, v, kind, causal), exact, scale) < DOUBLE


@pytest.mark.parametrize("degree, width", [(12, 4), (12, 1), (2, 64), (3, 16), (6, 8)])
def test_sizes(degree, width):
    """Degree 12 of width 4 (1820 features) and other corners; wide values."""
    kind, q, k, v = numbers({"degree": degree}, n=40, width=width, head_dim_v=65)
    sizes = Taylor(head_dim_k=width, head_dim_v=65, **kind).sizes
    assert sizes.features == math.comb(width + degree, degree)
    condition = []
    exact = by_definition(q, k, v, kind, True, condition=condition)
    single = SINGLE if degree < 5 else 4 * SINGLE
    assert far(through_c(q, k, v, kind, True), exact, np.max(condition)) < single
    assert far(in_double(q, k, v, kind, True), exact, np.max(condition)) < DOUBLE


def test_features_are_packed():
    """Packed and unpacked: the sums over all tuples (d + d^2 + ... of them) and over monomials are
    the same numbers."""
    kind, q, k, v = numbers({"degree": 3})

    def unpacked(x):
        powers = [functools.reduce(np.multiply.outer, [x] * p).reshape(-1) for p in (1, 2, 3)]
        return np.concatenate([[1]] + [y / math.sqrt(math.factorial(p))
                                       for p, y in enumerate(powers, 1)])
    phi_q = np.stack([unpacked(x * math.sqrt(kind["scale"])) for x in q[:, 0].astype(np.float64)])
    phi_k = np.stack([unpacked(x * math.sqrt(kind["scale"])) for x in k[:, 0].astype(np.float64)])
    w = phi_q @ phi_k.T
    z = w.sum(1, keepdims=True)
    expected = w @ v[:, 0] / (z + kind["normalizer_eps"])
    condition = np.abs(w).sum(1, keepdims=True) / np.abs(z)
    assert phi_q.shape[1] == 1 + 5 + 25 + 125
    assert Taylor(head_dim_k=5, head_dim_v=7, **kind).sizes.features == 1 + 5 + 15 + 35
    assert far(in_double(q, k, v, kind, False)[:, 0], expected, condition) < DOUBLE


def test_coefficients_per_head():
    kind, q, k, v = numbers({"degree": 4}, heads=3)
    own = np.random.default_rng(1).uniform(0.1, 1, (3, 5))
    t = Taylor(True, coefficients=own, head_dim_k=5, head_dim_v=7, group=3, **kind)
    y = t.state().feed(q, k[:, 0], v[:, 0])
    for h in range(3):
        expected = by_definition(q[:, h:h + 1], k, v, {**kind, "coefficients": own[h:h + 1]}, True)
        assert far(y[:, h], expected[:, 0], 1e3) < DOUBLE


# ---- The same set of pairs, come to in other ways

def one(double=False, **kind):
    kind, q, k, v = numbers({"degree": 2, **kind})
    return Taylor(double, head_dim_k=5, head_dim_v=7, **kind), q, k[:, 0], v[:, 0]


@pytest.mark.parametrize("chunk", [1, 3, 16, 64])
def test_steps_and_feeds(chunk):
    """One by one, in pieces, add and read: the same bits; and full reading after the last token is
    causal reading of it."""
    t, q, k, v = one(chunk=chunk)
    whole, step, piece = t.state(), t.state(), t.state()
    y = whole.feed(q, k, v)
    assert np.array_equal(y, np.concatenate([step.add(k[i:i + 1], v[i:i + 1]).read(q[i])
                                             for i in range(70)]))
    parts = [piece.feed(q[a:b], k[a:b], v[a:b]) for a, b in ((0, 1), (1, 33), (33, 33), (33, 70))]
    assert np.array_equal(y, np.concatenate(parts))
    assert np.array_equal(t.state().add(k, v).read(q[-1]), y[-1:])
    assert whole.count() == 70
    whole.reset()
    assert whole.count() == 0 and np.array_equal(whole.feed(q, k, v), y)


@pytest.mark.parametrize("double, tolerance", [(False, SINGLE), (True, DOUBLE)])
@pytest.mark.parametrize("chunk, cut", [(1, 20), (16, 0), (16, 5), (16, 16), (16, 37), (16, 70),
                                        (7, 35), (64, 30)])
def test_merge(chunk, cut, double, tolerance):
    """Two states of parts of the text, merged, are the state of the whole, pairs that are not yet
    flushed included. Values of 40 columns: the second block of a compensation row is a partial
    one."""
    kind, q, k, v = numbers({"degree": 3, "chunk": chunk}, head_dim_v=40)
    t = Taylor(double, head_dim_k=5, head_dim_v=40, **kind)
    first, direct = t.state().add(k[:cut, 0], v[:cut, 0]), t.state()
    second = t.state().add(k[cut:, 0], v[cut:, 0])
    before = second.read(q)
    first.merge(second)
    assert first.count() == 70 and second.count() == 70 - cut
    assert np.array_equal(second.read(q), before)
    condition = []
    by_definition(q, k, v, kind, False, condition=condition)
    assert far(first.read(q), direct.add(k[:, 0], v[:, 0]).read(q).astype(np.float64),
               condition[0].max()) < tolerance
    more = first.feed(q, k[:, 0], v[:, 0])
    assert far(more, direct.feed(q, k[:, 0], v[:, 0]).astype(np.float64),
               10 * condition[0].max()) < tolerance


def test_merge_into_nothing():
    """An empty state into which another is merged continues bit for bit like it: the compensation
    of rounding errors is merged, too."""
    kind, q, k, v = numbers({"degree": 2, "chunk": 7}, n=6000)
    k, v = k[:, 0] + np.float32(0.7), v[:, 0] + np.float32(2)
    t = Taylor(head_dim_k=5, head_dim_v=7, **kind)
    long = t.state().add(k[:3000], v[:3000])
    other = t.state().merge(long)
    assert np.array_equal(long.feed(q[3000:], k[3000:], v[3000:]),
                          other.feed(q[3000:], k[3000:], v[3000:]))


def test_many_merges_do_not_add_up():
    """A thousand states merged into one: rounding errors do not add up."""
    kind, q, k, v = numbers({"degree": 2, "chunk": 4}, n=8000)
    t = Taylor(head_dim_k=5, head_dim_v=7, **kind)
    total, part = t.state(), t.state()
    for i in range(0, 8000, 8):
        part.reset()
        total.merge(part.add(k[i:i + 8, 0] + 1, v[i:i + 8, 0]))
    exact = by_definition(q[:50], k + np.float32(1), v, kind, False)
    assert total.count() == 8000
    assert np.abs(total.read(q[:50]) - exact).max() < 1e-6 * np.abs(v).max()


@pytest.mark.parametrize("double, tolerance", [(False, 4 * SINGLE), (True, DOUBLE)])
@pytest.mark.parametrize("chunk", [1, 16, 64])
def test_subtract(chunk, double, tolerance):
    """A state with pairs subtracted, flushed or not, is as if they had never been added."""
    kind, q, k, v = numbers({"degree": 2, "chunk": chunk})
    t = Taylor(double, head_dim_k=5, head_dim_v=7, **kind)
    gone, kept = [0, 3, 40, 66, 69], [i for i in range(70) if i not in (0, 3, 40, 66, 69)]
    state, never = t.state().add(k[:, 0], v[:, 0]), t.state().add(k[kept, 0], v[kept, 0])
    for i in gone:
        state.subtract(k[i, 0], v[i, 0])
    assert state.count() == 65
    assert far(state.read(q), never.read(q).astype(np.float64)) < tolerance
    assert far(state.feed(q, k[:, 0], v[:, 0]),
               never.feed(q, k[:, 0], v[:, 0]).astype(np.float64)) < tolerance


def test_copy():
    t, q, k, v = one()
    a, b = t.state().add(k, v), t.state().add(k[:3], v[:3])
    b.copy_from(a)
    assert b.count() == 70 and np.array_equal(a.read(q), b.read(q))
    assert np.array_equal(a.feed(q, k, v), b.feed(q, k, v))


@pytest.mark.parametrize("normalizer", [ADD, CLAMP, RAW, ONE])
def test_empty_state(normalizer):
    """All tokens masked: zeros, as the originals give."""
    t, q, _, _ = one(normalizer=normalizer)
    assert not t.state().read(q).any()


@pytest.mark.parametrize("double, tolerance", [(False, SINGLE), (True, DOUBLE)])
def test_causal_poly(double, tolerance):
    """Against the sum over all pairs k <= j <= i."""
    kind, q1, k, v = numbers({"degree": 2, "normalizer_eps": 0.0}, n=40)
    q1, q2, q3, v = q1[:, 0], q1[::-1, 0].copy(), k[:, 0], v[:, 0]
    outer, inner = (np.tril(taylor.weights(a.astype(np.float64), b.astype(np.float64), kind))
                    for a, b in ((q1, q2), (q2, q3)))
    pairs = outer @ inner
    expected = pairs @ v / (pairs.sum(1, keepdims=True) + 1e-6)
    assert far(taylor.causal_poly(q1, q2, q3, v, double, **kind), expected) < tolerance


@pytest.mark.parametrize("window, chunk", [(1, 1), (8, 5), (20, 16), (100, 3)])
def test_window(window, chunk):
    """The newest pairs have the weight exp(s), the others that of the polynomial. A copy and a
    merge into an empty state continue with the same bits."""
    kind, q, k, v = numbers({"degree": 2, "normalizer_eps": 0.0, "window": window, "chunk": chunk})
    t = Taylor(head_dim_k=5, head_dim_v=7, **kind)
    scores = kind["scale"] * q[:, 0].astype(np.float64) @ k[:, 0].T
    past, at = np.tri(70, dtype=bool), np.arange(70)
    flushed = at < (np.maximum(at - window, 0) // chunk * chunk)[:, None]
    weights = past * np.where(flushed, 1 + scores + scores ** 2 / 2, np.exp(scores))
    state, half = t.state(), t.state().add(k[:35, 0], v[:35, 0])
    got = state.feed(q, k[:, 0], v[:, 0])
    assert far(got[:, 0], weights @ v[:, 0] / weights.sum(1, keepdims=True)) < SINGLE
    for twin in (t.state().merge(half), t.state()):
        if not twin.count():
            twin.copy_from(half)
        assert np.array_equal(twin.feed(q[35:], k[35:, 0], v[35:, 0]), got[35:])


def test_window_largest_numbers():
    """Scores of some hundreds, of either sign, near and far: no exp overflows, and sums whose
    weights add up to zero or less are left out."""
    kind, q, k, v = numbers({"degree": 1, "normalizer_eps": 0.0, "window": 8, "chunk": 4,
                             "scale": 60.0})
    t = Taylor(head_dim_k=5, head_dim_v=7, **kind)
    y = t.state().feed(q, k[:, 0], v[:, 0])
    scores = 60.0 * q[:, 0].astype(np.float64) @ k[:, 0].T
    assert scores.max() > 400 and scores.min() < -400 and np.isfinite(y).all()
    flushed = np.arange(70) < (np.maximum(np.arange(70) - 8, 0) // 4 * 4)[:, None]
    old = (1 + scores) * flushed
    out = old.sum(1) <= 0
    near = np.where(np.tri(70, dtype=bool) & ~flushed, scores, -np.inf)
    near = np.exp(near - near.max(1, keepdims=True))
    assert out[12:].any() and not out[12:].all()
    assert far(y[out, 0], (near @ v[:, 0] / near.sum(1, keepdims=True))[out]) < 1e-4
    # all keys nearby point away from the query, all old ones towards it
    axis = np.eye(1, 5, dtype=np.float32)
    k = np.repeat(axis * np.float32(10), 24, 0)
    k[12:] *= -1
    assert far(t.state().add(k, v[:24, 0]).read(axis)[:, 0],
               v[:12, 0].mean(0, keepdims=True)) < SINGLE


# ---- What is refused

@pytest.mark.parametrize("field, value", [
    ("degree", 0), ("degree", 13), ("head_dim_k", 0), ("head_dim_v", 0), ("group", 0),
    ("group", 4097), ("kernel", 2), ("normalizer", 4), ("chunk", 0), ("chunk", 1025),
    ("window", (1 << 20) + 1), ("head_dim_k", (1 << 20) + 1), ("scale", math.inf),
    ("normalizer_eps", math.nan)])
def test_fields_out_of_range(field, value):
    with pytest.raises(based.BasedError) as e:
        Taylor(**{"head_dim_k": 4, "head_dim_v": 4, field: value})
    assert e.value.status == -5 and field in str(e.value)


@pytest.mark.parametrize("degree, width, head_dim_v",
                         [(4, 256, 64), (7, 64, 64), (12, 64, 64), (12, 1 << 20, 1 << 20)])
def test_too_large(degree, width, head_dim_v):
    """Refused before anything is allocated, with the bytes needed (of what does not fit 64 bits,
    a lower bound)."""
    with pytest.raises(based.BasedError, match="features") as e:
        Taylor(head_dim_k=width, head_dim_v=head_dim_v, degree=degree)
    features = math.comb(width + degree, degree)
    need = 4 * (features * (head_dim_v + 2 + (head_dim_v + 1) // 2) + 16 * (width + head_dim_v))
    said = int(str(e.value).split("bytes")[0].split()[-1])
    assert e.value.status == -4 and ("more than" in str(e.value) and said <= need
                                     or need <= said <= need + 256)


def test_blocks_too_small():
    """Memory that is too small or not aligned; the error says how many bytes are needed."""
    import ctypes as C
    t, q, k, v = one()
    owner, at = taylor.block(1 << 20)
    other_owner, scratch = taylor.block(1 << 20)
    out, error = C.c_void_p(), based.Error()
    need = t.sizes

    def state_init(memory, nbytes, scratch_at, scratch_bytes):
        status = t.lib.based_taylor_state_init(C.byref(out), t.handle, memory, nbytes, scratch_at,
                                               scratch_bytes, C.byref(error))
        return status, error.text.decode()
    assert state_init(at, need.state, scratch, need.scratch)[0] == 0
    said = f"the memory block has {need.state - 1} bytes, {need.state} are needed"
    assert state_init(at, need.state - 1, scratch, need.scratch) == (-4, said)
    assert state_init(at, need.state, scratch, need.scratch - 1)[0] == -4
    assert state_init(at + 4, need.state, scratch, need.scratch)[0] == -5
    assert state_init(None, need.state, scratch, need.scratch)[0] == -5
    init = t.lib.based_taylor_init(C.byref(out), C.byref(t.kind), at, need.attention - 1,
                                   C.byref(error))
    assert init == -4 and str(need.attention) in error.text.decode()


@pytest.mark.parametrize("field, value",
                         [("kernel", DIAGONAL), ("normalizer", CLAMP), ("normalizer_eps", 1e-6)])
def test_window_beside_something_else(field, value):
    with pytest.raises(based.BasedError, match="window") as e:
        Taylor(**{"head_dim_k": 4, "head_dim_v": 4, "window": 4, field: value})
    assert e.value.status == -5


def test_nothing_leaves_a_window():
    t, _, k, v = one(window=4, normalizer_eps=0.0)
    with pytest.raises(based.BasedError, match="window"):
        t.state().add(k, v).subtract(k[0], v[0])


def test_wrong_partners():
    t, q, k, v = one()
    a, other = t.state().add(k, v), one()[0].state()
    for call in (lambda: a.merge(a), lambda: a.merge(other), lambda: a.copy_from(other),
                 lambda: other.subtract(k[0], v[0])):
        with pytest.raises(based.BasedError) as e:
            call()
        assert e.value.status == -5
    assert a.count() == 70 and np.array_equal(a.read(q), t.state().add(k, v).read(q))


def test_error_table():
    """What the README quotes from taylor_error.py: at degree 3 and 8, keys of width 8."""
    import taylor_error
    quoted = {(0.5, 3): 5, (1.0, 3): 32, (2.0, 3): 75, (0.5, 8): 0.02, (1.0, 8): 3.4, (2.0, 8): 34}
    for (spread, degree), percent in quoted.items():
        got = 100 * taylor_error.errors(8, spread, degree)[0]
        assert abs(got - percent) < 0.06 * percent + 0.005, (spread, degree, got)
    through_c_error, error = (taylor_error.errors(8, 1.0, 3, attend)[0]
                              for attend in (taylor.through_c, taylor.by_definition))
    assert through_c_error == pytest.approx(error, abs=1e-5)


def test_decay_keeps_its_accuracy():
    """After 200,000 tokens errors are as after 2,000. (Without compensation of z[0], which
    converges to a constant, they become seven times as large.)"""
    rng = np.random.default_rng(5)
    kind = dict(head_dim_k=8, head_dim_v=8, sinks=16, decay=1 / 128, scale=8 ** -0.5, normalizer=0,
                normalizer_eps=1e-12)
    single, double = Taylor(**kind).state(), Taylor(double=True, **kind).state()
    errors = []
    for _ in range(100):
        q, k, v = (rng.standard_normal((2000, 8)).astype(np.float32) for _ in range(3))
        expected = double.feed(q, k, v)
        errors.append(np.abs(single.feed(q, k, v) - expected).max())
    assert max(errors) < 5e-7 and max(errors[90:]) < 2 * max(errors[1:11]), errors


def test_decay_cannot_be_undone():
    t = Taylor(head_dim_k=4, head_dim_v=4, normalizer=0, normalizer_eps=1e-12, decay=0.5)
    a, b = t.state(), t.state()
    a.add(np.ones((40, 4)), np.ones((40, 4)))
    for wrong in (lambda: a.subtract(np.ones(4), np.ones(4)), lambda: b.merge(a)):
        with pytest.raises(based.BasedError, match="forget|decay"):
            wrong()
    for decay in (1.0, -0.1, np.nan):
        with pytest.raises(based.BasedError, match="forget|decay"):
            Taylor(head_dim_k=4, head_dim_v=4, normalizer=0, decay=decay)
