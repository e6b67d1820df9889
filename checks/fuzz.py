"""
Broken files of every kind into every reader: each input ends in success, or in one short line.

Inputs    bytes flipped, cut and copied; JSON (config, index, tokenizer, safetensors headers, rows)
          with keys, types and sizes changed. What loads is also run, saved plain and packed, and
          loaded again. Hypothesis chooses; a flaw is shrunk to its smallest input and printed.
Watched   other exceptions than Refused, longer messages, LIMIT seconds for one input.

Run       python -m checks.fuzz                       (5,000 inputs, 2 minutes on one core)
          python -m checks.fuzz --count 300 --seed 7
"""

import argparse
import copy
import io
import json
import random
import shutil
import signal
import struct
import tempfile
from pathlib import Path

import sentencepiece
import tokenizers
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import seed as seeded
from hypothesis import strategies as st
from safetensors.torch import save_file

from eval import read_documents, tokenise
from llama import Config, Llama, Tokenizer, load_llama, save_llama, stream
from request import read_requests
from script import Refused
from unicuco import Layout, Scale, StratNet, Trained, load_stratnet, save_stratnet

LIMIT = 10  # seconds for one input
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
FIELDS = {
    "model_type": "llama",
    "vocab_size": 320,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "rope_theta": 10000.0,
    "rope_scaling": LLAMA3 | {"original_max_position_embeddings": 32},
    "attention_bias": False,
    "mlp_bias": False,
    "bos_token_id": 1,
    "eos_token_id": [2, 5],
    "sliding_window": None,
}
WORDS = "the quick brown fox"
TEXT = "".join(
    f"def f{i}(x, y):\n    return x * {i} + y  # {WORDS[i % 19 :]}\n" for i in range(200)
)
DEEP = json.loads("[" * 150 + "]" * 150)
SIZES = (-1, 0, 1, 2, 3, 7, 2**16, 2**31, 2**53, 2**63 - 1, 2**64, 10**30, 10**400)
REALS = (0.5, -0.0, 1e-300, 1e308, float("inf"), float("nan"))
NAMES = ("", "1", "x" * 5000, "a\nb", "\x1b[2J", "\ud800", "\0", "é", ".", "..", "../up", "/a")
ODD = (None, True, False, *SIZES, *REALS, *NAMES, [], [[]], [1], {}, {"a": 1}, [None, "x"], DEEP)
DTYPES = ("F64", "I8", "U8", "BF16", "F32", "F4", "BOOL", "C64", "I64", "llama3", "qwen2", "yarn")


# ---------------------------------------------------------------------------------- good files
def write_plain(folder):
    """A model of one block with a sentencepiece tokenizer."""
    folder.mkdir(parents=True)
    pieces = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT.splitlines()),
        model_writer=pieces,
        vocab_size=300,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        hard_vocab_limit=False,
        num_threads=1,
        minloglevel=2,
    )
    (folder / "config.json").write_text(json.dumps(FIELDS))
    (folder / "tokenizer.model").write_bytes(pieces.getvalue())
    settings = {"add_bos_token": True, "bos_token": "<s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    torch.manual_seed(0)
    model = Llama(Config.read(folder / "config.json"))
    weights = {name: p.detach().half() for name, p in model.named_parameters()}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return weights


def write_sharded(folder, plain, weights):
    shutil.copytree(plain, folder, ignore=shutil.ignore_patterns("model.safetensors"))
    files = {n: f"model-{1 + i % 2}-of-2.safetensors" for i, n in enumerate(sorted(weights))}
    for file in set(files.values()):
        shard = {n: w for n, w in weights.items() if files[n] == file}
        save_file(shard, folder / file, {"format": "pt"})
    index = {"metadata": {"total_size": 1}, "weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def write_fast(folder, plain):
    """The same model with a tokenizer.json."""
    shutil.copytree(plain, folder, ignore=shutil.ignore_patterns("tokenizer.model"))
    fast = tokenizers.Tokenizer(tokenizers.models.BPE(byte_fallback=True))
    fast.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<unk>", "<s>", "</s>"],
        show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )
    fast.train_from_iterator(TEXT.splitlines(), trainer)
    fast.save(str(folder / "tokenizer.json"))


def random_masks(model):
    matrices = [(n, p) for n, p in model.named_parameters() if n.endswith("_proj.weight")]
    return {name: torch.rand(p.shape) < 0.5 for name, p in matrices}


def write_others(root):
    """A StratNet, requests and texts."""
    for name in ("stratnet", "requests", "text"):
        (root / name).mkdir()
    X, y = torch.rand(4, 1) * 0.9, torch.rand(4)
    about = {"mean": "blocks", "seed": 0}
    made = Trained(StratNet(1), Layout(1), Scale(-5.0, 1.0), X, y, None, about)
    save_stratnet(root / "stratnet" / "stratnet.safetensors", made)
    wishes = ({"name": "phone", "max_size": "7MB"}, {"max_kl": 0.02}, {"sparsity": "0.5"})
    (root / "requests" / "wishes.jsonl").write_text("\n".join(map(json.dumps, wishes)))
    (root / "text" / "a.txt").write_text(TEXT[:3000] + "é漢🎈")
    (root / "text" / "a.raw").write_text(" \n = A = \n \n text\n" + TEXT[:1000])
    rows = ({"text": line, "url": None} for line in TEXT.splitlines()[:40])
    (root / "text" / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))


def make_folders(root):
    """Good inputs {kind: {file name: bytes}}: model folders plain, sharded, packed and with
    tokenizer.json; a StratNet, requests, texts.
    """
    weights = write_plain(root / "plain")
    model, _ = load_llama(root / "plain")
    save_llama(model, root / "packed", root / "plain", random_masks(model), packed=True)
    write_sharded(root / "sharded", root / "plain", weights)
    write_fast(root / "fast", root / "plain")
    write_others(root)
    return {
        folder.name: {p.name: p.read_bytes() for p in sorted(folder.iterdir())}
        for folder in sorted(root.iterdir())
    }


# ------------------------------------------------------------------------------------- mutations
def mutate_bytes(raw, r):
    """1 to 4 edits; half of them within the first 400 bytes, where headers are."""
    raw = bytearray(raw)
    for _ in range(r.choice((1, 1, 2, 4))):
        end = min(len(raw), 400) if r.random() < 0.5 else len(raw)
        i, n = r.randrange(end + 1), r.choice((1, 2, 8, 64, 1000))
        edits = (
            lambda i=i, n=n: raw.__setitem__(slice(i, i + n), r.randbytes(n)),
            lambda i=i: raw.__delitem__(slice(i, None)),
            lambda i=i, n=n: raw.__delitem__(slice(i, i + n)),
            lambda i=i, n=n: raw.__setitem__(slice(i, i), raw[i : i + n] * r.choice((1, 50))),
            lambda i=i: raw.__setitem__(slice(i, i + 8), struct.pack("<Q", r.choice(SIZES[1:10]))),
            lambda i=i: raw.__setitem__(slice(i, i + 2), r.choice((b"\x00\x7c", b"\n\n", b"{}"))),
        )
        r.choice(edits)()
    return bytes(raw)


def places(value):
    """(container, key) of everything inside a JSON value."""
    if isinstance(value, dict):
        inside = list(value.items())
    else:
        inside = list(enumerate(value)) if isinstance(value, list) else []
    for key, inner in inside:
        yield value, key
        yield from places(inner)


def mutate_json(value, r):
    """1 to 3 keys or items replaced by something odd, deleted, renamed, copied; at times all."""
    value = copy.deepcopy(value)
    for _ in range(r.choice((1, 1, 1, 2, 3))):
        spots = list(places(value))
        if not spots or r.random() < 0.02:
            return copy.deepcopy(r.choice(ODD))
        where, key = r.choice(spots)
        old, edit = where[key], r.randrange(6)
        if edit == 0:
            del where[key]
        elif edit == 1 and isinstance(where, dict):
            where[r.choice((key + ".mask", key + ".kept", key + "\n", "", "../" + key))] = old
        elif edit == 2 and type(old) in (int, float) and abs(old) < 2**64:
            where[key] = r.choice((old + 1, old - 1, old * 2, -old, old * 1000, old / 3, str(old)))
        elif edit == 3:
            other, key_ = r.choice(spots)
            where[key] = copy.deepcopy(other[key_])
        elif edit == 4 and isinstance(old, str):
            where[key] = r.choice((*DTYPES, old + "\n", old.upper()))
        else:
            where[key] = copy.deepcopy(r.choice(ODD))
    return value


def mutate_safetensors(raw, r):
    """The header as JSON with something changed, its length honest most of the time."""
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    metadata = header.get("__metadata__", {})
    if r.random() < 0.3 and "about" in metadata:
        metadata["about"] = json.dumps(mutate_json(json.loads(metadata["about"]), r))
    else:
        header = mutate_json(header, r)
    text = json.dumps(header).encode()
    said = len(text) if r.random() < 0.95 else r.choice((0, len(text) - 1, len(text) + 1, 2**40))
    return struct.pack("<Q", said) + text + raw[8 + length :]


def mutate_file(name, raw, r):
    """A file broken in the way of its kind, or as bytes."""
    if r.random() < 0.25:
        return mutate_bytes(raw, r)
    if name.endswith(".safetensors"):
        return mutate_safetensors(raw, r)
    if name.endswith(".json"):
        return json.dumps(mutate_json(json.loads(raw), r)).encode()
    if name.endswith(".jsonl"):
        lines = raw.splitlines()
        k = r.randrange(len(lines))
        lines[k] = json.dumps(mutate_json(json.loads(lines[k]), r)).encode()
        return b"\n".join(lines)
    return mutate_bytes(raw, r)


def mutated(good, seed, i):
    """Input number i: (kind, {file name: bytes}), one file of a good folder broken, gone or
    swapped.
    """
    r = random.Random(f"{seed}/{i}")
    kind = r.choice(sorted(good))
    files = dict(good[kind])
    name = r.choice(sorted(files))
    if r.random() < 0.05 and len(files) > 1:
        other = files[r.choice(sorted(files))]
        del files[name]
        if r.random() < 0.5:
            files[name] = other
    else:
        files[name] = mutate_file(name, files[name], r)
    return kind, files


# --------------------------------------------------------------------------------------- readers
def read_model(folder, out):
    """Load, run, save plain and packed, load again: nothing may change on the way."""
    model, tokenizer = load_llama(folder)
    assert isinstance("".join(stream(model, tokenizer, "return é", 3, temperature=1.0)), str)
    masks = random_masks(model)
    save_llama(model, out / "plain", folder)
    save_llama(model, out / "packed", folder, masks, packed=True)
    for name in ("plain", "packed"):
        again = load_llama(out / name)[0].state_dict()
        for n, p in model.state_dict().items():
            expected = p * masks[n] if name == "packed" and n in masks else p
            assert torch.equal(again[n], expected), f"{n} changed when saved {name}"


def read_trained(folder):
    trained = load_stratnet(folder / "stratnet.safetensors", 1)
    assert trained.X.shape == (len(trained.y), 1) and trained.gp()
    assert trained.net(torch.tensor([[0.5, 0.5]])).isfinite().all()


def read_texts(folder, vocab_size=FIELDS["vocab_size"]):
    for path in folder.iterdir():
        tokens = tokenise(TOKENIZER, read_documents(path))
        assert tokens.min() >= 0 and tokens.max() < vocab_size


def read(kind, files, scratch):
    """Whether an input is read; False after a refusal in one short line; else a flaw is raised."""
    for name in ("in", "out"):
        shutil.rmtree(scratch / name, ignore_errors=True)
        (scratch / name).mkdir()
    for name, raw in files.items():
        (scratch / "in" / name).write_bytes(raw)
    torch.manual_seed(0)
    try:
        if kind == "requests":
            names = [r["name"] for r in read_requests(scratch / "in" / "wishes.jsonl")]
            assert all(Path(name).name == name for name in names)
        elif kind == "text":
            read_texts(scratch / "in")
        elif kind == "stratnet":
            read_trained(scratch / "in")
        else:
            read_model(scratch / "in", scratch / "out")
    except Refused as error:
        message = str(error)
        assert len(message.splitlines()) == 1 and len(message) < 1000, f"{message[:3000]!r}"
        return False
    return True


TOKENIZER = None  # of the good plain folder: texts are tokenised with it


def too_slow(signum, frame):
    raise TimeoutError(f"more than {LIMIT} seconds")


def main():
    global TOKENIZER
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("--count", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    signal.signal(signal.SIGALRM, too_slow)
    outcomes = []
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        good = make_folders(scratch / "good")
        TOKENIZER = Tokenizer(scratch / "good" / "plain", FIELDS["vocab_size"])
        health = list(HealthCheck)

        @seeded(args.seed)
        @settings(
            max_examples=args.count, database=None, deadline=None, suppress_health_check=health
        )
        @given(st.integers(0, 2**32))
        def every_input_is_read_or_refused(i):
            signal.alarm(LIMIT)
            outcomes.append(read(*mutated(good, args.seed, i), scratch))
            signal.alarm(0)

        every_input_is_read_or_refused()
    print(f"{len(outcomes)} inputs, {sum(outcomes)} read, the others refused in one line: 0 flaws")


if __name__ == "__main__":
    main()
