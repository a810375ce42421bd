"""What a user should know before training, in sentences: a number, the rows, what to do."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ..data.report import DROPPED, KEPT
from .result import Inspection
from .words import count, pair_list, row_list, share

PROBLEM, NOTICE, GOOD = "problem", "notice", "good"

LOPSIDED = 0.05
"""How far from one half the share of pairs with the longer answer chosen may be, ties left out, before it is worth a word."""

ERRORS = 2.0
"""And how many standard errors: few rows are lopsided by chance."""


@dataclass(frozen=True)
class Finding:
    level: str  # PROBLEM, NOTICE or GOOD
    text: str


def findings(found: Inspection) -> list[Finding]:
    """Problems first."""
    everything = [*_rows(found), *_template(found), *_repeats(found), *_texts(found), *_bias(found), *_speed(found)]
    return sorted(everything, key=lambda finding: (PROBLEM, NOTICE, GOOD).index(finding.level))


def _rows(found: Inspection) -> Iterator[Finding]:
    rows = found.rows
    if rows.bad:
        first = row_list([error.row for error in rows.errors], rows.bad)
        yield Finding(
            PROBLEM, f"{share(rows.bad, rows.read)} of the rows cannot be read ({first}): training stops there."
        )
    if not rows.kept:
        yield Finding(PROBLEM, "No row is left to train on.")
    for name, kind in DROPPED.items():
        if rows.outcomes[name]:
            first = row_list(rows.first_rows[name], rows.outcomes[name])
            yield Finding(
                NOTICE, f"{share(rows.outcomes[name], rows.read)} of the rows are dropped: {kind.words} ({first})."
            )
    cut = {name: number for name, number in rows.truncated.items() if number}
    if cut:
        sides = ", ".join(
            f"{name.removeprefix('truncated_')} in {share(number, rows.kept)}" for name, number in cut.items()
        )
        limits = ", ".join(
            f"--{name} {found.options[name]}"
            for name in ("max_length", "max_prompt_length", "max_completion_length")
            if found.options[name] is not None
        )
        yield Finding(NOTICE, f"{limits} cuts rows: {sides}. A completion that is cut loses its EOS.")
    if rows.read and not rows.bad and not rows.dropped and not cut:
        yield Finding(GOOD, f"All {count(rows.read, 'row')} can be read, and none is cut or dropped.")
    if found.unknown_ids.rows:
        first = row_list(found.unknown_ids.first, found.unknown_ids.rows)
        yield Finding(
            PROBLEM,
            f"{count(found.unknown_ids.rows, 'row')} of token ids that this tokenizer does not have ({first}).",
        )


def _template(found: Inspection) -> Iterator[Finding]:
    template = found.template
    if template.texts and template.has_template:
        yield Finding(
            NOTICE,
            f"{share(template.texts, found.rows.read)} of the rows are plain text, and the tokenizer has a chat template: it is "
            "not put around them. If the model is to be used as a chat model, give conversations.",
        )
    for name, seen in template.seen.items():
        if seen.rows:
            kind = KEPT[name]
            where = row_list(seen.first, seen.rows)
            text = f"{share(seen.rows, template.conversations)} of the conversations ({where}): {kind.words}. {kind.advice}"
            yield Finding(PROBLEM if kind.advice else NOTICE, text.rstrip())
    if template.two_bos.rows:
        where = row_list(template.two_bos.first, template.two_bos.rows)
        yield Finding(PROBLEM, f"{count(template.two_bos.rows, 'row')} begin with two BOS tokens ({where}).")
    if template.changes_with_the_day:
        yield Finding(
            NOTICE,
            f"The chat template writes the date (strftime_now), here {found.options['template_date']}: that of a run's first day, "
            "which its checkpoints keep. --template_date fixes it for several runs, whose tokens are then the same.",
        )


def _repeats(found: Inspection) -> Iterator[Finding]:
    repeats, similar, read = found.repeats, found.similar, found.rows.read
    if repeats.conflicting_rows:
        where = pair_list(repeats.first_conflicting_rows, repeats.conflicting_rows)
        yield Finding(
            PROBLEM,
            f"{share(repeats.conflicting_rows, read)} of the rows prefer what another row rejects, for the same prompt and the "
            f"same two completions (rows {where}).",
        )
    if repeats.duplicate_rows:
        where = pair_list(repeats.first_duplicate_rows, repeats.duplicate_rows)
        yield Finding(
            NOTICE,
            f"{share(repeats.duplicate_rows, read)} of the rows repeat an earlier row word for word (rows {where}): "
            "--deduplicate drops them.",
        )
    if similar.near:
        where = row_list(similar.first_near, similar.near)
        yield Finding(
            NOTICE,
            f"{share(similar.near, similar.pairs)} of the pairs are nearly identical: their completions share at least "
            f"{similar.threshold:.0%} of their tokens ({where}).",
        )


def _texts(found: Inspection) -> Iterator[Finding]:
    endings = found.endings
    if endings.without_eos:
        ends = ", ".join(f"{name} {number:,}" for name, number in endings.ends_in.most_common(3))
        yield Finding(
            PROBLEM,
            f"{share(endings.without_eos, endings.completions)} of the completions do not end in EOS (they end in: {ends}; "
            f"{row_list(endings.rows.first, endings.rows.rows)}). What never ends in EOS does not teach a model to stop.",
        )
    if found.control_text:
        tokens = ", ".join(
            f"{token} in {count(seen.rows, 'row')}" for token, seen in list(found.control_text.items())[:5]
        )
        kept = found.options["allow_special_tokens_in_text"]
        becomes = (
            "they are read as control tokens, as --allow_special_tokens_in_text asks"
            if kept
            else "they stay text (--allow_special_tokens_in_text true reads them as tokens, where rows are templated already)"
        )
        yield Finding(NOTICE, f"Control tokens stand inside the texts ({tokens}): {becomes}.")


def _bias(found: Inspection) -> Iterator[Finding]:
    bias = found.length_bias
    if bias is None:
        return
    decided = bias.chosen_longer + bias.rejected_longer
    off = abs(bias.chosen_longer / decided - 0.5) if decided else 0.0
    if off > LOPSIDED and off > ERRORS * 0.5 / decided**0.5:
        longer = "longer" if bias.chosen_longer > bias.rejected_longer else "shorter"
        number = max(bias.chosen_longer, bias.rejected_longer)
        yield Finding(
            NOTICE,
            f"The chosen answer is the {longer} one in {share(number, bias.pairs)} of the pairs, by {count(round(abs(bias.mean_difference)), 'token')} "
            f"on average (rank correlation of length and preference {bias.rank_correlation:+.2f}): a model can learn length "
            "instead of quality.",
        )


def _speed(found: Inspection) -> Iterator[Finding]:
    batches = found.batches
    if batches is None:
        return
    text = (
        f"Padded rows would compute {batches.ratio:.2f} times the tokens of flat ones (padding {batches.padding_factor:.2f} x "
        f"shared prompts {batches.sharing_factor:.2f})"
    )
    if found.layout == "flat":
        yield Finding(GOOD, f"{text}: about the speed-up to expect of the flat layout.")
    else:
        yield Finding(NOTICE, f"{text}, and this run takes padded ones.")
