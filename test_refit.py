"""
Refitted survivors: against the normal equations, on inputs that break a solver, end to end.

Run       pytest test_refit.py        (each tolerance has its dtype beside it)
"""

import itertools
import json
from types import SimpleNamespace as Namespace

import pytest
import torch
from safetensors.torch import load_file

import curvature
import prune
import ranks
import refit
from conftest import CPU, ROOT, call, random_model, relative, write_small
from eval import Divergence, draw, load_texts
from llama import load_llama, save_llama, stored_dtypes
from model import Block
from offload import offload_blocks
from patterns import pattern_masks
from ranks import Pruner, Survivors, keep_mask


def problem(rows=5, columns=12, tokens=200, seed=0):
    """W, mask, inputs x (tokens, columns) and targets y (tokens, rows)."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, columns, generator=g) @ torch.randn(columns, columns, generator=g)
    W, y = torch.randn(rows, columns, generator=g), torch.randn(tokens, rows, generator=g)
    return W, torch.rand(rows, columns, generator=g) > 0.5, x, y


def solved(W, kept, H, C, steps=refit.STEPS):
    normal = refit.Normal(H.clone(), C.clone(), 1, steps=steps, lead=1.0)
    return normal.solve(W, kept, torch.float32)


def chosen_mask(W, H, drop):
    """Of `drop` weights a row, int or (d_out,), aiming at W's own outputs."""
    counts = torch.as_tensor(drop).expand(len(W))
    return refit.Normal(H.clone(), H.clone(), group=0).solve(W, counts, torch.float32) != 0


def test_enough_steps_solve_the_normal_equations_of_every_row_exactly():
    W, kept, x, y = problem()
    H, C = x.T @ x, y.T @ x
    V = solved(W, kept, H, C, steps=60)
    lam = refit.DAMPING * H.diagonal()
    for row in range(len(W)):
        k = kept[row]
        A = (H + lam.diag())[k][:, k].double()
        b = (C + lam * W)[row, k].double()
        assert relative(V[row, k].double(), torch.linalg.solve(A, b)) < 1e-4  # float32
    assert (V[~kept] == 0).all() and not V[~kept].signbit().any()


@pytest.mark.parametrize("group", [0, 1])
def test_the_target_leads_from_the_dense_weights_outputs_to_the_dense_models(group):
    W, kept, x, y = problem()
    y = x + 0.3 * y[:, :1] if group == 0 else y  # the dense model's inputs
    H, C = x.T @ x, y.T @ x
    ends = [(x @ W.T).T @ x, W @ C if group == 0 else C]
    wanted = [solved(W, kept, H, end, steps=60) for end in ends]
    for lead in (0.0, 0.3, refit.LEAD, 1.0):
        normal = refit.Normal(H.clone(), C.clone(), group, steps=60, lead=lead)
        V = normal.solve(W, kept, torch.float32)
        assert relative(V, wanted[0] + lead * (wanted[1] - wanted[0])) < 1e-4  # float32


@pytest.mark.parametrize("columns", [1, 3, 4, 97])
def test_the_product_by_panels_is_symmetric_and_the_whole_product(columns):
    x = torch.randn(50, columns, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    H = refit.gram(x)
    assert torch.equal(H, H.T) and relative(H, x.T @ x) < 1e-15  # float64


def test_the_default_steps_lose_at_most_3_percent_of_what_the_exact_solution_gains():
    W, kept, x, y = problem(24, 48, 400, seed=1)
    y = x @ W.T  # the dense outputs
    H, C = x.T @ x, y.T @ x
    error = lambda V: float(((x @ V.T - y) ** 2).sum())
    masked, ours = error(W * kept), error(solved(W, kept, H, C))
    exact = error(solved(W, kept, H, C, steps=400))
    assert exact < ours < masked and masked - ours > 0.97 * (masked - exact)


def damped(H):
    return (H + refit.DAMPING * H.diagonal().diag()).double()


def layer_error_of(H, W, V):
    """tr (V - W) H (V - W)^T, damped, float64."""
    moved = (V - W).double()
    return float((moved @ damped(H) * moved).sum())


def layer_error(H, W, kept):
    """`layer_error_of` the damped least squares on `kept`, solved exactly."""
    A, V = damped(H), torch.zeros_like(W, dtype=torch.float64)
    for v, w, k in zip(V, W.double(), kept):
        v[k] = torch.linalg.solve(A[k][:, k], (A @ w)[k])
    return layer_error_of(H, W, V)


def best_mask(H, w, drop):
    """By brute force: of all masks of a row that drop `drop` weights, the one of least error."""
    places = itertools.combinations(range(len(w)), drop)
    masks = [torch.tensor([j not in gone for j in range(len(w))]) for gone in places]
    return min(masks, key=lambda kept: layer_error(H, w[None], kept[None]))


def test_without_correlation_the_chosen_mask_is_the_best_of_all_masks():
    g = torch.Generator().manual_seed(3)
    W, H = torch.randn(6, 7, generator=g), torch.diag(torch.rand(7, generator=g) + 0.1)
    for drop in (0, 1, 3, 6, 7):
        kept = chosen_mask(W, H, drop)
        assert ((~kept).sum(1) == drop).all()
        best = torch.stack([best_mask(H, w, drop) for w in W])
        assert torch.equal(kept, best)


@pytest.mark.parametrize("noise, of_best, of_wanda", [(0.05, 1.15, 0.85), (0, 1.3, 0.9)])
def test_among_correlated_inputs_the_chosen_mask_is_near_the_best_and_ahead_of_wanda(
    noise, of_best, of_wanda
):
    wanda, chosen, best = 0.0, 0.0, 0.0
    for seed in range(6):
        W, _, x, _ = problem(8, 8, 60, seed)
        H = x.T @ x
        H += noise * H.diagonal().mean() * torch.eye(8)  # of every input's own
        wanda += layer_error(H, W, keep_mask(ranks.wanda(W, H.diagonal().sqrt()), 0.5))
        chosen += layer_error(H, W, chosen_mask(W, H, 4))
        best += layer_error(H, W, torch.stack([best_mask(H, w, 4) for w in W]))
    # 1.10 and 0.83; without noise, where columns can stand in for one another, 1.25 and 0.87
    assert best < chosen < of_best * best and chosen < of_wanda * wanda


def test_rows_may_lose_different_counts_and_each_is_chosen_as_if_all_lost_as_many():
    W, _, x, _ = problem(6, 12)
    H = x.T @ x
    counts = torch.tensor([0, 3, 12, 5, 8, 3])
    kept = chosen_mask(W, H, counts)
    for row, count in enumerate(counts.tolist()):
        assert torch.equal(kept[row], chosen_mask(W, H, count)[row])
    V = refit.Normal(H.clone(), H.clone(), group=0).solve(W, counts, torch.float32)
    assert torch.equal(V != 0, kept)


def test_rows_lose_as_many_as_they_have_of_the_lowest_scores_worked_by_hand_and_sorted():
    score = torch.tensor([[3.0, 1.0, 2.0], [2.0, 0.5, 2.0], [9.0, 2.0, 0.0]])
    # 0, 0.5, 1, then four of 2, of which the first rows' go first
    expected = {0: [0, 0, 0], 3: [1, 1, 1], 4: [2, 1, 1], 6: [2, 3, 1], 7: [2, 3, 2], 9: [3, 3, 3]}
    for count, lost in expected.items():
        assert refit.lost_by_row(score, count).tolist() == lost
    many = torch.rand(40, 30, generator=torch.Generator().manual_seed(0)).mul(50).round()
    for count in (1, 77, 600, 1199):
        lowest = many.flatten().sort(stable=True).indices[:count]
        rows = (lowest // 30).bincount(minlength=40)
        assert torch.equal(refit.lost_by_row(many, count), rows)


def test_every_matrix_loses_what_its_strategy_says_most_where_outputs_matter_least(small):
    model, _ = load_llama(small)
    windows = torch.randint(3, 4096, (8, 64), generator=torch.Generator().manual_seed(1))
    pruner = Pruner(model, windows)
    g_norms = curvature.gradient_norms(pruner, windows)
    strategy = torch.linspace(0.2, 0.8, 3 * 7)
    counts = refit.row_counts(pruner, strategy, g_norms)
    alike = pruner.masks(strategy).counts()
    assert {name: int(c.sum()) for name, c in counts.items()} == {
        name: int(c.sum()) for name, c in alike.items()
    }
    for name, W in zip(sum(pruner.names, []), sum(pruner.dense, [])):
        weights = g_norms[name] ** refit.TEMPER
        score = W.abs() * torch.outer(weights, ranks.activation_norms(model, windows)[name])
        kept = score > score.flatten().sort().values[int(alike[name].sum()) - 1]
        assert torch.equal(counts[name], (~kept).sum(1))
        least = g_norms[name] < g_norms[name].median()
        assert counts[name][least].double().mean() > counts[name][~least].double().mean()
    refit.follow(pruner, counts, windows)
    assert pruner.zeros() == pytest.approx(pruner.sparsity(strategy), abs=1e-12)


def test_inputs_that_are_all_zero_or_few_leave_a_mask_of_the_right_count():
    W, _, x, _ = problem()
    for rank in (0, 1, 5):
        x[rank:] = 0
        H = x.T @ x
        assert ((~chosen_mask(W, H, 5)).sum(1) == 5).all()


@pytest.mark.parametrize("group", [0, 1])
def test_the_units_of_an_input_change_neither_which_weights_go_nor_what_the_others_do(group):
    W, kept, x, y = problem(6, 12)
    # so a weight that this text hardly uses is kept or lost as any other
    units = torch.tensor([2.0, 1, 0.25, 1, 4, 1, 1, 0.5, 1, 4, 1, 0.25])
    for wish in (kept, torch.full((6,), 5)):
        plain, other = (
            refit.Normal(x.T @ x, (x if group == 0 else y).T @ x, group).solve(W, wish, W.dtype)
            for x, W in ((x, W), (x * units, W / units))
        )
        assert torch.equal(other * units, plain)


def by_the_textbook(W, kept, H, C):
    """Conjugate gradients as one writes them first: in the units of W, from C - V H, and with a
    preconditioner, the power of four that is nearest to the diagonal of H."""
    tiny, lam = torch.finfo(torch.float32).tiny, refit.DAMPING * H.diagonal()
    H = H + lam.diag()
    inverse, V = 4.0 ** -(H.diagonal().log2() / 2).round(), W * kept
    residual = (C + lam * W - V @ H) * kept
    direction = residual * inverse
    energy = (residual * direction).sum(1, keepdim=True)
    for _ in range(refit.STEPS):
        product = direction @ H * kept
        length = energy / (direction * product).sum(1, keepdim=True).clamp(min=tiny)
        V, residual = V + length * direction, residual - length * product
        scaled, before = residual * inverse, energy
        energy = (residual * scaled).sum(1, keepdim=True)
        direction = scaled + energy / before.clamp(min=tiny) * direction
    return torch.where(kept, V, 0)


@pytest.mark.parametrize("group", [2, 3])
@pytest.mark.parametrize("columns", [3, 97, 300])
def test_sums_in_place_have_the_bits_of_those_with_copies_and_solutions_are_the_textbooks(
    group, columns, monkeypatch
):
    W, kept, x, y = problem(40, columns, 256)
    xs = x.view(4, 1, 64, columns)  # 4 batches
    targets = y.view(4, 1, 64, 40) if group % 2 else xs * 0.9
    weight = torch.linspace(0.5, 2, 64)[:, None]  # of each token's equation
    wanted = [
        Namespace(targets=[None] * 3 + [t], take=lambda *_, t=t: (t[0], weight)) for t in targets
    ]
    H, C = refit.normal_equations([iter([(x, None)]) for x in xs], wanted, group, None)
    upper = sum(refit.gram(x[0] * weight).triu() for x in xs)
    assert torch.equal(H, upper + upper.triu(1).T)
    assert torch.equal(C, sum(t[0].T @ (x[0] * weight) for x, t in zip(xs, targets)))
    exact = W.double(), kept, H.double(), (C if group % 2 else W @ C).double()
    plain = by_the_textbook(*exact)  # float64: what follows is within float32 of it
    H0, normal = H.clone(), refit.Normal(H, C, group, lead=1.0)
    assert relative(normal.solve(W, kept, torch.float32), plain) < 1e-5  # float32
    monkeypatch.setattr(refit, "SOLVED", 7 * columns)  # 7 rows at once
    assert relative(normal.solve(W, kept, torch.float32), plain) < 1e-5  # float32
    half = torch.full((40,), columns // 2)
    whole = normal.solve(W, half, torch.float32)
    monkeypatch.undo()
    pieces = normal.solve(W, half, torch.float32)
    same = ((pieces != 0) == (whole != 0)).all(1)  # rounding may decide between two weights
    assert same.sum() >= 38 and relative(pieces[same], whole[same]) < 1e-5  # of 40; float32
    one, other = (layer_error_of(H0, W, V) for V in (pieces, whole))
    assert abs(one / other - 1) < 1e-4  # and what it decides costs the same


@pytest.mark.parametrize("counted", [False, True])
def test_products_in_bfloat16_gain_what_those_in_float32_do_massive_activations_included(counted):
    W, kept, x, _ = problem(48, 64, 600)
    x[:, 5] *= 1000  # as the first token of a Llama has them: in bfloat16, H alone is not definite
    H, wish = x.T @ x, torch.full((48,), 32) if counted else kept
    assert torch.linalg.eigvalsh(H.bfloat16().double())[0] < 0
    errors = []
    for products in (torch.float32, torch.bfloat16):
        normal = refit.Normal(H.clone(), H.clone(), 0, products)
        V = normal.solve(W, wish, torch.float32)
        errors.append(layer_error_of(H, W, V))
    masked = W * kept if not counted else W * keep_mask(ranks.wanda(W, x.norm(dim=0)), 0.5)
    gain = layer_error_of(H, W, masked) - errors[0]
    assert gain > 0 and abs(errors[1] - errors[0]) < 0.01 * gain  # bfloat16: 2^-9 a product


def test_a_row_that_rounding_left_without_curvature_stays_where_it_is():
    V, kept = torch.ones(2, 2), torch.tensor([[True, True], [True, False]])
    H = torch.tensor([[1.0, -2.0], [-2.0, 1.0]])  # indefinite: the direction (1, 1) has none
    R = torch.tensor([[1.0, 1.0], [0.0, 0.0]])
    moved, _ = refit.conjugate_gradients(V.clone(), R, kept, H, 3)
    assert moved.tolist() == [[1, 1], [-1, 0]]  # the other: R becomes -2 where (0, 1) goes


@pytest.mark.parametrize("rank", [0, 1, 5])
def test_a_singular_h_and_inputs_that_are_all_zero_are_no_exception(rank):
    W, kept, x, y = problem()
    x[rank:] = 0
    V = solved(W, kept, x.T @ x, y.T @ x)
    assert V.isfinite().all() and (V[~kept] == 0).all()
    if rank == 0:
        assert torch.equal(V, torch.where(kept, W, 0))


def test_a_row_that_float16_cannot_hold_keeps_its_old_values_and_the_others_move():
    W = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    V = torch.tensor([[1e5, 0.0, 2.0], [7.0, 0.0, 8.0]])
    assert refit.storable(V, W, torch.float16).tolist() == [[1, 0, 3], [7, 0, 8]]
    assert refit.storable(V, W, torch.float32).tolist() == V.tolist()


@pytest.mark.parametrize("counted", [False, True])
def test_a_row_whose_sums_overflow_keeps_its_old_values_on_a_mask_of_its_count(counted):
    W, _, x, _ = problem()
    W[1] *= 1e38
    H, kept = x.T @ x, torch.arange(12).expand_as(W) >= 5
    wish = torch.full((5,), 5) if counted else kept
    V = refit.Normal(H.clone(), H.clone(), 0).solve(W, wish, torch.float32)
    assert V.isfinite().all() and ((V == 0).sum(1) == 5).all()
    assert torch.equal(V[1], torch.where(V[1] != 0, W[1], 0))


def test_an_error_counts_by_its_share_of_the_stream_that_it_is_written_into():
    model = random_model()
    block, rotary = model.blocks[0], model.rotary(8)
    h = torch.randn(2, 8, 64, generator=torch.Generator().manual_seed(0))
    h[:, 0] *= 1000  # a massive activation
    wanted = refit.Wanted(block, h, rotary)
    (_, _), (o_in, before_o), (_, after_o), (down_in, before_down), (_, after) = block.walk(
        h, rotary
    )
    for group, x, before, written in (
        (1, o_in, before_o, after_o),
        (3, down_in, before_down, after),
    ):
        y, weight = wanted.take(group, before, None)
        size = written.norm(dim=-1, keepdim=True) / 8  # of 64 numbers
        assert relative(1 / weight, size.flatten(0, 1)) < 1e-6  # float32
        assert relative(y, ((written - before) / size).flatten(0, 1)) < 1e-5  # float32
    y, weight = refit.Wanted(block, h, rotary).take(2, after_o, None)
    assert torch.equal(y, block.post_attention_layernorm(after_o).flatten(0, 1)) and weight == 1


def test_a_block_is_its_four_steps_and_each_yields_the_input_of_its_linears():
    model = random_model()
    block, rotary = model.blocks[0], model.rotary(8)
    assert isinstance(block, Block)
    h = torch.randn(2, 8, 64, generator=torch.Generator().manual_seed(0))
    seen = {}
    for name in ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj"):
        hook = lambda module, args, name=name: seen.update({name: args[0]})
        block.get_submodule(name).register_forward_pre_hook(hook)
    output = block(h, rotary)
    *steps, last = block.walk(h, rotary)
    assert all(torch.equal(x, y) for (x, _), y in zip(steps, seen.values()))
    assert last[0] is None and torch.equal(last[1], output)


@pytest.mark.parametrize("family", ["llama", "qwen2", "biases"])
@pytest.mark.parametrize("pattern", [None, (2, 4), (4, 8)])
def test_on_its_own_windows_a_refit_lowers_kl_and_keeps_masks_and_counts(tmp_path, family, pattern):
    more = {
        "llama": {},
        "qwen2": {"model_type": "qwen2", "tie_word_embeddings": False},
        "biases": {"attention_bias": True, "mlp_bias": True},
    }
    model, _ = load_llama(write_small(tmp_path / "model", **more[family]))
    windows = torch.randint(3, 4096, (16, 64), generator=torch.Generator().manual_seed(1))
    divergence, pruner = Divergence(model, windows), Pruner(model, windows)
    strategy = [0.5, 0.4, 0.5]
    masks = pattern_masks(pruner, strategy, *pattern) if pattern else pruner.masks(strategy)
    pruner.apply_masks(masks)
    before = divergence()
    values = refit.follow(pruner, masks, windows)
    assert values.keys() == set(masks) and divergence() < 0.8 * before
    live = dict(model.named_parameters())
    for name, V in values.items():
        assert torch.equal(live[name], V) and (V[~masks[name]] == 0).all()
        assert not V[~masks[name]].signbit().any() and (V[masks[name]] != 0).float().mean() > 0.99
    for name, W in zip(pruner.names[0], pruner.dense[0]):
        assert name in masks or torch.equal(live[name], W)
    pruner.restore()
    assert divergence() == 0


@pytest.mark.parametrize("family", ["qwen2", "biases"])
def test_where_nothing_goes_a_refit_gives_every_matrix_back_biases_or_not(tmp_path, family):
    more = {
        "qwen2": {"model_type": "qwen2", "tie_word_embeddings": False},  # biases of q, k and v
        "biases": {"attention_bias": True, "mlp_bias": True},
    }
    model, _ = load_llama(write_small(tmp_path / "model", **more[family]))
    biases = [p for name, p in model.named_parameters() if name.endswith("_proj.bias")]
    assert len(biases) == {"qwen2": 3 * 3, "biases": 3 * 7}[family]
    assert all(bias.abs().mean() > 0.5 for bias in biases)
    windows = torch.randint(3, 4096, (8, 64), generator=torch.Generator().manual_seed(1))
    pruner = Pruner(model, windows)
    keep_all = pruner.masks([0.0] * 3)
    values = refit.follow(pruner, keep_all, windows, lead=1.0)
    for names, block in zip(pruner.names, pruner.dense):
        for name, W in zip(names, block):
            assert relative(values[name], W) < 1e-4, name  # float32


def test_transformers_computes_from_a_refitted_folder_what_the_refitted_model_did(tmp_path, tokens):
    transformers = pytest.importorskip("transformers")
    source, out = write_small(tmp_path / "source", dtype=torch.bfloat16), tmp_path / "out"
    model, _ = load_llama(source)  # in float32: values are rounded to bfloat16 before they are used
    pruner = Pruner(model, tokens)
    wishes = pruner.masks([0.3, 0.5, 0.6]).counts()
    values = refit.follow(pruner, wishes, tokens, stored_dtypes(source))
    save_llama(model, out, source, Survivors(values), values=values)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    with torch.no_grad():
        logits = theirs(tokens).logits
        assert relative(model(tokens), logits) < 1e-4  # float32
        assert relative(load_llama(out)[0](tokens), logits) < 1e-4


def test_offloaded_blocks_are_refitted_bit_for_bit_like_resident_ones(small):
    windows = torch.randint(3, 4096, (8, 64), generator=torch.Generator().manual_seed(1))
    results = []
    for offloaded in (False, True):
        model, _ = load_llama(small)
        if offloaded:
            offload_blocks(model, "cpu")
        divergence, pruner = Divergence(model, windows), Pruner(model, windows)
        values = refit.follow(pruner, pruner.masks([0.3, 0.5, 0.6]), windows)
        results.append((divergence.measure(), values))
    (kl, one), (kl_, two) = results
    assert kl == kl_ and all(torch.equal(one[name], two[name]) for name in one)


def test_prune_refits_by_default_stores_the_sources_dtype_and_packed_is_plain(text, tmp_path):
    source = write_small(tmp_path / "source", dtype=torch.float16)
    words = ("--model", source, "--data", text, "--seqlen", 64, "--calibration", 8)
    words = (*words, "--tokens", 128, "--uniform", "--sparsity", 0.5, *CPU)
    ways = {"plain": ["--keep-masks"], "packed": ["--packed", "--keep-masks"]}
    ways |= {"kept": ["--no-refit"], "chosen": [], "chosen-packed": ["--packed"]}
    for name, more in ways.items():
        assert call(prune, *words, "--out", tmp_path / name, *more) == 0
    plain, packed = (load_llama(tmp_path / name)[0].state_dict() for name in ("plain", "packed"))
    assert all(torch.equal(plain[n], packed[n]) for n in plain)
    chosen, packed = (load_llama(tmp_path / f"chosen{n}")[0].state_dict() for n in ("", "-packed"))
    assert all(torch.equal(chosen[n], packed[n]) for n in chosen)
    up = "model.layers.1.mlp.up_proj.weight"
    assert (chosen[up] == 0).sum() == (plain[up] == 0).sum()
    assert (chosen[up] == 0).sum(1).unique().numel() > 1 == (plain[up] == 0).sum(1).unique().numel()
    assert not chosen[up].signbit()[chosen[up] == 0].any()
    dense, kept, moved = (
        load_file(tmp_path / name / "model.safetensors") for name in ("source", "kept", "plain")
    )
    for name in kept:
        assert moved[name].dtype == torch.float16
        if name.endswith("_proj.weight"):
            assert torch.equal(moved[name] == 0, kept[name] == 0)
            assert torch.equal(kept[name], torch.where(kept[name] != 0, dense[name], 0))
            assert not torch.equal(moved[name], kept[name])
        else:
            assert torch.equal(moved[name], dense[name])
    records = {n: json.loads((tmp_path / n / "strategy.json").read_text()) for n in ways}
    assert records["plain"]["refitted"] and not records["kept"]["refitted"]
    assert all(record["counted"] == 0.5 for record in records.values())
    masks = [records[n]["masks"] for n in ("plain", "kept", "chosen")]
    assert masks == ["ranked", "ranked", "chosen by the refit"]


@pytest.mark.slow
def test_on_unseen_text_a_refit_halves_the_kl_of_uniform_pruning_on_tiny():
    model, tokenizer = load_llama(ROOT / "tiny")
    windows, held_out = load_texts(tokenizer, None, None, 512)
    (calibration,) = draw(windows, [16], 0)
    unseen = next(iter(held_out.values()))[:8]
    divergence, pruner = Divergence(model, unseen), Pruner(model, calibration)
    pruner.apply([0.6] * 12)
    before = divergence()
    refit.follow(pruner, pruner.masks([0.6] * 12), calibration)
    assert divergence() < 0.55 * before


@pytest.mark.slow
def test_rows_weighed_by_their_gradients_have_less_kl_on_unseen_text_than_rows_alike():
    model, tokenizer = load_llama(ROOT / "tiny")
    windows, held_out = load_texts(tokenizer, None, None, 512)
    (calibration,) = draw(windows, [16], 0)
    divergence = Divergence(model, next(iter(held_out.values()))[:8])
    pruner, strategy = Pruner(model, calibration), [0.6] * 12
    g_norms = curvature.gradient_norms(pruner, calibration)
    found = []
    for counts in (pruner.masks(strategy).counts(), refit.row_counts(pruner, strategy, g_norms)):
        refit.follow(pruner, counts, calibration)
        found.append(divergence())
    assert found[1] < 0.85 * found[0]
