"""
The scripts as their users call them, most in this process: what they print is what the functions give, what they write can be read again.

Run       pytest test_commands.py
"""
import json
import math
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import eval as evaluation
import llama
import plot
import prune
import train
import unicuco
import wishes
from llama import load_llama
from test_unicuco import ROOT, write_small

CPU = ("--device", "cpu", "--dtype", "float32")


def call(module, *words):
    """The script in this process, as from the command line: its exit code."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [module.__name__ + ".py", *map(str, words)])
        try:
            llama.run(module.main, ": a hint")
        except SystemExit as end:
            return end.code
    return 0


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return write_small(tmp_path_factory.mktemp("model") / "small")


@pytest.fixture(scope="module")
def pruned(small, tmp_path_factory):
    """The small model with half of its weights gone."""
    model, folder = load_llama(small)[0], tmp_path_factory.mktemp("model") / "pruned"
    pruner = prune.Pruner(model, torch.randint(3, 4096, (4, 64), generator=torch.Generator().manual_seed(0)))
    llama.save_llama(model, folder, small, pruner.masks([0.5] * 3))
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.py"
    path.write_text((ROOT / "train.py").read_text())
    return path


def write_tasks(folder):
    """Three rows of every zero-shot task."""
    piqa = dict(goal="To open a door", sol1="turn the handle", sol2="eat the handle", label=0)
    arc = dict(question="What is water?", choices=dict(text=["a liquid", "a stone", "a bird"], label=["A", "B", "C"]), answerKey="A")
    swag = dict(activity_label="Roof", ctx_a="A man sits.", ctx_b="he", endings=["stands up.", "flies.", "is blue."], label=0)
    wino = dict(sentence="Ann beat Eve so _ won.", option1="Ann", option2="Eve", answer="1")
    for task, row in (("piqa", piqa), ("arc_easy", arc), ("arc_challenge", arc), ("hellaswag", swag), ("winogrande", wino)):
        other = {k: v + " indeed" if isinstance(v, str) and k in ("goal", "question", "ctx_a") else v for k, v in row.items()}
        (folder / evaluation.TASKS[task]).write_text("\n".join(map(json.dumps, (row, other, row))))
    return folder


@pytest.fixture
def tasks(tmp_path):
    return write_tasks(tmp_path)


# ------------------------------------------------------------------------------------------------------------------- any script
def script(*words):
    """A script in a process of its own: what `subprocess.run` gives."""
    return subprocess.run([sys.executable, *map(str, words)], cwd=ROOT, capture_output=True, text=True, timeout=170)


def test_prune_serves_a_request_with_the_stratnet_that_train_made_and_without_one(small, text, tmp_path):
    common = ("--model", small, "--data", text, "--calibration", 4, "--seqlen", 64, "--device", "cpu")
    made = script("train.py", *common, "--initial", 5, "--rounds", 2, "--batch", 2, "--tokens", 128, "--test-tokens", 128, "--out", tmp_path / "run")
    assert made.returncode == 0, made.stderr
    assert len(json.loads((tmp_path / "run" / "results.json").read_text())) == 12
    asked = (*common, "--tokens", 128, "--sparsity", 0.5, "--stratnet", tmp_path / "run" / "stratnet.safetensors")
    done = script("prune.py", *asked, "--out", tmp_path / "learned")
    assert done.returncode == 0, done.stderr
    for name, method in (("uniform", ("--uniform",)), ("coarse", ("--rank-bits", 8))):
        assert call(prune, *asked, "--out", tmp_path / name, *method) == 0
    for name in ("learned", "uniform", "coarse"):
        record = json.loads((tmp_path / name / "strategy.json").read_text())
        assert abs(record["counted"] - 0.5) < 0.01 and load_llama(tmp_path / name)


def test_bad_input_ends_in_one_line_and_exit_code_2_with_nothing_written(small, text, tmp_path, capsys):
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "short.txt").write_text("x = 1")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{")
    (tmp_path / "existing").mkdir()
    other = write_small(tmp_path / "other", vocab_size=100)
    base, half, out = (prune, "--model", small), (prune, "--sparsity", 0.5), ("--out", tmp_path / "out")
    alone = [("0.95 is outside", *base, "--sparsity", 0.95, *out), ("--initial must be", train, "--model", small, "--initial", 0, *out),
             ("--seqlen 4000: this model has 128", evaluation, "--model", small, "--seqlen", 4000), ("--tokens must be", llama, "--model", small, "--tokens", 0),
             ("measured.json is not there", plot, "--run", tmp_path)]                                    # each script as a process once
    cases = [("'x' is not a number", *base, "--sparsity", "x", *out), ("'nan' is not a number", *base, "--sparsity", "nan", *out),
             ("nothing is asked", *base, *out), ("nowhere is not a folder", *half, "--model", tmp_path / "nowhere", *out),
             ("broken holds neither", *half, "--model", tmp_path / "broken", *out), ("do not belong together", *half, "--model", other, *out),
             ("empty.txt is empty", *base, "--sparsity", 0.5, "--data", tmp_path / "empty.txt", *out),
             ("shorter than one window", *base, "--sparsity", 0.5, "--data", tmp_path / "short.txt", *out),
             ("for 12 blocks, the model has 3", *base, "--sparsity", 0.5, "--data", text, "--stratnet", ROOT / "tiny" / "stratnet.safetensors", *out),
             ("existing exists already", *base, "--sparsity", 0.5, "--uniform", "--out", tmp_path / "existing"),
             ("nowhere.txt cannot be read", train, "--model", small, "--data", tmp_path / "nowhere.txt", *out),
             ("broken holds neither", llama, "--model", tmp_path / "broken")]

    def nothing_but_one_line(reason, module, code, error):
        assert code == 2 and len(error.strip().splitlines()) == 1 and error.startswith(module.__name__ + ".py: ") and reason in error, (reason, error)
        assert not (tmp_path / "out").exists() and not list((tmp_path / "existing").iterdir())

    started = ThreadPoolExecutor(2).map(lambda case: script(case[1].__name__ + ".py", *case[2:]), alone)
    for (reason, module, *_), done in zip(alone, started):
        nothing_but_one_line(reason, module, done.returncode, done.stderr)
    for reason, module, *words in cases:
        capsys.readouterr()
        nothing_but_one_line(reason, module, call(module, *words), capsys.readouterr().err)


# -------------------------------------------------------------------------------------------------------------------- eval.py
def test_eval_prints_the_perplexity_the_kl_and_the_bits_that_its_functions_give(small, pruned, text, capsys):
    assert call(evaluation, "--model", pruned, "--dense", small, "--data", text, "--seqlen", 64, "--tokens", 1000, "--bits", "--accelerate", *CPU) == 0
    printed = capsys.readouterr().out
    (dense, tokenizer), model = load_llama(small), load_llama(pruned)[0]
    tokens = evaluation.tokenise(tokenizer, evaluation.read_documents(text))
    divergence = evaluation.Divergence(dense, evaluation.cut(tokens[:1000], 64))
    divergence.model = model
    assert f"KL {divergence():.6f} nats per token, KL(small || pruned)" in printed and divergence() > 0
    assert f"perplexity {evaluation.perplexity(model, tokens[:1000], 64):.4f}  pruned on text.py: 15 windows of 64, 945 tokens scored" in printed
    size = len(text.read_bytes())
    assert f"bits per byte {evaluation.bits_per_byte(model, tokens[1:], size, 1, 64):.4f} over {size} bytes" in printed
    assert "no speed-up on cpu" in printed


def test_eval_prints_zero_shot_accuracies_with_paired_differences_which_are_0_from_itself(small, text, tasks, capsys):
    assert call(evaluation, "--model", small, "--dense", small, "--data", text, "--seqlen", 64, "--tokens", 128, "--tasks", tasks, "--limit", 3, *CPU) == 0
    first, second = capsys.readouterr().out.split("model small:\n")[1:]      # as the dense model, then as the model
    lines = re.findall(r"^(\w+) +(acc\w*) +([\d.]+) ± ([\d.]+)  \(3 documents\)   ([+-][\d.]+) ± ([\d.]+) paired", second, re.M)
    assert [(task, metric) for task, metric, *_ in lines] == [
        (t, m) for t in evaluation.TASKS for m in ("acc", "acc_norm") if (t, m) != ("winogrande", "acc_norm")]
    assert all(float(change) == float(error) == 0 for *_, change, error in lines) and "paired" not in first
    model, tokenizer = load_llama(small)
    results = {t: evaluation.zero_shot(model, tokenizer, t, evaluation.read_rows(tasks, t)) for t in evaluation.TASKS}
    for task, metric, value, error, *_ in lines:
        right = np.equal(results[task]["predictions" if metric == "acc" else "predictions_norm"], results[task]["gold"])
        assert float(value) == pytest.approx(right.mean(), abs=5e-5) and float(error) == pytest.approx(np.std(right, ddof=1) / 3 ** 0.5, abs=5e-5)
    assert f"{np.mean([r['acc'] for r in results.values()]):.4f}" in second.split("average")[1]


def test_a_forward_pass_is_timed_and_bad_arguments_of_eval_are_one_line(small, text, tasks, capsys):
    assert evaluation.seconds(load_llama(small)[0], torch.full((1, 8), 5), repeats=2) > 0
    (tasks / evaluation.TASKS["hellaswag"]).write_text("")
    (tasks / "broken").mkdir()
    for words in (("--limit", 1), ("--seqlen", 129), ("--tasks", tasks / "broken"), ("--tasks", tasks), ("--data", tasks), ("--dense", tasks)):
        assert call(evaluation, "--model", small, "--data", text, *words, *CPU) == 2
        assert len(capsys.readouterr().err.strip().splitlines()) == 1
    with pytest.raises(ValueError, match="is not one of"):
        evaluation.zero_shot(None, None, "chess", [])
    with pytest.raises(ValueError, match="does not have the task's fields"):
        evaluation.zero_shot(None, None, "piqa", [{"goal": "x"}])


# ------------------------------------------------------------------------------------------------------------------- llama.py
def test_llama_streams_the_text_that_generation_gives_and_compares_two_models_side_by_side(small, pruned, capsys):
    model, tokenizer = load_llama(small)
    ids = [tokenizer.bos_id, *tokenizer.encode("import os")]
    expected = tokenizer.decode([*ids, *llama.generate(model, ids, 12, 0.9, seed=5)])
    assert call(llama, "--model", small, "--prompt", "import os", "--tokens", 12, "--temperature", 0.9, "--seed", 5, *CPU) == 0
    assert capsys.readouterr().out == expected.rstrip("\N{REPLACEMENT CHARACTER}") + "\n"
    assert call(llama, "--compare", small, pruned, "--prompt", "import os", "--tokens", 8, *CPU) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split(" | ")[0].strip() == str(small) and all(line.count(" |") >= 1 for line in lines)
    assert lines[2].split(" | ")[0].startswith("import os") and lines[2].split(" | ")[1].startswith("import os")
    assert call(llama, "--model", small, "--temperature", -1) == 2


def test_a_stream_ends_at_the_end_of_text_and_yields_whole_characters_only(small, monkeypatch):
    model, tokenizer = load_llama(small)
    letters = tokenizer.encode("a\N{BALLOON}b")                              # the balloon is four bytes, a token each
    monkeypatch.setattr(llama, "generate", lambda *a: iter([*letters, tokenizer.eos_id, *letters]))
    pieces = list(llama.stream(model, tokenizer, "x", 99))
    assert "".join(pieces) == "a\N{BALLOON}b" and not any("\N{REPLACEMENT CHARACTER}" in p for p in pieces) and len(letters) > len(pieces)


def test_a_tokenizer_json_works_like_its_library_and_says_which_package_it_needs(small, tmp_path, monkeypatch):
    tokenizers = pytest.importorskip("tokenizers")
    folder = write_small(tmp_path / "fast")
    (folder / "tokenizer.model").unlink()
    words = {w: i for i, w in enumerate(["<unk>", "<s>", "</s>", "import", "os", "sys"])}
    fast = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    fast.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    fast.save(str(folder / "tokenizer.json"))
    for begins in (False, True):
        if begins:
            fast.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
            fast.save(str(folder / "tokenizer.json"))
            (folder / "tokenizer_config.json").unlink()
        tokenizer = load_llama(folder)[1]
        assert tokenizer.encode("import sys what") == [3, 5, 0] and tokenizer.decode([3, 5]) == "import sys"
        assert tokenizer.encode(["os", "sys os"]) == [[4], [5, 4]] and (tokenizer.bos_id, tokenizer.eos_id) == (1, 2)
    assert tokenizer.adds_bos
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ValueError, match="pip install tokenizers"):
        load_llama(folder)


def test_ctrl_c_is_one_line_with_a_hint_and_130_and_a_closed_pipe_is_no_error(capsys):
    def interrupted():
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as end:
        llama.run(interrupted, ": a hint")
    assert end.value.code == 130 and capsys.readouterr().err == "\ninterrupted: a hint\n"
    program = "from llama import run\nrun(lambda: [print('x' * 1000) for _ in range(1000)])"
    with subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.read(1)
        process.stdout.close()
        assert process.stderr.read() == b"" and process.wait() == 0
    assert llama.choose_device("cpu", "float16")[:2] == (torch.device("cpu"), torch.float16)
    with pytest.raises(ValueError, match="--device"):
        llama.choose_device("cuda:77")


# ------------------------------------------------------------------------------------------------------------------- prune.py
def options(small, text):
    return ("--model", small, "--data", text, "--seqlen", 64, "--calibration", 4, "--tokens", 128, *CPU)


def weights(folder):
    return load_file(folder / "model.safetensors")


def test_packed_then_unpacked_is_what_plain_pruning_writes_offloaded_or_not(small, text, tmp_path, capsys):
    asked = (*options(small, text), "--uniform", "--sparsity", 0.5)
    for name, more in (("plain", ()), ("packed", ("--packed",)), ("offloaded", ("--offload",))):
        assert call(prune, *asked, "--out", tmp_path / name, *more) == 0
    assert call(prune, "--unpack", tmp_path / "packed", "--out", tmp_path / "again") == 0
    plain = weights(tmp_path / "plain")
    for name in ("again", "offloaded"):
        other = weights(tmp_path / name)
        assert plain.keys() == other.keys() and all(torch.equal(plain[n].view(torch.int32), other[n].view(torch.int32)) for n in plain)
    saved = (tmp_path / "plain" / "model.safetensors").stat().st_size - (tmp_path / "packed" / "model.safetensors").stat().st_size
    assert 0.97 <= saved / (sum(W.numel() for n, W in plain.items() if n.endswith("_proj.weight")) * (0.5 * 4 - 1 / 8)) <= 1       # float32; headers
    assert f"wrote {tmp_path / 'again'}" in capsys.readouterr().out
    before = (tmp_path / "plain" / "model.safetensors").read_bytes()
    assert call(prune, *options(small, text), "--uniform", "--sparsity", 0.7, "--out", tmp_path / "plain", "--force") == 0
    assert (tmp_path / "plain" / "model.safetensors").read_bytes() != before
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]     # nothing half-done is left


def test_a_dry_run_writes_nothing_and_json_stands_alone_on_standard_output(small, text, tmp_path, capsys):
    out = tmp_path / "out"
    asked = (*options(small, text), "--uniform", "--sparsity", 0.25, 0.5, "--max-kl", 0.5, "--out", out)
    assert call(prune, *asked, "--dry-run", "--json") == 0
    rows = json.loads(capsys.readouterr().out)
    assert [r["request"] for r in rows] == ["0.25", "0.5", "kl-0.5"] and not out.exists()
    assert [r["sparsity"] for r in rows[:2]] == [0.25, 0.5] and rows[0]["kl"] < rows[1]["kl"] and 0 < rows[2]["kl"] <= 0.5
    assert call(prune, *options(small, text), "--uniform", "--sparsity", 0.25, "--dry-run") == 0
    assert re.search(r"^ +blocks 0.25 0.25 0.25$", capsys.readouterr().out, re.M)


def test_a_pattern_and_a_sequential_run_keep_the_counts_that_they_print(small, text, tmp_path):
    for name, more in (("pattern", ("--pattern", "2:4")), ("sequential", ("--sequential",))):
        assert call(prune, *options(small, text), "--uniform", "--sparsity", 0.5, "--out", tmp_path / name, *more) == 0
        pruned = {n: W for n, W in weights(tmp_path / name).items() if n.endswith("_proj.weight")}
        zeros = sum(int((W == 0).sum()) for W in pruned.values()) / sum(W.numel() for W in pruned.values())
        assert json.loads((tmp_path / name / "strategy.json").read_text())["counted"] == zeros == 0.5
        if name == "pattern":
            assert all(((W.view(-1, 4) != 0).sum(1) == 2).all() for W in pruned.values())


def test_requests_that_contradict_each_other_are_one_line_before_anything_is_read(small, text, tmp_path, capsys):
    (tmp_path / "bad.jsonl").write_text('{"sparsity": 0.3}\nnonsense')
    base, half = options(small, text), ("--sparsity", 0.5)
    for words in ((), ("--sparsity", 0.5, 0.50), (*half, "--max-kl", 1, "--sequential"), (*half, "--sequential", "--pattern", "2:4"), ("--max-kl", 1, "--pattern", "2:4"),
                  ("--unpack", small), ("--requests", tmp_path / "bad.jsonl"), ("--requests", tmp_path / "none.jsonl"), (*half,), (*half, "--seqlen", 500),
                  ("--preference", 0.5, "--uniform"), ("--sparsity", 0.7, "--uniform", "--pattern", "2:4"), (*half, "--uniform", "--calibration", 10**6)):
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(tmp_path)                                            # where no StratNet of an earlier run is found
            assert call(prune, *base, *words) == 2, words
        error = capsys.readouterr().err.strip()
        assert len(error.splitlines()) == 1 and not (tmp_path / "out").exists(), words
    with pytest.raises(ValueError, match="metric"):
        prune.Pruner(load_llama(small)[0], torch.full((1, 8), 5), "luck")
    with pytest.raises(wishes.Unreachable, match="sparsity 0.9 has 7 bytes"):
        wishes.strategy_of(wishes.parse_request({"max_size": "3"}), lambda s: torch.full((3,), s), None, None, None, lambda x: 7)


def test_a_folder_comes_back_when_its_replacement_fails(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "old").write_text("old")
    with pytest.raises(RuntimeError):
        with prune.new_folder(tmp_path / "model", force=True) as folder:
            (folder / "new").write_text("half")
            raise RuntimeError("the disk is full")
    rename = os.replace

    def fails(source, target):
        if (Path(source) / "new").exists():
            raise OSError("no")
        rename(source, target)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "replace", fails)
        with pytest.raises(OSError):
            with prune.new_folder(tmp_path / "model", force=True) as folder:
                (folder / "new").write_text("whole")
    assert [p.name for p in tmp_path.iterdir()] == ["model"] and [p.name for p in (tmp_path / "model").iterdir()] == ["old"]


# ------------------------------------------------------------------------------------------------------------------- train.py
def test_train_without_rounds_and_a_stratnet_for_another_depth(small, text, tmp_path, capsys):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "search", lambda *a, search=train.search, **k: search(*a, **k, final_steps=5))
        assert call(train, "--model", small, "--data", text, "--seqlen", 64, "--calibration", 2, "--tokens", 64, "--test-tokens", 64, "--initial", 3,
                    "--rounds", 0, "--out", tmp_path, *CPU) == 0
    printed = capsys.readouterr().out
    assert "last round" not in printed and "StratNet's KL is below uniform's at" in printed
    net, scale, X, y, about = unicuco.load_stratnet(tmp_path / "stratnet.safetensors", 3)
    assert X.shape == (3, 3) and y.shape == (3,) and math.isfinite(scale.hi) and about["evaluations"] == 3
    with pytest.raises(ValueError, match="is a StratNet for 3 blocks, the model has 12"):
        unicuco.load_stratnet(tmp_path / "stratnet.safetensors", 12)
