"""The gate's answer in the forms that people and CI systems read.

Text for a terminal; markdown for a pull request; JUnit XML (GitLab, Jenkins, Azure); GitHub's
workflow commands. Names from runs and policies are text in each of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from xml.etree import ElementTree

from cwdpo_bench.leaderboards.display import DASH, interval, number, p_value
from cwdpo_bench.leaderboards.gate import Check, GateResult
from cwdpo_bench.leaderboards.markdown import table
from cwdpo_bench.markup import escape, plain

SIGNS = {"pass": "✓", "regression": "✗", "inconclusive": "?", "not judged": "!"}
_HEADINGS = {
    "pass": "passed",
    "regression": "regression",
    "inconclusive": "inconclusive",
    "not judged": "could not judge",
}


def headline(result: GateResult) -> str:
    """The verdict in a line."""
    said = f"gate: {_HEADINGS[result.verdict]}"
    if result.verdict == "inconclusive" and result.exit_status == 0:
        said += " (passes, as asked)"
    return f"{said}: {plain(result.candidate)} against {plain(result.baseline)}"


def to_text(result: GateResult) -> str:
    """Every check with its metric, difference, interval and rule; the verdict last."""
    lines = [line_of(check) for check in result.checks]
    lines += [f"note: {note}" for note in result.notes]
    if result.error is not None:
        lines.append(f"error: {plain(result.error)}")
    return "\n".join([*lines, headline(result)])


def line_of(check: Check) -> str:
    """A check's verdict, what was found and, where nothing could be told, what would tell."""
    kind = "" if check.required else " (advisory)"
    said = f"{SIGNS[check.verdict]} {check.verdict}{kind}: {plain(check.name)}: "
    return said + plain(check.reason) + _more(check)


def _more(check: Check) -> str:
    if check.verdict != "inconclusive":
        return ""
    if check.samples_needed is None:
        return "; the difference itself does not keep the limit, so more samples will not show it"
    return f"; about {check.samples_needed:,} images or questions would do ({check.clusters:,} now)"


def to_summary(result: GateResult) -> str:
    """Markdown for a pull request."""
    blocks = [f"### {SIGNS[result.verdict]} {escape(headline(result))}"]
    if result.error is not None:
        blocks.append(escape(result.error))
    if result.checks:
        rows = [_row(check) for check in result.checks]
        headings = [
            "verdict",
            "task",
            "metric",
            "rule",
            "candidate",
            "baseline",
            "difference",
            "interval",
            "p (Holm)",
        ]
        blocks.append(table(headings, rows))
        unsettled = [check for check in result.checks if check.verdict != "pass"]
        blocks += ["\n".join(f"- {escape(line_of(check))}" for check in unsettled)] * bool(
            unsettled
        )
    blocks += [escape(note) for note in result.notes]
    if result.level is not None:
        wide = f"{100 * (1 - 2 * result.level):g}"
        blocks.append(
            f"Rules: {escape(result.policy)}. Intervals {wide} %, paired bootstrap over images or "
            f"questions; p one-sided, Holm over the required rules: a candidate within all limits "
            f"is called a regression at most {100 * result.level:g} times in 100."
        )
    return "\n\n".join(blocks) + "\n"


def _row(check: Check) -> list[str]:
    verdict = f"{SIGNS[check.verdict]} {check.verdict}" + ("" if check.required else " (advisory)")
    part = check.task if check.group is None else f"{check.task} [{check.group}]"
    cells = [DASH] * 5
    if (
        check.value is not None
        and check.baseline is not None
        and check.difference is not None
        and check.interval is not None
        and check.p_holm is not None
    ):
        cells = [
            number(check.metric, check.value),
            number(check.metric, check.baseline),
            number(check.metric, check.difference, signed=True),
            interval(check.metric, check.interval, signed=True),
            p_value(check.p_holm),
        ]
    return [escape(cell) for cell in (verdict, part, check.metric, check.rule, *cells)]


def to_junit(result: GateResult) -> str:
    """JUnit XML: a regression is a failure, what could not be judged an error.

    What is inconclusive is a failure or, where that passes, skipped; advisory rules are skipped
    where they do not pass.
    """
    suite = ElementTree.Element("testsuite", name="cwdpo-bench gate")
    if result.error is not None:
        _case(suite, "gate", "inputs", "error", "not judged", result.error)
    for check in result.checks:
        kind = _junit_kind(check, passes=result.exit_status == 0)
        _case(suite, check.task, check.name, kind, check.verdict, check.reason + _more(check))
    for attribute, tag in (("failures", "failure"), ("errors", "error"), ("skipped", "skipped")):
        suite.set(attribute, str(len(suite.findall(f"testcase/{tag}"))))
    suite.set("tests", str(len(suite)))
    root = ElementTree.Element("testsuites")
    root.append(suite)
    ElementTree.indent(root)
    return ElementTree.tostring(root, encoding="unicode", xml_declaration=True) + "\n"


def _junit_kind(check: Check, *, passes: bool) -> str | None:
    if check.verdict == "pass":
        return None
    if not check.required or (check.verdict == "inconclusive" and passes):
        return "skipped"
    return "error" if check.verdict == "not judged" else "failure"


def _case(
    suite: ElementTree.Element, where: str, name: str, kind: str | None, verdict: str, text: str
) -> None:
    case = ElementTree.SubElement(suite, "testcase", classname=plain(where), name=plain(name))
    if kind is None:
        ElementTree.SubElement(case, "system-out").text = plain(text)
        return
    ElementTree.SubElement(case, kind, type=verdict, message=plain(text))


def to_annotations(result: GateResult) -> str:
    """GitHub's workflow commands: errors for what fails the gate, warnings for the rest."""
    lines = list(_annotations(result))
    return "".join(f"{line}\n" for line in lines)


def _annotations(result: GateResult) -> Iterator[str]:
    if result.error is not None:
        yield _command("error", "could not judge", result.error)
    for check in result.checks:
        kind = _junit_kind(check, passes=result.exit_status == 0)
        if kind is not None:
            level = "warning" if kind == "skipped" else "error"
            yield _command(level, f"{check.verdict}: {check.name}", check.reason + _more(check))
    if not result.error and result.verdict == "pass":
        yield _command("notice", "gate", headline(result))


def _command(level: str, title: str, message: str) -> str:
    escaped = plain(title).replace("%", "%25").replace(":", "%3A").replace(",", "%2C")
    return f"::{level} title={escaped}::{plain(message).replace('%', '%25')}"
