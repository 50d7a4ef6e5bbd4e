"""Inside Blender: scatter random supershapes, render, and publish the normals and the depth that the compositor writes."""

import bpy
import numpy as np

import blendtorch.btb as btb

COLUMNS, ROWS = 6, 5
RESOLUTION = 48  # vertices around a shape, and from pole to pole


def superformula(angle: np.ndarray, m: float, n1: float, n2: float, n3: float) -> np.ndarray:
    """The radius at an angle, by J. Gielis, "A generic geometric transformation ...", American Journal of Botany 90(3), 2003."""
    return (np.abs(np.cos(m * angle / 4)) ** n2 + np.abs(np.sin(m * angle / 4)) ** n3) ** (-1 / n1)


def supershape(rng: np.random.Generator) -> np.ndarray:
    """(RESOLUTION², 3) vertices of a random supershape, the spherical product of two superformulas, within the unit ball."""
    longitude, latitude = np.meshgrid(
        np.linspace(-np.pi, np.pi, RESOLUTION), np.linspace(-np.pi / 2, np.pi / 2, RESOLUTION)
    )
    around, upright = ((rng.integers(2, 10), *rng.uniform((0.3, 0.5, 0.5), (1.5, 2, 2))) for _ in range(2))
    r, s = superformula(longitude, *around), superformula(latitude, *upright)
    flat = s * np.cos(latitude)
    vertices = np.stack([r * np.cos(longitude) * flat, r * np.sin(longitude) * flat, s * np.sin(latitude)], -1)
    vertices = vertices.reshape(-1, 3)
    return vertices / np.linalg.norm(vertices, axis=1).max()


def add_object(name: str) -> bpy.types.Object:
    """A grid of quads that `supershape` bends into shape."""
    index = np.arange(RESOLUTION**2).reshape(RESOLUTION, RESOLUTION)
    quads = np.stack([index[:-1, :-1], index[:-1, 1:], index[1:, 1:], index[1:, :-1]], -1).reshape(-1, 4)
    mesh = bpy.data.meshes.new(name)
    mesh.from_pydata([(0, 0, 0)] * RESOLUTION**2, [], quads.tolist())
    mesh.polygons.foreach_set("use_smooth", [True] * len(mesh.polygons))
    added = bpy.data.objects.new(name, mesh)
    bpy.context.scene.collection.objects.link(added)
    return added


def main() -> None:
    args, _ = btb.parse_blendtorch_args()
    rng = np.random.default_rng(args.btseed)
    places = [(x, y) for y in np.linspace(-4, 4, ROWS) for x in np.linspace(-5, 5, COLUMNS)]
    objects = [add_object(f"Supershape {i}") for i in range(len(places))]

    publisher = btb.DataPublisher(args.btsockets["DATA"], args.btid)
    renderer = btb.CompositeRenderer(
        [
            btb.CompositeSelection("normals", "Geometry", "Normals", "XYZ"),
            btb.CompositeSelection("depth", "Geometry", "Depth", "V"),
        ],
        btid=args.btid,
    )
    animation = btb.AnimationController()

    def scatter() -> None:
        for thing, place in zip(objects, places, strict=True):
            thing.data.vertices.foreach_set("co", supershape(rng).astype(np.float32).ravel())
            thing.data.update()
            thing.location = (*(place + rng.uniform(-0.4, 0.4, 2)), rng.uniform(0.2, 0.8))
            thing.rotation_euler = rng.uniform(0, 2 * np.pi, 3)
            thing.scale = [rng.uniform(0.6, 1.1)] * 3

    def publish() -> None:
        publisher.publish(**renderer.render(), frameid=animation.frameid)

    animation.pre_frame.add(scatter)
    animation.post_frame.add(publish)
    animation.play(frame_range=(0, 100), num_episodes=-1)


main()
