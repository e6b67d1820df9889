"""
How much memory loading takes: a sharded checkpoint with random weights is written, then loaded in a
process of its own.

Run       python checks/load_memory.py --gigabytes 3          (ends with one line: peak, weights,
          largest shard)
Must hold peak of resident memory, above that of the imports, at most the weights, the largest shard
(it is memory-mapped) and 0.1 GB.
Linux only: reads /proc/self/status.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch
from safetensors.torch import save_file

from llama import Config, Llama, load_llama
from script import TINY


def resident(field):
    return 1024 * int(re.search(rf"{field}:\s+(\d+)", Path("/proc/self/status").read_text())[1])


def write(folder, size, shards):
    """A bfloat16 Llama of about `size` bytes in `shards` files, one tensor in memory at a time but
    for its shard.
    """
    width, vocab, feed = 2048, 4096, 5632
    block = 2 * (4 * width * width + 3 * width * feed)
    blocks = max(shards, round(size / block))
    config = {
        "model_type": "llama",
        "vocab_size": vocab,
        "hidden_size": width,
        "intermediate_size": feed,
        "num_hidden_layers": blocks,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": True,
    }
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.model", "tokenizer_config.json"):
        (folder / name).write_bytes((TINY / name).read_bytes())
    with torch.device("meta"):
        shapes = {
            n: p.shape for n, p in Llama(Config.read(folder / "config.json")).named_parameters()
        }
    names, index = list(shapes), {}
    for i in range(shards):
        part = names[len(names) * i // shards : len(names) * (i + 1) // shards]
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        save_file({n: torch.randn(shapes[n]).mul_(0.02).bfloat16() for n in part}, folder / file)
        index |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))


def main():
    p = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    p.add_argument("--gigabytes", type=float, default=3.0, help="size of the checkpoint (3)")
    p.add_argument("--shards", type=int, default=6, help="files it is split into (6)")
    p.add_argument("--load", type=Path, help=argparse.SUPPRESS)
    a = p.parse_args()
    if a.load:
        before = resident("VmRSS")
        model, _ = load_llama(a.load, dtype=torch.bfloat16)
        weights = sum(p.numel() * p.element_size() for p in model.parameters())
        shard = max(f.stat().st_size for f in a.load.glob("*.safetensors"))
        extra = resident("VmHWM") - before
        print(
            f"peak {extra / 1e9:.2f} GB above the imports; weights {weights / 1e9:.2f} GB,"
            f" largest shard {shard / 1e9:.2f} GB: "
            f"{'held' if extra <= weights + shard + 1e8 else 'MISSED'}"
        )
        sys.exit(extra > weights + shard + 1e8)
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder), a.gigabytes * 1e9, a.shards)
        sys.exit(subprocess.run([sys.executable, __file__, "--load", folder]).returncode)


if __name__ == "__main__":
    main()
