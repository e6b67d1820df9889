"""
Scores, ranks, masks and counts: worked by hand, by property, and on the command line.

Run       pytest test_prune.py        (each tolerance has its dtype beside it)
"""

import argparse
import json
import math
import os
import re
import shutil
import subprocess
import sys
import threading
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import curvature
import eval as evaluation
import prune
import ranks
import refit
import request
import script
import unicuco
from conftest import (
    CPU,
    ROOT,
    call,
    random_model,
    random_net,
    refuses,
    relative,
    run_script,
    seeds,
    spied,
    steady,
    write_small,
)
from eval import Divergence
from llama import load_llama, save_llama
from model import LINEARS
from offload import offload_blocks
from patterns import pattern_masks
from ranks import METRICS, Pruner, keep_mask, rank


def test_wanda_differs_from_magnitude_on_a_case_worked_by_hand():
    W, x_norm = torch.tensor([[3.0, -1.0, 2.0], [1.0, 4.0, -1.0]]), torch.tensor([1.0, 5.0, 1.0])
    # scores [[3, 5, 2], [1, 20, 1]]: row 0 loses the 2 (magnitude would lose the -1); row 1 ties,
    # the first column goes
    assert keep_mask(METRICS["wanda"](W, x_norm), 1 / 3).int().tolist() == [[1, 1, 0], [0, 1, 1]]
    assert keep_mask(METRICS["magnitude"](W, x_norm), 1 / 3).int().tolist() == [
        [1, 0, 1],
        [0, 1, 1],
    ]


def test_the_kth_lowest_of_several_tensors_is_that_of_all_of_them_sorted():
    g = torch.Generator().manual_seed(0)
    pieces = [torch.rand(3, 50, generator=g) ** 8, torch.zeros(2, 4), torch.full((40,), 0.5)]
    pieces.append(torch.tensor([torch.inf, 1e-45, 3e38, 0.5]))  # a subnormal, and no number above
    together = torch.cat([piece.flatten() for piece in pieces]).sort().values
    for k in range(1, len(together) + 1):
        found = ranks.kth_lowest(lambda: iter(pieces), k)
        assert found.dtype == torch.float32 and found == together[k - 1], k  # exactly


def test_masks_drop_exact_counts_in_stable_order_and_are_nested():
    score = (
        torch.randn(7, 100, generator=torch.Generator().manual_seed(0)).abs() * 4
    ).round()  # many ties
    order = score.argsort(dim=1, stable=True)
    assert torch.equal(rank(score).long().gather(1, order), torch.arange(100).expand(7, -1))
    previous = torch.ones(7, 100, dtype=torch.bool)
    for k in range(100):
        mask = keep_mask(score, k / 100)
        assert ((~mask).sum(1) == k).all() and not (mask & ~previous).any()
        previous = mask
    assert keep_mask(score, 0.9999).sum(1).tolist() == [1] * 7
    for wrong in (1.0, -0.1, math.nan):
        with pytest.raises(ValueError):
            keep_mask(score, wrong)
    with pytest.raises(ValueError, match="NaN"):
        ranks.keep_mask(score * math.nan, 0.5)


def test_activation_norms_equal_those_seen_by_hooks(small, tokens):
    model, _ = load_llama(small)
    seen, hooks = {}, []
    for name, module in model.named_modules():
        if name.endswith("_proj"):
            hooks.append(
                module.register_forward_hook(
                    lambda m, args, out, name=name: seen.__setitem__(
                        name + ".weight", args[0].double().flatten(0, 1).square().sum(0).sqrt()
                    )
                )
            )
    with torch.no_grad():
        model(tokens)
    norms = ranks.activation_norms(model, tokens)
    assert norms.keys() == seen.keys() and all(
        relative(norms[n].double(), seen[n]) < 1e-5 for n in seen
    )  # float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_applying_a_strategy_sets_plus_zero_and_counts_exactly_and_restoring_brings_all_back(
    small, tokens, dtype
):
    model, _ = load_llama(small, dtype=dtype)
    before, pruner = {n: p.clone() for n, p in model.named_parameters()}, Pruner(model, tokens)
    for strategy in ([0.0, 0.5, 0.99], [0.3, 0.3, 0.3]):
        pruner.apply(strategy)
        masks = pruner.masks(strategy)
        for name, p in model.named_parameters():
            kept = masks.get(name, torch.ones((), dtype=torch.bool))
            assert (
                torch.equal(p, torch.where(kept, before[name], 0))
                and not (p[~kept.expand_as(p)].signbit()).any()
            )
        dropped = sum(int((~m).sum()) for m in masks.values())
        assert pruner.sparsity(strategy) == dropped / sum(m.numel() for m in masks.values())
    pruner.restore()
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    for wrong in ([0.5] * 2, [0.5, 0.5, 1.0], [0.5, math.nan, 0.1]):
        with pytest.raises(ValueError):
            pruner.apply(wrong)


def test_pruned_in_bfloat16_saved_weights_are_the_sources_and_transformers_computes_the_same(
    tmp_path, tokens
):
    transformers = pytest.importorskip("transformers")
    source = write_small(tmp_path / "source", dtype=torch.float16)
    weights = load_file(source / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"][0, :8] = torch.tensor(
        [-0.0, 0.0, 6e-8, -6e-8, 1, 2, 3, 4]
    ).half()
    save_file(weights, source / "model.safetensors", {"format": "pt"})
    model, _ = load_llama(source, dtype=torch.bfloat16)
    pruner = Pruner(model, tokens)
    strategy = torch.tensor([0.2, 0.5, 0.7])
    pruner.apply(strategy)
    save_llama(model, tmp_path / "with masks", source, pruner.masks(strategy))
    save_llama(model, tmp_path / "without", source)
    for folder in ("with masks", "without"):
        saved = load_file(tmp_path / folder / "model.safetensors")
        assert saved.keys() == weights.keys()
        for name, kept in pruner.masks(strategy).items():
            bits, original = saved[name].view(torch.int16), weights[name].view(torch.int16)
            assert torch.equal(
                bits,
                torch.where(kept, original, 0)
                if folder == "with masks"
                else torch.where(kept | (weights[name] == 0), original, 0),
            ), name
        assert all(
            torch.equal(saved[n], weights[n]) for n in weights if n not in pruner.masks(strategy)
        )
    again = load_llama(tmp_path / "with masks")[0]
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "with masks", dtype=torch.float32
    )
    with torch.no_grad():
        assert relative(again(tokens), theirs(tokens).logits) < 1e-4  # float32


def test_strategy_for_meets_the_counted_sparsity_of_uniform_for_any_stratnet(small, tokens):
    pruner, g = Pruner(load_llama(small)[0], tokens), torch.Generator().manual_seed(0)
    for scale in (0.1, 1, 1e6):  # 1e6 saturates every output
        net = unicuco.StratNet(3)
        for p in net.parameters():
            p.data = torch.randn(p.shape, generator=g, dtype=p.dtype) * scale / p.shape[-1] ** 0.5
        for s in (0.0, 0.01, 0.3, 0.5, 0.77, 0.9):
            x = unicuco.strategy_for(net, s, pruner.sparsity)
            assert (
                abs(pruner.sparsity(x) - pruner.sparsity([s] * 3)) <= 1 / (3 * 64)
                and x.min() >= 0
                and x.max() <= 0.9
            )
    for s in (-0.1, 0.91, math.nan):
        with pytest.raises(ValueError):
            unicuco.strategy_for(net, s, pruner.sparsity)


@pytest.fixture(scope="module")
def pruner(tokens):
    return Pruner(random_model(), tokens)


def test_f2_is_kl_from_the_dense_model_on_all_its_windows_and_counts_their_tokens(small, tokens):
    model, windows = load_llama(small)[0], tokens[:3]
    dense = Divergence(model, windows)
    pruner = Pruner(model, tokens[3:])
    pruner.apply([0.5] * 3)  # the reference is the dense model, however it is found
    f2 = prune.F2(pruner, windows)
    for strategy in ([0.2, 0.5, 0.7], [0.0] * 3):
        kl = f2(strategy)
        pruner.apply(strategy)
        assert abs(kl - dense.measure()[0]) <= 1e-12  # float64 of the same float32 logits
    assert f2.tokens_spent == 2 * windows.numel()


@steady
@given(seeds, st.integers(1, 6), st.integers(1, 130), st.floats(0, 0.9999), st.floats(0, 0.9999))
def test_a_higher_sparsity_drops_a_superset_whatever_the_scores_ties_included(
    seed, rows, columns, low, high
):
    score = (
        torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)).abs() * 3
    ).round() * 0.1
    score[:, columns // 2 :] = torch.nextafter(
        score[:, : columns - columns // 2], torch.tensor(0.0)
    )  # neighbours in float32, out of order
    assert torch.equal(
        ranks.rank(score).long().gather(1, score.argsort(dim=1, stable=True)),
        torch.arange(columns).expand(rows, -1),
    )
    low, high = sorted((low, high))
    fewer, more = keep_mask(score, low), keep_mask(score, high)
    assert not (more & ~fewer).any()
    for mask, sparsity in ((fewer, low), (more, high)):
        k = math.floor(
            Fraction(sparsity) * columns + Fraction(1, 10**6)
        )  # the count, in exact arithmetic
        assert abs(int((~mask).sum()) / rows - k) <= (
            abs(Fraction(sparsity) * columns + Fraction(1, 10**6) - round(sparsity * columns))
            < 1e-9
        )
        assert (~mask).sum(1).unique().numel() == 1
        worst_kept, best_dropped = (
            score.masked_fill(~mask, math.inf).amin(1),
            score.masked_fill(mask, -1).amax(1),
        )
        assert (best_dropped <= worst_kept).all()


@steady
@given(
    st.lists(st.floats(0, 0.99), min_size=3, max_size=3),
    st.lists(st.floats(0, 0.99), min_size=3, max_size=3),
)
def test_counted_sparsity_equals_counted_mask_entries_and_counted_zeros_and_masks_are_nested(
    pruner, a, b
):
    low, high = [min(p) for p in zip(a, b)], [max(p) for p in zip(a, b)]
    for strategy in (low, high):
        masks = pruner.masks(strategy)
        assert pruner.dropped_per_row(strategy).tolist() == [
            [ranks.weights_to_drop(x, int(d_in)) for d_in in pruner.d_in] for x in strategy
        ]
        dropped, total = (
            sum(int((~m).sum()) for m in masks.values()),
            sum(m.numel() for m in masks.values()),
        )
        pruner.apply(strategy)
        zeros = sum(int((W == 0).sum()) for block in pruner.live for W in block)
        assert (
            pruner.sparsity(strategy) == dropped / total == zeros / total
            and pruner.mask_sparsity(masks) == dropped / total
        )
    fewer = pruner.masks(low)
    assert not any((masks[n] & ~fewer[n]).any() for n in masks)
    pruner.restore()


def test_activation_norms_do_not_depend_on_how_the_calibration_tokens_are_batched(
    tokens, monkeypatch
):
    model = random_model()
    whole = ranks.activation_norms(model, tokens)
    monkeypatch.setattr(evaluation, "BATCH", 128)  # two windows at a time
    parts = ranks.activation_norms(model, tokens)
    assert whole.keys() == parts.keys()
    assert all(torch.allclose(whole[n], parts[n], rtol=1e-5, atol=0) for n in whole)  # float32


def test_a_block_without_activations_is_pruned_in_column_order_with_exact_counts(tokens):
    model = random_model()
    model.blocks[1].input_layernorm.weight.data.zero_()  # q, k and v see zeros only, and so does o
    pruner = Pruner(model, tokens)
    pruner.apply([0.5, 0.3, 0.5])
    for name in LINEARS[:4]:
        W = model.blocks[1].get_submodule(name).weight
        assert (W[:, :19] == 0).all() and (W[:, 19:] != 0).all()  # int(0.3 * 64) = 19
    assert pruner.sparsity([0.5, 0.3, 0.5]) == sum(
        int((W == 0).sum()) for b in pruner.live for W in b
    ) / sum(W.numel() for b in pruner.live for W in b)


def test_offloaded_blocks_compute_rank_and_prune_bit_for_bit_like_resident_ones(small, tokens):
    results = []
    for offload in (False, True):
        model, _ = load_llama(small)
        if offload:
            offload_blocks(model, "cpu")
        divergence, pruner = Divergence(model, tokens), Pruner(model, tokens)
        pruner.apply([0.2, 0.5, 0.7])
        results.append(
            (
                divergence.measure(),
                [r for block in pruner.ranks for r in block],
                dict(model.named_parameters()),
            )
        )
    (kl, ranks, weights), (kl_, ranks_, weights_) = results
    assert kl == kl_ and kl[0] > 0 and weights.keys() == weights_.keys()
    assert all(map(torch.equal, ranks, ranks_)) and all(
        torch.equal(weights[n], weights_[n]) for n in weights
    )


@pytest.mark.parametrize("keep,group", [(2, 4), (4, 8)])
def test_semi_structured_masks_keep_the_best_of_every_group_in_the_blocks_that_are_pruned_most(
    keep, group
):
    model, _ = load_llama(ROOT / "tiny")
    pruner = Pruner(
        model, torch.randint(3, 4096, (2, 64), generator=torch.Generator().manual_seed(0))
    )
    strategy = torch.linspace(
        0.1, 0.5, 12, dtype=torch.float64
    )  # mean 0.3: ceil(2 * 12 * 0.3) = 8 blocks
    masks = pattern_masks(pruner, strategy, keep, group)
    assert {name.split(".")[2] for name in masks} == set(map(str, range(4, 12))) and len(
        masks
    ) == 8 * len(LINEARS)
    assert pruner.mask_sparsity(masks) == pytest.approx(8 / 24)
    for i, (names, block) in enumerate(zip(pruner.names[4:], pruner.ranks[4:])):
        for name, r in zip(names, block):
            best = r.view(len(r), -1, group).topk(keep, dim=-1).indices
            assert torch.equal(
                masks[name].view(len(r), -1, group).nonzero()[:, -1].view(best.shape),
                best.sort(-1).values.long(),
            )
    pruner.apply_masks(masks)
    assert all(((dict(model.named_parameters())[n] != 0) <= m).all() for n, m in masks.items())
    with pytest.raises(ValueError, match="half of a block"):
        pattern_masks(pruner, [0.6] * 12, keep, group)


def options(small, text):
    return (
        "--model",
        small,
        "--data",
        text,
        "--seqlen",
        64,
        "--calibration",
        4,
        "--tokens",
        128,
        "--no-refit",
        *CPU,
    )


UP = "model.layers.0.mlp.up_proj.weight"


def weights(folder):
    return load_file(folder / "model.safetensors")


def test_packed_then_unpacked_is_what_plain_pruning_writes_offloaded_or_not(
    small, text, tmp_path, capsys
):
    asked = (*options(small, text), "--uniform", "--sparsity", 0.5)
    for name, more in (("plain", ()), ("packed", ("--packed",)), ("offloaded", ("--offload",))):
        assert call(prune, *asked, "--out", tmp_path / name, *more) == 0
    assert call(prune, "--unpack", tmp_path / "packed", "--out", tmp_path / "again") == 0
    plain = weights(tmp_path / "plain")
    for name in ("again", "offloaded"):
        other = weights(tmp_path / name)
        assert plain.keys() == other.keys() and all(
            torch.equal(plain[n].view(torch.int32), other[n].view(torch.int32)) for n in plain
        )
    saved = (tmp_path / "plain" / "model.safetensors").stat().st_size - (
        tmp_path / "packed" / "packed.safetensors"
    ).stat().st_size
    assert (
        0.97
        <= saved
        / (
            sum(W.numel() for n, W in plain.items() if n.endswith("_proj.weight"))
            * (0.5 * 4 - 1 / 8)
        )
        <= 1
    )  # float32; headers
    assert f"wrote {tmp_path / 'again'}" in capsys.readouterr().out
    records = ((tmp_path / name / "strategy.json").read_bytes() for name in ("packed", "again"))
    assert len(set(records)) == 1
    before = (tmp_path / "plain" / "model.safetensors").read_bytes()
    assert (
        call(
            prune,
            *options(small, text),
            "--uniform",
            "--sparsity",
            0.7,
            "--out",
            tmp_path / "plain",
            "--force",
        )
        == 0
    )
    assert (tmp_path / "plain" / "model.safetensors").read_bytes() != before
    assert not [
        p for p in tmp_path.iterdir() if p.name.startswith(".")
    ]  # nothing half-done is left


def test_a_dry_run_writes_nothing_and_json_stands_alone_on_standard_output(
    small, text, tmp_path, capsys
):
    out = tmp_path / "out"
    asked = (
        *options(small, text),
        "--uniform",
        "--sparsity",
        0.25,
        0.5,
        "--max-kl",
        0.5,
        "--out",
        out,
    )
    assert call(prune, *asked, "--dry-run", "--json") == 0
    rows = json.loads(capsys.readouterr().out)
    assert [r["request"] for r in rows] == ["0.25", "0.5", "kl-0.5"] and not out.exists()
    assert (
        [r["sparsity"] for r in rows[:2]] == [0.25, 0.5]
        and rows[0]["kl"] < rows[1]["kl"]
        and 0 < rows[2]["kl"] <= 0.5
    )
    assert call(prune, *options(small, text), "--uniform", "--sparsity", 0.25, "--dry-run") == 0
    assert re.search(r"^ +blocks 0.25 0.25 0.25$", capsys.readouterr().out, re.M)


@pytest.mark.parametrize("refitted", ["--no-refit", "--refit"])
def test_a_pattern_keeps_the_count_that_it_prints(small, text, tmp_path, refitted):
    asked = (*options(small, text), "--uniform", "--sparsity", 0.5, "--pattern", "2:4", refitted)
    assert call(prune, *asked, "--out", tmp_path / "out") == 0
    written = weights(tmp_path / "out")
    written = {n: W for n, W in written.items() if n.endswith("_proj.weight")}
    pruned = written.values()
    zeros = sum(int((W == 0).sum()) for W in pruned) / sum(W.numel() for W in pruned)
    record = json.loads((tmp_path / "out" / "strategy.json").read_text())
    assert record["counted"] == zeros == 0.5 and record["refitted"] == (refitted == "--refit")
    dense = load_file(small / "model.safetensors")
    moved = [not torch.equal(W[W != 0], dense[n][W != 0]) for n, W in written.items()]
    assert all(moved) if refitted == "--refit" else not any(moved)
    assert all(((W.view(-1, 4) != 0).sum(1) == 2).all() for W in pruned)


@pytest.fixture
def quick_prior(monkeypatch):
    """StratNet of the table alone after 200 steps."""
    monkeypatch.setattr(unicuco, "TABLE_STEPS", 200)


def test_without_a_stratnet_curvature_chooses_and_says_so(
    small, text, tmp_path, capsys, quick_prior
):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)  # where no StratNet of an earlier run is found
        assert call(prune, *options(small, text), "--sparsity", 0.5, "--out", tmp_path / "out") == 0
    assert "no StratNet of this model: curvature alone chooses" in capsys.readouterr().out
    record = json.loads((tmp_path / "out" / "strategy.json").read_text())
    assert record["method"] == "curvature" and abs(record["counted"] - 0.5) <= 1 / (3 * 64)
    sparsities = torch.tensor(record["strategy"])
    assert sparsities.shape == (3, 7) and float(sparsities.std()) > 0.01


@pytest.mark.slow
@pytest.mark.parametrize("sparsity", [0.5, 0.7])
def test_without_a_stratnet_curvature_chooses_better_than_uniform(tmp_path, sparsity):
    model = tmp_path / "model"
    shutil.copytree(ROOT / "tiny", model, ignore=shutil.ignore_patterns("stratnet*", "*.py"))
    kls = {}
    for name, words in {"curvature": (), "uniform": ("--uniform",)}.items():
        asked = ("--sparsity", sparsity, "--no-refit", "--calibration", 8, "--dtype", "float32")
        out = tmp_path / name
        assert call(prune, "--model", model, *asked, "--out", out, *words) == 0
        record = json.loads((out / "strategy.json").read_text())
        kls[record["method"]] = record["kl"]
    assert kls["curvature"] < 0.75 * kls["uniform"]  # measured: 0.58 and 0.42


def test_the_model_of_the_last_measurement_is_delivered_without_pruning_it_again(
    small, text, tmp_path, monkeypatch
):
    refits = []
    spied(monkeypatch, prune, "follow", refits)
    words = ("--uniform", "--refit", "--tokens", 256, "--calibration", 4)
    sure = ("--max-kl", 2.0, "--confidence", 0.9)
    assert call(prune, *options(small, text), *words, *sure, "--out", tmp_path / "a") == 0
    record = json.loads((tmp_path / "a" / "strategy.json").read_text())
    delivered = record["strategy"][0][0]
    assert 0.9 * 2 <= record["kl_at_most"] <= 2  # the last measurement is what is delivered
    counts = [{n: c.tolist() for n, c in arguments[1].items()} for _, arguments in refits]
    assert all(counts.count(of) == 1 for of in counts)
    again = ("--sparsity", delivered, "--out", tmp_path / "b")
    assert call(prune, *options(small, text), *words, *again) == 0
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("a", "b"))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_requests_that_contradict_each_other_are_one_line_before_anything_is_read(
    small, text, tmp_path, capsys
):
    (tmp_path / "bad.jsonl").write_text('{"sparsity": 0.3}\nnonsense')
    base, half = options(small, text), ("--sparsity", 0.5)
    for words in (
        (),
        ("--sparsity", 0.5, 0.50),
        ("--max-kl", 1, "--pattern", "2:4"),
        ("--unpack", small),
        ("--requests", tmp_path / "bad.jsonl"),
        ("--requests", tmp_path / "none.jsonl"),
        (*half, "--seqlen", 500),
        ("--preference", 0.5, "--uniform"),
        ("--sparsity", 0.7, "--uniform", "--pattern", "2:4"),
        (*half, "--uniform", "--calibration", 10**6),
    ):
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(tmp_path)  # where no StratNet of an earlier run is found
            assert call(prune, *base, *words) == 2, words
        error = capsys.readouterr().err.strip()
        assert len(error.splitlines()) == 1 and not (tmp_path / "out").exists(), words
    with pytest.raises(ValueError, match="metric"):
        prune.Pruner(load_llama(small)[0], torch.full((1, 8), 5), "luck")
    with pytest.raises(request.Unreachable, match="sparsity 0.9 has 7 bytes"):
        surrogate = request.Surrogate(
            curve=lambda s: torch.full((3,), s), net=None, gp=None, measure=None, size=lambda x: 7
        )
        request.strategy_of(request.parse_request({"max_size": "3"}), surrogate)


@pytest.mark.slow
def test_prune_serves_a_request_with_the_stratnet_that_train_made_and_without_one(
    small, text, tmp_path
):
    common = (
        "--model",
        small,
        "--data",
        text,
        "--calibration",
        4,
        "--seqlen",
        64,
        "--device",
        "cpu",
    )
    made = run_script(
        "train.py",
        *common,
        "--initial",
        5,
        "--rounds",
        2,
        "--batch",
        2,
        "--tokens",
        128,
        "--test-tokens",
        128,
        "--out",
        tmp_path / "run",
    )
    assert made.returncode == 0, made.stderr
    assert len(json.loads((tmp_path / "run" / "results.json").read_text())) == 12
    asked = (
        *common,
        "--tokens",
        128,
        "--sparsity",
        0.5,
        "--stratnet",
        tmp_path / "run" / "stratnet.safetensors",
    )
    done = run_script("prune.py", *asked, "--out", tmp_path / "learned")
    assert done.returncode == 0, done.stderr
    for name, method in (("uniform", ("--uniform",)), ("kept", ("--no-refit",))):
        assert call(prune, *asked, "--out", tmp_path / name, *method) == 0
    for name in ("learned", "uniform", "kept"):
        record = json.loads((tmp_path / name / "strategy.json").read_text())
        assert abs(record["counted"] - 0.5) < 0.01 and load_llama(tmp_path / name)


def test_force_replaces_only_what_prune_wrote_and_never_the_source_its_parents_or_a_link(
    small, text, tmp_path, capsys
):
    runs = tmp_path / "runs"
    shutil.copytree(small, runs / "0.5")
    (runs / "mine").mkdir()
    (runs / "mine" / "thesis.tex").write_text("years of work")
    for name, beside in (("with thesis", "thesis.tex"), ("with folder", "0.3/strategy.json")):
        (runs / name / beside).parent.mkdir(parents=True)
        (runs / name / beside).write_text("years of work")
        (runs / name / "strategy.json").write_text('{"strategy": []}')
    for name, record in (("of others", '{"plan": "attack"}'), ("with data", '{"strategy": []}')):
        (runs / name).mkdir()
        (runs / name / "strategy.json").write_text(record)
    shutil.copyfile(text, runs / "with data" / "text.py")
    (tmp_path / "link").symlink_to(runs)
    base = options(runs / "0.5", text)
    before = contents(tmp_path)
    asked = ("--uniform", "--sparsity", 0.5, "--force", "--out")
    for words in (
        ("--uniform", "--sparsity", 0.5, 0.3, "--force", "--out", runs),  # runs/0.5 is the model
        (*asked, runs / "0.5"),
        (*asked, runs),
        (*asked, runs / "mine"),
        (*asked, runs / "with thesis"),
        (*asked, runs / "with folder"),
        (*asked, runs / "of others"),
        (*asked, runs / "with data", "--data", runs / "with data" / "text.py"),
        (*asked, runs / "0.5" / ".."),
        (*asked, runs / "0.5" / "inside"),
        (*asked, tmp_path / "link"),
        (*asked, "."),
        ("--unpack", runs / "0.5", "--force", "--out", runs),
    ):
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(runs / "mine")
            assert call(prune, *base, *words) == 2, words
        assert len(capsys.readouterr().err.strip().splitlines()) == 1
        assert contents(tmp_path) == before, words


def test_a_folder_that_force_does_not_replace_says_which_of_its_entries_is_in_the_way(tmp_path):
    folder = tmp_path / "out"
    folder.mkdir()
    ours = ("config.json", "LICENSE", "model.safetensors", "packed-00001-of-2.safetensors")
    for name in (*ours, "packed.safetensors.index.json"):
        (folder / name).write_text("ours")
    (folder / "strategy.json").write_text('{"strategy": []}')
    script.refuse_to_replace(folder, True)
    foreign = ("thesis.tex", "models.safetensors.bak", "stratnet.safetensors", "a\nb", ".git/a")
    for name in (*foreign, "0.3/strategy.json", "tokenizer.json/a"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("mine")
        entry = re.escape(repr(name.split("/")[0]))
        refuses(script.refuse_to_replace, folder, True, match=f"out holds {entry}, which")
        if "/" in name:
            shutil.rmtree((folder / name).parent)
        else:
            (folder / name).unlink()
    script.refuse_to_replace(folder, True)


def contents(folder):
    """{path: bytes} of every file below a folder."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# ------------------------------------------------------ what reaches what, what is refused
MARKED = "alpha beta " * 3000, "omega psi " * 3000  # texts to choose on, and to test on


@pytest.fixture
def marked(tmp_path):
    """Two texts whose words tell where a window comes from."""
    paths = tmp_path / "choose.txt", tmp_path / "test.txt"
    for path, words in zip(paths, MARKED):
        path.write_text(words)
    return paths


def words_of(tokenizer, windows):
    return set("alpha beta omega psi".split()) & set(
        tokenizer.decode(windows.flatten().tolist()).split()
    )


def test_no_window_of_the_test_text_reaches_calibration_table_or_refit_and_kl_is_on_it_alone(
    small, marked, tmp_path, monkeypatch, quick_prior, capsys
):
    seen = []
    for name in ("Divergence", "Pruner", "read_curves", "follow"):
        spied(monkeypatch, prune, name, seen)
    monkeypatch.chdir(tmp_path)
    words = (*options(small, marked[0]), "--test", marked[1], "--refit", "--sparsity", 0.5)
    words += ("--seed", 3)
    spied(monkeypatch, prune, "load_texts", texts := [])
    assert call(prune, *words, "--out", tmp_path / "out") == 0
    assert texts[0][1][4] == 3  # the seed
    _, tokenizer = load_llama(small)
    place = {"Divergence": 1, "Pruner": 1, "read_curves": 1, "follow": 2}
    assert {name for name, _ in seen} == place.keys()
    assert dict(seen)["read_curves"][2] == 3  # the seed
    for name, arguments in seen:
        windows = arguments[place[name]]
        right = {"omega", "psi"} if name == "Divergence" else {"alpha", "beta"}
        assert words_of(tokenizer, windows) == right, name
        assert windows.numel() == (128 if name == "Divergence" else 4 * 64)
    record = json.loads((tmp_path / "out" / "strategy.json").read_text())
    assert record["measured_on"] == "test.txt" and record["tokens"] == 128
    digest = script.sha256(marked[0])
    assert record["calibration"] == {"text": "choose.txt", "tokens": 256, "sha256": digest}
    said = "calibrated on 256 tokens, measured on 128 of test.txt"
    assert said in capsys.readouterr().out
    dense, _ = load_llama(small)
    windows = next(arguments[1] for name, arguments in seen if name == "Divergence")
    perplexity = evaluation.perplexity(dense, windows.flatten(), 64)
    assert record["dense_ppl"] == pytest.approx(perplexity, rel=1e-6)  # float32


def test_two_values_of_seed_and_metric_give_two_models_and_one_value_gives_one(
    small, text, tmp_path
):
    digests = {}
    for name, words in {
        "same": (),
        "again": (),
        "seed": ("--seed", 1),
        "metric": ("--metric", "magnitude"),
    }.items():
        asked = (*options(small, text), "--uniform", "--sparsity", 0.5, *words)
        assert call(prune, *asked, "--out", tmp_path / name) == 0
        digests[name] = (tmp_path / name / "model.safetensors").read_bytes()
        record = json.loads((tmp_path / name / "strategy.json").read_text())
        assert record["metric"] == ("magnitude" if name == "metric" else "wanda")
    assert digests["same"] == digests["again"] and len(set(digests.values())) == 3


def trained_for(small, path, seed=0, curves=None, **about):
    """A random StratNet in a file, with settings `about`."""
    net = random_net(21, seed=seed)
    X = torch.rand(3, 21, dtype=torch.float64) * 0.8
    sizes = torch.tensor([64 * 64.0, 64 * 32, 64 * 32, 64 * 64, 64 * 96, 64 * 96, 64 * 96])
    about = {"mean": "blocks", **about}
    scale = unicuco.Scale(-5.0, 1.0)
    made = unicuco.Trained(net, unicuco.Layout(3, sizes), scale, X, X[:, 0].log(), curves, about)
    path.parent.mkdir(parents=True, exist_ok=True)
    unicuco.save_stratnet(path, made)
    return path


@pytest.mark.slow
@pytest.mark.parametrize("refitted", ["--no-refit", "--refit"])
def test_processes_of_torchrun_share_the_requests_and_write_what_one_writes(
    small, text, tmp_path, refitted
):
    asked = [*options(small, text), "--uniform", "--sparsity", 0.3, 0.4, 0.5, refitted]
    asked += ["--max-size", 1, "--packed"]  # that one alone cannot be met
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    starts = {"one": [sys.executable], "two": [*torchrun, "--nproc-per-node=2"]}
    written, tables = {}, {}
    for name, start in starts.items():
        out, table = tmp_path / name, tmp_path / f"{name}.json"
        words = [*start, "prune.py", *asked, "--out", out, "--json", table]
        # of torchrun, each process would have one thread; and bits depend on their number
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            list(map(str, words)), cwd=ROOT, env=environment, capture_output=True, text=True
        )
        assert "size-1: 1 is less than pruning reaches" in done.stderr, done.stderr
        assert done.stdout.count("request ") == 1 and done.stdout.count("\nwrote ") == 1
        assert all(f"\n{s} " in done.stdout for s in ("0.3", "0.4", "0.5")), done.stdout
        written[name] = {
            path.relative_to(out): path.read_bytes() for path in out.rglob("*.safetensors")
        }
        tables[name] = [
            {key: value for key, value in row.items() if key != "seconds"}
            for row in json.loads(table.read_text())
        ]
    assert written["one"] == written["two"] and len(written["one"]) == 3
    assert tables["one"] == tables["two"] and len(tables["one"]) == 4


def test_a_strategy_is_nearer_to_uniform_where_survivors_are_refitted_and_counts_the_same(
    small, text, tmp_path
):
    path, records = trained_for(small, tmp_path / "net.safetensors"), {}
    for how in ("--refit", "--no-refit"):
        words = (*options(small, text), "--stratnet", path, "--sparsity", 0.5, how)
        assert call(prune, *words, "--out", tmp_path / how) == 0
        records[how] = json.loads((tmp_path / how / "strategy.json").read_text())
    counts = [r["counted"] for r in records.values()]
    assert abs(counts[0] - counts[1]) <= 1 / (3 * 64)
    strategies = [torch.tensor(r["strategy"]).flatten() for r in records.values()]
    refitted, pruned = (unicuco.to_logits(x.double()).diff() for x in strategies)
    # but for the one matrix that is a step of its count off
    assert (refitted - refit.CONTRAST * pruned).abs().median() < 1e-5  # float64, 30-fold bisected


def test_behind_a_refit_the_table_of_a_stratnet_answers_and_not_what_it_was_taught_by_measuring(
    small, text, tmp_path, monkeypatch, capsys, quick_prior
):
    monkeypatch.chdir(tmp_path)  # where no StratNet of an earlier run is found
    args = {"model": small, "data": text, "test": None, "seqlen": 64, "calibration": 4, "seed": 0}
    setting = prune.prepare(argparse.Namespace(**args), torch.device("cpu"), torch.float32, 1)
    pruner = Pruner(setting.model, setting.calibration)
    curves = torch.stack(curvature.read_curves(pruner, setting.calibration, 0))
    path = trained_for(small, tmp_path / "net.safetensors", curves=curves, mean="curvature")
    ways = {
        "table": ("curvature", "--refit"),
        "refitted": ("curvature", "--refit", "--stratnet", path),
        "pruned": ("unicuco", "--no-refit", "--stratnet", path),
    }
    found = {}
    for name, (method, *way) in ways.items():
        words = (*options(small, text), "--dtype", "float32", "--sparsity", 0.5, *way)
        assert call(prune, *words, "--out", name) == 0
        record = json.loads((tmp_path / name / "strategy.json").read_text())
        assert record["method"] == method
        found[name] = torch.tensor(record["strategy"], dtype=torch.float64)
    assert "train.py" not in capsys.readouterr().out  # it would change nothing
    # a file has sizes as shares: their last bits differ, which 200 steps of training amplify
    torch.testing.assert_close(found["refitted"], found["table"], rtol=1e-6, atol=0)  # float64
    assert (found["pruned"] - found["table"]).abs().max() > 0.01


def test_a_stratnet_of_other_weights_or_another_metric_is_refused(small, text, tmp_path, capsys):
    own = [script.sha256(small / "model.safetensors")]
    cases = [
        ({"weights": own, "metric": "wanda"}, None),
        ({"weights": ["0" * 64], "metric": "wanda"}, "trained on other weights"),
        ({"weights": own, "metric": "magnitude"}, "trained for --metric magnitude"),
    ]
    for number, (about, reason) in enumerate(cases):
        path = trained_for(small, tmp_path / f"{number}.safetensors", **about)
        words = (*options(small, text), "--sparsity", 0.5, "--stratnet", path, "--dry-run")
        assert call(prune, *words) == (2 if reason else 0)
        assert reason is None or reason in capsys.readouterr().err


def test_the_stratnet_of_the_last_run_wins_over_the_one_beside_the_model(
    small, tmp_path, monkeypatch
):
    model = tmp_path / "small"
    shutil.copytree(small, model)
    monkeypatch.chdir(tmp_path)
    trained_for(model, model / "stratnet.safetensors", seed=1)
    beside = prune.find_stratnet(None, model, 3)
    trained_for(model, tmp_path / "out" / "small" / "stratnet.safetensors", seed=2)
    of_the_run = prune.find_stratnet(None, model, 3)
    again = trained_for(model, tmp_path / "again.safetensors", seed=2)
    named = prune.find_stratnet(again, model, 3)
    request = torch.tensor([[0.5, 0.5]])
    assert torch.equal(of_the_run.net(request), named.net(request))
    assert not torch.equal(of_the_run.net(request), beside.net(request))


@pytest.mark.parametrize("flag", ["--calibration", "--tokens"])
@pytest.mark.parametrize("value", [0, -1])
def test_fewer_than_one_window_or_token_is_one_line(small, text, tmp_path, capsys, flag, value):
    words = (*options(small, text), "--uniform", "--sparsity", 0.5, flag, value)
    assert call(prune, *words, "--out", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert (
        error.strip() == f"prune.py: {flag} must be at least 1" and not (tmp_path / "out").exists()
    )


def test_what_cannot_be_done_is_refused_before_the_first_of_a_batch_is_written(
    small, text, tmp_path, capsys
):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "thesis.tex").write_text("years of work")
    asked = ("--uniform", "--sparsity", 0.3, "--out")
    for reason, words in (
        ("needs StratNet", (*asked, tmp_path / "a", "--preference", 0.4)),
        (
            "reaches 0.5 at most",
            (*asked, tmp_path / "a", "--sparsity", 0.7, "--pattern", "2:4"),
        ),
        ("is a folder", (*asked, tmp_path / "a", "--json", tmp_path)),
        ("no earlier table", (*asked, tmp_path / "a", "--json", tmp_path / "thesis.tex")),
        ("cannot be written", (*asked, tmp_path / "a", "--json", tmp_path / "file" / "t.json")),
        ("cannot be a folder", (*asked, tmp_path / "file" / "below")),
        ("cannot be a folder", (*asked, tmp_path / ("a" * 250))),
        ("--dry-run", ("--unpack", small, "--out", tmp_path / "a", "--dry-run")),
    ):
        before = contents(tmp_path)
        assert call(prune, *options(small, text), *words) == 2, words
        assert reason in capsys.readouterr().err
        assert contents(tmp_path) == before and not (tmp_path / "a").exists()


def test_a_link_out_of_a_strangers_folder_is_refused_and_the_hubs_own_cache_is_read(
    small, text, tmp_path, capsys
):
    secret, blobs = tmp_path / "secret.json", tmp_path / "hub" / "blobs"
    secret.write_text('{"password": "mine"}')
    stranger, snapshot = tmp_path / "stranger", tmp_path / "hub" / "snapshots" / "main"
    shutil.copytree(small, stranger)
    (stranger / "notes.txt").symlink_to(secret)
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for path in small.iterdir():
        shutil.copyfile(path, blobs / path.name)
        (snapshot / path.name).symlink_to(blobs / path.name)
    asked = ("--uniform", "--sparsity", 0.5, "--out")
    assert call(prune, *options(stranger, text), *asked, tmp_path / "a") == 0
    assert call(prune, *options(snapshot, text), *asked, tmp_path / "b") == 0
    for out in ("a", "b"):
        names = {path.name for path in (tmp_path / out).iterdir()}
        assert "notes.txt" not in names and {"config.json", "tokenizer.model"} <= names
    (stranger / "generation_config.json").symlink_to(secret)
    capsys.readouterr()
    assert call(prune, *options(stranger, text), *asked, tmp_path / "c") == 2
    assert "is a link out of its folder" in capsys.readouterr().err
    assert not (tmp_path / "c").exists()


def test_a_text_that_came_through_a_pipe_has_no_digest_in_the_record_and_a_file_has_its_own(
    small, marked, tmp_path
):
    def piped(raw):
        """The path of a pipe's reading end, as the shell's <(...) gives it."""
        reading, writing = os.pipe()
        threading.Thread(target=lambda: open(writing, "wb").write(raw), daemon=True).start()
        return f"/dev/fd/{reading}"

    digests, pipes = {}, [piped(words.encode()) for words in MARKED]
    for name, (data, test) in (("files", marked), ("pipes", pipes)):
        asked = (*options(small, data), "--test", test, "--uniform", "--sparsity", 0.5)
        table = tmp_path / f"{name}.json"
        assert call(prune, *asked, "--out", tmp_path / name, "--json", table) == 0
        record = json.loads((tmp_path / name / "strategy.json").read_text())
        made = json.loads((tmp_path / f"{name}.provenance.json").read_text())["inputs"]
        digests[name] = [record["calibration"]["sha256"], made["sha256"], *made["tests"].values()]
    chosen, tested = map(script.sha256, marked)
    assert digests == {"files": [chosen, chosen, tested], "pipes": [None] * 3}
    assert torch.equal(*(weights(tmp_path / n)[UP] for n in digests))  # the same text was read


@pytest.mark.parametrize("name", ["strategy.json", "model.safetensors", "packed.safetensors"])
def test_unpacking_a_strangers_folder_copies_no_file_that_a_link_of_it_names(
    small, pruned, tmp_path, capsys, name
):
    secret, stranger = tmp_path / "secret", tmp_path / "stranger"
    save_llama(load_llama(pruned)[0], stranger, small, packed=True)
    shutil.copyfile(pruned / "model.safetensors", stranger / "model.safetensors")
    (stranger / "strategy.json").write_text('{"password": "mine"}')
    if name == "packed.safetensors":
        (stranger / "model.safetensors").unlink()  # which is read before it
    (stranger / name).rename(secret)
    (stranger / name).symlink_to(secret)
    assert call(prune, "--unpack", stranger, "--out", tmp_path / "plain") == 2
    said = capsys.readouterr()
    assert f"{name} is a link out of its folder: copy the file itself" in said.err
    assert len(said.err.splitlines()) == 1 and not said.out
    assert {path.name for path in tmp_path.iterdir()} == {"secret", "stranger"}


def test_weights_that_are_replaced_while_it_serves_are_noticed(
    small, text, tmp_path, capsys, monkeypatch
):
    model = tmp_path / "model"
    shutil.copytree(small, model)
    save = prune.save_llama

    def slow(*arguments):
        save(*arguments)
        weights = load_file(model / "model.safetensors")
        save_file(weights, model / "model.safetensors", {"format": "pt"})

    monkeypatch.setattr(prune, "save_llama", slow)
    words = (*options(model, text), "--uniform", "--sparsity", 0.5, "--out", tmp_path / "out")
    assert call(prune, *words) == 2 and "changed meanwhile" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_pruning_a_pruned_model_says_what_was_0_before_and_is_0_now(small, text, tmp_path, capsys):
    asked = ("--uniform", "--out", tmp_path / "half", "--sparsity", 0.5)
    assert call(prune, *options(small, text), *asked) == 0
    assert "are 0 already" not in capsys.readouterr().out
    again = ("--uniform", "--out", tmp_path / "again", "--sparsity", 0.3)
    assert call(prune, *options(tmp_path / "half", text), *again) == 0
    assert "0.50 of the source's block weights are 0 already" in capsys.readouterr().out
    record = json.loads((tmp_path / "again" / "strategy.json").read_text())
    assert record["source_zeros"] == pytest.approx(0.5, abs=0.01)
    assert record["zeros"] >= record["source_zeros"] > record["counted"]


def test_a_model_that_computes_nan_is_refused_and_not_written(
    small, text, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(prune.Divergence, "measure", lambda self: (math.nan, 1.0))
    words = (*options(small, text), "--uniform", "--sparsity", 0.5, "--out", tmp_path / "out")
    assert call(prune, *words) == 2 and "computes NaN" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_sparsities_that_differ_in_the_seventh_digit_have_two_names():
    names = [request.parse_request({"sparsity": s})["name"] for s in ("0.1234567", "0.1234568")]
    assert names == ["0.1234567", "0.1234568"]
    assert request.parse_request({"sparsity": "0.50"})["name"] == "0.5"
    assert request.parse_request({"max_kl": "1"})["name"] == "kl-1"


def test_a_reader_who_has_gone_ends_no_serving(small, text, tmp_path):
    words = [*options(small, text), "--uniform", "--sparsity", 0.3, 0.5, "--out", tmp_path]
    process = subprocess.Popen(
        [sys.executable, "prune.py", *map(str, words)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    process.stdout.close()
    assert process.stderr.read() == b"" and process.wait() == 0
    assert (tmp_path / "0.3" / "strategy.json").exists()
    assert (tmp_path / "0.5" / "strategy.json").exists()


def test_a_confidence_asks_for_less_kl_than_the_budget_and_says_what_it_stays_below(
    small, text, tmp_path, capsys
):
    kls, budget = {}, 2.0  # where the margin is several weights of a row: counts go by whole ones
    for name, words in {"plain": (), "sure": ("--confidence", 0.95)}.items():
        asked = (*options(small, text), "--tokens", 256, "--uniform", "--max-kl", budget, *words)
        assert call(prune, *asked, "--out", tmp_path / name) == 0
        kls[name] = json.loads((tmp_path / name / "strategy.json").read_text())
    assert kls["sure"]["kl"] < kls["sure"]["kl_at_most"] <= budget
    assert kls["sure"]["counted"] < kls["plain"]["counted"] and "kl_at_most" not in kls["plain"]
    assert "with probability 0.95" in capsys.readouterr().out
    for wrong in (0.2, 1, "nan"):
        assert call(prune, *asked[:-1], wrong, "--out", tmp_path / "no") == 2
    capsys.readouterr()
    two = (*options(small, text), "--tokens", 128, "--uniform", "--max-kl", 0.3, *words)
    assert call(prune, *two, "--out", tmp_path / "no") == 2
    assert "three windows" in capsys.readouterr().err


def test_a_wish_may_come_in_several_flags_and_a_second_test_text_is_refused(
    small, text, tmp_path, capsys
):
    half = (*options(small, text), "--uniform", "--dry-run", "--sparsity", 0.5)
    assert call(prune, *half, "--sparsity", 0.6, 0.7) == 0
    printed = capsys.readouterr().out
    assert re.findall(r"^(0\.\d+) ", printed, re.M) == ["0.5", "0.6", "0.7"]
    for name in "ab":
        (tmp_path / name).write_text("x = 1\n" * 1000)
    tests = ("--test", tmp_path / "a", "--test", tmp_path / "b")
    assert call(prune, *half, *tests) == 2
    assert "measures on one --test" in capsys.readouterr().err


# -------------------------------------------------------------- wishes for a model that is refitted
def row_of(capsys, *words):
    """The one row of a dry run."""
    assert call(prune, *words, "--dry-run", "--json") == 0
    (row,) = json.loads(capsys.readouterr().out)
    return row


def test_a_refit_reaches_more_sparsity_within_the_same_kl(small, text, capsys):
    asked = (*options(small, text), "--uniform", "--max-kl", 2)
    pruned, refitted = (row_of(capsys, *asked, how) for how in ("--no-refit", "--refit"))
    assert pruned["kl"] <= 2 and refitted["kl"] <= 2
    assert refitted["sparsity"] > pruned["sparsity"]


def test_a_preference_is_served_by_the_default_refit(small, text, tmp_path, capsys):
    path = trained_for(small, tmp_path / "net.safetensors")
    asked = [word for word in options(small, text) if word != "--no-refit"]
    asked += ["--stratnet", path, "--preference", 0.5]
    refitted, pruned = row_of(capsys, *asked), row_of(capsys, *asked, "--no-refit")
    assert refitted["preference"] == "0.5" and refitted["sparsity"] > 0
    assert abs(refitted["sparsity"] - pruned["sparsity"]) <= 1 / (3 * 64)
    assert refitted["kl"] < pruned["kl"]


def test_a_refit_of_several_requests_writes_for_each_what_it_writes_alone(small, text, tmp_path):
    asked = (*options(small, text), "--uniform", "--refit", "--sparsity")
    assert call(prune, *asked, 0.3, 0.5, "--out", tmp_path / "both") == 0
    assert call(prune, *asked, 0.5, "--out", tmp_path / "alone") == 0
    for name in ("model.safetensors", "strategy.json"):
        both, alone = (tmp_path / folder / name for folder in ("both/0.5", "alone"))
        assert both.read_bytes() == alone.read_bytes(), name


def test_a_refit_calibrates_on_twice_the_windows_and_a_short_text_on_all_that_it_has(
    small, text, tmp_path, capsys
):
    short = tmp_path / "short.txt"
    short.write_text(" ".join(map(str, range(700))))
    for data, how, windows in (
        (text, "--refit", 64),
        (text, "--no-refit", 32),
        (short, "--refit", all_but_one(small, short)),
    ):
        words = ("--model", small, "--data", data, "--seqlen", 64, "--tokens", 64, *CPU)
        assert call(prune, *words, "--uniform", "--sparsity", 0.5, "--dry-run", how) == 0
        assert f"calibrated on {windows * 64} tokens" in capsys.readouterr().out


def all_but_one(model, path):
    """Windows of 64 that a text has to choose on, less the one that f2 keeps: fewer than 64."""
    _, tokenizer = load_llama(model)
    windows, _ = evaluation.load_texts(tokenizer, path, None, 64)
    assert 2 < len(windows) < 64
    return len(windows) - 1
