import json
from pathlib import Path

import pytest

from cwdpo_bench.errors import UserError
from cwdpo_bench.evaluate.coco import caption_prompt, load_coco, load_flickr30k

COCO = "coco/dataset_coco.json"


def _edit(root: Path, relative: str, change):
    path = root / relative
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_coco_yields_the_test_split_with_all_references(data_root):
    samples = load_coco(data_root)

    assert [s.id for s in samples] == ["101", "102", "103"]
    assert samples[0].references == ("a red thing number 1 .", "there is one thing , number 1")
    assert samples[0].prompt == caption_prompt()
    assert (data_root / samples[0].image).is_file()


def test_flickr30k_ids_are_the_photograph_numbers(data_root):
    samples = load_flickr30k(data_root)

    assert [s.id for s in samples] == ["1007129816", "101362133"]
    assert (data_root / samples[1].image).is_file()


def test_flickr30k_images_may_lie_in_images(data_root):
    home = data_root / "flickr30k"
    (home / "flickr30k-images").rename(home / "images")

    assert all((data_root / s.image).is_file() for s in load_flickr30k(data_root))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"dataset_coco\.json: no such file"):
        load_coco(tmp_path)


def test_broken_json_names_its_line(data_root):
    (data_root / COCO).write_text('{"images": [\n  {"split": ]}')

    with pytest.raises(UserError, match="line 2: not JSON"):
        load_coco(data_root)


@pytest.mark.parametrize("content", ["[]", "{}", '{"images": [1]}', '{"images": {}}'])
def test_json_of_another_form_is_refused(data_root, content):
    (data_root / COCO).write_text(content)

    with pytest.raises(UserError, match="needs an object with a list 'images'"):
        load_coco(data_root)


@pytest.mark.parametrize("raw", ["", "  \n", None, 3])
def test_an_empty_or_non_string_reference_names_its_image(data_root, raw):
    def empty(content):
        content["images"][2]["sentences"][0]["raw"] = raw

    _edit(data_root, COCO, empty)

    with pytest.raises(UserError, match=r"images\[2\].*000002\.jpg.*non-empty string"):
        load_coco(data_root)


def test_an_image_without_references_is_refused(data_root):
    _edit(data_root, COCO, lambda content: content["images"][2].update(sentences=[]))

    with pytest.raises(UserError, match=r"images\[2\].*no sentences"):
        load_coco(data_root)


def test_an_image_without_filename_is_refused(data_root):
    _edit(data_root, COCO, lambda content: content["images"][1].pop("filename"))

    with pytest.raises(UserError, match=r"images\[1\]: 'filename'"):
        load_coco(data_root)


def test_a_file_without_the_test_split_is_refused(data_root):
    _edit(data_root, COCO, lambda c: [image.update(split="train") for image in c["images"]])

    with pytest.raises(UserError, match="no image has split 'test'"):
        load_coco(data_root)
