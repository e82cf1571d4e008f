"""The clouds that give preemption notices, and which of them a deployment watches for."""

from typing import Literal, get_args

Cloud = Literal["aws", "gcp", "azure"]
CLOUDS: tuple[Cloud, ...] = get_args(Cloud)
# auto: the cloud this machine is in
PreemptionNotices = Literal["auto", "aws", "gcp", "azure", "off"]
PREEMPTION_NOTICES: tuple[PreemptionNotices, ...] = get_args(PreemptionNotices)
