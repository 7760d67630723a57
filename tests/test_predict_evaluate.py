"""The model and its weights, checkpoints in other code, prediction, and the evaluation of a checkpoint."""

import contextlib
import copy
import csv
import errno
import hashlib
import http.server
import io
import json
import os
import shutil
import signal
import socket
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import background
import cv2
import numpy as np
import pytest
import segmentation_models_pytorch as smp
import torch
from conftest import FAST, ROOT, box, script, smp_build_model, tiny_build_model, write_coco, write_data
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from safetensors.torch import save_file

CPU, LAYOUTS = torch.device("cpu"), (torch.channels_last, torch.contiguous_format)
PLAIN = {"img_size": 64, "mean": (0, 0, 0), "std": (1, 1, 1), "threshold": 0.5, "test_time_augmentation": False,
         "grey_percentiles": (0, 100)}


def noise(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


@pytest.fixture(autouse=True, scope="module")
def no_pictures():
    """Tables and JSON are what counts here; drawing would take longer than all the rest."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("plot_samples", "plot_history", "plot_predictions", "plot_report"):
            patch.setattr(script, name, lambda path, *_: path.write_bytes(b"a picture"))
        yield


def bright(gain=1000, middle=0.5, shift=0):
    """The two-layer network with weights by which bright is tumour: logit = gain * (brightness - middle).

    The prediction is moved to the right by shift (0 or 1) pixels. With the gain of 1000 every probability is 0 or 1.
    """
    model = tiny_build_model()[0].eval()
    with torch.no_grad():
        for weight in (model[0].weight, model[0].bias, model[4].weight):
            weight.zero_()
        model[0].weight[0, :, 1, 1 - shift] = 1 / 3  # the mean of the three colours
        model[4].weight[0, 0], model[4].bias[0] = gain, -gain * middle
    model.prediction_settings = dict(PLAIN)
    return model


def saved(folder, model=None, **metadata):
    """A checkpoint of such a network, with its JSON. Returns its path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / script.BEST
    torch.save((model or bright()).state_dict(), path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    script.write_metadata(path, {"encoder": "resnet18", "architecture": "unet", **PLAIN, "sha256": digest} | metadata)
    return path


def main(*words):
    """The exit code of a command line."""
    return script.main([str(word) for word in (*words, "--device", "cpu")])


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def filled(boxes, shape=(64, 64)):
    """A grey picture with boxes (x, y, width, height, grey level)."""
    image = np.zeros(shape, np.uint8)
    for x, y, width, height, level in boxes:
        image[y:y + height, x:x + width] = level
    return image


def write_cases(folder, *cases):
    """A split with an image for each case: (annotated boxes, picture)."""
    images, notes = [], []
    folder.mkdir(parents=True)
    for i, (annotated, picture) in enumerate(cases):
        script.write_image(folder / f"切片_{i}.png", picture)
        images.append({"id": i, "file_name": f"切片_{i}.png", "height": len(picture), "width": picture.shape[1]})
        notes += [{"id": len(notes) + j, "image_id": i, "category_id": 1, "segmentation": [box(*where)], "iscrowd": 0}
                  for j, where in enumerate(annotated)]
    write_coco(folder, images, notes)


def table(path):
    """The rows of a table, none if there is no such file."""
    return list(csv.DictReader(path.read_text(encoding="utf-8-sig").splitlines())) if path.is_file() else []


def finish(path, data, *words):
    """End a run that has this best model; returns (its metadata, the rows of test_metrics.csv)."""
    words = ["--data-dir", data, "--output-dir", path.parent, "--device", "cpu", *words]
    cfg, _ = script.read_settings([str(word) for word in words])
    script.finish_run(cfg, script.prepare_data(cfg, ["valid", "test"], held_out={})[0], None)
    return script.read_metadata(path)[0], table(path.parent / "test_metrics.csv")


def evaluate(path, data, *words):
    """Run --evaluate, which leaves the checkpoint as it was; returns (scores.json, the rows of test_metrics.csv)."""
    before, out = {file: file.read_bytes() for file in path.parent.glob("unet*")}, path.parent / "out"
    assert main("--evaluate", "--checkpoint", path, "--data-dir", data, "--output-dir", out, *words) == 0
    assert before == {file: file.read_bytes() for file in path.parent.glob("unet*")}
    folder = max(out.glob("evaluation*"), key=lambda folder: int(folder.name.partition("_")[2] or 1))
    return json.loads((folder / "scores.json").read_text(encoding="utf-8")), table(folder / "test_metrics.csv")


def predict(path, out, *words):
    """Run --predict with a checkpoint; returns the exit code."""
    return main("--predict", *words, "--checkpoint", path, "--output-dir", out)


# --- the model and its encoder weights


def encoder_file(path, number=0.25, **more):
    """A file of ResNet18 encoder weights that are easily recognised; more replaces, adds, or (None) takes out some."""
    weights = smp.Unet("resnet18", encoder_weights=None).encoder.state_dict()
    weights = {name: torch.full_like(value, number) for name, value in weights.items()} | more
    weights = {name: value for name, value in weights.items() if value is not None}
    (save_file if path.suffix == ".safetensors" else torch.save)(weights, path)
    return path


@pytest.mark.parametrize("name, more", [("encoder.pth", {}), ("encoder.safetensors", {}), (
    "torchvision.pth", {"fc.weight": torch.zeros(1000, 512), "fc.bias": torch.zeros(1000)})])
def test_encoder_weights_come_from_a_local_file(tmp_path, name, more):
    """torchvision's own files have a classifier, "fc.", which a segmentation encoder has not."""
    path = encoder_file(tmp_path / name, **more)
    encoder = smp.encoders.get_encoder("resnet18", weights=None)
    assert script.load_encoder_weights(encoder, "resnet18", str(path)) == f"file {path}"
    assert all((value == 0.25).all() or value.dtype == torch.int64 for value in encoder.state_dict().values())


def test_build_model_makes_a_network_of_smps_and_loads_weights_into_its_encoder_alone(tmp_path):
    """UNet++ does not take every encoder."""
    with pytest.raises(script.TrainerError, match="mit_b0"):
        script.build_model("mit_b0")
    assert type(script.build_model("resnet18", None, "linknet")[0]) is smp.Linknet
    path = encoder_file(tmp_path / "encoder.pth")
    model, origin = script.build_model("resnet18", str(path))
    assert list(model.state_dict()) == list(smp.UnetPlusPlus("resnet18", encoder_weights=None).state_dict())
    assert all((value == 0.25).all() for value in model.encoder.parameters()) and origin == f"file {path}"
    assert not any((value == 0.25).all() for value in model.decoder.parameters())


@pytest.mark.parametrize("spoil, named", [
    (lambda path: path.unlink(), "not found: .*encoder.pth"), (lambda path: path.write_bytes(b""), "damaged"),
    (lambda path: path.write_bytes(path.read_bytes()[:5000]), "encoder.pth is damaged"),
    (lambda path: torch.save([1], path), "holds a list"),
    (lambda path: encoder_file(path, x=print), "damaged"),  # code: only tensors and plain values are read
    (lambda path: encoder_file(path, **{"conv1.weight": "text"}), "encoder.pth does not fit.*\n.*conv1.weight"),
    (lambda path: encoder_file(path, **{"conv1.weight": None}), "does not fit.*\n.*conv1.weight"),
    (lambda path: encoder_file(path, **{"conv1.weight": torch.zeros(64, 1, 7, 7)}), "conv1.weight.*64, 1, 7, 7"),
    (lambda path: encoder_file(path, **{"layer9.weight": torch.zeros(3)}), "does not fit.*\n.*layer9.weight")])
def test_encoder_weights_that_cannot_be_used_are_an_error_that_says_why(tmp_path, spoil, named):
    path = encoder_file(tmp_path / "encoder.pth")
    spoil(path)
    with pytest.raises(script.TrainerError, match=named):
        script.load_encoder_weights(smp.encoders.get_encoder("resnet18", weights=None), "resnet18", str(path))


class Servers(http.server.BaseHTTPRequestHandler):
    """The hub and torchvision's server, as far as a download needs them."""

    files = {}  # by the last part of the path: (content, status, length that is announced)

    def do_HEAD(self):
        content, status, length = self.files.get(self.path.rpartition("/")[2], (b"", 404, 0))
        self.send_response(200 if self.path == "/" else status)
        self.send_header("Content-Length", str(length))
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", self.path.split("/")[-2])  # the revision that was asked for
        self.end_headers()

    def do_GET(self):
        self.do_HEAD()
        self.wfile.write(self.files.get(self.path.rpartition("/")[2], (b"", 404, 0))[0])
        self.close_connection = True

    def log_message(self, *_):
        pass


@pytest.fixture
def servers(tmp_path, monkeypatch):
    """serve(hub=VALUE, torchvision=VALUE, ...) makes encoder weights of that value available; None: there are none."""
    from huggingface_hub import constants
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Servers)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_address[1]}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    if hasattr(smp.encoders, "load_url"):  # smp 0.5 has another address of its own
        monkeypatch.setattr(smp.encoders, "load_url", lambda *_, **__: os.stat(tmp_path / "no network"))

    def serve(hub=None, torchvision=None, status=200, cut=0, digest=None, answers=True):
        monkeypatch.setattr(constants, "ENDPOINT", address if answers else "http://127.0.0.1:9")
        Servers.files = {}
        if hub:
            path = encoder_file(tmp_path / "model.safetensors", hub)
            Servers.files |= {"config.json": (b"{}", status, 2),
                              path.name: (path.read_bytes(), status, path.stat().st_size)}
        content = encoder_file(tmp_path / "torchvision.pth", torchvision or 1).read_bytes()
        name = f"resnet18-{(digest or hashlib.sha256(content).hexdigest())[:8]}.pth"
        if torchvision:
            Servers.files[name] = content[:len(content) - cut], 200, len(content)
        weights = SimpleNamespace(IMAGENET1K_V1=SimpleNamespace(url=f"{address}/{name}"))
        monkeypatch.setattr(script.torchvision.models, "get_model_weights", lambda _: weights)
        return tmp_path / "torch" / "hub" / "checkpoints" / name

    yield serve
    server.shutdown()
    server.server_close()


def loaded(name="resnet18"):
    """(value of the encoder's weights, where they came from)."""
    torch.manual_seed(0)
    encoder = smp.encoders.get_encoder(name, weights=None)
    origin = script.load_encoder_weights(encoder, name, "imagenet")
    values = {float(value) for value in next(encoder.parameters()).flatten()[:99]}
    return values.pop() if len(values) == 1 else "random", origin


def test_imagenet_weights_of_resnets_come_from_torchvision_and_then_from_its_cache(servers, capsys):
    path = servers(hub=0.25, torchvision=0.5)
    assert loaded() == (0.5, "imagenet (torchvision)") and path.is_file()
    servers(hub=0.25)  # the name in the cache stays that of the weights
    script.torchvision.models.get_model_weights(0).IMAGENET1K_V1.url = f"http://127.0.0.1:9/{path.name}"
    assert loaded() == (0.5, "imagenet (torchvision)") and "WARNING" not in capsys.readouterr().err


@pytest.mark.parametrize("torchvision", [{}, {"torchvision": 0.5, "cut": 1000}], ids=["404", "cut short"])
def test_without_torchvision_they_come_from_the_hub_and_then_from_its_cache(torchvision, servers, capsys):
    servers(hub=0.25, **torchvision)
    assert loaded() == (0.25, "imagenet (Hugging Face hub)")
    servers(answers=False)
    assert loaded() == (0.25, "imagenet (Hugging Face hub)") and "WARNING" not in capsys.readouterr().err


@pytest.mark.parametrize("given, reason", [
    ({"answers": False}, "404"), ({}, "404"), ({"hub": 0.25, "status": 403}, "404"),
    ({"torchvision": 0.5, "digest": "0123456789", "answers": False}, "invalid hash value"),
    ({"torchvision": 0.5, "cut": 1000, "answers": False}, "")])
def test_where_neither_has_sound_weights_both_reasons_are_told(given, reason, servers, capsys):
    """The hub is silent, or answers with 404 or 403; torchvision's have another digest, or are cut short."""
    path = servers(**given)
    value, origin = loaded()
    of_torchvision, of_hub, _ = origin.partition("; Hugging Face hub: ")
    assert value == "random" and of_torchvision.startswith("random (torchvision: ") and of_hub
    assert reason in of_torchvision and not path.is_file() and "RANDOM weights" in capsys.readouterr().err


def test_a_damaged_file_in_the_cache_does_not_keep_the_hub_from_being_asked(servers):
    path = servers(hub=0.25, torchvision=0.5)
    path.parent.mkdir(parents=True)
    path.write_bytes(b"cut short")
    assert loaded() == (0.25, "imagenet (Hugging Face hub)")


def test_torchvision_is_asked_for_resnets_only(servers):
    """Its other files have other names for their weights."""
    servers(torchvision=0.5)
    value, origin = loaded("mobilenet_v2")
    assert value == "random" and origin.startswith("random (Hugging Face hub: ") and "torchvision: " not in origin


def test_a_server_that_never_answers_is_given_up(servers, monkeypatch):
    """It accepts the connection; without a limit this test would not end."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        servers()
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)
        script.torchvision.models.get_model_weights(0).IMAGENET1K_V1.url = f"{address}/resnet18-01234567.pth"
        monkeypatch.setattr(script, "DOWNLOAD_TIMEOUT", 0.1)
        assert loaded()[0] == "random"
    assert socket.getdefaulttimeout() is None


@pytest.mark.parametrize("error", [
    ConnectionResetError(),  # without a word
    ImportError("the hub cannot be reached: no socksio")])
def test_without_a_download_a_run_starts_at_random_and_says_so_loudly_twice(error, data, tmp_path, monkeypatch, capsys):
    """A refusing or SOCKS proxy, or a mirror without https://, raises errors that are no OSError."""
    def refuse(*_, **__):
        raise error

    def build_model(encoder, weights, _architecture):
        model = tiny_build_model()[0]
        return model, script.load_encoder_weights(model, encoder, weights)

    monkeypatch.setattr(script, "build_model", build_model)
    monkeypatch.setattr(script, "from_hub", refuse)
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", refuse)
    out = tmp_path / "out"
    assert main(*FAST, "--encoder-weights", "imagenet", "--data-dir", data, "--output-dir", out) == 0
    err = capsys.readouterr().err
    for hint in (type(error).__name__, str(error), "HF_ENDPOINT", "--encoder-weights FILE", "LR_FROM_SCRATCH"):
        assert hint in err
    assert err.count("WARNING") == err.count("RANDOM weights") == 2 and "its scores are lower" in err
    origin = script.read_metadata(out / script.BEST)[0]["encoder_weights_from"]
    assert origin.startswith("random (torchvision: ") and type(error).__name__ in origin


def test_an_encoder_without_imagenet_weights_is_an_error_and_not_a_random_start():
    """That is not the network's fault."""
    with pytest.raises(script.TrainerError, match="resnext101_32x4d"):
        script.load_encoder_weights(torch.nn.Identity(), "resnext101_32x4d", "imagenet")


# --- checkpoints and their metadata


def test_architecture_encoder_and_statistics_are_recorded_and_load_model_obeys(tmp_path, monkeypatch, capsys):
    """The constants say UNet++, ResNet34. Least data: one image to train, one to validate, no test."""
    monkeypatch.setattr(script, "build_model", smp_build_model)
    data, out = write_data(tmp_path / "data", train=1, valid=1, test=0, size=64), tmp_path / "out"
    assert main(*FAST, "--architecture", "unet", "--mean", 0.4, 0.5, 0.6, "--data-dir", data, "--output-dir", out) == 0
    assert "There is no test score" in capsys.readouterr().out
    assert not [name for name in names(out) if name.startswith("test")]
    metadata, model = script.read_metadata(out / script.BEST)[0], script.load_model(out / script.BEST, "cpu")
    assert (metadata["architecture"], metadata["encoder"], metadata["img_size"]) == ("unet", "resnet18", 64)
    assert type(model) is smp.Unet and not model.training and next(model.parameters()).device == CPU
    assert sum(p.numel() for p in model.parameters()) < 20e6
    assert model.prediction_settings["mean"] == (0.4, 0.5, 0.6) and model.prediction_settings["std"] == script.STD


@pytest.fixture
def asked(monkeypatch):
    """The arguments of build_model(), which gives the two-layer network."""
    calls = []
    monkeypatch.setattr(script, "build_model", lambda *words: calls.append(words) or tiny_build_model())
    return calls


def test_a_json_from_before_architecture_and_augmentation_loads(tmp_path, asked, monkeypatch, capsys):
    """Then every model was a UNet++, whatever the constant says now."""
    path = saved(tmp_path)
    old = script.read_metadata(path)[0]
    del old["architecture"], old["test_time_augmentation"], old["grey_percentiles"]
    script.write_metadata(path, old)
    monkeypatch.setattr(script, "ARCHITECTURE", "unet")
    model = script.load_model(path, "cpu")
    assert asked == [("resnet18", None, "unetplusplus")] and capsys.readouterr().err == ""
    assert model.prediction_settings == PLAIN


@pytest.mark.parametrize("spoil, why", [
    (lambda path: path.with_suffix(".json").unlink(), "there is no"),
    (lambda path: torch.save(bright(gain=5).state_dict(), path), "does not belong to"),
    *[(lambda path, text=text: path.with_suffix(".json").write_bytes(text), "is damaged")
      for text in (b"{", b"[]", b"\xff\xfe\x00", b'{"img_size": 96}')]])
def test_without_a_json_to_be_trusted_load_model_uses_the_settings_and_says_so(tmp_path, asked, capsys, spoil, why):
    path, cfg = saved(tmp_path), script.default_settings()
    spoil(path)
    cfg.ENCODER, cfg.ARCHITECTURE, cfg.IMG_SIZE, cfg.TEST_TIME_AUGMENTATION = "resnet50", "linknet", 224, True
    model = script.load_model(path, "cpu", cfg)
    err = capsys.readouterr().err
    assert "WARNING" in err and script.BEST in err and why in err and "'img_size': 224" in err and "resnet50" in err
    assert asked == [("resnet50", None, "linknet")] and model.metadata == {}
    assert model.prediction_settings == script.prediction_settings(cfg)


@pytest.fixture(scope="module")
def one_kind(tmp_path_factory):
    """A run on one of two categories, whose first validation image is also one in train: (data, output, text)."""
    data = write_data(tmp_path_factory.mktemp("kinds") / "data", 8, 3, 2, size=64)
    (data / "valid" / "slice_0.png").write_bytes((data / "train" / "slice_0.png").read_bytes())
    for path in data.glob("*/*.json"):
        coco = json.loads(path.read_text(encoding="utf-8"))
        coco["categories"].append({"id": 2, "name": "oedema"})
        coco["annotations"] += [{"id": 100 + i, "image_id": image["id"], "category_id": 2, "iscrowd": 0,
                                 "segmentation": [box(2, 2, 12, 12)]} for i, image in enumerate(coco["images"])]
        path.write_text(json.dumps(coco), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as text:
        patch.setattr(script, "build_model", tiny_build_model)
        assert main(*FAST, "--categories", "tumor", "--data-dir", data, "--output-dir", data.parent / "run") == 0
    return data, data.parent / "run", text.getvalue()


@pytest.mark.parametrize("name, part", [(script.BEST, None), (script.LAST, "ema")])
def test_a_staged_run_starts_from_the_earlier_weights(one_kind, tmp_path, asked, monkeypatch, capsys, name, part):
    """Nothing is downloaded for it, and its learning rate is that of pretrained weights."""
    data, run, _ = one_kind
    old, seen, inner, out = background.read(run, name), [], script.train_one_epoch, tmp_path / "out"
    monkeypatch.setattr(script, "train_one_epoch", lambda model, *rest, **options: seen.append(
        copy.deepcopy(dict(model.state_dict()))) or inner(model, *rest, **options))
    assert main(*FAST, "--encoder-weights", "imagenet", "--img-size", 96, "--data-dir", data, "--output-dir", out,
                "--init-weights", run / name) == 0
    assert background.differences(seen[0], dict(old[part] if part else old)) == [] and asked[0][1] is None
    metadata = script.read_metadata(out / script.BEST)[0]
    assert metadata["encoder_weights_from"] == f"checkpoint {run / name}" and metadata["img_size"] == 96
    assert f"Learning rate {script.LR:g} (weights: checkpoint {run / name})" in capsys.readouterr().out


def test_init_weights_that_do_not_fit_are_an_error(one_kind, tmp_path, capsys):
    words = ["--data-dir", one_kind[0], "--output-dir", tmp_path / "out", "--init-weights", one_kind[1] / script.BEST]
    assert main(*FAST, *words) == 2 and not list((tmp_path / "out").glob("unet*"))
    assert "does not fit" in capsys.readouterr().err


@pytest.mark.parametrize("layout", LAYOUTS)
def test_weights_lie_in_memory_as_the_inputs_do(tmp_path, tiny, monkeypatch, layout):
    monkeypatch.setattr(script, "memory_format", lambda device: layout)
    model, images = script.load_model(saved(tmp_path), "cpu"), script.to_input(noise(2, 64, 64, 3), CPU)
    for tensor in (model[0].weight, images):
        assert [one for one in LAYOUTS if tensor.is_contiguous(memory_format=one)] == [layout]


# --- predict_mask, with and without test-time augmentation


@pytest.mark.parametrize("height, width", [(64, 64), (80, 50), (31, 200), (256, 256), (1, 1)])
def test_a_predicted_mask_has_the_size_of_its_image(height, width):
    image = np.zeros((height, width, 3), np.uint8)
    image[:, width // 2:] = 255
    mask = script.predict_mask(bright(), image)
    assert mask.dtype == np.uint8 and mask.shape == (height, width) and set(np.unique(mask)) <= {0, 1}
    assert (mask[:, 0] == (width == 1)).all() and mask[:, -1].all()


@pytest.mark.parametrize("image", [
    noise(64, 64), noise(64, 64, 1), noise(64, 64, 4), noise(64, 64, 3) / 1, noise(64, 64, 3) > 9, noise(2, 64, 64, 3),
    torch.zeros(64, 64, 3, dtype=torch.uint8), [[1, 2, 3]], None, "scan.png", noise(0, 64, 3), noise(64, 0, 3)])
def test_predict_mask_refuses_everything_but_rgb_bytes(image):
    with pytest.raises(ValueError, match="RGB uint8"):
        script.predict_mask(bright(), image)


def test_predict_mask_takes_views_such_as_bgr_turned_into_rgb():
    """image[..., ::-1] after cv2 has negative strides, also where nothing is resized. Only red counts here."""
    model, image = bright(), noise(64, 64, 3)
    with torch.no_grad():
        model[0].weight[0, :, 1, 1] = torch.tensor([1.0, 0, 0])
    for view in (image[..., ::-1], image[:, ::-1], image[::-1]):
        assert np.array_equal(script.predict_mask(model, view), view[..., 0] > 127)


@pytest.mark.parametrize("changes", [{"threshold": 0.26}, {"mean": (-0.2,) * 3}, {"std": (0.7,) * 3}])
def test_predict_mask_follows_the_stored_threshold_and_statistics(changes):
    """Brightness 0.4 is probability 0.269 here, with mean -0.2 or deviation 0.7 more than 0.5."""
    model, image = bright(gain=10), np.full((64, 64, 3), 102, np.uint8)
    assert not script.predict_mask(model, image).any()
    model.prediction_settings |= changes
    assert script.predict_mask(model, image).all()
    assert script.predict_mask(bright(gain=0), image).all()  # 0.5 everywhere: equal to the threshold is tumour


def test_a_model_from_elsewhere_predicts_with_the_constants_and_says_so_once(capsys):
    model, same, image = bright(), bright(), noise(100, 70, 3)
    del model.prediction_settings
    same.prediction_settings = script.prediction_settings(script.default_settings())
    for warned in (True, False):
        assert np.array_equal(script.predict_mask(model, image), script.predict_mask(same, image))
        assert (f"'img_size': {script.IMG_SIZE}" in capsys.readouterr().err) == warned


def test_test_time_augmentation_is_the_mean_over_the_image_and_its_mirror_image():
    """A network that makes a knight's move, 1 down and 2 to the right; seen in the mirror, 2 to the left."""
    model, image = bright(), np.zeros((32, 32, 3), np.uint8)
    model.forward = lambda images: torch.roll(images[:, :1], (1, 2), (2, 3)) * 400 - 200  # probability 1 or 0
    image[10, 20] = 255
    once, expected = np.zeros((32, 32), np.float32), np.zeros((32, 32), np.float32)
    once[11, 22], expected[11, [18, 22]] = 1, 1 / 2
    assert np.array_equal(script.predict_probability(model, image, 32, 32), once)
    model.prediction_settings["test_time_augmentation"] = True
    assert np.array_equal(script.predict_probability(model, image, 32, 32), expected)


def test_evaluation_prediction_and_predict_mask_use_test_time_augmentation_alike(tmp_path, tiny):
    """A network that predicts one pixel too far to the right: 9 of 10 columns of a box are found, Dice 0.9.

    In the mirror it is one too far to the left. Their mean is 1/2 in two columns on either side, and 12 columns
    are found up to threshold 0.5: Dice 20/22.
    """
    picture, data = filled([(20, 30, 10, 10, 255)]), tmp_path / "data"
    for split in ("valid", "test"):
        write_cases(data / split, ([(20, 30, 10, 10)], picture))
    path = saved(tmp_path / "run", bright(shift=1))
    for words, augmented, dice in (([], False, 0.9), (["--test-time-augmentation"], True, 20 / 22), ([], False, 0.9)):
        # At the end of a run, which the JSON records; then whatever the JSON says, where a flag says otherwise.
        for found, rows in (finish(path, data, *words), evaluate(path, data, *words)):
            assert found["test_time_augmentation"] is augmented and found["threshold"] == 0.5
            assert found["valid_metrics"]["dice"] == found["test_metrics"]["dice"] == pytest.approx(dice)
            assert float(rows[0]["dice"]) == pytest.approx(dice)
        mask = script.predict_mask(script.load_model(path, "cpu"), np.dstack([picture] * 3))
        left = np.roll(picture, -1, 1) if augmented else 0
        assert np.array_equal(mask, np.maximum(np.roll(picture, 1, 1), left) // 255)
        for flag in ([], ["--no-test-time-augmentation"], ["--test-time-augmentation"]):
            out = tmp_path / f"masks_{len(names(tmp_path))}"
            assert predict(path, out, data / "test", *flag) == 0
            left = np.roll(picture, -1, 1) if (augmented if not flag else "--no" not in flag[0]) else 0
            expected = np.maximum(np.roll(picture, 1, 1), left)
            assert np.array_equal(script.read_image(out / "predictions" / "masks" / "切片_0.png")[..., 0], expected)


# --- the end of a run, and --evaluate


DECOY = [([(8, 8, 20, 20)], filled([(8, 8, 20, 20, 102), (40, 40, 16, 16, 51)]))]
# Large: 1,000 pixels with probability 0.90, and 500 wrong ones with 0.60. Small: 16 pixels with 0.398. Up to 0.35 Dice
# is 0.8 and 1, from 0.65 on it is 1 and 0; of all pixels together 0.80 and 0.99.
UNEQUAL = [([(2, 2, 50, 20)], filled([(2, 2, 50, 20, 184), (2, 40, 50, 10, 138)])),
           ([(30, 30, 4, 4)], filled([(30, 30, 4, 4, 117)]))]


@pytest.mark.parametrize("cases, middle, threshold, dice", [
    (DECOY, 0.5, 0.25, 1), (DECOY, 0.3, 0.5, 1), (DECOY, 0.1, 0.75, 1), (UNEQUAL, 0.5, 0.35, 0.9)])
def test_the_threshold_is_the_least_extreme_of_the_best_on_valid(tmp_path, tiny, cases, middle, threshold, dice):
    """Of tumour and decoy, probabilities 0.269 and 0.047, or 0.731 and 0.269, or 0.953 and 0.731."""
    write_cases(tmp_path / "data" / "valid", *cases)
    metadata, rows = finish(saved(tmp_path / "run", bright(10, middle)), tmp_path / "data")
    assert metadata["threshold"] == threshold and rows == []
    assert metadata["valid_metrics"]["dice"] == pytest.approx(dice)


def test_scores_boundaries_lesions_and_intervals_agree_in_table_json_and_printed_lines(tmp_path, tiny, capsys):
    """Cases whose numbers are known by hand: Dice, HD95, tumours annotated, touched, and predicted for nothing."""
    block = (20, 20, 10, 10)
    cases = [
        ([block], [(*block, 255)], (1, 0, 1, 1, 0)),
        # Distances of boundaries 0, 0 and 30: their 95th percentile is 27.
        ([(5, 5, 1, 1), (35, 5, 1, 1)], [(5, 5, 1, 1, 255)], (2 / 3, 27, 2, 1, 0)),
        ([], [(*block, 255)], (0, "", 0, 0, 1)),  # undefined: an empty cell
        ([], [], ("", "", 0, 0, 0)),
        ([block], [(23, 20, 10, 10, 255)], (0.7, 3, 1, 1, 0))]  # three pixels too far to the right
    data = tmp_path / "data"
    write_cases(data / "test", *[(annotated, filled(boxes)) for annotated, boxes, _ in cases])
    write_cases(data / "valid", ([block], filled([(*block, 255)])))
    metadata, rows = finish(saved(tmp_path / "run", valid_metrics_at_img_size={"dice": 0.75}), data)
    columns = ("dice", "hd95_px", "lesions", "lesions_found", "false_lesions")
    for row, (_, _, numbers) in zip(rows, cases, strict=True):
        assert [row[name] and float(row[name]) for name in columns] == [
            number if number == "" else pytest.approx(number, abs=1e-6) for number in numbers]
    found, dice = metadata["test_metrics"], np.array([case[2][0] for case in cases if case[2][0] != ""])
    iou = dice / (2 - dice)
    for name, values in (("dice", dice), ("iou", iou)):
        assert found[name] == pytest.approx(values.mean())
        assert found[f"{name}_95_ci"] == pytest.approx(script.confidence_interval(values)) and found[f"{name}_n"] == 4
    assert found["hd95_px"] == pytest.approx((27 + 3) / 3) and found["hd95_px_n"] == 3
    assert [found[name] for name in columns[2:]] == [4, 3, 1]
    out = capsys.readouterr().out

    def cell(name):
        return f"{found[name]:.4f} " + "({:.3f} to {:.3f})".format(*found[f"{name}_95_ci"])

    for line in ("Threshold 0.50 gives the best Dice on valid. ", "epochs (0.7500) is at 64 px and threshold 0.5",
                 f"{'':31}{'valid':32}test\n",
                 f"  {'images':29}{'1':32}5\n",
                 f"  {'dice':29}{'1.0000':32}{cell('dice')} n=4\n",
                 f"  {'iou':29}{'1.0000':32}{cell('iou')} n=4\n",
                 f"  {'precision':29}{'1.0000':32}0.6750 n=4\n",
                 f"  {'dice_with_tumour':29}{'1.0000':32}{cell('dice_with_tumour')}\n",
                 f"  {'tumour_free_predicted_empty':29}{'':32}0.5000\n",
                 f"  {'hd95_px':29}{'0.0000':32}{found['hd95_px']:.4f} n=3\n",
                 f"  {'lesions':29}{'1 of 1 found, 0 false':32}3 of 4 found, 1 false\n\n",
                 f"  {'dice_of_whole_image':29}{200 / 4196:<32.4f}{found['dice_of_whole_image']:.4f}\n",
                 "  The intervals are too narrow if several images come from one patient: see PATIENT_PATTERN.\n"):
        assert line in out, out
    assert not any(name in out for name in ("pooled_iou", "_95_ci", "lesions_found"))
    reported = ["images", "dice", "iou", "precision", "recall", "hd95_px", "lesions"]
    lines = [line.split()[:1] for line in out.rpartition(f"{'':31}valid")[2].splitlines()[1:]]
    assert [name for name, in lines[:lines.index([])] if name in reported] == reported


def test_without_any_dice_a_run_takes_it_for_0_and_writes_no_nan(tmp_path, monkeypatch, capsys):
    """A model that predicts nothing. In valid, the tumour of one pixel vanishes at IMG_SIZE; in test, there is none."""
    def blind(*_):
        model = tiny_build_model()[0]
        torch.nn.init.constant_(model[4].bias, -100.0)
        return model, "random"

    def no_nan(word):
        raise AssertionError(word)

    monkeypatch.setattr(script, "build_model", blind)
    data, out = tmp_path / "data", tmp_path / "out"
    write_cases(data / "train", *[([(20, 20, 20, 20)], noise(64, 64, seed=number)) for number in range(3)])
    write_cases(data / "valid", ([(60, 60, 1, 1)], noise(128, 128)))
    write_cases(data / "test", ([], noise(64, 64)))
    assert main(*FAST, "--epochs", 3, "--data-dir", data, "--output-dir", out) == 0
    record = json.loads((out / script.BEST).with_suffix(".json").read_text("utf-8"), parse_constant=no_nan)
    assert record["best_epoch"] == 1 and "dice" not in record["valid_metrics_at_img_size"]
    assert record["valid_metrics"]["dice"] == 0 and record["threshold"] == 0.5
    expected = {"images": 1, "tumour_free_predicted_empty": 1, "dice_of_whole_image": 0, "lesions": 0,
                "lesions_found": 0, "false_lesions": 0}
    assert record["test_metrics"].items() >= expected.items() and "dice" not in record["test_metrics"]
    assert [row.get("dice", "") for row in table(out / "training_history.csv")] == [""] * 3
    assert [table(out / "test_metrics.csv")[0][name] for name in ("dice", "recall", "hd95_px")] == [""] * 3
    assert "none is predicted: there is no Dice." in capsys.readouterr().out


def test_masks_of_predict_mask_give_the_scores_of_the_evaluation(tmp_path, tiny):
    """Pixels are counted here. The images differ in size: threads must not mix up their order."""
    cases, data, path = [], tmp_path / "data", saved(tmp_path / "run", bright(20, 0.58, shift=1))
    for i, (height, width) in enumerate([(160, 200), (64, 64), (90, 130), (150, 70), (31, 48), (64, 64), (128, 128)]):
        where, blurred = (width // 4, height // 3, width // 3 + i, height // 3), cv2.blur(noise(height, width), (9, 9))
        cases.append(([where], np.maximum(blurred, filled([(*where, 160)], (height, width)))))
    write_cases(data / "test", *cases)
    write_cases(data / "valid", *cases[4:])
    _, rows = finish(path, data, "--test-time-augmentation")
    assert [row | {"file_name": ""} for row in table(path.parent / "valid_metrics.csv")] == [
        row | {"file_name": ""} for row in rows[4:]]
    model, total = script.load_model(path, "cpu"), 0
    for i, (row, (boxes, picture)) in enumerate(zip(rows, cases, strict=True)):
        mask, truth = script.predict_mask(model, np.dstack([picture] * 3)), filled([(*boxes[0], 1)], picture.shape)
        counts = [(mask & truth).sum(), (mask & ~truth & 1).sum(), (truth & ~mask & 1).sum()]
        assert row["file_name"] == f"切片_{i}.png"
        assert [int(row[f"{kind}_px"]) for kind in ("true_positive", "false_positive", "false_negative")] == counts
        total += np.array(counts)
    assert total.all()  # there is something of each kind


@pytest.mark.parametrize("words", [[], ["--categories", "tumor"]])
def test_evaluate_scores_the_categories_of_the_run_and_says_which(one_kind, tmp_path, tiny, capsys, words):
    data, run, _ = one_kind
    found, rows = evaluate(background.copy_run(run, tmp_path / "run") / script.BEST, data, *words)
    before = script.read_metadata(run / script.BEST)[0]
    assert found["sha256"] == before["sha256"] and found["data_dir"] == str(data)
    assert found["threshold"] == before["threshold"] and found["convention"] == before["convention"]
    for split in ("valid_metrics", "test_metrics"):  # without those that need train
        assert found[split] == {name: pytest.approx(value, abs=1e-3) for name, value in before[split].items()
                                if "near_duplicates" not in name}
    tumour, nothing = (int(row["true_positive_px"]) + int(row["false_negative_px"]) for row in rows)
    assert tumour >= 16 * 16 and nothing == 0  # write_split()'s boxes; each oedema has 144 pixels
    assert ("CATEGORIES = ('tumor',)" in capsys.readouterr().out) == (not words)


def test_a_flag_of_evaluate_counts_more_than_what_the_run_used(one_kind, tmp_path, tiny, capsys):
    data, run, _ = one_kind
    path = background.copy_run(run, tmp_path / "run") / script.BEST
    _, rows = evaluate(path, data, "--categories", "oedema", "--unannotated", "skip")
    assert {int(row["true_positive_px"]) + int(row["false_negative_px"]) for row in rows} == {144}
    assert "CATEGORIES =" not in capsys.readouterr().out
    metadata = script.read_metadata(path)[0]
    script.write_metadata(path, metadata | {"settings": metadata["settings"] | {"PATIENT_PATTERN": r"(P\d+)"}})
    assert main("--evaluate", "--checkpoint", path, "--data-dir", data, "--output-dir", tmp_path / "out") == 2
    assert "--patient-pattern none" in capsys.readouterr().err
    assert "dice_per_patient_mean" not in evaluate(path, data, "--patient-pattern", "none")[0]["test_metrics"]


@pytest.mark.parametrize("mode, name", [("--check-labels", "label_check.csv"), ("--predict", "predictions.csv")])
def test_a_table_that_cannot_be_written_is_an_error(mode, name, one_kind, tmp_path, tiny, monkeypatch, capsys):
    """Where it is what the command was for."""
    def replace(source, target, inner=os.replace):
        if Path(target).name == name:
            raise OSError(errno.ENOSPC, "No space left on device")
        inner(source, target)

    data, run, _ = one_kind
    monkeypatch.setattr(os, "replace", replace)
    words = [mode, data / "test"] if mode == "--predict" else [mode, "--data-dir", data]
    assert main(*words, "--checkpoint", run / script.BEST, "--output-dir", tmp_path) == 1
    out, err = capsys.readouterr()
    assert f"{name}: " in err and "Traceback" not in err and name not in out


@pytest.mark.parametrize("mode, folder", [("--evaluate", "data"), ("--check-labels", "data"), ("--evaluate", "moved"),
                                          ("--evaluate", "edited")])
def test_without_a_data_folder_the_data_of_the_run_are_looked_at(mode, folder, tmp_path, tiny, monkeypatch, capsys):
    """Or those that the file names; or the phantoms beside the script, where the run's are not there any more."""
    data, out = write_data(tmp_path / "data", 8, 3, 2, size=64), tmp_path / "out"
    assert main(*FAST, "--data-dir", data, "--output-dir", out) == 0
    if folder == "moved":
        data.rename(tmp_path / folder)
    if folder == "edited":
        monkeypatch.setattr(script, "DATA_DIR", str(write_data(tmp_path / folder, 4, 5, 6, size=64)))
    capsys.readouterr()
    assert main(mode, "--output-dir", out) == 0
    text = capsys.readouterr().out
    assert (f"DATA_DIR = {str(data)!r}" in text) == (folder == "data")
    images = next(line for line in text.splitlines() if line.startswith("images ")).split()[1:]
    assert images[-2:] == {"data": ["3", "2"], "moved": ["8", "8"], "edited": ["5", "6"]}[folder]
    assert (f"The data folder of the run, {data}, is not there. Used instead: {ROOT}\n" in text) == (folder == "moved")


def test_how_many_images_look_like_one_in_train_is_recorded_and_repeated(one_kind, tmp_path, tiny, capsys):
    data, run, text = one_kind
    counts = script.read_metadata(run / script.BEST)[0]["data_counts"]
    assert {name: part["near_duplicates"] for name, part in counts.items()} == {"train": 0, "valid": 1, "test": 0}
    rows, found = table(run / "valid_metrics.csv"), script.read_metadata(run / script.BEST)[0]["valid_metrics"]
    assert [row["near_duplicate"] for row in rows] == ["slice_0.png", "", ""]
    assert found["dice"] == pytest.approx(np.mean([float(row["dice"]) for row in rows if row["dice"]]))
    alone = [float(row["dice"]) for row in rows[1:] if row["dice"]]
    assert found["dice_without_near_duplicates"] == pytest.approx(np.mean(alone))
    assert f"(Dice {found['dice']:.3f}, without these images {np.mean(alone):.3f})" in text
    assert "near_duplicate" not in table(run / "test_metrics.csv")[0]
    sentence = "1 of 3 valid images look like an image in train: scores may be too good for new patients"
    assert text.count(sentence) == 2 and "test images look like" not in text  # in the audit, and below the scores
    evaluate(background.copy_run(run, tmp_path / "run") / script.BEST, data)
    assert "look like" not in capsys.readouterr().out  # train is not known


def test_evaluation_scores_what_is_there_and_leaves_the_model_alone(tmp_path, tiny, capsys):
    """At another site: at 0.60 nothing is found there, and a lower threshold would be better."""
    path, data = saved(tmp_path / "run", bright(10), threshold=0.6, valid_metrics={}), tmp_path / "data"
    faint = ([(8, 8, 20, 20)], filled([(8, 8, 20, 20, 120)]))
    for count, splits in enumerate((["valid"], ["test"], ["valid", "test"]), 1):
        shutil.rmtree(data, ignore_errors=True)
        for split in splits:
            write_cases(data / split, faint, ([], filled([])))
        found, _ = evaluate(path, data)
        assert {name for name in found if name.endswith("_metrics")} == {f"{split}_metrics" for split in splits}
        folder = path.parent / "out" / f"evaluation{f'_{count}' * (count > 1)}"
        assert names(folder) == sorted(["scores.json", *(f"{split}_{kind}" for split in splits for kind in (
            "metrics.csv", "predictions.png", "report.png"))])
        for split in splits:
            assert found[f"{split}_metrics"]["images"] == 2 and found[f"{split}_metrics"]["dice"] == 0
        assert found["threshold"] == 0.6 and "never chosen" not in capsys.readouterr().out
    write_cases(data / "none" / "test", ([], filled([])))  # no tumour anywhere
    assert "dice" not in evaluate(path, data / "none")[0]["test_metrics"]
    (tmp_path / "empty").mkdir()
    assert main("--evaluate", "--checkpoint", path, "--data-dir", tmp_path / "empty", "--output-dir", tmp_path) == 2


def test_a_threshold_that_was_never_chosen_is_said(tmp_path, tiny, capsys):
    path, data = saved(tmp_path / "run"), tmp_path / "data"
    write_cases(data / "valid", ([(8, 8, 20, 20)], filled([(8, 8, 20, 20, 255)])))
    for chosen in (False, True):
        evaluate(path, data)
        assert predict(path, tmp_path / "out", data / "valid") == 0
        assert capsys.readouterr().out.count("threshold 0.50, which was never chosen") == 2 * (not chosen)
        finish(path, data)
        capsys.readouterr()


@pytest.mark.parametrize("flag, value", [("--img-size", [96]), ("--mean", [0.1, 0.2, 0.3]), ("--std", [2, 2, 2]),
                                         ("--grey-percentiles", [0, 50]), ("--encoder", ["resnet34"]),
                                         ("--architecture", ["linknet"])])
def test_a_flag_that_contradicts_the_model_is_refused(flag, value, tmp_path, tiny, capsys):
    """In every mode that uses the model, before any work; the same value may be given."""
    path = saved(tmp_path / "run")
    script.write_image(tmp_path / "image.png", filled([]))
    write_cases(tmp_path / "data" / "test", ([(4, 4, 9, 9)], filled([(4, 4, 9, 9, 200)])))
    same = {"--encoder": ["resnet18"], "--architecture": ["unet"], "--img-size": [64], "--mean": PLAIN["mean"],
            "--std": PLAIN["std"], "--grey-percentiles": PLAIN["grey_percentiles"]}[flag]
    for mode in (["--predict", tmp_path / "image.png"], ["--evaluate"], ["--check-labels"]):
        words = ["--output-dir", path.parent, "--data-dir", tmp_path / "data", *mode]
        before = names(path.parent)
        assert main(*words, flag, *value) == 2
        err = capsys.readouterr().err
        assert script.flag_name(flag[2:].replace("-", "_")) in err and err.count("error: ") == 1
        assert names(path.parent) == before
        assert main(*words, flag, *same) == 0


def test_flags_hold_for_a_checkpoint_without_its_json_and_none_is_written(tmp_path, tiny):
    """Brightness 0.4 is tumour only if the mean on the command line makes it 0.8."""
    path, data = saved(tmp_path / "run"), tmp_path / "data"
    path.with_suffix(".json").unlink()
    for split in ("valid", "test"):
        write_cases(data / split, ([(0, 0, 64, 64)], filled([(0, 0, 64, 64, 102)])))
    for mean, share in ((0.4, 0), (-0.4, 1)):
        words, out = ["--img-size", 96, "--mean", *[mean] * 3, "--std", 1, 1, 1], tmp_path / f"masks{mean}"
        assert float(evaluate(path, data, *words)[1][0]["dice"]) == share
        assert predict(path, out, data / "test", *words) == 0
        assert script.read_image(out / "predictions" / "masks" / "切片_0.png").mean() == 255 * share
    assert set(names(path.parent)) == {"out", script.BEST}


# --- --predict


def test_predict_writes_a_folder_one_can_work_with(tmp_path, tiny, capsys):
    (tmp_path / "影像").mkdir()
    image, out = tmp_path / "影像" / "扫描 1.png", tmp_path / "out"
    script.write_image(image, filled([(10, 16, 32, 12, 255), (50, 40, 4, 4, 255)], (60, 64)))
    assert predict(saved(tmp_path, threshold=0.35, valid_metrics={}), out, image) == 0
    folder = out / "predictions"
    assert names(out) == ["predictions"]
    assert names(folder) == ["_annotations.coco.json", "images", "masks", "overlays", "predictions.csv"]
    assert all(names(folder / kind) == ["扫描 1.png"] for kind in ("images", "masks", "overlays"))
    assert (folder / "images" / "扫描 1.png").read_bytes() == image.read_bytes()
    mask, overlay = (script.read_image(folder / kind / "扫描 1.png") for kind in ("masks", "overlays"))
    expected = script.predict_mask(bright(), script.read_image(image))
    assert np.array_equal(mask, 255 * np.dstack([expected] * 3))
    assert overlay[50, 50].tolist() == [0, 0, 0] and overlay[22, 20].tolist() != [255, 255, 255]  # tinted
    assert (folder / "predictions.csv").read_bytes().startswith(b"\xef\xbb\xbf")  # for Excel
    row, = table(folder / "predictions.csv")
    assert row == {"file": str(image), "mask": "masks/扫描 1.png", "width": "64", "height": "60",
                   "tumour_px": str(expected.sum()), "tumour_fraction": f"{expected.mean():.6f}", "tumours": "2",
                   "mean_probability": row["mean_probability"]} and 0.5 <= float(row["mean_probability"]) <= 1
    out = capsys.readouterr().out
    assert f"Checkpoint {tmp_path / script.BEST}, threshold 0.35, device cpu\n" in out
    assert f"1 of 1 image segmented: {folder}\nMasks are in masks/, " in out


def rings(height, width):
    """A disc, a ring, a ring in that ring, pixels that touch at corners, a line, and the border of the image."""
    mask = np.zeros((height, width), np.uint8)
    for radius, level in ((25, 1), (20, 0), (15, 1), (9, 0), (4, 1)):
        cv2.circle(mask, (40, 40), radius, level, -1)
    mask[70, 5:30] = mask[75:79, 5] = mask[79, 6] = mask[80, 7] = 1
    mask[:3] = mask[:, -2:] = 1
    return mask


def test_predicted_outlines_are_read_back_to_the_same_masks(tmp_path, tiny):
    """By this script, by pycocotools, and as image and mask files; holes and corners included."""
    rng, scans = np.random.default_rng(0), tmp_path / "scans"
    scans.mkdir()
    shapes = [(90, 100), (64, 64), (31, 120), (64, 64)]
    pictures = [rings(90, 100), *((cv2.GaussianBlur(rng.normal(size=shape), (0, 0), 3) > 0.05).astype(np.uint8)
                                  for shape in shapes[1:3]), np.zeros((64, 64), np.uint8)]
    for i, picture in enumerate(pictures):
        script.write_image(scans / f"扫描 {i}.png", 255 * picture)
    model = bright()
    assert predict(saved(tmp_path, model), tmp_path, scans) == 0
    folder = tmp_path / "predictions"
    split, coco = script.read_coco(folder), COCO(folder / "_annotations.coco.json")
    (folder / "pairs").mkdir()
    shutil.copytree(folder / "images", folder / "pairs" / "images")
    shutil.copytree(folder / "masks", folder / "pairs" / "masks")
    files = script.read_splits({"": folder / "pairs"})[""]
    for i, entry in enumerate(split.entries):
        expected = script.predict_mask(model, script.read_image(scans / f"扫描 {i}.png"))
        assert (entry.file_name, entry.mask().shape) == (f"扫描 {i}.png", shapes[i])
        assert entry.path == str(folder / "images" / f"扫描 {i}.png") and not entry.problems  # not its mask or overlay
        notes = coco.loadAnns(coco.getAnnIds(imgIds=[i + 1]))
        drawn = np.zeros(shapes[i], np.uint8)
        for note in notes:
            own = coco.annToMask(note)  # without holes a polygon draws it, around them only an RLE does
            pieces = cv2.findContours(own, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)[0]
            assert isinstance(note["segmentation"], list) == (len(pieces) == 1)
            assert note["area"] == own.sum() and note["bbox"] == list(cv2.boundingRect(own))
            drawn |= own
        assert np.array_equal(entry.mask(), expected) and np.array_equal(drawn, expected)
        assert np.array_equal(files.entries[i].mask(), expected)
        assert entry.tumours == len(notes) == cv2.connectedComponents(expected)[0] - 1
    kinds = {type(note["segmentation"]) for note in coco.anns.values()}
    assert kinds == {list, dict}  # polygons where they are exact, RLE around holes
    scores = COCOeval(coco, coco.loadRes([note | {"score": 1} for note in coco.anns.values()]), "segm")
    scores.evaluate()
    scores.accumulate()
    scores.summarize()
    assert scores.stats[0] == 1  # average precision of the file against itself; an id of 0 would count as missed


def write_scans(folder, *scans):
    """Images of noise, each another one."""
    for number, name in enumerate(scans):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        script.write_image(folder / name, noise(64, 64, seed=number))
    return [folder / name for name in scans]


def test_predict_never_writes_over_an_input_or_over_an_earlier_result(tmp_path, tiny):
    """Two files of one name get a number, and a second call another folder."""
    out, path = tmp_path / "out", saved(tmp_path)
    scans = write_scans(tmp_path, "a/scan.png", "b/scan.jpg", "c/scan.png")
    for folder in ("predictions", "predictions_2"):
        kept = {file: file.read_bytes() for file in out.rglob("*.*")}
        assert predict(path, out, *scans) == 0
        assert names(out / folder / "masks") == ["scan.png", "scan_2.png", "scan_3.png"]
        (out / folder / "images" / "scan.png").write_bytes(b"edited in place")  # a copy: no input changes
        assert names(out / folder / "images") == ["scan.png", "scan_2.jpg", "scan_3.png"]
        assert all(file.read_bytes() == content for file, content in kept.items())
        for number, scan in enumerate(scans, 1):
            mask = script.read_image(out / folder / "masks" / f"scan{f'_{number}' * (number > 1)}.png")[..., 0]
            assert np.array_equal(mask, 255 * script.predict_mask(bright(), script.read_image(scan)))


def test_predictions_of_folders_are_sorted_and_keep_their_patients(tmp_path, tiny):
    """So that PATIENT_PATTERN works on what comes back from an annotation tool.

    Hidden files and masks are left out, and so is what earlier calls wrote there, unless it is asked for by name.
    """
    path, scans = saved(tmp_path / "run"), tmp_path / "scans"
    write_scans(scans, "P010/s1.png", "P002/s2.png", "P002/s1.png", "s0.png", ".ipynb_checkpoints/s0-checkpoint.png",
                "P002/._s1.png", "__MACOSX/P002/s1.png", "training_samples.png", "s0_mask.png", "masks/s0.png")
    patients = ["P002_s1", "P002_s2", "P010_s1"]
    for sources, folder, found in (([scans], "predictions", [*patients, "s0"]),
                                   ([scans], "predictions_2", [*patients, "s0"]),
                                   ([scans / "P002", scans / "P010"], "predictions_3", patients),
                                   ([scans / "predictions" / "images"], "predictions_4", [*patients, "s0"])):
        assert predict(path, scans, *sources) == 0
        assert [Path(row["mask"]).stem for row in table(scans / folder / "predictions.csv")] == found
        coco = json.loads((scans / folder / script.ANNOTATION_FILE).read_text(encoding="utf-8"))
        assert [(image["id"], image["file_name"]) for image in coco["images"]] == [
            (place, f"{name}.png") for place, name in enumerate(found, 1)]
        assert names(scans / folder / "images") == names(scans / folder / "masks") == [f"{name}.png" for name in found]


@pytest.mark.skipif(os.name == "nt" or sys.platform == "darwin", reason="such names and links")
def test_links_that_lead_nowhere_and_names_that_are_not_unicode_are_failed_files(tmp_path, tiny, capsys):
    """As an archive in GBK leaves them on Linux; in a folder, and named themselves."""
    path, (good,) = saved(tmp_path / "run"), write_scans(tmp_path / "scans", "good.png")
    gone = tmp_path / "scans" / "gone.png"
    gone.symlink_to(tmp_path / "nowhere.png")
    gbk = os.fsdecode(os.fsencode(tmp_path / "scans") + b"/\xc4\xd4.png")
    shutil.copy(good, gbk)
    for number, sources in enumerate(([tmp_path / "scans"], [gone, gbk, good])):
        assert predict(path, tmp_path / str(number), *sources) == 2
        err = capsys.readouterr().err
        assert "2 of 3 files failed" in err and f"{gone}: the file is missing" in err and "rename it" in err
        assert names(tmp_path / str(number) / "predictions" / "masks") == ["good.png"]
    script.write_json(tmp_path / "a.json", {"path": gbk})
    assert json.loads((tmp_path / "a.json").read_bytes()) == {"path": gbk}
    script.write_table(tmp_path / "a.csv", [{"file_name": gbk}])
    assert table(tmp_path / "a.csv")[0]["file_name"].endswith(r"\udcc4\udcd4.png")


def test_predict_that_is_stopped_keeps_table_and_outlines_of_what_is_done(tmp_path, tiny, monkeypatch):
    def write_image(name, picture, inner=script.write_image):
        if name.parent.name == "overlays" and name.stem == "one":
            script.STOP.signum = signal.SIGINT
        inner(name, picture)

    monkeypatch.setattr(script, "write_image", write_image)
    assert predict(saved(tmp_path), tmp_path, *write_scans(tmp_path, "one.png", "two.png")) == 130
    assert names(tmp_path / "predictions" / "masks") == ["one.png"]
    assert len((tmp_path / "predictions" / "predictions.csv").read_text().splitlines()) == 2
    assert len(script.read_coco(tmp_path / "predictions").entries) == 1


def test_each_file_stands_for_itself_and_what_is_left_out_is_counted(tmp_path, tiny, capsys, monkeypatch):
    """Long names, results of other tools, other formats, a folder without access, a result that cannot be written."""
    path, scans, out = saved(tmp_path / "run"), tmp_path / "scans", tmp_path / "out"
    for name in ("a.png", "脑" * 83 + ".png", "x" * 245 + ".jpg", "full.png", "c.jfif", "a_mask.tif", "b_overlay.jpg",
                 "Overlays/b.jpg", "d.dcm", "e.nii.gz", "f.nii.gz", "notes"):
        (scans / name).parent.mkdir(exist_ok=True)
        (scans / name).write_bytes(cv2.imencode(".png", noise(64, 64, 3))[1].tobytes())
    (scans / "full.jpg").write_bytes(b"no image")
    (scans / "closed").mkdir()

    def scandir(folder, inner=os.scandir):
        if str(folder).endswith("closed"):
            raise PermissionError(errno.EACCES, "Permission denied", str(folder))
        return inner(folder)

    def write_image(name, picture, inner=script.write_image):
        if name.name == "full.png" and name.parent.name == "overlays":
            raise script.TrainerError(f"cannot write {name}")
        inner(name, picture)

    monkeypatch.setattr(os, "scandir", scandir)
    monkeypatch.setattr(script, "write_image", write_image)
    assert predict(path, out, scans) == 2
    text, err = capsys.readouterr()
    assert "2 of 6 files failed:\n  - " in err and f"cannot write {out}" in err and "Traceback" not in err
    assert str(scans / "full.jpg") in err
    lines = {line.removeprefix("Left out: ") for line in text.splitlines() if line.startswith("Left out: ")}
    assert lines == {"3 files named like a mask or an overlay", "1 file named *.dcm", "2 files named *.gz",
                     "1 file without suffix"}
    assert f"WARNING: cannot read the folder {scans / 'closed'}" in err
    rows = table(out / "predictions" / "predictions.csv")
    assert len(rows) == len(script.read_coco(out / "predictions").entries) == 4


def test_a_model_in_training_mode_gives_one_mask_in_all_threads():
    """And stays in eval mode; its running statistics and the image are as they were."""
    for _ in range(10):
        model, image = bright(gain=5), noise(64, 64, 3)
        expected, weights = script.predict_mask(model, image), copy.deepcopy(model.state_dict())
        model.train()
        with ThreadPoolExecutor(8) as pool:
            found = list(pool.map(script.predict_mask, [model] * 16, [image] * 16))
        assert all(np.array_equal(mask, expected) for mask in found)
        assert not model.training and np.array_equal(image, noise(64, 64, 3))
        assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


def test_the_state_of_a_run_is_no_model_and_this_is_said(one_kind, tmp_path, tiny, capsys):
    assert predict(one_kind[1] / script.LAST, tmp_path, ROOT / "test") == 2
    assert f"is the state of a run, for --resume; the model is {script.BEST}" in capsys.readouterr().err


def test_main_works_in_a_thread_without_handlers(one_kind, tmp_path, tiny):
    """As in Streamlit or Gradio."""
    handlers, codes = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)], []
    image = next((one_kind[0] / "test").glob("*.png"))
    thread = threading.Thread(target=lambda: codes.append(predict(one_kind[1] / script.BEST, tmp_path, image)))
    thread.start()
    thread.join()
    assert codes == [0] and [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers


def test_a_tilde_is_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME" if os.name != "nt" else "USERPROFILE", str(tmp_path))
    cfg, _ = script.read_settings(["--data-dir=~", "--output-dir=~/x", "--audit"])
    assert (cfg.DATA_DIR, cfg.OUTPUT_DIR) == (str(tmp_path), str(tmp_path / "x"))


@pytest.mark.parametrize("percentiles, brightest", [((0.1, 99.9), 255), ((0, 100), 4)])
def test_a_16_bit_scan_is_read_as_the_model_was_trained(percentiles, brightest, tmp_path, tiny, monkeypatch):
    """With one hot pixel, the whole range is dark."""
    path, seen = saved(tmp_path / "run", grey_percentiles=percentiles), []
    grey = np.linspace(0, 1000, 64 * 64).reshape(64, 64).astype(np.uint16)
    grey[0, 0] = 65535
    (tmp_path / "a.png").write_bytes(cv2.imencode(".png", grey)[1].tobytes())
    nothing = np.zeros((64, 64), np.uint8), np.zeros((64, 64), np.float32)
    monkeypatch.setattr(script, "segment", lambda model, image: seen.append(image) or nothing)
    assert predict(path, tmp_path / "out", tmp_path / "a.png") == 0
    assert abs(int(seen[0][1:].max()) - brightest) <= 1


def test_a_command_without_its_files_says_which(data, tmp_path, tiny, capsys):
    path, out = saved(tmp_path), tmp_path / "out"
    (tmp_path / "empty").mkdir()
    for checkpoint, source, words in ((path, "gone.png", "gone.png"), (path, "empty", "no images found in"),
                                      (path.with_name("gone.pth"), "..", "gone.pth")):
        assert predict(checkpoint, out, tmp_path / source) == 2 and words in capsys.readouterr().err
    assert main("--evaluate", "--data-dir", data, "--output-dir", out) == 2 and names(out) == []
    assert f"no checkpoint to evaluate: {out / script.BEST}" in capsys.readouterr().err


# --- the model checks the labels


def square(x, y, size):
    return filled([(x, y, size, size, 1)])


@pytest.mark.parametrize("probability, mask, expected", [
    (square(10, 10, 8), square(10, 10, 8), [1]), (square(0, 0, 0), square(0, 0, 0), [np.nan]),
    (0.9 * square(10, 10, 8), square(0, 0, 0), ("tumour where none is annotated", 0, 64, 0.9)),
    (square(0, 0, 0), square(10, 10, 8), ("annotated tumour that is not seen", 0, 64, 1)),
    (0.25 * square(10, 10, 8), square(10, 10, 8), ("annotated tumour that is not seen", 0, 64, 0.75)),
    # Both are away from each other; the larger confidence is that of what is not seen.
    (0.75 * square(40, 40, 8), square(10, 10, 4), ("annotated tumour that is not seen", 0, 16, 1)),
    # 4 of 16 columns in common: Dice 0.4 of 8 and 12 columns, and 12 of 16 columns are wrong.
    (filled([(10, 10, 8, 8, 1)]), filled([(14, 10, 12, 8, 1)]), ("outlines that hardly overlap", 0.4, 128, 0.75)),
    (filled([(10, 10, 8, 8, 1)]), filled([(14, 10, 8, 8, 1)]), [0.5]),  # which is no finding
    # The first overlaps well enough, whatever the second one, which is not annotated, does to the Dice of the image.
    (square(10, 10, 8) + 0.51 * square(40, 40, 8), square(13, 10, 8),
     ("tumour where none is annotated", 80 / 192, 64, 0.51)),
    # A second tumour is not annotated; the first one is right, and counts for Dice only.
    (square(10, 10, 8) + 0.8 * square(40, 40, 8), square(10, 10, 8),
     ("tumour where none is annotated", 2 / 3, 64, 0.8))])
def test_what_contradicts_an_annotation_by_hand(probability, mask, expected):
    found = script.label_finding(probability.astype(np.float32), mask.astype(np.uint8), 0.5)
    assert [*found] == (["kind", "dice", "size_px", "confidence"] if len(expected) > 1 else ["dice"])
    assert [*found.values()] == [value if isinstance(value, str) else pytest.approx(value, abs=1e-4, nan_ok=True)
                                 for value in expected]


def test_planted_mistakes_come_first_in_table_and_picture(tmp_path, tiny, capsys, monkeypatch):
    """Removed, invented, shifted and swapped masks among right ones; two pixels are no matter."""
    shown, data = [], tmp_path / "data"
    monkeypatch.setattr(script, "plot_cases", lambda path, model, cases, *_: shown.append((path.name, cases)))

    def case(annotated, *drawn):
        return [(*box, 16, 16) for box in annotated], filled([(*box, 16, 16, 230) for box in drawn])

    write_cases(data / "train", case([(5, 5)], (5, 5)), case([], (20, 20)), case([(30, 30)]), case([]),
                case([(5, 40)], (5, 42)))
    write_cases(data / "valid", case([(5, 5)], (15, 5)), case([(40, 5)], (5, 40)), case([(8, 8)], (8, 8)))
    path = saved(tmp_path / "run", bright(20, 0.5))
    assert main("--check-labels", "--data-dir", data, "--output-dir", path.parent) == 0
    rows = table(path.parent / "label_check.csv")
    assert {(row["split"], row["file_name"][3]) for row in rows} == {
        ("train", "1"), ("train", "2"), ("valid", "0"), ("valid", "1")}
    assert rows[-1]["split"] == "valid" and rows[-1]["kind"] == "outlines that hardly overlap"
    (name, cases), = shown
    assert [name, *(entry.file_name for entry, _, _ in cases)] == ["label_check.png", *(r["file_name"] for r in rows)]
    out = capsys.readouterr().out
    assert ("The model contradicts 2 x annotated tumour that is not seen, 1 x tumour in an image without annotation, "
            "1 x outlines that hardly overlap.\n") in out
    assert "label_check.png shows the first 4" in out
    # Of six annotated images three are right, in one a part is, two are not seen at all.
    dice = (1 + 7 / 8 + 1 + 2 * 6 / 32) / 6
    assert f"On the 6 annotated images the model has a Dice of {dice:.2f}.\nMost of what follows are probably" in out


@pytest.mark.parametrize("words", [[], ["--unannotated", "skip"]])
def test_images_without_annotation_are_always_looked_at(words, tmp_path, tiny, capsys):
    """Also by a model that was trained without them."""
    data, path = tmp_path / "data", saved(tmp_path / "run", settings={"UNANNOTATED": "skip"})
    write_cases(data / "train", ([], filled([(5, 5, 20, 20, 255)])), ([(9, 9, 9, 9)], filled([(9, 9, 9, 9, 255)])))
    assert main("--check-labels", "--data-dir", data, "--output-dir", path.parent, *words) == 0
    row, = table(path.parent / "label_check.csv")
    assert row["file_name"] == "切片_0.png" and row["kind"] == "tumour in an image without annotation"
    out = capsys.readouterr().out
    assert "On the 1 annotated image the model has a Dice of 1.00.\n" in out and "and train again" in out


def test_labels_without_contradiction_write_nothing(tmp_path, tiny, capsys):
    data, path = tmp_path / "data", saved(tmp_path / "run")
    for split in ("train", "valid"):
        write_cases(data / split, ([(5, 5, 20, 20)], filled([(5, 5, 20, 20, 255)])))
    assert main("--check-labels", "--data-dir", data, "--output-dir", path.parent) == 0
    assert "contradicts no annotation." in capsys.readouterr().out
    assert not [name for name in names(path.parent) if name.startswith("label_check")]
