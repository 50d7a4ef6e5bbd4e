"""What the compositor's File Output nodes would write to disk, as arrays.

Blender hands the compositor's results to nobody but these nodes, and those to nothing but files. So for the time of a render the
nodes write to a folder in shared memory, uncompressed, one file per slot, which Blender then reads again and deletes. The
nodes are as they were afterwards.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import bpy
import numpy as np
from numpy.typing import NDArray

from blendtorch_shm.errors import ConfigurationError
from blendtorch_shm.launch.address import SHARED_MEMORY, streams_path
from blendtorch_shm.launch.notes import LAUNCH_VARIABLE

from . import compat, evaluation
from .camera import Camera
from .changes import Changes
from .evaluation import Evaluation
from .final import describe, run_render
from .final_camera import look_through
from .publisher import allocate
from .render_files import load_pixels, no_room

_FORMATS = ("OPEN_EXR", "OPEN_EXR_MULTILAYER")
#: Channels that a slot has, by the type of its socket, in the order of the file's; other types have one, V.
_CHANNELS = {"RGBA": "RGBA", "VECTOR": "XYZW"}
#: What a pixel takes in a file at most: four channels of floats.
_MOST_NBYTES = 16


@dataclass
class CompositeSelection:
    """A slot of a File Output node, or some of its channels.

    Args:
        key: name of the array that `CompositeRenderer.render` returns.
        node: name of the File Output node.
        slot: name of the node's input: the layer's name in a multilayer file, else the file's subpath.
        channels: which channels in which order, such as 'RGB', 'A', 'XYZ' or 'V'. A colour has R, G, B and A, a vector X, Y and
            Z (and W, where it has four dimensions), everything else V.
    """

    key: str
    node: str
    slot: str
    channels: str


class CompositeRenderer:
    """Renders the scene as F12 does, and returns what arrives at slots of the compositor's File Output nodes.

    Handlers of yours are not called.
    Any engine and any number of nodes. The nodes' format is OpenEXR, single or multilayer, of any codec; values go through half
    precision where the node's colour depth is half (except for vectors and values from Blender 5.0 on). Nodes that no selection
    names write their files as always.

    Args:
        slots: what to return.
        camera: what to look through; its `shape` is the size of the arrays. None: the scene's camera.
        delete_render_files: False keeps the files: `NODE_SLOT_BTID_FRAME.exr` in the folder that the node names.
        btid: number of this instance, for the names of the files that are kept.

    Raises:
        ConfigurationError: the scene has no camera or does not use the compositor, or has no such node, slot or channel.
    """

    def __init__(
        self,
        slots: Sequence[CompositeSelection],
        camera: Camera | None = None,
        delete_render_files: bool = True,
        btid: int | None = 1,
    ) -> None:
        self.slots = list(slots)
        self.camera = camera or Camera()
        self.delete_render_files = delete_render_files
        self.btid = btid
        keys = [selection.key for selection in self.slots]
        if not keys or len(set(keys)) < len(keys):
            raise ConfigurationError(
                f"Keys of the selected slots: {keys}. There must be one at least, and each only once."
            )
        self._find_slots()
        evaluation.register(self)

    @property
    def evaluation(self) -> Evaluation:
        """What its next picture shows."""
        return Evaluation(is_final=True, engine=str(bpy.context.scene.render.engine))

    def render(self) -> dict[str, NDArray[np.float32]]:
        """Render the scene as it is now.

        Returns:
            for each selection's key an (H, W, C) float32 array with its C channels, upper-left origin, scene-linear. Ready for
            `publish`, which has then nothing to copy. Nothing overwrites it later. H and W are the camera's `shape`; where the
            compositor changes the size (Scale, Crop, an image of another size), they are what arrives at the slot.

        Raises:
            ConfigurationError: a node or slot is gone, or nothing was written for it; the engine cannot run here.
            OutOfSharedMemory: there is no room for the files.
        """
        evaluation.register(self)
        selected = list(zip(self.slots, self._find_slots(), strict=True))
        nodes = {slot.node.name: slot.node for _, slot in selected}
        pixels: dict[tuple[str, int], NDArray[np.float32]] = {}
        images = {}
        with tempfile.TemporaryDirectory(dir=_folder(), prefix="compositor-") as folder, Changes() as changes:
            folders = {name: os.path.join(folder, str(number)) for number, name in enumerate(nodes)}
            look_through(changes, self.camera)
            changes.set(bpy.context.scene.render, use_compositing=True)
            self._require_room(nodes.values())
            for name, node in nodes.items():
                _redirect(changes, node, folders[name])
            compat.report(f"{describe(bpy.context.scene.render.engine)} and compositor")
            run_render()
            for selection, slot in selected:
                source = (selection.node, slot.index)
                if source not in pixels:  # several selections may share a slot
                    file = _written(folders[selection.node], slot.index, selection)
                    pixels[source] = load_pixels(file, compat.LEAST_NBYTES_OF_SLOT)
                    if not self.delete_render_files:
                        self._keep(file, selection, slot.home)
                made = pixels[source][::-1, :, slot.channels]
                image = allocate(made.shape, np.float32)
                np.copyto(image, made)
                images[selection.key] = image
        return images

    def _require_room(self, nodes: Iterable[Any]) -> None:
        height, width = self.camera.shape
        nbytes = sum(len(compat.output_names(node)) for node in nodes) * height * width * _MOST_NBYTES
        if shutil.disk_usage(SHARED_MEMORY).free < nbytes:
            raise no_room(nbytes)

    def _find_slots(self) -> list[_Slot]:
        tree = compat.compositor_tree(bpy.context.scene)
        if tree is None:
            raise ConfigurationError(
                f"The scene {bpy.context.scene.name!r} does not use the compositor: {compat.how_to_compose()}, and add a File"
                " Output node with the slots wanted."
            )
        return [_find(tree, selection) for selection in self.slots]

    def _keep(self, file: str, selection: CompositeSelection, home: str) -> None:
        os.makedirs(home, exist_ok=True)
        number = 0 if self.btid is None else self.btid
        name = bpy.path.clean_name(
            f"{selection.node}_{selection.slot}_{number:02d}_{bpy.context.scene.frame_current:04d}"
        )
        shutil.move(file, os.path.join(home, f"{name}.exr"))


@dataclass
class _Slot:
    """Where a selection's pixels come from: a node, which of its slots, and channels of that as numbers."""

    node: Any
    index: int
    channels: list[int]
    home: str


def _find(tree: Any, selection: CompositeSelection) -> _Slot:
    nodes = {node.name: node for node in tree.nodes if node.type == "OUTPUT_FILE"}
    node = nodes.get(selection.node)
    if node is None:
        raise ConfigurationError(
            f"The compositor has no File Output node {selection.node!r}; it has {_listed(nodes)}. The name is the node's"
            " own ('Name' in its properties), not its label."
        )
    if node.format.file_format not in _FORMATS:
        raise ConfigurationError(
            f"The File Output node {node.name!r} writes {node.format.file_format}, which does not hold values as they are:"
            " set its format to OpenEXR or OpenEXR MultiLayer."
        )
    if node.mute:
        raise ConfigurationError(f"The File Output node {node.name!r} is muted, so nothing is written: unmute it.")
    names = compat.output_names(node)
    if selection.slot not in names:
        raise ConfigurationError(
            f"The File Output node {node.name!r} has no slot {selection.slot!r}; it has {_listed(names)}."
        )
    index = names.index(selection.slot)
    socket = node.inputs[index]
    known = _CHANNELS.get(socket.type, "V")[: getattr(socket, "dimensions", 3) if socket.type == "VECTOR" else None]
    if not selection.channels or not set(selection.channels) <= set(known):
        raise ConfigurationError(
            f"The slot {selection.slot!r} of {node.name!r} has channels {known!r} (it is of type {socket.type}), not"
            f" {selection.channels!r}."
        )
    home = os.path.abspath(bpy.path.abspath(compat.output_folder(node)))
    return _Slot(node, index, [known.index(channel) for channel in selection.channels], home)


def _listed(names: Any) -> str:
    return ", ".join(map(repr, names)) or "none"


def _redirect(changes: Changes, node: Any, folder: str) -> None:
    """Let a File Output node write one uncompressed file per slot to `folder`; `_written` finds it."""
    depth = node.format.color_depth
    changes.set_file_format(node.format, "OPEN_EXR", color_mode="RGBA", color_depth=depth, exr_codec="NONE")
    changes.set(node.format, color_management="FOLLOW_SCENE")
    compat.redirect_output(
        changes.set, node, folder, [_prefix(index) for index in range(len(compat.output_names(node)))]
    )


def _prefix(index: int) -> str:
    return f"blendtorch-slot-{index}-"


def _written(folder: str, index: int, selection: CompositeSelection) -> str:
    """The file of a slot; Blender appends frame number and extension as its version and the scene's settings want."""
    for file in Path(folder).glob(f"{_prefix(index)}*"):
        return str(file)
    raise ConfigurationError(
        f"Blender rendered, but wrote nothing for slot {selection.slot!r} of {selection.node!r}: does the compositor reach"
        " that node, and does the view layer exist that it reads?"
    )


def _folder() -> str:
    """Where files exist for the time of a render: what a killed instance leaves there, its launcher removes."""
    own = streams_path(os.environ.get(LAUNCH_VARIABLE, ""))
    return own if LAUNCH_VARIABLE in os.environ and os.path.isdir(own) else SHARED_MEMORY
