"""Random polygons against pycocotools, and random COCO files: success or TrainerError, nothing else."""

import json
import math

import cv2
import numpy as np
import pycocotools.mask as coco_mask
import pytest
from conftest import script
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

HEIGHT, WIDTH = 40, 56
bounded = settings(max_examples=150, deadline=None, derandomize=True,
                   suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])

near = st.floats(-80, 160, width=32)  # up to twice the image away: never clipped before rasterising
any_float = st.floats(allow_nan=False, allow_infinity=False)
points = st.integers(3, 12).flatmap(lambda n: st.lists(near, min_size=2 * n, max_size=2 * n))
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=7) | st.dictionaries(st.text(max_size=6), inner, max_size=3), max_leaves=12)


def reference(polygons):
    """The union of polygons as pycocotools rasterises it: uint8 [HEIGHT, WIDTH]."""
    return coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(polygons, HEIGHT, WIDTH)))


@bounded
@given(st.lists(points, min_size=1, max_size=4))
@example([[10, 10, 10, 10, 10, 10]])
@example([[0, 0, WIDTH, 0, WIDTH, HEIGHT, 0, HEIGHT]])
@example([[-50, -50, 100, -50, 100, 100, -50, 100]])
def test_polygons_are_rasterised_as_pycocotools_does(polygons):
    rle, _ = script.segmentation_to_rle(polygons, HEIGHT, WIDTH)
    np.testing.assert_array_equal(coco_mask.decode(rle), reference(polygons))


@bounded
@given(st.lists(points, min_size=1, max_size=3), st.lists(st.lists(near, min_size=2, max_size=2), max_size=2))
def test_parts_with_too_few_points_change_nothing(polygons, short):
    rle, remarks = script.segmentation_to_rle([*short, *polygons], HEIGHT, WIDTH)
    np.testing.assert_array_equal(coco_mask.decode(rle), reference(polygons))
    assert sum("fewer than three" in remark for remark in remarks) == len(short)


@bounded
@given(points)
def test_remarks_say_when_a_polygon_leaves_the_image(polygon):
    xy = np.reshape(polygon, (-1, 2))
    outside = bool((xy < -0.5).any() or (xy > (WIDTH + 0.5, HEIGHT + 0.5)).any())
    assert any("outside" in remark for remark in script.segmentation_to_rle([polygon], HEIGHT, WIDTH)[1]) == outside


@bounded
@given(st.integers(3, 6).flatmap(lambda n: st.lists(any_float, min_size=2 * n, max_size=2 * n)))
@example([1e308, -1e308, -1e308, 1e308, 1e308, 1e308])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_coordinates_of_any_size_end_in_a_mask_of_the_image(polygon):
    rle, _ = script.segmentation_to_rle([polygon], HEIGHT, WIDTH)
    assert coco_mask.decode(rle).shape == (HEIGHT, WIDTH)
    assert 0 <= coco_mask.area(rle) <= HEIGHT * WIDTH


@bounded
@given(st.lists(st.booleans(), min_size=HEIGHT * WIDTH // 8, max_size=HEIGHT * WIDTH // 8))
def test_both_kinds_of_rle_give_the_mask_back(bits):
    mask = np.repeat(np.array(bits, np.uint8), 8).reshape(HEIGHT, WIDTH)
    runs, value = [], 0
    for pixel in mask.T.ravel():  # by columns, beginning with a run of zeros
        if pixel != value or not runs:
            runs += [0] if pixel and not runs else []
            runs.append(0)
            value = pixel
        runs[-1] += 1
    text = coco_mask.encode(np.asfortranarray(mask))["counts"].decode()
    for counts in (runs, text):
        rle, remarks = script.segmentation_to_rle({"size": [HEIGHT, WIDTH], "counts": counts}, HEIGHT, WIDTH)
        np.testing.assert_array_equal(coco_mask.decode(rle), mask)
        assert remarks == []


@settings(bounded, max_examples=300)
@given(st.text(alphabet=[chr(code) for code in range(40, 120)], max_size=20))
def test_damaged_rle_text_is_refused_or_describes_the_whole_image(counts):
    try:
        rle, _ = script.segmentation_to_rle({"size": [HEIGHT, WIDTH], "counts": counts}, HEIGHT, WIDTH)
    except ValueError:
        return
    full = coco_mask.frPyObjects({"size": [HEIGHT, WIDTH], "counts": [0, HEIGHT * WIDTH]}, HEIGHT, WIDTH)
    rest = coco_mask.encode(np.asfortranarray(1 - coco_mask.decode(rle)))
    assert coco_mask.area(rle) + coco_mask.area(rest) == coco_mask.area(full)
    assert coco_mask.encode(np.asfortranarray(coco_mask.decode(rle)))["counts"] == rle["counts"]


@settings(bounded, max_examples=300)
@given(json_values)
def test_any_json_value_as_segmentation_is_read_or_refused(value):
    try:
        rle, remarks = script.segmentation_to_rle(value, HEIGHT, WIDTH)
    except (ValueError, TypeError, OverflowError):  # what read_coco() turns into a message
        return
    assert all(isinstance(remark, str) for remark in remarks)
    assert rle is None or coco_mask.decode(rle).shape == (HEIGHT, WIDTH)


@st.composite
def damaged_coco(draw):
    """A small COCO file in which up to three values are replaced by anything JSON can hold."""
    images = [{"id": n, "file_name": f"{n}.png", "height": HEIGHT, "width": WIDTH} for n in range(3)]
    annotations = [{"id": n, "image_id": n % 3, "category_id": 1, "iscrowd": 0, "segmentation": [draw(points)]}
                   for n in range(draw(st.integers(0, 4)))]
    coco = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "tumor"}]}
    for _ in range(draw(st.integers(0, 3))):
        place = coco
        while True:
            key = draw(st.sampled_from(sorted(place) if isinstance(place, dict) else range(len(place))))
            inner = place[key]
            if not isinstance(inner, (dict, list)) or not inner or draw(st.integers(0, 3)) == 0:
                place[key] = draw(json_values)
                break
            place = inner
        if not coco["images"]:
            break
    return coco


@settings(bounded, max_examples=300)
@given(damaged_coco())
def test_any_coco_file_is_read_or_refused(tmp_path, coco):
    (tmp_path / script.ANNOTATION_FILE).write_text(json.dumps(coco), encoding="utf-8")
    try:
        split = script.read_coco(tmp_path)
    except script.TrainerError as error:
        assert script.ANNOTATION_FILE in str(error) and error.exit_code == 2
        return
    assert len(split.records) == len(coco["images"]) and split.annotations == len(coco["annotations"])
    for record in split.records:
        mask = record.mask()
        assert mask.shape == (record.height, record.width) and set(np.unique(mask)) <= {0, 1}


@settings(bounded, max_examples=200)
@given(st.binary(max_size=60), st.integers(0, 10**6), st.sampled_from([".png", ".jpg", ".bmp", ".webp", ".tif"]))
def test_any_bytes_are_an_image_or_refused(tmp_path, content, place, suffix):
    image = np.arange(24 * 32, dtype=np.uint32).astype(np.uint8).reshape(24, 32)
    whole = bytearray(cv2.imencode(suffix, image)[1].tobytes())
    start = place % len(whole)
    whole[start:start + len(content)] = content
    (tmp_path / f"a{suffix}").write_bytes(whole)
    try:
        read = script.read_image(tmp_path / f"a{suffix}", 24, 32)
    except script.TrainerError as error:
        assert f"a{suffix}" in str(error)
        return
    assert read.dtype == np.uint8 and read.ndim == 3 and read.shape[2] == 3


@settings(bounded, max_examples=100)
@given(st.binary(min_size=1, max_size=40), st.integers(0, 10**6), st.booleans())
def test_any_bytes_are_weights_or_refused(tmp_path, content, place, old_format):
    import torch

    path = tmp_path / "a.pth"
    torch.save({"a": torch.ones(3), "b": [1, "x"]}, path, _use_new_zipfile_serialization=not old_format)
    whole = bytearray(path.read_bytes())
    start = place % len(whole)
    whole[start:start + len(content)] = content
    path.write_bytes(whole)
    try:
        assert isinstance(script.read_weights(path), dict)
    except script.TrainerError as error:
        assert "a.pth" in str(error)


@bounded
@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 20), st.booleans())
def test_batches_hold_every_image_once(count, batch_size, epoch, shuffle):
    batches = script.EvenBatches(count, batch_size, shuffle, seed=3)
    batches.set_epoch(epoch)
    keys = [key for batch in batches for key in batch]
    assert sorted(index for _, index in keys) == list(range(count)) and {e for e, _ in keys} == {epoch}
    assert len(batches) == len(list(batches)) == math.ceil(count / batch_size)
