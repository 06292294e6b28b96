"""Searches as SageMaker training jobs: submit, follow, stop, bring home; no MLflow and no Ray here.

Where a job's things are:

    s3://BUCKET/visiontuner/SEARCH/
      experiment.yaml       the experiment as it was submitted
      source-DIGEST.tar.gz  what the hosts unpack and run
      checkpoints/          /opt/ml/checkpoints of the hosts, synchronised while the job runs
        search/             the search folder; what a later job of this search goes on with
        cache/              features, exported networks
      output/JOB/output/    model.tar.gz, which holds the search folder once more
      visiontuner-…/        what the SageMaker SDK uploads: its own start scripts

The archive holds `visiontuner/`, `requirements.txt`, `experiment.yaml` and `job.json`
(`source.JobFile`). Every host runs `python -m visiontuner.sagemaker.cluster` in it. Pictures on S3
are the channel `pictures`; `VISIONTUNER_CHANNEL` says which source they are, so that experiment and
journal name S3 and not a folder of the job.
"""
