"""Images: files that are ones and files that are not, resizing, batches."""

import base64
import io
import os

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from glm_edge import configs, preprocess
from glm_edge.errors import DataError
from glm_edge.preprocess import media

pillow = pytest.importorskip("PIL.Image")
NANO = configs.preset("nano").vision
RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (12, 9, 3), dtype=np.uint8)


def encoded(pixels, format, **options):
    buffer = io.BytesIO()
    pillow.fromarray(pixels).save(buffer, format, **options)
    return buffer.getvalue()


def message(excinfo):
    text = str(excinfo.value)
    assert "\n" not in text
    return text


@pytest.mark.parametrize("format", ["PNG", "BMP", "TIFF", "WEBP"])
def test_lossless_files_are_read_exactly(tmp_path, format):
    (tmp_path / "a").write_bytes(encoded(PIXELS, format, lossless=True))
    image = preprocess.load_image(tmp_path / "a")
    assert image.dtype == np.uint8
    np.testing.assert_array_equal(image, PIXELS)


def test_grey_and_transparent_files_become_rgb(tmp_path):
    (tmp_path / "grey.png").write_bytes(encoded(PIXELS[..., 0], "PNG"))
    assert preprocess.load_image(tmp_path / "grey.png").shape == (12, 9, 3)
    rgba = np.dstack([PIXELS, np.full((12, 9), 255, np.uint8)])
    (tmp_path / "rgba.png").write_bytes(encoded(rgba, "PNG"))
    np.testing.assert_array_equal(preprocess.load_image(tmp_path / "rgba.png"), PIXELS)


def test_photos_are_turned_upright(tmp_path):
    exif = pillow.Exif()
    exif[0x0112] = 6
    (tmp_path / "a.png").write_bytes(encoded(PIXELS, "PNG", exif=exif))
    result = preprocess.load_image(tmp_path / "a.png")
    np.testing.assert_array_equal(result, np.rot90(PIXELS, -1))


@pytest.mark.parametrize(
    "content", [b"", b"RIFF....WAVEfmt ", b"not an image", b"\x89PNG\r\n\x1a\n"], ids=range(4)
)
def test_a_file_that_is_no_image_is_named(tmp_path, content):
    (tmp_path / "screen.png").write_bytes(content)
    with pytest.raises(DataError, match=r"screen\.png: ") as excinfo:
        preprocess.load_image(tmp_path / "screen.png")
    assert "image" in message(excinfo)


def test_missing_files_and_folders_are_named(tmp_path):
    with pytest.raises(DataError, match=r"absent\.png: cannot be read: No such file"):
        preprocess.load_image(tmp_path / "absent.png")
    with pytest.raises(DataError, match="is a directory"):
        preprocess.load_image(tmp_path)


@given(st.data())
def test_truncated_files_are_refused(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("cut") / "a"
    complete = encoded(PIXELS, data.draw(st.sampled_from(["PNG", "JPEG", "BMP"])))
    path.write_bytes(complete[: data.draw(st.integers(0, len(complete) // 2))])
    with pytest.raises(DataError) as excinfo:
        preprocess.load_image(path)
    assert str(path) in message(excinfo)


@given(st.data())
def test_changed_bytes_read_or_are_refused(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("flip") / "a"
    complete = bytearray(encoded(PIXELS, data.draw(st.sampled_from(["PNG", "JPEG", "BMP", "GIF"]))))
    for _ in range(3):
        complete[data.draw(st.integers(0, len(complete) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(complete)
    try:
        image = preprocess.load_image(path)
    except DataError:
        return
    assert image.ndim == 3


def test_sixteen_bit_images_are_refused(tmp_path):
    deep = RNG.integers(0, 65536, (4, 4)).astype(np.uint16)
    (tmp_path / "a.png").write_bytes(encoded(deep, "PNG"))
    with pytest.raises(DataError, match="8 bits per channel are needed"):
        preprocess.load_image(tmp_path / "a.png")


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_load_image_treats_every_source_alike(tmp_path, format):
    exif = pillow.Exif()
    exif[0x0112] = 8
    palette = pillow.fromarray(PIXELS).convert("P")
    buffer = io.BytesIO()
    palette.save(buffer, format, exif=exif)
    content = buffer.getvalue()
    (tmp_path / "a").write_bytes(content)
    url = f"data:image/x;base64,{base64.b64encode(content).decode()}"
    expected = np.rot90(np.asarray(palette.convert("RGB")), 1)
    sources = (tmp_path / "a", str(tmp_path / "a"), content, bytearray(content), url)
    for source in (*sources, pillow.open(io.BytesIO(content))):
        np.testing.assert_array_equal(media.open_image(source), expected)


def test_load_image_runs_no_program_of_a_file():
    postscript = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 5 5\n%%EndComments\nshowpage\n"
    with pytest.raises(DataError, match="not an image that Pillow reads"):
        preprocess.load_image(postscript)


@pytest.mark.parametrize("dtype", [np.uint16, np.float32, np.int32])
def test_load_image_refuses_deep_pixels_of_every_source(tmp_path, dtype):
    image = pillow.fromarray(np.ones((4, 5), dtype))
    image.save(tmp_path / "a.tiff")
    for source in (tmp_path / "a.tiff", (tmp_path / "a.tiff").read_bytes(), image):
        with pytest.raises(DataError, match="8 bits per channel are needed"):
            media.open_image(source)


def test_load_image_refuses_more_than_fifty_megapixels(tmp_path):
    width, height = 7200, 7000
    pillow.new("1", (width, height)).save(tmp_path / "a.png")
    for source in (tmp_path / "a.png", pillow.new("1", (width, height))):
        with pytest.raises(DataError, match=r"has 7200 x 7000 pixels; the limits are 50000000"):
            preprocess.load_image(source)
    with pytest.raises(DataError, match="65537 x 1 pixels"):
        preprocess.prepare_images(np.zeros((1, 65537, 3), np.uint8), NANO)


def test_pipes_and_devices_are_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", "/dev/zero"):
        for read in (preprocess.load_image, preprocess.load_wav):
            with pytest.raises(DataError, match="a pipe, socket or device"):
                read(path)


@pytest.mark.parametrize("size", [(12, 9), (24, 18), (6, 4), (5, 30), (37, 3), (1, 1)])
def test_resize_is_pillows_bicubic(size):
    actual = preprocess.resize(PIXELS / 255.0, size)
    for channel in range(3):
        plane = pillow.fromarray(PIXELS[..., channel].astype(np.float32) / 255.0)
        expected = np.asarray(plane.resize(size[::-1], pillow.Resampling.BICUBIC))
        np.testing.assert_allclose(actual[..., channel], np.clip(expected, 0, 1), atol=2e-6)


@pytest.mark.parametrize("size", [(192, 96), (701, 33), (40, 300)])
def test_resize_of_a_photo_is_pillows_with_the_height_first(size):
    photo = RNG.integers(0, 256, (700, 210, 3), dtype=np.uint8)
    actual = preprocess.resize(photo, size)
    for channel in range(3):
        plane = pillow.fromarray(photo[..., channel].astype(np.float32) / 255.0)
        tall = plane.resize((210, size[0]), pillow.Resampling.BICUBIC)
        expected = np.asarray(tall.resize(size[::-1], pillow.Resampling.BICUBIC))
        np.testing.assert_allclose(actual[..., channel], np.clip(expected, 0, 1), atol=2e-6)


@given(
    st.tuples(st.integers(1, 40), st.integers(1, 40)),
    st.tuples(st.integers(1, 40), st.integers(1, 40)),
    st.floats(0, 1, width=32),
)
def test_resize_keeps_a_flat_image_flat(source, target, value):
    resized = preprocess.resize(np.full((*source, 3), value, np.float32), target)
    assert resized.shape == (*target, 3)
    assert resized.dtype == np.float32
    np.testing.assert_allclose(resized, value, atol=1e-6)


def test_nanos_own_screens_pass_unchanged():
    screen = RNG.random((192, 96, 3), np.float32)
    batch = preprocess.prepare_images(screen, NANO)
    assert batch.shape == (1, 192, 96, 3)
    np.testing.assert_array_equal(batch[0], screen)


def test_images_of_different_sizes_and_types_become_one_batch():
    batch = preprocess.prepare_images([PIXELS, RNG.random((300, 150, 3)), PIXELS / 255.0], NANO)
    assert batch.shape == (3, 192, 96, 3)
    assert batch.dtype == np.float32
    assert 0 <= batch.min() <= batch.max() <= 1
    np.testing.assert_allclose(batch[0], batch[2], atol=1e-6)
    many = preprocess.prepare_images(RNG.random((4, 20, 10, 3)), NANO)
    assert many.shape == (4, 192, 96, 3)


@pytest.mark.parametrize(
    ("images", "pattern"),
    [
        ([], "the batch is empty"),
        ([PIXELS, np.zeros((4, 4))], r"images\[1\]: must be \[height, width, 3\], found \[4, 4\]"),
        ([np.zeros((4, 4, 4))], r"found \[4, 4, 4\]"),
        ([np.zeros((0, 4, 3))], r"found \[0, 4, 3\]"),
        ([np.zeros((4, 4, 3), np.int64)], "floats in 0..1 or uint8, found int64"),
        ([np.full((4, 4, 3), np.nan)], "contains NaN"),
        ([PIXELS.astype(np.float32)], r"values are in 0\.\.2\d\d; floats must be in 0\.\.1"),
        ([np.full((4, 4, 3), -0.1)], r"floats must be in 0\.\.1"),
    ],
    ids=range(8),
)
def test_arrays_that_are_no_images_are_refused(images, pattern):
    with pytest.raises(DataError, match=pattern) as excinfo:
        preprocess.prepare_images(images, NANO)
    assert "\n" not in message(excinfo)
