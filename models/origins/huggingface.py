"""Decoders in the form of Hugging Face transformers: https://github.com/huggingface/transformers
(the families of Llama, Mistral, Qwen2 and Qwen3), and two models of the same form with power
retention in place of attention: PowerCoder and Brumby of https://huggingface.co/manifestai; and a
Llama with what https://github.com/HazyResearch/lolcats makes of it.

A directory with config.json and model.safetensors or pytorch_model.bin (or the parts that an index
of either lists). FAMILIES has the fields of config.json that are read, with the original's own
defaults; model_type is the family. All sizes follow from them, and the tensors must agree.

    theirs                                          ours
    model.embed_tokens.weight                       embedding; also the head, if lm_head.weight is
                                                    absent or the same
    model.layers.I.input_layernorm                  norm1: RMS, of PowerCoder LAYER
      self_attn.q_proj, k_proj, v_proj, o_proj      in, out. Rotary pairs are halves of a head here
                                                    and there
      self_attn.q_norm, k_norm                      q_norm, k_norm (Qwen3, Brumby)
      self_attn.g_proj (power retention)            fade: sigmoid of it is what the sums keep
      self_attn.feature_map_q.mlp.layer (LoLCATs)   q_map, each head transposed; so k_map
      self_attn.window_factors (LoLCATs)            mix
    model.layers.I.post_attention_layernorm         norm2
      mlp.gate_proj, up_proj, down_proj             up (gate, value), down: SWIGLU
      mlp.c_fc, c_proj (PowerCoder)                 up, down: GELU_TANH
    model.norm, lm_head.weight                      final_norm, head

Attention over all tokens becomes a window: a session has a fixed size, and a ring for the whole
context of such a model would often not fit into memory. Power retention is Taylor attention with
the weight (scale q.k)^2, whose sums fade by a gate of each token. A Llama of LoLCATs sees the
newest tokens exactly and all others by hedgehog features; its downloads are two files model.pt, one
with feature maps and factors, one with a LoRA of the projections W, which become W + 2 B A.
"""
import json
import math
import re

import numpy as np

from . import (ADD, DOT, DOWN_BIAS, GATED, GELU_TANH, HEDGEHOG, IN_BIAS, NORM_LAYER, NORM_RMS,
               OUT_BIAS, QK_NORM, SWIGLU, TAYLOR, TIED, UP_BIAS, WINDOW, Model, Refused, Settings,
               Source, equal, fractions_of_a_turn, frequencies, random_rows)

# Fields that must have this value, the only one that is implemented.
REQUIRED = {"hidden_act": "silu", "partial_rotary_factor": 1.0, "quantization_config": None}
LLAMA = {
    **REQUIRED, "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": None,
    "head_dim": None, "rms_norm_eps": 1e-6, "max_position_embeddings": 2048,
    "tie_word_embeddings": False, "rope_theta": 10000.0, "rope_scaling": None,
    # newer files have all that is about rotary embedding in this group
    "rope_parameters": None, "attention_bias": False, "mlp_bias": False}
QWEN2 = {
    **LLAMA, "vocab_size": 151936, "intermediate_size": 22016, "num_key_value_heads": 32,
    "max_position_embeddings": 32768, "use_sliding_window": False, "sliding_window": 4096,
    "max_window_layers": 28, "layer_types": None}
FAMILIES = {
    "llama": LLAMA,
    "mistral": {**LLAMA, "intermediate_size": 14336, "num_key_value_heads": 8,
                "max_position_embeddings": 131072, "sliding_window": 4096},
    "qwen2": QWEN2,
    "qwen3": {**QWEN2, "head_dim": 128},
    "brumby": {**QWEN2, "head_dim": 128},
    "powercoder": {**LLAMA, "vocab_size": 49152, "hidden_size": 3072, "intermediate_size": 12288,
                   "num_hidden_layers": 30, "num_attention_heads": 24, "num_key_value_heads": 2,
                   "hidden_act": "gelu_pytorch_tanh", "norm_epsilon": 1e-5, "use_bias": True,
                   "max_position_embeddings": 4096, "tie_word_embeddings": True},
}
RETENTION = ("brumby", "powercoder")
# Fields that a family has by its class, whatever config.json says.
BY_CLASS = {"mistral": {"attention_bias": False, "mlp_bias": False},
            "qwen2": {"attention_bias": False, "mlp_bias": False}, "qwen3": {"mlp_bias": False},
            "brumby": {"mlp_bias": False}}
ROPE = {"rope_type": None, "type": None, "rope_theta": None, "factor": None,
        "low_freq_factor": None, "high_freq_factor": None,
        "original_max_position_embeddings": None, "partial_rotary_factor": 1.0}
MAX_WIDTH = 1 << 20                         # of based.h
# Of layers that see all tokens, the keys that are kept if --window does not say.
KEPT = 4096
# Of power retention: tokens that are flushed into the sums together, and newest tokens that stay
# beside them at least. Reading a key takes 1/4000 of the time of reading the sums, so a prompt of
# 512 tokens, which needs no sums, is read 3 times as fast; for 12 % more state.
FLUSHED, RECENT = 64, 448
FACTORS = "self_attn.window_factors"
# Of LoLCATs, whose files do not say it: newest tokens that are exact, at least, and tokens that are
# flushed together; lora_alpha / r.
TERRACE, LORA_SCALE = 64, 2
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def shape(vocab, dim, hidden, layers, heads, kv, width, theta, **more):
    """What config.json says of a release, for --random."""
    return {"model_type": "llama", "vocab_size": vocab, "hidden_size": dim,
            "intermediate_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads,
            "num_key_value_heads": kv, "head_dim": width, "rope_theta": theta,
            "max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "tie_word_embeddings": True,
            **more}


SHAPES = {
    "smollm2-135m": shape(49152, 576, 1536, 30, 9, 3, 64, 1e5),
    "llama-3.2-1b": shape(128256, 2048, 8192, 16, 32, 8, 64, 5e5, max_position_embeddings=131072,
                          rope_scaling={"rope_type": "llama3", "factor": 32.0,
                                        "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                                        "original_max_position_embeddings": 8192}),
    "qwen3-0.6b": shape(151936, 1024, 3072, 28, 16, 8, 128, 1e6, model_type="qwen3",
                        rms_norm_eps=1e-6, max_position_embeddings=40960),
    "powercoder-3b": shape(49152, 3072, 12288, 30, 24, 2, 128, 999999.4420358813,
                           model_type="powercoder", tie_word_embeddings=False,
                           max_position_embeddings=16384),
    "brumby-14b": shape(151936, 5120, 17408, 40, 40, 8, 128, 1e6, model_type="brumby",
                        rms_norm_eps=1e-6, tie_word_embeddings=False,
                        max_position_embeddings=40960),
}


def clean_name(name):
    """The name of a tensor, or None for what follows from config.json."""
    return None if name.endswith("rotary_emb.inv_freq") else name


def with_lolcats(source, *files):
    """The tensors of a Llama with those of the two files of LoLCATs: feature maps and factors
    beside its own, and the LoRA added to its projections."""
    def clean(name):
        return re.sub(r"^(base_model\.)?(model\.)+", "model.", name).replace(".default.", ".")

    shapes, maps, lora = dict(source.shapes), {}, {}
    for file in (file.renamed(clean) for file in files):
        for name in sorted(file.shapes):
            stem, _, part = name.partition(".lora_")
            if part == "A.weight":
                rows, cols = source.shape(stem + ".weight", None, None)
                rank, _ = file.shape(name, None, cols)
                lora[stem + ".weight"] = (file.take(stem + ".lora_B.weight", rows, rank),
                                          file.take(name, rank, cols))
            elif not part:
                if name in shapes:
                    raise Refused(f"{file.where} holds {name}, which is in {source.where} too")
                shapes[name] = file.shapes[name]
                maps[name] = file.take(name, *shapes[name])
            elif stem + ".lora_A.weight" not in file:
                raise Refused(f"{file.where} holds {name}, but no {stem}.lora_A.weight")

    def load(name, begin, end):
        if name in maps:
            return maps[name][begin:end]
        rows = source.load(name, begin, end)
        if name in lora:
            b, a = lora[name]
            rows = rows + np.float32(LORA_SCALE) * (b[begin:end] @ a())
        return rows
    return Source(shapes, load, source.where, source.settings, source.unusable)


def read(source, options, note):
    """See __init__.py. options: window (visible keys, or None for the default), chunk."""
    given = source.settings
    family = given.get("model_type")
    if not isinstance(family, str) or family not in FAMILIES:
        raise Refused(f"config.json: model_type = {json.dumps(family)} is not supported, only "
                      + ", ".join(FAMILIES))
    c = Settings({**given, **BY_CLASS.get(family, {})}, FAMILIES[family])
    for name in REQUIRED:
        if c.get(name) != c.fields[name]:
            raise Refused(f"{c.said(name)} is not supported")
    dim, rows, heads = map(c.number, ("hidden_size", "vocab_size", "num_attention_heads"))
    kv = heads if c.get("num_key_value_heads") is None else c.number("num_key_value_heads")
    width = dim // heads if c.get("head_dim") is None else c.number("head_dim")
    if heads % kv or width % 2 or not 0 < heads * width <= MAX_WIDTH:
        raise Refused(f"{c.said('num_attention_heads')}, of width {width}: expected a multiple of "
                      f"{kv} heads of keys, of an even width, and not above {MAX_WIDTH:,} in all")
    layer_norm = family == "powercoder"
    eps = c.number("norm_epsilon" if layer_norm else "rms_norm_eps", kind=float)
    kind, norm = (NORM_LAYER, (".weight", ".bias")) if layer_norm else (NORM_RMS, (".weight",))
    m = Model(source.renamed(clean_name), dim=dim, vocab=rows, rows=rows, final_norm=kind,
              final_norm_eps=eps, context=c.number("max_position_embeddings"))
    m.settings, m.family, m.table = c, family, rope_table(c, width, note)
    read_embedding(m, note)
    m.norm("final_norm", "model.norm", norm)
    for i in range(c.number("num_hidden_layers")):
        l = m.layer(f"model.layers.{i}.", kind, eps)
        l.heads, l.kv_heads, l.head_dim_k, l.head_dim_v = heads, kv, width, width
        l.scale, l.rope_pairs = width ** -0.5, width // 2
        m.norm("norm1", "input_layernorm", norm)
        if family == "llama" and FACTORS in m:
            l.mixer, l.kernel, l.window = TAYLOR, HEDGEHOG, options.window or TERRACE
            l.chunk = options.chunk or TERRACE
        elif family in RETENTION:
            l.mixer, l.window, l.chunk = TAYLOR, RECENT, options.chunk or FLUSHED
        else:
            l.mixer, l.window = WINDOW, visible(c, i, options.window)
        read_mixer(m, l)
        m.norm("norm2", "post_attention_layernorm", norm)
        read_mlp(m, l)
    tell_window(m, options, note)
    return m.done()


def read_embedding(m, note):
    """The head is the embedding if it is the same tensor, or absent and said to be tied."""
    rows, dim, tied = m.config.rows, m.config.dim, m.settings.get("tie_word_embeddings")
    embedding = m.load(EMBEDDING, rows, dim)
    head = m.load(HEAD, rows, dim) if HEAD in m or not tied else None
    m.put("embedding", embedding)
    if head is None or equal(embedding, head):
        m.config.flags |= TIED
    else:
        m.put("head.weight", head)
        if tied:
            note(f"{m.source.where} has {HEAD}, which differs from the embedding and is used, "
                 f"although {m.settings.said('tie_word_embeddings')[13:]}")


def biased(m, flag, field, parts):
    """flag, for Model.linear, if the layers have biases, as the field says; they must be there."""
    field = "use_bias" if m.family == "powercoder" else field
    if not m.settings.get(field) and not (m.family == "qwen2" and flag == IN_BIAS):
        return 0
    for name, rows in parts:
        m.shape(name + ".bias", rows)
    return flag


def read_mixer(m, l):
    """Attention or power retention of layer l."""
    dim, heads, kv, width = m.config.dim, l.heads, l.kv_heads, l.head_dim_k
    parts = [("self_attn.q_proj", heads * width), ("self_attn.k_proj", kv * width),
             ("self_attn.v_proj", kv * width)]
    m.linear(biased(m, IN_BIAS, "attention_bias", parts), "in", parts, dim)
    if m.family in ("qwen3", "brumby"):
        l.flags |= QK_NORM
        for name in ("q_norm", "k_norm"):
            m.put(f"{name}.weight", m.load(f"self_attn.{name}.weight", width))
    m.put("rope_freq", lambda: m.table)
    if l.kernel == HEDGEHOG:
        l.normalizer, maps = ADD, "self_attn.feature_map_{}.mlp.layer"
        _, _, l.degree = m.shape(maps.format("q"), heads, width, None)
        for ours in "qk":
            rows = m.load(maps.format(ours), heads, width, l.degree)
            m.put(f"{ours}_map", lambda rows=rows: rows().transpose(0, 2, 1))
        mix = m.load(FACTORS, 1, heads, 1, 1)
        m.put("mix", lambda: mix().reshape(heads))
    elif l.mixer == TAYLOR:
        l.degree, l.kernel, l.normalizer, l.fading = 2, DOT, ADD, GATED
        m.taylor(l, [0, 0, 1])
        gate = [("self_attn.g_proj", kv)]
        m.put("fade.bias", lambda: np.zeros(kv, np.float32))
        m.linear(biased(m, IN_BIAS, "attention_bias", gate), "fade", gate, dim)
    parts = [("self_attn.o_proj", dim)]
    m.linear(biased(m, OUT_BIAS, "attention_bias", parts), "out", parts, heads * width)


def read_mlp(m, l):
    """SWIGLU, or one layer with GELU_TANH before the last."""
    dim = m.config.dim
    l.hidden_dim = hidden = m.settings.number("intermediate_size")
    l.mlp, up, down = (
        (GELU_TANH, [("mlp.c_fc", hidden)], [("mlp.c_proj", dim)]) if m.family == "powercoder" else
        (SWIGLU, [("mlp.gate_proj", hidden), ("mlp.up_proj", hidden)], [("mlp.down_proj", dim)]))
    m.linear(biased(m, UP_BIAS, "mlp_bias", up), "up", up, dim)
    m.linear(biased(m, DOWN_BIAS, "mlp_bias", down), "down", down, hidden)


def sliding(c, i):
    """The keys that layer i of the original sees, or None for all."""
    if "use_sliding_window" not in c.fields:
        slides = "sliding_window" in c.fields and c.get("sliding_window") is not None
    elif c.get("layer_types") is None:
        slides = c.get("use_sliding_window") and i >= c.number("max_window_layers", least=0)
    else:
        kinds = c.get("layer_types")
        known = {"full_attention": False, "sliding_attention": True}
        if not isinstance(kinds, list) or len(kinds) <= i or str(kinds[i]) not in known:
            raise Refused(f"{c.said('layer_types')}, expected for each layer one of "
                          + ", ".join(known))
        slides = known[kinds[i]] and c.get("use_sliding_window")
    return c.number("sliding_window") if slides else None


def visible(c, i, given):
    """The keys that layer i keeps."""
    most = sliding(c, i)
    window = given or min(KEPT, c.number("max_position_embeddings"))
    return window if most is None else min(most, given or most)


def tell_window(m, options, note):
    """Says what windows cost, and what they forget."""
    layers = [l for l in m.layers if l.mixer == WINDOW]
    if options.window and not layers and not m.layers[0].kernel:
        raise Refused("--window is about layers that keep keys, and this model has sums alone")
    cut = [l for i, l in enumerate(layers)
           if l.window < (sliding(m.settings, i) or m.config.context)]
    if cut:
        each = 4 * sum(l.kv_heads * (l.head_dim_k + l.head_dim_v) for l in cut)
        window = cut[0].window
        note(f"{len(cut)} layers keep the newest {window:,} tokens and forget those before; the "
             f"original sees all, up to {m.config.context:,}. A token takes {each:,} bytes, "
             f"{window:,} of them {window * each / 1e6:,.0f} MB of each session: --window N keeps "
             "more or fewer")


def rope_table(c, width, note):
    """The table rope_freq: frequencies, scaled as config.json says, each step in float32."""
    name = "rope_parameters" if c.get("rope_parameters") is not None else "rope_scaling"
    group = c.group(name, ROPE)
    theta = (group if group.get("rope_theta") is not None else c).number(
        "rope_theta", kind=float, most=1e15)
    kind = group.get("rope_type") or group.get("type") or "default"
    if kind not in ("default", "linear", "dynamic", "llama3") or (
            group.get("partial_rotary_factor") != 1):
        raise Refused(f"{c.said(name)} is not supported, only rope_type default, linear, dynamic "
                      "and llama3, for whole heads")
    f = frequencies(width // 2, width, theta)
    if kind == "dynamic":
        note(f"{c.said(name)} changes nothing up to {c.get('max_position_embeddings')} tokens; "
             "nor does it here beyond them")
    if kind in ("default", "dynamic"):
        return fractions_of_a_turn(f)
    factor = np.float32(group.number("factor", kind=float, least=1e-6))
    if kind == "llama3":
        low, high, n = (group.number(name, kind=float, least=1e-6) for name in (
            "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"))
        if not low < high:
            raise Refused(f"{c.said(name)}: expected low_freq_factor < high_freq_factor")
        wave = np.float32(2 * math.pi) / f
        between = (np.float32(n) / wave - np.float32(low)) / np.float32(high - low)
        mixed = (np.float32(1) - between) * f / factor + between * f
        return fractions_of_a_turn(np.where(wave > np.float32(n / low), f / factor,
                                            np.where(wave < np.float32(n / high), f, mixed)))
    return fractions_of_a_turn(f / factor)


class Random(Source):
    """Holds every tensor that is asked for, with random weights. They are scaled so that
    activations keep their size through any number of layers."""

    def __init__(self, settings, where, seed):
        super().__init__({}, None, where, settings)
        self.seed = seed
        self.depth = Settings(settings, LLAMA).number("num_hidden_layers")

    def renamed(self, rename):
        return self

    def __contains__(self, name):
        return name.endswith(".bias")

    def shape(self, name, *expected):
        return expected

    def take(self, name, *expected):
        last = name.endswith(("o_proj.weight", "down_proj.weight", "c_proj.weight"))
        return random_rows(name, expected, self.seed, 1 / math.sqrt(2 * self.depth) if last else 1)
