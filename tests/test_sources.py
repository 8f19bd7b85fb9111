"""What lies in the files that export.py reads: tensors of every form, downloads that are something
else, weights in several files, tokenizers beside them. Kinds C and D of tests/README.md."""
import json
import shutil
from pathlib import Path

import pytest

np = pytest.importorskip("numpy")
torch = pytest.importorskip("torch")
safetensors_torch = pytest.importorskip("safetensors.torch")
tokenizers = pytest.importorskip("tokenizers")
import export           # noqa: E402
import origins          # noqa: E402
from origins import EMBEDDING, HEAD, TWELVE                 # noqa: E402
from test_export import exported, fails, run                # noqa: E402
from test_layers import LUCIDRAINS, weights                 # noqa: E402

MARK = b"\xef\xbb\xbf"


def state():
    return {name: torch.from_numpy(x) for name, x in origins.twelve_state().items()}


@pytest.fixture
def source(tmp_path):
    """A directory with config.json alone."""
    return Path(origins.write_based(tmp_path / "source", {}, TWELVE, None))


@pytest.fixture
def plain(capsys, tmp_path, source):
    """What the plain tensors become."""
    torch.save(state(), source / "pytorch_model.bin")
    exported(capsys, source, tmp_path / "plain.bin", "--name", "x")
    (source / "pytorch_model.bin").unlink()
    return (tmp_path / "plain.bin").read_bytes()


def same(capsys, tmp_path, source, plain):
    exported(capsys, source, tmp_path / "out.bin", "--name", "x")
    return (tmp_path / "out.bin").read_bytes() == plain


# ---- D. Tensors that are not plain

@pytest.mark.parametrize("wrap", [
    lambda s: {k: torch.nn.Parameter(v) for k, v in s.items()},
    lambda s: {k: v.t().contiguous().t() if v.dim() == 2 else v for k, v in s.items()},
    lambda s: {k: v.double() for k, v in s.items()},
    lambda s: {"_orig_mod." + k: v for k, v in s.items()},
    lambda s: {"module." + k: v for k, v in s.items()},
    lambda s: {"module._orig_mod.model." + k: v for k, v in s.items()},
    lambda s: {k.replace(".mixer.", "._orig_mod.mixer."): v for k, v in s.items()},
    lambda s: {"_fsdp_wrapped_module." + k: v for k, v in s.items()},
    lambda s: {"state_dict": s, "epoch": 3}, lambda s: {"model": s, "optimizer": {"lr": 1.0}},
    lambda s: {"model_state_dict": {"module." + k: v for k, v in s.items()}, "step": 7},
], ids=range(11))
def test_the_same_numbers(capsys, tmp_path, source, plain, wrap):
    torch.save(wrap(state()), source / "pytorch_model.bin")
    assert same(capsys, tmp_path, source, plain)


def two(change):
    """Of matrices only."""
    return lambda s: {k: change(v) if v.dim() == 2 else v for k, v in s.items()}


@pytest.mark.parametrize("wrap, pattern", [
    (two(lambda v: v.to_sparse()), "holds .*word_embeddings.weight as torch.sparse_coo.*to_dense"),
    (two(lambda v: v.to_sparse_csr()), "torch.sparse_csr"),
    (two(lambda v: torch.quantize_per_tensor(v, .01, 0, torch.qint8)), "torch.qint8.*dequantize"),
    (two(lambda v: v.to("meta")), "a meta tensor, which has no numbers"),
    (two(lambda v: v.to(torch.complex64)), "torch.complex64, which has an imaginary part"),
    (two(lambda v: (v * 50).to(torch.int8)), "torch.int8: whole numbers, whose scales"),
    (lambda s: {"state_dict": s, "model": s}, "it holds state_dict, which is dict"),
    (lambda s: {**s, "step": 3}, "it holds step, which is int"),
    (lambda s: list(s.values()), "found list"), (lambda s: s[EMBEDDING], "found Tensor"),
    (lambda s: {**s, "model." + EMBEDDING: s[EMBEDDING]}, "word_embeddings.weight twice"),
    (lambda s: {"model": torch.nn.Linear(2, 2)}, "torch.nn.modules.linear.Linear"),
    (lambda s: {"state_dict": s, "args": Path("x")}, "pathlib"),
    (lambda s: torch.jit.script(torch.nn.Linear(2, 2)), "TorchScript"),
], ids=range(14))
def test_one_line_says_what_it_is(capsys, tmp_path, source, wrap, pattern):
    made = wrap(state())
    (torch.jit.save if isinstance(made, torch.jit.ScriptModule) else torch.save)(
        made, source / "pytorch_model.bin")
    fails(capsys, pattern, source, tmp_path / "out.bin")
    _, _, stderr = run(capsys, source, tmp_path / "out.bin")
    assert "weights_only" not in stderr and "trust" not in stderr        # torch's own advice


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.float64,
                                   torch.bfloat16, torch.float16])
def test_safetensors_as_pytorch(capsys, tmp_path, source, dtype):
    """The same tensors in both kinds of files, byte for byte the same checkpoint."""
    tensors = {name: x.to(dtype) for name, x in state().items()}
    torch.save(tensors, source / "pytorch_model.bin")
    exported(capsys, source, tmp_path / "a.bin", "--name", "x")
    safetensors_torch.save_file(tensors, source / "model.safetensors")
    exported(capsys, source, tmp_path / "b.bin", "--name", "x")
    assert (tmp_path / "a.bin").read_bytes() == (tmp_path / "b.bin").read_bytes()


def test_eight_bit_floats():
    """Every code, as PyTorch reads it."""
    codes = torch.arange(256, dtype=torch.uint8)
    for table, dtype in ((export.E4M3, torch.float8_e4m3fn), (export.E5M2, torch.float8_e5m2)):
        assert np.array_equal(table, codes.view(dtype).float().numpy(), equal_nan=True)


@pytest.mark.parametrize("dtype, pattern", [(torch.int8, "I8: whole numbers"),
                                            (torch.complex64, "C64: a form of number"),
                                            (torch.float8_e8m0fnu, "F8_E8M0: a form")])
def test_safetensors_refused(capsys, tmp_path, source, dtype, pattern):
    tensors = state()
    tensors[EMBEDDING] = (tensors[EMBEDDING].abs() + 1).to(dtype)
    safetensors_torch.save_file(tensors, source / "model.safetensors")
    fails(capsys, f"word_embeddings.weight as {pattern}", source, tmp_path / "out.bin")


def test_what_is_dropped_may_be_anything(capsys, tmp_path, source, plain):
    torch.save({**state(), "train_metrics.count": torch.tensor(3)}, source / "pytorch_model.bin")
    assert same(capsys, tmp_path, source, plain)


def test_a_layer_of_parameters(capsys, tmp_path):
    case = LUCIDRAINS["causal_plain"]
    layer = {"_orig_mod." + name: torch.nn.Parameter(torch.tensor(np.float32(x)))
             for name, x in weights(case).items()}
    torch.save(layer, tmp_path / "layer.pt")
    exported(capsys, tmp_path / "layer.pt", tmp_path / "out.bin", "--heads", 3, "--mode", "causal")


# ---- D. Weights in several files

def split(source, form, parts=2, damage=None):
    """The twelve tensors in several files and their index."""
    tensors = state()
    name = {"safetensors": "model-{}.safetensors", "bin": "pytorch_model-{}.bin"}[form]
    table = {key: name.format(i % parts) for i, key in enumerate(tensors)}
    for i in range(parts):
        part = {key: x for key, x in tensors.items() if table[key] == name.format(i)}
        if form == "bin":
            torch.save(part, source / name.format(i))
        else:
            safetensors_torch.save_file(part, source / name.format(i))
    if damage:
        damage(table)
    index = {"safetensors": "model.safetensors.index.json", "bin": "pytorch_model.bin.index.json"}
    (source / index[form]).write_text(json.dumps({"metadata": {}, "weight_map": table}))
    return index[form]


@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_shards(capsys, tmp_path, source, plain, form):
    name = split(source, form, 3)
    assert same(capsys, tmp_path, source, plain) and same(capsys, tmp_path, source / name, plain)


@pytest.mark.parametrize("damage, pattern", [
    (lambda table: table.update(x="model-0.safetensors"), "lists x, which is in none of its files"),
    (lambda table: table.update(x="model-9.safetensors"), "lists model-9.*, which is missing"),
    (lambda table: table.update(x="../model-0.safetensors"), "should hold a weight_map"),
    (lambda table: table.clear(), "should hold a weight_map")])
def test_shards_refused(capsys, tmp_path, source, damage, pattern):
    split(source, "safetensors", 2, damage)
    fails(capsys, pattern, source, tmp_path / "out.bin")


def test_shards_that_overlap(capsys, tmp_path, source):
    split(source, "safetensors")
    shutil.copy(source / "model-0.safetensors", source / "model-1.safetensors")
    fails(capsys, "model-1.safetensors holds .*, and so does", source, tmp_path / "out.bin")


# ---- D. Downloads that are something else

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
PAGE = b"\n<!DOCTYPE html><html><body>Not found</body></html>"


@pytest.mark.parametrize("data, pattern", [(LFS, "a pointer of Git LFS"), (PAGE, "a web page"),
                                           (b"<html>", "a web page"), (b"", "pytorch|safetensors")])
@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "pytorch_model.bin",
                                  "tokenizer.json", "model.safetensors.index.json"])
def test_not_the_file(capsys, tmp_path, source, name, data, pattern):
    if "model" not in name:
        safetensors_torch.save_file(state(), source / "model.safetensors")
    (source / name).write_bytes(data)
    if not data:
        pattern = name.partition(".")[0]
    fails(capsys, f"{name}.*{pattern}" if data else pattern, source, tmp_path / "out.bin")
    (tmp_path / "file").write_bytes(data)
    fails(capsys, pattern if data else "nothing this program can", tmp_path / "file",
          tmp_path / "out.bin")


def test_byte_order_marks(capsys, tmp_path, source, plain):
    """Of config.json, an index and a tokenizer."""
    index = source / split(source, "safetensors")
    for path in (source / "config.json", index):
        path.write_bytes(MARK + path.read_bytes())
    assert same(capsys, tmp_path, source, plain)
    text = train([], 256).to_str()
    for name, data in (("a", text.encode()), ("b", MARK + text.encode())):
        (tmp_path / f"{name}.json").write_bytes(data)
        (tmp_path / name).mkdir()
        llama = origins.write_llama(tmp_path / name / "m.bin", np.random.default_rng(5),
                                    (8, 8, 1, 1, 1, 256, 12))
        exported(capsys, llama, tmp_path / f"{name}.bin", "--tokenizer", tmp_path / f"{name}.json")
    assert (tmp_path / "a.bin").read_bytes() == (tmp_path / "b.bin").read_bytes()


# ---- C. Tokenizers beside the weights

def train(specials, size, files=None):
    made = tokenizers.ByteLevelBPETokenizer()
    made.train_from_iterator(["the wolf and the bear went to the well, " * 50], vocab_size=size,
                             special_tokens=specials, show_progress=False)
    if files:
        made.save_model(str(files))
    return made


@pytest.fixture
def big(source):
    """A model of GPT-2's vocabulary, whatever tokenizer it has."""
    tensors = state()
    tensors[EMBEDDING] = torch.randn(50264, 32)
    safetensors_torch.save_file(tensors, source / "model.safetensors")
    (source / "config.json").write_text(json.dumps({**TWELVE, "vocab_size": 50257}))
    return source


def section(capsys, source, out, *options):
    status, _, stderr = run(capsys, source, out, *options)
    assert status == 0, stderr
    return export.Checkpoint(str(out)).tokenizer, stderr


def test_vocab_and_merges(capsys, tmp_path, big):
    """The pair gives what tokenizer.json gives, whatever the order of ids."""
    made = train(["<s>", "</s>"], 300, big)
    pair, stderr = section(capsys, big, tmp_path / "pair.bin")
    assert pair and "note" not in stderr
    for name in ("vocab.json", "merges.txt"):
        assert section(capsys, big, tmp_path / "a.bin", "--tokenizer", big / name)[0] == pair
    for name in ("vocab.json", "merges.txt"):
        (big / name).unlink()
    spec = json.loads(made.to_str())
    assert spec["pre_tokenizer"]["add_prefix_space"] is False
    spec["post_processor"] = None
    (big / "tokenizer.json").write_text(json.dumps(spec))
    assert section(capsys, big, tmp_path / "json.bin")[0] == pair


def test_prefix_space_of_a_pair(capsys, tmp_path, big):
    train(["<s>", "</s>"], 300, big)
    (big / "tokenizer_config.json").write_text('{"add_prefix_space": true}')
    fails(capsys, "add_prefix_space", big, tmp_path / "out.bin")


@pytest.mark.parametrize("names", [["tokenizer.model"], ["spiece.model"], ["vocab.json"],
                                   ["merges.txt"], ["vocab.txt"], ["tokenizer.bin"]])
def test_unread_tokenizers_are_named(capsys, tmp_path, big, names):
    """Not GPT-2's ids for a model that has others."""
    train(["<s>", "</s>"], 300, tmp_path)
    for name in names:
        (big / name).write_bytes((tmp_path / name).read_bytes() if (tmp_path / name).exists()
                                 else b"x")
    found, stderr = section(capsys, big, tmp_path / "out.bin")
    assert found == b"" and f"note: exporting without a tokenizer: {names[0]}" in stderr


def test_gpt2_if_nothing_else(capsys, tmp_path, big):
    ours, stderr = section(capsys, big, tmp_path / "out.bin")
    assert ours and "note" not in stderr
    import lzma
    packed = Path(export.__file__).resolve().parent / export.GPT2_MERGES
    (big / "merges.txt").write_bytes(lzma.decompress(packed.read_bytes()))
    assert section(capsys, big, tmp_path / "out.bin")[0] == ours        # its own merges: ids follow


def test_merges_alone(capsys, tmp_path, big):
    """Merges of another tokenizer do not tell where its special tokens are."""
    train(["<|endoftext|>"], 300, tmp_path)
    (tmp_path / "vocab.json").unlink()
    fails(capsys, "merges alone do not tell", big, "--tokenizer", tmp_path / "merges.txt",
          tmp_path / "out.bin")


def test_tied_false_needs_both(capsys, tmp_path, source):
    """A head of its own that is missing is not the embedding."""
    (source / "config.json").write_text(json.dumps({**TWELVE, "tie_word_embeddings": False}))
    safetensors_torch.save_file(state(), source / "model.safetensors")
    fails(capsys, f"lacks the tensor {HEAD}", source, tmp_path / "out.bin")
