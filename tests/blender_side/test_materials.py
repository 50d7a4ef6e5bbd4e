"""Materials look as they promise, in both engines that show them."""

import numpy as np
import pytest

from .conftest import IN_EACH_BLENDER

pytestmark = [pytest.mark.timeout(300), IN_EACH_BLENDER]


@pytest.fixture(scope="module")
def rendered(saved_by):
    return saved_by("materials.py")


@pytest.mark.parametrize("engine", ["EEVEE", "CYCLES"])
def test_the_normal_material_shows_camera_space_normals_as_linear_colours(rendered, engine):
    seen = rendered["seen"]
    assert seen.sum() == 3
    assert (rendered["normals"][seen, 2] > 0).all()
    for (x, y), normal in zip(rendered["xy"][seen], rendered["normals"][seen], strict=True):
        np.testing.assert_allclose(rendered[engine][int(y), int(x)], 255 * (normal + 1) / 2, atol=2)


def test_the_material_has_the_name_that_was_asked_for(rendered):
    assert str(rendered["name"]) == "normals"
