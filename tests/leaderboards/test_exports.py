import csv
import html.parser
import io
import re

import pytest
import yaml
from huggingface_hub import ModelCard
from huggingface_hub.repocard_data import model_index_to_eval_results

from cwdpo_bench.errors import UserError
from cwdpo_bench.leaderboards import (
    compare_runs,
    to_csv,
    to_html,
    to_latex,
    to_model_index,
    update_between_markers,
)
from cwdpo_bench.leaderboards.exports import escape_latex

HOSTILE = "=1+1|`a` <script>alert('x')</script> \\input{/etc/passwd} $x$ & %\n\"#_^~ \u202e\x1b[1m"


@pytest.fixture
def hostile(make, tmp_path):
    tasks = {"coco": make.task(make.captions(size=40))}
    other = {"coco": make.task(make.captions(0.8, size=40))}
    folders = [make.save(tmp_path / "a", HOSTILE, tasks), make.save(tmp_path / "b", "b", other)]
    return compare_runs(folders)


class _Tags(html.parser.HTMLParser):
    def __init__(self):
        super().__init__()
        self.open, self.names, self.text = [], set(), ""

    def handle_starttag(self, tag, attributes):
        self.names.add(tag)
        assert not any(name.startswith("on") or name in ("src", "href") for name, _ in attributes)
        if tag not in ("meta", "hr"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def tags(page):
    parser = _Tags()
    parser.feed(page)
    assert not parser.open
    return parser


@pytest.mark.parametrize("write", [to_csv, to_latex, to_html])
def test_the_same_runs_give_the_same_bytes(runs, write):
    first, second = (write(compare_runs(runs), with_published=True) for _ in range(2))
    assert first == second
    assert first.endswith("\n")


def test_csv_holds_every_value_with_its_difference(runs):
    comparison = compare_runs(runs)
    rows = list(csv.DictReader(io.StringIO(to_csv(comparison))))
    whole = [row for row in rows if not row["group"]]
    assert len(whole) == sum(len(row) for t in comparison.tasks for row in t.scores.values())
    (found,) = [
        row
        for row in whole
        if (row["task"], row["system"], row["metric"]) == ("coco", "better", "CIDEr")
    ]
    score = comparison.tasks[0].scores["better"]["CIDEr"]
    assert float(found["value"]) == score.value
    assert float(found["difference"]) == score.difference.value
    assert float(found["detectable"]) == score.difference.detectable
    assert (found["verdict"], found["rank"], found["test"]) == ("better", "1", "bootstrap")
    grouped = [row for row in rows if row["group"] == "Art" and row["metric"] == "accuracy"]
    assert [bool(row["difference"]) for row in grouped] == [False, True, True]
    assert {row["source"] for row in rows} == {"run"}


def test_published_rows_are_marked_and_apart_in_every_format(runs):
    comparison = compare_runs(runs)
    rows = list(csv.DictReader(io.StringIO(to_csv(comparison, with_published=True))))
    published = [row for row in rows if row["source"] == "published"]
    assert len(published) == 12 + 10 + 2 + 5 + 1
    assert all(row["system"].endswith("(published)") and not row["rank"] for row in published)
    assert published[2]["value"] == "1.426"
    for write in (to_latex, to_html):
        ours, theirs = write(comparison), write(comparison, with_published=True)
        assert "142.6" not in ours
        assert "(published)" in theirs
        assert "never ranked" in theirs


def test_a_hostile_name_is_text_in_csv(hostile):
    rows = list(csv.DictReader(io.StringIO(to_csv(hostile))))
    names = {row["system"] for row in rows}
    assert all(not name.startswith(("=", "+", "-", "@")) for name in names)
    assert all("\x1b" not in name and "\n" not in name for name in names)
    assert len({len(row) for row in rows}) == 1


def test_a_hostile_name_is_text_in_html(hostile):
    found = tags(to_html(hostile, title=HOSTILE))
    assert "script" not in found.names
    assert "<script>alert('x')</script>" in found.text
    assert "\x1b" not in found.text
    assert "\u202e" not in found.text


def test_html_is_one_page_without_requests(runs):
    page = to_html(compare_runs(runs), with_published=True)
    found = tags(page)
    assert {"table", "caption", "th"} <= found.names
    assert not re.search(r"url\(|@import|https?://", page)
    assert "<strong>" in page
    assert "rank 1" in found.text


def test_a_hostile_name_is_text_in_latex(hostile):
    text = to_latex(hostile)
    assert r"\input" not in text
    assert "\x1b" not in text
    assert r"\textbackslash{}input\{/etc/passwd\} \$x\$ \& \%" in text
    for line in text.splitlines():
        if line.endswith(r"\\"):
            # Every sign that separates or comments is one of ours.
            assert not re.search(r"(?<!\\)[%#$_^~]", re.sub(r"\$\\\w+\$", "", line))


def test_latex_tables_are_rectangular_booktabs(runs):
    text = to_latex(compare_runs(runs), with_published=True)
    tables = re.findall(r"\\begin\{tabular\}\{(l?r*)\}\n(.*?)\\end\{tabular\}", text, re.DOTALL)
    assert len(tables) > 5
    for columns, body in tables:
        assert [body.count(rule) for rule in (r"\toprule", r"\midrule", r"\bottomrule")] == [1] * 3
        for line in body.splitlines():
            if line.endswith(r"\\"):
                assert len(re.findall(r"(?<!\\)&", line)) == len(columns) - 1
    assert r"\textbf{" in text
    assert text.count("{") == text.count("}")


@pytest.mark.parametrize(
    ("text", "escaped"),
    [
        ("a_b & c", r"a\_b \& c"),
        ("50 % ± 1", r"50 \% $\pm$ 1"),
        ("\\x{y}", r"\textbackslash{}x\{y\}"),
        ("~^", r"\textasciitilde{}\textasciicircum{}"),
    ],
)
def test_signs_of_latex_are_escaped(text, escaped):
    assert escape_latex(text) == escaped


# --- model cards ---------------------------------------------------------------------------------


def test_the_model_index_is_read_by_the_hubs_own_code(runs):
    comparison = compare_runs(runs[:2])
    block = to_model_index(comparison)
    name, results = model_index_to_eval_results(yaml.safe_load(block)["model-index"])
    assert name == "better"
    values = {(r.dataset_type, r.metric_name): r.metric_value for r in results}
    score = comparison.tasks[0].scores["better"]["CIDEr"]
    assert values["coco", "CIDEr"] == pytest.approx(100 * score.value, abs=1e-3)
    assert ("mmmu", "ece") in values
    card = ModelCard(f"---\n{block}---\n# Model")
    assert card.data.model_name == "better"
    assert len(card.data.eval_results) == len(results)


def test_a_hostile_name_is_text_in_a_model_card(hostile, make, tmp_path):
    run = make.save(tmp_path / "c", HOSTILE, {"coco": make.task(make.captions(size=10))})
    block = to_model_index(compare_runs([run]))
    name, _ = model_index_to_eval_results(yaml.safe_load(block)["model-index"])
    assert name.startswith("=1+1|`a` <script>")
    assert "\n" not in name


def test_a_model_card_is_of_one_model(runs):
    with pytest.raises(UserError, match="one model, not of better, copy"):
        to_model_index(compare_runs(runs))


# --- between markers -----------------------------------------------------------------------------


def test_what_stands_between_the_markers_is_rewritten_and_nothing_else(tmp_path):
    path = tmp_path / "README.md"
    around = ("# Mine\r\n\r\n", "\r\nrest, with | signs\r\n")
    path.write_bytes(
        f"{around[0]}<!-- cwdpo-bench:begin -->old<!-- cwdpo-bench:end -->{around[1]}".encode()
    )
    for _ in range(2):
        update_between_markers(path, "| a |\n| --- |\n")
        assert path.read_bytes().decode() == (
            f"{around[0]}<!-- cwdpo-bench:begin -->\r\n\r\n| a |\r\n| --- |\r\n\r\n"
            f"<!-- cwdpo-bench:end -->{around[1]}"
        )


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("nothing", "begin --> must stand there once, not 0"),
        ("<!-- cwdpo-bench:begin -->", "end --> must stand there once, not 0"),
        ("<!-- cwdpo-bench:begin -->" * 2, "once, not 2"),
        ("<!-- cwdpo-bench:end --><!-- cwdpo-bench:begin -->", "turn them round"),
    ],
)
def test_markers_that_are_missing_or_doubled_are_named(tmp_path, text, words):
    path = tmp_path / "README.md"
    path.write_text(text)
    with pytest.raises(UserError, match=words):
        update_between_markers(path, "x")
    assert path.read_text() == text
    with pytest.raises(UserError, match="no such file"):
        update_between_markers(tmp_path / "none", "x")
