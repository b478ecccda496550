#!/usr/bin/env bash
# Table 1, STL-10: FixMatch, FlexMatch and SoftMatch, alone and with CalibrateMix, at 40, 250 and 1,000 labels.
# Settings: wide_resnet37_2, weight decay 5e-4, 64 labeled and 448 unlabeled images a step, 2^20 updates.
# The paper's figures: not at hand. Unlabeled are the 5,000 training and the 100,000 unlabeled images, at 96 pixels.
# Measured by us: not run. Time: not measured.
# The environment that it takes, and its scales: _common.sh.
. "$(dirname -- "${BASH_SOURCE[0]}")/_common.sh"

dataset stl10 --model wide_resnet37_2 --weight-decay 5e-4
for labels in $(labels 40 250 1000); do
    base_methods "-$labels" --num-labels "$labels"
done
report
