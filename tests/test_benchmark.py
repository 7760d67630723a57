"""The benchmark measures every version; what it finds is not judged here."""

import json
import math

import benchmark
import pytest


@pytest.mark.parametrize("part, version",
                         [(part, version) for part, versions in benchmark.VERSIONS.items() for version in versions])
def test_every_part_measures_every_version(part, version, data, capsys):
    benchmark.main(["--data", str(data), "--img-size", "64", "--batch-size", "2", "--images", "4", "--valid", "2",
                    "--workers", "0", "--device", "cpu", "--precision", "float32",
                    "--part", part, "--version", version])
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found.pop("precision") == "float32"
    assert all(math.isfinite(value) and value >= 0 for value in found.values())
    if part == "step":
        # Known sizes: the classic U-Net and UNet++ with ResNet34.
        parameters = {"original": 31.0, "this": 26.1}[version]
        assert found["parameters, million"] == pytest.approx(parameters, abs=0.05)
        # Forward 96.3 and 36.8 GFLOP at 256 px, here at 64 px; the backward pass costs about twice that.
        forward = {"original": 96.3, "this": 36.8}[version] / 16
        assert 2.5 * forward < found["GFLOP per image and step"] < 3.1 * forward
    if part == "epoch":
        assert 0 <= found["validation Dice"] <= 1


def test_the_table_compares_medians_and_names_the_spread():
    results = {"original": {"images/s, step alone": [1.0, 2.0, 3.0]}, "this": {"images/s, step alone": [8.0, 6.0, 7.0]}}
    assert "| images/s, step alone | 2 (1 ... 3) | 7 (6 ... 8) | 3.5 |" in benchmark.table(results)
