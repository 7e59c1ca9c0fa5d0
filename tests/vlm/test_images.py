"""Images: decoded to RGB, bounded, inside their root, one clear error a fault."""

from __future__ import annotations

import base64
import io
import struct
import zlib
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageFile
from PIL.PngImagePlugin import PngInfo
from sklearn.datasets import load_sample_images

from cwdpo_bench.errors import UserError
from cwdpo_bench.vlm import image_to_send, images, open_image


def _png(mode: str = "RGB") -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, (6, 4)).save(buffer, format="PNG")
    return buffer.getvalue()


def _noise() -> bytes:
    buffer = io.BytesIO()
    Image.effect_noise((64, 64), 90).save(buffer, format="PNG")
    return buffer.getvalue()


def _bomb(width: int, height: int) -> bytes:
    """A PNG whose header promises a huge picture in a few bytes."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(b"\0"))]
    packed = (
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P", "1", "LA"])
def test_every_mode_becomes_rgb(mode: str) -> None:
    assert open_image(_png(mode), name="x").mode == "RGB"


def test_path_bytes_and_base64_give_the_same_picture(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(_png())
    text = base64.b64encode(_png()).decode()
    pictures = [
        open_image(Path("a.png"), name="x", root=tmp_path),
        open_image(_png(), name="x"),
        open_image(text, name="x"),
    ]
    assert len({picture.tobytes() for picture in pictures}) == 1


def test_a_real_photograph_opens(tmp_path: Path) -> None:
    Image.fromarray(load_sample_images().images[0]).save(tmp_path / "photo.jpg")
    assert open_image(tmp_path / "photo.jpg", name="photo").size == (640, 427)


@pytest.mark.parametrize("size", [(100_000, 100_000), (2**31 - 1, 2**31 - 1), (8001, 8000)])
def test_a_bomb_is_refused_by_its_header(size: tuple[int, int]) -> None:
    with pytest.raises(UserError, match=r"row 3.*pixels|row 3.*large"):
        open_image(_bomb(*size), name="row 3")


@pytest.mark.parametrize("data", [b"", b"text", _png()[:40], _noise()[:300]])
def test_broken_bytes_name_the_sample(data: bytes) -> None:
    with pytest.raises(UserError, match="row 3"):
        open_image(data, name="row 3")


def test_a_cut_off_image_is_refused_whatever_another_library_wants(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    with pytest.raises(UserError, match="row 3"):
        open_image(_noise()[:300], name="row 3")
    assert ImageFile.LOAD_TRUNCATED_IMAGES is True


def test_text_that_is_no_base64_is_refused() -> None:
    with pytest.raises(UserError, match="not base64"):
        open_image("&&&", name="row 3")


@pytest.mark.parametrize("path", ["../a.png", "/etc/hostname", "b/../../a.png", "link.png"])
def test_no_path_leaves_the_root(path: str, tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    (tmp_path / "a.png").write_bytes(_png())
    (root / "link.png").symlink_to(tmp_path / "a.png")
    with pytest.raises(UserError, match="leaves the data folder"):
        open_image(Path(path), name="row 3", root=root)


def test_a_missing_image_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"row 3.*none\.png does not exist"):
        open_image(Path("none.png"), name="row 3", root=tmp_path)


# --- for another program -------------------------------------------------------------------------


def _file(kind: str, image: Image.Image | None = None, **settings: Any) -> bytes:
    buffer = io.BytesIO()
    (image or Image.effect_noise((64, 48), 90)).save(buffer, kind, **settings)
    return buffer.getvalue()


@pytest.mark.parametrize(("kind", "named"), [("JPEG", "image/jpeg"), ("PNG", "image/png")])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_plain_files_are_sent_as_they_are(kind: str, named: str, mode: str) -> None:
    data = _file(kind, Image.effect_noise((64, 48), 90).convert(mode))
    assert image_to_send(data, name="x") == (named, data)


def _with_exif() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    return _file("JPEG", exif=exif)


def _with_words() -> bytes:
    words = PngInfo()
    words.add_text("Author", "someone")
    return _file("PNG", pnginfo=words)


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(_with_exif(), id="exif"),
        pytest.param(_with_words(), id="words"),
        pytest.param(_file("JPEG", comment=b"at home"), id="comment"),
        pytest.param(_file("JPEG", Image.new("CMYK", (9, 9))), id="cmyk"),
        pytest.param(_png("RGBA"), id="transparent"),
        pytest.param(_png("P"), id="palette"),
        pytest.param(_file("WEBP"), id="webp"),
        pytest.param(_file("GIF"), id="gif"),
    ],
)
def test_all_else_is_sent_as_png_of_our_pixels(data: bytes) -> None:
    kind, sent = image_to_send(data, name="x")
    assert (kind, sent[:4]) == ("image/png", b"\x89PNG")
    ours = open_image(data, name="x")
    with Image.open(io.BytesIO(sent)) as theirs:
        assert (theirs.mode, theirs.tobytes()) == ("RGB", ours.tobytes())
        assert not theirs.info


def test_a_file_that_is_too_large_is_not_sent_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    data = _file("JPEG")
    monkeypatch.setattr(images, "MAX_SENT", len(data) - 1)
    assert image_to_send(data, name="x")[0] == "image/png"


def test_what_is_broken_is_not_sent() -> None:
    with pytest.raises(UserError, match="x: image is broken"):
        image_to_send(_noise()[:-600], name="x")
