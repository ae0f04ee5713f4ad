"""Which running streams go on, and who gives blocks back for them.

It may assume that running requests come in the order in which they are served: who steps back first is last. It never
takes a block that nobody can give. The rules are those that `admission` states under *Decodes*.
"""

from __future__ import annotations

from coserve.scheduler.room import Room
from coserve.scheduler.state import RequestState


def run_decodes(
    running: list[RequestState], room: Room, release: bool
) -> tuple[list[RequestState], list[RequestState], list[str], list[str]]:
    """(decodes that run, prompts, requests that give their blocks back, requests that can never go on)."""
    alive = list(running)
    decodes: list[RequestState] = []
    prompts: list[RequestState] = []  # also those that give their blocks back
    preempted: list[str] = []
    unservable: list[str] = []

    def step_back(r: RequestState) -> None:
        alive.remove(r)
        preempted.append(r.request_id)
        room.give_back(r)

    for r in running:
        if r.total_tokens - r.computed_tokens != 1 or not r.output_tokens:  # not `decoding`, where calls count
            prompts.append(r)
            continue
        if not r.adapter_ready or r.request_id in preempted:
            continue
        if r.total_tokens <= r.blocks_held * room.size:
            decodes.append(r)
            continue
        need = room.needed(r, r.total_tokens)
        if release and need > room.free:
            continue
        own = [o for o in alive if o.tenant == r.tenant] if need > room.left_of_share(r.tenant) else []
        while need > room.left_of_share(r.tenant) and own[-1] is not r:
            step_back(own.pop())
        while need > room.free and alive[-1] is not r:
            step_back(alive[-1])
        if need <= min(room.free, room.left_of_share(r.tenant)):
            room.take(r, r.total_tokens)
            room.claim(r, need)
            decodes.append(r)
        elif len(alive) > 1 and (need > room.free or len(own) > 1):
            step_back(r)
        elif not (preempted or release) and (need > room.free + room.kept or need > room.left_of_share(r.tenant)):
            unservable.append(r.request_id)
        # else: it waits for a training step's end, or one iteration: blocks that the victims shared are free then
    return decodes, prompts, preempted, unservable
