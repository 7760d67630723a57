"""Constants, the flags that follow from them, and the errors of a wrong command line."""

import ast
import importlib.util
import os
import re
import subprocess
import sys

import pytest
from conftest import FAST, ROOT, SCRIPT, script, write_data

# What the script was promised to start with.
KNOWN = {"IMG_SIZE": 256, "BATCH_SIZE": 16, "EPOCHS": 80, "LR": 1e-4, "NUM_WORKERS": 4, "WEIGHT_DECAY": 1e-2,
         "PLATEAU_FACTOR": 0.5, "PLATEAU_PATIENCE": 10, "LOSS": "dice_bce", "ENCODER": "resnet34",
         "ENCODER_WEIGHTS": "imagenet", "INIT_WEIGHTS": None}



def constants():
    """Names of the plain upper-case assignments at the top of the file, read without running it."""
    names = []
    for node in ast.parse(SCRIPT.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id.isupper():
            if node.targets[0].id == "CONSTANTS":
                return names
            names.append(node.targets[0].id)
    raise AssertionError("the file has no CONSTANTS")


def flag(name):
    """IMG_SIZE -> --img-size."""
    return "--" + name.lower().replace("_", "-")


def another(name, value, folder):
    """A legal value of a constant that is not its default: (words after the flag, what they mean)."""
    texts = {"DATA_DIR": str(folder), "OUTPUT_DIR": str(folder / "o"), "CACHE_DIR": str(folder), "ENCODER": "resnet18",
             "LOSS": "focal_tversky", "DEVICE": "cpu", "PRECISION": "float32",
             "ENCODER_WEIGHTS": str(folder / "w.pth"), "INIT_WEIGHTS": str(folder / "w.pth")}
    if isinstance(value, tuple):
        new = (0.1, 0.25, 0.75) if value else ("glioma", "肿瘤")
        return [str(v) for v in new], new
    if isinstance(value, (int, float)):
        new = value + 64 if isinstance(value, int) else value / 4
        return [str(new)], new
    return [texts.get(name, "some text")], texts.get(name, "some text")


def settings(*words):
    """Settings from a command line."""
    return script.read_settings([str(word) for word in words])[0]


def refused(capsys, *words, silent=True):
    """Run main() on a command line that must be refused; returns the one sentence on standard error."""
    assert script.main([str(word) for word in words]) == 2
    out, err = capsys.readouterr()
    assert "Traceback" not in err and err.startswith("error: ") and err.count("\n") == 1, err
    assert out == "" or not silent
    return err


def loaded_from(path):
    """A copy of the script as a module of its own."""
    spec = importlib.util.spec_from_file_location("edited_copy", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look there
    try:
        spec.loader.exec_module(module)
    finally:
        del sys.modules[spec.name]
    return module


def edited(folder, old, new):
    """The script with one line of it edited, as a module."""
    text = SCRIPT.read_text(encoding="utf-8")
    assert text.count(old) == 1
    (folder / SCRIPT.name).write_text(text.replace(old, new), encoding="utf-8")
    return loaded_from(folder / SCRIPT.name)


# --- constants and flags


def test_known_constants_keep_their_names_and_values():
    assert {name: getattr(script, name) for name in KNOWN} == KNOWN
    assert set(KNOWN) <= set(constants())
    assert script.DEVICE == ("cuda" if script.torch.cuda.is_available() else "cpu")


def test_data_and_output_lie_beside_the_script_by_default(tmp_path):
    assert script.DATA_DIR == script.OUTPUT_DIR == str(ROOT)
    (tmp_path / "中文").mkdir()
    copied = edited(tmp_path / "中文", "EPOCHS = 80", "EPOCHS = 81")
    assert copied.DATA_DIR == copied.OUTPUT_DIR == str((tmp_path / "中文").resolve())


def test_without_flags_the_settings_are_the_constants():
    cfg = vars(settings())
    assert cfg == {name: getattr(script, name) for name in constants()}


@pytest.mark.parametrize("name", constants())
def test_every_constant_has_a_flag_that_changes_it_and_nothing_else(name, tmp_path):
    default = getattr(script, name)
    (tmp_path / "w.pth").touch()
    if isinstance(default, bool):
        words, new = [flag(name).replace("--", "--no-") if default else flag(name)], not default
    else:
        words, new = another(name, default, tmp_path)
        words = [flag(name), *words]
    cfg = vars(settings(*words))
    assert cfg.pop(name) == new and isinstance(new, type(default) if default is not None else str)
    assert cfg == {other: getattr(script, other) for other in constants() if other != name}


@pytest.mark.parametrize("name", ["ENCODER_WEIGHTS", "INIT_WEIGHTS"])
@pytest.mark.parametrize("word", ["none", "None", "NONE"])
def test_none_means_none(name, word):
    assert getattr(settings(flag(name), word), name) is None


def test_an_empty_list_of_categories_means_all():
    assert settings("--categories").CATEGORIES == ()


def test_overrides_do_not_change_the_constants():
    settings("--img-size", 64, "--lr", 0.5)
    assert script.IMG_SIZE == 256 and script.default_settings().LR == 1e-4


def test_help_lists_every_constant_with_its_default(capsys):
    with pytest.raises(SystemExit) as end:
        script.main(["--help"])
    assert end.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    _, *parts = text.split(" what to do ")  # the options themselves, after the usage
    options = " ".join(parts)
    places = [options.index(f" {flag(name)} ") if f" {flag(name)} " in options else options.index(f" {flag(name)}, ")
              for name in constants()]
    assert places == sorted(places)  # in the order of the file
    for name, start, end in zip(constants(), places, [*places[1:], None]):
        description = options[start:end]
        assert f"[{' '.join(str(getattr(script, name)).split())}]" in description.replace("- ", "-"), description
        assert len(description.split()) > 5, f"{name} is not explained"


@pytest.mark.parametrize("old, new, words, name, value", [
    ("EPOCHS = 80  # passes over the training set, at least 1", "EPOCHS = 3", ["--epochs", "5"], "EPOCHS", 5),
    ("EPOCHS = 80  # passes", "EPOCHS = 3 # passes", ["--epochs", "5"], "EPOCHS", 5),
    ("CATEGORIES = ()  #", 'CATEGORIES = (\n    "glioma",\n)  #', ["--categories", "tumor"], "CATEGORIES", ("tumor",)),
    ("GRAD_CLIP = 1.0", "GRAD_CLIP = 0", ["--grad-clip", "0.5"], "GRAD_CLIP", 0.5),
    ("CACHE_GB = 8.0", "CACHE_GB = 8", ["--cache-gb", "2.5"], "CACHE_GB", 2.5),
    ('ENCODER_WEIGHTS = "imagenet"', "ENCODER_WEIGHTS = None", ["--encoder-weights", "imagenet"], "ENCODER_WEIGHTS",
     "imagenet"),
    ("EPOCHS = 80", "EPOCHS = 3", [], "EPOCHS", 3)])
def test_constants_may_be_edited_the_way_people_do(tmp_path, old, new, words, name, value):
    """Without the comment, over several lines, or 0 for 0.0: the flags must survive it."""
    cfg, _ = edited(tmp_path, old, new).read_settings(["--data-dir", str(tmp_path), *words])
    assert getattr(cfg, name) == value


# --- what is refused


@pytest.mark.parametrize("words, named", [
    (["--imgsize", 64], "--imgsize"), (["--img", 64], "--img"), (["train"], "train"), (["--img-size"], "--img-size"),
    (["--img-size", "large"], "--img-size.*large"), (["--img-size", "64.5"], "--img-size|IMG_SIZE"),
    (["--epochs", "1e2"], "--epochs|EPOCHS"), (["--lr", "fast"], "--lr.*fast"), (["--mean", "a", "b", "c"], "--mean"),
    (["--img-size", 32], "IMG_SIZE.*32.*64"), (["--img-size", 100], "IMG_SIZE.*100.*32"),
    (["--img-size", 0], "IMG_SIZE"), (["--img-size", -64], "IMG_SIZE"),
    (["--batch-size", 0], "BATCH_SIZE"), (["--batch-size", -1], "BATCH_SIZE"), (["--epochs", 0], "EPOCHS"),
    (["--num-workers", -1], "NUM_WORKERS"), (["--accumulation-steps", 0], "ACCUMULATION_STEPS"),
    (["--lr", "nan"], "LR"), (["--lr", 0], "LR"), (["--lr", "inf"], "LR"), (["--lr", "-1e-4"], "--lr|LR"),
    (["--weight-decay", -1], "WEIGHT_DECAY"), (["--grad-clip", -1], "GRAD_CLIP"), (["--grad-clip", "nan"], "GRAD_CLIP"),
    (["--plateau-factor", 1], "PLATEAU_FACTOR"), (["--plateau-factor", 0], "PLATEAU_FACTOR"),
    (["--plateau-patience", -1], "PLATEAU_PATIENCE"), (["--early-stopping", -1], "EARLY_STOPPING"),
    (["--seed", -1], "SEED"), (["--loss", "hinge"], "LOSS.*hinge.*dice_bce.*dice_focal.*focal_tversky"),
    (["--loss", "none"], "LOSS"), (["--encoder", "resnet35"], "ENCODER.*resnet35"),
    (["--mean", 0.5], "MEAN"), (["--std", 0, 1, 1], "STD"), (["--device", "gpu"], "DEVICE.*gpu"),
    (["--device", "none"], "DEVICE"), (["--device", "cuda:99"], "DEVICE.*cuda:99"),
    (["--data-dir", "/not/there"], "/not/there.*DATA_DIR|DATA_DIR.*/not/there"),
    (["--data-dir", "none"], "data folder"),
    (["--predict"], "--predict")])
def test_a_wrong_command_line_ends_with_one_sentence_before_any_work(words, named, data, tmp_path, capsys):
    out = tmp_path / "out"
    err = refused(capsys, *FAST, "--data-dir", data, "--output-dir", out, *words)
    assert re.search(named, err), err
    assert not out.exists()


@pytest.mark.parametrize("device", ["cuda", "cuda:0"])
def test_cuda_without_a_gpu_is_refused(device, data, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(script.torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(script.torch.cuda, "is_available", lambda: False)
    err = refused(capsys, *FAST, "--data-dir", data, "--output-dir", tmp_path / "out", "--device", device)
    assert device in err and "--device cpu" in err


@pytest.mark.parametrize("device", ["meta", "mps", "xpu"])
def test_devices_that_the_script_was_not_made_for_are_refused(device, data, tmp_path, capsys):
    """PyTorch knows them, so only the script can say so before the work starts."""
    words = [*FAST, "--data-dir", data, "--output-dir", tmp_path / "out", "--device", device]
    assert "DEVICE" in refused(capsys, *words)


@pytest.mark.parametrize("option", ["--init-weights", "--encoder-weights"])
def test_a_weights_file_that_is_not_there_is_refused_before_the_data_are_read(option, data, tmp_path, capsys):
    """Reading a large data set takes minutes: a typing error must show at once."""
    err = refused(capsys, *FAST, "--data-dir", data, "--output-dir", tmp_path / "out", option, tmp_path / "no.pth")
    assert str(tmp_path / "no.pth") in err


@pytest.mark.parametrize("missing", ["train", "valid"])
def test_a_data_folder_without_its_parts_is_refused(missing, tmp_path, capsys):
    data = write_data(tmp_path / "data", **{missing: 0})
    err = refused(capsys, *FAST, "--data-dir", data, "--output-dir", tmp_path / "out", silent=False)
    assert str(data / missing) in err
    assert not list((tmp_path / "out").glob("*"))


def test_an_output_folder_that_cannot_be_one_is_refused(data, tmp_path, capsys):
    (tmp_path / "file").write_text("taken")
    err = refused(capsys, *FAST, "--data-dir", data, "--output-dir", tmp_path / "file")
    assert str(tmp_path / "file") in err and "OUTPUT_DIR" in err


def test_a_constant_that_was_edited_to_the_wrong_type_is_refused(tmp_path, capsys):
    copied = edited(tmp_path, "\nIMG_SIZE = 256", '\nIMG_SIZE = "256px"')
    assert copied.main(["--data-dir", str(tmp_path)]) == 2
    assert "IMG_SIZE" in capsys.readouterr().err


def test_two_things_at_a_time_are_refused(data, tmp_path, capsys):
    refused(capsys, *FAST, "--data-dir", data, "--output-dir", tmp_path / "out", "--evaluate", "--predict", "a.png")


# --- importing


IMPORT = """
import os, socket, sys
sys.path.insert(0, {root!r})
def forbidden(*_):
    raise AssertionError("the import wants the network")
socket.socket.connect = socket.create_connection = socket.getaddrinfo = forbidden
import brain_tumor_integrated_smp as script
import torch
assert not torch.cuda.is_initialized()
assert callable(script.load_model) and callable(script.predict_mask) and callable(script.BrainTumorDataset)
open({report!r}, "w").write(repr(sorted(os.listdir("."))))
"""


def test_importing_has_no_side_effects(tmp_path):
    """In a fresh process and folder: nothing printed, no file written, no GPU touched, no network asked for."""
    work = tmp_path / "work"
    work.mkdir()
    before = {path: path.stat().st_mtime_ns for path in ROOT.iterdir() if path.name != "__pycache__"}
    code = IMPORT.format(root=str(ROOT), report=str(tmp_path / "report"))
    environment = {name: value for name, value in os.environ.items() if name != "NO_ALBUMENTATIONS_UPDATE"}
    done = subprocess.run([sys.executable, "-c", code], cwd=work, env=environment, capture_output=True,
                          encoding="utf-8", timeout=300)
    assert done.returncode == 0, done.stderr
    assert (done.stdout, done.stderr) == ("", "")
    assert (tmp_path / "report").read_text() == "[]"
    assert {path: path.stat().st_mtime_ns for path in ROOT.iterdir() if path.name != "__pycache__"} == before
