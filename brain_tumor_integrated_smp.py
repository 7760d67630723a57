"""Brain-tumour segmentation: UNet++ with a ResNet34 encoder, trained on a folder of MRI slices with COCO polygons.

    python brain_tumor_integrated_smp.py                                   train with the constants below
    python brain_tumor_integrated_smp.py --img-size 128 --epochs 5         any constant, without editing
    python brain_tumor_integrated_smp.py --resume                          go on with an interrupted run
    python brain_tumor_integrated_smp.py --audit                           check the data and stop
    python brain_tumor_integrated_smp.py --evaluate                        threshold and test scores of the best model
    python brain_tumor_integrated_smp.py --predict scan.png folder/        masks and overlays for new images
    torchrun --nproc-per-node=2 brain_tumor_integrated_smp.py              two GPUs (on Linux), nothing to edit

The data folder holds train/, valid/ and, if there is one, test/, each with its images and `_annotations.coco.json`.
For other code: `from brain_tumor_integrated_smp import load_model, predict_mask`. Importing does nothing else.
Measured results, with command, hardware and versions, stand in README.md. The file follows the data: images and masks,
checks and cache, augmentation and batches, model, losses, metrics, the training step, the epochs, checkpoints,
evaluation and prediction, pictures. Plumbing (flags, machine, processes, messages, files) comes last; of it, say(),
warn(), progress(), gather() (between processes) and TrainerError are used everywhere.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import csv
import ctypes
import errno
import functools
import gc
import hashlib
import io
import itertools
import json
import math
import multiprocessing
import os
import platform
import random
import re
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace as Settings  # the constants below as attributes of one object, called cfg

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # otherwise the import looks for a newer version on the network

import albumentations as A
import cv2
import matplotlib
import numpy as np
import pycocotools.mask as coco_mask
import segmentation_models_pytorch as smp
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from matplotlib.figure import Figure
from tqdm import tqdm

# ===== Settings: edit them here, or override any of them on the command line (IMG_SIZE = 256 is --img-size 256) =======

# --- data and output
DATA_DIR = str(Path(__file__).resolve().parent)  # folder that holds train/, valid/ and (optional) test/
OUTPUT_DIR = str(Path(__file__).resolve().parent)  # folder for checkpoints, tables and pictures; one run at a time
CATEGORIES = ()  # names of the COCO categories that count as tumour; empty: all of them
SKIP_BAD_IMAGES = False  # True: go on without unreadable images (they are listed) instead of stopping
CACHE_GB = 8.0  # GB; decoded images are kept in a temporary file during a run if they fit; 0: decode every time

# --- images and loading
IMG_SIZE = 256  # pixels, a multiple of 32, at least 64; the network sees squares of this size
BATCH_SIZE = 8  # images per forward pass, over all GPUs together, at least 1; smaller if memory runs out
NUM_WORKERS = 4  # processes that augment images, 0 or more (0: none); never more than the available cores
MEAN = (0.485, 0.456, 0.406)  # per-channel mean of RGB values in 0..1 (ImageNet's, as the encoder expects)
STD = (0.229, 0.224, 0.225)  # per-channel standard deviation, likewise

# --- model
ARCHITECTURE = "unetplusplus"  # a name that smp.create_model knows
ENCODER = "resnet34"  # any encoder name of segmentation_models_pytorch that the architecture accepts
ENCODER_WEIGHTS = "imagenet"  # "imagenet" (downloaded), None (random start), or a local weights file
INIT_WEIGHTS = None  # a .pth of this script to start from (staged training), or None

# --- optimisation
EPOCHS = 80  # passes over the training set, at least 1
LR = 1e-4  # learning rate of AdamW for pretrained weights, after the warm-up, more than 0
LR_RANDOM_START = 5e-4  # for weights that start at random: the decoder's, perhaps the encoder's too; --lr sets both
WARMUP_STEPS = 20  # optimizer steps over which the learning rate grows to its value, 0: none
WEIGHT_DECAY = 1e-2  # AdamW's decoupled weight decay, 0 or more
LOSS = "dice_bce"  # a name in LOSSES; "focal_tversky" favours finding all of a tumour
ACCUMULATION_STEPS = 1  # batches per optimizer step, at least 1; raise it when BATCH_SIZE has to be small
GRAD_CLIP = 1.0  # largest gradient norm, 0: no clipping
AVERAGE_EPOCHS = 1.0  # validated and saved is the moving average of the weights over about so many epochs; 0: none
PLATEAU_FACTOR = 0.5  # the learning rate is multiplied by this when validation Dice stalls, between 0 and 1
PLATEAU_PATIENCE = 10  # epochs without a better validation Dice before that happens
EARLY_STOPPING = 25  # epochs without a better validation Dice before training ends, 0: never
SEED = 42  # 0 or more; weights, order and augmentation follow from it

# --- prediction
TEST_TIME_AUGMENTATION = False  # True: the mean over an image and its mirror image, at twice the cost

# --- machine
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # "cuda", "cuda:1", "cpu"
PRECISION = "auto"  # "auto" (float16 on CUDA, bfloat16 on CPUs that have it), "float32", "bfloat16", "float16"
COMPILE = False  # True: torch.compile the model (a long first epoch)
DETERMINISTIC = False  # True: slower, but repeatable to the last bit on one GPU

# All settings above, in this order. One that you add is a flag and part of the record, and has to be the same when a
# run is resumed (see RESUME_MAY_CHANGE); the code that needs it gets it as cfg.NAME or as an argument.
CONSTANTS = tuple(name for name in globals() if name.isupper() and len(name) > 1)

# ===== Images and masks ===============================================================================================


def read_image(path: str | Path, height: int | None = None, width: int | None = None) -> np.ndarray:
    """Read any common image file as RGB uint8 [H, W, 3], values 0..255.

    Grey and palette images become RGB, transparency is dropped, and 16-bit images are scaled from their own
    minimum..maximum to 0..255. An EXIF orientation is applied, unless only the unturned picture has the given
    height and width (pixels): then the annotation tool did not turn it either.
    Raises TrainerError when the file is missing, empty or damaged.
    """
    try:
        data = np.fromfile(path, np.uint8)  # cv2.imread returns None for non-ASCII paths on Windows
    except FileNotFoundError:
        raise TrainerError(f"{path}: the file is missing") from None
    except (OSError, ValueError) as error:  # no access, a name that is too long or that the system cannot write
        raise TrainerError(f"{path}: {error}") from None
    flags, image = cv2.IMREAD_COLOR | cv2.IMREAD_ANYDEPTH, None
    with contextlib.suppress(cv2.error):  # most damaged files give None, some this error
        image = cv2.imdecode(data, flags) if data.size else None
        if image is not None and height and image.shape[:2] != (height, width):
            unturned = cv2.imdecode(data, flags | cv2.IMREAD_IGNORE_ORIENTATION)
            image = unturned if unturned.shape[:2] == (height, width) else image
    # OpenCV 4 fills up a JPEG that is cut short with grey: an end mark has to follow the last scan.
    if data[:2].tobytes() == b"\xff\xd8" and b"\xff\xd9" not in data.tobytes().rpartition(b"\xff\xda")[2]:
        image = None
    if image is None:
        raise TrainerError(f"{path}: {'not an image, or cut short' if data.size else 'empty'} ({data.size} bytes)")
    if image.dtype != np.uint8:
        image = cv2.normalize(image, None, 0, 255, cv2.NORM_MINMAX, cv2.CV_8U)
    return np.ascontiguousarray(image[..., ::-1])


def resize(array: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resize [H, W] or [H, W, C] without aliasing: averages areas where it shrinks, interpolates where it enlarges."""
    small = (min(width, array.shape[1]), min(height, array.shape[0]))
    if small != array.shape[1::-1]:
        array = cv2.resize(array, small, interpolation=cv2.INTER_AREA)
    return array if small == (width, height) else cv2.resize(array, (width, height), interpolation=cv2.INTER_LINEAR)


def resize_mask(mask: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resize a uint8 0/1 mask [H, W]: a pixel counts if at least half of it is tumour. Centred, unlike NEAREST."""
    return (resize(255 * mask, height, width) >= 128).astype(np.uint8)  # in bytes: a float mask is four times as large


@dataclass
class Record:
    """One image of a split with its merged mask."""

    number: int  # position in the JSON's list of images; augmentation depends on it
    path: str
    file_name: str  # as in the JSON
    height: int  # pixels, of the annotation's coordinate system
    width: int
    rles: list[dict] = field(default_factory=list)  # its annotations that have an area, as compressed COCO RLEs
    remarks: list[str] = field(default_factory=list)  # what is suspicious about it
    # Found by scan():
    slot: int = -1  # its place in the cache
    error: str = ""  # why it cannot be read
    digest: str = ""  # of its pixels
    mask_digest: str = ""
    share: float = 0.0  # of the image that is tumour
    thumbnail: np.ndarray | None = None  # float32 [1024]: grey 32x32, mean 0, length 1

    def mask(self) -> np.ndarray:
        """The union of its annotations: uint8 [height, width], 0 or 1."""
        if not self.rles:
            return np.zeros((self.height, self.width), np.uint8)
        return np.ascontiguousarray(coco_mask.decode(coco_mask.merge(self.rles)))


def load_sample(record: Record, img_size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Decode, rasterise and resize one image: the deterministic part, before any augmentation.

    Returns (RGB uint8 [S, S, 3], mask uint8 0/1 [S, S], RGB uint8 [H, W, 3] as in the file).
    """
    image = read_image(record.path, record.height, record.width)
    return resize(image, img_size, img_size), resize_mask(record.mask(), img_size, img_size), image


# ===== Annotations ====================================================================================================

ANNOTATION_FILE = "_annotations.coco.json"
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp"}
LARGEST_SIDE = 10_000  # pixels; a larger size in a JSON is a mistake that would only exhaust the memory
FEW_PIXELS = 25  # a mask with fewer is worth a look: tools leave such specks behind
SAMPLE_MARK = "sample data of brain_tumor_integrated_smp.py"  # in the JSON of the phantoms that come with the script


@dataclass
class Split:
    """A split as its JSON describes it, and what prepare_data() adds."""

    records: list[Record]
    annotations: int  # that count, see CATEGORIES
    unnamed: int  # image files that no entry names
    is_sample: bool  # made by this project
    skipped: int = 0  # images that cannot be read
    like_train: int = 0  # images that look like one in train


def run_lengths(counts: str) -> list[int]:
    """Run lengths from the text of a compressed COCO RLE: 5 bits a letter, from the fourth run on as differences.

    pycocotools decodes a text that is cut short, or too long, without a word: only the sum of the runs tells.
    """
    runs, value, shift = [], 0, 0
    for letter in counts:
        code = ord(letter) - 48
        if not 0 <= code < 64 or shift > 60:
            raise ValueError("its RLE has letters that do not belong there")
        value, shift = value | (code & 31) << shift, shift + 5
        if code < 32:  # the last letter of a number, with its sign in bit 4
            value -= (code & 16) << shift - 4
            runs.append(value + runs[-2] if len(runs) > 2 else value)
            value = shift = 0
    if shift:
        raise ValueError("its RLE is cut short")
    return runs


def segmentation_to_rle(segmentation, height: int, width: int) -> tuple[dict | None, list[str]]:
    """Rasterise one COCO segmentation with pycocotools.

    segmentation: a list of polygons [x1, y1, x2, y2, ...] in pixels, or an RLE dict, compressed or not.
    Returns (compressed RLE of the union, or None if nothing is left; remarks about what is suspicious).
    Raises ValueError when it is no segmentation at all.
    """
    if isinstance(segmentation, dict):
        counts = segmentation.get("counts")
        if segmentation.get("size") != [height, width]:
            raise ValueError(f"its RLE has the size {segmentation.get('size')}, its image {[height, width]}")
        runs = run_lengths(counts) if isinstance(counts, str) else counts
        if not isinstance(runs, list) or any(type(n) is not int or n < 0 for n in runs) or sum(runs) != height * width:
            raise ValueError("the counts of its RLE do not add up to height times width")
        # Drawn and encoded again: with runs of no pixel, which are correct, pycocotools merges to garbage.
        mask = np.repeat(np.arange(len(runs)) % 2 > 0, runs).reshape(width, height).T
        return coco_mask.encode(np.asfortranarray(mask, np.uint8)), []
    if not isinstance(segmentation, list) or not segmentation:
        raise ValueError("it has no segmentation, only a box perhaps: export the data as 'COCO Segmentation'")
    polygons, remarks = [], []
    for polygon in segmentation:
        try:
            xy = np.asarray(polygon, np.float64)
            xy = xy.reshape(-1, 2) if xy.ndim < 2 else xy.reshape(len(xy), 2)
        except (ValueError, TypeError):
            raise ValueError("a polygon is not a list of x, y pairs") from None
        if not np.isfinite(xy).all():
            raise ValueError("a polygon has coordinates that are not finite")
        if len(xy) < 3:
            remarks.append("polygon with fewer than three points (ignored)")
            continue
        if cv2.contourArea((xy - xy[0]).astype(np.float32)) == 0:
            remarks.append("polygon without area")
        if (xy < -0.5).any() or (xy > (width + 0.5, height + 0.5)).any():
            remarks.append("polygon outside the image (clipped)")
        # pycocotools clips by itself, but its memory grows with the distance: keep that bounded.
        far = 4 * max(height, width)
        polygons.append(np.clip(xy, -far, 2 * far).ravel().tolist())
    return (coco_mask.merge(coco_mask.frPyObjects(polygons, height, width)) if polygons else None), remarks


def read_coco(split_dir: str | Path, categories: tuple = ()) -> Split:
    """Read the `_annotations.coco.json` of a split, with all checks that need no pixels.

    categories: names of the categories that count as tumour; empty: all.
    Raises TrainerError, naming all offenders, when the folder or the JSON cannot be used.
    """
    split_dir, json_path = Path(split_dir), Path(split_dir) / ANNOTATION_FILE
    if not json_path.is_file():
        missing = f"file not found: {json_path}" if split_dir.is_dir() else f"folder not found: {split_dir}"
        raise TrainerError(f"{missing}; the data folder (DATA_DIR or --data-dir) must hold train/ and "
                           f"valid/, each with its images and one {ANNOTATION_FILE}, as a 'COCO Segmentation' export")
    try:
        coco = json.loads(json_path.read_bytes().decode("utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise TrainerError(f"{json_path} is not valid JSON in UTF-8 ({error}); export or copy it again") from None
    for key in ("images", "annotations", "categories"):
        entries = coco.get(key) if isinstance(coco, dict) else None
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise TrainerError(f"{json_path} is not a COCO file: it has no list of '{key}'; export the data in the "
                               "format 'COCO Segmentation'")
    if not coco["images"]:
        raise TrainerError(f"{json_path} lists no images; export the data again, or take the folder out")
    names = {str(entry.get("id")): str(entry.get("name")) for entry in coco["categories"]}
    if unknown := sorted(set(categories) - set(names.values())):
        raise TrainerError(f"CATEGORIES names {', '.join(unknown)}, but {json_path} has only: "
                           f"{', '.join(sorted(set(names.values())))}")
    records, problems = read_image_entries(coco["images"], split_dir)
    listed_ids, counted = {str(entry.get("id")) for entry in coco["images"]}, 0
    for entry in coco["annotations"]:
        label, record = f"annotation id {entry.get('id')}", records.get(str(entry.get("image_id")))
        if str(entry.get("image_id")) not in listed_ids:
            problems.append(f"{label} belongs to the image id {entry.get('image_id')}, which the file does not list")
        if record is None or categories and names.get(str(entry.get("category_id"))) not in categories:
            continue
        counted += 1
        try:
            rle, remarks = segmentation_to_rle(entry.get("segmentation"), record.height, record.width)
        except (ValueError, TypeError, OverflowError) as error:
            problems.append(f"{label} of {record.file_name}: {error}")
            continue
        pixels = int(coco_mask.area(rle)) if rle is not None else 0
        if rle is not None and pixels < FEW_PIXELS:
            remarks.append(f"the mask has only {pixels} pixels")
        record.remarks += [f"{label}: {remark}" for remark in remarks]
        record.rles += [rle] if pixels else []
    if problems:
        raise TrainerError(f"{json_path} cannot be used, {len(problems)} problem(s):{listed(problems)}\n"
                           "Correct the file, or export it again.")
    paths = {os.path.normcase(record.path) for record in records.values()}
    unnamed = sum(path.suffix.lower() in IMAGE_SUFFIXES and os.path.normcase(path) not in paths
                  for path in split_dir.rglob("*"))
    return Split(list(records.values()), counted, unnamed, SAMPLE_MARK in str(coco.get("info")))


def read_image_entries(entries: list[dict], split_dir: Path) -> tuple[dict[str, Record], list[str]]:
    """The list of images in a COCO file. Returns (records by image id, what is wrong as sentences)."""
    records, problems = {}, []
    for number, entry in enumerate(entries):
        key, name, size = str(entry.get("id")), entry.get("file_name"), (entry.get("height"), entry.get("width"))
        inside = os.path.normpath(str(name).replace("\\", "/"))  # some tools on Windows write back-slashes
        if entry.get("id") is None or not isinstance(name, str) or not name:
            problems.append(f"image entry {number} has no id or no file_name")
        elif os.path.isabs(inside) or Path(inside).parts[:1] == ("..",) or inside[1:2] == ":" or "\0" in inside:
            problems.append(f"image id {key}: the file name {name!r} points outside its folder")
        elif not all(type(side) in (int, float) and 1 <= side <= LARGEST_SIDE and side % 1 == 0 for side in size):
            problems.append(f"{name}: height {size[0]!r} and width {size[1]!r} must be whole numbers from 1 to "
                            f"{LARGEST_SIDE} (pixels)")
        elif key in records:
            problems.append(f"image id {key} is used twice: {records[key].file_name} and {name}")
        else:
            records[key] = Record(number, str(split_dir / inside), name, int(size[0]), int(size[1]))
    uses = Counter(os.path.normcase(record.path) for record in records.values())
    return records, problems + [f"{Path(path).name} is listed as two images" for path in uses if uses[path] > 1]


# ===== One pass over all files: audit and cache =======================================================================

ALIKE = 0.95  # correlation of two thumbnails; in the public data mostly slices at most three numbers apart
LIKE_TRAIN = "{} of {} {} images look like an image in train: scores are too good for new patients"


@dataclass
class PixelCache:
    """Decoded and resized images of a run: uint8 [S, S, 4] (RGB and mask) each, one after the other in a file.

    All workers and processes of a machine map the same file, so the pixels exist once, under every start method and
    without /dev/shm. Its name follows from the folder of the run, which one run holds at a time: what a killed run has
    left, the next one replaces.
    """

    path: Path
    img_size: int

    def pixels(self, slot: int, mode: str = "r") -> np.ndarray:
        """The place of one image, mapped for reading, or with "r+" for writing."""
        shape = (self.img_size, self.img_size, 4)
        return np.memmap(self.path, np.uint8, mode, slot * math.prod(shape), shape)


def cache_path(run_folder: Path) -> Path:
    """Where the cache of a run lies."""
    name = hashlib.sha256(str(run_folder.resolve()).encode(errors="replace")).hexdigest()[:16]
    return Path(tempfile.gettempdir()) / f"brain_tumor_cache_{name}.bin"


def remove_cache(run_folder: Path) -> None:
    """Where the system refuses, the next run does it."""
    with contextlib.suppress(OSError):
        cache_path(run_folder).unlink(missing_ok=True)


def open_cache(cfg: Settings, run_folder: Path, count: int) -> PixelCache | None:
    """A cache for count images, or None, said, when it is switched off, too large or finds no room."""
    path, size = cache_path(run_folder), count * cfg.IMG_SIZE**2 * 4
    remove_cache(run_folder)  # of a killed run
    try:
        if size <= 1e9 * cfg.CACHE_GB and size < 0.9 * shutil.disk_usage(path.parent).free:
            with open(path, "xb") as file:
                if hasattr(os, "posix_fallocate"):  # a sparse file on a full disk would end in a bus error later
                    os.posix_fallocate(file.fileno(), 0, size)
                file.truncate(size)
            return PixelCache(path, cfg.IMG_SIZE)
        reason = f"they need {size / 1e9:.1f} GB, CACHE_GB allows {cfg.CACHE_GB:g}, {path.parent} may be full"
    except OSError as error:
        reason = str(error)
        remove_cache(run_folder)
    say(f"Images are decoded again in every epoch, which is slower: no room to keep them ({reason}).\n"
        "The environment variable TMPDIR (on Windows TEMP) names another folder for them.")
    return None


def scan(record: Record, img_size: int, cache: PixelCache | None) -> None:
    """Read one image file once: fill its cache slot and note what is found. A damaged file is noted, not raised."""
    try:
        image, mask, full = load_sample(record, img_size)
    except TrainerError as error:
        record.error = str(error)
        return
    if cache is not None:
        cache.pixels(record.slot, "r+")[:] = np.dstack([image, mask])
    truth = record.mask()
    record.digest = hashlib.sha256(repr(full.shape).encode() + full.data).hexdigest()
    record.mask_digest, record.share = hashlib.sha256(truth.data).hexdigest(), float(truth.mean())
    if truth.any() and not mask.any():
        record.remarks.append(f"the tumour disappears at IMG_SIZE {img_size}")
    if full.shape[:2] != truth.shape:
        record.remarks.append(f"the JSON says {record.width}x{record.height} pixels, the file differs (the mask is "
                              "stretched with the image)")
    small = resize(cv2.cvtColor(full, cv2.COLOR_RGB2GRAY), 32, 32).astype(np.float32).ravel()
    small -= small.mean()
    record.thumbnail = small / max(float(np.linalg.norm(small)), 1e-6)


def prepare_data(cfg: Settings, names: list[str], run_folder: Path | None = None) -> tuple[dict, PixelCache | None]:
    """Read, check and cache the splits, print the audit, and stop at bad data.

    names: of the splits; "test" may be missing on disk, and is left out then. run_folder: held by this run; None: no
    cache. Returns (splits by name, cache or None). The caller removes the cache. Raises TrainerError.
    """
    folder = {name: Path(cfg.DATA_DIR) / name for name in names}
    if "test" in names and not folder["test"].is_dir():
        say(f"No test folder ({folder.pop('test')}): the score on test is left out.")
    splits = {name: read_coco(path, cfg.CATEGORIES) for name, path in folder.items()}
    phantoms = [str(folder[name]) for name, split in splits.items() if split.is_sample]
    if 0 < len(phantoms) < len(splits):
        raise TrainerError(f"the sample phantoms are still in {', '.join(phantoms)}, but not in the other folders; put "
                           "your own images there (a test folder may also be removed)")
    records = [record for split in splits.values() for record in split.records]
    for slot, record in enumerate(records):
        record.slot = slot
    cache = open_cache(cfg, run_folder, len(records)) if run_folder else None
    in_threads(functools.partial(scan, img_size=cfg.IMG_SIZE, cache=cache), records, "Reading images")
    bad = [record.error for record in records if record.error]
    for split in splits.values():
        good = [record for record in split.records if not record.error]
        split.skipped, split.records = len(split.records) - len(good), good
    print_audit(splits)
    if bad and not cfg.SKIP_BAD_IMAGES:
        raise TrainerError(f"{len(bad)} image(s) cannot be read:{listed(bad)}\nRepair or remove them, or set "
                           "SKIP_BAD_IMAGES = True (--skip-bad-images) to go on without them.")
    if bad:
        warn(f"going on without {len(bad)} unreadable image(s):{listed(bad)}")
    for name, split in splits.items():
        if not split.records or name == "train" and not any(record.share for record in split.records):
            missing = "tumour pixel" if split.records else "readable image"
            raise TrainerError(f"{folder[name]} has no {missing} at all; check images, annotations and CATEGORIES")
        if name == "train" and len(split.records) < world_size():
            raise TrainerError("there are fewer training images than processes")
    return splits, cache


def print_audit(splits: dict[str, Split]) -> None:
    """Print the table of what the splits hold, and below it what is suspicious. Sets like_train of the splits."""
    columns, remarks, first_seen = [], find_neighbours(splits), {}
    rles = [rle for split in splits.values() for record in split.records for rle in record.rles]
    boxes = sum(int(coco_mask.area(rle)) == round(float(np.prod(coco_mask.toBbox(rle)[2:]))) for rle in rles)
    if rles and boxes >= 0.95 * len(rles):
        remarks.append(f"{boxes} of {len(rles)} annotations are upright boxes: a model will learn boxes, not outlines")
    for name, split in splits.items():
        shares = [100 * record.share for record in split.records if record.share] or [math.nan]
        columns.append({
            "Data": name, "images": len(split.records), "unreadable images": split.skipped,
            "annotations": split.annotations,
            "without tumour": sum(not record.share for record in split.records),
            "several tumours": sum(len(record.rles) > 1 for record in split.records),
            "smallest tumour, % of image": f"{min(shares):.3f}",
            "median tumour, % of image": f"{np.median(shares):.3f}",
            "largest tumour, % of image": f"{max(shares):.3f}",
            "files that the JSON does not name": split.unnamed})
        for record in split.records:
            label = f"{name}/{record.file_name}"
            remarks += [f"{label}: {remark}" for remark in record.remarks]
            record.thumbnail = None  # has served; not to be sent to workers
            split_of_first, first = first_seen.setdefault(record.digest, (name, label))
            if first != label:
                leak = " (the same picture in two splits makes scores too good)" if split_of_first != name else ""
                remarks.insert(0 if leak else len(remarks), f"{label}: same picture as {first}{leak}")
    say("\n" + "\n".join(row.ljust(35) + "".join(f"{column[row]!s:>10}" for column in columns) for row in columns[0]))
    say(f"\nWorth a look, {len(remarks)} remark(s):{listed(remarks)}\n" if remarks else "")


def find_neighbours(splits: dict[str, Split]) -> list[str]:
    """Count images of valid and test that look like one in train, mostly neighbouring slices. Returns remarks."""
    remarks, train = [], splits["train"].records if "train" in splits else []
    for name, split in splits.items():
        if name == "train" or not train or not split.records:
            continue
        # Thumbnails have mean 0 and length 1: their products are correlations.
        own, others = (np.stack([record.thumbnail for record in records]) for records in (split.records, train))
        alike = own @ others.T
        best = alike.max(axis=1)
        split.like_train = int((best > ALIKE).sum())
        closest = [f"{split.records[i].file_name} and {train[alike[i].argmax()].file_name}"
                   for i in np.argsort(-best, kind="stable")[:min(3, split.like_train)]]
        if closest:
            remarks.append(f"{LIKE_TRAIN.format(split.like_train, len(split.records), name)}; most alike: "
                           + "; ".join(closest))
    return remarks


def fingerprint(splits: dict[str, Split]) -> str:
    """A digest of the pixels and masks of train and valid: the same data, wherever it lies."""
    content = [(name, record.number, record.digest, record.mask_digest) for name in ("train", "valid")
               for record in splits[name].records]
    return hashlib.sha256(repr(content).encode()).hexdigest()


# ===== Augmentation, dataset, batches =================================================================================


def build_transform(train: bool, normalize: bool = True, mean: tuple = MEAN, std: tuple = STD) -> A.Compose:
    """The Albumentations pipeline for RGB uint8 [S, S, 3] images and uint8 0/1 [S, S] masks.

    train: random flips, turns, warps and intensities; otherwise none.
    normalize: end in normalised float32 [3, S, S] and mask [S, S] tensors; otherwise the arrays stay uint8, which are
    a quarter of the bytes, and to_input() normalises on the device.
    """
    steps = []
    if train:
        steps = [
            A.HorizontalFlip(p=0.5),
            # Scanners deliver one orientation: others, where frequent, cost a short training three points of Dice.
            A.VerticalFlip(p=0.05),
            A.RandomRotate90(p=0.05),
            # A tuple is a range: (0.1, 0.1) would shift every image by exactly +10 %.
            A.Affine(scale=(0.9, 1.1), translate_percent=(-0.1, 0.1), rotate=(-15, 15), p=0.5),
            A.ElasticTransform(alpha=60, sigma=6, p=0.1),  # moves pixels by up to 5; the defaults move nothing
            A.GridDistortion(p=0.1),
            A.RandomBrightnessContrast(p=0.3),
            A.ColorJitter(p=0.3),  # on grey images: brightness and contrast only
            A.GaussNoise(std_range=(0.012, 0.028), p=0.2),  # 3 to 7 of 255; the defaults drown a tumour
        ]
    if normalize:
        steps += [A.Normalize(mean=mean, std=std), A.ToTensorV2()]
    return A.Compose(steps)


class BrainTumorDataset(torch.utils.data.Dataset):
    """Images and masks of one split folder, resized to a square, then augmented.

    Item: (image, mask). With normalize=True float32 tensors [3, S, S] (normalised) and [1, S, S] (0.0 or 1.0); with
    normalize=False uint8 arrays [S, S, 3] (0..255) and [S, S] (0 or 1), as the loaders of this script send them.
    An item is asked for by index, or by (epoch, index): the augmentation is a pure function of seed, epoch and image,
    whatever the number of workers, their start method, or a restart.
    Everything a worker needs is an attribute: nothing is read from the constants after construction.
    """

    def __init__(self, split_dir: str | Path, img_size: int = IMG_SIZE, train: bool = False, seed: int = SEED,
                 normalize: bool = True, categories: tuple = CATEGORIES, mean: tuple = MEAN, std: tuple = STD,
                 records: list[Record] | None = None, cache: PixelCache | None = None):
        """records and cache: of a split that prepare_data() has checked; without them the JSON is read here.

        Raises TrainerError when the split cannot be used.
        """
        self.records = read_coco(split_dir, categories).records if records is None else records
        self.img_size, self.seed, self.normalize, self.cache = img_size, seed, normalize, cache
        self.transform = build_transform(train, normalize, mean, std)

    def __len__(self) -> int:
        return len(self.records)

    def sample(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """The resized, not augmented image: RGB uint8 [S, S, 3] and mask uint8 0/1 [S, S]."""
        if self.cache is None:
            return load_sample(self.records[index], self.img_size)[:2]
        pixels = self.cache.pixels(self.records[index].slot)
        return cv2.cvtColor(pixels, cv2.COLOR_RGBA2RGB), cv2.extractChannel(pixels, 3)  # copies, and fast ones

    def __getitem__(self, key: int | tuple[int, int]):
        epoch, index = key if isinstance(key, tuple) else (0, key)
        image, mask = self.sample(index)
        # One generator for the whole pipeline, its state set per item: reseeding each transform with the same
        # number would make them all fire together, and workers would otherwise repeat each other's draws.
        generator = np.random.default_rng([self.seed, epoch, self.records[index].number])
        self.transform.set_random_state(generator, random.Random(int(generator.integers(2**63))))
        out = self.transform(image=image, mask=mask)
        return (out["image"], out["mask"][None].float()) if self.normalize else (out["image"], out["mask"])


class EvenBatches(torch.utils.data.Sampler):
    """Batches of (epoch, index) keys, as many as needed and of sizes that differ by one image at most.

    So there is no tiny last batch, whose BatchNorm statistics would be noise, and no image is left out or repeated.
    With several processes each gets its part of every batch; nothing is padded.
    """

    def __init__(self, count: int, batch_size: int, shuffle: bool, seed: int = 0):
        """count: images; batch_size: the most images in a batch, over all processes."""
        self.count, self.shuffle, self.seed, self.epoch = count, shuffle, seed, 0
        self.rank, self.world = rank(), world_size()
        # Every process needs an image in every training batch, or it would miss the exchange of gradients.
        self.batches = min(math.ceil(count / batch_size), max(1, count // self.world))

    def set_epoch(self, epoch: int) -> None:
        """Choose the order (if shuffled) and the augmentation of the next pass."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.batches if self.rank < self.count else 0  # validation may have fewer images than processes

    def __iter__(self):
        order = np.arange(self.count)
        if self.shuffle:
            order = np.random.default_rng([self.seed, self.epoch]).permutation(self.count)
        for batch in np.array_split(order, self.batches)[:len(self)]:
            yield [(self.epoch, int(index)) for index in np.array_split(batch, self.world)[self.rank]]


def stack(samples: list) -> tuple[np.ndarray, np.ndarray]:
    """Samples to a batch of numpy arrays: uint8 images [B, S, S, 3] and masks [B, S, S].

    Arrays travel from worker to trainer through a pipe; tensors would need /dev/shm, which containers limit to 64 MB.
    """
    images, masks = zip(*samples)
    return np.stack(images), np.stack(masks)


def start_worker(_number: int) -> None:
    """One thread per worker (PyTorch sees to its own). It ends with the main process, also when that was killed, and
    leaves Ctrl-C to it.
    """
    cv2.setNumThreads(0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    # A worker that waits at a full pipe would outlive a killed trainer for ever.
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def make_loader(dataset: BrainTumorDataset, cfg: Settings, train: bool) -> torch.utils.data.DataLoader:
    """Batches of uint8 arrays, see stack(). Training batches are shuffled; validation batches are twice as large."""
    # Validation without decoding is a copy from the cache: not worth a process.
    workers = min(cfg.NUM_WORKERS, available_cores()) if train or dataset.cache is None else 0
    batches = EvenBatches(len(dataset), cfg.BATCH_SIZE * (1 if train else 2), train, cfg.SEED)
    # Its own generator, because it would otherwise draw from that of the model's dropout whenever it starts workers.
    return torch.utils.data.DataLoader(dataset, batch_sampler=batches, num_workers=workers, collate_fn=stack,
                                       generator=torch.Generator(),
                                       worker_init_fn=start_worker, persistent_workers=workers > 0)


def avx2_only() -> bool:
    """Whether this is an x86 processor with nothing newer than AVX2, or PyTorch was told to treat it as one."""
    return torch.backends.cpu.get_cpu_capability() == "AVX2"


def memory_format(device: torch.device) -> torch.memory_format:
    """How images, weights and activations [N, C, H, W] lie in memory: channels_last where convolutions prefer it.

    They do on GPUs and on CPUs with AVX-512. With AVX2 alone, oneDNN takes twice as long for the gradients in it.
    """
    return torch.contiguous_format if device.type == "cpu" and avx2_only() else torch.channels_last


def to_device(array: np.ndarray | torch.Tensor, device: torch.device) -> torch.Tensor:
    """Move a batch to the device without making the processor wait for the copy."""
    tensor = torch.as_tensor(array)
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()  # only pinned memory is copied in the background
    return tensor.to(device, non_blocking=True)


def to_input(images, device: torch.device, mean: tuple = MEAN, std: tuple = STD) -> torch.Tensor:
    """What the network sees: normalised float32 [B, 3, S, S] on the device, in its memory_format().

    images: raw uint8 [B, S, S, 3], values 0..255; or float32 [B, 3, S, S], already normalised.
    """
    images = to_device(images, device)
    if images.dtype == torch.uint8:
        images = images.permute(0, 3, 1, 2).float()
        for channel, (m, s) in enumerate(zip(mean, std)):
            images[:, channel].sub_(255 * m).div_(255 * s)  # numbers, not tensors: nothing to copy to a GPU
    return images.contiguous(memory_format=memory_format(device))


def to_target(masks, device: torch.device) -> torch.Tensor:
    """Masks uint8 [B, S, S], or any dtype [B, 1, S, S], to float32 [B, 1, S, S] on the device."""
    masks = to_device(masks, device).float()
    return masks[:, None] if masks.ndim == 3 else masks


# ===== Model ==========================================================================================================


def build_model(encoder: str = ENCODER, encoder_weights: str | None = None,
                architecture: str = ARCHITECTURE) -> tuple[torch.nn.Module, str]:
    """A network with one output channel: normalised float32 [B, 3, S, S] to logits [B, 1, S, S], S divisible by 32.

    encoder_weights: "imagenet" (downloaded), None, or a local file of the encoder's weights.
    Returns (model, where the encoder's weights come from, for the record). When the download is impossible, the model
    starts from random weights and a warning says so. Raises TrainerError for a local file that does not fit.
    """
    build = functools.partial(smp.create_model, architecture, encoder, in_channels=3, classes=1)
    unfit = f"{architecture} cannot be built with ENCODER = {encoder!r}, ENCODER_WEIGHTS = {encoder_weights!r}"
    try:
        model = build(encoder_weights=None)
    except (KeyError, ValueError, RuntimeError) as error:
        raise TrainerError(f"{unfit}: {error}") from None
    if encoder_weights not in (None, "imagenet"):
        load_weights(model.encoder, read_weights(encoder_weights), encoder_weights)
        return model, f"file {encoder_weights}"
    if encoder_weights is None:
        return model, "random"
    say("Getting ImageNet weights for the encoder (downloaded once, then from the local cache) ...")
    try:
        return build(encoder_weights="imagenet"), "imagenet"
    except KeyError as error:  # there are none
        raise TrainerError(f"{unfit}: {error}") from None
    except Exception as error:  # networks, proxies and hubs fail in many ways
        reason = f"download failed: {type(error).__name__}: {one_line(error)}"
        warn(f"no ImageNet weights ({reason}).\n"
             "Training starts from RANDOM weights, with LR_RANDOM_START, and needs more epochs for the same masks.\n"
             "To get the weights after all:\n"
             "  - where the hub is blocked, name a mirror in the environment: HF_ENDPOINT=https://<a mirror>\n"
             "  - or download the file elsewhere and set ENCODER_WEIGHTS to it (--encoder-weights FILE)\n"
             "  - or choose the random start yourself: ENCODER_WEIGHTS = None (--encoder-weights none)")
        return model, f"random ({reason})"


def read_weights(path: str | Path) -> dict:
    """Read a file of tensors (.pth, or .safetensors) onto the CPU; nothing in it is executed.

    Raises TrainerError when it is missing, damaged, or holds anything but a dict of tensors and plain values.
    """
    if not Path(path).is_file():
        raise TrainerError(f"weights file not found: {path}")
    try:
        if Path(path).suffix == ".safetensors":
            from safetensors.torch import load_file  # comes with segmentation-models-pytorch; rarely needed
            return load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged files raise almost anything, from KeyError to UnicodeDecodeError
        reason = f"{type(error).__name__}: {one_line(error)}"
        raise TrainerError(f"{path} is damaged or no weights file ({reason})") from error
    if not isinstance(content, dict):
        raise TrainerError(f"{path} holds a {type(content).__name__}, not a state_dict")
    return content


def load_weights(module: torch.nn.Module, weights: dict, path: str | Path) -> None:
    """load_state_dict; what does not fit raises TrainerError with PyTorch's list of the differences."""
    try:
        module.load_state_dict(weights)
    except (RuntimeError, AttributeError, TypeError) as error:  # other names or shapes; not even tensors
        differences = [line.strip()[:300] for line in str(error).splitlines()[1:]] or [str(error)]
        raise TrainerError(f"{path} does not fit this model (is ENCODER the same?):{listed(differences)}") from None


# ===== Losses: float32 logits [B, 1, S, S] and targets (0 or 1) of the same shape in, a mean over images out ==========
# A mean over images, unlike a ratio pooled over the batch, does not depend on how images are grouped: accumulation,
# half-size batches after running out of memory, and several GPUs all weigh each image alike.


def soft_counts(logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Soft true positives, false positives and false negatives of each image, in pixels: three [B] tensors."""
    p, t = logits.float().sigmoid().flatten(1), targets.flatten(1)
    return (p * t).sum(1), (p * (1 - t)).sum(1), ((1 - p) * t).sum(1)


def dice_loss(logits: torch.Tensor, targets: torch.Tensor, smooth: float = 1.0) -> torch.Tensor:
    """1 - Dice of each image, averaged. Range 0..1.

    Dice = (2 TP + s) / (2 TP + FP + FN + s) with soft counts (Milletari et al. 2016, with linear sums). The smoothing
    s, in pixels, makes an empty mask that is predicted empty a perfect one and keeps its gradient alive.
    """
    tp, fp, fn = soft_counts(logits, targets)
    return (1 - (2 * tp + smooth) / (2 * tp + fp + fn + smooth)).mean()


def dice_bce(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Dice loss plus binary cross-entropy, each with weight 1."""
    return dice_loss(logits, targets) + F.binary_cross_entropy_with_logits(logits.float(), targets)


def dice_focal(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Dice loss plus focal loss with gamma 2 (Lin et al. 2017), each with weight 1."""
    return dice_loss(logits, targets) + smp.losses.FocalLoss("binary", gamma=2.0)(logits.float(), targets)


class FocalTverskyLoss(torch.nn.Module):
    """Focal Tversky loss of each image, averaged (Abraham & Khan 2018, arXiv:1810.07842). Range 0..1.

    TI = (TP + s) / (TP + alpha FN + beta FP + s), loss = (1 - TI)^(1 / gamma). alpha weighs missed tumour, beta false
    alarms. smp.losses.TverskyLoss swaps the two names and takes 1 / gamma for gamma.
    """

    def __init__(self, alpha: float = 0.7, beta: float = 0.3, gamma: float = 4 / 3, smooth: float = 1.0):
        super().__init__()
        self.alpha, self.beta, self.gamma, self.smooth = alpha, beta, gamma, smooth

    def forward(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        tp, fp, fn = soft_counts(logits, targets)
        index = (tp + self.smooth) / (tp + self.alpha * fn + self.beta * fp + self.smooth)
        return (1 - index).clamp_min(1e-6).pow(1 / self.gamma).mean()  # the power's gradient is infinite at 0


LOSSES = {"dice_bce": dice_bce, "dice_focal": dice_focal, "focal_tversky": FocalTverskyLoss()}


# ===== Metrics: one number per image, then means over images ==========================================================

COUNTS = ("true_positive_px", "false_positive_px", "false_negative_px")


def score_images(probabilities: torch.Tensor, masks: torch.Tensor, threshold: float = 0.5) -> dict[str, torch.Tensor]:
    """Scores of each image: float64 [B] tensors by name, on the same device. Tumour is probability >= threshold.

    probabilities: float32 [B, 1, H, W], 0..1. masks: any dtype [B, 1, H, W], 0 or 1. A metric that is added here
    reaches the history, the tables, the JSON, and the printed lines of epochs and test.
    """
    tp, fp, fn, _ = smp.metrics.get_stats(probabilities, masks.long(), mode="binary", threshold=threshold)
    counts = [count[:, 0].double() for count in (tp, fp, fn)]
    return ratios(*counts) | dict(zip(COUNTS, counts))


def ratios(tp: torch.Tensor, fp: torch.Tensor, fn: torch.Tensor) -> dict[str, torch.Tensor]:
    """Dice, IoU, precision and recall from pixel counts (float64, any shape), range 0..1.

    Convention: both masks empty scores 1 everywhere; only one of them empty scores 0 everywhere.
    """
    empty = tp + fp + fn == 0
    parts = {"dice": (2 * tp, 2 * tp + fp + fn), "iou": (tp, tp + fp + fn), "precision": (tp, tp + fp),
             "recall": (tp, tp + fn)}
    return {name: torch.where(empty, 1.0, above / below.clamp_min(1)) for name, (above, below) in parts.items()}


def summarize(scores: dict[str, torch.Tensor]) -> dict[str, float]:
    """Scores of a set from those of its images: means, and, as pooled_*, the ratios of all pixels taken together."""
    means = {name: float(values.mean()) for name, values in scores.items() if name not in COUNTS}
    pooled = ratios(*(scores[name].sum() for name in COUNTS))
    return means | {f"pooled_{name}": float(value) for name, value in pooled.items()}


def confidence_interval(values: np.ndarray) -> list[float]:
    """95 % confidence interval of the mean of [N] values: percentile bootstrap (Efron 1979), 2000 seeded resamples.

    It is too narrow where several images come from one patient.
    """
    draws = np.random.default_rng(0).integers(len(values), size=(2000, len(values)))
    return [float(bound) for bound in np.percentile(values[draws].mean(axis=1), (2.5, 97.5))]


def hd95(prediction: np.ndarray, truth: np.ndarray) -> float:
    """95th percentile of the distances between the boundaries of two uint8 0/1 masks [H, W], in pixels.

    The distances from each boundary pixel of either mask to the nearest one of the other, both directions pooled, as
    in MedPy's hd95 (Huttenlocher et al. 1993 with a percentile for the maximum). A boundary pixel has one of its four
    neighbours, or the image's border, outside the mask. Both masks empty: 0; one empty: the image's diagonal.
    """
    if not prediction.any() or not truth.any():
        return math.hypot(*truth.shape) if prediction.any() or truth.any() else 0.0
    x, y, width, height = cv2.boundingRect(prediction | truth)  # nothing outside it can matter
    prediction, truth = (mask[y:y + height, x:x + width] for mask in (prediction, truth))
    cross = cv2.getStructuringElement(cv2.MORPH_CROSS, (3, 3))
    edges = [mask - cv2.erode(mask, cross, borderType=cv2.BORDER_CONSTANT, borderValue=0)
             for mask in (prediction, truth)]
    distances = [cv2.distanceTransform(1 - other, cv2.DIST_L2, cv2.DIST_MASK_PRECISE)[edge > 0]
                 for edge, other in (edges, edges[::-1])]
    return float(np.percentile(np.concatenate(distances), 95))


def count_lesions(prediction: np.ndarray, truth: np.ndarray) -> tuple[int, int, int]:
    """Annotated tumours, those of them that the prediction touches, and predicted ones that touch none.

    Tumours are 8-connected components of uint8 0/1 masks [H, W].
    """
    (tumours, places), (guesses, guessed) = cv2.connectedComponents(truth), cv2.connectedComponents(prediction)
    found, right = (np.unique(labels[other > 0]) for labels, other in ((places, prediction), (guessed, truth)))
    return tumours - 1, int((found > 0).sum()), guesses - 1 - int((right > 0).sum())


# ===== The training step ==============================================================================================


def amp_dtype(precision: str, device: torch.device) -> torch.dtype:
    """The dtype of autocast for a PRECISION setting; torch.float32 means no autocast."""
    if precision != "auto":
        return getattr(torch, precision)
    if device.type == "cuda":
        return torch.float16
    return torch.bfloat16 if device.type == "cpu" and has_native_bfloat16() else torch.float32


def has_native_bfloat16() -> bool:
    """Whether this CPU, and PyTorch's kernels for it, are faster in bfloat16 than in float32."""
    if not torch.backends.mkldnn.is_available() or avx2_only():  # builds for ARM Macs have no oneDNN
        return False
    if not hasattr(torch.cpu, "get_capabilities"):  # PyTorch 2.6
        return torch.cpu._is_avx512_bf16_supported()
    cpu = torch.cpu.get_capabilities()
    found = [name for name, has in cpu.items() if has and name.endswith("bf16")]
    # AVX-512 BF16 doubles the speed of AMD's processors; Intel's without AMX reach two thirds of float32 with it.
    return bool(found) and not (found == ["avx512_bf16"] and "Intel" in cpu.get("cpu_name", ""))


def autocast(precision: str, device: torch.device) -> torch.autocast:
    """The autocast context of a PRECISION setting."""
    dtype = amp_dtype(precision, device)
    return torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)


def make_scaler(precision: str, device: torch.device) -> torch.amp.GradScaler:
    """GradScaler, which skips a step with bad gradients without asking the GPU; outside float16 its scale stays 1."""
    float16 = amp_dtype(precision, device) == torch.float16
    return torch.amp.GradScaler(device.type, init_scale=2.0**16 if float16 else 1.0)


class RunningStatistics:
    """BatchNorm's buffers, remembered before a step: the forward pass changes them before anyone sees its result."""

    def __init__(self, model: torch.nn.Module):
        buffers = list(model.buffers())
        self.groups = [[buffer for buffer in buffers if buffer.dtype == dtype] for dtype in {b.dtype for b in buffers}]

    def flat(self) -> list[torch.Tensor]:
        """One flat copy for each dtype: a few kernels, where one for each buffer would be hundreds in every step."""
        return [torch.cat([buffer.reshape(-1) for buffer in group]) for group in self.groups]

    def remember(self) -> None:
        self.saved = self.flat()

    def restore(self, bad: torch.Tensor) -> None:
        """Put the remembered values back where bad (bool, on the device) is true. No lerp: NaN would stay NaN."""
        for group, saved, current in zip(self.groups, self.saved, self.flat()):
            parts = torch.where(bad, saved, current).split([buffer.numel() for buffer in group])
            torch._foreach_copy_(group, [part.view_as(buffer) for part, buffer in zip(parts, group)])


class MemoryLimit:
    """The most images per forward pass: no limit until memory runs out, then half of what was tried."""

    images = math.inf

    def run(self, work, images: int, undo=None):
        """The result of work(size), size being the most images per pass; repeated with half if memory runs out.

        undo: what to do before a repetition. Raises TrainerError when repeating cannot help.
        """
        while True:
            size = int(min(self.images, images))
            try:
                return work(size)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                reason = one_line(error)
            # Leaving the block has let go of the failed pass and its graph.
            if world_size() > 1:
                raise TrainerError(f"memory ran out ({reason}), and several processes cannot repeat a step. {GO_ON} "
                                   "What helps: a smaller BATCH_SIZE with more ACCUMULATION_STEPS", 1)
            if size == 1:
                raise TrainerError(f"there is too little memory for a single image ({reason}). What helps: a smaller "
                                   "IMG_SIZE; a smaller ENCODER, e.g. resnet18; closing other programs on the GPU; "
                                   "--device cpu (slow)", 1)
            if torch.cuda.is_initialized():
                torch.cuda.empty_cache()
            self.images = (size + 1) // 2
            if undo:
                undo()
            warn(f"out of memory ({reason}): from now on at most {self.images} image(s) per forward pass. Every image "
                 "weighs as much as before, but BatchNorm sees smaller batches. A smaller BATCH_SIZE avoids this.")


def forward_backward(model, group: list, images_in_step: torch.Tensor, criterion, scaler, cfg: Settings,
                     device: torch.device, size: int) -> torch.Tensor:
    """Add up the gradients of a group of batches, at most size images at a time. Returns the loss, a mean over images.

    A function of its own: when memory runs out, leaving it lets go of the graph.
    """
    loss = torch.zeros((), device=device)
    parts = [(images[i:i + size], masks[i:i + size]) for images, masks in group for i in range(0, len(images), size)]
    for number, (images, masks) in enumerate(parts, 1):
        exchange = world_size() == 1 or number == len(parts)  # several processes exchange gradients once per step
        with contextlib.nullcontext() if exchange else model.no_sync():
            with autocast(cfg.PRECISION, device):
                logits = model(to_input(images, device, cfg.MEAN, cfg.STD))
            # Weighted like this, the parts add up to the mean over the images of the step.
            part = criterion(logits.float(), to_target(masks, device)) * (len(images) / images_in_step)
            # A loss that is not finite has to spoil every gradient: then GradScaler leaves the whole step out.
            part = part * torch.where(part.detach().isfinite(), 1.0, math.nan)
            scaler.scale(part * world_size()).backward()  # DistributedDataParallel takes the mean
        loss += part.detach()
    return loss


def train_one_epoch(model: torch.nn.Module, loader, criterion, optimizer: torch.optim.Optimizer,
                    scaler: torch.amp.GradScaler, device: torch.device, *, cfg: Settings | None = None,
                    limit: MemoryLimit | None = None, epoch: int = 0, after_step=None) -> dict[str, float]:
    """One pass over the loader's (images, masks) batches; see to_input() and to_target() for their types.

    criterion: (logits, targets) to a mean over images. scaler: of make_scaler(). after_step: called after each step.
    cfg: ACCUMULATION_STEPS, GRAD_CLIP, PRECISION, MEAN and STD are used (default: the constants).
    Returns train_loss (mean over images; NaN if too many steps were dropped to go on) and dropped (steps left out
    because a number was not finite). Raises Interrupted, and TrainerError when memory cannot suffice.
    """
    cfg, device, limit = cfg or default_settings(), torch.device(device), limit or MemoryLimit()
    float16, statistics = amp_dtype(cfg.PRECISION, device) == torch.float16, RunningStatistics(model)
    if not scaler.is_enabled():  # as other code has it outside float16; only an enabled one leaves bad steps out
        scaler = make_scaler("float32", device)
    # Sums stay on the device: reading them in every step would make the processor wait for the GPU.
    loss_sum, images_seen, dropped = torch.zeros(3, device=device).unbind()
    always = torch.ones((), dtype=torch.bool, device=device)
    model.train()
    steps, batches = math.ceil(len(loader) / cfg.ACCUMULATION_STEPS), iter(loader)
    for _ in progress(range(steps), f"Epoch {epoch + 1}: training"):
        group = list(itertools.islice(batches, cfg.ACCUMULATION_STEPS))  # the last one may be shorter
        images_in_step = torch.full((), float(sum(len(images) for images, _ in group)), device=device)
        if world_size() > 1:
            dist.all_reduce(images_in_step)
        statistics.remember()
        loss = limit.run(
            functools.partial(forward_backward, model, group, images_in_step, criterion, scaler, cfg, device),
            max(len(images) for images, _ in group), lambda: (optimizer.zero_grad(), statistics.restore(always)))
        scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.GRAD_CLIP or math.inf)
        scaler.step(optimizer)  # leaves the weights as they are if a gradient is not finite
        scaler.update(None if float16 else 1.0)
        optimizer.zero_grad()
        # The optimizer is done; what is left of a bad step are BatchNorm's statistics, and counting it. In float16
        # GradScaler tries how far it can go: a step that only its scale has spoilt is not counted.
        bad = ~norm.isfinite()
        statistics.restore(bad)
        bad = bad & ~loss.isfinite() if float16 else bad
        dropped, images_seen = dropped + bad, images_seen + torch.where(bad, 0, images_in_step)
        loss_sum = loss_sum + torch.where(bad, 0, loss * images_in_step)
        if after_step:
            after_step()
    sums = gather([float(value) for value in (loss_sum, images_seen, dropped)])
    images, dropped = sums[0][1], int(max(part[2] for part in sums))  # every process counts all images of a step
    hopeless = dropped > steps / 2 or float16 and scaler.get_scale() < 1  # no scale at which float16 works
    return {"train_loss": math.nan if hopeless else sum(part[0] for part in sums) / images, "dropped": dropped}


@torch.inference_mode()
def validate(model: torch.nn.Module, loader, criterion, device: torch.device, *, cfg: Settings | None = None,
             limit: MemoryLimit | None = None) -> dict[str, float]:
    """Loss and scores at threshold 0.5 and the network's image size.

    Returns valid_loss (mean over images) and summarize() of all images of all processes, none counted twice.
    """
    cfg, device, limit = cfg or default_settings(), torch.device(device), limit or MemoryLimit()
    model.eval()

    def forward(size):  # in evaluation, images do not see each other
        with autocast(cfg.PRECISION, device):
            return torch.cat([model(to_input(images[i:i + size], device, cfg.MEAN, cfg.STD)).float()
                              for i in range(0, len(images), size)])

    found = []
    for images, masks in progress(loader, "Validation"):
        logits, targets = limit.run(forward, len(images)), to_target(masks, device)
        loss = criterion(logits, targets).double().expand(len(images))  # the batch's mean, once for each of its images
        found.append({"valid_loss": loss} | score_images(logits.sigmoid(), targets))
    found = sum(gather([{name: values.cpu() for name, values in scores.items()} for scores in found]), [])
    return summarize({name: torch.cat([scores[name] for scores in found]) for name in found[0]})


# ===== The run, epoch by epoch ========================================================================================


class Run:
    """Everything that changes while a model is trained."""

    PLAIN = ("epoch", "waited", "best_epoch", "best_dice", "history", "reverted", "weights_from", "fingerprint")
    STATEFUL = ("model", "average", "optimizer", "warmup", "plateau", "scaler")

    def __init__(self, cfg: Settings, device: torch.device, fingerprint: str, steps_per_epoch: int, state: dict | None):
        """fingerprint: of the data. state: from read_last() to go on, or None to start."""
        self.cfg, self.device, self.fingerprint = cfg, device, fingerprint
        self.epoch = self.waited = self.best_epoch = 0  # finished epochs; epochs since the best one; the best one
        self.best_dice, self.history, self.reverted = -1.0, [], False
        torch.manual_seed(cfg.SEED)
        given = state or cfg.INIT_WEIGHTS  # all weights: those of the encoder need not be downloaded
        model, origin = build_model(cfg.ENCODER, None if given else cfg.ENCODER_WEIGHTS, cfg.ARCHITECTURE)
        self.weights_from = gather(origin)[0]  # DistributedDataParallel copies the first process's weights to all
        if cfg.INIT_WEIGHTS and not state:
            weights = read_weights(cfg.INIT_WEIGHTS)
            load_weights(model, weights.get("average", weights), cfg.INIT_WEIGHTS)
            self.weights_from = f"checkpoint {cfg.INIT_WEIGHTS}"
        model.to(device, memory_format=memory_format(device))
        if world_size() > 1 and device.type == "cuda":  # BatchNorm sees the whole batch, not each GPU's part
            model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
        self.model = self.parallel = model
        if world_size() > 1:
            ids = [device] if device.type == "cuda" else None
            self.parallel = torch.nn.parallel.DistributedDataParallel(model, device_ids=ids)
            self.parallel.broadcast_buffers = False  # share_statistics() does, once per epoch
        self.average = copy.deepcopy(model).requires_grad_(False)
        self.averaged, self.current = ([value for value in net.state_dict().values() if value.is_floating_point()]
                                       for net in (self.average, model))
        self.decay = 1 - 1 / max(1.0, cfg.AVERAGE_EPOCHS * steps_per_epoch)  # 0: the average is the last weights
        encoder_lr = cfg.LR_RANDOM_START if self.weights_from.startswith("random") else cfg.LR
        lr = cfg.LR if self.weights_from.startswith("checkpoint") else cfg.LR_RANDOM_START  # of all the rest
        parts = {True: [], False: []}
        for name, weight in model.named_parameters():
            parts[name.startswith("encoder.")].append(weight)
        # Fused: one kernel for all parameters, and it can skip a bad step without asking the GPU.
        self.optimizer = torch.optim.AdamW([{"params": parts[True], "lr": encoder_lr}, {"params": parts[False]}], lr,
                                           weight_decay=cfg.WEIGHT_DECAY, fused=True)
        self.warmup = torch.optim.lr_scheduler.LinearLR(self.optimizer, 1 / max(1, cfg.WARMUP_STEPS),
                                                        total_iters=cfg.WARMUP_STEPS)
        self.plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(
            self.optimizer, mode="max", factor=cfg.PLATEAU_FACTOR, patience=cfg.PLATEAU_PATIENCE, threshold=0)
        self.scaler, self.limit = make_scaler(cfg.PRECISION, device), MemoryLimit()
        if state:
            self.load(state)
        else:
            say(f"Learning rate {encoder_lr:g} for the encoder, whose weights are: {self.weights_from}; {lr:g} for the "
                "rest of the network.")
        if cfg.COMPILE:
            model.compile()  # in place: the names of the weights stay as they are
            self.average.compile()

    def fit(self, loaders: dict, criterion, writer: CheckpointWriter) -> None:
        """Train until EPOCHS, or until EARLY_STOPPING ends it. Raises TrainerError and Interrupted."""
        cfg, images = self.cfg, len(loaders["train"].dataset)
        first_epoch, started = self.epoch, time.perf_counter()
        previous = started
        while self.epoch < cfg.EPOCHS and not (cfg.EARLY_STOPPING and self.waited >= cfg.EARLY_STOPPING):
            began = time.perf_counter()
            loaders["train"].batch_sampler.set_epoch(self.epoch)
            torch.manual_seed(int(np.random.default_rng([cfg.SEED, self.epoch]).integers(2**63)))  # for dropout
            trained = train_one_epoch(self.parallel, loaders["train"], criterion, self.optimizer, self.scaler,
                                      self.device, cfg=cfg, limit=self.limit, epoch=self.epoch,
                                      after_step=self.after_step)
            speed = images / (time.perf_counter() - began)
            self.share_statistics()
            scores = validate(self.average, loaders["valid"], criterion, self.device, cfg=cfg, limit=self.limit)
            if not math.isfinite(trained["train_loss"] + scores["valid_loss"]):
                writer.wait()
                gather("the state is written")  # all processes have to come here before one of them reads it
                self.revert(writer.output, f"epoch {self.epoch + 1}: the loss or its gradient is not finite "
                            f"({trained['dropped']} steps dropped, validation loss {scores['valid_loss']:.4g})")
                continue
            lr = self.optimizer.param_groups[1]["lr"]  # that of the decoder
            self.plateau.step(scores["dice"])
            self.epoch += 1
            improved = scores["dice"] > self.best_dice
            self.waited = 0 if improved else self.waited + 1
            if improved:
                self.best_dice, self.best_epoch = scores["dice"], self.epoch
            now = time.perf_counter()  # the time from line to line holds everything, saving too
            self.history.append({"epoch": self.epoch, **trained, **scores, "lr": lr,
                                 "images_per_second": round(speed, 2), "seconds": round(now - previous, 2)})
            previous = now
            if rank() == 0:
                writer.wait()
                writer.start(self.state())
            left = (now - started) / (self.epoch - first_epoch) * (cfg.EPOCHS - self.epoch)
            say(epoch_line(self.history[-1], scores, cfg.EPOCHS, timedelta(seconds=round(left)), improved))
        if self.epoch < cfg.EPOCHS:
            say(f"Stopped early: no better validation Dice for {self.waited} epochs (EARLY_STOPPING).")

    def after_step(self) -> None:
        """Let the warm-up and the moving average of weights and running statistics follow a training step."""
        self.warmup.step()
        steps = self.warmup.last_epoch
        # At first the average is over few steps (as in TensorFlow's ExponentialMovingAverage); a fixed decay would keep
        # the random start for too long.
        decay = min(self.decay, (1 + steps) / (10 + steps))
        torch._foreach_lerp_(self.averaged, self.current, 1 - decay)

    def share_statistics(self) -> None:
        """Give all processes the running statistics of the first, which the checkpoint will hold."""
        for averaged, own in zip(self.average.buffers(), self.model.buffers()):
            if not own.is_floating_point():  # BatchNorm counts its batches; the average has only the other numbers
                averaged.copy_(own)
            if world_size() > 1:
                dist.broadcast(averaged, 0)

    def state(self) -> dict:
        """A snapshot of everything: tensors on the CPU and plain values only, so that it can be read safely."""
        return to_cpu({name: getattr(self, name) for name in self.PLAIN}
                      | {name: getattr(self, name).state_dict() for name in self.STATEFUL}
                      | {"format": FORMAT, "settings": vars(self.cfg)})

    def load(self, state: dict) -> None:
        """Go on from a state. Raises TrainerError when it belongs to other data."""
        if state["fingerprint"] != self.fingerprint:
            raise TrainerError("the images or masks in train/ or valid/ are not those of the saved run; bring the data "
                               "back, or start a new run in another OUTPUT_DIR")
        for name in self.PLAIN:
            setattr(self, name, state[name])
        for name in self.STATEFUL:
            if name in ("model", "average"):
                load_weights(getattr(self, name), state[name], LAST)
            elif name != "scaler" or (state[name]["scale"] == 1) == (self.scaler.get_scale() == 1):
                getattr(self, name).load_state_dict(state[name])  # a scale must not pass between precisions
        # A fused optimizer walks through weights and moments side by side: in different formats it would mix them up.
        for weight, moments in self.optimizer.state.items():
            for name in ("exp_avg", "exp_avg_sq"):
                moments[name] = torch.empty_like(weight).copy_(moments[name])

    def revert(self, output: Path, why: str) -> None:
        """Back to the last saved state, and on in float32. Raises TrainerError in float32: it would happen again."""
        if amp_dtype(self.cfg.PRECISION, self.device) == torch.float32:
            raise TrainerError(f"{why}, in float32{' too' * self.reverted}. The best model so far is kept. Look at "
                               "training_samples.png for damaged data, or try a smaller LR.", 1)
        self.load(read_weights(output / LAST))
        self.reverted, self.cfg.PRECISION = True, "float32"
        self.scaler = make_scaler("float32", self.device)
        warn(f"{why}. Going back to the end of epoch {self.epoch} and on in float32, which is slower but safe.")


def epoch_line(row: dict, scores: dict, epochs: int, left: timedelta, improved: bool) -> str:
    """The line that is printed for an epoch. scores: of validate()."""
    return (f"epoch {row['epoch']:>{len(str(epochs))}}/{epochs}  train_loss {row['train_loss']:.4f}  {in_words(scores)}"
            f"  lr {row['lr']:.1e}  {row['images_per_second']:6.1f} img/s  {row['seconds']:6.1f} s  left {left}"
            + (f"  dropped {row['dropped']}" if row["dropped"] else "") + ("  * best" if improved else ""))


def in_words(scores: dict[str, float]) -> str:
    """Mean scores for a printed line; of the pooled ones only Dice."""
    return "  ".join(f"{name} {value:.4f}" for name, value in scores.items()
                     if name == "pooled_dice" or not name.startswith("pooled_"))


def train(cfg: Settings, resume: bool) -> None:
    """Train, keep the best model, then evaluate it."""
    device, output = torch.device(cfg.DEVICE), Path(cfg.OUTPUT_DIR)
    state = read_last(cfg) if resume else None
    if state and state["reverted"]:
        cfg.PRECISION = "float32"
    set_up_machine(cfg, device)
    describe_machine(cfg, device)
    STOP.saved = resume
    with held_data(cfg, ["train", "valid", "test"], output) as (splits, cache):
        loaders = {}
        for name in ("train", "valid"):
            dataset = BrainTumorDataset(Path(cfg.DATA_DIR) / name, cfg.IMG_SIZE, name == "train", cfg.SEED, False,
                                        records=splits[name].records, cache=cache)
            loaders[name] = make_loader(dataset, cfg, train=name == "train")
        steps_per_epoch = math.ceil(len(loaders["train"]) / cfg.ACCUMULATION_STEPS)
        run = Run(cfg, device, fingerprint(splits), steps_per_epoch, state)
        with CheckpointWriter(output, describe_run(cfg, device, splits, run.weights_from)) as writer:
            if state:
                best = f"; best validation Dice {run.best_dice:.4f} (epoch {run.best_epoch})" if run.epoch else ""
                say(f"Going on after epoch {run.epoch}{best}.")
                if run.epoch >= cfg.EPOCHS:
                    say(f"All {cfg.EPOCHS} epochs are done; raise EPOCHS to train on.")
                elif state["settings"]["EPOCHS"] < cfg.EPOCHS and 0 < cfg.EARLY_STOPPING <= run.waited:
                    run.waited = 0  # it had stopped early, and more epochs are asked for
                writer.repair(state)
                state = None  # as large as the run itself
            elif rank() == 0:
                keep_earlier_run(output)
                plot_samples(output / "training_samples.png", loaders["train"].dataset)
                writer.write(run.state())  # before workers are forked, and so that there is a state to go back to
            STOP.saved = True
            run.fit(loaders, LOSSES[cfg.LOSS], writer)
        if rank() == 0 and run.history:
            plot_history(output / "training_history.png", run.history)
        say(f"Best validation Dice {run.best_dice:.4f} in epoch {run.best_epoch} ({cfg.IMG_SIZE} px, threshold 0.5).")
        gather("the best model is written")  # all processes have to come here before one of them reads it
        del loaders, run  # ends the workers and frees the GPU before the evaluation
        evaluate_checkpoint(cfg, output / BEST, splits, cache)
    say(f"\nModel: {output / BEST} (settings beside it in {Path(BEST).stem}.json)\n"
        "Look at training_history.png, training_samples.png and, if there is a test set, test_predictions.png.")


def describe_run(cfg: Settings, device: torch.device, splits: dict[str, Split], weights_from: str) -> dict:
    """The record of a run, for the JSON beside its best model: what other code needs, and where it comes from."""
    modules = (torch, torchvision, smp, A, cv2, np, matplotlib)
    return {
        "architecture": cfg.ARCHITECTURE, "encoder": cfg.ENCODER, **prediction_settings(cfg), "settings": vars(cfg),
        "versions": {"python": platform.python_version()} | {module.__name__: module.__version__ for module in modules},
        "device": str(device), "platform": platform.platform(), "encoder_weights_from": weights_from,
        "data_counts": {name: {"images": len(split.records), "annotations": split.annotations,
                               "without_tumour": sum(not row.rles for row in split.records),
                               "skipped": split.skipped, "look_like_train": split.like_train}
                        for name, split in splits.items()}}


# ===== Checkpoints ====================================================================================================

BEST, LAST = "unet_plusplus_best.pth", "unet_plusplus_last.pth"
RUN_FILES = (BEST, "unet_plusplus_best.json", "training_history.csv", "training_history.png", "training_samples.png",
             "test_metrics.csv", "test_predictions.png", LAST)
FORMAT = 3  # of the state in LAST
SECONDS_BETWEEN_PLOTS = 10.0  # drawing takes as long as a short epoch
# A resumed run may differ from the saved one in these; BATCH_SIZE * ACCUMULATION_STEPS has to stay the same.
RESUME_MAY_CHANGE = ("EPOCHS", "EARLY_STOPPING", "NUM_WORKERS", "DEVICE", "PRECISION", "COMPILE", "DETERMINISTIC",
                     "CACHE_GB", "DATA_DIR", "OUTPUT_DIR", "BATCH_SIZE", "ACCUMULATION_STEPS", "ENCODER_WEIGHTS",
                     "INIT_WEIGHTS", "SKIP_BAD_IMAGES", "TEST_TIME_AUGMENTATION")


def to_cpu(value):
    """A copy of nested dicts and lists with every tensor on the CPU."""
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: to_cpu(item) for key, item in value.items()}
    return [to_cpu(item) for item in value] if isinstance(value, list) else value


class CheckpointWriter:
    """Writes what an epoch leaves, in one background thread behind the work of the next epoch.

    It sees CPU tensors only. The order of writing is one that repair() can mend: the state, the best weights, the JSON
    with their digest, then table and plot. One state is under way at a time: a kill costs the epoch that runs and, at
    most, the one before. What goes wrong in the thread is raised by the next wait().
    """

    def __init__(self, output: Path, record: dict):
        """record: of the run, for the JSON."""
        self.output, self.record = output, record
        self.thread = self.error = None
        self.plotted = -math.inf  # when, on time.monotonic()'s clock

    def write(self, state: dict) -> None:
        """Write a state and what belongs to it. Raises TrainerError; files that are not written stay as they were."""
        tensors = itertools.chain(state["model"].values(), state["average"].values(),
                                  *(moments.values() for moments in state["optimizer"]["state"].values()))
        # NaN and infinity spoil a sum; looking at each number takes ten times as long. NumPy, because PyTorch would
        # start more threads beside training's; it knows no bfloat16.
        if not all(np.isfinite(tensor.float().numpy().sum()) for tensor in tensors):
            raise TrainerError(f"the model holds numbers that are not finite, and was not saved. {GO_ON}", 1)
        write_file(self.output / LAST, lambda file: torch.save(state, file), required=True)
        if state["epoch"] and state["epoch"] == state["best_epoch"]:
            self.write_best(state)
        if state["history"]:
            write_table(self.output / "training_history.csv", state["history"])
            if time.monotonic() - self.plotted > SECONDS_BETWEEN_PLOTS:
                plot_history(self.output / "training_history.png", state["history"])
                self.plotted = time.monotonic()

    def write_best(self, state: dict) -> None:
        """The averaged weights of a state as best model, and the JSON that describes them."""
        content = io.BytesIO()
        torch.save({name: (value.float() if value.is_floating_point() else value).contiguous()
                    for name, value in state["average"].items()}, content)
        write_file(self.output / BEST, content.getbuffer(), required=True)
        write_record(self.output / BEST, self.record | {
            "best_epoch": state["epoch"], "valid_metrics_at_img_size": state["history"][-1],
            "sha256": hashlib.sha256(content.getbuffer()).hexdigest()})

    def start(self, state: dict) -> None:
        """Write a state in the background. wait() comes first."""
        def work():
            try:
                self.write(state)
            except BaseException as error:  # raised again by wait(), in the thread that can act on it
                self.error = error

        self.thread = threading.Thread(target=work, name="writer", daemon=True)  # a second Ctrl-C does not wait for it
        self.thread.start()

    def wait(self) -> None:
        """Until the last state is written; raises what went wrong. In slices: Windows has no Ctrl-C in a join."""
        while self.thread and self.thread.is_alive():
            self.thread.join(0.2)
        self.thread, error, self.error = None, self.error, None
        try:
            if error:
                raise error
        finally:
            del error  # or this frame and the error hold each other, and with them loaders and workers

    def repair(self, state: dict) -> None:
        """Write what a killed run may have left unwritten after its last state."""
        if rank() or not state["epoch"]:
            return
        if read_record(self.output / BEST)[0].get("best_epoch") != state["best_epoch"]:
            if state["epoch"] == state["best_epoch"]:
                self.write_best(state)
            else:
                warn(f"{BEST} and its JSON are not the best model of this run, that of epoch {state['best_epoch']}.\n"
                     "The next better epoch writes them anew.")
        write_table(self.output / "training_history.csv", state["history"])

    def __enter__(self):
        return self

    def __exit__(self, kind, _error, _traceback):
        if kind is not KeyboardInterrupt:
            self.wait()


def write_record(checkpoint: Path, record: dict) -> None:
    """Write the JSON beside a checkpoint; its "sha256" ties the two together."""
    content = json.dumps(record | {"checkpoint": checkpoint.name}, indent=2, ensure_ascii=False)
    write_file(checkpoint.with_suffix(".json"), content.encode("utf-8"), required=True)


def read_record(checkpoint: Path) -> tuple[dict, str]:
    """The JSON beside a checkpoint. Returns (record, ""), or ({}, why there is none to be trusted)."""
    path = checkpoint.with_suffix(".json")
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if record["sha256"] == hashlib.sha256(checkpoint.read_bytes()).hexdigest():
            return record, ""
        return {}, f"{path.name} does not belong to {checkpoint.name} (its digest differs)"
    except OSError:
        return {}, f"there is no {path.name} beside it"
    except (ValueError, TypeError, KeyError):
        return {}, f"{path.name} is damaged"


def read_last(cfg: Settings) -> dict:
    """The state to go on from. Raises TrainerError if there is none, or if the settings contradict it."""
    path = Path(cfg.OUTPUT_DIR) / LAST
    if not path.is_file():
        raise TrainerError(f"nothing to resume: there is no {path}; leave --resume out to start a run, or name the "
                           "run's folder with OUTPUT_DIR")
    state = read_weights(path)
    if "settings" in state and state.get("format") != FORMAT:
        raise TrainerError(f"{path} was written by another version of this script; finish that run with that version, "
                           f"or start a new one from its best model: --init-weights {path.with_name(BEST)}")
    if missing := {"settings", *Run.PLAIN, *Run.STATEFUL} - set(state):
        raise TrainerError(f"{path} is not the state of a run of this script: it has no {', '.join(sorted(missing))}")
    old, new = [settings | {"images per step": settings["BATCH_SIZE"] * settings["ACCUMULATION_STEPS"]}
                for settings in (state["settings"], vars(cfg))]
    differs = [f"{name}: saved {old.get(name)!r}, now {new[name]!r}" for name in new
               if name not in RESUME_MAY_CHANGE and old.get(name) != new[name]]
    if differs:
        raise TrainerError(f"the saved run in {path} had other settings:{listed(differs, 40)}\nGive the saved values, "
                           "or start a new run in another OUTPUT_DIR. What may change: "
                           f"{', '.join(RESUME_MAY_CHANGE)} (but not BATCH_SIZE * ACCUMULATION_STEPS).")
    return state


def keep_earlier_run(output: Path) -> None:
    """Move the files of an earlier run into a folder of their own, the state last, and say how to go on with it."""
    files = [output / name for name in RUN_FILES if (output / name).is_file()]
    if not files:
        return
    stamp = time.strftime("earlier_run_%Y%m%d-%H%M%S", time.localtime(files[-1].stat().st_mtime))
    folder = next(path for number in itertools.count(1) if not (path := output / f"{stamp}_{number}").exists())
    folder.mkdir()
    for file in files:
        os.replace(file, folder / file.name)
    say(f"The earlier run of this folder is now in {folder}.")
    if files[-1].name == LAST:
        say(f"To go on with it, stop this one (Ctrl-C) and add to its command: --resume --output-dir \"{folder}\"")


# ===== Evaluation and prediction, through the same path ===============================================================

THRESHOLDS = np.round(np.arange(0.05, 0.96, 0.05), 2)


def prediction_settings(cfg: Settings) -> dict:
    """What predict_mask() has to know beside the weights."""
    return {"img_size": cfg.IMG_SIZE, "mean": cfg.MEAN, "std": cfg.STD, "threshold": 0.5,
            "test_time_augmentation": cfg.TEST_TIME_AUGMENTATION}


def load_model(checkpoint: str | Path, device: str | torch.device | None = None,
               cfg: Settings | None = None) -> torch.nn.Module:
    """Load a checkpoint of this script for prediction, with the settings in the JSON beside it.

    device: where to put the model; default: DEVICE. cfg (default: the constants) is used instead, with a warning, when
    there is no JSON or only one of another checkpoint. The model gets two attributes: record, the content of the JSON,
    and prediction_settings. Raises TrainerError when the file is missing, damaged or unfit.
    """
    checkpoint, cfg = Path(checkpoint), cfg or default_settings()
    weights, (record, problem) = read_weights(checkpoint), read_record(checkpoint)
    settings = prediction_settings(cfg)
    if problem:
        warn(f"{checkpoint}: {problem}; using the script's settings: ENCODER {cfg.ENCODER}, {settings}")
    model = build_model(record.get("encoder", cfg.ENCODER), None,
                        record.get("architecture", "unetplusplus" if record else cfg.ARCHITECTURE))[0]
    load_weights(model, weights, checkpoint)
    model.record = record
    settings["test_time_augmentation"] &= not record  # a record from before there was this did without
    model.prediction_settings = {name: record.get(name, value) for name, value in settings.items()}
    device = torch.device(device or cfg.DEVICE)
    return model.to(device, memory_format=memory_format(device)).eval()


@torch.inference_mode()
def predict_probability(model: torch.nn.Module, image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Tumour probability, float32 [height, width], of a resized RGB uint8 [S, S, 3] image, by a model in eval mode.

    Without autocast, on every device, so that the scores of this script are those that other code gets.
    """
    settings = model.prediction_settings
    images = to_input(image[None], next(model.parameters()).device, settings["mean"], settings["std"])
    probability = model(images).float().sigmoid()
    if settings["test_time_augmentation"]:
        probability = (probability + model(images.flip(3)).float().sigmoid().flip(3)) / 2
    return resize(probability[0, 0].cpu().numpy(), height, width)


def predict_mask(model: torch.nn.Module, image: np.ndarray) -> np.ndarray:
    """Segment one image: RGB uint8 [H, W, 3] in, mask uint8 [H, W] out, 1 where there is tumour.

    Raises ValueError for any other kind of image.
    """
    if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or image.shape[2:] != (3,) or not image.size:
        raise ValueError("image must be an RGB uint8 array [H, W, 3], as read_image() returns; got "
                         f"{getattr(image, 'dtype', type(image).__name__)} {getattr(image, 'shape', '')}")
    if not hasattr(model, "prediction_settings"):
        model.prediction_settings = prediction_settings(default_settings())
        warn(f"this model was not loaded by load_model(): using the script's constants {model.prediction_settings}")
    size, training = model.prediction_settings["img_size"], model.training
    small = np.ascontiguousarray(resize(image, size, size))  # BGR turned into RGB is a view that torch refuses
    probability = predict_probability(model.eval(), small, *image.shape[:2])
    model.train(training)
    return at_threshold(probability, model.prediction_settings["threshold"])


def at_threshold(probability: np.ndarray, threshold: float) -> np.ndarray:
    """Mask uint8 0/1: tumour is probability >= threshold, compared in float32."""
    return (probability >= np.float32(threshold)).astype(np.uint8)


def count_thresholds(probability: np.ndarray, mask: np.ndarray, thresholds: np.ndarray = THRESHOLDS) -> np.ndarray:
    """(TP, FP, FN) at every threshold: int64 [T, 3], from float32 probabilities and a 0/1 mask of the same shape."""
    passed = np.searchsorted(thresholds.astype(np.float32), probability.ravel(), side="right")  # how many it reaches
    inside = mask.ravel() > 0
    tp, fp = (np.bincount(passed[part], minlength=len(thresholds) + 1)[::-1].cumsum()[::-1][1:]
              for part in (inside, ~inside))
    return np.stack([tp, fp, inside.sum() - tp], axis=-1)


def score_test_image(probability: np.ndarray, mask: np.ndarray, threshold: float) -> dict[str, float]:
    """All scores of one image at the annotation's resolution: a row of test_metrics.csv."""
    prediction = at_threshold(probability, threshold)
    tensors = [torch.from_numpy(array)[None, None] for array in (probability, mask)]
    row = {name: float(value) for name, value in score_images(*tensors, threshold).items()}
    lesions = zip(("lesions", "lesions_found", "false_lesions"), count_lesions(prediction, mask))
    return row | {"hd95_px": hd95(prediction, mask)} | dict(lesions)


def evaluate_split(model: torch.nn.Module, dataset: BrainTumorDataset, score, name: str) -> list:
    """score(probability, mask) of every image, at the annotations' resolution."""
    def work(i):
        record = dataset.records[i]
        return score(predict_probability(model, dataset.sample(i)[0], record.height, record.width), record.mask())

    own = range(rank(), len(dataset), world_size())
    most = 4 if next(model.parameters()).is_cuda else 16  # each thread has the activations of one image in memory
    parts = gather(in_threads(work, own, f"Scoring {name}", most))
    return [parts[i % world_size()][i // world_size()] for i in range(len(dataset))]


def evaluate_checkpoint(cfg: Settings, checkpoint: Path, splits: dict[str, Split], cache: PixelCache | None) -> None:
    """Find the threshold on valid, score test with it, write the tables and pictures, and update the record."""
    model, output = load_model(checkpoint, cfg=cfg), Path(cfg.OUTPUT_DIR)
    record, settings = model.record, model.prediction_settings
    settings["test_time_augmentation"] = cfg.TEST_TIME_AUGMENTATION  # chosen here, like the threshold
    dataset = {name: BrainTumorDataset(Path(cfg.DATA_DIR) / name, settings["img_size"], records=split.records,
                                       cache=cache) for name, split in splits.items()}
    counts = torch.from_numpy(np.stack(evaluate_split(model, dataset["valid"], count_thresholds, "valid"))).double()
    dice = ratios(*counts.unbind(-1))["dice"].mean(dim=0).numpy()
    equal = np.flatnonzero(dice >= dice.max() - 1e-12)
    chosen = min(equal, key=lambda i: abs(THRESHOLDS[i] - 0.5))  # of equally good ones the least extreme
    threshold = settings["threshold"] = float(THRESHOLDS[chosen])
    valid = dict(zip(COUNTS, counts[:, chosen].unbind(-1)))
    record |= settings | {"valid_metrics": summarize(ratios(*valid.values()) | valid)}
    say(f"\nThreshold {threshold:.2f} gives the best Dice on valid. Means over images at the original resolution;\n"
        "both masks empty scores 1, only one of them empty 0:")
    say(f"  valid  {len(counts)} images  {in_words(record['valid_metrics'])}")
    if "test" in dataset:
        rows = evaluate_split(model, dataset["test"], functools.partial(score_test_image, threshold=threshold), "test")
        record["test_metrics"] = report_test(rows)
        if rank() == 0:
            records = dataset["test"].records
            write_table(output / "test_metrics.csv", [
                {"file_name": image.file_name} | {name: f"{value:.10g}" for name, value in row.items()}
                for image, row in zip(records, rows)])
            plot_predictions(output / "test_predictions.png", model, records, np.array([row["dice"] for row in rows]))
    for name, found in record.get("data_counts", {}).items():
        if found.get("look_like_train"):
            say(f"  {LIKE_TRAIN.format(found['look_like_train'], found['images'], name)}")
    if rank() == 0 and record.get("encoder"):  # nothing is written beside a checkpoint whose origin is unknown
        write_record(checkpoint, record)
    if str(record.get("encoder_weights_from")).startswith("random ("):
        warn("this model started from RANDOM weights, because the ImageNet weights could not be had "
             f"{record['encoder_weights_from'].removeprefix('random ')}: its scores are lower than they need be.")


def report_test(rows: list[dict[str, float]]) -> dict:
    """Print what the rows of test_metrics.csv come to. Returns it for the JSON."""
    columns = {name: np.array([row[name] for row in rows], np.float64) for name in rows[0]}
    found = {name: int(columns.pop(name).sum()) for name in ("lesions", "lesions_found", "false_lesions")}
    found |= {"hd95_px": float(columns.pop("hd95_px").mean())}
    found |= {f"{name}_95_ci": confidence_interval(columns[name]) for name in ("dice", "iou")}
    metrics = summarize({name: torch.from_numpy(values) for name, values in columns.items()})
    say(f"  test   {len(rows)} images  {in_words(metrics)}\n"
        "  95 % confidence interval of the mean: dice {:.4f} to {:.4f}, iou {:.4f} to {:.4f} (too narrow if several "
        "images\n  come from one patient)".format(*found["dice_95_ci"], *found["iou_95_ci"])
        + f"\n  HD95 {found['hd95_px']:.1f} px; {found['lesions_found']} of {found['lesions']} tumours touched, "
        f"{found['false_lesions']} predicted where there is none")
    return metrics | found


def predict_files(cfg: Settings, checkpoint: Path, sources: list[str]) -> None:
    """Write NAME_mask.png (0 or 255) and NAME_overlay.png into OUTPUT_DIR for image files and all images of folders.

    Nothing that exists is overwritten: a taken name gets a number. Masks, overlays and pictures of runs, as their names
    tell, are left out of folders.
    """
    files, bad = [], []
    for source in map(Path, sources):
        if not source.exists():
            raise TrainerError(f"no such file or folder: {source}")
        found = [path for path in sorted(source.rglob("*")) if path.suffix.lower() in IMAGE_SUFFIXES]
        own = {path for path in found
               if path.name in RUN_FILES or re.search(r"_(mask|overlay)(_\d+)?\.png$", path.name)}
        if own:
            say(f"Left out {len(own)} file(s) of {source} that are named like results of this script.")
        files += [source] if source.is_file() else [path for path in found if path not in own]
    if not files:
        raise TrainerError(f"no images found in {', '.join(sources)} (looked for {', '.join(sorted(IMAGE_SUFFIXES))})")
    model = load_model(checkpoint, cfg=cfg)
    for path in progress(files, "Predicting"):
        try:
            image = read_image(path)
        except TrainerError as error:
            bad.append(str(error))
            continue
        mask = predict_mask(model, image)
        for number in itertools.count(1):
            targets = [f"{path.stem}_{kind}{f'_{number}' * (number > 1)}.png" for kind in ("mask", "overlay")]
            if not any((Path(cfg.OUTPUT_DIR) / name).exists() for name in targets):
                break
        for name, picture in zip(targets, (mask * 255, draw_overlay(image, mask))):
            write_image(Path(cfg.OUTPUT_DIR) / name, picture)
        say(f"{path}: {100 * mask.mean():.2f} % tumour -> {', '.join(targets)}")
    if bad:
        raise TrainerError(f"{len(bad)} of {len(files)} file(s) could not be read:{listed(bad)}")


# ===== Pictures =======================================================================================================


def draw_overlay(image: np.ndarray, mask: np.ndarray, truth: np.ndarray | None = None) -> np.ndarray:
    """The image [H, W, 3] with the mask [H, W] tinted and outlined in red, and the outline of the truth in green."""
    out = image.copy()
    out[mask > 0] = 0.7 * out[mask > 0] + 0.3 * np.array([255, 0, 0])
    for outlined, colour in ((mask, (255, 0, 0)), (truth, (0, 255, 0))):
        if outlined is not None:
            contours = cv2.findContours(outlined, cv2.RETR_LIST, cv2.CHAIN_APPROX_NONE)[0]
            cv2.drawContours(out, contours, -1, colour, max(1, round(max(image.shape) / 300)))
    return out


def plot_grid(path: Path, rows: list[list[tuple[np.ndarray, str]]], title: str = "") -> None:
    """A grid of (picture, caption): RGB uint8 [H, W, 3] or mask uint8 0/1 [H, W]."""
    columns = max(map(len, rows))
    figure = Figure(figsize=(2.3 * columns, 2.5 * len(rows)), layout="constrained")  # room for the title
    for axes, row in zip(figure.subplots(len(rows), columns, squeeze=False), rows):
        for axis, (picture, caption) in itertools.zip_longest(axes, row, fillvalue=(np.ones((1, 1, 3)), "")):
            axis.imshow(picture, cmap="gray", vmin=0, vmax=1 if picture.ndim == 2 else None)
            axis.set_title(caption.encode("ascii", "replace").decode(), fontsize=7)  # its font has no CJK letters
            axis.axis("off")
    figure.suptitle(title)
    write_file(path, lambda file: figure.savefig(file, format="png", dpi=100))


def plot_samples(path: Path, dataset: BrainTumorDataset, columns: int = 6) -> None:
    """Training images, masks outlined: below each one as loaded the same one as the network may see it."""
    # Images with a tumour first: their outlines show whether masks lie where they should. The prime shuffles.
    order = sorted(range(len(dataset)), key=lambda i: (not dataset.records[i].rles, i * 7919 % len(dataset)))
    rows = []
    for first in range(0, min(2 * columns, len(order)), columns):
        for kind, get in (("loaded", dataset.sample), ("augmented", lambda i: dataset[(0, i)])):
            row = [(i, *get(i)) for i in order[first:first + columns]]
            rows.append([(draw_overlay(image, np.zeros_like(mask), mask),
                          f"{kind}: ...{Path(dataset.records[i].file_name).stem[-16:]}") for i, image, mask in row])
    plot_grid(path, rows, "Training images as the network sees them, tumour outlined in green")


def plot_history(path: Path, history: list[dict]) -> None:
    """Losses, validation Dice and IoU, and learning rate over the epochs; the best epoch is marked."""
    epochs, best = [row["epoch"] for row in history], max(history, key=lambda row: row["dice"])
    figure = Figure(figsize=(15, 4.5), layout="constrained")
    panels = (("Loss", {"train_loss": "training", "valid_loss": "validation"}),
              ("Validation (mean over images)", {"dice": "Dice", "iou": "IoU"}), ("Learning rate", {"lr": "decoder"}))
    for axis, (title, lines) in zip(figure.subplots(1, 3), panels):
        for key, label in lines.items():
            axis.plot(epochs, [row[key] for row in history], marker="." if len(history) < 30 else None, label=label)
        axis.axvline(best["epoch"], color="gray", linestyle="--", linewidth=1,
                     label=f"best epoch {best['epoch']} (Dice {best['dice']:.4f})")
        axis.set(title=title, xlabel="epoch", yscale="log" if "lr" in lines else "linear")
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    write_file(path, lambda file: figure.savefig(file, format="png", dpi=100))


def plot_predictions(path: Path, model: torch.nn.Module, records: list[Record], dice: np.ndarray, each: int = 2):
    """Best, median and worst test cases: image, truth, prediction, and overlay with the Dice of the case."""
    order = [int(i) for i in np.argsort(-dice, kind="stable")]
    middle = max(0, len(order) // 2 - each // 2)
    cases = {}  # a case keeps the first of its labels, where there are few
    for label, part in (("best", order[:each]), ("worst", order[-each:]), ("median", order[middle:middle + each])):
        cases |= {i: label for i in part if i not in cases}
    rows = []
    for i in (i for i in order if i in cases):
        image, truth = read_image(records[i].path, records[i].height, records[i].width), records[i].mask()
        image = resize(image, *truth.shape)
        mask = predict_mask(model, image)
        rows.append([(image, f"{cases[i]}: ...{Path(records[i].file_name).name[-24:]}"), (truth, "truth"),
                     (mask, "prediction"), (draw_overlay(image, mask, truth), f"Dice {dice[i]:.3f}")])
    plot_grid(path, rows, "Test images (in the overlay green: truth, red: prediction)")


# ===== Plumbing: command line =========================================================================================

# The least value of each number; where it stands without a decimal point, whole numbers only.
MINIMUM = {"CACHE_GB": 0.0, "IMG_SIZE": 64, "BATCH_SIZE": 1, "NUM_WORKERS": 0, "EPOCHS": 1, "WARMUP_STEPS": 0,
           "WEIGHT_DECAY": 0.0, "ACCUMULATION_STEPS": 1, "GRAD_CLIP": 0.0, "AVERAGE_EPOCHS": 0.0, "PLATEAU_PATIENCE": 0,
           "EARLY_STOPPING": 0, "SEED": 0}
RULES = {  # what else a setting must satisfy, in words and as a test
    "CATEGORIES": ("a tuple of names (one name needs a comma behind it)", lambda v: isinstance(v, tuple)),
    "IMG_SIZE": ("a multiple of 32, at most 4096", lambda v: v % 32 == 0 and v <= 4096),
    "BATCH_SIZE": ("at least the number of processes", lambda v: v >= int(os.environ.get("WORLD_SIZE", 1))),
    "MEAN": ("three numbers", lambda v: len(v) == 3 and all(map(math.isfinite, v))),
    "STD": ("three numbers above 0", lambda v: len(v) == 3 and all(0 < x < math.inf for x in v)),
    "ARCHITECTURE": (f"one of {', '.join(smp.MODEL_ARCHITECTURES_MAPPING)}",
                     lambda v: v in smp.MODEL_ARCHITECTURES_MAPPING),
    "ENCODER": ("an encoder of segmentation_models_pytorch",
                lambda v: v in smp.encoders.get_encoder_names() or v.startswith("tu-")),
    "LR": ("a number above 0", lambda v: 0 < v < math.inf),
    "LR_RANDOM_START": ("a number above 0", lambda v: 0 < v < math.inf),
    "LOSS": (f"one of {', '.join(LOSSES)}", lambda v: v in LOSSES),
    "PLATEAU_FACTOR": ("between 0 and 1", lambda v: 0 < v < 1),
    "DEVICE": ("cpu, or cuda or cuda:N if PyTorch sees that GPU, and one for each process of torchrun (README.md, "
               "'GPU'; --device cpu always works)",
               lambda v: v == "cpu" or v[:4] == "cuda" and (torch.device(v).index or 0) < torch.cuda.device_count()
               >= int(os.environ.get("LOCAL_WORLD_SIZE", 1))),
    "PRECISION": ("one of auto, float32, bfloat16, float16", lambda v: v in ("auto", "float32", "bfloat16", "float16")),
}
STARTING_RULES = {  # what a new run needs besides
    "ENCODER_WEIGHTS": ('"imagenet", None or an existing file', lambda v: v in (None, "imagenet") or Path(v).is_file()),
    "INIT_WEIGHTS": ("None or an existing file", lambda v: v is None or Path(v).is_file()),
}


def default_settings() -> Settings:
    """The constants, as they are now."""
    return Settings(**{name: globals()[name] for name in CONSTANTS})


def read_settings(argv: list[str] | None) -> tuple[Settings, argparse.Namespace]:
    """Merge the command line (default: sys.argv[1:]) into the constants; each is a flag of the type of its value.

    Returns (cfg, mode): cfg holds every constant under its own name; mode says what to do (train if nothing is set).
    Raises TrainerError for an unknown flag, a wrong type or an impossible value.
    """
    def fail(message):
        raise TrainerError(f"{message} (--help lists the options)")

    def text(word):
        return None if word.lower() == "none" else word

    def number(word):
        return int(word) if re.fullmatch(r"[+-]?\d+", word) else float(word)

    settings_block = Path(__file__).read_text(encoding="utf-8").split("# ===== ")[1]
    parser = argparse.ArgumentParser(
        usage="%(prog)s [--resume | --audit | --evaluate | --predict PATH ...] [--name-of-a-constant VALUE ...]",
        description=__doc__.split("\n\n")[0], epilog=f"{settings_block}\nLOSSES: {', '.join(LOSSES)}",
        formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.error = fail  # one sentence, as for every other error, instead of the whole usage
    group = parser.add_argument_group("what to do (default: train)").add_mutually_exclusive_group()
    group.add_argument("--resume", action="store_true", help="go on with the interrupted run in OUTPUT_DIR")
    group.add_argument("--audit", action="store_true", help="check the data, print what was found, and stop")
    group.add_argument("--evaluate", action="store_true", help="only find the threshold and score the test set")
    group.add_argument("--predict", nargs="+", metavar="PATH", help="segment image files, or all images of folders")
    parser.add_argument("--checkpoint", metavar="FILE", help="for --evaluate and --predict [that in OUTPUT_DIR]")
    for name in CONSTANTS:
        value = globals()[name]
        if isinstance(value, bool):
            options = {"action": argparse.BooleanOptionalAction}
        elif isinstance(value, (tuple, list)):
            options = {"nargs": "*", "type": number if value and not isinstance(value[0], str) else str}
        else:
            options = {"type": text if value is None or isinstance(value, str) else number}
        parser.add_argument("--" + name.lower().replace("_", "-"), dest=name, default=argparse.SUPPRESS,
                            help=argparse.SUPPRESS, **options)
    given = vars(parser.parse_args(argv))
    if "LR" in given:  # the user's choice holds for every start
        given.setdefault("LR_RANDOM_START", given["LR"])
    values = {name: given.pop(name, value) for name, value in vars(default_settings()).items()}
    cfg = Settings(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})
    mode = argparse.Namespace(**given)
    if mode.checkpoint and not (mode.evaluate or mode.predict):
        fail("--checkpoint goes with --evaluate and --predict; to train on from a model, set INIT_WEIGHTS")
    check_settings(cfg, mode)
    return cfg, mode


def check_settings(cfg: Settings, mode: argparse.Namespace) -> None:
    """Raise TrainerError for the first setting that is impossible, before any work starts."""
    limits = {name: (f"a {'whole ' * (type(least) is int)}number, {least} or more",
                     lambda v, least=least: least <= v < 2**63 and type(v) in (int, type(least)))
              for name, least in MINIMUM.items()}
    starting = {} if mode.resume or mode.audit or mode.evaluate or mode.predict else STARTING_RULES
    for name, (legal, holds) in [*limits.items(), *RULES.items(), *starting.items()]:
        try:
            good = holds(getattr(cfg, name))
        except (TypeError, AttributeError, RuntimeError):  # an edited constant of the wrong type, a strange device
            good = False
        if not good:
            raise TrainerError(f"{name} is {getattr(cfg, name)!r}, but must be {legal}")
    if cfg.DEVICE == "cpu" and cfg.PRECISION == "float16":
        raise TrainerError("PRECISION is float16, which needs a CUDA device; use auto, bfloat16 or float32")
    if not mode.predict and not (cfg.DATA_DIR and Path(cfg.DATA_DIR).is_dir()):
        raise TrainerError(f"data folder not found: {cfg.DATA_DIR}; set DATA_DIR or --data-dir to the folder that "
                           "holds train/ and valid/")
    try:
        Path(cfg.OUTPUT_DIR).mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=cfg.OUTPUT_DIR).close()
    except (OSError, TypeError) as error:
        raise TrainerError(f"cannot write into the output folder {cfg.OUTPUT_DIR} ({error}); choose another one with "
                           "OUTPUT_DIR or --output-dir") from None


def run_mode(cfg: Settings, mode: argparse.Namespace) -> None:
    """Do what the command line asks for. Raises TrainerError and Interrupted."""
    checkpoint = Path(mode.checkpoint or Path(cfg.OUTPUT_DIR) / BEST)
    if mode.predict and int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise TrainerError("--predict runs in one process; start it without torchrun")
    start_processes(cfg)
    check_gpu(cfg)
    if mode.predict:
        predict_files(cfg, checkpoint, mode.predict)
    elif mode.audit:
        with held_data(cfg, ["train", "valid", "test"]):
            say("The data can be used.")
    elif mode.evaluate:
        if not checkpoint.is_file():
            raise TrainerError(f"no checkpoint to evaluate: {checkpoint}; train first, or name one with --checkpoint")
        # What counts as truth, and the size of the cache, are those of the run that made the checkpoint.
        record = read_record(checkpoint)[0]
        categories = tuple(record.get("settings", {}).get("CATEGORIES", cfg.CATEGORIES))
        if categories != cfg.CATEGORIES:
            say(f"CATEGORIES is {cfg.CATEGORIES} here; scored is what the model was trained on: {categories}.")
        cfg.CATEGORIES, cfg.IMG_SIZE = categories, record.get("img_size", cfg.IMG_SIZE)
        with held_data(cfg, ["valid", "test"], checkpoint.parent, Path(cfg.OUTPUT_DIR)) as (splits, cache):
            evaluate_checkpoint(cfg, checkpoint, splits, cache)
    else:
        train(cfg, mode.resume)
    if dist.is_initialized():
        # PyTorch 2.6 hangs in the end of a group whose thread still has to let go of a tensor: hold on to the last one.
        last = torch.zeros(1, device=cfg.DEVICE)
        work = dist.all_reduce(last, async_op=True)
        work.wait()
        dist.destroy_process_group()
        del last, work


# ===== Plumbing: the machine ==========================================================================================


def set_up_machine(cfg: Settings, device: torch.device) -> None:
    """The switches of PyTorch, and of the memory below it, that make training fast."""
    torch.backends.cudnn.benchmark = not cfg.DETERMINISTIC
    torch.use_deterministic_algorithms(cfg.DETERMINISTIC, warn_only=True)
    torch.set_float32_matmul_precision("highest" if cfg.DETERMINISTIC else "high")  # TF32 for what stays float32
    if device.type == "cpu" and platform.libc_ver()[0] == "glibc":
        # glibc gives large blocks back at once, and the system clears every page of the next activation again: a
        # quarter of the time. These two options of mallopt(3) keep them: M_MMAP_MAX = 0, M_TRIM_THRESHOLD = never.
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-4, 0)
        libc.mallopt(-1, -1)


def describe_machine(cfg: Settings, device: torch.device) -> None:
    """Say what the run uses."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    processes = f", {world_size()} processes" if world_size() > 1 else ""
    dtype = str(amp_dtype(cfg.PRECISION, device)).removeprefix("torch.")
    say(f"{name}{processes}, {dtype}, PyTorch {torch.__version__}, data in {cfg.DATA_DIR}, output to {cfg.OUTPUT_DIR}")
    if device.type == "cpu":
        say("No GPU is used: at 256 px expect one to five images per second, hours or days for a real data set. For a\n"
            "first look take --img-size 128 --epochs 5. Each epoch's line says how much time is left.")


def check_gpu(cfg: Settings) -> None:
    """Say why a GPU that is there lies idle. Raises TrainerError for a chosen one that does not work."""
    how = "README.md, 'GPU', says how to get a PyTorch that fits"
    if cfg.DEVICE != "cpu":
        try:
            torch.ones(1, device=cfg.DEVICE).item()
        except RuntimeError as error:  # mostly this PyTorch was built without code for the card: "no kernel image"
            raise TrainerError(f"{cfg.DEVICE} does not work with PyTorch {torch.__version__} ({one_line(error)}).\n"
                               f"If it is not just full or busy: {how}; --device cpu trains without it") from None
    elif shutil.which("nvidia-smi") and torch.version.cuda is None:
        warn("this machine has an NVIDIA GPU, but the installed PyTorch is a CPU-only build, so the GPU lies idle.\n"
             f"Uninstall torch and torchvision first, or pip keeps them; {how}.")
    elif shutil.which("nvidia-smi") and not torch.cuda.is_available():
        warn("PyTorch cannot use the NVIDIA GPU of this machine. Most likely its driver is too old for CUDA "
             f"{torch.version.cuda}, for which PyTorch\n{torch.__version__} was built (nvidia-smi shows what the "
             f"driver can do): update it, or take a PyTorch for an older CUDA;\n{how}. Other causes: a container "
             f"without access to it, or CUDA_VISIBLE_DEVICES, which is {os.environ.get('CUDA_VISIBLE_DEVICES')!r}.")


OUT_OF_MEMORY = ("out of memory",  # the allocator; or "CUDA error: out of memory", when another program fills the card
                 "unable to find an engine",  # cuDNN, whose benchmark swallows the allocator's error
                 "ALLOC_FAILED",  # cuBLAS and cuDNN
                 "not enough memory", "allocate memory")  # CPUs, on Windows and on Linux


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error is one of the many forms in which memory runs out."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or (
        isinstance(error, (RuntimeError, OSError)) and any(words in str(error) for words in OUT_OF_MEMORY))


def available_cores() -> int:
    """CPU cores for this process: those it may use, shared between the processes of torchrun on this machine."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def in_threads(work, items, description: str, most: float = math.inf) -> list:
    """work(item) of every item, in their order, by a thread on each core, but no more than most. Raises Interrupted."""
    # PyTorch's own threads in each of them would be too many. New threads take over what was set last, wherever it was.
    intra_op = torch.get_num_threads()
    pool = ThreadPoolExecutor(min(most, available_cores()), initializer=torch.set_num_threads, initargs=(1,))
    try:
        return list(progress(pool.map(work, items), description, len(items)))
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(intra_op)


# ===== Plumbing: several processes, and one run at a time =============================================================


def rank() -> int:
    """Number of this process among those of torchrun, 0 without it."""
    return dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", 0))


def world_size() -> int:
    """How many processes train together, 1 without torchrun."""
    return dist.get_world_size() if dist.is_initialized() else 1


def gather(value) -> list:
    """The picklable values of all processes, in the order of their ranks; so all of them have come this far."""
    values = [value] * world_size()
    if dist.is_initialized():
        dist.all_gather_object(values, value)
    return values


def start_processes(cfg: Settings) -> None:
    """Under torchrun, join the other processes, each with its own GPU."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return
    gpu = cfg.DEVICE.startswith("cuda")
    if gpu and not dist.is_nccl_available():
        raise TrainerError("several GPUs need Linux: this PyTorch has no NCCL. Start the script without torchrun")
    if gpu:
        cfg.DEVICE = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(cfg.DEVICE)
    # Two hours, because the others wait while the first process of each machine reads all images.
    dist.init_process_group("nccl" if gpu else "gloo", timeout=timedelta(hours=2))


def one_for_all(work, chosen: bool) -> list:
    """The results of work() in the chosen processes, by rank, for all processes; or everywhere the first error."""
    try:
        result = work() if chosen else None
    except (TrainerError, Interrupted) as error:
        result = error
    results = gather(result)
    for found in results:
        if isinstance(found, Exception):
            found.shared = True
            raise found
    return results


@contextlib.contextmanager
def held_data(cfg: Settings, names: list[str], *folders: Path):
    """Hold folders for this run, and give what prepare_data() finds to all processes.

    Each machine reads its data once, into a cache that belongs to the first folder (none: no cache) and is removed at
    the end of the block. Raises TrainerError everywhere.
    """
    local = int(os.environ.get("LOCAL_RANK", 0))
    with contextlib.ExitStack() as held:
        def lock():  # returns nothing: a lock cannot travel between processes
            for folder in {folder.resolve() for folder in folders}:
                held.enter_context(lock_folder(folder))

        one_for_all(lock, rank() == 0)
        if folders and local == 0:
            held.callback(remove_cache, folders[0])
        yield one_for_all(lambda: prepare_data(cfg, names, *folders[:1]), local == 0)[rank() - local]


def lock_folder(folder: Path):
    """Keep other runs out of a folder for as long as the returned context, or this process, lives, however it ends.

    A record lock belongs to the process; flock would live on in its workers. Raises TrainerError if another run is in.
    """
    file = None
    try:
        file = open(folder / ".brain_tumor.lock", "ab")
        if os.name == "nt":
            import msvcrt
            file.seek(0)
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if file and error.errno in (errno.EACCES, errno.EAGAIN, errno.EDEADLK):
            raise TrainerError(f"another run is using {folder}; wait until it has ended, or choose another folder with "
                               "OUTPUT_DIR (--output-dir)") from None
        warn(f"{folder} knows no file locks ({error}): see to it that no second run writes there")
    return file or contextlib.nullcontext()


# ===== Plumbing: messages, signals, files =============================================================================

GO_ON = "The same command with --resume goes on after the last saved epoch."


class TrainerError(Exception):
    """Something the user can put right. main() prints the message, without a stack trace, and ends with exit_code."""

    shared = False  # True: all processes have it, and the first one prints it

    def __init__(self, message: str, exit_code: int = 2):
        # A DataLoader raises what a worker raised with the worker's stack trace as message.
        super().__init__(message.rpartition("TrainerError: ")[2].strip())
        self.exit_code = exit_code


def say(message: str = "", file=None) -> None:
    """Print once, whatever the number of processes, and at once, also into a file."""
    if rank() == 0:
        stream = file or sys.stdout
        try:
            print(message, file=stream, flush=True)
        except OSError:  # a pipe that was closed, a full disk under a log: the run goes on in silence
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def warn(message: str) -> None:
    """A warning on standard error, framed so that it is not missed."""
    say("\n".join(["", "!" * 100, "WARNING: " + message, "!" * 100]), sys.stderr)


def listed(lines: list[str], most: int = 10) -> str:
    """The first lines of a list, indented, and how many more there are."""
    more = [f"... and {len(lines) - most} more"] if len(lines) > most else []
    return "".join(f"\n  - {line}" for line in lines[:most] + more)


def one_line(error) -> str:
    """The beginning of a message that may have many lines."""
    return " ".join(str(error).split())[:200]


class Interrupted(Exception):
    """Ctrl-C or SIGTERM arrived; raised between two steps, never inside one."""


class StopSignal:
    """Handler that remembers Ctrl-C and SIGTERM, for progress() to act on; a second signal ends at once."""

    signum = 0
    saved = False  # whether there is a state to go on from

    def __call__(self, signum, _frame):
        if self.signum:
            raise KeyboardInterrupt
        self.signum = signum
        say(f"\n{signal.Signals(signum).name}: stopping after this step (again: at once)", sys.stderr)


STOP = StopSignal()


def progress(items, description: str, total: int | None = None):
    """Iterate with a progress bar, and stop between two items after a signal. Every long loop goes through here."""
    # disable=None: no bar where standard error is not a terminal.
    with tqdm(items, description, total, leave=False, disable=None if rank() == 0 else True, dynamic_ncols=True) as bar:
        for item in bar:
            if STOP.signum:
                raise Interrupted
            yield item


def write_file(path: Path, content, required: bool = False) -> None:
    """Write a file so that it is either complete or unchanged: temporary name, flush to disk, rename.

    content: bytes, or a function that gets the open binary file. A failure is a warning, or TrainerError if required.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")  # the same name every time: a killed run leaves at most one
    try:
        with open(temporary, "wb") as file:
            content(file) if callable(content) else file.write(content)
            file.flush()
            os.fsync(file.fileno())
        for attempt in range(6):
            try:
                os.replace(temporary, path)
                break
            except PermissionError:  # on Windows, virus scanners and viewers hold files open for a moment
                if attempt == 5:
                    raise
                time.sleep(0.2)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        if not isinstance(error, (OSError, RuntimeError)):  # torch.save reports a full disk as RuntimeError
            raise
        if required:
            raise TrainerError(f"cannot write {path}: {error}\nWhat was saved before is unharmed. Free disk space, or "
                               f"mend the folder. {GO_ON if STOP.saved else 'Then start again.'}", 1) from error
        warn(f"cannot write {path}: {error} (going on without it)")


def write_table(path: Path, rows: list[dict]) -> None:
    """Write rows as a CSV file with the columns of the last one: before a resume, metrics may have been edited."""
    table = io.StringIO()
    writer = csv.DictWriter(table, rows[-1], extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_file(path, table.getvalue().encode("utf-8"))


def write_image(path: Path, image: np.ndarray) -> None:
    """Write a uint8 grey [H, W] or RGB [H, W, 3] array as PNG; cv2.imwrite fails on non-ASCII paths on Windows."""
    png = cv2.imencode(".png", image if image.ndim == 2 else image[..., ::-1])[1]
    write_file(path, png.tobytes(), required=True)


def remedy(error: BaseException) -> str:
    """What helps against an error that has a cause outside this script; empty for one that nobody foresaw."""
    if "DataLoader worker (pid" in str(error):  # it died; what it has raised itself is worded otherwise
        return ("a process that prepares images died, usually because memory ran out. Fewer of them need less: "
                "--num-workers 0")
    if is_out_of_memory(error):
        return (f"memory ran out ({one_line(error)}). What helps: a smaller BATCH_SIZE with more ACCUMULATION_STEPS, "
                "fewer NUM_WORKERS, or a new run with a smaller IMG_SIZE")
    return str(error) if isinstance(error, OSError) else ""


def main(argv: list[str] | None = None) -> int:
    """Run the script. argv: the words of the command line, default sys.argv[1:].

    Returns the exit code: 0 done, 1 failed on the way, 2 something for the user to put right, 130 Ctrl-C, 143 SIGTERM.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a Chinese path must not end a run whose output goes to a file
            stream.reconfigure(errors="backslashreplace")
    cv2.setNumThreads(0)  # what runs in parallel here are threads and processes of our own
    # Where workers come from a fork server, they share what it has imported.
    multiprocessing.set_forkserver_preload(["albumentations", "segmentation_models_pytorch", "matplotlib.figure"])
    STOP.signum, STOP.saved, code, message = 0, False, 0, ""
    handlers = {number: signal.signal(number, STOP) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        run_mode(*read_settings(argv))
    except (Interrupted, KeyboardInterrupt):
        STOP.signum = STOP.signum or signal.SIGINT
    except TrainerError as error:
        # What a process finds before it has met the others, the first one finds too.
        silent = rank() > 0 and (error.shared or not dist.is_initialized())
        code, message = error.exit_code, "" if silent else str(error)
        error.__traceback__ = None  # what a worker raised refers to itself through it, and so keeps the workers
    except Exception as error:
        if not STOP.signum:  # a signal to all processes ends workers too, which arrives here as their failure
            message = remedy(error)
            if not message:
                traceback.print_exc()
                message = "nobody foresaw this; the lines above say where it happened."
            code, message = 1, message + (f"\n{GO_ON}" if STOP.saved else "")
        error.__traceback__ = None
    finally:
        gc.collect()  # lets go of the frames of a failed run, and so ends its workers
        for number, handler in handlers.items():
            signal.signal(number, handler)
    if STOP.signum:
        code, STOP.signum = 128 + STOP.signum, 0
        say(f"\nStopped. {GO_ON if STOP.saved else ''}")
    elif message:
        print(f"error{f' (process {rank()})' if rank() else ''}: {message}", file=sys.stderr, flush=True)
    return code


if __name__ == "__main__":
    exit_code = main()
    if any(thread.name == "writer" for thread in threading.enumerate()):  # after a second Ctrl-C
        os._exit(exit_code)  # Python cannot end in order while a thread is in C++ code
    sys.exit(exit_code)
