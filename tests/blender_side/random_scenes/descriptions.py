"""Descriptions of small scenes: what there is to choose, and how hypothesis draws from it.

A description is a dict that survives JSON. All of its keys are always there. The first value of each choice is the plainest one,
which is what shrinking ends with.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from hypothesis import strategies as st

Description = dict[str, Any]

SOLID, EEVEE, CYCLES_FINAL, WORKBENCH_FINAL, EEVEE_FINAL = "SOLID", "EEVEE", "CYCLES final", "WORKBENCH final", "EEVEE final"
RENDERERS = (SOLID, CYCLES_FINAL, WORKBENCH_FINAL)
"""What makes the picture: off-screen drawing of a viewport, or a final render. EEVEE is rare: it takes seconds."""

PLAIN = ("cube", "sphere", "plane", "cone")
OTHERS = ("curve", "text", "metaball", "surface", "points", "hair", "grease pencil", "empty", "armature")
INSTANCERS = ("collection instance", "vertices", "faces", "nodes", "particles")
KINDS = (*PLAIN, *OTHERS, *INSTANCERS)

HIDDEN = (
    "", "hide_viewport", "hide_render", "hide_set", "collection excluded", "collection hide_viewport", "collection hide_render",
    "layer collection hidden",
)  # fmt: skip
VISIBILITY = (
    "", "holdout", "collection holdout", "indirect only", "not by the camera", "shadow catcher", "wire", "bounds", "in front",
)  # fmt: skip
MODIFIERS = ("subdivision", "array", "solidify", "wave", "mirror")
MOTIONS = ("still", "keyframes", "driver", "shape key")
CAMERAS = ("PERSP", "ORTHO", "EQUIRECTANGULAR", "FISHEYE_EQUIDISTANT", "FISHEYE_EQUISOLID")
FILES = ("", "saved and opened", "kept across a load")

OBJECT: Mapping[str, Any] = {
    "kind": "cube", "location": [0.0, 0.0, 0.0], "rotation": [0.0, 0.0, 0.0], "scale": [1.0, 1.0, 1.0], "modifiers": [],
    "motion": "still", "parent": None, "constraint": None, "hidden": "", "visibility": "", "touched": False,
}  # fmt: skip
CAMERA: Mapping[str, Any] = {
    "type": "PERSP", "location": [0.0, 0.0, 10.0], "at": [0.0, 0.0, 0.0], "roll": 0.0, "lens": 50.0, "ortho_scale": 7.0,
    "sensor_fit": "AUTO", "sensor": [36.0, 24.0], "shift": [0.0, 0.0], "clip": [0.1, 100.0], "motion": "still", "parent": None,
    "constraint": None, "hidden": "", "touched": False,
}  # fmt: skip
SCENE: Mapping[str, Any] = {
    "renderer": SOLID, "frames": [1], "file": "", "transparent": False, "view_transform": "Standard", "exposure": 0.0, "aspect": [1.0, 1.0],
    "percentage": 100, "unit_scale": 1.0, "border": False, "simplify": [], "second_scene": False, "layers": "",
}  # fmt: skip


def _numbers(low: float, high: float) -> st.SearchStrategy[float]:
    """Few decimals, so that a description can be read; and off the grid of pixels, so that no edge runs along their middles."""
    return st.integers(round(low * 100), round(high * 100)).map(lambda n: (n + 0.37) / 100 if n else 0.0)


def _rarely(values: Any, one_in: int) -> st.SearchStrategy[Any]:
    """Mostly the first of some values."""
    plain = st.just(values[0])
    return st.one_of(*[plain] * (one_in - 1), st.sampled_from(values))


def _xyz(low: float, high: float) -> st.SearchStrategy[list[float]]:
    return st.lists(_numbers(low, high), min_size=3, max_size=3)


_modifier = st.fixed_dictionaries(
    {
        "type": st.sampled_from(MODIFIERS),
        "viewport": _rarely((True, False), 3),
        "render": _rarely((True, False), 3),
        "levels": st.integers(0, 2),
        "render_levels": st.integers(0, 2),
    }
)


def _objects(index: int) -> st.SearchStrategy[Description]:
    others = (None, *range(index))
    return st.fixed_dictionaries(
        {
            "kind": st.one_of(st.sampled_from(PLAIN), st.sampled_from(KINDS)),
            "location": _xyz(-2, 2),
            "rotation": st.one_of(st.just([0.0, 0.0, 0.0]), _xyz(-3, 3)),
            "scale": st.one_of(st.just([1.0, 1.0, 1.0]), st.sampled_from([[0.5, 1.0, 1.5], [-1.0, 1.0, 1.0], [0.7, 0.7, 0.7]])),
            "modifiers": st.one_of(st.just([]), st.lists(_modifier, max_size=2)),
            "motion": _rarely(MOTIONS, 3),
            "parent": _rarely(others, 2),
            "constraint": _rarely(others, 4),
            "hidden": _rarely(HIDDEN, 3),
            "visibility": _rarely(VISIBILITY, 4),
            "touched": _rarely((False, True), 4),
        }
    )


def _cameras(panoramic: bool) -> st.SearchStrategy[Description]:
    return st.fixed_dictionaries(
        {
            "type": st.sampled_from(CAMERAS[: None if panoramic else 2]),
            "location": st.tuples(_numbers(-4, 4), _numbers(-4, 4), _numbers(7, 11)).map(list),
            "at": _xyz(-0.5, 0.5),
            "roll": _rarely((0.0, 0.4, 2.0), 2),
            "lens": _rarely((50.0, 30.0, 65.0), 2),
            "ortho_scale": st.sampled_from((7.0, 5.5, 12.0)),
            "sensor_fit": _rarely(("AUTO", "HORIZONTAL", "VERTICAL"), 2),
            "sensor": _rarely(([36.0, 24.0], [32.0, 32.0], [20.0, 30.0]), 2),
            "shift": _rarely(([0.0, 0.0], [0.1, 0.0], [-0.05, 0.2]), 2),
            "clip": _rarely(([0.1, 100.0], [8.0, 10.0], [0.001, 5000.0]), 3),
            "motion": _rarely(MOTIONS[:3], 3),
            "parent": _rarely((None, 0), 4),
            "constraint": _rarely((None, 0), 6),
            "hidden": _rarely(HIDDEN, 6),
            "touched": _rarely((False, True), 3),
        }
    )


@st.composite
def descriptions(draw: st.DrawFn, *, eevee: bool = True) -> Description:
    """A scene of one to four objects and a camera."""
    renderer = draw(st.sampled_from(RENDERERS))
    if eevee and draw(st.integers(0, 19)) == 19:
        renderer = draw(st.sampled_from((EEVEE, EEVEE_FINAL)))
    count = draw(st.integers(1, 4))
    return {
        "objects": [draw(_objects(i)) for i in range(count)],
        "camera": draw(_cameras(renderer == CYCLES_FINAL)),
        "renderer": renderer,
        "frames": draw(st.lists(st.integers(1, 11), min_size=1, max_size=3)),
        "file": draw(_rarely(FILES, 4)),
        "transparent": draw(st.booleans()),
        "view_transform": draw(_rarely(("Standard", "AgX", "Filmic", "Raw"), 2)),
        "exposure": draw(_rarely((0.0, 1.0), 3)),
        "aspect": draw(_rarely(([1.0, 1.0], [1.0, 1.5], [2.0, 1.0]), 4)),
        "percentage": draw(_rarely((100, 50), 4)),
        "unit_scale": draw(_rarely((1.0, 0.01), 6)),
        "border": draw(_rarely((False, True), 6)),
        "simplify": draw(_rarely(([], [0, 1], [1, 0]), 4)),
        "second_scene": draw(_rarely((False, True), 4)),
        "layers": draw(_rarely(("", "first is the window's", "second is the window's"), 5)),
    }


def plain(description: Description) -> Description:
    """The same without what has its plainest value, to be read."""
    found: Description = {"objects": [_without(obj, OBJECT) for obj in description["objects"]]}
    camera = _without(description["camera"], CAMERA)
    return found | ({"camera": camera} if camera else {}) | _without({k: v for k, v in description.items() if k in SCENE}, SCENE)


def whole(short: Description) -> Description:
    """A description of which only what is not plain is given."""
    objects = [{**OBJECT, **obj} for obj in short.get("objects", [{}])]
    return copy.deepcopy({**SCENE, **short, "objects": objects, "camera": {**CAMERA, **short.get("camera", {})}})


def _without(given: Mapping[str, Any], defaults: Mapping[str, Any]) -> Description:
    return {key: value for key, value in given.items() if value != defaults[key]}


def simpler(description: Description) -> list[Description]:
    """Descriptions with one thing less, for shrinking what no longer is hypothesis's."""
    found = []
    for i in reversed(range(len(description["objects"]))):
        if len(description["objects"]) > 1:
            found.append(_without_object(description, i))
    for path, defaults in (((), SCENE), (("camera",), CAMERA), *((("objects", i), OBJECT) for i in range(len(description["objects"])))):
        for key, value in defaults.items():
            if _at(description, path)[key] != value and key != "renderer":
                copied = copy.deepcopy(description)
                _at(copied, path)[key] = copy.deepcopy(value)
                found.append(copied)
    for i, obj in enumerate(description["objects"]):
        for j in range(len(obj["modifiers"])):
            copied = copy.deepcopy(description)
            del copied["objects"][i]["modifiers"][j]
            found.append(copied)
    if len(description["frames"]) > 1:
        for i in range(len(description["frames"])):
            copied = copy.deepcopy(description)
            del copied["frames"][i]
            found.append(copied)
    return found


def _at(description: Description, path: tuple[Any, ...]) -> Any:
    found: Any = description
    for key in path:
        found = found[key]
    return found


def _without_object(description: Description, i: int) -> Description:
    copied = copy.deepcopy(description)
    del copied["objects"][i]
    for owner in (*copied["objects"], copied["camera"]):
        for key in ("parent", "constraint"):
            if owner[key] == i:
                owner[key] = None
            elif owner[key] is not None and owner[key] > i:
                owner[key] -= 1
    return copied


# ------------------------------------------------------------------------------------------------------------ twins


def is_final(description: Description) -> bool:
    return str(description["renderer"]).endswith("final")


def engine(description: Description) -> str:
    return "WORKBENCH" if description["renderer"] == SOLID else str(description["renderer"]).split()[0]


def twin_for_pictures(description: Description) -> Description:
    """A scene of which a final render shows what the renderer shows of this one.

    Final renders show the scene itself. A viewport has settings of its own: the twin's final render has them.
    """
    twin = copy.deepcopy(description)
    if is_final(description):
        return twin
    for obj in (*twin["objects"], twin["camera"]):
        hides = ("hide_viewport", "hide_set", "collection excluded", "collection hide_viewport", "layer collection hidden")
        obj["hidden"] = "hide_render" if obj["hidden"] in hides else ""
    for obj in twin["objects"]:
        if description["renderer"] == SOLID and obj["visibility"] in ("wire", "bounds"):
            obj["hidden"] = "hide_render"
        for modifier in obj["modifiers"]:
            modifier["render"], modifier["render_levels"] = modifier["viewport"], modifier["levels"]
    if twin["simplify"]:
        twin["simplify"] = [twin["simplify"][0]] * 2
    twin["shows_originals"] = True  # of what vertices and faces instance
    twin["layers"] = twin["layers"] and f"{twin['layers']}, and rendered"
    return twin


def twin_for_labels(description: Description) -> Description:
    """A scene of which a final render of Cycles shows what the renderer shows of this one."""
    twin = twin_for_pictures(description)
    for obj in twin["objects"]:
        if engine(description) != "CYCLES":
            unknown = ("holdout", "collection holdout", "indirect only", "not by the camera", "shadow catcher")
            if engine(description) == "EEVEE":
                unknown = ("shadow catcher",)
            if obj["visibility"] in unknown:
                obj["visibility"] = ""
    return twin


def unhidden(description: Description) -> Description:
    """The same with everything shown: Blender evaluates all of it, wherever it is."""
    twin = copy.deepcopy(description)
    for obj in (*twin["objects"], twin["camera"]):
        obj["hidden"] = ""
    return twin
