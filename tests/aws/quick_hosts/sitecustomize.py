"""A host of the stand-in: its last uploads take a second, so the job need not wait ten for them."""

import sys
import time

if "visiontuner.aws.container" in sys.orig_argv:
    sleep = time.sleep
    time.sleep = lambda seconds: sleep(min(seconds, 3.0))
