"""
Text <-> token ids of a model folder that anyone may have made, as transformers does it.

Source    the formats of Hugging Face's tokenizers and of sentencepiece, whose packages do the work.
Reading   beside llama.py, which loads it with a model; can be skipped.
Strangers a tokenizer.json is a program: rules that double a text thirty times, on its way in or
          back, or a pattern that backtracks for ever, are tried in a process of their own before
          they are used here.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

from script import Refused, first_line, read_json

NO_FAST_FILE = (
    "write a tokenizer.json, by AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)"
    " of transformers"
)
# rules that neither lengthen a text much nor take long, whatever is in the file
HARMLESS = set(
    "NFC NFD NFKC NFKD Lowercase Strip StripAccents Prepend BertNormalizer Precompiled Nmt"
    " ByteLevel Digits Whitespace WhitespaceSplit Metaspace BertPreTokenizer Punctuation"
    " ByteFallback Fuse WordPiece".split()
)
# what a rule of several lists its parts under: as normaliser, pre-tokeniser, decoder
PARTS = "normalizers", "pretokenizers", "decoders"
# decoders that put a space for this text: for none, between all letters, which doubles them
SPACED = {"BPEDecoder": "suffix", "CTC": "word_delimiter_token"}
# the pattern of Llama 3 and of Qwen, whose digits come one to three at a time or one
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
KNOWN_SPLITS = WORDS, WORDS.replace(r"\p{N}|", r"\p{N}{1,3}|")
MEMORY, SECONDS = 4 * 2**30, 30  # what a trial may take, loading included
GROWTH = 100  # how much longer it may make a text: 18 times is known, of one letter of Arabic
TRIAL = f"""
import resource, sys
resource.setrlimit(resource.RLIMIT_AS, ({MEMORY}, {MEMORY}))
resource.setrlimit(resource.RLIMIT_CPU, ({SECONDS}, {SECONDS}))
import tokenizers
fast = tokenizers.Tokenizer.from_file(sys.argv[1])
fast.no_truncation()
fast.no_padding()
runs = [chr(c) * 64 + "!" for c in range(32, 127)]
def compare(made, given):
    if len(made) > {GROWTH} * (len(given) + 1):
        sys.exit("too long")
for token, i in fast.get_vocab().items():
    compare(fast.decode([i], skip_special_tokens=False), token)
for text in [*runs, "a\\n" * 64, "\u00e9 \u4e16" * 64, " ".join(runs)]:
    ids = fast.encode(text).ids
    compare(ids, text)
    compare(fast.decode(ids, skip_special_tokens=False), text)
"""


# ------------------------------------------------------------------------------ strangers' files
def harmless(rule):
    """Whether a normaliser, pre-tokeniser or decoder of tokenizer.json is of a kind that cannot
    explode.
    """
    if rule is None:
        return True
    kind, pattern = rule.get("type"), rule.get("pattern") or {}
    if kind == "Sequence":
        parts = [part for key in PARTS for part in rule.get(key) or []]  # whichever is read
        return len(parts) <= 16 and all(map(harmless, parts))
    if kind == "Replace":
        return "String" in pattern and len(rule.get("content", "")) <= len(pattern["String"])
    if kind == "Split":
        return "String" in pattern or pattern.get("Regex") in KNOWN_SPLITS
    return bool(rule.get(SPACED[kind])) if kind in SPACED else kind in HARMLESS


def try_unknown_rules(path):
    """Refuse a tokenizer.json whose rules need more memory or time than any text is worth: unless
    they are of known kinds, they are tried in a child process.
    """
    rules = read_json(path)
    try:
        if all(harmless(rules.get(place)) for place in ("normalizer", "pre_tokenizer", "decoder")):
            return
    except (AttributeError, TypeError, RecursionError):
        pass  # of no known form: tried too
    words = [sys.executable, "-c", TRIAL, str(path)]
    quiet = {**os.environ, "TOKENIZERS_PARALLELISM": "false"}
    try:
        done = subprocess.run(words, capture_output=True, env=quiet, timeout=2 * SECONDS)
        failed = done.returncode != 0 and b"No module named 'resource'" not in done.stderr
    except subprocess.TimeoutExpired:
        failed = True
    if failed:
        raise Refused(
            f"{path} was tried on a few words and crashed, made them over {GROWTH} times longer, or"
            f" took over {SECONDS} s or {MEMORY // 2**30} GB: get it from the model's publisher"
        )


def native(call, *arguments):
    """What a call into another language's library returns. A panic there is no Exception, and
    prints at length: it becomes a RuntimeError of one line.
    """
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        return call(*arguments)
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise RuntimeError(first_line(error)) from None
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


# ------------------------------------------------------------------------------------ tokenizer
class Tokenizer:
    """Text to token ids and back, as transformers does it: by `tokenizer.json` and the package
    tokenizers, without that file by `tokenizer.model` and sentencepiece.

    encode    text -> ids, list of texts -> list of ids (over all cores), without special tokens
    decode    ids -> text
    bos_id, adds_bos   the begin token (or None), and whether a text opens with it. tokenizer.json's
                       template decides; for tokenizer.model, add_bos_token of tokenizer_config.json
    eos_ids   the ends of a text: generation_config.json's, else config.json's, else the tokenizer's
    """

    def __init__(self, folder, vocab_size):
        self.folder, self.vocab_size = Path(folder), vocab_size
        self.settings = self.optional("tokenizer_config.json")
        try:
            if (self.folder / "tokenizer.json").exists():
                end = native(self.open_tokenizers, self.folder / "tokenizer.json")
            else:
                end = native(self.open_sentencepiece, self.folder / "tokenizer.model")
        except ImportError as error:
            raise Refused(
                f"the tokenizer of {folder} needs one more package: pip install {error.name}"
            ) from None
        except Refused:
            raise
        # both libraries raise what they like, a bare Exception included, on a broken file
        except Exception as error:
            raise Refused(
                f"{folder} has no tokenizer.json or tokenizer.model that can be read:"
                f" {first_line(error)}"
            ) from None
        self.eos_ids = self.ends_of_text(end)

    def optional(self, name):
        path = self.folder / name
        return read_json(path) if path.exists() else {}

    def named(self, key):
        """The text of a special token as tokenizer_config.json has it: a string or an object."""
        token = self.settings.get(key)
        token = token.get("content") if isinstance(token, dict) else token
        return token if isinstance(token, str) else ""

    def open_tokenizers(self, path):
        import tokenizers

        try_unknown_rules(path)
        fast = tokenizers.Tokenizer.from_file(str(path))
        fast.no_truncation()  # this and padding can be set in the file, for training
        fast.no_padding()
        self.batch = lambda texts: [
            e.ids for e in fast.encode_batch(texts, add_special_tokens=False)
        ]
        self.join = lambda ids: fast.decode(ids, skip_special_tokens=False)
        begin = fast.encode("a").ids[:1]
        self.adds_bos = begin != fast.encode("a", add_special_tokens=False).ids[:1]
        self.bos_id = begin[0] if self.adds_bos else fast.token_to_id(self.named("bos_token"))
        return fast.token_to_id(self.named("eos_token"))

    def open_sentencepiece(self, path):
        import sentencepiece

        pieces = sentencepiece.SentencePieceProcessor(model_file=str(path))
        size = pieces.get_piece_size()
        added = {text: i for text, i in self.added_tokens().items() if i >= size}
        found = re.compile("|".join(map(re.escape, added)) or "(?!)")  # without any: nothing

        def batch(texts):
            for token in filter(None, map(found.search, texts)):
                raise Refused(f"{path} lacks the added token {token[0]!r:.60}: {NO_FAST_FILE}")
            return pieces.encode(texts)

        self.batch = batch
        # a model may have more tokens
        self.join = lambda ids: pieces.decode([i for i in ids if i < size])
        ids = added | {pieces.id_to_piece(i): i for i in range(size)}
        self.bos_id = ids.get(self.named("bos_token"), pieces.bos_id())
        self.adds_bos = bool(self.settings.get("add_bos_token", True)) and self.bos_id >= 0
        return ids.get(self.named("eos_token"), pieces.eos_id())

    def added_tokens(self):
        """{text: id} of the tokens that were added beside tokenizer.model: chat marks."""
        listed = self.settings.get("added_tokens_decoder")
        listed = listed if isinstance(listed, dict) else {}
        tokens = {t.get("content"): int(i) for i, t in listed.items() if isinstance(t, dict)}
        tokens |= self.optional("added_tokens.json")
        return {t: i for t, i in tokens.items() if isinstance(t, str) and t and type(i) is int}

    def ends_of_text(self, own):
        """Ids of the tokens that end a text; Refused for one that the model does not have."""
        for name in ("generation_config.json", "config.json"):
            ends = self.optional(name).get("eos_token_id")
            if ends is not None:
                break
        else:
            name, ends = "the tokenizer", [] if own in (None, -1) else own
        ends = ends if isinstance(ends, list) else [ends]
        for end in ends:
            if not (type(end) is int and -1 <= end < self.vocab_size):
                raise Refused(
                    f"{self.folder}, {name}: eos_token_id = {end!r:.60} is none of the model's"
                    f" {self.vocab_size} tokens"
                )
        return ends

    def encode(self, text):
        """Token ids of a text; of a list of texts, a list of them. Refused for what is no text, as
        half a surrogate pair, and for a token that the model does not have.
        """
        try:
            ids = native(self.batch, [text] if isinstance(text, str) else text)
        except Refused:
            raise
        except Exception as error:
            raise Refused(f"the tokenizer cannot encode this text: {first_line(error)}") from None
        largest = max(map(max, filter(None, ids)), default=0)
        if largest >= self.vocab_size:
            raise Refused(
                f"the tokenizer of {self.folder} gives token {largest}, its model has"
                f" {self.vocab_size} tokens: they do not belong together"
            )
        return ids[0] if isinstance(text, str) else ids

    def decode(self, ids):
        """The text of token ids. Refused where the library fails on them."""
        try:
            return native(self.join, ids)
        except Exception as error:
            raise Refused(
                f"the tokenizer cannot decode these tokens: {first_line(error)}"
            ) from None
