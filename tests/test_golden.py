"""Models whose logits are known from elsewhere, through export.py and based.c: to 2e-5 of the
original, absolute."""
import json
from pathlib import Path

import pytest

np = pytest.importorskip("numpy")
pytest.importorskip("safetensors")
import based            # noqa: E402
import export           # noqa: E402
import origins          # noqa: E402
import reference        # noqa: E402

DATA = Path(__file__).resolve().parent / "data"
TOLERANCE = 2e-5


def through_c(path, tokens, block):
    return based.Session(based.Model(path), block).feed(tokens)


def load(name):
    return json.loads((DATA / name).read_text())


@pytest.fixture(scope="module")
def twelve(tmp_path_factory):
    """The 12-token model as a checkpoint."""
    directory = tmp_path_factory.mktemp("twelve")
    source = origins.write_based(directory / "source", origins.twelve_state(), origins.TWELVE)
    assert export.main([source, str(directory / "twelve.bin")]) == 0
    return directory / "twelve.bin"


def test_formula_gives_the_published_weights():
    first = origins.twelve_state()[origins.EMBEDDING][0, :4]
    assert np.abs(first - [-0.30618447, 0.07228252, -0.16162294, 0.21684404]).max() < 1e-8


def test_twelve_reference(twelve):
    """The float64 model agrees with the original's logits, and with every sub-layer on the way, to
    print rounding."""
    golden, trace = load("twelve.json"), {}
    logits = reference.run(reference.read(twelve), golden["tokens"], trace=trace)
    assert logits.shape == (12, 50)
    assert np.abs(logits - golden["logits"]).max() < 1e-6
    for name, expected in golden["traces"].items():
        part, t = name.split()
        assert np.abs(trace[part][int(t), :4] - expected).max() < 1e-6, name


@pytest.mark.parametrize("block", [1, 5, 64])
def test_twelve_c(twelve, block):
    golden = load("twelve.json")
    assert np.abs(through_c(twelve, golden["tokens"], block) - golden["logits"]).max() < TOLERANCE


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """The tiny random model of data/hazyresearch-tiny, converted from its PyTorch file."""
    pytest.importorskip("torch")
    out = tmp_path_factory.mktemp("tiny") / "tiny.bin"
    assert export.main([str(DATA / "hazyresearch-tiny"), str(out)]) == 0
    return out


def tiny_golden():
    tokens = np.fromfile(DATA / "hazyresearch-tiny" / "tokens.i32", "<i4")
    return tokens, np.fromfile(DATA / "hazyresearch-tiny" / "logits.f32",
                               "<f4").reshape(len(tokens), 50)


def test_hazyresearch_reference(tiny):
    tokens, golden = tiny_golden()
    assert len(tokens) == 96
    assert np.abs(reference.run(reference.read(tiny), tokens) - golden).max() < 1e-6


@pytest.mark.parametrize("block", [1, 7, 64])
def test_hazyresearch_c(tiny, block):
    tokens, golden = tiny_golden()
    assert np.abs(through_c(tiny, tokens, block) - golden).max() < TOLERANCE


@pytest.fixture(scope="module", params=["prefix", "decay"])
def variant(request, tmp_path_factory):
    """Two models of the prefix-linear-attention repository: (name, checkpoint)."""
    folder = {"prefix": "jrt-tiny", "decay": "based-decay-tiny"}[request.param]
    if request.param == "prefix":
        pytest.importorskip("torch")
    out = tmp_path_factory.mktemp(folder) / "out.bin"
    assert export.main([str(DATA / folder), str(out)]) == 0
    return DATA / folder, out


def test_variants_of_based(variant):
    """Prompts that are shorter than the prefix, as long and longer, the rest one by one; and a
    constant decay."""
    folder, path = variant
    tokens, m = np.fromfile(folder / "tokens.i32", "<i4"), reference.read(path)
    for file in folder.glob("logits*.f32"):
        golden = np.fromfile(file, "<f4").reshape(len(tokens), -1)
        prompt = int("".join(filter(str.isdigit, file.stem[6:])) or len(tokens))
        first = min(m.prefix, prompt)
        assert np.abs(reference.run(m, tokens, prefix=first) - golden).max() < 1e-6, file.name
        for block in (16, 64):
            session = based.Session(based.Model(path), block)
            got = [session.feed_prefix(tokens[:first])] if first else []
            got = np.concatenate([*got, session.feed(tokens[first:])])
            assert np.abs(got - golden).max() < TOLERANCE, file.name


@pytest.mark.parametrize("window, logits", [((7, 1), "logits"), ((8, 8), "logits_terraced")])
def test_lolcats(tmp_path, window, logits):
    """A Llama, its feature maps and its LoRA, with both kinds of window of the original."""
    pytest.importorskip("torch")
    folder, out = DATA / "lolcats-tiny", tmp_path / "out.bin"
    assert export.main([str(folder), str(out), "--lolcats", str(folder / "distill"),
                        str(folder / "ft-lora"), "--window", str(window[0]),
                        "--chunk", str(window[1])]) == 0
    tokens = np.fromfile(folder / "tokens.i32", "<i4")
    golden = np.fromfile(folder / f"{logits}.f32", "<f4").reshape(len(tokens), -1)
    assert np.abs(reference.run(reference.read(out), tokens) - golden).max() < 1e-6
    for block in (1, 7, 64):
        assert np.abs(through_c(out, tokens, block) - golden).max() < TOLERANCE


STORIES = Path(export.__file__).resolve().parent / "models" / "stories260K.bin"


def test_stories_reference():
    """The converted model is the original: same logits in float64 (the file keeps the score scale
    as a float32)."""
    golden = load("stories260K.json")
    logits = reference.run(reference.read(STORIES), golden["tokens"])
    assert np.abs(logits[golden["at"]] - golden["logits"]).max() < 2e-6
    assert logits.argmax(1).tolist()[:-1] == golden["tokens"][1:]


@pytest.mark.parametrize("block", [1, 32])
def test_stories_c(block):
    golden = load("stories260K.json")
    logits = through_c(STORIES, golden["tokens"], block)
    assert np.abs(logits[golden["at"]] - golden["logits"]).max() < TOLERANCE
    assert logits.argmax(1).tolist()[:-1] == golden["tokens"][1:]
