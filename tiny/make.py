"""
Train the embedded default from scratch: its tokenizer, then a 5.5M-parameter Llama, on Python's own
standard library.

Needs     the packages of requirements.txt, a C++ compiler (torch.compile), 2 cores and 4 GB.
Time      45 minutes on 2 cores with bfloat16. Killed and started again, it goes on from the last
          saved step.
Run       python -m tiny.make              writes tiny/{config.json, model.safetensors,
          tokenizer.model, tokenizer_config.json}
"""

import argparse
import io
import json
import platform
import time
from pathlib import Path

import sentencepiece
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from eval import bits_per_byte, stdlib_files
from llama import Config, Llama, load_llama
from script import replacing, run, write_text

FIELDS = dict(
    vocab_size=4096,
    hidden_size=192,
    intermediate_size=512,
    num_hidden_layers=12,
    num_attention_heads=3,
    num_key_value_heads=1,
    head_dim=64,
    max_position_embeddings=512,
    rms_norm_eps=1e-5,
    rope_theta=10000.0,
    tie_word_embeddings=True,
)


def train_tokenizer(text, path):
    """A lossless byte-pair vocabulary of 4096: nothing is normalised, a newline with its
    indentation is one symbol.
    """
    lines = text.split("\n")
    chunks = ("\n".join(lines[i : i + 20]) + "\n" for i in range(0, len(lines), 20))
    indents = ["\n"] + ["\n" + "\u2581" * 4 * depth for depth in range(1, 7)]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=chunks,
        model_writer=model,
        vocab_size=FIELDS["vocab_size"],
        model_type="bpe",
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=False,
        byte_fallback=True,
        user_defined_symbols=indents,
        split_by_unicode_script=False,
        allow_whitespace_only_pieces=True,
        character_coverage=0.9999,
        max_sentence_length=1 << 20,
        num_threads=1,
        minloglevel=2,
    )
    with replacing(path) as partial:
        partial.write_bytes(model.getvalue())


def window_batch(tokens, T, batch, step):
    """Batch number `step` of shuffled windows (batch, T + 1) of tokens (N,); every epoch has
    another offset and order.
    """
    per_epoch = (len(tokens) // T - 1) // batch
    g = torch.Generator().manual_seed(step // per_epoch)
    offset = int(torch.randint(T, (1,), generator=g))
    order = torch.randperm(len(tokens) // T - 1, generator=g)
    chunk = order[step % per_epoch * batch :][:batch]
    return tokens[offset + chunk[:, None] * T + torch.arange(T + 1)]


@torch.no_grad()
def initialise(model):
    """Each block starts as the identity: what writes to the residual stream is zero."""
    for name, p in model.named_parameters():
        if p.ndim == 2:
            p.zero_() if name.endswith(("o_proj.weight", "down_proj.weight")) else p.normal_(
                std=0.02 if "embed" in name else p.shape[1] ** -0.5
            )


def save(path, master, optimizers, step, seconds):
    """All that training needs to go on, in one safetensors file, replaced at once."""
    state = {"step": torch.tensor([step, seconds], dtype=torch.float64)}
    state.update({f"model/{n}": p.detach().clone() for n, p in master.items()})
    for i, optimizer in enumerate(optimizers):
        for key, entry in optimizer.state_dict()["state"].items():
            state.update(
                {f"optimizer{i}/{key}/{n}": torch.as_tensor(v).clone() for n, v in entry.items()}
            )
    with replacing(path) as partial:
        save_file(state, partial)


def restore(path, master, optimizers):
    """Step and seconds to go on from: (0, 0) when there is nothing to resume."""
    if not path.exists():
        return 0, 0.0
    state = load_file(path)
    with torch.no_grad():
        for n, p in master.items():
            p.copy_(state[f"model/{n}"])
    for i, optimizer in enumerate(optimizers):
        restored = optimizer.state_dict()
        for name, value in state.items():
            if name.startswith(f"optimizer{i}/"):
                _, key, field = name.split("/")
                restored["state"].setdefault(int(key), {})[field] = value
        optimizer.load_state_dict(restored)
    return int(state["step"][0]), float(state["step"][1])


def learning_rate(step, steps, warmup=40, flat=0.4):
    """Factor on the peak rates: warm up, stay, then fall to 0 in a straight line."""
    return min((step + 1) / warmup, 1, (steps - step) / (steps * (1 - flat)))


def write_model(folder, master, sp):
    """The trained weights as a Hugging Face folder in float16."""
    weights = {n: p.detach().half().contiguous() for n, p in master.items()}
    with replacing(folder / "model.safetensors") as partial:
        save_file(weights, partial, {"format": "pt"})
        partial.chmod(0o644)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        **FIELDS,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": sp.bos_id(),
        "eos_token_id": sp.eos_id(),
        "torch_dtype": "float16",
    }
    write_text(folder / "config.json", json.dumps(config, indent=2) + "\n")
    write_text(
        folder / "tokenizer_config.json",
        json.dumps(
            {
                "tokenizer_class": "LlamaTokenizer",
                "add_bos_token": True,
                "bos_token": "<s>",
                "eos_token": "</s>",
                "unk_token": "<unk>",
            },
            indent=2,
        )
        + "\n",
    )


def arguments():
    p = argparse.ArgumentParser(
        description="train the embedded default: tokenizer and 5.5M-parameter Llama"
    )
    p.add_argument("--out", type=Path, default=Path("tiny"), help="folder to write")
    p.add_argument("--steps", type=int, default=1200, help="optimiser steps of 8192 tokens")
    return p.parse_args()


def encoded(folder, train, held_out):
    """The tokenizer of `folder`, trained if it is not there, and the tokens (N,) of `train`;
    nothing of either text may be lost.
    """
    if not (folder / "tokenizer.model").exists():
        train_tokenizer(train, folder / "tokenizer.model")
    sp = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    for text in (train, held_out):
        assert sp.decode(sp.encode(text)) == text, "the tokenizer lost text"
    return sp, torch.tensor(sp.encode(train))


def begin():
    """The model in bfloat16, in which the products run, and its float32 master copy, which the
    optimisers move.
    """
    torch.manual_seed(0)
    model = Llama(Config(**FIELDS))
    initialise(model)
    master = {n: p.detach().clone().requires_grad_() for n, p in model.named_parameters()}
    return model.bfloat16(), master


def optimizers_of(master):
    """Muon for matrices, AdamW for the embeddings and all vectors; and the peak rate of each."""
    matrices = [p for n, p in master.items() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in master.items() if p.ndim == 1 or "embed" in n]
    muon = torch.optim.Muon(matrices, lr=0.02, weight_decay=0.05)
    adam = torch.optim.AdamW(others, lr=0.003, betas=(0.9, 0.95), weight_decay=0)
    return (muon, adam), (0.02, 0.003)


def batch_of(tokens, step, steps, bos):
    """Inputs and targets (batch, T) of a step: short windows first, for attention is half of the
    time at 512; three batches in four open with the begin token.
    """
    T = 256 if step < 0.7 * steps else 512
    w = window_batch(tokens, T, 8192 // T, step)
    x, y = w[:, :-1].clone(), w[:, 1:]
    if step % 4:
        x[:, 0] = bos
    return x, y


def one_step(loss_of, model, master, batch):
    """Loss of a batch; its clipped gradients lie in the master copy."""
    with torch.no_grad():
        for p, q in zip(model.parameters(), master.values()):
            p.copy_(q)
    loss = loss_of(*batch)
    loss.backward()
    for p, q in zip(model.parameters(), master.values()):
        q.grad, p.grad = p.grad.float(), None
    torch.nn.utils.clip_grad_norm_(master.values(), 1.0)
    return loss.item()


def train_model(model, master, tokens, bos, steps, checkpoint):
    """Train to the end, from where `checkpoint` stopped; seconds in all."""
    started, (optimizers, peaks) = time.time(), optimizers_of(master)
    first, seconds = restore(checkpoint, master, optimizers)
    loss_of = torch.compile(
        lambda x, y: F.cross_entropy(model(x).float().flatten(0, 1), y.flatten()), dynamic=False
    )
    count = sum(p.numel() for p in master.values())
    print(f"{count:,} parameters, {len(tokens):,} tokens, {steps} steps from {first}", flush=True)
    bar, mean = tqdm(range(first, steps), initial=first, total=steps, mininterval=10), None
    for step in bar:
        loss = one_step(loss_of, model, master, batch_of(tokens, step, steps, bos))
        for optimizer, peak in zip(optimizers, peaks):
            optimizer.param_groups[0]["lr"] = peak * learning_rate(step, steps)
            optimizer.step()
        mean = loss if mean is None else 0.98 * mean + 0.02 * loss
        bar.set_postfix(loss=f"{mean:.3f}", refresh=False)
        if step % 100 == 99 or step == steps - 1:
            save(checkpoint, master, optimizers, step + 1, seconds + time.time() - started)
    return seconds + time.time() - started


def main():
    a = arguments()
    a.out.mkdir(parents=True, exist_ok=True)
    train, held_out = "".join(stdlib_files(False)), "".join(stdlib_files(True))
    sp, tokens = encoded(a.out, train, held_out)
    model, master = begin()
    checkpoint = a.out / "training.safetensors"
    seconds = train_model(model, master, tokens, sp.bos_id(), a.steps, checkpoint)
    write_model(a.out, master, sp)
    checkpoint.unlink()
    model, tokenizer = load_llama(a.out, dtype=torch.bfloat16)
    ids, size = torch.tensor(tokenizer.encode(held_out)), len(held_out.encode())
    bits = bits_per_byte(model, ids, size, tokenizer.bos_id, 512)
    print(
        f"wrote {a.out}: {bits:.4f} bits per byte on {size} held-out bytes of Python"
        f" {platform.python_version()}; {seconds / 60:.0f} minutes"
    )
    print("next: python train.py, then copy out/tiny/stratnet.safetensors here")


if __name__ == "__main__":
    run(main)
