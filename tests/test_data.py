"""From files to checked pixels: images, masks, COCO files, what is refused, and what the audit says."""

import contextlib
import copy
import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import background
import cv2
import numpy as np
import pytest
import torch
from conftest import FAST, box, script, write_coco, write_data
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image
from pycocotools import mask as coco_mask

JSON = script.ANNOTATION_FILE


def write(path, pixels, options=()):
    """Write OpenCV's channel order (grey, BGR or BGRA), under any name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(cv2.imencode(path.suffix.lower(), pixels, options)[1].tobytes())
    return path


def annotation(segmentation, number=1, image_id=1, category_id=1, **more):
    """A COCO annotation entry."""
    return {"id": number, "image_id": image_id, "category_id": category_id, "segmentation": segmentation, "iscrowd": 0,
            **more}


def one_image(folder, annotations, image=None, name="a.png", height=40, width=50, **more):
    """A split with a single image and the given annotations."""
    image = np.zeros((height, width), np.uint8) if image is None else image
    write(folder / name, image)
    write_coco(folder, [{"id": 1, "file_name": name, "height": image.shape[0], "width": image.shape[1]}], annotations,
               **more)
    return folder


def sample(folder, size=64):
    """The first image of a split and its mask, resized, as uint8 arrays."""
    return script.BrainTumorDataset(folder, size, normalize=False).sample(0)


def filled(height, width, *boxes):
    """A mask that is 1 in rows y0..y1-1 and columns x0..x1-1 of each (x0, y0, x1, y1)."""
    out = np.zeros((height, width), np.uint8)
    for x0, y0, x1, y1 in boxes:
        out[y0:y1, x0:x1] = 1
    return out


# ===== Image files ====================================================================================================

HEIGHT, WIDTH = 60, 90
# A PNG of 3 x 1 pixels with a palette of three colours, which OpenCV does not write.
PALETTE = bytes.fromhex("89504e470d0a1a0a0000000d49484452000000030000000108030000002c3ee48600000009504c5445000000fa0a14"
                        "1ef032687235910000000c49444154789c6360606402000008000436e0b0a60000000049454e44ae426082")


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


def read(source):
    image = script.read_image(source)
    assert image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3 and image.flags.c_contiguous
    return image


def test_colours_grey_transparency_and_palettes_become_rgb(tmp_path):
    rgb, bgr = picture(), picture()[..., ::-1]
    assert np.array_equal(read(write(tmp_path / "rgb.png", bgr)), rgb)
    assert np.array_equal(read(write(tmp_path / "grey.png", rgb[..., 0])), np.stack([rgb[..., 0]] * 3, axis=-1))
    rgba = np.concatenate([bgr, np.zeros((HEIGHT, WIDTH, 1), np.uint8)], axis=-1)
    assert np.array_equal(read(write(tmp_path / "transparent.png", rgba)), rgb)
    (tmp_path / "palette.png").write_bytes(PALETTE)
    assert read(tmp_path / "palette.png").tolist() == [[[0, 0, 0], [250, 10, 20], [30, 240, 50]]]


@pytest.mark.parametrize("low, high", [(0, 65535), (1000, 5000), (100, 300)])
def test_16_bit_images_are_scaled_by_their_own_range(low, high, tmp_path):
    deep = np.linspace(low, high, HEIGHT * WIDTH).reshape(HEIGHT, WIDTH).astype(np.uint16)
    image = read(write(tmp_path / "grey.png", deep))
    assert np.abs(image - ((deep.astype(float) - low) / (high - low) * 255)[..., None]).max() <= 2  # 0.1 % are clipped
    assert image.min() == 0 and image.max() == 255
    image = read(write(tmp_path / "constant.png", np.full((HEIGHT, WIDTH), high, np.uint16)))
    assert image.min() == image.max()


@pytest.mark.parametrize("suffix", [".png", ".bmp", ".tif", ".tiff", ".webp", ".jpg", ".jpeg", ".PNG", ".JPG", ".Jpeg"])
def test_every_suffix_is_read_in_every_case(suffix, tmp_path):
    options = [cv2.IMWRITE_WEBP_QUALITY, 101] if suffix == ".webp" else [cv2.IMWRITE_JPEG_QUALITY, 100]
    image = read(write(tmp_path / f"a{suffix}", picture()[..., ::-1], options if suffix != ".bmp" else ()))
    assert np.abs(image.astype(int) - picture()).mean() < 5


def test_non_ascii_folders_and_names_are_read(tmp_path, monkeypatch):
    """cv2.imread returns None for such names on Windows only, so the test forbids it everywhere."""
    monkeypatch.setattr(cv2, "imread", lambda *_: pytest.fail("cv2.imread cannot read such a path on Windows"))
    image = np.full((64, 64), 77, np.uint8)
    folder = one_image(tmp_path / "脑肿瘤 数据" / "тест", [annotation([box(1, 2, 3, 4)])], image, "切片_ü_一.png")
    pixels, mask = sample(folder)
    assert (pixels == 77).all() and np.array_equal(mask, filled(64, 64, (1, 2, 4, 6)))


# --- EXIF orientation: what a viewer does with the stored pixels for each value of the tag (EXIF 2.32, section 4.6.4)

TURN = {1: lambda image: image, 2: np.fliplr, 3: lambda image: np.rot90(image, 2), 4: np.flipud,
        5: lambda image: image.transpose(1, 0, 2), 6: lambda image: np.rot90(image, -1),
        7: lambda image: np.rot90(image, 2).transpose(1, 0, 2), 8: lambda image: np.rot90(image, 1)}


def turns_seen(image, stored):
    """The values of the tag that explain an image. JPEG is not exact; a wrong turn differs by more than 20."""
    return [n for n, turn in TURN.items() if turn(stored).shape == image.shape
            and np.abs(image.astype(int) - turn(stored)).mean() < 6]


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".tif", ".webp"])
@pytest.mark.parametrize("orientation", TURN)
def test_orientation_is_applied_in_prediction_and_refused_in_training(orientation, suffix, tmp_path):
    path, exif = tmp_path / f"a{suffix}", Image.Exif()
    exif[274] = orientation
    Image.fromarray(picture()).save(path, exif=exif, quality=100)
    assert turns_seen(read(path), picture()) == [orientation]
    write_coco(tmp_path, [{"id": 1, "file_name": path.name, "height": HEIGHT, "width": WIDTH}],
               [annotation([box(8, 12, 20, 12)])])
    if orientation == 1:
        sample(tmp_path)
    else:
        with pytest.raises(script.TrainerError, match=f"a{suffix}: has an EXIF orientation.*save it upright"):
            sample(tmp_path)


@pytest.mark.parametrize("height, width, scale", [(64, 64, 1), (60, 90, 1), (200, 50, 1), (640, 480, 1), (31, 33, 1),
                                                  (60, 90, 2)])
def test_mask_lies_on_the_tumour_for_every_size(height, width, scale, tmp_path):
    """Also if the file is larger than the JSON says."""
    shown = np.full((height * scale, width * scale), 30, np.uint8)
    shown[12 * scale:24 * scale, 8 * scale:28 * scale] = 220
    write(tmp_path / "a.png", shown)
    write_coco(tmp_path, [{"id": 1, "file_name": "a.png", "height": height, "width": width}],
               [annotation([box(8, 12, 20, 12)])])
    image, mask = sample(tmp_path)
    bright = image[..., 0] > 128
    assert (bright & (mask > 0)).sum() > 0.85 * (bright | (mask > 0)).sum()


# --- what is read from memory, and what is refused in a sentence of its own


def test_an_image_may_come_from_memory(tmp_path):
    path = write(tmp_path / "a.png", picture()[..., ::-1])
    with open(path, "rb") as file:
        for source in (path.read_bytes(), file):
            assert np.array_equal(read(source), picture())
    with pytest.raises(script.TrainerError, match="^image: not a JPEG"):
        read(b"x")


def saved(path, image, **options):
    image.save(path, **options)
    return path


DEEP = np.arange(64 * 64, dtype=np.uint16).reshape(64, 64) * 16


@pytest.mark.parametrize("make, words", [
    (lambda path: write(path.with_suffix(".png"), np.dstack([DEEP] * 3)), "16-bit colours"),
    (lambda path: write(path.with_suffix(".png"), np.dstack([DEEP] * 4)), "16-bit colours"),
    (lambda path: write(path.with_suffix(".tif"), np.dstack([DEEP] * 3)), "16-bit colours"),
    (lambda path: write(path.with_suffix(".tif"), np.dstack([DEEP] * 3), [cv2.IMWRITE_TIFF_COMPRESSION, 1]), "16-bit"),
    (lambda path: write(path.with_suffix(".tif"), DEEP.astype(np.float64)), "64-bit floats"),
    (lambda path: saved(path.with_suffix(".webp"), Image.fromarray(picture()), save_all=True,
                        append_images=[Image.fromarray(255 - picture())]), "more than one page"),
    (lambda path: saved(path.with_suffix(".png"), Image.new("1", (9500, 9500))), "9500x9500 pixels"),
    (lambda path: saved(path.with_suffix(".png"), Image.new("1", (14000, 13000))), "14000x13000 pixels")])
def test_what_pillow_reads_in_part_or_with_a_warning_is_refused(make, words, tmp_path, recwarn):
    path = make(tmp_path / "a")
    recwarn.clear()
    with pytest.raises(script.TrainerError, match=words) as error:
        read(path)
    assert str(path) in str(error.value) and not recwarn.list


def test_of_two_pictures_in_a_jpeg_the_first_is_read(tmp_path):
    path = saved(tmp_path / "a.jpg", Image.fromarray(picture()), format="MPO", save_all=True, quality=100,
                 append_images=[Image.fromarray(255 - picture())])
    assert np.abs(read(path).astype(int) - picture()).mean() < 5


def test_messages_of_libraries_stay_off_standard_error(tmp_path, capfd):
    """OpenCV printed one for each 64-bit TIFF."""
    for dtype in (np.float32, np.float64):
        with contextlib.suppress(script.TrainerError):
            read(write(tmp_path / "a.tif", DEEP.astype(dtype)))
    assert capfd.readouterr().err == ""


# ===== Masks and resizing =============================================================================================

CORNERS = coco_mask.encode(np.asfortranarray(filled(40, 50, (3, 4, 9, 20), (40, 30, 50, 40))))["counts"].decode()


@pytest.mark.parametrize("segmentations, boxes", [
    ([[box(10, 5, 7, 3)]], [(10, 5, 17, 8)]),  # COCO puts pixel i on [i, i + 1]: the pixels 10 to 16, and not 17
    ([[box(2, 2, 4, 4), box(30, 20, 5, 6)]], [(2, 2, 6, 6), (30, 20, 35, 26)]),
    ([[box(45, 35, 100, 100)]], [(45, 35, 50, 40)]),
    ([[box(-1e15, -1e15, 2e15, 2e15)]], [(0, 0, 50, 40)]),  # pycocotools' memory would grow with the distance
    ([[[[10, 5], [17, 5], [17, 8], [10, 8]]]], [(10, 5, 17, 8)]),
    ([{"size": [40, 50], "counts": [80, 40, 1880]}], [(2, 0, 3, 40)]),  # runs go down the columns: the third one
    ([{"size": [40, 50], "counts": [0, 40, 1920, 40]}], [(0, 0, 1, 40), (49, 0, 50, 40)]),  # the first pixel counts
    ([{"size": [40, 50], "counts": [80, 15, 0, 25, 1880]}] * 2, [(2, 0, 3, 40)]),  # a run of length 0, and twice
    ([{"size": [40, 50], "counts": CORNERS}], [(3, 4, 9, 20), (40, 30, 50, 40)]),
    ([[box(10, 10, 10, 10)], [box(15, 15, 10, 10)], {"size": [40, 50], "counts": [0, 40, 1960]}],
     [(10, 10, 20, 20), (15, 15, 25, 25), (0, 0, 1, 40)]),
], ids=["box", "two parts", "cut at the border", "far outside", "points as pairs", "RLE", "RLE from the corner",
        "RLE with a zero", "compressed RLE", "union"])
def test_a_mask_holds_exactly_these_pixels(segmentations, boxes, tmp_path):
    """A crowd annotation counts like all others."""
    entries = [annotation(value, number, iscrowd=number % 2) for number, value in enumerate(segmentations)]
    mask = script.read_coco(one_image(tmp_path, entries)).entries[0].mask()
    assert mask.dtype == np.uint8 and np.array_equal(mask, filled(40, 50, *boxes))


@pytest.mark.parametrize("chosen, expected", [
    ((), [(0, 0, 5, 40), (40, 0, 50, 40)]), (("肿瘤",), [(40, 0, 50, 40)]),
    (("oedema", "肿瘤"), [(0, 0, 5, 40), (40, 0, 50, 40)])])
def test_categories_say_what_counts_and_all_count_by_default(tmp_path, chosen, expected):
    folder = one_image(tmp_path, [annotation([box(0, 0, 5, 40)], 1, category_id=3),
                                  annotation([box(40, 0, 10, 40)], 2, category_id=7)],
                       categories=[{"id": 3, "name": "oedema"}, {"id": 7, "name": "肿瘤"}])
    assert np.array_equal(script.read_coco(folder, chosen).entries[0].mask(), filled(40, 50, *expected))


def test_shrinking_averages_enlarging_interpolates_and_the_right_size_is_not_touched():
    """A fine checkerboard becomes grey: averaging 4 x 4 pixels gives 127 or 128, and 2.5 x 2.5 at most 1/25 more.

    Sampling without averaging keeps the full black and white, or turns them into broad stripes.
    """
    for size, small, tolerance in ((256, 64, 1), (640, 256, 7)):
        board = (np.indices((size, size)).sum(0) % 2 * 255).astype(np.uint8)
        assert np.abs(script.resize(board, small, small).astype(int) - 127.5).max() <= tolerance
        assert np.array_equal(script.resize(board, size, size), board)
    assert script.resize(np.array([[0, 100]], np.uint8), 1, 4).tolist() == [[0, 25, 75, 100]]
    # One side shrinks, the other grows: 4 rows become 1 by averaging, and 2 columns 4.
    assert script.resize(np.array([[0, 200], [0, 0]] * 2, np.uint8), 1, 4).tolist() == [[0, 25, 75, 100]]


def test_a_mask_pixel_counts_when_at_least_half_of_it_is_tumour():
    """Squares of 4 x 4 pixels with 8, 7 and 16 of 16 pixels in them become 1, 0 and 1."""
    mask = np.zeros((4, 12), np.uint8)
    mask[:, 1:3] = 1  # 8 of 16, in the middle: nearest-neighbour sampling might miss them
    mask[0, 4:8] = mask[1, 4:7] = 1  # 7 of 16
    mask[:, 8:] = 1
    assert script.resize_mask(mask, 1, 3).tolist() == [[1, 0, 1]]


@pytest.mark.parametrize("height, width", [(16, 16), (8, 32), (64, 64), (128, 128)])
def test_resizing_a_mask_is_centred(height, width):
    """What is mirrored before must come out mirrored; sampling at the corner of each pixel shifts to one side."""
    mask = (cv2.GaussianBlur(np.random.default_rng(3).standard_normal((64, 64)), (0, 0), 4) > 0).astype(np.uint8)
    small = script.resize_mask(mask, height, width)
    assert small.dtype == np.uint8 and small.shape == (height, width)
    assert np.array_equal(script.resize_mask(mask[::-1, ::-1], height, width), small[::-1, ::-1])
    assert small.mean() == pytest.approx(mask.mean(), abs=0.03)


def test_items_are_normalised_float_tensors_of_the_size_asked_for(tmp_path):
    """Grey 100 of 255 under ImageNet statistics: (100 / 255 - mean) / std for each channel."""
    folder = one_image(tmp_path, [annotation([box(0, 0, 32, 64)])], np.full((64, 64), 100, np.uint8))
    for size in (64, 96):
        image, mask = script.BrainTumorDataset(folder, img_size=size)[0]
        assert image.shape == (3, size, size) and image.dtype == torch.float32
        assert mask.shape == (1, size, size) and mask.dtype == torch.float32
        assert set(mask.unique().tolist()) == {0.0, 1.0} and mask[0, :, :size // 2].all() and mask.mean() == 0.5
        expected = [(100 / 255 - 0.485) / 0.229, (100 / 255 - 0.456) / 0.224, (100 / 255 - 0.406) / 0.225]
        assert image.mean((1, 2)).tolist() == pytest.approx(expected, abs=1e-5)
        assert image.std((1, 2)).max() < 1e-5


@pytest.mark.parametrize("options", [{}, {"mean": (0.2, 0.5, 0.4), "std": (0.3, 0.1, 0.25)}, {"train": True}])
def test_raw_items_normalised_on_the_device_equal_normalised_items(tmp_path, options):
    """The loaders send uint8 arrays and to_input() normalises: the network must see the same numbers either way."""
    image = np.random.default_rng(5).integers(0, 256, (64, 64, 3), np.uint8)
    folder, cpu = one_image(tmp_path, [annotation([box(9, 9, 30, 20)])], image), torch.device("cpu")
    normalised, target = script.BrainTumorDataset(folder, img_size=64, **options)[0]
    raw, mask = script.BrainTumorDataset(folder, img_size=64, normalize=False, **options)[0]
    assert raw.dtype == np.uint8 and raw.shape == (64, 64, 3) and mask.dtype == np.uint8 and mask.shape == (64, 64)
    seen = script.to_input(raw[None], cpu, **{name: options[name] for name in options if name != "train"})
    torch.testing.assert_close(seen, normalised[None], atol=1e-5, rtol=1e-5)
    assert torch.equal(script.to_target(mask[None], cpu), target[None])


# ===== What is refused: exit code 2, a helpful message, and nothing touched in the output folder ======================


@pytest.fixture
def data(tmp_path):
    """A data folder with 3 + 2 + 1 images of 64x64 pixels."""
    return write_data(tmp_path / "data", 3, 2, 1, size=64)


@pytest.fixture
def output(tmp_path):
    """An output folder with the files of an earlier run."""
    for name in script.RUN_FILES:
        (tmp_path / "out").mkdir(exist_ok=True)
        (tmp_path / "out" / name).write_bytes(b"earlier " + name.encode())
    return tmp_path / "out"


def contents(folder):
    """Every file below a folder with its bytes, but for the lock of a run."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*"))
            if path.is_file() and path.name != ".brain_tumor.lock"}


def arguments(data, output, *more):
    return [*FAST, "--data-dir", str(data), "--output-dir", str(output), *map(str, more)]


def refused(capfd, data, output, *more):
    """Run the script in this process on data that it has to refuse; returns the message."""
    before, code = contents(output), script.main(arguments(data, output, *more))
    text = capfd.readouterr().err
    assert code == 2 and "error: " in text and "Traceback" not in text, text
    assert contents(output) == before
    return text[text.index("error: "):]


def accepted(capfd, data, output, *more):
    """The audit of data that can be used; returns (standard output, standard error)."""
    code, (out, err) = script.main(arguments(data, output, "--audit", *more)), capfd.readouterr()
    assert code == 0 and "Data OK." in out, err
    return out, err


# --- damages: functions of the data folder


def edit(change, split="train"):
    """Change the loaded JSON in place."""
    def damage(root):
        path = root / split / JSON
        coco = json.loads(path.read_text(encoding="utf-8"))
        change(coco)
        path.write_text(json.dumps(coco), encoding="utf-8")
    return damage


def put(kind, number, key, value, split="train"):
    """Set one key of one entry of the JSON."""
    return edit(lambda coco: coco[kind][number].update({key: value}), split)


def name(value):
    """Give the first image of train another file name."""
    return put("images", 0, "file_name", value)


def outlines(*values):
    """Give the first annotation of train another segmentation: one damage for each value."""
    return [put("annotations", 0, "segmentation", value) for value in values]


def file(change, path="train/slice_0.png"):
    """Replace a file by these bytes, or by what a function makes of its own; None removes it."""
    def damage(root):
        content = change((root / path).read_bytes()) if callable(change) else change
        (root / path).unlink() if content is None else (root / path).write_bytes(content)
    return damage


def jsons(*changes):
    """Replace the JSON of train: one damage for each change."""
    return [file(change, f"train/{JSON}") for change in changes]


def as_jpeg(fraction):
    """Turn an image into a JPEG that is cut short."""
    content = cv2.imencode(".jpg", np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8))[1].tobytes()
    return file(content[:int(len(content) * fraction)])


RLE = {"size": [64, 64], "counts": [10, 5, 64 * 64 - 15]}
COMPRESSED = coco_mask.encode(np.asfortranarray(np.eye(64, dtype=np.uint8)))["counts"].decode()
NAN, INFINITY = float("nan"), float("inf")

# (words that the message must hold: the file, what is wrong, what to do), and damages that lead to it.
BROKEN = [
    # --- folders and JSON files
    ("data/train;folder not found;DATA_DIR", [lambda root: shutil.rmtree(root / "train")]),
    ("data folder not found;DATA_DIR", [shutil.rmtree]),
    *((f"data/{split};{JSON};not found;export", [file(None, f"{split}/{JSON}")]) for split in ("train", "test")),
    (f"data/train;{JSON};not valid JSON;again", jsons(b"", b"\0" * 500, b"[" * 200_000, lambda text: text[:-1],
                                                 lambda text: text.decode().encode("utf-16"))),
    (f"data/train;{JSON};not a COCO file;COCO Segmentation", jsons(b"[]", b"7", b"null")),
    *((f"data/train;{JSON};'{key}';COCO Segmentation", [
        edit(lambda coco, key=key: coco.pop(key)), edit(lambda coco, key=key: coco.update({key: {"a": 1}})),
        edit(lambda coco, key=key: coco[key].append(None))]) for key in ("images", "annotations", "categories")),
    (f"{JSON};no images;export", [edit(lambda coco: coco.update(images=[], annotations=[]), split)
                                  for split in ("train", "valid")]),
    # --- entries
    (f"data/train;{JSON};entry 1;id", [put("images", 1, "id", None), edit(lambda coco: coco["images"][1].pop("id"))]),
    (f"{JSON};entry 0;file_name", [name(None), name(5), name("")]),
    (f"{JSON};image id 0;twice;slice_0.png;slice_1.png", [put("images", 1, "id", 0)]),
    ("data/train;slice_1.png;two images", [name("slice_1.png")]),
    (f"{JSON};points outside", [name("../valid/slice_0.png"), name("a/../../valid/slice_0.png"), name("/etc/passwd"),
                                name("..\\valid\\slice_0.png"), name("C:\\x\\slice_0.png"),
                                name("\\\\server\\x.png"), name("a\0.png")]),
    ("1 image;SKIP_BAD_IMAGES", [name("a" * 300 + ".png"), name("\ud800.png")]),
    *((f"data/train;slice_0.png;height {value!r} and width 64", [put("images", 0, "height", value)])
      for value in (None, "64", True, 0, -64, 64.5)),
    *((f"data/train;slice_0.png;height 64 and width {value!r}", [put("images", 0, "width", value)])
      for value in (INFINITY, NAN, 10**9)),
    (f"{JSON};annotation id 0;image id 77", [put("annotations", 0, "image_id", 77)]),
    (f"{JSON};annotation id 0;image id None", [edit(lambda coco: coco["annotations"][0].pop("image_id"))]),
    # --- segmentations
    ("data/train;slice_0.png;annotation id 0;only a box;COCO Segmentation", [
        *outlines([], None, "1 2 3 4 5 6", 5), edit(lambda coco: coco["annotations"][0].pop("segmentation"))]),
    ("data/train;slice_0.png;annotation id 0;x, y pairs", outlines(
        [[1, 1, 20, 1, 20, 20, 1]], [1, 1, 20, 1, 20, 20, 5], [[1, 1, "left", 1, 20, 20]], ["1 1 20 1 20 20"],
        [[[1, 1, 0], [20, 1, 0], [20, 20, 0], [1, 20, 0]]], [[{"x": 1, "y": 2}] * 3])),
    ("data/train;slice_0.png;annotation id 0;not finite", outlines(
        [[1, 1, 20, NAN, 20, 20]], [[1, 1, 20, INFINITY, 20, 20]], [[1, 1, 20, None, 20, 20]])),
    ("data/train;slice_0.png;annotation id 0;too large", outlines([[1, 1, 10**400, 1, 20, 20]])),
    ("data/train;slice_0.png;annotation id 0;size None", outlines({"counts": RLE["counts"]}, {})),
    ("data/train;slice_0.png;annotation id 0;[32, 128];[64, 64]", outlines(RLE | {"size": [32, 128]})),
    ("data/train;slice_0.png;annotation id 0;counts of its RLE", outlines(*(RLE | {"counts": counts} for counts in (
        None, [10, 5], [10, 5, 10**6], [-5, 5, 64 * 64], [10.0, 5.0, 4081.0], "", COMPRESSED[:-3])))),
    ("data/train;slice_0.png;annotation id 0;counts of its RLE", outlines(RLE | {"counts": COMPRESSED + "o"})),
    ("data/train;slice_0.png;annotation id 0;counts of its RLE", outlines(RLE | {"counts": "脑瘤!"})),
    # --- image files
    ("data/train;slice_0.png;missing;1 image;SKIP_BAD_IMAGES", [file(None)]),
    ("data/train;slice_0.png;empty;SKIP_BAD_IMAGES", [file(b"")]),
    ("data/test;slice_0.png;empty;SKIP_BAD_IMAGES", [file(b"", "test/slice_0.png")]),
    ("data/train;slice_0.png;SKIP_BAD_IMAGES", [lambda root: (file(None)(root), (root / "train/slice_0.png").mkdir())]),
    ("slice_0.png;not a JPEG;SKIP_BAD_IMAGES", [file(b"not a picture")]),
    ("slice_0.png;damaged, or cut short;SKIP_BAD_IMAGES", [
        file(lambda png: png[:20]), file(lambda png: png[:len(png) * 9 // 10]),
        file(lambda png: png[:900] + bytes([png[900] ^ 1]) + png[901:]), as_jpeg(0.5), as_jpeg(0.98)]),
    # --- nothing to learn, or not meant to be learnt from
    ("data/train;no tumour pixel;annotations", [
        edit(lambda coco: coco["annotations"].clear()),
        edit(lambda coco: [entry.update(segmentation=[box(500, 500, 20, 20)]) for entry in coco["annotations"]])]),
    ("data/valid;no tumour pixel;chooses the best epoch", [edit(lambda coco: coco["annotations"].clear(), "valid")]),
    ("data/valid;phantoms", [edit(lambda coco: coco.update(info={"description": script.SAMPLE_MARK}), "valid")]),
]


@pytest.mark.parametrize("words, damage", [(words, damage) for words, damages in BROKEN for damage in damages])
def test_training_and_the_audit_refuse(words, damage, data, output, capfd):
    damage(data)
    for mode in ((), ("--audit",)):
        message = refused(capfd, data, output, *mode)
        assert [word for word in words.split(";") if word not in message] == []


def test_refuses_as_a_process(data, output):
    as_jpeg(0.5)(data)
    before = contents(output)
    code, text = background.run(arguments(data, output))
    assert code == 2 and "slice_0.png" in text and "SKIP_BAD_IMAGES" in text and "Traceback" not in text
    assert contents(output) == before


def test_unknown_categories_are_named_with_the_known_ones_and_tumours_must_be_left(data, output, capfd):
    for split in ("train", "valid", "test"):
        edit(lambda coco: coco["categories"].append({"id": 9, "name": "edema"}), split)(data)
    message = refused(capfd, data, output, "--categories", "tumor", "cyst")
    assert "cyst" in message and "has only: edema, tumor" in message
    assert "no tumour pixel" in refused(capfd, data, output, "--categories", "edema")


def test_problems_are_counted_by_kind_with_the_first_examples(tmp_path, output, capfd):
    """Problems of one JSON come together, and so do the unusable images of all splits."""
    data = write_data(tmp_path / "data", 14, 6, 0, size=64)
    for split, count in (("train", 7), ("valid", 5)):
        for number in range(count):
            file(b"", f"{split}/slice_{number}.png")(data)
    message = refused(capfd, data, output)
    assert "12 image" in message and "the file is empty (12 times): " in message and message.count("slice_") == 2
    put("images", 13, "width", 0)(data)
    put("annotations", 0, "image_id", 99)(data)
    for number in range(1, 12):
        put("annotations", number, "segmentation", [[1, 1, 2]])(data)
    message = refused(capfd, data, output)
    assert "width 0" in message and "image id 99" in message and "--skip-bad-images" not in message
    assert "a polygon is not a list of x, y pairs" in message and ", 11 of 12 in train: " in message
    assert message.count("annotation id ") == 3
    assert "slice_1.png, annotation id 1; slice_2.png, " in message


def test_files_that_the_system_does_not_read_are_one_kind(data, output, capfd):
    for number in range(2):
        file(None, f"train/slice_{number}.png")(data)
        (data / f"train/slice_{number}.png").mkdir()
    message = refused(capfd, data, output)
    assert "(2 times)" in message and "slice_0.png" in message and "slice_1.png" in message


def test_odd_but_usable_data_are_accepted(data, output, capfd):
    """Phantoms in all splits, a byte order mark, no test folder, ids that are text, sizes with a decimal point."""
    for number in range(3):
        put("images", number, "id", f"scan {number}")(data)
        put("images", number, "height", 64.0)(data)
    for number in range(2):
        put("annotations", number, "image_id", f"scan {number}")(data)
    for split in ("train", "valid"):
        edit(lambda coco: coco.update(info={"description": script.SAMPLE_MARK}), split)(data)
    file(lambda text: b"\xef\xbb\xbf" + text, f"train/{JSON}")(data)
    shutil.rmtree(data / "test")
    out = accepted(capfd, data, output)[0]
    assert table(out)["annotations: tumor"] == ["2", "1"]


@pytest.mark.parametrize("place", ["sub/slice_0.png", "sub\\slice_0.png", "./sub/../sub/slice_0.png", "脑瘤 (1).png",
                                   "..dots.png"])
def test_names_inside_the_folder_are_found(place, data, output, capfd):
    (data / "train/sub").mkdir()
    os.replace(data / "train/slice_0.png", data / "train" / place.replace("\\", "/"))
    name(place)(data)
    assert table(accepted(capfd, data, output)[0])["files that the JSON does not list"][0] == "0"


def test_skipping_lists_the_bad_images_and_goes_on(data, output, capfd):
    file(lambda png: png[:50])(data)
    file(None, "valid/slice_1.png")(data)
    out, err = accepted(capfd, data, output, "--skip-bad-images")
    assert table(out)["images"] == ["2", "1", "1"] and table(out)["unusable images"] == ["1", "1", "0"]
    assert "leaving out 2 images" in err and "slice_0.png" in err and "slice_1.png" in err


def test_skipping_hides_neither_an_empty_split_nor_a_broken_json(data, output, capfd):
    for number in range(2):
        file(b"", f"valid/slice_{number}.png")(data)
    assert "no usable image" in refused(capfd, data, output, "--skip-bad-images")
    put("images", 0, "id", 1)(data)
    assert "twice" in refused(capfd, data, output, "--skip-bad-images")


def test_after_a_skipped_image_the_others_keep_their_pixels_and_their_numbers(data, tmp_path):
    """The place in the cache and the number that augmentation depends on are those of the whole list."""
    file(lambda png: png[:50])(data)
    cfg = script.read_settings(arguments(data, tmp_path / "out", "--skip-bad-images"))[0]
    splits, cache = script.prepare_data(cfg, ["train", "valid"], tmp_path / "out")
    for split in splits.values():
        dataset = script.BrainTumorDataset("", 64, entries=split.entries, cache=cache)
        for index, record in enumerate(split.entries):
            for cached, decoded in zip(dataset.sample(index), script.load_sample(record, 64)):
                assert np.array_equal(cached, decoded)
    script.remove_cache(tmp_path / "out")
    assert [record.number for record in splits["train"].entries] == [1, 2]
    trainer = SimpleNamespace(cfg=cfg, model=torch.nn.Identity(), device="cpu", weights_from="random")
    counts = script.describe_run(trainer, splits)["data_counts"]["train"]
    assert counts == {"images": 2, "annotations": 1, "without_tumour": 1, "without_annotation": 1, "skipped": 1,
                      "near_duplicates": 0}


# ===== The audit ======================================================================================================


def table(text):
    """The rows of the audit's table: {label: [value per split]}."""
    rows = [line.split() for line in text.partition("\nData ")[2].partition("\n\n")[0].splitlines()]
    splits = len(rows[0])
    return {" ".join(row[:-splits]): row[-splits:] for row in rows[1:]}


def remarks(text):
    """The listed remarks of an audit, in their order."""
    return [line.removeprefix("  - ") for line in text.splitlines() if line.startswith("  - ")]


def outline(x, y, width, height):
    """A polygon that is no upright box: an octagon."""
    x0, x1, x2, x3, y0, y1, y2, y3 = x, x + 2, x + width - 2, x + width, y, y + 2, y + height - 2, y + height
    return [x1, y0, x2, y0, x3, y1, x3, y2, x2, y3, x1, y3, x0, y2, x0, y1]


OUTLINE = [outline(20, 20, 40, 40)]


def grey(level):
    """A picture of 100 x 100 pixels of this level, half of it 50 levels brighter."""
    return np.repeat(np.repeat(np.array([[level, min(255, level + 50)]], np.uint8), 50, axis=1), 100, axis=0)


def audited(tmp_path, capfd, **splits):
    """Audit splits of images: lists of (grey value or pixels, segmentations, changes of the entry in the JSON)."""
    for split, items in ({"valid": [(9, [OUTLINE], {})]} | splits).items():
        images, annotations = [], []
        for number, (pixels, segmentations, changes) in enumerate(items):
            pixels = pixels if isinstance(pixels, np.ndarray) else grey(pixels)
            entry = {"id": number, "file_name": f"{split}_{number}.png"} | dict(zip(("height", "width"), pixels.shape))
            images.append(entry | changes)
            write(tmp_path / "data" / split / images[-1]["file_name"], pixels, [cv2.IMWRITE_JPEG_QUALITY, 30])
            annotations += [annotation(item, 100 * number + k, number) for k, item in enumerate(segmentations)]
        write_coco(tmp_path / "data" / split, images, annotations)
    return accepted(capfd, tmp_path / "data", tmp_path / "out")[0]


def test_the_table_counts_images_annotations_and_tumours(tmp_path, capfd):
    for name in ("forgotten.png", "sub/FORGOTTEN.PNG", "x.JPG"):
        write(tmp_path / "data/train" / name, np.ones((9, 9), np.uint8))
    rows = table(audited(tmp_path, capfd, train=[
        (50, [[box(20, 20, 40, 40)]], {}), (51, [], {}), (52, [[box(10, 10, 10, 10)], [box(50, 50, 10, 20)]], {}),
        (53, [[box(0, 0, 100, 50)]], {}), (54, [], {})], valid=[(60, [OUTLINE], {}), (61, [], {})]))
    assert rows == {
        "images": ["5", "2"], "unusable images": ["0", "0"], "patients (see PATIENT_PATTERN)": ["?", "?"],
        "annotations: tumor": ["4", "1"],
        "without annotation": ["2", "1"], "without tumour": ["2", "1"],
        "several tumours": ["1", "0"], "smallest tumour, % of image": ["3.000", "15.920"],
        "median tumour, % of image": ["16.000", "15.920"], "largest tumour, % of image": ["50.000", "15.920"],
        "files that the JSON does not list": ["3", "0"]}


def test_the_same_picture_is_found_in_any_format_and_across_splits_it_is_named_first(tmp_path, capfd):
    many = [(50 + n, [OUTLINE, [box(90, 90, 14, 14)]], {}) for n in range(30)]  # a remark each
    audited(tmp_path, capfd, train=[(1, [OUTLINE], {}), (1, [OUTLINE], {}), (2, [OUTLINE], {}), *many],
            valid=[(2, [OUTLINE], {}), (3, [OUTLINE], {})])
    write(tmp_path / "data/valid/copy.bmp", grey(1))
    put("images", 1, "file_name", "copy.bmp", "valid")(tmp_path / "data")
    out = accepted(capfd, tmp_path / "data", tmp_path / "out")[0]
    found = [line for line in remarks(out) if "look like" not in line]
    assert found == [
        "same picture in two splits, which makes scores too good (2 times): valid/valid_0.png is train/train_2.png; "
        "valid/copy.bmp is train/train_0.png", "same picture twice: train/train_1.png is train/train_0.png",
        "polygon outside the image (clipped) (30 times): train/train_3.png, annotation id 301; train/train_4.png, "
        "annotation id 401, ..."]


@pytest.mark.parametrize("words, segmentations, changes", [
    ("100x50;differs", [OUTLINE], {"height": 50}),
    ("almost no contrast", [OUTLINE], {"pixels": np.full((100, 100), 7)}),
    ("annotation id 0;outside the image", [[outline(60, 60, 60, 20)]], {}),
    ("annotation id 0;outside the image", [[outline(-30, -30, 60, 60)]], {}),
    ("annotation id 0;fewer than three points", [[[10, 10, 50, 50]], OUTLINE], {}),
    ("annotation id 0;fewer than three points", [[[]], OUTLINE], {}),
    ("annotation id 0;fewer than 25 pixels", [[[10, 10, 50, 50, 90, 90]], OUTLINE], {}),
    ("annotation id 0;fewer than 25 pixels", [[[10, 10, 10, 10, 10, 10]], OUTLINE], {}),
    ("annotation id 0;24 pixels", [[box(50, 50, 6, 4)]], {}),
    ("disappears at IMG_SIZE 64", [[box(50, 50, 1, 1)]], {})])
def test_an_odd_annotation_is_a_remark(words, segmentations, changes, tmp_path, capfd):
    pixels = changes.pop("pixels", 50)
    out = audited(tmp_path, capfd, train=[(pixels, segmentations, changes), (51, [OUTLINE], {})])
    assert any(all(word in line for word in ["train/train_0.png", *words.split(";")]) for line in remarks(out))


def test_good_data_are_worth_no_remark_and_the_audit_writes_nothing(tmp_path, capfd):
    """A polygon may touch the border, 25 pixels are enough, and the same grey in another shape is another picture."""
    train = [(50, [[outline(0, 0, 100, 100)]], {}), (51, [[box(50, 50, 5, 5)]], {}), (52, [OUTLINE], {}),
             (np.reshape(grey(50), (50, 200)), [box(20, 20, 40, 30)], {})]
    out = audited(tmp_path, capfd, train=train, valid=[(blobs(1, 100), [OUTLINE], {})])
    assert "please check" not in out and remarks(out) == []
    before = contents(tmp_path)
    accepted(capfd, tmp_path / "data", tmp_path / "out")
    assert contents(tmp_path) == before


BOX, TURNED = [box(20, 20, 30, 40)], [[50, 10, 90, 50, 50, 90, 10, 50]]
BOX_AS_RLE = {"size": [100, 100], "counts": [1010, 30, *[70, 30] * 9, 8060]}


@pytest.mark.parametrize("train, valid, said", [
    ([BOX] * 3, [BOX] * 2, "5 of 5"), ([BOX] * 19, [OUTLINE], "19 of 20"), ([BOX] * 18, [OUTLINE] * 2, None),
    ([OUTLINE] * 3, [OUTLINE], None), ([TURNED], [TURNED], None), ([BOX_AS_RLE], [BOX], "2 of 2"),
    ([[box(20.3, 20.7, 30, 40)]], [[box(80, 80, 60, 60)]], "2 of 2"),
], ids=["all", "19 of 20", "18 of 20", "none", "turned squares", "RLE", "fractions, and cut at the border"])
def test_labels_that_are_nearly_all_upright_boxes_are_said(train, valid, said, tmp_path, capfd):
    out = audited(tmp_path, capfd, train=[(n, [value], {}) for n, value in enumerate(train)],
                  valid=[(100 + n, [value], {}) for n, value in enumerate(valid)])
    expected = [f"{said} annotations are upright boxes: a model will learn boxes, not outlines"] * (said is not None)
    assert [line for line in remarks(out) if "boxes" in line] == expected


def blobs(seed, size=96):
    """A smooth random picture, grey uint8: two of different seeds have hardly anything in common."""
    noise = cv2.GaussianBlur(np.random.default_rng(seed).standard_normal((size, size)), (0, 0), size / 10)
    return cv2.normalize(noise, None, 40, 200, cv2.NORM_MINMAX).astype(np.uint8)


def test_a_thumbnail_is_the_grey_picture_averaged_to_32_pixels_without_mean_and_contrast(tmp_path):
    small = blobs(0, 32)
    centred = small.ravel() - small.mean()
    fine = np.kron(small, np.ones((2, 2), int)) + 9 * (np.indices((64, 64)).sum(0) % 2 * 2 - 1)  # averages out
    for pixels in (small, small // 2 + 30, np.kron(small, np.ones((4, 3))), fine, np.stack([small] * 3, axis=-1)):
        record = script.ImageEntry(0, str(write(tmp_path / "a.png", pixels.astype(np.uint8))), "a.png", 32, 32)
        script.scan(record, script.default_settings(), None)
        assert record.thumbnail.shape == (1024,) and record.thumbnail.dtype == np.float32
        assert record.thumbnail.sum() == pytest.approx(0, abs=1e-4)
        assert np.linalg.norm(record.thumbnail) == pytest.approx(1)
        assert record.thumbnail @ centred == pytest.approx(np.linalg.norm(centred), rel=1e-3)


def split_of(**thumbnails):
    """A split of images with these thumbnails, by name."""
    entries = [script.ImageEntry(n, name, name, 1, 1, thumbnail=np.array(value, np.float32))
               for n, (name, value) in enumerate(thumbnails.items())]
    return script.Split(Path(), entries, {})


def test_images_above_the_correlation_are_counted_and_the_first_pairs_named():
    """The thumbnails are unit vectors, so each correlation is known; opposite pictures and equals in train are none."""
    splits = {
        "train": split_of(a=(1, 0, 0), also_a=(1, 0, 0), b=(0, 1, 0)),
        "valid": split_of(far=(0, 0, 1), close=(0.96, 0, 0.28), not_quite=(0.94, 0, 0.341), closer=(0, 0.98, 0.199),
                          opposite=(-1, 0, 0), same=(0, 1, 0), also_close=(0.28, 0.96, 0)),
        "test": split_of(closest=(0.6, 0.8, 0))}
    assert script.find_near_duplicates(splits) == [
        "4 of 7 valid images look like an image in train: scores may be too good for new patients, as "
        "close and a; closer and b; same and b, ..."]
    assert {name: split.near_duplicates for name, split in splits.items()} == {"train": 0, "valid": 4, "test": 0}
    splits["test"] = split_of(only=(0, -0.199, 0.98), like_a=(0.98, 0.199, 0))
    said, = script.find_near_duplicates(splits)[1:]
    assert said.startswith("1 of 2 test images") and said.endswith(", as like_a and a")
    # An evaluation does not read train.
    assert script.find_near_duplicates({"valid": split_of(a=(1, 0, 0)), "test": split_of(a=(1, 0, 0))}) == []


@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_neighbouring_slices_are_found_in_files_and_unrelated_ones_are_not(tmp_path, capfd):
    """A copy with other contrast and noise, a strong JPEG, a shift, another size, all of the same picture in train.

    Not counted are other pictures, the inverted one, and those without any contrast, of which train has one, too.
    """
    large = blobs(0, 120)
    same, shifted = large[12:108, 12:108], large[9:105, 14:110]
    noisy = (0.6 * same + 50 + np.random.default_rng(1).normal(0, 8, same.shape)).astype(np.uint8)
    alike = {"noisy.png": noisy, "jpeg.jpg": same, "shifted.png": shifted, "larger.png": cv2.resize(same, (300, 200))}
    others = {"unrelated.png": blobs(2), "inverted.png": 255 - same, "grey.png": 91, "black.png": 0}
    splits = {"train": {"grey_too.png": 90, "other.png": blobs(1), "slice.png": same}, "valid": alike | others,
              "test": {"unrelated.png": blobs(3), "white.png": 255}}
    flat = np.ones((100, 100), np.uint8)
    said, contrast = remarks(audited(tmp_path, capfd, **{
        split: [(pixels if isinstance(pixels, np.ndarray) else pixels * flat, [OUTLINE], {"file_name": name})
                for name, pixels in files.items()] for split, files in splits.items()}))
    assert contrast.startswith("picture with almost no contrast (4 times)")
    assert said.startswith("4 of 8 valid images look like an image in train: ") and said.count(" and slice.png") == 3


# ===== Random damage ==================================================================================================

ODD = [None, True, -1, 0, 0.5, NAN, 1e308, 10**30, "", "x", "../x", [], {}, [[]], [None], {"a": 1}]


def replace_somewhere(coco, pick, value, delete=False):
    """Walk from key to key, pick(n) being a number below n, and replace (or delete) what is there."""
    place = coco
    while place:
        keys = list(place) if isinstance(place, dict) else range(len(place))
        key = keys[pick(len(keys))]
        if not isinstance(place[key], (dict, list)) or not place[key] or pick(4) == 0:
            place[key] = value
            if delete:
                del place[key]
            return
        place = place[key]


def random_damage(rng, root):
    """Cut a file short, overwrite some of its bytes, or replace a value somewhere inside the JSON."""
    path = root / rng.choice(["train", "valid", "test"]) / rng.choice([JSON, "slice_0.png"], p=[0.8, 0.2])
    content, kind = bytearray(path.read_bytes()), rng.integers(4)
    if path.name == JSON and kind < 3:
        coco = json.loads(content)
        replace_somewhere(coco, rng.integers, copy.deepcopy(ODD[rng.integers(len(ODD))]), delete=rng.random() < 0.2)
        content = json.dumps(coco).encode()
    elif kind == 0:
        del content[rng.integers(len(content)):]
    else:
        for place in rng.integers(len(content), size=3):
            content[place] = rng.integers(256)
    path.write_bytes(content)


@pytest.mark.parametrize("seeds", [range(40), pytest.param(range(1000, 1300), marks=pytest.mark.soak)],
                         ids=["some", "many"])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # 1e308 as a coordinate
def test_random_damage_is_survived_or_refused_with_a_message(seeds, tmp_path, capfd):
    codes = []
    for seed in seeds:
        data = write_data(tmp_path / str(seed), 3, 2, 1, size=64)
        random_damage(np.random.default_rng(seed), data)
        codes.append(script.main(arguments(data, tmp_path / "out", "--audit")))
        out, err = capfd.readouterr()
        assert codes[-1] in (0, 2) and (codes[-1] == 2) == ("error: " in err), (seed, out, err)
    print(f"{len(seeds)} damaged data sets: {codes.count(2)} refused, {codes.count(0)} usable, no stack trace")
    assert codes.count(2) > len(seeds) / 3 and codes.count(0) > len(seeds) / 10


# ===== Properties: any polygon, any RLE, any JSON, any bytes ==========================================================

H, W = 40, 56


def rasterized(segmentation, height, width):
    """(RLE, remarks) of a COCO segmentation."""
    rle, _, remarks = script.rasterize(segmentation, height, width)
    return rle, remarks


bounded = settings(max_examples=150, deadline=None, derandomize=True,
                   suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
near = st.floats(-80, 160, width=32)  # up to twice the image away: never clipped before rasterising
points = st.integers(3, 12).flatmap(lambda n: st.lists(near, min_size=2 * n, max_size=2 * n))
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=7) | st.dictionaries(st.text(max_size=6), inner, max_size=3), max_leaves=12)
segmentations = st.lists(points, min_size=1, max_size=2) | st.lists(points, min_size=1, max_size=2) | json_values


@bounded
@given(st.lists(points, min_size=1, max_size=4), st.lists(st.lists(near, min_size=2, max_size=2), max_size=2))
@example([[10, 10, 10, 10, 10, 10]], [])
@example([[0, 0, W, 0, W, H, 0, H]], [[5, 5]])
@example([[-50, -50, 100, -50, 100, 100, -50, 100]], [])
def test_polygons_are_rasterised_as_pycocotools_does(polygons, short):
    """Parts with too few points change nothing, and the remarks say which parts leave the image."""
    rle, said = rasterized([*short, *polygons], H, W)
    reference = coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(polygons, H, W)))
    assert np.array_equal(coco_mask.decode(rle), reference)
    assert sum("fewer than three" in remark for remark in said) == len(short)
    outside = sum(min(part) < -0.5 or max(part[::2]) > W + 0.5 or max(part[1::2]) > H + 0.5 for part in polygons)
    assert sum("outside" in remark for remark in said) == outside


@bounded
@given(st.lists(st.integers(0, 400), min_size=1, max_size=30))
@example([0])
@example([0, 0, 2240])
def test_both_kinds_of_rle_give_the_mask_back(runs):
    """As a list also with empty runs, which pycocotools never writes after the first one; other tools may."""
    runs = [min(run, max(0, H * W - sum(runs[:number]))) for number, run in enumerate(runs)]
    runs.append(H * W - sum(runs))
    mask = np.repeat(np.arange(len(runs)) % 2, runs).astype(np.uint8).reshape(W, H).T
    text = coco_mask.encode(np.asfortranarray(mask))["counts"].decode()
    for counts in (runs, text):
        rle, said = rasterized({"size": [H, W], "counts": counts}, H, W)
        assert np.array_equal(coco_mask.decode(rle), mask) and coco_mask.area(rle) == mask.sum() and said == []


@settings(bounded, max_examples=300)
@given(st.text(alphabet=[chr(code) for code in range(40, 120)], max_size=20) | st.text(max_size=8))
@example("脑瘤")
@example("o" * 5000)
@example(CORNERS[:-1])
@example(CORNERS + "0")
@example(CORNERS + "11")
def test_any_text_as_rle_is_refused_or_describes_the_whole_image(counts):
    """pycocotools itself reads beyond the end of such texts, and can crash the interpreter."""
    try:
        rle, _ = rasterized({"size": [H, W], "counts": counts}, H, W)
    except ValueError as error:
        assert "RLE" in str(error)
        return
    mask = coco_mask.decode(rle)
    assert mask.max(initial=0) <= 1 and coco_mask.area(rle) == mask.sum()
    assert coco_mask.encode(mask)["counts"].decode() == counts


@settings(bounded, max_examples=300)
@given(st.lists(segmentations, max_size=3), st.lists(json_values, max_size=3), st.data())
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # huge coordinates
def test_any_coco_file_is_read_or_refused(tmp_path, values, replacements, data):
    """A small COCO file with any segmentations, in which up to three values are replaced by anything JSON can hold."""
    coco = {"images": [{"id": n, "file_name": f"{n}.png", "height": H, "width": W} for n in range(3)],
            "annotations": [annotation(value, n, n % 3) for n, value in enumerate(values)],
            "categories": [{"id": 1, "name": "tumor"}]}
    for value in replacements:
        replace_somewhere(coco, lambda n: data.draw(st.integers(0, n - 1)), value)
    (tmp_path / JSON).write_text(json.dumps(coco), encoding="utf-8")
    try:
        split = script.read_coco(tmp_path)
        for record in (split, *split.entries):
            record.problems = [(kind, detail) for kind, detail in record.problems if "missing" not in kind]
        script.refuse_problems([split], False)
    except script.TrainerError as error:
        assert str(tmp_path) in str(error) and error.exit_code == 2
        return
    assert len(split.entries) == len(coco["images"])
    assert sum(entry.annotations.total() for entry in split.entries) == len(coco["annotations"])
    for record in split.entries:
        mask = record.mask()
        assert mask.shape == (record.height, record.width) and set(np.unique(mask)) <= {0, 1}


@bounded
@given(st.binary(max_size=60), st.integers(0, 10**6), st.sampled_from([".png", ".jpg", ".webp", ".tif", ".pth"]))
def test_any_bytes_are_an_image_or_weights_or_refused(tmp_path, content, place, suffix):
    path = tmp_path / f"a{suffix}"
    if suffix == ".pth":
        torch.save({"a": torch.ones(3), "b": [1, "x"]}, path, _use_new_zipfile_serialization=place % 2 == 0)
    else:
        write(path, np.arange(24 * 32, dtype=np.uint32).astype(np.uint8).reshape(24, 32))
    damaged = bytearray(path.read_bytes())
    start = place % len(damaged)
    damaged[start:start + len(content)] = content
    path.write_bytes(damaged)
    try:
        assert isinstance(script.read_weights(path), dict) if suffix == ".pth" else read(path).size
    except script.TrainerError as error:
        assert path.name in str(error)
