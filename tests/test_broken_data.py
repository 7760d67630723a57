"""Broken and odd data: each ends with exit code 2 and a helpful message, and touches nothing in the output folder."""

import copy
import json
import os
import shutil

import cv2
import numpy as np
import pytest
from conftest import FAST, box, run_script, script, write_coco, write_data

JSON = script.ANNOTATION_FILE


@pytest.fixture
def data(tmp_path):
    """A data folder with 3 + 2 + 1 images of 64x64 pixels."""
    return write_data(tmp_path / "data", 3, 2, 1, size=64)


@pytest.fixture
def output(tmp_path):
    """An output folder with the files of an earlier run."""
    folder = tmp_path / "out"
    folder.mkdir()
    for name in script.RUN_FILES:
        (folder / name).write_bytes(b"earlier " + name.encode())
    return folder


def contents(folder):
    """Every file below a folder with its bytes."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def arguments(data, output, *more):
    return [*FAST, "--data-dir", str(data), "--output-dir", str(output), *map(str, more)]


def refused(capfd, data, output, *more):
    """Run the script in this process on data that it has to refuse; returns the message."""
    before = contents(output)
    code = script.main(arguments(data, output, *more))
    text = capfd.readouterr().err
    assert code == 2, text
    assert "error: " in text and "Traceback" not in text
    assert contents(output) == before
    return text[text.index("error: "):]


def accepted(capfd, data, output, *more):
    """The audit of data that can be used; returns (standard output, standard error)."""
    code = script.main(arguments(data, output, "--audit", *more))
    out, err = capfd.readouterr()
    assert code == 0, err
    assert "The data can be used." in out
    return out, err


def edit(change, split="train"):
    """A damage that changes the loaded JSON in place, or replaces it if the change returns something."""
    def damage(root):
        path = root / split / JSON
        coco = json.loads(path.read_text(encoding="utf-8"))
        changed = change(coco)
        path.write_text(json.dumps(coco if changed is None else changed), encoding="utf-8")
    return damage


def put(kind, number, key, value, split="train"):
    """A damage that sets one key of one entry of the JSON."""
    return edit(lambda coco: coco[kind][number].update({key: value}), split)


def without(key):
    """A damage that removes a key of the JSON."""
    return edit(lambda coco: {name: value for name, value in coco.items() if name != key})


def drop(kind, number, key):
    """A damage that removes one key of one entry of the JSON."""
    def change(coco):
        del coco[kind][number][key]
    return edit(change)


def segmentation(value):
    """A damage that gives the first annotation of train another segmentation."""
    return put("annotations", 0, "segmentation", value)


def raw(content):
    """A damage that replaces the JSON of train by these bytes, or by what a function makes of its own."""
    def damage(root):
        path = root / "train" / JSON
        path.write_bytes(content(path.read_bytes()) if callable(content) else content)
    return damage


def no_folder(name):
    return lambda root: shutil.rmtree(root / name)


def file(change, name="slice_0.png", split="train"):
    """A damage that changes the bytes of an image file; None removes it."""
    def damage(root):
        path = root / split / name
        content = change(path.read_bytes())
        path.unlink() if content is None else path.write_bytes(content)
    return damage


def as_jpeg(fraction):
    """A damage that turns an image into a JPEG that is cut short."""
    def damage(root):
        pixels = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
        content = cv2.imencode(".jpg", pixels)[1].tobytes()
        (root / "train/slice_0.jpg").write_bytes(content[:int(len(content) * fraction)])
        put("images", 0, "file_name", "slice_0.jpg")(root)
    return damage


def folder_for_file(root):
    (root / "train/slice_0.png").unlink()
    (root / "train/slice_0.png").mkdir()


def no_tumour(root):
    edit(lambda coco: coco.update(annotations=[]))(root)


def only_outside(root):
    for number in range(2):
        put("annotations", number, "segmentation", [box(500, 500, 20, 20)])(root)


def text_for_image(root):
    (root / "train/slice_0.png").unlink()
    (root / "train/note.jpg").write_text("not a picture")
    put("images", 0, "file_name", "note.jpg")(root)


RLE = {"size": [64, 64], "counts": [10, 5, 64 * 64 - 15]}
COMPRESSED = script.coco_mask.encode(np.asfortranarray(np.eye(64, dtype=np.uint8)))["counts"].decode()

# name: (what is done to the data, words that the message must hold: the file, what is wrong, what to do)
BROKEN = {
    # --- folders and JSON files
    "train folder missing": (no_folder("train"), ["train", "folder not found", "DATA_DIR"]),
    "valid folder missing": (no_folder("valid"), ["valid", "folder not found", "DATA_DIR"]),
    "JSON missing": (lambda root: (root / "train" / JSON).unlink(), ["train", JSON, "not found", "export"]),
    "JSON missing in test": (lambda root: (root / "test" / JSON).unlink(), ["test", JSON, "not found", "export"]),
    "JSON cut short": (raw(lambda text: text[:len(text) // 2]), ["train", JSON, "not valid JSON", "again"]),
    "JSON cut by one byte": (raw(lambda text: text[:-1]), ["train", JSON, "not valid JSON", "again"]),
    "JSON empty": (raw(b""), ["train", JSON, "not valid JSON", "again"]),
    "JSON in UTF-16": (raw(lambda text: text.decode().encode("utf-16")), ["train", JSON, "not valid JSON", "again"]),
    "JSON of zero bytes": (raw(b"\0" * 500), ["train", JSON, "not valid JSON", "again"]),
    "JSON nested too deeply": (raw(b"[" * 200_000), ["train", JSON, "not valid JSON", "again"]),
    "JSON a picture": (raw(lambda _: cv2.imencode(".png", np.zeros((8, 8), np.uint8))[1].tobytes()),
                       ["train", JSON, "not valid JSON"]),
    # --- valid JSON, but not COCO
    "JSON a list": (raw(b"[]"), ["train", JSON, "not a COCO file", "COCO Segmentation"]),
    "JSON null": (raw(b"null"), ["train", JSON, "not a COCO file", "COCO Segmentation"]),
    "JSON a number": (raw(b"7"), ["train", JSON, "not a COCO file", "COCO Segmentation"]),
    "no images key": (without("images"), ["train", JSON, "'images'", "COCO Segmentation"]),
    "no annotations key": (without("annotations"), ["train", JSON, "'annotations'", "COCO Segmentation"]),
    "no categories key": (without("categories"), ["train", JSON, "'categories'", "COCO Segmentation"]),
    "images a dict": (edit(lambda coco: coco.update(images={"a": 1})), ["train", JSON, "'images'"]),
    "images null": (edit(lambda coco: coco.update(images=None)), ["train", JSON, "'images'"]),
    "image entries text": (edit(lambda coco: coco.update(images=["a.png"])), ["train", JSON, "'images'"]),
    "annotation entries null": (edit(lambda coco: coco["annotations"].append(None)), ["train", JSON, "'annotations'"]),
    "category entries numbers": (edit(lambda coco: coco.update(categories=[1])), ["train", JSON, "'categories'"]),
    "no images": (edit(lambda coco: coco.update(images=[], annotations=[])), ["train", JSON, "no images", "export"]),
    "no images in valid": (edit(lambda coco: coco.update(images=[], annotations=[]), "valid"),
                           ["valid", JSON, "no images", "export"]),
    # --- entries
    "image id missing": (drop("images", 1, "id"), ["train", JSON, "entry 1", "id"]),
    "image id null": (put("images", 1, "id", None), ["train", JSON, "entry 1", "id"]),
    "image id twice": (put("images", 1, "id", 0), [JSON, "image id 0", "twice", "slice_0.png", "slice_1.png"]),
    "file listed twice": (put("images", 1, "file_name", "slice_0.png"), [JSON, "slice_0.png", "two images"]),
    "file_name missing": (drop("images", 1, "file_name"), [JSON, "entry 1", "file_name"]),
    "file_name a number": (put("images", 1, "file_name", 5), [JSON, "entry 1", "file_name"]),
    "file_name empty": (put("images", 1, "file_name", ""), [JSON, "entry 1", "file_name"]),
    "file_name goes up": (put("images", 0, "file_name", "../valid/slice_0.png"), [JSON, "../valid", "outside"]),
    "file_name goes up later": (put("images", 0, "file_name", "a/../../valid/slice_0.png"), [JSON, "outside"]),
    "file_name with back-slashes up": (put("images", 0, "file_name", "..\\valid\\slice_0.png"), [JSON, "outside"]),
    "file_name absolute": (put("images", 0, "file_name", "/etc/passwd"), [JSON, "/etc/passwd", "outside"]),
    "file_name a Windows drive": (put("images", 0, "file_name", "C:\\x\\slice_0.png"), [JSON, "outside"]),
    "file_name a Windows share": (put("images", 0, "file_name", "\\\\server\\x.png"), [JSON, "outside"]),
    "file_name with a zero byte": (put("images", 0, "file_name", "a\0.png"), [JSON, "outside"]),
    "file_name too long": (put("images", 0, "file_name", "a" * 300 + ".png"), ["aaa", "too long"]),
    "file_name not encodable": (put("images", 0, "file_name", "\ud800.png"), ["1 image"]),
    "height missing": (drop("images", 0, "height"), [JSON, "slice_0.png", "height None"]),
    "height text": (put("images", 0, "height", "64"), [JSON, "slice_0.png", "height '64'"]),
    "width zero": (put("images", 0, "width", 0), [JSON, "slice_0.png", "width 0"]),
    "width negative": (put("images", 0, "width", -64), [JSON, "slice_0.png", "width -64"]),
    "width a fraction": (put("images", 0, "width", 64.5), [JSON, "slice_0.png", "width 64.5"]),
    "width infinite": (put("images", 0, "width", float("inf")), [JSON, "slice_0.png", "width inf"]),
    "width not a number": (put("images", 0, "width", float("nan")), [JSON, "slice_0.png", "width nan"]),
    "width absurd": (put("images", 0, "width", 10**9), [JSON, "slice_0.png", "width 1000000000"]),
    "height true": (put("images", 0, "height", True), [JSON, "slice_0.png", "height True"]),
    "annotation for an unknown image": (put("annotations", 0, "image_id", 77), [JSON, "annotation id 0", "77"]),
    "annotation without image_id": (drop("annotations", 0, "image_id"),
                                    [JSON, "annotation id 0", "None"]),
    # --- segmentations
    "segmentation missing": (drop("annotations", 0, "segmentation"),
                             [JSON, "annotation id 0", "slice_0.png", "COCO Segmentation"]),
    "only a box": (edit(lambda coco: coco["annotations"][0].update(segmentation=[], bbox=[1, 1, 9, 9])),
                   [JSON, "annotation id 0", "slice_0.png", "only a box", "COCO Segmentation"]),
    "segmentation null": (segmentation(None), [JSON, "annotation id 0", "slice_0.png"]),
    "segmentation text": (segmentation("1 2 3 4 5 6"), [JSON, "annotation id 0", "slice_0.png"]),
    "segmentation a number": (segmentation(5), [JSON, "annotation id 0", "slice_0.png"]),
    "polygon of odd length": (segmentation([[1, 1, 20, 1, 20, 20, 1]]), [JSON, "annotation id 0", "x, y pairs"]),
    "polygon not in a list": (segmentation([1, 1, 20, 1, 20, 20]), [JSON, "annotation id 0", "x, y pairs"]),
    "polygon with NaN": (segmentation([[1, 1, 20, float("nan"), 20, 20]]), [JSON, "annotation id 0", "not finite"]),
    "polygon with infinity": (segmentation([[1, 1, 20, float("inf"), 20, 20]]), [JSON, "id 0", "not finite"]),
    "polygon with null": (segmentation([[1, 1, 20, None, 20, 20]]), [JSON, "annotation id 0"]),
    "polygon with words": (segmentation([[1, 1, "left", 1, 20, 20]]), [JSON, "annotation id 0", "x, y pairs"]),
    "polygon a text": (segmentation(["1 1 20 1 20 20"]), [JSON, "annotation id 0", "x, y pairs"]),
    "polygon with a huge integer": (segmentation([[1, 1, 10**400, 1, 20, 20]]), [JSON, "annotation id 0"]),
    "polygon of points with three numbers": (segmentation([[[1, 1, 0], [20, 1, 0], [20, 20, 0], [1, 20, 0]]]),
                                             [JSON, "annotation id 0", "x, y pairs"]),
    "polygon of objects": (segmentation([[{"x": 1, "y": 2}] * 3]), [JSON, "annotation id 0", "x, y pairs"]),
    "RLE without size": (segmentation({"counts": RLE["counts"]}), [JSON, "annotation id 0", "size None"]),
    "RLE empty": (segmentation({}), [JSON, "annotation id 0", "size None"]),
    "RLE of another size": (segmentation(RLE | {"size": [32, 128]}), [JSON, "id 0", "[32, 128]", "[64, 64]"]),
    "RLE without counts": (segmentation({"size": [64, 64]}), [JSON, "annotation id 0", "counts"]),
    "RLE counts too few": (segmentation(RLE | {"counts": [10, 5]}), [JSON, "annotation id 0", "counts"]),
    "RLE counts too many": (segmentation(RLE | {"counts": [10, 5, 10**6]}), [JSON, "annotation id 0", "counts"]),
    "RLE counts negative": (segmentation(RLE | {"counts": [-5, 5, 64 * 64]}), [JSON, "annotation id 0", "counts"]),
    "RLE counts not whole": (segmentation(RLE | {"counts": [10.0, 5.0, 4081.0]}), [JSON, "annotation id 0", "counts"]),
    "RLE text cut short": (segmentation(RLE | {"counts": COMPRESSED[:-3]}), [JSON, "annotation id 0", "RLE"]),
    "RLE text cut in half": (segmentation(RLE | {"counts": COMPRESSED[:40]}), [JSON, "annotation id 0", "RLE"]),
    "RLE text empty": (segmentation(RLE | {"counts": ""}), [JSON, "annotation id 0", "RLE"]),
    "RLE text with a stray end": (segmentation(RLE | {"counts": COMPRESSED + "PPo"}), [JSON, "annotation id 0", "RLE"]),
    "RLE text of other letters": (segmentation(RLE | {"counts": "\u8111\u7624!"}), [JSON, "annotation id 0", "RLE"]),
    # --- image files
    "image missing": (file(lambda _: None), ["slice_0.png", "missing", "1 image", "SKIP_BAD_IMAGES"]),
    "image empty": (file(lambda _: b""), ["slice_0.png", "empty", "SKIP_BAD_IMAGES"]),
    "image empty in test": (file(lambda _: b"", split="test"), ["test", "slice_0.png", "empty", "SKIP_BAD_IMAGES"]),
    "image a folder": (folder_for_file, ["slice_0.png", "SKIP_BAD_IMAGES"]),
    "image a text": (text_for_image, ["note.jpg", "not an image", "SKIP_BAD_IMAGES"]),
    "image random bytes": (file(lambda _: os.urandom(2000)), ["slice_0.png", "not an image", "SKIP_BAD_IMAGES"]),
    "PNG cut to its header": (file(lambda png: png[:20]), ["slice_0.png", "cut short", "SKIP_BAD_IMAGES"]),
    "PNG cut in half": (file(lambda png: png[:len(png) // 2]), ["slice_0.png", "cut short", "SKIP_BAD_IMAGES"]),
    "PNG cut at nine tenths": (file(lambda png: png[:len(png) * 9 // 10]), ["slice_0.png", "cut short"]),
    "PNG with a flipped bit": (file(lambda png: png[:900] + bytes([png[900] ^ 1]) + png[901:]), ["slice_0.png"]),
    "JPEG cut to a tenth": (as_jpeg(0.1), ["slice_0.jpg", "cut short", "SKIP_BAD_IMAGES"]),
    "JPEG cut in half": (as_jpeg(0.5), ["slice_0.jpg", "cut short", "SKIP_BAD_IMAGES"]),
    "JPEG cut near its end": (as_jpeg(0.98), ["slice_0.jpg", "cut short", "SKIP_BAD_IMAGES"]),
    # --- nothing to learn
    "no annotation in train": (no_tumour, ["train", "no tumour pixel", "annotations"]),
    "all polygons outside": (only_outside, ["train", "no tumour pixel", "annotations"]),
}


@pytest.mark.parametrize("mode", ["audit", "training"])
@pytest.mark.parametrize("name", BROKEN)
def test_refuses(name, mode, data, output, capfd):
    damage, words = BROKEN[name]
    damage(data)
    message = refused(capfd, data, output, *["--audit"] * (mode == "audit"))
    assert [word for word in words if word not in message] == []


@pytest.mark.parametrize("name", ["JSON cut short", "JPEG cut in half", "polygon of odd length"])
def test_refuses_as_a_process(name, data, output):
    damage, words = BROKEN[name]
    damage(data)
    before = contents(output)
    result = run_script(*arguments(data, output))
    assert result.returncode == 2
    assert [word for word in words if word not in result.stderr] == []
    assert "Traceback" not in result.stdout + result.stderr
    assert contents(output) == before


def test_a_missing_data_folder_is_named(tmp_path, output, capfd):
    message = refused(capfd, tmp_path / "nowhere", output)
    assert "nowhere" in message and "DATA_DIR" in message


def test_an_unknown_category_is_named_with_the_known_ones(data, output, capfd):
    message = refused(capfd, data, output, "--categories", "tumor", "edema")
    assert "edema" in message and "has only: tumor" in message


def test_a_category_that_removes_every_tumour_is_an_error(data, output, capfd):
    for split in ("train", "valid", "test"):
        edit(lambda coco: coco["categories"].append({"id": 9, "name": "edema"}), split)(data)
    assert "no tumour pixel" in refused(capfd, data, output, "--categories", "edema")


def test_sample_phantoms_are_not_mixed_with_own_images(data, output, capfd):
    edit(lambda coco: coco.update(info={"description": script.SAMPLE_MARK}), "valid")(data)
    message = refused(capfd, data, output)
    assert "valid" in message and "sample phantoms" in message


def test_all_offenders_are_counted_and_ten_are_listed(tmp_path, output, capfd):
    data = write_data(tmp_path / "data", 14, 13, 0, size=64)
    for number in range(13):
        put("annotations", number, "segmentation", [[1, 1, 2]])(data)
    message = refused(capfd, data, output)
    assert "13 problem" in message and "3 more" in message
    assert [f"annotation id {n} " in message for n in range(13)] == [True] * 10 + [False] * 3


def test_all_unreadable_images_of_all_splits_are_counted(tmp_path, output, capfd):
    data = write_data(tmp_path / "data", 8, 6, 0, size=64)
    for split, count in (("train", 7), ("valid", 5)):
        for number in range(count):
            file(lambda _: b"", f"slice_{number}.png", split)(data)
    message = refused(capfd, data, output)
    assert "12 image" in message and "2 more" in message and message.count("the file is empty") == 10


def test_different_problems_of_one_json_come_together(data, output, capfd):
    put("images", 2, "width", 0)(data)
    put("annotations", 0, "segmentation", [[1, 2, 3]])(data)
    put("annotations", 1, "image_id", 99)(data)
    message = refused(capfd, data, output)
    assert "3 problem" in message and "width 0" in message and "x, y pairs" in message and "99" in message


def test_a_name_with_line_breaks_and_chinese_letters_is_reported(data, output, capfd):
    put("images", 0, "file_name", "脑瘤\n1.png")(data)
    assert "missing" in refused(capfd, data, output)


# --- what looks odd and works


def test_a_byte_order_mark_is_accepted(data, output, capfd):
    raw(lambda text: b"\xef\xbb\xbf" + text)(data)
    accepted(capfd, data, output)


def test_a_missing_test_folder_is_said(data, output, capfd):
    shutil.rmtree(data / "test")
    assert "No test folder" in accepted(capfd, data, output)[0]


@pytest.mark.parametrize("name", ["sub/slice_0.png", "sub\\slice_0.png", "./sub/../sub/slice_0.png", "脑瘤 (1).png",
                                  "..dots.png"])
def test_names_inside_the_folder_are_found(name, data, output, capfd):
    place = data / "train" / name.replace("\\", "/")
    (data / "train/sub").mkdir()
    os.replace(data / "train/slice_0.png", place)
    put("images", 0, "file_name", name)(data)
    out, _ = accepted(capfd, data, output)
    assert table(out)["files that the JSON does not name"][0] == "0"


def test_ids_may_be_text_or_zero(data, output, capfd):
    for number in range(3):
        put("images", number, "id", f"scan {number}")(data)
    for number in range(2):
        put("annotations", number, "image_id", f"scan {number}")(data)
    assert table(accepted(capfd, data, output)[0])["annotations"][0] == "2"


def test_sizes_may_be_whole_floats(data, output, capfd):
    put("images", 0, "height", 64.0)(data)
    accepted(capfd, data, output)


@pytest.mark.parametrize("value, area", [
    (RLE, [5]), (RLE | {"counts": COMPRESSED}, [64]), ([[[1, 1], [20, 1], [20, 20]]], range(170, 200)),
], ids=["RLE", "compressed RLE", "points as pairs"])
def test_other_ways_to_write_a_mask_are_read(value, area, data, output, capfd):
    segmentation(value)(data)
    accepted(capfd, data, output)
    mask = script.read_coco(data / "train").records[0].mask()
    assert mask.sum() in area


def test_an_image_without_annotation_is_a_negative(data, output, capfd):
    edit(lambda coco: coco["annotations"].clear(), "valid")(data)
    assert table(accepted(capfd, data, output)[0])["without tumour"] == ["1", "2", "0"]


# --- SKIP_BAD_IMAGES


def test_skipping_lists_the_bad_images_and_goes_on(data, output, capfd):
    file(lambda png: png[:50])(data)
    file(lambda _: None, "slice_1.png", "valid")(data)
    out, err = accepted(capfd, data, output, "--skip-bad-images")
    rows = table(out)
    assert rows["images"] == ["2", "1", "1"] and rows["unreadable images"] == ["1", "1", "0"]
    assert "2 unreadable image" in err and "slice_0.png" in err and "slice_1.png" in err


def test_skipping_does_not_go_on_without_any_image(data, output, capfd):
    for number in range(2):
        file(lambda _: b"", f"slice_{number}.png", "valid")(data)
    assert "no readable image" in refused(capfd, data, output, "--skip-bad-images")


def test_skipping_does_not_hide_a_broken_json(data, output, capfd):
    put("images", 0, "id", 1)(data)
    assert "twice" in refused(capfd, data, output, "--skip-bad-images")


def test_training_with_a_skipped_image_uses_the_others(data, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(script, "plot_samples", lambda *_: None)
    monkeypatch.setattr(script, "plot_history", lambda *_: None)
    file(lambda png: png[:50])(data)
    shutil.rmtree(data / "test")
    assert script.main(arguments(data, tmp_path / "new", "--skip-bad-images")) == 0
    assert "slice_0.png" in capfd.readouterr().err
    record = json.loads((tmp_path / "new/unet_plusplus_best.json").read_text())
    assert record["data_counts"]["train"]["images"] == 2 and record["data_counts"]["train"]["skipped"] == 1


# --- the audit


def table(text):
    """The rows of the audit's table: {label: [value per split]}."""
    rows, columns = {}, None
    for line in text.splitlines():
        words = line.split()
        if words[:1] == ["Data"]:
            columns = len(words) - 1
        elif columns and len(words) > columns:
            rows[" ".join(words[:-columns])] = words[-columns:]
        elif columns and not words:
            break
    return rows


def write_image(path, pixels):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(cv2.imencode(path.suffix, pixels)[1].tobytes())


def audited(tmp_path, capfd, train, valid=(), extra=()):
    """Audit 100x100 images; train and valid: lists of (pixel value, list of segmentations, changes of the entry)."""
    for split, items in {"train": train, "valid": valid or [(9, [[box(10, 10, 30, 30)]], {})]}.items():
        images, annotations = [], []
        for number, (value, segmentations, changes) in enumerate(items):
            write_image(tmp_path / "data" / split / f"{split}_{number}.png", np.full((100, 100), value, np.uint8))
            images.append({"id": number, "file_name": f"{split}_{number}.png", "height": 100, "width": 100} | changes)
            annotations += [{"id": 100 * number + k, "image_id": number, "category_id": 1, "segmentation": item}
                            for k, item in enumerate(segmentations)]
        write_coco(tmp_path / "data" / split, images, annotations)
    for name in extra:
        write_image(tmp_path / "data/train" / name, np.full((100, 100), 1, np.uint8))
    out, _ = accepted(capfd, tmp_path / "data", tmp_path / "out")
    return table(out), out


BOX = [box(20, 20, 40, 40)]  # 16 % of the image


def test_audit_counts(tmp_path, capfd):
    rows, _ = audited(tmp_path, capfd, train=[
        (50, [BOX], {}), (51, [], {}), (52, [[box(10, 10, 10, 10)], [box(50, 50, 10, 20)]], {}),
        (53, [[box(0, 0, 100, 50)]], {}), (54, [], {})], valid=[(60, [BOX], {}), (61, [], {})])
    assert rows["images"] == ["5", "2"]
    assert rows["unreadable images"] == ["0", "0"]
    assert rows["annotations"] == ["4", "1"]
    assert rows["without tumour"] == ["2", "1"]
    assert rows["several tumours"] == ["1", "0"]
    assert [float(rows[f"{word} tumour, % of image"][0]) for word in ("smallest", "median", "largest")] == [3, 16, 50]
    assert rows["files that the JSON does not name"] == ["0", "0"]


def test_audit_counts_files_that_no_entry_names(tmp_path, capfd):
    rows, _ = audited(tmp_path, capfd, [(50, [BOX], {})], extra=["forgotten.png", "sub/FORGOTTEN.PNG", "x.JPG"])
    assert rows["files that the JSON does not name"] == ["3", "0"]


def test_audit_finds_the_same_picture_within_and_across_splits(tmp_path, capfd):
    _, out = audited(tmp_path, capfd, [(50, [BOX], {}), (50, [BOX], {}), (51, [BOX], {})],
                     [(51, [BOX], {}), (52, [], {})])
    lines = [line for line in out.splitlines() if "same picture" in line][::-1]  # across splits first
    assert len(lines) == 2
    assert "train/train_1.png" in lines[0] and "train/train_0.png" in lines[0] and "two splits" not in lines[0]
    assert "valid/valid_0.png" in lines[1] and "train/train_2.png" in lines[1] and "two splits" in lines[1]


def test_audit_finds_the_same_picture_in_another_file_format(tmp_path, capfd):
    data = write_data(tmp_path / "data", 3, 2, 0, size=64)
    pixels = cv2.imread(str(data / "train/slice_0.png"))
    write_image(data / "valid/copy.bmp", pixels)
    put("images", 0, "file_name", "copy.bmp", "valid")(data)
    out, _ = accepted(capfd, data, tmp_path / "out")
    assert any("copy.bmp" in line and "train/slice_0.png" in line for line in out.splitlines())


@pytest.mark.parametrize("segmentations, changes, words", [
    ([BOX], {"height": 50}, ["100x50", "differs"]),
    ([[box(60, 60, 60, 20)]], {}, ["annotation id 0", "outside the image"]),
    ([[box(-30, -30, 60, 60)]], {}, ["annotation id 0", "outside the image"]),
    ([[[10, 10, 50, 50]], BOX], {}, ["annotation id 0", "fewer than three points"]),
    ([[[]], BOX], {}, ["annotation id 0", "fewer than three points"]),
    ([[[10, 10, 50, 50, 90, 90]], BOX], {}, ["annotation id 0", "without area"]),
    ([[[10, 10, 10, 10, 10, 10]], BOX], {}, ["annotation id 0", "without area"]),
    ([[box(50, 50, 2, 2)]], {}, ["4 pixels"]),
    ([[box(50, 50, 1, 1)]], {}, ["disappears at IMG_SIZE 64"]),
], ids=["JSON size differs", "outside right", "outside left", "two points", "no points", "a line", "a point", "tiny",
        "vanishes"])
def test_audit_remarks(segmentations, changes, words, tmp_path, capfd):
    clean, out = audited(tmp_path / "clean", capfd, [(50, [BOX], {}), (51, [BOX], {})])
    assert "Worth a look" not in out
    _, out = audited(tmp_path / "odd", capfd, [(50, segmentations, changes), (51, [BOX], {})])
    assert any(all(word in line for word in [*words, "train/train_0.png"]) for line in out.splitlines())


def test_a_polygon_on_the_border_is_not_outside(tmp_path, capfd):
    _, out = audited(tmp_path, capfd, [(50, [[box(0, 0, 100, 100)]], {})])
    assert "outside" not in out


def test_leakage_is_shown_even_among_many_other_remarks(tmp_path, capfd):
    many = [(50 + n, [[box(60, 60, 60, 20)]], {}) for n in range(30)]
    _, out = audited(tmp_path, capfd, many, [(50, [BOX], {})])
    assert "two splits" in out


def test_the_audit_writes_nothing(data, output, capfd):
    before, inputs = contents(output), contents(data)
    accepted(capfd, data, output)
    assert contents(output) == before and contents(data) == inputs


# --- one random damage after another


def random_damage(rng, root):
    """Break one thing at a random place of a data folder."""
    split = root / rng.choice(["train", "valid", "test"])
    path = split / JSON
    kind = rng.integers(5)
    if kind == 0:  # an image file
        image = split / "slice_0.png"
        content = image.read_bytes()
        cut = int(rng.integers(len(content)))
        image.write_bytes(content[:cut] + bytes(rng.integers(0, 256, int(rng.integers(4)), np.uint8)))
    elif kind == 1:  # bytes of the JSON
        content = bytearray(path.read_bytes())
        for _ in range(int(rng.integers(1, 4))):
            content[rng.integers(len(content))] = int(rng.integers(256))
        path.write_bytes(content)
    else:  # a value somewhere inside the JSON
        coco = json.loads(path.read_text(encoding="utf-8"))
        odd = [None, True, -1, 0, 0.5, float("nan"), 1e308, 10**30, "", "x", "../x", [], {}, [[]], [None], {"a": 1}]
        place = coco
        while isinstance(place, (list, dict)) and place:
            key = rng.choice(list(place)) if isinstance(place, dict) else int(rng.integers(len(place)))
            if not isinstance(place[key], (list, dict)) or rng.random() < 0.2:
                if rng.random() < 0.2:
                    del place[key]
                else:
                    place[key] = copy.deepcopy(odd[rng.integers(len(odd))])
                break
            place = place[key]
        path.write_text(json.dumps(coco), encoding="utf-8")


def check_random_damage(seed, root, capfd):
    """The audit of randomly damaged data ends with 0 or 2, says why, and never with a stack trace."""
    rng = np.random.default_rng(seed)
    data = write_data(root / str(seed), 3, 2, 1, size=64)
    for _ in range(int(rng.integers(1, 3))):
        if all((data / split / JSON).is_file() for split in ("train", "valid", "test")):
            try:
                random_damage(rng, data)
            except (ValueError, UnicodeDecodeError):  # the JSON is unreadable already
                pass
    code = script.main(arguments(data, root / "out", "--audit"))
    out, err = capfd.readouterr()
    shutil.rmtree(data)
    assert code in (0, 2), (seed, out, err)
    assert (code == 2) == ("error: " in err), (seed, err)
    return code


def test_random_damage_never_ends_in_a_stack_trace(tmp_path, capfd):
    codes = [check_random_damage(seed, tmp_path, capfd) for seed in range(40)]
    assert codes.count(2) > 10


@pytest.mark.soak
def test_300_random_damages(tmp_path, capfd):
    codes = [check_random_damage(seed, tmp_path, capfd) for seed in range(1000, 1300)]
    print(f"300 damaged data sets: {codes.count(2)} refused, {codes.count(0)} usable all the same, no stack trace")
    assert codes.count(2) > 100
