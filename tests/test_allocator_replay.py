"""The replay of recorded allocator traces: what it reads, what it finds, what it refuses."""

from __future__ import annotations

import gzip
import importlib.util
import json
import pickle
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from click.testing import CliRunner, Result

from lowvram.memory.allocator import CachingAllocator, OutOfMemory

MIB = 2**20
SCRIPT = Path(__file__).resolve().parents[1] / "benchmarks" / "allocator_replay.py"
BASE, SECOND, THIRD = 2**32, 2**33, 2**34


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    """The script as a module; benchmarks/ is not a package."""
    spec = importlib.util.spec_from_file_location("allocator_replay", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up there
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def run(script: ModuleType, *paths: Path) -> Result:
    return CliRunner().invoke(script.main, [str(path) for path in paths])


def hand_made() -> dict[str, Any]:
    """A trace with addresses worked out by hand.

    The segment at the start has [0, 4) and [6, 9) of its 20 MiB in use. 2 MiB go in between. 29
    and 1000 bytes need segments. Then [0, 4) and [4, 6) are freed, and 5.5 MiB take all 6, as
    less than 1 MiB would be left.
    """
    live = [["a", 0, 4 * MIB], ["b", 6 * MIB, 3 * MIB]]
    return {
        "initial": [{"base": BASE, "size": 20 * MIB, "stream": 0, "small": False, "live": live}],
        "events": [
            ["A", 1, 2 * MIB, BASE + 4 * MIB, 0],
            ["S+", SECOND, 30 * MIB],
            ["A", 2, 29 * MIB, SECOND, 0],
            ["S+", THIRD, 2 * MIB],
            ["A", 3, 1000, THIRD, 0],
            ["F", "a"],
            ["F", 1],
            ["A", 4, 5 * MIB + MIB // 2, BASE, 0],
            ["F", 2],
            ["S-", SECOND, 30 * MIB],
            ["F", "b"],
        ],
        "expected": {
            "init_reserved": 20 * MIB,
            "peak_reserved_actual": 52 * MIB,
            "final_reserved_actual": 22 * MIB,
            "final_alloc_actual": 6 * MIB + 1024,
        },
    }


def write(path: Path, data: dict[str, Any]) -> Path:
    text = json.dumps(data).encode()
    path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)
    return path


@pytest.mark.parametrize("name", ["trace.json", "trace.json.gz"])
def test_a_trace_is_replayed(script: ModuleType, tmp_path: Path, name: str) -> None:
    path = write(tmp_path / name, hand_made())
    (trace,) = script.read_traces(path)
    result = script.replay(trace)
    assert result.exact
    assert (result.allocations, result.same_address) == (4, 4)
    assert (result.segments, result.segments_right, result.segments_extra) == (3, 3, 0)
    assert result.reserved == {
        "reserved at the start": (20 * MIB, 20 * MIB),
        "peak reserved": (52 * MIB, 52 * MIB),
        "reserved at the end": (22 * MIB, 22 * MIB),
        "allocated at the end": (6 * MIB + 1024, 6 * MIB + 1024),
    }
    shown = run(script, path, path)
    assert shown.exit_code == 0
    assert shown.output.count(f"{name}: exact (11 events in ") == 2
    assert "at the same address                    4  100.00%\n" in shown.output
    assert "segments right                         3  of 3\n" in shown.output
    assert "peak reserved                 54,525,952\n" in shown.output


def test_a_difference_is_shown(script: ModuleType, tmp_path: Path) -> None:
    data = hand_made()
    data["events"][0][3] += 512  # not where the rules put it
    data["events"][1][2] = data["events"][9][2] = 40 * MIB  # larger than the rules say
    shown = run(script, write(tmp_path / "trace.json", data))
    assert shown.exit_code == 1
    assert "trace.json: DIFFERS" in shown.output
    assert "at the same address                    2  50.00%\n" in shown.output
    assert "segments right                         1  of 3, and 2 that did not" in shown.output
    data["expected"] = {"final_alloc_actual": 1}
    shown = run(script, write(tmp_path / "trace.json", data))
    assert "allocated at the end           6,292,480, recorded 1\n" in shown.output
    assert "peak reserved                 54,525,952, recorded 65,011,712\n" in shown.output


def test_what_happened_to_a_segment_but_was_not_predicted(
    script: ModuleType, tmp_path: Path
) -> None:
    data = hand_made()
    data["events"].insert(0, ["S+", 2**35, 2 * MIB])
    (trace,) = script.read_traces(write(tmp_path / "trace.json", data))
    result = script.replay(trace)
    assert not result.exact
    assert (result.segments, result.segments_right, result.segments_extra) == (4, 3, 0)


# Snapshots ----------------------------------------------------------------------------------


class Card:
    """Writes down what an allocator does in the way PyTorch does."""

    def __init__(self, **settings: Any) -> None:
        self.settings = settings
        self.allocator = CachingAllocator(on_segment=self.note, **settings)
        self.trace: list[dict[str, Any]] = []
        self.sizes: dict[int, int] = {}

    def note(self, action: str, address: int, size: int, stream: int) -> None:
        self.trace.append({"action": action, "addr": address, "size": size, "stream": stream})

    def malloc(self, size: int, stream: int = 0) -> int:
        address = self.allocator.malloc(size, stream)
        self.note("alloc", address, size, stream)
        self.sizes[address] = size
        return address

    def free(self, address: int) -> None:
        self.allocator.free(address)
        for action in ("free_requested", "free_completed"):
            self.note(action, address, self.sizes[address], 0)

    def snapshot(self, last: int = 0) -> dict[str, Any]:
        """With the `last` events only, or with all of them; one comes after the snapshot."""
        segments = [
            {
                "device": 0,
                "address": segment.address,
                "total_size": segment.size,
                "stream": segment.stream,
                "segment_type": segment.pool,
                "segment_pool_id": (0, 0),
                "is_expandable": segment.expandable,
                "blocks": [
                    {
                        "address": block.address,
                        "size": block.size,
                        "requested_size": block.requested,
                        "state": "active_allocated" if block.allocated else "inactive",
                        "frames": [],
                    }
                    for block in segment.blocks
                ],
            }
            for segment in self.allocator.segments
        ]
        mark = {"action": "snapshot", "addr": 0, "size": 0, "stream": 0}
        late = {"action": "alloc", "addr": 1, "size": 1, "stream": 0}
        return {
            "segments": segments,
            "device_traces": [[*self.trace[-last:], mark, late], []],
            "allocator_settings": {
                "expandable_segments": self.settings.get("expandable_segments", False),
                "max_split_size": self.settings.get("max_split_size", -1),
                "roundup_power2_divisions": {"1": 0, "2": 0},
            },
        }


def random_card(seed: int, **settings: Any) -> Card:
    card, rng, live = Card(**settings), random.Random(seed), []
    for i in range(1200):
        if live and rng.random() < len(live) / 60:
            card.free(live.pop(rng.randrange(len(live))))
        else:
            size = rng.randrange(1, rng.choice((2000, MIB, 4 * MIB, 50 * MIB)))
            try:
                live.append(card.malloc(size, rng.choice((0, 0, 5))))
            except OutOfMemory:
                card.trace.append({"action": "oom", "device_free": 0, "size": size, "stream": 0})
                card.free(live.pop())
        if i == 600:
            card.allocator.empty_cache()
    return card


def write_pickle(path: Path, data: object) -> Path:
    path.write_bytes(pickle.dumps(data))
    return path


def test_the_state_before_a_snapshot_is_worked_out(script: ModuleType, tmp_path: Path) -> None:
    """The recording starts with 4 MiB in use and the segment of 30 MiB in the cache."""
    card = Card()
    first, large = card.malloc(4 * MIB), card.malloc(30 * MIB)
    card.free(large)
    card.trace.clear()
    card.malloc(5 * MIB)
    card.free(first)
    card.allocator.empty_cache()
    card.malloc(700)
    (trace,) = script.read_traces(write_pickle(tmp_path / "s.pickle", card.snapshot()))
    assert trace.name == "s.pickle:0"
    assert len(trace.events) == 6 - 1  # one of the two events of a free
    before = script.initial_segments(trace)
    assert [
        [(block.address, block.size, block.requested, block.allocated) for block in s.blocks]
        for s in before
    ] == [
        [(first, 4 * MIB, 4 * MIB, True), (first + 4 * MIB, 16 * MIB, 0, False)],
        [(large, 30 * MIB, 0, False)],
    ]
    result = script.replay(trace)
    assert result.exact
    assert (result.allocations, result.segments) == (2, 2)
    assert result.reserved["reserved at the end"] == (22 * MIB, 22 * MIB)
    assert result.reserved["allocated at the end"] == (5 * MIB + 1024, 5 * MIB + 1024)


@pytest.mark.parametrize(
    ("settings", "last"),
    [
        ({}, 0),
        ({}, 500),  # the last 500 events of about 1850
        ({"total_bytes": 600 * MIB}, 0),
        ({"total_bytes": 600 * MIB}, 500),
        ({"expandable_segments": True}, 0),
        ({"expandable_segments": True}, 500),
        ({"max_split_size": 30 * MIB}, 0),
    ],
    ids=str,
)
def test_snapshots_are_replayed(
    script: ModuleType, tmp_path: Path, settings: dict[str, Any], last: int
) -> None:
    card = random_card(1, **settings)
    path = write_pickle(tmp_path / "snapshot.pickle", card.snapshot(last))
    (trace,) = script.read_traces(path)
    result = script.replay(trace)
    assert result.exact, script.table([result])
    assert result.segments > 0
    assert run(script, path).exit_code == 0


def test_a_size_that_shows_only_later(script: ModuleType, tmp_path: Path) -> None:
    """A block of 9.5 MiB in a hole of 10 keeps the half; only the block behind it tells."""
    data = {
        "initial": [
            {
                "base": BASE,
                "size": 20 * MIB,
                "stream": 0,
                "small": False,
                "live": [["a", 0, 9 * MIB + MIB // 2]],
            }
        ],
        "events": [["A", 1, 5 * MIB, BASE + 10 * MIB, 0], ["F", "a"]],
        "expected": {"final_alloc_actual": 5 * MIB},
    }
    (trace,) = script.read_traces(write(tmp_path / "trace.json", data))
    assert script.replay(trace).exact


def test_free_requested_counts_where_nothing_else_was_recorded(
    script: ModuleType, tmp_path: Path
) -> None:
    card = Card()
    card.free(card.malloc(3000))
    data = card.snapshot()
    trace = data["device_traces"][0]
    data["device_traces"][0] = [e for e in trace if e["action"] != "free_completed"]
    (trace,) = script.read_traces(write_pickle(tmp_path / "s.pickle", data))
    assert script.replay(trace).exact


# What is refused ----------------------------------------------------------------------------


class Malicious:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_a_pickle_that_could_run_code_is_refused(script: ModuleType, tmp_path: Path) -> None:
    trap = tmp_path / "touched"
    path = write_pickle(tmp_path / "evil.pickle", {"segments": Malicious(trap)})
    shown = run(script, path)
    assert shown.exit_code == 1
    assert shown.output.startswith(f"Error: {path}: refused: the pickle asks for ")
    assert not trap.exists()
    path = write_pickle(tmp_path / "evil.pickle", len)
    assert run(script, path).output == (
        f"Error: {path}: refused: the pickle asks for builtins.len; "
        "a snapshot holds numbers, texts and containers only\n"
    )


def test_other_files_are_refused(script: ModuleType, tmp_path: Path) -> None:
    graphs = Card()
    graphs.malloc(1)
    with_graphs = graphs.snapshot()
    with_graphs["segments"][0]["segment_pool_id"] = (0, 1)
    lost = graphs.snapshot()
    lost["segments"][0]["blocks"][0]["state"] = "inactive"
    silent = graphs.snapshot() | {"device_traces": [[]]}
    messages = {
        "neither JSON nor a pickle that can be read: ": b"hello",
        "cannot be unzipped: ": gzip.compress(b"{}" * 99)[:20],
        "not in a format that is known here (KeyError: 'initial')": b"{}",
        "not in a format that is known here (KeyError: 'device_traces')": pickle.dumps({}),
        "it has private pools (CUDA graphs), which are not simulated": pickle.dumps(with_graphs),
        "it has no events: record them with _record_memory_history()": pickle.dumps(silent),
        "events and segments disagree: nothing at ": pickle.dumps(lost),
    }
    path = tmp_path / "file"
    for message, data in messages.items():
        path.write_bytes(data)
        shown = run(script, path)
        assert shown.exit_code == 1
        assert shown.output.startswith(f"Error: {path}: {message}"), shown.output
