"""The clouds that give preemption notices, and the choices of `--preemption-notices`."""

from typing import Literal, get_args

Cloud = Literal["aws", "gcp", "azure"]
CLOUDS: tuple[Cloud, ...] = get_args(Cloud)
# auto: the cloud this machine runs in
PreemptionNotices = Literal["auto", "aws", "gcp", "azure", "off"]
PREEMPTION_NOTICES: tuple[PreemptionNotices, ...] = get_args(PreemptionNotices)
