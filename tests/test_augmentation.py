"""Augmentation: what each transform does, that they are independent, and that (seed, epoch, image) decides all."""

import copy

import albumentations as A
import cv2
import numpy as np
import pytest
import torch
from conftest import box, script, write_coco

SIZE = 32
CPU = torch.device("cpu")


def l_shape(size=SIZE):
    """A mask that looks different in all eight positions that flips and quarter turns can give it."""
    mask = np.zeros((size, size), np.uint8)
    mask[size // 4:3 * size // 4, size // 4:3 * size // 8] = 1
    mask[5 * size // 8:3 * size // 4, size // 4:5 * size // 8] = 1
    return mask


def split_with(folder, count, image, segmentation):
    """A split of `count` identical images with the same annotation."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "0.png").write_bytes(cv2.imencode(".png", image)[1].tobytes())
    for i in range(1, count):
        (folder / f"{i}.png").write_bytes((folder / "0.png").read_bytes())
    height, width = image.shape[:2]
    write_coco(folder, [{"id": i, "file_name": f"{i}.png", "height": height, "width": width} for i in range(count)],
               [{"id": i, "image_id": i, "category_id": 1, "segmentation": segmentation, "iscrowd": 0}
                for i in range(count)])
    return folder


@pytest.fixture(scope="module")
def grey(tmp_path_factory):
    """Eight identical images of even grey with the L as their mask; seed 7, so not the script's constant."""
    s = SIZE // 8
    folder = split_with(tmp_path_factory.mktemp("grey"), 8, np.full((SIZE, SIZE, 3), 128, np.uint8),
                        [box(2 * s, 2 * s, s, 4 * s), box(2 * s, 5 * s, 3 * s, s)])
    dataset = script.BrainTumorDataset(folder, img_size=SIZE, train=True, seed=7, normalize=False)
    assert np.array_equal(dataset.sample(0)[1], l_shape())
    return dataset


@pytest.fixture(scope="module")
def draws(grey):
    """640 augmented samples: images [640, S, S, 3] and masks [640, S, S]."""
    images, masks = zip(*(grey[(epoch, i)] for epoch in range(80) for i in range(8)))
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


def only(kind, train=True):
    """The transform of one class out of the script's pipeline, always applied, seeded."""
    pipeline = script.build_transform(train, normalize=False)
    found = copy.deepcopy(next(t for t in pipeline.transforms if isinstance(t, kind)))
    found.p = 1.0
    return A.Compose([found], seed=0)


def near(count, total, share, deviations=4.5):
    """Whether a count of independent events is within a few binomial standard deviations of its expectation."""
    return abs(count - total * share) <= deviations * np.sqrt(total * share * (1 - share))


# --- a pure function of seed, epoch and image


def same(a, b):
    """Whether two samples are equal in every bit."""
    return all(np.array_equal(x, y) for x, y in zip(a, b))


def test_a_sample_depends_on_nothing_that_happened_before(grey):
    first = grey[(3, 5)]
    for key in [(0, 0), (3, 4), 5, (9, 1)]:
        grey[key]
    assert same(grey[(3, 5)], first)
    again = script.BrainTumorDataset("", img_size=SIZE, train=True, seed=7, normalize=False, records=grey.records)
    assert same(again[(3, 5)], first)


def test_an_index_alone_means_the_first_epoch(grey):
    assert same(grey[2], grey[(0, 2)])


def test_every_image_is_augmented_differently(grey):
    """The eight images are identical, so only the augmentation can tell them apart."""
    samples = {image.tobytes() + mask.tobytes() for image, mask in (grey[(0, i)] for i in range(8))}
    assert len(samples) == 8


def test_every_epoch_augments_an_image_differently(grey):
    samples = {image.tobytes() + mask.tobytes() for image, mask in (grey[(epoch, 0)] for epoch in range(20))}
    assert len(samples) >= 19


def test_another_seed_gives_another_augmentation(grey):
    other = script.BrainTumorDataset("", img_size=SIZE, train=True, seed=8, normalize=False, records=grey.records)
    assert sum(same(grey[(0, i)], other[(0, i)]) for i in range(8)) == 0


def epochs_of(dataset, workers, method=None):
    """Two epochs of one training loader: a list of (images, masks) batches each. Workers live through both."""
    cfg = script.default_settings()
    cfg.NUM_WORKERS, cfg.BATCH_SIZE, cfg.SEED, cfg.IMG_SIZE = workers, 3, 7, SIZE
    loader = script.make_loader(dataset, cfg, train=True)
    if method:
        assert loader.num_workers > 0
        loader.multiprocessing_context = method
    epochs = []
    for epoch in range(2):
        loader.batch_sampler.set_epoch(epoch)
        epochs.append([(np.array(images), np.array(masks)) for images, masks in loader])
    return epochs


@pytest.mark.parametrize("method", ["fork", "forkserver", "spawn"])
def test_workers_of_every_start_method_give_what_the_main_process_gives(grey, method):
    """Seed and size differ from the constants: a worker that reads those again would show."""
    here, there = epochs_of(grey, 0), epochs_of(grey, 2, method)
    for a, b in zip(here, there):
        assert len(a) == len(b) == 3
        assert all(same(x, y) for x, y in zip(a, b))
    assert not same(np.concatenate([b[0] for b in here[0]]), np.concatenate([b[0] for b in here[1]]))


def test_training_batches_hold_every_image_once_in_an_order_that_changes(grey):
    cfg = script.default_settings()
    cfg.BATCH_SIZE, cfg.NUM_WORKERS = 3, 0
    sampler = script.make_loader(grey, cfg, train=True).batch_sampler
    orders = []
    for epoch in range(3):
        sampler.set_epoch(epoch)
        batches = list(sampler)
        assert {key[0] for batch in batches for key in batch} == {epoch}
        assert max(map(len, batches)) <= 3
        orders.append([index for batch in batches for _, index in batch])
        assert sorted(orders[-1]) == list(range(8))
    assert orders[0] != orders[1] != orders[2]


# --- independence


def test_the_pipeline_holds_the_promised_transforms_in_order():
    steps = [(type(step).__name__, step.p) for step in script.build_transform(True).transforms]
    assert steps == [
        ("HorizontalFlip", 0.5), ("VerticalFlip", 0.5), ("RandomRotate90", 0.5), ("Affine", 0.5),
        ("ElasticTransform", 0.3), ("GridDistortion", 0.3), ("RandomBrightnessContrast", 0.5), ("ColorJitter", 0.5),
        ("GaussNoise", 0.2), ("Normalize", 1.0), ("ToTensorV2", 1.0)]


def test_both_flips_come_together_in_a_quarter_of_the_samples(draws):
    """If transforms shared their random numbers, either both flips would happen or none."""
    seen = [position(mask) for mask in draws[1]]
    upright = [name for name in seen if "turned" not in name]
    assert 0.6 < len(upright) / len(seen) < 0.9  # a quarter turn in a quarter to a half of all samples
    for name in ("none", "left-right", "up-down", "both"):
        assert near(upright.count(name), len(upright), 0.25), {n: upright.count(n) for n in upright}


def test_noise_and_brightness_are_independent_of_the_flips(draws):
    images, masks = draws
    turned = np.array(["left-right" in name or "both" in name for name in map(position, masks)])
    noisy = centre(images).std((1, 2)) > 1.5
    changed = np.abs(centre(images).mean((1, 2)) - 128) > 4
    assert near(noisy.sum(), len(noisy), 0.2)
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
    mask = np.kron(l_shape(12), np.ones((8, 8), np.uint8))
    folder = split_with(tmp_path, 1, np.where(mask, 170, 60).astype(np.uint8),
                        [box(24, 24, 8, 48), box(24, 56, 32, 16)])
    dataset = script.BrainTumorDataset(folder, img_size=96, train=True, normalize=False)
    truth = dataset.sample(0)
    assert np.array_equal(truth[0][..., 0] > 115, truth[1] > 0)
    dice = []
    for epoch in range(200):
        image, mask = dataset[(epoch, 0)]
        grey = cv2.GaussianBlur(image[..., 1].astype(np.float32), (3, 3), 0)
        inside, outside = grey[mask > 0].mean(), np.median(grey[(mask == 0) & (grey > 0)])
        bright = grey > (inside + outside) / 2
        dice.append(2 * (bright & (mask > 0)).sum() / (bright.sum() + mask.sum()))
    assert np.mean(np.array(dice) > 0.9) > 0.95 and np.median(dice) > 0.95


# --- what each transform promises


def blob(size=100):
    """White on black: a disc in the middle."""
    image = np.zeros((size, size, 3), np.uint8)
    cv2.circle(image, (size // 2, size // 2), size // 6, (255, 255, 255), -1)
    return image


def test_affine_shifts_both_ways_in_both_directions_by_up_to_a_tenth():
    affine, shifts = only(A.Affine), []
    for _ in range(300):
        rows, columns = np.nonzero(affine(image=blob())["image"][..., 0] > 127)
        shifts.append((columns.mean() - 50, rows.mean() - 50))
    shifts = np.array(shifts)
    assert np.abs(shifts.mean(0)).max() < 1.7  # the mean of 300 uniform draws from -10..10 has deviation 0.33
    assert (shifts.min(0) < -8).all() and (shifts.max(0) > 8).all() and np.abs(shifts).max() < 11
    assert abs(np.corrcoef(shifts.T)[0, 1]) < 0.25


def test_affine_scales_both_ways_by_up_to_a_tenth():
    affine = only(A.Affine)
    plain = (blob()[..., 0] > 127).sum()
    area = np.array([(affine(image=blob())["image"][..., 0] > 127).sum() / plain for _ in range(300)])
    assert area.min() > 0.78 and area.max() < 1.25  # 0.9 squared is 0.81, 1.1 squared is 1.21
    assert area.min() < 0.9 and area.max() > 1.1


def test_affine_turns_both_ways_by_up_to_fifteen_degrees():
    affine, angles = only(A.Affine), []
    bar = np.zeros((100, 100, 3), np.uint8)
    bar[46:54, 20:80] = 255
    for _ in range(300):
        rows, columns = np.nonzero(affine(image=bar)["image"][..., 0] > 127)
        covariance = np.cov(columns, rows)
        angles.append(np.degrees(0.5 * np.arctan2(2 * covariance[0, 1], covariance[0, 0] - covariance[1, 1])))
    assert -19 < min(angles) < -11 and 11 < max(angles) < 19 and abs(np.mean(angles)) < 2.5


def coordinates(size=192):
    """Red counts the columns, green the rows: where a pixel came from can be read from its colour."""
    rows, columns = np.indices((size, size), np.uint8)
    return np.stack([columns, rows, rows], axis=2)


@pytest.mark.parametrize("kind", [A.ElasticTransform, A.GridDistortion])
def test_warps_move_pixels_by_pixels_and_not_by_fractions(kind):
    """At Albumentations' own defaults ElasticTransform moves nothing by more than 0.2 pixels."""
    warp, moved = only(kind), []
    for _ in range(30):
        shift = warp(image=coordinates())["image"].astype(float) - coordinates()
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


@pytest.mark.parametrize("normalize", [True, False])
def test_validation_changes_nothing_but_the_scale(grey, normalize):
    plain = script.BrainTumorDataset("", img_size=SIZE, train=False, seed=7, normalize=normalize, records=grey.records)
    for epoch in range(5):
        image, mask = plain[(epoch, 1)]
        assert np.array_equal(np.asarray(mask).reshape(SIZE, SIZE), l_shape())
        if normalize:
            assert image[0].unique().tolist() == pytest.approx([(128 / 255 - 0.485) / 0.229], abs=1e-5)
        else:
            assert (image == 128).all()
