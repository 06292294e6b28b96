"""What is sent to SageMaker for a plan: every field, checked by botocore, and nothing else."""

import json
import warnings
from dataclasses import replace
from typing import Any

import boto3
import pytest
from botocore.stub import Stubber

from visiontuner.aws import account as aws_account
from visiontuner.aws.request import JobPlan, Price, S3Images
from visiontuner.errors import JobFailed
from visiontuner.experiment.schema import Experiment
from visiontuner.io.aws import Aws

with warnings.catch_warnings():  # the SageMaker SDK's own, from its own imports
    warnings.simplefilter("ignore")
    from visiontuner.aws import model_trainer

pytestmark = [
    pytest.mark.filterwarnings("ignore:sagemaker.train.configs has been moved"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:sagemaker"),
]
SOURCE = "s3://bucket/visiontuner/dogs-1/source-1.tar.gz"


@pytest.fixture
def account(aws: Any) -> Aws:
    aws.client("s3").create_bucket(
        Bucket="bucket", CreateBucketConfiguration={"LocationConstraint": "eu-west-1"}
    )
    return Aws()


@pytest.fixture
def plan(account: Aws) -> JobPlan:
    return JobPlan(
        search="dogs-1",
        experiment=Experiment.parse({"name": "dogs"}),
        region=account.region,
        account=account.account,
        caller=account.caller,
        role="arn:aws:iam::123456789012:role/jobs",
        bucket="bucket",
        bucket_exists=True,
        container_image="123456789012.dkr.ecr.eu-west-1.amazonaws.com/directed:1",
        instance_type="ml.m5.xlarge",
        instances=2,
        max_run_seconds=3600,
        price=Price(per_hour=1.5, instances=2),
        tracking_uri=None,
        tracking="later",
        images=S3Images(uri="s3://photos/dogs/"),
    )


def test_everything_that_was_asked_for_arrives(account: Aws, plan: JobPlan) -> None:
    job = model_trainer.send_request(
        account,
        replace(
            plan,
            warm_pool_seconds=1800,
            subnets=("subnet-1", "subnet-2"),
            security_groups=("sg-1",),
            kms_key="key-1",
            disk_gb=80,
            tags={"team": "vision"},
            encrypt_traffic=True,
            variables={"PIP_INDEX_URL": "https://packages.internal/simple"},
        ),
        SOURCE,
    )
    told = account.call("sagemaker", "describe_training_job", TrainingJobName=job)
    assert told["ResourceConfig"] == {
        "InstanceType": "ml.m5.xlarge",
        "InstanceCount": 2,
        "VolumeSizeInGB": 80,
        "VolumeKmsKeyId": "key-1",
        "KeepAlivePeriodInSeconds": 1800,
    }
    assert told["VpcConfig"] == {
        "Subnets": ["subnet-1", "subnet-2"],
        "SecurityGroupIds": ["sg-1"],
    }
    assert told["OutputDataConfig"]["KmsKeyId"] == "key-1"
    assert told["CheckpointConfig"] == {
        "S3Uri": "s3://bucket/visiontuner/dogs-1/checkpoints",
        "LocalPath": "/opt/ml/checkpoints",
    }
    assert told["StoppingCondition"] == {"MaxRuntimeInSeconds": 3600}
    assert told["EnableInterContainerTrafficEncryption"]
    assert told["Environment"]["PIP_INDEX_URL"] == "https://packages.internal/simple"
    assert not told["EnableManagedSpotTraining"]
    tags = account.call("sagemaker", "list_tags", ResourceArn=told["TrainingJobArn"])["Tags"]
    assert {tag["Key"]: tag["Value"] for tag in tags} == {
        "team": "vision",
        "visiontuner.search": "dogs-1",
        "visiontuner.price_per_hour": "1.5",
    }


def test_a_machine_with_a_disk_of_its_own_gets_no_key_and_a_small_volume(
    account: Aws, plan: JobPlan
) -> None:
    large = replace(plan.images or S3Images(uri=""), size=400 * 10**9)
    on_gpu = replace(plan, instance_type="ml.g5.xlarge", kms_key="key-1", images=large)
    asked = model_trainer.dry_request(account, on_gpu, SOURCE)
    assert asked["ResourceConfig"] == {
        "InstanceType": "ml.g5.xlarge",
        "InstanceCount": 2,
        "VolumeSizeInGB": 30,
    }
    assert asked["OutputDataConfig"]["KmsKeyId"] == "key-1"


def test_spot_machines_are_waited_for(account: Aws, plan: JobPlan) -> None:
    asked = model_trainer.dry_request(account, replace(plan, spot=True), SOURCE)
    assert asked["EnableManagedSpotTraining"]
    assert asked["StoppingCondition"] == {
        "MaxRuntimeInSeconds": 3600,
        "MaxWaitTimeInSeconds": 5 * 3600,
    }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"instances": -1}, "InstanceCount"),
        ({"warm_pool_seconds": -5}, "KeepAlivePeriodInSeconds"),
    ],
)
def test_a_request_that_breaks_sagemakers_rules_is_never_sent(
    account: Aws, plan: JobPlan, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(JobFailed, match=f"SageMaker would not take this request: .*{message}"):
        model_trainer.send_request(account, replace(plan, **changes), SOURCE)
    assert not account.call("sagemaker", "list_training_jobs")["TrainingJobSummaries"]


@pytest.mark.parametrize("opted_out", [True, False])
def test_the_sdks_telemetry_is_off(
    account: Aws, plan: JobPlan, monkeypatch: pytest.MonkeyPatch, opted_out: bool
) -> None:
    from sagemaker.core.telemetry import telemetry_logging

    sent: list[Any] = []
    monkeypatch.setattr(
        telemetry_logging, "_send_telemetry_request", lambda *told, **_: sent.append(told)
    )
    if not opted_out:  # what a test of nothing would not see
        monkeypatch.setattr(model_trainer, "_NO_TELEMETRY", {})
    model_trainer.dry_request(account, plan, SOURCE)
    model_trainer.send_request(account, plan, SOURCE)
    assert bool(sent) == (not opted_out)


# The price


class _Pricing(Aws):
    """An account whose price list a test writes; it asks nothing else."""

    def __init__(self, pricing: Any) -> None:
        self.region = "eu-west-1"
        self._pricing = pricing

    def client(self, service: str, region: str | None = None, *, patient: bool = True) -> Any:
        assert (service, region, patient) == ("pricing", "us-east-1", False)
        return self._pricing


def product(usage: str, dollars: str, unit: str = "Hrs") -> str:
    """An entry of AWS's price list."""
    dimensions = {"A.B.C": {"unit": unit, "pricePerUnit": {"USD": dollars}}}
    terms = {"OnDemand": {"A.B": {"priceDimensions": dimensions}}}
    return json.dumps({"product": {"attributes": {"usagetype": usage}}, "terms": terms})


def test_a_price_is_that_of_the_usage_and_of_no_product_beside_it() -> None:
    pricing = boto3.client(
        "pricing", "us-east-1", aws_access_key_id="testing", aws_secret_access_key="testing"
    )
    filters = {"regionCode": "eu-west-1", "instanceName": "ml.g5.xlarge"}
    expected = {
        "ServiceCode": "AmazonSageMaker",
        "Filters": [{"Type": "TERM_MATCH", "Field": k, "Value": v} for k, v in filters.items()],
    }
    pages = [
        [
            product("EU-Cluster:ml.g5.xlarge", "9.9"),
            product("EU-TrainDebug:ml.g5.xlarge", "8.8"),
            product("EU-Train:ml.g5.xlarge-Reserved", "7.7"),
            product("EU-Host:ml.g5.xlarge", "1.5"),
        ],
        [
            product("EU-Train:ml.g5.xlarge", "1.4"),
            product("EU-Tsform:ml.g5.xlarge", "1.6", unit="GB-Mo"),
        ],
    ]
    uses = {"Hosting": 1.5, "Training": 1.4, "Transform": None, "Async": None}
    for use, price in uses.items():
        with Stubber(pricing) as stub:
            stub.add_response("get_products", {"PriceList": pages[0], "NextToken": "n"}, expected)
            second = expected | {"NextToken": "n"}
            stub.add_response("get_products", {"PriceList": pages[1]}, second)
            found = aws_account.hourly_price(_Pricing(pricing), "ml.g5.xlarge", use)  # type: ignore[arg-type]
        assert found == price


def test_a_price_list_that_may_not_be_read_is_no_error() -> None:
    pricing = boto3.client(
        "pricing", "us-east-1", aws_access_key_id="testing", aws_secret_access_key="testing"
    )
    with Stubber(pricing) as stub:
        stub.add_client_error("get_products", "AccessDeniedException")
        assert aws_account.hourly_price(_Pricing(pricing), "ml.g5.xlarge", "Training") is None
