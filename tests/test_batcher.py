"""Continuous batching: requests join and leave at any step, and none notices another."""

import random
import threading
import time
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from sdrt.batcher import Batcher, admit, choose_size
from sdrt.errors import BackendError, BusyError, Cancelled, ClosedError, ParityError, RequestError
from sdrt.request import Request
from sdrt.runners.fake import FakeRunner

HUGE = Request(prompt="red", num_inference_steps=1, height=512, width=512, windowed=True, seed=1, scheduler="ddim")
HUGE_TILES = 25
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


def hold_until(event, order):
    def before(name, feeds):
        order.append(name)
        event.wait(10)

    return before


def test_mixed_requests_equal_the_same_requests_alone(fake):
    requests, submitted = mixture(24), threading.Event()
    # Held until all are there: else a fast worker draws each alone, and nothing is mixed.
    with Batcher(fake(FakeRunner(before=hold_until(submitted, []))), max_batch=8) as batcher:
        tickets = [batcher.submit(request) for request in requests]
        submitted.set()
        results = [ticket.result(30) for ticket in tickets]
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


def test_a_cancelled_request_takes_part_in_no_further_step(fake):
    reached, go_on = threading.Event(), threading.Event()

    def pause(name, feeds):
        if name == "step" and len(runner.batches) == 3:
            reached.set()
            go_on.wait(10)

    runner = FakeRunner(before=pause)
    with Batcher(fake(runner)) as batcher:
        ticket = batcher.submit(Request(prompt="red", scheduler="ddim", num_inference_steps=50, seed=0))
        assert reached.wait(10)
        ticket.cancel()
        go_on.set()
        with pytest.raises(Cancelled):
            ticket.result(10)
    assert len(runner.batches) == 4


def test_a_bare_future_that_is_cancelled_is_a_cancelled_ticket(fake):
    with Batcher(fake(FakeRunner(before=lambda name, feeds: time.sleep(0.002)))) as batcher:
        ticket = batcher.submit(Request(prompt="red", scheduler="ddim", num_inference_steps=990, seed=0))
        assert ticket.future.cancel()
        assert ticket.state == "cancelled"
        with pytest.raises(Cancelled):
            ticket.result(1)
        assert batcher.submit(Request(prompt="red", num_inference_steps=2, seed=0)).result(10).images
        assert batcher.stats().cancelled == 1


def test_those_still_being_denoised_wait_for_one_decode_at_a_time(fake):
    order, submitted = [], threading.Event()
    with Batcher(fake(FakeRunner(before=hold_until(submitted, order)))) as batcher:
        long = batcher.submit(Request(prompt="red", scheduler="ddim", num_inference_steps=40, seed=0))
        short = [
            batcher.submit(Request(prompt="red", scheduler="ddim", num_inference_steps=3, seed=seed))
            for seed in range(4)
        ]
        several = batcher.submit(
            Request(prompt="red", scheduler="ddim", num_inference_steps=3, seed=9, num_images_per_prompt=3)
        )
        submitted.set()
        for ticket in [*short, several, long]:
            assert ticket.result(20).images
    decodes = [index for index, name in enumerate(order) if name == "vae_decoder"]
    assert len(decodes) == 8
    assert all(order[index - 1] == "step" for index in decodes)


def test_images_that_wait_for_the_vae_leave_their_place_until_a_whole_batch_waits(fake):
    held, submitted = [], threading.Event()

    def count(name, feeds):
        submitted.wait(10)
        held.append(sum(len(item.prepared.trajectories) for item in batcher._active))

    with Batcher(fake(FakeRunner(before=count)), max_batch=2) as batcher:
        tickets = [
            batcher.submit(Request(prompt="red", scheduler="ddim", num_inference_steps=1, seed=seed))
            for seed in range(30)
        ]
        submitted.set()
        assert all(ticket.result(20).images for ticket in tickets)
    assert 2 < max(held) <= 4


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_no_one_waits_for_a_worker_that_is_gone(fake):
    gate = threading.Event()

    def leave(name, feeds):
        gate.wait(10)
        raise SystemExit(3)

    batcher = Batcher(fake(FakeRunner(before=leave)))
    tickets = [batcher.submit(Request(prompt="red", seed=seed)) for seed in range(3)]
    gate.set()
    for ticket in tickets:
        with pytest.raises(BackendError, match="stopped"):
            ticket.result(10)
    batcher.close()
    with pytest.raises(ClosedError):
        batcher.submit(Request(prompt="red", seed=0))


def test_closing_without_draining_stops_a_request_that_is_just_joining(fake):
    inside, go_on = threading.Event(), threading.Event()

    def pause(name, feeds):
        if name == "text_encoder":
            inside.set()
            go_on.wait(10)

    runner = FakeRunner(before=pause)
    batcher = Batcher(fake(runner))
    ticket = batcher.submit(Request(prompt="red", scheduler="ddim", num_inference_steps=500, seed=0))
    assert inside.wait(10)
    closing = threading.Thread(target=batcher.close, kwargs={"drain": False})
    closing.start()
    while not batcher._stopping:
        time.sleep(0.001)
    go_on.set()
    closing.join()
    with pytest.raises(Cancelled):
        ticket.result(0)
    assert len(runner.batches) <= 1


def test_a_batcher_can_be_closed_from_a_callback_and_leaves_no_thread(fake):
    batcher = Batcher(fake())
    errors = []

    def close(future):
        try:
            batcher.close()
        except Exception as error:
            errors.append(error)

    ticket = batcher.submit(Request(prompt="red", num_inference_steps=3, seed=0))
    ticket.future.add_done_callback(close)
    assert ticket.result(10).images
    batcher.close()
    assert errors == []
    assert not batcher._worker.is_alive()


def test_a_failed_decode_fails_its_own_request_alone(fake):
    def fail_second(name, feeds):
        if name == "vae_decoder" and runner.calls.get("vae_decoder", 0) == 1:
            runner.before = None
            raise BackendError("vae_decoder failed", hint="none")

    runner = FakeRunner(before=fail_second)
    with Batcher(fake(runner)) as batcher:
        tickets = [
            batcher.submit(Request(prompt="red", scheduler="ddim", num_inference_steps=steps, seed=0))
            for steps in (2, 6, 12)
        ]
        assert tickets[0].result(10).images
        with pytest.raises(BackendError):
            tickets[1].result(10)
        assert tickets[2].result(10).images
        assert (batcher.stats().finished, batcher.stats().failed) == (2, 1)


def test_every_size_makes_progress_beside_a_crowd_of_another(fake):
    submitted = threading.Event()
    with Batcher(fake(FakeRunner(before=hold_until(submitted, []))), max_batch=8) as batcher:
        crowd = [
            batcher.submit(Request(prompt="red", scheduler="ddim", num_inference_steps=60, seed=seed))
            for seed in range(7)
        ]
        other = batcher.submit(Request(prompt="red", scheduler="ddim", num_inference_steps=5, seed=0, height=96))
        submitted.set()
        assert other.result(20).images
        assert not any(ticket.done() for ticket in crowd)
        assert all(ticket.result(30).images for ticket in crowd)


def test_a_size_whose_last_request_has_left_keeps_no_batch_while_another_steps(fake):
    submitted = threading.Event()
    with Batcher(fake(FakeRunner(before=hold_until(submitted, []))), max_batch=8) as batcher:
        long = batcher.submit(Request(prompt="red", scheduler="ddim", num_inference_steps=400, seed=0))
        short = [
            batcher.submit(Request(prompt="red", num_inference_steps=4, seed=0, height=height)) for height in (96, 128)
        ]
        submitted.set()
        assert all(ticket.result(20).images for ticket in short)
        steps = batcher.stats().steps
        while batcher.stats().steps < steps + 2:
            time.sleep(0.001)
        assert not long.done()
        assert set(batcher._batches) <= {(8, 8)}
        long.cancel()


def test_a_prompt_and_its_options_are_a_request(fake):
    with Batcher(fake()) as batcher:
        drawn = batcher.submit("red", num_inference_steps=3, seed=1).result(10)
        assert pixels(drawn) == pixels(fake().generate("red", num_inference_steps=3, seed=1))
        with pytest.raises(RequestError, match="a request has no steps"):
            batcher.submit("red", steps=3)


def test_a_request_beside_one_in_many_windows_waits_for_one_of_their_calls_at_a_time(fake):
    submitted, order = threading.Event(), []

    def before(name, feeds):
        submitted.wait(10)
        order.append((name, feeds["state"].shape[-1] if name == "step" else None))

    runner = FakeRunner(before=before)
    huge = Request(prompt="red", num_inference_steps=3, height=512, width=512, windowed=True, seed=1, scheduler="ddim")
    small = Request(prompt="red", num_inference_steps=3, height=64, width=64, seed=2, scheduler="ddim")
    late = replace(huge, seed=5)
    with Batcher(fake(runner), max_batch=8) as batcher:
        tickets = [batcher.submit(each) for each in (huge, small, late)]
        submitted.set()
        drawn = [pixels(ticket.result(60)) for ticket in tickets]
        assert len(tickets[0].result().timings.step_seconds) == 3
    sides = [side for name, side in order if name == "step"]
    last_small = len(sides) - 1 - sides[::-1].index(8)
    assert last_small < 12  # and not after whole rows of some tens of calls each
    assert drawn == serially(fake(), [huge, small, late])


def test_one_in_many_windows_can_be_cancelled_in_the_middle_of_a_row(fake):
    gate, calls = threading.Event(), []

    def before(name, feeds):
        calls.append(name)
        if calls.count("step") == 3:
            gate.wait(10)

    with Batcher(fake(FakeRunner(before=before)), max_batch=1) as batcher:
        ticket = batcher.submit(Request(prompt="red", num_inference_steps=3, height=512, width=512, windowed=True))
        while calls.count("step") < 3:
            time.sleep(0.001)
        ticket.cancel()
        gate.set()
        with pytest.raises(Cancelled):
            ticket.result(10)
        assert calls.count("step") <= 4
        assert batcher.submit("red", num_inference_steps=2).result(10).images


def test_others_have_their_steps_between_the_tiles_of_a_large_image(fake):
    order, submitted = [], threading.Event()
    long = Request(prompt="red", num_inference_steps=200, seed=2, scheduler="ddim")
    with Batcher(fake(FakeRunner(before=hold_until(submitted, order)))) as batcher:
        tickets = [batcher.submit(each) for each in (HUGE, long)]
        submitted.set()
        drawn = [pixels(ticket.result(60)) for ticket in tickets]
    tiles = [index for index, name in enumerate(order) if name == "vae_decoder"]
    assert len(tiles) == HUGE_TILES + 1
    assert all(order[index - 1] == "step" for index in tiles)
    assert drawn == serially(fake(), [HUGE, long])


@pytest.mark.parametrize(
    ("request_", "components"),
    [
        (replace(HUGE, image=Image.new("RGB", (512, 512), "red"), strength=1.0), ("vae_encoder",)),
        (
            Request(
                prompt="red", seed=1, height=128, width=128, hires_scale=4, hires_upscaler="lanczos", hires_steps=2
            ),
            ("vae_decoder", "vae_encoder"),
        ),
    ],
    ids=["encoding", "enlarging"],
)
def test_others_have_their_steps_between_the_tiles_that_an_image_begins_with(fake, request_, components):
    """A source that is encoded, and what a first pass has drawn on its way to the second."""
    order, submitted = [], threading.Event()
    long = Request(prompt="red", num_inference_steps=300, seed=2, scheduler="ddim")
    with Batcher(fake(FakeRunner(before=hold_until(submitted, order)))) as batcher:
        tickets = [batcher.submit(each) for each in (long, request_)]
        submitted.set()
        results = [ticket.result(60) for ticket in tickets]
    first = order.index("vae_encoder")
    encoded = [index for index, name in enumerate(order) if name == "vae_encoder"]
    assert len(encoded) == HUGE_TILES
    assert all(order[index - 1] == "step" for index in encoded[1:])
    assert set(components) <= set(order[: first + 1])
    assert [pixels(result) for result in results] == serially(fake(), [long, request_])
    timings = results[1].timings
    assert timings.vae_encoder_seconds + timings.vae_decoder_seconds < timings.total_seconds


def test_what_an_image_begins_with_is_timed_without_the_steps_of_others(fake):
    def before(name, feeds):
        time.sleep(0.05 if name == "step" else 0)

    image = Image.new("RGB", (512, 512), "red")
    request = replace(HUGE, image=image, strength=1.0, num_inference_steps=1)
    with Batcher(fake(FakeRunner(before=before))) as batcher:
        other = batcher.submit(Request(prompt="red", num_inference_steps=60, seed=2, scheduler="ddim"))
        timings = batcher.submit(request).result(60).timings
        other.cancel()
    assert timings.vae_encoder_seconds < 0.05 * HUGE_TILES / 2 < timings.total_seconds


def test_large_sources_are_encoded_one_after_the_other(fake):
    colours, submitted = [], threading.Event()

    def before(name, feeds):
        submitted.wait(10)
        if name == "vae_encoder":
            colours.append(float(feeds["sample"][0, 0, 0, 0]))

    requests = [
        replace(HUGE, image=Image.new("RGB", (512, 512), colour), strength=1.0)
        for colour in ("white", "black", "white")
    ]
    requests.append(Request(prompt="red", seed=3, num_inference_steps=2, image=Image.new("RGB", (64, 64), "#808080")))
    with Batcher(fake(FakeRunner(before=before))) as batcher:
        tickets = [batcher.submit(request) for request in requests]
        submitted.set()
        drawn = [pixels(ticket.result(60)) for ticket in tickets]
    assert drawn == serially(fake(), requests)
    large = [colour for colour in colours if abs(colour) == 1]
    assert large == [1.0] * HUGE_TILES + [-1.0] * HUGE_TILES + [1.0] * HUGE_TILES
    assert colours.index(next(colour for colour in colours if abs(colour) < 1)) < HUGE_TILES


def test_who_is_cancelled_while_another_begins_is_not_begun(fake):
    begun, held, gate = [], threading.Event(), threading.Event()

    def before(name, feeds):
        if name == "text_encoder":
            begun.append(name)
            held.set()
            gate.wait(10)

    with Batcher(fake(FakeRunner(before=before)), max_batch=4) as batcher:
        first = batcher.submit("red", num_inference_steps=2, guidance_scale=1.0)
        assert held.wait(10)
        others = [batcher.submit(f"blue {index}", num_inference_steps=2) for index in range(3)]
        for ticket in others:
            ticket.cancel()
        gate.set()
        assert first.result(10).images
        for ticket in others:
            with pytest.raises(Cancelled):
                ticket.result(10)
    assert len(begun) == 1


def test_one_whose_source_fails_to_encode_fails_alone(fake):
    def before(name, feeds):
        if name == "vae_encoder" and feeds["sample"][0, 0, 0, 0] > 0:
            raise BackendError("the encoder broke", hint="none")

    bad = replace(HUGE, image=Image.new("RGB", (512, 512), "white"), strength=1.0)
    good = replace(HUGE, image=Image.new("RGB", (512, 512), "black"), strength=1.0)
    with Batcher(fake(FakeRunner(before=before))) as batcher:
        first, second = batcher.submit(bad), batcher.submit(good)
        with pytest.raises(BackendError, match="broke"):
            first.result(60)
        assert pixels(second.result(60)) == serially(fake(), [good])[0]
        assert batcher.stats().failed == 1


def test_small_images_do_not_wait_for_all_tiles_of_a_large_one(fake):
    tiles, submitted = [], threading.Event()

    def before(name, feeds):
        submitted.wait(10)
        if name == "vae_decoder":
            tiles.append(feeds["latent_sample"].shape[-1])

    requests = [replace(HUGE, num_images_per_prompt=2)]
    requests += [Request(prompt="red", num_inference_steps=30, seed=seed) for seed in range(3)]
    with Batcher(fake(FakeRunner(before=before))) as batcher:
        tickets = [batcher.submit(request) for request in requests]
        submitted.set()
        drawn = [pixels(ticket.result(60)) for ticket in tickets]
    assert tiles.count(16) == 2 * HUGE_TILES
    assert 16 in tiles[: tiles.index(8)]
    last_small = len(tiles) - 1 - tiles[::-1].index(8)
    assert last_small < len(tiles) - HUGE_TILES
    assert drawn == serially(fake(), requests)


@pytest.mark.parametrize(
    ("component", "request_"),
    [
        ("vae_decoder", HUGE),
        ("vae_encoder", replace(HUGE, image=Image.new("RGB", (512, 512)), strength=1.0)),
        ("vae_encoder", Request(prompt="red", height=128, width=128, hires_scale=4, hires_upscaler="lanczos")),
    ],
    ids=["decoding", "encoding", "enlarging"],
)
def test_a_large_image_can_be_cancelled_between_two_tiles(fake, component, request_):
    held, gate, calls = threading.Event(), threading.Event(), []

    def before(name, feeds):
        calls.append(name)
        if calls.count(component) == 3 and name == component:
            held.set()
            gate.wait(10)

    with Batcher(fake(FakeRunner(before=before)), max_batch=1) as batcher:
        ticket = batcher.submit(request_)
        assert held.wait(10)
        ticket.cancel()
        gate.set()
        with pytest.raises(Cancelled):
            ticket.result(10)
        assert calls.count(component) == 3
        assert batcher.submit("red", num_inference_steps=2).result(10).images
        assert batcher.stats().cancelled == 1


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


def test_each_request_of_a_failed_step_has_an_error_of_its_own(fake):
    submitted = threading.Event()

    def before(name, feeds):
        submitted.wait(10)
        if name == "step":
            raise BackendError("the engine failed", hint="try again") from OSError("no memory")

    with Batcher(fake(FakeRunner(before=before)), max_batch=4) as batcher:
        tickets = [batcher.submit("red", seed=seed, num_inference_steps=2) for seed in range(2)]
        submitted.set()
        first, second = (ticket.future.exception(10) for ticket in tickets)
    assert first is not second
    assert str(first) == str(second) == "the engine failed"
    assert isinstance(second.__cause__, OSError)


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
    with pytest.raises(ClosedError):
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


@pytest.mark.parametrize(("undecoded", "expected"), [(0, 2), (7, 2), (8, 0), (15, 0)])
def test_nothing_joins_while_a_whole_batch_waits_for_the_vae(undecoded, expected):
    assert admit([1, 1, 1], 6, 8, undecoded=undecoded) == expected


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
