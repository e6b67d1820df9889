"""
One whole small example, from a wish to a file, to be read like a tutorial: run it with  pytest test_walkthrough.py -s

The steps are those of a user of prune.py, taken one by one with the functions that it calls. The model is tiny/.
"""
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from eval import Divergence, draw, load_texts
from llama import load_llama, pack, save_llama, unpack
from prune import LINEARS, Pruner
from train import search
from unicuco import strategy_for
from wishes import parse_request

ROOT = Path(__file__).parent


def test_the_walk_from_a_wish_to_a_smaller_file(tmp_path):
    # 1. A model, and text: some windows to calibrate on, some to search on, some that nothing is ever chosen on.
    model, tokenizer = load_llama(ROOT / "tiny")
    text = tmp_path / "text.py"
    text.write_text((ROOT / "llama.py").read_text() + (ROOT / "prune.py").read_text())
    windows, held_out = load_texts(tokenizer, text, None, seqlen=64)
    calibration, searching = draw(windows, [16, 4], seed=0)
    unseen = next(iter(held_out.values()))

    # 2. Rank every weight once. From here on a strategy, one sparsity for each of the 12 blocks, is one comparison away.
    pruner = Pruner(model, calibration)
    half = [0.5] * 12
    assert pruner.sparsity(half) == 0.5                         # 192 and 512 columns: half of a row is a whole number

    # 3. f2 is the KL from the dense model. Pruning one block hurts more or less, and that is all there is to exploit.
    f2 = Divergence(model, searching)
    assert f2() == 0

    def measure(strategies):
        values = []
        for x in strategies:
            pruner.apply(x)
            values.append(f2())
        return values

    first, sixth = measure([torch.eye(12)[0] * 0.8, torch.eye(12)[6] * 0.8])
    print(f"\nKL with only block 1 pruned to 0.8: {first:.4f}; only block 7: {sixth:.4f}")

    # 4. Algorithm 1 learns f2 with a Gaussian process and trains StratNet on it. (A short search, for a short test.)
    net, scale, gp, log = search(measure, 12, initial=20, rounds=4, batch=3, steps=100, final_steps=400)
    asked = [e for e in log if e["predicted"]]
    print("predicted and measured KL:", ", ".join(f"{e['predicted']:.3f} {e['measured']:.3f}" for e in asked[-3:]))

    # 5. A wish. StratNet answers at once, and the answer is shifted until it counts exactly what uniform pruning would.
    wish = parse_request({"sparsity": 0.6, "name": "phone"})
    strategy = strategy_for(net, wish["value"], pruner.sparsity)
    assert abs(pruner.sparsity(strategy) - pruner.sparsity([0.6] * 12)) <= 1 / (12 * 192)
    ours, uniform = measure([strategy, [0.6] * 12])
    assert ours < uniform                                       # on the text of the search

    # 6. And on text that nothing saw? Print it; a test may not promise it for so short a search.
    pruner.restore()
    f2 = Divergence(model, unseen)
    print("KL on unseen text: StratNet {:.3f}, uniform {:.3f}".format(*measure([strategy, [0.6] * 12])))

    # 7. Write it twice: as any tool reads it, zeros and all; and packed, a bit for each weight and the survivors.
    masks = pruner.masks(strategy)
    save_llama(model, tmp_path / "plain", ROOT / "tiny", masks)
    save_llama(model, tmp_path / "packed", ROOT / "tiny", masks, packed=True)
    plain, packed = (load_llama(tmp_path / name)[0].state_dict() for name in ("plain", "packed"))
    assert all(torch.equal(plain[n], packed[n]) for n in plain)
    dense, small = ((tmp_path / name / "model.safetensors").stat().st_size for name in ("plain", "packed"))
    print(f"{dense:,} bytes plain, {small:,} packed")
    assert small < 0.6 * dense


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(1, 1), (3, 8), (5, 13), (4, 64), (2, 1000)])
def test_packing_gives_back_every_bit_empty_rows_and_negative_zeros_included(shape, dtype):
    g = torch.Generator().manual_seed(0)
    W = torch.randn(shape, generator=g).to(dtype)
    W[0, 0] = -0.0
    for sparsity in (0.0, 0.5, 1.0):
        kept = torch.rand(shape, generator=g) >= sparsity
        kept[-1] = sparsity == 0.0
        mask, values = pack(W, kept)
        assert mask.shape == (shape[0], -(-shape[1] // 8)) and values.shape == (int(kept.sum()),)
        back, bits = unpack(mask, values, shape[1]), torch.int16 if W.element_size() == 2 else torch.int32
        assert torch.equal(back.view(bits), torch.where(kept, W.view(bits), 0))
    with pytest.raises(ValueError, match="values are there"):
        unpack(mask, torch.zeros(1 + len(values), dtype=dtype), shape[1])


def test_a_packed_file_of_another_version_or_with_half_of_a_matrix_is_refused(tmp_path):
    model, _ = load_llama(ROOT / "tiny")
    masks = Pruner(model, torch.randint(3, 4096, (2, 64))).masks([0.5] * 12)
    save_llama(model, tmp_path / "packed", ROOT / "tiny", masks, packed=True)
    file = tmp_path / "packed" / "model.safetensors"
    tensors, name = {k: v.clone() for k, v in load_file(file).items()}, "model.layers.3.mlp.up_proj.weight"      # not mapped from what is overwritten
    for flawed, metadata in ((tensors, {"unicuco_packed": "2"}), ({k: v for k, v in tensors.items() if k != name + ".kept"}, {}),
                             ({k: v for k, v in tensors.items() if k != name + ".mask"}, {}), ({**tensors, name + ".kept": tensors[name + ".kept"][1:].clone()}, {}),
                             ({**tensors, name: torch.zeros(512, 192)}, {})):
        save_file(flawed, file, metadata)
        with pytest.raises(ValueError, match="packed in a version|up_proj"):
            load_llama(tmp_path / "packed")


def test_a_packed_matrix_at_one_half_is_within_2_percent_of_the_floor(tmp_path):
    model, _ = load_llama(ROOT / "tiny")
    pruner = Pruner(model, torch.randint(3, 4096, (2, 64), generator=torch.Generator().manual_seed(0)))
    save_llama(model, tmp_path / "packed", ROOT / "tiny", pruner.masks([0.5] * 12), packed=True)
    with safe_open(tmp_path / "packed" / "model.safetensors", framework="pt") as f:
        stored = sum(f.get_tensor(n).nbytes for n in f.keys() if n.endswith((".mask", ".kept")))
    floor = sum(m.numel() * 2 for m in pruner.masks([0.5] * 12).values()) * (1 / 16 + 1 / 2)
    assert floor <= stored <= 1.02 * floor


@pytest.mark.parametrize("keep,group", [(2, 4), (4, 8)])
def test_semi_structured_masks_keep_the_best_of_every_group_in_the_blocks_that_are_pruned_most(keep, group):
    model, _ = load_llama(ROOT / "tiny")
    pruner = Pruner(model, torch.randint(3, 4096, (2, 64), generator=torch.Generator().manual_seed(0)))
    strategy = torch.linspace(0.1, 0.5, 12, dtype=torch.float64)                     # mean 0.3: ceil(2 * 12 * 0.3) = 8 blocks
    masks = pruner.pattern_masks(strategy, keep, group)
    assert {name.split(".")[2] for name in masks} == set(map(str, range(4, 12))) and len(masks) == 8 * len(LINEARS)
    assert pruner.counted(masks) == pytest.approx(8 / 24)
    for i, (names, ranks) in enumerate(zip(pruner.names[4:], pruner.ranks[4:])):
        for name, r in zip(names, ranks):
            best = r.view(len(r), -1, group).topk(keep, dim=-1).indices
            assert torch.equal(masks[name].view(len(r), -1, group).nonzero()[:, -1].view(best.shape), best.sort(-1).values.long())
    pruner.apply_masks(masks)
    assert all(((dict(model.named_parameters())[n] != 0) <= m).all() for n, m in masks.items())
    with pytest.raises(ValueError, match="half of a block"):
        pruner.pattern_masks([0.6] * 12, keep, group)


def test_prune_serves_wishes_of_every_kind_and_names_the_nearest_for_one_that_cannot_be_met(tmp_path):
    wishes = [{"sparsity": 0.3}, {"preference": 0.4, "name": "taste"}, {"max_kl": 0.1}, {"max_size": "7MB"}, {"name": "never", "max_size": "1MB"}]
    (tmp_path / "wishes.jsonl").write_text("\n".join(map(json.dumps, wishes)))
    done = subprocess.run([sys.executable, "prune.py", "--requests", tmp_path / "wishes.jsonl", "--packed", "--out", tmp_path / "out",
                           "--calibration", "8", "--tokens", "1024", "--json", tmp_path / "table.json"], cwd=ROOT, capture_output=True, text=True)
    table = {row["request"]: row for row in json.loads((tmp_path / "table.json").read_text())}
    assert done.returncode == 2 and "never" in done.stderr and "sparsity 0.9 has" in done.stderr and len(done.stderr.splitlines()) == 1
    assert "unmet" in table["never"] and not (tmp_path / "out" / "never").exists()
    assert 0.9 * 0.1 <= table["kl-0.1"]["kl"] <= 0.1
    assert 0.98 * 7e6 <= table["size-7MB"]["bytes"] <= 7e6
    for name in ("0.3", "taste", "kl-0.1", "size-7MB"):
        record = json.loads((tmp_path / "out" / name / "strategy.json").read_text())
        assert len(record["strategy"]) == 12 and record["kl"] == table[name]["kl"] and load_llama(tmp_path / "out" / name)
    for wrong in ({}, {"sparsity": 0.3, "max_kl": 1}, {"sparsity": "half"}, {"sparsity": 0.95}, {"max_kl": -1}, {"max_size": "9 parsecs"},
                  {"sparsity": 0.3, "name": "../up"}, {"sparsity": 0.3, "colour": 1}, [0.3], {"max_kl": float("nan")}):
        with pytest.raises(ValueError):
            parse_request(wrong)
