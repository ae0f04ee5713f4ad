"""Which training work fills an iteration, given what the serving side left of its budget.

It may assume that costs add up (the latency model's upper estimates do). It never delays a decode or a prompt: those
are planned before it is asked.

*Alone* (no request shares the iteration) every cut is a function of its sweep: rides and backward units of
min(window, rows left) tokens, whole batches of `head_rows` label rows or what is left, at most one ride an iteration.
Time decides only how many of them run. So training alone repeats bit for bit, whatever the machine's speed. What
inference left unfinished is finished first.

*Beside inference* a window may be cut to a power of two down to `min_window` to fit what is left. Forward work rides in
the packed forward, where it costs only the difference, or runs as a unit of some layers when that gives more rows ×
layers a second or is all that fits. A batch of label rows is never cut, because its rows share the cost of reading the
vocabulary's weights: it goes as many sub-steps as fit and on from there in a later iteration.

Sweeps go in order: normal priority, then low, the older first; a later one gets what an earlier one cannot use. A floor
share of the time is owed to the oldest sweep of either priority; when the debt covers a unit, that unit runs even over
the budget.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from coserve.scheduler.config import SchedulerConfig
from coserve.scheduler.features import (
    ForwardLoad,
    Vector,
    backward_vector,
    base_vector,
    coarse,
    head_vector,
    slice_vector,
)
from coserve.scheduler.latency import LatencyModel
from coserve.scheduler.progress import SweepProgress
from coserve.scheduler.state import ForwardUnit, Ride, SweepState, Unit

PRIORITIES = ("normal", "low")
Cost = tuple[float, float]  # (mean, upper) seconds


def priority_of(sweep: SweepState) -> str:
    """A sweep that carries any normal job is normal."""
    return "low" if sweep.jobs and all(job.priority == "low" for job in sweep.jobs) else "normal"


class Costs:
    """The latency model's answers, each asked once a plan.

    `whole` is the full size of such a unit: a smaller one never takes longer, however little is known about it.
    """

    def __init__(self, model: LatencyModel) -> None:
        self._model = model
        self._known: dict[tuple[object, ...], Cost] = {}

    def _cost(self, key: tuple[object, ...], vector: Callable[[], Vector]) -> Cost:
        known = self._known.get(key)
        if known is None:
            known = self._known[key] = self._model.part(vector())
        return known

    def base(self, load: ForwardLoad) -> Cost:
        """The packed forward with the iteration's overhead (where only whole iterations are timed, their sum is known
        much better than either)."""
        return self._cost(("base", load), lambda: base_vector(load))

    def head(self, rows: int, steps: int, of: int, whole: int) -> Cost:
        """`steps` of the `of` sub-steps of a batch of `rows` label rows; `whole` rows are the largest batch."""
        cost = self._cost(("head", rows, steps, of), lambda: head_vector(rows, steps / of))
        if steps < of:
            return _no_more_than(cost, self.head(rows, of, of, whole))
        return cost if rows >= whole else _no_more_than(cost, self.head(whole, of, of, whole))

    def backward(self, tokens: int, before: int, whole: int) -> Cost:
        before = coarse(before)
        cost = self._cost(("backward", tokens, before), lambda: backward_vector(tokens, before))
        return cost if tokens >= whole else _no_more_than(cost, self.backward(whole, before, whole))

    def slice(self, tokens: int, layers: int, of: int) -> Cost:
        return self._cost(("slice", tokens, layers, of), lambda: slice_vector(tokens, layers / of))


def _no_more_than(cost: Cost, larger: Cost) -> Cost:
    return (cost[0], min(cost[1], larger[1]))


@dataclass(slots=True)
class TrainingPlan:
    """Rides and units planned so far, and what the iteration costs with them."""

    load: ForwardLoad  # of the packed forward, rides included
    base: Cost  # of the packed forward and the overhead
    mean: float  # of the whole iteration
    upper: float
    rides: list[Ride] = field(default_factory=list)
    units: list[Unit] = field(default_factory=list)

    @property
    def empty(self) -> bool:
        return not (self.rides or self.units)

    def add_ride(self, ride: Ride, load: ForwardLoad, base: Cost) -> None:
        self.rides.append(ride)
        self.mean += base[0] - self.base[0]
        self.upper += base[1] - self.base[1]
        self.load, self.base = load, base

    def add_unit(self, unit: Unit, cost: Cost) -> None:
        self.units.append(unit)
        self.mean += cost[0]
        self.upper += cost[1]


class TrainingPolicy:
    """Fills iterations with training; remembers only how much time the oldest sweep of each priority is owed."""

    def __init__(self, config: SchedulerConfig) -> None:
        self._config = config
        self._owed: dict[str, float] = dict.fromkeys(PRIORITIES, 0.0)

    def fill(
        self,
        sweeps: tuple[SweepState, ...],
        load: ForwardLoad,
        budget: float,
        costs: Costs,
    ) -> TrainingPlan:
        """Plan training beside the serving work `load`, up to `budget` seconds for the whole iteration."""
        base = costs.base(load)
        plan = TrainingPlan(load, base, *base)
        queues = {p: [SweepProgress(s) for s in sweeps if priority_of(s) == p] for p in PRIORITIES}
        queues = {p: [s for s in queue if not s.done] for p, queue in queues.items()}
        alone = load.rows == 0
        due = next((p for p in PRIORITIES if queues[p] and self._is_due(p, queues[p][0], plan, costs)), None)
        if due == "low":
            order = queues["low"][:1] + queues["normal"] + queues["low"][1:]
        else:
            order = queues["normal"] + queues["low"]
        if alone:
            self._fill_alone(order, plan, budget, costs)
        else:
            self._fill_beside(order, plan, budget, costs)
            if due is not None and not _works_on(plan, queues[due][0].state.sweep_id):
                # Over the budget, but owed: the largest unit that the debt covers.
                self._add_beside(queues[due][0], plan, plan.upper + self._owed[due], costs, mean_only=True)
        return plan

    def settle(self, sweeps: tuple[SweepState, ...], seconds: float, trained: dict[int, float]) -> None:
        """Account for an iteration of `seconds`, `trained` of which went to the sweeps with these ids."""
        for p in PRIORITIES:
            oldest = next((s for s in sweeps if priority_of(s) == p and not SweepProgress(s).done), None)
            if oldest is None:
                self._owed[p] = 0.0
                continue
            owed = self._owed[p] + self._config.floor_share * seconds - trained.get(oldest.sweep_id, 0.0)
            # Time above the share counts against it, but for one iteration at most: a sweep that had the device to
            # itself for an hour is not held back for it when streams come.
            self._owed[p] = max(owed, -self._config.itl_seconds)

    def _is_due(self, p: str, sweep: SweepProgress, plan: TrainingPlan, costs: Costs) -> bool:
        return self._owed[p] > 0.0 and self._next_whole(sweep, plan, costs) <= self._owed[p]

    def _next_whole(self, sweep: SweepProgress, plan: TrainingPlan, costs: Costs) -> float:
        """Mean seconds of the sweep's next unit at its full size. The floor pays for whole units only: one late
        iteration for a large one, not many for small ones, which take longer together."""
        layers = sweep.state.layers
        rows = sweep.next_head(self._config.head_rows)
        if sweep.forward_done and rows:
            return self._head_cost(sweep, rows, sweep.head_steps_left, costs)[0]
        if sweep.forward_done:
            tokens = sweep.next_backward()
            return costs.backward(tokens, sweep.rows_before_backward - tokens, sweep.state.window)[0]
        tokens = sweep.next_forward()
        if sweep.can_ride():
            return costs.base(plan.load.with_ride(sweep.state, tokens))[0] - plan.base[0]
        return costs.slice(tokens, layers - sweep.partial_layer, layers)[0]

    # Training alone: fixed cuts.

    def _fill_alone(self, order: list[SweepProgress], plan: TrainingPlan, budget: float, costs: Costs) -> None:
        for sweep in order:
            while len(plan.units) < self._config.max_units and not sweep.done:
                if not self._add_alone(sweep, plan, budget, costs):
                    return
            if not sweep.done:
                return

    def _add_alone(self, sweep: SweepProgress, plan: TrainingPlan, budget: float, costs: Costs) -> bool:
        """Add the sweep's next unit; False if it does not fit, or is a second ride. The first always fits."""
        layers = sweep.state.layers
        left = float("inf") if plan.empty else budget - plan.upper
        rows = sweep.next_head(self._config.head_rows)
        if rows and (sweep.head_partial_rows or not sweep.partial_tokens):
            steps = sweep.head_steps_left
            cost = self._head_cost(sweep, rows, steps, costs)
            if cost[1] > left:
                return False
            plan.add_unit(sweep.head(rows, steps), cost)
        elif sweep.partial_tokens:
            tokens, depth = sweep.partial_tokens, layers - sweep.partial_layer
            cost = costs.slice(tokens, depth, layers)
            if cost[1] > left:
                return False
            plan.add_unit(sweep.forward(tokens, depth), cost)
        elif not sweep.forward_done:
            if plan.rides or not sweep.can_ride():
                return False
            tokens = sweep.next_forward()
            load = plan.load.with_ride(sweep.state, tokens)
            base = costs.base(load)
            if base[1] - plan.base[1] > left:
                return False
            plan.add_ride(sweep.ride(tokens), load, base)
        else:
            tokens = sweep.next_backward()
            cost = costs.backward(tokens, sweep.rows_before_backward - tokens, sweep.state.window)
            if cost[1] > left:
                return False
            plan.add_unit(sweep.backward(tokens), cost)
        return True

    # Training beside inference: cuts that fit.

    def _fill_beside(self, order: list[SweepProgress], plan: TrainingPlan, budget: float, costs: Costs) -> None:
        for sweep in order:
            while (
                plan.upper < budget
                and len(plan.units) < self._config.max_units
                and not sweep.done
                and self._add_beside(sweep, plan, budget, costs)
            ):
                pass

    def _add_beside(
        self, sweep: SweepProgress, plan: TrainingPlan, budget: float, costs: Costs, mean_only: bool = False
    ) -> bool:
        """Add the best unit of the sweep that fits; False if none does. `mean_only`: hold means, not upper estimates,
        against what is left."""
        which = 0 if mean_only else 1
        left = budget - plan.upper
        if not sweep.forward_done:
            rows = sweep.next_head(self._config.head_rows)
            return self._add_forward(sweep, plan, left, which, costs) or (
                rows > 0 and self._add_head(sweep, rows, plan, left, which, costs)
            )
        rows = sweep.next_head(self._config.head_rows)
        if rows:
            return self._add_head(sweep, rows, plan, left, which, costs)
        for tokens in self._fine_sizes(sweep.next_backward()):
            cost = costs.backward(tokens, sweep.rows_before_backward - tokens, sweep.state.window)
            if cost[which] <= left:
                plan.add_unit(sweep.backward(tokens), cost)
                return True
        return False

    def _add_head(
        self, sweep: SweepProgress, rows: int, plan: TrainingPlan, left: float, which: int, costs: Costs
    ) -> bool:
        """As many sub-steps of a batch of `rows` rows as fit."""
        steps = _most(sweep.head_steps_left, left, lambda n: self._head_cost(sweep, rows, n, costs)[which])
        if steps:
            cost = self._head_cost(sweep, rows, steps, costs)
            plan.add_unit(sweep.head(rows, steps), cost)
        return steps > 0

    def _head_cost(self, sweep: SweepProgress, rows: int, steps: int, costs: Costs) -> Cost:
        return costs.head(rows, steps, sweep.state.head_steps, self._config.head_rows)

    def _add_forward(self, sweep: SweepProgress, plan: TrainingPlan, left: float, which: int, costs: Costs) -> bool:
        """A ride or some layers of a window: whatever fits and moves the most rows × layers."""
        layers = sweep.state.layers
        whole = sweep.next_forward()
        ride: tuple[int, ForwardLoad, Cost] | None = None
        if sweep.can_ride():
            for tokens in self._sizes(whole):
                load = plan.load.with_ride(sweep.state, tokens)
                cost = costs.base(load)
                if cost[which] - plan.base[which] <= left:
                    ride = (tokens, load, cost)
                    break
            if ride is not None and ride[0] == whole:
                plan.add_ride(sweep.ride(whole), ride[1], ride[2])
                return True
        # The window that leaves the least of the budget unused, not the quickest one: what is left is lost.
        best: tuple[int, ForwardUnit, Cost] | None = None
        todo = layers - (sweep.partial_layer if sweep.partial_tokens else 0)
        for tokens in (whole,) if sweep.partial_tokens else self._fine_sizes(whole):
            depth = _most(todo, left, lambda n, rows=tokens: costs.slice(rows, n, layers)[which])  # type: ignore[misc]
            if depth and (best is None or tokens * depth > best[0]):
                best = (
                    tokens * depth,
                    ForwardUnit(sweep.state.sweep_id, tokens, depth),
                    costs.slice(tokens, depth, layers),
                )
        if ride is not None and (best is None or ride[0] * layers >= best[0]):
            plan.add_ride(sweep.ride(ride[0]), ride[1], ride[2])
            return True
        if best is None:
            return False
        plan.add_unit(sweep.forward(best[1].tokens, best[1].layers), best[2])
        return True

    def _fine_sizes(self, whole: int) -> list[int]:
        """`whole`, then the multiples of 32 below it, then the powers of two down to `min_window`."""
        sizes = [whole, *range((whole - 1) // 32 * 32, 31, -32)]
        return sizes + [n for n in (16, 8) if self._config.min_window <= n < whole]

    def _sizes(self, whole: int) -> list[int]:
        """`whole`, then the powers of two below it down to `min_window`."""
        sizes = [whole]
        size = 1 << max(0, (whole - 1).bit_length() - 1)
        while size >= self._config.min_window and size < whole:
            sizes.append(size)
            size >>= 1
        return sizes


def _most(todo: int, left: float, seconds: Callable[[int], float]) -> int:
    """How many of `todo` layers or sub-steps fit in `left` seconds; 0 if not even one does. `seconds(n)` of n of them
    must not fall with n."""
    one = seconds(1)
    if one > left:
        return 0
    if todo == 1:
        return 1
    every = seconds(todo)
    if every <= left:
        return todo
    # Nearly a straight line (an upper estimate is a linear mean plus a norm): a few steps from the chord, if any.
    most = max(1, min(todo - 1, 1 + int((left - one) / ((every - one) / (todo - 1)))))
    while most > 1 and seconds(most) > left:
        most -= 1
    while most < todo - 1 and seconds(most + 1) <= left:
        most += 1
    return most


def _works_on(plan: TrainingPlan, sweep_id: int) -> bool:
    return any(r.sweep_id == sweep_id for r in plan.rides) or any(u.sweep_id == sweep_id for u in plan.units)
