"""Parses the preemption notices of the three clouds into one kind of value, a Notice.

Pure: answers go in, notices come out, the clock is an argument. Knows the formats and what each cloud promises; no HTTP (metadata.py) and
no schedule (poll.py). The specifications:
AWS    https://docs.aws.amazon.com/AWSEC2/latest/UserGuide/spot-instance-termination-notices.html
       https://docs.aws.amazon.com/autoscaling/ec2/userguide/retrieving-target-lifecycle-state-through-imds.html
GCP    https://cloud.google.com/compute/docs/instances/create-use-spot (preempted)
       https://cloud.google.com/compute/docs/metadata/getting-live-migration-notice (maintenance-event)
Azure  https://learn.microsoft.com/azure/virtual-machines/linux/scheduled-events
"""

from dataclasses import dataclass, replace
from datetime import datetime
from email.utils import parsedate_to_datetime

import msgspec

from cluster.protocol.notice import Cloud

CLOUD_NAMES: dict[Cloud, str] = {"aws": "AWS", "gcp": "Google Cloud", "azure": "Azure"}

GCP_PREEMPTION_S = 30.0  # promised between `preempted` and the end
GCP_MAINTENANCE_S = 3600.0  # host maintenance of machines with a GPU is announced an hour ahead
# A group without a lifecycle hook ends the machine at once, a group with a hook usually after minutes; the service does not say which.
AWS_SCALE_IN_S = 60.0

AZURE_ENDINGS = {  # without "Freeze", which is a pause of seconds
    "Preempt": "preempts this spot machine",
    "Terminate": "deletes this machine",
    "Reboot": "restarts this machine",
    "Redeploy": "moves this machine to another host",
}
AWS_ENDINGS = {
    "terminate": "terminates this spot instance",
    "stop": "stops this spot instance",
    "hibernate": "hibernates this spot instance",
}


@dataclass(frozen=True, kw_only=True)
class Notice:
    """A machine will be removed. `event`: what the cloud does, after its name. `deadline`: time.time() from which it may be gone."""

    cloud: Cloud
    event: str
    deadline: float

    @property
    def message(self) -> str:
        return f"{CLOUD_NAMES[self.cloud]} {self.event}."


def sooner(known: Notice | None, now: Notice | None) -> Notice | None:
    """The newest notice. If it announces the same event as before, its deadline never moves back: most clouds do not say when their
    countdown started.
    """
    if known is None or now is None or known.event != now.event:
        return now
    return replace(now, deadline=min(known.deadline, now.deadline))


# AWS


class _InstanceAction(msgspec.Struct, frozen=True):
    action: str
    time: datetime


def aws_notice(instance_action: bytes | None, lifecycle_state: bytes | None, *, now: float) -> Notice | None:
    """instance_action: from spot/instance-action, e.g. {"action": "terminate", "time": "2026-11-24T08:22:00Z"}. lifecycle_state: from
    autoscaling/target-lifecycle-state, e.g. Terminated. Each is None where AWS answers 404. Raises ValueError.
    """
    if instance_action is not None:
        decoded = msgspec.json.decode(instance_action, type=_InstanceAction)
        event = AWS_ENDINGS.get(decoded.action, f"will {decoded.action} this spot instance")
        return Notice(cloud="aws", event=event, deadline=_timestamp(decoded.time))
    if lifecycle_state is not None and lifecycle_state.strip() == b"Terminated":
        event = "removes this instance from its Auto Scaling group"
        return Notice(cloud="aws", event=event, deadline=now + AWS_SCALE_IN_S)
    return None


# Google Cloud


def gcp_notice(preempted: str, maintenance_event: str, *, now: float) -> Notice | None:
    """From instance/preempted, TRUE or FALSE, and instance/maintenance-event. Live migration, a pause of less than a second, gives no
    notice. Raises ValueError.
    """
    if preempted.strip() not in ("TRUE", "FALSE"):
        raise ValueError(f"instance/preempted is {preempted[:60]!r}")
    if preempted.strip() == "TRUE":
        return Notice(cloud="gcp", event="preempts this machine", deadline=now + GCP_PREEMPTION_S)
    if maintenance_event.strip() in ("TERMINATE_ON_HOST_MAINTENANCE", "SHUTDOWN_ON_HOST_MAINTENANCE"):
        event = "stops this machine for host maintenance"
        return Notice(cloud="gcp", event=event, deadline=now + GCP_MAINTENANCE_S)
    return None


# Azure


class _ScheduledEvent(msgspec.Struct, frozen=True, rename="pascal"):
    event_type: str
    resources: list[str]
    event_status: str = "Scheduled"
    not_before: str = ""  # empty once it has started


class _ScheduledEvents(msgspec.Struct, frozen=True, rename="pascal"):
    events: list[_ScheduledEvent]


def azure_notice(scheduled_events: bytes, *, machine: str, now: float) -> Notice | None:
    """The earliest notice for the machine of this name; the events of a whole scale set come together. Raises ValueError."""
    document = msgspec.json.decode(scheduled_events, type=_ScheduledEvents)
    notices = [
        Notice(cloud="azure", event=AZURE_ENDINGS[e.event_type], deadline=_not_before(e, now))
        for e in document.events
        if e.event_type in AZURE_ENDINGS and machine.lower() in (name.lower() for name in e.resources)
    ]
    return min(notices, key=lambda n: n.deadline, default=None)


def _not_before(event: _ScheduledEvent, now: float) -> float:
    return _timestamp(parsedate_to_datetime(event.not_before)) if event.not_before else now


def _timestamp(time: datetime) -> float:
    if time.tzinfo is None:
        raise ValueError(f"the time {time} has no time zone")
    return time.timestamp()
