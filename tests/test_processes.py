"""Several processes (gloo, on the CPU) do what one process does; and the end of one is the end of all.

Nearly all are forked from a server that has imported the script, and meet at a store of the test as they do at one of
torchrun, whose own start costs three imports.
"""

import contextlib
import hashlib
import itertools
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import threading
from functools import cache, partial
from pathlib import Path

import background
import pytest
import torch
import torch.distributed as dist
from background import TIMING, Process, copy_run, read, run, scratch
from conftest import SCRIPT, script, tiny_build_model, warmup_and_plateau, write_data
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="processes and their environment are read from /proc")
TIMEOUT = 300  # seconds; whatever takes longer hangs


# --- faults: functions of the script's module, see background.Process


def member(script, rank, port, each, folder):
    """What torchrun tells one of two processes, `each` of them on a machine, and a folder for temporary files."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank % each), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": str(each),
                   "MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True",
                   "TORCHELASTIC_RESTART_COUNT": "0"}
    tempfile.tempdir = folder


def together(argv, *faults, machines=1, meanwhile=None, **options):
    """main() in two processes that train together. Returns (exit codes, outputs), by rank."""
    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    folders = [tempfile.mkdtemp(dir=scratch()) for _ in range(machines)]
    started = [Process(argv, partial(member, rank=rank, port=store.port, each=2 // machines, folder=folders[-rank]),
                       *faults, **options) for rank in range(2)]
    if meanwhile:
        meanwhile(*started)
    codes = [process.wait(TIMEOUT) for process in started]
    assert [os.listdir(folder) for folder in folders] == [[]] * machines, "a cache is left over"
    return codes, [process.text for process in started]


def plain_model(*_):
    """No BatchNorm, whose result depends on how a batch is parted, and no dropout."""
    return torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3, padding=1), torch.nn.ReLU(), torch.nn.Conv2d(4, 1, 1)), "random"


def plain_network(script):
    """plain_model() in one memory format, so that rounding is the same on all processors."""
    script.build_model, script.build_schedulers = plain_model, warmup_and_plateau
    script.memory_format = lambda device: torch.contiguous_format


def plain_sgd(script):
    """It shows a wrong scale of the gradient, which AdamW and clipping hide."""
    script.torch.optim.AdamW = torch.optim.SGD


def note(notes, what):
    """A line with the rank of the process, in a file."""
    with open(notes, "a") as file:
        file.write(f"{script.rank()} {what}\n")


def count_exchanges(script, notes):
    """Note every exchange of gradients."""
    def exchange(_, bucket):
        if bucket.is_last():
            note(notes, "exchange")
        return allreduce_hook(None, bucket)

    def wrap(*arguments, inner=torch.nn.parallel.DistributedDataParallel, **options):
        wrapped = inner(*arguments, **options)
        wrapped.register_comm_hook(None, exchange)
        return wrapped

    torch.nn.parallel.DistributedDataParallel = wrap


def digest(state):
    """Of all tensors of a state_dict."""
    return hashlib.sha256(b"".join(value.numpy().tobytes() for value in state.values())).hexdigest()


def spy(script, notes):
    """Note which process reads, audits, opens a cache, writes, and which model it validates."""
    def call(inner, describe, name, *arguments, **options):
        note(notes, f"{name} {describe(arguments[0])}")
        return inner(*arguments, **options)

    for name, describe in {"read_image": str, "print_audit": len, "open_cache": type, "write_file": str,
                           "validate": lambda model: digest(model.state_dict())}.items():
        setattr(script, name, partial(call, getattr(script, name), describe, name))


def download(script, origin):
    """ImageNet weights that the first process gets, or not; without them the weights are others."""
    def build_model(_encoder, weights, _architecture):
        assert not (weights and script.rank())  # one process asks the network
        torch.manual_seed(script.rank())
        return tiny_build_model()[0], origin if weights else "random"

    script.build_model = build_model


def broken_step(script, error, inner=script.to_target):
    """Process 1 fails in every step."""
    def to_target(*arguments):
        if script.rank() == 1:
            raise error
        return inner(*arguments)

    script.to_target = to_target


def nan_loss(script):
    """The loss is not finite in process 1."""
    script.LOSSES["dice_bce"] = lambda logits, targets: script.dice_bce(logits, targets) * (
        math.nan if script.rank() else 1)


# --- equal numbers

# 8 training images in batches of 3, 3 and 2: of the first two, process 0 gets two images and process 1 gets one.
CASES = {
    "sgd": (["--lr", "0.05", "--grad-clip", "0", "--ema-epochs", "0.5"], [plain_sgd], 3),
    "clipped": (["--lr", "0.5", "--grad-clip", "0.01", "--accumulation-steps", "2"], [plain_sgd], 2),
    "adamw": (["--lr", "0.01", "--accumulation-steps", "2", "--loss", "focal_tversky"], [], 2),
}


def arguments(output, *more, data=None):
    """A command line for two epochs."""
    common = ["--batch-size", "3", "--num-workers", "0", "--epochs", "2", "--warmup-steps", "2"]
    return background.arguments(output, *common, *more, data=data)


@cache
def case(name):
    """Two epochs of a case: (output folder of one process, of two, rank of each exchange of gradients)."""
    (options, faults, _), folder, notes = CASES[name], scratch() / "processes" / name, scratch() / f"{name}.notes"
    code, output = run(arguments(folder / "1", *options), *faults, network=plain_network)
    codes, outputs = together(arguments(folder / "2", *options), *faults, partial(count_exchanges, notes=notes),
                              network=plain_network)
    assert [*codes, code] == [0, 0, 0], [*outputs, output]
    return folder / "1", folder / "2", [line.split()[0] for line in notes.read_text().splitlines()]


def assert_alike(folder, other):
    """Two runs from the same start arrived at the same weights, EMA and scores, rounding apart."""
    mine, theirs = read(folder), read(other)
    torch.manual_seed(theirs["settings"]["used"]["SEED"])
    start = plain_model()[0].state_dict()
    for name, key in itertools.product(("model", "ema"), start):
        moved, difference = (state[name][key] - theirs[name][key] for state in ({name: start}, mine))
        assert moved.norm() > 1e-3 and difference.norm() < 1e-3 * moved.norm(), (name, key)
    for row, expected in zip(mine["history"], theirs["history"], strict=True):
        for key in expected.keys() - set(TIMING):  # a pixel near the threshold may fall to the other side
            assert row[key] == pytest.approx(expected[key], rel=1e-4, abs=0 if "loss" in key else 2e-3), key
    found, expected = (json.loads((path / "unet_plusplus_best.json").read_text()) for path in (folder, other))
    for name in ("valid_metrics", "test_metrics"):
        assert found[name]["dice"] == pytest.approx(expected[name]["dice"], abs=0.02), name


@pytest.mark.parametrize("name", list(CASES))
def test_weights_ema_and_scores_equal_those_of_one_process(name):
    """And gradients are exchanged once per step, by both."""
    one, two, exchanges = case(name)
    assert_alike(two, one)
    assert exchanges.count("0") == exchanges.count("1") == 2 * CASES[name][2]


def test_a_run_goes_on_with_another_number_of_processes(tmp_path):
    """From one to two ends where from two to one does."""
    one, two, _ = case("adamw")
    copy_run(one, tmp_path / "12")
    copy_run(two, tmp_path / "21")
    options = [*CASES["adamw"][0], "--epochs", "4", "--resume"]
    codes, outputs = together(arguments(tmp_path / "12", *options), network=plain_network)
    code, output = run(arguments(tmp_path / "21", *options), network=plain_network)
    assert [*codes, code] == [0, 0, 0], [*outputs, output]
    assert outputs[0].count("Continuing after epoch 2") == 1
    assert_alike(tmp_path / "12", tmp_path / "21")
    assert read(tmp_path / "12")["steps"] == 4 * 2


def test_evaluation_gives_the_numbers_of_one_process(tmp_path):
    """Of the same model: to the last bit, because every image is scored by itself."""
    one, again = case("sgd")[0], tmp_path / "again"
    copy_run(one, again)
    codes, outputs = together(arguments(again, "--evaluate"), network=plain_network)
    assert codes == [0, 0] and outputs[1] == "", outputs  # the first one does it alone
    assert (again / "evaluation" / "test_metrics.csv").read_text() == (one / "test_metrics.csv").read_text()
    found, record = (json.loads(path.read_text()) for path in (again / "evaluation" / "scores.json",
                                                               one / "unet_plusplus_best.json"))
    assert found["valid_metrics"] == record["valid_metrics"] and found["test_metrics"] == record["test_metrics"]


def test_fewer_validation_images_than_processes(tmp_path):
    data = write_data(tmp_path / "data", train=4, valid=1, test=1, size=64)
    codes, outputs = together(arguments(tmp_path / "2", "--lr", "0.01", data=data), network=plain_network)
    code, output = run(arguments(tmp_path / "1", "--lr", "0.01", data=data), network=plain_network)
    assert [*codes, code] == [0, 0, 0], [*outputs, output]
    assert_alike(tmp_path / "2", tmp_path / "1")


# --- who does what


@pytest.fixture(scope="module")
def spied():
    """Two epochs in two processes, with BatchNorm: (output folder, outputs, notes)."""
    root = scratch() / "processes" / "spied"
    data = write_data(root / "data", train=7, valid=3, test=3, size=64)
    codes, outputs = together(arguments(root / "out", "--num-workers", "1", data=data),
                              partial(spy, notes=root / "notes"))
    assert codes == [0, 0], outputs
    return root / "out", outputs, (root / "notes").read_text().splitlines()


def test_one_process_audits_decodes_caches_writes_and_speaks(spied):
    folder, outputs, notes = spied
    assert [line for line in notes if line.startswith("1 ") and not line.startswith("1 validate")] == []
    for what, files in (("print_audit", 1), ("open_cache", 1), ("read_image", 7 + 3 + 3)):
        found = [line for line in notes if line.startswith(f"0 {what} ")]
        assert len(found) == len(set(found)) == files, what
    for words in ("2 processes", "\nData", "  1/2 ", "  2/2 ", "Best validation Dice", "Threshold"):
        assert outputs[0].count(words) == 1, words
    assert outputs[1] == ""
    written = {path.name for path in folder.iterdir()} - {".brain_tumor.lock"}
    assert written == {name for name in script.RUN_FILES if not name.endswith(".pdf")} - {*script.LABEL_CHECK}


def test_all_processes_validate_the_model_that_is_saved(spied):
    """Each has BatchNorm statistics of its own until those of the first are shared before validation."""
    folder, _, notes = spied
    zero, one = ([line.split()[2] for line in notes if line.startswith(f"{rank} validate ")] for rank in range(2))
    assert len(set(zero)) == 2 and zero == one  # two epochs
    assert one[-1] == digest(read(folder)["ema"])


def test_every_machine_reads_its_data_once(tmp_path):
    """Two machines with one process each: each has its own cache, in its own folder for temporary files."""
    data = write_data(tmp_path / "data", train=4, valid=2, test=0, size=64)
    codes, outputs = together(arguments(tmp_path / "out", "--epochs", "1", data=data),
                              partial(spy, notes=tmp_path / "notes"), machines=2)
    assert codes == [0, 0], outputs
    notes = (tmp_path / "notes").read_text()
    for rank in range(2):
        assert (notes.count(f"{rank} open_cache"), notes.count(f"{rank} read_image")) == (1, 6)
        assert outputs[rank].count("\nData") == 1 - rank  # one audit is printed


@pytest.mark.parametrize("origin, rate", [("random (no network)", 0.02), ("imagenet (torchvision)", 0.01)])
def test_the_first_process_gets_the_weights_and_decides_about_the_learning_rate(origin, rate, tmp_path):
    argv = arguments(tmp_path / "out", "--epochs", "1", "--lr", "0.01", "--lr-from-scratch", "0.02",
                     "--encoder-weights", "imagenet")
    codes, outputs = together(argv, partial(download, origin=origin), partial(spy, notes=tmp_path / "notes"))
    assert codes == [0, 0], outputs
    state = read(tmp_path / "out")
    assert state["weights_from"] == origin and state["optimizer"]["param_groups"][0]["lr"] == pytest.approx(rate)
    assert f"Learning rate {rate}" in outputs[0] and f"(weights: {origin.removesuffix(' (no network)')})" in outputs[0]
    # With another start or another rate in process 1, its weights would be others.
    zero, one = [line.split()[2] for line in (tmp_path / "notes").read_text().splitlines() if " validate " in line]
    assert zero == one


def idle_weights(script):
    """A network with weights that take no part, as some encoders of smp have."""
    def build_model(*_):
        model = plain_model()[0]
        model[0].register_parameter("idle", torch.nn.Parameter(torch.ones(3)))
        return model, "random"

    script.build_model = build_model


def test_weights_that_take_no_part_do_not_end_the_run(tmp_path):
    codes, outputs = together(arguments(tmp_path / "out", "--epochs", "2"), idle_weights)
    assert codes == [0, 0], outputs


# --- ends


@pytest.mark.parametrize("what, message", [("a damaged image", "1 image cannot be used"),
                                           ("a folder in use", "another run is using"),
                                           ("one training image", "there are fewer training images than processes")])
def test_what_no_process_can_use_ends_all_with_one_message(what, message, tmp_path):
    data = write_data(tmp_path / "data", train=1 if what == "one training image" else 4, valid=2, test=0, size=64)
    (tmp_path / "out").mkdir()
    if what == "a damaged image":
        (data / "train" / "slice_1.png").write_bytes(b"cut short")
    with script.lock_folder(tmp_path / "out") if what == "a folder in use" else contextlib.nullcontext():
        codes, outputs = together(arguments(tmp_path / "out", data=data))
    assert codes == [2, 2] and "Traceback" not in outputs[0]
    assert outputs[0].count("error: ") == outputs[0].count(message) == 1 and outputs[1] == ""  # the first has said it


@pytest.mark.parametrize("error, message", [
    (ValueError("unheard of"), "error (process 1): unexpected error"),
    (torch.OutOfMemoryError("out of memory"),
     "error (process 1): memory ran out (out of memory). To continue after the last saved epoch with a safer setting, "
     "add to the same command: --resume --batch-size 2 --accumulation-steps 2\n")])
def test_an_error_in_another_process_is_printed_with_its_rank_and_ends_all(error, message, tmp_path):
    codes, outputs = together(arguments(tmp_path / "out", "--batch-size", "4"), partial(broken_step, error=error))
    assert codes == [1, 1], outputs
    assert outputs[1].count(message) == outputs[1].count("--resume") == 1
    assert ("unheard of" in outputs[1]) == ("Traceback" in outputs[1]) == isinstance(error, ValueError)
    assert read(tmp_path / "out")["epoch"] == 0  # the state to go on from


@pytest.mark.parametrize("precision, words", [("bfloat16", "--resume --precision float32"),
                                              ("float32", "in float32, and it would happen again")])
def test_a_loss_that_is_not_finite_ends_all_with_one_message_that_helps(precision, words, tmp_path):
    argv = arguments(tmp_path / "out", "--precision", precision)
    codes, outputs = together(argv, nan_loss)
    assert codes == [1, 1] and outputs[0].count("epoch 1: the loss is not finite") == outputs[0].count(words) == 1
    assert outputs[1] == "" and "Traceback" not in outputs[0]
    assert read(tmp_path / "out")["epoch"] == 0  # the state to continue from


@pytest.mark.parametrize("hit, signum, codes", [((0, 1), signal.SIGTERM, [143, 143]), ((1,), signal.SIGKILL, [1, -9])])
def test_the_end_of_one_is_the_end_of_all(hit, signum, codes, tmp_path):
    """Also when nobody passes a signal on: who waits for a dead process hears of it."""
    def end(*started):
        started[0].wait_for(" 2/5000 ")  # then the first epoch's state is written
        for rank in hit:
            started[rank].kill(signum)

    argv = arguments(tmp_path / "out", "--epochs", "5000", "--early-stopping-patience", "0", "--num-workers", "1")
    found, outputs = together(argv, meanwhile=end)
    assert found == codes, outputs
    assert [output.count(script.HOW_TO_RESUME) for output in outputs] == [1, 0]
    assert ("Traceback" in "".join(outputs)) == (signum == signal.SIGKILL)
    assert read(tmp_path / "out")["epoch"] >= 1  # complete


def test_ctrl_c_stops_torchrun_and_all_it_started_and_the_run_can_go_on(tmp_path):
    """As a user starts it, with the real network. torchrun gets Ctrl-C from the terminal and passes it on."""
    argv, temporary = arguments(tmp_path / "out", "--early-stopping-patience", "0"), tmp_path / "tmp"
    temporary.mkdir()
    process = subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(SCRIPT), *argv,
         "--epochs", "5000"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8",
        start_new_session=True, env=os.environ | {"TMPDIR": str(temporary)})
    alarm = threading.Timer(TIMEOUT, kill_all, (temporary,))
    alarm.start()
    output = ""
    while " 1/5000 " not in output:
        output += (line := process.stdout.readline())
        assert line, output
    process.send_signal(signal.SIGINT)
    output += process.communicate()[0]  # until the last process with this pipe has ended
    alarm.cancel()
    assert process.returncode != 0 and list(temporary.glob("brain_tumor*")) == []
    assert output.count(script.HOW_TO_RESUME) == output.count("Stopped.") == 1
    assert f"{SCRIPT.name}\", line" not in output, output  # no trace of ours
    epochs = read(tmp_path / "out")["epoch"]
    codes, outputs = together([*argv, "--epochs", str(epochs + 1), "--resume"], network=None)
    assert codes == [0, 0] and f"Continuing after epoch {epochs}" in outputs[0], outputs
    assert outputs[0].count(f"  {epochs + 1}/{epochs + 1} ") == outputs[0].count("Threshold") == 1
    script.build_model("resnet18")[0].load_state_dict(read(tmp_path / "out", script.BEST))


def kill_all(temporary):
    """Kill all processes with this folder for temporary files."""
    for environ in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if f"TMPDIR={temporary}".encode() in environ.read_bytes().split(b"\0"):
                os.kill(int(environ.parent.name), signal.SIGKILL)
