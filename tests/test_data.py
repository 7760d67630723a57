"""Annotations to masks, files to pixels, and the resizing between the two."""

import cv2
import numpy as np
import pytest
import torch
from conftest import box, script, write_coco
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO


def write_png(path, image):
    """Write RGB or grey uint8 pixels as PNG, under any name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(cv2.imencode(".png", image if image.ndim == 2 else image[..., ::-1])[1].tobytes())


def annotation(segmentation, number=1, image_id=1, category_id=1, **more):
    """A COCO annotation entry."""
    return {"id": number, "image_id": image_id, "category_id": category_id, "segmentation": segmentation, "iscrowd": 0,
            **more}


def one_image(folder, annotations, image=None, name="a.png", height=40, width=50, **more):
    """A split with a single image and the given annotations."""
    image = np.zeros((height, width), np.uint8) if image is None else image
    write_png(folder / name, image)
    write_coco(folder, [{"id": 1, "file_name": name, "height": image.shape[0], "width": image.shape[1]}], annotations,
               **more)
    return folder


def masks(folder, categories=()):
    """The masks of a split at the resolution of its annotations, in the order of the file."""
    return [record.mask() for record in script.BrainTumorDataset(folder, categories=categories).records]


def dice(a, b):
    """Dice of two 0/1 masks."""
    return 2 * (a & b).sum() / (a.sum() + b.sum())


def filled(height, width, *boxes):
    """A mask that is 1 in rows y0..y1-1 and columns x0..x1-1 of each (x0, y0, x1, y1)."""
    out = np.zeros((height, width), np.uint8)
    for x0, y0, x1, y1 in boxes:
        out[y0:y1, x0:x1] = 1
    return out


def random_polygon(rng, height, width, radius):
    """A small star-shaped outline with fractional coordinates."""
    angle = np.sort(rng.uniform(0, 2 * np.pi, 9))
    r = radius * rng.uniform(0.5, 1, 9)
    xy = np.stack([rng.uniform(8, width - 8) + r * np.cos(angle), rng.uniform(8, height - 8) + r * np.sin(angle)], 1)
    return [round(float(v), 2) for v in xy.ravel()]


# --- masks whose pixels are known by hand


def test_a_box_covers_exactly_its_pixels(tmp_path):
    """COCO puts pixel i on [i, i + 1]: the box from 10 to 17 holds the pixels 10 to 16, and not 17."""
    folder = one_image(tmp_path, [annotation([box(10, 5, 7, 3)])])
    assert np.array_equal(masks(folder)[0], filled(40, 50, (10, 5, 17, 8)))


def test_a_multi_part_polygon_fills_all_its_parts(tmp_path):
    folder = one_image(tmp_path, [annotation([box(2, 2, 4, 4), box(30, 20, 5, 6)])])
    assert np.array_equal(masks(folder)[0], filled(40, 50, (2, 2, 6, 6), (30, 20, 35, 26)))


def test_uncompressed_rle_counts_down_the_columns(tmp_path):
    """Counts 4, 2, 6 on 3 x 4 pixels: four zeros fill column 0 and the top of column 1, then come two ones."""
    folder = one_image(tmp_path, [annotation({"size": [3, 4], "counts": [4, 2, 6]})], height=3, width=4)
    assert np.array_equal(masks(folder)[0], [[0, 0, 0, 0], [0, 1, 0, 0], [0, 1, 0, 0]])


def test_compressed_rle_is_read(tmp_path):
    truth = filled(40, 50, (3, 4, 9, 20), (40, 30, 50, 40))
    rle = coco_mask.encode(np.asfortranarray(truth))
    folder = one_image(tmp_path, [annotation({"size": [40, 50], "counts": rle["counts"].decode()})])
    assert np.array_equal(masks(folder)[0], truth)


def test_crowd_annotations_count_like_all_others(tmp_path):
    """A crowd is written as an uncompressed RLE; its first count is 0 when the first pixel belongs to it."""
    crowd = {"size": [4, 5], "counts": [0, 4, 12, 4]}  # the first and the last column
    folder = one_image(tmp_path, [annotation(crowd, iscrowd=1)], height=4, width=5)
    assert np.array_equal(masks(folder)[0], filled(4, 5, (0, 0, 1, 4), (4, 0, 5, 4)))


def test_all_annotations_of_an_image_are_merged(tmp_path):
    """Polygons that overlap, and an RLE: the union is 1 everywhere, never 2."""
    rle = coco_mask.encode(np.asfortranarray(filled(40, 50, (0, 0, 3, 3))))
    folder = one_image(tmp_path, [
        annotation([box(10, 10, 10, 10)], 1), annotation([box(15, 15, 10, 10)], 2),
        annotation({"size": [40, 50], "counts": rle["counts"].decode()}, 3)])
    assert np.array_equal(masks(folder)[0], filled(40, 50, (0, 0, 3, 3), (10, 10, 20, 20), (15, 15, 25, 25)))


def test_a_polygon_that_leaves_the_image_is_cut_at_its_border(tmp_path):
    folder = one_image(tmp_path, [annotation([box(45, 35, 100, 100)])])
    assert np.array_equal(masks(folder)[0], filled(40, 50, (45, 35, 50, 40)))


# --- masks against pycocotools


def test_random_polygons_give_the_pixels_of_pycocotools(tmp_path):
    """Small outlines with fractional corners, where a rasteriser of truncated corners is several per cent too large."""
    rng = np.random.default_rng(0)
    entries, notes = [], []
    for i in range(60):
        parts = [random_polygon(rng, 60, 80, rng.uniform(2, 8)) for _ in range(1 + i % 3)]
        entries.append({"id": i, "file_name": f"{i}.png", "height": 60, "width": 80})
        notes += [annotation([part], 10 * i + k, i) for k, part in enumerate(parts)] if i % 2 else [
            annotation(parts, 10 * i, i)]
    write_coco(tmp_path, entries, notes)
    reference = COCO(tmp_path / "_annotations.coco.json")
    for i, mask in enumerate(masks(tmp_path)):
        union = np.zeros((60, 80), np.uint8)
        for note in reference.loadAnns(reference.getAnnIds(imgIds=[i])):
            union |= reference.annToMask(note)
        assert mask.dtype == np.uint8 and union.any()
        assert np.array_equal(mask, union), f"image {i}"


def test_every_kind_of_segmentation_gives_the_pixels_of_pycocotools(tmp_path):
    rng = np.random.default_rng(1)
    blob = (cv2.GaussianBlur(rng.standard_normal((40, 50)), (0, 0), 3) > 0.05).astype(np.uint8)
    compressed = coco_mask.encode(np.asfortranarray(blob))
    flat = np.concatenate([[0], blob.ravel("F"), [1 - blob[-1, -1]]])
    runs = np.diff(np.concatenate([[0], np.flatnonzero(np.diff(flat)), [blob.size]])).tolist()
    kinds = [[random_polygon(rng, 40, 50, 9)], [random_polygon(rng, 40, 50, 5) for _ in range(3)],
             {"size": [40, 50], "counts": compressed["counts"].decode()}, {"size": [40, 50], "counts": runs}]
    entries = [{"id": i, "file_name": f"{i}.png", "height": 40, "width": 50} for i in range(len(kinds))]
    write_coco(tmp_path, entries, [annotation(kind, i, i, iscrowd=int(i == 3)) for i, kind in enumerate(kinds)])
    reference = COCO(tmp_path / "_annotations.coco.json")
    for i, mask in enumerate(masks(tmp_path)):
        assert np.array_equal(mask, reference.annToMask(reference.anns[i])), f"kind {i}"
    assert np.array_equal(masks(tmp_path)[3], blob)


# --- which annotations and images count


def two_categories(folder):
    """One image with an oedema on the left and a tumour on the right."""
    return one_image(folder, [annotation([box(0, 0, 5, 40)], 1, category_id=3),
                              annotation([box(40, 0, 10, 40)], 2, category_id=7)],
                     categories=[{"id": 3, "name": "oedema"}, {"id": 7, "name": "肿瘤"}])


@pytest.mark.parametrize("chosen, expected", [
    ((), [(0, 0, 5, 40), (40, 0, 50, 40)]), (("肿瘤",), [(40, 0, 50, 40)]), (("oedema",), [(0, 0, 5, 40)]),
    (("oedema", "肿瘤"), [(0, 0, 5, 40), (40, 0, 50, 40)])])
def test_categories_say_what_counts_and_all_count_by_default(tmp_path, chosen, expected):
    folder = two_categories(tmp_path)
    assert np.array_equal(masks(folder, chosen)[0], filled(40, 50, *expected))
    dataset = script.BrainTumorDataset(folder, img_size=64, normalize=False, categories=chosen)
    assert dataset[0][1].mean() == pytest.approx(filled(40, 50, *expected).mean(), abs=0.02)


def test_a_category_that_does_not_exist_is_an_error_that_names_those_that_do(tmp_path):
    with pytest.raises(script.TrainerError, match="metastasis.*oedema"):
        script.BrainTumorDataset(two_categories(tmp_path), categories=("metastasis",))


def test_an_image_without_annotation_is_a_negative(tmp_path):
    for name in ("with.png", "without.png"):
        write_png(tmp_path / name, np.full((64, 64), 90, np.uint8))
    write_coco(tmp_path, [{"id": i, "file_name": name, "height": 64, "width": 64}
                          for i, name in enumerate(("with.png", "without.png"))], [annotation([box(8, 8, 8, 8)], 1, 0)])
    dataset = script.BrainTumorDataset(tmp_path, img_size=64)
    assert len(dataset) == 2
    assert dataset[0][1].sum() == 64 and dataset[1][1].sum() == 0
    assert dataset[1][1].shape == (1, 64, 64)


def test_an_unreadable_image_is_never_replaced_by_a_black_one(tmp_path):
    folder = one_image(tmp_path, [annotation([box(5, 5, 9, 9)])])
    (folder / "a.png").write_bytes(b"no picture")
    dataset = script.BrainTumorDataset(folder, img_size=64)
    with pytest.raises(script.TrainerError, match="a.png"):
        dataset[0]


# --- names and colours


def test_non_ascii_folders_and_names_are_read(tmp_path, monkeypatch):
    """cv2.imread returns None for such names on Windows only, so the test forbids it everywhere."""
    monkeypatch.setattr(cv2, "imread", lambda *_: pytest.fail("cv2.imread cannot read such a path on Windows"))
    image = np.full((64, 64), 77, np.uint8)
    folder = one_image(tmp_path / "脑肿瘤 数据" / "тест", [annotation([box(1, 2, 3, 4)])], image, "切片_ü_一.png")
    pixels, mask = script.BrainTumorDataset(folder, img_size=64, normalize=False)[0]
    assert (pixels == 77).all() and np.array_equal(mask, filled(64, 64, (1, 2, 4, 6)))


def test_channels_are_in_rgb_order(tmp_path):
    image = np.zeros((64, 64, 3), np.uint8)
    image[..., 0], image[..., 1], image[..., 2] = 200, 100, 50
    pixels, _ = script.BrainTumorDataset(one_image(tmp_path, [], image), img_size=64, normalize=False)[0]
    assert pixels[3, 5].tolist() == [200, 100, 50]


# --- resizing


@pytest.mark.parametrize("size, tolerance", [(256, 1), (640, 7)])
def test_a_fine_checkerboard_becomes_an_even_grey(tmp_path, size, tolerance):
    """Averaging 4 x 4 pixels gives 127 or 128. At a ratio of 2.5 the 2.5 x 2.5 squares are at most 1/25 out of balance.

    Sampling without averaging keeps the full black and white, or turns them into broad stripes.
    """
    board = (np.indices((size, size)).sum(0) % 2 * 255).astype(np.uint8)
    pixels, _ = script.BrainTumorDataset(one_image(tmp_path, [], board), img_size=64 if size == 256 else 256,
                                         normalize=False)[0]
    assert np.abs(pixels.astype(int) - 127.5).max() <= tolerance


def test_an_image_of_the_right_size_is_not_touched(tmp_path):
    image = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    pixels, _ = script.BrainTumorDataset(one_image(tmp_path, [], image), img_size=64, normalize=False)[0]
    assert np.array_equal(pixels, image)


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
    rng = np.random.default_rng(3)
    mask = (cv2.GaussianBlur(rng.standard_normal((64, 64)), (0, 0), 4) > 0).astype(np.uint8)
    small = script.resize_mask(mask, height, width)
    assert small.dtype == np.uint8 and small.shape == (height, width)
    assert np.array_equal(script.resize_mask(mask[::-1, ::-1], height, width), small[::-1, ::-1])
    assert small.mean() == pytest.approx(mask.mean(), abs=0.03)


def test_a_mask_comes_back_from_256_to_640_better_than_with_nearest_neighbours():
    rng = np.random.default_rng(4)
    ours, nearest = [], []
    for _ in range(20):
        mask = np.zeros((640, 640), np.uint8)
        centre, axes = rng.uniform(150, 490, 2), rng.uniform(15, 60, 2)
        cv2.ellipse(mask, (tuple(centre), tuple(2 * axes), rng.uniform(0, 180)), 1, -1)
        there = cv2.resize(mask, (256, 256), interpolation=cv2.INTER_NEAREST)
        nearest.append(dice(cv2.resize(there, (640, 640), interpolation=cv2.INTER_NEAREST), mask))
        ours.append(dice(script.resize_mask(script.resize_mask(mask, 256, 256), 640, 640), mask))
    assert np.mean(ours) > max(0.985, np.mean(nearest) + 0.005)


def test_thin_structures_follow_the_half_area_rule():
    """At a quarter of the size, a line of 1 pixel covers a quarter of its pixels and goes, one of 3 pixels stays."""
    one, three = np.zeros((2, 64, 64), np.uint8)
    one[:, 21] = 1
    three[:, 20:23] = 1
    assert script.resize_mask(one, 16, 16).sum() == 0
    assert np.array_equal(script.resize_mask(three, 16, 16), filled(16, 16, (5, 0, 6, 16)))


def test_image_and_mask_of_a_non_square_slice_are_stretched_alike(tmp_path):
    """A white box on black, drawn into the image and annotated: both end on the same pixels of the square."""
    image = filled(96, 160, (40, 24, 80, 72)) * 255
    pixels, mask = script.BrainTumorDataset(one_image(tmp_path, [annotation([box(40, 24, 40, 48)])], image),
                                            img_size=32, normalize=False)[0]
    assert np.array_equal(mask, filled(32, 32, (8, 8, 16, 24)))
    assert np.array_equal(pixels[..., 0], mask * 255)


# --- items of the dataset


def test_items_are_normalised_float_tensors(tmp_path):
    """Grey 100 of 255 under ImageNet statistics: (100 / 255 - mean) / std for each channel."""
    folder = one_image(tmp_path, [annotation([box(0, 0, 32, 64)])], np.full((64, 64), 100, np.uint8))
    image, mask = script.BrainTumorDataset(folder, img_size=64)[0]
    assert isinstance(image, torch.Tensor) and isinstance(mask, torch.Tensor)
    assert image.shape == (3, 64, 64) and image.dtype == torch.float32
    assert mask.shape == (1, 64, 64) and mask.dtype == torch.float32
    assert set(mask.unique().tolist()) == {0.0, 1.0} and mask[0, :, :32].all() and not mask[0, :, 32:].any()
    expected = [(100 / 255 - 0.485) / 0.229, (100 / 255 - 0.456) / 0.224, (100 / 255 - 0.406) / 0.225]
    assert image.mean((1, 2)).tolist() == pytest.approx(expected, abs=1e-5)
    assert image.std((1, 2)).max() < 1e-5


@pytest.mark.parametrize("train", [False, True])
def test_raw_items_normalised_on_the_device_equal_normalised_items(tmp_path, train):
    """The loaders send uint8 arrays and to_input() normalises: the network must see the same numbers either way."""
    image = np.random.default_rng(5).integers(0, 256, (64, 64, 3), np.uint8)
    folder = one_image(tmp_path, [annotation([box(9, 9, 30, 20)])], image)
    statistics = {"mean": (0.2, 0.5, 0.4), "std": (0.3, 0.1, 0.25)}
    for options in ({}, statistics):
        normalised, target = script.BrainTumorDataset(folder, img_size=64, train=train, **options)[0]
        raw, mask = script.BrainTumorDataset(folder, img_size=64, train=train, normalize=False, **options)[0]
        assert raw.dtype == np.uint8 and raw.shape == (64, 64, 3)
        assert mask.dtype == np.uint8 and mask.shape == (64, 64)
        seen = script.to_input(raw[None], torch.device("cpu"), **options)
        assert seen.dtype == torch.float32 and seen.shape == (1, 3, 64, 64)
        torch.testing.assert_close(seen[0], normalised, atol=1e-5, rtol=1e-5)
        assert torch.equal(script.to_target(mask[None], torch.device("cpu"))[0], target)


def test_the_image_size_is_that_of_the_argument(tmp_path):
    folder = one_image(tmp_path, [], np.full((50, 70), 9, np.uint8))
    for size in (64, 96):
        image, mask = script.BrainTumorDataset(folder, img_size=size)[0]
        assert image.shape == (3, size, size) and mask.shape == (1, size, size)
