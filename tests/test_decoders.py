"""Decoders of Hugging Face transformers and power retention (models/origins/huggingface.py): what
the originals computed, every field of config.json, what is refused, what is said."""
import json
import shutil
import subprocess
from pathlib import Path

import pytest

np = pytest.importorskip("numpy")
pytest.importorskip("safetensors")
from safetensors.numpy import load_file             # noqa: E402
import based                                        # noqa: E402
import decoders                                     # noqa: E402
import export                                       # noqa: E402
import reference                                    # noqa: E402
from models.origins import huggingface              # noqa: E402
from test_export import fails, run                  # noqa: E402

DATA = Path(__file__).resolve().parent / "data" / "decoders"
# Of power retention also what the original computes, which adds small numbers for the GPU's sake.
GOLDEN = [("llama3", "logits", 2e-5), ("mistral", "logits", 2e-5), ("qwen2", "logits", 2e-5),
          ("qwen3", "logits", 2e-5), ("powercoder", "logits", 5e-5),
          ("powercoder", "logits_noeps", 2e-5), ("brumby", "logits", 5e-5),
          ("brumby", "logits_noeps", 2e-5)]
ABSENT = ...
TOKENS = np.random.default_rng(3).integers(0, 29, 40)
BASE = {"vocab_size": 29, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
        "max_position_embeddings": 64, "use_bias": True}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 40}


def golden(name, logits):
    tokens = np.fromfile(DATA / name / "tokens.i32", "<i4")
    return tokens, np.fromfile(DATA / name / f"{logits}.f32", "<f4").reshape(len(tokens), -1)


def tensors(name):
    found = {}
    for path in (DATA / name).glob("*.safetensors"):
        found.update(load_file(path))
    return found


def exported(capsys, source, out, *options):
    status, _, stderr = run(capsys, source, out, "--name", "x", *options)
    assert status == 0, stderr
    return based.Model(out), stderr


@pytest.mark.parametrize("name, logits, tolerance", GOLDEN)
def test_golden(capsys, tmp_path, name, logits, tolerance):
    """What the original code computed in float64."""
    model, _ = exported(capsys, DATA / name, tmp_path / "out.bin")
    tokens, expected = golden(name, logits)
    exact = reference.run(reference.read(tmp_path / "out.bin"), tokens)
    assert np.abs(exact - expected).max() < (1e-6 if tolerance < 5e-5 else 1e-5)
    for block in (1, 7, 64):
        assert np.abs(based.Session(model, block).feed(tokens) - expected).max() < tolerance


@pytest.mark.parametrize("name, logits, tolerance", GOLDEN)
def test_numpy_is_the_original(name, logits, tolerance):
    config = json.loads((DATA / name / "config.json").read_text())
    tokens, expected = golden(name, logits)
    got = decoders.logits(config, tensors(name), tokens)
    assert np.abs(got - expected).max() < (1e-6 if tolerance < 5e-5 else 1e-5)


# ---- Fields

def changed(family, changes):
    config = {"model_type": family, **BASE, **changes}
    return {name: value for name, value in config.items() if value is not ABSENT}


def compare(capsys, tmp_path, config, state, *options):
    """The exported model, in C and in the reference, computes what the original does."""
    source = decoders.write(tmp_path / "source", config, state)
    model, stderr = exported(capsys, source, tmp_path / "out.bin", *options)
    expected = decoders.logits(config, state, TOKENS)
    for got in (based.Session(model).feed(TOKENS),
                reference.run(reference.read(tmp_path / "out.bin"), TOKENS)):
        assert np.abs(got - expected).max() < 1e-5 * np.abs(expected).max()
    return expected


SLIDING = {"use_sliding_window": True, "sliding_window": 7}
OBEYED = [
    *((family, {}) for family in huggingface.FAMILIES),
    *((family, {"head_dim": ABSENT, "hidden_size": 20, "num_attention_heads": 2})
      for family in ("llama", "mistral", "qwen2", "powercoder")),
    *((family, {"head_dim": ABSENT}) for family in ("qwen3", "brumby")),            # 128
    ("llama", {"head_dim": None}), ("llama", {"vocab_size": 33}), ("llama", {"hidden_size": 28}),
    ("llama", {"intermediate_size": 9}), ("llama", {"num_hidden_layers": 3}),
    ("llama", {"num_attention_heads": 6}), ("llama", {"num_key_value_heads": 1}),
    ("llama", {"num_key_value_heads": None}), ("llama", {"num_key_value_heads": ABSENT}),
    ("mistral", {"num_key_value_heads": ABSENT, "num_attention_heads": 8}),
    ("qwen2", {"num_key_value_heads": ABSENT, "num_attention_heads": 32, "head_dim": 2}),
    ("powercoder", {"num_key_value_heads": ABSENT}), ("llama", {"rms_norm_eps": 0.1}),
    ("qwen3", {"rms_norm_eps": 0.1}), ("brumby", {"rms_norm_eps": 0.1}),
    ("powercoder", {"norm_epsilon": 0.1}), ("powercoder", {"norm_epsilon": ABSENT}),
    *((family, {"tie_word_embeddings": tie}) for family in ("llama", "powercoder")
      for tie in (True, False)), ("llama", {"rope_theta": 50}), ("powercoder", {"rope_theta": 777}),
    ("brumby", {"rope_theta": 123.4}), ("llama", {"attention_bias": True}),
    ("qwen3", {"attention_bias": True}), ("brumby", {"attention_bias": True}),
    ("llama", {"mlp_bias": True}), ("mistral", {"mlp_bias": True, "attention_bias": True}),
    ("qwen2", {"mlp_bias": True, "attention_bias": True}), ("qwen3", {"mlp_bias": True}),
    ("powercoder", {"use_bias": False}), ("powercoder", {"use_bias": ABSENT}),
    ("mistral", {"sliding_window": 7}), ("mistral", {"sliding_window": None}),
    ("qwen2", {**SLIDING, "max_window_layers": 1}), ("qwen3", {**SLIDING, "max_window_layers": 0}),
    ("qwen3", SLIDING), ("qwen2", {"sliding_window": 7}),
    ("qwen3", {**SLIDING, "layer_types": ["sliding_attention", "full_attention"]}),
    ("qwen2", {"sliding_window": 7, "layer_types": ["full_attention"] * 2}),
    ("llama", {"rope_scaling": {"type": "linear", "factor": 3.0}}),
    ("llama", {"rope_scaling": {"rope_type": "default"}}), ("llama", {"rope_scaling": LLAMA3}),
    ("llama", {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}),
    ("llama", {"rope_scaling": {**LLAMA3, "factor": 2, "low_freq_factor": 0.5}}),
    ("llama", {"rope_scaling": {**LLAMA3, "high_freq_factor": 20.0}}),
    ("llama", {"rope_scaling": {**LLAMA3, "original_max_position_embeddings": 9}}),
    ("qwen3", {"rope_parameters": {**LLAMA3, "rope_theta": 99.0}}),
    ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e10}}),
    ("brumby", {"rope_scaling": {"type": "linear", "factor": 3.0}}),
    ("brumby", {"use_sliding_window": True, "sliding_window": 4}),
    ("powercoder", {"sliding_window": 4}),                        # sums have no window
]


@pytest.mark.parametrize("family, changes", OBEYED, ids=repr)
def test_obeyed(capsys, tmp_path, family, changes):
    config = changed(family, changes)
    compare(capsys, tmp_path, config, decoders.state(config))


# Of these nothing shows in the shapes: over the tensors of BASE the result must be another.
HIDDEN = [("llama", {"rms_norm_eps": 0.1}), ("llama", {"rope_theta": 50}),
          ("llama", {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 4}),
          ("mistral", {"sliding_window": 7}), ("qwen3", {**SLIDING, "max_window_layers": 1}),
          ("llama", {"rope_scaling": LLAMA3}), ("powercoder", {"norm_epsilon": 0.1}),
          ("llama", {"rope_scaling": {"type": "linear", "factor": 3.0}})]


@pytest.mark.parametrize("family, changes", HIDDEN, ids=repr)
def test_what_shapes_do_not_show(capsys, tmp_path, family, changes):
    config, state = changed(family, changes), decoders.state(changed(family, {}))
    got = compare(capsys, tmp_path, config, state)
    assert np.abs(got - decoders.logits(changed(family, {}), state, TOKENS)).max() > 1e-3


REFUSED = [
    *(("llama", {"model_type": family}, f"model_type = .*{family}.*only llama") for family in (
        "gemma2", "phi3", "mixtral", "granite", "cohere", "olmo2")),
    ("llama", {"model_type": ABSENT}, "model_type = null"), ("llama", {"model_type": 3}, "model_t"),
    ("llama", {"hidden_act": "gelu"}, "hidden_act"), ("powercoder", {"hidden_act": "silu"}, "hidd"),
    ("llama", {"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
    ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ("llama", {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "rope_param"),
    *(("llama", {"rope_scaling": {"rope_type": kind, "factor": 2.0}}, f"rope_scaling.*{kind}")
      for kind in ("yarn", "longrope", "su", ["x"])),
    ("llama", {"rope_scaling": "linear"}, "rope_scaling = .*expected an object"),
    ("llama", {"rope_scaling": {"rope_type": "linear"}}, "rope_scaling.factor"),
    ("llama", {"rope_scaling": {**LLAMA3, "low_freq_factor": 4.0}}, "low_freq_factor < high_freq"),
    ("llama", {"rope_scaling": {**LLAMA3, "original_max_position_embeddings": 0}}, "original_max"),
    ("llama", {"rope_theta": 0}, "rope_theta"), ("llama", {"rope_theta": None}, "rope_theta"),
    ("llama", {"rms_norm_eps": "x"}, "rms_norm_eps"), ("llama", {"vocab_size": 30}, "embed_tokens"),
    ("llama", {"hidden_size": 25}, "embed_tokens"), ("llama", {"hidden_size": None}, "hidden_size"),
    ("llama", {"intermediate_size": 41}, "gate_proj"), ("llama", {"num_hidden_layers": 1}, "holds"),
    ("llama", {"num_hidden_layers": 3}, "lacks the tensor model.layers.2"),
    ("llama", {"num_attention_heads": 3}, "num_attention_heads"),
    ("llama", {"num_attention_heads": 2}, "q_proj"), ("llama", {"num_key_value_heads": 4}, "k_pr"),
    ("llama", {"num_key_value_heads": 0}, "num_key"), ("llama", {"head_dim": 7}, "width 7"),
    ("llama", {"head_dim": 6}, "q_proj"), ("llama", {"head_dim": 0}, "head_dim"),
    ("llama", {"head_dim": 90_000_000}, "1,048,576 in all"),
    ("llama", {"attention_bias": True}, "lacks .*q_proj.bias"),
    ("llama", {"mlp_bias": True}, "lacks .*gate_proj.bias"),
    ("llama", {"tie_word_embeddings": False, "BASE": {"tie_word_embeddings": True}}, "lm_head"),
    ("llama", {"BASE": {"attention_bias": True}}, "layer uses.*self_attn"),
    ("llama", {"BASE": {"mlp_bias": True}}, "layer uses.*mlp"),
    ("mistral", {"attention_bias": True, "BASE": {"model_type": "llama", "attention_bias": True}},
     "layer uses.*self_attn"),
    ("qwen2", {"BASE": {"model_type": "llama"}}, "lacks .*q_proj.bias"),
    ("qwen3", {"BASE": {"model_type": "llama"}}, "lacks .*q_norm"),
    ("llama", {"BASE": {"model_type": "qwen3"}}, "layer uses.*k_norm"),
    ("brumby", {"BASE": {"model_type": "qwen3"}}, "lacks .*g_proj"),
    ("powercoder", {"use_bias": False}, "layer uses.*bias"),
    ("qwen2", {**SLIDING, "layer_types": ["full_attention"]}, "layer_types"),
    ("qwen2", {**SLIDING, "layer_types": ["chunked_attention"] * 2}, "layer_types"),
    ("qwen2", {**SLIDING, "max_window_layers": -1}, "max_window_layers"),
    ("mistral", {"sliding_window": 0}, "sliding_window"),
    ("llama", {"max_position_embeddings": None}, "max_position_embeddings"),
    ("powercoder", {"norm_epsilon": -1}, "norm_epsilon"),
]


@pytest.mark.parametrize("family, changes, pattern", REFUSED, ids=repr)
def test_refused(capsys, tmp_path, family, changes, pattern):
    """Over the tensors of BASE, or of what stands beside BASE."""
    base = changed(family, changes.get("BASE", {}))
    config = changed(family, {**changes, "BASE": ABSENT})
    source = decoders.write(tmp_path / "source", config, decoders.state(base))
    fails(capsys, pattern, source, tmp_path / "out.bin")


def test_every_field():
    """No field of the tables is without a test above; the defaults are the original's."""
    tested = {name for _, changes, *_ in OBEYED + REFUSED for name in changes}
    tested |= {name for _, changes, *_ in OBEYED + REFUSED for group in changes.values()
               if isinstance(group, dict) for name in group}
    unread = {"brumby": {"use_sliding_window", "sliding_window", "max_window_layers",
                         "layer_types"}}
    for family, fields in huggingface.FAMILIES.items():
        assert fields.keys() - unread.get(family, set()) <= tested
        assert {name: value for name, value in fields.items() if name not in
                huggingface.REQUIRED} == decoders.DEFAULTS[family], family
    assert huggingface.ROPE.keys() <= tested


# ---- Tensors, windows, shapes

@pytest.mark.parametrize("folder, said", [
    ("decoders/powercoder", ["tanh GELU 128", "tokens fade by a gate of each token"]),
    ("based-decay-tiny", ["tokens fade by a fixed factor"]),
    ("decoders/mistral", ["SwiGLU 128", "last 16 tokens"])])
def test_info(capsys, tmp_path, folder, said):
    exported(capsys, DATA.parent / folder, tmp_path / "out.bin")
    done = subprocess.run([Path(export.__file__).parent / "run", tmp_path / "out.bin", "--info"],
                          capture_output=True, text=True, check=True)
    assert all(text in done.stdout for text in said) and "unknown" not in done.stdout


def test_head_that_is_said_to_be_tied_but_differs(capsys, tmp_path):
    """It is used, and that is told."""
    config = changed("powercoder", {"tie_word_embeddings": False})
    state = decoders.state(config)
    said = {**config, "tie_word_embeddings": True}
    _, stderr = exported(capsys, decoders.write(tmp_path / "a", said, state), tmp_path / "a.bin")
    assert "lm_head.weight, which differs" in stderr
    exported(capsys, decoders.write(tmp_path / "b", config, state), tmp_path / "b.bin")
    assert (tmp_path / "a.bin").read_bytes() == (tmp_path / "b.bin").read_bytes()
    state["lm_head.weight"] = state["model.embed_tokens.weight"].copy()
    exported(capsys, decoders.write(tmp_path / "c", config, state), tmp_path / "c.bin")
    assert export.Checkpoint(tmp_path / "c.bin").config.flags & export.TIED


def test_shards_bfloat16_and_old_tables(capsys, tmp_path):
    """Tensors in two files, in bfloat16, and rotary frequencies among them change nothing."""
    torch = pytest.importorskip("torch")
    from safetensors.torch import save_file as save_torch
    state = {name: torch.from_numpy(x).bfloat16() for name, x in tensors("qwen2").items()}
    state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    shutil.copytree(DATA / "qwen2", tmp_path / "many")
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    first = sorted(set(index["weight_map"].values()))[0]
    index["weight_map"]["model.layers.0.self_attn.rotary_emb.inv_freq"] = first
    (tmp_path / "many" / "model.safetensors.index.json").write_text(json.dumps(index))
    for file in set(index["weight_map"].values()):
        save_torch({name: x for name, x in state.items() if index["weight_map"][name] == file},
                   tmp_path / "many" / file)
    config = json.loads((DATA / "qwen2" / "config.json").read_text())
    one = decoders.write(tmp_path / "one", config, {name: x.float().numpy()
                                                    for name, x in state.items()})
    (tmp_path / "many" / "pytorch_model.bin").write_text("not looked at")
    exported(capsys, tmp_path / "many", tmp_path / "many.bin")
    exported(capsys, one, tmp_path / "one.bin")
    assert (tmp_path / "many.bin").read_bytes() == (tmp_path / "one.bin").read_bytes()


@pytest.mark.parametrize("family, changes, given, windows, told", [
    ("llama", {}, None, [64, 64], False), ("llama", {}, 9, [9, 9], True),
    ("llama", {"max_position_embeddings": 131072}, None, [4096, 4096], True),
    ("llama", {"max_position_embeddings": 131072}, 131072, [131072] * 2, False),
    ("llama", {}, 100, [100, 100], False), ("mistral", {"sliding_window": 16}, None, [16, 16], 0),
    ("mistral", {"sliding_window": 8192}, None, [8192, 8192], False),
    ("mistral", {"sliding_window": 16}, 99, [16, 16], False),
    ("mistral", {"sliding_window": 16}, 5, [5, 5], True),
    ("qwen2", {**SLIDING, "max_window_layers": 1}, 9, [9, 7], True)])
def test_window(capsys, tmp_path, family, changes, given, windows, told):
    """The whole context or sliding window if it is not long, and --window; a note tells what is
    forgotten, and how much memory it takes."""
    config = changed(family, changes)
    source = decoders.write(tmp_path / "source", config, decoders.state(config))
    _, stderr = exported(capsys, source, tmp_path / "out.bin",
                         *(["--window", given] if given else []))
    layers = export.Checkpoint(tmp_path / "out.bin").layers
    assert [l.window for l in layers] == windows
    notes = [line for line in stderr.splitlines() if "--window" in line]
    assert len(notes) == told
    if told:
        cut = [l for l in layers if l.window != 7]
        assert f"{len(cut)} layers keep the newest {cut[0].window:,} tokens" in notes[0]
        assert f"A token takes {len(cut) * 2 * 2 * 8 * 4} bytes" in notes[0]
        state = based.Model(tmp_path / "out.bin").state_bytes
        assert state == sum(2 * 2 * 8 * 4 * window for window in windows)


def test_window_of_sums_refused(capsys, tmp_path):
    fails(capsys, "--window is about layers that keep keys", "--window", 9, DATA / "brumby",
          tmp_path / "out.bin")


LOLCATS = [
    ("distill", {"layers.1.self_attn.window_factors": None}, "no known layer.*layers.1"),
    ("distill", {"layers.0.self_attn.feature_map_k.mlp.layer": (4, 16, 7)}, "feature_map_k.*shape"),
    ("distill", {"layers.0.self_attn.window_factors": (4,)}, "window_factors has shape"),
    ("distill", {"layers.0.mlp.up_proj.weight": (2, 2)}, "up_proj.weight, which is in"),
    ("distill", {"layers.7.self_attn.window_factors": (1, 4, 1, 1)}, "no known layer.*layers.7"),
    ("ft-lora", {"layers.0.self_attn.q_proj.lora_B.default.weight": None}, "lacks .*lora_B.weight"),
    ("ft-lora", {"layers.0.self_attn.q_proj.lora_A.default.weight": None}, "but no .*lora_A"),
    ("ft-lora", {"layers.0.self_attn.q_proj.lora_A.default.weight": (3, 64)}, "lora_B.*shape"),
    ("ft-lora", {"layers.9.self_attn.q_proj.lora_A.default.weight": (2, 64)}, "lacks .*layers.9")]


def lolcats(tmp_path, changes={}, file="distill"):
    """--lolcats and copies of its two folders. changes: of a file, name without what stands before
    "layers" -> None, to leave the tensor out, or the shape of a new one."""
    torch = pytest.importorskip("torch")
    folders = [tmp_path / name for name in ("distill", "ft-lora")]
    for folder in folders:
        shutil.copytree(DATA.parent / "lolcats-tiny" / folder.name, folder)
        state = torch.load(folder / "model.pt")
        begin = next(iter(state)).split("layers.")[0]
        for name, shape in changes.items() if folder.name == file else ():
            state.pop(begin + name, None)
            if shape:
                state[begin + name] = torch.zeros(shape)
        torch.save({"model_state_dict": state}, folder / "model.pt")
    return ["--lolcats", *folders]


@pytest.mark.parametrize("file, changes, pattern", LOLCATS, ids=repr)
def test_lolcats_refused(capsys, tmp_path, file, changes, pattern):
    given = lolcats(tmp_path, changes, file)
    fails(capsys, pattern, *given, DATA.parent / "lolcats-tiny", tmp_path / "out.bin")


def test_lolcats_of_another_model_refused(capsys, tmp_path):
    given = lolcats(tmp_path)
    fails(capsys, "--lolcats belongs to", *given, Path(export.__file__).parent / "models" /
          "stories260K.bin", "--sinks", 1, tmp_path / "out.bin")
    fails(capsys, "o_proj.*shape", *given, DATA / "qwen3", tmp_path / "out.bin")


def test_lolcats_by_default(capsys, tmp_path):
    """The released windows, in any order of the two folders; what --info says."""
    option, *folders = lolcats(tmp_path)
    for name, order in (("a", folders), ("b", folders[::-1])):
        model, _ = exported(capsys, DATA.parent / "lolcats-tiny", tmp_path / f"{name}.bin", option,
                            *order)
    assert (tmp_path / "a.bin").read_bytes() == (tmp_path / "b.bin").read_bytes()
    done = subprocess.run([Path(export.__file__).parent / "run", tmp_path / "a.bin", "--info"],
                          capture_output=True, text=True, check=True)
    assert "hedgehog 8, last 64 tokens exact" in done.stdout
    assert [(l.window, l.chunk) for l in export.Checkpoint(tmp_path / "a.bin").layers] == [
        (64, 64)] * 2


@pytest.mark.parametrize("option", ["--sinks", "--decay"])
def test_sinks_and_decay_refused(capsys, tmp_path, option):
    fails(capsys, f"{option} is not for .*fade by themselves", option, 0, DATA / "powercoder",
          tmp_path / "out.bin")


@pytest.mark.parametrize("family", huggingface.FAMILIES)
def test_random(capsys, tmp_path, family):
    """Random weights in the shape of a config.json; they depend on the seed alone."""
    shape = tmp_path / "config.json"
    shape.write_text(json.dumps(changed(family, {"attention_bias": True, "mlp_bias": True})))
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert run(capsys, "--random", shape, "--seed", seed, "--name", "r",
                   tmp_path / f"{name}.bin")[0] == 0
    a, b, c = ((tmp_path / f"{name}.bin").read_bytes() for name in "abc")
    assert a == b and a != c
    got = based.Session(based.Model(tmp_path / "a.bin")).feed(TOKENS)
    assert np.isfinite(got).all() and 0.3 < got.std() < 3
    assert np.abs(reference.run(reference.read(tmp_path / "a.bin"), TOKENS) - got).max() < 2e-5


@pytest.mark.parametrize("shape, parameters", [
    ("smollm2-135m", 134_515_008), ("llama-3.2-1b", 1_235_814_400), ("qwen3-0.6b", 596_049_920),
    ("powercoder-3b", 3_181_550_652), ("brumby-14b", 14_769_945_920)])
def test_released_shapes(shape, parameters):
    """Parameters as the files of the releases have them (of Brumby 320 more: biases that are
    zero)."""
    options = export.arguments(["--random", shape, "out.bin"])
    config, layers, plan = export.open_random(shape, options, lambda text: None)
    assert export.parameters(config, layers) == parameters
    assert set(plan) == {t.name for t in export.tensors(config, layers)}


def test_a_part_of_a_tensor_at_a_time(capsys, monkeypatch, tmp_path):
    """No more of a large tensor is read at once than a piece, in any dtype."""
    config = changed("llama", {"vocab_size": 70_000, "tie_word_embeddings": False})
    source, most = decoders.write(tmp_path / "source", config, decoders.state(config)), []
    fromfile = np.fromfile

    def counted(path, kind, n, offset=0):
        if kind != np.uint8:                              # those are of the checkpoint
            most.append(n)
        return fromfile(path, kind, n, offset=offset)
    monkeypatch.setattr(np, "fromfile", counted)
    for dtype in ("f32", "q8", "q4"):
        assert run(capsys, source, tmp_path / "out.bin", "--dtype", dtype)[0] == 0
    assert 1e6 < max(most) <= 1 << 20 < 24 * 70_000
