"""What the three clouds say about a machine that is going to be taken away, as one kind of value: a Notice.

Pure: answers go in, notices come out, the clock is an argument. Knows the documents' formats and what each cloud promises; no HTTP and
no schedule (metadata.py, notice_watcher.py). The specifications:
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
GCP_MAINTENANCE_S = 3600.0  # machines with a GPU learn of host maintenance an hour before
# A group without a lifecycle hook ends the machine at once, one with a hook commonly after minutes; nobody says which.
AWS_SCALE_IN_S = 60.0

AZURE_ENDINGS = {  # "Freeze" is left out: it is a pause of seconds
    "Preempt": "takes this spot machine back",
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
    """A machine goes away. `event`: a predicate of the cloud's name. `deadline`: time.time() from which it may be gone."""

    cloud: Cloud
    event: str
    deadline: float

    @property
    def sentence(self) -> str:
        return f"{CLOUD_NAMES[self.cloud]} {self.event}."


def sooner(known: Notice | None, now: Notice | None) -> Notice | None:
    """The newest reading; where it says the same as before, its end never moves away: most clouds do not tell when they began to count."""
    if known is None or now is None or known.event != now.event:
        return now
    return replace(now, deadline=min(known.deadline, now.deadline))


# AWS


class _InstanceAction(msgspec.Struct, frozen=True):
    action: str
    time: datetime


def aws_notice(instance_action: bytes | None, lifecycle_state: bytes | None, *, now: float) -> Notice | None:
    """`instance_action`: of spot/instance-action, e.g. {"action": "terminate", "time": "2026-11-24T08:22:00Z"}; `lifecycle_state`: of
    autoscaling/target-lifecycle-state, e.g. Terminated; each None where AWS answers 404. Raises ValueError.
    """
    if instance_action is not None:
        said = msgspec.json.decode(instance_action, type=_InstanceAction)
        event = AWS_ENDINGS.get(said.action, f"will {said.action} this spot instance")
        return Notice(cloud="aws", event=event, deadline=_timestamp(said.time))
    if lifecycle_state is not None and lifecycle_state.strip() == b"Terminated":
        event = "takes this instance out of its Auto Scaling group"
        return Notice(cloud="aws", event=event, deadline=now + AWS_SCALE_IN_S)
    return None


# Google Cloud


def gcp_notice(preempted: str, maintenance_event: str, *, now: float) -> Notice | None:
    """Of instance/preempted, TRUE or FALSE, and instance/maintenance-event. Live migration is a pause of less than a second. Raises
    ValueError.
    """
    if preempted.strip() not in ("TRUE", "FALSE"):
        raise ValueError(f"instance/preempted is {preempted[:60]!r}")
    if preempted.strip() == "TRUE":
        return Notice(cloud="gcp", event="preempts this machine", deadline=now + GCP_PREEMPTION_S)
    if maintenance_event.strip() in ("TERMINATE_ON_HOST_MAINTENANCE", "SHUTDOWN_ON_HOST_MAINTENANCE"):
        event = "stops this machine for the maintenance of its host"
        return Notice(cloud="gcp", event=event, deadline=now + GCP_MAINTENANCE_S)
    return None


# Azure


class _ScheduledEvent(msgspec.Struct, frozen=True, rename="pascal"):
    event_type: str
    resources: list[str]
    event_status: str = "Scheduled"
    not_before: str = ""  # empty once it has begun


class _ScheduledEvents(msgspec.Struct, frozen=True, rename="pascal"):
    events: list[_ScheduledEvent]


def azure_notice(scheduled_events: bytes, *, machine: str, now: float) -> Notice | None:
    """The earliest end that is announced to the machine of this name: a scale set's machines hear of each other's. Raises ValueError."""
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
