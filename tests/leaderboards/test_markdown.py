import re

import numpy as np

from cwdpo_bench.leaderboards import compare_runs, render_text, to_markdown

HOSTILE = "a|b `c` <script>alert(1)</script>\n| new | row |\n# head *y* [l](http://e.vil) \x1b[31m"


def tables(markdown):
    """Every table as its rows of cells."""
    blocks = re.findall(r"(?:^\|.*\|$\n?)+", markdown, re.MULTILINE)
    return [
        [[cell.strip() for cell in line.strip("|").split("|")] for line in block.splitlines()]
        for block in blocks
    ]


def test_every_table_is_rectangular(runs):
    text = to_markdown(compare_runs(runs), with_published=True, dynamics={"a": {"x": 1.0}})
    found = tables(text)
    assert len(found) > 8
    for rows in found:
        assert len({len(row) for row in rows}) == 1
        assert set(rows[1]) <= {"---", "---:"}


def test_rows_hold_value_verdict_and_interval(runs):
    comparison = compare_runs(runs)
    score = comparison.tasks[0].scores["better"]["CIDEr"]
    text = to_markdown(comparison)
    low, high = (100 * end for end in score.ci95)
    assert f"**{100 * score.value:.1f} ▲** [{low:.1f}, {high:.1f}]" in text
    difference = score.difference
    low, high = (100 * end for end in difference.ci95)
    assert f"{100 * difference.value:+.1f} [{low:+.1f}, {high:+.1f}], p" in text
    assert "p adjusted by Holm over the 18 differences of this task" in text


def test_the_same_runs_give_the_same_bytes(runs):
    first, second = (to_markdown(compare_runs(runs), with_published=True) for _ in range(2))
    assert first == second
    assert first.endswith("\n")
    assert not first.endswith("\n\n")


def test_bold_is_only_what_is_better_than_every_other(runs):
    (overview, *_) = tables(to_markdown(compare_runs(runs)))
    base, better, copy = overview[2:]
    assert better[1].startswith("**")
    assert not any("**" in cell for cell in base + copy)
    # Bold is of the pairs, whichever of them is the baseline.
    (turned, *_) = tables(to_markdown(compare_runs(runs, baseline="better")))
    assert [row[1].startswith("**") for row in turned[2:]] == [False, True, False]
    # Of two that cannot be told apart neither is.
    same = to_markdown(compare_runs([runs[0], runs[2]]))
    assert not any("**" in cell for table in tables(same) for row in table for cell in row)


def test_ranks_are_shared_by_what_cannot_be_told_apart(runs):
    (_, ranks, *_) = tables(to_markdown(compare_runs(runs)))
    assert [row[0] for row in ranks[2:]] == ["base (baseline)", "better", "copy"]
    assert [row[1] for row in ranks[2:]] == ["2", "1", "2"]


def test_a_system_that_stands_alone_is_no_baseline(runs):
    for text in (to_markdown(compare_runs(runs[:1])), render_text(compare_runs(runs[:1]))):
        assert "base" in text
        assert "baseline)" not in text


def test_a_brief_table_has_no_headings(runs):
    text = to_markdown(compare_runs(runs), brief=True)
    assert text.startswith("| system |")
    assert "#" not in re.sub(r"&#\d+;", "", text)


def test_signatures_seeds_and_sample_numbers_stand_below(runs):
    found = tables(to_markdown(compare_runs(runs)))
    systems, tasks = found[-2:]
    assert systems[0] == ["system", "seed", "date", "versions", "signature of the run"]
    assert systems[2] == ["base", "3", "–", "–", "engine:hf&#124;dtype:float32"]
    assert tasks[2][:2] == ["coco", "60"]
    assert "split:test" in tasks[2][2]


def test_groups_are_shown_by_system(runs):
    comparison = compare_runs(runs)
    text = to_markdown(comparison)
    assert "**CIDEr by group**" in text
    value = comparison.tasks[0].groups["in-domain"]["better"]["CIDEr"]
    (row,) = re.findall(r"^\| in-domain \|.*$", text, re.MULTILINE)
    difference = comparison.tasks[0].group_differences["in-domain"]["better"]
    assert f"| {100 * value:.1f} ▲ \\({100 * difference.value:+.1f}\\) |" in row


def test_published_figures_are_absent_unless_asked_for(runs):
    text = to_markdown(compare_runs(runs))
    assert "published" not in text.lower()
    assert "142.6" not in text


def test_published_figures_stand_apart_and_are_marked_row_by_row(runs):
    comparison = compare_runs(runs)
    text = to_markdown(comparison, with_published=True)
    ours, theirs = text.split("## Published figures")
    assert ours.removesuffix("---\n\n") == to_markdown(comparison) + "\n"
    assert "never ranked" in theirs
    assert "**" not in "".join(c for t in tables(theirs) for row in t for c in row)
    for table in tables(theirs):
        assert all("(published)" in row[0] for row in table[2:])
    systems, ablations, dynamics = tables(theirs)
    by_name = {row[0]: dict(zip(systems[0], row, strict=True)) for row in systems[2:]}
    assert by_name["CW-DPO (published)"]["COCO CIDEr"] == "142.6"
    assert by_name["CW-DPO (published)"]["NoCaps near CIDEr"] == "121.3"
    assert by_name["OPA-DPO (published)"]["COCO SPICE"] == "–"
    assert by_name["PPO (published)"]["MMMU"] == "72.2"
    assert by_name["SFT (published)"]["COCO BLEU-4"] == "35.2"
    assert len(ablations) == 2 + 7
    assert len(dynamics) == 2 + 2


def test_a_model_that_is_named_as_a_published_one_is_not_mixed_with_it(make, tmp_path):
    run = make.save(tmp_path / "r", "CW-DPO", {"coco": make.task(make.captions(size=10))})
    ours, _ = to_markdown(compare_runs([run]), with_published=True).split("## Published")
    assert "142.6" not in ours


def test_dynamics_are_a_table_with_dashes_for_what_is_missing(runs):
    dynamics = {"dpo": {"top-1": 0.81234, "tv": 0.45}, "cw|dpo": {"top-1": np.nan, "tv": -0.00001}}
    text = to_markdown(compare_runs(runs), dynamics=dynamics)
    assert "| system | top-1 | tv |" in text
    assert "| dpo | 0.812 | 0.450 |" in text
    assert "| cw&#124;dpo | – | 0.000 |" in text


def test_hostile_names_are_text(make, tmp_path):
    tasks = {"coco": make.task(make.captions(size=10))}
    folders = [make.save(tmp_path / "a", HOSTILE, tasks), make.save(tmp_path / "b", "b", tasks)]
    text = to_markdown(compare_runs(folders), dynamics={HOSTILE: {HOSTILE: 1.0}}, title=HOSTILE)
    assert "<script" not in text
    assert "\x1b" not in text
    assert "](http" not in text
    assert "\n# head" not in text
    assert not re.search(r"(?<!\\)`", text)
    for rows in tables(text):
        assert len({len(row) for row in rows}) == 1
