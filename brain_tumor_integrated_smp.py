"""Brain-tumour segmentation: UNet++ with a ResNet34 encoder, trained on a folder of MRI slices with COCO polygons.

    python brain_tumor_integrated_smp.py                                   train with the constants below
    python brain_tumor_integrated_smp.py --img-size 128 --epochs 5         any constant, without editing
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
import ctypes
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
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import uuid
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
import torchvision
from matplotlib.figure import Figure
from tqdm import tqdm

try:
    import fcntl  # file locks on Linux and macOS
except ImportError:  # Windows refuses to delete a file that is in use, which serves the same purpose
    fcntl = None

# ===== Settings: edit them here, or override any of them on the command line (IMG_SIZE = 256 is --img-size 256) =======

# --- data and output
DATA_DIR = str(Path(__file__).resolve().parent)  # folder that holds train/, valid/ and (optional) test/
OUTPUT_DIR = str(Path(__file__).resolve().parent)  # folder for checkpoints, tables and pictures
CATEGORIES = ()  # names of the COCO categories that count as tumour; empty: all of them
SKIP_BAD_IMAGES = False  # True: go on without unreadable images (they are listed) instead of stopping
CACHE_GB = 8.0  # GB; decoded images are kept on disk for the length of a run if they fit; 0: decode every time
CACHE_DIR = None  # folder for that temporary file, best on a fast local disk; None: the system's temporary folder

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

# The least value of each number; where it stands without a decimal point, whole numbers only.
MINIMUM = {"CACHE_GB": 0.0, "IMG_SIZE": 64, "BATCH_SIZE": 1, "NUM_WORKERS": 0, "EPOCHS": 1, "WEIGHT_DECAY": 0.0,
           "ACCUMULATION_STEPS": 1, "GRAD_CLIP": 0.0, "PLATEAU_PATIENCE": 0, "EARLY_STOPPING": 0, "SEED": 0}
RULES = {  # what else a setting must satisfy, in words and as a test
    "IMG_SIZE": ("a multiple of 32, at most 4096", lambda v: v % 32 == 0 and v <= 4096),
    "BATCH_SIZE": ("at least the number of processes", lambda v: v >= int(os.environ.get("WORLD_SIZE", 1))),
    "MEAN": ("three numbers", lambda v: len(v) == 3 and all(map(math.isfinite, v))),
    "STD": ("three numbers above 0", lambda v: len(v) == 3 and all(0 < x < math.inf for x in v)),
    "ENCODER": ("an encoder of segmentation_models_pytorch",
                lambda v: v in smp.encoders.get_encoder_names() or v.startswith("tu-")),
    "LR": ("a number above 0", lambda v: 0 < v < math.inf),
    "LOSS": ("one of dice_bce, dice_focal, focal_tversky", lambda v: v in LOSSES),
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

# A resumed run may differ from the saved one in these; BATCH_SIZE * ACCUMULATION_STEPS has to stay the same.
RESUME_MAY_CHANGE = ("EPOCHS", "EARLY_STOPPING", "NUM_WORKERS", "DEVICE", "PRECISION", "COMPILE", "DETERMINISTIC",
                     "SYNC_BATCHNORM", "CACHE_GB", "CACHE_DIR", "DATA_DIR", "OUTPUT_DIR", "BATCH_SIZE",
                     "ACCUMULATION_STEPS", "ENCODER_WEIGHTS", "INIT_WEIGHTS", "SKIP_BAD_IMAGES")


class TrainerError(Exception):
    """Something the user can put right. main() prints the message, without a stack trace, and ends with exit_code."""

    def __init__(self, message: str, exit_code: int = 2):
        # A DataLoader raises what a worker raised with the worker's stack trace as message.
        super().__init__(message.rpartition("TrainerError: ")[2].strip())
        self.exit_code = exit_code


def default_settings() -> Settings:
    """The constants, as they are now."""
    return Settings(**{name: globals()[name] for name in CONSTANTS})


def read_settings(argv: list[str] | None) -> tuple[Settings, argparse.Namespace]:
    """Merge the command line (default: sys.argv[1:]) into the constants.

    Returns (cfg, mode): cfg holds every constant under its own name; mode says what to do (train if nothing is set).
    Raises TrainerError for an unknown flag, a wrong type or an impossible value.
    """
    def fail(message):
        raise TrainerError(f"{message} (--help lists the options)")

    def text(word):
        return None if word.lower() == "none" else word

    def number(word):
        return int(word) if re.fullmatch(r"[+-]?\d+", word) else float(word)

    usage = "%(prog)s [--resume | --audit | --evaluate | --predict PATH ...] [--name-of-a-constant VALUE ...]"
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], usage=usage, allow_abbrev=False,
                                     formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=30))
    parser.error = fail  # one sentence, as for every other error, instead of the whole usage
    group = parser.add_argument_group("what to do (default: train)").add_mutually_exclusive_group()
    group.add_argument("--resume", action="store_true", help="go on with the interrupted run in OUTPUT_DIR")
    group.add_argument("--audit", action="store_true", help="check the data, print what was found, and stop")
    group.add_argument("--evaluate", action="store_true", help="only find the threshold and score the test set")
    group.add_argument("--predict", nargs="+", metavar="PATH", help="segment image files, or all images of folders")
    parser.add_argument("--checkpoint", metavar="FILE", help="for --evaluate and --predict [that in OUTPUT_DIR]")
    # Names, types and defaults come from the constants; groups and help texts from the comments beside them.
    source = Path(__file__).read_text(encoding="utf-8")
    for title, name, comment in re.findall(r"^# --- (.+)$|^([A-Z_]+) = [^#\n]*(?:# *(.+))?$", source, re.M):
        if title:
            group = parser.add_argument_group(title)
        elif name in CONSTANTS:
            value = globals()[name]
            options = {"dest": name, "default": value, "help": f"{comment} [{value}]".replace("%", "%%")}
            if isinstance(value, bool):
                options |= {"action": argparse.BooleanOptionalAction}
            elif isinstance(value, tuple):
                options |= {"nargs": "*", "type": number if name in RULES else str, "metavar": "VALUE"}
            else:
                kind = text if value is None or isinstance(value, str) else number
                options |= {"type": kind, "metavar": kind.__name__.upper()}
            group.add_argument("--" + name.lower().replace("_", "-"), **options)
    given = vars(parser.parse_args(argv))
    cfg = Settings(**{name: given.pop(name) for name in CONSTANTS})
    for name in ("CATEGORIES", "MEAN", "STD"):
        setattr(cfg, name, tuple(getattr(cfg, name)))
    mode = argparse.Namespace(**given)
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


# ===== Processes, messages, interruption and files: the few mechanisms that everything below shares ===================


def rank() -> int:
    """Number of this process among those of torchrun, 0 without it."""
    return dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", 0))


def world_size() -> int:
    """How many processes train together, 1 without torchrun."""
    return dist.get_world_size() if dist.is_initialized() else 1


def gather(value) -> list:
    """The picklable values of all processes, in the order of their ranks."""
    values = [value] * world_size()
    if dist.is_initialized():
        dist.all_gather_object(values, value)
    return values


def available_cores() -> int:
    """CPU cores for this process: those it may use, shared between the processes of torchrun on this machine."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


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


class Interrupted(Exception):
    """Ctrl-C or SIGTERM arrived; raised between two steps, never inside one."""


class StopSignal:
    """Handler that remembers Ctrl-C and SIGTERM, for progress() to act on; a second signal ends at once."""

    signum = 0
    go_on = ""  # the command that goes on with the run, once there is a state to go on from

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


def write_file(path: Path, write, required: bool = False) -> bool:
    """Write a file so that it is either complete or unchanged: temporary name, flush to disk, rename.

    write: bytes, or a function that gets the open binary file. A failure is a warning, or TrainerError if required.
    Returns whether the file was written.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")  # the same name every time: a killed run leaves at most one
    try:
        with open(temporary, "wb") as file:
            file.write(write) if isinstance(write, bytes) else write(file)
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
        return True
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as RuntimeError
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        if required:
            again = "go on with --resume" if STOP.go_on else "start again"
            raise TrainerError(f"cannot write {path}: {error}\nWhat was saved before is unharmed. Free disk space, or "
                               f"mend the folder, then {again}.", 1) from error
        warn(f"cannot write {path}: {error} (going on without it)")
        return False
    except BaseException:  # a second Ctrl-C
        temporary.unlink(missing_ok=True)
        raise


def write_table(path: Path, rows: list[dict]) -> None:
    """Write rows with the same keys as a CSV file."""
    table = io.StringIO()
    writer = csv.DictWriter(table, rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_file(path, table.getvalue().encode("utf-8"))


def write_image(path: Path, image: np.ndarray) -> None:
    """Write a uint8 grey [H, W] or RGB [H, W, 3] array as PNG; cv2.imwrite fails on non-ASCII paths on Windows."""
    png = cv2.imencode(".png", image if image.ndim == 2 else image[..., ::-1])[1]
    write_file(path, png.tobytes(), required=True)


# ===== Annotations and image files ====================================================================================

ANNOTATION_FILE = "_annotations.coco.json"
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp"}
LARGEST_SIDE = 10_000  # pixels; a larger size in a JSON is a mistake that would only exhaust the memory
FEW_PIXELS = 25  # a mask with fewer is worth a look: tools leave such specks behind
SAMPLE_MARK = "sample data of brain_tumor_integrated_smp.py"  # in the JSON of the phantoms that come with the script


@dataclass
class Record:
    """One image of a split with its merged mask."""

    number: int  # position in the JSON's list of images; augmentation depends on it
    path: str
    file_name: str  # as in the JSON
    height: int  # pixels, of the annotation's coordinate system
    width: int
    rles: list[dict] = field(default_factory=list)  # its annotations that have an area, as compressed COCO RLEs
    slot: int = -1  # its place in the cache

    def mask(self) -> np.ndarray:
        """The union of its annotations: uint8 [height, width], 0 or 1."""
        if not self.rles:
            return np.zeros((self.height, self.width), np.uint8)
        return np.ascontiguousarray(coco_mask.decode(coco_mask.merge(self.rles)))


@dataclass
class Split:
    """A split as its JSON describes it, and what prepare_data() adds."""

    records: list[Record]
    annotations: int  # that count, see CATEGORIES
    remarks: list[str]  # suspicious annotations, as sentences
    unnamed: int  # image files that no entry names
    is_sample: bool  # made by this project
    skipped: int = 0  # images that cannot be read
    reports: list[dict] = field(default_factory=list)  # of scan(), one for each record


def unpack_runs(counts: str) -> list[int]:
    """Run lengths from the text of a compressed COCO RLE: 5 bits a letter, from the fourth run on as differences."""
    runs, value, shift = [], 0, 0
    for letter in counts:
        code = ord(letter) - 48
        if not 0 <= code < 64:
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
        runs = unpack_runs(counts) if isinstance(counts, str) else counts
        # pycocotools fills up what is cut short and reads on behind its end: it must be given whole masks only.
        if not isinstance(runs, list) or any(type(n) is not int or n < 0 for n in runs) or sum(runs) != height * width:
            raise ValueError("the counts of its RLE do not add up to height times width")
        return coco_mask.frPyObjects({"size": [height, width], "counts": runs}, height, width), []
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
    split_dir = Path(split_dir)
    json_path = split_dir / ANNOTATION_FILE
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

    problems, remarks, records, counted = [], [], {}, 0
    listed_ids = Counter(str(entry.get("id")) for entry in coco["images"])
    for number, entry in enumerate(coco["images"]):
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
    paths = Counter(os.path.normcase(record.path) for record in records.values())
    problems += [f"{Path(path).name} is listed as two images" for path, uses in paths.items() if uses > 1]
    for entry in coco["annotations"]:
        label, record = f"annotation id {entry.get('id')}", records.get(str(entry.get("image_id")))
        if str(entry.get("image_id")) not in listed_ids:
            problems.append(f"{label} belongs to the image id {entry.get('image_id')}, which the file does not list")
        if record is None or categories and names.get(str(entry.get("category_id"))) not in categories:
            continue
        counted += 1
        try:
            rle, odd = segmentation_to_rle(entry.get("segmentation"), record.height, record.width)
        except (ValueError, TypeError, OverflowError) as error:
            problems.append(f"{label} of {record.file_name}: {error}")
            continue
        pixels = int(coco_mask.area(rle)) if rle is not None else 0
        if rle is not None and pixels < FEW_PIXELS:
            odd.append(f"the mask has only {pixels} pixels")
        remarks += [f"{record.file_name}, {label}: {remark}" for remark in odd]
        if pixels:
            record.rles.append(rle)
    if problems:
        raise TrainerError(f"{json_path} cannot be used, {len(problems)} problem(s):{listed(problems)}\n"
                           "Correct the file, or export it again.")
    unnamed = [path for path in split_dir.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES
               and os.path.normcase(path) not in paths]
    return Split(list(records.values()), counted, remarks, len(unnamed), SAMPLE_MARK in str(coco.get("info")))


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
    if image is None:
        found = f"not an image, or cut short ({data.size} bytes)" if data.size else "the file is empty"
        raise TrainerError(f"{path}: {found}")
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


def load_sample(record: Record, img_size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Decode, rasterise and resize one image: the deterministic part, before any augmentation.

    Returns (RGB uint8 [S, S, 3], mask uint8 0/1 [S, S], RGB uint8 [H, W, 3] as in the file).
    """
    image = read_image(record.path, record.height, record.width)
    return resize(image, img_size, img_size), resize_mask(record.mask(), img_size, img_size), image


# ===== One pass over all files: audit and cache =======================================================================


class PixelCache:
    """Decoded and resized images of a run: uint8 [count, S, S, 4] (RGB and mask) in one temporary file.

    All workers and processes of a machine map the same file, so the pixels exist once, under every start method and
    without /dev/shm. A lock marks the file as in use: opening a cache removes those that killed runs have left.
    """

    def __init__(self, folder: str | Path, count: int, img_size: int):
        """Raises OSError when the folder has no room."""
        for leftover in Path(folder).glob("brain_tumor_cache_*.bin"):
            with contextlib.suppress(OSError), open(leftover, "rb") as file:  # locked: its run is still going on
                if fcntl:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                leftover.unlink()
        self.shape, self._array = (count, img_size, img_size, 4), None
        self.path = Path(folder) / f"brain_tumor_cache_{uuid.uuid4().hex}.bin"
        self.file = open(self.path, "w+b")
        try:
            if fcntl:
                fcntl.flock(self.file, fcntl.LOCK_EX)
            if hasattr(os, "posix_fallocate"):  # a sparse file on a full disk would end in a bus error later
                os.posix_fallocate(self.file.fileno(), 0, math.prod(self.shape))
            else:
                self.file.truncate(math.prod(self.shape))
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
        return self.__dict__ | {"file": None, "_array": None}  # another process gets the path, not the pixels

    def close(self) -> None:
        """Remove the file. On Windows a worker may still hold it for a moment: then the next start removes it."""
        self._array = None
        self.file.close()
        with contextlib.suppress(OSError):
            self.path.unlink(missing_ok=True)


def open_cache(cfg: Settings, count: int) -> PixelCache | None:
    """A cache for count images, or None, said, when it is switched off, too large or finds no room."""
    folder, gigabytes = cfg.CACHE_DIR or tempfile.gettempdir(), count * cfg.IMG_SIZE**2 * 4 / 1e9
    try:
        if gigabytes <= cfg.CACHE_GB and gigabytes < 0.9 * shutil.disk_usage(folder).free / 1e9:
            return PixelCache(folder, count, cfg.IMG_SIZE)
        reason = f"they need {gigabytes:.1f} GB, CACHE_GB allows {cfg.CACHE_GB:g}, {folder} may be full"
    except OSError as error:
        reason = str(error)
    say(f"Images are decoded again in every epoch, which is slower: no room to keep them ({reason}).")
    return None


def scan(record: Record, img_size: int, cache: PixelCache | None) -> dict:
    """Read one image file once: fill its cache slot and report on it. A damaged file is reported, not raised."""
    try:
        image, mask, full = load_sample(record, img_size)
    except TrainerError as error:
        return {"error": str(error)}
    if cache is not None:
        cache.array[record.slot, ..., :3], cache.array[record.slot, ..., 3] = image, mask
    truth = record.mask()
    return {"error": "", "digest": hashlib.sha256(repr(full.shape).encode() + full.data).hexdigest(),
            "mask_digest": hashlib.sha256(truth.data).hexdigest(), "share": float(truth.mean()),
            "vanishes": bool(truth.any() and not mask.any()), "differs": full.shape[:2] != truth.shape}


def prepare_data(cfg: Settings, names: list[str]) -> tuple[dict[str, Split], PixelCache | None]:
    """Read, check and cache the splits, print the audit, and stop at bad data.

    names: of the splits; "test" may be missing on disk, and is left out then.
    Returns (splits by name, cache or None). The caller closes the cache. Raises TrainerError.
    """
    folder = {name: Path(cfg.DATA_DIR) / name for name in names}
    if "test" in names and not folder["test"].is_dir():
        say(f"No test folder ({folder.pop('test')}): the score on test is left out.")
    splits = {name: read_coco(path, cfg.CATEGORIES) for name, path in folder.items()}
    if not all(split.is_sample for split in splits.values()):  # a user's own data replaces all of the phantoms
        for name in [name for name, split in splits.items() if split.is_sample]:
            if name != "test":
                raise TrainerError(f"{folder[name]} still holds the sample phantoms, unlike the other folders; "
                                   f"put your own {name} set there")
            say("The test folder still holds the sample phantoms: the score on test is left out.")
            del splits[name]
    records = [record for split in splits.values() for record in split.records]
    for slot, record in enumerate(records):
        record.slot = slot
    cache = open_cache(cfg, len(records))
    pool = ThreadPoolExecutor(available_cores())  # OpenCV decodes and resizes without Python's lock
    try:
        jobs = pool.map(lambda record: scan(record, cfg.IMG_SIZE, cache), records)
        reports = list(progress(jobs, "Reading images", len(records)))
        pool.shutdown()
        bad = [report["error"] for report in reports if report["error"]]
        for split in splits.values():
            good = [record for record in split.records if not reports[record.slot]["error"]]
            split.skipped, split.records = len(split.records) - len(good), good
            split.reports = [reports[record.slot] for record in good]
        print_audit(splits, cfg.IMG_SIZE)
        if bad and not cfg.SKIP_BAD_IMAGES:
            raise TrainerError(f"{len(bad)} image(s) cannot be read:{listed(bad)}\nRepair or remove them, or set "
                               "SKIP_BAD_IMAGES = True (--skip-bad-images) to go on without them.")
        if bad:
            warn(f"going on without {len(bad)} unreadable image(s):{listed(bad)}")
        for name, split in splits.items():
            if not split.records or name == "train" and not any(report["share"] for report in split.reports):
                missing = "tumour pixel" if split.records else "readable image"
                raise TrainerError(f"{folder[name]} has no {missing} at all; check images, annotations and CATEGORIES")
        return splits, cache
    except BaseException:
        pool.shutdown(cancel_futures=True)
        if cache is not None:
            cache.close()
        raise


def print_audit(splits: dict[str, Split], img_size: int) -> None:
    """Print the table of what the splits hold, and below it what is suspicious."""
    columns, remarks, seen = [], [], {}
    for name, split in splits.items():
        shares = [100 * report["share"] for report in split.reports if report["share"]] or [math.nan]
        columns.append({
            "Data": name, "images": len(split.records), "unreadable images": split.skipped,
            "annotations": split.annotations,
            "without tumour": sum(not report["share"] for report in split.reports),
            "several tumours": sum(len(record.rles) > 1 for record in split.records),
            "smallest tumour, % of image": f"{min(shares):.3f}",
            "median tumour, % of image": f"{np.median(shares):.3f}",
            "largest tumour, % of image": f"{max(shares):.3f}",
            "files that the JSON does not name": split.unnamed})
        remarks += [f"{name}/{remark}" for remark in split.remarks]
        for record, report in zip(split.records, split.reports):
            label = f"{name}/{record.file_name}"
            if report["vanishes"]:
                remarks.append(f"{label}: the tumour disappears at IMG_SIZE {img_size}")
            if report["differs"]:
                remarks.append(f"{label}: the JSON says {record.width}x{record.height} pixels, the file differs "
                               "(the mask is stretched with the image)")
            split_of_first, first = seen.setdefault(report["digest"], (name, label))
            if first != label:
                leak = " (the same picture in two splits makes scores too good)" if split_of_first != name else ""
                remarks.insert(0 if leak else len(remarks), f"{label}: same picture as {first}{leak}")
    say("\n" + "\n".join(row.ljust(35) + "".join(f"{column[row]!s:>10}" for column in columns) for row in columns[0]))
    say(f"\nWorth a look, {len(remarks)} remark(s):{listed(remarks)}\n" if remarks else "")


def fingerprint(splits: dict[str, Split]) -> str:
    """A digest of the pixels and masks of train and valid: the same data, wherever it lies."""
    content = [(name, record.number, report["digest"], report["mask_digest"]) for name in ("train", "valid")
               for record, report in zip(splits[name].records, splits[name].reports)]
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
        self.records = read_coco(split_dir, categories).records if records is None else records
        self.img_size, self.seed, self.normalize, self.cache = img_size, seed, normalize, cache
        self.transform = build_transform(train, normalize, mean, std)

    def __len__(self) -> int:
        return len(self.records)

    def sample(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """The resized, not augmented image: RGB uint8 [S, S, 3] and mask uint8 0/1 [S, S]."""
        if self.cache is None:
            return load_sample(self.records[index], self.img_size)[:2]
        pixels = self.cache.array[self.records[index].slot]
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
    """One thread per worker; it ends with the main process, also when that was killed, and leaves Ctrl-C to it."""
    cv2.setNumThreads(0)
    torch.set_num_threads(1)
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


@functools.cache
def memory_format(device: torch.device) -> torch.memory_format:
    """How images, weights and activations [N, C, H, W] lie in memory: channels_last where convolutions prefer it.

    They do on GPUs and on CPUs with AVX-512 or bfloat16. With AVX2 alone, oneDNN takes twice as long for the gradients
    of the weights in it.
    """
    cpu = torch.cpu.get_capabilities()
    only_avx2 = device.type == "cpu" and cpu.get("avx2") and not cpu.get("avx512_f")
    return torch.contiguous_format if only_avx2 else torch.channels_last


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
        reason = f"{type(error).__name__}: {str(error)[:200]}"
        raise TrainerError(f"{path} is damaged or no weights file ({reason})") from error
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
    build = functools.partial(smp.UnetPlusPlus, encoder_name=encoder, in_channels=3, classes=1)
    try:
        model = build(encoder_weights=None)
        if encoder_weights == "imagenet":
            say("Getting ImageNet weights for the encoder (downloaded once, then from the local cache) ...")
            return build(encoder_weights="imagenet"), "imagenet"
    except (KeyError, ValueError, NotImplementedError) as error:
        raise TrainerError(f"UNet++ cannot be built with ENCODER = {encoder!r}, ENCODER_WEIGHTS = {encoder_weights!r}: "
                           f"{error}") from None
    except Exception as error:  # networks, proxies and hubs fail in many ways; model was built before
        reason = f"download failed: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
        warn(f"no ImageNet weights ({reason}).\n"
             "Training starts from RANDOM weights, which costs accuracy. To get them after all:\n"
             "  - where the hub is blocked, name a mirror in the environment: HF_ENDPOINT=https://<a mirror>\n"
             "  - or download the file elsewhere and set ENCODER_WEIGHTS to it (--encoder-weights FILE)\n"
             "  - or choose the random start yourself: ENCODER_WEIGHTS = None (--encoder-weights none)")
        return model, f"random ({reason})"
    if encoder_weights is None:
        return model, "random"
    weights = {name: value for name, value in read_weights(encoder_weights).items() if not name.startswith("fc.")}
    fit_weights(model.encoder, weights, encoder_weights)  # a torchvision file has a classifier, "fc.", too
    return model, f"file {encoder_weights}"


# ===== Losses: float32 logits [B, 1, S, S] and targets (0 or 1) of the same shape in, a mean over images out ==========
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


# ===== Metrics: from integer counts per image =========================================================================


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


# ===== Training and validation ========================================================================================


def amp_dtype(precision: str, device: torch.device) -> torch.dtype:
    """The dtype of autocast for a PRECISION setting; torch.float32 means no autocast."""
    if precision != "auto":
        return getattr(torch, precision)
    if device.type == "cuda":
        return torch.float16
    # Where the processor has no bfloat16 arithmetic, autocast is slower than float32.
    native = any(has and name.endswith("bf16") for name, has in torch.cpu.get_capabilities().items())
    return torch.bfloat16 if native and device.type == "cpu" else torch.float32


def autocast(precision: str, device: torch.device) -> torch.autocast:
    """The autocast context of a PRECISION setting."""
    dtype = amp_dtype(precision, device)
    return torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)


def make_scaler(precision: str, device: torch.device) -> torch.amp.GradScaler:
    """GradScaler for float16; for the wider dtypes a disabled one, whose methods pass everything through."""
    return torch.amp.GradScaler("cuda", enabled=amp_dtype(precision, device) == torch.float16)


class StepGuard:
    """What the training step needs to survive bad numbers and a full GPU; one for a whole run.

    The counters stay on the device: reading them in every step would make the processor wait for the GPU.
    """

    def __init__(self, model: torch.nn.Module, device: torch.device):
        self.buffers, self.device = list(model.buffers()), device  # the buffers are BatchNorm's running statistics
        self.micro_batch = math.inf  # the most images per forward pass; finite once memory has run out

    def start_epoch(self) -> None:
        """Set the epoch's sums to zero: loss over images, images, dropped steps."""
        self.loss_sum, self.images, self.dropped = torch.zeros(3, device=self.device).unbind()

    def before_step(self) -> None:
        """Remember the running statistics: the forward pass changes them before anyone sees its result."""
        self.saved = [buffer.clone() for buffer in self.buffers]

    def restore(self, bad: torch.Tensor) -> None:
        """Put the remembered statistics back where bad (bool, on the device) is true."""
        for buffer, saved in zip(self.buffers, self.saved):
            buffer.copy_(torch.where(bad, saved, buffer))

    def after_step(self, loss: torch.Tensor, images: torch.Tensor, bad: torch.Tensor, scaled: bool) -> None:
        """Count a step. loss: its mean over images; bad: whether it is dropped; scaled: by GradScaler."""
        self.restore(bad)
        calibrating = loss.isfinite() & scaled  # GradScaler tries how far it can go: by design, not counted
        self.dropped = self.dropped + (bad & ~calibrating)
        self.loss_sum = self.loss_sum + torch.where(bad, 0, loss * images)
        self.images = self.images + torch.where(bad, 0, images)

    def shrink(self, images: int) -> None:
        """After a forward pass of so many images ran out of memory: halve them, or give up."""
        if world_size() > 1:
            raise TrainerError("a GPU ran out of memory, and several processes cannot repeat a step. What helps: a "
                               "smaller BATCH_SIZE with more ACCUMULATION_STEPS; a smaller IMG_SIZE", 1)
        self.micro_batch = half_of(images)
        self.restore(torch.ones((), dtype=torch.bool, device=self.device))
        warn(f"out of GPU memory: from now on at most {self.micro_batch} image(s) per forward pass. The gradient "
             "stays that of the batch, but BatchNorm sees smaller ones. A smaller BATCH_SIZE avoids this.")


def half_of(images: int) -> int:
    """How many images to try after so many did not fit into the GPU. Raises TrainerError after a single one."""
    if images == 1:
        raise TrainerError("the GPU has too little memory for a single image. What helps: a smaller IMG_SIZE; a "
                           "smaller ENCODER, e.g. resnet18; closing other programs on the GPU; --device cpu (slow)", 1)
    torch.cuda.empty_cache()
    return (images + 1) // 2


def train_one_epoch(model: torch.nn.Module, loader, criterion: torch.nn.Module, optimizer: torch.optim.Optimizer,
                    scaler: torch.amp.GradScaler, device: torch.device, *, cfg: Settings | None = None,
                    guard: StepGuard | None = None, epoch: int = 0) -> dict[str, float]:
    """One pass over the loader's (images, masks) batches; see to_input() and to_target() for their types.

    criterion: a mean over images. optimizer: any; a fused one skips a bad step without asking the GPU.
    cfg: ACCUMULATION_STEPS, GRAD_CLIP, PRECISION, MEAN and STD are used (default: the constants).
    Returns train_loss (mean over images), dropped (steps left out because a number was not finite), and persistent
    (1.0 if these were too many to go on). Raises Interrupted, and TrainerError when memory cannot suffice.
    """
    cfg, device = cfg or default_settings(), torch.device(device)
    guard = guard or StepGuard(model, device)
    guard.start_epoch()
    model.train()
    steps = math.ceil(len(loader) / cfg.ACCUMULATION_STEPS)
    batches = iter(loader)
    for _ in progress(range(steps), f"Epoch {epoch + 1}: training"):
        group = list(itertools.islice(batches, cfg.ACCUMULATION_STEPS))  # the last one may be shorter
        images_in_step = torch.full((), float(sum(len(images) for images, _ in group)), device=device)
        if world_size() > 1:
            dist.all_reduce(images_in_step)
        guard.before_step()
        done = False
        while not done:
            size = min(guard.micro_batch, max(len(images) for images, _ in group))
            parts = [(images[i:i + size], masks[i:i + size])
                     for images, masks in group for i in range(0, len(images), size)]
            loss = torch.zeros((), device=device)
            try:
                for number, (images, masks) in enumerate(parts, 1):
                    last = number == len(parts)  # several processes exchange gradients once per step
                    with model.no_sync() if world_size() > 1 and not last else contextlib.nullcontext():
                        with autocast(cfg.PRECISION, device):
                            logits = model(to_input(images, device, cfg.MEAN, cfg.STD))
                        # Weighted like this, the parts add up to the mean over the images of the step.
                        part = criterion(logits.float(), to_target(masks, device)) * (len(images) / images_in_step)
                        part = part * torch.where(part.detach().isfinite(), 1.0, math.nan)  # spoils every gradient
                        scaler.scale(part * world_size()).backward()  # DistributedDataParallel takes the mean
                    loss += part.detach()
                done = True
            except torch.OutOfMemoryError:
                logits = part = None  # lets go of the graph, before the next try
            if not done:
                optimizer.zero_grad()
                guard.shrink(size)
        scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.GRAD_CLIP or math.inf)
        bad = ~norm.isfinite()
        fused = optimizer.defaults.get("fused")
        if fused and not scaler.is_enabled():
            optimizer.found_inf = bad.float()  # what GradScaler sets otherwise: a fused optimizer skips the step
        if fused or scaler.is_enabled() or not bad:  # only another optimizer has to wait for the answer
            scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        guard.after_step(loss, images_in_step, bad, scaler.is_enabled())
    sums = gather([float(value) for value in (guard.loss_sum, guard.images, guard.dropped)])
    images, dropped = sums[0][1], int(max(part[2] for part in sums))  # every process counts all images of a step
    gave_up = scaler.is_enabled() and scaler.get_scale() < 1  # GradScaler found no scale at which float16 works
    return {"train_loss": sum(part[0] for part in sums) / images if images else math.nan, "dropped": dropped,
            "persistent": float(dropped > steps / 2 or gave_up)}


def forward_in_parts(model: torch.nn.Module, images: torch.Tensor) -> torch.Tensor:
    """model(images) [B, ...], in parts if memory runs out; for evaluation, where images do not see each other."""
    try:
        return model(images)
    except torch.OutOfMemoryError:
        pass  # leaving the block lets go of what the failed pass still holds
    parts = images.split(half_of(len(images)))
    return torch.cat([forward_in_parts(model, part) for part in parts])


@torch.inference_mode()
def validate(model: torch.nn.Module, loader, criterion: torch.nn.Module, device: torch.device, *,
             cfg: Settings | None = None) -> dict[str, float]:
    """Loss and scores at threshold 0.5 and the network's image size.

    Returns valid_loss (mean over images) and summarize() of all images of all processes, none counted twice.
    """
    cfg, device = cfg or default_settings(), torch.device(device)
    model.eval()
    losses, counts = [torch.zeros((), device=device)], [torch.zeros((0, 3), dtype=torch.int64, device=device)]
    for images, masks in progress(loader, "Validation"):
        with autocast(cfg.PRECISION, device):
            logits = forward_in_parts(model, to_input(images, device, cfg.MEAN, cfg.STD)).float()
        targets = to_target(masks, device)
        losses.append(criterion(logits, targets) * len(images))
        counts.append(confusion(logits.sigmoid(), targets))
    parts = gather((float(torch.stack(losses).sum()), torch.cat(counts).cpu().numpy()))
    counts = np.concatenate([part[1] for part in parts])
    return {"valid_loss": sum(part[0] for part in parts) / len(counts), **summarize(counts)}


# ===== Checkpoints ====================================================================================================

BEST, LAST = "unet_plusplus_best.pth", "unet_plusplus_last.pth"
NEW = "new_run"  # folder of a run without a complete checkpoint, as long as OUTPUT_DIR holds an earlier run
FIRST_FILES = ("training_samples.png", BEST, "unet_plusplus_best.json", LAST)  # those of a first checkpoint
RUN_FILES = ("training_history.csv", "training_history.png", "test_metrics.csv", "test_predictions.png", *FIRST_FILES)


def to_cpu(value):
    """A copy of nested dicts and lists with every tensor on the CPU.

    Raises TrainerError if one of them holds NaN or infinity: such a state must never replace a good one.
    """
    if isinstance(value, torch.Tensor):
        if not torch.isfinite(value).all():
            raise TrainerError("the model holds numbers that are not finite, and was not saved; go on with --resume", 1)
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: to_cpu(item) for key, item in value.items()}
    return [to_cpu(item) for item in value] if isinstance(value, list) else value


def digest_of(file: Path) -> str:
    """SHA-256 of a file."""
    return hashlib.sha256(file.read_bytes()).hexdigest()


def write_record(checkpoint: Path, record: dict, content: bytes | None = None) -> None:
    """Write the JSON beside a checkpoint, with the digest that ties the two together.

    content: of a new checkpoint, which is written afterwards. Until then the JSON fits the one before, too: whenever
    the run is killed, there is a pair.
    """
    before = digest_of(checkpoint) if checkpoint.is_file() else None
    record |= {"checkpoint": checkpoint.name, "sha256": hashlib.sha256(content).hexdigest() if content else before,
               "sha256_before": before if content else None}
    content = json.dumps(record, indent=2, ensure_ascii=False)
    write_file(checkpoint.with_suffix(".json"), content.encode("utf-8"), required=True)


def read_record(checkpoint: Path) -> tuple[dict, str]:
    """The JSON beside a checkpoint. Returns (record, ""), or ({}, why there is none to be trusted)."""
    path = checkpoint.with_suffix(".json")
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if digest_of(checkpoint) in (record["sha256"], record.get("sha256_before")):
            return record, ""
        return {}, f"{path.name} does not belong to {checkpoint.name} (its digest differs)"
    except OSError:
        return {}, f"there is no {path.name} beside it"
    except (ValueError, TypeError, KeyError):
        return {}, f"{path.name} is damaged"


def prediction_settings(cfg: Settings) -> dict:
    """What predict_mask() has to know beside the weights."""
    return {"img_size": cfg.IMG_SIZE, "mean": cfg.MEAN, "std": cfg.STD, "threshold": 0.5}


def load_model(checkpoint: str | Path, device: str | torch.device | None = None,
               cfg: Settings | None = None) -> torch.nn.Module:
    """Load a checkpoint of this script for prediction, with the settings in the JSON beside it.

    device: where to put the model; default: DEVICE. cfg (default: the constants) is used instead, with a warning, when
    there is no JSON or only one of another checkpoint. Raises TrainerError when the file is missing, damaged or unfit.
    """
    checkpoint, cfg = Path(checkpoint), cfg or default_settings()
    weights = read_weights(checkpoint)
    record, problem = read_record(checkpoint)
    settings = prediction_settings(cfg)
    if problem:
        warn(f"{checkpoint}: {problem}; using the script's settings: ENCODER {cfg.ENCODER}, {settings}")
    model = build_model(record.get("encoder", cfg.ENCODER))[0]
    fit_weights(model, weights, checkpoint)
    model.prediction_settings = settings | {name: record[name] for name in settings if record}
    return model.to(device or cfg.DEVICE).eval()


# ===== Prediction, and evaluation through the same path ===============================================================

THRESHOLDS = np.round(np.arange(0.05, 0.96, 0.05), 2)


@torch.inference_mode()
def predict_probability(model: torch.nn.Module, image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Tumour probability, float32 [height, width], of an already resized RGB uint8 [S, S, 3] image.

    In float32 on every device, so that the scores of this script are those that other code gets.
    """
    settings, training = model.prediction_settings, model.training
    images = to_input(image[None], next(model.parameters()).device, settings["mean"], settings["std"])
    logits = forward_in_parts(model.eval(), images)
    model.train(training)
    return resize(logits.sigmoid()[0, 0].cpu().numpy(), height, width)


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
    size = model.prediction_settings["img_size"]
    small = np.ascontiguousarray(resize(image, size, size))  # BGR turned into RGB is a view that torch refuses
    probability = predict_probability(model, small, *image.shape[:2])
    return (probability >= np.float32(model.prediction_settings["threshold"])).astype(np.uint8)


def count_thresholds(probability: np.ndarray, mask: np.ndarray, thresholds: np.ndarray) -> np.ndarray:
    """(TP, FP, FN) at every threshold: int64 [T, 3], from float32 probabilities and a 0/1 mask of the same shape."""
    passed = np.searchsorted(thresholds.astype(np.float32), probability.ravel(), side="right")  # how many it reaches
    inside = mask.ravel() > 0
    tp, fp = (np.bincount(passed[part], minlength=len(thresholds) + 1)[::-1].cumsum()[::-1][1:]
              for part in (inside, ~inside))
    return np.stack([tp, fp, inside.sum() - tp], axis=-1)


def evaluate_split(model: torch.nn.Module, dataset: BrainTumorDataset, thresholds: np.ndarray, name: str) -> np.ndarray:
    """Counts at the annotations' resolution for every image and threshold: int64 [N, T, 3]; one image in memory."""
    counts = {}
    for i in progress(range(rank(), len(dataset), world_size()), f"Scoring {name}"):
        truth = dataset.records[i].mask()
        counts[i] = count_thresholds(predict_probability(model, dataset.sample(i)[0], *truth.shape), truth, thresholds)
    counts = {i: rows for part in gather(counts) for i, rows in part.items()}
    return np.stack([counts[i] for i in range(len(dataset))])


def evaluate_checkpoint(cfg: Settings, checkpoint: Path, splits: dict[str, Split], cache: PixelCache | None) -> None:
    """Find the threshold on valid, score test with it, write the tables and pictures, and update the record."""
    model, output, record = load_model(checkpoint, cfg=cfg), Path(cfg.OUTPUT_DIR), read_record(checkpoint)[0]
    dataset = {name: BrainTumorDataset(Path(cfg.DATA_DIR) / name, model.prediction_settings["img_size"],
                                       records=split.records, cache=cache) for name, split in splits.items()}
    counts = evaluate_split(model, dataset["valid"], THRESHOLDS, "valid")
    dice = score_images(counts)["dice"].mean(axis=0)
    best = np.flatnonzero(dice >= dice.max() - 1e-12)
    chosen = best[np.abs(THRESHOLDS[best] - 0.5).argmin()]  # of equally good ones the least extreme
    threshold = model.prediction_settings["threshold"] = float(THRESHOLDS[chosen])
    record |= {"threshold": threshold, "valid_metrics": summarize(counts[:, chosen])}
    line = "  {:<8} {:>6}  {dice:.4f}  {iou:.4f}     {precision:.4f}  {recall:.4f}        {pooled_dice:.4f}"
    say(f"\nThreshold {threshold:.2f} gives the best Dice on valid.\n"
        "Means over images at the original resolution; both masks empty scores 1, only one of them empty 0:\n"
        "           images    Dice     IoU  precision  recall   pooled Dice\n"
        + line.format("valid", len(counts), **record["valid_metrics"]))
    if "test" in dataset:
        counts = evaluate_split(model, dataset["test"], THRESHOLDS[chosen:chosen + 1], "test")[:, 0]
        record["test_metrics"], scores = summarize(counts), score_images(counts)
        say(line.format("test", len(counts), **record["test_metrics"]))
        if rank() == 0:
            write_table(output / "test_metrics.csv", [
                {"file_name": row.file_name, **{name: f"{values[i]:.6f}" for name, values in scores.items()},
                 **dict(zip(("true_positive_px", "false_positive_px", "false_negative_px"), map(int, counts[i])))}
                for i, row in enumerate(dataset["test"].records)])
            plot_predictions(output / "test_predictions.png", model, dataset["test"].records, scores["dice"])
    if rank() == 0 and "encoder" in record:  # nothing is written beside a checkpoint whose origin is unknown
        write_record(checkpoint, record)
    if str(record.get("encoder_weights_from")).startswith("random ("):
        warn("this model started from RANDOM weights, because the ImageNet weights could not be had "
             f"{record['encoder_weights_from'].removeprefix('random ')}: its scores are lower than they need be.")


def predict_files(cfg: Settings, checkpoint: Path, sources: list[str]) -> None:
    """Write NAME_mask.png (0 or 255) and NAME_overlay.png into OUTPUT_DIR for image files and all images of folders.

    Nothing that exists is overwritten: a taken name gets a number. What this script has written (a mask and an overlay
    side by side) is no input.
    """
    files, own, bad = [], 0, []
    for source in map(Path, sources):
        if not source.exists():
            raise TrainerError(f"no such file or folder: {source}")
        for path in sorted(source.rglob("*")) if source.is_dir() else [source]:
            twins = [path.with_name(re.sub(r"_(mask|overlay)(?=(_\d+)?\.png$)", f"_{kind}", path.name))
                     for kind in ("mask", "overlay")]
            if path.name in RUN_FILES or twins[0] != twins[1] and all(twin.exists() for twin in twins):
                own += 1
            elif path == source or path.suffix.lower() in IMAGE_SUFFIXES:
                files.append(path)
    if own:
        say(f"Left out {own} file(s) that this script has written.")
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
            suffix = f"_{number}.png" if number > 1 else ".png"
            targets = [Path(cfg.OUTPUT_DIR) / f"{path.stem}_{kind}{suffix}" for kind in ("mask", "overlay")]
            if not any(target.exists() for target in targets):
                break
        for target, picture in zip(targets, (mask * 255, draw_overlay(image, mask))):
            write_image(target, picture)
        say(f"{path}: {100 * mask.mean():.2f} % tumour -> {targets[0].name}, {targets[1].name}")
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


def save_figure(path: Path, figure: Figure) -> None:
    """Write a figure as PNG."""
    figure.tight_layout()
    write_file(path, lambda file: figure.savefig(file, format="png", dpi=100))


def plot_grid(path: Path, rows: list[list[tuple[np.ndarray, str]]], title: str = "") -> None:
    """A grid of (picture, caption): RGB uint8 [H, W, 3] or mask uint8 0/1 [H, W]."""
    columns = max(map(len, rows))
    figure = Figure(figsize=(2.3 * columns, 2.5 * len(rows)))
    for axes, row in zip(figure.subplots(len(rows), columns, squeeze=False), rows):
        for axis, (picture, caption) in itertools.zip_longest(axes, row, fillvalue=(np.ones((1, 1, 3)), "")):
            axis.imshow(picture, cmap="gray", vmin=0, vmax=1 if picture.ndim == 2 else None)
            axis.set_title(caption.encode("ascii", "replace").decode(), fontsize=7)  # its font has no CJK letters
            axis.axis("off")
    figure.suptitle(title)
    save_figure(path, figure)


def plot_samples(path: Path, dataset: BrainTumorDataset, columns: int = 6) -> None:
    """Training images, masks outlined: below each one as loaded the same one as the network may see it."""
    # Images with a tumour first: their outlines show whether masks lie where they should.
    order = sorted(range(len(dataset)), key=lambda i: (not dataset.records[i].rles, i * 7919 % len(dataset)))
    rows = []
    for first in range(0, min(2 * columns, len(order)), columns):
        for kind, get in (("loaded", dataset.sample), ("augmented", lambda i: dataset[(0, i)])):
            row = [(i, *get(i)) for i in order[first:first + columns]]
            rows.append([(draw_overlay(image, np.zeros_like(mask), mask),
                          f"{kind}: ...{Path(dataset.records[i].file_name).stem[-16:]}") for i, image, mask in row])
    plot_grid(path, rows, "Training images as the network sees them, tumour outlined in green")


def write_history(output: Path, history: list[dict]) -> None:
    """The table of all epochs, and its plot."""
    write_table(output / "training_history.csv", history)
    plot_history(output / "training_history.png", history)


def plot_history(path: Path, history: list[dict]) -> None:
    """Losses, validation Dice and IoU, and learning rate over the epochs; the best epoch is marked."""
    epochs, best = [row["epoch"] for row in history], max(history, key=lambda row: row["dice"])
    figure = Figure(figsize=(15, 4.5))
    panels = (("Loss", {"train_loss": "training", "valid_loss": "validation"}),
              ("Validation (mean over images)", {"dice": "Dice", "iou": "IoU"}), ("Learning rate", {"lr": "AdamW"}))
    for axis, (title, lines) in zip(figure.subplots(1, 3), panels):
        for key, label in lines.items():
            axis.plot(epochs, [row[key] for row in history], marker="." if len(history) < 30 else None, label=label)
        axis.axvline(best["epoch"], color="gray", linestyle="--", linewidth=1,
                     label=f"best epoch {best['epoch']} (Dice {best['dice']:.4f})")
        axis.set(title=title, xlabel="epoch", yscale="log" if "lr" in lines else "linear")
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    save_figure(path, figure)


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


# ===== A run from start to end ========================================================================================


class Run:
    """Everything that changes while a model is trained, and its state on disk."""

    def __init__(self, cfg: Settings, device: torch.device, data: str, state: dict | None):
        """data: fingerprint of the splits. state: from read_last() to go on, or None to start."""
        self.cfg, self.device, self.data = cfg, device, data
        self.epoch = self.waited = self.best_epoch = 0  # finished epochs; epochs since the best one; the best one
        self.best_dice, self.history, self.reverted = -1.0, [], False
        torch.manual_seed(cfg.SEED)
        own_start = state or cfg.INIT_WEIGHTS  # then the encoder's weights are not needed
        self.model, self.weights_from = build_model(cfg.ENCODER, None if own_start else cfg.ENCODER_WEIGHTS)
        if cfg.INIT_WEIGHTS and not state:
            weights = read_weights(cfg.INIT_WEIGHTS)
            fit_weights(self.model, weights.get("model", weights), cfg.INIT_WEIGHTS)
            self.weights_from = f"checkpoint {cfg.INIT_WEIGHTS}"
        self.model.to(device, memory_format=memory_format(device))
        if world_size() > 1 and device.type == "cuda" and cfg.SYNC_BATCHNORM:
            self.model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(self.model)
        # Fused: one kernel for all parameters, and it can skip a bad step without asking the GPU.
        self.optimizer = torch.optim.AdamW(self.model.parameters(), cfg.LR, weight_decay=cfg.WEIGHT_DECAY, fused=True)
        self.scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(
            self.optimizer, mode="max", factor=cfg.PLATEAU_FACTOR, patience=cfg.PLATEAU_PATIENCE, threshold=0)
        self.scaler, self.guard = make_scaler(cfg.PRECISION, device), StepGuard(self.model, device)
        if state:
            self.load(state)
        if cfg.COMPILE:
            self.model.compile()  # in place: the names of the weights stay as they are
        # Buffers are shared explicitly before validation instead of in every forward pass.
        self.parallel = self.model if world_size() == 1 else torch.nn.parallel.DistributedDataParallel(
            self.model, device_ids=[device] if device.type == "cuda" else None, forward_sync_buffers=False)

    PLAIN = ("epoch", "waited", "best_epoch", "best_dice", "history", "reverted", "weights_from", "data")
    STATEFUL = ("model", "optimizer", "scheduler", "scaler")

    def state(self) -> dict:
        """The complete state: tensors on the CPU and plain values only, so that it can be read safely."""
        return to_cpu({name: getattr(self, name) for name in self.PLAIN}
                      | {name: getattr(self, name).state_dict() for name in self.STATEFUL}
                      | {"settings": vars(self.cfg), "random": torch.get_rng_state()})

    def load(self, state: dict) -> None:
        """Go on from a state. Raises TrainerError when it belongs to other data."""
        if state["data"] != self.data:
            raise TrainerError("the images or masks in train/ or valid/ are not those of the saved run; bring the data "
                               "back, or start a new run in another OUTPUT_DIR")
        for name in self.PLAIN:
            setattr(self, name, state[name])
        if self.reverted:
            self.go_on_in_float32()
        fit_weights(self.model, state["model"], LAST)
        for name in self.STATEFUL[1:]:
            if state[name]:  # a GradScaler that is not in use has no state
                getattr(self, name).load_state_dict(state[name])
        # A fused optimizer walks through weights and moments side by side: in different formats it would mix them up.
        for weight, moments in self.optimizer.state.items():
            for name in ("exp_avg", "exp_avg_sq"):
                moments[name] = torch.empty_like(weight).copy_(moments[name])
        torch.set_rng_state(state["random"])

    def go_on_in_float32(self) -> None:
        """Leave float16 and bfloat16 for good."""
        self.reverted, self.cfg.PRECISION = True, "float32"
        self.scaler = make_scaler("float32", self.device)

    def revert(self, state: dict, why: str) -> None:
        """Once: back to the last good state, and on in float32. Raises TrainerError the second time."""
        if self.reverted:
            raise TrainerError(f"{why}, also after going back and training in float32. The best model so far is kept. "
                               "Look at training_samples.png for damaged data, or try a smaller LR.", 1)
        self.load(state)
        self.go_on_in_float32()
        warn(f"{why}. Going back to the end of epoch {self.epoch} and on in float32, which is slower but safe.")

    def save(self, output: Path, improved: bool, record: dict) -> None:
        """Write the best model before the last state: whenever the run is killed, resuming repeats what is missing."""
        if improved:
            weights = to_cpu({name: (value.float() if value.is_floating_point() else value).contiguous()
                              for name, value in self.model.state_dict().items()})
            content = io.BytesIO()
            torch.save(weights, content)
            write_record(output / BEST, record, content.getvalue())
            write_file(output / BEST, content.getvalue(), required=True)
        state = self.state()
        write_file(output / LAST, lambda file: torch.save(state, file), required=True)


def read_last(cfg: Settings) -> dict:
    """The state to go on from. Raises TrainerError if there is none, or if the settings contradict it."""
    path = Path(cfg.OUTPUT_DIR) / LAST
    if not path.is_file():
        raise TrainerError(f"nothing to resume: there is no {path}; leave --resume out to start a run, or name the "
                           "run's folder with OUTPUT_DIR")
    state = read_weights(path)
    if missing := {"settings", "random", *Run.PLAIN, *Run.STATEFUL} - set(state):
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
    """Say what the run uses, and what is wrong if a GPU lies idle."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    processes = f", {world_size()} processes" if world_size() > 1 else ""
    dtype = str(amp_dtype(cfg.PRECISION, device)).removeprefix("torch.")
    say(f"{name}{processes}, {dtype}, PyTorch {torch.__version__}, data in {cfg.DATA_DIR}, output to {cfg.OUTPUT_DIR}")
    if torch.version.cuda is None and shutil.which("nvidia-smi"):
        warn("this machine has an NVIDIA GPU, but the installed PyTorch is a CPU-only build, so the GPU lies idle.\n"
             "Install the CUDA build that https://pytorch.org/get-started/locally names for your system.")
    if device.type == "cpu":
        say("No GPU is used: at 256 px expect one or two images per second, hours or days for a real data set. For a\n"
            "first look take --img-size 128 --epochs 5. Each epoch's line says how much time is left.")


def start_processes(cfg: Settings) -> None:
    """Under torchrun, join the other processes, each with its own GPU."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        if cfg.DEVICE.startswith("cuda"):
            cfg.DEVICE = f"cuda:{os.environ['LOCAL_RANK']}"
            torch.cuda.set_device(cfg.DEVICE)
        # Two hours, because the others wait while the first process of each machine reads all images.
        dist.init_process_group("nccl" if cfg.DEVICE.startswith("cuda") else "gloo", timeout=timedelta(hours=2))


@contextlib.contextmanager
def shared_data(cfg: Settings, names: list[str]):
    """prepare_data() once on each machine, for all its processes; the cache is removed at the end of the block."""
    local, own = int(os.environ.get("LOCAL_RANK", 0)), None
    if local == 0:
        try:
            own = prepare_data(cfg, names)
        except (TrainerError, Interrupted) as error:
            own = error
    try:
        everyone = gather(own)
        for result in everyone:
            if isinstance(result, Exception):
                raise result
        yield everyone[rank() - local]
    finally:
        if isinstance(own, tuple) and own[1] is not None:
            own[1].close()


@contextlib.contextmanager
def beside_earlier_run(output: Path, command: str):
    """Announce an earlier run in the folder, with the command that goes on with it.

    Yields the folder for what a new run writes before its first checkpoint is complete: one of its own, removed at the
    end of the block, or output itself if there is no earlier run.
    """
    if not any((output / name).is_file() for name in RUN_FILES):
        yield output
        return
    new = output / NEW
    say(f"{output} holds an earlier run. With its first checkpoint the new one will move that into a folder\n"
        f"earlier_run_...; until then the files of the new one are in {new.name}.")
    if (output / LAST).is_file():
        say(f"To go on with the earlier run instead, press Ctrl-C and run:\n  {command}")
    try:
        if rank() == 0:
            new.mkdir(exist_ok=True)
        yield new
    finally:
        if rank() == 0 and not (new / LAST).is_file():
            shutil.rmtree(new, ignore_errors=True)


def replace_earlier_run(output: Path) -> None:
    """Move the files of the earlier run into a folder of their own, and those of the new run to where they were.

    Name by name, the state last, so that the next start can finish what a killed run has left half done.
    """
    earlier = [name for name in RUN_FILES if (output / name).is_file()
               and ((output / NEW / name).is_file() or name not in FIRST_FILES)]  # else replaced already
    if earlier:
        last = output / earlier[-1]
        stamp = time.strftime("earlier_run_%Y%m%d-%H%M%S", time.localtime(last.stat().st_mtime))
        folders = (output / f"{stamp}_{number}" for number in itertools.count(1))
        folder = next(path for path in folders if not (path / last.name).exists())
        folder.mkdir(exist_ok=True)
        say(f"The earlier run is kept in {folder}.")
    for name in RUN_FILES:
        new = output / NEW / name
        if name in earlier and Path(name).stem == Path(BEST).stem:
            with contextlib.suppress(OSError):  # a file system without links
                os.link(output / name, folder / name)  # so that there is a best model at any moment
        if name in earlier and not (folder / name).exists():
            os.replace(output / name, folder / name)
        if new.is_file():
            os.replace(new, output / name)
    shutil.rmtree(output / NEW)


def train(cfg: Settings, resume: bool, command: str) -> None:
    """Train, keep the best model, then evaluate it. command: how to resume, for messages."""
    device, output = torch.device(cfg.DEVICE), Path(cfg.OUTPUT_DIR)
    set_up_machine(cfg, device)
    describe_machine(cfg, device)
    if rank() == 0 and (output / NEW / LAST).is_file():
        replace_earlier_run(output)  # what a killed run had left to do
    gather(None)  # the other processes wait for that
    state = read_last(cfg) if resume else None

    with contextlib.nullcontext(output) if resume else beside_earlier_run(output, command) as home, \
            shared_data(cfg, ["train", "valid", "test"]) as (splits, cache):
        loaders = {}
        for name in ("train", "valid"):
            dataset = BrainTumorDataset(Path(cfg.DATA_DIR) / name, cfg.IMG_SIZE, name == "train", cfg.SEED, False,
                                        records=splits[name].records, cache=cache)
            loaders[name] = make_loader(dataset, cfg, train=name == "train")
        if len(splits["train"].records) < world_size():
            raise TrainerError("there are fewer training images than processes")
        run, criterion = Run(cfg, device, fingerprint(splits), state), LOSSES[cfg.LOSS]()
        good = None if state else run.state()  # what to go back to before the first checkpoint
        record = {
            "encoder": cfg.ENCODER, **prediction_settings(cfg), "settings": vars(cfg),
            "versions": {"python": platform.python_version()} | {module.__name__: module.__version__ for module in
                                                                 (torch, torchvision, smp, A, cv2, np, matplotlib)},
            "device": str(device), "platform": platform.platform(), "encoder_weights_from": run.weights_from,
            "data_counts": {name: {"images": len(split.records), "annotations": split.annotations,
                                   "without_tumour": sum(not row.rles for row in split.records),
                                   "skipped": split.skipped} for name, split in splits.items()}}
        if state:
            say(f"Going on after epoch {run.epoch}; best validation Dice {run.best_dice:.4f} (epoch {run.best_epoch}).")
            STOP.go_on = command
            if rank() == 0:  # the run may have been killed before it could
                write_history(output, run.history)
            if run.epoch >= cfg.EPOCHS:
                say(f"All {cfg.EPOCHS} epochs are done; raise EPOCHS to train on.")
            elif state["settings"]["EPOCHS"] < cfg.EPOCHS and 0 < cfg.EARLY_STOPPING <= run.waited:
                run.waited = 0  # it had stopped early, and more epochs are asked for
        elif rank() == 0:
            plot_samples(home / "training_samples.png", loaders["train"].dataset)
        first_epoch, start = run.epoch, time.perf_counter()
        while run.epoch < cfg.EPOCHS and not (cfg.EARLY_STOPPING and run.waited >= cfg.EARLY_STOPPING):
            began, lr = time.perf_counter(), run.optimizer.param_groups[0]["lr"]
            loaders["train"].batch_sampler.set_epoch(run.epoch)
            torch.manual_seed(int(np.random.default_rng([cfg.SEED, run.epoch]).integers(2**63)))  # for dropout
            stats = train_one_epoch(run.parallel, loaders["train"], criterion, run.optimizer, run.scaler, device,
                                    cfg=cfg, guard=run.guard, epoch=run.epoch)
            speed = len(splits["train"].records) / (time.perf_counter() - began)
            if world_size() > 1:
                for buffer in run.model.buffers():  # validate with the statistics that the checkpoint will hold
                    dist.broadcast(buffer, 0)
            scores = validate(run.model, loaders["valid"], criterion, device, cfg=cfg)
            if stats.pop("persistent") or not math.isfinite(scores["valid_loss"]):
                run.revert(good or read_weights(output / LAST),
                           f"epoch {run.epoch + 1}: the loss or its gradient is not finite ({stats['dropped']} steps "
                           f"dropped, validation loss {scores['valid_loss']:.4g})")
                continue
            run.epoch += 1
            run.scheduler.step(scores["dice"])
            improved = scores["dice"] > run.best_dice
            run.waited = 0 if improved else run.waited + 1
            if improved:
                run.best_dice, run.best_epoch = scores["dice"], run.epoch
            row = {"epoch": run.epoch, **stats, **scores, "lr": lr, "images_per_second": round(speed, 2),
                   "seconds": round(time.perf_counter() - began, 2)}
            run.history.append(row)
            if rank() == 0:
                run.save(home, improved, record | {"best_epoch": run.epoch, "valid_metrics_at_img_size": scores})
                if home != output:
                    replace_earlier_run(output)
                write_history(output, run.history)
            home, good = output, None
            STOP.go_on = command
            left = (time.perf_counter() - start) / (run.epoch - first_epoch) * (cfg.EPOCHS - run.epoch)
            say(f"epoch {run.epoch:>{len(str(cfg.EPOCHS))}}/{cfg.EPOCHS}  train loss {row['train_loss']:.4f}  "
                f"valid loss {row['valid_loss']:.4f}  Dice {row['dice']:.4f}  IoU {row['iou']:.4f}  lr {lr:.1e}  "
                f"{speed:6.1f} img/s  {row['seconds']:6.1f} s  left {timedelta(seconds=round(left))}"
                + (f"  dropped {row['dropped']}" if row["dropped"] else "") + ("  * best" if improved else ""))
        if run.epoch < cfg.EPOCHS:
            say(f"Stopped early: no better validation Dice for {run.waited} epochs (EARLY_STOPPING).")
        say(f"Best validation Dice {run.best_dice:.4f} in epoch {run.best_epoch} ({cfg.IMG_SIZE} px, threshold 0.5).")
        gather(None)  # waits until the first process has written the best model
        del loaders, run  # ends the workers and frees the GPU before the evaluation
        evaluate_checkpoint(cfg, output / BEST, splits, cache)
    say(f"\nModel: {output / BEST} (settings beside it in {Path(BEST).stem}.json)\n"
        "Look at training_history.png, training_samples.png and, if there is a test set, test_predictions.png.")


def run_mode(cfg: Settings, mode: argparse.Namespace, command: str) -> None:
    """Do what the command line asks for. Raises TrainerError and Interrupted."""
    checkpoint = Path(mode.checkpoint or Path(cfg.OUTPUT_DIR) / BEST)
    if mode.predict and int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise TrainerError("--predict runs in one process; start it without torchrun")
    start_processes(cfg)
    if mode.predict:
        predict_files(cfg, checkpoint, mode.predict)
    elif mode.audit:
        with shared_data(cfg, ["train", "valid", "test"]):
            say("The data can be used.")
    elif mode.evaluate:
        cfg.IMG_SIZE = read_record(checkpoint)[0].get("img_size", cfg.IMG_SIZE)  # that of the cache
        if not checkpoint.is_file():
            raise TrainerError(f"no checkpoint to evaluate: {checkpoint}; train first, or name one with --checkpoint")
        with shared_data(cfg, ["valid", "test"]) as (splits, cache):
            evaluate_checkpoint(cfg, checkpoint, splits, cache)
    else:
        train(cfg, mode.resume, command)
    if dist.is_initialized():
        dist.destroy_process_group()


def command_line(argv: list[str] | None, *more: str) -> str:
    """The command that started this run, with more words at its end."""
    words = [word for word in (sys.argv[1:] if argv is None else argv) if word not in more] + [*more]
    python = Path(sys.executable).name
    python = python if shutil.which(python) == sys.executable else sys.executable
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    start = [python] if processes == 1 else ["torchrun", f"--nproc-per-node={processes}"]
    command = [*start, sys.argv[0], *words]
    return subprocess.list2cmdline(command) if os.name == "nt" else shlex.join(command)


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
    command, failure = command_line(argv, "--resume"), None
    STOP.signum, STOP.go_on = 0, ""
    handlers = {number: signal.signal(number, STOP) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        run_mode(*read_settings(argv), command)
        return 0
    except (Interrupted, KeyboardInterrupt):
        STOP.signum = STOP.signum or signal.SIGINT
    except TrainerError as error:
        failure = error.exit_code, str(error)
    except (OSError, RuntimeError, MemoryError) as error:
        again = STOP.go_on or command_line(argv)
        if "DataLoader worker" in str(error):
            failure = 1, ("a process that prepares images died, usually because memory ran out; go on with fewer of "
                          f"them:\n  {again} --num-workers 0")
        elif isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "not enough memory" in str(error):
            failure = 1, (f"memory ran out ({error}); go on with a smaller BATCH_SIZE and more ACCUMULATION_STEPS, or "
                          f"fewer NUM_WORKERS:\n  {again}")
        elif isinstance(error, OSError):
            failure = 1, f"{error}\nWhen this is mended, go on with:\n  {again}"
        elif not STOP.signum:  # a signal to all processes ends workers too, which arrives here as their failure
            raise
    finally:
        gc.collect()  # lets go of the frames of a failed run, and so ends its workers
        for number, handler in handlers.items():
            signal.signal(number, handler)
    if STOP.signum:
        code, STOP.signum = 128 + STOP.signum, 0
        say("\nStopped.")
        if STOP.go_on:
            say(f"The last finished epoch is saved. To go on from there:\n  {STOP.go_on}")
        return code
    code, message = failure
    if code != 2 or rank() == 0:  # errors with exit code 2 are found by every process alike
        print(f"error: {message}", file=sys.stderr, flush=True)
    return code


if __name__ == "__main__":
    sys.exit(main())
