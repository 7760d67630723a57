"""Faults injected into real runs: kills, signals, full disks, bad numbers, too little memory, dead workers."""

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
    Process,
    arguments,
    assert_same_run,
    copy_run,
    differences,
    read,
    run,
    scratch,
    table_rows,
    whole_run,
)
from conftest import SCRIPT, script, write_data

BEST, LAST = script.BEST, script.LAST
CPU = torch.device("cpu")


def leftovers(folder):
    """Temporary files in an output folder, and caches of runs."""
    return [path.name for path in Path(folder).rglob(".*.tmp")]


def load_best(folder):
    """The best checkpoint through load_model() and predict_mask(), or why it cannot be used."""
    if not (folder / BEST).is_file():
        return "there is none"
    try:
        record, problem = script.read_record(folder / BEST)
        model = script.load_model(folder / BEST, "cpu")
    except script.TrainerError as error:
        return str(error)
    finite = all(bool(value.isfinite().all()) for value in model.state_dict().values())
    mask = script.predict_mask(model, np.zeros((50, 70, 3), np.uint8))
    return problem or ("" if finite and mask.shape == (50, 70) and record["encoder"] == "mobilenet_v2" else "wrong")


# --- SIGKILL

# Validation Dice that grows with every step, so that each epoch is better than the one before.
RISING = """
def validate(model, *args, inner=script.validate, **options):
    steps = next(value for name, value in model.named_buffers() if name.endswith("num_batches_tracked"))
    return inner(model, *args, **options) | {"dice": int(steps) / 1000}
script.validate = validate
"""


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


def command_in(text):
    """The words of the command that a stopped run prints last."""
    return shlex.split(text.strip().splitlines()[-1])


@pytest.mark.parametrize("group", [False, True], ids=["process", "whole group"])
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
def test_a_signal_ends_the_run_in_order(signum, group, tmp_path):
    caches = set(scratch().glob("brain_tumor_cache_*"))
    process = Process(arguments(tmp_path, "--epochs", 300))
    process.wait_for("epoch   2/300")
    workers = process.workers()
    assert len(workers) == 2
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


# --- numbers that are not finite


class Faulty(torch.nn.Module):
    """The default criterion, spoilt at chosen calls. spoil: loss -> loss."""

    def __init__(self, calls, spoil):
        super().__init__()
        self.inner, self.calls, self.spoil, self.seen = script.LOSSES["dice_bce"](), calls, spoil, 0

    def forward(self, logits, targets):
        loss = self.inner(logits, targets)
        self.seen += 1
        return self.spoil(loss) if self.seen in self.calls else loss


class SpoiltGradient(torch.autograd.Function):
    """A finite loss whose gradient is not."""

    @staticmethod
    def forward(ctx, loss, value):
        ctx.value = value
        return loss.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * ctx.value, None


SPOILS = {"NaN loss": lambda loss: loss * float("nan"), "infinite loss": lambda loss: loss + float("inf"),
          "NaN gradient": lambda loss: SpoiltGradient.apply(loss, float("nan")),
          "infinite gradient": lambda loss: SpoiltGradient.apply(loss, float("inf"))}


def settings(**changes):
    cfg = script.default_settings()
    vars(cfg).update({"PRECISION": "float32", "DEVICE": "cpu", "ACCUMULATION_STEPS": 1} | changes)
    return cfg


def fresh_model():
    torch.manual_seed(0)
    return script.build_model("mobilenet_v2", None)[0]


def batches(sizes, seed=0):
    """Batches as the loader sends them."""
    rng = np.random.default_rng(seed)
    return [(rng.integers(0, 256, (size, 64, 64, 3), np.uint8), (rng.random((size, 64, 64)) < 0.3).astype(np.uint8))
            for size in sizes]


def one_epoch(loader, criterion, model=None, cfg=None, guard=None):
    """Train fresh weights on these batches; returns (statistics, [weights and buffers, optimizer state])."""
    cfg, model = cfg or settings(), model or fresh_model()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, fused=True)
    scaler = script.make_scaler("float32", CPU)
    stats = script.train_one_epoch(model, loader, criterion, optimizer, scaler, CPU, cfg=cfg, guard=guard)
    return stats, [model.state_dict(), optimizer.state_dict()["state"]]


@pytest.mark.parametrize("spoil", SPOILS)
def test_a_bad_step_leaves_no_trace(spoil):
    good, bad, last = batches([2, 2, 2])
    stats, state = one_epoch([good, bad, last], Faulty([2], SPOILS[spoil]))
    expected_stats, expected = one_epoch([good, last], Faulty([], None))
    assert stats["dropped"] == 1 and expected_stats["dropped"] == 0 and stats["persistent"] == 0
    assert differences(state, expected) == []  # weights, BatchNorm's statistics, moments and step counts
    assert stats["train_loss"] == expected_stats["train_loss"]


@pytest.mark.parametrize("spoil", SPOILS)
def test_a_bad_batch_drops_its_whole_group(spoil):
    loader = batches([2, 2, 2, 2, 2, 2])
    cfg = settings(ACCUMULATION_STEPS=2)
    stats, state = one_epoch(loader, Faulty([3], SPOILS[spoil]), cfg=cfg)
    _, expected = one_epoch(loader[:2] + loader[4:], Faulty([], None), cfg=cfg)
    assert stats["dropped"] == 1
    assert differences(state, expected) == []


def test_a_bad_image_does_not_reach_batchnorm():
    """NaN pixels spoil the running statistics in the forward pass already."""
    good, bad, last = batches([2, 2, 2])
    poison = torch.full((2, 3, 64, 64), float("nan")), torch.zeros(2, 1, 64, 64)
    stats, state = one_epoch([good, poison, last], Faulty([], None))
    _, expected = one_epoch([good, last], Faulty([], None))
    assert stats["dropped"] == 1 and differences(state, expected) == []


def test_many_bad_steps_are_called_persistent():
    loader = batches([2] * 4)
    assert one_epoch(loader, Faulty([1, 2, 3], SPOILS["NaN loss"]))[0]["persistent"] == 1
    assert one_epoch(loader, Faulty([1, 2], SPOILS["NaN loss"]))[0]["persistent"] == 0


# In a run: the criterion is spoilt in chosen calls of the training (gradients are on there).
def bad_run(condition):
    return """
state = types.SimpleNamespace(step=0, precision=None)
def autocast(precision, device, inner=script.autocast):
    state.precision = precision
    return inner(precision, device)
script.autocast = autocast
class Criterion(torch.nn.Module):
    inner = script.LOSSES["dice_bce"]()
    def forward(self, logits, targets):
        loss = self.inner(logits, targets)
        if torch.is_grad_enabled():
            state.step += 1
            if CONDITION:
                loss = loss * float("nan")
        return loss
script.LOSSES["dice_bce"] = Criterion
""".replace("CONDITION", condition).replace("\nstate", "\nimport types\nstate", 1)


def finite_files(folder):
    def finite(value):
        if isinstance(value, torch.Tensor):
            return bool(torch.isfinite(value).all())
        items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        return all(map(finite, items))

    return finite(read(folder, BEST)) and finite(read(folder, LAST))


def test_a_dropped_step_is_shown_in_the_line_and_the_table(tmp_path):
    code, text = run(arguments(tmp_path, "--epochs", 2), bad_run("state.step == 6"))
    assert code == 0, text
    lines = [line for line in text.splitlines() if line.startswith("epoch ")]
    assert "dropped" not in lines[0] and "dropped 1" in lines[1]
    rows = table_rows(tmp_path)
    assert [row[rows[0].index("dropped")] for row in rows[1:]] == ["0", "1"]
    assert finite_files(tmp_path)


def test_persistent_trouble_goes_back_once_and_on_in_float32(tmp_path):
    patch = bad_run("state.step > 5 and state.precision != 'float32'")
    code, text = run(arguments(tmp_path, "--epochs", 3, "--precision", "bfloat16"), patch)
    assert code == 0, text
    assert text.count("Going back to the end of epoch 1 and on in float32") == 1
    assert [row[0] for row in table_rows(tmp_path)[1:]] == ["1", "2", "3"]
    assert finite_files(tmp_path) and load_best(tmp_path) == ""
    # The rest is what float32 gives after one epoch in bfloat16.
    first = tmp_path / "first"
    assert run(arguments(first, "--epochs", 1, "--precision", "bfloat16"))[0] == 0
    assert run(arguments(first, "--epochs", 3, "--precision", "float32", "--resume"))[0] == 0
    assert differences(read(first)["model"], read(tmp_path)["model"]) == []
    # And a resumed run stays in float32.
    code, text = run(arguments(tmp_path, "--epochs", 4, "--precision", "bfloat16", "--resume"),
                     bad_run("state.precision != 'float32'"))
    assert code == 0 and "Going back" not in text, text


def test_persistent_trouble_in_float32_stops_with_an_explanation(tmp_path):
    code, text = run(arguments(tmp_path, "--epochs", 3), bad_run("state.step > 5"))
    assert code == 1, text
    assert text.count("Going back to the end of epoch 1") == 1
    assert "also after going back" in text and "LR" in text and "Traceback" not in text
    assert read(tmp_path)["epoch"] == 1 and finite_files(tmp_path) and load_best(tmp_path) == ""


def test_trouble_from_the_first_step_on_leaves_an_earlier_run_alone(tmp_path):
    folder = copy_run(whole_run(), tmp_path / "out")
    code, text = run(arguments(folder, "--seed", 5), bad_run("True"))
    assert code == 1 and "Going back to the end of epoch 0" in text and "also after going back" in text
    assert_same_run(folder, whole_run())


def test_trouble_in_the_first_epoch_only_goes_back_to_the_start(tmp_path):
    code, text = run(arguments(tmp_path, "--precision", "bfloat16"), bad_run("state.precision != 'float32'"))
    assert code == 0 and "Going back to the end of epoch 0" in text, text
    assert differences(read(tmp_path)["model"], read(whole_run())["model"]) == []


def test_a_validation_loss_that_is_not_finite_goes_back(tmp_path):
    patch = """
def validate(*args, cfg, inner=script.validate, **options):
    return inner(*args, cfg=cfg, **options) | ({"valid_loss": float("nan")} if cfg.PRECISION != "float32" else {})
script.validate = validate
"""
    code, text = run(arguments(tmp_path, "--epochs", 1, "--precision", "bfloat16"), patch)
    assert code == 0 and "Going back" in text and finite_files(tmp_path), text


@pytest.mark.parametrize("spoil", ["model.state_dict()['encoder.features.0.0.weight'][0] = float('nan')",
                                   "model.state_dict()['encoder.features.0.1.running_var'][0] = float('inf')"])
def test_no_checkpoint_holds_a_number_that_is_not_finite(spoil, tmp_path):
    """Whatever goes wrong between validation and checkpoint, the files of the epoch before stay as they are."""
    patch = RISING + f"""
def spoilt(model, *args, inner=script.validate, **options):
    scores = inner(model, *args, **options)
    if scores["dice"] > 0.005:  # four steps an epoch: the second one
        {spoil}
    return scores
script.validate = spoilt
"""
    code, text = run(arguments(tmp_path), patch)
    assert code == 1 and "not finite" in text and "Traceback" not in text, text
    assert read(tmp_path)["epoch"] == 1 and finite_files(tmp_path) and load_best(tmp_path) == ""


# --- out of memory


class Limited(torch.nn.Module):
    """A model for at most `most` images at a time. BatchNorm is frozen, so that micro-batches must not matter."""

    def __init__(self, most, frozen=True):
        super().__init__()
        self.inner, self.most, self.sizes = fresh_model(), most, []
        for module in self.inner.modules():
            if frozen and isinstance(module, torch.nn.BatchNorm2d):
                module.eval()
                module.train = lambda mode=True, module=module: module

    def forward(self, images):
        out = self.inner(images)  # first the forward pass, which changes BatchNorm's statistics
        self.sizes.append(len(images))
        if len(images) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory (injected)")
        return out


class Recorder(torch.optim.SGD):
    """Keeps the gradients of each step and changes nothing."""

    def step(self, closure=None):
        self.gradients = [p.grad.clone() for group in self.param_groups for p in group["params"] if p.grad is not None]


def gradients(model, sizes, accumulation=1):
    recorder = Recorder(model.parameters(), 0.0)
    cfg = settings(ACCUMULATION_STEPS=accumulation, GRAD_CLIP=0.0)
    stats = script.train_one_epoch(model, batches(sizes), script.LOSSES["dice_bce"](), recorder,
                                   script.make_scaler("float32", CPU), CPU, cfg=cfg)
    return torch.cat([gradient.flatten() for gradient in recorder.gradients]), stats


@pytest.mark.parametrize("sizes, accumulation, most", [([8], 1, 4), ([8], 1, 1), ([7], 1, 3), ([5, 3], 2, 2)])
def test_micro_batches_give_the_gradient_of_the_whole_batch(sizes, accumulation, most, capfd):
    whole, expected = gradients(Limited(100), sizes, accumulation)
    model = Limited(most)
    parts, stats = gradients(model, sizes, accumulation)
    assert "out of GPU memory" in capfd.readouterr().err
    assert (parts - whole).norm() < 1e-3 * whole.norm()  # float32 sums in another order
    assert stats["train_loss"] == pytest.approx(expected["train_loss"], rel=1e-5)
    assert stats["dropped"] == 0 and max(model.sizes[-2:]) <= most


def test_the_batch_size_is_halved_until_it_fits_and_stays_there(capfd):
    model = Limited(2)
    gradients(model, [8, 8])
    assert model.sizes == [8, 4, 2, 2, 2, 2, 2, 2, 2, 2]
    err = capfd.readouterr().err
    assert "at most 4 image(s)" in err and "at most 2 image(s)" in err and "BatchNorm" in err


def test_a_repeated_step_counts_once_for_batchnorm():
    """What the failed forward passes did to the running statistics is undone."""
    tried, direct = Limited(2, frozen=False), Limited(100, frozen=False)
    guard = script.StepGuard(direct, CPU)
    guard.micro_batch = 2
    one_epoch(batches([8]), Faulty([], None), model=tried)
    one_epoch(batches([8]), Faulty([], None), model=direct, guard=guard)
    assert tried.sizes == [8, 4, 2, 2, 2, 2] and direct.sizes == [2, 2, 2, 2]
    assert differences(tried.state_dict(), direct.state_dict()) == []


def test_memory_that_runs_out_in_the_backward_pass_is_handled_too():
    class Late(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            if len(gradient) > 2:
                raise torch.OutOfMemoryError("CUDA out of memory (injected)")
            return gradient

    class Model(Limited):
        def forward(self, images):
            return Late.apply(self.inner(images))

    whole, _ = gradients(Limited(100), [4])
    parts, _ = gradients(Model(100), [4])
    assert (parts - whole).norm() < 1e-3 * whole.norm()


def test_not_even_one_image_fits():
    with pytest.raises(script.TrainerError) as caught:
        gradients(Limited(0), [4])
    assert caught.value.exit_code == 1
    assert all(word in str(caught.value) for word in ("single image", "IMG_SIZE", "ENCODER", "--device cpu"))


def test_validation_halves_its_batches():
    loader = batches([6, 5])
    criterion, model = script.LOSSES["dice_bce"](), Limited(2)
    expected = script.validate(Limited(100), loader, criterion, CPU, cfg=settings())
    assert script.validate(model, loader, criterion, CPU, cfg=settings()) == pytest.approx(expected, rel=1e-4)
    assert {size for size in model.sizes if size <= 2} == {1, 2}
    with pytest.raises(script.TrainerError, match="single image"):
        script.validate(Limited(0), loader, criterion, CPU, cfg=settings())


def test_prediction_without_memory_gives_the_remedies():
    model = Limited(0)
    model.prediction_settings = {"img_size": 64, "mean": script.MEAN, "std": script.STD, "threshold": 0.5}
    with pytest.raises(script.TrainerError, match="IMG_SIZE"):
        script.predict_mask(model, np.zeros((50, 50, 3), np.uint8))


def test_a_run_goes_on_after_running_out_of_memory(tmp_path):
    patch = """
def forward(self, images, inner=script.smp.UnetPlusPlus.forward):
    if len(images) > 1:
        raise torch.OutOfMemoryError("CUDA out of memory (injected)")
    return inner(self, images)
script.smp.UnetPlusPlus.forward = forward
"""
    code, text = run(arguments(tmp_path, "--epochs", 2), patch)
    assert code == 0, text
    assert text.count("out of GPU memory") == 1 and "Traceback" not in text
    assert len(table_rows(tmp_path)) == 3


@pytest.mark.parametrize("place", ["torch.optim.AdamW.step", "torch.nn.Module.to", "script.to_input"])
def test_memory_that_runs_out_elsewhere_gives_a_message(place, tmp_path):
    patch = f"""
def fail(*_, **__):
    raise torch.OutOfMemoryError("CUDA out of memory (injected)")
{place} = fail
"""
    code, text = run(arguments(tmp_path), patch)
    assert code == 1 and "memory" in text and "Traceback" not in text, text
    assert "--resume" not in text  # there is nothing to resume


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
