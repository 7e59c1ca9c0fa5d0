from dataclasses import replace

import pytest
from rich.console import Console

from cwdpo_bench.leaderboards import compare_runs, render, render_text
from cwdpo_bench.leaderboards.display import label, number, p_value

HOSTILE = "a|b `c` <script>alert(1)</script> [bold red]x[/] \x1b[31m\nnew *y* [l](http://e.vil)"


@pytest.mark.parametrize(
    ("metric", "value", "text"),
    [
        ("CIDEr", 1.426, "142.6"),
        ("accuracy", 0.746, "74.6"),
        ("ece", 0.1, "10.0"),
        ("brier", 0.6512, "0.651"),
        ("tv", 0.45, "0.450"),
        ("accuracy", -0.0001, "0.0"),
    ],
)
def test_numbers_are_shown_on_their_scale(metric, value, text):
    assert number(metric, value) == text


def test_differences_carry_their_sign():
    assert number("CIDEr", 0.015, signed=True) == "+1.5"
    assert number("nll", -0.015, signed=True) == "-0.015"
    assert number("CIDEr", -0.0, signed=True) == "+0.0"


@pytest.mark.parametrize(
    ("p", "text"), [(0.0002, "<.001"), (0.001, ".001"), (0.0499, ".050"), (1.0, "1"), (0.5, ".500")]
)
def test_p_values_are_short(p, text):
    assert p_value(p) == text


def test_labels_tell_which_way_is_better_and_the_unit():
    assert [label("CIDEr", True), label("nll", False), label("tv", None)] == [
        "CIDEr ↑",
        "nll ↓ (nats)",
        "tv",
    ]


def test_a_table_shows_value_mark_interval_and_difference(runs):
    comparison = compare_runs(runs)
    score = comparison.tasks[0].scores["better"]["CIDEr"]
    text = render_text(comparison)
    assert f"{100 * score.value:.1f} ▲" in text
    assert f"[{100 * score.ci95[0]:.1f}, {100 * score.ci95[1]:.1f}]" in text
    assert f"Δ {100 * score.difference.value:+.1f} p {p_value(score.difference.p_holm)}" in text
    assert "Holm over the 18 differences of this task" in " ".join(text.split())


def test_all_of_mmmus_groups_are_shown_and_what_is_left_out_is_said(runs):
    comparison = compare_runs(runs)
    task = comparison.tasks[0]
    values = {system: {task.group_metric: 0.5} for system in task.scores}
    for number_of_groups, left in ((36, 0), (57, 17)):
        groups = {f"group-{i:02d}": values for i in range(number_of_groups)}
        shown = replace(task, groups=groups, group_differences={})
        text = render_text(replace(comparison, tasks=(shown,)))
        assert text.count("group-") == number_of_groups - left
        assert ("17 more: --csv" in text) == (left > 0)


def test_marks_are_words_and_signs_not_only_colours(runs):
    text = render_text(compare_runs(runs))
    assert "▲ better, ▼ worse" in text
    assert "\x1b" not in text


def test_an_overview_alone_is_short(runs):
    text = render_text(compare_runs(runs), details=False)
    assert len(text.splitlines()) < 25
    assert "Δ" not in text


@pytest.mark.parametrize("count", [1, 5, 9])
def test_every_line_fits_a_hundred_columns(make, tmp_path, count):
    names = [f"a system with the number {i} and a long name" for i in range(count)]
    folders = [
        make.save(
            tmp_path / str(i),
            name,
            {
                "coco": make.task(make.captions(0.5 + i / 20, size=20, seed=i)),
                "mmmu": make.task(make.choices(0.5, size=20, seed=i), "mmmu"),
            },
        )
        for i, name in enumerate(names)
    ]
    text = render_text(compare_runs(folders))
    assert max(map(len, text.splitlines())) <= 100
    for i in range(count):
        assert f"number {i}" in " ".join(text.split()) or f"{i} and" in text


def test_the_baseline_leads_every_block_of_many_systems(make, tmp_path):
    tasks = {"coco": make.task(make.captions(size=10))}
    folders = [make.save(tmp_path / f"s{i}", f"s{i}", tasks) for i in range(9)]
    text = render_text(compare_runs(folders))
    heads = [line for line in text.splitlines() if line.startswith("metric")]
    assert len(heads) == 2
    assert all("s0 (baseline)" in line for line in heads)
    assert "s8" in heads[1]


def test_missing_scores_are_dashes_and_listed(make, runs, tmp_path):
    only = make.save(tmp_path / "only", "only", {"coco": make.task(make.captions(0.6))})
    text = render_text(compare_runs([*runs, only]), details=False)
    (row, *_) = [line for line in text.splitlines() if line.startswith("only")]
    assert row.rstrip().endswith("–")
    assert "note: mmmu: not run by only" in text


def test_a_hostile_name_is_shown_as_text_and_styles_nothing(make, tmp_path):
    tasks = {"coco": make.task(make.captions(size=10))}
    folders = [make.save(tmp_path / "a", HOSTILE, tasks), make.save(tmp_path / "b", "b", tasks)]
    comparison = compare_runs(folders)
    console = Console(width=400, color_system="truecolor", force_terminal=True)
    with console.capture() as capture:
        console.print(render(comparison))
    output = capture.get()
    assert "\x1b[31m\n" not in output
    assert "[bold red]x[/]" in render_text(comparison, width=400)
    assert "31mnew" not in output
