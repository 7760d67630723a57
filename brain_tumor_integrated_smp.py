"""Brain-tumour segmentation: UNet++ with a ResNet34 encoder, trained on a folder of MRI slices with COCO polygons.

    python brain_tumor_integrated_smp.py                                   train with the constants below
    python brain_tumor_integrated_smp.py --img-size 128 --epochs 5         any constant, without editing
    python brain_tumor_integrated_smp.py --resume                          continue an interrupted run
    python brain_tumor_integrated_smp.py --audit                           check the data and stop
    python brain_tumor_integrated_smp.py --evaluate                        scores of the best model, also on other data
    python brain_tumor_integrated_smp.py --check-labels                    annotations that the best model contradicts
    python brain_tumor_integrated_smp.py --predict scan.png folder/        masks and overlays for new images
    torchrun --nproc-per-node=2 brain_tumor_integrated_smp.py              two GPUs (on Linux), nothing to edit

The data folder holds train/ and, if you have them, valid/ and test/, each with its images and `_annotations.coco.json`,
or with a mask file for each image; or it holds the training images itself.
For other code: `from brain_tumor_integrated_smp import load_model, predict_mask`. Importing does nothing else.
Measured results, with command, hardware and versions, stand in tests/BENCHMARKS.md. The file follows the data: images
and masks, checks and cache, augmentation and batches, model, losses, metrics, the training step, the epochs,
checkpoints, evaluation and prediction, pictures. Plumbing (flags, machine, processes, messages, files) comes last; of
it, log(), warn(), progress(), gather() (between processes) and TrainerError are used everywhere.
"""

from __future__ import annotations

import argparse
import colorsys
import contextlib
import copy
import csv
import ctypes
import difflib
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
import socket
import sys
import tempfile
import textwrap
import threading
import time
import traceback
import unicodedata
import urllib.parse
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace as Settings  # the constants below as attributes of one object, called cfg
from typing import BinaryIO

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # otherwise the import looks for a newer version on the network
if __name__ == "__main__":
    os.environ["MPLBACKEND"] = "agg"  # no window; what a notebook hands on with "!" may not even be installed here
    # Threads of PyTorch (Linux) that wait for each other spin 300,000 times before they sleep. With 10,000, training
    # is 1.6 to 4.5 times as fast beside other programs, and about as fast on idle cores (tests/BENCHMARKS.md).
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import albumentations as A
import cv2
import filelock
import matplotlib
import numpy as np
import pycocotools.mask as coco_mask
import segmentation_models_pytorch as smp
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from PIL import BmpImagePlugin, Image, ImageOps, JpegImagePlugin, PngImagePlugin, TiffImagePlugin, WebPImagePlugin
from tqdm import tqdm

# ===== Settings: edit them here, or override any of them on the command line (IMG_SIZE = 256 is --img-size 256) =======

# --- data and output
DATA_DIR = str(Path(__file__).resolve().parent)  # folder that holds train/ and, if there are any, valid/ and test/; or
#                                                  the training images themselves
OUTPUT_DIR = str(Path(__file__).resolve().parent)  # folder for checkpoints, tables and pictures; one run at a time
SAVE_SECONDS = 60.0  # least time between two saves; a killed run loses this much and the epoch that was running
CATEGORIES = ()  # names of the COCO categories that count as tumour; empty: all of them
PATIENT_PATTERN = None  # regular expression, brackets around the patient in a file name: r"(P\d+)" for P001_s03.png
VALID_SHARE = 0.2  # of train, up to 0.5, held out for validation if there is no valid folder: whole patients, or, if
#                    they are not known, neighbours by file name
FOLD = 0  # which part of that size is held out, 0 to 1 / VALID_SHARE - 1: five runs are a five-fold cross validation
TEST_SHARE = 0.0  # of train, up to 0.5, held out for the test score if there is no test folder; 0: no test score
UNANNOTATED = "tumour-free"  # images without annotation: "tumour-free" (trained on and scored as such), or "skip"
SKIP_BAD_IMAGES = False  # True: leave out unreadable images (they are listed) instead of stopping
CACHE_GB = 8.0  # GB; decoded images are kept in a temporary file during a run if they fit; 0: decode every time

# --- images and loading
IMG_SIZE = 256  # pixels, a multiple of 32, at least 64; the network sees squares of this size
BATCH_SIZE = 8  # images per forward pass, over all GPUs together, at least 1; halved when memory runs out
NUM_WORKERS = 4  # processes that augment images, 0 or more (0: none); never more than the available cores
GREY_PERCENTILES = (0.1, 99.9)  # of a 16-bit or float image: these become 0 and 255; (0, 100): its whole range
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
LR_FROM_SCRATCH = 5e-4  # for randomly initialised weights: the decoder's, perhaps the encoder's too; --lr sets both
WARMUP_STEPS = 20  # optimizer steps over which the learning rate grows to its value, 0: none
WEIGHT_DECAY = 1e-2  # AdamW's decoupled weight decay, 0 or more
LOSS = "dice_bce"  # a name in LOSSES; "focal_tversky" favours finding all of a tumour
ACCUMULATION_STEPS = 1  # batches per optimizer step, at least 1; raise it when BATCH_SIZE has to be small
GRAD_CLIP = 1.0  # largest gradient norm, 0: no clipping
EMA_EPOCHS = 1.0  # epochs over which the exponential moving average (EMA) of the weights reaches, 0: no EMA; the EMA
#                   is what is validated and saved as the best model
PLATEAU_FACTOR = 0.5  # the learning rate is multiplied by this when validation Dice stalls, between 0 and 1
PLATEAU_PATIENCE = 10  # epochs without a better validation Dice before that happens
EARLY_STOPPING_PATIENCE = 25  # epochs without a better validation Dice before training ends, 0: never
SEED = 42  # 0 or more; initial weights, order of the images and augmentation are derived from it

# --- prediction
TEST_TIME_AUGMENTATION = False  # True: the mean over an image and its mirror image, at twice the cost

# --- machine
DEVICE = "auto"  # "auto" (a GPU if PyTorch sees one), "cuda", "cuda:1", "cpu"
PRECISION = "auto"  # "auto" (float16 on CUDA, bfloat16 on CPUs that have it), "float32", "bfloat16", "float16"
COMPILE = False  # True: torch.compile the model (a long first epoch)
DETERMINISTIC = False  # True: slower, but repeatable to the last bit on one GPU

# All settings above, in this order. One that you add becomes a flag, is saved with the run, and must not change when
# the run is resumed (see RESUME_MAY_CHANGE); the code that needs it gets it as cfg.NAME or as an argument.
CONSTANTS = tuple(name for name in globals() if name.isupper() and len(name) > 1)

# ===== Images and masks ===============================================================================================

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".jfif", ".png", ".bmp", ".tif", ".tiff", ".webp"}
# Of images that have to be converted first:
UNREAD_SUFFIXES = (".gif", ".tga", ".npy", ".npz", ".mat", ".ppm", ".pgm", ".pbm", ".pnm", ".jp2", ".j2k", ".nii",
                   ".nii.gz", ".dcm", ".heic", ".avif", ".svg")
# Pillow's readers by the first bytes of a file. Image.open() would warn of large images, and try other formats.
READERS = {b"\xff\xd8\xff": JpegImagePlugin.jpeg_factory, b"\x89PNG": PngImagePlugin.PngImageFile,
           b"BM": BmpImagePlugin.BmpImageFile, b"RIFF": WebPImagePlugin.WebPImageFile,
           b"II": TiffImagePlugin.TiffImageFile, b"MM": TiffImagePlugin.TiffImageFile}
ORIENTATION, PHOTOMETRIC = 274, 262  # tags of EXIF and TIFF
MOST_PIXELS = 89e6  # of an image; from there on Pillow suspects an attack


def open_image(source: str | Path | bytes | BinaryIO, upright: bool = False) -> Image.Image:
    """Read an image file (a path, its content, or an open binary file), turned as its EXIF orientation says.

    upright: refuse a file that has to be turned. Raises TrainerError ("PATH: what is wrong") for a file that is missing
    or damaged, or that Pillow would not read as it is.
    """
    name = source if isinstance(source, (str, Path)) else "image"
    try:
        data = Path(source).read_bytes() if name is source else source if isinstance(source, bytes) else source.read()
    except FileNotFoundError:
        raise TrainerError(f"{name}: the file is missing") from None
    except (OSError, ValueError) as error:  # no access, a name that is too long or that the system cannot write
        raise TrainerError(f"{name}: {getattr(error, 'strerror', None) or error}") from None
    reader = next((reader for start, reader in READERS.items() if data.startswith(start)), None)
    if reader is None:
        raise TrainerError(f"{name}: {'not a JPEG, PNG, BMP, TIFF or WebP image' if data else 'the file is empty'}")
    try:
        image = reader(io.BytesIO(data))
        # Before load(), which forgets what the file holds, and turns TIFFs.
        raw_modes = [tile[3] if isinstance(tile[3], str) else str(tile[3][0]) for tile in image.tile]
        if image.width * image.height > MOST_PIXELS:
            problem = f"has {image.width}x{image.height} pixels, more than {MOST_PIXELS / 1e6:.0f} million"
        elif getattr(image, "n_frames", 1) > 1 and image.format != "MPO":  # phones add a second picture to a JPEG
            problem = "has more than one page; save each page as a file of its own"
        elif image.format in ("PNG", "TIFF") and image.mode[0] not in "IF" and any(";16" in mode for mode in raw_modes):
            problem = "has 16-bit colours, or 16-bit grey with transparency; save it as 16-bit grey or as 8 bit"
        elif upright and image.getexif().get(ORIENTATION, 1) != 1:
            problem = ("has an EXIF orientation: its outlines may belong to the turned or the stored picture; save it "
                       "upright")
        else:
            image.load()
            ImageOps.exif_transpose(image, in_place=True)
            if image.mode != "F" or np.isfinite(np.asarray(image)).all():
                return image
            problem = "has pixels that are not finite"
    except MemoryError:
        raise
    except Exception as error:  # damaged files raise almost anything
        problem = ("has numbers that cannot be read, such as 64-bit floats; save it as 16-bit grey"
                   if "unknown pixel mode" in str(error) else "damaged, or cut short")
    raise TrainerError(f"{name}: {problem}")


def deep_pixels(image: Image.Image) -> np.ndarray | None:
    """The numbers of a grey image of more than 8 bit: uint16, int32 or float32 [H, W]; None for any other image."""
    if image.mode[0] not in "IF":
        return None
    pixels = np.asarray(image)
    pixels = pixels.astype(pixels.dtype.newbyteorder("="), copy=False)
    white_is_zero = getattr(image, "tag_v2", {}).get(PHOTOMETRIC) == 0  # which Pillow ignores in these images
    return pixels if not white_is_zero else ~pixels if pixels.dtype.kind != "f" else -pixels


def read_image(source: str | Path | bytes | BinaryIO, percentiles: tuple = GREY_PERCENTILES, *,
               upright: bool = False) -> np.ndarray:
    """Read a common image file as RGB uint8 [H, W, 3], values 0..255.

    source, upright and errors: see open_image(). Grey and palette images become RGB, transparency is dropped. Grey
    images of more than 8 bit are scaled linearly so that these percentiles of the image become 0 and 255, and clipped:
    hot pixels change nothing.
    """
    image = open_image(source, upright)
    grey = deep_pixels(image)
    if grey is None:
        return np.array(image if image.mode == "RGB" else image.convert("RGB"))
    low, high = np.percentile(grey, percentiles)
    if low == high:  # nearly all pixels are equal
        low, high = float(grey.min()), float(grey.max())

    def scale(values):
        scaled = (values.astype(np.float64) - low) * (255 / max(high - low, 1e-300))
        return np.clip(np.rint(scaled), 0, 255).astype(np.uint8)

    # A table for 16 bit: the same levels in less memory.
    levels = scale(np.arange(2**16))[grey] if grey.dtype == np.uint16 else scale(grey)
    return np.repeat(levels[..., None], 3, axis=2)


def resize(array: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resize [H, W] or [H, W, C] without aliasing: averages areas where it shrinks, interpolates where it enlarges."""
    small = (min(width, array.shape[1]), min(height, array.shape[0]))
    if small != array.shape[1::-1]:
        array = cv2.resize(array, small, interpolation=cv2.INTER_AREA)
    return array if small == (width, height) else cv2.resize(array, (width, height), interpolation=cv2.INTER_LINEAR)


def resize_mask(mask: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resize a uint8 0/1 mask [H, W]: a pixel counts if at least half of it is tumour. Centred, unlike NEAREST."""
    return (resize(255 * mask, height, width) >= 128).astype(np.uint8)  # in bytes: a float mask is four times as large


def preprocess(image: np.ndarray) -> np.ndarray:
    """What is done to every image before it is resized, in training, evaluation and prediction alike: nothing.

    RGB uint8 [H, W, 3] in; out a new array of the same kind and size. Contrast enhancement (CLAHE) goes here, and what
    is random into build_transform(). Once it is edited, runs from before cannot be resumed, and load_model() warns of
    their models. training_samples.png shows what it does; overlays and test cases show images as they are in the file.
    """
    return image


def preprocess_digest() -> str:
    """A digest of what preprocess() makes of a fixed picture; "" if nothing. Raises TrainerError if it is no image."""
    y, x = np.mgrid[:64, :64]
    picture = np.dstack([4 * x, 4 * y, x * y % 256]).astype(np.uint8)
    given = picture.copy()
    made = preprocess(given)
    if getattr(made, "dtype", None) != np.uint8 or made.shape != picture.shape or not np.array_equal(given, picture):
        raise TrainerError("preprocess() must return a new RGB uint8 array [H, W, 3] of the size of its image")
    return "" if np.array_equal(made, picture) else hashlib.sha256(made.tobytes()).hexdigest()


@dataclass
class ImageEntry:
    """One image of a split with its mask."""

    number: int  # position in the JSON's list of images, or among the files; augmentation depends on it
    path: str
    file_name: str  # as in the JSON, or below the folder of the split
    height: int  # pixels, of the annotation's coordinate system
    width: int
    rle: dict | None = None  # the union of its annotations, as a compressed COCO RLE; None: no tumour
    mask_path: str = ""  # of its mask file, if it has one instead of annotations in a JSON
    annotations: Counter = field(default_factory=Counter)  # how many of each category; a mask file counts as one
    tumours: int = 0  # annotations that cover at least one pixel
    boxes: int = 0  # those of them that are upright boxes
    patient: str = ""  # see PATIENT_PATTERN
    problems: list[tuple[str, str]] = field(default_factory=list)  # why it cannot be used: kind and detail each
    remarks: list[tuple[str, str]] = field(default_factory=list)  # what to look at, likewise
    # Set by scan():
    cache_slot: int = -1  # its place in the cache
    file_size: tuple = ()  # (height, width) of the file, pixels
    digest: str = ""  # of its pixels
    mask_digest: str = ""
    tumour_fraction: float = 0.0  # of the image
    thumbnail: np.ndarray | None = None  # float32 [1024]: grey 32x32, mean 0, length 1
    near_duplicate: str = ""  # the file name of the image in train that looks the same, see find_near_duplicates()

    @property
    def annotated(self) -> bool:
        """Whether it has any annotation, of whatever category."""
        return bool(self.annotations)

    def mask(self) -> np.ndarray:
        """The union of its annotations: uint8 [height, width], 0 or 1."""
        if self.rle is None:
            return np.zeros((self.height, self.width), np.uint8)
        return np.ascontiguousarray(coco_mask.decode(self.rle))


@dataclass
class Split:
    """A split as its JSON or its files describe it, and what prepare_data() adds."""

    folder: Path
    entries: list[ImageEntry]
    categories: dict[str, bool]  # by name: whether its annotations count as tumour, see CATEGORIES
    unlisted: int = 0  # image files that the JSON does not list
    is_sample: bool = False  # the phantoms of this project
    problems: list[tuple[str, str]] = field(default_factory=list)  # that leaving out images would not help
    remarks: list[tuple[str, str]] = field(default_factory=list)  # about no single image
    held_out: bool = False  # a part of train, see VALID_SHARE
    skipped: list[ImageEntry] = field(default_factory=list)  # images that cannot be used

    @property
    def near_duplicates(self) -> int:
        """How many images look like one in train."""
        return sum(bool(entry.near_duplicate) for entry in self.entries)

    def note(self, found: list[tuple[ImageEntry, str]], kind: str, of: int, where: str, causes: str = "") -> None:
        """Note findings (image, detail) in their images' problems or remarks (where), or, if they are systematic, as a
        problem of the split: three or more, and 5 % of the images or outlines that could have it.
        """
        if len(found) >= max(3, 0.05 * of):
            examples = [f"{entry.file_name}, {detail}" for entry, detail in found[:2]]
            kind = f"{kind}, {len(found)} of {of} in {self.folder.name}{causes}"
            self.problems.append((kind, "; ".join(examples) + ", ..."))
        else:
            for entry, detail in found:
                getattr(entry, where).append((kind, detail))


def load_sample(entry: ImageEntry, img_size: int, percentiles: tuple = GREY_PERCENTILES) -> tuple[np.ndarray, ...]:
    """Decode, rasterise and resize one image: the deterministic part, before any augmentation.

    Returns (RGB uint8 [S, S, 3], mask uint8 0/1 [S, S], RGB uint8 [H, W, 3] as in the file). An entry without size, as
    neither a JSON nor a mask file tells it, gets that of its image. Raises TrainerError.
    """
    image = read_image(entry.path, percentiles, upright=True)
    if not entry.height:
        entry.height, entry.width = image.shape[:2]
    mask = entry.mask()
    if entry.mask_path and image.shape[:2] != mask.shape:
        sizes = "x".join(map(str, mask.shape[::-1])), "x".join(map(str, image.shape[1::-1]))
        raise TrainerError(f"{entry.path}: its mask has another size, {sizes[0]} pixels instead of {sizes[1]}")
    return resize(preprocess(image), img_size, img_size), resize_mask(mask, img_size, img_size), image


# ===== Splits: their files, and what is wrong with them ===============================================================

SPLIT_NAMES = {"train": ("train", "training"), "valid": ("valid", "val", "validation"), "test": ("test", "testing")}
KNOWN_SPLITS = [*itertools.chain(*SPLIT_NAMES.values())]
LIKE_A_SPLIT = re.compile("(train|val|test|dev|eval|hold).*")
RESULTS = re.compile(r"(predictions|evaluation)(_\d+)?|earlier_run_.*")  # folders that this script writes
MASK_END = re.compile(r"_mask(_\d+)?$", re.IGNORECASE)  # of a file name; annotation tools number several masks


def find_splits(data_dir: Path) -> dict[str, Path]:
    """The folders of the splits in a data folder, by name of the split; case does not matter.

    A data folder without any for train that holds images itself is train. Raises TrainerError if two folders are the
    same split, or, beside or around images, another folder could be one.
    """
    there = [path for path in sorted(data_dir.iterdir()) if path.is_dir()]
    folders = {}
    for split, names in SPLIT_NAMES.items():
        found = [path for path in there if path.name.lower() in names]
        if len(found) > 1:  # a second name of the same folder, or a run's, is no other one
            found = [*{path.resolve(): path for path in found if list_files(path)}.values()] or found[:1]
        if len(found) > 1:
            raise TrainerError(f"{found[0]} and {found[1]} are both a folder for {split}: move or rename one of them")
        if found:
            folders[split] = found[0]
    images = [] if "train" in folders else [path for path in list_files(data_dir, without=KNOWN_SPLITS)
                                            if path.suffix.lower() in IMAGE_SUFFIXES]
    if not images:
        return folders
    for path in there:
        name = path.name.lower()
        if LIKE_A_SPLIT.fullmatch(name) and not RESULTS.fullmatch(name) and name not in KNOWN_SPLITS:
            raise TrainerError(f"there are images in {data_dir}, and a folder that could be a split, {path}; "
                               f"splits are named {', '.join(KNOWN_SPLITS)}. Rename or move it")
    if not (folders and data_dir.name.lower() in KNOWN_SPLITS):  # otherwise none of them is clear
        images = [path for path in images if not {*map(str.lower, path.parts[:-1])}.isdisjoint(KNOWN_SPLITS)]
    if images:
        raise TrainerError(f"{data_dir} has no train/, but images in {data_dir / images[0].parent}: which split they "
                           "belong to is not clear. DATA_DIR (--data-dir) is the folder that holds train/, valid/ "
                           "and test/, or some of them, each with its images and masks")
    return {"train": data_dir} | folders


def list_files(folder: Path, without: Iterable[str] = ()) -> list[Path]:
    """Paths of all files below a folder, relative to it and sorted. Links to folders are followed, each folder once.

    Left out are hidden files, as Jupyter and macOS leave them, what this script has written, and the folders without
    (lower-case names) directly in it.
    """
    def report(error):
        warn(f"cannot read the folder {error.filename}")

    files, seen = [], set()
    for parent, folders, inside in os.walk(folder, onerror=report, followlinks=True):
        is_top, place = parent == str(folder), os.path.realpath(parent)
        if place in seen or not is_top and (RESULTS.fullmatch(Path(parent).name) or {BEST, LAST} & {*inside}):
            folders.clear()
            continue
        seen.add(place)
        folders[:] = [name for name in sorted(folders)
                      if not name.startswith((".", "__MACOSX")) and not (is_top and name.lower() in without)]
        files += [Path(parent, name).relative_to(folder) for name in inside
                  if not name.startswith(".") and name not in RUN_FILES]
    return sorted(files)


def read_splits(folders: dict[str, Path], categories: tuple = (), skip_bad_images: bool = False) -> dict[str, Split]:
    """Read splits (folders by name) from their COCO files, or, where there is none, from image and mask files.

    What the levels of mask files mean is decided once for all splits. categories: see read_coco(); mask files have
    none. Raises TrainerError with all problems that can be found without decoding an image.
    """
    splits = {}
    for name, folder in folders.items():
        pairs = None if (folder / ANNOTATION_FILE).is_file() else read_pairs(folder)
        splits[name] = split = pairs or read_coco(folder, categories)
        for entry in split.entries:
            if not is_unicode(entry.path + entry.mask_path):
                entry.problems.append(("its name is not Unicode, as archives in GBK or Big5 leave it: rename it", ""))
    refuse_problems(splits.values(), skip_bad_images)
    draw_mask_files(splits.values())
    return splits


def list_images(split: Split) -> list[Path]:
    """list_files() with the suffix of an image. Notes images and masks of formats that are not read."""
    files = list_files(split.folder, () if split.folder.name.lower() in KNOWN_SPLITS else KNOWN_SPLITS)
    for path in files:
        if not path.name.lower().endswith(UNREAD_SUFFIXES):
            continue
        if is_mask_file(path) and MASK_FILE in split.categories:  # its image would be without annotation
            split.problems.append(("mask file of a format that is not read: save it as PNG", str(path)))
        else:
            split.remarks.append(("image file of a format that is not read: save it as PNG, or ignore this", str(path)))
    return [path for path in files if path.suffix.lower() in IMAGE_SUFFIXES]


def is_mask_file(path: Path) -> bool:
    """Whether an image file is a mask, by its relative path: NAME_mask, NAME_mask_2, or anything below masks/."""
    return bool(MASK_END.search(path.stem)) or "masks" in map(str.lower, path.parts[:-1])


def is_unicode(name: str) -> bool:
    """Whether a file name is text that can be written into a UTF-8 file; on Linux, names may be any bytes."""
    return not re.search("[\ud800-\udfff]", name)


def refuse_problems(splits: Iterable[Split], skip_bad_images: bool) -> list[str]:
    """Raise TrainerError for all problems of splits; skip_bad_images: unless all are of single images.

    Returns what is wrong with the images that are left out, a sentence for each kind.
    """
    of_splits, of_images, bad = [], [], 0
    for split in splits:
        place = split.folder if MASK_FILE in split.categories else split.folder / ANNOTATION_FILE
        of_splits += [(kind, f"{place}, {detail}") for kind, detail in split.problems]
        for entry in split.entries + split.skipped:
            of_images += [(kind, f"{entry.path}, {detail}".removesuffix(", ")) for kind, detail in entry.problems]
            bad += bool(entry.problems)
    if not of_splits and (skip_bad_images or not bad):
        return grouped(of_images)
    remedy = "Correct the data, or export them again." if of_splits else (
        f"{plural(bad, 'image')} cannot be used: repair or remove them, or set SKIP_BAD_IMAGES = True "
        "(--skip-bad-images) to leave them out.")
    raise TrainerError(f"the data cannot be used:{bullet_list(grouped(of_splits + of_images), 40)}\n{remedy}")


def grouped(found: list[tuple[str, str]]) -> list[str]:
    """Findings (kind, detail) as one sentence for each kind: how many there are, and the first two."""
    details = defaultdict(list)
    for kind, detail in found:
        details[kind].append(detail)
    return [kind + f" ({len(of_kind)} times)" * (len(of_kind) > 1) + ": " + "; ".join(of_kind[:2])
            + ", ..." * (len(of_kind) > 2) for kind, of_kind in details.items()]


# ===== COCO annotations ===============================================================================================

ANNOTATION_FILE = "_annotations.coco.json"
LARGEST_SIDE = 10_000  # pixels; a larger size in a JSON is a mistake that would only exhaust the memory
BLANK = " \t\r\n\u00a0\u200b\u3000\ufeff"  # blanks, visible or not, at the ends of a category's name
FEW_PIXELS = 25  # a mask with fewer gets a remark: annotation tools leave such specks behind
# In the JSON of the synthetic MRI-like images (phantoms) that come with the script:
SAMPLE_MARK = "sample data of brain_tumor_integrated_smp.py"


def load_coco(json_path: Path) -> dict:
    """Parse a COCO file. Raises TrainerError unless it has lists of images (not empty), annotations and categories."""
    folder = json_path.parent
    if not json_path.is_file():
        missing = f"file not found: {json_path}" if folder.is_dir() else f"folder not found: {folder}"
        if unread := [str(path) for path in list_files(folder) if path.name.lower().endswith(UNREAD_SUFFIXES)]:
            missing += f" ({plural(len(unread), 'file')} of a format that is not read, such as {unread[0]})"
        raise TrainerError(f"{missing}; the data folder (DATA_DIR or --data-dir) must hold train/ and, if you have "
                           f"them, valid/ and test/, each with its images and one {ANNOTATION_FILE}, as a 'COCO "
                           "Segmentation' export, or with a mask file for each image: NAME_mask.png beside it, or the "
                           "same name in masks/")
    try:
        coco = json.loads(json_path.read_bytes().decode("utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise TrainerError(f"{json_path} is not valid JSON in UTF-8 ({error}); export or copy it again") from None
    for key in ("images", "annotations", "categories"):
        values = coco.get(key) if isinstance(coco, dict) else None
        if not isinstance(values, list) or not all(isinstance(value, dict) for value in values):
            raise TrainerError(f"{json_path} is not a COCO file: it has no list of '{key}'; export the data in the "
                               "format 'COCO Segmentation'")
    if not coco["images"]:
        raise TrainerError(f"{json_path} lists no images; export the data again, or take the folder out")
    return coco


def read_coco(folder: str | Path, categories: tuple = ()) -> Split:
    """Read the `_annotations.coco.json` of a split, and note what is wrong with it; all that needs no pixels.

    categories: names of the categories that count as tumour; empty: all.
    Raises TrainerError when there is no such file, or CATEGORIES does not fit it.
    """
    json_path = Path(folder) / ANNOTATION_FILE
    coco = load_coco(json_path)
    names = {id_text(category.get("id")): str(category.get("name")) for category in coco["categories"]}
    chosen = {name.strip(BLANK) for name in categories}
    if unknown := sorted(chosen - {name.strip(BLANK) for name in names.values()}):
        raise TrainerError(f"CATEGORIES names {', '.join(unknown)}, but {json_path} has only: "
                           f"{', '.join(sorted(set(names.values())))}.{did_you_mean(unknown[0], names.values())}")
    split = Split(Path(folder), [], {name: not chosen or name.strip(BLANK) in chosen for name in names.values()},
                  is_sample=SAMPLE_MARK in str(coco.get("info")))
    by_id = read_image_list(split, coco["images"])
    locate_files(split)
    read_annotations(split, coco, names, by_id, strict=bool(chosen))
    return split


def id_text(value) -> str:
    """An id of a COCO file as text: 1, 1.0 and "1" are the same."""
    return str(int(value) if isinstance(value, float) and value.is_integer() else value)


def read_image_list(split: Split, images: list[dict]) -> dict[str, ImageEntry]:
    """Fill the entries of a split from the list of images in its COCO file. Returns them by image id."""
    by_id, sizeless = {}, []
    for number, image in enumerate(images):
        key, name, size = id_text(image.get("id")), image.get("file_name"), (image.get("height"), image.get("width"))
        inside = os.path.normpath(str(name).replace("\\", "/"))  # some tools on Windows write back-slashes
        if image.get("id") is None or not isinstance(name, str) or not name:
            split.problems.append(("image without id or file_name", f"image entry {number}"))
        elif os.path.isabs(inside) or Path(inside).parts[:1] == ("..",) or inside[1:2] == ":" or "\0" in inside:
            split.problems.append(("file name that points outside its folder", f"image id {key}, {name!r}"))
        elif key in by_id:
            names = f"{by_id[key].file_name} and {name}"
            split.problems.append(("image id that is used twice", f"image id {key}, {names}"))
        else:
            entry = by_id[key] = ImageEntry(number, os.path.join(split.folder, inside), name, 0, 0)
            if all(type(side) in (int, float) and 1 <= side <= LARGEST_SIDE and side % 1 == 0 for side in size):
                entry.height, entry.width = map(int, size)
            else:
                sizeless.append((entry, f"height {size[0]!r} and width {size[1]!r}"))
    split.entries = list(by_id.values())
    split.note(sizeless, f"height and width must be whole numbers from 1 to {LARGEST_SIDE} (pixels)", len(images),
               "problems")
    return by_id


def locate_files(split: Split) -> None:
    """Give entries whose file is missing the one file that can only be meant: in another folder, or written otherwise.

    Masks and overlays have the names of their images, and what another entry names is taken: neither is meant.
    """
    files, named, missing = list_images(split), {os.path.normcase(entry.path) for entry in split.entries}, 0
    by_name = defaultdict(list)  # of files that no entry names
    for path in files:
        if os.path.normcase(split.folder / path) in named:
            continue
        if is_mask_file(path):
            split.remarks.append(("mask file that is not used, because there is a COCO file", str(path)))
        if not {"masks", "overlays"} & {*map(str.lower, path.parts[:-1])}:
            by_name[plain_path(path.name)].append(path)
    for entry in split.entries:
        if os.path.exists(entry.path):
            continue
        name = "/" + plain_path(entry.file_name)
        meant = by_name[name.rpartition("/")[2]]
        if len(meant) > 1:  # the one in the same folder
            meant = [path for path in meant if ("/" + plain_path(path)).endswith(name)
                     or name.endswith("/" + plain_path(path))]
        if len(meant) == 1:
            entry.path = str(split.folder / meant[0])
            if meant[0].name != re.split(r"[/\\]", entry.file_name)[-1]:
                entry.remarks.append(("file name that the JSON writes otherwise", f"{meant[0]} on the disk"))
        else:
            entry.problems.append(("the file is missing", ""))
            missing += 1
    if missing == len(split.entries) > 1:
        split.problems.append(("all image files are missing; they belong beside the JSON", f"{missing} images"))
    uses = Counter(os.path.normcase(entry.path) for entry in split.entries)
    for entry in split.entries:
        if uses[os.path.normcase(entry.path)] > 1:
            entry.problems.append(("file that is listed as two images", ""))
    split.unlisted = len({os.path.normcase(split.folder / path) for path in files} - uses.keys())


def plain_path(name: str | Path) -> str:
    """A path as lower-case text, without %-encoding, in one Unicode form: tools and systems write names differently."""
    return unicodedata.normalize("NFC", urllib.parse.unquote(str(name))).casefold().replace("\\", "/")


def read_annotations(split: Split, coco: dict, names: dict[str, str], by_id: dict[str, ImageEntry],
                     strict: bool) -> None:
    """Count the annotations of each entry by category, and draw those that count as tumour into its mask.

    names: of the categories, by id; unknown ones are added to those of the split. strict: they are a problem.
    """
    listed_ids = {id_text(image.get("id")) for image in coco["images"]}  # also of images that have no entry
    outlines, undrawable = [], defaultdict(list)
    for annotation in coco["annotations"]:
        label, image_id = f"annotation id {annotation.get('id')}", id_text(annotation.get("image_id"))
        category_id = id_text(annotation.get("category_id"))
        if image_id not in listed_ids:
            split.problems.append(("annotation of an image id that the file does not list",
                                   f"{label}, image id {annotation.get('image_id')}"))
        if strict and category_id not in names:
            split.problems.append(("annotation with a category id that the file does not list",
                                   f"{label}, category id {annotation.get('category_id')}"))
        if (entry := by_id.get(image_id)) is None:
            continue
        category = names.get(category_id, f"unknown id {category_id}")
        entry.annotations[category] += 1
        if not split.categories.setdefault(category, not strict) or not entry.height:
            continue
        try:
            rle, corners, remarks = rasterize(annotation.get("segmentation"), entry.height, entry.width)
        except (ValueError, TypeError, OverflowError) as error:
            kind, *details = map(str, error.args)
            undrawable[kind].append((entry, ", ".join([label, *details])))
            continue
        outlines.append((entry, label, corners, box_corners(annotation.get("bbox"))))
        entry.remarks += [(remark, label) for remark in remarks]
        if rle is None:
            continue
        pixels = int(coco_mask.area(rle))
        if pixels < FEW_PIXELS:
            entry.remarks.append((f"mask with fewer than {FEW_PIXELS} pixels", f"{label}, {pixels} pixels"))
        if pixels:
            entry.tumours += 1
            entry.boxes += pixels == round(float(np.prod(coco_mask.toBbox(rle)[2:])))
            entry.rle = coco_mask.merge([entry.rle, rle]) if entry.rle else rle
    for kind, found in undrawable.items():
        split.note(found, kind, len(outlines) + sum(map(len, undrawable.values())), "problems")
    if outlines:
        check_outlines(split, outlines)


def parse_polygons(segmentation) -> list[np.ndarray]:
    """The polygons of a COCO segmentation as float64 [N, 2] arrays of x, y in pixels.

    One flat list of numbers, or one list of [x, y] pairs, is read as a single polygon. Raises ValueError for the rest.
    """
    if not isinstance(segmentation, list) or not segmentation:
        found = f" but {segmentation!r:.20}" if segmentation else ""
        raise ValueError(f"annotation without polygons or RLE{found}, only a box perhaps: export the data as 'COCO "
                         "Segmentation'")
    rows = [row for row in segmentation if isinstance(row, list)]
    flat, square = [value for row in rows for value in row], len(rows) > 3 and len({len(row) for row in rows}) == 1
    if any(isinstance(value, bool) for value in flat) or square and len(rows[0]) > 3 and all(
            type(value) in (int, float) and value in (0, 1) for value in flat):
        raise ValueError("the segmentation is a mask array: store it as RLE (pycocotools.mask.encode) or as polygons")
    if not rows or len(rows) >= 3 and all(len(row) == 2 and not isinstance(row[0], list) for row in rows):
        segmentation = [segmentation]  # a single polygon without the list around it
    polygons = []
    for polygon in segmentation:
        try:
            xy = np.array(polygon, np.float64)
            xy = xy.reshape(-1, 2) if xy.ndim < 2 else xy.reshape(len(xy), 2)
        except (ValueError, TypeError, OverflowError):
            raise ValueError("a polygon is not a list of x, y pairs, or has numbers that are too large") from None
        if not np.isfinite(xy).all():
            raise ValueError("a polygon has coordinates that are not finite")
        polygons.append(xy)
    return polygons


def compress_rle(rle: dict, height: int, width: int) -> dict:
    """The compressed form of an RLE of a COCO file. Raises ValueError if it is not one of height times width pixels."""
    counts = rle.get("counts")
    if rle.get("size") != [height, width]:
        raise ValueError("its RLE has another size than its image", f"size {rle.get('size')}, image {[height, width]}")
    if isinstance(counts, str):
        # pycocotools reads beyond a text whose last letter does not end a number. What it makes of a text that is too
        # short or too long is not what the text says: encoded again, it differs.
        if re.fullmatch("([P-o]{0,5}[0-O])+", counts):
            compressed = {"size": [height, width], "counts": counts.encode()}
            if coco_mask.encode(np.asfortranarray(coco_mask.decode(compressed))) == compressed:
                return compressed
    elif isinstance(counts, list) and all(type(n) is int and n >= 0 for n in counts) and sum(counts) == height * width:
        mask = np.repeat(np.arange(len(counts)) % 2 > 0, counts).reshape(width, height).T
        return coco_mask.encode(np.asfortranarray(mask, np.uint8))
    raise ValueError("the counts of its RLE do not describe height times width pixels")


def rasterize(segmentation, height: int, width: int) -> tuple[dict | None, np.ndarray, list[str]]:
    """Rasterise a COCO segmentation (polygons or RLE) with pycocotools.

    Returns (compressed RLE of the union, or None if no polygon is left; its corners, see box_corners(), before it is
    clipped; remarks). Raises ValueError (kind, details) for what cannot be drawn.
    """
    if isinstance(segmentation, dict):
        rle = compress_rle(segmentation, height, width)
        return rle, box_corners(coco_mask.toBbox(rle).tolist()), []
    polygons, remarks = [], []
    for xy in parse_polygons(segmentation):
        if len(xy) < 3:
            remarks.append("polygon with fewer than three points (ignored)")
            continue
        if (xy < -0.5).any() or (xy > (width + 0.5, height + 0.5)).any():
            remarks.append("polygon outside the image (clipped)")
        polygons.append(xy)
    if not polygons:
        return None, box_corners(None), remarks
    # pycocotools clips by itself, but its memory grows with the distance: keep that bounded.
    far, points = 4 * max(height, width), np.concatenate(polygons)
    flat = [np.clip(xy, -far, 2 * far).ravel().tolist() for xy in polygons]
    corners = np.concatenate([points.min(axis=0), points.max(axis=0)])
    return coco_mask.merge(coco_mask.frPyObjects(flat, height, width)), corners, remarks


def box_corners(bbox) -> np.ndarray:
    """(left, top, right, bottom) of a COCO box [x, y, width, height]; NaN if there is none, or it is all zero."""
    try:
        x, y, width, height = (float(value) for value in (bbox if isinstance(bbox, list) else ()))
    except (TypeError, ValueError, OverflowError):
        return np.full(4, np.nan)
    box = np.array([x, y, x + width, y + height])
    return box if box.any() and np.isfinite(box).all() else np.full(4, np.nan)


def check_outlines(split: Split, found: list[tuple[ImageEntry, str, np.ndarray, np.ndarray]]) -> None:
    """Note where the outlines of a split, their bounding boxes and their images disagree.

    found: of each outline its image, its name for messages, its corners and those of its box, see box_corners().
    """
    def shown(corners):
        return "x {:.0f} to {:.0f}, y {:.0f} to {:.0f}".format(*corners[[0, 2, 1, 3]]).replace("nan", "?")

    entries, labels, outlines, boxes = zip(*found)
    outlines, boxes = np.array(outlines), np.array(boxes)
    known, limits = ~np.isnan(outlines[:, 0]), np.array([2 * (entry.width, entry.height) for entry in entries], float)
    beyond = np.maximum(-outlines, outlines - limits) > np.maximum(2, 0.05 * limits)
    # In two public data sets edges differ by 0.5 px at most; swapped, mirrored or scaled coordinates by more than this.
    drawn, boxed = np.clip(outlines, 0, limits), np.clip(boxes, 0, limits)
    differs = np.abs(drawn - boxed) > np.maximum(2, 0.05 * np.tile(boxed[:, 2:] - boxed[:, :2], 2))
    largest = outlines[known].max(initial=0)
    if known.any() and largest <= 1:
        split.problems.append(("coordinates that are fractions of the image, not pixels", "all are at most 1"))
    elif known.sum() >= 3 and largest <= 100 and limits[known].min() > 150:
        split.problems.append(("coordinates that are percent, not pixels", "all are at most 100 in larger images"))
    for wrong, compared, kind, causes in (
            (beyond, known, "far outside its image", "the images were resized, but not the outlines; x and y, or width "
             "and height, are swapped"),
            (differs, known & ~np.isnan(boxes[:, 0]), "that contradicts its bounding box", "x and y are swapped; the "
             "images were resized, but not the outlines; percent instead of pixels; triples instead of pairs. If the "
             "boxes are wrong and the outlines right, remove \"bbox\" from the annotations")):
        details = [(entries[i], f"{labels[i]}, {shown(outlines[i])}; its box {shown(boxes[i])}")
                   for i in np.flatnonzero(wrong.any(axis=1))]
        split.note(details, f"outline {kind}", int(compared.sum()), "remarks", f". Likely causes: {causes}")


# ===== Mask files =====================================================================================================

MASK_FILE = "mask file"  # instead of a category's name, in splits without COCO file
LARGEST_LABEL = 20  # mask files with whole numbers up to this, 0 among them, are label maps


def read_pairs(folder: Path) -> Split | None:
    """The images of a folder, and of the folders in it, with their mask files; None if there is no mask file.

    The mask of X is X_mask beside it, or X in masks/, which lies beside X or beside its folder images/.
    Masks without image, and names that do not tell what belongs together, are noted as problems.
    """
    def key(path):  # the same for an image and its mask
        folders = [name for name in map(str.lower, path.parts[:-1]) if name not in ("images", "masks")]
        return "/".join([*folders, MASK_END.sub("", path.stem).lower()])

    split, together = Split(folder, [], {MASK_FILE: True}), defaultdict(lambda: ([], []))  # images, masks
    files = list_images(split)
    for path in files:
        together[key(path)][is_mask_file(path)].append(path)
    if not any(masks for _, masks in together.values()) and not split.problems:
        return None
    how = " (the mask of X is X_mask beside it, or X in masks/; rename or remove the file)"
    for images, masks in together.values():
        if len(masks) > 1:
            split.problems.append((f"two masks for one image{how}", f"{masks[0]} and {masks[1]}"))
        if masks and len(images) != 1:
            split.problems.append((f"mask {'for more than one' if images else 'without'} image{how}", str(masks[0])))
    for number, path in enumerate(path for path in files if not is_mask_file(path)):
        _, masks = together[key(path)]
        split.entries.append(ImageEntry(number, str(folder / path), path.as_posix(), 0, 0,
                                        mask_path=str(folder / masks[0]) if masks else "",
                                        annotations=Counter({MASK_FILE: 1} if masks else {})))
    return split


def read_mask_file(path: str) -> tuple[np.ndarray, Counter]:
    """The grey levels of a mask file, uint8 or uint16 [H, W], and its colours: how many pixels have each 0xRRGGBB.

    Of a coloured file the level is the largest channel; of a grey one there are no colours.
    """
    image = open_image(path, upright=True)
    levels = deep_pixels(image)
    if levels is not None:
        if levels.dtype != np.uint16:
            raise TrainerError(f"{path}: has other numbers than 8 or 16 bit; save it as an 8-bit PNG")
        return levels, Counter()
    rgb = np.asarray(image.convert("RGB"))
    if rgb.min() == rgb.max() and "A" in image.getbands() and len(np.unique(image.getchannel("A"))) > 1:
        raise TrainerError(f"{path}: is only transparency; save it as an 8-bit PNG in black and white")
    levels = rgb.max(axis=2)
    if (levels - rgb.min(axis=2)).max() < 32:
        return levels, Counter()
    names, counts = np.unique(rgb.astype(np.int32) @ (2**16, 2**8, 1), return_counts=True)
    colours = merge_colours(Counter(dict(zip(names.tolist(), counts.tolist()))))
    if colours and image.format in ("JPEG", "MPO", "WEBP"):
        # They blur, and add noise: tumour is what is at least half as bright as the most frequent colour.
        (main, count), = colours.most_common(1)
        bright = cv2.cvtColor(np.array([[[main >> 16, main >> 8 & 255, main & 255]]], np.uint8), cv2.COLOR_RGB2GRAY)
        levels = np.where(np.asarray(image.convert("L")) >= bright / 2, 255, 0).astype(np.uint8)
        colours = Counter({name: pixels for name, pixels in colours.items() if pixels > 0.02 * count})
    return levels, colours


def merge_colours(colours: Counter) -> Counter:
    """Add up the pixels of colours (0xRRGGBB) that differ only in brightness, under the most frequent of them; without
    nearly black ones. White and grey are one colour, too.
    """
    merged, hues = Counter(), {}
    for name, count in colours.most_common():
        hue, saturation, value = colorsys.rgb_to_hsv(name >> 16, name >> 8 & 255, name & 255)
        if value < 64:
            continue
        hue = hue if saturation > 0.25 else None
        same = next((other for other, known in hues.items() if hue is known or None not in (hue, known) and min(
            abs(hue - known), 1 - abs(hue - known)) < 1 / 12), name)  # 30 degrees
        hues.setdefault(same, hue)
        merged[same] += count
    return merged


def draw_mask_files(splits: Iterable[Split]) -> None:
    """Give the entries of read_pairs() their size and mask. Raises TrainerError where colours or grey levels could mean
    anything. A mask file that cannot be read is noted in its entry.
    """
    def count(entry):  # (entry, its grey levels, how many pixels have each, its colours); sets the entry's size
        try:
            picture, colours = read_mask_file(entry.mask_path)
        except TrainerError as error:
            entry.problems.append(("its mask: " + str(error).removeprefix(f"{entry.mask_path}: "), ""))
            return None
        entry.height, entry.width = picture.shape
        pixels = np.bincount(picture.ravel())
        levels = np.flatnonzero(pixels)
        return entry, levels, pixels[levels], colours

    def draw(entry):
        mask = (read_mask_file(entry.mask_path)[0] >= least).astype(np.uint8)
        boxes = cv2.connectedComponentsWithStats(mask)[2][1:]  # left, top, width, height, area of each tumour
        entry.tumours, entry.boxes = len(boxes), int((boxes[:, 2] * boxes[:, 3] == boxes[:, 4]).sum())
        entry.rle = coco_mask.encode(np.asfortranarray(mask)) if len(boxes) else None

    splits = [split for split in splits if MASK_FILE in split.categories]
    entries = [entry for split in splits for entry in split.entries if entry.mask_path and not entry.problems]
    files = [*filter(None, in_threads(count, entries, "Reading masks"))]
    if not files:
        return
    refuse_colours({entry.mask_path: colours for entry, _, _, colours in files})
    pixels = np.zeros(max(int(levels[-1]) for _, levels, _, _ in files) + 1, np.int64)
    for _, levels, counts, _ in files:
        pixels[levels] += counts
    least, between = tumour_levels(pixels)
    odd, shown = [], ", ".join(map(str, np.flatnonzero(pixels)[:LARGEST_LABEL + 1]))
    for entry, levels, counts, _ in files:
        strays, tumour = (int(counts[where].sum()) for where in (np.isin(levels, between), levels >= least))
        few = max(0.2 * tumour, 0.02 * counts.sum()) if least else 0
        if strays > few or len(levels) > 1 and not tumour:  # or all its levels are dark in the other files
            odd.append((-strays, entry.mask_path))
    if odd:
        raise TrainerError(f"{plural(len(odd), 'mask file')} with grey levels that could mean anything (all levels: "
                           f"{shown}):{bullet_list([path for _, path in sorted(odd)])}\nMasks have two levels, of "
                           f"which the upper one is tumour, or are label maps with whole numbers from 0 to "
                           f"{LARGEST_LABEL}, of which all above 0 are tumour; all files alike. Convert these files to "
                           "0 and 255 (resize masks with nearest neighbour only), or remove them.")
    if np.count_nonzero(pixels) > 2:
        splits[0].remarks.append((f"mask files with more than two grey levels: tumour is {least} and above",
                                  f"levels {shown}"))
    in_threads(draw, [entry for entry, *_ in files], "Reading masks")


def refuse_colours(colours: dict[str, Counter]) -> None:
    """Raise TrainerError if mask files (by path: their colours) have more than one colour, within one or together."""
    together = merge_colours(sum(colours.values(), Counter()))
    if len(together) < 2:
        return
    main = Counter({max(together, key=together.get): together.total()})
    odd = [path for path, mine in colours.items() if len(merge_colours(main + mine)) > 1]
    shown = ", ".join(f"#{name:06x} ({plural(count, 'pixel')})" for name, count in together.most_common(5))
    raise TrainerError(f"mask files with more than one colour, which may mean more than tumour: {shown}. Save the "
                       f"tumour in one colour on black, or each class as a file of its own:{bullet_list(odd)}")


def tumour_levels(pixels: np.ndarray) -> tuple[int, np.ndarray]:
    """What grey levels mean, from the number of pixels that have each of them in all mask files.

    Of two levels the upper one is tumour; in label maps all above 0; where JPEG has blurred two levels, what is nearer
    to the upper one. Returns (the lowest level that is tumour, or 0 if levels could mean anything; the levels that a
    file should have few of, or none).
    """
    levels = np.flatnonzero(pixels)
    first, last = int(levels[0]), int(levels[-1])
    if len(levels) == 2 or last == 0:
        return max(1, last), levels[:0]
    if first == 0 and last <= LARGEST_LABEL:
        return 1, levels[:0]
    if len(levels) > 8:  # fewer are no noise
        middle = (first + last + 1) // 2
        low, high = int(pixels[:middle].argmax()), middle + int(pixels[middle:].argmax())  # the two that were blurred
        noise = (high - low) / 16
        between = levels[(levels > low + noise) & (levels < high - noise)]
        # A third level would be a peak of its own.
        if high - low >= 64 and pixels[between].max(initial=0) <= 0.02 * pixels[middle:].sum():
            return (low + high + 1) // 2, between
    return 0, levels[1:-1] if len(levels) > 1 else levels


# ===== One pass over all files: audit and cache =======================================================================

# Correlation of two thumbnails; in the public data most such pairs are slices at most three numbers apart.
NEAR_DUPLICATE_CORRELATION = 0.95
NEAR_DUPLICATES = "{} of {} {} images look like an image in train: scores may be too good for new patients"
BLOCKS = 20  # of neighbours by file name, of which a part is held out
LOW_CONTRAST = 2.0  # grey levels of 255: a picture with a smaller standard deviation gets a remark


@dataclass
class PixelCache:
    """Decoded and resized images of a run: uint8 [S, S, 4] (RGB and mask) each, one after the other in a file.

    All workers and processes of a machine map the same file, so the pixels exist once, under every start method and
    without /dev/shm. Its name is derived from the folder of the run, which is locked: what a killed run has left, the
    next run of that folder replaces.
    """

    path: Path
    img_size: int

    def pixels(self, slot: int, mode: str = "r") -> np.ndarray:
        """The pixels of one image, mapped for reading, or with "r+" for writing."""
        shape = (self.img_size, self.img_size, 4)
        return np.memmap(self.path, np.uint8, mode, slot * math.prod(shape), shape)


def remove_cache(run_folder: Path) -> Path:
    """Delete the cache of a run, if there is one; if the system refuses, the next run does it. Returns its path."""
    name = hashlib.sha256(str(run_folder.resolve()).encode(errors="replace")).hexdigest()[:16]
    path = Path(tempfile.gettempdir()) / f"brain_tumor_cache_{name}.bin"
    with contextlib.suppress(OSError):
        path.unlink(missing_ok=True)
    return path


def open_cache(cfg: Settings, run_folder: Path, count: int) -> PixelCache | None:
    """A cache for count images, or None, with a message, when it is switched off, too large or the disk is full."""
    path, size = remove_cache(run_folder), count * cfg.IMG_SIZE**2 * 4  # what a killed run has left
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
    log(f"Images are decoded again in every epoch, which is slower: no room to keep them ({reason}).\n"
        "To keep them on another disk, set the environment variable TMPDIR (on Windows TEMP) to a folder there.")
    return None


def scan(entry: ImageEntry, cfg: Settings, cache: PixelCache | None) -> None:
    """Read one image file once: fill its cache slot and note what is found. A damaged file is noted, not raised."""
    if entry.problems:  # its file, its outlines or its mask are known to be of no use
        return
    try:
        image, mask, full = load_sample(entry, cfg.IMG_SIZE, cfg.GREY_PERCENTILES)
    except TrainerError as error:
        entry.problems.append((str(error).removeprefix(f"{entry.path}: "), ""))
        return
    if cache is not None:
        cache.pixels(entry.cache_slot, "r+")[:] = np.dstack([image, mask])
    truth, grey = entry.mask(), cv2.cvtColor(full, cv2.COLOR_RGB2GRAY)
    entry.file_size = full.shape[:2]
    entry.digest = hashlib.sha256(repr(full.shape).encode() + full.data).hexdigest()
    entry.mask_digest, entry.tumour_fraction = hashlib.sha256(truth.data).hexdigest(), float(truth.mean())
    if truth.any() and not mask.any():
        entry.remarks.append((f"tumour that disappears at IMG_SIZE {cfg.IMG_SIZE}", ""))
    if entry.mask_path and entry.tumour_fraction > 0.5:
        entry.remarks.append(("tumour on more than half of the image: is the mask inverted?", ""))
    if cv2.meanStdDev(grey)[1] < LOW_CONTRAST:
        entry.remarks.append(("picture with almost no contrast", ""))
    small = resize(grey, 32, 32).astype(np.float64).ravel()  # exact enough to be the same on every machine
    small -= small.mean()
    entry.thumbnail = (small / max(float(np.linalg.norm(small)), 1e-6)).astype(np.float32)


def check_sizes(split: Split) -> None:
    """Note where the size of an image file is not that of the JSON."""
    swapped = []
    for entry in split.entries:
        size = entry.height, entry.width
        if entry.file_size in ((), size):
            continue
        detail = "{1}x{0} pixels in the JSON, {3}x{2} in the file".format(*size, *entry.file_size)
        if entry.file_size == size[::-1]:
            swapped.append((entry, detail))
        else:
            entry.remarks.append(("file whose size differs from the JSON's (the mask is stretched with it)", detail))
    split.note(swapped, "width and height are swapped in the JSON", len(split.entries), "problems")


def find_patients(splits: dict[str, Split], pattern: str | None) -> None:
    """Set the patient of each image by PATIENT_PATTERN. Raises TrainerError, with names, if it misses any."""
    entries = [entry for split in splits.values() for entry in split.entries] if pattern else []
    for entry in entries:
        match = re.search(pattern, entry.file_name.replace("\\", "/"))
        entry.patient = (match and match[1]) or ""
    if missed := [entry.file_name for entry in entries if not entry.patient]:
        raise TrainerError(f"PATIENT_PATTERN {pattern} finds no patient in {len(missed)} of {len(entries)} file "
                           f"names:{bullet_list(missed, 5)}\nTo do without patients: --patient-pattern none")


def natural_key(file_name: str) -> tuple:
    """A key that sorts file names by folder, then name, numbers by value: s2 before s10. Roboflow's versions of one
    image, NAME.rf.HASH, have the same key.
    """
    *folders, name = file_name.replace("\\", "/").split("/")
    name = re.sub(r"\.rf\.\w+$", "", name.rpartition(".")[0] or name)
    return tuple(tuple(int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", text))
                 for text in [*folders, name])


def has_tumour(entries: list[ImageEntry]) -> bool:
    """Whether any of these images has a tumour, see scan()."""
    return any(entry.tumour_fraction for entry in entries)


def group_images(entries: list[ImageEntry], parts: int) -> list[list[ImageEntry]]:
    """Groups of images that belong into one part: those of a patient; if patients are not known, about BLOCKS blocks of
    neighbours by file name, of near-equal size. One block that has all tumours is cut in two.
    """
    together, groups = defaultdict(list), defaultdict(list)
    for entry in entries:
        together[entry.patient or natural_key(entry.file_name)].append(entry)
    if entries and entries[0].patient:
        return list(together.values())
    versions = [together[key] for key in sorted(together)]  # of one image each
    count, before = parts * math.ceil(BLOCKS / parts), itertools.accumulate(map(len, versions), initial=0)
    blocks = [images * count // len(entries) for _, images in zip(versions, before)]
    tumours = [i for i, images in enumerate(versions) if has_tumour(images)]
    if len({blocks[i] for i in tumours}) == 1:
        middle = tumours[len(tumours) // 2]
        blocks = [count + (i >= middle) if block == blocks[middle] else block for i, block in enumerate(blocks)]
    for block, images in zip(blocks, versions):
        groups[block] += images
    return [groups[block] for block in sorted(groups)]


def deal(groups: list[list[ImageEntry]], parts: int, seed: int) -> list[list[ImageEntry]]:
    """Deal whole groups, shuffled, into parts of near-equal numbers of images, each with a tumour if there are enough.

    Groups that are larger than a part should be go into the last parts.
    """
    dealt = [[] for _ in range(parts)]
    largest = max(sum(map(len, groups)) / parts, min(map(len, groups), default=0))
    shuffled = [groups[i] for i in np.random.default_rng(seed).permutation(len(groups))]
    # Giants first, then groups with a tumour.
    for group in sorted(shuffled, key=lambda group: (len(group) <= largest, not has_tumour(group))):
        giant, tumour = len(group) > largest, has_tumour(group)
        # The smallest part; for a tumour, of those that have none yet.
        place = min(range(parts), key=lambda k: (tumour and has_tumour(dealt[k]), len(dealt[k]), -k if giant else k))
        dealt[place] += group
    return dealt


def choose_held_out(entries: list[ImageEntry], cfg: Settings, names: list[str]) -> dict[str, list[str]]:
    """The images of train to hold out for the splits names (file names by split): for test, then of the rest for valid.

    Raises TrainerError if there are fewer patients, or original images, than parts are needed.
    """
    held_out = {}
    for name, setting, fold in (("test", "TEST_SHARE", 0), ("valid", "VALID_SHARE", cfg.FOLD)):
        if name not in names:
            continue
        parts, count = max(2, round(1 / getattr(cfg, setting))), len(entries)
        groups = group_images(entries, parts)
        part = deal(groups, parts, cfg.SEED)[fold]
        if not part or len(groups) < 2:
            raise TrainerError(f"there is no {name} folder, and nothing can be held out of train for it: "
                               f"{len(groups)} patients, or blocks of neighbours, are too few")
        held_out[name] = [entry.file_name for entry in part]
        taken = {*held_out[name]}
        entries = [entry for entry in entries if entry.file_name not in taken]
        kept = (f"whole patients, {len({entry.patient for entry in part})} of {len(groups)}"
                if part[0].patient else "neighbours by file name; set PATIENT_PATTERN to keep patients apart")
        log(f"There is no {name} folder: {len(part)} of {count} images of train are held out for it ({setting} = "
            f"{getattr(cfg, setting):g}: one of {parts} parts" + f", FOLD {fold}" * bool(fold) + f"): {kept}.")
    return held_out


def hold_out(splits: dict[str, Split], held_out: dict[str, list[str]]) -> dict[str, Split]:
    """Move images of train (file names by split) into splits of their own. Says which are not there."""
    train, parts = splits["train"], defaultdict(list)
    part_of = {file_name: name for name, part in held_out.items() for file_name in part}
    for entry in train.entries:
        parts[part_of.get(entry.file_name, "train")].append(entry)
    if missing := sorted(part_of.keys() - {entry.file_name for entry in train.entries}):
        log(f"{len(missing)} of the {len(part_of)} images that the run held out of train are not there:"
            f"{bullet_list(missing, 5)}")
    train.entries = parts.pop("train", [])
    splits = splits | {name: Split(train.folder, part, train.categories, is_sample=train.is_sample, held_out=True)
                       for name, part in parts.items()}
    return {name: splits[name] for name in SPLIT_NAMES if name in splits}


def prepare_data(cfg: Settings, names: list[str], run_folder: Path | None = None,
                 held_out: dict[str, list[str]] | None = None) -> tuple[dict[str, Split], PixelCache | None]:
    """Read, check and cache the splits, print the audit, and stop at bad data.

    names: of the splits. Without a folder for valid, VALID_SHARE of train takes its place; for test, TEST_SHARE, or
    there is none. run_folder: locked by this run; None: no cache.
    held_out, for a model that is there: which images of train its run has held out (file names by split). Then whatever
    is there of these images and splits is prepared, without demand for tumours; a data folder that holds images itself,
    none of which was held out, is test as a whole.
    Returns (splits by name, cache or None). The caller removes the cache. Raises TrainerError.
    """
    data_dir, training = Path(cfg.DATA_DIR), held_out is None
    folders = find_splits(data_dir)
    is_whole = not training and folders == {"train": data_dir}
    if training and folders.get("train") == data_dir:
        log(f"There is no train/ in {data_dir}: the images in it are the training set.")
    if training and cfg.FOLD and "valid" in folders:
        raise TrainerError(f"FOLD is {cfg.FOLD}, but folds are parts of train, and there is {folders['valid']}: move "
                           "its images into train, or leave FOLD at 0")
    if training:
        folders = {"train": data_dir / "train"} | folders  # if it is missing, read_splits() says so
    shares = {"valid": cfg.VALID_SHARE, "test": cfg.TEST_SHARE} if training else held_out
    of_train = [name for name in shares if shares[name] and name in names and name not in folders]
    needed = [*names, "train"] if of_train or is_whole else names
    splits = read_splits({name: folder for name, folder in folders.items() if name in needed}, cfg.CATEGORIES,
                         cfg.SKIP_BAD_IMAGES)
    phantoms = [str(split.folder) for split in splits.values() if split.is_sample]
    if 0 < len(phantoms) < len(splits):
        raise TrainerError(f"the sample phantoms are still in {', '.join(phantoms)}, but not in the other folders; put "
                           "your own images there (a test folder may also be removed)")
    if not training and "train" in splits:
        splits = hold_out(splits, {name: held_out[name] for name in of_train})
        if is_whole and len(splits) == 1:
            splits = {"test": splits["train"]}
        elif "train" not in names and any(split.held_out for split in splits.values()):
            log(f"Of {splits['train'].folder}, only images that the run held out of train are scored. It knows them by "
                "their names: if these are other data, move them into a folder test/.")
        splits = {name: split for name, split in splits.items() if name in names}
    if not splits:
        raise TrainerError(f"nothing to score: {data_dir} (DATA_DIR or --data-dir) has no folder {' or '.join(names)}, "
                           "and none of the images that the run held out of train")
    find_patients(splits, cfg.PATIENT_PATTERN)
    for split in splits.values():
        split.entries = [entry for entry in split.entries if entry.annotated or cfg.UNANNOTATED != "skip"]
    entries = [entry for split in splits.values() for entry in split.entries]
    for slot, entry in enumerate(entries):
        entry.cache_slot = slot
    cache = open_cache(cfg, run_folder, len(entries)) if run_folder else None
    in_threads(functools.partial(scan, cfg=cfg, cache=cache), entries, "Reading images")
    for split in splits.values():
        check_sizes(split)
        split.skipped = [entry for entry in split.entries if entry.problems]
        split.entries = [entry for entry in split.entries if not entry.problems]
    if training and of_train and splits["train"].entries:
        splits = hold_out(splits, choose_held_out(splits["train"].entries, cfg, of_train))
    print_audit(splits, cfg.CATEGORIES)
    refuse_unusable(splits, cfg, training)
    return splits, cache


def refuse_unusable(splits: dict[str, Split], cfg: Settings, training: bool) -> None:
    """Raise TrainerError for problems, and for splits that are of no use. Says which images are left out."""
    if bad := refuse_problems(splits.values(), cfg.SKIP_BAD_IMAGES):
        warn(f"leaving out {plural(sum(len(split.skipped) for split in splits.values()), 'image')} that cannot be used:"
             f"{bullet_list(bad)}")
    for name, split in splits.items():
        if not split.entries or training and name != "test" and not has_tumour(split.entries):
            missing = "tumour pixel" if split.entries else "usable image"
            why = "; valid chooses the best epoch and the threshold" * (name == "valid")
            place = f"the part of train that is held out for {name}" if split.held_out else split.folder
            raise TrainerError(f"{place} has no {missing} at all; check images, annotations, CATEGORIES and "
                               f"UNANNOTATED{why}")
        if training and name == "train" and len(split.entries) < world_size():
            raise TrainerError("there are fewer training images than processes")


def print_audit(splits: dict[str, Split], categories: tuple) -> None:
    """Print a table of what the splits hold, and remarks below it. Sets near_duplicate of the images."""
    sentences = [*split_remarks(splits, categories), *find_near_duplicates(splits)]
    leaks, copies, others, first_seen, columns = [], [], [], {}, []
    counts = {category: is_tumour for split in splits.values() for category, is_tumour in split.categories.items()
              if any(entry.annotations[category] for other in splits.values() for entry in other.entries)}
    for name, split in splits.items():
        percent = [100 * entry.tumour_fraction for entry in split.entries if entry.tumour_fraction] or [math.nan]
        columns.append({
            "Data": name, "images": len(split.entries), "unusable images": len(split.skipped),
            "patients (see PATIENT_PATTERN)": len({entry.patient for entry in split.entries} - {""}) or "?",
            **{f"annotations: {category[:18]}" + " (ignored)" * (not counts[category]):
               sum(entry.annotations[category] for entry in split.entries) for category in counts},
            "without annotation": sum(not entry.annotated for entry in split.entries),
            "without tumour": sum(not entry.tumour_fraction for entry in split.entries),
            "several tumours": sum(entry.tumours > 1 for entry in split.entries),
            "smallest tumour, % of image": f"{min(percent):.3f}",
            "median tumour, % of image": f"{np.median(percent):.3f}",
            "largest tumour, % of image": f"{max(percent):.3f}",
            "files that the JSON does not list": split.unlisted})
        others += [(kind, f"{name}/{detail}") for kind, detail in split.remarks]
        for entry in split.entries:
            entry.thumbnail = None  # it is not to be sent to workers
            label = f"{name}/{entry.file_name}"
            others += [(kind, f"{label}, {detail}".removesuffix(", ")) for kind, detail in entry.remarks]
            split_of_first, first = first_seen.setdefault(entry.digest, (name, label))
            if split_of_first != name:
                leaks.append(("same picture in two splits, which makes scores too good", f"{label} is {first}"))
            elif first != label:
                copies.append(("same picture twice", f"{label} is {first}"))
    log("\n" + "\n".join(row.ljust(41) + "".join(f"{column[row]!s:>9}" for column in columns) for row in columns[0]))
    remarks = sentences + grouped(leaks + copies + others)
    log(f"\n{plural(len(remarks), 'remark')}, please check:{bullet_list(remarks, 40)}\n" if remarks else "")


def split_remarks(splits: dict[str, Split], categories: tuple) -> list[str]:
    """Remarks about whole splits: shared patients, boxes, images without annotation, several categories. Sentences."""
    remarks, entries = [], [entry for split in splits.values() for entry in split.entries]
    places = Counter(patient for split in splits.values() for patient in {entry.patient for entry in split.entries})
    del places[""]
    if shared := sorted(patient for patient in places if places[patient] > 1):
        remarks.append(f"{len(shared)} of {len(places)} patients are in more than one split, which makes scores too "
                       f"good (data leakage); move each into one split: {', '.join(shared[:5])}"
                       + ", ..." * (len(shared) > 5))
    tumours, boxes = sum(entry.tumours for entry in entries), sum(entry.boxes for entry in entries)
    if boxes and boxes >= 0.95 * tumours:
        remarks.append(f"{boxes} of {tumours} annotations are upright boxes: a model will learn boxes, not outlines")
    missing = [entry.file_name for entry in entries if not entry.annotated]
    if missing and not any(split.is_sample for split in splits.values()):
        remarks.append(f"{len(missing)} of {len(entries)} images have no annotation ({', '.join(missing[:3])}"
                       f"{', ...' * (len(missing) > 3)}): they count as free of tumour. If "
                       "nobody annotated them, set UNANNOTATED = \"skip\" (--unannotated skip)")
    used = sum((entry.annotations for entry in entries), Counter())
    del used[MASK_FILE]
    if len(used) > 1 and not categories:
        names = [name for name, _ in used.most_common()]
        remarks.append(f"all categories count as tumour: {', '.join(names)}. To choose, set CATEGORIES (--categories "
                       f"\"{names[0]}\")")
    return remarks


def find_near_duplicates(splits: dict[str, Split]) -> list[str]:
    """Find the images of valid and test that look like one in train, mostly neighbouring slices. Returns remarks."""
    remarks, train = [], splits["train"].entries if "train" in splits else []
    for name, split in splits.items():
        if name == "train" or not train or not split.entries:
            continue
        # Thumbnails have mean 0 and length 1: their products are correlations.
        others = np.stack([entry.thumbnail for entry in train])
        for start in progress(range(0, len(split.entries), 256), f"Comparing {name} with train"):  # bounds the memory
            entries = split.entries[start:start + 256]
            correlation = np.stack([entry.thumbnail for entry in entries]) @ others.T
            for entry, closest, best in zip(entries, correlation.argmax(axis=1), correlation.max(axis=1)):
                if best > NEAR_DUPLICATE_CORRELATION:
                    entry.near_duplicate = train[closest].file_name
        pairs = [f"{entry.file_name} and {entry.near_duplicate}" for entry in split.entries if entry.near_duplicate]
        if pairs:
            remarks.append(f"{NEAR_DUPLICATES.format(len(pairs), len(split.entries), name)}, as {'; '.join(pairs[:3])}"
                           + ", ..." * (len(pairs) > 3))
    return remarks


def fingerprint(splits: dict[str, Split]) -> str:
    """A digest of the pixels and masks of train and valid: the same data, wherever it lies."""
    content = [(name, entry.number, entry.digest, entry.mask_digest) for name in ("train", "valid")
               for entry in splits[name].entries]
    return hashlib.sha256(repr(content).encode()).hexdigest()


# ===== Augmentation, dataset, batches =================================================================================


def build_transform(train: bool, normalize: bool = True, mean: tuple = MEAN, std: tuple = STD) -> A.Compose:
    """The Albumentations pipeline for RGB uint8 [S, S, 3] images and uint8 0/1 [S, S] masks: augmentation only.

    What every image needs, in prediction too, belongs into preprocess().
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
                 entries: list[ImageEntry] | None = None, cache: PixelCache | None = None,
                 percentiles: tuple = GREY_PERCENTILES):
        """entries and cache: of a split that prepare_data() has checked; without them the annotations are read here.

        Raises TrainerError when the split cannot be used.
        """
        if entries is None:
            split = read_splits({"": Path(split_dir)}, categories)[""]
            refuse_problems([split], skip_bad_images=False)
            entries = split.entries
        self.entries = entries
        self.img_size, self.seed, self.normalize, self.cache = img_size, seed, normalize, cache
        self.percentiles = percentiles
        self.transform = build_transform(train, normalize, mean, std)

    def __len__(self) -> int:
        return len(self.entries)

    def sample(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """The resized, not augmented image: RGB uint8 [S, S, 3] and mask uint8 0/1 [S, S]."""
        if self.cache is None:
            return load_sample(self.entries[index], self.img_size, self.percentiles)[:2]
        pixels = self.cache.pixels(self.entries[index].cache_slot)
        return cv2.cvtColor(pixels, cv2.COLOR_RGBA2RGB), cv2.extractChannel(pixels, 3)  # copies, and fast ones

    def __getitem__(self, key: int | tuple[int, int]):
        epoch, index = key if isinstance(key, tuple) else (0, key)
        image, mask = self.sample(index)
        # One generator for the whole pipeline, its state set per item: reseeding each transform with the same
        # number would make them all fire together, and workers would otherwise repeat each other's draws.
        generator = np.random.default_rng([self.seed, epoch, self.entries[index].number])
        self.transform.set_random_state(generator, random.Random(int(generator.integers(2**63))))
        out = self.transform(image=image, mask=mask)
        return (out["image"], out["mask"][None].float()) if self.normalize else (out["image"], out["mask"])


class EvenBatchSampler(torch.utils.data.Sampler):
    """Batches of (epoch, index) keys whose sizes differ by one image at most.

    So there is no tiny last batch, whose BatchNorm statistics would be noise, and no image is left out or repeated.
    With several processes each gets its part of every batch; nothing is padded. Where batch_size is 2 or more for each,
    none gets a single image to train on, if need be by a batch with more: some networks need two.
    """

    def __init__(self, count: int, batch_size: int, shuffle: bool, seed: int = 0):
        """count: images; batch_size: the most images in a batch, over all processes."""
        self.count, self.shuffle, self.seed, self.epoch = count, shuffle, seed, 0
        self.rank, self.world = rank(), world_size()
        # Every process needs an image in every training batch, or it would miss the exchange of gradients.
        least = 2 if shuffle and batch_size >= 2 * self.world else 1
        self.batches = min(math.ceil(count / batch_size), max(1, count // (least * self.world)))

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


def collate(samples: list) -> tuple[np.ndarray, np.ndarray]:
    """Samples to a batch of numpy arrays: uint8 images [B, S, S, 3] and masks [B, S, S].

    Arrays travel from worker to trainer through a pipe; tensors would need /dev/shm, which containers limit to 64 MB.
    """
    images, masks = zip(*samples)
    return np.stack(images), np.stack(masks)


def init_worker(_number: int) -> None:
    """Set up a DataLoader worker: one thread; Ctrl-C is left to the main process; it ends when the main process ends,
    also when that was killed.
    """
    cv2.setNumThreads(0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    # A worker that waits at a full pipe would outlive a killed trainer for ever.
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def make_loader(dataset: BrainTumorDataset, cfg: Settings, train: bool) -> torch.utils.data.DataLoader:
    """Batches of uint8 arrays, see collate(). Training batches are shuffled; validation batches are twice as large."""
    # Validation without decoding is a copy from the cache: not worth a process.
    workers = min(cfg.NUM_WORKERS, available_cores()) if train or dataset.cache is None else 0
    larger = 2 if not train and cfg.BATCH_SIZE > 1 else 1  # one image per batch: memory has run out for two
    sampler = EvenBatchSampler(len(dataset), cfg.BATCH_SIZE * larger, train, cfg.SEED)
    # Its own generator: a DataLoader that starts workers would otherwise draw from the generator of the dropout.
    return torch.utils.data.DataLoader(dataset, batch_sampler=sampler, num_workers=workers, collate_fn=collate,
                                       generator=torch.Generator(),
                                       worker_init_fn=init_worker, persistent_workers=workers > 0)


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

    Any nn.Module that does this may be returned instead: load_model() calls this function too, and the JSON names the
    class. encoder_weights: see load_encoder_weights(); None, too, where all weights are loaded afterwards, or come
    from the first of several processes.
    Returns (model, where its weights come from, as load_encoder_weights() says it). Of a network of your own:
    "random" if no weights are pretrained, "checkpoint ..." if all are, any other text if those are whose name begins
    with "encoder."; build_optimizer() takes the rates from it. Raises TrainerError for what cannot be built or loaded.
    """
    try:
        model = smp.create_model(architecture, encoder, encoder_weights=None, in_channels=3, classes=1)
    except (KeyError, ValueError, RuntimeError) as error:
        raise TrainerError(f"{architecture} cannot be built with ENCODER = {encoder!r}: {error}") from None
    return model, load_encoder_weights(model.encoder, encoder, encoder_weights)


def try_network(model: torch.nn.Module, cfg: Settings) -> bool:
    """Send one black image through a network and back, in eval mode, and say whether it has weights without a gradient.

    Raises TrainerError if it returns anything but logits [1, 1, S, S], or if it is one of smp's and cannot take images
    of IMG_SIZE pixels.
    """
    image = torch.zeros(1, 3, cfg.IMG_SIZE, cfg.IMG_SIZE, device=next(model.parameters()).device)
    try:
        with autocast(cfg.PRECISION, image.device):
            logits = model.eval()(image)
    except (AssertionError, RuntimeError, ValueError) as error:
        if is_out_of_memory(error) or type(model) not in smp.MODEL_ARCHITECTURES_MAPPING.values():
            raise
        raise TrainerError(f"this ARCHITECTURE and ENCODER cannot take images of IMG_SIZE = {cfg.IMG_SIZE}: "
                           f"{one_line(error)}") from None
    if getattr(logits, "shape", None) != (1, 1, *image.shape[2:]):
        raise TrainerError("the network must return logits [B, 1, S, S] for images [B, 3, S, S], but returns "
                           f"{[*logits.shape] if torch.is_tensor(logits) else type(logits).__name__} for one of "
                           f"{cfg.IMG_SIZE} pixels")
    logits.sum().backward()
    unreached = any(weight.requires_grad and weight.grad is None for weight in model.parameters())
    model.train().zero_grad()
    return unreached


def load_encoder_weights(module: torch.nn.Module, encoder: str, encoder_weights: str | None) -> str:
    """Load weights into an encoder of smp's: "imagenet" (downloaded), a local file of them, or None, which loads none.

    Returns where they come from: "imagenet (...)", "file ..." or "random ...". When the download is impossible, the
    encoder stays random, with a warning. Raises TrainerError for a local file that does not fit, and for an encoder
    that has no ImageNet weights.
    """
    if encoder_weights is None:
        return "random"
    if encoder_weights != "imagenet":
        load_weights(module, read_weights(encoder_weights), encoder_weights)
        return f"file {encoder_weights}"
    log("Getting ImageNet weights for the encoder (downloaded once, then from the local cache) ...")
    try:
        return load_imagenet_weights(module, encoder)
    except KeyError as error:  # there are none
        raise TrainerError(f"ENCODER = {encoder!r} cannot have ENCODER_WEIGHTS = 'imagenet': {error}") from None
    except ConnectionError as error:
        warn(f"no ImageNet weights ({error}).\n"
             "Training starts from RANDOM weights, with LR_FROM_SCRATCH, and needs more epochs for the same masks.\n"
             "To get the weights after all:\n"
             "  - where the hub is blocked, name a mirror in the environment: HF_ENDPOINT=https://<a mirror>\n"
             "  - or download the file elsewhere and set ENCODER_WEIGHTS to it (--encoder-weights FILE)\n"
             "  - or choose the random start yourself: ENCODER_WEIGHTS = None (--encoder-weights none)")
        return f"random ({error})"


DOWNLOAD_TIMEOUT = 5.0  # seconds without an answer until a server is given up


def load_imagenet_weights(module: torch.nn.Module, encoder: str) -> str:
    """Load ImageNet weights into an encoder: of ResNets torchvision's, if those can be had; or the Hugging Face hub's.

    Both keep what was downloaded once. Returns which it was. Raises KeyError if there are none for this encoder, and
    ConnectionError if they cannot be had.
    """
    sources = {"Hugging Face hub": lambda: from_hub(encoder)}
    if encoder.startswith("resnet"):  # the names of torchvision's weights are those of the encoder
        url = torchvision.models.get_model_weights(encoder).IMAGENET1K_V1.url
        sources = {"torchvision": lambda: torch.hub.load_state_dict_from_url(
            url, map_location="cpu", check_hash=True, weights_only=True)} | sources
    reasons, timeout = [], socket.getdefaulttimeout()
    socket.setdefaulttimeout(DOWNLOAD_TIMEOUT)
    try:
        for name, get_weights in sources.items():
            try:
                module.load_state_dict(get_weights())
                return f"imagenet ({name})"
            except KeyError:
                raise
            except Exception as error:  # networks, proxies, hubs and damaged files fail in many ways
                reasons.append(f"{name}: {type(error).__name__}: {one_line(error)}")
    finally:
        socket.setdefaulttimeout(timeout)
    raise ConnectionError("; ".join(reasons))


def from_hub(encoder: str) -> dict:
    """An encoder's ImageNet weights from the Hugging Face hub, or, if it does not answer, from its local cache."""
    from huggingface_hub import constants, utils  # comes with segmentation-models-pytorch
    offline, reason = constants.HF_HUB_OFFLINE, None
    try:  # the hub's own functions would try for half a minute
        utils.get_session().head(constants.ENDPOINT, timeout=DOWNLOAD_TIMEOUT)
    except Exception as error:  # whatever its HTTP client raises
        constants.HF_HUB_OFFLINE, reason = True, error
    try:
        return smp.encoders.get_encoder(encoder, weights="imagenet").state_dict()
    except KeyError:
        raise
    except Exception as error:
        raise reason or error from None
    finally:
        constants.HF_HUB_OFFLINE = offline


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
        raise TrainerError(f"{path} does not fit this model; are ENCODER and build_model() the same?"
                           f"{bullet_list(differences)}") from None


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

COUNTS = ("true_positive_px", "false_positive_px", "false_negative_px", "true_negative_px")
CONVENTION = ("A score is undefined where its denominator is 0, and is then left out of means: Dice and IoU where "
              "tumour is neither annotated nor predicted, recall where none is annotated, precision where none is "
              "predicted, HD95 where either is missing. A false alarm in a tumour-free image scores 0. NAME_n: the "
              "number of images (or patients) behind a mean, where not all have the score.")  # as in nnU-Net


def image_metrics(probabilities: torch.Tensor, masks: torch.Tensor, threshold: float = 0.5) -> dict[str, torch.Tensor]:
    """Scores of each image: float64 [B] tensors by name, on the same device. Tumour is probability >= threshold.

    probabilities: float32 [B, 1, H, W], 0..1. masks: any dtype [B, 1, H, W], 0 or 1.
    """
    counts = smp.metrics.get_stats(probabilities, masks.long(), mode="binary", threshold=threshold)
    counts = [count[:, 0].double() for count in counts]
    return metrics_from_counts(*counts) | dict(zip(COUNTS, counts))


def metrics_from_counts(tp: torch.Tensor, fp: torch.Tensor, fn: torch.Tensor, tn: torch.Tensor
                        ) -> dict[str, torch.Tensor]:
    """Scores from pixel counts (float64, any shape), range 0..1; NaN where undefined: their denominator is 0.

    What is added here reaches the history, the tables and the JSON, for each image, as a mean and as pooled_*.
    """
    return {"dice": 2 * tp / (2 * tp + fp + fn), "iou": tp / (tp + fp + fn), "precision": tp / (tp + fp),
            "recall": tp / (tp + fn), "specificity": tn / (tn + fp)}


def mean_score(name: str, values: torch.Tensor, owners: np.ndarray | None = None) -> dict:
    """NAME: the mean over those of [N] values that are defined, and NAME_n: their number, if not all are.

    With owners, whose image each value is of, also NAME_95_ci: confidence_interval(). What there is not is absent.
    """
    defined, score = values.isfinite(), {}
    if defined.any():
        score[name] = values[defined].mean().item()
        if not defined.all():
            score[f"{name}_n"] = int(defined.sum())
        if owners is not None and len({*owners[defined.numpy()]}) > 1:
            score[f"{name}_95_ci"] = confidence_interval(values[defined].numpy(), owners[defined.numpy()])
    return score


def summarize(scores: dict[str, torch.Tensor]) -> dict[str, float]:
    """Scores of a set from those of its images: means, and, as pooled_*, the ratios of all pixels taken together.

    See CONVENTION for undefined scores. What no image has is absent, so that a summary never holds NaN.
    """
    summary = {}
    for name in [name for name in scores if name not in COUNTS]:
        summary |= mean_score(name, scores[name])
    pooled = metrics_from_counts(*(scores[name].sum() for name in COUNTS))
    return summary | {f"pooled_{name}": value.item() for name, value in pooled.items() if value.isfinite()}


def final_scores(scores: dict[str, torch.Tensor], patients: list[str] | None = None,
                 leaks: list[bool] | None = None) -> dict:
    """The reported scores of a set from those of its images: summarize(), and what a mean over images hides.

    dice_with_tumour, iou_with_tumour: means over the images that have a tumour.
    tumour_free_predicted_empty: the share of the other images in which no tumour is predicted.
    dice_per_patient_mean, _median: over patients (a name for each image, or None), of the Dice of all pixels of a
    patient. dice_without_near_duplicates: of the images that leaks (whether each looks like one in train) leaves.
    dice_of_whole_image: of a prediction that marks every pixel. For NAME_n and NAME_95_ci see mean_score(). What a set
    does not have is absent.
    """
    annotated = (scores["true_positive_px"] + scores["false_negative_px"]).numpy()
    result, tumour, owners = summarize(scores), annotated > 0, np.array(patients or range(len(annotated)))
    for name in ("dice", "iou"):
        result |= mean_score(name, scores[name], owners)
        result |= mean_score(f"{name}_with_tumour", scores[name][tumour], owners[tumour])
    if patients:
        names, groups = np.unique(patients, return_inverse=True)
        counts = [torch.from_numpy(np.bincount(groups, scores[name])) for name in COUNTS]
        dice = metrics_from_counts(*counts)["dice"]
        result |= mean_score("dice_per_patient_mean", dice, names)
        if dice.isfinite().any():
            result["dice_per_patient_median"] = float(np.nanmedian(dice))
    if leaks and any(leaks):
        alone = ~np.array(leaks)
        result |= mean_score("dice_without_near_duplicates", scores["dice"][alone], owners[alone])
    if not tumour.all():
        result["tumour_free_predicted_empty"] = float((scores["false_positive_px"].numpy() == 0)[~tumour].mean())
    pixels = sum(scores[name] for name in COUNTS).numpy()
    return result | {"dice_of_whole_image": float((2 * annotated / (annotated + pixels)).mean())}


def confidence_interval(values: np.ndarray, patients: np.ndarray | list[str] | None = None) -> list[float]:
    """95 % confidence interval of the mean of [N] values: percentile bootstrap (Efron 1979), 2000 seeded resamples.

    patients: whose image each value is of; then patients are resampled, with all their images (cluster bootstrap).
    Without them the interval is too narrow where several images come from one patient.
    """
    groups = np.arange(len(values)) if patients is None else np.unique(patients, return_inverse=True)[1]
    sums, sizes = np.bincount(groups, values), np.bincount(groups)
    draw = functools.partial(np.random.default_rng(0).integers, len(sums), size=len(sums))
    means = [sums[drawn].sum() / sizes[drawn].sum() for drawn in (draw() for _ in range(2000))]
    return [float(bound) for bound in np.percentile(means, (2.5, 97.5))]


def hd95(prediction: np.ndarray, truth: np.ndarray) -> float:
    """95th percentile of the distances between the boundaries of two uint8 0/1 masks [H, W], in pixels.

    The distances from each boundary pixel of either mask to the nearest one of the other, both directions pooled, as
    in MedPy's hd95 (Huttenlocher et al. 1993 with a percentile for the maximum). A boundary pixel has one of its four
    neighbours, or the image's border, outside the mask. NaN where a mask is empty.
    """
    if not prediction.any() or not truth.any():
        return math.nan
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
    """GradScaler for float16, whose small gradients would become zero; for other dtypes it is disabled."""
    return torch.amp.GradScaler(device.type, enabled=amp_dtype(precision, device) == torch.float16)


def train_one_epoch(model: torch.nn.Module, loader, criterion, optimizer: torch.optim.Optimizer,
                    scaler: torch.amp.GradScaler, device: torch.device, *, cfg: Settings | None = None,
                    epoch: int = 0, after_step=None) -> float:
    """One pass over the loader's (images, masks) batches; see to_input() and to_target() for their types.

    criterion: (logits, targets) to a mean over images. scaler: of make_scaler(). after_step: called after each step.
    cfg: ACCUMULATION_STEPS, GRAD_CLIP, PRECISION, MEAN and STD are used (default: the constants).
    Returns the training loss, a mean over images; it is not finite if any batch's loss was not. Raises Interrupted.
    """
    cfg, device = cfg or default_settings(), torch.device(device)
    # Sums stay on the device: reading them in every step would make the processor wait for the GPU.
    loss_sum, images_seen = torch.zeros(2, device=device).unbind()
    batches = iter(loader)
    model.train()
    for _ in progress(range(math.ceil(len(loader) / cfg.ACCUMULATION_STEPS)), f"Epoch {epoch + 1}: training"):
        group = list(itertools.islice(batches, cfg.ACCUMULATION_STEPS))  # the last one may be shorter
        images_in_step = torch.full((), float(sum(len(images) for images, _ in group)), device=device)
        if world_size() > 1:
            dist.all_reduce(images_in_step)
        for number, (images, masks) in enumerate(group, 1):
            synchronize = world_size() == 1 or number == len(group)  # processes exchange gradients once per step
            with contextlib.nullcontext() if synchronize else model.no_sync():
                with autocast(cfg.PRECISION, device):
                    logits = model(to_input(images, device, cfg.MEAN, cfg.STD))
                # Weighted by its images, so that the batches of a step add up to the mean over the step's images.
                loss = criterion(logits.float(), to_target(masks, device)) * (len(images) / images_in_step)
                scaler.scale(loss * world_size()).backward()  # DistributedDataParallel averages over processes
            loss_sum += loss.detach() * images_in_step
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.GRAD_CLIP or math.inf)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        images_seen += images_in_step
        if after_step:
            after_step()
    return sum(gather(float(loss_sum))) / float(images_seen)  # images_seen is a sum over processes already


@torch.inference_mode()
def validate(model: torch.nn.Module, loader, criterion, device: torch.device, *,
             cfg: Settings | None = None) -> dict[str, float]:
    """Loss and scores at threshold 0.5 and the network's image size.

    Returns valid_loss (mean over images) and summarize() of all images of all processes, none counted twice.
    """
    cfg, device = cfg or default_settings(), torch.device(device)
    model.eval()
    found = []
    for images, masks in progress(loader, "Validation"):
        with autocast(cfg.PRECISION, device):
            logits = model(to_input(images, device, cfg.MEAN, cfg.STD)).float()
        targets = to_target(masks, device)
        loss = criterion(logits, targets).double().expand(len(images))  # the batch's mean, once for each of its images
        found.append({"valid_loss": loss} | image_metrics(logits.sigmoid(), targets))
    found = sum(gather([{name: values.cpu() for name, values in scores.items()} for scores in found]), [])
    scores = {name: torch.cat([scores[name] for scores in found]) for name in found[0]}
    # A loss that is not finite must be seen, and not be left out as undefined scores are.
    return {"valid_loss": float(scores.pop("valid_loss").mean())} | summarize(scores)


# ===== Training, epoch by epoch =======================================================================================


def build_optimizer(model: torch.nn.Module, cfg: Settings, weights_from: str) -> torch.optim.Optimizer:
    """AdamW with one learning rate for pretrained weights, and a larger one for randomly initialised ones.

    weights_from: "checkpoint ..." if all weights are pretrained, "random ..." if none is; otherwise the encoder's are,
    or all of them in a model without encoder.
    May return any torch.optim optimizer that steps without a closure; groups of weights may have a name, for the log.
    The history's "lr" is that of the last group. State and constants are saved, and a resumed run must have the same.
    """
    pretrained_lr = cfg.LR_FROM_SCRATCH if weights_from.startswith("random") else cfg.LR
    decoder_lr = cfg.LR if weights_from.startswith("checkpoint") else cfg.LR_FROM_SCRATCH
    encoder = [weight for name, weight in model.named_parameters() if name.startswith("encoder.")]
    decoder = [weight for name, weight in model.named_parameters() if not name.startswith("encoder.")]
    groups = [{"name": "encoder", "params": encoder, "lr": pretrained_lr},
              {"name": "decoder", "params": decoder, "lr": decoder_lr}]
    # Fused: one kernel for all parameters, which skips a step with bad gradients (float16) without asking the GPU.
    return torch.optim.AdamW(groups if encoder else model.parameters(), pretrained_lr, weight_decay=cfg.WEIGHT_DECAY,
                             fused=True)


def build_schedulers(optimizer: torch.optim.Optimizer, cfg: Settings, steps_per_epoch: int) -> tuple:
    """(LinearLR for the warm-up, stepped after each optimizer step; ReduceLROnPlateau, stepped after each epoch).

    May return any two schedulers of torch.optim, or None for one that is not needed. The second one gets the epoch's
    validation Dice if it is a ReduceLROnPlateau, and nothing if it is another. What they were built with (T_max,
    milestones, ...) must be the same in a resumed run, so it ends with the EPOCHS of its start if that is part of it.
    """
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, mode="max", factor=cfg.PLATEAU_FACTOR,
                                                         patience=cfg.PLATEAU_PATIENCE, threshold=0)
    # The last to be built: it lowers the rate at once, and somebody has to step it.
    return torch.optim.lr_scheduler.LinearLR(optimizer, 1 / max(1, cfg.WARMUP_STEPS),
                                             total_iters=cfg.WARMUP_STEPS), plateau


def built_with(optimizer: torch.optim.Optimizer, schedulers: tuple) -> dict[str, str]:
    """The constants of optimizer, schedulers and preprocess() by name: a resumed run has to be built with the same."""
    found = {"digest of preprocess()": preprocess_digest(), "optimizer": type(optimizer).__name__}
    for number, group in enumerate(optimizer.param_groups):
        found |= {f"{name} of group {number}": value for name, value in group.items()}
        found[f"params of group {number}"] = len(group["params"])
    for place, scheduler in zip(("per step", "per epoch"), schedulers):
        found[f"scheduler {place}"] = type(scheduler).__name__
        found |= {f"{name} {place}": value for name, value in (scheduler.state_dict() if scheduler else {}).items()}
    return {name: repr(value) for name, value in found.items()}


def after_epoch(trainer: Trainer, row: dict) -> None:
    """Called in the first process after each epoch, before it is saved. row: that of training_history.csv.

    After a kill, the epochs since the last save are trained again, and come here again. Nothing is done by default; two
    examples: a board of curves, and the weights of every tenth epoch.
    """
    # from torch.utils.tensorboard import SummaryWriter  # pip install tensorboard
    # with SummaryWriter(trainer.cfg.OUTPUT_DIR) as writer:
    #     for name, value in row.items(): writer.add_scalar(name, value, trainer.epoch)

    # if trainer.epoch % 10 == 0:
    #     path, weights = Path(trainer.cfg.OUTPUT_DIR) / f"epoch_{trainer.epoch}.pth", portable_weights(trainer.ema)
    #     write_file(path, lambda file: torch.save(weights, file))


class Trainer:
    """Model, EMA, optimizer, schedulers, GradScaler and history: everything that changes while a model is trained."""

    PLAIN = ("epoch", "steps", "epochs_without_improvement", "best_epoch", "best_dice", "best_weights", "history",
             "weights_from", "fingerprint", "built_with")
    STATEFUL = ("model", "ema", "optimizer", "per_step", "per_epoch", "scaler")

    def __init__(self, cfg: Settings, device: torch.device, fingerprint: str, steps_per_epoch: int,
                 state: dict | None = None):
        """fingerprint: of the data. state: of an earlier Trainer's state(), to continue with, or None to start."""
        self.cfg, self.device, self.fingerprint = cfg, device, fingerprint
        self.epoch = self.steps = self.epochs_without_improvement = self.best_epoch = 0  # epochs are counted from 1
        self.best_dice, self.best_weights, self.history = -1.0, {}, []
        torch.manual_seed(cfg.SEED)
        # A pretrained model needs no encoder weights. DistributedDataParallel copies the first process's to the others.
        weights = None if state or cfg.INIT_WEIGHTS or rank() else cfg.ENCODER_WEIGHTS
        with ending_together():
            model, origin = build_model(cfg.ENCODER, weights, cfg.ARCHITECTURE)
            model.to(device, memory_format=memory_format(device))
            unreached = try_network(model, cfg)
        self.weights_from = state["weights_from"] if state else gather(origin)[0]
        if cfg.INIT_WEIGHTS and not state:
            weights = read_weights(cfg.INIT_WEIGHTS)  # a best model, or a state (before format 4 EMA was "average")
            load_weights(model, weights.get("ema", weights.get("average", weights)), cfg.INIT_WEIGHTS)
            self.weights_from = f"checkpoint {cfg.INIT_WEIGHTS}"
        if world_size() > 1 and device.type == "cuda":  # BatchNorm sees the whole batch, not each GPU's part
            model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
        self.model = self.parallel_model = model
        if world_size() > 1:
            ids = [device] if device.type == "cuda" else None
            self.parallel_model = torch.nn.parallel.DistributedDataParallel(
                model, device_ids=ids, find_unused_parameters=unreached)  # True costs time
            self.parallel_model.broadcast_buffers = False  # sync_batchnorm_statistics() does it, once per epoch
        self.ema = copy.deepcopy(model).requires_grad_(False)
        self.ema_values, self.model_values = (
            [value for value in net.state_dict().values() if value.is_floating_point()] for net in (self.ema, model))
        self.ema_decay = 1 - 1 / max(1.0, cfg.EMA_EPOCHS * steps_per_epoch)  # 0: the EMA is the last weights
        self.optimizer = build_optimizer(model, cfg, self.weights_from)
        self.per_step, self.per_epoch = build_schedulers(self.optimizer, cfg, steps_per_epoch)
        self.built_with = built_with(self.optimizer, (self.per_step, self.per_epoch))
        self.scaler = make_scaler(cfg.PRECISION, device)
        self.saved_best_epoch = 0  # of the best model that save_run() has put on disk
        if state:
            self.load_state(state)
        if cfg.COMPILE:
            model.compile()  # in place: the names of the weights stay as they are
            self.ema.compile()

    def fit(self, loaders: dict, criterion, save) -> None:
        """Train until EPOCHS or early stopping; save() after the last epoch, and when SAVE_SECONDS have passed.

        Raises FloatingPointError, TrainerError, Interrupted, and what PyTorch raises when memory runs out.
        """
        cfg, first_epoch, started = self.cfg, self.epoch, time.perf_counter()
        previous = saved = started
        while not self.finished():
            began = time.perf_counter()
            loaders["train"].batch_sampler.set_epoch(self.epoch)
            torch.manual_seed(int(np.random.default_rng([cfg.SEED, self.epoch]).integers(2**63)))  # for dropout
            train_loss = train_one_epoch(self.parallel_model, loaders["train"], criterion, self.optimizer, self.scaler,
                                         self.device, cfg=cfg, epoch=self.epoch, after_step=self.after_step)
            speed = len(loaders["train"].dataset) / (time.perf_counter() - began)
            self.sync_batchnorm_statistics()
            scores = validate(self.ema, loaders["valid"], criterion, self.device, cfg=cfg)
            self.check_finite(train_loss, scores["valid_loss"])
            improved = self.end_epoch(train_loss, scores)
            now = time.perf_counter()  # the time from row to row includes everything, saving too
            self.history[-1] |= {"images_per_second": round(speed, 2), "seconds": round(now - previous, 2)}
            previous = now
            if rank() == 0:
                after_epoch(self, self.history[-1])
            if rank() == 0 and (self.finished() or now - saved >= cfg.SAVE_SECONDS):
                save()
                saved = time.perf_counter()
            left = (now - started) / (self.epoch - first_epoch) * (cfg.EPOCHS - self.epoch)
            table = epoch_line(self.history[-1], cfg.EPOCHS, timedelta(seconds=round(left)), improved)
            log("\n".join(table if self.epoch == first_epoch + 1 else table[1:]))
        if self.epoch < cfg.EPOCHS:
            log(f"Stopped early: no better validation Dice for {self.epochs_without_improvement} epochs "
                "(EARLY_STOPPING_PATIENCE).")

    def finished(self) -> bool:
        """Whether all epochs are done, or early stopping ends the run."""
        patience = self.cfg.EARLY_STOPPING_PATIENCE
        return self.epoch >= self.cfg.EPOCHS or 0 < patience <= self.epochs_without_improvement

    def after_step(self) -> None:
        """Update the learning rate and the EMA of weights and running statistics after a training step."""
        if self.per_step is not None:
            self.per_step.step()
        self.steps += 1
        # At first the EMA is over few steps (as in TensorFlow's ExponentialMovingAverage): with a constant decay, the
        # initial weights would stay in it for too long.
        decay = min(self.ema_decay, (1 + self.steps) / (10 + self.steps))
        torch._foreach_lerp_(self.ema_values, self.model_values, 1 - decay)

    def sync_batchnorm_statistics(self) -> None:
        """Copy BatchNorm's counters to the EMA, and give all processes the first one's EMA statistics."""
        for averaged, current in zip(self.ema.buffers(), self.model.buffers()):
            if not current.is_floating_point():  # BatchNorm's count of batches, of which there is no average
                averaged.copy_(current)
            if world_size() > 1:
                dist.broadcast(averaged, 0)

    def check_finite(self, train_loss: float, valid_loss: float) -> None:
        """Raise FloatingPointError unless losses, weights and optimizer state are finite; so only that is saved."""
        moments = (values.values() for values in self.optimizer.state.values())  # in some optimizers None or numbers
        values = itertools.chain(self.model.parameters(), self.ema.state_dict().values(),
                                 filter(torch.is_tensor, itertools.chain.from_iterable(moments)))
        if not math.isfinite(train_loss + valid_loss):
            reason = f"the loss is not finite (training {train_loss:.4g}, validation {valid_loss:.4g})"
        elif self.scaler.get_scale() < 1:
            reason = "gradients overflow float16 at every scale"
        elif not all(bool(value.sum().isfinite()) for value in values):  # NaN and infinity spoil a sum
            reason = "weights or optimizer state are not finite"
        else:
            return
        raise FloatingPointError(f"epoch {self.epoch + 1}: {reason}")

    def end_epoch(self, train_loss: float, scores: dict[str, float]) -> bool:
        """Add an epoch to the history; update the learning rate. Returns whether it is the best epoch."""
        self.epoch += 1
        self.history.append({"epoch": self.epoch, "train_loss": train_loss, **scores,
                             "lr": float(self.optimizer.param_groups[-1]["lr"])})  # the epoch ended with it
        dice = scores.get("dice", 0.0)  # where no image has one
        if isinstance(self.per_epoch, torch.optim.lr_scheduler.ReduceLROnPlateau):
            self.per_epoch.step(dice)
        elif self.per_epoch is not None:
            self.per_epoch.step()
        self.epochs_without_improvement += 1
        if dice <= self.best_dice:
            return False
        self.best_dice, self.best_epoch, self.epochs_without_improvement = dice, self.epoch, 0
        if rank() == 0:
            self.best_weights = portable_weights(self.ema)
        return True

    def state(self) -> dict:
        """Everything that is needed to continue: tensors and plain values only, so that it can be read safely."""
        stateful = {name: getattr(self, name) for name in self.STATEFUL}
        return ({name: getattr(self, name) for name in self.PLAIN}
                | {name: {} if value is None else value.state_dict() for name, value in stateful.items()})

    def load_state(self, state: dict) -> None:
        """Continue from a state. Raises TrainerError when it belongs to other data, or was built otherwise."""
        if state["fingerprint"] != self.fingerprint:
            raise TrainerError("the images or masks in train/ or valid/ are not those of the saved run; restore the "
                               "data, or start a new run in another OUTPUT_DIR")
        saved, now = state["built_with"], self.built_with
        if changed := [f"{name}: saved {saved[name]}, now {now[name]}" for name in now.keys() & saved.keys()
                       if now[name] != saved[name]]:
            raise TrainerError(f"the saved run was built otherwise:{bullet_list(sorted(changed))}\nUndo what was "
                               "edited in build_optimizer(), build_schedulers() or preprocess(), or the EPOCHS that a "
                               "schedule depends on; or start a new run, perhaps with --init-weights")
        for name in self.PLAIN:
            setattr(self, name, state[name])
        for name in self.STATEFUL:
            if name in ("model", "ema"):
                load_weights(getattr(self, name), state[name], LAST)
            elif state[name] and (name != "scaler" or self.scaler.is_enabled()):  # empty: of None, a disabled scaler
                getattr(self, name).load_state_dict(state[name])
        # A fused optimizer walks through weights and moments side by side: they need the same memory format.
        for weight, values in self.optimizer.state.items():
            for name, value in values.items():
                if torch.is_tensor(value) and value.shape == weight.shape:
                    values[name] = torch.empty_like(weight, dtype=value.dtype, device=value.device).copy_(value)


def epoch_line(row: dict, epochs: int, left: timedelta, improved: bool) -> list[str]:
    """The header of the printed table and the line of an epoch, up to 100 columns."""
    values = {"epoch": f"{row['epoch']}/{epochs}", "train_loss": f"{row['train_loss']:.4f}"}
    values |= {name: f"{row[name]:.4f}" if name in row else "-"
               for name in ("valid_loss", "dice", "iou", "precision", "recall")}
    values |= {"lr": f"{row['lr']:.1e}", "img/s": f"{row['images_per_second']:.1f}", "time": f"{row['seconds']:.1f}s",
               "ETA": str(left), "": "*best" if improved else ""}
    widths = {"epoch": 2 * len(str(epochs)) + 1, "lr": 7, "time": 7, "ETA": 8, "": 5}
    widths = {name: max(len(name), widths.get(name, 6)) for name in values}
    return [" ".join(text.rjust(widths[name]) for name, text in line).rstrip()
            for line in (zip(values, values), values.items())]


def train(cfg: Settings, resume: bool) -> None:
    """Train, keep the best model, then evaluate it."""
    device, output = find_device(cfg.DEVICE), Path(cfg.OUTPUT_DIR)
    set_up_machine(cfg, device)
    describe_machine(cfg, device)
    if resume:
        file = vars(default_settings())
        differs = [f"{name} = {value!r} (file: {file[name]!r})" for name, value in vars(cfg).items()
                   if value != file[name] and name not in ("DATA_DIR", "OUTPUT_DIR")]
        log(f"Settings of this run that differ from the file: {', '.join(differs) or 'none'}")
    STOP.saved = resume
    with locked_data(cfg, ["train", "valid", "test"]) as (splits, cache):
        samples = (f"Training on the bundled synthetic sample images ({len(splits['train'].entries)}). Use --data-dir "
                   "for your own.") if splits["train"].is_sample else ""
        log(samples)
        if device.type == "cpu":
            log("No GPU is used: at 256 px expect one to five images per second, hours or days for a real data set.\n"
                "For a first look take --img-size 128 --epochs 5. ETA in each epoch's line is the time that is left.")
        while not train_to_the_end(cfg, device, splits, cache, resume):
            resume = True
            gc.collect()
            torch._dynamo.reset()  # drops what COMPILE holds on to
            torch.cuda.empty_cache()
        end_processes()
        if rank() == 0:
            finish_run(cfg, splits, cache)
    log(f"\nModel: {output / BEST} (settings beside it in {Path(BEST).stem}.json)\n"
        "Look at training_history.png, training_samples.png and, if there is a test set, test_predictions.png and "
        "test_report.png.")
    if "test" not in splits:
        log("There is no test score, because there is no test folder; TEST_SHARE = 0.15 (--test-share 0.15) would hold "
            "out a part of train for one.")


def train_to_the_end(cfg: Settings, device: torch.device, splits: dict[str, Split], cache: PixelCache | None,
                     resume: bool) -> bool:
    """Build the trainer, from the saved state if resume, and train to the end.

    Returns False if it has failed and cfg is now safer: try again, with resume. A function of its own: when it
    returns, trainer, loaders and workers are gone, and the next try finds their memory free.
    """
    output, loaders = Path(cfg.OUTPUT_DIR), {}
    for name in ("train", "valid"):
        dataset = BrainTumorDataset(Path(cfg.DATA_DIR) / name, cfg.IMG_SIZE, name == "train", cfg.SEED, False,
                                    entries=splits[name].entries, cache=cache, percentiles=cfg.GREY_PERCENTILES)
        loaders[name] = make_loader(dataset, cfg, train=name == "train")
    steps_per_epoch = math.ceil(len(loaders["train"]) / cfg.ACCUMULATION_STEPS)
    state = read_state(output) if resume else None
    trainer = Trainer(cfg, device, fingerprint(splits), steps_per_epoch, state)
    if state:
        best = f"; best validation Dice {trainer.best_dice:.4f} (epoch {trainer.best_epoch})" if trainer.epoch else ""
        log(f"Continuing after epoch {trainer.epoch}{best}.")
        if trainer.epoch >= cfg.EPOCHS:
            log(f"All {cfg.EPOCHS} epochs are done; raise EPOCHS to train longer.")
        elif trainer.finished() and state["settings"]["used"]["EPOCHS"] < cfg.EPOCHS:
            trainer.epochs_without_improvement = 0  # it had stopped early, and the user asks for more epochs
    else:
        origin = re.sub(r"^random .*", "random", trainer.weights_from, flags=re.S)  # the warning has said why
        rates = [f"{group.get('initial_lr', group['lr']):g}" + (f" for the {group['name']}" if "name" in group else "")
                 for group in trainer.optimizer.param_groups]
        log(f"Learning rate {', '.join(rates)} (weights: {origin}).")
        if rank() == 0:
            archive_earlier_run(output)  # not earlier: INIT_WEIGHTS may be one of its files
            plot_samples(output / "training_samples.png", loaders["train"].dataset)
    del state  # as large as the trainer itself
    save = functools.partial(save_run, trainer, describe_run(trainer, splits))
    if rank() == 0:
        save()  # a state to return to, with the settings that are used; and whatever a kill has left unwritten
    STOP.saved = True
    try:
        trainer.fit(loaders, LOSSES[cfg.LOSS], save)
    except Exception as error:
        if not isinstance(error, FloatingPointError) and not is_out_of_memory(error):
            raise
        choose_safer_setting(cfg, device, one_line(error), is_out_of_memory(error))
        return False
    log(f"Best validation Dice {trainer.best_dice:.4f} in epoch {trainer.best_epoch} "
        f"({cfg.IMG_SIZE} px, threshold 0.5).")
    return True


def choose_safer_setting(cfg: Settings, device: torch.device, reason: str, out_of_memory: bool) -> None:
    """After a failure: float32, or smaller batches with as many images per step.

    Raises TrainerError if neither is left, or if there are several processes, which this script does not restart.
    """
    if out_of_memory:
        reason = f"memory ran out ({reason})"
        sizes = [size for size in range(world_size(), cfg.BATCH_SIZE // 2 + 1) if cfg.BATCH_SIZE % size == 0]
        if not sizes:
            raise TrainerError(f"{reason} with BATCH_SIZE = {cfg.BATCH_SIZE}, which cannot be made smaller. What "
                               "helps: a smaller IMG_SIZE; a smaller ENCODER, e.g. resnet18; closing other programs "
                               "on the GPU; --device cpu (slow)", 1)
        times = cfg.BATCH_SIZE // sizes[-1]
        safer = {"BATCH_SIZE": sizes[-1], "ACCUMULATION_STEPS": times * cfg.ACCUMULATION_STEPS}
    else:
        if rank():  # all processes find the same; the first one says it
            sys.exit(1)
        if amp_dtype(cfg.PRECISION, device) == torch.float32:
            best = Path(cfg.OUTPUT_DIR) / BEST
            start = f"from the best model so far: --init-weights \"{best}\"" if best.is_file() else "with:"
            raise TrainerError(f"{reason}, in float32, and it would happen again. Look at training_samples.png for "
                               "damaged data, or start a new run with a smaller learning rate "
                               f"{start} --lr {cfg.LR / 10:g} --output-dir NEW_FOLDER", 1)
        safer = {"PRECISION": "float32"}
    if world_size() > 1:
        flags = " ".join(f"{flag_name(name)} {value}" for name, value in safer.items())
        raise TrainerError(f"{reason}. To continue after the last saved epoch with a safer setting, add to the same "
                           f"command: --resume {flags}", 1)
    vars(cfg).update(safer)
    warn(f"{reason}.\nReturning to the last saved state, and continuing with "
         + ", ".join(f"{name} = {value}" for name, value in safer.items())
         + (".\nEvery image weighs as much as before, but BatchNorm sees smaller batches." if out_of_memory else "."))


def describe_run(trainer: Trainer, splits: dict[str, Split]) -> dict:
    """The JSON beside the best model: what other code needs to use it, and how it was made."""
    cfg, model_class, modules = trainer.cfg, type(trainer.model), (torch, torchvision, smp, A, cv2, np, matplotlib)
    known = model_class is smp.MODEL_ARCHITECTURES_MAPPING.get(cfg.ARCHITECTURE)  # otherwise build_model() was edited
    return {
        **({"architecture": cfg.ARCHITECTURE, "encoder": cfg.ENCODER} if known
           else {"model_class": model_class.__name__}),
        **prediction_settings(cfg), "preprocess_digest": preprocess_digest(),
        "settings": dict(vars(cfg)),
        "versions": {"python": platform.python_version()} | {module.__name__: module.__version__ for module in modules},
        "device": str(trainer.device), "platform": platform.platform(), "encoder_weights_from": trainer.weights_from,
        "convention": CONVENTION,
        "held_out": {name: [entry.file_name for entry in split.entries] for name, split in splits.items()
                     if split.held_out},
        "data_counts": {name: {"images": len(split.entries),
                               "annotations": sum(count for entry in split.entries for category, count
                                                  in entry.annotations.items() if split.categories[category]),
                               "without_tumour": sum(entry.rle is None for entry in split.entries),
                               "without_annotation": sum(not entry.annotated for entry in split.entries),
                               "skipped": len(split.skipped), "near_duplicates": split.near_duplicates,
                               **({"patients": len({entry.patient for entry in split.entries})}
                                  if cfg.PATIENT_PATTERN else {})}
                        for name, split in splits.items()}}


# ===== Checkpoints ====================================================================================================

BEST, LAST = "unet_plusplus_best.pth", "unet_plusplus_last.pth"
LABEL_CHECK = ("label_check.csv", "label_check.png")  # of --check-labels
RUN_FILES = (BEST, "unet_plusplus_best.json", "training_history.csv", "training_history.png", "training_samples.png",
             "training_history.pdf", "valid_metrics.csv", "test_metrics.csv", "test_predictions.png", "test_report.png",
             "test_report.pdf", *LABEL_CHECK, LAST)
FORMAT = 5  # of the state in LAST
# A resumed run may change these; BATCH_SIZE * ACCUMULATION_STEPS has to stay the same.
RESUME_MAY_CHANGE = ("EPOCHS", "EARLY_STOPPING_PATIENCE", "NUM_WORKERS", "DEVICE", "PRECISION", "COMPILE",
                     "DETERMINISTIC", "CACHE_GB", "SAVE_SECONDS", "DATA_DIR", "OUTPUT_DIR", "BATCH_SIZE",
                     "ACCUMULATION_STEPS", "ENCODER_WEIGHTS", "INIT_WEIGHTS", "SKIP_BAD_IMAGES",
                     "TEST_TIME_AUGMENTATION")


def portable_weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """A copy of the state_dict that loads anywhere: on the CPU, float32, contiguous."""
    return {name: value.to("cpu", torch.float32 if value.is_floating_point() else value.dtype, copy=True,
                           memory_format=torch.contiguous_format) for name, value in model.state_dict().items()}


def save_run(trainer: Trainer, metadata: dict) -> None:
    """Write the state, and then what follows from it: best weights, their JSON, table and plot.

    metadata: of describe_run(). Each file is replaced as a whole. The state holds the best weights too: after a kill
    between any two files, the first save of the resumed run mends the rest. Raises TrainerError; what was saved before
    is unharmed.
    """
    output = Path(trainer.cfg.OUTPUT_DIR)
    state = trainer.state() | {"format": FORMAT,
                               "settings": {"file": settings_in_file(), "used": dict(vars(trainer.cfg))}}
    write_file(output / LAST, lambda file: torch.save(state, file), required=True)
    if trainer.best_epoch != trainer.saved_best_epoch:
        content = io.BytesIO()
        torch.save(trainer.best_weights, content)
        digest = hashlib.sha256(content.getbuffer()).hexdigest()
        if read_metadata(output / BEST)[0].get("sha256") != digest:  # a resumed run finds it, with its scores
            write_file(output / BEST, content.getbuffer(), required=True)
            write_metadata(output / BEST, metadata | {
                "best_epoch": trainer.best_epoch, "sha256": digest,
                "valid_metrics_at_img_size": trainer.history[trainer.best_epoch - 1]})
        trainer.saved_best_epoch = trainer.best_epoch
    if trainer.history:
        write_table(output / "training_history.csv", trainer.history, "utf-8")
        plot_history(output / "training_history.png", trainer.history, metadata["data_counts"]["valid"]["images"],
                     trainer.finished())


def write_metadata(checkpoint: Path, metadata: dict) -> None:
    """Write the JSON beside a checkpoint; its "sha256" ties the two together."""
    write_json(checkpoint.with_suffix(".json"), metadata | {"checkpoint": checkpoint.name})


def read_metadata(checkpoint: Path) -> tuple[dict, str]:
    """The JSON beside a checkpoint. Returns (metadata, ""), or ({}, why there is none that belongs to it)."""
    path = checkpoint.with_suffix(".json")
    try:
        metadata = json.loads(path.read_text(encoding="utf-8"))
        if metadata["sha256"] == hashlib.sha256(checkpoint.read_bytes()).hexdigest():
            return metadata, ""
        return {}, f"{path.name} does not belong to {checkpoint.name} (its digest differs)"
    except OSError:
        return {}, f"there is no {path.name} beside it"
    except (ValueError, TypeError, KeyError):
        return {}, f"{path.name} is damaged"


def read_state(output: Path) -> dict:
    """The state of save_run() to continue with. Raises TrainerError if there is none that fits this script."""
    path = output / LAST
    if not path.is_file():
        raise TrainerError(f"nothing to resume: there is no {path}; leave out --resume to start a run, or name the "
                           "run's folder with OUTPUT_DIR (--output-dir)")
    state = read_weights(path)
    if "settings" in state and state.get("format") != FORMAT:
        raise TrainerError(f"{path} was written by another version of this script; finish that run with that version, "
                           f"or start a new one from its best model: --init-weights {path.with_name(BEST)}")
    if missing := {"settings", *Trainer.PLAIN, *Trainer.STATEFUL} - set(state):
        raise TrainerError(f"{path} is not the state of a run of this script: it has no {', '.join(sorted(missing))}")
    return state


def archive_earlier_run(output: Path) -> None:
    """Move the files of an earlier run into a folder of their own, the state last, and say how to continue it."""
    files = [output / name for name in RUN_FILES if (output / name).is_file()]
    if not files:
        return
    stamp = time.strftime("earlier_run_%Y%m%d-%H%M%S", time.localtime(files[-1].stat().st_mtime))
    folder = next(path for number in itertools.count(1) if not (path := output / f"{stamp}_{number}").exists())
    folder.mkdir()
    try:
        for file in files:
            os.replace(file, folder / file.name)
    except OSError as error:  # on Windows, files that another program has open cannot be moved
        for moved in folder.iterdir():
            os.replace(moved, output / moved.name)
        folder.rmdir()
        raise TrainerError(f"cannot move the earlier run of {output} out of the way ({error}). Close the program that "
                           "has the file open, or choose another folder with OUTPUT_DIR (--output-dir)", 1) from None
    log(f"The earlier run of this folder is now in {folder}.")
    if files[-1].name == LAST:
        log(f"To continue it, stop this one (Ctrl-C) and start the script with: --resume --output-dir \"{folder}\"")


# ===== Evaluation and prediction, through the same path ===============================================================

THRESHOLDS = np.round(np.arange(0.05, 0.96, 0.05), 2)
CONFIDENT = np.float32(THRESHOLDS[-1])  # tumour probability; on CONFIDENT_FRACTION of the pixels the model is confident
# Of a set whose images without annotation show tumours, 95 % were confident predictions after training (annotated ones:
# 98 %); of a set with true negatives, 30 % (58 %), by an undertrained model.
CONFIDENT_FRACTION = 0.002
PREDICTED = ("images", "masks", "overlays")  # folders of --predict
LABEL_FINDINGS = ("tumour where none is annotated", "annotated tumour that is not seen", "outlines that hardly overlap")
HARDLY_OVERLAP = 0.5  # Dice
WEAK_MODEL = 0.7  # Dice below which most contradictions are the model's mistakes


def prediction_settings(cfg: Settings) -> dict:
    """What predict_mask() has to know beside the weights."""
    return {"img_size": cfg.IMG_SIZE, "mean": cfg.MEAN, "std": cfg.STD, "threshold": 0.5,
            "test_time_augmentation": cfg.TEST_TIME_AUGMENTATION, "grey_percentiles": cfg.GREY_PERCENTILES}


def load_model(checkpoint: str | Path, device: str | torch.device | None = None,
               cfg: Settings | None = None) -> torch.nn.Module:
    """Load a checkpoint of this script for prediction, with the settings in the JSON beside it.

    device: where to put the model; default: DEVICE. cfg (default: the constants) is used instead, with a warning, when
    there is no JSON or only one of another checkpoint. The model, in eval mode, gets two attributes: metadata, the
    content of the JSON, and prediction_settings. Raises TrainerError when the file is missing, damaged or unfit.
    """
    checkpoint, cfg = Path(checkpoint), cfg or default_settings()
    device = torch.device(device or find_device(cfg.DEVICE))
    weights, (metadata, problem) = read_weights(checkpoint), read_metadata(checkpoint)
    if problem:
        warn(f"{checkpoint}: {problem}; using the script's settings: ENCODER {cfg.ENCODER}, {prediction_settings(cfg)}")
    cfg = Settings(**vars(cfg) | settings_of(metadata))
    if {*Trainer.STATEFUL} <= {*weights}:
        raise TrainerError(f"{checkpoint} is the state of a run, for --resume; the model is {BEST}")
    if metadata and metadata.get("preprocess_digest", "") != preprocess_digest():
        warn(f"{checkpoint} was trained with another preprocess(): masks will be worse.")
    model = build_model(cfg.ENCODER, None, cfg.ARCHITECTURE)[0]
    load_weights(model, weights, checkpoint)
    model.metadata, settings = metadata, prediction_settings(cfg)
    model.prediction_settings = settings | {"threshold": metadata.get("threshold", settings["threshold"])}
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

    The model is left in eval mode: in training mode, images would change its BatchNorm statistics, and several threads
    would disturb each other. Raises ValueError for any other kind of image.
    """
    if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or image.shape[2:] != (3,) or not image.size:
        raise ValueError("image must be an RGB uint8 array [H, W, 3], as read_image() returns; got "
                         f"{getattr(image, 'dtype', type(image).__name__)} {getattr(image, 'shape', '')}")
    if not hasattr(model, "prediction_settings"):
        model.prediction_settings = prediction_settings(default_settings())
        warn(f"this model was not loaded by load_model(): using the script's constants {model.prediction_settings}")
    if any(module.training for module in model.modules()):  # not the model alone: another thread may be on its way
        model.eval()
    return segment(model, image)[0]


def segment(model: torch.nn.Module, image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """predict_mask() without its checks. Returns (mask uint8 [H, W], tumour probability float32 [H, W])."""
    size = model.prediction_settings["img_size"]
    # BGR turned into RGB is a view that torch refuses.
    small = np.ascontiguousarray(resize(preprocess(image), size, size))
    probability = predict_probability(model, small, *image.shape[:2])
    return binarize(probability, model.prediction_settings["threshold"]), probability


def binarize(probability: np.ndarray, threshold: float) -> np.ndarray:
    """Mask uint8 0/1: tumour is probability >= threshold, compared in float32."""
    return (probability >= np.float32(threshold)).astype(np.uint8)


def counts_per_threshold(probability: np.ndarray, mask: np.ndarray, thresholds: np.ndarray = THRESHOLDS) -> np.ndarray:
    """COUNTS at every threshold: int64 [T, 4], from float32 probabilities and a 0/1 mask of the same shape."""
    passed = np.searchsorted(thresholds.astype(np.float32), probability.ravel(), side="right")  # how many it reaches
    inside = mask.ravel() > 0
    tp, fp = (np.bincount(passed[part], minlength=len(thresholds) + 1)[::-1].cumsum()[::-1][1:]
              for part in (inside, ~inside))
    return np.stack([tp, fp, inside.sum() - tp, (~inside).sum() - fp], axis=-1)


def score_test_image(probability: np.ndarray, mask: np.ndarray, threshold: float) -> dict[str, float]:
    """All scores of one image at the annotation's resolution: a row of test_metrics.csv; and confident_px.

    Undefined ones are NaN, see CONVENTION.
    """
    prediction = binarize(probability, threshold)
    tensors = [torch.from_numpy(array)[None, None] for array in (probability, mask)]
    row = {name: float(value) for name, value in image_metrics(*tensors, threshold).items()}
    lesions = zip(("lesions", "lesions_found", "false_lesions"), count_lesions(prediction, mask))
    confident = float((probability >= CONFIDENT).sum())
    return row | {"hd95_px": hd95(prediction, mask), "confident_px": confident} | dict(lesions)


def evaluate_split(model: torch.nn.Module, dataset: BrainTumorDataset, score, name: str) -> list:
    """score(probability, mask) of every image, at the annotations' resolution."""
    def work(i):
        entry = dataset.entries[i]
        return score(predict_probability(model, dataset.sample(i)[0], entry.height, entry.width), entry.mask())

    most = 4 if next(model.parameters()).is_cuda else 16  # each thread has the activations of one image in memory
    return in_threads(work, range(len(dataset)), f"Scoring {name}", most)


def load_for_evaluation(cfg: Settings, checkpoint: Path, splits: dict[str, Split],
                        cache: PixelCache | None) -> tuple[torch.nn.Module, dict[str, BrainTumorDataset]]:
    """The model, and the splits as it has to see them."""
    model = load_model(checkpoint, cfg=cfg)
    settings = model.prediction_settings
    settings["test_time_augmentation"] = cfg.TEST_TIME_AUGMENTATION
    return model, {name: BrainTumorDataset(Path(cfg.DATA_DIR) / name, settings["img_size"], entries=split.entries,
                                           cache=cache, percentiles=settings["grey_percentiles"])
                   for name, split in splits.items()}


def choose_threshold(model: torch.nn.Module, valid: BrainTumorDataset) -> np.ndarray:
    """Give the model the threshold with the highest Dice on valid. Returns the Dice, a mean over images, at each."""
    counts = torch.from_numpy(np.stack(evaluate_split(model, valid, counts_per_threshold, "valid"))).double()
    dice = metrics_from_counts(*counts.unbind(-1))["dice"].nanmean(0).nan_to_num(0).numpy()
    equal = np.flatnonzero(dice >= dice.max() - 1e-12)
    chosen = min(equal, key=lambda i: abs(THRESHOLDS[i] - 0.5))  # of equally good ones the one closest to 0.5
    model.prediction_settings["threshold"] = float(THRESHOLDS[chosen])
    return dice


def score_splits(folder: Path, model: torch.nn.Module, datasets: dict[str, BrainTumorDataset],
                 dice: np.ndarray | None = None) -> dict[str, dict]:
    """Score all images of splits; write NAME_metrics.csv, _predictions.png and _report.png. Returns the splits' scores.

    The folder is made if it is not there. dice: of valid at THRESHOLDS, at the end of a run, which has pictures of test
    only.
    """
    score = functools.partial(score_test_image, threshold=model.prediction_settings["threshold"])
    rows = {name: evaluate_split(model, dataset, score, name) for name, dataset in datasets.items()}
    folder.mkdir(exist_ok=True)
    scores = {name: write_scores(folder, name, dataset.entries, rows[name]) for name, dataset in datasets.items()}
    for name, dataset in datasets.items():
        if dice is None or name == "test":
            plot_predictions(folder / f"{name}_predictions.png", model, dataset.entries, rows[name])
            sizes = np.array([entry.tumour_fraction for entry in dataset.entries])
            plot_report(folder / f"{name}_report.png", name, rows[name], sizes, scores[name],
                        model.prediction_settings["threshold"], dice)
    return scores


def write_scores(folder: Path, name: str, entries: list[ImageEntry], rows: list[dict[str, float]]) -> dict:
    """Write the scores of a split's images, of score_test_image(), as a table. Returns those of the whole split."""
    report_unannotated(name, entries, [row.pop("confident_px") for row in rows])
    known = {column: [getattr(entry, column) for entry in entries] for column in ("patient", "near_duplicate")}
    known = {column: texts for column, texts in known.items() if any(texts)}
    write_table(folder / f"{name}_metrics.csv", [
        {"file_name": entry.file_name} | {column: texts[i] for column, texts in known.items()}
        | {column: f"{value:.10g}" if math.isfinite(value) else "" for column, value in row.items()}
        for i, (entry, row) in enumerate(zip(entries, rows))])
    columns = {column: torch.tensor([row[column] for row in rows], dtype=torch.float64) for column in rows[0]}
    lesions = {column: int(columns.pop(column).sum()) for column in ("lesions", "lesions_found", "false_lesions")}
    leaks = [bool(entry.near_duplicate) for entry in entries]
    return {"images": len(rows)} | final_scores(columns, known.get("patient"), leaks) | lesions


def finish_run(cfg: Settings, splits: dict[str, Split], cache: PixelCache | None) -> None:
    """At the end of training: find the threshold on valid, score valid and test with it, and add all to the JSON."""
    output, checkpoint = Path(cfg.OUTPUT_DIR), Path(cfg.OUTPUT_DIR) / BEST
    splits = {name: splits[name] for name in ("valid", "test") if name in splits}
    model, datasets = load_for_evaluation(cfg, checkpoint, splits, cache)
    scores = score_splits(output, model, datasets, dice=choose_threshold(model, datasets["valid"]))
    metadata = model.metadata | model.prediction_settings
    threshold = metadata["threshold"]
    of_epoch = metadata.get("valid_metrics_at_img_size", {}).get("dice", 0)
    print_scores(scores, f"Threshold {threshold:.2f} gives the best Dice on valid. Valid has chosen it and the epoch: "
                 "its scores are a little\ntoo good, report those of test. The best validation Dice of the epochs "
                 f"({of_epoch:.4f}) is at {metadata['img_size']} px and threshold 0.5.")
    for name, found in scores.items():
        if splits[name].near_duplicates:
            both = [f"{found[row]:.3f}" for row in ("dice", "dice_without_near_duplicates") if row in found]
            log(f"  {NEAR_DUPLICATES.format(splits[name].near_duplicates, found['images'], name)}"
                f" (Dice {', without these images '.join(both)})")
    write_metadata(checkpoint, metadata | {f"{name}_metrics": found for name, found in scores.items()})
    if str(metadata.get("encoder_weights_from")).startswith("random ("):
        warn("this model started from RANDOM weights, because the ImageNet weights were not available: its scores are "
             "lower than they could be.")


def evaluate(cfg: Settings, checkpoint: Path, splits: dict[str, Split], cache: PixelCache | None) -> None:
    """Score a model, as it is, on the splits that there are: JSON, tables and pictures in OUTPUT_DIR/evaluation."""
    model, datasets = load_for_evaluation(cfg, checkpoint, splits, cache)
    log(describe_checkpoint(model, checkpoint))
    folder = unused(Path(cfg.OUTPUT_DIR) / "evaluation")
    scores = score_splits(folder, model, datasets)
    print_scores(scores, f"Scores of {cfg.DATA_DIR}.")
    settings = {name: model.prediction_settings[name] for name in ("threshold", "test_time_augmentation")}
    write_json(folder / "scores.json", {
        "data_dir": cfg.DATA_DIR, "checkpoint": os.path.abspath(checkpoint),
        "sha256": hashlib.sha256(checkpoint.read_bytes()).hexdigest(), **settings, "convention": CONVENTION,
        **{f"{name}_metrics": found for name, found in scores.items()}})
    log(f"Scores, tables and pictures: {folder}. The model is as it was.")


def describe_checkpoint(model: torch.nn.Module, checkpoint: Path) -> str:
    """A line that says which model is used, and whether its threshold is one."""
    unchosen = bool(model.metadata) and "valid_metrics" not in model.metadata
    return (f"Checkpoint {checkpoint}, threshold {model.prediction_settings['threshold']:.2f}"
            + ", which was never chosen, because its run has not ended (see --resume)" * unchosen
            + f", device {next(model.parameters()).device}")


def unused(path: Path) -> Path:
    """The first of PATH, PATH_2, PATH_3, ... that does not exist; the suffix, if there is one, stays at the end."""
    more = (path.with_stem(f"{path.stem}_{number}") for number in itertools.count(2))
    return next(path for path in itertools.chain([path], more) if not path.exists())


def report_unannotated(name: str, entries: list[ImageEntry], confident_px: list[float]) -> None:
    """Warn if the model is confident of a tumour in at least half of the images without annotation (five or more)."""
    empty = [(entry, pixels) for entry, pixels in zip(entries, confident_px) if not entry.annotated]
    found = [entry.file_name for entry, pixels in empty if pixels >= CONFIDENT_FRACTION * entry.height * entry.width]
    if len(empty) >= 5 and len(found) >= len(empty) / 2:
        warn(f"in {len(found)} of {len(empty)} images of {name} without annotation, a tumour is predicted with "
             "confidence.\nPerhaps nobody annotated them: the scores count these predictions as mistakes.\n"
             f"Look at {', '.join(found[:3])}, and see UNANNOTATED.")


# What a thesis needs, in this order; the other scores come below.
REPORTED = ("images", "dice", "dice_per_patient_mean", "iou", "precision", "recall", "specificity", "hd95_px",
            "lesions")


def print_scores(metrics: dict[str, dict], title: str) -> None:
    """Print the scores of splits side by side, under their names in the JSON; of the pooled ones only Dice."""
    def cell(scores, row):
        if row == "lesions":
            return "{lesions_found} of {lesions} found, {false_lesions} false".format(**scores)
        value, interval, count = scores.get(row, ""), scores.get(f"{row}_95_ci"), scores.get(f"{row}_n")
        return ((f"{value:.4f}" if isinstance(value, float) else str(value))
                + (" ({:.3f} to {:.3f})".format(*interval) if interval else "") + f" n={count}" * (count is not None))

    log(f"\n{title}\nScores are at the original resolution, means over images, in brackets 95 % confidence intervals. "
        "n: how many have that\nscore, where not all have; without tumour, annotated or predicted, there is no Dice; a "
        "false alarm where no tumour is\nhas Dice 0. To be reported are the lines above the gap.")
    log(" " * 31 + "".join(name.ljust(32) for name in metrics).rstrip())
    names = dict.fromkeys(row for scores in metrics.values() for row in scores
                          if row == "pooled_dice" or not re.search("_95_ci$|_n$|^pooled_|lesions_found|false_les", row))
    for row in [*(row for row in REPORTED if row in names), "", *(row for row in names if row not in REPORTED)]:
        log(f"  {row:29}{''.join(cell(scores, row).ljust(32) for scores in metrics.values())}".rstrip())
    for name, found in metrics.items():
        if "dice_with_tumour" not in found:
            log(f"  No image of {name} has a tumour, and " + (
                "its Dice only counts false alarms." if "dice" in found else "none is predicted: there is no Dice."))
    if not any("dice_per_patient_mean" in found for found in metrics.values()):
        log("  The intervals are too narrow if several images come from one patient: see PATIENT_PATTERN.")


def label_finding(probability: np.ndarray, mask: np.ndarray, threshold: float) -> dict:
    """Where the model contradicts an annotation most: kind, dice (of the image), size_px, confidence; if nowhere, dice.

    Either a predicted tumour that touches no annotated one, an annotated one that touches no predicted one, or, of all
    that touch, outlines with a Dice below HARDLY_OVERLAP. confidence, 0..1: |probability - mask| where prediction and
    mask differ, and 0 where they agree, as a mean over the pixels of these tumours; size_px is the number of them.
    """
    prediction = binarize(probability, threshold)
    total = int(prediction.sum() + mask.sum())
    dice = round(2 * int((prediction & mask).sum()) / total, 4) if total else math.nan
    difference, rest, findings = np.where(prediction == mask, 0, np.abs(probability - mask)), prediction | mask, []
    for kind, tumours, others in zip(LABEL_FINDINGS, (prediction, mask), (mask, prediction)):
        count, places = cv2.connectedComponents(tumours)
        for number in set(range(1, count)) - set(np.unique(places[others > 0])):
            findings.append((kind, places == number))
            rest[places == number] = 0
    if rest.any() and 2 * (prediction & mask).sum() < HARDLY_OVERLAP * (prediction + mask)[rest > 0].sum():
        findings.append((LABEL_FINDINGS[2], rest > 0))
    if not findings:
        return {"dice": dice}
    kind, where = max(findings, key=lambda finding: difference[finding[1]].mean())
    return {"kind": kind, "dice": dice, "size_px": int(where.sum()),
            "confidence": round(float(difference[where].mean()), 4)}


def check_labels(cfg: Settings, checkpoint: Path, splits: dict[str, Split], cache: PixelCache | None) -> None:
    """List the annotations that the model contradicts, by confidence * (1 - Dice), for somebody to look at.

    A model has seen the annotations of train: where it contradicts one of them all the same, that counts more. A weak
    model mostly lists its own mistakes, which is said. Images without annotation are looked at, too.
    """
    model, datasets = load_for_evaluation(cfg, checkpoint, splits, cache)
    log(describe_checkpoint(model, checkpoint))
    table, picture = (Path(cfg.OUTPUT_DIR) / name for name in LABEL_CHECK)
    for path in (table, picture):  # of an earlier check
        path.unlink(missing_ok=True)
    look, rows, dice = functools.partial(label_finding, threshold=model.prediction_settings["threshold"]), [], []
    for name, dataset in datasets.items():
        for entry, finding in zip(dataset.entries, evaluate_split(model, dataset, look, name)):
            dice += [finding["dice"]] if entry.annotated else []
            if "kind" in finding:
                finding |= {} if entry.annotated else {"kind": "tumour in an image without annotation"}
                rows.append(({"split": name, "file_name": entry.file_name} | finding, entry))
    rows.sort(key=lambda row: -row[0]["confidence"] * (1 - row[0]["dice"]))
    mean = mean_score("dice", torch.tensor(dice)).get("dice", math.nan)
    log(f"\nOn the {plural(len(dice), 'annotated image')} the model has "
        + ("no Dice." if math.isnan(mean) else f"a Dice of {mean:.2f}."))
    if rows and not mean >= WEAK_MODEL:
        log("Most of what follows are probably its own mistakes: train it longer, or on more images, before you change "
            "annotations.")
    kinds = Counter(row["kind"] for row, _ in rows).most_common()
    log(f"The model contradicts {', '.join(f'{count} x {kind}' for kind, count in kinds) or 'no annotation'}.")
    if rows:
        write_table(table, [row for row, _ in rows], required=True)
        cases = [(entry, f"{number}. {row['split']}", textwrap.fill(row["kind"], 17)
                  + f"\n{row['size_px']} px\nconfidence {row['confidence']:.2f}")
                 for number, (row, entry) in enumerate(rows[:2 * COLUMNS], 1)]
        plot_cases(picture, model, cases, "Annotations that the model contradicts")
        log(f"All of them are in {table.name}, the most suspicious first; {picture.name} shows the first {len(cases)}."
            + "\nLook at them, correct the annotations that are wrong, and train again." * (mean >= WEAK_MODEL))


def find_images(sources: list[str]) -> list[tuple[Path, str]]:
    """Image files, and all images of folders but masks and overlays, as their names tell. Prints what is left out.

    Returns (path, name for its results) of each. In the name the folders below the source are kept, as annotation tools
    keep them: P002/slice_01.png becomes P002_slice_01.png.
    """
    files, left_out = [], Counter()
    for source in map(Path, sources):
        if not os.path.lexists(source):
            raise TrainerError(f"no such file or folder: {source}")
        if not source.is_dir():
            files.append((source, source.name))
            continue
        of_source = [source.resolve().name] * (len(sources) > 1)  # one folder for each patient, perhaps
        for path in list_files(source):
            if is_mask_file(path) or re.search(r"(^|/)overlays/|_overlay\.\w+$", path.as_posix(), re.IGNORECASE):
                left_out["named like a mask or an overlay"] += 1
            elif path.suffix.lower() in IMAGE_SUFFIXES:
                files.append((source / path, "_".join([*of_source, *path.parts])))
            else:
                left_out[f"named *{path.suffix.lower()}" if path.suffix else "without suffix"] += 1
    for kind, count in left_out.items():
        log(f"Left out: {plural(count, 'file')} {kind}")
    if not files:
        raise TrainerError(f"no images found in {', '.join(sources)} (looked for {', '.join(sorted(IMAGE_SUFFIXES))})")
    return files


def coco_annotations(mask: np.ndarray) -> list[dict]:
    """COCO annotations of the tumours (8-connected) in a uint8 0/1 mask [H, W], which draw the same mask again.

    Polygons run along the corners of pixels: contours of the mask enlarged twice, mapped to corners. Where that is not
    exact, as around holes, an RLE.
    """
    _, places, boxes, _ = cv2.connectedComponentsWithStats(mask)
    annotations = []
    for number, (x, y, width, height, area) in enumerate(boxes[1:].tolist(), 1):
        tumour = (places[y:y + height, x:x + width] == number).astype(np.uint8)  # all work is done within its box
        double = cv2.resize(tumour, None, fx=2, fy=2, interpolation=cv2.INTER_NEAREST)
        contours = cv2.findContours(double, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)[0]
        corners = [(contour.reshape(-1, 2) + 1) // 2 for contour in contours]
        drawn = coco_mask.frPyObjects([xy.ravel().tolist() for xy in corners], height, width)
        outline = [(xy + (x, y)).ravel().tolist() for xy in corners]
        if not np.array_equal(coco_mask.decode(coco_mask.merge(drawn)), tumour):
            rle = coco_mask.encode(np.asfortranarray(places == number, np.uint8))
            outline = {"size": list(mask.shape), "counts": rle["counts"].decode()}
        annotations.append({"segmentation": outline, "area": area, "iscrowd": 0, "category_id": 1,
                            "bbox": [x, y, width, height]})
    return annotations


def predict_files(cfg: Settings, checkpoint: Path, sources: list[str]) -> None:
    """Segment image files, and all images of folders, into a new folder OUTPUT_DIR/predictions.

    It holds images/, masks/ (0 or 255), overlays/, predictions.csv, and the outlines as a COCO file, to be corrected in
    an annotation tool and trained on. A file that cannot be read, or whose results cannot be written, does not end the
    others; TrainerError lists them at the end.
    """
    files, model = find_images(sources), load_model(checkpoint, cfg=cfg)
    model.prediction_settings["test_time_augmentation"] = cfg.TEST_TIME_AUGMENTATION
    folder = unused(Path(cfg.OUTPUT_DIR) / "predictions")
    for name in PREDICTED:
        (folder / name).mkdir(parents=True)
    log(describe_checkpoint(model, checkpoint))
    coco = {"images": [], "annotations": [], "categories": [{"id": 1, "name": "tumour"}]}
    bad, rows = [], []
    try:
        for path, name in progress(files, "Predicting"):
            try:
                predict_file(model, path, name, folder, coco, rows)
            except (TrainerError, OSError) as error:
                bad.append(str(error))
    finally:  # also of what was done before Ctrl-C
        if rows:
            write_table(folder / "predictions.csv", rows, required=True)
        write_json(folder / ANNOTATION_FILE, coco, indent=None)
        log(f"{len(rows)} of {plural(len(files), 'image')} segmented: {folder}\nMasks are in masks/, pictures to look "
            "at in overlays/, sizes of tumours in predictions.csv.")
    if bad:
        raise TrainerError(f"{len(bad)} of {plural(len(files), 'file')} failed:{bullet_list(bad)}")


def predict_file(model: torch.nn.Module, path: Path, name: str, folder: Path, coco: dict, rows: list[dict]) -> None:
    """Segment one image into the folders of predict_files(), and add it to its COCO file and table.

    name: see find_images(). Raises TrainerError or OSError.
    """
    if not is_unicode(f"{path}{name}"):  # annotation tools could not read the COCO file
        raise TrainerError(f"{path}: its name, or that of a folder above it, is not Unicode; rename it")
    image = read_image(path, percentiles=model.prediction_settings["grey_percentiles"])
    mask, probability = segment(model, image)
    stem = Path(name).stem.encode()[:200].decode(errors="ignore")  # names may have 255 bytes
    mask_file = unused(folder / "masks" / f"{stem}.png")
    write_image(mask_file, mask * 255)
    write_image(folder / "overlays" / mask_file.name, draw_overlay(image, mask))
    copied = folder / "images" / f"{mask_file.stem}{path.suffix}"
    shutil.copyfile(path, copied)
    found, number = coco_annotations(mask), len(coco["images"]) + 1  # ids start at 1: COCOeval takes 0 for none
    coco["images"].append({"id": number, "file_name": copied.name, "height": mask.shape[0], "width": mask.shape[1]})
    coco["annotations"] += [{"id": identity, "image_id": number} | annotation
                            for identity, annotation in enumerate(found, len(coco["annotations"]) + 1)]
    inside = f"{probability[mask > 0].mean():.4f}" if found else ""
    rows.append({"file": str(path), "mask": f"masks/{mask_file.name}", "width": mask.shape[1], "height": mask.shape[0],
                 "tumour_px": int(mask.sum()), "tumour_fraction": f"{mask.mean():.6f}", "tumours": len(found),
                 "mean_probability": inside})


# ===== Pictures =======================================================================================================

# Colours that colour-blind readers can tell apart (Okabe and Ito 2008).
ANNOTATED, PREDICTED_COLOUR, MISSED = (0, 158, 115), (214, 39, 160), (240, 200, 40)  # teal, magenta, yellow
CJK_FONTS = ("Microsoft JhengHei", "Noto Sans CJK TC", "PingFang TC", "Microsoft YaHei", "Noto Sans CJK SC")
SMALLEST_PICTURE = 400  # pixels; smaller images are enlarged before outlines are drawn on them


def draw_outlines(image: np.ndarray, masks: dict[tuple, np.ndarray], smallest: int = SMALLEST_PICTURE) -> np.ndarray:
    """A copy of the image [H, W, 3], enlarged if it is small, with masks [H, W] outlined, by colour."""
    times = max(1, math.ceil(smallest / max(image.shape)))
    height, width = times * image.shape[0], times * image.shape[1]
    out = resize(image, height, width).copy()
    for colour, mask in masks.items():
        large = cv2.resize(mask, (width, height), interpolation=cv2.INTER_NEAREST)
        contours = cv2.findContours(large, cv2.RETR_LIST, cv2.CHAIN_APPROX_NONE)[0]
        cv2.drawContours(out, contours, -1, colour, max(1, round(max(height, width) / 250)))
    return out


def draw_overlay(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """A copy of the image [H, W, 3], of the same size, with the mask [H, W] tinted and outlined."""
    out = image.copy()
    out[mask > 0] = 0.7 * out[mask > 0] + 0.3 * np.array(PREDICTED_COLOUR)
    return draw_outlines(out, {PREDICTED_COLOUR: mask}, smallest=1)


def draw_errors(image: np.ndarray, mask: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """The image [H, W, 3] in dark grey; on it what a mask [H, W] has found, missed, and what it has found wrongly."""
    out = np.dstack([cv2.cvtColor(image, cv2.COLOR_RGB2GRAY) // 2] * 3)
    for colour, where in ((ANNOTATED, mask & truth), (MISSED, truth & ~mask), (PREDICTED_COLOUR, mask & ~truth)):
        out[where > 0] = colour
    return out


@functools.cache
def font_families() -> list[str]:
    """An installed font with Chinese letters, if there is one, after the usual one."""
    installed = {font.name for font in matplotlib.font_manager.fontManager.ttflist}
    return ["DejaVu Sans", *[name for name in CJK_FONTS if name in installed][:1]]


PAGE = 6.3  # inches: 16 cm, the width of a text column
COLUMNS = 6  # pictures beside each other; 17 letters fit above and below each
PRINT = matplotlib.rc_context({  # for figures on such a page: no letters below 7 points
    "font.size": 7, "axes.titlesize": 8, "figure.titlesize": 8, "legend.fontsize": 7, "xtick.labelsize": 7,
    "ytick.labelsize": 7, "axes.linewidth": 0.6, "lines.linewidth": 1, "lines.markersize": 4, "axes.grid": True,
    "grid.alpha": 0.3, "legend.handlelength": 1.2, "legend.borderpad": 0.3, "legend.labelspacing": 0.3,
    "text.parse_math": False})  # file names may have two $


def shortened(file_name: str, room: int = 17) -> str:
    """The end of a file name, without its suffix, as far as there is room for it above a picture, in letters."""
    def width(text):
        return sum(1.8 if unicodedata.east_asian_width(letter) in "WF" else 1 for letter in text)  # Chinese ones

    stem = Path(file_name).stem
    ends = [stem, *(f"...{stem[start:]}" for start in range(1, len(stem) + 1))]
    return next(end for end in ends if width(end) <= room)


def save_figure(path: Path, figure: Figure, vector: bool = False) -> None:
    """Write a figure as PNG, in a resolution that can be printed, and, if asked for, as PDF beside it."""
    for kind in ("png", "pdf")[:1 + vector]:
        write_file(path.with_suffix(f".{kind}"), lambda file, kind=kind: figure.savefig(file, format=kind, dpi=300))


@PRINT
def plot_grid(path: Path, cases: list[tuple[list[np.ndarray], str, str]], names: tuple[str, ...], title: str,
              colours: dict[str, tuple]) -> None:
    """A column for each case (pictures RGB uint8 [H, W, 3] one below the other, text above, text below), in blocks.

    names: of the pictures of a case. colours: of the legend, by name. All is placed by hand, in inches: text never
    touches a picture, and there are no gaps.
    """
    columns, fonts, line, gap, left = min(COLUMNS, len(cases)), font_families(), 8.6 / 72, 0.05, 0.3
    side = min(1.6, (PAGE - left) / columns - gap)  # of the box of a picture
    shapes = [picture.shape for pictures, _, _ in cases for picture in pictures]
    height = side * min(1.5, max(shape[0] / shape[1] for shape in shapes))
    above, below = (line * max(len(case[place].splitlines()) for case in cases) for place in (1, 2))
    block = 0.5 * line + above + len(names) * (height + gap) + below
    width = max(left + columns * (side + gap), 3.2)
    left += (width - left - columns * (side + gap)) / 2
    rows = 1 if width > 5 else len(colours)  # of the legend
    total = 1.2 * line + math.ceil(len(cases) / columns) * block + (1.5 * rows + 1) * line
    figure = Figure(figsize=(width, total))
    for number, (pictures, label, caption) in enumerate(cases):
        place, column = divmod(number, columns)
        for row, picture in enumerate(pictures):
            x = left + column * (side + gap)
            y = total - 1.7 * line - place * block - above - row * (height + gap) - height
            axis = figure.add_axes((x / width, y / total, side / width, height / total), facecolor="0.93")
            axis.imshow(picture)
            axis.set(xticks=[], yticks=[], adjustable="datalim")  # the box stays as it is, whatever the picture's shape
            axis.spines[:].set_visible(False)
            axis.set_ylabel("" if column else names[row], labelpad=2)
        axis.set_xlabel(caption, labelpad=2)
        figure.axes[-len(names)].set_title(label if len(fonts) > 1 else label.encode("ascii", "replace").decode(),
                                           fontsize=7, pad=2, fontfamily=fonts)
    figure.suptitle(title, y=1 - line / 4 / total, va="top")
    handles = [Line2D([], [], color=np.array(rgb) / 255, linewidth=4, label=name) for name, rgb in colours.items()]
    figure.legend(handles=handles, loc="lower center", ncols=math.ceil(len(handles) / rows), frameon=False)
    save_figure(path, figure)


def plot_samples(path: Path, dataset: BrainTumorDataset) -> None:
    """Training images, masks outlined: below each one as loaded the same one as the network may see it."""
    # Images with a tumour first: their outlines show whether masks lie where they should. The prime shuffles.
    order = sorted(range(len(dataset)), key=lambda i: (dataset.entries[i].rle is None, i * 7919 % len(dataset)))
    cases = [([draw_outlines(image, {ANNOTATED: mask}) for image, mask in (dataset.sample(i), dataset[(0, i)])],
              shortened(dataset.entries[i].file_name), "") for i in order[:2 * COLUMNS]]
    plot_grid(path, cases, ("as loaded", "augmented"), "Training images as the network sees them",
              {"annotation": ANNOTATED})


@PRINT
def plot_history(path: Path, history: list[dict], images: int, vector: bool = False) -> None:
    """Losses, validation Dice and IoU, and learning rate over the epochs. images: how many validation has.

    vector: see save_figure().
    """
    epochs, best = [row["epoch"] for row in history], max(history, key=lambda row: row.get("dice", 0))
    figure = Figure(figsize=(PAGE, 2.3), layout="constrained")
    loss, scores, rate = figure.subplots(1, 3)
    marker = "." if len(history) < 30 else None
    for axis, key, label in ((loss, "train_loss", "training"), (loss, "valid_loss", "validation"),
                             (scores, "dice", "Dice"), (scores, "iou", "IoU"), (rate, "lr", None)):
        axis.plot(epochs, [row.get(key, math.nan) for row in history], marker=marker, label=label,
                  drawstyle="steps-post" if axis is rate else "default")
    for axis in (loss, scores, rate):
        axis.axvline(best["epoch"], color="gray", linestyle="--", linewidth=1,
                     label=f"best: epoch {best['epoch']} ({best.get('dice', 0):.3f})" if axis is scores else None)
        axis.set_xlabel("epoch")
        axis.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    rates = [row["lr"] for row in history]
    # The rate of an epoch is that of its last step: where it grows from the first epoch on, that is the warm-up.
    warm = next((i for i in range(len(rates) - 1) if rates[i + 1] <= rates[i]), 0)
    if warm:
        rate.axvspan(epochs[0], epochs[warm], color="0.9", label="warm-up")
        rate.legend()
    steps = sorted({*rates[warm:]})
    if len(steps) < 8 and min(rates) > 0:
        rate.set_yscale("log")
        rate.set_yticks(steps, [f"{step:.1e}" for step in steps])
        rate.minorticks_off()
    else:  # a curve
        rate.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    loss.set(title="Loss", ylabel="mean over images")
    scores.set(title=f"Validation, {plural(images, 'image')}", ylabel="mean over images", ylim=(0, 1))
    rate.set(title="Learning rate", ylabel="of the last group of weights")
    loss.legend()
    scores.legend()
    save_figure(path, figure, vector)


@PRINT
def plot_report(path: Path, name: str, rows: list[dict], sizes: np.ndarray, scores: dict, threshold: float,
                dice: np.ndarray | None = None) -> None:
    """Of a split, the distribution of Dice and Dice against tumour size; of valid, Dice against the threshold.

    rows, scores, dice: see score_splits(). sizes: fraction of each image that is tumour. At the end of a run, with the
    Dice of valid, also a PDF.
    """
    panels = 2 if dice is None else 3
    figure = Figure(figsize=(PAGE * panels / 3, 2.3), layout="constrained")
    found = np.array([row["dice"] for row in rows])
    histogram, size, *curve = figure.subplots(1, panels)
    tumour, alarm = sizes > 0, (sizes == 0) & np.isfinite(found)
    histogram.hist([found[tumour], found[alarm]], np.linspace(0, 1, 21), stacked=True, color=["tab:blue", "silver"],
                   label=[f"with tumour ({tumour.sum()})", f"false alarm ({alarm.sum()} of {(~tumour).sum()})"])
    label = "Dice"
    if "dice" in scores:
        label += f", mean {scores['dice']:.3f}"
        histogram.axvline(scores["dice"], color="tab:red")
    if "dice_95_ci" in scores:
        label += " ({:.3f} to {:.3f})".format(*scores["dice_95_ci"])
        histogram.axvspan(*scores["dice_95_ci"], color="tab:red", alpha=0.2, linewidth=0)
    histogram.yaxis.get_major_locator().set_params(integer=True)
    histogram.set(title=f"{name}: Dice of {plural(len(rows), 'image')}", xlabel=label, ylabel="images", xlim=(0, 1))
    histogram.legend()
    size.plot(100 * sizes[tumour], found[tumour], ".", alpha=0.6)
    size.set(title=f"{name}: Dice and tumour size", xlabel="tumour, % of the image (log)", ylabel="Dice",
             ylim=(-0.03, 1.03))
    if tumour.any():
        size.set_xscale("log")
        size.xaxis.set_minor_locator(matplotlib.ticker.LogLocator(subs=(2, 5)))  # more labels would overlap
        size.xaxis.set_minor_formatter("{x:g}")
        size.xaxis.set_major_formatter("{x:g}")
    for axis in curve:
        axis.plot(THRESHOLDS, dice, marker=".")
        axis.axvline(threshold, color="gray", linestyle="--", label=f"chosen: {threshold:.2f}")
        axis.set(title="valid: Dice and threshold", xlabel="threshold", ylabel="mean Dice", xlim=(0, 1), ylim=(0, 1))
        axis.legend()
    save_figure(path, figure, vector=bool(curve))


def case_caption(row: dict[str, float]) -> str:
    """What stands below an image, from its scores, see score_test_image()."""
    if row["lesions"] == 0:
        return f"no tumour:\n{'false positive' if row['false_positive_px'] else 'correct'}"
    found = "HD95 {hd95_px:.0f} px" if math.isfinite(row["hd95_px"]) else "not found"
    return ("Dice {dice:.2f}\nIoU {iou:.2f}\n" + found).format(**row)


def plot_predictions(path: Path, model: torch.nn.Module, entries: list[ImageEntry], rows: list[dict], each: int = 2):
    """Best, median and worst of the images that have a Dice. rows: of score_test_image() for the entries."""
    with_dice = [i for i, row in enumerate(rows) if math.isfinite(row["dice"])]
    order = sorted(with_dice, key=lambda i: -rows[i]["dice"]) or [*range(len(rows))][:each]
    middle = max(0, len(order) // 2 - each // 2)
    parts = {"median": order[middle:middle + each], "worst": order[-each:], "best": order[:each]}
    cases = {i: label for label, part in parts.items() for i in part}  # of several, the last one, where there are few
    plot_cases(path, model, [(entries[i], cases[i], case_caption(rows[i])) for i in order if i in cases],
               "Best, median and worst images")


def plot_cases(path: Path, model: torch.nn.Module, cases: list[tuple[ImageEntry, str, str]], title: str) -> None:
    """A column for each case (entry, label above its name, caption below): image, outlines, errors."""
    columns = []
    for entry, label, caption in cases:
        truth = entry.mask()
        image = resize(read_image(entry.path, model.prediction_settings["grey_percentiles"]), *truth.shape)
        mask = segment(model, image)[0]
        outlines = draw_outlines(image, {ANNOTATED: truth, PREDICTED_COLOUR: mask})
        columns.append(([image, outlines, draw_errors(image, mask, truth)], f"{label}\n{shortened(entry.file_name)}",
                        caption))
    plot_grid(path, columns, ("image", "outlines", "errors"), title, {
        "annotation (in errors: found)": ANNOTATED, "prediction (in errors: false positive)": PREDICTED_COLOUR,
        "missed": MISSED})


# ===== Plumbing: command line =========================================================================================

def at_least(least: int | float) -> tuple:
    """A rule for a number: in words, and as a test. Where the least value is an int, only whole numbers are legal."""
    return (f"a {'whole ' * isinstance(least, int)}number, {least} or more",
            lambda value: least <= value < 2**63 and type(value) in (int, type(least)))


NAMES = {"UNANNOTATED": ("tumour-free", "skip"), "ARCHITECTURE": smp.MODEL_ARCHITECTURES_MAPPING, "LOSS": LOSSES,
         "PRECISION": ("auto", "float32", "bfloat16", "float16"), "ENCODER": smp.encoders.get_encoder_names()}
# Settings that are a model's own, and in its JSON under the same names in small letters.
DECIDED = ("IMG_SIZE", "MEAN", "STD", "GREY_PERCENTILES", "ENCODER", "ARCHITECTURE", "TEST_TIME_AUGMENTATION")
# What a setting must satisfy, in words and as a test.
RULES = {name: (f"one of {', '.join(names)}", names.__contains__) for name, names in NAMES.items()} | dict.fromkeys(
    ("SKIP_BAD_IMAGES", "TEST_TIME_AUGMENTATION", "COMPILE", "DETERMINISTIC"),
    ("True or False", lambda v: isinstance(v, bool))) | {
    "CATEGORIES": ("a tuple of names (one name needs a comma behind it)",
                   lambda v: isinstance(v, tuple) and all(isinstance(name, str) for name in v)),
    "PATIENT_PATTERN": (r"None, or a regular expression with brackets around the patient, as in (P\d+)",
                        lambda v: v is None or re.compile(v).groups == 1),
    "VALID_SHARE": ("above 0, and at most 0.5", lambda v: 0 < v <= 0.5),
    "FOLD": at_least(0), "TEST_SHARE": ("from 0 to 0.5", lambda v: 0 <= v <= 0.5),
    "CACHE_GB": at_least(0.0), "SAVE_SECONDS": at_least(0.0),
    "GREY_PERCENTILES": ("two numbers from 0 to 100, the smaller one first",
                         lambda v: len(v) == 2 and 0 <= v[0] < v[1] <= 100),
    "IMG_SIZE": ("a multiple of 32, from 64 to 4096", lambda v: type(v) is int and v in range(64, 4097, 32)),
    "BATCH_SIZE": ("a whole number, 1 or more, and at least the number of processes",
                   lambda v: type(v) is int and max(1, int(os.environ.get("WORLD_SIZE", 1))) <= v < 2**63),
    "NUM_WORKERS": at_least(0),
    "MEAN": ("three numbers", lambda v: len(v) == 3 and all(map(math.isfinite, v))),
    "STD": ("three numbers above 0", lambda v: len(v) == 3 and all(0 < x < math.inf for x in v)),
    "ENCODER": ("an encoder of segmentation_models_pytorch",
                lambda v: v in NAMES["ENCODER"] or v.startswith("tu-")),
    "EPOCHS": at_least(1),
    "LR": ("a number above 0", lambda v: 0 < v < math.inf),
    "LR_FROM_SCRATCH": ("a number above 0", lambda v: 0 < v < math.inf),
    "WARMUP_STEPS": at_least(0), "WEIGHT_DECAY": at_least(0.0),
    "ACCUMULATION_STEPS": at_least(1), "GRAD_CLIP": at_least(0.0), "EMA_EPOCHS": at_least(0.0),
    "PLATEAU_FACTOR": ("between 0 and 1", lambda v: 0 < v < 1),
    "PLATEAU_PATIENCE": at_least(0), "EARLY_STOPPING_PATIENCE": at_least(0), "SEED": at_least(0),
    "DEVICE": ("auto, cpu, or cuda or cuda:N if PyTorch sees that GPU, and one for each process of torchrun "
               "(README.md, 'GPU'; --device cpu always works)",
               lambda v: (device := find_device(v)).type == "cpu" or device.type == "cuda" and (
                   device.index or 0) < torch.cuda.device_count() >= int(os.environ.get("LOCAL_WORLD_SIZE", 1))),
    # These two are needed by a new run only.
    "ENCODER_WEIGHTS": ('"imagenet", None or an existing file', lambda v: v in (None, "imagenet") or Path(v).is_file()),
    "INIT_WEIGHTS": ("None or an existing file", lambda v: v is None or Path(v).is_file()),
}


def default_settings() -> Settings:
    """The constants, as they are now; lists as tuples and paths as text, which can be saved with the run."""
    values = {name: globals()[name] for name in CONSTANTS}
    plain = {list: tuple, type(Path()): str}
    return Settings(**{name: plain.get(type(value), lambda same: same)(value) for name, value in values.items()})


def settings_in_file() -> dict:
    """The constants as the file has them; None for the script's folder, which is no edit where that has moved."""
    folder = str(Path(__file__).resolve().parent)
    return {name: None if value == folder else value for name, value in vars(default_settings()).items()}


def flag_name(constant: str) -> str:
    """IMG_SIZE -> --img-size."""
    return "--" + constant.lower().replace("_", "-")


def did_you_mean(word, known) -> str:
    """A sentence that names the known word which is most like a mistyped one, or nothing."""
    close = difflib.get_close_matches(str(word), list(known), n=1)
    return f" Did you mean {close[0]}?" if close else ""


def comments() -> dict[str, dict[str, str]]:
    """The comments of the constants at the top of this file, by block and name, for --help."""
    blocks, block = {}, {}
    for line in Path(__file__).read_text(encoding="utf-8").split("# ===== ")[1].splitlines():
        if line.startswith("# --- "):
            block = blocks.setdefault(line[6:], {})
        elif (match := re.match(r"(\w+) = .*?(?:  # (.*))?$", line)) and match[1] in CONSTANTS:
            block[match[1]] = match[2] or ""
        elif re.match(r"#\s{3}", line) and block:
            block[[*block][-1]] += " " + line.strip("# ")  # the last comment goes on
    return blocks


def build_parser() -> argparse.ArgumentParser:
    """One flag for each mode, and one for each constant, of the type of its value. Errors raise TrainerError."""
    def fail(message):
        if re.search(r"kernel\S*\.json", message):  # what a notebook's process was started with
            message = 'in a notebook call main([]), or with settings main(["--epochs", "5"])'
        flag = re.search(r"unrecognized arguments: (--[\w-]+)", message)
        known = [word for action in parser._actions for word in action.option_strings]
        raise TrainerError(f"{message}{'.' + did_you_mean(flag[1], known) if flag else ''} (--help lists the options)")

    def text(word):
        return None if word.lower() == "none" else word

    def number(word):
        return int(word) if re.fullmatch(r"[+-]?\d+", word) else float(word)

    parser = argparse.ArgumentParser(
        usage="%(prog)s [--resume | --audit | --evaluate | --check-labels | --predict PATH ...] [--SETTING VALUE ...]",
        description=__doc__.split("\n\n")[0], epilog=f"losses: {', '.join(LOSSES)}", allow_abbrev=False)
    parser.error = fail  # one sentence, as for every other error, instead of the whole usage
    group = parser.add_argument_group("what to do (default: train)").add_mutually_exclusive_group()
    group.add_argument("--resume", action="store_true", help="continue the interrupted run in OUTPUT_DIR")
    group.add_argument("--audit", action="store_true", help="check the data, print what was found, and stop")
    group.add_argument("--evaluate", action="store_true", help="score the best model, as it is, on DATA_DIR")
    group.add_argument("--check-labels", action="store_true", help="list annotations that the best model contradicts")
    group.add_argument("--predict", nargs="+", metavar="PATH", help="segment image files, or all images of folders")
    parser.add_argument("--checkpoint", metavar="FILE",
                        help="model for --evaluate, --check-labels and --predict [that in OUTPUT_DIR]")
    blocks = comments()
    missing = [name for name in CONSTANTS if not any(name in block for block in blocks.values())]
    for title, block in [*blocks.items(), ("more settings", dict.fromkeys(missing, ""))]:
        group = parser.add_argument_group(title)
        for name, comment in block.items():
            value, more = globals()[name], {}
            if isinstance(value, bool):
                more = {"action": argparse.BooleanOptionalAction}
            elif isinstance(value, (tuple, list)):
                more = {"nargs": "*", "type": number if value and not isinstance(value[0], str) else str}
            else:
                more = {"type": text if value is None or isinstance(value, str) else number}
            if not isinstance(value, bool):
                more["metavar"] = "NUMBER" if more["type"] is number else "TEXT"
            shown = " ".join(map(str, value)) if isinstance(value, (tuple, list)) else value
            group.add_argument(flag_name(name), dest=name, default=argparse.SUPPRESS,
                               help=f"{comment} [{shown}]".replace("%", "%%"), **more)
    return parser


def read_settings(argv: list[str] | None) -> tuple[Settings, argparse.Namespace]:
    """Merge the command line (default: sys.argv[1:]) into the constants.

    Returns (cfg, mode): cfg holds every constant under its own name; mode says what to do (train if nothing is set).
    Raises TrainerError for an unknown flag, a wrong type or an impossible value.
    """
    parser = build_parser()
    mode = parser.parse_args(argv)
    given = {name: tuple(value) if isinstance(value, list) else value
             for name, value in vars(mode).items() if name in CONSTANTS}
    if "LR" in given and "LR_FROM_SCRATCH" in CONSTANTS:  # the user's choice is for all weights
        given.setdefault("LR_FROM_SCRATCH", given["LR"])
    cfg = Settings(**vars(default_settings()) | given)
    for name in ("DATA_DIR", "OUTPUT_DIR", "ENCODER_WEIGHTS", "INIT_WEIGHTS"):
        if isinstance(getattr(cfg, name), str):
            setattr(cfg, name, os.path.expanduser(getattr(cfg, name)))  # --output-dir=~/x is not expanded by shells
    if cfg.DATA_DIR:
        cfg.DATA_DIR = os.path.abspath(cfg.DATA_DIR)  # a run may be resumed from another working directory
    if mode.checkpoint and not (mode.evaluate or mode.check_labels or mode.predict):
        parser.error("--checkpoint goes with --evaluate, --check-labels and --predict; to train on from a model, set "
                     "INIT_WEIGHTS")
    if mode.resume:
        resume_settings(cfg, given, read_state(Path(cfg.OUTPUT_DIR))["settings"])
    check_settings(cfg, mode)
    return cfg, mode


def resume_settings(cfg: Settings, given: dict, saved: dict) -> None:
    """Merge the settings of a saved run into cfg, so that --resume --output-dir FOLDER is enough.

    given: the flags of this command. saved: "used", the settings of the run, and "file", the constants as they were in
    the file then. A flag counts, and a constant that was edited in the file since; otherwise what was used stays.
    OUTPUT_DIR is this command's. Raises TrainerError if one has changed that must not.
    """
    file, changed = settings_in_file(), []
    chosen = {"OUTPUT_DIR", *given, *(name for name in file if file[name] != saved["file"].get(name, file[name]))}
    for name, value in vars(cfg).items():
        used = saved["used"].get(name, file[name])  # a constant that is newer than the run counts as unchanged
        if name in chosen:
            if value != used and name not in RESUME_MAY_CHANGE:
                changed.append(f"{name}: saved {used!r}, now {value!r}")
        else:
            setattr(cfg, name, data_dir_of_run(used, value) if name == "DATA_DIR" else used)
    images = saved["used"]["BATCH_SIZE"] * saved["used"]["ACCUMULATION_STEPS"]
    if "ACCUMULATION_STEPS" not in chosen:  # a BATCH_SIZE alone, perhaps of the command before memory ran out
        fitting = (steps for steps in range(1, images + 1) if cfg.BATCH_SIZE * steps == images)
        cfg.ACCUMULATION_STEPS = next(fitting, cfg.ACCUMULATION_STEPS)
    if (now := cfg.BATCH_SIZE * cfg.ACCUMULATION_STEPS) != images:
        changed.append(f"images per step (BATCH_SIZE * ACCUMULATION_STEPS): saved {images}, now {now}")
    if changed:
        raise TrainerError(f"the saved run had other settings:{bullet_list(changed, 40)}\nLeave them as they were, or "
                           "start a new run in another OUTPUT_DIR. What may change on --resume: "
                           f"{', '.join(RESUME_MAY_CHANGE)} (but not BATCH_SIZE * ACCUMULATION_STEPS).")


def data_dir_of_run(used: str, here: str) -> str:
    """The DATA_DIR that a run used, or that of this command, where script and data have moved or a drive is missing."""
    if os.path.isdir(used):
        return used
    if here != used:
        log(f"The data folder of the run, {used}, is not there. Used instead: {here}")
    return here


def settings_of(metadata: dict) -> dict:
    """The settings that a model was trained with, from its JSON (of an earlier version, too; or {}), as constants."""
    if not metadata:
        return {}
    metadata = {"grey_percentiles": (0, 100), "test_time_augmentation": False} | metadata
    # Before JSONs named the architecture, it was this one.
    found = {"ARCHITECTURE": "unetplusplus"} | metadata.get("settings", {}) | {
        name: metadata[name.lower()] for name in DECIDED if name.lower() in metadata}
    return {name: tuple(value) if isinstance(value, list) else value for name, value in found.items()}


def differing(trained: dict, names: Iterable[str], cfg: Settings) -> list[str]:
    """The names of settings that differ from those that a model was trained with, as far as these are known."""
    return [name for name in names if trained.get(name, getattr(cfg, name)) != getattr(cfg, name)]


def take_over(trained: dict, names: Iterable[str], cfg: Settings, mode: argparse.Namespace) -> None:
    """Take over settings (names) that a model was trained with, but for those given as flags. Says which differ."""
    taken = {name: trained[name] for name in differing(trained, names, cfg) if not hasattr(mode, name)}
    if taken:
        vars(cfg).update(taken)
        log(f"As the model was trained: {', '.join(f'{name} = {value!r}' for name, value in taken.items())}")


def use_as_trained(trained: dict, cfg: Settings, mode: argparse.Namespace) -> None:
    """Take over what a model cannot be used without. Raises TrainerError if a flag says otherwise."""
    take_over(trained, DECIDED, cfg, mode)
    if wrong := [name for name in differing(trained, DECIDED, cfg) if name != "TEST_TIME_AUGMENTATION"]:
        raise TrainerError("the model was trained with "
                           f"{', '.join(f'{name} = {trained[name]!r}' for name in wrong)}, and has to be used so: "
                           f"leave out {', '.join(map(flag_name, wrong))}")


def start_alike(cfg: Settings, mode: argparse.Namespace) -> None:
    """Take over how the model in INIT_WEIGHTS sees grey levels, unless a flag says otherwise. Raises TrainerError."""
    trained = settings_of(read_metadata(Path(cfg.INIT_WEIGHTS))[0])
    trained = trained or read_weights(cfg.INIT_WEIGHTS).get("settings", {}).get("used", {})  # of a state
    take_over(trained, ("MEAN", "STD", "GREY_PERCENTILES"), cfg, mode)


def check_settings(cfg: Settings, mode: argparse.Namespace) -> None:
    """Raise TrainerError for the first setting that is impossible, before any work starts."""
    starts = not (mode.resume or mode.audit or mode.evaluate or mode.check_labels or mode.predict)
    for name, value in vars(cfg).items():
        try:
            json.dumps(value)
        except (TypeError, ValueError):
            raise TrainerError(f"{name} is {value!r}, which cannot be saved with the model; a setting is a number, a "
                               "text, True, False, None, or a tuple of these") from None
    for name, (legal, holds) in RULES.items():
        if name not in CONSTANTS or name in ("ENCODER_WEIGHTS", "INIT_WEIGHTS") and not starts:
            continue  # an edit has made a constant needless
        try:
            good = holds(getattr(cfg, name))
        except (TypeError, AttributeError, RuntimeError, re.error):  # a constant of the wrong type, a strange device
            good = False
        if not good:
            value = getattr(cfg, name)
            shown = f"'{value}'" if isinstance(value, str) else value  # repr() doubles backslashes
            raise TrainerError(f"{name} is {shown}, but must be {legal}.{did_you_mean(value, NAMES.get(name, ()))}")
    if find_device(cfg.DEVICE).type == "cpu" and cfg.PRECISION == "float16":
        raise TrainerError("PRECISION is float16, which needs a CUDA device; use auto, bfloat16 or float32")
    folds = round(1 / cfg.VALID_SHARE)
    if cfg.FOLD and (cfg.FOLD >= folds or abs(folds * cfg.VALID_SHARE - 1) > 1e-3):
        raise TrainerError(f"FOLD is {cfg.FOLD}, but VALID_SHARE is {cfg.VALID_SHARE}: for k folds VALID_SHARE must be "
                           "1 / k, and FOLD 0 to k - 1")
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
    keep_memory()
    checkpoint = Path(mode.checkpoint or Path(cfg.OUTPUT_DIR) / BEST)
    if not (mode.predict or mode.audit or mode.evaluate or mode.check_labels):
        if cfg.INIT_WEIGHTS and not mode.resume:
            start_alike(cfg, mode)
        start_processes(cfg)
        check_gpu(cfg)
        train(cfg, mode.resume)
        return
    if rank() > 0:  # the first process does without the others
        return
    check_gpu(cfg)
    metadata = read_metadata(checkpoint)[0]
    trained = settings_of(metadata)
    if not mode.audit:
        use_as_trained(trained, cfg, mode)
    if mode.predict:
        predict_files(cfg, checkpoint, mode.predict)
    elif mode.audit:
        prepare_data(cfg, ["train", "valid", "test"])
        log("Data OK.")
    else:
        if not checkpoint.is_file():
            raise TrainerError(f"no checkpoint to evaluate: {checkpoint}; train first, or name one with --checkpoint")
        names, use, of_run = ["valid", "test"], evaluate, ["CATEGORIES", "UNANNOTATED"]
        if mode.check_labels:  # it looks at images without annotation, whatever UNANNOTATED is
            names, use, of_run, cfg.UNANNOTATED = ["train", *names], check_labels, ["CATEGORIES"], "tumour-free"
        if not cfg.PATIENT_PATTERN:
            of_run.append("PATIENT_PATTERN")
        if settings_in_file()["DATA_DIR"] is None and not hasattr(mode, "DATA_DIR"):  # nobody has named the data
            trained["DATA_DIR"] = data_dir_of_run(trained.get("DATA_DIR", cfg.DATA_DIR), cfg.DATA_DIR)
            of_run.append("DATA_DIR")
        take_over(trained, of_run, cfg, mode)
        held_out = metadata.get("held_out", {})
        held_out = held_out if isinstance(held_out, dict) else {"valid": held_out}  # as earlier versions wrote it
        with locked_data(cfg, names, held_out) as (splits, cache):
            use(cfg, checkpoint, splits, cache)


# ===== Plumbing: the machine ==========================================================================================


def find_device(name: str) -> torch.device:
    """The device of a DEVICE setting; of several processes on a machine, each has a GPU of its own."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and int(os.environ.get("WORLD_SIZE", 1)) > 1:
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    return torch.device(name)


def set_up_machine(cfg: Settings, device: torch.device) -> None:
    """The switches of PyTorch that make training fast."""
    torch.backends.cudnn.benchmark = not cfg.DETERMINISTIC
    torch.use_deterministic_algorithms(cfg.DETERMINISTIC, warn_only=True)
    torch.set_float32_matmul_precision("highest" if cfg.DETERMINISTIC else "high")  # TF32 for what stays float32


def keep_memory() -> None:
    """Keep freed memory for the next image or activation, where the system's library is glibc."""
    if platform.libc_ver()[0] == "glibc":
        # It gives large blocks back at once, and the system clears every page again: half the time of reading images, a
        # quarter of that of a training step. These options of mallopt(3) are M_MMAP_MAX = 0, M_TRIM_THRESHOLD = never.
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-4, 0)
        libc.mallopt(-1, -1)


def describe_machine(cfg: Settings, device: torch.device) -> None:
    """Print device, precision and folders."""
    threads = plural(torch.get_num_threads(), "thread")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {threads}"
    processes = f", {world_size()} processes" if world_size() > 1 else ""
    dtype = str(amp_dtype(cfg.PRECISION, device)).removeprefix("torch.")
    log(f"{name}{processes}, {dtype}, PyTorch {torch.__version__}, data in {cfg.DATA_DIR}, output to {cfg.OUTPUT_DIR}")


def check_gpu(cfg: Settings) -> None:
    """Warn if this machine has an NVIDIA GPU that PyTorch cannot use. Raises TrainerError if the chosen one fails."""
    how, device = "README.md, 'GPU', says how to get a PyTorch that fits", find_device(cfg.DEVICE)
    if device.type != "cpu":
        try:
            torch.ones(1, device=device).item()
        except RuntimeError as error:  # usually this PyTorch has no code for this GPU: "no kernel image"
            raise TrainerError(f"{device} does not work with PyTorch {torch.__version__} ({one_line(error)}).\n"
                               f"If it is not just full or busy: {how}; --device cpu trains without it") from None
    elif shutil.which("nvidia-smi") and torch.version.cuda is None:
        warn("this machine has an NVIDIA GPU, but the installed PyTorch is a CPU-only build and cannot use it.\n"
             f"Uninstall torch and torchvision first, or pip keeps them; {how}.")
    elif shutil.which("nvidia-smi") and not torch.cuda.is_available():
        warn("PyTorch cannot use the NVIDIA GPU of this machine. Most likely its driver is too old for CUDA "
             f"{torch.version.cuda}, for which PyTorch\n{torch.__version__} was built (nvidia-smi shows what the "
             f"driver can do): update it, or take a PyTorch for an older CUDA;\n{how}. Other causes: a container "
             f"without access to it, or CUDA_VISIBLE_DEVICES, which is {os.environ.get('CUDA_VISIBLE_DEVICES')!r}.")


OUT_OF_MEMORY = ("out of memory",  # the allocator; or "CUDA error: out of memory", when another program fills the GPU
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
    return int(os.environ.get("RANK", 0))


def world_size() -> int:
    """How many processes train together, 1 without torchrun."""
    return dist.get_world_size() if dist.is_initialized() else 1


def gather(value) -> list:
    """The picklable values of all processes, in the order of their ranks. Also a barrier."""
    values = [value] * world_size()
    if dist.is_initialized():
        dist.all_gather_object(values, value)
    return values


def start_processes(cfg: Settings) -> None:
    """Under torchrun, join the other processes, each with its own GPU."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return
    device = find_device(cfg.DEVICE)
    gpu = device.type == "cuda"
    if gpu and not dist.is_nccl_available():
        raise TrainerError("several GPUs need Linux: this PyTorch has no NCCL. Start the script without torchrun")
    if gpu:
        torch.cuda.set_device(device)
    # Two hours, because the others wait while the first process of each machine reads all images.
    dist.init_process_group("nccl" if gpu else "gloo", timeout=timedelta(hours=2))


def end_processes() -> None:
    """Leave the process group, after all processes have come this far; the first one goes on alone."""
    if dist.is_initialized():
        # PyTorch 2.6 hangs while it ends a group whose thread still has to let go of a tensor: keep the last one.
        last = torch.zeros(1, device="cuda" if dist.get_backend() == "nccl" else "cpu")
        work = dist.all_reduce(last, async_op=True)
        work.wait()
        dist.destroy_process_group()
        del last, work


@contextlib.contextmanager
def ending_together():
    """A block in which one process may do what the others need: they wait for it at the end of the block.

    Where it raises in one process, the others exit silently with its exit code; of several, the first one raises.
    """
    failure = None
    try:
        yield
    except BaseException as error:
        failure = error
    codes = gather(exit_code(failure) if failure else 0)
    failed = next((number for number, code in enumerate(codes) if code), None)
    if failed == rank():
        raise failure
    if failed is not None:
        sys.exit(codes[failed])


@contextlib.contextmanager
def locked_data(cfg: Settings, names: list[str], held_out: dict | None = None):
    """Lock OUTPUT_DIR for this run, and give what prepare_data() returns to all processes.

    Each machine reads its data once, into a cache that belongs to OUTPUT_DIR and is removed at the end of the block.
    Raises TrainerError.
    """
    local_rank, data, folder = int(os.environ.get("LOCAL_RANK", 0)), None, Path(cfg.OUTPUT_DIR)
    with contextlib.ExitStack() as stack:
        with ending_together():  # before anybody touches the cache
            if rank() == 0:
                stack.enter_context(lock_folder(folder))
        with ending_together():
            if local_rank == 0:
                stack.callback(remove_cache, folder)
                data = prepare_data(cfg, names, folder, held_out)
        yield gather(data)[rank() - local_rank]  # of the first process of this machine


def lock_folder(folder: Path):
    """Keep other runs out of a folder until the returned context ends, or this process, however it ends.

    Raises TrainerError if another run is using it. Where locks do not work, a warning.
    """
    # Workers of a run that was just killed share its lock, and need a moment to end where all cores are busy.
    lock = filelock.FileLock(folder / ".brain_tumor.lock", timeout=5)
    try:
        with warnings.catch_warnings():
            # filelock warns before it falls back to a lock that would outlive a killed run: rather none.
            warnings.simplefilter("error", UserWarning)
            return lock.acquire()
    except filelock.Timeout:
        raise TrainerError(f"another run is using {folder}; wait until it has ended, or choose another folder with "
                           "OUTPUT_DIR (--output-dir)") from None
    except (OSError, NotImplementedError, UserWarning) as error:  # network drives; a lock file of another user
        warn(f"cannot lock {folder} ({error}): make sure that no second run writes there")
        return contextlib.nullcontext()


# ===== Plumbing: messages, signals, files =============================================================================

HOW_TO_RESUME = "The same command with --resume continues after the last saved epoch."


class TrainerError(Exception):
    """Something the user can put right. main() prints the message, without a stack trace, and ends with exit_code."""

    def __init__(self, message: str, exit_code: int = 2):
        # A DataLoader raises what a worker raised with the worker's stack trace as message.
        super().__init__(message.rpartition("TrainerError: ")[2].strip())
        self.exit_code = exit_code


def log(message: str = "", file=None) -> None:
    """Print a message, in the first process only, and flush it, so that it is at once in a log file, too."""
    if rank() == 0:
        stream = file or sys.stdout
        try:
            print(message, file=stream, flush=True)
        except OSError:  # a pipe that was closed, a full disk under a log: the run goes on in silence
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def warn(message: str) -> None:
    """Print a warning on standard error, framed to stand out."""
    log("\n".join(["", "!" * 100, "WARNING: " + message, "!" * 100]), sys.stderr)


def plural(count: int, noun: str) -> str:
    """1 image, 2 images."""
    return f"{count} {noun}{'s' * (count != 1)}"


def bullet_list(lines: list[str], most: int = 10) -> str:
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
    saved = False  # whether there is a state to continue from

    def __call__(self, signum, _frame):
        if self.signum:
            raise KeyboardInterrupt
        self.signum = signum
        log(f"\n{signal.Signals(signum).name}: stopping after this step (again: at once)", sys.stderr)


STOP = StopSignal()


def progress(items, description: str, total: int | None = None):
    """Iterate with a progress bar, and raise Interrupted after a signal. Every long loop goes through here."""
    # disable=None: no bar where standard error is not a terminal.
    with tqdm(items, description, total, leave=False, disable=None if rank() == 0 else True, dynamic_ncols=True) as bar:
        for item in bar:
            if STOP.signum:
                raise Interrupted
            yield item


DEAD_WORKER = "DataLoader worker (pid"  # in the error that PyTorch raises when one dies, wherever the program is then


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
        if not isinstance(error, (OSError, RuntimeError)) or is_out_of_memory(error) or DEAD_WORKER in str(error):
            raise  # a full disk is an OSError, or in torch.save a RuntimeError
        if required:
            how = HOW_TO_RESUME if STOP.saved else "Then start again."
            raise TrainerError(f"cannot write {path}: {error}\nWhat was saved before is unharmed. Free disk space, or "
                               f"repair the folder. {how}", 1) from error
        warn(f"cannot write {path}: {error} (going on without it)")


def write_table(path: Path, rows: list[dict], encoding: str = "utf-8-sig", required: bool = False) -> None:
    """Write rows as a CSV file; a cell is empty where a row lacks a column, as a mean over no image or a new metric.

    In the default encoding, UTF-8 with a mark in front, Excel shows Chinese names as they are. required: see
    write_file().
    """
    table = io.StringIO()
    columns = dict.fromkeys(name for row in reversed(rows) for name in row)  # in the order of the last row
    writer = csv.DictWriter(table, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_file(path, table.getvalue().encode(encoding, "backslashreplace"), required)


def write_json(path: Path, content: dict, indent: int | None = 2) -> None:
    """Write a JSON file. Raises TrainerError."""
    text = json.dumps(content, indent=indent, ensure_ascii=False)
    write_file(path, text.encode("utf-8", "backslashreplace"), required=True)  # of names that are not Unicode


def write_image(path: Path, image: np.ndarray) -> None:
    """Write a uint8 grey [H, W] or RGB [H, W, 3] array as PNG; cv2.imwrite fails on non-ASCII paths on Windows."""
    png = cv2.imencode(".png", image if image.ndim == 2 else image[..., ::-1])[1]
    write_file(path, png.tobytes(), required=True)


def advice(error: BaseException) -> str:
    """What helps against an error whose cause is outside this script; "" for an unexpected one."""
    if DEAD_WORKER in str(error):
        return ("a process that prepares images died, usually because memory ran out. Fewer of them need less: "
                "--num-workers 0")
    if re.search(r"C(\+\+)? compiler|Compiler: cl", str(error)):
        return f"COMPILE needs a C++ compiler ({one_line(error)}). Install one, or leave out --compile"
    if "Expected more than 1 value per channel" in str(error):
        return ("this network cannot be trained with a single image in a batch: it needs two images for each process, "
                "and a BATCH_SIZE of as many, or another ARCHITECTURE")
    if is_out_of_memory(error):
        return (f"memory ran out ({one_line(error)}). What helps: a smaller BATCH_SIZE with more ACCUMULATION_STEPS, "
                "fewer NUM_WORKERS, or a new run with a smaller IMG_SIZE")
    return str(error) if isinstance(error, OSError) else ""


def exit_code(error: BaseException) -> int:
    """1 failed on the way, 2 something for the user to put right, 130 Ctrl-C, 143 SIGTERM."""
    if isinstance(error, (Interrupted, KeyboardInterrupt)):
        return 128 + (STOP.signum or signal.SIGINT)
    return getattr(error, "exit_code", 1)


def main(argv: list[str] | None = None) -> int:
    """Run the script. argv: the words of the command line, default sys.argv[1:].

    Returns 0, or the exit_code() of what went wrong.
    """
    # Without a console (pythonw) there are none.
    sys.stdout, sys.stderr = (stream or open(os.devnull, "w") for stream in (sys.stdout, sys.stderr))
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a Chinese path must not end a run whose output goes to a file
            stream.reconfigure(errors="backslashreplace")
    cv2.setNumThreads(0)  # the parallel work of this script is done by its own threads and processes
    # Where workers come from a fork server, they share what it has imported.
    multiprocessing.set_forkserver_preload(["albumentations", "segmentation_models_pytorch", "matplotlib.figure"])
    STOP.signum, STOP.saved, code, message = 0, False, 0, ""
    in_main_thread = threading.current_thread() is threading.main_thread()  # other threads cannot handle signals
    handlers = {number: signal.signal(number, STOP) for number in (signal.SIGINT, signal.SIGTERM) if in_main_thread}
    try:
        run_mode(*read_settings(argv))
    except (Interrupted, KeyboardInterrupt):
        STOP.signum = STOP.signum or signal.SIGINT
    except TrainerError as error:
        # An error before the processes have met is the same in all of them: the first one prints it.
        code, message = error.exit_code, "" if rank() > 0 and not dist.is_initialized() else str(error)
        error.__traceback__ = None  # what a worker raised refers to itself through it, and so keeps the workers
    except Exception as error:
        if not STOP.signum:  # a signal to all processes ends workers too, which arrives here as their failure
            code, message = 1, advice(error)
            if not message:
                traceback.print_exc()
                message = "unexpected error; the lines above say where it happened."
            message += f"\n{HOW_TO_RESUME}" if STOP.saved else ""
        error.__traceback__ = None
    finally:
        gc.collect()  # lets go of the frames of a failed run, and so ends its workers
        for number, handler in handlers.items():
            signal.signal(number, handler)
    if message:
        print(f"error{f' (process {rank()})' if rank() else ''}: {message}", file=sys.stderr, flush=True)
    if STOP.signum:
        code, STOP.signum = 128 + STOP.signum, 0
        log(f"\nStopped. {HOW_TO_RESUME if STOP.saved else ''}")
    return code


if __name__ == "__main__":
    sys.exit(main())
