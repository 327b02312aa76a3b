"""When an action takes effect: by hand for a few rates and latencies."""

import numpy as np
import pytest

from openvla.evaluation.control import BlockingControl, RealtimeControl, effective_delays


def test_latency_0_is_blocking():
    assert effective_delays(5, 0.0, 6) == [0] * 6
    blocking, realtime = BlockingControl(), RealtimeControl(5, np.zeros(1))
    for step in range(5):
        for control in (blocking, realtime):
            assert control.wants_action(step)
            control.give(step, np.array([step]), 0.0)
        assert blocking.action(step) == realtime.action(step) == step


@pytest.mark.parametrize(
    "hz, latency, delays",
    [
        # Ready before the next observation: waits for it, every answer is one step old
        (5, 0.1, [None, 1, 1, 1, 1, 1, 1]),
        # Exactly one period
        (5, 0.2, [None, 1, 1, 1, 1, 1, 1]),
        # 0 -> 300 ms (effect at 400, step 2); 300 -> 600 on the observation of 200 ms (step 1, effect at step 3);
        # 600 -> 900 on step 3 (effect at 1000, step 5); 900 -> 1200 on step 4 (effect at step 6)
        (5, 0.3, [None, None, 2, 2, 3, 2, 2, 3]),
        # 0.8 s at 5 Hz, the paper's int8 (1.2 Hz): effect at 4, 8, 12
        (5, 0.8, [None] * 4 + [4, 5, 6, 7, 4, 5, 6, 7, 4]),
    ],
)
def test_delays(hz, latency, delays):
    assert effective_delays(hz, latency, len(delays)) == delays


def test_a_chunk_is_executed_before_the_next_observation_counts():
    control, asked = BlockingControl(), []
    for step in range(7):
        if control.wants_action(step):
            asked.append(step)
            control.give(step, np.array([[step, 0], [step, 1], [step, 2]]), 0.1)
        assert control.action(step).tolist() == [step - step % 3, step % 3]
    assert asked == [0, 3, 6]


def drive(control: RealtimeControl, steps: int, latency: float, chunk: int) -> list[list[float]]:
    """What is executed at each step; the action for step s, of the answer to the observation of step o, is [s, o]."""
    executed = []
    for step in range(steps):
        if control.wants_action(step):
            control.give(step, np.array([[step + k, step] for k in range(chunk)], dtype=float), latency)
        executed.append(control.action(step).tolist())
    return executed


def test_a_late_chunk_begins_with_the_action_of_its_step():
    """At 5 Hz and 0.3 s: the answer to step 0 comes into effect at step 2, that to step 1 at step 3, to step 3 at 5."""
    start = np.array([-1.0, -1.0])
    assert drive(RealtimeControl(5, start), 6, 0.3, 4) == [[-1, -1], [-1, -1], [2, 0], [3, 1], [4, 1], [5, 3]]
    # A chunk of one or two steps is over by then: its last action, as without chunks
    assert drive(RealtimeControl(5, start), 6, 0.3, 2) == [[-1, -1], [-1, -1], [1, 0], [2, 1], [2, 1], [4, 3]]
    # Without delay the first action of each answer
    assert drive(RealtimeControl(5, start), 3, 0.0, 3) == [[0, 0], [1, 1], [2, 2]]


def test_late_steps():
    start = np.array([0.0, 1.0])
    once = [[0, 1], [0, 1], [0, 0], [1, 1], [1, 1], [3, 3]]
    assert drive(RealtimeControl(5, start), 6, 0.3, 1) == once
    # Standing still: no motion, the gripper as it was
    still = [[0, 1], [0, 1], [0, 0], [1, 1], [0, 1], [3, 3]]
    assert drive(RealtimeControl(5, start, late="still"), 6, 0.3, 1) == still
    # Places, as of joints, are kept
    kept = RealtimeControl(5, start, late="still", relative=np.array([False, False]))
    assert drive(kept, 6, 0.3, 1) == once


def test_errors():
    with pytest.raises(ValueError, match="hz=0"):
        RealtimeControl(0, np.zeros(7))
    with pytest.raises(ValueError, match="latency=-1"):
        RealtimeControl(5, np.zeros(7)).give(0, np.zeros(7), -1)
    with pytest.raises(ValueError, match=r"expected \(A,\), or \(K, A\)"):
        RealtimeControl(5, np.zeros(7)).give(0, np.zeros((1, 3, 7)), 0.1)
    with pytest.raises(ValueError, match="late='stil' is unknown. Did you mean 'still'"):
        RealtimeControl(5, np.zeros(7), late="stil")


@pytest.mark.parametrize("action", [[np.nan] * 7, [np.inf] * 7, [None] * 7, ["a"] * 7, [[1.0], [1.0, 2.0]]])
def test_what_is_no_action_never_takes_effect(action):
    for control in (BlockingControl(), RealtimeControl(5, np.zeros(7))):
        with pytest.raises(ValueError, match="expected|one action"):
            control.give(0, np.asarray(action, dtype=object) if action == [[1.0], [1.0, 2.0]] else action, 0.0)
    for latency in (np.nan, np.inf):
        with pytest.raises(ValueError, match="latency="):
            RealtimeControl(5, np.zeros(7)).give(0, np.zeros(7), latency)
    with pytest.raises(ValueError, match="hz=inf"):
        RealtimeControl(np.inf, np.zeros(7))


def counting(first: float, steps: int = 4) -> np.ndarray:
    """Actions that count up from `first`."""
    return np.arange(first, first + steps)[:, None]


def drive_and_tell(control, latency: float, steps: int, answer, chunk: int = 1) -> tuple[list[float], list]:
    """What is executed, and what the model was told to be decided whenever it looked."""
    executed, told = [], []
    for step in range(steps):
        if control.wants_action(step):
            committed = control.committed(step, latency, chunk)
            told.append((step, None if committed is None else committed[:, 0].tolist()))
            control.give(step, answer(step, committed), latency)
        executed.append(float(control.action(step)[0]))
    return executed, told


def test_what_is_executed_while_the_model_thinks_is_what_it_is_told():
    """A model that thinks for two steps, and begins its chunks with what it was told."""
    given = []

    def answer(step, committed):
        own = counting(100 * (step + 1), 6)
        if committed is not None:
            own[: len(committed)] = committed
        given.append((step, own[:, 0].tolist()))
        return own

    executed, told = drive_and_tell(RealtimeControl(10, np.full(1, -1.0), chunking="prefix"), 0.2, 14, answer, 6)
    assert told[0] == (0, [-1.0, -1.0])  # it stands still until the first answer is there
    for step, committed in told:
        assert committed == executed[step : step + 2]
    # So no answer changes what was announced: each chunk is executed as it is until the next one is there
    for (step, actions), (following, _) in zip(given, given[1:]):
        assert executed[step : following + 2] == actions[: following + 2 - step]


def test_what_is_committed_before_the_first_answer_leaves_it_something_to_say():
    def before(latency, chunk, **more):
        committed = RealtimeControl(10, np.zeros(1), **{"chunking": "prefix", **more}).committed(0, latency, chunk)
        return 0 if committed is None else len(committed)

    assert [before(latency, 4) for latency in (0.0, 0.1, 0.25, 0.3, 2.0)] == [0, 1, 3, 3, 3]
    assert before(0.2, 1) == before(0.2, 4, chunking="switch") == 0 and before(0.9, 4, execute=2) == 1


def test_without_being_told_a_chunk_breaks_off():
    executed, told = drive_and_tell(
        RealtimeControl(10, np.zeros(1)), 0.2, 6, lambda step, _: counting(100 * (step + 1))
    )
    assert executed == [0, 0, 102, 103, 302, 303] and all(committed is None for _, committed in told)


def test_hold_takes_the_first_action_of_a_counting():
    executed, _ = drive_and_tell(
        RealtimeControl(10, np.zeros(1), chunking="hold"), 0.2, 6, lambda step, _: counting(step + 1)
    )
    assert executed == [0, 0, 1, 1, 3, 3]


def test_ensemble_is_the_weighted_mean_of_answers_for_a_step():
    executed, _ = drive_and_tell(
        RealtimeControl(10, np.zeros(1), chunking="ensemble"), 0.0, 3, lambda step, _: counting(10 * step)
    )
    weights = np.exp(-0.01 * np.arange(3))
    assert executed[:1] == [0.0]
    assert executed[1] == pytest.approx((weights[:2] @ [1, 10]) / weights[:2].sum())
    assert executed[2] == pytest.approx((weights @ [2, 11, 20]) / weights.sum())


@pytest.mark.parametrize("latency, late, after", [(0.3, "repeat", 4), (0.3, "still", 0), (0.5, "still", None)])
def test_an_ensemble_never_goes_back_to_actions_of_earlier_steps(latency, late, after):
    """Where a step had no answer, the last answer was executed again, from its first action on."""
    control = RealtimeControl(10, np.zeros(2), late, chunking="ensemble")
    alone = RealtimeControl(10, np.zeros(2), late, chunking="switch")

    def answer(step, committed):
        return np.hstack([counting(step, 5), np.ones((5, 1))])

    executed, _ = drive_and_tell(control, latency, 20, answer)
    assert executed == drive_and_tell(alone, latency, 20, answer)[0]  # answers follow one another, none overlap
    if after is not None:
        assert executed[3:6] == [3, 4, after]


def test_where_a_robot_stands_may_be_said_when_an_episode_has_begun():
    control = RealtimeControl(10, np.zeros(2), late="still", relative=np.zeros(2, dtype=bool), chunking="prefix")
    control.begin_at(np.array([0.3, 0.4]))
    assert control.committed(0, 0.2, 4).tolist() == [[0.3, 0.4]] * 2 and control.action(0).tolist() == [0.3, 0.4]
    with pytest.raises(ValueError, match="finite"):
        control.begin_at(np.array([np.nan, 0.4]))


def test_only_the_first_actions_of_a_counting():
    control = BlockingControl(execute=2)
    looked = []
    for step in range(5):
        if control.wants_action(step):
            looked.append(step)
            control.give(step, counting(step), 9.0)
        assert control.action(step)[0] == step
    assert looked == [0, 2, 4] and control.committed(0, 1.0) is None
    with pytest.raises(ValueError, match="chunking='swich' is unknown. Did you mean 'switch'"):
        RealtimeControl(10, np.zeros(1), chunking="swich")
