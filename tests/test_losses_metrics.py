"""Losses and metrics against values worked out by hand."""

import functools
from math import log, nan

import numpy as np
import pytest
import torch
from conftest import script

HALF, THREE_QUARTERS = 0.0, log(3)  # logits of the probabilities 1/2 and 3/4
ALL_LOSSES = sorted(script.LOSSES)
approx = functools.partial(pytest.approx, nan_ok=True)


def batch(*images):
    """Rows of numbers, one per image, as a float32 tensor [B, 1, 1, pixels]."""
    return torch.tensor(images, dtype=torch.float32)[:, None, None]


def random_batch(count=4, size=16, seed=0):
    """Logits and targets [count, 1, size, size], with masks of very different area and one empty one."""
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(count, 1, size, size, generator=generator)
    share = torch.linspace(0, 0.6, count)[:, None, None, None]
    return logits, (torch.rand(count, 1, size, size, generator=generator) < share).float()


def picture(*rows):
    """A uint8 0/1 mask, tumour where there is a #."""
    return np.array([[letter == "#" for letter in row] for row in rows], np.uint8)


# --- losses by hand

HALF_OF_FOUR = batch([HALF] * 4), batch([1, 1, 0, 0])  # TP = FP = FN = 1
MIXED = batch([THREE_QUARTERS] * 3 + [HALF]), batch([1, 1, 1, 0])  # TP = 2.25, FN = 0.75, FP = 0.5


@pytest.mark.parametrize("criterion, images, expected", [
    (script.dice_loss, HALF_OF_FOUR, 1 - (2 + 1) / (2 + 1 + 1 + 1)),
    (script.dice_loss, MIXED, 1 - (4.5 + 1) / (4.5 + 0.75 + 0.5 + 1)),
    (lambda *images: script.dice_loss(*images, smooth=0.0), MIXED, 1 - 4.5 / 5.75),
    (script.dice_loss, (torch.zeros(1, 1, 8, 8), torch.zeros(1, 1, 8, 8)), 1 - 1 / (32 + 1)),  # p = 1/2, no tumour
    # A cross entropy of ln 2 on every pixel.
    (script.LOSSES["dice_bce"], HALF_OF_FOUR, 0.4 + log(2)),
    # p = 3/4 everywhere: Dice = 4 / 6; the mean of (1 - p_t)^2 * -ln p_t over two pixels with tumour and two without.
    (script.LOSSES["dice_focal"], (batch([THREE_QUARTERS] * 4), batch([1, 1, 0, 0])),
     1 - 4 / 6 + (log(4 / 3) / 16 + 9 * log(4) / 16) / 2),
    # TI = 3.25 / (2.25 + 0.7 * 0.75 + 0.3 * 0.5 + 1)
    (script.LOSSES["focal_tversky"], MIXED, (1 - 3.25 / 3.925) ** 0.75),
    (script.FocalTverskyLoss(alpha=0.5, beta=0.25, gamma=2), MIXED, (1 - 3.25 / 3.75) ** 0.5),
    (script.FocalTverskyLoss(smooth=0.0), MIXED, (1 - 2.25 / 2.925) ** 0.75),
])
def test_the_value_of_a_loss_by_hand(criterion, images, expected):
    assert criterion(*images).item() == pytest.approx(expected, abs=1e-5)


# --- what all losses promise


@pytest.mark.parametrize("name", ALL_LOSSES)
def test_a_loss_is_the_mean_over_images(name):
    """Four together, two and two, or one by one: only then do accumulation and several GPUs equal one big batch."""
    criterion, (logits, targets) = script.LOSSES[name], random_batch()
    whole = criterion(logits, targets).item()
    for size in (1, 2):
        parts = [criterion(a, b).item() for a, b in zip(logits.split(size), targets.split(size))]
        assert np.mean(parts) == pytest.approx(whole, abs=1e-6)
    three_and_one = (3 * criterion(logits[:3], targets[:3]) + criterion(logits[3:], targets[3:])) / 4
    assert three_and_one.item() == pytest.approx(whole, abs=1e-6)


@pytest.mark.parametrize("name", ALL_LOSSES)
def test_a_better_mask_gives_a_lower_loss(name):
    criterion, targets = script.LOSSES[name], torch.zeros(2, 1, 16, 16)
    targets[:, :, 4:12, 4:12] = 1

    def loss(rows):
        """Sure about a box that covers so many of the eight rows."""
        guess = torch.zeros_like(targets)
        guess[:, :, 4:4 + rows, 4:12] = 1
        return criterion(8 * guess - 4, targets).item()

    losses = [loss(rows) for rows in (8, 6, 4, 2, 0)]
    assert losses == sorted(losses) and losses[0] < 0.15 < losses[-1]
    assert criterion(-8 * targets + 4, targets).item() > losses[-1]  # the opposite is worse than nothing


@pytest.mark.parametrize("name", ALL_LOSSES)
@pytest.mark.parametrize("case", ["perfect", "all wrong", "empty, seen as empty", "empty, seen as full", "full",
                                  "even"])
def test_values_and_gradients_are_finite_everywhere(name, case):
    """(1 - TI)^0.75 has no derivative at TI = 1, and sigmoids saturate."""
    targets = torch.zeros(2, 1, 8, 8)
    if "empty" not in case:
        targets[:, :, 2:6, 2:6] = 1
    if case == "full":
        targets[:] = 1
    sign = {"all wrong": -1, "empty, seen as full": -1, "even": 0}.get(case, 1)
    for size in (4.0, 100.0, 1e4):
        logits = (sign * size * (2 * targets - 1)).requires_grad_()
        loss = script.LOSSES[name](logits, targets)
        loss.backward()
        assert loss.isfinite() and logits.grad.isfinite().all()
        assert loss.item() < 1e-3 or sign < 1 or size < 100


@pytest.mark.parametrize("name", ALL_LOSSES)
def test_an_empty_mask_still_teaches(name):
    """A false alarm costs much, and the gradient points downwards."""
    criterion, targets = script.LOSSES[name], torch.zeros(1, 1, 8, 8)
    assert criterion(torch.full_like(targets, 20), targets).item() > 0.9
    logits = torch.zeros_like(targets).requires_grad_()
    criterion(logits, targets).backward()
    assert (logits.grad > 1e-5).all()


@pytest.mark.parametrize("name", ALL_LOSSES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_losses_are_computed_in_float32_also_under_autocast(name, dtype):
    """Sums over 65,536 pixels overflow float16 and lose all precision in bfloat16."""
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(2, 1, 256, 256, generator=generator).to(dtype)
    targets = (torch.rand(2, 1, 256, 256, generator=generator) < 0.9).float()
    expected = script.LOSSES[name](logits.float(), targets)
    with torch.autocast("cpu", torch.bfloat16):
        loss = script.LOSSES[name](logits, targets)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected.item(), abs=1e-5)


# --- scores of an image


def test_scores_of_images_by_hand():
    """One image with TP 2, FP 1, FN 3, TN 1; one that is empty and found empty, whose ratios are 0 / 0."""
    scores = script.image_metrics(batch([.9, .8, .7, .1, .1, .1, .1], [.1] * 7), batch([1, 1, 0, 1, 1, 1, 0], [0] * 7))
    expected = {"dice": [4 / 8, nan], "iou": [2 / 6, nan], "precision": [2 / 3, nan], "recall": [2 / 5, nan],
                "specificity": [1 / 2, 1], "true_positive_px": [2, 0], "false_positive_px": [1, 0],
                "false_negative_px": [3, 0], "true_negative_px": [1, 7]}
    assert {name: scores[name].tolist() for name in expected} == {name: approx(v) for name, v in expected.items()}
    assert {values.dtype for values in scores.values()} == {torch.float64}


@pytest.mark.parametrize("counts, expected", [
    ((0, 0, 0, 9), (nan, nan, nan, nan)),  # nothing there, nothing found: every denominator is 0
    ((0, 0, 9, 0), (0, 0, nan, 0)),  # a missed tumour: nothing was predicted that could be precise
    ((0, 9, 0, 0), (0, 0, 0, nan)),  # a false alarm: there was nothing to recall
    ((0, 3, 4, 2), (0, 0, 0, 0)), ((5, 0, 0, 4), (1, 1, 1, 1))])
def test_a_score_is_undefined_exactly_where_its_denominator_is_0(counts, expected):
    scores = script.metrics_from_counts(*torch.tensor(counts, dtype=torch.float64))
    assert [float(scores[name]) for name in ("dice", "iou", "precision", "recall")] == approx(expected)


def test_a_set_is_summarised_as_means_over_defined_scores_and_as_pooled_pixels():
    """A large well-found tumour, a small missed one, a negative, and a false alarm.

    Dice 180/200, 0, none, 0: mean 0.9/3; recall 0.9, 0, none, none. Pooled: TP 90, FP 10 + 5, FN 10 + 5: 180/210.
    """
    counts = torch.tensor([[90., 0, 0, 0], [10, 0, 0, 5], [10, 5, 0, 0], [0, 5, 9, 5]], dtype=torch.float64)
    scores = script.metrics_from_counts(*counts) | dict(zip(script.COUNTS, counts))
    found = script.summarize(scores | {"another": torch.tensor([1., 2, 3, 6]), "no": torch.full((4,), nan)})
    expected = {"dice": 0.9 / 3, "dice_n": 3, "iou": 90 / 110 / 3, "iou_n": 3, "precision": 0.9 / 2, "precision_n": 2,
                "recall": 0.9 / 2, "recall_n": 2, "another": 3, "pooled_dice": 180 / 210, "pooled_iou": 90 / 120,
                "pooled_precision": 90 / 105, "pooled_recall": 90 / 105}
    assert {name: found[name] for name in expected} == approx(expected)
    assert not {"no", "another_n", *script.COUNTS} & {*found}


def test_counts_of_large_images_do_not_round():
    """2^24 + 1 is no float32: a float32 sum would stop counting there."""
    ones = torch.ones(1, 1, 4097, 4097)
    assert script.image_metrics(ones, ones.bool())["true_positive_px"].tolist() == [4097 * 4097]


@pytest.mark.parametrize("threshold", script.THRESHOLDS)
def test_a_probability_at_the_threshold_counts_as_tumour_everywhere(threshold):
    """In prediction, in the scores and in the search for the threshold, and the next smaller float32 does not."""
    value = np.float32(threshold)
    probability = np.array([[value, np.nextafter(value, np.float32(0))]])
    assert script.binarize(probability, float(threshold)).tolist() == [[1, 0]]
    tensor = torch.from_numpy(probability)[None, None]
    assert script.image_metrics(tensor, torch.ones_like(tensor), float(threshold))["true_positive_px"].tolist() == [1]
    counts = script.counts_per_threshold(probability, np.ones_like(probability), np.array([threshold]))
    assert counts.tolist() == [[1, 0, 1, 0]]


def test_counts_at_all_thresholds_equal_counting_them_one_by_one():
    """Whatever the memory layout of the mask: pycocotools returns columns."""
    rng = np.random.default_rng(0)
    probability, mask = rng.random((57, 50), np.float32), (rng.random((57, 50)) < 0.3).astype(np.uint8)
    probability[0, :2] = 0, 1
    counts = script.counts_per_threshold(probability, np.asfortranarray(mask))
    assert script.THRESHOLDS.tolist() == [round(0.05 * number, 2) for number in range(1, 20)]
    assert counts.dtype == np.int64 and len(counts) == len(script.THRESHOLDS)
    for row, threshold in zip(counts.tolist(), script.THRESHOLDS.astype(np.float32)):
        found = probability >= threshold
        assert row == [(guess & truth).sum() for guess, truth in (
            (found, mask > 0), (found, mask == 0), (~found, mask > 0), (~found, mask == 0))]


def validated(logits, targets, size, criterion):
    """validate() by a network that returns these logits [N, 1, S, S], in batches of a size."""
    images, cfg, model = logits.repeat(1, 3, 1, 1), script.default_settings(), torch.nn.Module()
    model.forward, cfg.PRECISION = lambda shown: shown[:, :1], "float32"
    return script.validate(model, list(zip(images.split(size), targets.split(size))), criterion, torch.device("cpu"),
                           cfg=cfg)


def test_validation_scores_do_not_depend_on_the_batch_size():
    """Means over all images and their counts, never over batches; 5 images in batches of 2, 2, 1 or all at once."""
    logits, targets = random_batch(5, 64, seed=5)
    expected = script.summarize(script.image_metrics(logits.sigmoid(), targets))
    expected["valid_loss"] = script.LOSSES["dice_bce"](logits, targets).item()
    for size in (5, 2, 1):
        found = validated(logits, targets, size, script.LOSSES["dice_bce"])
        assert found == {name: pytest.approx(value, abs=1e-6) for name, value in expected.items()}
    assert abs(expected["dice"] - expected["pooled_dice"]) > 0.01


def test_a_loss_that_is_not_finite_is_not_left_out_as_undefined_scores_are():
    logits, targets = random_batch(3, 64, seed=5)
    logits[1] = nan
    found = validated(logits, targets, 1, script.dice_loss)
    assert found["valid_loss"] != found["valid_loss"] and 0 <= found["dice"] <= 1


# --- distances between boundaries


def boundary(mask):
    """Places [N, 2] of tumour pixels with a neighbour above, below, left or right that is none, or none at all."""
    padded = np.pad(mask, 1)
    inside = padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    return np.argwhere(mask & ~inside & 1)


def slow_hd95(a, b):
    """The definition: all pairs of boundary pixels, both directions pooled."""
    distances = np.linalg.norm(boundary(a)[:, None] - boundary(b)[None], axis=-1)
    return np.percentile(np.concatenate([distances.min(axis=1), distances.min(axis=0)]), 95)


def random_mask(rng):
    """One to three rectangles and some single pixels, many of them at the border of an image that is not square."""
    mask = rng.random((23, 37)) < rng.choice([0, 0.02])
    for y, x, height, width in rng.integers([-6, -6, 1, 1], [23, 37, 15, 20], size=(rng.integers(1, 4), 4)):
        mask[max(0, y):max(0, y + height), max(0, x):max(0, x + width)] = True
    return mask.astype(np.uint8)


def test_hd95_equals_its_definition_over_all_pairs_of_boundary_pixels():
    rng = np.random.default_rng(7)
    masks = [mask for mask in (random_mask(rng) for _ in range(80)) if mask.any()] + [np.ones((23, 37), np.uint8)] * 2
    assert sum(mask[0].any() or mask[:, -1].any() for mask in masks) > 20  # that touch the border
    for a, b in zip(masks, masks[1:]):
        assert script.hd95(a, b) == pytest.approx(slow_hd95(a, b), abs=1e-3)


@pytest.mark.parametrize("prediction, truth, expected", [
    (picture("#....", ".....", ".....", "....."), picture(".....", ".....", ".....", "....#"), 5.0),  # 3, 4, 5
    (picture("...."), picture("...."), nan), (picture(".#.."), picture("...."), nan),
    (picture("...."), picture(".#.."), nan),
    # 20 + 1 and 20 boundary pixels, one of them 10 pixels away from the other mask: less than 5 % do not count.
    (picture("#" * 20 + "." * 9 + "#"), picture("#" * 20 + "." * 10), 0.0),
])
def test_hd95_by_hand(prediction, truth, expected):
    assert script.hd95(prediction, truth) == approx(expected, abs=1e-5)


# --- lesions


@pytest.mark.parametrize("truth, prediction, expected", [
    (("....", "...."), ("....", "...."), (0, 0, 0)),
    (("##..", "...."), ("....", "...."), (1, 0, 0)),
    (("....", "...."), ("#..#", "...#"), (0, 0, 2)),
    (("##..", "...."), ("..#.", "...."), (1, 0, 1)),  # beside it is not on it
    (("#...", ".##."), ("...#", "..#."), (1, 1, 0)),  # neighbours over a corner are one tumour
    (("#..#", "#..#"), ("####", "...."), (2, 2, 0)),  # one that covers two
    (("####", "...."), ("#..#", "...."), (1, 1, 0)),  # two on the same one
    (("#.#.", "#..."), ("#...", "...#"), (2, 1, 1)),
    (("####", "####"), ("####", "####"), (1, 1, 0)),
])
def test_lesions_are_counted_by_hand(truth, prediction, expected):
    """Annotated, touched by the prediction, and predicted where none is."""
    assert script.count_lesions(picture(*prediction), picture(*truth)) == expected


# --- confidence intervals


@pytest.mark.parametrize("values, patients, expected", [
    ([0.75] * 9, None, [0.75] * 2), ([0.25], None, [0.25] * 2), ([0.3] * 5, [*"aabbc"], [0.3] * 2),  # no width
    ([0.0, 1.0], None, [0, 1]),  # a quarter of the resamples is all 0, a quarter all 1
    ([0.0, 0.0, 1.0], [*"aab"], [0, 1])])  # a twice: 0; b twice: 1; both: 1/3, the mean over three images
def test_confidence_intervals_that_are_known_by_hand(values, patients, expected):
    assert script.confidence_interval(np.array(values), patients) == pytest.approx(expected)


def test_a_confidence_interval_of_many_values_is_that_of_the_normal_distribution():
    """The mean, and 1.96 standard errors on either side; so four times the values halve it.

    Three images of each patient that are alike change nothing; as if they were independent, it would be too narrow.
    """
    widths = []
    for count in (250, 1000):
        values = np.random.default_rng(3).beta(2, 1, count)
        low, high = script.confidence_interval(values)
        error = 1.96 * values.std() / count ** 0.5
        assert [low, high] == pytest.approx([values.mean() - error, values.mean() + error], abs=0.15 * error)
        widths.append(high - low)
        alike, patients = values.repeat(3), np.arange(count).repeat(3)
        assert script.confidence_interval(alike, patients) == pytest.approx([low, high])
        assert np.ptp(script.confidence_interval(alike)) == pytest.approx(widths[-1] / 3 ** 0.5, rel=0.15)
    assert widths[1] == pytest.approx(widths[0] / 2, rel=0.15)


def test_a_confidence_interval_repeats_and_draws_from_its_own_generator():
    values = np.random.default_rng(3).random(20)
    before = np.random.get_state()[1].tolist()
    first = script.confidence_interval(values)
    assert first == script.confidence_interval(values) and [type(bound) for bound in first] == [float, float]
    assert np.random.get_state()[1].tolist() == before


# --- what a mean over images hides


def counts(*rows):
    """The scores of images of 9 pixels with these counts (true positive, false positive, false negative)."""
    tp, fp, fn = torch.tensor(rows, dtype=torch.float64).unbind(1)
    found = tp, fp, fn, 9 - tp - fp - fn
    return script.metrics_from_counts(*found) | dict(zip(script.COUNTS, found))


def test_final_scores_by_hand():
    """Four patients: one is right, one has a false alarm, of one nothing is found, and one has no tumour at all."""
    scores = counts((4, 0, 0), (0, 0, 0), (2, 1, 1), (0, 3, 0), (0, 0, 5), (0, 0, 0))
    found = script.final_scores(scores, ["a", "a", "b", "b", "c", "d"], [True, True, False, False, False, False])
    assert found["dice"] == approx((1 + 2 / 3 + 0 + 0) / 4) and found["dice_n"] == 4
    assert found["dice_with_tumour"] == approx((1 + 2 / 3 + 0) / 3) and "dice_with_tumour_n" not in found
    assert found["iou_with_tumour"] == approx((1 + 1 / 2 + 0) / 3)
    assert found["tumour_free_predicted_empty"] == approx(2 / 3)
    # b: 2 pixels right, 1 + 3 too many, 1 missed; d has no Dice.
    assert found["dice_per_patient_mean"] == approx((1 + 4 / 9 + 0) / 3) and found["dice_per_patient_mean_n"] == 3
    assert found["dice_per_patient_median"] == approx(4 / 9)
    assert found["dice_per_patient_mean_95_ci"] == script.confidence_interval(np.array([1, 4 / 9, 0]))
    assert found["dice_with_tumour_95_ci"] == script.confidence_interval(np.array([1, 2 / 3, 0]), ["a", "b", "c"])
    assert found["dice_95_ci"] == script.confidence_interval(np.array([1, 2 / 3, 0, 0]), ["a", "b", "b", "c"])
    assert found["dice_without_near_duplicates"] == approx((2 / 3 + 0 + 0) / 3)
    assert found["dice_without_near_duplicates_95_ci"] == script.confidence_interval(np.array([2 / 3, 0, 0]), [*"bbc"])
    # Of 4, 3 and 5 annotated ones of 9 pixels, and of 0, for which marking everything is a false alarm.
    assert found["dice_of_whole_image"] == approx((8 / 13 + 6 / 12 + 10 / 14 + 0 + 0 + 0) / 6)
    assert found.items() >= script.summarize(scores).items()


def test_what_a_set_does_not_have_is_absent():
    found = script.final_scores(counts((4, 0, 0), (2, 1, 1)))
    assert not any(name.endswith("_95_ci") for name in script.final_scores(counts((4, 0, 0), (2, 1, 1)), ["a", "a"]))
    assert found["dice_with_tumour"] == found["dice"] == counts((4, 0, 0), (2, 1, 1))["dice"].mean()  # exactly
    assert "tumour_free_predicted_empty" not in found
    assert not any("patient" in name or "near" in name or name.endswith("_n") for name in found)
    found = script.final_scores(counts((0, 0, 0), (0, 1, 0)))
    assert found["tumour_free_predicted_empty"] == 0.5 and not any("with_tumour" in name for name in found)
    found = script.final_scores(counts((0, 0, 0), (0, 0, 0)), ["a", "b"])
    assert (found["tumour_free_predicted_empty"], found["dice_of_whole_image"]) == (1, 0)
    assert not {"dice", "iou", "precision", "recall", "pooled_dice", "dice_per_patient_mean"} & {*found}
