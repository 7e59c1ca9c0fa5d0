"""`negatives perturb --engine openai`: every row's rejected answer written by a language model.

What a caption became is kept as soon as it is known (`journal.py`), so that the same command goes
on where an earlier one stopped and asks for nothing twice. A request that failed is not kept: the
next start sends it again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cwdpo_bench.errors import UserError
from cwdpo_bench.evaluate.server import Client, RequestFailed, Server, Usage, concurrently
from cwdpo_bench.train.data import Pair, read_pairs
from cwdpo_bench.train.layouts import AUTO
from cwdpo_bench.train.preferences import edits
from cwdpo_bench.train.preferences.files import check_output, with_rejected, write_rows
from cwdpo_bench.train.preferences.journal import Journal, journal_of, key_of, open_journal
from cwdpo_bench.train.preferences.perturb import checked_shares, edit_size
from cwdpo_bench.train.preferences.writer import Writer, Writing, Written, kinds_for

NO_REPLY = "no reply"
IN_A_ROW = 20
"""Requests that may fail one after the other before the run ends: then it is not the captions."""


def rewrite_file(
    data: Path,
    output: Path,
    shares: Mapping[str, float],
    server: Server,
    writing: Writing,
    *,
    seed: int = 0,
    layout: str = AUTO,
    prices: tuple[float, float] | None = None,
    progress: Callable[[int], object] = lambda total: None,
) -> dict[str, Any]:
    """Give every row a rejected answer that a model wrote: the chosen one with one change.

    Args:
        data: rows with `chosen`; a rejected answer that stands there is replaced.
        output: the file to write; replies are kept beside it.
        shares: kind → share, see `perturb.perturb`; the first kind of a caption is drawn by them.
        server: where the model is, with the budget.
        writing: how it is asked.
        seed: of the kinds.
        layout: of the rows, see `read_pairs`.
        prices: of a million tokens, of prompts and of completions, for the cost.
        progress: called with the number of captions for each that is done.

    Returns:
        `rows`, `written`, `dropped` by reason, `failures`: what requests without a reply met,
        `layouts` that rows were taken for, `kinds` written, `edit_size`: words touched → rows,
        `refused`: replies by reason, `structured`: see `Writer`, `kept`: captions of earlier
        starts, `usage` of this start and `usage_in_all` (captions that are done, over all starts):
        requests, tokens, with prices the cost in their unit.

    Raises:
        UserError: bad data, unknown kinds, the budget is used up (what was written is kept), the
            server is gone or fails throughout, no row is left, or the images would lie outside the
            output's folder.
    """
    wanted = checked_shares(shares)
    check_output(output)
    found = read_pairs(data, need_rejected=False, with_images=False, keep_rows=True, layout=layout)
    pairs, rows = found.pairs, found.rows
    with open_journal(journal_of(output)) as journal:
        asked = [_asked(pair, wanted, writing, seed) for pair in pairs]
        keys = [key_of(one) for one in asked]
        earlier = sum(journal.find(key) is not None for key in keys)
        lacking = [place for place, key in enumerate(keys) if journal.find(key) is None]
        failures: dict[int, str] = {}
        told: dict[str, Any] = {"structured": None, "usage": _cost(Usage(), prices)}
        if lacking:
            client = Client(server)
            try:
                writer = Writer(client, writing)
                failures = _ask(writer, asked, keys, lacking, journal, server.concurrency, progress)
            finally:
                client.close()
            told = {"structured": writer.structured, "usage": _cost(client.usage, prices)}
        outcomes = [journal.find(key) for key in keys]
    written, dropped, refused = [], Counter[str](), Counter[str]()
    kinds, sizes, spent = Counter[str](), Counter[int](), Counter[str]()
    for pair, row, outcome in zip(pairs, rows, outcomes, strict=True):
        if outcome is None:
            dropped[NO_REPLY] += 1
            continue
        one = Written(**outcome)
        refused.update(one.refused)
        spent.update({name: getattr(one, name) for name in Usage._fields})
        if one.text is None or one.kind is None:
            dropped[one.refused[-1]] += 1
            continue
        negative = {"source": "perturb", "model": writing.model, "kind": one.kind, "edit": one.edit}
        written.append(with_rejected(row, pair.id, one.text, negative))
        kinds[one.kind] += 1
        sizes[edit_size(pair.chosen, one.text)] += 1
    if not written:
        raise UserError(f"{data}: no caption was accepted ({dict(dropped or refused)})")
    write_rows(written, data, output)
    return {
        "rows": len(pairs),
        "written": len(written),
        "dropped": dict(dropped.most_common()),
        "failures": sorted(set(failures.values()))[:5],
        "layouts": found.layouts,
        "kinds": dict(kinds.most_common()),
        "edit_size": {str(size): sizes[size] for size in sorted(sizes)},
        "refused": dict(refused.most_common()),
        "kept": earlier,
        **told,
        "usage_in_all": _cost(Usage(*(spent[name] for name in Usage._fields)), prices),
    }


def _asked(pair: Pair, shares: Mapping[str, float], writing: Writing, seed: int) -> dict[str, Any]:
    """All that a caption's outcome follows from."""
    kinds = kinds_for(pair.id, pair.chosen, shares, seed)
    return {"rule": edits.SCHEMA, "caption": pair.chosen, "kinds": kinds, **asdict(writing)}


def _ask(
    writer: Writer,
    asked: list[dict[str, Any]],
    keys: list[str],
    lacking: list[int],
    journal: Journal,
    limit: int,
    progress: Callable[[int], object],
) -> dict[int, str]:
    """Ask for what is lacking and keep it; the places that got no reply, with the reason."""

    def work(place: int) -> str | None:
        try:
            written = writer.write(asked[place]["caption"], asked[place]["kinds"])
        except RequestFailed as error:
            return str(error)
        # Here, and not where the results are gathered: a run that ends loses none under way.
        journal.keep(keys[place], asdict(written))
        return None

    failures, in_a_row = {}, 0
    for place, failure in concurrently(work, lacking, limit):
        progress(len(lacking))
        in_a_row = 0 if failure is None else in_a_row + 1
        if failure is not None:
            failures[lacking[place]] = failure
        if in_a_row == IN_A_ROW:
            raise UserError(
                f"{IN_A_ROW} captions in a row got no reply; the last: {failure}; see to the "
                "server, then give the same command again: what was written is kept"
            )
    return failures


def _cost(usage: Usage, prices: tuple[float, float] | None) -> dict[str, float]:
    counted: dict[str, float] = usage._asdict()
    if prices is None:
        return counted
    cost = usage.prompt_tokens * prices[0] + usage.completion_tokens * prices[1]
    return {**counted, "cost": round(cost / 1e6, 6)}
