"""Deploys the container to a real-time endpoint of Amazon SageMaker. Needs boto3 and your AWS login; the image must be in your ECR.

    python deploy/sagemaker/deploy.py --image ACCOUNT.dkr.ecr.REGION.amazonaws.com/tramontane:0.1.0 --role ROLE_ARN

Knows SageMaker's names; the container finds its port in the environment, and its model and options in the SM_TRAMONTANE_ variables.
"""

import argparse
import os
from typing import Any


def requests(args: argparse.Namespace, environment: dict[str, str]) -> dict[str, dict[str, Any]]:
    """The arguments of the three calls, in their order."""
    container: dict[str, Any] = {"Image": args.image, "Environment": environment}
    if args.weights:
        # Files as they are; no archive to unpack.
        source = {"S3Uri": args.weights, "S3DataType": "S3Prefix", "CompressionType": "None"}
        container["ModelDataSource"] = {"S3DataSource": source}
    variant = {
        "VariantName": "all",
        "ModelName": args.name,
        "InstanceType": args.instance_type,
        "InitialInstanceCount": 1,
        "ModelDataDownloadTimeoutInSeconds": 1800,
        "ContainerStartupHealthCheckTimeoutInSeconds": 1800,
    }
    return {
        "create_model": {"ModelName": args.name, "ExecutionRoleArn": args.role, "PrimaryContainer": container},
        "create_endpoint_config": {"EndpointConfigName": args.name, "ProductionVariants": [variant]},
        "create_endpoint": {"EndpointName": args.name, "EndpointConfigName": args.name},
    }


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Deploys Tramontane to an endpoint of Amazon SageMaker.")
    parser.add_argument("--image", required=True)
    parser.add_argument("--role", required=True, help="ARN of the role of the endpoint")
    parser.add_argument("--name", default="tramontane")
    parser.add_argument("--model", default="", help="id on the Hub, instead of --weights")
    parser.add_argument("--weights", default="", help="s3:// with the files of a checkpoint, with a slash at its end")
    parser.add_argument("--instance-type", default="ml.g5.xlarge")
    parser.add_argument("--gpus", type=int, default=1, help="of the instance; one replica uses all of them")
    return parser.parse_args(argv)


def environment_of(args: argparse.Namespace) -> dict[str, str]:
    """Each SM_TRAMONTANE_NAME is the option --name of `tramontane serve`."""
    environment = {"SM_NUM_GPUS": str(args.gpus), "SM_TRAMONTANE_NO_BATCHES": "true"}
    if args.model:
        environment["SM_TRAMONTANE_MODEL"] = args.model
        environment |= {"HF_TOKEN": os.environ["HF_TOKEN"]} if os.environ.get("HF_TOKEN") else {}
    return environment


def main() -> None:
    import boto3

    args = parse()
    client = boto3.client("sagemaker")
    for call, arguments in requests(args, environment_of(args)).items():
        getattr(client, call)(**arguments)
    print(f"Waiting for the endpoint {args.name}, some ten minutes.")
    client.get_waiter("endpoint_in_service").wait(EndpointName=args.name)
    print(f"Ready: boto3.client('sagemaker-runtime').invoke_endpoint(EndpointName='{args.name}', ...)")


if __name__ == "__main__":
    main()
