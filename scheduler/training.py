"""Which training work fills an iteration, given what the serving side left of its budget.

It may assume that costs add up (the latency model's upper estimates do). It never delays a decode or a prompt: those
are planned before it is asked.

*Alone* (no request shares the iteration) every cut of rows is a function of its sweep: windows and backward units of
min(window, rows left) tokens, batches of `head_rows` label rows or what is left, at most one ride an iteration. Time
decides only how many of them run, and after which layer or sub-step a long one stops for a moment, so that a request
that comes need not wait for all of it; neither changes a result. So training alone repeats bit for bit, whatever the
machine's speed. What inference left unfinished is finished first.

*Beside inference* a window may be cut to fit what is left: a ride to a power of two, other units to a multiple of 32,
or 16 or 8; nothing below `min_window`. Forward work rides in the packed forward, where it costs only the difference, or
runs as a unit of some layers when that gives more rows × layers or is all that fits. A batch of label rows is never
cut, because its rows share the cost of reading the vocabulary's weights: it goes as many sub-steps as fit and on from
there in a later iteration.

Sweeps go in order: normal priority, then low, the older first; a later one gets what an earlier one cannot use. A floor
share of the time is owed to the oldest sweep of either priority. When the debt covers what has a place beside the
decodes, that runs, and prompts get what it leaves. Where the decodes leave no place at all, a whole unit runs over the
budget once the debt covers it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import chain
from math import inf

from coserve.scheduler.config import SchedulerConfig
from coserve.scheduler.costs import Cost, Costs
from coserve.scheduler.cuts import Cuts
from coserve.scheduler.features import ForwardLoad
from coserve.scheduler.floor import Floor
from coserve.scheduler.progress import PRIORITIES, Stand, SweepProgress, SweepQueue, stand
from coserve.scheduler.search import how_many
from coserve.scheduler.state import Ride, SweepState, Unit
from coserve.scheduler.traits import Traits

_WORTHWHILE = 0.125  # of an iteration: smaller pieces would crowd prompts out of more iterations than whole ones break
_GRAIN = 0.25  # of the promise: units of training alone, where they can be so short; a request may come meanwhile
_MOST_REFUSED = 4  # sweeps that stand elsewhere and find no room: what is left is too little to ask all jobs


@dataclass(slots=True)
class TrainingPlan:
    """Rides and units planned so far, and what the iteration costs with them."""

    traits: Traits
    load: ForwardLoad  # of the packed forward, rides included
    base: Cost  # of the packed forward and the overhead
    mean: float  # of the whole iteration
    upper: float
    rides: list[Ride] = field(default_factory=list)
    units: list[Unit] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)  # upper estimate of each unit
    owed: int = 0  # of the units, the first ones: what the floor is due
    refused: set[Stand] = field(default_factory=set)  # no unit of a sweep that stands there fits any more

    @property
    def empty(self) -> bool:
        return not (self.rides or self.units)

    def add_ride(self, sweep: SweepProgress, tokens: int, base: Cost) -> None:
        """`base`: what the packed forward costs with it."""
        self.load = self.load.with_ride(sweep.state, sweep.forward_tokens, tokens, self.traits)
        self.rides.append(sweep.ride(tokens))
        self.mean += base[0] - self.base[0]
        self.upper += base[1] - self.base[1]
        self.base = base
        self.refused.clear()

    def add_unit(self, unit: Unit, cost: Cost) -> None:
        self.units.append(unit)
        self.seconds.append(cost[1])
        self.mean += cost[0]
        self.upper += cost[1]

    def starts(self, budget: float) -> tuple[float, ...]:
        """When each unit must have begun to end within `budget` seconds; what is owed runs in any case."""
        return (*[inf] * self.owed, *[budget - seconds for seconds in self.seconds[self.owed :]])


@dataclass(frozen=True, slots=True)
class Due:
    """A sweep whose floor is to be paid in this iteration."""

    sweep: SweepState
    seconds: float  # that it is owed
    beside: TrainingPlan | None  # the ride or unit that has a place beside the decodes alone; None: nothing has


class TrainingPolicy:
    """Fills iterations with training; remembers only how much time it is owed."""

    def __init__(self, config: SchedulerConfig) -> None:
        self._config = config
        self.floor = Floor(config.floor_share, config.itl_seconds)
        self._cuts = Cuts(config.min_window)

    def due(self, sweeps: tuple[SweepState, ...], decodes: ForwardLoad, budget: float, costs: Costs) -> Due | None:
        """Whose floor is to be paid in an iteration of `budget` seconds, before anything but `decodes` has a place."""
        for sweep, owed in self.floor.debts(sweeps):
            costs.leave_as_prompts()  # in whose time it runs: what training leaves for surprises would cost them chunks
            plan = _begin(decodes, costs)
            whole = self._next_whole(SweepProgress(sweep), plan, costs)
            if owed < whole <= budget - plan.upper:
                continue
            beside = decodes.rows > 0 and self._add_beside(SweepProgress(sweep), plan, budget, costs)
            seconds = plan.mean - costs.base(decodes)[0]
            if beside and seconds >= min(0.999 * whole, _WORTHWHILE * budget):
                if seconds <= owed:
                    return Due(sweep, owed, plan)
            elif whole <= owed:
                return Due(sweep, owed, None)
        return None

    def fill(
        self,
        sweeps: tuple[SweepState, ...],
        load: ForwardLoad,
        budget: float,
        costs: Costs,
        due: Due | None = None,
    ) -> TrainingPlan:
        """Plan training beside the serving work `load`, up to `budget` seconds for the whole iteration; what is `due`
        runs in any case."""
        if load.rows and (due is None or due.beside is None):
            costs.leave_room(load, budget, self._config.margin_share)
        plan = _begin(load, costs)
        owed = None
        if due is not None:
            owed = SweepProgress(due.sweep)
            if due.beside is not None:
                _repeat(due.beside, owed, plan, costs)
            elif load.rows:  # over the budget: the largest unit that the debt covers, and nothing else
                self._add_beside(owed, plan, plan.upper + due.seconds, costs, mean_only=True)
            plan.owed = len(plan.units)
        queues = {p: SweepQueue(sweeps, p, owed) for p in PRIORITIES}
        if load.rows:
            self._fill_beside(chain(queues["normal"], queues["low"]), plan, budget, costs)
            return plan
        order = chain(queues["normal"], queues["low"])
        if owed is not None and queues["low"].first is owed:
            order = chain((owed,), queues["normal"], (s for s in queues["low"] if s is not owed))
        self._fill_alone(order, plan, budget, costs)
        return plan

    def _next_whole(self, sweep: SweepProgress, plan: TrainingPlan, costs: Costs) -> float:
        """Mean seconds of the sweep's next unit at its full size. The floor pays for whole units only: one late
        iteration for a large one, not many for small ones, which take longer together."""
        rows = sweep.next_head(self._config.head_rows)
        if sweep.forward_done and rows:
            return self._head_cost(sweep, rows, sweep.head_steps_left, costs)[0]
        if sweep.forward_done:
            return costs.backward(sweep, sweep.next_backward())[0]
        tokens = sweep.next_forward()
        if sweep.can_ride():
            return costs.ride(plan.load, sweep.state, sweep.forward_tokens, tokens)[0] - plan.base[0]
        return costs.slice(sweep, tokens, sweep.state.layers - sweep.partial_layer)[0]

    # Training alone: fixed cuts.

    def _fill_alone(self, order: Iterable[SweepProgress], plan: TrainingPlan, budget: float, costs: Costs) -> None:
        for sweep in order:
            while len(plan.units) < self._config.max_units and not sweep.done:
                if not self._add_alone(sweep, plan, budget, costs):
                    return
            if not sweep.done:
                return

    def _add_alone(self, sweep: SweepProgress, plan: TrainingPlan, budget: float, costs: Costs) -> bool:
        """Add the sweep's next unit; False if it does not fit, or is a second ride. The first always fits."""
        left = inf if plan.empty else budget - plan.upper
        rows = sweep.next_head(self._config.head_rows)
        if rows and (sweep.head_partial_rows or not sweep.partial_tokens):
            steps = self._grain(sweep.head_steps_left, lambda n: self._head_cost(sweep, rows, n, costs)[0])
            cost = self._head_cost(sweep, rows, steps, costs)
            if cost[1] > left:
                return False
            plan.add_unit(sweep.head(rows, steps), cost)
        elif not sweep.forward_done:
            return self._add_window_alone(sweep, plan, left, costs)
        else:
            tokens = sweep.next_backward()
            cost = costs.backward(sweep, tokens)
            if cost[1] > left:
                return False
            plan.add_unit(sweep.backward(tokens), cost)
        return True

    def _add_window_alone(self, sweep: SweepProgress, plan: TrainingPlan, left: float, costs: Costs) -> bool:
        """The next window in the packed forward, or some of its layers where all of them are long and these fit."""
        tokens, begun = sweep.next_forward(), sweep.partial_layer if sweep.partial_tokens else 0
        rides, base = False, plan.base
        if not sweep.partial_tokens:
            base = costs.ride(plan.load, sweep.state, sweep.forward_tokens, tokens)
            rides = not plan.rides and sweep.can_ride() and base[1] - plan.base[1] <= left
        if sweep.partial_tokens or base[0] - plan.base[0] > _GRAIN * self._config.itl_seconds:
            depth = self._grain(sweep.state.layers - begun, lambda n: costs.slice(sweep, tokens, n)[0])
            cost = costs.slice(sweep, tokens, depth)
            if cost[1] <= left:
                plan.add_unit(sweep.forward(tokens, depth), cost)
                return True
        if rides:
            plan.add_ride(sweep, tokens, base)
        return rides

    def _grain(self, most: int, seconds: Callable[[int], float]) -> int:
        """How many of `most` layers or sub-steps one unit takes; no result depends on it."""
        return max(1, how_many(most, _GRAIN * self._config.itl_seconds, seconds))

    # Training beside inference: cuts that fit.

    def _fill_beside(self, order: Iterable[SweepProgress], plan: TrainingPlan, budget: float, costs: Costs) -> None:
        for sweep in order:
            # What does not fit now fits less later, unless a ride changes what others cost.
            if plan.refused and stand(sweep, plan.traits) in plan.refused:
                continue
            while not sweep.done:
                most = self._config.max_units - len(plan.units)
                if plan.upper >= budget or most <= 0 or len(plan.refused) >= _MOST_REFUSED:
                    return
                if not self._add_beside(sweep, plan, budget, costs, most=most):
                    plan.refused.add(stand(sweep, plan.traits))
                    break

    def _add_beside(
        self, sweep: SweepProgress, plan: TrainingPlan, budget: float, costs: Costs, mean_only: bool = False,
        most: int = 1,
    ) -> bool:  # fmt: skip
        """Add the best unit of the sweep that fits, and of backward units up to `most`; False if one does not.
        `mean_only`: hold means, not upper estimates, against what is left."""
        which = 0 if mean_only else 1
        if sweep.next_backward():
            return self._add_backwards(sweep, plan, budget, which, costs, most)
        left, rows = budget - plan.upper, sweep.next_head(self._config.head_rows)
        if not sweep.forward_done and self._add_forward(sweep, plan, left, which, costs):
            return True
        return rows > 0 and self._add_head(sweep, rows, plan, left, which, costs)

    def _add_backwards(
        self, sweep: SweepProgress, plan: TrainingPlan, budget: float, which: int, costs: Costs, most: int
    ) -> bool:
        """Backward units, of which an iteration holds dozens."""
        fine, largest = self._cuts.fine, costs.largest_backward
        while most > 0 and (whole := sweep.next_backward()):
            unit = largest(sweep, fine(whole), budget - plan.upper, which)
            if unit is None:
                return False
            plan.add_unit(sweep.backward(unit[0]), unit[1])
            most -= 1
        return True

    def _add_head(
        self, sweep: SweepProgress, rows: int, plan: TrainingPlan, left: float, which: int, costs: Costs
    ) -> bool:
        """As many sub-steps of a batch of `rows` rows as fit."""
        steps = how_many(sweep.head_steps_left, left, lambda n: self._head_cost(sweep, rows, n, costs)[which])
        if steps:
            cost = self._head_cost(sweep, rows, steps, costs)
            plan.add_unit(sweep.head(rows, steps), cost)
        return steps > 0

    def _head_cost(self, sweep: SweepProgress, rows: int, steps: int, costs: Costs) -> Cost:
        return costs.head(rows, steps, sweep.state.head_steps, self._config.head_rows)

    def _add_forward(self, sweep: SweepProgress, plan: TrainingPlan, left: float, which: int, costs: Costs) -> bool:
        """A ride or some layers of a window: whatever fits and moves the most rows × layers."""
        layers, whole = sweep.state.layers, sweep.next_forward()
        ride = None
        if sweep.can_ride():
            room = left + plan.base[which]
            sizes = self._cuts.powers(whole)
            ride = costs.largest_ride(plan.load, sweep.state, sweep.forward_tokens, sizes, room, which)
        if ride is not None and ride[0] == whole:
            plan.add_ride(sweep, *ride)
            return True
        # The window that leaves the least of the budget unused, not the quickest one: what is left is lost.
        todo = layers - (sweep.partial_layer if sweep.partial_tokens else 0)
        sizes = (whole,) if sweep.partial_tokens else self._cuts.fine(whole)
        unit = costs.largest_slice(sweep, sizes, todo, left, which)
        if ride is not None and (unit is None or ride[0] * layers >= unit[0] * unit[1]):
            plan.add_ride(sweep, *ride)
        elif unit is not None:
            plan.add_unit(sweep.forward(unit[0], unit[1]), unit[2])
        else:
            return False
        return True


def seconds_beside(made: TrainingPlan | None, costs: Costs) -> Callable[[ForwardLoad], float]:
    """Upper estimate of an iteration by its packed forward, with the unit of `made`, if any."""
    if made is None:
        return lambda load: costs.serving(load)[1]
    units = made.upper - made.base[1]
    return lambda load: costs.base(load)[1] + units


def _begin(load: ForwardLoad, costs: Costs) -> TrainingPlan:
    base = costs.base(load)
    return TrainingPlan(costs.traits, load, base, *base)


def _repeat(made: TrainingPlan, sweep: SweepProgress, plan: TrainingPlan, costs: Costs) -> None:
    """Plan the one ride or unit of `made` again, where prompts run beside it."""
    for ride in made.rides:
        plan.add_ride(sweep, ride.tokens, costs.ride(plan.load, sweep.state, sweep.forward_tokens, ride.tokens))
    for unit in made.units:
        plan.add_unit(sweep.again(unit), (made.mean - made.base[0], made.upper - made.base[1]))
