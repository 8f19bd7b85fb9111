"""Hostile sources for export.py: small files with something wrong in them become a checkpoint or
are refused with one line, never with a traceback. FUZZ_COUNT: how many of each (30; 2,000 with
FULL=yes)."""
import contextlib
import io
import json
import os
import random
import shutil
from pathlib import Path

import pytest

np = pytest.importorskip("numpy")
pytest.importorskip("safetensors")
import export           # noqa: E402
import origins          # noqa: E402
from conftest import FULL                                 # noqa: E402
import test_families    # noqa: E402
from models import tokens                                 # noqa: E402
from test_fuzz import mutant                              # noqa: E402
from test_layers import EDIFICE, LUCIDRAINS, save, weights    # noqa: E402

COUNT = int(os.environ.get("FUZZ_COUNT", 2000 if FULL else 30))
DATA = Path(__file__).resolve().parent / "data"
VALUES = [None, True, -1, 0, 1, 7, 2**31, 2**63, 1e308, float("nan"), "", "x", "<s>", [], [0], [[]],
          {}, {"a": 1}]


def export_quietly(*arguments):
    """export.py in this process: its status; it must not raise, and must say one line if it
    refuses."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = export.main([str(a) for a in arguments])
        except SystemExit as e:
            status = e.code
    lines = [line for line in err.getvalue().splitlines() if ": note: " not in line
             and "tensor" not in line[:20]]
    assert status in (0, 1), err.getvalue()
    damaged = "WRONG: the file was damaged after it was written\n"
    if status == 1 and not out.getvalue().endswith(damaged):
        assert len(lines) == 1 and lines[0].startswith("export.py: "), err.getvalue()
    return status


def change(rng, value):
    """A JSON value with something else in one place of it."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key = rng.choice(list(value))
        rest = {k: v for k, v in value.items() if k != key}
        return rest if rng.random() < 0.2 else {**rest, key: change(rng, value[key])}
    if isinstance(value, list) and value and rng.random() < 0.9:
        at = rng.randrange(len(value))
        return value[:at] + ([] if rng.random() < 0.2
                             else [change(rng, value[at])]) + value[at + 1:]
    return rng.choice(VALUES)


def spoil(rng, path):
    """Something wrong in a file: in what it says if it is JSON, or in its bytes."""
    good = path.read_bytes()
    if path.suffix == ".json" and rng.random() < 0.8:
        path.write_text(json.dumps(change(rng, json.loads(good))))
    elif path.suffix == ".safetensors" and rng.random() < 0.6:
        n = int.from_bytes(good[:8], "little")
        header = json.dumps(change(rng, json.loads(good[8:8 + n]))).encode()
        path.write_bytes(len(header).to_bytes(8, "little") + header + good[8 + n:])
    else:
        path.write_bytes(mutant(rng, good))


def based(directory, form):
    return Path(origins.write_based(directory / "source", origins.twelve_state(), origins.TWELVE,
                                    form))


def copied(name):
    """A download in data/."""
    def copy(directory):
        shutil.copytree(DATA / name, directory / "source")
        return directory / "source"
    return copy


def llama(directory):
    return Path(origins.write_llama(directory / "llama.bin", np.random.default_rng(5),
                                    (24, 40, 2, 4, 4, 30, 12)))


def tensors(case, file):
    """Bare tensors."""
    return lambda directory: save(directory / file, weights(case))


# Where the sources come from, and what they do not tell.
ORIGINS = {
    "safetensors": (lambda d: based(d, "safetensors"), []),
    "pytorch": (lambda d: based(d, "bin"), []),
    "shards": (copied("decoders/qwen2"), []),
    "llama3": (copied("decoders/llama3"), []),
    "powercoder": (copied("decoders/powercoder"), []),
    "decay": (copied("based-decay-tiny"), []),
    "prefix": (copied("jrt-tiny"), []),
    "llama2.c": (llama, []),
    "lucidrains.pt": (tensors(LUCIDRAINS["causal_rot"], "layer.pt"),
                      ["--heads", 3, "--mode", "causal"]),
    "lucidrains": (tensors(LUCIDRAINS["causal_rot"], "layer.safetensors"),
                   ["--heads", 3, "--mode", "causal"]),
    "edifice": (tensors(EDIFICE["c2"][1], "edifice.safetensors"),
                ["--mode", "window", "--heads", 4, "--degree", 2]),
}


@pytest.mark.parametrize("origin", ORIGINS)
def test_spoiled_sources(tmp_path, origin):
    rng, refused = random.Random(origin), 0
    write, told = ORIGINS[origin]
    good = write(tmp_path)
    assert export_quietly(good, tmp_path / "good.bin", *told) == 0
    for i in range(COUNT):
        bad = tmp_path / "bad" / good.name
        shutil.rmtree(tmp_path / "bad", ignore_errors=True)
        (tmp_path / "bad").mkdir()
        (shutil.copytree if good.is_dir() else shutil.copy)(good, bad)
        files = sorted(path for path in bad.iterdir() if path.is_file()) if bad.is_dir() else [bad]
        spoil(rng, rng.choice(files))
        refused += export_quietly(bad, tmp_path / "out.bin", *told)
    assert refused > COUNT / 10


def tokenizer_json(path):
    """A tokenizer.json with all that export.py reads of one."""
    characters = list(tokens.byte_characters())
    vocab = {c: i for i, c in enumerate([*characters, "ab", "abc", "\u0120a"])}
    special = {"special": True, "lstrip": False, "rstrip": False, "single_word": False,
               "normalized": False}
    path.write_text(json.dumps({
        "added_tokens": [{"id": 259, "content": "<s>", **special},
                         {"id": 260, "content": "</s>", **special}],
        "normalizer": None, "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False,
                                              "use_regex": True},
        "post_processor": {"type": "TemplateProcessing",
                           "single": [{"SpecialToken": {"id": "<s>"}}, {"Sequence": {"id": "A"}}],
                           "special_tokens": {"<s>": {"id": "<s>", "ids": [259]}}},
        "decoder": {"type": "ByteLevel"},
        "model": {"type": "BPE", "unk_token": None, "vocab": vocab,
                  "merges": ["a b", ["ab", "c"], "\u0120 a"]}}))


def llama_tokenizer(path):
    shutil.copy(DATA / "tok512.bin", path)


def merge_list(path):
    """And the vocab.json beside it."""
    path.write_text("#version: 0.2\na b\nab c\n\u0120 a\n", encoding="utf-8")
    characters = list(tokens.byte_characters())
    vocab = {c: i for i, c in enumerate(["<s>", *characters, "ab", "abc", "\u0120a"])}
    path.with_name("vocab.json").write_text(json.dumps(vocab))


def sentencepiece(path):
    path.write_bytes(test_families.model(*(test_families.piece(text, -i) for i, text in enumerate(
        ["\u2581", "a", "b", "\u2581a", "ab"]))))


def told(directory):
    """What lies beside a tokenizer and tells of conversations."""
    ends = {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "add_bos_token": True,
            "chat_template": [{"name": "default", "template": test_families.ZEPHYR}],
            "tokenizer_class": "GPT2Tokenizer", "added_tokens_decoder": {
                "1": {"content": "<s>", "special": True}, "270": {"content": "<t>"}}}
    write = {"tokenizer_config.json": ends, "added_tokens.json": {"<t>": 269},
             "generation_config.json": {"eos_token_id": [2, 9], "temperature": 0.7, "top_k": 5}}
    for name, value in write.items():
        (directory / name).write_text(json.dumps(value))
    (directory / "chat_template.jinja").write_text(test_families.ZEPHYR)
    return [directory / name for name in (*write, "chat_template.jinja")]


@pytest.mark.parametrize("write, name",
                         [(tokenizer_json, "tokenizer.json"), (llama_tokenizer, "tok.bin"),
                          (merge_list, "merges.txt"), (sentencepiece, "tokenizer.model")])
def test_spoiled_conversations(tmp_path, write, name):
    """A sound tokenizer, and something wrong in what lies beside it."""
    rng, path, refused = random.Random("told " + name), tmp_path / name, 0
    source = origins.write_llama(tmp_path / "llama.bin", np.random.default_rng(5),
                                 (8, 8, 1, 1, 1, 512, 12))
    write(path)
    for i in range(COUNT + 1):
        files = told(tmp_path)
        if i > 0:
            spoil(rng, rng.choice(files))
        refused += export_quietly(source, tmp_path / "out.bin", "--tokenizer", path)
        assert i > 0 or refused == 0
    assert 0 < refused < COUNT


@pytest.mark.parametrize("write, name",
                         [(tokenizer_json, "tokenizer.json"), (llama_tokenizer, "tok.bin"),
                          (merge_list, "merges.txt"), (sentencepiece, "tokenizer.model")])
def test_spoiled_tokenizers(tmp_path, write, name):
    rng, path, refused = random.Random(name), tmp_path / name, 0
    source = origins.write_llama(tmp_path / "llama.bin", np.random.default_rng(5),
                                 (8, 8, 1, 1, 1, 512, 12))
    for i in range(COUNT + 1):
        write(path)
        if i > 0:
            beside = path.with_name("vocab.json")
            spoil(rng, beside if beside.exists() and rng.random() < 0.5 else path)
        refused += export_quietly(source, tmp_path / "out.bin", "--tokenizer", path)
        assert i > 0 or refused == 0
        if name == "tokenizer.json":                      # and the names of its ends
            beside = tmp_path / "tokenizer_config.json"
            ends = {"bos_token": "<s>", "eos_token": {"content": "</s>"}}
            beside.write_text(json.dumps(change(rng, ends)))
    assert refused > COUNT / 10


def test_spoiled_checkpoints(tmp_path):
    """--inspect."""
    rng, good = random.Random(4), tmp_path / "good.bin"
    assert export_quietly(based(tmp_path, "safetensors"), good) == 0
    for i in range(COUNT):
        (tmp_path / "bad.bin").write_bytes(mutant(rng, good.read_bytes()))
        export_quietly("--inspect", tmp_path / "bad.bin")
