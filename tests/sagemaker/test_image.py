"""AWS's own image for a job, from what the SageMaker SDK knows; nothing is asked."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import pytest

from visiontuner.aws.request import awss_version, find_container_image, torch_range
from visiontuner.errors import UserMistake

# The SageMaker SDK's own, from its own imports.
pytestmark = [
    pytest.mark.filterwarnings("ignore:sagemaker.train.configs has been moved"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:sagemaker"),
]
REGISTRY = r"763104351884\.dkr\.ecr\.eu-west-1\.amazonaws\.com/"
OLDER = re.compile(
    REGISTRY + r"pytorch-training:(?P<version>[\d.]+)-(?P<kind>cpu|gpu)-py3(?P<python>\d+)"
)
NEWER = re.compile(REGISTRY + r"pytorch:(?P<version>[\d.]+)-(?P<kind>cpu|cu\d+)-[a-z0-9-]+")


def find(
    instance_type: str = "ml.g5.xlarge", version: str | None = None, line: re.Pattern[str] = OLDER
) -> re.Match[str]:
    aws: Any = SimpleNamespace(region="eu-west-1")
    found = line.fullmatch(find_container_image(aws, None, instance_type, version=version))
    assert found is not None
    return found


def test_the_newest_image_fits_the_machine_and_is_of_the_range_that_was_tested() -> None:
    on_gpu, on_cpu = find("ml.g5.xlarge", line=NEWER), find("ml.m5.xlarge", line=NEWER)
    assert on_gpu["kind"].startswith("cu")
    assert on_cpu["kind"] == "cpu"
    assert on_gpu["version"] == on_cpu["version"]
    assert on_gpu["version"] in torch_range()


def test_an_image_of_the_older_line_has_a_python_that_is_new_enough() -> None:
    older = find(version="2.10")
    assert older["version"] == "2.10.0"
    assert int(older["python"]) >= 11


@pytest.mark.parametrize(
    ("version", "exact", "line"),
    [("2.8", "2.8.0", OLDER), ("2.8.0", "2.8.0", OLDER), ("2.14", "2.14", NEWER)],
)
def test_a_version_stands_for_its_exact_one(
    version: str, exact: str, line: re.Pattern[str]
) -> None:
    assert find(version=version, line=line)["version"] == exact
    assert awss_version(find(version=version, line=line)[0]) == exact


def test_awss_public_images_are_its_own_and_no_account_is_asked_about_them() -> None:
    aws: Any = SimpleNamespace(region="eu-west-1")
    public = "public.ecr.aws/deep-learning-containers/pytorch:2.14-cpu-amzn2023-sagemaker"
    assert find_container_image(aws, public, "ml.m5.xlarge") == public
    assert awss_version(public) == "2.14"


@pytest.mark.parametrize(
    ("instance_type", "version", "message"),
    [
        ("ml.g5.xlarge", "9.9", r"no image with PyTorch 9\.9\. The newest: .*2\.14\.$"),
        ("ml.g5.xlarge", "1.13", "has Python 3.9, and visiontuner needs 3.11"),
        ("ml.trn1.2xlarge", None, "no PyTorch image for ml.trn1.2xlarge in eu-west-1 .* --image"),
    ],
)
def test_an_image_that_aws_does_not_have_is_refused(
    instance_type: str, version: str | None, message: str
) -> None:
    with pytest.raises(UserMistake, match=message):
        find(instance_type, version)


def test_another_image_has_no_version_of_awss() -> None:
    assert awss_version("123456789012.dkr.ecr.eu-west-1.amazonaws.com/mine:2.8") is None
