"""Faults injected into real runs: kills, signals, full disks, dead workers."""

import contextlib
import functools
import json
import os
import random
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from background import (
    RISING,
    Process,
    arguments,
    assert_same_run,
    command_in,
    copy_run,
    leftovers,
    load_best,
    read,
    run,
    scratch,
    table_rows,
    whole_run,
)
from conftest import SCRIPT, script, write_data

BEST, LAST = script.BEST, script.LAST


# --- SIGKILL


def kill_at(name, when):
    """Kill the process before or after the rename that puts a file in place."""
    return RISING + f"""
def replace(source, target, inner=os.replace):
    hit = os.path.basename(target) == {name!r}
    if hit and {when!r} == "before":
        os.kill(os.getpid(), signal.SIGKILL)
    inner(source, target)
    if hit:
        os.kill(os.getpid(), signal.SIGKILL)
os.replace = replace
"""


JSON = "unet_plusplus_best.json"
CRASHES = [  # (file, moment), in this order on one run
    (BEST, "before"), (BEST, "after"), (JSON, "after"), (LAST, "before"), (LAST, "after"),
    (BEST, "before"), (BEST, "after"), (JSON, "before"), (JSON, "after"), (LAST, "before"), (LAST, "after"),
    ("training_history.csv", "before"), ("training_history.csv", "after"), ("training_history.png", "before"),
    ("test_metrics.csv", "before"), ("test_predictions.png", "after")]


@functools.cache
def crashed_run():
    """A run of 4 epochs, killed around every file it puts in place.

    Returns (its folder, [(file, moment, finished epochs, what is wrong with the best model) after each kill]).
    """
    folder, seen = scratch() / "crashed", []
    for name, when in CRASHES:
        more = ["--resume"] if (folder / LAST).is_file() else []
        code, text = run(arguments(folder, "--num-workers", 0, *more), kill_at(name, when))
        assert code == -signal.SIGKILL, (name, when, text)
        if (folder / "new_run" / LAST).is_file():
            script.replace_earlier_run(folder)  # which the next start does first
        state = read(folder) if (folder / LAST).is_file() else {"epoch": 0}
        seen.append((name, when, state["epoch"], load_best(folder)))
    code, text = run(arguments(folder, "--num-workers", 0, "--resume"), RISING)
    assert code == 0, text
    return folder, seen


def test_killed_around_every_rename_the_state_is_never_lost():
    epochs = [epoch for _, _, epoch, _ in crashed_run()[1]]
    assert epochs == sorted(epochs)
    assert epochs[:4] == [0, 0, 0, 0]  # the first epoch is repeated until its state is in place
    assert epochs[4:11] == [1, 1, 1, 1, 1, 1, 2]


def test_killed_around_every_rename_the_best_model_loads():
    seen = crashed_run()[1]
    # Before the first state is saved there may be none: what a killed first epoch left is kept as an earlier run.
    assert [crash for crash in seen if crash[3] and crash[2:] != (0, "there is none")] == []


def test_killed_around_every_rename_the_result_is_the_same(tmp_path):
    code, text = run(arguments(tmp_path / "whole", "--num-workers", 0), RISING)
    assert code == 0, text
    assert_same_run(crashed_run()[0], tmp_path / "whole")
    assert leftovers(crashed_run()[0]) == []


def test_killed_before_the_last_table_it_is_written_on_resume(tmp_path):
    folder = tmp_path / "out"
    assert run(arguments(folder, "--epochs", 1), kill_at("training_history.csv", "before"))[0] == -9
    code, text = run(arguments(folder, "--epochs", 1, "--resume"), RISING)
    assert code == 0, text
    assert len(table_rows(folder)) == 1 + 1 and (folder / "training_history.png").is_file()


def random_kills(folder, kills, seed):
    """Kill a run at random moments, resume it to the end; returns how often a file was lost (0)."""
    rng = random.Random(seed)
    had_best, lost = False, 0
    for _ in range(kills):
        process = Process(arguments(folder, *["--resume"] * (folder / LAST).is_file()))
        time.sleep(rng.uniform(0.3, 8))
        process.kill(group=rng.random() < 0.5)
        assert process.wait() in (-9, 0), process.text
        lost += had_best and bool(load_best(folder))
        had_best = had_best or (folder / BEST).is_file() and not load_best(folder)
    code, text = run(arguments(folder, *["--resume"] * (folder / LAST).is_file()))
    assert code == 0, text
    assert leftovers(folder) == []
    assert_same_run(folder, whole_run())
    return lost


def test_killed_at_random_moments_the_result_is_the_same(tmp_path):
    assert random_kills(tmp_path / "out", 4, seed=1) == 0


@pytest.mark.soak
def test_25_random_kills(tmp_path):
    lost = sum(random_kills(tmp_path / f"out{number}", 5, seed=100 + number) for number in range(5))
    print(f"25 kills in 5 runs: best model lost {lost} times; every result equal to the undisturbed run")
    assert lost == 0


def test_every_file_is_flushed_before_it_is_renamed(tmp_path, monkeypatch):
    calls = []

    def fsync(number, inner=os.fsync):
        calls.append(("flushed", os.readlink(f"/proc/self/fd/{number}")))
        inner(number)

    def replace(source, target, inner=os.replace):
        calls.append(("renamed", str(source)))
        inner(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    script.write_file(tmp_path / "a.txt", b"text")
    script.write_file(tmp_path / "a.pth", lambda file: torch.save({"a": torch.ones(2)}, file), required=True)
    script.write_image(tmp_path / "a.png", np.zeros((4, 4), np.uint8))
    script.write_table(tmp_path / "a.csv", [{"a": 1}])
    temporary = [path for kind, path in calls if kind == "renamed"]
    assert len(temporary) == 4 and not {str(path) for path in tmp_path.iterdir()} & set(temporary)
    assert calls == [(kind, path) for path in temporary for kind in ("flushed", "renamed")]


# --- Ctrl-C and SIGTERM


@pytest.mark.parametrize("group", [False, True], ids=["process", "whole group"])
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
def test_a_signal_ends_the_run_in_order(signum, group, tmp_path):
    caches = set(scratch().glob("brain_tumor_cache_*"))
    process = Process(arguments(tmp_path, "--epochs", 300))
    process.wait_for("epoch   2/300")
    workers = process.workers()
    assert len(workers) == min(2, script.available_cores())
    process.kill(signum, group)
    assert process.wait(60) == 128 + signum
    assert [pid for pid in workers if Path(f"/proc/{pid}").exists()] == []
    assert "Traceback" not in process.text
    assert leftovers(tmp_path) == [] and set(scratch().glob("brain_tumor_cache_*")) <= caches
    assert len(table_rows(tmp_path)) == 1 + read(tmp_path)["epoch"] and (tmp_path / "training_history.png").is_file()
    assert load_best(tmp_path) == ""
    assert "stopping after this step" in process.text  # by the handler: nothing is interrupted in the middle
    assert command_in(process.text) == [sys.executable, str(SCRIPT), *arguments(tmp_path, "--epochs", 300), "--resume"]


def test_the_printed_command_really_goes_on(tmp_path):
    """As a real process; stopped after one epoch of four, the result is that of the undisturbed run."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, str(SCRIPT), *arguments(tmp_path / "out dir")], stdout=subprocess.PIPE,
                               stderr=subprocess.STDOUT, text=True, env=environment, start_new_session=True)
    lines = []
    for line in process.stdout:
        lines.append(line)
        if line.startswith("epoch 1/4"):
            os.killpg(process.pid, signal.SIGTERM)
    text = "".join(lines)
    assert process.wait(60) == 143, text
    assert "Traceback" not in text
    command = text.strip().splitlines()[-1]
    result = subprocess.run(command, shell=True, capture_output=True, text=True, env=environment, timeout=300)
    assert result.returncode == 0, result.stderr
    assert "Going on after epoch 1" in result.stdout
    assert_same_run(tmp_path / "out dir", whole_run())


HANG = """
def hang(*_, **__):
    print("hanging", flush=True)
    time.sleep(1000)
"""


@pytest.mark.parametrize("signum, place", [(signal.SIGINT, "torch.nn.utils.clip_grad_norm_"),
                                           (signal.SIGTERM, "os.fsync")], ids=["in a step", "in a file"])
def test_a_second_signal_ends_what_hangs(signum, place, tmp_path):
    process = Process(arguments(tmp_path), HANG + f"{place} = hang")
    process.wait_for("hanging")
    process.kill(signum)
    process.wait_for("again: at once")
    process.kill(signum)
    assert process.wait(60) == 128 + signum
    assert "Traceback" not in process.text and leftovers(tmp_path) == []


def test_a_signal_while_images_are_read_ends_at_once(tmp_path):
    patch = """
def load_sample(*args, inner=script.load_sample):
    os.kill(os.getpid(), signal.SIGTERM)
    return inner(*args)
script.load_sample = load_sample
"""
    code, text = run(arguments(tmp_path), patch)
    assert code == 143 and "Traceback" not in text
    assert list(tmp_path.iterdir()) == []


def test_a_stopped_evaluation_does_not_print_a_command_that_fails(tmp_path):
    folder = copy_run(whole_run(), tmp_path / "out")
    patch = """
def predict_probability(*args, inner=script.predict_probability):
    os.kill(os.getpid(), signal.SIGINT)
    return inner(*args)
script.predict_probability = predict_probability
"""
    code, text = run(arguments(folder, "--evaluate"), patch)
    assert code == 130
    for command in [line for line in text.splitlines() if "brain_tumor_integrated_smp.py" in line]:
        words = shlex.split(command)
        script.read_settings(words[words.index(str(SCRIPT)) + 1:])  # raises TrainerError for what excludes each other


# --- disks


def can_mount():
    """Whether this user may mount a file system in a namespace of its own."""
    with contextlib.suppress(OSError):
        command = ["unshare", "-m", "mount", "-t", "tmpfs", "tmpfs", "/mnt"]
        return subprocess.run(command, capture_output=True).returncode == 0
    return False


def in_namespace(setup, argv, copy="true"):
    """Run the script as a process, with file systems of its own. setup: shell commands that mount them; copy: one that
    saves what lies in them afterwards. Returns (exit code, output)."""
    command = f"{setup} && {{ {shlex.join([sys.executable, str(SCRIPT), *argv])}; code=$?; {copy}; exit $code; }}"
    result = subprocess.run(["unshare", "-m", "sh", "-c", command], capture_output=True, text=True, timeout=300,
                            env=os.environ | {"OMP_NUM_THREADS": "1"})
    return result.returncode, result.stdout + result.stderr


# While the second epoch is saved, no file may grow beyond a limit: the best model has 27 MB, the state 80.
DISK_FULL = RISING + """
import resource
def save(self, *args, inner=script.Run.save):
    if self.epoch == 2:
        resource.setrlimit(resource.RLIMIT_FSIZE, (MOST_BYTES, resource.RLIM_INFINITY))
    try:
        inner(self, *args)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
script.Run.save = save
"""


@pytest.mark.parametrize("limit, file", [(40_000_000, LAST), (10_000_000, BEST), (100, "unet_plusplus_best")])
def test_a_checkpoint_that_cannot_be_written_stops_the_run(limit, file, tmp_path):
    code, text = run(arguments(tmp_path), DISK_FULL.replace("MOST_BYTES", str(limit)))
    assert code == 1, text
    assert f"cannot write {tmp_path / file}" in text and "--resume" in text and "Traceback" not in text
    assert leftovers(tmp_path) == [] and load_best(tmp_path) == ""
    assert read(tmp_path)["epoch"] == 1
    code, text = run(arguments(tmp_path, "--resume", "--epochs", 2), RISING)
    assert code == 0 and len(table_rows(tmp_path)) == 1 + 2, text


if can_mount():  # without the right to mount, the limits above have to do
    def test_a_full_disk_stops_the_run_and_keeps_the_best_model(tmp_path):
        """125 MB hold one set of files (110 MB), but not a second one beside it."""
        copy, out = tmp_path / "copy", tmp_path / "out"
        out.mkdir()
        code, text = in_namespace(f"mount -t tmpfs -o size=125m tmpfs {out}", arguments(out), f"cp -a {out} {copy}")
        assert code == 1, text
        assert "cannot write" in text and "Traceback" not in text
        assert leftovers(copy) == [] and load_best(copy) == "" and read(copy)["epoch"] >= 1

    def test_a_full_disk_leaves_an_earlier_run_where_it_is(tmp_path):
        """It stays where it is, because the new one never has a complete checkpoint."""
        copy, out = tmp_path / "copy", tmp_path / "out"
        out.mkdir()
        code, text = in_namespace(f"mount -t tmpfs -o size=125m tmpfs {out} && cp -a {whole_run()}/. {out}",
                                  arguments(out, "--seed", 5), f"cp -a {out} {copy}")
        assert code == 1 and "Traceback" not in text, text
        assert {path.name: path.read_bytes() for path in copy.iterdir()} == \
            {path.name: path.read_bytes() for path in whole_run().iterdir()}

    def test_a_read_only_output_folder_is_refused_at_the_start(tmp_path):
        out = copy_run(whole_run(), tmp_path / "out")
        code, text = in_namespace(f"mount --bind {out} {out} && mount -o remount,ro,bind {out}", arguments(out))
        assert code == 2, text
        assert "cannot write into the output folder" in text and str(out) in text and "Traceback" not in text

    def test_training_works_with_almost_no_shared_memory(tmp_path):
        code, text = in_namespace("mount -t tmpfs -o size=64k tmpfs /dev/shm",
                                  arguments(tmp_path, "--epochs", 1, "--batch-size", 8))
        assert code == 0, text


@pytest.mark.parametrize("folder", ["/proc", "/proc/new", "/dev/null"])
def test_an_output_folder_that_takes_no_files_is_refused(folder, capfd):
    assert script.main(arguments(folder)) == 2
    err = capfd.readouterr().err
    assert folder in err and "--output-dir" in err and "Traceback" not in err


@pytest.mark.parametrize("name", ["training_samples.png", "training_history.csv", "training_history.png",
                                  "test_metrics.csv", "test_predictions.png"])
def test_a_table_or_picture_that_cannot_be_written_only_warns(name, tmp_path):
    (tmp_path / name).mkdir()  # a folder is in its place
    code, text = run(arguments(tmp_path, "--epochs", 1))
    assert code == 0, text
    assert f"cannot write {tmp_path / name}" in text and "Traceback" not in text
    assert load_best(tmp_path) == ""


@pytest.mark.parametrize("stream", ["open('/dev/full', 'w')", "broken_pipe()"])
def test_output_that_cannot_be_printed_does_not_end_a_run(stream, tmp_path):
    """A log on a full disk; `... | head`."""
    patch = f"""
import sys
def broken_pipe():
    reader, writer = os.pipe()
    os.close(reader)
    return open(writer, "w")
sys.stdout = sys.stderr = {stream}
"""
    assert run(arguments(tmp_path), patch)[0] == 0
    assert_same_run(tmp_path, whole_run())


def test_an_image_that_vanishes_during_the_run_is_named(tmp_path):
    patch = """
def train_one_epoch(*args, inner=script.train_one_epoch, **options):
    (script.Path(DATA) / "train" / "slice_3.png").unlink()
    return inner(*args, **options)
script.train_one_epoch = train_one_epoch
""".replace("DATA", repr(str(tmp_path / "data")))
    data = write_data(tmp_path / "data", 8, 3, 2, size=64)
    code, text = run(arguments(tmp_path / "out", "--cache-gb", 0, data=data), patch)
    assert code == 2, text
    end = text[text.index("error: "):].strip()
    assert end == f"error: {data / 'train' / 'slice_3.png'}: the file is missing"


def test_files_that_do_not_belong_together_are_recognised(tmp_path, capfd):
    folder = copy_run(whole_run(), tmp_path / "out")
    assert script.read_record(folder / BEST)[1] == ""
    record = json.loads((folder / JSON).read_text())
    (folder / JSON).unlink()
    foreign = {"encoder": "resnet50"} | {name: "0" * 64 for name in record if name.startswith("sha256")}
    (folder / JSON).write_text(json.dumps(record | foreign))
    values, problem = script.read_record(folder / BEST)
    assert values == {} and "does not belong" in problem
    with contextlib.suppress(script.TrainerError):
        script.load_model(folder / BEST, "cpu")
    assert "does not belong" in capfd.readouterr().err
    (folder / JSON).unlink()
    assert "no unet_plusplus_best.json" in script.read_record(folder / BEST)[1]
    (folder / JSON).write_text("{")
    assert "damaged" in script.read_record(folder / BEST)[1]
    (folder / JSON).write_text("[]")
    assert "damaged" in script.read_record(folder / BEST)[1]


def test_a_damaged_record_does_not_stop_a_resumed_run(tmp_path):
    folder = tmp_path / "out"
    code, text = run(arguments(folder, "--epochs", 1), RISING)
    assert code == 0, text
    (folder / JSON).write_text("{")
    code, text = run(arguments(folder, "--epochs", 2, "--resume"), RISING)
    assert code == 0, text
    assert load_best(folder) == ""


# --- workers


@pytest.mark.parametrize("death", ["os.kill(os.getpid(), signal.SIGKILL)", "os._exit(3)", "os._exit(0)"])
def test_a_dead_worker_gives_a_message(death, tmp_path):
    patch = f"""
def sample(self, index, inner=script.BrainTumorDataset.sample, main=os.getpid()):
    if os.getpid() != main and index == 5:
        {death}
    return inner(self, index)
script.BrainTumorDataset.sample = sample
"""
    code, text = run(arguments(tmp_path), patch)
    assert code == 1, text
    assert "process that prepares images died" in text and "--num-workers 0" in text and "Traceback" not in text
    command = command_in(text)
    code, text = run(command[command.index(str(SCRIPT)) + 1:], patch)
    assert code == 0, text


def test_a_cache_of_a_killed_run_is_removed_by_the_next(tmp_path):
    process = Process(arguments(tmp_path / "out", "--cache-dir", tmp_path, "--num-workers", 0))
    process.wait_for("epoch 1/4")
    process.kill()
    process.wait()
    assert len(list(tmp_path.glob("brain_tumor_cache_*"))) == 1
    code, text = run(arguments(tmp_path / "out", "--cache-dir", tmp_path, "--resume"))
    assert code == 0, text
    assert list(tmp_path.glob("brain_tumor_cache_*")) == []


def test_a_cache_without_room_is_only_said(tmp_path):
    patch = """
def full(*_):
    raise OSError(28, "No space left on device")
os.posix_fallocate = full
"""
    code, text = run(arguments(tmp_path / "out", "--epochs", 1, "--cache-dir", tmp_path), patch)
    assert code == 0 and "No space left" in text, text
    assert list(tmp_path.glob("brain_tumor_cache_*")) == []
