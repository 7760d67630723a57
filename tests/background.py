"""Runs of the script in processes of their own, with faults injected, started from one that has imported it already.

An import takes seconds; processes forked from a server that has done it start at once. Each runs main() with the
arguments of a command line, in a session of its own, its output in a log file.
"""

import atexit
import functools
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from conftest import FAST, ROOT, SCRIPT, script, tiny_build_model, tiny_network, write_data

os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests")])  # for the server, which imports the script
os.environ["OMP_NUM_THREADS"] = "1"  # these networks are too small to share between threads
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["background"])

TIMING = ("images_per_second", "seconds")  # columns of the history that differ between equal runs


# --- faults: functions of the script's module, called in the process of a run before main()


def no_pictures(script):
    """Pictures cost more time than an epoch here, and say nothing about what these tests ask."""
    for name in ("plot_samples", "plot_history", "plot_predictions", "plot_report"):
        setattr(script, name, lambda path, *_: script.write_file(path, b"a picture"))


def rising_dice(script, inner=script.validate):
    """Validation Dice that grows with every step, so that each epoch is better than the one before."""
    def validate(model, *args, **options):
        steps = next(value for name, value in model.named_buffers() if name.endswith("num_batches_tracked"))
        return inner(model, *args, **options) | {"dice": int(steps) / 1000}

    script.validate = validate


def kill_at(script, name, when="before"):
    """Killed before or after the rename that puts a file in place."""
    def replace(source, target, inner=os.replace):
        hit = os.path.basename(target) == name
        if hit and when == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        inner(source, target)
        if hit:
            os.kill(os.getpid(), signal.SIGKILL)

    os.replace = replace


def _child(argv, faults, log):
    os.setsid()
    if sys.version_info < (3, 14):  # what a run from the command line uses on Linux
        multiprocessing.set_start_method("fork", force=True)
    stream = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(stream, 1)
    os.dup2(stream, 2)
    sys.stdout, sys.stderr = (open(number, "w", closefd=False, encoding="utf-8") for number in (1, 2))
    sys.argv = [str(SCRIPT), *argv]
    for fault in faults:
        fault(script)
    sys.exit(script.main(argv))


STARTED = []


def end_all():
    """Kill what a failed test has left running."""
    while STARTED:
        process = STARTED.pop()
        if process.process.is_alive():
            process.kill(group=True)


class Process:
    """A run in the background. faults: importable functions (or partials of them) that get the script's module."""

    def __init__(self, argv, *faults, pictures=False, network=tiny_network):
        self.log = Path(tempfile.mkstemp(suffix=".log", dir=scratch())[1])
        faults = [*[no_pictures] * (not pictures), *[network] * (network is not None), *faults]
        self.process = SERVER.Process(target=_child, args=([str(word) for word in argv], faults, str(self.log)))
        self.process.start()
        self.pid = self.process.pid
        STARTED.append(self)

    @property
    def text(self):
        return self.log.read_text(encoding="utf-8", errors="replace")

    def wait(self, seconds=300):
        """The exit code; a negative one is the signal that killed the process."""
        self.process.join(seconds)
        if self.process.is_alive():
            os.killpg(self.pid, signal.SIGKILL)
            raise AssertionError(f"still running after {seconds} s:\n{self.text}")
        return self.process.exitcode

    def wait_for(self, words, seconds=200):
        """Until the output holds these words."""
        end = time.monotonic() + seconds
        while words not in self.text:
            assert self.process.is_alive() and time.monotonic() < end, f"never said {words!r}:\n{self.text}"
            time.sleep(0.02)

    def kill(self, signum=signal.SIGKILL, group=False):
        """Send a signal, unless the process has ended already."""
        try:
            (os.killpg if group else os.kill)(self.pid, signum)
        except ProcessLookupError:
            pass

    def workers(self):
        """Process numbers of the children."""
        return [int(pid) for pid in Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()]


def run(argv, *faults, **options):
    """Run to the end; returns (exit code, output)."""
    process = Process(argv, *faults, **options)
    code = process.wait()
    return code, process.text


@functools.cache
def scratch():
    """A folder for everything that several tests share, removed when they end."""
    folder = Path(tempfile.mkdtemp(prefix="trainer_tests_"))
    owner = os.getpid()
    atexit.register(lambda: os.getpid() == owner and shutil.rmtree(folder, ignore_errors=True))
    return folder


@functools.cache
def shared_data():
    """A data folder with 8 + 3 + 2 images of 64x64 pixels."""
    return write_data(scratch() / "data", 8, 3, 2, size=64)


def arguments(output, *more, data=None):
    """A command line for runs that can be compared to the last bit."""
    return [*FAST, "--batch-size", "2", "--num-workers", "2", "--epochs", "4", "--save-seconds", "0", "--data-dir",
            str(data or shared_data()), "--output-dir", str(output), *map(str, more)]


@functools.cache
def whole_run(*more, faults=()):
    """The output folder of 4 undisturbed epochs, with these options; not to be written into."""
    folder = scratch() / "_".join(["whole", *map(str, more), *(fault.__name__ for fault in faults)])
    code, text = run(arguments(folder, *more), *faults)
    assert code == 0, text
    return folder


def copy_run(source, target):
    """A copy of an output folder by hard links: files are replaced by the script, never changed in place.

    Without the lock file: a linked one would lock the original, too.
    """
    return shutil.copytree(source, target, copy_function=os.link, ignore=shutil.ignore_patterns(".brain_tumor.lock"))


def read(folder, name="unet_plusplus_last.pth"):
    return torch.load(folder / name, weights_only=True)


def differences(a, b, path=""):
    """Where two nested states differ, to the last bit."""
    if isinstance(a, torch.Tensor) or isinstance(b, torch.Tensor):
        return [] if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) and torch.equal(a, b) else [path]
    if isinstance(a, dict) and isinstance(b, dict):
        return [found for key in sorted({*a, *b}, key=str) if key not in TIMING
                for found in differences(a.get(key), b.get(key), f"{path}/{key}")]
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)) and len(a) == len(b):
        return [found for number, pair in enumerate(zip(a, b)) for found in differences(*pair, f"{path}/{number}")]
    return [] if a == b else [f"{path}: {a!r} is not {b!r}"]


def table_rows(folder):
    """training_history.csv without the timing columns."""
    lines = [line.split(",") for line in (folder / "training_history.csv").read_text().splitlines()]
    keep = [number for number, name in enumerate(lines[0]) if name not in TIMING]
    return [[line[number] for number in keep] for line in lines]


def assert_same_run(folder, other):
    """Two finished runs are the same: state, best model, history, scores."""
    assert differences(*(read(run) | {"settings": None} for run in (folder, other))) == []
    assert differences(read(folder, "unet_plusplus_best.pth"), read(other, "unet_plusplus_best.pth")) == []
    assert table_rows(folder) == table_rows(other)
    assert (folder / "test_metrics.csv").read_text() == (other / "test_metrics.csv").read_text()


def leftovers(folder):
    """Temporary files in an output folder."""
    return [path.name for path in Path(folder).rglob(".*.tmp")]


def load_best(folder):
    """The best checkpoint through load_model() and predict_mask(), or why it cannot be used."""
    if not (folder / script.BEST).is_file():
        return "there is none"
    try:
        metadata, problem = script.read_metadata(folder / script.BEST)
        with mock.patch.object(script, "build_model", tiny_build_model):
            model = script.load_model(folder / script.BEST, "cpu")
    except script.TrainerError as error:
        return str(error)
    finite = all(bool(value.isfinite().all()) for value in model.state_dict().values())
    mask = script.predict_mask(model, np.zeros((50, 70, 3), np.uint8))
    if problem:
        return problem
    return "" if finite and mask.shape == (50, 70) and metadata["settings"]["ENCODER"] == "resnet18" else "wrong"
