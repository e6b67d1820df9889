"""
Strangers' files, kills and full disks: bad input ends in one line, outputs are complete or absent.

Run       pytest test_trust.py
The same at length: python -m checks.fuzz, checks.kills, checks.full_disk. Each case named here was once found by them, or by reading.
"""
import json
import math
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from checks import fuzz, kills
from eval import read_documents, tokenise
from llama import Tokenizer, load_llama, save_llama, stream, weight_files
from outputs import new_folder, replacing, strict, write_json, write_text
from packed import pack
from prune import Pruner
from unicuco import Scale, StratNet, load_stratnet, save_stratnet
from wishes import read_requests

ROOT = Path(__file__).parent
UP, NORM, INV = "model.layers.0.mlp.up_proj.weight", "model.norm.weight", "model.layers.0.self_attn.rotary_emb.inv_freq"


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """{kind: {file name: bytes}} of readable inputs, see `make_folders`."""
    return fuzz.make_folders(tmp_path_factory.mktemp("fuzz") / "good")


@pytest.fixture
def place(good, tmp_path):
    """place(kind, **changed files): a folder of good files with some replaced by bytes, JSON or tensors, None = removed."""
    def write(kind, **changed):
        folder = tmp_path / f"{kind}{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        for name, raw in (good[kind] | {k.replace("_json", ".json").replace("_safetensors", ".safetensors"): v for k, v in changed.items()}).items():
            if isinstance(raw, dict) and name.endswith(".safetensors"):
                save_file(raw, folder / name)
            elif raw is not None:
                (folder / name).write_bytes(raw if isinstance(raw, bytes) else json.dumps(raw).encode())
        return folder
    return write


def refuses(function, *arguments, match=None):
    with pytest.raises(ValueError, match=match) as caught:
        function(*arguments)
    assert len(str(caught.value).splitlines()) == 1 and len(str(caught.value)) < 1000, str(caught.value)


def check(name, *words):
    """What `python -m checks.NAME` prints; it must succeed."""
    done = subprocess.run([sys.executable, "-m", f"checks.{name}", *map(str, words)], cwd=ROOT, capture_output=True, text=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


# ------------------------------------------------------------------------------------------------------- strangers' checkpoints
def test_each_of_hundreds_of_mutated_inputs_is_read_or_refused_in_one_line(good, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(fuzz, "TOKENIZER", Tokenizer(place_all(good, tmp_path / "good") / "plain", 320))
    with warnings.catch_warnings():
        warnings.simplefilter("error")                       # a warning would be a second line on stderr
        outcomes = [fuzz.read(*fuzz.mutated(good, "test", i), tmp_path) for i in range(400)]
    assert 40 < sum(outcomes) < 300                          # neither all harmless nor all refused at the door
    assert capfd.readouterr().err == "" and {p.name for p in tmp_path.iterdir()} == {"good", "in", "out"}


def place_all(good, root):
    for kind, files in good.items():
        (root / kind).mkdir(parents=True)
        for name, raw in files.items():
            (root / kind / name).write_bytes(raw)
    return root


def test_the_fuzzer_runs_its_worker_and_hypothesis():
    done = check("fuzz", "--count", 12, "--hypothesis", 2, "--seed", 7)
    assert re.fullmatch(r"18 inputs .* 0 flaws\n", done), done


@pytest.mark.parametrize("change", [
    {"rope_scaling": 5}, {"rope_parameters": [1]}, {"rope_scaling": {"rope_type": ["llama3"]}}, {"rope_scaling": {"rope_type": {}}},
    {"model_type": ["llama"]}, {"hidden_act": {}}, {"hidden_size": 10**30}, {"hidden_size": 2**24}, {"vocab_size": 2**24}, {"head_dim": 4096},
    {"num_hidden_layers": 1024}, {"intermediate_size": "x" * 5000}, {"hidden_size": True}, {"rms_norm_eps": math.nan}, {"num_attention_heads": 0},
    {"max_position_embeddings": -1}, {"rope_scaling": {"rope_type": "linear", "factor": "x" * 5000}}, {"quantization_config": {"bits": 4}}],
    ids=lambda change: str(change)[:40])
def test_a_config_of_absurd_sizes_or_of_wrong_types_is_refused_before_anything_is_allocated(place, change):
    refuses(load_llama, place("plain", config_json=fuzz.FIELDS | change))


@pytest.mark.parametrize("token", ["1", 1.0, True, [1], {}, -2, 320, 10**30])
def test_begin_and_end_tokens_that_the_model_does_not_have_are_refused(place, token):
    pytest.importorskip("tokenizers")
    for name in ("bos_token_id", "eos_token_id"):
        if (name, token) != ("eos_token_id", [1]):           # several ends of text are common: the first is used
            refuses(load_llama, place("fast", config_json=fuzz.FIELDS | {name: token}), match=name)


def test_a_tokenizer_with_ids_beyond_the_vocabulary_is_refused_and_its_padding_and_truncation_are_not_used(place, good):
    pytest.importorskip("tokenizers")
    raw = json.loads(good["fast"]["tokenizer.json"])
    _, tokenizer = load_llama(place("fast"))
    ids = tokenizer.encode("return x * 100")
    padded = raw | {"padding": {"strategy": {"Fixed": 500}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 7, "pad_type_id": 0, "pad_token": "x"},
                    "truncation": {"max_length": 3, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}}
    assert load_llama(place("fast", tokenizer_json=padded))[1].encode(["return x * 100"]) == [ids] and len(ids) > 3
    vocabulary = raw["model"]["vocab"]
    vocabulary[max(vocabulary, key=vocabulary.get)] = 10**6
    refuses(load_llama, place("fast", tokenizer_json=raw), match="1000001 tokens")


def test_a_model_with_more_tokens_than_its_tokenizer_still_writes_text(place):
    model, tokenizer = load_llama(place("plain"))
    model.head.weight.data[:] = 0
    model.head.weight.data[310] = model.model.norm.weight.data.sign()       # a token that the tokenizer, of 300, does not have
    assert isinstance("".join(stream(model, tokenizer, "def", 4)), str)


def test_half_a_surrogate_pair_is_refused_as_text(place, tmp_path):
    (tmp_path / "half.jsonl").write_text('{"text": "\\ud800"}\n')
    for kind in ("plain", "fast"):
        tokenizer = load_llama(place(kind))[1]
        refuses(tokenizer.encode, "\ud800")
        refuses(tokenise, tokenizer, read_documents(tmp_path / "half.jsonl"))


@pytest.mark.parametrize("target", ["../evil.safetensors", "..", ".", "", "sub/model.safetensors", "a\nb.safetensors", "config.json", "\ud800.safetensors",
                                    "absolute", 5, None, ["model-1-of-2.safetensors"], {}])
def test_an_index_that_points_anywhere_but_to_weight_files_of_its_folder_is_refused(place, good, tmp_path, target):
    for outside in (tmp_path / "evil.safetensors", tmp_path / "absolute.safetensors"):
        outside.write_bytes(good["sharded"]["model-1-of-2.safetensors"])
    index = json.loads(good["sharded"]["model.safetensors.index.json"])
    first = min(index["weight_map"])
    index["weight_map"][first] = str(tmp_path / "absolute.safetensors") if target == "absolute" else target
    refuses(load_llama, place("sharded", model_safetensors_index_json=None, **{"model.safetensors.index.json": index}))


def changed_tensors(weights):
    """(what is wrong, weights, word of the message), each on a copy of the good weights."""
    mask, kept = pack(weights[UP], weights[UP] > 0)
    square_mask, square_kept = pack(torch.ones(16, 16).half(), torch.eye(16) > 0)
    without = lambda *names: {n: w for n, w in weights.items() if n not in names}
    return [("a packed vector", without(NORM) | {NORM + ".mask": square_mask, NORM + ".kept": square_kept}, NORM),
            ("a float mask without survivors", without(UP) | {UP + ".mask": weights[UP]}, UP),
            ("survivors without a mask", without(UP) | {UP + ".kept": kept}, UP),
            ("survivors beside the dense matrix", weights | {UP + ".kept": weights[UP].clone()}, UP),
            ("packed and dense", weights | {UP + ".mask": mask, UP + ".kept": kept}, UP),
            ("a mask packed twice", without(UP) | {UP + ".kept.mask": mask, UP + ".kept": kept, UP + ".mask": mask.clone()}, UP),
            ("survivors as a matrix", without(UP) | {UP + ".mask": mask, UP + ".kept": kept[None]}, UP),
            ("one survivor too many", without(UP) | {UP + ".mask": mask, UP + ".kept": torch.cat([kept, kept[:1]])}, "values are there"),
            ("packed rotary frequencies", weights | {INV + ".mask": mask, INV + ".kept": kept}, INV),
            ("a name of two lines", weights | {"a\nb": kept}, "does not belong"),
            ("a name without end", weights | {"x" * 5000: kept}, "does not belong"),
            ("double precision", weights | {UP: weights[UP].double()}, "F64"), ("complex weights", weights | {UP: weights[UP].to(torch.complex64)}, UP),
            ("NaN in a norm", weights | {NORM: weights[NORM] * math.nan}, NORM + " holds NaN"),
            ("one infinite weight", weights | {UP: weights[UP].clone().index_fill_(0, torch.tensor(3), math.inf)}, UP + " holds NaN")]


def test_weights_that_do_not_fit_are_refused_by_name(place, tmp_path):
    weights = load_file(place("plain") / "model.safetensors")
    for what, tensors, word in changed_tensors(weights):
        refuses(load_llama, place("plain", model_safetensors=tensors), match=re.escape(word))
    assert load_llama(place("plain", model_safetensors=weights | {INV: torch.rand(4)}))              # old Llama 2 files carry it


def test_logits_that_are_not_finite_stop_sampling_and_pruning_in_one_line(place):
    weights = load_file(place("plain") / "model.safetensors")
    model, tokenizer = load_llama(place("plain", model_safetensors={n: torch.full_like(w, 6e4) for n, w in weights.items()}), dtype=torch.float16)
    for temperature in (0.0, 1.0):
        refuses(lambda: list(stream(model, tokenizer, "def", 3, temperature)), match="NaN or infinite")
    refuses(Pruner, model, torch.ones(2, 32, dtype=torch.long), match="NaN or infinite")
    model, tokenizer = load_llama(place("plain"))
    refuses(lambda: list(stream(model, tokenizer, "def", 3, 1e-45)), match="at temperature 1e-45")


def test_a_model_is_never_saved_over_its_own_files(place):
    folder = place("plain")
    model, before = load_llama(folder)[0], kills.contents(folder)
    refuses(save_llama, model, folder / ".." / folder.name, folder, match="another folder")
    assert kills.contents(folder) == before


def test_folders_named_like_files_are_not_copied(place, tmp_path):
    folder = place("plain")
    (folder / "more.json").mkdir()
    save_llama(load_llama(folder)[0], tmp_path / "saved", folder)
    assert load_llama(tmp_path / "saved") and not (tmp_path / "saved" / "more.json").exists()


def test_a_pipe_in_a_checkpoint_is_refused_instead_of_waited_for(place):
    folder = place("plain")
    for name in ("model.safetensors", "config.json", "tokenizer.model", "notes"):
        if (folder / name).exists():
            (folder / name).rename(folder / ("old " + name))
        os.mkfifo(folder / name)
        for read in (load_llama, weight_files):
            refuses(read, folder, match=f"{name} is neither a file nor a folder")
        (folder / name).unlink()
        if (folder / ("old " + name)).exists():
            (folder / ("old " + name)).rename(folder / name)
    assert load_llama(folder)


def test_json_holds_neither_nan_nor_infinity(tmp_path):
    for rows, value in ((False, {"a": [math.nan, (1.5, {"b": -math.inf})], "c": "NaN", "d": None, "e": True}), (True, [{"a": math.inf}, 2])):
        write_json(tmp_path / "x.json", value, rows)
        assert json.loads((tmp_path / "x.json").read_text(), parse_constant=pytest.fail) == strict(value)
    assert strict({"a": [math.nan, (1.5, {"b": -math.inf})], "c": "NaN"}) == {"a": [None, [1.5, {"b": None}]], "c": "NaN"}


def stratnet_changes():
    net = dict(StratNet(1).state_dict()) | {"X": torch.rand(4, 1).double() * 0.9, "y": torch.rand(4).double()}
    about = {"lo": -5.0, "hi": 1.0, "mean": "blocks"}
    deep = {n: torch.zeros(10**6, *w.shape[1:], dtype=w.dtype) if n == "layers.4.bias" else w for n, w in net.items()}
    yield from ((net | {"y": net["y"] * math.nan}, about), (net | {"layers.0.bias": net["layers.0.bias"] / 0}, about), (net | {"X": net["X"][:3].clone()}, about),
                (net | {"X": net["X"] - 1}, about), (net | {"X": net["X"].float()}, about), (net | {"y": net["y"].to(torch.complex64)}, about), (net | {"more": net["y"].clone()}, about),
                (net | {"X": net["X"][:0].clone(), "y": net["y"][:0].clone()}, about), (net | {"layers.4.bias": torch.tensor(1.0).double()}, about), (deep, about))
    for change in ({"lo": 10**400}, {"lo": math.nan}, {"hi": -6.0}, {"hi": None}, {"mean": "none"}, {"mean": ["blocks"]}):
        yield net, about | change
    yield from ((net, [1]), (net, {"lo": 1.0}), (net, fuzz.DEEP))


def test_a_stratnet_that_does_not_fit_together_is_refused_and_nothing_is_allocated_for_its_claims(tmp_path):
    path = tmp_path / "stratnet.safetensors"
    for tensors, about in stratnet_changes():
        save_file(tensors, path, {"about": json.dumps(about)})
        refuses(load_stratnet, path, 1, match="is no StratNet that can be read")
    save_file({"a": torch.zeros(1)}, path)
    refuses(load_stratnet, path, 1)


def test_text_and_requests_may_hold_any_unicode_but_names_and_numbers_may_not(tmp_path):
    rows, path = [{"text": "a\u2028b\x85c\x0bd"}, {"text": "e"}], tmp_path / "text.jsonl"
    path.write_text("\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n")       # JSON allows these line ends within a text
    assert read_documents(path) == [row["text"] + "\n\n" for row in rows]
    for row in ({"max_size": "9\nMB", "name": "x"}, {"sparsity": 0.5, "name": "a\nb"}, {"sparsity": 0.5, "name": "../up"}, {"sparsity": 0.5, "name": ["x"]},
                {"max_kl": 10**400}, {"sparsity": "1" * 5000}, {"max_kl": fuzz.DEEP}, {"preference": True}, fuzz.DEEP, "\ud800"):
        path.write_text(json.dumps(row))
        refuses(read_requests, path)
        refuses(read_documents, path)


# ---------------------------------------------------------------------------------------------------------- complete or absent
def test_a_file_or_a_folder_appears_when_it_is_complete_and_the_old_one_stays_when_it_is_not(tmp_path):
    path = tmp_path / "a.json"
    write_text(path, "old")
    with pytest.raises(RuntimeError), replacing(path) as partial:
        partial.write_text("new")
        raise RuntimeError
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["a.json"]
    for force, error in ((False, None), (True, RuntimeError)):
        folder = tmp_path / "folder"
        try:
            with new_folder(folder, force) as partial:
                (partial / "a").write_text("new" if force else "old")
                assert not list(folder.glob("*")) or force
                if error:
                    raise error
        except RuntimeError:
            pass
        assert (folder / "a").read_text() == "old" and sorted(os.listdir(tmp_path)) == ["a.json", "folder"]
    with pytest.raises(ValueError, match="exists already"), new_folder(folder):
        pass


def test_what_a_killed_run_left_is_cleared_away_and_a_folder_that_it_had_moved_aside_comes_back(tmp_path):
    (tmp_path / ".out.partial").mkdir()
    (tmp_path / ".out.partial" / "half").write_text("ha")
    (tmp_path / ".out.old.partial").mkdir()
    (tmp_path / ".out.old.partial" / "a").write_text("old")
    with pytest.raises(ValueError, match="exists already"), new_folder(tmp_path / "out"):
        pass
    assert (tmp_path / "out" / "a").read_text() == "old" and os.listdir(tmp_path) == ["out"]


def test_a_stratnet_that_cannot_be_written_leaves_no_partial_file(tmp_path):
    (tmp_path / "stratnet.safetensors").mkdir()
    with pytest.raises(OSError):
        save_stratnet(tmp_path / "stratnet.safetensors", StratNet(1), Scale(0, 1), torch.zeros(1, 1), torch.zeros(1), {})
    assert os.listdir(tmp_path) == ["stratnet.safetensors"]
    save_stratnet(tmp_path / "other.safetensors", StratNet(1), Scale(0, 1), torch.zeros(1, 1), torch.zeros(1), {"mean": "blocks"})
    assert (tmp_path / "other.safetensors").stat().st_mode & 0o777 == 0o644 and load_stratnet(tmp_path / "other.safetensors", 1)


def test_killed_runs_leave_the_old_result_the_new_one_or_none_and_the_next_run_goes_on():
    assert "kills in" in check("kills", "--prune", 6, "--train", 0)


def test_a_full_disk_is_one_line_and_nothing_half_written():
    assert re.search(r"[1-9]\d* refused in one line, nothing half written", check("full_disk", "--quick"))


def test_bad_files_end_in_one_line_and_exit_code_2_on_the_command_line(place, tmp_path):
    weights = load_file(place("plain") / "model.safetensors")
    cases = [{"config_json": fuzz.FIELDS | {"rope_scaling": [1]}}, {"model_safetensors": weights | {"a\nb": torch.zeros(1)}}, {"tokenizer.model": b"no"}]
    for changed in cases:
        done = subprocess.run([sys.executable, "llama.py", "--model", place("plain", **changed), "--tokens", "1"], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and not done.stdout, done.stderr
