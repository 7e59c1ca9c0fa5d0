"""Every kind of bad row: one error that names file, line and field with the mend; none is a crash.

The table is the specification. Each kind stands in the second line of a file whose first line is
good; `data.on_bad_row=skip` leaves the good one and counts the other. What is acceptable stands
in a table of its own below, and so does what makes a whole file unreadable.
"""

from __future__ import annotations

import base64
import json
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from cwdpo_bench.errors import UserError
from cwdpo_bench.train import sources
from cwdpo_bench.train.data import read_pairs

GOOD = {"images": ["a.png"], "prompt": "What is it?", "chosen": "A cat.", "rejected": "A dog."}
USER, ASSISTANT = {"role": "user"}, {"role": "assistant"}


def png_header(width: int, height: int) -> bytes:
    """A whole PNG of a stated size whose pixels are a few bytes: a bomb where the size is large."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    body = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0" * 64)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A data folder with good images and bad ones, beside a file that is none of its business."""
    data = tmp_path / "data"
    data.mkdir()
    Image.new("RGB", (8, 8), (10, 20, 30)).save(data / "a.png")
    Image.new("RGB", (8, 8)).save(tmp_path / "outside.png")
    (data / "text.png").write_text("not an image")
    (data / "empty.png").write_bytes(b"")
    (data / "cut.png").write_bytes((data / "a.png").read_bytes()[:20])
    (data / "folder.png").mkdir()
    (data / "link.png").symlink_to(tmp_path / "outside.png")
    (data / "loop.png").symlink_to(data / "loop.png")
    (data / "nowhere.png").symlink_to(data / "nothing.png")
    (data / "bomb.png").write_bytes(png_header(60_000, 60_000))
    (data / "large.png").write_bytes(png_header(10_000, 10_000))
    (data / "no-pixels.png").write_bytes(png_header(0, 0))
    os.mkfifo(data / "pipe.png")
    return data


def without(*fields: str) -> dict[str, Any]:
    return {key: value for key, value in GOOD.items() if key not in fields}


def of(**fields: Any) -> dict[str, Any]:
    return {**GOOD, **fields}


def line(row: dict[str, Any]) -> bytes:
    return json.dumps(row).encode()


POVID = {
    "image": "a.png",
    "conversations": [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "a cat"}],
    "rejected_conversations": [
        {"from": "human", "value": "What?"},
        {"from": "gpt", "value": "a dog"},
    ],
}
RATED = [
    {"response": text, "annotations": {"Helpfulness": {"Rating": rating}}}
    for text, rating in (("a cat", "5"), ("a dog", "1"))
]
FEEDBACK = {"img_path": "a.png", "prompt": "What?", "completions": RATED}
RLHFV = {"image": "a.png", "text": {"question": "What?", "chosen": "a cat", "rejected": "a dog"}}
RLAIFV = {"image": "a.png", "question": "What?", "chosen": "a cat", "rejected": "a dog"}
CREPE = {"filename": "a.png", "caption": "a cat", "negative_caption": "a dog"}

BAD: dict[str, tuple[dict[str, Any] | bytes, str]] = {
    # --- the line
    "cut off": (line(GOOD)[:40], "not JSON"),
    "no JSON": (b"chosen: a cat", "not JSON"),
    "a list where a row is meant": (b"[" + line(GOOD) + b"]", "a list of rows is read from a file"),
    "a text": (b'"A cat."', "not a JSON object"),
    "a number": (b"7", "not a JSON object"),
    "null": (b"null", "not a JSON object"),
    "single quotes": (b"{'chosen': 'A cat.'}", "not JSON"),
    "a comma at the end": (line(GOOD)[:-1] + b",}", "not JSON"),
    "two rows in a line": (line(GOOD) + line(GOOD), "not JSON"),
    "NaN": (line(of(chosen=float("nan"))), "NaN is no JSON number"),
    "infinity in a field of the user's": (line(of(score=float("inf"))), "Infinity is no JSON"),
    "latin-1": (line(GOOD).replace(b"cat", b"caf\xe9"), "not UTF-8"),
    "UTF-16": (json.dumps(GOOD).encode("utf-16"), "not UTF-8"),
    "a mark of byte order within": (b"\xef\xbb\xbf" + line(GOOD), "not JSON"),
    "nested beyond all bounds": (b'{"a":' * 100_000, "not JSON"),
    "a number of endless digits": (b'{"id": ' + b"9" * 5000 + b"}", "not JSON"),
    # --- prompt
    "no prompt": (without("prompt"), "field prompt: missing"),
    "null prompt": (of(prompt=None), "field prompt: missing"),
    "empty prompt": (of(prompt=""), "field prompt: empty"),
    "blank prompt": (of(prompt=" \n\t"), "field prompt: empty"),
    "prompt of a number": (of(prompt=3), "field prompt: neither text nor"),
    "prompt of an object": (of(prompt={"role": "user"}), "field prompt: neither text nor"),
    "no turn in the prompt": (of(prompt=[]), "field prompt: not one message"),
    "the assistant's prompt": (of(prompt=[{**ASSISTANT, "content": "x"}]), "role 'user'"),
    "two turns in the prompt": (of(prompt=[{**USER, "content": "x"}] * 2), "field prompt: not one"),
    "a turn that is a text": (of(prompt=["What?"]), "field prompt: not one message"),
    "a turn without content": (of(prompt=[USER]), "field prompt: neither text nor"),
    "a part whose text is a number": (
        of(prompt=[{**USER, "content": [{"type": "text", "text": 3}]}]),
        "field prompt: a part's text",
    ),
    "nothing but an image in the prompt": (of(prompt="<image>"), "field prompt: nothing but"),
    "more places than images": (of(prompt="<image><image>What?"), "holds 2 <image> and the row 1"),
    "fewer places than images": (
        of(images=["a.png"] * 2, prompt="<image>What?"),
        "holds 1 <image>",
    ),
    "more image parts than images": (
        of(prompt=[{**USER, "content": [{"type": "image"}] * 2 + [{"type": "text", "text": "x"}]}]),
        "holds 2 <image> and the row 1 images",
    ),
    # --- answers
    "no chosen": (without("chosen"), "field chosen: missing"),
    "empty chosen": (of(chosen=""), "field chosen: empty"),
    "empty list chosen": (of(chosen=[]), "field chosen: not one message"),
    "chosen of a list of texts": (of(chosen=["A cat."]), "field chosen: not one message"),
    "chosen of a flag": (of(chosen=True), "field chosen: neither text"),
    "the user's answer": (of(chosen=[{**USER, "content": "A cat."}]), "role 'assistant'"),
    "an empty part": (of(chosen=[{**ASSISTANT, "content": []}]), "field chosen: empty"),
    "content nested twice": (of(chosen=[[{**ASSISTANT, "content": "x"}]]), "field chosen: not one"),
    "no rejected": (without("rejected"), "field rejected: missing"),
    "blank rejected": (of(rejected="  "), "field rejected: empty"),
    "rejected of an object": (of(rejected={"a": 1}), "field rejected: neither text"),
    "equal answers": (of(rejected="A cat."), "fields chosen and rejected: the same"),
    "equal but for case, space and stop": (of(rejected=" a   CAT\n"), "the same answer"),
    "NUL in an answer": (of(chosen="A\0cat."), "field chosen: holds a NUL"),
    "half a character": (b'{"prompt": "x", "chosen": "\\ud83d", "rejected": "y"}', "surrogate"),
    "empty correction": (of(corrected=" "), "field corrected: empty"),
    "correction of nothing": (of(rejected=None, corrected="A cat"), "field rejected: missing"),
    "paraphrase of a number": (of(paraphrase=1), "field paraphrase: neither text"),
    "empty other meaning": (of(other_meaning=""), "field other_meaning: empty"),
    "references of a text": (of(references="A cat."), "field references: not a list"),
    "empty references": (of(references=[]), "field references: empty"),
    "a reference that is none": (of(references=["A cat.", None]), "field references: not a list"),
    # --- id
    "id of a list": (of(id=[1]), "field id: not a string"),
    "id of a flag": (of(id=True), "field id: not a string"),
    "id of a fraction": (of(id=1.5), "field id: not a string"),
    "empty id": (of(id=""), "field id: empty"),
    "the id of the first row": (of(id="1"), "'1' stands at {file}: line 1 too"),
    # --- images
    "image of a number": (of(images=[3]), "field images: neither a path nor bytes"),
    "images of an object without path": (of(images={"x": 1}), "field images: neither a path"),
    "images in a list in a list": (of(images=[["a.png"]]), "field images: neither a path"),
    "an empty path": (of(images=[""]), "field images: an empty path"),
    "NUL in a path": (of(images=["a\0.png"]), "is no path"),
    "half a character in a path": (of(images=["\ud800.png"]), "is no path"),
    "a path that is too long": (of(images=["a" * 5000 + ".png"]), "is no path"),
    "missing image": (of(images=["none.png"]), "'none.png' does not exist"),
    "a link to nowhere": (of(images=["nowhere.png"]), "'nowhere.png' does not exist"),
    "a link to itself": (of(images=["loop.png"]), "field images: 'loop.png'"),
    "a link out of the folder": (of(images=["link.png"]), "leaves"),
    "a path out of the folder": (of(images=["../outside.png"]), "leaves"),
    "an absolute path": (of(images=["/etc/passwd"]), "leaves"),
    "an address": (of(images=["https://example.org/a.png"]), "is an address; bring the image"),
    "a file address": (of(images=["file:///etc/passwd"]), "is an address"),
    "a folder": (of(images=["folder.png"]), "is a folder or no plain file"),
    "a pipe": (of(images=["pipe.png"]), "is a folder or no plain file"),
    "an empty file": (of(images=["empty.png"]), "'empty.png' is not an image"),
    "a text file": (of(images=["text.png"]), "'text.png' is not an image"),
    "a header that is cut off": (of(images=["cut.png"]), "'cut.png' is not an image"),
    "no pixels": (of(images=["no-pixels.png"]), "'no-pixels.png'"),
    "a bomb": (of(images=["bomb.png"]), "'bomb.png' is too large to decode"),
    "a large image": (of(images=["large.png"]), "10000x10000 pixels, more than the limit"),
    "base64 that is none": (of(images=["data:image/png;base64,?"]), "and base64 text behind it"),
    "data without base64": (of(images=["data:image/png,abc"]), "not data:image"),
    "base64 of no image": (of(images=["data:image/png;base64,YWJj"]), "the image is not an image"),
    "base64 of a bomb": (
        of(
            images=[
                "data:image/png;base64," + base64.b64encode(png_header(60_000, 60_000)).decode()
            ]
        ),
        "the image is too large",
    ),
    "missing image of the rejected answer": (of(rejected_images=["no.png"]), "rejected_images"),
    "the same image for both answers": (of(rejected_images=["a.png"]), "the same images"),
    # --- public layouts
    "RLHF-V without an answer": ({**RLHFV, "text": {"question": "What?"}}, "field text"),
    "RLHF-V of a list": ({**RLHFV, "text": "[]"}, "field text"),
    "RLHF-V that is no JSON": ({**RLHFV, "text": "{"}, "field text"),
    "RLHF-V with a number": (
        {**RLHFV, "text": {**RLHFV["text"], "chosen": 3}},  # type: ignore[dict-item]
        "field chosen: neither text",
    ),
    "RLAIF-V without rejected": (
        {k: v for k, v in RLAIFV.items() if k != "rejected"},
        "field rejected: missing",
    ),
    "RLAIF-V with an empty question": ({**RLAIFV, "question": ""}, "field prompt: empty"),
    "POVID with one turn": (
        {**POVID, "conversations": POVID["conversations"][:1]},
        "not one question",
    ),
    "POVID the other way round": (
        {**POVID, "conversations": POVID["conversations"][::-1]},
        "the turns are ['gpt', 'human']",
    ),
    "POVID of texts": ({**POVID, "conversations": ["What?", "a cat"]}, "not one question"),
    "POVID with a number": (
        {**POVID, "conversations": [{"from": "human", "value": 1}, {"from": "gpt", "value": 2}]},
        "a turn is no text",
    ),
    "POVID with other questions": (
        {
            **POVID,
            "rejected_conversations": [
                {"from": "human", "value": "Who?"},
                POVID["conversations"][1],
            ],
        },
        "another question",
    ),
    "VLFeedback without completions": ({**FEEDBACK, "completions": []}, "completions: empty"),
    "VLFeedback of texts": ({**FEEDBACK, "completions": ["a cat"]}, "rated annotations"),
    "VLFeedback of a number": ({**FEEDBACK, "completions": 3}, "rated annotations"),
    "VLFeedback of uneven columns": (
        {**FEEDBACK, "completions": {"response": ["a", "b"], "annotations": [{}]}},
        "completions",
    ),
    "VLFeedback rated in words": (
        {**FEEDBACK, "completions": [{**RATED[0], "annotations": {"x": {"Rating": "N/A"}}}]},
        "rated annotations",
    ),
    "VLFeedback all rated alike": ({**FEEDBACK, "completions": RATED[:1] * 2}, "rated alike"),
    "VLFeedback with an empty response": (
        {**FEEDBACK, "completions": [RATED[0], {**RATED[1], "response": ""}]},
        "field rejected: empty",
    ),
    "mDPO without its image": (
        {**without("images"), "img_path": "no.png"},
        "'no.png' does not exist",
    ),
    "SugarCrepe without its caption": ({**CREPE, "caption": ""}, "field chosen: empty"),
    "SugarCrepe twice the same": ({**CREPE, "negative_caption": "A cat"}, "the same answer"),
    "implicit prompts that differ": (
        {
            "chosen": [{**USER, "content": "What?"}, {**ASSISTANT, "content": "a cat"}],
            "rejected": [{**USER, "content": "Who?"}, {**ASSISTANT, "content": "a dog"}],
        },
        "begin with another user's turn",
    ),
    "a row of nothing": ({}, "field prompt: missing"),
}


def file_with(folder: Path, row: dict[str, Any] | bytes, name: str = "pairs.jsonl") -> Path:
    file = folder / name
    file.write_bytes(line(GOOD) + b"\n" + (row if isinstance(row, bytes) else line(row)) + b"\n")
    return file


def test_there_are_enough_kinds() -> None:
    assert len(BAD) >= 40


@pytest.mark.parametrize("name", BAD)
def test_a_bad_row_stops_with_its_place_and_the_mend(name: str, folder: Path) -> None:
    row, words = BAD[name]
    file = file_with(folder, row)
    with pytest.raises(UserError) as error:
        read_pairs(file)
    message = str(error.value)
    assert message.startswith(f"{file}: line 2: ")
    assert words.replace("{file}", str(file)) in message
    assert "mend the row, or skip such rows with data.on_bad_row=skip" in message
    assert "\n" not in message
    message.encode()


@pytest.mark.parametrize("name", BAD)
def test_a_bad_row_can_be_skipped_and_is_counted(name: str, folder: Path) -> None:
    data = read_pairs(file_with(folder, BAD[name][0]), on_bad_row="skip")
    assert [pair.chosen for pair in data.pairs] == ["A cat."]
    assert sum(data.dropped.values()) == 1


# --- what is acceptable --------------------------------------------------------------------------


def saved(make: Callable[[], Image.Image], name: str, **settings: Any) -> Callable[[Path], str]:
    def save(folder: Path) -> str:
        make().save(folder / name, **settings)
        return name

    return save


def sixteen_bit() -> Image.Image:
    return Image.fromarray(np.full((8, 8), 128 * 257, np.uint16))


def animated() -> Image.Image:
    return Image.new("RGB", (8, 8), (255, 0, 0))


FRAMES = {"save_all": True, "append_images": [Image.new("RGB", (8, 8), (0, 0, 255))]}
PICTURES: dict[str, tuple[Callable[[Path], str], tuple[int, int, int] | None]] = {
    "an animation is its first picture": (saved(animated, "x.gif", **FRAMES), (255, 0, 0)),
    "CMYK": (saved(lambda: Image.new("CMYK", (8, 8)), "x.jpg"), None),
    "sixteen bits a pixel keep their brightness": (saved(sixteen_bit, "x.png"), (128, 128, 128)),
    "a palette": (saved(lambda: Image.new("P", (8, 8)), "x.png"), None),
    "with transparency": (
        saved(lambda: Image.new("RGBA", (8, 8), (9, 8, 7, 255)), "x.png"),
        (9, 8, 7),
    ),
    "grey": (saved(lambda: Image.new("L", (8, 8), 77), "x.png"), (77, 77, 77)),
    "black and white": (saved(lambda: Image.new("1", (8, 8), 1), "x.png"), (255, 255, 255)),
    "one pixel": (saved(lambda: Image.new("RGB", (1, 1), (1, 2, 3)), "x.png"), (1, 2, 3)),
    "another ending than its format's": (
        saved(lambda: Image.new("RGB", (8, 8), (1, 2, 3)), "x.jpeg", format="PNG"),
        (1, 2, 3),
    ),
    "a path with dots within the folder": (lambda folder: "folder.png/../a.png", (10, 20, 30)),
    "an absolute path within the folder": (lambda folder: str(folder / "a.png"), (10, 20, 30)),
    "letters of any script": (
        saved(lambda: Image.new("RGB", (8, 8), (1, 2, 3)), "Bild ä 图.png"),
        (1, 2, 3),
    ),
    "data in base64": (
        lambda folder: (
            "data:image/png;base64," + base64.b64encode((folder / "a.png").read_bytes()).decode()
        ),
        (10, 20, 30),
    ),
}


@pytest.mark.parametrize("name", PICTURES)
def test_an_acceptable_image_is_opened(name: str, folder: Path) -> None:
    make, color = PICTURES[name]
    file = file_with(folder, {**GOOD, "images": [make(folder)]})
    image = read_pairs(file).pairs[1].open().images[0]
    assert image.mode == "RGB"
    assert color is None or image.getpixel((0, 0)) == color


ROWS: dict[str, dict[str, Any] | bytes] = {
    "no image": without("images"),
    "no images": of(images=[]),
    "null images": of(images=None),
    "one image without a list": of(images="a.png"),
    "several images": of(images=["a.png", "a.png"]),
    "a place for each image": of(images=["a.png"] * 2, prompt="<image> and <image>: what?"),
    "the form of datasets": of(images=[{"bytes": None, "path": "a.png"}]),
    "a number for an id": of(id=7),
    "fields of the user's own": of(score=0.5, note={"deep": [1, None]}),
    "letters of any script": of(chosen="一只猫 🐈"),
    "escaped pairs of surrogates": b'{"prompt": "x", "chosen": "\\ud83d\\ude00", "rejected": "y"}',
    "a tab in an answer": of(chosen="A\tcat."),
    "line breaks of another system": line(GOOD) + b"\r",
    "spaces around": b"  " + line(GOOD) + b"  ",
    "an answer of a megabyte": of(chosen="cat " * 250_000),
}


@pytest.mark.parametrize("name", ROWS)
def test_an_acceptable_row_is_read(name: str, folder: Path) -> None:
    assert len(read_pairs(file_with(folder, ROWS[name])).pairs) == 2


def test_places_of_images_are_taken_out_of_the_prompt(folder: Path) -> None:
    row = of(images=["a.png"] * 2, prompt="<image>\n<image>\nWhat?")
    assert read_pairs(file_with(folder, row)).pairs[1].prompt == "What?"


def test_a_file_may_begin_with_a_mark_of_byte_order_and_hold_blank_lines(folder: Path) -> None:
    (folder / "x.jsonl").write_bytes(b"\xef\xbb\xbf" + line(GOOD) + b"\n\n \n" + line(of(id="b")))
    assert [pair.id for pair in read_pairs(folder / "x.jsonl").pairs] == ["1", "b"]


def test_ids_may_not_be_doubled_however_they_come(folder: Path) -> None:
    rows = [of(id="b"), GOOD, of(id=2)]
    (folder / "x.jsonl").write_bytes(b"\n".join(map(line, rows)))
    with pytest.raises(UserError, match=r"line 3: field id: '2' stands at .*line 2 too"):
        read_pairs(folder / "x.jsonl")
    (folder / "x.jsonl").write_bytes(b"\n".join(map(line, [of(id=2), GOOD])))
    with pytest.raises(UserError, match=r"line 2: field id: '2' stands at .*line 1 too"):
        read_pairs(folder / "x.jsonl")


def test_a_line_without_end_is_left_after_its_beginning(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "LONGEST_LINE", 1000)
    row = of(chosen="cat " * 10_000)
    (folder / "x.jsonl").write_bytes(b"\n".join([line(GOOD), line(row), line(of(id="b"))]))
    data = read_pairs(folder / "x.jsonl", on_bad_row="skip")
    assert data.dropped == {"too long": 1}
    assert [pair.id for pair in data.pairs] == ["1", "b"]


# --- whole files ---------------------------------------------------------------------------------

FILES: dict[str, tuple[str, bytes, str]] = {
    "an empty file": ("x.jsonl", b"", "no usable row"),
    "blank lines alone": ("x.jsonl", b"\n \n", "no usable row"),
    "a list that is cut off": (
        "x.json",
        b"[\n" + line(GOOD) + b",\n" + line(GOOD)[:30],
        "line 3: not JSON",
    ),
    "an object that is cut off": ("x.json", b'{"0": {"caption":\n "a cat"', "line 2: not JSON"),
    "a document in another encoding": (
        "x.json",
        json.dumps([GOOD]).encode("utf-16"),
        "write UTF-8",
    ),
    "NaN in a document": ("x.json", b'[{"chosen": NaN}]', "NaN is no JSON number"),
    "a document nested beyond all bounds": ("x.json", b"[" * 100_000, "nested too deeply"),
    "a document of a number": ("x.json", b"7", "not a JSON object"),
    "a list of numbers": ("x.json", b"[1, 2]", "row 1: the row is no JSON object"),
    "parquet that is none": ("x.parquet", b"PAR1nonsense", "not a parquet file"),
    "an empty parquet": ("x.parquet", b"", "not a parquet file"),
    "another ending": ("x.csv", b"a,b\n", "not .jsonl, .parquet or a datasets folder"),
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_cannot_be_read_is_one_clear_error(name: str, tmp_path: Path) -> None:
    file, content, words = FILES[name]
    (tmp_path / file).write_bytes(content)
    with pytest.raises(UserError) as error:
        read_pairs(tmp_path / file)
    assert str(tmp_path / file) in str(error.value)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_a_folder_of_nothing_and_a_missing_file_are_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"not a folder written by datasets\.save_to_disk"):
        read_pairs(tmp_path)
    with pytest.raises(UserError, match=r"none\.jsonl: no such preference data"):
        read_pairs(tmp_path / "none.jsonl")


TABLES: dict[str, tuple[list[Any], str]] = {
    "bytes of no image": ([b"no image"], "row 2: field image[s]?: the image is not an image"),
    "no bytes": ([b""], "row 2: field image[s]?: the image is not an image"),
    "bytes of a bomb": ([png_header(60_000, 60_000)], "row 2: .* too large"),
}


@pytest.mark.parametrize("name", TABLES)
def test_bad_images_within_a_table_are_found_by_their_header(name: str, folder: Path) -> None:
    (bad,), words = TABLES[name]
    good = (folder / "a.png").read_bytes()
    rows = [{**without("images"), "image": data} for data in (good, bad)]
    pd.DataFrame(rows).to_parquet(folder / "x.parquet")
    with pytest.raises(UserError, match=words):
        read_pairs(folder / "x.parquet")
    assert read_pairs(folder / "x.parquet", on_bad_row="skip").dropped.keys() <= {
        "broken image",
        "image too large",
    }


def test_missing_values_of_a_table_are_missing_fields(folder: Path) -> None:
    rows = [GOOD, {**GOOD, "chosen": None}]
    pd.DataFrame(rows).to_parquet(folder / "x.parquet")
    with pytest.raises(UserError, match="row 2: field chosen: missing"):
        read_pairs(folder / "x.parquet")
