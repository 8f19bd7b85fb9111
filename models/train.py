#!/usr/bin/env python3
"""Train a Based language model from plain text, from tokenizer to checkpoint, in one file.

A Based model has one mixer per layer: a gated short convolution (c), Taylor linear attention (l) or
softmax attention over a small sliding window (s). This file holds the parallel forms that learn;
based.c holds the recurrent form that speaks. What is saved is a directory with the tensor names and
config keys of the HazyResearch/based releases:

    config.json   model.safetensors   tokenizer.json        (read by export.py)

Text is .txt or .txt.xz, UTF-8, documents separated by a line <|endoftext|>. Every source has a
name, so that a mix can weigh it. Documents stay whole and in order: a window of training text runs
over document ends without a reset, as a stream does at run time.

  A first try, on any CPU, in less than a minute (learns its own source text):
    python3 train.py --smoke --out /tmp/smoke

  A tokenizer, then a 4 M story model:
    python3 train.py --train-tokenizer tok2048.json --vocab 2048 \\
        --data stories='corpus/children-*.txt.xz'
    python3 train.py --out story --tokenizer tok2048.json \\
        --data stories='corpus/children-*.txt.xz' --layers csclccscc --width 160 --heads 5 \\
        --feature 8 --keys 16 --mlp 512 --state-decay 0.03 --length 1024 --tokens 250e6 \\
        --valid eval/children_valid.txt

  Several sources, a broad mix first, stories and longer windows at the end; any number of GPUs:
    torchrun --nproc_per_node 2 train.py --out general --tokenizer tok8192.json \\
        --data children='corpus/children-*.xz' --data wiki='corpus/wiki*.xz' \\
        --mix children=1,wiki=4 --anneal 0.2 --anneal-mix children=1,wiki=1 \\
        --length 2048 --anneal-length 4096 --valid eval/*_valid.txt --minutes 25

  A small model in 4 bits, taught by a large one with the same tokenizer; the last half of the steps
  computes with rounded weights, and the average of late weights is kept if it is better:
    python3 train.py --out small --tokenizer tok2048.json \\
        --data stories='corpus/children-*.txt.xz' --layers ccsclccscccc --width 160 --heads 5 \\
        --feature 8 --keys 13 --mlp 768 --teacher large --bits 4 --bits-part 0.5 --average 0.01 \\
        --valid eval/children_valid.txt
    python3 export.py small small.bin --dtype q4

  Stopped? The same command with --resume goes on, with the same batches. --init DIR starts from a
  saved model.

  What did it learn?
    bits per byte, each document from nothing:
    python3 train.py --eval general --text eval/*_valid.txt
    the same, each file as one endless stream:
    python3 train.py --eval general --text eval/*_valid.txt --segment -1
    loss by position:
    python3 train.py --eval general --text book.txt --segment 16384 --stride 2048
    logits, to compare with another runtime:
    python3 train.py --logits general --tokens "1 5 2" --out logits.f32
"""
import argparse, functools, glob, hashlib, json, lzma, math, os, time
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, asdict
from pathlib import Path
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

END_OF_TEXT = "<|endoftext|>"

# ===================================================================================== 1. the model
# Module names are chosen so that state_dict() is, name for name, the tensor list of a release.
# Every mixer has two methods. forward(h, span) mixes whole sequences that start from nothing, for
# training. resume(h, state) continues from a state and returns the next one: it is what the C
# runtime does, here for any number of tokens at once.

@dataclass(frozen=True)
class Config:
    layers: str = "clsc"        # one letter per layer
    width: int = 64             # d, the residual stream
    heads: int = 2              # of the l and s layers
    feature: int = 16           # width of q and k per head in l layers
    keys: int = 64              # keys visible in s layers, the current token included
    # hidden width; a multiple of 256, because the original code rounds it up to one
    mlp: int = 256
    vocab: int = 512
    sinks: int = 0              # l layers: the first tokens of a text never decay
    decay: float = 0.0          # l layers: the part that the sums lose every CHUNK tokens

    def to_json(self):
        """The keys of a released config.json. Their window_size counts both sides of a window of
        which one is used."""
        where = lambda kind: [i for i, letter in enumerate(self.layers) if letter == kind]
        module = "based.models.mixers."
        return {
            "model_type": "gpt2", "vocab_size": self.vocab, "pad_vocab_size_multiple": 8,
            "n_positions": 0,
            "n_embd": self.width, "n_head": self.heads, "n_layer": len(self.layers),
            "n_inner": self.mlp,
            "layer_norm_epsilon": 1e-5, "rms_norm": True, "activation_function": "swiglu",
            "rotary_emb_fraction": 1, "rotary_emb_base": 10000.0, "qkv_proj_bias": False,
            "out_proj_bias": False,
            "mlp_fc1_bias": False, "mlp_fc2_bias": False, "residual_in_fp32": True,
            "tie_word_embeddings": True,
            "scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False,
            "alt_mixer_layers": where("l"), "alt_mixer_2_layers": where("s"),
            "mixer": {"_target_": module + "convolution.BaseConv", "expand_proj": 4,
                      "kernel_sizes": 3},
            "alt_mixer": {"_target_": module + "linear_attention.LinearAttention",
                          "num_heads": self.heads,
                          "feature_dim": self.feature, "sinks": self.sinks, "decay": self.decay,
                          "feature_map": {
                              "_target_": module + "linear_attention.TaylorExp",
                              "input_dim": self.feature}},
            "alt_mixer_2": {"_target_": module + "slide_attention.SlidingAttention",
                            "num_heads": self.heads,
                            "window_size": 2 * (self.keys - 1), "causal": True},
        }

    @staticmethod
    def from_json(c):
        """The same read back; sinks and decay were called keep and forget before."""
        alt = c["alt_mixer"]
        letters = ["s" if i in c["alt_mixer_2_layers"] else "l" if i in c["alt_mixer_layers"]
                   else "c"
                   for i in range(c["n_layer"])]
        return Config(layers="".join(letters), width=c["n_embd"], heads=c["n_head"],
                      mlp=c["n_inner"],
                      vocab=c["vocab_size"], feature=c["alt_mixer"]["feature_dim"],
                      keys=c["alt_mixer_2"]["window_size"] // 2 + 1,
                      sinks=alt.get("sinks", alt.get("keep", 0)),
                      decay=alt.get("decay", alt.get("forget", 0.0)))

    def state_bytes(self):
        """Bytes of one session of based.c in float32: packed symmetric features (with what rounding
        cuts off, where nothing decays), and the tokens beside the sums."""
        f, h, d = self.feature, self.heads, self.width
        packed = 1 + f + f * (f + 1) // 2
        sums = packed * (d + 2 * h) + (0 if self.decay else packed * d // 2)
        per_layer = {"c": 2 * 2 * d, "s": self.keys * 2 * d,
                     "l": sums + (self.sinks + CHUNK) * (f * h + d)}
        return 4 * sum(per_layer[letter] for letter in self.layers)


class RMSNorm(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * self.weight


class MLP(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.fc1 = nn.Linear(c.width, 2 * c.mlp, bias=False)
        self.fc2 = nn.Linear(c.mlp, c.width, bias=False)

    def forward(self, h):
        value, gate = self.fc1(h).chunk(2, dim=-1)      # the gate is the second half
        return self.fc2(value * F.silu(gate))


class ConvWeight(nn.Module):
    """Holds the three weights of each channel under the name and shape of a depthwise Conv1d; the
    last one multiplies the present."""
    def __init__(self, channels):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, 1, 3))


class ShortConvolution(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.in_proj = nn.Linear(c.width, 4 * c.width)
        self.conv = nn.ModuleDict({"conv": ConvWeight(2 * c.width)})
        self.out_proj = nn.Linear(2 * c.width, c.width)

    def resume(self, h, past):
        u1, u2 = self.in_proj(h).chunk(2, dim=-1)
        n, w = h.shape[1], self.conv["conv"].weight[:, 0]
        seen = F.pad(u1, (0, 0, 2, 0)) if past is None else torch.cat([past, u1], dim=1)
        c = seen[:, :n] * w[:, 0] + seen[:, 1:n + 1] * w[:, 1] + seen[:, 2:] * w[:, 2]
        return self.out_proj(F.silu(c) * u2), seen[:, n:]

    def forward(self, h, span):
        return self.resume(h, None)[0]


CHUNK = 16              # tokens that are flushed into the sums together in based.c


def log_decay(c, query, key):
    """How much of a key's weight is left when a query comes, as a logarithm: full while its chunk
    is the last but one or younger, then one factor for each chunk since."""
    of_query = (query - c.sinks).div(CHUNK, rounding_mode="floor")
    chunks = of_query - (key - c.sinks).div(CHUNK, rounding_mode="floor") - 1
    return math.log1p(-c.decay) * chunks.clamp(min=0) * (key >= c.sinks)


def taylor(s):
    # at least 1/2 for every s, so a sum of these is never zero
    return 1 + s + 0.5 * s * s


def log_taylor(score, batch, head, query, key):
    # softmax over log(taylor) is attention weighted by taylor
    return torch.log(taylor(score))


def decaying_log_taylor(c):
    return lambda score, batch, head, query, key: (log_taylor(score, batch, head, query, key)
                                                   + log_decay(c, query, key))


def split_heads(x, heads):
    # [batch, heads, tokens, width of a head]
    return x.view(*x.shape[:2], heads, -1).transpose(1, 2)


def merge_heads(y):
    return y.transpose(1, 2).flatten(2)


class TaylorAttention(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.heads, self.feature, self.config = c.heads, c.feature, c
        self.proj_q = nn.Linear(c.width, c.heads * c.feature, bias=False)
        self.proj_k = nn.Linear(c.width, c.heads * c.feature, bias=False)
        self.proj_v = nn.Linear(c.width, c.width, bias=False)
        self.out_proj = nn.Linear(c.width, c.width, bias=False)

    def project(self, h):
        return [split_heads(p(h), self.heads) for p in (self.proj_q, self.proj_k, self.proj_v)]

    def phi(self, x):
        """Features whose dot product is taylor(q.k / sqrt(feature)): 1, x, and all products of two
        entries of x."""
        pairs = (x.unsqueeze(-1) * x.unsqueeze(-2)).flatten(-2)
        root = math.sqrt(self.feature)
        return torch.cat([torch.ones_like(x[..., :1]), x / math.sqrt(root),
                          pairs / (math.sqrt(2) * root)], dim=-1)

    def forward(self, h, span):
        if not span.fused:
            return self.resume(h, None)[0]
        q, k, v = self.project(h)
        # the kernel wants a power of two
        padding = max(16, 1 << (self.feature - 1).bit_length()) - self.feature
        q, k = F.pad(q, (0, padding)), F.pad(k, (0, padding))
        weigh = decaying_log_taylor(self.config) if self.config.decay else log_taylor
        y = span.attention(q, k, v, score_mod=weigh, block_mask=span.causal,
                           scale=self.feature ** -0.5)
        return self.out_proj(merge_heads(y))

    def resume(self, h, state):
        q, k, v = self.project(h)
        begin = state[2] if state else 0
        at = torch.arange(begin, begin + h.shape[1], device=h.device)
        weight = taylor(q @ k.transpose(-1, -2) / math.sqrt(self.feature)).tril()
        if self.config.decay:
            weight = weight * log_decay(self.config, at.unsqueeze(-1), at).exp()
        top, bottom = weight @ v, weight.sum(-1, keepdim=True)
        if state is None and self.training:
            return self.out_proj(merge_heads(top / bottom)), None
        # the column of ones sums phi(k) itself
        v1, phi_k, phi_q = F.pad(v, (0, 1), value=1.0), self.phi(k), self.phi(q)
        kept, sums = state[:2] if state else (0.0, 0.0)
        if state:
            # The sums decay until the query comes. Pieces of a text must end where chunks do, so
            # that all that came before them decays alike.
            assert not self.config.decay or (begin - self.config.sinks) % CHUNK == 0
            left = 1.0
            if self.config.decay:
                left = log_decay(self.config, at, torch.full_like(at, begin - 1)).exp()
                left = left.unsqueeze(-1)
            both = phi_q @ kept + left * (phi_q @ sums)
            top, bottom = top + both[..., :-1], bottom + both[..., -1:]
        stays = (at < self.config.sinks).to(k.dtype).unsqueeze(-1)
        kept = kept + (phi_k * stays).transpose(-1, -2) @ v1
        end = torch.full_like(at, begin + h.shape[1])
        last = log_decay(self.config, end, at).exp().unsqueeze(-1) if self.config.decay else 1.0
        age = (1 - self.config.decay) ** (h.shape[1] // CHUNK)
        sums = sums * age + (phi_k * last * (1 - stays)).transpose(-1, -2) @ v1
        return self.out_proj(merge_heads(top / bottom)), (kept, sums, begin + h.shape[1])


def rotary_table(width, start, count, device):
    """cos and sin of position * frequency. In float64, because a stream may be at position one
    million."""
    frequency = 10000.0 ** (-torch.arange(0, width, 2, dtype=torch.float64, device=device) / width)
    angle = torch.arange(start, start + count, dtype=torch.float64,
                         device=device).unsqueeze(-1) * frequency
    return angle.cos().float(), angle.sin().float()


def rotate(x, table):
    cos, sin = table
    a, b = x.chunk(2, dim=-1)                           # pairs are (i, i + half), not neighbours
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)


class WindowAttention(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.heads, self.keys = c.heads, c.keys
        self.Wqkv = nn.Linear(c.width, 3 * c.width, bias=False)
        self.out_proj = nn.Linear(c.width, c.width, bias=False)

    def forward(self, h, span):
        if not span.fused:
            return self.resume(h, None)[0]
        q, k, v = [split_heads(part, self.heads) for part in self.Wqkv(h).chunk(3, dim=-1)]
        y = span.attention(rotate(q, span.rotary), rotate(k, span.rotary), v, block_mask=span.band)
        return self.out_proj(merge_heads(y))

    def resume(self, h, state):
        q, k, v = [split_heads(part, self.heads) for part in self.Wqkv(h).chunk(3, dim=-1)]
        start = state[2] if state else 0
        table = rotary_table(q.shape[-1], start, h.shape[1], h.device)
        q, k = rotate(q, table), rotate(k, table)
        if state:
            k, v = torch.cat([state[0], k], dim=2), torch.cat([state[1], v], dim=2)
        old = k.shape[2] - h.shape[1]
        back = (torch.arange(h.shape[1], device=h.device).unsqueeze(-1)
                + old) - torch.arange(k.shape[2], device=h.device)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=(back >= 0) & (back < self.keys))
        kept = max(0, k.shape[2] - (self.keys - 1))
        return self.out_proj(merge_heads(y)), (k[:, :, kept:], v[:, :, kept:], start + h.shape[1])


MIXERS = {"c": ShortConvolution, "l": TaylorAttention, "s": WindowAttention}


class Layer(nn.Module):
    def __init__(self, c, kind):
        super().__init__()
        self.norm1, self.mixer = RMSNorm(c.width), MIXERS[kind](c)
        self.norm2, self.mlp = RMSNorm(c.width), MLP(c)


class Based(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.transformer = nn.ModuleDict({
            "embeddings": nn.ModuleDict(
                {"word_embeddings": nn.Embedding(config.vocab, config.width)}),
            "layers": nn.ModuleList([Layer(config, kind) for kind in config.layers]),
            "ln_f": RMSNorm(config.width)})
        for name, p in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(p)
            elif "word_embeddings" in name:
                nn.init.normal_(p, std=0.02)
            elif "conv.conv" in name:
                nn.init.uniform_(p, -3 ** -0.5, 3 ** -0.5)
            # what adds to the residual stream starts small
            elif p.ndim == 2:
                depth = 2 * len(config.layers) if "out_proj" in name or "fc2" in name else 1
                nn.init.normal_(p, std=0.5 * (p.shape[1] * depth) ** -0.5)

    def embed(self, tokens):
        return self.transformer["embeddings"]["word_embeddings"](tokens)

    def head(self, x):
        return F.linear(self.transformer["ln_f"](x),
                        self.transformer["embeddings"]["word_embeddings"].weight)

    def logits(self, tokens, span):
        x = self.embed(tokens)
        for layer in self.transformer["layers"]:
            x = x + layer.mixer(layer.norm1(x), span)
            x = x + layer.mlp(layer.norm2(x))
        return self.head(x)

    def forward(self, tokens, targets, span, teacher=None):
        """Loss in nats of every target [batch, length]; with the logits of a teacher, also the loss
        that is expected if each target is drawn from what the teacher predicts."""
        logits = self.logits(tokens, span).float().flatten(0, 1)
        nats = F.cross_entropy(logits, targets.flatten(), reduction="none").view_as(targets)
        if teacher is None:
            return nats
        drawn = teacher.float().softmax(-1).flatten(0, 1)
        return nats, F.cross_entropy(logits, drawn, reduction="none").view_as(targets)

    def resume(self, tokens, states=None):
        """Logits of every token and the state after them."""
        x, after = self.embed(tokens), []
        for i, layer in enumerate(self.transformer["layers"]):
            y, state = layer.mixer.resume(layer.norm1(x), states[i] if states else None)
            x = x + y
            x = x + layer.mlp(layer.norm2(x))
            after.append(state)
        return self.head(x), after


class Span:
    """What the fused attention kernels need to know about a sequence length; made once per length,
    outside the graph."""
    def __init__(self, config, length, device):
        self.fused = device.type == "cuda"
        # elsewhere the plain quadratic form of resume() is used
        if self.fused:
            from torch.nn.attention.flex_attention import create_block_mask, flex_attention
            causal = lambda b, h, i, j: i >= j
            band = lambda b, h, i, j: (i >= j) & (i - j < config.keys)
            self.attention = flex_attention
            self.causal = create_block_mask(causal, None, None, length, length, device=device)
            self.band = create_block_mask(band, None, None, length, length, device=device)
            self.rotary = rotary_table(config.width // config.heads, 0, length, device)


def save_model(model, tokenizer, folder):
    from safetensors.torch import save_file
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: p.detach().float().cpu().contiguous()
               for name, p in model.state_dict().items()}
    # under its name the file is always whole, so it can be exported while training goes on
    save_file(tensors, folder / "model.partial", metadata={"format": "pt"})
    os.replace(folder / "model.partial", folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(model.config.to_json(), indent=2) + "\n")
    if tokenizer is not None:
        tokenizer.save(str(folder / "tokenizer.json"))


def load_model(folder, device="cpu"):
    from safetensors.torch import load_file
    folder = Path(folder)
    model = Based(Config.from_json(json.loads((folder / "config.json").read_text())))
    model.load_state_dict(load_file(folder / "model.safetensors"))
    return model.to(device)


# ================================================================================= 2. the optimizer

def orthogonalize(g, steps=5):
    """The nearest matrix with all singular values near 1, for a stack of wide matrices:
    Newton-Schulz iteration with Keller Jordan's quintic, which trades an exact 1 for a steep slope
    at 0. bfloat16 is enough."""
    x = g.bfloat16()
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        a = x @ x.transpose(-1, -2)
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * (a @ a)) @ x
    return x


class Muon(torch.optim.Optimizer):
    """Momentum whose update is made orthogonal, so that rare directions of a matrix learn as fast
    as frequent ones. Fused matrices are orthogonalized part by part; equal shapes are stacked and
    go through the iteration together. The factor 0.2 sqrt(longer side) gives an update the size of
    AdamW's, so both use one learning rate."""
    def __init__(self, parameters, lr, weight_decay, momentum=0.95):
        super().__init__(parameters, dict(lr=lr, weight_decay=weight_decay, momentum=momentum))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            parameters, beta = group["params"], group["momentum"]
            for p in parameters:
                if "momentum" not in self.state[p]:
                    self.state[p]["momentum"] = torch.zeros_like(p)
            gradients = [p.grad for p in parameters]
            momenta = [self.state[p]["momentum"] for p in parameters]
            torch._foreach_lerp_(momenta, gradients, 1 - beta)
            updates = torch._foreach_lerp(gradients, momenta,
                                          beta)             # Nesterov's look ahead
            torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
            by_shape = {}
            for p, update in zip(parameters, updates):
                for part, u in zip(p.chunk(p.parts), update.chunk(p.parts)):
                    # the iteration wants wide matrices
                    if u.shape[0] > u.shape[1]:
                        part, u = part.t(), u.t()
                    by_shape.setdefault(u.shape, []).append((part, u))
            for shape, members in by_shape.items():
                stack = orthogonalize(torch.stack([u for _, u in members])).float()
                parts, size = [part for part, _ in members], 0.2 * math.sqrt(max(shape))
                torch._foreach_add_(parts, list(stack.unbind()), alpha=-group["lr"] * size)


def make_optimizers(model, lr, weight_decay, fused):
    """Muon for the matrices inside the layers; AdamW for the embedding, convolutions, norms and
    biases."""
    matrices, embedding, rest = [], [], []
    for name, p in model.named_parameters():
        if "layers" in name and p.ndim == 2:
            p.parts = 3 if "Wqkv" in name else 2 if "fc1" in name or "in_proj" in name else 1
            matrices.append(p)
        else:
            (embedding if "word_embeddings" in name else rest).append(p)
    adam = torch.optim.AdamW([dict(params=embedding, weight_decay=weight_decay),
                              dict(params=rest, weight_decay=0.0)],
                             lr=lr, betas=(0.9, 0.95), fused=fused)
    return [Muon(matrices, lr, weight_decay), adam]


# =========================================================== 3. rounded, averaged, borrowed weights

# Of these quotients of the extreme weight of a group, one becomes the scale of 4 bits.
LEVELS = (-8.6, -8.3, -8, -7.7, -7.4, -7.1, -6.8, -6.5, -6.2, -5.9,
          5.6, 6.2, 6.5, 6.8, 7, 7.3, 7.6)

def scales_of_4_bits(t):
    """The scale of each group, the one with the least squared error."""
    extreme = t.gather(-1, t.abs().argmax(-1, keepdim=True))
    best, least = torch.zeros_like(extreme), torch.full_like(extreme, math.inf)
    for level in LEVELS:
        scale = (extreme / level).bfloat16().float()
        steps = (t / torch.where(scale == 0, 1.0, scale)).round().clamp(-8, 7)
        error = (steps * scale - t).square().sum(-1, keepdim=True)
        best, least = torch.where(error < least, scale, best), torch.minimum(error, least)
    return best


def scales_of_8_bits(t):
    """The least bfloat16 that leaves no weight of a group beyond 127 steps."""
    scale = t.abs().amax(-1, keepdim=True) / 127
    return ((scale.view(torch.int32) + 0xFFFF) & -0x10000).view(torch.float32)


def rounded(t, bits):
    """Groups of weights [groups, 8 * bits], as export.py --dtype q4 or q8 stores them."""
    scale = scales_of_4_bits(t) if bits == 4 else scales_of_8_bits(t)
    scale = torch.where(scale.abs() < 2.0 ** -82, 0.0, scale)
    steps = (t / torch.where(scale == 0, 1.0, scale)).round()
    return steps.clamp(*((-8, 7) if bits == 4 else (-127, 127))) * scale


@contextmanager
def borrowed(parameters, values):
    """Lets parameters hold other values for a while. Gradients that come up meanwhile belong to the
    parameters, which is how a model learns through a rounding."""
    own = [p.detach().clone() for p in parameters]
    with torch.no_grad():
        torch._foreach_copy_(parameters, values)
    try:
        yield
    finally:
        with torch.no_grad():
            torch._foreach_copy_(parameters, own)


class Rounding:
    """The matrices of a model as a file of so many bits holds them, all rounded in one go."""
    def __init__(self, model, bits, fused):
        self.matrices = [p for p in model.parameters() if p.ndim == 2]
        self.bits, self.width = bits, 8 * bits
        self.rounded = torch.compile(rounded, dynamic=False) if fused else rounded

    @torch.no_grad()
    def values(self):
        padded = [F.pad(p, (0, -p.shape[1] % self.width)) for p in self.matrices]
        groups = torch.cat([p.reshape(-1, self.width) for p in padded])
        parts = self.rounded(groups, self.bits).split([p.numel() // self.width for p in padded])
        return [part.view(wide.shape)[:, :p.shape[1]]
                for part, wide, p in zip(parts, padded, self.matrices)]

    def __call__(self):
        return borrowed(self.matrices, self.values())


# ========================================================================================== 4. data

def read_documents(path):
    opener = lzma.open if str(path).endswith(".xz") else open
    with opener(path, "rt", encoding="utf-8") as f:
        text = f.read()
    documents = [part.strip("\n") for part in ("\n" + text).split("\n" + END_OF_TEXT)]
    return [d for d in documents if d]


def train_tokenizer(documents, vocab, path):
    """Byte-level BPE as GPT-2's: any byte sequence is expressible, merges never cross the word
    pattern."""
    import tokenizers as tk
    tokenizer = tk.Tokenizer(tk.models.BPE())
    tokenizer.pre_tokenizer = tk.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = tk.decoders.ByteLevel()
    trainer = tk.trainers.BpeTrainer(vocab_size=vocab, special_tokens=[END_OF_TEXT],
                                     show_progress=False,
                                     initial_alphabet=tk.pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(documents, trainer)
    tokenizer.save(str(path))
    return tokenizer


def encode_file(path, tokenizer, cache):
    """All documents of a file, each followed by the end-of-text token, as one array; kept on disk
    if there is a cache."""
    key = hashlib.sha1(tokenizer.to_str().encode()).hexdigest()[:8]
    kept = Path(cache) / f"{Path(path).name}.{key}.npy" if cache else None
    if kept and kept.exists():
        return np.load(kept)
    end = tokenizer.token_to_id(END_OF_TEXT)
    small = np.uint16 if tokenizer.get_vocab_size() <= 65536 else np.int32
    encodings = tokenizer.encode_batch_fast(read_documents(path), add_special_tokens=False)
    ids = np.concatenate([np.array(e.ids + [end], dtype=small) for e in encodings])
    if kept:
        kept.parent.mkdir(parents=True, exist_ok=True)
        np.save(kept, ids)
    return ids


def encode_as_run(path, tokenizer):
    """The ids of a file as `run -x` reads it: every byte counts, line ends beside <|endoftext|>
    too; one such token first."""
    with open(path, encoding="utf-8", newline="") as f:
        ids = tokenizer.encode(f.read(), add_special_tokens=False).ids
    return np.array([tokenizer.token_to_id(END_OF_TEXT)] + ids)


def bytes_per_token(tokenizer, vocab):
    """UTF-8 bytes each token stands for. The end-of-text token stands for none: its loss counts,
    its bytes do not."""
    lengths = torch.zeros(vocab, dtype=torch.float64)
    for piece, i in tokenizer.get_vocab().items():
        # byte-level BPE spells each byte as one letter
        lengths[i] = 0 if piece == END_OF_TEXT else len(piece)
    return lengths


class Sampler:
    """Draws windows of the sources in the proportions of a mix. One pass over a source cuts it at a
    random offset into windows and visits them in random order, each once. All is a function of the
    seed, so a resumed run, and a run on any number of GPUs, sees the same batches."""
    def __init__(self, sources, seed, device):
        self.names, self.seed, self.device = list(sources), seed, device
        self.base = np.cumsum([0] + [len(t) for t in sources.values()])
        whole = np.concatenate([t.astype(np.int32) for t in sources.values()])
        self.tokens = torch.from_numpy(whole).to(device)
        self.progress = {n: dict(round=0, next=0, length=0, drawn=0) for n in self.names}
        self.credit = dict.fromkeys(self.names, 0.0)
        self.order = {}

    def size(self, name):
        i = self.names.index(name)
        return int(self.base[i + 1] - self.base[i])

    def passes(self):
        return {n: round(self.progress[n]["drawn"] / self.size(n), 3) for n in self.names}

    def shuffled(self, name):
        """The starts of all windows of the present pass over a source."""
        at, size = self.progress[name], self.size(name)
        rng = np.random.default_rng([self.seed, self.names.index(name), at["round"]])
        offset = rng.integers(min(at["length"], size - at["length"]))
        return offset + at["length"] * rng.permutation((size - 1 - offset) // at["length"])

    def window(self, name, length):
        at = self.progress[name]
        if at["round"] and name not in self.order:      # just resumed
            self.order[name] = self.shuffled(name)
        if at["length"] != length or at["next"] >= len(self.order[name]):
            at.update(round=at["round"] + 1, next=0, length=length)
            self.order[name] = self.shuffled(name)
        start = self.base[self.names.index(name)] + self.order[name][at["next"]]
        at["next"] += 1
        at["drawn"] += length
        return int(start)

    def batch(self, mix, count, length, rank=0, world=1):
        starts = []
        # the source that is furthest behind its share goes next
        for _ in range(count):
            for name, share in mix.items():
                self.credit[name] += share
            name = max(mix, key=lambda n: self.credit[n])
            self.credit[name] -= 1.0
            starts.append(self.window(name, length))
        starts = torch.tensor(starts[rank::world]).to(self.device, non_blocking=True)
        within = torch.arange(length + 1, device=self.device)
        rows = self.tokens[starts.unsqueeze(1) + within].long()
        return rows[:, :-1], rows[:, 1:]

    def state_dict(self):
        return dict(progress=self.progress, credit=self.credit)

    def load_state_dict(self, saved):
        self.progress, self.credit, self.order = saved["progress"], saved["credit"], {}


def parse_mix(text, names, sampler):
    """'a=1,b=3' as shares that sum to 1; without a text, every source by its size."""
    shares = {n: float(sampler.size(n)) for n in names} if not text else \
             {part.split("=")[0]: float(part.split("=")[1]) for part in text.split(",")}
    unknown = set(shares) - set(names)
    if unknown:
        raise SystemExit(f"mix names {sorted(unknown)}, but --data gives only {names}")
    return {n: s / sum(shares.values()) for n, s in shares.items() if s > 0}


# ==================================================================================== 5. evaluation

EDGES = [64, 256, 1024, 4096, 16384, 65536, 262144]

def pieces_of(tokens, end, segment, stride):
    """(start, length) of the pieces of a text that are each fed from nothing; tokens[0] is an
    end-of-text token. segment 0: one piece per document, from the end-of-text token before it to
    the one after it; segment -1: one piece, the whole text; otherwise pieces of so many tokens,
    which overlap if their starts are a stride < segment apart."""
    n = len(tokens)
    if segment == 0:
        ends = np.flatnonzero(tokens == end)
        ends = ends if ends[-1] == n - 1 else np.append(ends, n - 1)
        return [(int(s), int(e - s + 1)) for s, e in zip(ends, ends[1:])]
    segment = n if segment < 0 else min(segment, n)
    starts = range(0, n - segment + 1, stride) if stride else range(0, n - 1, segment)
    return [(s, min(segment, n - s)) for s in starts]


@torch.no_grad()
def evaluate(model, tokens, pieces, lengths, batch=16, chunk=256):
    """Bits per byte, and nats per token by the number of tokens seen before. Every piece is fed as
    the C runtime feeds it: chunk after chunk, with the state carried. Pieces of equal length go
    through together."""
    device = next(model.parameters()).device
    tokens, pieces = torch.as_tensor(tokens.astype(np.int64)).to(device), list(pieces)
    edges, lengths = torch.tensor(EDGES, device=device), lengths.to(device)
    sums, counts = torch.zeros(2, len(EDGES) + 1, dtype=torch.float64, device=device)
    seen_bytes = torch.zeros((), dtype=torch.float64, device=device)
    while pieces:
        size, states = pieces[0][1], None
        group = [start for start, length in pieces[:batch] if length == size]
        pieces = [p for p in pieces[:batch] if p[1] != size] + pieces[batch:]
        rows = torch.stack([tokens[start:start + size] for start in group])
        for i in range(0, size - 1, chunk):
            x, y = rows[:, i:min(i + chunk, size - 1)], rows[:, i + 1:min(i + chunk, size - 1) + 1]
            logits, states = model.resume(x, states)
            nats = F.cross_entropy(logits.flatten(0, 1), y.flatten(),
                                   reduction="none").view_as(y).double()
            bucket = torch.bucketize(torch.arange(i + 1, i + 1 + x.shape[1], device=device), edges)
            sums.index_add_(0, bucket, nats.sum(0))
            counts.index_add_(0, bucket, torch.full_like(nats[0], len(group)))
            seen_bytes += lengths[y].sum()
    names = [f"{first + 1}-{last}" for first, last in zip([0] + EDGES, EDGES)]
    names.append(f"{EDGES[-1] + 1}-")
    by_position = {name: [round((s / c).item(), 4), int(c)] for name, s,
                   c in zip(names, sums, counts) if c > 0}
    nll, seen_bytes, total = sums.sum().item(), seen_bytes.item(), int(counts.sum().item())
    return dict(bits_per_byte=nll / math.log(2) / seen_bytes, nats_per_token=nll / total,
                tokens=total,
                bytes=int(seen_bytes), by_position=by_position)


# ====================================================================================== 6. training

class Workers:
    """The processes torchrun started, or this one alone. Each computes its rows of a batch;
    gradients are averaged."""
    def __init__(self):
        self.rank, self.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        cuda = torch.cuda.is_available()
        local = int(os.environ.get("LOCAL_RANK", 0))
        self.device = torch.device("cuda", local) if cuda else torch.device("cpu")
        if cuda:
            torch.cuda.set_device(self.device)
        if self.world > 1:
            torch.distributed.init_process_group("nccl" if cuda else "gloo")

    def average_gradients(self, parameters):
        if self.world > 1:
            flat = torch.cat([p.grad.flatten() for p in parameters])
            torch.distributed.all_reduce(flat)
            for p, g in zip(parameters, flat.split([p.numel() for p in parameters])):
                p.grad.copy_((g / self.world).view_as(p))

    def average(self, value):
        value = torch.as_tensor(value, dtype=torch.float64, device=self.device)
        if self.world > 1:
            torch.distributed.all_reduce(value)
        return value / self.world


def rate_at(step, progress, warm_up, decay):
    """Rises to 1 in warm_up steps, stays, and falls in a straight line to 0 over the last part."""
    return min(1.0, (step + 1) / max(1, warm_up), (1 - progress) / max(1e-9, decay))


def train(args):
    from tokenizers import Tokenizer
    from tqdm import tqdm
    began, workers, out = time.time(), Workers(), Path(args.out)
    device, chief = workers.device, workers.rank == 0
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)                        # Sampler has its own generator
    torch.set_float32_matmul_precision("high")

    tokenizer = Tokenizer.from_file(args.tokenizer or str(Path(args.init) / "tokenizer.json"))
    config = Config(args.layers, args.width, args.heads, args.feature, args.keys, args.mlp,
                    tokenizer.get_vocab_size(),
                    args.sinks, args.state_decay)
    if config.vocab % 8:
        raise SystemExit(f"the tokenizer has {config.vocab} tokens; train it with a multiple of 8")
    sources = {}
    for item in args.data:
        name, patterns = item.split("=", 1)
        paths = sorted(p for pattern in patterns.split(",") for p in glob.glob(pattern))
        if not paths:
            raise SystemExit(f"--data {item}: no such file")
        sources[name] = np.concatenate([encode_file(p, tokenizer, args.cache) for p in paths])
    longest = max(args.length, args.anneal_length)
    if args.batch_tokens % (longest * args.accumulate * workers.world):
        raise SystemExit(f"--batch-tokens {args.batch_tokens} is no multiple of length {longest} x "
                         "--accumulate x GPUs")
    valid = {Path(p).name.split(".")[0]: encode_file(p, tokenizer, args.cache) for p in args.valid}
    valid = {name: torch.from_numpy(ids.astype(np.int32)).to(device) for name, ids in valid.items()}
    lengths = bytes_per_token(tokenizer, config.vocab).to(device)
    short = [n for n, t in {**sources, **valid}.items() if len(t) < 2 * longest]
    if short:
        raise SystemExit(f"too short for windows of {longest} tokens: {', '.join(short)}")
    sampler = Sampler(sources, args.seed, device)
    mix = parse_mix(args.mix, sampler.names, sampler)
    anneal_mix = parse_mix(args.anneal_mix, sampler.names, sampler) if args.anneal_mix else mix
    steps = None if args.minutes else int(float(args.tokens) // args.batch_tokens)
    if steps == 0:
        return print(f"encoded {({n: sampler.size(n) for n in sampler.names})}")

    model = load_model(args.init, device) if args.init else Based(config).to(device)
    config, fused = model.config, device.type == "cuda" and not args.eager
    optimizers = make_optimizers(model, args.lr, args.weight_decay, fused=device.type == "cuda")
    parameters = list(model.parameters())
    average = [p.detach().clone() for p in parameters] if args.average else None
    rounding = Rounding(model, args.bits, fused) if args.bits else None
    run = torch.compile(model, dynamic=False) if fused else model
    span_of = functools.cache(lambda config, length: Span(config, length, device))
    teach = None
    if args.teacher:
        teacher = load_model(args.teacher, device)
        theirs = Tokenizer.from_file(str(Path(args.teacher) / "tokenizer.json"))
        if theirs.to_str() != tokenizer.to_str():
            raise SystemExit(f"--teacher {args.teacher} has another tokenizer; the model that it "
                             "teaches needs the same")
        teach = torch.compile(teacher.logits, dynamic=False) if fused else teacher.logits

    def loss_of(x, y, taught=False):
        """Nats of every target, and of the teacher's. Called with gradients on even to evaluate, so
        that one compiled graph serves both."""
        length = x.shape[1]
        with torch.autocast("cuda", torch.bfloat16, enabled=device.type == "cuda"):
            if not taught:
                return run(x, y, span_of(config, length))
            with torch.no_grad():
                logits = teach(x, span_of(teacher.config, length))
            return run(x, y, span_of(config, length), logits)

    def validate(length):
        """Bits per byte of windows spread over each text: quick, and comparable within a run."""
        scores = {}
        rows = args.batch_tokens // length // args.accumulate // workers.world
        for name, tokens in valid.items():
            starts = torch.linspace(0, len(tokens) - length - 1,
                                    rows * workers.world).long()[workers.rank::workers.world]
            within = torch.arange(length + 1, device=device)
            window = tokens[starts.to(device).unsqueeze(1) + within].long()
            nats = loss_of(window[:, :-1], window[:, 1:]).detach().double().sum()
            seen_bytes = workers.average(lengths[window[:, 1:]].sum())
            scores[name] = (workers.average(nats) / seen_bytes / math.log(2)).item()
        return scores

    # Everything a later process needs to go on as if nothing had happened.
    # progress is the part of the tokens, or of the time, that is used.
    step, progress, best, history, slowest = 0, 0.0, float("inf"), [], 0.0
    saved = out / "checkpoint.pt"
    if args.resume and saved.exists():
        old = torch.load(saved, map_location=device, weights_only=True)
        model.load_state_dict(old["model"])
        for o, state in zip(optimizers, old.get("optimizers") or old["optimisers"]):
            o.load_state_dict(state)
        if args.average:
            average = old["average"]
        sampler.load_state_dict(old["sampler"])
        step, best, history = old["step"], old["best"], old["history"]
        progress = old.get("progress", step / steps if steps else 0.0)
        began -= progress * 60 * args.minutes

    if chief:
        count = sum(p.numel() for p in parameters)
        note = dict(asdict(config), parameters=count, state_bytes=config.state_bytes(), mix=mix,
                    anneal_mix=anneal_mix,
                    source_tokens={n: sampler.size(n) for n in sampler.names}, world=workers.world,
                    options=vars(args))
        (out / "run.json").write_text(json.dumps(note, indent=1) + "\n")
        sizes = ", ".join(f"{n} {sampler.size(n) / 1e6:.1f}M" for n in sampler.names)
        plan = f"{steps:,} steps" if steps else f"{args.minutes:g} minutes of steps"
        print(f"{count:,} parameters, {config.state_bytes():,} bytes of state, {plan} of "
              f"{args.batch_tokens:,} tokens; {sizes}", flush=True)

    model.train()
    bar = tqdm(total=steps, initial=step, disable=not chief, mininterval=5, unit="step")
    mark, pending = (time.time(), step), []
    while progress < 1:
        annealing = progress >= 1 - args.anneal
        length = args.anneal_length if annealing and args.anneal_length else args.length
        x, y = sampler.batch(anneal_mix if annealing else mix, args.batch_tokens // length, length,
                             workers.rank, workers.world)
        rounds = rounding and progress >= 1 - args.bits_part
        with rounding() if rounds else nullcontext():
            for part_x, part_y in zip(x.chunk(args.accumulate), y.chunk(args.accumulate)):
                if teach:
                    nats, drawn = loss_of(part_x, part_y, taught=True)
                    loss = torch.lerp(nats.mean(), drawn.mean(), args.teacher_share)
                else:
                    nats = loss = loss_of(part_x, part_y).mean()
                (loss / args.accumulate).backward()
                pending.append(nats.detach().mean())
        workers.average_gradients(parameters)
        torch.nn.utils.clip_grad_norm_(parameters, args.clip)
        for o in optimizers:
            for group in o.param_groups:
                group["lr"] = args.lr * rate_at(step, progress, args.warm_up, args.decay)
            o.step()
            o.zero_grad(set_to_none=True)
        step += 1
        bar.update()
        if steps:
            progress = step / steps
        # The mean of all weights so far, and later of about the last part of the steps.
        if average:
            torch._foreach_lerp_(average, [p.detach() for p in parameters],
                                 min(1.0, max(1 / step, progress / (args.average * step))))

        # Reading a number waits for the GPU, so it is done now and then.
        if step % args.log_every == 0 or progress >= 1:
            now = workers.average(torch.stack(pending).mean()).item()
            if not math.isfinite(now):
                raise SystemExit(f"the loss became {now} at step {step}; lower --lr")
            speed = (step - mark[1]) * args.batch_tokens / (time.time() - mark[0])
            seconds = workers.average(time.time() - began).item()
            if args.minutes:
                # the last evaluation needs time too
                progress = min(1.0, (seconds + slowest) / (60 * args.minutes))
            history.append(dict(step=step, loss=now, length=length, speed=round(speed),
                                seconds=round(seconds, 1), progress=round(progress, 4)))
            bar.set_postfix_str(f"loss {now:.3f}, {speed / 1e3:.0f}k tok/s", refresh=False)
            mark, pending = (time.time(), step), []
        if step % args.eval_every == 0 or progress >= 1:
            mark = (time.time(), step)
            # With --bits, both are judged as they will be stored; what is saved is not rounded.
            for name, values in dict(weights=parameters, average=average).items():
                if not values:
                    continue
                with borrowed(parameters, values):
                    with rounding() if rounding else nullcontext():
                        scores = validate(length)
                    mean = sum(scores.values()) / len(scores) if scores else now
                    if chief and mean < best:
                        save_model(model, tokenizer, out)
                history.append(dict(step=step, of=name, valid=scores, mean=mean,
                                    passes=sampler.passes()))
                if chief:
                    each = " ".join(f"{text} {score:.4f}" for text, score in scores.items())
                    tqdm.write(f"step {step} {name}: train {now:.3f} nats; bits per byte {each} "
                               f"mean {mean:.4f}" + ("  best" if mean < best else ""))
                best = min(best, mean)
            if chief and (args.checkpoint or args.resume):
                torch.save(dict(model=model.state_dict(), average=average,
                                optimizers=[o.state_dict() for o in optimizers], step=step,
                                progress=progress, sampler=sampler.state_dict(), best=best,
                                history=history), saved)
            if chief:
                (out / "log.jsonl").write_text("".join(json.dumps(h) + "\n" for h in history))
            slowest = workers.average(max(slowest, time.time() - mark[0])).item()
            mark = (time.time(), step)
    bar.close()
    if chief:
        plot(history, out / "loss.png")
        print(f"done in {time.time() - began:.0f} s; best mean {best:.4f}; passes "
              f"{sampler.passes()}", flush=True)
    if workers.world > 1:
        torch.distributed.destroy_process_group()


def plot(history, path):
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    fig, (left, right) = plt.subplots(1, 2, figsize=(11, 4))
    losses = [h for h in history if "loss" in h]
    left.plot([h["step"] for h in losses], [h["loss"] for h in losses], lw=0.7)
    left.set(xlabel="step", ylabel="training loss, nats per token")
    left.set_ylim(top=min(6.0, max(h["loss"] for h in losses)))
    scores = [h for h in history if h.get("valid") and h["of"] == "weights"]
    for name in scores[0]["valid"] if scores else []:
        right.plot([h["step"] for h in scores], [h["valid"][name] for h in scores], marker=".",
                   lw=1, label=name)
    right.set(xlabel="step", ylabel="held out, bits per byte")
    if scores:
        right.set_ylim(top=sorted(max(h["valid"].values()) for h in scores)[-min(2, len(scores))])
        right.legend()
    fig.tight_layout()
    fig.savefig(path, dpi=110)
    plt.close(fig)


# ================================================================================== 7. command line

def parse():
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    what = p.add_argument_group("what to do (default: train)")
    what.add_argument("--smoke", action="store_true",
                      help="train a tiny model on this file's own text, on any CPU")
    what.add_argument("--train-tokenizer", metavar="FILE",
                      help="train a tokenizer of --vocab tokens on --data")
    what.add_argument("--eval", metavar="DIR",
                      help="bits per byte and loss by position of --text files")
    what.add_argument("--logits", metavar="DIR",
                      help="write float32 logits of the ids in --tokens to --out")
    io = p.add_argument_group("files")
    io.add_argument("--out",
                    help="folder for the model, run.json, log.jsonl, loss.png; or file, with "
                    "--eval or --logits")
    io.add_argument("--data", action="append", default=[], metavar="NAME=GLOB[,GLOB]",
                    help="a source; repeat for more")
    io.add_argument("--valid", nargs="*", default=[],
                    help="held-out texts; the best model on them is kept")
    io.add_argument("--tokenizer", help="tokenizer.json")
    io.add_argument("--cache", help="folder that keeps encoded texts between runs")
    io.add_argument("--init", metavar="DIR",
                    help="start from this model: its shape, weights and tokenizer")
    io.add_argument("--checkpoint", action="store_true",
                    help="write OUT/checkpoint.pt at every evaluation")
    io.add_argument("--resume", action="store_true",
                    help="go on from OUT/checkpoint.pt, if any; implies --checkpoint")
    shape = p.add_argument_group("shape of the model")
    shape.add_argument("--layers", default="clscclscclsclsc",
                       help="one letter each: c conv, l Taylor, s window")
    shape.add_argument("--width", type=int, default=512)
    shape.add_argument("--heads", type=int, default=8)
    shape.add_argument("--feature", type=int, default=16, help="query and key width of l layers")
    shape.add_argument("--keys", type=int, default=64,
                       help="keys an s layer sees; 1000000 makes it full attention")
    shape.add_argument("--sinks", "--keep", type=int, default=0,
                       help="l layers: this many first tokens of a text never decay")
    shape.add_argument("--state-decay", "--forget", type=float, default=0.0,
                       help=f"l layers: part that the sums lose every {CHUNK} tokens")
    shape.add_argument("--mlp", type=int, default=1024)
    shape.add_argument("--vocab", type=int, default=8192)
    how = p.add_argument_group("training")
    how.add_argument("--tokens", default="500e6",
                     help="how many to train on (0: only encode), or ids for --logits")
    how.add_argument("--minutes", type=float, default=0.0,
                     help="train for so long, from reading the data to the last evaluation, "
                     "instead of for --tokens; every part of the steps is then a part of the time")
    how.add_argument("--batch-tokens", type=int, default=65536,
                     help="tokens per step, over all GPUs")
    how.add_argument("--length", type=int, default=2048, help="tokens per window")
    how.add_argument("--anneal", type=float, default=0.2,
                     help="last part of the steps, on the --anneal-* options")
    how.add_argument("--anneal-length", type=int, default=0)
    how.add_argument("--mix", help="NAME=SHARE,... (default: by size)")
    how.add_argument("--anneal-mix", help="(default: the same)")
    how.add_argument("--lr", type=float, default=3e-3)
    how.add_argument("--warm-up", type=int, default=200, help="steps")
    how.add_argument("--decay", type=float, default=0.5,
                     help="last part of the steps, in which the rate falls to 0")
    how.add_argument("--weight-decay", type=float, default=0.1)
    how.add_argument("--clip", type=float, default=1.0, help="largest norm of the gradient")
    how.add_argument("--accumulate", type=int, default=1,
                     help="parts of a batch computed in turn, to save memory")
    how.add_argument("--bits", type=int, choices=(4, 8), default=0,
                     help="the model will be stored in so many bits (export.py --dtype q4, q8): "
                     "evaluate it rounded, and train it rounded at the end")
    how.add_argument("--bits-part", type=float, default=0.3,
                     help="last part of the steps, in which --bits rounds")
    how.add_argument("--average", type=float, default=0.0,
                     help="keep a running mean of the weights too, over about this part of the "
                     "steps (0: none)")
    how.add_argument("--teacher", metavar="DIR",
                     help="learn also what this model predicts, which has the same tokenizer")
    how.add_argument("--teacher-share", type=float, default=0.75,
                     help="share of the loss that --teacher gives; the text gives the rest")
    how.add_argument("--eval-every", type=int, default=500)
    how.add_argument("--log-every", type=int, default=10)
    how.add_argument("--eager", action="store_true", help="do not compile")
    how.add_argument("--seed", type=int, default=1)
    use = p.add_argument_group("evaluation")
    use.add_argument("--text", nargs="*", default=[])
    use.add_argument("--segment", type=int, default=0,
                     help="tokens after which --eval starts from nothing (0: at the end of each "
                     "document; -1: never)")
    use.add_argument("--stride", type=int, default=0,
                     help="tokens between the starts of segments (0: segment)")
    return p.parse_args()


def main():
    args = parse()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if args.train_tokenizer:
        patterns = [pattern for item in args.data for pattern in item.split("=", 1)[1].split(",")]
        paths = sorted(p for pattern in patterns for p in glob.glob(pattern))
        train_tokenizer((d for p in paths for d in read_documents(p)), args.vocab,
                        args.train_tokenizer)
    elif args.logits:
        model = load_model(args.logits).eval()
        with torch.no_grad():
            logits, _ = model.resume(torch.tensor([[int(t) for t in args.tokens.split()]]))
        logits[0].numpy().astype("<f4").tofile(args.out)
    elif args.eval:
        from tokenizers import Tokenizer
        tokenizer = Tokenizer.from_file(str(Path(args.eval) / "tokenizer.json"))
        model, table = load_model(args.eval, device).eval(), {}
        if args.bits:
            rounding = Rounding(model, args.bits, fused=False)
            with torch.no_grad():
                torch._foreach_copy_(rounding.matrices, rounding.values())
        lengths, end = bytes_per_token(tokenizer,
                                       model.config.vocab), tokenizer.token_to_id(END_OF_TEXT)
        for path in args.text:
            tokens = encode_as_run(path, tokenizer)
            result = evaluate(model, tokens, pieces_of(tokens, end, args.segment, args.stride),
                              lengths)
            table[Path(path).name] = result
            by_position = " ".join(f"[{k}] {v[0]:.3f}" for k, v in result["by_position"].items())
            print(f"{Path(path).name}: {result['bits_per_byte']:.4f} bits per byte, "
                  f"{result['nats_per_token']:.4f} nats per token; {by_position}", flush=True)
        mean = sum(r["bits_per_byte"] for r in table.values()) / len(table)
        print(f"mean: {mean:.4f} bits per byte")
        if args.out:
            Path(args.out).write_text(json.dumps(table, indent=1) + "\n")
    else:
        if not args.out:
            raise SystemExit("--out FOLDER is needed; --help shows examples")
        # small enough for a test, with every part of the real thing
        if args.smoke:
            folder = Path(args.out)
            folder.mkdir(parents=True, exist_ok=True)
            args.tokenizer = str(folder / "smoke-tokenizer.json")
            train_tokenizer(read_documents(__file__), 512, args.tokenizer)
            args.data, args.valid = [f"self={__file__}"], [__file__]
            args.layers, args.width, args.heads, args.feature = "clsc", 64, 2, 8
            args.keys, args.mlp = 16, 256
            args.length, args.anneal_length, args.batch_tokens, args.tokens = 128, 256, 1024, "80e3"
            args.warm_up, args.eval_every, args.sinks, args.state_decay = 10, 20, 16, 0.02
        if not args.tokenizer and not args.init:
            raise SystemExit("--tokenizer FILE (or --init DIR) is needed; --train-tokenizer makes "
                             "one")
        train(args)


if __name__ == "__main__":
    main()
