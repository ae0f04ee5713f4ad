"""The order of a plan: who runs and who waits, class by class, the least-served tenant first.

It may assume that requests come in order of arrival. Its one pass over them sorts nothing: turns between tenants, and
the order of a tenant's own requests, are worked out only as far as the queue is admitted. So the share may meet the
tenants that the lineup names before it is asked for an order.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from functools import cached_property
from heapq import heapify, heappop, heapreplace
from itertools import chain
from operator import attrgetter

from coserve.scheduler.fairness import FairShare
from coserve.scheduler.state import RequestState, SchedulerState

_Queues = defaultdict[str, list[RequestState]]  # tenant -> prompts to run, in order of arrival
_DUE = attrgetter("ttft_deadline")


class Lineup:
    """All requests of a state in the order in which they are served.

    Interactive requests, with the batch ones that are overdue, then the other batch requests. Within a class each turn
    goes to the tenant that is least served, counting what it was given in turns before; among those that are level, to
    the request whose first token is due next, if it still can be in time. A tenant's own requests go by deadline, then
    by arrival.
    """

    def __init__(self, state: SchedulerState, share: FairShare) -> None:
        self._share, self._now = share, state.now
        self._shut: set[str] = set()
        self._weights: dict[str, float] = {}  # of those that run
        late: dict[str, float] = {}
        self._sort(state, {}, late)
        if late:
            self._sort(state, late, {})

    def _sort(self, state: SchedulerState, late: Mapping[str, float], seen: dict[str, float]) -> None:
        """`late`: tenant -> arrival of its newest overdue batch request, which and all before it are interactive ones;
        those that are found go to `seen`."""
        self._running: tuple[list[RequestState], list[RequestState]] = [], []
        self._queues: tuple[_Queues, _Queues] = defaultdict(list), defaultdict(list)
        (first, batch), (queues, batch_queues) = self._running, self._queues
        weights, now = self._weights, state.now
        for r in state.requests:
            tenant = r.tenant
            batched = r.slo_class == "batch" and (not late or r.arrived > late.get(tenant, -1.0))
            if r.running:
                (batch if batched else first).append(r)
                weights[tenant] = r.weight
                if r.total_tokens - r.computed_tokens == 1 and r.output_tokens:  # `decoding`, where calls count
                    continue
            if batched:
                if r.ttft_deadline <= now:
                    seen[tenant] = r.arrived
                batch_queues[tenant].append(r)
            else:
                queues[tenant].append(r)

    @cached_property
    def tenants(self) -> dict[str, float]:
        """Those with requests, and their weights."""
        weights = dict(self._weights)
        for tenant, queue in chain(*[queues.items() for queues in self._queues]):
            if tenant not in weights:
                weights[tenant] = queue[0].weight
        return weights

    @property
    def expects(self) -> bool:
        """Whether an interactive prompt is running or waiting; batch ones that are overdue are not meant."""
        return any(r.slo_class == "interactive" for queue in self._queues[0].values() for r in queue)

    @cached_property
    def running(self) -> list[RequestState]:
        """Decodes and running prompts; who steps back first is last."""
        return [r for requests in self._running for r in self._share.order_running(requests)]

    def shut(self, tenant: str) -> None:
        """Leave out the rest of a tenant's prompts."""
        self._shut.add(tenant)

    def __iter__(self) -> Iterator[RequestState]:
        """Prompts, running and waiting; none is left out yet."""
        self._shut.clear()
        for queues in self._queues:
            yield from self._turns(queues)

    def _turns(self, queues: _Queues) -> Iterator[RequestState]:
        share, now = self._share, self._now
        served = share.served_of(queues)
        later = defaultdict(list)
        for tenant, turn in share.turns(served).items():
            later[turn].append(tenant)
        turns = sorted(later, reverse=True)
        heap: list[tuple[float, bool, float, float, str]] = []
        orders: dict[str, list[RequestState]] = {}  # what is left of queues that had a turn, the next one last
        while heap or turns:
            # Deadlines are looked at when the turn of a tenant's level has come.
            while turns and (not heap or turns[-1] <= heap[0][0]):
                turn = turns.pop()
                for tenant in later[turn]:
                    head = _due_next(queues[tenant])
                    heap.append((turn, head.ttft_deadline <= now, head.ttft_deadline, head.arrived, tenant))
                heapify(heap)
            tenant = heap[0][-1]
            if tenant in self._shut:
                heappop(heap)
                continue
            order = orders.get(tenant)
            if order is None:
                order = orders[tenant] = sorted(queues[tenant], key=_DUE)
                order.reverse()
            request = order.pop()
            yield request
            if order:
                served[tenant] += share.cost(request)
                turn, head = share.turn(served[tenant]), order[-1]
                heapreplace(heap, (turn, head.ttft_deadline <= now, head.ttft_deadline, head.arrived, tenant))
            else:
                heappop(heap)


def _due_next(queue: list[RequestState]) -> RequestState:
    """Of equals the first. Written out: every plan asks this of most queues, and `min` takes three times as long."""
    head = queue[0]
    due = head.ttft_deadline
    for r in queue:
        if r.ttft_deadline < due:
            head, due = r, r.ttft_deadline
    return head
