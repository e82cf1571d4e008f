"""What a replica's last report still proves, by its age."""

import pytest

from cluster.replicas.readiness import MAX_FORWARD_AGE_S, MAX_STEP_S, not_ready_reason
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
