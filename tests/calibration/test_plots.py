import subprocess
import sys

import pytest
from PIL import Image

from cwdpo_bench.calibration import reliability
from cwdpo_bench.calibration.plots import reliability_diagram, save_figure
from cwdpo_bench.errors import UserError


def test_bars_stand_at_the_accuracy_of_their_bin():
    bins = reliability([0.1, 0.9, 0.95, 0.99], [0, 1, 1, 0], bins=2)
    upper, lower = reliability_diagram(bins, "a $ title").axes
    assert [bar.get_height() for bar in upper.containers[0]] == pytest.approx([0.0, 2 / 3])
    assert [bar.get_height() for bar in lower.containers[0]] == [1, 3]


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_a_diagram_is_written_in_the_format_of_its_suffix(tmp_path, suffix):
    path = tmp_path / f"reliability.{suffix}"
    save_figure(reliability_diagram(reliability([0.2, 0.8], [0, 1]), r"100 % $\nope$ <x>"), path)
    if suffix == "png":
        assert min(Image.open(path).size) > 200
    else:
        assert "<svg" in path.read_text()
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_a_diagram_in_a_place_that_cannot_be_made_is_the_user_s_error(tmp_path):
    (tmp_path / "file").write_text("")
    figure = reliability_diagram(reliability([0.2], [0]))
    with pytest.raises(UserError, match="file"):
        save_figure(figure, tmp_path / "file" / "x.png")


def test_the_room_loads_no_torch_and_no_matplotlib():
    code = (
        "import sys, cwdpo_bench.calibration; "
        "print(sorted({'torch', 'transformers', 'matplotlib'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_diagrams_load_no_torch_and_no_pyplot():
    code = (
        "import sys, cwdpo_bench.calibration.plots; "
        "print(sorted({'torch', 'matplotlib.pyplot'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
