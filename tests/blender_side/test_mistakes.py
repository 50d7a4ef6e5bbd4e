"""What scripts do that cannot work, and what they are told: an error instead of a crash, and what to do."""

import re
from typing import Any

import pytest

from .conftest import IN_EACH_BLENDER

pytestmark = [pytest.mark.timeout(300), IN_EACH_BLENDER]


@pytest.fixture(scope="module")
def told(saved_by: Any) -> dict[str, str]:
    return {name: str(text) for name, text in saved_by("mistakes.py").items()}


def test_nothing_is_rendered_in_another_thread(told: dict[str, str]) -> None:
    said = {name: text for name, text in told.items() if name.startswith("thread: ")}
    assert len(said) == 7
    for text in said.values():
        assert text.startswith("ConfigurationError")
        assert "main thread" in text
        assert "'the other one'" in text


def test_a_picture_that_is_too_large_is_an_error_with_the_limit(told: dict[str, str]) -> None:
    if "limit" not in told:
        pytest.skip("this Blender makes final renders")
    limit = int(told["limit"])
    for what in ("size: a picture", "size: a final picture", "size: labels"):
        assert told[what].startswith("ConfigurationError")
        assert f"4 x {limit + 1}" in told[what]
        assert f"{limit} to a side" in told[what]
    assert told["size: as before"] == told["size: a final picture as before"] == "nothing"


def test_a_name_in_place_of_an_object_is_told_what_there_is(told: dict[str, str]) -> None:
    for what in ("objects: misspelt", "objects: under a name"):
        assert "called 'Cuube'" in told[what]
        assert "bpy.data.objects['Cube']" in told[what]
    assert "'Cube' is a name" in told["objects: a name"]
    assert "bpy.data.objects['Cube']" in told["objects: a name"]
    assert "called 'qqqqqq'" in told["objects: nothing like it"]


def test_an_object_of_the_file_before_is_an_error_that_says_so(told: dict[str, str]) -> None:
    for what in ("pixels", "a box", "labels", "a camera", "keypoints"):
        assert told[f"gone: {what}"].startswith("ObjectGone"), what
        assert "another file was opened" in told[f"gone: {what}"]
    assert told["gone: anew"] == "nothing"


def test_triton_is_refused_where_it_would_crash_beside_software_opengl(told: dict[str, str]) -> None:
    said = [text for name, text in told.items() if name.startswith("triton: ") and name != "triton: is there"]
    if not said:
        pytest.skip("this Blender draws on a graphics card, or not at all")
    assert len(said) == 3
    for text in said:
        assert text.startswith("ImportError")
        assert "`import triton` at the top of the script" in text
    assert told["log"].count("`import triton` at the top of the script") == 1


def test_a_final_render_by_opengl_says_what_draws(told: dict[str, str]) -> None:
    if "limit" not in told:
        pytest.skip("this Blender does not tell")
    on = re.findall(r"off-screen on (.+)\. The first", told["log"])[0]
    assert f"final renders (BLENDER_WORKBENCH on {on})" in told["log"]


def test_software_is_told_by_the_launcher_and_not_by_each_log(told: dict[str, str]) -> None:
    assert "SOFTWARE" not in told["log"]
