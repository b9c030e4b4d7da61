"""Decoding against Pillow where the references use it, against lookups by hand elsewhere; hostile files."""

import contextlib
import io
import struct
import zlib
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageFile

from ict_fast.data.sources.image_decoding import RejectedImage, decode_image, image_layout

RANDOM = np.random.default_rng(5)
PIXELS = RANDOM.integers(0, 256, (12, 16, 3), dtype=np.uint8)


def encode(image: Image.Image, kind: str, **options: Any) -> bytes:
    content = io.BytesIO()
    image.save(content, kind, **options)
    return content.getvalue()


def png(width: int, height: int, bits: int, colour: int, rows: bytes) -> bytes:
    """A PNG by the specification: `rows` are compressed, each begins with its filter, 0."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("kind", ["PNG", "BMP", "WEBP", "TIFF", "PPM"])
def test_formats_without_loss_come_back_exactly_or_are_refused(kind: str) -> None:
    options = {"lossless": True} if kind == "WEBP" else {}
    encoded = encode(Image.fromarray(PIXELS), kind, **options)
    if kind in ("TIFF", "PPM"):
        with pytest.raises(RejectedImage, match=r"not an image of a known format \(JPEG, PNG"):
            decode_image(encoded, 3)
    else:
        np.testing.assert_array_equal(np.asarray(decode_image(encoded, 3)), PIXELS)
        assert image_layout(encoded) == (16, 12, 3)


def test_a_jpeg_is_decoded_at_full_size_as_pillow_does() -> None:
    encoded = encode(Image.fromarray(PIXELS).resize((400, 300)), "JPEG", quality=90)
    with Image.open(io.BytesIO(encoded)) as image:
        expected = np.asarray(image.convert("RGB"))
        grey = np.asarray(image.convert("L"))
    np.testing.assert_array_equal(np.asarray(decode_image(encoded, 3)), expected)
    np.testing.assert_array_equal(np.asarray(decode_image(encoded, 1)), grey)


def test_grey_becomes_rgb_and_rgb_becomes_luma() -> None:
    grey = encode(Image.fromarray(PIXELS[..., 0]), "PNG")
    np.testing.assert_array_equal(np.asarray(decode_image(grey, 3)), PIXELS[..., :1].repeat(3, axis=2))
    assert image_layout(grey) == (16, 12, 1)
    luma = np.asarray(decode_image(encode(Image.fromarray(PIXELS), "PNG"), 1))
    assert np.abs(luma - PIXELS @ np.array([0.299, 0.587, 0.114])).max() <= 0.51  # ITU-R 601-2


def test_cmyk_is_converted_as_pillow_does() -> None:
    encoded = encode(Image.fromarray(PIXELS).convert("CMYK"), "JPEG", quality=100)
    with Image.open(io.BytesIO(encoded)) as image:
        assert image.mode == "CMYK"
        cmyk = np.asarray(image).astype(float)
    ours = np.asarray(decode_image(encoded, 3))
    expected = (255 - cmyk[..., :3]) * (255 - cmyk[..., 3:]) / 255
    assert np.abs(ours - expected).max() <= 1
    assert decode_image(encoded, 1).mode == "L"


@pytest.mark.parametrize("transparency", [None, 0, bytes(range(0, 200, 10))])
def test_a_palette_is_looked_up_and_its_transparency_dropped(
    transparency: int | bytes | None, recwarn
) -> None:
    palette = RANDOM.integers(0, 256, (20, 3), dtype=np.uint8)
    indices = RANDOM.integers(0, 20, (12, 16), dtype=np.uint8)
    image = Image.fromarray(indices).copy()
    image.putpalette(palette.tobytes())
    options = {} if transparency is None else {"transparency": transparency}
    encoded = encode(image, "PNG", **options)
    np.testing.assert_array_equal(np.asarray(decode_image(encoded, 3)), palette[indices])
    assert not list(recwarn)


def test_transparency_is_dropped_and_the_colour_beneath_it_shows() -> None:
    alpha = RANDOM.integers(0, 256, (12, 16, 1), dtype=np.uint8)
    encoded = encode(Image.fromarray(np.concatenate([PIXELS, alpha], axis=2)), "PNG")
    np.testing.assert_array_equal(np.asarray(decode_image(encoded, 3)), PIXELS)


@pytest.mark.parametrize("image_channels", [1, 3])
def test_sixteen_bits_keep_their_high_byte_in_grey_as_in_colour(image_channels: int) -> None:
    wide = RANDOM.integers(0, 65536, (12, 16, image_channels)).astype(">u2")
    rows = b"".join(b"\0" + row.tobytes() for row in wide)
    encoded = png(16, 12, 16, 0 if image_channels == 1 else 2, rows)
    ours = np.asarray(decode_image(encoded, image_channels)).reshape(wide.shape)
    np.testing.assert_array_equal(ours, wide >> 8)


def test_exif_orientation_is_ignored() -> None:
    image = Image.fromarray(PIXELS)
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees
    turned = decode_image(encode(image, "JPEG", exif=exif.tobytes()), 3)
    np.testing.assert_array_equal(np.asarray(turned), np.asarray(decode_image(encode(image, "JPEG"), 3)))


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP"])
def test_animations_are_rejected_and_single_frames_are_not(kind: str) -> None:
    frames = [Image.fromarray(PIXELS ^ value) for value in (0, 85, 255)]
    with pytest.raises(RejectedImage, match=r"^animated$"):
        decode_image(encode(frames[0], kind, save_all=True, append_images=frames[1:]), 3)
    assert decode_image(encode(frames[0], kind), 3).size == (16, 12)


def test_a_cameras_jpeg_with_a_preview_is_its_first_picture() -> None:
    first, preview = Image.fromarray(PIXELS), Image.fromarray(PIXELS[:6, :8])
    encoded = encode(first, "MPO", save_all=True, append_images=[preview])
    expected = np.asarray(decode_image(encode(first, "JPEG"), 3))
    np.testing.assert_array_equal(np.asarray(decode_image(encoded, 3)), expected)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP"])
def test_an_image_cut_anywhere_is_rejected(kind: str) -> None:
    encoded = encode(Image.fromarray(RANDOM.integers(0, 256, (40, 40, 3), dtype=np.uint8)), kind)
    for kept in (0, 1, 10, 30, len(encoded) // 2, len(encoded) * 9 // 10):
        with pytest.raises(RejectedImage, match=r"cannot be decoded|not an image of a known format"):
            decode_image(encoded[:kept], 3)
    assert not ImageFile.LOAD_TRUNCATED_IMAGES


@pytest.mark.parametrize("content", [b"", b"hello", b"%!PS-Adobe-3.0 EPSF-3.0\n", b"<svg/>", bytes(5000)])
def test_what_is_not_an_image_is_rejected_whatever_its_name(content: bytes) -> None:
    with pytest.raises(RejectedImage, match="not an image of a known format"):
        decode_image(content, 3)


@pytest.mark.parametrize("side", [8193, 9000, 9460, 20_000, 60_000])
def test_a_bomb_is_rejected_before_it_is_decoded(side: int) -> None:
    # Its rows are missing: decoding, if it came to that, would say so.
    with pytest.raises(RejectedImage, match="more than 67108864 pixels"):
        decode_image(png(side, side, 8, 2, b""), 3)
    with pytest.raises(RejectedImage, match="more than 67108864 pixels"):
        image_layout(png(side, side, 8, 2, b""))


def test_a_whole_bomb_of_81_megapixels_in_a_quarter_of_a_megabyte_is_rejected() -> None:
    encoded = png(9000, 9000, 8, 2, bytes(9000 * (3 * 9000 + 1)))
    assert len(encoded) < 250_000
    with pytest.raises(RejectedImage, match="9000x9000, more than"):
        decode_image(encoded, 3)


def test_bytes_changed_at_random_give_an_image_or_a_reason_and_nothing_else() -> None:
    for kind in ("JPEG", "PNG", "WEBP", "GIF", "BMP"):
        encoded = np.frombuffer(encode(Image.fromarray(PIXELS), kind), np.uint8)
        for _ in range(100):
            changed = encoded.copy()
            places = RANDOM.integers(0, len(changed), 3)
            changed[places] = RANDOM.integers(0, 256, 3)
            with contextlib.suppress(RejectedImage):
                assert decode_image(changed.tobytes(), 3).mode == "RGB"
