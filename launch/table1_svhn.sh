#!/usr/bin/env bash
# Table 1, SVHN: FixMatch, FlexMatch and SoftMatch, alone and with CalibrateMix, at 40, 250 and 1,000 labels.
# Settings: wide_resnet28_2, weight decay 5e-4, 64 labeled and 448 unlabeled images a step, 2^20 updates.
# Images are not mirrored.
# The paper's figures: not at hand. Error of the base methods in USB's published table, %, which trains on train and
# extra together, 604,388 images, and mirrors them (--train-split train+extra --hflip 0.5 at the end does so):
# FixMatch 2.08 1.99 2.00, FlexMatch 3.36 5.02 5.43, SoftMatch 2.31 2.15 2.08.
# Measured by us: not run. Time: not measured.
# The environment that it takes, and its scales: _common.sh.
. "$(dirname -- "${BASH_SOURCE[0]}")/_common.sh"

dataset svhn --model wide_resnet28_2 --weight-decay 5e-4
for labels in $(labels 40 250 1000); do
    base_methods "-$labels" --num-labels "$labels"
done
report
