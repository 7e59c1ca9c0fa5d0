"""Test splits without answers: what is asked, and the files that the servers take."""

import base64
import csv
import io
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from cwdpo_bench.errors import UserError
from cwdpo_bench.evaluate.engine import ChoiceAnswer
from cwdpo_bench.evaluate.hidden import load_mmbench_test, load_mmmu_test, write_submission
from cwdpo_bench.evaluate.run import run_tasks

TSV = "mmbench/MMBench_TEST_EN_V11.tsv"


def png():
    buffer = io.BytesIO()
    Image.new("RGB", (32, 32), "red").save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def root(tmp_path):
    """A data root with the test splits: two questions of MMMU, one of MMBench with its copy."""
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    row = {
        "id": "test_Art_1",
        "question": "What is it? <image 1>",
        "options": "['a car', 'a cat']",
        "answer": "?",
        "question_type": "multiple-choice",
        "image_1": {"bytes": png(), "path": "1.png"},
    }
    rows = [row, {**row, "id": "test_Art_2", "options": "[]", "question_type": "open"}]
    schema = pa.schema([(k, image if k == "image_1" else pa.string()) for k in row])
    (tmp_path / "mmmu/Art").mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), tmp_path / "mmmu/Art/test-0.parquet")
    picture = base64.b64encode(png()).decode()
    lines = (
        "index|question|hint|A|B|C|D|category|l2-category|image|split",
        f"7|Which colour?|Look.|red|white|None||colour|attribute|{picture}|test",
        "1000007|Which colour?|Look.|white|None|red||colour|attribute|7|test",
    )
    (tmp_path / "mmbench").mkdir()
    (tmp_path / TSV).write_text("\n".join(lines).replace("|", "\t") + "\n")
    return tmp_path


def answers(*texts):
    return [ChoiceAnswer(text, None) for text in texts]


def test_mmmus_file_holds_letters_and_replies_by_id(root, tmp_path):
    samples = load_mmmu_test(root)
    rows, told = write_submission("mmmu", samples, answers("(B)", "it is 7"), tmp_path, root)

    written = json.loads((tmp_path / "submissions/mmmu_test.json").read_text())
    assert written == {"test_Art_1": "B", "test_Art_2": "it is 7"}
    assert "submissions/mmmu_test.json" in told[0]
    assert "gold" not in rows
    assert "correct" not in rows


def test_an_mmmu_reply_without_letter_is_an_empty_answer(root, tmp_path):
    write_submission("mmmu", load_mmmu_test(root), answers("none", ""), tmp_path, root)

    written = json.loads((tmp_path / "submissions/mmmu_test.json").read_text())
    assert written == {"test_Art_1": "", "test_Art_2": ""}


def test_mmbench_is_asked_row_by_row_with_its_copies(root):
    samples = load_mmbench_test(root)

    assert [s.id for s in samples] == ["7", "1000007"]
    assert {s.cluster for s in samples} == {"7"}
    assert samples[1].options == ("white", "None", "red")
    assert samples[0].images == samples[1].images
    assert samples[0].prompt.startswith("Look. Which colour? There are several options:\nA. red")


def test_mmbenchs_file_is_the_table_with_predictions(root, tmp_path):
    reply = 'B.\tI say "white"\nso'
    samples = load_mmbench_test(root)
    write_submission("mmbench", samples, answers(reply, "A"), tmp_path, root)

    with (tmp_path / "submissions/mmbench_test_en_v11.tsv").open(newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    assert [row["index"] for row in rows] == ["7", "1000007"]
    assert [row["prediction"] for row in rows] == [reply, "A"]
    assert {"question", "A", "B", "C", "D", "l2-category"} <= rows[0].keys()
    assert "image" not in rows[0]


def test_a_row_with_one_option_is_refused(root):
    path = root / TSV
    path.write_text(path.read_text().replace("white\tNone\tred", "white\t\t"))

    with pytest.raises(UserError, match="index 1000007: needs two options or more"):
        load_mmbench_test(root)


def test_a_run_leaves_the_files_and_the_share_of_failures(root, tiny_model_folder, tmp_path):
    run = run_tasks(
        tiny_model_folder,
        tasks=["mmmu-test", "mmbench-test"],
        data_root=root,
        output=tmp_path / "run",
    )

    assert list(run.results["tasks"]["mmmu-test"]["metrics"]) == ["parse_failures"]
    assert run.results["tasks"]["mmbench-test"]["n"] == 2
    assert len(list((tmp_path / "run/submissions").iterdir())) == 2
    assert "answers are hidden" in run.results["tasks"]["mmmu-test"]["warnings"][0]
