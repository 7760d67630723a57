"""Constants, the flags that follow from them, the errors of a wrong command line, and edits of the file."""

import ast
import importlib.util
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
from background import no_pictures
from conftest import FAST, ROOT, SCRIPT, script

# What the script was promised to start with.
KNOWN = {"IMG_SIZE": 256, "EPOCHS": 80, "LR": 1e-4, "NUM_WORKERS": 4, "WEIGHT_DECAY": 1e-2, "PLATEAU_FACTOR": 0.5,
         "PLATEAU_PATIENCE": 10, "LOSS": "dice_bce", "ARCHITECTURE": "unetplusplus", "ENCODER": "resnet34",
         "ENCODER_WEIGHTS": "imagenet", "INIT_WEIGHTS": None, "TEST_TIME_AUGMENTATION": False}
TEXT = SCRIPT.read_text(encoding="utf-8")
SETTINGS_BLOCK = TEXT[TEXT.index("# --- data and output"):TEXT.index("CONSTANTS = ")].strip()


def constants():
    """Names of the plain upper-case assignments at the top of the file, read without running it."""
    names = [node.targets[0].id for node in ast.parse(TEXT).body
             if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id.isupper()]
    return names[:names.index("CONSTANTS")]


def flag(name):
    """IMG_SIZE -> --img-size."""
    return "--" + name.lower().replace("_", "-")


def another(name, value, folder):
    """A legal value of a constant that is not its default: (words of the command line, what they mean)."""
    texts = {"DATA_DIR": str(folder), "OUTPUT_DIR": str(folder / "o"), "ARCHITECTURE": "linknet", "ENCODER": "resnet18",
             "UNANNOTATED": "skip", "PATIENT_PATTERN": r"(p\d+)_", "FOLD": 3,
             "LOSS": "focal_tversky", "DEVICE": "cuda:1", "PRECISION": "bfloat16",
             "ENCODER_WEIGHTS": str(folder / "w.pth"), "INIT_WEIGHTS": str(folder / "w.pth")}
    if isinstance(value, bool):
        return [flag(name).replace("--", "--no-") if value else flag(name)], not value
    if isinstance(value, tuple):
        new = (0.25, 0.5, 0.75)[:len(value)] if value else ("glioma", "肿瘤")
        return [flag(name), *map(str, new)], new
    new = texts[name] if name in texts else value + 64 if isinstance(value, int) else value / 4 + 0.125
    return [flag(name), str(new)], new


def settings(*words):
    """Settings from a command line."""
    return script.read_settings([str(word) for word in words])[0]


def refused(capsys, *words, module=script):
    """Run main() on a command line that must be refused; returns the one sentence on standard error."""
    assert module.main([str(word) for word in words]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1, err
    return err


def help_text(capsys, module=script):
    """What --help prints."""
    with pytest.raises(SystemExit) as end:
        module.main(["--help"])
    assert end.value.code == 0
    return capsys.readouterr().out


def edited(folder, old=r"\A", new=""):
    """A copy of the script with one place of it edited (old: a pattern), as a module; pictures are left out."""
    text, count = re.subn(old, lambda _: new, TEXT, flags=re.M)
    assert count == 1
    (folder / SCRIPT.name).write_text(text, encoding="utf-8")
    spec = importlib.util.spec_from_file_location("edited_copy", folder / SCRIPT.name)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look there
    try:
        spec.loader.exec_module(module)
    finally:
        del sys.modules[spec.name]
    no_pictures(module)
    return module


# --- constants and flags


def test_known_constants_keep_their_names_and_values():
    assert {name: getattr(script, name) for name in KNOWN} == KNOWN
    assert set(KNOWN) <= set(constants())
    assert vars(settings()) == {name: getattr(script, name) for name in constants()}


@pytest.mark.parametrize("available, device", [(True, "cuda"), (False, "cpu")])
def test_a_gpu_that_is_there_is_the_default(available, device, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: int(available))
    assert str(script.find_device(settings().DEVICE)) == device


def test_data_and_output_lie_beside_the_script_by_default(tmp_path):
    assert script.DATA_DIR == script.OUTPUT_DIR == str(ROOT)
    (tmp_path / "中文").mkdir()
    copied = edited(tmp_path / "中文")
    assert copied.DATA_DIR == copied.OUTPUT_DIR == str((tmp_path / "中文").resolve())


@pytest.mark.parametrize("name", constants())
def test_every_constant_has_a_flag_that_changes_it_and_nothing_else(name, tmp_path, monkeypatch):
    """Except that --lr holds for a random start too."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    default, before = getattr(script, name), vars(settings())
    (tmp_path / "w.pth").touch()
    words, new = another(name, default, tmp_path)
    cfg = vars(settings(*words))
    assert cfg[name] == new != default and isinstance(new, type(default) if default is not None else str)
    assert cfg == before | {name: new} | ({"LR_FROM_SCRATCH": new} if name == "LR" else {})
    assert vars(settings()) == before  # the constants are as they were


@pytest.mark.parametrize("words, lr, lr_from_scratch", [
    (["--lr", "3e-4"], 3e-4, 3e-4), (["--lr-from-scratch", "2e-3"], script.LR, 2e-3),
    (["--lr", "3e-4", "--lr-from-scratch", "2e-3"], 3e-4, 2e-3),
    (["--lr-from-scratch", "2e-3", "--lr", "3e-4"], 3e-4, 2e-3)])
def test_a_given_learning_rate_holds_for_every_start_unless_both_are_given(words, lr, lr_from_scratch):
    cfg = settings(*words)
    assert (cfg.LR, cfg.LR_FROM_SCRATCH) == (lr, lr_from_scratch)


@pytest.mark.parametrize("words, name, value", [
    (["--encoder-weights", "none"], "ENCODER_WEIGHTS", None), (["--encoder-weights", "NONE"], "ENCODER_WEIGHTS", None),
    (["--init-weights", "None"], "INIT_WEIGHTS", None), (["--categories"], "CATEGORIES", ()),
    (["--mean", "0", "1", "0.5"], "MEAN", (0, 1, 0.5)), (["--grad-clip", "2"], "GRAD_CLIP", 2),
    (["--no-compile"], "COMPILE", False), (["--encoder", "tu-rexnet_100"], "ENCODER", "tu-rexnet_100")])
def test_flags_take_what_people_write(words, name, value):
    assert getattr(settings(*words), name) == value


@pytest.mark.parametrize("old, new, words, name, value", [
    ("^EPOCHS = .*$", "EPOCHS = 3 # no comment", ["--epochs", "5"], "EPOCHS", 5),
    (r"^CATEGORIES = \(\)", 'CATEGORIES = (\n    "glioma",\n)', ["--categories", "tumor"], "CATEGORIES", ("tumor",)),
    (r"^MEAN = \(.*\)", "MEAN = [0.5, 0.5, 0.5]", [], "MEAN", (0.5, 0.5, 0.5)),
    ("^GRAD_CLIP = .*$", "GRAD_CLIP = 0", ["--grad-clip", "0.5"], "GRAD_CLIP", 0.5),
    ("^CACHE_GB = .*$", "CACHE_GB = 8", ["--cache-gb", "2.5"], "CACHE_GB", 2.5),
    ("^INIT_WEIGHTS = .*$", "INIT_WEIGHTS = 'a.pth'", ["--init-weights", "none"], "INIT_WEIGHTS", None)])
def test_constants_may_be_edited_the_way_people_do(tmp_path, old, new, words, name, value):
    """Without the comment, over several lines, or 0 for 0.0: the flags must survive it."""
    cfg, _ = edited(tmp_path, old, new).read_settings(["--data-dir", str(tmp_path), *words])
    assert getattr(cfg, name) == value


def test_help_lists_every_setting_as_a_flag_with_its_comment_and_default(capsys):
    printed = " ".join(help_text(capsys).split())
    comments = dict(re.findall(r"^([A-Z_]+) = .+?  # (.{10}.*)", SETTINGS_BLOCK, re.M))
    assert [*comments] == constants()
    for name, comment in comments.items():
        value = getattr(script, name)
        default = " ".join(map(str, value)) if isinstance(value, tuple) else value
        start = printed.index(f" {flag(name)} ") if not isinstance(value, bool) else printed.index(f" {flag(name)}, ")
        assert printed.index(" ".join(comment.split()), start) < printed.index(f"[{default}]", start), name
    assert printed.endswith(f"losses: {', '.join(script.LOSSES)}")
    assert "EMA is what is validated and saved as the best model [1.0]" in printed  # the comment has a second line
    assert {"--resume", "--audit", "--evaluate", "--check-labels", "--predict", "--checkpoint"} <= {*printed.split()}


@pytest.mark.parametrize("words, meant", [
    ("--ing-size 64", "--img-size"), ("--imgsize=64", "--img-size"), ("--batchsize 4", "--batch-size"),
    ("--no-skip-bad-image", "--no-skip-bad-images"), ("--check-label", "--check-labels"),
    ("--loss dicebce", "dice_bce"), ("--encoder resnet-34", "resnet34"), ("--architecture unetplus", "unetplusplus"),
    ("--precision float-16", "float16"), ("--unannotated tumor-free", "tumour-free")])
def test_what_is_mistyped_is_answered_with_what_was_meant(words, meant, tmp_path, capsys):
    assert f" Did you mean {meant}?" in refused(capsys, "--data-dir", tmp_path, *words.split())


@pytest.mark.parametrize("words", ["--something-else 3", "--loss hinge", "--encoder x"])
def test_what_is_like_nothing_is_not_guessed(words, tmp_path, capsys):
    assert "Did you mean" not in refused(capsys, "--data-dir", tmp_path, *words.split())


# --- what is refused


@pytest.mark.parametrize("words, named", [
    ("--imgsize 64", "--imgsize"), ("--img 64", "--img"), ("train", "train"), ("--img-size", "--img-size"),
    ("--predict", "--predict"), ("--evaluate --predict a.png", "--evaluate"), ("--resume --audit", "--resume"),
    ("--checkpoint a.pth", "--checkpoint goes.*INIT_WEIGHTS"), ("--audit --checkpoint a.pth", "--checkpoint goes"),
    ("--img-size large", "--img-size.*large"), ("--img-size 64.5", "IMG_SIZE is 64.5.*multiple of 32"),
    ("--img-size 32", "IMG_SIZE is 32.*from 64 to"), ("--img-size 100", "IMG_SIZE is 100.*32"),
    ("--img-size -64", "IMG_SIZE"), ("--img-size 4128", "IMG_SIZE.*4096"), ("--epochs 0", "EPOCHS"),
    ("--epochs 1e2", "EPOCHS"), ("--batch-size 0", "BATCH_SIZE"), ("--num-workers -1", "NUM_WORKERS"),
    ("--accumulation-steps 0", "ACCUMULATION_STEPS"), ("--cache-gb -1", "CACHE_GB"),
    ("--lr fast", "--lr.*fast"), ("--lr nan", "LR"), ("--lr 0", "LR"), ("--lr inf", "LR"), ("--lr -1e-4", "LR|--lr"),
    ("--lr-from-scratch 0", "LR_FROM_SCRATCH"), ("--warmup-steps -1", "WARMUP_STEPS"),
    ("--warmup-steps 0.5", "WARMUP_STEPS.*whole"), ("--ema-epochs -1", "EMA_EPOCHS"),
    ("--ema-epochs nan", "EMA_EPOCHS"), ("--weight-decay -1", "WEIGHT_DECAY"), ("--grad-clip -1", "GRAD_CLIP"),
    ("--plateau-factor 1", "PLATEAU_FACTOR"), ("--plateau-factor 0", "PLATEAU_FACTOR"),
    ("--plateau-patience -1", "PLATEAU_PATIENCE"), ("--early-stopping-patience -1", "EARLY_STOPPING_PATIENCE"),
    ("--seed -1", "SEED"),
    (f"--seed {2**63}", "SEED"), ("--loss hinge", "LOSS.*hinge.*dice_bce, dice_focal, focal_tversky"),
    ("--loss none", "LOSS"), ("--encoder resnet35", "ENCODER.*resnet35"), ("--encoder none", "ENCODER"),
    ("--architecture unet+", "ARCHITECTURE.*unetplusplus"), ("--precision half", "PRECISION.*bfloat16"),
    ("--precision float16", "PRECISION.*CUDA"), ("--mean a b c", "--mean"), ("--mean 0.5", "MEAN.*three"),
    ("--std 0 1 1", "STD"), ("--std 1 1 inf", "STD"), ("--device gpu", "DEVICE.*gpu.*--device cpu"),
    ("--device none", "DEVICE"), ("--data-dir /not/there", "/not/there.*DATA_DIR"), ("--data-dir none", "data folder"),
    # A large data set is read for minutes: a typing error must show before that.
    ("--init-weights /no.pth", "/no.pth"), ("--encoder-weights /no.pth", "/no.pth")])
def test_a_wrong_command_line_ends_with_one_sentence_before_any_work(words, named, tmp_path, capsys):
    out = tmp_path / "out"
    err = refused(capsys, *FAST, "--data-dir", tmp_path, "--output-dir", out, *words.split())
    assert re.search(named, err), err
    assert not out.exists()


@pytest.mark.parametrize("count, processes, device, legal", [
    (0, 1, "cuda", False), (0, 1, "cuda:0", False), (1, 1, "cuda", True), (1, 1, "cuda:0", True),
    (1, 1, "cuda:1", False), (2, 1, "cuda:1", True), (1, 2, "cuda", False), (2, 2, "cuda", True), (0, 2, "cpu", True),
    (0, 2, "auto", True), (1, 1, "auto", True), (1, 2, "auto", False), (1, 1, "mps", False), (1, 1, "meta", False)])
def test_a_device_must_be_there_for_each_process(count, processes, device, legal, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    if legal:
        assert settings("--device", device).DEVICE == device
    else:
        with pytest.raises(script.TrainerError, match=f"DEVICE is '{device}'.*--device cpu"):
            settings("--device", device)


def test_a_batch_holds_an_image_for_every_process(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert settings("--batch-size", 4).BATCH_SIZE == 4
    with pytest.raises(script.TrainerError, match="BATCH_SIZE is 3.*number of processes"):
        settings("--batch-size", 3)


@pytest.mark.parametrize("mode", [["--audit"], ["--evaluate"], ["--predict", "a.png", "b"]])
def test_weights_to_start_from_may_be_gone_later(mode):
    _, chosen = script.read_settings(["--init-weights", "gone.pth", "--encoder-weights", "gone.pth", *mode])
    assert getattr(chosen, mode[0][2:]) == (mode[1:] or True)
    assert [name for name in ("resume", "audit", "evaluate", "predict") if getattr(chosen, name)] == [mode[0][2:]]


@pytest.mark.parametrize("words", [["-f", "/somewhere/runtime/kernel-0815.json"], ["--f=/somewhere/kernel-0815.json"]])
def test_main_in_a_notebook_says_how_to_call_it(words, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["ipykernel_launcher.py", *words])
    assert script.main() == 2 and "call main([])" in capsys.readouterr().err


def test_an_output_folder_that_cannot_be_one_is_refused(tmp_path, capsys):
    (tmp_path / "file").write_text("taken")
    err = refused(capsys, *FAST, "--data-dir", tmp_path, "--output-dir", tmp_path / "file")
    assert str(tmp_path / "file") in err and "OUTPUT_DIR" in err


@pytest.mark.parametrize("old, new, named", [
    ("^IMG_SIZE = 256", 'IMG_SIZE = "256px"', "IMG_SIZE is '256px'"),
    ("^COMPILE = False", 'COMPILE = "off"', "COMPILE is 'off', but must be True or False"),
    ("^SKIP_BAD_IMAGES = False", "SKIP_BAD_IMAGES = 0", "SKIP_BAD_IMAGES is 0"),
    (r"^CATEGORIES = \(\)", "CATEGORIES = (1,)", r"CATEGORIES is \(1,\)"),
    ("^PATIENT_PATTERN = None", 'PATIENT_PATTERN = re.compile("(P)")', "PATIENT_PATTERN.*cannot be saved"),
    ("^SEED = 42", "SEED = 42\nCLASSES = {1, 2}", "CLASSES is {1, 2}.*cannot be saved")])
def test_a_constant_that_was_edited_to_the_wrong_type_is_refused(old, new, named, tmp_path, capsys):
    copied = edited(tmp_path, old, new)
    assert re.search(named, refused(capsys, "--data-dir", tmp_path, module=copied))


def test_a_comment_may_stand_anywhere_between_the_settings(tmp_path, capsys):
    copied = edited(tmp_path, "^# --- data and output", "# --- data and output\n#    mine")
    assert "DATA_DIR" in help_text(capsys, copied)


# --- importing


IMPORT = """
import os, random, signal, socket, sys, threading
import cv2, numpy, torch
def forbidden(*_):
    raise AssertionError("the import wants the network")
socket.socket.connect = socket.create_connection = socket.getaddrinfo = forbidden
def state():
    return (threading.active_count(), cv2.getNumThreads(), torch.get_num_threads(), torch.backends.cudnn.benchmark,
            torch.initial_seed(), random.getstate(), numpy.random.get_state()[1].tolist(),
            torch.get_float32_matmul_precision(), [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)])
before = state()
from brain_tumor_integrated_smp import BrainTumorDataset, load_model, predict_mask, read_image
assert state() == before and not torch.cuda.is_initialized()
"""


def test_importing_has_no_side_effects(tmp_path):
    """In a fresh process: nothing printed, no file written, no GPU touched, no network asked for, nothing set."""
    (tmp_path / "work").mkdir()
    shutil.copy(SCRIPT, tmp_path)
    environment = {name: value for name, value in os.environ.items() if name != "NO_ALBUMENTATIONS_UPDATE"}
    done = subprocess.run([sys.executable, "-B", "-c", IMPORT], cwd=tmp_path / "work", capture_output=True,
                          encoding="utf-8", env=environment | {"PYTHONPATH": str(tmp_path)}, timeout=300)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == [SCRIPT.name]
