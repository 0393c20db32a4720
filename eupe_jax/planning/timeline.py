"""When things happen in a scheduled program: operations one after another, transfers beside them.

A TPU program is scheduled: its operations run in the order of the text. A transfer (a collective, or a copy between HBM
and VMEM) that starts early runs beside them on its own network and holds the program up only where it is waited for.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Run:
    """An operation; `item` is handed to the caller's function of seconds."""

    item: object


@dataclass(frozen=True)
class Start:
    """A transfer begins, behind those that its network is still busy with; `item` names it in the outcome."""

    key: str
    network: str
    seconds: float
    item: int | None = None


@dataclass(frozen=True)
class Done:
    """The program waits for the transfer of that key; nothing to wait for is no error (it started elsewhere)."""

    key: str


@dataclass(frozen=True)
class Loop:
    """A `body` that runs `trips` times."""

    body: "Sequence[Run | Start | Done | Loop]"
    trips: int


@dataclass
class _State:
    now: float = 0.0
    free: dict[str, float] = field(default_factory=dict)  # network -> when it is idle again
    pending: dict[str, tuple[float, int | None, str]] = field(default_factory=dict)  # key -> (end, item, network)
    exposed: dict = field(default_factory=dict)  # item, or network for transfers without one -> seconds

    def start(self, step: Start) -> None:
        end = max(self.now, self.free.get(step.network, 0.0)) + step.seconds
        self.free[step.network] = end
        self.pending[step.key] = (end, step.item, step.network)

    def done(self, key: str) -> None:
        end, item, network = self.pending.pop(key, (self.now, None, ""))
        if (wait := end - self.now) > 0:
            name = network if item is None else item
            self.exposed[name] = self.exposed.get(name, 0.0) + wait
            self.now = end

    def skip(self, seconds: float) -> None:
        """Moves the clock, and with it what is under way."""
        self.now += seconds
        self.free = {network: end + seconds for network, end in self.free.items()}
        self.pending = {key: (end + seconds, *rest) for key, (end, *rest) in self.pending.items()}


@dataclass(frozen=True)
class Outcome:
    """seconds: of the whole program; exposed: of those, spent waiting: by a transfer's item, or by its network."""

    seconds: float
    exposed: dict


def simulate(steps: Sequence, seconds_of: Callable[[object], float]) -> Outcome:
    """Runs a program whose operations take `seconds_of(item)`."""
    state = _State()
    _simulate(steps, seconds_of, state)
    for key in list(state.pending):  # the program ends when everything has arrived
        state.done(key)
    return Outcome(state.now, state.exposed)


def _simulate(steps: Sequence, seconds_of: Callable, state: _State) -> None:
    for step in steps:
        match step:
            case Run():
                state.now += seconds_of(step.item)
            case Start():
                state.start(step)
            case Done():
                state.done(step.key)
            case Loop():
                _loop(step, seconds_of, state)


def _loop(loop: Loop, seconds_of: Callable, state: _State) -> None:
    """The first trip as it comes, the second to see how trips follow one another; all others are like the second."""
    for _ in range(min(loop.trips, 2)):
        began, waited = state.now, dict(state.exposed)
        _simulate(loop.body, seconds_of, state)
    if loop.trips > 2:
        more = loop.trips - 2
        for name, seconds in state.exposed.items():
            state.exposed[name] = seconds + more * (seconds - waited.get(name, 0.0))
        state.skip(more * (state.now - began))
