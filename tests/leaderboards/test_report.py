"""The report as data and as text: what it says follows from the runs, whatever they lack."""

import base64
import html
import io
import json
import re
import urllib.error
import urllib.request
from pathlib import Path
from threading import Thread

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from cwdpo_bench.calibration import ece
from cwdpo_bench.errors import UserError
from cwdpo_bench.evaluate.results import read_run
from cwdpo_bench.leaderboards import build_report, compare_runs
from cwdpo_bench.leaderboards.gate import run_gate
from cwdpo_bench.leaderboards.report_calibration import calibration_of, option_probabilities
from cwdpo_bench.leaderboards.report_dynamics import draw_strips, read_recipes
from cwdpo_bench.leaderboards.report_pictures import Wanted, gather_pictures
from cwdpo_bench.leaderboards.report_samples import choose, dumps, task_samples
from cwdpo_bench.leaderboards.report_server import HOST, report_server
from cwdpo_bench.leaderboards.report_verdict import headline, judge_systems

HOSTILE = "</script><script>alert(1)</script> \"'& \u202egnirts \u2028"


def blocks(page):
    """The data blocks of a page by their id."""
    found = re.findall(r'<script type="application/json" id="([^"]+)">(.*?)</script>', page)
    return {name: json.loads(text) for name, text in found}


# --- the whole page ------------------------------------------------------------------------------


def test_the_page_holds_every_answer_and_asks_nothing_of_the_network(runs) -> None:
    page = html.unescape(build_report(runs))
    assert set(re.findall(r"https?://[^\s\"'<>]+", page)) == set()
    assert "default-src 'none'" in page
    coco, mmmu = blocks(page)["samples-0"], blocks(page)["samples-1"]
    assert coco["systems"] == ["base", "better", "copy"]
    assert len(coco["rows"]) == 60
    assert len(mmmu["rows"]) == 120
    table = read_run(runs[1]).samples("mmmu").set_index("id")
    row = mmmu["rows"][5]
    reply, right, odds, parsed = row["a"][1]
    own = table.loc[row["id"]]
    assert (reply, parsed, bool(right)) == (own["prediction"], own["parsed"], own["correct"])
    assert odds == pytest.approx(np.exp(own["option_log_probabilities"] + 0.1), abs=1e-4)


def test_the_same_runs_give_the_same_bytes(runs) -> None:
    assert build_report(runs) == build_report(runs, comparison=compare_runs(runs))


def test_hostile_names_and_captions_cannot_leave_their_place(make, tmp_path) -> None:
    samples = make.captions()
    samples["prediction"] = HOSTILE
    for place, name in enumerate(("base", "<b>bold</b>")):
        make.save(tmp_path / str(place), name, {"coco": make.task(samples)})
    page = build_report([tmp_path / "0", tmp_path / "1"], title="<i>title</i>")
    assert "<b>" not in page
    assert "<i>" not in page
    assert page.count("<script") == page.count("</script>") == 2
    # The text itself is whole, with what turns the direction of writing spelt out.
    caption = blocks(page)["samples-0"]["rows"][0]["a"][0][0]
    assert caption == HOSTILE.replace("\u202e", "\\u202e")


def test_one_run_alone_is_shown_without_differences(runs) -> None:
    page = build_report(runs[:1])
    assert "there is nothing to compare it with" in page
    assert "there are no differences" in page
    assert len(blocks(page)) == 2


def test_runs_without_probabilities_say_so(make, tmp_path) -> None:
    samples = make.captions().drop(columns=["token_confidences", "token_correct"])
    for name in ("a", "b"):
        make.save(
            tmp_path / name, name, {"coco": make.task(samples.drop(columns="token_entropies"))}
        )
    page = build_report([tmp_path / "a", tmp_path / "b"])
    assert "there is nothing to calibrate" in page
    choices = make.choices().drop(columns=["option_log_probabilities", "option_correct"])
    make.save(tmp_path / "c", "c", {"mmmu": make.task(choices, "mmmu")})
    page = build_report([tmp_path / "c"])
    assert "there is nothing to calibrate" in page
    assert blocks(page)["samples-0"]["rows"][0]["a"][0][2] is None


def test_seeds_of_a_system_are_one_card_that_the_gate_judges(runs) -> None:
    (ours,) = judge_systems(compare_runs({"base": [runs[0]], "ours": runs[1:]}))
    assert ours.verdict == run_gate(runs[1:], [runs[0]]).verdict != "not judged"


def test_a_task_that_the_baseline_lacks_is_shown(make, tmp_path) -> None:
    make.save(tmp_path / "a", "a", {"coco": make.task(make.captions())})
    both = {"coco": make.task(make.captions(0.7)), "mmmu": make.task(make.choices(), "mmmu")}
    make.save(tmp_path / "b", "b", both)
    page = build_report([tmp_path / "a", tmp_path / "b"])
    assert blocks(page)["samples-1"]["systems"] == ["b"]


def test_only_shared_samples_are_shown_where_the_runs_intersect(make, tmp_path) -> None:
    make.save(tmp_path / "a", "a", {"coco": make.task(make.captions())})
    make.save(tmp_path / "b", "b", {"coco": make.task(make.captions()[10:])})
    page = build_report([tmp_path / "a", tmp_path / "b"], on_mismatch="intersect")
    assert len(blocks(page)["samples-0"]["rows"]) == 50


def test_a_checkpoint_of_no_system_is_refused(runs, tmp_path) -> None:
    with pytest.raises(UserError, match="did you mean 'better'"):
        build_report(runs, checkpoints={"beter": tmp_path})
    with pytest.raises(UserError, match="several seeds"):
        build_report({"base": [runs[0]], "ours": runs[1:]}, checkpoints={"ours": tmp_path})


def test_a_policy_of_ones_own_is_followed_and_a_broken_one_refused(runs, tmp_path) -> None:
    policy = tmp_path / "gate.yaml"
    policy.write_text("rules: [{metric: CIDEr, max_drop: 1000, detect: 8}]")
    page = build_report([runs[1], runs[0]], policy=policy)
    assert "with gate.yaml" in page
    assert "passes" in page
    with pytest.raises(UserError, match=r"missing.yaml"):
        build_report(runs, policy=tmp_path / "missing.yaml")


# --- the verdict ---------------------------------------------------------------------------------


def test_the_verdict_is_the_gates(runs) -> None:
    verdicts = judge_systems(compare_runs([runs[1], runs[0]]))
    (worse,) = verdicts
    assert worse.verdict == "regression"
    assert "coco CIDEr" in worse.reason
    assert any(finding.verdict == "worse" for finding in worse.findings)
    assert headline(verdicts, "better") == ["Worse than better beyond the gate's limits: base."]
    better = judge_systems(compare_runs([runs[0], runs[1]]))
    assert headline(better, "base")[-1].endswith("worse on none: better.")
    same = judge_systems(compare_runs([runs[0], runs[2]]))
    assert [v.verdict for v in same] == ["pass"]


# --- calibration ---------------------------------------------------------------------------------


def test_diagrams_are_those_of_the_metrics(make) -> None:
    samples = make.choices()
    samples["temperature"] = 2.0
    look = calibration_of([samples])
    before, after = look.diagrams
    logps = np.stack(samples["option_log_probabilities"].to_list())
    for diagram, scores in ((before, logps), (after, logps / 2.0)):
        odds = np.exp(scores) / np.exp(scores).sum(1, keepdims=True)
        right = odds.argmax(1) == [ord(g) - 65 for g in samples["gold"]]
        assert diagram.error == pytest.approx(ece(odds.max(1), right))
        assert diagram.bins.counts.sum() == 120
    assert look.temperature == 2.0
    assert look.risk is not None
    assert look.risk.risk[-1] == pytest.approx(1 - samples["option_correct"].mean())


def test_questions_of_different_numbers_of_options_and_open_ones() -> None:
    samples = pd.DataFrame(
        {"option_log_probabilities": [[-1.0, -1.0], None, [-2.0, -2.0, -2.0, -2.0]]}
    )
    two, none, four = option_probabilities(samples)
    assert two == pytest.approx([0.5, 0.5])
    assert none is None
    assert four == pytest.approx([0.25] * 4)


def test_tokens_of_captions_give_a_diagram(make) -> None:
    samples = make.captions()
    (diagram,) = calibration_of([samples, samples]).diagrams
    assert (diagram.unit, diagram.bins.counts.sum()) == ("tokens", 600)


# --- dynamics ------------------------------------------------------------------------------------


def write_checkpoint(folder: Path, *, verdict: str = "squeezing") -> Path:
    folder.mkdir(parents=True)
    steps = [0, 4, 8, 0, 4, 8]
    rows = pd.DataFrame(
        {
            "stage": ["stage1"] * 3 + ["stage2"] * 3,
            "step": steps,
            "total_step": [0, 4, 8, 8, 12, 16],
            "chosen_mean_logp": [-0.5, -0.6, -0.7, -0.7, -0.9, -1.2],
            "rejected_mean_logp": np.linspace(-2, -4, 6),
            "argmax_mean_logp": np.linspace(-0.4, -0.1, 6),
            "token_ece": [0.1] * 6,
            **{f"cooling_weight_bin_{k}": [np.nan] * 3 + [0.1] * 3 for k in range(10)},
        }
    )
    rows.to_parquet(folder / "dynamics.parquet")
    told = {
        "name": verdict,
        "sentence": f"{verdict}: so",
        "evidence": {"first_step": 4, "last_step": 8},
    }
    healthy = {"name": "healthy", "sentence": "healthy", "evidence": {}}
    record = {
        "verdict": told,
        "stages": {"stage1": {"verdict": healthy}, "stage2": {"verdict": told}},
    }
    (folder / "provenance.json").write_text(json.dumps(record))
    return folder


def test_curves_are_found_beside_the_checkpoint_that_the_run_names(make, tmp_path) -> None:
    folder = write_checkpoint(tmp_path / "ckpt")
    run = make.save(
        tmp_path / "a", "a", {"coco": make.task(make.captions())}, checkpoint=str(folder)
    )
    recipes, notes = read_recipes({"a": read_run(run)})
    (recipe,) = recipes
    assert notes == []
    assert recipe.moment is not None
    # Of the second stage, which begins at step 8 of the run.
    assert (recipe.moment.first, recipe.moment.last) == (12.0, 16.0)
    strips = draw_strips(recipes)
    titles = [strip.title for strip in strips]
    assert titles == [
        *("log p a token", "log p a token, rejected", "token ECE"),
        "w_c: cooling weights of the pairs",
    ]
    assert "moment squeezing" in strips[0].panels[0]
    page = build_report([run])
    assert "squeezing: so" in page


def test_what_has_no_curves_is_told(make, tmp_path) -> None:
    named = {
        "empty": tmp_path / "empty",
        "broken": tmp_path / "broken",
        "other": tmp_path / "other",
    }
    for folder in named.values():
        folder.mkdir()
    (named["broken"] / "dynamics.parquet").write_text("no parquet")
    pd.DataFrame({"loss": [1.0]}).to_parquet(named["other"] / "dynamics.parquet")
    run = make.save(tmp_path / "a", "a", {"coco": make.task(make.captions())})
    runs = dict.fromkeys((*named, "nowhere"), read_run(run))
    recipes, notes = read_recipes(runs, named)
    assert recipes == []
    told = dict(note.split(": ", 1) for note in notes)
    assert "holds no dynamics.parquet" in told["empty"]
    assert "cannot be read as parquet" in told["broken"]
    assert "no stage, step, total_step" in told["other"]
    assert "names no checkpoint" in told["nowhere"]


# --- samples and pictures ------------------------------------------------------------------------


def test_what_differs_most_stays_when_the_page_would_grow_too_large(make) -> None:
    base, other = make.captions(), make.captions()
    other.loc[other["id"].isin(["7", "33"]), "CIDEr"] += 3.0
    task = task_samples("coco", {"base": base, "other": other}, "base")
    kept, wanted = choose([task], budget=sum(sorted(task.sizes)[-2:]) + 40)
    assert kept == {"coco": [7, 33]}
    assert set(wanted) == {Wanted("coco", "7"), Wanted("coco", "33")}
    every, _ = choose([task])
    assert every == {"coco": list(range(60))}


def test_replies_of_tasks_with_scores_of_their_own_are_sorted_by_these(make, tmp_path) -> None:
    for name, gain in (("a", 0.0), ("b", 1.0)):
        samples = make.choices().drop(columns=["parsed", "correct"])
        samples["lmms:error:lower"] = pd.Series([gain, *[None] * 2, *[2.0] * 117], dtype=object)
        make.save(tmp_path / name, name, {"lmms:x": make.task(samples, "lmms:x")})
    page = build_report([tmp_path / "a", tmp_path / "b"])
    (shown,) = blocks(page).values()
    assert (shown["kind"], shown["metric"], shown["sign"]) == ("replies", "lmms:error:lower", -1)
    assert [answer[1] for answer in shown["rows"][0]["a"]] == [0.0, 1.0]
    assert [answer[1] for answer in shown["rows"][1]["a"]] == [None, None]
    assert "lmms:x lmms:error:lower" in page


def test_rows_of_other_orders_are_matched_by_id(make) -> None:
    base = make.captions()
    shuffled = base.sample(frac=1.0, random_state=0)
    task = task_samples("coco", {"base": base, "other": shuffled}, "base")
    assert all(row["a"][0] == row["a"][1] for row in task.rows)


def test_data_blocks_hold_no_sign_of_markup() -> None:
    text = dumps({"a": HOSTILE})
    assert not set("<>&\u2028") & set(text)
    assert json.loads(text) == {"a": HOSTILE}


def test_pictures_shrink_to_their_budget_and_those_left_out_are_told(make, tmp_path) -> None:
    ids = [str(n) for n in range(60)]
    run = read_run(make.save(tmp_path / "a", "a", {"coco": make.task(make.captions())}))
    wanted = [Wanted("coco", name) for name in ids]
    reader = make.pictures(ids, size=(400, 300))
    whole = gather_pictures(wanted, {"coco": run}, reader, tmp_path)
    assert (len(whole.encoded), whole.edge, whole.notes) == (60, 320, [])
    budget = sum(map(len, whole.encoded)) // 4
    small = gather_pictures(wanted, {"coco": run}, reader, tmp_path, budget)
    assert small.edge < 320
    assert sum(map(len, small.encoded)) <= budget
    least = gather_pictures(wanted, {"coco": run}, reader, tmp_path, budget // 20)
    assert 0 < len(least.encoded) < 60
    assert least.of[wanted[0]] == [0]
    assert f"{60 - len(least.encoded)} of 60 pictures are left out" in least.notes[0]
    with Image.open(io.BytesIO(base64.b64decode(least.encoded[0]))) as image:
        assert max(image.size) == least.edge


def test_pictures_that_are_not_there_are_told(make, tmp_path) -> None:
    ids = [str(n) for n in range(60)]
    wanted = [Wanted("coco", name) for name in ids]
    run = read_run(make.save(tmp_path / "a", "a", {"coco": make.task(make.captions())}))
    assert gather_pictures(wanted, {"coco": run}, None).notes == ["no pictures, as asked"]
    reader = make.pictures(ids, broken=("3", "4"))
    assert "names no data root" in gather_pictures(wanted, {"coco": run}, reader).notes[0]
    gone = gather_pictures(wanted, {"coco": run}, reader, tmp_path / "gone")
    assert "holds no data of coco" in gone.notes[0]
    found = gather_pictures(wanted, {"coco": run}, reader, tmp_path)
    assert found.notes == ["2 of 60 pictures could not be opened (3 is broken)"]
    assert found.of[Wanted("coco", "3")] == []


# --- serving -------------------------------------------------------------------------------------


def test_the_page_is_served_to_this_machine_alone() -> None:
    with report_server("<p>hello</p>") as server:
        Thread(target=server.serve_forever, daemon=True).start()
        try:
            address = f"http://{HOST}:{server.server_port}/"
            assert server.server_address[0] == "127.0.0.1"
            with urllib.request.urlopen(address) as answer:
                assert answer.read() == b"<p>hello</p>"
            with pytest.raises(urllib.error.HTTPError, match="404"):
                urllib.request.urlopen(f"{address}etc/passwd")
            other = urllib.request.Request(address, headers={"Host": "evil.example"})
            with pytest.raises(urllib.error.HTTPError, match="403"):
                urllib.request.urlopen(other)
        finally:
            server.shutdown()
