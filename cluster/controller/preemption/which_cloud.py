"""Which cloud this machine is in, read from the firmware's strings under /sys. Sends nothing, so a laptop makes no request.

Checks the same strings as cloud-init's ds-identify. Where the kernel does not show them (a sandbox, a Mac), no cloud is found; name it
with `--preemption-notices aws`.
"""

from collections.abc import Mapping
from pathlib import Path

from cluster.protocol.notice import Cloud

DMI_FOLDER = Path("/sys/class/dmi/id")
_FIELDS = ("sys_vendor", "product_name", "bios_version", "chassis_asset_tag")
# Hyper-V outside Azure has the same vendor, but another asset tag.
_AZURE_ASSET_TAG = "7783-7084-3265-9085-8269-3286-77"


def find_cloud(folder: Path = DMI_FOLDER) -> Cloud | None:
    """Never raises."""
    return cloud_of({name: _read(folder / name) for name in _FIELDS})


def cloud_of(firmware: Mapping[str, str]) -> Cloud | None:
    """From the fields of the DMI table; "" for a missing one."""
    # Older instance types, on Xen, show it in the BIOS version only.
    if firmware["sys_vendor"] == "Amazon EC2" or "amazon" in firmware["bios_version"].lower():
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
