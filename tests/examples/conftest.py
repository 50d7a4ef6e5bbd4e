"""Examples run whole programs, for up to half a minute each: once will do where other tests cover every form of Blender."""

from typing import Any

import pytest


@pytest.fixture
def a_blender(blender_forms: dict[str, Any]) -> Any:
    """The first form of Blender that is here and draws off-screen."""
    for blender in blender_forms.values():
        if not isinstance(blender, str) and (blender.form == "executable" or blender.version >= (5, 1, 0)):
            return blender
    pytest.skip(f"no Blender that draws off-screen: {', '.join(map(str, blender_forms.values()))}")
