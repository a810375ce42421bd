"""Losses: each against numbers derived by hand, an oracle in double precision, and what must not change.

The registry is read, so that a new loss fails here until it has its numbers.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import re
import subprocess
import sys
import textwrap
import threading
from typing import NamedTuple

import pytest
import torch
from oracles_losses import P
from oracles_losses import loss as oracle

from dpo_trainer.config import DPOConfig
from dpo_trainer.losses import LOSSES, Objective, Ranks, load_loss_module, register_loss
from dpo_trainer.losses.registry import SUPPLIED
from dpo_trainer.losses.shaping import divergence_by_name, length_desensitized, wpo_weight
from dpo_trainer.types import PairLogps, TokenLogps

NAMES = [name for name in LOSSES if LOSSES[name].builtin]
DIVERGENCES = ["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"]
OF_THE_MARGIN = [name for name in NAMES if "divergence" in LOSSES[name].arguments]


def logps_of(chosen, rejected, lengths=((5, 10),), dtype=torch.float32) -> PairLogps:
    """Log-probs of N pairs; `lengths` has one (chosen, rejected) for all or one for each."""
    lengths = torch.tensor(list(lengths) * (len(chosen) if len(lengths) == 1 else 1))
    chosen, rejected = (torch.as_tensor(x).to(dtype, copy=True).requires_grad_() for x in (chosen, rejected))
    return PairLogps(chosen=chosen, rejected=rejected, chosen_lengths=lengths[:, 0], rejected_lengths=lengths[:, 1])


def config(**options) -> DPOConfig:
    return DPOConfig(output_dir="unused", bf16=False, use_cpu=True, report_to=[], **options)


def needed(name: str) -> dict:
    """Options without which a loss refuses to be chosen."""
    return {"label_smoothing": 0.1} if name == "exo_pair" else {}


def arguments(name: str, **values) -> dict:
    """Of `values`, what this loss takes, and defaults for what it must have."""
    needed = {"delta": 0.0, "margin": torch.tensor(2.0), "label_smoothing": 0.1 if name == "exo_pair" else 0.0}
    values = {"beta": 0.1, **needed, **values}
    return {key: value for key, value in values.items() if key in LOSSES[name].arguments}


@pytest.fixture
def registry(monkeypatch):
    """A copy of the registry, so that what a test registers is gone afterwards."""
    monkeypatch.setattr(LOSSES, "_items", dict(LOSSES._items))
    monkeypatch.setattr(LOSSES, "aliases", dict(LOSSES.aliases))
    return LOSSES


# --- numbers by hand -------------------------------------------------------------------------------------------------


class Hand(NamedTuple):
    policy: tuple
    reference: tuple
    hyper: dict
    want: list[float]
    lengths: tuple = ((5, 10),)


# The standard pair: r_w = 5 and r_l = -10 nats over 5 and 10 tokens, so D = 15 and per token 1 and -1.
ONE = (([-5.0], [-20.0]), ([-10.0], [-10.0]))
LN2 = math.log(2)

BY_HAND = {
    "sigmoid": [
        Hand(*ONE, {"beta": 0.1}, [0.201413]),  # log(1 + e^-1.5)
        Hand(*ONE, {"beta": 0.1, "label_smoothing": 0.1}, [0.351413]),  # 0.9 * 0.201413 + 0.1 * 1.701413
        Hand(
            ([-5.0, -10, -1], [-5.0, -20, -21]), ([0.0] * 3, [0.0] * 3), {"beta": 0.1}, [0.693147, 0.313262, 0.126928]
        ),
    ],
    "hinge": [Hand(*ONE, {"beta": 0.04}, [0.4]), Hand(*ONE, {"beta": 0.1}, [0.0])],  # 1 - 0.6; 1 - 1.5 < 0
    "ipo": [
        Hand(*ONE, {"beta": 0.1}, [9.0]),  # (1 + 1 - 5)^2
        Hand(*ONE, {"beta": 0.1, "ipo_normalization": "sequence"}, [100.0]),  # (15 - 5)^2
        Hand(*ONE, {"beta": 0.25}, [0.0]),  # h = 2 is the target
    ],
    "sigmoid_norm": [Hand(*ONE, {"beta": 1.0}, [0.126928])],  # log(1 + e^-2)
    # p = 0.817574: p (log p - log 0.9) + (1 - p)(log(1 - p) - log 0.1) = -0.078530 + 0.109669
    "exo_pair": [Hand(*ONE, {"beta": 0.1, "label_smoothing": 0.1}, [0.031139])],
    "robust": [
        Hand(*ONE, {"beta": 0.1, "label_smoothing": 0.1}, [0.013913]),  # (0.9 * 0.201413 - 0.1 * 1.701413) / 0.8
        Hand(*ONE, {"beta": 0.1, "label_smoothing": 0.0}, [0.201413]),
    ],
    "discopop": [  # m = s(3) = 0.952574: 0.047426 * 0.201413 + 0.952574 * e^-1.5
        Hand(*ONE, {"beta": 0.1, "discopop_tau": 0.5}, [0.222100]),
        Hand(([0.0], [0.0]), ([0.0], [0.0]), {"beta": 0.1}, [0.846574]),  # half of log 2, half of 1
    ],
    "odpo": [  # 1.5 less the offset: log e, half of it, log 1, log e^-1/2, and the margin itself
        Hand(*ONE, {"beta": 0.1, "margin": torch.tensor([math.e])}, [0.474077]),
        Hand(*ONE, {"beta": 0.1, "margin": torch.tensor([math.e]), "odpo_alpha": 0.5}, [0.313262]),
        Hand(*ONE, {"beta": 0.1, "margin": torch.tensor([1.0])}, [0.201413]),
        Hand(*ONE, {"beta": 0.1, "margin": torch.tensor([math.exp(-0.5)])}, [0.126928]),
        Hand(*ONE, {"beta": 0.1, "margin": torch.tensor([1.5]), "odpo_offset": "linear"}, [LN2]),
        Hand(
            *ONE,
            {"beta": 0.1, "margin": torch.tensor([-0.25]), "odpo_offset": "linear", "odpo_alpha": 2.0},
            [0.126928],
        ),
    ],
    "dpop": [
        Hand(*ONE, {"beta": 0.1}, [0.201413]),  # chosen rose: plain DPO
        # r_w = -1, lambda 5: log(1 + e^-0.1(-1 + 10 - 5))
        Hand(([-11.0], [-20.0]), ([-10.0], [-10.0]), {"beta": 0.1, "dpop_lambda": 5.0}, [0.513015]),
    ],
    "chi_po": [  # z = 2 and 1/2: log(1 + e^-(2 - 0.5 + 2 ln 2)); clipped at 2 R = 1: log(1 + e^-1)
        Hand(([LN2], [-LN2]), ([0.0], [0.0]), {"beta": 1.0}, [0.054282]),
        Hand(([LN2], [-LN2]), ([0.0], [0.0]), {"beta": 1.0, "chi_po_reward_bound": 0.5}, [0.313262]),
    ],
    # log(1 + e^-0.5) + log(1 + e^0.5) / 2 + log(1 + e^-1) / 2
    "nca_pair": [Hand(*ONE, {"beta": 0.1}, [1.117746])],
    "sppo_hard": [Hand(*ONE, {"beta": 0.1}, [25.0])],  # (5 - 5)^2 + (-10 + 5)^2
    "apo_zero": [Hand(*ONE, {"beta": 0.1}, [0.646482])],  # 1 - 0.622459 + 0.268941
    "apo_down": [Hand(*ONE, {"beta": 0.1}, [0.804885])],  # 0.622459 + 1 - 0.817574
    "cal_dpo": [Hand(([1.0], [-1.0]), ([0.0], [0.0]), {"beta": 0.5}, [0.126928])],  # on target: log(1 + e^-2)
    "bco_pair": [
        Hand(*ONE, {"beta": 0.1, "delta": 0.25}, [0.827869]),  # log(1 + e^-0.25) + log(1 + e^-1.25)
    ],
    # u = 4, 1 and v = 0, 2: sorted 1 - 0 and 4 - 2, at beta 1/2: log(1 + e^-1) for the first pair, log(1 + e^-0.5)
    "aot": [Hand(([-1.0, -2], [-5.0, -3]), ([-3.0, -3], [-3.0, -5]), {"beta": 0.5}, [0.313262, 0.474077])],
    # r_w = 1, 3 and r_l = 1, -1: sorted 1 - (-1) and 3 - 1: both 2, so every half term is log(1 + e^-2) / 2
    # and, with r_l = 2, 0: sorted 1 - 0 and 3 - 2: log(1 + e^-1). With r_l = 1, 0: gaps 1 and 2; pair one has the
    # chosen of gap 1 and the rejected of gap 2, pair two the other way about: each (0.313262 + 0.126928) / 2.
    "aot_unpaired": [
        Hand(([1.0, 3], [1.0, -1]), ([0.0, 0], [0.0, 0]), {"beta": 1.0}, [0.126928, 0.126928]),
        Hand(([1.0, 3], [1.0, 0]), ([0.0, 0], [0.0, 0]), {"beta": 1.0}, [0.220095, 0.220095]),
    ],
    "sft": [
        Hand(*ONE, {}, [1.0]),  # 5 nats over 5 tokens
        Hand(  # 5 + 3 nats over 5 + 1 tokens: each divided by the mean length 3, whose mean is 8 / 6
            ([-5.0, -3], [-1.0, -1]),
            ([0.0, 0], [0.0, 0]),
            {"rpo_normalization": "token"},
            [5 / 3, 1.0],
            ((5, 1), (1, 1)),
        ),
    ],
    "simpo": [Hand(*ONE, {"beta": 2.0, "simpo_gamma": 0.5}, [0.201413])],  # per token -1 and -2: 2 * 1 - 0.5 = 1.5
    # P = 1/2 and 1/4 per token: odds 1 and 1/3, s(log 3) = 3/4: log 2 + 0.1 log(4/3)
    "orpo": [Hand(([-5 * LN2], [-20 * LN2]), ([0.0], [0.0]), {"beta": 0.1}, [0.721915])],
    "cpo": [Hand(*ONE, {"beta": 0.1, "cpo_alpha": 2.0}, [2.201413])],  # log(1 + e^-1.5) + 2 * 1
}


def test_every_loss_has_numbers_by_hand():
    assert sorted(BY_HAND) == NAMES


@pytest.mark.parametrize(
    ("name", "case"),
    [pytest.param(name, case, id=f"{name}-{i}") for name in BY_HAND for i, case in enumerate(BY_HAND[name])],
)
def test_by_hand(name, case):
    """Numbers have six digits; float32 arithmetic on values up to 100 is exact to about 1e-5."""
    policy, reference = logps_of(*case.policy, case.lengths), logps_of(*case.reference, case.lengths)
    got = LOSSES[name](policy, reference, **case.hyper)
    torch.testing.assert_close(got, torch.tensor(case.want), rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize("name", NAMES)
def test_docstring_fills_the_table(name):
    loss = LOSSES[name]
    assert loss.summary.endswith(".")
    assert loss.equation.startswith("L")
    assert " = " in loss.equation
    assert re.fullmatch(r"2\d{3}\.\d{5}", loss.paper)
    assert "\n" not in loss.summary + loss.source


# --- oracle, gradients, range ----------------------------------------------------------------------------------------

HYPER = {
    "beta": 0.3,
    "label_smoothing": 0.2,
    "discopop_tau": 0.4,
    "simpo_gamma": 0.7,
    "cpo_alpha": 0.6,
    "dpop_lambda": 1.5,
    "delta": 0.2,
    "odpo_alpha": 0.8,
}
MARGINS = torch.tensor([0.5, 1.0, 2.5, 0.25, 3.0, 1.5, 4.0], dtype=torch.float64)


def random_pairs(n=7, seed=0):
    """Policy, reference in float64 with log-ratios of a few nats, and the same pairs for the oracle."""
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 9, (n, 2), generator=g)
    fw, fl = (-2.0 * lengths[:, i] - torch.rand(n, generator=g, dtype=torch.float64) for i in (0, 1))
    pw, pl = ((f + 2 * torch.randn(n, generator=g, dtype=torch.float64)).clamp(max=-0.1) for f in (fw, fl))
    lists = [t.tolist() for t in (pw, pl, fw, fl, lengths[:, 0], lengths[:, 1])]
    pairs = [P(*values) for values in zip(*lists, MARGINS[:n].tolist(), strict=True)]
    lengths = tuple(map(tuple, lengths.tolist()))
    return logps_of(pw, pl, lengths, torch.float64), logps_of(fw, fl, lengths, torch.float64), pairs


@pytest.mark.parametrize("token", [True, False])
@pytest.mark.parametrize(
    ("name", "kind"), [(n, k) for n in NAMES for k in (DIVERGENCES if n in OF_THE_MARGIN else DIVERGENCES[:1])]
)
def test_oracle(name, kind, token):
    """float64 against `math`: both are exact to about 1e-13 here; float32 within 1e-4 relative of values of order 1."""
    policy, reference, pairs = random_pairs()
    choice = {"ipo_normalization": "token" if token else "sequence", "odpo_offset": "log" if token else "linear"}
    hyper = arguments(name, **HYPER, **choice, margin=MARGINS)
    if name in OF_THE_MARGIN:
        hyper["divergence"] = divergence_by_name(kind, 0.3)
    want = torch.tensor(
        oracle(name, pairs, {**HYPER, **choice, "f_divergence_type": kind, "alpha": 0.3}), dtype=torch.float64
    )
    assert want.std() > 1e-3

    got = LOSSES[name](policy, reference, **hyper)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)
    hyper = {key: value.float() if key == "margin" else value for key, value in hyper.items()}
    single = LOSSES[name](as_float32(policy), as_float32(reference), **hyper)
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), want, rtol=1e-4, atol=1e-5)


def as_float32(logps: PairLogps) -> PairLogps:
    return dataclasses.replace(logps, chosen=logps.chosen.float(), rejected=logps.rejected.float())


@pytest.mark.parametrize("name", NAMES)
def test_gradient_is_that_of_the_summed_loss(name):
    """The sum, because `aot_unpaired` returns to each pair the gradient of terms that it shares with others."""
    policy, reference, _ = random_pairs(seed=1)

    def total(chosen, rejected):
        return LOSSES[name](
            dataclasses.replace(policy, chosen=chosen, rejected=rejected), reference, **arguments(name, **HYPER)
        ).sum()

    assert torch.autograd.gradcheck(total, (policy.chosen, policy.rejected))


# Sign of dL/d chosen, dL/d rejected where the policy is a little better than the reference and all targets lie ahead.
SIGNS = {"sft": (-1, 0), "apo_down": (1, 1)}  # sft has no rejected; apo_down also pushes chosen down


@pytest.mark.parametrize("name", NAMES)
def test_gradient_sign(name):
    policy = logps_of([-9.0, -8.5], [-11.0, -12.0], ((10, 10),))
    reference = logps_of([-10.0, -10.0], [-10.0, -10.0], ((10, 10),))
    LOSSES[name](policy, reference, **arguments(name)).sum().backward()
    chosen, rejected = SIGNS.get(name, (-1, 1))
    assert policy.chosen.grad.sign().tolist() == [chosen] * 2
    if rejected:
        assert policy.rejected.grad.sign().tolist() == [rejected] * 2
    else:
        assert policy.rejected.grad is None


@pytest.mark.parametrize(
    ("name", "beyond"),
    [
        ("ipo", 30.0),  # 3 nats per token, target 1/(2 * 0.5) = 1
        ("sppo_hard", 1.5),
        ("cal_dpo", 1.5),
        ("nca_pair", 2.0),  # target log 2 / 0.5
        ("exo_pair", 5.0),  # target log 9 / 0.5 = 4.4
        ("sigmoid", 5.0),
    ],
)
def test_gradient_turns_past_the_target(name, beyond):
    """Losses with a finite target pull chosen back once it is beyond."""
    gradients = []
    for ratio in (0.1, beyond):
        policy = logps_of([-40 + ratio], [-40.0], ((10, 10),))
        hyper = arguments(name, beta=0.5, label_smoothing=0.1)
        LOSSES[name](policy, logps_of([-40.0], [-40.0], ((10, 10),)), **hyper).sum().backward()
        gradients.append(policy.chosen.grad.item())
    assert gradients[0] < 0 < gradients[1]


@pytest.mark.parametrize("name", NAMES)
def test_extreme_log_ratios_stay_finite(name):
    """Every combination of log-probs 0 and -1e4 in policy and reference, in float32, with every divergence."""
    grid = torch.tensor(list(itertools.product([0.0, -1e4], repeat=4)))
    lengths = ((1, 1000),)
    for kind in DIVERGENCES if name in OF_THE_MARGIN else DIVERGENCES[:1]:
        for beta in (0.01, 1.0):
            policy, reference = logps_of(grid[:, 0], grid[:, 1], lengths), logps_of(grid[:, 2], grid[:, 3], lengths)
            hyper = arguments(name, beta=beta)
            if name in OF_THE_MARGIN:
                hyper["divergence"] = divergence_by_name(kind, 0.5)
            losses = LOSSES[name](policy, reference, **hyper)
            losses.sum().backward()
            assert losses.isfinite().all()
            assert policy.chosen.grad.isfinite().all()
            assert policy.rejected.grad is None or policy.rejected.grad.isfinite().all()


def test_forward_kl_keeps_pulling_beyond_its_limit():
    """e^-r is continued by its tangent at r = -20: the gradient of a pair that is far off is large, not 0."""
    r = torch.tensor([-25.0, -19.0, -21.0], requires_grad=True)
    score = divergence_by_name("forward_kl", 0.5)(r)
    score.sum().backward()
    torch.testing.assert_close(score[0].item(), 1 - math.exp(20) * 6, rtol=1e-6, atol=0)
    torch.testing.assert_close(r.grad, torch.tensor([math.exp(20), math.exp(19), math.exp(20)]), rtol=1e-6, atol=0)


# --- invariances -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_only_log_ratios_matter_or_no_reference_at_all(name):
    """One shift of policy and reference changes nothing; a loss that needs no reference never reads it."""
    policy, reference, _ = random_pairs(seed=2)
    hyper = arguments(name, **HYPER)
    want = LOSSES[name](policy, reference, **hyper)
    moved = dataclasses.replace(reference, chosen=reference.chosen - 3, rejected=reference.rejected - 2)
    got = LOSSES[name](policy, moved, **hyper)
    assert torch.equal(want, got) is not LOSSES[name].needs_reference
    if LOSSES[name].needs_reference:
        both = dataclasses.replace(policy, chosen=policy.chosen - 3, rejected=policy.rejected - 2)
        torch.testing.assert_close(LOSSES[name](both, moved, **hyper), want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", NAMES)
def test_only_the_margin_matters(name):
    """A shift of chosen and rejected together: invisible to losses of the margin, and seen by the others."""
    policy, reference, _ = random_pairs(seed=3)
    hyper = arguments(name, **HYPER, ipo_normalization="sequence")
    shifted = dataclasses.replace(policy, chosen=policy.chosen - 0.5, rejected=policy.rejected - 0.5)
    want, got = LOSSES[name](policy, reference, **hyper), LOSSES[name](shifted, reference, **hyper)
    # aot_unpaired is not a loss of margins, but its sorted gaps move by the same shift.
    of_margin = name in (*OF_THE_MARGIN, "ipo", "aot", "aot_unpaired")
    assert torch.allclose(want, got, rtol=1e-10, atol=1e-10) is of_margin


def part(logps: PairLogps, rows: slice) -> PairLogps:
    fields = ("chosen", "rejected", "chosen_lengths", "rejected_lengths")
    return dataclasses.replace(logps, **{f: getattr(logps, f)[rows] for f in fields})


@pytest.mark.parametrize("options", [{}, {"rpo_alpha": 0.5}, {"rpo_alpha": 0.5, "rpo_normalization": "token"}])
@pytest.mark.parametrize("name", NAMES)
def test_separable_losses_do_not_see_their_neighbours(name, options):
    """The losses of a batch equal those of its parts exactly where `Objective.separable` says so."""
    policy, reference, _ = random_pairs(6, seed=4)
    args = config(loss_type=name, **needed(name), **options)
    whole = Objective.from_config(args)
    split = Objective.from_config(args)
    want = whole(policy, reference, training=True, margin=MARGINS[:6]).total
    parts = [
        split(part(policy, rows), part(reference, rows), training=True, margin=MARGINS[rows]).total
        for rows in (slice(0, 2), slice(2, 6))
    ]
    assert torch.allclose(torch.cat(parts), want, rtol=1e-10, atol=1e-10) is whole.separable


@pytest.mark.parametrize("name", NAMES)
def test_pairs_of_weight_zero_do_not_touch_the_others(name):
    policy, reference, _ = random_pairs(6, seed=5)
    args = config(loss_type=name, rpo_alpha=0.5, rpo_normalization="token", **needed(name))
    first = part(policy, slice(4)), part(reference, slice(4))
    want = Objective.from_config(args)(*first, training=True, margin=MARGINS[:4])
    weight = torch.tensor([1.0, 1, 1, 1, 0, 0], dtype=torch.float64)
    got = Objective.from_config(args)(policy, reference, training=True, weight=weight, margin=MARGINS[:6])
    torch.testing.assert_close(got.total[:4], want.total, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(got.nll[:4], want.nll, rtol=1e-10, atol=1e-10)

    (got.total * weight).sum().backward()
    assert policy.chosen.grad[:4].abs().min() > 0
    assert policy.chosen.grad[4:].abs().max() == 0


@pytest.mark.parametrize("name", NAMES)
def test_a_batch_of_fillers_alone_is_finite(name):
    policy, reference, _ = random_pairs(2, seed=5)
    args = config(loss_type=name, rpo_alpha=0.5, rpo_normalization="token", **needed(name))
    objective = Objective.from_config(args)
    weight = torch.zeros(2, dtype=torch.float64)
    losses = objective(policy, reference, training=True, weight=weight, margin=MARGINS[:2])
    assert losses.total.isfinite().all()
    assert objective.shift.count == 0


def test_token_mean_nll():
    """Pairs of 2 and 6 tokens with weights 1 and 3: the weighted mean of the result is sum of nats / sum of tokens."""
    policy = logps_of([-4.0, -6.0], [-1.0, -1.0], ((2, 1), (6, 1)))
    weight = torch.tensor([1.0, 3.0])
    objective = Objective.from_config(config(loss_type="sft", rpo_normalization="token"))
    nll = objective(policy, None, training=True, weight=weight).nll
    got = (nll * weight).sum() / weight.sum()
    torch.testing.assert_close(got, torch.tensor((4 + 3 * 6) / (2 + 3 * 6)), rtol=1e-6, atol=0)


# --- several ranks ---------------------------------------------------------------------------------------------------


class SimulatedRanks(Ranks):
    """One of `world` ranks that are threads; like a real collective, it wants the same shape from each."""

    _distributed = True

    def __init__(self, index: int, mail: list, barrier: threading.Barrier):
        self.rank, self.mail, self.barrier = index, mail, barrier

    @property
    def index(self) -> int:
        return self.rank

    def exchange(self, tensor):
        self.mail[self.rank] = tensor.detach().clone()
        self.barrier.wait(timeout=20)
        received = list(self.mail)
        self.barrier.wait(timeout=20)
        assert len({t.shape for t in received}) == 1
        return received


def on_ranks(work, world: int) -> list:
    """`work(ranks)` on every simulated rank; the results in rank order."""
    mail, barrier, results = [None] * world, threading.Barrier(world), [None] * world

    def run(index: int) -> None:
        try:
            results[index] = work(SimulatedRanks(index, mail, barrier))
        except BaseException:
            barrier.abort()
            raise

    threads = [threading.Thread(target=run, args=(i,)) for i in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


@pytest.mark.parametrize("known", [False, True], ids=["", "counts known"])
@pytest.mark.parametrize("sizes", [(4, 2), (1, 4, 2)], ids=["two", "three"])
@pytest.mark.parametrize("name", ["aot", "aot_unpaired", "bco_pair"])
def test_ranks_together_compute_the_loss_of_the_whole_batch(name, sizes, known):
    """Uneven ranks, one of them with a filler: losses of `aot` per pair, sums and gradients of all, as on one rank."""
    policy, reference, _ = random_pairs(sum(sizes), seed=6)
    weight = torch.ones(sum(sizes), dtype=torch.float64)
    weight[sizes[0]] = 0
    starts = list(itertools.accumulate((0, *sizes)))
    rows = [slice(a, b) for a, b in itertools.pairwise(starts)]
    args = config(loss_type=name)

    alone = Objective.from_config(args)
    want = alone(policy, reference, training=True, weight=weight).total
    want_grads = torch.autograd.grad((want * weight).sum(), (policy.chosen, policy.rejected))

    def work(ranks):
        mine = rows[ranks.index]
        policy_ = logps_of(policy.chosen.detach()[mine], policy.rejected.detach()[mine], dtype=torch.float64)
        objective = Objective.from_config(args)
        objective.ranks = ranks
        pairs = sizes if known else None
        total = objective(
            policy_, part(reference, mine), training=True, weight=weight[mine], pairs_by_rank=pairs
        ).total
        (total * weight[mine]).sum().backward()
        return total.detach(), policy_.chosen.grad, policy_.rejected.grad, objective.state_dict()

    results = on_ranks(work, len(sizes))
    # The reward shift is kept in float32.
    tight = {"rtol": 1e-6, "atol": 1e-6} if name == "bco_pair" else {"rtol": 1e-10, "atol": 1e-10}
    torch.testing.assert_close(torch.cat([r[0] for r in results]), want.detach(), **tight)
    for i, want_grad in enumerate(want_grads):
        torch.testing.assert_close(torch.cat([r[i + 1] for r in results]), want_grad, **tight)
    assert all(r[3] == results[0][3] for r in results)

    by_themselves = [
        Objective.from_config(args)(part(policy, r), part(reference, r), training=True, weight=weight[r]).total
        for r in rows
    ]
    assert not torch.allclose(torch.cat(by_themselves), want, rtol=1e-4)  # else nothing crossed between ranks


def test_pairs_are_gathered_without_a_wait_where_their_numbers_are_known(monkeypatch):
    """A second exchange, and its result on the host, only where they are not."""
    exchanged: list[tuple[int, ...]] = []
    inner = SimulatedRanks.exchange
    monkeypatch.setattr(SimulatedRanks, "exchange", lambda self, x: exchanged.append(tuple(x.shape)) or inner(self, x))
    for counts, shapes in ((None, [(1,), (1,), (2, 3), (2, 3)]), ((1, 2), [(2, 3), (2, 3)])):
        exchanged.clear()
        got = on_ranks(
            lambda ranks, counts=counts: ranks.knowing(counts).gather_pairs(
                torch.full((ranks.index + 1, 3), ranks.index)
            ),
            2,
        )
        assert sorted(exchanged) == shapes
        assert [rows.tolist() for rows, _ in got] == [[[0] * 3, [1] * 3, [1] * 3]] * 2
        assert [first for _, first in got] == [0, 1]


@pytest.mark.distributed
def test_gather_between_two_processes(tmp_path):
    """The real collective (gloo) with 1 and 3 rows: both ranks see all rows, in rank order."""
    script = textwrap.dedent("""
        import sys, torch, torch.distributed as dist
        from dpo_trainer.losses import Ranks
        rank = int(sys.argv[1])
        dist.init_process_group("gloo", init_method=f"file://{sys.argv[2]}", rank=rank, world_size=2)
        rows, first = Ranks().gather(torch.tensor([[[5.0, 6.0]], [[0.0, 1.0], [2.0, 3.0], [4.0, 7.0]]][rank]))
        print(rows.tolist(), first)
        dist.destroy_process_group()
    """)
    command = [sys.executable, "-c", script]
    both = [
        subprocess.Popen([*command, str(rank), str(tmp_path / "store")], stdout=subprocess.PIPE, text=True)
        for rank in (0, 1)
    ]
    said = [process.communicate(timeout=120)[0].strip() for process in both]
    rows = "[[5.0, 6.0], [0.0, 1.0], [2.0, 3.0], [4.0, 7.0]]"
    assert said == [f"{rows} 0", f"{rows} 1"]


# --- the running shift of bco_pair -----------------------------------------------------------------------------------


def test_running_shift_by_hand():
    """Rewards at beta 0.1 with mean 1 over one pair, then 4 over two: shift 1, then 3. Evaluation does not move it."""
    objective = Objective.from_config(config(loss_type="bco_pair"))
    zeros = logps_of([0.0], [0.0])
    assert objective(zeros, zeros, training=False).total.item() == pytest.approx(2 * LN2)  # shift 0 before training

    first = objective(logps_of([30.0], [-10.0]), zeros, training=True).total
    assert first.item() == pytest.approx(2 * math.log1p(math.exp(-2)))  # rewards 3 and -1 around 1
    policy = logps_of([50.0, 60.0], [30.0, 20.0])
    objective(policy, logps_of([0.0] * 2, [0.0] * 2), training=True)
    assert objective.state_dict() == {"delta": {"mean": pytest.approx(3.0), "count": 3.0}}

    before = objective.state_dict()
    objective(policy, None, training=False)
    assert objective.state_dict() == before


def test_running_shift_resumes_to_the_bit():
    """Saved as JSON after two of four batches and loaded into a new objective: the same losses as without a stop."""
    batches = [random_pairs(3, seed=s)[:2] for s in range(4)]
    args = config(loss_type="bco_pair")
    through, stopped = Objective.from_config(args), Objective.from_config(args)
    for batch in batches[:2]:
        through(*batch, training=True)
        stopped(*batch, training=True)
    resumed = Objective.from_config(args)
    resumed.load_state_dict(json.loads(json.dumps(stopped.state_dict())))
    for batch in batches[2:]:
        assert torch.equal(through(*batch, training=True).total, resumed(*batch, training=True).total)
    assert not torch.equal(
        Objective.from_config(args)(*batch, training=True).total, through(*batch, training=False).total
    )


def test_state_of_another_loss_is_refused():
    bco, sigmoid = (Objective.from_config(config(loss_type=name)) for name in ("bco_pair", "sigmoid"))
    assert sigmoid.state_dict() == {}
    sigmoid.load_state_dict({})
    with pytest.raises(ValueError, match="another --loss_type: it has no running reward shift"):
        bco.load_state_dict(sigmoid.state_dict())
    with pytest.raises(ValueError, match="it has a running reward shift"):
        sigmoid.load_state_dict(bco.state_dict())


# --- margins ---------------------------------------------------------------------------------------------------------


def test_a_loss_that_wants_margins_gets_those_of_the_batch():
    """In a mixture too, each pair its own; a loss that does not want them never sees them."""
    policy, reference, pairs = random_pairs()
    objective = Objective.from_config(
        config(loss_type=["odpo", "sigmoid"], loss_weights=[2, 1], odpo_alpha=0.5, beta=0.2)
    )
    assert objective.needs_margin
    hyper = {"beta": 0.2, "odpo_alpha": 0.5, "odpo_offset": "log", "f_divergence_type": "reverse_kl", "alpha": 0.5}
    want = [
        2 * offset + plain
        for offset, plain in zip(
            oracle("odpo", pairs, hyper), oracle("sigmoid", pairs, hyper | {"label_smoothing": 0.0}), strict=True
        )
    ]
    assert objective(policy, reference, training=True, margin=MARGINS).total.tolist() == pytest.approx(want, rel=1e-10)
    assert not Objective.from_config(config()).needs_margin


def test_a_batch_without_margins_is_refused_where_they_are_needed():
    policy, reference, _ = random_pairs()
    objective = Objective.from_config(config(loss_type=["sigmoid", "odpo"]))
    with pytest.raises(ValueError, match=r"The batch has no margins, and --loss_type odpo needs .* column 'margin'"):
        objective(policy, reference, training=True)


@pytest.mark.parametrize("margin", [0.0, -0.5, math.nan])
def test_a_margin_without_a_logarithm_gives_nan_and_not_a_small_loss(margin):
    """An offset of -inf would be a loss of 0: the pair would silently teach nothing. NaN stops the run by its name."""
    policy, reference, _ = random_pairs(2)
    margins = torch.tensor([margin, 2.0])
    losses = LOSSES["odpo"](policy, reference, beta=0.1, margin=margins)
    assert losses.isnan().tolist() == [True, False]
    straight = LOSSES["odpo"](policy, reference, beta=0.1, margin=margins, odpo_offset="linear")
    assert straight.isnan().tolist() == [math.isnan(margin), False]


@pytest.mark.parametrize(
    ("options", "margin", "message"),
    [
        ({"loss_type": "odpo"}, 0.5, None),
        ({"loss_type": "odpo"}, 0.0, r"--loss_type odpo: the margin 0 has no logarithm.*--odpo_offset linear"),
        ({"loss_type": "odpo"}, -1.5, r"--loss_type odpo: the margin -1.5 has no logarithm"),
        ({"loss_type": ["sigmoid", "odpo"]}, None, r"--loss_type odpo needs to know of every pair.*column 'margin'"),
        ({"loss_type": "odpo", "odpo_offset": "linear"}, math.nan, r"--loss_type odpo needs to know of every pair"),
        ({"loss_type": "odpo", "odpo_offset": "linear"}, -1.5, None),
        ({"loss_type": "sigmoid"}, None, None),
        ({"loss_type": "sigmoid"}, -1.5, None),
    ],
)
def test_margins_are_refused_before_training(options, margin, message):
    """By whoever prepares the data: the loss says why, and the way out."""
    why = Objective.from_config(config(**options)).unusable_margin(margin)
    if message is None:
        assert why is None
    else:
        assert re.search(message, why)


def test_a_users_loss_may_want_margins_or_take_them(registry):
    """Without a default it needs them; with one, it gets them where the batch has any."""

    @register_loss("wants", unusable_margin=lambda margin, **_: "too much" if margin > 9 else None)
    def wants(policy, reference, *, margin):
        return policy.chosen + margin

    @register_loss("takes")
    def takes(policy, reference, *, margin=-1.0):
        return policy.chosen + margin

    policy, reference = logps_of([0.0, 0.0], [0.0, 0.0]), logps_of([0.0, 0.0], [0.0, 0.0])
    margin = torch.tensor([3.0, 4.0])
    needy, easy = (Objective.from_config(config(loss_type=name)) for name in ("wants", "takes"))
    assert (needy.needs_margin, easy.needs_margin) == (True, False)
    assert needy(policy, reference, training=True, margin=margin).total.tolist() == [3.0, 4.0]
    assert easy(policy, reference, training=True, margin=margin).total.tolist() == [3.0, 4.0]
    assert easy(policy, reference, training=True).total.tolist() == [-1.0, -1.0]
    assert [needy.unusable_margin(m) for m in (9.0, 10.0)] == [None, "--loss_type wants: too much"]
    assert easy.unusable_margin(None) is None


# --- shaping and mixtures --------------------------------------------------------------------------------------------


def random_tokens(seed=0) -> TokenLogps:
    """5 completions of 1 to 6 tokens in 4 pairs: completion 0 is chosen three times, 2 is on both sides."""
    g = torch.Generator().manual_seed(seed)
    lengths = torch.tensor([4, 1, 6, 3, 5])
    n = int(lengths.sum())
    return TokenLogps(
        logps=(-torch.rand(n, generator=g) * 3).requires_grad_(),
        completion=torch.repeat_interleave(torch.arange(5), lengths),
        position=torch.cat([torch.arange(k) for k in lengths]),
        chosen=torch.tensor([0, 0, 2, 0]),
        rejected=torch.tensor([1, 2, 3, 4]),
        lengths=lengths,
        log_sum_sq=-torch.rand(n, generator=g),
    )


def tokens_of(tokens: TokenLogps, completion: int) -> list[tuple[float, float]]:
    rows = zip(tokens.completion.tolist(), tokens.logps.tolist(), tokens.log_sum_sq.tolist(), strict=True)
    return [(logp, sq) for c, logp, sq in rows if c == completion]


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_length_desensitized_against_a_slow_loop(alpha):
    """float32 sums of at most 6 terms of order 1: 1e-6."""
    tokens = random_tokens()
    logps = PairLogps.from_tokens(tokens)
    got = length_desensitized(logps, alpha)
    for n, (chosen, rejected) in enumerate(zip(tokens.chosen.tolist(), tokens.rejected.tolist(), strict=True)):
        sides = [[logp for logp, _ in tokens_of(tokens, c)] for c in (chosen, rejected)]
        shared = min(map(len, sides))
        want = [sum(side[:shared]) + alpha * sum(side[shared:]) for side in sides]
        assert [got.chosen[n].item(), got.rejected[n].item()] == pytest.approx(want, rel=1e-6)
    assert (alpha == 1) is torch.allclose(got.chosen, logps.chosen)
    assert torch.equal(got.chosen_lengths, logps.chosen_lengths)

    got.chosen[0].backward()  # completion 0, cut after the one token of completion 1
    assert tokens.logps.grad.tolist() == pytest.approx([1] + [alpha] * 3 + [0] * 15)


@pytest.mark.parametrize("clamp", [False, True])
def test_wpo_weight_against_a_slow_loop(clamp):
    tokens = random_tokens()
    tokens = dataclasses.replace(tokens, logps=tokens.logps / 2.5)
    got = wpo_weight(PairLogps.from_tokens(tokens), clamp=clamp)
    want = []
    for pair in zip(tokens.chosen.tolist(), tokens.rejected.tolist(), strict=True):
        means = [sum(logp - sq for logp, sq in tokens_of(tokens, c)) / len(tokens_of(tokens, c)) for c in pair]
        want.append(math.exp(sum(means)))
    assert max(want) > 1 > min(want)  # else the clamp is not tested
    assert got.tolist() == pytest.approx([min(w, 1) for w in want] if clamp else want, rel=1e-5)
    assert not got.requires_grad


def test_objective_puts_the_parts_together():
    """LD first, then the weighted sum, then WPO's weight, then the NLL of the log-probs as they were."""
    policy, reference = (PairLogps.from_tokens(random_tokens(seed)) for seed in (0, 1))
    objective = Objective.from_config(
        config(
            loss_type=["sigmoid", "hinge"], loss_weights=[0.7, -0.2], ld_alpha=0.4, use_weighting=True, rpo_alpha=0.5
        )
    )
    assert objective.token_stats == {"log_sum_sq"}
    assert objective.separable
    assert objective.needs_reference
    assert objective.needs_reference_tokens
    shaped = length_desensitized(policy, 0.4), length_desensitized(reference, 0.4)
    mixture = 0.7 * LOSSES["sigmoid"](*shaped, beta=0.1) - 0.2 * LOSSES["hinge"](*shaped, beta=0.1)
    nll = -policy.chosen / policy.chosen_lengths
    got = objective(policy, reference, training=True)
    torch.testing.assert_close(got.total, mixture * wpo_weight(policy, clamp=False) + 0.5 * nll)
    torch.testing.assert_close(got.nll, nll)


def test_mixed_precision_leaves_losses_alone(registry):
    """To the bit, also where a loss of the user has a matrix product."""

    @register_loss("product")
    def product(policy: PairLogps, reference: PairLogps, *, beta: float) -> torch.Tensor:
        return torch.stack([policy.chosen, reference.chosen], 1) @ torch.tensor([beta, 1.0])

    policy = PairLogps.from_tokens(random_tokens())
    objective = Objective.from_config(config(loss_type=["product", "sigmoid"], use_weighting=True, ld_alpha=0.5))
    plain = objective(policy, policy, training=True).total
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = objective(policy, policy, training=True).total
    assert torch.equal(mixed, plain)


def test_rpo_alpha_is_sigmoid_plus_sft():
    """MPO's way to write it and RPO's are the same number; a weight of 0 switches the NLL off."""
    policy, reference, _ = random_pairs()
    by_flag = Objective.from_config(config(rpo_alpha=0.5))
    by_name = Objective.from_config(config(loss_type=["sigmoid", "sft"], loss_weights=[1, 0.5]))
    torch.testing.assert_close(
        by_flag(policy, reference, training=True).total, by_name(policy, reference, training=True).total
    )
    off, plain = (Objective.from_config(config(**o))(policy, reference, training=True) for o in ({"rpo_alpha": 0}, {}))
    assert torch.equal(off.total, plain.total)
    assert off.nll is None
    assert plain.nll is None


@pytest.mark.parametrize("kind", DIVERGENCES)
def test_objective_passes_the_divergence_on(kind):
    policy, reference, pairs = random_pairs()
    alpha = {"f_alpha_divergence_coef": 0.3} if kind == "alpha_divergence" else {}
    objective = Objective.from_config(config(f_divergence_type=kind, **alpha))
    want = oracle("sigmoid", pairs, {"beta": 0.1, "label_smoothing": 0, "f_divergence_type": kind, "alpha": 0.3})
    assert objective(policy, reference, training=True).total.tolist() == pytest.approx(want, rel=1e-10)


def test_no_reference_counts_as_zero():
    policy, reference, _ = random_pairs()
    zeros = dataclasses.replace(reference, chosen=reference.chosen * 0, rejected=reference.rejected * 0)
    want = Objective.from_config(config())(policy, zeros, training=True).total
    free = Objective.from_config(config(reference_free=True))
    assert not free.needs_reference
    assert torch.equal(free(policy, None, training=True).total, want)
    assert torch.equal(free(policy, reference, training=True).total, want)
    assert not Objective.from_config(config(loss_type=["simpo", "sft"], reference_free=True)).needs_reference
    assert Objective.from_config(config(loss_type=["simpo", "sigmoid"])).needs_reference


def test_sums_alone_are_not_enough_for_token_shaping():
    policy, reference, _ = random_pairs()
    for options, flag in (({"ld_alpha": 0.5}, "--ld_alpha"), ({"use_weighting": True}, "--use_weighting")):
        with pytest.raises(ValueError, match=f"{flag} needs log-probs per token"):
            Objective.from_config(config(**options))(policy, reference, training=True)
    no_stats = PairLogps.from_tokens(dataclasses.replace(random_tokens(), log_sum_sq=None))
    with pytest.raises(ValueError, match="needs log_sum_sq"):
        Objective.from_config(config(use_weighting=True))(no_stats, no_stats, training=True)


# --- refusals --------------------------------------------------------------------------------------------------------

REFUSED = [
    ({"beta": 0.0}, r"--beta must be above 0, got 0\.0"),
    ({"beta": float("nan")}, "--beta must be above 0, got nan"),
    ({"beta": None}, "--beta must be above 0, got None"),
    ({"beta": "1e-3"}, "--beta must be a number, got the text '1e-3'.*1.0e-3"),
    ({"label_smoothing": 0.5}, "--label_smoothing must be at least 0 and below 0.5"),
    ({"label_smoothing": -0.1}, "--label_smoothing must be"),
    ({"rpo_alpha": -1.0}, "--rpo_alpha must be at least 0"),
    ({"ld_alpha": 1.5}, "--ld_alpha must be between 0 and 1"),
    ({"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 1.0}, "--f_alpha_divergence_coef must be"),
    ({"loss_type": "discopop", "discopop_tau": 0.0}, "--discopop_tau must be above 0"),
    ({"loss_type": "simpo", "simpo_gamma": -1.0}, "--simpo_gamma must be at least 0"),
    ({"loss_type": "odpo", "odpo_alpha": -1.0}, "--odpo_alpha must be at least 0"),
    ({"loss_type": "cpo", "cpo_alpha": -1.0}, "--cpo_alpha must be at least 0"),
    ({"loss_type": "dpop", "dpop_lambda": float("inf")}, "--dpop_lambda must be at least 0, got inf"),
    ({"loss_type": []}, "--loss_type is empty"),
    ({"loss_type": "sigmoyd"}, "Unknown loss 'sigmoyd'. Did you mean 'sigmoid'.*--loss_module"),
    ({"loss_type": ["sigmoid", "sigmoid"]}, "names 'sigmoid' twice"),
    ({"loss_type": ["aot_pair", "aot_unpaired"]}, "names 'aot_unpaired' twice"),
    ({"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0]}, "--loss_weights has 1 values for 2 losses"),
    ({"loss_weights": [float("nan")]}, "--loss_weights must be finite"),
    ({"loss_type": "exo_pair"}, "exo_pair needs --label_smoothing above 0"),
    ({"loss_type": "hinge", "label_smoothing": 0.1}, "--label_smoothing 0.1 would be ignored.*hinge.*robust"),
    ({"discopop_tau": 0.1}, "--discopop_tau 0.1 would be ignored"),
    ({"simpo_gamma": 1.0}, "--simpo_gamma 1.0 would be ignored.*simpo"),
    ({"ipo_normalization": "sequence"}, "--ipo_normalization sequence would be ignored"),
    ({"odpo_alpha": 0.5}, "--odpo_alpha 0.5 would be ignored.*odpo"),
    ({"loss_type": "ipo", "odpo_offset": "linear"}, "--odpo_offset linear would be ignored.*odpo"),
    ({"cpo_alpha": 0.5}, "--cpo_alpha 0.5 would be ignored"),
    ({"dpop_lambda": 5.0}, "--dpop_lambda 5.0 would be ignored"),
    ({"rpo_normalization": "token"}, "--rpo_normalization token would be ignored.*--rpo_alpha"),
    ({"wpo_clamp": True}, "--wpo_clamp limits the weights of --use_weighting, which is off"),
    ({"f_alpha_divergence_coef": 0.3}, "--f_alpha_divergence_coef 0.3 would be ignored"),
    ({"f_divergence_type": "forward_kl", "loss_type": ["sigmoid", "ipo"]}, "--f_divergence_type forward_kl.*to ipo"),
    ({"f_divergence_type": "forward_kl", "loss_type": "sft"}, "--f_divergence_type forward_kl.*to sft"),
    ({"ld_alpha": 0.5, "loss_type": ["sigmoid", "sft"]}, "--ld_alpha.*sft also trains.*--rpo_alpha"),
]


@pytest.mark.parametrize(("options", "message"), REFUSED, ids=lambda value: str(value)[:60])
def test_refused(options, message):
    with pytest.raises(ValueError, match=message):
        config(**options)


@pytest.mark.parametrize(
    "options",
    [
        {"loss_type": "aot", "label_smoothing": 0.1},
        {"loss_type": ["hinge", "sigmoid"], "label_smoothing": 0.1},
        {"loss_type": "robust"},
        {"loss_type": "sft", "rpo_normalization": "token"},
        {"loss_type": ["sigmoid", "sft"], "f_divergence_type": "js_divergence"},
        {"rpo_alpha": 1.0, "rpo_normalization": "token"},
        {"use_weighting": True, "wpo_clamp": True},
        {"ld_alpha": 0.0, "loss_type": "ipo"},
        {"loss_type": ["odpo", "sft"], "odpo_alpha": 0.0, "f_divergence_type": "js_divergence", "ld_alpha": None},
        {"loss_type": "sft", "beta": 0.3},  # beta also scales the logged rewards
        {"loss_type": "simpo", "reference_free": True},
    ],
    ids=str,
)
def test_sound_combinations_are_accepted(options):
    Objective.from_config(config(**options))


def test_alias_is_listed_once():
    assert config(loss_type="aot_pair").loss_type == ["aot_unpaired"]
    assert LOSSES["aot_pair"] is LOSSES["aot_unpaired"]
    assert "aot_pair" in LOSSES
    assert "aot_pair" not in list(LOSSES)
    with pytest.raises(ValueError, match="'aot_pair' already names the loss 'aot_unpaired'"):
        register_loss("aot_pair")(lambda policy, reference: policy.chosen)


# --- a user's own losses ---------------------------------------------------------------------------------------------

MINE = '''
import torch
from dpo_trainer.losses import register_loss

@register_loss("mine")
def mine(policy, reference, *, beta, label_smoothing, temperature=2.0):
    """Half of the margin."""
    return beta * temperature * (policy.margin() - reference.margin()) + label_smoothing
'''


def test_loss_from_a_users_file(tmp_path, registry):
    file = tmp_path / "my_losses.py"
    file.write_text(MINE)
    options = {"loss_type": "mine", "loss_module": str(file), "beta": 0.2, "label_smoothing": 0.25}
    objective = Objective.from_config(config(**options))
    # 0.2 * 2 * (-5 + 20) + 0.25
    got = objective(logps_of([-5.0], [-20.0]), logps_of([0.0], [0.0]), training=True).total
    torch.testing.assert_close(got, torch.tensor([6.25]))
    assert registry["mine"].summary == "Half of the margin."
    assert registry["mine"].source == registry["mine"].equation == registry["mine"].paper == ""

    config(**options)  # the same file again
    assert load_loss_module(str(file)) == ["mine"]
    file.write_text(MINE.replace("2.0", "4.0"))
    objective = Objective.from_config(config(**options))  # an edited file
    got = objective(logps_of([-5.0], [-20.0]), logps_of([0.0], [0.0]), training=True).total
    torch.testing.assert_close(got, torch.tensor([12.25]))


def test_loss_from_an_importable_module(tmp_path, registry, monkeypatch):
    (tmp_path / "my_importable_losses.py").write_text(MINE)
    monkeypatch.syspath_prepend(tmp_path)
    assert load_loss_module("my_importable_losses") == ["mine"]
    assert config(loss_type="mine", loss_module="my_importable_losses").loss_type == ["mine"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "there is no such file"),
        ("import nothing_of_this_name", "could not be imported: ModuleNotFoundError"),
        ("x = 1", "registers no loss: decorate a function"),
        (MINE.replace('"mine"', '"sigmoid"'), "ValueError: A loss named 'sigmoid' is already registered"),
        (MINE.replace("*, ", ""), r"it must be \(policy, reference, \*, hyperparameters\)"),
        (MINE.replace("beta,", "betta,"), "takes 'betta', which is no field of DPOConfig. Did you mean 'beta'"),
    ],
    ids=["missing", "broken", "empty", "taken", "signature", "field"],
)
def test_user_file_refused(text, message, tmp_path, registry):
    file = tmp_path / "my_losses.py"
    if text is not None:
        file.write_text(text)
    with pytest.raises(ValueError, match=message):
        config(loss_type="mine", loss_module=str(file))


def test_module_name_that_is_none():
    with pytest.raises(ValueError, match=r"--loss_module no_such_module could not be imported.*with \.py"):
        load_loss_module("no_such_module")


def test_user_loss_must_return_one_value_per_pair(registry):
    register_loss("mean")(lambda policy, reference: policy.chosen.mean())
    policy, reference, _ = random_pairs()
    with pytest.raises(ValueError, match=r"'mean' returned shape \(\) for 7 pairs"):
        Objective.from_config(config(loss_type="mean"))(policy, reference, training=True)


def test_user_loss_with_the_running_shift_is_not_separable(registry):
    @register_loss("shifted")
    def shifted(policy, reference, *, delta):
        return policy.chosen - delta

    objective = Objective.from_config(config(loss_type="shifted"))
    assert not objective.separable
    assert set(registry["shifted"].arguments) <= set(SUPPLIED)
    objective(logps_of([30.0], [-10.0]), logps_of([0.0], [0.0]), training=True)
    assert objective.state_dict() == {"delta": {"mean": 1.0, "count": 1.0}}
