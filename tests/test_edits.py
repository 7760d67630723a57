"""The edits that README's "Change it" lists, each done as somebody would, in one place of a copy or of the module.

A run with an edit is killed after two of its four epochs, and has to end as if nothing had happened.
"""

import csv
import inspect
import json
import re
import sys
import types
from functools import partial

import background
import cv2
import numpy as np
import pytest
import segmentation_models_pytorch as smp
import torch
from background import arguments, assert_same_run, read, run
from conftest import FAST, SCRIPT, script, smp_build_model, tiny_build_model, write_data
from test_run import kill_later
from test_settings import edited, help_text, refused
from test_step import batches, new_trainer, train
from torch.optim import lr_scheduler

BEST = script.BEST

# --- edits, see background.Process


def sgd(script):
    script.build_optimizer = lambda model, cfg, weights_from: torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)


def adam(script):
    script.build_optimizer = lambda model, cfg, weights_from: torch.optim.Adam(model.parameters(), 0.05)


def cosine(script):
    script.build_schedulers = lambda optimizer, cfg, _: (None, lr_scheduler.CosineAnnealingLR(optimizer, cfg.EPOCHS))


def milestones(script):
    script.build_schedulers = lambda optimizer, *_: (None, lr_scheduler.MultiStepLR(optimizer, [1, 3], 0.1))


def one_cycle(script):
    script.build_schedulers = lambda optimizer, cfg, steps: (
        lr_scheduler.OneCycleLR(optimizer, 0.01, total_steps=cfg.EPOCHS * steps), None)


def no_schedule(script):
    script.build_schedulers = lambda *_: (None, None)


def clahe(image):
    """Contrast-limited histogram equalisation of the grey levels."""
    grey = cv2.createCLAHE(2.0, (8, 8)).apply(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY))
    return cv2.cvtColor(grey, cv2.COLOR_GRAY2RGB)


def equalised(script):
    script.preprocess = clahe


def predictive_value(script, inner=script.metrics_from_counts):
    script.metrics_from_counts = lambda tp, fp, fn, tn: inner(tp, fp, fn, tn) | {"npv": tn / (tn + fn)}


class OwnNetwork(torch.nn.Module):
    """With pretrained weights in what is called encoder."""

    def __init__(self):
        super().__init__()
        self.encoder = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3, padding=1), torch.nn.BatchNorm2d(4))
        self.head = torch.nn.Conv2d(4, 1, 1)

    def forward(self, images):
        return self.head(self.encoder(images).relu())


def own_network(script):
    script.build_model = lambda encoder=None, weights=None, architecture=None: (OwnNetwork(), "a public collection")


def examples(script):
    """The commented lines of after_epoch(), with a writer that takes notes instead of TensorBoard's."""
    class Writer:
        def __init__(self, folder):
            self.path = f"{folder}/scalars.txt"

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def add_scalar(self, name, value, step):
            with open(self.path, "a") as file:
                file.write(f"{name} {float(value)} {step}\n")

    sys.modules["torch.utils.tensorboard"] = types.SimpleNamespace(SummaryWriter=Writer)
    lines = inspect.getsource(script.after_epoch)
    exec(re.sub(r"^    # ", "    ", lines, flags=re.M), vars(script))


# --- helpers


def life(folder, *edits, words=(), **options):
    """Four epochs with an edit, in one go and with a kill on the way. Returns (output folder, what was printed)."""
    argv = arguments(folder / "broken", "--num-workers", 0, *words)
    code, text = run(arguments(folder / "whole", "--num-workers", 0, *words), *edits, **options)
    assert code == 0 and "Traceback" not in text, text
    code, _ = run(argv, *edits, partial(kill_later, name="training_history.csv", time=2), **options)
    assert code == -9 and read(folder / "broken")["epoch"] == 2
    code, resumed = run([*argv, "--resume"], *edits, **options)
    assert code == 0 and "Continuing after epoch 2" in resumed, resumed
    assert_same_run(folder / "broken", folder / "whole")
    for mode in (["--evaluate"], ["--predict", background.shared_data() / "test" / "slice_0.png"]):
        code, printed = run([*argv, *mode], *edits, **options)
        assert code == 0 and "WARNING" not in printed, printed
    return folder / "broken", text


def rates(folder):
    """The learning rate of each epoch."""
    return [row["lr"] for row in read(folder)["history"]]


def refused_resume(folder, *edits, words=(), **options):
    """What is said where a run must not go on with other edits."""
    code, text = run(["--resume", "--output-dir", folder, *words], *edits, **options)
    assert code == 2 and "Traceback" not in text, text
    return text


def metadata_of(folder):
    return json.loads((folder / "unet_plusplus_best.json").read_text(encoding="utf-8"))


def rows_of(path):
    return list(csv.DictReader(path.open(encoding="utf-8-sig")))


# --- optimizer


def test_another_optimizer(tmp_path):
    folder, text = life(tmp_path, sgd)
    assert "Learning rate 0.05 (weights: random)." in text
    assert rates(folder) == pytest.approx([0.05 * (1 / 20 + 19 / 20 * steps / 20) for steps in (4, 8, 12, 16)])
    buffers = [values["momentum_buffer"] for values in read(folder)["optimizer"]["state"].values()]
    assert len(buffers) == 6 and all(buffer.any() for buffer in buffers)
    assert "optimizer: saved 'SGD', now 'Adam'" in refused_resume(folder, adam)
    assert "momentum of group 0: saved 0.9, now 0.5" in refused_resume(folder, less_momentum)


def less_momentum(script):
    script.build_optimizer = lambda model, *_: torch.optim.SGD(model.parameters(), 0.05, momentum=0.5)


@pytest.mark.parametrize("optimizer", ["SGD", "Adam", "NAdam", "RAdam", "RMSprop", "Adagrad", "Adamax", "Rprop", "ASGD",
                                       "Adafactor"])
@pytest.mark.parametrize("capability", ["AVX2", "AVX512"])
def test_the_state_of_every_optimizer_is_restored(optimizer, capability, monkeypatch):
    """Some hold None, numbers, or tensors of another shape. One more step from it ends in the same bits."""
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)  # decides the memory format
    monkeypatch.setattr(script, "build_model", tiny_build_model)
    monkeypatch.setattr(script, "build_optimizer", lambda model, *_: getattr(torch.optim, optimizer)([
        {"params": [weight]} for weight in model.parameters()], lr=1e-3))
    monkeypatch.setattr(script, "build_schedulers", lambda *_: (None, None))
    trainer = new_trainer()
    train(trainer, batches(2, 2))
    again = new_trainer(state=trainer.state())
    for each in (trainer, again):
        torch.manual_seed(0)  # of the dropout
        train(each, batches(3))
        each.check_finite(1, 1)
    assert background.differences(again.state(), trainer.state()) == []


# --- schedules


@pytest.mark.parametrize("edit, expected", [
    (cosine, [0.05 * (1 + np.cos(np.pi * epoch / 4)) / 2 for epoch in range(4)]),
    (milestones, [0.05, 0.005, 0.005, 0.0005]), (no_schedule, [0.05] * 4)],
    ids=lambda value: getattr(value, "__name__", ""))
def test_another_schedule(edit, expected, tmp_path):
    folder, _ = life(tmp_path, sgd, edit)
    assert rates(folder) == pytest.approx(expected)


def test_a_schedule_that_is_stepped_with_the_optimizer(tmp_path):
    """It rises for 30 % of the 16 steps, to 0.01, and falls to almost nothing."""
    folder, text = life(tmp_path, one_cycle)
    assert "Learning rate 0.0004 (" in text and read(folder)["per_step"]["last_epoch"] == 16
    first, second, third, last = rates(folder)
    assert 0.0095 < first <= 0.01 and first > second > third > last > 0


@pytest.mark.parametrize("edit, words, named", [
    (cosine, ["--epochs", 8], "T_max per epoch: saved 4, now 8"),
    (one_cycle, ["--epochs", 8], "total_steps per step: saved 16, now 32"),
    (milestones, [], "milestones per epoch: saved Counter({1: 1, 3: 1}), now Counter({2: 1})"),
    (cosine, [], "scheduler per epoch: saved 'CosineAnnealingLR', now 'MultiStepLR'")],
    ids=["T_max", "total_steps", "milestones", "another class"])
def test_a_schedule_with_other_constants_is_not_resumed(edit, words, named, tmp_path):
    code, text = run(arguments(tmp_path, "--num-workers", 0), edit)
    assert code == 0, text
    text = refused_resume(tmp_path, edit if words else other_milestones, words=words)
    assert named in text and "build_schedulers()" in text


def other_milestones(script):
    script.build_schedulers = lambda optimizer, *_: (None, lr_scheduler.MultiStepLR(optimizer, [2], 0.1))


@pytest.mark.parametrize("rates, scale, ticks", [
    ([1e-3] * 9, "log", 1), ([1e-5, *[1e-3] * 6, *[5e-4] * 6, *[2.5e-4] * 6], "log", 3),
    ([1e-3 * (1 + np.cos(np.pi * epoch / 79)) / 2 for epoch in range(80)], "linear", None),  # ends with 0
    ([1e-3] * 9 + [0.0], "linear", None)], ids=["constant", "steps", "cosine", "zero"])
def test_the_panel_of_the_rate_can_be_read(rates, scale, ticks, tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(script, "save_figure", lambda path, figure, *_: figures.append(figure))
    row = {"train_loss": 1.0, "valid_loss": 1.0, "dice": 0.5, "iou": 0.4}
    script.plot_history(tmp_path, [row | {"epoch": n, "lr": lr} for n, lr in enumerate(rates, 1)], 5)
    axis = figures[0].axes[2]
    figures[0].draw_without_rendering()
    labels = [label.get_text() for label in axis.get_yticklabels()]
    assert axis.get_yscale() == scale and len(labels) == len({*labels}) == (ticks or len(labels)) < 12


# --- every image


def test_another_preprocessing(tmp_path, monkeypatch, capsys):
    """CLAHE: for training and prediction alike; a run and a model from before say so."""
    folder, _ = life(tmp_path, equalised)
    image = script.read_image(background.shared_data() / "test" / "slice_0.png")
    overlay = script.read_image(folder / "predictions" / "overlays" / "slice_0.png")
    mask = script.read_image(folder / "predictions" / "masks" / "slice_0.png")[..., 0]
    grown = cv2.dilate(mask, np.ones((9, 9), np.uint8))  # the outline has a width
    assert np.array_equal(overlay[grown == 0], image[grown == 0])  # the picture of the file

    assert "digest of preprocess(): saved" in refused_resume(folder)
    monkeypatch.setattr(script, "build_model", tiny_build_model)
    plain = script.load_model(folder / BEST, "cpu")
    assert "another preprocess()" in capsys.readouterr().err
    middle = np.median(script.segment(plain, image)[1])
    plain.prediction_settings["threshold"] = middle  # so that masks are neither empty nor full
    before, expected = script.predict_mask(plain, image), script.predict_mask(plain, clahe(image))
    entry = script.read_coco(background.shared_data() / "train").entries[0]
    unedited = script.load_sample(entry, 64)
    monkeypatch.setattr(script, "preprocess", clahe)
    model = script.load_model(folder / BEST, "cpu")
    model.prediction_settings["threshold"] = middle
    assert capsys.readouterr().err == ""
    assert np.array_equal(script.predict_mask(model, image), expected) and not np.array_equal(before, expected)
    small, _, full = script.load_sample(entry, 64)
    assert np.array_equal(full, unedited[2]) and np.array_equal(small, script.resize(clahe(full), 64, 64))


def in_place(image):
    image[:] = 0
    return image


@pytest.mark.parametrize("wrong", [in_place, lambda image: image / 255, lambda image: image[..., 0], lambda image: None,
                                   lambda image: image[1:]],
                         ids=["in place", "float", "grey", "nothing", "cropped"])
def test_a_preprocessing_that_returns_no_image_is_refused(wrong, monkeypatch):
    monkeypatch.setattr(script, "preprocess", wrong)
    with pytest.raises(script.TrainerError, match=r"preprocess\(\) must return"):
        script.preprocess_digest()


# --- metrics


def test_another_metric_from_counts(tmp_path):
    """It reaches everything, and the epoch's line does not grow; and specificity, which is there, by hand."""
    folder, text = life(tmp_path, predictive_value)
    for row in rows_of(folder / "test_metrics.csv"):
        tp, fp, fn = (float(row[name]) for name in ("true_positive_px", "false_positive_px", "false_negative_px"))
        tn = 64 * 64 - tp - fp - fn
        assert float(row["npv"]) == pytest.approx(tn / (tn + fn)) and tn > 0
        assert float(row["specificity"]) == pytest.approx(tn / (tn + fp))
    metadata, history = metadata_of(folder), rows_of(folder / "training_history.csv")
    for scores in (metadata["test_metrics"], metadata["valid_metrics"], read(folder)["history"][0], history[0]):
        assert {"npv", "pooled_npv", "specificity", "pooled_specificity"} <= {*scores}
    assert re.search("^  npv  .*[0-9]$", text, re.M) and re.search("^  specificity  .*[0-9]$", text, re.M)
    assert max(len(line) for line in text.splitlines() if re.match("epoch | *[1-4]/4 ", line)) <= 100


# --- the network


def test_another_network(tmp_path, monkeypatch):
    """The JSON says what it is, and that is how it is loaded."""
    folder, text = life(tmp_path, own_network, network=None)
    assert "(weights: a public collection)" in text
    metadata = metadata_of(folder)
    assert metadata["model_class"] == "OwnNetwork" and not {"architecture", "encoder"} & {*metadata}
    OwnNetwork().load_state_dict(torch.load(folder / BEST))
    monkeypatch.setattr(script, "build_model", smp_build_model)
    with pytest.raises(script.TrainerError, match="does not fit this model.*build_model"):
        script.load_model(folder / BEST, "cpu")
    monkeypatch.setattr(script, "build_model", lambda *_: (OwnNetwork(), "random"))
    model = script.load_model(folder / BEST, "cpu")
    assert type(model) is OwnNetwork and script.predict_mask(model, np.zeros((9, 7, 3), np.uint8)).shape == (9, 7)


# --- after each epoch


def test_the_examples_of_after_epoch(tmp_path):
    folder, _ = life(tmp_path, examples, words=["--epochs", 10])
    weights = torch.load(folder / "epoch_10.pth")
    assert background.differences(weights, read(folder)["ema"]) == []
    assert [path.name for path in folder.glob("epoch_*")] == ["epoch_10.pth"]
    scalars = [line.split() for line in (folder / "scalars.txt").read_text().splitlines()]
    found = {(name, int(step)): float(value) for name, value, step in scalars}
    for row in read(folder)["history"]:
        assert [found[name, row["epoch"]] for name in row] == [float(value) for value in row.values()]


# --- constants that an edit has made needless


def test_needless_constants_may_be_deleted(tmp_path, capsys):
    """With a cosine nobody needs the plateau; with one rate, not two."""
    text = SCRIPT.read_text(encoding="utf-8")
    needless = r"^(PLATEAU_FACTOR|PLATEAU_PATIENCE|WARMUP_STEPS|LR_FROM_SCRATCH|WEIGHT_DECAY) = .*\n"
    copied = edited(tmp_path, r"\A[\s\S]*\Z", re.sub(needless, "", text, flags=re.M))
    assert not {"PLATEAU_FACTOR", "LR_FROM_SCRATCH", "WEIGHT_DECAY"} & {*copied.CONSTANTS}
    cosine(copied)
    sgd(copied)
    assert "--plateau-factor" not in help_text(capsys, copied)
    words = ["--lr", "0.25", "--epochs", "2"]
    run_edited(copied, tmp_path, *words)
    assert copied.main(["--resume", "--output-dir", str(tmp_path / "out"), *words]) == 0


# --- a setting of one's own, losses, augmentation, architectures


def run_edited(copied, folder, *words, network=tiny_build_model):
    """Train one epoch with an edited copy. Returns (history, metadata, test rows) from its files."""
    copied.build_model = network
    data, out = write_data(folder / "data", 4, 2, 2, size=64), folder / "out"
    assert copied.main([*FAST, "--data-dir", str(data), "--output-dir", str(out), *words]) == 0
    return rows_of(out / "training_history.csv"), metadata_of(out), rows_of(out / "test_metrics.csv")


def test_another_loss(tmp_path, capsys):
    copied = edited(tmp_path, "^LOSSES = {", 'LOSSES = {"seven": lambda logits, targets: 7 + 0 * logits.mean(), ')
    assert "seven" in help_text(capsys, copied).splitlines()[-1]
    assert "seven" in refused(capsys, "--data-dir", tmp_path, "--loss", "hinge", module=copied)
    history, metadata, _ = run_edited(copied, tmp_path, "--loss", "seven")
    assert (float(history[0]["train_loss"]), float(history[0]["valid_loss"])) == (7, 7)
    assert metadata["settings"]["LOSS"] == "seven"


def test_another_augmentation_step(tmp_path):
    """Inverting comes last, so it does not change what the other steps draw."""
    end = "        ]\n    if normalize:"
    copied = edited(tmp_path, f"^{re.escape(end)}", f"            A.InvertImg(p=1),\n{end}")
    split = write_data(tmp_path / "data", 2, 0, 0) / "train"
    for training in (True, False):
        (image, mask), (plain, same) = (module.BrainTumorDataset(split, 64, training, normalize=False)[(3, 0)]
                                        for module in (copied, script))
        assert np.array_equal(mask, same) and np.array_equal(image, 255 - plain if training else plain)


def test_another_architecture(tmp_path, monkeypatch):
    """The JSON holds it, and load_model() follows the JSON wherever it is called."""
    copied = edited(tmp_path, '^ARCHITECTURE = "unetplusplus"', 'ARCHITECTURE = "linknet"')
    _, metadata, _ = run_edited(copied, tmp_path, network=smp_build_model)
    assert metadata["architecture"] == metadata["settings"]["ARCHITECTURE"] == "linknet"
    monkeypatch.setattr(script, "build_model", smp_build_model)
    model = script.load_model(tmp_path / "out" / script.BEST, "cpu")
    assert isinstance(model, smp.Linknet) and script.predict_mask(model, np.zeros((9, 7, 3), np.uint8)).shape == (9, 7)


def test_another_metric(tmp_path, capsys):
    """The error of the tumour's size in pixels: wrongly found ones less missed ones."""
    new = "((probabilities >= threshold).flatten(1).sum(1) - masks.flatten(1).sum(1)).double()"
    copied = edited(tmp_path, "(?<=^    return )metrics_from_counts", f'{{"size_px": {new}}} | metrics_from_counts')
    history, metadata, rows = run_edited(copied, tmp_path)
    sizes = [float(row["size_px"]) for row in rows]
    assert sizes == [float(row["false_positive_px"]) - float(row["false_negative_px"]) for row in rows]
    assert metadata["test_metrics"]["size_px"] == np.mean(sizes)
    valid = float(history[0]["size_px"])
    assert metadata["valid_metrics_at_img_size"]["size_px"] == valid
    printed = capsys.readouterr().out
    assert re.search(rf"^  size_px  .* {np.mean(sizes):.4f}$", printed, re.M)


def test_another_constant(tmp_path, capsys):
    added = 'ROUNDS = 3  # of something\nSPACING = (0.5, 0.5)  # mm\nSITES = ("a", "b")  # hospitals\nFAST = False\n'
    copied = edited(tmp_path, "^COMPILE = ", f"{added}COMPILE = ")
    printed = " ".join(help_text(capsys, copied).split())
    for part in ("--rounds NUMBER of something [3]", "--spacing [NUMBER ...] mm [0.5 0.5]", "hospitals [a b]"):
        assert part in printed
    words = ["--data-dir", str(tmp_path)]
    cfg, _ = copied.read_settings([*words, *"--rounds 5 --spacing 1 2.5 --sites c --fast".split()])
    assert (cfg.ROUNDS, cfg.SPACING, cfg.SITES, cfg.FAST) == (5, (1, 2.5), ("c",), True)
    assert "--rounds" in refused(capsys, *words, "--rounds", "many", module=copied)
