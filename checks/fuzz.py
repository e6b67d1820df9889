"""
Broken files of every kind into every reader: each input ends in success, or in a ValueError of one
line.

Inputs    bytes flipped, cut, moved and copied; JSON (config, index, tokenizer, safetensors headers)
          with keys, types and sizes changed;
          Hypothesis values for requests, texts and config fields. What loads is also run, saved
          plain and packed, and loaded again.
Watched   other exceptions, longer messages, words on stderr, crashes of the interpreter, LIMIT
          seconds for one input, ROOM bytes of
          address space beyond the start, files opened for writing or left outside the scratch
          folder.
How       a worker process makes input i from (seed, i) and says so before it reads it; it is
          started anew only after a crash or a hang.

Run       python -m checks.fuzz --count 10000 --hypothesis 300         (100 s of processor time)
          python -m checks.fuzz                                        (all, 21,500 inputs: 253 s)
          python -m checks.fuzz --first 4711 --count 1 --keep failing     (one input again, its
          files kept when it fails)
"""

import argparse
import copy
import io
import json
import os
import random
import resource
import select
import shutil
import struct
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

LIMIT = 10  # seconds for one input, at least half of them of processor time
ROOM = 2**30  # bytes of address space that a worker may add to what it starts with
FIELDS = dict(
    model_type="llama",
    vocab_size=320,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=8,
    max_position_embeddings=64,
    rms_norm_eps=1e-5,
    hidden_act="silu",
    tie_word_embeddings=True,
    rope_theta=10000.0,
    rope_scaling={
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
    attention_bias=False,
    mlp_bias=False,
    bos_token_id=1,
    eos_token_id=[2, 5],
    sliding_window=None,
)
TEXT = "".join(
    f"def f{i}(x, y):\n    return x * {i} + y  # {'the quick brown fox'[i % 19 :]}\n"
    for i in range(200)
)
DEEP = json.loads("[" * 150 + "]" * 150)
ODD = (
    None,
    True,
    False,
    -1,
    0,
    1,
    2,
    3,
    7,
    2**16,
    2**31,
    2**53,
    2**63 - 1,
    2**64,
    10**30,
    10**400,
    0.5,
    -0.0,
    1e-300,
    1e308,
    float("inf"),
    float("nan"),
    "",
    "1",
    "x" * 5000,
    "a\nb",
    "\x1b[2J",
    "\ud800",
    "\0",
    "é",
    ".",
    "..",
    "../up",
    "/absolute",
    "config.json",
    [],
    [[]],
    [1],
    {},
    {"a": 1},
    [None, "x"],
    [2**40, 2**40],
    DEEP,
)


# ------------------------------------------------------------------------------ good files
def make_folders(root):
    """Good inputs {kind: {file name: bytes}}, the same in every process: model folders plain,
    sharded, packed and with tokenizer.json;
    a StratNet, requests, texts. The largest file is 70 KB."""
    import sentencepiece
    import torch
    from safetensors.torch import save_file

    from llama import Config, Llama, load_llama, save_llama
    from unicuco import Layout, Scale, StratNet, Trained, save_stratnet

    torch.manual_seed(0)
    spm = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT.splitlines()),
        model_writer=spm,
        vocab_size=300,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        hard_vocab_limit=False,
        num_threads=1,
        minloglevel=2,
    )
    plain = root / "plain"
    plain.mkdir(parents=True)
    (plain / "config.json").write_text(json.dumps(FIELDS))
    (plain / "tokenizer.model").write_bytes(spm.getvalue())
    (plain / "tokenizer_config.json").write_text(
        json.dumps({"add_bos_token": True, "bos_token": "<s>"})
    )
    model = Llama(Config.read(plain / "config.json"))
    weights = {n: p.detach().half() for n, p in model.named_parameters()}
    save_file(weights, plain / "model.safetensors", {"format": "pt"})
    model, _ = load_llama(plain)
    masks = {
        n: torch.rand(p.shape) < 0.5
        for n, p in model.named_parameters()
        if n.endswith("_proj.weight")
    }
    save_llama(model, root / "packed", plain, masks, packed=True)
    shutil.copytree(plain, root / "sharded")
    (root / "sharded" / "model.safetensors").unlink()
    files = {n: f"model-{1 + i % 2}-of-2.safetensors" for i, n in enumerate(sorted(weights))}
    for file in set(files.values()):
        save_file(
            {n: w for n, w in weights.items() if files[n] == file},
            root / "sharded" / file,
            {"format": "pt"},
        )
    (root / "sharded" / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": 1}, "weight_map": files})
    )
    try:
        import tokenizers
    except ImportError:
        shutil.copytree(plain, root / "fast")
    else:
        shutil.copytree(plain, root / "fast", ignore=shutil.ignore_patterns("tokenizer.model"))
        fast = tokenizers.Tokenizer(tokenizers.models.BPE(byte_fallback=True))
        fast.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=300,
            special_tokens=["<unk>", "<s>", "</s>"],
            show_progress=False,
            initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        )
        fast.train_from_iterator(TEXT.splitlines(), trainer)
        fast.save(str(root / "fast" / "tokenizer.json"))
    (root / "stratnet").mkdir()
    save_stratnet(
        root / "stratnet" / "stratnet.safetensors",
        Trained(
            StratNet(1),
            Layout(1),
            Scale(-5.0, 1.0),
            torch.rand(4, 1) * 0.9,
            torch.rand(4),
            None,
            {"mean": "blocks", "seed": 0},
        ),
    )
    (root / "requests").mkdir()
    (root / "requests" / "wishes.jsonl").write_text(
        '{"name": "phone", "max_size": "7MB"}\n{"max_kl": 0.02}\n'
        '{"sparsity": "0.5"}\n{"preference": 1}\n'
    )
    (root / "text").mkdir()
    (root / "text" / "a.txt").write_text(TEXT[:3000] + "é漢🎈")
    (root / "text" / "a.raw").write_text(" \n = A = \n \n text\n" + TEXT[:1000])
    (root / "text" / "a.jsonl").write_text(
        "".join(json.dumps({"text": line, "url": None}) + "\n" for line in TEXT.splitlines()[:40])
    )
    return {
        folder.name: {p.name: p.read_bytes() for p in sorted(folder.iterdir())}
        for folder in sorted(root.iterdir())
    }


# ------------------------------------------------------------------------------- mutations
def mutate_bytes(raw, r):
    """1 to 4 edits; half of them within the first 400 bytes, where headers are."""
    raw = bytearray(raw)
    for _ in range(r.choice((1, 1, 2, 4))):
        end = min(len(raw), 400) if r.random() < 0.5 else len(raw)
        i, n = r.randrange(end + 1), r.choice((1, 2, 8, 64, 1000))
        edit = r.randrange(7)
        if edit == 0 and i < len(raw):
            raw[i] ^= 1 << r.randrange(8)
        elif edit == 1:
            raw[i : i + n] = r.randbytes(n)
        elif edit == 2:
            del raw[i:]
        elif edit == 3:
            del raw[i : i + n]
        elif edit == 4:
            raw[i:i] = raw[i : i + n] * r.choice((1, 1, 50))
        elif edit == 5:
            raw[i : i + 8] = struct.pack(
                "<Q", r.choice((0, 1, 2**31, 2**32, 2**63, 2**64 - 1, len(raw)))
            )
        else:
            raw[i : i + 2] = r.choice(
                (b"\x00\x7c", b"\x00\x7e", b"\xff\xff", b"\n\n", b'""', b"{}", b"[" * 10**5)
            )  # float16 inf and NaN, marks of JSON
    return bytes(raw)


def places(value):
    """(container, key) of everything inside a JSON value."""
    for key, inner in (
        list(value.items())
        if isinstance(value, dict)
        else list(enumerate(value))
        if isinstance(value, list)
        else ()
    ):
        yield value, key
        yield from places(inner)


def mutate_json(value, r):
    """1 to 3 keys or items replaced by something odd, deleted, renamed, copied, scaled; sometimes
    the whole value.
    """
    value = copy.deepcopy(value)
    for _ in range(r.choice((1, 1, 1, 2, 3))):
        spots = list(places(value))
        if not spots or r.random() < 0.02:
            return copy.deepcopy(r.choice(ODD))
        where, key = r.choice(spots)
        edit, old = r.randrange(8), where[key]
        if edit <= 2:
            where[key] = copy.deepcopy(r.choice(ODD))
        elif edit == 3:
            del where[key]
        elif edit == 4 and isinstance(where, dict):
            where[
                r.choice(
                    (
                        key + ".mask",
                        key + ".kept",
                        key.removesuffix(".mask").removesuffix(".kept"),
                        key + "\n",
                        "",
                        "../" + key,
                    )
                )
            ] = old
            if r.random() < 0.7:
                where.pop(key, None)
        elif edit == 5:
            other, key_ = r.choice(spots)
            where[key] = copy.deepcopy(other[key_]) if r.random() < 0.5 else [old]
        elif edit == 6 and type(old) in (int, float) and abs(old) < 2**64:
            where[key] = r.choice((old + 1, old - 1, old * 2, -old, old * 1000, old / 3, str(old)))
        elif isinstance(old, str):
            where[key] = r.choice(
                (
                    "F64",
                    "I8",
                    "U8",
                    "BF16",
                    "F32",
                    "F8_E4M3",
                    "F4",
                    "BOOL",
                    "C64",
                    "I64",
                    "llama3",
                    "linear",
                    "qwen2",
                    "mistral",
                    "yarn",
                    "model-1-of-2.safetensors",
                    "blocks",
                    old + "\n",
                    old.upper(),
                )
            )
    return value


def mutate_safetensors(raw, r):
    """The header as JSON with something changed, its length honest most of the time."""
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    if r.random() < 0.3 and "about" in header.get("__metadata__", {}):
        header["__metadata__"]["about"] = json.dumps(
            mutate_json(json.loads(header["__metadata__"]["about"]), r)
        )
    elif (
        r.random() < 0.3
    ):  # a lie that the format allows: other names, types and shapes of the same bytes
        name = r.choice([n for n in header if n != "__metadata__"])
        t = header[name]
        size = t["data_offsets"][1] - t["data_offsets"][0]
        width = r.choice((1, 1, 2, 4, 8))
        if size % width == 0:
            t["dtype"], t["shape"] = (
                {
                    1: "U8",
                    2: r.choice(("F16", "BF16", "I16")),
                    4: r.choice(("F32", "I32")),
                    8: "F64",
                }[width],
                [size // width],
            )
        if r.random() < 0.5:
            t["shape"] = r.choice(([1, *t["shape"]], [*t["shape"], 1], t["shape"][::-1]))
        owner = name.removesuffix(".mask").removesuffix(".kept")
        header[
            r.choice(
                (
                    name,
                    owner,
                    owner + ".mask",
                    owner + ".kept",
                    "model.layers.0.self_attn.rotary_emb.inv_freq",
                    "model.layers.0.self_attn.rotary_emb.inv_freq.mask",
                    r.choice(list(header)),
                )
            )
        ] = header.pop(name)
    else:
        header = mutate_json(header, r)
    text = json.dumps(header).encode()
    length = len(text) if r.random() < 0.95 else r.choice((0, len(text) - 1, len(text) + 1, 2**40))
    return struct.pack("<Q", length) + text + raw[8 + struct.unpack("<Q", raw[:8])[0] :]


def mutate_tensors(raw, r):
    """A well-formed file of the wrong tensors: cast, turned, filled, packed, renamed, copied,
    dropped, or strange ones beside them.
    """
    import safetensors.torch
    import torch

    from llama import pack

    tensors = safetensors.torch.load(raw)
    for _ in range(r.choice((1, 1, 2))):
        name = r.choice(sorted(tensors))
        t, edit = tensors[name], r.randrange(8)
        if edit == 0:
            tensors[name] = t.to(
                r.choice(
                    (
                        torch.float64,
                        torch.float32,
                        torch.bfloat16,
                        torch.int64,
                        torch.uint8,
                        torch.bool,
                        torch.complex64,
                        torch.float8_e4m3fn,
                    )
                )
            )
        elif edit == 1:
            tensors[name] = r.choice(
                (
                    t.T.contiguous() if t.ndim == 2 else t[None],
                    t[:-1].clone(),
                    t.flatten(),
                    t[:0].clone(),
                    t[..., None],
                )
            )
        elif edit == 2 and t.is_floating_point():
            tensors[name] = torch.full_like(
                t, r.choice((0, 1e4, 6e4, float("nan"), float("inf"), -float("inf")))
            )
        elif edit == 3:  # a vector too, as if it were a square matrix
            W = (
                t
                if t.ndim == 2
                else torch.zeros(len(t), len(t))
                if t.ndim == 1 and len(t) < 999
                else torch.zeros(3, 3)
            )
            tensors[name + ".mask"], tensors[name + ".kept"] = pack(
                W, torch.rand(W.shape) < r.random()
            )
            if r.random() < 0.8:
                del tensors[name]
        elif edit == 4:
            owner = name.removesuffix(".mask").removesuffix(".kept")
            tensors[
                r.choice(
                    (
                        owner,
                        owner + ".mask",
                        owner + ".kept",
                        owner + ".kept.mask",
                        r.choice(sorted(tensors)),
                        "lm_head.weight",
                        "",
                    )
                )
            ] = t.clone()
        elif edit == 5:
            del tensors[name]
        elif edit == 6:
            odd = r.choice(
                (
                    torch.rand(4),
                    torch.rand(4, dtype=torch.float64),
                    torch.zeros(4, dtype=torch.uint8),
                    torch.zeros(0),
                    torch.rand(2, 3),
                )
            )
            end = r.choice(("", ".mask", ".kept"))
            tensors["model.layers.0.self_attn.rotary_emb.inv_freq" + end] = odd
        elif name.endswith((".mask", ".kept")):
            other = {".mask": ".kept", ".kept": ".mask"}[name[-5:]]
            tensors[name] = r.choice(
                (
                    t ^ 1 if t.dtype == torch.uint8 else t[1:].clone(),
                    tensors.get(name[:-5] + other, t).clone(),
                    t.float(),
                )
            )
        if not tensors:
            break
    return safetensors.torch.save(
        tensors,
        {
            "format": "pt",
            "unicuco_packed": r.choice("1112"),
            "about": '{"lo": -5, "hi": 1, "mean": "blocks"}',
        },
    )


KINDS = ("plain", "packed", "sharded", "fast", "stratnet", "requests", "text")
SHARES = (5, 5, 5, 3, 3, 2, 2)


def mutated(good, seed, i):
    """Input number i: (kind, {file name: bytes}), one file of a good folder broken."""
    import torch

    r = random.Random(f"{seed}/{i}")
    torch.manual_seed(r.randrange(2**32))
    kind = r.choices(KINDS, SHARES)[0]
    files = dict(good[kind])
    name = r.choice(sorted(files))
    raw, how = files[name], r.random()
    if how < 0.06 and len(files) > 1:
        other = r.choice(sorted(files))
        if r.random() < 0.5:
            del files[name]  # a missing file
        else:
            files[name] = files[other]  # the wrong one
    elif name.endswith(".safetensors") and how < 0.7:
        files[name] = mutate_safetensors(raw, r) if how < 0.4 else mutate_tensors(raw, r)
    elif name.endswith(".json") and how < 0.85:
        files[name] = json.dumps(mutate_json(json.loads(raw), r)).encode()
    elif name.endswith(".jsonl") and how < 0.7:
        lines = raw.splitlines()
        k = r.randrange(len(lines))
        lines[k] = json.dumps(mutate_json(json.loads(lines[k]), r)).encode()
        files[name] = b"\n".join(lines)
    else:
        files[name] = mutate_bytes(raw, r)
    return kind, files


# --------------------------------------------------------------------------------- readers
def read(kind, files, scratch):
    """Write the files into scratch/in and read them as the product does: True when they are good,
    False after a ValueError.
    """
    import torch

    from eval import read_documents, tokenise
    from gp import GaussianProcess
    from llama import load_llama, save_llama, stream
    from request import read_requests
    from unicuco import load_stratnet

    for name in ("in", "out"):
        shutil.rmtree(scratch / name, ignore_errors=True)
        (scratch / name).mkdir()
    torch.manual_seed(0)
    for name, raw in files.items():
        (scratch / "in" / name).write_bytes(raw)
    try:
        if kind == "requests":
            for request in read_requests(scratch / "in" / "wishes.jsonl"):
                assert (
                    Path(request["name"]).name == request["name"] and 0 <= request["value"] <= 1e15
                )
        elif kind == "text":
            for name in files:
                tokens = tokenise(TOKENIZER, read_documents(scratch / "in" / name))
                assert tokens.min() >= 0 and tokens.max() < FIELDS["vocab_size"]
        elif kind == "stratnet":
            trained = load_stratnet(scratch / "in" / "stratnet.safetensors", 1)
            net, X, y, about = trained.net, trained.X, trained.y, trained.about
            assert X.shape == (len(y), 1) and GaussianProcess(about["mean"]).fit(X[:4], y[:4])
            assert net(torch.tensor([[0.5, 0.5]])).isfinite().all()
        else:
            model, tokenizer = load_llama(scratch / "in")
            text = "".join(stream(model, tokenizer, "return é", 3, temperature=1.0))
            assert isinstance(text, str)
            masks = {
                n: torch.rand(p.shape) < 0.5
                for n, p in model.named_parameters()
                if n.endswith("_proj.weight")
            }
            save_llama(model, scratch / "out" / "plain", scratch / "in")
            save_llama(model, scratch / "out" / "packed", scratch / "in", masks, packed=True)
            for name in ("plain", "packed"):
                again = load_llama(scratch / "out" / name)[0].state_dict()
                for n, p in model.state_dict().items():
                    assert torch.equal(
                        again[n], p * masks[n] if n in masks and name == "packed" else p
                    ), f"{n} changed when saved {name}"
        return True
    except ValueError as error:
        assert len(str(error).splitlines()) == 1 and len(str(error)) < 1000, (
            f"not one short line: {str(error)[:3000]!r}"
        )
        return False


TOKENIZER = None  # of the good plain folder: texts are tokenised with it


def by_hypothesis(seed, scratch, good, begin, count):
    """Values that Hypothesis invents, `count` of each kind; `begin(kind, files)` is told of each
    before it is read.
    """
    from hypothesis import HealthCheck, Phase, given, settings
    from hypothesis import seed as seeded
    from hypothesis import strategies as st

    anything = st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
        lambda inner: (
            st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
        ),
        max_leaves=8,
    )
    request = st.dictionaries(
        st.sampled_from(("sparsity", "preference", "max_kl", "max_size", "name", "other")),
        anything | st.from_regex(r"[0-9.eE+-]{1,9} ?[kMG]?B?", fullmatch=True),
        max_size=3,
    )
    config = st.dictionaries(
        st.sampled_from(
            (
                *FIELDS,
                "rope_parameters",
                "quantization_config",
                "partial_rotary_factor",
                "use_sliding_window",
            )
        ),
        anything,
        max_size=3,
    )
    inputs = {
        "requests": st.lists(request | anything, max_size=3).map(
            lambda rows: {"wishes.jsonl": "\n".join(map(json.dumps, rows)).encode()}
        ),
        "text": st.lists(
            st.fixed_dictionaries({"text": st.text(st.characters(), max_size=30) | anything})
            | anything,
            max_size=4,
        ).map(lambda rows: {"a.jsonl": "\n".join(map(json.dumps, rows)).encode()}),
        "plain": config.map(
            lambda change: {
                **good["plain"],
                "config.json": json.dumps({**FIELDS, **change}).encode(),
            }
        ),
    }
    for kind, strategy in inputs.items():

        @seeded(seed)
        @settings(
            max_examples=count,
            database=None,
            deadline=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(strategy)
        def check(files):
            begin(kind, files)

        check()


# ---------------------------------------------------------------------------------- worker
def worker(a):
    """Read inputs a.first, a.first + 1, ...: a line before each, and a line for each that"
    " failed."""
    global TOKENIZER
    import torch
    from hypothesis import configuration

    # noqa: F401  (imported before memory and writing are limited)
    from llama import Tokenizer

    configuration.set_hypothesis_home_dir(a.scratch / "good")
    torch.set_num_threads(1)
    warnings.simplefilter("always")
    scratch, say = a.scratch, os.fdopen(os.dup(1), "w", buffering=1)
    shutil.rmtree(scratch / "good", ignore_errors=True)
    good = make_folders(scratch / "good")
    TOKENIZER = Tokenizer(scratch / "good" / "plain", FIELDS["vocab_size"])
    os.chdir(scratch / "cwd")
    stderr = os.open(scratch / "stderr", os.O_RDWR | os.O_CREAT | os.O_TRUNC)
    os.dup2(stderr, 2)
    assert all([read(kind, good[kind], scratch) for kind in KINDS]), (
        "a good input is refused"
    )  # and every reader is warm
    used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (used + ROOM, used + ROOM))
    inside, outside = str(scratch.resolve()), []

    def hook(event, args):  # Python's own writes; native ones would show in the listing below
        written = (
            args[0]
            if event == "open"
            and isinstance(args[2], int)
            and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            else args[1]
            if event in ("os.rename", "shutil.copyfile", "os.link", "os.symlink")
            else args[0]
            if event == "os.mkdir"
            else None
        )
        if (
            isinstance(written, (str, bytes))
            and not os.path.realpath(os.fsdecode(written)).startswith(inside)
            and os.fsdecode(written) != "/dev/null"
        ):
            outside.append(written)

    sys.addaudithook(hook)
    known, results = {"good", "cwd", "in", "out", "stderr"}, {}

    def attempt(i, kind, files):
        say.write(f"at {i} {kind}\n")
        flaw = None
        try:
            results[kind] = results.get(kind, 0) + read(kind, files, scratch)
        except BaseException as error:  # a Rust panic is no Exception
            at = error.__traceback__
            while at.tb_next:
                at = at.tb_next
            place = f"{Path(at.tb_frame.f_code.co_filename).name}:{at.tb_lineno}"
            flaw = f"{type(error).__name__} in {place}: {str(error)[:300]!r}"
        words = os.pread(stderr, 2000, 0)
        os.ftruncate(stderr, 0)
        os.lseek(stderr, 0, os.SEEK_SET)
        stray = (set(os.listdir(scratch)) - known) | set(os.listdir(scratch / "cwd")) | set(outside)
        flaw = flaw or (
            f"wrote {stray}" if stray else f"words on stderr: {words[:300]!r}" if words else None
        )
        if flaw:
            say.write(f"flaw {i} {kind} {flaw}\n")
            if a.keep:
                shutil.copytree(scratch / "in", a.keep / f"{i}-{kind}", dirs_exist_ok=True)
        outside.clear()

    for number in range(a.first, a.first + a.count):
        attempt(number, *mutated(good, a.seed, number))
    if a.hypothesis:
        numbers = iter(range(10**7, 2 * 10**7))
        by_hypothesis(
            a.seed,
            scratch,
            good,
            lambda kind, files: attempt(next(numbers), kind, files),
            a.hypothesis,
        )
    say.write(f"good {json.dumps(results)}\n")


def seconds_used(pid):
    """Processor time of a process."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def main():
    p = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    p.add_argument("--count", type=int, default=20000, help="mutated inputs (20000)")
    p.add_argument(
        "--hypothesis",
        type=int,
        default=500,
        help="inputs by Hypothesis, for each of three kinds (500)",
    )
    p.add_argument("--first", type=int, default=0, help="number of the first input (0)")
    p.add_argument("--seed", type=int, default=0, help="of all inputs (0)")
    p.add_argument("--keep", type=Path, help="folder for the inputs that fail")
    p.add_argument("--scratch", type=Path, help=argparse.SUPPRESS)  # given to the worker
    a = p.parse_args()
    if a.keep:
        a.keep.mkdir(parents=True, exist_ok=True)
        a.keep = a.keep.resolve()
    if a.scratch:
        return worker(a)
    started, done, flaws, good, end = time.perf_counter(), 0, [], {}, a.first + a.count
    with tempfile.TemporaryDirectory() as scratch:
        (Path(scratch) / "cwd").mkdir()
        first = a.first
        while first is not None:  # from one worker to the next
            words = [
                sys.executable,
                "-m",
                "checks.fuzz",
                "--scratch",
                scratch,
                "--seed",
                a.seed,
                "--first",
                first,
                "--count",
                max(0, end - first),
                "--hypothesis",
                a.hypothesis if first <= end else 0,
                *(["--keep", a.keep] if a.keep else []),
            ]
            process = subprocess.Popen(
                list(map(str, words)),
                cwd=Path(__file__).resolve().parents[1],
                stdout=subprocess.PIPE,
                bufsize=0,
            )
            at, kind, finished, buffer = None, None, False, b""
            while True:
                since, ready = seconds_used(process.pid), []
                for _ in range(60):  # a worker that gets no processor does not hang
                    ready = ready or select.select([process.stdout], [], [], LIMIT)[0]
                    if ready or at is not None and seconds_used(process.pid) - since > LIMIT / 2:
                        break
                chunk = os.read(process.stdout.fileno(), 65536) if ready else b""
                if not chunk:
                    break
                *lines, buffer = (buffer + chunk).split(b"\n")
                for line in lines:
                    what, *rest = line.decode().split(" ", 2)
                    if what == "at":
                        at, kind, done = int(rest[0]), rest[1], done + 1
                        if done % 2000 == 0:
                            print(
                                f"{done} inputs, {len(flaws)} flaws,"
                                f" {time.perf_counter() - started:.0f} s",
                                flush=True,
                            )
                    elif what == "flaw":
                        flaws.append(line.decode())
                        print(line.decode(), flush=True)
                    elif what == "good":
                        finished = True
                        good.update(
                            {k: good.get(k, 0) + n for k, n in json.loads(" ".join(rest)).items()}
                        )
            process.kill()
            process.wait()
            if finished:
                break
            if at is None:
                sys.exit("the worker did not start")
            last = (Path(scratch) / "stderr").read_text(errors="replace").strip().splitlines()[-1:]
            flaws.append(
                f"flaw {at} {kind} "
                + (f"crashed with {process.returncode} {last}" if ready else f"hung for {LIMIT} s")
            )
            print(flaws[-1], flush=True)
            if a.keep:
                shutil.copytree(Path(scratch) / "in", a.keep / f"{at}-{kind}", dirs_exist_ok=True)
            first = at + 1 if at + 1 < 10**7 else None
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    print(
        f"{done} inputs in {time.perf_counter() - started:.0f} s"
        f" ({used.ru_utime + used.ru_stime:.0f} of processor time): {sum(good.values())} read,"
        f" the rest refused in one line, {len(flaws)} flaws"
    )
    sys.exit(1 if flaws else 0)


if __name__ == "__main__":
    main()
