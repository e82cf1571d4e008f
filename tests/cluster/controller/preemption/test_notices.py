"""The answers that the clouds document, and the notices parsed from them."""

from datetime import UTC, datetime

import pytest
from support.fakes.metadata import azure_event

from cluster.controller.preemption.notices import Notice, aws_notice, azure_notice, gcp_notice, sooner
from cluster.controller.preemption.which_cloud import cloud_of, find_cloud

NOW = datetime(2026, 11, 24, 8, 20, tzinfo=UTC).timestamp()


def azure_document(*events: dict) -> bytes:
    import json

    return json.dumps({"DocumentIncarnation": 2, "Events": list(events)}).encode()


@pytest.mark.parametrize(
    ("action", "lifecycle", "event", "left_s"),
    [
        (None, None, None, None),
        (None, b"InService", None, None),
        (b'{"action": "terminate", "time": "2026-11-24T08:22:00Z"}', None, "terminates this spot instance", 120),
        (b'{"action":"stop","time":"2026-11-24T08:22:00Z"}', b"InService", "stops this spot instance", 120),
        (b'{"action": "hibernate", "time": "2026-11-24T08:20:00Z"}', None, "hibernates this spot instance", 0),
        (b'{"action": "evict", "time": "2026-11-24T08:22:00+00:00"}', None, "will evict this spot instance", 120),
        (None, b"Terminated", "removes this instance from its Auto Scaling group", 60),
        (None, b"Warmed:Stopped", None, None),
    ],
)
def test_aws(action, lifecycle, event, left_s):
    check(aws_notice(action, lifecycle, now=NOW), "aws", event, left_s)


@pytest.mark.parametrize(
    ("preempted", "maintenance", "event", "left_s"),
    [
        ("FALSE", "NONE", None, None),
        ("TRUE", "NONE", "preempts this machine", 30),
        ("TRUE\n", "TERMINATE_ON_HOST_MAINTENANCE", "preempts this machine", 30),
        ("FALSE", "MIGRATE_ON_HOST_MAINTENANCE", None, None),
        ("FALSE", "TERMINATE_ON_HOST_MAINTENANCE", "stops this machine for host maintenance", 3600),
    ],
)
def test_google_cloud(preempted, maintenance, event, left_s):
    check(gcp_notice(preempted, maintenance, now=NOW), "gcp", event, left_s)


@pytest.mark.parametrize(
    ("events", "event", "left_s"),
    [
        ([], None, None),
        ([azure_event("Preempt", "vm_0", "Tue, 24 Nov 2026 08:20:30 GMT")], "preempts this spot machine", 30),
        ([azure_event("Preempt", "VM_0", "Tue, 24 Nov 2026 08:20:30 GMT")], "preempts this spot machine", 30),
        ([azure_event("Preempt", "vm_1", "Tue, 24 Nov 2026 08:20:30 GMT")], None, None),
        ([azure_event("Freeze", "vm_0", "Tue, 24 Nov 2026 08:35:00 GMT")], None, None),
        ([azure_event("Reboot", "vm_0", "", status="Started")], "restarts this machine", 0),
        (
            [
                azure_event("Redeploy", "vm_0", "Tue, 24 Nov 2026 08:35:00 GMT"),
                azure_event("Terminate", "vm_0", "Tue, 24 Nov 2026 08:25:00 GMT"),
            ],
            "deletes this machine",
            300,
        ),
    ],
)
def test_azure(events, event, left_s):
    check(azure_notice(azure_document(*events), machine="vm_0", now=NOW), "azure", event, left_s)


def check(notice: Notice | None, cloud: str, event: str | None, left_s: float | None) -> None:
    expected = None if event is None else Notice(cloud=cloud, event=event, deadline=NOW + left_s)
    assert notice == expected


@pytest.mark.parametrize(
    "read",
    [
        lambda: aws_notice(b"<html>portal</html>", None, now=NOW),
        lambda: aws_notice(b'{"action": "terminate", "time": "soon"}', None, now=NOW),
        lambda: aws_notice(b'{"action": "terminate", "time": "2026-11-24T08:22:00"}', None, now=NOW),
        lambda: gcp_notice("<html>", "NONE", now=NOW),
        lambda: azure_notice(b"[]", machine="vm_0", now=NOW),
        lambda: azure_notice(azure_document(azure_event("Preempt", "vm_0", "soon")), machine="vm_0", now=NOW),
    ],
)
def test_an_invalid_answer_is_an_error(read):
    with pytest.raises(ValueError):
        read()


def test_the_deadline_of_a_notice_never_moves_back():
    first, second = (gcp_notice("TRUE", "NONE", now=NOW + s) for s in (0, 5))
    assert sooner(first, second) == first
    assert sooner(second, first) == first
    assert sooner(first, None) is None
    maintenance = gcp_notice("FALSE", "TERMINATE_ON_HOST_MAINTENANCE", now=NOW)
    assert sooner(first, maintenance) == maintenance, "another event has its own deadline"


@pytest.mark.parametrize(
    ("firmware", "cloud"),
    [
        ({"sys_vendor": "Amazon EC2", "product_name": "g5.xlarge"}, "aws"),
        ({"sys_vendor": "Xen", "product_name": "HVM domU", "bios_version": "4.11.amazon"}, "aws"),
        ({"sys_vendor": "Google", "product_name": "Google Compute Engine"}, "gcp"),
        (
            {"sys_vendor": "Microsoft Corporation", "chassis_asset_tag": "7783-7084-3265-9085-8269-3286-77"},
            "azure",
        ),
        ({"sys_vendor": "Microsoft Corporation", "product_name": "Virtual Machine"}, None),
        ({"sys_vendor": "LENOVO", "product_name": "20XW0026GE"}, None),
        ({}, None),
    ],
)
def test_the_firmware_identifies_the_cloud(firmware, cloud, tmp_path):
    for name, text in firmware.items():
        (tmp_path / name).write_text(text + "\n")
    assert find_cloud(tmp_path) == cloud
    assert (
        cloud_of({"sys_vendor": "", "product_name": "", "bios_version": "", "chassis_asset_tag": "", **firmware})
        == cloud
    )
