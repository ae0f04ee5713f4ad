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
from itertools import chain, pairwise

from coserve.scheduler.fairness import FairShare
from coserve.scheduler.state import RequestState, SchedulerState

_Queues = defaultdict[str, list[RequestState]]  # tenant -> prompts to run, in order of arrival


class Lineup:
    """All requests of a state in the order in which they are served.

    Interactive requests, with the batch ones that are overdue, then the other batch requests. Within a class each turn
    goes to the tenant that is least served, counting what it was given in turns before; a tenant's own requests go by
    deadline, then by arrival.
    """

    def __init__(self, state: SchedulerState, share: FairShare) -> None:
        self._share = share
        self._shut: set[str] = set()
        late: dict[str, float] = {}
        self._sort(state, {}, late)
        if late:
            self._sort(state, late, {})

    def _sort(self, state: SchedulerState, late: Mapping[str, float], seen: dict[str, float]) -> None:
        """`late`: tenant -> arrival of its newest overdue batch request, which and all before it are interactive ones;
        those that are found go to `seen`."""
        self._running: tuple[list[RequestState], list[RequestState]] = [], []
        self._queues: tuple[_Queues, _Queues] = defaultdict(list), defaultdict(list)
        (first, batch), (queues, batch_queues), now = self._running, self._queues, state.now
        for r in state.requests:
            if r.slo_class == "batch" and r.arrived > late.get(r.tenant, -1.0):
                if r.running:
                    batch.append(r)
                    if r.decoding:
                        continue
                if r.ttft_deadline <= now:
                    seen[r.tenant] = r.arrived
                batch_queues[r.tenant].append(r)
                continue
            if r.running:
                first.append(r)
                if r.total_tokens - r.computed_tokens == 1 and r.output_tokens:  # `decoding`, where every call counts
                    continue
            queues[r.tenant].append(r)

    @cached_property
    def tenants(self) -> dict[str, float]:
        """Those with requests, and their weights."""
        running = {r.tenant: r.weight for r in chain(*self._running)}
        return running | {tenant: queue[0].weight for queues in self._queues for tenant, queue in queues.items()}

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
        """Prompts, running and waiting."""
        for queues in self._queues:
            yield from self._turns(queues)

    def _turns(self, queues: _Queues) -> Iterator[RequestState]:
        heap = [(self._share.served(tenant), queue[0].arrived, tenant) for tenant, queue in queues.items()]
        heapify(heap)
        turns: dict[str, Iterator[RequestState]] = {}
        while heap:
            level, arrived, tenant = heap[0]
            if tenant in self._shut:
                heappop(heap)
                continue
            if tenant not in turns:
                turns[tenant] = iter(_by_deadline(queues[tenant]))
            request = next(turns[tenant], None)
            if request is None:
                heappop(heap)
                continue
            yield request
            heapreplace(heap, (level + self._share.cost(request), arrived, tenant))


def _by_deadline(queue: list[RequestState]) -> list[RequestState]:
    """As they came, where that is the order of their deadlines."""
    if all(a.ttft_deadline <= b.ttft_deadline for a, b in pairwise(queue)):
        return queue
    return sorted(queue, key=lambda r: r.ttft_deadline)
