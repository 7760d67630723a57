"""Two processes under torchrun (gloo, on the CPU) do what one process does; and an end of one is the end of both."""

import csv
import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from pathlib import Path

import numpy as np
import pytest
import segmentation_models_pytorch as smp
import torch
from conftest import FAST, ROOT, SCRIPT, script, write_data

pytestmark = pytest.mark.skipif(os.name == "nt", reason="torchrun with gloo and process groups as on Linux and macOS")
TIMEOUT = 150  # seconds; whatever takes longer hangs


def start(program, *arguments, processes=2, **env):
    """torchrun as a user starts it, its output collected in one pipe; an environment variable marks all it starts."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", program]
    mark = f"TEST_RUN={uuid.uuid4().hex}"
    process = subprocess.Popen(
        [*map(str, command), *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8",
        start_new_session=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "TEST_RUN": mark.split("=")[1]} | env)
    process.mark = mark
    return process


def finish(process):
    """Wait for the end of all processes. Returns (exit code, output); a hang fails."""
    try:
        output = process.communicate(timeout=TIMEOUT)[0]
    except subprocess.TimeoutExpired:
        kill_all(process)
        pytest.fail("hangs; its output: " + process.communicate()[0])
    wait_for(lambda: not members(process), "processes are left over")
    return process.returncode, output


def kill_all(process):
    """torchrun and all it started."""
    for pid in members(process):
        os.kill(pid, signal.SIGKILL)


def wait_for(condition, complaint, seconds=30):
    """Until the condition holds; a test fails if it does not come true."""
    for _ in range(10 * seconds):
        if condition():
            return
        time.sleep(0.1)
    pytest.fail(complaint)


def members(process, *marks):
    """Living processes that carry the mark in their environment; each rank is the leader of its own session."""
    found = []
    for environ in Path("/proc").glob("[0-9]*/environ"):
        try:
            content = environ.read_bytes().split(b"\0")  # empty for a zombie
        except OSError:
            continue
        if all(mark.encode() in content for mark in (process.mark, *marks)):
            found.append(int(environ.parent.name))
    return found


def until(process, text):
    """Read output up to a line with the text. Returns what was read."""
    seen, alarm = "", threading.Timer(TIMEOUT, kill_all, (process,))
    alarm.start()
    for line in process.stdout:
        seen += line
        if text in line:
            alarm.cancel()
            return seen
    pytest.fail(f"{text!r} did not come; the output was: {seen}")


def run_arguments(root, *more):
    """Options for a whole run on root/data."""
    for name in ("out", "cache"):
        (root / name).mkdir(exist_ok=True)
    return [*FAST, "--data-dir", root / "data", "--output-dir", root / "out", "--cache-dir", root / "cache", *more]


def history(root):
    with open(root / "out" / "training_history.csv", newline="") as file:
        return list(csv.DictReader(file))


# --- equal numbers: the same driver in one process and in two ---

DRIVER = '''
import json, sys
from pathlib import Path
import torch
import brain_tumor_integrated_smp as script
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

def frozen_model():
    """A small UNet++ whose BatchNorm has sensible statistics and keeps them."""
    torch.manual_seed(0)
    model = script.smp.UnetPlusPlus("resnet18", encoder_weights=None, classes=1, decoder_channels=(64, 32, 16, 8, 8))
    model = model.to(memory_format=script.memory_format(torch.device("cpu")))
    images = torch.randint(0, 256, (4, 64, 64, 3), dtype=torch.uint8)
    for _ in range(8):
        model(script.to_input(images, torch.device("cpu")))
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()
            module.train = lambda mode=True: None
    return model

def distributed(model):
    """The model as Run wraps it, and a list that grows with every exchange of gradients."""
    exchanges = []
    if script.world_size() == 1:
        return model, exchanges
    model = torch.nn.parallel.DistributedDataParallel(model, forward_sync_buffers=False)

    def hook(_, bucket):
        exchanges.extend([1] * bucket.is_last())
        return allreduce_hook(None, bucket)

    model.register_comm_hook(None, hook)
    return model, exchanges

def run(data, cases):
    """Metrics of the untrained model, and weights after an epoch or two of every case."""
    cfg = script.default_settings()
    vars(cfg).update(DATA_DIR=data, CACHE_DIR=data, IMG_SIZE=64, BATCH_SIZE=4, NUM_WORKERS=0, DEVICE="cpu")
    script.start_processes(cfg)
    device, found = torch.device("cpu"), {}
    with script.shared_data(cfg, ["train", "valid"]) as (splits, cache):
        dataset = {name: script.BrainTumorDataset(data, 64, name == "train", 3, False, records=splits[name].records,
                                                  cache=cache) for name in splits}
        criterion, scaler = script.LOSSES["dice_bce"](), script.make_scaler("float32", device)
        model = frozen_model()
        start = {key: value.clone() for key, value in model.state_dict().items()}
        loader = script.make_loader(dataset["valid"], cfg, False)
        found["scores"] = script.validate(model, loader, criterion, device, cfg=cfg)
        model.prediction_settings = script.prediction_settings(cfg)
        found["counts"] = script.evaluate_split(model, dataset["valid"], script.THRESHOLDS, "valid").tolist()
        for case, (optimizer, epochs, changes) in cases.items():
            vars(cfg).update({"ACCUMULATION_STEPS": 1, "GRAD_CLIP": 0.0} | changes)
            model.load_state_dict(start)
            model.zero_grad()
            rate = {"SGD": 1e-3, "AdamW": 1e-5}[optimizer]
            optimizer = getattr(torch.optim, optimizer)(model.parameters(), rate, fused=True)
            (trained, exchanges), losses = distributed(model), []
            loader = script.make_loader(dataset["train"], cfg, True)
            for epoch in range(epochs):
                loader.batch_sampler.set_epoch(epoch)
                stats = script.train_one_epoch(trained, loader, criterion, optimizer, scaler, device, cfg=cfg)
                losses.append(stats["train_loss"])
            moved = torch.cat([(p.detach() - start[name]).flatten() for name, p in model.named_parameters()])
            found[case] = {"losses": losses, "moved": moved, "exchanges": len(exchanges)}
    return found

if __name__ == "__main__":
    data, cases, output = sys.argv[1], json.loads(sys.argv[2]), sys.argv[3]
    found = run(data, cases)
    torch.save(found, f"{output}.{script.rank()}")
'''

# Plain SGD shows a wrong scale of the gradient, which AdamW and clipping would hide.
CASES = {
    "sgd": ("SGD", 1, {}),
    "clipped": ("SGD", 1, {"GRAD_CLIP": 0.05}),
    "accumulated": ("SGD", 2, {"ACCUMULATION_STEPS": 2}),
    "adamw": ("AdamW", 1, {"ACCUMULATION_STEPS": 2, "GRAD_CLIP": 1.0}),
}


@pytest.fixture(scope="module")
def numbers(tmp_path_factory):
    """What one process finds, and what each of two finds. 10 training images: batches of 4, 3 and 3."""
    root = tmp_path_factory.mktemp("numbers")
    data = write_data(root / "data", train=10, valid=5, test=0)
    driver = root / "driver.py"
    driver.write_text(DRIVER)
    process = start(driver, data, json.dumps(CASES), root / "two")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        space = {"__name__": "driver"}
        exec(compile(DRIVER, str(driver), "exec"), space)
        alone = space["run"](str(data), CASES)
    finally:
        torch.set_num_threads(before)
    code, output = finish(process)
    assert code == 0, output
    return alone, [torch.load(f"{root / 'two'}.{rank}", weights_only=False) for rank in range(2)]


def test_metrics_of_a_fixed_model_equal_those_of_one_process(numbers):
    alone, together = numbers
    for found in together:
        assert found["scores"] == pytest.approx(alone["scores"], abs=2e-3)  # a pixel near the threshold may differ
        assert found["scores"] == together[0]["scores"]
        assert np.shape(found["counts"]) == (5, len(script.THRESHOLDS), 3)
        assert np.abs(np.subtract(found["counts"], alone["counts"])).max() <= 3  # of 9216 pixels


@pytest.mark.parametrize("case", list(CASES))
def test_weights_after_some_steps_equal_those_of_one_process(numbers, case):
    alone, together = numbers[0][case], [found[case] for found in numbers[1]]
    assert torch.equal(together[0]["moved"], together[1]["moved"])
    assert alone["moved"].norm() > 1e-5
    # AdamW divides by the root of the squared gradient: where that is almost 0, rounding decides the direction.
    tolerance = 0.05 if case == "adamw" else 2e-3
    assert (together[0]["moved"] - alone["moved"]).norm() / alone["moved"].norm() < tolerance
    for found in together:
        assert found["losses"] == pytest.approx(alone["losses"], rel=1e-4)


@pytest.mark.parametrize("case, steps", [("sgd", 3), ("accumulated", 4), ("adamw", 2)])
def test_gradients_are_exchanged_once_per_step(numbers, case, steps):
    """10 images: three batches in an epoch, two steps when two batches are accumulated."""
    assert [found[case]["exchanges"] for found in numbers[1]] == [steps, steps]


# --- the whole script ---

SPY = '''
"""The script, noting in $SPY which process decodes, opens a cache and writes; $SLOW delays the best model."""
import hashlib, os, sys, time
import brain_tumor_integrated_smp as script

def buffers(model):
    """A digest of the running statistics."""
    return hashlib.sha256(b"".join(value.numpy().tobytes() for value in model.buffers())).hexdigest()

def note(what):
    with open(os.environ["SPY"], "a") as file:
        file.write(f"{script.rank()} {what}\\n")

def spied(name, describe):
    original = getattr(script, name)
    def call(*arguments, **options):
        note(describe(*arguments))
        return original(*arguments, **options)
    setattr(script, name, call)

spied("read_image", lambda path, *_: f"read {path}")
spied("print_audit", lambda *_: "audit")
spied("validate", lambda model, *_: f"validate {buffers(model)}")
def slow_write(path, *arguments, inner=script.write_file, **options):
    if os.path.basename(path) == script.BEST:
        time.sleep(float(os.environ.get("SLOW", 0)))
    return inner(path, *arguments, **options)

script.write_file = slow_write
spied("write_file", lambda path, *_: f"write {path}")
class PixelCache(script.PixelCache):
    def __init__(self, *arguments):
        note("cache")
        super().__init__(*arguments)
script.PixelCache = PixelCache
if __name__ == "__main__":
    sys.argv[0] = script.__file__
    sys.exit(script.main())
'''


def spy(root, *arguments, **env):
    """Run the script under the spy. Returns (exit code, output, notes as "rank what" lines)."""
    (root / "spy.py").write_text(SPY)
    code, output = finish(start(root / "spy.py", *arguments, SPY=str(root / "notes"), **env))
    return code, output, (root / "notes").read_text().splitlines()


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    """Two epochs in two processes: (folder, output, notes)."""
    root = tmp_path_factory.mktemp("whole")
    write_data(root / "data", train=7, valid=3, test=3)
    code, output, notes = spy(root, *run_arguments(root, "--epochs", "2", "--num-workers", "1"))
    assert code == 0, output
    return root, output, notes


def test_one_process_audits_decodes_caches_writes_and_speaks(whole_run):
    root, output, notes = whole_run
    assert sum(line.endswith("audit") for line in notes) == sum(line.endswith("cache") for line in notes) == 1
    for split, images in (("train", 7), ("valid", 3)):
        reads = [line for line in notes if f"read {root / 'data' / split}" in line]
        assert len(reads) == len(set(reads)) == images
    assert {line.split()[0] for line in notes if " write " in line} == {"0"}
    for line in ("2 processes", "\nData", "epoch 1/2", "epoch 2/2", "Best validation Dice", "Threshold"):
        assert output.count(line) == 1, line
    assert list((root / "cache").iterdir()) == []


def test_all_files_are_there_and_complete(whole_run):
    root, _, _ = whole_run
    assert {path.name for path in (root / "out").iterdir()} == set(script.RUN_FILES)
    assert [row["epoch"] for row in history(root)][:2] == ["1", "2"]
    record, problem = script.read_record(root / "out" / script.BEST)
    assert not problem and {"threshold", "valid_metrics", "test_metrics"} <= set(record)
    with open(root / "out" / "test_metrics.csv", newline="") as file:
        assert [row["file_name"] for row in csv.DictReader(file)] == [f"slice_{i}.png" for i in range(3)]


def test_a_plain_model_loads_the_weights(whole_run):
    plain = smp.UnetPlusPlus("resnet18", encoder_weights=None, classes=1)
    plain.load_state_dict(torch.load(whole_run[0] / "out" / script.BEST, weights_only=True))


def test_test_scores_equal_those_of_one_process(whole_run, tmp_path):
    root, _, _ = whole_run
    expected = json.loads((root / "out" / "unet_plusplus_best.json").read_text())
    output = tmp_path / "out"
    output.mkdir()
    for name in (script.BEST, "unet_plusplus_best.json"):
        (output / name).write_bytes((root / "out" / name).read_bytes())
    assert script.main([*map(str, run_arguments(root, "--output-dir", output, "--evaluate"))]) == 0
    found = json.loads((output / "unet_plusplus_best.json").read_text())
    assert found["threshold"] == expected["threshold"]
    for split in ("valid_metrics", "test_metrics"):
        assert found[split] == pytest.approx(expected[split], abs=1e-3)


def test_all_processes_validate_the_model_that_is_saved(whole_run):
    """Each process has BatchNorm statistics of its own until they are shared before validation."""
    root, _, notes = whole_run
    validated = [line.split()[-1] for line in notes if " validate " in line]
    assert len(validated) == 4 and len(set(validated)) == 2  # two processes, two epochs
    plain = smp.UnetPlusPlus("resnet18", encoder_weights=None, classes=1)
    plain.load_state_dict(torch.load(root / "out" / script.LAST, weights_only=True)["model"])
    space = {"__name__": "spy"}
    exec(SPY[SPY.index("def buffers"):SPY.index("def note")], {"hashlib": hashlib}, space)
    assert validated[-1] == space["buffers"](plain)


def test_a_run_goes_on_with_another_number_of_processes(whole_run):
    """From two to one, and from one to two."""
    root, _, _ = whole_run
    assert script.main([*map(str, run_arguments(root, "--epochs", "3", "--resume"))]) == 0
    assert [row["epoch"] for row in history(root)] == ["1", "2", "3"]
    code, output = finish(start(SCRIPT, *run_arguments(root, "--epochs", "4", "--resume")))
    assert code == 0, output
    assert "Going on after epoch 3" in output and output.count("epoch 4/4") == 1
    assert [row["epoch"] for row in history(root)] == ["1", "2", "3", "4"]
    state = torch.load(root / "out" / script.LAST, weights_only=True)
    steps = {int(entry["step"]) for entry in state["optimizer"]["state"].values()}
    assert steps == {4 * 2}  # 7 images: two batches in each of four epochs, whatever the number of processes
    plain = smp.UnetPlusPlus("resnet18", encoder_weights=None, classes=1)
    plain.load_state_dict(state["model"])


def test_all_processes_evaluate_the_model_that_was_written_last(tmp_path):
    """On a slow disk, too."""
    write_data(tmp_path / "data", train=4, valid=2, test=2)
    code, output, _ = spy(tmp_path, *run_arguments(tmp_path), SLOW="3")
    assert code == 0, output


def test_fewer_validation_images_than_processes(tmp_path):
    write_data(tmp_path / "data", train=4, valid=1, test=1)
    code, output = finish(start(SCRIPT, *run_arguments(tmp_path)))
    assert code == 0, output


# --- ends ---


def test_fewer_training_images_than_processes_end_all_with_one_message(tmp_path):
    write_data(tmp_path / "data", train=1, valid=1, test=0)
    code, output = finish(start(SCRIPT, *run_arguments(tmp_path)))
    assert code != 0
    assert output.count("error: there are fewer training images than processes") == 1
    assert "brain_tumor_integrated_smp.py\", line" not in output


def test_bad_data_end_all_processes_with_one_message(tmp_path):
    write_data(tmp_path / "data", train=4, valid=2, test=0)
    (tmp_path / "data" / "train" / "slice_1.png").write_bytes(b"cut short")
    code, output = finish(start(SCRIPT, *run_arguments(tmp_path)))
    assert code != 0
    assert output.count("error: 1 image(s) cannot be read") == 1
    assert "slice_1.png" in output and "brain_tumor_integrated_smp.py\", line" not in output  # no stack trace of ours
    assert list((tmp_path / "cache").iterdir()) == []


@pytest.mark.parametrize("how", ["Ctrl-C", "SIGTERM to torchrun", "a process is killed"])
def test_the_end_of_one_is_the_end_of_all(tmp_path, how):
    write_data(tmp_path / "data", train=4, valid=2, test=0)
    process = start(SCRIPT, *run_arguments(tmp_path, "--epochs", "500", "--early-stopping", "0", "--num-workers", "1"))
    seen = until(process, " 1/500 ")
    if how == "Ctrl-C":  # torchrun gets it from the terminal and passes it on; its processes have sessions of their own
        process.send_signal(signal.SIGINT)
    elif how == "SIGTERM to torchrun":
        process.terminate()
    else:
        os.kill(min(members(process, "RANK=1")), signal.SIGKILL)  # the lowest number: not one of its workers
    code, output = finish(process)
    assert code != 0
    assert list((tmp_path / "cache").iterdir()) == [], seen + output
    state = script.read_weights(tmp_path / "out" / script.LAST)  # complete
    assert state["epoch"] >= 1
    if how != "a process is killed":
        assert output.count("--resume") == 1 and f"torchrun --nproc-per-node=2 {SCRIPT}" in output
        assert "brain_tumor_integrated_smp.py\", line" not in output, output

