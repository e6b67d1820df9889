"""
Tokenizers that a stranger may have made: rules that explode, patterns that backtrack, panics.

Run       pytest test_tokenizer.py        (what token ids are right is in test_llama.py)
"""

import json
import time

import pytest

import tokenizer as ours
from conftest import ROOT, refuses
from tokenizer import Tokenizer

tokenizers = pytest.importorskip("tokenizers")
DOUBLE = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}
EVIL = {"type": "Split", "pattern": {"Regex": "(a|aa)+$"}, "behavior": "Isolated", "invert": False}
SHORT = {**EVIL, "pattern": {"Regex": "\\s+|\\w+"}}


def folder_with(tmp_path, **rules):
    """A folder with a small tokenizer.json that has these rules."""
    model = tokenizers.models.BPE(byte_fallback=True, unk_token="<unk>")
    fast = tokenizers.Tokenizer(model)
    trainer = tokenizers.trainers.BpeTrainer(special_tokens=["<unk>"], show_progress=False)
    fast.train_from_iterator(["a bc def " * 20], trainer)
    content = json.loads(fast.to_str()) | rules
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    (tmp_path / "config.json").write_text("{}")
    return tmp_path


@pytest.mark.parametrize(
    "rules",
    [
        {"normalizer": {"type": "Sequence", "normalizers": [DOUBLE] * 40}},
        {"pre_tokenizer": EVIL},
    ],
)
def test_rules_that_explode_are_refused_in_one_line_and_soon(tmp_path, rules, monkeypatch, capfd):
    monkeypatch.setattr(ours, "SECONDS", 5)
    started = time.monotonic()
    refuses(Tokenizer, folder_with(tmp_path, **rules), 4096, match="was tried on a few words")
    assert time.monotonic() - started < 60 and capfd.readouterr().err == ""


def test_unknown_rules_that_do_no_harm_are_tried_and_used_and_known_ones_are_not_tried(
    tmp_path, monkeypatch
):
    tried, original = [], ours.subprocess.run

    def spy(*arguments, **named):
        tried.append(arguments)
        return original(*arguments, **named)

    monkeypatch.setattr(ours.subprocess, "run", spy)
    assert Tokenizer(folder_with(tmp_path, pre_tokenizer=SHORT), 4096).encode("a bc")
    assert len(tried) == 1
    one = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}
    words = {**EVIL, "pattern": {"Regex": ours.WORDS.replace(r"\p{N}|", r"\p{N}{1,3}|", 1)}}
    for rules in ({"normalizer": one}, {"pre_tokenizer": words}, {}):
        assert Tokenizer(folder_with(tmp_path, **rules), 4096).encode("a bc")
    assert len(tried) == 1


def test_a_panic_of_a_library_is_one_line_and_prints_nothing(capfd, tmp_path):
    class PanicException(BaseException):
        """As Rust's bindings raise it."""

    def panics(_):
        ours.os.write(2, b"thread panicked at\n" * 90)
        raise PanicException("index out of range")

    with pytest.raises(RuntimeError, match="index out of range"):
        ours.native(panics, 1)
    tokenizer = Tokenizer(ROOT / "tiny", 4096)
    tokenizer.batch = panics
    refuses(tokenizer.encode, "text", match="cannot encode this text: index out of range")
    assert capfd.readouterr().err == ""
    with pytest.raises(KeyboardInterrupt):
        ours.native(lambda: (_ for _ in ()).throw(KeyboardInterrupt()))


@pytest.mark.parametrize("odd", [3, "x", [1], {"type": 4}, {"type": "Sequence", "normalizers": 7}])
def test_rules_of_no_known_form_are_one_line(tmp_path, odd, capfd):
    refuses(Tokenizer, folder_with(tmp_path, normalizer=odd), 4096)
    assert capfd.readouterr().err == ""
