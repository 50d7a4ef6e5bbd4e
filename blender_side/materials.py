"""Materials that show something other than how a surface looks."""

from __future__ import annotations

from typing import Any

import bpy


def create_normal_material(name: str) -> Any:
    """A new material that shines in the colour of its surface's normal.

    The normal is that in camera coordinates: x to the right, y up, z towards the viewer. A component n of -1 to 1 is the
    linear colour value (n + 1) / 2, whatever the light: a surface that faces the camera is (0.5, 0.5, 1). In EEVEE and
    Cycles alike; Workbench shows no materials.

    Args:
        name: of the material.

    Returns:
        a `bpy.types.Material`, to be given to objects (``obj.active_material = ...``).
    """
    material = bpy.data.materials.new(name)
    material.use_nodes = True
    tree = material.node_tree
    tree.nodes.clear()
    geometry = tree.nodes.new("ShaderNodeNewGeometry")
    to_camera = tree.nodes.new("ShaderNodeVectorTransform")
    to_color = tree.nodes.new("ShaderNodeVectorMath")
    emission = tree.nodes.new("ShaderNodeEmission")
    output = tree.nodes.new("ShaderNodeOutputMaterial")
    to_camera.vector_type, to_camera.convert_from, to_camera.convert_to = "NORMAL", "WORLD", "CAMERA"
    to_color.operation = "MULTIPLY_ADD"
    to_color.inputs[1].default_value = (0.5, 0.5, -0.5)  # in shader nodes a camera looks along +z
    to_color.inputs[2].default_value = (0.5, 0.5, 0.5)
    tree.links.new(geometry.outputs["Normal"], to_camera.inputs["Vector"])
    tree.links.new(to_camera.outputs["Vector"], to_color.inputs[0])
    tree.links.new(to_color.outputs["Vector"], emission.inputs["Color"])
    tree.links.new(emission.outputs["Emission"], output.inputs["Surface"])
    return material
