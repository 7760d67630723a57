"""Data that contradict themselves are refused or get a remark, and what is meant unambiguously is read.

Splits of noise pictures with one octagon each; each test changes their COCO files or pictures.
"""

import json
import os
import re
import tracemalloc
import unicodedata
from collections import Counter
from functools import partial
from pathlib import Path
from urllib.parse import quote

import cv2
import numpy as np
import pytest
from conftest import ROOT, script, write_coco
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pycocotools import mask as coco_mask
from test_data import accepted, arguments, refused, remarks, table, write

SIZE = 96, 128  # height and width, unless a test says otherwise


def octagon(x, y, rx, ry):
    """A polygon around a point."""
    angles = np.arange(8) * np.pi / 4
    return np.stack([x + rx * np.cos(angles), y + ry * np.sin(angles)], axis=1).ravel().round(2).tolist()


def bounding_box(polygon):
    x, y = polygon[::2], polygon[1::2]
    return [min(x), min(y), max(x) - min(x), max(y) - min(y)]


def noise_picture(seed, height, width):
    noise = cv2.GaussianBlur(np.random.default_rng(seed).standard_normal((height, width)), (0, 0), 3)
    return cv2.normalize(noise, None, 0, 255, cv2.NORM_MINMAX).astype(np.uint8)


def make(root, change=lambda coco, folder: None, count=6, size=SIZE, splits=("train", "valid")):
    """A data folder whose COCO files are changed by change(coco, folder of the split) before they are written."""
    for number, split in enumerate(splits):
        rng, folder, (height, width) = np.random.default_rng(number), root / split, size
        coco = {"images": [], "annotations": [], "categories": [{"id": 1, "name": "tumor"}]}
        for i in range(count):
            write(folder / f"{i}.png", noise_picture(100 * number + i, height, width))
            polygon = octagon(rng.uniform(0.4, 0.8) * width, rng.uniform(0.35, 0.6) * height,
                              rng.uniform(0.06, 0.1) * width, rng.uniform(0.16, 0.22) * height)
            coco["images"].append({"id": i, "file_name": f"{i}.png", "height": height, "width": width})
            coco["annotations"].append({"id": i, "image_id": i, "category_id": 1, "segmentation": [polygon],
                                        "bbox": bounding_box(polygon)})
        change(coco, folder)
        (folder / script.ANNOTATION_FILE).write_text(json.dumps(coco, ensure_ascii=False), encoding="utf-8")
    return root


def each(key, function):
    """A change of one part of every annotation."""
    def change(coco, _folder):
        for annotation in coco["annotations"]:
            annotation[key] = function(annotation[key])
    return change


def points(function):
    """A change of all points [N, 2] of every outline."""
    return each("segmentation", lambda value: [function(np.reshape(value[0], (-1, 2))).ravel().tolist()])


def masks(data, split="train"):
    return [entry.mask() for entry in script.read_coco(data / split).entries]


# ===== Outlines, boxes and images =====================================================================================


@pytest.mark.parametrize("change", [
    lambda xy: xy[:, ::-1], lambda xy: 4 * xy, lambda xy: 1.05 * xy, lambda xy: 0.8 * xy, lambda xy: 1.25 * xy,
    lambda xy: (128, 0) + (-1, 1) * xy, lambda xy: (0, 96) + (1, -1) * xy, lambda xy: xy + (20, 0),
    lambda xy: xy * (100 / 128, 100 / 96), lambda xy: np.c_[xy, np.full(len(xy), 2)]],
    ids=["swapped", "x 4", "x 1.05", "x 0.8", "x 1.25", "mirrored", "upside down", "shifted", "percent", "triples"])
def test_outlines_that_contradict_their_boxes_are_refused(change, tmp_path, capfd):
    message = refused(capfd, make(tmp_path / "data", points(change)), tmp_path / "out", "--audit")
    for words in ("contradicts its bounding box", "of 6 in train. Likely causes", "swapped", "resized", 'remove "bbox"',
                  "annotation id"):
        assert words in message


@pytest.mark.parametrize("box", [
    lambda box: np.round(box).tolist(), lambda box: np.trunc(box).tolist(),
    lambda box: [*box[:2], box[2] + 1, box[3] + 1], lambda box: None, lambda box: [0, 0, 0, 0], lambda box: [],
    lambda box: "none", lambda box: [1, 2, 3], lambda box: [float("nan")] * 4])
def test_boxes_that_are_rounded_or_absent_contradict_nothing(box, tmp_path, capfd):
    data = make(tmp_path / "data", each("bbox", box))
    assert remarks(accepted(capfd, data, tmp_path / "out")[0]) == []


def test_a_box_and_an_outline_that_are_cut_by_the_image_are_compared_inside_it(tmp_path, capfd):
    """The tool has clipped one of them, and not the other."""
    def change(coco, _):
        for annotation in coco["annotations"]:
            polygon = octagon(126, 50, 6, 20)
            annotation |= {"segmentation": [polygon], "bbox": [120, 30, 8, 40]}

    out = accepted(capfd, make(tmp_path / "data", change), tmp_path / "out")[0]
    assert [line for line in remarks(out) if "bounding box" in line] == []


@pytest.mark.parametrize("wrong, count, is_refused", [(2, 6, False), (3, 6, True), (3, 61, False), (4, 61, True)])
def test_a_few_contradictions_are_remarks(wrong, count, is_refused, tmp_path, capfd):
    """Refused are at least three, and at least 5 %."""
    def change(coco, folder):
        for annotation in coco["annotations"][:wrong] if folder.name == "train" else []:
            annotation["bbox"][0] += 30

    data = make(tmp_path / "data", change, count, (48, 64))
    if is_refused:
        assert f"{wrong} of {count}" in refused(capfd, data, tmp_path / "out", "--audit")
    else:
        said, = [line for line in remarks(accepted(capfd, data, tmp_path / "out")[0]) if "look like" not in line]
        assert said.startswith(f"outline that contradicts its bounding box ({wrong} times): train/0.png, annotation ")


@pytest.mark.parametrize("factor, size, words", [
    (1 / 640, (640, 640), "fractions of the image"), (1 / 128, SIZE, "fractions of the image"),
    (100 / 640, (640, 640), "percent, not pixels"),
    (4, SIZE, "far outside its image, 3 of 3 in train")])
def test_coordinates_that_are_wrong_together_with_their_boxes_are_refused(factor, size, words, tmp_path, capfd):
    def change(coco, _):
        for annotation in coco["annotations"]:
            annotation["segmentation"] = [[factor * value for value in annotation["segmentation"][0]]]
            annotation["bbox"] = [factor * value for value in annotation["bbox"]]

    assert words in refused(capfd, make(tmp_path / "data", change, 3, size), tmp_path / "out", "--audit")


def as_mask(value):
    return coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(value, *SIZE)))


@pytest.mark.parametrize("value, words", [
    (lambda value: as_mask(value).astype(bool).tolist(), "mask array"),
    (lambda value: as_mask(value).tolist(), "mask array"),
    (lambda value: as_mask(value)[:40].astype(float).tolist(), "mask array"),
    (lambda value: "1 2 3 4 5 6", "'1 2 3 4 5 6'"), (lambda value: 7, "but 7"),
    (lambda value: [{"x": 1, "y": 2}] * 3, "not a list of x, y pairs"), (lambda value: None, "only a box perhaps")])
def test_what_is_no_list_of_coordinates_is_named(value, words, tmp_path, capfd):
    message = refused(capfd, make(tmp_path / "data", each("segmentation", value)), tmp_path / "out", "--audit")
    assert words in message and message.count("6 of 6 in ") == 2 and "annotation id 0" in message
    assert "--skip-bad-images" not in message
    assert "6 of 6 in train: " in refused(capfd, tmp_path / "data", tmp_path / "out", "--audit", "--skip-bad-images")


@pytest.mark.parametrize("value", [lambda value: value[0], lambda value: np.reshape(value[0], (-1, 2)).tolist(),
                                   lambda value: [np.reshape(value[0], (-1, 2)).tolist()]])
def test_one_polygon_may_be_written_flat_or_as_pairs(value, tmp_path, capfd):
    expected = masks(make(tmp_path / "as usual"))
    data = make(tmp_path / "data", each("segmentation", value))
    assert all(map(np.array_equal, masks(data), expected)) and expected[0].sum() > 300
    assert remarks(accepted(capfd, data, tmp_path / "out")[0]) == []


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_valid_files_are_never_refused_or_changed(tmp_path, data):
    """Any size, several polygons, boxes as tools write them: the masks are pycocotools'."""
    images, annotations, expected = [], [], []
    for i in range(data.draw(st.integers(1, 5))):
        height, width = data.draw(st.tuples(st.integers(64, 700), st.integers(64, 700)))
        images.append({"id": i, "file_name": f"{i}.png", "height": height, "width": width})
        polygons = [octagon(data.draw(st.floats(0.2, 0.8)) * width, data.draw(st.floats(0.2, 0.8)) * height,
                            data.draw(st.floats(0.05, 0.2)) * width, data.draw(st.floats(0.05, 0.2)) * height)
                    for _ in range(data.draw(st.integers(1, 2)))]
        box = bounding_box(sum(polygons, []))
        annotations.append({"id": i, "image_id": i, "category_id": 1, "segmentation": polygons,
                            "bbox": data.draw(st.sampled_from([box, np.round(box).tolist(), None]))})
        expected.append(coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(polygons, height, width))))
    write_coco(tmp_path, images, annotations)
    split = script.read_coco(tmp_path)
    assert all(map(np.array_equal, (entry.mask() for entry in split.entries), expected))
    assert not any(entry.remarks for entry in split.entries)


# ===== Sizes ==========================================================================================


def swap_sizes(coco, _folder):
    for image in coco["images"]:
        image["width"], image["height"] = image["height"], image["width"]


@pytest.mark.parametrize("count", [1, 3])
def test_width_and_height_that_are_swapped_are_refused(count, tmp_path, capfd):
    """A mistake in all images is not to be skipped."""
    data = make(tmp_path / "data", swap_sizes, count)
    for more in ([], ["--skip-bad-images"]):
        message = refused(capfd, data, tmp_path / "out", "--audit", *more)
        assert ("swapped in the JSON, 3 of 3 in train: " in message) == (count == 3)
        assert count == 3 or "no usable image" in message if more else "96x128 pixels in the JSON, 128x96" in message
        assert ("--skip-bad-images" in message) == (count == 1 and not more)


def test_sizes_are_checked_without_comparing_every_image_with_every_other(monkeypatch):
    monkeypatch.setattr(script.ImageEntry, "__eq__", lambda *_: pytest.fail("57,000 images would take hours"))
    sizes = [(50, 40), (80, 100), (40, 50), ()] * 3  # swapped, resized, right, unreadable
    entries = [script.ImageEntry(i, "", f"{i}.png", 40, 50, file_size=size) for i, size in enumerate(sizes)]
    split = script.Split(Path("train"), entries, {})
    script.check_sizes(split)
    (kind, detail), = split.problems
    assert "swapped in the JSON, 3 of 12 in train" in kind and "0.png, 50x40 pixels in the JSON, 40x50" in detail
    assert [bool(entry.remarks) for entry in entries] == [False, True, False, False] * 3


def test_files_that_were_resized_give_one_remark_and_the_right_mask(tmp_path, capfd):
    def shrink(coco, folder):
        for image in coco["images"]:
            write(folder / image["file_name"], noise_picture(image["id"], 48, 64))

    data = make(tmp_path / "data", shrink)
    said = remarks(accepted(capfd, data, tmp_path / "out")[0])
    assert sum("(the mask is stretched with it) (12 times)" in line for line in said) == 1
    assert all(map(np.array_equal, masks(data), masks(make(tmp_path / "as usual"))))


# ===== What counts as tumour ==========================================================================================


def add_brain(coco, _folder):
    coco["categories"].append({"id": 2, "name": "brain"})
    coco["annotations"].append({"id": 99, "image_id": 0, "category_id": 2, "segmentation": [octagon(64, 48, 60, 45)]})


def test_several_categories_are_counted_and_named(tmp_path, capfd):
    data = make(tmp_path / "data", add_brain)
    out = accepted(capfd, data, tmp_path / "out")[0]
    assert table(out)["annotations: tumor"] == ["6", "6"] and table(out)["annotations: brain"] == ["1", "1"]
    said = 'all categories count as tumour: tumor, brain. To choose, set CATEGORIES (--categories "tumor")'
    assert said in remarks(out)
    out = accepted(capfd, data, tmp_path / "out", "--categories", "tumor")[0]
    assert table(out)["annotations: brain (ignored)"] == ["1", "1"] and "all categories" not in out


@pytest.mark.parametrize("one, other", [(1.0, 1), ("1", 1), (1, 1.0), (1, "1")])
def test_ids_are_the_same_as_numbers_and_as_text(one, other, tmp_path, capfd):
    def change(coco, _):
        for annotation in coco["annotations"]:
            annotation |= {"category_id": one, "image_id": type(one)(annotation["image_id"])}
        coco["categories"][0]["id"] = other

    out = accepted(capfd, make(tmp_path / "data", change), tmp_path / "out", "--categories", "tumor")[0]
    assert table(out)["annotations: tumor"] == ["6", "6"]


@pytest.mark.parametrize("value", [None, 7, "x"])
def test_a_category_id_that_the_file_lacks_is_a_problem_where_categories_are_chosen(value, tmp_path, capfd):
    data = make(tmp_path / "data", each("category_id", lambda _: value))
    assert table(accepted(capfd, data, tmp_path / "out")[0])[f"annotations: unknown id {value}"] == ["6", "6"]
    message = refused(capfd, data, tmp_path / "out", "--categories", "tumor")
    assert f"annotation id 0, category id {value}" in message and "does not list (12 times)" in message


@pytest.mark.parametrize("name", ["tumor ", "\u200btumor", "tumor\u00a0", "\ufefftumor"])
def test_invisible_blanks_around_a_category_do_not_matter(name, tmp_path, capfd):
    data = make(tmp_path / "data", lambda coco, _: coco["categories"][0].update(name=name))
    accepted(capfd, data, tmp_path / "out", "--categories", "tumor")
    accepted(capfd, make(tmp_path / "plain"), tmp_path / "out", "--categories", name)


# ===== Pictures =======================================================================================================


def gradient(dtype, low, high):
    return np.linspace(low, high, 64 * 64).reshape(64, 64).astype(dtype)


@pytest.mark.parametrize("dtype, low, high", [(np.float32, 0, 1), (np.int32, -500, 90_000),
                                              (np.uint16, 100, 40_000), (np.int16, -1000, 3000)])
def test_grey_images_of_every_number_type_are_read(dtype, low, high, tmp_path):
    image = script.read_image(write(tmp_path / "a.tif", gradient(dtype, low, high)))
    assert image.shape == (64, 64, 3) and image.dtype == np.uint8
    assert np.abs(image[..., 1] - gradient(float, 0, 255)).max() <= 2


@pytest.mark.parametrize("dtype", [np.uint16, np.float32])
def test_a_few_hot_pixels_do_not_take_the_contrast(dtype, tmp_path):
    grey = gradient(dtype, 0, 1000)
    expected = script.read_image(write(tmp_path / "a.tif", grey)).astype(int)
    grey[0, :4] = 65535
    found = script.read_image(write(tmp_path / "b.tif", grey)).astype(int)
    assert np.abs(found - expected)[1:].max() <= 2
    assert script.read_image(tmp_path / "b.tif", percentiles=(0, 100))[1:].max() <= 4  # as earlier versions scaled it


def test_a_deep_image_needs_little_more_memory_than_its_pixels(tmp_path):
    """Bytes per pixel: 2 in the file, 3 as RGB, and what the levels need on the way."""
    path = write(tmp_path / "a.png", np.random.default_rng(0).integers(0, 4000, (1000, 1000), np.uint16))
    script.read_image(path)
    tracemalloc.start()
    script.read_image(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20 * 10**6


def test_a_mostly_empty_picture_keeps_its_contrast(tmp_path):
    """Fewer bright pixels than the percentiles clip."""
    grey = np.zeros((64, 64), np.uint16)
    grey[3, 3] = 900
    assert script.read_image(write(tmp_path / "a.tif", grey)).max() == 255


def test_16_bit_tiffs_whose_0_is_white_are_inverted_like_8_bit_ones(tmp_path):
    for dtype, top in ((np.uint8, 255), (np.uint16, 60_000)):
        path = write(tmp_path / "a.tif", gradient(dtype, 0, top))
        data = bytearray(path.read_bytes())
        order = "little" if data[:2] == b"II" else "big"
        place = int.from_bytes(data[4:8], order)
        for start in range(place + 2, place + 2 + 12 * int.from_bytes(data[place:place + 2], order), 12):
            if int.from_bytes(data[start:start + 2], order) == 262:
                assert data[start + 8:start + 10] == (1).to_bytes(2, order)
                data[start + 8:start + 10] = bytes(2)
        expected = 255 - script.read_image(path).astype(int)
        path.write_bytes(data)
        assert np.abs(script.read_image(path) - expected).max() <= 1


def test_several_pages_and_numbers_that_are_not_finite_are_refused_by_name(tmp_path):
    ok = cv2.imwritemulti(str(tmp_path / "pages.tif"), [np.zeros((64, 64), np.uint8), gradient(np.uint8, 0, 255)])
    assert ok
    with pytest.raises(script.TrainerError, match="pages.tif: has more than one page"):
        script.read_image(tmp_path / "pages.tif")
    for value in (np.nan, np.inf):
        grey = gradient(np.float32, 0, 1)
        grey[3, 4] = value
        with pytest.raises(script.TrainerError, match="a.tif: has pixels that are not finite"):
            script.read_image(write(tmp_path / "a.tif", grey))


# ===== Files that are there ===========================================================================================


def move_into_images(name, folder):
    (folder / "images").mkdir(exist_ok=True)
    os.replace(folder / name, folder / "images" / name)
    return name


def rename(written, stored):
    """A file that the disk has under another name than the JSON."""
    def change(name, folder):
        os.replace(folder / name, folder / stored(name))
        return written(name)
    return change


@pytest.mark.parametrize("change, said", [
    (move_into_images, False), (lambda name, folder: f"data/train/{name}", False),
    (lambda name, folder: f"images/{name}", False),
    (rename(lambda name: name, str.upper), True), (rename(str.upper, lambda name: name), True),
    (rename(lambda name: quote("脑 " + name), lambda name: "脑 " + name), True),
    (rename(lambda name: unicodedata.normalize("NFC", "é" + name),
            lambda name: unicodedata.normalize("NFD", "é" + name)), True)],
    ids=["images/ on the disk", "a prefix in the JSON", "images/ in the JSON", "upper case on the disk", "upper case",
         "%-encoding", "Unicode form"])
def test_one_file_that_can_only_be_meant_is_used(change, said, tmp_path, capfd):
    """With one remark if its name differs; another folder is none."""
    def rename_all(coco, folder):
        for image in coco["images"]:
            image["file_name"] = change(image["file_name"], folder)

    data = make(tmp_path / "data", rename_all)
    out = accepted(capfd, data, tmp_path / "out")[0]
    assert [line.partition(": ")[0] for line in remarks(out)] == [
        "file name that the JSON writes otherwise (12 times)"] * said
    assert table(out)["files that the JSON does not list"] == ["0", "0"]


def test_two_images_that_want_one_file_get_it_neither(tmp_path, capfd):
    def change(coco, folder):
        coco["images"][0]["file_name"], coco["images"][1]["file_name"] = "a/1.PNG", "b/1.PNG"

    data = make(tmp_path / "data", change)
    assert "file that is listed as two images (4 times)" in refused(capfd, data, tmp_path / "out", "--audit")
    assert table(accepted(capfd, data, tmp_path / "out", "--skip-bad-images")[0])["images"] == ["4", "4"]


def test_a_folder_that_prediction_has_written_can_be_trained_on(tmp_path):
    """It holds each name three times."""
    def change(coco, folder):
        for image in coco["images"]:
            for name in ("images", "masks", "overlays"):
                write(folder / name / image["file_name"], noise_picture(image["id"], *SIZE))
            (folder / image["file_name"]).unlink()

    split = script.read_coco(make(tmp_path / "data", change) / "train")
    assert {os.path.dirname(entry.path) for entry in split.entries} == {str(tmp_path / "data" / "train" / "images")}


def test_files_of_one_name_in_several_folders_are_told_apart_by_the_folder(tmp_path, capfd):
    """Or named, if that does not tell."""
    def patients(coco, folder, prefix):
        for image in coco["images"][:2]:
            patient = folder / "images" / f"patient{image['id']}"
            patient.mkdir(parents=True)
            os.replace(folder / image["file_name"], patient / "slice.png")
            image["file_name"] = prefix.format(image["id"])

    data = make(tmp_path / "data", partial(patients, prefix="patient{}/slice.png"))
    entries = script.read_coco(data / "train").entries
    assert [entry.path for entry in entries[:2]] == [
        str(data / "train/images" / f"patient{i}" / "slice.png") for i in range(2)]
    data = make(tmp_path / "other", partial(patients, prefix="p{}/slice.png"))
    message = refused(capfd, data, tmp_path / "out", "--audit")
    assert "the file is missing (4 times): " in message and "slice.png" in message


def test_a_name_that_two_folders_have_is_not_guessed(tmp_path, capfd):
    def change(_, folder):
        os.remove(folder / "0.png")
        for name in ("a", "b"):
            write(folder / name / "0.png", noise_picture(7, *SIZE))

    message = refused(capfd, make(tmp_path / "data", change), tmp_path / "out", "--audit")
    assert "the file is missing (2 times): " in message and "0.png" in message


def test_if_all_files_are_missing_skipping_is_not_recommended(tmp_path, capfd):
    def remove(coco, folder):
        for image in coco["images"] if folder.name == "valid" else []:
            (folder / image["file_name"]).unlink()

    data = make(tmp_path / "data", remove)
    for more in ([], ["--skip-bad-images"]):
        message = refused(capfd, data, tmp_path / "out", "--audit", *more)
        assert "all image files are missing" in message and str(data / "valid") in message
        assert "--skip-bad-images" not in message


@pytest.mark.parametrize("name", ["val", "validation"])
def test_the_folder_of_valid_may_have_other_names(name, tmp_path, capfd):
    data = make(tmp_path / "data", splits=("train", name))
    assert table(accepted(capfd, data, tmp_path / "out")[0])["images"] == ["6", "6"]


# ===== Images without annotation ======================================================================================


def forget(coco, _folder, count=2):
    """The first images have no annotation."""
    coco["annotations"] = coco["annotations"][count:]


def test_images_without_annotation_are_said_and_can_be_skipped(tmp_path, capfd):
    data = make(tmp_path / "data", forget)
    out = accepted(capfd, data, tmp_path / "out")[0]
    assert table(out)["without annotation"] == ["2", "2"] and table(out)["images"] == ["6", "6"]
    said, = remarks(out)
    assert said.startswith("4 of 12 images have no annotation (0.png, 1.png, 0.png, ...): they count as free of")
    out = accepted(capfd, data, tmp_path / "out", "--unannotated", "skip")[0]
    assert table(out)["without annotation"] == ["0", "0"] and table(out)["images"] == ["4", "4"] and remarks(out) == []


def test_of_the_phantoms_everybody_knows_that_some_are_free_of_tumour():
    splits = {name: script.read_coco(ROOT / name) for name in ("train", "valid", "test")}
    assert any(not entry.annotated for entry in splits["train"].entries) and script.split_remarks(splits, ()) == []


def test_an_image_with_annotations_of_other_categories_is_annotated(tmp_path, capfd):
    def change(coco, folder):
        add_brain(coco, folder)
        coco["annotations"] = coco["annotations"][1:]  # image 0 has only the brain

    data = make(tmp_path / "data", change)
    out = accepted(capfd, data, tmp_path / "out", "--categories", "tumor", "--unannotated", "skip")[0]
    assert table(out)["images"] == ["6", "6"] and table(out)["without tumour"] == ["1", "1"]


@pytest.mark.parametrize("unannotated, fraction, warns", [(10, 0.9, True), (10, 0.5, True), (10, 0.4, False),
                                                          (4, 1, False), (0, 1, False)])
def test_confident_predictions_on_images_without_annotation_are_a_warning(unannotated, fraction, warns, capfd):
    entries = [script.ImageEntry(i, f"{i}.png", f"{i}.png", 100, 100, annotations=Counter("t" * (i >= unannotated)))
               for i in range(20)]
    confident = [25.0 if i < fraction * unannotated or i >= unannotated else 15.0 for i in range(20)]
    script.report_unannotated("valid", entries, confident)
    err = capfd.readouterr().err
    assert bool(err) == warns
    if warns:
        assert f"in {int(10 * fraction)} of 10 images of valid without annotation, a tumour is predicted" in err
        assert "Look at 0.png, 1.png, 2.png, and see UNANNOTATED" in err


def test_evaluation_takes_unannotated_from_the_run_which_keeps_it(tmp_path, capfd, tiny, monkeypatch):
    for name in ("plot_samples", "plot_history", "plot_predictions", "plot_report"):
        monkeypatch.setattr(script, name, lambda *_: None)
    data, out = make(tmp_path / "data", forget, splits=("train", "valid", "test")), tmp_path / "out"
    words = [*arguments(data, out, "--epochs", "1"), "--unannotated", "skip"]
    assert script.main(words) == 0
    assert script.read_metadata(out / script.BEST)[0]["settings"]["UNANNOTATED"] == "skip"
    capfd.readouterr()
    assert script.main(arguments(data, out, "--evaluate")) == 0
    text = capfd.readouterr().out
    assert re.search(r"^  images +4 +4$", text, re.M) and "UNANNOTATED = 'skip'" in text
    assert script.main(arguments(data, out, "--resume", "--unannotated", "tumour-free")) == 2
    assert "UNANNOTATED: saved 'skip', now 'tumour-free'" in capfd.readouterr().err


def test_a_test_set_without_any_tumour_is_said_beside_its_scores(tmp_path, capfd, tiny, monkeypatch):
    for name in ("plot_samples", "plot_history", "plot_predictions", "plot_report"):
        monkeypatch.setattr(script, name, lambda *_: None)

    def change(coco, folder):
        coco["annotations"] = [] if folder.name == "test" else coco["annotations"]

    data = make(tmp_path / "data", change, splits=("train", "valid", "test"))
    assert script.main(arguments(data, tmp_path / "out", "--epochs", "1")) == 0
    text = capfd.readouterr().out
    assert "No image of test has a tumour, and " in text and "No image of valid" not in text
