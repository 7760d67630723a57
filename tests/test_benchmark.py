"""The benchmark measures every version in the same way; what it finds is not judged here."""

import json
import math

import benchmark
import cv2
import numpy as np
import pytest
import segmentation_models_pytorch as smp
import torch
from conftest import script, smp_build_model, tiny_build_model

PARTS = [(part, version) for part, versions in benchmark.VERSIONS.items() for version in versions]
OPTIONS = ["--img-size", "64", "--batch-size", "2", "--images", "4", "--valid", "3", "--workers", "0",
           "--device", "cpu", "--precision", "float32"]


@pytest.mark.parametrize("part, version", PARTS)
def test_every_part_measures_every_version(part, version, data, tmp_path, capsys, monkeypatch):
    if part != "step":  # there, the networks are what is measured
        monkeypatch.setattr(script, "build_model", tiny_build_model)
        monkeypatch.setattr(benchmark, "UNet", lambda: tiny_build_model()[0])
    benchmark.main(["--data", str(data), "--output", str(tmp_path), *OPTIONS, "--epochs", "3", "--part", part,
                    "--version", version])
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found.pop("precision") == "float32"
    assert all(math.isfinite(value) for value in found.values())
    if part == "step":
        # Known sizes: the classic U-Net and UNet++ with ResNet34.
        parameters = {"original": 31.0, "this": 26.1}[version]
        assert found["parameters, million"] == pytest.approx(parameters, abs=0.05)
        # Forward 96.3 and 36.8 GFLOP at 256 px, here at 64 px; the backward pass costs about twice that.
        forward = {"original": 96.3, "this": 36.8}[version] / 16
        assert 2.5 * forward < found["GFLOP per image and step"] < 3.1 * forward
    if part == "epoch":
        assert 0 <= found["validation Dice"] <= 1
        assert ("saves" in found) == (version == "this")
    if part == "accuracy":
        seconds = [found[f"seconds until epoch {epoch}"] for epoch in (1, 2, 3)]
        assert 0 < seconds[0] < seconds[1] < seconds[2]
        assert len(found) == 6
    assert [path for path in tmp_path.iterdir() if path != data] == []  # it leaves nothing behind


def test_the_measured_epoch_is_that_of_a_run(data, tmp_path, tiny, monkeypatch, capsys):
    """It saves when a run does, here after each epoch; "unsaved" never does."""
    written = []
    monkeypatch.setattr(script, "save_run", lambda trainer, *_: written.append(trainer.epoch))
    monkeypatch.setattr(script, "SAVE_SECONDS", 0.0)
    for version, epochs in (("this", [1, 2, 3]), ("unsaved", [])):
        written.clear()
        benchmark.main(["--data", str(data), "--output", str(tmp_path), *OPTIONS, "--epochs", "3", "--part", "epoch",
                        "--version", version])
        assert written == epochs


def test_both_versions_are_scored_alike(data, monkeypatch):
    """All of every image is tumour: the same Dice in both, that of the masks in COCO's raster."""
    def everything(*_):
        network = torch.nn.Conv2d(3, 1, 1)
        torch.nn.init.zeros_(network.weight)
        torch.nn.init.constant_(network.bias, 9.0)
        return network, "random"

    monkeypatch.setattr(script, "build_model", everything)
    monkeypatch.setattr(benchmark, "UNet", lambda: everything()[0])
    options, dice = benchmark.parse(["--data", str(data), *OPTIONS, "--epochs", "1"]), {}
    for name, kind in (("original", benchmark.Original), ("this", benchmark.This)):
        version = kind(options, torch.device("cpu"))
        version.open_data()
        version.build()
        dice[name] = version.fit()[2]
        version.close()
    masks = [script.resize_mask(entry.mask(), 64, 64) for entry in script.read_coco(data / "valid").entries[:3]]
    expected = np.mean([2 * mask.mean() / (1 + mask.mean()) for mask in masks])
    assert dice["original"] == dice["this"] == [pytest.approx(expected)]


def test_the_table_compares_medians_and_names_the_spread():
    results = {"original": {"images/s, step alone": [1.0, 2.0, 3.0]}, "this": {"images/s, step alone": [8.0, 6.0, 7.0]}}
    assert "| images/s, step alone | 2 (1 ... 3) | 7 (6 ... 8) | 3.5 |" in benchmark.table(results)


def test_versions_that_take_turns_are_compared_pair_by_pair():
    quantity = "images/s, whole epoch"
    results = {"this": {quantity: [9.0, 4.0, 2.0]}, "unsaved": {quantity: [10.0, 4.0, 4.0]}}
    assert "this / unsaved, pair by pair: median 0.9, 0.5 ... 1" in benchmark.table(results)


def accuracy(original, this):
    """Results of the part "accuracy": for each version and epoch (Dice of each seed, seconds of each seed)."""
    return {version: {"precision": ["float32"]} | {
        name: values for epoch, row in enumerate(rows, 1)
        for name, values in zip((f"validation Dice, epoch {epoch}", f"seconds until epoch {epoch}"), row)}
        for version, rows in (("original", original), ("this", this))}


ORIGINAL = [([0.2, 0.3, 0.1], [10, 10, 10]), ([0.4, 0.4, 0.5], [20, 20, 20])]


def test_the_sentence_says_what_the_curves_show():
    """Seed by seed 10, 20 and 0 points better; as good as the original's best after 2 and 4 of 20 seconds, and 8."""
    found = benchmark.curves(accuracy(ORIGINAL, [([0.4, 0.3, 0.3], [2, 2, 4]), ([0.5, 0.6, 0.5], [4, 4, 8])]))
    assert benchmark.verdict(found, "this") == (
        "10.0 points better at equal epochs, 30.0 points better in the same time, reaches the original's best Dice in "
        "1/5.0 of its time (medians of 3 pairs; reached in 3, factors 2.5 ... 10.0)")


def test_the_sentence_hides_no_defeat():
    """After 15 seconds the original, on its way from 10 to 20, has 0.3, 0.35 and 0.3."""
    found = benchmark.curves(accuracy(ORIGINAL, [([0.1, 0.3, 0.2], [9, 9, 9]), ([0.2, 0.45, 0.25], [15, 15, 15])]))
    assert benchmark.verdict(found, "this") == (
        "20.0 points worse at equal epochs, 5.0 points worse in the same time, does not reach the original's best Dice "
        "(medians of 3 pairs; reached in 1, factors 0.0 ... 1.3)")


def test_the_pretrained_version_has_its_own_encoder_and_weights(data, tmp_path, monkeypatch):
    """Its options reach the process that measures it, and no other version."""
    monkeypatch.setattr(script, "build_model", smp_build_model)
    path, encoder = tmp_path / "encoder.pth", smp.encoders.get_encoder("resnet18", weights=None).state_dict()
    torch.save({name: torch.full_like(value, 0.25) for name, value in encoder.items()}, path)
    words = ["--encoder", "resnet18", "--encoder-weights", path, "--mean", *[0.5] * 3, "--std", *[0.25] * 3]
    words = [*OPTIONS, "--data", str(data), "--epochs", "1", *map(str, words)]
    for name in ("this", "pretrained"):
        version = benchmark.This(benchmark.parse([*words, "--version", name]), torch.device("cpu"))
        version.build()
        settings = (version.cfg.ENCODER, version.cfg.MEAN, version.cfg.STD, version.trainer.weights_from)
        version.close()
        assert settings == (("resnet34", script.MEAN, script.STD, "random") if name == "this" else
                            ("resnet18", (0.5, 0.5, 0.5), (0.25, 0.25, 0.25), f"file {path}"))
    found = benchmark.in_new_process(benchmark.parse(words), "accuracy", "pretrained", 0)
    assert 0 <= found["validation Dice, epoch 1"] <= 1


@pytest.mark.parametrize("more", [[], ["--encoder-weights", "imagenet"]], ids=["two versions", "three"])
def test_accuracy_becomes_a_sentence_and_a_picture(more, tmp_path, monkeypatch, capsys):
    """From the command line to the files, with made-up measurements that take turns."""
    calls = []

    def measured(options, part, version, seed):
        calls.append((part, version, seed, options.img_size, options.images, options.epochs))
        rows = accuracy([([0.2], [10.0]), ([0.4], [20.0])], [([0.4], [2.0]), ([0.5], [4.0])])
        rows = (rows | {"pretrained": rows["this"]})[version]
        return {name: values[0] for name, values in rows.items()}

    monkeypatch.setattr(benchmark, "in_new_process", measured)
    benchmark.main(["--only", "accuracy", "--repeats", "2", "--device", "cpu", "--json", str(tmp_path / "found.json"),
                    "--picture", str(tmp_path / "found.png"), *more])
    versions = ["original", "this", "pretrained"][:2 + bool(more)]
    assert calls == [("accuracy", version, seed, 64, 256, 4) for seed in (0, 1) for version in versions[::1 - 2 * seed]]
    report = json.loads((tmp_path / "found.json").read_text(encoding="utf-8"))
    assert "this: " + report["verdicts"]["this"] in capsys.readouterr().out
    assert "10.0 points better" in report["verdicts"]["this"]
    assert report["results"]["this"]["validation Dice, epoch 2"] == [0.5, 0.5]
    assert cv2.imread(str(tmp_path / "found.png")).shape == (400, 900, 3)
