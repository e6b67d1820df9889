"""
The core: worked by hand (these also teach), against an independent implementation, end to end.

Run       pytest                      (under 3 minutes on 2 cores)
The name of a test is the sentence that it checks. Each tolerance has its dtype beside it.
"""
import itertools
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import eval as evaluation
import llama
import prune
import train
import unicuco
from gp import GaussianProcess
from llama import Config, Llama, load_llama, save_llama
from prune import METRICS, Pruner, keep_mask, rank

ROOT = Path(__file__).parent
SMALL = dict(model_type="llama", architectures=["LlamaForCausalLM"], vocab_size=4096, hidden_size=64, intermediate_size=96,
             num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, head_dim=16, max_position_embeddings=128,
             rms_norm_eps=1e-5, hidden_act="silu", tie_word_embeddings=True, bos_token_id=1, eos_token_id=2)
LLAMA3 = dict(rope_type="llama3", rope_theta=10000.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=64)
FAMILIES = {
    "grouped-query, tied": {}, "untied": dict(tie_word_embeddings=False), "biases": dict(attention_bias=True, mlp_bias=True),
    "llama3 scaling": dict(rope_parameters=LLAMA3), "linear scaling": dict(rope_scaling=dict(type="linear", factor=4.0)),
    "wide heads": dict(head_dim=32), "mistral": dict(model_type="mistral", architectures=["MistralForCausalLM"], sliding_window=None),
    "qwen2": dict(model_type="qwen2", architectures=["Qwen2ForCausalLM"], tie_word_embeddings=False),
}


def write_small(folder, seed=0, dtype=torch.float32, **fields):
    """A random model, weights of every size, in Hugging Face layout, with the tokenizer of tiny."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**SMALL, **fields}))
    model, g = Llama(Config.read(folder / "config.json")), torch.Generator().manual_seed(seed)
    tensors = {n: (torch.randn(p.shape, generator=g) * (0.3 if p.ndim == 2 else 0.1) + (p.ndim == 1)).to(dtype)
               for n, p in model.named_parameters()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    for name in ("tokenizer.model", "tokenizer_config.json"):
        (folder / name).write_bytes((ROOT / "tiny" / name).read_bytes())
    return folder


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return write_small(tmp_path_factory.mktemp("model") / "small")


@pytest.fixture(scope="module")
def tokens():
    return torch.randint(3, 4096, (16, 64), generator=torch.Generator().manual_seed(1))


def relative(a, b):
    return float((a - b).abs().max() / b.abs().max())


# ---------------------------------------------------------------------------------------------------------------- llama.py
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_those_of_transformers(family, tmp_path, tokens):
    transformers = pytest.importorskip("transformers")
    folder = write_small(tmp_path / "m", **FAMILIES[family])
    ours, theirs = load_llama(folder)[0], transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        assert relative(ours(tokens), theirs(tokens).logits) < 1e-4                     # float32: rounding is near 1e-6


def test_pruned_in_bfloat16_saved_weights_are_the_sources_bit_for_bit_and_transformers_computes_the_same(tmp_path, tokens):
    transformers = pytest.importorskip("transformers")
    source = write_small(tmp_path / "source", dtype=torch.float16)
    weights = load_file(source / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"][0, :8] = torch.tensor([-0.0, 0.0, 6e-8, -6e-8, 1, 2, 3, 4]).half()
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
            assert torch.equal(bits, torch.where(kept, original, 0) if folder == "with masks" else
                               torch.where(kept | (weights[name] == 0), original, 0)), name
        assert all(torch.equal(saved[n], weights[n]) for n in weights if n not in pruner.masks(strategy))
    again = load_llama(tmp_path / "with masks")[0]
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "with masks", dtype=torch.float32)
    with torch.no_grad():
        assert relative(again(tokens), theirs(tokens).logits) < 1e-4                    # float32


def test_shards_load_like_one_file_and_each_flaw_is_refused_by_name(small, tmp_path):
    weights = load_file(small / "model.safetensors")
    names, folder = sorted(weights), write_small(tmp_path / "shards")
    (folder / "model.safetensors").unlink()
    files = {n: f"model-0000{1 + (i % 2)}-of-00002.safetensors" for i, n in enumerate(names)}
    for file in set(files.values()):
        save_file({n: weights[n] for n in names if files[n] == file}, folder / file)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": files}))
    one, two = load_llama(small)[0].state_dict(), load_llama(folder)[0].state_dict()
    assert all(torch.equal(one[n], two[n]) for n in one)

    up = "model.layers.1.mlp.up_proj.weight"
    flaws = [({n: w for n, w in weights.items() if n != up}, up + " is missing"),
             ({**weights, "model.layers.9.x": weights[up].clone()}, "model.layers.9.x' does not belong"),
             ({**weights, up: weights[up][1:].clone()}, up + " has shape"),
             ({**weights, up: weights[up].double()}, "and dtype F64"),
             ({**weights, up: weights[up] * math.nan}, up + " holds NaN")]
    for flawed, message in flaws:
        save_file(flawed, tmp_path / "flawed.safetensors")
        broken = write_small(tmp_path / "broken")
        (tmp_path / "flawed.safetensors").replace(broken / "model.safetensors")
        with pytest.raises(ValueError, match=re.escape(message)):
            load_llama(broken)
    for promised in ({**files, up: "../evil.safetensors"}, {**files, up: files[names[0]], names[0]: files[up]}):
        index.write_text(json.dumps({"weight_map": promised}))
        with pytest.raises(ValueError):
            load_llama(folder)


def test_generation_with_a_cache_follows_the_logits_without_one(small):
    model, _ = load_llama(small)
    ids = [5, 6, 7]
    for token in llama.generate(model, [5, 6, 7], 20):
        assert token == int(model(torch.tensor([ids]))[0, -1].argmax())
        ids.append(token)
    assert list(llama.generate(model, [5], 9, 0.8, seed=3)) == list(llama.generate(model, [5], 9, 0.8, seed=3))
    with pytest.raises(ValueError):
        next(llama.generate(model, [5], 128))


def test_tokenizer_of_tiny_loses_nothing_of_the_standard_library():
    tokenizer = llama.Tokenizer(ROOT / "tiny", 4096)
    for held_out in (False, True):
        texts = evaluation.stdlib_files(held_out)
        assert [tokenizer.decode(ids) for ids in tokenizer.encode(texts)] == texts
    odd = " \t\n\n  leading, \r\n, trailing \x0c é 漢 🎈  "
    assert tokenizer.decode(tokenizer.encode(odd)) == odd and tokenizer.adds_bos


# ----------------------------------------------------------------------------------------------------------------- eval.py
def test_wikitext_rows_are_joined_like_the_hugging_face_data_set():
    assert evaluation.wikitext(" \n = A = \n \n text\n") == "\n\n".join(["", " = A = \n", "", " text\n"])


def test_perplexity_equals_a_plain_loop_whatever_the_batch(small, tokens, monkeypatch):
    model, flat = load_llama(small)[0], tokens.flatten()[:1000]
    with torch.no_grad():
        losses = [torch.nn.functional.cross_entropy(model(w[None])[0, :-1], w[1:], reduction="sum") for w in flat[:960].view(-1, 64)]
    expected = math.exp(sum(map(float, losses)) / (15 * 63))
    for batch, chunk in ((2048, 2**22), (64, 2**13), (200, 2**20)):
        monkeypatch.setattr(evaluation, "BATCH", batch)
        monkeypatch.setattr(evaluation, "CHUNK", chunk)
        assert evaluation.perplexity(model, flat, 64) == pytest.approx(expected, rel=1e-5)          # float32
    with pytest.raises(ValueError, match="shorter than one window"):
        evaluation.perplexity(model, flat[:63], 64)


def test_divergence_is_0_for_the_dense_model_and_equals_kl_div_for_a_pruned_one(small, tokens):
    model, _ = load_llama(small)
    divergence = evaluation.Divergence(model, tokens)
    with torch.no_grad():
        dense = model(tokens).double().log_softmax(-1)
    pruner = Pruner(model, tokens)
    assert divergence() == 0
    pruner.apply([0.5, 0.1, 0.6])
    with torch.no_grad():
        pruned = model(tokens).double().log_softmax(-1)
    expected = torch.nn.functional.kl_div(pruned, dense, log_target=True, reduction="sum") / tokens.numel()
    kl, ppl = divergence.measure()
    assert kl == pytest.approx(float(expected), rel=1e-4) and kl == divergence()                     # float32
    assert ppl == pytest.approx(evaluation.perplexity(model, tokens.flatten(), 64), rel=1e-6)
    pruner.restore()
    assert divergence() == 0


def test_zero_shot_prompts_are_those_of_the_harness():
    row = dict(activity_label="Roof", ctx_a="A man [step] sits.", ctx_b="he", endings=["[title] up  now [x].", " stays [title] ok"], label=1)
    contexts, endings, lengths, gold = evaluation.prompts("hellaswag", row)
    assert contexts == ["Roof: A man sits. He"] * 2 and endings == ["  up now .", " stays. ok"]
    assert lengths == [9, 9] and gold == 1
    row = dict(sentence="Ann beat Eve so _ won.", option1="Ann", option2="Eve", answer="2")
    assert evaluation.prompts("winogrande", row) == (["Ann beat Eve so Ann", "Ann beat Eve so Eve"], [" won."] * 2, None, 1)
    row = dict(question="Why?", choices=dict(text=["a", "bc"], label=["1", "2"]), answerKey="2")
    assert evaluation.prompts("arc_easy", row) == (["Question: Why?\nAnswer:"] * 2, [" a", " bc"], [1, 2], 1)


def test_zero_shot_picks_the_likelier_choice_by_a_plain_loop(small):
    model, tokenizer = load_llama(small)
    rows = [dict(goal=f"import {a}", sol1=f"{b} of it", sol2=f"the {c} is long", label=0) for a, b, c in itertools.product("xyz", "pq", "uv")]
    result = evaluation.zero_shot(model, tokenizer, "piqa", rows)
    for row, chosen, normed in zip(rows, result["predictions"], result["predictions_norm"]):
        scores = []
        for choice in (row["sol1"], row["sol2"]):
            context = [tokenizer.bos_id] + tokenizer.encode(f"Question: {row['goal']}\nAnswer:")
            ids = torch.tensor([tokenizer.bos_id] + tokenizer.encode(f"Question: {row['goal']}\nAnswer: {choice}"))
            with torch.no_grad():
                logp = model(ids[None])[0, :-1].log_softmax(-1).gather(1, ids[1:, None])[:, 0]
            scores.append(float(logp[len(context) - 1:].sum()))
        assert chosen == int(np.argmax(scores))
        assert normed == int(np.argmax([scores[0] / len(row["sol1"]), scores[1] / len(row["sol2"])]))
    assert result["acc"] == np.mean(np.equal(result["predictions"], 0))


# ------------------------------------------------------------------------------------------------------------------- gp.py
def known_strategies(n=40, d=6, seed=0):
    g = torch.Generator().manual_seed(seed)
    X = torch.rand(n, d, generator=g, dtype=torch.float64) * 0.9
    y = (X ** 1.3 * (4 * X).exp() * torch.linspace(0.5, 2, d, dtype=torch.float64)).sum(1).log() + 0.2 * torch.sin(7 * X[:, 0])
    return X, y


GPS = list(itertools.product(("blocks", "constant"), ("matern52", "rbf")))


@pytest.mark.parametrize("mean,kernel", GPS)
def test_log_likelihood_equals_the_multivariate_normals_and_its_gradient_equals_autograds(mean, kernel):
    gp = GaussianProcess(mean, kernel).fit(*known_strategies())
    theta = (gp.theta + 0.1).requires_grad_()
    scaled = gp.X / theta[:-2].exp()
    r2 = ((scaled[:, None] - scaled) ** 2).sum(-1) + 1e-30 * (1 - torch.eye(len(scaled)))
    r = torch.where(r2 > 0, torch.where(r2 > 0, r2, 1).sqrt(), 0)           # an autograd reference needs r = 0 guarded twice
    phi = (-r2 / 2).exp() if kernel == "rbf" else (1 + 5 ** 0.5 * r + 5 / 3 * r2) * (-(5 ** 0.5) * r).exp()
    K = theta[-2].exp() * phi + theta[-1].exp() * torch.eye(len(phi), dtype=torch.float64)
    expected = torch.distributions.MultivariateNormal(torch.zeros(len(K), dtype=torch.float64), K).log_prob(gp.residual)
    expected.backward()
    expected = expected.detach()
    value, gradient = gp.log_marginal_likelihood(theta.detach())
    assert value == pytest.approx(float(expected), rel=1e-10)                                        # float64
    assert relative(gradient, theta.grad) < 1e-6                                                     # float64


@pytest.mark.parametrize("mean,kernel", GPS)
def test_posterior_equals_textbook_algebra_and_its_gradients_equal_finite_differences(mean, kernel):
    X, y = known_strategies()
    gp = GaussianProcess(mean, kernel).fit(X[:30], y[:30])
    K, _ = gp.covariance(gp.theta)
    k = gp.theta[-2].exp() * gp.correlation(X[30:] / gp.theta[:-2].exp(), gp.X / gp.theta[:-2].exp())[0]
    mu = gp.mean(X[30:]) + gp.mean.scale * k @ torch.linalg.inv(K) @ gp.residual
    var = gp.theta[-2].exp() - (k @ torch.linalg.inv(K) * k).sum(1)
    mean_, std = gp.posterior(X[30:])
    assert relative(mean_, mu) < 1e-8 and relative(std, gp.mean.scale * var.sqrt()) < 1e-6           # float64
    dmean, dstd = gp.posterior_gradient(X[30:])
    x = X[30:].clone().requires_grad_()
    torch.stack(gp.posterior(x)).sum().backward()
    assert torch.equal(x.grad, dmean + dstd)
    h = 1e-5
    for i in range(X.shape[1]):
        e = torch.zeros(X.shape[1], dtype=torch.float64)
        e[i] = h
        plus, minus = gp.posterior(X[30:] + e), gp.posterior(X[30:] - e)
        assert relative(dmean[:, i], (plus[0] - minus[0]) / (2 * h)) < 1e-6                          # float64, central differences
        assert relative(dstd[:, i], (plus[1] - minus[1]) / (2 * h)) < 1e-6


@pytest.mark.parametrize("mean,kernel", GPS)
def test_gp_survives_one_strategy_duplicates_constant_values_and_queries_at_training_points(mean, kernel):
    X, y = known_strategies()
    for X, y in ((X[:1], y[:1]), (X[:1].repeat(8, 1), y[:8]), (X, torch.ones(40)), (X.repeat(2, 1), y.repeat(2)), (X * 0, y)):
        gp = GaussianProcess(mean, kernel).fit(X, y)
        values = [*gp.posterior(X), *gp.posterior_gradient(X)]
        assert all(v.isfinite().all() for v in values)
    for X, y in ((X[:0], y[:0]), (X, y * math.nan), (X, y[:3])):
        with pytest.raises(ValueError):
            GaussianProcess(mean, kernel).fit(X, y)
    with pytest.raises(ValueError):
        GaussianProcess("none")


# -------------------------------------------------------------------------------------------------------------- unicuco.py
def test_tchebycheff_worked_by_hand():
    value = unicuco.tchebycheff(torch.tensor([[0.15, 0.45]]), torch.tensor([[0.5, 0.5]]))
    assert float(value) == pytest.approx(0.25 + 0.02 * (0.10 + 0.25))      # max(0.5 * 0.20, 0.5 * 0.50) + 0.02 * their sum


def test_hypervolume_equals_counting_cells_and_the_gain_is_its_difference():
    g = torch.Generator().manual_seed(0)
    for n in (1, 3, 9):
        points = torch.randint(0, 13, (n, 2), generator=g).double() / 10
        cells = torch.cartesian_prod(torch.arange(10), torch.arange(10)).double() / 10 + 0.05
        dominated = ((cells[:, None] >= points).all(2)).any(1)
        assert unicuco.hypervolume(points) == pytest.approx(float(dominated.double().mean()), abs=1e-12)    # float64
        more = torch.rand(20, 2, generator=g, dtype=torch.float64) * 1.2
        gains = [unicuco.hypervolume(torch.cat([points, c[None]])) - unicuco.hypervolume(points) for c in more]
        assert torch.allclose(unicuco.hypervolume_gain(points, more), torch.tensor(gains, dtype=torch.float64), atol=1e-12)
    assert unicuco.hypervolume(torch.empty(0, 2)) == 0


def test_strategy_for_meets_the_counted_sparsity_of_uniform_for_any_stratnet(small, tokens):
    pruner, g = Pruner(load_llama(small)[0], tokens), torch.Generator().manual_seed(0)
    for scale in (0.1, 1, 1e6):                                            # 1e6 saturates every output
        net = unicuco.StratNet(3)
        for p in net.parameters():
            p.data = torch.randn(p.shape, generator=g, dtype=p.dtype) * scale / p.shape[-1] ** 0.5
        for s in (0.0, 0.01, 0.3, 0.5, 0.77, 0.9):
            x = unicuco.strategy_for(net, s, pruner.sparsity)
            assert abs(pruner.sparsity(x) - pruner.sparsity([s] * 3)) <= 1 / (3 * 64) and x.min() >= 0 and x.max() <= 0.9
    for s in (-0.1, 0.91, math.nan):
        with pytest.raises(ValueError):
            unicuco.strategy_for(net, s, pruner.sparsity)


def separable(blocks=12):
    """A cheap f2 = sum_i w_i x_i^2, and its Pareto set by Lagrange: x_i = min(MAX, t / w_i)."""
    w = 10 ** torch.linspace(-2, 0, blocks, dtype=torch.float64)
    return (lambda x: (w * x ** 2).sum(-1)), (lambda t: (t[:, None] / w).clamp(max=unicuco.MAX))


def test_algorithm_1_reaches_98_percent_of_a_known_pareto_front_and_random_search_does_not():
    f2, pareto = separable()
    front = pareto(torch.logspace(-4, 0.05, 4000, dtype=torch.float64))
    front = front[(front.mean(1) >= 0.05) & (front.mean(1) <= 0.85)]
    scale = unicuco.Scale.of(f2(front).log())
    volume = lambda x: unicuco.hypervolume(scale(x, f2(x).clamp(min=1e-6).log()))
    uniform = torch.linspace(0.05, 0.9, 2000, dtype=torch.float64)[:, None].expand(-1, 12)
    assert volume(uniform) < 0.9 * volume(front)
    net, *_, log = train.search(lambda strategies: [float(f2(x)) for x in strategies], 12)
    l1 = torch.linspace(0, 1, 1000, dtype=torch.float64)
    with torch.no_grad():
        reached = volume(net(torch.stack([l1, 1 - l1], 1)))
    anything = unicuco.first_design(len(log), 12, torch.Generator().manual_seed(0))
    print(f"hypervolume: front {volume(front):.4f}, StratNet {reached:.4f}, uniform {volume(uniform):.4f}, random {volume(anything):.4f}")
    assert len(log) == 104 and reached >= 0.98 * volume(front) and volume(anything) < 0.98 * volume(front)
    last = [abs(e["predicted"] / e["measured"] - 1) for e in log[-4:]]
    assert np.median(last) < 0.2


# ---------------------------------------------------------------------------------------------------------------- prune.py
def test_wanda_differs_from_magnitude_on_a_case_worked_by_hand():
    W, x_norm = torch.tensor([[3., -1., 2.], [1., 4., -1.]]), torch.tensor([1., 5., 1.])
    # scores [[3, 5, 2], [1, 20, 1]]: row 0 loses the 2 (magnitude would lose the -1); row 1 ties, the first column goes
    assert keep_mask(METRICS["wanda"](W, x_norm), 1 / 3).int().tolist() == [[1, 1, 0], [0, 1, 1]]
    assert keep_mask(METRICS["magnitude"](W, x_norm), 1 / 3).int().tolist() == [[1, 0, 1], [0, 1, 1]]


def test_masks_drop_exact_counts_in_stable_order_and_are_nested():
    score = (torch.randn(7, 100, generator=torch.Generator().manual_seed(0)).abs() * 4).round()      # many ties
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
        rank(score * math.nan)


def test_activation_norms_equal_those_seen_by_hooks(small, tokens):
    model, _ = load_llama(small)
    seen, hooks = {}, []
    for name, module in model.named_modules():
        if name.endswith("_proj"):
            hooks.append(module.register_forward_hook(
                lambda m, args, out, name=name: seen.__setitem__(name + ".weight", args[0].double().flatten(0, 1).square().sum(0).sqrt())))
    with torch.no_grad():
        model(tokens)
    norms = prune.activation_norms(model, tokens)
    assert norms.keys() == seen.keys() and all(relative(norms[n].double(), seen[n]) < 1e-5 for n in seen)     # float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_applying_a_strategy_sets_plus_zero_and_counts_exactly_and_restoring_brings_all_back(small, tokens, dtype):
    model, _ = load_llama(small, dtype=dtype)
    before, pruner = {n: p.clone() for n, p in model.named_parameters()}, Pruner(model, tokens)
    for strategy in ([0.0, 0.5, 0.99], [0.3, 0.3, 0.3]):
        pruner.apply(strategy)
        masks = pruner.masks(strategy)
        for name, p in model.named_parameters():
            kept = masks.get(name, torch.ones((), dtype=torch.bool))
            assert torch.equal(p, torch.where(kept, before[name], 0)) and not (p[~kept.expand_as(p)].signbit()).any()
        dropped = sum(int((~m).sum()) for m in masks.values())
        assert pruner.sparsity(strategy) == dropped / sum(m.numel() for m in masks.values())
    pruner.restore()
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    for wrong in ([0.5] * 2, [0.5, 0.5, 1.0], [0.5, math.nan, 0.1]):
        with pytest.raises(ValueError):
            pruner.apply(wrong)


# ----------------------------------------------------------------------------------------------------------------- README
def test_every_flag_and_every_number_in_the_readme_is_real():
    sources, readme = {p.name: p.read_text() for p in ROOT.glob("*.py")}, (ROOT / "README.md").read_text()
    for flag in set(re.findall(r"(?<![\w-])--([a-z][a-z-]+)", readme)) - {"nproc-per-node"}:
        assert any(f"--{flag}" in code for code in sources.values()), f"README names --{flag}"
    for name, code in sources.items():
        for flag in re.findall(r'add_argument\("--([a-z-]+)"', code) if name != "llama.py" else ():
            assert re.search(rf"\ba\.{flag.replace('-', '_')}\b", code), f"{name} never reads --{flag}"

    def numbers(value):
        if isinstance(value, (dict, list)):
            return [n for v in (value.values() if isinstance(value, dict) else value) for n in numbers(v)] + (
                [float(k) for k in value if re.fullmatch(r"[0-9.]+", k)] if isinstance(value, dict) else [])
        return [float(value)] if isinstance(value, (int, float)) else [float(n) for n in re.findall(r"\d+\.\d+", value or "")]

    known = [n for path in (ROOT / "results").glob("*.json") for n in numbers(json.loads(path.read_text()))]
    for line in re.findall(r"^\|.*\d.*$", readme, re.M):
        for token in re.findall(r"(?<![\w.])\d+\.\d+(?![\w.])", line):
            digits = len(token.split(".")[1])
            assert any(f"{n:.{digits}f}" == token for n in known), f"no result is {token}: {line}"
