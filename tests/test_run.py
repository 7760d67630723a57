"""A run survives what happens to it: what is saved, and when; going on; kills, signals, full disks, other runs."""

import copy
import ctypes
import errno
import fcntl
import functools
import importlib
import io
import json
import multiprocessing
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import background
import numpy as np
import pytest
import torch
from background import Process, arguments, assert_same_run, copy_run, read, rising_dice, run, table_rows, whole_run
from conftest import definitions, script, smp_build_model, tiny_build_model, write_data

BEST, JSON, LAST = script.BEST, "unet_plusplus_best.json", script.LAST
TABLE, PLOT, SAMPLES = "training_history.csv", "training_history.png", "training_samples.png"
VALID, SCORES, CASES, REPORT = "valid_metrics.csv", "test_metrics.csv", "test_predictions.png", "test_report.png"
LOCK, HOW_TO_RESUME = ".brain_tumor.lock", script.HOW_TO_RESUME
partial = functools.partial

# --- faults, see background.py


def send(signum):
    os.kill(os.getpid(), signum)


def raising(error):
    def fail(*_, **__):
        raise error

    return fail


def constant_dice(script, dice=0.5):
    inner = script.validate
    script.validate = lambda *args, **options: inner(*args, **options) | {"dice": dice}


def before(script, act, name="train_one_epoch", time=1):
    """Something happens when a function is called for the first, second, ... time."""
    inner, calls = getattr(script, name), []

    def call(*args, **options):
        calls.append(name)
        if len(calls) == time:
            act()
        return inner(*args, **options)

    setattr(script, name, call)


# --- helpers


@pytest.fixture
def here(tiny, monkeypatch, capfd):
    """main() in this process, with the two-layer network and without pictures: gives (exit code, output).

    Faults hold for one call.
    """
    def main(argv, *faults):
        capfd.readouterr()
        with monkeypatch.context() as patch:
            for (owner, name), value in definitions().items():
                patch.setattr(owner, name, value)  # to be undone
            patch.setattr(script, "open", open, raising=False)
            for fault in (background.no_pictures, *faults):
                fault(script)
            code = script.main([str(word) for word in argv])
        return code, "".join(capfd.readouterr())

    return main


def succeed(argv, *faults, **options):
    """Run to the end in a process of its own; returns the output."""
    code, text = run(argv, *faults, **options)
    assert code == 0 and "Traceback" not in text, text
    return text


def alone(folder, *more, data=None):
    """arguments() for a run without workers."""
    return arguments(folder, "--num-workers", 0, *more, data=data)


@pytest.fixture
def finished(tmp_path):
    """A copy of a finished run of 4 epochs."""
    return copy_run(whole_run(), tmp_path / "finished")


def contents(folder):
    """All files below a folder but the lock."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*")
            if path.is_file() and path.name != LOCK}


def replace_file(path, content):
    """Give a file of a copied run another content, or none; the original, a hard link of it, stays as it is."""
    path.unlink(missing_ok=True)
    if content is not None:
        path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)


def refused(here, folder, *argv, **options):
    """--resume has to be refused without touching a file; returns the message."""
    earlier = contents(folder)
    code, text = here(alone(folder, "--resume", *argv, **options))
    assert code == 2 and "error: " in text and "Traceback" not in text
    assert contents(folder) == earlier
    return text


# --- two halves are the whole


@pytest.mark.parametrize("options", [
    [], ["--precision", "bfloat16"], ["--ema-epochs", 0, "--warmup-steps", 0], ["--save-seconds", 1000],
    ["--ema-epochs", 3, "--warmup-steps", 12],  # the warm-up ends in the third epoch
    ["--accumulation-steps", 2, "--batch-size", 1, "--cache-gb", 0],
], ids=lambda options: " ".join(map(str, options)) or "float32")
def test_two_and_two_epochs_are_four(options, tmp_path):
    """The first ones without workers, the other ones, like the undisturbed run, with two."""
    succeed(alone(tmp_path, *options, "--epochs", 2))
    assert len(read(tmp_path)["history"]) == 2
    assert "Continuing after epoch 2" in succeed(arguments(tmp_path, *options, "--resume"))
    assert_same_run(tmp_path, whole_run(*options))


def test_the_real_network_stopped_by_sigterm_goes_on_as_if_nothing_had_happened(tmp_path):
    whole, halves = [arguments(tmp_path / name, "--epochs", 2) for name in ("whole", "halves")]
    succeed(whole, network=None)
    process = Process(halves, network=None)
    process.wait_for(" 1/2 ")
    process.kill(signal.SIGTERM)
    assert process.wait() == 143, process.text
    assert "Continuing after epoch 1" in succeed([*halves, "--resume"], network=None)
    assert_same_run(tmp_path / "halves", tmp_path / "whole")


def test_learning_rate_patience_and_the_best_epoch_go_on(here, tmp_path):
    """With patience 0 the rate falls after every epoch that is not better. Every epoch has an order of its own."""
    def watch(script):
        inner = script.train_one_epoch
        script.train_one_epoch = lambda model, loader, *args, **options: (
            epochs.append(next(iter(loader.batch_sampler))[0][0]), inner(model, loader, *args, **options))[1]

    options = ["--lr", 1e-4, "--warmup-steps", 0, "--plateau-patience", 0, "--plateau-factor", 0.5,
               "--early-stopping-patience", 4, "--epochs"]
    epochs, faults = [], (constant_dice, watch)
    assert here(alone(tmp_path, *options, 1), *faults)[0] == 0
    first = read(tmp_path, BEST)
    assert here(alone(tmp_path, *options, 3, "--resume"), *faults)[0] == 0
    code, text = here(alone(tmp_path, *options, 9, "--resume"), *faults)
    assert code == 0 and "Stopped early" in text  # epochs 2 to 5 were no better than epoch 1: 4, over the resumes
    assert epochs == [0, 1, 2, 3, 4]
    assert [row["lr"] for row in read(tmp_path)["history"]] == pytest.approx([1e-4, 1e-4, 5e-5, 2.5e-5, 1.25e-5])
    metadata, problem = script.read_metadata(tmp_path / BEST)
    assert problem == "" and metadata["best_epoch"] == 1 and background.differences(read(tmp_path, BEST), first) == []


def test_more_epochs_after_stopping_early(here, tmp_path):
    """It goes on, and stops by the same rule: after one epoch that is not better. The same EPOCHS change nothing."""
    for more, rows in ((["--epochs", 5], 2), (["--epochs", 6, "--resume"], 3), (["--epochs", 6, "--resume"], 3)):
        code, text = here(alone(tmp_path, "--early-stopping-patience", 1, *more), constant_dice)
        assert code == 0 and "Stopped early" in text and len(table_rows(tmp_path)) == 1 + rows


def test_a_finished_run_says_so_and_keeps_its_weights(here, finished):
    code, text = here(alone(finished, "--resume"))
    assert code == 0 and "All 4 epochs are done; raise EPOCHS" in text
    assert_same_run(finished, whole_run())


# --- what may change, and what may not

CHANGES = {
    "IMG_SIZE": [96], "MEAN": [0.5, 0.5, 0.5], "STD": [0.5, 0.5, 0.5], "CATEGORIES": ["tumor"],
    "UNANNOTATED": ["skip"], "GREY_PERCENTILES": [0.5, 99.5], "ENCODER": ["resnet34"],
    "ARCHITECTURE": ["unet"], "LOSS": ["focal_tversky"], "SEED": [7], "LR": [0.5], "LR_FROM_SCRATCH": [0.5],
    "WARMUP_STEPS": [3], "EMA_EPOCHS": [0.7], "WEIGHT_DECAY": [0.5], "GRAD_CLIP": [9], "PLATEAU_FACTOR": [0.3],
    "PLATEAU_PATIENCE": [3], "PATIENT_PATTERN": [r"(\d)"], "VALID_SHARE": [0.3], "FOLD": [1],
    "TEST_SHARE": [0.1]}


def flags(name):
    return "--" + name.lower().replace("_", "-"), *CHANGES[name]


@pytest.mark.parametrize("name", CHANGES)
def test_a_contradictory_setting_is_named(name, here, finished):
    saved = read(finished)["settings"]["used"][name]
    now = tuple(CHANGES[name]) if isinstance(saved, tuple) else CHANGES[name][0]
    message = refused(here, finished, *flags(name))
    assert f"{name}: saved {saved!r}, now {now!r}" in message and "What may change on --resume: EPOCHS" in message
    assert message.count(": saved ") == 1 + (name == "LR")  # which holds for all weights


def test_all_contradictory_settings_are_named_together(here, finished):
    message = refused(here, finished, *flags("IMG_SIZE"), *flags("SEED"), "--batch-size", 4, "--accumulation-steps", 3)
    assert all(words in message for words in ("IMG_SIZE: ", "SEED: ", "ACCUMULATION_STEPS): saved 2, now 12"))


def test_what_may_change_may_change(finished, tmp_path):
    """One more epoch on moved data, without the test images, which do not train, and what the first start needed."""
    assert {*CHANGES, *script.RESUME_MAY_CHANGE} == set(script.CONSTANTS)
    moved = shutil.copytree(background.shared_data(), tmp_path / "moved")
    shutil.rmtree(moved / "test")
    succeed(alone(finished, "--resume", "--epochs", 5, "--batch-size", 1, "--accumulation-steps", 2, "--cache-gb", 0,
                  "--early-stopping-patience", 9, "--deterministic", "--save-seconds", 5, "--precision", "bfloat16",
                  "--encoder-weights", "imagenet", "--init-weights", tmp_path / "gone.pth", "--skip-bad-images",
                  "--test-time-augmentation", data=moved))
    assert len(table_rows(finished)) == 1 + 5


@pytest.mark.parametrize("split, change", [
    ("train", None), ("train", lambda coco: coco["images"].pop()), ("train", lambda coco: coco["images"].reverse()),
    ("valid", lambda coco: coco["annotations"][0]["segmentation"][0].__setitem__(0, 9)),
], ids=["a pixel", "one image less", "another order", "a polygon"])
def test_changed_data_is_refused(split, change, here, finished, tmp_path):
    data = shutil.copytree(background.shared_data(), tmp_path / "changed")
    image, annotations = data / split / "slice_0.png", data / split / script.ANNOTATION_FILE
    if change:
        coco = json.loads(annotations.read_text())
        change(coco)
        annotations.write_text(json.dumps(coco))
    else:
        pixels = script.read_image(image)
        pixels[0, 0] ^= 255
        script.write_image(image, pixels)
    assert "not those of the saved run" in refused(here, finished, "--epochs", 5, data=data)


# --- what a resumed run takes from where


def used(folder):
    return read(folder)["settings"]["used"]


def test_resume_and_the_folder_are_enough(here, finished):
    """From another working directory, too: DATA_DIR is saved as an absolute path."""
    code, text = here(["--resume", "--output-dir", finished])
    assert code == 0 and "All 4 epochs are done" in text and "IMG_SIZE = 64 (file: 256)" in text
    assert_same_run(finished, whole_run())
    assert used(finished)["OUTPUT_DIR"] == str(finished)
    code, text = here(["--resume", "--output-dir", finished, "--epochs", 5])
    assert code == 0 and "  5/5 " in text and used(finished)["IMG_SIZE"] == 64


def test_a_data_folder_that_was_named_relative_to_the_working_directory_is_found(here, tmp_path, monkeypatch):
    monkeypatch.chdir(background.shared_data().parent)
    assert here(alone(tmp_path, "--epochs", 1, data="data"))[0] == 0
    monkeypatch.chdir(tmp_path)
    assert here(["--resume", "--output-dir", ".", "--epochs", 2])[0] == 0
    assert used(tmp_path)["DATA_DIR"] == str(background.shared_data())


def test_an_edited_constant_counts_and_an_edited_one_that_must_not_change_is_refused(here, finished, monkeypatch):
    monkeypatch.setattr(script, "EPOCHS", 5)
    monkeypatch.setattr(script, "NUM_WORKERS", 1)
    code, text = here(["--resume", "--output-dir", finished])
    assert code == 0 and "  5/5 " in text and used(finished)["NUM_WORKERS"] == 1
    monkeypatch.setattr(script, "SEED", 7)
    monkeypatch.setattr(script, "LOSS", "focal_tversky")
    code, text = here(["--resume", "--output-dir", finished])
    assert code == 2 and re.findall("^  - (.*)", text, re.M) == ["LOSS: saved 'dice_bce', now 'focal_tversky'",
                                                                 "SEED: saved 42, now 7"]
    # A flag goes before the file.
    assert here(["--resume", "--output-dir", finished, "--seed", 42, "--loss", "dice_bce"])[0] == 0


def safer(folder, **changes):
    """As after a safer setting."""
    state = read(folder)
    state["settings"]["used"] |= changes
    replace_file(folder / LAST, state)


@pytest.mark.parametrize("words, expected", [
    ([], (1, 2, "bfloat16")), (["--batch-size", 2, "--precision", "float32"], (2, 1, "float32")),  # the old command
    (["--precision", "auto"], (1, 2, "auto")), (["--batch-size", 1], (1, 2, "bfloat16")),
    (["--batch-size", 2, "--accumulation-steps", 1], (2, 1, "bfloat16")), (["--batch-size", 4], "saved 2, now 8"),
    (["--batch-size", 0], "saved 2, now 0"), (["--accumulation-steps", 4], "saved 2, now 4")])
def test_after_a_safer_setting_it_stays_unless_the_user_asks_for_another(words, expected, here, finished):
    safer(finished, BATCH_SIZE=1, ACCUMULATION_STEPS=2, PRECISION="bfloat16")
    code, text = here(["--resume", "--output-dir", finished, "--epochs", 5, *words])
    if isinstance(expected, str):
        assert code == 2 and f"images per step (BATCH_SIZE * ACCUMULATION_STEPS): {expected}" in text
    else:
        assert code == 0 and tuple(used(finished)[name] for name in (
            "BATCH_SIZE", "ACCUMULATION_STEPS", "PRECISION")) == expected


def test_a_script_that_lies_elsewhere_is_no_edit_of_its_folders(here, finished, monkeypatch):
    monkeypatch.setattr(script, "DATA_DIR", str(finished))
    monkeypatch.setattr(script, "__file__", str(finished / "script.py"))
    (finished / "script.py").write_bytes(Path(background.SCRIPT).read_bytes())
    assert here(["--resume", "--output-dir", finished, "--epochs", 5])[0] == 0
    assert used(finished)["DATA_DIR"] == str(background.shared_data())


def test_a_project_that_was_moved_finds_its_data_beside_the_script(here, tmp_path, monkeypatch):
    def script_in(folder):
        monkeypatch.setattr(script, "__file__", str(folder / "script.py"))
        monkeypatch.setattr(script, "DATA_DIR", str(folder))

    shutil.copytree(background.shared_data(), tmp_path / "old")
    (tmp_path / "old" / "script.py").write_bytes(Path(background.SCRIPT).read_bytes())
    script_in(tmp_path / "old")
    words = alone(tmp_path / "old" / "out", "--epochs", 1)
    del words[words.index("--data-dir"):words.index("--data-dir") + 2]
    assert here(words)[0] == 0
    os.rename(tmp_path / "old", tmp_path / "new")
    script_in(tmp_path / "new")
    code, text = here(["--resume", "--output-dir", tmp_path / "new" / "out", "--epochs", 2])
    assert code == 0 and f"of the run, {tmp_path / 'old'}, is not there. Used instead: {tmp_path / 'new'}" in text
    assert used(tmp_path / "new" / "out")["DATA_DIR"] == str(tmp_path / "new")


def test_a_path_in_place_of_its_text_can_be_resumed(here, tmp_path, monkeypatch):
    """Somebody has edited DATA_DIR = Path(...)."""
    monkeypatch.setattr(script, "DATA_DIR", background.shared_data())
    words = alone(tmp_path, "--epochs", 1)
    del words[words.index("--data-dir"):words.index("--data-dir") + 2]
    assert here(words)[0] == 0 and here(["--resume", "--output-dir", tmp_path, "--epochs", 2])[0] == 0


def test_a_resumed_run_keeps_threshold_and_scores_of_a_best_model_that_stays(here, finished, monkeypatch):
    """Whatever ends it before its next evaluation."""
    replace_file(finished / JSON, json.dumps(script.read_metadata(finished / BEST)[0] | {"threshold": 0.35}).encode())
    before = script.read_metadata(finished / BEST)[0]
    monkeypatch.setattr(script, "finish_run", raising(MemoryError))
    assert here(alone(finished, "--resume", "--epochs", 5), partial(constant_dice, dice=0.0))[0] == 1
    metadata, problem = script.read_metadata(finished / BEST)
    assert problem == "" and all(metadata[name] == before[name] for name in ("threshold", "test_metrics", "best_epoch"))


def test_a_device_that_was_asked_for_stays(here, finished):
    safer(finished, DEVICE="cuda:5")
    code, text = here(["--resume", "--output-dir", finished])
    assert code == 2 and "DEVICE is 'cuda:5'" in text


def test_a_constant_that_the_state_lacks_takes_its_default(here, finished):
    """It was added since; a flag for it that says otherwise is a change."""
    state = read(finished)
    for kind in ("file", "used"):
        del state["settings"][kind]["PLATEAU_FACTOR"]
    replace_file(finished / LAST, state)
    assert here(["--resume", "--output-dir", finished, "--plateau-factor", 0.3])[0] == 2
    assert here(["--resume", "--output-dir", finished])[0] == 0 and used(finished)["PLATEAU_FACTOR"] == 0.5


def test_one_learning_rate_for_all_weights_stays_one(here, tmp_path):
    assert here(alone(tmp_path, "--lr", 0.25, "--epochs", 1))[0] == 0
    for words in ([], ["--lr", 0.25]):
        assert here(["--resume", "--output-dir", tmp_path, *words])[0] == 0
        assert (used(tmp_path)["LR"], used(tmp_path)["LR_FROM_SCRATCH"]) == (0.25, 0.25)
    code, text = here(["--resume", "--output-dir", tmp_path, "--lr", 0.5])
    assert code == 2 and re.findall("^  - (LR\\w*)", text, re.M) == ["LR", "LR_FROM_SCRATCH"]


# --- states that are missing, damaged, or come from others


class Code:
    def __reduce__(self):  # prints when it is loaded
        return print, ("executed",)


@pytest.mark.parametrize("content", [
    None, b"", b"not a checkpoint", b"PK\3\4" + b"x" * 500, b"\x80\x02.", 0.01, 0.5, 0.999, [1, 2], {"state_dict": {}},
    {"settings": None, "optimizer": None, "epoch": None}, torch.ones(3), {1: 2},
    {"format": script.FORMAT, "settings": Code()},
], ids=["missing", "empty", "text", "half a zip", "half a pickle", "cut at 1 %", "cut at 50 %", "cut at 99.9 %", "list",
        "another trainer", "nearly", "tensor", "numbers", "code"])
def test_a_damaged_or_foreign_state_gives_a_message(content, here, finished):
    if isinstance(content, float):
        whole = (finished / LAST).read_bytes()
        content = whole[:int(len(whole) * content)]
    replace_file(finished / LAST, content)
    message = refused(here, finished)
    assert LAST in message and "executed" not in message and ("nothing to resume" in message) == (content is None)


@pytest.mark.parametrize("average", [True, False], ids=["format 3", "format 2"])
def test_a_state_of_an_earlier_version_is_refused_and_is_a_start_like_its_best_model(average, here, finished, tmp_path):
    state, ema = read(finished), read(finished)["ema"]
    for name in ("ema", "best_weights", "epochs_without_improvement", "format"):
        del state[name]
    state |= {"settings": state["settings"]["used"], "waited": 0} | ({"average": ema, "format": 3} if average else {})
    replace_file(finished / LAST, state)
    message = refused(here, finished)
    assert "another version" in message
    for number, path in enumerate([BEST] + [LAST] * average):
        words = shlex.split(message[message.index("--init-weights"):].replace(BEST, path))
        code, text = here(alone(tmp_path / str(number), "--epochs", 1, *words))
        assert code == 0 and f"(weights: checkpoint {finished / path})" in text


def test_a_best_model_of_the_version_before_loads(finished, monkeypatch, capfd):
    metadata = json.loads((finished / JSON).read_text())
    for name in ("model_class", "preprocess_digest", "test_time_augmentation"):
        del metadata[name]
    metadata |= {"encoder": "resnet18", "sha256_before": None, "threshold": 0.35, "img_size": 96}
    replace_file(finished / JSON, json.dumps(metadata).encode())
    asked = []
    monkeypatch.setattr(script, "build_model", lambda *names: (asked.append(names), tiny_build_model())[1])
    monkeypatch.setattr(script, "ARCHITECTURE", "unet")  # an edited constant is not what the old model was
    model = script.load_model(finished / BEST, "cpu")
    assert asked == [("resnet18", None, "unetplusplus")] and capfd.readouterr().err == ""
    assert (model.prediction_settings["threshold"], model.prediction_settings["img_size"]) == (0.35, 96)
    assert script.predict_mask(model, np.zeros((50, 70, 3), np.uint8)).shape == (50, 70)


# --- an earlier run


def test_an_earlier_run_is_kept_together_and_can_be_gone_on_with(here, finished):
    earlier, saved = contents(finished), (finished / LAST).stat().st_mtime
    code, text = here(alone(finished, "--epochs", 1, "--seed", 5))
    assert code == 0
    (kept,) = finished.glob("earlier_run_*")
    assert contents(kept) == earlier and f"is now in {kept}." in text
    assert len(table_rows(finished)) == 1 + 1 and read(finished)["settings"]["used"]["SEED"] == 5
    words = shlex.split(re.search("start the script with: (.*)", text)[1])
    code, text = here([*words, "--epochs", 5])
    assert code == 0 and "Continuing after epoch 4" in text
    assert len(table_rows(kept)) == 1 + 5 and len(table_rows(finished)) == 1 + 1
    os.utime(finished / LAST, (saved, saved))  # the name tells the time
    assert here(alone(finished, "--epochs", 1, "--seed", 6))[0] == 0
    assert sorted(read(folder)["settings"]["used"]["SEED"] for folder in finished.glob("earlier_run_*")) == [5, 42]


def test_a_file_that_cannot_be_moved_leaves_the_earlier_run_whole(here, finished):
    """On Windows, another program has it open."""
    def refuse(script, inner=os.replace):
        def replace(source, target):
            if "earlier_run" in str(target) and Path(target).name == SCORES:
                raise PermissionError(errno.EACCES, "in use", str(source))
            inner(source, target)
        os.replace = replace

    earlier = contents(finished)
    code, text = here(alone(finished, "--seed", 5), refuse)
    assert code == 1 and "cannot move the earlier run" in text and "Close the program" in text
    assert contents(finished) == earlier and not list(finished.glob("earlier_run_*"))


def test_a_start_that_is_refused_leaves_the_earlier_run_where_it_is(here, finished, tmp_path):
    earlier = contents(finished)
    code, text = here(alone(finished, "--seed", 5, data=write_data(tmp_path / "data", 0, 2, 0)))
    assert code == 2 and "folder not found" in text and contents(finished) == earlier


def test_a_run_may_start_from_the_best_model_of_the_run_that_it_archives(here, finished):
    code, text = here(alone(finished, "--epochs", 1, "--init-weights", finished / BEST))
    assert code == 0 and f"(weights: checkpoint {finished / BEST})" in text and "is now in" in text


@pytest.mark.parametrize("name", [BEST, LAST])
def test_a_run_sees_grey_levels_as_the_model_that_it_starts_from(name, here, tmp_path):
    own = ["--mean", 0.4, 0.5, 0.6, "--std", 0.2, 0.2, 0.3, "--grey-percentiles", 1, 99]
    assert here(alone(tmp_path / "one", "--epochs", 1, *own))[0] == 0
    argv = ["--epochs", 1, "--init-weights", tmp_path / "one" / name]
    code, text = here(alone(tmp_path / "two", *argv, "--std", 0.5, 0.5, 0.5))
    assert code == 0 and "MEAN = (0.4, 0.5, 0.6), GREY_PERCENTILES = (1, 99)\n" in text
    found = used(tmp_path / "two")
    assert [found[each] for each in ("MEAN", "STD", "GREY_PERCENTILES")] == [(0.4, 0.5, 0.6), (0.5,) * 3, (1, 99)]
    code, text = here(alone(tmp_path / "three", "--epochs", 1, "--init-weights", tmp_path / "two" / name, "--mean", 0.4,
                            0.5, 0.6, "--std", 0.5, 0.5, 0.5, "--grey-percentiles", 1, 99))
    assert code == 0 and "As the model was trained" not in text


def test_an_earlier_run_is_moved_before_the_first_write(here, finished, monkeypatch):
    """So a first state that cannot be written finds it complete in its new folder."""
    earlier = contents(finished)
    monkeypatch.setattr(os, "fsync", raising(OSError(errno.ENOSPC, "No space left on device")))
    code, text = here(alone(finished, "--seed", 5))
    assert code == 1 and f"cannot write {finished / LAST}" in text and "Traceback" not in text
    assert HOW_TO_RESUME not in text and "Then start again." in text
    (kept,) = finished.glob("earlier_run_*")
    assert contents(kept) == earlier and set(finished.iterdir()) - {finished / LOCK} == {kept}


@pytest.mark.parametrize("name", [BEST, LAST])
def test_killed_while_an_earlier_run_is_moved_nothing_is_lost(name, tmp_path):
    folder = copy_run(whole_run(faults=(rising_dice,)), tmp_path / "out")
    earlier = contents(folder)
    code, text = run(arguments(folder, "--epochs", 1, "--seed", 5), partial(background.kill_at, name=name))
    assert code == -9, text
    assert sorted(contents(folder).values()) == sorted(earlier.values())
    succeed(arguments(folder, "--resume"), rising_dice)  # the state is moved last
    assert_same_run(folder, whole_run(faults=(rising_dice,)))


# --- saving


class Clock:
    """Instead of time.perf_counter(): it stands still, but for what takes() says."""

    def __init__(self, monkeypatch):
        self.now, self.patch = 0.0, monkeypatch
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)

    def takes(self, seconds, owner, name):
        """Each call of a function takes so long."""
        def call(*args, **options):
            self.now += seconds
            return inner(*args, **options)

        inner = getattr(owner, name)
        self.patch.setattr(owner, name, call)


@pytest.fixture
def written(monkeypatch):
    """Names of the files in the order in which they are put in place."""
    names = []

    def replace(source, target, inner=os.replace):
        names.append(Path(target).name)
        inner(source, target)

    monkeypatch.setattr(os, "replace", replace)
    return names


@pytest.mark.parametrize("fault, second", [(rising_dice, [LAST, BEST, JSON, TABLE, PLOT]),
                                           (constant_dice, [LAST, TABLE, PLOT])],
                         ids=["a better epoch", "an epoch that is not better"])
def test_what_is_written_in_which_order(fault, second, here, tmp_path, written):
    """A resumed run finds its best model, in the same bytes, and lets it be."""
    assert here(alone(tmp_path, "--epochs", 2), fault)[0] == 0
    assert written == [SAMPLES, LAST, LAST, BEST, JSON, TABLE, PLOT, *second, VALID, SCORES, CASES, REPORT, JSON]
    written.clear()
    assert here(alone(tmp_path, "--epochs", 3, "--resume"), fault)[0] == 0
    assert written == [LAST, TABLE, PLOT, *second, VALID, SCORES, CASES, REPORT, JSON]


@pytest.mark.parametrize("save_seconds, epochs", [(0, [0, 1, 2, 3, 4, 5]), (6, [0, 1, 2, 3, 4, 5]), (7, [0, 2, 4, 5]),
                                                  (12, [0, 2, 4, 5]), (13, [0, 3, 5]), (1000, [0, 5])])
def test_the_run_is_saved_when_the_seconds_have_passed_and_after_the_last_epoch(save_seconds, epochs, here, tmp_path,
                                                                               monkeypatch):
    """An epoch takes 6 seconds; the time of a save, 30 seconds, does not count."""
    clock, saved = Clock(monkeypatch), []
    clock.takes(4, script, "train_one_epoch")
    clock.takes(2, script, "validate")
    clock.takes(30, script, "save_run")

    def save_run(trainer, *rest, inner=script.save_run):
        saved.append(trainer.epoch)
        inner(trainer, *rest)

    monkeypatch.setattr(script, "save_run", save_run)
    assert here(alone(tmp_path, "--epochs", 5, "--save-seconds", save_seconds))[0] == 0
    assert saved == epochs


def test_early_stopping_saves_too(here, tmp_path):
    argv = alone(tmp_path, "--epochs", 9, "--early-stopping-patience", 2, "--save-seconds", 1000)
    code, text = here(argv, constant_dice)
    assert code == 0 and "Stopped early" in text and read(tmp_path)["epoch"] == 3
    assert script.read_metadata(tmp_path / BEST)[0]["best_epoch"] == 1


def test_the_best_weights_are_those_of_the_best_epoch_though_they_are_saved_later(here, tmp_path):
    """Of the first of three epochs, after which nothing is written."""
    assert here(alone(tmp_path / "one", "--epochs", 1), constant_dice)[0] == 0
    assert here(alone(tmp_path / "three", "--epochs", 3, "--save-seconds", 1000), constant_dice)[0] == 0
    assert background.differences(*(read(tmp_path / name, BEST) for name in ("one", "three"))) == []
    rows = [script.read_metadata(tmp_path / name / BEST)[0]["valid_metrics_at_img_size"] for name in ("one", "three")]
    assert background.differences(*rows) == []


def test_every_file_is_flushed_before_it_is_renamed(tmp_path, monkeypatch):
    """A rename that is refused is tried again: on Windows, virus scanners and viewers hold files open for a moment."""
    calls, refusals = [], [PermissionError(errno.EACCES, "in use")] * 5

    def fsync(number, inner=os.fsync):
        calls.append(("flushed", os.readlink(f"/proc/self/fd/{number}")))
        inner(number)

    def replace(source, target, inner=os.replace):
        if refusals:
            raise refusals.pop()
        calls.append(("renamed", str(source)))
        inner(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    monkeypatch.setattr(time, "sleep", lambda _: None)
    script.write_file(tmp_path / "a.pth", lambda file: torch.save({"a": torch.ones(2)}, file), required=True)
    script.write_image(tmp_path / "a.png", np.zeros((4, 4), np.uint8))
    script.write_table(tmp_path / "a.csv", [{"a": 1}])
    assert calls == [(kind, str(tmp_path / f".a.{suffix}.tmp")) for suffix in ("pth", "png", "csv")
                     for kind in ("flushed", "renamed")]


def test_what_arrives_while_a_file_is_written_is_not_taken_for_a_full_disk(tmp_path):
    error = RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed.")
    with pytest.raises(RuntimeError, match="worker"):
        script.write_file(tmp_path / "a", raising(error))
    assert [*tmp_path.iterdir()] == []


def test_the_seconds_of_the_rows_add_up_to_the_time_of_the_run(here, tmp_path, monkeypatch):
    clock = Clock(monkeypatch)
    clock.takes(4, script, "train_one_epoch")
    clock.takes(2, script, "validate")
    clock.takes(40, script, "save_run")
    code, text = here(alone(tmp_path, "--epochs", 3))
    rows = read(tmp_path)["history"]
    assert code == 0 and "46.0s" in text and [row["seconds"] for row in rows] == [6, 46, 46]
    assert [row["images_per_second"] for row in rows] == [2, 2, 2]  # of training alone: 8 images


# --- SIGKILL

CRASHES = [  # on one run: at the rename of which file, and when; then what is found: the epoch of the state, and that
    # of the best model that can be used (None: not before --resume has mended it). A resumed run begins with a save.
    (LAST, "before", None, None), (LAST, "after", 0, None), (BEST, "before", 1, None), (JSON, "before", 1, None),
    (TABLE, "before", 1, 1), (PLOT, "before", 1, 1), (LAST, "after", 1, 1), (SCORES, "before", 7, 7),
    (CASES, "after", 7, 7)]


def test_killed_around_every_rename_nothing_is_lost_and_the_result_is_the_same(tmp_path):
    """A run of 7 epochs, killed before a file is put in place, which is also after the one before."""
    found, whole = [], whole_run("--epochs", 7, faults=(rising_dice,))
    for name, when, *_ in CRASHES:
        code, text = run(alone(tmp_path, "--epochs", 7, *["--resume"] * (tmp_path / LAST).is_file()), rising_dice,
                         partial(background.kill_at, name=name, when=when))
        assert code == -9, (name, when, text)
        state = read(tmp_path)["epoch"] if (tmp_path / LAST).is_file() else None
        best = script.read_metadata(tmp_path / BEST)[0]["best_epoch"] if background.load_best(tmp_path) == "" else None
        found.append((name, when, state, best))
    assert found == CRASHES
    assert "Continuing after epoch 7" in succeed(alone(tmp_path, "--epochs", 7, "--resume"), rising_dice)
    assert_same_run(tmp_path, whole)
    assert background.leftovers(tmp_path) == [] and (tmp_path / PLOT).is_file()


def kill_later(script, name, time):
    """Killed before a file is put in place for the second, third, ... time."""
    inner, count = os.replace, []
    background.kill_at(script, name)
    kill = os.replace

    def replace(source, target):
        count.extend([1] * (os.path.basename(target) == name))
        (kill if len(count) == time else inner)(source, target)

    os.replace = replace


@pytest.mark.parametrize("name, time", [(LAST, 3), (BEST, 2), (JSON, 2), (TABLE, 2)])
def test_killed_between_two_files_of_a_later_save(name, time, tmp_path):
    """That of the second epoch, when there is a best model of the first."""
    code, text = run(alone(tmp_path), rising_dice, partial(kill_later, name=name, time=time))
    assert code == -9 and "  1/4 " in text and "  2/4 " not in text
    succeed(alone(tmp_path, "--resume"), rising_dice)
    assert_same_run(tmp_path, whole_run(faults=(rising_dice,)))


@pytest.mark.parametrize("kills, seed", [(3, 1), *[pytest.param(5, seed, marks=pytest.mark.soak)
                                                   for seed in range(100, 105)]])
def test_killed_at_random_moments_no_state_is_lost_and_the_result_is_the_same(kills, seed, tmp_path):
    rng, epochs = random.Random(seed), [0]
    for number in range(kills + 1):
        process = Process(arguments(tmp_path, "--epochs", 20, *["--resume"] * (tmp_path / LAST).is_file()))
        if number < kills:
            time.sleep(rng.uniform(0.2, 2))
            process.kill(group=rng.random() < 0.5)
        assert process.wait() in (-9, 0), process.text
        epochs += [read(tmp_path)["epoch"]] if (tmp_path / LAST).is_file() else []
    assert epochs == sorted(epochs) and background.leftovers(tmp_path) == [] and background.load_best(tmp_path) == ""
    assert_same_run(tmp_path, whole_run("--epochs", 20))


@pytest.mark.parametrize("file, content", [
    (JSON, b"{"), (JSON, b"[]"), (JSON, None), (BEST, None), (BEST, b"not a checkpoint"), (TABLE, None)],
    ids=lambda value: {None: "missing"}.get(value, str(value)))
def test_resuming_mends_what_a_kill_has_left_beside_the_state(file, content, here, tmp_path):
    folder = copy_run(whole_run(faults=(rising_dice,)), tmp_path / "out")
    replace_file(folder / file, content)
    assert (background.load_best(folder) == "") == (file == TABLE)
    assert here(alone(folder, "--resume"), rising_dice)[0] == 0
    assert background.load_best(folder) == "" and script.read_metadata(folder / BEST)[0]["best_epoch"] == 4
    assert_same_run(folder, whole_run(faults=(rising_dice,)))


def test_the_best_model_is_mended_where_it_is_not_that_of_the_last_epoch(here, tmp_path):
    assert here(alone(tmp_path, "--epochs", 3), constant_dice)[0] == 0
    best = read(tmp_path, BEST)
    for name in (BEST, JSON):
        replace_file(tmp_path / name, None)
    assert here(alone(tmp_path, "--resume", "--epochs", 3))[0] == 0
    metadata, problem = script.read_metadata(tmp_path / BEST)
    assert problem == "" and metadata["best_epoch"] == 1 and background.differences(read(tmp_path, BEST), best) == []


def test_a_new_best_model_does_not_keep_the_scores_of_the_old_one(here, finished, monkeypatch):
    """Whatever ends the run before its evaluation, the JSON must not show the old threshold and test scores."""
    assert "test_metrics" in json.loads((finished / JSON).read_text())
    monkeypatch.setattr(script, "finish_run", raising(MemoryError))
    assert here(alone(finished, "--resume", "--epochs", 5), partial(constant_dice, dice=0.99))[0] == 1
    metadata, problem = script.read_metadata(finished / BEST)
    assert problem == "" and metadata["best_epoch"] == 5
    assert "test_metrics" not in metadata and "valid_metrics" not in metadata and metadata["threshold"] == 0.5


@pytest.mark.parametrize("end, words", [
    (partial(before, act=lambda: send(signal.SIGTERM), time=3), ["--epochs", 2]),  # stopped in the third epoch
    (partial(before, act=raising(MemoryError), name="finish_run"), []),  # as a kill between training and evaluation
    (lambda script: None, ["--test-time-augmentation"])])  # finished, but to be predicted otherwise
def test_resume_writes_threshold_and_scores_that_are_not_there_yet(end, words, here, tmp_path):
    code, _ = here(alone(tmp_path, "--epochs", 4), end)
    before = script.read_metadata(tmp_path / BEST)[0]
    assert ("valid_metrics" in before) == (code == 0)
    assert here(alone(tmp_path, "--resume", *words))[0] == 0
    after, epochs = script.read_metadata(tmp_path / BEST)[0], len(table_rows(tmp_path)) - 1
    assert after["valid_metrics"]["images"] and after["test_metrics"]["images"] and epochs == (words + [4, 4])[1]
    assert after["test_time_augmentation"] == (code == 0) and after["sha256"] == before["sha256"]


# --- Ctrl-C and SIGTERM


@pytest.mark.parametrize("signum, group", [(signal.SIGINT, True), (signal.SIGTERM, False)],
                         ids=["Ctrl-C in a terminal", "SIGTERM to the process"])
def test_a_signal_ends_the_run_in_order(signum, group, tmp_path):
    process = Process(arguments(tmp_path, "--epochs", 300))
    process.wait_for("  2/300 ")
    workers = process.workers()
    assert len(workers) == min(2, script.available_cores())
    process.kill(signum, group)
    assert process.wait() == 128 + signum and "Traceback" not in process.text
    assert [pid for pid in workers if Path(f"/proc/{pid}").exists()] == []
    assert "stopping after this step" in process.text  # by the handler: nothing is interrupted in the middle
    assert process.text.endswith(f"\nStopped. {HOW_TO_RESUME}\n")
    assert len(table_rows(tmp_path)) == 1 + read(tmp_path)["epoch"] >= 1 + 2
    assert background.load_best(tmp_path) == "" and background.leftovers(tmp_path) == []


def hang(script, place):
    def forever(*_, **__):
        print("hanging", flush=True)
        time.sleep(1000)

    if place == "step":
        torch.nn.utils.clip_grad_norm_ = forever
    else:
        inner, calls = os.fsync, []
        os.fsync = lambda number: (calls.append(1), forever() if len(calls) == place else inner(number))[1]


@pytest.mark.parametrize("place", ["step", 2, 3])
def test_a_second_signal_ends_what_hangs(place, tmp_path):
    process = Process(alone(tmp_path), partial(hang, place=place))
    process.wait_for("hanging")
    process.kill(signal.SIGINT)
    process.wait_for("again: at once")
    process.kill(signal.SIGINT)
    assert process.wait() == 130 and "Traceback" not in process.text
    assert (tmp_path / LAST).is_file() == (HOW_TO_RESUME in process.text) == (place != 2)


def test_a_signal_while_images_are_read_ends_at_once(here, tmp_path, monkeypatch):
    monkeypatch.setattr(script, "load_sample", lambda *_: send(signal.SIGTERM))
    code, text = here(alone(tmp_path))
    assert code == 143 and "Traceback" not in text and HOW_TO_RESUME not in text and contents(tmp_path) == {}


def test_a_stopped_evaluation_does_not_promise_to_go_on(here, finished, monkeypatch):
    earlier = contents(finished)
    first = iter([signal.SIGINT])  # of two threads; a second signal would end the run at once, wherever it is

    def predict(model, image, height, width):
        for signum in first:
            send(signum)
        return np.zeros((height, width), np.float32)

    monkeypatch.setattr(script, "predict_probability", predict)
    code, text = here(alone(finished, "--evaluate"))
    assert code == 130 and "Stopped." in text and "--resume" not in text and "Traceback" not in text
    assert contents(finished) == earlier


# --- disks


class FullFile(io.FileIO):
    def write(self, _):
        raise OSError(errno.ENOSPC, "No space left on device")


def cannot_write(script, name, epoch, how):
    """From an epoch on, a file cannot be written: the disk is full, or read-only, or the rename is refused."""
    epochs, save, replace = [], script.save_run, os.replace

    def hit(path, when):
        return how == when and Path(path).name == f".{name}.tmp" and epochs and epochs[-1] >= epoch

    def open_file(path, *mode):
        if hit(path, "read-only"):
            raise OSError(errno.EROFS, "Read-only file system", str(path))
        return io.BufferedWriter(FullFile(path, "w")) if hit(path, "full") else open(path, *mode)

    def refused_replace(source, target):
        if hit(source, "rename"):
            raise PermissionError(errno.EACCES, "Permission denied", str(source))
        replace(source, target)

    script.save_run = lambda trainer, *rest: (epochs.append(trainer.epoch), save(trainer, *rest))
    script.open, os.replace, time.sleep = open_file, refused_replace, lambda _: None


@pytest.mark.parametrize("name, epoch, how", [(LAST, 2, "full"), (BEST, 2, "read-only"), (JSON, 2, "rename"),
                                              (JSON, 1, "full"), (LAST, 4, "rename")])
def test_a_checkpoint_that_cannot_be_written_stops_the_run(name, epoch, how, here, tmp_path):
    code, text = here(alone(tmp_path), rising_dice, partial(cannot_write, name=name, epoch=epoch, how=how))
    assert code == 1 and f"cannot write {tmp_path / name}: " in text and HOW_TO_RESUME in text
    assert "Traceback" not in text
    assert f"  {epoch - 1}/4 " in text or epoch == 1
    assert f"  {epoch}/4 " not in text and "Threshold" not in text
    assert background.leftovers(tmp_path) == []
    assert read(tmp_path)["epoch"] == (epoch - 1 if name == LAST else epoch)
    assert here(alone(tmp_path, "--resume"), rising_dice)[0] == 0
    assert_same_run(tmp_path, whole_run(faults=(rising_dice,)))


@pytest.mark.parametrize("folder", ["/proc", "/proc/new", "/dev/null"])
def test_an_output_folder_that_takes_no_files_is_refused(folder, here):
    code, text = here(alone(folder))
    assert code == 2 and folder in text and "--output-dir" in text and "Traceback" not in text


def test_tables_and_pictures_that_cannot_be_written_only_warn(here, tmp_path):
    names = [SAMPLES, TABLE, PLOT, SCORES, CASES, REPORT]
    for name in names:
        (tmp_path / name).mkdir()  # a folder is in its place
    code, text = here(alone(tmp_path, "--epochs", 1))
    assert code == 0 and "Traceback" not in text and background.load_best(tmp_path) == ""
    assert [name for name in names if f"cannot write {tmp_path / name}" not in text] == []


def unprintable(script, kind):
    """A log on a full disk; `... | head`."""
    reader, writer = os.pipe()
    os.close(reader)
    sys.stdout = sys.stderr = open("/dev/full" if kind == "full disk" else writer, "w")


@pytest.mark.parametrize("kind", ["full disk", "closed pipe"])
def test_output_that_cannot_be_printed_does_not_end_a_run(kind, tmp_path):
    succeed(arguments(tmp_path), partial(unprintable, kind=kind))
    assert_same_run(tmp_path, whole_run())


def small_shared_memory(script):
    """As in a container. Only this process sees the mount, which needs rights that not everybody has."""
    if ctypes.CDLL(None).unshare(0x20000) == 0:  # CLONE_NEWNS
        subprocess.run("mount --make-rprivate / && mount -t tmpfs -o size=64k tmpfs /dev/shm", shell=True)
    print("shared memory:", shutil.disk_usage("/dev/shm").total, flush=True)


def test_training_works_with_almost_no_shared_memory(tmp_path):
    text = succeed(arguments(tmp_path, "--epochs", 1, "--batch-size", 8), small_shared_memory)
    if "shared memory: 65536\n" not in text:
        pytest.skip("no right to mount")


def test_a_table_has_a_column_for_all_that_any_row_holds(tmp_path):
    """A metric that was added, or taken out, before a resume, or that no image of an epoch had."""
    script.write_table(tmp_path / "history.csv", [{"epoch": 1, "old": 7}, {"epoch": 2, "new": 0.5}], "utf-8")
    assert (tmp_path / "history.csv").read_text() == "epoch,new,old\n1,,7\n2,0.5,\n"


# --- one run at a time in a folder


def test_a_second_run_is_kept_out_and_the_first_goes_on(here, tmp_path):
    folder, image = tmp_path / "out", background.shared_data() / "test/slice_0.png"
    first = Process(arguments(folder, "--epochs", 3000), rising_dice)
    first.wait_for("  2/3000 ")  # the best model of the first epoch is there
    copy_run(whole_run(), tmp_path / "elsewhere")
    for command in (alone(folder), [*arguments(folder, "--epochs", 3000), "--resume"],
                    alone(folder, "--evaluate", "--checkpoint", tmp_path / "elsewhere" / BEST)):  # it writes tables
        code, text = here(command)
        assert code == 2 and "Traceback" not in text
        assert text[text.index("error: "):] == (
            f"error: another run is using {folder}; wait until it has ended, or choose another folder with OUTPUT_DIR "
            "(--output-dir)\n")
    assert list(folder.glob("earlier_run_*")) == []
    for command in (["--predict", image], ["--evaluate"]):  # elsewhere, without a lock of this folder
        assert here(alone(tmp_path / "other", *command, "--checkpoint", folder / BEST))[0] == 0
    first.kill(signal.SIGTERM)
    assert first.wait() == 143, first.text
    assert here(alone(folder, "--evaluate"))[0] == 0


def test_the_lock_dies_with_the_trainer_and_its_workers(here, tmp_path):
    """Workers inherit the lock, and end with their parent."""
    first = Process(arguments(tmp_path, "--epochs", 300))
    first.wait_for("  1/300 ")
    assert first.workers()
    first.kill()
    assert first.wait() == -9
    code, text = here(alone(tmp_path, "--resume", "--epochs", 1 + read(tmp_path)["epoch"]))
    assert code == 0, text


@pytest.mark.parametrize("name", ["ENOLCK", "ENOSYS", "EPERM", "EIO"])
def test_a_folder_without_locks_warns_and_the_run_goes_on(name, here, tmp_path):
    """Network drives. Never with a lock that is only a file: it would outlive a killed run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fcntl, "flock", raising(OSError(getattr(errno, name), "no locks")))
        code, text = here(alone(tmp_path, "--epochs", 1))
    assert code == 0 and text.count(f"cannot lock {tmp_path} (") == 1 and "no second run" in text
    assert here(alone(tmp_path, "--epochs", 2, "--resume"))[0] == 0  # no lock has stayed


def test_a_lock_file_that_cannot_be_opened_warns_and_the_run_goes_on(here, tmp_path):
    (tmp_path / LOCK).mkdir()
    code, text = here(alone(tmp_path, "--epochs", 1))
    assert code == 0 and text.count(f"cannot lock {tmp_path} (") == 1


# --- errors on the way


@pytest.mark.parametrize("owner, name, saved", [
    (script, "load_sample", False), (script, "build_model", False), (script.Trainer, "state", False),
    (script, "plot_samples", False), (script, "train_one_epoch", True), (script, "validate", True),
    (script, "predict_probability", True)])
@pytest.mark.parametrize("error", [MemoryError("no room"), ZeroDivisionError("odd")], ids=["memory", "unexpected"])
def test_an_error_anywhere_says_what_helps_and_how_to_resume(owner, name, saved, error, here, tmp_path):
    """Memory that runs out, here for a single image too; unexpected errors keep their trace."""
    code, text = here(alone(tmp_path, "--epochs", 2), lambda _: setattr(owner, name, raising(error)))
    expected, in_training = isinstance(error, MemoryError), name in ("train_one_epoch", "validate")
    assert code == 1 and (HOW_TO_RESUME in text) == (saved and not (expected and in_training))
    assert ("memory ran out (no room)" in text) == ("a smaller IMG_SIZE" in text) == expected
    assert ("Traceback" in text) == ("unexpected error" in text) == (not expected)


@pytest.mark.parametrize("batch_size, code", [(2, 0), (1, 1)])
def test_a_network_that_needs_two_images_for_its_batchnorm(batch_size, code, here, tmp_path):
    """As deeplabv3, pan and upernet, with an odd number of images: none is left alone."""
    def pooling(script):
        layers = [torch.nn.AdaptiveAvgPool2d(1), torch.nn.BatchNorm2d(3), torch.nn.Conv2d(3, 1, 1)]
        script.build_model = lambda *_: (torch.nn.Sequential(*layers, torch.nn.Upsample((64, 64))), "random")

    data = write_data(tmp_path / "data", 3, 1, 0, size=64)
    found, text = here(alone(tmp_path / "out", "--epochs", 1, "--batch-size", batch_size, data=data), pooling)
    assert found == code and "Traceback" not in text and ("two images for each process" in text) == (code == 1)


@pytest.mark.parametrize("words, message", [
    (["--architecture", "pan", "--encoder", "resnet18"], "cannot take images of IMG_SIZE = 64: "),
    ([], "returns [1, 2, ")])
def test_a_network_that_cannot_be_trained_is_refused_before_the_first_epoch(words, message, here, tmp_path):
    def network(script):
        two_classes = torch.nn.Conv2d(3, 2, 3, padding=1), "random"
        script.build_model = smp_build_model if words else lambda *_: two_classes

    code, text = here(alone(tmp_path, *words), network)
    assert code == 2 and message in text and "Traceback" not in text and "--resume" not in text
    assert not [*tmp_path.glob("*.pth")]


@pytest.mark.parametrize("encoder, unreached", [("efficientnet-b0", True), ("resnet18", False)])
def test_trying_a_network_finds_weights_without_a_gradient_and_leaves_no_trace(encoder, unreached):
    model = smp_build_model(encoder, None, "unet")[0]
    before = copy.deepcopy(model.state_dict())
    assert script.try_network(model, script.read_settings(["--img-size", "64"])[0]) == unreached
    assert background.differences(before, dict(model.state_dict())) == [] and model.training
    assert all(weight.grad is None for weight in model.parameters())


def without_compiler(script):
    importlib.import_module("torch._inductor.config")
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = tempfile.mkdtemp(dir=background.scratch())
    torch._inductor.config.cpp.cxx = ("/no/compiler",)
    torch._inductor.config.force_disable_caches = True  # of what another run has compiled


@pytest.mark.skipif(torch.__version__.startswith("2.6."), reason="it runs this tiny network without compiling it")
def test_compile_without_a_compiler_ends_with_a_sentence(tmp_path):
    code, text = run(alone(tmp_path, "--compile"), without_compiler)
    assert code == 1 and "COMPILE needs a C++ compiler" in text and "Traceback" not in text, text


def without_console(script):
    """As pythonw on Windows starts a program."""
    sys.stdout = sys.stderr = None


def test_a_run_without_a_console_is_a_run(tmp_path):
    assert run(alone(tmp_path), without_console) == (0, "")
    assert_same_run(tmp_path, whole_run())


def test_a_dead_worker_gives_a_message(tmp_path):
    process = Process(arguments(tmp_path, "--epochs", 300))
    process.wait_for("  1/300 ")
    os.kill(process.workers()[0], signal.SIGKILL)
    assert process.wait() == 1 and "Traceback" not in process.text, process.text
    for words in ("process that prepares images died", "--num-workers 0", HOW_TO_RESUME):
        assert words in process.text


def announce_terminate(script):
    """DataLoader terminates workers that it has waited for in vain, five seconds each."""
    inner = multiprocessing.process.BaseProcess.terminate
    multiprocessing.process.BaseProcess.terminate = lambda self: (print("had to be terminated"), inner(self))


def test_an_image_that_vanishes_during_the_run_is_named_and_workers_end_by_themselves(tmp_path):
    data = write_data(tmp_path / "data", 8, 3, 2, size=64)
    image = data / "train" / "slice_3.png"
    code, text = run(arguments(tmp_path / "out", "--cache-gb", 0, data=data), announce_terminate,
                     partial(before, act=image.unlink))
    assert code == 2 and f"error: {image}: the file is missing" in text.splitlines(), text
    assert "had to be terminated" not in text
