"""When the engine's OpenMP threads spin and when they sleep."""

from __future__ import annotations

import os
import sys
import threading
import time

import pytest
import torch

from coserve.server.engine.cores import CoreSharing, ThreadTime, read_thread_time, work_alone, work_behind


@pytest.fixture(autouse=True)
def _two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


class Machine:
    """A clock, and a kernel that counts what the process gets of the cores."""

    def __init__(self) -> None:
        self.now = self.running = self.waiting = 0.0

    def pass_time(self, seconds: float, share: float, cores: CoreSharing) -> None:
        for _ in range(round(seconds / 0.05)):
            self.now += 0.05
            self.running += 0.1 * (1 - share)
            self.waiting += 0.1 * share
            cores.adjust()


@pytest.fixture
def machine():
    return Machine()


@pytest.fixture
def cores(machine):
    made = CoreSharing(lambda: machine.now, lambda: ThreadTime(machine.running, machine.waiting))
    yield made
    made.close()


def idle_teams() -> int:
    return sum(thread.name == "coserve-idle-team" for thread in threading.enumerate())


def test_threads_sleep_while_the_cores_are_crowded_and_spin_again_after_a_calm(machine, cores):
    machine.pass_time(5, 0.02, cores)
    machine.pass_time(0.2, 0.5, cores)  # something short, an optimizer step for instance
    machine.pass_time(1, 0.02, cores)
    assert not cores.crowded and idle_teams() == 0
    machine.pass_time(0.4, 0.5, cores)
    assert cores.crowded and idle_teams() == 1
    machine.pass_time(10, 0.1, cores)  # not crowded enough to begin with, and not calm either
    assert cores.crowded
    machine.pass_time(0.7, 0.0, cores)
    assert cores.crowded
    machine.pass_time(0.7, 0.0, cores)
    assert not cores.crowded and idle_teams() == 0


def test_a_moment_without_a_core_does_not_keep_the_threads_asleep(machine, cores):
    machine.pass_time(0.4, 0.5, cores)
    assert cores.crowded
    for _ in range(4):  # an optimizer step on its side thread, every half second
        machine.pass_time(0.45, 0.03, cores)
        machine.pass_time(0.05, 0.3, cores)
    assert not cores.crowded


def test_a_return_that_goes_wrong_makes_the_next_calm_longer(machine, cores):
    machine.pass_time(0.4, 0.5, cores)
    machine.pass_time(1.3, 0.0, cores)
    assert not cores.crowded
    machine.pass_time(0.4, 0.5, cores)  # spinning brought the neighbour's load back
    assert cores.crowded
    machine.pass_time(1.5, 0.0, cores)
    assert cores.crowded
    machine.pass_time(1.0, 0.0, cores)
    assert not cores.crowded


def test_without_the_kernels_counters_threads_sleep(machine):
    cores = CoreSharing(lambda: machine.now, lambda: None)
    assert cores.crowded and idle_teams() == 1
    cores.close()
    assert idle_teams() == 0


def test_one_thread_has_nobody_to_wait_for(machine):
    torch.set_num_threads(1)
    cores = CoreSharing(lambda: machine.now, lambda: ThreadTime(machine.running, machine.waiting))
    machine.pass_time(1, 0.9, cores)
    assert not cores.crowded
    cores.close()


def test_the_kernel_counts_running_threads():
    before = read_thread_time()
    if before is None:
        pytest.skip("this kernel keeps no schedstat")
    begun, end = time.monotonic(), time.thread_time() + 0.2
    while time.thread_time() < end:  # of this thread, however much others take of the cores
        pass
    after = read_thread_time()
    assert after is not None
    most = (time.monotonic() - begun) * threading.active_count() * 3 + 1.0  # torch's own threads have no names here
    assert 0.02 < (after.running - before.running) + (after.waiting - before.waiting) < most


def test_a_side_thread_works_alone_and_leaves_the_others_their_teams():
    parameter = torch.nn.Parameter(torch.randn(1 << 18))
    parameter.grad = torch.randn(1 << 18)
    torch.zeros(1 << 18).add_(1.0)
    torch.mm(torch.ones(500, 500), torch.ones(500, 500))
    before, seen = set(os.listdir("/proc/self/task")), []

    def side() -> None:
        work_alone()
        torch.zeros(1 << 18).add_(1.0)
        torch.mm(torch.ones(500, 500), torch.ones(500, 500))  # MKL's number of threads goes before OpenMP's
        torch.optim.AdamW([parameter]).step()
        seen.append((torch.get_num_threads(), set(os.listdir("/proc/self/task")) - before))

    thread = threading.Thread(target=side)
    thread.start()
    thread.join()
    (size, threads) = seen[0]
    assert size == 1 and torch.get_num_threads() == 2
    assert threads == {str(thread.native_id)}, "the side thread has started a team"


@pytest.mark.skipif(sys.platform != "linux", reason="niceness is the process's elsewhere")
def test_side_threads_of_training_go_behind_the_loop_alone():
    seen = []

    def side() -> None:
        work_behind()
        seen.append((torch.get_num_threads(), os.getpriority(os.PRIO_PROCESS, threading.get_native_id())))

    mine = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
    thread = threading.Thread(target=side)
    thread.start()
    thread.join()
    assert seen == [(1, 5)]
    assert os.getpriority(os.PRIO_PROCESS, threading.get_native_id()) == mine
