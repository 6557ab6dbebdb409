import re
from pathlib import Path
from xml.etree import ElementTree

import matplotlib
import numpy
import pytest
import torch

from paperworks.lab import Lab
from paperworks.lab.figures import MOST_BYTES


def test_pick_follows_the_scale_and_large_falls_back_to_small():
    assert [Lab(scale).pick(smoke=1, small=2, large=3) for scale in ("smoke", "small", "large")] == [1, 2, 3]
    assert Lab("large").pick(smoke=1, small=2) == 2


def test_an_unknown_scale_names_the_known_ones():
    with pytest.raises(ValueError, match=r"unknown scale 'big'.*small"):
        Lab("big")


def test_track_yields_every_item_also_of_a_generator_and_counts_to_a_number():
    lab = Lab()
    assert list(lab.track(3, "counting")) == [0, 1, 2]
    assert list(lab.track((letter for letter in "abc"), "letters", total=3)) == ["a", "b", "c"]


def draw(lab, name="curve"):
    with lab.figure(name, figsize=(4, 3)) as figure:
        axes = figure.subplots()
        axes.plot([0, 1, 2], [0, 1, 4], label="measured")
        axes.legend()


def test_a_figure_is_a_light_svg_that_is_the_same_every_time():
    first, second = Lab(stem="key"), Lab(stem="key")
    draw(first)
    draw(second)
    assert list(first.images) == ["key-curve.svg"]
    assert first.images == second.images
    content = first.images["key-curve.svg"]
    assert len(content) < 30_000
    assert ElementTree.fromstring(content).tag.endswith("svg")
    assert b">measured</text>" in content  # text stays text


def test_drawing_leaves_no_trace_in_matplotlibs_global_state():
    before = dict(matplotlib.rcParams)
    draw(Lab())
    assert dict(matplotlib.rcParams) == before


def test_a_figure_of_very_many_points_becomes_a_png_that_is_still_light():
    lab = Lab()
    noise = numpy.random.default_rng(0)
    with lab.figure("cloud") as figure:
        figure.subplots().scatter(noise.normal(size=20_000), noise.normal(size=20_000), s=2)
    assert list(lab.images) == ["lab-cloud.png"]
    assert lab.images["lab-cloud.png"].startswith(b"\x89PNG")
    assert len(lab.images["lab-cloud.png"]) <= MOST_BYTES


def test_a_figure_whose_drawing_fails_is_not_recorded():
    lab = Lab()
    with pytest.raises(RuntimeError), lab.figure("broken"):
        raise RuntimeError
    assert lab.images == {}


@pytest.mark.parametrize("name", ["../escape", "Two words", "", "a/b", "-a"])
def test_a_figure_name_that_is_no_file_name_is_refused(name):
    with pytest.raises(ValueError, match="lower-case words joined by hyphens"), Lab().figure(name):
        pass


def test_two_figures_of_one_name_are_refused():
    lab = Lab()
    draw(lab)
    with pytest.raises(ValueError, match="already has a figure named 'curve'"):
        draw(lab)


def test_a_table_has_one_plain_value_a_column():
    lab = Lab()
    lab.table("Sizes", ["name", "size"], [["a", numpy.int64(3)], ["b", 4]])
    assert lab.tables == [{"title": "Sizes", "columns": ["name", "size"], "rows": [["a", 3], ["b", 4]]}]
    with pytest.raises(ValueError, match="row 0 of table 'Bad' has 1 cells for 2 columns"):
        lab.table("Bad", ["name", "size"], [["a"]])
    with pytest.raises(ValueError, match=re.escape("'Bad, row 0, size' is nan")):
        lab.table("Bad", ["name", "size"], [["a", float("nan")]])


def test_the_users_model_and_data_take_the_place_of_the_claims_own(tmp_path):
    plain = Lab()
    assert (plain.model_name("smollm2"), plain.data_file("a.txt")) == ("smollm2", Path("a.txt"))
    assert plain.choices == {}
    chosen = Lab(model="org/other", data=tmp_path / "b.txt")
    assert chosen.choices == {}  # a choice that no claim uses is not recorded
    assert (chosen.model_name("smollm2"), chosen.data_file("a.txt")) == ("org/other", tmp_path / "b.txt")
    assert chosen.choices == {"model": "org/other", "data": "b.txt"}


def test_threads_are_put_back_also_after_an_error():
    before, seen = torch.get_num_threads(), []

    def fail():
        with Lab().threads(before + 1):
            seen.append(torch.get_num_threads())
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert seen == [before + 1]
    assert torch.get_num_threads() == before
