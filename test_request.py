"""
Wishes of every kind, and files of them.

Run       pytest test_request.py        (each tolerance has its dtype beside it)
"""

import json
import math
import subprocess
import sys
import types

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import prune
import request
from checks import coverage, fuzz
from conftest import CPU, ROOT, call, refuses, steady
from eval import Divergence, read_documents
from llama import load_llama, save_llama
from ranks import Pruner
from request import parse_request, read_requests


class Guess:
    """A surrogate of one function: strategy -> log KL."""

    def __init__(self, log_kl):
        self.log_kl = log_kl

    def posterior(self, x):
        return torch.tensor([float(self.log_kl(x[0]))]), torch.zeros(1)


def test_a_wish_for_a_kl_is_met_though_the_surrogate_is_wrong_and_more_sparsity_ruins_the_model():
    curve = lambda s: torch.full((4,), s, dtype=torch.float64)
    truth = lambda x: (
        2 * float(x.mean()) ** 2 if x.mean() < 0.6 else math.nan
    )  # the largest with KL 0.5 is at 0.5
    for guess in (
        lambda x: math.log(truth(x) / 3 if x.mean() < 0.6 else 0.3),
        lambda x: 8 * float(x.mean()) - 9,
        lambda x: 0.0,
        lambda x: 99.0,
    ):
        surrogate = request.Surrogate(curve, None, Guess(guess), truth, None)
        x = request.strategy_of(request.parse_request({"max_kl": 0.5}), surrogate)
        assert truth(x) <= 0.5 < truth(curve(float(x.mean()) + request.STEP))
    for measured in (math.nan, math.inf, 0.51):
        with pytest.raises(request.Unreachable):
            surrogate = request.Surrogate(curve, None, Guess(guess), lambda x: measured, None)
            request.strategy_of(request.parse_request({"max_kl": 0.5}), surrogate)
    assert request.largest(lambda s: s <= 0.37) == pytest.approx(0.37, abs=1e-6)


def test_text_and_requests_may_hold_any_unicode_but_names_and_numbers_may_not(tmp_path):
    rows, path = [{"text": "a\u2028b\x85c\x0bd"}, {"text": "e"}], tmp_path / "text.jsonl"
    path.write_text(
        "\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n"
    )  # JSON allows these line ends within a text
    assert read_documents(path) == [row["text"] + "\n\n" for row in rows]
    for row in (
        {"max_size": "9\nMB", "name": "x"},
        {"sparsity": 0.5, "name": "a\nb"},
        {"sparsity": 0.5, "name": "../up"},
        {"sparsity": 0.5, "name": ["x"]},
        {"max_kl": 10**400},
        {"sparsity": "1" * 5000},
        {"max_kl": fuzz.DEEP},
        {"preference": True},
        fuzz.DEEP,
        "\ud800",
    ):
        path.write_text(json.dumps(row))
        refuses(read_requests, path)
        refuses(read_documents, path)


@pytest.mark.parametrize("packed", [False, True])
def test_a_wish_for_a_size_is_met_from_a_packed_source_too(small, text, tmp_path, packed):
    source = tmp_path / "source"
    model, _ = load_llama(small)
    save_llama(model, source, small, Pruner(model, torch.full((1, 8), 5)).masks([0.1] * 3), packed)
    words = ("--model", source, "--data", text, "--seqlen", 64, "--tokens", 128, "--calibration", 4)
    wish = ("--max-size", "1200k", "--uniform", "--packed", "--out", tmp_path / "out", *CPU)
    assert call(prune, *words, *wish) == 0
    size = (tmp_path / "out" / "packed.safetensors").stat().st_size
    assert 0.97 * 1.2e6 <= size <= 1.2e6


@pytest.mark.slow
def test_prune_serves_wishes_of_every_kind_and_names_the_nearest_for_one_that_cannot_be_met(
    tmp_path,
):
    wishes = [
        {"sparsity": 0.3},
        {"preference": 0.4, "name": "taste"},
        {"max_kl": 0.1},
        {"max_size": "7MB"},
        {"name": "never", "max_size": "1MB"},
    ]
    (tmp_path / "request.jsonl").write_text("\n".join(map(json.dumps, wishes)))
    done = subprocess.run(
        [
            sys.executable,
            "prune.py",
            "--no-refit",
            "--requests",
            tmp_path / "request.jsonl",
            "--packed",
            "--out",
            tmp_path / "out",
            "--calibration",
            "8",
            "--tokens",
            "1024",
            "--json",
            tmp_path / "table.json",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    table = {row["request"]: row for row in json.loads((tmp_path / "table.json").read_text())}
    assert (
        done.returncode == 2
        and "never" in done.stderr
        and "sparsity 0.9 has" in done.stderr
        and len(done.stderr.splitlines()) == 1
    )
    made = json.loads((tmp_path / "table.provenance.json").read_text())
    assert made["command"].startswith("python prune.py --no-refit --requests ")
    assert (made["inputs"]["model"], made["inputs"]["calibration"]) == ("tiny", 8)
    assert "unmet" in table["never"] and not (tmp_path / "out" / "never").exists()
    assert 0.9 * 0.1 <= table["kl-0.1"]["kl"] <= 0.1
    assert 0.98 * 7e6 <= table["size-7MB"]["bytes"] <= 7e6
    for name in ("0.3", "taste", "kl-0.1", "size-7MB"):
        record = json.loads((tmp_path / "out" / name / "strategy.json").read_text())
        assert (
            len(record["strategy"]) == 12
            and record["kl"] == table[name]["kl"]
            and load_llama(tmp_path / "out" / name)
        )
    for wrong in (
        {},
        {"sparsity": 0.3, "max_kl": 1},
        {"sparsity": "half"},
        {"sparsity": 0.95},
        {"max_kl": -1},
        {"max_size": "9 parsecs"},
        {"sparsity": 0.3, "name": "../up"},
        {"sparsity": 0.3, "colour": 1},
        [0.3],
        {"max_kl": float("nan")},
    ):
        with pytest.raises(ValueError):
            parse_request(wrong)


@steady
@given(st.floats(1e-4, 5), st.floats(3, 12), st.floats(-2, 2))
def test_the_next_step_of_sparsity_would_break_the_budget_whatever_the_surrogate_says(
    budget, slope, wrong
):
    measured = []

    def kl(x):
        measured.append(float(x.mean()))
        return 1e-3 * math.expm1(slope * measured[-1])

    curve = lambda s: torch.full((4,), s, dtype=torch.float64)
    guess = Guess(lambda x: math.log(1e-3) + (slope + wrong) * float(x.mean()))
    if budget < kl(curve(request.STEP)):
        return
    surrogate = request.Surrogate(curve, None, guess, kl, None)
    s = float(request.strategy_of(parse_request({"max_kl": repr(budget)}), surrogate).mean())
    assert kl(curve(s)) <= budget
    assert s == request.MAX or kl(curve(s + 1.001 * request.STEP)) > budget
    assert len(measured) <= 16


class Doubt(Guess):
    """The same, with a standard deviation."""

    def __init__(self, log_kl, std):
        super().__init__(log_kl)
        self.std = std

    def posterior(self, x):
        return super().posterior(x)[0], torch.full((1,), self.std)


def asked_with(confidence, guess, truth, budget=0.5):
    """The sparsity that answers a wish for a KL, and those that were measured for it."""
    measured = []

    def measure(x):
        measured.append(float(x.mean()))
        return truth(x)

    curve = lambda s: torch.full((4,), s, dtype=torch.float64)
    surrogate = request.Surrogate(curve, None, guess, measure, None, confidence)
    wish = parse_request({"max_kl": budget})
    return float(request.strategy_of(wish, surrogate).mean()), measured


def test_a_wish_with_a_confidence_trusts_the_posterior_between_two_measurements():
    truth = lambda x: 2 * float(x.mean()) ** 2  # 0.5 at 0.5
    right = lambda x: math.log(truth(x))
    s, measured = asked_with(0.95, Guess(right), truth)
    assert measured == [s] and 0.499 < s <= 0.5
    # log KL is believed below its mean + 1.645 std with probability 0.95: 2 x^2 = 0.5 / 1.0857
    s, measured = asked_with(0.95, Doubt(right, 0.05), truth)
    assert measured == [s]  # 0.92 of the budget
    assert s == pytest.approx((0.25 / math.exp(1.6449 * 0.05)) ** 0.5, abs=1e-4)
    # 0.85 of it: what was measured there takes the doubt away, and 0.95 is aimed at
    s, measured = asked_with(0.95, Doubt(right, 0.1), truth)
    assert len(measured) == 2 and s == pytest.approx((0.95 * 0.25) ** 0.5, abs=1e-4)


@pytest.mark.parametrize("factor, most", [(0.3, 2), (0.8, 2), (1.5, 2), (3, 2)])
def test_one_measurement_tells_the_posterior_how_much_other_text_costs(factor, most):
    truth = lambda x: 2 * float(x.mean()) ** 2
    s, measured = asked_with(0.9, Guess(lambda x: math.log(truth(x) / factor)), truth)
    assert 0.48 < s <= 0.5 and len(measured) <= most
    plain, more = asked_with(None, Guess(lambda x: math.log(truth(x) / factor)), truth)
    assert plain > 0.49 and len(more) > len(measured)  # it also measures a step above


def test_a_wish_with_a_confidence_is_kept_by_what_was_measured_though_the_surrogate_is_wrong():
    truth = lambda x: 2 * float(x.mean()) ** 2 if x.mean() < 0.6 else math.nan
    for guess in (lambda x: 0.0, lambda x: 99.0, lambda x: -9.0, lambda x: 9 - float(x.mean())):
        s, measured = asked_with(0.95, Guess(guess), truth)
        assert s in measured and truth(torch.full((1,), s)) <= 0.5 and len(measured) <= 16
    for never in (0.51, math.nan, math.inf):
        with pytest.raises(request.Unreachable, match="sparsity 0.005 has"):
            asked_with(0.95, Guess(lambda x: 0.0), lambda x: never)


def test_the_check_of_coverage_counts_what_is_kept_on_windows_that_were_not_measured():
    """Windows alike: every promise is kept, with all of the budget; far apart, with a margin."""
    g = torch.Generator().manual_seed(0)
    steps = torch.arange(1, 181, dtype=torch.float64)[:, None] * request.STEP
    alike = (8 * steps - 7).exp().expand(-1, coverage.WINDOWS)
    table = types.SimpleNamespace(divergence=object.__new__(Divergence))
    table.guesses = [(float(8 * s - 7), 0.0) for s in steps]
    row = coverage.promise(0.95, 4, 40, table, alike)
    assert row["kept"] == 1 and 0.9 < row["kl_over_budget"] <= 1 and row["measurements"] < 1.6
    apart = alike * (1 + 0.2 * torch.randn(coverage.WINDOWS, generator=g, dtype=torch.float64))
    kept = {p: coverage.promise(p, 4, 200, table, apart) for p in (0.5, 0.95)}
    assert 0.4 < kept[0.5]["kept"] < 0.8 and kept[0.95]["kept"] > 0.9
    assert kept[0.95]["kl_over_budget"] < 0.9 < kept[0.5]["kl_over_budget"]


@pytest.mark.parametrize("limit", [0.896, 0.898, 0.8999, 0.9])
def test_a_wish_for_a_kl_asks_for_no_more_sparsity_than_a_strategy_may_have(limit):
    asked = []
    truth = lambda x: 0.1 if float(x.mean()) <= limit else 1.0

    def curve(s):
        asked.append(s)
        return torch.full((4,), s, dtype=torch.float64)

    for guess in (lambda x: 0.0, lambda x: -9.0, lambda x: 10 * float(x.mean())):
        surrogate = request.Surrogate(curve, None, Guess(guess), truth, None)
        s = float(request.strategy_of(parse_request({"max_kl": 0.5}), surrogate).mean())
        assert limit - request.STEP < s <= limit and max(asked) <= request.MAX


def test_a_kl_that_no_model_reaches_is_refused_with_the_range():
    refuses(parse_request, {"max_kl": "2e9"}, match=r"2e9 is outside 0 to 1e\+09")
    assert parse_request({"max_kl": "1e9"})["value"] == 1e9


def test_a_file_of_requests_may_open_with_a_byte_order_mark_and_end_its_lines_as_windows_does(
    tmp_path,
):
    path = tmp_path / "wishes.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"sparsity": 0.5}\r\n{"max_kl": 0.1}\r\n')
    assert [r["name"] for r in read_requests(path)] == ["0.5", "kl-0.1"]
