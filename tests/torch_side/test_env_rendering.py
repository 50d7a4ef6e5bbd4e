"""Windows that show pictures; here nobody looks."""

from pathlib import Path

import numpy as np
import pytest

from blendtorch_shm.errors import ConfigurationError
from torch_side import env_rendering


def test_pictures_are_shown_one_after_the_other(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setenv("MPLBACKEND", "agg")
    monkeypatch.setenv("MPLCONFIGDIR", str(tmp_path))
    viewer = env_rendering.create_renderer(figsize=(2, 1))
    assert isinstance(viewer, env_rendering.MatplotlibRenderer)
    for value, shape in ((0, (8, 16, 3)), (255, (8, 16, 3)), (128, (4, 4, 3))):
        viewer.imshow(np.full(shape, value, np.uint8))
        shown = viewer.img.get_array()
        assert shown.shape == shape
        assert (shown == value).all()
    viewer.close()
    viewer.close()


def test_a_backend_that_is_not_there_is_an_error_that_lists_those_that_are() -> None:
    with pytest.raises(ConfigurationError, match="'openai' is not known; there are: matplotlib"):
        env_rendering.create_renderer("openai")
