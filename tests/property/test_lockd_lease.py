"""The lease's arithmetic: whatever the clocks do, no request of a lost node lands after it counts as harmless.

Each node reads a clock of its own: some offset, some rate. True time is known to nobody but the test.
"""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from clustermd.lockd.fencing.lease import harmless_at_s

seconds = st.floats(0, 1e4, allow_nan=False)


@given(
    lease_s=st.floats(0.5, 600),
    drift=st.floats(0, 0.5),
    bound_s=st.floats(0, 3600),
    slower=st.floats(0, 1),
    offsets=st.tuples(seconds, seconds),
    renewed=seconds,
    noticed_after=seconds,
    submitted=st.floats(0, 1, exclude_max=True),
    late=st.floats(0, 1),
)
def test_what_passed_a_lease_has_landed_before_the_node_counts_as_harmless(
    lease_s: float,
    drift: float,
    bound_s: float,
    slower: float,
    offsets: tuple[float, float],
    renewed: float,
    noticed_after: float,
    submitted: float,
    late: float,
) -> None:
    # the lost node's clock may be as much slower than the survivor's as the bound allows
    survivor_rate = 1 + slower * drift
    lost_at_s = offsets[0] + (renewed + noticed_after) * survivor_rate
    # a majority heard of its last renewal before it took note of the loss; its clock runs as true time does
    looked = renewed + submitted * lease_s
    landed = looked + late * bound_s / survivor_rate
    harmless_s = harmless_at_s(lost_at_s, lease_s, drift, bound_s)
    harmless = (harmless_s - offsets[0]) / survivor_rate
    assert landed <= harmless + 1e-6


@given(lost=seconds, lease_s=st.floats(0.5, 600), drift=st.floats(0, 0.5), bound_s=st.floats(0, 3600))
def test_it_is_never_less_than_lease_and_bound_and_grows_with_each(
    lost: float, lease_s: float, drift: float, bound_s: float
) -> None:
    at = harmless_at_s(lost, lease_s, drift, bound_s)
    assert at >= lost + lease_s + bound_s
    assert harmless_at_s(lost, lease_s + 1, drift, bound_s) > at
    assert harmless_at_s(lost, lease_s, drift + 0.1, bound_s) > at
    assert harmless_at_s(lost, lease_s, drift, bound_s + 1) > at
    assert harmless_at_s(lost + 1, lease_s, drift, bound_s) > at
