"""An interrupted run goes on as if nothing had happened, and an earlier run is never lost."""

import json
import os
import pickle
import shutil

import background
import numpy as np
import pytest
import torch
from background import BFLOAT16, arguments, assert_same_run, copy_run, differences, read, run, table_rows, whole_run
from conftest import run_script, script

BEST, LAST = script.BEST, script.LAST


@pytest.fixture
def finished(tmp_path):
    """A copy of a finished run of 4 epochs."""
    return copy_run(whole_run(), tmp_path / "finished")


def main(capfd, *argv):
    """Run the script in this process; returns (exit code, standard output, standard error)."""
    code = script.main([str(word) for word in argv])
    return code, *capfd.readouterr()


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refused(capfd, folder, *argv):
    """--resume that has to be refused without touching a file; returns the message."""
    before = contents(folder)
    code, _, err = main(capfd, *arguments(folder, "--resume", *argv))
    assert code == 2, err
    assert "error: " in err and "Traceback" not in err
    assert contents(folder) == before
    return err


# --- two halves are the whole


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_two_and_two_epochs_are_four(precision, tmp_path):
    folder = tmp_path / "halves"
    patch = BFLOAT16 * (precision == "bfloat16")
    code, text = run(arguments(folder, "--precision", precision, "--epochs", 2), patch)
    assert code == 0, text
    assert len(read(folder)["history"]) == 2
    code, text = run(arguments(folder, "--precision", precision, "--resume"), patch)
    assert code == 0, text
    assert "Going on after epoch 2" in text
    assert_same_run(folder, whole_run(precision))


def test_bfloat16_is_not_float32():
    assert differences(read(whole_run("bfloat16"))["model"], read(whole_run())["model"])


def test_an_encoder_with_dropout_repeats_its_draws(tmp_path):
    """efficientnet-b0 drops whole blocks at random: the random state has to go on, too."""
    options = ["--encoder", "efficientnet-b0", "--epochs", 2]
    for name, first in (("whole", 2), ("halves", 1)):
        code, text = run(arguments(tmp_path / name, *options, "--epochs", first))
        assert code == 0, text
    code, text = run(arguments(tmp_path / "halves", *options, "--resume"))
    assert code == 0, text
    assert differences(read(tmp_path / "halves")["model"], read(tmp_path / "whole")["model"]) == []


def test_learning_rate_and_patience_go_on(tmp_path):
    """With patience 0 the learning rate falls at every epoch that is not better, also across a resume."""
    patch = """
def validate(model, loader, criterion, device, *, cfg=None, inner=script.validate):
    return inner(model, loader, criterion, device, cfg=cfg) | {"dice": 0.5}
script.validate = validate
"""
    options = ["--plateau-patience", 0, "--early-stopping", 4, "--epochs"]
    code, text = run(arguments(tmp_path, *options, 2), patch)
    assert code == 0, text
    code, text = run(arguments(tmp_path, *options, 9, "--resume"), patch)
    assert code == 0, text
    assert [row["lr"] for row in read(tmp_path)["history"]] == pytest.approx([1e-4, 1e-4, 5e-5, 2.5e-5, 1.25e-5])
    assert "Stopped early" in text  # epochs 2 to 5 were no better than epoch 1: 4 in a row, over the resume


# --- what may change, and what may not


@pytest.mark.parametrize("flags, words", [
    (["--img-size", 96], ["IMG_SIZE", "saved 64", "now 96"]),
    (["--encoder", "resnet18"], ["ENCODER", "'mobilenet_v2'", "'resnet18'"]),
    (["--loss", "focal_tversky"], ["LOSS", "'dice_bce'", "'focal_tversky'"]),
    (["--seed", 7], ["SEED", "saved 42", "now 7"]),
    (["--lr", 0.5], ["LR", "0.0001", "0.5"]),
    (["--weight-decay", 0.5], ["WEIGHT_DECAY", "0.5"]),
    (["--grad-clip", 9], ["GRAD_CLIP", "9"]),
    (["--mean", 0.5, 0.5, 0.5], ["MEAN", "0.485", "0.5"]),
    (["--std", 0.5, 0.5, 0.5], ["STD", "0.229", "0.5"]),
    (["--categories", "tumor"], ["CATEGORIES", "tumor"]),
    (["--plateau-factor", 0.3], ["PLATEAU_FACTOR", "0.3"]),
    (["--plateau-patience", 3], ["PLATEAU_PATIENCE", "3"]),
    (["--batch-size", 4], ["BATCH_SIZE", "saved 2", "now 4"]),
    (["--accumulation-steps", 3], ["ACCUMULATION_STEPS", "saved 2", "now 6"]),
], ids=lambda value: str(value[0]))
def test_a_contradictory_setting_is_named(flags, words, finished, capfd):
    message = refused(capfd, finished, *flags)
    assert [word for word in words if word not in message] == []
    assert "What may change: EPOCHS" in message


def test_all_contradictory_settings_are_named_together(finished, capfd):
    message = refused(capfd, finished, "--img-size", 96, "--seed", 7, "--loss", "dice_focal")
    assert all(name in message for name in ("IMG_SIZE", "SEED", "LOSS"))


def test_what_may_change_may_change(finished, tmp_path):
    """Other workers, batch split, device options and folder of the data; one more epoch."""
    moved = shutil.copytree(background.shared_data(), tmp_path / "moved")
    code, text = run(arguments(finished, "--resume", "--epochs", 5, "--num-workers", 0, "--batch-size", 1,
                               "--accumulation-steps", 2, "--cache-gb", 0, "--early-stopping", 9, "--deterministic",
                               "--precision", "bfloat16", data=moved))
    assert code == 0, text
    assert len(table_rows(finished)) == 1 + 5


def test_a_resumed_run_does_not_depend_on_the_number_of_workers(tmp_path):
    folder = tmp_path / "halves"
    for options in (["--epochs", 2, "--num-workers", 0], ["--resume", "--num-workers", 1, "--cache-gb", 0]):
        code, text = run(arguments(folder, *options))
        assert code == 0, text
    mine, theirs = read(folder), read(whole_run())
    assert differences([mine["model"], mine["optimizer"], mine["history"]],
                       [theirs["model"], theirs["optimizer"], theirs["history"]]) == []


def test_resume_of_a_finished_run_says_so_and_changes_no_weights(finished):
    code, text = run(arguments(finished, "--resume"))
    assert code == 0 and "raise EPOCHS" in text
    assert_same_run(finished, whole_run())


def test_more_epochs_after_stopping_early(tmp_path):
    patch = """
def validate(model, loader, criterion, device, *, cfg=None, inner=script.validate):
    return inner(model, loader, criterion, device, cfg=cfg) | {"dice": 0.5}
script.validate = validate
"""
    code, text = run(arguments(tmp_path, "--epochs", 5, "--early-stopping", 1), patch)
    assert code == 0 and "Stopped early" in text, text
    assert len(table_rows(tmp_path)) == 1 + 2
    code, text = run(arguments(tmp_path, "--epochs", 6, "--early-stopping", 1, "--resume"), patch)
    assert code == 0 and "Stopped early" in text, text
    assert len(table_rows(tmp_path)) == 1 + 3  # it went on, and stopped by the same rule


# --- the data


def changed_pixel(data):
    path = data / "train/slice_0.png"
    image = script.read_image(path)[..., 0]
    image[0, 0] ^= 255
    script.write_image(path, image)


def changed_polygon(data):
    path = data / "valid" / script.ANNOTATION_FILE
    coco = json.loads(path.read_text())
    coco["annotations"][0]["segmentation"][0][0] += 9
    path.write_text(json.dumps(coco))


def one_image_less(data):
    path = data / "train" / script.ANNOTATION_FILE
    coco = json.loads(path.read_text())
    del coco["images"][-1]  # the one without a tumour
    path.write_text(json.dumps(coco))


def other_order(data):
    path = data / "train" / script.ANNOTATION_FILE
    coco = json.loads(path.read_text())
    coco["images"].reverse()
    path.write_text(json.dumps(coco))


@pytest.mark.parametrize("change", [changed_pixel, changed_polygon, one_image_less, other_order])
def test_changed_data_is_refused(change, finished, tmp_path, capfd):
    data = shutil.copytree(background.shared_data(), tmp_path / "changed")
    change(data)
    before = contents(finished)
    code, _, err = main(capfd, *arguments(finished, "--resume", "--epochs", 5, data=data))
    assert code == 2 and "not those of the saved run" in err
    assert contents(finished) == before


def test_other_test_images_are_no_other_data(finished, tmp_path):
    data = shutil.copytree(background.shared_data(), tmp_path / "changed")
    shutil.rmtree(data / "test")
    code, text = run(arguments(finished, "--resume", data=data))
    assert code == 0, text


# --- files that are damaged or come from others


def test_nothing_to_resume(tmp_path, capfd):
    tmp_path.joinpath("empty").mkdir()
    assert "nothing to resume" in refused(capfd, tmp_path / "empty")


@pytest.mark.parametrize("content", [b"", b"\0" * 1000, b"not a checkpoint", b"PK\3\4" + b"x" * 500, b"\x80\x02."],
                         ids=["empty", "zeros", "text", "half a zip", "half a pickle"])
def test_a_damaged_state_gives_a_message(content, tmp_path, capfd):
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / LAST).write_bytes(content)
    assert LAST in refused(capfd, folder)


@pytest.mark.parametrize("part", [0.01, 0.5, 0.999])
def test_a_state_that_is_cut_short_gives_a_message(part, finished, capfd):
    content = (finished / LAST).read_bytes()
    (finished / LAST).unlink()
    (finished / LAST).write_bytes(content[:int(len(content) * part)])
    message = refused(capfd, finished)
    assert LAST in message and "damaged" in message


@pytest.mark.parametrize("foreign", [
    [1, 2], {"state_dict": {}, "epoch": 3}, {"a": torch.ones(2)}, {"settings": {}, "optimizer": {}, "epoch": 1},
    {"settings": None, "optimizer": None, "epoch": None}, torch.ones(3), {1: 2},
], ids=["list", "another trainer", "a state_dict", "nearly", "none", "tensor", "numbers"])
def test_a_foreign_state_gives_a_message(foreign, tmp_path, capfd):
    folder = tmp_path / "out"
    folder.mkdir()
    torch.save(foreign, folder / LAST)
    assert LAST in refused(capfd, folder)


def test_a_state_whose_model_does_not_fit_says_what_differs(finished, capfd):
    state = read(finished)
    name = next(iter(state["model"]))
    state["model"]["surplus.weight"] = state["model"].pop(name)
    os.unlink(finished / LAST)
    torch.save(state, finished / LAST)
    message = refused(capfd, finished)
    assert "surplus.weight is not in this model" in message and f"{name} is missing" in message


class Bomb:
    """A pickle that creates a file when it is loaded."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.mark.parametrize("use", ["resume", "evaluate", "predict", "init", "encoder", "load_model"])
def test_code_in_a_file_is_not_executed(use, tmp_path, capfd):
    folder = tmp_path / "out"
    folder.mkdir()
    for name in (LAST, BEST):
        torch.save({"settings": Bomb(tmp_path / "executed"), "optimizer": {}, "epoch": 1}, folder / name)
    if use == "load_model":
        with pytest.raises(script.TrainerError, match="no weights file"):
            script.load_model(folder / BEST)
    else:
        image = background.shared_data() / "test/slice_0.png"
        more = {"resume": ["--resume"], "evaluate": ["--evaluate"], "predict": ["--predict", image],
                "init": ["--init-weights", folder / BEST], "encoder": ["--encoder-weights", folder / BEST]}[use]
        code, _, err = main(capfd, *arguments(folder, *more))
        assert code == 2 and "no weights file" in err
    assert not (tmp_path / "executed").exists()


def test_a_plain_pickle_is_not_executed(tmp_path, capfd):
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / LAST).write_bytes(pickle.dumps(Bomb(tmp_path / "executed")))
    assert LAST in refused(capfd, folder)
    assert not (tmp_path / "executed").exists()


# --- an earlier run


def test_an_earlier_run_is_announced_and_kept_together(finished):
    earlier = contents(finished)
    code, text = run(arguments(finished, "--epochs", 1, "--seed", 5))
    assert code == 0, text
    assert "holds an earlier run" in text and "--resume" in text
    (kept,) = finished.glob("earlier_run_*")
    assert kept.name in text
    assert contents(kept) == earlier
    assert len(table_rows(finished)) == 2 and read(finished)["settings"]["SEED"] == 5
    assert script.read_record(finished / BEST)[1] == script.read_record(kept / BEST)[1] == ""
    code, text = run(arguments(kept, "--resume"))
    assert code == 0 and "All 4 epochs" in text


def test_every_earlier_run_gets_a_name_of_its_own(finished):
    for seed in (5, 6):
        code, text = run(arguments(finished, "--epochs", 1, "--seed", seed))
        assert code == 0, text
    seeds = [read(folder)["settings"]["SEED"] for folder in finished.glob("earlier_run_*")]
    assert sorted(seeds) == [5, 42] and read(finished)["settings"]["SEED"] == 6


@pytest.mark.parametrize("end", ["os.kill(os.getpid(), signal.SIGKILL)", "os.kill(os.getpid(), signal.SIGINT)"],
                         ids=["killed", "Ctrl-C"])
def test_stopping_before_the_first_checkpoint_keeps_the_earlier_run(end, finished):
    earlier = contents(finished)
    patch = f"""
def train_one_epoch(*args, inner=script.train_one_epoch, **options):
    {end}
    return inner(*args, **options)
script.train_one_epoch = train_one_epoch
"""
    code, text = run(arguments(finished, "--seed", 5), patch)
    assert code == (-9 if "KILL" in end else 130), text
    left = contents(finished)
    if code == 130:
        assert left == earlier
    else:
        assert left.pop("new_run/training_samples.png") and left == earlier
    code, text = run(arguments(finished, "--epochs", 1, "--seed", 5))
    assert code == 0, text
    assert not (finished / "new_run").exists() and {path.name for path in finished.iterdir() if path.is_file()} == \
        set(script.RUN_FILES)


def test_ctrl_c_before_the_first_checkpoint_does_not_promise_to_go_on(finished):
    """The command with --resume would go on with the earlier run, not with this one."""
    patch = """
def train_one_epoch(*args, inner=script.train_one_epoch, **options):
    os.kill(os.getpid(), signal.SIGINT)
    return inner(*args, **options)
script.train_one_epoch = train_one_epoch
"""
    code, text = run(arguments(finished, "--seed", 5), patch)
    assert code == 130
    end = text[text.index("Stopped."):]
    assert "--resume" not in end


@pytest.mark.parametrize("name", [BEST, LAST])
@pytest.mark.parametrize("folder", ["finished", "new_run"])
def test_killed_while_files_are_moved_the_next_start_goes_on(folder, name, finished):
    earlier = contents(finished)
    code, text = run(arguments(finished, "--epochs", 1, "--seed", 5), f"""
def replace(source, target, inner=os.replace):
    source = script.Path(source)
    if source.parent.name == {folder!r} and source.name == {name!r}:
        os.kill(os.getpid(), signal.SIGKILL)
    inner(source, target)
os.replace = replace
os.link = functools.partial(replace, inner=os.link)
""")
    assert code == -9, text
    assert set(earlier.values()) <= set(contents(finished).values())
    assert {BEST, "unet_plusplus_best.json"} <= {path.name for path in finished.iterdir()}
    code, text = run(arguments(finished, "--epochs", 1, "--seed", 5, "--resume"))
    assert code == 0 and "Going on after epoch 1" in text, text
    (kept,) = finished.glob("earlier_run_*")
    assert contents(kept) == earlier
    assert not (finished / "new_run").exists() and script.read_record(finished / BEST)[1] == ""
    assert read(finished)["settings"]["SEED"] == 5


def test_a_first_checkpoint_that_cannot_be_written_leaves_the_earlier_run_where_it_is(finished):
    earlier = contents(finished)
    code, text = run(arguments(finished, "--seed", 5), """
def fsync(_):
    raise OSError(28, "No space left on device")
os.fsync = fsync
""")
    assert code == 1 and "cannot write" in text and "Traceback" not in text, text
    assert contents(finished) == earlier


def test_a_folder_for_the_earlier_run_that_cannot_be_made_gives_a_message(finished):
    earlier = contents(finished)
    command = arguments(finished, "--epochs", 1, "--seed", 5)
    code, text = run(command, """
def mkdir(self, *args, inner=script.Path.mkdir, **options):
    if "earlier_run" in self.name:
        raise PermissionError(13, "Permission denied", str(self))
    return inner(self, *args, **options)
script.Path.mkdir = mkdir
""")
    assert code == 1 and "error: " in text and "Permission denied" in text and "Traceback" not in text, text
    assert earlier.items() <= contents(finished).items()
    code, text = run([*command, "--resume"])
    assert code == 0 and "Going on after epoch 1" in text, text


def test_a_new_best_model_does_not_keep_the_scores_of_the_old_one(finished):
    """A resumed run that improves and is killed before its evaluation: the JSON must not show old test scores."""
    assert "test_metrics" in json.loads((finished / "unet_plusplus_best.json").read_text())
    patch = """
def validate(model, loader, criterion, device, *, cfg=None, inner=script.validate):
    return inner(model, loader, criterion, device, cfg=cfg) | {"dice": 0.99}
script.validate = validate
def evaluate_checkpoint(*_):
    os.kill(os.getpid(), signal.SIGKILL)
script.evaluate_checkpoint = evaluate_checkpoint
"""
    assert run(arguments(finished, "--resume", "--epochs", 5), patch)[0] == -9
    record, problem = script.read_record(finished / BEST)
    assert problem == "" and record["best_epoch"] == 5
    assert "test_metrics" not in record and "valid_metrics" not in record and record["threshold"] == 0.5


def test_the_state_holds_only_what_can_be_read_safely(finished):
    state = read(finished)  # weights_only
    assert {"model", "optimizer", "scheduler", "scaler", "epoch", "best_dice", "waited", "history", "random",
            "settings"} <= set(state)
    assert state["epoch"] == 4 and len(state["history"]) == 4
    assert not any(isinstance(value, np.generic) for row in state["history"] for value in row.values())


def test_resume_as_a_process(finished):
    result = run_script(*arguments(finished, "--resume", "--seed", 1))
    assert result.returncode == 2 and "SEED: saved 42, now 1" in result.stderr and "Traceback" not in result.stderr
