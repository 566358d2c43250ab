"""A simulated connection: in order, after delays, nothing to the dead, the end after what was sent."""

from __future__ import annotations

from typing import Any

from clustermd.testing.simulator.dice import Dice
from clustermd.testing.simulator.loop import Process, SimLoop
from clustermd.testing.simulator.pipe import Pipe


class End:
    def __init__(self, seed: int) -> None:
        self.failed: list[dict[str, Any]] = []
        dice = Dice(seed)
        self.loop = SimLoop(dice.stream("loop"), self.failed.append)  # type: ignore[abstract]
        self.process = Process("receiver")
        self.got: list[Any] = []
        self.at_s: set[float] = set()
        self.pipe = Pipe(self.loop, dice.stream("pipes"), self.process, self.receive, self.ended)

    def receive(self, frame: Any) -> None:
        self.got.append(frame)
        self.at_s.add(self.loop.time())

    def ended(self) -> None:
        self.got.append("end")

    def run(self, until_s: float = 1.0) -> None:
        self.loop.run(lambda: False, until_s)


def test_frames_arrive_in_order_in_batches_and_the_end_after_them() -> None:
    batches = set()
    for seed in range(20):
        end = End(seed)
        for number in range(30):
            end.pipe.send(number)
        end.pipe.end()
        end.run()
        assert end.got == [*range(30), "end"]
        assert 0.0 not in end.at_s
        batches.add(len(end.at_s))
    assert len(batches) > 5


def test_a_paused_receiver_gets_them_when_it_goes_on() -> None:
    end = End(1)
    end.loop.pause(end.process)
    end.pipe.send("frame")
    end.loop.later(0.5, end.loop.resume, end.process)
    end.run()
    assert end.got == ["frame"] and end.at_s == {0.5}


def test_a_dead_receiver_gets_nothing() -> None:
    end = End(1)
    end.pipe.send("frame")
    end.process.alive = False
    end.run()
    assert end.got == []


def test_what_is_sent_after_the_end_is_lost() -> None:
    end = End(1)
    end.pipe.end()
    end.pipe.send("frame")
    end.run()
    assert end.got == ["end"]
