"""The tables of an inspection, as text: terminal and page show the same ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..data.report import DROPPED, KEPT
from .result import Inspection
from .words import count, pair_list, row_list, share, size


@dataclass(frozen=True, kw_only=True)
class Chapter:
    title: str
    columns: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    note: str = ""
    plot: str = ""  # its name in plots.py, for the page


def chapters(found: Inspection) -> list[Chapter]:
    """Those that have something to say."""
    makers: list[Callable[[Inspection], Chapter]] = [
        _rows,
        _errors,
        _lengths,
        _bias,
        _sameness,
        _texts,
        _batches,
        _steps,
        _memory,
    ]
    return [chapter for make in makers if (chapter := make(found)).rows]


def _rows(found: Inspection) -> Chapter:
    rows = found.rows
    lines = [(form, share(number, rows.read), "") for form, number in rows.forms.items()]
    lines += [("cannot be read", share(rows.bad, rows.read), "listed below")] * bool(rows.bad)
    for name, kind in DROPPED.items():
        if rows.outcomes[name]:
            where = row_list(rows.first_rows[name], rows.outcomes[name])
            lines.append((f"dropped: {kind.words}", share(rows.outcomes[name], rows.read), where))
    lines.append(("kept", share(rows.kept, rows.read), ""))
    for name, kind in KEPT.items():
        if rows.outcomes[name]:
            where = row_list(rows.first_rows[name], rows.outcomes[name])
            lines.append((kind.words, share(rows.outcomes[name], rows.kept), where))
    if rows.pairs != rows.kept:
        lines.append(("pairs in the kept rows", count(rows.pairs), ""))
    if rows.pairs_left_out:
        lines.append(("pairs of ranked rows left out", count(rows.pairs_left_out), ""))
    limits = ", ".join(
        f"--{name} {found.options[name]}" for name in ("max_length", "max_prompt_length", "max_completion_length")
    )
    note = f"Limits: {limits}, --truncation_mode {found.options['truncation_mode']}, --too_long {found.options['too_long']}."
    if found.parts:
        note += f" Row numbers begin at {', '.join(f'{first} for {name}' for name, first in found.parts)}."
    if rows.of is not None and rows.of > rows.read:
        note = f"Only {count(rows.read)} of {count(rows.of)} rows were read. {note}"
    return Chapter(title="Rows", columns=("", "rows", "which"), rows=lines, note=note)


def _errors(found: Inspection) -> Chapter:
    rows = [(str(error.row), error.error) for error in found.rows.errors]
    hidden = found.rows.bad - len(rows)
    return Chapter(
        title="Rows that cannot be read",
        columns=("row", "why"),
        rows=rows,
        note=f"And {count(hidden)} more." if hidden else "",
    )


def _lengths(found: Inspection) -> Chapter:
    sides = {side: of for side, of in found.lengths.items() if of is not None}
    rows = [("of how many", *(count(of.count) for of in sides.values()))]
    rows += [("mean", *(f"{of.mean:,.1f}" for of in sides.values()))]
    for name in ("p5", "p50", "p95", "p99", "max"):
        rows.append((name, *(f"{getattr(of, name):,.0f}" for of in sides.values())))
    return Chapter(
        title="Tokens",
        columns=("", *sides),
        rows=rows if sides else [],
        note="Before anything is cut; EOS counts. p5: 5 % are shorter.",
        plot="lengths",
    )


def _bias(found: Inspection) -> Chapter:
    bias = found.length_bias
    rows: list[tuple[str, ...]] = []
    if bias is not None:
        correlation = "all equally long" if bias.rank_correlation is None else f"{bias.rank_correlation:+.3f}"
        rows = [
            ("chosen is longer", share(bias.chosen_longer, bias.pairs)),
            ("equally long", share(bias.equal, bias.pairs)),
            ("rejected is longer", share(bias.rejected_longer, bias.pairs)),
            ("chosen minus rejected, mean", f"{bias.mean_difference:+,.1f} tokens"),
            ("chosen minus rejected, median", f"{bias.median_difference:+,.1f} tokens"),
            ("rank correlation of length and preference", correlation),
        ]
    return Chapter(
        title="Length and preference",
        columns=("", "pairs"),
        rows=rows,
        note="Spearman's, over the completions of all pairs: of each one's length, less the mean length of its pair, with "
        "whether it was chosen. 0: length says nothing.",
        plot="difference",
    )


def _sameness(found: Inspection) -> Chapter:
    similar, repeats, read = found.similar, found.repeats, found.rows.read
    rows = [
        (
            "identical completions, pairs",
            share(similar.identical, similar.pairs),
            row_list(similar.first_identical, similar.identical),
        ),
        (
            f"nearly identical, {similar.threshold:.0%} and more, pairs",
            share(similar.near, similar.pairs),
            row_list(similar.first_near, similar.near),
        ),
        (
            "rows that repeat an earlier row",
            share(repeats.duplicate_rows, read),
            pair_list(repeats.first_duplicate_rows, repeats.duplicate_rows),
        ),
        (
            "rows that contradict another row",
            share(repeats.conflicting_rows, read),
            pair_list(repeats.first_conflicting_rows, repeats.conflicting_rows),
        ),
        (
            "rows with the prompt of an earlier row",
            share(repeats.repeated_prompts, read),
            pair_list(repeats.first_repeated_prompts, repeats.repeated_prompts),
        ),
        ("distinct prompts", count(repeats.distinct_prompts), ""),
    ]
    return Chapter(
        title="Repeats and contradictions",
        columns=("", "how many", "which"),
        rows=[(what, number, which if number[0] != "0" else "") for what, number, which in rows] if read else [],
        note="Similarity is 2 L / (a + b): L the longest common subsequence of the two completions' a and b token ids.",
    )


def _texts(found: Inspection) -> Chapter:
    endings, template = found.endings, found.template
    rows = [
        (f"control token {token} inside the text, rows", count(seen.rows), row_list(seen.first, seen.rows))
        for token, seen in found.control_text.items()
    ]
    rows += [
        (
            "completions that do not end in EOS",
            share(endings.without_eos, endings.completions),
            row_list(endings.rows.first, endings.rows.rows),
        )
    ]
    rows += [(f"    they end in {name}", count(number), "") for name, number in endings.ends_in.most_common(5)]
    if template.conversations:
        rows += [
            (what, share(seen.rows, template.conversations), row_list(seen.first, seen.rows))
            for what, seen in ((KEPT[name].words, seen) for name, seen in template.seen.items())
        ]
        rows += [("the template writes today's date", "yes" if template.changes_with_the_day else "no", "")]
    rows += [
        (
            "rows that begin with two BOS",
            count(template.two_bos.rows),
            row_list(template.two_bos.first, template.two_bos.rows),
        )
    ]
    return Chapter(
        title="Texts and template",
        columns=("", "how many", "which"),
        rows=[(what, number, which if number[0] != "0" else "") for what, number, which in rows]
        if found.rows.read
        else [],
        note="Special tokens in the text of a row stay text unless --allow_special_tokens_in_text.",
    )


def _batches(found: Inspection) -> Chapter:
    batches = found.batches
    rows: list[tuple[str, ...]] = []
    if batches is not None:
        rows = [
            ("flat: each prompt once, no padding", count(batches.flat), count(batches.largest_flat)),
            ("padded: a row per completion", count(batches.padded), count(batches.largest_padded)),
            ("padded / flat", f"{batches.ratio:.2f}", ""),
            ("    of which padding", f"{batches.padding_factor:.2f}", ""),
            ("    of which the prompt once per completion", f"{batches.sharing_factor:.2f}", ""),
        ]
    size = "" if batches is None else count(batches.batch_size, "row")
    return Chapter(
        title="Tokens of an epoch",
        columns=("", "tokens", "largest batch"),
        rows=rows,
        note=f"Random batches of {size}. This run: {found.layout}. The vocabulary meets the same "
        "scored tokens in both, so that the speed-up in seconds is a little smaller.",
    )


def _steps(found: Inspection) -> Chapter:
    steps = found.steps
    rows: list[tuple[str, ...]] = []
    if steps is not None:
        rows = [
            ("rows", count(steps.rows)),
            ("rows of a step", count(steps.rows_per_step)),
            ("steps of an epoch", count(steps.per_epoch)),
            ("epochs", f"{steps.epochs:g}"),
            ("optimizer steps", count(steps.total)),
        ]
    note = "One process: several share the rows of an epoch."
    if steps is not None and steps.rows > found.rows.kept:
        note += " Extrapolated to all rows."
    return Chapter(title="Steps", columns=("", ""), rows=rows, note=note)


def _memory(found: Inspection) -> Chapter:
    memory = found.memory
    if memory is None:
        why = ("no estimate", found.no_memory or "", "")
        return Chapter(title="Memory", columns=("", "", ""), rows=[why])
    parts = [*memory.fixed, memory.activations, memory.activations_checkpointed]
    rows = [(part.name, size(part.bytes), part.formula) for part in parts]
    on = memory.gradient_checkpointing
    rows += [
        (f"in all, without gradient checkpointing{'' if on else ' (this run)'}", size(memory.total_plain), ""),
        (f"in all, with gradient checkpointing{' (this run)' if on else ''}", size(memory.total_checkpointed), ""),
    ]
    return Chapter(
        title="Memory of one process, estimated",
        columns=("", "", "estimated as"),
        rows=rows,
        note=f"{count(memory.parameters)} parameters, {count(memory.trainable)} trained; {count(memory.tokens)} tokens in the "
        f"largest batch ({found.layout}). Without sharding, the device's own libraries, and what the allocator leaves unused: "
        "keep a fifth free.",
    )
