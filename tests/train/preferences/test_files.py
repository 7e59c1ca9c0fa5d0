"""Preference files made, filtered and mixed: rows kept whole, drops counted, images found again."""

import json
from collections import Counter

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from cwdpo_bench import cli
from cwdpo_bench.errors import UserError
from cwdpo_bench.train.data import read_pairs
from cwdpo_bench.train.preferences.easiness import Scores, easiness
from cwdpo_bench.train.preferences.files import (
    filter_file,
    mix_files,
    perturb_file,
    sample_file,
)
from cwdpo_bench.train.sections import Filter, Sampling
from cwdpo_bench.vlm import load_vlm


@pytest.fixture
def folder(tmp_path):
    """Captions of three images, the last of which no rule changes."""
    (tmp_path / "images").mkdir()
    chosen = ["a red car on the street.", "two dogs under a tree", "qwertz"] * 4
    rows = []
    for i, text in enumerate(chosen):
        Image.new("RGB", (84, 84), (20 * i, 90, 90)).save(tmp_path / "images" / f"{i}.png")
        rows.append(
            {
                "id": f"r{i}",
                "images": [f"images/{i}.png"],
                "prompt": "Caption?",
                "chosen": text,
                "rejected": f"something else {i}",
                "note": {"kept": i},
            }
        )
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path


@pytest.fixture(scope="module")
def vlm(tiny_model_folder):
    return load_vlm(tiny_model_folder)


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_perturbed_rows_keep_their_fields_and_say_what_changed(folder):
    output = folder / "out" / ".." / "negatives.jsonl"
    (folder / "out").mkdir()
    record = perturb_file(folder / "pairs.jsonl", output, {"replace_obj": 1, "add_att": 1})
    rows = lines(output)
    assert record["rows"] == 12
    assert record["written"] == len(rows) == 8
    assert record["dropped"] == {"no rule applies": 4}
    assert sum(record["kinds"].values()) == sum(record["edit_size"].values()) == 8
    assert all(row["negative"]["kind"] in record["kinds"] for row in rows)
    assert [row["note"] for row in rows] == [{"kept": i} for i in range(12) if i % 3 != 2]
    pairs = read_pairs(output).pairs
    assert all(pair.rejected != pair.chosen for pair in pairs)
    assert all(source.is_file() for pair in pairs for source in pair.images)


def test_images_must_lie_under_the_output(folder, tmp_path_factory):
    with pytest.raises(UserError, match="write it into"):
        perturb_file(
            folder / "pairs.jsonl",
            tmp_path_factory.mktemp("other") / "n.jsonl",
            {"replace_obj": 1},
        )


def test_output_is_json_lines(folder):
    with pytest.raises(UserError, match=r"name it \.jsonl"):
        perturb_file(folder / "pairs.jsonl", folder / "n.parquet", {"replace_obj": 1})


def test_sampled_answers_are_the_models_and_worse(folder, vlm):
    output = folder / "sampled.jsonl"
    record = sample_file(folder / "pairs.jsonl", output, vlm, Sampling(max_new_tokens=8), seed=3)
    assert record["written"] + sum(record["dropped"].values()) == 12
    again = folder / "again.jsonl"
    sample_file(folder / "pairs.jsonl", again, vlm, Sampling(max_new_tokens=8), seed=3)
    assert again.read_bytes() == output.read_bytes()
    assert {row["negative"]["source"] for row in lines(output)} == {"sample"}


def test_a_filter_drops_the_easiest(folder, vlm):
    output = folder / "kept.jsonl"
    record = filter_file(folder / "pairs.jsonl", output, vlm, Filter(quantile=0.5))
    assert record["dropped"] == {"extremely easy": 5}  # floor(0.5 · 11)
    assert len(lines(output)) == record["written"] == 7
    assert read_pairs(output).pairs


def test_mixed_rows_take_their_answers_in_stated_shares(folder):
    rows = lines(folder / "pairs.jsonl")
    many = [row | {"id": f"m{i}"} for i in range(40) for row in rows[:1]]
    for name in ("a", "b"):
        named = [row | {"rejected": f"{name} {row['id']}"} for row in many]
        (folder / f"{name}.jsonl").write_text(
            "\n".join(map(json.dumps, named[: 40 if name == "a" else 20]))
        )
    record = mix_files(
        [(folder / "a.jsonl", 1.0), (folder / "b.jsonl", 3.0)], folder / "mixed.jsonl", seed=5
    )
    found = Counter(row["rejected"][0] for row in lines(folder / "mixed.jsonl"))
    assert sum(found.values()) == 40
    # Twenty rows stand in both: a quarter of them comes from the first; the others only there.
    assert 10 <= found["b"] <= 19
    assert record["from"] == {str(folder / f"{n}.jsonl"): found[n] for n in sorted(found)}


def test_files_without_a_common_row_cannot_be_mixed(folder):
    row = lines(folder / "pairs.jsonl")[0] | {"id": "other"}
    (folder / "b.jsonl").write_text(json.dumps(row))
    with pytest.raises(UserError, match="no row with id and chosen"):
        mix_files([(folder / "pairs.jsonl", 1), (folder / "b.jsonl", 1)], folder / "m.jsonl")
    with pytest.raises(UserError, match="share above 0"):
        mix_files([(folder / "pairs.jsonl", 0)], folder / "m.jsonl")


# --- easiness ------------------------------------------------------------------------------------


def figures(folder, chosen, rejected):
    pairs = read_pairs(folder / "pairs.jsonl").pairs
    scores = Scores(*(torch.tensor(values, dtype=torch.float64) for values in (chosen, rejected)))
    return easiness(scores, pairs)


def test_easiness_against_closed_forms(folder):
    torch.manual_seed(0)
    chosen, rejected = -torch.rand(12).double(), -3 * torch.rand(12).double()
    found = figures(folder, chosen.tolist(), rejected.tolist())
    margin = chosen - rejected
    assert found.easy == pytest.approx(float((margin > 1).double().mean()))
    assert found.inverted == pytest.approx(float((margin < 0).double().mean()))
    assert found.floor == pytest.approx(float(rejected.mean()))
    assert found.tau == pytest.approx(float(rejected.std(correction=0)))
    weights = torch.sigmoid((rejected - rejected.mean()) / rejected.std(correction=0))
    assert found.cooling_mean == pytest.approx(float(weights.mean()))
    assert found.margin_quantiles["0.5"] == pytest.approx(float(margin.quantile(0.5)))


@pytest.mark.parametrize(
    ("chosen", "rejected", "said"),
    [
        ([-0.5] * 12, [-3.0, -4.0] * 6, "mostly easy: 100%"),
        ([-3.0] * 12, [-0.5, -0.6] * 6, "mostly inverted: the model prefers 100%"),
        ([-0.5] * 12, [-0.9, -0.4] * 6, "mixed"),
    ],
)
def test_the_verdict_names_what_prevails(folder, chosen, rejected, said):
    assert said in figures(folder, chosen, rejected).verdict


def test_near_copies_are_called_so(folder):
    rows = lines(folder / "pairs.jsonl")
    for row in rows:
        row |= {"chosen": "one two three four five", "rejected": "one two three four six"}
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = figures(folder, [-0.5] * 12, [-0.6, -0.7] * 6)
    assert found.alike == 1
    assert "mostly near copies: 100%" in found.verdict


# --- the command ---------------------------------------------------------------------------------


def run(*arguments):
    result = CliRunner().invoke(cli.app, ["negatives", *map(str, arguments)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def test_the_commands_go_together(folder, tiny_model_folder):
    data, model = folder / "pairs.jsonl", ["--model", tiny_model_folder]
    made = run(
        "perturb", data, "--output", folder / "p.jsonl", "--kinds", "replace_obj=1,add_att=1"
    )
    assert "p.jsonl: 8 of 12 rows" in made.stdout
    assert "dropped: 4: no rule applies" in made.stderr
    run("mix", f"{data}=0.5", f"{folder / 'p.jsonl'}=0.5", "--output", folder / "m.jsonl")
    run("filter", folder / "m.jsonl", *model, "--quantile", "0.2", "--output", folder / "f.jsonl")
    told = run("stats", folder / "f.jsonl", *model, "--output", folder / "stats", "--json")
    record = json.loads(told.stdout)
    assert record["pairs"] == len(lines(folder / "f.jsonl")) == 10
    assert json.loads((folder / "stats" / "easiness.json").read_text())["easy"] == record["easy"]
    assert (folder / "stats" / "easiness.png").stat().st_size > 5000
    assert "mean w_c before" in run("stats", folder / "f.jsonl", *model).stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("perturb {data} --output {out} --kinds replace_obj", "=share"),
        ("perturb {data} --output {out} --kinds swap=1", "swap_obj"),
        ("mix {data} --output {out}", "=share"),
        ("filter {data} --model demo --quantile 2 --output {out}", "--quantile"),
        ("sample {data} --model demo --temperature 0 --output {out}", "--temperature"),
    ],
)
def test_a_mistake_gets_one_clear_error(folder, arguments, said):
    filled = arguments.format(data=folder / "pairs.jsonl", out=folder / "out.jsonl")
    with pytest.raises(UserError, match=said):
        run(*filled.split())
    assert not (folder / "out.jsonl").exists()
