import json

import pytest

from cwdpo_bench.errors import UserError
from cwdpo_bench.evaluate.nocaps import load_nocaps


def _edit(root, change):
    path = root / "nocaps/nocaps_val_4500_captions.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_images_carry_their_captions_and_domain(data_root):
    samples = load_nocaps(data_root)

    assert [s.groups for s in samples] == [("in-domain",), ("near-domain",), ("out-domain",)]
    assert samples[1].references == ("a near-domain", "one near-domain")
    assert all((data_root / s.image).is_file() for s in samples)


def test_an_unknown_domain_names_the_nearest(data_root):
    _edit(data_root, lambda c: c["images"][1].update(domain="neardomain"))

    with pytest.raises(UserError, match=r"images\[1\].*'neardomain'; did you mean 'near-domain'"):
        load_nocaps(data_root)


def test_an_image_without_captions_is_refused(data_root):
    _edit(data_root, lambda c: c["annotations"].__delitem__(slice(4, 6)))

    with pytest.raises(UserError, match=r"images\[2\]: no caption for image id 2"):
        load_nocaps(data_root)


def test_a_caption_without_image_is_refused(data_root):
    _edit(data_root, lambda c: c["annotations"][0].update(image_id=99))

    with pytest.raises(UserError, match="a caption names image id 99"):
        load_nocaps(data_root)


def test_a_doubled_image_is_refused(data_root):
    _edit(data_root, lambda c: c["images"].append(c["images"][0]))

    with pytest.raises(UserError, match=r"images\[3\].*image id 0.*doubled id"):
        load_nocaps(data_root)


@pytest.mark.parametrize("caption", ["", None, ["a cat"]])
def test_an_empty_or_non_string_caption_is_refused(data_root, caption):
    _edit(data_root, lambda c: c["annotations"][3].update(caption=caption))

    with pytest.raises(UserError, match=r"annotations\[3\].*non-empty string"):
        load_nocaps(data_root)


def test_a_file_without_annotations_is_refused(data_root):
    _edit(data_root, lambda c: c.pop("annotations"))

    with pytest.raises(UserError, match="needs a list 'annotations'"):
        load_nocaps(data_root)
