"""RemoteIterableDataset(..., latest=True) over real instances, which here are plain Python processes."""

from collections import defaultdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from torch.utils import data

from blendtorch_shm.errors import ConfigurationError
from blendtorch_shm.launch.address import Address
from blendtorch_shm.stream.stats import stats
from torch_side import FileDataset, FrameLoader, RemoteIterableDataset

from .conftest import eventually, launch, when_it_waits

ELSEWHERE = pytest.mark.parametrize("is_elsewhere", [False, True], ids=["shared memory", "tcp"])


def seen_from(addresses: list[Address], is_elsewhere: bool) -> list[Address]:
    return [address.elsewhere() for address in addresses] if is_elsewhere else addresses


@ELSEWHERE
def test_each_item_is_the_last_message_that_was_ready_and_what_was_skipped_is_counted(is_elsewhere: bool) -> None:
    with launch(num_instances=1) as launcher:
        (address,) = addresses = launcher.launch_info.addresses["DATA"]
        items = iter(RemoteIterableDataset(seen_from(addresses, is_elsewhere), latest=True))
        frames = []
        for _ in range(6):
            newest = when_it_waits(address).published - 1
            item = next(items)
            assert (item["image"] == item["value"]).all()
            frames.append(item["frameid"])
            assert frames[-1] == newest
            del item
        seen = when_it_waits(address)
        assert seen.skipped == frames[-1] + 1 - len(frames)
        assert seen.delivered == frames[-1] + 1
        eventually(lambda: stats(address)[0].released == seen.delivered)


@ELSEWHERE
def test_each_instance_in_its_turn_gives_its_newest(is_elsewhere: bool) -> None:
    with launch() as launcher:
        addresses = launcher.launch_info.addresses["DATA"]
        last = [when_it_waits(address).published - 1 for address in addresses]
        frames: dict[int, list[int]] = defaultdict(list)
        turns = []
        items = iter(RemoteIterableDataset(seen_from(addresses, is_elsewhere), latest=True))
        while min(map(turns.count, (0, 1))) < 10:  # over TCP both are asked, and the one that answers first is first
            item = next(items)
            turns.append(item["btid"])
            frames[item["btid"]].append(item["frameid"])
            for address in addresses:
                when_it_waits(address)
        assert [each[0] for _, each in sorted(frames.items())] == last
        for each in frames.values():
            assert each == sorted(set(each))
        if not is_elsewhere:
            assert turns[:18] in ([0, 1] * 9, [1, 0] * 9)
            assert all(after - before == 10 for each in frames.values() for before, after in pairwise(each))


@ELSEWHERE
def test_the_last_frame_of_an_instance_that_has_ended_arrives(is_elsewhere: bool) -> None:
    with launch("--stop-after", "25", num_instances=1) as launcher:
        addresses = launcher.launch_info.addresses["DATA"]
        frames = []
        for item in RemoteIterableDataset(seen_from(addresses, is_elsewhere), latest=True):
            frames.append(item["frameid"])
            if frames[-1] == 24:
                break
        assert frames == sorted(set(frames))


def test_max_items_counts_what_is_given_and_a_recording_has_that(addresses: list[Address], tmp_path: Path) -> None:
    newest = when_it_waits(addresses[0]).published - 1
    dataset = RemoteIterableDataset(addresses[0], max_items=5, latest=True, record_path_prefix=tmp_path / "a")
    frames = [item["frameid"] for item in dataset]
    assert len(frames) == 5
    assert frames[0] == newest
    assert [item["frameid"] for item in FileDataset(tmp_path / "a")] == frames


def of_which_worker(item: dict[str, Any]) -> tuple[int, int]:
    worker = data.get_worker_info()
    assert worker is not None
    return worker.id, item["frameid"]


def test_each_worker_skips_for_itself(addresses: list[Address]) -> None:
    dataset = RemoteIterableDataset(addresses[0], max_items=40, latest=True, item_transform=of_which_worker)
    items = list(data.DataLoader(dataset, batch_size=None, num_workers=2))
    for worker in (0, 1):
        frames = [frame for found, frame in items if found == worker]
        assert len(frames) == 20
        assert frames == sorted(frames)
    assert len({frame for _, frame in items}) == 40


CLIPS = """
import numpy as np
import blendtorch.btb as btb
args, _ = btb.parse_blendtorch_args()
publisher = btb.DataPublisher(args.btsockets["DATA"], args.btid, frames_per_clip=4, send_hwm=10)
for i in range(4 * 10):
    publisher.publish(image=np.full((20, 30, 3), i, np.uint8), frameid=i)
publisher.close()
"""


def test_a_clip_is_skipped_or_given_whole(tmp_path: Path) -> None:
    script = tmp_path / "clips.py"
    script.write_text(CLIPS)
    with launch(script=script, num_instances=1) as launcher:
        (address,) = addresses = launcher.launch_info.addresses["DATA"]
        eventually(lambda: stats(address)[0].ready == 10)
        (clip,) = RemoteIterableDataset(addresses, max_items=1, latest=True)
        assert clip["frameid"].tolist() == clip["image"][:, 0, 0, 0].tolist() == [36, 37, 38, 39]
        assert stats(address)[0].skipped == 9


def test_a_dataset_is_no_address_of_a_frame_loader() -> None:
    dataset = RemoteIterableDataset("tcp://127.0.0.1:9", latest=True)
    with pytest.raises(ConfigurationError, match=r"is a dataset; expected addresses.*latest=True"):
        FrameLoader(dataset, batch_size=2)  # type: ignore[arg-type]
