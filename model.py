"""
A Llama in plain PyTorch: the mathematics alone, under Hugging Face's names.

Source    Llama 2 and 3 (arXiv 2307.09288, 2407.21783); weight names and the half-split rotary
          layout are Hugging Face's, so that loading is one checked copy and nothing is permuted.
Reading   3 of 9. Before: unicuco.py. Next: llama.py, which reads and writes it. Imports script.py
          alone.
Shapes    B sequences, T tokens, D model width, H query heads, G key-value heads, d head width, V
          vocabulary.
Not here  training (tiny/make.py has it), sliding-window attention, any rotary scaling but linear
          and llama3.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from script import Refused, read_json, send

# the matrices of a block that pruning touches; embeddings, norms and head stay
LINEARS = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)
# settings of config.json that change the mathematics -> the values that this file computes
COMPUTED = {
    "model_type": ("llama", "mistral", "qwen2", "qwen3"),
    "rotary scaling": ("default", "linear", "llama3"),
    "hidden_act": ("silu",),
    "partial_rotary_factor": (1,),
}


# -------------------------------------------------------------------------------- config.json
class Fields:
    """Numbers out of a JSON object that anyone may have written; Refused, naming file and key, for
    what is none.
    """

    def __init__(self, path, raw):
        self.path, self.raw = path, raw

    def number(self, key, default=None, at_most=2**24, types=(int,)):
        value = default if self.raw.get(key) is None else self.raw[key]
        if type(value) not in types or not 0 < value <= at_most:
            raise Refused(
                f"{self.path}: {key} = {value!r:.60} is not a number of this kind"
                f" from above 0 to {at_most}"
            )
        return value

    def real(self, key, default=None):
        return float(self.number(key, default, 1e12, (int, float)))


@dataclass
class Config:
    """The fields of config.json that change the mathematics, under Hugging Face's names."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: dict | None = None
    tie_word_embeddings: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False  # Qwen3: queries and keys are normalised, head by head

    @classmethod
    def read(cls, path):
        """Config of the file `path`; Refused for an architecture or a setting that this file does
        not compute.
        """
        raw = read_json(path)
        # a file with both has what its maker added, rope_scaling, beside what was there
        rope = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
        if not isinstance(rope, dict):
            raise Refused(f"{path}: rope_parameters = {rope!r:.60} is not an object")
        check_settings(path, raw, rope)
        fields, rotary = Fields(path, raw), Fields(path, rope)
        positions = read_positions(fields)
        attention_bias = bool(raw.get("attention_bias"))
        return cls(
            vocab_size=fields.number("vocab_size"),
            intermediate_size=fields.number("intermediate_size"),
            num_hidden_layers=fields.number("num_hidden_layers", at_most=1024),
            max_position_embeddings=positions,
            rms_norm_eps=fields.real("rms_norm_eps", 1e-6),
            rope_theta=rotary.real("rope_theta", raw.get("rope_theta", 10000.0)),
            rope_scaling=read_scaling(rotary, positions),
            tie_word_embeddings=bool(raw.get("tie_word_embeddings")),
            qkv_bias=attention_bias or raw["model_type"] == "qwen2",
            o_bias=attention_bias,
            mlp_bias=bool(raw.get("mlp_bias")),
            qk_norm=raw["model_type"] == "qwen3",
            **read_heads(fields),
        )


def rope_kind(rope):
    return rope.get("rope_type", rope.get("type", "default"))


def check_settings(path, raw, rope):
    """Refuse, by name, what this file does not compute."""
    found = {
        "model_type": raw.get("model_type"),
        "rotary scaling": rope_kind(rope),
        "hidden_act": raw.get("hidden_act", "silu"),
        "partial_rotary_factor": rope.get(
            "partial_rotary_factor", raw.get("partial_rotary_factor", 1)
        ),
    }
    for name, value in found.items():
        if value not in COMPUTED[name]:
            only = ", ".join(map(str, COMPUTED[name]))
            raise Refused(f"{path}: {name} = {value!r:.60} is not supported, only {only}")
    method = quantised(raw.get("quantization_config"))
    if method:
        raise Refused(
            f"{path}: the weights are quantised or compressed ({method!s:.60}): dequantise first,"
            " by model.dequantize() and save_pretrained(NEW) of transformers"
        )


def quantised(settings):
    """What was done to the weights by quantization_config, None if nothing: llm-compressor writes
    one beside dense weights too, after SparseGPT, with a sparsity_config.
    """
    if not settings:
        return None
    settings = settings if isinstance(settings, dict) else {}
    sparse = settings.get("sparsity_config")
    if isinstance(sparse, dict) and not settings.get("config_groups"):
        form = sparse.get("format", "dense")
        return None if form == "dense" else form
    return settings.get("quant_method", "by an unknown method")


def read_heads(fields):
    hidden = fields.number("hidden_size")
    heads = fields.number("num_attention_heads", at_most=1024)
    kv_heads = fields.number("num_key_value_heads", heads, 1024)
    usual = 128 if fields.raw["model_type"] == "qwen3" else max(hidden // heads, 1)
    head_dim = fields.number("head_dim", usual, 4096)
    if heads % kv_heads or head_dim % 2:
        raise Refused(
            f"{fields.path}: {heads} heads, {kv_heads} key-value heads and head_dim {head_dim}"
            " do not fit together"
        )
    return {
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
    }


def read_positions(fields):
    """max_position_embeddings, or the sliding window if that is less: up to there it changes
    nothing.
    """
    raw = fields.raw
    positions = fields.number("max_position_embeddings", 2048)
    slides = raw.get("use_sliding_window", raw["model_type"] == "mistral")
    if slides and raw.get("sliding_window", 4096):  # the families' default
        positions = min(positions, fields.number("sliding_window", 4096))
    return positions


def read_scaling(rotary, positions):
    """None, {"factor"} for linear, {"factor", "low", "high", "original"} for llama3."""
    kind = rope_kind(rotary.raw)
    if kind == "default":
        return None
    scaling = {"factor": rotary.real("factor")}
    if kind == "llama3":
        scaling["low"] = rotary.real("low_freq_factor", 1.0)
        scaling["high"] = rotary.real("high_freq_factor", 4.0)
        scaling["original"] = rotary.real("original_max_position_embeddings", positions)
    return scaling


# -------------------------------------------------------------------------------------- model
def rotate(x, rotary):
    """Rotary embedding of x (B, heads, T, d): the pair (j, j + d/2) turns by the angle of its
    position and frequency.
    """
    cos, sin = rotary  # (T, d) each
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat((-second, first), -1) * sin


class Attention(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.head_dim = c.head_dim
        queries, keys = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
        self.q_proj = nn.Linear(c.hidden_size, queries, bias=c.qkv_bias)
        self.k_proj = nn.Linear(c.hidden_size, keys, bias=c.qkv_bias)
        self.v_proj = nn.Linear(c.hidden_size, keys, bias=c.qkv_bias)
        self.o_proj = nn.Linear(queries, c.hidden_size, bias=c.o_bias)
        if c.qk_norm:
            self.q_norm = nn.RMSNorm(c.head_dim, c.rms_norm_eps)
            self.k_norm = nn.RMSNorm(c.head_dim, c.rms_norm_eps)
        else:
            self.q_norm = self.k_norm = nn.Identity()

    def split(self, x):
        """(B, T, heads d) -> (B, heads, T, d)."""
        return x.view(*x.shape[:2], -1, self.head_dim).transpose(1, 2)

    def mix(self, x, rotary, cache=None):
        """Attention of x (B, T, D) up to the input of o_proj, (B, T, H d). `cache` = (keys, values,
        start) holds earlier tokens.
        """
        B, T, _ = x.shape
        q = rotate(self.q_norm(self.split(self.q_proj(x))), rotary)
        k = rotate(self.k_norm(self.split(self.k_proj(x))), rotary)
        v = self.split(self.v_proj(x))
        if cache is not None:
            keys, values, start = cache  # (B, G, room, d) each, filled up to start
            assert start == 0 or T == 1, (
                "a prompt fills an empty cache, then tokens come one by one"
            )
            keys[:, :, start : start + T] = k
            values[:, :, start : start + T] = v
            k, v = keys[:, :, : start + T], values[:, :, : start + T]
        grouped = q.shape[1] != k.shape[1]
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=T > 1, enable_gqa=grouped)
        return mixed.transpose(1, 2).reshape(B, T, -1)


class MLP(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.gate_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=c.mlp_bias)
        self.up_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=c.mlp_bias)
        self.down_proj = nn.Linear(c.intermediate_size, c.hidden_size, bias=c.mlp_bias)

    def gate(self, x):
        """SwiGLU up to the input of down_proj, (B, T, intermediate)."""
        return F.silu(self.gate_proj(x)) * self.up_proj(x)


class Block(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.input_layernorm = nn.RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.self_attn = Attention(c)
        self.post_attention_layernorm = nn.RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.mlp = MLP(c)

    def walk(self, h, rotary, cache=None):
        """The block in four steps: yields the input of q k v, of o, of gate and up, of down, each
        with the stream so far.

        Ends with (None, output). Whoever changes a Linear's weights between two steps changes what
        follows.
        """
        x = self.input_layernorm(h)
        yield x, h
        x = self.self_attn.mix(x, rotary, cache)
        yield x, h
        h = h + self.self_attn.o_proj(x)
        x = self.post_attention_layernorm(h)
        yield x, h
        x = self.mlp.gate(x)
        yield x, h
        yield None, h + self.mlp.down_proj(x)

    def forward(self, h, rotary, cache=None):
        *_, (_, h) = self.walk(h, rotary, cache)
        return h


class Llama(nn.Module):
    """Decoder-only transformer: tokens (B, T) long -> logits (B, T, V). Its parameters have Hugging
    Face's names.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.model.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.model.norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    embed = property(lambda self: self.model.embed_tokens)
    blocks = property(lambda self: self.model.layers)
    norm = property(lambda self: self.model.norm)
    head = property(lambda self: self.lm_head)

    def frequencies(self, device):
        """Turns of each pair of a head per token, in radians: (d / 2,) float32."""
        c = self.config
        exponents = torch.arange(0, c.head_dim, 2, device=device).float() / c.head_dim
        frequency = c.rope_theta**-exponents
        s = c.rope_scaling
        if s and "low" in s:  # llama3: stretch long waves, keep short ones, blend between
            turns = s["original"] * frequency / (2 * math.pi)  # in the original context
            blend = ((turns - s["low"]) / (s["high"] - s["low"])).clamp(0, 1)
            return (1 - blend) * frequency / s["factor"] + blend * frequency
        return frequency / s["factor"] if s else frequency

    def rotary(self, T, start=0):
        """cos and sin, (T, d) each, of positions start to start + T - 1, in the model's dtype."""
        like = self.embed.weight
        positions = torch.arange(start, start + T, device=like.device).float()
        angle = torch.outer(positions, self.frequencies(like.device)).repeat(1, 2)
        return angle.cos().to(like.dtype), angle.sin().to(like.dtype)

    def hidden(self, tokens, cache=None):
        """Final hidden states (B, T, D) of tokens (B, T): what the head reads. `cache` as made by
        `generate`.
        """
        start = cache[0][2] if cache else 0
        rotary = self.rotary(tokens.shape[1], start)
        h = self.embed(tokens)
        for i, block in enumerate(self.blocks):
            h = block(h, rotary, cache[i] if cache else None)
        return self.norm(h)

    def forward(self, tokens):
        return self.head(self.hidden(tokens))


# --------------------------------------------------------------------------------- generation
@torch.inference_mode()
def generate(model, tokens, count, temperature=0.0, seed=0):
    """Yield up to `count` token ids that follow `tokens` (list of int): the likeliest each time, or
    drawn at `temperature`.

    Refused when prompt and answer do not fit into max_position_embeddings.
    """
    c, like, room = model.config, model.embed.weight, len(tokens) + count
    if not tokens or room > c.max_position_embeddings:
        raise Refused(
            f"a prompt of {len(tokens)} and {count} new tokens: this model has 1 to"
            f" {c.max_position_embeddings} positions"
        )
    generator = torch.Generator().manual_seed(seed)
    shape = (2, c.num_hidden_layers, 1, c.num_key_value_heads, room, c.head_dim)
    keys, values = torch.empty(shape, dtype=like.dtype, device=like.device)
    start, step = 0, send(torch.tensor([tokens]), like.device)
    for _ in range(count):
        h = model.hidden(step, [(k, v, start) for k, v in zip(keys, values)])
        logits = model.head(h[:, -1]).float()[0].cpu() / (temperature or 1)
        if not logits.isfinite().all():
            raise Refused(
                f"the model's logits are NaN or infinite (computed in {like.dtype},"
                f" at temperature {temperature})"
            )
        token = logits.argmax()
        if temperature > 0:
            token = torch.multinomial(logits.softmax(-1), 1, generator=generator)
        yield int(token)
        start += step.shape[1]
        # filled there by a kernel: a tensor of numbers would be a second wait for the device
        step = torch.full((1, 1), int(token), device=like.device)
