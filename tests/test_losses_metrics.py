"""Losses and metrics against values worked out by hand."""

from math import log

import numpy as np
import pytest
import segmentation_models_pytorch as smp
import torch
from conftest import script

HALF, THREE_QUARTERS = 0.0, log(3)  # logits of the probabilities 1/2 and 3/4
ALL_LOSSES = sorted(script.LOSSES)


def batch(*images):
    """Rows of numbers, one per image, as a float32 tensor [B, 1, 1, pixels]."""
    return torch.tensor(images, dtype=torch.float32)[:, None, None]


def random_batch(count=4, size=16, seed=0):
    """Logits and targets [count, 1, size, size], with masks of very different area and one empty one."""
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(count, 1, size, size, generator=generator)
    share = torch.linspace(0, 0.6, count)[:, None, None, None]
    return logits, (torch.rand(count, 1, size, size, generator=generator) < share).float()


# --- losses by hand


def test_dice_loss_by_hand():
    """All p = 1/2, two of four pixels are tumour: TP = FP = FN = 1, Dice = (2 + 1) / (2 + 1 + 1 + 1) = 3/5."""
    loss = script.DiceLoss()(batch([HALF] * 4), batch([1, 1, 0, 0]))
    assert loss.item() == pytest.approx(0.4, abs=1e-6)


def test_dice_loss_counts_missed_and_wrong_pixels_alike():
    """p = 3/4 on tumour, 1/2 elsewhere: TP = 1.5, FN = 0.5, FP = 1; Dice = 4 / 5.5."""
    loss = script.DiceLoss()(batch([THREE_QUARTERS, THREE_QUARTERS, HALF, HALF]), batch([1, 1, 0, 0]))
    assert loss.item() == pytest.approx(1 - 4 / 5.5, abs=1e-6)


def test_focal_tversky_loss_by_hand():
    """p = 3/4 on three tumour pixels, 1/2 on the other: TP = 2.25, FN = 0.75, FP = 0.5.

    TI = (2.25 + 1) / (2.25 + 0.7 * 0.75 + 0.3 * 0.5 + 1) = 3.25 / 3.925, loss = (1 - TI) ^ (3/4).
    """
    loss = script.FocalTverskyLoss()(batch([THREE_QUARTERS] * 3 + [HALF]), batch([1, 1, 1, 0]))
    assert loss.item() == pytest.approx((1 - 3.25 / 3.925) ** 0.75, abs=1e-6)


def test_focal_tversky_loss_takes_its_three_numbers():
    """The counts above with alpha 0.5, beta 0.25, gamma 2: TI = 3.25 / (2.25 + 0.375 + 0.125 + 1)."""
    loss = script.FocalTverskyLoss(alpha=0.5, beta=0.25, gamma=2)(batch([THREE_QUARTERS] * 3 + [HALF]),
                                                                   batch([1, 1, 1, 0]))
    assert loss.item() == pytest.approx((1 - 3.25 / 3.75) ** 0.5, abs=1e-6)


def test_dice_bce_is_the_sum_of_both_with_weight_one():
    """All p = 1/2: Dice loss 0.4 as above, and a cross entropy of ln 2 on every pixel."""
    loss = script.LOSSES["dice_bce"]()(batch([HALF] * 4), batch([1, 1, 0, 0]))
    assert loss.item() == pytest.approx(0.4 + log(2), abs=1e-6)


def test_dice_focal_is_the_sum_of_both_with_weight_one():
    """p = 3/4 everywhere, TP = FP = 1.5, FN = 0.5: Dice = 4 / 6.

    Focal loss (1 - p_t)^2 * -ln p_t is (1/4)^2 ln(4/3) on tumour and (3/4)^2 ln 4 elsewhere; the mean of two and two.
    """
    loss = script.LOSSES["dice_focal"]()(batch([THREE_QUARTERS] * 4), batch([1, 1, 0, 0]))
    focal = (log(4 / 3) / 16 + 9 * log(4) / 16) / 2
    assert loss.item() == pytest.approx(1 - 4 / 6 + focal, abs=1e-5)


def test_focal_tversky_is_one_of_the_losses():
    logits, targets = random_batch()
    assert script.LOSSES["focal_tversky"]()(logits, targets) == script.FocalTverskyLoss()(logits, targets)


# --- what all losses promise


@pytest.mark.parametrize("name", ALL_LOSSES)
def test_a_loss_is_the_mean_over_images(name):
    """Four together, two and two, or one by one: only then do accumulation and several GPUs equal one big batch."""
    criterion = script.LOSSES[name]()
    logits, targets = random_batch()
    whole = criterion(logits, targets).item()
    for size in (1, 2):
        parts = [criterion(a, b).item() for a, b in zip(logits.split(size), targets.split(size))]
        assert np.mean(parts) == pytest.approx(whole, abs=1e-6)
    three_and_one = (3 * criterion(logits[:3], targets[:3]) + criterion(logits[3:], targets[3:])) / 4
    assert three_and_one.item() == pytest.approx(whole, abs=1e-6)


@pytest.mark.parametrize("name", ALL_LOSSES)
def test_a_better_mask_gives_a_lower_loss(name):
    criterion = script.LOSSES[name]()
    targets = torch.zeros(2, 1, 16, 16)
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
@pytest.mark.parametrize("size", [4.0, 100.0, 1e4])
def test_values_and_gradients_are_finite_everywhere(name, case, size):
    """(1 - TI)^0.75 has no derivative at TI = 1, and sigmoids saturate."""
    targets = torch.zeros(2, 1, 8, 8)
    if "empty" not in case:
        targets[:, :, 2:6, 2:6] = 1
    if case == "full":
        targets[:] = 1
    sign = {"all wrong": -1, "empty, seen as full": -1, "even": 0}.get(case, 1)
    logits = (sign * size * (2 * targets - 1)).requires_grad_()
    loss = script.LOSSES[name]()(logits, targets)
    loss.backward()
    assert loss.isfinite() and logits.grad.isfinite().all()
    if sign == 1 and size >= 100:
        assert loss.item() < 1e-3


@pytest.mark.parametrize("name", ALL_LOSSES)
def test_an_empty_mask_still_teaches(name):
    """A negative that is predicted empty costs nothing, a false alarm costs much, and the gradient points downwards."""
    criterion, targets = script.LOSSES[name](), torch.zeros(1, 1, 8, 8)
    assert criterion(torch.full_like(targets, -20), targets).item() < 1e-3
    assert criterion(torch.full_like(targets, 20), targets).item() > 0.9
    logits = torch.zeros_like(targets).requires_grad_()
    criterion(logits, targets).backward()
    assert (logits.grad > 1e-5).all()


def test_dice_loss_of_empty_masks_by_hand():
    """64 pixels at p = 1/2 on an empty mask: FP = 32, Dice = 1 / (32 + 1)."""
    empty = torch.zeros(1, 1, 8, 8)
    assert script.DiceLoss()(empty, empty).item() == pytest.approx(1 - 1 / 33, abs=1e-6)


@pytest.mark.parametrize("name", ALL_LOSSES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_losses_are_computed_in_float32_also_under_autocast(name, dtype):
    """Sums over 65,536 pixels overflow float16 and lose all precision in bfloat16."""
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(2, 1, 256, 256, generator=generator).to(dtype)
    targets = (torch.rand(2, 1, 256, 256, generator=generator) < 0.9).float()
    expected = script.LOSSES[name]()(logits.float(), targets)
    with torch.autocast("cpu", torch.bfloat16):
        loss = script.LOSSES[name]()(logits, targets)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected.item(), abs=1e-5)


# --- the sense of the Tversky weights


def test_missed_tumour_costs_more_than_a_false_alarm():
    """Sure predictions with TP = 4 and either four pixels missed (alpha 0.7) or four too many (beta 0.3).

    TI is 5 / (4 + 2.8 + 1) or 5 / (4 + 1.2 + 1).
    """
    sure = 50.0
    logits = batch([sure] * 4 + [-sure] * 4 + [-sure] * 4)
    missed = script.FocalTverskyLoss()(logits, batch([1] * 8 + [0] * 4)).item()
    logits = batch([sure] * 4 + [sure] * 4 + [-sure] * 4)
    alarm = script.FocalTverskyLoss()(logits, batch([1] * 4 + [0] * 8)).item()
    assert missed == pytest.approx((1 - 5 / 7.8) ** 0.75, abs=1e-6)
    assert alarm == pytest.approx((1 - 5 / 6.2) ** 0.75, abs=1e-6)
    assert missed > alarm


def test_a_larger_gamma_raises_the_loss_of_good_masks():
    """The exponent is 1 / gamma, and 1 - TI lies below 1, so the loss grows with gamma."""
    logits, targets = random_batch()
    losses = [script.FocalTverskyLoss(gamma=gamma)(logits, targets).item() for gamma in (1, 4 / 3, 2, 3)]
    assert losses == sorted(losses) and losses[0] < losses[-1]


def test_smp_names_the_weights_the_other_way_round():
    """smp's alpha weighs false alarms, and its gamma is the exponent itself: both numbers have to be turned round."""
    logits, targets = random_batch(1, 32, seed=3)
    targets[:, :, 8:24, 8:24] = 1
    ours = script.FocalTverskyLoss(alpha=0.7, beta=0.3, gamma=4 / 3, smooth=0.0)(logits, targets).item()
    turned = smp.losses.TverskyLoss("binary", alpha=0.3, beta=0.7, gamma=3 / 4)(logits, targets).item()
    unchanged = smp.losses.TverskyLoss("binary", alpha=0.7, beta=0.3, gamma=4 / 3)(logits, targets).item()
    assert ours == pytest.approx(turned, abs=1e-4)
    assert abs(ours - unchanged) > 0.02


def test_the_defaults_are_those_of_the_paper():
    logits, targets = random_batch()
    named = script.FocalTverskyLoss(alpha=0.7, beta=0.3, gamma=4 / 3)
    assert script.FocalTverskyLoss()(logits, targets) == named(logits, targets)


# --- metrics by hand


def test_scores_of_one_image_by_hand():
    """TP 6, FP 2, FN 4: Dice 12/18, IoU 6/12, precision 6/8, recall 6/10."""
    scores = script.score_images(np.array([[6, 2, 4]]))
    assert {name: values.tolist() for name, values in scores.items()} == {
        "dice": [pytest.approx(12 / 18)], "iou": [0.5], "precision": [0.75], "recall": [pytest.approx(0.6)]}


@pytest.mark.parametrize("counts, expected", [
    ((0, 0, 0), 1.0),  # nothing there, nothing found
    ((0, 0, 9), 0.0),  # a missed tumour: precision 0 too, although no pixel was wrong
    ((0, 9, 0), 0.0),  # a false alarm: recall 0 too, although no pixel was missed
    ((0, 3, 4), 0.0), ((5, 0, 0), 1.0)])
def test_empty_masks_score_one_when_both_are_and_zero_when_one_is(counts, expected):
    assert {float(values) for values in script.score_images(np.array(counts)).values()} == {expected}


def test_a_set_is_summarised_as_means_over_images_and_as_pooled_pixels():
    """A large well-found tumour, a small missed one, and a negative.

    Dice per image 180/200, 0, 1: mean 1.9/3. Pooled: TP 90, FP 10, FN 10 + 5: 180/205.
    """
    scores = script.summarize(np.array([[90, 10, 10], [0, 0, 5], [0, 0, 0]]))
    assert scores == {
        "dice": pytest.approx(1.9 / 3), "iou": pytest.approx((90 / 110 + 0 + 1) / 3),
        "precision": pytest.approx(1.9 / 3), "recall": pytest.approx(1.9 / 3),
        "pooled_dice": pytest.approx(180 / 205), "pooled_iou": pytest.approx(90 / 115),
        "pooled_precision": pytest.approx(90 / 100), "pooled_recall": pytest.approx(90 / 105)}


def test_a_set_of_empty_masks_found_empty_is_perfect():
    assert set(script.summarize(np.zeros((3, 3), np.int64)).values()) == {1.0}


def test_confusion_counts_each_image_in_integers():
    probability = batch([0.9, 0.8, 0.2, 0.1], [0.9, 0.1, 0.1, 0.1])
    counts = script.confusion(probability, batch([1, 0, 1, 0], [0, 0, 0, 0]))
    assert counts.dtype == torch.int64
    assert counts.tolist() == [[1, 1, 1], [0, 1, 0]]


def test_a_probability_at_the_threshold_counts_as_tumour():
    probability = batch([0.5, 0.5 - 1e-6, 0.5, 0.0])
    assert script.confusion(probability, batch([1, 1, 0, 0])).tolist() == [[1, 1, 1]]
    assert script.confusion(probability, batch([1, 1, 0, 0]), threshold=0.75).tolist() == [[0, 0, 2]]


def test_integer_counts_do_not_round():
    """2^24 + 1 is no float32: a float sum would stop counting there."""
    ones = torch.ones(1, 1, 4097, 4097)
    assert script.confusion(ones, ones).tolist() == [[4097 * 4097, 0, 0]]


def test_counts_at_all_thresholds_equal_counting_them_one_by_one():
    """Random values, and values that lie exactly on a threshold or next to it."""
    rng = np.random.default_rng(0)
    thresholds = script.THRESHOLDS.astype(np.float32)
    values = np.concatenate([rng.random(3000, np.float32), thresholds, np.nextafter(thresholds, np.float32(0)),
                             np.nextafter(thresholds, np.float32(1)), np.float32([0, 1])])
    mask = (rng.random(len(values)) < 0.3).astype(np.uint8)
    counts = script.count_thresholds(values.reshape(-1, 1), mask.reshape(-1, 1), script.THRESHOLDS)
    assert counts.shape == (len(thresholds), 3) and counts.dtype == np.int64
    for row, threshold in zip(counts, thresholds):
        found = values >= threshold
        assert row.tolist() == [(found & (mask > 0)).sum(), (found & (mask == 0)).sum(), (~found & (mask > 0)).sum()]


def test_counts_do_not_depend_on_the_memory_layout_of_a_mask():
    """pycocotools returns masks in column order."""
    rng = np.random.default_rng(1)
    probability, mask = rng.random((7, 9), np.float32), (rng.random((7, 9)) < 0.5).astype(np.uint8)
    plain = script.count_thresholds(probability, mask, script.THRESHOLDS)
    assert np.array_equal(script.count_thresholds(probability, np.asfortranarray(mask), script.THRESHOLDS), plain)


def test_the_thresholds_that_are_tried_cover_the_range_evenly():
    assert 0.5 in script.THRESHOLDS and len(script.THRESHOLDS) >= 9
    assert script.THRESHOLDS[0] <= 0.1 and script.THRESHOLDS[-1] >= 0.9
    assert np.ptp(np.diff(script.THRESHOLDS)) < 1e-9


def test_validation_scores_do_not_depend_on_the_batch_size():
    """Means over all images and their counts, never over batches; 5 images in batches of 2, 2, 1 or all at once."""
    logits, targets = random_batch(5, 64, seed=5)
    images = logits.repeat(1, 3, 1, 1)

    class First(torch.nn.Module):
        """A model that returns what it is shown."""

        def forward(self, shown):
            return shown[:, :1]

    def scores(size):
        """validate() over batches of `size`."""
        cfg = script.default_settings()
        cfg.PRECISION = "float32"
        batches = list(zip(images.split(size), targets.split(size)))
        return script.validate(First(), batches, script.LOSSES["dice_bce"](), torch.device("cpu"), cfg=cfg)
    expected = script.summarize(script.confusion(logits.sigmoid(), targets).numpy())
    expected["valid_loss"] = script.LOSSES["dice_bce"]()(logits, targets).item()
    for size in (5, 2, 1):
        assert scores(size) == {name: pytest.approx(value, abs=1e-6) for name, value in expected.items()}
    assert abs(expected["dice"] - expected["pooled_dice"]) > 0.01
