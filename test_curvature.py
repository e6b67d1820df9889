"""
The table of damages: by hand, against a plain loop with autograd, against measured KL.

Run       pytest test_curvature.py        (each tolerance has its dtype beside it)
"""

import math

import pytest
import torch

import curvature
from conftest import ROOT, random_model, relative
from eval import Divergence, draw, load_texts
from llama import load_llama
from model import LINEARS
from offload import offload_blocks
from ranks import Pruner, keep_mask
from script import Refused


def test_dropped_sums_on_a_matrix_worked_by_hand(monkeypatch):
    monkeypatch.setattr(curvature, "LEVELS", 3)
    G = torch.tensor([[1.0, 2.0, 3.0], [0.5, -1.0, 2.0]])
    W = torch.tensor([[4.0, -1.0, 2.0], [2.0, 3.0, 1.0]])
    ranks = torch.tensor([[2, 0, 1], [0, 2, 1]], dtype=torch.int16)
    # row 0 loses -1 * 2, then 2 * 3, then 4 * 1; row 1 loses 2 * 0.5, then 1 * 2, then 3 * -1
    sums = curvature.dropped_sums(G, W, ranks)
    assert sums.tolist() == [[-2, 4, 8], [1, 3, 0]]
    # c_m of 5 tokens: (4 + 1) / 10, (16 + 9) / 10, (64 + 0) / 10
    assert curvature.damages(sums, 5).tolist() == [0.5, 2.5, 6.4]


def test_the_table_equals_autograd_on_the_whole_model_with_masks_applied_one_by_one():
    model = random_model()
    windows = torch.randint(3, 512, (2, 32), generator=torch.Generator().manual_seed(0))
    pruner = Pruner(model, windows)
    table = curvature.damage_table(pruner, windows, passes=1, tokens=32, seed=3)
    assert table.shape == (3, 7, curvature.LEVELS) and (table[..., 1:] >= 0).all()
    generator = torch.Generator().manual_seed(3)
    window = windows[torch.randperm(2, generator=generator)[0]]
    log_p = model(window[None])[0].log_softmax(-1)
    y = torch.multinomial(log_p.exp(), 1, generator=generator)
    for p in model.parameters():
        p.requires_grad_(True)
    model(window[None])[0].log_softmax(-1).gather(1, y).sum().backward()
    for i, block in enumerate(model.blocks):
        for j, name in enumerate(LINEARS):
            W = block.get_submodule(name).weight
            for level in (4, 8, 12):
                kept = pruner.ranks[i][j] >= level * W.shape[1] / curvature.LEVELS
                s = (W.grad * W * ~kept).sum(1)
                expected = float((s**2).sum() / (2 * 32))
                assert float(table[i, j, level - 1]) == pytest.approx(expected, rel=1e-4)  # float32


def test_gradients_at_outputs_are_those_that_autograd_gives_the_whole_model(small):
    model, _ = load_llama(small)
    windows = torch.randint(3, 4096, (1, 256), generator=torch.Generator().manual_seed(0))
    found = curvature.gradient_norms(Pruner(model, windows), windows, seed=3)  # one pass
    g = torch.Generator().manual_seed(3)
    (window,) = curvature.pieces_of(windows, g)
    seen = {}

    def record(name):
        def hook(module, inputs, outputs):
            seen[name] = outputs[0].flatten(0, 1).norm(dim=0)

        return hook

    for name, module in model.named_modules():
        if name.endswith("_proj"):
            module.register_full_backward_hook(record(name + ".weight"))
    log_p = model.requires_grad_(True)(window[None])[0].log_softmax(-1)
    y = torch.multinomial(log_p.detach().exp(), 1, generator=g)
    log_p.gather(1, y).sum().backward()
    assert found.keys() == seen.keys() and len(found) == 3 * 7
    assert all(relative(found[name], seen[name]) < 1e-4 for name in seen)  # float32


def test_offloaded_blocks_give_the_same_table_and_the_model_is_left_as_it_was():
    windows = torch.randint(3, 512, (2, 32), generator=torch.Generator().manual_seed(0))
    tables, norms = [], []
    for offloaded in (False, True):
        model = random_model()
        if offloaded:
            offload_blocks(model, "cpu")
        pruner = Pruner(model, windows)
        tables.append(curvature.damage_table(pruner, windows, passes=2, tokens=32))
        norms.append(torch.cat([*curvature.gradient_norms(pruner, windows).values()]))
        assert not any(p.requires_grad for p in model.parameters())
        assert all(
            torch.equal(a, b) for x, y in zip(pruner.live, pruner.dense) for a, b in zip(x, y)
        )
    assert torch.equal(*tables) and torch.equal(*norms)


def test_curves_fitted_to_a_table_of_their_own_form_are_found_again():
    t, q, r = torch.tensor([[-5.0, -2.0]]), torch.tensor([[1.5, 2.5]]), torch.tensor([[1.0, 4.0]])
    x = torch.arange(1, curvature.LEVELS + 1) / curvature.LEVELS
    table = (t[..., None] + q[..., None] * (x + 1e-3).log() + r[..., None] * x).exp().double()
    found = curvature.fit_curves(table)
    assert all(relative(a, b.double()) < 1e-5 for a, b in zip(found, (t, q, r)))  # float32 table
    assert all(v.isfinite().all() for v in curvature.fit_curves(table * 0))


@pytest.mark.slow
def test_damages_of_single_matrices_are_within_a_quarter_of_their_measured_kl_on_tiny():
    model, tokenizer = load_llama(ROOT / "tiny")
    windows, _ = load_texts(tokenizer, None, None, 512)
    calibration, measured_on = draw(windows, [32, 8], 0)
    pruner = Pruner(model, calibration)
    table = curvature.damage_table(pruner, calibration)
    divergence = Divergence(model, measured_on)
    gaps = []
    for i in (1, 4, 7, 10):
        for j in range(7):
            strategy = torch.zeros(12, 7, dtype=torch.float64)
            strategy[i, j] = 0.5
            pruner.apply(strategy)
            gaps.append(abs(math.log(float(table[i, j, 7]) / divergence())))
    pruner.restore()
    assert sorted(gaps)[len(gaps) // 2] < 0.25, gaps  # nats of log KL, the median


def test_ranks_and_levels_drop_the_same_weights_as_a_mask():
    score = torch.rand(5, 32, generator=torch.Generator().manual_seed(0))
    G, W = torch.randn(5, 32), torch.randn(5, 32)
    sums = curvature.dropped_sums(G, W, torch.argsort(torch.argsort(score)).short())
    for level in (1, 8, 15):
        gone = ~keep_mask(score, level / curvature.LEVELS)
        assert relative(sums[:, level - 1], (G * W * gone).sum(1).double()) < 1e-4  # float32


def test_curves_have_the_same_bits_wherever_in_memory_they_are_fitted():
    table = torch.rand(3, 7, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    first, kept = torch.stack(curvature.fit_curves(table)), []
    for size in range(1, 1500):
        kept = kept[-20:] + [torch.empty(size * 37 % 5000)]  # moves what is allocated next
        assert torch.equal(torch.stack(curvature.fit_curves(table.clone())), first)


@pytest.mark.parametrize("length", [64, 256, 384, 512])
def test_each_pass_reads_one_window_alone_and_costs_what_the_budgets_say(length):
    windows = torch.arange(6)[:, None].expand(6, length).contiguous()
    g = torch.Generator().manual_seed(0)
    pieces = curvature.pieces_of(windows, g)
    assert pieces.shape == (min(16, 6 * max(1, length // 256)), min(256, length))
    assert (pieces == pieces[:, :1]).all()
    assert curvature.cost_in_tokens(windows) == 4 * pieces.numel()


def test_sums_by_pieces_of_rows_are_those_of_the_whole_matrix_bit_for_bit(monkeypatch):
    g = torch.Generator().manual_seed(0)
    G, W = torch.randn(2, 11, 37, generator=g, dtype=torch.bfloat16)
    ranks = torch.rand(11, 37, generator=g).argsort(1).short()
    whole = curvature.dropped_sums(G, W, ranks)
    monkeypatch.setattr(curvature, "ROWS", 3)  # the last piece is shorter
    assert torch.equal(curvature.dropped_sums(G, W, ranks), whole)
    assert whole.shape == (11, curvature.LEVELS)
    dropped = ranks < 37 / 2  # level 8 of 16
    expected = (G.double() * W.double() * dropped).sum(1)
    assert torch.allclose(whole[:, 7], expected, rtol=1e-6, atol=1e-6)  # float32 sums


def test_gradients_that_overflow_are_refused_in_one_line(monkeypatch):
    windows = torch.randint(3, 512, (2, 32), generator=torch.Generator().manual_seed(0))
    pruner = Pruner(random_model(), windows)
    real = curvature.head_gradient
    monkeypatch.setattr(curvature, "head_gradient", lambda *a: real(*a) * math.inf)
    with pytest.raises(Refused, match="overflow in float32: try --dtype float32"):
        curvature.read_curves(pruner, windows)
