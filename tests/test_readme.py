"""The README and the repository agree with the script."""

import re
import subprocess

from conftest import ROOT, script

README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_ci_runs_the_readmes_test_command():
    command = next(line for line in README.splitlines() if "pytest tests" in line)
    assert command in (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()


def test_every_constant_stands_in_the_table_with_its_default():
    table = dict(re.findall(r"^\| `([A-Z_]+)`(?:, `STD`)? \| (.+?) \|", README, re.M))
    missing = set(script.CONSTANTS) - set(table) - {"STD"}
    assert not missing
    for name, default in table.items():
        if default.startswith("`"):
            value = getattr(script, name)
            shown = default.strip("`")
            assert str(value) == shown or float(shown) == value, name


def test_the_loading_recipe_is_the_one_that_is_tested():
    recipe = ('model = smp.UnetPlusPlus(encoder_name="resnet34", encoder_weights=None, in_channels=3, classes=1)\n'
              'model.load_state_dict(torch.load("unet_plusplus_best.pth"))')
    assert recipe in README


def test_every_output_file_is_explained_and_ignored_by_git(tmp_path):
    for name in script.RUN_FILES:
        assert name in README or name.removesuffix(".png") + ".csv`, `.png" in README, name
        assert subprocess.run(["git", "check-ignore", "-q", name], cwd=ROOT).returncode == 0, name


def test_the_pictures_of_the_readme_exist():
    for path in re.findall(r"!\[[^]]*\]\(([^)]+)\)", README):
        assert (ROOT / path).is_file()


def test_the_top_level_holds_what_was_agreed_and_nothing_else():
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, encoding="utf-8", check=True).stdout
    visible = {line.split("/")[0] for line in tracked.splitlines() if not line.startswith(".")}
    assert visible == {"brain_tumor_integrated_smp.py", "requirements_smp.txt", "README.md", "tests", "train", "valid",
                       "test"}
