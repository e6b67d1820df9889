"""
A Llama in plain PyTorch: read a Hugging Face folder, run it, write it back bit for bit.

Source    Llama 2 and 3 (arXiv 2307.09288, 2407.21783); weight names and the half-split rotary layout are Hugging Face's,
          so that loading is one checked copy and nothing is permuted.
Reading   1 of 6. Next: eval.py. Imports packed.py alone, which can be skipped at first.
Shapes    B sequences, T tokens, D model width, H query heads, G key-value heads, d head width, V vocabulary.
Not here  training code (tiny/make.py has it), quantised weights, sliding-window attention, any rotary scaling but linear and llama3.

Laptop    python llama.py --prompt "import os" --tokens 64              (2 s; the text streams)
Full      python llama.py --model ~/Llama-2-7b-hf --prompt "..." --temperature 0.8
"""
import argparse
import itertools
import json
import math
import os
import shutil
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from packed import dense_name, pack, unpack

TINY = Path(__file__).resolve().parent / "tiny"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


# ---------------------------------------------------------------------------------------------------------------- model
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

    @classmethod
    def read(cls, path):
        """Config of the file `path`; ValueError for an architecture or a setting that this file does not compute."""
        raw = read_json(path)
        rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
        if not isinstance(rope, dict):
            raise ValueError(f"{path}: rope_parameters = {rope!r:.60} is not an object")
        kind = rope.get("rope_type", rope.get("type", "default"))
        for name, value, computed in (
                ("model_type", raw.get("model_type"), ("llama", "mistral", "qwen2")), ("rotary scaling", kind, ("default", "linear", "llama3")),
                ("hidden_act", raw.get("hidden_act", "silu"), ("silu",)), ("partial_rotary_factor", rope.get("partial_rotary_factor", 1), (1,)),
                ("quantization_config", raw.get("quantization_config"), (None,))):
            if value not in computed:
                raise ValueError(f"{path}: {name} = {value!r:.60} is not supported, only {', '.join(map(str, computed))}")

        def number(key, default=None, at_most=2**24, where=raw, types=(int,)):
            value = default if where.get(key) is None else where[key]
            if type(value) not in types or not 0 < value <= at_most:
                raise ValueError(f"{path}: {key} = {value!r:.60} is not a number of this kind from above 0 to {at_most}")
            return value

        def real(key, default, where=raw):
            return float(number(key, default, 1e12, where, (int, float)))

        hidden, heads = number("hidden_size"), number("num_attention_heads", at_most=1024)
        kv_heads, head_dim = number("num_key_value_heads", heads, 1024), number("head_dim", max(hidden // heads, 1), 4096)
        if heads % kv_heads or head_dim % 2:
            raise ValueError(f"{path}: {heads} heads, {kv_heads} key-value heads and head_dim {head_dim} do not fit together")
        positions, family, scaling = number("max_position_embeddings", 2048), raw["model_type"], None
        if raw.get("sliding_window") and raw.get("use_sliding_window", family == "mistral"):
            positions = min(positions, number("sliding_window"))       # up to there, a sliding window changes nothing
        if kind != "default":
            scaling = {"factor": real("factor", None, rope)}
        if kind == "llama3":
            scaling.update(low=real("low_freq_factor", 1.0, rope), high=real("high_freq_factor", 4.0, rope),
                           original=real("original_max_position_embeddings", positions, rope))
        bias = bool(raw.get("attention_bias"))
        return cls(number("vocab_size"), hidden, number("intermediate_size"), number("num_hidden_layers", at_most=1024), heads, kv_heads,
                   head_dim, positions, real("rms_norm_eps", 1e-6), real("rope_theta", raw.get("rope_theta", 10000.0), rope), scaling,
                   bool(raw.get("tie_word_embeddings")), bias or family == "qwen2", bias, bool(raw.get("mlp_bias")))


def rotate(x, rotary):
    """Rotary embedding of x (B, heads, T, d): the pair (j, j + d/2) turns by the angle of its position and frequency."""
    cos, sin = rotary                                                  # (T, d) each
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat((-second, first), -1) * sin


class Attention(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.head_dim = c.head_dim
        self.q_proj = nn.Linear(c.hidden_size, c.num_attention_heads * c.head_dim, bias=c.qkv_bias)
        self.k_proj = nn.Linear(c.hidden_size, c.num_key_value_heads * c.head_dim, bias=c.qkv_bias)
        self.v_proj = nn.Linear(c.hidden_size, c.num_key_value_heads * c.head_dim, bias=c.qkv_bias)
        self.o_proj = nn.Linear(c.num_attention_heads * c.head_dim, c.hidden_size, bias=c.o_bias)

    def mix(self, x, rotary, cache=None):
        """Attention of x (B, T, D) up to the input of o_proj, (B, T, H d). `cache` = (keys, values, start) holds earlier tokens."""
        B, T, _ = x.shape
        q, k, v = (p(x).view(B, T, -1, self.head_dim).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
        q, k = rotate(q, rotary), rotate(k, rotary)
        if cache is not None:
            keys, values, start = cache                                # (B, G, room, d) each, filled up to start
            assert start == 0 or T == 1, "a prompt fills an empty cache, then tokens come one by one"
            keys[:, :, start:start + T], values[:, :, start:start + T] = k, v
            k, v = keys[:, :, :start + T], values[:, :, :start + T]
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=T > 1, enable_gqa=q.shape[1] != k.shape[1])
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
        self.input_layernorm, self.self_attn = nn.RMSNorm(c.hidden_size, c.rms_norm_eps), Attention(c)
        self.post_attention_layernorm, self.mlp = nn.RMSNorm(c.hidden_size, c.rms_norm_eps), MLP(c)

    def forward(self, h, rotary, cache=None):
        h = h + self.self_attn.o_proj(self.self_attn.mix(self.input_layernorm(h), rotary, cache))
        return h + self.mlp.down_proj(self.mlp.gate(self.post_attention_layernorm(h)))


class Llama(nn.Module):
    """Decoder-only transformer: tokens (B, T) long -> logits (B, T, V). Its parameters have Hugging Face's names."""
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
    head = property(lambda self: self.lm_head)

    def rotary(self, T, start=0):
        """cos and sin, (T, d) each, of positions start to start + T - 1, in the model's dtype."""
        c, like = self.config, self.embed.weight
        frequency = c.rope_theta ** -(torch.arange(0, c.head_dim, 2, device=like.device).float() / c.head_dim)
        if c.rope_scaling and "low" in c.rope_scaling:                 # llama3: stretch long waves, keep short ones, blend between
            s, waves = c.rope_scaling, c.rope_scaling["original"] * frequency / (2 * math.pi)      # turns in the original context
            blend = ((waves - s["low"]) / (s["high"] - s["low"])).clamp(0, 1)
            frequency = (1 - blend) * frequency / s["factor"] + blend * frequency
        elif c.rope_scaling:
            frequency = frequency / c.rope_scaling["factor"]
        angle = torch.outer(torch.arange(start, start + T, device=like.device).float(), frequency).repeat(1, 2)
        return angle.cos().to(like.dtype), angle.sin().to(like.dtype)

    def hidden(self, tokens, cache=None):
        """Final hidden states (B, T, D) of tokens (B, T): what the head reads. `cache` as made by `generate`."""
        start = cache[0][2] if cache else 0
        rotary, h = self.rotary(tokens.shape[1], start), self.embed(tokens)
        for i, block in enumerate(self.blocks):
            h = block(h, rotary, cache[i] if cache else None)
        return self.model.norm(h)

    def forward(self, tokens):
        return self.head(self.hidden(tokens))


# ------------------------------------------------------------------------------------------------------------ tokenizer
class Tokenizer:
    """Text to token ids and back: `tokenizer.model` by sentencepiece, else `tokenizer.json` by the optional package tokenizers."""

    def __init__(self, folder, vocab_size):
        folder, config = Path(folder), read_json(Path(folder) / "config.json")
        settings = read_json(folder / "tokenizer_config.json") if (folder / "tokenizer_config.json").exists() else {}
        try:
            if (folder / "tokenizer.model").exists():
                import sentencepiece
                sp = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
                self.batch, size, adds_bos, self.bos_id, self.eos_id = sp.encode, sp.get_piece_size(), True, sp.bos_id(), sp.eos_id()
                self.decode = lambda ids: sp.decode([i for i in ids if i < size])          # a model may have more tokens
            else:
                import tokenizers
                fast = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
                fast.no_truncation()                                   # this and padding can be set in the file, for training
                fast.no_padding()
                self.batch = lambda texts: [e.ids for e in fast.encode_batch(texts, add_special_tokens=False)]
                self.decode = lambda ids: fast.decode(ids, skip_special_tokens=False)
                self.bos_id, self.eos_id = config.get("bos_token_id"), config.get("eos_token_id")
                size, adds_bos = max(fast.get_vocab(with_added_tokens=True).values()) + 1, fast.encode("a").ids[:1] == [self.bos_id]
        except ImportError as error:
            raise ValueError(f"the tokenizer of {folder} needs one more package: pip install {error.name}") from None
        except Exception as error:          # both libraries raise what they like, a bare Exception included, on a broken file
            raise ValueError(f"{folder} has no tokenizer.model or tokenizer.json that can be read: {first_line(error)}") from None
        if size > vocab_size:
            raise ValueError(f"the tokenizer of {folder} has {size} tokens, its model only {vocab_size}: they do not belong together")
        self.eos_id = self.eos_id[0] if isinstance(self.eos_id, list) and self.eos_id else self.eos_id
        for name, token in (("bos_token_id", self.bos_id), ("eos_token_id", self.eos_id)):
            if token is not None and not (type(token) is int and -1 <= token < vocab_size):
                raise ValueError(f"{folder}: {name} = {token!r:.60} is none of the model's {vocab_size} tokens")
        self.adds_bos = bool(settings.get("add_bos_token", adds_bos)) and self.bos_id is not None and self.bos_id >= 0

    def encode(self, text):
        """Token ids of a text; of a list of texts, over all cores, a list of them. ValueError for what is no text, as half a surrogate pair."""
        try:
            return self.batch(text) if isinstance(text, list) else self.batch([text])[0]
        except Exception as error:
            raise ValueError(f"the tokenizer cannot encode this text: {first_line(error)}") from None


# -------------------------------------------------------------------------------------------------------- reading, writing
def first_line(error):
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]


def read_json(path):
    """The JSON object in the file `path`; ValueError, naming the file, when there is none."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is missing or not readable JSON: {first_line(error)}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds no JSON object")
    return value


def open_weights(path):
    try:
        f = safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is not a readable safetensors file: {first_line(error)}") from None
    if (f.metadata() or {}).get("unicuco_packed", "1") != "1":
        raise ValueError(f"{path} is packed in a version that this code does not read")
    return f


def weight_files(folder):
    """{file: {tensor: (shape, dtype)}} of a checkpoint folder, weights unread; ValueError where index and shards disagree."""
    index, single = Path(folder) / "model.safetensors.index.json", Path(folder) / "model.safetensors"
    for path in Path(folder).glob("*"):
        if path.exists() and not (path.is_file() or path.is_dir()):            # opening a pipe would wait for ever
            raise ValueError(f"{path} is neither a file nor a folder")
    if not (index.exists() or single.exists()):
        raise ValueError(f"{folder} holds neither {single.name} nor {index.name}")
    promised = read_json(index).get("weight_map") if index.exists() else {}
    if not (isinstance(promised, dict) and all(isinstance(v, str) and Path(v).name == v and v.endswith(".safetensors") and v.isprintable()
                                               for v in promised.values())):
        raise ValueError(f"{index}: weight_map does not map tensor names to files of this folder")
    files = {}
    for path in sorted({index.with_name(v) for v in promised.values()}) if index.exists() else [single]:
        with open_weights(path) as f:
            files[path] = {name: (tuple(f.get_slice(name).get_shape()), f.get_slice(name).get_dtype()) for name in f.keys()}
        wrong = set(map(dense_name, files[path])) ^ {name for name, v in promised.items() if v == path.name}
        if index.exists() and wrong:
            raise ValueError(f"{path} and the index disagree about the tensor {min(wrong)!r:.200}")
    return files


def check_tensors(folder, files, expected):
    """Compare headers with expected {name: shape}, before anything is allocated; ValueError by name."""
    floats, missing = ("F16", "BF16", "F32"), set(expected)
    for path, tensors in files.items():
        for name, (shape, dtype) in tensors.items():
            if name.endswith("rotary_emb.inv_freq") and dtype in floats:       # old Llama 2 files carry it; it is computed here
                continue
            owner = dense_name(name)
            right, dtypes = expected.get(owner), floats
            half = owner != name and not {owner + ".mask", owner + ".kept"} <= tensors.keys()
            if right is None or half or owner != name and len(right) != 2 or owner not in missing and not name.endswith(".kept"):
                raise ValueError(f"{path}: tensor {name!r:.200} does not belong to this model, or is there twice or in half")
            if name.endswith(".mask"):
                right, dtypes = (right[0], -(-right[-1] // 8)), ("U8",)
            elif name.endswith(".kept"):
                right = shape[:1]
            if shape != right or dtype not in dtypes:
                raise ValueError(f"{path}: tensor {name} has shape {shape!s:.60} and dtype {dtype}, not {right} and {' or '.join(dtypes)}")
            missing -= set() if name.endswith(".kept") else {owner}
    if missing:
        raise ValueError(f"{folder}: tensor {min(missing)} is missing")


def read_tensors(path, names, d_in):
    """Yield (name, tensor) of the file `path`, memory-mapped, packed matrices unpacked; d_in: {name: columns}."""
    with open_weights(path) as f:
        for name in names:
            if name.endswith(".mask"):
                yield name[:-5], unpack(f.get_tensor(name), f.get_tensor(name[:-5] + ".kept"), d_in[name[:-5]], name)
            elif not name.endswith(".kept"):
                yield name, f.get_tensor(name)


def load_llama(path, device="cpu", dtype=torch.float32):
    """Read a Hugging Face folder -> (Llama, Tokenizer), weights cast to `dtype` on `device`, one tensor at a time.

    The folder holds config.json; model.safetensors, or shards with an index, plain or packed; tokenizer.model or tokenizer.json.
    raises ValueError, in one line, for whatever does not fit: a missing, extra or misshapen tensor is named.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder (a model is a folder with config.json, model.safetensors and a tokenizer)")
    files, config = weight_files(folder), Config.read(folder / "config.json")
    if config.num_hidden_layers * 9 > sum(map(len, files.values())):
        raise ValueError(f"{folder} has {sum(map(len, files.values()))} tensors, too few for {config.num_hidden_layers} blocks")
    with torch.device("meta"):
        model = Llama(config)
    shapes = {name: tuple(p.shape) for name, p in model.state_dict().items()}
    tied = "lm_head.weight" if config.tie_word_embeddings else ""      # some tied checkpoints carry the copy, most do not
    check_tensors(folder, files, {n: s for n, s in shapes.items() if n != tied or any(n in names for names in files.values())})
    tokenizer = Tokenizer(folder, config.vocab_size)
    for file, names in files.items():
        for name, tensor in read_tensors(file, names, {n: s[-1] for n, s in shapes.items()}):
            if name not in shapes or name == tied:
                continue
            if not all(map(math.isfinite, tensor.aminmax())):          # NaN goes through both; nothing is allocated
                raise ValueError(f"{file}: tensor {name} holds NaN or infinite weights")
            owner, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(owner), leaf, nn.Parameter(tensor.to(device, dtype, copy=True), requires_grad=False))
            del tensor                                                 # the last one would keep the whole shard in memory
    if tied:
        model.lm_head.weight = model.model.embed_tokens.weight
    return model.eval(), tokenizer


def save_llama(model, folder, source, masks=None, packed=False):
    """Write `model` in the layout of the folder `source`, tokenizer files included, loadable by transformers unchanged.

    Values come from the source's files in the source's dtype, tensor by tensor: a surviving weight is bit-identical to the
    source's, a pruned one is +0.0, whatever dtype was computed in.
    masks     {parameter name: bool (d_out, d_in), True = kept}; None: what is +0.0 in the model and not in the source is pruned
    packed    pruned matrices as NAME.mask and NAME.kept, see `pack`: load_llama reads it, other tools do not
    """
    folder, source = Path(folder), Path(source)
    if folder.resolve() == source.resolve():
        raise ValueError(f"{folder} cannot be written while it is read: save to another folder")
    folder.mkdir(parents=True, exist_ok=True)
    live = dict(model.named_parameters())
    for path, names in weight_files(source).items():
        tensors = {}
        for name, value in read_tensors(path, names, {n: p.shape[-1] for n, p in live.items()}):
            kept = None if masks is None else masks.get(name)
            if masks is None and name.endswith("_proj.weight"):
                weight = live[name].detach().cpu()
                kept = (weight != 0) | weight.signbit() | (value.to(weight.dtype) == 0)
            if kept is None:
                tensors[name] = value
            elif packed:
                tensors[name + ".mask"], tensors[name + ".kept"] = pack(value, kept.cpu())
            else:
                tensors[name] = torch.where(kept.cpu(), value, torch.zeros((), dtype=value.dtype))
        save_file(tensors, folder / path.name, {"format": "pt", "unicuco_packed": "1"} if packed else {"format": "pt"})
        (folder / path.name).chmod(0o644)
    for path in source.iterdir():
        if path.suffix in (".json", ".model", ".txt", ".jinja") and path.name != "strategy.json" and path.is_file():
            shutil.copyfile(path, folder / path.name)


# ----------------------------------------------------------------------------------------------------------- generation
@torch.inference_mode()
def generate(model, tokens, count, temperature=0.0, seed=0):
    """Yield up to `count` token ids that follow `tokens` (list of int): the likeliest each time, or drawn at `temperature`.

    raises ValueError when prompt and answer do not fit into max_position_embeddings.
    """
    c, like, room = model.config, model.embed.weight, len(tokens) + count
    if not tokens or room > c.max_position_embeddings:
        raise ValueError(f"a prompt of {len(tokens)} and {count} new tokens: this model has 1 to {c.max_position_embeddings} positions")
    generator = torch.Generator().manual_seed(seed)
    keys, values = torch.empty(2, c.num_hidden_layers, 1, c.num_key_value_heads, room, c.head_dim, dtype=like.dtype, device=like.device)
    start, step = 0, torch.tensor([tokens], device=like.device)
    for _ in range(count):
        h = model.hidden(step, [(k, v, start) for k, v in zip(keys, values)])
        logits = model.head(h[:, -1]).float()[0].cpu() / (temperature or 1)
        if not logits.isfinite().all():
            raise ValueError(f"the model's logits are NaN or infinite (computed in {like.dtype}, at temperature {temperature})")
        token = int(torch.multinomial(logits.softmax(-1), 1, generator=generator) if temperature > 0 else logits.argmax())
        yield token
        start, step = start + step.shape[1], torch.tensor([[token]], device=like.device)


def stream(model, tokenizer, prompt, count, temperature=0.0, seed=0):
    """Yield the text that follows `prompt`, piece by piece, whole characters only; ends at the end-of-text token."""
    ids = [tokenizer.bos_id] * tokenizer.adds_bos + tokenizer.encode(prompt)
    shown = len(tokenizer.decode(ids))
    for token in generate(model, ids or [tokenizer.bos_id or 0], count, temperature, seed):
        if token == tokenizer.eos_id:
            return
        ids.append(token)
        text = tokenizer.decode(ids)
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):             # half of a multi-byte character waits for the rest
            yield text[shown:]
            shown = len(text)


# ------------------------------------------------------------------------------------------------------------ command line
class Parser(argparse.ArgumentParser):
    """argparse with examples first, defaults shown, and one line on stderr for a bad argument."""
    def __init__(self, doc, examples):
        super().__init__(description="\n  ".join(["examples:", *examples]) + "\n\n" + doc.strip().splitlines()[0], usage="%(prog)s [options]",
                         formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=30, width=118))

    error = lambda self, message: fail(message)


def add_model(parser):
    """The options that every script shares."""
    parser.add_argument("--model", type=Path, default=TINY, metavar="DIR", help="Hugging Face folder (default: the embedded tiny model)")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1 (default: cuda if there is one)")
    parser.add_argument("--dtype", default="auto", choices=["auto", *DTYPES], help="compute dtype (default: by device, printed)")


def choose_device(device="auto", dtype="auto"):
    """(device, dtype, reason): CUDA in bfloat16 if there is one, else the CPU in bfloat16 where it multiplies bfloat16 fast."""
    reason = "as asked" if device != "auto" else "a GPU is there" if torch.cuda.is_available() else "no GPU"
    try:
        device = torch.device(device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu")
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {device}: {first_line(error)}") from None
    able = getattr(torch.cpu, "get_capabilities", dict)() if device.type == "cpu" else {"avx512_bf16": True}
    fast = able.get("avx512_bf16") or able.get("amx_bf16")
    if device.type == "cpu" and dtype == "auto":
        reason += f", bfloat16 units {'found' if fast else 'not found'}"
    return device, DTYPES[dtype] if dtype != "auto" else torch.bfloat16 if fast else torch.float32, reason


def fail(message):
    """One line on stderr, then the exit code of bad input."""
    print(f"{Path(sys.argv[0]).name}: {' '.join(str(message).split())}", file=sys.stderr)
    sys.exit(2)


def run(main, hint=""):
    """Run a script: bad input is one line on stderr and exit code 2, Ctrl-C one line with a hint and 130, a closed pipe no error."""
    try:
        main()
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        print(f"\ninterrupted{hint}", file=sys.stderr)
        sys.exit(130)
    except (ValueError, OSError, SafetensorError) as error:          # the last: a full disk while weights are written
        fail(error)


def main():
    p = Parser(__doc__, ['python llama.py --prompt "import os"', 'python llama.py --model DIR --prompt "Once" --temperature 0.8 --seed 1',
                         'python llama.py --compare tiny out/tiny-0.5 --prompt "def main():"'])
    add_model(p)
    p.add_argument("--prompt", default="import os\n", help="text to go on from")
    p.add_argument("--tokens", type=int, default=64, metavar="N", help="how many tokens to write (64)")
    p.add_argument("--temperature", type=float, default=0.0, help="0 takes the likeliest token (0)")
    p.add_argument("--seed", type=int, default=0, help="of the draws (0)")
    p.add_argument("--compare", type=Path, nargs=2, metavar="DIR", help="show what two models write, side by side")
    a = p.parse_args()
    if a.tokens < 1 or not a.temperature >= 0:
        raise ValueError("--tokens must be at least 1 and --temperature at least 0")
    device, dtype, reason = choose_device(a.device, a.dtype)
    if a.compare:
        columns, width = [], max(shutil.get_terminal_size().columns // 2 - 2, 20)
        for folder in a.compare:
            text = a.prompt + "".join(stream(*load_llama(folder, device, dtype), a.prompt, a.tokens, a.temperature, a.seed))
            columns.append([str(folder), "", *(w for line in text.splitlines() for w in textwrap.wrap(line, width, drop_whitespace=False) or [""])])
        for left, right in itertools.zip_longest(*columns, fillvalue=""):
            print(f"{left:<{width}} | {right}".rstrip())
        return
    model, tokenizer = load_llama(a.model, device, dtype)
    print(f"{device}, {str(dtype)[6:]} ({reason})", file=sys.stderr)
    print(a.prompt, end="")
    for piece in stream(model, tokenizer, a.prompt, a.tokens, a.temperature, a.seed):
        print(piece, end="", flush=True)
    print()


if __name__ == "__main__":
    run(main)
