"""Uploads the container as a model of Vertex AI and deploys it to an endpoint. Needs google-cloud-aiplatform and your Google Cloud login.

    python deploy/vertex/upload.py --project my-project --image us-docker.pkg.dev/my-project/tramontane/tramontane:0.1.0 \\
      --weights gs://my-bucket/mistral-7b

Knows Vertex AI's names; the container finds its port, its paths and the weights in the environment that Vertex AI gives it.
"""

import argparse
from typing import Any

HEALTH, PREDICT = "/ping", "/invocations"


def container_spec(image: str, serve_options: list[str]) -> dict[str, Any]:
    """The arguments of `Model.upload` that describe the container."""
    return {
        "serving_container_image_uri": image,
        "serving_container_args": ["serve", "--no-batches", *serve_options],
        "serving_container_ports": [8080],
        "serving_container_health_route": HEALTH,
        "serving_container_predict_route": PREDICT,
        "serving_container_shared_memory_size_mb": 2048,
        "serving_container_deployment_timeout": 3600,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Deploys Tramontane to an endpoint of Vertex AI.")
    parser.add_argument("--project", required=True)
    parser.add_argument("--location", default="us-central1")
    parser.add_argument("--image", required=True, help="the container in a registry that Vertex AI can read")
    parser.add_argument("--weights", required=True, help="gs:// with the files of a checkpoint")
    parser.add_argument("--name", default="tramontane")
    parser.add_argument("--machine-type", default="g2-standard-8")
    parser.add_argument("--accelerator", default="NVIDIA_L4")
    parser.add_argument("--accelerator-count", type=int, default=1)
    parser.add_argument("serve_options", nargs="*", help="further options of `tramontane serve`, after --")
    args = parser.parse_args()
    from google.cloud import aiplatform

    aiplatform.init(project=args.project, location=args.location)
    options = [*args.serve_options]
    if args.accelerator_count > 1:
        options += ["--tensor-parallel-size", str(args.accelerator_count)]
    model = aiplatform.Model.upload(
        display_name=args.name, artifact_uri=args.weights, **container_spec(args.image, options)
    )
    endpoint = model.deploy(
        machine_type=args.machine_type,
        accelerator_type=args.accelerator,
        accelerator_count=args.accelerator_count,
        min_replica_count=1,
        max_replica_count=2,
    )
    print(f"Ask it with: endpoint.raw_predict or endpoint.predict of {endpoint.resource_name}")


if __name__ == "__main__":
    main()
