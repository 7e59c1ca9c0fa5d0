import pytest

from cwdpo_bench.errors import UserError
from cwdpo_bench.evaluate.mmbench import load_mmbench, mmbench_prompt

TSV = "mmbench/MMBench_DEV_EN_V11.tsv"


def _edit(root, row, **values):
    """Set cells of a row; `l2-category` is written `l2_category`."""
    path = root / TSV
    header, *rows = [line.split("\t") for line in path.read_text().splitlines()]
    for column, value in values.items():
        rows[row][header.index(column.replace("_", "-"))] = value
    path.write_text("\n".join("\t".join(cells) for cells in [header, *rows]) + "\n")


def test_the_prompt_is_lmms_evals():
    assert mmbench_prompt("Which?", ["red", "blue"], "Look.") == (
        "Look. Which? There are several options:\nA. red\nB. blue\n\n"
        "Answer with the option's letter from the given choices directly."
    )
    assert mmbench_prompt("Which?", ["red", "blue"]).startswith("Which? There are")


def test_every_order_of_a_question_keeps_its_right_text(data_root):
    orders = [s for s in load_mmbench(data_root) if s.cluster == "7"]

    assert [s.shift for s in orders] == [0, 1, 2]
    assert [s.options for s in orders] == [
        ("red", "white", "None"),
        ("white", "None", "red"),
        ("None", "red", "white"),
    ]
    assert [s.options["ABC".index(s.gold)] for s in orders] == ["white"] * 3


def test_empty_options_make_no_order_but_the_word_none_does(data_root):
    assert len([s for s in load_mmbench(data_root) if s.cluster == "9"]) == 2


def test_the_files_own_circular_copies_are_left_out(data_root):
    samples = load_mmbench(data_root)

    assert {s.cluster for s in samples} == {"7", "9"}
    assert len({s.id for s in samples}) == len(samples) == 5


def test_an_image_may_be_another_rows_index(data_root):
    samples = load_mmbench(data_root)

    assert len({s.images for s in samples}) == 1


def test_an_image_index_without_row_is_refused(data_root):
    _edit(data_root, 1, image="8")

    with pytest.raises(UserError, match="index 9: the image is that of row 8, not there"):
        load_mmbench(data_root)


def test_a_row_without_image_is_refused(data_root):
    _edit(data_root, 1, image="")

    with pytest.raises(UserError, match="index 9: no image"):
        load_mmbench(data_root)


def test_groups_are_category_and_ability(data_root):
    assert load_mmbench(data_root)[0].groups == ("colour", "attribute")


@pytest.mark.parametrize("answer", ["D", "E", "white"])
def test_an_answer_that_names_no_option_is_refused(data_root, answer):
    _edit(data_root, 0, answer=answer)

    with pytest.raises(UserError, match=f"index 7: answer '{answer}' names no option"):
        load_mmbench(data_root)


def test_a_hidden_answer_says_to_use_dev(data_root):
    _edit(data_root, 0, answer="")

    with pytest.raises(UserError, match=r"index 7: no answer.*use the dev file"):
        load_mmbench(data_root)


def test_a_doubled_index_is_refused(data_root):
    _edit(data_root, 1, index="7")

    with pytest.raises(UserError, match="index '7' is doubled"):
        load_mmbench(data_root)


def test_a_missing_column_is_named(data_root):
    path = data_root / TSV
    path.write_text(path.read_text().replace("\tanswer\t", "\tansver\t", 1))

    with pytest.raises(UserError, match="no column 'answer'"):
        load_mmbench(data_root)


def test_an_index_that_is_no_number_is_refused(data_root):
    _edit(data_root, 1, index="x9")

    with pytest.raises(UserError, match="row 1: index 'x9'"):
        load_mmbench(data_root)
