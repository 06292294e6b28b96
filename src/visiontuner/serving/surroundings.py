"""The serving image that a deployment needs and MLflow leaves to the user, checked beforehand."""

from __future__ import annotations

import os

from visiontuner.aws import Aws
from visiontuner.aws_images import OCI_TYPES, PLATFORM, Image, look_up_image, registry
from visiontuner.errors import UserMistake

IMAGE_VARIABLE = "MLFLOW_SAGEMAKER_DEPLOY_IMG_URL"  # MLflow's
DEFAULT_REPOSITORY = "mlflow-pyfunc"

_REBUILD = "docker buildx build --platform linux/amd64 --provenance=false --output type=docker …"


def mlflows_bucket(aws: Aws) -> str:
    """The bucket that MLflow makes and uploads to if none is named."""
    return f"mlflow-sagemaker-{aws.region}-{aws.account}"


def instance_types(aws: Aws) -> list[str]:
    """Those of endpoints, as far as this boto3 knows them; asks nobody."""
    model = aws.client("sagemaker").meta.service_model
    return list(model.shape_for("ProductionVariantInstanceType").enum)


def find_image(aws: Aws, wanted: str | None) -> Image:
    """The serving image, known to be in ECR and fit for SageMaker.

    Args:
        wanted: its URL; None: the environment's, or the one that `mlflow sagemaker
            build-and-push-container` pushes.

    Raises:
        UserMistake: it is not there, in another region, for another processor, or of a format that
            SageMaker refuses.
    """
    import mlflow.version

    url = wanted or os.environ.get(IMAGE_VARIABLE)
    image = look_up_image(
        aws,
        url or f"{registry(aws)}/{DEFAULT_REPOSITORY}:{mlflow.version.VERSION}",
        runs="the endpoint",
        advice="Push one with `mlflow sagemaker build-and-push-container`, or name another with "
        "--image.",
    )
    if image.media_type in OCI_TYPES:
        raise UserMistake(
            f"SageMaker refuses images of type {image.media_type}, which newer Docker builds make. "
            f"Build it with `{_REBUILD}` and push it again."
        )
    if image.platform not in (None, PLATFORM):
        raise UserMistake(
            f"The image is for {image.platform}, and this endpoint's instances are {PLATFORM}. "
            f"Build it with `{_REBUILD}`."
        )
    return image
