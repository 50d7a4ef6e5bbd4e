"""Labels and pictures of random scenes are those of Blender's own final renders.

These are always the same scenes, so that nobody's change fails for a scene that was never drawn before; ``make scenes`` looks at
thousands of others. A failure shows the smallest scene that hypothesis found, as what is not plain about it.
"""

from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, note, seed, settings

from tests import selection

from .comparison import judge
from .descriptions import CYCLES_FINAL, SOLID, Description, descriptions, plain, whole
from .process import Blenders

pytestmark = [pytest.mark.blender, pytest.mark.timeout(900)]

SCENES = 300 if selection.ALL else 30
SEED = 20787


@pytest.fixture(scope="module")
def blenders(blender_forms: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Blenders]:
    module = blender_forms.get("module", "another Blender was asked for")
    if isinstance(module, str) or module.version < (5, 1, 0):
        pytest.skip(f"no bpy module that draws off-screen: {module}")
    with Blenders(tmp_path_factory.mktemp("scenes")) as started:
        yield started


def drawn(number: int, **choices: Any) -> Any:
    """A decorator: the test gets that many scenes."""

    def decorate(test: Any) -> Any:
        limits = settings(
            max_examples=number,
            deadline=None,
            database=None,
            print_blob=False,
            suppress_health_check=list(HealthCheck),
            phases=[Phase.generate, Phase.shrink],
        )
        return seed(SEED)(limits(given(descriptions(**choices))(test)))

    return decorate


@pytest.mark.long
@drawn(SCENES, rare_renderers=())
def test_they_are_what_a_final_render_shows(blenders: Blenders, description: Description) -> None:
    verdict = judge(blenders, description)
    note(f"{plain(description)}")
    assert not verdict.unsure
    assert not verdict.disagreements


SOLIDIFIED = [{"type": "solidify", "viewport": True, "render": True, "levels": 0, "render_levels": 0}]
FOUND_ONCE: dict[str, Description] = {
    "smooth normals of what is scaled unevenly": {
        "objects": [{"kind": "cone", "scale": (0.5, 1.0, 1.5), "modifiers": SOLIDIFIED}],
    },
    "a panoramic camera's clip range begins at a distance": {
        "objects": [{}],
        "camera": {"type": "FISHEYE_EQUIDISTANT", "location": (2.0, -6.0, 5.0), "clip": (9.0, 10.0)},
        "renderer": CYCLES_FINAL,
    },
    "the middle of an object is a pixel above the picture": {
        "objects": [{}, {"location": (0.0, 2.8, 0.0)}],
        "renderer": CYCLES_FINAL,
    },
    "one plane 3 mm behind another, far away for a camera that sees from 1 mm on": {
        "objects": [{"kind": "plane"}, {"kind": "plane", "location": (0.0, 0.0, -0.014)}],
        "camera": {"clip": (0.001, 5000.0)},
        "renderer": CYCLES_FINAL,
    },
}


@pytest.mark.parametrize("found", FOUND_ONCE)
def test_what_was_wrong_once_is_right(blenders: Blenders, found: str) -> None:
    assert not judge(blenders, whole(FOUND_ONCE[found])).disagreements


MISTAKES = {
    "mask one pixel aside": "mask",
    "depth 1 % off": "depth",
    "normals of the world": "normals",
    "boxes of half the size": "boxes_3d",
    "keypoints half a pixel aside": "keypoints",
    "picture turned around": "picture",
    "labels of the frame before": "mask",
}
TURNED = {
    "objects": [{"rotation": (0.5, 1.1, -0.3)}],
    "camera": {"location": (-4.0, 3.0, 9.0), "roll": 0.4, "shift": (0.1, 0.0)},
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_that_is_planted_is_found(blenders: Blenders, mistake: str) -> None:
    description = whole({**TURNED, "renderer": CYCLES_FINAL})
    try:
        assert not judge(blenders, description).disagreements
        blenders.product.call("plant", mistake)
        judge(blenders, whole({"renderer": SOLID}))  # so that there is a frame before
        assert MISTAKES[mistake] in judge(blenders, description).disagreements
    finally:
        blenders.product.call("plant", "none")
