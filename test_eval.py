"""
Texts, perplexity, KL and zero-shot tasks: against plain loops, by hand, and on the command line.

Run       pytest test_eval.py        (each tolerance has its dtype beside it)
"""

import gzip
import itertools
import json
import math
import re
import shutil
import sys

import numpy as np
import pytest
import scipy.stats
import torch
from safetensors.torch import load_file, save_file

import eval as evaluation
import llama
from conftest import CPU, ROOT, call, random_model, refuses, write_tasks
from llama import load_llama
from model import Config, Llama
from ranks import Pruner
from script import Refused
from unicuco import log_divergence


def test_wikitext_rows_are_joined_like_the_hugging_face_data_set():
    assert evaluation.wikitext(" \n = A = \n \n text\n") == "\n\n".join(
        ["", " = A = \n", "", " text\n"]
    )


def test_perplexity_equals_a_plain_loop_whatever_the_batch(small, tokens, monkeypatch):
    model, flat = load_llama(small)[0], tokens.flatten()[:1000]
    with torch.no_grad():
        losses = [
            torch.nn.functional.cross_entropy(model(w[None])[0, :-1], w[1:], reduction="sum")
            for w in flat[:960].view(-1, 64)
        ]
    expected = math.exp(sum(map(float, losses)) / (15 * 63))
    for batch, chunk in ((2048, 2**22), (64, 2**13), (200, 2**20)):
        monkeypatch.setattr(evaluation, "BATCH", batch)
        monkeypatch.setattr(evaluation, "CHUNK", chunk)
        # float32
        assert evaluation.perplexity(model, flat, 64) == pytest.approx(expected, rel=1e-5)
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
    expected = (
        torch.nn.functional.kl_div(pruned, dense, log_target=True, reduction="sum") / tokens.numel()
    )
    kl, ppl = divergence.measure()
    # float32
    assert kl == pytest.approx(float(expected), rel=1e-4) and kl == divergence()
    assert ppl == pytest.approx(evaluation.perplexity(model, tokens.flatten(), 64), rel=1e-6)
    pruner.restore()
    assert divergence() == 0


def test_zero_shot_prompts_are_those_of_the_harness():
    row = dict(
        activity_label="Roof",
        ctx_a="A man [step] sits.",
        ctx_b="he",
        endings=["[title] up  now [x].", " stays [title] ok"],
        label=1,
    )
    contexts, endings, lengths, gold = evaluation.prompts("hellaswag", row)
    assert contexts == ["Roof: A man sits. He"] * 2 and endings == ["  up now .", " stays. ok"]
    assert lengths == [9, 9] and gold == 1
    row = dict(sentence="Ann beat Eve so _ won.", option1="Ann", option2="Eve", answer="2")
    assert evaluation.prompts("winogrande", row) == (
        ["Ann beat Eve so Ann", "Ann beat Eve so Eve"],
        [" won."] * 2,
        None,
        1,
    )
    row = dict(question="Why?", choices=dict(text=["a", "bc"], label=["1", "2"]), answerKey="2")
    assert evaluation.prompts("arc_easy", row) == (
        ["Question: Why?\nAnswer:"] * 2,
        [" a", " bc"],
        [1, 2],
        1,
    )


def test_zero_shot_picks_the_likelier_choice_by_a_plain_loop(small):
    model, tokenizer = load_llama(small)
    rows = [
        dict(goal=f"import {a}", sol1=f"{b} of it", sol2=f"the {c} is long", label=0)
        for a, b, c in itertools.product("xyz", "pq", "uv")
    ]
    result = evaluation.zero_shot(model, tokenizer, "piqa", rows)
    for row, chosen, normed in zip(rows, result["predictions"], result["predictions_norm"]):
        scores = []
        for choice in (row["sol1"], row["sol2"]):
            context = [tokenizer.bos_id] + tokenizer.encode(f"Question: {row['goal']}\nAnswer:")
            ids = torch.tensor(
                [tokenizer.bos_id] + tokenizer.encode(f"Question: {row['goal']}\nAnswer: {choice}")
            )
            with torch.no_grad():
                logp = model(ids[None])[0, :-1].log_softmax(-1).gather(1, ids[1:, None])[:, 0]
            scores.append(float(logp[len(context) - 1 :].sum()))
        assert chosen == int(np.argmax(scores))
        assert normed == int(
            np.argmax([scores[0] / len(row["sol1"]), scores[1] / len(row["sol2"])])
        )
    assert result["acc"] == np.mean(np.equal(result["predictions"], 0))


def test_kl_perplexity_bits_and_choices_do_not_depend_on_how_tokens_are_batched(
    tokens, monkeypatch
):
    model, g = random_model(), torch.Generator().manual_seed(0)
    pairs = [
        (torch.randint(3, 512, (n,), generator=g).tolist(), n // 3 + 1)
        for n in (4, 9, 9, 30, 127, 140, 200)
    ]
    pruner, results = Pruner(model, tokens), []
    for batch, chunk in ((2048, 2**23), (64, 512), (200, 2**14), (1, 1)):
        monkeypatch.setattr(evaluation, "BATCH", batch)
        monkeypatch.setattr(evaluation, "CHUNK", chunk)
        pruner.restore()
        divergence = evaluation.Divergence(model, tokens)
        pruner.apply([0.3, 0.5, 0.4])
        results.append(
            [
                *divergence.measure(),
                evaluation.perplexity(model, tokens.flatten(), 64),
                evaluation.bits_per_byte(model, tokens.flatten()[:700], 2000, 1, 64),
                *evaluation.log_likelihoods(model, pairs).tolist(),
            ]
        )
    for other in results[1:]:
        # float32
        assert other == pytest.approx(results[0], rel=1e-5)


def test_log_likelihoods_and_bits_per_byte_equal_plain_loops(tokens):
    model, g = random_model(), torch.Generator().manual_seed(0)

    # of every token but the first, given those before it
    def logp(ids):
        with torch.no_grad():
            return (
                model(torch.tensor([ids]))[0, :-1]
                .double()
                .log_softmax(-1)
                .gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
            )

    pairs = [
        (torch.randint(3, 512, (n,), generator=g).tolist(), c)
        for n, c in ((5, 1), (5, 4), (64, 20), (128, 3), (129, 7), (160, 12))
    ]
    # 128 positions, and the last target
    expected = [float(logp(ids[-129:])[-count:].sum()) for ids, count in pairs]
    # float32
    assert evaluation.log_likelihoods(model, pairs).tolist() == pytest.approx(expected, rel=1e-5)
    ids = tokens.flatten()[:150].tolist()
    # the last window is shorter
    total = sum(float(logp([1, *ids[i : i + 64]]).sum()) for i in (0, 64, 128))
    assert evaluation.bits_per_byte(model, torch.tensor(ids), 400, 1, 64) == pytest.approx(
        -total / math.log(2) / 400, rel=1e-5
    )


def test_a_text_and_a_question_open_with_exactly_one_begin_token():
    tokenizer = llama.Tokenizer(ROOT / "tiny", 4096)
    ids = evaluation.tokenise(tokenizer, ["import os\n", "x = 1\n"])
    assert ids.tolist() == [
        tokenizer.bos_id,
        *tokenizer.encode("import os\n"),
        *tokenizer.encode("x = 1\n"),
    ]
    # the space goes with the continuation
    whole, count = evaluation.encode_pair(tokenizer, "import ", "os, sys")
    assert whole == [tokenizer.bos_id, *tokenizer.encode("import os, sys")]
    assert whole[:-count] == [tokenizer.bos_id, *tokenizer.encode("import")]


def test_normalised_accuracy_divides_by_characters_not_by_tokens(monkeypatch):
    tokenizer, row = (
        llama.Tokenizer(ROOT / "tiny", 4096),
        dict(goal="x", sol1="import os, import sys", sol2="\x00\x01\x02", label=0),
    )
    monkeypatch.setattr(
        evaluation,
        "log_likelihoods",
        lambda model, pairs, label: torch.tensor([-14.0, -3.0], dtype=torch.float64),
    )
    result = evaluation.zero_shot(None, tokenizer, "piqa", [row])
    # per character -14 / 21 and -3 / 3; per token the second would win, for each of its characters
    # is one
    assert (
        result["predictions"] == [1]
        and result["predictions_norm"] == [0]
        and (result["acc"], result["acc_norm"]) == (0, 1)
    )


def test_standard_errors_equal_scipys_and_no_token_is_both_chosen_on_and_tested_on(tmp_path):
    right = np.array([1.0, 0, 0, 1, 1, 1])
    assert evaluation.standard_error(right) == pytest.approx(
        scipy.stats.sem(right), rel=1e-12
    ) and math.isnan(evaluation.standard_error([1.0]))
    tokenizer = llama.Tokenizer(ROOT / "tiny", 4096)
    (tmp_path / "one.txt").write_text(" ".join(map(str, range(2000))))
    (tmp_path / "many.jsonl").write_text(
        "\n".join(json.dumps({"text": f"document {i} of ten " * 20}) for i in range(10))
    )
    for name in ("one.txt", "many.jsonl"):
        windows, held_out = evaluation.load_texts(tokenizer, tmp_path / name, None, 16)
        unseen = next(iter(held_out.values()))
        assert not {tuple(w) for w in windows.tolist()} & {tuple(w) for w in unseen.tolist()}
        assert 3 < len(windows) / len(unseen) < 5
        parts = evaluation.draw(windows, [5, 7, 3], seed=0)
        assert [len(p) for p in parts] == [5, 7, 3] and len(
            {tuple(w) for p in parts for w in p.tolist()}
        ) == 15
    with pytest.raises(ValueError, match="are needed"):
        evaluation.draw(windows, [len(windows), 1], seed=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_kl_is_0_for_the_dense_model_and_positive_for_any_pruned_one(tokens, dtype):
    model, g = random_model(dtype=dtype), torch.Generator().manual_seed(0)
    divergence, pruner = evaluation.Divergence(model, tokens), Pruner(model, tokens)
    assert divergence() == 0
    for _ in range(10):
        strategy = torch.rand(3, generator=g) * 0.9 + 0.02
        pruner.apply(strategy)
        kl, ppl = divergence.measure()
        assert 0 < kl < 100 and 1 < ppl < math.inf
    pruner.apply([0.0] * 3)
    assert divergence() == 0


@pytest.mark.parametrize(
    "dtype,ruin",
    [
        (torch.float32, math.nan),
        (torch.float32, 3e38),
        (torch.bfloat16, 3e38),
        (torch.float16, 6e4),
    ],
)
def test_nan_weights_and_overflowing_activations_never_give_a_small_kl(tokens, dtype, ruin):
    model = random_model(dtype=dtype)
    divergence = evaluation.Divergence(model, tokens)
    model.blocks[1].mlp.down_proj.weight.data.fill_(ruin)
    kl, ppl = divergence.measure()
    assert not math.isfinite(kl) and math.isnan(ppl) and log_divergence(kl) == math.log(100)
    with pytest.raises(ValueError, match="overflow"):
        Pruner(model, tokens)


def test_eval_prints_the_perplexity_the_kl_and_the_bits_that_its_functions_give(
    small, pruned, text, capsys
):
    assert (
        call(
            evaluation,
            "--model",
            pruned,
            "--dense",
            small,
            "--data",
            text,
            "--seqlen",
            64,
            "--tokens",
            1000,
            "--bits",
            "--accelerate",
            *CPU,
        )
        == 0
    )
    printed = capsys.readouterr().out
    (dense, tokenizer), model = load_llama(small), load_llama(pruned)[0]
    tokens = evaluation.tokenise(tokenizer, evaluation.read_documents(text))
    divergence = evaluation.Divergence(dense, evaluation.cut(tokens[:1000], 64))
    kl = divergence(model)
    assert f"KL {kl:.6f} nats per token, KL(small || pruned)" in printed and kl > 0
    assert (
        f"perplexity {evaluation.perplexity(model, tokens[:1000], 64):.4f}  pruned on text.py: 15"
        " windows of 64, 945 tokens scored" in printed
    )
    size = len(text.read_bytes())
    assert (
        f"bits per byte {evaluation.bits_per_byte(model, tokens[1:], size, 1, 64):.4f} over"
        f" {size} bytes" in printed
    )
    assert "no speed-up on cpu" in printed


def test_eval_prints_zero_shot_accuracies_with_paired_differences_which_are_0_from_itself(
    small, text, tasks, capsys
):
    assert (
        call(
            evaluation,
            "--model",
            small,
            "--dense",
            small,
            "--data",
            text,
            "--seqlen",
            64,
            "--tokens",
            128,
            "--tasks",
            tasks,
            "--limit",
            3,
            *CPU,
        )
        == 0
    )
    # as the dense model, then as the model
    first, second = capsys.readouterr().out.split("model small:\n")[1:]
    lines = re.findall(
        r"^(\w+) +(acc\w*) +([\d.]+) ± ([\d.]+)  \(3 documents\)"
        r"   ([+-][\d.]+) ± ([\d.]+) paired",
        second,
        re.M,
    )
    assert [(task, metric) for task, metric, *_ in lines] == [
        (t, m)
        for t in evaluation.TASKS
        for m in ("acc", "acc_norm")
        if (t, m) != ("winogrande", "acc_norm")
    ]
    assert (
        all(float(change) == float(error) == 0 for *_, change, error in lines)
        and "paired" not in first
    )
    model, tokenizer = load_llama(small)
    results = {
        t: evaluation.zero_shot(model, tokenizer, t, evaluation.read_rows(tasks, t))
        for t in evaluation.TASKS
    }
    for task, metric, value, error, *_ in lines:
        right = np.equal(
            results[task]["predictions" if metric == "acc" else "predictions_norm"],
            results[task]["gold"],
        )
        assert float(value) == pytest.approx(right.mean(), abs=5e-5) and float(
            error
        ) == pytest.approx(np.std(right, ddof=1) / 3**0.5, abs=5e-5)
    assert f"{np.mean([r['acc'] for r in results.values()]):.4f}" in second.split("average")[1]
    assert second.count("+0.0000 ± 0.0000 paired") == len(lines) + 1  # and of the average


def test_the_change_of_an_average_is_paired_by_document_on_a_case_worked_by_hand():
    right, wrong = {"gold": [1, 1], "predictions": [1, 1]}, {"gold": [1, 1], "predictions": [0, 1]}
    # changes of the first task 1 and 0: mean 1/2, error sqrt(1/2) / sqrt(2) = 1/2; of the second 0
    change, error = evaluation.average_change({"a": right, "b": right}, {"a": wrong, "b": right})
    assert (change, error) == (0.25, pytest.approx(0.25, rel=1e-12))


def test_a_forward_pass_is_timed_and_bad_arguments_of_eval_are_one_line(small, text, tasks, capsys):
    assert evaluation.seconds(load_llama(small)[0], torch.full((1, 8), 5), repeats=2) > 0
    (tasks / evaluation.TASKS["hellaswag"]).write_text("")
    (tasks / "broken").mkdir()
    for words in (
        ("--limit", 1),
        ("--seqlen", 129),
        ("--tasks", tasks / "broken"),
        ("--tasks", tasks),
        ("--data", tasks),
        ("--dense", tasks),
    ):
        assert call(evaluation, "--model", small, "--data", text, *words, *CPU) == 2
        assert len(capsys.readouterr().err.strip().splitlines()) == 1
    with pytest.raises(ValueError, match="is not one of"):
        evaluation.zero_shot(None, None, "chess", [])
    with pytest.raises(ValueError, match="does not have the task's fields"):
        evaluation.zero_shot(None, None, "piqa", [{"goal": "x"}])


def test_kl_sends_each_models_states_through_its_own_head(tmp_path, capsys):
    copy = tmp_path / "copy"
    shutil.copytree(ROOT / "tiny", copy)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    weights = {n: W.clone() for n, W in load_file(copy / "model.safetensors").items()}
    head = weights["model.embed_tokens.weight"].clone()
    head[:, ::2] = 0
    save_file(weights | {"lm_head.weight": head}, copy / "model.safetensors", {"format": "pt"})
    words = ("--model", copy, "--dense", ROOT / "tiny", "--tokens", 2048, *CPU)
    assert call(evaluation, *words) == 0
    printed = capsys.readouterr().out
    kl, ppl = (
        re.search(r"KL ([\d.]+) nats", printed)[1],
        re.search(r"perplexity ([\d.]+)", printed)[1],
    )
    assert float(kl) == pytest.approx(1.486, abs=5e-4)  # float32; 0 through the dense model's head
    assert float(ppl) == pytest.approx(82.5, abs=0.1)


def test_models_of_different_vocabulary_have_no_kl():
    wide = Llama(Config(600, 64, 96, 1, 4, 2, 16, 128)).eval()
    divergence = evaluation.Divergence(random_model(), torch.full((1, 8), 5))
    with pytest.raises(Refused, match="different vocabulary, 512 and 600"):
        divergence(wide)


def test_json_rows_are_recognised_by_content_whatever_the_file_is_called(tmp_path):
    rows = [{"text": "one\u2028line {x}", "url": "http://a"}, {"text": "two"}]
    lines = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    expected = ["one\u2028line {x}\n\n", "two\n\n"]
    written = {
        "c4-train.00000-of-01024.json": lines.encode(),
        "a.JSONL": lines.encode(),
        "a.ndjson": ("\ufeff" + lines + "\n").encode(),
        "a.txt": lines.replace("\n", "\r\n").encode(),
        "list.json": json.dumps(rows).encode(),
        "c4.json.gz": gzip.compress(lines.encode()),
    }
    for name, raw in written.items():
        (tmp_path / name).write_bytes(raw)
        assert evaluation.read_documents(tmp_path / name) == expected, name
    (tmp_path / "code.py").write_text("{x: 1}\n{y")
    assert evaluation.read_documents(tmp_path / "code.py") == ["{x: 1}\n{y"]
    for name, raw in (
        ("b.json", b'{"a": 1}'),
        ("c.jsonl", b"text"),
        ("d.gz", b"no"),
        ("e", b"\xff"),
    ):
        (tmp_path / name).write_bytes(raw)
        refuses(evaluation.read_documents, tmp_path / name)


def test_line_ends_of_windows_and_a_byte_order_mark_change_no_wikitext(tmp_path):
    text = " \n = A = \n \n text\n"
    for name, raw in (
        ("a.raw", text),
        ("b.raw", "\ufeff" + text),
        ("c.raw", text.replace("\n", "\r\n")),
    ):
        (tmp_path / name).write_bytes(raw.encode())
        assert evaluation.read_documents(tmp_path / name) == [evaluation.wikitext(text)]


def test_a_label_may_be_a_string_and_a_row_without_its_right_answer_is_refused():
    row = {"goal": "g", "sol1": "a", "sol2": "b"}
    assert evaluation.all_prompts("piqa", [row | {"label": "1"}])[0][3] == 1
    for label in (-1, 2, "-1"):
        refuses(evaluation.all_prompts, "piqa", [row | {"label": label}], match="no right answer")
    swag = {"activity_label": "A", "ctx_a": "b", "ctx_b": "c", "endings": ["d", "e"], "label": "1"}
    assert evaluation.all_prompts("hellaswag", [swag])[0][3] == 1
    refuses(evaluation.all_prompts, "hellaswag", [swag | {"label": ""}])


def test_two_seeds_draw_two_sets_of_windows_and_one_seed_draws_one():
    windows = torch.arange(64).view(32, 2)
    first, again, other = (evaluation.draw(windows, [4, 4], seed) for seed in (0, 0, 1))
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
    assert not torch.equal(first[0], other[0])


def test_bits_are_counted_when_the_tokens_fill_their_windows_or_not_even_one(small):
    model, _ = load_llama(small)
    tokens = torch.randint(3, 4096, (128,), generator=torch.Generator().manual_seed(0))
    for count, seqlen in ((128, 64), (100, 64), (64, 64), (30, 64)):
        bits = evaluation.bits_per_byte(model, tokens[:count], 1000, 1, seqlen)
        total = 0.0
        for window in tokens[:count].split(seqlen):
            x = torch.cat([torch.tensor([1]), window[:-1]])
            log_p = model(x[None])[0].log_softmax(-1)
            total -= float(log_p.gather(1, window[:, None]).sum())
        assert bits == pytest.approx(total / math.log(2) / 1000, rel=1e-5)  # float32


def test_rows_too_deep_to_read_are_one_line(tmp_path):
    write_tasks(tmp_path)
    (tmp_path / evaluation.TASKS["piqa"]).write_text("[" * 10**5)
    refuses(evaluation.read_rows, tmp_path, "piqa", match="cannot be read")


@pytest.mark.parametrize("p", [0.5, 0.95, 0.999])
@pytest.mark.parametrize("freedom", [2, 3, 7, 31, 255])
def test_the_quantile_of_students_t_equals_scipys(p, freedom):
    right = scipy.stats.t.ppf(p, freedom)
    assert evaluation.t_quantile(p, freedom) == pytest.approx(
        right, rel=1e-11, abs=1e-11
    )  # float64


def test_what_kl_stays_below_is_the_t_interval_of_its_windows_and_covers_as_often_as_it_says(small):
    model, _ = load_llama(small)
    windows = torch.randint(3, 4096, (6, 64), generator=torch.Generator().manual_seed(0))
    divergence = evaluation.Divergence(model, windows)
    Pruner(model, windows).apply([0.5] * 3)
    kl = divergence()
    each = [evaluation_of_window(model, small, w) for w in windows]
    assert divergence.of_windows.tolist() == pytest.approx(each, rel=1e-5)  # float32
    low, high = scipy.stats.t.interval(0.9, 5, np.mean(each), scipy.stats.sem(each))
    assert divergence.at_most(0.95) == pytest.approx(high, rel=1e-3) and kl < high
    drawn = np.random.default_rng(0).gamma(4.0, 0.1, (2000, 6))  # windows of mean 0.4
    covered = 0
    for sample in drawn:
        divergence.of_windows = torch.tensor(sample)
        covered += divergence.at_most(0.95) >= 0.4
    assert 0.90 < covered / 2000 < 0.97


def evaluation_of_window(pruned, folder, window):
    """KL(dense || pruned) of one window, by torch.distributions."""
    dense, _ = load_llama(folder)
    with torch.no_grad():
        p, q = (torch.distributions.Categorical(logits=m(window[None])[0]) for m in (dense, pruned))
    return float(torch.distributions.kl_divergence(p, q).mean())


def test_texts_of_one_name_are_told_apart_and_no_text_is_tested_on_that_was_chosen_on(tmp_path):
    tokenizer = llama.Tokenizer(ROOT / "tiny", 4096)
    numbers = [" ".join(map(str, range(k, k + 2000))) for k in (0, 10000, 20000)]
    paths = [tmp_path / name / "test.txt" for name in "abc"]
    for path, text in zip(paths, numbers):
        path.parent.mkdir()
        path.write_text(text)
    _, held_out = evaluation.load_texts(tokenizer, paths[0], paths[1:], 16)
    assert list(held_out) == [str(path) for path in paths[1:]]
    assert not torch.equal(*(windows[:9] for windows in held_out.values()))
    same = tmp_path / "a" / ".." / "a" / "test.txt"
    for data, tests in ((paths[0], [same]), (None, [paths[0], same])):
        refuses(evaluation.load_texts, tokenizer, data, tests, 16, match="is given twice")
    paths[2].write_text("x" + numbers[1] + " and more")  # other windows of the same text
    refuses(evaluation.load_texts, tokenizer, paths[1], paths[2:], 16, match="in --data too")


def test_shared_windows_are_found_wherever_they_stand():
    tokens = torch.arange(1000) % 97
    windows = torch.stack([tokens[5:69], tokens[90:154], torch.arange(64), torch.zeros(64).long()])
    assert evaluation.are_shared(windows, tokens).tolist() == [True, True, True, False]
    windows[:3, -1] += 1
    assert not evaluation.are_shared(windows, tokens).any()
    assert evaluation.are_shared(torch.arange(8)[None], tokens).tolist() == [True]


@pytest.mark.parametrize("count", [3, 10])
def test_what_a_text_repeats_is_not_tested_on(tmp_path, count):
    tokenizer = llama.Tokenizer(ROOT / "tiny", 4096)
    own = [" ".join(map(str, range(k, k + 300))) for k in range(0, 1000 * count, 1000)]
    repeated = [*own[: count - 1], own[0] + own[count - 1]]  # the first again, in the last fifth
    path = tmp_path / "text.jsonl"
    path.write_text("\n".join(json.dumps({"text": text}) for text in repeated))
    chosen_on, held_out = evaluation.load_texts(tokenizer, path, None, 8)
    (windows,) = held_out.values()
    assert len(windows) and not evaluation.are_shared(windows, chosen_on.flatten()).any()
    path.write_text("\n".join(json.dumps({"text": text}) for text in [own[0]] * count))
    refuses(evaluation.load_texts, tokenizer, path, None, 8, match="give a --test")


def write_parquet(path, rows):
    pyarrow = pytest.importorskip("pyarrow")
    pytest.importorskip("pyarrow.parquet").write_table(pyarrow.Table.from_pylist(rows), path)


def test_parquet_and_zstandard_give_the_documents_that_the_other_formats_give(tmp_path):
    rows = [{"text": "one\n\nline", "url": "http://a"}, {"text": "two\n", "url": None}]
    write_parquet(tmp_path / "000_00000.parquet", rows)
    assert evaluation.read_documents(tmp_path / "000_00000.parquet") == [
        "one\n\nline\n\n",
        "two\n\n\n",
    ]
    pack = pytest.importorskip("zstandard").ZstdCompressor().compress
    lines = "\n".join(map(json.dumps, rows))
    (tmp_path / "c4.jsonl.zst").write_bytes(pack(lines.encode()) + pack(b"\n" + lines.encode()))
    assert len(evaluation.read_documents(tmp_path / "c4.jsonl.zst")) == 4  # two frames
    write_parquet(tmp_path / "no_text.parquet", [{"content": "x"}])
    write_parquet(tmp_path / "numbers.parquet", [{"text": 5}])
    for name in ("broken.parquet", "broken.zst"):
        (tmp_path / name).write_bytes(b"PAR1 no")
    for name in ("no_text.parquet", "numbers.parquet", "broken.parquet", "broken.zst"):
        refuses(evaluation.read_documents, tmp_path / name)


def test_wikitext_as_parquet_is_the_string_of_the_raw_file(tmp_path):
    raw = " \n = A = \n \n text one \n \n \n = = B = = \n more \n"
    lines = raw.split("\n")[:-1]  # the data set has a row for each line, blank ones empty
    rows = [{"text": line + "\n" if line.strip() else ""} for line in lines]
    write_parquet(tmp_path / "test-00000-of-00001.parquet", rows)
    (tmp_path / "wiki.test.raw").write_text(raw)
    parquet, plain = (
        evaluation.read_documents(tmp_path / name)
        for name in ("test-00000-of-00001.parquet", "wiki.test.raw")
    )
    assert parquet == plain == [evaluation.wikitext(raw)]


def test_task_sets_as_parquet_or_packed_give_the_same_rows(tasks):
    pack = pytest.importorskip("zstandard").ZstdCompressor().compress
    packers = {".gz": gzip.compress, ".zst": pack}
    for i, (task, name) in enumerate(evaluation.TASKS.items()):
        rows, path = evaluation.read_rows(tasks, task), tasks / name
        if i < 3:
            write_parquet(path.with_suffix(".parquet"), rows)
        else:
            suffix = (".gz", ".zst")[i - 3]
            (tasks / (name + suffix)).write_bytes(packers[suffix](path.read_bytes()))
        path.unlink()
        assert evaluation.read_rows(tasks, task) == rows and len(rows) == 3
        assert evaluation.read_rows(tasks, task, 2) == rows[:2]


def test_a_missing_optional_package_is_named(tmp_path, monkeypatch):
    for name, packages in (
        ("a.parquet", ("pyarrow.parquet", "pyarrow")),
        ("a.zst", ("zstandard",)),
    ):
        (tmp_path / name).write_bytes(b"x")
        for package in packages:
            monkeypatch.setitem(sys.modules, package, None)
        match = f"{name} needs one more package: pip install {packages[-1]}"
        refuses(evaluation.read_documents, tmp_path / name, match=match)


def test_of_a_large_file_documents_are_drawn_by_the_seed_and_only_as_many_as_are_needed(
    tmp_path, monkeypatch
):
    tokenizer = llama.Tokenizer(ROOT / "tiny", 4096)
    texts = [f"document {i} of many, " * 3 + f"its end is {i}" for i in range(2000)]
    rows = [json.dumps({"text": text}) for text in texts]
    (tmp_path / "c4.json").write_bytes(b"\xef\xbb\xbf" + "\r\n\n".join(rows).encode() + b"\n")
    (tmp_path / "c4.json.gz").write_bytes(gzip.compress((tmp_path / "c4.json").read_bytes()))
    write_parquet(tmp_path / "c4.parquet", [{"text": text} for text in texts])
    whole, tested = evaluation.load_texts(tokenizer, tmp_path / "c4.json", None, 16)
    first = evaluation.tokenise(tokenizer, evaluation.read_documents(tmp_path / "c4.json"), 99)
    monkeypatch.setattr(evaluation, "LARGE", 1000)
    monkeypatch.setattr(evaluation, "POOL", 2000)
    drawn = {}
    for name, seed in itertools.product(("c4.json", "c4.json.gz", "c4.parquet"), (0, 0, 1)):
        documents = evaluation.read_documents(tmp_path / name)
        assert isinstance(documents, evaluation.Lazy)
        assert list(documents) == [text + "\n\n" for text in texts]
        assert torch.equal(evaluation.tokenise(tokenizer, documents, 99), first)
        windows, held_out = evaluation.load_texts(tokenizer, tmp_path / name, None, 16, seed)
        assert torch.equal(windows, drawn.setdefault(seed, windows))  # same seed, same windows
        (unseen,) = held_out.values()
        assert torch.equal(unseen, next(iter(tested.values()))[: len(unseen)])  # as of a small one
        assert 2000 / 16 <= len(windows) < len(whole) / 2
    assert not torch.equal(drawn[0][:50], drawn[1][:50])
    many, _ = evaluation.load_texts(tokenizer, tmp_path / "c4.json", None, 16, 0, 20000)
    assert len(many) >= 1250 and torch.equal(many[:100], drawn[0][:100])
    (tmp_path / "plain.txt").write_text("{not JSON}\n" * 200)
    assert len(evaluation.read_documents(tmp_path / "plain.txt")) == 1
    (tmp_path / "flawed.json").write_text("\n".join([*rows[:200], "{no}"]))
    flawed = evaluation.read_documents(tmp_path / "flawed.json")
    refuses(evaluation.tokenise, tokenizer, flawed, match="no JSON object with a text at byte")
