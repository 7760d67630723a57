"""One real run of the script on the sample data beside it, and everything that it leaves behind.

The run itself is the fixture `trained` in conftest.py.
"""

import csv
import json
import re
import shutil

import cv2
import numpy as np
import pytest
import torch
from conftest import ROOT, script
from pycocotools.coco import COCO

EPOCHS = 10  # as the fixture says
SCORES = ["dice", "iou", "precision", "recall"]
POOLED = ["pooled_" + name for name in SCORES]


@pytest.fixture
def out(trained):
    """The output folder of the run."""
    return trained[0]


@pytest.fixture
def console(trained):
    """What the run printed."""
    return trained[1].stdout


@pytest.fixture
def record(out):
    """The JSON beside the checkpoint."""
    return json.loads((out / "unet_plusplus_best.json").read_text(encoding="utf-8"))


def table(path):
    """Rows of a CSV file."""
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def truths(split):
    """File names and masks of a sample split, read by pycocotools alone."""
    coco = COCO(ROOT / split / "_annotations.coco.json")
    masks = {}
    for image in coco.imgs.values():
        mask = np.zeros((image["height"], image["width"]), np.uint8)
        for note in coco.loadAnns(coco.getAnnIds(imgIds=[image["id"]])):
            mask |= coco.annToMask(note)
        masks[image["file_name"]] = mask
    return masks


def mean_dice(masks, prediction):
    """Mean Dice over images of one constant prediction; both empty is 1."""
    def dice(mask):
        guess = np.full_like(mask, prediction)
        return 2 * (mask & guess).sum() / (mask.sum() + guess.sum()) if mask.any() or guess.any() else 1.0
    return np.mean([dice(mask) for mask in masks])


def picture(path):
    """Pixels of a PNG that has to be readable."""
    image = cv2.imdecode(np.fromfile(path, np.uint8), cv2.IMREAD_COLOR)
    assert image is not None, path
    return image


def test_the_run_beats_an_empty_and_a_full_mask_by_far(record):
    masks = list(truths("test").values())
    nothing, everything = mean_dice(masks, 0), mean_dice(masks, 1)
    assert nothing == pytest.approx(1 / 8)  # one negative of eight images
    assert 0.01 < everything < 0.15
    dice = record["test_metrics"]["dice"]
    assert dice > max(nothing, everything) + 0.2
    assert record["test_metrics"]["pooled_dice"] > 0.4


def test_the_run_writes_all_promised_files_and_nothing_else(out):
    promised = {"unet_plusplus_best.pth", "unet_plusplus_best.json", "training_history.csv", "training_history.png",
                "training_samples.png", "test_metrics.csv", "test_predictions.png"}
    assert promised <= {path.name for path in out.iterdir()}
    assert {path.name for path in out.iterdir()} - promised <= {"unet_plusplus_last.pth"}  # the state for --resume


def test_the_json_holds_what_other_code_needs(record):
    assert record["encoder"] == "resnet34" and record["img_size"] == 64
    assert record["mean"] == [0.485, 0.456, 0.406] and record["std"] == [0.229, 0.224, 0.225]
    assert 0 < record["threshold"] < 1
    assert record["threshold"] in script.THRESHOLDS


def test_the_json_is_the_record_of_the_run(record, out):
    settings = record["settings"]
    assert list(settings) == list(script.CONSTANTS)
    assert (settings["IMG_SIZE"], settings["BATCH_SIZE"], settings["EPOCHS"], settings["LR"]) == (64, 8, EPOCHS, 1e-3)
    assert settings["ENCODER_WEIGHTS"] is None and settings["OUTPUT_DIR"] == str(out)
    assert record["encoder_weights_from"] == "random" and record["device"] == "cpu"
    assert record["versions"]["torch"] == torch.__version__
    for name in ("python", "torchvision", "segmentation_models_pytorch", "albumentations", "cv2", "numpy"):
        assert re.match(r"\d+\.\d+", record["versions"][name]), name
    counts = record["data_counts"]
    assert {name: counts[name]["images"] for name in counts} == {"train": 32, "valid": 8, "test": 8}
    assert {name: counts[name]["without_tumour"] for name in counts} == {"train": 4, "valid": 1, "test": 1}
    for split in ("valid", "test"):
        assert set(record[f"{split}_metrics"]) == {*SCORES, *POOLED}
        assert all(0 <= value <= 1 for value in record[f"{split}_metrics"].values())


def test_the_history_has_a_row_per_epoch(record, out):
    rows = table(out / "training_history.csv")
    assert [int(row["epoch"]) for row in rows] == list(range(1, EPOCHS + 1))
    assert {"epoch", "train_loss", "valid_loss", "lr", *SCORES} <= set(rows[0])
    for row in rows:
        assert float(row["lr"]) == 1e-3 and float(row["seconds"]) > 0
        assert float(row["train_loss"]) > 0 and float(row["valid_loss"]) > 0
        assert all(0 <= float(row[name]) <= 1 for name in SCORES)
    assert float(rows[-1]["train_loss"]) < float(rows[0]["train_loss"])
    dice = [float(row["dice"]) for row in rows]
    assert record["best_epoch"] == 1 + int(np.argmax(dice))  # the first of the highest


def test_the_checkpoint_is_that_of_the_best_epoch(record, out, capsys):
    """Its Dice on valid at IMG_SIZE and threshold 0.5, computed again, is the history's best."""
    model = script.load_model(out / "unet_plusplus_best.pth", "cpu")
    valid = script.BrainTumorDataset(ROOT / "valid", img_size=64, normalize=False)
    cfg = script.default_settings()
    cfg.PRECISION = "float32"
    batch = [np.stack(parts) for parts in zip(*(valid[i] for i in range(len(valid))))]
    scores = script.validate(model, [batch], script.LOSSES["dice_bce"](), torch.device("cpu"), cfg=cfg)
    best = table(out / "training_history.csv")[record["best_epoch"] - 1]
    assert scores["dice"] == pytest.approx(float(best["dice"]), abs=2e-3)
    assert scores["valid_loss"] == pytest.approx(float(best["valid_loss"]), abs=2e-3)
    assert capsys.readouterr().err == ""


def test_the_test_table_has_a_row_per_image_that_adds_up(record, out):
    rows, masks = table(out / "test_metrics.csv"), truths("test")
    assert [row["file_name"] for row in rows] == list(masks)
    assert list(rows[0]) == ["file_name", *SCORES, "true_positive_px", "false_positive_px", "false_negative_px"]
    for row in rows:
        tp, fp, fn = (int(row[f"{kind}_px"]) for kind in ("true_positive", "false_positive", "false_negative"))
        assert tp + fn == masks[row["file_name"]].sum()  # at the resolution of the annotations
        dice = 1.0 if tp + fp + fn == 0 else 2 * tp / (2 * tp + fp + fn)
        assert float(row["dice"]) == pytest.approx(dice, abs=1e-6)
    for name in SCORES:
        assert record["test_metrics"][name] == pytest.approx(np.mean([float(row[name]) for row in rows]), abs=1e-5)
    tp, fp, fn = (sum(int(row[f"{kind}_px"]) for row in rows)
                  for kind in ("true_positive", "false_positive", "false_negative"))
    assert record["test_metrics"]["pooled_dice"] == pytest.approx(2 * tp / (2 * tp + fp + fn))


def test_the_threshold_is_the_best_one_for_dice_on_valid(record, out):
    """Every threshold is tried here by predicting the images anew."""
    model, masks = script.load_model(out / "unet_plusplus_best.pth", "cpu"), truths("valid")
    found = {}
    probability = {name: script.predict_probability(
        model, script.resize(script.read_image(ROOT / "valid" / name), 64, 64), *mask.shape)
        for name, mask in masks.items()}
    for threshold in script.THRESHOLDS:
        counts = [[(guess & truth).sum(), (guess & ~truth).sum(), (truth & ~guess).sum()] for guess, truth in (
            (probability[name] >= np.float32(threshold), mask > 0) for name, mask in masks.items())]
        found[float(threshold)] = script.summarize(np.array(counts))["dice"]
    assert found[record["threshold"]] == pytest.approx(max(found.values()), abs=1e-3)
    assert record["valid_metrics"]["dice"] == pytest.approx(found[record["threshold"]], abs=1e-3)


@pytest.mark.parametrize("name, least", [("training_history.png", 400), ("training_samples.png", 500),
                                         ("test_predictions.png", 500)])
def test_the_pictures_show_something(out, name, least):
    image = picture(out / name)
    assert min(image.shape[:2]) >= least and image.std() > 10
    colours = image.reshape(-1, 3).astype(int)
    if name != "training_history.png":
        green = (colours[:, 1] > 150) & (colours[:, 0] < 100) & (colours[:, 2] < 100)
        assert green.sum() > 100  # the outlines of the annotations


def test_the_samples_are_drawn_before_the_first_step(out):
    files = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    assert files["training_samples.png"] < files["training_history.csv"]


def test_the_console_has_one_aligned_line_per_epoch_with_the_time_left(console):
    lines = [line for line in console.splitlines() if line.startswith("epoch ")]
    assert len(lines) == EPOCHS
    for word in ("train loss", "valid loss", "Dice", "IoU", "lr", "img/s", "left"):
        places = {line.index(word) for line in lines}
        assert len(places) == 1, word
    assert "best" in lines[0]
    assert re.search(r"left 0:00:00", lines[-1])


def test_the_console_tells_what_matters(console, record):
    assert "No GPU" in console
    assert re.search(r"Threshold 0\.\d+", console)
    assert f"{record['test_metrics']['dice']:.4f}" in console and "both masks empty" in console
    for name in ("unet_plusplus_best.pth", "training_history.png", "training_samples.png", "test_predictions.png"):
        assert name in console


def test_piped_output_is_free_of_progress_bars(trained):
    """A random start that was asked for is no reason to warn, and bars have no place in a file."""
    done = trained[1]
    for text in (done.stdout, done.stderr):
        assert "\r" not in text and "\x1b" not in text and "it/s" not in text and "█" not in text
    own = [line for line in done.stderr.splitlines() if "EncodingWarning" not in line and not line.startswith("  ")]
    assert own == []


def test_all_text_files_are_opened_with_their_encoding(trained):
    """The run was told to warn of every file that is opened in the machine's own encoding, as on Chinese Windows."""
    assert not re.findall(rf"{script.__name__}\.py:\d+: EncodingWarning.*", trained[1].stderr)


def test_evaluate_gives_the_same_numbers_again(out, record, tmp_path, capsys):
    for name in ("unet_plusplus_best.pth", "unet_plusplus_best.json"):
        shutil.copy(out / name, tmp_path)
    fresh = {key: value for key, value in record.items() if key not in ("test_metrics", "valid_metrics")}
    (tmp_path / "unet_plusplus_best.json").write_text(json.dumps(fresh | {"threshold": 0.5}), encoding="utf-8")
    assert script.main(["--evaluate", "--output-dir", str(tmp_path), "--device", "cpu", "--num-workers", "0"]) == 0
    again = json.loads((tmp_path / "unet_plusplus_best.json").read_text(encoding="utf-8"))
    for split in ("valid_metrics", "test_metrics"):
        assert again[split] == {name: pytest.approx(value, abs=1e-3) for name, value in record[split].items()}
    assert again["threshold"] == record["threshold"] and again["settings"] == record["settings"]
    assert len(table(tmp_path / "test_metrics.csv")) == 8
    assert picture(tmp_path / "test_predictions.png").std() > 10
    assert f"{record['test_metrics']['dice']:.3f}" in capsys.readouterr().out
    assert not (tmp_path / "training_history.csv").exists()


def test_evaluate_without_a_checkpoint_is_an_error(tmp_path, capsys):
    assert script.main(["--evaluate", "--output-dir", str(tmp_path), "--device", "cpu"]) == 2
    assert "unet_plusplus_best.pth" in capsys.readouterr().err
