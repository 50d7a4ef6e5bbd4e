"""Clips from real instances: what Blender renders into them, and what becomes of them when an instance ends."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch.utils import data

import torch_side.launching.instance
from torch_side import BlenderLauncher, RemoteIterableDataset

from .conftest import CUBE_BLEND, SCRIPTS

NUM_FRAMES = 11


def test_each_row_of_a_clip_is_the_picture_rendered_alone_and_was_rendered_into_its_place(
    blender: Any, tmp_path: Path
) -> None:
    out = tmp_path / "alone.npy"
    with BlenderLauncher(
        CUBE_BLEND,
        SCRIPTS / "clips.py",
        named_sockets=["DATA"],
        instance_args=[[str(out)]],
        blender=blender.argument,
        progress=False,
    ) as launcher:
        clips = list(RemoteIterableDataset(launcher.launch_info.addresses["DATA"], max_items=9, output="numpy"))
    alone = np.load(out)
    assert [clip["image"].shape for clip in clips] == 3 * [(4, 48, 64, 3), (4, 48, 64, 3), (3, 48, 64, 3)]
    assert len({picture.tobytes() for picture in alone}) == NUM_FRAMES
    for clip in clips:
        np.testing.assert_array_equal(clip["image"], alone[clip["frame"]])
        np.testing.assert_allclose(clip["rotation"], clip["frame"][:, None] * [0.2, 0.1, 0.3], rtol=1e-6)
        assert clip["name"] == [f"frame {i}" for i in clip["frame"]]
        assert clip["btid"] == 0
    assert np.concatenate([clip["frame"] for clip in clips]).tolist() == 3 * list(range(NUM_FRAMES))
    assert not clips[0]["in_slot"].any()  # nobody knew yet how large a slot must be
    assert all(clip["in_slot"].all() for clip in clips[1:])


START = """
import os, signal, time
import numpy as np
import blendtorch.btb as btb
args, rest = btb.parse_blendtorch_args()
run = int(os.environ["BLENDTORCH_RESTARTS"])
publisher = btb.DataPublisher(args.btsockets["DATA"], args.btid, frames_per_clip=3)

def frames(start, end, pause_s=0):
    for i in range(start, end):
        time.sleep(pause_s)
        image = btb.publisher.lend_array((48, 64, 3), np.uint8)
        image = np.empty((48, 64, 3), np.uint8) if image is None else image
        image[...] = i
        publisher.publish(image=image, run=run, frame=i)
"""


@pytest.fixture
def launch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., BlenderLauncher]:
    monkeypatch.setattr(torch_side.launching.instance, "_FIRST_PAUSE_S", 0.02)

    def launch(text: str, **options: Any) -> BlenderLauncher:
        script = tmp_path / "instance.py"
        script.write_text(START + text)
        return BlenderLauncher("", script, named_sockets=["DATA"], blender="python", progress=False, **options)

    return launch


def frames_of(clips: list[dict[str, Any]]) -> list[list[int]]:
    for clip in clips:
        np.testing.assert_array_equal(clip["image"][:, 0, 0, 0], clip["frame"])
        assert len(set(clip["run"])) == 1
    return [clip["frame"].tolist() for clip in clips]


def test_a_killed_instance_loses_the_clip_that_it_had_begun_and_nothing_else(
    launch: Callable[..., BlenderLauncher],
) -> None:
    script = "frames(0, 8 + run)\nif run == 0: os.kill(os.getpid(), signal.SIGKILL)\n"
    with launch(script, restart="on-failure") as launcher:
        clips = list(RemoteIterableDataset(launcher.launch_info.addresses["DATA"], max_items=5, output="numpy"))
        (code,) = launcher.wait()
    assert code == 0
    assert frames_of(clips) == [[0, 1, 2], [3, 4, 5], [0, 1, 2], [3, 4, 5], [6, 7, 8]]
    assert [clip["run"][0] for clip in clips] == [0, 0, 1, 1, 1]


@pytest.mark.parametrize("end", ["", "publisher.close()", "del publisher", "1 / 0", "raise KeyboardInterrupt"])
def test_a_clip_that_was_begun_is_sent_when_the_script_ends(launch: Callable[..., BlenderLauncher], end: str) -> None:
    with launch(f"frames(0, 8)\n{end}\n") as launcher:
        launcher.wait()
        clips = list(RemoteIterableDataset(launcher.launch_info.addresses["DATA"], max_items=3, output="numpy"))
    assert frames_of(clips) == [[0, 1, 2], [3, 4, 5], [6, 7]]


def test_an_instance_is_recycled_between_clips(launch: Callable[..., BlenderLauncher]) -> None:
    with launch("frames(0, 100)\n", recycle_after=2) as launcher:
        clips = list(RemoteIterableDataset(launcher.launch_info.addresses["DATA"], max_items=6, output="numpy"))
    assert frames_of(clips) == 3 * [[0, 1, 2], [3, 4, 5]]
    assert [clip["run"][0] for clip in clips] == [0, 0, 1, 1, 2, 2]


def test_an_instance_that_takes_long_over_a_clip_does_not_count_as_stuck(
    launch: Callable[..., BlenderLauncher],
) -> None:
    with launch("frames(0, 3, pause_s=3)\n", restart="always", stall_timeout=6) as launcher:
        clips = list(RemoteIterableDataset(launcher.launch_info.addresses["DATA"], max_items=1, output="numpy"))
    assert frames_of(clips) == [[0, 1, 2]]
    assert clips[0]["run"][0] == 0


def test_clips_are_batched_like_any_item_here_and_elsewhere(launch: Callable[..., BlenderLauncher]) -> None:
    with launch("frames(0, 24)\ntime.sleep(600)\n") as launcher:
        (address,) = launcher.launch_info.addresses["DATA"]
        here = data.DataLoader(RemoteIterableDataset([address], max_items=4), batch_size=2, num_workers=1)
        elsewhere = data.DataLoader(RemoteIterableDataset([address.elsewhere()], max_items=4), batch_size=2)
        batches = [*here, *elsewhere]
    assert [tuple(batch["image"].shape) for batch in batches] == 4 * [(2, 3, 48, 64, 3)]
    assert np.concatenate([batch["frame"].numpy().ravel() for batch in batches]).tolist() == list(range(24))
