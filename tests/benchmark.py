"""How much faster, and how much smaller, than the original version? Measured here and now, on your data and machine.

    python tests/benchmark.py --data FOLDER                                    everything, at 256 px
    python tests/benchmark.py --data FOLDER --device cpu --images 64 --valid 16 --epochs 2 --repeats 3
    python tests/benchmark.py --data FOLDER --only loader --images 512 --workers 2 --repeats 5
    python tests/benchmark.py --data FOLDER --only step --precision bfloat16
    python tests/benchmark.py --data FOLDER --only epoch --versions this --images 512 --img-size 64 --json result.json

Every measurement runs in a process of its own, the versions take turns, and medians with the smallest and the largest
value of all repeats are printed, as Markdown and as JSON. Compare numbers of one run only: machines have moods.

  original        from-scratch U-Net (64 ... 1024 channels), float32, Adam, BCE + Dice, flips and brightness, every
                  image decoded, its polygons filled by OpenCV, and resized by INTER_LINEAR in every epoch
  this            brain_tumor_integrated_smp.py through its own functions
  straightforward (loader only) this script's decoding, rasterising, resizing, augmentation and normalisation, but for
                  every image in every epoch and with float32 tensors as batches: what the cache and uint8 batches save

Dice after a few epochs says that both versions learn, not which one is better in the end.
"""

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import cv2
import numpy as np
import torch

import brain_tumor_integrated_smp as script

VERSIONS = {"loader": ("straightforward", "original", "this"), "step": ("original", "this"),
            "epoch": ("original", "this")}
STEPS = 5  # timed steps of the part "step", after as many that are not
MATRIX = {"cpu": 2048, "cuda": 8192}  # rows and columns of the large matrix product


# ======================================================================================================================
# The original version, whole
# ======================================================================================================================


class UNet(torch.nn.Module):
    """The classic U-Net with BatchNorm and transposed convolutions: 31.0 million parameters."""

    def __init__(self):
        super().__init__()

        def double(inputs, outputs):
            layers = [(torch.nn.Conv2d(channels, outputs, 3, padding=1), torch.nn.BatchNorm2d(outputs),
                       torch.nn.ReLU(inplace=True)) for channels in (inputs, outputs)]
            return torch.nn.Sequential(*layers[0], *layers[1])

        widths = (64, 128, 256, 512, 1024)
        self.down = torch.nn.ModuleList(double(*pair) for pair in zip((3, *widths), widths))
        self.up = torch.nn.ModuleList(torch.nn.ConvTranspose2d(w, w // 2, 2, stride=2) for w in widths[:0:-1])
        self.join = torch.nn.ModuleList(double(w, w // 2) for w in widths[:0:-1])
        self.head = torch.nn.Conv2d(widths[0], 1, 1)

    def forward(self, x):
        passed = []
        for level, block in enumerate(self.down):
            x = block(torch.nn.functional.max_pool2d(x, 2) if level else x)
            passed.append(x)
        for up, join, skip in zip(self.up, self.join, passed[-2::-1]):
            x = join(torch.cat([skip, up(x)], dim=1))
        return self.head(x)


class OriginalDataset(torch.utils.data.Dataset):
    """Decodes, fills polygons and resizes whenever an item is asked for; flips and brightness."""

    def __init__(self, folder, size, count, train):
        coco = json.loads((Path(folder) / script.ANNOTATION_FILE).read_text(encoding="utf-8"))
        self.folder, self.size, self.train, self.images = Path(folder), size, train, coco["images"][:count]
        self.annotations = {image["id"]: [] for image in coco["images"]}
        for annotation in coco["annotations"]:
            self.annotations[annotation["image_id"]].append(annotation)

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        entry = self.images[index]
        image = cv2.cvtColor(cv2.imread(str(self.folder / entry["file_name"])), cv2.COLOR_BGR2RGB)
        mask = np.zeros(image.shape[:2], np.uint8)
        for annotation in self.annotations[entry["id"]]:
            for polygon in annotation["segmentation"]:
                cv2.fillPoly(mask, [np.array(polygon).reshape(-1, 2).astype(np.int32)], 1)
        image = cv2.resize(image, (self.size, self.size), interpolation=cv2.INTER_LINEAR)
        mask = cv2.resize(mask, (self.size, self.size), interpolation=cv2.INTER_NEAREST)
        image = image.astype(np.float32) / 255
        if self.train:
            if np.random.rand() < 0.5:
                image, mask = image[:, ::-1], mask[:, ::-1]
            if np.random.rand() < 0.5:
                image = np.clip(image * np.random.uniform(0.8, 1.2), 0, 1)
        image = np.ascontiguousarray(image.transpose(2, 0, 1), np.float32)
        return torch.from_numpy(image), torch.from_numpy(np.ascontiguousarray(mask, np.float32)[None])


def bce_and_dice(logits, masks):
    """The usual loss of such scripts: Dice pooled over the batch."""
    p = logits.sigmoid()
    dice = (2 * (p * masks).sum() + 1) / (p.sum() + masks.sum() + 1)
    return torch.nn.functional.binary_cross_entropy_with_logits(logits, masks) + 1 - dice


class Original:
    """Model, loaders and the plain loop."""

    precision = "float32"

    def __init__(self, options, device):
        self.device, self.options = device, options

    def build(self):
        self.model = UNet().to(self.device)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=1e-4)

    def open_data(self):
        o, self.loaders = self.options, {}
        for name, count in (("train", o.images), ("valid", o.valid)):
            dataset = OriginalDataset(Path(o.data) / name, o.img_size, count, name == "train")
            self.loaders[name] = torch.utils.data.DataLoader(dataset, o.batch_size, shuffle=name == "train",
                                                             num_workers=o.workers)

    def train_loader(self, epoch):
        return self.loaders["train"]

    def batch(self, images, masks):
        return torch.from_numpy(images).permute(0, 3, 1, 2).float().div(255).contiguous(), \
            torch.from_numpy(masks)[:, None].float()

    def train(self, batches, epoch=0):
        self.model.train()
        total = 0.0
        for images, masks in batches:
            images, masks = images.to(self.device), masks.to(self.device)
            self.optimizer.zero_grad()
            loss = bce_and_dice(self.model(images), masks)
            loss.backward()
            self.optimizer.step()
            total += loss.item()
        return total

    def validate(self):
        """Mean Dice per image, by the convention of the script, at the network's size."""
        self.model.eval()
        counts = []
        with torch.no_grad():
            for images, masks in self.loaders["valid"]:
                probabilities = self.model(images.to(self.device)).sigmoid()
                counts.append(script.confusion(probabilities, masks.to(self.device)).cpu().numpy())
        return script.summarize(np.concatenate(counts))["dice"]

    def close(self):
        pass


# ======================================================================================================================
# This version, through the script's own functions
# ======================================================================================================================


class This:
    """What train() of the script does, without files and pictures."""

    def __init__(self, options, device):
        self.cfg = script.default_settings()
        vars(self.cfg).update(DATA_DIR=options.data, IMG_SIZE=options.img_size, BATCH_SIZE=options.batch_size,
                              NUM_WORKERS=options.workers, DEVICE=str(device), PRECISION=options.precision,
                              ENCODER_WEIGHTS=None, COMPILE=options.compile)
        self.options, self.device, self.cache = options, device, None
        self.precision = str(script.amp_dtype(self.cfg.PRECISION, device)).removeprefix("torch.")
        script.set_up_machine(self.cfg, device)

    def build(self):
        self.run = script.Run(self.cfg, self.device, "", None)
        self.model = self.run.model
        self.criterion = script.LOSSES[self.cfg.LOSS]()

    def open_data(self):
        """The whole audit and cache, for the images asked for."""
        o, read_coco = self.options, script.read_coco

        def limited(folder, categories=()):
            split = read_coco(folder, categories)
            split.records = split.records[:o.images if Path(folder).name == "train" else o.valid]
            return split

        script.read_coco = limited
        try:
            splits, self.cache = script.prepare_data(self.cfg, ["train", "valid"])
        finally:
            script.read_coco = read_coco
        self.loaders = {name: script.make_loader(script.BrainTumorDataset(
            Path(o.data) / name, o.img_size, name == "train", self.cfg.SEED, False, records=split.records,
            cache=self.cache), self.cfg, train=name == "train") for name, split in splits.items()}

    def train_loader(self, epoch):
        self.loaders["train"].batch_sampler.set_epoch(epoch)
        return self.loaders["train"]

    def batch(self, images, masks):
        return images, masks

    def train(self, batches, epoch=0):
        return script.train_one_epoch(self.run.parallel, batches, self.criterion, self.run.optimizer, self.run.scaler,
                                      self.device, cfg=self.cfg, guard=self.run.guard, epoch=epoch)

    def validate(self):
        return script.validate(self.run.model, self.loaders["valid"], self.criterion, self.device, cfg=self.cfg)["dice"]

    def close(self):
        if self.cache is not None:
            self.cache.close()


class Straightforward(This):
    """For the part "loader": everything again for every image in every epoch, tensors as batches."""

    def open_data(self):
        o = self.options
        records = script.read_coco(Path(o.data) / "train").records[:o.images]
        dataset = script.BrainTumorDataset(Path(o.data) / "train", o.img_size, train=True, records=records)
        self.loader = torch.utils.data.DataLoader(
            dataset, o.batch_size, shuffle=True, num_workers=o.workers, worker_init_fn=script.start_worker,
            persistent_workers=o.workers > 0)

    def train_loader(self, epoch):
        return self.loader


CLASSES = {"original": Original, "this": This, "straightforward": Straightforward}


# ======================================================================================================================
# Measurements, each in a process of its own
# ======================================================================================================================


def wait_for(device):
    """Until the GPU has done everything it was asked for."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Memory:
    """Peak memory in MB: of the accelerator as PyTorch counts it, or on a CPU the resident set above the imports.

    On a CPU the cache file's pages, which the system may drop at any time, count too when this process has mapped them.
    """

    def __init__(self, device):
        self.device, self.peak, self.ended = device, 0, threading.Event()
        self.start = self.resident()

    @staticmethod
    def resident():
        if sys.platform == "linux":
            return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e6 if sys.platform == "darwin" else 1e3)

    def watch(self):
        while not self.ended.wait(0.02):
            self.peak = max(self.peak, self.resident())

    def __enter__(self):
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        self.thread = threading.Thread(target=self.watch, daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.ended.set()
        self.thread.join()
        self.megabytes = self.peak - self.start
        if self.device.type == "cuda":
            self.megabytes = torch.cuda.max_memory_allocated(self.device) / 1e6


def images_of(batches):
    """Number of images in all batches; touches nothing else."""
    return sum(len(images) for images, _ in batches)


def measure_loader(version, options, device):
    """Images/s of the training loader alone, from the second epoch on."""
    version.open_data()
    images_of(version.train_loader(0))
    rates = []
    for epoch in range(1, max(2, options.epochs)):
        began = time.perf_counter()
        images = images_of(version.train_loader(epoch))
        rates.append(images / (time.perf_counter() - began))
    return {"images/s, loader alone": statistics.median(rates)}


def matrix_rate(precision, device, seconds=1.0):
    """FLOP/s of a large square matrix product in a precision."""
    size = MATRIX[device.type]
    a, b = (torch.randn(size, size, device=device, dtype=getattr(torch, precision)) for _ in range(2))
    best, ended = 0.0, time.perf_counter() + seconds
    while best == 0 or time.perf_counter() < ended:
        wait_for(device)
        began = time.perf_counter()
        for _ in range(1 if device.type == "cpu" else 10):
            a @ b
        wait_for(device)
        rate = 2 * size**3 * (1 if device.type == "cpu" else 10) / (time.perf_counter() - began)
        best = max(best, rate)
    return best


def step_flops(version, batch, device):
    """FLOPs of one training step, counted by PyTorch in its matrix products and convolutions."""
    from torch.utils.flop_counter import FlopCounterMode
    with FlopCounterMode(display=False) as counter:
        version.train([batch])
    return counter.get_total_flops()


def measure_step(version, options, device):
    """Images/s, memory and FLOP/s of the training step, fed with one batch that is in memory already."""
    rng = np.random.default_rng(0)
    size = (options.batch_size, options.img_size, options.img_size)
    images, masks = rng.integers(0, 256, (*size, 3), np.uint8), (rng.random(size) < 0.05).astype(np.uint8)
    with Memory(device) as memory:
        version.build()
        batch = version.batch(images, masks)
        version.train([batch] * 2)
    flops = step_flops(version, batch, device)
    version.train([batch] * 2)
    rates = []
    for _ in range(STEPS):
        wait_for(device)
        began = time.perf_counter()
        version.train([batch])
        wait_for(device)
        rates.append(len(images) / (time.perf_counter() - began))
    rate = statistics.median(rates)
    achieved, possible = rate / len(images) * flops, matrix_rate(version.precision, device)
    return {"parameters, million": sum(p.numel() for p in version.model.parameters()) / 1e6,
            "images/s, step alone": rate, "peak memory of the step, MB": memory.megabytes,
            "GFLOP per image and step": flops / len(images) / 1e9,
            "GFLOP/s of the step": achieved / 1e9, "GFLOP/s of a matrix product": possible / 1e9,
            "share of the matrix product, %": 100 * achieved / possible}


def measure_epoch(version, options, device):
    """Whole epochs, training and validation; the rate is that of the epochs after the first, which still warms up."""
    seconds, began_all = [], time.perf_counter()
    with Memory(device) as memory:
        version.build()
        version.open_data()
        prepared = time.perf_counter() - began_all
        for epoch in range(options.epochs):
            wait_for(device)
            began = time.perf_counter()
            version.train(version.train_loader(epoch), epoch)
            dice = version.validate()
            wait_for(device)
            seconds.append(time.perf_counter() - began)
    images = len(version.loaders["train"].dataset)
    return {"seconds before the first epoch": prepared, "seconds per epoch": statistics.median(seconds[1:] or seconds),
            "images/s, whole epoch": images / statistics.median(seconds[1:] or seconds),
            "peak memory, MB": memory.megabytes, "validation Dice": dice}


def measure(options):
    """In the process of one measurement: print its result as the last line."""
    torch.manual_seed(options.seed)
    np.random.seed(options.seed)
    cv2.setNumThreads(0)
    device = torch.device(options.device)
    version = CLASSES[options.version](options, device)
    version_cfg = getattr(version, "cfg", None)
    if version_cfg:
        version_cfg.SEED = options.seed
    try:
        result = globals()["measure_" + options.part](version, options, device)
    finally:
        version.close()
    print(json.dumps({"precision": version.precision, **result}))


# ======================================================================================================================
# The comparison
# ======================================================================================================================


def in_new_process(options, part, version, seed):
    """One measurement. Returns its numbers."""
    names = ("data", "img_size", "batch_size", "images", "valid", "epochs", "device", "workers", "precision")
    words = [word for name in names for word in ("--" + name.replace("_", "-"), str(getattr(options, name)))]
    words += ["--part", part, "--version", version, "--seed", str(seed)] + ["--compile"] * options.compile
    done = subprocess.run([sys.executable, __file__, *words], stdout=subprocess.PIPE, encoding="utf-8")
    if done.returncode:
        sys.exit(f"{version}, {part}: failed with exit code {done.returncode}")
    return json.loads(done.stdout.splitlines()[-1])


def table(results):
    """Markdown: one row per quantity with the median of each version, the spread in brackets, and the ratio."""
    versions = [name for name in CLASSES if name in results]
    lines = ["| | " + " | ".join(versions) + " | this / original |", "|---|" + "---:|" * (len(versions) + 1)]
    for quantity in dict.fromkeys(key for version in versions for key in results[version]):
        cells, medians = [], {}
        for version in versions:
            values = results[version].get(quantity, [])
            if not values or isinstance(values[0], str):
                cells.append(values[0] if values else "")
                continue
            medians[version] = statistics.median(values)
            spread = f" ({min(values):.4g} ... {max(values):.4g})" if len(values) > 1 else ""
            cells.append(f"{medians[version]:.4g}{spread}")
        ratio = f"{medians['this'] / medians['original']:.3g}" if medians.get("original") and "this" in medians else ""
        lines.append(f"| {quantity} | " + " | ".join(cells) + f" | {ratio} |")
    if "straightforward" in results and "this" in results:
        pairs = zip(*(results[name]["images/s, loader alone"] for name in ("this", "straightforward")))
        ratios = [fast / slow for fast, slow in pairs]
        lines.append(f"\nLoader, this / straightforward, pair by pair: median {statistics.median(ratios):.2f}, "
                     f"{min(ratios):.2f} ... {max(ratios):.2f}")
    return "\n".join(lines)


def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default=script.DATA_DIR, help="folder with train/ and valid/ (default: the samples)")
    parser.add_argument("--img-size", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--images", type=int, default=64, help="training images, from the start of the list")
    parser.add_argument("--valid", type=int, default=16, help="validation images")
    parser.add_argument("--epochs", type=int, default=2, help="at least 2: the first one warms up")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default=script.DEVICE)
    parser.add_argument("--workers", type=int, default=min(4, script.available_cores()))
    parser.add_argument("--precision", default="auto", help="of this version; the original is float32")
    parser.add_argument("--compile", action="store_true", help="this version with COMPILE")
    parser.add_argument("--only", nargs="+", choices=list(VERSIONS), default=list(VERSIONS), help="parts to measure")
    parser.add_argument("--versions", nargs="+", choices=list(CLASSES), default=list(CLASSES), help="of these")
    parser.add_argument("--json", help="write the result into this file, too")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    parser.add_argument("--version", help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, default=0, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(argv=None):
    options = parse(argv)
    if options.part:
        return measure(options)
    results = {}
    for part in options.only:
        for repeat in range(options.repeats):
            order = VERSIONS[part][::-1] if repeat % 2 else VERSIONS[part]  # alternating, and each one first in turn
            for version in [name for name in order if name in options.versions]:
                found = in_new_process(options, part, version, repeat)
                print(f"{part} {repeat + 1}/{options.repeats} {version}: "
                      + ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in found.items()),
                      file=sys.stderr, flush=True)
                row = results.setdefault(version, {})
                for quantity, value in found.items():
                    row.setdefault(quantity, []).append(value)
    name = torch.cuda.get_device_name(options.device) if options.device.startswith("cuda") else \
        f"CPU ({platform.processor() or platform.machine()}), {script.available_cores()} cores"
    settings = {key: value for key, value in vars(options).items() if key not in ("part", "version", "seed", "json")}
    report = {"device": name, "settings": settings, "versions": {"torch": torch.__version__}, "results": results}
    print(f"\n{name}, PyTorch {torch.__version__}, {options.img_size} px, batch {options.batch_size}, "
          f"{options.images} training and {options.valid} validation images, {options.epochs} epochs, "
          f"{options.repeats} repeats\n")
    print(table(results) + "\n")
    print(json.dumps(report))
    if options.json:
        Path(options.json).write_text(json.dumps(report, indent=2), encoding="utf-8")


if __name__ == "__main__":
    main()
