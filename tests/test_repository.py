"""README, script and repository agree; also in an unpacked archive without git."""

import fnmatch
import os
import re
import shutil
import subprocess

import pytest
from conftest import ROOT, script

README = (ROOT / "README.md").read_text(encoding="utf-8")
IGNORED = [line.rstrip("/") for line in (ROOT / ".gitignore").read_text().splitlines() if line and line[0] != "#"]
AGREED = {"brain_tumor_integrated_smp.py", "requirements_smp.txt", "README.md", "tests", "train", "valid", "test"}
MACHINE_PATHS = re.compile(r"(?<![\w.~-])/(?:work|opt|root|tmp|home|Users|mnt)/|[A-Z]:\\Users")


def ignored(path):
    """Whether .gitignore leaves out a file; its patterns are names without folders."""
    return any(fnmatch.fnmatch(part, pattern) for part in path.parts for pattern in IGNORED)


def tracked():
    """Files in the repository, as git says, or None without git or without its folder."""
    if not (ROOT / ".git").exists() or not shutil.which("git"):
        return None
    done = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, encoding="utf-8")
    return [name for name in done.stdout.split("\0") if (ROOT / name).is_file()] if done.returncode == 0 else None


def texts():
    """(name, content) of the text files of the project, with git or without."""
    found = [path for pattern in ("*", ".ci/*", "tests/*", "train/*.json", "valid/*.json", "test/*.json")
             for path in sorted(ROOT.glob(pattern)) if path.is_file() and not ignored(path.relative_to(ROOT))]
    return [(str(path.relative_to(ROOT)), path.read_text(encoding="utf-8")) for path in found]


def test_ci_runs_the_readmes_test_command():
    command = next(line for line in README.splitlines() if "pip install" in line and "pytest tests" in line)
    lines = (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()
    assert any(line.strip().startswith(command) for line in lines)


def test_the_settings_table_is_that_of_the_script():
    """Every constant with its value; a default that is described instead stands without code quotes."""
    table = {name: default for names, default in re.findall(r"^\| ((?:`[A-Z_]+`(?:, )?)+) \| (.+?) \|", README, re.M)
             for name in re.findall(r"[A-Z_]+", names)}
    assert set(table) == set(script.CONSTANTS)
    described = {name for name, default in table.items() if not default.startswith("`")}
    assert described <= {"DATA_DIR", "OUTPUT_DIR", "MEAN", "STD", "DEVICE"}
    for name in set(table) - described:
        value, shown = getattr(script, name), table[name].strip("`")
        assert str(value) == shown or type(value) in (int, float) and float(shown) == value, name


def test_the_loading_recipe_is_the_one_that_is_tested():
    assert ('model = smp.UnetPlusPlus(encoder_name="resnet34", encoder_weights=None, in_channels=3, classes=1)\n'
            'model.load_state_dict(torch.load("unet_plusplus_best.pth"))\nmodel.eval()') in README


@pytest.mark.parametrize("name", script.RUN_FILES)
def test_every_output_file_is_explained_and_ignored_by_git(name):
    explained = re.findall(r"^\| (`[^|]+`) \| .{20,}", README, re.M)  # the first cells of the tables
    assert any(f"`{name}`" in cell or f"`{name.removesuffix('.png')}.csv`, `.png`" == cell for cell in explained)
    assert any(fnmatch.fnmatch(name, pattern) for pattern in IGNORED)


@pytest.mark.parametrize("name", [".brain_tumor.lock", ".unet_plusplus_last.pth.tmp", "earlier_run_20260101-000000_1",
                                  "predictions", "predictions_2", "__pycache__", ".venv"])
def test_other_things_that_a_run_leaves_are_ignored_too(name):
    assert any(fnmatch.fnmatch(name, pattern) for pattern in IGNORED)


def test_the_pictures_of_the_readme_exist():
    pictures = re.findall(r"!\[[^]]*\]\(([^)]+)\)", README)
    assert pictures and all((ROOT / path).is_file() for path in pictures)


def test_the_links_within_the_readme_lead_somewhere():
    headings = {re.sub(r"[^\w\- ]", "", line.lstrip("# ").lower()).replace(" ", "-")
                for line in README.splitlines() if line.startswith("#")}
    assert set(re.findall(r"\]\(#([^)]+)\)", README)) <= headings


def test_the_top_level_holds_what_was_agreed_and_nothing_else():
    """Without git nobody knows which of the other files are the user's."""
    assert AGREED <= set(os.listdir(ROOT))
    names = tracked()
    assert names is None or {name.split("/")[0] for name in names if name[0] != "."} == AGREED


def test_no_file_names_a_folder_of_one_machine():
    found = texts()
    assert {"README.md", script.__name__ + ".py", ".ci/run", "tests/conftest.py"} <= {name for name, _ in found}
    assert [f"{name}: {match[0]}" for name, text in found for match in MACHINE_PATHS.finditer(text)] == []
