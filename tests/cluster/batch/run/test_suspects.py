"""In what groups lines run after a crash, and which are given up: poison lines always, other lines never, however replicas die."""

import random

import pytest

from cluster.batch.records import Line
from cluster.batch.run.suspects import Patience, Suspects, Trials, max_group_size

PATIENCE = Patience()


def line(number: int, crashes: int = 0, lone_crashes: int = 0) -> Line:
    return Line(
        number=number, custom_id=f"r{number}", offset=0, num_bytes=1, crashes=crashes, lone_crashes=lone_crashes
    )


@pytest.mark.parametrize(
    ("crashes", "lone_crashes", "capacity", "expected"),
    [
        (1, 0, 256, 32),
        (2, 0, 256, 4),
        (3, 0, 256, 1),
        (1, 0, 20, 2),
        (1, 0, 7, 1),
        (7, 0, 512, 1),
        (1, 1, 256, 1),
    ],
)
def test_groups_shrink_with_each_crash(crashes, lone_crashes, capacity, expected):
    assert max_group_size(line(1, crashes, lone_crashes), capacity) == expected


@pytest.mark.parametrize(
    ("crashes", "lone_crashes", "words"),
    [
        (7, 1, None),
        (2, 2, "2 replicas ended while they worked on this request and nothing else"),
        (8, 1, "8 replicas ended while they worked on this request"),
    ],
)
def test_verdict(crashes, lone_crashes, words):
    assert PATIENCE.verdict(line(1, crashes, lone_crashes)) == words


def test_lines_with_few_crashes_first_and_lone_suspects_alone():
    suspects = Suspects([line(1, 2, 1), line(2, 2), line(3, 1), line(4, 1)])
    assert suspects.pop([], 0) is None, "no capacity"
    first = suspects.pop([], 16)
    second = suspects.pop([first], 16)
    assert [first.number, second.number] == [3, 4]
    assert suspects.pop([first, second], 16) is None, "two of them at most"
    third = suspects.pop([], 16)
    assert third.number == 2
    assert suspects.pop([third], 16) is None, "the next one has killed a replica alone"
    assert suspects.pop([], 16).number == 1
    assert not suspects


def test_one_batch_at_a_time_retries_its_suspects():
    trials = Trials()
    assert trials.begin("a")
    assert trials.begin("a")
    assert not trials.begin("b")
    trials.end("b")
    assert not trials.begin("b")
    trials.end("a")
    assert trials.begin("b")


class Cluster:
    """Replicas that work on lines in the allowed groups and die: of poison lines, and of SIGKILL with probability `kills` per round."""

    def __init__(self, num_lines: int, *, capacity: int, poison: set[int], kills: float, chance: random.Random) -> None:
        self._waiting = [line(i) for i in range(num_lines)]
        self._capacity = capacity
        self._poison = poison
        self._kills = kills
        self._chance = chance
        self._suspects = Suspects()
        self.answered: list[int] = []
        self.given_up: list[int] = []
        self.num_deaths = self.num_kills = self.num_rounds = 0

    def run(self) -> None:
        while self._waiting or self._suspects:
            self.num_rounds += 1
            self._round()

    def _round(self) -> None:
        lines: list[Line] = []
        if self._suspects:
            while (suspect := self._suspects.pop(lines, self._capacity)) is not None:
                lines.append(suspect)
        else:
            lines, self._waiting = self._waiting[: self._capacity], self._waiting[self._capacity :]
        is_killed = self._chance.random() < self._kills
        self.num_kills += is_killed
        if not is_killed and not any(x.number in self._poison for x in lines):
            self.answered += [x.number for x in lines]
            return
        self.num_deaths += 1
        for x in lines:
            crashed = line(x.number, x.crashes + 1, x.lone_crashes + (len(lines) == 1))
            if PATIENCE.verdict(crashed) is None:
                self._suspects.add(crashed)
            else:
                self.given_up.append(x.number)


@pytest.mark.parametrize("capacity", [1, 5, 16, 256])
def test_only_poison_is_given_up_and_after_few_deaths(capacity):
    for seed in range(20):
        chance = random.Random(seed)
        poison = set(chance.sample(range(1000), 3))
        cluster = Cluster(1000, capacity=capacity, poison=poison, kills=0.0, chance=chance)
        cluster.run()
        assert set(cluster.given_up) == poison
        assert sorted(cluster.answered + cluster.given_up) == list(range(1000))
        assert cluster.num_deaths <= 3 * 5, "at most three in groups of 256, 32 and 4, and two alone"
        assert cluster.num_rounds <= -(-1000 // capacity) + 3 * (8 + 8 + 4 + 2)


def test_random_kills_give_up_no_line():
    """About one round in a hundred ends with a SIGKILL from outside."""
    given_up, num_kills = 0, 0
    for seed in range(20):
        cluster = Cluster(10_000, capacity=16, poison=set(), kills=0.01, chance=random.Random(seed))
        cluster.run()
        assert len(cluster.answered) + len(cluster.given_up) == 10_000
        given_up += len(cluster.given_up)
        num_kills += cluster.num_kills
    assert num_kills > 100
    assert given_up == 0
