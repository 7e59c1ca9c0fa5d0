import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from cwdpo_bench.errors import UserError
from cwdpo_bench.leaderboards import compare_runs, parse_systems, render_text, to_json
from cwdpo_bench.leaderboards.signatures import signature_parts
from cwdpo_bench.leaderboards.significance import wilson_interval


def scores(comparison, task, system):
    (found,) = [t for t in comparison.tasks if t.name == task]
    return found.scores[system]


def edit(run, change):
    path = run / "results.json"
    results = json.loads(path.read_text())
    change(results)
    path.write_text(json.dumps(results))


def test_a_better_run_is_told_from_the_baseline_and_its_copy(runs):
    comparison = compare_runs(runs)
    assert comparison.baseline == "base"
    assert [system.name for system in comparison.systems] == ["base", "better", "copy"]
    assert [task.name for task in comparison.tasks] == ["coco", "mmmu"]
    for task, metric in (("coco", "CIDEr"), ("coco", "BLEU-4"), ("mmmu", "accuracy")):
        assert scores(comparison, task, "base")[metric].difference is None
        better = scores(comparison, task, "better")[metric].difference
        assert better.verdict == "better"
        assert better.ci95[0] > 0
        assert better.p <= better.p_holm <= 0.05
        copy = scores(comparison, task, "copy")[metric].difference
        assert (copy.value, copy.p, copy.p_holm, copy.verdict) == (0.0, 1.0, 1.0, "same")


def test_less_is_better_where_the_metric_says_so_and_neither_where_it_does_not(runs):
    found = scores(compare_runs(runs), "mmmu", "better")
    assert found["brier"].difference.value < 0
    assert found["brier"].difference.verdict == "better"
    assert found["entropy"].difference.verdict in ("higher", "lower", "same")


def test_a_share_of_independent_questions_has_wilsons_interval(make, tmp_path):
    samples = make.choices(0.9, size=50).assign(correct=True)
    alone = samples.assign(cluster=samples["id"])
    folders = [
        make.save(tmp_path / name, name, {"mmmu": make.task(table, "mmmu")})
        for name, table in (("alone", alone), ("pairs", samples))
    ]
    found = scores(compare_runs(folders[:1]), "mmmu", "alone")["accuracy"]
    assert found.ci95 == wilson_interval(50, 50)
    assert scores(compare_runs(folders[1:]), "mmmu", "pairs")["accuracy"].ci95 == (1.0, 1.0)


# --- seeds, groups, tests ------------------------------------------------------------------------


@pytest.fixture
def seeded(make, tmp_path):
    """Two systems of three seeds each; a seed moves CIDEr of all images by 0.02."""
    systems = {}
    for system, gain in (("base", 0.0), ("tuned", 0.3)):
        systems[system] = []
        for seed in range(3):
            samples = make.captions(0.5)
            samples["CIDEr"] += gain + 0.02 * (seed - 1)
            path = tmp_path / f"{system}-{seed}"
            make.save(path, f"{system}-{seed}", {"coco": make.task(samples)}, seed=seed)
            systems[system].append(path)
    return systems


def test_seeds_of_a_system_are_one_row_with_mean_and_spread(seeded):
    comparison = compare_runs(seeded)
    assert [s.name for s in comparison.systems] == ["base", "tuned"]
    assert comparison.systems[1].seeds == (0, 1, 2)
    found = scores(comparison, "coco", "tuned")["CIDEr"]
    single = [scores(compare_runs([p]), "coco", p.name)["CIDEr"].value for p in seeded["tuned"]]
    assert found.value == pytest.approx(sum(single) / 3)
    assert found.seed_sd == pytest.approx(0.02)
    assert found.difference.value == pytest.approx(0.3)
    assert found.difference.verdict == "better"
    text = " ".join(render_text(comparison).split())
    assert f"{100 * found.value:.1f} ±2.0 ▲" in text
    assert "Mean ± standard deviation over training seeds: base (3), tuned (3)" in text
    json.dumps(to_json(comparison), allow_nan=False)


def test_one_seed_against_several_says_that_its_spread_is_unknown(seeded):
    systems = {**seeded, "base": seeded["base"][:1]}
    text = " ".join(render_text(compare_runs(systems)).split())
    assert "Of one seed, whose spread is unknown: base." in text


def test_a_task_that_only_some_seeds_did_is_refused(make, seeded, tmp_path):
    odd = make.save(tmp_path / "odd", "odd", {"mmmu": make.task(make.choices(), "mmmu")})
    with pytest.raises(UserError, match="tuned: coco was not run by every seed"):
        compare_runs({**seeded, "tuned": [*seeded["tuned"], odd]})


def test_systems_are_named_on_the_command_line():
    assert parse_systems(["a", "b"]) == ["a", "b"]
    assert parse_systems(["x=a,b", "runs/c"]) == {"x": ["a", "b"], "c": ["runs/c"]}
    with pytest.raises(UserError, match="'x' stands there already"):
        parse_systems(["x=a", "x=b"])
    with pytest.raises(UserError, match="behind the sign ="):
        parse_systems(["x="])


def test_groups_are_compared_in_pairs_with_holm_over_them(make, tmp_path):
    base = make.captions(0.5, size=200)
    hurt = [0.3 * ("out-domain" in groups) for groups in base["groups"]]
    folders = [
        make.save(tmp_path / name, name, {"nocaps": make.task(table, "nocaps")})
        for name, table in (("base", base), ("hurt", base.assign(CIDEr=base["CIDEr"] - hurt)))
    ]
    (task,) = compare_runs(folders).tasks
    assert task.group_metric == "CIDEr"
    found = {group: row["hurt"] for group, row in task.group_differences.items()}
    assert (found["in-domain"].verdict, found["out-domain"].verdict) == ("same", "worse")
    assert found["out-domain"].value == pytest.approx(-0.3)
    assert found["out-domain"].p_holm == pytest.approx(2 * found["out-domain"].p)


def test_p_can_come_from_shuffling(runs):
    by_shuffling = scores(compare_runs(runs, test="randomization"), "coco", "better")
    assert by_shuffling["CIDEr"].difference.test == "randomization"
    assert by_shuffling["CIDEr"].difference.verdict == "better"
    assert scores(compare_runs(runs), "coco", "better")["CIDEr"].difference.test == "bootstrap"


def test_the_smallest_difference_that_can_be_shown_stands_in_the_header(runs):
    text = " ".join(render_text(compare_runs(runs)).split())
    assert "smallest difference shown with 80 % chance: CIDEr" in text


# --- runs that do not match ----------------------------------------------------------------------


def test_what_overlaps_can_be_compared_when_asked(make, runs, tmp_path):
    other = make.save(tmp_path / "o", "o", {"coco": make.task(make.captions(0.6)[10:])})
    comparison = compare_runs([runs[0], other], on_mismatch="intersect")
    coco = comparison.tasks[0]
    assert (coco.n, coco.clusters) == (50, 50)
    base = make.captions(0.4)[10:]
    assert coco.scores["base"]["CIDEr"].value == pytest.approx(base["CIDEr"].mean())
    assert coco.groups == {}
    assert "coco: only the 50 of 60 samples that all runs hold are compared" in comparison.notes


def test_another_prompt_can_be_compared_when_asked_and_is_told(make, runs, tmp_path):
    other = make.save(tmp_path / "o", "o", {"coco": make.task(make.captions(), prompt="other")})
    comparison = compare_runs([runs[0], other], on_signature="warn")
    (told,) = [note for note in comparison.notes if "compared nevertheless" in note]
    assert "prompt: 'other' against 'abc'" in told


def test_runs_without_a_common_task_are_refused(make, runs, tmp_path):
    other = make.save(tmp_path / "o", "o", {"nocaps": make.task(make.captions(), "nocaps")})
    with pytest.raises(UserError, match=r"no task of the baseline .* o: nocaps"):
        compare_runs([runs[0], other])


def test_values_and_intervals_are_those_of_the_run_folder(runs):
    comparison = compare_runs(runs)
    written = json.loads((runs[1] / "results.json").read_text())["tasks"]["mmmu"]["metrics"]
    found = scores(comparison, "mmmu", "better")
    assert list(found) == list(written)
    for name, metric in written.items():
        assert found[name].value == metric["value"]
        assert list(found[name].ci95) == metric["ci95"]


def test_holm_counts_every_difference_of_the_task(runs):
    (coco, _) = compare_runs(runs).tasks
    differences = [s.difference for row in coco.scores.values() for s in row.values()]
    assert coco.tests == len([d for d in differences if d is not None]) == 2 * len(coco.metrics)
    least = 2 / (coco.resamples + 1)
    assert least * coco.tests < 0.05


def test_the_baseline_can_be_named_by_system_or_by_folder(runs):
    by_name = compare_runs(runs, baseline="better")
    assert by_name == compare_runs(runs, baseline=runs[1])
    assert by_name == compare_runs(runs, baseline=Path("better"))
    worse = scores(by_name, "mmmu", "base")["accuracy"].difference
    assert worse.verdict == "worse"
    with pytest.raises(UserError, match="did you mean 'better'"):
        compare_runs(runs, baseline="bettre")


def test_the_same_runs_give_the_same_comparison_in_strict_json(runs):
    first, second = compare_runs(runs), compare_runs([str(run) for run in runs])
    text = json.dumps(to_json(first), allow_nan=False)
    assert text == json.dumps(to_json(second), allow_nan=False)
    assert json.loads(text)["tasks"][0]["scores"]["better"]["CIDEr"]["difference"]["verdict"]


def test_one_run_alone_is_a_table_without_differences(runs):
    comparison = compare_runs(runs[:1])
    assert scores(comparison, "coco", "base")["CIDEr"].difference is None
    assert comparison.tasks[0].tests == 0


def test_all_equal_systems_have_no_nan_and_no_verdict(runs, tmp_path):
    copies = [runs[0], shutil.copytree(runs[0], tmp_path / "b"), runs[2]]
    comparison = compare_runs(copies)
    for task in comparison.tasks:
        for row in task.scores.values():
            for score in row.values():
                if score.difference is not None:
                    assert score.difference.verdict == "same"
                    assert score.difference.p == 1.0


def test_a_single_sample_gives_no_verdict(make, tmp_path):
    folders = [
        make.save(tmp_path / name, name, {"mmmu": make.task(make.choices(skill, size=1), "mmmu")})
        for name, skill in (("wrong", 0.0), ("right", 1.0))
    ]
    comparison = compare_runs(folders)
    accuracy = scores(comparison, "mmmu", "right")["accuracy"].difference
    assert (accuracy.value, accuracy.p, accuracy.verdict) == (1.0, 1.0, "same")
    assert any("1 samples; intervals are rough" in note for note in comparison.notes)
    json.dumps(to_json(comparison), allow_nan=False)


def test_models_of_one_name_are_told_apart_by_their_folders(make, tmp_path):
    tasks = {"coco": make.task(make.captions(size=5))}
    folders = [make.save(tmp_path / p, "m", tasks) for p in ("a/run", "b/run", "c")]
    names = [system.name for system in compare_runs(folders).systems]
    assert names == ["m (a/run)", "m (b/run)", f"m ({tmp_path.name}/c)"]
    names = [system.name for system in compare_runs(folders[1:]).systems]
    assert names == ["m (run)", "m (c)"]


def test_a_task_that_some_runs_lack_is_listed_and_left_open(make, runs, tmp_path):
    only = make.save(tmp_path / "only", "only", {"coco": make.task(make.captions(0.6))})
    comparison = compare_runs([*runs, only])
    assert "mmmu: not run by only" in comparison.notes
    assert "only" not in comparison.tasks[1].scores
    turned = compare_runs([only, *runs])
    assert "mmmu: no differences, the baseline lacks it" in turned.notes
    assert scores(turned, "mmmu", "better")["accuracy"].difference is None


@pytest.mark.parametrize("part", ["split", "prompt", "scorer"])
def test_runs_of_another_task_are_refused_with_the_difference(make, runs, tmp_path, part):
    task = make.task(make.captions(), **{part: "an|other"})
    other = make.save(tmp_path / "other", "other", {"coco": task})
    with pytest.raises(UserError, match=rf"coco: .*other.*{part}: 'an\\\\\|other' against"):
        compare_runs([runs[0], other])


def test_what_finished_predictions_do_not_state_is_told_not_refused(make, runs, tmp_path):
    """`score` knows neither the split nor the prompt of what it was given."""
    whole = make.task(make.captions())
    parts = [p for p in whole.signature.split("|") if not p.startswith(("split:", "prompt:"))]
    assert len(parts) < len(whole.signature.split("|"))
    task = replace(whole, signature="|".join(parts))
    scored = make.save(tmp_path / "scored", "scored", {"coco": task})
    comparison = compare_runs([runs[0], scored])
    assert any(note.startswith("coco: scored has split 'not stated'") for note in comparison.notes)


def test_other_settings_are_told_in_a_note(make, runs, tmp_path):
    task = make.task(make.captions(), max_new_tokens=9)
    other = make.save(tmp_path / "o", "o", {"coco": task}, "engine:hf|dtype:bfloat16")
    notes = compare_runs([runs[0], other]).notes
    assert "o has dtype 'bfloat16', base has 'float32'" in notes
    assert "coco: o has max_new_tokens '9', base has 'not stated'" in notes


def test_a_warning_is_told_once_with_its_tasks_and_systems(make, tmp_path):
    folders = []
    for name, extra in (("a", []), ("b", ["odd replies"])):
        tasks = {}
        for task in ("coco", "nocaps"):
            made = make.task(make.captions(), task)
            tasks[task] = replace(made, warnings=["SPICE is unavailable", *extra])
        folders.append(make.save(tmp_path / name, name, tasks))
    assert compare_runs(folders).notes == (
        "coco, nocaps: SPICE is unavailable",
        "coco, nocaps: odd replies (b)",
    )


def test_partly_overlapping_runs_are_refused(make, runs, tmp_path):
    other = make.save(tmp_path / "o", "o", {"coco": make.task(make.captions()[10:])})
    with pytest.raises(UserError, match=r"coco: .* 50 in common, 0 only in the former, 10 only"):
        compare_runs([runs[0], other])


def test_signature_parts_keep_escaped_bars():
    assert signature_parts(r"task:a|prompt:x\|y\\|n:3|odd") == {
        "task": "a",
        "prompt": r"x\|y\\",
        "n": "3",
        "odd": "",
    }


def test_a_run_given_twice_is_refused(runs):
    with pytest.raises(UserError, match="given twice"):
        compare_runs([runs[0], runs[0].parent / ".." / "runs" / "base"])


def test_no_run_is_refused():
    with pytest.raises(UserError, match="no run folder given"):
        compare_runs([])


def test_a_missing_folder_is_refused(tmp_path):
    with pytest.raises(UserError, match="nowhere"):
        compare_runs([tmp_path / "nowhere"])


def test_results_that_are_cut_off_are_refused(runs):
    path = runs[1] / "results.json"
    path.write_text(path.read_text()[:-40])
    with pytest.raises(UserError, match=r"better/results\.json: line \d+"):
        compare_runs(runs)


def test_results_with_nan_are_refused(runs):
    path = runs[1] / "results.json"
    path.write_text(path.read_text().replace('"value": 0.', '"value": NaN, "x": 0.', 1))
    with pytest.raises(UserError, match=r"better/results\.json.*NaN"):
        compare_runs(runs)


def test_another_schema_is_refused(runs):
    edit(runs[1], lambda results: results.update(schema=2))
    with pytest.raises(UserError, match=r"better/results\.json.*schema"):
        compare_runs(runs)


def test_a_missing_parquet_is_refused(runs):
    (runs[1] / "samples" / "mmmu.parquet").unlink()
    with pytest.raises(UserError, match=r"better/samples/mmmu\.parquet: no such file"):
        compare_runs(runs)


def test_doubled_ids_are_refused(runs, make):
    doubled = make.choices(0.8)
    doubled.loc[1, "id"] = doubled.loc[0, "id"]
    doubled.to_parquet(runs[1] / "samples" / "mmmu.parquet")
    with pytest.raises(UserError, match=r"mmmu\.parquet: id 'q0000' is doubled"):
        compare_runs(runs)


def test_samples_of_another_run_are_refused(runs, make):
    make.choices(0.1, seed=9).to_parquet(runs[1] / "samples" / "mmmu.parquet")
    with pytest.raises(UserError, match=r"better: mmmu: results\.json says .* its samples give"):
        compare_runs(runs)


def test_an_unknown_metric_is_shown_without_a_difference(runs):
    def add(results):
        metric = {"value": 0.5, "stderr": 0.1, "ci95": [0.4, 0.6], "higher_is_better": True}
        results["tasks"]["coco"]["metrics"]["BERTScore"] = metric

    edit(runs[1], add)
    found = scores(compare_runs(runs), "coco", "better")["BERTScore"]
    assert (found.value, found.difference) == (0.5, None)


def test_comparing_loads_no_torch(runs):
    code = (
        "import sys; from cwdpo_bench.leaderboards import *; "
        f"to_markdown(compare_runs({[str(run) for run in runs]!r})); "
        "print(sorted({'torch', 'transformers', 'matplotlib'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
