"""The order of a plan: who runs and who waits, class by class, the least-served tenant first.

It may assume that requests come in order of arrival. One pass over them sorts nothing: turns between tenants are
worked out only as far as the queue is admitted, so a thousand waiting requests cost no more than looking at them.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from heapq import heapify, heappop, heapreplace

from coserve.scheduler.fairness import FairShare
from coserve.scheduler.state import RequestState, SchedulerState


@dataclass(slots=True)
class Line:
    """One class of requests."""

    running: list[RequestState] = field(default_factory=list)
    prompts: dict[str, list[tuple[int, RequestState]]] = field(default_factory=dict)  # tenant -> (place, request)

    def add(self, place: int, request: RequestState) -> None:
        queue = self.prompts.get(request.tenant)
        if queue is None:
            self.prompts[request.tenant] = [(place, request)]
        elif queue[-1][1].ttft_deadline <= request.ttft_deadline:
            queue.append((place, request))
        else:  # a tenant's own requests go by deadline, then by arrival
            insort(queue, (place, request), key=lambda entry: entry[1].ttft_deadline)


class Lineup:
    """All requests of a state in the order in which they are served.

    Interactive requests, with the batch ones that are overdue, then the other batch requests. Within a class each turn
    goes to the tenant that is least served, counting what it was given in turns before.
    """

    def __init__(self, state: SchedulerState, share: FairShare) -> None:
        self._share = share
        self._shut: set[str] = set()
        self.adapters: dict[str, None] = {}  # that requests name, in order of arrival
        late: dict[str, float] = {}
        self._lines = self._sorted(state, {}, late)
        if late:
            self._lines = self._sorted(state, late, {})

    def _sorted(self, state: SchedulerState, late: Mapping[str, float], seen: dict[str, float]) -> tuple[Line, Line]:
        """`late`: tenant -> arrival of its newest overdue batch request, which and all before it are interactive ones;
        those that are found go to `seen`."""
        first, batch = Line(), Line()
        adapters, now = self.adapters, state.now
        for place, r in enumerate(state.requests):
            line = first
            if r.slo_class == "batch" and r.arrived > late.get(r.tenant, -1.0):
                line = batch
                if r.ttft_deadline <= now and not r.decoding:
                    seen[r.tenant] = r.arrived
            if r.adapter is not None:
                adapters[r.adapter] = None
            if r.running:
                line.running.append(r)
                if r.decoding:
                    continue
            line.add(place, r)
        return first, batch

    @property
    def running(self) -> list[RequestState]:
        """Decodes and running prompts; who steps back first is last."""
        return [r for line in self._lines for r in self._share.order_running(line.running)]

    def shut(self, tenant: str) -> None:
        """Leave out the rest of a tenant's prompts."""
        self._shut.add(tenant)

    def __iter__(self) -> Iterator[RequestState]:
        """Prompts, running and waiting."""
        for line in self._lines:
            yield from self._turns(line.prompts)

    def _turns(self, queues: Mapping[str, list[tuple[int, RequestState]]]) -> Iterator[RequestState]:
        heap = [(self._share.served(tenant), queue[0][0], tenant) for tenant, queue in queues.items()]
        heapify(heap)
        at = dict.fromkeys(queues, 0)
        while heap:
            level, _, tenant = heap[0]
            if tenant in self._shut:
                heappop(heap)
                continue
            queue, turn = queues[tenant], at[tenant]
            request = queue[turn][1]
            yield request
            if turn + 1 == len(queue):
                heappop(heap)
                continue
            at[tenant] = turn + 1
            heapreplace(heap, (level + self._share.cost(request), queue[turn + 1][0], tenant))
