"""A run survives what happens to it: what is saved, and when; going on; kills, signals, full disks, other runs."""

import contextlib
import ctypes
import errno
import fcntl
import functools
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
import threading
import time
import weakref
from pathlib import Path

import background
import numpy as np
import pytest
import torch
from background import Process, arguments, assert_same_run, copy_run, read, rising_dice, run, table_rows, whole_run
from conftest import definitions, script, tiny_build_model, write_data

BEST, JSON, LAST = script.BEST, "unet_plusplus_best.json", script.LAST
TABLE, PLOT, SAMPLES = "training_history.csv", "training_history.png", "training_samples.png"
SCORES, CASES = "test_metrics.csv", "test_predictions.png"
LOCK, GO_ON = ".brain_tumor.lock", script.GO_ON
Writer, partial = script.CheckpointWriter, functools.partial

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
    [], ["--precision", "bfloat16"], ["--average-epochs", 0, "--warmup-steps", 0],
    ["--average-epochs", 3, "--warmup-steps", 12],  # the warm-up ends in the third epoch
    ["--accumulation-steps", 2, "--batch-size", 1, "--cache-gb", 0],
], ids=lambda options: " ".join(map(str, options)) or "float32")
def test_two_and_two_epochs_are_four(options, tmp_path):
    """The first ones without workers, the other ones, like the undisturbed run, with two."""
    succeed(alone(tmp_path, *options, "--epochs", 2))
    assert len(read(tmp_path)["history"]) == 2
    assert "Going on after epoch 2" in succeed(arguments(tmp_path, *options, "--resume"))
    assert_same_run(tmp_path, whole_run(*options))


def test_the_real_network_stopped_by_sigterm_goes_on_as_if_nothing_had_happened(tmp_path):
    whole, halves = [arguments(tmp_path / name, "--epochs", 2) for name in ("whole", "halves")]
    succeed(whole, network=None)
    process = Process(halves, network=None)
    process.wait_for("epoch 1/2")
    process.kill(signal.SIGTERM)
    assert process.wait() == 143, process.text
    assert "Going on after epoch 1" in succeed([*halves, "--resume"], network=None)
    assert_same_run(tmp_path / "halves", tmp_path / "whole")


def test_learning_rate_patience_and_the_best_epoch_go_on(here, tmp_path):
    """With patience 0 the rate falls after every epoch that is not better. Every epoch has an order of its own."""
    def watch(script):
        inner = script.train_one_epoch
        script.train_one_epoch = lambda model, loader, *args, **options: (
            epochs.append(next(iter(loader.batch_sampler))[0][0]), inner(model, loader, *args, **options))[1]

    options = ["--lr", 1e-4, "--warmup-steps", 0, "--plateau-patience", 0, "--plateau-factor", 0.5,
               "--early-stopping", 4, "--epochs"]
    epochs, faults = [], (constant_dice, watch)
    assert here(alone(tmp_path, *options, 1), *faults)[0] == 0
    first = read(tmp_path, BEST)
    assert here(alone(tmp_path, *options, 3, "--resume"), *faults)[0] == 0
    code, text = here(alone(tmp_path, *options, 9, "--resume"), *faults)
    assert code == 0 and "Stopped early" in text  # epochs 2 to 5 were no better than epoch 1: 4, over the resumes
    assert epochs == [0, 1, 2, 3, 4]
    assert [row["lr"] for row in read(tmp_path)["history"]] == pytest.approx([1e-4, 1e-4, 5e-5, 2.5e-5, 1.25e-5])
    record, problem = script.read_record(tmp_path / BEST)
    assert problem == "" and record["best_epoch"] == 1 and background.differences(read(tmp_path, BEST), first) == []


def test_more_epochs_after_stopping_early(here, tmp_path):
    """It goes on, and stops by the same rule: after one epoch that is not better. The same EPOCHS change nothing."""
    for more, rows in ((["--epochs", 5], 2), (["--epochs", 6, "--resume"], 3), (["--epochs", 6, "--resume"], 3)):
        code, text = here(alone(tmp_path, "--early-stopping", 1, *more), constant_dice)
        assert code == 0 and "Stopped early" in text and len(table_rows(tmp_path)) == 1 + rows


def test_a_finished_run_says_so_and_keeps_its_weights(here, finished):
    code, text = here(alone(finished, "--resume"))
    assert code == 0 and "All 4 epochs are done; raise EPOCHS" in text
    assert_same_run(finished, whole_run())


# --- what may change, and what may not

CHANGES = {
    "IMG_SIZE": [96], "MEAN": [0.5, 0.5, 0.5], "STD": [0.5, 0.5, 0.5], "CATEGORIES": ["tumor"], "ENCODER": ["resnet34"],
    "ARCHITECTURE": ["unet"], "LOSS": ["focal_tversky"], "SEED": [7], "LR": [0.5], "LR_RANDOM_START": [0.5],
    "WARMUP_STEPS": [3], "AVERAGE_EPOCHS": [0.7], "WEIGHT_DECAY": [0.5], "GRAD_CLIP": [9], "PLATEAU_FACTOR": [0.3],
    "PLATEAU_PATIENCE": [3]}


def flags(name):
    return "--" + name.lower().replace("_", "-"), *CHANGES[name]


@pytest.mark.parametrize("name", CHANGES)
def test_a_contradictory_setting_is_named(name, here, finished):
    saved = read(finished)["settings"][name]
    now = tuple(CHANGES[name]) if isinstance(saved, tuple) else CHANGES[name][0]
    message = refused(here, finished, *flags(name))
    assert f"{name}: saved {saved!r}, now {now!r}" in message and "What may change: EPOCHS" in message


def test_all_contradictory_settings_are_named_together(here, finished):
    message = refused(here, finished, *flags("IMG_SIZE"), *flags("SEED"), "--batch-size", 4, "--accumulation-steps", 3)
    assert all(words in message for words in ("IMG_SIZE: ", "SEED: ", "images per step: saved 2, now 12"))


def test_what_may_change_may_change(finished, tmp_path):
    """One more epoch on moved data, without the test images, which do not train, and what the first start needed."""
    assert {*CHANGES, *script.RESUME_MAY_CHANGE} == set(script.CONSTANTS)
    moved = shutil.copytree(background.shared_data(), tmp_path / "moved")
    shutil.rmtree(moved / "test")
    succeed(alone(finished, "--resume", "--epochs", 5, "--batch-size", 1, "--accumulation-steps", 2, "--cache-gb", 0,
                  "--early-stopping", 9, "--deterministic", "--precision", "bfloat16", "--encoder-weights", "imagenet",
                  "--init-weights", tmp_path / "gone.pth", "--skip-bad-images", "--test-time-augmentation", data=moved))
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


def test_a_state_of_the_version_before_is_refused_and_its_best_model_is_a_start(here, finished, tmp_path):
    state = read(finished)
    state["scheduler"] = state.pop("plateau")
    for name in ("format", "average", "warmup"):
        del state[name]
    for name in ("ARCHITECTURE", "LR_RANDOM_START", "WARMUP_STEPS", "AVERAGE_EPOCHS", "TEST_TIME_AUGMENTATION"):
        del state["settings"][name]
    state["settings"] |= {"CACHE_DIR": None, "SYNC_BATCHNORM": True}
    replace_file(finished / LAST, state | {"random": torch.get_rng_state()})
    message = refused(here, finished)
    assert "another version" in message
    code, text = here(alone(tmp_path / "new", "--epochs", 1, *message[message.index("--init-weights"):].split()))
    assert code == 0 and f"for the encoder, whose weights are: checkpoint {finished / BEST}" in text


def test_a_best_model_of_the_version_before_loads(finished, monkeypatch, capfd):
    record = json.loads((finished / JSON).read_text())
    for name in ("architecture", "test_time_augmentation"):
        del record[name]
    record |= {"sha256_before": None, "threshold": 0.35, "img_size": 96}
    replace_file(finished / JSON, json.dumps(record).encode())
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
    assert len(table_rows(finished)) == 1 + 1 and read(finished)["settings"]["SEED"] == 5
    words = shlex.split(re.search("add to its command: (.*)", text)[1])
    code, text = here(alone(finished, *words, "--epochs", 5))
    assert code == 0 and "Going on after epoch 4" in text
    assert len(table_rows(kept)) == 1 + 5 and len(table_rows(finished)) == 1 + 1
    os.utime(finished / LAST, (saved, saved))  # the name tells the time
    assert here(alone(finished, "--epochs", 1, "--seed", 6))[0] == 0
    assert sorted(read(folder)["settings"]["SEED"] for folder in finished.glob("earlier_run_*")) == [5, 42]


def test_a_start_that_is_refused_leaves_the_earlier_run_where_it_is(here, finished, tmp_path):
    earlier = contents(finished)
    code, text = here(alone(finished, "--seed", 5, data=write_data(tmp_path / "data", 2, 0, 0)))
    assert code == 2 and "folder not found" in text and contents(finished) == earlier


def test_an_earlier_run_is_moved_before_the_first_write(here, finished, monkeypatch):
    """So a first state that cannot be written finds it complete in its new folder."""
    earlier = contents(finished)
    monkeypatch.setattr(os, "fsync", raising(OSError(errno.ENOSPC, "No space left on device")))
    code, text = here(alone(finished, "--seed", 5))
    assert code == 1 and f"cannot write {finished / LAST}" in text and "Traceback" not in text
    assert GO_ON not in text and "Then start again." in text
    (kept,) = finished.glob("earlier_run_*")
    assert contents(kept) == earlier and set(finished.iterdir()) == {kept, finished / LOCK}


@pytest.mark.parametrize("name", [BEST, LAST])
def test_killed_while_an_earlier_run_is_moved_nothing_is_lost(name, tmp_path):
    folder = copy_run(whole_run(faults=(rising_dice,)), tmp_path / "out")
    earlier = contents(folder)
    code, text = run(arguments(folder, "--epochs", 1, "--seed", 5), partial(background.kill_at, name=name))
    assert code == -9, text
    assert sorted(contents(folder).values()) == sorted(earlier.values())
    succeed(arguments(folder, "--resume"), rising_dice)  # the state is moved last
    assert_same_run(folder, whole_run(faults=(rising_dice,)))


# --- the background writer


@pytest.mark.parametrize("fault, between, first, second", [
    (rising_dice, 1e9, [LAST, BEST, JSON, TABLE, PLOT], [LAST, BEST, JSON, TABLE]),
    (rising_dice, -1.0, [LAST, BEST, JSON, TABLE, PLOT], [LAST, BEST, JSON, TABLE, PLOT]),
    (constant_dice, 1e9, [LAST, BEST, JSON, TABLE, PLOT], [LAST, TABLE]),
], ids=["a better epoch", "plots in every epoch", "an epoch that is not better"])
def test_what_is_written_in_which_order_and_by_whom(fault, between, first, second, here, tmp_path, monkeypatch):
    """The plot is drawn rarely, and always at the end; the state of epoch 0 is written in the foreground."""
    written = {False: [], True: []}

    def replace(source, target, inner=os.replace):
        written[background.in_writer()].append(Path(target).name)
        assert threading.current_thread().daemon == background.in_writer()  # Python waits for others when it ends
        inner(source, target)

    monkeypatch.setattr(os, "replace", replace)
    monkeypatch.setattr(script, "SECONDS_BETWEEN_PLOTS", between)
    assert here(alone(tmp_path, "--epochs", 2), fault)[0] == 0
    assert written == {False: [SAMPLES, LAST, PLOT, SCORES, CASES, JSON], True: first + second}


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


def test_one_snapshot_is_under_way_at_a_time(here, tmp_path, monkeypatch):
    snapshots, alive = [], []

    def state(self, inner=script.Run.state):
        alive.append(sum(snapshot() is not None for snapshot in snapshots))
        found = inner(self)
        snapshots.append(weakref.ref(found["model"]["0.weight"]))
        return found

    monkeypatch.setattr(script.Run, "state", state)
    assert here(alone(tmp_path), background.slow_writer)[0] == 0
    assert alive == [0, 0, 0, 0, 0]  # one for each epoch, and that of epoch 0


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_waits_for_the_writer_and_leaves_nothing_behind(signum, here, tmp_path):
    """Stopped after two epochs and the training of a third: what is written then is the state of the second.

    No thread and no handler stays, and other code in this process can go on.
    """
    def left():
        return threading.enumerate(), signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)

    earlier, stop = left(), partial(before, act=partial(send, signum), name="validate", time=3)
    code, text = here(alone(tmp_path), background.slow_writer, stop)
    assert code == 128 + signum and f"\nStopped. {GO_ON}\n" in text and left() == earlier
    assert list(script.progress([1, 2], "after it")) == [1, 2]
    state, two_epochs = read(tmp_path), read(whole_run("--epochs", 2))
    assert [name for name in script.Run.STATEFUL if background.differences(state[name], two_epochs[name])] == []
    assert len(table_rows(tmp_path)) == 1 + 2 and background.leftovers(tmp_path) == []


@pytest.mark.parametrize("bad, back", [(1, 0), (3, 2)])
def test_going_back_waits_for_the_state_that_is_being_written(bad, back, here, tmp_path):
    """Repeated in the same precision, the result is that of an undisturbed run: bfloat16 is pretended only."""
    def spoilt(script):
        inner, calls = script.validate, []
        script.autocast = lambda *_: contextlib.nullcontext()

        def validate(*args, **options):
            calls.append(inner(*args, **options))
            return calls[-1] | ({"valid_loss": np.nan} if len(calls) == bad else {})

        script.validate = validate

    code, text = here(alone(tmp_path, "--precision", "bfloat16"), background.slow_writer, spoilt)
    assert code == 0 and f"Going back to the end of epoch {back} and on in float32" in text
    state, whole = read(tmp_path), read(whole_run())
    assert state["reverted"] and [name for name in ("model", "average", "optimizer", "history")
                                  if background.differences(state[name], whole[name])] == []


def test_a_state_that_is_not_finite_never_replaces_a_good_one(here, tmp_path, monkeypatch):
    def share_statistics(self):
        if self.epoch == 2:
            self.optimizer.state[next(self.model.parameters())]["exp_avg"].fill_(np.inf)

    monkeypatch.setattr(script.Run, "share_statistics", share_statistics)
    code, text = here(alone(tmp_path))
    assert code == 1 and "not finite" in text and GO_ON in text and "Traceback" not in text
    assert read(tmp_path)["epoch"] == 2


def test_the_seconds_of_the_rows_add_up_to_the_time_of_the_run(here, tmp_path, monkeypatch):
    clock = [0.0]

    def takes(seconds, owner, name):
        inner = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *args, **options: (
            clock.__setitem__(0, clock[0] + seconds), inner(*args, **options))[1])

    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    takes(4, script, "train_one_epoch")
    takes(2, script, "validate")
    takes(10, Writer, "wait")
    takes(30, script.Run, "state")
    code, text = here(alone(tmp_path, "--epochs", 3))
    rows = read(tmp_path)["history"]
    assert code == 0 and "46.0 s" in text and [row["seconds"] for row in rows] == [6, 46, 46]
    assert [row["images_per_second"] for row in rows] == [2, 2, 2]  # of training alone: 8 images


def watch_forks(script):
    """Print beside how many writers each worker is forked."""
    start, writers = Writer.start, []
    Writer.start = lambda self, state: (start(self, state), writers.append(self.thread))
    multiprocessing.set_start_method("fork", force=True)
    os.register_at_fork(before=lambda: print(f"forked beside {sum(w.is_alive() for w in writers)}", flush=True))


@pytest.mark.parametrize("resume", [False, True])
def test_workers_are_never_forked_beside_a_writer(resume, tmp_path):
    """Also those of validation, which has some where images are decoded in every epoch."""
    if resume:
        copy_run(whole_run(), tmp_path / "out")
    text = succeed(arguments(tmp_path / "out", "--cache-gb", 0, *["--resume", "--epochs", 6] * resume),
                   background.slow_writer, watch_forks)
    assert re.findall("forked beside .*", text) == ["forked beside 0"] * 2 * min(2, script.available_cores())


# --- SIGKILL

CRASHES = [  # on one run: at the rename of which file, when, in whose; then what is found: the epoch of the state, and
    # that of the best model that can be used (None: not before --resume has mended it)
    (LAST, "before", "trainer", None, None), (LAST, "after", "trainer", 0, None), (LAST, "before", "writer", 0, None),
    (BEST, "before", "writer", 1, None), (BEST, "before", "trainer", 1, None), (JSON, "before", "trainer", 1, None),
    (TABLE, "before", "trainer", 1, 1), (BEST, "before", "writer", 2, 1), (JSON, "before", "writer", 3, None),
    (TABLE, "before", "trainer", 3, 3), (TABLE, "before", "writer", 4, 4), (PLOT, "before", "writer", 5, 5),
    (PLOT, "after", "writer", 6, 6), (PLOT, "before", "trainer", 7, 7), (SCORES, "before", "trainer", 7, 7),
    (CASES, "after", "trainer", 7, 7)]


def test_killed_around_every_rename_nothing_is_lost_and_the_result_is_the_same(tmp_path):
    """A run of 7 epochs, killed before every file it puts in place, which is also after the one before."""
    found, whole = [], whole_run("--epochs", 7, faults=(rising_dice,))
    for name, when, who, *_ in CRASHES:
        code, text = run(alone(tmp_path, "--epochs", 7, *["--resume"] * (tmp_path / LAST).is_file()), rising_dice,
                         partial(background.kill_at, name=name, when=when, who=who))
        assert code == -9, (name, when, who, text)
        state = read(tmp_path)["epoch"] if (tmp_path / LAST).is_file() else None
        best = script.read_record(tmp_path / BEST)[0]["best_epoch"] if background.load_best(tmp_path) == "" else None
        found.append((name, when, who, state, best))
    assert found == CRASHES
    assert "Going on after epoch 7" in succeed(alone(tmp_path, "--epochs", 7, "--resume"), rising_dice)
    assert_same_run(tmp_path, whole)
    assert background.leftovers(tmp_path) == [] and (tmp_path / PLOT).is_file()


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
        epochs += [read(tmp_path)["epoch"]] * (tmp_path / LAST).is_file()
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
    assert background.load_best(folder) == "" and script.read_record(folder / BEST)[0]["best_epoch"] == 4
    assert_same_run(folder, whole_run(faults=(rising_dice,)))


def test_files_that_do_not_fit_together_warn_where_the_state_cannot_mend_them(here, tmp_path):
    """The epoch of the state is not its best one, so that the best weights are nowhere else."""
    assert here(alone(tmp_path, "--epochs", 2), constant_dice)[0] == 0
    record, best = json.loads((tmp_path / JSON).read_text()), (tmp_path / BEST).read_bytes()
    replace_file(tmp_path / JSON, json.dumps(record | {"sha256": "0" * 64}).encode())
    code, text = here(alone(tmp_path, "--epochs", 2, "--resume"))
    assert code == 0 and f"{BEST} and its JSON are not the best model of this run, that of epoch 1." in text
    assert f"{JSON} does not belong to {BEST}" in text and (tmp_path / BEST).read_bytes() == best


def test_a_new_best_model_does_not_keep_the_scores_of_the_old_one(here, finished, monkeypatch):
    """Whatever ends the run before its evaluation, the JSON must not show the old threshold and test scores."""
    assert "test_metrics" in json.loads((finished / JSON).read_text())
    monkeypatch.setattr(script, "evaluate_checkpoint", raising(MemoryError))
    assert here(alone(finished, "--resume", "--epochs", 5), partial(constant_dice, dice=0.99))[0] == 1
    record, problem = script.read_record(finished / BEST)
    assert problem == "" and record["best_epoch"] == 5
    assert "test_metrics" not in record and "valid_metrics" not in record and record["threshold"] == 0.5


# --- Ctrl-C and SIGTERM


@pytest.mark.parametrize("signum, group", [(signal.SIGINT, True), (signal.SIGTERM, False)],
                         ids=["Ctrl-C in a terminal", "SIGTERM to the process"])
def test_a_signal_ends_the_run_in_order(signum, group, tmp_path):
    process = Process(arguments(tmp_path, "--epochs", 300))
    process.wait_for("epoch   2/300")
    workers = process.workers()
    assert len(workers) == min(2, script.available_cores())
    process.kill(signum, group)
    assert process.wait() == 128 + signum and "Traceback" not in process.text
    assert [pid for pid in workers if Path(f"/proc/{pid}").exists()] == []
    assert "stopping after this step" in process.text  # by the handler: nothing is interrupted in the middle
    assert process.text.endswith(f"\nStopped. {GO_ON}\n")
    assert len(table_rows(tmp_path)) == 1 + read(tmp_path)["epoch"] >= 1 + 2
    assert background.load_best(tmp_path) == "" and background.leftovers(tmp_path) == []


def hang(script, place):
    def forever(*_, **__):
        print("hanging", flush=True)
        time.sleep(1000)

    if place == "step":
        torch.nn.utils.clip_grad_norm_ = forever
    else:
        inner = os.fsync
        os.fsync = lambda number: forever() if background.in_writer() == (place == "writer") else inner(number)


@pytest.mark.parametrize("place", ["step", "first state", "writer"])
def test_a_second_signal_ends_what_hangs(place, tmp_path):
    process = Process(alone(tmp_path), partial(hang, place=place))
    process.wait_for("hanging")
    process.kill(signal.SIGINT)
    process.wait_for("again: at once")
    process.kill(signal.SIGINT)
    assert process.wait() == 130 and "Traceback" not in process.text
    assert (tmp_path / LAST).is_file() == (GO_ON in process.text) == (place != "first state")


def test_a_signal_while_images_are_read_ends_at_once(here, tmp_path, monkeypatch):
    monkeypatch.setattr(script, "load_sample", lambda *_: send(signal.SIGTERM))
    code, text = here(alone(tmp_path))
    assert code == 143 and "Traceback" not in text and GO_ON not in text and contents(tmp_path) == {}


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
    """From an epoch on, the writer cannot write a file: the disk is full, or read-only, or the rename is refused."""
    states, write, replace = [], Writer.write, os.replace

    def hit(path, when):
        return how == when and Path(path).name == f".{name}.tmp" and background.in_writer() and states[-1] >= epoch

    def open_file(path, *mode):
        if hit(path, "read-only"):
            raise OSError(errno.EROFS, "Read-only file system", str(path))
        return io.BufferedWriter(FullFile(path, "w")) if hit(path, "full") else open(path, *mode)

    def refused_replace(source, target):
        if hit(source, "rename"):
            raise PermissionError(errno.EACCES, "Permission denied", str(source))
        replace(source, target)

    Writer.write = lambda self, state: (states.append(state["epoch"]), write(self, state))
    script.open, os.replace, time.sleep = open_file, refused_replace, lambda _: None


@pytest.mark.parametrize("name, epoch, how", [(LAST, 2, "full"), (BEST, 2, "read-only"), (JSON, 2, "rename"),
                                              (JSON, 1, "full"), (LAST, 4, "rename")])
def test_a_checkpoint_that_cannot_be_written_stops_the_run_an_epoch_later_at_most(name, epoch, how, here, tmp_path):
    code, text = here(alone(tmp_path), rising_dice, partial(cannot_write, name=name, epoch=epoch, how=how))
    assert code == 1 and f"cannot write {tmp_path / name}: " in text and GO_ON in text and "Traceback" not in text
    assert f"epoch {epoch}/4" in text and f"epoch {epoch + 1}/4" not in text and "Threshold" not in text
    assert background.leftovers(tmp_path) == []
    assert read(tmp_path)["epoch"] == (epoch - 1 if name == LAST else epoch)
    assert here(alone(tmp_path, "--resume"), rising_dice)[0] == 0
    assert_same_run(tmp_path, whole_run(faults=(rising_dice,)))


@pytest.mark.parametrize("folder", ["/proc", "/proc/new", "/dev/null"])
def test_an_output_folder_that_takes_no_files_is_refused(folder, here):
    code, text = here(alone(folder))
    assert code == 2 and folder in text and "--output-dir" in text and "Traceback" not in text


def test_tables_and_pictures_that_cannot_be_written_only_warn(here, tmp_path):
    names = [SAMPLES, TABLE, PLOT, SCORES, CASES]
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


def test_a_table_has_the_columns_of_its_last_row(tmp_path):
    """A metric that was added, or taken out, before a resume."""
    script.write_table(tmp_path / "history.csv", [{"epoch": 1, "old": 7}, {"epoch": 2, "new": 0.5}])
    assert (tmp_path / "history.csv").read_text() == "epoch,new\n1,\n2,0.5\n"


# --- one run at a time in a folder


def test_a_second_run_is_kept_out_and_the_first_goes_on(here, tmp_path):
    folder, image = tmp_path / "out", background.shared_data() / "test/slice_0.png"
    first = Process(arguments(folder, "--epochs", 300), rising_dice)
    first.wait_for("epoch   2/300")  # the best model of the first epoch is there
    copy_run(whole_run(), tmp_path / "elsewhere")
    for command in (alone(folder), [*arguments(folder, "--epochs", 300), "--resume"], alone(folder, "--evaluate"),
                    alone(tmp_path / "other", "--evaluate", "--checkpoint", folder / BEST),  # it rewrites the JSON
                    alone(folder, "--evaluate", "--checkpoint", tmp_path / "elsewhere" / BEST)):  # it writes tables
        code, text = here(command)
        assert code == 2 and "Traceback" not in text
        assert text[text.index("error: "):] == (
            f"error: another run is using {folder}; wait until it has ended, or choose another folder with OUTPUT_DIR "
            "(--output-dir)\n")
    assert list(folder.glob("earlier_run_*")) == []
    assert here(alone(tmp_path / "masks", "--predict", image, "--checkpoint", folder / BEST))[0] == 0  # needs no lock
    first.kill(signal.SIGTERM)
    assert first.wait() == 143, first.text
    assert here(alone(folder, "--evaluate"))[0] == 0


def test_the_lock_dies_with_the_trainer_even_if_its_workers_live_on(here, tmp_path):
    first = Process(arguments(tmp_path, "--epochs", 300))
    first.wait_for("epoch   1/300")
    workers = first.workers()
    assert workers
    for pid in workers:
        os.kill(pid, signal.SIGSTOP)
    first.kill()
    while Path(f"/proc/{first.pid}").exists():
        time.sleep(0.02)
    code, text = here(alone(tmp_path, "--resume", "--epochs", 1 + read(tmp_path)["epoch"]))
    alive = [pid for pid in workers if Path(f"/proc/{pid}").exists()]
    for pid in alive:
        os.kill(pid, signal.SIGKILL)
    assert code == 0 and alive == workers, text


@pytest.mark.parametrize("trouble", ["unknown", "forbidden"])
def test_a_folder_that_knows_no_locks_warns_and_goes_on(trouble, here, tmp_path, monkeypatch):
    """A network drive; a lock file that belongs to somebody else."""
    def open_file(path, *mode):
        if Path(path).name == LOCK:
            raise PermissionError(errno.EACCES, "Permission denied")
        return open(path, *mode)

    if trouble == "unknown":
        monkeypatch.setattr(fcntl, "lockf", raising(OSError(errno.ENOLCK, "No locks available")))
    code, text = here(alone(tmp_path, "--epochs", 1),
                      *[lambda script: setattr(script, "open", open_file)] * (trouble == "forbidden"))
    assert code == 0 and text.count(f"{tmp_path} knows no file locks (") == 1 and "no second run" in text


# --- errors on the way


@pytest.mark.parametrize("owner, name, saved", [
    (script, "load_sample", False), (script, "build_model", False), (script.Run, "state", False),
    (script, "plot_samples", False), (script, "train_one_epoch", True), (script, "validate", True),
    (Writer, "write_best", True), (script, "predict_probability", True)])
@pytest.mark.parametrize("error", [MemoryError("no room"), ZeroDivisionError("odd")], ids=["memory", "unforeseen"])
def test_an_error_anywhere_says_what_helps_and_how_to_go_on(owner, name, saved, error, here, tmp_path):
    """Memory that runs out, also in the writer; errors that nobody foresaw keep their trace."""
    code, text = here(alone(tmp_path, "--epochs", 2), lambda _: setattr(owner, name, raising(error)))
    foreseen = isinstance(error, MemoryError)
    assert code == 1 and (GO_ON in text) == saved
    assert ("memory ran out (no room)" in text) == ("--num-workers" in text or "NUM_WORKERS" in text) == foreseen
    assert ("Traceback" in text) == ("nobody foresaw this" in text) == (not foreseen)


def test_a_dead_worker_gives_a_message(tmp_path):
    process = Process(arguments(tmp_path, "--epochs", 300))
    process.wait_for("epoch   1/300")
    os.kill(process.workers()[0], signal.SIGKILL)
    assert process.wait() == 1 and "Traceback" not in process.text, process.text
    assert all(words in process.text for words in ("process that prepares images died", "--num-workers 0", GO_ON))


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
