"""Every kind of image file is read as RGB uint8, and the mask lies where the annotation tool showed it."""

import cv2
import numpy as np
import pytest
from conftest import FAST, box, script, write_coco

HEIGHT, WIDTH = 60, 90


def picture(height=HEIGHT, width=WIDTH):
    """RGB uint8 without any symmetry: the corners are red, green, blue and white, the rest is a ramp."""
    rows, columns = np.mgrid[:height, :width]
    image = np.stack([rows * 200 // height, columns * 200 // width, (rows + columns) % 50], axis=-1).astype(np.uint8)
    third = min(height, width) // 3
    image[:third, :third] = 255, 0, 0
    image[:third, -third:] = 0, 255, 0
    image[-third:, :third] = 0, 0, 255
    image[-third:, -third:] = 255, 255, 255
    return image


def write(path, pixels, options=()):
    """Write OpenCV's channel order (grey, BGR or BGRA)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(cv2.imencode(path.suffix.lower(), pixels, options)[1].tobytes())
    return path


def palette_png(path, indices, colours):
    """A palette PNG, made by hand: uint8 indices [H, W] and RGB colours [N, 3]."""
    import struct
    import zlib

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    height, width = indices.shape
    rows = b"".join(b"\0" + row.tobytes() for row in indices)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 3, 0, 0, 0))
                     + chunk(b"PLTE", colours.tobytes()) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b""))
    return path


def read(path, *size):
    image = script.read_image(path, *size)
    assert image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3
    return image


# --- kinds of pixels


def test_rgb_png_keeps_its_channels(tmp_path):
    np.testing.assert_array_equal(read(write(tmp_path / "a.png", picture()[..., ::-1])), picture())


def test_grey_png_has_three_equal_channels(tmp_path):
    grey = picture()[..., 0]
    np.testing.assert_array_equal(read(write(tmp_path / "a.png", grey)), np.stack([grey] * 3, axis=-1))


def test_transparency_is_dropped(tmp_path):
    alpha = np.zeros((HEIGHT, WIDTH, 1), np.uint8)
    rgba = np.concatenate([picture()[..., ::-1], alpha], axis=-1)
    np.testing.assert_array_equal(read(write(tmp_path / "a.png", rgba)), picture())


def test_palette_png_becomes_its_colours(tmp_path):
    colours = np.array([[0, 0, 0], [250, 10, 20], [30, 240, 50]], np.uint8)
    indices = np.arange(HEIGHT * WIDTH, dtype=np.uint32).reshape(HEIGHT, WIDTH).astype(np.uint8) % 3
    np.testing.assert_array_equal(read(palette_png(tmp_path / "a.png", indices, colours)), colours[indices])


@pytest.mark.parametrize("low, high", [(0, 65535), (1000, 5000), (100, 300)])
def test_16_bit_grey_is_scaled_by_its_own_range(low, high, tmp_path):
    deep = np.linspace(low, high, HEIGHT * WIDTH).reshape(HEIGHT, WIDTH).astype(np.uint16)
    image = read(write(tmp_path / "a.png", deep))
    expected = (deep.astype(float) - low) / (high - low) * 255
    assert np.abs(image - expected[..., None]).max() <= 1
    assert image.min() == 0 and image.max() == 255


def test_16_bit_rgb_keeps_its_colours(tmp_path):
    deep = picture()[..., ::-1].astype(np.uint16) * 100 + 7
    assert np.abs(read(write(tmp_path / "a.png", deep)).astype(int) - picture()).max() <= 1


def test_a_constant_16_bit_image_is_one_grey(tmp_path):
    image = read(write(tmp_path / "a.png", np.full((HEIGHT, WIDTH), 700, np.uint16)))
    assert image.min() == image.max()


@pytest.mark.parametrize("suffix", [".png", ".bmp", ".tif", ".tiff", ".webp", ".jpg", ".jpeg", ".PNG", ".JPG", ".Jpeg"])
def test_every_suffix_is_read_in_every_case(suffix, tmp_path):
    options = [cv2.IMWRITE_WEBP_QUALITY, 101] if suffix == ".webp" else [cv2.IMWRITE_JPEG_QUALITY, 100]
    image = read(write(tmp_path / f"a{suffix}", picture()[..., ::-1], options if suffix != ".bmp" else ()))
    assert np.abs(image.astype(int) - picture()).mean() < 5


def test_a_path_with_chinese_letters(tmp_path):
    np.testing.assert_array_equal(read(write(tmp_path / "脑 瘤/图.png", picture()[..., ::-1])), picture())


# --- EXIF orientation

# What a viewer does with the stored pixels for each value of the tag (EXIF 2.32, section 4.6.4).
TURN = {
    1: lambda image: image,
    2: np.fliplr,
    3: lambda image: np.rot90(image, 2),
    4: np.flipud,
    5: lambda image: image.transpose(1, 0, 2),
    6: lambda image: np.rot90(image, -1),
    7: lambda image: np.rot90(image, 2).transpose(1, 0, 2),
    8: lambda image: np.rot90(image, 1),
}


def exif_jpeg(path, image, orientation):
    """A JPEG of RGB pixels with an EXIF orientation, its segment made by hand after the start marker."""
    jpeg = cv2.imencode(".jpg", image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 100])[1].tobytes()
    tag = bytes.fromhex("0112 0003 00000001") + orientation.to_bytes(2, "big") + b"\0\0"
    tiff = b"MM\0*" + (8).to_bytes(4, "big") + b"\0\1" + tag + bytes(4)
    content = b"Exif\0\0" + tiff
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(jpeg[:2] + b"\xff\xe1" + (len(content) + 2).to_bytes(2, "big") + content + jpeg[2:])
    return path


def assert_same_picture(image, expected):
    assert image.shape == expected.shape
    assert np.abs(image.astype(int) - expected).mean() < 6  # JPEG is not exact; a wrong turn differs by more than 20


@pytest.mark.parametrize("orientation", TURN)
def test_orientation_is_applied_without_a_size(orientation, tmp_path):
    path = exif_jpeg(tmp_path / "a.jpg", picture(), orientation)
    assert_same_picture(read(path), TURN[orientation](picture()))


@pytest.mark.parametrize("orientation", TURN)
def test_orientation_is_applied_when_the_json_has_the_turned_size(orientation, tmp_path):
    path = exif_jpeg(tmp_path / "a.jpg", picture(), orientation)
    expected = TURN[orientation](picture())
    assert_same_picture(read(path, *expected.shape[:2]), expected)


@pytest.mark.parametrize("orientation", [5, 6, 7, 8])
def test_orientation_is_left_out_when_the_json_has_the_stored_size(orientation, tmp_path):
    path = exif_jpeg(tmp_path / "a.jpg", picture(), orientation)
    assert_same_picture(read(path, HEIGHT, WIDTH), picture())


@pytest.mark.parametrize("orientation", TURN)
def test_orientation_of_a_square_cannot_be_decided_and_is_applied(orientation, tmp_path):
    square = picture(72, 72)
    path = exif_jpeg(tmp_path / "a.jpg", square, orientation)
    assert_same_picture(read(path, 72, 72), TURN[orientation](square))


@pytest.mark.parametrize("orientation", TURN)
def test_a_size_that_fits_neither_way_leaves_the_orientation_applied(orientation, tmp_path):
    path = exif_jpeg(tmp_path / "a.jpg", picture(), orientation)
    assert_same_picture(read(path, 33, 77), TURN[orientation](picture()))


def test_the_pictures_of_this_file_tell_all_orientations_apart():
    turned = [turn(picture(72, 72)).astype(int) for turn in TURN.values()]
    differences = [np.abs(a - b).mean() for i, a in enumerate(turned) for b in turned[:i]]
    assert min(differences) > 20


# --- the mask lies on the tumour


def tumour(height, width, x, y):
    """A dark picture with one bright box of 20x12 pixels, and its polygon."""
    image = np.full((height, width, 3), 30, np.uint8)
    image[y:y + 12, x:x + 20] = 220
    return image, box(x, y, 20, 12)


def assert_mask_on_tumour(folder, name, height, width, polygon):
    write_coco(folder, [{"id": 1, "file_name": name, "height": height, "width": width}],
               [{"id": 1, "image_id": 1, "category_id": 1, "segmentation": [polygon]}])
    dataset = script.BrainTumorDataset(folder, 64, normalize=False)
    image, mask = dataset.sample(0)
    assert image.shape == (64, 64, 3) and mask.shape == (64, 64)
    bright = image[..., 0] > 128
    overlap = (bright & (mask > 0)).sum() / (bright | (mask > 0)).sum()
    assert overlap > 0.85, overlap


@pytest.mark.parametrize("tool_turns", [True, False], ids=["tool turns the picture", "tool does not"])
@pytest.mark.parametrize("orientation", TURN)
def test_mask_lies_on_the_tumour_whatever_the_orientation(orientation, tool_turns, tmp_path):
    if not tool_turns and orientation < 5:
        tool_turns = True  # the size cannot tell: these are taken as turned
    shown, polygon = tumour(*((90, 60) if tool_turns and orientation >= 5 else (60, 90)), 8, 40)
    if tool_turns:  # the tool shows the turned picture; what lies in the file turns into it
        undo = {6: 8, 8: 6}.get(orientation, orientation)
        stored = TURN[undo](shown)
    else:
        stored = shown
    exif_jpeg(tmp_path / "train/a.jpg", np.ascontiguousarray(stored), orientation)
    assert_mask_on_tumour(tmp_path / "train", "a.jpg", *shown.shape[:2], polygon)


@pytest.mark.parametrize("size", [(64, 64), (60, 90), (200, 50), (640, 480), (31, 33)])
def test_mask_lies_on_the_tumour_for_every_size(size, tmp_path):
    image, polygon = tumour(*size, 8, 12)
    write(tmp_path / "train/a.png", image)
    assert_mask_on_tumour(tmp_path / "train", "a.png", *size, polygon)


def test_mask_is_stretched_when_the_file_has_another_size(tmp_path):
    image, _ = tumour(120, 180, 40, 60)
    write(tmp_path / "train/a.png", image)
    assert_mask_on_tumour(tmp_path / "train", "a.png", 60, 90, box(20, 30, 10, 6))


def test_one_folder_may_mix_kinds_and_sizes(tmp_path, capfd):
    """Grey, RGBA, palette, 16 bit, a turned JPEG and capital suffixes in one split, through the audit."""
    grey, polygon = tumour(80, 100, 10, 20)
    files = {"grey.png": grey[..., 0], "alpha.PNG": np.concatenate([grey, grey[..., :1]], axis=-1),
             "deep.png": grey[..., 0].astype(np.uint16) * 9, "photo.JPG": grey}
    for split in ("train", "valid"):
        for number, (name, pixels) in enumerate(files.items()):
            write(tmp_path / split / name, pixels + number + 10 * (split == "valid"))
        palette_png(tmp_path / split / "palette.png", grey[..., 0] // 220 + 2 * (split == "valid"),
                    np.array([[9, 9, 9], [200, 200, 200], [8, 8, 8], [190, 190, 190]], np.uint8))
        exif_jpeg(tmp_path / split / "turned.jpeg", np.ascontiguousarray(np.rot90(grey, 1)) + (split == "valid"), 6)
        names = [*files, "palette.png", "turned.jpeg"]
        write_coco(tmp_path / split, [{"id": n, "file_name": name, "height": 80, "width": 100}
                                      for n, name in enumerate(names)],
                   [{"id": n, "image_id": n, "category_id": 1, "segmentation": [polygon]} for n in range(len(names))])
        dataset = script.BrainTumorDataset(tmp_path / split, 64, normalize=False)
        for index in range(len(names)):
            image, mask = dataset.sample(index)
            assert image[mask > 0].mean() > 3 * image[mask == 0].mean(), names[index]
    assert script.main([*FAST, "--data-dir", str(tmp_path), "--output-dir", str(tmp_path / "out"), "--audit"]) == 0
    out = capfd.readouterr().out
    assert "files that the JSON does not name           0" in out and "differs" not in out
