"""Data as people have it: patients, one folder without valid, mask files instead of COCO."""

import json
import os
import re
import shutil
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from conftest import ROOT, script
from PIL import Image
from pycocotools import mask as coco_mask
from test_contradictions import make, noise_picture, octagon
from test_data import accepted, arguments, refused, remarks, table, write


def run(data, out, *more):
    """Train on a data folder; returns the JSON of the best model."""
    assert script.main(arguments(data, out, *more)) == 0
    return json.loads((out / script.BEST).with_suffix(".json").read_text(encoding="utf-8"))


def weights(out):
    return torch.load(out / script.BEST, weights_only=True)


def same_weights(out, other):
    a, b = weights(out), weights(other)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def renamed(name):
    """A change for make(): name(split, i) is the file of image i."""
    def change(coco, folder):
        for i, image in enumerate(coco["images"]):
            image["file_name"] = name(folder.name, i)
            (folder / image["file_name"]).parent.mkdir(exist_ok=True)
            (folder / f"{i}.png").rename(folder / image["file_name"])
    return change


# ===== Patients =======================================================================================================

PATTERN = r"(p\d+)_"


def test_the_audit_counts_patients_and_mentions_that_it_could(tmp_path, capfd):
    data = make(tmp_path / "data", renamed(lambda split, i: f"p{i // 2 + 10 * (split == 'valid')}_{i}.png"))
    out, _ = accepted(capfd, data, tmp_path / "out", "--patient-pattern", PATTERN)
    assert table(out)["patients (see PATIENT_PATTERN)"] == ["3", "3"] and remarks(out) == []
    assert table(accepted(capfd, data, tmp_path / "out")[0])["patients (see PATIENT_PATTERN)"] == ["?", "?"]


def test_a_patient_in_two_splits_is_the_first_remark(tmp_path, capfd):
    data = make(tmp_path / "data", renamed(lambda split, i: f"p{i + 5 * (split == 'valid')}_{i}.png"))
    write(data / "train" / "p7_more.png", noise_picture(0, 96, 128))  # not listed: it does not count
    shutil.copy(data / "train" / "p0_0.png", data / "train" / "p1_1.png")  # another remark
    found = remarks(accepted(capfd, data, tmp_path / "out", "--patient-pattern", PATTERN)[0])
    assert len(found) == 2 and found[0].startswith("1 of 11 patients are in more than one split")
    assert found[0].endswith("into one split: p5")


def test_the_folder_of_an_image_may_name_its_patient(tmp_path, capfd):
    data = make(tmp_path / "data", renamed(lambda split, i: f"p{i % 3}_{split}/slice {i}.png"))
    out, _ = accepted(capfd, data, tmp_path / "out", "--patient-pattern", r"^(p\d_\w+)/")
    assert table(out)["patients (see PATIENT_PATTERN)"] == ["3", "3"]


@pytest.mark.parametrize("pattern, words", [
    (PATTERN, "finds no patient in 3 of 12 file names:\n  - x3.png\n  - x4.png\n  - x5.png\n"),
    (r"(p|x|v)(\d)", r"PATIENT_PATTERN is '(p|x|v)(\d)', but must be None, or a regular expression with brackets "
                      r"around the patient, as in (P\d+)."),
    ("p", "brackets around"), ("(p", "brackets around")])
def test_a_pattern_that_does_not_fit_is_refused(pattern, words, tmp_path, capfd):
    data = make(tmp_path / "data", renamed(lambda split, i: f"{'x' * (split == 'train' and i > 2) or f'p{i}_'}{i}.png"))
    assert words in refused(capfd, data, tmp_path / "out", "--audit", "--patient-pattern", pattern)


def test_scores_are_per_patient_in_the_json_the_table_and_the_printed_lines(tmp_path, tiny, capfd):
    data, out = make(tmp_path / "data", renamed(lambda split, i: f"p{i // 3}{split}_{i}.png"),
                     splits=("train", "valid", "test")), tmp_path / "out"
    record = run(data, out, "--patient-pattern", r"(p\d\w+)_")
    printed = capfd.readouterr().out
    for name in ("valid_metrics", "test_metrics"):
        assert 0 <= record[name]["dice_per_patient_mean"] <= 1 and len(record[name]["dice_per_patient_mean_95_ci"]) == 2
    assert f"  dice_per_patient_mean        {record['valid_metrics']['dice_per_patient_mean']:.4f} (" in printed
    assert "too narrow" not in printed
    assert [line.split(",")[:2] for line in (out / "test_metrics.csv").read_text("utf-8-sig").splitlines()] == [
        ["file_name", "patient"], *([f"p{i // 3}test_{i}.png", f"p{i // 3}test"] for i in range(6))]
    assert record["data_counts"]["test"]["patients"] == 2
    # The pattern of the run is that of its evaluation, too, unless there is another one.
    assert script.main(arguments(data, out, "--evaluate")) == 0
    again = json.loads((out / "evaluation" / "scores.json").read_text())["test_metrics"]
    assert again == {name: pytest.approx(value) for name, value in record["test_metrics"].items()}
    assert script.main(arguments(data, out, "--evaluate", "--patient-pattern", r"(\d)\w+_")) == 0
    rows = (out / "evaluation_2" / "test_metrics.csv").read_text().splitlines()
    assert rows[1].startswith("p0test_0.png,0,")


# ===== No valid folder ================================================================================================


def one_folder(root, count=20, name=lambda _, i: f"{i}.png", splits=("train",)):
    return make(root, renamed(name), count, (48, 64), splits)


def test_a_share_of_train_is_held_out_and_scored_again_by_evaluate(tmp_path, tiny, capfd):
    data, out = one_folder(tmp_path / "data", splits=("train", "test")), tmp_path / "out"
    record = run(data, out)
    text = capfd.readouterr().out
    assert "4 of 20 images of train are held out for it (VALID_SHARE = 0.2: one of 5 parts): neighbours by" in text
    assert table(text)["images"] == ["16", "4", "20"]
    names = record["held_out"]["valid"]
    assert len(names) == 4 and set(names) < {f"{i}.png" for i in range(20)}
    assert [record["data_counts"][name]["images"] for name in ("train", "valid", "test")] == [16, 4, 20]
    scores = record["valid_metrics"]
    assert script.main(arguments(data, out, "--evaluate", "--seed", 9, "--valid-share", 0.5)) == 0
    text = capfd.readouterr().out
    assert table(text)["images"] == ["4", "20"] and f"Of {data / 'train'}, only images that the run held out" in text
    assert json.loads((out / "evaluation" / "scores.json").read_text(encoding="utf-8"))["valid_metrics"] == scores
    # What is not there is said; if nothing is, there is nothing to score.
    coco_path = data / "train" / script.ANNOTATION_FILE
    coco = json.loads(coco_path.read_text())
    coco["images"] = [image for image in coco["images"] if image["file_name"] != names[0]]
    coco["annotations"] = [a for a in coco["annotations"] if a["image_id"] in {i["id"] for i in coco["images"]}]
    coco_path.write_text(json.dumps(coco))
    assert script.main(arguments(data, out, "--evaluate")) == 0
    text = capfd.readouterr().out
    assert "1 of the 4 images that the run held out of train" in text and names[0] in text
    assert table(text)["images"] == ["3", "20"]
    shutil.rmtree(data / "test")
    coco["images"] = [image for image in coco["images"] if image["file_name"] not in names]
    coco_path.write_text(json.dumps(coco | {"annotations": []}))
    assert script.main(arguments(data, out, "--evaluate")) == 2
    assert "Traceback" not in capfd.readouterr().err


def test_training_on_what_is_left_is_training_on_the_same_two_folders(tmp_path, tiny):
    data = one_folder(tmp_path / "data")
    names = run(data, tmp_path / "out")["held_out"]["valid"]

    def part(root, split, keep):
        """A split of its own, with the numbers that the images had: unused ones come last."""
        shutil.copytree(data / "train", root / split)
        path = root / split / script.ANNOTATION_FILE
        coco = json.loads(path.read_text())
        ids = {image["id"] for image in coco["images"] if (image["file_name"] in names) == keep}
        coco["images"] = [image for image in coco["images"] if image["id"] in ids]
        coco["annotations"] = [a for a in coco["annotations"] if a["image_id"] in ids]
        path.write_text(json.dumps(coco))
        return root

    two = part(part(tmp_path / "two", "train", False), "valid", True)
    assert run(two, tmp_path / "same", "--epochs", 1)["held_out"] == {}
    # Only the augmentation differs: it depends on the place in the list. So compare the split itself.
    held, apart = (script.prepare_data(script.read_settings(["--data-dir", str(root), "--img-size", "64"])[0],
                                       ["train", "valid"])[0] for root in (data, two))
    for name in ("train", "valid"):
        assert [entry.digest for entry in held[name].entries] == [entry.digest for entry in apart[name].entries]
        assert [entry.mask_digest for entry in held[name].entries] == [e.mask_digest for e in apart[name].entries]
    assert held["valid"].held_out and not apart["valid"].held_out


def test_whole_patients_are_held_out(tmp_path, tiny):
    data = one_folder(tmp_path / "data", name=lambda _, i: f"p{i // 5}_{i}.png")
    names = run(data, tmp_path / "out", "--patient-pattern", PATTERN)["held_out"]["valid"]
    assert len(names) == 5 and len({name.partition("_")[0] for name in names}) == 1


def entry_of(i, name="", patient="", tumour=True):
    return script.ImageEntry(i, "", name or f"{i}.png", 1, 1, patient=patient, tumour_fraction=0.1 * tumour)


def held_out(entries, share, seed):
    """The names of the images that are held out for validation."""
    cfg = SimpleNamespace(VALID_SHARE=share, SEED=seed, FOLD=0)
    return script.choose_held_out(entries, cfg, ["valid"])["valid"]


def numbers(parts):
    return [sorted(entry.number for entry in part) for part in parts]


def test_neighbours_by_file_name_stay_together(tmp_path, capfd):
    """Twenty blocks of five, of which four are held out; names are sorted by folder, and numbers by value."""
    names = [f"{folder}/s{i}.png" for folder in "ab" for i in range(50)]
    order = np.random.default_rng(0).permutation(100)
    held = held_out([entry_of(i, names[i]) for i in order], 0.2, 42)
    assert len(held) == 20
    places = sorted(names.index(name) for name in held)
    assert all(places[k:k + 5] == list(range(places[k], places[k] + 5)) and places[k] % 5 == 0 for k in range(0, 20, 5))
    assert "neighbours by file name; set PATIENT_PATTERN" in capfd.readouterr().out


def test_versions_of_one_image_stay_together_and_blocks_differ_by_one_image():
    """Roboflow's NAME.rf.HASH; 103 images do not divide."""
    entries = [entry_of(3 * i + k, f"{i}_jpg.rf.{k}abc.jpg") for i in range(40) for k in range(3)]
    for group in script.group_images(entries, 5):
        assert {entry.number // 3 for entry in group} and len(group) % 3 == 0 and len(group) == 6
    sizes = [len(group) for group in script.group_images([entry_of(i) for i in range(103)], 5)]
    assert len(sizes) == 20 and max(sizes) - min(sizes) == 1
    assert len(script.group_images([entry_of(i) for i in range(3)], 5)) == 3


@pytest.mark.parametrize("names", [["s10.png", "s2.png"], ["b/s1.png", "a/s2.png"], ["s 10.png", "s 9.png"]])
def test_names_are_in_natural_order(names):
    assert sorted(names, key=script.natural_key) == names[::-1]


def test_every_image_is_dealt_once_into_parts_of_near_equal_size():
    for patients, parts in ((25, 5), (100, 3), (7, 5), (5, 5)):
        rng = np.random.default_rng(patients)
        entries = [entry_of(i, patient=f"p{rng.integers(patients)}", tumour=i % 9 == 0) for i in range(20 * patients)]
        groups = script.group_images(entries, parts)
        found = {}
        for seed in range(5):
            dealt = script.deal(groups, parts, seed)
            assert sorted(sum(numbers(dealt), [])) == list(range(len(entries)))
            assert all(any(entry.tumour_fraction for entry in part) for part in dealt)
            owners = [{entry.patient for entry in part} for part in dealt]
            assert sum(map(len, owners)) == len(set.union(*owners))  # nobody is in two parts
            assert max(map(len, dealt)) - min(map(len, dealt)) <= 2 * max(map(len, groups))
            found[seed] = numbers(dealt)[0]
        assert len({*map(tuple, found.values())}) > 1 and numbers(script.deal(groups, parts, 3))[0] == found[3]


def test_the_share_is_met_and_depends_on_the_seed():
    entries = [entry_of(i, patient=f"p{i // 4}") for i in range(100)]
    for share, count in ((0.2, 20), (0.5, 48), (0.34, 32), (0.01, 4)):
        assert abs(len(held_out(entries, share, 0)) - count) <= 4
    found = {tuple(held_out(entries, 0.2, seed)) for seed in range(5)}
    assert len(found) == 5 and held_out(entries, 0.2, 3) == held_out(entries, 0.2, 3)


@pytest.mark.parametrize("patient", ["", r"(p\d+)_"])
def test_five_folds_hold_out_every_image_once_and_the_test_share_is_the_same(patient, tmp_path):
    """Whole patients, or neighbours by file name; the test part is dealt before, and belongs to no fold."""
    data = one_folder(tmp_path / "data", 40, name=lambda _, i: f"p{i // 4}_{i}.png")
    found, test = [], []
    for fold in range(4):
        cfg = script.read_settings(["--data-dir", str(data), "--img-size", "64", "--fold", str(fold), "--valid-share",
                                    "0.25", "--test-share", "0.2", "--patient-pattern", patient or "none"])[0]
        splits = script.prepare_data(cfg, ["train", "valid", "test"])[0]
        names = {split: [entry.file_name for entry in splits[split].entries] for split in splits}
        assert [*splits] == ["train", "valid", "test"] and sum(map(len, names.values())) == 40
        owners = [{name[:2] for name in part} for part in names.values()]
        assert not patient or sum(map(len, owners)) == 10
        found += names["valid"]
        test.append(names["test"])
    assert test == [test[0]] * 4 and len(test[0]) == 8
    assert sorted(found + test[0]) == sorted(f"p{i // 4}_{i}.png" for i in range(40))


def test_five_runs_on_the_phantoms_are_a_cross_validation(tmp_path, tiny):
    """As README puts it; every phantom is held out, and scored, once."""
    shutil.copytree(ROOT / "train", tmp_path / "data" / "train")
    runs = [run(tmp_path / "data", tmp_path / f"fold{fold}", "--fold", fold) for fold in range(5)]
    found = sum((record["held_out"]["valid"] for record in runs), [])
    assert sorted(found) == sorted(path.name for path in (ROOT / "train").glob("*.jpg"))
    rows = [line.split(",")[0] for fold in range(5) for line in
            (tmp_path / f"fold{fold}" / "valid_metrics.csv").read_text("utf-8-sig").splitlines()[1:]]
    assert sorted(rows) == sorted(found) and all(0 <= record["valid_metrics"]["dice"] <= 1 for record in runs)


def test_a_fold_needs_a_share_that_divides(tmp_path, capfd):
    data = one_folder(tmp_path / "data")
    for fold, share in ((5, 0.2), (1, 0.3), (2, 0.5)):
        assert "FOLD" in refused(capfd, data, tmp_path / "out", "--audit", "--fold", fold, "--valid-share", share)
    accepted(capfd, data, tmp_path / "out", "--fold", 4)
    with_valid = one_folder(tmp_path / "with valid", 6, splits=("train", "valid"))
    assert str(with_valid / "valid") in refused(capfd, with_valid, tmp_path / "out", "--audit", "--fold", 1)
    assert "too few" in refused(capfd, one_folder(tmp_path / "few", 3), tmp_path / "out", "--audit", "--fold", 4)


def test_a_held_out_test_part_is_scored_again_and_another_fold_is_another_run(tmp_path, tiny, capfd):
    data, out = one_folder(tmp_path / "data"), tmp_path / "out"
    record = run(data, out, "--test-share", 0.2, "--fold", 1)
    assert [*record["held_out"]] == ["valid", "test"] and record["test_metrics"]["dice"] >= 0
    assert "TEST_SHARE" not in capfd.readouterr().out.rpartition("Model: ")[2]
    assert script.main(arguments(data, out, "--evaluate")) == 0
    assert table(capfd.readouterr().out)["images"] == ["3", "4"]
    again = json.loads((out / "evaluation" / "scores.json").read_text(encoding="utf-8"))
    assert again["test_metrics"] == {name: pytest.approx(value) for name, value in record["test_metrics"].items()}
    assert script.main(arguments(data, out, "--resume", "--fold", 0)) == 2
    assert "FOLD: saved 1, now 0" in capfd.readouterr().err
    run(data, out, "--test-share", 0.2)
    assert len([*out.glob("earlier_run_*")]) == 1


def test_without_test_images_the_run_says_how_to_get_a_score(tmp_path, tiny, capfd):
    run(one_folder(tmp_path / "data", 6, splits=("train", "valid")), tmp_path / "out")
    assert "no test score" in capfd.readouterr().out.rpartition("Model: ")[2]


# ===== One folder =====================================================================================================


def images_and_masks(root):
    """A download with images/ and masks/, and a second one with a folder for each patient."""
    return pairs(root, PLACES["images and masks"], 20, splits=(".",))


def folders_of_patients(root):
    return pairs(root, lambda i: (f"TCGA_{i // 5}/TCGA_{i // 5}_{i}", f"TCGA_{i // 5}/TCGA_{i // 5}_{i}_mask.tif"), 20,
                 splits=(".",), suffix=".tif")


@pytest.mark.parametrize("make_folder, more", [(images_and_masks, []), (folders_of_patients, []),
                                               (folders_of_patients, ["--patient-pattern", r"(TCGA_\d+)_"])])
def test_a_download_without_splits_is_trained_on_as_it_is(make_folder, more, tmp_path, tiny, capfd):
    """With the run's own files in it, which are no data."""
    data = make_folder(tmp_path / "data")
    out = data / "run"
    names = run(data, out, *more)["held_out"]["valid"]
    text = capfd.readouterr().out
    assert f"There is no train/ in {data}" in text
    assert table(text)["images"] == ["15" if more else "16", str(len(names))]
    scan = next(path for path in data.rglob("*.*") if path.stem in ("0", "TCGA_0_0"))
    for folder in (out, data):
        assert script.main(["--predict", str(scan), "--output-dir", str(folder), "--checkpoint",
                            str(out / script.BEST), "--device", "cpu"]) == 0
    assert run(data, data, *more)["held_out"]["valid"] == names
    capfd.readouterr()
    assert script.main(arguments(data, out, "--evaluate")) == 0
    assert table(capfd.readouterr().out)["images"] == [str(len(names))]  # of its own data, what it has not seen
    other = make_folder(tmp_path / "other")
    for path in [*other.rglob("*.*")]:
        path.rename(path.with_name("x" + path.name))
    assert script.main(arguments(other, out, "--evaluate")) == 0
    assert table(capfd.readouterr().out)["images"] == ["20"]  # of other data, all


@pytest.mark.parametrize("names, splits", [
    (("Training", "Testing"), ["train", "valid", "test"]), (("TRAIN", "Val"), ["train", "valid"])])
def test_folders_named_like_splits_are_these(names, splits, tmp_path, capfd):
    data = pairs(tmp_path / "data", PLACES["masks"], 10, splits=names)
    write(data / "picture of the scanner.png", noise_picture(0, 96, 128))
    out, _ = accepted(capfd, data, tmp_path / "out", "--audit")
    assert out.partition("\nData ")[2].splitlines()[0].split() == splits


@pytest.mark.parametrize("first, second, split", [("train", "training", "train"), ("VAL", "valid", "valid")])
def test_two_folders_for_one_split_are_refused(first, second, split, tmp_path, capfd):
    data = pairs(tmp_path / "data", PLACES["masks"], 10, splits=("train", "valid"))
    new, = {first, second} - {path.name for path in data.iterdir()}
    accepted(capfd, data, data / new, "--audit")  # an output folder, which is made for it
    (data / new / "another.png").write_bytes((data / "train" / "0.png").read_bytes())
    message = refused(capfd, data, tmp_path / "out", "--audit")
    assert f"{data / first} and {data / second} are both a folder for {split}" in message
    shutil.rmtree(data / new)
    (data / new).symlink_to(data / ({first, second} - {new}).pop())
    accepted(capfd, data, tmp_path / "out", "--audit")


@pytest.mark.parametrize("name", ["train_set", "Validate", "holdout", "dev", "tests"])
def test_a_folder_that_could_be_a_split_is_refused_beside_images(name, tmp_path, capfd):
    data = images_and_masks(tmp_path / "data")
    (data / name).mkdir()
    message = refused(capfd, data, tmp_path / "out", "--audit")
    assert str(data / name) in message and "train, training, valid, val, validation, test, testing" in message


@pytest.mark.parametrize("folder, splits, place", [
    ("data", ("download/train", "download/test"), lambda i: (f"images/{i}", f"masks/{i}.png")),
    ("data", (".",), lambda i: (f"images/{('train', 'test')[i % 2]}/{i}", f"masks/{('train', 'test')[i % 2]}/{i}.png")),
    ("Training", (".", "test"), lambda i: (f"{i}", f"masks/{i}.png"))])
def test_splits_that_would_be_mixed_are_refused(folder, splits, place, tmp_path, capfd):
    data = pairs(tmp_path / folder, place, splits=splits)
    message = refused(capfd, data, tmp_path / "out", "--audit")
    assert f"{data} has no train/, but images in {data}" in message


def test_nothing_can_be_held_out_of_one_patient(tmp_path, capfd):
    data = one_folder(tmp_path / "data", name=lambda _, i: f"p1_{i}.png")
    assert "1 patients" in refused(capfd, data, tmp_path / "out", "--audit", "--patient-pattern", PATTERN)


def test_a_resumed_run_holds_out_the_same_images_and_may_not_change_that(tmp_path, tiny, capfd):
    data = one_folder(tmp_path / "data", name=lambda _, i: f"p{i // 2}_{i}.png")
    record = run(data, tmp_path / "whole", "--epochs", 2)
    run(data, tmp_path / "two", "--epochs", 1)
    for flag, value in (("--valid-share", 0.4), ("--patient-pattern", PATTERN)):
        assert script.main(arguments(data, tmp_path / "two", "--epochs", 2, "--resume", flag, value)) == 2
        assert flag[2:].upper().replace("-", "_") + ": saved" in capfd.readouterr().err
    resumed = run(data, tmp_path / "two", "--epochs", 2, "--resume")
    assert resumed["held_out"] == record["held_out"] and same_weights(tmp_path / "whole", tmp_path / "two")


def test_with_a_valid_folder_nothing_is_held_out(tmp_path, tiny):
    data = one_folder(tmp_path / "data", 6, splits=("train", "valid"))
    assert run(data, tmp_path / "a", "--valid-share", 0.5)["held_out"] == {}
    run(data, tmp_path / "b")
    assert same_weights(tmp_path / "a", tmp_path / "b")


# ===== Mask files =====================================================================================================


def pairs(root, place, count=6, splits=("train", "valid"), suffix=".png", missing=(), levels=(0, 255), options=()):
    """Pictures with an octagon each and their mask files; place(i) is (image, mask) below the folder of the split."""
    for number, split in enumerate(splits):
        rng = np.random.default_rng(number)
        for i in range(count):
            polygon = octagon(rng.uniform(40, 90), rng.uniform(35, 60), rng.uniform(10, 20), rng.uniform(10, 25))
            mask = coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects([polygon], 96, 128)))
            image, name = place(i)
            write(root / split / (image + suffix), noise_picture(100 * number + i, 96, 128))
            if i not in missing:
                dtype = np.uint16 if max(levels) > 255 else np.uint8
                write(root / split / name, np.array(levels, dtype)[mask], options)
    return root


PLACES = {"beside": lambda i: (f"切片 {i}", f"切片 {i}_mask.png"), "masks": lambda i: (f"{i}", f"masks/{i}.png"),
          "images and masks": lambda i: (f"images/{i}", f"masks/{i}.png"),
          "masks with _mask": lambda i: (f"images/{i}", f"masks/{i}_mask.png"),
          "folders of patients": lambda i: (f"p{i // 2}/{i}", f"p{i // 2}/{i}_MASK.tif"),
          "the same name in every folder": lambda i: (f"p{i}/images/slice", f"p{i}/masks/slice.bmp")}


def as_coco(source, target):
    """The same data with a COCO file: images in the order of their paths, masks as RLE."""
    for split in source.iterdir():
        found = sorted(path for path in split.rglob("*.*"))
        coco = {"images": [], "annotations": [], "categories": [{"id": 1, "name": "tumor"}]}
        masks = [path for path in found if "mask" in str(path.relative_to(split)).lower()]
        for i, path in enumerate(path for path in found if path not in masks):
            folder, stem = path.parent.parent if path.parent.name == "images" else path.parent, path.stem
            mine = [mask for mask in masks if folder in mask.parents
                    and re.sub("_mask$", "", mask.stem, flags=re.I) == stem]
            coco["images"].append({"id": i, "file_name": str(path.relative_to(split)), "height": 96, "width": 128})
            if mine:
                mask = cv2.imdecode(np.fromfile(mine[0], np.uint8), 0) > 127
                rle = coco_mask.encode(np.asfortranarray(mask, np.uint8))
                coco["annotations"].append({"id": i, "image_id": i, "category_id": 1, "segmentation": {
                    "size": rle["size"], "counts": rle["counts"].decode()}})
            (target / split.name / path.relative_to(split)).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, target / split.name / path.relative_to(split))
        (target / split.name / script.ANNOTATION_FILE).write_text(json.dumps(coco))
    return target


@pytest.mark.parametrize("place", PLACES.values(), ids=list(PLACES))
def test_pairs_train_to_the_same_weights_as_the_same_data_in_coco(place, tmp_path, tiny):
    data = pairs(tmp_path / "pairs", place, suffix=".jpg" if place is PLACES["masks"] else ".png", missing=[3])
    record = run(data, tmp_path / "a", "--epochs", 2)
    other = run(as_coco(data, tmp_path / "coco"), tmp_path / "b", "--epochs", 2)
    assert same_weights(tmp_path / "a", tmp_path / "b")
    assert record["data_counts"] == other["data_counts"] and record["valid_metrics"] == other["valid_metrics"]
    assert record["data_counts"]["train"] == {"images": 6, "annotations": 5, "without_tumour": 1,
                                              "without_annotation": 1, "skipped": 0, "near_duplicates": 0}


def test_the_audit_of_pairs(tmp_path, capfd):
    data = pairs(tmp_path / "data", PLACES["beside"], missing=[1, 2])
    write(data / "train" / "切片 0_mask.png", np.zeros((96, 128), np.uint8))
    out, _ = accepted(capfd, data, tmp_path / "out")
    assert table(out)["annotations: mask file"] == ["4", "4"] and table(out)["without tumour"] == ["3", "2"]
    assert table(out)["without annotation"] == ["2", "2"]
    found, = remarks(out)
    assert found.startswith("4 of 12 images have no annotation (切片 1.png, 切片 2.png, 切片 1.png, ...): ")
    out, _ = accepted(capfd, data, tmp_path / "out", "--unannotated", "skip")
    assert table(out)["images"] == ["4", "4"]
    out, _ = accepted(capfd, data, tmp_path / "out", "--categories", "tumor")  # of COCO files: masks have none
    assert table(out)["annotations: mask file"] == ["4", "4"]


def test_the_public_dataset_reads_pairs_by_itself(tmp_path):
    data = pairs(tmp_path / "data", PLACES["masks"])
    dataset = script.BrainTumorDataset(data / "train", 64, normalize=False)
    other = script.BrainTumorDataset(as_coco(data, tmp_path / "coco") / "train", 64, normalize=False)
    assert len(dataset) == 6
    for i in range(6):
        assert all(np.array_equal(a, b) for a, b in zip(dataset.sample(i), other.sample(i)))
        assert dataset.sample(i)[1].any()


def masks(data, split="train"):
    """The masks of a data folder, whose levels are decided over all of its splits."""
    splits = script.read_splits({path.name: path for path in data.iterdir()})
    return np.stack([entry.mask() for entry in splits[split].entries])


@pytest.mark.parametrize("levels, suffix, options, kind", [
    ((0, 1), ".png", (), ""), ((0, 7), ".png", (), ""), ((3, 200), ".png", (), ""), ((0, 65535), ".png", (), ""),
    ((0, 255), ".bmp", (), ""), ((0, 255), ".jpg", (cv2.IMWRITE_JPEG_QUALITY, 95), "128 and above"),
    ((0, 255), ".jpg", (cv2.IMWRITE_JPEG_QUALITY, 60), "128 and above"),
    ((10, 240), ".jpg", (cv2.IMWRITE_JPEG_QUALITY, 80), " and above")])
def test_of_two_levels_the_upper_one_is_tumour(levels, suffix, options, kind, tmp_path, capfd):
    plain = masks(pairs(tmp_path / "plain", PLACES["masks"]))
    data = pairs(tmp_path / "data", lambda i: (f"{i}", f"masks/{i}{suffix}"), levels=levels, options=options)
    assert np.array_equal(masks(data), plain)
    found = remarks(accepted(capfd, data, tmp_path / "out")[0])
    assert kind in found[0] if kind else found == []


def test_coloured_masks_and_transparency(tmp_path):
    data = pairs(tmp_path / "data", PLACES["masks"])
    plain = masks(data)
    for split in data.iterdir():
        for i, path in enumerate(sorted(split.glob("masks/*"))):
            mask = script.read_mask_file(path)[0]
            red, opaque = np.dstack([mask * 0, mask * 0, mask]), np.full_like(mask, 255)
            write(path, np.dstack([red, opaque]) if i % 2 else red)
    assert np.array_equal(masks(data), plain)


def coloured(mask, rgb):
    """Pixels of one colour on black, as OpenCV writes them."""
    return (mask[..., None] > 0) * np.array(rgb[::-1], np.uint8)


@pytest.mark.parametrize("suffix", [".png", ".jpg"])
@pytest.mark.parametrize("rgb", [(255, 0, 0), (255, 255, 0), (0, 128, 255), (200, 0, 255), (255, 128, 0)])
def test_masks_in_one_colour_are_masks(rgb, suffix, tmp_path, capfd):
    """Also blurred; and a grey one among them."""
    data = pairs(tmp_path / "data", PLACES["masks"])
    plain = masks(data)
    for split in data.iterdir():
        for i, path in enumerate(sorted(split.glob("masks/*"))):
            picture = coloured(cv2.imread(str(path), 0), rgb) if i else cv2.imread(str(path), 0)
            path.unlink()
            write(path.with_suffix(suffix), picture, [cv2.IMWRITE_JPEG_QUALITY, 80] if suffix == ".jpg" else ())
    found = masks(data)
    assert (found & plain).sum() > 0.97 * (found | plain).sum()
    accepted(capfd, data, tmp_path / "out")


@pytest.mark.parametrize("suffix", [".png", ".jpg"])
@pytest.mark.parametrize("rgb", [(0, 255, 0), (255, 255, 0), (255, 255, 255), (160, 160, 160)])
@pytest.mark.parametrize("where", ["in one file", "in another file"])
def test_masks_in_two_colours_are_refused_with_the_colours(rgb, suffix, where, tmp_path, capfd):
    data = pairs(tmp_path / "data", PLACES["masks"])
    for split in data.iterdir():
        for i, path in enumerate(sorted(split.glob("masks/*"))):
            mask = cv2.imread(str(path), 0)
            picture, ventricle = coloured(mask, (255, 0, 0)), np.zeros_like(mask)
            ventricle[4:12, 10:30] = mask[4:12, 10:30] == 0
            path.unlink()
            if where == "in one file":
                picture += coloured(ventricle, rgb)
            elif i == 2 and split.name == "train":
                picture = coloured(mask, rgb)
            write(path.with_suffix(suffix), picture, [cv2.IMWRITE_JPEG_QUALITY, 95] if suffix == ".jpg" else ())
    if where == "in another file" and rgb == (255, 255, 255):  # as if it were grey
        accepted(capfd, data, tmp_path / "out")
        return
    message = refused(capfd, data, tmp_path / "out", "--audit")
    assert f"masks/2{suffix}" in message
    if where == "in another file" and rgb == (160, 160, 160):  # a third level
        assert "grey levels" in message
        return
    assert "more than one colour" in message and "one colour on black" in message
    assert suffix == ".jpg" or "#ff0000 (" in message and "#{:02x}{:02x}{:02x} (".format(*rgb) in message
    assert (f"masks/3{suffix}" in message) == (where == "in one file")


def test_a_palette_is_applied_before_levels_and_colours_are_judged(tmp_path, capfd):
    """Index 0 may be white; a coloured palette is colours, a grey one levels."""
    data = pairs(tmp_path / "data", PLACES["masks"])
    plain = {split: masks(data, split) for split in ("train", "valid")}
    for split in data.iterdir():
        for path, mask in zip(sorted(split.glob("masks/*")), plain[split.name]):
            indexed = Image.fromarray(1 - mask).convert("P")
            indexed.putpalette([255, 255, 255, 0, 0, 0])
            indexed.save(path)
    assert all(np.array_equal(masks(data, split), plain[split]) for split in plain)
    for path in data.glob("*/masks/*"):
        indexed = Image.open(path)
        pixels = np.array(indexed)
        pixels[:5, :5] = 2
        indexed = Image.fromarray(pixels).convert("P")
        indexed.putpalette([255, 0, 0, 0, 0, 0, 0, 255, 0])
        indexed.save(path)
    message = refused(capfd, data, tmp_path / "out", "--audit")
    assert "#ff0000" in message and f"#00ff00 ({12 * 25} pixels)" in message


# --- names and formats


@pytest.mark.skipif(os.name == "nt", reason="names are Unicode there")
def test_names_that_are_no_unicode_are_problems_of_their_images(tmp_path, capfd):
    data = pairs(tmp_path / "data", PLACES["masks"])
    for folder in (b"", b"masks/"):
        place = os.fsencode(data / "train") + b"/" + folder
        os.rename(place + b"2.png", place + "脑瘤".encode("gbk") + b".png")
    message = refused(capfd, data, tmp_path / "out", "--audit")
    assert "1 image" in message and "rename it" in message and str(data / "train") in message
    assert table(accepted(capfd, data, tmp_path / "out", "--skip-bad-images")[0])["unusable images"] == ["1", "0"]


@pytest.mark.parametrize("suffix", [".gif", ".TGA", ".npy", ".ppm", ".jp2", ".nii.gz"])
def test_files_of_formats_that_are_not_read_are_named_as_such(suffix, tmp_path, capfd):
    data = pairs(tmp_path / "data", PLACES["masks"])
    (data / "train/masks/2.png").rename(data / f"train/masks/2{suffix}")
    message = refused(capfd, data, tmp_path / "out", "--audit")
    assert "mask file of a format that is not read" in message and f"masks/2{suffix}" in message
    for path in data.glob("*/masks/*.png"):
        path.rename(path.with_name(path.stem + suffix))
    assert "mask file of a format that is not read" in refused(capfd, data, tmp_path / "out", "--audit")
    for path in data.glob("*/masks/*"):
        path.rename(path.parent.parent / path.name)
    message = refused(capfd, data, tmp_path / "out", "--audit")
    assert "6 files of a format that is not read, such as " in message and suffix in message
    data = make(tmp_path / "coco")
    (data / "valid" / f"x{suffix}").write_bytes(b"x")
    said, = remarks(accepted(capfd, data, tmp_path / "out")[0])
    assert "image file of a format that is not read" in said and f"valid/x{suffix}" in said


@pytest.mark.skipif(os.name == "nt", reason="links need rights there")
def test_linked_folders_are_followed_once(tmp_path, capfd):
    data, other = pairs(tmp_path / "data", PLACES["masks"]), pairs(tmp_path / "other", PLACES["masks"], 4, ("P7",))
    (data / "train" / "P7").symlink_to(other / "P7")
    (other / "P7" / "loop").symlink_to(data / "train")
    (data / "train" / "again").symlink_to(other / "P7")
    assert table(accepted(capfd, data, tmp_path / "out")[0])["images"] == ["10", "6"]


def relabel(path, where, value):
    mask = script.read_mask_file(path)[0]
    mask[where] = value
    write(path, mask)


def test_of_label_maps_everything_above_zero_counts_whatever_a_file_holds(tmp_path, capfd):
    """1, 2 and 4, as in BraTS; valid has only 0 and 1, which decides nothing."""
    data = pairs(tmp_path / "data", PLACES["beside"], levels=(0, 1))
    plain = {split: masks(data, split) for split in ("train", "valid")}
    for i, value in enumerate((2, 4, 4)):
        relabel(data / "train" / f"切片 {i}_mask.png", plain["train"][i] > 0, value)
    for split in ("train", "valid"):
        assert np.array_equal(masks(data, split), plain[split])
    found, = remarks(accepted(capfd, data, tmp_path / "out")[0])
    assert "tumour is 1 and above" in found and "levels 0, 1, 2, 4" in found


def test_what_levels_mean_is_decided_once_for_all_files(tmp_path):
    """Files that are black or white all over have one level, and mean what it means in the others."""
    data = pairs(tmp_path / "data", PLACES["beside"])
    relabel(data / "train" / "切片 0_mask.png", ..., 0)
    relabel(data / "valid" / "切片 1_mask.png", ..., 255)
    assert not masks(data)[0].any() and masks(data, "valid")[1].all()


def squares(*more):
    """A mask of 0 and 255 with further levels."""
    mask = np.zeros((96, 128), np.uint8)
    mask[20:60, 20:60] = 255
    for i, level in enumerate(more):
        mask[70:90, 10 * i:10 * i + 8] = level
    return mask


def write_float(root, stem):
    (root / "train" / f"{stem}_mask.png").unlink()
    write(root / "train" / f"{stem}_mask.tif", squares().astype(np.float32) / 255)


@pytest.mark.parametrize("change, words", [
    (lambda root: write(root / "train" / "切片 2_mask.png", squares(128)), "切片 2_mask.png"),
    (lambda root: write(root / "train" / "切片 2_mask.png", squares(5, 50)), "all levels: 0, 5, 50, 255"),
    (lambda root: write(root / "train" / "切片 2_mask.png", squares(1, 2)), "切片 2_mask.png"),  # labels among others
    (lambda root: write(root / "train" / "切片 2_mask.png", squares(64, 128, 191)), "nearest neighbour"),  # resized
    (lambda root: write(root / "train" / "切片 2_mask.png", squares(*range(20, 200, 20))), "切片 2_mask.png"),
    (lambda root: write(root / "train" / "切片 2_mask.png", noise_picture(5, 96, 128)), "切片 2_mask.png"),
    (lambda root: write(root / "valid" / "切片 2_mask.png", np.zeros((90, 128), np.uint8)), "another size, 128x90"),
    (lambda root: write(root / "valid" / "切片 2_mask.png", np.zeros((128, 96), np.uint8)), "another size, 96x128"),
    (lambda root: write(root / "train" / "other_mask.png", squares()), "mask without image"),
    (lambda root: write(root / "train" / "masks" / "切片 2.png", squares()), "two masks for one image"),
    (lambda root: write(root / "train" / "切片 2.jpg", noise_picture(1, 96, 128)), "mask for more than one image"),
    (lambda root: (root / "train" / "切片 2_mask.png").write_bytes(b"x"), "its mask: not a JPEG"),
    (lambda root: (root / "train" / "切片 2_mask.png").write_bytes(b""), "its mask: the file is empty"),
    (lambda root: write(root / "train" / "切片 2_mask_2.png", squares()), "two masks for one image"),
    (lambda root: write_float(root, "切片 2"), "other numbers than 8 or 16 bit"),
    (lambda root: write(root / "train" / "切片 2_mask.png", np.dstack([squares() * 0] * 3 + [squares()])),
     "only transparency"),
    (lambda root: (root / "train" / "切片 2.png").write_bytes(b"x"), "not a JPEG, PNG, BMP, TIFF or WebP image")])
def test_masks_that_could_mean_anything_are_refused_by_name(change, words, tmp_path, capfd):
    data = pairs(tmp_path / "data", PLACES["beside"])
    change(data)
    message = refused(capfd, data, tmp_path / "out", "--audit")
    assert words in message and ("切片 2" in message or "other_mask" in message)


def test_levels_of_one_grey_are_refused(tmp_path, capfd):
    message = refused(capfd, pairs(tmp_path / "data", PLACES["beside"], levels=(9, 9)), tmp_path / "out", "--audit")
    assert "all levels: 9" in message


def test_a_bad_pair_can_be_left_out(tmp_path, capfd):
    data = pairs(tmp_path / "data", PLACES["beside"])
    (data / "train" / "切片 2_mask.png").write_bytes(b"x")
    out, _ = accepted(capfd, data, tmp_path / "out", "--skip-bad-images")
    assert table(out)["unusable images"] == ["1", "0"]


def test_prediction_leaves_masks_out(tmp_path):
    data = pairs(tmp_path / "data", PLACES["images and masks"])
    assert [path.parent.name for path, _ in script.find_images([str(data)])] == ["images"] * 12


def test_a_dark_mask_among_others_is_refused(tmp_path, capfd):
    """0 and 1 where the others, blurred by JPEG, have 0 and 255: it would be a mask without tumour."""
    data = pairs(tmp_path / "data", lambda i: (f"{i}", f"{i}_mask.jpg"), count=8)
    (data / "train" / "2_mask.jpg").unlink()
    write(data / "train" / "2_mask.png", squares() // 255)
    message = refused(capfd, data, tmp_path / "out", "--audit")
    assert "1 mask file with grey levels that could mean anything" in message and "2_mask.png" in message


def test_a_photo_among_masks_is_named_first(tmp_path, capfd):
    data = pairs(tmp_path / "data", lambda i: (f"{i}", f"{i}_mask.jpg"), count=8)
    write(data / "train" / "5_mask.jpg", noise_picture(9, 96, 128))
    message = refused(capfd, data, tmp_path / "out", "--audit")
    assert message.index("5_mask.jpg") < message.index("\nMasks have two levels")
    assert message.splitlines()[1].endswith("5_mask.jpg")


def test_folders_of_patients_below_images_and_masks(tmp_path):
    place = lambda i: (f"images/p{i // 2}/{i}", f"masks/p{i // 2}/{i}.png")  # noqa: E731
    data = pairs(tmp_path / "data", place)
    assert masks(data).any(axis=(1, 2)).all() and len(masks(data)) == 6


def test_what_jupyter_and_macos_leave_behind_is_no_image(tmp_path, capfd):
    data = pairs(tmp_path / "data", PLACES["masks"])
    for name in (".ipynb_checkpoints/0-checkpoint.png", "._1.png", "masks/._1.png", "__MACOSX/2.png"):
        write(data / "train" / "x.png", noise_picture(0, 96, 128))
        (data / "train" / name).parent.mkdir(exist_ok=True)
        (data / "train" / "x.png").rename(data / "train" / name)
    out, _ = accepted(capfd, data, tmp_path / "out")
    assert table(out)["images"] == ["6", "6"] and remarks(out) == []


def test_an_inverted_mask_gets_a_remark(tmp_path, capfd):
    data = pairs(tmp_path / "data", PLACES["masks"])
    write(data / "train" / "masks" / "1.png", 255 - squares())
    assert remarks(accepted(capfd, data, tmp_path / "out")[0]) == [
        "tumour on more than half of the image: is the mask inverted?: train/1.png"]


def test_mask_files_beside_a_coco_file_are_not_used_and_this_is_said(tmp_path, capfd):
    data = make(tmp_path / "data")
    write(data / "train" / "3_mask.png", squares())
    out, _ = accepted(capfd, data, tmp_path / "out")
    assert remarks(out) == ["mask file that is not used, because there is a COCO file: train/3_mask.png"]


def test_a_split_in_coco_and_one_of_pairs(tmp_path, capfd):
    """Without a remark about several categories, of which one could be chosen."""
    data = pairs(tmp_path / "data", PLACES["masks"])
    shutil.rmtree(data / "valid")
    shutil.copytree(make(tmp_path / "coco") / "valid", data / "valid")
    out, _ = accepted(capfd, data, tmp_path / "out")
    assert table(out)["annotations: mask file"] == ["6", "0"] and table(out)["annotations: tumor"] == ["0", "6"]
    assert remarks(out) == []


def test_the_public_dataset_refuses_what_it_cannot_read(tmp_path):
    data = pairs(tmp_path / "data", PLACES["beside"])
    write(data / "train" / "切片 1_mask.png", squares()[:50])
    with pytest.raises(script.TrainerError, match="another size"):
        script.BrainTumorDataset(data / "train", 64).sample(1)
    (data / "train" / "切片 1_mask.png").write_bytes(b"x")
    with pytest.raises(script.TrainerError, match="1 image.*cannot be used"):
        script.BrainTumorDataset(data / "train", 64)


# --- held out, and what is checked


def test_what_is_held_out_has_a_tumour_and_is_no_giant():
    few = [entry_of(i, patient=f"p{i}", tumour=i in (7, 8)) for i in range(20)]
    giant = [entry_of(i, patient=f"p{max(0, i - 25)}") for i in range(30)]
    for seed in range(20):
        held = held_out(few, 0.2, seed)
        assert len(held) == 4 and len({"7.png", "8.png"} & {*held}) == 1
        assert len(held_out(giant, 0.2, seed)) == 1  # not the first patient, who has 26 images


def test_a_block_that_has_all_tumours_is_cut_in_two():
    for first in (40, 43):
        entries = [entry_of(i, tumour=first <= i < first + 2) for i in range(100)]
        for seed in range(10):
            held = held_out(entries, 0.2, seed)
            assert len({f"{first}.png", f"{first + 1}.png"} & {*held}) == 1 and 15 <= len(held) <= 23


def test_labels_are_checked_of_the_splits_that_the_model_knew(tmp_path, tiny, capfd):
    """Held out are the images that the JSON names; a valid folder that was taken away is not replaced by others."""
    data, out = one_folder(tmp_path / "data"), tmp_path / "out"
    names = run(data, out)["held_out"]["valid"]
    assert script.main(arguments(data, out, "--check-labels")) == 0
    assert table(capfd.readouterr().out.rpartition("Model: ")[2])["images"] == ["16", "4"] and len(names) == 4
    two, other = one_folder(tmp_path / "two", 6, splits=("train", "valid")), tmp_path / "other"
    run(two, other)
    shutil.rmtree(two / "valid")
    assert script.main(arguments(two, other, "--check-labels")) == 0
    text = capfd.readouterr().out.rpartition("Model: ")[2]
    assert table(text)["images"] == ["6"] and "are held out" not in text
    assert script.main(arguments(two, other, "--evaluate")) == 2
    assert "nothing to score" in capfd.readouterr().err
