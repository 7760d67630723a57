"""Shared by all tests: the script as a module, small data sets, and the script as a process."""

import atexit
import gc
import json
import os
import pickle
import subprocess
import sys
import time
from pathlib import Path

import cv2
import filelock
import numpy as np
import pytest

# One thread each for this process and those that it starts: on busy cores several threads wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# TEST_CPU=avx2 runs the suite as on a processor with nothing newer, in this process and in all that it starts:
# PyTorch's own kernels and oneDNN's are held down, and the script asks PyTorch.
if os.environ.get("TEST_CPU") == "avx2":
    os.environ |= {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "brain_tumor_integrated_smp.py"
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

pytest.register_assert_rewrite("background")

import torch  # noqa: E402

import brain_tumor_integrated_smp as script  # noqa: E402

gc.freeze()  # main() collects at its end; without the imports' objects that takes hundredths of a second
atexit.register(gc.unfreeze)  # or nanobind lists what it takes for leaks

# A run that takes seconds on two cores: a small encoder, small squares, no download; the same arithmetic everywhere.
FAST = ["--img-size", "64", "--encoder", "resnet18", "--encoder-weights", "none", "--batch-size", "4",
        "--num-workers", "0", "--epochs", "1", "--device", "cpu", "--precision", "float32"]


def tiny_build_model(*_):
    """Instead of build_model(), where the network does not matter: two layers, BatchNorm, and dropout that draws."""
    return torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3, padding=1), torch.nn.BatchNorm2d(4), torch.nn.ReLU(),
                               torch.nn.Dropout(0.1), torch.nn.Conv2d(4, 1, 1)), "random"


def smp_build_model(encoder, weights, architecture):
    """Instead of build_model(), where the network is that of the settings, whatever is edited."""
    model = script.smp.create_model(architecture, encoder, encoder_weights=None)
    return model, script.load_encoder_weights(model.encoder, encoder, weights)


def warmup_and_plateau(optimizer, cfg, _steps_per_epoch):
    """Instead of build_schedulers(), where the schedule does not matter: EPOCHS may be raised, whatever is edited."""
    schedules = torch.optim.lr_scheduler
    return (schedules.LinearLR(optimizer, 1 / max(1, cfg.WARMUP_STEPS), total_iters=cfg.WARMUP_STEPS),
            schedules.ReduceLROnPlateau(optimizer, "max", cfg.PLATEAU_FACTOR, cfg.PLATEAU_PATIENCE, threshold=0))


def tiny_network(script):
    """The network and the schedule of runs in the background, see background.Process."""
    script.build_model, script.build_schedulers = tiny_build_model, warmup_and_plateau


@pytest.fixture
def tiny(monkeypatch):
    """The network and the schedule of runs in this process."""
    monkeypatch.setattr(script, "build_model", tiny_build_model)
    monkeypatch.setattr(script, "build_schedulers", warmup_and_plateau)


def box(x, y, width, height):
    """A COCO polygon for an axis-aligned box, in pixels."""
    return [x, y, x + width, y, x + width, y + height, x, y + height]


def write_coco(folder, images, annotations, categories=({"id": 1, "name": "tumor"},)):
    """Write a `_annotations.coco.json` from ready entries."""
    folder.mkdir(parents=True, exist_ok=True)
    coco = {"images": images, "annotations": annotations, "categories": list(categories)}
    (folder / "_annotations.coco.json").write_text(json.dumps(coco, ensure_ascii=False), encoding="utf-8")


def write_split(folder, count, size=96, seed=0):
    """A split of `count` grey images with a bright box each (the last one, if there are several, without)."""
    rng = np.random.default_rng([seed, count])
    images, annotations = [], []
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        image = rng.integers(20, 90, (size, size), np.uint8)
        x, y, w, h = (int(v) for v in rng.integers([8, 8, 16, 16], [size // 2, size // 2, 40, 40]))
        if i < count - 1 or count == 1:
            image[y:y + h, x:x + w] += 120
            annotations.append({"id": i, "image_id": i, "category_id": 1, "segmentation": [box(x, y, w, h)],
                                "iscrowd": 0})
        (folder / f"slice_{i}.png").write_bytes(cv2.imencode(".png", image)[1].tobytes())
        images.append({"id": i, "file_name": f"slice_{i}.png", "height": size, "width": size})
    write_coco(folder, images, annotations)
    return folder


def write_data(root, train=8, valid=4, test=2, size=96):
    """A whole data folder; 0 images leave a split out."""
    for seed, (name, count) in enumerate({"train": train, "valid": valid, "test": test}.items()):
        if count:
            write_split(root / name, count, size, seed)
    return root


def definitions():
    """What a test may replace for itself, but not for the next one: {(owner, name): function or class}."""
    return {(owner, name): value for owner in (script, script.Trainer, os, time)
            for name, value in vars(owner).items() if callable(value)}


@pytest.fixture(autouse=True)
def nothing_left_over():
    earlier = definitions()
    yield
    if "background" in sys.modules:
        sys.modules["background"].end_all()
    assert definitions() == earlier


@pytest.fixture
def data(tmp_path):
    """A data folder with 8 + 4 + 2 images of 96x96 pixels."""
    return write_data(tmp_path / "data")


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """One real run on the sample data beside the script: (output folder, finished process). About a minute.

    ResNet34, so that the loading recipe of the README fits; small squares and a large learning rate, so that a few
    epochs are enough. Test processes that run side by side share it.
    """
    shared = tmp_path_factory.getbasetemp()
    shared = shared.parent if "PYTEST_XDIST_WORKER" in os.environ else shared
    out, ended = shared / "trained" / "结果", shared / "trained.pickle"
    with filelock.FileLock(shared / "trained.lock"):
        if not ended.is_file():
            ended.write_bytes(pickle.dumps(train_on_samples(out)))
    done = pickle.loads(ended.read_bytes())
    assert done.returncode == 0, done.stderr
    return out, done


def train_on_samples(out):
    """The run behind the fixture."""
    return run_script("--img-size", 64, "--batch-size", 8, "--epochs", 10, "--lr", 1e-3, "--num-workers", 2,
                      "--encoder-weights", "none", "--device", "cpu", "--precision", "float32", "--output-dir", out,
                      env={"PYTHONWARNDEFAULTENCODING": "1"})


def run_script(*arguments, env=None, **options):
    """Run the script as a user does; returns the finished process with text output."""
    return subprocess.run([sys.executable, str(SCRIPT), *map(str, arguments)], capture_output=True, encoding="utf-8",
                          env=os.environ | (env or {}), timeout=600, **options)


def pytest_configure(config):
    config.addinivalue_line("markers", "soak: long repetitions, only run with -m soak")
    # pycocotools under NumPy 2, thousands of times: it would hide the others.
    config.addinivalue_line("filterwarnings", "ignore:__array__ implementation doesn't accept a copy keyword")


def pytest_collection_modifyitems(config, items):
    """Leave out the soaks unless the command line selects by marker."""
    if config.option.markexpr:
        return
    soaks = [item for item in items if item.get_closest_marker("soak")]
    config.hook.pytest_deselected(items=soaks)
    items[:] = [item for item in items if item not in soaks]
