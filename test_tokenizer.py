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
FUSE = {"type": "Fuse"}
SPACES = {"type": "CTC", "pad_token": "", "word_delimiter_token": "", "cleanup": True}


BACK = {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "}
DECODERS = [  # of Llama 2 and its like, Llama 3, BERT, GPT-1, wav2vec
    BACK,
    {"type": "ByteFallback"},
    FUSE,
    {"type": "Strip", "content": " ", "start": 1, "stop": 0},
    {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "always", "split": True},
    {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
    {"type": "WordPiece", "prefix": "##", "cleanup": True},
    {"type": "BPEDecoder", "suffix": "</w>"},
    {**SPACES, "pad_token": "<pad>", "word_delimiter_token": "|"},
]


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
        {"normalizer": {**DOUBLE, "pattern": EVIL["pattern"], "content": ""}},
        {"normalizer": {"type": "Sequence", "decoders": [], "normalizers": [DOUBLE] * 12}},
        {"decoder": {"type": "Sequence", "decoders": [DOUBLE] * 20}},
        {"decoder": {"type": "Sequence", "normalizers": [FUSE], "decoders": [DOUBLE] * 12}},
        {"decoder": {"type": "Sequence", "decoders": [FUSE, *[SPACES] * 12]}},
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
    for decoder in (*DECODERS, {"type": "Sequence", "decoders": [*DECODERS]}):
        known = Tokenizer(folder_with(tmp_path, decoder=decoder), 4096)
        assert known.decode(known.encode("a bc"))
    assert len(tried) == 1
    cut = {**DOUBLE, "pattern": {"Regex": "b.?"}, "content": ""}
    some = Tokenizer(folder_with(tmp_path, decoder=cut), 4096)
    assert len(tried) == 2 and "b" not in some.decode(some.encode("a bc"))


def test_a_rule_is_known_by_all_that_it_says_and_not_by_its_kind_alone():
    assert ours.harmless(None) and not ours.harmless({**SPACES, "type": "BPEDecoder"})
    assert not ours.harmless({**DOUBLE, "pattern": {"Regex": "a"}, "content": ""})
    often = ours.WORDS.replace(r"\s+(", r"\s+{1,3}{1,3}{1,3}(")  # backtracks like a power of n
    assert not ours.harmless({**EVIL, "pattern": {"Regex": often}})
    for key in ours.PARTS:
        assert ours.harmless({"type": "Sequence", key: [FUSE]})
        assert not ours.harmless({"type": "Sequence", key: [DOUBLE]})
        other = {name: [FUSE] for name in ours.PARTS} | {key: [DOUBLE]}
        assert not ours.harmless({"type": "Sequence", **other})


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


def test_a_panic_while_a_tokenizer_is_opened_or_decodes_is_one_line_too(
    tmp_path, monkeypatch, capfd
):
    cut = {"type": "Strip", "content": "a", "start": 0, "stop": 5}  # past the end of a token
    tokenizer = Tokenizer(folder_with(tmp_path, decoder=cut), 4096)
    refuses(tokenizer.decode, tokenizer.encode("a"), match="cannot decode these tokens: index out")

    class PanicException(BaseException):
        """As Rust's bindings raise it."""

    class Broken:
        """A tokenizer of the library of which `at` calls succeed, and the next one panics."""

        def __init__(self, *_, **named):
            self.at, self.calls = named.get("at", 0), 0

        def __getattr__(self, name):
            self.calls += 1
            if self.calls > self.at:
                ours.os.write(2, b"thread panicked\n" * 90)
                raise PanicException(f"broken {name}")
            return lambda *_, **__: tokenizers.Encoding()

    for at in range(5):
        monkeypatch.setattr(tokenizers.Tokenizer, "from_file", lambda _: Broken(at=at))
        refuses(Tokenizer, tmp_path, 4096, match="that can be read: broken [a-z_]+$")
    (tmp_path / "tokenizer.json").unlink()
    monkeypatch.setattr("sentencepiece.SentencePieceProcessor", Broken)
    refuses(Tokenizer, tmp_path, 4096, match="that can be read: broken get_piece_size")
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("odd", [3, "x", [1], {"type": 4}, {"type": "Sequence", "normalizers": 7}])
def test_rules_of_no_known_form_are_one_line(tmp_path, odd, capfd):
    refuses(Tokenizer, folder_with(tmp_path, normalizer=odd), 4096)
    assert capfd.readouterr().err == ""
