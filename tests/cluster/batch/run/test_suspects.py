"""Who runs in what company after a crash, and who is given up: the poison always, the innocent never, however replicas are killed."""

import random

import pytest

from cluster.batch.records import Line
from cluster.batch.run.suspects import Patience, Suspects, Trials, max_company

PATIENCE = Patience()


def line(number: int, crashes: int = 0, lone_crashes: int = 0) -> Line:
    return Line(
        number=number, custom_id=f"r{number}", offset=0, num_bytes=1, crashes=crashes, lone_crashes=lone_crashes
    )


@pytest.mark.parametrize(
    ("crashes", "lone_crashes", "room", "expected"),
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
def test_company_shrinks_with_each_crash(crashes, lone_crashes, room, expected):
    assert max_company(line(1, crashes, lone_crashes), room) == expected


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


def test_the_least_suspect_first_and_none_beside_one_that_is_to_be_alone():
    suspects = Suspects([line(1, 2, 1), line(2, 2), line(3, 1), line(4, 1)])
    assert suspects.take([], 0) is None, "no room"
    first = suspects.take([], 16)
    second = suspects.take([first], 16)
    assert [first.number, second.number] == [3, 4]
    assert suspects.take([first, second], 16) is None, "two of them at most"
    third = suspects.take([], 16)
    assert third.number == 2
    assert suspects.take([third], 16) is None, "the next one has killed a replica alone"
    assert suspects.take([], 16).number == 1
    assert not suspects


def test_one_batch_at_a_time_tries_its_suspects():
    trials = Trials()
    assert trials.begin("a")
    assert trials.begin("a")
    assert not trials.begin("b")
    trials.end("b")
    assert not trials.begin("b")
    trials.end("a")
    assert trials.begin("b")


class Cluster:
    """Replicas that die of poison, and of `kills` SIGKILLs at random moments, while they work on lines in the company that is allowed."""

    def __init__(self, num_lines: int, *, room: int, poison: set[int], kills: float, chance: random.Random) -> None:
        self._waiting = [line(i) for i in range(num_lines)]
        self._room = room
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
            while (suspect := self._suspects.take(lines, self._room)) is not None:
                lines.append(suspect)
        else:
            lines, self._waiting = self._waiting[: self._room], self._waiting[self._room :]
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


@pytest.mark.parametrize("room", [1, 5, 16, 256])
def test_poison_is_found_with_few_deaths_and_nobody_else(room):
    for seed in range(20):
        chance = random.Random(seed)
        poison = set(chance.sample(range(1000), 3))
        cluster = Cluster(1000, room=room, poison=poison, kills=0.0, chance=chance)
        cluster.run()
        assert set(cluster.given_up) == poison
        assert sorted(cluster.answered + cluster.given_up) == list(range(1000))
        assert cluster.num_deaths <= 3 * 5, "at most three in company, of 256, 32 and 4, and two alone"
        assert cluster.num_rounds <= -(-1000 // room) + 3 * (8 + 8 + 4 + 2)


def test_random_kills_condemn_nobody():
    """About each hundredth round ends with a SIGKILL from outside."""
    given_up, num_kills = 0, 0
    for seed in range(20):
        cluster = Cluster(10_000, room=16, poison=set(), kills=0.01, chance=random.Random(seed))
        cluster.run()
        assert len(cluster.answered) + len(cluster.given_up) == 10_000
        given_up += len(cluster.given_up)
        num_kills += cluster.num_kills
    assert num_kills > 100
    assert given_up == 0
