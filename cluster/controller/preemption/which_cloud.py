"""Which cloud this machine is in, read off the firmware's own words under /sys. Sends nothing, so that a laptop stays silent.

The same marks as cloud-init's ds-identify uses. Where the kernel does not show them (a sandbox, a Mac) the machine counts as nobody's;
`--preemption-notices aws` names the cloud there.
"""

from collections.abc import Mapping
from pathlib import Path

from cluster.protocol.notice import Cloud

DMI_FOLDER = Path("/sys/class/dmi/id")
_FIELDS = ("sys_vendor", "product_name", "bios_version", "chassis_asset_tag")
_AZURE_ASSET_TAG = "7783-7084-3265-9085-8269-3286-77"  # also Hyper-V elsewhere is Microsoft's, but without it


def find_cloud(folder: Path = DMI_FOLDER) -> Cloud | None:
    """Never raises."""
    return cloud_of({name: _read(folder / name) for name in _FIELDS})


def cloud_of(firmware: Mapping[str, str]) -> Cloud | None:
    """By what the fields of the DMI table say, "" where there is none."""
    if (
        firmware["sys_vendor"] == "Amazon EC2" or "amazon" in firmware["bios_version"].lower()
    ):  # the latter: older types, on Xen
        return "aws"
    if firmware["product_name"] in ("Google Compute Engine", "Google"):
        return "gcp"
    if firmware["chassis_asset_tag"] == _AZURE_ASSET_TAG:
        return "azure"
    return None


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return ""
