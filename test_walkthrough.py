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
from curvature import read_curves
from eval import draw, load_texts
from gp import CurvatureMean
from llama import load_llama, save_llama
from prune import F2
from ranks import Pruner
from request import parse_request
from unicuco import Layout, SearchSettings, search, strategy_for


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

    # 2. Rank every weight once. From here on a strategy, one sparsity for each of the 7 matrices of
    # the 12 blocks, is one comparison away.
    pruner = Pruner(model, calibration)
    half = [0.5] * 84
    assert pruner.sparsity(half) == 0.5  # 192 and 512 columns: half of a row is a whole number

    # 3. f2 is the KL from the dense model. Pruning one matrix hurts more or less, and that is all
    # there is to exploit. What it costs, 16 backward passes of the dense model say beforehand.
    f2 = F2(pruner, searching)
    assert f2([0.0] * 84) == 0
    curves = torch.stack(read_curves(pruner, calibration))
    known = CurvatureMean(*curves)
    for name, matrix in (("q of block 1", 0), ("down of block 7", 6 * 7 + 6)):
        alone = torch.eye(84, dtype=torch.float64)[matrix] * 0.6
        curve = float(known.terms(alone[None], known.p)[0][0, matrix].exp())
        print(f"\n{name} alone at 0.6: KL {f2(alone):.5f}, its curve says {curve:.5f}", end="")

    # 4. Algorithm 1 starts from those curves, learns with a Gaussian process what they do not know,
    # and trains StratNet on it. (A short search, for a short test.)
    layout = Layout(12, pruner.d_in * pruner.d_out)
    settings = SearchSettings(initial=16, rounds=2, batch=3)
    result = search(lambda batch: [f2(x) for x in batch], layout, settings, curves=curves)
    asked = [e for e in result.log if e["predicted"]]
    print(
        "\npredicted and measured KL:",
        ", ".join(f"{e['predicted']:.3f} {e['measured']:.3f}" for e in asked[-3:]),
    )

    # 5. A wish. StratNet answers at once, and the answer is shifted until it counts exactly what
    # uniform pruning would.
    wish = parse_request({"sparsity": 0.6, "name": "phone"})
    strategy = strategy_for(result.net, wish["value"], pruner.sparsity)
    assert abs(pruner.sparsity(strategy) - pruner.sparsity([0.6] * 84)) <= 1 / (12 * 192)
    assert f2(strategy) < 0.8 * f2([0.6] * 84)  # on the text of the search

    # 6. And on text that nothing saw? Print it; a test may not promise it for so short a search.
    f2 = F2(pruner, unseen)
    print(f"KL on unseen text: StratNet {f2(strategy):.3f}, uniform {f2([0.6] * 84):.3f}")
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
