import io

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from cwdpo_bench.errors import UserError
from cwdpo_bench.evaluate.mmmu import load_mmmu, mmmu_prompt

ART = "mmmu/Art/validation-00000-of-00001.parquet"


def _edit(root, row, **values):
    path = root / ART
    table = pq.read_table(path)
    rows = table.to_pylist()
    rows[row].update(values)
    pq.write_table(pa.Table.from_pylist(rows, schema=table.schema), path)


def test_a_multiple_choice_prompt_is_lmms_evals():
    assert mmmu_prompt("What? <image 1>", ["a car", "a cat"], "multiple-choice") == (
        "What? <image 1>\nA. a car\nB. a cat\n\n"
        "Answer with the option's letter from the given choices directly."
    )


def test_an_open_prompt_is_lmms_evals():
    assert mmmu_prompt("How many?", [], "open") == (
        "How many?\n\nAnswer the question using a single word or phrase."
    )


def test_questions_carry_options_groups_and_gold(data_root):
    first, _, open_question, text_only = load_mmmu(data_root)

    assert first.id == "validation_Art_1"
    assert first.options == ("a car", "a cat", "None")
    assert first.gold == "B"
    assert first.groups == ("Art and Design", "Art")
    assert open_question.question_type == "open"
    assert open_question.options == ()
    assert open_question.gold == "['24/7', '3.429']"
    assert text_only.images == ()


def test_the_images_named_in_question_and_options_come_in_their_numbers_order(data_root):
    sample = load_mmmu(data_root)[1]

    colours = [Image.open(io.BytesIO(data)).getpixel((0, 0)) for data in sample.images]
    assert colours == [(255, 255, 0), (0, 0, 0)]
    assert "A. <image 2>\nB. <image 1>" in sample.prompt


@pytest.mark.parametrize(
    "options", ["a car, a cat", "['a'", "{'A': 'x'}", "['one']", "[['a'], 'b']", "__import__('os')"]
)
def test_unparsable_options_name_file_and_row(data_root, options):
    _edit(data_root, 1, options=options)

    with pytest.raises(UserError, match=r"parquet: row 1 \(id 'validation_Art_2'\): options"):
        load_mmmu(data_root)


@pytest.mark.parametrize("answer", ["D", "BB", "b", ""])
def test_an_answer_that_names_no_option_is_refused(data_root, answer):
    _edit(data_root, 0, answer=answer)

    with pytest.raises(UserError, match=r"row 0.*names no option; known: A, B, C"):
        load_mmmu(data_root)


def test_a_hidden_answer_says_to_use_validation(data_root):
    _edit(data_root, 0, answer="?")

    with pytest.raises(UserError, match="use the validation files"):
        load_mmmu(data_root)


def test_a_named_image_that_is_absent_is_refused(data_root):
    _edit(data_root, 0, image_1=None)

    with pytest.raises(UserError, match=r"row 0.*names <image 1>, that column is empty"):
        load_mmmu(data_root)


def test_an_unknown_question_type_is_refused(data_root):
    _edit(data_root, 0, question_type="multiple choice")

    with pytest.raises(UserError, match="did you mean 'multiple-choice'"):
        load_mmmu(data_root)


def test_an_unknown_subject_names_the_nearest(data_root):
    (data_root / "mmmu/Math").rename(data_root / "mmmu/Maths")

    with pytest.raises(UserError, match="unknown subject 'Maths'; did you mean 'Math'"):
        load_mmmu(data_root)


def test_a_broken_parquet_file_is_named(data_root):
    (data_root / ART).write_bytes(b"not parquet")

    with pytest.raises(UserError, match=r"Art/validation.*cannot be read as parquet"):
        load_mmmu(data_root)


def test_a_root_without_files_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"no <Subject>/validation-\*\.parquet"):
        load_mmmu(tmp_path)
