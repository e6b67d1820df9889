"""
Loading, tokenising, saving, packing and generating: against transformers, and on files of
strangers.

Run       pytest test_llama.py        (each tolerance has its dtype beside it)
"""

import json
import math
import os
import re
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import eval as evaluation
import llama
from checks import fuzz, kills
from conftest import CPU, ROOT, call, refuses, relative, seeds, steady, write_small
from eval import read_documents, tokenise
from llama import (
    load_llama,
    pack,
    save_llama,
    stream,
    unpack,
    weight_files,
)
from ranks import Pruner

LLAMA3 = dict(
    rope_type="llama3",
    rope_theta=10000.0,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=64,
)


FAMILIES = {
    "grouped-query, tied": {},
    "untied": dict(tie_word_embeddings=False),
    "biases": dict(attention_bias=True, mlp_bias=True),
    "llama3 scaling": dict(rope_parameters=LLAMA3),
    "linear scaling": dict(rope_scaling=dict(type="linear", factor=4.0)),
    "wide heads": dict(head_dim=32),
    "scaling beside the parameters": dict(
        rope_parameters=dict(rope_type="default", rope_theta=10000.0),
        rope_scaling=dict(rope_type="linear", factor=4.0),
    ),
    "mistral": dict(
        model_type="mistral", architectures=["MistralForCausalLM"], sliding_window=None
    ),
    "qwen2": dict(
        model_type="qwen2", architectures=["Qwen2ForCausalLM"], tie_word_embeddings=False
    ),
}
FAMILIES["qwen3"] = dict(model_type="qwen3", architectures=["Qwen3ForCausalLM"], head_dim=32)


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_those_of_transformers(family, tmp_path, tokens):
    transformers = pytest.importorskip("transformers")
    folder = write_small(tmp_path / "m", **FAMILIES[family])
    ours, theirs = (
        load_llama(folder)[0],
        transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
    )
    with torch.no_grad():
        assert (
            relative(ours(tokens), theirs(tokens).logits) < 1e-4
        )  # float32: rounding is near 1e-6


def test_a_stored_head_that_differs_from_the_embeddings_is_used_though_the_config_says_tied(
    small, tmp_path, tokens
):
    transformers = pytest.importorskip("transformers")
    weights, folder = load_file(small / "model.safetensors"), write_small(tmp_path / "m")
    copied = weights["model.embed_tokens.weight"].clone()
    for head, tied in (
        (copied.clone(), True),
        (copied.clone().index_fill_(1, torch.tensor(0), 0), False),
    ):
        save_file(
            weights | {"lm_head.weight": head}, folder / "model.safetensors", {"format": "pt"}
        )
        ours = load_llama(folder)[0]
        theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        assert (ours.lm_head.weight is ours.model.embed_tokens.weight) == tied
        assert torch.equal(ours.lm_head.weight, head)
        with torch.no_grad():
            assert relative(ours(tokens), theirs(tokens).logits) < 1e-4  # float32


def test_mistral_slides_from_4096_on_where_its_config_names_no_window(place):
    for window, positions in (
        ({}, 4096),
        ({"sliding_window": None}, 32768),
        ({"sliding_window": 64}, 64),
    ):
        fields = fuzz.FIELDS | {"model_type": "mistral", "max_position_embeddings": 32768}
        del fields["sliding_window"]
        folder = place("plain", config_json=fields | window)
        assert llama.Config.read(folder / "config.json").max_position_embeddings == positions


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
    flaws = [
        ({n: w for n, w in weights.items() if n != up}, up + " is missing"),
        ({**weights, "model.layers.9.x": weights[up].clone()}, "model.layers.9.x' does not belong"),
        ({**weights, up: weights[up][1:].clone()}, up + " has shape"),
        ({**weights, up: weights[up].double()}, "and dtype F64"),
        ({**weights, up: weights[up] * math.nan}, up + " holds NaN"),
    ]
    for flawed, message in flaws:
        save_file(flawed, tmp_path / "flawed.safetensors")
        broken = write_small(tmp_path / "broken")
        (tmp_path / "flawed.safetensors").replace(broken / "model.safetensors")
        with pytest.raises(ValueError, match=re.escape(message)):
            load_llama(broken)
    for promised in (
        {**files, up: "../evil.safetensors"},
        {**files, up: files[names[0]], names[0]: files[up]},
    ):
        index.write_text(json.dumps({"weight_map": promised}))
        with pytest.raises(ValueError):
            load_llama(folder)


def test_an_index_that_is_stale_or_lists_what_no_shard_needs_does_not_matter(place, good):
    weights = load_file(place("plain") / "model.safetensors")
    index = json.loads(good["sharded"]["model.safetensors.index.json"])
    kind = "model.safetensors.index.json"
    stale = {"weight_map": {n: "model-00001-of-00009.safetensors" for n in weights}}
    assert load_llama(place("plain", **{kind: stale}))
    file = index["weight_map"][NORM]
    more = {"weight_map": index["weight_map"] | {INV: file, "lm_head.weight": file}}
    assert load_llama(place("sharded", **{kind: more}))
    untied = fuzz.FIELDS | {"tie_word_embeddings": False}
    folder = place("sharded", config_json=untied, **{kind: more})
    refuses(load_llama, folder, match="lm_head.weight is missing")


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 988097824\n"


def test_weights_in_other_forms_are_refused_with_what_to_do_about_them(place, tmp_path):
    for name, match in (
        ("pytorch_model.bin", "holds pytorch_model.bin and no safetensors: .*save_pretrained"),
        ("model.Q4.gguf", "holds model.Q4.gguf and no safetensors"),
    ):
        folder = place("plain", model_safetensors=None, **{name: b"PK"})
        refuses(load_llama, folder, match=match)
    for name in ("model.safetensors", "tokenizer.model", "tokenizer.json", "config.json"):
        refuses(load_llama, place("plain", **{name: POINTER}), match=name + ".*git lfs pull")
    (tmp_path / "text.jsonl").write_bytes(POINTER)
    refuses(read_documents, tmp_path / "text.jsonl", match="git lfs pull")


def test_quantised_weights_are_refused_by_their_method_and_dense_ones_of_sparsegpt_are_read(place):
    sparse = {"format": "dense", "global_sparsity": 0.5, "sparsity_structure": "2:4"}
    compressed = {"quant_method": "compressed-tensors", "format": "dense", "config_groups": {}}
    for settings, method in (
        ({"quant_method": "gptq", "bits": 4}, "gptq"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes"),
        ({"bits": 4}, "by an unknown method"),
        (5, "by an unknown method"),
        (compressed, "compressed-tensors"),
        (
            compressed | {"sparsity_config": sparse, "config_groups": {"a": {}}},
            "compressed-tensors",
        ),
        (compressed | {"sparsity_config": sparse | {"format": "sparse-24-bitmask"}}, "sparse-24"),
    ):
        fields = fuzz.FIELDS | {"quantization_config": settings}
        refuses(load_llama, place("plain", config_json=fields), match=method + ".*: dequantise")
    settings = compressed | {"sparsity_config": sparse}
    folder = place("plain", config_json=fuzz.FIELDS | {"quantization_config": settings})
    assert load_llama(folder)


def test_a_packed_folder_is_an_error_for_transformers_and_unpacks_to_the_same_names(
    place, tmp_path
):
    transformers = pytest.importorskip("transformers")
    for kind in ("plain", "sharded"):
        source, folder = place(kind), tmp_path / kind
        model, names = load_llama(source)[0], {p.name for p in source.iterdir()}
        masks = fuzz.random_masks(model)
        save_llama(model, folder / "packed", source, masks, packed=True)
        with pytest.raises(OSError, match="no file named model.safetensors"):
            transformers.AutoModelForCausalLM.from_pretrained(folder / "packed")
        packed = load_llama(folder / "packed")[0]
        save_llama(packed, folder / "plain", folder / "packed", {})
        assert {p.name for p in (folder / "plain").iterdir()} == names
        plain = load_llama(folder / "plain")[0].state_dict()
        assert all(torch.equal(plain[n], W) for n, W in packed.state_dict().items())
        for name, kept in masks.items():
            assert torch.equal(plain[name], model.state_dict()[name] * kept)


def test_padding_beyond_the_vocabulary_and_a_broken_tokenizer_model_beside_a_good_one_are_no_matter(
    place, good
):
    pytest.importorskip("tokenizers")
    raw = json.loads(good["fast"]["tokenizer.json"])
    size = len(raw["model"]["vocab"])
    pad = raw["added_tokens"][0] | {"content": "[PAD]", "id": size}
    folder = place("fast", tokenizer_json=raw | {"added_tokens": [*raw["added_tokens"], pad]})
    (folder / "tokenizer.model").write_bytes(b"no tokenizer")
    tokenizer = llama.Tokenizer(folder, size)
    assert tokenizer.encode("return x") == load_llama(place("fast"))[1].encode("return x")
    refuses(tokenizer.encode, "return [PAD]", match=f"token {size}, its model has {size} tokens")


def test_generation_with_a_cache_follows_the_logits_without_one(small):
    model, _ = load_llama(small)
    ids = [5, 6, 7]
    for token in llama.generate(model, [5, 6, 7], 20):
        assert token == int(model(torch.tensor([ids]))[0, -1].argmax())
        ids.append(token)
    assert list(llama.generate(model, [5], 9, 0.8, seed=3)) == list(
        llama.generate(model, [5], 9, 0.8, seed=3)
    )
    with pytest.raises(ValueError):
        next(llama.generate(model, [5], 128))


def test_tokenizer_of_tiny_loses_nothing_of_the_standard_library():
    tokenizer = llama.Tokenizer(ROOT / "tiny", 4096)
    for held_out in (False, True):
        texts = evaluation.stdlib_files(held_out)
        assert [tokenizer.decode(ids) for ids in tokenizer.encode(texts)] == texts
    odd = " \t\n\n  leading, \r\n, trailing \x0c é 漢 🎈  "
    assert tokenizer.decode(tokenizer.encode(odd)) == odd and tokenizer.adds_bos


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_a_checkpoint_that_transformers_made_itself_biases_included_gives_its_logits(
    family, tokens, tmp_path
):
    transformers = pytest.importorskip("transformers")
    sizes = dict(
        vocab_size=4096,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    config = transformers.AutoConfig.for_model(
        family, **sizes, **(dict(attention_bias=True, mlp_bias=True) if family == "llama" else {})
    )
    theirs, g = (
        transformers.AutoModelForCausalLM.from_config(config).eval(),
        torch.Generator().manual_seed(0),
    )
    for p in theirs.parameters():  # biases are 0 when they are made
        p.data = torch.randn(p.shape, generator=g) * 0.3
    theirs.save_pretrained(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes((ROOT / "tiny" / "tokenizer.model").read_bytes())
    with torch.no_grad():
        ours, theirs = llama.load_llama(tmp_path)[0](tokens), theirs(tokens).logits
    assert (ours - theirs).abs().max() < 1e-4 * theirs.abs().max()  # float32


@steady
@given(
    st.integers(1, 7),
    st.integers(1, 41) | st.sampled_from([8, 64, 72]),
    st.floats(0, 1),
    seeds,
    st.sampled_from([torch.float16, torch.bfloat16, torch.float32]),
)
def test_packing_keeps_every_bit_pattern_under_any_mask_in_the_documented_bit_order(
    rows, columns, share, seed, dtype
):
    g = torch.Generator().manual_seed(seed)
    whole = torch.int16 if dtype != torch.float32 else torch.int32
    bits = torch.randint(
        torch.iinfo(whole).min,
        torch.iinfo(whole).max + 1,
        (rows, columns),
        generator=g,
        dtype=torch.int64,
    ).to(whole)
    kept = torch.rand(rows, columns, generator=g) < share
    kept[seed % rows] = share == 1  # an empty row
    mask, values = pack(bits.view(dtype), kept)  # NaN, infinity, -0.0 and all
    assert np.array_equal(mask.numpy(), np.packbits(kept.numpy(), axis=1, bitorder="little"))
    assert values.dtype == dtype and torch.equal(values.view(whole), bits[kept])
    assert torch.equal(unpack(mask, values, columns).view(whole), torch.where(kept, bits, 0))
    if columns % 8:
        mask[0, -1] |= 128  # an unused bit is set
        with pytest.raises(ValueError, match="values are there"):
            unpack(mask, torch.cat([values, values.new_zeros(1)]), columns)


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
        back, bits = (
            unpack(mask, values, shape[1]),
            torch.int16 if W.element_size() == 2 else torch.int32,
        )
        assert torch.equal(back.view(bits), torch.where(kept, W.view(bits), 0))
    with pytest.raises(ValueError, match="values are there"):
        unpack(mask, torch.zeros(1 + len(values), dtype=dtype), shape[1])


def test_a_packed_file_of_another_version_or_with_half_of_a_matrix_is_refused(tmp_path):
    model, _ = load_llama(ROOT / "tiny")
    masks = Pruner(model, torch.randint(3, 4096, (2, 64))).masks([0.5] * 12)
    save_llama(model, tmp_path / "packed", ROOT / "tiny", masks, packed=True)
    file = tmp_path / "packed" / "packed.safetensors"
    tensors, name = (
        {k: v.clone() for k, v in load_file(file).items()},
        "model.layers.3.mlp.up_proj.weight",
    )  # not mapped from what is overwritten
    for flawed, metadata in (
        (tensors, {"unicuco_packed": "2"}),
        ({k: v for k, v in tensors.items() if k != name + ".kept"}, {}),
        ({k: v for k, v in tensors.items() if k != name + ".mask"}, {}),
        ({**tensors, name + ".kept": tensors[name + ".kept"][1:].clone()}, {}),
        ({**tensors, name: torch.zeros(512, 192)}, {}),
    ):
        save_file(flawed, file, metadata)
        with pytest.raises(ValueError, match="packed in a version|up_proj"):
            load_llama(tmp_path / "packed")


def test_a_model_saved_again_is_the_same_file_byte_for_byte_packed_or_not(small, tmp_path):
    model, _ = load_llama(small)
    masks = Pruner(model, torch.randint(3, 4096, (2, 64))).masks([0.5] * 3)
    for packed in (False, True):
        files = set()
        for _ in range(8):
            save_llama(model, tmp_path / "saved", small, masks, packed)
            files.add((tmp_path / "saved" / "model.safetensors").read_bytes())
        assert len(files) == 1


def test_a_packed_matrix_at_one_half_is_within_2_percent_of_the_floor(tmp_path):
    model, _ = load_llama(ROOT / "tiny")
    pruner = Pruner(
        model, torch.randint(3, 4096, (2, 64), generator=torch.Generator().manual_seed(0))
    )
    save_llama(model, tmp_path / "packed", ROOT / "tiny", pruner.masks([0.5] * 12), packed=True)
    with safe_open(tmp_path / "packed" / "packed.safetensors", framework="pt") as f:
        stored = sum(f.get_tensor(n).nbytes for n in f.keys() if n.endswith((".mask", ".kept")))
    floor = sum(m.numel() * 2 for m in pruner.masks([0.5] * 12).values()) * (1 / 16 + 1 / 2)
    assert floor <= stored <= 1.02 * floor


UP, NORM, INV = (
    "model.layers.0.mlp.up_proj.weight",
    "model.norm.weight",
    "model.layers.0.self_attn.rotary_emb.inv_freq",
)


@pytest.mark.parametrize(
    "change",
    [
        {"rope_scaling": 5},
        {"rope_parameters": [1], "rope_scaling": None},
        {"rope_scaling": {"rope_type": ["llama3"]}},
        {"rope_scaling": {"rope_type": {}}},
        {"model_type": ["llama"]},
        {"model_type": "smollm3"},
        {"model_type": "phi3"},
        {"rope_parameters": {"rope_type": "default"}, "rope_scaling": {"rope_type": "yarn"}},
        {"partial_rotary_factor": 0.5},
        {"hidden_act": {}},
        {"hidden_size": 10**30},
        {"hidden_size": 2**24},
        {"vocab_size": 2**24},
        {"head_dim": 4096},
        {"num_hidden_layers": 1024},
        {"intermediate_size": "x" * 5000},
        {"hidden_size": True},
        {"rms_norm_eps": math.nan},
        {"num_attention_heads": 0},
        {"max_position_embeddings": -1},
        {"rope_scaling": {"rope_type": "linear", "factor": "x" * 5000}},
        {"quantization_config": {"bits": 4}},
    ],
    ids=lambda change: str(change)[:40],
)
def test_a_config_of_absurd_sizes_or_of_wrong_types_is_refused_before_anything_is_allocated(
    place, change
):
    refuses(load_llama, place("plain", config_json=fuzz.FIELDS | change))


@pytest.mark.parametrize("token", ["1", 1.0, True, [[1]], {}, -2, 320, [2, 320], 10**30])
def test_ends_of_text_that_the_model_does_not_have_are_refused(place, token):
    pytest.importorskip("tokenizers")
    ends = {"eos_token_id": token}
    for kind in ("fast", "plain"):
        refuses(load_llama, place(kind, config_json=fuzz.FIELDS | ends), match="eos_token_id")
        refuses(load_llama, place(kind, generation_config_json=ends), match="generation_config")


def test_a_tokenizer_with_ids_beyond_the_vocabulary_is_refused_and_its_padding_is_not_used(
    place, good
):
    pytest.importorskip("tokenizers")
    raw = json.loads(good["fast"]["tokenizer.json"])
    _, tokenizer = load_llama(place("fast"))
    ids = tokenizer.encode("return x * 100")
    padded = raw | {
        "padding": {
            "strategy": {"Fixed": 500},
            "direction": "Right",
            "pad_to_multiple_of": None,
            "pad_id": 7,
            "pad_type_id": 0,
            "pad_token": "x",
        },
        "truncation": {
            "max_length": 3,
            "strategy": "LongestFirst",
            "stride": 0,
            "direction": "Right",
        },
    }
    assert (
        load_llama(place("fast", tokenizer_json=padded))[1].encode(["return x * 100"]) == [ids]
        and len(ids) > 3
    )
    vocabulary = raw["model"]["vocab"]
    vocabulary[max(vocabulary, key=vocabulary.get)] = 10**6
    _, tokenizer = load_llama(place("fast", tokenizer_json=raw))
    refuses(tokenizer.encode, fuzz.TEXT, match="gives token 1000000, its model has 320")


def test_a_model_with_more_tokens_than_its_tokenizer_still_writes_text(place):
    model, tokenizer = load_llama(place("plain"))
    model.head.weight.data[:] = 0
    model.head.weight.data[310] = (
        model.model.norm.weight.data.sign()
    )  # a token that the tokenizer, of 300, does not have
    assert isinstance("".join(stream(model, tokenizer, "def", 4)), str)


def test_half_a_surrogate_pair_is_refused_as_text(place, tmp_path):
    (tmp_path / "half.jsonl").write_text('{"text": "\\ud800"}\n')
    for kind in ("plain", "fast"):
        tokenizer = load_llama(place(kind))[1]
        refuses(tokenizer.encode, "\ud800")
        refuses(tokenise, tokenizer, read_documents(tmp_path / "half.jsonl"))


@pytest.mark.parametrize(
    "target",
    [
        "../evil.safetensors",
        "..",
        ".",
        "",
        "sub/model.safetensors",
        "a\nb.safetensors",
        "config.json",
        "\ud800.safetensors",
        "absolute",
        5,
        None,
        ["model-1-of-2.safetensors"],
        {},
    ],
)
def test_an_index_that_points_anywhere_but_to_weight_files_of_its_folder_is_refused(
    place, good, tmp_path, target
):
    for outside in (tmp_path / "evil.safetensors", tmp_path / "absolute.safetensors"):
        outside.write_bytes(good["sharded"]["model-1-of-2.safetensors"])
    index = json.loads(good["sharded"]["model.safetensors.index.json"])
    first = min(index["weight_map"])
    index["weight_map"][first] = (
        str(tmp_path / "absolute.safetensors") if target == "absolute" else target
    )
    refuses(
        load_llama,
        place(
            "sharded", model_safetensors_index_json=None, **{"model.safetensors.index.json": index}
        ),
    )


def changed_tensors(weights):
    """(what is wrong, weights, word of the message), each on a copy of the good weights."""
    mask, kept = pack(weights[UP], weights[UP] > 0)
    square_mask, square_kept = pack(torch.ones(16, 16).half(), torch.eye(16) > 0)
    without = lambda *names: {n: w for n, w in weights.items() if n not in names}
    return [
        (
            "a packed vector",
            without(NORM) | {NORM + ".mask": square_mask, NORM + ".kept": square_kept},
            NORM,
        ),
        ("a float mask without survivors", without(UP) | {UP + ".mask": weights[UP]}, UP),
        ("survivors without a mask", without(UP) | {UP + ".kept": kept}, UP),
        ("survivors beside the dense matrix", weights | {UP + ".kept": weights[UP].clone()}, UP),
        ("packed and dense", weights | {UP + ".mask": mask, UP + ".kept": kept}, UP),
        (
            "a mask packed twice",
            without(UP) | {UP + ".kept.mask": mask, UP + ".kept": kept, UP + ".mask": mask.clone()},
            UP,
        ),
        ("survivors as a matrix", without(UP) | {UP + ".mask": mask, UP + ".kept": kept[None]}, UP),
        (
            "one survivor too many",
            without(UP) | {UP + ".mask": mask, UP + ".kept": torch.cat([kept, kept[:1]])},
            "values are there",
        ),
        ("packed rotary frequencies", weights | {INV + ".mask": mask, INV + ".kept": kept}, INV),
        ("a name of two lines", weights | {"a\nb": kept}, "does not belong"),
        ("a name without end", weights | {"x" * 5000: kept}, "does not belong"),
        ("double precision", weights | {UP: weights[UP].double()}, "F64"),
        ("complex weights", weights | {UP: weights[UP].to(torch.complex64)}, UP),
        ("NaN in a norm", weights | {NORM: weights[NORM] * math.nan}, NORM + " holds NaN"),
        (
            "one infinite weight",
            weights | {UP: weights[UP].clone().index_fill_(0, torch.tensor(3), math.inf)},
            UP + " holds NaN",
        ),
    ]


def test_weights_that_do_not_fit_are_refused_by_name(place, tmp_path):
    weights = load_file(place("plain") / "model.safetensors")
    for what, tensors, word in changed_tensors(weights):
        refuses(load_llama, place("plain", model_safetensors=tensors), match=re.escape(word))
    assert load_llama(
        place("plain", model_safetensors=weights | {INV: torch.rand(4)})
    )  # old Llama 2 files carry it


def test_logits_that_are_not_finite_stop_sampling_and_pruning_in_one_line(place):
    weights = load_file(place("plain") / "model.safetensors")
    model, tokenizer = load_llama(
        place("plain", model_safetensors={n: torch.full_like(w, 6e4) for n, w in weights.items()}),
        dtype=torch.float16,
    )
    for temperature in (0.0, 1.0):
        refuses(
            lambda: list(stream(model, tokenizer, "def", 3, temperature)), match="NaN or infinite"
        )
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


@pytest.mark.parametrize(
    "name", ["model.safetensors.index.json", "model-1-of-2.safetensors", "model-2-of-2.safetensors"]
)
def test_weights_that_are_links_are_read_inside_the_folder_and_in_the_hubs_cache_alone(
    place, tmp_path, name
):
    folder, cache = place("sharded"), tmp_path / "models--a--b"
    snapshot, elsewhere = cache / "snapshots" / "0123", tmp_path / "snapshots of others"
    (folder / "real").mkdir()
    (folder / name).rename(folder / "real" / name)
    (folder / name).symlink_to(folder / "real" / name)
    assert load_llama(folder)
    for path in (cache / "blobs", snapshot.parent, elsewhere):
        path.mkdir(parents=True)
    (folder / "real" / name).rename(cache / "blobs" / "4567")
    (folder / name).unlink()
    (folder / name).symlink_to("../../blobs/4567")
    assert load_llama(folder.rename(snapshot))
    (cache / "blobs").rename(tmp_path / "blobs")
    folder = snapshot.rename(elsewhere / "0123")  # whose neighbours' blobs are anybody's
    for read in (load_llama, weight_files):
        refuses(read, folder, match=f"{name} is a link out of its folder: copy the file itself")
    (folder / name).unlink()
    (folder / name).symlink_to(folder / name)  # a ring
    refuses(load_llama, folder)


def test_llama_streams_the_text_that_generation_gives_and_compares_two_models_side_by_side(
    small, pruned, capsys
):
    model, tokenizer = load_llama(small)
    ids = [tokenizer.bos_id, *tokenizer.encode("import os")]
    expected = tokenizer.decode([*ids, *llama.generate(model, ids, 12, 0.9, seed=5)])
    assert (
        call(
            llama,
            "--model",
            small,
            "--prompt",
            "import os",
            "--tokens",
            12,
            "--temperature",
            0.9,
            "--seed",
            5,
            *CPU,
        )
        == 0
    )
    assert capsys.readouterr().out == expected.rstrip("\N{REPLACEMENT CHARACTER}") + "\n"
    assert (
        call(llama, "--compare", small, pruned, "--prompt", "import os", "--tokens", 8, *CPU) == 0
    )
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split(" | ")[0].strip() == str(small) and all(
        line.count(" |") >= 1 for line in lines
    )
    assert lines[2].split(" | ")[0].startswith("import os") and lines[2].split(" | ")[1].startswith(
        "import os"
    )
    assert call(llama, "--model", small, "--temperature", -1) == 2


def test_a_stream_ends_at_the_end_of_text_and_yields_whole_characters_only(small, monkeypatch):
    model, tokenizer = load_llama(small)
    letters = tokenizer.encode("a\N{BALLOON}b")  # the balloon is four bytes, a token each
    monkeypatch.setattr(
        llama, "generate", lambda *a: iter([*letters, tokenizer.eos_ids[0], *letters])
    )
    pieces = list(llama.stream(model, tokenizer, "x", 99))
    assert (
        "".join(pieces) == "a\N{BALLOON}b"
        and not any("\N{REPLACEMENT CHARACTER}" in p for p in pieces)
        and len(letters) > len(pieces)
    )


def test_a_tokenizer_json_works_like_its_library_and_says_which_package_it_needs(
    small, tmp_path, monkeypatch
):
    tokenizers = pytest.importorskip("tokenizers")
    folder = write_small(tmp_path / "fast")
    (folder / "tokenizer.model").unlink()
    words = {w: i for i, w in enumerate(["<unk>", "<s>", "</s>", "import", "os", "sys"])}
    fast = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    fast.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    fast.save(str(folder / "tokenizer.json"))
    for begins in (False, True):
        if begins:
            fast.post_processor = tokenizers.processors.TemplateProcessing(
                single="<s> $A", special_tokens=[("<s>", 1)]
            )
            fast.save(str(folder / "tokenizer.json"))
            (folder / "tokenizer_config.json").unlink()
        tokenizer = load_llama(folder)[1]
        assert (
            tokenizer.encode("import sys what") == [3, 5, 0]
            and tokenizer.decode([3, 5]) == "import sys"
        )
        assert tokenizer.encode(["os", "sys os"]) == [[4], [5, 4]] and (
            tokenizer.bos_id,
            tokenizer.eos_ids,
        ) == (1, [2])
    assert tokenizer.adds_bos
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ValueError, match="pip install tokenizers"):
        load_llama(folder)


def test_a_packed_file_of_masks_alone_is_refused_before_anything_is_allocated(tmp_path):
    path = tmp_path / "model.safetensors"
    right = (1024, 1024)
    refuses(
        llama.check_tensor, path, "a.kept", (1000,), "F32", right, match="less than pruning leaves"
    )
    llama.check_tensor(path, "a.kept", (102400,), "F32", right)


MARKS = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]


def fast_tokenizer(style):
    """A small tokenizer.json as Llama 2 and Mistral have it (spaces become marks), or as Llama 3,
    Qwen2 and SmolLM2 do (bytes).
    """
    import tokenizers as t

    fast = t.Tokenizer(t.models.BPE(byte_fallback=True, unk_token="<unk>"))
    alphabet = []
    if style in ("llama2", "mistral"):
        marks = [t.normalizers.Prepend("▁"), t.normalizers.Replace(" ", "▁")]
        fast.normalizer = t.normalizers.Sequence(marks)
    else:
        words, digits = t.pre_tokenizers.ByteLevel(False), t.pre_tokenizers.Digits(True)
        fast.pre_tokenizer = t.pre_tokenizers.Sequence([digits, words])
        alphabet = t.pre_tokenizers.ByteLevel.alphabet()
    trainer = t.trainers.BpeTrainer(
        vocab_size=310, special_tokens=MARKS, initial_alphabet=alphabet, show_progress=False
    )
    fast.train_from_iterator(fuzz.TEXT.splitlines(), trainer)
    return fast


STYLES = {
    # legacy: a space after each mark too, as tokenizer.json says; without it transformers 5
    # rewrites the file's rule
    "llama2": {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "legacy": True},
    "llama3": {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|im_start|>"},
    "qwen2": {"tokenizer_class": "Qwen2Tokenizer", "bos_token": None},
    "mistral": {
        "tokenizer_class": "LlamaTokenizer",
        "bos_token": {"content": "<s>", "__type": "AddedToken"},
    },
    "smollm2": {"tokenizer_class": "GPT2Tokenizer", "bos_token": "<|im_start|>"},
}


@pytest.mark.parametrize("added", [{}, {"add_bos_token": True}, {"add_bos_token": False}])
@pytest.mark.parametrize("begins", [False, True])
@pytest.mark.parametrize("style", STYLES)
def test_token_ids_are_those_of_transformers_whatever_config_json_says_of_the_begin_token(
    style, begins, added, place
):
    transformers, t = pytest.importorskip("transformers"), pytest.importorskip("tokenizers")
    fast, begin = fast_tokenizer(style), "<s>" if style in ("llama2", "mistral") else MARKS[3]
    if begins:
        template = {"single": begin + " $A", "special_tokens": [(begin, MARKS.index(begin))]}
        fast.post_processor = t.processors.TemplateProcessing(**template)
    kind = style if style in ("mistral", "qwen2") else "llama"
    settings = STYLES[style] | {"eos_token": "<|im_end|>"} | added
    fields = fuzz.FIELDS | {"model_type": kind, "bos_token_id": 0, "eos_token_id": None}
    folder = place("fast", config_json=fields, tokenizer_config_json=settings)
    fast.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer.model").write_bytes((ROOT / "tiny" / "tokenizer.model").read_bytes())
    ours = llama.Tokenizer(folder, 320)
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    for text in ("return x * 7 + y", "<|im_start|>the quick<|im_end|>fox"):
        start = [ours.bos_id] * ours.adds_bos
        assert start + ours.encode(text) == theirs(text).input_ids
    assert ours.adds_bos == begins and ours.eos_ids == [4]


def test_a_text_ends_at_any_end_that_generation_config_names_else_config_else_the_tokenizer(
    small, tmp_path, monkeypatch
):
    folder = write_small(tmp_path / "m", eos_token_id=[2, 7])
    monkeypatch.setattr(llama, "generate", lambda *a: iter([70, 71, end, 72]))
    model, tokenizer = load_llama(folder)
    two = tokenizer.decode([70, 71])
    for end in (2, 7):
        assert "".join(stream(model, tokenizer, "x", 99)) == two
    (folder / "generation_config.json").write_text('{"eos_token_id": 9}')
    end, tokenizer = 9, load_llama(folder)[1]
    assert tokenizer.eos_ids == [9] and "".join(stream(model, tokenizer, "x", 99)) == two
    (folder / "generation_config.json").unlink()
    write_small(folder, eos_token_id=None)
    assert load_llama(folder)[1].eos_ids == [2]


def test_a_chat_mark_that_tokenizer_model_lacks_is_refused_and_ends_a_text(place):
    added = {"<|im_start|>": 300, "<|im_end|>": 301}
    named = {"eos_token": "<|im_end|>", "add_bos_token": False}
    fields = fuzz.FIELDS | {"eos_token_id": None}
    listed = {str(i): {"content": text} for text, i in added.items()}
    for files in (
        {"added_tokens_json": added, "tokenizer_config_json": named},
        {"tokenizer_config_json": named | {"added_tokens_decoder": listed}},
    ):
        tokenizer = load_llama(place("plain", config_json=fields, **files))[1]
        assert tokenizer.eos_ids == [301] and tokenizer.encode("return x")
        assert not tokenizer.adds_bos
        refuses(
            tokenizer.encode, "<|im_start|>user", match="lacks the added token .*save_pretrained"
        )
