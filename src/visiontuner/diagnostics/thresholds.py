"""Numbers that the rules compare with; `docs/rules.md` says where each comes from.

"Debugger" is Amazon SageMaker Debugger's published default, taken where curves hold one point an
epoch instead of one a step and the number still means the same. The others were measured on
trainings that went well and on trainings made to fail (`benchmarks/rules.py`).
"""

from __future__ import annotations

# loss_not_decreasing. Debugger: num_steps 10, diff_percent 0.1, increase_threshold_percent 5.
LOSS_EPOCHS = 10
LOSS_FEWEST_EPOCHS = 4
LOSS_DECREASE = 0.001
LOSS_INCREASE = 0.05
# A loss below half of a guess's is no failure to learn, however flat.
LEARNED_SHARE = 0.5

# overfit. Debugger: ratio_threshold 0.1, patience 1. A head on good features exceeds that ratio
# when all is well (loss 0.21 against 0.02), so the gap in accuracy has to confirm it.
OVERFIT_RATIO = 0.1
OVERFIT_PATIENCE = 1
OVERFIT_GAP_WARNING = 0.15
OVERFIT_GAP_ERROR = 0.25

# overtraining. Debugger: patience_validation 10, delta 0.01.
OVERTRAINING_PATIENCE = 10
OVERTRAINING_DELTA = 0.01
OVERTRAINING_LONG = 50
# Two standard errors of an accuracy of 0.98 over 200 images.
ACCURACY_DELTA = 0.02
# Under a schedule that falls to 0 the last epochs change little: only what was lost counts.
# Measured on heads with a cosine: the loss rises by up to 40 %, the accuracy stays within 0.035.
ACCURACY_LOST = 0.05

# learning_rate_too_high: mean training loss of an epoch as a multiple of a guess's, ln(classes).
# Measured: 2.4 at 33 times the best learning rate, 17 to 72 at 1,000 times.
HIGH_LOSS_WARNING = 3.0
HIGH_LOSS_ERROR = 10.0
HIGH_RISING_SHARE = 0.3
HIGH_FEWEST_EPOCHS = 5

# learning_rate_too_low: the last training loss as a share of a guess's.
# Measured after 20 epochs: 0.97 to 0.99 at a thousandth of the best rate, 0.1 to 0.2 at a third.
LOW_LOSS_WARNING = 0.6
LOW_LOSS_ERROR = 0.9
LOW_FALLING_SHARE = 0.8
LOW_FEWEST_EPOCHS = 5

# exploding_gradient: norm as a multiple of the first epoch's and of the median of those before.
# Debugger's ExplodingTensor knows only values that are not finite: `not_a_number`.
GRADIENT_WARNING = 10.0
GRADIENT_ERROR = 100.0

# stalled. Debugger's StalledTrainingRule: threshold 1800 seconds.
STALLED_SECONDS = 1800.0
STALLED_FACTOR = 3.0

# class_imbalance. Debugger: threshold_imbalance 10, threshold_misprediction 0.7.
IMBALANCE_RATIO = 10.0
MISPREDICTION = 0.7
FEWEST_IMAGES = 5

# class_not_predicted, label_noise: a trial this far behind its search's best says nothing about the
# data. Measured at 30 times the best learning rate: 0.02 to 0.04, and 4 to 6 times the loss; at a
# hundredth of it: 0.8 and 10 times. With 20 % wrong labels at three times the best rate: 0 and 1.1.
FAR_ACCURACY = 0.05
FAR_LOSS = 1.5

# class_not_predicted: how likely bad luck alone may be, over all classes together.
LUCK = 0.01

# label_noise. Confident: the label gets less than a tenth of what guessing would give it.
# Measured: 0.4 % to 7 % of the validation images with right labels, 4 % to 26 % with 20 % to 30 %
# of them wrong.
CONFIDENT_SHARE_OF_GUESS = 0.1
NOISE_WARNING = 0.08
NOISE_ERROR = 0.25
NOISE_ACCURACY = 0.5
# No better than guessing: loss at least this share of a guess's, accuracy at most that multiple.
GUESS_LOSS = 0.95
GUESS_ACCURACY = 3.0
MEMORISED_LOSS = 0.9

# similar_across_runs: how many epochs have to agree, to how many digits.
SIMILAR_EPOCHS = 3
SIMILAR_DIGITS = 6

# few_steps: of a whole training. Measured on heads with 480 images of 24 classes: in 40 steps
# learning rates from 0.001 on reach what more steps reach, a third of it does not.
FEWEST_TRAINING_STEPS = 40

# Rules on recordings. What does not last is noise: Debugger's UnchangedTensor looks at num_steps 3,
# and so do all of ours that ask whether something lasts.
LAST_STEPS = 3
# vanishing_gradient. Debugger: threshold 1e-7. Near the end all gradients are small: it has to be
# that share of the largest layer's too.
VANISHED_GRADIENT = 1e-7
VANISHED_SHARE = 1e-3
# all_zero. Debugger: threshold 100 %.
ALL_ZERO = 1.0
# unchanged_tensor. Debugger: rtol 1e-5, atol 1e-8, in `weight_unchanged` itself. A cosine ends with
# steps of nothing: it has to hold of that share of all recorded steps too.
STILL_SHARE = 0.5
# weight_update_ratio. Debugger: large_threshold 10, small_threshold 1e-8.
UPDATE_LARGE = 10.0
UPDATE_SMALL = 1e-8
# poor_weight_initialisation. Debugger: steps 10, threshold 10 for the ratio of variances. Measured
# at the first step of 14 of torchvision's networks with random weights: outputs differ up to 194
# times, gradients up to 2e8 times (ConvNeXt, whose blocks begin with a factor of 1e-6).
FIRST_STEPS = 10
INITIAL_OUTPUTS = 1e4
INITIAL_GRADIENTS = 1e10
# tensor_variance: Debugger has no limits.
LARGEST_STD = 1e4
SMALLEST_STD = 1e-6
# saturated_activation and dead_relu. Debugger: threshold_layer 50 %.
SATURATED_SHARE = 0.5
DEAD_SHARE_WARNING = 0.5
DEAD_SHARE_ERROR = 0.9
# In a batch of 4 over half of the units of a healthy network are 0 by chance (VGG, RegNet).
DEAD_FEWEST_IMAGES = 16
# check_input_images: how far from where it is expected black or white may lie, by their distance.
INPUT_MARGIN = 0.02

# Rules on steps and on the machine. Debugger waits for 1,000 samples, two a second; ours for these:
# in a training of seconds there is nothing to gain.
FEWEST_STEPS = 10
FEWEST_SECONDS = 10.0
FEWEST_SAMPLES = 10
# low_gpu_use. Debugger: threshold_p95 70, threshold_p5 10; below gpu_threshold 10 a GPU is idle.
GPU_P95 = 70.0
GPU_P5 = 10.0
GPU_IDLE = 10.0
# cpu_bottleneck and io_bottleneck. Debugger: threshold 50 (of the time), cpu_threshold 90.
CPU_BUSY = 90.0
BOTTLENECK_ERROR = 0.5
BOTTLENECK_WARNING = 0.25
WAITING_WARNING = 0.25
# batch_size_too_small. Debugger: 95th percentiles of CPU, GPU and GPU memory, all below 70.
BATCH_P95 = 70.0
OPTIMIZER_WARNING = 0.3
# ImageNet error of a ResNet-50 by images that batch normalisation sees at a time: 23.6 % with 32,
# 24.8 % with 8, 27.3 % with 4, 34.7 % with 2 (Wu and He 2018, https://arxiv.org/abs/1803.08494).
NORM_IMAGES_WARNING = 4
NORM_IMAGES_ERROR = 2
# memory_increase. Debugger: increase 5 (points of a hundred), window 10 samples, which are two a
# second; ours are one in two seconds.
MEMORY_GROWTH = 5.0
MEMORY_WINDOW = 5
MEMORY_WINDOWS = 4
# initialisation_too_long. Debugger: threshold 20 minutes.
STARTUP_MINUTES = 20.0
# step_outliers. Debugger: stddev 3, n_outliers 10.
OUTLIER_DEVIATIONS = 3.0
OUTLIERS = 10
OUTLIER_SHARE = 0.1
# workload_imbalance. Debugger: threshold 0.5, of GPUs' use; ours of machines' images a second.
IMBALANCE = 0.5
HOST_TRIALS = 3
