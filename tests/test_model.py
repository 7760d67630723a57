"""The model, its weights and checkpoints, the training step, and prediction for other code."""

import copy
import csv
import json
import math
import os
import shutil
import subprocess
import sys
import textwrap

import cv2
import numpy as np
import pytest
import segmentation_models_pytorch as smp
import torch
from conftest import FAST, box, script, write_coco, write_data
from huggingface_hub.errors import LocalEntryNotFoundError

CPU = torch.device("cpu")
UnetPlusPlus = smp.UnetPlusPlus  # some tests put another function in its place
RECIPE = """
model = smp.UnetPlusPlus(encoder_name="resnet34", encoder_weights=None, in_channels=3, classes=1)
model.load_state_dict(torch.load("unet_plusplus_best.pth"))
"""


def noise(*shape, seed=0):
    """Random uint8 pixels."""
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def settings(**changes):
    """The constants with changes, as the functions of the script take them."""
    cfg = script.default_settings()
    vars(cfg).update({"PRECISION": "float32", "DEVICE": "cpu"} | changes)
    return cfg


def prediction_settings(img_size):
    """What predict_mask() has to know beside the weights."""
    return {"img_size": img_size, "mean": script.MEAN, "std": script.STD, "threshold": 0.5}


@pytest.fixture(scope="module")
def small():
    """A small model as load_model() returns it, for 64-pixel squares."""
    torch.manual_seed(0)
    model = script.build_model("resnet18", None)[0].eval()
    model.prediction_settings = prediction_settings(64)
    return model


@pytest.fixture
def best(trained):
    """The checkpoint of the run on the sample data."""
    return trained[0] / "unet_plusplus_best.pth"


def copied(best, folder, json_too=True):
    """The checkpoint in another folder, with or without its JSON."""
    shutil.copy(best, folder)
    if json_too:
        shutil.copy(best.with_suffix(".json"), folder)
    return folder / best.name


# --- the model and its encoder weights


@pytest.mark.parametrize("encoder", ["resnet34", "resnet18"])
def test_the_model_maps_squares_to_one_logit_per_pixel(encoder):
    model, origin = script.build_model(encoder, None)
    assert isinstance(model, smp.UnetPlusPlus) and origin == "random"
    with torch.no_grad():
        logits = model.eval()(torch.zeros(2, 3, 64, 96))
    assert logits.shape == (2, 1, 64, 96) and logits.dtype == torch.float32


def test_the_model_is_the_plain_one_of_the_recipe():
    namespace = {"smp": smp, "torch": torch}
    exec(RECIPE.splitlines()[1], namespace)
    plain = namespace["model"].state_dict()
    assert {k: v.shape for k, v in script.build_model("resnet34", None)[0].state_dict().items()} == {
        k: v.shape for k, v in plain.items()}


def encoder_file(folder, **more):
    """A file of ResNet18 encoder weights that are easily recognised, with further entries."""
    weights = smp.UnetPlusPlus("resnet18", encoder_weights=None).encoder.state_dict()
    weights = {name: torch.full_like(value, 0.25) for name, value in weights.items()} | more
    torch.save(weights, folder / "encoder.pth")
    return folder / "encoder.pth"


@pytest.mark.parametrize("more", [{}, {"fc.weight": torch.zeros(1000, 512), "fc.bias": torch.zeros(1000)}])
def test_encoder_weights_come_from_a_local_file(tmp_path, more):
    """torchvision's own files have a classifier, "fc.", which a segmentation encoder has not."""
    path = encoder_file(tmp_path, **more)
    model, origin = script.build_model("resnet18", str(path))
    assert all((value == 0.25).all() or value.dtype == torch.int64 for value in model.encoder.state_dict().values())
    assert str(path) in origin and "random" not in origin
    assert not (model.decoder.state_dict()["blocks.x_0_0.conv1.0.weight"] == 0.25).any()


def test_encoder_weights_that_are_missing_are_an_error(tmp_path):
    with pytest.raises(script.TrainerError, match="nowhere.pth"):
        script.build_model("resnet18", str(tmp_path / "nowhere.pth"))


@pytest.mark.parametrize("change, named", [
    (lambda weights: weights.pop("conv1.weight"), "conv1.weight"),
    (lambda weights: weights.update({"conv1.weight": torch.zeros(64, 1, 7, 7)}), r"conv1.weight.*64, 1, 7, 7"),
    (lambda weights: weights.update({"layer9.weight": torch.zeros(3)}), "layer9.weight")])
def test_encoder_weights_that_do_not_fit_are_an_error_that_names_the_difference(tmp_path, change, named):
    path = encoder_file(tmp_path)
    weights = torch.load(path)
    change(weights)
    torch.save(weights, path)
    with pytest.raises(script.TrainerError, match=named):
        script.build_model("resnet18", str(path))


def test_encoder_weights_of_another_encoder_are_an_error(tmp_path):
    with pytest.raises(script.TrainerError, match="does not fit"):
        script.build_model("resnet34", str(encoder_file(tmp_path)))


@pytest.mark.parametrize("content", [b"", b"<html>404</html>", b"PK\x03\x04 cut short"])
def test_a_weights_file_that_is_none_is_an_error(tmp_path, content):
    (tmp_path / "encoder.pth").write_bytes(content)
    with pytest.raises(script.TrainerError, match="encoder.pth"):
        script.build_model("resnet18", str(tmp_path / "encoder.pth"))


class NoProxy(Exception):
    """What httpx raises for a proxy that refuses: no OSError."""


def hub_that_raises(error, monkeypatch):
    """Let every download fail at once in the given way."""
    def build(*args, encoder_weights=None, **options):
        if encoder_weights:
            raise error
        return UnetPlusPlus(*args, encoder_weights=None, **options)
    monkeypatch.setattr(script.smp, "UnetPlusPlus", build)


@pytest.mark.parametrize("error", [
    LocalEntryNotFoundError("the hub cannot be reached"), ConnectionError("the hub cannot be reached"),
    ConnectionResetError(),  # without a word
    NoProxy("the hub cannot be reached"),
    ImportError("the hub cannot be reached: no socksio")])
def test_without_a_download_the_model_starts_at_random_and_says_so_loudly(error, monkeypatch, capsys):
    """A refusing or SOCKS proxy, or a mirror without https://, raises errors that are no OSError."""
    hub_that_raises(error, monkeypatch)
    model, origin = script.build_model("resnet18", "imagenet")
    err = capsys.readouterr().err
    assert "WARNING" in err and err.count("!") > 50
    for hint in (type(error).__name__, str(error), "HF_ENDPOINT", "ENCODER_WEIGHTS", "--encoder-weights", "RANDOM"):
        assert hint in err
    assert origin.startswith("random") and type(error).__name__ in origin
    assert isinstance(model, UnetPlusPlus)


@pytest.mark.parametrize("encoder", ["mit_b0", "resnext101_32x4d"])
def test_an_encoder_that_cannot_be_had_is_an_error_and_not_a_random_start(encoder):
    """UNet++ does not take the first, and the second has no weights called imagenet: not the network's fault."""
    with pytest.raises(script.TrainerError, match=encoder):
        script.build_model(encoder, "imagenet")


def test_a_random_start_is_recorded_and_repeated_beside_the_final_score(data, tmp_path, monkeypatch, capsys):
    hub_that_raises(LocalEntryNotFoundError("the hub cannot be reached"), monkeypatch)
    words = [*FAST, "--encoder-weights", "imagenet", "--data-dir", data, "--output-dir", tmp_path / "out"]
    assert script.main([str(word) for word in words]) == 0
    err = capsys.readouterr().err
    assert err.count("RANDOM") == 2
    record = json.loads((tmp_path / "out" / "unet_plusplus_best.json").read_text(encoding="utf-8"))
    assert "random" in record["encoder_weights_from"] and "cannot be reached" in record["encoder_weights_from"]


# --- the checkpoint in other code


def test_the_recipe_loads_the_checkpoint_in_a_process_without_the_script(best, tmp_path):
    """Verbatim, beside the file, and with the same logits as load_model()."""
    image = noise(64, 64, 3)
    np.save(tmp_path / "image.npy", image)
    code = "import segmentation_models_pytorch as smp\nimport torch\n" + RECIPE + textwrap.dedent(f"""
        import sys
        import numpy as np
        assert "brain_tumor_integrated_smp" not in sys.modules
        x = torch.from_numpy(np.load({str(tmp_path / 'image.npy')!r})).permute(2, 0, 1)[None] / 255
        mean, std = (torch.tensor(v)[:, None, None] for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
        with torch.no_grad():
            np.save({str(tmp_path / 'logits.npy')!r}, model.eval()((x - mean) / std).numpy())
        """)
    done = subprocess.run([sys.executable, "-c", code], cwd=best.parent, capture_output=True, encoding="utf-8",
                          env=os.environ | {"CUDA_VISIBLE_DEVICES": ""}, timeout=300)
    assert done.returncode == 0, done.stderr
    model = script.load_model(best, "cpu")
    with torch.no_grad():
        logits = model(script.to_input(image[None], CPU))
    np.testing.assert_allclose(np.load(tmp_path / "logits.npy"), logits.numpy(), atol=1e-3, rtol=1e-3)
    assert logits.std() > 0.1


def test_the_checkpoint_holds_nothing_but_plain_cpu_tensors(best):
    """Loaded without map_location, as by the recipe."""
    state = torch.load(best, weights_only=True)
    plain = smp.UnetPlusPlus("resnet34", encoder_weights=None).state_dict()
    assert list(state) == list(plain)
    for name, value in state.items():
        assert value.device.type == "cpu" and value.is_contiguous() and not value.requires_grad
        assert value.dtype == (torch.int64 if name.endswith("num_batches_tracked") else torch.float32)
        assert torch.isfinite(value).all()


def test_load_model_uses_the_stored_settings(best, capsys):
    record = json.loads(best.with_suffix(".json").read_text(encoding="utf-8"))
    model = script.load_model(best, "cpu")
    assert not model.training and next(model.parameters()).device == CPU
    assert model.prediction_settings["img_size"] == record["img_size"] == 64
    assert model.prediction_settings["threshold"] == record["threshold"]
    assert capsys.readouterr().err == ""


def test_load_model_builds_the_stored_encoder(data, tmp_path):
    words = [*FAST, "--data-dir", data, "--output-dir", tmp_path / "out", "--mean", 0.4, 0.5, 0.6]
    assert script.main([str(word) for word in words]) == 0  # FAST uses resnet18, the constant is resnet34
    model = script.load_model(tmp_path / "out" / "unet_plusplus_best.pth", "cpu")
    assert sum(p.numel() for p in model.parameters()) < 20e6
    assert tuple(model.prediction_settings["mean"]) == (0.4, 0.5, 0.6)
    assert tuple(model.prediction_settings["std"]) == script.STD


def test_load_model_without_the_json_uses_the_constants_and_says_so(best, tmp_path, capsys):
    model = script.load_model(copied(best, tmp_path, json_too=False), "cpu")
    err = capsys.readouterr().err
    assert "WARNING" in err and "json" in err and "IMG_SIZE" in err.replace("img_size", "IMG_SIZE")
    assert model.prediction_settings["img_size"] == script.IMG_SIZE and model.prediction_settings["threshold"] == 0.5


def test_load_model_does_not_trust_the_json_of_another_checkpoint(best, tmp_path, capsys):
    path = copied(best, tmp_path)
    state = torch.load(path)
    state["segmentation_head.0.bias"] += 1
    torch.save(state, path)
    model = script.load_model(path, "cpu")
    assert "WARNING" in capsys.readouterr().err
    assert model.prediction_settings["img_size"] == script.IMG_SIZE


@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff\xfe\x00"])
def test_load_model_survives_a_damaged_json(best, tmp_path, content, capsys):
    path = copied(best, tmp_path)
    path.with_suffix(".json").write_bytes(content)
    script.load_model(path, "cpu")
    assert "WARNING" in capsys.readouterr().err


def test_load_model_names_a_file_that_is_missing_or_does_not_fit(tmp_path):
    with pytest.raises(script.TrainerError, match="gone.pth"):
        script.load_model(tmp_path / "gone.pth", "cpu")
    torch.save({"weight": torch.zeros(3)}, tmp_path / "other.pth")
    with pytest.raises(script.TrainerError, match="other.pth"):
        script.load_model(tmp_path / "other.pth", "cpu")


# --- predict_mask


@pytest.mark.parametrize("height, width", [(64, 64), (80, 50), (31, 200), (256, 256), (1, 1)])
def test_a_predicted_mask_has_the_size_of_its_image(small, height, width):
    mask = script.predict_mask(small, noise(height, width, 3))
    assert isinstance(mask, np.ndarray) and mask.dtype == np.uint8 and mask.shape == (height, width)
    assert set(np.unique(mask)) <= {0, 1}


@pytest.mark.parametrize("image", [
    noise(64, 64), noise(64, 64, 1), noise(64, 64, 4), noise(3, 64, 64)[:, :, :2], noise(64, 64, 3).astype(np.float32),
    noise(64, 64, 3) > 9, noise(2, 64, 64, 3), torch.zeros(64, 64, 3, dtype=torch.uint8), [[1, 2, 3]], None, "scan.png",
    np.zeros((0, 64, 3), np.uint8), np.zeros((64, 0, 3), np.uint8)])
def test_predict_mask_refuses_everything_but_rgb_bytes(small, image):
    with pytest.raises(ValueError):
        script.predict_mask(small, image)


@pytest.mark.parametrize("size", [80, 64])
def test_predict_mask_takes_views_such_as_bgr_turned_into_rgb(small, size):
    """image[..., ::-1] after cv2 has negative strides, whatever its size."""
    image = noise(size, size, 3)
    turned = script.predict_mask(small, image[..., ::-1])
    assert np.array_equal(turned, script.predict_mask(small, np.ascontiguousarray(image[..., ::-1])))
    mirrored = script.predict_mask(small, image[:, ::-1])
    assert np.array_equal(mirrored, script.predict_mask(small, np.ascontiguousarray(image[:, ::-1])))


def test_predict_mask_leaves_image_and_model_as_they_were(small):
    image = noise(64, 64, 3)
    before, weights = image.copy(), copy.deepcopy(small.state_dict())
    small.train()
    first = script.predict_mask(small, image)
    assert small.training
    small.eval()
    assert np.array_equal(first, script.predict_mask(small, image)) and not small.training  # BatchNorm was in eval mode
    assert np.array_equal(image, before)
    assert all(torch.equal(value, weights[name]) for name, value in small.state_dict().items())


def test_predict_mask_follows_the_stored_threshold_and_statistics(small):
    image = noise(96, 96, 3)
    def mask(**changes):
        model = copy.copy(small)
        model.prediction_settings = small.prediction_settings | changes
        return script.predict_mask(model, image)
    shares = [mask(threshold=t).mean() for t in (0.0, 0.3, 0.5, 0.7, 1.01)]
    assert shares == sorted(shares, reverse=True) and shares[0] == 1 and shares[-1] == 0
    middle = float(np.median(script.predict_probability(small, script.resize(image, 64, 64), 96, 96)))
    assert (mask(threshold=middle) != mask(threshold=middle, mean=(0.1, 0.1, 0.1))).any()


def test_a_probability_equal_to_the_threshold_is_tumour(small):
    """As in every score of the script: >=."""
    model = copy.deepcopy(small)
    torch.nn.init.zeros_(model.segmentation_head[0].weight)
    torch.nn.init.zeros_(model.segmentation_head[0].bias)  # probability 0.5 everywhere
    assert script.predict_mask(model, noise(64, 64, 3)).all()


def test_a_model_loaded_by_the_recipe_predicts_with_the_constants_and_says_so(best, capsys):
    model = smp.UnetPlusPlus(encoder_name="resnet34", encoder_weights=None, in_channels=3, classes=1)
    model.load_state_dict(torch.load(best))
    image = noise(100, 70, 3)
    mask = script.predict_mask(model, image)
    assert mask.shape == (100, 70)
    err = capsys.readouterr().err
    assert "WARNING" in err and "img_size" in err.lower()
    again = script.load_model(best, "cpu")
    again.prediction_settings = prediction_settings(script.IMG_SIZE)
    assert np.array_equal(script.predict_mask(again, image), mask)


# --- prediction equals evaluation


def test_predicted_masks_give_the_scores_of_the_evaluation(best, tmp_path):
    """Counted here from predict_mask() on the files, on images of other shapes too.

    Two correct computations may differ where a probability lies within 1e-3 of the threshold.
    """
    test, entries, notes = tmp_path / "data" / "test", [], []
    test.mkdir(parents=True)
    for i, (height, width) in enumerate([(64, 64), (90, 130), (150, 70)]):
        image = cv2.GaussianBlur(noise(height, width, seed=i), (0, 0), 4)
        image = cv2.normalize(image, None, 0, 160, cv2.NORM_MINMAX)
        image[20:45, 20:50] = 235
        (test / f"切片_{i}.png").write_bytes(cv2.imencode(".png", image)[1].tobytes())
        entries.append({"id": i, "file_name": f"切片_{i}.png", "height": height, "width": width})
        notes.append({"id": i, "image_id": i, "category_id": 1, "segmentation": [box(20, 20, 30, 25)], "iscrowd": 0})
    write_coco(test, entries, notes)
    write_data(tmp_path / "data", train=0, test=0)
    checkpoint = copied(best, tmp_path)
    words = ["--evaluate", "--checkpoint", checkpoint, "--data-dir", tmp_path / "data", "--output-dir",
             tmp_path / "out", "--device", "cpu", "--num-workers", 0]
    assert script.main([str(word) for word in words]) == 0
    with open(tmp_path / "out" / "test_metrics.csv", encoding="utf-8") as file:
        rows = {row["file_name"]: row for row in csv.DictReader(file)}
    model = script.load_model(checkpoint, "cpu")
    found = 0
    for entry in entries:
        image = script.read_image(test / entry["file_name"])
        mask = script.predict_mask(model, image)
        truth = np.zeros_like(mask)
        truth[20:45, 20:50] = 1
        probability = script.predict_probability(model, script.resize(image, 64, 64), *mask.shape)
        close = int((np.abs(probability - model.prediction_settings["threshold"]) < 1e-3).sum())
        row = rows[entry["file_name"]]
        counts = [int(row[f"{kind}_px"]) for kind in ("true_positive", "false_positive", "false_negative")]
        expected = [(mask & truth).sum(), (mask & ~truth & 1).sum(), (truth & ~mask & 1).sum()]
        assert np.abs(np.subtract(counts, expected)).max() <= close
        assert counts[0] + counts[2] == truth.sum()
        found += counts[0] + counts[1]
    assert 0 < found < sum(entry["height"] * entry["width"] for entry in entries)


# --- --predict


def predict(best, out, *sources):
    """Run --predict; returns the exit code."""
    return script.main(["--predict", *map(str, sources), "--checkpoint", str(best), "--output-dir", str(out),
                        "--device", "cpu"])


def pixels(path):
    """Grey or colour pixels of a PNG as stored."""
    return cv2.imdecode(np.fromfile(path, np.uint8), cv2.IMREAD_UNCHANGED)


def scan(path, seed=0, shape=(60, 44)):
    """A grey image file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(cv2.imencode(path.suffix, noise(*shape, seed=seed))[1].tobytes())
    return path


def names(folder):
    """Names of the files in a folder."""
    return sorted(path.name for path in folder.iterdir())


def test_predict_writes_a_mask_and_an_overlay_for_each_image(best, tmp_path):
    image, out = scan(tmp_path / "影像" / "扫描 1.png"), tmp_path / "out"
    assert predict(best, out, image) == 0
    assert names(out) == ["扫描 1_mask.png", "扫描 1_overlay.png"]
    mask, overlay = pixels(out / "扫描 1_mask.png"), pixels(out / "扫描 1_overlay.png")
    expected = script.predict_mask(script.load_model(best, "cpu"), script.read_image(image))
    assert mask.shape == (60, 44) and np.array_equal(mask, 255 * expected)
    assert overlay.shape == (60, 44, 3)


def test_an_overlay_shows_the_image_and_tints_the_mask_red():
    image = np.full((60, 60, 3), 100, np.uint8)
    mask = np.zeros((60, 60), np.uint8)
    mask[20:40, 20:40] = 1
    overlay = script.draw_overlay(image, mask)
    assert (image == 100).all()
    assert overlay[5, 5].tolist() == [100, 100, 100]
    red, green, blue = overlay[30, 30].astype(int)
    assert red > 120 and green == blue < 100


def test_predict_never_writes_over_an_input_or_over_an_earlier_result(best, tmp_path):
    out = tmp_path / "out"
    first, second = scan(tmp_path / "a" / "scan.png", 1), scan(tmp_path / "b" / "scan.jpg", 2)
    taken = scan(out / "scan_mask.png", 3)
    before = taken.read_bytes()
    assert predict(best, out, first, second) == 0
    assert taken.read_bytes() == before
    assert len(names(out)) == 5
    model = script.load_model(best, "cpu")
    masks = {pixels(path).tobytes() for path in out.glob("scan_mask*.png") if path != taken}
    assert masks == {(255 * script.predict_mask(model, script.read_image(path))).tobytes() for path in (first, second)}
    kept = {path: path.read_bytes() for path in out.iterdir()}
    assert predict(best, out, first) == 0
    assert all(path.read_bytes() == content for path, content in kept.items())
    assert len(names(out)) == 7


def test_predict_takes_all_images_of_a_folder_but_not_its_own_outputs(best, tmp_path):
    folder = tmp_path / "scans"
    scan(folder / "one.png")
    scan(folder / "deeper" / "two.JPG")
    scan(folder / "training_samples.png")
    (folder / "notes.txt").write_text("no image")
    assert predict(best, folder, folder) == 0
    written = {"one_mask.png", "one_overlay.png", "two_mask.png", "two_overlay.png"}
    assert written < set(names(folder)) and len(names(folder)) == 8
    assert predict(best, folder, folder) == 0  # a second time: the four pictures are no inputs
    assert len(names(folder)) == 12
    assert predict(best, folder, folder) == 0  # nor are those with a number
    assert len(names(folder)) == 16


def test_predict_leaves_its_own_outputs_out_of_a_wildcard_too(best, tmp_path):
    """`--predict scans/*` after an earlier run: the shell names the outputs one by one."""
    scan(tmp_path / "scans" / "one.png")
    assert predict(best, tmp_path / "scans", tmp_path / "scans") == 0
    assert predict(best, tmp_path / "out", *sorted((tmp_path / "scans").iterdir())) == 0
    assert names(tmp_path / "out") == ["one_mask.png", "one_overlay.png"]


def test_predict_says_what_it_could_not_find_or_read(best, tmp_path, capsys):
    assert predict(best, tmp_path / "out", tmp_path / "gone.png") == 2
    assert "gone.png" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert predict(best, tmp_path / "out", tmp_path / "empty") == 2
    good, bad = scan(tmp_path / "good.png"), tmp_path / "bad.png"
    bad.write_bytes(b"no image")
    capsys.readouterr()
    assert predict(best, tmp_path / "out", bad, good) != 0
    assert "bad.png" in capsys.readouterr().err
    assert names(tmp_path / "out") == ["good_mask.png", "good_overlay.png"]


def test_predict_without_a_checkpoint_is_an_error(tmp_path, capsys):
    assert script.main(["--predict", str(scan(tmp_path / "a.png")), "--output-dir", str(tmp_path / "out"),
                        "--device", "cpu"]) == 2
    assert "unet_plusplus_best.pth" in capsys.readouterr().err


def test_flags_hold_for_a_checkpoint_without_its_json(best, tmp_path, capsys):
    """The warning names the script's constants, and every constant can be overridden on the command line."""
    path = copied(best, tmp_path, json_too=False)
    image, used = scan(tmp_path / "a.png"), []
    original = script.predict_mask
    def spy(model, pixels):
        used.append(model.prediction_settings["img_size"])
        return original(model, pixels)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script, "predict_mask", spy)
        assert script.main(["--predict", str(image), "--checkpoint", str(path), "--output-dir", str(tmp_path / "out"),
                            "--device", "cpu", "--img-size", "96"]) == 0
    assert used == [96]


# --- the training step


def frozen_batchnorm(model):
    """BatchNorm in evaluation mode for good: then the result of a step does not depend on how images are grouped."""
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()
            module.train = lambda mode=True, module=module: module
    return model


def batches_of(size, count=4, seed=0):
    """Raw uint8 batches, as the loaders of the script send them; one image has an empty mask."""
    images, masks = noise(count, 64, 64, 3, seed=seed), np.zeros((count, 64, 64), np.uint8)
    for i in range(1, count):
        masks[i, 5 * i:40, 10:20 + 8 * i] = 1
    return [(images[i:i + size], masks[i:i + size]) for i in range(0, count, size)]


def one_epoch(batches, **changes):
    """Train the same frozen-BatchNorm model on batches; returns (what train_one_epoch says, steps, weights)."""
    torch.manual_seed(0)
    model = frozen_batchnorm(script.build_model("resnet18", None)[0])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, fused=True)
    steps = []
    optimizer.register_step_post_hook(lambda *_: steps.append(1))
    cfg = settings(**{"GRAD_CLIP": 0.0} | changes)
    stats = script.train_one_epoch(model, batches, script.LOSSES["dice_bce"](), optimizer,
                                   torch.amp.GradScaler("cuda", enabled=False), CPU, cfg=cfg)
    return stats, len(steps), torch.cat([p.detach().flatten() for p in model.parameters()])


def test_two_small_batches_accumulated_are_one_large_batch():
    whole, steps, expected = one_epoch(batches_of(4), ACCUMULATION_STEPS=1)
    halves, half_steps, weights = one_epoch(batches_of(2), ACCUMULATION_STEPS=2)
    assert steps == half_steps == 1
    torch.testing.assert_close(weights, expected, atol=2e-6, rtol=1e-4)
    assert halves["train_loss"] == pytest.approx(whole["train_loss"], abs=1e-5)
    torch.manual_seed(0)
    start = torch.cat([p.detach().flatten() for p in script.build_model("resnet18", None)[0].parameters()])
    assert (expected - start).abs().max() > 1e-3


def test_groups_are_weighted_by_their_true_number_of_images():
    """Batches of 3 and 1 make the same step as one of 4."""
    four = batches_of(4)[0]
    uneven = [tuple(part[:3] for part in four), tuple(part[3:] for part in four)]
    _, _, expected = one_epoch([four], ACCUMULATION_STEPS=1)
    _, _, weights = one_epoch(uneven, ACCUMULATION_STEPS=2)
    torch.testing.assert_close(weights, expected, atol=2e-6, rtol=1e-4)


def test_the_last_shorter_group_makes_a_step_of_its_own():
    """Three batches, two per step: the third one alone is a full step, not half of one."""
    batches = batches_of(2, count=6)
    stats, steps, weights = one_epoch(batches, ACCUMULATION_STEPS=2)
    assert steps == 2
    joined = [tuple(np.concatenate([a, b]) for a, b in zip(*batches[:2])), batches[2]]
    expected_stats, _, expected = one_epoch(joined, ACCUMULATION_STEPS=1)
    moved = (expected - one_epoch([])[2]).norm()
    assert (weights - expected).norm() < 1e-3 * moved  # float32 sums in another order
    assert stats["train_loss"] == pytest.approx(expected_stats["train_loss"], abs=1e-5)


def test_gradients_are_clipped_to_the_given_norm():
    """Plain SGD moves by learning rate times gradient, so a clipped step has a known length."""
    start = one_epoch([], GRAD_CLIP=0.0)[2]
    for clip in (0.01, 0.001):
        moved = one_epoch(batches_of(4), GRAD_CLIP=clip)[2] - start
        assert moved.norm().item() == pytest.approx(0.05 * clip, rel=0.02)
    assert (one_epoch(batches_of(4), GRAD_CLIP=0.0)[2] - start).norm() > 0.05 * 0.02


@pytest.mark.parametrize("optimizer_class, options", [
    (torch.optim.AdamW, {"fused": True}), (torch.optim.AdamW, {}), (torch.optim.SGD, {})])
def test_the_six_promised_arguments_are_enough(optimizer_class, options):
    """Float batches from any loader, any optimizer, and the script's constants for the rest."""
    torch.manual_seed(0)
    model = script.build_model("resnet18", None)[0]
    loader = [(torch.randn(2, 3, 64, 64), (torch.rand(2, 1, 64, 64) < 0.3).float()) for _ in range(2)]
    optimizer = optimizer_class(model.parameters(), 1e-3, **options)
    before = copy.deepcopy(model.state_dict())
    stats = script.train_one_epoch(model, loader, script.FocalTverskyLoss(), optimizer,
                                   torch.amp.GradScaler("cuda", enabled=False), CPU)
    assert math.isfinite(stats["train_loss"]) and model.training
    assert all(not torch.equal(before[name], p) for name, p in model.named_parameters())


def test_training_lowers_the_loss_on_what_it_sees():
    """Six times the same two images: a step in the wrong direction could not do this."""
    torch.manual_seed(0)
    model = script.build_model("resnet18", None)[0]
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, fused=True)
    batches = batches_of(2, count=2)
    losses = [script.train_one_epoch(model, batches * 2, script.LOSSES["dice_bce"](), optimizer,
                                     torch.amp.GradScaler("cuda", enabled=False), CPU, cfg=settings())["train_loss"]
              for _ in range(3)]
    assert losses[-1] < 0.9 * losses[0]


# --- the course of a run


def run_with_scores(scores, tmp_path, monkeypatch, *words):
    """Run main() with given validation scores instead of training; returns (history rows, exit code)."""
    script_scores = iter(scores)
    def fake_validate(*_, **__):
        return {"valid_loss": 1.0, **script.summarize(np.array([[1, 0, 0]])), "dice": next(script_scores)}
    monkeypatch.setattr(script, "train_one_epoch",
                        lambda *_, **__: {"train_loss": 1.0, "dropped": 0, "persistent": 0.0})
    monkeypatch.setattr(script, "validate", fake_validate)
    data = write_data(tmp_path / "data", train=3, valid=1, test=0, size=64)
    code = script.main([str(word) for word in [*FAST, "--data-dir", data, "--output-dir", tmp_path / "out",
                                               "--epochs", len(scores), *words]])
    with open(tmp_path / "out" / "training_history.csv", encoding="utf-8") as file:
        return list(csv.DictReader(file)), code


def test_the_learning_rate_falls_when_validation_dice_stalls(tmp_path, monkeypatch):
    """Patience 1: the second epoch without a better Dice halves the rate of the next one. Higher is better."""
    rows, code = run_with_scores([0.1, 0.2, 0.2, 0.2, 0.3], tmp_path, monkeypatch, "--plateau-patience", 1,
                                 "--plateau-factor", 0.5, "--lr", 0.01)
    assert code == 0
    assert [float(row["lr"]) for row in rows] == [0.01, 0.01, 0.01, 0.01, 0.005]


def test_training_stops_early_and_keeps_the_best_epoch(tmp_path, monkeypatch, capsys):
    rows, code = run_with_scores([0.1, 0.5, 0.4, 0.5, 0.9], tmp_path, monkeypatch, "--early-stopping", 2)
    assert code == 0 and len(rows) == 4  # epochs 3 and 4 brought nothing better than 0.5
    record = json.loads((tmp_path / "out" / "unet_plusplus_best.json").read_text(encoding="utf-8"))
    assert record["best_epoch"] == 2
    assert "early" in capsys.readouterr().out.lower()


def test_early_stopping_of_zero_never_stops(tmp_path, monkeypatch):
    rows, code = run_with_scores([0.5, 0.1, 0.1], tmp_path, monkeypatch, "--early-stopping", 0)
    assert code == 0 and len(rows) == 3


def test_fewer_images_than_a_batch_are_enough(tmp_path, capsys):
    """Three training images, one validation image, and batches of 16; no test folder, which is said."""
    data = write_data(tmp_path / "data", train=3, valid=1, test=0, size=64)
    words = [*FAST, "--batch-size", 16, "--data-dir", data, "--output-dir", tmp_path / "out"]
    assert script.main([str(word) for word in words]) == 0
    out = capsys.readouterr().out
    assert "test" in out and str(data / "test") in out
    assert (tmp_path / "out" / "unet_plusplus_best.pth").is_file()
    assert not (tmp_path / "out" / "test_metrics.csv").exists()
    assert not (tmp_path / "out" / "test_predictions.png").exists()


def test_a_single_training_image_is_enough(tmp_path):
    data = write_data(tmp_path / "data", train=1, valid=1, test=1, size=64)
    words = [*FAST, "--data-dir", data, "--output-dir", tmp_path / "out"]
    assert script.main([str(word) for word in words]) == 0


def test_a_staged_run_starts_from_the_earlier_weights(trained, tmp_path, monkeypatch):
    """INIT_WEIGHTS: the first validation of the new run, before any step, has to see the old weights."""
    data, seen = write_data(tmp_path / "data", train=2, valid=1, test=0, size=64), []
    original = script.train_one_epoch
    def spy(model, *rest, **options):
        seen.append({name: value.clone() for name, value in model.state_dict().items()})
        return original(model, *rest, **options)
    monkeypatch.setattr(script, "train_one_epoch", spy)
    words = ["--data-dir", data, "--output-dir", tmp_path / "out", "--img-size", 96, "--lr", 1e-5, "--epochs", 1,
             "--num-workers", 0, "--device", "cpu", "--batch-size", 2,
             "--init-weights", trained[0] / "unet_plusplus_best.pth"]
    assert script.main([str(word) for word in words]) == 0
    old = torch.load(trained[0] / "unet_plusplus_best.pth")
    assert all(torch.equal(value, seen[0][name]) for name, value in old.items())
    record = json.loads((tmp_path / "out" / "unet_plusplus_best.json").read_text(encoding="utf-8"))
    assert "unet_plusplus_best.pth" in record["encoder_weights_from"] and record["img_size"] == 96


def test_init_weights_that_do_not_fit_are_an_error(trained, data, tmp_path, capsys):
    words = [*FAST, "--data-dir", data, "--output-dir", tmp_path / "out", "--init-weights",
             trained[0] / "unet_plusplus_best.pth"]
    assert script.main([str(word) for word in words]) == 2  # resnet34 weights into FAST's resnet18
    assert "does not fit" in capsys.readouterr().err
    assert not (tmp_path / "out" / "unet_plusplus_best.pth").exists()
