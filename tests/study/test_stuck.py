"""When a trial counts as stuck, by a clock that the test sets."""

from raydml.study.stuck import StuckWatch


class Clock:
    now_s = 0.0

    def __call__(self):
        return self.now_s


def test_a_trial_is_stuck_after_ten_usual_epochs_and_not_before_the_shortest_time():
    clock = Clock()
    watch = StuckWatch(600.0, clock=clock)
    watch.stuck(["a", "b"])
    watch.report("a", 5.0)
    watch.report("b", 90.0)
    clock.now_s = 601.0
    (late,) = watch.stuck(["a", "b"])
    assert late.key == "a", "ten epochs of b are 900 s"
    assert str(late) == "no epoch for 601 s, and an epoch took at most 5 s so far"
    clock.now_s = 901.0
    assert [late.key for late in watch.stuck(["a", "b"])] == ["b"], "a has been returned, and has 600 s again"


def test_before_its_first_epoch_a_trial_has_more_time():
    clock = Clock()
    watch = StuckWatch(10.0, clock=clock)
    watch.stuck(["a", "b"])
    clock.now_s = 119.0
    assert not watch.stuck(["a", "b"]), "no epoch is known: twelve times 10 s"
    watch.report("a", 13.0)
    clock.now_s = 129.0
    assert not watch.stuck(["a", "b"]), "ten epochs of the other are 130 s"
    clock.now_s = 131.0
    assert [late.key for late in watch.stuck(["a", "b"])] == ["b"]


def test_a_trial_that_goes_on_is_judged_by_its_epochs_of_before():
    clock = Clock()
    watch = StuckWatch(10.0, {"a": 0.5}, clock)
    watch.stuck(["a"])
    clock.now_s = 10.5
    assert [late.key for late in watch.stuck(["a"])] == ["a"]


def test_a_trial_that_waits_is_not_stuck():
    clock = Clock()
    watch = StuckWatch(10.0, clock=clock)
    watch.stuck(["a"])
    watch.report("a", 0.1)
    watch.stuck([])
    clock.now_s = 100.0
    assert not watch.stuck(["a"])
    clock.now_s = 111.0
    assert watch.stuck(["a"])
