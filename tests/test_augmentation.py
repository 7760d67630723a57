"""Augmentation: what each transform does, that they are independent, and that (seed, epoch, image) decides all."""

import copy

import albumentations as A
import cv2
import numpy as np
import pytest
from conftest import box, script, write_coco

SIZE = 32


def l_shape(size=SIZE):
    """A mask that looks different in all eight positions that flips and quarter turns can give it."""
    mask = np.zeros((size, size), np.uint8)
    mask[size // 4:3 * size // 4, size // 4:3 * size // 8] = 1
    mask[5 * size // 8:3 * size // 4, size // 4:5 * size // 8] = 1
    return mask


def split_with(folder, count, image):
    """A split of `count` identical images with the L as mask."""
    size = len(image)
    s = size // 8
    polygons = [box(2 * s, 2 * s, s, 4 * s), box(2 * s, 5 * s, 3 * s, s)]
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        (folder / f"{i}.png").write_bytes(cv2.imencode(".png", image)[1].tobytes())
    write_coco(folder, [{"id": i, "file_name": f"{i}.png", "height": size, "width": size} for i in range(count)],
               [{"id": i, "image_id": i, "category_id": 1, "segmentation": polygons, "iscrowd": 0}
                for i in range(count)])
    return folder


@pytest.fixture(scope="module")
def grey(tmp_path_factory):
    """Eight identical images of even grey; seed 7, so not the script's constant."""
    folder = split_with(tmp_path_factory.mktemp("grey"), 8, np.full((SIZE, SIZE, 3), 128, np.uint8))
    dataset = script.BrainTumorDataset(folder, img_size=SIZE, train=True, seed=7, normalize=False)
    assert np.array_equal(dataset.sample(0)[1], l_shape())
    return dataset


def like(dataset, **changes):
    """A second data set with the same images."""
    options = {"img_size": SIZE, "train": True, "seed": 7, "normalize": False, "entries": dataset.entries} | changes
    return script.BrainTumorDataset("", **options)


def even(dataset, **changes):
    """A second data set with the same images, each step of its pipeline with probability one half."""
    dataset = like(dataset, **changes)
    for step in dataset.transform.transforms:
        step.p = 0.5
    return dataset


@pytest.fixture(scope="module")
def draws(grey):
    """640 samples, each step with probability one half: images [640, S, S, 3], masks [640, S, S]."""
    dataset = even(grey)
    images, masks = zip(*(dataset[(epoch, i)] for epoch in range(80) for i in range(8)))
    return np.stack(images), np.stack(masks)


def positions():
    """The L in the eight positions; the first four are reached by flips alone."""
    plain = l_shape()
    flips = {"none": plain, "left-right": plain[:, ::-1], "up-down": plain[::-1], "both": plain[::-1, ::-1]}
    return flips | {name + ", turned": np.rot90(mask) for name, mask in flips.items()}


# Each position at a few shifts: the random shift of a sample must not decide what it looks like.
NAMES = list(positions())
LIKELY = np.stack([[np.roll(mask, (dy, dx), (0, 1)).ravel() for dy in range(-4, 5, 2) for dx in range(-4, 5, 2)]
                   for mask in positions().values()]).astype(np.float32)


def position(mask):
    """Which of the eight positions a (slightly turned, shifted, warped) mask is in."""
    return NAMES[(LIKELY @ mask.ravel().astype(np.float32)).max(axis=1).argmax()]


def centre(images):
    """The middle of each image, which no warp fills with border."""
    return images[:, 11:21, 11:21, 0].astype(float)


def only(kind):
    """The transform of one class out of the script's pipeline, always applied, seeded."""
    pipeline = script.build_transform(True, normalize=False)
    found = copy.deepcopy(next(t for t in pipeline.transforms if isinstance(t, kind)))
    found.p = 1.0
    return A.Compose([found], seed=0)


def near(count, total, share, deviations=4.5):
    """Whether a count of independent events is within a few binomial standard deviations of its expectation."""
    return abs(count - total * share) <= deviations * np.sqrt(total * share * (1 - share))


def same(a, b):
    """Whether two samples are equal in every bit."""
    return all(np.array_equal(x, y) for x, y in zip(a, b))


# --- a pure function of seed, epoch and image


def test_a_sample_depends_on_nothing_that_happened_before(grey):
    first = grey[(3, 5)]
    for key in [(0, 0), (3, 4), 5, (9, 1)]:
        grey[key]
    assert same(grey[(3, 5)], first)
    assert same(like(grey)[(3, 5)], first)


def test_a_sample_depends_on_the_image_and_not_on_its_place_among_the_readable_ones(grey):
    """A damaged file that is left out must not change how all later images are augmented."""
    assert same(like(grey, entries=grey.entries[3:])[(1, 2)], grey[(1, 5)])


def test_an_index_alone_means_the_first_epoch(grey):
    assert same(grey[2], grey[(0, 2)])


def test_every_image_every_epoch_and_every_seed_draw_anew(grey):
    """The images are identical, so only the augmentation can tell their samples apart."""
    keys = [(epoch, i) for epoch in range(5) for i in range(8)]
    samples = [np.dstack(dataset[key]).tobytes() for dataset in (even(grey), even(grey, seed=8)) for key in keys]
    assert len(set(samples)) > 0.9 * len(samples)  # a few that stay almost as they are may be alike


# --- independence


def test_the_pipeline_holds_the_promised_transforms_in_order():
    """The numbers of the last step, which follow from mean and std, stand in the test of validation below."""
    steps = script.build_transform(True).transforms
    assert [type(step).__name__ for step in steps] == [
        "HorizontalFlip", "VerticalFlip", "RandomRotate90", "Affine", "ElasticTransform", "GridDistortion",
        "RandomBrightnessContrast", "ColorJitter", "GaussNoise", "Normalize", "ToTensorV2"]
    assert all(0 < step.p < 1 for step in steps[:-2]) and all(step.p == 1 for step in steps[-2:])


def test_both_flips_come_together_in_a_quarter_of_the_samples(draws):
    """If transforms shared their random numbers, either both flips would happen or none."""
    upright = [name for name in map(position, draws[1]) if "turned" not in name]
    assert 0.6 < len(upright) / len(draws[1]) < 0.9  # a quarter turn in a quarter to a third of all samples
    for name in ("none", "left-right", "up-down", "both"):
        assert near(upright.count(name), len(upright), 0.25), {n: upright.count(n) for n in upright}


def test_noise_and_brightness_are_independent_of_the_flips(draws):
    images, masks = draws
    turned = np.array(["left-right" in name or "both" in name for name in map(position, masks)])
    noisy = centre(images).std((1, 2)) > 1.5
    changed = np.abs(centre(images).mean((1, 2)) - 128) > 4
    assert near(noisy.sum(), len(noisy), 0.5)
    assert 0.5 < changed.mean() < 0.85  # brightness and contrast change in two transforms of one half each
    for event in (noisy, changed):
        assert near((event & turned).sum(), len(event), event.mean() * turned.mean())
    assert near((noisy & changed).sum(), len(noisy), noisy.mean() * changed.mean())


# --- masks, and their place on the image


def test_masks_stay_zero_and_one(draws):
    images, masks = draws
    assert images.dtype == np.uint8 and images.shape[1:] == (SIZE, SIZE, 3)
    assert masks.dtype == np.uint8 and masks.shape[1:] == (SIZE, SIZE)
    assert set(np.unique(masks)) == {0, 1}
    assert (masks.sum((1, 2)) > 0).mean() > 0.99


def test_image_and_mask_stay_aligned(tmp_path):
    """The image is its own mask, so after any warp the bright half of it must still be the mask."""
    folder = split_with(tmp_path, 1, np.where(l_shape(96), 170, 60).astype(np.uint8))
    dataset = script.BrainTumorDataset(folder, img_size=96, train=True, normalize=False)
    truth = dataset.sample(0)
    assert np.array_equal(truth[0][..., 0] > 115, truth[1] > 0)
    dice = []
    for epoch in range(150):
        image, mask = dataset[(epoch, 0)]
        grey = cv2.GaussianBlur(image[..., 1].astype(np.float32), (3, 3), 0)
        inside, outside = grey[mask > 0].mean(), np.median(grey[(mask == 0) & (grey > 0)])
        bright = grey > (inside + outside) / 2
        dice.append(2 * (bright & (mask > 0)).sum() / (bright.sum() + mask.sum()))
    assert np.mean(np.array(dice) > 0.9) > 0.95 and np.median(dice) > 0.95


# --- what each transform promises


def test_affine_shifts_and_scales_both_ways_by_up_to_a_tenth():
    disc = cv2.circle(np.zeros((100, 100, 3), np.uint8), (50, 50), 16, (255, 255, 255), -1)
    affine, shifts, areas = only(A.Affine), [], []
    for _ in range(300):
        rows, columns = np.nonzero(affine(image=disc)["image"][..., 0] > 127)
        shifts.append((columns.mean() - 50, rows.mean() - 50))
        areas.append(len(rows) / (disc[..., 0] > 127).sum())
    shifts = np.array(shifts)
    assert np.abs(shifts.mean(0)).max() < 1.7  # the mean of 300 uniform draws from -10..10 has deviation 0.33
    assert (shifts.min(0) < -8).all() and (shifts.max(0) > 8).all() and np.abs(shifts).max() < 11
    assert abs(np.corrcoef(shifts.T)[0, 1]) < 0.25
    assert 0.78 < min(areas) < 0.9 and 1.1 < max(areas) < 1.25  # 0.9 squared is 0.81, 1.1 squared is 1.21


def test_affine_turns_both_ways_by_up_to_fifteen_degrees():
    affine, angles = only(A.Affine), []
    bar = np.zeros((100, 100, 3), np.uint8)
    bar[46:54, 20:80] = 255
    for _ in range(300):
        rows, columns = np.nonzero(affine(image=bar)["image"][..., 0] > 127)
        covariance = np.cov(columns, rows)
        angles.append(np.degrees(0.5 * np.arctan2(2 * covariance[0, 1], covariance[0, 0] - covariance[1, 1])))
    assert -19 < min(angles) < -11 and 11 < max(angles) < 19 and abs(np.mean(angles)) < 2.5


@pytest.mark.parametrize("kind", [A.ElasticTransform, A.GridDistortion])
def test_warps_move_pixels_by_pixels_and_not_by_fractions(kind):
    """At Albumentations' own defaults ElasticTransform moves nothing by more than 0.2 pixels."""
    rows, columns = np.indices((192, 192), np.uint8)
    places = np.stack([columns, rows, rows], axis=2)  # where a pixel came from can be read from its colour
    warp, moved = only(kind), []
    for _ in range(30):
        shift = warp(image=places)["image"].astype(float) - places
        moved.append(np.hypot(shift[..., 0], shift[..., 1])[30:-30, 30:-30].max())
    assert 2 < np.median(moved) < 40 and min(moved) > 0.9


def test_noise_has_a_standard_deviation_of_three_to_seven():
    noise, image = only(A.GaussNoise), np.full((64, 64, 3), 128, np.uint8)
    deviations = [noise(image=image)["image"].astype(float).std() for _ in range(200)]
    assert 2.5 < min(deviations) < 3.6 and 6.2 < max(deviations) < 7.4


def test_brightness_changes_up_and_down_but_moderately(draws):
    means = centre(draws[0]).mean((1, 2))
    assert means.min() < 105 and means.max() > 151
    assert ((means > 20) & (means < 250)).mean() > 0.98


def test_validation_changes_nothing_but_the_scale(grey):
    plain = like(grey, train=False)
    normalised = like(grey, train=False, normalize=True, mean=(0.5, 0.25, 0.0), std=(0.5, 0.25, 0.125))
    grey_value = 128 / 255
    for epoch in range(5):
        image, mask = plain[(epoch, 1)]
        assert (image == 128).all() and np.array_equal(mask, l_shape())
        image, mask = normalised[(epoch, 1)]
        assert np.array_equal(mask[0].numpy(), l_shape())
        for channel, value in zip(image, ((grey_value - 0.5) / 0.5, (grey_value - 0.25) / 0.25, grey_value / 0.125)):
            assert channel.unique().tolist() == pytest.approx([value], abs=1e-5)
