"""Brain-tumour segmentation: UNet++ with a ResNet34 encoder, trained on a folder of MRI slices with COCO polygons.

    python brain_tumor_integrated_smp.py                                   train with the constants below
    python brain_tumor_integrated_smp.py --img-size 128 --epochs 3         any constant, without editing
    python brain_tumor_integrated_smp.py --resume                          go on with an interrupted run
    python brain_tumor_integrated_smp.py --audit                           check the data and stop
    python brain_tumor_integrated_smp.py --evaluate                        threshold and test scores of the best model
    python brain_tumor_integrated_smp.py --predict scan.png folder/        masks and overlays for new images
    torchrun --nproc-per-node=2 brain_tumor_integrated_smp.py              two GPUs, nothing to edit

The data folder holds train/, valid/ and, if there is one, test/, each with its images and `_annotations.coco.json`.
For other code: `from brain_tumor_integrated_smp import load_model, predict_mask`. Importing does nothing else.
Measured results, with command, hardware and versions, stand in README.md.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import functools
import hashlib
import io
import itertools
import json
import math
import multiprocessing
import os
import pickle
import platform
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import types
import uuid
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # otherwise the import looks for a new version over the network

import albumentations as A
import cv2
import matplotlib
import numpy as np
import pycocotools.mask as coco_mask
import segmentation_models_pytorch as smp
import torch
import torch.distributed as dist
import torchvision
from matplotlib.figure import Figure
from tqdm import tqdm

try:
    import fcntl  # file locks on Linux and macOS
except ImportError:  # Windows refuses to delete a file that is in use, which serves the same purpose
    fcntl = None

# ======================================================================================================================
# Settings: edit them here, or override any of them on the command line (IMG_SIZE = 256 is --img-size 256)
# ======================================================================================================================

# --- data and output
DATA_DIR = str(Path(__file__).resolve().parent)  # folder that holds train/, valid/ and (optional) test/
OUTPUT_DIR = str(Path(__file__).resolve().parent)  # folder for checkpoints, tables and pictures
CATEGORIES = ()  # names of the COCO categories that count as tumour; empty: all of them
SKIP_BAD_IMAGES = False  # True: go on without unreadable images (they are listed) instead of stopping
CACHE_GB = 8.0  # GB; decoded images are kept on disk for the length of a run if they fit; 0: decode every time
CACHE_DIR = tempfile.gettempdir()  # folder for that temporary file; a fast local disk is best

# --- images and loading
IMG_SIZE = 256  # pixels, a multiple of 32, at least 64; the network sees squares of this size
BATCH_SIZE = 16  # images per forward pass, over all GPUs together, at least 1; smaller if memory runs out
NUM_WORKERS = 4  # processes that augment images, 0 or more (0: none); never more than the available cores
MEAN = (0.485, 0.456, 0.406)  # per-channel mean of RGB values in 0..1 (ImageNet's, as the encoder expects)
STD = (0.229, 0.224, 0.225)  # per-channel standard deviation, likewise

# --- model
ENCODER = "resnet34"  # any encoder name of segmentation_models_pytorch that UNet++ accepts
ENCODER_WEIGHTS = "imagenet"  # "imagenet" (downloaded), None (random start), or a local weights file
INIT_WEIGHTS = None  # a .pth of this script to start from (staged training), or None

# --- optimisation
EPOCHS = 80  # passes over the training set, at least 1
LR = 1e-4  # initial learning rate of AdamW, more than 0
WEIGHT_DECAY = 1e-2  # AdamW's decoupled weight decay, 0 or more
LOSS = "dice_bce"  # "dice_bce", "dice_focal" or "focal_tversky" (favours finding all of a tumour)
ACCUMULATION_STEPS = 1  # batches per optimizer step, at least 1; raise it when BATCH_SIZE has to be small
GRAD_CLIP = 1.0  # largest gradient norm, 0: no clipping
PLATEAU_FACTOR = 0.5  # the learning rate is multiplied by this when validation Dice stalls, between 0 and 1
PLATEAU_PATIENCE = 10  # epochs without a better validation Dice before that happens
EARLY_STOPPING = 25  # epochs without a better validation Dice before training ends, 0: never
SEED = 42  # 0 or more; weights, order and augmentation follow from it

# --- machine
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # "cuda", "cuda:1", "cpu"
PRECISION = "auto"  # "auto" (float16 on CUDA, bfloat16 on CPUs that have it), "float32", "bfloat16", "float16"
COMPILE = False  # True: torch.compile the model (a long first epoch)
DETERMINISTIC = False  # True: slower, but repeatable to the last bit on one GPU
SYNC_BATCHNORM = True  # True: with several GPUs, BatchNorm sees the whole batch and not each GPU's part

CONSTANTS = tuple(name for name in globals() if name.isupper() and len(name) > 1)  # all settings above, in this order

# What each setting must satisfy. Whatever is not here is checked where it is used.
RULES = {
    "CACHE_GB": ("0 or more", lambda v: v >= 0),
    "IMG_SIZE": ("a multiple of 32, at least 64", lambda v: v >= 64 and v % 32 == 0),
    "BATCH_SIZE": ("at least 1", lambda v: v >= 1),
    "NUM_WORKERS": ("0 or more", lambda v: v >= 0),
    "MEAN": ("three numbers", lambda v: len(v) == 3 and all(math.isfinite(x) for x in v)),
    "STD": ("three numbers above 0", lambda v: len(v) == 3 and all(0 < x < math.inf for x in v)),
    "ENCODER": ("an encoder of segmentation_models_pytorch, e.g. resnet34",
                lambda v: v in smp.encoders.get_encoder_names()),
    "EPOCHS": ("at least 1", lambda v: v >= 1),
    "LR": ("a number above 0", lambda v: 0 < v < math.inf),
    "WEIGHT_DECAY": ("0 or more", lambda v: 0 <= v < math.inf),
    "LOSS": ("one of dice_bce, dice_focal, focal_tversky", lambda v: v in LOSSES),
    "ACCUMULATION_STEPS": ("at least 1", lambda v: v >= 1),
    "GRAD_CLIP": ("0 or more", lambda v: 0 <= v < math.inf),
    "PLATEAU_FACTOR": ("between 0 and 1", lambda v: 0 < v < 1),
    "PLATEAU_PATIENCE": ("0 or more", lambda v: v >= 0),
    "EARLY_STOPPING": ("0 or more", lambda v: v >= 0),
    "SEED": ("0 or more", lambda v: 0 <= v < 2**63),
    "PRECISION": ("one of auto, float32, bfloat16, float16",
                  lambda v: v in ("auto", "float32", "bfloat16", "float16")),
}

# A resumed run may differ from the saved one in these; BATCH_SIZE * ACCUMULATION_STEPS has to stay the same.
RESUME_MAY_CHANGE = ("EPOCHS", "EARLY_STOPPING", "NUM_WORKERS", "DEVICE", "PRECISION", "COMPILE", "DETERMINISTIC",
                     "SYNC_BATCHNORM", "CACHE_GB", "CACHE_DIR", "DATA_DIR", "OUTPUT_DIR", "BATCH_SIZE",
                     "ACCUMULATION_STEPS", "ENCODER_WEIGHTS", "INIT_WEIGHTS", "SKIP_BAD_IMAGES")


class TrainerError(Exception):
    """Something the user can put right. main() prints the message, without a stack trace, and ends with exit_code."""

    def __init__(self, message: str, exit_code: int = 2):
        super().__init__(message)
        self.exit_code = exit_code


class Interrupted(Exception):
    """Ctrl-C or SIGTERM arrived; raised between two steps, never inside one."""


class ArgumentParser(argparse.ArgumentParser):
    """argparse that reports a wrong command line in one sentence, like every other error of the user."""

    def error(self, message):
        raise TrainerError(f"{message} (--help lists the options)")


def default_settings() -> types.SimpleNamespace:
    """The constants above as attributes of one object: what functions here call `cfg`."""
    return types.SimpleNamespace(**{name: globals()[name] for name in CONSTANTS})


def read_settings(argv: list[str] | None) -> tuple[types.SimpleNamespace, argparse.Namespace]:
    """Merge the command line into the constants.

    argv: the words after the program's name, or None for sys.argv[1:].
    Returns (cfg, mode): cfg holds every constant under its own name; mode says what to do (train if nothing is set).
    Raises TrainerError for an unknown flag, a wrong type or an impossible value.
    """
    parser = ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False,
                            formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=32, width=110))
    group = parser.add_argument_group("what to do (default: train)")
    group.add_argument("--resume", action="store_true", help="go on with the interrupted run in OUTPUT_DIR")
    group.add_argument("--audit", action="store_true", help="check the data, print what was found, and stop")
    group.add_argument("--evaluate", action="store_true", help="only find the threshold and score the test set")
    group.add_argument("--predict", nargs="+", metavar="PATH", help="segment image files, or all images of folders")
    group.add_argument("--checkpoint", metavar="FILE", help="for --evaluate and --predict (default: the one in OUTPUT_DIR)")

    def text(word: str) -> str | None:
        return None if word.lower() == "none" else word

    # Names, types and defaults come from the constants, groups and help texts from the comments beside them.
    lines = re.findall(r"^# --- (.+)$|^([A-Z_]+) = .*?  # (.+)$", Path(__file__).read_text(encoding="utf-8"), re.M)
    for title, name, comment in lines:
        if title:
            group = parser.add_argument_group(title)
        if name not in CONSTANTS:
            continue
        value, flag = globals()[name], "--" + name.lower().replace("_", "-")
        options = {"dest": name, "default": value, "help": f"{comment} [{value}]".replace("%", "%%")}
        if isinstance(value, bool):
            group.add_argument(flag, action=argparse.BooleanOptionalAction, **options)
        elif isinstance(value, tuple):
            group.add_argument(flag, nargs="*", type=type(value[0]) if value else str, metavar="VALUE", **options)
        else:
            kind = text if value is None or isinstance(value, str) else type(value)
            group.add_argument(flag, type=kind, metavar="TEXT" if kind is text else kind.__name__.upper(), **options)
    given = vars(parser.parse_args(argv))
    cfg = types.SimpleNamespace(**{name: given.pop(name) for name in CONSTANTS})
    cfg.CATEGORIES, cfg.MEAN, cfg.STD = tuple(cfg.CATEGORIES), tuple(cfg.MEAN), tuple(cfg.STD)
    mode = argparse.Namespace(**given)
    if sum(map(bool, (mode.resume, mode.audit, mode.evaluate, mode.predict))) > 1:
        raise TrainerError("use only one of --resume, --audit, --evaluate and --predict at a time")
    check_settings(cfg, needs_data=not mode.predict)
    return cfg, mode


def check_settings(cfg: types.SimpleNamespace, needs_data: bool = True) -> None:
    """Raise TrainerError for the first setting that is impossible, before any work starts."""
    for name, (legal, holds) in RULES.items():
        value = getattr(cfg, name)
        try:
            good = holds(value)
        except TypeError:  # an edited constant of the wrong type
            good = False
        if not good:
            raise TrainerError(f"{name} is {value!r}, but must be {legal}")
    try:
        device = torch.device(cfg.DEVICE)
    except (RuntimeError, TypeError):
        raise TrainerError(f"DEVICE is {cfg.DEVICE!r}, but must be cuda, cuda:N or cpu") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise TrainerError(f"DEVICE is {cfg.DEVICE!r}, but PyTorch sees {torch.cuda.device_count()} CUDA GPUs; "
                           "use --device cpu, or see 'GPU' in the README's questions")
    if device.type == "cpu" and cfg.PRECISION == "float16":
        raise TrainerError("PRECISION is float16, which needs a CUDA device; use auto, bfloat16 or float32")
    if cfg.BATCH_SIZE < int(os.environ.get("WORLD_SIZE", 1)):
        raise TrainerError(f"BATCH_SIZE is {cfg.BATCH_SIZE}, but must be at least the number of processes")
    if not cfg.DATA_DIR or (needs_data and not Path(cfg.DATA_DIR).is_dir()):
        raise TrainerError(f"data folder not found: {cfg.DATA_DIR}; set DATA_DIR or --data-dir to the folder "
                           "that holds train/ and valid/")
    try:
        Path(cfg.OUTPUT_DIR).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=cfg.OUTPUT_DIR):
            pass
    except (OSError, TypeError) as error:
        raise TrainerError(f"cannot write into the output folder {cfg.OUTPUT_DIR} ({error}); "
                           "choose another one with OUTPUT_DIR or --output-dir") from None


# ======================================================================================================================
# Processes, messages, interruption and files: the few mechanisms that everything below shares
# ======================================================================================================================


def rank() -> int:
    """Number of this process among those of torchrun, 0 without it."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """How many processes train together, 1 without torchrun."""
    return dist.get_world_size() if dist.is_initialized() else 1


def gather(value) -> list:
    """The picklable values of all processes, in the order of their ranks."""
    values = [value]
    if dist.is_initialized():
        values = [None] * world_size()
        dist.all_gather_object(values, value)
    return values


def available_cores() -> int:
    """CPU cores that this process may use, shared between the processes of torchrun on this machine."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def say(message: str = "") -> None:
    """Print once, whatever the number of processes, and at once, also into a file."""
    if rank() == 0:
        print(message, flush=True)


def warn(message: str) -> None:
    """Print a warning on standard error, once, framed so that it is not missed."""
    if rank() == 0:
        print("\n".join(["", "!" * 100, "WARNING: " + message, "!" * 100]), file=sys.stderr, flush=True)


def listed(lines: list[str], most: int = 10) -> str:
    """The first lines of a list, indented, and how many more there are."""
    more = [f"... and {len(lines) - most} more"] if len(lines) > most else []
    return "".join(f"\n  - {line}" for line in lines[:most] + more)


class StopSignal:
    """Remembers Ctrl-C and SIGTERM. progress() then raises Interrupted between two steps; a second signal ends at once."""

    def __init__(self):
        self.signum = 0

    def __call__(self, signum, _frame):
        if self.signum:
            raise KeyboardInterrupt
        self.signum = signum
        print(f"\n{signal.Signals(signum).name}: stopping after this step (again: at once)", file=sys.stderr, flush=True)

    @contextlib.contextmanager
    def installed(self):
        """Catch both signals inside this block. Only the main thread can; elsewhere nothing is installed."""
        self.signum = 0
        try:
            previous = {number: signal.signal(number, self) for number in (signal.SIGINT, signal.SIGTERM)}
        except ValueError:
            previous = {}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)


STOP = StopSignal()


def progress(items, description: str, total: int | None = None):
    """Iterate with a progress bar (none when the output goes to a file); every long loop goes through here."""
    # disable=None switches the bar off when standard error is not a terminal.
    with tqdm(items, desc=description, total=total, disable=None if rank() == 0 else True, leave=False,
              dynamic_ncols=True) as bar:
        for item in bar:
            if STOP.signum:
                raise Interrupted
            yield item


def write_file(path: Path, write, required: bool = False) -> bool:
    """Write a file so that it is either complete or unchanged: temporary name, flush to disk, rename.

    write: a function that gets the open binary file. A failure is a warning, or TrainerError if required.
    Returns whether the file was written.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")  # the same name every time: a killed run leaves at most one
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        for attempt in itertools.count():
            try:
                os.replace(temporary, path)
                return True
            except PermissionError:  # on Windows, virus scanners and viewers hold files open for a moment
                if attempt == 5:
                    raise
                time.sleep(0.2)
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as RuntimeError
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        reason = f"cannot write {path}: {error}"
        if required:
            raise TrainerError(f"{reason}\nWhat was saved before is unharmed. Free some disk space or mend the folder, "
                               "then go on with --resume.", 1) from error
        warn(reason + " (going on without it)")
        return False


def write_text(path: Path, content: str, required: bool = False) -> bool:
    """write_file for text, encoded as UTF-8."""
    return write_file(path, lambda file: file.write(content.encode("utf-8")), required)


def write_table(path: Path, rows: list[dict]) -> bool:
    """Write rows with the same keys as a CSV file."""
    table = io.StringIO()
    writer = csv.DictWriter(table, rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return write_text(path, table.getvalue())


def write_image(path: Path, image: np.ndarray) -> bool:
    """Write a uint8 grey [H, W] or RGB [H, W, 3] array as PNG; cv2.imwrite fails on non-ASCII paths on Windows."""
    png = cv2.imencode(".png", image if image.ndim == 2 else image[..., ::-1])[1]
    return write_file(path, lambda file: file.write(png.tobytes()))


# ======================================================================================================================
# Annotations and image files
# ======================================================================================================================

ANNOTATION_FILE = "_annotations.coco.json"
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp"}
LARGEST_SIDE = 20_000  # pixels; a larger size in a JSON is a mistake that would only exhaust the memory
SAMPLE_MARK = "sample data of brain_tumor_integrated_smp.py"  # in the JSON of the phantoms that come with the script


@dataclass
class Record:
    """One image of a split with its merged mask."""

    number: int  # position in the JSON's list of images; augmentation depends on it
    path: str
    file_name: str  # as in the JSON
    height: int  # pixels, of the annotation's coordinate system
    width: int
    rle: dict  # union of all annotations as a compressed COCO RLE
    tumours: int  # number of annotations with an area
    slot: int = -1  # place in the cache

    def mask(self) -> np.ndarray:
        """The mask at the annotation's resolution: uint8 [height, width], 0 or 1."""
        return coco_mask.decode(self.rle)


def is_count(value, most: int) -> bool:
    """Whether a JSON value is a whole number from 1 to most."""
    return type(value) in (int, float) and value == value // 1 and 1 <= value <= most


def segmentation_to_rle(segmentation, height: int, width: int) -> tuple[dict | None, list[str]]:
    """Rasterise one COCO segmentation with pycocotools.

    segmentation: a list of polygons [x1, y1, x2, y2, ...] in pixels, or an RLE dict, compressed or not.
    Returns (compressed RLE of the union, or None if nothing is left; remarks about what is suspicious).
    Raises ValueError when it is no segmentation at all.
    """
    if isinstance(segmentation, dict):
        size, counts = segmentation.get("size"), segmentation.get("counts")
        if not isinstance(size, list) or size != [height, width]:
            raise ValueError(f"its RLE has the size {size}, its image {[height, width]}")
        if isinstance(counts, list):
            if not all(type(n) is int and n >= 0 for n in counts) or sum(counts) != height * width:
                raise ValueError("its RLE counts do not add up to height times width")
            return coco_mask.frPyObjects(segmentation, height, width), []
        if not isinstance(counts, (str, bytes)):
            raise ValueError("its RLE has no counts")
        rle = {"size": size, "counts": counts.encode("ascii", "replace") if isinstance(counts, str) else counts}
        coco_mask.decode(rle)  # raises ValueError when the counts are damaged
        return rle, []
    if not isinstance(segmentation, list) or not segmentation:
        raise ValueError("it has no segmentation, only a box perhaps: export the data as 'COCO Segmentation'")
    polygons, remarks = [], []
    for polygon in segmentation:
        try:
            xy = np.asarray(polygon, np.float64).reshape(-1, 2)
        except (ValueError, TypeError):
            raise ValueError("a polygon is not a flat list of x, y pairs") from None
        if not np.isfinite(xy).all():
            raise ValueError("a polygon has coordinates that are not finite")
        if len(xy) < 3:
            remarks.append("polygon with fewer than three points (ignored)")
            continue
        x, y = xy.T
        if abs(np.dot(x, np.roll(y, 1)) - np.dot(y, np.roll(x, 1))) < 1e-6:  # shoelace formula
            remarks.append("polygon without area")
        if (xy < -0.5).any() or (xy > (width + 0.5, height + 0.5)).any():
            remarks.append("polygon outside the image (clipped)")
        # pycocotools clips by itself, but needs memory in proportion to the distance: keep that bounded.
        far = 4 * max(height, width)
        polygons.append(np.clip(xy, -far, far + max(height, width)).ravel().tolist())
    rle = coco_mask.merge(coco_mask.frPyObjects(polygons, height, width)) if polygons else None
    return rle, remarks


def read_coco(split_dir: str | Path, categories: tuple = ()) -> tuple[list[Record], dict]:
    """Read the `_annotations.coco.json` of a split, with all checks that need no pixels.

    categories: names of the categories that count as tumour; empty: all.
    Returns (records in the order of the JSON, facts): facts has the counts `annotations` and `unnamed` (image files
    that no entry names), `remarks` (suspicious annotations, as sentences) and `sample` (made by this project).
    Raises TrainerError, naming all offenders, when the folder or the JSON cannot be used.
    """
    split_dir = Path(split_dir)
    json_path = split_dir / ANNOTATION_FILE
    if not split_dir.is_dir():
        raise TrainerError(f"folder not found: {split_dir}; the data folder must hold train/ and valid/, each with images "
                           f"and {ANNOTATION_FILE} (DATA_DIR or --data-dir names the data folder)")
    if not json_path.is_file():
        raise TrainerError(f"file not found: {json_path}; export the data in the format 'COCO Segmentation', which has "
                           f"one {ANNOTATION_FILE} in each folder")
    try:
        coco = json.loads(json_path.read_bytes().decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise TrainerError(f"{json_path} is not valid JSON ({error}); export or copy it again") from None
    except OSError as error:
        raise TrainerError(f"cannot read {json_path}: {error}") from None
    for key in ("images", "annotations", "categories"):
        if not isinstance(coco, dict) or not isinstance(coco.get(key), list) \
                or not all(isinstance(entry, dict) for entry in coco[key]):
            raise TrainerError(f"{json_path} is not a COCO file: it has no list '{key}'; export the data in the format "
                               "'COCO Segmentation'")
    if not coco["images"]:
        raise TrainerError(f"{json_path} lists no images; export the data again, or take the folder out")
    names = {str(entry.get("id")): str(entry.get("name")) for entry in coco["categories"]}
    unknown = sorted(set(categories) - set(names.values()))
    if unknown:
        raise TrainerError(f"CATEGORIES names {', '.join(unknown)}, but {json_path} has only: "
                           f"{', '.join(sorted(set(names.values())))}")

    problems, remarks, records, masks = [], [], {}, {}
    for number, entry in enumerate(coco["images"]):
        key, name = str(entry.get("id")), entry.get("file_name")
        if entry.get("id") is None or not isinstance(name, str) or not name:
            problems.append(f"image entry {number} has no id or no file_name")
            continue
        inside = os.path.normpath(name.replace("\\", "/"))  # some tools on Windows write back-slashes
        if os.path.isabs(inside) or inside.startswith("..") or ":" in inside[:2] or "\0" in inside:
            problems.append(f"image id {key}: the file name {name!r} points outside its folder")
        elif not (is_count(entry.get("height"), LARGEST_SIDE) and is_count(entry.get("width"), LARGEST_SIDE)):
            problems.append(f"{name}: height {entry.get('height')!r} and width {entry.get('width')!r} must be "
                            f"whole numbers of pixels up to {LARGEST_SIDE}")
        elif key in records:
            problems.append(f"image id {key} is used twice: {records[key].file_name} and {name}")
        else:
            height, width = int(entry["height"]), int(entry["width"])
            records[key] = Record(number, str(split_dir / inside), name, height, width, {}, 0)
            masks[key] = []
    twice = [name for name, uses in _count(record.path for record in records.values()).items() if uses > 1]
    problems += [f"{Path(path).name} is listed as two images; keep one entry" for path in twice]
    counted = 0
    listed_ids = {str(entry.get("id")) for entry in coco["images"]}
    for entry in coco["annotations"]:
        label, key = f"annotation id {entry.get('id')}", str(entry.get("image_id"))
        if key not in records:
            if key not in listed_ids:
                problems.append(f"{label} belongs to the image id {key}, which the file does not list")
            continue
        if categories and names.get(str(entry.get("category_id"))) not in categories:
            continue
        counted += 1
        record = records[key]
        try:
            rle, odd = segmentation_to_rle(entry.get("segmentation"), record.height, record.width)
        except (ValueError, TypeError, OverflowError) as error:
            problems.append(f"{label} of {record.file_name}: {error}")
            continue
        remarks += [f"{record.file_name}, {label}: {remark}" for remark in odd]
        if rle is not None:
            masks[key].append(rle)
            record.tumours += bool(coco_mask.area(rle))
    if problems:
        raise TrainerError(f"{json_path} cannot be used, {len(problems)} problem(s):{listed(problems)}\n"
                           "Correct the file, or export it again.")
    for key, record in records.items():
        empty = coco_mask.frPyObjects({"size": [record.height, record.width],
                                       "counts": [record.height * record.width]}, record.height, record.width)
        record.rle = coco_mask.merge(masks[key] or [empty])
    named = {os.path.normcase(record.path) for record in records.values()}
    unnamed = [path for path in split_dir.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES
               and os.path.normcase(path) not in named]
    info = coco.get("info")
    return list(records.values()), {
        "annotations": counted, "unnamed": len(unnamed), "remarks": remarks,
        "sample": isinstance(info, dict) and SAMPLE_MARK in str(info.get("description"))}


def _count(items) -> dict:
    """How often each item occurs."""
    counts = {}
    for item in items:
        counts[item] = counts.get(item, 0) + 1
    return counts


def read_image(path: str | Path, height: int | None = None, width: int | None = None) -> np.ndarray:
    """Read any common image file as RGB uint8 [H, W, 3], values 0..255.

    Grey and palette images become RGB, transparency is dropped, and 16-bit images are scaled from their own
    minimum..maximum to 0..255. An EXIF orientation is applied, unless only the unturned picture has the given
    height and width (pixels): then the annotation tool did not turn it either.
    Raises TrainerError when the file is missing, empty or damaged.
    """
    try:
        data = np.fromfile(path, np.uint8)  # cv2.imread returns None for non-ASCII paths on Windows
    except OSError as error:
        raise TrainerError(f"{path}: {'the file is missing' if not Path(path).exists() else error}") from None
    if not data.size:
        raise TrainerError(f"{path}: the file is empty")
    flags = cv2.IMREAD_COLOR | cv2.IMREAD_ANYDEPTH
    try:
        image = cv2.imdecode(data, flags)
        if image is not None and height and image.shape[:2] != (height, width):
            unturned = cv2.imdecode(data, flags | cv2.IMREAD_IGNORE_ORIENTATION)
            image = unturned if unturned.shape[:2] == (height, width) else image
    except cv2.error:
        image = None
    if image is None:
        raise TrainerError(f"{path}: not an image, or cut short ({data.size} bytes); copy or export it again")
    if image.dtype != np.uint8:
        image = cv2.normalize(image, None, 0, 255, cv2.NORM_MINMAX, cv2.CV_8U)
    return np.ascontiguousarray(image[..., ::-1])


def resize(array: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resize [H, W] or [H, W, C] without aliasing: averages areas where it shrinks, interpolates where it enlarges."""
    small = (min(width, array.shape[1]), min(height, array.shape[0]))
    if small != array.shape[1::-1]:
        array = cv2.resize(array, small, interpolation=cv2.INTER_AREA)
    if small != (width, height):
        array = cv2.resize(array, (width, height), interpolation=cv2.INTER_LINEAR)
    return array


def resize_mask(mask: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resize a uint8 0/1 mask [H, W]: a pixel counts when at least half of its area is tumour. Centred, unlike NEAREST."""
    return (resize(mask.astype(np.float32), height, width) >= 0.5).astype(np.uint8)


def load_sample(record: Record, img_size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Decode, rasterise and resize one image: the deterministic part, before any augmentation.

    Returns (RGB uint8 [S, S, 3], mask uint8 0/1 [S, S], RGB uint8 [H, W, 3] as in the file).
    """
    image = read_image(record.path, record.height, record.width)
    return resize(image, img_size, img_size), resize_mask(record.mask(), img_size, img_size), image


# ======================================================================================================================
# One pass over all files: audit and cache
# ======================================================================================================================


class PixelCache:
    """Decoded and resized images of a run: uint8 [count, S, S, 4] (RGB and mask) in one temporary file.

    All workers and processes of a machine map the same file, so the pixels exist once, under every start method and
    without /dev/shm. A lock marks the file as in use; the next start removes what a killed run has left.
    """

    PREFIX = "brain_tumor_cache_"

    def __init__(self, folder: str, count: int, img_size: int):
        """Raises OSError when the folder has no room."""
        self.shape = (count, img_size, img_size, 4)
        self.path = Path(folder) / f"{self.PREFIX}{uuid.uuid4().hex}.bin"
        self._array = None
        self.lock = open(self.path, "w+b")
        try:
            if fcntl:
                fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            size = math.prod(self.shape)
            if hasattr(os, "posix_fallocate"):  # a sparse file on a full disk would end in a bus error later
                os.posix_fallocate(self.lock.fileno(), 0, size)
            else:
                self.lock.truncate(size)
        except OSError:
            self.close()
            raise

    @property
    def array(self) -> np.ndarray:
        """The memory map, opened by each process on its first use."""
        if self._array is None:
            self._array = np.memmap(self.path, np.uint8, "r+", shape=self.shape)
        return self._array

    def __getstate__(self):
        return {"shape": self.shape, "path": self.path, "lock": None, "_array": None}  # not the pixels

    def close(self) -> None:
        """Remove the file. On Windows a worker may still hold it for a moment: then the next start removes it."""
        self._array = None
        self.lock.close()
        with contextlib.suppress(OSError):
            self.path.unlink(missing_ok=True)

    @classmethod
    def remove_leftovers(cls, folder: str) -> int:
        """Delete cache files whose run no longer exists; returns how many."""
        removed = 0
        for path in Path(folder).glob(cls.PREFIX + "*.bin"):
            with contextlib.suppress(OSError):  # locked or held open: it belongs to a run that is still going on
                with open(path, "rb") as file:
                    if fcntl:
                        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink()
                removed += 1
        return removed


def open_cache(cfg: types.SimpleNamespace, count: int) -> PixelCache | None:
    """A cache for count images, or None, said, when it is switched off, too large or finds no room."""
    PixelCache.remove_leftovers(cfg.CACHE_DIR)
    gigabytes = count * cfg.IMG_SIZE**2 * 4 / 1e9
    try:
        free = shutil.disk_usage(cfg.CACHE_DIR).free / 1e9
        if cfg.CACHE_GB == 0:
            reason = "CACHE_GB is 0"
        elif gigabytes > cfg.CACHE_GB:
            reason = f"they need {gigabytes:.1f} GB, CACHE_GB allows {cfg.CACHE_GB:g}"
        elif gigabytes > 0.9 * free:
            reason = f"they need {gigabytes:.1f} GB, {cfg.CACHE_DIR} has {free:.1f} free"
        else:
            return PixelCache(cfg.CACHE_DIR, count, cfg.IMG_SIZE)
    except OSError as error:
        reason = str(error)
    say(f"Decoding images again in every epoch, which is slower: {reason}.")
    return None


@dataclass
class Split:
    """A checked split: its records and what the audit found."""

    records: list[Record]  # of the images that can be read
    facts: dict


def scan(record: Record, img_size: int, cache: PixelCache | None) -> dict:
    """Read one image file once: fill its cache slot and report on it. A damaged file is reported, not raised."""
    try:
        image, mask, full = load_sample(record, img_size)
    except TrainerError as error:
        return {"error": str(error)}
    if cache is not None:
        cache.array[record.slot, ..., :3], cache.array[record.slot, ..., 3] = image, mask
    area = int(coco_mask.area(record.rle))
    return {"error": None, "digest": hashlib.blake2b(full, digest_size=16).hexdigest() + f"_{full.shape}",
            "area": area, "share": area / (record.height * record.width), "vanishes": area > 0 and not mask.any(),
            "resized": full.shape[:2] != (record.height, record.width)}


def prepare_data(cfg: types.SimpleNamespace, names: list[str]) -> tuple[dict[str, Split], PixelCache | None]:
    """Read, check and cache the splits, print the audit, and stop at bad data.

    names: of the splits; "test" may be missing on disk, and is left out then.
    Returns (splits by name, cache or None). The caller closes the cache. Raises TrainerError.
    """
    splits = {}
    for name in names:
        folder = Path(cfg.DATA_DIR) / name
        if name == "test" and not folder.is_dir():
            say(f"No test folder ({folder}): the final score on test is left out.")
            continue
        splits[name] = Split(*read_coco(folder, cfg.CATEGORIES))
    own = [name for name, split in splits.items() if not split.facts["sample"]]
    for name in [name for name in splits if own and name not in own]:
        if name != "test":
            raise TrainerError(f"{Path(cfg.DATA_DIR) / name} still holds the sample phantoms of this script, while "
                               f"{', '.join(own)} holds other data; put your own {name} set there")
        say("The test folder still holds the sample phantoms of this script: the score on test is left out.")
        del splits[name]
    records = [record for split in splits.values() for record in split.records]
    for slot, record in enumerate(records):
        record.slot = slot
    cache = open_cache(cfg, len(records))
    try:
        with ThreadPoolExecutor(available_cores()) as pool:  # OpenCV decodes and resizes without Python's lock
            jobs = (functools.partial(scan, record, cfg.IMG_SIZE, cache) for record in records)
            reports = list(progress(_ordered(pool, jobs), "Reading images", len(records)))
        bad = [report["error"] for report in reports if report["error"]]
        for split in splits.values():
            good = [(record, reports[record.slot]) for record in split.records if not reports[record.slot]["error"]]
            split.facts["skipped"] = len(split.records) - len(good)
            split.records, split.facts["reports"] = [pair[0] for pair in good], [pair[1] for pair in good]
        print_audit(splits, cfg.IMG_SIZE)
        if bad and not cfg.SKIP_BAD_IMAGES:
            raise TrainerError(f"{len(bad)} image(s) cannot be read:{listed(bad)}\nRepair or remove them, or set "
                               "SKIP_BAD_IMAGES = True (--skip-bad-images) to go on without them.")
        if bad:
            warn(f"going on without {len(bad)} unreadable image(s):{listed(bad)}")
        for name, split in splits.items():
            if not split.records:
                raise TrainerError(f"no image of {Path(cfg.DATA_DIR) / name} can be read")
        if "train" in splits and not any(report["area"] for report in splits["train"].facts["reports"]):
            raise TrainerError(f"the training split in {Path(cfg.DATA_DIR) / 'train'} has no tumour pixel at all: nothing "
                               "can be learnt; check the annotations (and CATEGORIES)")
        return splits, cache
    except BaseException:
        if cache is not None:
            cache.close()
        raise


def _ordered(pool: ThreadPoolExecutor, jobs, ahead: int = 64):
    """Run jobs in the pool and yield their results in order, a bounded number ahead, so that a stop takes no time."""
    jobs, waiting = iter(jobs), []
    while True:
        waiting += [pool.submit(job) for job in itertools.islice(jobs, ahead - len(waiting))]
        if not waiting:
            return
        yield waiting.pop(0).result()


def print_audit(splits: dict[str, Split], img_size: int) -> None:
    """Print the table of what the splits hold, and below it what is suspicious."""
    rows, remarks, seen = {}, [], {}
    for name, split in splits.items():
        good = list(zip(split.records, split.facts["reports"]))
        shares = [100 * report["share"] for _, report in good if report["area"]]
        column = {
            "images": len(good), "unreadable images": split.facts["skipped"],
            "annotations": split.facts["annotations"], "without tumour": sum(not report["area"] for _, report in good),
            "several tumours": sum(record.tumours > 1 for record, _ in good),
            "smallest tumour, % of image": f"{min(shares):.3f}" if shares else "-",
            "median tumour, % of image": f"{np.median(shares):.2f}" if shares else "-",
            "largest tumour, % of image": f"{max(shares):.1f}" if shares else "-",
            "files that the JSON does not name": split.facts["unnamed"]}
        for row, value in column.items():
            rows.setdefault(row, []).append(value)
        remarks += [f"{name}/{remark}" for remark in split.facts["remarks"]]
        for record, report in good:
            label = f"{name}/{record.file_name}"
            if 0 < report["area"] < 10:
                remarks.append(f"{label}: the whole mask is {report['area']} pixels")
            if report["vanishes"]:
                remarks.append(f"{label}: the tumour disappears at IMG_SIZE {img_size}")
            if report["resized"]:
                remarks.append(f"{label}: the JSON says {record.width}x{record.height} pixels, the file differs "
                               "(the mask is stretched with the image)")
            if report["digest"] in seen:
                other = seen[report["digest"]]
                leak = "" if other.startswith(name + "/") else " (the same image in two splits: scores will be too good)"
                remarks.append(f"{label}: same picture as {other}{leak}")
            seen.setdefault(report["digest"], label)
    width = max(map(len, rows)) + 2
    say("\nData".ljust(width + 1) + "".join(f"{name:>10}" for name in splits))
    for row, values in rows.items():
        say(row.ljust(width) + "".join(f"{value!s:>10}" for value in values))
    if remarks:
        say(f"Worth a look, {len(remarks)} remark(s):{listed(remarks)}")
    say()


def fingerprint(splits: dict[str, Split]) -> str:
    """A digest of the pixels and masks of train and valid: the same data, wherever it lies."""
    digest = hashlib.sha256()
    for name in ("train", "valid"):
        for record, report in zip(splits[name].records, splits[name].facts["reports"]):
            digest.update(repr((name, record.number, report["digest"], record.rle)).encode())
    return digest.hexdigest()


# ======================================================================================================================
# Augmentation, dataset, batches
# ======================================================================================================================


def build_transform(train: bool, normalize: bool = True, mean: tuple = MEAN, std: tuple = STD) -> A.Compose:
    """The Albumentations pipeline for RGB uint8 [S, S, 3] images and uint8 0/1 [S, S] masks.

    train: random flips, turns, warps and intensities; otherwise none.
    normalize: end in normalised float32 [3, S, S] and mask [S, S] tensors; otherwise the arrays stay uint8, which are
    a quarter of the bytes, and to_input() normalises on the device.
    """
    steps = []
    if train:
        steps += [
            A.HorizontalFlip(p=0.5),
            A.VerticalFlip(p=0.5),
            A.RandomRotate90(p=0.5),
            # A tuple is a range: (0.1, 0.1) would shift every image by exactly +10 %.
            A.Affine(scale=(0.9, 1.1), translate_percent=(-0.1, 0.1), rotate=(-15, 15), p=0.5),
            A.ElasticTransform(alpha=60, sigma=6, p=0.3),  # moves pixels by up to 5; the defaults move nothing
            A.GridDistortion(p=0.3),
            A.RandomBrightnessContrast(p=0.5),
            A.ColorJitter(p=0.5),  # on grey images: brightness and contrast only
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
        self.records = read_coco(split_dir, categories)[0] if records is None else records
        self.img_size, self.seed, self.normalize, self.cache = img_size, seed, normalize, cache
        self.transform = build_transform(train, normalize, mean, std)

    def __len__(self) -> int:
        return len(self.records)

    def sample(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """The resized, not augmented image: RGB uint8 [S, S, 3] and mask uint8 0/1 [S, S]."""
        if self.cache is None:
            return load_sample(self.records[index], self.img_size)[:2]
        pixels = self.cache.array[self.records[index].slot]
        return np.ascontiguousarray(pixels[..., :3]), np.ascontiguousarray(pixels[..., 3])

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
        return self.batches

    def __iter__(self):
        order = np.arange(self.count)
        if self.shuffle:
            order = np.random.default_rng([self.seed, self.epoch]).permutation(self.count)
        for batch in np.array_split(order, self.batches):
            yield [(self.epoch, int(index)) for index in np.array_split(batch, self.world)[self.rank]]


def stack(samples: list) -> tuple[np.ndarray, np.ndarray]:
    """Samples to a batch of numpy arrays: uint8 images [B, S, S, 3] and masks [B, S, S].

    Arrays travel from worker to trainer through a pipe; tensors would need /dev/shm, which containers limit to 64 MB.
    """
    images, masks = zip(*samples)
    return np.stack(images), np.stack(masks)


def start_worker(_number: int) -> None:
    """One thread per worker, and Ctrl-C is left to the main process, which ends its workers itself."""
    cv2.setNumThreads(0)
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def make_loader(dataset: BrainTumorDataset, cfg: types.SimpleNamespace, train: bool) -> torch.utils.data.DataLoader:
    """Batches of uint8 arrays, see stack(). Training batches are shuffled; validation batches are twice as large."""
    # Validation without decoding is a copy from the cache: not worth a process.
    workers = min(cfg.NUM_WORKERS, available_cores()) if train or dataset.cache is None else 0
    batches = EvenBatches(len(dataset), cfg.BATCH_SIZE * (1 if train else 2), train, cfg.SEED)
    return torch.utils.data.DataLoader(dataset, batch_sampler=batches, num_workers=workers, collate_fn=stack,
                                       worker_init_fn=start_worker, persistent_workers=workers > 0)


def to_device(array: np.ndarray | torch.Tensor, device: torch.device) -> torch.Tensor:
    """Move a batch to the device without making the processor wait for the copy."""
    tensor = torch.as_tensor(array)
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()  # only pinned memory is copied in the background
    return tensor.to(device, non_blocking=True)


def to_input(images, device: torch.device, mean: tuple = MEAN, std: tuple = STD) -> torch.Tensor:
    """What the network sees: normalised float32 [B, 3, S, S], channels_last, on the device.

    images: raw uint8 [B, S, S, 3], values 0..255; or float32 [B, 3, S, S], already normalised.
    """
    images = to_device(images, device)
    if images.dtype == torch.uint8:
        images = images.permute(0, 3, 1, 2).float()
        for channel, (m, s) in enumerate(zip(mean, std)):
            images[:, channel].sub_(255 * m).div_(255 * s)  # numbers, not tensors: nothing to copy to a GPU
    return images.contiguous(memory_format=torch.channels_last)


def to_target(masks, device: torch.device) -> torch.Tensor:
    """Masks uint8 [B, S, S], or any dtype [B, 1, S, S], to float32 [B, 1, S, S] on the device."""
    masks = to_device(masks, device).float()
    return masks[:, None] if masks.ndim == 3 else masks


# ======================================================================================================================
# Model
# ======================================================================================================================


def read_weights(path: str | Path) -> dict:
    """Read a file of tensors (.pth, or .safetensors) onto the CPU; nothing in it is executed.

    Raises TrainerError when it is missing, damaged, or holds anything but tensors and plain values.
    """
    if not Path(path).is_file():
        raise TrainerError(f"weights file not found: {path}")
    try:
        if Path(path).suffix == ".safetensors":
            from safetensors.torch import load_file  # comes with segmentation-models-pytorch; rarely needed
            return load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, OSError, ValueError, KeyError) as error:
        raise TrainerError(f"{path} is damaged or no weights file ({str(error).splitlines()[0][:200]})") from None
    except Exception as error:
        if type(error).__name__ != "SafetensorError":
            raise
        raise TrainerError(f"{path} is damaged or no weights file ({error})") from None
    if not isinstance(content, dict):
        raise TrainerError(f"{path} holds a {type(content).__name__}, not a state_dict")
    return content


def fit_weights(module: torch.nn.Module, weights: dict, path: str | Path) -> None:
    """load_state_dict that says what differs. Raises TrainerError."""
    own = module.state_dict()
    shape = {name: tuple(getattr(value, "shape", ())) for name, value in weights.items()}
    differs = [f"{name} is missing" for name in own if name not in weights]
    differs += [f"{name} is not in this model" for name in weights if name not in own]
    differs += [f"{name} is {shape[name]}, this model has {tuple(own[name].shape)}"
                for name in own if name in weights and shape[name] != tuple(own[name].shape)]
    if differs:
        raise TrainerError(f"{path} does not fit this model (is ENCODER the same?), {len(differs)} "
                           f"difference(s):{listed(differs)}")
    module.load_state_dict(weights)


def build_model(encoder: str = ENCODER, encoder_weights: str | None = None) -> tuple[torch.nn.Module, str]:
    """UNet++ with one output channel: normalised float32 [B, 3, S, S] to logits [B, 1, S, S], S divisible by 32.

    encoder_weights: "imagenet" (downloaded), None, or a local file of the encoder's weights.
    Returns (model, where the encoder's weights come from, for the record). When the download is impossible, the model
    starts from random weights and a warning says so. Raises TrainerError for a local file that does not fit.
    """
    options = {"encoder_name": encoder, "in_channels": 3, "classes": 1}
    try:
        if encoder_weights == "imagenet":
            say("Getting ImageNet weights for the encoder (from the local cache, or downloaded once) ...")
            try:
                return smp.UnetPlusPlus(encoder_weights="imagenet", **options), "imagenet"
            except OSError as error:  # every failure of the network or of the hub is one
                reason = f"download failed: {type(error).__name__}: {str(error).splitlines()[0]}"
            warn(f"no ImageNet weights ({reason}).\n"
                 "Training starts from RANDOM weights, which costs accuracy. To get them after all:\n"
                 "  - where the hub is blocked, name a mirror in the environment: HF_ENDPOINT=https://<a mirror>\n"
                 "  - or download the file elsewhere and set ENCODER_WEIGHTS to it (--encoder-weights FILE)\n"
                 "  - or choose the random start yourself: ENCODER_WEIGHTS = None (--encoder-weights none)")
            return smp.UnetPlusPlus(encoder_weights=None, **options), f"random ({reason})"
        model = smp.UnetPlusPlus(encoder_weights=None, **options)
    except (KeyError, ValueError, NotImplementedError) as error:
        raise TrainerError(f"UNet++ cannot be built with ENCODER = {encoder!r}, ENCODER_WEIGHTS = {encoder_weights!r}: "
                           f"{error}") from None
    if encoder_weights is None:
        return model, "random"
    weights = {name: value for name, value in read_weights(encoder_weights).items() if not name.startswith("fc.")}
    fit_weights(model.encoder, weights, encoder_weights)  # a torchvision file has a classifier, "fc.", too
    return model, f"file {encoder_weights}"


# ======================================================================================================================
# Losses: float32 logits [B, 1, S, S] and targets (0 or 1) of the same shape in, a mean over images out
# ======================================================================================================================
# A mean over images, unlike a ratio pooled over the batch, does not depend on how images are grouped: accumulation,
# half-size batches after running out of memory, and several GPUs all give the gradient of the undivided batch.


def soft_counts(logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Soft true positives, false positives and false negatives of each image, in pixels: three [B] tensors."""
    p, t = logits.float().sigmoid().flatten(1), targets.flatten(1)
    return (p * t).sum(1), (p * (1 - t)).sum(1), ((1 - p) * t).sum(1)


class DiceLoss(torch.nn.Module):
    """1 - Dice of each image, averaged. Range 0..1.

    Dice = (2 TP + s) / (2 TP + FP + FN + s) with soft counts (Milletari et al. 2016, with linear sums). The smoothing
    s, in pixels, makes an empty mask that is predicted empty a perfect one and keeps its gradient alive.
    """

    def __init__(self, smooth: float = 1.0):
        super().__init__()
        self.smooth = smooth

    def forward(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        tp, fp, fn = soft_counts(logits, targets)
        return (1 - (2 * tp + self.smooth) / (2 * tp + fp + fn + self.smooth)).mean()


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


class SumLoss(torch.nn.Module):
    """The sum of two losses, each with weight 1."""

    def __init__(self, first: torch.nn.Module, second: torch.nn.Module):
        super().__init__()
        self.first, self.second = first, second

    def forward(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        logits = logits.float()
        return self.first(logits, targets) + self.second(logits, targets)


LOSSES = {
    "dice_bce": lambda: SumLoss(DiceLoss(), torch.nn.BCEWithLogitsLoss()),
    "dice_focal": lambda: SumLoss(DiceLoss(), smp.losses.FocalLoss("binary", gamma=2.0)),
    "focal_tversky": FocalTverskyLoss,
}


# ======================================================================================================================
# Metrics: from integer counts per image
# ======================================================================================================================


def confusion(probabilities: torch.Tensor, targets: torch.Tensor, threshold: float = 0.5) -> torch.Tensor:
    """Pixel counts (TP, FP, FN) of each image: int64 [B, 3] on the same device. Tumour is probability >= threshold."""
    tp, fp, fn, _ = smp.metrics.get_stats(probabilities, targets.long(), mode="binary", threshold=threshold)
    return torch.cat([tp, fp, fn], dim=1)


def score_images(counts: np.ndarray) -> dict[str, np.ndarray]:
    """Dice, IoU, precision and recall from counts [..., 3] of (TP, FP, FN); float64 [...], range 0..1.

    Convention: both masks empty scores 1 everywhere; only one of them empty scores 0 everywhere.
    """
    tp, fp, fn = np.moveaxis(np.asarray(counts, np.float64), -1, 0)
    empty = tp + fp + fn == 0
    ratios = {"dice": (2 * tp, 2 * tp + fp + fn), "iou": (tp, tp + fp + fn), "precision": (tp, tp + fp),
              "recall": (tp, tp + fn)}
    return {name: np.where(empty, 1.0, above / np.maximum(below, 1)) for name, (above, below) in ratios.items()}


def summarize(counts: np.ndarray) -> dict[str, float]:
    """Scores of a set from counts [N, 3]: means over images, and, as pooled_*, of all pixels taken together."""
    means = {name: float(values.mean()) for name, values in score_images(counts).items()}
    pooled = {f"pooled_{name}": float(value) for name, value in score_images(np.sum(counts, axis=0)).items()}
    return means | pooled


# ======================================================================================================================
# Training and validation
# ======================================================================================================================


def amp_dtype(precision: str, device: torch.device) -> torch.dtype:
    """The dtype of autocast for a PRECISION setting; torch.float32 means no autocast."""
    if precision != "auto":
        return getattr(torch, precision)
    if device.type == "cuda":
        return torch.float16
    # Where the processor has no bfloat16 arithmetic, autocast is slower than float32.
    features = torch.cpu.get_capabilities() if device.type == "cpu" else {}
    native = any(features.get(name) for name in ("avx512_bf16", "amx_bf16", "arm_bf16", "bf16"))
    return torch.bfloat16 if native else torch.float32


def autocast(precision: str, device: torch.device) -> torch.autocast:
    """The autocast context of a PRECISION setting."""
    dtype = amp_dtype(precision, device)
    return torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)


def make_scaler(precision: str, device: torch.device) -> torch.amp.GradScaler:
    """GradScaler for float16; for the wider dtypes a disabled one, whose methods pass everything through."""
    return torch.amp.GradScaler("cuda", enabled=amp_dtype(precision, device) == torch.float16)


def out_of_memory(remedies: str) -> TrainerError:
    """The error when not even one image fits."""
    return TrainerError(f"the GPU has too little memory for a single image. What helps: {remedies}; closing other "
                        "programs on the GPU; --device cpu (slow)", 1)


class StepGuard:
    """What the training step needs to survive bad numbers and a full GPU; one for a whole run.

    All counters stay on the device: reading them would make the processor wait for the GPU in every step.
    """

    OVERFLOWS = 16  # GradScaler starts at 2^16: it is calibrating while it halves the scale that often in a row

    def __init__(self, model: torch.nn.Module, device: torch.device):
        self.buffers = list(model.buffers())  # BatchNorm's running statistics
        self.micro_batch = None  # images per forward pass, once memory has run out; None: whole batches
        self.overflows = torch.zeros((), device=device)  # steps in a row that only GradScaler's scale spoilt
        self.device = device
        self.start_epoch()

    def start_epoch(self) -> None:
        """Set the epoch's counters to zero."""
        self.loss_sum, self.images, self.dropped, self.in_a_row = torch.zeros(4, device=self.device).unbind()

    def before_step(self) -> None:
        """Remember BatchNorm's running statistics: the forward pass changes them before anyone sees its result."""
        self.saved = [buffer.clone() for buffer in self.buffers]

    def restore(self, bad: torch.Tensor) -> None:
        """Put the remembered statistics back where bad (bool, on the device) is true."""
        for buffer, saved in zip(self.buffers, self.saved):
            buffer.copy_(torch.where(bad, saved, buffer))

    def after_step(self, loss: torch.Tensor, images: torch.Tensor, bad: torch.Tensor, scaled: bool) -> None:
        """Count a step. loss: mean over its images; bad: whether it has to be dropped; scaled: under GradScaler."""
        self.restore(bad)
        self.overflows = (self.overflows + 1) * (bad & loss.isfinite() & scaled)
        calibrating = (self.overflows > 0) & (self.overflows <= self.OVERFLOWS)
        counts = bad & ~calibrating
        self.dropped = self.dropped + counts
        self.in_a_row = (self.in_a_row + counts) * bad
        self.loss_sum = self.loss_sum + torch.where(bad, 0, loss * images)
        self.images = self.images + torch.where(bad, 0, images)

    def shrink(self, largest: int) -> None:
        """After running out of memory: halve the images per forward pass, or give up at one."""
        if world_size() > 1:
            raise TrainerError("a GPU ran out of memory, and with several processes the step cannot be repeated. What "
                               "helps: a smaller BATCH_SIZE with more ACCUMULATION_STEPS; a smaller IMG_SIZE", 1)
        if largest == 1:
            raise out_of_memory("a smaller IMG_SIZE; a smaller ENCODER, e.g. resnet18; PRECISION = 'auto'")
        self.micro_batch = (largest + 1) // 2
        self.restore(torch.ones((), dtype=torch.bool, device=self.device))
        torch.cuda.empty_cache()
        warn(f"out of GPU memory: from here on at most {self.micro_batch} image(s) per forward pass. The gradient stays "
             "that of the whole batch, but BatchNorm sees smaller batches. A smaller BATCH_SIZE avoids this.")


def grouped(batches, size: int):
    """Lists of `size` consecutive items; the last list may be shorter."""
    batches = iter(batches)
    while group := list(itertools.islice(batches, size)):
        yield group


def train_one_epoch(model: torch.nn.Module, loader, criterion: torch.nn.Module, optimizer: torch.optim.Optimizer,
                    scaler: torch.amp.GradScaler, device: torch.device, *, cfg: types.SimpleNamespace | None = None,
                    guard: StepGuard | None = None, epoch: int = 0) -> dict[str, float]:
    """One pass over the loader's (images, masks) batches; see to_input() and to_target() for their types.

    criterion: a mean over images. optimizer: fused, so that a bad step can be skipped without asking the GPU.
    cfg: ACCUMULATION_STEPS, GRAD_CLIP, PRECISION, MEAN and STD are used (default: the constants).
    Returns train_loss (mean over images), dropped (steps left out because of numbers that are not finite), and
    persistent (1.0 if that did not stop by itself). Raises Interrupted, and TrainerError when memory cannot suffice.
    """
    cfg, device = cfg or default_settings(), torch.device(device)
    guard = guard or StepGuard(model, device)
    guard.start_epoch()
    parameters = [p for p in model.parameters() if p.requires_grad]
    model.train()
    steps = math.ceil(len(loader) / cfg.ACCUMULATION_STEPS)
    for group in progress(grouped(loader, cfg.ACCUMULATION_STEPS), f"Epoch {epoch + 1}: training", steps):
        guard.before_step()
        images_in_step = torch.full((), float(sum(len(images) for images, _ in group)), device=device)
        if world_size() > 1:
            dist.all_reduce(images_in_step)
        while True:
            largest = min(guard.micro_batch or math.inf, max(len(images) for images, _ in group))
            parts = [(images[i:i + largest], masks[i:i + largest])
                     for images, masks in group for i in range(0, len(images), largest)]
            loss = torch.zeros((), device=device)
            try:
                for number, (images, masks) in enumerate(parts, 1):
                    last = number == len(parts)  # several processes exchange gradients once per step
                    with model.no_sync() if world_size() > 1 and not last else contextlib.nullcontext():
                        with autocast(cfg.PRECISION, device):
                            logits = model(to_input(images, device, cfg.MEAN, cfg.STD))
                        # Weighted, the parts add up to the mean over the step's images.
                        part = criterion(logits.float(), to_target(masks, device)) * (len(images) / images_in_step)
                        part = part * torch.where(part.detach().isfinite(), 1.0, math.nan)  # spoils every gradient
                        scaler.scale(part * world_size()).backward()  # DistributedDataParallel averages over processes
                    loss += part.detach()
                break
            except torch.OutOfMemoryError:
                logits = part = None  # let go of the graph before trying again
            optimizer.zero_grad()
            guard.shrink(largest)
        scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(parameters, cfg.GRAD_CLIP or math.inf)
        bad = ~norm.isfinite()
        if not scaler.is_enabled():
            optimizer.found_inf = bad.float()  # what GradScaler sets otherwise: a fused optimizer skips the step
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        guard.after_step(loss, images_in_step, bad, scaler.is_enabled())
    totals = torch.stack([guard.loss_sum, guard.images, guard.dropped, guard.in_a_row]).double().cpu()
    totals = torch.stack(gather(totals))  # each process holds its part of the loss, and the same number of images
    images, dropped = float(totals[0, 1]), int(totals[:, 2].max())
    return {"train_loss": float(totals[:, 0].sum()) / images if images else math.nan, "dropped": dropped,
            "persistent": float(dropped > steps / 2 or totals[:, 3].max() >= 10)}


def forward_in_parts(model: torch.nn.Module, images: torch.Tensor) -> torch.Tensor:
    """model(images) [B, ...] in halves, quarters, ... if memory runs out; for evaluation, where parts do not interact."""
    try:
        return model(images)
    except torch.OutOfMemoryError:
        if len(images) == 1:
            raise out_of_memory("a smaller IMG_SIZE; PRECISION = 'auto'") from None
    torch.cuda.empty_cache()
    return torch.cat([forward_in_parts(model, part) for part in images.chunk(2)])


@torch.inference_mode()
def validate(model: torch.nn.Module, loader, criterion: torch.nn.Module, device: torch.device, *,
             cfg: types.SimpleNamespace | None = None) -> dict[str, float]:
    """Loss and scores at threshold 0.5 and the network's image size.

    Returns valid_loss (mean over images) and summarize() of all images of all processes, none counted twice.
    """
    cfg, device = cfg or default_settings(), torch.device(device)
    model.eval()
    losses, counts = [], []
    for images, masks in progress(loader, "Validation"):
        if not len(images):  # a process may have no part in a small batch
            continue
        with autocast(cfg.PRECISION, device):
            logits = forward_in_parts(model, to_input(images, device, cfg.MEAN, cfg.STD)).float()
        targets = to_target(masks, device)
        losses.append(criterion(logits, targets) * len(images))
        counts.append(confusion(logits.sigmoid(), targets))
    loss_sum = float(torch.stack(losses).double().sum()) if losses else 0.0
    counts = torch.cat(counts).cpu().numpy() if counts else np.zeros((0, 3), np.int64)
    parts = gather((loss_sum, counts))
    counts = np.concatenate([part[1] for part in parts])
    return {"valid_loss": sum(part[0] for part in parts) / len(counts), **summarize(counts)}


# ======================================================================================================================
# Checkpoints
# ======================================================================================================================

BEST, LAST = "unet_plusplus_best.pth", "unet_plusplus_last.pth"
RUN_FILES = (BEST, "unet_plusplus_best.json", LAST, "training_history.csv", "training_history.png",
             "training_samples.png", "test_metrics.csv", "test_predictions.png")


def to_cpu(value):
    """A copy of nested dicts and lists with every tensor on the CPU and contiguous."""
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True).contiguous()
    if isinstance(value, dict):
        return {key: to_cpu(item) for key, item in value.items()}
    return [to_cpu(item) for item in value] if isinstance(value, (list, tuple)) else value


def is_finite(value) -> bool:
    """Whether no tensor in nested dicts and lists holds NaN or infinity."""
    if isinstance(value, torch.Tensor):
        return bool(torch.isfinite(value).all())
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return all(is_finite(item) for item in items)


def file_digest(path: Path) -> str:
    """SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def save_tensors(path: Path, content: dict) -> None:
    """torch.save, complete or not at all, and never with a number that is not finite. Raises TrainerError."""
    if rank() > 0:
        return
    if not is_finite(content):
        raise TrainerError(f"the state for {path} has numbers that are not finite; it was not saved. Go on with --resume", 1)
    write_file(path, lambda file: torch.save(content, file), required=True)


def write_record(path: Path, **changes) -> None:
    """Update the JSON beside a checkpoint with what has changed, and with the digest that ties the two together."""
    if rank() > 0:
        return
    json_path = path.with_suffix(".json")
    record = json.loads(json_path.read_text(encoding="utf-8")) if json_path.is_file() else {}
    record |= changes | {"checkpoint": path.name, "sha256": file_digest(path)}
    write_text(json_path, json.dumps(record, indent=2, ensure_ascii=False, default=str), required=True)


def read_record(path: Path) -> tuple[dict, str]:
    """The JSON beside a checkpoint. Returns (record, ""), or ({}, why there is none to be trusted)."""
    json_path = Path(path).with_suffix(".json")
    try:
        record = json.loads(json_path.read_text(encoding="utf-8"))
        if record.get("sha256") != file_digest(path):
            return {}, f"{json_path.name} does not belong to {Path(path).name} (its digest differs)"
        return record, ""
    except OSError:
        return {}, f"there is no {json_path.name} beside it"
    except (ValueError, AttributeError):
        return {}, f"{json_path.name} is damaged"


def keep_earlier_run(output: Path, folder: Path, names: tuple = RUN_FILES) -> None:
    """Move the files of an earlier run into a folder of their own."""
    present = [name for name in names if (output / name).is_file()]
    if present and rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        for name in present:
            os.replace(output / name, folder / name)
        say(f"Kept from the earlier run, in {folder}: {', '.join(present)}")


def load_model(checkpoint: str | Path, device: str | torch.device | None = None) -> torch.nn.Module:
    """Load a checkpoint of this script for prediction, with the settings in the JSON beside it.

    device: where to put the model; default: DEVICE. Without the JSON, or with one of another checkpoint, the script's
    constants are used, with a warning. Raises TrainerError when the file is missing, damaged or does not fit.
    """
    checkpoint = Path(checkpoint)
    weights = read_weights(checkpoint)
    record, problem = read_record(checkpoint)
    if problem:
        warn(f"{checkpoint}: {problem}; using the script's constants (ENCODER {ENCODER}, IMG_SIZE {IMG_SIZE}, "
             "MEAN, STD, threshold 0.5)")
    model = build_model(record.get("encoder", ENCODER), None)[0]
    fit_weights(model, weights, checkpoint)
    model.prediction_settings = prediction_settings(**{key: record[key] for key in prediction_settings() if key in record})
    return model.to(device or DEVICE).eval()


def prediction_settings(img_size: int = IMG_SIZE, mean: tuple = MEAN, std: tuple = STD, threshold: float = 0.5) -> dict:
    """What predict_mask() has to know beside the weights."""
    return {"img_size": img_size, "mean": tuple(mean), "std": tuple(std), "threshold": threshold}


# ======================================================================================================================
# Prediction, and evaluation through the same path
# ======================================================================================================================

THRESHOLDS = np.round(np.arange(0.05, 0.96, 0.05), 2)


@torch.inference_mode()
def predict_probability(model: torch.nn.Module, image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Tumour probability, float32 [height, width], of an already resized RGB uint8 [S, S, 3] image.

    In float32 on every device, so that the scores of this script are those that other code gets.
    """
    settings = getattr(model, "prediction_settings", None)
    if settings is None:
        warn("this model was not loaded by load_model(): predicting with the script's constants "
             f"(IMG_SIZE {IMG_SIZE}, MEAN, STD, threshold 0.5)")
        settings = model.prediction_settings = prediction_settings()
    training = model.training
    model.eval()
    device = next(model.parameters()).device
    logits = forward_in_parts(model, to_input(image[None], device, settings["mean"], settings["std"]))
    model.train(training)
    return resize(logits.float().sigmoid()[0, 0].cpu().numpy(), height, width)


def predict_mask(model: torch.nn.Module, image: np.ndarray) -> np.ndarray:
    """Segment one image: RGB uint8 [H, W, 3] in, mask uint8 [H, W] out, 1 where there is tumour.

    Raises ValueError for any other kind of image.
    """
    if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ValueError("image must be an RGB uint8 array [H, W, 3], as read_image() returns; got "
                         f"{getattr(image, 'dtype', type(image).__name__)} {getattr(image, 'shape', '')}")
    settings = getattr(model, "prediction_settings", None) or prediction_settings()
    small = resize(image, settings["img_size"], settings["img_size"])
    probability = predict_probability(model, small, *image.shape[:2])
    return (probability >= np.float32(settings["threshold"])).astype(np.uint8)


def count_thresholds(probability: np.ndarray, mask: np.ndarray, thresholds: np.ndarray) -> np.ndarray:
    """(TP, FP, FN) at every threshold: int64 [T, 3], from float32 probabilities and a 0/1 mask of the same shape."""
    passed = np.searchsorted(thresholds.astype(np.float32), probability.ravel(), side="right")  # how many it reaches
    inside = mask.ravel() > 0
    at_least = [np.bincount(passed[part], minlength=len(thresholds) + 1)[::-1].cumsum()[::-1][1:]
                for part in (inside, ~inside)]
    return np.stack([at_least[0], at_least[1], inside.sum() - at_least[0]], axis=-1)


def evaluate_split(model: torch.nn.Module, dataset: BrainTumorDataset, thresholds: np.ndarray, name: str) -> np.ndarray:
    """Counts at the annotations' resolution for every image and threshold: int64 [N, T, 3], one image in memory."""
    mine = range(rank(), len(dataset), world_size())
    counts = [count_thresholds(predict_probability(model, dataset.sample(i)[0], record.height, record.width),
                               record.mask(), thresholds)
              for i, record in progress(((i, dataset.records[i]) for i in mine), f"Scoring {name}", len(mine))]
    collected = {i: row for part in gather(dict(zip(mine, counts))) for i, row in part.items()}
    return np.stack([collected[i] for i in range(len(dataset))])


def evaluate_checkpoint(cfg: types.SimpleNamespace, checkpoint: Path, splits: dict[str, Split],
                        cache: PixelCache | None) -> None:
    """Find the threshold on valid, score test with it, write the tables and pictures, and update the record."""
    model = load_model(checkpoint, cfg.DEVICE)
    output, record = Path(cfg.OUTPUT_DIR), read_record(checkpoint)[0]
    dataset = {name: BrainTumorDataset(Path(cfg.DATA_DIR) / name, model.prediction_settings["img_size"],
                                       records=split.records, cache=cache) for name, split in splits.items()}
    dice = score_images(counts := evaluate_split(model, dataset["valid"], THRESHOLDS, "valid"))["dice"].mean(axis=0)
    best = np.flatnonzero(dice >= dice.max() - 1e-12)
    chosen = best[np.abs(THRESHOLDS[best] - 0.5).argmin()]  # of equally good ones the least extreme
    threshold = model.prediction_settings["threshold"] = float(THRESHOLDS[chosen])
    result = {"threshold": threshold, "valid_metrics": summarize(counts[:, chosen])}
    say(f"\nThreshold {threshold:.2f} gives the best Dice on valid.")
    say("Means over images at the original resolution; both masks empty scores 1, only one of them empty 0:")
    say("           images    Dice     IoU  precision  recall   pooled Dice")
    line = "  {:<8} {:>6}  {dice:.4f}  {iou:.4f}     {precision:.4f}  {recall:.4f}        {pooled_dice:.4f}"
    say(line.format("valid", len(counts), **result["valid_metrics"]))
    if "test" in dataset:
        counts = evaluate_split(model, dataset["test"], np.array([threshold]), "test")[:, 0]
        result["test_metrics"] = summarize(counts)
        say(line.format("test", len(counts), **result["test_metrics"]))
        if rank() == 0:
            scores = score_images(counts)
            write_table(output / "test_metrics.csv", [
                {"file_name": row.file_name, **{name: f"{values[i]:.6f}" for name, values in scores.items()},
                 **dict(zip(("true_positive_px", "false_positive_px", "false_negative_px"), map(int, counts[i])))}
                for i, row in enumerate(dataset["test"].records)])
            plot_predictions(output / "test_predictions.png", model, dataset["test"].records, scores["dice"])
    if record:
        write_record(checkpoint, **result)
    if str(record.get("encoder_weights_from")).startswith("random ("):
        warn("this model started from RANDOM weights, because the ImageNet weights could not be had "
             f"{record['encoder_weights_from'][7:]}: its scores are lower than they need be.")


def predict_files(cfg: types.SimpleNamespace, checkpoint: Path, sources: list[str]) -> None:
    """Write NAME_mask.png (0 or 255) and NAME_overlay.png into OUTPUT_DIR for image files and all images of folders.

    Nothing that exists is overwritten: a taken name gets a number. What this script has written is no input.
    """
    files, skipped = [], 0
    for source in map(Path, sources):
        if source.is_dir():
            found = sorted(path for path in source.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
            own = [path for path in found if path.name in RUN_FILES or re.search(r"_(mask|overlay)(_\d+)?$", path.stem)]
            files += [path for path in found if path not in own]
            skipped += len(own)
        elif source.is_file():
            files.append(source)
        else:
            raise TrainerError(f"no such file or folder: {source}")
    if skipped:
        say(f"Left out {skipped} file(s) whose names end in _mask or _overlay, or that this script has written.")
    if not files:
        raise TrainerError(f"no images found in {', '.join(sources)} (looked for {', '.join(sorted(IMAGE_SUFFIXES))})")
    model = load_model(checkpoint, cfg.DEVICE)
    bad = []
    for path in progress(files, "Predicting"):
        try:
            image = read_image(path)
        except TrainerError as error:
            bad.append(str(error))
            continue
        mask = predict_mask(model, image)
        for number in itertools.count(1):
            suffix = "" if number == 1 else f"_{number}"
            targets = [Path(cfg.OUTPUT_DIR) / f"{path.stem}_{kind}{suffix}.png" for kind in ("mask", "overlay")]
            if not any(target.exists() for target in targets):
                break
        for target, picture in zip(targets, (mask * 255, draw_overlay(image, mask))):
            if not write_image(target, picture):
                raise TrainerError("stopped: the output folder takes no more files", 1)
        say(f"{path}: {100 * mask.mean():.2f} % tumour -> {targets[0].name}, {targets[1].name}")
    if bad:
        raise TrainerError(f"{len(bad)} of {len(files)} file(s) could not be read:{listed(bad)}")


# ======================================================================================================================
# Pictures
# ======================================================================================================================


def draw_overlay(image: np.ndarray, mask: np.ndarray, truth: np.ndarray | None = None) -> np.ndarray:
    """The image [H, W, 3] with the mask [H, W] tinted and outlined in red, and the outline of the truth in green."""
    out = image.copy()
    out[mask > 0] = 0.7 * out[mask > 0] + 0.3 * np.array([255, 0, 0])
    width = max(1, round(max(image.shape) / 300))
    for outlined, colour in ((mask, (255, 0, 0)), (truth, (0, 255, 0))):
        if outlined is not None:
            contours = cv2.findContours(outlined, cv2.RETR_LIST, cv2.CHAIN_APPROX_NONE)[0]
            cv2.drawContours(out, contours, -1, colour, width)
    return out


def save_figure(path: Path, figure: Figure) -> None:
    """Write a figure as PNG."""
    figure.tight_layout()
    write_file(path, lambda file: figure.savefig(file, format="png", dpi=100))


def show(axis, image: np.ndarray, title: str) -> None:
    """One picture of a grid. The font has no CJK letters: file names are shortened to what it can draw."""
    axis.imshow(image, cmap="gray", vmin=0, vmax=1 if image.ndim == 2 else None)
    axis.set_title(title.encode("ascii", "replace").decode(), fontsize=8)
    axis.axis("off")


def plot_samples(path: Path, dataset: BrainTumorDataset, columns: int = 6) -> None:
    """A grid of training images: above each augmented one the same image without augmentation, masks outlined."""
    count = min(columns * 2, len(dataset))
    # Preferably images with a tumour: their outlines show whether masks lie where they should.
    order = sorted(range(len(dataset)), key=lambda i: (not dataset.records[i].tumours, (i * 7919) % len(dataset)))[:count]
    figure = Figure(figsize=(2.2 * columns, 2.4 * 4))
    axes = figure.subplots(4, columns, squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for place, index in enumerate(order):
        row, column = divmod(place, columns)
        for axis, (image, mask), title in ((axes[2 * row, column], dataset.sample(index), "as loaded"),
                                           (axes[2 * row + 1, column], dataset[(1, index)], "augmented")):
            name = Path(dataset.records[index].file_name).stem
            show(axis, draw_overlay(image, np.zeros_like(mask), mask), f"{name[:14]} {title}")
    figure.suptitle("Training images as the network sees them (mask outline in green)")
    save_figure(path, figure)


def plot_history(path: Path, history: list[dict]) -> None:
    """Losses, validation Dice and IoU, and learning rate over the epochs; the best epoch is marked."""
    epochs = [row["epoch"] for row in history]
    best = max(history, key=lambda row: row["dice"])
    figure = Figure(figsize=(15, 4.5))
    panels = (("Loss", {"train_loss": "training", "valid_loss": "validation"}),
              ("Validation score (mean over images)", {"dice": "Dice", "iou": "IoU"}), ("Learning rate", {"lr": None}))
    for axis, (title, lines) in zip(figure.subplots(1, 3), panels):
        for key, label in lines.items():
            axis.plot(epochs, [row[key] for row in history], marker="." if len(history) < 30 else None, label=label)
        axis.axvline(best["epoch"], color="gray", linestyle="--", linewidth=1,
                     label=f"best epoch {best['epoch']} (Dice {best['dice']:.4f})")
        axis.set(title=title, xlabel="epoch")
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
        if title == "Learning rate":
            axis.set_yscale("log")
    save_figure(path, figure)


def plot_predictions(path: Path, model: torch.nn.Module, records: list[Record], dice: np.ndarray, each: int = 2) -> None:
    """Best, median and worst test cases: image, truth, prediction, and overlay with the Dice of the case."""
    order = np.argsort(-dice, kind="stable")
    middle = max(0, len(order) // 2 - each // 2)
    places = {"best": range(each), "median": range(middle, middle + each), "worst": range(len(order) - each, len(order))}
    rows, used = [], set()
    for label, ranks in places.items():
        for place in ranks:
            if 0 <= place < len(order) and place not in used:
                used.add(place)
                rows.append((label, int(order[place])))
    figure = Figure(figsize=(11, 2.9 * len(rows)))
    for axes, (label, index) in zip(figure.subplots(len(rows), 4, squeeze=False), rows):
        record = records[index]
        image = read_image(record.path, record.height, record.width)
        image = resize(image, record.height, record.width)
        truth, mask = record.mask(), predict_mask(model, image)
        show(axes[0], image, f"{label}: {Path(record.file_name).name[:28]}")
        show(axes[1], truth, "truth")
        show(axes[2], mask, "prediction")
        show(axes[3], draw_overlay(image, mask, truth), f"Dice {dice[index]:.3f} (red: prediction, green: truth)")
    save_figure(path, figure)


# ======================================================================================================================
# A run from start to end
# ======================================================================================================================


def start_processes(cfg: types.SimpleNamespace) -> None:
    """Under torchrun, join the other processes, each with its own GPU."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return
    if cfg.DEVICE.startswith("cuda"):
        cfg.DEVICE = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(cfg.DEVICE)
    # The others wait while the first process of each machine reads all images.
    dist.init_process_group("nccl" if cfg.DEVICE.startswith("cuda") else "gloo", timeout=timedelta(hours=2))


@contextlib.contextmanager
def shared_data(cfg: types.SimpleNamespace, names: list[str]):
    """prepare_data() once on each machine, for all its processes; the cache is removed at the end of the block."""
    local, result = int(os.environ.get("LOCAL_RANK", 0)), None
    if local == 0:
        try:
            result = prepare_data(cfg, names)
        except (TrainerError, Interrupted) as error:
            result = error
    everyone = gather(result)
    if local:
        result = everyone[rank() - local]
    failed = next((other for other in everyone if isinstance(other, Exception)), None)
    try:
        if failed is not None:
            raise failed
        yield result
    finally:
        if local == 0 and isinstance(result, tuple) and result[1] is not None:
            result[1].close()


def describe_machine(cfg: types.SimpleNamespace, device: torch.device) -> None:
    """Say what the run uses, and what is wrong if a GPU lies idle."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    processes = f", {world_size()} processes" if world_size() > 1 else ""
    dtype = str(amp_dtype(cfg.PRECISION, device)).removeprefix("torch.")
    say(f"{name}{processes}, {dtype}, PyTorch {torch.__version__}, data in {cfg.DATA_DIR}, output to {cfg.OUTPUT_DIR}")
    if device.type == "cpu":
        if torch.version.cuda is None and shutil.which("nvidia-smi"):
            warn("this machine has an NVIDIA GPU, but the installed PyTorch is a CPU-only build, so the GPU lies idle.\n"
                 "Install the CUDA build that https://pytorch.org/get-started/locally names for your system.")
        say("No GPU is used: expect about one image per second and core pair at 256 px, a few hours for a real data set.\n"
            "For a first look: --img-size 128 --epochs 5. The time left stands in each epoch's line.")


def versions() -> dict[str, str]:
    """Versions of everything that can change a result."""
    modules = {"torch": torch, "torchvision": torchvision, "segmentation_models_pytorch": smp, "albumentations": A,
               "opencv": cv2, "numpy": np, "matplotlib": matplotlib}
    return {"python": platform.python_version()} | {name: module.__version__ for name, module in modules.items()}


def resume_command(argv: list[str] | None) -> str:
    """The command line that goes on with this run."""
    words = [word for word in (sys.argv[1:] if argv is None else argv) if word != "--resume"] + ["--resume"]
    program = Path(sys.executable).name if shutil.which(Path(sys.executable).name) == sys.executable else sys.executable
    start = [program] if world_size() == 1 else ["torchrun", f"--nproc-per-node={os.environ['LOCAL_WORLD_SIZE']}"]
    command = [*start, sys.argv[0], *words]
    return subprocess.list2cmdline(command) if os.name == "nt" else shlex.join(command)


def read_last(cfg: types.SimpleNamespace) -> dict:
    """The state to go on from. Raises TrainerError if there is none, or if the settings contradict it."""
    path = Path(cfg.OUTPUT_DIR) / LAST
    if not path.is_file():
        raise TrainerError(f"nothing to resume: there is no {path}; leave --resume out to start a run, or name the run's "
                           "folder with OUTPUT_DIR")
    state = read_weights(path)
    if not {"settings", "optimizer", "epoch"} <= set(state):
        raise TrainerError(f"{path} is not the state of a run of this script")
    old, new = state["settings"], vars(cfg)
    differs = [f"{name}: saved {old.get(name)!r}, now {new[name]!r}" for name in CONSTANTS
               if name not in RESUME_MAY_CHANGE and old.get(name) != new[name]]
    if old["BATCH_SIZE"] * old["ACCUMULATION_STEPS"] != cfg.BATCH_SIZE * cfg.ACCUMULATION_STEPS:
        differs.append(f"BATCH_SIZE * ACCUMULATION_STEPS: saved {old['BATCH_SIZE'] * old['ACCUMULATION_STEPS']}, "
                       f"now {cfg.BATCH_SIZE * cfg.ACCUMULATION_STEPS}")
    if differs:
        raise TrainerError(f"the saved run in {path} had other settings:{listed(differs, 40)}\nGive the saved values, or "
                           f"start a new run in another OUTPUT_DIR. What may change: {', '.join(RESUME_MAY_CHANGE)}.")
    return state


class Run:
    """Everything that changes while a model is trained, and its state on disk."""

    def __init__(self, cfg: types.SimpleNamespace, device: torch.device, data: str, state: dict | None):
        """data: fingerprint of the splits. state: from read_last() to go on, or None to start."""
        self.cfg, self.device, self.data = cfg, device, data
        torch.manual_seed(cfg.SEED)
        if state or cfg.INIT_WEIGHTS:
            self.model, self.encoder_weights_from = build_model(cfg.ENCODER, None)
        else:
            self.model, self.encoder_weights_from = build_model(cfg.ENCODER, cfg.ENCODER_WEIGHTS)
        if cfg.INIT_WEIGHTS and not state:
            weights = read_weights(cfg.INIT_WEIGHTS)
            fit_weights(self.model, weights.get("model", weights), cfg.INIT_WEIGHTS)
            self.encoder_weights_from = f"checkpoint {cfg.INIT_WEIGHTS}"
        self.model.to(device, memory_format=torch.channels_last)
        if world_size() > 1 and device.type == "cuda" and cfg.SYNC_BATCHNORM:
            self.model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(self.model)
        # Fused: one kernel for all parameters, and it can skip a bad step without asking the GPU.
        self.optimizer = torch.optim.AdamW(self.model.parameters(), cfg.LR, weight_decay=cfg.WEIGHT_DECAY, fused=True)
        self.scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(
            self.optimizer, mode="max", factor=cfg.PLATEAU_FACTOR, patience=cfg.PLATEAU_PATIENCE, threshold=0)
        self.scaler = make_scaler(cfg.PRECISION, device)
        self.epoch = self.waited = self.best_epoch = 0  # finished epochs; epochs since the best one; the best one
        self.best_dice, self.history, self.reverted = -1.0, [], False
        if state:
            self.load(state)
        if cfg.COMPILE:
            self.model.compile()  # in place: names of weights stay as they are
        # Buffers are shared explicitly before validation instead of in every forward pass.
        self.trained = self.model if world_size() == 1 else torch.nn.parallel.DistributedDataParallel(
            self.model, device_ids=[device] if device.type == "cuda" else None, broadcast_buffers=False)
        self.guard = StepGuard(self.model, device)

    PLAIN = ("epoch", "waited", "best_epoch", "best_dice", "history", "reverted", "encoder_weights_from", "data")

    def state(self) -> dict:
        """The complete state: tensors on the CPU and plain values only, so that it can be read safely."""
        return to_cpu({
            **{name: getattr(self, name) for name in self.PLAIN}, "settings": vars(self.cfg),
            "model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(), "scaler": self.scaler.state_dict(), "random": torch.get_rng_state()})

    def load(self, state: dict) -> None:
        """Go on from a state. Raises TrainerError when it belongs to other data."""
        if state["data"] != self.data:
            raise TrainerError("the images or masks in train/ or valid/ are not those of the saved run; start a new run in "
                               "another OUTPUT_DIR, or bring the data back")
        for name in self.PLAIN:
            setattr(self, name, state[name])
        fit_weights(self.model, state["model"], LAST)
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        if self.reverted:
            self.cfg.PRECISION = "float32"
            self.scaler = make_scaler(self.cfg.PRECISION, self.device)
        if state["scaler"] and self.scaler.is_enabled():
            self.scaler.load_state_dict(state["scaler"])
        torch.set_rng_state(state["random"])

    def revert(self, state: dict, why: str) -> None:
        """Once: back to the last good state, and on in float32. Raises TrainerError the second time."""
        if self.reverted:
            raise TrainerError(f"{why}, also after going back and training in float32. The best model so far is kept. Look "
                               "at training_samples.png and the images for damaged data, or try a smaller LR.", 1)
        self.load(state)
        self.reverted, self.cfg.PRECISION = True, "float32"
        self.scaler = make_scaler(self.cfg.PRECISION, self.device)
        self.guard = StepGuard(self.model, self.device)
        warn(f"{why}. Going back to the end of epoch {self.epoch} and on in float32, which is slower but safe.")

    def share_buffers(self) -> None:
        """Give all processes the first one's BatchNorm statistics: those that the checkpoint will hold."""
        if world_size() > 1:
            for buffer in self.model.buffers():
                dist.broadcast(buffer, 0)

    def save(self, output: Path, improved: bool, record: dict) -> None:
        """Write the best model first: whenever the run is killed, the last state repeats what is missing."""
        if improved:
            weights = self.model.state_dict()
            save_tensors(output / BEST, to_cpu({name: value.float() if value.is_floating_point() else value
                                                for name, value in weights.items()}))
            write_record(output / BEST, **record)
        save_tensors(output / LAST, self.state())


def train(cfg: types.SimpleNamespace, resume: bool, command: str) -> None:
    """Train, keep the best model, then evaluate it. command: how to resume, for messages."""
    device, output = torch.device(cfg.DEVICE), Path(cfg.OUTPUT_DIR)
    torch.backends.cudnn.benchmark = not cfg.DETERMINISTIC
    torch.use_deterministic_algorithms(cfg.DETERMINISTIC, warn_only=True)
    torch.set_float32_matmul_precision("highest" if cfg.DETERMINISTIC else "high")  # TF32 for what stays float32
    torch.backends.cudnn.allow_tf32 = not cfg.DETERMINISTIC
    describe_machine(cfg, device)
    state = read_last(cfg) if resume else None
    earlier = [output / name for name in RUN_FILES if (output / name).is_file()]
    keep = None
    if earlier and not resume:
        written = time.strftime("%Y%m%d-%H%M%S", time.localtime(max(path.stat().st_mtime for path in earlier)))
        keep = next(folder for number in itertools.count(1)
                    if not (folder := output / f"earlier_run_{written}{'' if number == 1 else f'_{number}'}").exists())
        go_on = f"To go on with it instead, press Ctrl-C and run:\n  {command}\n" if output / LAST in earlier else ""
        say(f"{output} holds an earlier run. {go_on}The new run will move its files to {keep.name} with its first checkpoint.")

    with shared_data(cfg, ["train", "valid", "test"]) as (splits, cache):
        run = Run(cfg, device, fingerprint(splits), state)
        initial = None if state else run.state()
        loaders = {}
        for name in ("train", "valid"):
            dataset = BrainTumorDataset(Path(cfg.DATA_DIR) / name, cfg.IMG_SIZE, name == "train", cfg.SEED, False,
                                        records=splits[name].records, cache=cache)
            loaders[name] = make_loader(dataset, cfg, train=name == "train")
        criterion = LOSSES[cfg.LOSS]()
        images = len(loaders["train"].dataset)
        record = {
            "encoder": cfg.ENCODER, **prediction_settings(cfg.IMG_SIZE, cfg.MEAN, cfg.STD), "threshold": 0.5,
            "settings": vars(cfg), "versions": versions(), "device": str(device), "platform": platform.platform(),
            "encoder_weights_from": run.encoder_weights_from, "data_counts": {
                name: {"images": len(split.records), "annotations": split.facts["annotations"],
                       "without_tumour": sum(not row.tumours for row in split.records), "skipped": split.facts["skipped"]}
                for name, split in splits.items()}}
        if state:
            say(f"Going on after epoch {run.epoch}; best validation Dice so far {run.best_dice:.4f} (epoch {run.best_epoch}).")
            if state["settings"]["EPOCHS"] < cfg.EPOCHS and cfg.EARLY_STOPPING and run.waited >= cfg.EARLY_STOPPING:
                run.waited = 0  # it had stopped early, and more epochs are asked for
        elif rank() == 0:
            if keep:
                keep_earlier_run(output, keep, ("training_samples.png",))
            plot_samples(output / "training_samples.png", loaders["train"].dataset)
        seconds = []
        while run.epoch < cfg.EPOCHS and not (cfg.EARLY_STOPPING and run.waited >= cfg.EARLY_STOPPING):
            began = time.perf_counter()
            loaders["train"].batch_sampler.set_epoch(run.epoch)
            lr = run.optimizer.param_groups[0]["lr"]
            stats = train_one_epoch(run.trained, loaders["train"], criterion, run.optimizer, run.scaler, device, cfg=cfg,
                                    guard=run.guard, epoch=run.epoch)
            train_seconds = time.perf_counter() - began
            persistent = stats.pop("persistent")
            run.share_buffers()
            scores = validate(run.model, loaders["valid"], criterion, device, cfg=cfg)
            if persistent or not math.isfinite(scores["valid_loss"]):
                run.revert(initial or shared_state(output), f"epoch {run.epoch + 1}: the loss or its gradient is not finite "
                           f"({stats['dropped']} steps dropped, validation loss {scores['valid_loss']:.4g})")
                continue
            run.epoch += 1
            run.scheduler.step(scores["dice"])
            improved = scores["dice"] > run.best_dice
            run.waited = 0 if improved else run.waited + 1
            if improved:
                run.best_dice, run.best_epoch = scores["dice"], run.epoch
            seconds.append(time.perf_counter() - began)
            row = {"epoch": run.epoch, **stats, **scores, "lr": lr, "images_per_second": round(images / train_seconds, 2),
                   "seconds": round(seconds[-1], 2)}
            run.history.append(row)
            if keep:
                keep_earlier_run(output, keep, tuple(name for name in RUN_FILES if name != "training_samples.png"))
                keep = None
            run.save(output, improved, record | {"best_epoch": run.epoch, "valid_metrics_at_img_size": scores})
            initial = None
            if rank() == 0:
                write_table(output / "training_history.csv", run.history)
                plot_history(output / "training_history.png", run.history)
            left = timedelta(seconds=round(sum(seconds) / len(seconds) * (cfg.EPOCHS - run.epoch)))
            say(f"epoch {run.epoch:>{len(str(cfg.EPOCHS))}}/{cfg.EPOCHS}  train loss {row['train_loss']:.4f}  "
                f"valid loss {row['valid_loss']:.4f}  Dice {row['dice']:.4f}  IoU {row['iou']:.4f}  lr {lr:.1e}  "
                f"{row['images_per_second']:6.1f} img/s  {row['seconds']:6.1f} s  left {left}"
                + (f"  dropped {row['dropped']}" if row["dropped"] else "") + ("  * best" if improved else ""))
        if run.epoch < cfg.EPOCHS:
            say(f"Stopped early: no better validation Dice for {run.waited} epochs (EARLY_STOPPING = {cfg.EARLY_STOPPING}).")
        elif state and not seconds:
            say(f"All {cfg.EPOCHS} epochs were done already; raise EPOCHS to train on.")
        say(f"Best validation Dice {run.best_dice:.4f} in epoch {run.best_epoch}, at {cfg.IMG_SIZE} px and threshold 0.5.")
        del loaders, run  # ends the workers and frees the GPU before the evaluation
        evaluate_checkpoint(cfg, output / BEST, splits, cache)
    say(f"\nModel: {output / BEST} (settings beside it in {Path(BEST).stem}.json)")
    say("Look at training_history.png, training_samples.png" + (" and test_predictions.png." if "test" in splits else "."))


def shared_state(output: Path) -> dict:
    """The last saved state, read by the first process and sent to the others."""
    state = [read_weights(output / LAST) if rank() == 0 else None]
    if world_size() > 1:
        dist.broadcast_object_list(state, 0)
    return state[0]


def run_mode(cfg: types.SimpleNamespace, mode: argparse.Namespace, command: str) -> None:
    """Do what the command line asks for. Raises TrainerError and Interrupted."""
    checkpoint = Path(mode.checkpoint or Path(cfg.OUTPUT_DIR) / BEST)
    if mode.predict:
        predict_files(cfg, checkpoint, mode.predict)
        return
    start_processes(cfg)
    if mode.audit:
        with shared_data(cfg, ["train", "valid", "test"]):
            say("The data can be used.")
    elif mode.evaluate:
        if not checkpoint.is_file():
            raise TrainerError(f"no checkpoint to evaluate: {checkpoint}; train first, or name one with --checkpoint")
        cfg.IMG_SIZE = read_record(checkpoint)[0].get("img_size", cfg.IMG_SIZE)
        with shared_data(cfg, ["valid", "test"]) as (splits, cache):
            evaluate_checkpoint(cfg, checkpoint, splits, cache)
    else:
        train(cfg, mode.resume, command)
    if dist.is_initialized():
        dist.destroy_process_group()


def main(argv: list[str] | None = None) -> int:
    """Run the script. argv: the words of the command line, default sys.argv[1:].

    Returns the exit code: 0 done, 1 stopped by a failure, 2 something for the user to put right, 130 Ctrl-C, 143 SIGTERM.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a Chinese path must not end a run whose output goes to a file
            stream.reconfigure(errors="backslashreplace")
    cv2.setNumThreads(0)  # parallel work here is a matter of threads and processes of our own
    failure = None
    with STOP.installed():
        try:
            cfg, mode = read_settings(argv)
            command = resume_command(argv)
            run_mode(cfg, mode, command)
            return 0
        except (Interrupted, KeyboardInterrupt):
            pass
        except TrainerError as error:
            failure = error
        except (RuntimeError, MemoryError) as error:
            text = str(error)
            if "DataLoader worker" in text:
                failure = TrainerError("a process that prepares images died, usually because memory ran out; go on with a "
                                       f"smaller NUM_WORKERS:\n  {command} --num-workers 0", 1)
            elif isinstance(error, MemoryError) or "not enough memory" in text:
                failure = TrainerError(f"memory ran out ({text}); go on with a smaller BATCH_SIZE and more "
                                       f"ACCUMULATION_STEPS, or a smaller NUM_WORKERS:\n  {command}", 1)
            elif not STOP.signum:  # a signal to the whole process group also ends workers, which shows up here
                raise
        if failure is None or STOP.signum:
            number = STOP.signum or signal.SIGINT
            done = 'cfg' in locals() and (Path(cfg.OUTPUT_DIR) / LAST).is_file() and not (mode.predict or mode.audit)
            say("\nStopped. Everything up to the last finished epoch is saved." if done else "\nStopped.")
            if done:
                say(f"To go on:\n  {command}")
            return 128 + number
        if failure.exit_code != 2 or rank() == 0:  # what ends with 2 is found by every process alike
            print(f"error: {failure}", file=sys.stderr, flush=True)
        return failure.exit_code


if __name__ == "__main__":
    sys.exit(main())
