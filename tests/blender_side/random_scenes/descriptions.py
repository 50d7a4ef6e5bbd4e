"""Descriptions of small scenes: what there is to choose, and how hypothesis draws from it.

A description is a dict that survives JSON. All of its keys are always there. The first value of each choice is the plainest one,
which is what shrinking ends with.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

from hypothesis import strategies as st

Description = dict[str, Any]

SOLID, EEVEE, CYCLES_FINAL, WORKBENCH_FINAL, EEVEE_FINAL = (
    "SOLID",
    "EEVEE",
    "CYCLES final",
    "WORKBENCH final",
    "EEVEE final",
)
RENDERERS = (SOLID, CYCLES_FINAL, WORKBENCH_FINAL)
"""What makes the picture: off-screen drawing of a viewport, or a final render. EEVEE is rare: it takes seconds."""

PLAIN = ("cube", "sphere", "plane", "cone")
OTHERS = ("curve", "text", "metaball", "surface", "points", "hair", "grease pencil", "empty", "armature")
NOT_COUNTED = ("points", "hair", "grease pencil")
"""What pictures show and labels do not (docs/ground_truth.md)."""
HOLES = ("holdout", "collection holdout", "shadow catcher")
"""Ways to be seen of which the background appears instead."""
INSTANCERS = ("collection instance", "vertices", "faces", "nodes", "particles")

_STILL, _UNMOVED = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
_HIDDEN = (
    "", "hide_viewport", "hide_render", "hide_set", "collection excluded", "collection hide_viewport", "collection hide_render",
    "layer collection hidden",
)  # fmt: skip
_MODIFIERS = tuple(
    [{"type": kind, "viewport": viewport, "render": render, "levels": levels, "render_levels": render_levels}]
    for kind, viewport, render, levels, render_levels in (
        ("subdivision", True, True, 1, 1), ("subdivision", True, True, 0, 2), ("subdivision", True, True, 2, 0),
        ("array", True, True, 0, 0), ("array", True, False, 0, 0), ("solidify", True, True, 0, 0), ("wave", True, True, 0, 0),
        ("wave", False, True, 0, 0), ("mirror", True, True, 0, 0),
    )
)  # fmt: skip

Values = tuple[tuple[Any, ...], int]
"""What there is to choose, the plainest first, and how rarely it is another one: once in so many."""

OBJECT: Mapping[str, Values] = {
    "kind": ((*PLAIN, *OTHERS, *INSTANCERS), 1),
    "location": ((_STILL, "anywhere"), 1),
    "rotation": ((_STILL, "anyhow"), 2),
    "scale": ((_UNMOVED, (0.5, 1.0, 1.5), (-1.0, 1.0, 1.0), (0.7, 0.7, 0.7)), 2),
    "modifiers": (((), *_MODIFIERS, _MODIFIERS[3] + _MODIFIERS[1], _MODIFIERS[0] + _MODIFIERS[6]), 3),
    "motion": (("still", "keyframes", "driver", "shape key", "falls"), 3),
    "parent": ((None, 0, 1, 2), 3),
    "constraint": ((None, 0, 1, 2), 5),
    "hidden": (_HIDDEN, 4),
    "visibility": (
        (
            "", *HOLES, "indirect only", "not by the camera", "wire", "bounds", "in front",
        ),
        5,
    ),
    "touched": ((False, True), 3),
}  # fmt: skip
CAMERA: Mapping[str, Values] = {
    "type": (("PERSP", "ORTHO", "EQUIRECTANGULAR", "FISHEYE_EQUIDISTANT", "FISHEYE_EQUISOLID"), 3),
    "location": (((0.0, 0.0, 10.0), (-4.0, 3.0, 9.0), (2.0, -6.0, 5.0)), 2),
    "at": ((_STILL, (0.4, -0.3, 0.2)), 2),
    "roll": ((0.0, 0.4, 2.0), 3),
    "lens": ((50.0, 30.0, 65.0), 3),
    "ortho_scale": ((7.0, 5.5, 12.0), 3),
    "sensor_fit": (("AUTO", "HORIZONTAL", "VERTICAL"), 3),
    "sensor": (((36.0, 24.0), (32.0, 32.0), (20.0, 30.0)), 3),
    "shift": (((0.0, 0.0), (0.1, 0.0), (-0.05, 0.2)), 3),
    "own_shift": (((0.0, 0.0), (0.08, -0.1)), 8),  # that the script makes by setting proj_matrix
    "clip": (((0.1, 100.0), (9.0, 10.005), (0.001, 5000.0)), 4),
    "motion": (("still", "keyframes", "driver"), 4),
    "parent": ((None, 0), 6),
    "constraint": ((None, 0), 8),
    "hidden": (_HIDDEN, 6),
    "touched": ((False, True), 4),
}
SCENE: Mapping[str, Values] = {
    "frames": (((1,), (1, 7), (7, 3), (4, 11, 2)), 2),
    "file": (("", "saved and opened", "kept across a load"), 5),
    "transparent": ((False, True), 3),
    "view_transform": (("Standard", "AgX", "Filmic", "Raw"), 3),
    "exposure": ((0.0, 1.0), 4),
    "aspect": (((1.0, 1.0), (1.0, 1.5), (2.0, 1.0)), 4),
    "percentage": ((100, 50), 5),
    "unit_scale": ((1.0, 0.01), 6),
    "border": ((False, True), 6),
    "simplify": (((), (0, 1), (1, 0)), 6),
    "second_scene": ((False, True), 5),
    "layers": (("", "first is the window's", "second is the window's"), 6),
    "motion_blur": ((False, True), 10),
    "episodes": ((1, 3), 5),
}


def _plainest(table: Mapping[str, Values]) -> Description:
    return {key: values[0] for key, (values, _) in table.items()}


def _xyz(low: float, high: float) -> st.SearchStrategy[Any]:
    """Few decimals, so that a description can be read; and off the grid of pixels, so that no edge runs along their middles."""
    number = st.integers(round(low * 100), round(high * 100)).map(lambda n: (n + 0.37) / 100 if n else 0.0)
    return st.tuples(number, number, number)


def _choice(values: tuple[Any, ...], one_in: int) -> st.SearchStrategy[Any]:
    def drawn(value: Any) -> st.SearchStrategy[Any]:
        return _xyz(-2, 2) if value == "anywhere" else _xyz(-3, 3) if value == "anyhow" else st.just(value)

    others = st.sampled_from(values).flatmap(drawn)
    return st.one_of(*[st.just(values[0])] * (one_in - 1), others)


def _from(table: Mapping[str, Values]) -> st.SearchStrategy[Description]:
    return st.fixed_dictionaries({key: _choice(values, one_in) for key, (values, one_in) in table.items()})


@st.composite
def descriptions(
    draw: st.DrawFn, *, renderers: tuple[str, ...] = RENDERERS, rare_renderers: tuple[str, ...] = (EEVEE, EEVEE_FINAL)
) -> Description:
    """A scene of one to four objects and a camera."""
    is_rare = rare_renderers and draw(st.integers(0, 19)) == 19
    found = draw(_from(SCENE))
    found["renderer"] = draw(st.sampled_from(rare_renderers if is_rare else renderers))
    found["objects"] = draw(st.lists(_from(OBJECT), min_size=1, max_size=4))
    found["camera"] = draw(_from(CAMERA))
    return sensible(found)


def sensible(description: Description) -> Description:
    """The same without what cannot be: objects hang on those before them, and only Cycles has panoramic cameras."""
    for i, obj in enumerate(description["objects"]):
        for key in ("parent", "constraint"):
            if obj[key] is not None and obj[key] >= i:
                obj[key] = None
    if description["renderer"] != CYCLES_FINAL and description["camera"]["type"] not in ("PERSP", "ORTHO"):
        description["camera"]["type"] = "PERSP"
    if not is_final(description):  # viewports show what is instanced where it is, too: the twin does so for parts only
        for obj in (*description["objects"], description["camera"]):
            if obj["parent"] is not None and description["objects"][obj["parent"]]["kind"] in ("vertices", "faces"):
                obj["parent"] = None
    has_strokes = any(obj["kind"] == "grease pencil" for obj in description["objects"])
    for obj in description["objects"]:
        # After a final render of a grease pencil Blender has no OpenGL context any more.
        if description["renderer"] != SOLID and obj["kind"] == "grease pencil":
            obj["kind"] = "plane"
        # What is In Front only pictures tell, by their colours, and strokes have others.
        elif has_strokes and obj["visibility"] == "in front":
            obj["visibility"] = ""
    if any(obj["motion"] == "falls" for obj in description["objects"]):  # what is simulated begins at the first frame
        description["frames"] = (1, *description["frames"][-1:]) if description["frames"][-1] > 1 else (1,)
        for obj in description["objects"]:  # a final render would simulate with what was touched
            obj["touched"] = False
            if obj["motion"] == "falls":  # what it hangs on, or hides it, decides by chance where it starts from
                obj["parent"] = obj["constraint"] = None
                obj["hidden"] = ""
    else:
        description["episodes"] = 1
    return description


def one_choice_each(renderer: str) -> Iterator[Description]:
    """Scenes in which one thing is not plain, also with something that hides a part of it, and with movement."""
    for name, table in (("scene", SCENE), ("camera", CAMERA), ("object", OBJECT)):
        for key, (values, _) in table.items():
            for value in values[1:]:
                value = (
                    {"anywhere": (0.7, 0.4, 0.2), "anyhow": (0.5, 1.1, -0.3)}.get(value, value)
                    if isinstance(value, str)
                    else value
                )
                choice = {key: value}
                if key in ("parent", "constraint") and name == "object":
                    objects = [{"location": (1.0, 0.0, 0.0), "rotation": (0.0, 0.3, 0.5)}, {key: 0}]
                    if value == 0:
                        yield sensible(whole({"objects": objects, "renderer": renderer}))
                        yield sensible(
                            whole({"objects": [{"motion": "driver"}, {key: 0}], "frames": (1, 7), "renderer": renderer})
                        )
                    continue
                short: Description = {
                    "renderer": renderer,
                    "objects": [{}, {"kind": "plane", "location": (0.6, 0.3, -1.5)}],
                }
                if name == "scene":
                    short |= choice
                elif name == "camera":
                    short["camera"] = choice
                else:
                    short["objects"][0] = choice
                if key in ("motion", "touched", "parent", "constraint", "episodes", "hidden"):
                    short["objects"][0].setdefault(
                        "motion", "falls" if key == "episodes" else "driver" if name == "camera" else "keyframes"
                    )
                    short["frames"] = (1, 7)
                yield sensible(whole(short))


def plain(description: Description) -> Description:
    """The same without what has its plainest value, to be read."""
    if not description:
        return {}
    found: Description = {"objects": [_without(obj, OBJECT) for obj in description["objects"]]}
    camera = _without(description["camera"], CAMERA)
    found |= {"camera": camera} if camera else {}
    return found | {"renderer": description["renderer"]} | _without(description, SCENE)


def whole(short: Description) -> Description:
    """A description of which only what is not plain is given."""
    objects = [_plainest(OBJECT) | obj for obj in short.get("objects", [{}])]
    found = {"renderer": SOLID} | _plainest(SCENE) | short
    return copy.deepcopy(found | {"objects": objects, "camera": _plainest(CAMERA) | short.get("camera", {})})


def _without(given: Mapping[str, Any], table: Mapping[str, Values]) -> Description:
    return {key: given[key] for key, (values, _) in table.items() if given[key] != values[0]}


Choice = tuple[str, ...]
"""Something about a description that is not the plainest: ``("object 1",)``, that it is there, or ``("object 1", "kind")``."""


def choices(description: Description) -> list[Choice]:
    """All that is not plain."""
    found: list[Choice] = [(f"object {i}",) for i in range(len(description["objects"]))]
    for name, owner, table in _owners(description):
        found += [(name, key) for key, (values, _) in table.items() if owner[key] != values[0]]
    return found


def _owners(description: Description) -> list[tuple[str, Description, Mapping[str, Values]]]:
    objects = [(f"object {i}", obj, OBJECT) for i, obj in enumerate(description["objects"])]
    return [("scene", description, SCENE), ("camera", description["camera"], CAMERA), *objects]


def with_only(description: Description, kept: Collection[Choice]) -> Description:
    """The description with these choices, and plain otherwise."""
    found = copy.deepcopy(description)
    for name, owner, table in _owners(found):
        owner |= {key: values[0] for key, (values, _) in table.items() if (name, key) not in kept}
    left = [i for i in range(len(found["objects"])) if (f"object {i}",) in kept] or [0]
    found["objects"] = [found["objects"][i] for i in left]
    for owner in (*found["objects"], found["camera"]):
        for key in ("parent", "constraint"):
            owner[key] = left.index(owner[key]) if owner[key] in left else None
    return sensible(found)


def smallest(description: Description, is_found: Callable[[Description], bool]) -> Description:
    """Leave out choices, many at once and then fewer, as long as it is still found."""
    kept = choices(description)
    size = len(kept)
    while size:
        start = 0
        while start < len(kept):
            fewer = kept[:start] + kept[start + size :]
            if is_found(with_only(description, fewer)):
                kept = fewer
            else:
                start += size
        size //= 2
    return with_only(description, kept)


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
    twin["border"] = False  # pictures are whole
    camera = twin["camera"]
    own_shift = camera.pop("own_shift")
    camera["shift"] = [sum(pair) for pair in zip(camera["shift"], own_shift, strict=True)]
    camera["keeps_lens"] = any(own_shift)  # what a script set counts, whatever becomes of the lens
    if is_final(description):
        return twin
    for obj in (*twin["objects"], twin["camera"]):
        hides = {"hide_viewport": "hide_render", "hide_set": "hide_render"}
        hides |= dict.fromkeys(
            ("collection excluded", "collection hide_viewport", "layer collection hidden"), "collection hide_render"
        )
        obj["hidden"] = hides.get(obj["hidden"], "")
    for obj in twin["objects"]:
        is_wire = description["renderer"] == SOLID and obj["visibility"] in ("wire", "bounds")
        if is_wire and obj["hidden"] != "collection hide_render":  # which hides what it instances, too
            obj["hidden"] = "hide_render"
        for modifier in obj["modifiers"]:
            modifier["render"], modifier["render_levels"] = modifier["viewport"], modifier["levels"]
    twin["simplify"] = twin["simplify"][:1] * 2
    twin["motion_blur"] = False
    twin["shows_originals"] = True  # of what vertices and faces instance
    twin["layers"] = twin["layers"] and f"{twin['layers']}, and rendered"
    return twin


def twin_for_labels(description: Description) -> Description:
    """A scene of which a final render of Cycles shows what the renderer shows of this one."""
    twin = twin_for_pictures(description)
    twin["motion_blur"] = False
    for obj in twin["objects"]:
        if obj["kind"] in NOT_COUNTED:
            obj["hidden"] = "hide_render"
        if engine(description) != "CYCLES":
            unknown = ("holdout", "collection holdout", "indirect only", "not by the camera", "shadow catcher")
            if engine(description) == "EEVEE":
                unknown = ("shadow catcher",)
            if obj["visibility"] in unknown:
                obj["visibility"] = ""
    return twin


def unhidden(description: Description) -> Description:
    """The same with everything shown: Blender evaluates all of it, wherever it is."""
    twin = copy.deepcopy(description) | {"layers": ""}
    for obj in (*twin["objects"], twin["camera"]):
        obj["hidden"] = ""
    return twin
