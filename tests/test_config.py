"""Every field of a HazyResearch/based config.json: the original in numpy (original.py) obeys it and
so does the exported model; or it is refused, in a line that names it; or it changes nothing."""
import copy
import json
from pathlib import Path

import pytest

np = pytest.importorskip("numpy")
pytest.importorskip("safetensors")
import based                                        # noqa: E402
import export                                       # noqa: E402
import origins                                      # noqa: E402
import original                                     # noqa: E402
import reference                                    # noqa: E402
from models.origins import hazyresearch             # noqa: E402
from test_export import fails, run                  # noqa: E402

DATA = Path(__file__).resolve().parent / "data"
MODULE = "based.models.mixers."
CONV = {"_target_": MODULE + "convolution.BaseConv", "l_max": 64, "use_bias": True,
        "expand_proj": 4, "kernel_sizes": 3}
LINEAR = {"_target_": MODULE + "linear_attention.LinearAttention", "l_max": 64, "feature_dim": 8,
          "num_heads": 2, "parallel_implementation": "quadratic",
          "feature_map": {"_target_": MODULE + "linear_attention.TaylorExp", "input_dim": 8}}
PREFIX = {"_target_": MODULE + "prefix_linear_attention.PrefixLinearAttention", "l_max": 64,
          "feature_dim": 8, "num_heads": 2, "enc_length": 12, "feature_name": "taylor_exp",
          "implementation": "fla_parallel"}
SLIDING = {"_target_": MODULE + "slide_attention.SlidingAttention", "window_size": 8,
           "num_heads": 2, "causal": True}
BASE = {"vocab_size": 29, "n_embd": 24, "n_head": 4, "n_layer": 4, "n_inner": 64, "mixer": CONV,
        "alt_mixer_layers": [1], "alt_mixer": LINEAR, "alt_mixer_2_layers": [2, 3],
        "alt_mixer_2": SLIDING, "rms_norm": True, "activation_function": "swiglu",
        "rotary_emb_fraction": 1, "pad_vocab_size_multiple": 8, "mlp_fc1_bias": False,
        "mlp_fc2_bias": False, "qkv_proj_bias": False, "out_proj_bias": False, "n_positions": 0}
TOKENS = np.random.default_rng(3).integers(0, 25, 40)
ABSENT = ...


def changed(changes):
    """BASE with other values, or without some fields; a name with dots is a field of a group."""
    config = copy.deepcopy(BASE)
    for name, value in changes.items():
        *groups, last = name.split(".")
        place = config
        for group in groups:
            place = place[group]
        if value is ABSENT:
            place.pop(last, None)
        else:
            place[last] = copy.deepcopy(value)
    return config


def export_it(capsys, tmp_path, config, state, *options):
    source = origins.write_based(tmp_path / "source", state, config)
    status, _, stderr = run(capsys, source, tmp_path / "out.bin", "--name", "x", *options)
    assert status == 0, stderr
    return tmp_path / "out.bin"


def compare(path, config, state):
    """The exported model, in C and in the reference, computes what the original does."""
    expected, m = original.logits(config, state, TOKENS), reference.read(path)
    session, prefix = based.Session(based.Model(path), 64), min(m.prefix, len(TOKENS))
    first = [session.feed_prefix(TOKENS[:prefix])] if prefix else []
    for got in (np.concatenate([*first, session.feed(TOKENS[prefix:])]),
                reference.run(m, TOKENS, prefix=prefix)):
        assert np.abs(got - expected).max() < 1e-5 * np.abs(expected).max()
    return expected


# What is obeyed. Where a field is absent, the original's default must be taken.
OBEYED = [
    {"vocab_size": 27}, {"vocab_size": ABSENT}, {"pad_vocab_size_multiple": 1},
    {"pad_vocab_size_multiple": ABSENT}, {"n_embd": 16}, {"n_embd": ABSENT, "hidden_size": 24},
    {"n_embd": ABSENT, "n_head": ABSENT, "n_layer": 2, "alt_mixer_layers": [0],
     "alt_mixer_2_layers": [1], "n_inner": 256},                            # 768 and 12 heads
    {"n_head": 2}, {"n_head": 4, "num_attention_heads": 3}, {"n_layer": 3},
    {"n_layer": ABSENT}, {"n_layer": 7, "num_hidden_layers": 2}, {"n_inner": 300},
    {"n_inner": None}, {"n_inner": ABSENT}, {"n_embd": 104, "n_inner": ABSENT},
    {"activation_function": "gelu"}, {"activation_function": "gelu", "n_inner": None},
    {"mlp_type": "alt"}, {"mlp_type": "alt", "ff_mult": 20, "mlp_fc1_bias": True},
    {"mlp_fc1_bias": True}, {"mlp_fc1_bias": ABSENT}, {"mlp_fc2_bias": True},
    {"mlp_fc2_bias": ABSENT}, {"layer_norm_epsilon": 0.1}, {"layer_norm_epsilon": ABSENT},
    {"rms_norm": False}, {"rms_norm": ABSENT}, {"tie_word_embeddings": False},
    {"tie_word_embeddings": ABSENT}, {"lm_head_bias": True}, {"lm_head_bias": ABSENT},
    {"n_head_kv": 2}, {"n_head_kv": 1}, {"n_head_kv": None}, {"n_head_kv": ABSENT},
    {"head_dim": 9, "rotary_emb_fraction": 0.5}, {"head_dim": ABSENT}, {"qkv_proj_bias": True},
    {"qkv_proj_bias": ABSENT}, {"out_proj_bias": True}, {"out_proj_bias": ABSENT},
    {"scale_attn_weights": False}, {"scale_attn_weights": ABSENT},
    {"scale_attn_by_inverse_layer_idx": True}, {"scale_attn_by_inverse_layer_idx": ABSENT},
    {"rotary_emb_fraction": 0.5}, {"rotary_emb_fraction": 0.2}, {"rotary_emb_fraction": ABSENT},
    {"rotary_emb_fraction": 0.5, "n_embd": 20, "n_head": 2},                # 5 of 10 rows
    {"n_embd": 21, "n_head": 3, "rotary_emb_fraction": 0.8},                # 5 of 7 rows
    {"n_embd": 21, "n_head": 3, "rotary_emb_fraction": 0.8, "rotary_emb_interleaved": True},
    {"rotary_emb_base": 50}, {"rotary_emb_base": ABSENT}, {"rotary_emb_interleaved": True},
    {"rotary_emb_interleaved": ABSENT}, {"alt_mixer_layers": [1, 0]}, {"alt_mixer_layers": []},
    {"alt_mixer_layers": None}, {"alt_mixer_layers": ABSENT}, {"alt_mixer_layers": [1, 2]},
    {"alt_mixer_2_layers": ABSENT}, {"alt_mixer_2_layers": [0, 1]},
    {"mixer": LINEAR}, {"mixer": SLIDING}, {"mixer": None}, {"mixer": ABSENT},
    {"mixer": {**LINEAR, "num_heads": 3}, "alt_mixer": {**LINEAR, "num_heads": 1}},
    {"alt_mixer": CONV}, {"alt_mixer": {**SLIDING, "window_size": 20}}, {"alt_mixer": ABSENT},
    {"alt_mixer_2": LINEAR}, {"alt_mixer_2": {**CONV, "expand_proj": 2}}, {"alt_mixer_2": None},
    {"mixer.kernel_size": 5}, {"mixer.kernel_size": ABSENT}, {"mixer.use_bias": False},
    {"mixer.use_bias": ABSENT}, {"mixer.expand_proj": 6}, {"mixer.expand_proj": ABSENT},
    {"alt_mixer.num_heads": 3}, {"alt_mixer.num_heads": ABSENT}, {"alt_mixer.feature_dim": 5},
    {"alt_mixer.feature_dim": ABSENT}, {"alt_mixer.head_dim": 7}, {"alt_mixer.head_dim": None},
    {"alt_mixer.num_heads": 5}, {"alt_mixer.eps": 0.5}, {"alt_mixer.eps": ABSENT},
    {"alt_mixer.feature_map.input_dim": 3}, {"alt_mixer.parallel_implementation": "linear"},
    {"alt_mixer.parallel_implementation": ABSENT}, {"alt_mixer_2.window_size": 20},
    {"alt_mixer_2.window_size": 7}, {"alt_mixer_2.window_size": ABSENT},
    {"alt_mixer_2.window_size": 0},
    {"alt_mixer.feature_map._target_": "aicl.model.models.mixers.linear_attention.Squared"},
    {"mixer._target_": "src.models.mixers.base_conv.BaseConvWithSiLU4"},
    {"alt_mixer_2._target_": "src.models.mixers.slide_fa2.SlidingsMHA"},
    {"alt_mixer.feature_map": ABSENT, "alt_mixer.feature_name": "taylor_exp"},
    {"fixed_decay": True, "alt_mixer.use_decay_proj": True},
    {"fixed_decay": True, "alt_mixer.use_decay_proj": True, "decay_const": -1.5},
    {"fixed_decay": True}, {"n_positions": 9}, {"n_positions": ABSENT},
    {"n_positions": 7, "max_position_embeddings": 0},
]


@pytest.mark.parametrize("changes", OBEYED, ids=repr)
def test_obeyed(capsys, tmp_path, changes):
    config = changed(changes)
    meant = {**config, **{old: config[new] for new, old in hazyresearch.ALIASES.items()
                          if new in config}}
    state = original.state(meant)
    compare(export_it(capsys, tmp_path, config, state), meant, state)


# Of these nothing shows in the shapes: over the tensors of BASE the result must be another.
HIDDEN = [
    {"layer_norm_epsilon": 0.1}, {"n_head": 2}, {"head_dim": 5}, {"scale_attn_weights": False},
    {"scale_attn_by_inverse_layer_idx": True}, {"rotary_emb_fraction": ABSENT},
    {"rotary_emb_fraction": 0.5}, {"rotary_emb_base": 50}, {"rotary_emb_interleaved": True},
    {"alt_mixer.eps": 0.5}, {"alt_mixer.feature_map.input_dim": 3}, {"alt_mixer_2": None},
    {"alt_mixer.num_heads": 4, "alt_mixer.feature_dim": 4}, {"alt_mixer_2.window_size": ABSENT},
    {"alt_mixer_2.window_size": 10}, {"alt_mixer.feature_map._target_": "x.Squared"},
]


@pytest.mark.parametrize("changes", HIDDEN, ids=repr)
def test_what_shapes_do_not_show(capsys, tmp_path, changes):
    config, state = changed(changes), original.state(BASE)
    got = compare(export_it(capsys, tmp_path, config, state), config, state)
    assert np.abs(got - original.logits(BASE, state, TOKENS)).max() > 1e-3


REFUSED = [
    ({"prenorm": False}, "prenorm"), ({"parallel_block": True}, "parallel_block"),
    ({"rotary_emb_scale_base": 512}, "rotary_emb_scale_base"),
    ({"rotary_emb_scale_base": 0}, "rotary_emb_scale_base"),
    ({"word_embed_proj_dim": 8}, "word_embed_proj_dim"), ({"attn_dwconv": True}, "attn_dwconv"),
    ({"fused_mlp": True}, "fused_mlp"), ({"fused_dense_sqrelu_dense": True}, "fused_dense_sqrelu"),
    ({"activation_function": "geglu"}, "activation_function"),
    ({"activation_function": "glu"}, "activation_function"),
    ({"activation_function": "gelu_new"}, "activation_function"),
    ({"activation_function": ABSENT}, "activation_function.*default"),
    ({"vocab_size": 33}, "vocab_size"), ({"pad_vocab_size_multiple": 64}, "pad_vocab_size_mult"),
    ({"n_embd": 48}, "n_embd"), ({"n_head": 5}, "n_head"), ({"n_head_kv": 3}, "n_head_kv"),
    ({"n_layer": 5}, "n_layer"), ({"n_inner": 257}, "n_inner"), ({"n_inner": "x"}, "n_inner"),
    ({"mlp_type": "alt"}, "mlp.fc1.*mlp_type"), ({"mlp_fc1_bias": True}, "mlp_fc1_bias"),
    ({"mlp_fc2_bias": True}, "mlp_fc2_bias"), ({"qkv_proj_bias": True}, "qkv_proj_bias"),
    ({"out_proj_bias": True}, "out_proj_bias"), ({"lm_head_bias": True}, "lm_head_bias"),
    ({"rms_norm": False}, "lacks the tensor transformer.ln_f.bias"),
    ({"head_dim": None}, "head_dim"), ({"head_dim": 60}, "rotary_emb_fraction"),
    ({"rotary_emb_fraction": 1.4}, "rotary_emb_fraction"),
    ({"rotary_emb_base": 0}, "rotary_emb_base"), ({"layer_norm_epsilon": "1"}, "layer_norm_eps"),
    ({"alt_mixer_layers": 1}, "alt_mixer_layers"), ({"alt_mixer_2_layers": "2"}, "alt_mixer_2_la"),
    ({"alt_mixer_layers": ABSENT}, "mixer makes layer 1 BaseConv, but"),
    ({"alt_mixer_2": LINEAR}, "alt_mixer_2 makes layer 2 LinearAttention, but"),
    ({"mixer": [1]}, "mixer = "), ({"alt_mixer": 3}, "alt_mixer = 3"),
    ({"mixer._target_": MODULE + "mamba.Mamba"}, "mixer._target_.*mamba"),
    ({"mixer.kernel_size": 4}, "mixer.kernel_size"), ({"mixer.expand_proj": 2}, "mixer.expand_pr"),
    ({"mixer.expand_proj": ABSENT}, "mixer.expand_proj = 2 .the default"),
    ({"mixer.use_bias": False}, "mixer.use_bias"),
    ({"alt_mixer.num_heads": ABSENT}, "alt_mixer.num_heads = 16 .the default"),
    ({"alt_mixer.feature_dim": 9}, "alt_mixer.feature_dim"),
    ({"alt_mixer.head_dim": 5}, "alt_mixer.head_dim"), ({"alt_mixer.eps": -1}, "alt_mixer.eps"),
    ({"alt_mixer.feature_map": ABSENT}, "alt_mixer.feature_map.input_dim"),
    ({"alt_mixer.feature_map.input_dim": ABSENT}, "alt_mixer.feature_map.input_dim"),
    ({"alt_mixer.feature_map._target_": "x.FeatureMap"}, "alt_mixer.feature_map._target_"),
    ({"alt_mixer.parallel_implementation": "tk"}, "alt_mixer.parallel_implementation"),
    ({"alt_mixer_2.window_size": None}, "alt_mixer_2.window_size"),
    ({"alt_mixer_2.window_size": -2}, "alt_mixer_2.window_size"),
    ({"alt_mixer_2.cross_attn": True}, "alt_mixer_2.cross_attn"),
    ({"alt_mixer_2.return_residual": True}, "alt_mixer_2.return_residual"),
    ({"alt_mixer_2.causal": False}, "alt_mixer_2.causal"),
    ({"alt_mixer_2.surprise": 1}, "alt_mixer_2.surprise"),
    ({"alt_mixer.use_decay_proj": True, "fixed_decay": True}, "lacks the tensor .*decay_proj"),
    ({"alt_mixer.use_decay_proj": True, "fixed_decay": True, "decay_const": 0}, "decay_const"),
    ({"alt_mixer.use_decay_proj": True, "fixed_decay": True,
      "alt_mixer.parallel_implementation": "linear"}, "parallel_implementation"),
    ({"alt_mixer": PREFIX}, "lacks the tensor .*proj_k_enc"),
    ({"alt_mixer.feature_map": ABSENT, "alt_mixer.feature_name": "elu"}, "feature_map.input_dim"),
    ({"n_positions": -1, "mixer.l_max": 0, "alt_mixer.l_max": 0}, "n_positions"),
    ({"mixer": None, "mixer.l_max": 0, "alt_mixer.l_max": 0}, "--window"),
]


@pytest.mark.parametrize("changes, pattern", REFUSED, ids=repr)
def test_refused(capsys, tmp_path, changes, pattern):
    """Over the tensors of BASE."""
    if "--window" in pattern:
        config = changed({"mixer.l_max": 0, "alt_mixer.l_max": 0})
        config["mixer"] = None
        state = original.state(config)
    else:
        config, state = changed(changes), original.state(BASE)
    source = origins.write_based(tmp_path / "source", state, config)
    fails(capsys, pattern, source, tmp_path / "out.bin")


# Whatever a field of these says, the file is the same.
VALUES = {"dtype": None, "device": None}


def test_irrelevant(capsys, tmp_path):
    state = original.state(BASE)
    expected = export_it(capsys, tmp_path, BASE, state).read_bytes()
    for names in hazyresearch.IRRELEVANT.values():
        for name in names.split():
            for place in (name, f"mixer.{name}", f"alt_mixer.{name}", f"alt_mixer_2.{name}"):
                if name in MEANT.get(place.rpartition(".")[0], ()) or name == "l_max":
                    continue
                config = changed({place: VALUES.get(name, 0.25)})
                assert export_it(capsys, tmp_path, config, state).read_bytes() == expected, place


# Names that are irrelevant in one place and obeyed or refused in another.
MEANT = {"": ("qkv_proj_bias", "out_proj_bias", "rotary_emb_base", "rotary_emb_scale_base",
              "rotary_emb_interleaved"), "alt_mixer": ("num_heads",)}


def test_context_is_l_max(capsys, tmp_path):
    """l_max changes no result: it is the note `context`, and the window of full attention; so does
    n_positions where no group has l_max, as in the baselines with attention alone."""
    state = original.state(BASE)
    path = export_it(capsys, tmp_path, changed({"mixer.l_max": 99}), state)
    assert export.Checkpoint(path).config.context == 99
    config = changed({"alt_mixer_2": ABSENT, "mixer.l_max": 40})
    path = export_it(capsys, tmp_path, config, original.state(config))
    assert [l.window for l in export.Checkpoint(path).layers] == [0, 0, 40, 40]
    config = changed({"mixer": None, "alt_mixer": None, "alt_mixer_layers": None,
                      "alt_mixer_2_layers": None, "n_positions": 30,
                      "rotary_emb_fraction": 0.5, "n_inner": None})
    path = export_it(capsys, tmp_path, config, original.state(config))
    assert [l.window for l in export.Checkpoint(path).layers] == 4 * [30]


PREFIXED = [{}, {"num_heads": 3}, {"feature_dim": ABSENT}, {"eps": 0.5}, {"scale_dim": 3},
            {"implementation": ABSENT}, {"feature_name": ABSENT}, {"enc_length": 60}]
NOT_PREFIXED = [({"num_heads": ABSENT}, "num_heads"), ({"num_heads": 4}, "proj_q"),
                ({"feature_dim": 9}, "proj_q"), ({"eps": -1}, "eps"), ({"scale_dim": "x"}, "scale"),
                ({"implementation": "tk"}, "implementation"), ({"feature_name": "elu"}, "elu"),
                ({"enc_length": 1025}, "enc_length"), ({"enc_length": None}, "enc_length")]


def prefixed(changes):
    return changed({"alt_mixer": {name: value for name, value in {**PREFIX, **changes}.items()
                                  if value is not ABSENT}})


@pytest.mark.parametrize("changes", PREFIXED, ids=repr)
def test_prefix_obeyed(capsys, tmp_path, changes):
    """Of a prompt that is all in the prefix, or longer."""
    config = prefixed(changes)
    state = original.state(config)
    compare(export_it(capsys, tmp_path, config, state), config, state)


@pytest.mark.parametrize("changes, pattern", NOT_PREFIXED, ids=repr)
def test_prefix_refused(capsys, tmp_path, changes, pattern):
    source = origins.write_based(tmp_path / "source", original.state(prefixed({})),
                                 prefixed(changes))
    fails(capsys, pattern, source, tmp_path / "out.bin")


def test_every_field():
    """No field of the tables is without a test above, and no test is about a field that is not."""
    top = {name.split(".")[0] for name in hazyresearch.FIELDS} | set(hazyresearch.ALIASES)
    groups = {f"{group}.{name}" for group, kind in (
        ("mixer", "BaseConv"), ("alt_mixer", "LinearAttention"),
        ("alt_mixer_2", "SlidingAttention")) for name in hazyresearch.MIXERS[kind]}
    groups |= {f"alt_mixer.feature_map.{name}" for name in hazyresearch.FEATURE_MAP}
    ours = {f"alt_mixer.{name}" for name in ("sinks", "keep", "decay", "forget")}  # test_train.py
    tested = {name for changes in OBEYED for name in changes} | {
        name for changes, _ in REFUSED for name in changes}
    assert (top | groups) - ours <= tested
    assert {name for name in hazyresearch.FIELDS if name not in hazyresearch.REQUIRED} == set(
        original.DEFAULTS)
    for name, value in original.DEFAULTS.items():
        assert hazyresearch.FIELDS[name] == value, name
    for kind, fields in original.GROUPS.items():
        for name, value in fields.items():
            assert hazyresearch.MIXERS[kind][name] == value, name


def test_eps_of_flash_linear_attention(capsys, tmp_path):
    """Its kernels have an eps of their own, 1e-6."""
    config = changed({"alt_mixer.parallel_implementation": "fla_parallel", "alt_mixer.eps": 0.5})
    state = original.state(config)
    compare(export_it(capsys, tmp_path, config, state), changed({"alt_mixer.eps": 1e-6}), state)


def test_unknown_field_is_named(capsys, tmp_path):
    """Classes that take any field and leave it out: so does the exporter, with a note."""
    source = origins.write_based(tmp_path / "source", original.state(BASE),
                                 changed({"alt_mixer.surprise": 1}))
    status, _, stderr = run(capsys, source, tmp_path / "out.bin")
    assert status == 0 and "note: config.json: alt_mixer.surprise is no field of" in stderr


@pytest.mark.parametrize("folder", ["hazyresearch-tiny", "hazyresearch-odd-rotary"])
def test_numpy_is_the_original(folder):
    """What stands for the original here computes what the original did."""
    torch = pytest.importorskip("torch")
    place = DATA / folder
    config = json.loads((place / "config.json").read_text())
    state = torch.load(place / "pytorch_model.bin", weights_only=True)
    state = {name.removeprefix("model."): x.numpy() for name, x in state.items()
             if "metrics" not in name}
    tokens = np.fromfile(place / "tokens.i32", "<i4")
    golden = np.fromfile(place / "logits.f32", "<f4").reshape(len(tokens), -1)
    assert np.abs(original.logits(config, state, tokens) - golden).max() < 1e-6 * np.abs(
        golden).max()
