#!/usr/bin/env bash
# Table 2, ImageNet: FixMatch, FlexMatch and SoftMatch, alone and with CalibrateMix, with 10 % of the labels.
# Settings: resnet50 at 224 pixels, weight decay 3e-4. Ours, since we know no others: 64 labeled and 448 unlabeled
# images a step and 2^20 updates, as in table 1. On a GPU add --amp --channels-last; for several, set NUM_PROCESSES.
# DATA_DIR holds <split>/<class>/<image> or the hub's parquet files.
# The paper's figures: not at hand. Measured by us: not run. Time: not measured.
# The environment that it takes, and its scales: _common.sh.
. "$(dirname -- "${BASH_SOURCE[0]}")/_common.sh"

dataset imagenet --img-size 224 --model resnet50 --weight-decay 3e-4
base_methods '' --label-fraction 0.1
report
