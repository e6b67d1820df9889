"""
What tests share: small random models on disk and in memory, a text, tasks, and ways to call a
script.
"""

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from safetensors.torch import save_file

import eval as evaluation
import script
from checks import fuzz
from llama import Llama, load_llama, save_llama
from model import Config
from ranks import Pruner
from unicuco import StratNet

ROOT = Path(__file__).parent
CPU = ("--device", "cpu", "--dtype", "float32")
SMALL = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 4096,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# Hypothesis, derandomised: every run tries the same examples
steady = settings(deadline=None, derandomize=True, database=None, max_examples=60)
seeds = st.integers(0, 10**6)


def random_weights(parameters, seed):
    """{name: float32 tensor} of weights of every size, norms around 1."""
    g = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(p.shape, generator=g) * (0.3 if p.ndim == 2 else 0.1) + (p.ndim == 1)
        for name, p in parameters
    }


def write_small(folder, seed=0, dtype=torch.float32, **fields):
    """A random model in Hugging Face layout, with the tokenizer of tiny; `fields` of its
    config.json.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**SMALL, **fields}))
    model = Llama(Config.read(folder / "config.json"))
    weights = random_weights(model.named_parameters(), seed)
    tensors = {name: W.to(dtype) for name, W in weights.items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    for name in ("tokenizer.model", "tokenizer_config.json"):
        (folder / name).write_bytes((ROOT / "tiny" / name).read_bytes())
    return folder


def random_model(seed=0, dtype=torch.float32):
    """A small Llama with weights of every size, in memory."""
    model = Llama(Config(512, 64, 96, 3, 4, 2, 16, 128, 1e-5, tie_word_embeddings=True))
    for (_, p), W in zip(
        model.named_parameters(), random_weights(model.named_parameters(), seed).values()
    ):
        p.data = W.to(dtype)
    return model.eval().requires_grad_(False)


def random_net(blocks, size=1.0, seed=0):
    """A StratNet with random weights: whatever training could give."""
    net, g = StratNet(blocks), torch.Generator().manual_seed(seed)
    for p in net.parameters():
        p.data = torch.randn(p.shape, generator=g, dtype=p.dtype) * size / p.shape[-1] ** 0.5
    return net


def relative(a, b):
    return float((a - b).abs().max() / b.abs().max())


def refuses(function, *arguments, match=None):
    """The function refuses its arguments, in one short line."""
    with pytest.raises(script.Refused, match=match) as caught:
        function(*arguments)
    message = str(caught.value)
    assert len(message.splitlines()) == 1 and len(message) < 1000, message


def call(module, *words):
    """The script in this process, as from the command line: its exit code."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [module.__name__ + ".py", *map(str, words)])
        try:
            script.run(module.main, ": a hint")
        except SystemExit as end:
            return end.code
    return 0


def spied(monkeypatch, module, name, seen):
    """Replace a class or function of `module` by one that also appends its arguments to `seen`."""
    original = getattr(module, name)

    def spy(*arguments, **named):
        seen.append((name, arguments))
        return original(*arguments, **named)

    monkeypatch.setattr(module, name, spy)


def run_script(*words):
    """A script in a process of its own: what `subprocess.run` gives."""
    command = [sys.executable, *map(str, words)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=170)


def place_all(good, root):
    """Write {kind: {file name: bytes}} as folders of `root`."""
    for kind, files in good.items():
        (root / kind).mkdir(parents=True)
        for name, raw in files.items():
            (root / kind / name).write_bytes(raw)
    return root


def write_tasks(folder):
    """Three rows of every zero-shot task."""
    words = ["a liquid", "a stone", "a bird"]
    arc = {
        "question": "What is water?",
        "choices": {"text": words, "label": ["A", "B", "C"]},
        "answerKey": "A",
    }
    rows = {
        "piqa": {
            "goal": "To open a door",
            "sol1": "turn the handle",
            "sol2": "eat the handle",
            "label": 0,
        },
        "arc_easy": arc,
        "arc_challenge": arc,
        "hellaswag": {
            "activity_label": "Roof",
            "ctx_a": "A man sits.",
            "ctx_b": "he",
            "endings": ["stands up.", "flies.", "is blue."],
            "label": 0,
        },
        "winogrande": {
            "sentence": "Ann beat Eve so _ won.",
            "option1": "Ann",
            "option2": "Eve",
            "answer": "1",
        },
    }
    for task, row in rows.items():
        other = dict(row)
        for key in {"goal", "question", "ctx_a"} & row.keys():
            other[key] += " indeed"
        lines = "\n".join(map(json.dumps, (row, other, row)))
        (folder / evaluation.TASKS[task]).write_text(lines)
    return folder


@pytest.fixture(scope="session")
def small(tmp_path_factory):
    return write_small(tmp_path_factory.mktemp("model") / "small")


@pytest.fixture(scope="session")
def pruned(small, tmp_path_factory):
    """The small model with half of its weights gone."""
    model, folder = load_llama(small)[0], tmp_path_factory.mktemp("model") / "pruned"
    windows = torch.randint(3, 4096, (4, 64), generator=torch.Generator().manual_seed(0))
    save_llama(model, folder, small, Pruner(model, windows).masks([0.5] * 3))
    return folder


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.py"
    # not a file of this repository: a test would move with every edit of it
    names = random.Random(0).choices(
        "block head keep mask norm rank row score token weight".split(), k=4500
    )
    triples = zip(names[::3], names[1::3], names[2::3])
    path.write_text("".join(f"    {a}.{b} = {c}({a}, {len(b)})\n" for a, b, c in triples))
    return path


@pytest.fixture
def tasks(tmp_path):
    return write_tasks(tmp_path)


@pytest.fixture(scope="session")
def tokens():
    return torch.randint(3, 512, (16, 64), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="session")
def good(tmp_path_factory):
    """{kind: {file name: bytes}} of readable inputs, see `make_folders`."""
    return fuzz.make_folders(tmp_path_factory.mktemp("fuzz") / "good")


@pytest.fixture
def place(good, tmp_path):
    """place(kind, **changed files): a folder of good files with some replaced by bytes, JSON or
    tensors, None = removed.
    """

    def write(kind, **changed):
        folder = tmp_path / f"{kind}{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        for name, raw in (
            good[kind]
            | {
                k.replace("_json", ".json").replace("_safetensors", ".safetensors"): v
                for k, v in changed.items()
            }
        ).items():
            if isinstance(raw, dict) and name.endswith(".safetensors"):
                save_file(raw, folder / name)
            elif raw is not None:
                (folder / name).write_bytes(
                    raw if isinstance(raw, bytes) else json.dumps(raw).encode()
                )
        return folder

    return write
