"""How much faster, smaller and better than the original version? Measured here and now, on your data and machine.

    python tests/benchmark.py --data FOLDER                                    speed, at 256 px
    python tests/benchmark.py --data FOLDER --only loader --images 512 --workers 2 --repeats 5
    python tests/benchmark.py --data FOLDER --only step --precision bfloat16
    python tests/benchmark.py --data FOLDER --only epoch --versions this unsaved --images 512 --epochs 10 --output DISK
    python tests/benchmark.py --data FOLDER --only accuracy --json accuracy.json --picture accuracy.png
    python tests/benchmark.py --data FOLDER --only accuracy --encoder-weights imagenet       from ImageNet weights, too

Every measurement runs in a process of its own, the versions take turns, and medians with the smallest and the largest
value of all repeats are printed, as Markdown and as JSON. Compare numbers of one run only: machines have moods.

  original        from-scratch U-Net (64 ... 1024 channels), float32, Adam, BCE + Dice, flips and brightness, every
                  image decoded, its polygons filled by OpenCV, resized by INTER_LINEAR in every epoch; saves nothing
  this            brain_tumor_integrated_smp.py through its own functions, from random weights
  pretrained      (accuracy only, if --encoder-weights is given) the same, from these weights of --encoder
  unsaved         (epoch only) the same, but nothing is saved: what saving costs
  straightforward (loader only) this script's decoding, rasterising, resizing, augmentation and normalisation, but for
                  every image in every epoch and with float32 tensors as batches: what the cache and uint8 batches save

An epoch is all that a run does from one printed line to the next: training, validation, and the save before it, if
there was one (SAVE_SECONDS); the last save is not in it. Validation Dice is scored alike for all: the mean over images
at the network's size, threshold 0.5, against the masks of this script. The part "accuracy" compares it after every
epoch, with another seed in each repeat; its seconds are training and what is read before it, without validation and
saving, for all. On one core (taskset -c 0, --workers 0, no GPU) they are seconds of the processor, which another
program on that core does not lengthen.
"""

import argparse
import contextlib
import functools
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import cv2
import numpy as np
import torch
from matplotlib.figure import Figure
from torch.utils.flop_counter import FlopCounterMode

import brain_tumor_integrated_smp as script

VERSIONS = {"loader": ("straightforward", "original", "this"), "step": ("original", "this"),
            "epoch": ("original", "this", "unsaved"), "accuracy": ("original", "this", "pretrained")}
DEFAULTS = {"img_size": 256, "images": 64, "valid": 16, "epochs": 3, "repeats": 3}
ACCURACY = {"img_size": 64, "images": 256, "valid": 128, "epochs": 4, "repeats": 5}
STEPS = 5  # timed steps of the part "step", after as many that are not


def now(options):
    """Seconds: of the processor, where one core does one thing at a time, or else of the clock on the wall."""
    alone = options.part == "accuracy" and options.workers == 0 and script.available_cores() == 1
    return time.process_time() if alone and options.device == "cpu" else time.perf_counter()


def clock(function, seconds, options):
    """The same function, which notes in a list how long every call takes."""
    def call(*arguments, **keywords):
        began = now(options)
        result = function(*arguments, **keywords)
        seconds.append(now(options) - began)
        return result

    return call


# ===== The original version, whole ====================================================================================


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
        self.device, self.options, self.close = device, options, lambda: None

    def build(self):
        self.model = UNet().to(self.device)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=1e-4)

    def open_data(self):
        o, self.loaders = self.options, {}
        for name, count in (("train", o.images), ("valid", o.valid)):
            dataset = OriginalDataset(Path(o.data) / name, o.img_size, count, name == "train")
            self.loaders[name] = torch.utils.data.DataLoader(dataset, o.batch_size, shuffle=name == "train",
                                                             num_workers=o.workers)
        self.truth = [torch.from_numpy(script.resize_mask(entry.mask(), o.img_size, o.img_size))[None]
                      for entry in script.read_coco(Path(o.data) / "valid").entries[:o.valid]]

    def train_loader(self, epoch):
        return self.loaders["train"]

    def train(self, batches, epoch=0):
        self.model.train()
        for images, masks in batches:
            images, masks = images.to(self.device), masks.to(self.device)
            self.optimizer.zero_grad()
            loss = bce_and_dice(self.model(images), masks)
            loss.backward()
            self.optimizer.step()
            loss.item()  # such scripts print it

    def validate(self):
        """Mean Dice per image."""
        self.model.eval()
        with torch.no_grad():
            probabilities = torch.cat([self.model(images.to(self.device)).sigmoid().cpu()
                                       for images, _ in self.loaders["valid"]])
        return float(script.image_metrics(probabilities, torch.stack(self.truth))["dice"].nanmean())

    def fit(self):
        """All epochs: seconds of each, seconds of its training, and validation Dice; and what more there is to say."""
        seconds, training, dice = [], [], []
        for epoch in range(self.options.epochs):
            began = time.perf_counter()
            clock(self.train, training, self.options)(self.train_loader(epoch), epoch)
            dice.append(self.validate())
            seconds.append(time.perf_counter() - began)
        return seconds, training, dice, {}


# ===== This version, through the script's own functions ===============================================================


class This:
    """What train() of the script does, without the evaluation at its end."""

    def __init__(self, options, device):
        self.cfg, pretrained = script.default_settings(), options.version == "pretrained"
        self.folder = tempfile.TemporaryDirectory(dir=options.output, ignore_cleanup_errors=True)
        vars(self.cfg).update(DATA_DIR=options.data, IMG_SIZE=options.img_size, BATCH_SIZE=options.batch_size,
                              NUM_WORKERS=options.workers, DEVICE=str(device), PRECISION=options.precision,
                              ENCODER_WEIGHTS=options.encoder_weights if pretrained else None, SEED=options.seed,
                              COMPILE=options.compile, EPOCHS=options.epochs,
                              EARLY_STOPPING_PATIENCE=0, OUTPUT_DIR=self.folder.name)
        if pretrained:
            vars(self.cfg).update(ENCODER=options.encoder, MEAN=tuple(options.mean), STD=tuple(options.std))
        self.options, self.device, self.splits, self.cache = options, device, {}, None
        self.precision = str(script.amp_dtype(self.cfg.PRECISION, device)).removeprefix("torch.")
        self.saving = options.part == "epoch" and options.version != "unsaved"
        script.keep_memory()
        script.set_up_machine(self.cfg, device)

    def build(self):
        steps = -(-self.options.images // (self.options.batch_size * self.cfg.ACCUMULATION_STEPS))
        self.trainer = script.Trainer(self.cfg, self.device, "", steps)
        self.model = self.trainer.model
        self.criterion = script.LOSSES[self.cfg.LOSS]

    def open_data(self):
        """The whole audit and cache, for the images asked for."""
        o, read_coco = self.options, script.read_coco

        def limited(folder, categories):
            split = read_coco(folder, categories)
            del split.entries[o.images if folder.name == "train" else o.valid:]
            return split

        with mock.patch.object(script, "read_coco", limited):
            self.splits, self.cache = script.prepare_data(self.cfg, ["train", "valid"], Path(self.cfg.OUTPUT_DIR))
        self.loaders = {name: script.make_loader(script.BrainTumorDataset(
            Path(o.data) / name, o.img_size, name == "train", self.cfg.SEED, False, entries=split.entries,
            cache=self.cache), self.cfg, train=name == "train") for name, split in self.splits.items()}

    def train_loader(self, epoch):
        self.loaders["train"].batch_sampler.set_epoch(epoch)
        return self.loaders["train"]

    def train(self, batches, epoch=0):
        return script.train_one_epoch(self.trainer.parallel_model, batches, self.criterion, self.trainer.optimizer,
                                      self.trainer.scaler, self.device, cfg=self.cfg, epoch=epoch,
                                      after_step=self.trainer.after_step)

    def fit(self):
        """As Original.fit(), by Trainer.fit(), saving as a run does; or without any saving."""
        trainer, training, saving = self.trainer, [], []
        metadata = script.describe_run(trainer, self.splits)
        save = clock(functools.partial(script.save_run, trainer, metadata), saving, self.options)
        with mock.patch.object(script, "train_one_epoch", clock(script.train_one_epoch, training, self.options)):
            trainer.fit(self.loaders, self.criterion, save if self.saving else lambda: None)
        more = {"saves": len(saving), "seconds of a save": statistics.mean(saving)} if saving else {}
        return ([row["seconds"] for row in trainer.history], training, [row["dice"] for row in trainer.history], more)

    def close(self):
        script.remove_cache(Path(self.cfg.OUTPUT_DIR))
        self.folder.cleanup()


class Straightforward(This):
    """For the part "loader": everything again for every image in every epoch, tensors as batches."""

    def open_data(self):
        o, folder = self.options, Path(self.options.data) / "train"
        entries = script.read_coco(folder).entries[:o.images]
        dataset = script.BrainTumorDataset(folder, o.img_size, train=True, entries=entries)
        self.loader = torch.utils.data.DataLoader(dataset, o.batch_size, shuffle=True, num_workers=o.workers,
                                                  worker_init_fn=script.init_worker, persistent_workers=o.workers > 0)

    def train_loader(self, epoch):
        return self.loader


CLASSES = {"original": Original, "this": This, "pretrained": This, "unsaved": This, "straightforward": Straightforward}


# ===== Measurements, each in a process of its own =====================================================================


def wait_for(device):
    """Until the GPU has done everything it was asked for."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextlib.contextmanager
def peak_memory(device):
    """Gives a list of one number, after the block the peak in MB: of a GPU as PyTorch counts it, or else what the
    resident set (on Linux; 0 elsewhere) has grown by, mapped pages of the cache file included."""
    def resident():
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6

    def watch(start):
        while not ended.wait(0.02):
            peak[0] = max(peak[0], resident() - start)

    peak, ended = [0.0], threading.Event()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        yield peak
        peak[0] = torch.cuda.max_memory_allocated(device) / 1e6
    elif sys.platform == "linux":
        threading.Thread(target=watch, args=[resident()], daemon=True).start()
        yield peak
        ended.set()
    else:
        yield peak


def measure_loader(version, options, device):
    """Images/s of the training loader alone, from the second epoch on."""
    version.open_data()
    rates = []
    for epoch in range(max(2, options.epochs)):
        began = time.perf_counter()
        images = sum(len(images) for images, _ in version.train_loader(epoch))
        rates.append(images / (time.perf_counter() - began))
    return {"images/s, loader alone": statistics.median(rates[1:])}


def matrix_rate(precision, device, seconds=1.0):
    """FLOP/s of a large square matrix product in a precision."""
    size, times = (2048, 1) if device.type == "cpu" else (8192, 10)
    a, b = (torch.randn(size, size, device=device, dtype=getattr(torch, precision)) for _ in range(2))
    best, ended = 0.0, time.perf_counter() + seconds
    while best == 0 or time.perf_counter() < ended:
        wait_for(device)
        began = time.perf_counter()
        for _ in range(times):
            a @ b
        wait_for(device)
        best = max(best, 2 * size**3 * times / (time.perf_counter() - began))
    return best


def measure_step(version, options, device):
    """Images/s, memory and FLOP/s of the training step, fed with one batch that is in memory already."""
    rng = np.random.default_rng(0)
    size = (options.batch_size, options.img_size, options.img_size)
    images, masks = rng.integers(0, 256, (*size, 3), np.uint8), (rng.random(size) < 0.05).astype(np.uint8)
    with peak_memory(device) as peak:
        version.build()
        batch = (images, masks) if options.version == "this" else (
            torch.from_numpy(images).permute(0, 3, 1, 2).float().div(255).contiguous(),
            torch.from_numpy(masks)[:, None].float())
        version.train([batch] * 2)
    with FlopCounterMode(display=False) as counter:  # of matrix products and convolutions
        version.train([batch])
    flops = counter.get_total_flops()
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
            "images/s, step alone": rate, "peak memory of the step, MB": peak[0],
            "GFLOP per image and step": flops / len(images) / 1e9,
            "GFLOP/s of the step": achieved / 1e9, "GFLOP/s of a matrix product": possible / 1e9,
            "share of the matrix product, %": 100 * achieved / possible}


def measure_epoch(version, options, device):
    """Whole epochs with all that belongs to them; the rate is that of those after the first, which still warms up."""
    began = time.perf_counter()
    with peak_memory(device) as peak:
        version.open_data()
        version.build()
        prepared = time.perf_counter() - began
        seconds, _, dice, more = version.fit()
    usual = statistics.mean(seconds[1:] or seconds)
    return {"seconds before the first epoch": prepared, "seconds per epoch": usual,
            "images/s, whole epoch": len(version.loaders["train"].dataset) / usual, **more,
            "peak memory, MB": peak[0], "validation Dice": dice[-1]}


def measure_accuracy(version, options, device):
    """Validation Dice after every epoch, and the seconds until then: reading the data, and training."""
    reading = []
    clock(version.open_data, reading, options)()
    version.build()
    _, training, dice, _ = version.fit()
    rows = enumerate(zip(dice, reading[0] + np.cumsum(training)), 1)
    return {name: value for epoch, row in rows for name, value in zip(
        (f"validation Dice, epoch {epoch}", f"seconds until epoch {epoch}"), map(float, row))}


def measure(options):
    """In the process of one measurement: print its result as the last line."""
    torch.manual_seed(options.seed)
    np.random.seed(options.seed)
    cv2.setNumThreads(0)
    device = torch.device(options.device)
    version = CLASSES[options.version](options, device)
    try:
        result = globals()["measure_" + options.part](version, options, device)
    finally:
        version.close()
    print(json.dumps({"precision": version.precision, **result}))


# ===== The comparison =================================================================================================


def in_new_process(options, part, version, seed):
    """One measurement. Returns its numbers."""
    names = ("data", "img_size", "batch_size", "images", "valid", "epochs", "device", "workers", "precision", "output",
             "encoder", "encoder_weights", "mean", "std")
    words = []
    for name in names:
        value = getattr(options, name)
        if value is not None:
            words += ["--" + name.replace("_", "-"), *map(str, value if isinstance(value, (list, tuple)) else [value])]
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
    for other, quantity in (("straightforward", "images/s, loader alone"), ("unsaved", "images/s, whole epoch")):
        pairs = [results.get(name, {}).get(quantity, []) for name in ("this", other)]
        if ratios := [mine / its for mine, its in zip(*pairs)]:
            lines.append(f"\n{quantity}, this / {other}, pair by pair: median {statistics.median(ratios):.3g}, "
                         f"{min(ratios):.3g} ... {max(ratios):.3g}")
    return "\n".join(lines)


def curves(results):
    """Of the part "accuracy": by version an array [epochs, 2, seeds] of validation Dice and seconds until then."""
    numbers = {version: [values for values in row.values() if not isinstance(values[0], str)]
               for version, row in results.items()}
    return {version: np.array(rows).reshape(-1, 2, len(rows[0])) for version, rows in numbers.items()}


def verdict(found, version):
    """A version and the original in a sentence. found: of curves(); pairs have the same seed.

    "In the same time" is when this version has done all epochs; between two epochs the original's Dice is a line.
    """
    def in_words(differences):
        points = statistics.median(100 * np.array(differences))
        return f"{abs(points):.1f} points {'better' if points >= 0 else 'worse'}"

    original, this = found["original"], found[version]
    same_time, speed = [], []
    for (old, its), (new, mine) in zip(original.transpose(2, 1, 0), this.transpose(2, 1, 0)):
        same_time.append(new[-1] - np.interp(mine[-1], its, old))
        reached = np.flatnonzero(new >= old.max())  # the first epoch that is as good as the original's best one
        speed.append(its[old.argmax()] / mine[reached[0]] if len(reached) else 0.0)
    middle = statistics.median(speed)
    reaches = f"reaches the original's best Dice in 1/{middle:.1f} of its time" if middle else \
        "does not reach the original's best Dice"
    return (f"{in_words(this[-1, 0] - original[-1, 0])} at equal epochs, {in_words(same_time)} in the same time, "
            f"{reaches} (medians of {len(speed)} pairs; reached in {np.count_nonzero(speed)}, factors {min(speed):.1f} "
            f"... {max(speed):.1f})")


def plot_accuracy(path, found, title):
    """Dice against epochs and against seconds: the median of all seeds as a line, all of them as a band."""
    figure = Figure(figsize=(9, 4), layout="constrained")
    figure.suptitle(title, fontsize=9)
    left, right = figure.subplots(1, 2, sharey=True)
    labels = {"original": "original version", "this": "this version, random weights",
              "pretrained": "this version, ImageNet weights"}
    for version, colour in zip(labels, ("tab:orange", "tab:blue", "tab:green")):
        if version not in found:
            continue
        dice, seconds = found[version].transpose(1, 0, 2)
        for axis, x in ((left, np.arange(1, len(dice) + 1)), (right, np.median(seconds, axis=1))):
            axis.plot(x, np.median(dice, axis=1), marker="o", color=colour, label=labels[version])
            axis.fill_between(x, dice.min(axis=1), dice.max(axis=1), color=colour, alpha=0.2, linewidth=0)
            axis.grid(alpha=0.3)
    left.set(title="At equal epochs", xlabel="epoch", ylabel="validation Dice (mean over images)", ylim=(0, None))
    left.xaxis.get_major_locator().set_params(integer=True)
    left.legend(loc="lower right")
    right.set(title="At equal time", xlabel="seconds of reading and training", xlim=(0, None))
    script.write_file(Path(path), lambda file: figure.savefig(file, format="png", dpi=100))


def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default=script.DATA_DIR, help="folder with train/ and valid/ (default: the samples)")
    parser.add_argument("--img-size", type=int)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--images", type=int, help="training images, from the start of the list")
    parser.add_argument("--valid", type=int, help="validation images")
    parser.add_argument("--epochs", type=int, help="at least 2: the first warms up")
    parser.add_argument("--repeats", type=int, help="each with another seed")
    parser.add_argument("--device", default=str(script.find_device(script.DEVICE)))
    parser.add_argument("--workers", type=int, default=min(4, script.available_cores()))
    parser.add_argument("--encoder", default=script.ENCODER, help="of the version pretrained, as are the next three")
    parser.add_argument("--encoder-weights", help="imagenet, or a file; without it that version is left out")
    parser.add_argument("--mean", nargs=3, type=float, default=script.MEAN)
    parser.add_argument("--std", nargs=3, type=float, default=script.STD)
    parser.add_argument("--precision", default="auto", help="of this version; the original is float32")
    parser.add_argument("--compile", action="store_true", help="this version with COMPILE")
    parser.add_argument("--only", nargs="+", choices=list(VERSIONS), default=["loader", "step", "epoch"],
                        help=f"parts to measure; accuracy only by itself, with defaults of its own: {ACCURACY}")
    parser.add_argument("--versions", nargs="+", choices=list(CLASSES), default=list(CLASSES), help="of these")
    parser.add_argument("--output", default=tempfile.gettempdir(), help="on the disk that takes the checkpoints")
    parser.add_argument("--json", help="write the result into this file, too")
    parser.add_argument("--picture", help="draw the curves of the part accuracy into this file")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    parser.add_argument("--version", help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, default=0, help=argparse.SUPPRESS)
    only = parser.parse_args(argv).only
    if "accuracy" in only and len(only) > 1:
        parser.error("accuracy is measured by itself")
    parser.set_defaults(**(ACCURACY if only == ["accuracy"] else DEFAULTS))
    return parser.parse_args(argv)


def main(argv=None):
    options = parse(argv)
    if options.part:
        return measure(options)
    results = {}
    if not options.encoder_weights:
        options.versions = [name for name in options.versions if name != "pretrained"]
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
    sizes = (f"{options.img_size} px, batch {options.batch_size}, {options.images} training and {options.valid} "
             f"validation images, {options.epochs} epochs, {options.repeats} repeats")
    print(f"\n{name}, PyTorch {torch.__version__}, {sizes}\n\n{table(results)}\n")
    if options.only == ["accuracy"] and "original" in results:
        found = curves(results)
        report["verdicts"] = {version: verdict(found, version) for version in results if version != "original"}
        print("\n".join(f"{version}: {sentence}" for version, sentence in report["verdicts"].items()) + "\n")
    if options.picture:
        plot_accuracy(options.picture, curves(results), f"{name}, {sizes}")
    print(json.dumps(report))
    if options.json:
        Path(options.json).write_text(json.dumps(report, indent=2), encoding="utf-8")


if __name__ == "__main__":
    main()
