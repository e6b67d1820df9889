"""
How much memory the table of curvature takes beyond the model and its ranks, at the shape of
Llama-2-7B's blocks: one block's gradients, however many blocks there are.

Run       python checks/table_memory.py                 (2 minutes; ends with one line)
Must hold one block more adds less than a tenth of what one block's backward pass holds; ordering
          all weights of 7B at once would take 8 bytes for each, 52 GB.
Linux only: reads /proc/self/status and resets its peak. The vocabulary is small: the head's share
is not counted.
"""

import argparse
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch

from checks.load_memory import resident
from curvature import LEVELS, PASS_TOKENS, add_pass
from model import LINEARS, Config, Llama
from ranks import Pruner

VOCABULARY, WIDTH, FEED, HEADS = 1000, 4096, 11008, 32


def random_llama(blocks):
    """A Llama of 7B's width in bfloat16, its weights drawn."""
    config = Config(VOCABULARY, WIDTH, FEED, blocks, HEADS, HEADS, WIDTH // HEADS, 4096)
    with torch.device("meta"):
        model = Llama(config).to(torch.bfloat16)
    model = model.to_empty(device="cpu")
    for p in model.requires_grad_(False).parameters():
        p.normal_(std=0.02)
    return model


def measure(blocks):
    """Bytes at the peak of one backward pass, above what was resident before it."""
    model = random_llama(blocks)
    g = torch.Generator().manual_seed(0)
    windows = torch.randint(VOCABULARY, (1, PASS_TOKENS), generator=g)
    pruner = Pruner(model, windows)
    table = torch.zeros(blocks, len(LINEARS), LEVELS, dtype=torch.float64)
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
    add_pass(pruner, windows[0], g, table)
    assert (table[..., -1] > 0).all()
    return resident("VmHWM") - before


def main():
    p = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    p.add_argument("--blocks", type=int, help=argparse.SUPPRESS)
    a = p.parse_args()
    if a.blocks:
        return print(measure(a.blocks))
    words = [sys.executable, __file__, "--blocks"]
    one, three = (
        int(subprocess.run([*words, n], capture_output=True, text=True, check=True).stdout)
        for n in ("1", "3")
    )
    weights = 4 * WIDTH**2 + 3 * WIDTH * FEED
    held = (three - one) / 2 < one / 10
    print(
        f"a pass of {PASS_TOKENS} tokens holds {one / 1e9:.2f} GB with one block of"
        f" {weights / 1e6:.0f}M weights, {three / 1e9:.2f} GB with three:"
        f" {'held' if held else 'MISSED'}"
    )
    sys.exit(not held)


if __name__ == "__main__":
    main()
