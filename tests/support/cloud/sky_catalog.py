"""A small SkyPilot catalog in a separate home folder, with the files and columns of the real one.

For tests that read prices and for those that let SkyPilot itself read a YAML without a network. Prices are made up, but differ by region.
"""

from pathlib import Path

ACCELERATORS = """\
AcceleratorName,Clouds
A10,['Azure']
A10G,['AWS']
A100,"['AWS', 'GCP']"
A100-80GB,"['Azure', 'GCP']"
L4,"['AWS', 'GCP']"
"""
AWS = """\
InstanceType,AcceleratorName,AcceleratorCount,vCPUs,MemoryGiB,GpuInfo,Price,SpotPrice,Region,AvailabilityZone,Arch
m6i.large,,,2.0,8.0,,0.096,0.04,us-east-1,use1-az1,x86_64
g5.xlarge,A10G,1.0,4.0,16.0,"{'Gpus': [{'Name': 'A10G', 'MemoryInfo': {'SizeInMiB': 22888}}]}",1.1,0.9,eu-west-1,euw1-az1,x86_64
g5.xlarge,A10G,1.0,4.0,16.0,"{'Gpus': [{'Name': 'A10G', 'MemoryInfo': {'SizeInMiB': 22888}}]}",1.0,0.5,us-east-1,use1-az1,x86_64
g5.xlarge,A10G,1.0,4.0,16.0,"{'Gpus': [{'Name': 'A10G', 'MemoryInfo': {'SizeInMiB': 22888}}]}",1.0,0.4,us-east-1,use1-az2,x86_64
g5.2xlarge,A10G,1.0,8.0,32.0,"{'Gpus': [{'Name': 'A10G', 'MemoryInfo': {'SizeInMiB': 22888}}]}",1.25,0.3,us-east-1,use1-az1,x86_64
g5.12xlarge,A10G,4.0,48.0,192.0,"{'Gpus': [{'Name': 'A10G', 'MemoryInfo': {'SizeInMiB': 22888}}]}",5.5,2.0,us-east-1,use1-az1,x86_64
p4d.24xlarge,A100,8.0,96.0,1152.0,"{'Gpus': [{'Name': 'A100', 'MemoryInfo': {'SizeInMiB': 40960}}]}",22.0,,us-east-1,use1-az1,x86_64
g6.xlarge,L4,1.0,4.0,16.0,"{'Gpus': [{'Name': 'L4', 'MemoryInfo': {'SizeInMiB': 22888}}]}",0.81,0.35,us-east-1,use1-az1,x86_64
"""
GCP = """\
InstanceType,vCPUs,MemoryGiB,AcceleratorName,AcceleratorCount,GpuInfo,Region,AvailabilityZone,Price,SpotPrice
a2-highgpu-1g,12.0,85.0,,,,us-central1,us-central1-a,0.75,0.25
a2-highgpu-1g,12.0,85.0,,,,us-west4,us-west4-b,0.8,0.2
a2-ultragpu-1g,12.0,170.0,,,,us-central1,us-central1-a,1.1,0.5
g2-standard-24,24.0,96.0,,,,us-central1,us-central1-a,1.2,0.3
,,,A100,1.0,A100,us-central1,us-central1-a,3.0,1.0
,,,A100,1.0,A100,us-west4,us-west4-b,3.0,1.5
,,,A100-80GB,1.0,A100-80GB,us-central1,us-central1-a,4.0,1.5
,,,L4,2.0,L4,us-central1,us-central1-a,1.0,0.25
,,,tpu-v6e-1,1,tpu-v6e-1,us-east1,us-east1-d,2.7,0.57285
"""
AZURE = """\
InstanceType,AcceleratorName,AcceleratorCount,vCPUs,MemoryGiB,GpuInfo,Price,SpotPrice,Region,Generation
Standard_D2s_v5,,,2.0,8.0,,0.096,0.02,eastus,V2
Standard_NV36ads_A10_v5,A10,1.0,36.0,440.0,A10,3.2,0.6,eastus,V2
Standard_NC24ads_A100_v4,A100-80GB,1.0,24.0,220.0,A100-80GB,3.7,0.8,eastus,V2
"""


def write_catalog(home: Path) -> Path:
    """Writes the files under `home`, where SkyPilot 0.14 expects them; returns their folder."""
    folder = home / ".sky" / "catalogs" / "v8"
    for name, text in (
        ("common/accelerators.csv", ACCELERATORS),
        ("aws/vms.csv", AWS),
        ("gcp/vms.csv", GCP),
        ("azure/vms.csv", AZURE),
    ):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return folder
