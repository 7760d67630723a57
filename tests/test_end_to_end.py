"""One real run of the script on the sample data beside it, and everything that it leaves behind.

The run itself is the fixture `trained` in conftest.py.
"""

import csv
import json
import os
import re
import shutil
import subprocess
import sys

import cv2
import numpy as np
import pytest
import torch
from background import TIMING
from conftest import ROOT, run_script, script
from pycocotools.coco import COCO

CPU, EPOCHS = torch.device("cpu"), 10  # as the fixture says
SCORES = [*script.metrics_from_counts(*torch.ones(4, 1))]  # also one that was added
POOLED = ["pooled_" + name for name in SCORES]
COUNTS = ["true_positive_px", "false_positive_px", "false_negative_px", "true_negative_px"]
EXTENT = ["hd95_px", "lesions", "lesions_found", "false_lesions"]


@pytest.fixture
def out(trained):
    """The output folder of the run."""
    return trained[0]


@pytest.fixture
def record(out):
    """The JSON beside the checkpoint."""
    return script.read_metadata(out / script.BEST)[0]


def table(path):
    """Rows of a CSV file."""
    with open(path, encoding="utf-8-sig", newline="") as file:
        return list(csv.DictReader(file))


def number(cell):
    """The number in a cell of a table; an empty one is an undefined score."""
    return float(cell or "nan")


def truths(split):
    """File names and masks of a sample split, read by pycocotools alone."""
    coco = COCO(ROOT / split / "_annotations.coco.json")
    return {image["file_name"]: np.any([np.zeros((image["height"], image["width"]))] + [
        coco.annToMask(note) for note in coco.loadAnns(coco.getAnnIds(imgIds=[image["id"]]))], axis=0)
        for image in coco.imgs.values()}


def python_block(*words):
    """The python code block of the README that holds all these words."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.S)
    return next(block for block in blocks if all(word in block for word in words))


def inputs(count):
    """What the network sees: noise as images [N, 3, 64, 64]."""
    return script.to_input(np.random.default_rng(count).integers(0, 256, (count, 64, 64, 3), np.uint8), CPU)


# --- scores and files


def test_the_run_beats_an_empty_and_a_full_mask_by_far(record):
    """An empty one has the Dice 0; a full one 2 a / (a + all pixels), of a pixels with tumour."""
    full = np.mean([2 * mask.sum() / (mask.sum() + mask.size) for mask in truths("test").values()])
    assert 0.01 < full < 0.15
    assert record["test_metrics"]["dice"] > full + 0.2 and record["test_metrics"]["pooled_dice"] > 0.4


def test_the_run_writes_all_promised_files_and_nothing_else(out):
    files = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    assert set(files) - {".brain_tumor.lock"} == {*script.RUN_FILES} - {*script.LABEL_CHECK}
    assert files["training_samples.png"] < files["training_history.csv"]  # drawn before the first step


def test_the_json_is_the_record_of_the_run_and_holds_what_other_code_needs(record, out):
    assert (record["architecture"], record["encoder"], record["img_size"]) == ("unetplusplus", "resnet34", 64)
    assert record["mean"] == [0.485, 0.456, 0.406] and record["std"] == [0.229, 0.224, 0.225]
    assert record["threshold"] in script.THRESHOLDS and record["test_time_augmentation"] is False
    assert list(record["settings"]) == list(script.CONSTANTS)
    assert record["settings"] | {"IMG_SIZE": 64, "BATCH_SIZE": 8, "EPOCHS": EPOCHS, "LR": 1e-3, "ENCODER_WEIGHTS": None,
                                 "OUTPUT_DIR": str(out)} == record["settings"]
    assert record["encoder_weights_from"] == "random" and record["device"] == "cpu"
    assert record["versions"]["torch"] == torch.__version__
    for name in ("python", "torchvision", "segmentation_models_pytorch", "albumentations", "cv2", "numpy"):
        assert re.match(r"\d+\.\d+", record["versions"][name]), name
    assert record["data_counts"] == {
        name: {"images": images, "annotations": images, "without_tumour": images // 8,
               "without_annotation": images // 8, "skipped": 0, "near_duplicates": 0}
        for name, images in (("train", 32), ("valid", 8), ("test", 8))}
    bounded = [name + kind for name in ("dice", "iou") for kind in ("", "_with_tumour")]
    final = {*SCORES, *POOLED, "dice_of_whole_image", "tumour_free_predicted_empty", *bounded,
             *(f"{name}_95_ci" for name in bounded)}
    for split in ("valid", "test"):  # and how many images have a score
        names = {name.removesuffix("_n") for name in record[f"{split}_metrics"]}
        assert names == {"images", *final, *EXTENT}
    assert "denominator is 0" in record["convention"]
    assert all(0 <= record[f"{split}_metrics"][name] <= 1 for split in ("valid", "test") for name in SCORES + POOLED)


def test_the_history_has_a_row_per_epoch(record, out):
    rows = table(out / "training_history.csv")
    assert [int(row["epoch"]) for row in rows] == list(range(1, EPOCHS + 1))
    assert [name for name in rows[0] if not name.endswith("_n")] == [
        "epoch", "train_loss", "valid_loss", *SCORES, *POOLED, "lr", *TIMING]
    for row in rows:
        assert 0 < float(row["lr"]) <= 1e-3
        assert min(float(row[name]) for name in ("train_loss", "valid_loss", *TIMING)) > 0
        assert all(0 <= float(row[name] or 0) <= 1 for name in SCORES)
    assert float(rows[-1]["train_loss"]) < float(rows[0]["train_loss"])
    assert record["best_epoch"] == 1 + int(np.argmax([float(row["dice"]) for row in rows]))  # the first of the highest
    best = {name: cell for name, cell in rows[record["best_epoch"] - 1].items() if cell}
    assert {name: str(value) for name, value in record["valid_metrics_at_img_size"].items()} == best


def test_the_checkpoint_is_that_of_the_best_epoch(record, out, capsys):
    """Its scores on valid at IMG_SIZE and threshold 0.5, computed again, are those of the history."""
    valid, float32 = script.BrainTumorDataset(ROOT / "valid", 64, normalize=False), script.default_settings()
    float32.PRECISION = "float32"
    model, batch = script.load_model(out / script.BEST, "cpu"), script.collate([valid[i] for i in range(len(valid))])
    scores = script.validate(model, [batch], script.dice_bce, CPU, cfg=float32)
    best = table(out / "training_history.csv")[record["best_epoch"] - 1]
    for name in ("dice", "valid_loss"):
        assert scores[name] == pytest.approx(float(best[name]), abs=2e-3)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("split", ["valid", "test"])
def test_the_table_of_scores_has_a_row_per_image_that_adds_up(split, record, out):
    rows, masks, found = table(out / f"{split}_metrics.csv"), truths(split), record[f"{split}_metrics"]
    assert [row["file_name"] for row in rows] == list(masks)
    assert list(rows[0]) == ["file_name", *SCORES, *COUNTS, *EXTENT]
    for row in rows:
        (tp, fp, fn, tn), mask = (int(row[name]) for name in COUNTS), masks[row["file_name"]]
        assert tp + fn == mask.sum() and tp + fp + fn + tn == mask.size  # at the resolution of the annotations
        dice = np.nan if tp + fp + fn == 0 else 2 * tp / (2 * tp + fp + fn)
        assert number(row["dice"]) == pytest.approx(dice, abs=1e-6, nan_ok=True)
        assert int(row["lesions"]) == cv2.connectedComponents(mask.astype(np.uint8))[0] - 1
    columns = {name: np.array([number(row[name]) for row in rows]) for name in rows[0] if name != "file_name"}
    for name in SCORES + EXTENT:
        value = columns[name].sum() if "lesions" in name else np.nanmean(columns[name])
        assert found[name] == pytest.approx(value, abs=1e-5), name
        assert found.get(f"{name}_n", len(rows)) == np.isfinite(columns[name]).sum()
    tp, fp, fn, _ = (columns[name].sum() for name in COUNTS)
    assert found["pooled_dice"] == pytest.approx(2 * tp / (2 * tp + fp + fn))
    for name in ("dice", "iou"):
        assert found[f"{name}_95_ci"][0] < found[name] < found[f"{name}_95_ci"][1]


@pytest.mark.parametrize("name, colours", [
    ("training_history.png", []), ("test_report.png", []), ("training_samples.png", [script.ANNOTATED]),
    ("test_predictions.png", [script.ANNOTATED, script.PREDICTED_COLOUR, script.MISSED])])
def test_the_pictures_show_something(out, name, colours):
    """Landscape, fit for printing, with outlines and errors in their colours; and below them only their legend."""
    image = script.read_image(out / name)
    height, width = image.shape[:2]
    assert height >= 600 and width >= 1.2 * height and image.std() > 10
    for colour in colours:
        assert (np.abs(image[:height * 9 // 10].astype(int) - colour).max(axis=2) < 12).sum() > 500, colour


# --- what is printed


def test_a_notebooks_way_to_draw_does_not_matter_to_the_script():
    """What a line with "!" hands on may not even be installed. A program that imports the script keeps its choice."""
    choice = {"MPLBACKEND": "module://matplotlib_inline.backend_inline"}
    done = run_script("--help", env=choice)
    assert done.returncode == 0 and done.stderr == ""
    code = "import brain_tumor_integrated_smp, matplotlib; print(matplotlib.rcParams['backend'])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, encoding="utf-8",
                          env=os.environ | {"MPLBACKEND": "svg"}, timeout=300)
    assert done.stdout == "svg\n"


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have another OpenMP")
def test_threads_that_wait_leave_their_core_to_other_programs():
    """OpenMP reads its settings while torch is imported, and lists them. A choice of the user's is kept."""
    for choice, spins in (({}, "10000"), ({"GOMP_SPINCOUNT": "77"}, "77"), ({"OMP_WAIT_POLICY": "passive"}, "0")):
        done = run_script("--help", env={"OMP_DISPLAY_ENV": "verbose"} | choice)
        assert done.returncode == 0 and f"GOMP_SPINCOUNT = '{spins}'" in done.stderr


def test_the_console_has_a_header_and_one_aligned_line_per_epoch(trained):
    printed = trained[1].stdout.splitlines()
    (start,) = [number for number, line in enumerate(printed) if line.split()[:2] == ["epoch", "train_loss"]]
    header, *lines = printed[start:start + 1 + EPOCHS]
    names = ["epoch", "train_loss", "valid_loss", "dice", "iou", "precision", "recall", "lr", "img/s", "time", "ETA"]
    assert header.split() == names and max(map(len, [header, *lines])) <= 100
    for number, line in enumerate(lines, 1):
        assert line.split()[0] == f"{number}/{EPOCHS}" and line.split()[len(names):] in ([], ["*best"])
        # Every value ends where its name ends.
        assert [match.end() for match in re.finditer(r"\S+", line)][:len(names)] == [
            match.end() for match in re.finditer(r"\S+", header)]
    assert lines[0].endswith(" *best") and lines[-1].split()[len(names) - 1] == "0:00:00"


def test_the_console_tells_what_matters(trained, record):
    found = record["test_metrics"]
    for words in ("No GPU is used", f"Threshold {record['threshold']:.2f}", f"{found['dice']:.4f} (",
                  "there is no Dice", "({:.3f} to {:.3f})".format(*found["dice_95_ci"]),
                  f"{found['hd95_px']:.4f}", f"{found['lesions_found']} of 9 found, {found['false_lesions']} false\n",
                  f"dice_with_tumour             {record['valid_metrics']['dice_with_tumour']:.4f}",
                  f"tumour_free_predicted_empty  {record['valid_metrics']['tumour_free_predicted_empty']:.4f}",
                  script.BEST, "training_history.png", "training_samples.png", "test_predictions.png"):
        assert words in trained[1].stdout
    sentence = "Training on the bundled synthetic sample images (32). Use --data-dir for your own.\n"
    assert trained[1].stdout.count(sentence) == 1


def plant_mistakes(folder):
    """Change annotations of a sample split: three removed, three moved, two exchanged, two invented. Returns files."""
    path = folder / "_annotations.coco.json"
    coco = json.loads(path.read_text(encoding="utf-8"))
    notes = {note["image_id"]: note for note in coco["annotations"]}
    images = [image for image in coco["images"] if image["id"] in notes]
    free = [image for image in coco["images"] if image["id"] not in notes][:2]
    for image in images[:3]:
        coco["annotations"].remove(notes[image["id"]])
    for image in images[3:6]:
        note, half = notes[image["id"]], image["width"] / 2
        left = min(note["segmentation"][0][::2]) < half / 2
        note["segmentation"][0][::2] = [x + (70 if left else -70) for x in note["segmentation"][0][::2]]
        note.pop("bbox", None)
    a, b = (notes[image["id"]] for image in images[6:8])
    a["image_id"], b["image_id"] = b["image_id"], a["image_id"]
    for number, image in enumerate(free):
        coco["annotations"].append(notes[images[8 + number]["id"]] | {"id": 1000 + number, "image_id": image["id"]})
    path.write_text(json.dumps(coco), encoding="utf-8")
    return {image["file_name"] for image in images[:8] + free}


def test_planted_mistakes_are_found_by_the_model(out, tmp_path):
    """Of 10 among 48 images at least 6 (8 when written) are in the first 15: a blind search would find 3."""
    for split in ("train", "valid", "test"):
        shutil.copytree(ROOT / split, tmp_path / "data" / split)
    planted = plant_mistakes(tmp_path / "data" / "train")
    assert len(planted) == 10
    assert script.main(["--check-labels", "--checkpoint", str(out / script.BEST), "--data-dir", str(tmp_path / "data"),
                        "--output-dir", str(tmp_path)]) == 0
    rows = table(tmp_path / "label_check.csv")
    assert len({(row["split"], row["file_name"]) for row in rows}) == len(rows)
    assert len(planted & {row["file_name"] for row in rows[:15]}) >= 6
    assert cv2.imread(str(tmp_path / "label_check.png")).shape[1] == 1890  # 16 cm at 300 dots per inch


def test_output_into_a_file_is_free_of_bars_and_warnings(trained):
    """A random start that was asked for is no reason to warn. All text files are opened with their encoding: the run
    was told to warn of every file that is opened in the machine's own, as on Chinese Windows."""
    done = trained[1]
    assert not re.search("\r|\x1b|it/s|█", done.stdout + done.stderr)
    assert not re.findall(rf"{script.__name__}\.py:\d+: EncodingWarning.*", done.stderr)
    assert all("EncodingWarning" in line or line.startswith("  ") for line in done.stderr.splitlines())


# --- what others do with it


def test_the_checkpoint_holds_nothing_but_plain_cpu_tensors(out):
    """Loaded without map_location, as by the README's recipe."""
    state = torch.load(out / script.BEST, weights_only=True)
    assert list(state) == list(script.build_model("resnet34")[0].state_dict())
    for name, value in state.items():
        assert value.device == CPU and value.is_contiguous() and not value.requires_grad
        assert value.dtype == (torch.int64 if name.endswith("num_batches_tracked") else torch.float32)
        assert torch.isfinite(value).all()


def test_the_readmes_recipe_gives_the_mask_of_predict_mask_without_the_script(out, tmp_path):
    """Verbatim, in a process of its own; images larger and smaller than IMG_SIZE, which is 64. Others are refused."""
    for name in (script.BEST, "unet_plusplus_best.json"):
        shutil.copy(out / name, tmp_path)
    whole = script.read_image(next((ROOT / "test").glob("*.jpg")))
    for number, (height, width) in enumerate([whole.shape[:2], (50, 40), (40, 150), (64, 64)]):
        script.write_image(tmp_path / f"{number}.png", cv2.resize(whole, (width, height)))
    cv2.imwrite(str(tmp_path / "deep.png"), whole.astype(np.uint16) * 9)
    (tmp_path / "recipe.py").write_text(python_block("create_model("), encoding="utf-8")
    code = f"""if True:
        import shutil, sys
        recipe = open("recipe.py", encoding="utf-8").read()
        for number in range(4):
            shutil.copy(f"{{number}}.png", "scan.png")
            exec(recipe, found := {{}})
            found["np"].savez(f"{{number}}.npz", **{{name: found[name] for name in ("small", "probability", "mask")}})
        assert "{script.__name__}" not in sys.modules
        shutil.copy("deep.png", "scan.png")
        exec(recipe)"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, encoding="utf-8",
                          env=os.environ | {"CUDA_VISIBLE_DEVICES": ""}, timeout=300)
    assert done.stderr.endswith("AssertionError: 8-bit images only\n"), done.stderr
    model = script.load_model(tmp_path / script.BEST, "cpu")
    for number in range(4):
        image, found = script.read_image(tmp_path / f"{number}.png"), np.load(tmp_path / f"{number}.npz")
        mask, probability = script.segment(model, image)
        assert np.array_equal(found["small"], script.resize(image, 64, 64))
        np.testing.assert_allclose(found["probability"], probability, atol=1e-4)
        assert found["mask"].dtype == np.uint8 and (found["mask"] != mask).sum() <= 0.001 * mask.size and mask.any()


def test_the_readmes_onnx_recipe_gives_the_models_logits_for_any_number_of_images(out, tmp_path, monkeypatch):
    import onnxruntime  # for this test alone
    for path in out.glob("unet_plusplus_best.*"):
        shutil.copy(path, tmp_path)
    shutil.copy(next((ROOT / "test").glob("*.jpg")), tmp_path / "scan.png")
    monkeypatch.chdir(tmp_path)
    exec(python_block("torch.onnx.export("), found := {})
    assert np.array_equal(found["mask"], script.predict_mask(found["model"], script.read_image("scan.png")))
    session = onnxruntime.InferenceSession("unet_plusplus_best.onnx", providers=["CPUExecutionProvider"])
    model = script.load_model(script.BEST, "cpu")
    for count in (1, 3):
        with torch.no_grad():
            expected = model(inputs(count)).numpy()
        found = session.run(None, {session.get_inputs()[0].name: inputs(count).numpy()})[0]
        np.testing.assert_allclose(found, expected, atol=1e-3, rtol=1e-3)
