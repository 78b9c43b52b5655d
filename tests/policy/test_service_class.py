"""What a priority means, in both directions of SGLang's flag and around any default."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conserve_sgl.policy import PriorityRule, ServiceClass

ONLINE, OFFLINE = ServiceClass.ONLINE, ServiceClass.OFFLINE
HIGH_FIRST = PriorityRule()
LOW_FIRST = PriorityRule(low_values_first=True)
HIGH_FIRST_FROM_5 = PriorityRule(default=5)
LOW_FIRST_FROM_5 = PriorityRule(default=5, low_values_first=True)

rules = st.builds(PriorityRule, default=st.integers(-1000, 1000), low_values_first=st.booleans())
priorities = st.none() | st.integers(-2000, 2000)


@pytest.mark.parametrize(
    ("rule", "priority", "expected"),
    [
        pytest.param(HIGH_FIRST, None, ONLINE, id="no priority is online"),
        pytest.param(HIGH_FIRST, 0, ONLINE, id="the default is online"),
        pytest.param(HIGH_FIRST, 7, ONLINE, id="more urgent than the default is online"),
        pytest.param(HIGH_FIRST, -1, OFFLINE, id="just below the default is offline"),
        pytest.param(HIGH_FIRST, -100, OFFLINE, id="far below the default is offline"),
        pytest.param(LOW_FIRST, None, ONLINE, id="low first: no priority is online"),
        pytest.param(LOW_FIRST, 0, ONLINE, id="low first: the default is online"),
        pytest.param(LOW_FIRST, -7, ONLINE, id="low first: a smaller value is online"),
        pytest.param(LOW_FIRST, 1, OFFLINE, id="low first: just above the default is offline"),
        pytest.param(LOW_FIRST, 100, OFFLINE, id="low first: far above the default is offline"),
        pytest.param(HIGH_FIRST_FROM_5, None, ONLINE, id="default 5: no priority is online"),
        pytest.param(HIGH_FIRST_FROM_5, 5, ONLINE, id="default 5: five is online"),
        pytest.param(HIGH_FIRST_FROM_5, 4, OFFLINE, id="default 5: four is offline"),
        pytest.param(HIGH_FIRST_FROM_5, 0, OFFLINE, id="default 5: zero is offline"),
        pytest.param(LOW_FIRST_FROM_5, 5, ONLINE, id="default 5, low first: five is online"),
        pytest.param(LOW_FIRST_FROM_5, 6, OFFLINE, id="default 5, low first: six is offline"),
        pytest.param(LOW_FIRST_FROM_5, 0, ONLINE, id="default 5, low first: zero is online"),
    ],
)
def test_the_class_that_a_priority_stands_for(rule, priority, expected):
    assert rule.class_of(priority) is expected


@pytest.mark.parametrize(
    ("rule", "priority", "service_class", "stamped"),
    [
        pytest.param(HIGH_FIRST, None, ONLINE, 0, id="online without a priority: the default"),
        pytest.param(HIGH_FIRST, 9, ONLINE, 9, id="online keeps its urgency"),
        pytest.param(HIGH_FIRST, -9, ONLINE, 0, id="online by its tag beats an offline priority"),
        pytest.param(HIGH_FIRST, None, OFFLINE, -1, id="offline without a priority"),
        pytest.param(HIGH_FIRST, -100, OFFLINE, -1, id="offline: one value for all"),
        pytest.param(HIGH_FIRST, 9, OFFLINE, -1, id="offline by its tag beats an urgent priority"),
        pytest.param(LOW_FIRST, None, OFFLINE, 1, id="low first: offline is one above"),
        pytest.param(LOW_FIRST, -9, ONLINE, -9, id="low first: online keeps its urgency"),
        pytest.param(LOW_FIRST, 9, ONLINE, 0, id="low first: online by its tag"),
        pytest.param(HIGH_FIRST_FROM_5, None, ONLINE, 5, id="default 5: online"),
        pytest.param(HIGH_FIRST_FROM_5, None, OFFLINE, 4, id="default 5: offline"),
        pytest.param(LOW_FIRST_FROM_5, None, OFFLINE, 6, id="default 5, low first: offline"),
    ],
)
def test_the_value_stamped_at_the_door(rule, priority, service_class, stamped):
    assert rule.stamp(priority, service_class) == stamped


@given(rule=rules, priority=priorities, service_class=st.sampled_from(ServiceClass))
def test_the_scheduler_reads_back_the_class_that_was_stamped(rule, priority, service_class):
    assert rule.class_of(rule.stamp(priority, service_class)) is service_class


@given(rule=rules, priority=priorities)
def test_stamping_twice_changes_nothing(rule, priority):
    # Each sample of an n > 1 request comes through the door again.
    once = rule.stamp(priority, rule.class_of(priority))
    assert rule.stamp(once, rule.class_of(once)) == once


@given(rule=rules, first=priorities, second=priorities)
def test_all_offline_requests_carry_one_value(rule, first, second):
    assert rule.stamp(first, OFFLINE) == rule.stamp(second, OFFLINE) == rule.offline_priority
