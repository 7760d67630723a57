"""The pictures: what they show, in which colours, and that none fails where there is little to show."""

import numpy as np
import pytest
from conftest import script
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text
from test_predict_evaluate import bright, filled, write_cases

FOUND, FALSE_ALARM, MISSED = script.ANNOTATED, script.PREDICTED_COLOUR, script.MISSED


@pytest.fixture
def figures(monkeypatch):
    """The figures that are saved; they are drawn, too, because some mistakes show only then."""
    saved = []

    def save(path, figure, vector=False, inner=script.save_figure):
        saved.append(figure)
        inner(path, figure, vector)

    monkeypatch.setattr(script, "save_figure", save)
    return saved


def texts(figure):
    """Titles, labels and legend of a figure."""
    axes = figure.axes
    return [text for axis in axes for text in (axis.get_title(), axis.get_xlabel(), axis.get_ylabel()) if text] + [
        text.get_text() for legend in [*figure.legends, *(axis.get_legend() for axis in axes)] if legend
        for text in legend.get_texts()]


def test_errors_have_three_colours():
    mask, truth = filled([(2, 2, 6, 6, 1)], (12, 12)), filled([(4, 4, 6, 6, 1)], (12, 12))
    picture = script.draw_errors(np.full((12, 12, 3), 100, np.uint8), mask, truth)
    assert picture[5, 5].tolist() == [*FOUND] and picture[2, 2].tolist() == [*FALSE_ALARM]
    assert picture[9, 9].tolist() == [*MISSED] and picture[0, 0].tolist() == [50, 50, 50]


def test_outlines_are_drawn_on_an_enlarged_copy_of_a_small_image():
    image, mask = np.full((64, 48, 3), 100, np.uint8), filled([(10, 20, 20, 20, 1)], (64, 48))
    picture = script.draw_outlines(image, {FOUND: mask})
    assert picture.shape == (7 * 64, 7 * 48, 3) and (image == 100).all()
    rows, columns = np.nonzero((picture == FOUND).all(axis=2))
    assert abs(rows.min() - 140) <= 1 and abs(columns.max() - 209) <= 1
    assert picture[7 * 30, 7 * 20].tolist() == [100, 100, 100]  # inside, nothing is covered
    assert script.draw_outlines(np.zeros((640, 500, 3), np.uint8), {}).shape == (640, 500, 3)


@pytest.mark.parametrize("installed, families", [
    (["Arial"], ["DejaVu Sans"]), (["Noto Sans CJK TC", "Microsoft JhengHei"], ["DejaVu Sans", "Microsoft JhengHei"])])
def test_a_font_with_chinese_letters_is_used_where_one_is_installed(installed, families, monkeypatch):
    fonts = [type("Font", (), {"name": name}) for name in installed]
    monkeypatch.setattr(script.matplotlib.font_manager.fontManager, "ttflist", fonts)
    assert script.font_families.__wrapped__() == families


def assert_printable(figure):
    """Not wider than 16 cm, no letters below 7 points, and no text that touches a picture, another text or the edge."""
    width, height = figure.get_size_inches()
    assert width <= 16.01 / 2.54 and height <= 25 / 2.54
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    shown = [text for text in figure.findobj(Text) if text.get_text().strip() and text.get_visible()]
    assert min(text.get_fontsize() for text in shown) >= 7
    texts = [text for axis in figure.axes for text in (axis.title, axis.xaxis.label) if text.get_text()] + figure.texts
    boxes = [part.get_window_extent(canvas.get_renderer()) for part in [*texts, *figure.axes, *figure.legends]]
    for i, box in enumerate(boxes):
        assert box.x0 >= -1 and box.y0 >= -1 and box.x1 <= canvas.get_width_height()[0] + 1, texts[i:i + 1]
        assert not [texts[i:i + 1] for other in boxes[:i] if min(box.x1, other.x1) - max(box.x0, other.x0) > 1
                    and min(box.y1, other.y1) - max(box.y0, other.y0) > 1]


@pytest.mark.parametrize("name, expected", [
    ("P001_s03.png", "P001_s03"), ("folder/a_long_name_of_slice_42.png", "...me_of_slice_42"),
    ("病人編號零零七之影像切片第42張.png", "...影像切片第42張"), ("病人編號.png", "病人編號")])
def test_names_are_shortened_to_the_room_above_a_picture(name, expected):
    assert script.shortened(name) == expected


def test_a_file_name_is_no_formula(tmp_path, figures):
    """With two $, matplotlib would read one."""
    picture = np.zeros((64, 64, 3), np.uint8)
    script.plot_grid(tmp_path / "a.png", [([picture], "P$1_$2_{0", "")], ("image",), "Images", {"tumour": (0, 0, 0)})
    figure, = figures
    assert figure.axes[0].get_title() == "P$1_$2_{0"
    FigureCanvasAgg(figure).draw()


@pytest.mark.parametrize("count", [1, 5, 8, 12])
def test_cases_are_columns_with_their_scores_below(count, tmp_path, figures):
    """Found, missed, a false alarm, and nothing where nothing is; with Chinese names, in any number and shape."""
    block = (10, 10, 30, 20)
    kinds = [([block], [(*block, 255)]), ([block], []), ([], [(*block, 255)]), ([], [])]
    write_cases(tmp_path / "data", *[(annotated, filled(drawn, (64, 64 if i < 4 else 64 + 10 * i)))
                                     for i, (annotated, drawn) in enumerate((kinds * 3)[:count])])
    entries, model = script.read_coco(tmp_path / "data").entries, bright()
    rows = [script.score_test_image(script.segment(model, script.read_image(entry.path))[1], entry.mask(), 0.5)
            for entry in entries]
    cases = [(entry, "case", script.case_caption(row)) for entry, row in zip(entries, rows)]
    script.plot_cases(tmp_path / "a.png", model, cases, "Cases")
    figure, = figures
    below = [axis.get_xlabel() for axis in figure.axes if axis.get_xlabel()]
    expected = ["Dice 1.00\nIoU 1.00\nHD95 0 px", "Dice 0.00\nIoU 0.00\nnot found", "no tumour:\nfalse positive",
                "no tumour:\ncorrect"]
    assert below[:4] == expected[:count] and len(below) == count
    rows = [axis.get_ylabel() for axis in figure.axes if axis.get_ylabel()]
    assert rows == ["image", "outlines", "errors"] * -(-count // 6) and len(figure.legends[0].get_texts()) == 3
    assert_printable(figure)


@pytest.mark.parametrize("epochs, images", [(1, 1), (3, 8), (60, 200)])
def test_the_history_names_the_best_epoch_once_and_the_number_of_images(epochs, images, tmp_path, figures):
    history = [{"epoch": i + 1, "train_loss": 1 / (i + 1), "valid_loss": 1.0, "dice": 0.5 + (i == epochs // 2) / 4,
                "iou": 0.4, "lr": 5e-4 / 2 ** (i // 20)} for i in range(epochs)]
    if epochs > 1:
        del history[0]["dice"], history[0]["iou"]  # no image of this epoch had them
    script.plot_history(tmp_path / "a.png", history, images)
    found, (_, scores, rate) = texts(figures[0]), figures[0].axes
    assert found.count(f"best: epoch {epochs // 2 + 1} (0.750)") == 1
    assert f"Validation, {images} image{'s' * (images > 1)}" in found and scores.get_ylim() == (0, 1)
    assert [label.get_text() for label in rate.get_yticklabels()] == (
        ["1.3e-04", "2.5e-04", "5.0e-04"] if epochs == 60 else ["5.0e-04"])
    assert all(axis.get_ylabel() for axis in figures[0].axes)
    assert_printable(figures[0])


def test_the_warm_up_is_not_taken_for_a_schedule(tmp_path, figures):
    """It is shaded, and its rates are no ticks; a constant rate has none. The end of a run is also a PDF."""
    for rates, ticks in (([1e-4, 3e-4, 5e-4, 5e-4, 2.5e-4], ["2.5e-04", "5.0e-04"]), ([5e-4] * 5, ["5.0e-04"])):
        history = [{"epoch": i, "train_loss": 1, "valid_loss": 1, "dice": 0.5, "iou": 0.4, "lr": rate}
                   for i, rate in enumerate(rates, 1)]
        script.plot_history(tmp_path / "a.png", history, 3, len(ticks) == 2)
        rate = figures[-1].axes[2]
        assert [label.get_text() for label in rate.get_yticklabels()] == ticks
        assert [(patch.get_x(), patch.get_width()) for patch in rate.patches] == [(1, 2)] * (len(ticks) == 2)
        assert ("warm-up" in texts(figures[-1])) == (len(ticks) == 2) == (tmp_path / "a.pdf").is_file()
        (tmp_path / "a.pdf").unlink(missing_ok=True)


@pytest.mark.parametrize("sizes", [[0.0], [0.02], [0.0, 0.0, 0.01, 0.1, 0.2], [0.01] * 200])
def test_the_report_shows_any_number_of_images(sizes, tmp_path, figures):
    """Of two images without tumour one has a false alarm, and so a Dice."""
    rows, dice = [{"dice": 1 - size} for size in sizes], np.linspace(0.5, 0.7, len(script.THRESHOLDS))
    rows[0]["dice"] = rows[0]["dice"] if sizes[0] else np.nan
    scores = {"dice": 0.75, "dice_95_ci": [0.7, 0.81]} if len(sizes) > 1 else {}
    script.plot_report(tmp_path / "b.png", "test", rows, np.array(sizes), scores, 0.35)
    assert len(figures[0].axes) == 2 and not (tmp_path / "b.pdf").exists()  # without the Dice of valid
    script.plot_report(tmp_path / "a.png", "test", rows, np.array(sizes), scores, 0.35, dice)
    found, tumours, alarms = texts(figures[1]), sum(size > 0 for size in sizes), int(sizes[1:2] == [0])
    assert {f"with tumour ({tumours})", "chosen: 0.35"} <= {*found} and (tmp_path / "a.pdf").is_file()
    assert f"false alarm ({alarms} of {len(sizes) - tumours})" in found
    assert ("Dice, mean 0.750 (0.700 to 0.810)" if scores else "Dice") in found
    assert len(figures[1].axes[1].lines[0].get_xdata()) == tumours
    for figure in figures:
        assert_printable(figure)


def test_cases_are_chosen_among_images_that_have_a_dice(tmp_path, monkeypatch):
    shown = []
    monkeypatch.setattr(script, "plot_cases", lambda path, model, cases, title: shown.append(cases))
    for dice, expected in (([np.nan, 0.2, 0.9, np.nan, 0.5], "2 4 1"), ([np.nan] * 3, "0 1")):
        rows = [{"dice": value, "iou": value, "hd95_px": 1, "lesions": 1} for value in dice]
        script.plot_predictions(tmp_path / "a.png", None, [*range(len(rows))], rows)
        assert [str(case[0]) for case in shown.pop()] == expected.split()
