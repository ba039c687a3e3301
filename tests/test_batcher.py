"""Continuous batching: requests join and leave at any step, and none notices another."""

import random
import threading
import time

import numpy as np
import pytest

from sdrt.batcher import Batcher, admit, choose_size
from sdrt.errors import BackendError, BusyError, Cancelled, ParityError, RequestError
from sdrt.request import Request
from sdrt.runners.fake import FakeRunner

SCHEDULERS = ("ddim", "pndm", "euler", "dpmpp_2m", "euler_karras", "dpmpp_2m_karras")


def mixture(count, seed=0):
    rng = random.Random(seed)
    return [
        Request(
            prompt=rng.choice(["red circle", "blue", ""]),
            scheduler=rng.choice(SCHEDULERS),
            num_inference_steps=rng.randint(2, 12),
            guidance_scale=rng.choice([0.0, 1.0, 4.0, 7.5]),
            seed=rng.randrange(2**32),
            height=rng.choice([64, 64, 96]),
        )
        for _ in range(count)
    ]


def pixels(result):
    return [image.tobytes() for image in result.images]


def serially(pipeline, requests):
    return [pixels(pipeline.generate(request)) for request in requests]


def test_mixed_requests_equal_the_same_requests_alone(fake):
    requests = mixture(24)
    with Batcher(fake(), max_batch=8) as batcher:
        results = [ticket.result(30) for ticket in [batcher.submit(request) for request in requests]]
        assert batcher.stats().occupancy > 2
    assert [pixels(result) for result in results] == serially(fake(), requests)


def test_sixteen_threads_get_what_a_serial_caller_gets(fake):
    requests = mixture(16 * 20, seed=1)
    expected = serially(fake(), requests)
    got = [None] * len(requests)
    with Batcher(fake(), max_batch=8, max_queue=400) as batcher:

        def work(first):
            for index in range(first, len(requests), 16):
                got[index] = pixels(batcher.submit(requests[index]).result(60))

        threads = [threading.Thread(target=work, args=(first,)) for first in range(16)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert got == expected


def test_a_late_short_request_starts_within_a_step_and_overtakes_a_long_one(fake):
    reached, go_on = threading.Event(), threading.Event()

    def pause(name, feeds):
        if name == "step" and runner.calls.get("step", 0) == 3:
            reached.set()
            go_on.wait(10)

    runner = FakeRunner(before=pause)
    with Batcher(fake(runner), max_batch=2) as batcher:
        long = batcher.submit(Request(prompt="red", scheduler="ddim", num_inference_steps=200, seed=0))
        assert reached.wait(10)
        short = batcher.submit(Request(prompt="blue", scheduler="ddim", num_inference_steps=2, seed=1))
        go_on.set()
        short.result(10)
        assert not long.done()
        assert runner.batches[:6] == [1, 1, 1, 1, 2, 2]
        long.result(30)


def test_cancels_at_random_steps_free_their_place_and_spare_the_others(fake):
    rng = random.Random(0)
    survivors = mixture(20, seed=2)
    expected = serially(fake(), survivors)
    with Batcher(fake(), max_batch=8, max_queue=500) as batcher:
        tickets = []
        for request in survivors:
            tickets.append(batcher.submit(request))
            for _ in range(10):
                doomed = batcher.submit(Request(prompt="blue", scheduler="ddim", num_inference_steps=900, seed=1))
                timer = threading.Timer(rng.random() * 0.3, doomed.cancel)
                timer.start()
        assert [pixels(ticket.result(60)) for ticket in tickets] == expected
        deadline = time.monotonic() + 20
        while batcher.stats().cancelled < 200 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert batcher.stats().cancelled == 200
        assert batcher.stats().running == 0


def test_a_cancelled_request_says_so_and_leaves_within_a_step(fake):
    runner = FakeRunner(before=lambda name, feeds: time.sleep(0.005))
    with Batcher(fake(runner)) as batcher:
        ticket = batcher.submit(Request(prompt="red", scheduler="ddim", num_inference_steps=990, seed=0))
        while ticket.state != "running":
            time.sleep(0.001)
        ticket.cancel()
        with pytest.raises(Cancelled):
            ticket.result(1)
        assert ticket.state == "cancelled"


def test_a_full_queue_refuses_at_once(fake):
    gate = threading.Event()
    with Batcher(fake(FakeRunner(before=lambda name, feeds: gate.wait(10))), max_batch=1, max_queue=2) as batcher:
        first = batcher.submit(Request(prompt="red", seed=0))
        while first.state != "running":
            time.sleep(0.001)
        waiting = [batcher.submit(Request(prompt="red", seed=0)) for _ in range(2)]
        with pytest.raises(BusyError):
            batcher.submit(Request(prompt="red", seed=0))
        gate.set()
        assert all(ticket.result(30) for ticket in [first, *waiting])


def test_a_bad_request_is_refused_where_it_is_submitted(fake):
    with Batcher(fake()) as batcher:
        with pytest.raises(RequestError):
            batcher.submit(Request(prompt="red", num_inference_steps=0))
        with pytest.raises(RequestError):
            batcher.submit(Request(prompt="red", num_images_per_prompt=9))


def test_a_backend_failure_fails_its_step_and_the_next_request_succeeds(fake):
    failing = threading.Event()

    def fail(name, feeds):
        if name == "step" and failing.is_set():
            failing.clear()
            raise BackendError("step failed", hint="none")

    with Batcher(fake(FakeRunner(before=fail))) as batcher:
        failing.set()
        doomed = batcher.submit(Request(prompt="red", seed=0))
        with pytest.raises(BackendError):
            doomed.result(10)
        assert doomed.state == "failed"
        assert batcher.submit(Request(prompt="red", seed=0)).result(10).images


def test_nan_reaches_only_its_own_caller(fake):
    poison = int(fake()._prompts._tokenizer.encode("poison").ids[1])
    requests = mixture(6, seed=3)
    with Batcher(fake(FakeRunner(poison=poison))) as batcher:
        bad = batcher.submit(Request(prompt="poison", scheduler="ddim", num_inference_steps=5, seed=0))
        good = [batcher.submit(request) for request in requests]
        with pytest.raises(ParityError):
            bad.result(10)
        assert [pixels(ticket.result(30)) for ticket in good] == serially(fake(), requests)


def test_closing_drains_or_cancels(fake):
    batcher = Batcher(fake())
    ticket = batcher.submit(Request(prompt="red", seed=0))
    batcher.close()
    assert ticket.result(0).images
    with pytest.raises(BusyError):
        batcher.submit(Request(prompt="red", seed=0))
    impatient = Batcher(fake(FakeRunner(before=lambda name, feeds: time.sleep(0.002))))
    ticket = impatient.submit(Request(prompt="red", scheduler="ddim", num_inference_steps=990, seed=0))
    impatient.close(drain=False)
    with pytest.raises(Cancelled):
        ticket.result(0)


@pytest.mark.parametrize(
    ("waiting", "running", "expected"),
    [([1, 1, 1], 0, 3), ([1, 1, 1], 6, 2), ([4, 1], 6, 0), ([2, 9], 0, 1), ([], 3, 0)],
)
def test_admission_is_first_come_first_served(waiting, running, expected):
    assert admit(waiting, running, 8) == expected


def test_sizes_take_turns():
    sizes = [(8, 8), (12, 8), (8, 8)]
    order = []
    last = None
    for _ in range(4):
        last = choose_size(sizes, last)
        order.append(last)
    assert order == [(8, 8), (12, 8), (8, 8), (12, 8)]


def test_finished_latents_belong_to_the_caller(fake):
    with Batcher(fake()) as batcher:
        first = batcher.submit(Request(prompt="red", scheduler="ddim", num_inference_steps=3, seed=0)).result(10)
        kept = first.latents.copy()
        batcher.submit(Request(prompt="blue", scheduler="ddim", num_inference_steps=3, seed=1)).result(10)
    np.testing.assert_array_equal(first.latents, kept)
