"""What a replica's last report still proves, by its age."""

import pytest

from cluster.replicas.readiness import (
    HEALTH_PATIENCE_S,
    MAX_FORWARD_AGE_S,
    MAX_STEP_S,
    is_overdue,
    not_ready_reason,
)
from workers.heartbeat import RECENTLY_S
from workers.protocol import LoadReport


@pytest.mark.parametrize(
    ("load", "report_age_s", "reason"),
    [
        (LoadReport(forward_age_s=0.1), 0.2, None),
        (LoadReport(), 0.0, "Replica r0 has not made a forward pass yet."),
        (LoadReport(forward_age_s=0.1, stuck_ranks=(1, 3)), 0.0, "Replica r0 is waiting for rank 1, 3"),
        (LoadReport(forward_age_s=MAX_FORWARD_AGE_S), 0.1, "made its last forward pass on all ranks 3.1 s ago"),
        (LoadReport(forward_age_s=MAX_FORWARD_AGE_S, last_step_s=1.0), 0.1, None),  # its steps take long
        (LoadReport(forward_age_s=20.0, step_age_s=20.0), 0.0, None),  # a long step runs
        (LoadReport(forward_age_s=20.0, step_age_s=20.0), MAX_STEP_S - 20.0, "30.0 s ago"),
    ],
)
def test_a_report_proves_readiness_for_a_while(load, report_age_s, reason):
    found = not_ready_reason("r0", load, report_age_s=report_age_s)
    assert found is None if reason is None else reason in found


@pytest.mark.parametrize(
    ("load", "report_age_s", "ready_age_s", "overdue"),
    [
        # No reports: only the last good one counts, whatever it said about a long step.
        (LoadReport(forward_age_s=0.1), RECENTLY_S + 0.1, RECENTLY_S + 0.1, False),
        (LoadReport(forward_age_s=0.1), 4.9, 4.9, False),
        (LoadReport(forward_age_s=0.1), HEALTH_PATIENCE_S, HEALTH_PATIENCE_S, True),
        (LoadReport(forward_age_s=20.0, step_age_s=20.0), 4.9, 4.9, False),
        (LoadReport(), 2.0, float("inf"), True),  # never ready
        # Reports come: the forward pass counts, so that a stuck rank is named after 5 s.
        (LoadReport(forward_age_s=4.0, stuck_ranks=(1,)), 0.5, 2.0, False),
        (LoadReport(forward_age_s=4.6, stuck_ranks=(1,)), 0.5, 2.0, True),
        (LoadReport(forward_age_s=4.0), 0.5, 1.0, False),
        (LoadReport(forward_age_s=MAX_STEP_S, step_age_s=MAX_STEP_S), 0.0, 0.0, True),
        (LoadReport(), 0.0, float("inf"), True),
    ],
)
def test_health_has_patience_with_a_busy_machine(load, report_age_s, ready_age_s, overdue):
    assert is_overdue(load, report_age_s=report_age_s, ready_age_s=ready_age_s) is overdue
