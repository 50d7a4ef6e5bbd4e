"""The core: streams of messages from Blender processes, in shared memory or over TCP. It knows neither torch nor bpy.

What is listed here is what the two sides, tools and other consumers build on. It is imported when it is first used, so that
importing this package costs nothing inside a Blender::

    import blendtorch_shm

    info = blendtorch_shm.LaunchInfo.load_json("launch_info.json")
    for counters in blendtorch_shm.stats(info.addresses["DATA"]):
        print(counters)
"""

from typing import TYPE_CHECKING

from .lazy import lazy

if TYPE_CHECKING:
    from . import errors
    from .launch.address import Address
    from .launch.info import LaunchInfo
    from .stream.stats import stats
    from .transport import open_sink, open_source

__all__ = ["Address", "LaunchInfo", "__version__", "errors", "open_sink", "open_source", "stats"]

__version__ = "0.1.0.dev0"

_HOMES = {
    "Address": "launch.address",
    "LaunchInfo": "launch.info",
    "open_sink": "transport",
    "open_source": "transport",
    "stats": "stream.stats",
}

__getattr__, __dir__ = lazy(__name__, _HOMES, __all__)
