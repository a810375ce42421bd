"""Every loss a second time, in double precision with `math`, one pair at a time, straight from the papers' equations.

Written for readability and not for range: moderate arguments only. Nothing here imports the package.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import exp, log, log1p


@dataclass(frozen=True)
class P:
    """One pair: summed log-probs under policy and reference, lengths, and by how much chosen is better."""

    pw: float
    pl: float
    fw: float
    fl: float
    nw: int
    nl: int
    m: float = 1.0

    @property
    def rw(self) -> float:
        return self.pw - self.fw

    @property
    def rl(self) -> float:
        return self.pl - self.fl


def s(x: float) -> float:
    return 1 / (1 + exp(-x))


SCORES = {
    "reverse_kl": lambda r, a: r,
    "forward_kl": lambda r, a: -exp(-r),
    "js_divergence": lambda r, a: log(2 * exp(r) / (1 + exp(r))),
    "alpha_divergence": lambda r, a: -exp(-a * r) / a,
}


def margin(p: P, h: dict) -> float:
    score = SCORES[h["f_divergence_type"]]
    return h["beta"] * (score(p.rw, h["alpha"]) - score(p.rl, h["alpha"]))


def bernoulli(x: float, e: float) -> float:
    return -(1 - e) * log(s(x)) - e * log(1 - s(x))


def exo_pair(p: P, h: dict) -> float:
    """KL(model's preference || smoothed label), two outcomes."""
    q, e = s(margin(p, h)), h["label_smoothing"]
    return q * log(q / (1 - e)) + (1 - q) * log((1 - q) / e)


def odpo(p: P, h: dict) -> float:
    """The probability that a Gumbel-noised chosen reward wins by more than the offset."""
    offset = h["odpo_alpha"] * (log(p.m) if h["odpo_offset"] == "log" else p.m)
    return log1p(exp(offset) / exp(margin(p, h)))


def robust(p: P, h: dict) -> float:
    """The noise-corrected estimate: ((1 - e) loss(right label) - e loss(flipped label)) / (1 - 2 e)."""
    q, e = s(margin(p, h)), h["label_smoothing"]
    return ((1 - e) * -log(q) - e * -log(1 - q)) / (1 - 2 * e)


def discopop(p: P, h: dict) -> float:
    x = margin(p, h)
    m = s(x / h["discopop_tau"])
    return (1 - m) * log1p(exp(-x)) + m * exp(-x)


def ipo(p: P, h: dict) -> float:
    token = h["ipo_normalization"] == "token"
    gap = p.rw / p.nw - p.rl / p.nl if token else p.rw - p.rl
    return (gap - 1 / (2 * h["beta"])) ** 2


def orpo(p: P, h: dict) -> float:
    w, l = exp(p.pw / p.nw), exp(p.pl / p.nl)
    ratio = (w / (1 - w)) / (l / (1 - l))
    return -log(w) - h["beta"] * log(s(log(ratio)))


def chi_po(p: P, h: dict) -> float:
    zw, zl = exp(p.rw), exp(p.rl)
    return -log(s(h["beta"] * (zw + log(zw) - zl - log(zl))))


def squares(p: P, h: dict) -> float:
    target = 1 / (2 * h["beta"])
    return (p.rw - target) ** 2 + (p.rl + target) ** 2


PER_PAIR = {
    "sigmoid": lambda p, h: bernoulli(margin(p, h), h["label_smoothing"]),
    "hinge": lambda p, h: max(0.0, 1 - margin(p, h)),
    "exo_pair": exo_pair,
    "odpo": odpo,
    "robust": robust,
    "discopop": discopop,
    "ipo": ipo,
    "sigmoid_norm": lambda p, h: -log(s(h["beta"] * (p.rw / p.nw - p.rl / p.nl))),
    "dpop": lambda p, h: -log(s(h["beta"] * (p.rw - p.rl - h["dpop_lambda"] * max(0.0, p.fw - p.pw)))),
    "chi_po": chi_po,
    "nca_pair": lambda p, h: (
        -log(s(h["beta"] * p.rw)) - 0.5 * (log(1 - s(h["beta"] * p.rw)) + log(1 - s(h["beta"] * p.rl)))
    ),
    "sppo_hard": squares,
    "apo_zero": lambda p, h: (1 - s(h["beta"] * p.rw)) + s(h["beta"] * p.rl),
    "apo_down": lambda p, h: s(h["beta"] * p.rw) + (1 - s(h["beta"] * p.rw - h["beta"] * p.rl)),
    "cal_dpo": lambda p, h: squares(p, h) + log1p(exp(-(p.rw - p.rl))),
    "bco_pair": lambda p, h: -log(s(h["beta"] * p.rw - h["delta"])) - log(1 - s(h["beta"] * p.rl - h["delta"])),
    "sft": lambda p, h: -p.pw / p.nw,
    "simpo": lambda p, h: -log(s(h["beta"] * p.pw / p.nw - h["beta"] * p.pl / p.nl - h["simpo_gamma"])),
    "orpo": orpo,
    "cpo": lambda p, h: -log(s(h["beta"] * (p.pw - p.pl))) - h["cpo_alpha"] * p.pw / p.nw,
}


def transported(better: list[float], worse: list[float], h: dict) -> list[float]:
    """Terms of the sorted lists, in sorted order."""
    gaps = [b - w for b, w in zip(sorted(better), sorted(worse), strict=True)]
    return [bernoulli(h["beta"] * gap, h["label_smoothing"]) for gap in gaps]


def aot(pairs: list[P], h: dict) -> list[float]:
    u = [p.pw - p.pl for p in pairs]
    terms = transported(u, [p.fw - p.fl for p in pairs], h)
    return [terms[sorted(u).index(x)] for x in u]


def aot_unpaired(pairs: list[P], h: dict) -> list[float]:
    """Each pair: half of the term of its chosen, half of the term of its rejected."""
    w, l = [p.rw for p in pairs], [p.rl for p in pairs]
    terms = transported(w, l, h)
    return [(terms[sorted(w).index(p.rw)] + terms[sorted(l).index(p.rl)]) / 2 for p in pairs]


PER_BATCH = {"aot": aot, "aot_unpaired": aot_unpaired}


def loss(name: str, pairs: list[P], h: dict) -> list[float]:
    return PER_BATCH[name](pairs, h) if name in PER_BATCH else [PER_PAIR[name](p, h) for p in pairs]
