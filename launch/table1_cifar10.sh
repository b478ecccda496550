#!/usr/bin/env bash
# Table 1, CIFAR-10: FixMatch, FlexMatch and SoftMatch, alone and with CalibrateMix, at 40, 250 and 4,000 labels.
# Settings: wide_resnet28_2, weight decay 5e-4, 64 labeled and 448 unlabeled images a step, 2^20 updates.
# The paper's figures: not at hand. Error of the base methods in USB's published table, %, by the same recipe but for a
# detail of the network (wide_resnet.py) and the colour of what strong views move in (views.py):
# FixMatch 8.33 4.97 4.29, FlexMatch 5.21 5.00 4.28, SoftMatch 5.06 4.84 4.27.
# Measured by us: at SCALE=cpu as part of table3_baselines.sh, in results/README.md; the full recipe was not run.
# Time: at SCALE=cpu three minutes a run on one core of an AMD EPYC server.
# The environment that it takes, and its scales: _common.sh.
. "$(dirname -- "${BASH_SOURCE[0]}")/_common.sh"

dataset cifar10 --model wide_resnet28_2 --weight-decay 5e-4
for labels in $(labels 40 250 4000); do
    base_methods "-$labels" --num-labels "$labels"
done
report
