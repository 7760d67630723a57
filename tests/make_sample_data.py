"""Draw the sample data: MRI-like brain phantoms with COCO tumour outlines.

Each picture imitates an axial, contrast-enhanced T1 slice: scalp and bone,
folded cortex over white matter, ventricles, a few bright vessels and none, one
or two lesions. Nothing in it comes from a patient. Run

    python tests/make_sample_data.py                # rewrites train/ valid/ test/
    python tests/make_sample_data.py --output DIR   # writes them below DIR

Each folder gets JPEG images and an `_annotations.coco.json` laid out like a
Roboflow COCO-segmentation export. The same library versions give the same bytes.
"""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from pycocotools import mask as coco_mask

DESCRIPTION = "Synthetic MRI-like phantoms: sample data of brain_tumor_integrated_smp.py"
ANNOTATION_FILE = "_annotations.coco.json"
SPLITS = {"train": 32, "valid": 8, "test": 8}
# Lesions of image i are CASES[i % 8]; each inner number counts the parts of one
# lesion. The first four images of a split therefore show every case.
CASES = ((1,), (1, 1), (), (2,), (1,), (1,), (1,), (1,))
KINDS = {"bright": 0.6, "rim": 0.28, "dark": 0.12}  # kind of lesion: share
SEED = 2024
SIZE = 256            # pixels per side of the written image
GRID = 2 * SIZE       # drawn twice as fine, then averaged: smooth edges
JPEG_QUALITY = 85
LESION_SHARE = (0.003, 0.08)  # of the image area, drawn log-uniformly
# Grey levels, 1.0 = white before gain, bias field and noise.
CSF, BONE, MARROW, GREY, WHITE, FAT = 0.14, 0.05, 0.22, 0.42, 0.60, 0.86


@dataclass
class Blob:
    """Star-shaped smooth outline: radius (px) as a function of the angle."""

    x: float
    y: float
    radius: float
    waves: list  # (order, amplitude, phase) of each cosine added to the circle

    def radius_at(self, angle):
        """Outline radius in px for angles in radians (any shape, float)."""
        return self.radius * (1 + sum(a * np.cos(k * angle + p) for k, a, p in self.waves))

    def polygon(self):
        """Flat list [x0, y0, x1, y1, ...] in image px with 20 to 40 vertices."""
        angle = np.linspace(0, 2 * np.pi, int(np.clip(self.radius * 1.6, 20, 40)), endpoint=False)
        r = self.radius_at(angle)
        points = np.stack([self.x + r * np.cos(angle), self.y + r * np.sin(angle)], axis=1)
        return [round(float(v), 2) for v in points.ravel()]

    def profile(self):
        """(GRID, GRID) float: 0 at the centre, 1 on the outline, more outside."""
        x, y = pixel_grid()
        return np.hypot(x - self.x, y - self.y) / self.radius_at(np.arctan2(y - self.y, x - self.x))


def pixel_grid():
    """x and y, (GRID, GRID) floats in image px; COCO puts pixel i on [i, i + 1]."""
    axis = (np.arange(GRID) + 0.5) * SIZE / GRID
    return np.meshgrid(axis, axis)


def smooth_noise(rng, scale):
    """(GRID, GRID) float noise, mean 0, std 1; its blobs are about `scale` image px wide."""
    n = max(12, round(4 * SIZE / scale))
    small = cv2.GaussianBlur(rng.standard_normal((n, n)), (0, 0), 1.6)
    noise = cv2.resize(small, (GRID, GRID), interpolation=cv2.INTER_CUBIC)
    return (noise - noise.mean()) / noise.std()


def head_coordinates(rng, half_length):
    """u (left-right), v (front-back), r: (GRID, GRID) floats; r is 1 on the brain surface."""
    x, y = pixel_grid()
    turn = rng.normal(0, np.radians(6))
    dx, dy = x - SIZE / 2 - rng.uniform(-5, 5), y - SIZE / 2 - rng.uniform(-5, 5)
    u = (dx * np.cos(turn) + dy * np.sin(turn)) / (half_length * rng.uniform(0.76, 0.86))
    v = (dy * np.cos(turn) - dx * np.sin(turn)) / half_length
    u = u * (1 - rng.uniform(0.02, 0.14) * v)  # the forehead is narrower
    r = (np.abs(u) ** 2.2 + np.abs(v) ** 2.2) ** (1 / 2.2)
    return u, v, r * (1 + 0.008 * smooth_noise(rng, 70))


def draw_skull(rng, r):
    """Scalp, bone and the fluid below it around an empty brain: (GRID, GRID) float grey levels."""
    bone = 1.03 + rng.uniform(0.05, 0.08)
    scalp = bone + rng.uniform(0.05, 0.09) + 0.008 * smooth_noise(rng, 50)
    image = np.where(r < scalp, FAT * (1 + 0.10 * smooth_noise(rng, 25)), 0)
    image[r < bone] = BONE
    image[np.abs(r - (1.03 + bone) / 2) < 0.010] = MARROW
    image[r < 1.03] = CSF
    return image


def sulci(rng, u, v, r):
    """(GRID, GRID) bool: the fluid between the folds of the cortex and in the midline fissure."""
    # Level lines of "angle + noise" run inward from the surface and meander like
    # sulci; dividing by the gradient gives all of them the same width.
    folds = int(rng.integers(27, 38))
    bend = 2.0 * smooth_noise(rng, 30) + 0.8 * smooth_noise(rng, 14)
    wave = np.sin(folds * np.arctan2(v, u) / 2 + bend)
    slope = np.hypot(*np.gradient(np.where(np.abs(wave) < 0.9, wave, 0)))
    depth = 1 - r
    reach = 0.25 + 0.10 * smooth_noise(rng, 14)
    width = rng.uniform(0.9, 1.6) * np.clip(1.5 - depth / 0.3, 0, 1.3)
    lines = (np.abs(wave) < width * np.clip(slope, 0.01, 0.25)) & (depth < reach)
    middle = np.abs(u + 0.010 * smooth_noise(rng, 35)) < 0.012 + 0.006 * smooth_noise(rng, 20)
    return lines | (middle & (np.abs(v + 0.03) > rng.uniform(0.38, 0.50)))


def ventricles(rng, u, v):
    """Two (GRID, GRID) bool masks: the butterfly of the ventricles, and the deep grey nuclei."""
    size, shift = rng.uniform(0.75, 1.35), rng.uniform(-0.08, 0.04)
    open_front, open_back = rng.uniform(0.12, 0.2), rng.uniform(0.2, 0.32)
    fluid, nuclei = np.zeros(u.shape, bool), np.zeros(u.shape, bool)
    wobble = 0.012 * smooth_noise(rng, 18)
    for side in (-1, 1):
        stretch = size * rng.uniform(0.9, 1.1)  # never quite symmetric
        for t in np.linspace(-1, 1, 25):        # a chain of discs from front to back
            opening = open_front if t < 0 else open_back
            cu = side * (0.055 + opening * abs(t) ** 1.6)
            thick = stretch * (0.028 + 0.042 * np.sin(np.pi * min(abs(t), 1.0)) + 0.015 * (t > 0.6))
            fluid |= np.hypot(u - cu, v - shift - 0.36 * t) < thick + wobble
        nuclei |= np.hypot((u - side * 0.19) / 0.11, (v - shift - 0.07) / 0.16) < 1 + 6 * wobble
        nuclei |= np.hypot((u - side * 0.36) / 0.08, (v - shift + 0.06) / 0.19) < 1 + 6 * wobble
    return fluid, nuclei


def draw_brain(rng, image, u, v, r):
    """Paint the tissue inside r < 1 into `image` (GRID, GRID) in place."""
    brain = r < 1
    fluid = sulci(rng, u, v, r)
    # Grey matter is a ribbon of even thickness along every fluid surface.
    ribbon = cv2.distanceTransform((brain & ~fluid).astype(np.uint8), cv2.DIST_L2, 5)
    thickness = rng.uniform(7, 9.5) + 1.2 * smooth_noise(rng, 12)
    tissue = WHITE + (GREY - WHITE) * np.clip((thickness - ribbon) / 4 + 0.5, 0, 1)
    plexus = np.zeros_like(brain)
    if rng.random() < 0.8:  # the remaining slices lie above the ventricles
        butterfly, nuclei = ventricles(rng, u, v)
        tissue[nuclei] = 0.5 * (GREY + WHITE) - 0.02
        fluid |= butterfly
        plexus = butterfly & (smooth_noise(rng, 8) > 1.0) & (v > 0.05)
    tissue = tissue * (1 + 0.035 * smooth_noise(rng, 9) + 0.03 * smooth_noise(rng, 30))
    image[brain] = np.where(fluid, CSF, tissue)[brain]
    image[plexus] = 0.7  # takes up contrast agent, as vessels do
    for end in (-1, 1):          # the sagittal sinus, cut in front and behind
        image[np.hypot(u / rng.uniform(0.02, 0.045), (v - end * 0.985) / 0.035) < 1] = 0.85
    for _ in range(int(rng.integers(2, 7))):  # vessels on the surface, cut across
        angle, at = rng.uniform(0, 2 * np.pi), rng.uniform(0.72, 0.98)
        distance = np.hypot(u - at * np.cos(angle), v - at * np.sin(angle))
        image[distance < rng.uniform(0.014, 0.028)] = 0.85


def raster(polygons):
    """(SIZE, SIZE) bool mask of one annotation, the way pycocotools fills it."""
    codes = coco_mask.frPyObjects(polygons, SIZE, SIZE)
    return coco_mask.decode(coco_mask.merge(codes)).astype(bool)


def place_blob(rng, area, free, near=None):
    """Random blob of about `area` px^2 in the bool mask `free` (SIZE, SIZE), next to `near`, if any."""
    ys, xs = np.nonzero(free)
    radius = np.sqrt(area / np.pi)
    for _ in range(400):
        pick = rng.integers(len(xs))
        x, y = xs[pick] + rng.random(), ys[pick] + rng.random()
        if near is not None:
            angle = rng.uniform(0, 2 * np.pi)
            reach = near.radius_at(angle) + 1.15 * radius + rng.uniform(3, 7)
            x, y = near.x + reach * np.cos(angle), near.y + reach * np.sin(angle)
        waves = [(k, rng.uniform(0.3, 1) * a, rng.uniform(0, 2 * np.pi))
                 for k, a in ((2, 0.20), (3, 0.11), (4, 0.06), (5, 0.05))]
        blob = Blob(x, y, radius, waves)
        mask = raster([blob.polygon()])
        if mask.any() and not (mask & ~free).any():
            return blob
        radius = max(radius * 0.99, 4.0)  # a large lesion may have no room
    raise RuntimeError("no room for a lesion; change SEED")


def draw_lesion(rng, image, blobs, brain):
    """Paint one lesion and oedema around it into `image` in place; `brain` is r < 1 on the GRID."""
    profile = np.min([blob.profile() for blob in blobs], axis=0)
    kind = rng.choice(list(KINDS), p=list(KINDS.values()))
    level = rng.uniform(0.24, 0.32) if kind == "dark" else rng.uniform(0.70, 0.98)
    texture = 0.07 * smooth_noise(rng, 10) + 0.04 * smooth_noise(rng, 5)
    if kind != "dark" and rng.random() < 0.6:  # water around it: darker, fading outward
        fade = np.clip((1.7 + 0.15 * smooth_noise(rng, 20) - profile) / 0.5, 0, 1)
        image -= 0.18 * fade * (brain & (image > 0.35) & (image < 0.7))
    lesion = level * (1 + texture)
    if kind == "rim":
        core = profile < rng.uniform(0.6, 0.75) + 0.06 * smooth_noise(rng, 12)
        lesion = np.where(core, rng.uniform(0.18, 0.36) + 0.3 * texture, lesion)
    image[:] = np.where(profile < 1, lesion, image)


def scan(rng, image):
    """The scanner's share: blur, gain, bias field and noise; returns (SIZE, SIZE) uint8."""
    image = cv2.GaussianBlur(image, (0, 0), rng.uniform(0.9, 1.5))
    image = image * rng.uniform(0.78, 1.08) * (1 + 0.08 * smooth_noise(rng, 180))
    image = cv2.resize(image, (SIZE, SIZE), interpolation=cv2.INTER_AREA)
    sigma = rng.uniform(0.015, 0.032)  # magnitude of a complex signal: Rician noise
    real, imaginary = rng.normal(0, sigma, (2, SIZE, SIZE))
    return np.clip(255 * np.hypot(image + real, imaginary), 0, 255).astype(np.uint8)


def draw_slice(split, index):
    """Image (SIZE, SIZE) uint8, brain mask (SIZE, SIZE) bool, and a list of polygons per lesion."""
    rng = np.random.default_rng([SEED, list(SPLITS).index(split), index])
    u, v, r = head_coordinates(rng, half_length=rng.uniform(84, 102))
    image = draw_skull(rng, r)
    draw_brain(rng, image, u, v, r)
    inside = cv2.resize((r < 1).astype(np.float32), (SIZE, SIZE), interpolation=cv2.INTER_AREA) == 1
    free = cv2.erode(inside.astype(np.uint8), np.ones((7, 7))).astype(bool)
    lesions = []
    for parts in CASES[index % len(CASES)]:
        area = SIZE * SIZE * np.exp(rng.uniform(*np.log(LESION_SHARE)))
        blobs = [place_blob(rng, area if parts == 1 else 0.65 * area, free)]
        if parts == 2:
            rest = free & ~raster([blobs[0].polygon()])
            blobs.append(place_blob(rng, 0.35 * area, rest, near=blobs[0]))
        lesions.append([blob.polygon() for blob in blobs])
        draw_lesion(rng, image, blobs, r < 1)
        taken = cv2.dilate(raster(lesions[-1]).astype(np.uint8), np.ones((9, 9))).astype(bool)
        free &= ~taken  # lesions must not touch each other
    return scan(rng, image), inside, lesions


def write_split(folder, name, count):
    """Write `count` images of split `name` (a key of SPLITS) and their COCO dict, and return it."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    images, annotations = [], []
    for index in range(count):
        image, _, lesions = draw_slice(name, index)
        file_name = f"phantom_{name}_{index:03d}.jpg"
        # imencode and write_bytes: cv2.imwrite fails on non-ASCII paths on Windows.
        ok, data = cv2.imencode(".jpg", cv2.cvtColor(image, cv2.COLOR_GRAY2BGR),
                                [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])
        if not ok:
            raise RuntimeError(f"cannot encode {file_name}")
        (folder / file_name).write_bytes(data.tobytes())
        images.append({"id": index, "file_name": file_name, "height": SIZE, "width": SIZE})
        for polygons in lesions:
            x, y = np.concatenate([np.reshape(p, (-1, 2)) for p in polygons]).T
            box = [x.min(), y.min(), x.max() - x.min(), y.max() - y.min()]
            annotations.append({"id": len(annotations), "image_id": index, "category_id": 1,
                                "bbox": [round(float(b), 2) for b in box],
                                "area": float(raster(polygons).sum()),
                                "segmentation": polygons, "iscrowd": 0})
    coco = {"info": {"description": DESCRIPTION, "version": "1"},
            "licenses": [],
            "categories": [{"id": 0, "name": "Tumor", "supercategory": "none"},
                           {"id": 1, "name": "tumor", "supercategory": "Tumor"}],
            "images": images, "annotations": annotations}
    (folder / ANNOTATION_FILE).write_bytes(json.dumps(coco).encode("utf-8"))
    return coco


def is_foreign(folder):
    """True if `folder` holds annotations that this file did not write."""
    path = Path(folder) / ANNOTATION_FILE
    if not path.exists():
        return False
    info = json.loads(path.read_text(encoding="utf-8")).get("info") or {}
    return info.get("description") != DESCRIPTION


def main():
    """Write all splits, but never over somebody's own data."""
    parser = argparse.ArgumentParser(description="Draw the sample data (brain phantoms).")
    parser.add_argument("--output", type=Path, default=Path(__file__).resolve().parent.parent,
                        help="folder for train/, valid/ and test/ (default: beside tests/)")
    output = parser.parse_args().output
    foreign = [name for name in SPLITS if is_foreign(output / name)]
    if foreign:
        parser.error(f"{', '.join(foreign)} in {output} holds other data; use --output")
    for name, count in SPLITS.items():
        coco = write_split(output / name, name, count)
        print(f"{name}: {count} images, {len(coco['annotations'])} annotations")


if __name__ == "__main__":
    main()
