import math

import pytest
import torch
from compare import assert_bits_equal, assert_close
from scipy import stats

import kernels
from kernels import SCORED, SHOWN, SURVEYED, Survey, reference
from kernels.sampling import cumulative as summing
from kernels.sampling import draw as drawing
from kernels.sampling import noise as sampling
from kernels.sampling import survey as surveying
from kernels.sampling.noise import philox
from playground.engine.sampler import Needs, Settings, draw_rows
from playground.engine.settings import SamplingParams

SAMPLES, VOCAB = 200_000, 48
FILTERS = {"none": {}, "top-k": {"top_k": 12}, "top-p": {"top_p": 0.8}, "min-p": {"min_p": 0.05}}
FILTERS["all"] = {"top_k": 20, "top_p": 0.9, "min_p": 0.02}


def sample(logits: torch.Tensor, params: list[SamplingParams], positions: list[int]) -> tuple[list, list]:
    settings = Settings.of(params, logits.device)
    ids, logprobs = draw_rows(logits, settings, torch.tensor(positions, device=logits.device), Needs.of(params))
    return ids.tolist(), logprobs.tolist()


def gumbel(log_probs: torch.Tensor, seeds: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    return kernels.draw(log_probs, torch.ones(len(seeds), dtype=torch.float64), seeds, positions)[0]


def logits_row(seed: int = 0) -> torch.Tensor:
    return torch.randn(VOCAB, generator=torch.Generator().manual_seed(seed)) * 2


def expected_distribution(logits, temperature, top_k=0, top_p=1.0, min_p=0.0) -> torch.Tensor:
    """Written once more, token by token in Python, so that the filters are checked as well as the draw."""
    probs = (logits.double() / temperature).softmax(-1).tolist()
    ranked = sorted(range(VOCAB), key=lambda i: (-probs[i], i))
    kept = ranked[:top_k] if top_k else ranked
    total, mass, prefix = sum(probs[i] for i in kept), 0.0, []
    for i in kept:
        if prefix and top_p < 1 and mass / total >= top_p:
            break
        prefix.append(i)
        mass += probs[i]
    kept = [i for i in prefix if probs[i] >= min_p * probs[ranked[0]]]
    out = torch.zeros(VOCAB, dtype=torch.float64)
    out[kept] = torch.tensor([probs[i] for i in kept], dtype=torch.float64)
    return out / out.sum()


def chi_square_p(counts: torch.Tensor, expected: torch.Tensor) -> float:
    """Cells expected fewer than 8 times are pooled, as the test's approximation asks."""
    rare = expected * SAMPLES < 8
    seen = torch.cat([counts[~rare], counts[rare].sum()[None]]).double()
    due = torch.cat([expected[~rare], expected[rare].sum()[None]]) * SAMPLES
    if due[-1] < 8:
        seen, due = seen[:-1], due[:-1] * seen[:-1].sum() / due[:-1].sum()
    if len(seen) == 1:  # one token is left: it must be drawn every time
        return float(seen[0] == SAMPLES)
    return stats.chisquare(seen.numpy(), due.numpy()).pvalue


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.0])
@pytest.mark.parametrize("filters", FILTERS.values(), ids=FILTERS)
@pytest.mark.parametrize("sampler", [kernels.draw_multinomial, gumbel])
def test_draws_fit_the_softmax(sampler, filters, temperature):
    logits = logits_row()
    row = {"top_k": 0, "top_p": 1.0, "min_p": 0.0} | filters
    log_probs = kernels.process_logits(
        logits[None], *(torch.tensor([v]) for v in (temperature, row["top_k"], row["top_p"], row["min_p"]))
    )
    positions = torch.arange(SAMPLES)
    ids = sampler(log_probs.expand(SAMPLES, -1), torch.full_like(positions, 20261123), positions)
    expected = expected_distribution(logits, temperature, **filters)
    counts = torch.bincount(ids, minlength=VOCAB)
    assert counts[expected == 0].sum() == 0, "a token that a filter cut was drawn"
    assert chi_square_p(counts, expected) > 0.001


def test_a_biased_draw_would_be_caught():
    expected = expected_distribution(logits_row(), 1.0)
    skewed = (expected + 0.004 * torch.linspace(-1, 1, VOCAB) * expected).clamp(min=0)
    counts = torch.multinomial(skewed, SAMPLES, replacement=True, generator=torch.Generator().manual_seed(1))
    honest = torch.multinomial(expected, SAMPLES, replacement=True, generator=torch.Generator().manual_seed(1))
    warm = expected_distribution(logits_row(), 1.02)
    assert chi_square_p(torch.bincount(honest, minlength=VOCAB), expected) > 0.001
    assert chi_square_p(torch.bincount(counts, minlength=VOCAB), warm) < 0.001


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [  # the known answers that the authors of Philox publish with it
        ([0] * 4, [0] * 2, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_philox_gives_its_published_answers(counter, key, words):
    out = philox(torch.tensor(counter)[:, None], torch.tensor(key)[:, None])[:, 0]
    assert " ".join(f"{w:08x}" for w in out.tolist()) == words


def test_noise_depends_on_seed_position_and_token_alone():
    seeds, positions = torch.tensor([7, 7, 8]), torch.tensor([3, 4, 3])
    together = kernels.gumbel_noise(seeds, positions, 100)
    for row in range(3):
        alone = kernels.gumbel_noise(seeds[row : row + 1], positions[row : row + 1], 64)
        assert torch.equal(alone[0], together[row, :64])
    assert len({tuple(r.tolist()) for r in together}) == 3


def test_gumbel_noise_reaches_the_tail_where_a_float32_uniform_ends():
    noise = kernels.gumbel_noise(torch.zeros(500, dtype=torch.int64), torch.arange(500), 40_000)
    assert torch.isfinite(noise).all() and noise.max() > 15.9  # 20 million draws; 24 bits end at 16.6 in steps
    due = (noise > 12).double().mean() / (1 - torch.exp(-torch.exp(torch.tensor(-12.0, dtype=torch.float64))))
    assert 0.7 < due < 1.3


@pytest.mark.parametrize("gap", [10, 20])
def test_a_token_far_behind_wins_as_often_as_it_should_in_two_to_the_31_draws(gap, monkeypatch):
    """By importance: the leader's noise is drawn a million times, and of the other's 2^32 possible words all those are
    counted that would win against it."""
    draws, leader = 1_000_000, []
    for seed in range(10):
        positions = torch.arange(draws // 10)
        leader.append(kernels.gumbel_noise(torch.full_like(positions, seed), positions, 1)[:, 0])
    leader = torch.cat(leader)
    words = torch.arange(1 << (22 if gap == 10 else 10))  # those of the largest noise: no other can win
    monkeypatch.setattr(sampling, "_words", lambda *_: words.view(1, 1, -1).expand(4, 1, -1))
    noise = sampling.gumbel_noise(torch.zeros(1).long(), torch.zeros(1).long(), 4 * len(words))[0, ::4]
    assert (noise[:-1] >= noise[1:]).all() and noise[-1] < leader.min() + gap
    winning = len(words) - torch.searchsorted(noise.flip(0), leader + gap, right=True)
    hits = winning.double().mean().item() / 2  # of 2^31
    expected = 2**31 / (1 + math.exp(gap))
    assert abs(hits - expected) < 4 * expected / math.sqrt(draws)


def test_each_row_of_a_step_draws_with_its_own_parameters():
    logits = logits_row().repeat(4, 1)
    params = [SamplingParams("greedy"), *(SamplingParams(s, 1.0, seed=5) for s in ("multinomial", "gumbel", "gumbel"))]
    together, _ = sample(logits, params, [9, 9, 9, 10])
    alone = [sample(logits[:1], [p], [at])[0][0] for p, at in zip(params, (9, 9, 9, 10), strict=True)]
    assert together == alone and together[0] == logits[0].argmax()


def test_temperature_zero_is_greedy_and_equals_go_to_the_lowest_id():
    logits = torch.zeros(1, VOCAB)
    for sampler in ("greedy", "multinomial", "gumbel"):
        assert sample(logits, [SamplingParams(sampler, 0.0)], [3])[0] == [0]


def test_the_reported_logprob_is_of_the_raw_distribution():
    logits = logits_row()[None]
    ids, logprobs = sample(logits, [SamplingParams("gumbel", 0.5, top_k=3, seed=1)], [0])
    assert abs(logprobs[0] - logits.log_softmax(-1)[0, ids[0]].item()) < 1e-5


@pytest.mark.parametrize("vocab", [48, 3001])
def test_the_draw_kernel_draws_what_its_twin_draws(vocab):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(vocab)
    logits = torch.randn(12, vocab) * 2
    logits[3, 5:] = float("-inf")
    logits[4] = 0.0  # equals
    temperature = torch.tensor([0.0, 1.0, 0.5, 2.0] * 3, dtype=torch.float64)
    seeds, positions = torch.randint(0, 2**53, (12,)), torch.randint(0, 2**20, (12,))
    temperature[4] = 0.0
    for values in (logits, logits.double().log_softmax(-1)):
        ids, logprobs, logsumexp = reference.draw_and_normaliser(values, temperature, seeds, positions)
        got = drawing.draw_and_normaliser(*(t.to(device) for t in (values, temperature, seeds, positions)))
        assert got[0].tolist() == ids.tolist() and ids[4] == 0
        assert_close(got[1], logprobs, "float32")
        assert (got[2].cpu() - logsumexp).abs().max() < 1e-5
        chosen = values.to(device).gather(-1, got[0][:, None])[:, 0].float()
        assert_bits_equal(chosen - got[2], got[1])


def test_a_draw_from_changed_logits_has_the_raw_logprob_of_its_token():
    device = "cuda" if torch.cuda.is_available() else "cpu"
    logits = torch.randn(4, 3001, generator=torch.Generator().manual_seed(2))
    changed = logits.clone()
    changed[:3, ::2] -= 5.0
    temperature = torch.tensor([0.0, 1.0, 0.5, 1.0], dtype=torch.float64)
    seeds = positions = torch.arange(4)
    given = [t.to(device) for t in (logits, temperature, seeds, positions)]
    ids, logprobs, logsumexp = drawing.draw_and_normaliser(*given, changed.to(device))
    raw_ids, raw_logprobs, raw_logsumexp = drawing.draw_and_normaliser(*given)
    assert ids.tolist() == drawing.draw_and_normaliser(changed.to(device), *given[1:])[0].tolist()
    assert ids.tolist() == reference.draw_and_normaliser(logits, temperature, seeds, positions, changed)[0].tolist()
    assert ids[0] != raw_ids[0]
    assert_bits_equal(logsumexp, raw_logsumexp)
    assert_bits_equal(logprobs[3:], raw_logprobs[3:])  # a row whose logits stay
    assert_bits_equal(given[0].gather(-1, ids[:, None])[:, 0] - logsumexp, logprobs)


@pytest.mark.parametrize("vocab", [1, 48, 3001])
def test_the_cumulative_kernel_has_the_bits_of_its_twin_and_rises_only_where_there_is_probability(vocab):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    probs = torch.randn(4, vocab, generator=torch.Generator().manual_seed(vocab)).double().mul(4).softmax(-1)
    probs[1, ::2] = 0.0
    probs[2] = 0.0
    probs[2, -1] = 1.0
    sums = reference.cumulative(probs)
    assert_bits_equal(summing.cumulative(probs.to(device)), sums)
    assert_close(sums, probs.cumsum(-1), "float32")
    rises = torch.diff(sums, dim=-1, prepend=torch.zeros(4, 1, dtype=torch.float64))
    assert (rises >= 0).all() and (rises[probs == 0] == 0).all() and (rises[probs > 2.0**-53] > 0).all()


def test_running_sums_are_a_rows_own():
    device = "cuda" if torch.cuda.is_available() else "cpu"
    probs = torch.randn(5, 50_257, device=device).double().softmax(-1)
    together = kernels.cumulative(probs)
    for row in range(5):
        assert_bits_equal(kernels.cumulative(probs[row : row + 1])[0], together[row])


def test_a_token_on_the_very_edge_of_top_p_is_kept_or_cut_alone_as_in_company():
    """Torch adds a row up in another order where there are more rows: the last bit of a sum decided before."""
    device, rows, vocab = "cuda" if torch.cuda.is_available() else "cpu", 6, 50_257
    logits = torch.randn(rows, vocab, generator=torch.Generator().manual_seed(1)).to(device)
    ordered = logits.double().softmax(-1).sort(descending=True).values
    alone_sums = torch.cat([row.sum(-1, keepdim=True) for row in ordered.split(1)])
    edges = (ordered.cumsum(-1) - ordered) / alone_sums
    one, none = torch.ones(rows, device=device), torch.zeros(rows, device=device)
    for rank in (100, 1000, 10_000):
        settings = (one.double(), none.long(), edges[:, rank].contiguous(), none.double())
        together = kernels.process_logits(logits, *settings)
        for row in range(rows):
            alone = kernels.process_logits(logits[row : row + 1], *(s[row : row + 1] for s in settings))
            assert_bits_equal(alone[0], together[row])


def test_a_rows_logprobs_are_made_of_a_normaliser_of_its_own():
    """Whatever drew the token: logit minus logsumexp, by the kernel that draws."""
    device, rows = "cuda" if torch.cuda.is_available() else "cpu", 13
    logits = torch.randn(rows, 50_257, generator=torch.Generator().manual_seed(1)).to(device)
    greedy, seeds = torch.zeros(rows, dtype=torch.float64, device=device), torch.arange(rows, device=device)
    ids, logprobs, logsumexp = kernels.draw_and_normaliser(logits, greedy, seeds, seeds)
    assert_bits_equal(kernels.draw(logits, greedy, seeds, seeds)[1], logprobs)
    assert_bits_equal(logits.gather(-1, ids[:, None])[:, 0] - logsumexp, logprobs)
    assert_close(logsumexp, logits.double().logsumexp(-1), "float32")
    for row in range(rows):
        one = slice(row, row + 1)
        alone = kernels.draw_and_normaliser(logits[one], greedy[one], seeds[one], seeds[one])
        assert_bits_equal(alone[2], logsumexp[one])


@pytest.mark.parametrize("vocab", [5, 48, 1500])
def test_the_survey_kernel_finds_what_its_twin_finds(vocab):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(vocab)
    logits = torch.randn(6, vocab) * 2
    logits[3, 3:] = float("-inf")
    logits[4] = 1.0  # equals
    temperature = torch.tensor([0.0, 1.0, 0.5, 2.0, 0.7, 0.0], dtype=torch.float64)
    seeds, positions, ids = torch.randint(0, 2**53, (6,)), torch.arange(6), torch.zeros(6, dtype=torch.int64)
    for values in (logits, logits.double().log_softmax(-1)):
        given = (values, temperature, seeds, positions, ids)
        got = surveying.survey(*(t.to(device) for t in given)).tolist()
        for number, (ours, theirs) in enumerate(zip(got, reference.survey(*given).tolist(), strict=True)):
            a, b = Survey.of(ours), Survey.of(theirs)
            for name in ("top_logits", "heated"):  # with -inf where there is no token
                assert getattr(a, name) == pytest.approx(getattr(b, name), abs=1e-6), name
            single = [one for one in zip(a, b, strict=True) if isinstance(one[0], float)]
            assert [x for x, _ in single] == pytest.approx([x for _, x in single], abs=1e-6)
            shown, scored = min(vocab, SHOWN), min(vocab, SCORED)
            if number == 3:
                shown = scored = 3
            # torch names equals in any order
            assert a.top[:shown] == (list(range(shown)) if number == 4 else b.top[:shown])
            assert a.scored[:scored] == b.scored[:scored]
            assert a.noise[:scored] == pytest.approx(b.noise[:scored], abs=1e-6)


def test_a_survey_without_candidates_says_all_else():
    device = "cuda" if torch.cuda.is_available() else "cpu"
    logits, one = torch.randn(2, 1500, generator=torch.Generator().manual_seed(3)), torch.ones(2, dtype=torch.float64)
    given = [t.to(device) for t in (logits, one, torch.arange(2), torch.arange(2), torch.arange(2))]
    whole, part = surveying.survey(*given), surveying.survey(*given, scored=False)
    told = SURVEYED - 3 * SCORED
    assert_bits_equal(part[:, :told], whole[:, :told])
    twin = reference.survey(*(t.cpu() for t in given), scored=False)
    assert part[:, told:].tolist() == twin[:, told:].tolist() == [[0.0] * SCORED + [float("-inf")] * 2 * SCORED] * 2


@pytest.mark.parametrize("scored", [True, False])
def test_a_survey_of_two_is_those_of_each(scored):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(4)
    logits, changed, one = torch.randn(2, 1500), torch.randn(2, 1500), torch.ones(2, dtype=torch.float64)
    logits, changed, *given = (t.to(device) for t in (logits, changed, one, *[torch.arange(2)] * 3))
    both = surveying.survey(logits, *given, changed, scored)
    assert_bits_equal(both[:, :SURVEYED], surveying.survey(logits, *given, scored=False))
    assert_bits_equal(both[:, SURVEYED:], surveying.survey(changed, *given, scored=scored))


def test_a_logit_that_is_no_number_takes_no_candidates_place():
    device = "cuda" if torch.cuda.is_available() else "cpu"
    logits = torch.randn(1, 1500) * 2
    one, seeds, at = torch.ones(1, dtype=torch.float64), torch.tensor([5]), torch.tensor([3])
    logits[0, 7] = float("-inf")
    without = Survey.of(reference.survey(logits, one, seeds, at, seeds)[0].tolist())
    logits[0, 7] = float("nan")
    found = Survey.of(surveying.survey(*(t.to(device) for t in (logits, one, seeds, at, seeds)))[0].tolist())
    assert found.scored == without.scored and found.noise == pytest.approx(without.noise, abs=1e-6)
