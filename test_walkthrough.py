"""
One whole small example, from a wish to a file, to be read like a tutorial: run it with  pytest
test_walkthrough.py -s

The steps are those of a user of prune.py, taken one by one with the functions that it calls. The
model is tiny/.

Run       pytest test_walkthrough.py        (each tolerance has its dtype beside it)
"""

import pytest
import torch

from conftest import ROOT
from eval import draw, load_texts
from llama import load_llama, save_llama
from prune import F2
from ranks import Pruner
from request import parse_request
from unicuco import SearchSettings, search, strategy_for


@pytest.mark.slow
def test_the_walk_from_a_wish_to_a_smaller_file(tmp_path):
    # 1. A model, and text: some windows to calibrate on, some to search on, some that nothing is
    # ever chosen on.
    model, tokenizer = load_llama(ROOT / "tiny")
    text = tmp_path / "text.py"
    text.write_text((ROOT / "llama.py").read_text() + (ROOT / "prune.py").read_text())
    windows, held_out = load_texts(tokenizer, text, None, seqlen=64)
    calibration, searching = draw(windows, [16, 4], seed=0)
    unseen = next(iter(held_out.values()))

    # 2. Rank every weight once. From here on a strategy, one sparsity for each of the 12 blocks, is
    # one comparison away.
    pruner = Pruner(model, calibration)
    half = [0.5] * 12
    assert pruner.sparsity(half) == 0.5  # 192 and 512 columns: half of a row is a whole number

    # 3. f2 is the KL from the dense model. Pruning one block hurts more or less, and that is all
    # there is to exploit.
    f2 = F2(pruner, searching)
    assert f2([0.0] * 12) == 0
    first, seventh = f2(torch.eye(12)[0] * 0.8), f2(torch.eye(12)[6] * 0.8)
    print(f"\nKL with only block 1 pruned to 0.8: {first:.4f}; only block 7: {seventh:.4f}")

    # 4. Algorithm 1 learns f2 with a Gaussian process and trains StratNet on it. (A short search,
    # for a short test.)
    settings = SearchSettings(initial=20, rounds=4, batch=3, steps=100, final_steps=400)
    result = search(lambda batch: [f2(x) for x in batch], 12, settings)
    asked = [e for e in result.log if e["predicted"]]
    print(
        "predicted and measured KL:",
        ", ".join(f"{e['predicted']:.3f} {e['measured']:.3f}" for e in asked[-3:]),
    )

    # 5. A wish. StratNet answers at once, and the answer is shifted until it counts exactly what
    # uniform pruning would.
    wish = parse_request({"sparsity": 0.6, "name": "phone"})
    strategy = strategy_for(result.net, wish["value"], pruner.sparsity)
    assert abs(pruner.sparsity(strategy) - pruner.sparsity([0.6] * 12)) <= 1 / (12 * 192)
    assert f2(strategy) < f2([0.6] * 12)  # on the text of the search

    # 6. And on text that nothing saw? Print it; a test may not promise it for so short a search.
    f2 = F2(pruner, unseen)
    print(f"KL on unseen text: StratNet {f2(strategy):.3f}, uniform {f2([0.6] * 12):.3f}")
    f2(strategy)  # the model is that of the strategy again

    # 7. Write it twice: as any tool reads it, zeros and all; and packed, a bit for each weight and
    # the survivors.
    masks = pruner.masks(strategy)
    save_llama(model, tmp_path / "plain", ROOT / "tiny", masks)
    save_llama(model, tmp_path / "packed", ROOT / "tiny", masks, packed=True)
    plain, packed = (load_llama(tmp_path / name)[0].state_dict() for name in ("plain", "packed"))
    assert all(torch.equal(plain[n], packed[n]) for n in plain)
    dense = (tmp_path / "plain" / "model.safetensors").stat().st_size
    small = (tmp_path / "packed" / "packed.safetensors").stat().st_size
    print(f"{dense:,} bytes plain, {small:,} packed")
    assert small < 0.6 * dense
